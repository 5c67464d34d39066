"""Running the notebooks without a person: papermill in a subprocess each, with errors a person can read.

One subprocess a notebook, because papermill's kernels leak memory into a long-lived parent. Names and values
of parameters are checked before anything runs: papermill itself only logs the names that it doesn't know.
"""

from __future__ import annotations

import ast
import difflib
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
import yaml

from spi_utils.batches.worker import end_tree
from spi_utils.errors import ParameterError, RunError, SPIError
from spi_utils.hub.tokens import hub_token, with_token, without_token
from spi_utils.parameters import check_values
from spi_utils.progress import interactive
from spi_utils.runs import Run, code_hash, fingerprint, is_intact, run_info, sha256_file, update_info

STAGES = ("01_analyze", "02_visualize", "03_quantize", "04_evaluate", "05_publish")
ALL = "00_run_all"
# The file by which a notebook's work is recognised.
MADE = {
    "01_analyze": "layers.csv",
    "02_visualize": "plan.json",
    "03_quantize": "model/config.json",
    "04_evaluate": "evaluation.json",
    "05_publish": "publish/manifest.json",
}
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
INJECTED = "# Parameters"  # how papermill begins the cell that it injects
NEAR = 0.8  # similarity from which a variable is taken for a misspelt parameter
Show = Callable[[str, float, str], None]


class NotebookError(SPIError):
    """A notebook failed; the message is the failing cell's own, with the executed copy's path.

    `exit_code` is papermill's: 1 for a failed cell, 138 for a kernel that died.
    """

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code if exit_code > 0 else 128 - exit_code  # as a shell tells a signal


@dataclass(frozen=True)
class Execution:
    """One executed notebook: where its copy is, and how long it took (0 when it was recognised as done)."""

    name: str
    path: Path
    seconds: float
    skipped: bool


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


def parameters_of(name: str) -> dict[str, Any]:
    """A notebook's parameters with their defaults, in the order in which it lists them."""
    notebook = nbformat.read(notebook_path(name), as_version=4)
    cell = next(c for c in notebook.cells if "parameters" in c.metadata.get("tags", []))
    assignments = [
        node for node in ast.parse(cell.source).body if isinstance(node, ast.Assign | ast.AnnAssign)
    ]
    found = {}
    for node in assignments:
        target = node.targets[0] if isinstance(node, ast.Assign) else node.target
        if isinstance(target, ast.Name) and node.value is not None:
            found[target.id] = ast.literal_eval(node.value)
    return found


def check_parameters(given: Iterable[str], known: Iterable[str], what: str) -> None:
    """Refuse names that a notebook doesn't have.

    Raises:
        ParameterError: names the stranger and the nearest known name.
    """
    known = list(known)
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else f" It has {', '.join(known)}."
            raise ParameterError(f"{what} has no parameter {name!r}.{hint}")


def check_settings(given: Mapping[str, Any], name: str) -> None:
    """Refuse parameters that a notebook doesn't have, and values that they can't have; ParameterError."""
    known = parameters_of(name)
    check_parameters(given, known, f"{name}.ipynb")
    check_values({**known, **given}, name)


def check_stages(given: Mapping[str, Any], stages: Iterable[str]) -> None:
    """Refuse what these stages don't have, and values that theirs can't have.

    Raises:
        NotebookError: no such stage.
        ParameterError: a parameter of another stage would be without effect, and is refused like a wrong one.
    """
    stages = tuple(stages)
    for name in stages:
        if name not in STAGES:
            raise NotebookError(f"there is no stage {name!r}; there are {', '.join(STAGES)}.")
    known = {name: parameters_of(name) for name in STAGES}
    own = dict.fromkeys(parameter for name in stages for parameter in known[name])
    what = "The pipeline" if len(stages) == len(STAGES) else ", ".join(stages)
    for parameter in given:
        others = [name for name in STAGES if parameter in known[name]]
        if parameter not in own and others:
            raise ParameterError(
                f"{what} has no parameter {parameter!r}: it is {others[0]}'s. "
                "Leave it out, or run that stage too."
            )
    check_parameters(given, own, what)
    for name in stages:
        check_values({key: given.get(key, default) for key, default in known[name].items()}, name)


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
    check_parameters(_injected(namespace), known, f"{name}.ipynb")
    values = str | int | float | list | dict | None
    own = [key for key, value in namespace.items() if isinstance(value, values) and not key.startswith("_")]
    for key in own:
        near = _misspelt(key, known)
        if near:
            raise ParameterError(
                f"{name}.ipynb has no parameter {key!r}. Did you mean {near!r}? If it is a variable of your "
                "own, give it another name."
            )


