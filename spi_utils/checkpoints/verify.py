"""Proof that a checkpoint on the disk is what was planned.

1. Every tensor, read back from the files, is bit-equal to the source's (or its stated cast), or to what
   quantizing it gives by the backend's own package: `check_bits`.
2. The files weigh what the plan predicted: `check_size`.
3. A process that never imports spi_utils loads it with stock libraries, finds quantized modules exactly where
   planned, and computes the logits of the original weights quantized in memory: `check_fresh`.
4. The same process uses the checkpoint as a person would, in the dtype that it ships with: real text behind
   the start token gives finite logits everywhere, and a prompt gets an answer: `prove_by_use`.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch

from spi_utils.checkpoints.backends import BACKENDS
from spi_utils.checkpoints.checkpoint import (
    Item,
    SavedWeights,
    Saving,
    file_names,
    file_tensors,
    in_linear_order,
    packed_item,
    plain,
    read_saved,
    saved_weights,
)
from spi_utils.checkpoints.ct_parts import serving_notes
from spi_utils.checkpoints.tensorfile import PIECE, TensorReader
from spi_utils.errors import CheckpointError
from spi_utils.formats import format_row, size_tolerance
from spi_utils.models import ModelSource, Weights, load_tokenizer, shard_paths
from spi_utils.progress import progress
from spi_utils.texts import load_text, make_windows, start_token
from spi_utils.tokens import without_token

if TYPE_CHECKING:
    from spi_utils.plan import ProtectionPlan

PROOF_TEXT, PROOF_WINDOWS, PROOF_LENGTH = "pydoc", 4, 256  # what the fresh process reads, everywhere the same
LOGIT_TOLERANCE = 0.01  # share of the logits' standard deviation; equal bits leave only the kernels' rounding
MEMORY_FACTOR = 1.3  # a loaded model against its files
INTERPRETER = 1_500_000_000  # bytes of a process with transformers and bitsandbytes in it, and activations
FRESH_CHECK = Path(__file__).with_name("fresh_check.py")
LINEAR_4BIT = "bitsandbytes.nn.modules.Linear4bit"
PACKED = "packed"  # what fresh_check.py says of a module that compressed-tensors holds packed
PLAIN = ("torch.nn.modules.linear.Linear", "transformers.pytorch_utils.Conv1D")


class NotFinite(CheckpointError):
    """A freshly loaded checkpoint computes infinities or NaN."""


def verify(
    folder: Path,
    source: ModelSource,
    weights: Weights,
    items: Sequence[Item],
    plan: ProtectionPlan,
    saving: Saving,
) -> dict[str, Any]:
    """Run every check; what was found, for run.json.

    Raises:
        CheckpointError: which check failed, and for which layers.
    """
    report = check_size(folder, plan.bytes["total"])
    with saved_weights(folder, trust_remote_code=source.trust_remote_code) as saved:
        report["bits"] = check_bits(saved, weights, items, saving)
    report["fresh_process"] = check_fresh(folder, source, weights, items, saving)
    return report


# --- size ------------------------------------------------------------------------------------------------


def check_size(folder: Path, planned: int) -> dict[str, Any]:
    """Compare the files' bytes with the plan's prediction; a truncated file is found here too."""
    size = 0
    for path in shard_paths(folder):
        with TensorReader(path):
            size += path.stat().st_size
    if abs(size - planned) > size_tolerance(planned):
        raise CheckpointError(
            f"{folder}: the weights take {size:,} bytes, the plan predicted {planned:,} "
            f"({size / planned - 1:+.2%}). The plan was made for other layers: run notebook 02_visualize "
            "again."
        )
    return {"bytes": size, "bytes_planned": planned}


# --- bits ------------------------------------------------------------------------------------------------


def check_bits(
    saved: SavedWeights, weights: Weights, items: Sequence[Item], saving: Saving
) -> dict[str, int | str]:
    """Compare every saved tensor with the source, bit for bit; counts of tensors by format."""
    wrong: list[str] = []
    for item in progress(items, len(items), "verify"):
        value = read_saved(weights, item, saving)
        if item.name not in saved.recipes:
            same = False
        elif item.fmt != "16bit":
            same = saved.formats[item.module] == item.fmt and _same_parts(
                saved.parts(item.module),
                _expected_parts(value, item, saving),
            )
        else:
            same = _same_16bit(saved, item, dict(file_tensors(value, item, weights, saving)))
        wrong += [] if same else [item.name]
        del value  # before the next is read: the two largest tensors may be neighbours
    if wrong:
        raise CheckpointError(
            f"{len(wrong)} of {len(items)} tensors on the disk differ from the source's: "
            f"{', '.join(wrong[:5])}. The disk or the memory is unreliable, or two runs wrote here at once: "
            "run the stage again with force=True."
        )
    counts = Counter(item.fmt for item in items)
    return {**dict(sorted(counts.items())), "against": f"{saving.backend} and the source"}


def _expected_parts(value: torch.Tensor, item: Item, saving: Saving) -> Mapping[str, torch.Tensor]:
    """What the file must hold: the chosen codes, read by the library as planned, or the library's own."""
    backend = BACKENDS[saving.backend]
    if (item.module, item.fmt) not in saving.codes:
        return backend.library(in_linear_order(value, item), item.fmt, saving.double_quant)
    packed = packed_item(value, item, saving)
    backend.check_values(packed)
    return backend.parts(packed)


