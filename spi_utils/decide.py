"""The run's plan: made from a notebook's parameters, unless a person has saved one from the explorer."""

from __future__ import annotations

from typing import Any

from spi_utils.plan import ProtectionPlan, make_plan
from spi_utils.runs import Run, layers_fingerprint, read_layers, run_info


def decide(run: Run, *, force: bool = False, **choices: Any) -> ProtectionPlan:
    """Write `plan.json` by a score and a rule, and return the plan that the run now holds.

    A plan saved from the explorer for this very layer table is kept, and that is said; `force` replaces it.

    Args:
        run: a run with a layer table.
        force: replace a plan saved from the explorer.
        choices: what `plan.make_plan` takes: score, direction, rule, value, formats, double_quant, …

    Raises:
        PlanError: as `make_plan`.
        RunError: no layer table.
    """
    mark = layers_fingerprint(run)
    kept = None if force else _saved_by_hand(run, mark)
    if kept is not None:
        print(
            f"Kept the plan saved from the explorer ({len(kept.protected)} layers); force=True replaces it."
        )
        return kept
    model = run_info(run)["model"]
    plan = make_plan(read_layers(run), model=model, layers_fingerprint=mark, **choices)
    plan.write(run.plan_json)
    return plan


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
