"""A loaded model, its variants and a text -> what each token costs, and how far each variant strays.

One model is loaded, once; `Switch` changes its layers in place. `reference_states` keeps the 16-bit
model's final hidden states (a few KB a token, where logits would need a megabyte), and `token_scores`
recomputes both models' logits through the shared head, a few rows at a time, in float32 log-softmax. A
vocabulary of 248k costs well under 1 GB above the model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from spi_utils.errors import EvaluationError
from spi_utils.formats import Packed, dequantize, fits, quantize, stored_as

LOGIT_BYTES = 100_000_000  # of one buffer of logits; at most two are alive
SLICE_BYTES = 2_000_000  # of the float32 rows worked on at once on a CPU: they stay in its cache
COLUMNS = {"nll": torch.float32, "kl": torch.float32, "same_top1": torch.bool, "dp": torch.float32}
BATCH_TOKENS = {"cpu": 1024, "cuda": 4096}  # measured: larger batches are no faster on 2 cores
NEAREST = "_nearest"  # behind a format's name: rounded to nearest, where others are guided


@dataclass(frozen=True)
class TokenScores:
    """What each predicted token costs; arrays are (windows, length - 1), entry t predicts token t + 1.

    Attributes:
        nll: float32, negative log-likelihood in nats.
        kl: float32, KL(reference ‖ this model) in nats, over the whole vocabulary.
        same_top1: bool, the reference's most likely token is also this model's.
        dp: float32, probability of the true token here minus in the reference.
    """

    nll: np.ndarray
    kl: np.ndarray
    same_top1: np.ndarray
    dp: np.ndarray


@dataclass(frozen=True)
class Reference:
    """The 16-bit model on the windows: `hidden` (W, T - 1, d) on the CPU in compute dtype, `nll`, `top1`.

    `nll` is float32 and `top1` int64, both (W, T - 1). Index with a slice to take some of the windows.
    """

    hidden: torch.Tensor
    nll: torch.Tensor
    top1: torch.Tensor

    def __getitem__(self, rows: slice) -> Reference:
        return Reference(self.hidden[rows], self.nll[rows], self.top1[rows])

    def scores(self) -> TokenScores:
        """The reference's own scores: no divergence from itself."""
        nll = self.nll.numpy()
        return TokenScores(nll, np.zeros_like(nll), np.ones(nll.shape, bool), np.zeros_like(nll))


