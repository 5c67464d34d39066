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
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import yaml

from spi_utils import runs
from spi_utils.errors import ParameterError, PlanError, SPIError, suggest
from spi_utils.formats import FORMATS
from spi_utils.plan import DIRECTIONS, GROUPS, RULES, SCORES, TIERS, check_value
from spi_utils.platforms import ATTACHED
from spi_utils.presets import DEFAULT, PRESETS, for_all_stages, resolve
from spi_utils.progress import interactive
from spi_utils.runs import NOTEBOOKS, Run, run_info, sha256_file
from spi_utils.texts import CHAT, NAMES
from spi_utils.tokens import hub_token, with_token, without_token

ALL = "00_run_all"
STAGES = tuple(NOTEBOOKS.values())
LAB = "06_compactness_lab"  # has names of its own, and other meanings of `layers`, `windows` and `seed`
# The file by which a notebook's work is recognised.
_FILES = ("layers.csv", "plan.json", "model/config.json", "evaluation.json", "publish/manifest.json")
MADE = dict(zip(STAGES, _FILES, strict=True))


class NotebookError(SPIError):
    """A notebook failed; the message is the failing cell's own, with the executed copy's path."""


# --- the table of parameters -----------------------------------------------------------------------------

SWITCHES = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
NOTHING = ("null", "None", "none", "~")
SHARD = re.compile(r"\s*(?=[\d.]*[1-9])\d+(\.\d+)?\s*[KMGT]B\s*", re.IGNORECASE)
PACKAGES = {"bitsandbytes": "bitsandbytes", "compressed-tensors": "compressed_tensors"}  # backend: module
LARGEST_SEED = 2**32 - 1  # numpy's older generators take no more


@dataclass(frozen=True)
class Parameter:
    """One row: what a parameter may be.

    `kind` of one value (a float may be whole); `words` for what is expected, where `choices` don't say it. A
    value must be one of `choices`, if there are some, or else pass `check`, which returns something true, or
    raises an error that says what is wrong. `many`: "one" value, a "list", or "either"; a list has `least`
    entries or more. Where `optional`, None may stand for the default.
    """

    kind: type
    words: str = ""
    check: Callable[[Any], Any] | None = None
    choices: Collection[str] = ()
    many: str = "one"
    optional: bool = False
    least: int = 0


def is_hub_name(text: str) -> bool:
    """True of a name that a repository on the Hub may have; a ValueError says what is wrong with another."""
    from huggingface_hub.utils import validate_repo_id

    validate_repo_id(text)
    return True


def _run_dir(text: str) -> bool:
    path = Path(os.path.abspath(text))
    if text == "auto" or path.is_relative_to(ATTACHED):  # an attached run is copied
        return True
    there = next(one for one in (path, *path.parents) if os.path.lexists(one))
    return os.path.isdir(there) and os.access(there, os.W_OK | os.X_OK)


def _texts(text: str) -> bool:
    return all(part.strip() in (*NAMES, CHAT) or os.path.isfile(part.strip()) for part in text.split(","))


def _checkpoint(text: str) -> bool:
    return os.path.isdir(os.path.expanduser(text)) or is_hub_name(text)


SWITCH = Parameter(bool, "True or False")
COUNT = Parameter(int, "a whole number from 0", lambda n: n >= 0)
POSITIVE = Parameter(int, "a whole number from 1", lambda n: n >= 1)
LENGTH = Parameter(int, "a whole number from 2, or 0", lambda n: n == 0 or n >= 2)
SEED = Parameter(int, f"a whole number from 0 to {LARGEST_SEED}", lambda n: 0 <= n <= LARGEST_SEED)
TEXT = Parameter(str, "a text")
PATTERN = Parameter(str, "a regular expression", re.compile)
FILE = "or the path of a text file"
DEVICE = re.compile(r"auto|cpu|cuda(:\d+)?")

