"""What has to be true of a run before it may be published, checked from its files.

Each gate reads what is on the disk now, not what a stage once said: a file that was changed, or made from
another plan, closes it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from spi_utils.errors import CheckpointError, RunError
from spi_utils.formats import size_tolerance
from spi_utils.hub.licences import Licence
from spi_utils.runs import (
    NOTEBOOKS,
    Run,
    checkpoint_hash,
    read_json,
    run_info,
    sha256_file,
)

BEFORE_PUBLISH = ("analyze", "quantize", "evaluate")  # the plan has a gate of its own
CHECKPOINT_FILES = ("config.json", "tokenizer_config.json", "generate.py")
HEADER_LIMIT = 100_000_000  # bytes, the safetensors format's own
WEIGHT_TYPES = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".onnx", ".h5", ".msgpack"}
MEASURED = ("layers.csv", "evaluation.json", "model/")  # a slider or a later stage may redo the others
SECRET = re.compile(r"hf_[A-Za-z0-9]{30,}|gh[pousr]_[A-Za-z0-9]{30,}|sk-[A-Za-z0-9_-]{30,}")
# Absolute paths as people's machines and hosted notebooks have them, no part of a web address.
LOCAL_PATH = re.compile(
    r"(?<![\w.:/~<-])/(home|Users|root|tmp|var|mnt|media|opt|scratch|srv|workspace|Volumes|content|kaggle)"
    r"/[^\s\"'<>)]+|(?<![A-Za-z])[A-Za-z]:(\\\\?|/)Users[\\/][^\s\"'<>)]+"
)
# What travels along from the base's own folder.
OF_THE_BASE = re.compile(
    r"(tokenizer|vocab|merges|special_tokens|added_tokens|chat_template|preprocessor|processor|video_|LICEN[CS]E|"
    r"NOTICE|USE_POLICY|.*\.(tiktoken|model|safetensors)$|(?!generate).*\.py$).*",
    re.DOTALL,
)
# Tensors that only a quantized module has beside its weight (bitsandbytes; compressed-tensors).
QUANTIZED = re.compile(r"^(?P<module>.+)\.weight(\.absmax|\.SCB|_packed|_scale)$")


@dataclass(frozen=True)
class Gate:
    """One condition: its name, whether it is met, and what was found (and what to do where it is not).

    `warning`: it is met, with something that whoever publishes should know.
    """

    name: str
    passed: bool
    found: str
    warning: bool = False

    def __str__(self) -> str:
        word = "BLOCKED" if not self.passed else "WARNING" if self.warning else "ok     "
        return f"{word} {self.name}: {self.found}"


def check_gates(run: Run, files: Mapping[str, Path], licence: Licence) -> tuple[Gate, ...]:
    """All gates, in the order in which a person would mend them."""
    gates = (
        _stages(run),
        _complete(run),
        _planned(run),
        _evaluated(run),
        _proven(run),
        _scored(run),
        _size(run),
        _licensed(licence),
        _clean(files),
        _placeless(run, files),
    )
    # what a reader of a damaged file says names the file in full
    return tuple(replace(gate, found=gate.found.replace(f"{run.path}/", "")) for gate in gates)


def weight_files(model_dir: Path) -> list[Path]:
    """The safetensors files of a checkpoint, in name order; hidden ones are unfinished, and nobody's."""
    return sorted(path for path in model_dir.glob("*.safetensors") if not path.name.startswith("."))


def _stages(run: Run) -> Gate:
    """Every stage before publishing has finished, and what it measured or made stands unchanged."""
    stages = run_info(run)["stages"]
    for name in BEFORE_PUBLISH:
        if name not in stages:
            return Gate("stages", False, f"{name} has not finished; run notebook {NOTEBOOKS[name]}")
        for path, held in stages[name].get("outputs", {}).items():
            if path.startswith(MEASURED) and not _unchanged(run.path / path, held):
                again = f"run notebook {NOTEBOOKS[name]} again"
                return Gate("stages", False, f"{path} is not what {name} wrote; {again}")
    recorded = stages["quantize"].get("outputs", {})
    strangers = [name for name in _weights_of_any_kind(run) if name not in recorded]
    if strangers:
        found = f"{strangers[0]} was not written by quantize; remove it, or run notebook 03_quantize again"
        return Gate("stages", False, found)
    return Gate("stages", True, ", ".join(BEFORE_PUBLISH) + " finished, their files unchanged")


