"""A grid in a YAML file -> the jobs that it stands for, every name checked before anything runs.

    models: [bundled, Qwen/Qwen3-0.6B]          # or {model: …, revision: …}
    scores: [alpha_hill, {score: alpha_hill, direction: low}]
    budgets: [claim, {matrix_bits: 5.65}]       # {rule: value}
    seeds: [0, 1]
    axes: {double_quant: [false, true]}         # any other parameter of the notebooks
    parameters: {profile: full}                 # the same for every job

Each list is an axis; a job is one choice from each.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from spi_utils.errors import BatchError, ParameterError, suggest
from spi_utils.headless import ALL, check_parameters, parameters_of
from spi_utils.parameters import Untyped, check_values, coerce
from spi_utils.presets import DEFAULT, PRESETS, resolve
from spi_utils.runs import fingerprint, slug

# What a batch decides itself, or what makes no sense for many jobs at once.
NOT_HERE = {
    "run_dir": "a batch gives every job a folder of its own below --out",
    "force": "remove a job's folder to do it again",
    "repo_id": "publish the run that you choose with notebook 05_publish",
    "dry_run": "publish the run that you choose with notebook 05_publish",
    "over_budget": "a batch runs the stages without the budget that notebook 00_run_all makes",
}
AXES = ("models", "scores", "budgets", "seeds")
KEYS = (*AXES, "axes", "parameters")
NAMED = ("model", "score", "direction", "rule", "value", "seed")  # what every job's name says

Settings = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """One run of the grid: its name (a folder's), the notebooks' parameters, the analysis that it shares."""

    name: str
    parameters: Settings
    analysis: str


@dataclass(frozen=True)
class Grid:
    """The jobs, and the analyses that they share: name -> parameters of notebook 01."""

    jobs: tuple[Job, ...]
    analyses: dict[str, Settings]


def read_grid(path: str | Path) -> Grid:
    """Read a grid's file and expand it.

    Raises:
        BatchError: no file, not YAML, an unknown key (with the nearest), an empty list, a setting that stands
            twice.
        ParameterError: a parameter that no notebook has, or a value that it can't have (with the nearest).
    """
    path = Path(path)
    try:
        held = yaml.load(path.read_text(encoding="utf-8"), Untyped)
    except OSError as error:
        advice = "Give a grid such as examples/grid.yaml."
        raise BatchError(f"{path}: can't be read ({error.strerror}). {advice}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise BatchError(f"{path}: not YAML: {error}") from error
    return expand(held, str(path))


def expand(held: Any, where: str = "the grid") -> Grid:
    """The jobs of a grid that is given as a mapping, its values typed or as texts; raises as `read_grid`."""
    held = _mapping(held, where)
    for key in held:
        if key not in KEYS:
            raise BatchError(
                f"{where}: unknown key {key!r}.{suggest(str(key), KEYS)} Known: {', '.join(KEYS)}."
            )
    fixed = _mapping(held.get("parameters") or {}, f"{where}: parameters")
    axes = _axes(held, where)
    chosen = [_merged([*choice, fixed], where) for choice in itertools.product(*axes)]
    for settings in chosen:
        _check(settings, where)
    seed = chosen[0].get("seed", parameters_of(ALL)["seed"])
    extra = sorted({name for axis in axes for choice in axis for name in choice} - set(NAMED))
    analyses = [_analysis(settings, seed) for settings in chosen]
    keys = [f"{slug(str(one['model']))}-{fingerprint(one)[:8]}" for one in analyses]
    names = _names(chosen, extra, where)
    return Grid(tuple(map(Job, names, chosen, keys)), dict(zip(keys, analyses, strict=True)))


def _axes(held: Settings, where: str) -> list[list[Settings]]:
    """Each axis as the settings among which a job chooses; one that isn't given leaves the default."""
    if not held.get("models"):
        raise BatchError(f"{where}: no models. List at least one: models: [bundled].")
    single = {"models": "model", "scores": "score", "seeds": "seed"}
    axes = []
    for axis in AXES:
        entries = _list(held[axis], f"{where}: {axis}") if held.get(axis) is not None else [{}]
        if axis == "budgets":
            axes.append([_budget(entry, where) for entry in entries])
        else:
            axes.append([one if isinstance(one, dict) else {single[axis]: one} for one in entries])
    more = _mapping(held.get("axes") or {}, f"{where}: axes")
    return axes + [[{name: one} for one in _list(more[name], f"{where}: axes: {name}")] for name in more]


def _budget(entry: Any, where: str) -> Settings:
    if isinstance(entry, str):
        return {"rule": entry, "value": None}
    if isinstance(entry, dict) and len(entry) <= 1:  # none where the grid doesn't say
        return next(({"rule": rule, "value": value} for rule, value in entry.items()), {})
    raise BatchError(f"{where}: budgets: expected a rule, or {{rule: value}}, found {entry!r}.")


def _merged(choice: Sequence[Settings], where: str) -> Settings:
    """One job's settings; BatchError where two parts of the grid set the same parameter."""
    merged: Settings = {}
    for settings in choice:
        for name in settings:
            if name in merged:
                raise BatchError(f"{where}: {name!r} is set twice for one job; leave it in one place.")
        merged |= {name: coerce(name, value) for name, value in settings.items()}
    return merged


def _check(settings: Settings, where: str) -> None:
    for name, advice in NOT_HERE.items():
        if name in settings:
            raise BatchError(f"{where}: {name!r} can't be set for a batch: {advice}.")
    defaults = parameters_of(ALL)
    check_parameters(settings, defaults, f"{where}: 00_run_all.ipynb")
    if not isinstance(settings.get("model"), str):
        raise BatchError(f"{where}: models: expected a name, or {{model: name, …}}; found {settings!r}.")
    try:
        check_values({**defaults, **settings}, ALL)
    except ParameterError as error:
        raise ParameterError(f"{where}: {error}") from None


def _analysis(settings: Settings, seed: int) -> Settings:
    """The parameters of the analysis that a job shares: its own of notebook 01, but one seed for all."""
    own = {name: settings[name] for name in parameters_of("01_analyze") if name in settings} | {"seed": seed}
    preset = own.pop("preset", DEFAULT)  # of an analysis it sets the rounding alone
    rounding = resolve(preset, {"rounding": own.pop("rounding", None)})["rounding"]
    return own if rounding == PRESETS[DEFAULT]["rounding"] else own | {"rounding": rounding}


def _names(chosen: Sequence[Settings], extra: Sequence[str], where: str) -> list[str]:
    """Names of folders that say what a job is; two of one name get a piece of their fingerprint.

    Raises:
        BatchError: two jobs are the same.
    """
    defaults = parameters_of(ALL)
    every = [{**defaults, **settings} for settings in chosen]
    labels = [_label(one | resolve(one["preset"], one), extra) for one in every]
    marks = [fingerprint(settings) for settings in chosen]
    for mark, label in zip(marks, labels, strict=True):
        if marks.count(mark) > 1:
            raise BatchError(f"{where}: the job {label} stands twice; list each value once.")
    return [
        label if labels.count(label) == 1 else f"{label}.{mark[:6]}"
        for label, mark in zip(labels, marks, strict=True)
    ]


def _label(every: Settings, extra: Sequence[str]) -> str:
    budget = every["rule"] if every["value"] is None else f"{every['rule']}-{every['value']}"
    score = every["score"] + ("" if every["direction"] == "high" else f"-{every['direction']}")
    more = [f"{name}-{every[name]}".replace("/", "-") for name in extra]
    return ".".join(map(slug, [str(every["model"]), score, budget, f"seed-{every['seed']}", *more]))


def _mapping(held: Any, where: str) -> Settings:
    if not isinstance(held, dict):
        raise BatchError(f"{where}: expected names with values, found {held!r}.")
    return held


def _list(held: Any, where: str) -> list[Any]:
    values = held if isinstance(held, list) else [held]
    if not values:
        raise BatchError(f"{where}: an empty list; give at least one value, or leave the key out.")
    return values
