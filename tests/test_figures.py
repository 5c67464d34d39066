"""Figures against the data they show: recomputed by scipy, by hand, and read back from the artists."""

import io
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgb
from scipy import stats

from spi_utils.curves import frontier
from spi_utils.errors import AnalysisError, PlanError, RunError
from spi_utils.figures import (
    FORMAT_COLOURS,
    LayerGrid,
    all_figures,
    balanced,
    between_share,
    cut_of,
    density_of,
    draw_all,
    frontier_figure,
    histogram_edges,
    is_wide,
    pick_layers,
    plan_map,
    planned_layers,
    rank_correlation,
    rank_decay,
    save_figure,
    score_against_sensitivity,
    score_by_depth,
    score_histogram,
    shorten,
    show,
    single_spectrum,
    spectra_figure,
    type_styles,
)
from spi_utils.formats import gigabytes
from spi_utils.plan import make_plan, price
from spi_utils.runs import Run, existing_run
from tests.synthetic import layer_table, make_run, spectra_of


def title(figure) -> str:
    return figure.get_suptitle().replace("\n", " ")


def detail(figure) -> str:
    return figure.get_supxlabel().replace("\n", " ")


@pytest.fixture(scope="module")
def layers():
    return layer_table(70)


@pytest.fixture(scope="module")
def spectra(layers):
    return spectra_of(layers)


def broken(count=70, **values):
    """A table with some values of the first planned layers replaced."""
    table = layer_table(count)
    for column, replacements in values.items():
        for offset, value in enumerate(replacements):
            table.loc[table.index[1 + offset], column] = value
    return table


# --- statistics behind the titles ------------------------------------------------------------------------


def test_between_share_is_the_eta_squared_of_an_anova():
    rng = np.random.default_rng(0)
    values, groups = rng.normal(size=60) + np.repeat([0, 1, 3], 20), pd.Series(np.repeat(list("abc"), 20))
    f = stats.f_oneway(*[values[groups == g] for g in "abc"]).statistic
    assert between_share(values, groups) == pytest.approx(f * 2 / (f * 2 + 57))
    assert np.isnan(between_share(np.full(5, 2.0), pd.Series(list("aabbb"))))


def test_rank_correlation_is_scipys_with_missing_values_left_out():
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=40).round(1), rng.normal(size=40).round(1)  # with ties
    assert rank_correlation(x, y) == pytest.approx(stats.spearmanr(x, y).statistic)
    x[3], y[5] = np.nan, np.inf
    keep = np.isfinite(x) & np.isfinite(y)
    assert rank_correlation(x, y) == pytest.approx(stats.spearmanr(x[keep], y[keep]).statistic)
    assert np.isnan(rank_correlation(np.ones(9), rng.normal(size=9)))


def test_wide_scores_span_decades():
    assert is_wide(np.geomspace(1, 1000, 50))
    assert not is_wide(np.linspace(1, 12, 50))
    assert not is_wide(np.linspace(-1, 1000, 50))


# --- each figure shows its data --------------------------------------------------------------------------


def test_depth_figure_plots_every_layer_and_states_the_share(layers):
    figure = score_by_depth(layers)
    planned = planned_layers(layers)
    drawn = np.concatenate([line.get_ydata() for line in figure.axes[0].lines])
    assert sorted(drawn) == pytest.approx(sorted(planned["alpha_hill"]))
    share = between_share(planned["alpha_hill"].to_numpy(), planned["type"])
    assert title(figure).startswith(f"{share:.0%} of the spread")
    assert figure.axes[0].get_xlabel() == "depth (block)"


def test_failed_layers_that_a_pattern_keeps_are_hollow_in_the_plans_map():
    table = broken(alpha_hill=[np.nan] * 3, status=["failed"] * 3)
    names = list(table["name"][table["status"] == "failed"])
    plan = make_plan(table, force_16bit=[f"^{re.escape(name)}$" for name in names])
    figures = all_figures(table, spectra_of(table), plan)
    (axes,) = figures["plan_map"].axes
    assert sum(patch.get_gid() == "failed" for patch in axes.patches) == 3
    assert "analysis failed (3)" in [text.get_text() for text in figures["plan_map"].legends[0].get_texts()]
    assert "frontier" in figures  # the same wishes hold there
    cut = cut_of(table, plan)
    rest = table["name"].isin(plan.protected) & ~table["name"].isin(names)
    assert cut == table.loc[rest, "alpha_hill"].min()


