"""The alpha explorer: a threshold on a score and all that follows from it, as sliders and as an HTML page.

`ExplorerState` holds a choice and says what follows from it, `Picture` draws it, `Explorer` is its sliders in
a notebook, and `write_explorer` puts what every threshold gives into one file that needs no kernel:

    state = ExplorerState.open("runs/smollm2-135m-instruct")
    state.set_threshold(4.5)
    print(state.say("line"))
    state.save()
"""

from __future__ import annotations

import html
import io
import json
import re
import shlex
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from spi_utils import figures, plan, runs
from spi_utils.curves import Chooser, Field
from spi_utils.errors import PlanError, RunError, SPIError
from spi_utils.figures import FORMAT_COLOURS, FORMAT_LABELS, LayerGrid, histogram_edges, scale_of, shorten
from spi_utils.formats import gigabytes
from spi_utils.plan import Floats, ProtectionPlan, score_row

STEPS = 500  # of a slider
TITLE: dict[str, Any] = {"loc": "left", "fontsize": 10}  # of a panel
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


# --- the state: what is chosen, and what follows -----------------------------------------------------------


class ExplorerState:
    """A layer table, a person's wishes, a score with its direction, and a threshold.

    `chooser`, `threshold` and `choice` are the choice; `thresholds` and `sizes` (bytes) are steps of a
    slider, `STEPS` + 1 from the least to the greatest allowed. `held` names the layers that stay in 16-bit
    because their analysis failed: no score can tell what they cost, so no threshold chooses them, unless a
    pattern speaks of them. `notes` are sentences that hold at every choice.
    """

    def __init__(
        self,
        layers: pd.DataFrame,
        *,
        run: runs.Run | None = None,
        spectra: Mapping[str, Floats] | None = None,
        score: str = "alpha_hill",
        direction: str = "high",
        share: float = 0.52,
        threshold: float | None = None,
        lower: str = "nf4",
        **wishes: Any,
    ) -> None:
        """Start from a table in memory; `open` starts from a run directory.

        Args:
            layers: the layer table.
            run: where `save` writes; None for exploring only.
            spectra: name -> singular values, for the page.
            share: of the layers, how many are protected at first; unless
            threshold: says where to start, in the score's units.
            lower: the format of the layers that are not kept in 16-bit.
            wishes: `double_quant`, `group`, `force_16bit`, `forbid_16bit`, `seed`, as `make_plan`.

        Raises:
            PlanError: unknown score or format, a score that the table doesn't hold, nothing to plan, a bad
                pattern.
        """
        self.layers, self.run, self.spectra, self.lower = layers, run, dict(spectra or {}), lower
        self.rest = f"{int(plan.nominal_bits(lower))}-bit"
        self.planned = layers[layers["quantizable"]].reset_index(drop=True)
        known = plan.available_scores(layers, (lower, "16bit"))
        self.scores = {name: plan.SCORES[name].title for name in known}
        names, failed = self.planned["name"], self.planned["status"] == "failed"
        # A plan that an explorer saved names its failed layers; they are found anew in each table.
        own = {name: f"^{re.escape(name)}$" for name in names[failed]}
        told = {"group": [wishes["group"]] if wishes.get("group") else []}
        for key in ("force_16bit", "forbid_16bit"):
            given = wishes.get(key) or ()
            given = [given] if isinstance(given, str) else given
            told[key] = [one for one in given if one not in own.values()]
            failed &= ~plan.matches(list(names), told[key], key)
        self.held, self.notes = list(names[failed]), [""]
        self.options: dict[str, Any] = {"formats": (lower, "16bit"), **wishes}
        self.options["force_16bit"] = told["force_16bit"] + [own[name] for name in self.held] or None
        self.options["forbid_16bit"] = told["forbid_16bit"] or None
        if self.held:
            words = "layer(s) stay in 16-bit because the analysis failed there"
            self.notes[0] = f"{len(self.held)} {words} ({shorten(', '.join(self.held), 160)})."
        if asked := ", ".join(f"{key} {', '.join(given)}" for key, given in told.items() if given):
            self.notes.append(f"Held at every threshold, and saved with the plan: {asked}.")
        # What random selections and the optimum reach at each size; None without sensitivity.
        self.field = Field.of(layers, **self.options)
        self.grid = LayerGrid(layers)
        # (score, direction) -> the layers sorted by it, with the consequences of every cut.
        self.chooser_of = cache(partial(Chooser, layers, **self.options))
        self._use(score, direction, round(share * len(names)))
        if threshold is not None:
            self._at(threshold)

    @classmethod
    def open(cls, run_dir: str | Path | runs.Run, **options: Any) -> ExplorerState:
        """Start from a run directory, at the plan it holds if there is one.

        Raises:
            RunError, PlanError: no analysis there, or damaged files; says which notebook to run.
        """
        run = run_dir if isinstance(run_dir, runs.Run) else runs.existing_run(run_dir)
        layers, spectra = runs.read_layers(run), runs.read_spectra(run)
        if not run.plan_json.exists():
            return cls(layers, run=run, spectra=spectra, **options)
        kept = ProtectionPlan.read(run.plan_json, model=runs.run_info(run)["model"])
        lower, *dropped = sorted({*kept.formats.values()} - {"16bit"}, key=plan.nominal_bits) or ["nf4"]
        start = {"lower": lower, "double_quant": kept.double_quant, **kept.options}
        start |= {"score": kept.score, "direction": kept.direction}
        start["share"] = kept.count("16bit") / len(kept.formats)
        if kept.rule == "threshold" and not {"score", "direction", "share"} & set(options):
            start["threshold"] = kept.value
        state = cls(layers, run=run, spectra=spectra, **start | options)
        if dropped:
            here = f"here layers are {state.lower} or 16-bit"
            state.notes.append(f"Not kept from the run's plan: {', '.join(dropped)}; {here}.")
        return state

    def amount(self, count: float) -> str:
        """Bytes with three digits in the model's unit, whatever the choice: "64.0 MB"."""
        return f"{count / self.unit[0]:#.3g}".rstrip(".") + f" {self.unit[1]}"

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
            PlanError: no number, or beyond `thresholds`; the choice stays as it was.
        """
        self._check(value, self.thresholds, self.threshold, "threshold {:.4g}".format)
        self._at(value)

    def set_size(self, total_bytes: float) -> None:
        """Protect as many layers, in the score's order, as a file of `total_bytes` has room for.

        Raises:
            PlanError: no number, or no such size is possible; the choice stays as it was.
        """
        self._check(total_bytes, self.sizes, self.choice.total_bytes, self.amount)
        self._at(self.chooser.threshold_for(total_bytes))

    def _check(self, value: float, steps: Floats, now: float, written: Callable[[float], str]) -> None:
        low, high = steps[[0, -1]]
        slack = 0.005 * abs(high)  # a value as it is displayed, rounded, is still meant
        if not low - slack <= value <= high + slack:
            here = f"expected {written(low)} to {written(high)}. The choice stays at {written(now)}"
            raise PlanError(f"{written(value)} is out of range: {here}.")

    def _use(self, score: str, direction: str, count: int) -> None:
        """Set the score, with the threshold that protects the most layers up to `count`."""
        self.chooser = self.chooser_of(score, direction)
        self.score, self.direction = score, direction
        self._picture: Picture | None = None  # drawn when asked for
        self.unit = figures.size_unit(self.chooser.full_bytes)
        self.thresholds, cut = thresholds_of(self.chooser), self.chooser.cut
        self.sizes = np.linspace(self.chooser.file_bytes[0], self.chooser.file_bytes[len(cut)], STEPS + 1)
        items = int(np.searchsorted(self.chooser.layer_count, count, side="right")) - 1
        none = self.thresholds[-1 if direction == "high" else 0]
        self._at(none if items <= 0 or not len(cut) else cut[min(items, len(cut)) - 1])

    def _at(self, threshold: float) -> None:
        self.threshold = float(np.clip(threshold, *self.thresholds[[0, -1]]))
        self.choice = self.chooser.at_threshold(self.threshold)

    def consequences(self, chooser: Chooser, count: int) -> dict[str, Any]:
        """What follows from protecting the first `count` items of a score's order, as it is told in `SAYS`.

        The slider asks for the present choice, the page for every choice. What is unknown is left out.
        """
        choice = chooser.at_count(count)
        size, saved = self.amount(choice.total_bytes), self.amount(choice.saved_bytes)
        facts: dict[str, Any] = {"layers": choice.layers, "planned": len(self.planned), "size": size}
        facts |= {"saved": saved, "bits": f"{choice.matrix_bits:.2f}"}
        facts["failed"] = f", {len(self.held)} of them as their analysis failed" if self.held else ""
        same = chooser.order[: len(chooser.cut)][chooser.cut == chooser.cut[count - 1]] if count else []
        if len(same) > 1:
            facts["ties"] = int(chooser.problem.count[same].sum())
        if (kl := choice.predicted_kl) is None or self.field is None:
            return facts | {"unknown": "No sensitivity in this run: the cost of a choice is not predicted."}
        kl = 0.0 if abs(kl) < 1e-12 * abs(chooser.kl[0]) else kl  # what a running sum leaves of nothing
        s = self.field.standing(choice.total_bytes, kl)
        told = {"kl": kl, "low": s.random_low, "high": s.random_high, "best": s.optimum}
        told |= {"worse": kl - s.random_median} if s.gain < 0 else {}
        facts |= {name: f"{value:.3g}" for name, value in told.items()}
        return facts | ({"better": f"{s.better_than:.0%}", "gain": f"{s.gain:.0%}"} if s.gain > 0 else {})

    def say(self, what: str) -> str:
        """A sentence of `SAYS` on the present choice: "line", "comparison" or "ties"; may be empty."""
        return say(what, self.consequences(self.chooser, self.chooser.count_at(self.threshold)))

    def picture(self) -> bytes:
        """The choice as a PNG: histogram with threshold, frontier, depth × type map."""
        self._picture = self._picture or Picture(self)
        return self._picture.png(self)

    def plan(self) -> ProtectionPlan:
        """The present choice as a plan, by plan.py's own rule."""
        rule = {"rule": "threshold", "value": self.threshold, "origin": "slider", **self.options}
        made = plan.make_plan(self.layers, score=self.score, direction=self.direction, **rule)
        made = replace(made, reason=f"{made.reason} {self.notes[0]}".strip())
        if self.run is None:
            return made
        known = {"model": runs.run_info(self.run)["model"], "rounding": runs.run_rounding(self.run)}
        return replace(made, layers_fingerprint=runs.layers_fingerprint(self.run), **known)

    def save(self) -> Path:
        """Write the present choice as the run's plan.json, and return its path.

        Raises:
            RunError: this state has no run directory, or it can't be written.
        """
        if self.run is None:
            raise RunError("no run directory to save to: open the explorer with ExplorerState.open(run_dir).")
        self.plan().write(self.run.plan_json)
        return self.run.plan_json


