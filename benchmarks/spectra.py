"""What the spectral engine costs, beside WeightWatcher 0.7.7 and beside the bare decomposition.

Everything in one process, alternating, medians, on the same weights:

    python -m benchmarks.spectra --json spectra.json     # all of it, about 15 minutes on 2 cores
    python -m benchmarks.spectra --parts shapes fit      # some of it

Parts: `bundled` (the bundled model's 210 matrices: WeightWatcher's analyze() against ours), `shapes` (as many
matrices of one shape as there are cores: decomposition and fit), `fit`, and `memory` (synthetic checkpoints
with Qwen3.5-4B's layer shapes). WeightWatcher takes a matrix at a time and may use every core in its LAPACK;
ours, and the bare solve, work on a layer a core with one BLAS thread each, as analyze() does.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from spi_utils.formats import relative_error
from spi_utils.models import list_layers, open_weights, resolve
from spi_utils.progress import cores, spread
from spi_utils.spectra import analyze_matrix, block_eigenvalues, decompose, fit_power_law

SHAPES = ((576, 1536), (1024, 2560), (2560, 4096))
PARTS = ("bundled", "shapes", "fit", "memory")
# Qwen3.5-4B's text part (a quarter of its blocks are full attention), with a small vocabulary.
QWEN = {
    "vocab_size": 1024,
    "hidden_size": 2560,
    "intermediate_size": 9216,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "tie_word_embeddings": True,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", help="write the figures here")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--blocks", type=int, nargs="+", default=[4, 8], help="of the synthetic checkpoints")
    options = parser.parse_args()
    logging.getLogger("weightwatcher").setLevel(logging.ERROR)
    figures: dict[str, Any] = {"cores": cores(), "processor": processor(), "repeats": options.repeats}
    if "fit" in options.parts:
        figures |= measure_fit(options.repeats)
    if "shapes" in options.parts:
        figures |= measure_shapes(options.repeats)
    if "bundled" in options.parts:
        figures |= measure_bundled(options.repeats)
    if "memory" in options.parts:
        figures |= measure_memory(options.blocks)
    for name, value in figures.items():
        print(f"{name:38} {value}")
    if options.json:
        Path(options.json).write_text(json.dumps(figures, indent=2) + "\n")


# --- the parts --------------------------------------------------------------------------------------------


def measure_fit(repeats: int) -> dict[str, Any]:
    from weightwatcher.WW_powerlaw import WWFit

    values = np.linalg.eigvalsh(gram(random_matrix(2560, 4096).double().numpy()))
    seconds = alternate(
        {"ours": lambda: fit_power_law(values), "theirs": lambda: WWFit(values)}, 10 * repeats
    )
    return {"fit_ms_2560": 1e3 * seconds["ours"], "weightwatcher_fit_ms_2560": 1e3 * seconds["theirs"]}


def measure_shapes(repeats: int) -> dict[str, Any]:
    """Decomposition and fit against WeightWatcher's; what columns, FARMS and NF4's error add to a solve.

    Seconds a matrix, for a matrix a core at once; NF4's error, which uses all cores itself, one by one.
    """
    figures: dict[str, Any] = {}
    for rows, cols in SHAPES:
        matrix = random_matrix(rows, cols)
        analyze_matrix(matrix)  # the Gaussian null of this shape, made once a run
        relative_error(matrix[:64], "nf4")  # imports
        work: dict[str, Callable[[torch.Tensor], Any]] = {
            "solve": lambda w: np.linalg.eigvalsh(gram(w.double().numpy())),
            "columns": lambda w: analyze_matrix(w, farms=False),
            "farms": block_eigenvalues,
            "nf4": lambda w: relative_error(w, "nf4"),
            "float64": lambda w: fit_power_law(decompose(w)[0] ** 2),
            "float32": lambda w: fit_power_law(decompose(w, precision="float32")[0] ** 2),
            "weightwatcher": weightwatcher_fit,
        }
        alone = {"weightwatcher", "nf4"}
        turns: dict[str, Callable[[], Any]] = {
            name: partial(each, f, matrix, spread_out=name not in alone) for name, f in work.items()
        }
        seconds = {name: value / cores() for name, value in alternate(turns, repeats).items()}
        at = f"{rows}x{cols}"
        figures[f"seconds_{at}"] = {name: round(value, 4) for name, value in seconds.items()}
        for name in ("columns", "farms", "nf4"):
            figures[f"{name}_vs_solve_{at}"] = seconds[name] / seconds["solve"]
        for name in ("float64", "float32"):
            figures[f"svd_speedup_{name}_{at}"] = seconds["weightwatcher"] / seconds[name]
    figures["overhead_vs_solve"] = max(figures[f"columns_vs_solve_{at}"] for at in ("1024x2560", "2560x4096"))
    for name in ("float64", "float32"):
        figures[f"svd_speedup_{name}"] = figures[f"svd_speedup_{name}_2560x4096"]
    return figures


def measure_bundled(repeats: int) -> dict[str, Any]:
    """Every matrix of the bundled model: all columns but FARMS, and once more with it."""
    matrices = bundled_matrices()
    results: dict[str, Any] = {}

    def ours(precision: str, farms: bool) -> Callable[[], None]:
        def run() -> None:
            jobs = ((index, matrix, precision, farms) for index, matrix in enumerate(matrices))
            results[f"{precision}, {farms}"] = [row for _, row in sorted(spread(one_matrix, jobs))]

        return run

    def theirs() -> None:
        results["weightwatcher"] = weightwatcher_table(matrices)

    ours("float64", True)()  # the Gaussian nulls
    seconds = alternate(
        {
            "weightwatcher": theirs,
            "float64": ours("float64", False),
            "float64_farms": ours("float64", True),
            "float32": ours("float32", False),
        },
        repeats,
    )
    exact, fast = ([row["alpha_pl"] for row in results[f"{p}, False"]] for p in ("float64", "float32"))
    hill = ([row["alpha_hill"] for row in results[f"{p}, False"]] for p in ("float64", "float32"))
    return {
        "seconds_bundled": {name: round(value, 2) for name, value in seconds.items()},
        "alpha_max_rel_diff": largest_difference(exact, results["weightwatcher"]["alpha"]),
        "float32_alpha_max_rel_diff": largest_difference(fast, exact),
        "float32_alpha_hill_max_rel_diff": largest_difference(*hill),
        "speedup_float64": seconds["weightwatcher"] / seconds["float64"],
        "speedup_float64_with_farms": seconds["weightwatcher"] / seconds["float64_farms"],
        "speedup_float32": seconds["weightwatcher"] / seconds["float32"],
    }


def measure_memory(blocks: list[int]) -> dict[str, Any]:
    """Peak memory of the spectra stage, in a process of its own, for checkpoints of growing depth."""
    rows = []
    for count in blocks:
        with tempfile.TemporaryDirectory() as folder:
            model = write_checkpoint(Path(folder) / "model", count)
            output = subprocess.run(
                [sys.executable, "-c", MEASURE_ONE, str(model), f"{folder}/run"],
                check=True,
                capture_output=True,
                text=True,
            ).stdout
            rows.append({"blocks": count, **json.loads(output.splitlines()[-1])})
    return {"memory": rows, "peak_rss_over_largest_layer": max(row["peak_over_largest"] for row in rows)}


MEASURE_ONE = """
import json, sys, time
from spi_utils.analyze import analyze
from spi_utils.models import list_layers, resolve
from spi_utils.runs import open_run, peak_rss_bytes
source = resolve(sys.argv[1])
run = open_run(sys.argv[2], source.identity())
settings = dict(device="cpu", sensitivity="none", workers=1)
analyze(run, source, layers="layers.3.self_attn.k_proj", **settings)  # imports, caches
before, start = peak_rss_bytes(), time.monotonic()
analyze(run, source, **settings)
peak, seconds = peak_rss_bytes() - before, time.monotonic() - start
planned = [x for x in list_layers(source) if x.quantizable]
largest = max(8 * (x.numel + min(x.rows, x.cols) ** 2) for x in planned)
print(json.dumps({"matrices": len(planned), "weights": sum(x.numel for x in planned),
    "peak_bytes": peak, "largest_layer_bytes": largest, "peak_over_largest": peak / largest,
    "seconds_per_matrix": seconds / len(planned)}))
