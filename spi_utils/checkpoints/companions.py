"""What lies beside a checkpoint's weights: index, configuration, tokenizer, licence, plan, and a script."""

from __future__ import annotations

import copy
import shutil
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from spi_utils.checkpoints.checkpoint import Saving
from spi_utils.checkpoints.tensorfile import TensorReader
from spi_utils.models import ModelSource, Weights
from spi_utils.runs import write_json, write_text

if TYPE_CHECKING:
    from spi_utils.plan import ProtectionPlan

INDEX = "model.safetensors.index.json"
# What travels along from the source's folder.
COMPANIONS = (
    *("tokenizer*", "vocab.*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "*.tiktoken"),
    *("chat_template*", "generation_config.json", "LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*"),
)


def write_rest(
    folder: Path,
    source: ModelSource,
    weights: Weights,
    plan: ProtectionPlan,
    saving: Saving,
) -> None:
    """Index, configuration, tokenizer and the like, the plan, and the script that runs the model."""
    _write_index(folder)
    for path in _companions(source):
        shutil.copyfile(path, folder / path.name)
    plan.write(folder / "plan.json")
    write_text(folder / "generate.py", _example("generate.py"))
    config = copy.deepcopy(weights.model.config)
    config.architectures = [type(weights.model).__name__]
    config.dtype = saving.storage
    if any(fmt == "nf4" for fmt in plan.formats.values()):
        config.quantization_config = _quantization_config(weights.model, plan, saving)
    config.save_pretrained(folder)


def _write_index(folder: Path) -> None:
    shards = sorted(folder.glob("*.safetensors"))
    if len(shards) == 1:
        return
    where: dict[str, str] = {}
    total = 0
    for path in shards:
        with TensorReader(path) as reader:
            where |= dict.fromkeys(reader.keys(), path.name)
            total += reader.nbytes()
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))})


def _companions(source: ModelSource) -> list[Path]:
    patterns = (*COMPANIONS, "*.py") if source.trust_remote_code else COMPANIONS
    found = {path for pattern in patterns for path in source.directory.glob(pattern)}
    return sorted(path for path in found if path.is_file())


def _example(name: str) -> str:
    """The text of a script from `examples/`, installed or beside this package."""
    try:
        return resources.files("spi_utils.examples").joinpath(name).read_text(encoding="utf-8")
    except ModuleNotFoundError:
        return (Path(__file__).parents[2] / "examples" / name).read_text(encoding="utf-8")


def _quantization_config(model: nn.Module, plan: ProtectionPlan, saving: Saving) -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=saving.compute,
        bnb_4bit_use_double_quant=plan.double_quant,
        bnb_4bit_quant_storage=torch.uint8,
        llm_int8_skip_modules=skip_modules(model, plan),
    )


def skip_modules(model: nn.Module, plan: ProtectionPlan) -> list[str]:
    """Full names of all modules that bitsandbytes would replace and the plan doesn't make NF4.

    Giving any list drops transformers' own, so heads (tied ones too) must stand in it. Names are plain, not
    escaped: other loaders match them as they are.
    """
    from transformers.pytorch_utils import Conv1D

    return [
        name
        for name, module in model.named_modules()
        if (type(module) is nn.Linear or isinstance(module, Conv1D)) and plan.formats.get(name) != "nf4"
    ]