def values_of(chooser: Chooser) -> Floats:
    """The score of each planned layer as a threshold sees it, a group's for its layers. (L,), NaN if none."""
    return chooser.problem.raw[chooser.problem.member]


def thresholds_of(chooser: Chooser) -> Floats:
    """A slider's steps (STEPS + 1,), a little beyond the finite scores: its ends protect all and none."""
    low, high = chooser.limits
    if scale_of(values_of(chooser)) == "log":
        step = (high / low) ** (2 / STEPS)
        return np.geomspace(low / step, high * step, STEPS + 1)
    pad = (high - low) * 2 / STEPS or max(abs(high) * 0.05, 1e-9)
    return np.linspace(low - pad, high + pad, STEPS + 1)


# --- the picture: only what a threshold changes is drawn again --------------------------------------------


class Picture:
    """Histogram, frontier and map of a state as one PNG, for any threshold of its present score.

    Axes, labels and the histogram of all layers are drawn once and kept as a bitmap; over it a new threshold
    draws the protected part of the histogram, its own line, the point on the frontier and the map's cells.
    """

    @figures.styled
    def __init__(self, state: ExplorerState) -> None:
        self.colours = np.array([to_rgb(FORMAT_COLOURS[fmt]) for fmt in (state.lower, "16bit")])
        low, kept = self.colours
        self.values = values_of(state.chooser)
        self.edges = histogram_edges(self.values)
        counts, _ = np.histogram(self.values, self.edges)
        figure = Figure(figsize=(10, 6), dpi=100, layout="constrained")
        self.canvas = FigureCanvasAgg(figure)
        top, bottom = figure.subfigures(2, 1, squeeze=False)[:, 0]
        left, *right = top.subplots(1, 1 if state.field is None else 2, squeeze=False)[0]
        left.stairs(counts, self.edges, fill=True, color=low)
        self.kept = left.stairs(np.zeros(len(counts)), self.edges, fill=True, color=kept)
        self.line = left.axvline(self.edges[0], color=figures.BLACK, lw=2)
        lost = np.isnan(self.values).sum()
        side = f"score {'≥' if state.direction == 'high' else '≤'} threshold"
        left.set_title(f"Kept in 16-bit: {side}{f' ({lost} without a value)' if lost else ''}", **TITLE)
        left.set(xlabel=figures.score_label(state.score), ylabel="layers", xscale=scale_of(self.values))
        left.set_ylim(0, max(counts.max(), 1) * 1.15)
        left.yaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))
        look = {"ms": 9, "color": kept, "mec": "white", "mew": 1.5, "zorder": 6}
        (self.point,) = (right or [left])[0].plot([], [], "o", **look)
        for axes in right:
            _draw_frontier(axes, state)
        below = bottom.subplots()
        self.map = state.grid.draw(below, self.colours[np.zeros(len(self.values), int)])
        below.set_title("What is kept in 16-bit, a cell a layer", **TITLE)
        below.plot([], [], "s", ms=8, color=kept, label="16-bit")
        below.plot([], [], "s", ms=8, color=low, label=FORMAT_LABELS[state.lower])
        below.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=3, borderaxespad=0.1)
        self.moving = [self.kept, self.line, self.point, self.map]
        for artist in self.moving:
            artist.set_animated(True)
        self.canvas.draw()
        figure.set_layout_engine("none")  # the layout is settled; what follows must not move it
        self.background = self.canvas.copy_from_bbox(figure.bbox)

    def png(self, state: ExplorerState) -> bytes:
        """The picture of the state's present threshold."""
        chosen, choice = state.choice.mask, state.choice
        self.kept.set_data(np.histogram(self.values[chosen], self.edges)[0])
        self.line.set_xdata([state.threshold, state.threshold])
        if choice.predicted_kl is not None:
            self.point.set_data([choice.total_bytes / state.unit[0]], [choice.predicted_kl])
        self.map.set_array(state.grid.colours(self.colours[chosen.astype(int)]))
        self.canvas.restore_region(self.background)
        for artist in self.moving:
            artist.draw(self.canvas.get_renderer())
        file = io.BytesIO()
        Image.fromarray(np.asarray(self.canvas.buffer_rgba())).save(file, "png", compress_level=1)
        return file.getvalue()


