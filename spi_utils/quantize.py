"""A model and a plan -> a checkpoint that stock transformers load: bitsandbytes or compressed-tensors.

The planned layers are quantized, everything else stays 16-bit. A shard is in memory at a time, whatever the
model's size; a killed run resumes at the first shard that is missing. Before the stage reports success:

1. Every matrix is judged by the backend's own package as it is packed, every tensor is hashed as it is handed
   to the file, and what the files hold afterwards must have these hashes.
2. The files weigh what the plan predicted.
3. A process that never imports spi_utils loads the checkpoint with stock libraries (fresh_check.py), finds
   quantized modules exactly where planned, and computes the logits of the original weights with the values in
   the files put in by hand.
4. The same process uses it as a person would, in the dtype that it ships with: real text behind the start
   token gives finite logits everywhere, and a prompt gets an answer.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module, metadata, resources
from pathlib import Path
from typing import Any

import psutil
import torch
from packaging.version import Version
from torch import nn

from spi_utils.checkpoint import (
    BACKENDS,
    conv1d_modules,
    disk_bytes,
    read_part,
    saved_files,
)
from spi_utils.errors import CheckpointError, PlanError, RunError, suggest
from spi_utils.formats import (
    Packed,
    double_quantized,
    fits,
    format_row,
    in_dtype,
    layer_bytes,
    size_tolerance,
)
from spi_utils.formats import quantize as quantize_matrix
from spi_utils.models import (
    ModelSource,
    Weights,
    list_layers,
    load_tokenizer,
    open_weights,
    resolve_device,
    resolve_dtype,
)
from spi_utils.plan import ProtectionPlan, check_plan, check_writer, fused_groups
from spi_utils.progress import progress
from spi_utils.rounding import Codes, guidable
from spi_utils.runs import (
    NOTEBOOKS,
    Run,
    checkpoint_hash,
    read_json,
    run_info,
    stage,
    write_json,
    write_tensors,
    write_text,
)
from spi_utils.sensitivity import make_codes
from spi_utils.texts import load_text, make_windows, start_token
from spi_utils.tokens import without_token

OVERFLOW = ("keep_bf16", "error")
SPARE_DISK = 50_000_000  # bytes beside the weights: tokenizer, index, directory entries
WORKING_MEMORY = 1_000_000_000  # bytes beside a shard and the tensor that is being read
PIECE = 1 << 24  # values that are looked at and cast at once


class NotFinite(CheckpointError):
    """The dtype that is saved in can't hold a weight, or what a freshly loaded checkpoint computes; `what`
    says that in a few words."""

    def __init__(self, message: str, what: str) -> None:
        super().__init__(message)
        self.what = what


@dataclass(frozen=True)
class Saving:
    """How a checkpoint is saved: its plan and kind, the dtypes of what isn't quantized and of the products,
    where the work is done, and codes that guided rounding chose, by (module, format). `asked` is the storage
    dtype that was asked for, should it have to be another."""

    plan: ProtectionPlan
    backend: str
    asked: torch.dtype
    storage: torch.dtype
    compute: torch.dtype
    device: torch.device
    codes: Mapping[tuple[str, str], Packed] = field(default_factory=dict)


@dataclass(frozen=True)
class Item:
    """One tensor of the model, the format it is saved in, and the bytes that this takes.

    `shape` is a matrix' (out, in), though GPT-2's Conv1D keeps it `transposed`; else the tensor's own.
    """

    name: str
    fmt: str
    shape: tuple[int, ...]
    transposed: bool
    nbytes: int

    @property
    def module(self) -> str:
        """The module that owns the tensor."""
        return self.name.removesuffix(".weight")


def quantize(
    run: Run,
    source: ModelSource,
    plan: ProtectionPlan,
    *,
    device: str = "auto",
    max_shard_size: str = "2GB",
    storage_dtype: str = "auto",
    compute_dtype: str = "auto",
    overflow: str = "keep_bf16",
    backend: str = "bitsandbytes",
    force: bool = False,
) -> Path:
    """Write `run.model_dir`, verify it from the disk, and return its path.

    Args:
        device: where codes are computed and the checkpoint is tried: "auto", "cpu", "cuda:0".
        max_shard_size: such as "2GB" or "500MB" (10⁹ and 10⁶ bytes); a shard is made in memory.
        storage_dtype: of everything that isn't quantized; "auto" is the source's own 16-bit type, and float16
            on a GPU without bfloat16 (T4). What the cast to it loses is counted for each tensor and recorded.
        compute_dtype: what stock loaders multiply NF4 layers in; "auto" is the storage dtype.
        overflow: if weights, or activations in stock transformers, are too large for float16, "keep_bf16"
            saves the whole checkpoint in bfloat16 (one layer in another dtype doesn't run in stock loaders,
            see `make_checkpoint`), "error" refuses.
        backend: "bitsandbytes" (NF4), or "compressed-tensors" (int4 and int8; vLLM serves it, transformers
            unpacks it at the first forward and then needs the memory of 16 bits).
        force: write it again even if it is there.

    Raises:
        PlanError: the plan is for another model, names unknown modules, or has formats that the backend can't
            hold. Nothing has been written then.
        CheckpointError: the backend's package is missing; too little disk or memory; foreign files in the
            target folder; or the written checkpoint isn't what was planned, in which case it stays out of
            `run.model_dir`.
    """
    check_request(source, plan, overflow, backend)
    place = resolve_device(device)
    storage = _auto_storage(source, place) if storage_dtype == "auto" else storage_dtype
    compute = storage if compute_dtype == "auto" else compute_dtype
    if storage not in ("float16", "bfloat16"):
        raise CheckpointError(f"storage_dtype={storage!r}: expected 'auto', 'float16' or 'bfloat16'.")
    if compute not in ("float16", "bfloat16", "float32"):
        raise CheckpointError(
            f"compute_dtype={compute!r}: expected 'auto', 'float16', 'bfloat16' or 'float32'."
        )
    size = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT])B\s*", max_shard_size, re.IGNORECASE)
    if not size or float(size[1]) == 0:
        raise CheckpointError(f"max_shard_size={max_shard_size!r}: expected a size such as '2GB' or '500MB'.")
    shard_bytes = int(float(size[1]) * 1000 ** ("KMGT".index(size[2].upper()) + 1))
    _check_target(run, source)
    kind = getattr(torch, storage)
    saving = Saving(plan, backend, kind, kind, getattr(torch, compute), place)
    inputs = {"plan": plan.fingerprint, "max_shard_size": max_shard_size, "overflow": overflow}
    inputs |= {"storage_dtype": storage, "compute_dtype": compute}
    inputs |= {"device": place.type, backend: metadata.version(backend)}
    if plan.rounding == "guided":
        saving = replace(saving, codes=_guided_codes(run, source, plan, place))
        inputs["rounded"] = checkpoint_hash(run.rounded.glob("*.safetensors"))
    with stage(run, "quantize", inputs, ["model"], force=force) as st:
        if st.finished:
            return run.model_dir
        work = run.partial / "quantize"
        report = work / "verified.json"
        if not report.exists():
            write_json(report, make_checkpoint(work / "model", source, saving, shard_bytes, overflow))
        _promote(work / "model", run.model_dir)
        st.record(**read_json(report))
    return run.model_dir


def make_checkpoint(
    folder: Path, source: ModelSource, saving: Saving, shard_bytes: int, overflow: str
) -> dict[str, Any]:
    """Write and verify a checkpoint in `folder`, in bfloat16 where float16 can't hold it; what was found.

    One tensor in bfloat16 or float32 among float16 ones is not possible, so one that overflows moves all.
    Stock loaders keep a quantized checkpoint's dtypes as saved, and then refuse to multiply a float16
    activation by another dtype; a checkpoint without NF4 layers they cast to float16, where the value becomes
    infinite. `test_stock_loaders_cannot_run_one_tensor_in_another_dtype` shows both, for matrices and norms.
    """
    wide = folder.with_name("in-bfloat16")  # marks that float16 was tried, for a run that resumes
    if not wide.exists():
        try:
            return _write_and_verify(folder, source, saving, shard_bytes)
        except NotFinite as error:
            if overflow == "error" or saving.storage != torch.float16:
                raise
            print(f"quantize: in float16 {error.what}; written again in bfloat16", flush=True)
        shutil.rmtree(folder)
        write_text(wide, "")
    compute = torch.bfloat16 if saving.compute == saving.storage else saving.compute
    saving = replace(saving, storage=torch.bfloat16, compute=compute)
    report = _write_and_verify(folder, source, saving, shard_bytes)
    if report["proof"] is not None:
        report["proof"]["rewritten_in_bfloat16"] = True
    return report


def _write_and_verify(folder: Path, source: ModelSource, saving: Saving, shard_bytes: int) -> dict[str, Any]:
    with open_weights(source) as weights:
        items = list_items(weights, saving)
        shards = _split(items, shard_bytes)
        _check_resources(folder, shards, weights)
        notes = {}
        for name in progress(list(shards), len(shards), "quantize"):
            note = folder.with_name(f"{name}.json")
            if not ((folder / name).exists() and note.exists()):
                write_shard(folder / name, note, shards[name], weights, saving)
            notes[name] = read_json(note, what="note on a shard", stage=NOTEBOOKS["quantize"])
        write_companions(folder, source, weights, saving, notes)
        written = {name: sha256 for note in notes.values() for name, sha256 in note["sha256"].items()}
        report = verify(folder, source, weights, items, saving, written)
    casts = [cast for note in notes.values() for cast in note["casts"]]
    return report | {"saved_as": _plain(saving.storage), "casts": casts}


def _plain(dtype: torch.dtype) -> str:
    """A dtype's name as configurations write it: "float16"."""
    return str(dtype).removeprefix("torch.")