def _same_parts(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        _same_bits(found[key], expected[key].cpu()) for key in expected
    )


def _same_16bit(saved: SavedWeights, item: Item, expected: Mapping[str, torch.Tensor]) -> bool:
    """Compare in pieces: the source's tensor is held whole already, the file's needn't be too."""
    if {name for _, name in saved.recipes[item.name].sources} != expected.keys():
        return False
    return all(
        saved.files[name].get_slice(name).get_shape() == list(tensor.shape)
        and all(
            _same_bits(found, part.cpu())
            for found, part in zip(
                saved.files[name].pieces(name), tensor.reshape(-1).split(PIECE), strict=True
            )
        )
        for name, tensor in expected.items()
    )


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(a.reshape(-1).view(torch.uint8), b.contiguous().reshape(-1).view(torch.uint8))
    )


# --- a fresh process -------------------------------------------------------------------------------------


def check_fresh(
    folder: Path, source: ModelSource, weights: Weights, items: Sequence[Item], saving: Saving
) -> dict[str, Any]:
    """Load the checkpoint in a process of its own; compare classes, dtypes and, where it fits, logits."""
    shapes = {item.module: _linear_shape(item, weights) for item in items if item.fmt != "16bit"}
    awkward = [
        item.module for item in items if item.fmt == "nf4" and not _runs_everywhere(shapes[item.module])
    ]
    fits = _fits(folder, weights, saving)
    forward = fits and not (awkward and saving.device.type == "cpu")
    start, windows = proof_windows(source, weights.model.config) if forward else (None, [])
    answer = ask(
        {
            "windows": windows,
            "model": str(folder.resolve()),
            "source": str(source.directory.resolve()),
            "trust": source.trust_remote_code,
            "device": str(saving.device),
            "threads": torch.get_num_threads(),
            "load": fits,
            "forward": forward,
            "stems": {item.module: _stem(item, weights, saving) for item in items if item.fmt != "16bit"},
        }
    )
    _check_classes(answer, items, saving)
    _check_logits(answer, saving)
    proof = prove_by_use(answer, windows, start, saving) if forward else None
    report = {key: value for key, value in answer.items() if key not in ("modules", "text", "generation")}
    report["proof"] = proof
    report |= {"loaded": fits, "modules": len(answer["modules"]), "notes": []}
    if not fits:
        report["notes"].append(
            "The model is too large to be loaded on this machine: classes were checked without weights (meta "
            "device), all bits by reading the files; logits were not compared."
        )
    if shadowed := shadowed_modules(folder, items):
        report["notes"].append(
            f"{', '.join(shadowed[:3])}: their names begin like that of a 16-bit module, which transformers "
            "before 5.23 takes for the same: there they would stay unquantized, and not load."
        )
    if awkward:
        report["notes"].append(
            f"{len(awkward)} NF4 layers ({', '.join(awkward[:3])}) have out_features that 32 does not divide "
            "or in_features that 64 does not: bitsandbytes runs them on GPUs, but not on CPUs with "
            "AVX512-BF16, so logits were not compared on the CPU."
        )
    if saving.backend == "compressed-tensors":
        formats = {item.module: item.fmt for item in items if len(weights.shape(item.name)) == 2}
        report["notes"] += serving_notes(_linear_only(formats, weights), shapes)
    return report