def _weights_of_any_kind(run: Run) -> list[str]:
    """Files below model/ that a loader would take weights from, as run.json names them."""
    files = (path.relative_to(run.path) for path in run.model_dir.rglob("*") if path.is_file())
    seen = (name for name in files if not any(part.startswith(".") for part in name.parts))
    return sorted(name.as_posix() for name in seen if name.suffix in WEIGHT_TYPES)


def _unchanged(path: Path, held: Mapping[str, Any]) -> bool:
    """The file is there, byte for byte."""
    return path.is_file() and sha256_file(path) == held["sha256"]


def _complete(run: Run) -> Gate:
    missing = [name for name in CHECKPOINT_FILES if not (run.model_dir / name).is_file()]
    if missing or not weight_files(run.model_dir):
        what = ", ".join(missing) or "*.safetensors"
        return Gate("checkpoint", False, f"model/ lacks {what}; run notebook {NOTEBOOKS['quantize']}")
    return Gate(
        "checkpoint", True, f"{len(weight_files(run.model_dir))} weight file(s), tokenizer, generate.py"
    )


def _planned(run: Run) -> Gate:
    """The quantized modules, read from the files' headers, are exactly the plan's."""
    plan = _read(run.plan_json)
    if plan is None:
        return Gate("plan", False, f"no readable plan.json; run notebook {NOTEBOOKS['visualize']}")
    planned = {_short(name) for name, form in plan["formats"].items() if form != "16bit"}
    try:
        held = {_short(name) for name in quantized_modules(run.model_dir)}
    except CheckpointError as error:
        return Gate("plan", False, f"{error} Run notebook {NOTEBOOKS['quantize']} again")
    if planned != held:
        example = sorted(planned ^ held)[0]
        return Gate(
            "plan",
            False,
            f"{len(planned ^ held)} modules differ between plan.json and model/, the first {example}; "
            f"run notebook {NOTEBOOKS['quantize']} again",
        )
    return Gate("plan", True, f"{len(held)} modules quantized and {len(plan['protected'])} kept, as planned")


def _short(name: str) -> str:
    """A module's name without the prefixes that files and models of multimodal checkpoints order differently
    ("language_model.model.layers…", "model.language_model.layers…")."""
    return re.sub(r"(^|\.)language_model\.", r"\1", name).removeprefix("model.")


def quantized_modules(model_dir: Path) -> set[str]:
    """Names of the modules whose weights are stored quantized, from the safetensors headers alone.

    Raises:
        CheckpointError: a file is truncated or no safetensors file.
    """
    from spi_utils.checkpoint import saved_files

    names = saved_files(model_dir)
    return {found["module"] for found in map(QUANTIZED.match, names) if found}


def _evaluated(run: Run) -> Gate:
    """The evaluation names the hashes of the checkpoint and the plan that lie here now."""
    evaluation = _read(run.evaluation_json)
    again = f"run notebook {NOTEBOOKS['evaluate']}"
    if evaluation is None:
        return Gate("evaluation", False, f"no readable evaluation.json; {again}")
    own = checkpoint_hash(weight_files(run.model_dir))
    hashes = {"checkpoint": own, **(evaluation.get("hashes") or {})}
    for held in (str(evaluation.get("checkpoint_sha256")), hashes["checkpoint"]):
        if held != own:
            found = f"it is of checkpoint {held[:12]}, model/ holds {own[:12]}; {again}"
            return Gate("evaluation", False, found)
    if not run.plan_json.is_file() or hashes.get("plan") != sha256_file(run.plan_json):
        return Gate("evaluation", False, f"plan.json changed after it; {again}")
    return Gate("evaluation", True, f"of this very checkpoint, {own[:12]}")


def _proven(run: Run) -> Gate:
    """A fresh process has used the checkpoint as its readers will (notebook 03)."""
    proof = run_info(run)["stages"].get("quantize", {}).get("proof")
    if not proof or not proof.get("finite") or "generation" not in proof:
        again = f"run notebook {NOTEBOOKS['quantize']} on a machine that can load the checkpoint"
        return Gate("proof by use", False, f"no fresh process has run text through this checkpoint; {again}")
    found = f"{proof['tokens']} tokens of {proof['text']} in {proof['dtype']}, and an answer to a prompt"
    return Gate("proof by use", True, found)


