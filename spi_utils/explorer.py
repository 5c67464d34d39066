"""The alpha explorer: a threshold on a score and all that follows from it, as sliders and as an HTML page.

`ExplorerState` holds a choice and says what follows from it, `Picture` draws it, `Explorer` is its sliders in
a notebook, and `write_explorer` puts what every threshold gives into one file that needs no kernel:

    state = ExplorerState.open("runs/smollm2-135m-instruct")
    state.set_threshold(4.5)
    print(state.line())
    state.save()
"""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image
from scipy.ndimage import binary_erosion

from spi_utils import figures, runs
from spi_utils.claims import Evaluation
from spi_utils.curves import Chooser, Field
from spi_utils.errors import PlanError, RunError, SPIError
from spi_utils.figures import (
    FORMAT_COLOURS,
    FORMAT_LABELS,
    LayerGrid,
    density_of,
    draw_grid,
    eigenvalues_of,
    histogram_edges,
    is_wide,
    planned_layers,
    score_label,
    short_label,
    shorten,
    single_spectrum,
)
from spi_utils.plan import (
    SCORES,
    Patterns,
    ProtectionPlan,
    able,
    available_scores,
    make_plan,
    matches,
    nominal_bits,
    payload_bytes,
    predicted_kl,
    price,
    score_row,
)
from spi_utils.runs import Run

if TYPE_CHECKING:
    import ipywidgets
    from numpy.typing import NDArray

SLIDER_STEPS = 500
NAMED = 3  # failed layers named in a sentence; the rest are counted
PICTURES_KEPT = 8  # bitmaps of recently used scores, 2.4 MB each
WISHES = ("group", "force_16bit", "forbid_16bit", "seed")
UNKNOWN = "No sensitivity in this run: the cost of a choice is not predicted."
# What is said of a choice. A part is said where all its numbers are known; the page says the same parts.
SAYS = {
    "line": (
        "{layers} of {planned} layers in 16-bit{failed} · {size} in all, {saved} saved",
        " · {bits} matrix bits",
        " · predicted KL {kl} nats a token",
    ),
    "comparison": (
        "{unknown}",
        "Predicted at this size: random choices {low}–{high} nats a token, the least predicted KL {best}.",
        " This choice is predicted worse than random by {worse}.",
        " This choice is predicted better than {better} of random choices, with {gain} of the possible gain.",
    ),
    "ties": ("{ties} layers share the score's value at the cut, and go together.",),
}


def say(what: str, facts: Mapping[str, Any]) -> str:
    """The parts of a sentence of `SAYS` whose numbers are among the facts; may be empty."""
    known = (part for part in SAYS[what] if set(re.findall(r"{(\w+)}", part)) <= facts.keys())
    return "".join(known).format(**facts)


def three_digits(value: float) -> str:
    """Three significant digits without an exponent: "205", "64.0", "0.498"."""
    if not math.isfinite(value) or value == 0:
        return f"{value:g}"
    return f"{value:.{min(3, max(0, 2 - math.floor(math.log10(abs(value)))))}f}".replace("-", "−")


# --- the state: what is chosen, and what follows -----------------------------------------------------------