@pytest.mark.parametrize("words", [3, 9, 14, 40])
def test_a_title_is_broken_into_even_lines(words):
    text = " ".join(["number"] * words + ["0.0375"])
    lines = balanced(text, 90).split("\n")
    assert " ".join(lines) == text
    assert len(lines) == -(-(len(text) + 1) // 91)  # no more lines than it needs
    assert min(map(len, lines)) > 0.6 * max(map(len, lines))


def test_failed_layers_are_hollow_and_counted():
    table = broken(alpha_hill=[np.nan, np.inf, np.nan], status=["failed"] * 3)
    figure = score_by_depth(table)
    hollow = [line for line in figure.axes[0].lines if line.get_gid() == "failed"]
    assert len(hollow) == 1
    assert len(hollow[0].get_xdata()) == 3
    assert to_rgb(hollow[0].get_markerfacecolor()) == (1.0, 1.0, 1.0)
    assert "3 layers without a finite value" in detail(figure)


def test_histogram_counts_the_layers_and_what_the_threshold_keeps(layers):
    figure = score_histogram(layers, threshold=4.0, direction="low")
    heights = sum(patch.get_height() for patch in figure.axes[0].patches)
    plan = make_plan(layers, rule="threshold", value=4.0, direction="low")
    assert heights == 70
    assert f"keeps {len(plan.protected)} of 70 layers" in title(figure)


def test_histogram_shows_each_shapes_gaussian_null(layers):
    axes = score_histogram(layers).axes[1]
    planned = planned_layers(layers)
    null = (
        (planned["alpha_hill"] - planned["alpha_excess"]).groupby([planned["rows"], planned["cols"]]).mean()
    )
    diamonds = [line.get_xdata()[0] for line in axes.lines if line.get_marker() == "D" and line.get_ms() == 6]
    assert sorted(set(np.round(diamonds, 9))) == pytest.approx(sorted(null.round(9).unique()))


def test_histogram_edges_cover_all_values_even_a_single_one():
    assert histogram_edges(np.array([3.0, 3.0]))[[0, -1]] == pytest.approx([2.85, 3.15])
    edges = histogram_edges(np.geomspace(1e-6, 1, 30))
    assert edges[0] == pytest.approx(1e-6)
    assert np.diff(np.log(edges)) == pytest.approx(np.log(edges[1] / edges[0]))
    assert len(histogram_edges(np.full(3, np.nan))) == 41


def test_sensitivity_figure_shows_spearman_over_all_and_within_types(layers):
    figure = score_against_sensitivity(layers, "alpha_hill", "fisher_nf4")
    planned = planned_layers(layers)
    overall = stats.spearmanr(planned["alpha_hill"], planned["fisher_nf4"]).statistic
    within = [
        stats.spearmanr(group["alpha_hill"], group["fisher_nf4"]).statistic
        for _, group in planned.groupby("type")
    ]
    dots = [line.get_xdata()[0] for line in figure.axes[1].lines if len(line.get_xdata()) == 1]
    assert sorted(dots) == pytest.approx(sorted([*within, overall]))
    assert f"ρ = {overall:.2f}".replace("-", "−") in title(figure)


def test_sensitivity_figure_needs_a_sensitivity(layers):
    bare = layers.drop(columns=[c for c in layers if c.startswith(("fisher", "measured"))])
    with pytest.raises(AnalysisError, match="01_analyze with sensitivity"):
        score_against_sensitivity(bare)


def test_density_integrates_to_one():
    eigenvalues = np.random.default_rng(0).pareto(2, 5000) + 1
    edges, density = density_of(eigenvalues)
    assert (density * np.diff(edges)).sum() == pytest.approx(1)


def test_fitted_tail_holds_the_tails_share(layers, spectra):
    name = planned_layers(layers)["name"][0]
    figure = spectra_figure(layers, spectra, [name])
    row = layers.set_index("name").loc[name]
    x, y = next(line for line in figure.axes[0].lines if len(line.get_xdata()) == 50).get_data()
    below = (x[-1] / row["alpha_pl_xmin"]) ** (1 - row["alpha_pl"])  # of the tail, beyond the last point
    area = np.trapezoid(y * x, np.log(x)) / (1 - below)
    assert area == pytest.approx(row["alpha_pl_tail"] / len(spectra[name]), rel=0.02)


def test_rank_decay_recovers_an_exact_power(layers):
    name = planned_layers(layers)["name"][0]
    figure = rank_decay(layers, {name: 7 * np.arange(1.0, 401.0) ** -0.7}, [name])
    assert figure.axes[0].get_legend_handles_labels()[1][0].endswith("a = 0.70, R² 1.00")


def test_rank_decay_tells_how_badly_a_power_law_fits(layers):
    name, ranks = planned_layers(layers)["name"][0], np.arange(1.0, 401.0)
    figure = rank_decay(layers, {name: np.exp(-ranks / 40)}, [name])
    fit = stats.linregress(np.log(ranks[1:200]), -ranks[1:200] / 40)
    label = figure.axes[0].get_legend_handles_labels()[1][0]
    assert label.endswith(f"a = {-fit.slope:.2f}, R² {fit.rvalue**2:.2f}") and fit.rvalue**2 < 0.9


def test_nothing_is_written_over_a_density_or_a_histogram(layers, spectra):
    names = list(planned_layers(layers)["name"][:2])
    for axes in spectra_figure(layers, spectra, names).axes:
        assert not axes.texts and "KS" in axes.get_title(loc="left")
    (label,) = score_histogram(layers, threshold=4.0).axes[0].texts
    assert label.get_position()[1] > 1.0 and label.get_verticalalignment() == "bottom"  # above the axes


def test_layers_are_picked_from_end_to_end(layers):
    planned = planned_layers(layers).sort_values("alpha_hill")
    names = pick_layers(layers, "alpha_hill", 3)
    assert [names[0], names[-1]] == [planned["name"].iloc[0], planned["name"].iloc[-1]]


def test_unknown_layer_is_refused(layers, spectra):
    with pytest.raises(AnalysisError, match=r"no spectrum of layer 'model\.nope'"):
        spectra_figure(layers, spectra, ["model.nope"])


def test_a_layer_without_a_spectrum_says_so(layers):
    name = planned_layers(layers)["name"][0]
    figure = single_spectrum(layers, {}, name)
    assert "no spectrum" in figure.axes[0].texts[0].get_text()


def test_plan_map_colours_each_cell_by_its_format(layers):
    plan = make_plan(layers, rule="top_k", value=20)
    figure = plan_map(layers, plan)
    image = np.asarray(figure.axes[0].images[0].get_array())
    planned = planned_layers(layers)
    for name, kind, depth in zip(planned["name"], planned["type"], planned["depth"], strict=True):
        row = list(dict.fromkeys(planned["type"])).index(kind)
        expected = np.array(to_rgb(FORMAT_COLOURS[plan.formats[name]])) * 255
        assert image[row, depth] == pytest.approx(expected, abs=1)
    assert title(figure).startswith("20 of 70 layers stay in 16-bit")
    assert f"{plan.matrix_bits:.2f} matrix bits" in title(figure)


def test_plan_map_says_which_types_are_kept_and_which_are_not(layers):
    plan = make_plan(layers, rule="top_k", value=20, force_16bit=r"\.(q_proj|k_proj)$")
    said = title(plan_map(layers, plan))
    assert "nearly all of q_proj and k_proj, none of" in said and "more types" in said


@pytest.mark.parametrize(
    ("count", "said"),
    [(6.414e9, "6.41 GB"), (205_047_307, "205 MB"), (9.996e8, "1.00 GB"), (1.2e6, "1.2 MB")],
)
def test_sizes_have_three_figures(count, said):
    assert gigabytes(count) == said


def test_plans_of_three_formats_are_drawn(layers):
    plan = make_plan(layers, score="fisher", rule="matrix_bits", value=7.0, formats=("nf4", "int8", "16bit"))
    figures = all_figures(layers, spectra_of(layers), plan)
    labels = [text.get_text() for text in figures["plan_map"].legends[0].get_texts()]
    assert "8-bit (int8)" in labels
    optimum = next(
        line for line in figures["frontier"].axes[0].lines if line.get_label() == "least predicted KL"
    )
    assert plan.predicted_kl == pytest.approx(
        np.interp(plan.bytes["total"] / 1e6, optimum.get_xdata(), optimum.get_ydata()), rel=0.5
    )


def test_cells_that_several_layers_share_show_the_share_of_weights():
    table = pd.DataFrame({"type": ["e", "e", "e"], "depth": [0, 0, 1], "numel": [30, 10, 5]})
    table = table.assign(quantizable=True, status=["ok", "failed", "ok"])
    grid = LayerGrid(table)
    assert grid.share(np.array([True, False, False])).tolist() == [[0.75, 0.0]]
    assert grid.counts(np.array([True, False, True])) == ["2/3"]
    assert grid.hollow.tolist() == [[True, False]]  # one failed layer is enough to be seen


def test_frontier_draws_the_optimum_below_every_score(layers):
    figure = frontier_figure(layers, make_plan(layers), frontier(layers, seeds=20, points=11))
    lines = {line.get_label(): line for line in figure.axes[0].lines}
    lowest = lines["least predicted KL"]
    for line in figure.axes[0].lines:
        if len(line.get_xdata()) == 11:
            at = np.interp(line.get_xdata(), lowest.get_xdata(), lowest.get_ydata())
            # Curves are read between whole choices, the optimum at whole ones: hence the slack.
            assert (line.get_ydata() >= at - 0.05 * at.max()).all()
    plan = make_plan(layers)
    assert lines["the plan"].get_ydata()[0] == pytest.approx(plan.predicted_kl)
    assert f"{plan.predicted_kl:.3g} nats a token" in title(figure)


def test_frontier_marks_one_format_everywhere_and_says_that_it_predicts(layers):
    figure = frontier_figure(layers, make_plan(layers), frontier(layers, seeds=20, points=5))
    lines = {line.get_label(): line for line in figure.axes[0].lines}
    planned = planned_layers(layers)
    for fmt, label in (("nf4", "NF4 everywhere, nearest"), ("int8", "int8 everywhere")):
        (size,), (kl,) = lines[label].get_data()
        assert size == pytest.approx(price(layers, dict.fromkeys(planned["name"], fmt))["total"] / 1e6)
        assert kl == pytest.approx(planned[f"predicted_{fmt}"].sum())
    assert figure.axes[0].get_ylabel().startswith("predicted KL") and "MB" in figure.axes[0].get_xlabel()
    assert "predicted" in title(figure) and "predictions" in detail(figure)


def test_frontier_needs_predictions(layers):
    with pytest.raises(AnalysisError, match="no predicted KL"):
        frontier_figure(
            layers,
            make_plan(layers),
            frontier(layers.drop(columns=["predicted_nf4", "predicted_int8"]), points=5),
        )


# --- unusual tables --------------------------------------------------------------------------------------


UNUSUAL = {
    "one layer": lambda: layer_table(1),
    "all alpha equal": lambda: layer_table(70).assign(alpha_hill=3.0, alpha_pl=3.0, alpha_excess=0.5),
    "missing and infinite": lambda: broken(alpha_hill=[np.nan, np.inf, -np.inf], alpha_pl=[np.inf, np.nan]),
    "very long names": lambda: layer_table(70).assign(
        name=lambda t: "model." + "deeply_nested_" * 12 + t["name"], type=lambda t: "x" * 120 + t["type"]
    ),
    "many layers": lambda: layer_table(2000),
    "many types": lambda: layer_table(70).assign(type=lambda t: [f"kind_{i % 30}" for i in range(len(t))]),
}


@pytest.mark.parametrize("case", UNUSUAL)
def test_every_figure_copes(case):
    table = UNUSUAL[case]()
    plan = make_plan(table, rule="top_k", value=1)
    names = list(planned_layers(table)["name"][:3])
    spectra = spectra_of(table[table["name"].isin(names)])
    figures = [
        score_by_depth(table),
        score_histogram(table, threshold=3.0),
        score_against_sensitivity(table),
        spectra_figure(table, spectra, names),
        rank_decay(table, spectra, names),
        plan_map(table, plan),
        frontier_figure(table, plan, frontier(table, ["alpha_hill"], points=5)),
    ]
    for figure in figures:
        file = io.BytesIO()
        figure.savefig(file, format="png")
        assert len(set(file.getvalue())) > 100  # drawn without an error, and not blank


def test_ten_thousand_layers_are_drawn():
    table = layer_table(10_000)
    figure = plan_map(table, SimpleNamespace(formats={}, bytes={"total": 10**9}, matrix_bits=16.0))
    assert figure.axes[0].images[0].get_array().shape[1] <= 400
    assert len(score_by_depth(table).axes[0].lines) == 7


def test_a_table_without_linear_layers_is_refused():
    with pytest.raises(AnalysisError, match="none that can be quantized"):
        score_by_depth(layer_table(3).iloc[[0, -1]])


def test_an_unknown_score_names_the_nearest():
    with pytest.raises(PlanError, match="alpha_hill"):
        score_by_depth(layer_table(7), "alpha_hil")


def test_names_are_shortened_in_the_middle():
    assert shorten("a" * 30 + "b" * 30, 11) == "aaaaa…bbbbb"
    assert shorten("short") == "short"


def test_types_differ_by_colour_and_marker():
    styles = type_styles(pd.Series([f"t{i}" for i in range(14)]))
    assert len(set(styles.values())) == 14


# --- files -----------------------------------------------------------------------------------------------


def test_the_same_data_give_the_same_bytes(layers, tmp_path):
    for folder in ("a", "b"):
        save_figure(score_histogram(layers, threshold=4.0), Run(tmp_path / folder), "x")
    for suffix in ("png", "svg"):
        first, second = (tmp_path / f / "figures" / f"x.{suffix}" for f in ("a", "b"))
        assert first.read_bytes() == second.read_bytes()
    assert sorted(p.name for p in (tmp_path / "a" / "figures").iterdir()) == ["x.png", "x.svg"]


def test_draw_all_saves_every_figure(tmp_path):
    run = make_run(tmp_path / "run", 35)
    plan = make_plan(layer_table(35), model={"sha256": "0" * 64})
    figures = draw_all(run, plan)
    assert set(figures) == {
        "score_by_depth", "spectra", "rank_decay", "histogram", "plan_map", "sensitivity", "frontier",
    }  # fmt: skip
    assert all(path.exists() and path.with_suffix(".svg").exists() for path in figures.values())
    assert show(figures, "plan_map").data[:4] == b"\x89PNG"


def test_what_needs_a_sensitivity_is_left_out_without_one():
    table = layer_table(21)
    table = table.drop(columns=[c for c in table if c.startswith(("fisher", "measured", "predicted"))])
    figures = all_figures(table, spectra_of(table), make_plan(table))
    assert list(figures) == ["score_by_depth", "spectra", "rank_decay", "histogram", "plan_map"]
    with pytest.raises(RunError, match="sensitivity='self'"):
        show(dict.fromkeys(figures, Path("x.png")), "frontier")


def test_the_cut_of_a_plan_is_known_only_where_one_exists(layers):
    by_score = make_plan(layers, rule="top_k", value=20)
    assert cut_of(layers, by_score) == layers["alpha_hill"].nlargest(20).min()
    forced = make_plan(layers, rule="top_k", value=20, force_16bit=r"layers\.0\.self_attn\.q_proj")
    assert cut_of(layers, forced) is None


def test_a_run_without_analysis_says_which_notebook_to_run(tmp_path):
    with pytest.raises(RunError, match="01_analyze"):
        draw_all(Run(tmp_path / "nothing"))
    with pytest.raises(RunError, match="01_analyze"):
        existing_run(tmp_path / "nothing")


def test_no_global_drawing_state_and_no_torch():
    code = (
        "import sys; from matplotlib import rcParams; keys = ['font.size', 'axes.grid', 'svg.hashsalt']\n"
        "before = [rcParams[key] for key in keys]\n"
        "from spi_utils import figures; from tests.synthetic import layer_table\n"
        "figures.score_by_depth(layer_table(14))\n"
        "assert [rcParams[key] for key in keys] == before\n"
        "assert 'matplotlib.pyplot' not in sys.modules and 'torch' not in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
