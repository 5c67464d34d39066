"""The layer table -> a ProtectionPlan: which format every layer gets, why, and what that weighs.

The page follows the decision: what a choice weighs, the scores that rank layers (`SCORES`), the problem that
a score and a user's wishes pose (`Problem`), the rules that decide it (`RULES`), the knapsack behind their
budgets, the plan with its file plan.json, and the run's own plan (`decide`). No torch here.

To add a score, give its statistic a column in layers.csv and add a row to `SCORES`. To add a rule, write one
function from a `Problem` and a number to the chosen formats and a sentence, and add a row to `RULES`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from inspect import signature
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, milp

from spi_utils import runs
from spi_utils.errors import PlanError, RunError, suggest
from spi_utils.formats import format_row, layer_bytes
from spi_utils.runs import Run, fingerprint

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Mask = NDArray[np.bool_]
Patterns = str | Sequence[str] | None

# --- what a choice weighs --------------------------------------------------------------------------------
# Two bit rates stand on these bytes and are never mixed: `bits_per_weight` counts the whole model
# (embeddings, norms and all), `matrix_bits` only the planned matrices, those that a quantizer may touch.

# The tensors that a saved file holds for one matrix, as suffixes of its module name: their entries in the
# safetensors header are a real share of a small layer.
NF4 = (".weight", ".weight.absmax", ".weight.quant_map", ".weight.quant_state.bitsandbytes__nf4")
NESTED = (".weight.nested_absmax", ".weight.nested_quant_map")  # double quantization's own
PACKED = (".weight_packed", ".weight_scale", ".weight_shape")  # compressed-tensors' names
HEADER_ENTRY = 75  # bytes of one header entry beside its name: dtype, shape, offsets, punctuation
SMALL_TENSORS_PER_BLOCK = 2  # norms: too small to be listed one by one in layers.csv
WORDS = {"nf4": "NF4", "int4_g64": "int4", "16bit": "16-bit"}  # in prose; others as they are


def nominal_bits(fmt: str) -> float:
    """A format's bits a weight on a large matrix; PlanError for an unknown format."""
    return format_row(fmt).bits_per_weight


def held_words(formats: Iterable[str]) -> str:
    """Formats as prose names them, fewest bits first: "NF4, int8 and 16-bit"."""
    words = [WORDS.get(fmt, fmt) for fmt in sorted(set(formats), key=nominal_bits)]
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1]))) if words else ""


def check_formats(formats: Sequence[str]) -> tuple[str, ...]:
    """The formats, fewest bits first, without repeats.

    Raises:
        PlanError: an unknown name (with the nearest known one), or fewer than two formats.
    """
    unique = sorted(set(formats), key=nominal_bits)
    if len(unique) < 2:
        raise PlanError(f"a plan chooses between at least two formats; got {', '.join(unique) or 'none'}.")
    return tuple(unique)


def able(layers: pd.DataFrame, fmt: str) -> Mask:
    """Which rows can be held in `fmt`: quantizable, with columns that its groups divide. Shape (rows,)."""
    planned, group = layers["quantizable"].to_numpy(bool), format_row(fmt).group
    return planned & (layers["cols"].to_numpy(np.int64) % (group or 1) == 0)


def payload_bytes(layers: pd.DataFrame, fmt: str, double_quant: bool = False) -> Ints:
    """Bytes that a saved file holds for each row's tensors in `fmt`, header apart. Shape (rows,).

    Read from the table's `bytes_<fmt>` column where there is one, else computed from the shape. Rows that
    can't be quantized (embeddings, norms, expert stacks), or not in this format (`able`), hold their 16-bit
    size.

    Raises:
        PlanError: the table lacks a quantizable row's size in this format.
    """
    full = 2 * layers["numel"].to_numpy(np.int64)
    if "bytes_16bit" in layers:
        full = layers["bytes_16bit"].fillna(2 * layers["numel"]).to_numpy(np.int64)
    if fmt == "16bit":
        return full
    column = f"bytes_{fmt}_dq" if fmt == "nf4" and double_quant else f"bytes_{fmt}"
    planned = able(layers, fmt)
    if column in layers:
        held = layers[column].to_numpy(float)
        if np.isnan(held[planned]).any():
            name = layers["name"][planned & np.isnan(held)].iloc[0]
            raise PlanError(f"{name}: layers.csv has no {column}. Run notebook 01_analyze again.")
    else:
        shapes = zip(layers["rows"], layers["cols"], planned, strict=True)
        held = np.array(
            [layer_bytes(fmt, int(r), int(c), double_quant=double_quant) if p else 0 for r, c, p in shapes]
        )
    return np.where(planned, held, full).astype(np.int64)


def header_bytes(names: Iterable[str], fmt: str, double_quant: bool = False) -> Ints:
    """Estimated bytes of the safetensors header for each named matrix in `fmt`. Shape (names,)."""
    suffixes: tuple[str, ...] = (".weight",)
    if fmt == "nf4":
        suffixes = NF4 + NESTED if double_quant else NF4
    elif fmt != "16bit":
        suffixes = PACKED if format_row(fmt).symmetric else (*PACKED, ".weight_zero_point")
    extra = sum(len(suffix) + HEADER_ENTRY for suffix in suffixes)
    return np.array([len(suffixes) * len(name) + extra for name in names], dtype=np.int64)


def fixed_bytes(layers: pd.DataFrame) -> tuple[int, int]:
    """`(data, header)` bytes of all that is never planned: embeddings, other matrices, norms, biases."""
    fixed = layers[~layers["quantizable"]]
    typical = len("model.layers.00.post_attention_layernorm.weight") + HEADER_ENTRY
    small = SMALL_TENSORS_PER_BLOCK * layers["depth"].nunique() * typical
    header = int(header_bytes(fixed["name"][fixed["rows"] > 0], "16bit").sum()) + small
    return int(payload_bytes(fixed, "16bit").sum()), header


def price(layers: pd.DataFrame, formats: Mapping[str, str], double_quant: bool = False) -> dict[str, int]:
    """What a checkpoint with these formats weighs, in bytes.

    Args:
        layers: the layer table, all rows.
        formats: module name -> format; a quantizable layer that is not named is kept in 16-bit.
        double_quant: NF4's absmax values are themselves quantized.

    Returns:
        One entry a format (its planned matrices), `embeddings` (with an untied head), `rest` (norms, biases,
        matrices that no quantizer replaces), `header` (estimated), `total` (their sum), and `total_16bit`,
        the whole model without quantization.

    Raises:
        PlanError: a layer's columns don't divide into its format's groups.
    """
    planned = layers["quantizable"].to_numpy(bool)
    names = layers["name"].to_numpy(str)
    held = np.array([formats.get(name, "16bit") for name in names])
    result = {}
    data, outside = fixed_bytes(layers)
    header = outside
    for fmt in sorted({str(fmt) for fmt in held[planned]} | {"16bit"}, key=nominal_bits):
        here = planned & (held == fmt)
        if (here & ~able(layers, fmt)).any():
            row = layers[here & ~able(layers, fmt)].iloc[0]
            raise PlanError(
                f"{row['name']} can't be {fmt}: groups of {format_row(fmt).group} don't divide its "
                f"{row['cols']} columns. Give it a format with smaller groups, int8 or 16bit."
            )
        result[fmt] = int(payload_bytes(layers, fmt, double_quant)[here].sum())
        header += int(header_bytes(names[here], fmt, double_quant).sum())
    full = payload_bytes(layers, "16bit")
    ends = ~planned & layers["role"].isin(("embedding", "head")).to_numpy(bool)
    result["embeddings"] = int(full[ends].sum())
    result["rest"] = data - result["embeddings"]
    result["header"] = header
    result["total"] = sum(result.values())
    result["total_16bit"] = int(full.sum() + header_bytes(names[planned], "16bit").sum()) + outside
    return result