class Head:
    """A model's output layer: final hidden states (N, d) -> logits (N, V), buffers reused.

    Some families scale or cap their logits. The rows of `_ADJUST` cover them by the configuration's own
    names; `check` compares with the model's own logits, so an unknown one is an error, never a wrong number.
    """

    _ADJUST: Mapping[str, Callable[[torch.Tensor, float], torch.Tensor]] = {
        "lm_head_multiplier": lambda z, value: z.mul(value),
        "logit_scale": lambda z, value: z.mul(value),
        "logits_scaling": lambda z, value: z.div(value),
        "final_logit_softcapping": lambda z, value: z.div(value).tanh().mul(value),
    }

    def __init__(self, model: Any) -> None:
        head = model.get_output_embeddings()
        if head is None:
            raise EvaluationError(f"{type(model).__name__} has no output layer: expected a causal LM.")
        self.weight, self.bias = head.weight, getattr(head, "bias", None)
        config = model.config.get_text_config()
        found = ((name, getattr(config, name, None)) for name in self._ADJUST)
        self.adjust = [(self._ADJUST[name], float(value)) for name, value in found if value]
        on_cpu = self.weight.device.type == "cpu"
        # Half-precision logits near 16 are 0.016 (float16) or 0.125 (bfloat16) apart: too coarse for the KL
        # of a good variant. CUDA keeps the product's float32 sums, from torch 2.8 on.
        on_cuda = self.weight.device.type == "cuda"
        keeps_sums = on_cuda and "dtype_out" in torch.ops.aten.mm.overloads()
        self.dtype = torch.float32 if keeps_sums else self.weight.dtype
        self.chunk = max(16, LOGIT_BYTES // (self.dtype.itemsize * self.weight.shape[0]))
        slice_bytes = SLICE_BYTES if on_cpu else 16 * SLICE_BYTES
        self.rows = max(1, slice_bytes // (4 * self.weight.shape[0]))
        self._buffers: dict[str, torch.Tensor] = {}

    def raw(self, hidden: torch.Tensor, buffer: str) -> torch.Tensor:
        """The product with the head's weight, before `finish`; valid until the next call with this buffer."""
        if buffer not in self._buffers:
            self._buffers[buffer] = torch.empty(
                self.chunk, self.weight.shape[0], dtype=self.dtype, device=self.weight.device
            )
        out = self._buffers[buffer][: len(hidden)]
        if self.dtype == self.weight.dtype:
            torch.mm(hidden, self.weight.t(), out=out)
        else:
            torch.mm(hidden, self.weight.t(), self.dtype, out=out)
        return out if self.bias is None else out.add_(self.bias)

    def finish(self, raw: torch.Tensor) -> torch.Tensor:
        """Raw rows -> float32 logits, scaled and capped as the model does; differentiable."""
        logits = raw.float()
        for adjust, value in self.adjust:
            logits = adjust(logits, value)
        return logits

    def check(self, model: Any, windows: torch.Tensor) -> None:
        """Raise EvaluationError unless hidden states through this head give the model's own logits."""
        ids = windows[:1, :16].to(self.weight.device)
        with torch.inference_mode():
            expected = model(input_ids=ids, use_cache=False).logits[0].float()
            got = self.finish(self.raw(final_hidden(model, ids)[0], "variant"))
        scale = expected.abs().max().item()
        error = (got - expected).abs().max().item()
        # Half-precision models round the logits themselves; a missing factor or cap is far larger than this.
        tolerance = 1e-4 if self.weight.dtype == torch.float32 else 2e-2
        if np.isfinite(scale) and not error <= tolerance * max(scale, 1.0):
            raise EvaluationError(
                f"{type(model).__name__} changes its logits after the head in a way that is not known here "
                f"(largest difference {error:.3g}, logits up to {scale:.3g}): add it to scoring.Head._ADJUST."
            )


def final_hidden(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Final hidden states (B, T, d), in the head's dtype."""
    return as_head_takes(model, body(model)(input_ids=ids, use_cache=False).last_hidden_state)


def body(model: Any) -> Any:
    """What is below the head; `base_model` is the whole model where a class names no such part (Llama 4)."""
    return model.model if model.base_model is model else model.base_model


def as_head_takes(model: Any, hidden: torch.Tensor) -> torch.Tensor:
    """Hidden states in the dtype of the output layer's weight, which `Head` multiplies them with."""
    dtype = model.get_output_embeddings().weight.dtype
    return hidden.to(dtype) if dtype.is_floating_point else hidden  # a packed head takes what it is given


def default_batch(device: torch.device, length: int) -> int:
    """Windows in a batch."""
    return max(1, BATCH_TOKENS.get(device.type, 1024) // length)


def reference_states(
    model: Any, windows: torch.Tensor, *, batch: int | None = None, label: str = "reference"
) -> Reference:
    """Run the 16-bit model once and keep what scoring a variant needs of it.

    Args:
        model: a causal LM with its 16-bit weights in place.
        windows: LongTensor (W, T).
        batch: windows at once; halved, and said so, where memory runs out.
        label: name of the variant, for messages.

    Raises:
        EvaluationError: logits that are not numbers, an unknown change of the logits, or out of memory.
    """
    head = Head(model)
    head.check(model, windows)
    parts: list[tuple[torch.Tensor, ...]] = []

    def score(ids: torch.Tensor) -> None:
        states = _states(model, ids)
        kinds = {"nll": torch.float32, "top1": torch.int64}
        columns = _rows(head, states.flatten(0, 1), ids[:, 1:].flatten(), kinds, _alone)
        _check_finite(columns["nll"], label)
        # at once: a copy that fails must leave no column longer
        parts.append((states.cpu(), *(column.view(len(ids), -1).cpu() for column in columns.values())))

    _batches(model, windows, batch, score)
    return Reference(*map(torch.cat, zip(*parts, strict=True)))


def token_scores(
    model: Any,
    windows: torch.Tensor,
    reference: Reference,
    *,
    batch: int | None = None,
    label: str = "variant",
    head: Head | None = None,
) -> TokenScores:
    """Score a model on windows, token by token.

    Args:
        model: a causal LM.
        windows: LongTensor (W, T); every token but the first of each window is predicted.
        reference: `reference_states` on the same windows.
        batch: windows at once; halved, and said so, where memory runs out.
        label: name of the variant, for messages.
        head: makes both models' logits; the model's own if None, which must then be the reference's too.

    Raises:
        EvaluationError: logits that are not numbers (names the variant), or out of memory with a single
            window.
    """
    head = head or Head(model)
    parts: list[dict[str, np.ndarray]] = []

    def score(ids: torch.Tensor) -> None:
        hidden, goals = _states(model, ids).flatten(0, 1), ids[:, 1:].flatten()
        done = sum(len(part["nll"]) for part in parts)
        columns = _rows(head, hidden, goals, COLUMNS, _compare, reference[done : done + len(ids)])
        _check_finite(columns["nll"], label)
        parts.append({k: v.view(len(ids), -1).cpu().numpy() for k, v in columns.items()})

    _batches(model, windows, batch, score)
    return TokenScores(**{name: np.concatenate([part[name] for part in parts]) for name in COLUMNS})


def _states(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Final hidden states of all positions that predict a token, (B, T - 1, d)."""
    with torch.inference_mode():
        return final_hidden(model, ids)[:, :-1]


@torch.inference_mode()
def _rows(
    head: Head,
    hidden: torch.Tensor,
    targets: torch.Tensor,
    kinds: Mapping[str, torch.dtype],
    work: Callable[..., dict[str, torch.Tensor]],
    held: Reference | None = None,
) -> dict[str, torch.Tensor]:
    """The columns `kinds` of each row of `hidden` (N, d), by `work` on a few rows of logits at a time."""
    # Made before the loop: small results kept between its large buffers would fragment the heap.
    columns = {k: torch.empty(len(hidden), dtype=v, device=hidden.device) for k, v in kinds.items()}
    for first in range(0, len(hidden), head.chunk):
        rows = slice(first, first + head.chunk)
        inputs = [head.raw(hidden[rows], "variant"), targets[rows]]
        if held is not None:
            states = held.hidden.flatten(0, 1)[rows].to(hidden.device)
            inputs += [head.raw(states, "reference"), held.top1.flatten()[rows].to(hidden.device)]
        places = {k: v[rows].split(head.rows) for k, v in columns.items()}
        for index, pieces in enumerate(zip(*(part.split(head.rows) for part in inputs), strict=True)):
            for name, values in work(head, *pieces).items():
                places[name][index].copy_(values)
    return columns


def _alone(head: Head, raw: torch.Tensor, targets: torch.Tensor) -> dict[str, torch.Tensor]:
    log_p = torch.log_softmax(head.finish(raw), dim=-1)  # (rows, V)
    return {"nll": -log_p.gather(1, targets[:, None])[:, 0], "top1": log_p.argmax(dim=-1)}


def _compare(
    head: Head, raw: torch.Tensor, targets: torch.Tensor, raw_held: torch.Tensor, top1: torch.Tensor
) -> dict[str, torch.Tensor]:
    """One slice of rows of the variant (q) against the reference (p): KL(p ‖ q) = Σ_v p_v (ln p_v - ln q_v).

    The difference is taken between normalised logarithms, both small where p is large, so that a KL of 1e-6
    is not lost in the rounding of logits of 20.
    """
    log_q = torch.log_softmax(head.finish(raw), dim=-1)  # (rows, V)
    log_p = torch.log_softmax(head.finish(raw_held), dim=-1)
    true_q = log_q.gather(1, targets[:, None])[:, 0]
    true_p = log_p.gather(1, targets[:, None])[:, 0]
    # `>=` counts an exact tie as the same choice; amax is several times cheaper than argmax
    same = log_q.gather(1, top1[:, None])[:, 0] >= log_q.amax(dim=-1)
    gap = torch.sub(log_p, log_q, out=log_q)
    kl = log_p.exp_().mul_(gap).sum(dim=-1)
    return {"nll": -true_q, "kl": kl, "same_top1": same, "dp": true_q.exp() - true_p.exp()}


def _batches(
    model: Any, windows: torch.Tensor, batch: int | None, score: Callable[[torch.Tensor], None]
) -> None:
    """Call `score` on successive batches of windows; out of memory halves the batch and goes on."""
    device = next(model.parameters()).device
    size = batch or default_batch(device, windows.shape[1])
    done = 0
    while done < len(windows):
        try:
            score(windows[done : done + size].to(device))
            done += size
            continue
        except RuntimeError as error:
            if not _out_of_memory(error):
                raise
            reason = str(error).splitlines()[0]
        if size == 1:
            raise EvaluationError(
                f"Out of memory with a single window of {windows.shape[1]} tokens ({reason}); use shorter "
                "windows, a smaller model, or a device with more memory."
            )
        size = max(1, size // 2)
        if device.type == "cuda":
            torch.cuda.empty_cache()
        print(f"out of memory: going on with {size} windows at a time", flush=True)


def _out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _check_finite(nll: torch.Tensor, label: str) -> None:
    if not torch.isfinite(nll).all():
        raise EvaluationError(
            f"Variant '{label}': the logits are not numbers: a layer's output overflows or is NaN. Try "
            "dtype='float32' or 'bfloat16'."
        )


def mean_kl(
    switch: Switch, formats: Mapping[str, str], windows: torch.Tensor, reference: Reference, label: str
) -> float:
    """Mean KL(16-bit ‖ hybrid) in nats a token, in float64; the model is left in that hybrid."""
    switch.to(formats)
    scores = token_scores(switch.model, windows, reference, label=label)
    assert scores.kl is not None
    return float(scores.kl.mean(dtype=np.float64))


# --- a model switched between formats -------------------------------------------------------------------


class Switch:
    """Changes a loaded model's layers in place between 16-bit and what a format makes of them.

    Every variant starts from the weights in storage dtype, as they lie in the checkpoint. A format's values
    are the format's own (for NF4, bitsandbytes'), rounded to storage dtype and then put into the model's
    compute dtype: the numbers don't depend on which 4-bit kernel a machine would pick. Codes are made once a
    layer and format and kept on the CPU (0.5 to 0.6 bytes a weight for 4-bit formats, 1 for int8).

    "noise" adds Gaussian noise whose Frobenius norm is exactly the layer's NF4 error, seeded by layer.
    """

    def __init__(
        self,
        model: Any,
        weights: Any,
        layers: Sequence[str],
        *,
        double_quant: bool = False,
        seed: int = 0,
        codes: Mapping[tuple[str, str], Packed] | None = None,
    ) -> None:
        """Prepare switching.

        Args:
            model: a causal LM holding the 16-bit weights.
            weights: an open `models.Weights`: `read(name)` in storage dtype on the CPU.
            layers: module names that may be switched.
            double_quant: quantize NF4's scales as well.
            seed: of the noise.
            codes: by layer and format, what guided rounding chose; others are rounded to nearest.
        """
        self.model, self.weights, self.double_quant, self.seed = model, weights, double_quant, seed
        self.layers = tuple(layers)
        self.state = dict.fromkeys(self.layers, "16bit")
        self.codes = {} if codes is None else codes
        self._packed: dict[tuple[str, str], Packed] = {}

    def to(self, formats: Mapping[str, str]) -> None:
        """Put each named layer into its format, and every other one back into 16-bit."""
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
            self._put(name, self.original(name))
            self.state[name] = "16bit"

    def values(self, name: str, fmt: str) -> torch.Tensor:
        """What `fmt` makes of a layer: (out, in), storage dtype."""
        if fmt == "16bit":
            return self.original(name)
        if fmt == "noise":
            return self._noise(name)
        packed = self.packed(name, fmt)
        return dequantize(packed.to(self.device), packed.dtype)

    def packed(self, name: str, fmt: str) -> Packed:
        """The codes of a layer in a format, made or read at the first call and kept on the CPU.

        "nf4_nearest" and the like are the format rounded to nearest, whatever `codes` holds.
        """
        if (name, fmt) not in self._packed:
            stored = stored_as(fmt.removesuffix(NEAREST), self.double_quant)
            chosen = None if fmt.endswith(NEAREST) else self.codes.get((name, stored))
            made = quantize(self.original(name), stored) if chosen is None else chosen
            self._packed[name, fmt] = made.to("cpu")
        return self._packed[name, fmt]

    def able(self, name: str, fmt: str) -> bool:
        """Whether a format can hold a layer: its groups must divide the columns."""
        return fits(fmt.removesuffix(NEAREST), self.live(name).shape[1])

    def live(self, name: str) -> torch.Tensor:
        """The layer's weight as the model holds it now: (out, in), compute dtype, a view."""
        weight = self.model.get_submodule(name).weight.detach()
        return weight.t() if self._transposed(name) else weight

    @property
    def device(self) -> torch.device:
        """Where the model's layers lie."""
        return self.model.get_submodule(self.layers[0]).weight.device

    def original(self, name: str) -> torch.Tensor:
        """The layer's own weight: (out, in), storage dtype, on the model's device."""
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
        original = self.original(name)
        # NF4's own error: that guided rounding moves more of a weight, on purpose, is no noise
        nearest = self.values(name, "nf4" + NEAREST)
        error = torch.linalg.vector_norm(nearest.float() - original.float())
        digest = hashlib.sha256(f"{self.seed}/{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        noise = torch.randn(original.shape, generator=generator).to(original.device)
        noise *= error / torch.linalg.vector_norm(noise)
        return (original.float() + noise).to(original.dtype)
