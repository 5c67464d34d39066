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
`measured` is the oracle, an evaluation a layer; `refined` measures only the layers that decide a budget's
cut. Every column adds up over layers; `predicted` is scaled so that its sum is the KL measured with all
layers in that format, and over the cheaper half of them that half's own.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import re
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch.nn import functional as F

from spi_utils.errors import AnalysisError, RunError
from spi_utils.formats import Packed
from spi_utils.models import (
    ModelSource,
    list_layers,
    load_model,
    load_tokenizer,
    open_weights,
    resolve_device,
    resolve_dtype,
)
from spi_utils.progress import progress
from spi_utils.rounding import Codes, guidable, guided, read_mark, write_codes
from spi_utils.runs import Run, atomic_path, fingerprint, read_json, write_json, write_tensors
from spi_utils.scoring import (
    Head,
    Reference,
    Switch,
    as_head_takes,
    default_batch,
    final_hidden,
    reference_states,
    token_scores,
)
from spi_utils.texts import NAMES, check_windows, load_text, make_windows, start_token

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
        `attrs["sensitivity"]` tells the texts, the rounding, the costs in seconds and the measured sums.

    Raises:
        AnalysisError: an unknown setting, or not enough memory (says how much, and what to change).
        EvaluationError: a text that can't be used, or numbers that overflow.
    """
    names = list(frame.loc[frame["quantizable"].astype(bool), "name"])
    if not names or not formats:
        return pd.DataFrame(index=pd.Index(names, name="name"))
    _check(sensitivity, refine_at)
    place = resolve_device(device)
    kind = resolve_dtype(dtype, place)
    measured = sensitivity == "measured"
    settings = {
        "sensitivity": sensitivity,
        "formats": list(formats),
        "rounding": rounding,
        "device": str(place),
        "dtype": str(kind),
        "seed": seed,
        "refine_at": list(refine_at),
        "windows": windows or (YARDSTICK_WINDOWS if measured else WINDOWS),
        "length": length or LENGTH,
        "text": text,
    }
    given = [load_text(path).sha256 for path in map(Path, (sensitivity, text)) if path.is_file()]
    mark = fingerprint([ENGINE, source.identity(), settings, names, given])
    with open_weights(source) as weights:
        switch = Switch(load_model(source, device=place, dtype=kind), weights, names)
        work = Work(run, mark, switch, load_tokenizer(source), settings, force)
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
    place = resolve_device(device)
    kind = resolve_dtype("auto", place)
    names = [layer.name for layer in list_layers(source) if layer.quantizable]
    settings = {"sensitivity": "measured", "formats": list(formats), "rounding": "guided", "seed": seed}
    settings |= {"refine_at": [], "windows": WINDOWS, "length": LENGTH, "text": "auto", "dtype": str(kind)}
    mark = fingerprint([ENGINE, source.identity(), settings, names])
    with open_weights(source) as weights:
        switch = Switch(load_model(source, device=place, dtype=kind), weights, names)
        Work(run, mark, switch, load_tokenizer(source), settings, force=False).slopes()
    return Codes(run.rounded)


def _check(sensitivity: str, refine_at: Sequence[float]) -> None:
    known = (*OWN, "measured", *NAMES)
    if sensitivity not in known and not Path(sensitivity).is_file():
        raise AnalysisError(f"sensitivity={sensitivity!r} is none of {', '.join(known)}, none, and no file.")
    if refine_at and sensitivity == "measured":
        raise AnalysisError(
            "refine_at refines an estimate; sensitivity='measured' measures every layer already."
        )
    if not all(4 < bits < 16 for bits in refine_at):
        raise AnalysisError(f"refine_at={list(refine_at)}: expected matrix bits between 4 and 16.")


class Work:
    """One computation of the columns; what is finished lies on disk under `mark` and is not done again."""

    def __init__(
        self, run: Run, mark: str, switch: Switch, tokenizer: Any, settings: dict[str, Any], force: bool
    ) -> None:
        self.mark, self.switch, self.tokenizer, self.settings = mark, switch, tokenizer, settings
        self.model = switch.model
        self.start = start_token(tokenizer, self.model.config)
        check_windows(settings["windows"], settings["length"], self.start, self.model.config)
        self.notes: dict[str, Any] = {
            "start_token": self.start,
            "rounding": settings["rounding"],
            "seconds": {},
        }
        self.rounded, self.folder = run.rounded, run.partial / "analyze" / "sensitivity"
        owner = self.folder / "fingerprint"
        if self.folder.exists() and (force or not owner.exists() or owner.read_text() != mark):
            shutil.rmtree(self.folder)
        if self.rounded.exists() and (force or settings["rounding"] != "guided"):
            shutil.rmtree(self.rounded)
        self.folder.mkdir(parents=True, exist_ok=True)
        owner.write_text(mark)
        self._measures: dict[str, Measure] = {}

    def columns(self, layers: pd.DataFrame) -> dict[str, Floats]:
        """Every column, in the order of the layer table."""
        formats: list[str] = self.settings["formats"]
        columns: dict[str, Floats] = {}
        best: dict[str, Floats] = {}
        slopes = self.slopes()
        if self.settings["sensitivity"] == "measured":
            best = {fmt: self.measured(fmt) for fmt in formats}
            columns |= {f"measured_{fmt}": values for fmt, values in best.items()}
        for fmt in slopes:
            best[fmt], error = per_block(slopes[fmt])
            columns |= {f"fisher_{fmt}": best[fmt], f"fisher_{fmt}_se": error}
        for fmt in formats if self.settings["refine_at"] else ():
            best[fmt] = columns[f"refined_{fmt}"] = self.refined(fmt, layers, best[fmt], columns)
        cheap = {fmt: self._cheap(fmt, values, layers) for fmt, values in best.items()}
        names = layers.index.to_numpy(str)
        totals = self.totals({fmt: names[mask].tolist() for fmt, mask in cheap.items()})
        for fmt, values in best.items():
            columns[f"predicted_{fmt}"] = scaled(values, cheap[fmt], *totals[fmt])
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
        path, s = self.folder / "windows.npy", self.settings
        if not _readable(path, lambda: np.load(path).shape[1] == s["length"]):
            with self._timed("text"):
                made = self._make_windows(s["windows"] + (_held_out(s["windows"]) if self._guides() else 0))
            with atomic_path(path) as temporary, temporary.open("wb") as file:
                np.save(file, made.numpy())
        return torch.from_numpy(np.load(path))

    def _make_windows(self, count: int) -> torch.Tensor:
        s, model = self.settings, self.model
        kind = "self" if s["sensitivity"] == "measured" else s["sensitivity"]
        if kind not in OWN:
            return self._cut(kind, count)
        if kind == "self":
            steps = partial(progress, label="text sampled from the model")
            own = sample_windows(model, count, s["length"], self.start, s["seed"], steps)
            shares = (own[:, 1:] == own[:, 1:].mode(dim=1).values[:, None]).float().mean(dim=1)
            if s["length"] < 8 or shares.median() <= COLLAPSED:
                return own
            print(
                "sensitivity: this model's own text collapses (in most windows one token makes up more than "
                f"{COLLAPSED:.0%}); random tokens are used instead",
                flush=True,
            )
        self.notes["own_text"] = "random tokens" + ("" if kind == "random" else ": its own text collapses")
        return random_windows(model, count, s["length"], self.start, s["seed"])

    def _cut(self, spec: str, count: int) -> torch.Tensor:
        text = load_text(spec)
        self.notes["text"] = {"name": text.name, "source": text.source, "sha256": text.sha256}
        config = self.model.config
        return make_windows(text, self.tokenizer, count, self.settings["length"], self.start, config=config)

    # --- gradients --------------------------------------------------------------------------------------

    def _guides(self) -> bool:
        widths = {self.switch.live(name).shape[1] for name in self.switch.layers}
        able = (guidable(fmt, width) for fmt in self.settings["formats"] for width in widths)
        return self.settings["rounding"] == "guided" and any(able)

    def slopes(self) -> Slopes:
        """Slopes by format, (layers, W, T), in batches as large as memory holds; guided codes on the way."""
        oracle = self.settings["sensitivity"] == "measured"
        if oracle and not self._guides():
            return {}
        windows = self.windows()
        guides = self.settings["windows"] if self._guides() else 0
        formats = () if oracle else self.settings["formats"]
        batch = max(1, BATCH_TOKENS // windows.shape[1])
        said = f"sensitivity: {len(windows)} windows of {windows.shape[1]} tokens"
        while True:
            print(f"{said}, {batch} at a time on {self.switch.device}", flush=True)
            try:
                with self._timed("gradients"):
                    found = self._backwards(windows, guides, formats, batch)
                break
            except torch.OutOfMemoryError as error:
                failure = f"out of memory, {batch} at a time: {str(error).splitlines()[0]}"
            torch.cuda.empty_cache()  # here, where the failed pass' tensors are gone with its traceback
            print(f"sensitivity: {failure}", flush=True)
            if batch == 1:
                raise AnalysisError(
                    f"{failure} Use shorter windows (`length`), a device with more memory, or "
                    "sensitivity='none'."
                )
            batch //= 2
        if guides:
            self.switch.codes = Codes(self.rounded)
        return found

    def _backwards(self, windows: torch.Tensor, guides: int, formats: Sequence[str], batch: int) -> Slopes:
        """The pass, from the last block to the first; what an earlier process finished is read."""
        passing = BlockPass(self.switch, windows, batch, self.settings["seed"], split=guides)
        reached = self._reached(passing, batch, guides)
        for block in progress(
            range(reached - 1, -1, -1), len(passing.layers), "sensitivity by gradients",
            done=len(passing.layers) - reached,
        ):  # fmt: skip
            if guides:
                self.switch.codes = self._round(passing, block)
            found = passing.slopes(block, formats)
            passing.descend(block)
            # the gradient last: a block counts as done once the one below can begin
            held = {fmt: torch.as_tensor(found[fmt]) for fmt in formats}
            write_tensors(self.folder / f"slopes-{block:03d}.safetensors", held)
            held = {str(k): g for k, g in enumerate(passing.gradients) if g is not None}
            write_tensors(self.folder / "gradient.safetensors", held, block=str(block), batch=str(batch))
        parts = [
            load_file(self.folder / f"slopes-{block:03d}.safetensors") for block in range(len(passing.layers))
        ]
        place = {name: index for index, name in enumerate(n for names in passing.layers for n in names)}
        order = [place[name] for name in self.switch.layers]
        return {fmt: torch.cat([part[fmt] for part in parts])[order].numpy() for fmt in formats}

    def _reached(self, passing: BlockPass, batch: int, guides: int) -> int:
        """The lowest block that is finished, whose gradients are put in place; their number if none is."""
        path, blocks = self.folder / "gradient.safetensors", len(passing.layers)
        reached = blocks

        def sound() -> bool:
            nonlocal reached
            with safe_open(path, "pt") as file:
                held = file.metadata()
            if held["batch"] != str(batch):
                return False
            for block in range(int(held["block"]), blocks):
                load_file(self.folder / f"slopes-{block:03d}.safetensors")
                if guides and read_mark(self._codes(block))[0] != self.mark:
                    return False
            gradients = load_file(path)
            passing.gradients = [gradients.get(str(k)) for k in range(len(passing.gradients))]
            reached = int(held["block"])
            return True

        _readable(path, sound)
        return reached

    def _codes(self, block: int) -> Path:
        return self.rounded / f"block-{block:03d}.safetensors"

    def _round(self, passing: BlockPass, block: int) -> dict[tuple[str, str], Packed]:
        """Guided codes of a block's layers, by layer and format, on disk when this returns."""
        chosen: dict[tuple[str, str], Packed] = {}
        moments = passing.moments(block)
        kinds = self.notes.setdefault("guided", {})
        for name in passing.layers[block]:
            weight = self.switch.original(name)
            for fmt in self.settings["formats"]:
                if guidable(fmt, weight.shape[1]):
                    parts = passing.parts[name]
                    chosen[name, fmt], damping = guided(weight, moments[name], fmt, parts=parts)
                    key = "nearest levels" if damping is None else f"damping {damping:g}"
                    kinds[key] = kinds.get(key, 0) + 1
            del moments[name]
        write_codes(self._codes(block), chosen, self.mark)
        return chosen

    # --- measurements -----------------------------------------------------------------------------------

    def measured(self, fmt: str) -> Floats:
        """The oracle: every layer measured alone on the text; NaN where the format can't hold it."""
        able = self._able(fmt)
        found = {name: self._one("text", name, fmt) for name in progress(able, len(able), f"ΔKL, {fmt}")}
        return np.array([found.get(name, np.nan) for name in self.switch.layers])

    def _able(self, fmt: str) -> list[str]:
        """The layers that a format can hold."""
        return [name for name in self.switch.layers if self.switch.able(name, fmt)]

    def refined(
        self, fmt: str, layers: pd.DataFrame, values: Floats, columns: Mapping[str, Floats]
    ) -> Floats:
        """Fisher's estimate, measured on Fisher's own text where the budgets' cuts need it; NaN where the
        format can't hold the layer."""
        names = np.array(self._able(fmt))
        able = np.isin(self.switch.layers, names)
        held = layers[able]
        extra = (held["bytes_16bit"] - held[f"bytes_{fmt}"]).to_numpy(float)
        low = held[f"bytes_{fmt}"].sum() + layers.loc[~able, "bytes_16bit"].sum()
        budgets = [bits / 8 * layers["numel"].sum() - low for bits in self.settings["refine_at"]]
        budgets = [budget for budget in budgets if 0 < budget < extra.sum()]
        if not budgets:
            return values.copy()
        limit = most_measurements(len(extra))
        bar = progress(range(limit), limit, f"ΔKL near the cut, {fmt} (at most)")

        def measure(index: int) -> float:
            next(bar, None)
            return self._one("own", names[index], fmt)

        with self._timed(f"refine_{fmt}"):
            found, measured, settled = refine(
                values[able], columns[f"fisher_{fmt}_se"][able], extra, budgets, measure
            )
        self.notes[f"refined_{fmt}"] = {
            "matrix_bits": self.settings["refine_at"],
            "evaluations": int(measured.sum()),
            "settled": settled,
        }
        whole = values.copy()
        whole[able] = found
        return whole

    def totals(self, cheap: Mapping[str, Sequence[str]]) -> dict[str, tuple[float, float]]:
        """KL with every layer in a format, and with those of its `cheap` alone, on the text."""
        path, formats = self.folder / "totals.json", self.settings["formats"]
        if not _readable(path, lambda: {*read_json(path)["cheap"]} == {*formats}):
            with self._timed("totals"):
                measure = self._measure("text")
                kl, half = {}, {}
                for fmt in formats:
                    kl[fmt] = measure.all(dict.fromkeys(self._able(fmt), fmt), fmt)
                    half[fmt] = measure.all(dict.fromkeys(cheap[fmt], fmt), f"the cheaper half in {fmt}")
            write_json(path, {"kl": kl, "cheap": half, "text": self.notes["text"]})
        held = read_json(path)
        self.notes |= {"text": held["text"], "kl_all_layers": held["kl"], "kl_cheap_half": held["cheap"]}
        return {fmt: (held["kl"][fmt], held["cheap"][fmt]) for fmt in formats}

    def _one(self, where: str, name: str, fmt: str) -> float:
        path = self.folder / f"{where}-{fmt}-{name}.json"
        if not _readable(path, lambda: isinstance(read_json(path)["kl"], float)):
            write_json(path, {"kl": self._measure(where).one(name, fmt)})
        return read_json(path)["kl"]

    def _measure(self, where: str) -> Measure:
        """KL on the first windows of the text, or on the last of Fisher's own; made when first needed."""
        if where not in self._measures:
            self._measures.clear()  # one at a time: each keeps every block's output
            s = self.settings
            spec = s["text"] if s["sensitivity"] in (*OWN, "measured") else s["sensitivity"]
            count = s["windows"] if s["sensitivity"] == "measured" else YARDSTICK_WINDOWS
            # the last windows: what the rounding has not seen comes last
            windows = self.windows()[-YARDSTICK_WINDOWS:] if where == "own" else self._cut(spec, count)
            self.switch.restore()
            self._measures[where] = Measure(self.switch, windows, reference_states(self.model, windows))
        return self._measures[where]

    @contextlib.contextmanager
    def _timed(self, what: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        self.notes["seconds"][what] = round(time.monotonic() - started, 1)


def _held_out(windows: int) -> int:
    return max(2, windows // HELD_OUT)


def _readable(path: Path, sound: Callable[[], bool]) -> bool:
    """Whether a finished piece is there and `sound`: a damaged one is said and merely made again."""
    if not path.is_file():
        return False
    try:
        if sound():
            return True
        error: object = "another content than expected"
    except (
        RunError,
        SafetensorError,
        OSError,
        ValueError,
        KeyError,
        TypeError,
        EOFError,
        IndexError,
    ) as damage:
        error = damage
    print(f"sensitivity: {path} is damaged ({error}) and made again.", flush=True)
    return False


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
        starts = [*range(0, split, batch), *range(split, len(windows), batch)]
        ends = [min(start + batch, split if start < split else len(windows)) for start in starts]
        self.ids = [windows[start:end] for start, end in zip(starts, ends, strict=True)]
        uniform = draws(seed, "labels", *windows.shape)
        self.labels = [uniform[start:end].reshape(-1, 1) for start, end in zip(starts, ends, strict=True)]
        self.guiding = [k for k, start in enumerate(starts) if start < split]
        self.others = [k for k, start in enumerate(starts) if start >= split]
        self.gradients: list[torch.Tensor | None] = [None] * len(starts)
        self._below: dict[int, torch.Tensor] = {}
        prefix, self.blocks = find_blocks(self.model, switch.layers)
        self.layers: list[list[str]] = [[] for _ in self.blocks]
        for name in switch.layers:
            found = IN_BLOCK.match(name)
            if found is not None and found[1] == prefix:
                self.layers[int(found[2])].append(name)
        if sum(map(len, self.layers)) == len(switch.layers) and self._keep_inputs():
            self.gradients = [self._pull(partial(self._run_top, k), k)[0].cpu() for k in range(len(starts))]
        else:
            print("sensitivity: this architecture can't be run block by block: the whole model is one block")
            self.blocks, self.layers = [], [list(switch.layers)]

    def moments(self, block: int) -> dict[str, list[torch.Tensor]]:
        """H = Σ_t ‖g_t‖² x_t x_tᵀ, (in, in) float32, of each part of each of the block's layers, by name."""
        found: dict[str, list[torch.Tensor]] = {}
        for k in self.guiding:
            for name, x, g in self._visit(block, k):
                inputs, parts = x.flatten(0, -2).float(), g.flatten(0, -2).split(self.parts[name], dim=1)
                scaled = [inputs * part.norm(dim=1, keepdim=True) for part in parts]
                held = found.setdefault(name, [torch.zeros((), device=x.device)] * len(parts))
                found[name] = [
                    h.addmm_(s.T, s) if h.dim() else s.T @ s for h, s in zip(held, scaled, strict=True)
                ]
        return found

    def slopes(self, block: int, formats: Sequence[str]) -> Slopes:
        """s_t = g_t · (ΔW x_t) by format, (the block's layers, windows, T); NaN where it can't hold one.

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
        parts: dict[str, list[torch.Tensor]] = {fmt: [] for fmt in formats}
        for k in self.others:
            made = {fmt: torch.full((len(names), *self.ids[k].shape), torch.nan) for fmt in formats}
            seen: Counter[str] = Counter()
            for name, x, g in self._visit(block, k):
                seen[name] += g.numel() // g.shape[-1]
                for fmt in formats if g.numel() // g.shape[-1] == self.ids[k].numel() else ():
                    if (name, fmt) in deltas:
                        moved = _product(x, deltas[name, fmt]).float()  # ΔW x, (B, T, out)
                        value = torch.linalg.vecdot(moved, g).view(self.ids[k].shape)
                        made[fmt][names.index(name)] = value.cpu()
            for name in names:
                if seen[name] != self.ids[k].numel():
                    raise AnalysisError(
                        f"Layer {name} saw {seen[name]} of {self.ids[k].numel()} tokens: expected each once. "
                        "Its sensitivity can't be taken from gradients; use sensitivity='measured' or 'none'."
                    )
            for fmt in formats:
                parts[fmt].append(made[fmt])
        return {fmt: torch.cat(parts[fmt], dim=1).numpy() for fmt in formats}

    def descend(self, block: int) -> None:
        """The block is done with: the gradients at its input are those at the output of the one below."""
        self.gradients = [self._below.pop(k, None) for k in range(len(self.ids))]
        if self.blocks:
            self.inputs[block].clear()

    def _visit(self, block: int, k: int) -> list[tuple[str, torch.Tensor, torch.Tensor]]:
        """One block forward and backward on one batch: (name, x, g) of each of its layers."""
        gradient, seen = self._pull(partial(self._run, block, k), k)
        if self.blocks:
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

        def look(name: str, module: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            x = inputs[0].detach()
            output.register_hook(lambda g: seen.append((name, x, g)))

        find, device = self.model.get_submodule, self.switch.device
        handles = [find(name).register_forward_hook(partial(look, name)) for name in self.layers[block]]
        try:
            with torch.enable_grad():
                if self.blocks:
                    leaf = self.inputs[block][k].detach().to(device).requires_grad_(True)
                    return leaf, _first(self._call(block, k, leaf)), seen
                leaves: list[torch.Tensor] = []
                embedding = self.model.get_input_embeddings()
                handles.append(
                    embedding.register_forward_hook(lambda m, i, out: leaves.append(out.requires_grad_(True)))
                )
                output = final_hidden(self.model, self.ids[k].to(device))
                return leaves[0], output, seen
        finally:
            for handle in handles:
                handle.remove()

    def _run_top(self, k: int) -> tuple[torch.Tensor, torch.Tensor, list[Any]]:
        """What comes after the last block."""
        output = self.last[k]
        leaf = _first(output).detach().requires_grad_(True)
        returned = (leaf, *output[1:]) if isinstance(output, tuple) else leaf
        with torch.enable_grad(), resumed(self.blocks, [returned] * len(self.blocks), len(self.blocks)):
            return leaf, final_hidden(self.model, self.ids[k].to(leaf.device)), []

    def _call(self, block: int, k: int, hidden: torch.Tensor) -> Any:
        args, options = self.calls[block][k]
        return self.blocks[block](hidden, *args, **options)

    def _keep_inputs(self) -> bool:
        """The forward pass; False where a block, run alone, gives something else than it did in the model."""
        self._check_memory()
        self.inputs: list[list[torch.Tensor]] = [[] for _ in self.blocks]
        self.calls: list[list[Any]] = [[] for _ in self.blocks]
        self.last: list[Any] = []

        def keep(block: int, module: Any, args: tuple[Any, ...], options: dict[str, Any]) -> None:
            rest = {key: value for key, value in options.items() if key != "hidden_states"}
            self.inputs[block].append((args[0] if args else options["hidden_states"]).cpu())
            self.calls[block].append((args[1:], rest))

        handles = [
            block.register_forward_pre_hook(partial(keep, index), with_kwargs=True)
            for index, block in enumerate(self.blocks)
        ]
        handles.append(self.blocks[-1].register_forward_hook(lambda m, i, out: self.last.append(out)))
        try:
            with torch.no_grad():
                for ids in self.ids:
                    final_hidden(self.model, ids.to(self.switch.device))
        finally:
            for handle in handles:
                handle.remove()
        if any(len(kept) != len(self.ids) for kept in (*self.inputs, self.last)):
            return False
        with torch.no_grad():
            made = (
                _first(self._call(index, 0, self.inputs[index][0].to(self.switch.device)))
                for index in range(len(self.blocks) - 1)
            )
            return all(torch.equal(one.cpu(), self.inputs[index + 1][0]) for index, one in enumerate(made))

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
    found: dict[str, dict[str, NDArray[np.float32]]] = {fmt: {} for fmt in formats}
    for block in reversed(range(len(passing.layers))):
        made = passing.slopes(block, formats)
        passing.descend(block)
        for fmt in formats:
            found[fmt] |= dict(zip(passing.layers[block], made[fmt], strict=True))
    return {fmt: np.stack([found[fmt][name] for name in switch.layers]) for fmt in formats}


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
def resumed(blocks: Sequence[Any], outputs: Sequence[Any], depth: int) -> Iterator[None]:
    """While entered, blocks before `depth` return the given outputs instead of computing them."""

    def returning(output: Any, device: torch.device) -> Any:
        whole = isinstance(output, tuple)
        return lambda *_, **__: (output[0].to(device), *output[1:]) if whole else output.to(device)

    try:
        for block, output in zip(blocks[:depth], outputs, strict=False):
            block.forward = returning(output, next(block.parameters()).device)
        yield
    finally:
        for block in blocks[:depth]:
            block.__dict__.pop("forward", None)


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
    steps: Callable[..., Any] | None = None,
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
        steps: as `progress`, for the columns to sample.
        purpose: of the draws (`draws`).
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
    groups = range(0, n, SAMPLED)
    todo = ((group, column) for group in groups for column in range(1, length))
    rows: list[torch.Tensor] = []
    for group, column in todo if steps is None else steps(todo, total=len(groups) * (length - 1)):
        part = slice(group, group + SAMPLED)
        if column == 1:
            columns, cache = [first[part].to(device)], None
        output = model.base_model(input_ids=columns[-1], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        last = as_head_takes(model, output.last_hidden_state[:, -1])
        drawn = zip(last.split(head.chunk), uniform[part, column, None].split(head.chunk), strict=True)
        tokens = [pick(torch.softmax(head.finish(head.raw(h, "variant")), -1), u) for h, u in drawn]
        columns.append(told(torch.cat(tokens), group, column))
        if column == length - 1:
            rows.append(torch.cat(columns, dim=1).cpu())
    return torch.cat(rows) if rows else first


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

    Slopes underrate the damage of layers that cost little: on the bundled model by .71 where dear ones are
    at .95. One scale for all would predict plans by `fisher` at .7 to .8 of their KL. Where the two
    measurements contradict each other, one scale it is. NaN: the format can't hold the layer.
    """
    parts = ((cheap, half), (~cheap, total - half))
    sums = [float(np.nansum(values[part])) for part, _ in parts]
    if min(*sums, half, total - half) <= 0:
        own = sum(sums)
        return values * (total / own) if own > 0 else values
    return values * np.where(cheap, half / sums[0], (total - half) / sums[1])


# --- measuring --------------------------------------------------------------------------------------------


class Measure:
    """Mean KL(16-bit ‖ variant) in nats a token, on fixed windows.

    A layer of block b changes nothing before block b, so its evaluation starts from the 16-bit model's own
    hidden states there: over all layers, half of the blocks' work is never done.
    """

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
        self.prefix, self.blocks = find_blocks(switch.model, switch.layers)
        self.outputs = [self._record(windows[rows]) for rows in self.batches]
        if self.blocks and not self._resumes():
            print("measuring: this architecture can't start at a block; each evaluation runs the whole model")
            self.blocks, self.outputs = [], [[] for _ in self.batches]

    def all(self, formats: Mapping[str, str], label: str) -> float:
        """Mean KL with several layers switched; the model is left so."""
        self.switch.to(formats)
        return self._mean(0, label)

    def one(self, name: str, fmt: str) -> float:
        """Mean KL with one layer switched; the model is left so."""
        self.switch.to({name: fmt})
        found = IN_BLOCK.match(name)
        depth = int(found[2]) if found is not None and found[1] == self.prefix else 0
        return self._mean(depth, f"{name} in {fmt}")

    def _mean(self, depth: int, label: str) -> float:
        parts = []
        for rows, outputs in zip(self.batches, self.outputs, strict=True):
            with resumed(self.blocks, outputs, depth):
                ids, held = self.windows[rows], self.reference[rows]
                parts.append(token_scores(self.switch.model, ids, held, batch=len(ids), label=label).kl)
        return float(np.concatenate(parts).mean(dtype=np.float64))

    @torch.inference_mode()
    def _record(self, ids: torch.Tensor) -> list[Any]:
        """The output of each block, on the CPU."""
        kept: list[Any] = []

        def keep(module: Any, inputs: Any, output: Any) -> None:
            kept.append((output[0].cpu(), *output[1:]) if isinstance(output, tuple) else output.cpu())

        handles = [block.register_forward_hook(keep) for block in self.blocks]
        try:
            if self.blocks:
                final_hidden(self.switch.model, ids.to(self.switch.device))
        finally:
            for handle in handles:
                handle.remove()
        return kept

    @torch.inference_mode()
    def _resumes(self) -> bool:
        """Does starting at the middle block give the same final states, bit for bit?"""
        ids = self.windows[self.batches[0]].to(self.switch.device)
        with resumed(self.blocks, self.outputs[0], len(self.blocks) // 2):
            got = final_hidden(self.switch.model, ids)[:, :-1]
        return torch.equal(got.cpu(), self.reference.hidden[self.batches[0]])


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
    limit: int | None = None,
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
        limit: most measurements; by default 15 % of the layers, at least 4.

    Returns:
        The costs (layers,), which of them were measured, and whether every cut came to rest.
    """
    limit = most_measurements(len(values)) if limit is None else limit
    relative = np.divide(errors, values, out=np.ones_like(errors), where=values > 0)
    width_share = Z * np.hypot(np.nan_to_num(relative, nan=1.0), MODEL_ERROR)
    measured: dict[int, float] = {}
    plans: list[list[bytes]] = []
    while True:
        current = values.copy()
        if measured:
            index = list(measured)
            estimated = values[index].sum()
            current *= sum(measured.values()) / estimated if estimated > 0 else 1.0
            current[index] = list(measured.values())
        plans.append([lifted(current, extra, budget).tobytes() for budget in budgets])
        cuts = [cut(current, extra, budget) for budget in budgets]
        distance = np.min([np.abs(current / extra - c) for c in cuts], axis=0)
        width = width_share * current / extra
        near = np.divide(distance, width, out=np.full_like(width, np.inf), where=width > 0)
        near[list(measured)] = np.inf
        still_open = [int(i) for i in np.argsort(near, kind="stable") if near[i] < 1]
        at_rest = not still_open or (len(plans) > REST and all(p == plans[-1] for p in plans[-1 - REST :]))
        room = limit - len(measured)
        if at_rest or room <= 0:
            return current, np.isin(np.arange(len(values)), list(measured)), at_rest
        for layer in still_open[: min(AT_ONCE, room)]:
            measured[layer] = measure(layer)


def most_measurements(layers: int) -> int:
    """15 % of the layers, at least 4."""
    return max(AT_ONCE, math.floor(SHARE * layers))


def lifted(values: Floats, extra: Floats, budget: float) -> NDArray[np.bool_]:
    """Which layers the budget reaches, from the highest cost per extra byte on, up to the first too large."""
    order = np.argsort(-values / extra, kind="stable")
    reached = np.zeros(len(values), dtype=bool)
    reached[order] = np.cumsum(extra[order]) <= budget
    return reached


def cut(values: Floats, extra: Floats, budget: float) -> float:
    """Highest cost per extra byte among the layers that the budget doesn't reach; 0 if it reaches all."""
    left = ~lifted(values, extra, budget)
    return float((values[left] / extra[left]).max()) if left.any() else 0.0
