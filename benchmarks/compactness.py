"""Does a compact spectrum make a network robust, and does α predict it? The lab's full grid.

    python -m benchmarks.compactness                       # everything; at most 90 minutes on 2 cores
    python -m benchmarks.compactness --json docs/compactness.json   # the summary that notebook 06 shows
    python -m benchmarks.compactness --costs               # only what a trace-norm gradient costs

Small character transformers (0.33 M weights in matrices) on CPython's pydoc topics: nine arms, equal 16-bit
loss, damage by NF4, int4 and int3, and by single layers. Finished runs stay in bench-out/, so
an interrupted benchmark goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from spi_utils.compactness import trace_norm
from spi_utils.errors import AnalysisError
from spi_utils.lab.experiment import Setting, run_all
from spi_utils.lab.numeric import depth_table, mass_table, quantizer_grid
from spi_utils.lab.summary import summarize
from spi_utils.lab.tables import arm_frame, closing_table, correlation_frame, plan_frame
from spi_utils.lab.training import NUCLEAR, STANDARD, Arm, load_corpus, trace_arm
from spi_utils.progress import one_thread
from spi_utils.runs import write_text

SWEEP = (1e-4, 3e-4, 1e-3)  # coefficients of the trace norm
STRONG, MIDDLE = SWEEP[-1], SWEEP[1]
SHAPES = ((96, 96), (96, 384), (512, 512))


def control_arm(penalty: str, c: float) -> Arm:
    """A penalty on σ_1² or on ‖W‖_F²: smaller norms without the preference for few directions."""
    title = {"spectral": "spectral norm", "frobenius": "Frobenius norm"}[penalty]
    return Arm(penalty, f"{title}, c = {c:g}", "control", penalty=penalty, coefficient=c)


def low_rank_arm(rank: int) -> Arm:
    """Every matrix a product of this rank."""
    return Arm("low_rank", f"low rank, r = {rank}", "control", rank=rank)


def full_arms(controls: list[Arm]) -> list[Arm]:
    """(a) standard, (b) nuclear initialization, (c) the sweep, (d) both, (e) the tuned controls."""
    both = Arm("both", f"both, c = {MIDDLE:g}", nuclear=True, penalty="trace", coefficient=MIDDLE)
    return [STANDARD, NUCLEAR, *(trace_arm(c) for c in SWEEP), both, *controls]


# --- the controls, tuned to the strongest trace norm -------------------------------------------------------

TUNING_SEED = 1000  # no seed of the experiment
# Of the controls: penalties' coefficients, and ranks.
FROBENIUS_GRID, SPECTRAL_GRID, RANK_GRID = (3e-4, 6e-4, 1e-3), (1e-2, 3e-2, 1e-1), (20, 28, 36)


def tune_controls(
    reference: Arm, setting: Setting, folder: Path, *, workers: int | None = None
) -> tuple[list[Arm], list[dict[str, Any]]]:
    """The control arms that match `reference` on a seed of their own, and the table they were chosen from.

    Spectral and Frobenius penalties: the coefficient that reaches the last level in the number of steps
    nearest to the reference's, so that their loss is equal after equal training. Low rank: the rank whose
    effective rank at the last level is nearest (both as ratios).

    Raises:
        AnalysisError: none of a control's arms reaches the last level.
    """
    grids = (
        ("step", [control_arm("frobenius", c) for c in FROBENIUS_GRID]),
        ("step", [control_arm("spectral", c) for c in SPECTRAL_GRID]),
        ("effective_rank_rel", [low_rank_arm(rank) for rank in RANK_GRID]),
    )
    arms = [reference, *(arm for _, grid in grids for arm in grid)]
    table = []
    for run in run_all(arms, [TUNING_SEED], setting, folder, workers=workers):
        level = run["levels"][-1]
        ranks = [layer["effective_rank_rel"] for layer in level["layers"].values()]
        row = {"arm": run["arm"]["label"], "reached": run["reached"], "step": level["step"]}
        table.append(row | {"effective_rank_rel": float(np.mean(ranks))})
    chosen, target = [], table[0]
    for key, grid in grids:
        rows = table[1 + arms[1:].index(grid[0]) :][: len(grid)]
        gaps = [abs(math.log(row[key] / target[key])) if row["reached"] else math.inf for row in rows]
        if math.isinf(min(gaps)):
            raise AnalysisError(
                f"No {grid[0].name} control reached loss {setting.recipe.levels[-1]} in "
                f"{setting.recipe.limit} steps; raise the limit or the last level."
            )
        chosen.append(grid[int(np.argmin(gaps))])
    return chosen, table


# --- what a gradient of the trace norm costs -------------------------------------------------------------


def newton_schulz(weight: Tensor) -> Tensor:
    """The polar factor by matrix products alone: six lifts by Muon's quintic, three steps that converge."""
    x = weight / torch.linalg.matrix_norm(weight)
    for a, b, c in ((3.4445, -4.7750, 2.0315),) * 6 + ((15 / 8, -10 / 8, 3 / 8),) * 3:
        gram = x @ x.T
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x


