"""The figures of an evaluation: each a function from an Evaluation to a matplotlib Figure.

Titles state what this run found; colours are Okabe and Ito's, and markers differ too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from matplotlib.ticker import MaxNLocator

from spi_utils import stats
from spi_utils.claims import SURVIVAL, is_random
from spi_utils.figures.plotting import (
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
    styled,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from spi_utils.claims import Evaluation


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
    "int4": Look(ORANGE, "d", line="--"),
    "noise": Look(SKY, "X", line="--"),
    "first_last": Look(BLUE, "<", line="--"),
    "smallest_first": Look(BLUE, ">", line=":"),
    "type_prior": Look(BLUE, "h", line="-."),
}
WINDOWED = ("nf4", "plan", "plan_nearest", "other_direction", "fisher", "fisher_int8", "fisher_int4", "int8")
RANDOM = Look(GREY, "o", 4.5)
RIVAL = Look(SKY, "p", 9)
JITTER = 0.013  # of the range of sizes, about a millimetre: the most that a random draw is moved sideways
FLOOR = 1e-6  # nats a token: the smallest KL that is drawn
LOSSLESS = 0.1  # of the widest difference: variants within it would lie on the zero line


def look(key: str) -> Look:
    """How a variant is drawn; all random controls alike, all rivals alike."""
    return RANDOM if is_random(key) else LOOKS.get(key, RIVAL)


def drawn_label(key: str, one: Mapping[str, Any]) -> str:
    """A variant's name in a legend; the random controls share one."""
    return "random, equal bytes" if is_random(key) else one["label"]


@styled
def quality_by_bytes(evaluation: Evaluation) -> Figure:
    """Perplexity and KL against the size of the weights, every variant with its 95 % interval."""
    figure = new_figure(10.0, 5.2)
    left, right = figure.subplots(1, 2, sharex=True)
    places = _places(evaluation.variants)
    base = evaluation.variants["reference"]["perplexity"]
    for key, one in _by_height(evaluation.variants):
        label = drawn_label(key, one)
        ratios = one.get("perplexity_ratio", [1.0, 1.0, 1.0])
        _point(left, key, places[key], [base * ratio for ratio in ratios], label)
        if "kl" in one:
            ends = stats.Estimate.from_dict(one["kl"])
            values = [max(x, FLOOR) for x in (ends.mean, ends.low, ends.high)]
            _point(right, key, places[key], values, label)
    left.axhline(base, color=BLACK, linewidth=0.8, linestyle=":")
    left.locator_params(axis="x", nbins=5)
    left.set(xlabel="weights on disk (GB)", ylabel=f"perplexity on {evaluation.text['name']}")
    right.set(xlabel="weights on disk (GB)", ylabel="mean KL(16-bit ‖ variant), nats a token", yscale="log")
    _shared_legend(figure, left)
    headline(
        figure,
        quality_finding(evaluation),
        "Bars: 95 % intervals over windows (perplexity: of the paired ratio to 16-bit). Random draws stand "
        f"about 1 mm beside their size at most, in order of their seeds. {_text_note(evaluation)}",
    )
    return figure


def quality_finding(evaluation: Evaluation) -> str:
    """One sentence: is the plan better than random at its bytes, and what would int8 cost?"""
    variants = evaluation.variants
    kl = variants["plan"]["kl_mean"]
    held = variants["plan"].get("vs_random")
    words = f"The plan's KL is {kl:.3g}"
    if held:
        verdict = stats.verdict(stats.Estimate.from_dict(held["kl"]), "lower")
        beside = {
            "supported": "lower than random layers'",
            "refuted": "higher than random layers'",
            "not separable": "not separable from random's",
        }[verdict]
        random_kl = np.mean([one["kl_mean"] for key, one in variants.items() if is_random(key)])
        words += f", {beside} ({random_kl:.3g}) at equal bytes"
    if "int8" in variants:
        words += f"; int8 everywhere: {variants['int8']['kl_mean']:.2g}"
    return words


def _by_height(variants: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, Mapping[str, Any]]]:
    """Variants from the highest KL to the lowest, random draws together at their mean: the legend's order."""
    draws = [one["kl_mean"] for key, one in variants.items() if is_random(key)]

    def height(item: tuple[str, Mapping[str, Any]]) -> float:
        return -float(np.mean(draws)) if is_random(item[0]) else -item[1]["kl_mean"]

    return sorted(variants.items(), key=height)


