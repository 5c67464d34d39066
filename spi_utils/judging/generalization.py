"""Does it generalize? The audit's verdicts beside each other, a row for each run that was evaluated."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from spi_utils.judging.claims import audit
from spi_utils.judging.evaluation import Evaluation
from spi_utils.judging.measures import is_random
from spi_utils.runs import Run, existing_run, run_info

# Rows of the audit that don't depend on which model is run: key -> what "supported" says in a few words.
QUESTIONS = {
    "better": "lower loss than 16-bit",
    "random": "beats random layers",
    "direction": "beats the score's other end",
    "int8": "beats int8 everywhere",
    "fisher": "beats Fisher's choice",
}
SHOWN = ("fisher", "fisher_int8", "fisher_int4", "int8")


def evaluated_beside(run: Run) -> list[Path]:
    """The evaluated runs in the folder that holds this one, itself among them, in name order.

    A folder that can't be read is named and left out; a damaged run the report names itself.
    """
    folder = run.path.resolve().parent
    found = []
    for path in sorted(folder.iterdir()):
        one = Run(path)
        try:
            if one.evaluation_json.exists() and one.info_json.exists():
                found.append(path)
        except OSError as error:
            print(f"{path} is left out of the comparison: it can't be read ({error}).")
    return found


def generalization(run_dirs: Iterable[str | Path]) -> pd.DataFrame:
    """A row a run, with the audit's verdicts on what doesn't depend on the model.

    Columns: run (its folder), model, plan, text, windows, matrix bits, Δ loss with its interval, KL of plan,
    of random and of Fisher's and int8's controls, and the verdicts named in `QUESTIONS`. Losses in nats a
    token; NaN where a control was not run.

    Raises:
        RunError: a folder is no run, or has no evaluation yet.
    """
    rows = pd.DataFrame([_row(existing_run(folder)) for folder in run_dirs])
    return rows.astype({"Δ low": float, "Δ high": float})  # an unbounded end is NaN


def _row(run: Run) -> dict[str, Any]:
    evaluation = Evaluation.read(run.evaluation_json)
    variants = evaluation.variants
    delta = variants["plan"]["delta"]
    verdicts = {row["key"]: row["verdict"] for row in audit(evaluation)}
    randoms = [one["kl_mean"] for key, one in variants.items() if is_random(key)]
    return {
        "run": run.path.resolve().name,
        "model": run_info(run)["model"]["id"],
        "plan": f"{evaluation.plan['score']}, {evaluation.plan['direction']}",
        "text": evaluation.text["name"],
        "windows": evaluation.text["windows"],
        "matrix bits": evaluation.plan["matrix_bits"],
        "Δ loss": delta["mean"],
        "Δ low": delta["low"],
        "Δ high": delta["high"],
        "KL plan": variants["plan"]["kl_mean"],
        "KL random": float(np.mean(randoms)) if randoms else np.nan,
        **{f"KL {key}": _kl(variants, key) for key in SHOWN},
        **{key: verdicts[key] for key in QUESTIONS},
    }


def _kl(variants: Mapping[str, Mapping[str, Any]], key: str) -> float:
    return variants[key]["kl_mean"] if key in variants else np.nan


def count_verdicts(rows: pd.DataFrame, question: str) -> str:
    """How a question was answered over all runs: "supported in 1 of 3 runs, refuted in 2"."""
    counts = rows[question].value_counts(sort=False)
    first, *others = (f"{verdict} in {count}" for verdict, count in counts.items())
    return ", ".join([f"{first} of {len(rows)} runs", *others])
