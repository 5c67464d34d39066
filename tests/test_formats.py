"""Formats against bitsandbytes itself and against closed forms."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest
import torch
from bitsandbytes import functional as bnb
from compressed_tensors.compressors import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from scipy.stats import norm

from spi_utils.errors import AnalysisError, PlanError
from spi_utils.formats import (
    FORMATS,
    NF4_LEVELS,
    bitsandbytes_state,
    dequantize,
    fits,
    layer_bytes,
    quantize,
    relative_error,
)

DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def gaussian(rows, cols, dtype=torch.float32, scale=0.02, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, cols, generator=generator) * scale).to(dtype)


def assert_as_bitsandbytes(weight, double_quant=False):
    packed = quantize(weight, "nf4", double_quant=double_quant)
    codes, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=double_quant)
    assert torch.equal(packed.codes, codes)
    ours, theirs = bitsandbytes_state(packed).as_dict(packed=True), state.as_dict(packed=True)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name
    return packed, codes, state


@pytest.mark.parametrize("threads", [1, 2])
def test_double_quantization_is_bitsandbytes_whatever_the_threads(threads):
    before = torch.get_num_threads()
    weight = gaussian(640, 4096, torch.float16)  # 40,960 absmaxes: torch would sum them in parallel
    torch.set_num_threads(threads)
    packed = quantize(weight, "nf4", double_quant=True)
    assert torch.get_num_threads() == threads
    torch.set_num_threads(1)
    expected = assert_as_bitsandbytes(weight, double_quant=True)[0]
    torch.set_num_threads(before)
    assert torch.equal(packed.codes, expected.codes)
    assert packed.nested[2] == expected.nested[2]


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("out", DTYPES)
@pytest.mark.parametrize("shape", [(64, 128), (33, 41), (7, 9), (1, 1), (1, 65), (128, 32), (300, 1031)])
def test_dequantized_values_are_bitsandbytes_own(shape, out, double_quant):
    packed, codes, state = assert_as_bitsandbytes(gaussian(*shape, torch.float16), double_quant)
    scales = state.absmax
    if double_quant:
        scales = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset
    pairs = codes.reshape(-1).int()
    index = torch.stack([pairs >> 4, pairs & 15], 1).reshape(-1)[: shape[0] * shape[1]]
    expected = torch.tensor(NF4_LEVELS)[index] * scales.repeat_interleave(64)[: len(index)]
    assert torch.equal(dequantize(packed, out), expected.to(out).view(shape))
    if shape[1] % 64 == 0:  # elsewhere its CPU path takes blocks to begin at every row: wrong values
        state.dtype = out
        assert torch.equal(dequantize(packed, out), bnb.dequantize_4bit(codes, state))


def test_the_levels_are_bitsandbytes_and_quantiles_of_a_normal():
    assert torch.equal(torch.tensor(NF4_LEVELS), bnb.get_4bit_type("nf4", device="cpu"))
    offset = 0.9677083  # QLoRA's choice of the outermost quantile
    positive = norm.ppf(torch.linspace(offset, 0.5, 9)[:-1].numpy())
    assert torch.allclose(torch.tensor(NF4_LEVELS[8:]), torch.tensor(positive[::-1] / positive[0]).float())


INT4 = sorted(name for name in FORMATS if name.startswith("int4"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_is_absmax_per_row_with_a_scale_in_the_storage_dtype(dtype):
    weight = gaussian(48, 80, dtype)
    weight[5] = 0
    packed = quantize(weight, "int8")
    assert weight.float().abs().max() < 1  # it is left as it was
    rows = weight.float().abs().amax(1)
    scale = (rows / 127).to(dtype).double()
    scale[5] = 1  # a row of zeros
    assert torch.equal(packed.scales.double(), scale)
    expected = (weight.double() / scale[:, None]).round().clamp(-127, 127)
    # float32 may round a value that lies on a half the other way; nothing else may differ
    assert (packed.codes.double() != expected).sum() <= 3
    assert dequantize(packed)[5].abs().max() == 0


@pytest.mark.parametrize("fmt", ["int8", *INT4])
def test_integer_formats_are_what_compressed_tensors_computes(fmt):
    """In float32; in 16 bits its quotients round before they are rounded to codes."""
    weight = gaussian(40, 256)
    weight[3, :128] = 0
    packed = quantize(weight, fmt)
    local, scheme = as_compressed_tensors(packed)
    theirs = PackedQuantizationCompressor.compress({"weight": weight, **local}, scheme)
    back = PackedQuantizationCompressor.decompress(theirs, scheme)["weight"]
    assert torch.equal(back, dequantize(packed))
    assert dequantize(packed)[3, :128].abs().max() == 0


def as_compressed_tensors(packed):
    """A packed matrix as compressed-tensors' own local state dict and scheme."""
    row = FORMATS[packed.fmt]
    strategy = {"strategy": "group", "group_size": row.group} if row.group else {"strategy": "channel"}
    scheme = QuantizationScheme(
        targets=["x"], weights=QuantizationArgs(num_bits=row.bits, symmetric=row.symmetric, **strategy)
    )
    local = {"weight_scale": packed.scales.view(packed.shape[0], -1)}
    if packed.zeros is not None:
        local["weight_zero_point"] = packed.zeros
    return local, scheme


