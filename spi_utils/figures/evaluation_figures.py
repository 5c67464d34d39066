"""The figures of an evaluation: each a function from an Evaluation to a matplotlib Figure.

Titles state what this run found; colours are Okabe and Ito's, and markers differ too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from spi_utils import stats
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
from spi_utils.judging.measures import SURVIVAL, is_random

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from spi_utils.judging.evaluation import Evaluation


class Look(NamedTuple):
    """Colour, marker and size of a variant's point."""

    colour: str
    marker: str
    size: float = 7.0


LOOKS = {
    "reference": Look(BLACK, "*", 11),
    "nf4": Look(BLACK, "s"),
    "int8": Look(ORANGE, "D"),
    "plan": Look(VERMILLION, "o", 10),
    "other_direction": Look(PURPLE, "v"),
    "fisher": Look(GREEN, "^", 9),
    "fisher_int8": Look(GREEN, "P", 9),
    "fisher_int4": Look(BLUE, "*", 12),
    "int4": Look(ORANGE, "d"),
    "noise": Look(SKY, "X"),
    "first_last": Look(BLUE, "<"),
    "smallest_first": Look(BLUE, ">"),
    "type_prior": Look(BLUE, "h"),
}
RANDOM = Look(GREY, "o", 4.5)
RIVAL = Look(SKY, "p", 9)
FLOOR = 1e-6  # nats a token: the smallest KL that is drawn


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
    places = _dodged(evaluation.variants)
    base = evaluation.variants["reference"]["perplexity"]
    for key, one in evaluation.variants.items():
        label = drawn_label(key, one)
        if "perplexity_ratio" in one:
            _point(left, key, places[key], [base * ratio for ratio in one["perplexity_ratio"]], label)
        else:
            _point(left, key, places[key], [base, base, base], label)
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
        "Bars: 95 % intervals over windows (perplexity: of the paired ratio to 16-bit). Equal sizes stand "
        f"beside each other. {_text_note(evaluation)}",
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


def _dodged(variants: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """GB of each variant, those of (nearly) equal size moved apart by a hundredth of the axis."""
    sizes = {key: one["bytes"] / 1e9 for key, one in variants.items()}
    step = 0.024 * (max(sizes.values()) - min(sizes.values()) or 1.0)
    equal = sorted(
        (key for key, one in variants.items() if one["equal_bytes"]), key=lambda key: variants[key]["kl_mean"]
    )
    shift = {key: (rank - (len(equal) - 1) / 2) * step for rank, key in enumerate(equal)}
    return {key: size + shift.get(key, 0.0) for key, size in sizes.items()}


def _point(axes: Axes, key: str, x: float, ends: list[float], label: str) -> None:
    """A point with its interval; ends = [value, low, high]."""
    style = look(key)
    value, low, high = ends
    axes.errorbar(
        x,
        value,
        yerr=[[max(value - low, 0)], [max(high - value, 0)]],
        color=style.colour,
        marker=style.marker,
        markersize=style.size,
        markeredgecolor="white",
        markeredgewidth=0.6,
        elinewidth=1.2,
        capsize=2,
        linestyle="none",
        label=label,
        zorder=4 if key == "plan" else 3,
    )


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
    axes = figure.subplots()
    reference = np.array(evaluation.variants["reference"]["window_nll"])
    shown = [
        key
        for key in ("nf4", "plan", "other_direction", "fisher", "fisher_int8", "fisher_int4", "int8")
        if key in evaluation.variants
    ]
    for key in shown:
        one, style = evaluation.variants[key], look(key)
        difference = np.sort(np.array(one["window_nll"]) - reference)
        rank = np.arange(1, len(difference) + 1)
        mean = one["delta"]["mean"]
        axes.plot(
            rank,
            difference,
            color=style.colour,
            marker=style.marker,
            markersize=4,
            linewidth=1.2,
            label=f"{one['label']}: {mean:+.4f}",
        )
    axes.axhline(0, color=BLACK, linewidth=1)
    axes.set(xlabel="windows, sorted for each variant", ylabel="loss − 16-bit loss, nats a token")
    figure.legend(loc="outside right center", title="mean difference")
    effect = evaluation.variants["plan"]["effect"]
    windows = evaluation.text["windows"]
    improved = round(effect["share_improved"] * windows)
    headline(
        figure,
        f"Under the plan {improved} of {windows} windows have a lower loss than in 16-bit; "
        f"{len(effect['carriers'])} windows carry half of the mean difference",
        "Below the line the variant predicts the text better than the 16-bit model. "
        f"{_robustness(effect, windows)} {_text_note(evaluation)}",
    )
    return figure


def _robustness(effect: Mapping[str, Any], windows: int) -> str:
    if effect["flip_after"] >= windows:
        return "All windows agree on the sign of the plan's mean."
    return f"Without its {effect['flip_after']} strongest windows the plan's mean would change its sign."


@styled
def kl_survival(evaluation: Evaluation) -> Figure:
    """Share of tokens whose KL reaches a value, for the ends, the plan and its main controls."""
    figure = new_figure(10.0, 4.8)
    axes = figure.subplots()
    for key, one in evaluation.variants.items():
        if key == "reference":
            continue
        style, curve = look(key), np.maximum(one["kl_survival"], FLOOR)
        random = is_random(key)
        axes.plot(
            curve,
            SURVIVAL[: len(curve)],
            color=style.colour,
            linewidth=0.8 if random else 1.8,
            linestyle="--" if key in ("other_direction", "noise", "smallest_first") else "-",
            label=drawn_label(key, one),
            zorder=2 if random else 3,
        )
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="KL(16-bit ‖ variant) of one token, nats",
        ylabel="share of tokens with at least this KL",
    )
    axes.set_xlim(left=1e-5)
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
    figure = new_figure(8.6, 5.0)
    axes = figure.subplots()
    for key, (predicted, real) in pairs.items():
        style = look(key)
        axes.plot(
            predicted,
            real,
            color=style.colour,
            marker=style.marker,
            markersize=style.size,
            markeredgecolor="white",
            linestyle="none",
            label=drawn_label(key, evaluation.variants[key]),
        )
    ends = [0.7 * min(map(min, pairs.values())), 1.4 * max(map(max, pairs.values()))]
    axes.plot(ends, ends, color=GREY, linewidth=1, linestyle=":", label="predicted = real")
    axes.set(xscale="log", yscale="log", xlim=ends, ylim=ends)
    axes.set(xlabel="predicted KL, nats a token", ylabel="real KL, nats a token")
    _shared_legend(figure, axes)
    off = np.median([abs(real / predicted - 1) for predicted, real in pairs.values()])
    headline(
        figure,
        f"Predicted KL is off by {off:.0%} (median of {len(pairs)} variants)",
        "The prediction is a sum over layers, scaled once a format by all layers in that format. "
        + _text_note(evaluation),
    )
    return figure