def bit_rates(layers: pd.DataFrame, formats: Mapping[str, str], double_quant: bool) -> tuple[float, float]:
    """`(bits_per_weight, matrix_bits)` of a plan: over all weights, and over the planned matrices."""
    cost = price(layers, formats, double_quant)
    numel = layers["numel"].to_numpy(np.int64)
    planned = int(numel[layers["quantizable"].to_numpy(bool)].sum())
    data = cost["total"] - cost["header"]
    return 8 * data / int(numel.sum()), 8 * (data - cost["embeddings"] - cost["rest"]) / max(planned, 1)


# --- scores ----------------------------------------------------------------------------------------------
# A score is either an order (protect from one end) or additive: nats a token that quantizing a layer costs,
# so that costs can be summed and a byte budget spent exactly. The theory does not agree on the sign of α, so
# every score runs in both directions: `high` protects the layers where it is high.

DIRECTIONS = ("high", "low")
FISHER_HINT = "with sensitivity='self' (or 'random', or a text file) and this format in `cost_formats`"
# What practice protects first, by a pattern on the module's name (METHOD: what llama.cpp, Unsloth and others
# keep at more bits). Everything else comes last.
TYPE_PRIOR = (
    (r"(linear_attn|ssm|mamba|mixer)\.out_proj$", 5),
    (r"\.v_proj$", 4),
    (r"(\.down_proj|mlp\.c_proj|\.fc2|\.dense_4h_to_h|\.w2)$", 3),
    (r"(\.o_proj|attn\.c_proj|self_attn\.out_proj|self_attention\.dense)$", 2),
    (r"\.k_proj$", 1),
)


def _random(layers: pd.DataFrame, seed: int) -> Floats:
    return np.random.default_rng(seed).random(len(layers))


def _smallness(layers: pd.DataFrame, seed: int) -> Floats:
    return -np.log10(layers["numel"].to_numpy(float))


def _nearness_to_an_end(layers: pd.DataFrame, seed: int) -> Floats:
    depth = layers["depth"].to_numpy(float)
    last = max(depth.max(), 1.0)
    return np.where(depth < 0, 1.0, np.maximum(depth, last - depth) / last)  # outside the blocks: an end


def _type_prior(layers: pd.DataFrame, seed: int) -> Floats:
    rank = [next((v for pattern, v in TYPE_PRIOR if re.search(pattern, name)), 0) for name in layers["name"]]
    end = _nearness_to_an_end(layers, seed)
    # The first and the last block come before every type; within a type, the ends before the middle.
    return np.array(rank) + np.where(end == 1.0, len(TYPE_PRIOR) + 1.0, 0.9 * end)


@dataclass(frozen=True)
class Score:
    """One way to rank layers.

    `title` is for menus. `source` is the column read (additive: the stem of `<source>_<fmt>`), or a function
    of the table and a seed. `additive`: its columns are nats a token that add up over layers. `hint` ends the
    error for a missing column.
    """

    title: str
    source: str | Callable[[pd.DataFrame, int], Floats]
    additive: bool = False
    hint: str = "again: this table was made without it"


SCORES: dict[str, Score] = {
    # A flat spectrum has a high α: fragile by the preprint, poorly trained by self-regularization theory.
    "alpha_hill": Score("α, Hill's estimator (the claim's selector)", "alpha_hill"),
    "alpha_pl": Score("α, Clauset's fit (WeightWatcher's)", "alpha_pl"),
    "alpha_decay": Score("a, decay of the singular values by rank", "alpha_decay"),  # high: compact
    "alpha_excess": Score("α above Gaussian noise of the same shape", "alpha_excess"),
    "alpha_farms": Score("α on blocks of one shape (FARMS)", "alpha_farms"),
    "effective_rank_rel": Score("effective rank, share of the full rank", "effective_rank_rel"),
    "stable_rank": Score("stable rank", "stable_rank"),
    "nuclear_rank_90_rel": Score("rank that holds 90 % of Σσ, relative", "nuclear_rank_90_rel"),
    "nf4_error": Score("relative NF4 error of the weights", "error_nf4"),
    "alphaq": Score("AlphaQ: α against the median, times variance", "alphaq"),
    "swan": Score("SWAN: concentration, kurtosis, output and weight error", "swan"),
    "type_prior": Score("what practice protects, by layer type", _type_prior),
    "first_last": Score("nearness to the first or last block", _nearness_to_an_end),
    "smallest": Score("smallest layers first (−log10 of the weights)", _smallness),
    "random": Score("a seeded random order (the control)", _random),
    "fisher": Score("Fisher: predicted KL a byte", "fisher", True, FISHER_HINT),
    "refined": Score(
        "Fisher, measured where the cut is near", "refined", True, "with `refine_at`, a list of matrix_bits"
    ),
    "measured": Score(
        "measured KL of each layer alone, a byte (the oracle)",
        "measured",
        True,
        "with sensitivity='measured'",
    ),
}


def score_row(name: str) -> Score:
    """The table's row; PlanError with the nearest name if there is none."""
    if name not in SCORES:
        raise PlanError(f"unknown score {name!r}.{suggest(name, SCORES)} Known: {', '.join(SCORES)}.")
    return SCORES[name]


def available_scores(layers: pd.DataFrame, formats: Sequence[str] = ("nf4", "16bit")) -> list[str]:
    """Scores that this layer table can give, in the table's order: the menu of an explorer."""
    held = set(layers.columns[layers[layers["quantizable"]].notna().any()])
    quantized = [fmt for fmt in check_formats(formats) if fmt != "16bit"]

    def ready(score: Score) -> bool:
        if callable(score.source):
            return True
        return held >= ({f"{score.source}_{fmt}" for fmt in quantized} if score.additive else {score.source})

    return [name for name, score in SCORES.items() if ready(score)]


def score_values(
    layers: pd.DataFrame,
    name: str,
    *,
    formats: Sequence[str] = ("nf4", "16bit"),
    double_quant: bool = False,
    seed: int = 0,
) -> Floats:
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
        low, *_, top = check_formats(formats)
        spent = payload_bytes(layers, top) - payload_bytes(layers, low, double_quant)
        saved = additive_cost(layers, name, low) - additive_cost(layers, name, top)
        values = np.divide(saved * 1e9, spent, out=np.full(len(layers), np.nan), where=spent > 0)
    else:
        values = _column(layers, score.source, name)
    return np.where(layers["quantizable"].to_numpy(bool), values, np.nan)


def additive_cost(layers: pd.DataFrame, name: str, fmt: str) -> Floats:
    """What each layer costs in `fmt` by an additive score, in nats a token. Shape (rows,).

    Where the table also knows what a format costs in all layers together (Σ `predicted_<fmt>`), the score is
    scaled to that sum, so that different formats can be weighed against each other.
    """
    score = score_row(name)
    if not score.additive:
        costs = ", ".join(known for known, row in SCORES.items() if row.additive)
        raise PlanError(
            f"the score {name!r} is an order: it has no cost in nats. Scores with costs: {costs}."
        )
    if fmt == "16bit":
        return np.zeros(len(layers))
    cost = _column(layers, f"{score.source}_{fmt}", name)
    predicted = predicted_cost(layers, fmt)
    # Layers that the format can't hold have no cost in it.
    known = layers["quantizable"].to_numpy(bool) & np.isfinite(predicted)
    total, own = predicted[known].sum(), cost[known].sum()
    return cost * (total / own) if known.any() and own > 0 else cost