def proof_windows(source: ModelSource, config: Any) -> tuple[int | None, list[list[int]]]:
    """The start token, and the fixed windows of real text behind it, the same for every checkpoint."""
    tokenizer = load_tokenizer(source)
    start = start_token(tokenizer, config)
    inner = config.get_text_config()
    length: int = min(PROOF_LENGTH, getattr(inner, "max_position_embeddings", None) or PROOF_LENGTH)
    text = load_text(PROOF_TEXT)
    return start, make_windows(text, tokenizer, PROOF_WINDOWS, length, start, config=config).tolist()


def prove_by_use(
    answer: Mapping[str, Any], windows: Sequence[Sequence[int]], start: int | None, saving: Saving
) -> dict[str, Any]:
    """What the fresh process' use of the checkpoint shows, for run.json.

    Raises:
        NotFinite: logits that are not numbers, with the first module whose output isn't.
        CheckpointError: an empty or degenerate answer to the prompt.
    """
    read, said = answer["text"], answer.get("generation", {})
    if not read["finite"]:
        raise NotFinite(_overflow(saving, read["first_nonfinite"]))
    if said["problem"]:
        raise CheckpointError(
            f"Stock transformers loads this checkpoint, but its answer to a prompt {said['problem']}: "
            f"{said['text'][:80]!r} ({said['tokens']} tokens). Check the model's generation_config.json and "
            "tokenizer; if the 16-bit model answers well, protect more layers (notebook 02_visualize)."
        )
    return {
        "dtype": plain(saving.storage),
        "device": str(saving.device),
        "transformers": answer["transformers"],
        "text": PROOF_TEXT,
        "windows": len(windows),
        "length": len(windows[0]),
        "tokens": sum(len(ids) for ids in windows),
        "start_token": start,
        "finite": True,
        "generation": {key: value for key, value in said.items() if key != "problem"},
    }


def _overflow(saving: Saving, where: str | None = None) -> str:
    first = f" The first module whose output is not finite is {where}." if where else ""
    if saving.storage == torch.float16:
        cure = "Save it in another: storage_dtype='bfloat16'."
    else:
        cure = "Check that the original model runs in bfloat16: a norm or an embedding of it may hold NaN."
    return (
        f"The checkpoint's logits are not numbers in stock transformers: its activations leave the range of "
        f"{plain(saving.storage)}, the dtype that it is saved in.{first} {cure}"
    )


def _linear_only(formats: Mapping[str, str], weights: Weights) -> dict[str, str]:
    linear = {name for name, module in weights.model.named_modules() if isinstance(module, torch.nn.Linear)}
    return {name: fmt for name, fmt in formats.items() if name in linear}


def shadowed_modules(folder: Path, items: Sequence[Item]) -> list[str]:
    """NF4 modules that the looser name matching of transformers 5.0 to 5.15 takes for skipped ones."""
    config = json.loads((folder / "config.json").read_text())
    skipped = config.get("quantization_config", {}).get("llm_int8_skip_modules") or []
    return [
        item.module
        for item in items
        if item.fmt == "nf4"
        and any(re.match(key, item.module) or item.module.endswith(key) for key in skipped)
    ]


def _linear_shape(item: Item, weights: Weights) -> tuple[int, int]:
    rows, cols = weights.shape(item.name)
    return (cols, rows) if item.transposed else (rows, cols)


def _runs_everywhere(shape: tuple[int, int]) -> bool:
    return shape[0] % 32 == 0 and shape[1] % 64 == 0


def _stem(item: Item, weights: Weights, saving: Saving) -> str:
    """How the files begin the names of a quantized module's tensors."""
    codes = BACKENDS[saving.backend].suffixes(item.fmt, saving.double_quant)[0]
    return file_names(item, weights, saving)[0].removesuffix(codes)


