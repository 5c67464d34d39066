"""What an evaluation found, in sentences: every number and verdict in them is computed from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from spi_utils import stats
from spi_utils.formats import gigabytes
from spi_utils.judging.evaluation import Evaluation
from spi_utils.plan import held_words

# Variants that may hold more than two formats: what they were chosen from.
MIXES = {"fisher_int8": "NF4, int8 and 16-bit", "fisher_int4": "int4, int8 and 16-bit"}
# Variants that a stock checkpoint can hold, and the parameters that make them; {bits} are the plan's.
RECIPES = {
    "fisher": "-p score fisher -p rule matrix_bits -p value {bits}",
    "fisher_int4": "-p backend compressed-tensors -p score fisher -p rule matrix_bits -p value {bits}",
    "int8": '-p backend compressed-tensors -p formats "[int8, 16bit]" -p rule top_k -p value 0',
    "nf4": "-p rule top_k -p value 0",
}
SLACK = 0.005  # of the plan's bytes: "the same size", as the controls mean it


def headline_of(evaluation: Evaluation) -> str:
    """What this file is worth, the better one with the command that makes it, and the dearest layer."""
    parts = (
        _gist(evaluation),
        _rounding(evaluation),
        _worth(evaluation),
        better_sentence(evaluation),
        dearest_sentence(evaluation),
    )
    return " ".join(filter(None, parts))


def _rounding(evaluation: Evaluation) -> str:
    """What guided rounding changes at the same bytes, where the run has it."""
    variants = evaluation.variants
    if "plan_nearest" not in variants:
        return ""
    plan, nearest = variants["plan"], variants["plan_nearest"]
    paired = stats.paired(plan["window_kl"], nearest["window_kl"], seed=evaluation.settings["seed"])
    return (
        f"Guided rounding makes its KL (float32, from the file's tensors) {plan['kl_mean']:.4f} nats a "
        f"token; bitsandbytes' nearest levels give {nearest['kl_mean']:.4f} in the same bytes (difference "
        f"{paired.mean:+.4f}, 95 % interval {paired.low:+.4f} … {paired.high:+.4f})."
    )


def _gist(evaluation: Evaluation) -> str:
    variants, kept = evaluation.variants, evaluation.plan
    plan, reference = variants["plan"], variants["reference"]
    ratio, low, high = plan["perplexity_ratio"]
    saved = 1 - kept["bytes_on_disk"] / reference["bytes"]
    return (
        f"{kept['protected']} of {kept['planned']} matrices in 16-bit, the others quantized: "
        f"{gigabytes(reference['bytes'])} become {gigabytes(kept['bytes_on_disk'])} (−{saved:.0%}), and "
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


def better_sentence(evaluation: Evaluation) -> str:
    """The best file that can be made in these bytes or fewer, with its command.

    Empty where none of the variants that a writer holds has a lower KL than the plan, by an interval.
    """
    variants = evaluation.variants
    plan = variants["plan"]
    found = [
        key
        for key in RECIPES
        if key in variants
        and variants[key]["bytes"] <= plan["bytes"] * (1 + SLACK)
        and stats.verdict(_against_plan(evaluation, key), "lower") == "supported"
    ]
    if not found:
        return ""
    best = min(found, key=lambda key: variants[key]["kl_mean"])
    mix = variants[best]
    bits = f"{evaluation.plan['matrix_bits']:.2f}"
    model = {"bundled": "bundled", "hub": evaluation.model["id"]}.get(evaluation.model["kind"], "MODEL")
    smaller = (
        "these bytes" if mix["bytes"] > plan["bytes"] * (1 - SLACK) else f"only {gigabytes(mix['bytes'])}"
    )
    chosen = best.startswith("fisher")
    what = f"{held_words(mix['layers'])} chosen by predicted cost" if chosen else mix["label"]
    return (
        f"A better file of {smaller}: {what}, KL {mix['kl_mean']:.4f} "
        f"instead of {plan['kl_mean']:.4f} (float32, from the file's tensors): "
        f"`spi-utils run -p model {model} {RECIPES[best].format(bits=bits)}`."
    )


def _against_plan(evaluation: Evaluation, key: str) -> stats.Estimate:
    one, plan = evaluation.variants[key], evaluation.variants["plan"]
    return stats.paired(one["window_kl"], plan["window_kl"], seed=evaluation.settings["seed"])


def dearest_sentence(evaluation: Evaluation) -> str:
    """The layer that costs most of those that the plan quantized, by prediction; empty if unknown."""
    dearest, kl = evaluation.plan.get("dearest"), evaluation.variants["plan"]["kl_mean"]
    if dearest is None or dearest["predicted_kl"] < 0.1 * kl:
        return ""
    name = dearest["name"].removeprefix("model.layers.").removeprefix("transformer.h.")
    return (
        f"Of the layers that the plan quantizes, `{name}` costs most: {dearest['predicted_kl']:.3f} nats a "
        f"token are predicted for its {dearest['format']} alone."
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
        f"{plan['kl_mean']:.4f} to {fisher['kl_mean']:.4f} nats a token (float32, from the file's tensors; "
        f"difference {paired.mean:+.4f}, 95 % interval {paired.low:+.4f} … {paired.high:+.4f}; “fisher is "
        f"better” is {verdict}), and the perplexity from {plan['perplexity']:.3f} to "
        f"{fisher['perplexity']:.3f}"
    )
    for key, menu in MIXES.items():
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
