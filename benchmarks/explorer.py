"""How long the explorer takes from a slider's change to its new picture.

Drives the real widgets without a browser: the threshold slider's value is set, and the time until the picture
widget holds the new PNG is taken, as the kernel experiences it. The layer tables are made up.

    python benchmarks/explorer.py [--json [FILE]]
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for the tests' made-up layer table

from spi_utils.explorer import Explorer, ExplorerState
from tests.synthetic import layer_table

COUNTS = (250, 2000, 10_000)
MOVES = 200


def slider_times(count: int, moves: int = MOVES) -> np.ndarray:
    """Milliseconds for each of `moves` changes of the slider, `count` layers. Shape (moves,)."""
    explorer = Explorer(ExplorerState(layer_table(count)))
    slider = explorer.threshold
    steps = np.linspace(slider.min, slider.max, moves + 10).round().astype(int)
    places = np.random.default_rng(0).permutation(steps).tolist()
    times = []
    for place in places:
        before = explorer.picture.value
        start = time.perf_counter()
        slider.value = place
        times.append(1e3 * (time.perf_counter() - start))
        if explorer.picture.value is before:
            raise RuntimeError(f"the picture did not change when the slider moved to {place}")
    return np.array(times[10:])  # the first few warm caches


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", nargs="?", const="-", help="print one JSON object, or write it to a file")
    arguments = parser.parse_args()
    results: dict[str, float] = {}
    for count in COUNTS:
        times = slider_times(count)
        results[f"p50_ms_{count}"] = round(float(np.median(times)), 1)
        results[f"p95_ms_{count}"] = round(float(np.quantile(times, 0.95)), 1)
    if arguments.json == "-":
        print(json.dumps(results))
        return
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(results, indent=2) + "\n")
    print("layers   median ms   p95 ms")
    for count in COUNTS:
        print(f"{count:6}   {results[f'p50_ms_{count}']:9}   {results[f'p95_ms_{count}']:6}")


if __name__ == "__main__":
    main()