def _draw_frontier(axes: Any, state: ExplorerState) -> None:
    """Predicted KL by size: random's band, this score, and the optimum."""
    assert state.field is not None
    own, (unit, name) = state.chooser, state.unit
    grid = state.field.file_bytes / unit
    low, middle, high = np.quantile(state.field.random, (0.05, 0.5, 0.95), axis=0)
    axes.fill_between(grid, low, high, color="#DDDDDD", label="random, 90 %")
    axes.plot(grid, middle, color=figures.GREY, lw=1)
    axes.plot(own.file_bytes / unit, own.kl, color=figures.BLUE, lw=1.8, label="this score")
    axes.plot(grid, state.field.optimum, color=figures.BLACK, lw=1.4, ls="--", label="least predicted")
    axes.set(xlabel=f"model size ({name})", ylabel="predicted KL (nats a token)", ylim=(0, None))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6))
    axes.legend(loc="upper right", fontsize=8)
    axes.set_title("What a gigabyte buys", **TITLE)


# --- the sliders in a notebook ----------------------------------------------------------------------------


def explore(run_dir: str | Path | runs.Run, **options: Any) -> Any:
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

        self.state, self._busy, unit = state, False, state.unit[0]
        wide = widgets.Layout(flex="1 1 260px", width="auto", min_width="180px")
        picture = widgets.Layout(width="100%", max_width="1000px", overflow="hidden")
        titles = [(title, name) for name, title in state.scores.items()]
        self.score = widgets.Dropdown(options=titles, value=state.score, layout=wide)
        ends, narrow = [("high end", "high"), ("low end", "low")], {"button_width": "84px"}
        self.direction = widgets.ToggleButtons(options=ends, value=state.direction, style=narrow)
        # Sliders count steps: a number that the browser rounded and sent back would move the choice.
        slider = {"max": STEPS, "readout": False, "layout": wide}
        self.threshold, self.size = widgets.IntSlider(**slider), widgets.IntSlider(**slider)
        typed = {"continuous_update": False, "layout": widgets.Layout(width="120px")}
        self.number, self.size_number = widgets.Text(**typed), widgets.Text(**typed)
        self.line, self.message, self.saved = (widgets.HTML() for _ in range(3))
        self.picture = widgets.Image(format="png", layout=picture)
        self.save = widgets.Button(description="Save plan", button_style="primary", icon="")

        def row(label: str, *parts: Any) -> Any:
            name = widgets.HTML(f"<span>{label}</span>", layout=widgets.Layout(width="110px"))
            layout = widgets.Layout(flex_flow="row wrap", align_items="center", width="100%")
            return widgets.HBox([name, *parts], layout=layout)

        rows = [
            row("Score", self.score, self.direction),
            row("Threshold", self.threshold, self.number),
            row(f"Model size, {state.unit[1]}", self.size, self.size_number),
            *(self.line, self.message, row("", self.save, self.saved), self.picture),
        ]
        self.box = widgets.VBox(rows, layout=picture)
        self.box.add_class("spi-explorer")
        self._on(self.score, state.set_score)
        self._on(self.direction, lambda value: state.set_score(state.score, value))
        self._on(self.threshold, lambda step: state.set_threshold(state.thresholds[step]))
        self._on(self.number, lambda text: state.set_threshold(read_number(text)))
        self._on(self.size, lambda step: state.set_size(state.sizes[step]))
        self._on(self.size_number, lambda text: state.set_size(read_number(text) * unit))
        self.save.on_click(self._save)
        self._show()

    def _on(self, widget: Any, act: Callable[[Any], None]) -> None:
        """Run `act` when a person changes `widget`; show the new choice, or why there is none."""

        def changed(change: Any) -> None:
            if not self._busy:
                self.message.value = _told(lambda: act(change["new"]))
                self._show(moved=widget)

        widget.observe(changed, names="value")

    def _show(self, moved: Any = None) -> None:
        """Bring every widget but the slider that a person is moving in line with the state."""
        state, unit, self._busy = self.state, self.state.unit[0], True
        size = state.choice.total_bytes
        if moved is not self.threshold:
            self.threshold.value = int(np.abs(state.thresholds - state.threshold).argmin())
        if moved is not self.size:
            self.size.value = int(np.abs(state.sizes - size).argmin())
        self.number.value = f"{state.threshold:.5g}"
        self.size_number.value = f"{size / unit:.{3 if unit == 1e9 else 2}f}"
        self.score.value, self.direction.value = state.score, state.direction
        self._busy = False
        told = (state.say("comparison"), state.say("ties"), " ".join(state.notes))
        said = "<br>".join(html.escape(text) for text in told if text)
        self.line.value = f"<b>{html.escape(state.say('line'))}</b><br>{said}"
        self.picture.value = state.picture()

    def _save(self, _: Any) -> None:
        self.saved.value = _told(lambda: f"Saved to {self.state.save()}. Notebook 03_quantize uses it next.")


