"""What quantizing each layer costs, in nats a token, and the 4-bit codes that cost least, without data.

For a small change ΔW of one layer's weight, and labels y that the model itself gives, to second order

    E KL(p_W ‖ p_{W + ΔW}) ≈ ½ E_{y ~ p} [⟨∇_W ln p(y), ΔW⟩²]          (the Fisher information along ΔW)

With x_t the layer's input and g_t the gradient of the whole sequence's ln p(y) at its output, the product is
Σ_t s_t with the *slopes* s_t = g_t · (ΔW x_t): no weight gradient is ever made. The text is the model's own.

The pass goes block by block, from the last to the first, so that one block's activations are in memory: its
input was kept on the way up, the gradient at its output comes from the block above. In a block

1. the windows for rounding give each layer's second moment, from which guided rounding (`rounding.py`)
   chooses codes and scales; they are on disk before the next block begins;
2. the other windows, which the rounding has not seen, give the slopes along the ΔW that will be written.

`fisher` squares the slopes' sums over 8 neighbouring positions: (Σ_t s_t)² over a whole sequence is unbiased
but one noisy number, Σ_t s_t² drops the products of neighbours, which are not zero (benchmarks/fisher.py).
`measured` is the oracle, an evaluation of the whole model a layer; `refined` measures only the layers that
decide a budget's cut. Every column adds up over layers; `predicted` is scaled so that its sum is the KL
measured with all layers in that format, and over the cheaper half of them that half's own.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil
import torch
from accelerate.utils import find_executable_batch_size
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch.nn import functional as F

from spi_utils.errors import AnalysisError, RunError
from spi_utils.formats import BLOCK, NF4_DQ, Packed
from spi_utils.models import (
    ModelSource,
    Weights,
    list_layers,
    load_model,
    load_tokenizer,
    open_weights,
    resolve_device,
    resolve_dtype,
)
from spi_utils.progress import progress
from spi_utils.rounding import DAMPING, Codes, guidable, guided, read_mark, write_codes
from spi_utils.runs import Run, fingerprint, read_json, write_json, write_tensors
from spi_utils.scoring import (
    Head,
    Reference,
    Switch,
    as_head_takes,
    body,
    final_hidden,
    mean_kl,
    reference_states,
)
from spi_utils.texts import Text, check_windows, load_text, make_windows, start_token

Floats = NDArray[np.float64]
Slopes = dict[str, NDArray[np.float32]]

ENGINE = 5  # raise it when the numbers change: finished columns and pieces are then made again
WINDOWS, LENGTH = 32, 256  # of the text that gradients are taken on
HELD_OUT = 4  # one window for slopes to so many for rounding, on top of them
YARDSTICK_WINDOWS = 8  # of the text that KL is measured on
BATCH_TOKENS = 1024  # in one pass through a block
NEIGHBOURS = 8  # positions whose slopes are added before squaring (measured: 4 to 16 do as well)
SAMPLED = WINDOWS + WINDOWS // HELD_OUT  # windows of own text written together
COLLAPSED = 0.5  # share of one token above which a window is no text
SCALES = tuple(2.0**k for k in (10, 6, 2, -2, -6, -10))  # of a float16 gradient, until nothing overflows
IN_BLOCK = re.compile(r"^(.*?)\.(\d+)\.")  # "model.layers.3.mlp.down_proj" -> "model.layers", "3"
OWN = ("self", "random")
UNLIKE = (
    "Layer {} doesn't see every token once: its sensitivity can't be taken from gradients. Use "
    "sensitivity='measured' or 'none', and rounding='nearest'."
)


def sensitivities(
    run: Run,
    source: ModelSource,
    frame: pd.DataFrame,
    *,
    sensitivity: str = "self",
    formats: Sequence[str] = ("nf4", "int8"),
    rounding: str = "guided",
    device: str = "auto",
    dtype: str = "auto",
    seed: int = 0,
    refine_at: Sequence[float] = (),
    windows: int | None = None,
    length: int | None = None,
    text: str = "auto",
    force: bool = False,
) -> pd.DataFrame:
    """Cost of quantizing each layer, resumable by block and by layer; with guided rounding, the codes too.

    Args:
        run: codes go to its `rounded`, unfinished work to its folder for that of the stage "analyze".
        source: the model.
        frame: the layer table; `name`, `quantizable`, `numel` and `bytes_<fmt>` are read.
        sensitivity: "self" (text that the model samples from itself), "random" (random tokens), "measured"
            (the oracle, no slopes), or a text as in `texts.load_text`.
        formats: whose costs are wanted.
        rounding: "guided", or "nearest": the codes that bitsandbytes would choose.
        device, dtype: where and in which compute dtype.
        seed: of the sampled text and labels.
        refine_at: matrix bits at whose cut layers are measured, on the text that gradients are taken on.
        windows, length: of the text that gradients are taken on (32 × 256), or the oracle is measured on (8).
        text: what the sum over layers is measured on, and the oracle's layers.
        force: forget unfinished work.

    Returns:
        A row a quantizable layer, indexed by name, nats a token: `fisher_<fmt>` and its standard error
        `fisher_<fmt>_se`; `measured_<fmt>` or `refined_<fmt>` where asked for; and `predicted_<fmt>`.
        `attrs["sensitivity"]` tells the texts, the rounding and the measured sums.

    Raises:
        AnalysisError: not enough memory (says how much, and what to change).
        EvaluationError: a text that can't be used, or numbers that overflow.
    """
    names = list(frame.loc[frame["quantizable"].astype(bool), "name"])
    if not names or not formats:
        return pd.DataFrame(index=pd.Index(names, name="name"))
    measured = sensitivity == "measured"
    if refine_at and measured:
        raise AnalysisError("refine_at refines an estimate; sensitivity='measured' measures every layer.")
    settings = {
        "sensitivity": sensitivity,
        "formats": list(formats),
        "rounding": rounding,
        "device": device,
        "dtype": dtype,
        "seed": seed,
        "refine_at": list(refine_at),
        "windows": windows or (YARDSTICK_WINDOWS if measured else WINDOWS),
        "length": length or LENGTH,
    }
    given = load_text(text if sensitivity in (*OWN, "measured") else sensitivity)
    with open_weights(source) as weights:
        work = Work(run, source, weights, names, settings, given, force)
        columns = work.columns(frame.set_index("name").loc[names])
    table = pd.DataFrame(columns, index=pd.Index(names, name="name"))
    table.attrs["sensitivity"] = work.notes
    return table


def make_codes(
    run: Run, source: ModelSource, formats: Sequence[str], *, device: str = "auto", seed: int = 0
) -> Codes:
    """Guided codes of every quantizable layer in these formats, on the model's own text, without costs.

    Raises:
        AnalysisError: not enough memory.
    """
    names = [layer.name for layer in list_layers(source) if layer.quantizable]
    settings = {"sensitivity": "measured", "formats": list(formats), "rounding": "guided", "seed": seed}
    settings |= {"windows": WINDOWS, "length": LENGTH, "device": device, "dtype": "auto"}
    with open_weights(source) as weights:
        Work(run, source, weights, names, settings).slopes()
    return Codes(run.rounded)


class Work:
    """One computation of the columns; what is finished lies on disk under a mark and is not done again."""

    def __init__(
        self,
        run: Run,
        source: ModelSource,
        weights: Weights,
        names: Sequence[str],
        settings: dict[str, Any],
        text: Text | None = None,
        force: bool = False,
    ) -> None:
        device = resolve_device(settings["device"])
        kind = resolve_dtype(settings["dtype"], device)
        sha = text.sha256 if text else None
        made_from = [ENGINE, source.identity(), settings, names, sha, str(device), str(kind)]
        self.mark, self.settings, self.text = fingerprint(made_from), settings, text
        self.model = load_model(source, device=device, dtype=kind)
        self.switch = Switch(self.model, weights, names)
        self.tokenizer = load_tokenizer(source)
        self.start = start_token(self.tokenizer, self.model.config)
        check_windows(settings["windows"], settings["length"], self.start, self.model.config)
        self.notes: dict[str, Any] = {"start_token": self.start, "rounding": settings["rounding"]}
        if text:
            self.notes["text"] = {"name": text.name, "source": text.source, "sha256": text.sha256}
        widths = {self.switch.live(name).shape[1] for name in names}
        guides = any(guidable(fmt, width) for fmt in settings["formats"] for width in widths)
        # how many windows are for rounding
        self.guiding = settings["windows"] if guides and settings["rounding"] == "guided" else 0
        self.rounded, self.folder = run.rounded, run.partial / "analyze" / "sensitivity"
        self.measures: dict[str, tuple[torch.Tensor, Reference]] = {}
        self.kl: dict[str, float] = {}  # measured, by a text, a format and a layer
        if force or not self._resumes():
            shutil.rmtree(self.folder, ignore_errors=True)
            shutil.rmtree(self.rounded, ignore_errors=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "fingerprint").write_text(self.mark)
        if settings["rounding"] == "guided":
            self.rounded.mkdir(exist_ok=True)

    def _resumes(self) -> bool:
        """Whether what an earlier process left is of these settings, and whole: its KL are read."""
        owner, kl = self.folder / "fingerprint", self.folder / "kl.json"
        if not owner.exists() or owner.read_text() != self.mark:
            return False
        try:
            for path in self.folder.glob("*.safetensors"):
                load_file(path)
            self.kl = read_json(kl) if kl.exists() else {}
            return all(read_mark(path)[0] == self.mark for path in self.rounded.glob("*.safetensors"))
        except (RunError, SafetensorError) as error:
            print(f"sensitivity: unfinished work is damaged ({error}) and made again.", flush=True)
            return False

    def columns(self, layers: pd.DataFrame) -> dict[str, Floats]:
        """Every column, in the order of the layer table."""
        columns: dict[str, Floats] = {}
        best: dict[str, Floats] = {}
        slopes = self.slopes()
        for fmt in self.settings["formats"]:
            if self.settings["sensitivity"] == "measured":
                best[fmt] = columns[f"measured_{fmt}"] = self.measured(fmt)
                continue
            best[fmt], error = per_block(slopes[fmt])
            columns |= {f"fisher_{fmt}": best[fmt], f"fisher_{fmt}_se": error}
        for fmt in self.settings["formats"] if self.settings["refine_at"] else ():
            refined = self.refined(fmt, layers, best[fmt], columns[f"fisher_{fmt}_se"])
            best[fmt] = columns[f"refined_{fmt}"] = refined
        total = self.notes["kl_all_layers"] = {}
        half = self.notes["kl_cheap_half"] = {}
        for fmt, values in best.items():
            cheap = self._cheap(fmt, values, layers)
            total[fmt] = self.measure("text", fmt, self.able(fmt))
            half[fmt] = self.measure("text", fmt, list(layers.index[cheap]))
            columns[f"predicted_{fmt}"] = scaled(values, cheap, total[fmt], half[fmt])
        return columns

    def _cheap(self, fmt: str, values: Floats, layers: pd.DataFrame) -> NDArray[np.bool_]:
        """The layers that half of the bytes for 16-bit would leave in `fmt`."""
        extra = (layers["bytes_16bit"] - layers[f"bytes_{fmt}"]).to_numpy(float)
        able = np.isfinite(values) & (extra > 0)
        able[able] = ~lifted(values[able], extra[able], extra[able].sum() / 2)
        return able

    # --- the text ---------------------------------------------------------------------------------------

    def windows(self) -> torch.Tensor:
        """The text that gradients are taken on, (W, T), made once and kept: for rounding, then for slopes."""
        path, count = self.folder / "windows.safetensors", self.settings["windows"]
        if not path.exists():
            held_out = max(2, count // HELD_OUT) if self.guiding else 0
            write_tensors(path, {"ids": self._make_windows(count + held_out)})
        return load_file(path)["ids"]

    def _make_windows(self, count: int) -> torch.Tensor:
        kind, length, seed = (self.settings[name] for name in ("sensitivity", "length", "seed"))
        if kind not in (*OWN, "measured"):
            return self._cut(count)
        if kind != "random":
            own = sample_windows(self.model, count, length, self.start, seed)
            shares = (own[:, 1:] == own[:, 1:].mode(dim=1).values[:, None]).float().mean(dim=1)
            if length < 8 or shares.median() <= COLLAPSED:
                return own
            print(
                "sensitivity: this model's own text collapses (in most windows one token makes up more than "
                f"{COLLAPSED:.0%}); random tokens are used instead",
                flush=True,
            )
        self.notes["own_text"] = "random tokens" + ("" if kind == "random" else ": its own text collapses")
        return random_windows(self.model, count, length, self.start, seed)

    def _cut(self, count: int) -> torch.Tensor:
        assert self.text is not None
        length, config = self.settings["length"], self.model.config
        return make_windows(self.text, self.tokenizer, count, length, self.start, config=config)

    # --- gradients --------------------------------------------------------------------------------------

    def slopes(self) -> Slopes:
        """Slopes by format, (layers, W, T), in batches as large as memory holds; guided codes on the way."""
        oracle = self.settings["sensitivity"] == "measured"
        if oracle and not self.guiding:
            return {}
        windows = self.windows()
        formats = () if oracle else self.settings["formats"]

        def backwards(batch: int) -> Slopes:
            shape = f"{len(windows)} windows of {windows.shape[1]} tokens, {batch} at a time"
            print(f"sensitivity: {shape} on {self.switch.device}", flush=True)
            return self._backwards(windows, formats, batch)

        try:
            most = max(1, BATCH_TOKENS // windows.shape[1])
            found = find_executable_batch_size(backwards, starting_batch_size=most)()
        except RuntimeError as error:
            if "No executable batch size" not in str(error):
                raise
            raise AnalysisError(
                "Out of memory with a single window. Use shorter windows (`length`), a device with more "
                "memory, or sensitivity='none'."
            ) from error
        if self.guiding:
            self.switch.codes = Codes(self.rounded)
        if self.settings["rounding"] == "guided":
            self._tell_rounding()
        return found

    def _tell_rounding(self) -> None:
        """Say, and note, which matrices guided rounding treated otherwise than the rest."""
        kinds = {k: n for k, n in self.notes.get("guided", {}).items() if k != f"damping {DAMPING:g}"}
        for fmt in {"nf4", NF4_DQ}.intersection(self.settings["formats"]):
            narrow = sum(not guidable(fmt, self.switch.live(n).shape[1]) for n in self.switch.layers)
            if narrow:
                kinds[f"nearest levels of {fmt}, as {BLOCK} doesn't divide their columns"] = narrow
        if kinds:
            told = "; ".join(f"{count} with {kind}" for kind, count in sorted(kinds.items()))
            self.notes["rounding_exceptions"] = f"Guided rounding, the exceptions: {told}."
            print(f"sensitivity: {self.notes['rounding_exceptions']}", flush=True)

    def _backwards(self, windows: torch.Tensor, formats: Sequence[str], batch: int) -> Slopes:
        """The pass, from the last block to the first; what an earlier process finished is read."""
        passing = BlockPass(self.switch, windows, batch, self.settings["seed"], split=self.guiding)
        reached = blocks = len(passing.layers)
        found: dict[str, torch.Tensor] = {}
        self.notes["guided"] = {}  # anew: a smaller batch begins again
        # what `passing` holds between two blocks, under the lowest one that is finished
        state = self.folder / "state.safetensors"
        if state.exists():
            with safe_open(state, "pt") as file:
                made = file.metadata()
                left, of = made["reached"].split(",")
            kept = range(int(left), blocks) if self.guiding else ()
            if of == str(batch) and all(self._codes(block).exists() for block in kept):
                found, reached = load_file(state), int(left)
                self.notes["guided"] = json.loads(made["guided"])
                passing.gradients = [found.pop(str(k), None) for k in range(len(passing.gradients))]
        todo = range(reached - 1, -1, -1)
        for block in progress(todo, blocks, "sensitivity by gradients", done=blocks - reached):
            if self.guiding:
                self.switch.codes = self._round(passing, block)
            found |= {f"{fmt}|{name}": s for (name, fmt), s in passing.slopes(block, formats).items()}
            passing.descend(block)
            gradients = {str(k): g for k, g in enumerate(passing.gradients) if g is not None}
            kinds = json.dumps(self.notes["guided"])
            write_tensors(state, found | gradients, reached=f"{block},{batch}", guided=kinds)
        return {
            fmt: torch.stack([found[f"{fmt}|{name}"] for name in self.switch.layers]).numpy()
            for fmt in formats
        }

    def _codes(self, block: int) -> Path:
        return self.rounded / f"block-{block:03d}.safetensors"

    def _round(self, passing: BlockPass, block: int) -> dict[tuple[str, str], Packed]:
        """Guided codes of a block's layers, by layer and format, on disk when this returns."""
        chosen: dict[tuple[str, str], Packed] = {}
        moments = passing.moments(block)
        kinds = self.notes["guided"]
        for name in passing.layers[block]:
            if name not in moments:
                raise AnalysisError(UNLIKE.format(name))
            weight = self.switch.original(name)
            for fmt in self.settings["formats"]:
                if guidable(fmt, weight.shape[1]):
                    parts = passing.parts[name]
                    chosen[name, fmt], damping = guided(weight, moments[name], fmt, parts=parts)
                    key = "nearest levels, no usable moments" if damping is None else f"damping {damping:g}"
                    kinds[key] = kinds.get(key, 0) + 1
            del moments[name]
        write_codes(self._codes(block), chosen, self.mark)
        return chosen

    # --- measurements -----------------------------------------------------------------------------------

    def able(self, fmt: str) -> list[str]:
        """The layers that a format can hold."""
        return [name for name in self.switch.layers if self.switch.able(name, fmt)]

    def measured(self, fmt: str) -> Floats:
        """The oracle: every layer measured alone on the text; NaN where the format can't hold it."""
        able = self.able(fmt)
        found = {name: self.measure("text", fmt, [name]) for name in progress(able, len(able), f"ΔKL, {fmt}")}
        return np.array([found.get(name, np.nan) for name in self.switch.layers])

    def refined(self, fmt: str, layers: pd.DataFrame, values: Floats, errors: Floats) -> Floats:
        """Fisher's estimate, measured on Fisher's own text where the budgets' cuts need it; NaN where the
        format can't hold the layer."""
        names = self.able(fmt)
        able = np.isin(self.switch.layers, names)
        held = layers[able]
        extra = (held["bytes_16bit"] - held[f"bytes_{fmt}"]).to_numpy(float)
        low = held[f"bytes_{fmt}"].sum() + layers.loc[~able, "bytes_16bit"].sum()
        budgets = [bits / 8 * layers["numel"].sum() - low for bits in self.settings["refine_at"]]
        budgets = [budget for budget in budgets if 0 < budget < extra.sum()]
        if not budgets:
            return values.copy()
        limit = max(AT_ONCE, math.floor(SHARE * len(names)))
        bar = progress(range(limit), limit, f"ΔKL near the cut, {fmt} (at most)")

        def measure(index: int) -> float:
            next(bar, None)
            return self.measure("own", fmt, [names[index]])

        whole = values.copy()
        whole[able], done, settled = refine(values[able], errors[able], extra, budgets, measure, limit)
        self.notes[f"refined_{fmt}"] = {
            "matrix_bits": self.settings["refine_at"],
            "evaluations": int(done.sum()),
            "settled": settled,
        }
        return whole

    def measure(self, where: str, fmt: str, names: Sequence[str]) -> float:
        """KL with these layers in a format: on the text, or on the last windows of Fisher's own, which the
        rounding has not seen."""
        key = f"{where} {fmt} {names[0] if len(names) == 1 else f'{len(names)} layers'}"
        if key not in self.kl:
            if where not in self.measures:
                oracle = self.settings["sensitivity"] == "measured"
                count = self.settings["windows"] if oracle else YARDSTICK_WINDOWS
                windows = self._cut(count) if where == "text" else self.windows()[-YARDSTICK_WINDOWS:]
                self.switch.restore()
                self.measures[where] = (windows, reference_states(self.model, windows))
            self.kl[key] = mean_kl(self.switch, dict.fromkeys(names, fmt), *self.measures[where], key)
            write_json(self.folder / "kl.json", self.kl)
        return self.kl[key]