class ExplorerState:
    """A layer table, a person's wishes, a score with its direction, and a threshold.

    `chooser`, `threshold` and `choice` are the present choice, `bounds` the thresholds allowed. `held` names
    the layers that stay in 16-bit because their analysis failed: no score can tell what they cost, so no
    threshold chooses them, unless a pattern speaks of them. `notes` are sentences that hold at every choice.
    """

    def __init__(
        self,
        layers: pd.DataFrame,
        *,
        run: Run | None = None,
        spectra: Mapping[str, NDArray[np.float64]] | None = None,
        score: str = "alpha_hill",
        direction: str = "high",
        share: float = 0.52,
        threshold: float | None = None,
        lower: str = "nf4",
        double_quant: bool = False,
        group: str | None = None,
        force_16bit: Patterns = None,
        forbid_16bit: Patterns = None,
        seed: int = 0,
    ) -> None:
        """Start from a table in memory; `open` starts from a run directory.

        Args:
            layers: the layer table.
            run: where `save` writes; None for exploring only.
            spectra: name -> singular values, for `spectrum`.
            share: of the layers, how many are protected at first; unless
            threshold: says where to start, in the score's units.
            lower: the format of the layers that are not kept in 16-bit.
            double_quant: NF4 with double quantization.
            group, force_16bit, forbid_16bit, seed: as `make_plan`.

        Raises:
            PlanError, AnalysisError: unknown score or format, a score that the table doesn't hold,
                nothing to plan, a bad pattern.
        """
        self.layers, self.run, self.spectra = layers, run, dict(spectra or {})
        self.planned = planned_layers(layers)
        self.lower, self.rest = lower, f"{int(nominal_bits(lower))}-bit"
        self.scores = {name: SCORES[name].title for name in available_scores(layers, (lower, "16bit"))}
        names, failed = list(self.planned["name"]), (self.planned["status"] == "failed").to_numpy()
        # A plan that an explorer saved names its failed layers; they are found anew in each table.
        own = {name: f"^{re.escape(name)}$" for name, lost in zip(names, failed, strict=True) if lost}
        force, forbid = (
            [given]
            if isinstance(given, str)
            else [one for one in given or () if one not in ("", *own.values())]
            for given in (force_16bit, forbid_16bit)
        )
        spoken = matches(names, force, "force_16bit") | matches(names, forbid, "forbid_16bit")
        self.held = [name for name, lost in zip(names, failed & ~spoken, strict=True) if lost]
        forced = force + [own[name] for name in self.held]
        self.options: dict[str, Any] = {"formats": (lower, "16bit"), "double_quant": double_quant}
        self.options |= {"group": group, "seed": seed}
        self.options |= {"force_16bit": forced or None, "forbid_16bit": forbid or None}
        self.notes: list[str] = []
        if self.held:
            count, more = len(self.held), len(self.held) - NAMED
            self.notes.append(
                f"{count} layer{' stays' if count == 1 else 's stay'} in 16-bit because the analysis failed "
                f"there: {', '.join(self.held[:NAMED])}{f' and {more} more' if more > 0 else ''}; no "
                "threshold chooses among those."
            )
        self.failures = " ".join(self.notes)
        told = {"group": [group] if group else [], "force_16bit": force, "forbid_16bit": forbid}
        if wishes := ", ".join(f"{name} {', '.join(wish)}" for name, wish in told.items() if wish):
            self.notes.append(f"Held at every threshold, and saved with the plan: {wishes}.")
        self.grid = LayerGrid(layers)
        # What random selections and the optimum reach at each size; None without sensitivity.
        self.field = Field.of(layers, **self.options)
        self.landmarks = self._landmarks()
        self._choosers: dict[tuple[str, str], Chooser] = {}
        self._pictures: dict[tuple[str, str], Picture] = {}
        self._use(score, direction, round(share * len(names)))
        if threshold is not None:
            self.set_threshold(threshold)

    @classmethod
    def open(cls, run_dir: str | Path | Run, **options: Any) -> ExplorerState:
        """Start from a run directory, at the plan it holds if there is one.

        Raises:
            RunError, PlanError: no analysis there, or damaged files; says which notebook to run.
        """
        run = run_dir if isinstance(run_dir, Run) else runs.existing_run(run_dir)
        layers, spectra = runs.read_layers(run), runs.read_spectra(run)
        if lost := sorted(spectra.keys() - set(layers["name"])):
            raise RunError(
                f"{run.layers_csv}: no row for {', '.join(lost[:3])}, yet {run.spectra.name} holds its "
                "spectrum: rows were lost. Run notebook 01_analyze again with force=True."
            )
        if not run.plan_json.exists():
            return cls(layers, run=run, spectra=spectra, **options)
        plan = ProtectionPlan.read(run.plan_json, model=runs.run_info(run)["model"])
        quantized = sorted(set(plan.formats.values()) - {"16bit"}, key=nominal_bits)
        start: dict[str, Any] = {"lower": next(iter(quantized), "nf4"), "double_quant": plan.double_quant}
        start |= {name: plan.options[name] for name in WISHES if name in plan.options}
        start |= {"share": plan.count("16bit") / max(len(plan.formats), 1)} | options
        known = plan.score in available_scores(layers, (start["lower"], "16bit"))
        if as_planned := known and not {"score", "direction", "share"} & set(options):
            start |= {"score": plan.score, "direction": plan.direction}
        state = cls(layers, run=run, spectra=spectra, **start)
        if as_planned and plan.rule == "threshold" and plan.value is not None and "threshold" not in options:
            state._at(plan.value)
        if dropped := [fmt for fmt in quantized if fmt != state.lower]:
            here = f"here layers are {state.lower} or 16-bit"
            state.notes.append(f"Not kept from the run's plan: {', '.join(dropped)}; {here}.")
        return state

    def _landmarks(self) -> list[tuple[str, int, float]]:
        """Other files of the same weights beside the frontier: label, bytes, KL in nats a token.

        int8 everywhere as predicted, and bitsandbytes' own NF4 as measured where notebook 04 has run.
        """
        found = []
        everywhere = dict.fromkeys(self.planned["name"], "int8")
        kl = predicted_kl(self.planned, everywhere) if "predicted_int8" in self.layers else None
        if kl is not None and able(self.planned, "int8").all():
            found.append(("int8 everywhere", price(self.layers, everywhere)["total"], kl))
        if self.run is not None and self.run.evaluation_json.exists():
            nearest = Evaluation.read(self.run.evaluation_json).variants.get("nf4_nearest")
            if nearest is not None:
                found.append(("NF4, nearest (measured)", int(nearest["bytes"]), float(nearest["kl_mean"])))
        return found

    def chooser_of(self, score: str, direction: str) -> Chooser:
        """The layers sorted by a score, with the consequences of every cut; made once."""
        key = (score, direction)
        if key not in self._choosers:
            self._choosers[key] = Chooser(self.layers, score, direction, **self.options)
        return self._choosers[key]

    @property
    def size_bounds(self) -> tuple[int, int]:
        """File sizes in bytes with nothing and with everything scored in 16-bit."""
        return int(self.chooser.file_bytes[0]), int(self.chooser.file_bytes[len(self.chooser.cut)])

    @property
    def unit(self) -> tuple[float, str]:
        """What this model's sizes are told in, whatever the choice: bytes in the unit, and its name."""
        return (1e9, "GB") if self.chooser.full_bytes >= 1e9 else (1e6, "MB")

    def amount(self, count: float) -> str:
        """A number of bytes in the model's unit: "205 MB"."""
        size, name = self.unit
        return f"{three_digits(count / size)} {name}"

    def set_score(self, score: str, direction: str | None = None) -> None:
        """Rank the layers by another score or from its other end; as many stay protected as before.

        Without a direction the present one stays, but a score of costs starts at its high end: to protect
        what costs least is never meant.
        """
        kept = "high" if score_row(score).additive else self.direction
        self._use(score, direction or kept, self.choice.layers)

    def set_threshold(self, value: float) -> None:
        """Protect the layers whose score is at `value` or beyond it.

        Raises:
            PlanError: not a finite number, or outside `bounds`; the choice stays as it was.
        """
        low, high = self.bounds
        if not math.isfinite(value) or not low <= value <= high:
            raise PlanError(
                f"threshold {value:g}: expected a number between {low:.4g} and {high:.4g}, the range of "
                f"{self.score}. The threshold stays at {self.threshold:.4g}."
            )
        self._at(value)

    def set_size(self, total_bytes: float) -> None:
        """Protect as many layers, in the score's order, as a file of `total_bytes` has room for.

        Raises:
            PlanError: not a finite number, or no such size is possible; the choice stays as it was.
        """
        low, high = self.size_bounds
        slack = 0.005 * high  # a size as it is displayed, rounded, is still meant
        if not math.isfinite(total_bytes) or not low - slack <= total_bytes <= high + slack:
            raise PlanError(
                f"{self.amount(total_bytes)}: expected a size between {self.amount(low)} (no layer in "
                f"16-bit) and {self.amount(high)} (all). The size stays at "
                f"{self.amount(self.choice.total_bytes)}."
            )
        self._at(self.chooser.threshold_for(total_bytes))

    def _use(self, score: str, direction: str, count: int) -> None:
        """Set the score, with the threshold that protects the most layers up to `count`."""
        self.chooser = self.chooser_of(score, direction)
        self.score, self.direction = score, direction
        self.wide, self.bounds = is_wide(values_of(self.chooser)), bounds_of(self.chooser)
        cut = self.chooser.cut
        items = int(np.searchsorted(self.chooser.layer_count, count, side="right")) - 1
        none = self.bounds[1] if direction == "high" else self.bounds[0]
        self._at(none if items <= 0 or not len(cut) else float(cut[min(items, len(cut)) - 1]))

    def _at(self, threshold: float) -> None:
        self.threshold = float(np.clip(threshold, *self.bounds))
        self.choice = self.chooser.at_threshold(self.threshold)

    def consequences(self, chooser: Chooser, count: int) -> dict[str, Any]:
        """What follows from protecting the first `count` items of a score's order, as it is told in `SAYS`.

        The slider asks for the present choice, the page for every choice. What is unknown is left out.
        """
        choice = chooser.at_count(count)
        facts: dict[str, Any] = {
            "layers": choice.layers,
            "planned": len(self.planned),
            "failed": f", {len(self.held)} of them as their analysis failed" if self.held else "",
            "size": self.amount(choice.total_bytes),
            "saved": self.amount(choice.saved_bytes),
            "bits": f"{choice.matrix_bits:.2f}",
        }
        if count:
            same = chooser.order[: len(chooser.cut)][chooser.cut == chooser.cut[count - 1]]
            if len(same) > 1:
                facts["ties"] = int(chooser.problem.count[same].sum())
        kl = choice.predicted_kl
        if kl is None or self.field is None:
            known = {} if kl is None else {"kl": f"{kl:.3g}"}
            return facts | known | {"unknown": UNKNOWN}
        kl = 0.0 if abs(kl) < 1e-12 * abs(chooser.kl[0]) else kl  # what a running sum leaves of nothing
        s = self.field.standing(choice.total_bytes, kl)
        facts["kl"] = f"{kl:.3g}"
        for name, value in (("low", s.random_low), ("high", s.random_high), ("best", s.optimum)):
            facts[name] = f"{value:.3g}"
        if s.gain < 0:
            facts["worse"] = f"{kl - s.random_median:.3g}"
        elif s.gain > 0:
            facts |= {"better": f"{s.better_than:.0%}", "gain": f"{s.gain:.0%}"}
        return facts

    def say(self, what: str) -> str:
        """A sentence of `SAYS` on the present choice: "line", "comparison" or "ties"; may be empty."""
        return say(what, self.consequences(self.chooser, self.chooser.count_at(self.threshold)))

    def line(self) -> str:
        """The consequences of the choice, as one line."""
        return self.say("line")

    def picture(self) -> bytes:
        """The choice as a PNG: histogram with threshold, frontier, depth × type map."""
        key = (self.score, self.direction)
        if key not in self._pictures:
            if len(self._pictures) >= PICTURES_KEPT:
                del self._pictures[next(iter(self._pictures))]
            self._pictures[key] = Picture(self)
        return self._pictures[key].png(self)

    def spectrum(self, name: str) -> bytes:
        """One planned layer's spectrum and fit as a PNG."""
        file = io.BytesIO()
        single_spectrum(self.layers, self.spectra, name).savefig(file, format="png", dpi=100)
        return file.getvalue()

    def plan(self) -> ProtectionPlan:
        """The present choice as a plan, by plan.py's own rule."""
        plan = make_plan(
            self.layers,
            score=self.score,
            direction=self.direction,
            rule="threshold",
            value=self.threshold,
            model=runs.run_info(self.run)["model"] if self.run else None,
            layers_fingerprint=runs.layers_fingerprint(self.run) if self.run else "",
            origin="slider",
            **self.options,
        )
        rounding = runs.run_rounding(self.run) if self.run else "nearest"
        reason = " ".join(filter(None, (plan.reason, self.failures)))
        return replace(plan, reason=reason, rounding=rounding)

    def save(self) -> Path:
        """Write the present choice as the run's plan.json, and return its path.

        Raises:
            RunError: this state has no run directory, or it can't be written.
        """
        if self.run is None:
            raise RunError(
                "this explorer has no run directory to save to: open it with ExplorerState.open(run_dir)."
            )
        self.plan().write(self.run.plan_json)
        return self.run.plan_json