def _places(variants: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """GB of each variant; only random draws, which would hide each other, are moved, by `JITTER` at most."""
    sizes = {key: one["bytes"] / 1e9 for key, one in variants.items()}
    reach = JITTER * (max(sizes.values()) - min(sizes.values()))
    draws = [key for key in variants if is_random(key)]
    beside = dict(zip(draws, np.linspace(-reach, reach, len(draws)), strict=True)) if draws[1:] else {}
    return {key: size + float(beside.get(key, 0.0)) for key, size in sizes.items()}


def _point(axes: Axes, key: str, x: float, ends: list[float], label: str) -> None:
    """A point with its interval; ends = [value, low, high]."""
    style = look(key)
    value, low, high = ends
    axes.errorbar(
        x,
        value,
        yerr=[[max(value - low, 0)], [max(high - value, 0)]],
        **marked(style),
        elinewidth=0.8 if is_random(key) else 1.2,
        capsize=0 if is_random(key) else 2,
        linestyle="none",
        label=label,
    )


def marked(style: Look) -> dict[str, Any]:
    """Matplotlib's words for a look; small markers lie above large ones, so that none is covered."""
    return {
        "color": style.colour,
        "marker": style.marker,
        "markersize": style.size,
        "markerfacecolor": "none" if style.hollow else style.colour,
        "markeredgecolor": style.colour if style.hollow else "white",
        "markeredgewidth": 1.6 if style.hollow else 0.6,
        "zorder": 4 - style.size / 20,
    }


def _shared_legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    figure.legend(unique.values(), unique.keys(), loc="outside right center")


def _text_note(evaluation: Evaluation) -> str:
    text = evaluation.text
    return f"{text['windows']} windows of {text['window_length']} tokens of {text['name']}."


@styled
def window_differences(evaluation: Evaluation) -> Figure:
    """Loss minus the 16-bit reference's for every window, sorted within each variant."""
    figure = new_figure(10.0, 4.8)
    reference = np.array(evaluation.variants["reference"]["window_nll"])
    differences = {
        key: np.sort(np.array(evaluation.variants[key]["window_nll"]) - reference)
        for key in (
            "nf4",
            "plan",
            "plan_nearest",
            "other_direction",
            "fisher",
            "fisher_int8",
            "fisher_int4",
            "int8",
        )
        if key in evaluation.variants
    }
    widest = max(np.abs(difference).max() for difference in differences.values())
    fine = {key for key, difference in differences.items() if np.abs(difference).max() < LOSSLESS * widest}
    panels = figure.subplots(1, 1 + bool(fine), squeeze=False, width_ratios=[1.5, 1][: 1 + bool(fine)])[0]
    for key, difference in differences.items():
        one = evaluation.variants[key]
        panel = panels[-1] if key in fine else panels[0]
        label = f"{one['label']}: {one['delta']['mean']:+.4f}"
        rank = np.arange(1, len(difference) + 1)
        style = look(key)._replace(size=5.0)
        panel.plot(rank, difference, linewidth=1.2, linestyle=style.line, label=label, **marked(style))
    for panel in panels:
        panel.axhline(0, color=BLACK, linewidth=1)
        panel.set(xlabel="windows, sorted for each variant", xlim=(0.5, len(reference) + 0.5))
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    panels[0].set_ylabel("loss − 16-bit loss, nats a token")
    if fine:
        panels[-1].set_title("nearly lossless ones, enlarged", fontsize=10, loc="left")
    figure.legend(loc="outside right center", title="mean difference")
    effect = evaluation.variants["plan"]["effect"]
    windows = evaluation.text["windows"]
    improved = round(effect["share_improved"] * windows)
    headline(
        figure,
        f"Under the plan {improved} of {windows} windows have a lower loss than in 16-bit; "
        f"{len(effect['carriers'])} windows carry half of the mean difference",
        f"Below the line: better than in 16-bit. {_robustness(effect, windows)}{_text_note(evaluation)}",
    )
    return figure


def _robustness(effect: Mapping[str, Any], windows: int) -> str:
    if effect["flip_after"] >= windows:
        return ""
    return f"Without its {effect['flip_after']} strongest windows the plan's mean would change its sign. "


@styled
def kl_survival(evaluation: Evaluation) -> Figure:
    """Share of tokens whose KL reaches a value, for the ends, the plan and its main controls."""
    figure = new_figure(10.0, 4.8)
    axes = figure.subplots()
    for key, one in evaluation.variants.items():
        if key == "reference":
            continue
        # The share 1 stands at the least KL of all tokens, decades below the next: no curve, an outlier.
        style, curve = look(key), np.maximum(one["kl_survival"][1:], FLOOR)
        random = is_random(key)
        axes.plot(
            curve,
            SURVIVAL[1 : len(curve) + 1],
            color=style.colour,
            linewidth=0.8 if random else 1.8,
            linestyle=style.line,
            label=drawn_label(key, one),
            zorder=2 if random else 3,
        )
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="KL(16-bit ‖ variant) of one token, nats",
        ylabel="share of tokens with at least this KL",
    )
    _shared_legend(figure, axes)
    plan, nf4 = (evaluation.variants[key]["kl_p999"] for key in ("plan", "nf4"))
    headline(
        figure,
        f"The worst token in a thousand moves by {plan:.2g} nats under the plan, by {nf4:.2g} in pure NF4",
        "A mean hides rare, large changes; this curve doesn't. Further left is better. "
        + _text_note(evaluation),
    )
    return figure