def _told(act: Callable[[], Any]) -> str:
    """What is shown of an act: its own words if it has any, or why it was refused."""
    try:
        said = act() or ""
    except SPIError as error:  # a mark, not a colour, in the theme's own ink: readable in light and dark
        said = f"⚠ {error}"
    return f"<span role='status'>{html.escape(said)}</span>" if said else ""


def read_number(text: str) -> float:
    """A number as a person types it, decimal comma allowed; PlanError if it is none."""
    try:
        return float(text.strip().replace(",", "."))
    except ValueError:
        raise PlanError(f"{text!r} is no number; type one like 4.5. Nothing has changed.") from None


# --- the page without a kernel ----------------------------------------------------------------------------

SPECTRA_UP_TO = 1000  # layers; beyond, the file would grow past what an e-mail carries
CONSTANT = ("planned", "failed", "unknown")  # facts that no choice changes


def write_explorer(run: runs.Run, **options: Any) -> Path:
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
    pages = Environment(loader=PackageLoader("spi_utils", "."), autoescape=True, undefined=StrictUndefined)
    compact = {"allow_nan": False, "ensure_ascii": False, "separators": (",", ":")}
    pages.policies["json.dumps_kwargs"] = compact
    words: dict[str, Any] = {"title": f"{model}: what stays in 16-bit", "lower": FORMAT_LABELS[state.lower]}
    words |= {"steps": STEPS, "unit": state.unit[1], "bundle": _scripts()}
    return pages.get_template("explorer.html").render(**words, data=page_data(state))


