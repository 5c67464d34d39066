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
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import psutil
import torch
from huggingface_hub import split_state_dict_into_shards_factory as split

from spi_utils import formats, models, runs
from spi_utils.checkpoint import BACKENDS, conv1d_modules, disk_bytes, reading, saved_files
from spi_utils.errors import CheckpointError, PlanError, RunError
from spi_utils.models import ModelSource, Weights
from spi_utils.plan import ProtectionPlan, check_plan, check_writer
from spi_utils.progress import progress
from spi_utils.rounding import Codes, guidable
from spi_utils.runs import Run
from spi_utils.sensitivity import make_codes
from spi_utils.texts import load_text, make_windows, start_token
from spi_utils.tokens import without_token

OVERFLOW = ("keep_bf16", "error")
SHARDS = "model{suffix}.safetensors"
DTYPES = ("float16", "bfloat16", "float32")
SPARE_DISK = 50_000_000  # bytes beside the weights: tokenizer, index, directory entries


class NotFinite(CheckpointError):
    """The dtype that is saved in can't hold a weight, or what a freshly loaded checkpoint computes."""


@dataclass(frozen=True)
class Saving:
    """How a checkpoint is saved: its plan and kind, the dtype of what isn't quantized, where the work is
    done, and codes that guided rounding chose, by (module, format)."""

    plan: ProtectionPlan
    backend: str
    storage: str
    device: torch.device
    codes: Mapping[tuple[str, str], formats.Packed]

    def fmt(self, name: str) -> str:
        """The format of one of the model's tensors: 16-bit where the plan doesn't name it."""
        return self.plan.formats.get(name.removesuffix(".weight"), "16bit")


def quantize(
    run: Run,
    source: ModelSource,
    plan: ProtectionPlan,
    *,
    device: str = "auto",
    max_shard_size: str = "2GB",
    storage_dtype: str = "auto",
    overflow: str = "keep_bf16",
    backend: str = "bitsandbytes",
    force: bool = False,
) -> Path:
    """Write `run.model_dir`, verify it from the disk, and return its path.

    Args:
        device: where codes are computed and the checkpoint is tried: "auto", "cpu", "cuda:0".
        max_shard_size: such as "2GB" or "500MB" (10⁹ and 10⁶ bytes); a shard is made in memory.
        storage_dtype: of everything that isn't quantized; "auto" is the source's own 16-bit type, and float16
            on a GPU without bfloat16 (T4). Stock loaders multiply NF4 layers in it too.
        overflow: if weights, or activations in stock transformers, are too large for float16, "keep_bf16"
            saves the whole checkpoint in bfloat16 (one layer in another dtype doesn't run in stock loaders,
            see `make_checkpoint`), "error" refuses.
        backend: "bitsandbytes" (NF4), or "compressed-tensors" (int4 and int8; vLLM serves it, transformers
            unpacks it at the first forward and then needs the memory of 16 bits).
        force: write it again even if it is there.

    Raises:
        PlanError: the plan is for another model, names unknown modules, or has formats that the backend can't
            hold. Nothing has been written then.
        CheckpointError: the backend's package is missing; too little disk; foreign files in the target
            folder; or the written checkpoint isn't what was planned: it then stays out of `run.model_dir`.
    """
    check_request(source, plan, backend)
    place = models.resolve_device(device)
    storage = auto_storage(source, place) if storage_dtype == "auto" else storage_dtype
    if storage not in DTYPES[:2] or overflow not in OVERFLOW:
        raise CheckpointError(
            f"storage_dtype={storage!r}, overflow={overflow!r}: expected {' or '.join(DTYPES[:2])}, and "
            f"{' or '.join(OVERFLOW)}."
        )
    _check_target(run, source)
    codes: Mapping[tuple[str, str], formats.Packed] = {}
    inputs = {"plan": plan.fingerprint, "max_shard_size": max_shard_size, "overflow": overflow}
    inputs |= {"storage_dtype": storage, "device": place.type, backend: metadata.version(backend)}
    if plan.rounding == "guided":
        codes = _guided_codes(run, source, plan, place)
        inputs["rounded"] = runs.checkpoint_hash(run.rounded.glob("*.safetensors"))
    saving = Saving(plan, backend, storage, place, codes)
    with runs.stage(run, "quantize", inputs, ["model"], force=force) as st:
        if st.finished:
            return run.model_dir
        made, report = make_checkpoint(run.partial / "quantize", source, saving, max_shard_size, overflow)
        st.record(**report)
        if run.model_dir.exists():  # two renames, so that no mixture is ever there
            shutil.rmtree(old := run.partial / "quantize" / "old", ignore_errors=True)
            os.replace(run.model_dir, old)
        os.replace(made, run.model_dir)
    return run.model_dir


