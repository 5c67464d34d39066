"""What quantizing each layer costs, in nats a token: estimated from gradients, measured, or both.

`fisher` needs one backward pass over text that the model writes itself; `measured` is the oracle, one
evaluation a layer; `refined` measures only the layers that decide a budget's cut. Every column adds up over
layers, and `predicted` is scaled so that its sum is the KL measured with all layers in that format.
"""

from __future__ import annotations

import shutil
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch

from spi_utils.costs.fisher import per_block, per_sequence, per_token, random_windows, sample_windows, slopes
from spi_utils.costs.footprint import Footprint, checkpointed, footprints
from spi_utils.costs.measure import Measure
from spi_utils.costs.refine import Refinement, most_measurements, refine
from spi_utils.errors import AnalysisError, RunError
from spi_utils.models import (
    ModelSource,
    load_model,
    load_tokenizer,
    open_weights,
    resolve_device,
    resolve_dtype,
)
from spi_utils.progress import progress
from spi_utils.runs import Run, atomic_path, fingerprint, read_json, write_json
from spi_utils.scoring import reference_states
from spi_utils.texts import NAMES, load_text, make_windows, start_token
from spi_utils.variants import Switch

if TYPE_CHECKING:
    from numpy.typing import NDArray

ENGINE = 2  # raise it when the numbers change: finished columns and pieces are then made again
WINDOWS, LENGTH = 32, 256  # of the text that gradients are taken on
YARDSTICK_WINDOWS = 8  # of the text that KL is measured on
KINDS: dict[str, Callable[..., torch.Tensor]] = {"self": sample_windows, "random": random_windows}
ACCUMULATIONS = {"fisher": per_block, "fisher_token": per_token, "fisher_seq": per_sequence}


@dataclass(frozen=True)
class Settings:
    """What the numbers depend on, the model apart."""

    sensitivity: str
    formats: tuple[str, ...]
    device: str
    dtype: str
    seed: int
    refine_at: tuple[float, ...]
    windows: int
    length: int
    text: str


def sensitivities(
    run: Run,
    source: ModelSource,
    frame: pd.DataFrame,
    *,
    sensitivity: str = "self",
    formats: Sequence[str] = ("nf4", "int8"),
    device: str = "auto",
    dtype: str = "auto",
    seed: int = 0,
    refine_at: Sequence[float] = (),
    windows: int | None = None,
    length: int | None = None,
    text: str = "auto",
    force: bool = False,
) -> pd.DataFrame:
    """Cost of quantizing each layer, resumable by batch and by layer.

    Args:
        run: finished pieces lie in its folder for unfinished work of the stage "analyze".
        source: the model.
        frame: the layer table; `name`, `quantizable`, `numel` and `bytes_<fmt>` are read.
        sensitivity: "self" (text that the model samples from itself), "random" (random tokens), "measured"
            (the oracle, no gradients), or a text as in `texts.load_text`.
        formats: whose costs are wanted.
        device, dtype: where and in which compute dtype.
        seed: of the sampled text and labels.
        refine_at: matrix bits at whose cut layers are measured, on the text that gradients are taken on.
        windows, length: of the text that gradients are taken on (32 × 256), or the oracle is measured on (8).
        text: what the sum over layers is measured on, and the oracle's layers.
        force: forget unfinished work.

    Returns:
        A row a quantizable layer, indexed by name, nats a token: `fisher_<fmt>` (per block of positions),
        `fisher_token_<fmt>`, `fisher_seq_<fmt>`, each with its standard error `…_se`; `measured_<fmt>` or
        `refined_<fmt>` where asked for; and `predicted_<fmt>`. `attrs["sensitivity"]` tells
        the texts, the costs and the measured sums.

    Raises:
        AnalysisError: an unknown setting, or not enough memory (says how much, and what to change).
        EvaluationError: a text that can't be used, or numbers that overflow.
    """
    names = list(frame.loc[frame["quantizable"].astype(bool), "name"])
    if not names or not formats:
        return pd.DataFrame(index=pd.Index(names, name="name"))
    place = resolve_device(device)
    kind = resolve_dtype(dtype, place)
    count = windows or (YARDSTICK_WINDOWS if sensitivity == "measured" else WINDOWS)
    where = (str(place), str(kind), seed, tuple(refine_at), count, length or LENGTH, text)
    settings = Settings(sensitivity, tuple(formats), *where)
    _check(settings)
    folder = _claim(run, source, settings, names, force)
    with open_weights(source) as weights:
        switch = Switch(load_model(source, device=place, dtype=kind), weights, names)
        work = Work(folder, switch, load_tokenizer(source), settings)
        columns = work.columns(frame.set_index("name").loc[names])
    table = pd.DataFrame(columns, index=pd.Index(names, name="name"))
    table.attrs["sensitivity"] = work.notes
    return table


