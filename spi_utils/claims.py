"""What an evaluation found: evaluation.json and its one reader, the claim audited, and both in sentences.

Everything that shows an evaluation (figures, report, model card, leaderboard) reads it as an `Evaluation`,
and every verdict and number in a sentence is computed from it here. No torch.

The claim, stated for Qwen3.5-4B: keep 129 flat-spectrum layers in FP16 (3.9 GB), the rest, "90 %", in NF4;
~16 GB become ~6.4 GB; perplexity falls from 7.79 to 6.74 because quantization cancels noise; 9.85 tokens/s on
a T4. To add a row to its audit, write one function and put it into `CLAIMS`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from spi_utils import runs, stats
from spi_utils.errors import RunError
from spi_utils.formats import gigabytes
from spi_utils.plan import EQUAL, held_words
from spi_utils.stats import OPEN, REFUTED, SUPPORTED, Estimate

SCHEMA = 1
# Shares of tokens at which the KL survival curve is stored: 1, 0.79, 0.63 … down to 1e-5.
SURVIVAL = tuple(float(10 ** (-step / 10)) for step in range(51))


@dataclass(frozen=True)
class Evaluation:
    """The content of evaluation.json.

    `model` is the source's identity, `plan` what the plan keeps and weighs, `settings` what was asked for,
    `text` the first text and its windows, `variants` {key: numbers} on it (`evaluate` defines them),
    `other_texts` [{"text", "variants"}] the same on further texts, `skipped` {control: why},
    `checkpoint` what the saved file was found to hold and `checkpoint_sha256` which file that was, `hashes`
    of everything that went in, `kernel` which arithmetic ran, `tasks` multiple-choice scores, `claims` the
    audit's rows, `stock` what the model as loaded gave (empty in evaluations of before).
    """

    model: dict[str, Any]
    plan: dict[str, Any]
    settings: dict[str, Any]
    text: dict[str, Any]
    variants: dict[str, dict[str, Any]]
    other_texts: list[dict[str, Any]]
    skipped: dict[str, str]
    checkpoint: dict[str, Any]
    checkpoint_sha256: str
    hashes: dict[str, str]
    kernel: str
    tasks: dict[str, Any] = field(default_factory=dict)
    claims: list[dict[str, Any]] = field(default_factory=list)
    stock: dict[str, Any] = field(default_factory=dict)

    def write(self, path: Path) -> None:
        """Write evaluation.json atomically."""
        runs.write_json(path, {"schema": SCHEMA, **asdict(self)})

    @classmethod
    def read(cls, path: Path) -> Evaluation:
        """Read evaluation.json; RunError if it is missing, truncated, damaged or of another schema."""
        held = runs.read_json(path, SCHEMA, "evaluation", runs.NOTEBOOKS["evaluate"])
        del held["schema"]
        again = f"Run notebook {runs.NOTEBOOKS['evaluate']} again with force=True."
        # what JSON makes of a field's type, e.g. "dict[str, Any]"
        kinds = {
            one.name: {"dict": dict, "list": list, "str": str}[str(one.type).split("[")[0]]
            for one in fields(cls)
        }
        needed = {one.name for one in fields(cls) if one.default_factory is MISSING}
        if odd := sorted(needed - held.keys()) + sorted(held.keys() - kinds.keys()):
            raise RunError(
                f"{path}: this evaluation lacks entries or has unknown ones: {', '.join(odd)}. {again}"
            )
        if wrong := next((name for name, value in held.items() if not isinstance(value, kinds[name])), None):
            raise RunError(
                f"{path}: {wrong!r} should be a {kinds[wrong].__name__}, found {held[wrong]!r:.60}. {again}"
            )
        return cls(**held)

    def table(self) -> pd.DataFrame:
        """A row a variant: what a notebook shows. Sizes in GB (10⁹ bytes), losses in nats a token."""
        rows = [
            {
                "variant": one["label"],
                "GB": one["bytes"] / 1e9,
                "matrix bits": one["matrix_bits"],
                "perplexity": one["perplexity"],
                "Δ loss": one.get("delta", {}).get("mean", 0.0),
                "Δ low": one.get("delta", {}).get("low", 0.0),
                "Δ high": one.get("delta", {}).get("high", 0.0),
                "KL": one["kl_mean"],
                "KL 99.9 %": one["kl_p999"],
                "same top-1": one["same_top1"],
                "predicted KL": one["predicted_kl"],
            }
            for one in self.variants.values()
        ]
        return pd.DataFrame(rows, index=list(self.variants))

    def delta(self, key: str) -> Estimate:
        """A variant's loss minus the reference's, nats a token, over the first text's windows."""
        return Estimate.from_dict(self.variants[key]["delta"])

    def difference(self, key: str, other: str, values: str = "window_kl") -> Estimate:
        """A variant minus another on the same windows, `window_kl` or `window_nll`, nats a token."""
        ours, theirs = self.variants[key][values], self.variants[other][values]
        return stats.paired(ours, theirs, seed=self.settings["seed"])

    def selection(self) -> Estimate | None:
        """The plan's KL minus the random controls' mean at equal bytes; None where none were scored."""
        held = self.variants["plan"].get("vs_random")
        return None if held is None else Estimate.from_dict(held["kl"])

    def randoms(self) -> list[dict[str, Any]]:
        """The numbers of the random controls, in order of their seeds."""
        return [one for key, one in self.variants.items() if is_random(key)]

    def no_larger(self) -> list[str]:
        """The variants in the plan's bytes or fewer, the plan itself left out."""
        most = self.variants["plan"]["bytes"] * (1 + EQUAL)
        return [key for key, one in self.variants.items() if key != "plan" and one["bytes"] <= most]