@pytest.mark.parametrize("group", [32, 64, 128])
def test_searched_scales_are_the_best_of_the_grid_and_never_worse_than_absmax(group):
    weight = torch.distributions.StudentT(4.0).sample((64, 512)) * 0.02
    names = [f"int4_g{group}{kind}" for kind in ("", "_absmax", "_asym")]
    errors = {name: relative_error(weight, name) for name in names}
    assert errors[names[2]] < errors[names[0]] < errors[names[1]]
    # The symmetric search, group by group in float64.
    parts = weight.double().view(-1, group)
    peak = weight.view(-1, group).abs().amax(1)
    best = torch.full((len(parts),), torch.inf, dtype=torch.float64)
    for share in (round(1.04 - 0.04 * step, 2) for step in range(14)):
        scale = (peak * (share * 2 / 15)).double()[:, None]
        error = ((parts / scale).round().clamp(-8, 7) * scale - parts).square().sum(1)
        best = torch.minimum(best, error)
    assert errors[names[0]] == pytest.approx((best.sum().sqrt() / parts.norm()).item(), rel=1e-4)


def test_absmax_scales_span_the_range_in_fifteen_steps():
    weight = gaussian(4, 64)
    before = weight.clone()
    symmetric = quantize(weight, "int4_g32_absmax")
    assert torch.allclose(symmetric.scales, weight.view(4, 2, 32).abs().amax(2) / 7.5)
    asymmetric = quantize(weight, "int4_g32_asym")
    assert asymmetric.zeros.min() >= -8 and asymmetric.zeros.max() <= 7
    assert torch.equal(weight, before)
    # A group that lies on the grid comes back exactly.
    grid = (torch.arange(64) % 16).float()[None] * 0.25
    assert torch.equal(dequantize(quantize(grid, "int4_g64_asym")), grid)


def test_16bit_is_the_weight_and_a_copy():
    weight = gaussian(4, 6, torch.bfloat16)
    values = dequantize(quantize(weight, "16bit"), torch.bfloat16)
    assert torch.equal(values, weight) and values.data_ptr() != weight.data_ptr()


@pytest.mark.parametrize("fmt", ["nf4", "int8"])
def test_relative_error_by_parts_is_that_of_the_whole(fmt):
    weight = gaussian(1100, 4100, torch.float16)  # more than one part, and a partial last block
    difference = dequantize(quantize(weight, fmt)).double() - weight.double()
    expected = (difference.norm() / weight.double().norm()).item()
    assert relative_error(weight, fmt) == pytest.approx(expected, rel=1e-9)


def test_relative_errors_have_their_known_sizes():
    weight = gaussian(512, 512)
    assert 0.09 < relative_error(weight, "nf4") < 0.095  # METHOD: about .092 for a Gaussian matrix
    assert relative_error(weight, "16bit") == relative_error(torch.zeros(3, 5), "nf4") == 0


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("shape", [(2560, 32), (64, 64), (7, 9), (320, 1000)])
@pytest.mark.parametrize("double", [False, True])
def test_nf4_bytes_are_those_bitsandbytes_saves(shape, dtype, double):
    weight = gaussian(*shape, getattr(torch, dtype))
    codes, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=double)
    held = sum(t.nbytes for t in [codes, *state.as_dict(packed=True).values()])
    found = layer_bytes("nf4", *shape, double_quant=double, dtype=dtype)
    assert abs(found - held) <= (10 if double else 0)


def test_bytes_of_the_other_formats_and_nominal_bits():
    assert layer_bytes("16bit", 10, 20) == 400
    for name, row in FORMATS.items():
        bits = 8 * layer_bytes(name, 8192, 8192) / 8192**2
        assert bits == pytest.approx(row.bits_per_weight, rel=1e-3)
    double = 8 * layer_bytes("nf4", 8192, 8192, double_quant=True) / 8192**2
    assert double == pytest.approx(4 + 8 / 64 + 32 / (64 * 256), rel=1e-3)  # 4.127


def test_numbers_need_no_torch():
    code = (
        "import sys, json; from spi_utils.formats import FORMATS, layer_bytes;"
        "print(json.dumps([layer_bytes('nf4', 64, 64), 'torch' in sys.modules, sorted(FORMATS)]))"
    )
    size, has_torch, names = json.loads(subprocess.check_output([sys.executable, "-c", code]))
    assert size == layer_bytes("nf4", 64, 64)
    assert not has_torch
    assert names == sorted(["16bit", "int8", "nf4", "nf4_dq", *INT4])


@pytest.mark.parametrize("fmt", ["nf4", "int8", "int4_g32", "int4_g32_asym"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", [(0, 0), (2, 8)])
def test_weights_that_are_not_finite_are_refused(fmt, bad, where):
    weight = gaussian(3, 33 if fmt in ("nf4", "int8") else 32)
    weight[where] = bad
    with pytest.raises(AnalysisError, match="NaN or infinity"):
        quantize(weight, fmt)


@pytest.mark.parametrize(
    ("call", "error", "said"),
    [
        (lambda: quantize(torch.zeros(4), "nf4"), AnalysisError, "2-D"),
        (lambda: relative_error(torch.zeros(0, 4), "nf4"), AnalysisError, "2-D"),
        (lambda: quantize(torch.zeros(4, 4, dtype=torch.float64), "nf4"), AnalysisError, "float64"),
        (
            lambda: quantize(gaussian(4, 576), "int4_g128"),
            AnalysisError,
            "128 doesn't divide the 576 columns",
        ),
        (lambda: layer_bytes("nf5", 4, 4), PlanError, "nf4"),
    ],
)
def test_wrong_weights_and_names_are_refused(call, error, said):
    assert fits("int4_g64", 576) and not fits("int4_g128", 576) and fits("nf4", 577)
    with pytest.raises(error, match=said):
        call()
