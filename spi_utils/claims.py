"""What an evaluation found: evaluation.json and its one reader, the claim audited, and both in sentences.

Everything that shows an evaluation (figures, report, model card, leaderboard) reads it as an `Evaluation`,
and every verdict and number in a sentence is computed from it here. No torch.

The claim, stated for Qwen3.5-4B: keep 129 flat-spectrum layers in FP16 (3.9 GB), the rest, "90 %", in NF4;
~16 GB become ~6.4 GB; perplexity falls from 7.79 to 6.74 because quantization cancels noise; 9.85 tokens/s on
a T4. A row of its audit is what was stated, in `STATED`, and what measures it, in `audit`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from spi_utils import runs, stats
from spi_utils.formats import gigabytes
from spi_utils.plan import EQUAL, held_words
from spi_utils.stats import OPEN, REFUTED, SUPPORTED, Estimate, verdict
from spi_utils.texts import CHAT

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
        notebook = runs.NOTEBOOKS["evaluate"]
        with runs.believing(path, "evaluation", notebook):
            held = runs.read_json(path, SCHEMA, "evaluation", notebook)
            del held["schema"]
            kinds = {"other_texts": list, "claims": list, "checkpoint_sha256": str, "kernel": str}
            if odd := [name for name, value in held.items() if not isinstance(value, kinds.get(name, dict))]:
                raise TypeError(f"{', '.join(odd)} can't be read")
            return cls(**held)

    @property
    def by_text(self) -> list[dict[str, Any]]:
        """The first text and the others, each {"text", "variants"}."""
        return [{"text": self.text, "variants": self.variants}, *self.other_texts]

    def table(self) -> pd.DataFrame:
        """A row a variant: what a notebook shows. Sizes in GB (10⁹ bytes), losses in nats a token."""
        rows = []
        for one in self.variants.values():
            delta = one.get("delta", {"mean": 0.0, "low": 0.0, "high": 0.0})  # none: the reference itself
            row = {"variant": one["label"], "GB": one["bytes"] / 1e9, "matrix bits": one["matrix_bits"]}
            row |= {"perplexity": one["perplexity"], "Δ loss": delta["mean"], "Δ low": delta["low"]}
            row |= {"Δ high": delta["high"], "KL": one["kl_mean"], "KL 99.9 %": one["kl_p999"]}
            rows.append(row | {"same top-1": one["same_top1"], "predicted KL": one["predicted_kl"]})
        return pd.DataFrame(rows, index=list(self.variants))

    def difference(self, key: str, other: str, values: str = "window_kl") -> Estimate:
        """A variant minus another on the same windows, `window_kl` or `window_nll`, nats a token."""
        ours, theirs = self.variants[key][values], self.variants[other][values]
        return stats.paired(ours, theirs, seed=self.settings["seed"])


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
NOT_TESTED = "not tested"
NEEDS_ORIGINAL = f"needs {ORIGINAL}"
T4_BANDWIDTH = 320e9  # bytes/s, NVIDIA's data sheet
GAIN = math.log(6.74 / 7.79)  # the stated one, nats a token
STATED = {  # {score} is the plan's
    "kept": "129 layers stay in FP16 and weigh 3.9 GB",
    "rest": "the rest, 90% of the model, is NF4",
    "size": "~16 GB become ~6.4 GB",
    "saving": "60% smaller",
    "better": "the hybrid's perplexity is lower than its 16-bit self's",
    "gain": f"7.79 → 6.74, −{-GAIN:.3f} nats a token",
    "noise": "NF4 acts as noise cancelling: it does better than noise of the same size",
    "random": "`{score}` finds the layers worth keeping: better than random at equal bytes",
    "direction": "the score's protected end is the better one",
    "int8": "at these bytes a 16-bit/NF4 hybrid is the better trade",
    "fisher": "no better layers could be kept at these bytes",
    "rounding": "guided rounding brings the plan nearer to its 16-bit self",
    "texts": "the gain holds beyond one text",
    "verified": "the numbers can be traced to exact inputs",
    "speed": "9.85 tokens/s on a T4",
}
OF_ORIGINAL = ("kept", "rest", "size", "saving", "gain")  # its own numbers, and those on speed
AGAINST = {  # row: the control that the plan's KL is compared with, and its words
    "direction": ("other_direction", "the other end"),
    "int8": ("int8", "int8 everywhere"),
    "fisher": ("fisher", "Fisher's choice"),
    "rounding": ("plan_nearest", "nearest levels"),
}


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
    original = Path(evaluation.model["id"]).name.lower() == Path(ORIGINAL).name.lower()
    found = _quality(evaluation) | _arithmetic(evaluation, speed, original)
    rows = []
    for key, words in STATED.items():
        measured, judged = found[key]
        if isinstance(judged, bool):
            judged = SUPPORTED if judged else REFUTED
        if key in OF_ORIGINAL and not original:
            judged = NEEDS_ORIGINAL
        stated = {"key": key, "stated": words.format(score=evaluation.plan["score"]), "measured": measured}
        rows.append(stated | {"verdict": judged, "original": key in (*OF_ORIGINAL, "speed")})
    return rows


def _quality(evaluation: Evaluation) -> dict[str, tuple[str, str | bool]]:
    """{row: what was measured, its verdict} of the rows that an interval decides."""
    variants = evaluation.variants
    # What the claim is about is the plan as bitsandbytes rounds it.
    key = "plan_nearest" if "plan_nearest" in variants else "plan"
    plan, stated, drawn = variants["plan"], variants[key], variants["plan"].get("vs_random")
    delta = Estimate.from_dict(stated["delta"])
    # Of the model's own writing no other model can have a lower loss: a chat can't answer for the claim.
    others = [one for one in evaluation.by_text if one["text"]["name"] != CHAT]
    deltas = {one["text"]["name"]: Estimate.from_dict(one["variants"][key]["delta"]) for one in others}
    verdicts = {verdict(one, "lower") for one in deltas.values()}
    words = (
        f"{variants['reference']['perplexity']:.3f} → {stated['perplexity']:.3f}: {interval(delta)} nats a "
        f"token; {stated['effect']['share_improved']:.0%} of windows improve"
    )
    found: dict[str, tuple[str, str | bool]] = {"better": (words, verdict(delta, "lower"))}
    # An interval that holds the stated gain supports it, unless it holds zero as well.
    agrees = delta.low <= GAIN <= delta.high
    unclear = delta.clusters < stats.MIN_CLUSTERS or (agrees and delta.low <= 0 <= delta.high)
    found["gain"] = f"{interval(delta)} nats a token", OPEN if unclear else agrees
    found["noise"] = "the control `noise` was not run (profile full)", NOT_TESTED
    if "noise" in variants:
        loss, kl = (evaluation.difference(key, "noise", name) for name in ("window_nll", "window_kl"))
        words = f"NF4 − noise: loss {interval(loss)}, KL {interval(kl)} nats a token"
        found["noise"] = words, verdict(loss, "lower")
    found["random"] = "no random control was run", NOT_TESTED
    if drawn is not None:
        kl, beaten = Estimate.from_dict(drawn["kl"]), f"{drawn['kl_beats']} of {drawn['controls']} draws"
        words = f"KL {interval(kl)} against the random mean; lower than {beaten}"
        found["random"] = words, verdict(kl, "lower")
    for row, (control, name) in AGAINST.items():
        found[row] = f"the control `{control}` was not run", NOT_TESTED
        if control in variants:
            kl, other = evaluation.difference("plan", control), variants[control]
            words = (
                f"KL {plan['kl_mean']:.4f} at {gigabytes(plan['bytes'])}, {name} {other['kl_mean']:.4f} at "
            )
            found[row] = f"{words}{gigabytes(other['bytes'])}: {interval(kl)}", verdict(kl, "lower")
    words = "; ".join(f"{name}: {interval(one)}" for name, one in deltas.items())
    found["texts"] = words, verdicts.pop() if len(verdicts) == 1 else OPEN
    if len(deltas) < 2:
        found["texts"] = f"{words} (fewer than two texts that the model didn't write)".strip(), NOT_TESTED
    return found


def _arithmetic(
    evaluation: Evaluation, speed: Mapping[str, Any] | None, original: bool
) -> dict[str, tuple[str, str | bool]]:
    """{row: what was measured, whether it rounds to what was stated} of the others."""
    plan, variants, hashes = evaluation.plan, evaluation.variants, evaluation.hashes
    full, size, kept = variants["reference"]["bytes"], plan["bytes_on_disk"], 2 * plan["protected_weights"]
    rest, saved = 1 - plan["protected_weights"] / plan["matrix_weights"], 1 - size / full
    found: dict[str, tuple[str, str | bool]] = {}
    words = f"{plan['protected']} of {plan['planned']} matrices, {gigabytes(kept)} in 16-bit"
    found["kept"] = words, plan["protected"] == 129 and abs(kept / 1e9 - 3.9) < 0.05
    words = f"{rest:.0%} of the matrices' weights are quantized ({plan['matrix_bits']:.1f} matrix bits, "
    found["rest"] = f"{words}{plan['bits_per_weight']:.1f} bits a weight)", abs(rest - 0.90) <= 0.05
    words = f"{gigabytes(full)} in 16-bit ({gigabytes(2 * full)} would be FP32) become {gigabytes(size)}; "
    sizes = abs(full / 1e9 - 16) < 0.5 and abs(size / 1e9 - 6.4) < 0.05
    found["size"] = f"{words}pure NF4 is {gigabytes(variants['nf4']['bytes'])}", sizes
    found["saving"] = f"{saved:.0%} smaller than its 16-bit self", abs(saved - 0.60) <= 0.05
    names = ("weights", "layers", "plan", "checkpoint", "code", f"text:{evaluation.text['name']}")
    traced = ", ".join(f"{name} {hashes[name][:10]}" for name in names if name in hashes)
    counts = evaluation.checkpoint.items()
    holds = " and ".join(f"{n} {'16-bit' if fmt == '16bit' else fmt} matrices" for fmt, n in counts)
    whole = hashes.keys() >= set(names) and sum(n for _, n in counts) == plan["planned"]
    found["verified"] = f"SHA-256: {traced}; the file holds {holds}", whole
    # A T4's bandwidth bounds decoding: bytes/s over the bytes that one token reads.
    most = {name: T4_BANDWIDTH / variants[name]["bytes"] for name in ("plan", "reference", "nf4")}
    allowed = (
        f"a T4's bandwidth allows this model {most['plan']:.0f} tokens/s (in 16-bit "
        f"{most['reference']:.0f}, in NF4 {most['nf4']:.0f})"
    )
    found["speed"] = f"{allowed}; speed was not measured", NOT_TESTED
    if speed:
        ours, half, (rate, slowest, fastest) = speed["plan"], speed["reference"], speed["plan"]["decode"]
        words = (
            f"{rate:.1f} tokens/s ({slowest:.1f}–{fastest:.1f}) on {ours['device']}, where bandwidth allows "
            f"{ours['decode_bound']:.0f}; the 16-bit model, run in {half['dtype']}, {half['decode'][0]:.1f}. "
            f"By arithmetic {allowed}"
        )
        told = original and "T4" in ours["device"]
        found["speed"] = words, slowest <= 9.85 <= fastest if told else f"{NEEDS_ORIGINAL} on a T4"
    return found


# --- in sentences ----------------------------------------------------------------------------------------

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
    """What this file is worth, and the better one with the command that makes it."""
    variants, kept = evaluation.variants, evaluation.plan
    plan, reference = variants["plan"], variants["reference"]
    ratio, low, high = plan["perplexity_ratio"]
    said = (
        f"{kept['protected']} of {kept['planned']} matrices in 16-bit, the others quantized: "
        f"{gigabytes(reference['bytes'])} become {gigabytes(kept['bytes_on_disk'])} "
        f"(−{1 - kept['bytes_on_disk'] / reference['bytes']:.0%}), and "
        f"perplexity {reference['perplexity']:.2f} becomes {plan['perplexity']:.2f} "
        f"(×{ratio:.3f}, 95 % interval {low:.3f}–{high:.3f})."
    )
    if "plan_nearest" in variants:
        said += (
            f" Guided rounding makes its KL (float32, from the file's tensors) {plan['kl_mean']:.4f} nats a "
            f"token; bitsandbytes' nearest levels give {variants['plan_nearest']['kl_mean']:.4f} in the same "
            f"bytes ({_gap(evaluation.difference('plan', 'plan_nearest'))})."
        )
    if "vs_random" in plan:
        worth = WORTH[verdict(Estimate.from_dict(plan["vs_random"]["kl"]), "lower")]
        said += f" By KL to the 16-bit model, {worth}."
    return f"{said} {better_sentence(evaluation)}".rstrip()


def _gap(one: Estimate) -> str:
    return f"difference {one.mean:+.4f}, 95 % interval {one.low:+.4f} … {one.high:+.4f}"


def better_sentence(evaluation: Evaluation) -> str:
    """The best file that can be made in these bytes or fewer, with its command.

    Empty where none of the variants that a writer holds has a lower KL than the plan, by an interval.
    """
    variants, plan = evaluation.variants, evaluation.variants["plan"]
    most = plan["bytes"] * (1 + EQUAL)
    better = [key for key in RECIPES if key in variants and variants[key]["bytes"] <= most]
    better = [key for key in better if verdict(evaluation.difference(key, "plan"), "lower") == SUPPORTED]
    if not better:
        return ""
    best = min(better, key=lambda key: variants[key]["kl_mean"])
    mix, recipe = variants[best], RECIPES[best].format(bits=f"{evaluation.plan['matrix_bits']:.2f}")
    smaller, chosen = mix["bytes"] <= plan["bytes"] * (1 - EQUAL), best.startswith("fisher")
    return (
        f"A better file of {'only ' + gigabytes(mix['bytes']) if smaller else 'these bytes'}: "
        f"{held_words(mix['layers']) + ' chosen by predicted cost' if chosen else mix['label']}, "
        f"KL {mix['kl_mean']:.4f} instead of {plan['kl_mean']:.4f} (float32, from the file's tensors): "
        f"`spi-utils run -p model {runs.typed_model(evaluation.model)} {recipe}`."
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


def generalization(run_dirs: Iterable[str | Path]) -> pd.DataFrame:
    """A row a run: what a leaderboard says of it.

    Columns: model, text, windows, matrix bits, Δ loss with its interval, KL of the plan and of controls, and
    "random": whether the plan beats random layers. Losses in nats a token; NaN where a control was not run.

    Raises:
        RunError: a folder is no run, or has no evaluation yet.
    """
    rows = []
    for run in map(runs.existing_run, run_dirs):
        evaluation = Evaluation.read(run.evaluation_json)
        delta = evaluation.variants["plan"]["delta"]
        kls = pd.Series({key: one["kl_mean"] for key, one in evaluation.variants.items()})
        kls["random"] = kls[[key for key in kls.index if is_random(key)]].mean()
        row = {"model": runs.run_info(run)["model"]["id"], "text": evaluation.text["name"]}
        row |= {"windows": evaluation.text["windows"], "matrix bits": evaluation.plan["matrix_bits"]}
        row |= {"Δ loss": delta["mean"], "Δ low": delta["low"], "Δ high": delta["high"]}
        controls = ("plan", "random", "fisher", "fisher_int8", "int8")
        row |= {f"KL {key}": kls.get(key, np.nan) for key in controls}
        rows.append(row | {"random": _quality(evaluation)["random"][1]})
    return pd.DataFrame(rows).astype({"Δ low": float, "Δ high": float})  # an unbounded end is NaN
