"""A plan as other engines' recipes: llama.cpp, llm-compressor, GPTQModel, torchao.

Each engine is a row of `ENGINES`: a pure function that says the plan in its words, its file, and the packages
that can read that file back. What holds without them, by rule: every planned module is named, by its full
name or a pattern that is anchored, escaped and matches nothing else; unplanned matrices stay 16-bit. Formats
become the engine's nearest in bits a weight. Engines round in their own ways: the predicted KL is this
project's and holds for none of them exactly.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING, Any

from spi_utils.engines.common import ModelFacts, Recipe
from spi_utils.engines.integer import (
    gptqmodel,
    llm_compressor,
    read_gptqmodel,
    read_groups,
    read_llm_compressor,
    read_torchao,
    torchao,
)
from spi_utils.engines.llama_cpp import llama_cpp, read_ggml
from spi_utils.errors import PlanError
from spi_utils.plan import ProtectionPlan, check_plan
from spi_utils.runs import Run, read_json, read_layers, write_text

if TYPE_CHECKING:
    from pathlib import Path

    from spi_utils.models import ModelSource

BY_RULE = "by rule, not parsed"


@dataclass(frozen=True)
class Engine:
    """A row of the table: a recipe's file in `recipes/`, how it is made, and who can read it, best first.

    A reader is a package, a function by which it reads the body or raises, and what may be said then.
    """

    file: str
    make: Callable[[ProtectionPlan, ModelFacts], Recipe]
    readers: tuple[tuple[str, Callable[[Any], Any], str], ...]


def write_recipes(
    run: Run, plan: ProtectionPlan, source: ModelSource, *, engines: Sequence[str] | None = None
) -> dict[str, Path]:
    """Write `recipes/` in the run directory, a recipe an engine; {engine: its file}.

    Args:
        source: the plan's model, for its config. engines: keys of `ENGINES`; None is every engine that this
            plan can be said to, and those left out are printed with their reason.

    Raises:
        PlanError: a plan for another model, or that names modules which the model doesn't have; of an engine
            that was asked for by name: it is unknown, or doesn't know the architecture, the plan quantizes
            nothing, or the engine's reader refuses the recipe. Nothing is written then.
    """
    chosen = list(ENGINES if engines is None else engines)
    if unknown := [name for name in chosen if name not in ENGINES]:
        raise PlanError(f"there are no recipes for {unknown[0]!r}; the engines are {', '.join(ENGINES)}.")
    facts = model_facts(run, plan, source)
    texts: dict[str, str] = {}
    made = {}
    for name in chosen:
        try:
            recipe = _recipe(name, plan, facts)
            texts[ENGINES[name].file] = render(name, recipe, check(name, recipe))
        except PlanError as error:
            if engines is not None:
                raise
            print(f"no recipe for {name}: {error}")
            continue
        texts |= recipe.files
        made[name] = run.path / "recipes" / ENGINES[name].file
    for file, text in texts.items():
        write_text(run.path / "recipes" / file, text)
    return made


def _recipe(name: str, plan: ProtectionPlan, facts: ModelFacts) -> Recipe:
    if set(plan.formats.values()) <= {"16bit"}:
        raise PlanError("this plan keeps every layer in 16-bit: there is nothing to quantize elsewhere.")
    return ENGINES[name].make(plan, facts)


def model_facts(run: Run, plan: ProtectionPlan, source: ModelSource) -> ModelFacts:
    """The facts from the run's layer table and the model's config.json; PlanError for unknown modules."""
    if plan.model.get("sha256") != source.sha256:
        raise PlanError(f"this plan is for {plan.model.get('id')}, not for {source.id} with these weights.")
    layers = read_layers(run)
    layers = layers[layers["rows"] > 0]
    check_plan(plan, set(layers["name"]))
    sizes = zip(layers["role"].astype(str), layers["cols"].astype(int), strict=True)
    rows = dict(zip(layers["name"].astype(str), sizes, strict=True))
    config = read_json(source.directory / "config.json", what="model configuration")
    return ModelFacts(
        model_type=config.get("text_config", config)["model_type"],
        storage_dtype=source.storage_dtype,
        composite="text_config" in config,
        planned={name: rows[name] for name in plan.formats},
        others={name: role for name, (role, _) in rows.items() if name not in plan.formats},
    )


def check(name: str, recipe: Recipe) -> str:
    """Which installed package has read the recipe just now; BY_RULE if there is none."""
    why = ""
    for distribution, read, says in ENGINES[name].readers:
        try:
            package = f"{distribution} {metadata.version(distribution)}"
            read(recipe.body)
        except metadata.PackageNotFoundError:
            continue
        except ImportError as error:
            why = f" ({package} is installed, but can't be imported: {error})"
        except (ValueError, TypeError, KeyError, AssertionError) as error:
            raise PlanError(
                f"{package} refuses the recipe for {name}: {error}. Leave {name} out of `engines`, and "
                "please report this."
            ) from error
        else:
            return says.format(package) + why
    return BY_RULE + why


def render(name: str, recipe: Recipe, checked: str) -> str:
    """A recipe's file: its notes and who checked it, then the body."""
    if isinstance(recipe.body, dict):
        held = {"engine": name, "checked": checked, "notes": list(recipe.notes), **recipe.body}
        return json.dumps(held, indent=2, ensure_ascii=False) + "\n"
    head = [f"engine: {name}", f"checked: {checked}", *recipe.notes]
    return "".join(f"# {line}\n" for line in head) + recipe.body


PARSED = "parsed with {}"
ENGINES: dict[str, Engine] = {
    "llama.cpp": Engine(
        "llama_cpp.sh",
        llama_cpp,
        (("gguf", read_ggml, "names and types by {}; patterns by rule, not parsed by llama-quantize"),),
    ),
    "llm-compressor": Engine(
        "llm_compressor.yaml",
        llm_compressor,
        (
            ("llmcompressor", read_llm_compressor, PARSED),
            ("compressed-tensors", read_groups, "groups parsed with {}; not parsed by llm-compressor"),
        ),
    ),
    "GPTQModel": Engine("gptqmodel.json", gptqmodel, (("gptqmodel", read_gptqmodel, PARSED),)),
    "torchao": Engine("torchao_config.py", torchao, (("torchao", read_torchao, PARSED),)),
}