# --- before anything is written --------------------------------------------------------------------------


def check_request(
    source: ModelSource,
    plan: ProtectionPlan,
    overflow: str = "keep_bf16",
    backend: str = "bitsandbytes",
) -> None:
    """Refuse what can't succeed: no package, another model's plan, unknown modules, foreign formats.

    Raises:
        CheckpointError: an unknown backend or policy, or the backend's package can't be imported.
        PlanError: the plan isn't for this model or this backend; which layers, and what to do.
    """
    if backend not in BACKENDS:
        raise CheckpointError(
            f"unknown backend {backend!r}; the backends are {', '.join(BACKENDS)}."
            f"{suggest(backend, BACKENDS)}"
        )
    try:
        import_module(backend.replace("-", "_"))
    except (ImportError, RuntimeError, OSError) as error:
        raise CheckpointError(
            f"{backend} can't be used here ({error}). Install it with `pip install {backend}` and start "
            "the session again; it needs no CUDA."
        ) from error
    if overflow not in OVERFLOW:
        raise CheckpointError(f"overflow={overflow!r}: expected one of {', '.join(OVERFLOW)}.")
    held, wanted = plan.model.get("sha256"), source.sha256
    if held != wanted:
        raise PlanError(
            f"The plan is for {plan.model.get('id')} (weights {str(held)[:12]}), this model is {source.id} "
            f"(weights {wanted[:12]}). Make the plan from this model's own analysis."
        )
    check_writer(plan, backend)
    layers = list_layers(source)
    check_plan(plan, [layer.name for layer in layers])
    planned = [layer for layer in layers if plan.formats.get(layer.name, "16bit") != "16bit"]
    if wrong := [layer.name for layer in planned if not layer.quantizable]:
        raise PlanError(
            f"{len(wrong)} modules of the plan can't be quantized in this model (an output, an embedding, "
            f"or no plain linear layer): {', '.join(wrong[:5])}. Give them 16bit."
        )
    if uneven := [layer for layer in planned if not fits(plan.formats[layer.name], layer.cols)]:
        layer = uneven[0]
        raise PlanError(
            f"{len(uneven)} layers can't be split into groups: {plan.formats[layer.name]} doesn't divide the "
            f"{layer.cols} columns of {layer.name}. Give them smaller groups, int8 or 16bit."
        )
    if backend == "bitsandbytes":
        return
    used = sorted({plan.formats[layer.name] for layer in planned})
    asymmetric = [fmt for fmt in used if not format_row(fmt).symmetric]
    if asymmetric and Version(metadata.version(backend)) >= ASYMMETRIC_BELOW:
        raise PlanError(
            f"{', '.join(asymmetric)}: with {backend} {metadata.version(backend)}, transformers can't "
            "load zero points (0.17 can; 0.18 to 0.20 expect another shape). Use formats without `_asym`, "
            "or install compressed-tensors 0.17."
        )
    if experts := [layer.name for layer in layers if layer.role == "experts"]:
        raise PlanError(
            f"{experts[0]}: transformers expects the experts of a compressed-tensors checkpoint to be "
            "packed, and this project keeps stacked experts in 16-bit. Use backend='bitsandbytes'."
        )
    if conv1d := [layer.name for layer in planned if layer.role == "conv1d"]:
        raise PlanError(
            f"compressed-tensors packs nn.Linear only, and {len(conv1d)} planned layers are Conv1D: "
            f"{', '.join(conv1d[:5])}. Use backend='bitsandbytes' with nf4, or give them 16bit."
        )


