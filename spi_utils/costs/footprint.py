"""How much memory a backward pass takes, said before it starts; and how to take less."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import psutil
import torch
from torch.utils.checkpoint import checkpoint

from spi_utils.costs.measure import find_blocks
from spi_utils.errors import AnalysisError
from spi_utils.scoring import LOGIT_BYTES
from spi_utils.variants import Switch

BATCH_TOKENS = 768  # in one backward pass: far fewer, and making ΔW costs more than using it
SHARE = 0.85  # of a device's memory that may be planned with
HOST_ROOM = 700_000_000  # Python, torch and the libraries themselves
# Activations that a block keeps for its backward pass, in units of its layers' inputs and outputs.
KEPT = 1.2


@dataclass(frozen=True)
class Footprint:
    """How the backward pass is cut, and its estimated peak memory in bytes on the model's device."""

    batch: int
    checkpoint: bool
    bytes: int


def choose_batch(switch: Switch, length: int, formats: int) -> Footprint:
    """The largest batch that fits this machine, with gradient checkpointing only where nothing else fits.

    The choice looks at the device's whole memory, so that the same machine always computes the same way.

    Raises:
        AnalysisError: not even one window with checkpointing fits into what is free now; says what to change.
    """
    whole, free = _memory(switch.device)
    most = max(1, BATCH_TOKENS // length)
    batches = [most] + [b for b in (4, 2, 1) if b < most]
    options = [(batch, checkpoint) for checkpoint in (False, True) for batch in batches]
    plans = [Footprint(b, c, estimate(switch, b, length, formats, c)) for b, c in options]
    plan = next((plan for plan in plans if plan.bytes < SHARE * whole), plans[-1])
    held = sum(p.numel() * p.element_size() for p in switch.model.parameters())  # in memory already
    if plan.bytes - held > free:
        raise AnalysisError(
            f"Sensitivities need about {plan.bytes / 1e9:.1f} GB on {switch.device}, the weights' "
            f"{held / 1e9:.1f} GB included; {free / 1e9:.1f} GB are free. Use shorter windows (length="
            f"{length // 2}), a device with more memory, or sensitivity='none'."
        )
    return plan


def estimate(switch: Switch, batch: int, length: int, formats: int, checkpoint: bool) -> int:
    """Estimated peak bytes of a backward pass over `batch` windows of `length` tokens."""
    model = switch.model
    size = torch.empty((), dtype=model.dtype).element_size()
    shapes = [switch.live(name).shape for name in switch.layers]
    wide = sum(rows + cols for rows, cols in shapes) * KEPT
    _, blocks = find_blocks(model, switch.layers)
    hidden = model.get_input_embeddings().weight.shape[1]
    if checkpoint and blocks:
        wide = wide / len(blocks) + hidden * len(blocks)
    largest = max(rows * cols for rows, cols in shapes)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    total = weights + batch * length * wide * size + 3 * largest * 4 + 2 * LOGIT_BYTES
    if switch.device.type == "cpu":
        codes = sum(rows * cols for rows, cols in shapes) * (0.6 + (1.0 if formats > 1 else 0.0))
        codes += sum(rows * cols for rows, cols in shapes) * 0.6 * max(0, formats - 2)
        total += codes + HOST_ROOM
    return int(total)


def _memory(device: torch.device) -> tuple[int, int]:
    """The device's whole and its free memory, in bytes."""
    if device.type == "cuda":
        free, whole = torch.cuda.mem_get_info(device)
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return whole, free + unused
    memory = psutil.virtual_memory()
    return memory.total, memory.available


@contextlib.contextmanager
def checkpointed(switch: Switch, on: bool) -> Iterator[None]:
    """While entered, blocks recompute their activations in the backward pass.

    The reentrant form: its first pass builds no graph, so that the layers' inputs, which the hooks keep, live
    no longer than their block. transformers' own switch would need training mode, which wakes dropout.
    """
    _, blocks = find_blocks(switch.model, switch.layers) if on else ("", [])
    for block in blocks:
        block.forward = partial(_recomputed, block.forward)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


def _recomputed(forward: Callable[..., Any], *inputs: Any, **options: Any) -> Any:
    return checkpoint(partial(forward, **options), *inputs, use_reentrant=True)