def values_of(chooser: Chooser) -> NDArray[np.float64]:
    """The score of each planned layer as a threshold sees it, a group's for its layers. (L,), NaN if none."""
    return chooser.problem.raw[chooser.problem.member]


def bounds_of(chooser: Chooser) -> tuple[float, float]:
    """The thresholds allowed: a little beyond the finite scores, so that the ends protect all and none."""
    low, high = chooser.limits
    if is_wide(values_of(chooser)):
        step = (high / low) ** (2 / SLIDER_STEPS)
        return low / step, high * step
    pad = (high - low) * 2 / SLIDER_STEPS or max(abs(high) * 0.05, 1e-9)
    return low - pad, high + pad


# --- the picture: only what a threshold changes is drawn again --------------------------------------------


class Picture:
    """Histogram, frontier and map of a state as one PNG, for any threshold of its present score.

    Axes, labels and the histogram of all layers are drawn once and kept as a bitmap. A new threshold moves
    three artists over it (the protected part of the histogram, the threshold line, the point on the frontier)
    and paints the map's cells into it: matplotlib's resampling would take half of the time.
    """

    @figures.styled
    def __init__(self, state: ExplorerState) -> None:
        lower, self.values = FORMAT_COLOURS[state.lower], values_of(state.chooser)
        self.edges = histogram_edges(self.values)
        counts, _ = np.histogram(self.values[np.isfinite(self.values)], self.edges)
        figure = Figure(figsize=(10, 6), dpi=100, layout="constrained")
        self.canvas = FigureCanvasAgg(figure)
        top, bottom = figure.subfigures(2, 1, squeeze=False)[:, 0]
        self.point = None
        if state.field is None:
            axes = top.subplots()
        else:
            axes, right = top.subplots(1, 2, width_ratios=[1.25, 1])
            size, unit = state.unit
            grid = state.field.file_bytes / size
            low, middle, high = np.quantile(state.field.random, (0.05, 0.5, 0.95), axis=0)
            right.fill_between(grid, low, high, color="#DDDDDD", label="random, 90 %")
            right.plot(grid, middle, color=figures.GREY, lw=1)
            own = state.chooser
            right.plot(own.file_bytes / size, own.kl, color=figures.BLUE, lw=1.8, label="this score")
            right.plot(
                grid, state.field.optimum, color=figures.BLACK, lw=1.4, ls="--", label="least predicted"
            )
            right.set(xlabel=f"model size ({unit})", ylabel="predicted KL (nats a token)")
            right.set_title("What a gigabyte buys", loc="left", fontsize=10)
            self._place_landmarks(right, state)
            right.set_ylim(0, None)
            right.xaxis.set_major_locator(MaxNLocator(nbins=6))
            right.legend(loc="upper right", fontsize=8)
            look = {"ms": 9, "color": figures.VERMILLION, "mec": "white", "mew": 1.5, "zorder": 6}
            (self.point,) = right.plot([], [], "o", animated=True, **look)
        axes.stairs(counts, self.edges, fill=True, color=lower)
        kept = FORMAT_COLOURS["16bit"]
        self.kept = axes.stairs(np.zeros(len(counts)), self.edges, fill=True, color=kept, animated=True)
        self.line = axes.axvline(self.edges[0], color=figures.BLACK, lw=2, animated=True)
        axes.set(xlabel=score_label(state.score), ylabel="layers", ylim=(0, max(counts.max(), 1) * 1.15))
        axes.set_xscale("log" if is_wide(self.values) else "linear")
        lost = len(self.values) - int(counts.sum())
        side = f"score {'≥' if state.direction == 'high' else '≤'} threshold"
        title = f"Kept in 16-bit: {side}{f' ({lost} without a value)' if lost else ''}"
        axes.set_title(title, loc="left", fontsize=10)
        axes.yaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))
        below = bottom.subplots()
        draw_grid(below, state.grid, most_labels=16)
        below.set_title("What is kept in 16-bit, a cell a layer", loc="left", fontsize=10)
        below.plot([], [], "s", ms=8, color=kept, label="16-bit")
        below.plot([], [], "s", ms=8, color=lower, label=FORMAT_LABELS[state.lower])
        if state.grid.hollow.any():
            below.plot([], [], "s", ms=7, mfc="white", mec=kept, mew=2, label="analysis failed")
        below.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=3, borderaxespad=0.1)
        self.canvas.draw()
        self._place_cells(state.grid, below.get_window_extent())
        figure.set_layout_engine("none")  # the layout is settled; what follows must not move it
        self.background = self.canvas.copy_from_bbox(figure.bbox)

    def _place_landmarks(self, axes: Any, state: ExplorerState) -> None:
        """The other files as hollow diamonds, their labels turned to the side that has room."""
        middle = np.mean(state.size_bounds) / state.unit[0]
        for label, count, kl in state.landmarks:
            size = count / state.unit[0]
            axes.plot(size, kl, "D", ms=6, mfc="none", mec=figures.BLACK)
            look: dict[str, Any] = {"xytext": (7 if size < middle else -7, 5), "fontsize": 8}
            look["ha"] = "left" if size < middle else "right"
            axes.annotate(label, (size, kl), textcoords="offset points", **look)

    def _place_cells(self, grid: LayerGrid, box: Any) -> None:
        """Which cell of the map each pixel inside its axes shows, and which pixels stay white."""
        # Inside the left and the lower spine; a bitmap counts its rows from the top.
        top, bottom = round(600 - box.y1), round(600 - box.y0) - 1
        left, right = round(box.x0) + 1, round(box.x1)
        self.box = (slice(top, bottom), slice(left, right))
        rows = np.arange(bottom - top) * grid.shape[0] // (bottom - top)
        columns = np.arange(right - left) * grid.shape[1] // (right - left)
        self.cells = rows[:, None] * grid.shape[1] + columns
        gaps = [
            (np.diff(place, prepend=0) > 0) & (len(place) > 4 * count)  # a line between two cells
            for place, count in zip((rows, columns), grid.shape, strict=True)
        ]
        lines = gaps[0][:, None] | gaps[1]
        inside = binary_erosion(~lines, np.ones((3, 3)), iterations=3)  # of hollow cells a frame is left
        self.white = lines | (inside & grid.hollow.ravel()[self.cells])

    def png(self, state: ExplorerState) -> bytes:
        """The picture of the state's present threshold."""
        chosen = state.choice.mask
        self.kept.set_data(np.histogram(self.values[chosen & np.isfinite(self.values)], self.edges)[0])
        self.line.set_xdata([state.threshold, state.threshold])
        moving: list[Any] = [self.kept, self.line]
        if self.point is not None and state.choice.predicted_kl is not None:
            self.point.set_data([state.choice.total_bytes / state.unit[0]], [state.choice.predicted_kl])
            moving.append(self.point)
        self.canvas.restore_region(self.background)  # type: ignore[attr-defined]
        for artist in moving:
            artist.draw(self.canvas.get_renderer())
        pixels = np.asarray(self.canvas.buffer_rgba())
        colours = state.grid.colours({"16bit": chosen, state.lower: ~chosen}).reshape(-1, 3)[self.cells]
        colours[self.white] = 255
        pixels[self.box][..., :3] = colours
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "png", compress_level=1)
        return file.getvalue()