def predicted_cost(layers: pd.DataFrame, fmt: str) -> Floats:
    """The table's `predicted_<fmt>`, nats a token; zeros for 16bit, NaN where unknown. Shape (rows,)."""
    if fmt == "16bit":
        return np.zeros(len(layers))
    column = f"predicted_{fmt}"
    return layers[column].to_numpy(float) if column in layers else np.full(len(layers), np.nan)


def predicted_kl(layers: pd.DataFrame, formats: Mapping[str, str]) -> float | None:
    """Σ `predicted_<fmt>` over the quantized layers, nats a token; None where one is unknown."""
    held = np.array([formats.get(name, "16bit") for name in layers["name"].to_numpy(str)])
    # In a fixed order: a set's, and with it the sum's last digit, differs from one process to the next.
    used = sorted(set(formats.values()), key=nominal_bits)
    total = sum(float(predicted_cost(layers, fmt)[held == fmt].sum()) for fmt in used)
    return float(total) if np.isfinite(total) else None


def _column(layers: pd.DataFrame, column: str, score: str) -> Floats:
    if column not in layers or layers.loc[layers["quantizable"], column].isna().all():
        raise PlanError(
            f"layers.csv holds no {column}, which the score {score!r} reads. "
            f"Run notebook 01_analyze {SCORES[score].hint}."
        )
    return layers[column].to_numpy(float)


# --- the problem: a score and a user's wishes over the layers ----------------------------------------------

# Matrices that serving engines merge (vLLM's packed modules): with group="fused" they share a format.
FUSED = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("in_proj_qkv", "in_proj_z"),
    ("in_proj_b", "in_proj_a"),
)
GROUPS = (None, "fused")


class Problem:
    """The layer table, a score and a user's wishes as arrays: everything a rule needs.

    Over items (I), single layers (L) or groups of layers that must share a format, and formats (F):

    names, member: each planned layer's name and item (L,); count (I,): an item's layers.
    formats: fewest bits first. tiers: the places of the lowest and the highest that the user named.
    raw: (I,) the score, NaN where it is missing.
    cost: (I, F) nats a token where costs add up, so that a budget can be spent exactly and in more than two
        formats: an additive score's in direction high; else None. predicted: (I, F) the table's nats a token.
    payload, header: (I, F) bytes of the tensors, and of their entries in the file's header.
    fits: (L, F) what shapes allow; allowed: (I, F) what shapes and wishes allow.
    free: (I,) items that may still move between the two tiers; order: those, the first protected first.
    start: (I,) each item's smallest allowed format: the plan before anything is protected.
    numel, all_numel: planned weights and the model's; fixed_data, fixed_header: bytes that are never planned.
    """

    def __init__(  # noqa: PLR0915 - the steps of one join
        self,
        layers: pd.DataFrame,
        score: str,
        direction: str,
        formats: Sequence[str],
        *,
        double_quant: bool = False,
        group: str | None = None,
        force_16bit: Patterns = None,
        forbid_16bit: Patterns = None,
        seed: int = 0,
    ) -> None:
        """Join them; parameters as `make_plan`'s.

        Raises:
            PlanError: unknown names, nothing to plan, a failed layer that no pattern settles, a pattern that
                matches nothing, or wishes that contradict each other; each says what and where.
        """
        if direction not in DIRECTIONS:
            raise PlanError(
                f"unknown direction {direction!r}.{suggest(direction, DIRECTIONS)} "
                "`high` protects the layers with the highest scores, `low` those with the lowest."
            )
        wanted = check_formats(formats)
        planned = layers["quantizable"].to_numpy(bool)
        if not planned.any():
            raise PlanError("this model has no layer that can be quantized, so there is nothing to plan.")
        rows = layers[planned].reset_index(drop=True)
        for fmt in wanted:  # a format that can hold no layer at all has no costs either
            if not able(rows, fmt).any():
                raise PlanError(
                    f"{fmt} can hold none of the {len(rows)} layers: groups of {format_row(fmt).group} "
                    "divide none of their columns. Leave it out, or take one with smaller groups, int8 or "
                    "nf4."
                )
        values = score_values(layers, score, formats=wanted, double_quant=double_quant, seed=seed)[planned]
        self.score, self.direction, self.names = score, direction, tuple(rows["name"])

        # What each layer may become: by the user's formats and patterns, and by its shape.
        forced = matches(self.names, force_16bit, "force_16bit")
        forbidden = matches(self.names, forbid_16bit, "forbid_16bit")
        if (both := np.flatnonzero(forced & forbidden)).size:
            name = self.names[both[0]]
            raise PlanError(f"{name} matches force_16bit and forbid_16bit. Change one of the patterns.")
        self.formats = check_formats((*wanted, "16bit")) if forced.any() else wanted
        self.tiers = (self.formats.index(wanted[0]), self.formats.index(wanted[-1]))
        self.fits = np.stack([able(rows, fmt) for fmt in self.formats], axis=1)
        full = np.array([fmt == "16bit" for fmt in self.formats])
        allowed = np.tile([fmt in wanted for fmt in self.formats], (len(rows), 1))
        allowed[forced] = full
        allowed[forbidden] &= ~full
        allowed &= self.fits
        stuck = rows[~allowed.any(axis=1)]
        if len(stuck):
            raise PlanError(
                f"{len(stuck)} layers can be held in none of {', '.join(self.formats)}, such as "
                f"{stuck['name'].iloc[0]}: the groups don't divide its {stuck['cols'].iloc[0]} columns. Add "
                "a format with smaller groups, int8 or 16bit."
            )
        failed = (allowed.sum(axis=1) > 1) & np.isnan(values) & (rows["status"] == "failed").to_numpy()
        if failed.any():
            raise PlanError(
                f"the analysis failed for {failed.sum()} layer(s), so {score!r} can't rank them: "
                f"{_listed(list(rows['name'][failed]))}. Look at their weights, run notebook 01_analyze "
                "again, choose a score that reads no spectrum, or decide them yourself: force_16bit with a "
                "pattern that matches them keeps them in 16-bit."
            )

        # From layers to items.
        self.member = _members(self.names, group)
        self.count = np.bincount(self.member)

        def added(table: NDArray) -> NDArray:
            """Per layer (L, …) -> per item (I, …): sums over each item's layers."""
            result = np.zeros((len(self.count), *table.shape[1:]), dtype=table.dtype)
            np.add.at(result, self.member, table)
            return result

        def tabled(column: Callable[[str], NDArray]) -> NDArray:
            return np.stack([column(fmt) for fmt in self.formats], axis=1)

        self.allowed = added(allowed.astype(int)) == self.count[:, None]
        housed = self.allowed.any(axis=1)[self.member]
        if not housed.all():
            raise PlanError(
                f"{self.names[int(housed.argmin())]}: its group has no format that all of its layers may "
                "take: patterns force one and keep another from 16-bit, or 16bit is not among the formats. "
                "Change a pattern, or name them all."
            )
        self.cost: Floats | None = None
        if score_row(score).additive:
            # What can't be chosen may be unknown.
            costs = tabled(lambda fmt: additive_cost(layers, score, fmt)[planned])
            costs = np.where(allowed, costs, 0.0)
            if not np.isfinite(costs).all():
                row, place = np.argwhere(~np.isfinite(costs))[0]
                raise PlanError(
                    f"{self.names[row]} has no {score} in {self.formats[place]}, so a sum over layers can't "
                    "be formed. Run notebook 01_analyze again; its sensitivity stage resumes where it "
                    "stopped."
                )
            self.cost = added(costs) if direction == "high" else None
        self.predicted = added(np.where(allowed, tabled(lambda fmt: predicted_cost(rows, fmt)), 0.0))
        self.payload: Ints = added(tabled(lambda fmt: payload_bytes(rows, fmt, double_quant)))
        self.header: Ints = added(tabled(lambda fmt: header_bytes(self.names, fmt, double_quant)))
        self.fixed_data, self.fixed_header = fixed_bytes(layers)
        numel = rows["numel"].to_numpy(float)
        self.numel, self.all_numel = int(numel.sum()), int(layers["numel"].sum())

        # The order in which items are protected; a group's score is the mean over its weights.
        self.raw = added(values * numel) / added(numel)
        self.free = self.allowed[:, list(self.tiers)].all(axis=1)
        self.start = np.where(self.allowed, self.payload, np.iinfo(np.int64).max).argmin(axis=1)
        signed = -self.raw if direction == "high" else self.raw
        order = np.argsort(np.where(np.isnan(signed), np.inf, signed), kind="stable")  # missing ones last
        self.order = order[self.free[order]]
        self.end = "highest" if direction == "high" else "lowest"
        self.top = self.formats[self.tiers[1]].replace("16bit", "16-bit")

    def lift(self, taken: Mask) -> Ints:
        """Format indices (I,) with the taken items in the upper tier, all others as low as they may be."""
        return np.where(taken, self.tiers[1], self.start)


