"""The figures of an evaluation: each a function from an `Evaluation` to a matplotlib `Figure`.

Titles state what this run found, and whose KL they tell. Colours are Okabe and Ito's, and markers differ too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from matplotlib.ticker import MaxNLocator

from spi_utils import stats
from spi_utils.claims import SURVIVAL, is_random
from spi_utils.figures import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    SKY,
    VERMILLION,
    headline,
    new_figure,
    size_unit,
    styled,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from spi_utils.claims import Evaluation

WHOSE = "float32, from the file's tensors"  # what every KL of an evaluation's variants is
WINE = "#882255"  # Tol's muted palette: told apart from the others by the colour-blind too


class Look(NamedTuple):
    """Colour, marker and size of a variant's point, its curve's line, and whether only its rim is drawn."""

    colour: str
    marker: str
    size: float = 7.0
    line: str = "-"
    hollow: bool = False


LOOKS = {
    "reference": Look(BLACK, "*", 11, ":"),
    "nf4": Look(BLACK, "s"),
    "nf4_nearest": Look(BLACK, "s", line="--", hollow=True),
    "int8": Look(ORANGE, "D"),
    "plan": Look(VERMILLION, "o", 10),
    "plan_nearest": Look(VERMILLION, "o", 10, "--", hollow=True),
    "other_direction": Look(PURPLE, "v", 11, "--", hollow=True),
    "fisher": Look(GREEN, "^", 9),
    "fisher_int8": Look(GREEN, "P", 7, "--"),
    # A wide rim: at low budgets int4 gets few layers, and the point lies on that of fisher_int8.
    "fisher_int4": Look(BLUE, "s", 11, hollow=True),
    "int4": Look(SKY, "d", 9),
    "noise": Look(GREY, "X", line="--"),
    "first_last": Look(BLUE, "<", line="--"),
    "smallest_first": Look(BLUE, ">", line=":"),
    "type_prior": Look(BLUE, "h", line="-."),
}
RANDOM = Look(GREY, "o", 4, hollow=True)
RIVAL = Look(WINE, "p", 9)
WINDOWED = ("nf4", "plan", "plan_nearest", "other_direction", "fisher", "fisher_int8", "fisher_int4", "int8")
JITTER = 0.013  # of the range of sizes, about a millimetre: the most that a random draw is moved sideways
FLOOR = 1e-6  # nats a token: the smallest KL that is drawn
LOSSLESS = 0.1  # of the widest difference: variants within it would lie on the zero line


def look(key: str) -> Look:
    """How a variant is drawn; all random controls alike, all rivals alike."""
    return RANDOM if is_random(key) else LOOKS.get(key, RIVAL)


def marked(key: str, size: float | None = None) -> dict[str, Any]:
    """Matplotlib's words for a variant's marker: random draws lie lowest, then large markers, then small."""
    style = look(key)
    return {
        "color": style.colour,
        "marker": style.marker,
        "markersize": size or style.size,
        "markerfacecolor": "none" if style.hollow else style.colour,
        "markeredgecolor": style.colour if style.hollow else "white",
        "markeredgewidth": (0.9 if is_random(key) else 1.6) if style.hollow else 0.6,
        "zorder": 2 if is_random(key) else 4 - style.size / 20,
    }


def drawn_label(key: str, one: Mapping[str, Any]) -> str:
    """A variant's name in a legend; the random controls share one."""
    return "random, equal bytes" if is_random(key) else one["label"]


def _finish(figure: Figure, evaluation: Evaluation, finding: str, reading: str, heading: str = "") -> Figure:
    """One legend beside the panels, each label once; the title; how to read it, and on which text."""
    unique: dict[str, Any] = {}
    for axes in figure.axes:
        handles, labels = axes.get_legend_handles_labels()
        unique |= dict(zip(labels, handles, strict=True))
    figure.legend(unique.values(), unique.keys(), loc="outside right center", title=heading or None)
    text = evaluation.text
    shape = f"{text['windows']} windows of {text['window_length']} tokens of {text['name']}."
    headline(figure, finding, f"{reading} {shape}")
    return figure


