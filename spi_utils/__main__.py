"""A language model made small, and what that cost: the notebooks' pipeline from a shell."""

from __future__ import annotations

import argparse
import errno
import json
import sys
import time
from pathlib import Path

from spi_utils import __version__
from spi_utils.errors import ParameterError, SPIError
from spi_utils.notebook import (
    ALL,
    STAGES,
    NotebookError,
    check_settings,
    execute,
    from_command_line,
    parameters_help,
    parameters_of,
    run_stages,
)

INTERRUPTED = 130  # the shell's exit code for Ctrl-C
# What a user can mend about a disk; ENOENT is also what Python says where no temporary file can be written.
DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM}
DISK |= {errno.ENOTDIR, errno.EISDIR, errno.ENOENT}
MEND = "Free some space, or choose another `run_dir`; the same command goes on where it stopped."


def main(arguments: list[str] | None = None) -> int:
    """Run a command and return its exit code.

    0; papermill's for a failed stage, else 1; 2 for a wrong call or parameter; 130 for Ctrl-C.
    """
    options = _parser().parse_args(arguments)
    try:
        return options.call(options) or 0
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


def _parser() -> argparse.ArgumentParser:
    name = "spi-utils" if Path(sys.argv[0]).name == "spi-utils" else "python -m spi_utils"
    parser = argparse.ArgumentParser(prog=name, description=__doc__)
    parser.add_argument("--version", action="version", version=f"spi_utils {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    as_written = argparse.RawDescriptionHelpFormatter
    listed = f"(name, default, what it is):\n\n{parameters_help(ALL)}"

    run = commands.add_parser(
        "run",
        help="all five stages through 00_run_all, headless",
        formatter_class=as_written,
        epilog=f"parameters for -p {listed}",
    )
    run.add_argument(
        "-p",
        dest="parameters",
        nargs=2,
        metavar=("NAME", "VALUE"),
        action="append",
        default=[],
        help="a parameter of the notebooks, see below; may be given many times",
    )
    run.add_argument("--preset", help="what people want in a word, the same as -p preset")
    run.add_argument("--only", action="append", choices=STAGES, help="just this stage, of an existing run")
    run.set_defaults(call=_run)

    summary = commands.add_parser("summary", help="what a finished run found, and where its files are")
    summary.add_argument("run_dir", type=Path, metavar="RUN")
    summary.set_defaults(call=lambda options: _print_summary(options.run_dir))

    speed = commands.add_parser("speed", help="how fast a run's checkpoint generates, as JSON")
    speed.add_argument(
        "run_dir", type=Path, metavar="RUN", help="a run, or any folder that transformers loads"
    )
    speed.add_argument("--device", default="auto", help="auto, cpu or cuda:0")
    speed.add_argument("--dtype", help="compute dtype; the checkpoint's own if left out")
    speed.add_argument("--prompt-tokens", type=int, default=128)
    speed.add_argument("--new-tokens", type=int, default=32)
    speed.add_argument("--repeats", type=int, default=5)
    speed.add_argument("--trust-remote-code", action="store_true")
    speed.set_defaults(call=_speed)

    publish = commands.add_parser("publish", help="put a finished run on the Hub, or rehearse it")
    publish.add_argument("run_dir", type=Path, metavar="RUN")
    publish.add_argument("--repo-id", help="name or owner/name; made from the model's name if left out")
    publish.add_argument("--public", action="store_true", help="make a new repository public")
    publish.add_argument(
        "--allow-license", help="the base's licence id, where you know it and it isn't found"
    )
    publish.add_argument("--overwrite", action="store_true", help="replace a repository of other things")
    publish.add_argument("--dry-run", action="store_true", help="write the card and the list, send nothing")
    publish.set_defaults(call=_publish)

    batch = commands.add_parser(
        "batch",
        help="a grid of models, scores, budgets and seeds, and a leaderboard",
        formatter_class=as_written,
        epilog=f"parameters that a grid may set {listed}",
    )
    batch.add_argument("grid", type=Path, metavar="GRID.yaml")
    batch.add_argument("--out", type=Path, help="the batch's folder (runs/<grid's name>)")
    batch.add_argument("--workers", type=int, help="jobs side by side (one a GPU, else one)")
    batch.add_argument("--scheduler", help="address of a Dask scheduler whose workers run the jobs")
    batch.set_defaults(call=_batch)
    return parser


def _run(options: argparse.Namespace) -> None:
    given = [*options.parameters, *([["preset", options.preset]] if options.preset is not None else [])]
    parameters = {name: from_command_line(name, text) for name, text in given}
    check_settings(parameters, *(options.only or [ALL]))
    if str(parameters.get("run_dir", "auto")) == "auto":
        from spi_utils.models import resolve
        from spi_utils.runs import run_path

        held = {**parameters_of(ALL), **parameters}
        code = held["trust_remote_code"]
        source = resolve(held["model"], held["revision"] or None, trust_remote_code=code)
        parameters["run_dir"] = str(run_path("auto", source.slug))
    run_dir = Path(parameters["run_dir"]).resolve()
    if options.only:
        run_stages(run_dir, parameters, only=options.only)
        return
    started = time.monotonic()
    executed = run_dir / "notebooks" / f"{ALL}.ipynb"
    execute(ALL, executed, {**parameters, "run_dir": str(run_dir)}, show=lambda line: print(line, flush=True))
    print(f"\nAll stages done in {time.monotonic() - started:.0f} s.\n")
    _print_summary(run_dir)


def _print_summary(run_dir: Path) -> None:
    import pandas as pd

    from spi_utils.claims import Evaluation, stock_sentence
    from spi_utils.quantize import proof_by_use
    from spi_utils.report import headline
    from spi_utils.runs import existing_run, run_info

    run = existing_run(run_dir)
    evaluation = Evaluation.read(run.evaluation_json)
    columns = ["variant", "GB", "matrix bits", "perplexity", "KL", "same top-1"]
    with pd.option_context("display.width", 160, "display.max_colwidth", 48):
        print(evaluation.table()[columns].to_string(float_format=lambda value: f"{value:.4f}"))
    print(f"\n{headline(run)}")
    print(f"The checkpoint is {proof_by_use(run_info(run)['stages'].get('quantize', {}))}.")
    print(f"{stock_sentence(evaluation.stock)}\n")
    for what, path in (
        ("report", run.report),
        ("figures", run.figures),
        ("explorer", run.explorer),
        ("checkpoint", run.model_dir),
        ("model card", run.publish / "README.md"),
    ):
        print(f"{what:10s}  {path}")


def _speed(options: argparse.Namespace) -> None:
    from spi_utils.models import resolve_device
    from spi_utils.runs import existing_run, read_json
    from spi_utils.speed import measure_in_subprocess

    folder = options.run_dir
    if not (folder / "config.json").exists():
        folder = existing_run(folder).model_dir
    config = read_json(folder / "config.json", what="checkpoint", stage="03_quantize")
    measured = measure_in_subprocess(
        folder,
        device=str(resolve_device(options.device)),
        dtype=options.dtype or str(config.get("dtype") or "float16"),
        prompt_tokens=options.prompt_tokens,
        new_tokens=options.new_tokens,
        repeats=options.repeats,
        trust_remote_code=options.trust_remote_code,
    )
    print(json.dumps(measured))


def _publish(options: argparse.Namespace) -> None:
    from spi_utils.publish import publish

    result = publish(
        options.run_dir,
        repo_id=options.repo_id,
        dry_run=options.dry_run,
        private=not options.public,
        allow_license=options.allow_license,
        overwrite=options.overwrite,
    )
    print(result)


def _batch(options: argparse.Namespace) -> int:
    from spi_utils.batch import run_batch
    from spi_utils.runs import run_path

    out = options.out or run_path("auto", options.grid.stem)
    return run_batch(options.grid, out, workers=options.workers, scheduler=options.scheduler)


if __name__ == "__main__":
    raise SystemExit(main())