@cache
def _scripts() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script, about 0.9 MB."""
    import vl_convert

    return vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;").replace("</script", "<\\/script")


def page_data(state: ExplorerState) -> dict[str, Any]:
    """What explorer.js reads as DATA: layers, and for each score and direction a table of its cuts."""
    table, unit, band = state.planned, state.unit[0], None
    facts = state.consequences(state.chooser, 0)
    p = state.chooser.problem
    upper = (p.start == p.tiers[1])[p.member]
    fixed = np.where(upper, "16-bit", state.rest).astype(object)  # of layers that no threshold changes
    fixed[table["name"].isin(state.held)] = "16-bit, analysis failed"
    fixed[p.free[p.member]] = None
    if state.field is not None:
        low, high = np.quantile(state.field.random, (0.05, 0.95), axis=0)
        curves = {"size": state.field.file_bytes / unit, "low": low, "high": high}
        band = pd.DataFrame(curves | {"optimum": state.field.optimum}).map(_short).to_dict("records")
    held = {"name": table["name"], "depth": table["depth"], "fixed": fixed, "tip": _tips(state)}
    layers = pd.DataFrame(held, dtype=object)
    layers["label"] = [shorten(str(kind), 24) for kind in table["type"]]
    spectra = (_spectrum(state, row) for _, row in table.iterrows())
    return {
        "start": {"score": state.score, "direction": state.direction, "threshold": state.threshold},
        **{"says": SAYS, "make": _parameters(state), "band": band, "layers": layers.to_dict("records")},
        "facts": {name: facts[name] for name in CONSTANT if name in facts},
        **{"notes": " ".join(state.notes).strip(), "unit": state.unit, "rest": state.rest},
        "colours": {"kept": FORMAT_COLOURS["16bit"], "spectrum": figures.SKY, "fit": figures.VERMILLION},
        "scores": {name: _score(state, name) for name in state.scores},
        "spectra": list(spectra) if len(table) <= SPECTRA_UP_TO else None,
    }


def _parameters(state: ExplorerState) -> str:
    """A choice as notebook 02's parameters and as a command, {score}, {direction} and {value} left open."""
    more: dict[str, Any] = {"backend": "bitsandbytes"}
    if state.lower != "nf4":
        more = {"backend": "compressed-tensors", "formats": [state.lower, "16bit"]}
    if state.run and runs.run_rounding(state.run) == "nearest":
        more["rounding"] = "nearest"
    wishes = ("double_quant", "group", "force_16bit", "forbid_16bit")
    more |= {name: state.options[name] for name in wishes if state.options.get(name)}
    model = runs.typed_model(runs.run_info(state.run)["model"]) if state.run else "MODEL"
    cell = 'score = "{score}"\ndirection = "{direction}"\nrule = "threshold"\nvalue = {value}'
    line = f"spi-utils run -p model {shlex.quote(model)}"
    line += " -p score {score} -p direction {direction} -p rule threshold -p value {value}"
    for name, value in more.items():
        cell += f"\n{name} = {value!r}"
        line += f" -p {name} {shlex.quote(value if isinstance(value, str) else json.dumps(value))}"
    return f"{cell}\n\n{line}"


