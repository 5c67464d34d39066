"""What notebook 02 calls: every figure of a run, the explorer, and its kernel-less page. No model is loaded.

The figures themselves are functions from data to a matplotlib Figure, in the `*_figures.py` modules.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from spi_utils.curves import frontier
from spi_utils.errors import RunError
from spi_utils.explorer import explore, write_explorer
from spi_utils.figures.plan_figures import frontier_figure, plan_map
from spi_utils.figures.plotting import save_figure
from spi_utils.figures.score_figures import planned_layers, planned_values, score_by_depth, score_histogram
from spi_utils.figures.sensitivity_figures import score_against_sensitivity, sensitivity_column
from spi_utils.figures.spectrum_figures import rank_decay, spectra_figure
from spi_utils.plan import ProtectionPlan
from spi_utils.runs import layers_fingerprint, read_layers, read_spectra, run_info, stage

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import pandas as pd
    from IPython.display import Image
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

    from spi_utils.runs import Run

__all__ = ["all_figures", "draw_all", "explore", "show", "write_explorer"]


def draw_all(run: Run, plan: ProtectionPlan | None = None) -> dict[str, Path]:
    """Draw and save every figure that the run's data allow (`all_figures`).

    Args:
        plan: whose score, threshold and map are drawn; read from plan.json by default.

    Returns:
        Figure name -> its PNG in the run's figures; an SVG lies beside it.

    Raises:
        RunError: no analysis or no plan in this run; says which notebook to run.
    """
    layers, spectra = read_layers(run), read_spectra(run)
    if plan is None:
        plan = ProtectionPlan.read(run.plan_json, model=run_info(run)["model"])
    inputs = {"layers": layers_fingerprint(run), "plan": plan.fingerprint}
    outputs: list[str] = []
    with stage(run, "visualize", inputs, outputs, force=True):
        figures = all_figures(layers, spectra, plan)
        saved = {name: save_figure(figure, run, name) for name, figure in figures.items()}
        outputs += [f"figures/{name}{suffix}" for name in saved for suffix in (".png", ".svg")]
    return saved


def all_figures(
    layers: pd.DataFrame, spectra: Mapping[str, NDArray[np.float64]], plan: ProtectionPlan
) -> dict[str, Figure]:
    """Every figure by name; `sensitivity` and `frontier` only if the layer table holds a sensitivity."""
    figures = {
        "score_by_depth": score_by_depth(layers, plan.score),
        "spectra": spectra_figure(layers, spectra),
        "rank_decay": rank_decay(layers, spectra),
        "histogram": score_histogram(layers, plan.score, cut_of(layers, plan), plan.direction),
        "plan_map": plan_map(layers, plan),
    }
    if sensitivity_column(layers) is not None:
        figures["sensitivity"] = score_against_sensitivity(layers, plan.score)
        used = {*plan.formats.values(), "16bit"}
        formats = tuple(used if len(used) > 1 else {"nf4", "16bit"})
        wishes: dict[str, Any] = {
            name: plan.options.get(name) for name in ("group", "force_16bit", "forbid_16bit")
        }
        curves = frontier(layers, formats=formats, double_quant=plan.double_quant, **wishes)
        if curves["predicted_kl"].notna().any():
            figures["frontier"] = frontier_figure(curves, plan)
    return figures


def cut_of(layers: pd.DataFrame, plan: ProtectionPlan) -> float | None:
    """The score where a plan's protected layers begin; None if no threshold separates them from the rest."""
    values = planned_values(layers, plan.score)
    scored = np.isfinite(values)
    kept = planned_layers(layers)["name"].isin(plan.protected).to_numpy()[scored]
    values = values[scored]
    if not kept.any():
        return None
    cut = float(values[kept].min() if plan.direction == "high" else values[kept].max())
    beyond = values >= cut if plan.direction == "high" else values <= cut
    return cut if (beyond == kept).all() else None


def show(figures: dict[str, Path], name: str) -> Image:
    """A saved figure, to be the last line of a notebook cell.

    Raises:
        RunError: this run's data don't allow that figure; says what to run.
    """
    from IPython.display import Image

    if name not in figures:
        raise RunError(
            f"there is no figure {name!r} in this run; it has {', '.join(figures)}. `sensitivity` and "
            "`frontier` need notebook 01_analyze with sensitivity='self'."
        )
    return Image(filename=str(figures[name]))
