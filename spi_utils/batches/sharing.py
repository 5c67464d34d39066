"""One analysis for many runs: a run directory begins with the files of another, and says which model's."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from spi_utils.errors import RunError
from spi_utils.runs import Run, atomic_path, is_intact, run_info, sha256_file, write_json

STAGES = ("spectra", "analyze")  # in run.json


def share_analysis(analysis: Run, run: Run) -> None:
    """Give a run an analysis that was made elsewhere: hard links to its files, its entries in run.json.

    Every write in a run directory replaces a file, so a link never changes the analysis.

    Raises:
        RunError: the analysis is damaged, or the run belongs to another model.
    """
    made = run_info(analysis)
    for name in STAGES:
        if name not in made["stages"] or not is_intact(analysis, made["stages"][name]):
            raise RunError(f"{analysis.path}: its {name} is missing or was changed. Remove the folder.")
    held: dict[str, Any] = {"stages": {}}
    if run.info_json.exists():
        held = run_info(run)
        if held["model"]["sha256"] != made["model"]["sha256"]:
            raise RunError(
                f"{run.path} holds a run of {held['model']['id']} (weights {held['model']['sha256'][:12]}), "
                f"not of {made['model']['id']} (weights {made['model']['sha256'][:12]}). Remove the folder."
            )
    made_of_it = (analysis.layers_csv, analysis.spectra, analysis.notebooks / "01_analyze.ipynb")
    for path in (*made_of_it, *sorted(analysis.rounded.glob("*.safetensors"))):
        target = run.path / path.relative_to(analysis.path)
        if path.exists() and not (target.exists() and sha256_file(target) == sha256_file(path)):
            _link(path, target)
    stages = {**held["stages"], **{name: made["stages"][name] for name in STAGES}}
    write_json(run.info_json, {**made, "notebooks": {}, **held, "stages": stages})


def _link(path: Path, target: Path) -> None:
    with atomic_path(target) as temporary:
        temporary.unlink()
        try:
            os.link(path, temporary)
        except OSError:  # another file system, or one without links
            shutil.copyfile(path, temporary)
