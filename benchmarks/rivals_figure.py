"""The figure of benchmarks/rivals.py: KL against matrix bits, ours as a line, a panel a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from scripts.readme_numbers import BUDGETS, best
from spi_utils.figures import (
    BLACK,
    BLUE,
    GREEN,
    ORANGE,
    PURPLE,
    SKY,
    VERMILLION,
    headline,
    new_figure,
    styled,
)

CURVE = ("ours_int4_g64", "ours_mix_4.5", "ours_mix_5", "ours_balanced", "ours_mix_6", "ours_mix_8")
POINTS = {
    "ours_nf4": "guided NF4",
    "ours_int4_g32": "guided int4, groups of 32",
    "ours_nf4_dq": "guided NF4, double quantization",
}
# A rival's rows by their key: legend, colour, marker.
FAMILIES = {
    "gguf_": ("llama.cpp", ORANGE, "s"),
    "hqq": ("HQQ", GREEN, "^"),
    "sinq": ("SINQ", PURPLE, "v"),
    "nncf": ("NNCF", SKY, "D"),
    "bnb": ("bitsandbytes", BLACK, "X"),
    "gptq": ("GPTQ", VERMILLION, "o"),
    "awq": ("AWQ", VERMILLION, "P"),
    "autoround": ("AutoRound", VERMILLION, "*"),
    "autoscheme": ("AutoScheme", VERMILLION, "d"),
}
WIDEST = 9.0  # bits; beyond, nothing is drawn


def scored(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The rows that have a KL, by key."""
    return {row["key"]: row for row in result["rows"] if "kl" in row}


def finding(results: list[dict[str, Any]]) -> str:
    """At how many budgets ours has the least KL of those that see no data."""
    won = all_ = 0
    for result in results:
        for bits in BUDGETS:
            mine, theirs = best(result, bits, "ours"), best(result, bits, "without")
            if mine and theirs:
                all_ += 1
                won += mine["kl"] < theirs["kl"]
    return f"Ours has less KL than every data-free rival at {won} of {all_} budgets"


@styled
def draw(results: list[dict[str, Any]]) -> Any:
    """KL against matrix bits; hollow markers saw data."""
    figure = new_figure(6.2 * len(results) + 2.2, 5.4)
    panels = figure.subplots(1, len(results), sharey=True, squeeze=False)[0]
    for axes, result in zip(panels, results, strict=True):
        rows = scored(result)
        line = sorted((rows[key] for key in CURVE if key in rows), key=lambda row: row["matrix_bits"])
        if line:
            bits, kl, low, high = np.array([[row["matrix_bits"], row["kl"], *row["kl_ci"]] for row in line]).T
            axes.errorbar(
                bits, kl, yerr=[kl - low, high - kl], color=BLUE, marker="o", markersize=7, linewidth=2,
                capsize=2, label="ours: int4 + int8 + 16-bit", zorder=4,
            )  # fmt: skip
        for place, (key, label) in enumerate(POINTS.items()):
            if key in rows:
                axes.plot(
                    rows[key]["matrix_bits"], rows[key]["kl"], "<>p"[place], color=BLUE, markersize=9,
                    label=f"ours: {label}", zorder=4,
                )  # fmt: skip
        for start, (label, colour, marker) in FAMILIES.items():
            for data in (False, True):
                found = [
                    row
                    for key, row in rows.items()
                    if key.startswith(start) and key != "gguf_ours" and bool(row.get("data")) == data
                    and row["matrix_bits"] <= WIDEST
                ]  # fmt: skip
                if found:
                    axes.plot(
                        [row["matrix_bits"] for row in found], [row["kl"] for row in found], marker,
                        markersize=8, markeredgewidth=1.5, color=colour,
                        markerfacecolor="white" if data else colour,
                        label=label + (" (saw data)" if data else ""),
                    )  # fmt: skip
        axes.set(yscale="log", xlabel="bits a weight over the quantized matrices")
        cut = f"{result['windows']} windows of {result['length']} tokens"
        axes.set_title(f"{Path(str(result['model'])).name}, {cut}", fontsize=10)
    panels[0].set_ylabel("mean KL(16-bit ‖ quantized), nats a token")
    handles: dict[str, Any] = {}
    for axes in panels:
        found_handles, labels = axes.get_legend_handles_labels()
        handles |= dict(zip(labels, found_handles, strict=True))
    names = sorted(handles, key=lambda name: not name.startswith("ours"))
    figure.legend([handles[name] for name in names], names, loc="outside right center")
    first = results[0]
    headline(
        figure,
        finding(results),
        f"{first['text']}; bars: 95 % intervals over windows. Hollow: calibrated on {first['own']} windows "
        "of own text, of pydoc, or of the evaluation's text (other half). Budgets: 4.25, 4.5, 5, 6, 8 bits.",
    )
    return figure