# --- the sliders in a notebook ----------------------------------------------------------------------------


def explore(run_dir: str | Path | Run, **options: Any) -> ipywidgets.VBox:
    """The explorer of a run, to be the last line of a notebook cell.

    Args:
        run_dir: a run directory, or the `Run`.
        options: `score`, `direction`, `share`, `threshold`, `lower`, `double_quant`, `group`,
            `force_16bit`, `forbid_16bit`, instead of the run's plan's.

    Raises:
        RunError: no analysis there; says which notebook to run.
    """
    return Explorer(ExplorerState.open(run_dir, **options)).box


class Explorer:
    """ipywidgets' core widgets around one state; `box` is what a notebook shows.

    Only widgets and traits that ipywidgets 7.7 and 8.1 share; the pictures are PNGs, so that Kaggle and Colab
    need no widget manager of their own. Nothing is decided here: a handler calls the state and shows what it
    says, and a PlanError becomes the sentence under the controls.
    """

    def __init__(self, state: ExplorerState) -> None:
        import ipywidgets as widgets

        self.state, self._busy = state, False
        self._placed: dict[Any, float] = {}  # where we put each slider: browsers echo it, rounded
        wide = widgets.Layout(flex="1 1 260px", width="auto", min_width="180px")
        number, picture = widgets.Layout(width="120px"), widgets.Layout(width="100%", max_width="1000px")
        titles = [(title, name) for name, title in state.scores.items()]
        self.score = widgets.Dropdown(options=titles, value=state.score, layout=wide)
        self.direction = widgets.ToggleButtons(
            options=[("high end", "high"), ("low end", "low")],
            value=state.direction,
            style={"button_width": "84px"},
            tooltips=["protect the layers where the score is high", "protect the layers where it is low"],
        )
        self.threshold = widgets.FloatSlider(readout=False, layout=wide)
        self.number = widgets.Text(continuous_update=False, layout=number)
        self.size = widgets.FloatSlider(readout=False, layout=wide)
        self.size_number = widgets.Text(continuous_update=False, layout=number)
        self.line, self.message, self.saved = widgets.HTML(), widgets.HTML(), widgets.HTML()
        self.picture = widgets.Image(format="png", layout=picture)
        self.spectrum = widgets.Image(format="png", layout=picture)
        types = list(dict.fromkeys(state.planned["type"]))
        self.type = widgets.Dropdown(options=types, layout=widgets.Layout(width="220px"))
        self.layer = widgets.Dropdown(layout=wide)
        self.save = widgets.Button(description="Save plan", button_style="primary", icon="")

        def row(label: str, *parts: Any) -> Any:
            name = widgets.HTML(f"<span>{label}</span>", layout=widgets.Layout(width="110px"))
            layout = widgets.Layout(flex_flow="row wrap", align_items="center", width="100%")
            return widgets.HBox([name, *parts], layout=layout)

        self.box = widgets.VBox(
            [
                row("Score", self.score, self.direction),
                row("Threshold", self.threshold, self.number),
                row(f"Model size, {state.unit[1]}", self.size, self.size_number),
                self.line,
                self.message,
                row("", self.save, self.saved),
                self.picture,
                row("Layer", self.type, self.layer),
                self.spectrum,
            ],
            layout=widgets.Layout(width="100%", max_width="1000px", overflow="hidden"),
        )
        self.box.add_class("spi-explorer")
        self._fill_layers()
        self._show()
        self.spectrum.value = state.spectrum(self.layer.value)
        unit = state.unit[0]
        for widget, act in (
            (self.score, state.set_score),
            (self.direction, lambda value: state.set_score(state.score, value)),
            (self.threshold, lambda value: state.set_threshold(self._from_slider(value))),
            (self.number, lambda value: state.set_threshold(read_number(value))),
            (self.size, lambda value: state.set_size(value * unit)),
            (self.size_number, lambda value: state.set_size(read_number(value) * unit)),
        ):
            self._on(widget, act)
        self.type.observe(self._fill_layers, names="value")
        self.layer.observe(self._choose_layer, names="value")
        self.save.on_click(self._save)

    def _on(self, widget: Any, act: Callable[[Any], None]) -> None:
        """Run `act` when a person changes `widget`; show the new choice, or why there is none."""

        def changed(change: Any) -> None:
            placed = self._placed.get(widget)
            if self._busy or (placed is not None and abs(change["new"] - placed) < 0.01 * widget.step):
                return
            self._placed.pop(widget, None)
            try:
                act(change["new"])
                self.message.value = ""
            except SPIError as error:
                self.message.value = _status(str(error), wrong=True)
            self._show(moved=widget)

        widget.observe(changed, names="value")

    def _from_slider(self, place: float) -> float:
        return float(np.clip(10**place if self.state.wide else place, *self.state.bounds))

    def _show(self, moved: Any = None) -> None:
        """Bring every widget but the one that a person is moving in line with the state."""
        state, unit = self.state, self.state.unit[0]
        scale = math.log10 if state.wide else float
        size = state.choice.total_bytes / unit
        self._busy = True
        for slider, value, (low, high) in (
            (self.threshold, scale(state.threshold), map(scale, state.bounds)),
            (self.size, size, (bound / unit for bound in state.size_bounds)),
        ):
            if low > slider.max:  # in an order that never makes min exceed max, which ipywidgets refuses
                slider.max, slider.min = high, low
            else:
                slider.min, slider.max = low, high
            slider.step = (high - low) / SLIDER_STEPS or 1e-9
            if slider is not moved:  # to the nearest step: browsers round to steps, and would send that back
                slider.value = slider.min + round((value - slider.min) / slider.step) * slider.step
                self._placed[slider] = slider.value
        self.number.value = f"{state.threshold:.5g}"
        self.size_number.value = f"{size:.{3 if unit == 1e9 else 2}f}"
        self.score.value, self.direction.value = state.score, state.direction
        self._busy = False
        told = (state.say("comparison"), state.say("ties"), " ".join(state.notes))
        said = "<br>".join(html.escape(text) for text in told if text)
        self.line.value = f"<b>{html.escape(state.line())}</b><br>{said}"
        self.picture.value = state.picture()

    def _fill_layers(self, _: Any = None) -> None:
        planned = self.state.planned
        names = planned.loc[planned["type"] == self.type.value, "name"]
        self.layer.options = [(shorten(name, 60), name) for name in names]
        self.layer.index = 0

    def _choose_layer(self, change: Any) -> None:
        if change["new"] is not None:
            self.spectrum.value = self.state.spectrum(change["new"])

    def _save(self, _: Any) -> None:
        try:
            path = self.state.save()
            self.saved.value = _status(f"Saved to {path}. Notebook 03_quantize uses it next.")
        except SPIError as error:
            self.saved.value = _status(str(error), wrong=True)