def matches(names: Sequence[str], patterns: Patterns, parameter: str) -> Mask:
    """Which names any of the patterns is found in, (L,).

    Raises:
        PlanError: a pattern that is no regular expression, or that matches no name; says in which parameter.
    """
    hit = np.zeros(len(names), dtype=bool)
    given = [patterns] if isinstance(patterns, str) else list(patterns or ())
    for pattern in filter(None, given):  # an empty pattern is no wish; as an expression it would match all
        try:
            found = np.array([re.search(pattern, name) is not None for name in names])
        except re.error as error:
            raise PlanError(f"{parameter}: {pattern!r} is no regular expression ({error}).") from error
        if not found.any():
            raise PlanError(
                f"{parameter}: {pattern!r} matches none of the {len(names)} planned layers."
                f"{suggest(pattern, names)} Patterns are searched in full module names like {names[0]!r}."
            )
        hit |= found
    return hit


def fused_groups(names: Sequence[str]) -> list[list[int]]:
    """Positions of layers that serving engines merge, one list a merged module (single layers too)."""
    member = _members(names, "fused")
    return [list(map(int, np.flatnonzero(member == item))) for item in range(int(member.max()) + 1)]


def _members(names: Sequence[str], group: str | None) -> Ints:
    """Each layer's item number; with "fused", matrices that engines merge share one."""
    if group not in GROUPS:
        raise PlanError(f"unknown group {group!r}.{suggest(str(group), ['fused'])} Known: None, 'fused'.")
    place = {leaf: number for number, leaves in enumerate(FUSED) for leaf in leaves}
    numbers: dict[tuple[str, str | int], int] = {}
    result = []
    for name in names:
        parent, _, leaf = name.rpartition(".")
        key = (parent, place.get(leaf, leaf)) if group else (parent, leaf)
        result.append(numbers.setdefault(key, len(numbers)))
    return np.array(result, dtype=np.int64)