@styled
def quality_by_bytes(evaluation: Evaluation) -> Figure:
    """Perplexity and KL against the size of the weights, every variant with its 95 % interval."""
    variants = evaluation.variants
    draws = [key for key in variants if is_random(key)]
    unit, unit_name = size_unit(variants["reference"]["bytes"])
    places = {key: one["bytes"] / unit for key, one in variants.items()}
    reach = JITTER * (max(places.values()) - min(places.values()))
    if len(draws) > 1:  # only random draws, which would hide each other, are moved
        for key, beside in zip(draws, np.linspace(-reach, reach, len(draws)), strict=True):
            places[key] += float(beside)
    mean_draw = np.mean([variants[key]["kl_mean"] for key in draws]) if draws else 0.0
    ranked = sorted(variants, key=lambda key: -(mean_draw if is_random(key) else variants[key]["kl_mean"]))
    base = variants["reference"]["perplexity"]
    figure = new_figure(10.0, 5.2)
    left, right = figure.subplots(1, 2, sharex=True)
    for key in ranked:  # the legend's order: from the highest KL to the lowest
        one = variants[key]
        panels = {left: [base * ratio for ratio in one.get("perplexity_ratio", [1.0, 1.0, 1.0])]}
        if "kl" in one:
            ends = stats.Estimate.from_dict(one["kl"])
            panels[right] = [max(x, FLOOR) for x in (ends.mean, ends.low, ends.high)]
        for axes, (value, low, high) in panels.items():
            bars = {"elinewidth": 0.8, "capsize": 0} if is_random(key) else {"elinewidth": 1.2, "capsize": 2}
            error = [[max(value - low, 0)], [max(high - value, 0)]]
            label = drawn_label(key, one)
            axes.errorbar(
                places[key], value, yerr=error, linestyle="none", label=label, **marked(key), **bars
            )
    left.axhline(base, color=BLACK, linewidth=0.8, linestyle=":")
    left.locator_params(axis="x", nbins=5)
    size = f"weights on disk ({unit_name})"
    left.set(xlabel=size, ylabel=f"perplexity on {evaluation.text['name']}")
    right.set(xlabel=size, ylabel="mean KL(16-bit ‖ variant), nats a token", yscale="log")
    reading = (
        "Bars: 95 % intervals over windows (perplexity: of the paired ratio to 16-bit). Random draws stand "
        "about 1 mm beside their size at most, in order of their seeds."
    )
    return _finish(figure, evaluation, quality_finding(evaluation), reading)


BESIDE_RANDOM = {
    "supported": "lower than random layers'",
    "refuted": "higher than random layers'",
    "not separable": "not separable from random's",
}


def quality_finding(evaluation: Evaluation) -> str:
    """One sentence: is the plan better than random at its bytes, and what would int8 cost?"""
    variants = evaluation.variants
    plan = variants["plan"]
    words = f"The plan's KL is {plan['kl_mean']:.3g} ({WHOSE})"
    if "vs_random" in plan:
        verdict = stats.verdict(stats.Estimate.from_dict(plan["vs_random"]["kl"]), "lower")
        random_kl = np.mean([one["kl_mean"] for key, one in variants.items() if is_random(key)])
        words += f", {BESIDE_RANDOM[verdict]} ({random_kl:.3g}) at equal bytes"
    if "int8" in variants:
        words += f"; int8 everywhere: {variants['int8']['kl_mean']:.2g}"
    return words


@styled
def window_differences(evaluation: Evaluation) -> Figure:
    """Loss minus the 16-bit reference's for every window, sorted within each variant."""
    variants = evaluation.variants
    reference = np.array(variants["reference"]["window_nll"])
    differences = {
        key: np.sort(np.array(variants[key]["window_nll"]) - reference) for key in WINDOWED if key in variants
    }
    widest = max(np.abs(difference).max() for difference in differences.values())
    fine = {key for key, difference in differences.items() if np.abs(difference).max() < LOSSLESS * widest}
    figure = new_figure(10.0, 4.8)
    panels = figure.subplots(1, 1 + bool(fine), squeeze=False, width_ratios=[1.5, 1][: 1 + bool(fine)])[0]
    rank = np.arange(1, len(reference) + 1)
    for key, difference in differences.items():
        label = f"{variants[key]['label']}: {variants[key]['delta']['mean']:+.4f}".replace("-0.", "−0.")
        lines = {"linewidth": 1.2, "linestyle": look(key).line, "label": label}
        (panels[-1] if key in fine else panels[0]).plot(rank, difference, **lines, **marked(key, 5.0))
    for panel in panels:
        panel.axhline(0, color=BLACK, linewidth=1)
        panel.set(xlabel="windows, sorted for each variant", xlim=(0.5, len(reference) + 0.5))
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    panels[0].set_ylabel("loss − 16-bit loss, nats a token")
    if fine:
        panels[-1].set_title("nearly lossless ones, enlarged", fontsize=10, loc="left")
    effect, windows = variants["plan"]["effect"], evaluation.text["windows"]
    finding = (
        f"Under the plan {round(effect['share_improved'] * windows)} of {windows} windows have a lower loss "
        f"than in 16-bit; {len(effect['carriers'])} windows carry half of the mean difference"
    )
    reading = "Below the line: better than in 16-bit."
    if effect["flip_after"] < windows:
        flip = effect["flip_after"]
        reading += f" Without its {flip} strongest windows the plan's mean would change its sign."
    return _finish(figure, evaluation, finding, reading, "mean difference")


