"""How a notebook opens its run directory: a model for the first stage, the run's own for the others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from spi_utils.errors import RunError
from spi_utils.models import BUNDLED_ID, ModelSource, chosen_model, resolve
from spi_utils.runs import (
    Run,
    existing_run,
    open_run,
    require_same_model,
    run_info,
    run_path,
    slug,
    update_info,
)


def begin_run(
    run_dir: str, model: str, *, revision: str = "", trust_remote_code: bool = False
) -> tuple[Run, ModelSource]:
    """Resolve a model and make, or reopen, its run directory.

    Args:
        run_dir: "auto" is `runs/<model name>` below the working directory.
        model: as `models.resolve` takes it.
        revision: of a Hub model; "" is the main branch.
        trust_remote_code: let code from the repository run.

    Raises:
        ModelError: the model can't be used.
        RunError: the directory belongs to another model.
    """
    source = resolve(model, revision or None, trust_remote_code=trust_remote_code)
    run = open_run(run_path(run_dir, source.slug), source.identity())
    info = run_info(run)
    if info.get("location") != source.location:
        update_info(run, lambda held: held.update(location=source.location))
    return run, source


def find_run(run_dir: str, model: str = "auto") -> Run:
    """The run directory of a later stage that needs no weights.

    Args:
        run_dir: "auto" is `runs/<model name>`.
        model: with a given `run_dir`, "auto" is whatever the run holds; any other name must be that model.

    Raises:
        RunError: no run there, or one of another model.
    """
    name = _name(chosen_model(model))
    run = existing_run(run_path(run_dir, slug(name)))
    held = run_info(run)["model"]["id"]
    if model != "auto" and held != name:
        raise RunError(f"{run.path} holds a run of {held}, not of {name}. Change `model` or `run_dir`.")
    return run


def continue_run(
    run_dir: str, model: str = "auto", *, trust_remote_code: bool = False
) -> tuple[Run, ModelSource]:
    """The run directory and the very model that it was begun with.

    Raises:
        RunError: no run there, one of another model, or the model's weights have changed since.
        ModelError: the model can't be found any more.
    """
    run = find_run(run_dir, model)
    info = run_info(run)
    held: dict[str, Any] = info["model"]
    source = resolve(info.get("location", held["id"]), held["revision"], trust_remote_code=trust_remote_code)
    require_same_model(run, held, source.identity())
    return run, source


def _name(model: str) -> str:
    """The id that a run of `model` carries."""
    if model == "bundled":
        return BUNDLED_ID
    path = Path(model).expanduser()
    if model.endswith(".gguf"):
        return path.stem
    return path.resolve().name if path.is_dir() else model