def _auto_storage(source: ModelSource, place: torch.device) -> str:
    """float16 for a GPU that only emulates bfloat16, slowly; else the source's own."""
    emulated = place.type == "cuda" and resolve_dtype("auto", place) == torch.float16
    return "float16" if emulated else source.storage_dtype


def _check_target(run: Run, source: ModelSource) -> None:
    """An earlier checkpoint of the same model may be replaced; anything else in `model/` may not."""
    folder = run.model_dir
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    plan = folder / "plan.json"
    try:
        owner = read_json(plan, what="plan").get("model", {}) if plan.exists() else {}
    except RunError:  # cut or damaged, yet this run's own if its record says that it wrote the folder
        written = run_info(run)["stages"].get("quantize", {}).get("outputs", {})
        owner = {"sha256": source.sha256} if "model/plan.json" in written else {}
    if owner.get("sha256") != source.sha256:
        whose = f"a checkpoint of {owner.get('id')}" if owner else "files that this stage did not write"
        raise CheckpointError(f"{folder} holds {whose}. Move it away, or choose another `run_dir`.")


def _guided_codes(run: Run, source: ModelSource, plan: ProtectionPlan, place: torch.device) -> Codes:
    """The codes that notebook 01 chose for this plan; what is missing is made here, and said."""
    codes = Codes(run.rounded)
    cols = {layer.name: layer.cols for layer in list_layers(source)}
    wanted = {(name, fmt) for name, fmt in plan.formats.items() if guidable(fmt, cols[name])}
    if missing := sorted({fmt for name, fmt in wanted - set(codes)}):
        print(
            f"quantize: no guided codes in {', '.join(missing)} in this run yet; they are made now",
            flush=True,
        )
        codes = make_codes(run, source, sorted({fmt for _, fmt in wanted}), device=str(place))
    return codes