def _fits(folder: Path, weights: Weights, saving: Saving) -> bool:
    """Whether the checkpoint can be loaded and run here; compressed-tensors unpacks it to 16 bits."""
    device = saving.device
    size = 2 * sum(
        torch.Size(shape).numel() for shape in weights.shapes.values()
    )  # the model to compare with
    if saving.backend == "compressed-tensors":  # unpacked to 16 bits beside the packed file
        size += sum(path.stat().st_size for path in shard_paths(folder))
    need = MEMORY_FACTOR * size + INTERPRETER
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what this process keeps is not free for another
        return need < torch.cuda.mem_get_info(device)[0]
    return need < psutil.virtual_memory().available


def ask(request: Mapping[str, Any]) -> dict[str, Any]:
    """Put a request to fresh_check.py in a process of its own; CheckpointError if it can't answer."""
    with tempfile.TemporaryDirectory() as folder:
        question, answer = Path(folder) / "request.json", Path(folder) / "answer.json"
        question.write_text(json.dumps(request))
        # -P: the script's own folder, which is this package, must not be importable in there
        command = [sys.executable, "-P", str(FRESH_CHECK), str(question), str(answer)]
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, env=without_token(os.environ)
        )
        if done.returncode or not answer.exists():
            raise CheckpointError(
                f"{request['model']}: stock transformers can't load this checkpoint in a fresh process "
                f"(exit code {done.returncode}):\n{done.stderr[-2000:]}"
            )
        return json.loads(answer.read_text())


def _check_classes(answer: Mapping[str, Any], items: Sequence[Item], saving: Saving) -> None:
    modules = answer["modules"]
    planned = {item.module: _expected_scheme(item.fmt) for item in items if item.fmt != "16bit"}
    found = {name: module.get("scheme") for name, module in modules.items() if _is_quantized(module)}
    if found != planned:
        extra, lost = sorted(found.keys() - planned.keys()), sorted(planned.keys() - found.keys())
        other = [name for name in planned if name in found and found[name] != planned[name]]
        raise CheckpointError(
            f"Loaded by transformers {answer['transformers']}, {len(extra)} modules are quantized unplanned "
            f"({', '.join(extra[:3])}), {len(lost)} planned ones are not ({', '.join(lost[:3])}), and "
            f"{len(other)} have another format ({', '.join(other[:3])})."
        )
    floating = {"float16", "bfloat16", "float32"}
    odd = [
        f"{name} ({module['class']}, {module['dtype']})"
        for name, module in modules.items()
        if name not in planned
        and (module["dtype"] not in floating or (_is_linear(module) and module["class"] not in PLAIN))
    ]
    if odd:
        raise CheckpointError(f"{len(odd)} modules that should be 16-bit are not: {', '.join(odd[:3])}.")
    if answer["spi_utils"]:
        raise CheckpointError("The fresh process had imported spi_utils, so its check proves nothing.")


def _is_quantized(module: Mapping[str, Any]) -> bool:
    return module["class"] == LINEAR_4BIT or module["dtype"] == PACKED


def _expected_scheme(fmt: str) -> list[Any] | None:
    """What fresh_check.py reports of a packed module: bits, group size, symmetric."""
    row = format_row(fmt)
    return None if row.bits is None else [row.bits, row.group, row.symmetric]


def _is_linear(module: Mapping[str, Any]) -> bool:
    return module["class"].startswith("bitsandbytes.") or module["class"] in PLAIN


def _check_logits(answer: Mapping[str, Any], saving: Saving) -> None:
    if "max_logit_difference" not in answer:
        return
    difference, spread = answer["max_logit_difference"], answer["logit_spread"]
    if not answer["finite"]:
        raise NotFinite(_overflow(saving, answer.get("text", {}).get("first_nonfinite")))
    if not difference <= LOGIT_TOLERANCE * spread:
        raise CheckpointError(
            f"The reloaded model's logits differ from the in-memory model's by up to {difference:.3g} (their "
            f"spread is {spread:.3g}), although all weights are equal. Please report this with the versions: "
            f"transformers {answer['transformers']}, torch {answer['torch']}."
        )