def is_random(key: str) -> bool:
    """Whether a variant is one of the random controls (`random_0`…)."""
    return key.startswith("random_")


def interval(one: Estimate) -> str:
    """ "−0.1450 (−0.1650 … −0.1250)"."""
    return f"{one.mean:+.4f} ({one.low:+.4f} … {one.high:+.4f})".replace("-", "−")


# --- the audit -------------------------------------------------------------------------------------------
# Rows on quality get their verdict from an interval over windows: supported, refuted or not separable. Rows
# of arithmetic are supported if what was measured rounds to what was stated, else refuted. What was left out
# is not tested, and rows on the original model's own numbers say where another model was run.

ORIGINAL = "Qwen/Qwen3.5-4B"
STATED_LAYERS, STATED_GB = 129, 3.9
STATED_FROM_GB, STATED_TO_GB = 16.0, 6.4
STATED_SAVING = 1 - STATED_TO_GB / STATED_FROM_GB
STATED_REST = 0.90
STATED_PPL = (7.79, 6.74)
STATED_GAIN = math.log(STATED_PPL[1] / STATED_PPL[0])  # nats a token
STATED_RATE = 9.85  # tokens/s on a T4
T4_BANDWIDTH = 320e9  # bytes/s, NVIDIA's data sheet
NOT_TESTED = "not tested"
NEEDS_ORIGINAL = f"needs {ORIGINAL}"

Measured = tuple[str, str]  # what was measured, in words, and the verdict