# Names that stand in modules with torch are repeated here; a test compares them.
TABLE: dict[str, Parameter] = {
    **dict.fromkeys(("force", "trust_remote_code", "include_embeddings"), SWITCH),
    "double_quant": replace(SWITCH, optional=True),
    **dict.fromkeys(("dry_run", "private"), SWITCH),
    **dict.fromkeys(("min_tail", "workers", "sensitivity_windows", "windows", "random_seeds"), COUNT),
    **dict.fromkeys(("sensitivity_length", "length"), LENGTH),
    **dict.fromkeys(("revision", "allow_license"), TEXT),
    **dict.fromkeys(("force_16bit", "forbid_16bit"), replace(PATTERN, many="either")),
    "model": Parameter(str, "a Hub id, a folder, a .gguf file, 'bundled' or 'auto'", str.strip),
    "preset": Parameter(str, choices=PRESETS),
    "run_dir": Parameter(str, "'auto', or a folder that can be written", _run_dir),
    "profile": Parameter(str, choices=("quick", "full")),
    "repo_id": Parameter(str, "'', 'name' or 'owner/name'", lambda name: not name or is_hub_name(name)),
    "device": Parameter(str, "'auto', 'cpu', 'cuda:0' or another 'cuda:N'", DEVICE.fullmatch),
    "dtype": Parameter(str, choices=("auto", "float32", "float16", "bfloat16")),
    "seed": SEED,
    "over_budget": Parameter(str, choices=("warn", "stop")),
    "layers": PATTERN,
    "cost_formats": Parameter(str, choices=FORMATS, many="list", optional=True),
    "sensitivity": Parameter(str, FILE, os.path.isfile, ("self", "random", "measured", "none", *NAMES)),
    "rounding": Parameter(str, choices=("guided", "nearest"), optional=True),
    "refine_at": Parameter(float, "a number between 4 and 16", lambda bits: 4 < bits < 16, many="list"),
    "score": Parameter(str, choices=SCORES, optional=True),
    "direction": Parameter(str, choices=DIRECTIONS, optional=True),
    "rule": Parameter(str, choices=RULES, optional=True),
    "value": Parameter(float, "a finite number", math.isfinite, optional=True),
    "backend": Parameter(str, choices=TIERS, optional=True),
    "formats": Parameter(str, choices=FORMATS, many="list", optional=True),
    "group": Parameter(str, choices=("auto", *filter(None, GROUPS)), optional=True),
    "max_shard_size": Parameter(str, "a size such as '2GB' or '500MB'", SHARD.fullmatch),
    "storage_dtype": Parameter(str, choices=("auto", "float16", "bfloat16")),
    "overflow": Parameter(str, choices=("keep_bf16", "error")),
    "texts": Parameter(str, FILE, _texts, (*NAMES, CHAT), "either", least=1),
    "rivals": Parameter(str, "a folder or a Hub id", _checkpoint, many="list"),
    "lm_eval_tasks": Parameter(str, "a task's name", str.strip, many="list"),
}
LAB_TABLE: dict[str, Parameter] = {
    **dict.fromkeys(("seeds", "depth", "windows", "layers"), POSITIVE),
    "run_dir": TABLE["run_dir"],
    "seed": SEED,
    "coefficient": Parameter(float, "a number above 0", lambda x: x > 0),
    "levels": Parameter(float, "a number above 0", lambda x: x > 0, many="list", least=1),
    "width": Parameter(int, "a multiple of 8", lambda width: width > 0 and width % 8 == 0),
}


def problem_of(name: str, value: Any, row: Parameter) -> str:
    """What is wrong with a parameter's value, and the nearest name; "" if it may be that."""
    fault = _fault(value, row)
    if fault is None:
        return ""
    expected = row.words
    if row.choices:
        expected = f"one of {', '.join(map(repr, row.choices))} {row.words}".rstrip()
    if row.many != "one":
        expected = f"a list, each of it {expected}" if row.many == "list" else f"{expected}, or such a list"
    said = f"{name}={value!r}: expected {expected}{', or None' * row.optional}"
    strangers = [str(one) for one in (value if isinstance(value, list | tuple) else [value])]
    hints = (suggest(one, row.choices) for one in strangers if one not in row.choices)
    return said + (f" ({fault})." if fault else ".") + next(filter(None, hints), "")


