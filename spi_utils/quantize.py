"""A model and a plan -> a checkpoint that stock transformers load: bitsandbytes or compressed-tensors.

The planned layers are quantized, everything else stays 16-bit. One tensor is in memory at a time, whatever
the model's size; a killed run resumes at the first shard that is missing. What was written is read back from
the disk and proven before the stage reports success (verify.py).
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from spi_utils.checkpoints.backends import check_installed, loadable_formats
from spi_utils.checkpoints.bnb_parts import skip_modules
from spi_utils.checkpoints.checkpoint import (
    OVERFLOW,
    Item,
    SavedWeights,
    Saving,
    file_names,
    file_tensors,
    in_bfloat16,
    list_items,
    plain,
    read_saved,
    saved_weights,
    scan_casts,
    settle,
)
from spi_utils.checkpoints.companions import write_rest
from spi_utils.checkpoints.tensorfile import TensorWriter, header_bound
from spi_utils.checkpoints.verify import NotFinite, verify
from spi_utils.errors import CheckpointError, PlanError, RunError
from spi_utils.formats import fits
from spi_utils.models import (
    Layer,
    ModelSource,
    Weights,
    list_layers,
    open_weights,
    resolve_device,
    resolve_dtype,
)
from spi_utils.plan import check_plan, check_writer
from spi_utils.progress import progress
from spi_utils.rounding import Codes, guidable
from spi_utils.runs import (
    NOTEBOOKS,
    Run,
    atomic_path,
    checkpoint_hash,
    read_json,
    run_info,
    stage,
    write_json,
    write_text,
)
from spi_utils.safe_linear import SafeFP16Linear, isolate, isolation_report
from spi_utils.sensitivity import make_codes

if TYPE_CHECKING:
    from spi_utils.plan import ProtectionPlan

__all__ = [
    "SafeFP16Linear",
    "SavedWeights",
    "check_request",
    "isolate",
    "isolation_report",
    "proof_of",
    "quantize",
    "saved_weights",
    "skip_modules",
]

SPARE_DISK = 50_000_000  # bytes beside the weights: tokenizer, index, directory entries
WORKING_MEMORY = 1_000_000_000  # bytes beside the largest tensor's own


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
        max_shard_size: such as "2GB" or "500MB" (10⁹ and 10⁶ bytes).
        storage_dtype: of everything that isn't quantized; "auto" is the source's own 16-bit type, and float16
            on a GPU without bfloat16 (T4). What a cast loses is counted for each tensor and recorded.
        compute_dtype: what stock loaders multiply NF4 layers in; "auto" is the storage dtype.
        overflow: if weights, or activations in stock transformers, are too large for float16, "keep_bf16"
            saves the whole checkpoint in bfloat16 (one layer in another dtype doesn't run in stock loaders,
            see `checkpoint.settle`), "error" refuses.
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
    storage, compute = _dtypes(source, place, storage_dtype, compute_dtype)
    _check_target(run, source)
    kinds = (getattr(torch, storage), getattr(torch, compute))
    saving = Saving(*kinds, plan.double_quant, overflow, place, backend)
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
            write_json(report, _make(work / "model", source, plan, saving, _shard_bytes(max_shard_size)))
        _promote(work / "model", run.model_dir)
        st.record(**read_json(report))
    return run.model_dir


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


def _dtypes(source: ModelSource, place: torch.device, storage: str, compute: str) -> tuple[str, str]:
    """The storage and compute dtypes' names, "auto" settled."""
    storage = _auto_storage(source, place) if storage == "auto" else storage
    compute = storage if compute == "auto" else compute
    _check_dtypes(storage, compute)
    return storage, compute


def _auto_storage(source: ModelSource, place: torch.device) -> str:
    """float16 for a GPU that only emulates bfloat16, slowly; else the source's own."""
    emulated = place.type == "cuda" and resolve_dtype("auto", place) == torch.float16
    return "float16" if emulated else source.storage_dtype


def _make(
    folder: Path, source: ModelSource, plan: ProtectionPlan, saving: Saving, shard_bytes: int
) -> dict[str, Any]:
    """Write and verify a checkpoint in `folder`, in bfloat16 if its activations need that; what was found."""
    wide = folder.with_name("in-bfloat16")  # marks that float16 was tried, for a run that resumes
    try:
        return _made(folder, source, plan, in_bfloat16(saving) if wide.exists() else saving, shard_bytes)
    except NotFinite:
        if saving.overflow == "error" or saving.storage != torch.float16 or wide.exists():
            raise
    print(
        "quantize: in float16 this model's activations overflow in stock transformers; written again in "
        "bfloat16",
        flush=True,
    )
    shutil.rmtree(folder)
    write_text(wide, "")
    return _made(folder, source, plan, in_bfloat16(saving), shard_bytes)


def _made(
    folder: Path, source: ModelSource, plan: ProtectionPlan, saving: Saving, shard_bytes: int
) -> dict[str, Any]:
    """Write and verify a checkpoint in `folder`; what was found."""
    with open_weights(source) as weights:
        items = list_items(weights, plan.formats, saving)
        _check_resources(folder, items, weights, saving.device)
        casts = scan_casts(weights, items, saving.storage)
        saving = settle(saving, casts)
        _write_shards(folder, _split(items, shard_bytes), weights, saving)
        write_rest(folder, source, weights, plan, saving)
        report = verify(folder, source, weights, items, plan, saving)
    proof = report["fresh_process"].pop("proof")
    if proof is not None:
        proof["rewritten_in_bfloat16"] = folder.with_name("in-bfloat16").exists()
    return (
        report
        | {"proof": proof}
        | {"saved_as": plain(saving.storage), "casts": [asdict(cast) for cast in casts]}
    )


