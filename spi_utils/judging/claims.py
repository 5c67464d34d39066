"""The claim, audited: what was stated, what this run measured, and a verdict that is computed.

Stated (for Qwen3.5-4B): keep 129 flat-spectrum layers in FP16 (3.9 GB), the rest, "90 %", in NF4; ~16 GB
become ~6.4 GB; perplexity falls from 7.79 to 6.74 because quantization cancels noise; 9.85 tokens/s on a T4.

Statistical rows get their verdict from an interval over windows (`stats.verdict`): supported, refuted or not
separable. Arithmetic rows are supported if what was measured rounds to what was stated, else refuted. Rows
about the original model's own numbers say so when another model was run. To add a row, write one function
and put it into `ROWS`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from spi_utils import stats

if TYPE_CHECKING:
    from spi_utils.judging.evaluation import Evaluation

ORIGINAL = "Qwen/Qwen3.5-4B"
STATED_LAYERS, STATED_GB = 129, 3.9
STATED_FROM_GB, STATED_TO_GB = 16.0, 6.4
STATED_REST = 0.90
STATED_PPL = (7.79, 6.74)
STATED_RATE = 9.85  # tokens/s on a T4
T4_BANDWIDTH = 320e9  # bytes/s, NVIDIA's data sheet
NEEDS_ORIGINAL = f"needs {ORIGINAL}"
NOT_RUN = "not tested"


@dataclass(frozen=True)
class Claim:
    """One row of the audit. `original` marks rows whose stated numbers belong to the original model."""

    key: str
    stated: str
    measured: str
    verdict: str
    original: bool = False


def audit(evaluation: Evaluation, speed: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
    """Every row of the audit for an evaluation of whatever model.

    Args:
        evaluation: all that was measured (its own `claims` are not read).
        speed: run.json's `speed` of the evaluate stage; times never stand in evaluation.json, so without it
            the row on speed holds the arithmetic alone.
    """
    rows = [row(evaluation) for row in ROWS] + [_speed(evaluation, speed)]
    return [asdict(row) for row in rows]


def is_original(evaluation: Evaluation) -> bool:
    """Whether the audited model is the one that the claim is about."""
    return Path(evaluation.model["id"]).name.lower() == Path(ORIGINAL).name.lower()


def _arithmetic(evaluation: Evaluation, agrees: bool) -> str:
    if not is_original(evaluation):
        return NEEDS_ORIGINAL
    return "supported" if agrees else "refuted"


# --- rows: sizes -----------------------------------------------------------------------------------------


def _kept(evaluation: Evaluation) -> Claim:
    plan = evaluation.plan
    size = 2 * plan["protected_weights"] / 1e9
    agrees = plan["protected"] == STATED_LAYERS and abs(size - STATED_GB) < 0.05
    return Claim(
        "kept",
        f"{STATED_LAYERS} layers stay in FP16 and weigh {STATED_GB} GB",
        f"{plan['protected']} of {plan['planned']} matrices, {_gb(2 * plan['protected_weights'])} in 16-bit",
        _arithmetic(evaluation, agrees),
        original=True,
    )


def _rest(evaluation: Evaluation) -> Claim:
    plan = evaluation.plan
    share = 1 - plan["protected_weights"] / plan["matrix_weights"]
    return Claim(
        "rest",
        f"the rest, {STATED_REST:.0%} of the model, is NF4",
        f"{share:.0%} of the matrices' weights are quantized ({plan['matrix_bits']:.1f} matrix bits, "
        f"{plan['bits_per_weight']:.1f} bits a weight)",
        _arithmetic(evaluation, abs(share - STATED_REST) <= 0.05),
        original=True,
    )


def _size(evaluation: Evaluation) -> Claim:
    variants = evaluation.variants
    full, ours = variants["reference"]["bytes"], evaluation.plan["bytes_on_disk"]
    agrees = abs(full / 1e9 - STATED_FROM_GB) < 0.5 and abs(ours / 1e9 - STATED_TO_GB) < 0.05
    return Claim(
        "size",
        f"~{STATED_FROM_GB:.0f} GB become ~{STATED_TO_GB} GB",
        f"{_gb(full)} in 16-bit ({_gb(2 * full)} would be FP32) become {_gb(ours)}; "
        f"pure NF4 is {_gb(variants['nf4']['bytes'])}",
        _arithmetic(evaluation, agrees),
        original=True,
    )


def _saving(evaluation: Evaluation) -> Claim:
    stated = 1 - STATED_TO_GB / STATED_FROM_GB
    saved = 1 - evaluation.plan["bytes_on_disk"] / evaluation.variants["reference"]["bytes"]
    return Claim(
        "saving",
        f"{stated:.0%} smaller",
        f"{saved:.0%} smaller than its 16-bit self",
        _arithmetic(evaluation, abs(saved - stated) <= 0.05),
        original=True,
    )


# --- rows: quality ---------------------------------------------------------------------------------------


def _as_stated(evaluation: Evaluation) -> str:
    """The variant that the claim is about: the plan as bitsandbytes rounds it."""
    return "plan_nearest" if "plan_nearest" in evaluation.variants else "plan"


def _better(evaluation: Evaluation) -> Claim:
    plan, reference = evaluation.variants[_as_stated(evaluation)], evaluation.variants["reference"]
    delta = stats.Estimate.from_dict(plan["delta"])
    return Claim(
        "better",
        "the hybrid's perplexity is lower than its 16-bit self's",
        f"{reference['perplexity']:.3f} → {plan['perplexity']:.3f}: {_interval(delta)} nats a token; "
        f"{plan['effect']['share_improved']:.0%} of windows improve",
        stats.verdict(delta, "lower"),
    )


def _gain(evaluation: Evaluation) -> Claim:
    stated = math.log(STATED_PPL[1] / STATED_PPL[0])
    delta = stats.Estimate.from_dict(evaluation.variants[_as_stated(evaluation)]["delta"])
    text = f"{STATED_PPL[0]} → {STATED_PPL[1]}, −{-stated:.3f} nats a token"
    verdict = value_verdict(delta, stated) if is_original(evaluation) else NEEDS_ORIGINAL
    return Claim("gain", text, f"{_interval(delta)} nats a token", verdict, original=True)


def value_verdict(delta: stats.Estimate, stated: float) -> str:
    """Whether an interval agrees with a stated effect: it holds the value, and not zero as well."""
    if delta.clusters < stats.MIN_CLUSTERS:
        return "not separable"
    if not delta.low <= stated <= delta.high:
        return "refuted"
    return "not separable" if delta.low <= 0 <= delta.high else "supported"


def _noise(evaluation: Evaluation) -> Claim:
    stated = "NF4 acts as noise cancelling: it does better than noise of the same size"
    if "noise" not in evaluation.variants:
        return Claim("noise", stated, "the control `noise` was not run (profile full)", NOT_RUN)
    ours = _as_stated(evaluation)
    loss = _difference(evaluation, "noise", "window_nll", ours)
    kl = _difference(evaluation, "noise", "window_kl", ours)
    measured = f"NF4 − noise: loss {_interval(loss)}, KL {_interval(kl)} nats a token"
    return Claim("noise", stated, measured, stats.verdict(loss, "lower"))


def _random(evaluation: Evaluation) -> Claim:
    stated = f"`{evaluation.plan['score']}` finds the layers worth keeping: better than random at equal bytes"
    held = evaluation.variants["plan"].get("vs_random")
    if held is None:
        return Claim("random", stated, "no random control was run", NOT_RUN)
    kl = stats.Estimate.from_dict(held["kl"])
    beaten = f"{held['kl_beats']} of {held['controls']} draws"
    measured = f"KL {_interval(kl)} against the random mean; lower than {beaten}"
    return Claim("random", stated, measured, stats.verdict(kl, "lower"))


def _against(key: str, control: str, stated: str, words: str) -> Callable[[Evaluation], Claim]:
    """A row that compares the plan's KL with a control's, window by window."""

    def row(evaluation: Evaluation) -> Claim:
        if control not in evaluation.variants:
            return Claim(key, stated, f"the control `{control}` was not run", NOT_RUN)
        kl = _difference(evaluation, control, "window_kl")
        other, plan = evaluation.variants[control], evaluation.variants["plan"]
        measured = (
            f"KL {plan['kl_mean']:.4f} at {_gb(plan['bytes'])}, {words} {other['kl_mean']:.4f} at "
            f"{_gb(other['bytes'])}: {_interval(kl)}"
        )
        return Claim(key, stated, measured, stats.verdict(kl, "lower"))

    return row


def _texts(evaluation: Evaluation) -> Claim:
    stated = "the gain holds beyond one text"
    texts = [(evaluation.text["name"], evaluation.variants)]
    texts += [(other["text"]["name"], other["variants"]) for other in evaluation.other_texts]
    ours = _as_stated(evaluation)
    deltas = [(name, stats.Estimate.from_dict(numbers[ours]["delta"])) for name, numbers in texts]
    measured = "; ".join(f"{name}: {_interval(delta)}" for name, delta in deltas)
    if len(deltas) < 2:
        return Claim("texts", stated, f"{measured} (one text only; profile full has two)", NOT_RUN)
    verdicts = {stats.verdict(delta, "lower") for _, delta in deltas}
    return Claim("texts", stated, measured, verdicts.pop() if len(verdicts) == 1 else "not separable")


def _verified(evaluation: Evaluation) -> Claim:
    hashes = evaluation.hashes
    found = evaluation.checkpoint
    names = ("weights", "layers", "plan", "checkpoint", "code", f"text:{evaluation.text['name']}")
    measured = ", ".join(f"{name} {hashes[name][:10]}" for name in names if name in hashes)
    held = " and ".join(
        f"{count} {'16-bit' if fmt == '16bit' else fmt} matrices" for fmt, count in found.items()
    )
    whole = all(name in hashes for name in names) and sum(found.values()) == evaluation.plan["planned"]
    return Claim(
        "verified",
        "the numbers can be traced to exact inputs",
        f"SHA-256: {measured}; the file holds {held}",
        "supported" if whole else "refuted",
    )


def _speed(evaluation: Evaluation, speed: Mapping[str, Any] | None) -> Claim:
    """The T4's bandwidth bounds decoding: bytes/s over the bytes that one token reads."""
    variants = evaluation.variants
    bounds = {key: T4_BANDWIDTH / variants[key]["bytes"] for key in ("plan", "reference", "nf4")}
    measured = (
        "a T4's bandwidth allows this model {plan:.0f} tokens/s (in 16-bit {reference:.0f}, in NF4 {nf4:.0f})"
    ).format(**bounds)
    stated = f"{STATED_RATE} tokens/s on a T4"
    if not speed:
        return Claim("speed", stated, f"{measured}; speed was not measured", NOT_RUN, original=True)
    ours, full = speed["plan"], speed["reference"]
    median, least, most = ours["decode"]
    measured = (
        f"{median:.1f} tokens/s ({least:.1f}–{most:.1f}) on {ours['device']}, where bandwidth allows "
        f"{ours['decode_bound']:.0f}; the 16-bit model, run in {full['dtype']}, {full['decode'][0]:.1f}. "
        f"By arithmetic {measured}"
    )
    same = is_original(evaluation) and "T4" in ours["device"]
    verdict = (
        ("supported" if least <= STATED_RATE <= most else "refuted") if same else f"{NEEDS_ORIGINAL} on a T4"
    )
    return Claim("speed", stated, measured, verdict, original=True)


ROWS: tuple[Callable[[Evaluation], Claim], ...] = (
    _kept,
    _rest,
    _size,
    _saving,
    _better,
    _gain,
    _noise,
    _random,
    _against("direction", "other_direction", "the score's protected end is the better one", "the other end"),
    _against("int8", "int8", "at these bytes a 16-bit/NF4 hybrid is the better trade", "int8 everywhere"),
    _against("fisher", "fisher", "no better layers could be kept at these bytes", "Fisher's choice"),
    _against(
        "rounding",
        "plan_nearest",
        "guided rounding brings the plan nearer to its 16-bit self",
        "nearest levels",
    ),
    _texts,
    _verified,
)


def _difference(evaluation: Evaluation, control: str, field: str, plan: str = "plan") -> stats.Estimate:
    """Plan minus a control on the same windows."""
    ours, theirs = (np.array(evaluation.variants[key][field]) for key in (plan, control))
    return stats.paired(ours, theirs, seed=evaluation.settings["seed"])


def _interval(one: stats.Estimate) -> str:
    return f"{one.mean:+.4f} ({one.low:+.4f} … {one.high:+.4f})".replace("-", "−")


def _gb(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.3g} MB"