def _fault(value: Any, row: Parameter) -> str | None:
    """None for a value that may stand; else why not, or "" where the expectation says it all."""
    if value is None:
        return None if row.optional else ""
    if row.many != "one" and isinstance(value, list | tuple):
        one = replace(row, many="one", optional=False)
        faults = ((entry, _fault(entry, one)) for entry in value)
        bad = next((fault or f"{entry!r} is none" for entry, fault in faults if fault is not None), None)
        return bad if len(value) >= row.least else "it is empty"
    kinds = (int, float) if row.kind is float else row.kind
    if row.many == "list" or not isinstance(value, kinds) or isinstance(value, bool) != (row.kind is bool):
        return ""
    if value in row.choices or not (row.choices or row.check):
        return None
    try:
        return None if row.check and row.check(value) else ""
    except (ValueError, re.error) as error:
        return str(error)


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
    rule, backend = chosen.get("rule"), chosen.get("backend")
    if rule is not None and "value" in chosen:
        try:
            number = check_value(rule, chosen["value"])
        except PlanError as error:
            raise ParameterError(str(error)) from None
        low = number < 0 if rule in ("top_k", "max_kl") else number <= 0 and RULES[rule].unit
        if low or (rule == "top_k" and number % 1):
            needed = f"a number above 0 ({RULES[rule].title}; top_k: a whole one from 0; max_kl: from 0)"
            raise ParameterError(f"value={number!r}: expected {needed} for rule={rule!r}.")
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
    _check_names(given, dict.fromkeys(key for held in known.values() for key in held), ", ".join(names))
    for name, held in known.items():
        check_values({key: given.get(key, default) for key, default in held.items()}, name)


def _check_names(given: Iterable[str], known: Collection[str], what: str) -> None:
    for name in given:
        if name in known:
            continue
        owner = next((stage for stage in STAGES if name in parameters_of(stage)), "")
        hint = "." + (suggest(name, known, 0.6) or f" It has {', '.join(known)}.")
        if owner:
            hint = f": it is {owner}'s. Leave it out, or run that stage too."
        raise ParameterError(f"{what} has no parameter {name!r}{hint}")


def check_given(namespace: Mapping[str, Any], name: str) -> None:
    """Refuse values that a parameter can't have, and what plain papermill put in beside the parameters.

    A call in a notebook's first cell: a wrong value must not end a run after its analysis, and papermill runs
    a notebook with a misspelt parameter to the end, with the default. Variables of a user's own are their
    business.

    Args:
        namespace: the notebook's `globals()`.
        name: the notebook, e.g. "01_analyze".

    Raises:
        ParameterError: a value that can't be, or a stranger, with what is nearest.
    """
    known = parameters_of(name)
    check_values({key: namespace[key] for key in known if key in namespace}, name)
    if not interactive():
        injected = (cell for cell in namespace.get("In", ()) if cell.startswith("# Parameters"))
        _check_names(re.findall(r"^(\w+) = ", "\n".join(injected), re.MULTILINE), known, name)


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
    row = TABLE[name]
    return [_typed(one, row) for one in value] if isinstance(value, list) else _typed(value, row)


def from_command_line(name: str, text: str) -> Any:
    """What `-p NAME TEXT` means: a list in brackets, a text perhaps in quotes, all else by the table."""
    many = name in TABLE and TABLE[name].many != "one"
    if re.fullmatch(r"(['\"]).*\1", text) or (many and re.fullmatch(r"\[.*\]", text)):
        with contextlib.suppress(yaml.YAMLError):
            return coerce(name, yaml.load(text, Untyped))
    return coerce(name, text)


def _typed(value: Any, row: Parameter) -> Any:
    if not isinstance(value, str):
        return value
    if row.optional and value in NOTHING:
        return None
    if row.kind is bool:
        return SWITCHES.get(value.lower(), value)
    for read in () if row.kind is str else (int, float):
        with contextlib.suppress(ValueError):
            return read(value)
    return value


