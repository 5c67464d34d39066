"""The notebooks without a person: parameters checked at the door, papermill, finished work recognised.

One table of parameters refuses a wrong name or value before any work, whoever asks: the first cell of a
notebook, the command line, a batch's grid. Then each notebook runs in a subprocess of its own, because
papermill's kernels leak memory into a long-lived parent. One that ran with the same parameters, code and
inputs, and whose files are untouched, is only recognised. No torch here: the command line answers at once.
"""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import yaml

from spi_utils import runs
from spi_utils.errors import ParameterError, PlanError, RunError, SPIError, suggest
from spi_utils.formats import FORMATS
from spi_utils.plan import DIRECTIONS, GROUPS, RULES, SCORES, TIERS, check_value
from spi_utils.platforms import ATTACHED
from spi_utils.presets import DEFAULT, PRESETS, resolve, with_own_windows
from spi_utils.progress import interactive
from spi_utils.runs import NOTEBOOKS, Run, is_intact, run_info, sha256_file, update_info
from spi_utils.texts import NAMES
from spi_utils.tokens import hub_token, with_token, without_token

ALL = "00_run_all"
STAGES = tuple(NOTEBOOKS.values())
LAB = "06_compactness_lab"  # has names of its own, and other meanings of `layers`, `windows` and `seed`
# The file by which a notebook's work is recognised.
MADE = {
    "01_analyze": "layers.csv",
    "02_visualize": "plan.json",
    "03_quantize": "model/config.json",
    "04_evaluate": "evaluation.json",
    "05_publish": "publish/manifest.json",
}


class NotebookError(SPIError):
    """A notebook failed; the message is the failing cell's own, with the executed copy's path.

    `exit_code` is papermill's: 1 for a failed cell, 138 for a kernel that died.
    """

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code if exit_code > 0 else 128 - exit_code  # as a shell tells a signal


# --- the table of parameters -----------------------------------------------------------------------------

KINDS: dict[str, tuple[Any, str]] = {
    "text": (str, "a text"),
    "whole": (int, "a whole number"),
    "number": ((int, float), "a number"),
    "switch": (bool, "True or False"),
}
SWITCHES = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
NOTHING = ("null", "None", "none", "~")
HUB_NAME = re.compile(r"\w([\w.-]*\w)?(/\w([\w.-]*\w)?)?", re.ASCII)
LONGEST_NAME = 96  # characters of `owner/name`, the Hub's limit
SHARD = re.compile(r"\s*\d+(\.\d+)?\s*[KMGT]B\s*", re.IGNORECASE)
PACKAGES = {"bitsandbytes": "bitsandbytes", "compressed-tensors": "compressed_tensors"}  # backend: module
LARGEST_SEED = 2**32 - 1  # numpy's older generators take no more


@dataclass(frozen=True)
class Parameter:
    """One row: what a parameter may be.

    `kind` of one value: "text", "whole", "number" or "switch". `many`: "one" value, a "list", or "either".
    `low` and `high` bound a number, `above` is a bound that it may not reach. A text must be one of
    `choices`, if there are some, or else pass `wrong`, which returns what is wrong with it, or nothing.
    `beside` may stand instead: 0 or None where that means the default. A list has `least` entries or more.
    `words` describe one value, where the rest doesn't say it.
    """

    kind: str
    many: str = "one"
    low: float = -math.inf
    high: float = math.inf
    above: float = -math.inf
    choices: Iterable[str] = ()
    wrong: Callable[[Any], str] | None = None
    beside: tuple[Any, ...] = ()
    least: int = 0
    words: str = ""


