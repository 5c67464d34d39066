"""How a notebook opens its run directory: a model for the first stage, the run's own for the others.

In a fresh Kaggle session that lies with an attached input, the output of an earlier session: it is read-only,
so the later stages go on in a copy.
"""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from spi_utils.errors import RunError
from spi_utils.models import ModelSource, chosen_model, model_id, resolve
from spi_utils.platforms import ATTACHED
from spi_utils.runs import (
    OWNER,
    RECORD,
    Run,
    existing_run,
    open_run,
    require_same_model,
    run_info,
    run_path,
    slug,
    update_info,
    write_json,
)

LARGE = 50_000_000  # bytes; attached files from here on are linked, not copied


def begin_run(
    run_dir: str, model: str, *, revision: str = "", trust_remote_code: bool = False
) -> tuple[Run, ModelSource]:
    """Resolve a model and make, or reopen, its run directory.

    Args:
        run_dir: "auto" is `runs/<model name>`, see `runs.run_path`.
        model: as `models.resolve` takes it.
        revision: of a Hub model; "" is the main branch.
        trust_remote_code: let code from the repository run.

    Raises:
        ModelError: the model can't be used.
        RunError: the directory belongs to another model.
    """
    source = resolve(model, revision or None, trust_remote_code=trust_remote_code)
    run = open_run(run_path(run_dir, source.slug), source.identity())
    if run_info(run).get("location") != source.location:
        update_info(run, lambda held: held.update(location=source.location))
    return run, source


def find_run(run_dir: str, model: str = "auto", *, attached: Path = ATTACHED) -> Run:
    """The run directory of a later stage that needs no weights.

    Args:
        run_dir: "auto" is `runs/<model name>`; where there is none, the one run below `attached`, copied.
            A run's folder below `attached` is copied, too.
        model: with a given `run_dir`, or for an attached run, "auto" is whatever the run holds; any other
            name must be that model.
        attached: where Kaggle mounts the inputs of a session.

    Raises:
        RunError: no run there, one of another model, or several are attached; lists them then.
    """
    name = model_id(chosen_model(model))
    run = Run(run_path(run_dir, slug(name)))
    if run.path.resolve().is_relative_to(attached.resolve()):
        run = _adopted(existing_run(run.path), attached)
    elif run_dir == "auto" and not run.info_json.exists():
        every = []
        for path in sorted(attached.rglob("run.json")):
            with suppress(RunError):  # something else of that name
                every.append(existing_run(path.parent))
        fitting = [one for one in every if model == "auto" or _held_id(one) == name]
        if every and len(fitting) != 1:
            listed = "\n".join(f'  run_dir = "{one.path}"  # {_held_id(one)}' for one in fitting or every)
            what = f"{len(fitting)} runs are attached" if fitting else f"no run of {name} is attached"
            raise RunError(f"{what}. Say which one goes on, as a parameter:\n{listed}")
        run = _adopted(fitting[0], attached) if every else existing_run(run.path)
    held = _held_id(run)
    if model != "auto" and held != name:
        raise RunError(f"{run.path} holds a run of {held}, not of {name}. Change `model` or `run_dir`.")
    return run


def continue_run(
    run_dir: str, model: str = "auto", *, trust_remote_code: bool = False, attached: Path = ATTACHED
) -> tuple[Run, ModelSource]:
    """The run directory, as `find_run` finds it, and the very model that it was begun with.

    Raises:
        RunError: as `find_run`, or the model's weights have changed since.
        ModelError: the model can't be found any more.
    """
    run = find_run(run_dir, model, attached=attached)
    info = run_info(run)
    held: dict[str, Any] = info["model"]
    source = resolve(info.get("location", held["id"]), held["revision"], trust_remote_code=trust_remote_code)
    require_same_model(run, held, source.identity())
    return run, source


def _adopted(run: Run, attached: Path) -> Run:
    """A writable copy of an attached run, below the working directory's runs; made once."""
    source = str(run.path.resolve().relative_to(attached.resolve()))
    info = run_info(run)
    target = Run(run_path("auto", slug(info["model"]["id"])))
    if target.info_json.exists():
        if run_info(target).get("adopted") != source:
            raise RunError(
                f"{target.path} holds another run than the attached {run.path}. Move it away, or go on with "
                f'it: run_dir = "{target.path}".'
            )
        return target
    for path in sorted(run.path.rglob("*")):
        copy = target.path / path.relative_to(run.path)
        if path.is_dir() or path.name in (run.info_json.name, OWNER, RECORD):
            continue
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.unlink(missing_ok=True)  # of a copy that was interrupted
        if path.stat().st_size < LARGE:
            shutil.copyfile(path, copy)
        else:
            copy.symlink_to(path.resolve())
    write_json(target.info_json, info | {"adopted": source})  # last: now it is a run
    print(f"Going on with the attached run {run.path} ({info['model']['id']}), copied to {target.path}.")
    return target


def _held_id(run: Run) -> str:
    return str(run_info(run)["model"]["id"])
