"""What is settled before a slider moves: a person's wishes, kept from the run's plan, and failed layers.

No score can tell what a layer costs whose analysis failed, so no threshold chooses it: it stays in 16-bit,
which is safe, unless a pattern of the person's speaks of it. Plans saved from the explorer record that.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from spi_utils.figures.score_figures import planned_layers
from spi_utils.plan import ProtectionPlan
from spi_utils.planning.choice import Patterns, matches
from spi_utils.planning.pricing import nominal_bits
from spi_utils.planning.scores import available_scores
from spi_utils.runs import run_info

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray

    from spi_utils.runs import Run

NAMED = 3  # failed layers named in a sentence; the rest are counted


@dataclass(frozen=True)
class Wishes:
    """Groups and patterns as `plan.make_plan` takes them, and the layers whose analysis failed.

    `failed` (L,) marks planned layers; `held` names those of them that no pattern speaks of, which therefore
    stay in 16-bit. `left_out` says what of the run's plan an explorer can't keep.
    """

    group: str | None
    force_16bit: tuple[str, ...]
    forbid_16bit: tuple[str, ...]
    seed: int
    failed: NDArray[np.bool_]
    held: tuple[str, ...]
    left_out: str = ""

    @classmethod
    def of(
        cls,
        layers: pd.DataFrame,
        *,
        group: str | None = None,
        force_16bit: Patterns = None,
        forbid_16bit: Patterns = None,
        seed: int = 0,
        left_out: str = "",
    ) -> Wishes:
        """A person's wishes on a layer table.

        Raises:
            PlanError: a pattern that is no regular expression or matches no planned layer.
        """
        planned = planned_layers(layers)
        failed = (planned["status"] == "failed").to_numpy()
        names = list(planned["name"])
        # A plan that an explorer saved names its failed layers; they are found anew in each table.
        own = {_exactly(name) for name in planned["name"][failed]}
        force = tuple(pattern for pattern in _listed(force_16bit) if pattern not in own)
        forbid = _listed(forbid_16bit)
        spoken = matches(names, force, "force_16bit") | matches(names, forbid, "forbid_16bit")
        held = tuple(planned["name"][failed & ~spoken])
        return cls(group, force, forbid, seed, failed, held, left_out)

    @property
    def options(self) -> dict[str, Any]:
        """What `make_plan` and `Chooser.of` take, failed layers included."""
        force = [*self.force_16bit, *map(_exactly, self.held)]
        return {
            "group": self.group,
            "force_16bit": force or None,
            "forbid_16bit": list(self.forbid_16bit) or None,
            "seed": self.seed,
        }

    def count(self) -> str:
        """How many layers are in 16-bit because their analysis failed, to end a count; empty if none is."""
        return f", {len(self.held)} of them as their analysis failed" if self.held else ""

    def failures(self) -> str:
        """Which layers stay in 16-bit because their analysis failed, as a sentence; empty if none does."""
        if not self.held:
            return ""
        more = f" and {len(self.held) - NAMED} more" if len(self.held) > NAMED else ""
        what = "1 layer stays" if len(self.held) == 1 else f"{len(self.held)} layers stay"
        return (
            f"{what} in 16-bit because the analysis failed there: {', '.join(self.held[:NAMED])}{more}; "
            "no threshold chooses among those."
        )

    def sentences(self) -> str:
        """What holds whatever is chosen, for the explorer's notes; empty if nothing does."""
        kept = {"group": self.group, "force_16bit": self.force_16bit, "forbid_16bit": self.forbid_16bit}
        told = ", ".join(
            f"{name} {value if isinstance(value, str) else ', '.join(value)}"
            for name, value in kept.items()
            if value
        )
        wishes = f"Held at every threshold, and saved with the plan: {told}." if told else ""
        return " ".join(filter(None, (self.failures(), wishes, self.left_out)))


def start_of(plan: ProtectionPlan, options: Mapping[str, Any], layers: pd.DataFrame) -> dict[str, Any]:
    """Options that start an explorer at a plan; its threshold only if no other score is asked for."""
    quantized = sorted(set(plan.formats.values()) - {"16bit"}, key=nominal_bits)
    lower = options.get("lower") or (quantized[0] if quantized else "nf4")
    start: dict[str, Any] = {"share": plan.count("16bit") / max(len(plan.formats), 1), "lower": lower}
    known = plan.score in available_scores(layers, (lower, "16bit"))
    if known and not {"score", "direction", "share"} & set(options):
        start |= {"score": plan.score, "direction": plan.direction}
        start |= {"threshold": plan.value} if plan.rule == "threshold" else {}
    start |= {name: plan.options[name] for name in _WISHES if name in plan.options}
    dropped = [fmt for fmt in quantized if fmt != lower]
    if dropped:
        start["left_out"] = (
            f"Not kept from the run's plan: {', '.join(dropped)}; here layers are {lower} or 16-bit."
        )
    return start | {"double_quant": plan.double_quant}


def held_plan(run: Run) -> ProtectionPlan | None:
    """The run's plan, if it has one.

    Raises:
        PlanError: plan.json is damaged, or another model's.
    """
    if not run.plan_json.exists():
        return None
    return ProtectionPlan.read(run.plan_json, model=run_info(run)["model"])


_WISHES = ("group", "force_16bit", "forbid_16bit", "seed")


def _exactly(name: str) -> str:
    return f"^{re.escape(name)}$"


def _listed(patterns: Patterns) -> tuple[str, ...]:
    return (patterns,) if isinstance(patterns, str) else tuple(filter(None, patterns or ()))