def _scored(run: Run) -> Gate:
    """The model as loaded gave the numbers that its file's tensors gave (notebook 04)."""
    name, again = "stock score", f"run notebook {NOTEBOOKS['evaluate']} again"
    stock = (_read(run.evaluation_json) or {}).get("stock")
    if not isinstance(stock, dict) or "agrees" not in stock:
        found = f"the checkpoint was not scored as stock transformers load it; {again}"
        return Gate(name, False, found)
    if stock["agrees"] is None and stock.get("reason"):
        return Gate(name, True, f"not scored as loaded: {stock['reason']}", warning=True)
    loaded, file, tolerance = (_number(stock.get(key)) for key in ("kl", "kl_file", "tolerance"))
    found = f"KL {loaded:.4f} as loaded, {file:.4f} in float32 from the file, allowed is ±{tolerance:.4f}"
    if stock["agrees"] is not True or not abs(loaded - file) <= tolerance:  # NaN too
        return Gate(name, False, f"{found}; {again}")
    return Gate(name, True, found)


def _number(value: object) -> float:
    """A record's number; NaN, which no comparison passes, where there is none."""
    return float(value) if isinstance(value, int | float) else math.nan


def _size(run: Run) -> Gate:
    plan, size = _read(run.plan_json), sum(path.stat().st_size for path in weight_files(run.model_dir))
    if plan is None:
        return Gate("size", False, f"no readable plan.json; run notebook {NOTEBOOKS['visualize']}")
    planned = plan["bytes"]["total"]
    found = f"{size:,} bytes on disk, {planned:,} planned ({size / planned - 1:+.2%})"
    allowed = size_tolerance(planned)
    if abs(size - planned) > allowed:
        return Gate("size", False, f"{found}; allowed is ±{allowed:,} bytes; quantize again")
    return Gate("size", True, found)


def _licensed(licence: Licence) -> Gate:
    if licence.usable:
        return Gate("licence", True, f"{licence.id}, {licence.found}")
    why = "forbids passing on changed weights" if licence.forbids else "is unknown"
    advice = (
        "if you know that you may publish, pass allow_license='<its id>' (the card will say that you did)"
    )
    return Gate("licence", False, f"the base's licence {why} ({licence.id or licence.found}); {advice}")


def _clean(files: Mapping[str, Path]) -> Gate:
    """No file holds something that looks like a secret."""
    for name, path in files.items():
        if SECRET.search(_searchable(path)):
            return Gate("secrets", False, f"{name} holds what looks like an access token; remove it")
    return Gate("secrets", True, f"none found in {len(files)} files (of the weights, in their headers)")


def _placeless(run: Run, files: Mapping[str, Path]) -> Gate:
    """No file names a folder of this machine.

    Files that came with the base are searched for the run's and the base's own folders only: a vocabulary
    may hold words like "/home/".
    """
    location = str(run_info(run).get("location", ""))
    folders = {str(run.path.resolve()), str(run.path.absolute()), str(Path.home()), location}
    known = [folder for folder in folders if Path(folder).is_absolute() and len(Path(folder).parts) > 2]
    for name, path in files.items():
        text = _searchable(path)
        places = [text.find(folder) for folder in known if folder in text]
        if not places and not OF_THE_BASE.fullmatch(name) and (match := LOCAL_PATH.search(text)):
            places = [match.start()]
        if places:
            line = text.count("\n", 0, min(places)) + 1
            found = (
                f"line {line} of {name} names a folder of some machine"  # the manifest must not name it too
            )
            return Gate("local paths", False, f"{found}; make the file again without it")
    return Gate("local paths", True, f"none found in {len(files)} files")


def _searchable(path: Path) -> str:
    """A file's bytes as text, whatever it is called; of a safetensors file the header."""
    with path.open("rb") as file:
        if path.suffix == ".safetensors":
            return file.read(8 + int.from_bytes(file.read(8), "little") % HEADER_LIMIT).decode("latin-1")
        return file.read().decode("utf-8", errors="replace")


def _read(path: Path) -> dict[str, Any] | None:
    """A JSON file of the run, or None where there is none that can be read: the gate says so."""
    try:
        return read_json(path)
    except RunError:
        return None
