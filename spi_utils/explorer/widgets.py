"""The explorer's sliders: ipywidgets' core widgets on an `ExplorerState`.

Only widgets and traits that ipywidgets 7.7 and 8.1 share; the pictures are PNGs in `Image` widgets, so that
no custom widget manager is needed on Kaggle or Colab. Nothing is decided here: a handler calls the state and
shows what it says, and a PlanError becomes the sentence under the controls.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from spi_utils.errors import PlanError, SPIError
from spi_utils.explorer.state import SLIDER_STEPS, ExplorerState
from spi_utils.figures.plotting import shorten

if TYPE_CHECKING:
    from pathlib import Path

    import ipywidgets as widgets

    from spi_utils.runs import Run


def explore(run_dir: str | Path | Run, **options: Any) -> widgets.VBox:
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
    """The widgets around one state; `box` is what a notebook shows."""

    def __init__(self, state: ExplorerState) -> None:
        import ipywidgets as widgets

        self.state = state
        self._busy = False
        self._placed: dict[Any, float] = {}  # where we put each slider: browsers echo it, rounded
        wide = widgets.Layout(flex="1 1 260px", width="auto", min_width="180px")
        number = widgets.Layout(width="120px")
        self.score = widgets.Dropdown(
            options=[(title, name) for name, title in state.scores.items()], value=state.score, layout=wide
        )
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
        picture = widgets.Layout(width="100%", max_width="1000px")
        self.picture = widgets.Image(format="png", layout=picture)
        self.spectrum = widgets.Image(format="png", layout=picture)
        types = list(dict.fromkeys(state.planned["type"]))
        self.type = widgets.Dropdown(options=types, layout=widgets.Layout(width="220px"))
        self.layer = widgets.Dropdown(layout=wide)
        self.save = widgets.Button(description="Save plan", button_style="primary", icon="")
        self.box = self._assemble(widgets)
        self._fill_scale()
        self._fill_layers()
        self._show()
        self._show_spectrum()
        self._connect()

    # --- layout and events -------------------------------------------------------------------------------

    def _assemble(self, widgets: Any) -> widgets.VBox:
        _, unit = self.state.unit

        def row(label: str, *parts: Any) -> Any:
            name = widgets.HTML(f"<span>{label}</span>", layout=widgets.Layout(width="110px"))
            layout = widgets.Layout(flex_flow="row wrap", align_items="center", width="100%")
            return widgets.HBox([name, *parts], layout=layout)

        box = widgets.VBox(
            [
                row("Score", self.score, self.direction),
                row("Threshold", self.threshold, self.number),
                row(f"Model size, {unit}", self.size, self.size_number),
                self.line,
                self.message,
                self.picture,
                row("Layer", self.type, self.layer),
                self.spectrum,
                row("", self.save, self.saved),
            ],
            layout=widgets.Layout(width="100%", max_width="1000px", overflow="hidden"),
        )
        box.add_class("spi-explorer")
        return box

    def _connect(self) -> None:
        state = self.state
        self._on(self.score, self._rescore)
        self._on(self.direction, lambda value: self._rescore(state.score, value))
        self._on(self.threshold, lambda value: state.set_threshold(self._from_slider(value)))
        self._on(self.number, lambda value: state.set_threshold(read_number(value)))
        self._on(self.size, lambda value: state.set_size(value * self._unit))
        self._on(self.size_number, lambda value: state.set_size(read_number(value) * self._unit))
        self.type.observe(lambda change: self._fill_layers(), names="value")
        self.layer.observe(self._choose_layer, names="value")
        self.save.on_click(lambda button: self._save())

    def _on(self, widget: Any, act: Callable[[Any], None]) -> None:
        """Run `act` when a person changes `widget`; show the new choice, or why there is none."""

        def changed(change: Any) -> None:
            if self._busy or self._is_echo(widget, change["new"]):
                return
            self._placed.pop(widget, None)
            try:
                act(change["new"])
                self._say(self.message, "")
            except SPIError as error:
                self._say(self.message, str(error), wrong=True)
            self._show(moved=widget)

        widget.observe(changed, names="value")

    def _rescore(self, score: str, direction: str | None = None) -> None:
        self.state.set_score(score, direction)
        self._fill_scale()

    # --- showing -----------------------------------------------------------------------------------------

    @property
    def _unit(self) -> float:
        return self.state.unit[0]

    def _from_slider(self, place: float) -> float:
        low, high = self.state.bounds
        return min(max(10**place if self.state.wide else place, low), high)

    def _to_slider(self, threshold: float) -> float:
        return math.log10(threshold) if self.state.wide else threshold

    def _fill_scale(self) -> None:
        """Give the sliders the ranges of the present score."""
        low, high = (self._to_slider(bound) for bound in self.state.bounds)
        least, most = (size / self._unit for size in self.state.size_bounds)
        self._busy = True
        _set_range(self.threshold, low, high)
        _set_range(self.size, least, most)
        self._busy = False

    def _show(self, moved: Any = None) -> None:
        """Bring every widget but the one that a person is moving in line with the state."""
        state = self.state
        self._busy = True
        if moved is not self.threshold:
            self._place(self.threshold, self._to_slider(state.threshold))
        if moved is not self.size:
            self._place(self.size, state.choice.total_bytes / self._unit)
        self.number.value = f"{state.threshold:.5g}"
        self.size_number.value = f"{state.choice.total_bytes / self._unit:.{3 if self._unit == 1e9 else 2}f}"
        self.score.value, self.direction.value = state.score, state.direction
        self._busy = False
        told = (state.comparison(), state.ties(), state.notes())
        said = "<br>".join(html.escape(text) for text in told if text)
        self.line.value = f"<b>{html.escape(state.line())}</b><br>{said}"
        self.picture.value = state.picture()

    def _place(self, slider: Any, value: float) -> None:
        """Move a slider to the step nearest to `value`: browsers round to steps, and would send that back."""
        slider.value = slider.min + round((value - slider.min) / slider.step) * slider.step
        self._placed[slider] = slider.value

    def _is_echo(self, widget: Any, value: Any) -> bool:
        return widget in self._placed and abs(value - self._placed[widget]) < 0.01 * widget.step

    def _fill_layers(self) -> None:
        planned = self.state.planned
        names = planned.loc[planned["type"] == self.type.value, "name"]
        self.layer.options = [(shorten(name, 60), name) for name in names]
        self.layer.index = 0

    def _choose_layer(self, change: Any) -> None:
        if change["new"] is None:
            return
        self.state.select(change["new"])
        self._show_spectrum()

    def _show_spectrum(self) -> None:
        self.spectrum.value = self.state.spectrum_picture()

    def _save(self) -> None:
        try:
            path = self.state.save()
        except SPIError as error:
            self._say(self.saved, str(error), wrong=True)
        else:
            self._say(self.saved, f"Saved to {path}. Notebook 03_quantize uses it next.")

    def _say(self, widget: Any, text: str, wrong: bool = False) -> None:
        # A mark, not only a colour, and the theme's own text colour: readable in light and dark.
        mark = "⚠ " if wrong and text else ""
        widget.value = f"<span role='status'>{mark}{html.escape(text)}</span>" if text else ""


def read_number(text: str) -> float:
    """A number as a person types it, decimal comma allowed.

    Raises:
        PlanError: it is none.
    """
    try:
        return float(text.strip().replace(",", "."))
    except ValueError:
        raise PlanError(f"{text!r} is no number; type one like 4.5. Nothing has changed.") from None


def _set_range(slider: Any, low: float, high: float) -> None:
    # In an order that never makes min exceed max, which ipywidgets refuses.
    if low > slider.max:
        slider.max, slider.min = high, low
    else:
        slider.min, slider.max = low, high
    slider.step = (high - low) / SLIDER_STEPS or 1e-9