def _score(state: ExplorerState, name: str) -> dict[str, Any]:
    """A score of the page: its values and bins (L,), and for each direction the table of its cuts.

    Row r of a table is a choice: `cut[r - 1]` is its threshold, `bytes` its size, `kl` its predicted KL, and
    `facts` what is said of it. `row[i]` is the first row that keeps layer i, beyond the table if none does.
    """
    tables = {}
    for direction in ("high", "low"):
        c = state.chooser_of(name, direction)
        cut = np.nan_to_num(c.cut)  # an infinite score is the first or the last
        ends = np.flatnonzero(np.diff(cut, append=np.nan)) + 1  # equal scores go together
        counts = np.append(0, ends)
        told = pd.DataFrame([state.consequences(c, int(count)) for count in counts], dtype=object)
        told = told.where(told.notna(), None).drop(columns=list(CONSTANT), errors="ignore")
        place = np.full(len(c.problem.count), len(cut) + 1)
        place[c.order[: len(cut)]] = np.arange(1, len(cut) + 1)
        first = np.searchsorted(counts, place[c.problem.member])
        tables[direction] = {
            "cut": cut[counts[1:] - 1].tolist(),
            "bytes": c.file_bytes[counts].tolist(),
            "kl": [_short(kl) for kl in c.kl[counts]],
            "facts": told.to_dict("list"),
            "row": first.tolist(),
        }
    values, steps = values_of(c), thresholds_of(c)
    edges, held = histogram_edges(values), np.isfinite(values)
    bins = np.clip(np.searchsorted(edges, values, side="right") - 1, 0, len(edges) - 2)
    row, names = score_row(name), {"axis": figures.score_label(name), "short": figures.short_label(name)}
    return {
        **{"title": row.title, "additive": row.additive, "scale": scale_of(values)},
        "steps": [_short(step) for step in steps],
        "domain": [min(steps[0], edges[0]), max(steps[-1], edges[-1])],
        "edges": [_short(edge) for edge in edges],
        "top": 1.08 * np.bincount(bins[held], minlength=1).max(),  # air above the tallest bar
        "bin": np.where(held, bins, -1).tolist(),
        "values": [f"{value:.3g}" if known else None for value, known in zip(values, held, strict=True)],
        **names,
        **tables,
    }


