"""What the engines' recipes share: what they know of a model, what they are, and how they name modules."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from spi_utils.formats import fits, format_row
from spi_utils.plan import ProtectionPlan

NEAREST = {"nf4": "int4_g32"}  # for engines with integers alone: both are 4.5 bits a weight


@dataclass(frozen=True)
class ModelFacts:
    """What recipes need to know of a model beside the plan.

    `planned`: module -> (role, columns); `others`: every further matrix -> its role. `composite`: the config
    holds a text model inside a larger one, whose modules are named `model.language_model.…` when it is loaded
    whole.
    """

    model_type: str
    storage_dtype: str
    composite: bool
    planned: Mapping[str, tuple[str, int]]
    others: Mapping[str, str]


@dataclass(frozen=True)
class Recipe:
    """A plan in an engine's words: the file without its header (text, or a JSON object), what differs from
    the plan, and further files, name -> text.
    """

    body: str | dict[str, Any]
    notes: tuple[str, ...]
    files: Mapping[str, str] = field(default_factory=dict)


def pattern(name: str, composite: bool = False) -> str:
    """An anchored regular expression that matches this name alone (and, of a composite, its longer form)."""
    text = re.escape(name)
    if composite:
        text = re.sub(r"^model\\\.", r"model\\.(?:language_model\\.)?", text)
    return f"^{text}$"


def integers(
    plan: ProtectionPlan, facts: ModelFacts, conv1d: bool = False
) -> tuple[dict[str, str], list[str]]:
    """The plan in 16bit, int8 and int4 alone, and what had to change; `conv1d`: can the engine take those."""
    held, refused = {}, []
    for name, fmt in plan.formats.items():
        role, cols = facts.planned[name]
        near = NEAREST.get(fmt, fmt)
        able = fits(near, cols) and (conv1d or role != "conv1d")
        held[name] = near if able else "16bit"
        refused += [] if able or near == "16bit" else [name]
    notes = [
        f"{fmt} doesn't exist here: {plan.count(fmt)} layers become {near} "
        f"({format_row(near).bits_per_weight:g} bits a weight); the plan's predicted KL doesn't hold."
        for fmt, near in NEAREST.items()
        if fmt in plan.formats.values()
    ]
    if refused:
        notes.append(
            f"kept in 16-bit, because the group doesn't divide the columns or the module is no nn.Linear: "
            f"{', '.join(refused)}."
        )
    return held, notes


def target(name: str, facts: ModelFacts) -> str:
    """A module as llm-compressor and torchao are told of it: the plain name, or `re:` and a pattern."""
    return f"re:{pattern(name, True)}" if facts.composite else name
