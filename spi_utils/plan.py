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
from numbers import Real
from pathlib import Path
from types import NoneType
from typing import Any

import numpy as np
import pandas as pd
from numpy.random import default_rng
from numpy.typing import NDArray
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, milp

from spi_utils import runs
from spi_utils.errors import PlanError, suggest
from spi_utils.formats import FORMATS, NF4_DQ, format_row, layer_bytes, stored_as
from spi_utils.runs import Run, fingerprint

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Mask = NDArray[np.bool_]
Formats = Sequence[str]
Patterns = str | Sequence[str] | None
HYBRID = ("nf4", "16bit")  # the claim's

# --- what a choice weighs --------------------------------------------------------------------------------
# Two bit rates stand on these bytes and are never mixed: `bits_per_weight` counts the whole model
# (embeddings, norms and all), `matrix_bits` only the planned matrices, those that a quantizer may touch.

# The tensors that a saved file holds for one matrix, as suffixes of its module name: their entries in the
# safetensors header are a real share of a small layer. Other formats have compressed-tensors' names.
NF4 = (".weight", ".weight.absmax", ".weight.quant_map", ".weight.quant_state.bitsandbytes__nf4")
NESTED = (".weight.nested_absmax", ".weight.nested_quant_map")
PACKED = (".weight_packed", ".weight_scale", ".weight_shape")
TENSORS = {"16bit": (".weight",), "nf4": NF4, "nf4_dq": NF4 + NESTED}
HEADER_ENTRY = 75  # bytes of one header entry beside its name: dtype, shape, offsets, punctuation
SMALL_TENSORS_PER_BLOCK = 2  # norms: too small to be listed one by one in layers.csv
WORDS = {"nf4": "NF4", "int4_g64": "int4", "16bit": "16-bit"}  # in prose; others as they are


def nominal_bits(fmt: str) -> float:
    """A format's bits a weight on a large matrix; PlanError for an unknown format."""
    return format_row(fmt).bits_per_weight


def held_words(formats: Iterable[str]) -> str:
    """Formats as prose names them, fewest bits first: "NF4, int8 and 16-bit"."""
    words = ", ".join(WORDS.get(fmt, fmt) for fmt in sorted(set(formats), key=nominal_bits))
    return " and ".join(words.rsplit(", ", 1))


def able(layers: pd.DataFrame, fmt: str) -> Mask:
    """Which rows can be held in `fmt`: quantizable, with columns that its groups divide. Shape (rows,)."""
    whole = layers["cols"].to_numpy(np.int64) % (format_row(fmt).group or 1) == 0
    return layers["quantizable"].to_numpy(bool) & whole


def payload_bytes(layers: pd.DataFrame, fmt: str, double_quant: bool = False) -> Ints:
    """Bytes that a saved file holds for each row's tensors in `fmt`, header apart. Shape (rows,).

    Read from the table's `bytes_<fmt>` column where there is one, else computed from the shape. Rows that
    can't be quantized (embeddings, norms, expert stacks), or not in this format (`able`), hold 16 bits a
    weight.
    """
    fits = able(layers, fmt)
    held: Any = layers.get(f"bytes_{stored_as(fmt, double_quant)}")
    if held is None:
        shapes = zip(layers["rows"].astype(int), layers["cols"].astype(int), fits, strict=True)
        held = [layer_bytes(fmt, r, c, double_quant=double_quant) if f else 0 for r, c, f in shapes]
    return np.where(fits, held, 2 * layers["numel"]).astype(np.int64)


def header_bytes(names: Iterable[str], fmt: str, double_quant: bool = False) -> Ints:
    """Estimated bytes of the safetensors header for each named matrix in `fmt`. Shape (names,)."""
    suffixes = TENSORS.get(stored_as(fmt, double_quant), PACKED)
    suffixes += () if format_row(fmt).symmetric else (".weight_zero_point",)
    extra = sum(len(suffix) + HEADER_ENTRY for suffix in suffixes)
    return np.array([len(suffixes) * len(name) + extra for name in names], dtype=np.int64)