def make_checkpoint(
    parts: Path, source: ModelSource, saving: Saving, max_shard_size: str, overflow: str
) -> tuple[Path, dict[str, Any]]:
    """Write and verify a checkpoint in a folder below `parts`; the folder, and what was found.

    It is saved in bfloat16 where float16 can't hold it. One tensor in bfloat16 or float32 among float16 ones
    is not possible, so one that overflows moves all. Stock loaders keep a quantized checkpoint's dtypes as
    saved, and then refuse to multiply a float16 activation by another dtype; a checkpoint without NF4 layers
    they cast to float16, where the value becomes infinite.
    """
    folder = parts / saving.storage / "model"
    try:
        with models.open_weights(source) as weights:
            shards, notes = plan_shards(folder, weights, saving, max_shard_size), {}
            for name in progress(list(shards), len(shards), "quantize"):
                note = folder.with_name(f"{name}.json")
                if not ((folder / name).exists() and note.exists()):
                    write_shard(folder / name, note, shards[name], weights, saving)
                notes[name] = runs.read_json(note, what="note on a shard", stage=runs.NOTEBOOKS["quantize"])
            write_companions(folder, source, weights, saving, notes)
            report = prove(folder, source, weights, saving, notes)
    except NotFinite as error:
        if overflow == "error" or saving.storage != "float16":
            raise
        print(f"quantize: {str(error).partition('. ')[0]}; written again in bfloat16", flush=True)
        shutil.rmtree(folder.parent)
        return make_checkpoint(parts, source, replace(saving, storage="bfloat16"), max_shard_size, overflow)
    return folder, report | {"saved_as": saving.storage}


# --- before anything is written --------------------------------------------------------------------------


def check_request(source: ModelSource, plan: ProtectionPlan, backend: str = "bitsandbytes") -> None:
    """Refuse what can't succeed: no package, another model's plan, unknown modules, foreign formats.

    Raises:
        CheckpointError: an unknown backend, or its package can't be imported.
        PlanError: the plan isn't for this model or this backend; which layers, and what to do.
    """
    if backend not in BACKENDS:
        raise CheckpointError(f"backend={backend!r}: expected one of {', '.join(BACKENDS)}.")
    try:
        import_module(backend.replace("-", "_"))
    except (ImportError, RuntimeError, OSError) as error:
        raise CheckpointError(
            f"{backend} can't be used here ({error}): `pip install {backend}`, then start the session again."
        ) from error
    if plan.model.get("sha256") != source.sha256:
        whose = f"The plan is for {plan.model.get('id')}, this is {source.id} with other weights"
        raise PlanError(f"{whose}: analyse and plan it.")
    check_writer(plan, backend)
    layers = models.list_layers(source)
    check_plan(plan, [layer.name for layer in layers])
    packs = backend == "compressed-tensors"
    for layer in layers:
        fmt = plan.formats.get(layer.name, "16bit")
        fault = None
        if fmt != "16bit" and not layer.quantizable:
            fault = "it is no plain linear layer of the text part"
        elif not formats.fits(fmt, layer.cols):
            fault = f"its {layer.cols} columns can't be split into groups"
        elif packs and (layer.role == "experts" or (layer.role == "conv1d" and fmt != "16bit")):
            fault = "transformers loads no Conv1D and no stack of experts from such a file"
        if fault:
            cure = "Give it another format, or choose another backend."
            if layer.role == "experts":
                cure = "Use backend='bitsandbytes', as preset='small' does."
            raise PlanError(f"{layer.name} can't be {fmt} in a {backend} checkpoint: {fault}. {cure}")


def auto_storage(source: ModelSource, place: torch.device) -> str:
    """float16 for a GPU that only emulates bfloat16, slowly; else the source's own."""
    emulated = place.type == "cuda" and models.resolve_dtype("auto", place) == torch.float16
    return "float16" if emulated else source.storage_dtype


