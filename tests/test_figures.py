"""Figures against the data they show: recomputed by scipy or by hand, and read back from the artists."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgb
from scipy import stats

from spi_utils import figures
from spi_utils.curves import frontier
from spi_utils.errors import RunError
from spi_utils.figures import FORMAT_COLOURS, all_figures, between_share, draw_all, rank_correlation
from spi_utils.plan import make_plan, price
from spi_utils.runs import Run
from tests.synthetic import layer_table, make_run, spectra_of


@pytest.fixture(scope="module")
def layers():
    return layer_table(70)


@pytest.fixture(scope="module")
def planned(layers):
    return layers[layers["quantizable"]]


def title(figure) -> str:
    return figure.get_suptitle().replace("\n", " ")


def broken(**values):
    """A table with some values of the first planned layers replaced."""
    table = layer_table(28)
    for column, replacements in values.items():
        table.loc[table.index[1 : 1 + len(replacements)], column] = replacements
    return table


def test_statistics_are_scipys_with_missing_values_left_out():
    rng = np.random.default_rng(0)
    values, groups = rng.normal(size=60) + np.repeat([0, 1, 3], 20), pd.Series(np.repeat(list("abc"), 20))
    f = stats.f_oneway(*[values[groups == g] for g in "abc"]).statistic
    assert between_share(values, groups) == pytest.approx(f * 2 / (f * 2 + 57))  # η² of an ANOVA
    assert np.isnan(between_share(np.full(60, 2.0), groups))
    x, y = rng.normal(size=40).round(1), rng.normal(size=40).round(1)  # with ties
    x[3], y[5] = np.nan, np.inf
    keep = np.isfinite(x) & np.isfinite(y)
    assert rank_correlation(x, y) == pytest.approx(stats.spearmanr(x[keep], y[keep]).statistic)
    assert np.isnan(rank_correlation(np.ones(40), y))


def test_depth_shows_every_layer_and_the_share_between_types(layers, planned):
    figure = figures.score_by_depth(layers)
    drawn = np.concatenate([line.get_ydata() for line in figure.axes[0].lines])
    assert sorted(drawn) == pytest.approx(sorted(planned["alpha_hill"]))
    share = between_share(planned["alpha_hill"].to_numpy(), planned["type"].reset_index(drop=True))
    assert title(figure).startswith(f"{share:.0%} of the spread")


def test_histogram_counts_layers_what_the_threshold_keeps_and_each_shapes_noise(layers, planned):
    figure = figures.score_histogram(layers, threshold=4.0, direction="low")
    plan = make_plan(layers, rule="threshold", value=4.0, direction="low")
    assert sum(patch.get_height() for patch in figure.axes[0].patches) == 70
    assert f"keeps {len(plan.protected)} of 70 layers" in title(figure)
    noise = (planned["alpha_hill"] - planned["alpha_excess"]).groupby([planned["rows"], planned["cols"]])
    diamonds = [
        line.get_xdata() for line in figure.axes[1].lines if line.get_marker() == "D" and line.get_ms() == 6
    ]
    assert sorted(diamonds[-1]) == pytest.approx(sorted(noise.median()))


def test_sensitivity_shows_spearman_over_all_and_within_types(layers, planned):
    figure = figures.score_against_sensitivity(layers, "alpha_hill", "fisher_nf4")
    parts = [planned, *(group for _, group in planned.groupby("type", sort=False))]
    rho = [stats.spearmanr(part["alpha_hill"], part["fisher_nf4"]).statistic for part in parts]
    assert [bar.get_width() for bar in figure.axes[1].patches] == pytest.approx(rho)
    assert f"ρ = {rho[0]:.2f}".replace("-", "−") in title(figure)


def test_density_integrates_to_one_and_the_fit_holds_the_tails_share(layers, planned):
    row, spectra = planned.iloc[0], spectra_of(layers)
    found = figures.density_of(row, spectra[row["name"]])
    assert (found["density"] * np.diff(found["edges"])).sum() == pytest.approx(1)
    (x, end), (y, _) = found["fit"]
    area = y * x / (row["alpha_pl"] - 1) * (1 - (end / x) ** (1 - row["alpha_pl"]))
    share = row["alpha_pl_tail"] / len(spectra[row["name"]])
    assert area == pytest.approx(share, rel=0.05)
    figure = figures.spectra_figure(layers, {})
    assert "no spread" in figure.axes[0].get_title(loc="left")


def test_map_colours_each_cell_by_its_format_and_says_which_types_are_kept(layers, planned):
    plan = make_plan(layers, rule="top_k", value=20, force_16bit=r"\.(q_proj|k_proj)$")
    figure = figures.plan_map(layers, plan)
    image, types = figure.axes[0].collections[0].get_array(), list(dict.fromkeys(planned["type"]))
    for name, kind, depth in zip(planned["name"], planned["type"], planned["depth"], strict=True):
        expected = np.array(to_rgb(FORMAT_COLOURS[plan.formats[name]])) * 255
        assert np.abs(image[types.index(kind), depth] - expected).max() <= 1
    mixed = {"rule": "matrix_bits", "value": 7.0, "formats": ("nf4", "int8", "16bit")}
    (legend,) = figures.plan_map(layers, make_plan(layers, score="fisher", **mixed)).legends
    assert [text.get_text() for text in legend.get_texts()] == ["8-bit (int8)", "4-bit (NF4)"]
    assert figures.cut_of(layers, plan) is None  # patterns decided, not a threshold


def test_frontier_draws_the_optimum_below_scores_the_plan_and_one_format_everywhere(layers, planned):
    plan = make_plan(layers)
    figure = figures.frontier_figure(layers, plan, frontier(layers, seeds=20, points=11))
    lines = {line.get_label(): line for line in figure.axes[0].lines}
    lowest = lines["least predicted KL"].get_xydata().T
    for line in figure.axes[0].lines:
        if len(line.get_xdata()) == 11:  # curves are read between whole choices, the optimum at whole ones
            assert (line.get_ydata() >= np.interp(line.get_xdata(), *lowest) - 0.05 * lowest[1].max()).all()
    assert lines["the plan"].get_ydata()[0] == pytest.approx(plan.predicted_kl)
    size = price(layers, dict.fromkeys(planned["name"], "int8"))["total"]
    held = lines["int8 everywhere"].get_xydata()[0]
    assert held == pytest.approx([size / 1e6, planned["predicted_int8"].sum()])


UNUSUAL = {
    "one layer": lambda: layer_table(1),
    "all alpha equal": lambda: layer_table(28).assign(alpha_hill=3.0, alpha_pl=3.0, alpha_excess=0.5),
    "missing and infinite": lambda: broken(alpha_hill=[np.nan, np.inf, -np.inf], alpha_pl=[np.inf, np.nan]),
    "long names": lambda: layer_table(28).assign(type=lambda table: "x" * 120 + table["type"]),
}


@pytest.mark.parametrize("case", UNUSUAL)
def test_every_figure_copes(case, monkeypatch):
    monkeypatch.setattr(
        figures, "frontier", lambda *a, **k: frontier(*a, **k, scores=["alpha_hill"], points=5)
    )
    table = UNUSUAL[case]()
    drawn = all_figures(table, spectra_of(table), make_plan(table, score="smallest", rule="top_k", value=1))
    assert len(drawn) == 6
    for figure in drawn.values():
        figure.draw_without_rendering()


def test_draw_all_saves_every_figure_and_the_same_bytes_again(tmp_path):
    run = make_run(tmp_path / "run", 14)
    drawn = draw_all(run, make_plan(layer_table(14), model={"sha256": "0" * 64}))
    names = {"score_by_depth", "spectra", "histogram", "plan_map", "sensitivity", "frontier"}
    assert set(drawn) == names and {path.stem for path in run.figures.glob("*.svg")} == names
    assert figures.show(drawn, "plan_map").data[:4] == b"\x89PNG"
    again = Run(tmp_path / "again")
    figures.save_figure(figures.score_by_depth(layer_table(14)), again, "score_by_depth")
    for suffix in ("png", "svg"):
        name = f"score_by_depth.{suffix}"
        assert (run.figures / name).read_bytes() == (again.figures / name).read_bytes()


def test_what_the_table_lacks_is_left_out():
    table = layer_table(21)
    table = table.drop(columns=[c for c in table if c.startswith(("fisher", "measured", "predicted"))])
    drawn = all_figures(table, spectra_of(table), make_plan(table))
    assert list(drawn) == ["score_by_depth", "spectra", "histogram", "plan_map"]
    with pytest.raises(RunError, match="sensitivity='self'"):
        figures.show(dict.fromkeys(drawn, Path("x.png")), "frontier")
    with pytest.raises(RunError, match="01_analyze"):
        draw_all(Run(Path("nothing")), make_plan(table))
