"""The command line: `python -m spi_utils run|summary|batch`, a thin reading of `headless` and `batch`."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import yaml

from spi_utils.errors import SPIError
from spi_utils.headless import (
    ALL,
    STAGES,
    NotebookError,
    check_parameters,
    execute,
    parameters_of,
    run_stages,
)


def main(arguments: list[str] | None = None) -> int:
    """Run a command and return its exit code: 0, papermill's for a failed stage, 1, or 2 for a wrong call."""
    parser = argparse.ArgumentParser(prog="python -m spi_utils", description=__doc__)
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
            _run({name: yaml.safe_load(value) for name, value in options.parameters}, options.only)
        elif options.command == "batch":
            from spi_utils.batch import run_batch

            out = options.out or Path("runs") / options.grid.stem
            return run_batch(options.grid, out, workers=options.workers, scheduler=options.scheduler)
        else:
            _print_summary(options.run_dir)
    except SPIError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code if isinstance(error, NotebookError) else 1
    return 0


def _run(parameters: dict[str, Any], only: list[str] | None) -> None:
    check_parameters(parameters, parameters_of(ALL), f"{ALL}.ipynb")
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
    from spi_utils.runs import run_path
    from spi_utils.source.sources import resolve

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

    from spi_utils.evaluate import Evaluation
    from spi_utils.judging.sentences import stock_sentence
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
