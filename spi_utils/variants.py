"""Variants of one loaded model: its layers switched in place, each to a format's own values."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from spi_utils.errors import EvaluationError
from spi_utils.formats import Packed, dequantize, fits, quantize


class Originals:
    """16-bit copies of a model's own weights, with the `read` of `models.Weights`."""

    def __init__(self, model: Any, layers: Iterable[str], dtype: torch.dtype) -> None:
        held = {f"{name}.weight": model.get_submodule(name).weight for name in layers}
        self._held = {name: weight.detach().to("cpu", dtype, copy=True) for name, weight in held.items()}

    def read(self, name: str) -> torch.Tensor:
        """The tensor of a state-dict name, in storage dtype on the CPU."""
        return self._held[name]


class Switch:
    """Changes a loaded model's layers in place between 16-bit and what a format makes of them.

    Every variant starts from the weights in storage dtype, as they lie in the checkpoint. A format's values
    are the format's own (for NF4, bitsandbytes'), rounded to storage dtype and then put into the model's
    compute dtype: the numbers don't depend on which 4-bit kernel a machine would pick. Codes are made once a
    layer and format and kept on the CPU (0.5 to 0.6 bytes a weight for 4-bit formats, 1 for int8).

    "noise" adds Gaussian noise whose Frobenius norm is exactly the layer's NF4 error, seeded by layer.
    """

    def __init__(
        self, model: Any, weights: Any, layers: Sequence[str], *, double_quant: bool = False, seed: int = 0
    ) -> None:
        """Prepare switching.

        Args:
            model: a causal LM holding the 16-bit weights.
            weights: an open `models.Weights` (or `Originals`): `read(name)` in storage dtype on the CPU.
            layers: module names that may be switched.
            double_quant: quantize NF4's scales as well.
            seed: of the noise.
        """
        self.model, self.weights, self.double_quant, self.seed = model, weights, double_quant, seed
        self.layers = tuple(layers)
        self.state = dict.fromkeys(self.layers, "16bit")
        self._packed: dict[tuple[str, str], Packed] = {}

    def to(self, formats: Mapping[str, str]) -> None:
        """Put each named layer into its format, and every other one back into 16-bit.

        Raises:
            EvaluationError: a name that is not among `layers`.
        """
        unknown = [name for name in formats if name not in self.state]
        if unknown:
            raise EvaluationError(
                f"The model has no layer {unknown[0]!r} to switch; expected names like {self.layers[0]!r}."
            )
        for name, held in self.state.items():
            fmt = formats.get(name, "16bit")
            if fmt != held:
                self._put(name, self.values(name, fmt))
                self.state[name] = fmt

    def restore(self) -> None:
        """Put every layer back into 16-bit."""
        self.to({})

    def renew(self) -> None:
        """Put every layer's own weights back, whatever was written into the model beside this switch."""
        for name in self.layers:
            self._put(name, self._original(name))
            self.state[name] = "16bit"

    def values(self, name: str, fmt: str) -> torch.Tensor:
        """What `fmt` makes of a layer: (out, in), storage dtype."""
        if fmt == "16bit":
            return self._original(name)
        if fmt == "noise":
            return self._noise(name)
        packed = self.packed(name, fmt)
        return dequantize(_move(packed, self.device), packed.dtype)

    def packed(self, name: str, fmt: str) -> Packed:
        """The codes of a layer in a format, made at the first call and kept on the CPU."""
        key = (name, fmt)
        if key not in self._packed:
            made = quantize(self._original(name), fmt, double_quant=self.double_quant and fmt == "nf4")
            self._packed[key] = _move(made, torch.device("cpu"))
        return self._packed[key]

    def able(self, name: str, fmt: str) -> bool:
        """Whether a format can hold a layer: its groups must divide the columns."""
        return fits(fmt, self.live(name).shape[1])

    def live(self, name: str) -> torch.Tensor:
        """The layer's weight as the model holds it now: (out, in), compute dtype, a view."""
        weight = self.model.get_submodule(name).weight.detach()
        return weight.t() if self._transposed(name) else weight

    @property
    def device(self) -> torch.device:
        """Where the model's layers lie."""
        return self.model.get_submodule(self.layers[0]).weight.device

    def _original(self, name: str) -> torch.Tensor:
        weight = self.weights.read(f"{name}.weight").to(self.device)
        return weight.t().contiguous() if self._transposed(name) else weight

    def _put(self, name: str, values: torch.Tensor) -> None:
        weight = self.model.get_submodule(name).weight
        with torch.no_grad():
            weight.copy_(values.t() if self._transposed(name) else values)

    def _transposed(self, name: str) -> bool:
        """transformers' Conv1D holds (in, out)."""
        return type(self.model.get_submodule(name)).__name__ == "Conv1D"

    def _noise(self, name: str) -> torch.Tensor:
        original = self._original(name)
        error = torch.linalg.vector_norm(self.values(name, "nf4").float() - original.float())
        digest = hashlib.sha256(f"{self.seed}/{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        noise = torch.randn(original.shape, generator=generator).to(original.device)
        noise *= error / torch.linalg.vector_norm(noise)
        return (original.float() + noise).to(original.dtype)


def _move(packed: Packed, device: torch.device) -> Packed:
    scales = None if packed.scales is None else packed.scales.to(device)
    nested = None if packed.nested is None else tuple(part.to(device) for part in packed.nested)
    zeros = None if packed.zeros is None else packed.zeros.to(device)
    return replace(packed, codes=packed.codes.to(device), scales=scales, nested=nested, zeros=zeros)  # type: ignore[arg-type]