def _injected(namespace: Mapping[str, Any]) -> list[str]:
    """Names that papermill set, by the cells that this kernel has executed."""
    cells = [cell for cell in namespace.get("In", ()) if str(cell).startswith(INJECTED)]
    return re.findall(r"^(\w+) = ", "\n".join(cells), flags=re.MULTILINE)


def _misspelt(name: str, known: Iterable[str]) -> str:
    """The parameter for which a name looks misspelt; none for a plural, a singular or a numbered one."""
    near = next(iter(difflib.get_close_matches(name, known, n=1, cutoff=NEAR)), name)
    alike = near.rstrip("s0123456789_") == name.rstrip("s0123456789_")
    return "" if alike else near


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
    for attempt in (1, 2):
        code, log = _papermill(notebook_path(name), output, parameters, show)
        if code == 0:
            return time.monotonic() - started
        if attempt == 2 or not any(sign in log for sign in PORT_COLLISIONS):
            break
    raise NotebookError(_explain(name, output, code, log), code)


def _papermill(
    notebook: Path, output: Path, parameters: Mapping[str, Any], show: Callable[[str], None] | None
) -> tuple[int, str]:
    with tempfile.NamedTemporaryFile("w", suffix=".yaml", encoding="utf-8") as file:
        yaml.safe_dump(dict(parameters), file)
        file.flush()
        command = [sys.executable, "-m", "papermill", str(notebook), str(output), "--kernel", "python3"]
        command += ["--parameters_file", file.name, "--log-output", "--no-progress-bar"]
        # 00_run_all downloads and hands on; the stages run the model, maybe with code of its own
        passed = with_token if notebook.stem in (ALL, "05_publish") else without_token
        environment = {
            **passed(os.environ),
            "PYTHONPATH": _python_path(),
            "PYDEVD_DISABLE_FILE_VALIDATION": "1",
        }
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
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
            if process.poll() is None:  # interrupted: a kernel has its own session, and would go on alone
                end_tree(process.pid)


def is_for_readers(line: str) -> bool:
    """Whether a line of papermill's log says something: not the repr of what only a page can show."""
    return bool(line.strip()) and not line.startswith(NOT_THE_NOTEBOOKS) and not WIDGET.match(line)


def _python_path() -> str:
    """The kernel must import this very package, also from a checkout that isn't installed."""
    package = str(Path(__file__).resolve().parent.parent)
    return os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH", "")]))


def _explain(name: str, output: Path, code: int, log: str) -> str:
    error = _first_error(output)
    if error is None and any(sign in log for sign in FULL_DISK):
        error = (
            "the disk is full. Free some space, or choose another `run_dir`; the same call goes on where it "
            "stopped."
        )
    if error is None and code in (138, -9, 137):
        error = (
            "the kernel died, most likely out of memory. Use a smaller model, or fewer or shorter windows."
        )
    if error is None:
        error = f"papermill ended with exit code {code}: {log.strip()[-500:]}"
    return f"{name} failed: {error}\nThe executed notebook, up to the failing cell: {output}"


def _first_error(output: Path) -> str | None:
    if not output.exists():
        return None
    try:
        notebook = nbformat.read(output, as_version=4)
    except ValueError:  # NotJSONError: a full disk, or a kill, has cut it
        return None
    for cell in notebook.cells:
        for item in cell.get("outputs", []):
            if item.output_type == "error":
                return f"{item.ename}: {item.evalue}"
    return None


# --- all stages ------------------------------------------------------------------------------------------


def run_stages(
    run_dir: Path,
    parameters: Mapping[str, Any],
    *,
    only: Iterable[str] | None = None,
    show: Show | None = None,
) -> list[Execution]:
    """Execute notebooks 01…05 on one run directory; stages that are done and unchanged are only recognised.

    Args:
        run_dir: the run directory; `parameters["run_dir"]` is set to it.
        parameters: of all stages together; each notebook gets those that it has.
        only: some of the stages; None is all. Those that come before must have been run. `parameters` are
            theirs alone then.
        show: called with (notebook, seconds so far, line) for each line a notebook prints; None shows one
            progress line a stage.

    Raises:
        ParameterError: a name that none of these stages has, or a value that it can't have.
        NotebookError: the first stage that fails, or there is no such stage.
    """
    chosen = STAGES if only is None else tuple(only)
    check_stages(parameters, chosen)
    known = {name: parameters_of(name) for name in chosen}
    done: list[Execution] = []
    for name in sorted(chosen):
        own = {key: value for key, value in parameters.items() if key in known[name]}
        done.append(_run_stage(Run(run_dir), name, {**own, "run_dir": str(run_dir)}, show or StageLine(name)))
    return done