def _not_a_pattern(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        return f"as one it has an error: {error}"
    return ""


def _no_file(text: str) -> str:
    return "" if os.path.isfile(text) else f"there is no file {text!r}"


def _no_texts(text: str) -> str:
    parts = [part.strip() for part in text.split(",")]
    return next((_no_file(part) for part in parts if part not in NAMES and _no_file(part)), "")


def _no_checkpoint(text: str) -> str:
    if os.path.isdir(os.path.expanduser(text)) or HUB_NAME.fullmatch(text):
        return ""
    return f"there is no folder {text!r}"


def repository_problem(text: str) -> str:
    """What is wrong with a name for a repository on the Hub; "" where nothing is."""
    bad = [part for part in ("--", "..") if part in text]
    bad += [end for end in (".git", ".ipynb") if text.endswith(end)]
    if bad:
        return f"the Hub allows no {bad[0]!r} there"
    if len(text) > LONGEST_NAME:
        return f"it has {len(text)} characters, the Hub allows {LONGEST_NAME}"
    if HUB_NAME.fullmatch(text):
        return ""
    return "the Hub allows letters without accents, digits, '-', '_' and '.', none of '-' and '.' at an end"


def _no_run_dir(text: str) -> str:
    """Whether a run can be kept there: what exists of the path must be a folder that can be written."""
    path = Path(os.path.abspath(text))
    if text == "auto" or path.is_relative_to(ATTACHED):  # an attached run is copied
        return ""
    there = next((p for p in (path, *path.parents) if os.path.lexists(p)), path)
    if not os.path.isdir(there):
        return f"{there} is a file"
    return "" if os.access(there, os.W_OK | os.X_OK) else f"{there} can't be written"


def _no_size(text: str) -> str:
    return "" if SHARD.fullmatch(text) and float(re.split("[KMGTkmgt]", text)[0]) > 0 else "it is none"


def _no_device(text: str) -> str:
    return "" if re.fullmatch(r"cuda(:\d+)?", text) else "there is no such device"


def _empty(text: str) -> str:
    return "" if text.strip() else "it is empty"


SWITCH = Parameter("switch")
COUNT = Parameter("whole", low=0)
POSITIVE = Parameter("whole", low=1)
TEXT = Parameter("text")
PATTERN = Parameter("text", wrong=_not_a_pattern, words="a regular expression")
LENGTH = Parameter("whole", low=2, beside=(0,))
FORMAT_LIST = Parameter("text", "list", choices=FORMATS)
TEXT_NAME = "or the path of a text file"

# Names that stand in modules with torch are repeated here; a test compares them.
TABLE: dict[str, Parameter] = {
    "model": Parameter("text", wrong=_empty, words="a Hub id, a folder, a .gguf file, 'bundled' or 'auto'"),
    "run_dir": Parameter("text", wrong=_no_run_dir, words="'auto', or a folder that can be written"),
    "device": Parameter(
        "text", choices=("auto", "cpu", "cuda", "cuda:0"), wrong=_no_device, words="or another 'cuda:N'"
    ),
    "dtype": Parameter("text", choices=("auto", "float32", "float16", "bfloat16")),
    "seed": Parameter("whole", low=0, high=LARGEST_SEED),
    "force": SWITCH,
    "preset": Parameter("text", choices=PRESETS),
    # 00
    "over_budget": Parameter("text", choices=("warn", "stop")),
    # 01
    "revision": TEXT,
    "trust_remote_code": SWITCH,
    "layers": PATTERN,
    "min_tail": COUNT,
    "include_embeddings": SWITCH,
    "workers": COUNT,
    "cost_formats": FORMAT_LIST,
    "sensitivity": Parameter(
        "text", choices=("self", "random", "measured", "none", *NAMES), wrong=_no_file, words=TEXT_NAME
    ),
    "rounding": Parameter("text", choices=("guided", "nearest"), beside=(None,)),
    "sensitivity_windows": COUNT,
    "sensitivity_length": LENGTH,
    "refine_at": Parameter(
        "number",
        "list",
        wrong=lambda bits: "" if 4 < bits < 16 else f"{bits} is outside",
        words="a number of matrix bits between 4 and 16",
    ),
    # 02
    "score": Parameter("text", choices=SCORES, beside=(None,)),
    "direction": Parameter("text", choices=DIRECTIONS, beside=(None,)),
    "rule": Parameter("text", choices=RULES, beside=(None,)),
    "value": Parameter("number", beside=(None,)),
    "backend": Parameter("text", choices=TIERS, beside=(None,)),
    "formats": replace(FORMAT_LIST, beside=(None,)),
    "double_quant": SWITCH,
    "group": Parameter("text", choices=("auto", *filter(None, GROUPS)), beside=(None,)),
    "force_16bit": replace(PATTERN, many="either"),
    "forbid_16bit": replace(PATTERN, many="either"),
    # 03
    "max_shard_size": Parameter("text", wrong=_no_size, words="a size such as '2GB' or '500MB'"),
    "storage_dtype": Parameter("text", choices=("auto", "float16", "bfloat16")),
    "overflow": Parameter("text", choices=("keep_bf16", "error")),
    # 04
    "profile": Parameter("text", choices=("quick", "full")),
    "texts": Parameter("text", "either", choices=NAMES, wrong=_no_texts, least=1, words=TEXT_NAME),
    "windows": COUNT,
    "length": LENGTH,
    "random_seeds": COUNT,
    "rivals": Parameter("text", "list", wrong=_no_checkpoint, words="a folder or a Hub id"),
    "lm_eval_tasks": Parameter("text", "list", wrong=_empty, words="a task's name"),
    # 05
    "repo_id": Parameter("text", wrong=repository_problem, beside=("",), words="'name' or 'owner/name'"),
    "dry_run": SWITCH,
    "private": SWITCH,
    "allow_license": TEXT,
}
LAB_TABLE: dict[str, Parameter] = {
    "run_dir": TABLE["run_dir"],
    "seeds": POSITIVE,
    "coefficient": Parameter("number", above=0),
    "levels": Parameter("number", "list", above=0, least=1),
    "width": Parameter(
        "whole", low=8, wrong=lambda width: f"{width} isn't" if width % 8 else "", words="a multiple of 8"
    ),
    "depth": POSITIVE,
    "windows": POSITIVE,
    "layers": POSITIVE,
    "seed": TABLE["seed"],
}


def problem_of(name: str, value: Any, row: Parameter) -> str:
    """What is wrong with a parameter's value, in a sentence or two; nothing if it may be that."""
    fault = _fault(value, row)
    if fault is None:
        return ""
    expected = row.words or KINDS[row.kind][1]
    if row.choices:
        named = ", ".join(map(repr, row.choices))
        expected = f"one of {named}" + (f" {row.words}" if row.words else "")
    if row.above > -math.inf:
        expected += f" above {row.above:g}"
    if row.low > -math.inf:
        expected += f" from {row.low:g}" + (f" to {row.high:.0f}" if row.high < math.inf else "")
    if row.many == "one":
        expected += "".join(f", or {one!r}" for one in row.beside)
    else:
        expected = (
            f"a list, each of it {expected}" if row.many == "list" else f"{expected}, or a list of such"
        )
    reason = f" ({fault})" if fault else ""
    return f"{name}={value!r}: expected {expected}{reason}.{_hint(name, value, row)}"


def _fault(value: Any, row: Parameter) -> str | None:
    """None for a value that may stand; else why not, or "" where the expectation says it all."""
    if any(value is one or (type(value) is type(one) and value == one) for one in row.beside):
        return None
    if row.many == "one" or not isinstance(value, list | tuple):
        return "" if row.many == "list" else _fault_of_one(value, row)
    if len(value) < row.least:
        return "it is empty"
    faults = ((one, _fault_of_one(one, row)) for one in value)
    return next((fault or f"{one!r} is none" for one, fault in faults if fault is not None), None)


def _fault_of_one(value: Any, row: Parameter) -> str | None:
    right = isinstance(value, KINDS[row.kind][0]) and isinstance(value, bool) == (row.kind == "switch")
    if right and row.kind in ("whole", "number"):
        right = row.low <= value <= row.high and value > row.above
    if not right:
        return ""
    if value in row.choices:
        return None
    if row.wrong is None:
        return "" if row.choices else None
    return row.wrong(value) or None


def _hint(name: str, value: Any, row: Parameter) -> str:
    """The same value of the right kind, if that would do (a number out of its quotes, one value as a list),
    else the nearest name."""
    others: list[Any] = []
    if isinstance(value, list | tuple):
        others = [value[0]] if len(value) == 1 and row.many == "one" else []
    elif value is not None and value != "":
        typed = _typed(value, row) if isinstance(value, str) else str(value)
        others = [typed, [value], [typed]] if row.many != "one" else [typed]
    for other in others:
        if _fault(other, row) is None:
            return f" Write {name}={other!r}."
    strangers = (
        one for one in (value if isinstance(value, list | tuple) else [value]) if one not in row.choices
    )
    return next(filter(None, (suggest(one, row.choices) for one in strangers)), "")


# --- checking at the door --------------------------------------------------------------------------------


def check_values(values: Mapping[str, Any], notebook: str) -> None:
    """Refuse the first value that a notebook's parameter can't have; names that have no row are left alone.

    Raises:
        ParameterError: names the parameter, its value, what is expected, and the nearest that would do.
    """
    table = LAB_TABLE if notebook == LAB else TABLE
    for name, value in values.items():
        if name in table and (problem := problem_of(name, value, table[name])):
            raise ParameterError(problem)
    if notebook == LAB:
        return
    chosen = resolve(values.get("preset", DEFAULT), values)
    rule, value, backend = (chosen.get(name) for name in ("rule", "value", "backend"))
    if rule is not None and "value" in chosen:
        try:
            number = check_value(rule, value)
        except PlanError as error:
            raise ParameterError(str(error)) from None
        needed = ""
        if rule == "top_k" and (number < 0 or number % 1):
            needed = "a whole number of layers from 0"
        elif rule == "max_kl" and number < 0:
            needed = "0 or more nats a token"
        elif RULES[rule].unit and number <= 0:
            needed = f"more than 0 {RULES[rule].unit}"
        if needed:
            raise ParameterError(f"value={value!r}: expected {needed} for rule={rule!r}.")
    if backend in PACKAGES and importlib.util.find_spec(PACKAGES[backend]) is None:
        raise ParameterError(
            f"backend={backend!r} needs its package, which isn't installed here: run "
            f"`pip install {backend}` and start the session again; it needs no CUDA."
        )


def check_settings(given: Mapping[str, Any], *names: str) -> None:
    """Refuse parameters that none of these notebooks has, and values that theirs can't have.

    Raises:
        NotebookError: no such notebook.
        ParameterError: with what is nearest; a parameter of another stage alone would be without effect.
    """
    known = {name: parameters_of(name) for name in names}
    own = dict.fromkeys(parameter for held in known.values() for parameter in held)
    what = "The pipeline" if names == STAGES else f"{ALL}.ipynb" if names == (ALL,) else ", ".join(names)
    for parameter in given:
        _require_known(parameter, own, what)
    for name, held in known.items():
        check_values({key: given.get(key, default) for key, default in held.items()}, name)


def _require_known(name: str, known: Iterable[str], what: str) -> None:
    if name in known:
        return
    owner = next((stage for stage in STAGES if name in parameters_of(stage)), "")
    hint = "." + (suggest(name, known, 0.6) or f" It has {', '.join(known)}.")
    if owner:
        hint = f": it is {owner}'s. Leave it out, or run that stage too."
    raise ParameterError(f"{what} has no parameter {name!r}{hint}")


def check_given(namespace: Mapping[str, Any], name: str) -> None:
    """Refuse values that a parameter can't have, and what plain papermill put in beside the parameters.

    A call in a notebook's first cell: a wrong value must not end a run after its analysis, and papermill runs
    a notebook with a misspelt parameter to the end, with the default. Variables of a user's own are their
    business, except where nobody watches and one looks like a misspelt parameter.

    Args:
        namespace: the notebook's `globals()`.
        name: the notebook, e.g. "01_analyze".

    Raises:
        ParameterError: a value that can't be, or a stranger, with what is nearest.
    """
    known = parameters_of(name)
    check_values({key: namespace[key] for key in known if key in namespace}, name)
    if interactive():
        return
    injected = [
        cell for cell in namespace.get("In", ()) if str(cell).startswith("# Parameters")
    ]  # papermill's
    for key in re.findall(r"^(\w+) = ", "\n".join(injected), re.MULTILINE):
        _require_known(key, known, f"{name}.ipynb")
    values = str | int | float | list | dict | None
    for key, value in namespace.items():
        if key in known or key.startswith("_") or not isinstance(value, values):
            continue
        # a plural, a singular or a numbered one is a name of its own
        unlike = [one for one in known if one.rstrip("s0123456789_") != key.rstrip("s0123456789_")]
        if hint := suggest(key, unlike, 0.8):
            raise ParameterError(
                f"{name}.ipynb has no parameter {key!r}.{hint} If it is a variable of your own, give it "
                "another name."
            )


# --- texts from outside ----------------------------------------------------------------------------------


class Untyped(yaml.SafeLoader):
    """YAML whose plain scalars stay the texts that they are, null apart: the table knows their kinds."""


Untyped.yaml_implicit_resolvers = {
    first: kept
    for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
    if (kept := [(tag, rule) for tag, rule in known if tag.endswith((":null", ":merge"))])
}


def coerce(name: str, value: Any) -> Any:
    """A value that came as text, of the parameter's own kind: "1e-2" is a number only where one belongs.

    YAML would read `no` as False and `1.0` as a number also where a branch's name is meant. What can't be
    read so stays as it is, for `check_values` to refuse; so do values that are no texts.
    """
    if name not in TABLE:
        return value
    return (
        [_typed(one, TABLE[name]) for one in value] if isinstance(value, list) else _typed(value, TABLE[name])
    )


def from_command_line(name: str, text: str) -> Any:
    """What `-p NAME TEXT` means: a list in brackets, a text perhaps in quotes, all else by the table."""
    row = TABLE.get(name)
    lists = row is not None and not (row.kind == "text" and row.many == "one")
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    if quoted or (lists and text.startswith("[") and text.endswith("]")):
        with contextlib.suppress(yaml.YAMLError):
            return coerce(name, yaml.load(text, Untyped))
    return coerce(name, text)


def _typed(value: Any, row: Parameter) -> Any:
    if not isinstance(value, str):
        return value
    if None in row.beside and value in NOTHING:
        return None
    if row.kind == "switch":
        return SWITCHES.get(value.lower(), value)
    if row.kind == "text":
        return value
    for read in (int, float):
        with contextlib.suppress(ValueError):
            return read(value.replace(".inf", "inf").replace(".nan", "nan"))
    return value


# --- the notebooks' files --------------------------------------------------------------------------------


def notebook_path(name: str) -> Path:
    """Where a notebook of this project lies: beside the package, or installed as package data.

    Raises:
        NotebookError: no such notebook.
    """
    folders = [Path(__file__).resolve().parent.parent / "notebooks"]
    packaged = importlib.util.find_spec("spi_utils.notebooks")  # a folder of data, hence a namespace package
    if packaged is not None:
        folders += map(Path, packaged.submodule_search_locations or ())
    for folder in folders:
        if (folder / f"{name}.ipynb").exists():
            return folder / f"{name}.ipynb"
    raise NotebookError(f"there is no notebook {name!r}; there are {', '.join((ALL, *STAGES))}.")


def _parameter_cell(name: str) -> str:
    cells = json.loads(notebook_path(name).read_text(encoding="utf-8"))["cells"]
    return "".join(next(cell for cell in cells if "parameters" in cell["metadata"].get("tags", []))["source"])


def parameters_of(name: str) -> dict[str, Any]:
    """A notebook's parameters with their defaults, in the order in which it lists them."""
    return {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in ast.parse(_parameter_cell(name)).body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }


def parameters_help(name: str) -> str:
    """A notebook's parameters as its cell lists them: name, default and comment, below their headings."""
    lines = []
    for line in _parameter_cell(name).splitlines():
        setting = re.fullmatch(r"(\w+) = (.*?)  # (.*)", line)
        lines.append("  {:20s} {:10s} {}".format(*setting.groups()) if setting else line.lstrip("# "))
    return "\n".join(lines)


# --- running one -----------------------------------------------------------------------------------------

# Lines of papermill, the kernel and bitsandbytes' loader that say nothing to a reader.
NOT_THE_NOTEBOOKS = (
    "Executing ",
    "Ending Cell",
    "Input Notebook:",
    "Output Notebook:",
    "Black is not",
    "Working dir",
    "[IPKernelApp]",
    "Failed to load CPU gemm_4bit_forward",
    "HighsMipSolverData::",  # a debugging line that scipy's solver prints whatever its options say
    "<",  # the repr of a table or a picture that the executed copy shows
)
# A widget's repr: "VBox(children=(HBox(…", "FloatSlider(value=…"
WIDGET = re.compile(r"[A-Z]\w*\((children|value|layout|options|description|outputs|max|min)=")
PORT_COLLISIONS = ("Address already in use", "ZMQError", "Kernel didn't respond")
FULL_DISK = ("No space left on device", "Disk quota exceeded")


def execute(
    name: str,
    output: Path,
    parameters: Mapping[str, Any],
    *,
    show: Callable[[str], None] | None = None,
) -> float:
    """Execute one notebook with papermill in a subprocess and keep the executed copy.

    Args:
        name: e.g. "01_analyze".
        output: where the executed copy goes.
        parameters: checked against the notebook's.
        show: called with each line that the notebook prints, as it comes.

    Returns:
        seconds.

    Raises:
        ParameterError: an unknown name or a wrong value; nothing has run then.
        RunError: `output` can't be written.
        NotebookError: a cell failed, the kernel died (out of memory), or the disk is full.
    """
    check_settings(parameters, name)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(
            f"{output.parent} can't be made: {error.strerror}. Choose another `run_dir`, in a folder that "
            "can be written."
        ) from error
    started = time.monotonic()
    for _ in (1, 2):
        code, log = _papermill(name, output, parameters, show)
        if code == 0:
            return time.monotonic() - started
        if not any(sign in log for sign in PORT_COLLISIONS):
            break
    cause = _first_error(output)
    if cause is None and any(sign in log for sign in FULL_DISK):
        cause = (
            "the disk is full. Free some space, or choose another `run_dir`; the same call goes on where it "
            "stopped."
        )
    if cause is None and code in (138, -9, 137):
        cause = (
            "the kernel died, most likely out of memory. Use a smaller model, or fewer or shorter windows."
        )
    if cause is None:
        cause = f"papermill ended with exit code {code}: {log.strip()[-500:]}"
    raise NotebookError(
        f"{name} failed: {cause}\nThe executed notebook, up to the failing cell: {output}", code
    )


def _papermill(
    name: str, output: Path, parameters: Mapping[str, Any], show: Callable[[str], None] | None
) -> tuple[int, str]:
    """papermill's exit code, and the end of what it printed."""
    # 00_run_all downloads and hands on; the stages run the model, maybe with code of its own
    passed = with_token if name in (ALL, "05_publish") else without_token
    # the kernel must import this very package, also from a checkout that isn't installed
    search = [str(Path(__file__).resolve().parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {"PYTHONPATH": os.pathsep.join(search), "PYDEVD_DISABLE_FILE_VALIDATION": "1"}
    with tempfile.NamedTemporaryFile("w", suffix=".yaml", encoding="utf-8") as file:
        yaml.safe_dump(dict(parameters), file)
        file.flush()
        command = [sys.executable, "-m", "papermill", str(notebook_path(name)), str(output)]
        command += ["--kernel", "python3", "--parameters_file", file.name]
        process = subprocess.Popen(
            [*command, "--log-output", "--no-progress-bar"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=passed(os.environ) | environment,
            errors="replace",
        )
        assert process.stdout is not None
        lines: list[str] = []
        try:
            for line in process.stdout:
                lines = [*lines[-200:], line]
                if line.startswith("Traceback"):
                    show = None  # papermill's own; the failing cell's error is raised by name
                if show is not None and is_for_readers(line):
                    show(line.rstrip())
            return process.wait(), "".join(lines)
        finally:
            if process.poll() is None:  # interrupted
                end_tree(process.pid)


def is_for_readers(line: str) -> bool:
    """Whether a line of papermill's log says something: not the repr of what only a page can show."""
    return bool(line.strip()) and not line.startswith(NOT_THE_NOTEBOOKS) and not WIDGET.match(line)


def end_tree(pid: int) -> None:
    """End a process and all below it: a notebook's kernel has its own session, so its group isn't enough."""
    try:
        parent = psutil.Process(pid)
        family = [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for process in family:  # the parent first, so that it starts no more
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(family, timeout=5)


def _first_error(output: Path) -> str | None:
    try:
        cells = json.loads(output.read_text(encoding="utf-8"))["cells"]
    except (OSError, ValueError):  # none yet, or a full disk or a kill has cut it
        return None
    for cell in cells:
        for item in cell.get("outputs", []):
            if item["output_type"] == "error":
                return f"{item['ename']}: {item['evalue']}"
    return None


# --- all stages ------------------------------------------------------------------------------------------

Show = Callable[[str, float, str], None]


def run_stages(
    run_dir: Path,
    parameters: Mapping[str, Any],
    *,
    only: Iterable[str] | None = None,
    show: Show | None = None,
) -> dict[str, float | None]:
    """Execute notebooks 01…05 on one run directory; stages that are done and unchanged are only recognised.

    Args:
        run_dir: the run directory; `parameters["run_dir"]` is set to it.
        parameters: of all stages together; each notebook gets those that it has.
        only: some of the stages; None is all. Those that come before must have been run. `parameters` are
            theirs alone then.
        show: called with (notebook, seconds so far, line) for each line a notebook prints; None shows one
            progress line a stage.

    Returns:
        notebook -> seconds; None for one that was only recognised.

    Raises:
        ParameterError: a name that none of these stages has, or a value that it can't have.
        NotebookError: the first stage that fails, or there is no such stage.
    """
    chosen = STAGES if only is None else tuple(sorted(only))
    check_settings(parameters, *chosen)
    parameters = with_own_windows(parameters)
    took = {}
    for name in chosen:
        known = parameters_of(name)
        own = {key: value for key, value in parameters.items() if key in known}
        took[name] = _run_stage(Run(run_dir), name, own | {"run_dir": str(run_dir)}, show or stage_line(name))
    return took


def _run_stage(run: Run, name: str, parameters: dict[str, Any], show: Show) -> float | None:
    output, mark = run.notebooks / f"{name}.ipynb", _mark(run, name, parameters)
    if not parameters.get("force") and output.exists() and _is_done(run, name, mark):
        show(name, 0.0, "already done")
        return None
    started = time.monotonic()
    needed = _fetched(run, name, parameters)
    seconds = execute(name, output, needed, show=lambda line: show(name, time.monotonic() - started, line))
    made = runs.describe_files(run, [MADE[name]])
    record = {"fingerprint": mark, "outputs": made, "seconds": round(seconds, 1)}
    update_info(run, lambda info: info.setdefault("notebooks", {}).update({name: record}))
    show(name, seconds, "done")
    return seconds


def _mark(run: Run, name: str, parameters: Mapping[str, Any]) -> str:
    """What a notebook's outcome depends on: parameters, its text, this code, and what earlier stages made."""
    earlier = [run.path / MADE[before] for before in STAGES[: STAGES.index(name)]]
    hashes = [sha256_file(path) if path.exists() else None for path in earlier]
    own = sha256_file(notebook_path(name))
    return runs.fingerprint(
        {"parameters": parameters, "notebook": own, "code": runs.code_hash(), "earlier": hashes}
    )


def _is_done(run: Run, name: str, mark: str) -> bool:
    """The notebook ran with the same mark, and what it and its stage made is still there, untouched."""
    if not run.info_json.exists():
        return False
    info = run_info(run)
    held, stage = info.get("notebooks", {}).get(name, {}), info["stages"].get(name.split("_", 1)[1])
    return held.get("fingerprint") == mark and all(
        is_intact(run, one) for one in (held, stage) if one is not None
    )


def _fetched(run: Run, name: str, parameters: dict[str, Any]) -> dict[str, Any]:
    """A stage's parameters, after what it needs from the Hub was downloaded: it is started without a token.

    01_analyze gets the very commit that was fetched; it could not ask for one where the model is private.
    """
    if name not in ("01_analyze", "03_quantize", "04_evaluate"):
        return parameters
    held: dict[str, Any] = {"model": {"id": parameters.get("model", "auto")}}
    if name != "01_analyze" and run.info_json.exists():
        held = run_info(run)
    model = str(held.get("location", held["model"]["id"]))
    rivals = [str(rival) for rival in parameters.get("rivals") or ()]
    here = all(one == "bundled" or Path(one).expanduser().exists() for one in (model, *rivals))
    if here or hub_token() is None:  # without a token the stage fetches as well as this process would
        return parameters
    from spi_utils.evaluate import find_rivals
    from spi_utils.models import chosen_model, download, is_hub_id

    commit = held["model"].get("revision") or parameters.get("revision") or None
    if is_hub_id(chosen_model(model)):
        code = bool(parameters.get("trust_remote_code"))
        _, commit = download(chosen_model(model), commit, code=code)
    find_rivals([rival for rival in rivals if is_hub_id(rival)])
    return {**parameters, "revision": commit} if name == "01_analyze" and commit else parameters


def stage_line(name: str, every: float = 15.0) -> Show:
    """One progress line a stage: kept up to date where somebody watches; in a log, the first, the last and
    one every few seconds."""
    handle, last = None, 0.0
    if interactive():
        from IPython.display import display

        handle = display({"text/plain": ""}, raw=True, display_id=True)

    def show(name: str, seconds: float, line: str) -> None:
        nonlocal last
        text = f"{name:13s} {seconds:5.0f} s   {line[:110]}"
        if handle is not None:
            handle.update({"text/plain": text}, raw=True)
        elif seconds == 0 or seconds - last >= every or line in ("done", "already done"):
            print(text, flush=True)
            last = seconds

    show(name, 0.0, "started")
    return show
