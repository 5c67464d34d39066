"""The command line: `python -m spi_utils run|summary|batch`, a thin reading of `headless` and `batch`."""

from __future__ import annotations

import argparse
import errno
import sys
import time
from pathlib import Path
from typing import Any

from spi_utils import __version__
from spi_utils.errors import ParameterError, SPIError
from spi_utils.headless import (
    ALL,
    STAGES,
    NotebookError,
    check_settings,
    check_stages,
    execute,
    parameters_of,
    run_stages,
)
from spi_utils.parameters import from_command_line

INTERRUPTED = 130  # the shell's exit code for Ctrl-C
# What a user can mend about a disk; ENOENT is also what Python says where no temporary file can be written.
DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM}
DISK |= {errno.ENOTDIR, errno.EISDIR, errno.ENOENT}
MEND = "Free some space, or choose another `run_dir`; the same command goes on where it stopped."


def main(arguments: list[str] | None = None) -> int:
    """Run a command and return its exit code.

    0; papermill's for a failed stage, else 1; 2 for a wrong call or parameter; 130 for Ctrl-C.
    """
    parser = argparse.ArgumentParser(prog="python -m spi_utils", description=__doc__)
    parser.add_argument("--version", action="version", version=f"spi_utils {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="all five stages through 00_run_all, headless")
    run.add_argument("-p", dest="parameters", nargs=2, metavar=("NAME", "VALUE"), action="append", default=[])
    run.add_argument("--only", action="append", choices=STAGES, help="just this stage, of an existing run")
    summary = commands.add_parser("summary", help="what a finished run found, and where its files are")
    summary.add_argument("run_dir", type=Path)
    batch = commands.add_parser(
        "batch", help="a grid of models, scores, budgets and seeds, and a leaderboard"
    )
    batch.add_argument("grid", type=Path, metavar="GRID.yaml")
    batch.add_argument("--out", type=Path, help="the batch's folder (runs/<grid's name>)")
    batch.add_argument("--workers", type=int, help="jobs side by side (one a GPU, else one)")
    batch.add_argument("--scheduler", help="address of a Dask scheduler whose workers run the jobs")
    options = parser.parse_args(arguments)
    try:
        if options.command == "run":
            _run({name: from_command_line(name, text) for name, text in options.parameters}, options.only)
        elif options.command == "batch":
            from spi_utils.batch import run_batch

            out = options.out or Path("runs") / options.grid.stem
            return run_batch(options.grid, out, workers=options.workers, scheduler=options.scheduler)
        else:
            _print_summary(options.run_dir)
    except SPIError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code if isinstance(error, NotebookError) else 1 + isinstance(error, ParameterError)
    except KeyboardInterrupt:
        print("\nInterrupted; the same command goes on where it stopped.", file=sys.stderr)
        return INTERRUPTED
    except OSError as error:
        if error.errno not in DISK:
            raise
        where = error.filename or "a file"
        print(f"OSError: {where} can't be written or read: {error.strerror}. {MEND}", file=sys.stderr)
        return 1
    return 0


def _run(parameters: dict[str, Any], only: list[str] | None) -> None:
    if only:
        check_stages(parameters, only)
    else:
        check_settings(parameters, ALL)
    if str(parameters.get("run_dir", "auto")) == "auto":
        parameters["run_dir"] = str(_auto_run_dir(parameters))
    run_dir = Path(parameters["run_dir"]).resolve()
    if only:
        run_stages(run_dir, parameters, only=only)
        return
    started = time.monotonic()
    execute(ALL, run_dir / "notebooks" / f"{ALL}.ipynb", {**parameters, "run_dir": str(run_dir)}, show=_echo)
    print(f"\nAll stages done in {time.monotonic() - started:.0f} s.\n")
    _print_summary(run_dir)


def _auto_run_dir(parameters: dict[str, Any]) -> Path:
    from spi_utils.models import resolve
    from spi_utils.runs import run_path

    defaults = parameters_of(ALL)
    names = ("model", "revision", "trust_remote_code")
    chosen: dict[str, Any] = {name: parameters.get(name, defaults[name]) for name in names}
    source = resolve(
        chosen["model"], chosen["revision"] or None, trust_remote_code=chosen["trust_remote_code"]
    )
    return run_path("auto", source.slug)


def _echo(line: str) -> None:
    print(line, flush=True)


def _print_summary(run_dir: Path) -> None:
    import pandas as pd

    from spi_utils.claims import Evaluation, stock_sentence
    from spi_utils.quantize import proof_by_use
    from spi_utils.report import headline
    from spi_utils.runs import existing_run, run_info

    run = existing_run(run_dir)
    evaluation = Evaluation.read(run.evaluation_json)
    table = evaluation.table()
    columns = ["variant", "GB", "matrix bits", "perplexity", "KL", "same top-1"]
    with pd.option_context("display.width", 160, "display.max_colwidth", 48):
        print(table[columns].to_string(float_format=lambda value: f"{value:.4f}"))
    print(f"\n{headline(run)}")
    print(f"The checkpoint is {proof_by_use(run_info(run)['stages'].get('quantize', {}))}.")
    print(f"{stock_sentence(evaluation.stock)}\n")
    places = {
        "report": run.report,
        "figures": run.figures,
        "explorer": run.explorer,
        "checkpoint": run.model_dir,
    }
    for what, path in {**places, "model card": run.publish / "README.md"}.items():
        print(f"{what:10s}  {path}")


if __name__ == "__main__":
    raise SystemExit(main())
