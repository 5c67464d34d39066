"""How much memory a backward pass takes, said before it starts; and how to take less."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import psutil
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from spi_utils.costs.measure import find_blocks
from spi_utils.errors import AnalysisError
from spi_utils.scoring import LOGIT_BYTES, final_hidden
from spi_utils.variants import Switch

BATCH_TOKENS = 768  # in one backward pass: far fewer, and making ΔW costs more than using it
SHARE = 0.85  # of a device's memory that may be planned with
HOST_ROOM = 700_000_000  # Python, torch and the libraries themselves
OUTSIDE = -1  # what is kept before the first block and after the last


@dataclass(frozen=True)
class Footprint:
    """How the backward pass is cut, and its estimated peak memory in bytes on the model's device."""

    batch: int
    checkpoint: bool
    bytes: int

    def __str__(self) -> str:
        """The cut and the peak, to end a sentence."""
        how = ", with gradient checkpointing" if self.checkpoint else ""
        return f"{self.batch} at a time{how}, about {self.bytes / 1e9:.1f} GB at peak"


@dataclass(frozen=True)
class Kept:
    """Bytes that one window's graph keeps for its backward pass: in all, and in the largest block."""

    total: int
    block: int


def footprints(switch: Switch, length: int, formats: int) -> list[Footprint]:
    """Ways to cut the backward pass, the largest that fits first; the next is for where memory runs out.

    The choice looks at the device's whole memory, so that the same machine always computes the same way.
    Gradient checkpointing comes after all that do without.

    Raises:
        AnalysisError: not even one window with checkpointing fits into what is free now; says what to change.
    """
    whole, free = _memory(switch.device)
    most = max(1, BATCH_TOKENS // length)
    batches = [most] + [b for b in (4, 2, 1) if b < most]
    kept = kept_bytes(switch, length)
    options = [(batch, checkpoint) for checkpoint in (False, True) for batch in batches]
    plans = [Footprint(b, c, estimate(switch, kept, b, length, formats, c)) for b, c in options]
    fitting = [plan for plan in plans if plan.bytes < SHARE * whole] or plans[-1:]
    held = sum(p.numel() * p.element_size() for p in switch.model.parameters())  # in memory already
    if fitting[0].bytes - held > free:
        raise AnalysisError(
            f"Sensitivities need about {fitting[0].bytes / 1e9:.1f} GB on {switch.device}, the weights' "
            f"{held / 1e9:.1f} GB included; {free / 1e9:.1f} GB are free. Use shorter windows (length="
            f"{length // 2}), a device with more memory, or sensitivity='none'."
        )
    return fitting


def kept_bytes(switch: Switch, length: int) -> Kept:
    """What one window's forward pass would keep, counted in a pass that keeps nothing.

    Architectures differ by a factor of four: attention keeps little beside its layers' inputs, a linear
    attention's recurrence written in torch keeps float32 states. Autograd's saved tensors and the inputs that
    the slopes need are counted once each, whatever views of them there are.
    """
    seen: dict[int, StorageWeakRef] = {}  # a weak reference holds an address, so that none is used twice
    for tensor in (*switch.model.parameters(), *switch.model.buffers()):
        _new(seen, tensor)
    bytes_at: dict[int, int] = {}
    place = [OUTSIDE]

    def count(tensor: torch.Tensor) -> None:
        if _new(seen, tensor):
            bytes_at[place[0]] = bytes_at.get(place[0], 0) + tensor.untyped_storage().nbytes()

    def enter(index: int, *_: Any) -> None:
        place[0] = index

    _, blocks = find_blocks(switch.model, switch.layers)
    module = switch.model.get_submodule
    handles = [module(name).register_forward_hook(lambda m, i, out: count(i[0])) for name in switch.layers]
    for index, block in enumerate(blocks):
        handles.append(block.register_forward_pre_hook(partial(enter, index)))
        handles.append(block.register_forward_hook(partial(enter, OUTSIDE)))
    embedding = switch.model.get_input_embeddings()
    handles.append(embedding.register_forward_hook(lambda m, i, out: out.requires_grad_(True)))
    ids = torch.zeros((1, length), dtype=torch.long, device=embedding.weight.device)
    try:
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(count, _never):
            final_hidden(switch.model, ids)
    finally:
        for handle in handles:
            handle.remove()
    total = sum(bytes_at.values())
    return Kept(total, max((bytes_at.get(index, 0) for index in range(len(blocks))), default=total))


def _new(seen: dict[int, StorageWeakRef], tensor: torch.Tensor) -> bool:
    """Whether a tensor's storage wasn't seen before; it is from now on."""
    reference = StorageWeakRef(tensor.untyped_storage())
    if reference.cdata in seen:
        return False
    seen[reference.cdata] = reference
    return True


def _never(_: Any) -> torch.Tensor:
    raise RuntimeError("the counting pass has no backward pass")


def estimate(switch: Switch, kept: Kept, batch: int, length: int, formats: int, checkpoint: bool) -> int:
    """Estimated peak bytes of a backward pass over `batch` windows of `length` tokens.

    Weights, what the graph keeps, as much again as the largest block keeps (its gradients), ΔW in float32,
    and two pieces of logits; on a CPU the formats' codes as well, which otherwise lie on the host.
    """
    model = switch.model
    shapes = [switch.live(name).shape for name in switch.layers]
    _, blocks = find_blocks(model, switch.layers)
    graph = kept.total + kept.block
    if checkpoint and blocks:
        hidden = model.get_input_embeddings().weight
        graph = 2 * kept.block + length * hidden.shape[1] * hidden.element_size() * len(blocks)
    largest = max(rows * cols for rows, cols in shapes)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    total = weights + batch * graph + 3 * largest * 4 + 2 * LOGIT_BYTES
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
