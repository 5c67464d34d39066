"""SafeFP16Linear against plain linears and closed forms; float16 products between float32 activations."""

from __future__ import annotations

import copy

import bitsandbytes as bnb
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.integrations.bitsandbytes import replace_with_bnb_linear

from spi_utils.models import load_model, resolve
from spi_utils.safe_linear import SafeFP16Linear, widen
from tests.tiny import make_tiny


@pytest.mark.parametrize("shape", [(64,), (2, 5, 64), (0, 64)])
def test_it_is_a_plain_linear_while_nothing_overflows_and_quantizers_do_not_see_it(shape):
    torch.manual_seed(0)
    plain = nn.Linear(64, 48).half()
    safe, x = SafeFP16Linear.from_linear(plain), torch.randn(shape).half().requires_grad_()
    assert torch.equal(safe(x), plain(x)) and torch.equal(safe(x.float()), plain(x))
    assert safe.weight is plain.weight and list(safe.state_dict()) == ["weight", "bias"]
    own, expected = (torch.autograd.grad(one(x).float().sum(), x)[0] for one in (safe, plain))
    assert torch.equal(own, expected)
    model = nn.ModuleDict({"a": plain, "b": safe})
    config = BitsAndBytesConfig(load_in_4bit=True)
    replace_with_bnb_linear(model, modules_to_not_convert=[], quantization_config=config)
    assert type(model["a"]) is bnb.nn.Linear4bit and type(model["b"]) is SafeFP16Linear


def test_what_float16_cannot_hold_is_the_float32_product_and_nan_stays():
    plain = nn.Linear(64, 3, bias=False).half().requires_grad_(False)
    plain.weight.zero_()
    plain.weight[0], plain.weight[1], plain.weight[2, 0] = 2000, -2000, 0.5
    safe, x = SafeFP16Linear.from_linear(plain), torch.ones(1, 64).half()
    assert plain(x)[0, 0].isinf()  # 64 × 2000 = 128,000
    assert safe(x).tolist() == [[128000.0, -128000.0, 0.5]] and safe(x).dtype == torch.float32
    assert safe(torch.full((1, 64), torch.nan).half()).isnan().all()
    plain.weight[:2] = 0
    x = torch.zeros(1, 64)
    x[0, 0] = 1e5  # an input beyond float16
    assert safe(x).tolist() == [[0.0, 0.0, 50000.0]]
    plain.weight[2, 0], plain.weight[1, 0] = 1, 0.9  # finite ends whose sum is not
    assert safe(torch.full((1, 64), 4e4).half()).dtype == torch.float16
    plain.bfloat16().weight[:] = 2000  # has float32's range
    assert safe(torch.ones(1, 64).bfloat16()).tolist() == [[128000.0] * 3]


@pytest.mark.parametrize("arch", ["llama_untied", "gemma3"])
@pytest.mark.parametrize("factor", [1.0, 6e4])
def test_a_widened_model_is_right_where_float16_overflows(arch, factor, tmp_path):
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
    assert (half.lm_head.weight is half.get_input_embeddings().weight) == tied


def test_loading_in_float16_is_wide_where_no_matrices_are_elsewhere_and_in_float32_is_not(tiny):
    for arch, dtype in (("llama", torch.float16), ("llama", torch.float32), ("gpt2", torch.float16)):
        model = load_model(resolve(str(tiny(arch))), device="cpu", dtype=dtype)
        wide = any(isinstance(module, SafeFP16Linear) for module in model.modules())
        assert wide == ((arch, dtype) == ("llama", torch.float16))