@styled
def predicted_and_real(evaluation: Evaluation) -> Figure | None:
    """Predicted against real KL; None where no sensitivity was computed."""
    pairs = {
        key: (one["predicted_kl"], one["kl_mean"])
        for key, one in evaluation.variants.items()
        if one["predicted_kl"] and one["kl_mean"] > 0
    }
    if not pairs:
        return None
    near = [key for key in pairs if evaluation.variants[key]["equal_bytes"] and _is_near(pairs, key)]
    figure = new_figure(10.0, 4.8)
    panels = figure.subplots(1, 2 if len(near) > 2 else 1, squeeze=False)[0]
    for key, (predicted, real) in pairs.items():
        label = drawn_label(key, evaluation.variants[key])
        panels[0].plot(predicted, real, linestyle="none", label=label, **marked(look(key)))
        if key in near and len(panels) > 1:
            panels[1].plot(predicted, real, linestyle="none", **marked(look(key)))
    ends = [0.7 * min(map(min, pairs.values())), 1.4 * max(map(max, pairs.values()))]
    panels[0].set(xscale="log", yscale="log", ylabel="real KL, nats a token")
    _diagonal(panels[0], ends)
    if len(panels) > 1:
        inside = [value for key in near for value in pairs[key]]
        _diagonal(panels[1], [0.93 * min(inside), 1.05 * max(inside)])
        panels[1].set_title("the plan and its controls, enlarged", fontsize=10, loc="left")
    _shared_legend(figure, panels[0])
    headline(
        figure,
        prediction_finding(pairs),
        "The prediction is a sum over layers, scaled once a format by all layers in that format. "
        + _text_note(evaluation),
    )
    return figure


def _is_near(pairs: Mapping[str, tuple[float, float]], key: str) -> bool:
    """Whether a variant's real KL lies within a factor of two of the plan's."""
    return "plan" in pairs and 0.5 <= pairs[key][1] / pairs["plan"][1] <= 2


def _diagonal(axes: Axes, ends: list[float]) -> None:
    """Square axes from ends[0] to ends[1], nats a token, with the line where a prediction is right."""
    axes.plot(ends, ends, color=GREY, linewidth=1, linestyle=":", label="predicted = real", zorder=1)
    axes.set(xlim=ends, ylim=ends, xlabel="predicted KL, nats a token")


def prediction_finding(pairs: Mapping[str, tuple[float, float]]) -> str:
    """One sentence: how far off predictions are, the plan's own among them; pairs = (predicted, real) KL."""
    off = {key: predicted / real - 1 for key, (predicted, real) in pairs.items()}
    words = (
        f"Predicted KL is off by {np.median(np.abs(list(off.values()))):.0%} (median of {len(off)} variants)"
    )
    if "plan" not in pairs:
        return words
    predicted, real = pairs["plan"]
    side = "too high" if predicted > real else "too low"
    return f"{words}; the plan's is {abs(off['plan']):.0%} {side}: {predicted:.3g} predicted, {real:.3g} real"
