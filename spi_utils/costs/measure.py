"""What quantizing a layer costs, measured: the KL of the model with that one layer switched.

A layer of block b changes nothing before block b, so its evaluation starts from the 16-bit model's own hidden
states there: over all layers, half of the blocks' work is never done.
"""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from spi_utils.scoring import Reference, TokenScores, default_batch, final_hidden, token_scores
from spi_utils.variants import Switch

IN_BLOCK = re.compile(r"^(.*?)\.(\d+)\.")  # "model.layers.3.mlp.down_proj" -> "model.layers", "3"


class Measure:
    """Mean KL(16-bit ‖ variant) in nats a token, on fixed windows."""

    def __init__(self, switch: Switch, windows: torch.Tensor, reference: Reference) -> None:
        """Keep every block's output on the CPU: windows · T · hidden size numbers a block.

        Args:
            switch: of the model to evaluate; put into 16-bit first.
            windows: LongTensor (W, T).
            reference: `reference_states` of the same windows.
        """
        switch.restore()
        self.switch, self.windows, self.reference = switch, windows, reference
        size = default_batch(switch.device, windows.shape[1])
        self.batches = [slice(i, i + size) for i in range(0, len(windows), size)]
        self.list_name, self.blocks = find_blocks(switch.model, switch.layers)
        self.outputs = [_record(switch.model, self.blocks, windows[rows]) for rows in self.batches]
        if self.blocks and not self._resumes():
            print(
                "measuring: this architecture can't start at a block; every evaluation runs the whole model"
            )
            self.blocks, self.outputs = [], [[] for _ in self.batches]

    def all(self, formats: Mapping[str, str], label: str) -> float:
        """Mean KL with several layers switched; the model is left so."""
        self.switch.to(formats)
        return self._mean(0, label)

    def one(self, name: str, fmt: str) -> float:
        """Mean KL with one layer switched; the model is left so."""
        self.switch.to({name: fmt})
        found = IN_BLOCK.match(name)
        inside = found is not None and found[1] == self.list_name
        return self._mean(int(found[2]) if found is not None and inside else 0, f"{name} in {fmt}")

    def _mean(self, depth: int, label: str) -> float:
        parts = []
        for rows, outputs in zip(self.batches, self.outputs, strict=True):
            with resumed(self.blocks, outputs, depth):
                windows = self.windows[rows]
                held = self.reference[rows]
                parts.append(token_scores(self.switch.model, windows, held, batch=len(windows), label=label))
        kl = TokenScores.join(parts).kl
        assert kl is not None
        return float(kl.mean(dtype=np.float64))

    def _resumes(self) -> bool:
        """Does starting at the middle block give the same final states, bit for bit?"""
        ids = self.windows[self.batches[0]].to(self.switch.device)
        with torch.inference_mode(), resumed(self.blocks, self.outputs[0], len(self.blocks) // 2):
            got = final_hidden(self.switch.model, ids)[:, :-1]
        return torch.equal(got.cpu(), self.reference.hidden[self.batches[0]])


def find_blocks(model: Any, layers: Sequence[str]) -> tuple[str, list[Any]]:
    """The list of blocks that most layers lie in: its name and its modules; ("", []) if there is none."""
    names = Counter(found[1] for name in layers if (found := IN_BLOCK.match(name)))
    if not names:
        return "", []
    name = names.most_common(1)[0][0]
    return name, list(model.get_submodule(name))


@contextlib.contextmanager
def resumed(blocks: Sequence[Any], outputs: Sequence[Any], depth: int) -> Iterator[None]:
    """While entered, blocks before `depth` return their recorded outputs instead of computing them."""
    try:
        for block, output in zip(blocks[:depth], outputs, strict=False):
            device = next(block.parameters()).device
            block.forward = _returning(output, device)
        yield
    finally:
        for block in blocks[:depth]:
            block.__dict__.pop("forward", None)


def _returning(output: Any, device: torch.device) -> Any:
    def forward(*args: Any, **kwargs: Any) -> Any:
        return (output[0].to(device), *output[1:]) if isinstance(output, tuple) else output.to(device)

    return forward


@torch.inference_mode()
def _record(model: Any, blocks: Sequence[Any], ids: torch.Tensor) -> list[Any]:
    """The output of each block, on the CPU."""
    kept: list[Any] = []

    def keep(module: Any, inputs: Any, output: Any) -> None:
        kept.append((output[0].cpu(), *output[1:]) if isinstance(output, tuple) else output.cpu())

    handles = [block.register_forward_hook(keep) for block in blocks]
    try:
        if blocks:
            final_hidden(model, ids.to(next(model.parameters()).device))
    finally:
        for handle in handles:
            handle.remove()
    return kept