# --- before anything is written --------------------------------------------------------------------------


def check_request(
    source: ModelSource,
    plan: ProtectionPlan,
    overflow: str = "keep_bf16",
    backend: str = "bitsandbytes",
) -> None:
    """Refuse what can't succeed: no package, another model's plan, unknown modules, foreign formats."""
    check_installed(backend)
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
    able = {layer.name for layer in layers if layer.quantizable}
    wrong = [name for name, fmt in plan.formats.items() if fmt != "16bit" and name not in able]
    if wrong:
        raise PlanError(
            f"{len(wrong)} modules of the plan can't be quantized in this model (an output, an embedding, "
            f"or no plain linear layer): {', '.join(wrong[:5])}. Give them 16bit."
        )
    _check_shapes(plan, layers, backend)


def _check_shapes(plan: ProtectionPlan, layers: Sequence[Layer], backend: str) -> None:
    """Every planned layer must be one that the backend can hold in its format."""
    held = [layer for layer in layers if plan.formats.get(layer.name, "16bit") != "16bit"]
    uneven = [layer for layer in held if not fits(plan.formats[layer.name], layer.cols)]
    if uneven:
        layer = uneven[0]
        raise PlanError(
            f"{len(uneven)} layers can't be split into groups: {plan.formats[layer.name]} doesn't divide the "
            f"{layer.cols} columns of {layer.name}. Give them smaller groups, int8 or 16bit."
        )
    asymmetric = sorted({plan.formats[layer.name] for layer in held} - set(loadable_formats(backend)))
    if asymmetric:
        raise PlanError(
            f"{', '.join(asymmetric)}: with {backend} {metadata.version(backend)}, transformers can't "
            "load zero points (0.17 can; 0.18 to 0.20 expect another shape). Use formats without `_asym`, "
            "or install compressed-tensors 0.17."
        )
    conv1d = [layer.name for layer in held if layer.role == "conv1d"]
    experts = [layer.name for layer in layers if layer.role == "experts"]
    if backend == "compressed-tensors" and experts:
        raise PlanError(
            f"{experts[0]}: transformers expects the experts of a compressed-tensors checkpoint to be "
            "packed, and this project keeps stacked experts in 16-bit. Use backend='bitsandbytes'."
        )
    if backend == "compressed-tensors" and conv1d:
        raise PlanError(
            f"compressed-tensors packs nn.Linear only, and {len(conv1d)} planned layers are Conv1D: "
            f"{', '.join(conv1d[:5])}. Use backend='bitsandbytes' with nf4, or give them 16bit."
        )


def _check_dtypes(storage: str, compute: str) -> None:
    if storage not in ("float16", "bfloat16"):
        raise CheckpointError(f"storage_dtype={storage!r}: expected 'auto', 'float16' or 'bfloat16'.")
    if compute not in ("float16", "bfloat16", "float32"):
        raise CheckpointError(
            f"compute_dtype={compute!r}: expected 'auto', 'float16', 'bfloat16' or 'float32'."
        )


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


def _check_resources(folder: Path, items: Sequence[Item], weights: Weights, device: torch.device) -> None:
    """Estimate disk and memory before the first byte is written."""
    import psutil

    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob(".*"):  # temporary files of a killed run
        stale.unlink()
    done = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    need = sum(item.nbytes for item in items) + SPARE_DISK - done
    free = shutil.disk_usage(folder).free
    if free < need:
        raise CheckpointError(
            f"{folder}: {need / 1e9:.2f} GB are needed, {free / 1e9:.2f} GB are free. Free some space, or "
            "choose a `run_dir` on another disk."
        )
    # The tensor as read, its cast copy, and float32 scratch arrays of bounded size.
    largest = max(torch.Size(weights.shape(item.name)).numel() for item in items)
    need = 2 * 4 * largest + WORKING_MEMORY if device.type == "cpu" else 4 * largest + WORKING_MEMORY
    free = psutil.virtual_memory().available
    if free < need:
        raise CheckpointError(
            f"About {need / 1e9:.1f} GB of memory are needed for the largest tensor ({largest:,} weights), "
            f"{free / 1e9:.1f} GB are available. Close other programs or use a larger machine."
        )


# --- the shards ------------------------------------------------------------------------------------------


def _shard_bytes(size: str) -> int:
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT])B\s*", size, re.IGNORECASE)
    if not match or float(match[1]) == 0:
        raise CheckpointError(f"max_shard_size={size!r}: expected a size such as '2GB' or '500MB'.")
    return int(float(match[1]) * 1000 ** ("KMGT".index(match[2].upper()) + 1))


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


def _write_shards(folder: Path, shards: Mapping[str, list[Item]], weights: Weights, saving: Saving) -> None:
    """Write the shards that are missing, each atomically."""
    for name in progress(list(shards), len(shards), "quantize"):
        if not (folder / name).exists():
            with atomic_path(folder / name) as temporary:
                _write_shard(temporary, shards[name], weights, saving)


def _write_shard(path: Path, items: Sequence[Item], weights: Weights, saving: Saving) -> None:
    names = [name for item in items for name in file_names(item, weights, saving)]
    with TensorWriter(path, header_bound(names, sum(item.nbytes for item in items))) as writer:
        for item in items:
            value = read_saved(weights, item, saving)
            for name, tensor in file_tensors(value, item, weights, saving):
                writer.add(name, tensor)


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
