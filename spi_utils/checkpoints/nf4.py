"""NF4 as bitsandbytes stores it, bit for bit, computed about ten times faster on a CPU.

A matrix is read row by row in blocks of 64 weights. A block keeps one float32 absmax; each weight, divided
by it, becomes the index of the nearest of 16 levels, quantiles of a normal distribution (QLoRA, arXiv
2305.14314). bitsandbytes finds that index by a binary search per weight; here it is looked up in a table.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from threading import RLock
from typing import TYPE_CHECKING, TypeVar

from spi_utils.errors import AnalysisError

if TYPE_CHECKING:
    import torch

Part = TypeVar("Part")
Result = TypeVar("Result")

BLOCK = 64  # weights that share one absmax
TINY = 1e-38  # bitsandbytes divides by max(absmax, TINY), so that an all-zero block stays zero
CHUNK = 1 << 18  # weights processed at once: the scratch arrays fit a CPU's cache
CELLS_PER_UNIT = 128.0  # cells of the lookup table on [-1, 1]; narrower than any two midpoints are apart

# bitsandbytes' levels (functional.get_4bit_type), ascending.
NF4_LEVELS = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
ZERO_INDEX = NF4_LEVELS.index(0.0)  # the code of the zero that pads an odd number of weights

_THREADS = RLock()


def nf4_levels(device: torch.device | str = "cpu") -> torch.Tensor:
    """The 16 NF4 levels, float32, ascending."""
    import torch

    return torch.tensor(NF4_LEVELS, dtype=torch.float32, device=device)


def nf4_codes(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A CPU weight of n values -> packed codes (⌈n/2⌉, 1) uint8 and absmax (⌈n/64⌉,) float32.

    The first weight of a pair sits in the high half of its byte. AnalysisError if a weight isn't finite.
    """
    import torch

    flat = weight.reshape(-1)
    numel = flat.numel()
    whole = numel - numel % BLOCK
    codes = torch.empty(((numel + 1) // 2, 1), dtype=torch.uint8)
    absmax = torch.empty(-(-numel // BLOCK), dtype=torch.float32)

    def fill(start: int) -> None:
        stop = min(start + CHUNK, whole)
        absmax[start // BLOCK : stop // BLOCK], index = _whole_blocks(flat[start:stop])
        codes[start // 2 : stop // 2, 0] = _pairs(index)

    map_parts(fill, range(0, whole, CHUNK))
    if whole < numel:
        absmax[-1:], index = _last_block(flat[whole:])
        codes[whole // 2 :, 0] = _pairs(torch.nn.functional.pad(index, (0, numel % 2), value=ZERO_INDEX))
    return codes, absmax


def _whole_blocks(weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    # (n,) -> absmax (n/64,), indices (n,)
    x = weights.float().view(-1, BLOCK)
    peak = x.abs().amax(dim=1)
    check_finite(peak)
    x = (x * peak.clamp(min=TINY).reciprocal_()[:, None]).clamp_(-1, 1)
    return peak, nearest_level(x.view(-1))


def _last_block(weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    # The last, partial block: bitsandbytes divides, instead of multiplying by a reciprocal, and keeps TINY.
    x = weights.float()
    peak = x.abs().amax().clamp(min=TINY)
    check_finite(peak)
    return peak[None], nearest_level((x / peak).clamp_(-1, 1))


def map_parts(work: Callable[[Part], Result], parts: Sequence[Part]) -> list[Result]:
    """`work` on every part, a thread a part, while torch's own operations use one thread.

    Splitting each small operation between threads instead waits for the slowest of them every time: on a busy
    machine that costs more than it gains.
    """
    if len(parts) < 2:
        return [work(part) for part in parts]
    with one_thread() as threads, ThreadPoolExecutor(threads) as pool:
        return list(pool.map(work, parts))


@contextmanager
def one_thread() -> Iterator[int]:
    """torch operations use one thread here, so sums don't depend on the machine; yields how many it had."""
    import torch

    with _THREADS:  # the number is the process', not the caller's
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield threads
        finally:
            torch.set_num_threads(threads)


def check_finite(absmax: torch.Tensor) -> None:
    """AnalysisError unless every absmax is finite: a NaN or infinity among the weights shows there."""
    if not absmax.isfinite().all():
        raise AnalysisError(
            "The weight holds NaN or infinity, so it can't be quantized. "
            "Check the checkpoint, or the cast that made it 16-bit."
        )


def _pairs(index: torch.Tensor) -> torch.Tensor:
    # (n,) indices below 16 -> (n/2,) bytes
    return (index[::2] << 4) | index[1::2]


def nearest_level(x: torch.Tensor) -> torch.Tensor:
    """Index (uint8) of the NF4 level nearest to each x in [-1, 1]: the number of midpoints below x.

    [-1, 1] is cut into equal cells so narrow that none holds two midpoints. A cell's first index, and the
    midpoint inside it (or infinity), come from a table; one comparison decides. This is exact, not merely
    close: as x grows its cell never falls, in floating point too, and the same arithmetic placed the
    midpoints.
    """
    import torch

    first, midpoint = _cell_tables()
    cell = x.mul(CELLS_PER_UNIT).add_(CELLS_PER_UNIT).to(torch.int32)
    return first.index_select(0, cell).add_(x > midpoint.index_select(0, cell))


@cache
def _cell_tables() -> tuple[torch.Tensor, torch.Tensor]:
    # (cells,) uint8: midpoints below the cell; (cells,) float32: the midpoint inside it, or infinity
    import torch

    levels = nf4_levels()
    midpoints = (levels[:-1] + levels[1:]) / 2  # in float32, as bitsandbytes computes them
    cells = midpoints.mul(CELLS_PER_UNIT).add_(CELLS_PER_UNIT).to(torch.int32)
    size = int(2 * CELLS_PER_UNIT) + 1
    first = torch.zeros(size, dtype=torch.uint8)
    inside = torch.full((size,), math.inf)
    for midpoint, cell in zip(midpoints, cells.tolist(), strict=True):
        first[cell + 1 :] += 1
        inside[cell] = midpoint
    return first, inside
