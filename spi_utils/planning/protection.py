"""A protection plan: the format of every layer that can be quantized, as plan.json holds it.

plan.py makes plans; here they are written, read, compared, and checked against a model or a writer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from numbers import Real
from pathlib import Path
from typing import Any

from spi_utils.errors import PlanError, RunError
from spi_utils.formats import format_row
from spi_utils.planning.choice import GROUPS
from spi_utils.planning.pricing import nominal_bits
from spi_utils.planning.scores import DIRECTIONS, suggest
from spi_utils.runs import fingerprint, read_json, write_json

SCHEMA = 1
AGAIN = "Run notebook 02_visualize again with force=True."


@dataclass(frozen=True)
class ProtectionPlan:
    """A format for every layer that can be quantized, and everything that led to it.

    `formats`: module -> format, in model order. `protected`: those in 16-bit. `bytes`: see `pricing.price`;
    a plan made for a budget also holds `budget` and `miss` (budget − total). `predicted_kl`: nats a token,
    None without sensitivity. `options`: group, force_16bit, forbid_16bit, seed. `reason`: one sentence.
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
        write_json(path, {"schema": self.schema, **{k: v for k, v in asdict(self).items() if k != "schema"}})

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
            held = read_json(path, schema=SCHEMA, what="plan", stage="02_visualize")
        except RunError as error:
            raise PlanError(str(error)) from error
        _check_entries(path, held)
        plan = cls(**held)
        plan = replace(plan, protected=tuple(plan.protected))
        _check_formats(path, plan)
        if model is not None and plan.model.get("sha256") != model.get("sha256"):
            theirs, ours = _identity(plan.model), _identity(model)
            raise PlanError(f"{path}: this plan is for {theirs}, not for {ours}. {AGAIN}")
        if layers_fingerprint is not None and plan.layers_fingerprint != layers_fingerprint:
            raise PlanError(f"{path}: this plan was made from another layers.csv than the run holds. {AGAIN}")
        return plan


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
        able = format_row(fmt).writers
        if writer not in able:
            layers = [name for name, held in plan.formats.items() if held == fmt]
            raise PlanError(
                f"a {writer} checkpoint can't hold {fmt}, which the plan gives to {len(layers)} layers: "
                f"{_listed(layers)}. {_able(plan, able)}"
            )


@dataclass(frozen=True)
class PlanDiff:
    """How plan b differs from plan a; bytes and KL are b's less a's (None where one is unknown)."""

    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    changed: Mapping[str, tuple[str, str]]
    total_bytes: int
    predicted_kl: float | None

    def __str__(self) -> str:
        """One line a person can read."""
        kl = "" if self.predicted_kl is None else f", predicted KL {self.predicted_kl:+.4f}"
        return (
            f"{len(self.only_a)} layers are 16-bit only in the first plan, {len(self.only_b)} only in the "
            f"second; {len(self.changed)} differ in format; {self.total_bytes / 1e9:+.3f} GB{kl}"
        )


def diff(a: ProtectionPlan, b: ProtectionPlan) -> PlanDiff:
    """Compare two plans of one model.

    Raises:
        PlanError: the plans are for different models.
    """
    if a.formats.keys() != b.formats.keys():
        strange = sorted(a.formats.keys() ^ b.formats.keys())
        raise PlanError(f"the plans are for different models: {_listed(strange)} is in only one of them.")
    known = a.predicted_kl is not None and b.predicted_kl is not None
    return PlanDiff(
        only_a=tuple(name for name in a.protected if name not in set(b.protected)),
        only_b=tuple(name for name in b.protected if name not in set(a.protected)),
        changed={
            name: (a.formats[name], b.formats[name])
            for name in a.formats
            if a.formats[name] != b.formats[name]
        },
        total_bytes=b.bytes["total"] - a.bytes["total"],
        predicted_kl=b.predicted_kl - a.predicted_kl if known else None,  # type: ignore[operator]
    )


# --- helpers ---------------------------------------------------------------------------------------------


def _identity(model: Mapping[str, Any]) -> str:
    return f"{model.get('id')} (weights {str(model.get('sha256'))[:12]})"


def _listed(names: Sequence[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _able(plan: ProtectionPlan, able: Collection[str]) -> str:
    if plan.writers:
        return f"Write it with backend={sorted(plan.writers)[0]!r}."
    return f"{', '.join(sorted(able))} can hold that format, but no writer holds all of this plan's formats."


def _number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and not math.isnan(value)


def _texts(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(value, str) for value in values)


def _options(value: Any) -> bool:
    """group, patterns and seed; an entry that is missing was not asked for."""
    if not isinstance(value, dict):
        return False
    patterns = (value.get(name) for name in ("force_16bit", "forbid_16bit"))
    seed = value.get("seed", 0)
    return (
        value.get("group") in GROUPS
        and all(one is None or isinstance(one, str) or _texts(one) for one in patterns)
        and isinstance(seed, int)
        and not isinstance(seed, bool)
    )


def _bytes(value: Any) -> bool:
    return isinstance(value, dict) and "total" in value and all(map(_number, value.values()))


# What each entry of plan.json must be, and in words.
ENTRIES: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "model": (lambda value: isinstance(value, dict), "an object"),
    "score": (lambda value: isinstance(value, str), "a text"),
    "direction": (lambda value: value in DIRECTIONS, "'high' or 'low'"),
    "rule": (lambda value: isinstance(value, str), "a text"),
    "value": (lambda value: value is None or _number(value), "a number or null"),
    "formats": (
        lambda value: isinstance(value, dict) and _texts(list(value.values())),
        "an object {module: format}",
    ),
    "protected": (_texts, "a list of module names"),
    "double_quant": (lambda value: isinstance(value, bool), "true or false"),
    "bytes": (_bytes, "an object of numbers, `total` among them"),
    "bits_per_weight": (_number, "a number"),
    "matrix_bits": (_number, "a number"),
    "predicted_kl": (lambda value: value is None or _number(value), "a number or null"),
    "layers_fingerprint": (lambda value: isinstance(value, str), "a text"),
    "schema": (lambda value: value == SCHEMA, str(SCHEMA)),
    "origin": (lambda value: isinstance(value, str), "a text"),
    "reason": (lambda value: isinstance(value, str), "a text"),
    "rounding": (lambda value: value in ("guided", "nearest"), "'guided' or 'nearest'"),
    "options": (_options, "an object of group, force_16bit, forbid_16bit and seed"),
}
OPTIONAL = ("origin", "reason", "options", "rounding")  # an older version's plans lack them


def _check_entries(path: str | Path, held: Mapping[str, Any]) -> None:
    """Refuse a plan.json with entries that are missing, unknown or of another type."""
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


def _check_formats(path: str | Path, plan: ProtectionPlan) -> None:
    """Refuse formats that are unknown, or that aren't what `protected` says."""
    for name, fmt in plan.formats.items():
        try:
            format_row(fmt)
        except PlanError as error:
            raise PlanError(f"{path}: {name}: {error} {AGAIN}") from error
    held = tuple(name for name, fmt in plan.formats.items() if fmt == "16bit")
    if held != plan.protected:
        raise PlanError(
            f"{path}: `protected` lists {len(plan.protected)} layers, `formats` keeps {len(held)} in 16-bit; "
            f"they must be the same, in the same order. {AGAIN}"
        )