# --- the notebooks' files --------------------------------------------------------------------------------


def notebook_path(name: str) -> Path:
    """Where a notebook of this project lies: installed as package data, or beside the package.

    Raises:
        NotebookError: no such notebook.
    """
    package = Path(__file__).resolve().parent
    for folder in (package / "notebooks", package.parent / "notebooks"):
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

# Lines that say nothing to a reader: papermill's and the kernel's own, a debugging line that scipy's solver
# prints whatever its options say, and the repr of what only a page can show ("<pandas…", "VBox(children=…").
NOISE = re.compile(
    r"\s*$|<|Executing |Ending Cell|(In|Out)put Notebook:|Black is not|Working dir|\[IPKernelApp\]"
    r"|Failed to load CPU gemm_4bit_forward|HighsMipSolverData::"
    r"|[A-Z]\w*\((children|value|layout|options|description|outputs|max|min)="
)
FULL_DISK = "the disk is full. Free some space or choose another `run_dir`; the same call then goes on."
DEAD = "the kernel died, most likely out of memory. Use a smaller model, or fewer or shorter windows."
# What papermill prints where no cell could -> what it means.
ENDS = {"No space left on device": FULL_DISK, "Disk quota exceeded": FULL_DISK, "Kernel died": DEAD}


def execute(
    name: str, output: Path, parameters: Mapping[str, Any], *, show: Callable[[str], None] | None = None
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
        OSError: the folder of `output` can't be made.
        NotebookError: a cell failed, the kernel died (out of memory), or the disk is full.
    """
    check_settings(parameters, name)
    output.parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    code, log = _papermill(name, output, parameters, show)
    if code == 0:
        return time.monotonic() - started
    told = {sign: what for sign, what in ENDS.items() if sign in log}
    cause = _first_error(output) or next(
        iter(told.values()), f"papermill ended ({code}): {log.strip()[-500:]}"
    )
    raise NotebookError(f"{name} failed: {cause}\nThe executed notebook, up to the failing cell: {output}")


def _papermill(
    name: str, output: Path, parameters: Mapping[str, Any], show: Callable[[str], None] | None
) -> tuple[int, str]:
    """papermill's exit code, and the end of what it printed."""
    # 00_run_all downloads and hands on; the stages run the model, maybe with code of its own
    environment = (with_token if name in (ALL, "05_publish") else without_token)(os.environ)
    # the kernel must import this very package, also from a checkout that isn't installed
    search = [str(Path(__file__).resolve().parent.parent), os.environ.get("PYTHONPATH", "")]
    environment |= {"PYTHONPATH": os.pathsep.join(search), "PYDEVD_DISABLE_FILE_VALIDATION": "1"}
    command = [sys.executable, "-m", "papermill", str(notebook_path(name)), str(output), "--log-output"]
    with tempfile.NamedTemporaryFile("w", suffix=".yaml", encoding="utf-8") as file:
        yaml.safe_dump(dict(parameters), file)
        file.flush()
        command += ["--kernel", "python3", "--no-progress-bar", "--parameters_file", file.name]
        pipe: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "errors": "replace"}
        process = subprocess.Popen(command, env=environment, text=True, **pipe)
        lines: list[str] = []
        try:
            for line in process.stdout or ():
                lines = [*lines[-200:], line]
                if line.startswith("Traceback"):
                    show = None  # papermill's own; the failing cell's error is raised by name
                if show is not None and not NOISE.match(line):
                    show(line.rstrip())
            return process.wait(), "".join(lines)
        finally:
            if process.poll() is None:  # interrupted
                end_tree(process.pid)


def end_tree(pid: int) -> None:
    """End a process and all below it: a notebook's kernel has its own session, so its group isn't enough."""
    with contextlib.suppress(psutil.NoSuchProcess):
        parent = psutil.Process(pid)
        family = [parent, *parent.children(recursive=True)]
        for process in family:  # the parent first, so that it starts no more
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(family, timeout=5)


