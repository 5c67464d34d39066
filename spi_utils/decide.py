"""The run's plan: made from a notebook's parameters, unless a person has saved one from the explorer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from inspect import signature
from typing import Any

from spi_utils.errors import PlanError
from spi_utils.plan import ProtectionPlan, check_writer, make_plan
from spi_utils.planning.rules import RULES
from spi_utils.planning.scores import score_row, suggest
from spi_utils.runs import Run, layers_fingerprint, read_layers, run_info, run_rounding

# What a layer may become: with a score that only orders layers, and with one whose costs add up.
TIERS = {
    "bitsandbytes": (("nf4", "16bit"), ("nf4", "16bit")),
    "compressed-tensors": (("int4_g64", "16bit"), ("int4_g64", "int8", "16bit")),
}
CHOICES = ("score", "direction", "rule", "value", "double_quant", "force_16bit", "forbid_16bit")
DEFAULTS = {name: signature(make_plan).parameters[name].default for name in CHOICES}
AUTO_GROUP = {"bitsandbytes": None, "compressed-tensors": "fused"}


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
        formats: what a layer may become; none are the backend's own, see `TIERS`.
        group: "fused", None, or "auto": "fused" where the backend's checkpoints are for engines that merge
            layers (compressed-tensors).
        force: replace a plan saved from the explorer.
        choices: what else `plan.make_plan` takes: score, direction, rule, value, double_quant, …

    Raises:
        PlanError: as `make_plan`, an unknown backend, or a saved plan that the backend can't hold or that
            these choices contradict (force=True replaces it).
        RunError: no layer table.
    """
    mark = layers_fingerprint(run)
    if backend not in TIERS:
        raise PlanError(f"unknown backend {backend!r}.{suggest(backend, TIERS)} Known: {', '.join(TIERS)}.")
    kept = None if force else _saved_by_hand(run, mark)
    if kept is not None:
        check_writer(kept, backend)
        _refuse_other_choices(kept, choices)
        print(
            f"Kept the plan saved from the explorer ({len(kept.protected)} layers); force=True replaces it."
        )
        return kept
    model = run_info(run)["model"]
    choices["formats"] = tuple(formats) or default_formats(backend, **choices)
    choices["group"] = AUTO_GROUP[backend] if group == "auto" else group
    plan = make_plan(read_layers(run), model=model, layers_fingerprint=mark, writer=backend, **choices)
    plan = replace(plan, rounding=run_rounding(run))
    plan.write(run.plan_json)
    return plan


def default_formats(
    backend: str, score: str = "alpha_hill", direction: str = "high", rule: str = "claim", **_: Any
) -> tuple[str, ...]:
    """A backend's formats: all of its tiers where costs add up and a budget is spent, else two."""
    ordered, additive = TIERS[backend]
    spends = rule in RULES and (bool(RULES[rule].unit) or rule == "max_kl")
    return additive if score_row(score).additive and direction == "high" and spends else ordered


def _refuse_other_choices(kept: ProtectionPlan, choices: Mapping[str, Any]) -> None:
    """A plan saved by hand must not answer for a score, rule or wish that it wasn't made by."""
    held = {**vars(kept), **kept.options}
    asked = {
        name: choices[name]
        for name, default in DEFAULTS.items()
        if name in choices and not _agrees(choices[name], default, held.get(name))
    }
    if asked:
        wanted = ", ".join(f"{name}={value!r}" for name, value in asked.items())
        raise PlanError(
            f"this run holds a plan saved from the explorer (score={kept.score!r}, direction="
            f"{kept.direction!r}, rule={kept.rule!r}, value={kept.value!r}), and {wanted} asks for another. "
            "Run notebook 02_visualize with force=True to replace the saved plan, or leave these parameters "
            "at their defaults to keep it."
        )


def _agrees(asked: Any, default: Any, held: Any) -> bool:
    """Whether a choice is the default or what a plan holds; an explorer adds patterns for failed layers."""
    if not isinstance(default, str) and isinstance(asked, str | list | tuple):
        patterns, own = ([one] if isinstance(one, str) else list(one or ()) for one in (asked, held))
        return set(filter(None, patterns)) <= set(own)
    return asked in (default, held)


def _saved_by_hand(run: Run, mark: str) -> ProtectionPlan | None:
    if not run.plan_json.exists():
        return None
    plan = ProtectionPlan.read(run.plan_json, model=run_info(run)["model"])
    return plan if plan.origin == "slider" and plan.layers_fingerprint == mark else None


def read_plan(run: Run) -> ProtectionPlan:
    """The run's plan, checked to be of this run's model and layer table.

    Raises:
        PlanError: missing, damaged, or for something else; says to run notebook 02_visualize.
    """
    return ProtectionPlan.read(
        run.plan_json, model=run_info(run)["model"], layers_fingerprint=layers_fingerprint(run)
    )