def _listed(names: Sequence[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


# --- rules -----------------------------------------------------------------------------------------------
# A rule gives each item's format, as indices (I,), and the sentence that says why.

CLAIM_LAYERS, CLAIM_OF = 129, 248  # the SPI's own count, of the matrices of Qwen3.5-4B
CLAIM_SHARE = 0.52
TOLERANCE = 1e-3  # a budget this close below the smallest plan is the smallest plan: "matrix_bits=4.5"
EQUAL = 5e-3  # "equal bytes": within this share of the 16-bit model's bytes
Decision = tuple[Ints, str]


def _count(p: Problem, rule: str, value: float) -> Decision:
    """The first layers in the score's order; forced ones count, whole groups only."""
    k, planned, low = int(value), len(p.names), p.tiers[0]
    if k != value or not 0 <= k <= planned:
        raise PlanError(
            f"top_k={value:g}: this model has {planned} layers that can be protected (0…{planned})."
        )
    _refuse_between(p, rule)
    unfit = np.bincount(p.member, weights=~p.fits[:, low]) > 0  # in 16-bit whatever is asked for: not counted
    forced, free = int(p.count[~p.allowed[:, low] & ~unfit].sum()), int(p.count[p.free].sum())
    if k > forced + free and unfit.any():
        raise PlanError(
            f"{k} layers can't be chosen: {int(p.count[unfit].sum())} of {planned} can't be "
            f"{p.formats[low]} and stay in {p.top} anyway, {forced + free} are left."
        )
    if not forced <= k <= forced + free:
        raise PlanError(
            f"{k} layers can't be protected: force_16bit and forbid_16bit leave {forced}…{forced + free}."
        )
    taken = in_order(p.count, p.order, k - forced)
    protected = forced + int(p.count[taken].sum())
    torn = "" if protected == k else f" (a {k}th would tear a group apart)"
    said = f"The {protected} of {planned} layers with the {p.end} {p.score} stay in {p.top}{torn}."
    if rule == "claim" and planned < CLAIM_OF:
        said += f" (The claim's {CLAIM_LAYERS} of {CLAIM_OF}, scaled: round({CLAIM_SHARE}·{planned}) = {k}.)"
    return p.lift(taken), said


def _threshold(p: Problem, rule: str, value: float) -> Decision:
    """Layers at the threshold or beyond it; a missing score never is."""
    _refuse_between(p, rule)
    taken = p.free & (p.raw >= value if p.direction == "high" else p.raw <= value)
    sign = "≥" if p.direction == "high" else "≤"
    layers = int(p.count[taken].sum())
    said = f"The {layers} of {len(p.names)} layers with {p.score} {sign} {value:g} stay in {p.top}."
    if not taken.any() or taken[p.free].all():
        known = p.raw[~np.isnan(p.raw)]
        span = f"{p.score} lies between {known.min():.4g} and {known.max():.4g}" if len(known) else ""
        amount = "all of them" if taken.any() else "none"
        said += f" That is {amount}: {span or 'no layer has one'}."
    return p.lift(taken), said


def _budget(p: Problem, rule: str, value: float) -> Decision:
    """A byte budget: the least summed cost where costs add up, else the score's order."""
    size, outside, unit = _measure(p, rule)
    name = RULES[rule].unit
    largest = p.lift(p.free) if p.cost is None else np.where(p.allowed, size, -1).argmax(axis=1)
    floor, ceiling = _total(size, p.start), _total(size, largest)
    low, high = ((side + outside) / unit for side in (floor, ceiling))
    if not low * (1 - TOLERANCE) <= value <= high * (1 + TOLERANCE):
        apart = "" if p.free.all() else ", as far as patterns and groups allow"
        raise PlanError(
            f"{rule}={value:g} can't be had: this model takes {low:.4f} {name} with every layer in "
            f"{p.formats[p.tiers[0]]} and {high:.4f} {name} with every layer in {p.top}{apart}. "
            "Choose a value between."
        )
    limit = floor if value < low else max(_goal(value, unit) - outside, floor)
    said = f"Within {value:.6g} {name}: "
    if p.cost is not None:
        choice, gap = least_cost(p.cost, size.astype(float), float(limit), p.allowed)
        return choice, f"{said}the least summed {p.score}, {_proof(gap)}."
    _refuse_between(p, rule)
    taken = in_order(size[:, p.tiers[1]] - size[:, p.tiers[0]], p.order, limit - floor)
    said += f"layers with the {p.end} {p.score} first, in {p.top}, skipping those that don't fit."
    return p.lift(taken), said


def _max_kl(p: Problem, rule: str, value: float) -> Decision:
    """The smallest plan whose predicted KL is at most the value."""
    if not np.isfinite(p.predicted).all():
        raise PlanError(
            "rule='max_kl' needs predicted KL for every layer and format, which layers.csv lacks. "
            "Run notebook 01_analyze with a sensitivity, and with these formats."
        )
    least = float(np.where(p.allowed, p.predicted, np.inf).min(axis=1).sum())
    if value < least:
        raise PlanError(
            f"max_kl={value:g} can't be had: the best plan of these formats is predicted at {least:.4g} "
            "nats a token. Allow a higher KL, or add a format with more bits."
        )
    said = f"The smallest plan with a predicted KL of at most {value:g} nats a token"
    if p.cost is not None:  # the limit is on what is predicted, whichever additive score was named
        choice, gap = least_cost(p.payload.astype(float), p.predicted, value, p.allowed)
        return choice, f"{said}, {_proof(gap)}."
    _refuse_between(p, rule)
    saved = p.predicted[p.order, p.tiers[0]] - p.predicted[p.order, p.tiers[1]]
    left = float(_total(p.predicted, p.start)) - np.concatenate([[0.0], np.cumsum(saved)])
    reached = np.flatnonzero(left <= value)
    if not len(reached):
        raise PlanError(
            f"max_kl={value:g} can't be had: with every allowed layer protected it is {left[-1]:.4g}."
        )
    taken = np.zeros(len(p.raw), dtype=bool)
    taken[p.order[: reached[0]]] = True
    return p.lift(taken), f"{said}, by {p.score}: the {p.end} first."


@dataclass(frozen=True)
class Rule:
    """One row of the table: what it does, in a menu's words, and its value's unit if it is a budget."""

    title: str
    choose: Callable[[Problem, str, float], Decision]
    unit: str = ""


RULES: dict[str, Rule] = {
    "claim": Rule("129 layers by the score (52 % of a smaller model's)", _count),
    "top_k": Rule("a number of layers", _count),
    "threshold": Rule("a threshold on the score", _threshold),
    "budget_gb": Rule("the file's size, in GB of 10⁹ bytes", _budget, "GB"),
    "bits_per_weight": Rule("bits a weight over all weights", _budget, "bits a weight"),
    "matrix_bits": Rule("bits a weight over the planned matrices", _budget, "matrix bits"),
    "max_kl": Rule("a predicted KL, in nats a token", _max_kl),
}


def check_value(rule: str, value: float | None) -> float:
    """The rule's number; 0 for `claim`, which takes none.

    Raises:
        PlanError: unknown rule (with the nearest), a missing value, or one that is no finite number.
    """
    if rule not in RULES:
        raise PlanError(f"unknown rule {rule!r}.{suggest(rule, RULES)} Known: {', '.join(RULES)}.")
    if rule == "claim":
        if value is not None:
            raise PlanError(f"rule='claim' fixes the number of layers itself; use rule='top_k' for {value}.")
        return 0.0
    wanted = RULES[rule].unit or RULES[rule].title
    if isinstance(value, bool) or not isinstance(value, Real):
        raise PlanError(f"rule={rule!r} needs a value ({wanted}); got {value!r}.")
    if not math.isfinite(value):
        raise PlanError(f"rule={rule!r}: the value must be a finite number ({wanted}); got {value!r}.")
    return float(value)


def _refuse_between(p: Problem, rule: str) -> None:
    """An order tells which layers, not which of several formats."""
    low, top = p.tiers
    if top - low > 1:
        raise PlanError(
            f"{p.score} in direction {p.direction!r} under rule {rule!r} chooses between two formats, "
            f"not {', '.join(p.formats[low : top + 1])}. Name two, or use score='fisher', direction='high' "
            "and a budget."
        )


def _measure(p: Problem, rule: str) -> tuple[Ints, int, float]:
    """How a budget counts: bytes (I, F) of each choice, bytes that are not planned, bytes in its unit.

    A file's budget includes its header; bit rates count the tensors, of all weights or the planned ones.
    """
    if rule == "budget_gb":
        return p.payload + p.header, p.fixed_data + p.fixed_header, 1e9
    if rule == "matrix_bits":
        return p.payload, 0, p.numel / 8
    return p.payload, p.fixed_data, p.all_numel / 8


def _goal(value: float, unit: float) -> int:
    return int(np.floor(value * unit + 0.5))


def in_order(extra: Ints, order: Ints, budget: int) -> Mask:
    """Take items in order while they fit, skipping those that don't (skip-and-continue). Shape (items,)."""
    taken = np.zeros(len(extra), dtype=bool)
    for item in order:
        if extra[item] <= budget:
            taken[item] = True
            budget -= int(extra[item])
    return taken


def _total(table: NDArray, choice: Ints) -> Any:
    return table[np.arange(len(choice)), choice].sum().item()


def _proof(gap: float) -> str:
    """What is known about the optimum: HiGHS stops at a node limit, so that plans don't depend on time."""
    return "chosen exactly" if gap < GAP * (1 + 1e-9) else f"at most {gap:.1%} short of the best saving"


# --- the knapsack behind the budgets -----------------------------------------------------------------------
# One format for every item, least total cost within a limit: a multiple-choice knapsack. HiGHS alone
# takes 0.04 to 0.5 s at 250 layers and 0.4 to 6 s at 2,000, where a frontier of 13 sizes took it 200 s, as
# layers of equal size leave many near ties. A Lagrangian bound and pairwise exchanges end within 0.1 % of the
# best saving in 0.02 s (that frontier: 0.2 s), and leave HiGHS only the few items near the cut where they
# don't, as in small models.

GAP = 1e-3  # a choice proven this near the optimum is taken, relative to what it saves over the smallest
FINE = 1e-4  # the gap that HiGHS works towards where the choice is farther away, as in small models
NODES = 20  # of HiGHS' search: a limit that, unlike a time, gives the same plan on every machine
EXCHANGES, MOST_MOVES = 100, 600  # rounds of pairwise improvement, and the most moves to pair


def least_cost(  # noqa: PLR0912, PLR0915 - the steps of one search
    cost: Floats, size: Floats, limit: float, allowed: Mask
) -> tuple[Ints, float]:
    """One format an item: minimise Σ cost under Σ size ≤ limit.

    For a price λ on size, min_f (cost + λ·size) summed over items, less λ·limit, bounds every choice from
    below (Lagrangian relaxation). Bisection finds the λ whose choice just meets the limit. A format whose own
    reduced cost exceeds the gap between a feasible choice and the bound can't be part of anything better.

    Args:
        cost, size: (items, formats), finite, size ≥ 0.
        limit: bound on the chosen sizes' sum.
        allowed: (items, formats), at least one a row.

    Returns:
        The chosen format's index for each item, (items,), and how far from the optimum the choice may be at
        most, as a share of what it saves over the smallest choice.

    Raises:
        PlanError: no choice meets the limit, or the solver gave up.
    """
    cost, size = np.where(allowed, cost, np.inf), np.where(allowed, size, np.inf)
    rows = np.arange(len(cost))
    least = size.min(axis=1, keepdims=True)
    if least.sum() > limit * (1 + 1e-12):
        raise PlanError(f"the smallest possible choice takes {least.sum():g}, the limit is {limit:g}.")
    limit = max(limit, float(least.sum()))
    smallest = np.where(size == least, cost, np.inf).argmin(axis=1)
    extra = size - least
    if not (np.isfinite(extra) & (extra > 0) & (extra <= limit - least.sum())).any():
        return smallest, 0.0  # no single upgrade fits, or there are no items

    def priced(price: float) -> Floats:
        return np.where(allowed, cost + price * np.where(allowed, size, 0.0), np.inf)

    def pick(price: float) -> Ints:
        # Among equal prices the smaller size: the choice then meets the limit whenever some choice does.
        held = priced(price)
        return np.where(held <= held.min(axis=1, keepdims=True), size, np.inf).argmin(axis=1)

    low, high = 0.0, 1.0
    choice = pick(low)
    if _total(size, choice) <= limit:
        return choice, 0.0
    for _ in range(200):
        if _total(size, pick(high)) <= limit:
            break
        high *= 4.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (low, middle) if _total(size, pick(middle)) <= limit else (middle, high)
    choice, table = pick(high), priced(high)
    reduced = table - table.min(axis=1, keepdims=True)
    bound = float(table.min(axis=1).sum() - high * limit)

    # Spend what is left: the single upgrade that saves most, again and again, while one fits.
    left = limit - size[rows, choice].sum()
    for _ in range(len(choice)):
        saved = cost[rows, choice][:, None] - cost
        saved[(size - size[rows, choice][:, None] > left) | ~allowed] = 0.0
        item, fmt = np.unravel_index(saved.argmax(), saved.shape)
        if saved[item, fmt] <= 0:
            break
        left -= size[item, fmt] - size[item, choice[item]]
        choice[item] = fmt

    def contenders() -> Mask:
        held = reduced <= (_total(cost, choice) - bound) * (1 + 1e-9) + 1e-12 * abs(bound)
        held[rows, choice] = True
        return held

    # Change two items at once while that saves: with many items this alone ends within the gap.
    contending = contenders()
    for _ in range(EXCHANGES):
        moves = contending.copy()
        moves[rows, choice] = False
        items, fmts = np.nonzero(moves)
        if not 1 < len(items) <= MOST_MOVES:
            break
        gain = cost[items, choice[items]] - cost[items, fmts]
        more = size[items, fmts] - size[items, choice[items]]
        left = limit - size[rows, choice].sum()
        both = np.where(more[:, None] + more <= left, gain[:, None] + gain, 0.0)
        both[items[:, None] == items] = 0.0
        pair = np.unravel_index(both.argmax(), both.shape)
        if both[pair] <= 1e-15 * abs(_total(cost, choice)):
            break
        choice[items[[*pair]]] = fmts[[*pair]]

    if _total(cost, choice) - bound > GAP * (_total(cost, smallest) - _total(cost, choice)):
        found, proven = _highs(cost, size, limit, contenders())
        bound = max(bound, proven)
        if _total(size, found) <= limit * (1 + 1e-12) and _total(cost, found) <= _total(cost, choice):
            choice = found
    benefit = _total(cost, smallest) - _total(cost, choice)
    return choice, max(_total(cost, choice) - bound, 0.0) / benefit if benefit > 0 else 0.0


def _highs(cost: Floats, size: Floats, limit: float, contending: Mask) -> tuple[Ints, float]:
    """The open formats decided by HiGHS, and its bound: each item starts at its smallest open format and may
    take one upgrade."""
    rows = np.arange(len(cost))
    choice = np.where(contending, size, np.inf).argmin(axis=1)
    upgrades = contending.copy()
    upgrades[rows, choice] = False
    item, fmt = np.nonzero(upgrades)
    extra = size[item, fmt] - size[item, choice[item]]
    gain = cost[item, choice[item]] - cost[item, fmt]
    left = limit - size[rows, choice].sum()
    shape = (len(cost), len(item))
    member = sparse.csr_array((np.ones(len(item)), (item, np.arange(len(item)))), shape=shape)
    # HiGHS has absolute tolerances: bring gains to the order of one and bytes to that of thousands.
    unit, step = float(np.abs(gain).max()), float(max(extra.max(), 1e-300)) / 1e3
    rivals = member[np.bincount(item, minlength=len(cost)) > 1]
    result = milp(
        -gain / unit,
        integrality=np.ones(len(item)),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(rivals, -np.inf, 1),
            LinearConstraint(extra[None, :] / step, -np.inf, left / step),
        ],
        options={"mip_rel_gap": FINE, "node_limit": NODES},
    )
    if result.x is None:
        raise PlanError(f"HiGHS found no plan for this budget: {result.message}")
    bound = _total(cost, choice) + unit * float(result.mip_dual_bound)
    taken = result.x > 0.5
    choice[item[taken]] = fmt[taken]
    return choice, bound


# --- making a plan ---------------------------------------------------------------------------------------

STOCK = "bitsandbytes"  # the checkpoint writer of the claim and of the defaults


def make_plan(
    layers: pd.DataFrame,
    *,
    score: str = "alpha_hill",
    direction: str = "high",
    rule: str = "claim",
    value: float | None = None,
    formats: Sequence[str] = ("nf4", "16bit"),
    double_quant: bool = False,
    group: str | None = None,
    force_16bit: Patterns = None,
    forbid_16bit: Patterns = None,
    seed: int = 0,
    model: Mapping[str, Any] | None = None,
    layers_fingerprint: str = "",
    origin: str = "parameters",
    writer: str = STOCK,
) -> ProtectionPlan:
    """Decide every layer's format.

    Args:
        layers: the layer table (`runs.read_layers`), all rows.
        score: a row of `SCORES`. direction: "high" or "low", the end of the score that is protected.
        rule: a key of `RULES`. value: the rule's number (layers, score, GB of 10⁹ bytes, bits, or nats a
            token); None for `claim`.
        formats: what to choose from; more than two need an additive score, `high`, and a budget.
        double_quant: NF4 with double quantization.
        group: "fused" keeps q,k,v of one attention, gate,up of one MLP and Qwen3.5's in_proj pairs together.
        force_16bit, forbid_16bit: patterns (`re.search` in module names) for layers to keep in, or out of,
            16-bit whatever the score says.
        seed: for the score `random`.
        model, layers_fingerprint, origin: recorded in the plan.
        writer: the checkpoint writer that is meant; the plan's reason says what it can't hold.

    Raises:
        PlanError: unknown names (with the nearest match), a value out of range (with the possible range),
            failed layers, or a score that the table doesn't hold.
    """
    number = check_value(rule, value)
    wishes: dict[str, Any] = {"force_16bit": force_16bit, "forbid_16bit": forbid_16bit, "seed": seed}
    posed = (layers, score, direction, formats)
    p = Problem(*posed, double_quant=double_quant, group=group, **wishes)
    if rule == "claim":
        planned = len(p.names)
        number = float(CLAIM_LAYERS if planned >= CLAIM_OF else round(CLAIM_SHARE * planned))

    def decided(problem: Problem) -> tuple[Ints, str, dict[str, str]]:
        choice, sentence = RULES[rule].choose(problem, rule, number)
        held = (problem.formats[place] for place in choice[problem.member])
        return choice, sentence, dict(zip(problem.names, held, strict=True))

    choice, sentence, assigned = decided(p)
    weight = dict.fromkeys(p.formats, 0) | price(layers, assigned, double_quant)
    if RULES[rule].unit:
        size, outside, unit = _measure(p, rule)
        goal = _goal(number, unit)
        weight |= {"budget": goal, "miss": goal - _total(size, choice) - outside}
    bits_per_weight, matrix_bits = bit_rates(layers, assigned, double_quant)
    kl = predicted_kl(layers, assigned)
    said = [sentence, *_remarks(p, choice, weight, writer)]
    if group and kl is not None:
        alone = decided(Problem(*posed, double_quant=double_quant, **wishes))[2]
        bits, cost = bit_rates(layers, alone, double_quant)[1], predicted_kl(layers, alone)
        said.append(
            f"Layers that engines merge share a format: predicted KL {kl:.4g} at {matrix_bits:.3f} matrix "
            f"bits, layer by layer {'unknown' if cost is None else f'{cost:.4g}'} at {bits:.3f}."
        )
    for name in ("force_16bit", "forbid_16bit"):
        if wishes[name] is not None and not isinstance(wishes[name], str):
            wishes[name] = list(wishes[name])
    return ProtectionPlan(
        model=dict(model or {}),
        score=score,
        direction=direction,
        rule=rule,
        value=number,
        formats=assigned,
        protected=tuple(name for name, fmt in assigned.items() if fmt == "16bit"),
        double_quant=double_quant,
        bytes=weight,
        bits_per_weight=bits_per_weight,
        matrix_bits=matrix_bits,
        predicted_kl=kl,
        layers_fingerprint=layers_fingerprint,
        origin=origin,
        reason=" ".join(said),
        options={"group": group, **wishes},
    )


def _remarks(p: Problem, choice: Ints, weight: Mapping[str, int], writer: str) -> list[str]:
    """What else a reader of the plan must know: layers without a score, wishes, what the checkpoint `writer`
    can't hold, a missed budget."""
    said = []
    if missing := int(p.count[np.isnan(p.raw) & p.free].sum()):
        said.append(f"{missing} layers have no {p.score} and come last.")
    if decided := int((~p.free[p.member] & p.fits[:, list(p.tiers)].all(axis=1)).sum()):
        said.append(f"{decided} layers are decided by force_16bit or forbid_16bit.")
    for fmt, unfit in zip(p.formats, (~p.fits).sum(axis=0), strict=True):
        if unfit:
            group = format_row(fmt).group
            said.append(f"{unfit} layers can't be {fmt}: {group} doesn't divide their columns.")
    used = [p.formats[place] for place in np.unique(choice)]
    if foreign := [fmt for fmt in used if writer not in format_row(fmt).writers]:
        others = sorted(frozenset.intersection(*(format_row(fmt).writers for fmt in used)))
        hint = f"; backend={others[0]!r} can" if others else ", and no writer holds all of these formats"
        said.append(f"A stock {writer} checkpoint can't hold {', '.join(foreign)}{hint}.")
    miss = weight.get("miss", 0)
    share = miss / weight["total_16bit"]
    if abs(share) > EQUAL:
        said.append(
            f"The plan misses its budget by {miss / 1e6:.2f} MB ({share:.2%} of the 16-bit model): no whole "
            "layer fits in what is left."
        )
    return said


def equal_bytes_plan(
    layers: pd.DataFrame, *, total_bytes: int, score: str = "fisher", **options: Any
) -> ProtectionPlan:
    """The plan by `score` that weighs as much as another whose `bytes["total"]` is `total_bytes`: at most
    that, and as near as whole layers allow. Options and errors are `make_plan`'s."""
    return make_plan(layers, score=score, rule="budget_gb", value=total_bytes / 1e9, **options)


# --- the plan and its file -------------------------------------------------------------------------------

SCHEMA = 1
AGAIN = "Run notebook 02_visualize again with force=True."


@dataclass(frozen=True)
class ProtectionPlan:
    """A format for every layer that can be quantized, and everything that led to it.

    `formats`: module -> format, in model order. `protected`: those in 16-bit. `bytes`: see `price`; a plan
    made for a budget also holds `budget` and `miss` (budget − total). `predicted_kl`: nats a token, None
    without sensitivity. `options`: group, force_16bit, forbid_16bit, seed. `reason`: one sentence.
    `rounding`: how 4-bit codes were or will be chosen, "guided" or "nearest".
    """

    model: Mapping[str, Any]
    score: str
    direction: str
    rule: str
    value: float | None
    formats: Mapping[str, str]
    protected: tuple[str, ...]
    double_quant: bool
    bytes: Mapping[str, int]
    bits_per_weight: float
    matrix_bits: float
    predicted_kl: float | None
    layers_fingerprint: str
    origin: str = "parameters"
    reason: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    rounding: str = "nearest"
    schema: int = SCHEMA

    @property
    def fingerprint(self) -> str:
        """SHA-256 of what decides the checkpoint: weights, formats, double quantization, rounding."""
        parts = {"model": self.model.get("sha256"), "formats": dict(self.formats), "dq": self.double_quant}
        return fingerprint(parts | ({"rounding": self.rounding} if self.rounding == "guided" else {}))

    @property
    def writers(self) -> frozenset[str]:
        """Checkpoint writers that hold every format of this plan; may be empty."""
        used = set(self.formats.values()) | {"16bit"}
        return frozenset.intersection(*(format_row(fmt).writers for fmt in used))

    def count(self, fmt: str) -> int:
        """How many layers have this format."""
        return sum(held == fmt for held in self.formats.values())

    def write(self, path: str | Path) -> None:
        """Write plan.json atomically."""
        held = asdict(self)
        runs.write_json(path, {"schema": held.pop("schema"), **held})

    @classmethod
    def read(
        cls,
        path: str | Path,
        *,
        model: Mapping[str, Any] | None = None,
        layers_fingerprint: str | None = None,
    ) -> ProtectionPlan:
        """Read plan.json.

        Args:
            model: refuse a plan whose weights are not this model's (`ModelSource.identity()`).
            layers_fingerprint: refuse a plan made from another layer table.

        Raises:
            PlanError: missing, truncated, of another schema, with missing, unknown or malformed entries, for
                another model, or from another layer table.
        """
        try:
            held = runs.read_json(path, schema=SCHEMA, what="plan", stage="02_visualize")
        except RunError as error:
            raise PlanError(str(error)) from error
        missing = [name for name in ENTRIES if name not in held and name not in OPTIONAL]
        if missing:
            raise PlanError(f"{path}: this plan has no {', '.join(missing)}. {AGAIN}")
        for name, value in held.items():
            if name not in ENTRIES:
                raise PlanError(f"{path}: a plan has no entry {name!r}.{suggest(name, ENTRIES)} {AGAIN}")
            right, expected = ENTRIES[name]
            if not right(value):
                shown = repr(value) if len(repr(value)) < 60 else f"{repr(value)[:60]}…"
                raise PlanError(f"{path}: `{name}` of a plan is {expected}; found {shown}. {AGAIN}")
        plan = cls(**held | {"protected": tuple(held["protected"])})
        for name, fmt in plan.formats.items():
            try:
                format_row(fmt)
            except PlanError as error:
                raise PlanError(f"{path}: {name}: {error} {AGAIN}") from error
        kept = tuple(name for name, fmt in plan.formats.items() if fmt == "16bit")
        if kept != plan.protected:
            raise PlanError(
                f"{path}: `protected` lists {len(plan.protected)} layers, `formats` keeps {len(kept)} in "
                f"16-bit; they must be the same, in the same order. {AGAIN}"
            )
        if model is not None and plan.model.get("sha256") != model.get("sha256"):
            theirs, ours = (
                f"{one.get('id')} (weights {str(one.get('sha256'))[:12]})" for one in (plan.model, model)
            )
            raise PlanError(f"{path}: this plan is for {theirs}, not for {ours}. {AGAIN}")
        if layers_fingerprint is not None and plan.layers_fingerprint != layers_fingerprint:
            raise PlanError(f"{path}: this plan was made from another layers.csv than the run holds. {AGAIN}")
        return plan


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _texts(values: Any) -> bool:
    return isinstance(values, list) and all(map(_text, values))


def _number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and not math.isnan(value)


def _optional_number(value: Any) -> bool:
    return value is None or _number(value)


def _options(value: Any) -> bool:
    """group, patterns and seed; an entry that is missing was not asked for."""
    if not isinstance(value, dict):
        return False
    patterns = (value.get(name) for name in ("force_16bit", "forbid_16bit"))
    right = all(one is None or _text(one) or _texts(one) for one in patterns)
    return right and value.get("group") in GROUPS and type(value.get("seed", 0)) is int


# What each entry of plan.json must be, and in words.
ENTRIES: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "model": (lambda value: isinstance(value, dict), "an object"),
    "score": (_text, "a text"),
    "direction": (lambda value: value in DIRECTIONS, "'high' or 'low'"),
    "rule": (_text, "a text"),
    "value": (_optional_number, "a number or null"),
    "formats": (
        lambda value: isinstance(value, dict) and all(map(_text, value.values())),
        "an object {module: format}",
    ),
    "protected": (_texts, "a list of module names"),
    "double_quant": (lambda value: isinstance(value, bool), "true or false"),
    "bytes": (
        lambda value: isinstance(value, dict) and "total" in value and all(map(_number, value.values())),
        "an object of numbers, `total` among them",
    ),
    "bits_per_weight": (_number, "a number"),
    "matrix_bits": (_number, "a number"),
    "predicted_kl": (_optional_number, "a number or null"),
    "layers_fingerprint": (_text, "a text"),
    "schema": (lambda value: value == SCHEMA, str(SCHEMA)),
    "origin": (_text, "a text"),
    "reason": (_text, "a text"),
    "rounding": (lambda value: value in ("guided", "nearest"), "'guided' or 'nearest'"),
    "options": (_options, "an object of group, force_16bit, forbid_16bit and seed"),
}
OPTIONAL = ("origin", "reason", "options", "rounding")  # an older version's plans lack them


