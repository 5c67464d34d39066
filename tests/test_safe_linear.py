"""SafeFP16Linear against plain linears and closed forms; float16 products between float32 activations."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import bitsandbytes as bnb
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.integrations.bitsandbytes import replace_with_bnb_linear

from spi_utils.errors import CheckpointError, EvaluationError, PlanError
from spi_utils.models import load_model, resolve
from spi_utils.safe_linear import SafeFP16Linear, WideLinear, isolate, widen
from tests.tiny import make_tiny


@pytest.fixture
def ordinary():
    torch.manual_seed(0)
    return nn.Linear(64, 48).half().requires_grad_(False)


@pytest.fixture
def loud():
    """Row 0 sums 64 inputs times 2000, row 1 the negative of it; row 2 is quiet."""
    made = nn.Linear(64, 3, bias=False).half().requires_grad_(False)
    made.weight.zero_()
    made.weight[0], made.weight[1], made.weight[2, 0] = 2000, -2000, 0.5
    return made


@pytest.mark.parametrize("policy", ["saturate", "upcast", "error"])
@pytest.mark.parametrize("shape", [(64,), (1, 64), (2, 5, 64), (0, 64)])
def test_it_is_a_plain_linear_while_nothing_overflows(ordinary, policy, shape):
    safe, x = SafeFP16Linear.from_linear(ordinary, policy=policy), torch.randn(shape).half()
    assert torch.equal(safe(x), ordinary(x)) and safe(x).dtype == torch.float16
    assert torch.equal(safe(x.float()), ordinary(x)) and safe.overflows == 0


def test_weights_are_shared_and_the_state_dict_is_a_plain_linears(ordinary):
    safe, x = SafeFP16Linear.from_linear(ordinary), torch.randn(3, 64).half().requires_grad_()
    assert safe.weight is ordinary.weight and safe.bias is ordinary.bias
    assert list(safe.state_dict()) == ["weight", "bias"] and "policy=saturate" in repr(safe)
    fresh = SafeFP16Linear(64, 48)
    fresh.load_state_dict(ordinary.state_dict())
    assert torch.equal(fresh(x), ordinary(x)) and torch.equal(copy.deepcopy(safe)(x), ordinary(x))
    safe(x).float().sum().backward()
    assert torch.allclose(x.grad[0].float(), ordinary.weight.float().sum(0), rtol=1e-2, atol=1e-2)


def test_saturate_clamps_and_counts_and_upcast_gives_the_float32_product(loud):
    safe, x = SafeFP16Linear.from_linear(loud, policy="saturate"), torch.ones(2, 64).half()
    assert loud(x)[0, 0].isinf()  # 64 × 2000 = 128,000
    assert torch.equal(safe(x), torch.tensor([[65504.0, -65504.0, 0.5]] * 2).half())
    safe(x[:1])
    assert safe.overflows == 6
    wide = SafeFP16Linear.from_linear(loud, policy="upcast")
    y = wide(x[:1])
    assert (y.dtype, y.tolist(), wide.overflows) == (torch.float32, [[128000.0, -128000.0, 0.5]], 2)
    assert wide(torch.zeros(1, 64).half()).dtype == torch.float16


def test_error_names_the_layer_and_a_policy_must_be_known(loud):
    safe = SafeFP16Linear.from_linear(loud, policy="error", label="model.layers.3.mlp.down_proj")
    with pytest.raises(EvaluationError, match=r"model\.layers\.3\.mlp\.down_proj: 2 outputs"):
        safe(torch.ones(1, 64).half())
    with pytest.raises(PlanError, match="saturate"):
        SafeFP16Linear.from_linear(loud, policy="pray")


def test_inputs_beyond_float16_and_nan(loud):
    x = torch.zeros(1, 64)
    x[0, 0] = 1e5  # row 2 halves it
    loud.weight[:2] = 0
    for policy, expected, dtype in (("saturate", 32752, torch.float16), ("upcast", 50000, torch.float32)):
        safe = SafeFP16Linear.from_linear(loud, policy=policy)
        y = safe(x)
        assert (y[0, 2].item(), y.dtype, safe.overflows) == (expected, dtype, 1)
    safe = SafeFP16Linear.from_linear(loud, policy="error")
    with pytest.raises(EvaluationError, match="1 inputs"):
        safe(x)
    assert safe(torch.full((1, 64), torch.nan).half()).isnan().all() and safe.overflows == 1
    loud.bfloat16().weight[:] = 2000  # has float32's range
    assert safe(torch.ones(1, 64).bfloat16()).tolist() == [[128000.0] * 3]


def test_quantizers_do_not_see_it(ordinary):
    model = nn.ModuleDict({"a": copy.deepcopy(ordinary), "b": SafeFP16Linear.from_linear(ordinary)})
    config = BitsAndBytesConfig(load_in_4bit=True)
    replace_with_bnb_linear(model, modules_to_not_convert=[], quantization_config=config)
    assert type(model["a"]) is bnb.nn.Linear4bit and type(model["b"]) is SafeFP16Linear


def test_isolate_swaps_exactly_the_protected_layers_and_changes_no_logit(tiny):
    kept = tuple(f"model.layers.{i}.mlp.down_proj" for i in range(4))
    options = {"bnb_4bit_quant_type": "nf4", "llm_int8_skip_modules": [*kept, "lm_head"]}
    config = BitsAndBytesConfig(load_in_4bit=True, **options)
    model = AutoModelForCausalLM.from_pretrained(tiny("llama"), quantization_config=config, dtype="float16")
    names, ids = list(model.state_dict()), torch.arange(12)[None]
    with torch.inference_mode():
        before = model(ids).logits
        after = isolate(model, SimpleNamespace(protected=kept))(ids).logits
    assert torch.equal(before, after) and list(model.state_dict()) == names
    safe = {name: m for name, m in model.named_modules() if isinstance(m, SafeFP16Linear)}
    assert tuple(safe) == kept and all(module.label == name for name, module in safe.items())
    with pytest.raises(CheckpointError, match="Linear4bit"):
        isolate(model, SimpleNamespace(protected=("model.layers.0.mlp.up_proj",)))
    with pytest.raises(PlanError, match=r"layers\.9"):
        isolate(model, SimpleNamespace(protected=("model.layers.9.mlp.up_proj",)))


# --- a whole model in float16 ----------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["llama_untied", "gemma3"])
@pytest.mark.parametrize("factor", [1.0, 6e4])
def test_what_overflows_in_float16_is_right(arch, factor, tmp_path):
    """One layer's weights times a factor: float16 holds them, not their products."""

    def logits(model):
        with torch.no_grad():
            return model(input_ids=(torch.arange(48) * 5)[None], use_cache=False).logits.float()

    make_tiny(arch, tmp_path, initializer_range=0.1)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval().requires_grad_(False)
    layer = next(name for name, _ in model.named_modules() if name.endswith("1.mlp.down_proj"))
    model.get_submodule(layer).weight.mul_(factor)
    expected, half = logits(model), copy.deepcopy(model).half()
    assert bool(logits(half).isfinite().all()) == (factor == 1.0)  # as stock transformers run it
    names, tied = list(half.state_dict()), half.config.tie_word_embeddings
    assert widen(half) and list(half.state_dict()) == names and half.lm_head.weight.dtype == torch.float16
    assert ((logits(half) - expected).std() / expected.std()).item() < 0.01
    hot = half.get_submodule(layer)
    assert isinstance(hot, WideLinear) and (hot.overflows > 0) == (factor > 1)
    assert (half.lm_head.weight is half.get_input_embeddings().weight) == tied


def test_loading_in_float16_is_wide_where_no_matrices_are_elsewhere_and_in_float32_is_not(tiny):
    for arch, dtype in (("llama", torch.float16), ("llama", torch.float32), ("gpt2", torch.float16)):
        model = load_model(resolve(str(tiny(arch))), device="cpu", dtype=dtype)
        wide = any(isinstance(module, WideLinear) for module in model.modules())
        assert wide == ((arch, dtype) == ("llama", torch.float16))