def _status(text: str, wrong: bool = False) -> str:
    # A mark, not only a colour, and the theme's own text colour: readable in light and dark.
    return f"<span role='status'>{'⚠ ' if wrong else ''}{html.escape(text)}</span>"


def read_number(text: str) -> float:
    """A number as a person types it, decimal comma allowed; PlanError if it is none."""
    try:
        return float(text.strip().replace(",", "."))
    except ValueError:
        raise PlanError(f"{text!r} is no number; type one like 4.5. Nothing has changed.") from None


# --- the page without a kernel ----------------------------------------------------------------------------

SPECTRA_UP_TO = 1000  # layers; beyond, the file would grow past what an e-mail carries
CONSTANT = ("planned", "failed", "unknown")  # facts that no choice changes
ROWS = 1000  # of a score's table; where it has more cuts, they are thinned evenly
# spectra.py's status in words: what is to be thought of Clauset's α.
FITS = {
    "few_values": "rough: few eigenvalues",
    "short_tail": "rough: few values in the tail",
    "poor_fit": "doubtful: no power law",
    "failed": "analysis failed",
    "listed": "not analysed",
}


def write_explorer(run: Run, **options: Any) -> Path:
    """Write the run's explorer.html, an output of the stage "visualize", and return its path.

    Args:
        options: as `ExplorerState.open`, to start from.

    Raises:
        RunError: no analysis in this run; says which notebook to run.
    """
    state = ExplorerState.open(run, **options)
    runs.write_text(run.explorer, explorer_html(state, str(runs.run_info(run)["model"]["id"])))
    runs.add_outputs(run, "visualize", [run.explorer.name])
    return run.explorer


