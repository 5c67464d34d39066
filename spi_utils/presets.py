"""Presets: one word for what people want. Each sets the parameters that stand as None; what is given wins.

No torch here: the command line answers from it at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_COST: dict[str, Any] = {
    "score": "fisher",
    "direction": "high",
    "rule": "matrix_bits",
    "formats": [],
    "double_quant": False,
    "rounding": "guided",
}
# 8.1 bits are int8 everywhere with the dearest layers in 16-bit; 4.6 are NF4 with double quantization, which
# takes 4.15, and what that leaves for them.
PRESETS: dict[str, dict[str, Any]] = {
    "claim": {
        "score": "alpha_hill",
        "direction": "high",
        "rule": "claim",
        "value": None,
        "backend": "bitsandbytes",
        "formats": [],
        "double_quant": False,
        "rounding": "guided",
    },
    "small": _COST | {"value": 4.6, "backend": "bitsandbytes", "double_quant": True},
    # groups of 32: at 5.5 bits a sixth less KL than groups of 64, docs/results.md
    "balanced": _COST
    | {"value": 5.5, "backend": "compressed-tensors", "formats": ["int4_g32", "int8", "16bit"]},
    "near-lossless": _COST | {"value": 8.1, "backend": "compressed-tensors"},
}
DEFAULT = "claim"
# Windows of own text that guide the rounding, where none are asked for: docs/results.md has the curve.
OWN_WINDOWS = {"quick": 32, "full": 128}


def resolve(preset: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of `given` that a preset knows, None replaced by what the preset sets.

    A rule that is given brings its own value, a score its own direction ("high" unless given), another
    rule, score or backend its own formats: half of a preset's pair would mean something else.

    Args:
        preset: a key of `PRESETS`.
        given: parameter -> value; None is "not given". Names that no preset sets are left out.
    """
    row = dict(PRESETS[preset])
    other = {name for name in row if given.get(name) not in (None, row[name])}
    if "rule" in other:
        row["value"] = None
    if "score" in other:
        row["direction"] = "high"
    if other & {"rule", "score", "backend"}:  # an order, or a number of layers, chooses between two formats
        row["formats"] = []
    if "backend" in other:
        row["double_quant"] = False
    chosen = {name: given[name] for name in row if name in given}
    return {name: row[name] if value is None else value for name, value in chosen.items()}


def told(preset: str, given: Mapping[str, Any]) -> str:
    """What a preset and the parameters beside it come to, in a line."""
    chosen = {name: value for name, value in resolve(preset, given).items() if value is not False}
    parts = (f"{name}={value!r}" for name, value in chosen.items() if value not in (None, []))
    return f"preset {preset!r}: {', '.join(parts)}"


def formats_to_cost(given: Mapping[str, Any]) -> list[str]:
    """Formats whose costs and codes a run needs: `cost_formats` where given, else NF4, int8 (the controls'),
    and what else its plan may hold; with the profile "full" int4 in any case. Double quantization brings
    its own costs and codes of NF4, last."""
    names = ("score", "rule", "backend", "formats", "double_quant")
    asked = {name: given.get(name) for name in names}
    chosen = resolve(given.get("preset") or DEFAULT, asked)
    mixes = chosen["backend"] == "compressed-tensors" and not chosen["formats"]
    mixes = mixes or given.get("profile") == "full"
    found = given.get("cost_formats") or ["nf4", "int8", *(["int4_g64"] if mixes else []), *chosen["formats"]]
    nested = ["nf4_dq"] if chosen["double_quant"] and "nf4" in found else []
    return [fmt for fmt in dict.fromkeys(found) if fmt not in ("16bit", *nested)] + nested


def for_all_stages(given: Mapping[str, Any]) -> dict[str, Any]:
    """All stages' parameters: the formats whose costs are needed, and the profile "full" brings its windows
    of own text unless some are given."""
    whole = dict(given) | {"cost_formats": formats_to_cost(given)}
    if whole.get("profile") == "full" and not whole.get("sensitivity_windows"):
        whole["sensitivity_windows"] = OWN_WINDOWS["full"]
    return whole
