"""Presets: one word for what people want. Each sets the parameters that stand as None; what is given wins.

No torch here: the command line answers from it at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_COST = {"score": "fisher", "direction": "high", "rule": "matrix_bits", "formats": [], "rounding": "guided"}
# 8.1 bits are int8 everywhere with the dearest layers in 16-bit; 4.6 are NF4 with one or two of them.
PRESETS: dict[str, dict[str, Any]] = {
    "claim": {
        "score": "alpha_hill",
        "direction": "high",
        "rule": "claim",
        "value": None,
        "backend": "bitsandbytes",
        "formats": [],
        "rounding": "guided",
    },
    "small": _COST | {"value": 4.6, "backend": "bitsandbytes"},
    "balanced": _COST | {"value": 5.5, "backend": "compressed-tensors"},
    "near-lossless": _COST | {"value": 8.1, "backend": "compressed-tensors"},
}
DEFAULT = "claim"
# Windows of own text that guide the rounding, where none are asked for: docs/results.md has the curve.
OWN_WINDOWS = {"quick": 32, "full": 128}


def resolve(preset: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of `given` that a preset knows, None replaced by what the preset sets.

    A rule that is given brings its own value, and a score its own direction ("high" unless given): half of
    a preset's pair would mean something else.

    Args:
        preset: a key of `PRESETS`.
        given: parameter -> value; None is "not given". Names that no preset sets are left out.
    """
    row = dict(PRESETS[preset])
    if given.get("rule") not in (None, row["rule"]):
        row["value"] = None
    if given.get("score") not in (None, row["score"]):
        row["direction"] = "high"
    chosen = {name: given[name] for name in row if name in given}
    return {name: row[name] if value is None else value for name, value in chosen.items()}


def told(preset: str, given: Mapping[str, Any]) -> str:
    """What a preset and the parameters beside it come to, in a line."""
    parts = (f"{name}={value!r}" for name, value in resolve(preset, given).items() if value not in (None, []))
    return f"preset {preset!r}: {', '.join(parts)}"


def formats_to_cost(given: Mapping[str, Any]) -> list[str]:
    """Formats whose costs and codes a run needs: `cost_formats` where given, else NF4, int8 (the controls'),
    and what else its plan may hold; with the profile "full" int4 in any case."""
    if given.get("cost_formats"):
        return list(given["cost_formats"])
    asked = {name: given.get(name) for name in ("backend", "formats")}
    chosen = resolve(given.get("preset") or DEFAULT, asked)
    mixes = chosen["backend"] == "compressed-tensors" or given.get("profile") == "full"
    found = ["nf4", "int8", *(["int4_g64"] if mixes else []), *chosen["formats"]]
    return [fmt for fmt in dict.fromkeys(found) if fmt != "16bit"]


def for_all_stages(given: Mapping[str, Any]) -> dict[str, Any]:
    """All stages' parameters: the formats whose costs are needed, and the profile "full" brings its windows
    of own text unless some are given; double quantization brings its own costs and codes of NF4."""
    whole = dict(given) | {"cost_formats": formats_to_cost(given)}
    if whole.get("profile") == "full" and not whole.get("sensitivity_windows"):
        whole["sensitivity_windows"] = OWN_WINDOWS["full"]
    if whole.get("double_quant") and "nf4" in whole["cost_formats"]:
        whole["cost_formats"] = [fmt for fmt in whole["cost_formats"] if fmt != "nf4_dq"] + ["nf4_dq"]
    return whole
