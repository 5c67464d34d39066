"""float16 products between float32 activations, against the same model in float32."""

import copy

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from spi_utils.models import load_model, resolve
from spi_utils.safe_linear import WideLinear, widen
from spi_utils.scoring import Head, Switch, final_hidden, reference_states
from spi_utils.sensitivity import all_slopes
from tests.tiny import Originals, make_tiny

IDS = (torch.arange(48) * 5)[None]


def make(arch, directory, factor=1.0):
    """A tiny model in float32, one layer's weights times a factor: float16 holds them, not their products."""
    make_tiny(arch, directory, initializer_range=0.1)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval().requires_grad_(False)
    model.get_submodule(layer_of(model)).weight.mul_(factor)
    return model


def layer_of(model):
    return next(name for name, _ in model.named_modules() if name.endswith("1.mlp.down_proj"))


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits.float()


@pytest.mark.parametrize("arch", ["llama", "llama_untied", "qwen3_5", "gemma3", "phi3"])
@pytest.mark.parametrize("factor", [1.0, 6e4])
def test_what_overflows_in_float16_is_right(arch, factor, tmp_path):
    model = make(arch, tmp_path, factor)
    expected, half = logits(model), copy.deepcopy(model).half()
    plain = logits(half)  # as stock transformers run it
    assert bool(plain.isfinite().all()) == (factor == 1.0)
    names = list(half.state_dict())
    assert widen(half)
    assert list(half.state_dict()) == names and half.lm_head.weight.dtype == torch.float16
    assert ((logits(half) - expected).std() / expected.std()).item() < 0.01
    hot = half.get_submodule(layer_of(half))
    assert isinstance(hot, WideLinear) and (hot.overflows > 0) == (factor > 1)
    if half.config.tie_word_embeddings:
        assert half.lm_head.weight is half.get_input_embeddings().weight


@pytest.mark.parametrize("arch", ["gpt2", "mixtral"])
def test_models_with_matrices_elsewhere_stay_as_they_were(arch, tmp_path):
    make_tiny(arch, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float16)
    assert not widen(model)
    assert all(parameter.dtype == torch.float16 for parameter in model.parameters())
    assert not any(isinstance(module, WideLinear) for module in model.modules())


@pytest.mark.parametrize("arch", ["llama", "qwen3_5"])
def test_scores_and_slopes_of_a_model_that_float16_cannot_hold(arch, tmp_path):
    whole = make(arch, tmp_path, 6e4)
    half = copy.deepcopy(whole).half()
    widen(half)
    windows = torch.randint(0, 256, (2, 32), generator=torch.Generator().manual_seed(0))
    found = {}
    for model in (whole, half):
        names = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "head" not in n]
        switch = Switch(model, Originals(model, names, torch.float16), names)
        nll = reference_states(model, windows).nll
        slopes = all_slopes(switch, windows, ("nf4",))["nf4"]
        found[model.dtype] = (nll, np.sqrt((slopes**2).mean((1, 2))))
        assert final_hidden(model, windows).dtype == Head(model).weight.dtype
    (nll, size), (half_nll, half_size) = found[torch.float32], found[torch.float16]
    assert torch.isfinite(half_nll).all() and (half_nll - nll).abs().max() < 0.05
    assert np.corrcoef(np.log(size), np.log(half_size))[0, 1] > 0.95  # some of the sampled labels differ


def test_loading_in_float16_is_wide_and_in_float32_is_not(tmp_path):
    make_tiny("llama", tmp_path)
    source = resolve(str(tmp_path))
    kinds = {
        dtype: {type(m) for m in load_model(source, device="cpu", dtype=dtype).modules()}
        for dtype in (torch.float16, torch.float32)
    }
    assert WideLinear in kinds[torch.float16] and WideLinear not in kinds[torch.float32]