def _check_target(run: Run, source: ModelSource) -> None:
    """An earlier checkpoint of the same model may be replaced; anything else in `model/` may not."""
    folder, plan = run.model_dir, run.model_dir / "plan.json"
    if "quantize" in runs.run_info(run)["stages"] or not any(folder.glob("*")):
        return
    owner = runs.read_json(plan, what="plan").get("model", {}) if plan.exists() else {}
    if owner.get("sha256") != source.sha256:
        whose = owner.get("id", "something that this stage did not write")
        raise CheckpointError(f"{folder} holds {whose}. Move it away, or choose another `run_dir`.")


def _guided_codes(run: Run, source: ModelSource, plan: ProtectionPlan, place: torch.device) -> Codes:
    """The codes that notebook 01 chose for this plan; what is missing is made here, and said."""
    codes, cols = Codes(run.rounded), {layer.name: layer.cols for layer in models.list_layers(source)}
    stored = {name: formats.stored_as(fmt, plan.double_quant) for name, fmt in plan.formats.items()}
    wanted = {(name, fmt) for name, fmt in stored.items() if guidable(fmt, cols[name])}
    if missing := sorted({fmt for _, fmt in wanted - set(codes)}):
        what = ", ".join(missing)
        print(f"quantize: no guided codes in {what} in this run yet; they are made now", flush=True)
        codes = make_codes(run, source, sorted({fmt for _, fmt in wanted}), device=str(place))
    return codes


# --- the shards ------------------------------------------------------------------------------------------


def plan_shards(folder: Path, weights: Weights, saving: Saving, max_shard_size: str) -> dict[str, list[str]]:
    """The names of the model's tensors for each file. The disk is judged before the first byte is written."""
    sizes, double = {}, saving.plan.double_quant
    for name, shape in weights.shapes.items():
        sizes[name] = math.prod(shape) * (4 if name in weights.keep else 2)
        if (fmt := saving.fmt(name)) != "16bit":
            sizes[name] = formats.layer_bytes(fmt, *shape, double_quant=double, dtype=saving.storage)
    shards = split(sizes, get_storage_size=int, filename_pattern=SHARDS, max_shard_size=max_shard_size)
    names = shards.filename_to_tensors
    folder.mkdir(parents=True, exist_ok=True)
    need = SPARE_DISK + sum(sizes.values()) - sum(f.stat().st_size for f in folder.glob("*.safetensors"))
    if (free := shutil.disk_usage(folder).free) < need:
        raise CheckpointError(
            f"{folder}: {need / 1e9:.2f} GB of disk are needed, {free / 1e9:.2f} GB are free. Free some, or "
            "choose another `run_dir`."
        )
    return names


def write_shard(path: Path, note: Path, names: Sequence[str], weights: Weights, saving: Saving) -> None:
    """Write one shard, atomically, and before it a note: its tensors' hashes and bytes.

    Raises:
        NotFinite: a weight is too large for the storage dtype.
        CheckpointError: the source holds NaN or infinity, or the backend's package reads other values than
            were meant.
    """
    tensors: dict[str, torch.Tensor] = {}
    conv1d, (parts_of, values_of, _) = conv1d_modules(weights.model), BACKENDS[saving.backend]
    for name in names:
        value = read_and_cast(name, weights, saving)
        module, fmt = name.removesuffix(".weight"), saving.fmt(name)
        if fmt == "16bit":
            # A stack of experts becomes one tensor an expert, as published checkpoints have it.
            made = _as_in_files(weights, name, value)
        else:
            weight = value.T.contiguous() if module in conv1d else value
            stored = formats.stored_as(fmt, saving.plan.double_quant)
            chosen = saving.codes.get((module, stored))
            if chosen is None:
                packed = formats.quantize(weight, stored)
            else:
                packed = formats.in_dtype(chosen, getattr(torch, saving.storage)).to(saving.device)
            parts = parts_of(packed)
            if not torch.equal(values_of(fmt, parts), formats.dequantize(packed, packed.dtype)):
                what = f"{saving.backend} reads {fmt} as other values than were meant for {name}"
                raise CheckpointError(f"{what}. Please report this with its version.")
            stem = file_stem(weights, module)
            made = {stem + part: tensor for part, tensor in parts.items()}
        tensors |= {part: tensor.cpu().contiguous() for part, tensor in made.items()}
    hashes = {name: tensor_hash(tensor) for name, tensor in tensors.items()}
    size = sum(tensor.nbytes for tensor in tensors.values())
    runs.write_json(note, {"bytes": size, "sha256": hashes})
    runs.write_tensors(path, tensors, format="pt")


