"""The budget of Qwen3.5-4B on a free T4, stage by stage: arithmetic, not a measurement.

python -m benchmarks.budget                 # Kaggle and Colab, quick and full
python -m benchmarks.budget --run RUN_DIR   # beside what a finished run of any model took here
python -m benchmarks.budget --json FILE
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from spi_utils.budget import MACHINES, Cost, Machine, Model, beside_actual, budget, check_budget, work_of
from spi_utils.presets import OWN_WINDOWS, formats_to_cost
from spi_utils.runs import existing_run, read_layers, run_info, write_json

LIMITS = {"quick": 20, "full": 40}  # minutes that the project promises on a T4


def qwen35_4b() -> Model:
    """The text part of Qwen3.5-4B: 24 linear-attention blocks, 8 of full attention, 32 MLPs, a tied head."""
    hidden, inner = 2560, 9216
    linear = [(8192, hidden), (4096, hidden), (hidden, 4096), (32, hidden), (32, hidden)]
    full = [(8192, hidden), (1024, hidden), (1024, hidden), (hidden, 4096)]
    mlp = [(inner, hidden), (inner, hidden), (hidden, inner)]
    shapes = (*(24 * linear), *(8 * full), *(32 * mlp))
    return Model(shapes, other=248_320 * hidden, vocabulary=248_320, hidden=hidden, blocks=32)


def table(model: Model, machine: Machine, profile: str, run: Path | None) -> tuple[list[Cost], str]:
    """The costs of one profile on one machine, and them as a Markdown table with its problems."""
    tokens, variants = work_of(profile)
    more: dict[str, Any] = {"own": OWN_WINDOWS[profile], "formats": formats_to_cost({"profile": profile})}
    costs = budget(model, machine, tokens=tokens, variants=variants, **more)
    stages = run_info(existing_run(run))["stages"] if run else {}
    notes = check_budget(costs, machine) or [
        f"fits; {LIMITS[profile]} minutes are promised after the download"
    ]
    return costs, f"{beside_actual(costs, stages)}\n\n{'; '.join(notes)}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--run", type=Path, help="a finished run: its model's shapes, and its actual times")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    model = Model.of_layers(read_layers(existing_run(asked.run))) if asked.run else qwen35_4b()
    results = {}
    for machine in MACHINES.values():
        for profile in LIMITS:
            costs, text = table(model, machine, profile, asked.run)
            print(f"### {machine.name}, {profile}\n\n{text}")
            results[f"{machine.name}, {profile}"] = [asdict(cost) for cost in costs]
    if asked.json:
        write_json(asked.json, results)


if __name__ == "__main__":
    main()