# --- one pass, block by block -----------------------------------------------------------------------------


class BlockPass:
    """A forward pass over fixed windows that keeps every block's input, then backwards a block at a time.

    `layers` are the Switch's layers of each block; `gradients`, a batch each, stand at the output of the
    block whose turn it is (None: at the model's). An architecture whose blocks can't be run alone, or with
    layers outside them, is one block.
    """

    def __init__(
        self, switch: Switch, windows: torch.Tensor, batch: int, seed: int, *, split: int = 0
    ) -> None:
        """Run the model forward.

        Args:
            switch: of the model, its 16-bit weights in place.
            windows: LongTensor (W, T).
            batch: windows at a time.
            seed: of the labels, one draw a window and position.
            split: the first so many windows are for `moments`, the others for `slopes`.

        Raises:
            AnalysisError: the blocks' inputs don't fit into memory.
        """
        self.switch, self.model, self.head = switch, switch.model, Head(switch.model)
        self.half = next(self.model.parameters()).dtype == torch.float16
        config = self.model.config.get_text_config()
        self.parts = {name: fused_parts(name, len(switch.live(name)), config) for name in switch.layers}
        groups = [group for group in (windows[:split], windows[split:]) if len(group)]
        self.ids = [ids for group in groups for ids in group.split(batch)]
        uniform = draws(seed, "labels", *windows.shape).split([len(ids) for ids in self.ids])
        self.labels = [u.reshape(-1, 1) for u in uniform]
        count = -(-split // batch)
        self.guiding, self.others = range(count), range(count, len(self.ids))
        self.gradients: list[torch.Tensor | None] = [None] * len(self.ids)
        self._below: dict[int, torch.Tensor] = {}
        prefix, self.blocks = find_blocks(self.model, switch.layers)
        self.layers: list[list[str]] = [[] for _ in self.blocks]
        for name in switch.layers:
            found = IN_BLOCK.match(name)
            if found is not None and found[1] == prefix:
                self.layers[int(found[2])].append(name)
        if sum(map(len, self.layers)) < len(switch.layers) or not self._forward():
            print("sensitivity: this architecture can't be run block by block: the whole model is one block")
            self.blocks, self.layers = [], [list(switch.layers)]

    def _forward(self) -> bool:
        """Keep every block's input, and the gradients at the last one's output; False where a block, run
        alone, gives something else than it did in the model."""
        self._check_memory()
        self.inputs: list[dict[int, torch.Tensor]] = [{} for _ in self.blocks]
        self.calls: list[dict[int, Any]] = [{} for _ in self.blocks]

        def keep(block: int, k: int, module: Any, args: tuple[Any, ...], options: dict[str, Any]) -> None:
            rest = {key: value for key, value in options.items() if key != "hidden_states"}
            self.inputs[block][k] = (args[0] if args else options["hidden_states"]).cpu()
            self.calls[block][k] = (args[1:], rest)

        gradients: list[torch.Tensor | None] = []
        for k in range(len(self.ids)):
            handles = [
                block.register_forward_pre_hook(partial(keep, index, k), with_kwargs=True)
                for index, block in enumerate(self.blocks)
            ]
            with _removed(handles):
                gradients.append(self._pull(partial(self._run_from, self.blocks[-1], k, ()), k)[0].cpu())
            if not all(k in kept for kept in self.inputs):
                return False
        for index in range(len(self.blocks) - 1):
            with torch.no_grad():
                made = self._call(index, 0, self.inputs[index][0].to(self.switch.device))
            if not torch.equal(made.cpu(), self.inputs[index + 1][0]):
                return False
        self.gradients = gradients
        return True

    def moments(self, block: int) -> dict[str, list[torch.Tensor]]:
        """H = Σ_t ‖g_t‖² x_t x_tᵀ, (in, in) float32, of each part of each of the block's layers, by name."""
        found: dict[str, list[torch.Tensor]] = {}
        for k in self.guiding:
            for name, x, g in self._visit(block, k):
                inputs, parts = x.flatten(0, -2).float(), g.flatten(0, -2).split(self.parts[name], dim=1)
                scaled = [inputs * part.norm(dim=1, keepdim=True) for part in parts]
                if name in found:
                    found[name] = [h.addmm_(s.T, s) for h, s in zip(found[name], scaled, strict=True)]
                else:
                    found[name] = [s.T @ s for s in scaled]
        return found

    def slopes(self, block: int, formats: Sequence[str]) -> dict[tuple[str, str], torch.Tensor]:
        """s_t = g_t · (ΔW x_t), (windows, T), of each of the block's layers in each format; NaN where it
        can't hold the layer.

        Raises:
            AnalysisError: a layer that doesn't see every token once.
        """
        switch, names = self.switch, self.layers[block]
        deltas = {
            (name, fmt): switch.values(name, fmt).to(switch.live(name).dtype).sub_(switch.live(name))
            for name in names
            for fmt in formats
            if switch.able(name, fmt)
        }
        parts: dict[tuple[str, str], list[torch.Tensor]] = {(n, fmt): [] for n in names for fmt in formats}
        for k in self.others:
            ids = self.ids[k]
            visits = [one for one in self._visit(block, k) if one[1][..., 0].numel() == ids.numel()]
            times = Counter(name for name, *_ in visits)
            if unlike := [name for name in names if times[name] != 1]:
                raise AnalysisError(UNLIKE.format(unlike[0]))
            for (name, x, g), fmt in product(visits, formats):
                slope = torch.full(ids.shape, torch.nan)
                if (name, fmt) in deltas:
                    moved = _product(x, deltas[name, fmt]).float()  # ΔW x, (B, T, out)
                    slope = torch.linalg.vecdot(moved, g).view(ids.shape).cpu()
                parts[name, fmt].append(slope)
        return {key: torch.cat(rows) for key, rows in parts.items()}

    def descend(self, block: int) -> None:
        """The block is done with: the gradients at its input are those at the output of the one below."""
        self.gradients = [self._below.pop(k, None) for k in range(len(self.ids))]
        if self.blocks:
            self.inputs[block].clear()

    def _visit(self, block: int, k: int) -> list[tuple[str, torch.Tensor, torch.Tensor]]:
        """One block forward and backward on one batch: (name, x, g) of each of its layers."""
        if not self.blocks:
            start = self.model.get_input_embeddings()
            return self._pull(partial(self._run_from, start, k, self.layers[0]), k)[1]
        gradient, seen = self._pull(partial(self._run, block, k), k)
        self._below[k] = gradient.cpu()
        return seen

    def _pull(self, run: Callable[[], Any], k: int) -> tuple[torch.Tensor, list[Any]]:
        """The gradient at the input of what `run` computes, and (name, x, g) of its layers, all float32.

        In float16 at a scale at which nothing overflows, divided out again.
        """
        for scale in SCALES if self.half else (1.0,):
            leaf, output, seen = run()
            gradient = self.gradients[k]
            if gradient is None:
                hidden = output.detach().flatten(0, 1)
                gradient = label_gradient(self.head, hidden, self.labels[k]).view_as(output)
            output.backward((gradient.to(output.device) * scale).to(output.dtype))
            if all(bool(part.isfinite().all()) for part in (leaf.grad, *(g for _, _, g in seen))):
                return leaf.grad.float() / scale, [(name, x, g.float() / scale) for name, x, g in seen]
        raise AnalysisError(
            f"The gradients of {type(self.model).__name__} are not numbers in float16, at any scale; "
            "use dtype='bfloat16' or 'float32', or sensitivity='none'."
            if self.half
            else f"The gradients of {type(self.model).__name__} are not numbers; use sensitivity='none'."
        )

    def _run(self, block: int, k: int) -> tuple[torch.Tensor, torch.Tensor, list[Any]]:
        """A block on a batch, with a graph: its input, its output, what its layers see on the way back."""
        seen: list[Any] = []
        with _removed(self._look(self.layers[block], seen)), torch.enable_grad():
            leaf = self.inputs[block][k].to(self.switch.device, copy=True).requires_grad_(True)
            return leaf, self._call(block, k, leaf), seen

    def _run_from(self, start: Any, k: int, names: Sequence[str]) -> tuple[torch.Tensor, Any, list[Any]]:
        """The whole model on a batch, with a graph from the output of the module `start` on."""
        seen: list[Any] = []
        leaves: list[torch.Tensor] = []

        def begin(module: Any, inputs: Any, output: Any) -> Any:
            leaves.append(_first(output).detach().requires_grad_(True))
            return (leaves[0], *output[1:]) if isinstance(output, tuple) else leaves[0]

        handles = [*self._look(names, seen), start.register_forward_hook(begin)]
        with _removed(handles), torch.enable_grad():
            output = final_hidden(self.model, self.ids[k].to(self.switch.device))
        return leaves[0], output, seen

    def _look(self, names: Sequence[str], seen: list[Any]) -> list[Any]:
        """Hooks that note (name, x, g) of the layers on the way back."""

        def look(name: str, module: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            x = inputs[0].detach()
            output.register_hook(lambda g: seen.append((name, x, g)))

        return [self.model.get_submodule(n).register_forward_hook(partial(look, n)) for n in names]

    def _call(self, block: int, k: int, hidden: torch.Tensor) -> torch.Tensor:
        args, options = self.calls[block][k]
        return _first(self.blocks[block](hidden, *args, **options))

    def _check_memory(self) -> None:
        hidden = self.model.get_input_embeddings().weight
        tokens = sum(ids.numel() for ids in self.ids)
        largest = max(self.switch.live(name).shape[1] for name in self.switch.layers)
        need = tokens * hidden.shape[1] * hidden.element_size() * (len(self.blocks) + 2)
        need += 4 * 8 * largest**2 if self.switch.device.type == "cpu" else 0
        free = psutil.virtual_memory().available
        if need > free:
            raise AnalysisError(
                f"Sensitivities need about {need / 1e9:.1f} GB beside the model; {free / 1e9:.1f} are free. "
                f"Use shorter windows (length={self.ids[0].shape[1] // 2}), a machine with more memory, or "
                "sensitivity='none'."
            )


def all_slopes(
    switch: Switch, windows: torch.Tensor, formats: Sequence[str], *, seed: int = 0, batch: int = 4
) -> Slopes:
    """Slopes of every layer at once, by format: (layers in the Switch's order, windows, T)."""
    switch.restore()
    passing = BlockPass(switch, windows, batch, seed)
    found: dict[tuple[str, str], torch.Tensor] = {}
    for block in reversed(range(len(passing.layers))):
        found |= passing.slopes(block, formats)
        passing.descend(block)
    return {fmt: torch.stack([found[name, fmt] for name in switch.layers]).numpy() for fmt in formats}


def find_blocks(model: Any, layers: Sequence[str]) -> tuple[str, list[Any]]:
    """The list of blocks that most layers lie in: its name and its modules; ("", []) if there is none."""
    names = Counter(found[1] for name in layers if (found := IN_BLOCK.match(name)))
    if not names:
        return "", []
    name = names.most_common(1)[0][0]
    return name, list(model.get_submodule(name))


def fused_parts(name: str, rows: int, config: Any) -> list[int]:
    """The rows of each part of a fused projection (Phi's, Qwen3.5's, GPT-2's), whose gradients are unlike, so
    that each has a second moment of its own. One part for any other layer."""
    sizes = [rows]
    match name.rpartition(".")[2]:
        case "gate_up_proj":
            sizes = [rows // 2] * 2
        case "c_attn":
            sizes = [rows // 3] * 3
        case "qkv_proj":
            heads = config.num_attention_heads
            q = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
            sizes = [q, (rows - q) // 2, (rows - q) // 2]
        case "in_proj_qkv":
            k = config.linear_num_key_heads * config.linear_key_head_dim
            sizes = [k, k, rows - 2 * k]
    sound = min(sizes) > 0 and sum(sizes) == rows  # else another model's layer of that name
    return sizes if sound else [rows]


@contextlib.contextmanager
def _removed(handles: Sequence[Any]) -> Iterator[None]:
    """While entered, hooks are in place."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _first(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output


def _product(x: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """ΔW x, in the weight's dtype where a wider x fits into it."""
    moved = F.linear(x.to(delta.dtype), delta)
    if x.dtype == delta.dtype or bool(moved.isfinite().all()):
        return moved
    return F.linear(x, delta.to(x.dtype))


@torch.no_grad()
def label_gradient(head: Head, hidden: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Gradient of ln p(y), y ~ p, at the final hidden states (N, d), for draws (N, 1) in [0, 1)."""
    uniform = uniform.to(hidden.device)
    result = torch.empty_like(hidden)
    for first in range(0, len(hidden), head.chunk):
        rows = slice(first, first + head.chunk)
        raw = head.raw(hidden[rows], "variant")  # (rows, V), overwritten by its gradient
        for part, u in zip(raw.split(head.rows), uniform[rows].split(head.rows), strict=True):
            part.copy_(_logit_gradient(head, part, u))
        torch.mm(raw.to(head.weight.dtype), head.weight, out=result[rows])
    return result


def _logit_gradient(head: Head, raw: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """e_y - p with y ~ p, taken back through the scaling and capping of logits where there is any."""
    with torch.set_grad_enabled(bool(head.adjust)):
        leaf = raw.float().detach().requires_grad_(bool(head.adjust))
        logits = head.finish(leaf)
    p = torch.softmax(logits.detach(), dim=-1)
    labels = pick(p, uniform)
    gradient = p.neg_().scatter_add_(1, labels, torch.ones_like(labels, dtype=p.dtype))
    return torch.autograd.grad(logits, leaf, gradient)[0] if head.adjust else gradient


# --- the text ---------------------------------------------------------------------------------------------


def draws(seed: int, purpose: str, n: int, length: int) -> torch.Tensor:
    """Uniform numbers in [0, 1), (n, length) float32: a window's hang on the seed and its index alone."""
    rows = []
    for index in range(n):
        digest = hashlib.sha256(f"{seed}/{purpose}/{index}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        rows.append(torch.rand(length, generator=generator))
    return torch.stack(rows)


def pick(p: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Sample an index a row: p (N, V) of any positive sum, uniform (N, 1) in [0, 1); returns (N, 1)."""
    total = p.cumsum(dim=-1)
    return torch.searchsorted(total, uniform * total[:, -1:], right=True).clamp_(max=p.shape[1] - 1)


@torch.inference_mode()
def sample_windows(
    model: Any,
    n: int,
    length: int,
    start: int | None,
    seed: int,
    *,
    purpose: str = "text",
    script: Callable[[int, int, int], int] | None = None,
) -> torch.Tensor:
    """Text that the model writes itself: LongTensor (n, length), from the start token, temperature 1.

    Args:
        model: a causal LM with a key-value cache.
        n: windows, sampled `SAMPLED` at a time.
        length: tokens in each, the start token included.
        start: first token, or None: the first token is drawn evenly from the vocabulary.
        seed: of the samples; a window hangs on it and on its index alone.
        purpose: of the draws (`draws`), and what the progress line calls them.
        script: (window, column, the token drawn) -> the token that stands there instead.
    """
    device = next(model.parameters()).device
    head = Head(model)
    uniform = draws(seed, purpose, n, length).to(device)

    def told(tokens: torch.Tensor, window: int, column: int) -> torch.Tensor:
        if script is None:
            return tokens
        rows = enumerate(tokens[:, 0].tolist(), start=window)
        return torch.tensor([[script(row, column, token)] for row, token in rows], device=tokens.device)

    first = torch.full((n, 1), start) if start is not None else random_windows(model, n, 1, None, seed)
    first = told(first, 0, 0)
    rows: list[torch.Tensor] = []
    for place, u in enumerate(uniform.split(SAMPLED)):
        columns, cache = [first.split(SAMPLED)[place].to(device)], None
        for column in progress(range(1, length), length - 1, f"{purpose} sampled from the model"):
            output = body(model)(input_ids=columns[-1], past_key_values=cache, use_cache=True)
            if (cache := getattr(output, "past_key_values", None)) is None:
                raise AnalysisError(
                    f"{type(model).__name__} keeps no key-value cache, as state-space models don't, so it "
                    "can't be asked for text of its own. Use sensitivity='random' or a text."
                )
            last = as_head_takes(model, output.last_hidden_state[:, -1])
            drawn = zip(last.split(head.chunk), u[:, column, None].split(head.chunk), strict=True)
            tokens = [pick(torch.softmax(head.finish(head.raw(h, "variant")), -1), d) for h, d in drawn]
            columns.append(told(torch.cat(tokens), place * SAMPLED, column))
        rows.append(torch.cat(columns, dim=1).cpu())
    return torch.cat(rows)


def random_windows(model: Any, n: int, length: int, start: int | None, seed: int) -> torch.Tensor:
    """Tokens drawn evenly from the vocabulary behind the start token: LongTensor (n, length)."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = draws(seed, "random", n, length).double().mul(vocabulary).long().clamp_(max=vocabulary - 1)
    if start is not None:
        ids[:, 0] = start
    return ids


# --- from slopes to costs ---------------------------------------------------------------------------------


def per_block(slopes: NDArray[np.float32], size: int = NEIGHBOURS) -> tuple[Floats, Floats]:
    """½ Σ_b (Σ_{t in b} s_t)² / T over blocks b of neighbouring positions; the last may be shorter.

    Args:
        slopes: (layers, windows, T).
        size: positions in a block: 1 has the least variance, T is unbiased to second order.

    Returns:
        Nats a token of each layer, and the standard error over windows (NaN with one); (layers,) float64.
    """
    starts = np.arange(0, slopes.shape[2], size)
    sums = np.add.reduceat(slopes.astype(np.float64), starts, axis=2)  # (layers, windows, blocks)
    windows = 0.5 * np.square(sums).sum(axis=2) / slopes.shape[2]
    count = windows.shape[1]
    error = windows.std(axis=1, ddof=1) / np.sqrt(count) if count > 1 else np.full(len(windows), np.nan)
    return windows.mean(axis=1), error


def scaled(values: Floats, cheap: NDArray[np.bool_], total: float, half: float) -> Floats:
    """Costs (layers,) whose sum is the KL measured with all layers, and over the `cheap` ones their own.

    Slopes underrate the damage of layers that cost little more than that of dear ones, and plans by `fisher`
    leave just the cheap ones quantized: one scale for all would predict them too low. Where the two
    measurements contradict each other, one scale it is. NaN: the format can't hold the layer.
    """
    parts = ((cheap, half), (~cheap, total - half))
    sums = [float(np.nansum(values[part])) for part, _ in parts]
    if min(*sums, half, total - half) <= 0:
        own = sum(sums)
        return values * (total / own) if own > 0 else values
    return values * np.where(cheap, half / sums[0], (total - half) / sums[1])


# --- measuring where the cut is near ---------------------------------------------------------------------

Z = 1.96  # half-width of an interval, in standard errors
MODEL_ERROR = 0.3  # relative error of the estimate that its standard error doesn't know of (measured)
AT_ONCE = 4  # measurements between two looks at the plan
REST = 2  # looks in a row that must find the plan unchanged before it counts as settled
SHARE = 0.15  # of the oracle's evaluations that may be spent


def refine(
    values: Floats,
    errors: Floats,
    extra: Floats,
    budgets: Sequence[float],
    measure: Callable[[int], float],
    limit: int,
) -> tuple[Floats, NDArray[np.bool_], bool]:
    """Measure the layers whose cost per extra byte can't be told from the cut's, nearest first, until none
    is left, the plan stops changing, or the limit is reached.

    Layers are lifted from the highest cost per extra byte on until a budget is spent; the cut is the cost
    per byte where that ends. A layer is open while its interval holds a cut. Layers that were not measured
    are scaled by what the measured ones turned out to be against their estimate.

    Args:
        values, errors: estimated cost of each layer in the low format and its standard error.
        extra: bytes that lifting each layer costs.
        budgets: extra bytes to spend, one a budget.
        measure: cost of the layer with this index.
        limit: most measurements.

    Returns:
        The costs (layers,), which of them were measured, and whether every cut came to rest.
    """
    relative = np.divide(errors, values, out=np.ones_like(errors), where=values > 0)
    width_share = Z * np.hypot(np.nan_to_num(relative, nan=1.0), MODEL_ERROR)
    measured: dict[int, float] = {}
    plans: list[bytes] = []
    while True:
        current, index = values.copy(), list(measured)
        if measured:
            estimated = values[index].sum()
            current *= sum(measured.values()) / estimated if estimated > 0 else 1.0
            current[index] = list(measured.values())
        rate = current / extra
        reached = [lifted(rate, extra, budget) for budget in budgets]
        plans.append(np.stack(reached).tobytes())
        # the cut: the highest cost a byte that a budget doesn't reach
        distance = np.min([np.abs(rate - rate[~one].max(initial=0.0)) for one in reached], axis=0)
        width = width_share * rate
        near = np.divide(distance, width, out=np.full_like(width, np.inf), where=width > 0)
        near[index] = np.inf
        still_open = [int(i) for i in np.argsort(near, kind="stable") if near[i] < 1]
        at_rest = not still_open or (len(plans) > REST and len({*plans[-1 - REST :]}) == 1)
        if at_rest or len(measured) >= limit:
            return current, np.isin(np.arange(len(values)), index), at_rest
        for layer in still_open[: min(AT_ONCE, limit - len(measured))]:
            measured[layer] = measure(layer)


def lifted(rate: Floats, extra: Floats, budget: float) -> NDArray[np.bool_]:
    """Which layers the budget reaches, from the highest cost per extra byte on, up to the first too large."""
    order = np.argsort(-rate, kind="stable")
    reached = np.zeros(len(rate), dtype=bool)
    reached[order] = np.cumsum(extra[order]) <= budget
    return reached
