"""Which formats to spend bits on: the real KL of every family of plans at the same matrix bits.

    python benchmarks/formats.py                        # the bundled model (its weights were 4-bit once)
    python benchmarks/formats.py --model DIRECTORY      # another, such as one of small_models.py
    python benchmarks/formats.py --json out.json --figure out.png
    python benchmarks/formats.py --draw out.json --figure out.png   # again, from the numbers of before

A family is a score and the formats that it may give. All are planned at 4.5, 5, 5.5, 6, 7 and 8 matrix bits,
with guided rounding, and scored on windows of one half of a text; predictions were scaled on the other half.
`int4 + int8` is what vLLM serves: layers that it merges share a format. Scored plans stay in bench-out/, so
an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.selection import Judge, halves
from spi_utils.analyze import analyze
from spi_utils.errors import PlanError
from spi_utils.models import ModelSource, load_model, load_tokenizer, open_weights, resolve
from spi_utils.plan import able, bit_rates, make_plan, predicted_kl
from spi_utils.rounding import Codes
from spi_utils.runs import open_run, write_json
from spi_utils.scoring import Switch, reference_states
from spi_utils.stats import estimate
from spi_utils.texts import load_text, make_windows, start_token

BUDGETS = (4.5, 5.0, 5.5, 6.0, 7.0, 8.0)
ASKED = ("nf4", "int8", "int4_g64", "int4_g32")
MIXED = ("int4_g64", "int8", "16bit")


@dataclass(frozen=True)
class Family:
    """A way to plan: a score, its direction, the formats it may give, and whether merged layers share one."""

    name: str
    score: str
    direction: str
    formats: tuple[str, ...]
    group: str | None = None


HYBRID = ("nf4", "16bit")
FAMILIES = (
    Family("α high: NF4 + 16-bit", "alpha_hill", "high", HYBRID),
    Family("α low: NF4 + 16-bit", "alpha_hill", "low", HYBRID),
    Family("Fisher: NF4 + 16-bit", "fisher", "high", HYBRID),
    Family("Fisher: NF4 + int8 + 16-bit", "fisher", "high", ("nf4", "int8", "16bit")),
    Family("Fisher: int4 + int8 + 16-bit", "fisher", "high", MIXED),
    Family("Fisher: int4 + int8 + 16-bit, fused", "fisher", "high", MIXED, "fused"),
    Family("Fisher: every symmetric int4, fused", "fisher", "high", ("int4_g32", *MIXED), "fused"),
)
SERVED = FAMILIES[5].name
LABELS = {"nf4": (-9, -12), "int4_g64": (6, 6), "int4_g32": (9, 3), "int8": (8, 4)}  # where, in points
# As the README's table calls them.
NAMES = (
    *("α high, NF4 + 16-bit", "α low, NF4 + 16-bit", "Fisher, NF4 + 16-bit"),
    *("Fisher, NF4 + int8 + 16-bit (no writer)", "Fisher, int4 + int8 + 16-bit"),
    *("the same, merged layers together", "with int4 in groups of 32 as well"),
)
UNIFORM = {"nf4": "all NF4", "int4_g64": "all int4, groups of 64", "int4_g32": "all int4, groups of 32"}
HYBRIDS = tuple(family.name for family in FAMILIES[:3])


def layer_table(source: ModelSource, folder: Path, text: Path, length: int) -> tuple[pd.DataFrame, Codes]:
    """The pipeline's own table with every format's costs, and the codes that they are of."""
    run = open_run(folder / "run", source.identity())
    return analyze(run, source, formats=ASKED, text=str(text), length=length), Codes(run.rounded)


def planned(layers: pd.DataFrame) -> list[tuple[str, float, dict[str, str]]]:
    """(family, asked matrix bits, formats) of every plan that can be made, uniform ones included."""
    rows = [
        (f"uniform {fmt}", np.nan, dict.fromkeys(layers["name"][layers["quantizable"]], fmt))
        for fmt in ASKED
        if able(layers, fmt)[layers["quantizable"]].all()
    ]
    for family in FAMILIES:
        for bits in BUDGETS:
            options: dict[str, Any] = {"formats": family.formats, "group": family.group}
            options |= {"score": family.score, "direction": family.direction}
            try:
                plan = make_plan(layers, rule="matrix_bits", value=bits, **options)
            except PlanError as error:
                print(f"{family.name} at {bits}: {error}")
                continue
            rows.append((family.name, bits, dict(plan.formats)))
    return rows


def scored(layers: pd.DataFrame, judge: Judge) -> list[dict[str, Any]]:
    """A row a plan: real and predicted KL, nats a token."""
    rows = []
    for family, bits, formats in planned(layers):
        kl = estimate(judge.kl(formats, f"{family} at {bits}"))
        rows.append(
            {
                "family": family,
                "budget": None if np.isnan(bits) else bits,
                "matrix_bits": bit_rates(layers, formats, False)[1],
                "kl": kl.mean,
                "kl_ci": [kl.low, kl.high],
                "predicted_kl": predicted_kl(layers, formats),
                "formats": {fmt: list(formats.values()).count(fmt) for fmt in sorted(set(formats.values()))},
            }
        )
    return rows


def aims(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """At each budget: the served mix' KL beside the best NF4/16-bit hybrid's, and beside its prediction."""
    found = []
    for bits in BUDGETS:
        here = {row["family"]: row for row in rows if row["budget"] == bits}
        if SERVED not in here:
            continue
        best = min((here[name] for name in HYBRIDS if name in here), key=lambda row: row["kl"], default=None)
        mix = here[SERVED]
        found.append(
            {
                "budget": bits,
                "kl": mix["kl"],
                "ratio_to_best_hybrid": mix["kl"] / best["kl"] if best else None,
                "best_hybrid": best["family"] if best else None,
                "predicted_over_real": mix["predicted_kl"] / mix["kl"],
            }
        )
    return found


def benchmark(model: str, text: str, windows: int, length: int, folder: Path) -> dict[str, Any]:
    """Everything for one model, as JSON-able numbers."""
    source = resolve(model)
    folder = folder / f"{source.slug}-{source.sha256[:8]}"
    texts = halves(text, folder)
    layers, codes = layer_table(source, folder, texts["oracle"], length)
    tokenizer, net = load_tokenizer(source), load_model(source, device="cpu", dtype=torch.float32)
    start = start_token(tokenizer, net.config)
    ids = make_windows(load_text(texts["score"]), tokenizer, windows, length, start)
    with open_weights(source) as weights:
        switch = Switch(net, weights, list(layers["name"][layers["quantizable"]]), codes=codes)
        judge = Judge(switch, ids, reference_states(net, ids), folder / "scored")
        rows = scored(layers, judge)
    return {
        "model": source.identity(),
        "text": load_text(text).name,
        "windows": windows,
        "length": length,
        "rows": rows,
        "aims": aims(rows),
    }


def show(result: dict[str, Any]) -> None:
    """Print the tables."""
    rows = pd.DataFrame(result["rows"])
    uniform = rows[rows["budget"].isna()].set_index("family")[["matrix_bits", "kl", "predicted_kl"]]
    print(f"\nUniform formats\n{uniform.to_string(float_format='%.4g')}")
    table = rows.dropna(subset="budget").pivot(index="family", columns="budget", values="kl")
    table = table.loc[[family.name for family in FAMILIES if family.name in table.index]]
    print(f"\nKL by matrix bits\n{table.to_string(float_format='%.4g')}")
    beside = pd.DataFrame(result["aims"]).to_string(index=False, float_format="%.3g")
    print(f"\n{SERVED}, beside the best hybrid\n{beside}")


def finding(beside: list[dict[str, Any]]) -> str:
    """From which bits up the served mix has less KL than the best hybrid, and where the hybrid is better."""
    ratios = {row["budget"]: row["ratio_to_best_hybrid"] for row in beside if row["ratio_to_best_hybrid"]}
    if not ratios:
        return "KL of every family by bits"
    mix, hybrid = "int4 + int8 + 16-bit (merged layers together)", "the best NF4/16-bit hybrid"
    lost = [bits for bits, ratio in ratios.items() if ratio >= 1]
    if not lost:
        return f"At every budget {mix} has less KL than {hybrid}"
    won = [bits for bits in ratios if bits > max(lost)]
    worse = f"at {' and '.join(f'{bits:g}' for bits in lost)} bits NF4 is better"
    return f"From {min(won):g} bits up {mix} has less KL than {hybrid}; {worse}" if won else worse


def draw(result: dict[str, Any], path: str) -> None:
    """KL against matrix bits, every family a line, uniform formats as points."""
    from spi_utils.figures import BLACK, CYCLE, MARKERS, headline, new_figure, styled

    @styled
    def picture() -> Any:
        figure = new_figure(10.0, 5.6)
        axes = figure.subplots()
        rows = pd.DataFrame(result["rows"])
        for place, family in enumerate(FAMILIES):
            line = rows[rows["family"] == family.name].sort_values("matrix_bits")
            low, high = np.array(line["kl_ci"].tolist()).T
            axes.errorbar(
                line["matrix_bits"], line["kl"], yerr=[line["kl"] - low, high - line["kl"]],
                color=CYCLE[place % len(CYCLE)], marker=MARKERS[place % len(MARKERS)], markersize=6,
                linewidth=1.4, capsize=2, label=NAMES[place],
            )  # fmt: skip
        for fmt, offset in LABELS.items():
            point = rows[rows["family"] == f"uniform {fmt}"]
            axes.plot(
                point["matrix_bits"], point["kl"], "x", color=BLACK, markersize=9, markeredgewidth=2, zorder=5
            )
            for _, row in point.iterrows():
                axes.annotate(
                    UNIFORM.get(fmt, f"all {fmt}"),
                    (row["matrix_bits"], row["kl"]),
                    offset,
                    textcoords="offset points",
                    ha="right" if offset[0] < 0 else "left",
                )
        axes.set(
            xlabel="bits a weight over the planned matrices", ylabel="mean KL(16-bit ‖ plan), nats a token"
        )
        axes.set_yscale("log")
        axes.margins(x=0.14)
        figure.legend(loc="outside right center")
        headline(
            figure,
            finding(result["aims"]),
            f"{Path(str(result['model']['id'])).name}; {result['windows']} windows of {result['length']} "
            f"tokens of {result['text']}; bars: 95 % intervals over windows. Crosses: one format "
            "for every layer.",
        )
        return figure

    picture().savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="bundled", help="what models.resolve takes")
    parser.add_argument("--text", default="pydoc", help="what texts.load_text takes")
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--json", metavar="PATH", help="write the numbers there")
    parser.add_argument("--figure", metavar="PATH", help="draw them there")
    parser.add_argument("--folder", default="bench-out/formats", type=Path, help="for finished pieces")
    parser.add_argument(
        "--draw", metavar="JSON", help="show these numbers of an earlier run, measure nothing"
    )
    given = parser.parse_args()
    if given.draw:
        result = json.loads(Path(given.draw).read_text(encoding="utf-8"))
    else:
        result = benchmark(given.model, given.text, given.windows, given.length, given.folder)
    show(result)
    if given.json:
        write_json(given.json, result)
    if given.figure:
        draw(result, given.figure)


if __name__ == "__main__":
    main()