def check_plan(plan: ProtectionPlan, module_names: Collection[str]) -> None:
    """Refuse a plan that names a module which the model doesn't have.

    Raises:
        PlanError: how many, the first few, and the nearest existing name.
    """
    known = set(module_names)
    unknown = [name for name in plan.formats if name not in known]
    if unknown:
        raise PlanError(
            f"{len(unknown)} of the plan's {len(plan.formats)} modules are not in this model: "
            f"{_listed(unknown)}.{suggest(unknown[0], known)} Plan from this model's own layer table."
        )


def check_writer(plan: ProtectionPlan, writer: str) -> None:
    """Refuse a plan with formats that a checkpoint writer ("bitsandbytes", "compressed-tensors") can't hold.

    Raises:
        PlanError: which layers, in which format, and which writer could.
    """
    for fmt in sorted(set(plan.formats.values()), key=nominal_bits):
        writers = sorted(format_row(fmt).writers)
        if writer in writers:
            continue
        layers = [name for name, held in plan.formats.items() if held == fmt]
        hint = f"{', '.join(writers)} can hold that format, but no writer holds all of this plan's formats."
        if plan.writers:
            hint = f"Write it with backend={sorted(plan.writers)[0]!r}."
        raise PlanError(
            f"a {writer} checkpoint can't hold {fmt}, which the plan gives to {len(layers)} layers: "
            f"{_listed(layers)}. {hint}"
        )