def _check_resources(folder: Path, shards: Mapping[str, Sequence[Item]], weights: Weights) -> None:
    """Estimate disk and memory before the first byte is written."""
    folder.mkdir(parents=True, exist_ok=True)
    sizes = [sum(item.nbytes for item in items) for items in shards.values()]
    need = sum(sizes) + SPARE_DISK - sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    free = shutil.disk_usage(folder).free
    if free < need:
        raise CheckpointError(
            f"{folder}: {need / 1e9:.2f} GB are needed, {free / 1e9:.2f} GB are free. Free some space, or "
            "choose a `run_dir` on another disk."
        )
    # A shard (safetensors before 0.8 copies it to write it), the tensor as read, of 32 bits at most, and
    # scratch arrays of bounded size.
    largest = max(math.prod(shape) for shape in weights.shapes.values())
    copies = 1 if Version(metadata.version("safetensors")) >= Version("0.8") else 2
    need = copies * max(sizes) + 4 * largest + WORKING_MEMORY
    free = psutil.virtual_memory().available
    if free < need:
        raise CheckpointError(
            f"About {need / 1e9:.1f} GB of memory are needed for a shard and the largest tensor ({largest:,} "
            f"weights), {free / 1e9:.1f} GB are available. Close other programs, choose a smaller "
            "max_shard_size, or use a larger machine."
        )


# --- the shards ------------------------------------------------------------------------------------------


def list_items(weights: Weights, saving: Saving) -> list[Item]:
    """All tensors of a model in order, each with its format (16-bit where the plan doesn't name it)."""
    conv1d, plan, dtype = conv1d_modules(weights.model), saving.plan, _plain(saving.storage)
    items = []
    for name, held in weights.shapes.items():
        module = name.removesuffix(".weight")
        fmt, transposed = plan.formats.get(module, "16bit"), module in conv1d
        shape = held[::-1] if transposed and len(held) == 2 else held
        size = math.prod(shape) * (4 if name in weights.keep else 2)
        if fmt != "16bit":
            size = layer_bytes(fmt, *shape, double_quant=plan.double_quant, dtype=dtype)
        items.append(Item(name, fmt, shape, transposed, size))
    return items


def _split(items: Sequence[Item], limit: int) -> dict[str, list[Item]]:
    """Items in order, cut where the next would exceed `limit` bytes: file name -> items."""
    groups: list[list[Item]] = [[]]
    size = 0
    for item in items:
        if groups[-1] and size + item.nbytes > limit:
            groups.append([])
            size = 0
        groups[-1].append(item)
        size += item.nbytes
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {
        f"model-{number:05d}-of-{len(groups):05d}.safetensors": group
        for number, group in enumerate(groups, 1)
    }


def write_shard(path: Path, note: Path, items: Sequence[Item], weights: Weights, saving: Saving) -> None:
    """Write one shard, atomically, and before it a note: its tensors' hashes and bytes, what casts lose.

    Raises:
        NotFinite: a weight is too large for the storage dtype.
        CheckpointError: the source holds NaN or infinity, or the backend's package reads other values than
            were meant.
    """
    tensors: dict[str, torch.Tensor] = {}
    casts = []
    for item in items:
        made, lost = file_tensors(item, weights, saving)
        tensors |= {name: tensor.cpu().contiguous() for name, tensor in made.items()}
        casts += [lost] if lost else []
    hashes = {name: tensor_hash(tensor) for name, tensor in tensors.items()}
    size = sum(tensor.nbytes for tensor in tensors.values())
    write_json(note, {"casts": casts, "bytes": size, "sha256": hashes})
    write_tensors(path, tensors, format="pt")


def file_tensors(
    item: Item, weights: Weights, saving: Saving
) -> tuple[dict[str, torch.Tensor], dict[str, Any] | None]:
    """What the files hold for one tensor of the source, by their names for it, and what its cast loses."""
    from transformers.core_model_loading import revert_weight_conversion

    value, lost = _read_and_cast(item.name, weights, saving)
    if item.fmt == "16bit":
        # A stack of experts becomes one tensor an expert, as published checkpoints have it.
        return dict(revert_weight_conversion(weights.model, {item.name: value})), lost
    weight = value.T.contiguous() if item.transposed else value
    double = saving.plan.double_quant and item.fmt == "nf4"
    chosen = saving.codes.get((item.module, item.fmt))
    if chosen is None:
        packed = quantize_matrix(weight, item.fmt, double_quant=double)
    else:
        packed = in_dtype(chosen, saving.storage).to(saving.device)
        packed = double_quantized(packed) if double else packed
    backend = BACKENDS[saving.backend]
    parts = backend.parts(packed)
    backend.check(packed, parts, weight if chosen is None else None)
    stem = file_stem(item, weights)
    return {stem + part: tensor for part, tensor in parts.items()}, lost


