"""A plan for the engines that hold int4 and int8: llm-compressor, GPTQModel, torchao."""

from __future__ import annotations

import json
from typing import Any

import yaml

from spi_utils.engines.common import ModelFacts, Recipe, integers, pattern, target
from spi_utils.formats import format_row
from spi_utils.plan import ProtectionPlan

# --- llm-compressor --------------------------------------------------------------------------------------


def llm_compressor(plan: ProtectionPlan, facts: ModelFacts) -> Recipe:
    """A `QuantizationModifier` without data: a group a format, targets by full module name."""
    held, notes = integers(plan, facts)
    names = {name: target(name, facts) for name in held}
    groups = {}
    for fmt in sorted({*held.values()} - {"16bit"}):
        row = format_row(fmt)
        searched = row.group and not fmt.endswith("_absmax")
        weights = {"num_bits": row.bits, "type": "int", "symmetric": row.symmetric}
        weights |= {"strategy": "group", "group_size": row.group} if row.group else {"strategy": "channel"}
        weights["observer"] = "memoryless_mse" if searched else "memoryless_minmax"
        groups[fmt] = {"targets": [names[name] for name in held if held[name] == fmt], "weights": weights}
    ignore = [names[name] for name in held if held[name] == "16bit"]
    ignore += [name for name, role in facts.others.items() if role == "head"]
    modifier = {"QuantizationModifier": {"config_groups": groups, "ignore": ignore}}
    body = yaml.safe_dump({"default_stage": {"quantization_modifiers": modifier}}, sort_keys=False, width=200)
    notes.append("oneshot(model=…, recipe=…) needs no data; scales are its own: the predicted KL is a guide.")
    return Recipe(body, tuple(notes))


def read_llm_compressor(body: str) -> None:
    """llm-compressor's own reader."""
    from llmcompressor.recipe import Recipe as Theirs

    Theirs.create_instance(body)


def read_groups(body: str) -> None:
    """compressed-tensors' reader, for the groups."""
    from compressed_tensors.quantization import QuantizationConfig

    stage = yaml.safe_load(body)["default_stage"]
    QuantizationConfig(**stage["quantization_modifiers"]["QuantizationModifier"])


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
    return Recipe({"quantize_config": base}, tuple(notes))


def read_gptqmodel(body: dict[str, Any]) -> None:
    """GPTQModel's own reader; it compiles every pattern."""
    from gptqmodel.quantization.config import QuantizeConfig

    QuantizeConfig(**body["quantize_config"]).dynamic_get("compiles every pattern")


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


def read_torchao(body: str) -> None:
    """Build the configuration with torchao, and take it through its own form on disk."""
    from torchao.core.config import config_from_dict, config_to_dict

    made: dict[str, Any] = {}
    exec(body, made)  # a few lines made above, of quoted names and numbers
    config_from_dict(config_to_dict(made["config"]))