# --- the run's plan --------------------------------------------------------------------------------------

# What a layer may become: with a score that only orders layers, and with one whose costs add up.
TIERS = {
    "bitsandbytes": (("nf4", "16bit"), ("nf4", "16bit")),
    "compressed-tensors": (("int4_g64", "16bit"), ("int4_g64", "int8", "16bit")),
}
AUTO_GROUP = {"bitsandbytes": None, "compressed-tensors": "fused"}
CHOICES = ("score", "direction", "rule", "value", "double_quant", "force_16bit", "forbid_16bit")
DEFAULTS = {name: signature(make_plan).parameters[name].default for name in CHOICES}


def decide(
    run: Run,
    *,
    backend: str = STOCK,
    formats: Sequence[str] = (),
    group: str | None = "auto",
    force: bool = False,
    **choices: Any,
) -> ProtectionPlan:
    """Write `plan.json` by a score and a rule, and return the plan that the run now holds.

    A plan saved from the explorer for this very layer table is kept, and that is said, as long as nothing
    else is asked for: a choice that isn't its default and isn't the saved plan's is refused. `force` replaces
    the saved plan.

    Args:
        run: a run with a layer table.
        backend: the checkpoint writer whose formats and grouping are the defaults.
        formats: what a layer may become; none are the backend's own, see `TIERS`: all of its tiers where
            costs add up and a budget is spent, else two.
        group: "fused", None, or "auto": "fused" where the backend's checkpoints are for engines that merge
            layers (compressed-tensors).
        force: replace a plan saved from the explorer.
        choices: what else `make_plan` takes: score, direction, rule, value, double_quant, …

    Raises:
        PlanError: as `make_plan`, an unknown backend, or a saved plan that the backend can't hold or that
            these choices contradict (force=True replaces it).
        RunError: no layer table.
    """
    mark, model = runs.layers_fingerprint(run), runs.run_info(run)["model"]
    if backend not in TIERS:
        raise PlanError(f"unknown backend {backend!r}.{suggest(backend, TIERS)} Known: {', '.join(TIERS)}.")
    if run.plan_json.exists() and not force:
        kept = ProtectionPlan.read(run.plan_json, model=model)
        if kept.origin == "slider" and kept.layers_fingerprint == mark:
            check_writer(kept, backend)
            _refuse_other_choices(kept, choices)
            count = len(kept.protected)
            print(f"Kept the plan saved from the explorer ({count} layers); force=True replaces it.")
            return kept
    if not formats:
        asked = DEFAULTS | choices
        spends = asked["rule"] == "max_kl" or (asked["rule"] in RULES and RULES[asked["rule"]].unit)
        adds_up = score_row(asked["score"]).additive and asked["direction"] == "high"
        formats = TIERS[backend][1 if adds_up and spends else 0]
    choices["formats"] = tuple(formats)
    choices["group"] = AUTO_GROUP[backend] if group == "auto" else group
    plan = make_plan(runs.read_layers(run), model=model, layers_fingerprint=mark, writer=backend, **choices)
    plan = replace(plan, rounding=runs.run_rounding(run))
    plan.write(run.plan_json)
    return plan