def _as_in_files(weights: Weights, name: str, value: torch.Tensor) -> dict[str, torch.Tensor]:
    from transformers.core_model_loading import revert_weight_conversion

    return dict(revert_weight_conversion(weights.model, {name: value}))


def file_stem(weights: Weights, module: str) -> str:
    """How the files begin the names of a module's tensors: "model.layers.0.mlp.up_proj."."""
    name = f"{module}.weight"
    empty = torch.empty(weights.shapes[name], device="meta")
    return next(iter(_as_in_files(weights, name, empty))).removesuffix("weight")


def read_and_cast(name: str, weights: Weights, saving: Saving) -> torch.Tensor:
    """A source tensor on the device, in the dtype that it is saved in."""
    value = weights.read_source(name).to(saving.device)
    if not value.is_floating_point() or name in weights.keep:
        return value
    if not value.isfinite().all():
        what = f"{name} holds values that are NaN or infinite in the source model itself"
        raise CheckpointError(f"{what}: no dtype mends that. Fetch it again, or ask those who made it.")
    cast = value.to(getattr(torch, saving.storage))
    if over := int((~cast.isfinite()).sum()):
        what = f"{name}: {over} values are too large for {saving.storage}"
        raise NotFinite(f"{what}. Use overflow='keep_bf16' or storage_dtype='auto'.")
    return cast


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
        runs.write_json(folder / "model.safetensors.index.json", index)
    patterns = (*COMPANIONS, "*.py") if source.trust_remote_code else COMPANIONS
    package = Path(__file__).parent  # the script lies in it where it is installed, else beside it
    scripts = [*package.glob("examples/generate.py"), *package.parent.glob("examples/generate.py")]
    for path in {*(path for pattern in patterns for path in source.directory.glob(pattern)), *scripts[:1]}:
        if path.is_file():
            shutil.copyfile(path, folder / path.name)
    saving.plan.write(folder / "plan.json")
    config = copy.deepcopy(weights.model.config)
    config.architectures = [type(weights.model).__name__]
    config.dtype = getattr(torch, saving.storage)
    if set(saving.plan.formats.values()) - {"16bit"}:
        _, _, configure = BACKENDS[saving.backend]
        how = (saving.plan.double_quant, getattr(torch, saving.storage))
        config.quantization_config = configure(weights.model, saving.plan.formats, *how)
    config.save_pretrained(folder)


# --- proof from the disk ---------------------------------------------------------------------------------

PROOF_TEXT, PROOF_WINDOWS, PROOF_LENGTH = "pydoc", 4, 256  # what the fresh process reads, everywhere the same
LOGIT_TOLERANCE = 0.01  # share of the logits' standard deviation; equal bits leave only the kernels' rounding
MEMORY_FACTOR = 1.3  # a loaded model against its files
INTERPRETER = 1_500_000_000  # bytes of a process with transformers and bitsandbytes in it, and activations
FRESH_CHECK = Path(__file__).with_name("fresh_check.py")