def explorer_html(state: ExplorerState, model: str) -> str:
    """The page for one layer table, starting at the state's choice. `model` is its heading."""
    typed = runs.typed_model(runs.run_info(state.run)["model"]) if state.run else "MODEL"
    pages = Environment(loader=PackageLoader("spi_utils", "."), autoescape=True, undefined=StrictUndefined)
    compact = {"allow_nan": False, "ensure_ascii": False, "separators": (",", ":")}
    pages.policies["json.dumps_kwargs"] = compact
    return pages.get_template("explorer.html").render(
        title=f"{model}: what stays in 16-bit",
        lower=FORMAT_LABELS[state.lower],
        unit=state.unit[1],
        bundle=_scripts(),
        data=page_data(state) | {"model": typed},
    )


@cache
def _scripts() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script, about 0.9 MB."""
    import vl_convert

    return vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;").replace("</script", "<\\/script")


def page_data(state: ExplorerState) -> dict[str, Any]:
    """What explorer.js reads as DATA: layers, and for each score and direction a table of its cuts."""
    facts, table = state.consequences(state.chooser, 0), state.planned
    fixed = np.where(state.chooser.held, "16-bit", state.rest).astype(object)  # what no threshold changes
    fixed[table["name"].isin(state.held)] = "16-bit, analysis failed"
    fixed[~state.chooser.settled] = None
    band = None
    if state.field is not None:
        low, high = np.quantile(state.field.random, (0.05, 0.95), axis=0)
        curves = {"size": state.field.file_bytes / state.unit[0], "low": low, "high": high}
        rows = pd.DataFrame(curves | {"optimum": state.field.optimum})
        band = rows.map(_short).to_dict("records")
    spectra = None
    if len(table) <= SPECTRA_UP_TO:
        spectra = [_spectrum(row, state.spectra.get(row["name"])) for _, row in table.iterrows()]
    places = zip(table["name"], table["type"], table["depth"], fixed, _tips(state), strict=True)
    return {
        "start": {"score": state.score, "direction": state.direction, "threshold": state.threshold},
        "says": SAYS,
        "facts": {name: facts[name] for name in CONSTANT if name in facts},
        "notes": " ".join(state.notes),
        "unit": state.unit,
        "rest": state.rest,
        "colours": {"kept": FORMAT_COLOURS["16bit"], "spectrum": figures.SKY, "fit": figures.VERMILLION},
        "layers": [
            {"name": name, "label": shorten(str(kind), 24), "depth": depth, "fixed": held, "tip": tip}
            for name, kind, depth, held, tip in places
        ],
        "scores": {name: _score(state, name) for name in state.scores},
        "band": band,
        "landmarks": [
            {"label": label, "size": count / state.unit[0], "kl": _short(kl)}
            for label, count, kl in state.landmarks
        ],
        "wishes": {name: value for name, value in _wishes(state).items() if value not in (None, [], False)},
        "spectra": spectra,
    }


def _wishes(state: ExplorerState) -> dict[str, Any]:
    """Notebook 02's parameters that hold at every threshold."""
    backend = "bitsandbytes" if state.lower == "nf4" else "compressed-tensors"
    formats = [state.lower, "16bit"] if state.lower != "nf4" else None
    patterns = {name: list(state.options[name] or []) for name in ("force_16bit", "forbid_16bit")}
    rest = {"double_quant": state.options["double_quant"], "group": state.options["group"]}
    rounding = "nearest" if state.run and runs.run_rounding(state.run) == "nearest" else None
    return {"backend": backend, "formats": formats, "rounding": rounding, **rest, **patterns}


