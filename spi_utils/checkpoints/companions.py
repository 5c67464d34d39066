"""What lies beside a checkpoint's weights: index, configuration, tokenizer, licence, plan, and a script."""

from __future__ import annotations

import copy
import shutil
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from spi_utils.checkpoints.backends import BACKENDS
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
    *("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"),
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
    if any(fmt != "16bit" for fmt in plan.formats.values()):
        make = BACKENDS[saving.backend].config
        config.quantization_config = make(weights.model, plan.formats, plan.double_quant, saving.compute)
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
