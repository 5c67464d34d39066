"""A language model made small, and what that cost: the notebooks' pipeline from a shell."""

from __future__ import annotations

import argparse
import json
import signal
import sys
from functools import partial
from pathlib import Path
from typing import Any

from spi_utils import __version__, notebook
from spi_utils.errors import ParameterError, SPIError
from spi_utils.notebook import ALL, STAGES

INTERRUPTED = 130  # the shell's exit code for Ctrl-C


def main(arguments: list[str] | None = None) -> int:
    """Run a command and return its exit code.

    0; 1 for what failed; 2 for a wrong call or parameter; 130 for Ctrl-C.
    """
    options = vars(_parser().parse_args(arguments))
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a scheduler's end is as orderly as Ctrl-C
    try:
        return options.pop("call")(**options) or 0
    except SPIError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1 + isinstance(error, ParameterError)
    except KeyboardInterrupt:
        print("\nInterrupted; the same command goes on where it stopped.", file=sys.stderr)
        return INTERRUPTED
    except OSError as error:
        mend = "Free some space, or choose another `run_dir`; the same command goes on where it stopped."
        print(f"OSError: {error.filename or 'a file'}: {error.strerror}. {mend}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="spi-utils", description=__doc__)
    parser.add_argument("--version", action="version", version=f"spi_utils {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    epilog = f"parameters (name, default, what it is):\n\n{notebook.parameters_help(ALL)}"

    def command(name: str, call: Any, said: str, **more: Any) -> Any:
        as_written = argparse.RawDescriptionHelpFormatter
        made = commands.add_parser(name, help=said, formatter_class=as_written, **more)
        made.set_defaults(call=call)
        return made.add_argument

    add = command("run", _run, "all five stages through 00_run_all, headless", epilog=epilog)
    repeated: dict[str, Any] = {"action": "append", "default": []}
    said = "a parameter of the notebooks, see below; may be given many times"
    add("-p", dest="given", nargs=2, metavar=("NAME", "VALUE"), help=said, **repeated)
    add("--preset", help="what people want in a word, the same as -p preset")
    add("--only", choices=STAGES, **repeated, help="just this stage, of an existing run")

    add = command("summary", _summary, "what a finished run found, and where its files are")
    add("run_dir", type=Path, metavar="RUN")

    add = command("speed", _speed, "how fast a run's checkpoint generates, as JSON")
    add("run_dir", type=Path, metavar="RUN", help="a run, or any folder that transformers loads")
    add("--device", default="auto", help="auto, cpu or cuda:0")
    add("--dtype", help="compute dtype; the checkpoint's own if left out")
    for option, default in (("--prompt-tokens", 128), ("--new-tokens", 32), ("--repeats", 5)):
        add(option, type=int, default=default)
    add("--trust-remote-code", action="store_true")

    add = command("publish", _publish, "put a finished run on the Hub, or rehearse it")
    add("run_dir", type=Path, metavar="RUN")
    add("--repo-id", help="name or owner/name; made from the model's name if left out")
    add("--public", dest="private", action="store_false", help="make a new repository public")
    add("--allow-license", help="the base's licence id, where you know it and it isn't found")
    add("--overwrite", action="store_true", help="replace a repository of other things")
    add("--dry-run", action="store_true", help="write the card and the list, send nothing")

    said = "a grid of models, scores, budgets and seeds, and a leaderboard"
    add = command("batch", _batch, said, epilog=epilog)
    add("grid", type=Path, metavar="GRID.yaml")
    add("--out", type=Path, help="the batch's folder (runs/<grid's name>)")
    add("--workers", type=int, help="jobs side by side (one a GPU, else one)")
    add("--scheduler", help="address of a Dask scheduler whose workers run the jobs")
    return parser


def _run(given: list[list[str]], preset: str | None, only: list[str]) -> None:
    given = [*given, *([["preset", preset]] if preset is not None else [])]
    parameters = {name: notebook.from_command_line(name, text) for name, text in given}
    notebook.check_settings(parameters, *(only or [ALL]))
    if parameters.get("run_dir", "auto") == "auto":
        from spi_utils.models import resolve
        from spi_utils.runs import run_path

        held = {**notebook.parameters_of(ALL), **parameters}
        code = held["trust_remote_code"]
        source = resolve(held["model"], held["revision"] or None, trust_remote_code=code)
        parameters["run_dir"] = run_path("auto", source.slug)
    run_dir = Path(parameters["run_dir"]).resolve()
    parameters["run_dir"] = str(run_dir)
    if only:
        notebook.run_stages(run_dir, parameters, only=only)
        return
    show = partial(print, flush=True)
    seconds = notebook.execute(ALL, run_dir / "notebooks" / f"{ALL}.ipynb", parameters, show=show)
    print(f"\nAll stages done in {seconds:.0f} s.\n")
    _summary(run_dir)


def _summary(run_dir: Path) -> None:
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
    places = {"report": run.report, "figures": run.figures, "explorer": run.explorer}
    places |= {"checkpoint": run.model_dir, "model card": run.publish / "README.md"}
    for what, path in places.items():
        print(f"{what:10s}  {path}")


def _speed(run_dir: Path, device: str, dtype: str | None, **options: Any) -> None:
    from spi_utils.models import resolve_device
    from spi_utils.runs import existing_run, read_json
    from spi_utils.speed import measure_in_subprocess

    folder = run_dir if (run_dir / "config.json").exists() else existing_run(run_dir).model_dir
    config = read_json(folder / "config.json", what="checkpoint", stage="03_quantize")
    dtype, place = dtype or str(config.get("dtype") or "float16"), str(resolve_device(device))
    print(json.dumps(measure_in_subprocess(folder, device=place, dtype=dtype, **options)))


def _publish(run_dir: Path, **options: Any) -> None:
    from spi_utils.publish import publish

    print(publish(run_dir, **options))


def _batch(grid: Path, out: Path | None, **options: Any) -> int:
    from spi_utils.batch import run_batch
    from spi_utils.runs import run_path

    return run_batch(grid, out or run_path("auto", grid.stem), **options)


if __name__ == "__main__":
    raise SystemExit(main())
