"""What runs on a GPU, compared with an independent source on the CPU; the same tests have a CPU half."""

import numpy as np
import pytest
import torch
from bitsandbytes import functional as bnb
from torch import nn

from spi_utils.formats import dequantize, quantize
from spi_utils.models import list_layers, load_model, open_weights, resolve
from spi_utils.rounding import guided
from spi_utils.safe_linear import SafeFP16Linear
from spi_utils.scoring import Switch, reference_states, token_scores
from spi_utils.sensitivity import all_slopes, random_windows
from spi_utils.spectra import decompose

CUDA = torch.cuda.is_available()
DEVICES = [
    "cpu",
    pytest.param("cuda:0", marks=[pytest.mark.cuda, pytest.mark.skipif(not CUDA, reason="no CUDA device")]),
]
on_devices = pytest.mark.parametrize("device", DEVICES)
HALVES = [torch.float16, torch.bfloat16, torch.float32]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    from tests.tiny import make_tiny

    return resolve(str(make_tiny("qwen3_5", tmp_path_factory.mktemp("cuda") / "model")))


def weight(rows=384, cols=512, dtype=torch.float16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    scale = torch.randn(cols, generator=generator).mul(0.5).exp()
    return (torch.randn(rows, cols, generator=generator) * scale * 0.02).to(dtype)


@on_devices
def test_singular_values_in_float32_without_tf32_are_float64s(device):
    w = weight(512, 1024)
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True  # a session that has it on must not get other spectra
    try:
        values, _ = decompose(w.to(device), precision="float32")
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    exact = np.linalg.svd(w.double().numpy(), compute_uv=False)
    top = len(exact) // 2  # the tail that every statistic of the law is made of
    np.testing.assert_allclose(values[:top], exact[:top], rtol=1e-4)


@on_devices
@pytest.mark.parametrize("dtype", HALVES)
def test_nf4_codes_are_bitsandbytes_own(device, dtype):
    w = weight(dtype=dtype).to(device)
    packed = quantize(w, "nf4")
    codes, state = bnb.quantize_4bit(w, quant_type="nf4", blocksize=64)
    assert torch.equal(packed.codes.cpu().flatten(), codes.cpu().flatten())
    torch.testing.assert_close(packed.scales.cpu().flatten(), state.absmax.cpu().flatten(), rtol=0, atol=0)
    theirs = bnb.dequantize_4bit(codes, state)
    assert torch.equal(dequantize(packed, dtype).cpu(), theirs.cpu())


@on_devices
@pytest.mark.parametrize("fmt", ["nf4", "int4_g64"])
def test_guided_rounding_costs_what_it_costs_in_float64_on_the_cpu(device, fmt):
    w = weight(256, 512)
    x = torch.randn(2048, 512, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x = x @ torch.randn(512, 512, generator=torch.Generator().manual_seed(2), dtype=torch.float64) / 20
    h = (x.T @ x).float()

    def cost(packed):
        error = dequantize(packed).cpu().double() - w.double()
        return float(((error @ h.double()) * error).sum())

    here, used = guided(w.to(device), [h.to(device)], fmt)
    there, same = guided(w, [h], fmt)
    nearest = cost(quantize(w, fmt))
    assert used == same and cost(here) < 0.7 * nearest
    assert cost(here) == pytest.approx(cost(there), rel=0.02)
    agree = (here.codes.cpu() == there.codes).float().mean()
    assert agree > 0.98


@on_devices
def test_slopes_are_the_cpus(device, source):
    def slopes(place):
        model = load_model(source, device=place, dtype=torch.float32)
        names = [x.name for x in list_layers(source) if x.quantizable and x.role == "linear"]
        with open_weights(source) as weights:
            switch = Switch(model, weights, names)
            windows = random_windows(model, 4, 32, None, 0)
            return all_slopes(switch, windows, ("nf4",), seed=0)["nf4"]

    here, there = slopes(torch.device(device)), slopes(torch.device("cpu"))
    np.testing.assert_allclose(here, there, rtol=0.02, atol=1e-3 * np.abs(there).max())


@on_devices
@pytest.mark.parametrize("dtype", HALVES)
def test_scores_are_float32s_on_the_cpu(device, dtype, source):
    exact = load_model(source, device="cpu", dtype=torch.float32)
    windows = random_windows(exact, 4, 48, None, 0)
    truth = reference_states(exact, windows)
    model = load_model(source, device=torch.device(device), dtype=dtype)
    found = reference_states(model, windows)
    slack = {torch.float16: 0.02, torch.bfloat16: 0.1, torch.float32: 1e-3}[dtype]
    np.testing.assert_allclose(np.asarray(found.nll), np.asarray(truth.nll), atol=slack)
    again = token_scores(model, windows, found)
    assert again.kl is not None and float(np.abs(again.kl).max()) < 1e-3


@on_devices
def test_what_overflows_float16_is_the_float32_product(device):
    plain = nn.Linear(64, 32, bias=False).half().requires_grad_(False)
    nn.init.constant_(plain.weight, 100.0)
    y = SafeFP16Linear.from_linear(plain).to(device)(torch.full((2, 64), 50.0).half().to(device))
    assert y.tolist() == [[64 * 100 * 50] * 32] * 2