def fixed_bytes(layers: pd.DataFrame) -> tuple[int, int]:
    """`(data, header)` bytes of all that is never planned: embeddings, other matrices, norms, biases."""
    fixed = layers[~layers["quantizable"]]
    typical = len("model.layers.00.post_attention_layernorm.weight") + HEADER_ENTRY
    small = SMALL_TENSORS_PER_BLOCK * layers["depth"].nunique() * typical
    header = int(header_bytes(fixed["name"][fixed["rows"] > 0], "16bit").sum()) + small
    return 2 * int(fixed["numel"].sum()), header


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
    """
    planned, names = layers["quantizable"].to_numpy(bool), layers["name"].to_numpy(str)
    held = np.array([formats.get(name, "16bit") for name in names])
    data, outside = fixed_bytes(layers)
    result, header = {}, outside
    for fmt in sorted({*held[planned].tolist(), "16bit"}, key=nominal_bits):
        here = planned & (held == fmt)
        result[fmt] = int(payload_bytes(layers, fmt, double_quant)[here].sum())
        header += int(header_bytes(names[here], fmt, double_quant).sum())
    ends = ~planned & layers["role"].isin(("embedding", "head"))
    result["embeddings"] = 2 * int(layers["numel"][ends].sum())
    result |= {"rest": data - result["embeddings"], "header": header}
    result["total"] = sum(result.values())
    full = 2 * int(layers["numel"].sum()) + int(header_bytes(names[planned], "16bit").sum())
    return result | {"total_16bit": full + outside}


def bit_rates(layers: pd.DataFrame, formats: Mapping[str, str], double_quant: bool) -> tuple[float, float]:
    """`(bits_per_weight, matrix_bits)` of a plan: over all weights, and over the planned matrices."""
    cost = price(layers, formats, double_quant)
    data, planned = cost["total"] - cost["header"], int(layers["numel"][layers["quantizable"]].sum())
    matrices = data - cost["embeddings"] - cost["rest"]
    return 8 * data / int(layers["numel"].sum()), 8 * matrices / max(planned, 1)


# --- scores ----------------------------------------------------------------------------------------------
# A score is either an order (protect from one end) or additive: nats a token that quantizing a layer costs,
# so that costs can be summed and a byte budget spent exactly. The theory does not agree on the sign of α, so
# every score runs in both directions: `high` protects the layers where it is high.

DIRECTIONS = ("high", "low")
# What practice protects first, by a pattern on the module's name (METHOD: what llama.cpp, Unsloth and others
# keep at more bits), the most protected last. Everything else comes after them.
TYPE_PRIOR = (
    r"\.k_proj$",
    r"(\.o_proj|attn\.c_proj|self_attn\.out_proj|self_attention\.dense)$",
    r"(\.down_proj|mlp\.c_proj|\.fc2|\.dense_4h_to_h|\.w2)$",
    r"\.v_proj$",
    r"(linear_attn|ssm|mamba|mixer)\.out_proj$",
)


def _nearness_to_an_end(layers: pd.DataFrame, seed: int) -> Floats:
    depth = layers["depth"].to_numpy(float)
    last = max(depth.max(), 1.0)
    return np.where(depth < 0, 1.0, np.maximum(depth, last - depth) / last)  # outside the blocks: an end


def _type_prior(layers: pd.DataFrame, seed: int) -> Floats:
    known = [[bool(re.search(pattern, name)) for pattern in TYPE_PRIOR] for name in layers["name"]]
    rank = (np.array(known) * np.arange(1, len(TYPE_PRIOR) + 1)).max(axis=1)
    end = _nearness_to_an_end(layers, seed)
    # The first and the last block come before every type; within a type, the ends before the middle.
    return rank + np.where(end == 1.0, len(TYPE_PRIOR) + 1.0, 0.9 * end)


@dataclass(frozen=True)
class Score:
    """One way to rank layers.

    `title` is for menus. `source` is the column read (additive: the stem of `<source>_<fmt>`), or a function
    of the table and a seed. `additive`: its columns are nats a token that add up over layers.
    """

    title: str
    source: str | Callable[[pd.DataFrame, int], Floats]
    additive: bool = False


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
    "smallest": Score("smallest layers first (−log10 of the weights)", lambda t, _: -np.log10(t["numel"])),
    "random": Score("a seeded random order (the control)", lambda t, seed: default_rng(seed).random(len(t))),
    "fisher": Score("Fisher: predicted KL a byte", "fisher", True),
    "refined": Score("Fisher, measured where the cut is near", "refined", True),
    "measured": Score("measured KL of each layer alone, a byte (the oracle)", "measured", True),
}


def _check(what: str, name: Any, known: Collection[Any]) -> None:
    if name not in known:
        near, all_names = suggest(name, map(str, known)), ", ".join(map(str, known))
        raise PlanError(f"unknown {what} {name!r}.{near} Known: {all_names}.")


def score_row(name: str) -> Score:
    """The table's row; PlanError with the nearest name if there is none."""
    _check("score", name, SCORES)
    return SCORES[name]


def _ordered(formats: Iterable[str]) -> tuple[str, ...]:
    """Formats, fewest bits first, without repeats; PlanError for an unknown name or fewer than two."""
    unique = sorted(set(formats), key=nominal_bits)
    if NF4_DQ in unique:
        raise PlanError(f"{NF4_DQ} is a cost format: plan with nf4 and double_quant=True.")
    if len(unique) < 2:
        raise PlanError(f"a plan chooses between at least two formats; got {', '.join(unique) or 'none'}.")
    return tuple(unique)


