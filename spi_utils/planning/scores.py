"""The scores that pick layers: one row of `SCORES` and at most one function each.

To add a score, give its statistic a column in `layers.csv` (spectra.py) and add a row here. A score is either
an *order* (protect from one end) or *additive*: nats a token that quantizing a layer costs, so that costs can
be summed and a byte budget spent exactly. The theory does not agree on the sign of α, so every score runs in
both directions: `high` protects the layers where it is high.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from spi_utils.errors import PlanError
from spi_utils.planning.pricing import check_formats, payload_bytes

Values = NDArray[np.float64]
DIRECTIONS = ("high", "low")
FISHER_HINT = "with sensitivity='self' (or 'random', or a text file) and this format in `cost_formats`"
COLUMN_HINT = "again: this table was made without it"
# What practice protects first, by a pattern on the module's name (METHOD: what llama.cpp, Unsloth and others
# keep at more bits). Everything else comes last.
TYPE_PRIOR = (
    (r"(linear_attn|ssm|mamba|mixer)\.out_proj$", 5),
    (r"\.v_proj$", 4),
    (r"(\.down_proj|mlp\.c_proj|\.fc2|\.dense_4h_to_h|\.w2)$", 3),
    (r"(\.o_proj|attn\.c_proj|self_attn\.out_proj|self_attention\.dense)$", 2),
    (r"\.k_proj$", 1),
)


@dataclass(frozen=True)
class Score:
    """One way to rank layers.

    `title` is for menus; `high` says what a high value means. `additive`: its columns are nats a token that
    add up over layers. `data`: what it looked at. `source` is the column read (additive: the stem of
    `<source>_<fmt>`), or a function of the table and a seed. `hint` ends the error for a missing column.
    """

    name: str
    title: str
    high: str
    source: str | Callable[[pd.DataFrame, int], Values]
    additive: bool = False
    data: str = "weights only"
    hint: str = COLUMN_HINT


def score_values(
    layers: pd.DataFrame,
    name: str,
    *,
    formats: Sequence[str] = ("nf4", "16bit"),
    double_quant: bool = False,
    seed: int = 0,
) -> Values:
    """A score for every row of the layer table. Shape (rows,), float64; NaN where a row is not planned.

    An additive score is returned per extra byte, as nats a token avoided per gigabyte (10⁹ bytes) spent on
    lifting the layer from the smallest to the largest of `formats`: the order in which a budget is spent.

    Raises:
        PlanError: unknown score (with the nearest name), or the table lacks its column.
    """
    score = score_row(name)
    if callable(score.source):
        values = score.source(layers, seed)
    elif score.additive:
        chosen = check_formats(formats)
        low, top = chosen[0], chosen[-1]
        spent = payload_bytes(layers, top) - payload_bytes(layers, low, double_quant)
        saved = additive_cost(layers, name, low) - additive_cost(layers, name, top)
        values = np.divide(saved * 1e9, spent, out=np.full(len(layers), np.nan), where=spent > 0)
    else:
        values = _column(layers, score.source, score)
    return np.where(layers["quantizable"].to_numpy(bool), values, np.nan)


def additive_cost(layers: pd.DataFrame, name: str, fmt: str) -> Values:
    """What each layer costs in `fmt` by an additive score, in nats a token. Shape (rows,).

    Where the table also knows what a format costs in all layers together (Σ `predicted_<fmt>`), the score is
    scaled to that sum, so that different formats can be weighed against each other.
    """
    score = score_row(name)
    if not score.additive:
        raise PlanError(
            f"the score {name!r} is an order: it has no cost in nats. "
            f"Scores with costs: {', '.join(additive_scores())}."
        )
    if fmt == "16bit":
        return np.zeros(len(layers))
    cost = _column(layers, f"{score.source}_{fmt}", score)
    planned = layers["quantizable"].to_numpy(bool)
    predicted = predicted_cost(layers, fmt)
    known = planned & np.isfinite(predicted)  # layers that the format can't hold have no cost in it
    total, own = predicted[known].sum(), cost[known].sum()
    return cost * (total / own) if known.any() and own > 0 else cost


def predicted_cost(layers: pd.DataFrame, fmt: str) -> Values:
    """The table's `predicted_<fmt>`, nats a token; zeros for 16bit, NaN where unknown. Shape (rows,)."""
    if fmt == "16bit":
        return np.zeros(len(layers))
    column = f"predicted_{fmt}"
    return layers[column].to_numpy(float) if column in layers else np.full(len(layers), np.nan)


def score_row(name: str) -> Score:
    """The table's row; PlanError with the nearest name if there is none."""
    if name not in SCORES:
        raise PlanError(f"unknown score {name!r}.{suggest(name, SCORES)} Known: {', '.join(SCORES)}.")
    return SCORES[name]


def check_direction(direction: str) -> str:
    """`direction`, if it is "high" or "low"."""
    if direction not in DIRECTIONS:
        raise PlanError(
            f"unknown direction {direction!r}.{suggest(direction, DIRECTIONS)} "
            "`high` protects the layers with the highest scores, `low` those with the lowest."
        )
    return direction


