"""This project: `analyze` on the model's own text (once), then plans and their guided codes.

Settings: `run`, the run's directory; `model`; and what is wanted: `analysis` alone, `uniform` (one format),
`bits` with `formats` and `group`, or `allocation` (module -> bits, another planner's); `recipe` writes the
plan's rules for llama.cpp.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd
import torch
from common import Job

sys.path.insert(0, str(Path(__file__).parents[2]))
from spi_utils.analyze import analyze
from spi_utils.formats import dequantize, layer_bytes, quantize
from spi_utils.models import ModelSource, open_weights, resolve
from spi_utils.plan import make_plan
from spi_utils.recipes import write_recipes
from spi_utils.rounding import Codes
from spi_utils.runs import Run, open_run, run_info

FORMATS = ("nf4", "nf4_dq", "int8", "int4_g64", "int4_g32")


def formats_of(job: Job, layers: pd.DataFrame, source: ModelSource, run: Run) -> dict[str, str]:
    """module -> format, as the settings ask."""
    asked = job.settings
    if uniform := asked.get("uniform"):
        return dict.fromkeys(job.layers, uniform)
    if allocation := asked.get("allocation"):
        names = {4: "int4_g64", 8: "int8", 16: "16bit"}
        return {name: names[bits] for name, (bits, _) in allocation.items()}
    plan = make_plan(
        layers, score="fisher", rule="matrix_bits", value=asked["bits"], formats=asked["formats"],
        group=asked["group"], model=run_info(run)["model"],
    )  # fmt: skip
    if asked.get("recipe"):
        write_recipes(run, plan, source)
    return dict(plan.formats)


def main() -> None:
    job = Job()
    source = resolve(job.settings["model"])
    run = open_run(job.settings["run"], source.identity())
    layers = analyze(
        run, source, formats=FORMATS, text="pydoc", windows=job.settings["windows"],
        length=job.settings["length"], workers=torch.get_num_threads(),
    )  # fmt: skip
    if job.settings.get("analysis"):
        job.finish({}, 0, "spi-utils")
        return
    formats, codes = formats_of(job, layers, source, run), Codes(run.rounded)
    values, total = {}, 0
    with open_weights(source) as weights:
        for name, fmt in formats.items():
            weight = weights.read(f"{name}.weight")
            packed = codes.get((name, fmt)) or quantize(weight, fmt)
            values[name] = dequantize(packed)
            total += 8 * layer_bytes(fmt, *job.layers[name])
    counts = {fmt: list(formats.values()).count(fmt) for fmt in dict.fromkeys(formats.values())}
    remark = ", ".join(f"{count} {fmt}" for fmt, count in counts.items())
    job.finish(values, total, "spi-utils", remark=remark)


if __name__ == "__main__":
    main()