"""


# --- their pieces ----------------------------------------------------------------------------------------


def alternate(functions: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median seconds of each function; they take turns, so that a slow minute hits all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(repeats):
        order = list(functions.items())
        for name, function in order if turn % 2 == 0 else reversed(order):
            start = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def each(function: Callable[[torch.Tensor], Any], matrix: torch.Tensor, *, spread_out: bool) -> None:
    """The same work on as many matrices as there are cores: side by side, or one after the other."""
    jobs = [(matrix.clone(),) for _ in range(cores())]
    if spread_out:
        list(spread(function, jobs))
        return
    for job in jobs:
        function(*job)


def one_matrix(index: int, matrix: torch.Tensor, precision: str, farms: bool) -> tuple[int, dict[str, float]]:
    return index, analyze_matrix(matrix, precision=precision, farms=farms).statistics


def random_matrix(rows: int, cols: int) -> torch.Tensor:
    """A float16 weight with a spectrum like a trained one's: noise and a power law."""
    rng = np.random.default_rng([rows, cols])
    scales = np.arange(1.0, rows + 1) ** -0.4
    return torch.from_numpy(0.02 * rng.standard_normal((rows, cols)) * scales[:, None]).half()


def gram(matrix: np.ndarray) -> np.ndarray:
    return matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix


def weightwatcher_fit(matrix: torch.Tensor) -> float:
    from weightwatcher.RMT_Util import svd_vals
    from weightwatcher.WW_powerlaw import WWFit

    return WWFit(svd_vals(matrix.double().numpy()) ** 2).alpha


def weightwatcher_table(matrices: list[torch.Tensor]) -> Any:
    import weightwatcher

    linears = []
    for matrix in matrices:
        linear = torch.nn.Linear(matrix.shape[1], matrix.shape[0], bias=False)
        linear.weight.data = matrix.float()
        linears.append(linear)
    with contextlib.redirect_stdout(io.StringIO()):
        return weightwatcher.WeightWatcher(model=torch.nn.Sequential(*linears)).analyze()


def bundled_matrices() -> list[torch.Tensor]:
    source = resolve("bundled")
    with open_weights(source) as weights:
        return [weights.read(f"{x.name}.weight") for x in list_layers(source) if x.quantizable]


def largest_difference(values: list[float], reference: list[float]) -> float:
    return float(np.max(np.abs(np.array(values) / np.array(reference) - 1)))


def write_checkpoint(directory: Path, blocks: int) -> Path:
    """Random weights in Qwen3.5-4B's shapes, a shard a block: never more than one block in memory."""
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    kinds = ["full_attention" if block % 4 == 3 else "linear_attention" for block in range(blocks)]
    config = AutoConfig.for_model("qwen3_5_text", num_hidden_layers=blocks, layer_types=kinds, **QWEN)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    directory.mkdir(parents=True)
    config.save_pretrained(directory)
    where: dict[str, str] = {}
    for shard, names in enumerate(shards(list(model.state_dict()), blocks)):
        torch.manual_seed(shard)
        shapes = {name: model.state_dict()[name].shape for name in names if name != "lm_head.weight"}
        tensors = {name: 0.02 * torch.randn(shape, dtype=torch.float32) for name, shape in shapes.items()}
        file = f"model-{shard:05d}.safetensors"
        save_file({name: value.bfloat16() for name, value in tensors.items()}, directory / file)
        where |= dict.fromkeys(tensors, file)
    index = {"metadata": {}, "weight_map": where}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def shards(names: list[str], blocks: int) -> Iterator[list[str]]:
    for block in range(blocks):
        yield [name for name in names if f".layers.{block}." in name]
    yield [name for name in names if ".layers." not in name]


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, load {os.getloadavg()[0]:.1f} at the start"


if __name__ == "__main__":
    main()