def _score(state: ExplorerState, name: str) -> dict[str, Any]:
    """A score of the page: its values and bins (L,), and for each direction the table of its cuts.

    Row r of a table is a choice: `cut[r - 1]` is its threshold, `bytes` its size, `kl` its predicted KL, and
    `facts` what is said of it. `row[i]` is the first row that keeps layer i; None if no threshold does.
    """
    tables = {}
    for direction in ("high", "low"):
        c = state.chooser_of(name, direction)
        cut = np.nan_to_num(c.cut)  # an infinite score is the first or the last
        ends = np.flatnonzero(np.diff(cut, append=np.nan)) + 1  # equal scores go together
        counts = np.append(0, ends[:: -(len(ends) // ROWS + 1)][::-1])
        said = [state.consequences(c, int(count)) for count in counts]
        told = dict.fromkeys(fact for facts in said for fact in facts if fact not in CONSTANT)
        place = np.full(len(c.problem.count), len(cut) + 1)
        place[c.order[: len(cut)]] = np.arange(1, len(cut) + 1)
        first = np.searchsorted(counts, place[c.problem.member])
        tables[direction] = {
            "cut": cut[counts[1:] - 1].tolist(),
            "bytes": c.file_bytes[counts].tolist(),
            "kl": [_short(kl) for kl in c.kl[counts]],
            "facts": {fact: [facts.get(fact) for facts in said] for fact in told},
            "row": [int(row) if row < len(counts) else None for row in first],
        }
    values = values_of(c)
    held = np.isfinite(values)
    edges = histogram_edges(values)
    bins = np.clip(np.searchsorted(edges, values, side="right") - 1, 0, len(edges) - 2)
    low, high = bounds_of(c)
    return {
        "title": state.scores[name],
        "axis": score_label(name),
        "short": short_label(name),
        "additive": score_row(name).additive,
        "wide": is_wide(values),
        "bounds": [low, high],
        "domain": [min(low, edges[0]), max(high, edges[-1])],
        "edges": [_short(edge) for edge in edges],
        "top": 1.08 * np.bincount(bins[held], minlength=1).max(),  # air above the tallest bar
        "bin": [int(place) if known else None for place, known in zip(bins, held, strict=True)],
        "values": [f"{value:.3g}" if known else None for value, known in zip(values, held, strict=True)],
        **tables,
    }


def _tips(state: ExplorerState) -> list[dict[str, str]]:
    """What a layer's tooltip tells besides its format and score, a record a layer: title -> text."""
    table, low = state.planned, state.lower
    name = low.upper() if low == "nf4" else low
    titles = {"alpha_hill": short_label("alpha_hill")}
    titles |= {f"{kind}_{low}": f"{kind} KL in {name}" for kind in ("predicted", "measured")}
    top, few = payload_bytes(table, "16bit"), payload_bytes(table, low, state.options["double_quant"])
    tips: list[dict[str, str]] = []
    for _, row in table.iterrows():
        told = {title: f"{row[column]:.3g}" for column, title in titles.items() if _known(row, column)}
        fit = [f"{row['alpha_pl']:.3g}"] if _known(row, "alpha_pl") else []
        fit += [FITS[row["status"]]] if row["status"] in FITS else []
        told |= {"α (Clauset)": ", ".join(fit)} if fit else {}
        whole, small = (three_digits(size[len(tips)] / 1e6) for size in (top, few))
        tips.append(told | {"size": f"{whole} MB, in {name} {small} MB"})
    return tips


def _known(row: pd.Series, *columns: str) -> bool:
    return all(np.isfinite(row.get(column, np.nan)) for column in columns)


def _spectrum(row: pd.Series, singular_values: NDArray[np.float64] | None) -> dict[str, Any] | None:
    """One layer's density, fit and title; None where there is no spectrum to draw."""
    eigenvalues = eigenvalues_of(np.empty(0) if singular_values is None else singular_values)
    if len(eigenvalues) < 2 or np.ptp(eigenvalues) == 0:
        return None
    edges, density = density_of(eigenvalues)
    floor = density[density > 0].min() / 3
    told, fit = "no fit", []
    columns = ("alpha_pl", "alpha_pl_xmin", "alpha_pl_ks", "alpha_pl_tail")
    if _known(row, *columns):
        alpha, xmin, distance, tail = row[list(columns)]
        told = f"Clauset's α {alpha:.2f} (xmin {xmin:.4g}, KS distance {distance:.3f}, tail of {tail:.0f})"
        share = tail / len(eigenvalues) * (alpha - 1) / xmin
        ends = {x: max(floor, share * (x / xmin) ** -alpha) for x in (xmin, edges[-1])}
        fit = [{"x": _short(x), "density": _short(y)} for x, y in ends.items()]
    if _known(row, "alpha_hill"):
        told += f", Hill's α {row['alpha_hill']:.3g}"
    return {
        "title": f"Spectrum of {row['name']}: {told}",
        "edges": [_short(edge) for edge in edges],
        "density": [_short(value) for value in density],
        "floor": _short(floor),
        "fit": fit,
    }


def _short(value: float) -> float | None:
    """Five significant digits of what is only drawn; None for what JSON can't hold."""
    return float(f"{value:.5g}") if np.isfinite(value) else None