@styled
def kl_survival(evaluation: Evaluation) -> Figure:
    """Share of tokens whose KL reaches a value, for the ends, the plan and its main controls."""
    variants = evaluation.variants
    figure = new_figure(10.0, 4.8)
    axes = figure.subplots()
    for key, one in variants.items():
        if key == "reference":
            continue
        # The share 1 stands at the least KL of all tokens, decades below the next: no curve, an outlier.
        curve = np.maximum(one["kl_survival"][1:], FLOOR)
        width, height = (0.8, 2) if is_random(key) else (1.8, 3)
        look_of: dict[str, Any] = {"color": look(key).colour, "linestyle": look(key).line}
        look_of |= {"linewidth": width, "zorder": 4 if key == "plan" else height}
        axes.plot(curve, SURVIVAL[1 : len(curve) + 1], label=drawn_label(key, one), **look_of)
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="KL(16-bit ‖ variant) of one token, nats",
        ylabel="share of tokens with at least this KL",
    )
    plan, nf4 = (variants[key]["kl_p999"] for key in ("plan", "nf4"))
    finding = (
        f"The worst token in a thousand moves by {plan:.2g} nats under the plan, by {nf4:.2g} in pure NF4 "
        f"({WHOSE})"
    )
    reading = "A mean hides rare, large changes; this curve doesn't. Further left is better."
    return _finish(figure, evaluation, finding, reading)


@styled
def predicted_and_real(evaluation: Evaluation) -> Figure | None:
    """Predicted against real KL; None where no sensitivity was computed."""
    variants = evaluation.variants
    pairs = {
        key: (one["predicted_kl"], one["kl_mean"])
        for key, one in variants.items()
        if one["predicted_kl"] and one["kl_mean"] > 0
    }
    if not pairs:
        return None
    # Those whose real KL lies within a factor of two of the plan's get a panel of their own.
    plan = pairs.get("plan", (np.nan, np.nan))[1]
    near = [key for key in pairs if variants[key]["equal_bytes"] and plan / 2 <= pairs[key][1] <= 2 * plan]
    figure = new_figure(10.0, 4.8)
    panels = figure.subplots(1, 2 if len(near) > 2 else 1, squeeze=False)[0]
    for panel, keys in zip(panels, (pairs, near), strict=False):
        for key in keys:
            label = drawn_label(key, variants[key])
            panel.plot(*pairs[key], linestyle="none", label=label, **marked(key))
        inside = [value for key in keys for value in pairs[key]]
        low, high = (0.7, 1.4) if panel is panels[0] else (0.93, 1.05)
        ends = [low * min(inside), high * max(inside)]
        panel.plot(ends, ends, color=GREY, linewidth=1, linestyle=":", label="predicted = real", zorder=1)
        panel.set(xlim=ends, ylim=ends, xlabel="predicted KL, nats a token")
    panels[0].set(xscale="log", yscale="log", ylabel="real KL, nats a token")
    if len(panels) > 1:
        panels[1].set_title("the plan and its controls, enlarged", fontsize=10, loc="left")
    reading = "The prediction is a sum over layers, scaled once a format by all layers in that format."
    return _finish(figure, evaluation, prediction_finding(pairs), reading)


def prediction_finding(pairs: Mapping[str, Sequence[float]]) -> str:
    """One sentence: how far off predictions are, the plan's own among them; pairs = (predicted, real) KL."""
    off = {key: predicted / real - 1 for key, (predicted, real) in pairs.items()}
    median = np.median(np.abs(list(off.values())))
    words = f"Predicted KL is off by {median:.0%} (median of {len(off)} variants)"
    if "plan" not in pairs:
        return words
    predicted, real = pairs["plan"]
    side = "too high" if predicted > real else "too low"
    return (
        f"{words}; the plan's is {abs(off['plan']):.0%} {side}: {predicted:.3g} predicted, {real:.3g} real "
        f"({WHOSE})"
    )
