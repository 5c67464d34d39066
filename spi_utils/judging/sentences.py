"""What an evaluation found, in sentences: every number and verdict in them is computed from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from spi_utils import stats
from spi_utils.judging.evaluation import Evaluation
from spi_utils.plan import held_words
from spi_utils.report_html import size

# Variants that may hold more than two formats: what they were chosen from, and how a plan is made like it.
MIXES = {
    "fisher_int8": ("NF4, int8 and 16-bit", ""),
    "fisher_int4": ("int4, int8 and 16-bit", " (notebook 02 with backend='compressed-tensors' makes it)"),
}


def headline_of(evaluation: Evaluation) -> str:
    """Size, perplexity, what rounding and selection are worth, and a better mix if any."""
    parts = (_gist(evaluation), _rounding(evaluation), _worth(evaluation), mix_sentence(evaluation))
    return " ".join(filter(None, parts))


def _rounding(evaluation: Evaluation) -> str:
    """What guided rounding changes at the same bytes, where the run has it."""
    variants = evaluation.variants
    if "plan_nearest" not in variants:
        return ""
    plan, nearest = variants["plan"], variants["plan_nearest"]
    paired = stats.paired(plan["window_kl"], nearest["window_kl"], seed=evaluation.settings["seed"])
    return (
        f"Guided rounding makes its KL {plan['kl_mean']:.4f} nats a token; bitsandbytes' nearest levels give "
        f"{nearest['kl_mean']:.4f} in the same bytes (difference {paired.mean:+.4f}, 95 % interval "
        f"{paired.low:+.4f} … {paired.high:+.4f})."
    )


def _gist(evaluation: Evaluation) -> str:
    variants, kept = evaluation.variants, evaluation.plan
    plan, reference = variants["plan"], variants["reference"]
    ratio, low, high = plan["perplexity_ratio"]
    saved = 1 - kept["bytes_on_disk"] / reference["bytes"]
    return (
        f"{kept['protected']} of {kept['planned']} matrices in 16-bit, the others quantized: "
        f"{size(reference['bytes'])} become {size(kept['bytes_on_disk'])} (−{saved:.0%}), and "
        f"perplexity {reference['perplexity']:.2f} becomes {plan['perplexity']:.2f} "
        f"(×{ratio:.3f}, 95 % interval {low:.3f}–{high:.3f})."
    )


def _worth(evaluation: Evaluation) -> str:
    held = evaluation.variants["plan"].get("vs_random")
    if held is None:
        return ""
    verdict = stats.verdict(stats.Estimate.from_dict(held["kl"]), "lower")
    meaning = {
        "supported": "the selection beats random layers at equal bytes",
        "refuted": "random layers at equal bytes do better",
        "not separable": "the selection can't be told from random layers at equal bytes",
    }[verdict]
    return f"By KL to the 16-bit model, {meaning}."


def mix_sentence(evaluation: Evaluation) -> str:
    """The mix worth taking home: Fisher's optimum of more formats, where it is the best at the plan's bytes.

    Empty unless its KL is the lowest of all equal-bytes variants and below the plan's by an interval.
    """
    variants = evaluation.variants
    held = [key for key in MIXES if key in variants]
    if not held:
        return ""
    best = min(held, key=lambda key: variants[key]["kl_mean"])
    mix, plan = variants[best], variants["plan"]
    paired = stats.paired(mix["window_kl"], plan["window_kl"], seed=evaluation.settings["seed"])
    least = min(one["kl_mean"] for one in variants.values() if one["equal_bytes"])
    if mix["kl_mean"] > least or stats.verdict(paired, "lower") != "supported":
        return ""
    return (
        f"The best mix at these bytes is Fisher's optimum of {held_words(mix['layers'])}{MIXES[best][1]}: "
        f"its KL is {mix['kl_mean']:.4f} nats a token, the plan's {plan['kl_mean']:.4f}."
    )


def switching_sentence(evaluation: Evaluation) -> str:
    """What switching `score` to fisher would gain, from this run's own numbers."""
    score, variants = evaluation.plan["score"], evaluation.variants
    if score == "fisher":
        return "This plan already uses `fisher`: switching the score would gain nothing."
    if "fisher" not in variants:
        why = evaluation.skipped.get("fisher", "the control `fisher` was left out of this evaluation.")
        return f"What switching `score` to `fisher` would gain was not measured: {why}"
    plan, fisher = variants["plan"], variants["fisher"]
    paired = stats.paired(fisher["window_kl"], plan["window_kl"], seed=evaluation.settings["seed"])
    lower = 1 - fisher["kl_mean"] / plan["kl_mean"]
    verdict = stats.verdict(paired, "lower")
    change = f"lower the KL by {lower:.0%}" if lower >= 0 else f"raise the KL by {-lower:.0%}"
    sentence = (
        f"Switching `score` from `{score}` to `fisher` would, at the same bytes, {change}: from "
        f"{plan['kl_mean']:.4f} to {fisher['kl_mean']:.4f} nats a token (difference {paired.mean:+.4f}, 95 % "
        f"interval {paired.low:+.4f} … {paired.high:+.4f}; “fisher is better” is {verdict}), and the "
        f"perplexity from {plan['perplexity']:.3f} to {fisher['perplexity']:.3f}"
    )
    for key, (menu, _) in MIXES.items():
        if key in variants:
            one = variants[key]
            sentence += f"; chosen from {menu} it holds {held_words(one['layers'])}, KL {one['kl_mean']:.4f}"
    return f"{sentence}."


def stock_sentence(stock: Mapping[str, Any]) -> str:
    """The KL of the model as loaded beside its file's, in a sentence; `stock` is evaluation.json's entry."""
    if stock.get("agrees") is None:
        why = stock.get("reason", "this evaluation is older than that check; run notebook 04_evaluate again")
        return f"As stock transformers loads it, the checkpoint was not scored: {why}."
    half = stock["kl_16bit"]
    half = "not a number" if half is None else f"{half:.4f}"
    return (
        f"As stock transformers loads it ({stock['dtype']} on {stock['device']}), its KL is "
        f"{stock['kl']:.4f} nats a token on the first {stock['windows']} windows; in float32 from the file's "
        f"tensors it is {stock['kl_file']:.4f} there, and the stock 16-bit model's is {half}."
    )