def _tips(state: ExplorerState) -> list[dict[str, str]]:
    """What a layer's tooltip tells besides its format and score, a record a layer: title -> text."""
    table, low = state.planned, state.lower
    titles = {"alpha_hill": figures.short_label("alpha_hill"), "alpha_pl": "α (Clauset)"}
    titles |= {f"{kind}_{low}": f"{kind} KL in {low}" for kind in ("predicted", "measured")}
    sizes = plan.payload_bytes(table, low, bool(state.options.get("double_quant")))
    tips = []
    for (_, row), size in zip(table.iterrows(), sizes, strict=True):
        told = {title: f"{row[column]:.3g}" for column, title in titles.items() if pd.notna(row.get(column))}
        told |= {"Clauset's fit": row["status"].replace("_", " ")}
        tips.append(told | {"size": f"{gigabytes(2 * row['numel'])}, in {low} {gigabytes(size)}"})
    return tips


def _spectrum(state: ExplorerState, row: pd.Series) -> dict[str, Any] | None:
    """One layer's density, fit and title; None where there is no spectrum to draw."""
    found = figures.density_of(row, state.spectra.get(row["name"], np.empty(0)))
    if "density" not in found:
        return None
    floor = found["density"][found["density"] > 0].min() / 3
    fit = zip(*found["fit"], strict=True) if found["fit"] else ()
    return {
        "title": f"Spectrum of {row['name']}: {', '.join(found['words'])}",
        "edges": [_short(edge) for edge in found["edges"]],
        "density": [_short(value) for value in found["density"]],
        "floor": _short(floor),
        "fit": [{"x": _short(x), "density": _short(max(floor, y))} for x, y in fit],
    }


def _short(value: float) -> float | None:
    """Five significant digits of what is only drawn; None for what JSON can't hold."""
    return float(f"{value:.5g}") if np.isfinite(value) else None