def additive_scores() -> list[str]:
    """Names of the scores whose costs add up."""
    return [name for name, score in SCORES.items() if score.additive]


def available_scores(layers: pd.DataFrame, formats: Sequence[str] = ("nf4", "16bit")) -> list[str]:
    """Scores that this layer table can give, in the table's order: the menu of an explorer."""
    planned = layers["quantizable"].to_numpy(bool)
    quantized = [fmt for fmt in check_formats(formats) if fmt != "16bit"]

    def held(column: str) -> bool:
        return column in layers and bool(layers.loc[planned, column].notna().any())

    def ready(score: Score) -> bool:
        if callable(score.source):
            return True
        columns = [f"{score.source}_{fmt}" for fmt in quantized] if score.additive else [score.source]
        return all(held(column) for column in columns)

    return [name for name, score in SCORES.items() if ready(score)]


def suggest(name: str, known: Iterable[str]) -> str:
    """' Did you mean …?' with the nearest known name, or nothing."""
    near = get_close_matches(str(name), list(known), n=1, cutoff=0.5)
    return f" Did you mean {near[0]!r}?" if near else ""


def _column(layers: pd.DataFrame, column: str, score: Score) -> Values:
    if column not in layers or layers.loc[layers["quantizable"], column].isna().all():
        raise PlanError(
            f"layers.csv holds no {column}, which the score {score.name!r} reads. "
            f"Run notebook 01_analyze {score.hint}."
        )
    return layers[column].to_numpy(float)


def _random(layers: pd.DataFrame, seed: int) -> Values:
    return np.random.default_rng(seed).random(len(layers))


def _smallness(layers: pd.DataFrame, seed: int) -> Values:
    return -np.log10(layers["numel"].to_numpy(float))


def _nearness_to_an_end(layers: pd.DataFrame, seed: int) -> Values:
    depth = layers["depth"].to_numpy(float)
    last = max(depth.max(), 1.0)
    return np.where(depth < 0, 1.0, np.maximum(depth, last - depth) / last)  # outside the blocks: an end


def _type_prior(layers: pd.DataFrame, seed: int) -> Values:
    rank = np.zeros(len(layers))
    for row, name in enumerate(layers["name"]):
        rank[row] = next((value for pattern, value in TYPE_PRIOR if re.search(pattern, name)), 0)
    end = _nearness_to_an_end(layers, seed)
    # The first and the last block come before every type; within a type, the ends before the middle.
    return rank + np.where(end == 1.0, len(TYPE_PRIOR) + 1.0, 0.9 * end)


_FLAT = "flat spectrum (fragile by the preprint, poorly trained by self-regularization theory)"
_SPREAD = "energy spread over many singular values (flat spectrum)"
SCORES: dict[str, Score] = {
    score.name: score
    for score in (
        Score("alpha_hill", "α, Hill's estimator (the claim's selector)", _FLAT, "alpha_hill"),
        Score("alpha_pl", "α, Clauset's fit (WeightWatcher's)", _FLAT, "alpha_pl"),
        Score("alpha_decay", "a, decay of the singular values by rank", "fast decay: compact", "alpha_decay"),
        Score("alpha_excess", "α above Gaussian noise of the same shape", _FLAT, "alpha_excess"),
        Score("alpha_farms", "α on blocks of one shape (FARMS)", _FLAT, "alpha_farms"),
        Score("effective_rank_rel", "effective rank, share of the full rank", _SPREAD, "effective_rank_rel"),
        Score("stable_rank", "stable rank", _SPREAD, "stable_rank"),
        Score("nuclear_rank_90_rel", "rank that holds 90 % of Σσ, relative", _SPREAD, "nuclear_rank_90_rel"),
        Score("nf4_error", "relative NF4 error of the weights", "NF4 moves the weights more", "error_nf4"),
        Score("alphaq", "AlphaQ: α against the median, times variance", "well trained by AlphaQ", "alphaq"),
        Score("swan", "SWAN: concentration, kurtosis, output and weight error", "sensitive by SWAN", "swan"),
        Score("type_prior", "what practice protects, by layer type", "protected first", _type_prior),
        Score("first_last", "nearness to the first or last block", "at an end", _nearness_to_an_end),
        Score("smallest", "smallest layers first (−log10 of the weights)", "few weights", _smallness),
        Score("random", "a seeded random order (the control)", "nothing", _random, data="nothing"),
        *(
            Score(name, title, "costly to quantize", name, additive=True, data=data, hint=hint)
            for name, title, data, hint in (
                ("fisher", "Fisher: predicted KL a byte", "text the model samples itself", FISHER_HINT),
                (
                    "refined",
                    "Fisher, measured where the cut is near",
                    "the model's own samples and a few evaluations",
                    "with `refine_at`, a list of matrix_bits",
                ),
                (
                    "measured",
                    "measured KL of each layer alone, a byte (the oracle)",
                    "a text, one evaluation a layer",
                    "with sensitivity='measured'",
                ),
            )
        ),
    )
}