class Work:
    """One computation of the columns; whatever is finished lies in `folder` and is not done again."""

    def __init__(self, folder: Path, switch: Switch, tokenizer: Any, settings: Settings) -> None:
        self.folder, self.switch, self.tokenizer, self.settings = folder, switch, tokenizer, settings
        self.model = switch.model
        self.start = start_token(tokenizer, self.model.config)
        self.notes: dict[str, Any] = {"start_token": self.start, "seconds": {}}
        self._measures: dict[str, Measure] = {}

    def columns(self, layers: pd.DataFrame) -> dict[str, NDArray[np.float64]]:
        """Every column, in the order of the layer table."""
        columns: dict[str, NDArray[np.float64]] = {}
        if self.settings.sensitivity == "measured":
            best = {fmt: self.measured(fmt) for fmt in self.settings.formats}
            columns |= {f"measured_{fmt}": values for fmt, values in best.items()}
        else:
            columns |= self.fisher()
            best = {fmt: columns[f"fisher_{fmt}"] for fmt in self.settings.formats}
        for fmt in self.settings.formats if self.settings.refine_at else ():
            best[fmt] = self.refined(fmt, layers, columns).values
            columns[f"refined_{fmt}"] = best[fmt]
        totals = self.totals()
        return columns | {f"predicted_{fmt}": _scaled(best[fmt], totals[fmt]) for fmt in best}

    # --- gradients ------------------------------------------------------------------------------------

    def fisher(self) -> dict[str, NDArray[np.float64]]:
        """Fisher columns of every format, from one backward pass over the settings' text."""
        windows = self.windows()
        found = self._slopes(windows)
        columns: dict[str, NDArray[np.float64]] = {}
        for fmt, values in found.items():
            for name, accumulate in ACCUMULATIONS.items():
                made = accumulate(values)
                columns |= {f"{name}_{fmt}": made.value, f"{name}_{fmt}_se": made.error}
        return columns

    def windows(self) -> torch.Tensor:
        """The text that gradients are taken on, (W, T), made once and kept."""
        path = self.folder / "windows.npy"
        if not _readable(path, lambda: np.load(path).shape[1] == self.settings.length):
            with self._timed("text"):
                made = self._make_windows()
            with atomic_path(path) as temporary, temporary.open("wb") as file:
                np.save(file, made.numpy())
        return torch.from_numpy(np.load(path))

    def _make_windows(self) -> torch.Tensor:
        s = self.settings
        if s.sensitivity not in KINDS:
            return self._cut(s.sensitivity, s.windows)
        make = KINDS[s.sensitivity]
        return make(self.model, s.windows, s.length, self.start, s.seed, steps=_sampling)

    def _cut(self, spec: str, count: int) -> torch.Tensor:
        text = load_text(spec)
        self.notes["text"] = {"name": text.name, "source": text.source, "sha256": text.sha256}
        config = self.model.config
        return make_windows(text, self.tokenizer, count, self.settings.length, self.start, config=config)

    def _slopes(self, windows: torch.Tensor) -> dict[str, NDArray[np.float32]]:
        """Slopes by format, (layers, W, T), as large a batch at a time as the memory holds."""
        said = f"sensitivity: {len(windows)} windows of {windows.shape[1]} tokens"
        for plan in footprints(self.switch, windows.shape[1], len(self.settings.formats)):
            print(f"{said}, {plan} on {self.switch.device}", flush=True)
            self.notes["estimated_peak_gb"] = round(plan.bytes / 1e9, 2)
            try:
                return self._slopes_by(plan, windows)
            except torch.OutOfMemoryError as error:
                failure = f"out of memory, {plan}: {error}"
            torch.cuda.empty_cache()  # here, where the failed pass' tensors are gone with its traceback
            print(f"sensitivity: {failure}", flush=True)
        raise AnalysisError(
            f"{failure}. Use shorter windows (`length`), a device with more memory, or sensitivity='none'."
        )

    def _slopes_by(self, plan: Footprint, windows: torch.Tensor) -> dict[str, NDArray[np.float32]]:
        """The same by one plan, a file a batch; formats after the first on every other batch."""
        formats = self.settings.formats
        firsts = range(0, len(windows), plan.batch)
        paths = [self.folder / f"slopes-{first:05d}-{plan.batch}.npz" for first in firsts]
        todo = [
            (first, path) for first, path in zip(firsts, paths, strict=True) if not self._has_slopes(path)
        ]
        if todo:
            self._quantize()
        done = len(paths) - len(todo)
        with self._timed("gradients"), checkpointed(self.switch, plan.checkpoint):
            for first, path in progress(todo, len(paths), "sensitivity by gradients", done=done):
                ids = windows[first : first + plan.batch].to(self.switch.device)
                draws = torch.Generator().manual_seed(self.settings.seed * 1_000_003 + first)
                found = slopes(self.model, self.switch, ids, _formats_of(first // plan.batch, formats), draws)
                with atomic_path(path) as temporary, temporary.open("wb") as file:
                    np.savez(file, **found)  # type: ignore[arg-type]
        parts = [dict(np.load(path)) for path in paths]
        return {fmt: np.concatenate([part[fmt] for part in parts if fmt in part], 1) for fmt in formats}

    def _has_slopes(self, path: Path) -> bool:
        """Whether a batch's file is there and holds whole slopes of every layer."""
        first, batch = map(int, path.stem.split("-")[1:])
        rows = min(batch, self.settings.windows - first)
        shape = (len(self.switch.layers), rows, self.settings.length)
        formats = _formats_of(first // batch, self.settings.formats)

        def sound() -> bool:
            with np.load(path) as held:
                return set(held.files) == set(formats) and all(held[fmt].shape == shape for fmt in formats)

        return _readable(path, sound)

    def _quantize(self) -> None:
        """Make every code before the clock of the gradients starts."""
        with self._timed("quantization"):
            for fmt in self.settings.formats:
                for name in self._able(fmt):
                    self.switch.packed(name, fmt)

    # --- measurements ---------------------------------------------------------------------------------

    def measured(self, fmt: str) -> NDArray[np.float64]:
        """The oracle: every layer measured alone on the text; NaN where the format can't hold it."""
        able = self._able(fmt)
        found = {name: self._one("text", name, fmt) for name in progress(able, len(able), f"ΔKL, {fmt}")}
        return np.array([found.get(name, np.nan) for name in self.switch.layers])

    def _able(self, fmt: str) -> list[str]:
        """The layers that a format can hold."""
        return [name for name in self.switch.layers if self.switch.able(name, fmt)]

    def refined(self, fmt: str, layers: pd.DataFrame, columns: dict[str, NDArray[np.float64]]) -> Refinement:
        """Fisher's estimate, measured on Fisher's own text where the budgets' cuts need it; NaN where the
        format can't hold the layer."""
        names = np.array(self._able(fmt))
        able = np.isin(self.switch.layers, names)
        held = layers[able]
        extra = (held["bytes_16bit"] - held[f"bytes_{fmt}"]).to_numpy(float)
        low = held[f"bytes_{fmt}"].sum() + layers.loc[~able, "bytes_16bit"].sum()
        budgets = [bits / 8 * layers["numel"].sum() - low for bits in self.settings.refine_at]
        budgets = [budget for budget in budgets if 0 < budget < extra.sum()]
        value, error = columns[f"fisher_{fmt}"][able], columns[f"fisher_{fmt}_se"][able]
        whole = columns[f"fisher_{fmt}"].copy()
        if not budgets:
            return Refinement(whole, np.zeros(len(whole), bool), settled=True)
        most = most_measurements(len(value))
        bar = progress(range(most), most, f"ΔKL near the cut, {fmt} (at most)")

        def measure(index: int) -> float:
            next(bar, None)
            return self._one("own", names[index], fmt)

        with self._timed(f"refine_{fmt}"):
            found = refine(value, error, extra, budgets, measure)
        self.notes[f"refined_{fmt}"] = {
            "matrix_bits": list(self.settings.refine_at),
            "evaluations": int(found.measured.sum()),
            "settled": found.settled,
        }
        whole[able] = found.values
        measured = np.zeros(len(whole), bool)
        measured[able] = found.measured
        return Refinement(whole, measured, found.settled)

    def totals(self) -> dict[str, float]:
        """KL with every layer in a format, on the text."""
        path = self.folder / "totals.json"
        if not _readable(path, lambda: {*read_json(path)["kl"]} == {*self.settings.formats}):
            with self._timed("totals"):
                measure = self._measure("text")
                kl = {
                    fmt: measure.all(dict.fromkeys(self._able(fmt), fmt), fmt)
                    for fmt in self.settings.formats
                }
            write_json(path, {"kl": kl, "text": self.notes["text"]})
        held = read_json(path)
        self.notes |= {"text": held["text"], "kl_all_layers": held["kl"]}
        return held["kl"]

    def _one(self, where: str, name: str, fmt: str) -> float:
        path = self.folder / f"{where}-{fmt}-{name}.json"
        if not _readable(path, lambda: isinstance(read_json(path)["kl"], float)):
            write_json(path, {"kl": self._measure(where).one(name, fmt)})
        return read_json(path)["kl"]

    def _measure(self, where: str) -> Measure:
        """KL on the first windows of the text, or of Fisher's own; made when first needed."""
        if where not in self._measures:
            self._measures.clear()  # one at a time: each keeps every block's output
            s = self.settings
            count = s.windows if s.sensitivity == "measured" else YARDSTICK_WINDOWS
            own = where == "own"
            windows = self.windows()[:YARDSTICK_WINDOWS] if own else self._cut(self._yardstick(), count)
            self.switch.restore()
            self._measures[where] = Measure(self.switch, windows, reference_states(self.model, windows))
        return self._measures[where]

    def _yardstick(self) -> str:
        """A user's own text if one was given, else the settings' text."""
        s = self.settings
        return s.text if s.sensitivity in {*KINDS, "measured"} else s.sensitivity

    @contextmanager
    def _timed(self, what: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        self.notes["seconds"][what] = round(time.monotonic() - started, 1)


def _readable(path: Path, sound: Callable[[], bool]) -> bool:
    """Whether a finished piece is there and `sound`: a damaged one is said and merely made again."""
    if not path.is_file():
        return False
    try:
        if sound():
            return True
        error: object = "another content than expected"
    except (RunError, ValueError, KeyError, TypeError, EOFError, IndexError, zipfile.BadZipFile) as damage:
        error = damage
    print(f"sensitivity: {path} is damaged ({error}) and made again.", flush=True)
    return False


def _formats_of(batch: int, formats: Sequence[str]) -> tuple[str, ...]:
    """Each format costs most of a forward pass, so only the first one sees every batch, the others every
    other one: half the windows rank layers nearly as well (benchmarks/selection.py)."""
    return tuple(formats) if batch % 2 == 0 else tuple(formats[:1])


def _sampling(columns: range) -> Iterator[int]:
    return progress(columns, len(columns), "text sampled from the model")


def _scaled(values: NDArray[np.float64], total: float) -> NDArray[np.float64]:
    """The same shares of what all layers together cost."""
    own = np.nansum(values)  # NaN: the format can't hold the layer
    return values * (total / own) if own > 0 else values


def _check(settings: Settings) -> None:
    known = (*KINDS, "measured", *NAMES)
    if settings.sensitivity not in known and not Path(settings.sensitivity).is_file():
        raise AnalysisError(
            f"sensitivity={settings.sensitivity!r} is none of {', '.join(known)}, none, and no file."
        )
    if settings.refine_at and settings.sensitivity == "measured":
        raise AnalysisError(
            "refine_at refines an estimate; sensitivity='measured' measures every layer already."
        )
    if not all(4 < bits < 16 for bits in settings.refine_at):
        raise AnalysisError(f"refine_at={list(settings.refine_at)}: expected matrix bits between 4 and 16.")


def _claim(run: Run, source: ModelSource, settings: Settings, names: list[str], force: bool) -> Path:
    """The folder for unfinished work; emptied if other settings or another model made what lies there."""
    folder = run.partial / "analyze" / "sensitivity"
    given = [Path(spec) for spec in (settings.sensitivity, settings.text)]
    content = [load_text(path).sha256 for path in given if path.is_file()]
    mark = fingerprint([ENGINE, source.identity(), asdict(settings), names, content])
    owner = folder / "fingerprint"
    if folder.exists() and (force or not owner.exists() or owner.read_text() != mark):
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    owner.write_text(mark)
    return folder