def randomized(weight: Tensor, rank: int = 32) -> Tensor:
    """U Vᵀ of a randomized SVD of that rank (Halko et al. 2011)."""
    basis, _ = torch.linalg.qr(weight @ torch.randn(weight.shape[1], rank))
    u, _, vh = torch.linalg.svd(basis.T @ weight, full_matrices=False)
    return basis @ u @ vh


def gradient(weight: Tensor, method: str) -> Tensor:
    """The gradient of `trace_norm`, by autograd."""
    leaf = weight.clone().requires_grad_()
    trace_norm(leaf, method=method).backward()  # type: ignore[no-untyped-call]
    assert leaf.grad is not None
    return leaf.grad


def costs(repeats: int = 15) -> list[dict[str, Any]]:
    """Milliseconds (median) and relative error of a gradient at a Gaussian weight of each shape, float32."""
    methods: dict[str, Callable[[Tensor], Tensor]] = {
        "exact (SVD)": lambda w: gradient(w, "exact"),
        "fast (Gram)": lambda w: gradient(w, "fast"),
        "Newton-Schulz": newton_schulz,
        "randomized, rank 32": randomized,
    }
    torch.manual_seed(0)
    rows = []
    for shape in SHAPES:
        weight = torch.randn(shape)
        u, _, vh = torch.linalg.svd(weight.double(), full_matrices=False)
        size = f"{shape[0]} × {shape[1]}"
        for name, find in methods.items():
            error = float((find(weight) - u @ vh).norm() / vh.norm())
            ms = _median_ms(find, weight, repeats)
            rows.append({"shape": size, "method": name, "ms": ms, "relative error": f"{error:.0e}"})
        left, right = torch.randn(shape[0], 32), torch.randn(32, shape[1])
        ms = _median_ms(partial(_factors, left, right), weight, repeats)
        rows.append({"shape": size, "method": "factors, rank 32", "ms": ms, "relative error": "another form"})
    return rows


def _factors(left: Tensor, right: Tensor, _: Tensor) -> Tensor:
    """½(‖A‖_F² + ‖B‖_F²) ≥ ‖A B‖_*, equal for balanced factors (Srebro 2005): nothing is decomposed."""
    return 0.5 * (left.square().sum() + right.square().sum())


def _median_ms(find: Callable[[Tensor], Tensor], weight: Tensor, repeats: int) -> float:
    find(weight)
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        find(weight)
        times.append(1e3 * (time.perf_counter() - start))
    return round(statistics.median(times), 3)


# --- the whole -------------------------------------------------------------------------------------------


def benchmark(seeds: int, folder: Path, workers: int | None) -> dict[str, Any]:
    """Tune the controls, run the grid, and summarize it."""
    setting = Setting()
    reference = trace_arm(STRONG)
    controls, tuning = tune_controls(reference, setting, folder, workers=workers)
    results = run_all(full_arms(controls), range(seeds), setting, folder, workers=workers)
    corpus = load_corpus(setting.shape.context, setting.level_windows, setting.judge_windows)
    weights = sum(results[0]["final"]["weights"].values())
    return summarize(
        results,
        reference.name,
        setting=asdict(setting),
        weights_in_matrices=weights,
        text={"name": "pydoc", "sha256": corpus.sha256},
        tuning=tuning,
    )


def show(summary: dict[str, Any]) -> None:
    """Print the tables and the answers."""
    titles = {"The arms": arm_frame(summary), "ρ with NF4's KL": correlation_frame(summary),
              "Plans in int3": plan_frame(summary)}  # fmt: skip
    for title, table in titles.items():
        print(f"\n{title}\n{table.to_string(index=False)}")
    closing = closing_table(summary, mass_table(), quantizer_grid(), depth_table()[0])
    for row in closing.to_dict("records"):
        print(f"\n{row['stated']}: {row['verdict'].upper()}\n  {row['reproduced']}")
        print(f"  → {row['for choosing layers']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", metavar="PATH", help="write the summary there")
    parser.add_argument("--costs", action="store_true", help="only what a trace-norm gradient costs")
    parser.add_argument("--seeds", type=int, default=7)
    parser.add_argument("--workers", type=int, default=None, help="processes; default: one a core")
    parser.add_argument("--folder", default="bench-out/compactness", type=Path, help="for finished runs")
    given = parser.parse_args()
    with one_thread():
        table = costs()
    print(pd.DataFrame(table).to_string(index=False))
    if given.costs:
        return
    summary = benchmark(given.seeds, given.folder, given.workers)
    show(summary)
    if given.json:
        # A line a key: short enough to read a difference, and a third of an indented file.
        lines = [
            f"{json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in summary.items()
        ]
        write_text(given.json, "{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