def _fetched(run: Run, name: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """A stage's parameters, after what it needs from the Hub was downloaded: it is started without a token.

    01_analyze gets the very commit that was fetched; it could not ask for one where the model is private.
    """
    if name not in ("01_analyze", "03_quantize", "04_evaluate"):
        return dict(parameters)
    held: dict[str, Any] = {"model": {"id": parameters.get("model", "auto")}}
    if name != "01_analyze" and run.info_json.exists():
        held = run_info(run)
    model = str(held.get("location", held["model"]["id"]))
    rivals = [str(rival) for rival in parameters.get("rivals") or ()]
    here = all(one == "bundled" or Path(one).expanduser().exists() for one in (model, *rivals))
    if here or hub_token() is None:  # without a token the stage fetches as well as this process would
        return dict(parameters)
    from spi_utils.evaluate import find_rivals
    from spi_utils.models import chosen_model, download, is_hub_id

    commit = held["model"].get("revision") or parameters.get("revision") or None
    if is_hub_id(chosen_model(model)):
        code = bool(parameters.get("trust_remote_code"))
        _, commit = download(chosen_model(model), commit, code=code)
    find_rivals([rival for rival in rivals if is_hub_id(rival)])
    return {**parameters, "revision": commit} if name == "01_analyze" and commit else dict(parameters)


class StageLine:
    """One progress line a stage: kept up to date where somebody watches, a few plain lines in a log."""

    def __init__(self, name: str, every: float = 15.0) -> None:
        self.handle = _display_handle() if interactive() else None
        self.every = every
        self.last = 0.0
        self(name, 0.0, "started")

    def __call__(self, name: str, seconds: float, line: str) -> None:
        """Show a line; in a log, only the first, the last and one every few seconds."""
        text = f"{name:13s} {seconds:5.0f} s   {line[:110]}"
        if self.handle is not None:
            self.handle.update({"text/plain": text}, raw=True)
        elif seconds == 0 or seconds - self.last >= self.every or line in ("done", "already done"):
            print(text, flush=True)
            self.last = seconds


def _display_handle() -> Any:
    from IPython.display import display

    return display({"text/plain": ""}, raw=True, display_id=True)


def _run_stage(run: Run, name: str, parameters: dict[str, Any], show: Show) -> Execution:
    output = run.notebooks / f"{name}.ipynb"
    mark = _mark(run, name, parameters)
    if not parameters.get("force") and output.exists() and _is_done(run, name, mark):
        show(name, 0.0, "already done")
        return Execution(name, output, 0.0, True)
    started = time.monotonic()
    needed = _fetched(run, name, parameters)
    seconds = execute(name, output, needed, show=lambda line: show(name, time.monotonic() - started, line))
    record = {"fingerprint": mark, "made": _hash_of(run, name), "seconds": round(seconds, 1)}
    update_info(run, lambda info: info.setdefault("notebooks", {}).update({name: record}))
    show(name, seconds, "done")
    return Execution(name, output, seconds, False)


def _mark(run: Run, name: str, parameters: Mapping[str, Any]) -> str:
    """What a notebook's outcome depends on: parameters, its text, this code, and what earlier stages made."""
    earlier = {before: _hash_of(run, before) for before in STAGES[: STAGES.index(name)]}
    own = sha256_file(notebook_path(name))
    return fingerprint({"parameters": parameters, "notebook": own, "code": code_hash(), "earlier": earlier})


def _hash_of(run: Run, name: str) -> str | None:
    path = run.path / MADE[name]
    return sha256_file(path) if path.exists() else None


def _is_done(run: Run, name: str, mark: str) -> bool:
    """The notebook ran with the same mark, and what it made is still there, untouched."""
    if not run.info_json.exists():
        return False
    info = run_info(run)
    held = info.get("notebooks", {}).get(name, {})
    if held.get("fingerprint") != mark or held["made"] != _hash_of(run, name):
        return False
    stage = info["stages"].get(name.split("_", 1)[1])
    return stage is None or is_intact(run, stage)
