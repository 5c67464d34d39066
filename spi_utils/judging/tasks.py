"""Multiple-choice tasks through lm-evaluation-harness, where it is installed (`pip install lm_eval`).

The harness' own model class (`HFLM`) wraps the model in memory, so the 16-bit reference, pure NF4 and the
plan answer the same questions from the same weights. Accuracies come with the harness' standard errors.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spi_utils.errors import EvaluationError

if TYPE_CHECKING:
    from spi_utils.judging.session import Session

ANSWERING = ("reference", "nf4", "plan")


def check_names(parameter: str, given: Any, what: str) -> tuple[str, ...]:
    """A parameter's list of names or paths, as texts; EvaluationError if it is anything else."""
    if not isinstance(given, list | tuple):
        hint = f" Write {parameter}=[{str(given)!r}]." if isinstance(given, str | Path) and str(given) else ""
        raise EvaluationError(f"{parameter}={given!r}: expected a list of {what}, [] for none.{hint}")
    for one in given:
        if not isinstance(one, str | Path) or not str(one).strip():
            raise EvaluationError(f"{parameter}={given!r}: {one!r} is none of the {what} that are expected.")
    return tuple(map(str, given))


def check_harness(names: Sequence[str], limit: Any) -> None:
    """Refuse tasks before scoring where lm_eval is missing or the limit is no number of questions."""
    if not names:
        return
    if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
        raise EvaluationError(f"lm_eval_limit={limit!r}: expected a number of questions, 1 or more.")
    try:
        importlib.import_module("lm_eval")
    except ImportError as error:
        raise EvaluationError(
            f"lm_eval_tasks={list(names)} needs lm-evaluation-harness: `pip install lm_eval`, or leave it."
        ) from error


def score_tasks(session: Session, names: Sequence[str], limit: int) -> dict[str, dict[str, Any]]:
    """Accuracy on the first `limit` questions: {task: {variant: {"value", "stderr", "samples"}}}.

    Raises:
        EvaluationError: lm_eval isn't installed, or a task has no accuracy.
    """
    check_harness(names, limit)
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    from spi_utils.models import load_tokenizer

    found: dict[str, dict[str, Any]] = {name: {} for name in names}
    tokenizer = load_tokenizer(session.source)
    for key, model in session.visit(ANSWERING):
        wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1)
        seeds = {
            "random_seed": session.seed,
            "numpy_random_seed": session.seed,
            "torch_random_seed": session.seed,
        }
        answered = simple_evaluate(model=wrapped, tasks=list(names), limit=limit, bootstrap_iters=0, **seeds)
        for name in names:
            found[name][key] = _accuracy(name, answered)
    return found


def _accuracy(name: str, answered: Any) -> dict[str, Any]:
    held = answered["results"].get(name, {})
    if "acc,none" not in held:
        raise EvaluationError(f"the task {name!r} has no accuracy: choose a multiple-choice task.")
    samples = answered["n-samples"][name]["effective"]
    return {"value": held["acc,none"], "stderr": held["acc_stderr,none"], "samples": samples}
