"""The alpha explorer without its widgets: one plain object that holds a choice and knows its consequences.

`widgets.explore` puts sliders on it; tests and scripts drive it directly:

    state = ExplorerState.open("runs/smollm2-135m-instruct")
    state.set_threshold(4.5)
    print(state.line())
    state.save()
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from spi_utils.errors import PlanError, RunError
from spi_utils.explorer.picture import ChoicePicture, Curves, png_of
from spi_utils.explorer.wishes import Wishes, held_plan, start_of
from spi_utils.figures.plan_figures import LayerGrid
from spi_utils.figures.score_figures import is_wide, planned_layers
from spi_utils.figures.spectrum_figures import single_spectrum
from spi_utils.plan import ProtectionPlan, make_plan
from spi_utils.planning.chooser import Chooser
from spi_utils.planning.frontier import Field, Standing
from spi_utils.planning.pricing import nominal_bits
from spi_utils.planning.scores import SCORES, available_scores, score_row
from spi_utils.runs import Run, existing_run, layers_fingerprint, read_layers, read_spectra, run_info

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray

SLIDER_STEPS = 500
TIES = "{} layers share the score's value at the cut, and go together."
PICTURES_KEPT = 8  # bitmaps of recently used scores, 2.4 MB each


class ExplorerState:
    """A layer table, a score with its direction, and a threshold; everything shown follows from these.

    `chooser`, `choice` and `threshold` are the present choice; `layer` is whose spectrum is shown.
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
        **wishes: Any,
    ) -> None:
        """Start from a table in memory; `open` starts from a run directory.

        Args:
            layers: the layer table.
            run: where `save` writes; None for exploring only.
            spectra: name -> singular values, for `spectrum_picture`.
            share: of the layers, how many are protected at first; unless
            threshold: says where to start, in the score's units.
            lower: the format of the layers that are not kept in 16-bit.
            double_quant: NF4 with double quantization.
            wishes: group, force_16bit, forbid_16bit, seed, as `make_plan`. Failed layers that no pattern
                speaks of stay in 16-bit.

        Raises:
            PlanError, AnalysisError: unknown score or format, a score that the table doesn't hold,
                nothing to plan, a bad pattern.
        """
        self.layers, self.run, self.spectra = layers, run, dict(spectra or {})
        self.planned = planned_layers(layers)
        self.formats = (lower, "16bit")
        self.double_quant = double_quant
        self.wishes = Wishes.of(layers, **wishes)
        self.grid = LayerGrid(layers)
        self._choosers: dict[tuple[str, str], Chooser] = {}
        self._pictures: dict[tuple[str, str], ChoicePicture] = {}
        self.layer = str(self.planned["name"].iloc[0])
        self.threshold = 0.0  # until the score is set, next line
        self._use(score, direction, round(share * len(self.planned)))
        if threshold is not None:
            self.set_threshold(threshold)

    @classmethod
    def open(cls, run_dir: str | Path | Run, **options: Any) -> ExplorerState:
        """Start from a run directory, at the plan it holds if there is one.

        Raises:
            RunError: no analysis there, or a damaged one; says which notebook to run.
        """
        run = run_dir if isinstance(run_dir, Run) else existing_run(run_dir)
        layers = read_layers(run)
        held = held_plan(run)
        if held is not None:
            options = {**start_of(held, options, layers), **options}
        spectra = read_spectra(run)
        if lost := sorted(spectra.keys() - set(layers["name"])):
            raise RunError(
                f"{run.layers_csv}: no row for {', '.join(lost[:3])}, yet {run.spectra.name} holds its "
                "spectrum: rows were lost. Run notebook 01_analyze again with force=True."
            )
        return cls(layers, run=run, spectra=spectra, **options)

    # --- what can be chosen ------------------------------------------------------------------------------

    @property
    def lower(self) -> str:
        """The format of the layers that are not kept in 16-bit."""
        return self.formats[0]

    @property
    def rest(self) -> str:
        """That format by its width, as a map names it: "4-bit"."""
        return f"{int(nominal_bits(self.lower))}-bit"

    @property
    def scores(self) -> dict[str, str]:
        """Scores that this table holds: name -> title."""
        return {name: SCORES[name].title for name in available_scores(self.layers, self.formats)}

    @property
    def bounds(self) -> tuple[float, float]:
        """The thresholds allowed: a little beyond the finite scores, so the ends protect all and none."""
        low, high = self.chooser.limits
        if self.wide:
            step = (high / low) ** (2 / SLIDER_STEPS)
            return low / step, high * step
        pad = (high - low) * 2 / SLIDER_STEPS or max(abs(high) * 0.05, 1e-9)
        return low - pad, high + pad

    @property
    def wide(self) -> bool:
        """Whether the score spans decades, so that its slider is logarithmic."""
        return is_wide(self.chooser.cut)

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

    # --- choosing ----------------------------------------------------------------------------------------

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
        self.threshold = float(value)
        self.choice = self.chooser.at_threshold(self.threshold)

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

    def select(self, name: str) -> None:
        """Choose the layer whose spectrum is shown.

        Raises:
            PlanError: no planned layer has this name.
        """
        if name not in set(self.planned["name"]):
            raise PlanError(f"{name!r} is none of the {len(self.planned)} planned layers of this model.")
        self.layer = name

    # --- what follows ------------------------------------------------------------------------------------

    @cached_property
    def field(self) -> Field | None:
        """What random selections and the optimum reach at each size; None without sensitivity."""
        return Field.of(self.layers, **self._options)

    @property
    def standing(self) -> Standing | None:
        """Where the choice stands at its size; None without sensitivity."""
        if self.field is None or self.choice.predicted_kl is None:
            return None
        return self.field.standing(self.choice.total_bytes, self.choice.predicted_kl)

    def line(self) -> str:
        """The consequences of the choice, as one line."""
        c = self.choice
        return (
            f"{c.layers} of {len(self.planned)} layers in 16-bit{self.wishes.count()} · "
            f"{self.amount(c.total_bytes)} in all, {self.amount(c.saved_bytes)} saved · "
            f"{c.bits_per_weight:.2f} bits a weight"
            + ("" if c.predicted_kl is None else f" · predicted KL {c.predicted_kl:.3g} nats a token")
        )

    def comparison(self) -> str:
        """Where the choice stands against random and the best choice of the same size, as one line."""
        s = self.standing
        if s is None:
            return "No sensitivity in this run: the cost of a choice is not predicted."
        return (
            f"Predicted at this size: random choices {s.random_low:.3g}–{s.random_high:.3g} nats a token, "
            f"the least predicted KL {s.optimum:.3g}.{_worth(s)}"
        )

    def ties(self) -> str:
        """How many layers share the value at the cut, so that no threshold parts them; empty if none does."""
        cut, kept = self.chooser.cut, self.chooser.count_at(self.threshold)
        same = cut == cut[kept - 1] if kept else np.zeros(0, bool)
        if same.sum() < 2:
            return ""
        items = self.chooser.order[: len(cut)][same]
        return TIES.format(int(self.chooser.problem.count[items].sum()))

    def notes(self) -> str:
        """What holds at every threshold: failed layers and the wishes of the run's plan. May be empty."""
        return self.wishes.sentences()

    def picture(self) -> bytes:
        """The choice as a PNG: histogram with threshold, frontier, depth × type map."""
        key = (self.score, self.direction)
        if key not in self._pictures:
            if len(self._pictures) >= PICTURES_KEPT:
                del self._pictures[next(iter(self._pictures))]
            values = self.chooser.problem.raw[self.chooser.problem.member]
            self._pictures[key] = ChoicePicture(self.grid, values, *key, self._curves(), self.lower)
        kl = self.choice.predicted_kl
        point = None if kl is None else (float(self.choice.total_bytes), kl)
        return self._pictures[key].png(self.threshold, self.choice.mask, point)

    def spectrum_picture(self) -> bytes:
        """The chosen layer's spectrum and fit as a PNG."""
        return png_of(single_spectrum(self.layers, self.spectra, self.layer))

    def plan(self) -> ProtectionPlan:
        """The present choice as a plan, by plan.py's own rule."""
        plan = make_plan(
            self.layers,
            score=self.score,
            direction=self.direction,
            rule="threshold",
            value=self.threshold,
            model=run_info(self.run)["model"] if self.run else None,
            layers_fingerprint=layers_fingerprint(self.run) if self.run else "",
            origin="slider",
            **self._options,
        )
        return replace(plan, reason=" ".join(filter(None, (plan.reason, self.wishes.failures()))))

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

    # --- inside ------------------------------------------------------------------------------------------

    @property
    def _options(self) -> dict[str, Any]:
        return {"formats": self.formats, "double_quant": self.double_quant, **self.wishes.options}

    def _use(self, score: str, direction: str, count: int) -> None:
        key = (score, direction)
        if key not in self._choosers:
            self._choosers[key] = Chooser.of(self.layers, score, direction, **self._options)
        self.score, self.direction = key
        self.chooser = self._choosers[key]
        cut = self.chooser.cut
        items = int(np.searchsorted(self.chooser.layer_count, count, side="right")) - 1
        if items <= 0 or not len(cut):
            self._at(self.bounds[1] if direction == "high" else self.bounds[0])
        else:
            self._at(float(cut[min(items, len(cut)) - 1]))

    def _at(self, threshold: float) -> None:
        low, high = self.bounds
        self.threshold = float(np.clip(threshold, low, high))
        self.choice = self.chooser.at_threshold(self.threshold)

    def _curves(self) -> Curves | None:
        if self.field is None:
            return None
        low, middle, high = np.quantile(self.field.random, (0.05, 0.5, 0.95), axis=0)
        return Curves(
            size=self.chooser.file_bytes.astype(np.float64),
            kl=self.chooser.kl,
            grid=self.field.file_bytes,
            optimum=self.field.optimum,
            random_low=low,
            random_median=middle,
            random_high=high,
            unit=self.unit,
        )


def three_digits(value: float) -> str:
    """Three significant digits without an exponent: "205", "64.0", "0.498"."""
    if not math.isfinite(value) or value == 0:
        return f"{value:g}"
    return f"{value:.{min(3, max(0, 2 - math.floor(math.log10(abs(value)))))}f}".replace("-", "−")


def _worth(s: Standing) -> str:
    """What a choice is predicted to be worth against random ones; empty where all choices are the same."""
    if s.gain == 0:
        return ""
    if s.gain < 0:
        return f" This choice is predicted worse than random by {s.predicted_kl - s.random_median:.3g}."
    return (
        f" This choice is predicted better than {s.better_than:.0%} of random choices, with {s.gain:.0%} of "
        "what can be gained over them."
    )