def prove(
    folder: Path, source: ModelSource, weights: Weights, saving: Saving, notes: Mapping[str, Any]
) -> dict[str, Any]:
    """Prove that a checkpoint on the disk is what was planned; what was found, for run.json.

    Args:
        notes: on each of the files, with the hash of every tensor that was handed to it.

    Raises:
        NotFinite: loaded by stock transformers it computes infinities or NaN.
        CheckpointError: it isn't what was planned; says where.
    """
    check_bits(folder, {name: mark for note in notes.values() for name, mark in note["sha256"].items()})
    counts = dict(sorted(Counter(map(saving.fmt, weights.shapes)).items()))
    report: dict[str, Any] = check_size(folder, saving.plan.bytes["total"])
    report |= {"bits": counts | {"against": f"{saving.backend} and the source"}, "proof": None}
    planned = {name: fmt for name, fmt in saving.plan.formats.items() if fmt != "16bit"}
    nf4 = [layer for layer in models.list_layers(source) if planned.get(layer.name) == "nf4"]
    awkward = [layer.name for layer in nf4 if layer.rows % 32 or layer.cols % 64]
    load = fits_in_memory(folder, weights, saving)
    forward = load and not (awkward and saving.device.type == "cpu")
    windows: list[list[int]] = []
    if forward:
        config, tokenizer = weights.model.config, models.load_tokenizer(source)
        longest = getattr(config.get_text_config(), "max_position_embeddings", None) or PROOF_LENGTH
        size = (PROOF_WINDOWS, min(PROOF_LENGTH, longest), start_token(tokenizer, config))
        windows = make_windows(load_text(PROOF_TEXT), tokenizer, *size, config=config).tolist()
    request: dict[str, Any] = {
        "stems": {name: file_stem(weights, name) for name in planned},
        "windows": windows,
    }
    request |= {"model": str(folder.resolve()), "source": str(source.directory.resolve())}
    request |= {"trust": source.trust_remote_code, "threads": torch.get_num_threads()}
    answer = ask(request | {"device": str(saving.device), "load": load, "forward": forward})
    check_modules(answer, planned)
    if forward:
        shape = {"windows": len(windows), "length": len(windows[0]), "tokens": sum(map(len, windows))}
        proof = check_use(answer, saving.storage) | shape
        report["proof"] = proof | {"device": str(saving.device), "text": PROOF_TEXT, "start_token": size[2]}
    remarks = {
        "The model is too large to be loaded on this machine: classes were checked without weights (meta "
        "device), all bits by reading the files; logits were not compared.": not load,
        f"{len(awkward)} NF4 layers ({', '.join(awkward[:3])}) have rows that 32 or columns that 64 doesn't "
        "divide: bitsandbytes runs them on GPUs, but not on CPUs with AVX512-BF16, so logits were not "
        "compared on the CPU.": bool(awkward),
    }
    fresh = {key: value for key, value in answer.items() if key not in ("modules", "generation")}
    fresh |= {"loaded": load, "modules": len(answer["modules"])}
    report["fresh_process"] = fresh | {"notes": [text for text, holds in remarks.items() if holds]}
    return report


def check_size(folder: Path, planned: int) -> dict[str, Any]:
    """Compare the files' bytes with the plan's prediction.

    Raises:
        CheckpointError: they differ by more than `size_tolerance`.
    """
    size = disk_bytes(folder)
    if abs(size - planned) > formats.size_tolerance(planned):
        raise CheckpointError(
            f"{folder}: the weights take {size:,} bytes, the plan predicted {planned:,} "
            f"({size / planned - 1:+.2%}). The plan is for other layers: run notebook 02_visualize again."
        )
    return {"bytes": size, "bytes_planned": planned}


def check_bits(folder: Path, written: Mapping[str, str]) -> None:
    """Read every tensor back from the files and compare its hash with what was handed to them.

    Raises:
        CheckpointError: a file is cut or damaged; tensors that differ, are missing, or are too many.
    """
    files, found = saved_files(folder), {}
    with reading():
        for name in progress(list(files), len(files), "verify"):
            found[name] = tensor_hash(models.read_tensor(files[name][0], name))
    wrong = sorted(name for name in written.keys() | found.keys() if written.get(name) != found.get(name))
    if wrong:
        raise CheckpointError(
            f"{len(wrong)} of {len(written)} tensors on the disk differ from the source's: {wrong[:5]}. The "
            "disk or the memory is unreliable, or two runs wrote here at once: run it again with force=True."
        )


def fits_in_memory(folder: Path, weights: Weights, saving: Saving) -> bool:
    """Whether the checkpoint can be loaded and run here; compressed-tensors unpacks it to 16 bits."""
    size = 2 * sum(map(math.prod, weights.shapes.values()))  # the model to compare with
    if saving.backend == "compressed-tensors":  # unpacked to 16 bits beside the packed file
        size += disk_bytes(folder)
    free = psutil.virtual_memory().available
    if saving.device.type == "cuda":
        torch.cuda.empty_cache()  # what this process keeps is not free for another
        free = torch.cuda.mem_get_info(saving.device)[0]
    return MEMORY_FACTOR * size + INTERPRETER < free