def _first_error(output: Path) -> str | None:
    with contextlib.suppress(OSError, ValueError):  # no copy yet, or a full disk or a kill has cut it
        for cell in json.loads(output.read_text(encoding="utf-8"))["cells"]:
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
    given = {**for_all_stages(parameters), "run_dir": str(run_dir)}
    took = {}
    for name in chosen:
        own = {key: given[key] for key in parameters_of(name) if key in given}
        took[name] = _run_stage(Run(run_dir), name, own, show or stage_line(name))
    return took


def _run_stage(run: Run, name: str, parameters: dict[str, Any], show: Show) -> float | None:
    output = run.notebooks / f"{name}.ipynb"
    # what the outcome depends on: parameters, the notebook's text, this code, and what earlier stages made
    earlier = [run.path / MADE[before] for before in STAGES[: STAGES.index(name)]]
    inputs = {
        "parameters": parameters,
        "notebook": sha256_file(notebook_path(name)),
        "code": runs.code_hash(),
        "earlier": [sha256_file(path) if path.exists() else None for path in earlier],
    }
    mark = runs.fingerprint(inputs)
    info: dict[str, Any] = run_info(run) if run.info_json.exists() else {"stages": {}}
    held, stage = info.get("notebooks", {}).get(name, {}), info["stages"].get(name.split("_", 1)[1])
    same = held.get("fingerprint") == mark and output.exists() and not parameters.get("force")
    if same and all(runs.is_intact(run, entry) for entry in (held, stage) if entry is not None):
        show(name, 0.0, "already done")
        return None
    started = time.monotonic()
    needed = _fetched(run, name, parameters)
    seconds = execute(name, output, needed, show=lambda line: show(name, time.monotonic() - started, line))
    made = runs.describe_files(run, [MADE[name]])
    record = {"fingerprint": mark, "outputs": made, "seconds": round(seconds, 1)}
    runs.update_info(run, lambda info: info.setdefault("notebooks", {}).update({name: record}))
    show(name, seconds, "done")
    return seconds


def _fetched(run: Run, name: str, parameters: dict[str, Any]) -> dict[str, Any]:
    """A stage's parameters, after what it needs from the Hub was downloaded: it is started without a token.

    01_analyze gets the very commit that was fetched; it could not ask for one where the model is private.
    """
    if name in ("02_visualize", "05_publish"):
        return parameters
    held = {"model": {"id": parameters.get("model", "auto"), "revision": parameters.get("revision")}}
    if name != "01_analyze" and run.info_json.exists():
        held = run_info(run)
    model, rivals = str(held.get("location", held["model"]["id"])), map(str, parameters.get("rivals") or ())
    absent = [x for x in (model, *rivals) if x != "bundled" and not Path(x).expanduser().exists()]
    if not absent or hub_token() is None:  # without a token the stage fetches as well as this process would
        return parameters
    from spi_utils.evaluate import find_rivals
    from spi_utils.models import chosen_model, download, is_hub_id

    commit = held["model"].get("revision") or None
    if model in absent and is_hub_id(chosen_model(model)):
        code = bool(parameters.get("trust_remote_code"))
        _, commit = download(chosen_model(model), commit, code=code)
    find_rivals([rival for rival in absent if rival != model and is_hub_id(rival)])
    return {**parameters, "revision": commit} if name == "01_analyze" and commit else parameters


def stage_line(name: str, every: float = 15.0) -> Show:
    """One progress line a stage: kept up to date where somebody watches; in a log, the first, the last and
    one every few seconds."""
    watched, last = interactive(), 0.0

    def show(name: str, seconds: float, line: str) -> None:
        nonlocal last
        ended = line in ("done", "already done")
        if watched or seconds == 0 or seconds - last >= every or ended:
            text = f"{name:13s} {seconds:5.0f} s   {line[:110]}"
            print(f"\r{text:133s}" if watched else text, end="\n" if ended or not watched else "", flush=True)
            last = seconds

    show(name, 0.0, "started")
    return show
