"""Guided rounding against brute force, the libraries' own readers, autograd, and on bad moments."""

import itertools
import subprocess
import sys

import pytest
import torch

from spi_utils.errors import AnalysisError
from spi_utils.formats import dequantize, quantize
from spi_utils.rounding import guided

FORMATS = ("nf4", "nf4_dq", "int4_g64", "int4_g32")


def _case(rows=48, cols=192, dtype=torch.bfloat16, tokens=96):
    generator = torch.Generator().manual_seed(3)
    weight = (torch.randn(rows, cols, generator=generator) * 0.05).to(dtype)
    x = torch.randn(tokens, cols, generator=generator) @ torch.randn(cols, cols, generator=generator)
    return weight, x.T @ x


def _cost(rounded, weight, h):
    delta = rounded.double() - weight.double()
    return torch.einsum("oi,ij,oj->", delta, h.double(), delta).item()


@pytest.mark.parametrize("fmt", FORMATS)
def test_the_guided_objective_falls_far_below_nearest(fmt):
    weight, h = _case()
    packed, damping = guided(weight, [h], fmt)
    assert damping == 0.05
    assert _cost(dequantize(packed), weight, h) < 0.5 * _cost(dequantize(quantize(weight, fmt)), weight, h)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_bitsandbytes_reads_the_codes_as_level_times_absmax(dtype):
    from bitsandbytes.functional import dequantize_4bit

    from spi_utils.formats import bitsandbytes_state

    weight, h = _case(dtype=dtype)
    packed, _ = guided(weight, [h], "nf4")
    read = dequantize_4bit(packed.codes, bitsandbytes_state(packed))
    high_low = torch.stack([packed.codes.flatten() >> 4, packed.codes.flatten() & 15], 1).flatten().long()
    levels = bitsandbytes_state(packed).code[high_low].view(-1, 64)
    assert torch.equal(read, (levels * packed.scales[:, None]).view(weight.shape).to(dtype))


def test_the_second_level_of_scales_holds_those_that_the_feedback_saw():
    """bitsandbytes reads 8-bit scales; they are chosen among its values, so little of the gain is lost."""
    from bitsandbytes.functional import dequantize_4bit

    from spi_utils.formats import bitsandbytes_state

    weight, h = _case(rows=96)
    packed, _ = guided(weight, [h], "nf4_dq")
    assert packed.scales.dtype == torch.uint8
    assert torch.equal(
        dequantize_4bit(packed.codes, bitsandbytes_state(packed)), dequantize(packed, weight.dtype)
    )
    plain = quantize(weight, "nf4_dq")
    assert all(torch.equal(a, b) for a, b in zip(packed.nested, plain.nested, strict=True))
    cost = {fmt: _cost(dequantize(guided(weight, [h], fmt)[0]), weight, h) for fmt in ("nf4", "nf4_dq")}
    assert cost["nf4_dq"] < 1.3 * cost["nf4"]


def test_parts_of_a_fused_projection_are_rounded_by_their_own_moments():
    weight, h = _case()
    moments = [h, torch.eye(192)]
    packed, damping = guided(weight, moments, "nf4", parts=[32, 16])
    alone = [guided(rows, [m], "nf4")[0] for rows, m in zip(weight.split([32, 16]), moments, strict=True)]
    assert damping == 0.05
    assert torch.equal(dequantize(packed), torch.cat([dequantize(one) for one in alone]))


@pytest.mark.parametrize("fmt", ["int4_g64", "int4_g32"])
def test_compressed_tensors_unpacks_the_same_codes(fmt):
    pack = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    weight, h = _case()
    packed, _ = guided(weight, [h], fmt)
    words = packed.codes.contiguous().view(torch.int32)
    codes = pack.unpack_from_int32(words, 4, torch.Size(weight.shape))
    group = weight.shape[1] // packed.scales.shape[1]
    values = codes.float().view(weight.shape[0], -1, group) * packed.scales.float()[..., None]
    assert torch.equal(dequantize(packed), values.flatten(1))


def test_one_group_is_within_reach_of_an_exhaustive_search():
    """A row of 64 where only 3 inputs matter: feedback finds nearly the best of all codes for those three."""
    weight, _ = _case(rows=6, cols=64, dtype=torch.float32)
    x = torch.zeros(4, 64)
    x[:, :3] = torch.tensor([[1.0, 0.9, -0.8], [0.2, 1.0, 0.3], [0.9, 0.9, 0.2], [1.0, 0.2, 0.7]])
    h = x.T @ x
    packed, _ = guided(weight, [h + 1e-6 * torch.eye(64)], "nf4", damping=1e-4)
    from spi_utils.formats import bitsandbytes_state

    levels, rounded = bitsandbytes_state(packed).code, dequantize(packed)
    total = {"best": 0.0, "guided": 0.0, "nearest": 0.0}
    for row in range(6):
        peak = packed.scales[row]
        tries = torch.tensor(list(itertools.product(levels.tolist(), repeat=3))) * peak  # (4096, 3)
        costs = ((tries - weight[row, :3]) @ x[:, :3].T).square().sum(1)
        total["best"] += costs.min().item()
        total["guided"] += ((rounded[row, :3] - weight[row, :3]) @ x[:, :3].T).square().sum().item()
        nearest = dequantize(quantize(weight[row : row + 1], "nf4"))[0, :3]
        total["nearest"] += ((nearest - weight[row, :3]) @ x[:, :3].T).square().sum().item()
    assert total["best"] <= total["guided"] < 0.5 * total["nearest"]


@pytest.mark.parametrize("fmt", FORMATS)
def test_moments_that_cannot_guide_give_plain_codes_and_say_so(fmt):
    weight, h = _case()
    broken = h.clone()
    broken[0, 0] = float("nan")
    for moment in (broken, torch.zeros_like(h)):
        packed, damping = guided(weight, [moment], fmt)
        assert damping is None
        assert dequantize(packed).isfinite().all()


def test_zero_blocks_stay_zero_and_widths_that_do_not_divide_are_refused():
    weight, h = _case()
    weight[:, 64:128] = 0
    for fmt in FORMATS:
        assert torch.equal(
            dequantize(guided(weight, [torch.eye(192)], fmt)[0])[:, 64:128], torch.zeros(48, 64)
        )
    with pytest.raises(AnalysisError, match="96"):
        guided(weight[:, :96], [h[:96, :96]], "nf4")
    with pytest.raises(AnalysisError, match="int8"):
        guided(weight, [h], "int8")
    weight[0, 0] = float("inf")
    with pytest.raises(AnalysisError, match="NaN or infinity"):
        guided(weight, [h], "nf4")


def test_a_file_of_codes_is_the_same_bytes_in_every_process(tmp_path):
    code = (
        "import sys, torch; from pathlib import Path; from spi_utils.formats import quantize; "
        "from spi_utils.rounding import write_codes; torch.manual_seed(0); "
        "made = {(name, 'nf4'): quantize(torch.randn(64, 64), 'nf4') for name in 'ab'}; "
        "write_codes(Path(sys.argv[1]), made, 'mark')"
    )
    for number in range(2):
        subprocess.run([sys.executable, "-c", code, str(tmp_path / str(number))], check=True)
    assert len({(tmp_path / str(number)).read_bytes() for number in range(2)}) == 1
