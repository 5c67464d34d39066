"""Token scores -> the numbers of evaluation.json: perplexities, KL, paired differences (no torch).

Definitions. With N scored tokens, `nll` = −Σ ln p(token)/N in nats, `perplexity` = e^nll; as
lm-evaluation-harness defines them, `word_perplexity` = e^(Σnll/words) and `byte_perplexity` = e^(Σnll/bytes),
words = `len(re.split(r"\\s+", text))`, bytes in UTF-8, both of the raw text behind the windows. KL is
Σ_v p_ref(v)·ln(p_ref(v)/p_var(v)) for each token, as llama.cpp's perplexity tool reports it; `same_top1` the
share of tokens where both rank the same token first; Δp = p_var(token) − p_ref(token).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from spi_utils import stats

if TYPE_CHECKING:
    from spi_utils.scoring import TokenScores

# Shares of tokens at which the KL survival curve is stored: 1, 0.79, 0.63 … down to 1e-5.
SURVIVAL = tuple(float(10 ** (-step / 10)) for step in range(51))


def count_text(pieces: Sequence[str]) -> dict[str, int]:
    """Words and bytes of the raw text behind the windows, as lm-evaluation-harness counts them."""
    words = sum(len(re.split(r"\s+", piece)) for piece in pieces)
    return {"words": words, "bytes": sum(len(piece.encode("utf-8")) for piece in pieces)}


def window_means(values: NDArray[Any]) -> NDArray[np.float64]:
    """Mean of each window in float64; values (W, T) -> (W,)."""
    return values.mean(axis=1, dtype=np.float64)


def variant_numbers(scored: TokenScores, counts: Mapping[str, int]) -> dict[str, Any]:
    """A variant's own numbers, without comparisons: perplexities, KL, flips, Δp and its window means."""
    nll = window_means(scored.nll)
    total, mean = float(scored.nll.sum(dtype=np.float64)), float(nll.mean())
    kl, dp = np.asarray(scored.kl, np.float64), np.asarray(scored.dp, np.float64)
    return {
        "nll": mean,
        "nll_se": float(stats.cluster_se(nll)),
        "perplexity": _exp(mean),
        "word_perplexity": _exp(total / counts["words"]),
        "byte_perplexity": _exp(total / counts["bytes"]),
        **stats.kl_quantiles(kl),
        "same_top1": float(np.asarray(scored.same_top1).mean()),
        "dp_mean": float(dp.mean()),
        "dp_rms": float(np.sqrt((dp**2).mean())),
        "window_nll": _rounded(nll),
        "window_kl": _rounded(window_means(kl)),
        "kl_survival": survival(kl),
    }


def survival(kl: NDArray[np.float64]) -> list[float]:
    """KL that a share of `SURVIVAL` of the tokens reaches or exceeds; shares below one token are left out."""
    flat = kl.ravel()
    shares = [share for share in SURVIVAL if share * flat.size >= 1]
    return _rounded(np.quantile(flat, [1 - share for share in shares]))


def compare(
    numbers: dict[str, dict[str, Any]], equal_bytes: Sequence[str], *, draws: int = stats.DRAWS, seed: int = 0
) -> None:
    """Add every comparison over windows to `numbers` {variant: its `variant_numbers`} in place.

    `kl` (interval of the mean KL), `delta` (loss minus the reference's, with Holm's p over all variants),
    `perplexity_ratio` with its interval, the windows behind it, and for the variants in `equal_bytes` also
    `vs_random`: loss and KL minus the mean of the random controls, Holm over those.
    """
    options = {"draws": draws, "seed": seed}
    reference = np.array(numbers["reference"]["window_nll"])
    others = [key for key in numbers if key != "reference"]
    if not others:
        return
    loss = np.array([numbers[key]["window_nll"] for key in others]).T - reference[:, None]  # (W, V)
    kl = np.array([numbers[key]["window_kl"] for key in others]).T
    deltas = stats.holm_family(dict(zip(others, stats.estimates(loss, **options), strict=True)))  # type: ignore[arg-type]
    for column, (key, one) in enumerate(zip(others, stats.estimates(kl, **options), strict=True)):  # type: ignore[arg-type]
        numbers[key]["kl"] = one.as_dict()
        numbers[key]["delta"] = deltas[key].as_dict()
        numbers[key]["perplexity_ratio"] = list(stats.ratio(deltas[key]))
        numbers[key]["effect"] = stats.effect_windows(loss[:, column])
    _compare_with_random(numbers, [key for key in equal_bytes if not is_random(key)], options)


def _compare_with_random(numbers: dict[str, dict], keys: Sequence[str], options: dict[str, Any]) -> None:
    randoms = [key for key in numbers if is_random(key)]
    keys = [key for key in keys if key in numbers]
    if not randoms or not keys:
        return
    for field, name in (("window_nll", "nll"), ("window_kl", "kl")):
        drawn = np.array([numbers[key][field] for key in randoms])  # (R, W)
        gain = np.array([numbers[key][field] for key in keys]).T - drawn.mean(axis=0)[:, None]
        family = stats.holm_family(dict(zip(keys, stats.estimates(gain, **options), strict=True)))
        for key in keys:
            held = numbers[key].setdefault("vs_random", {"controls": len(randoms)})
            held[name] = family[key].as_dict()
            held[f"{name}_beats"] = int((drawn.mean(axis=1) > np.mean(numbers[key][field])).sum())


def is_random(key: str) -> bool:
    """Whether a variant is one of the random controls (`random_0`…)."""
    return key.startswith("random_")


def _rounded(values: NDArray[np.float64]) -> list[float]:
    # float32 scores carry 7 digits; 10 decimals lose nothing and keep the file small.
    return [round(float(value), 10) for value in values]


def _exp(value: float) -> float:
    return math.exp(min(value, 700.0))