def available_scores(layers: pd.DataFrame, formats: Formats = HYBRID) -> list[str]:
    """Scores that this layer table can give, in the table's order: the menu of an explorer."""
    held = set(layers.columns[layers[layers["quantizable"]].notna().any()])
    lower = [f"_{fmt}" for fmt in _ordered(formats) if fmt != "16bit"]
    return [
        name
        for name, score in SCORES.items()
        if callable(score.source)
        or held >= {score.source + end for end in (lower if score.additive else [""])}
    ]


def score_values(
    layers: pd.DataFrame, name: str, formats: Formats = HYBRID, double_quant: bool = False, seed: int = 0
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
        low, *_, top = _ordered(formats)
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
    if fmt == "16bit":
        return np.zeros(len(layers))
    cost, predicted = _column(layers, f"{SCORES[name].source}_{fmt}", name), predicted_cost(layers, fmt)
    # Layers that the format can't hold have no cost in it.
    known = layers["quantizable"].to_numpy(bool) & np.isfinite(predicted)
    own = cost[known].sum()
    scale: float = predicted[known].sum() / own if known.any() and own > 0 else 1.0
    return cost * scale


def costs_as_stored(layers: pd.DataFrame, double_quant: bool) -> pd.DataFrame:
    """The layer table with NF4's costs under double quantization, where that is asked for and known."""
    columns = [name for name in map(str, layers) if name.endswith(f"_{NF4_DQ}")]
    doubled = {name.removesuffix("_dq"): layers[name] for name in columns}
    return layers.assign(**doubled) if double_quant else layers


def predicted_cost(layers: pd.DataFrame, fmt: str) -> Floats:
    """The table's `predicted_<fmt>`, nats a token; zeros for 16bit, NaN where unknown. Shape (rows,)."""
    if fmt != "16bit" and (column := f"predicted_{fmt}") in layers:
        return layers[column].to_numpy(float)
    return np.full(len(layers), 0.0 if fmt == "16bit" else np.nan)


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
            f"layers.csv holds no {column}, which the score {score!r} reads: run notebook 01_analyze. "
            "Costs need `sensitivity` and their format in `cost_formats`, `refined` also `refine_at`."
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
    fits: (L, F) what shapes allow; allowed: (I, F) what shapes and wishes allow. The four tables hold zero
        where a format is not allowed.
    free: (I,) items that may still move between the two tiers; order: those, the first protected first.
    start: (I,) each item's smallest allowed format: the plan before anything is protected.
    numel, all_numel: planned weights and the model's; fixed_data, fixed_header: bytes that are never planned.
    """

    def __init__(
        self,
        layers: pd.DataFrame,
        score: str = "alpha_hill",
        direction: str = "high",
        formats: Formats = HYBRID,
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
        _check("direction", direction, DIRECTIONS)
        layers = costs_as_stored(layers, double_quant)
        wanted, planned = _ordered(formats), layers["quantizable"].to_numpy(bool)
        if not planned.any():
            raise PlanError("this model has no layer that can be quantized, so there is nothing to plan.")
        rows = layers[planned].reset_index(drop=True)
        values = score_values(layers, score, formats=wanted, double_quant=double_quant, seed=seed)[planned]
        self.score, self.direction, self.names = score, direction, tuple(rows["name"])
        patterns = {"force_16bit": force_16bit, "forbid_16bit": forbid_16bit}
        self.double_quant, self.options = double_quant, {"group": group, **patterns, "seed": seed}

        # What each layer may become: by the user's formats and patterns, and by its shape.
        forced, forbidden = (matches(self.names, one, name)[:, None] for name, one in patterns.items())
        self.formats = _ordered((*wanted, "16bit")) if forced.any() else wanted
        self.tiers = (self.formats.index(wanted[0]), self.formats.index(wanted[-1]))
        self.fits = np.stack([able(rows, fmt) for fmt in self.formats], axis=1)
        full = np.array(self.formats) == "16bit"
        allowed = self.fits & np.where(forced, full, np.isin(self.formats, wanted)) & ~(forbidden & full)
        failed = (allowed.sum(axis=1) > 1) & np.isnan(values) & (rows["status"] == "failed").to_numpy()
        if failed.any():
            raise PlanError(
                f"the analysis failed for {failed.sum()} layer(s), so {score!r} can't rank them: "
                f"{_listed(rows['name'][failed].tolist())}. Look at their weights, run notebook 01_analyze "
                "again, choose a score that reads no spectrum, or keep them by a pattern in force_16bit."
            )

        # From layers to items.
        self.member = _members(self.names, group)
        self.count = np.bincount(self.member)

        def table(column: Callable[[str], NDArray]) -> NDArray:
            """(I, F) each format's column, summed over items; what can't be chosen may be unknown."""
            held = np.where(allowed, np.stack([column(fmt) for fmt in self.formats], axis=1), 0)
            sums = [np.bincount(self.member, weights=one) for one in held.T]
            return np.stack(sums, axis=1).astype(held.dtype)

        self.allowed = table(lambda fmt: np.ones(len(rows), int)) == self.count[:, None]
        housed = self.allowed.any(axis=1)[self.member]
        if not housed.all():
            raise PlanError(
                f"{self.names[housed.argmin()]} can be held in none of {', '.join(self.formats)}: its shape, "
                "force_16bit, forbid_16bit and the layers it is grouped with leave no format in common. "
                "Change a pattern, or add int8 or 16bit to the formats."
            )
        self.cost: Floats | None = None
        if SCORES[score].additive:
            costs = table(lambda fmt: additive_cost(rows, score, fmt))
            for item, place in np.argwhere(~np.isfinite(costs))[:1]:
                raise PlanError(
                    f"{self.names[(self.member == item).argmax()]} has no {score} in {self.formats[place]}: "
                    "run notebook 01_analyze again; its sensitivity stage resumes where it stopped."
                )
            self.cost = costs if direction == "high" else None
        self.predicted: Floats = table(lambda fmt: predicted_cost(rows, fmt))
        self.payload: Ints = table(lambda fmt: payload_bytes(rows, fmt, double_quant))
        self.header: Ints = table(lambda fmt: header_bytes(self.names, fmt, double_quant))
        self.fixed_data, self.fixed_header = fixed_bytes(layers)
        numel = rows["numel"].to_numpy(float)
        self.numel, self.all_numel = int(numel.sum()), int(layers["numel"].sum())

        # The order in which items are protected; a group's score is the mean over its weights.
        self.raw = np.bincount(self.member, values * numel) / np.bincount(self.member, numel)
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


def _patterns(given: Patterns) -> list[str]:
    """The patterns asked for; an empty one is no wish: as an expression it would match every name."""
    return [one for one in ([given] if isinstance(given, str) else given or ()) if one]


def matches(names: Sequence[str], patterns: Patterns, parameter: str) -> Mask:
    """Which names any of the patterns is found in, (L,); PlanError for a pattern that matches none."""
    hit = np.zeros(len(names), dtype=bool)
    for pattern in _patterns(patterns):
        found = np.array([re.search(pattern, name) is not None for name in names])
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
    return [np.flatnonzero(member == item).tolist() for item in range(int(member.max()) + 1)]


def _members(names: Sequence[str], group: str | None) -> Ints:
    """Each layer's item number; with "fused", matrices that engines merge share one."""
    _check("group", group, GROUPS)
    first = {leaf: leaves[0] for leaves in FUSED for leaf in leaves} if group else {}
    split = (name.rpartition(".") for name in names)
    return pd.factorize(np.array([f"{parent}.{first.get(leaf, leaf)}" for parent, _, leaf in split]))[0]


def _listed(names: Sequence[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


# --- rules -----------------------------------------------------------------------------------------------
# A rule gives each item's format, as indices (I,), the sentence that says why, and what a budget adds to the
# plan's bytes.

CLAIM_LAYERS, CLAIM_OF = 129, 248  # the SPI's own count, of the matrices of Qwen3.5-4B
CLAIM_SHARE = 0.52
TOLERANCE = 1e-3  # a budget this close below the smallest plan is the smallest plan: "matrix_bits=4.5"
MUCH = 0.2  # of the 16-bit model's bytes: so much that no plan can touch is said
EQUAL = 5e-3  # "equal bytes": within this share of the 16-bit model's bytes
Decision = tuple[Ints, str, dict[str, int]]


def _count(p: Problem, rule: str, value: float) -> Decision:
    """The first layers in the score's order; forced ones count, whole groups only."""
    k, planned, low = int(value), len(p.names), p.tiers[0]
    unfit = np.bincount(p.member, weights=~p.fits[:, low]) > 0  # in 16-bit whatever is asked for: not counted
    forced, free = int(p.count[~p.allowed[:, low] & ~unfit].sum()), int(p.count[p.free].sum())
    if k != value or not forced <= k <= forced + free:
        raise PlanError(
            f"{rule}: {value:g} layers can't be protected. This model has {planned} layers that can be "
            f"quantized; shapes, force_16bit and forbid_16bit leave a choice of {forced}…{forced + free}."
        )
    taken = in_order(p.count, p.order, k - forced)
    protected = forced + int(p.count[taken].sum())
    torn = "" if protected == k else f" (a {k}th would tear a group apart)"
    said = f"The {protected} of {planned} layers with the {p.end} {p.score} stay in {p.top}{torn}."
    if rule == "claim" and planned < CLAIM_OF:
        said += f" (The claim's {CLAIM_LAYERS} of {CLAIM_OF}, scaled: round({CLAIM_SHARE}·{planned}) = {k}.)"
    return p.lift(taken), said, {}


def _threshold(p: Problem, rule: str, value: float) -> Decision:
    """Layers at the threshold or beyond it; a missing score never is."""
    taken = p.free & (p.raw >= value if p.direction == "high" else p.raw <= value)
    sign = "≥" if p.direction == "high" else "≤"
    layers = int(p.count[taken].sum())
    said = f"The {layers} of {len(p.names)} layers with {p.score} {sign} {value:g} stay in {p.top}."
    if not taken.any() or taken[p.free].all():
        known = p.raw[~np.isnan(p.raw)]
        span = f"{p.score} lies between {known.min():.4g} and {known.max():.4g}" if len(known) else ""
        amount = "all of them" if taken.any() else "none"
        said += f" That is {amount}: {span or 'no layer has one'}."
    return p.lift(taken), said, {}


def _budget(p: Problem, rule: str, value: float) -> Decision:
    """A byte budget: the least summed cost where costs add up, else the score's order.

    A file's budget includes its header; bit rates count the tensors, of all weights or the planned ones.
    """
    size, outside, unit = {
        "budget_gb": (p.payload + p.header, p.fixed_data + p.fixed_header, 1e9),
        "bits_per_weight": (p.payload, p.fixed_data, p.all_numel / 8),
        "matrix_bits": (p.payload, 0, p.numel / 8),
    }[rule]
    name = RULES[rule].unit
    largest = p.lift(p.free) if p.cost is None else np.where(p.allowed, size, -1).argmax(axis=1)
    floor = _total(size, p.start)
    low, high = ((planned + outside) / unit for planned in (floor, _total(size, largest)))
    if not low * (1 - TOLERANCE) <= value <= high * (1 + TOLERANCE):
        raise PlanError(
            f"{rule}={value:g} can't be had: as far as shapes, patterns and groups allow, this model takes "
            f"{low:.4f} {name} with every layer in {p.formats[p.tiers[0]]} and {high:.4f} {name} with every "
            f"layer in {p.top}. Choose a value between."
        )
    budget = int(np.floor(value * unit + 0.5))
    limit = floor if value < low else max(budget - outside, floor)
    if p.cost is not None:
        choice, gap = least_cost(p.cost, size.astype(float), float(limit), p.allowed)
        how = f"the least summed {p.score}, {_proof(gap)}"
    else:
        taken = in_order(size[:, p.tiers[1]] - size[:, p.tiers[0]], p.order, limit - floor)
        choice = p.lift(taken)
        how = f"layers with the {p.end} {p.score} first, in {p.top}, skipping those that don't fit"
    miss = budget - _total(size, choice) - outside
    return choice, f"Within {value:.6g} {name}: {how}.", {"budget": budget, "miss": miss}


def _max_kl(p: Problem, rule: str, value: float) -> Decision:
    """The smallest plan whose predicted KL is at most the value."""
    saved = p.predicted[p.order, p.tiers[0]] - p.predicted[p.order, p.tiers[1]]
    left = _total(p.predicted, p.start) - np.cumsum(np.append(0.0, saved))  # with the first k items lifted
    if p.cost is not None:
        left = np.where(p.allowed, p.predicted, np.inf).min(axis=1).sum(keepdims=True)
    if not value >= left.min():
        raise PlanError(
            f"max_kl={value:g} can't be had: the best plan of these formats is predicted at {left.min():.4g} "
            "nats a token. Allow more, add a format with more bits, or, where that is nan, run notebook "
            "01_analyze with a sensitivity and with these formats."
        )
    if p.cost is not None:  # the limit is on what is predicted, whichever additive score was named
        choice, gap = least_cost(p.payload.astype(float), p.predicted, value, p.allowed)
        how = _proof(gap)
    else:
        choice = p.lift(np.isin(np.arange(len(p.raw)), p.order[: (left <= value).argmax()]))
        how = f"by {p.score}: the {p.end} first"
    return choice, f"The smallest plan with a predicted KL of at most {value:g} nats a token, {how}.", {}


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
    _check("rule", rule, RULES)
    if rule == "claim":
        if value is not None:
            raise PlanError(f"rule='claim' fixes the number of layers itself; use rule='top_k' for {value}.")
        return 0.0
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        wanted = RULES[rule].unit or RULES[rule].title
        raise PlanError(f"rule={rule!r} needs a value, a finite number ({wanted}); got {value!r}.")
    return float(value)


def _spends(rule: str, score: str, direction: str) -> bool:
    """Whether a rule spends a budget on costs that add up: on as many formats as there are."""
    budget = rule == "max_kl" or bool(RULES[rule].unit)
    return budget and score_row(score).additive and direction == "high"


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


def least_cost(  # noqa: PLR0915 - the steps of one search
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
    cost, rows = np.where(allowed, cost, np.inf), np.arange(len(cost))  # no search takes an infinite cost
    least = np.where(allowed, size, np.inf).min(axis=1, keepdims=True)
    if least.sum() > limit * (1 + 1e-12):
        raise PlanError(f"the smallest possible choice takes {least.sum():g}, the limit is {limit:g}.")
    limit = max(limit, float(least.sum()))
    smallest = np.where(size == least, cost, np.inf).argmin(axis=1)
    if not (allowed & (size > least) & (size - least <= limit - least.sum())).any():
        return smallest, 0.0  # no single upgrade fits, or there are no items

    def pick(price: float) -> tuple[Ints, Floats]:
        # Among equal prices the smaller size: the choice then meets the limit whenever some choice does.
        priced = cost + price * size
        return np.where(priced <= priced.min(axis=1, keepdims=True), size, np.inf).argmin(axis=1), priced

    def spent(choice: Ints) -> float:
        return _total(size, choice)

    low, high = 0.0, 1.0
    choice, _ = pick(low)
    if spent(choice) <= limit:
        return choice, 0.0
    while spent(pick(high)[0]) > limit and high < 1e200:
        high *= 4.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (low, middle) if spent(pick(middle)[0]) <= limit else (middle, high)
    choice, priced = pick(high)
    reduced = priced - priced.min(axis=1, keepdims=True)
    bound = float(priced.min(axis=1).sum() - high * limit)

    # Spend what is left: the single upgrade that saves most, again and again, while one fits.
    left = limit - spent(choice)
    for _ in rows:
        saved, more = cost[rows, choice][:, None] - cost, size - size[rows, choice][:, None]
        saved[more > left] = 0.0
        item, fmt = np.unravel_index(saved.argmax(), saved.shape)
        if saved[item, fmt] <= 0:
            break
        left -= more[item, fmt]
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
        both = np.where(more[:, None] + more <= limit - spent(choice), gain[:, None] + gain, 0.0)
        both[items[:, None] == items] = 0.0
        pair = np.unravel_index(both.argmax(), both.shape)
        if both[pair] <= 1e-15 * abs(_total(cost, choice)):
            break
        choice[items[[*pair]]] = fmts[[*pair]]

    worst = _total(cost, smallest)
    if _total(cost, choice) - bound > GAP * (worst - _total(cost, choice)):
        found, proven = _highs(cost, size, limit, contenders())
        bound = max(bound, proven)
        if spent(found) <= limit * (1 + 1e-12) and _total(cost, found) <= _total(cost, choice):
            choice = found
    benefit = worst - _total(cost, choice)
    return choice, max(_total(cost, choice) - bound, 0.0) / benefit if benefit > 0 else 0.0


def _highs(cost: Floats, size: Floats, limit: float, contending: Mask) -> tuple[Ints, float]:
    """The open formats decided by HiGHS, and its bound: each item starts at its smallest open format and may
    take one upgrade."""
    rows = np.arange(len(cost))
    choice = np.where(contending, size, np.inf).argmin(axis=1)
    upgrades = contending.copy()
    upgrades[rows, choice] = False
    item, fmt = np.nonzero(upgrades)
    extra, gain = size[item, fmt] - size[item, choice[item]], cost[item, choice[item]] - cost[item, fmt]
    member = sparse.csr_array((np.ones(len(item)), (item, np.arange(len(item)))), (len(cost), len(item)))
    rivals = member[np.bincount(item, minlength=len(cost)) > 1]
    # HiGHS has absolute tolerances: bring gains to the order of one and bytes to that of thousands.
    unit, step = float(np.abs(gain).max()), float(max(extra.max(), 1e-300)) / 1e3
    left = (limit - _total(size, choice)) / step
    result = milp(
        -gain / unit,
        integrality=np.ones(len(item)),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(rivals, -np.inf, 1),
            LinearConstraint(extra[None] / step, -np.inf, left),
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


def make_plan(
    layers: pd.DataFrame,
    *,
    rule: str = "claim",
    value: float | None = None,
    model: Mapping[str, Any] | None = None,
    layers_fingerprint: str = "",
    origin: str = "parameters",
    **wishes: Any,
) -> ProtectionPlan:
    """Decide every layer's format.

    Args:
        layers: the layer table (`runs.read_layers`), all rows.
        rule: a key of `RULES`. value: the rule's number (layers, score, GB of 10⁹ bytes, bits, or nats a
            token); None for `claim`.
        model, layers_fingerprint, origin: recorded in the plan.
        wishes: what `Problem` takes, with its defaults:
        score: a row of `SCORES`. direction: "high" or "low", the end of the score that is protected.
        formats: what to choose from; more than two need an additive score, `high`, and a budget.
        double_quant: NF4 with double quantization.
        group: "fused" keeps q,k,v of one attention, gate,up of one MLP and Qwen3.5's in_proj pairs together.
        force_16bit, forbid_16bit: patterns (`re.search` in module names) for layers to keep in, or out of,
            16-bit whatever the score says.
        seed: for the score `random`.

    Raises:
        PlanError: unknown names (with the nearest match), a value out of range (with the possible range),
            failed layers, or a score that the table doesn't hold.
    """
    number = check_value(rule, value)
    if rule == "claim":
        planned = int(layers["quantizable"].sum())
        number = float(CLAIM_LAYERS if planned >= CLAIM_OF else round(CLAIM_SHARE * planned))

    p = Problem(layers, **wishes)
    if p.tiers[1] - p.tiers[0] > 1 and not _spends(rule, p.score, p.direction):
        raise PlanError(  # an order tells which layers, not which of several formats
            f"{p.score} in direction {p.direction!r} under rule {rule!r} chooses between two formats, "
            f"not {', '.join(p.formats)}. Name two, or use score='fisher', direction='high' and a budget."
        )
    choice, reason, more = RULES[rule].choose(p, rule, number)
    assigned = dict(zip(p.names, np.array(p.formats)[choice[p.member]].tolist(), strict=True))
    layers, double_quant = costs_as_stored(layers, p.double_quant), p.double_quant
    weight = dict.fromkeys(p.formats, 0) | price(layers, assigned, double_quant) | more
    bits_per_weight, matrix_bits = bit_rates(layers, assigned, double_quant)
    if (fixed := weight["rest"] / weight["total_16bit"]) > MUCH:
        reason += f" {fixed:.0%} of the 16-bit model is never quantized: stacked experts and the like."
    if missing := int(p.count[np.isnan(p.raw) & p.free].sum()):
        reason += f" {missing} layers have no {p.score} and come last."
    for fmt, unfit in zip(p.formats, (~p.fits).sum(axis=0), strict=True):
        if unfit:
            group = format_row(fmt).group
            reason += f" {unfit} layers can't be {fmt}: {group} doesn't divide their columns."
    miss = weight.get("miss", 0)
    if abs(share := miss / weight["total_16bit"]) > EQUAL:
        reason += (
            f" The plan misses its budget by {miss / 1e6:.2f} MB ({share:.2%} of the 16-bit model): no whole "
            "layer fits in what is left."
        )
    return ProtectionPlan(
        model=dict(model or {}),
        score=p.score,
        direction=p.direction,
        rule=rule,
        value=number,
        formats=assigned,
        protected=_kept(assigned),
        double_quant=double_quant,
        bytes=weight,
        bits_per_weight=bits_per_weight,
        matrix_bits=matrix_bits,
        predicted_kl=predicted_kl(layers, assigned),
        layers_fingerprint=layers_fingerprint,
        origin=origin,
        reason=reason,
        options=p.options,
    )


# --- the plan and its file -------------------------------------------------------------------------------

SCHEMA, STAGE = 1, runs.NOTEBOOKS["visualize"]


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
        return frozenset.intersection(*(format_row(fmt).writers for fmt in {*self.formats.values(), "16bit"}))

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
            RunError: missing, truncated, of another schema, with missing, unknown or malformed entries.
            PlanError: for another model, or from another layer table.
        """
        with runs.believing(Path(path), "plan", STAGE):
            held = runs.read_json(path, SCHEMA, "plan", STAGE)
            if odd := [name for name, value in held.items() if not isinstance(value, KINDS.get(name, str))]:
                raise TypeError(f"{', '.join(odd)} can't be read")
            if unknown := {*held["formats"].values()} - {*FORMATS}:
                raise ValueError(f"there is no format {', '.join(sorted(unknown))}")
            plan = cls(**held | {"protected": _kept(held["formats"])})
        others = ""
        if model is not None and plan.model.get("sha256") != model.get("sha256"):
            both = (f"{one.get('id')} (weights {str(one.get('sha256'))[:12]})" for one in (plan.model, model))
            others = f"is for {', not for '.join(both)}"
        elif layers_fingerprint not in (None, plan.layers_fingerprint):
            others = "was made from another layers.csv than the run holds"
        if others:
            raise PlanError(f"{path}: this plan {others}. Run notebook {STAGE} again with force=True.")
        return plan


NUMBER = (int, float)
KINDS: Mapping[str, Any] = {  # of what is no string
    **dict.fromkeys(("model", "formats", "options", "bytes"), dict),
    **dict.fromkeys(("bits_per_weight", "matrix_bits"), NUMBER),
    **dict.fromkeys(("value", "predicted_kl"), (*NUMBER, NoneType)),
    **{"schema": int, "protected": list, "double_quant": bool},
}


def _kept(formats: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(name for name, fmt in formats.items() if fmt == "16bit")


def check_plan(plan: ProtectionPlan, module_names: Collection[str]) -> None:
    """Refuse a plan that names a module which the model doesn't have.

    Raises:
        PlanError: how many, the first few, and the nearest existing name.
    """
    known = set(module_names)
    if unknown := [name for name in plan.formats if name not in known]:
        raise PlanError(
            f"{len(unknown)} of the plan's {len(plan.formats)} modules are not in this model: "
            f"{_listed(unknown)}.{suggest(unknown[0], known)} Plan from this model's own layer table."
        )


def check_writer(plan: ProtectionPlan, writer: str) -> None:
    """Refuse a plan with formats that a checkpoint writer ("bitsandbytes", "compressed-tensors") can't hold.

    Raises:
        PlanError: which layers, in which format, and which writer could.
    """
    foreign = [name for name, fmt in plan.formats.items() if writer not in format_row(fmt).writers]
    if foreign:
        what, others = sorted({plan.formats[name] for name in foreign}), sorted(plan.writers)
        hint = f"Write it with backend={others[0]!r}." if others else "No writer holds all of its formats."
        raise PlanError(
            f"a {writer} checkpoint can't hold {', '.join(what)}, which the plan gives to {len(foreign)} "
            f"layers: {_listed(foreign)}. {hint}"
        )


# --- the run's plan --------------------------------------------------------------------------------------

# What a layer may become: with a score that only orders layers, and with one whose costs add up.
TIERS = {
    "bitsandbytes": (("nf4", "16bit"), ("nf4", "16bit")),
    "compressed-tensors": (("int4_g64", "16bit"), ("int4_g64", "int8", "16bit")),
}
AUTO_GROUP = {"bitsandbytes": None, "compressed-tensors": "fused"}
# What `make_plan` does unless asked otherwise; a choice that equals it was not asked for.
DEFAULTS = {"score": "alpha_hill", "direction": "high", "rule": "claim", "value": None, "double_quant": False}
DEFAULTS |= {"force_16bit": None, "forbid_16bit": None}


def decide(
    run: Run,
    *,
    backend: str = "bitsandbytes",
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
    _check("backend", backend, TIERS)
    asked = DEFAULTS | choices
    if run.plan_json.exists() and not force:
        kept = ProtectionPlan.read(run.plan_json, model=model)
        if kept.origin == "slider" and kept.layers_fingerprint == mark:
            check_writer(kept, backend)
            # A plan saved by hand must not answer for a score, rule or wish that it wasn't made by; an
            # explorer adds patterns for failed layers.
            held, others = {**vars(kept), **kept.options}, []
            for name, default in DEFAULTS.items():
                wish, own = asked[name], held.get(name)
                if "16bit" in name:
                    wish, own = {*_patterns(wish)} - {*_patterns(own)}, set()
                if wish not in (default, own):
                    others.append(f"{name}={asked[name]!r}")
            if others:
                raise PlanError(
                    "this run holds a plan saved from the explorer, and these ask for another: "
                    f"{', '.join(others)}. Leave them out, or run notebook 02_visualize with force=True."
                )
            count = len(kept.protected)
            print(f"Kept the plan saved from the explorer ({count} layers); force=True replaces it.")
            return kept
    _check("rule", asked["rule"], RULES)
    menu = TIERS[backend][_spends(asked["rule"], asked["score"], asked["direction"])]
    choices |= {"formats": tuple(formats) or menu, "group": AUTO_GROUP[backend] if group == "auto" else group}
    plan = make_plan(runs.read_layers(run), model=model, layers_fingerprint=mark, **choices)
    plan = replace(plan, rounding=runs.run_rounding(run))
    plan.write(run.plan_json)
    return plan


def read_plan(run: Run) -> ProtectionPlan:
    """The run's plan, checked to be of this run's model and layer table.

    Raises:
        PlanError: missing, damaged, or for something else; says to run notebook 02_visualize.
    """
    return ProtectionPlan.read(
        run.plan_json, model=runs.run_info(run)["model"], layers_fingerprint=runs.layers_fingerprint(run)
    )