def ask(request: Mapping[str, Any]) -> dict[str, Any]:
    """Put a request to fresh_check.py in a process of its own; CheckpointError if it can't answer."""
    with tempfile.TemporaryDirectory() as folder:
        question, answer = Path(folder) / "request.json", Path(folder) / "answer.json"
        question.write_text(json.dumps(request))
        # -P: the script's own folder, which is this package, must not be importable in there
        command = [sys.executable, "-P", str(FRESH_CHECK), str(question), str(answer)]
        environment = without_token(os.environ)
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        if done.returncode or not answer.exists():
            raise CheckpointError(
                f"{request['model']}: stock transformers can't load this checkpoint in a fresh process "
                f"(exit code {done.returncode}):\n{done.stderr[-2000:]}"
            )
        return json.loads(answer.read_text())


def check_modules(answer: Mapping[str, Any], planned: Mapping[str, str]) -> None:
    """Quantized modules are exactly the planned ones, in their formats; all others are plain."""
    rows = {name: formats.FORMATS[fmt] for name, fmt in planned.items()}
    wanted = {name: [row.bits, row.group, True] if row.bits else row.name for name, row in rows.items()}
    held = {name: how for name, how in answer["modules"].items() if name in wanted or how not in DTYPES}
    if held != wanted:
        wrong = sorted(name for name in held | wanted if held.get(name) != wanted.get(name))
        raise CheckpointError(
            f"Loaded by transformers {answer['transformers']}, {len(wrong)} modules are not in their planned "
            f"formats: {', '.join(f'{name} ({held.get(name)})' for name in wrong[:5])}."
        )
    if answer["spi_utils"]:
        raise CheckpointError("The fresh process had imported spi_utils, so its check proves nothing.")


def check_use(answer: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """Judge the fresh process' logits and its answer to the prompt; the proof that they are.

    Raises:
        NotFinite: logits that are not numbers, with the first module whose output isn't.
        CheckpointError: other logits than the in-memory model's; an empty answer.
    """
    said, loaded = answer.get("generation"), f"Loaded by transformers {answer['transformers']}"
    if said is None or not answer["finite"]:
        raise NotFinite(
            f"{loaded}, logits are not numbers: activations overflow {dtype}, first in "
            f"{answer.get('first_nonfinite')}. Save it with storage_dtype='bfloat16'; if it has that, "
            "check that the original model runs in it."
        )
    difference, spread = answer["max_logit_difference"], answer["logit_spread"]
    if not difference <= LOGIT_TOLERANCE * spread:
        raise CheckpointError(
            f"{loaded}, logits differ from the in-memory model's by {difference:.3g} (their spread is "
            f"{spread:.3g}), although all weights are equal. Please report this."
        )
    if not said["tokens"]:
        raise CheckpointError(
            f"{loaded}, the answer to a prompt is empty. See generation_config.json and tokenizer; if the "
            "16-bit model answers well, protect more layers."
        )
    return {"dtype": dtype, "transformers": answer["transformers"], "finite": True, "generation": said}


# --- what was found, in words ----------------------------------------------------------------------------


def proof_of(run: Run) -> str:
    """What verification found in the run's checkpoint, in lines.

    Raises:
        RunError: there is no checkpoint yet.
    """
    if (record := runs.run_info(run)["stages"].get("quantize")) is None:
        raise RunError(f"{run.path} holds no checkpoint yet: run notebook {runs.NOTEBOOKS['quantize']}.")
    fresh, off = record["fresh_process"], record["bytes"] / record["bytes_planned"] - 1
    bits = [f"{count} tensors in {fmt}" for fmt, count in record["bits"].items() if fmt != "against"]
    lines = [
        f"size on disk: {record['bytes'] / 1e9:.4f} GB, {off:+.3%} against the plan",
        f"bit-equal to {record['bits']['against']}: {', '.join(bits)}",
        f"fresh process: {fresh['modules']} modules as planned, largest logit difference "
        f"{fresh.get('max_logit_difference', 'not tried')}",
    ]
    return "\n".join([*lines, proof_by_use(record), *fresh["notes"]])


def proof_by_use(record: Mapping[str, Any]) -> str:
    """One line on how the checkpoint was used in a fresh process; `record` is run.json's stage "quantize"."""
    if (proof := record.get("proof")) is None:
        return "NOT proven by use: it could not be run here (see the notes), so it can't be published"
    where = f"transformers {proof['transformers']}, {proof['dtype']} on {proof['device']}"
    read = f"finite logits at all {proof['tokens']} tokens of {proof['text']}"
    return f"proven by use: {where}, {read}, answers {proof['generation']['text'][:60]!r}"