def _read_and_cast(name: str, weights: Weights, saving: Saving) -> tuple[torch.Tensor, dict[str, Any] | None]:
    """A source tensor on the device in the dtype that it is saved in, and what a cast to the dtype that was
    asked for loses: finite values that become infinite (`overflow`) or zero (`underflow`), and the `largest`
    magnitude. Read once; between 16-bit types it keeps its memory."""
    value = weights.read_source(name).to(saving.device)
    kept = not value.is_floating_point() or name in weights.keep
    storage = value.dtype if kept else saving.storage
    asked = value.dtype if kept else saving.asked
    made = value
    if storage != value.dtype:
        same = value.element_size() == storage.itemsize
        made = value.view(storage) if same else torch.empty_like(value, dtype=storage)
    bad = over = under = 0
    largest = 0.0
    for part, target in zip(value.view(-1).split(PIECE), made.view(-1).split(PIECE), strict=True):
        bad += int((~part.isfinite()).sum())
        if asked != part.dtype and part.numel():
            cast = part.to(asked)
            over += int((cast.isinf() & part.isfinite()).sum())
            under += int(((cast == 0) & (part != 0)).sum())
            largest = max(largest, part.abs().max().item())
        if made is not value:
            target.copy_(part.to(storage))
    if bad:
        raise CheckpointError(
            f"{name} holds {bad} values that are NaN or infinite, in the source model itself: no dtype "
            "mends that. Fetch the model again, or ask those who made it."
        )
    if over and saving.storage == saving.asked:
        raise NotFinite(
            f"{name}: {over} values are too large for {_plain(storage)}, the largest {largest:.3g}. Use "
            "overflow='keep_bf16', or keep the checkpoint's own dtype with storage_dtype='auto'.",
            f"values of {name} overflow",
        )
    lost = {"name": name, "overflow": over, "underflow": under, "largest": largest}
    return made, lost if over or under else None


def file_stem(item: Item, weights: Weights) -> str:
    """How the files begin the names of a module's tensors: "model.layers.0.mlp.up_proj."."""
    from transformers.core_model_loading import revert_weight_conversion

    empty = torch.empty(weights.shapes[item.name], device="meta")
    return next(iter(revert_weight_conversion(weights.model, {item.name: empty}))).removesuffix("weight")


def tensor_hash(tensor: torch.Tensor) -> str:
    """SHA-256 of a CPU tensor's dtype, shape and bytes."""
    mark = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)}".encode())
    mark.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return mark.hexdigest()


# --- what lies beside the weights ------------------------------------------------------------------------

