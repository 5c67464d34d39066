"""SafeFP16Linear against plain linears and closed forms; isolation on a real hybrid model."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import bitsandbytes as bnb
import pandas as pd
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.integrations.bitsandbytes import replace_with_bnb_linear
from transformers.pytorch_utils import Conv1D

from spi_utils.errors import CheckpointError, EvaluationError, PlanError
from spi_utils.safe_linear import SafeFP16Conv1D, SafeFP16Linear, isolate, isolation_report


def linear(weight, bias=None):
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    made.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        made.bias = nn.Parameter(bias, requires_grad=False)
    return made


@pytest.fixture
def ordinary():
    torch.manual_seed(0)
    return linear(torch.randn(48, 64).half(), torch.randn(48).half())


@pytest.fixture
def loud():
    """Row 0 sums 64 inputs times 2000, row 1 the negative of it; row 2 is quiet."""
    weight = torch.zeros(3, 64).half()
    weight[0], weight[1], weight[2, 0] = 2000, -2000, 0.5
    return linear(weight)


@pytest.mark.parametrize("policy", ["saturate", "upcast", "error"])
@pytest.mark.parametrize("shape", [(64,), (1, 64), (2, 5, 64), (0, 64)])
def test_it_is_a_plain_linear_while_nothing_overflows(ordinary, policy, shape):
    safe = SafeFP16Linear.from_linear(ordinary, policy=policy)
    x = torch.randn(shape).half()
    assert torch.equal(safe(x), ordinary(x))
    assert safe(x).dtype == torch.float16
    assert safe.overflows == 0


def test_weights_are_shared_and_the_state_dict_is_a_plain_linears(ordinary):
    safe = SafeFP16Linear.from_linear(ordinary)
    assert safe.weight is ordinary.weight
    assert safe.bias is ordinary.bias
    assert list(safe.state_dict()) == list(ordinary.state_dict()) == ["weight", "bias"]
    again = nn.Linear(64, 48).half()
    again.load_state_dict(safe.state_dict())
    assert torch.equal(again.weight, ordinary.weight)
    fresh = SafeFP16Linear(64, 48)
    fresh.load_state_dict(ordinary.state_dict())
    x = torch.randn(3, 64).half()
    assert torch.equal(fresh(x), ordinary(x))
    assert torch.equal(copy.deepcopy(safe)(x), ordinary(x))


def test_saturate_clamps_and_counts(loud):
    safe = SafeFP16Linear.from_linear(loud, policy="saturate")
    x = torch.ones(2, 64).half()
    assert loud(x)[0, 0].isinf()  # 64 × 2000 = 128,000
    expected = torch.tensor([[65504.0, -65504.0, 0.5]] * 2).half()
    assert torch.equal(safe(x), expected)
    assert safe.overflows == 4
    safe(x[:1])
    assert safe.overflows == 6


def test_upcast_gives_the_float32_product(loud):
    safe = SafeFP16Linear.from_linear(loud, policy="upcast")
    y = safe(torch.ones(1, 64).half())
    assert y.dtype == torch.float32
    assert y.tolist() == [[128000.0, -128000.0, 0.5]]
    assert safe.overflows == 2
    assert safe(torch.zeros(1, 64).half()).dtype == torch.float16


def test_error_names_the_layer(loud):
    safe = SafeFP16Linear.from_linear(loud, policy="error", label="model.layers.3.mlp.down_proj")
    with pytest.raises(EvaluationError, match=r"model\.layers\.3\.mlp\.down_proj: 2 outputs"):
        safe(torch.ones(1, 64).half())
    assert safe.overflows == 2


@pytest.mark.parametrize(
    ("policy", "expected", "dtype"),
    [("saturate", 32752.0, torch.float16), ("upcast", 50000.0, torch.float32)],
)
def test_inputs_beyond_float16(loud, policy, expected, dtype):
    safe = SafeFP16Linear.from_linear(loud, policy=policy)
    x = torch.zeros(1, 64)
    x[0, 0] = 1e5  # row 2 halves it
    loud.weight[:2] = 0
    y = safe(x)
    assert y[0, 2].item() == expected
    assert y.dtype == dtype
    assert safe.overflows == 1
    with pytest.raises(EvaluationError, match="1 inputs"):
        SafeFP16Linear.from_linear(loud, policy="error")(x)


def test_float32_inputs_in_range_are_computed_in_float16(ordinary):
    x = torch.randn(4, 64)
    assert torch.equal(SafeFP16Linear.from_linear(ordinary)(x), ordinary(x.half()))


def test_nan_is_no_overflow_and_is_passed_on(ordinary):
    x = torch.randn(2, 64).half()
    x[1, 3] = torch.nan
    for policy in ("saturate", "error"):
        safe = SafeFP16Linear.from_linear(ordinary, policy=policy)
        assert safe(x)[1].isnan().all()
        assert safe(x)[0].isfinite().all()
        assert safe.overflows == 0


def test_bfloat16_is_left_alone():
    plain = linear(torch.full((2, 64), 2000.0).bfloat16())
    y = SafeFP16Linear.from_linear(plain, policy="error")(torch.ones(1, 64).bfloat16())
    assert y.tolist() == [[128000.0, 128000.0]]


def test_gradients_flow_to_the_input(ordinary):
    x = torch.randn(3, 64).half().requires_grad_()
    SafeFP16Linear.from_linear(ordinary)(x).float().sum().backward()
    assert torch.allclose(x.grad[0].float(), ordinary.weight.float().sum(0), rtol=1e-2, atol=1e-2)


def test_unknown_policy(ordinary):
    with pytest.raises(PlanError, match="saturate"):
        SafeFP16Linear.from_linear(ordinary, policy="pray")


def test_quantizers_do_not_see_it(ordinary):
    model = nn.ModuleDict({"a": copy.deepcopy(ordinary), "b": SafeFP16Linear.from_linear(ordinary)})
    config = BitsAndBytesConfig(load_in_4bit=True)
    replace_with_bnb_linear(model, modules_to_not_convert=[], quantization_config=config)
    assert type(model["a"]) is bnb.nn.Linear4bit
    assert type(model["b"]) is SafeFP16Linear


@pytest.fixture
def hybrid(tiny):
    kept = [f"model.layers.{i}.mlp.down_proj" for i in range(4)]
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=[*kept, "lm_head"]
    )
    model = AutoModelForCausalLM.from_pretrained(
        tiny("llama"), quantization_config=config, dtype=torch.float16
    )
    return model.eval(), SimpleNamespace(protected=tuple(kept))


def test_isolate_swaps_exactly_the_protected_layers(hybrid):
    model, plan = hybrid
    names = list(model.state_dict())
    before = model.get_submodule(plan.protected[0]).weight.data_ptr()
    isolate(model, plan, policy="error")
    safe = [name for name, module in model.named_modules() if isinstance(module, SafeFP16Linear)]
    assert safe == list(plan.protected)
    assert list(model.state_dict()) == names
    assert model.get_submodule(plan.protected[0]).weight.data_ptr() == before
    assert model.get_submodule(safe[1]).label == safe[1]


def test_isolation_changes_no_logit(hybrid):
    model, plan = hybrid
    ids = torch.arange(12)[None]
    with torch.inference_mode():
        before = model(ids).logits
        after = isolate(model, plan)(ids).logits
    assert torch.equal(before, after)


def test_the_report_says_what_touches_each_layer(hybrid):
    model, plan = hybrid
    isolate(model, plan)
    model.get_submodule(plan.protected[2]).register_forward_hook(lambda *_: None)
    report = isolation_report(model).set_index("module")
    kept = report.loc[list(plan.protected)]
    assert set(kept["class"]) == {"SafeFP16Linear"}
    assert not kept["quantized"].any()
    assert set(kept["dtype"]) == {"float16"}
    assert kept["bytes"].tolist() == [128 * 256 * 2] * 4
    assert kept["overflows"].tolist() == [0, 0, 0, 0]
    assert kept["hooks"].tolist()[2] == kept["hooks"].tolist()[1] + 1
    packed = report.loc["model.layers.0.mlp.up_proj"]
    assert packed["class"] == "Linear4bit"
    assert packed["quantized"]
    assert packed["bytes"] == 128 * 256 // 2 + 4 * 128 * 256 // 64 + 64
    assert pd.isna(packed["overflows"])
    assert "bitsandbytes" in packed["kernel"]
    assert report.loc["model.embed_tokens"]["kernel"] == "lookup"
    assert "lm_head" in report.index


def test_isolating_what_is_quantized_or_missing_is_refused(hybrid):
    model, _ = hybrid
    with pytest.raises(CheckpointError, match="Linear4bit"):
        isolate(model, SimpleNamespace(protected=("model.layers.0.mlp.up_proj",)))
    with pytest.raises(PlanError, match=r"layers\.9"):
        isolate(model, SimpleNamespace(protected=("model.layers.9.mlp.up_proj",)))


# --- GPT-2's Conv1D --------------------------------------------------------------------------------------


@pytest.fixture
def conv():
    torch.manual_seed(0)
    made = Conv1D(48, 64).half().requires_grad_(False)
    made.bias.normal_()
    return made


@pytest.mark.parametrize("policy", ["saturate", "upcast", "error"])
@pytest.mark.parametrize("shape", [(64,), (1, 64), (2, 5, 64), (0, 64)])
def test_a_conv1d_is_a_plain_one_while_nothing_overflows(conv, policy, shape):
    safe = SafeFP16Conv1D(conv, policy=policy)
    x = torch.randn(shape).half()
    expected = conv(x) if x.dim() > 1 else conv(x[None])[0]
    assert torch.equal(safe(x), expected)
    assert safe.overflows == 0
    assert list(safe.state_dict()) == list(conv.state_dict()) == ["weight", "bias"]
    assert safe.weight is conv.weight and safe.bias is conv.bias
    assert f"policy={policy}" in repr(safe)


def test_a_conv1d_follows_its_policy(conv):
    conv.weight.zero_()
    conv.weight[:, 0], conv.weight[:, 1] = 2000, -2000  # 64 inputs of 1 make ±128,000
    conv.bias[:2] = 0
    x = torch.ones(1, 64).half()
    saturated = SafeFP16Conv1D(conv, policy="saturate")
    assert saturated(x)[0, :2].tolist() == [65504.0, -65504.0]
    assert saturated.overflows == 2
    upcast = SafeFP16Conv1D(conv, policy="upcast")(x)
    assert upcast.dtype == torch.float32
    assert upcast[0, :2].tolist() == [128000.0, -128000.0]
    with pytest.raises(EvaluationError, match=r"h\.0\.mlp\.c_fc: 2 outputs"):
        SafeFP16Conv1D(conv, policy="error", label="h.0.mlp.c_fc")(x)


def test_quantizers_do_not_see_a_safe_conv1d(conv):
    model = nn.ModuleDict({"a": copy.deepcopy(conv), "b": SafeFP16Conv1D(conv)})
    config = BitsAndBytesConfig(load_in_4bit=True)
    replace_with_bnb_linear(model, modules_to_not_convert=[], quantization_config=config)
    assert type(model["a"]) is bnb.nn.Linear4bit
    assert type(model["b"]) is SafeFP16Conv1D


def test_gpt2_is_isolated_too(tiny):
    model = AutoModelForCausalLM.from_pretrained(tiny("gpt2")).eval()
    kept = ("transformer.h.0.mlp.c_fc", "transformer.h.3.attn.c_attn")
    ids = torch.arange(12)[None]
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    with torch.inference_mode():
        before = model(ids).logits
        after = isolate(model, SimpleNamespace(protected=kept))(ids).logits
    assert torch.equal(before, after)
    assert {name: tensor.shape for name, tensor in model.state_dict().items()} == shapes
    report = isolation_report(model).set_index("module")
    assert tuple(report.index[report["class"] == "SafeFP16Conv1D"]) == kept
    assert report.loc[list(kept), "overflows"].tolist() == [0, 0]
    assert pd.isna(report.loc["transformer.h.1.mlp.c_fc", "overflows"])