def _refuse_other_choices(kept: ProtectionPlan, choices: Mapping[str, Any]) -> None:
    """A plan saved by hand must not answer for a score, rule or wish that it wasn't made by."""
    held = {**vars(kept), **kept.options}
    others = []
    for name, default in DEFAULTS.items():
        asked, own = choices.get(name, default), held.get(name)
        agrees = asked in (default, own)
        if name in ("force_16bit", "forbid_16bit"):  # an explorer adds patterns for failed layers
            wanted, has = ({one} if isinstance(one, str) else {*(one or ())} for one in (asked, own))
            agrees = wanted - {""} <= has
        if not agrees:
            others.append(f"{name}={asked!r}")
    if others:
        raise PlanError(
            f"this run holds a plan saved from the explorer (score={kept.score!r}, direction="
            f"{kept.direction!r}, rule={kept.rule!r}, value={kept.value!r}), and {', '.join(others)} asks "
            "for another. Run notebook 02_visualize with force=True to replace the saved plan, or leave "
            "these parameters at their defaults to keep it."
        )


def read_plan(run: Run) -> ProtectionPlan:
    """The run's plan, checked to be of this run's model and layer table.

    Raises:
        PlanError: missing, damaged, or for something else; says to run notebook 02_visualize.
    """
    return ProtectionPlan.read(
        run.plan_json, model=runs.run_info(run)["model"], layers_fingerprint=runs.layers_fingerprint(run)
    )