# What travels along from the source's folder.
COMPANIONS = (
    *("tokenizer*", "vocab.*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "*.tiktoken"),
    *("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"),
    *("chat_template*", "generation_config.json", "LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*"),
)


def write_companions(
    folder: Path, source: ModelSource, weights: Weights, saving: Saving, notes: Mapping[str, Any]
) -> None:
    """Index, tokenizer and the like, the plan, the script that runs the model, and its configuration."""
    if len(notes) > 1:
        where = {tensor: shard for shard, note in notes.items() for tensor in note["sha256"]}
        total = sum(note["bytes"] for note in notes.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
        write_json(folder / "model.safetensors.index.json", index)
    patterns = (*COMPANIONS, "*.py") if source.trust_remote_code else COMPANIONS
    for path in {path for pattern in patterns for path in source.directory.glob(pattern)}:
        if path.is_file():
            shutil.copyfile(path, folder / path.name)
    saving.plan.write(folder / "plan.json")
    try:
        script = resources.files("spi_utils.examples").joinpath("generate.py").read_text(encoding="utf-8")
    except ModuleNotFoundError:  # not installed: beside this package
        script = (Path(__file__).parents[1] / "examples" / "generate.py").read_text(encoding="utf-8")
    write_text(folder / "generate.py", script)
    config = copy.deepcopy(weights.model.config)
    config.architectures = [type(weights.model).__name__]
    config.dtype = saving.storage
    formats = saving.plan.formats
    if set(formats.values()) - {"16bit"}:
        make = BACKENDS[saving.backend].config
        config.quantization_config = make(weights.model, formats, saving.plan.double_quant, saving.compute)
    config.save_pretrained(folder)


def _promote(made: Path, target: Path) -> None:
    """Put the finished folder in place of an earlier one: two renames, so that no mixture is ever there."""
    if not made.exists():  # an earlier process got this far and no further
        return
    old = target.with_name(".model-old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        os.replace(target, old)
    os.replace(made, target)
    shutil.rmtree(old, ignore_errors=True)


# --- proof from the disk ---------------------------------------------------------------------------------


def verify(
    folder: Path,
    source: ModelSource,
    weights: Weights,
    items: Sequence[Item],
    saving: Saving,
    written: Mapping[str, str],
) -> dict[str, Any]:
    """Prove that a checkpoint on the disk is what was planned; what was found, for run.json.

    Args:
        written: the hash of every tensor that was handed to the files, by name.

    Raises:
        NotFinite: loaded by stock transformers it computes infinities or NaN.
        CheckpointError: it isn't what was planned; says where.
    """
    report = check_size(folder, saving.plan.bytes["total"])
    check_bits(folder, written)
    counts = Counter(item.fmt for item in items)
    report["bits"] = {**dict(sorted(counts.items())), "against": f"{saving.backend} and the source"}
    report["fresh_process"] = check_fresh(folder, source, weights, items, saving)
    report["proof"] = report["fresh_process"].pop("proof")
    return report


def check_size(folder: Path, planned: int) -> dict[str, Any]:
    """Compare the files' bytes with the plan's prediction.

    Raises:
        CheckpointError: a file is cut or damaged, or they differ by more than `size_tolerance`.
    """
    size = sum(path.stat().st_size for path in {path for path, *_ in saved_files(folder).values()})
    if abs(size - planned) > size_tolerance(planned):
        raise CheckpointError(
            f"{folder}: the weights take {size:,} bytes, the plan predicted {planned:,} "
            f"({size / planned - 1:+.2%}). The plan was made for other layers: run notebook 02_visualize "
            "again."
        )
    return {"bytes": size, "bytes_planned": planned}


def check_bits(folder: Path, written: Mapping[str, str]) -> None:
    """Read every tensor back from the files and compare its hash with what was handed to them.

    Raises:
        CheckpointError: a file is cut or damaged; tensors that differ, are missing, or are too many.
    """
    files = saved_files(folder)
    found = {}
    for name in progress(list(files), len(files), "verify"):
        path, _, shape = files[name]
        found[name] = tensor_hash(read_part(path, name, shape))
    wrong = sorted(name for name in written.keys() | found.keys() if written.get(name) != found.get(name))
    if wrong:
        raise CheckpointError(
            f"{len(wrong)} of {len(written)} tensors on the disk differ from the source's: "
            f"{', '.join(wrong[:5])}. The disk or the memory is unreliable, or two runs wrote here at once: "
            "run the stage again with force=True."
        )


# --- proof by a fresh process ----------------------------------------------------------------------------

ASYMMETRIC_BELOW = Version("0.18")  # of compressed-tensors; later ones prepare a module for unpacked zeros
PROOF_TEXT, PROOF_WINDOWS, PROOF_LENGTH = "pydoc", 4, 256  # what the fresh process reads, everywhere the same
LOGIT_TOLERANCE = 0.01  # share of the logits' standard deviation; equal bits leave only the kernels' rounding
MEMORY_FACTOR = 1.3  # a loaded model against its files
INTERPRETER = 1_500_000_000  # bytes of a process with transformers and bitsandbytes in it, and activations
MARLIN_ROWS, MARLIN_COLS = 64, 128  # vLLM's Marlin kernel wants multiples of these
FRESH_CHECK = Path(__file__).with_name("fresh_check.py")
LINEAR_4BIT = "bitsandbytes.nn.modules.Linear4bit"
PACKED = "packed"  # what fresh_check.py says of a module that compressed-tensors holds packed
PLAIN = ("torch.nn.modules.linear.Linear", "transformers.pytorch_utils.Conv1D")


def check_fresh(
    folder: Path, source: ModelSource, weights: Weights, items: Sequence[Item], saving: Saving
) -> dict[str, Any]:
    """Load the checkpoint in a process of its own; compare classes and dtypes and, where it fits, use it."""
    planned = {item.module: item for item in items if item.fmt != "16bit"}
    awkward = [
        name
        for name, item in planned.items()
        if item.fmt == "nf4" and (item.shape[0] % 32 or item.shape[1] % 64)
    ]
    fits_here = fits_in_memory(folder, weights, saving)
    forward = fits_here and not (awkward and saving.device.type == "cpu")
    windows: list[list[int]] = []
    if forward:
        config, tokenizer, text = weights.model.config, load_tokenizer(source), load_text(PROOF_TEXT)
        start = start_token(tokenizer, config)
        longest = getattr(config.get_text_config(), "max_position_embeddings", None) or PROOF_LENGTH
        length = min(PROOF_LENGTH, longest)
        windows = make_windows(text, tokenizer, PROOF_WINDOWS, length, start, config=config).tolist()
    answer = ask(
        {
            "windows": windows,
            "model": str(folder.resolve()),
            "source": str(source.directory.resolve()),
            "trust": source.trust_remote_code,
            "device": str(saving.device),
            "threads": torch.get_num_threads(),
            "load": fits_here,
            "forward": forward,
            "stems": {name: file_stem(item, weights) for name, item in planned.items()},
        }
    )
    _check_classes(answer, {name: item.fmt for name, item in planned.items()})
    proof = None
    if forward:
        said = check_use(answer, saving.storage)
        proof = {
            "dtype": _plain(saving.storage),
            "device": str(saving.device),
            "transformers": answer["transformers"],
            "text": PROOF_TEXT,
            "windows": len(windows),
            "length": len(windows[0]),
            "tokens": sum(len(ids) for ids in windows),
            "start_token": start,
            "finite": True,
            "generation": said,
            "rewritten_in_bfloat16": False,
        }
    notes = []
    if not fits_here:
        notes.append(
            "The model is too large to be loaded on this machine: classes were checked without weights (meta "
            "device), all bits by reading the files; logits were not compared."
        )
    if shadowed := shadowed_modules(folder, [name for name, item in planned.items() if item.fmt == "nf4"]):
        notes.append(
            f"{', '.join(shadowed[:3])}: their names begin like that of a 16-bit module, which transformers "
            "before 5.23 takes for the same: there they would stay unquantized, and not load."
        )
    if awkward:
        notes.append(
            f"{len(awkward)} NF4 layers ({', '.join(awkward[:3])}) have out_features that 32 does not divide "
            "or in_features that 64 does not: bitsandbytes runs them on GPUs, but not on CPUs with "
            "AVX512-BF16, so logits were not compared on the CPU."
        )
    if saving.backend == "compressed-tensors":
        linear = {name for name, module in weights.model.named_modules() if isinstance(module, nn.Linear)}
        notes += serving_notes(
            {item.module: item.fmt for item in items if item.module in linear and len(item.shape) == 2},
            {name: (item.shape[0], item.shape[1]) for name, item in planned.items()},
        )
    report = {key: value for key, value in answer.items() if key not in ("modules", "text", "generation")}
    return report | {
        "proof": proof,
        "loaded": fits_here,
        "modules": len(answer["modules"]),
        "notes": notes,
    }


def fits_in_memory(folder: Path, weights: Weights, saving: Saving) -> bool:
    """Whether the checkpoint can be loaded and run here; compressed-tensors unpacks it to 16 bits."""
    size = 2 * sum(math.prod(shape) for shape in weights.shapes.values())  # the model to compare with
    if saving.backend == "compressed-tensors":  # unpacked to 16 bits beside the packed file
        size += disk_bytes(folder)
    need = MEMORY_FACTOR * size + INTERPRETER
    if saving.device.type == "cuda":
        torch.cuda.empty_cache()  # what this process keeps is not free for another
        return need < torch.cuda.mem_get_info(saving.device)[0]
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


def _check_classes(answer: Mapping[str, Any], planned: Mapping[str, str]) -> None:
    """Quantized modules are exactly the planned ones, in their formats; all others are plain."""
    schemes: dict[str, list[Any] | None] = {}
    for name, fmt in planned.items():
        row = format_row(fmt)
        schemes[name] = None if row.bits is None else [row.bits, row.group, row.symmetric]
    modules = answer["modules"]
    found = {
        name: module.get("scheme")
        for name, module in modules.items()
        if module["class"] == LINEAR_4BIT or module["dtype"] == PACKED
    }
    if found != schemes:
        extra, lost = sorted(found.keys() - schemes.keys()), sorted(schemes.keys() - found.keys())
        other = [name for name in schemes if name in found and found[name] != schemes[name]]
        raise CheckpointError(
            f"Loaded by transformers {answer['transformers']}, {len(extra)} modules are quantized unplanned "
            f"({', '.join(extra[:3])}), {len(lost)} planned ones are not ({', '.join(lost[:3])}), and "
            f"{len(other)} have another format ({', '.join(other[:3])})."
        )
    odd = [
        f"{name} ({module['class']}, {module['dtype']})"
        for name, module in modules.items()
        if name not in schemes
        and (
            module["dtype"] not in ("float16", "bfloat16", "float32")
            or module["class"].startswith("bitsandbytes.")
        )
    ]
    if odd:
        raise CheckpointError(f"{len(odd)} modules that should be 16-bit are not: {', '.join(odd[:3])}.")
    if answer["spi_utils"]:
        raise CheckpointError("The fresh process had imported spi_utils, so its check proves nothing.")


def check_use(answer: Mapping[str, Any], storage: torch.dtype) -> dict[str, Any]:
    """The fresh process' answer to the prompt, after judging its logits and that answer.

    Raises:
        NotFinite: logits that are not numbers, with the first module whose output isn't.
        CheckpointError: other logits than the in-memory model's; an empty or degenerate answer.
    """
    read, said = answer["text"], answer.get("generation", {})
    if not (answer["finite"] and read["finite"]):
        where = read["first_nonfinite"]
        first = f" The first module whose output is not finite is {where}." if where else ""
        cure = "Check that the original model runs in bfloat16: a norm or an embedding of it may hold NaN."
        if storage == torch.float16:
            cure = "Save it in another: storage_dtype='bfloat16'."
        raise NotFinite(
            "The checkpoint's logits are not numbers in stock transformers: its activations leave the range "
            f"of {_plain(storage)}, the dtype that it is saved in.{first} {cure}",
            "this model's activations overflow in stock transformers",
        )
    difference, spread = answer["max_logit_difference"], answer["logit_spread"]
    if not difference <= LOGIT_TOLERANCE * spread:
        raise CheckpointError(
            f"The reloaded model's logits differ from the in-memory model's by up to {difference:.3g} (their "
            f"spread is {spread:.3g}), although all weights are equal. Please report this with the versions: "
            f"transformers {answer['transformers']}, torch {answer['torch']}."
        )
    if said["problem"]:
        raise CheckpointError(
            f"Stock transformers loads this checkpoint, but its answer to a prompt {said['problem']}: "
            f"{said['text'][:80]!r} ({said['tokens']} tokens). Check the model's generation_config.json and "
            "tokenizer; if the 16-bit model answers well, protect more layers (notebook 02_visualize)."
        )
    return {key: value for key, value in said.items() if key != "problem"}


def shadowed_modules(folder: Path, planned: Sequence[str]) -> list[str]:
    """NF4 modules that the looser name matching of transformers 5.0 to 5.15 takes for skipped ones."""
    config = json.loads((folder / "config.json").read_text())
    skipped = config.get("quantization_config", {}).get("llm_int8_skip_modules") or []
    return [name for name in planned if any(re.match(key, name) or name.endswith(key) for key in skipped)]


def serving_notes(formats: Mapping[str, str], shapes: Mapping[str, tuple[int, int]]) -> list[str]:
    """What vLLM would object to in a plan, by the rules of its loader (compressed_tensors/utils.py,
    compressed_tensors_wNa16.py, marlin_utils.py; read in its public source, not run here).

    Layers that vLLM merges must share a format. Shapes that Marlin doesn't take go to slower kernels, or
    nowhere on old GPUs. `shapes` {module: (rows, cols)}.
    """
    names = list(formats)
    groups = [[names[index] for index in group] for group in fused_groups(names)]
    torn = [group for group in groups if len({formats[name] for name in group}) > 1]
    odd = [
        name
        for name, fmt in formats.items()
        if fmt != "16bit" and (shapes[name][0] % MARLIN_ROWS or shapes[name][1] % MARLIN_COLS)
    ]
    notes = []
    if torn:
        notes.append(
            f"vLLM merges layers that have different formats here and will refuse the checkpoint: "
            f"{len(torn)} groups, such as {', '.join(torn[0])}. Plan with group='fused'."
        )
    if odd:
        notes.append(
            f"{len(odd)} quantized layers, such as {odd[0]}, have rows that {MARLIN_ROWS} or columns that "
            f"{MARLIN_COLS} doesn't divide: vLLM's Marlin kernel pads them or leaves them to slower ones."
        )
    return notes


# --- what was found, in words ----------------------------------------------------------------------------


def proof_of(run: Run) -> str:
    """What verification found in the run's checkpoint, in lines.

    Raises:
        RunError: there is no checkpoint yet.
    """
    record = run_info(run)["stages"].get("quantize")
    if record is None:
        raise RunError(f"{run.path} holds no checkpoint yet: run notebook {NOTEBOOKS['quantize']}.")
    fresh = record["fresh_process"]
    off = record["bytes"] / record["bytes_planned"] - 1
    bits = {fmt: count for fmt, count in record["bits"].items() if fmt != "against"}
    tensors = ", ".join(f"{count} tensors in {fmt}" for fmt, count in bits.items())
    logits = fresh.get("max_logit_difference", "not tried")
    return "\n".join(
        [
            f"size on disk: {record['bytes'] / 1e9:.4f} GB, {off:+.3%} against the plan",
            f"bit-equal to {record['bits']['against']}: {tensors}",
            f"fresh process: {fresh['modules']} modules as planned, largest logit difference {logits}",
            proof_by_use(record),
            *fresh["notes"],
        ]
    )


def proof_by_use(record: Mapping[str, Any]) -> str:
    """One line on how the checkpoint was used in a fresh process; `record` is run.json's stage "quantize"."""
    proof = record.get("proof")
    if proof is None:
        return (
            "NOT proven by use: it could not be run on this machine (see the notes), so it can't be published"
        )
    answer = proof["generation"]
    return (
        f"proven by use: transformers {proof['transformers']}, {proof['dtype']} on {proof['device']}, "
        f"finite logits at all {proof['tokens']} tokens of {proof['text']}, answers {answer['text'][:60]!r}"
    )