def audit(evaluation: Evaluation, speed: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
    """Every row of the audit for an evaluation of whatever model.

    Args:
        evaluation: all that was measured (its own `claims` are not read).
        speed: run.json's `speed` of the evaluate stage; times never stand in evaluation.json, so without it
            the row on speed holds the arithmetic alone.

    Returns:
        `key`, `stated`, `measured`, `verdict`, and `original`: whether what was stated are the original
        model's own numbers.
    """
    rows = []
    for key, (words, measure, original) in CLAIMS.items():
        stated, (measured, verdict) = words.format(score=evaluation.plan["score"]), measure(evaluation)
        if original and not is_original(evaluation):
            verdict = NEEDS_ORIGINAL
        rows.append((key, stated, measured, verdict, original))
    rows.append(("speed", f"{STATED_RATE} tokens/s on a T4", *_speed(evaluation, speed), True))
    names = ("key", "stated", "measured", "verdict", "original")
    return [dict(zip(names, row, strict=True)) for row in rows]


def is_original(evaluation: Evaluation) -> bool:
    """Whether the audited model is the one that the claim is about."""
    return Path(evaluation.model["id"]).name.lower() == Path(ORIGINAL).name.lower()


def _held(agrees: bool) -> str:
    return SUPPORTED if agrees else REFUTED


def _kept(evaluation: Evaluation) -> Measured:
    plan = evaluation.plan
    held = 2 * plan["protected_weights"]
    agrees = plan["protected"] == STATED_LAYERS and abs(held / 1e9 - STATED_GB) < 0.05
    return f"{plan['protected']} of {plan['planned']} matrices, {gigabytes(held)} in 16-bit", _held(agrees)


def _rest(evaluation: Evaluation) -> Measured:
    plan = evaluation.plan
    share = 1 - plan["protected_weights"] / plan["matrix_weights"]
    measured = (
        f"{share:.0%} of the matrices' weights are quantized ({plan['matrix_bits']:.1f} matrix bits, "
        f"{plan['bits_per_weight']:.1f} bits a weight)"
    )
    return measured, _held(abs(share - STATED_REST) <= 0.05)


def _size(evaluation: Evaluation) -> Measured:
    full, ours = evaluation.variants["reference"]["bytes"], evaluation.plan["bytes_on_disk"]
    measured = (
        f"{gigabytes(full)} in 16-bit ({gigabytes(2 * full)} would be FP32) become {gigabytes(ours)}; "
        f"pure NF4 is {gigabytes(evaluation.variants['nf4']['bytes'])}"
    )
    return measured, _held(abs(full / 1e9 - STATED_FROM_GB) < 0.5 and abs(ours / 1e9 - STATED_TO_GB) < 0.05)


def _saving(evaluation: Evaluation) -> Measured:
    saved = 1 - evaluation.plan["bytes_on_disk"] / evaluation.variants["reference"]["bytes"]
    return f"{saved:.0%} smaller than its 16-bit self", _held(abs(saved - STATED_SAVING) <= 0.05)


def _as_stated(evaluation: Evaluation) -> str:
    """The variant that the claim is about: the plan as bitsandbytes rounds it."""
    return "plan_nearest" if "plan_nearest" in evaluation.variants else "plan"


def _better(evaluation: Evaluation) -> Measured:
    key = _as_stated(evaluation)
    plan, reference, delta = evaluation.variants[key], evaluation.variants["reference"], evaluation.delta(key)
    measured = (
        f"{reference['perplexity']:.3f} → {plan['perplexity']:.3f}: {interval(delta)} nats a token; "
        f"{plan['effect']['share_improved']:.0%} of windows improve"
    )
    return measured, stats.verdict(delta, "lower")


def _gain(evaluation: Evaluation) -> Measured:
    """Whether the interval agrees with the stated effect: it holds the value, and not zero as well."""
    delta = evaluation.delta(_as_stated(evaluation))
    if delta.clusters < stats.MIN_CLUSTERS:
        verdict = OPEN
    elif not delta.low <= STATED_GAIN <= delta.high:
        verdict = REFUTED
    else:
        verdict = OPEN if delta.low <= 0 <= delta.high else SUPPORTED
    return f"{interval(delta)} nats a token", verdict


def _noise(evaluation: Evaluation) -> Measured:
    if "noise" not in evaluation.variants:
        return "the control `noise` was not run (profile full)", NOT_TESTED
    ours = _as_stated(evaluation)
    loss, kl = (evaluation.difference(ours, "noise", values) for values in ("window_nll", "window_kl"))
    measured = f"NF4 − noise: loss {interval(loss)}, KL {interval(kl)} nats a token"
    return measured, stats.verdict(loss, "lower")


def _random(evaluation: Evaluation) -> Measured:
    kl, held = evaluation.selection(), evaluation.variants["plan"].get("vs_random")
    if kl is None or held is None:
        return "no random control was run", NOT_TESTED
    beaten = f"{held['kl_beats']} of {held['controls']} draws"
    return f"KL {interval(kl)} against the random mean; lower than {beaten}", stats.verdict(kl, "lower")


def _against(control: str, words: str) -> Callable[[Evaluation], Measured]:
    """Compares the plan's KL with a control's, window by window."""

    def measure(evaluation: Evaluation) -> Measured:
        if control not in evaluation.variants:
            return f"the control `{control}` was not run", NOT_TESTED
        kl = evaluation.difference("plan", control)
        plan, other = evaluation.variants["plan"], evaluation.variants[control]
        measured = (
            f"KL {plan['kl_mean']:.4f} at {gigabytes(plan['bytes'])}, {words} {other['kl_mean']:.4f} at "
            f"{gigabytes(other['bytes'])}: {interval(kl)}"
        )
        return measured, stats.verdict(kl, "lower")

    return measure


def _texts(evaluation: Evaluation) -> Measured:
    texts = [(evaluation.text["name"], evaluation.variants)]
    texts += [(other["text"]["name"], other["variants"]) for other in evaluation.other_texts]
    ours = _as_stated(evaluation)
    deltas = [(name, Estimate.from_dict(numbers[ours]["delta"])) for name, numbers in texts]
    measured = "; ".join(f"{name}: {interval(delta)}" for name, delta in deltas)
    if len(deltas) < 2:
        return f"{measured} (one text only; profile full has two)", NOT_TESTED
    verdicts = {stats.verdict(delta, "lower") for _, delta in deltas}
    return measured, verdicts.pop() if len(verdicts) == 1 else OPEN


def _verified(evaluation: Evaluation) -> Measured:
    hashes, found = evaluation.hashes, evaluation.checkpoint
    names = ("weights", "layers", "plan", "checkpoint", "code", f"text:{evaluation.text['name']}")
    held = " and ".join(
        f"{count} {'16-bit' if fmt == '16bit' else fmt} matrices" for fmt, count in found.items()
    )
    measured = ", ".join(f"{name} {hashes[name][:10]}" for name in names if name in hashes)
    whole = all(name in hashes for name in names) and sum(found.values()) == evaluation.plan["planned"]
    return f"SHA-256: {measured}; the file holds {held}", _held(whole)


def _speed(evaluation: Evaluation, speed: Mapping[str, Any] | None) -> Measured:
    """The T4's bandwidth bounds decoding: bytes/s over the bytes that one token reads."""
    allowed = {key: T4_BANDWIDTH / evaluation.variants[key]["bytes"] for key in ("plan", "reference", "nf4")}
    arithmetic = (
        f"a T4's bandwidth allows this model {allowed['plan']:.0f} tokens/s (in 16-bit "
        f"{allowed['reference']:.0f}, in NF4 {allowed['nf4']:.0f})"
    )
    if not speed:
        return f"{arithmetic}; speed was not measured", NOT_TESTED
    ours, full = speed["plan"], speed["reference"]
    median, least, most = ours["decode"]
    measured = (
        f"{median:.1f} tokens/s ({least:.1f}–{most:.1f}) on {ours['device']}, where bandwidth allows "
        f"{ours['decode_bound']:.0f}; the 16-bit model, run in {full['dtype']}, {full['decode'][0]:.1f}. "
        f"By arithmetic {arithmetic}"
    )
    if is_original(evaluation) and "T4" in ours["device"]:
        return measured, _held(least <= STATED_RATE <= most)
    return measured, f"{NEEDS_ORIGINAL} on a T4"


# key: what was stated ({score} is the plan's), what measures it, and whether only the original model can
CLAIMS: dict[str, tuple[str, Callable[[Evaluation], Measured], bool]] = {
    "kept": (f"{STATED_LAYERS} layers stay in FP16 and weigh {STATED_GB} GB", _kept, True),
    "rest": (f"the rest, {STATED_REST:.0%} of the model, is NF4", _rest, True),
    "size": (f"~{STATED_FROM_GB:.0f} GB become ~{STATED_TO_GB} GB", _size, True),
    "saving": (f"{STATED_SAVING:.0%} smaller", _saving, True),
    "better": ("the hybrid's perplexity is lower than its 16-bit self's", _better, False),
    "gain": (f"{STATED_PPL[0]} → {STATED_PPL[1]}, −{-STATED_GAIN:.3f} nats a token", _gain, True),
    "noise": ("NF4 acts as noise cancelling: it does better than noise of the same size", _noise, False),
    "random": ("`{score}` finds the layers worth keeping: better than random at equal bytes", _random, False),
    "direction": (
        "the score's protected end is the better one",
        _against("other_direction", "the other end"),
        False,
    ),
    "int8": (
        "at these bytes a 16-bit/NF4 hybrid is the better trade",
        _against("int8", "int8 everywhere"),
        False,
    ),
    "fisher": (
        "no better layers could be kept at these bytes",
        _against("fisher", "Fisher's choice"),
        False,
    ),
    "rounding": (
        "guided rounding brings the plan nearer to its 16-bit self",
        _against("plan_nearest", "nearest levels"),
        False,
    ),
    "texts": ("the gain holds beyond one text", _texts, False),
    "verified": ("the numbers can be traced to exact inputs", _verified, False),
}


# --- in sentences ----------------------------------------------------------------------------------------

# Variants that may hold more than two formats: what they were chosen from.
MIXES = {"fisher_int8": "NF4, int8 and 16-bit", "fisher_int4": "int4, int8 and 16-bit"}
# Variants that a stock checkpoint can hold, and the parameters that make them; {bits} are the plan's.
RECIPES = {
    "fisher": "-p score fisher -p rule matrix_bits -p value {bits}",
    "fisher_int4": "-p backend compressed-tensors -p score fisher -p rule matrix_bits -p value {bits}",
    "int8": '-p backend compressed-tensors -p formats "[int8, 16bit]" -p rule top_k -p value 0',
    "nf4": "-p rule top_k -p value 0",
}
WORTH = {
    SUPPORTED: "the selection beats random layers at equal bytes",
    REFUTED: "random layers at equal bytes do better",
    OPEN: "the selection can't be told from random layers at equal bytes",
}


def headline_of(evaluation: Evaluation) -> str:
    """What this file is worth, the better one with the command that makes it, and the dearest layer."""
    variants, kept = evaluation.variants, evaluation.plan
    plan, reference = variants["plan"], variants["reference"]
    ratio, low, high = plan["perplexity_ratio"]
    saved = 1 - kept["bytes_on_disk"] / reference["bytes"]
    parts = [
        f"{kept['protected']} of {kept['planned']} matrices in 16-bit, the others quantized: "
        f"{gigabytes(reference['bytes'])} become {gigabytes(kept['bytes_on_disk'])} (−{saved:.0%}), and "
        f"perplexity {reference['perplexity']:.2f} becomes {plan['perplexity']:.2f} "
        f"(×{ratio:.3f}, 95 % interval {low:.3f}–{high:.3f})."
    ]
    if "plan_nearest" in variants:
        gain = evaluation.difference("plan", "plan_nearest")
        parts.append(
            f"Guided rounding makes its KL (float32, from the file's tensors) {plan['kl_mean']:.4f} nats a "
            f"token; bitsandbytes' nearest levels give {variants['plan_nearest']['kl_mean']:.4f} in the same "
            f"bytes (difference {gain.mean:+.4f}, 95 % interval {gain.low:+.4f} … {gain.high:+.4f})."
        )
    if (worth := evaluation.selection()) is not None:
        parts.append(f"By KL to the 16-bit model, {WORTH[stats.verdict(worth, 'lower')]}.")
    return " ".join(filter(None, [*parts, better_sentence(evaluation), dearest_sentence(evaluation)]))


def better_sentence(evaluation: Evaluation) -> str:
    """The best file that can be made in these bytes or fewer, with its command.

    Empty where none of the variants that a writer holds has a lower KL than the plan, by an interval.
    """
    variants = evaluation.variants
    plan = variants["plan"]
    better = [
        key
        for key in evaluation.no_larger()
        if key in RECIPES and stats.verdict(evaluation.difference(key, "plan"), "lower") == SUPPORTED
    ]
    if not better:
        return ""
    best = min(better, key=lambda key: variants[key]["kl_mean"])
    mix = variants[best]
    recipe = RECIPES[best].format(bits=f"{evaluation.plan['matrix_bits']:.2f}")
    model = runs.typed_model(evaluation.model)
    smaller = (
        "these bytes" if mix["bytes"] > plan["bytes"] * (1 - EQUAL) else f"only {gigabytes(mix['bytes'])}"
    )
    chosen = best.startswith("fisher")
    what = f"{held_words(mix['layers'])} chosen by predicted cost" if chosen else mix["label"]
    return (
        f"A better file of {smaller}: {what}, KL {mix['kl_mean']:.4f} instead of {plan['kl_mean']:.4f} "
        "(float32, from the file's tensors): "
        f"`spi-utils run -p model {model} {recipe}`."
    )


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
    gain = evaluation.difference("fisher", "plan")
    lower = 1 - fisher["kl_mean"] / plan["kl_mean"]
    change = f"lower the KL by {lower:.0%}" if lower >= 0 else f"raise the KL by {-lower:.0%}"
    mixes = "".join(
        f"; chosen from {menu} it holds {held_words(variants[key]['layers'])}, "
        f"KL {variants[key]['kl_mean']:.4f}"
        for key, menu in MIXES.items()
        if key in variants
    )
    return (
        f"Switching `score` from `{score}` to `fisher` would, at the same bytes, {change}: from "
        f"{plan['kl_mean']:.4f} to {fisher['kl_mean']:.4f} nats a token (float32, from the file's tensors; "
        f"difference {gain.mean:+.4f}, 95 % interval {gain.low:+.4f} … {gain.high:+.4f}; “fisher is better” "
        f"is {stats.verdict(gain, 'lower')}), and the "
        f"perplexity from {plan['perplexity']:.3f} to {fisher['perplexity']:.3f}{mixes}."
    )


def stock_sentence(stock: Mapping[str, Any]) -> str:
    """The KL of the model as loaded beside its file's, in a sentence; `stock` is evaluation.json's entry."""
    if stock.get("agrees") is None:
        why = stock.get("reason", "this evaluation is older than that check; run notebook 04_evaluate again")
        return f"As stock transformers loads it, the checkpoint was not scored: {why}."
    half = "not a number" if stock["kl_16bit"] is None else f"{stock['kl_16bit']:.4f}"
    return (
        f"As stock transformers loads it ({stock['dtype']} on {stock['device']}), its KL is "
        f"{stock['kl']:.4f} nats a token on the first {stock['windows']} windows; in float32 from the file's "
        f"tensors it is {stock['kl_file']:.4f} there, and the stock 16-bit model's is {half}."
    )


# --- several runs ----------------------------------------------------------------------------------------

# Rows of the audit that don't depend on which model is run: key -> what "supported" says in a few words.
QUESTIONS = {
    "better": "lower loss than 16-bit",
    "random": "beats random layers",
    "direction": "beats the score's other end",
    "int8": "beats int8 everywhere",
    "fisher": "beats Fisher's choice",
}


def evaluated_beside(run: runs.Run) -> list[Path]:
    """The evaluated runs in the folder that holds this one, itself among them, in name order.

    A folder that can't be read is named and left out; a damaged run the report names itself.
    """
    found = []
    for path in sorted(run.path.resolve().parent.iterdir()):
        one = runs.Run(path)
        try:
            if one.evaluation_json.exists() and one.info_json.exists():
                found.append(path)
        except OSError as error:
            print(f"{path} is left out of the comparison: it can't be read ({error}).")
    return found


def generalization(run_dirs: Iterable[str | Path]) -> pd.DataFrame:
    """Does it generalize? A row a run, with the audit's verdicts on what doesn't depend on the model.

    Columns: run (its folder), model, plan, text, windows, matrix bits, Δ loss with its interval, KL of plan,
    of random and of Fisher's and int8's controls, and the verdicts named in `QUESTIONS`. Losses in nats a
    token; NaN where a control was not run.

    Raises:
        RunError: a folder is no run, or has no evaluation yet.
    """
    rows = []
    for run in map(runs.existing_run, run_dirs):
        evaluation = Evaluation.read(run.evaluation_json)
        plan, variants = evaluation.plan, evaluation.variants
        delta, randoms = variants["plan"]["delta"], [one["kl_mean"] for one in evaluation.randoms()]
        controls = ("fisher", "fisher_int8", "fisher_int4", "int8")
        verdicts = {row["key"]: row["verdict"] for row in audit(evaluation)}
        rows.append(
            {
                "run": run.path.resolve().name,
                "model": runs.run_info(run)["model"]["id"],
                "plan": f"{plan['score']}, {plan['direction']}",
                "text": evaluation.text["name"],
                "windows": evaluation.text["windows"],
                "matrix bits": plan["matrix_bits"],
                "Δ loss": delta["mean"],
                "Δ low": delta["low"],
                "Δ high": delta["high"],
                "KL plan": variants["plan"]["kl_mean"],
                "KL random": float(np.mean(randoms)) if randoms else np.nan,
                **{f"KL {key}": variants.get(key, {"kl_mean": np.nan})["kl_mean"] for key in controls},
                **{key: verdicts[key] for key in QUESTIONS},
            }
        )
    return pd.DataFrame(rows).astype({"Δ low": float, "Δ high": float})  # an unbounded end is NaN


def count_verdicts(rows: pd.DataFrame, question: str) -> str:
    """How a question was answered over all runs: "supported in 1 of 3 runs, refuted in 2"."""
    counts = rows[question].value_counts(sort=False)
    first, *others = (f"{verdict} in {count}" for verdict, count in counts.items())
    return ", ".join([f"{first} of {len(rows)} runs", *others])
