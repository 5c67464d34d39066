"""The numbers in README and docs/, written from the runs and benchmarks that printed them.

    python scripts/readme_numbers.py claim=RUN small=RUN …   read finished runs, their figures too, and write
    python scripts/readme_numbers.py rounding=FILE,FILE      read what benchmarks/rounding.py wrote, and write
    python scripts/readme_numbers.py formats=FILE            read what benchmarks/formats.py wrote, and write
    python scripts/readme_numbers.py models=RUN,RUN          read a run of `claim` a model, and write
    python scripts/readme_numbers.py rivals=FILE,FILE        read what benchmarks/rivals.py wrote, and write
    python scripts/readme_numbers.py serving=FILE            read what benchmarks/serving.py wrote, and write
    python scripts/readme_numbers.py                         write the blocks from docs/results.json
    python scripts/readme_numbers.py --check                 say what would change; exit 1 if anything would

A block stands between `<!-- numbers:NAME -->` and `<!-- end -->`.
"""

from __future__ import annotations

import json
import math
import os
import platform
import re
import shutil
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
RESULTS = ROOT / "docs" / "results.json"
RIVALS = ROOT / "docs" / "rivals.json"
SERVING = ROOT / "docs" / "serving.json"
PAGES = [
    ROOT / "README.md",
    *(ROOT / "docs" / f"{name}.md" for name in ("results", "models", "rivals", "serving")),
]
PAGES = [path for path in PAGES if path.exists()]  # rivals.md from the day on which that table is whole
FIGURES = ("quality_by_bytes", "sensitivity")  # of the run `claim`
NUMBERS = ("label", "bytes", "matrix_bits", "perplexity", "kl_mean", "predicted_kl", "same_top1")
# What a preset is for, in README's order; the command's other half is the model.
PRESETS = {
    "claim": "the post's choice of layers, to see it for yourself",
    "small": "the smallest: NF4, its scales quantized too, a few layers in 16-bit",
    "balanced": "int4, int8 and 16-bit, mixed for the least damage",
    "near-lossless": "a model that answers as its 16-bit self does",
}


def read_run(folder: Path) -> dict[str, Any]:
    """What the pages say of one run."""
    evaluation = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    info = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    variants = {}
    for key, one in evaluation["variants"].items():
        variants[key] = {name: one[name] for name in NUMBERS if name in one}
        variants[key] |= {"kl": [one["kl"][x] for x in ("mean", "low", "high")]} if "kl" in one else {}
        variants[key] |= (
            {"delta": [one["delta"][x] for x in ("mean", "low", "high")]} if "delta" in one else {}
        )
    versus = evaluation["variants"]["plan"].get("vs_random", {}).get("kl")
    stages = info["stages"]
    return {
        "model": evaluation["model"]["id"],
        "text": {key: evaluation["text"][key] for key in ("name", "windows", "window_length")},
        "plan": {
            key: evaluation["plan"][key] for key in ("protected", "planned", "matrix_bits", "bytes_on_disk")
        },
        "reason": evaluation["plan"]["reason"],
        "better": next(row for row in evaluation["claims"] if row["key"] == "better"),
        "vs_random": versus and [versus[x] for x in ("mean", "low", "high")],
        "stock": evaluation["stock"],
        "variants": variants,
        "seconds": {name: stage["seconds"] for name, stage in stages.items()},
        "peak_gb": max(stage.get("peak_rss_gb") or 0 for stage in stages.values()),
        "versions": stages["evaluate"]["environment"]["versions"],
    }


def read_rounding(files: list[Path]) -> list[dict[str, Any]]:
    """The rows of several runs of benchmarks/rounding.py; of the same measurement the first."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for file in files:
        done = json.loads(file.read_text(encoding="utf-8"))
        for row in done["rows"]:
            row |= {name: done[name] for name in ("text", "windows", "length")}
            found.setdefault(tuple(row[name] for name in ("model", "format", "rounding", "tokens")), row)
    return list(found.values())


# --- blocks ------------------------------------------------------------------------------------------------


def interval(values: list[float], digits: int, sign: str = "+") -> str:
    """A mean with its interval: "+0.107 (+0.092 … +0.125)"."""
    mean, low, high = (f"{value:{sign}.{digits}f}".replace("-", "−") for value in values)
    return f"{mean} ({low} … {high})"


def size(count: float) -> str:
    """Bytes as the pages tell them."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def where(held: dict[str, Any], run: dict[str, Any]) -> str:
    """Model, text, windows, machine."""
    text = run["text"]
    return (
        f"{run['model']}, {text['windows']} windows × {text['window_length']} tokens of {text['name']}, "
        f"{held['machine']}, 95 % intervals over windows, float32 from the file's tensors"
    )


def against_random(difference: list[float]) -> str:
    """What the interval of a KL's difference to random layers says of a choice."""
    _, low, high = difference
    return "beats" if high < 0 else "is worse than" if low > 0 else "can't be told from"


def verdict(held: dict[str, Any]) -> str:
    """Three lines: the claim as stated, the choice of layers, what rounding gives."""
    run = held["runs"]["claim"]
    v = run["variants"]
    nearest, nf4 = v["plan_nearest"], v["nf4_nearest"]
    randoms = [one["kl_mean"] for key, one in v.items() if key.startswith("random_")]
    return "\n".join(
        (
            f"- **A hybrid better than its 16-bit self: {run['better']['verdict']}.** As the post rounds it, "
            f"perplexity goes from {v['reference']['perplexity']:.2f} to {nearest['perplexity']:.2f} "
            f"({interval(nearest['delta'], 3)} nats a token); pure NF4 is at {nf4['perplexity']:.2f}.",
            f"- **The choice by α {against_random(run['vs_random'])} random layers of the same size**: KL "
            f"{v['plan']['kl_mean']:.3f} against {sum(randoms) / len(randoms):.3f} (difference "
            f"{interval(run['vs_random'], 4)}). Predicted cost does better, "
            f"{v['fisher']['kl_mean']:.3f}; int8 everywhere is smaller still "
            f"({size(v['int8']['bytes'])} against {size(run['plan']['bytes_on_disk'])}) at "
            f"{v['int8']['kl_mean']:.3f}.",
            f"- **Rounding matters more than choosing.** Guided rounding takes NF4's KL from "
            f"{nf4['kl_mean']:.3f} to **{v['nf4']['kl_mean']:.3f}** and the claim's "
            f"plan from {nearest['kl_mean']:.3f} to {v['plan']['kl_mean']:.3f}: the same bytes, the same "
            "loaders.",
            "",
            f"({where(held, run)}.)",
        )
    )


def presets(held: dict[str, Any]) -> str:
    """What you want · what to type · size · KL."""
    rows = [
        "| preset | what you get | size | matrix bits | KL | of first choices kept |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, meaning in PRESETS.items():
        if name in held["runs"]:
            plan = held["runs"][name]["variants"]["plan"]
            rows.append(
                f"| `{name}` | {meaning} | {size(plan['bytes'])} | {plan['matrix_bits']:.2f} | "
                f"{interval(plan['kl'], 4, '')} | {plan['same_top1']:.1%} |"
            )
    first = next(iter(held["runs"].values()))
    reference = first["variants"]["reference"]
    rows += [
        "",
        f"(16-bit: {size(reference['bytes'])}. {where(held, first)}. Type "
        "`spi-utils run --preset small -p model …`, or set `preset` in notebook 00.)",
    ]
    return "\n".join(rows)


def run_table(held: dict[str, Any]) -> str:
    """Every variant of the run `claim`."""
    run = held["runs"]["claim"]
    rows = [
        f"{where(held, run)}. Every window begins with the start token. Δ loss is paired, in nats a "
        "token; KL is KL(16-bit ‖ variant). " + run["reason"],
        "",
        "| weights | MB | matrix bits | perplexity | Δ loss to 16-bit | mean KL | predicted "
        "| same top token |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for key, one in run["variants"].items():
        predicted = "" if one.get("predicted_kl") is None else f"{one['predicted_kl']:.4f}"
        delta = interval(one["delta"], 4) if "delta" in one else "0"
        mark = "**" if key == "plan" else ""
        rows.append(
            f"| {mark}{one['label']}{mark} | {one['bytes'] / 1e6:.0f} | {one['matrix_bits']:.2f} "
            f"| {one['perplexity']:.2f} | {delta} | {one['kl_mean']:.4f} | {predicted} "
            f"| {one['same_top1']:.1%} |"
        )
    stock = run["stock"]
    times = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in run["seconds"].items())
    rows += [
        "",
        f"Stock, as loaded ({stock['dtype']} on {stock['device']}), the checkpoint's KL is "
        f"{stock['kl']:.4f} on the first {stock['windows']} windows; from the file's tensors it "
        f"is {stock['kl_file']:.4f} there. Stages took {times}; the largest process "
        f"peaked at {run['peak_gb']:.1f} GB.",
    ]
    return "\n".join(rows)


FORMATS = {
    "nf4": "NF4",
    "nf4_dq": "NF4, double quantization",
    "int4_g64": "int4, groups of 64",
    "int4_g32": "int4, groups of 32",
}


def rounding(held: dict[str, Any]) -> str:
    """Nearest beside guided for every model of benchmarks/rounding.py, at its default number of tokens."""
    rows = [
        "| model, format | matrix bits | nearest | guided | ratio | own text, held out |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    found = {
        (one["model"], one["format"], one["rounding"], one["tokens"] // one["length"]): one
        for one in held["rounding"]
    }
    for (model, fmt, how, windows), one in found.items():
        if how == "guided":
            nearest = found[model, fmt, "nearest", 0]
            few = "" if windows == 32 else f", {windows} own windows"
            rows.append(
                f"| {model.split('/')[-1]}, {FORMATS[fmt]}{few} | {one['matrix_bits']:.2f} | "
                f"{kl_cell(nearest)} | {kl_cell(one)} | {one['kl'] / nearest['kl']:.2f} | "
                f"{nearest['kl_own']:#.3g} → {one['kl_own']:#.3g} |"
            )
    return "\n".join(rows)


def rounding_short(held: dict[str, Any]) -> str:
    """The first model's rows of `rounding`, a column a number of own windows: README's table."""
    model = held["rounding"][0]["model"]
    own = [one for one in held["rounding"] if one["model"] == model]
    found = {(one["format"], one["rounding"], one["tokens"] // one["length"]): one for one in own}
    counts = sorted({windows for _, how, windows in found if how == "guided"})
    heads = ["4-bit everywhere", "matrix bits", "nearest", *(f"guided, {n} own windows" for n in counts)]
    rows = [f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|"]
    for fmt in ("nf4", "int4_g64"):
        cells = [kl_cell(found[fmt, how, n]) for how, n in (("nearest", 0), *(("guided", n) for n in counts))]
        bits = found[fmt, "nearest", 0]["matrix_bits"]
        rows.append(f"| {FORMATS[fmt]} | {bits:.2f} | {' | '.join(cells)} |")
    first = own[0]
    shape = f"{first['windows']} windows × {first['length']} tokens"
    said = f"KL on {shape} of {first['text']}, {model.split('/')[-1]}"
    return "\n".join([*rows, "", f"({said}, `benchmarks/rounding.py`.)"])


def parts(held: dict[str, Any]) -> str:
    """What guided rounding is without one of its parts, beside itself."""
    lacking = {one["format"] for one in held["rounding"] if one["rounding"].startswith("guided, ")}
    rows = [one for one in held["rounding"] if one["rounding"].startswith("guided")]
    return tried({"tried": [one for one in rows if one["format"] in lacking]})


def tried(held: dict[str, Any]) -> str:
    """What was tried: damping, tokens, where they come from, and what goes beyond."""
    model = held["tried"][0]["model"]
    rows = [
        "| format | what | own tokens | KL | on own text, held out | seconds |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for one in held["tried"]:
        if one["model"] == model and one["rounding"] != "nearest":
            rows.append(
                f"| {FORMATS[one['format']]} | {one['rounding']} | {one['tokens']:,} | {kl_cell(one)} | "
                f"{one['kl_own']:.4f} | {one['seconds']:.0f} |"
            )
    return "\n".join(rows)


def kl_cell(one: dict[str, Any]) -> str:
    """A KL with its interval, three significant digits."""
    mean, low, high = (f"{value:#.3g}" for value in (one["kl"], *one["kl_ci"]))
    return f"{mean} ({low} … {high})"


def models(held: dict[str, Any]) -> str:
    """A row a model: what rounding gives, and the claim's choice beside random layers and predicted cost."""
    rows = [
        "| model | layers kept | NF4, nearest | NF4, guided | the claim's plan | random, mean (range) "
        "| difference | α | by predicted cost | int8 |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for run in (held["runs"]["claim"], *held.get("models", ())):
        v, plan = run["variants"], run["plan"]
        kl = {key: f"{one['kl_mean']:#.3g}" for key, one in v.items() if "kl_mean" in one}
        randoms = [one["kl_mean"] for key, one in v.items() if key.startswith("random_")]
        drawn = f"{sum(randoms) / len(randoms):#.3g} ({min(randoms):#.3g} … {max(randoms):#.3g})"
        difference = " … ".join(f"{value:+.2g}".replace("-", "−") for value in run["vs_random"][1:])
        against = against_random(run["vs_random"])
        rows.append(
            f"| {run['model'].split('/')[-1]} | {plan['protected']} of {plan['planned']} "
            f"| {kl['nf4_nearest']} | {kl['nf4']} | {kl['plan']} | {drawn} | {difference} | {against} random "
            f"| {kl['fisher']} | {kl['int8']} |"
        )
    return "\n".join(rows)


def formats(held: dict[str, Any]) -> str:
    """KL of every family of plans by matrix bits, and how far predictions were off."""
    from benchmarks.formats import FAMILIES, NAMES

    done = held["formats"]
    by = {(one["family"], one["budget"]): one for one in done["rows"]}
    budgets = sorted({one["budget"] for one in done["rows"] if one["budget"]})
    rows = [f"| KL at matrix bits | {' | '.join(f'{bits:g}' for bits in budgets)} |"]
    rows.append("| --- " * (len(budgets) + 1) + "|")
    for family, name in zip(FAMILIES, NAMES, strict=True):
        kls = (by.get((family.name, bits), {}).get("kl") for bits in budgets)
        rows.append(f"| {name} | {' | '.join('' if kl is None else f'{kl:#.3g}' for kl in kls)} |")
    uniform = [one for one in done["rows"] if not one["budget"]]
    each = "; ".join(
        f"{FORMATS.get(name := one['family'].removeprefix('uniform '), name)} {kl_cell(one)} at "
        f"{one['matrix_bits']:.2f} bits"
        for one in uniform
    )
    ratios = [one["predicted_kl"] / one["kl"] for one in done["rows"]]
    near = sum(abs(ratio - 1) <= 0.15 for ratio in ratios)
    text = (
        f"({Path(done['model']['id']).name}, {done['windows']} windows × {done['length']} tokens of "
        f"{done['text']}, `benchmarks/formats.py`. One format for every layer: {each}. Predicted KL over "
        f"the real one: {min(ratios):.2f} to {max(ratios):.2f}, of {len(ratios)} plans {near} within 15 %.)"
    )
    return "\n".join((*rows, "", text))


# --- beside the rivals -------------------------------------------------------------------------------------

TEXTS = {"own": "the model's own text", "real": "pydoc", "kind": "the evaluation's kind", "": "none"}
BUDGETS = (4.25, 4.5, 5.0, 6.0, 8.0)
OVER = 0.1  # bits that a row may be above its budget


def of_model(result: dict[str, Any]) -> str:
    """A model's caption."""
    return (
        f"**{result['model'].split('/')[-1]}**, {result['windows']} windows × {result['length']} tokens of "
        f"the first half of {result['text']}, {result['threads']} thread{'s' * (result['threads'] > 1)}"
    )


def rivals(held: dict[str, Any]) -> str:
    """Every rival of every model, by bits."""
    parts = []
    for result in held["rivals"]:
        rows = [
            of_model(result),
            "",
            "| quantizer | version | data | MB | matrix bits | KL | Δ loss | CPU min. | peak GB |",
            "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        ]
        for row in sorted(result["rows"], key=lambda row: row.get("matrix_bits", 99)):
            label = f"**{row['label']}**" if row["label"].startswith("ours") else row["label"]
            remark = f" ({row['remark']})" if row.get("remark") else ""
            if "kl" in row:
                rows.append(
                    f"| {label}{remark} | {row['version']} | {TEXTS[row.get('data', '')]} | "
                    f"{row['bytes'] / 1e6:.0f} | {row.get('matrix_bits', math.nan):.2f} | {kl_cell(row)} | "
                    f"{row['delta']:+.3f} | {row['cpu_seconds'] / 60:.1f} | {row['peak_gb']:.1f} |"
                )
            elif "perplexity_ratio" in row:
                rows.append(
                    f"| {label}{remark} | {row['version']} | as published |  | {row['matrix_bits']:.2f} |  | "
                    f"{math.log(row['perplexity_ratio']):+.3f} |  |  |"
                )
        failed = [f"{row['label']}: {row['error']}" for row in result["rows"] if "error" in row]
        parts += ["\n".join(rows), *([f"Not run: {'; '.join(failed)}."] if failed else [])]
    return "\n\n".join(parts)


def budgets(held: dict[str, Any]) -> str:
    """Who has the least KL within each budget."""
    rows = [
        "| model | matrix bits | ours | best without data | best with data |",
        "| --- | --- | --- | --- | --- |",
    ]
    for result in held["rivals"]:
        for bits in BUDGETS:
            cells = []
            for who in ("ours", "without", "with"):
                row = best(result, bits, who)
                cells.append(f"{row['label'].removeprefix('ours: ')}: {kl_cell(row)}" if row else "")
            rows.append(f"| {result['model'].split('/')[-1]} | {bits:g} | {' | '.join(cells)} |")
    return "\n".join(rows)


def best(result: dict[str, Any], bits: float, who: str) -> dict[str, Any] | None:
    """The row of least KL within a budget: "ours" as a writer holds it, rivals "without" or "with" data."""
    aside = ("ours_as", "ours_beside", "ours_recipe", "gguf_ours")  # for comparisons, no product
    fitting = [
        row
        for row in result["rows"]
        if "kl" in row and row.get("matrix_bits", 99) <= bits + OVER and not row["key"].startswith(aside)
    ]
    mine = [row for row in fitting if row["key"].startswith("ours")]
    others = [row for row in fitting if row not in mine and bool(row.get("data")) == (who == "with")]
    return min(mine if who == "ours" else others, key=lambda row: row["kl"], default=None)


def pairs(held: dict[str, Any]) -> str:
    """Paired differences that answer a question."""
    rows = [
        "| model | the first | the second | KL, first − second | ratio |",
        "| --- | --- | --- | --- | --- |",
    ]
    for result in held["rivals"]:
        told = {row["key"]: row for row in result["rows"]}
        for one in result["pairs"]:
            first, second = (
                f"{told[one[key]]['label']}, {told[one[key]]['matrix_bits']:.2f} bits, "
                f"{TEXTS[told[one[key]].get('data', '')]}"
                for key in ("first", "second")
            )
            rows.append(
                f"| {result['model'].split('/')[-1]} | {first} | {second} | "
                f"{interval(one['difference'], 4)} | {one['ratio']:.2f} |"
            )
    return "\n".join(rows)


def served(held: dict[str, Any]) -> str:
    """What ran, where and when."""
    run = held["serving"]
    versions = [next((row["version"] for row in run["vllm"] if "version" in row), "")]
    versions += [run["llamacpp"].get("version", ""), run["llamacpp"].get("tools", "")]
    versions += [row["version"] for row in run["lm_eval"] if "version" in row][:1]
    return (
        f"{run['date']}, {run['machine']}; {run['model']}, {run['tokens']} tokens of {run['text']} behind "
        f"the start token; transformers {run['transformers']}, {', '.join(filter(None, versions))}."
    )


def served_vllm(held: dict[str, Any]) -> str:
    """vLLM's log-probabilities beside transformers', a row a checkpoint and dtype."""
    rows = [
        "| checkpoint | layers | dtype | vLLM: mean, max | transformers: mean, max | apart: mean, max | "
        "same top token | same answer | as good |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    failed = {}
    run = held["serving"]
    for row in run["vllm"]:
        layers = run["plans"].get(row["checkpoint"], {}).get("held", "as published")
        if "error" in row:
            failed[row["checkpoint"]] = row["error"]
            cells = "did not load |  |  |  |  | no"
        else:
            gaps = [
                f"{row[name]['mean']:.4f}, {row[name]['max']:.3f}" for name in ("off", "stock_off", "apart")
            ]
            same, of = row["same_answer"]
            cells = f"{' | '.join(gaps)} | {row['same_top']} of {row['tokens']} | {same} of {of} | "
            cells += "yes" if row["as_good"] else "no"
        rows.append(f"| {row['checkpoint']} | {layers} | {row['dtype']} | {cells} |")
    return "\n".join([*rows, "", *(f"- {key}: `{error}`" for key, error in failed.items())])


def served_gguf(held: dict[str, Any]) -> str:
    """llama.cpp with our recipe."""
    run = held["serving"]["llamacpp"]
    if "error" in run:
        return f"Failed: `{run['error']}`"
    types = ", ".join(f"{count} {kind}" for kind, count in run["types"].items())
    rows = ["| file | mean, max difference | same top token | its answer |", "| --- | --- | --- | --- |"]
    for part, name in (("half", "16-bit"), ("recipe", f"by the recipe: {types}")):
        row = run[part]
        answer = " ".join(row["answer"].split())
        rows.append(
            f"| {name} | {row['mean']:.4f}, {row['max']:.3f} | {row['same_top']} of {row['tokens']} | "
            f"{answer} |"
        )
    scored = [f"{kl_cell(run[who])}" for who in ("scored", "ours")]
    return "\n".join(
        [
            *rows, "",
            f"KL to the 16-bit model, {run['windows']} windows × {run['length']} tokens, float32 from the "
            f"file's values: llama.cpp's rounding of this plan {scored[0]} at {run['matrix_bits']:.2f} "
            f"matrix bits ({size(run['bytes'])}), our own checkpoint of it {scored[1]}.",
        ]
    )  # fmt: skip


def served_tasks(held: dict[str, Any]) -> str:
    """lm-evaluation-harness on saved checkpoints."""
    rows = ["| checkpoint | continuation, accuracy | prose, word perplexity | samples |"]
    rows.append("| --- | --- | --- | --- |")
    for row in held["serving"]["lm_eval"]:
        if "error" in row:
            rows.append(f"| {row['checkpoint']} | failed: `{row['error']}` |  |  |")
            continue
        choice, prose = row["results"]["spi_continuation"], row["results"]["spi_prose"]
        rows.append(
            f"| {row['checkpoint']} | {choice['acc,none']:.3f} | {prose['word_perplexity,none']:.1f} | "
            f"{choice['samples']} and {prose['samples']} |"
        )
    return "\n".join(rows)


BLOCKS = {
    "served": served,
    "served_vllm": served_vllm,
    "served_gguf": served_gguf,
    "served_tasks": served_tasks,
    "verdict": verdict,
    "presets": presets,
    "run": run_table,
    "rounding": rounding,
    "rounding_short": rounding_short,
    "parts": parts,
    "tried": tried,
    "formats": formats,
    "models": models,
    "rivals": rivals,
    "rivals_budgets": budgets,
    "rivals_pairs": pairs,
}


def draw_rounding(held: dict[str, Any]) -> None:
    """docs/rounding.png: nearest and guided at the same bytes, every model and format that was measured."""
    from matplotlib.ticker import LogLocator, NullFormatter

    from spi_utils.figures import BLUE, VERMILLION, headline, new_figure, styled

    found = {(one["model"], one["format"], one["rounding"], one["tokens"]): one for one in held["rounding"]}
    default = 32 * held["rounding"][0]["length"]
    pairs = [
        (found[model, fmt, "nearest", 0], one)
        for (model, fmt, how, tokens), one in found.items()
        if how == "guided" and tokens in (default, 32 * one["length"])
    ]

    @styled
    def picture() -> Any:
        figure = new_figure(9.0, 1.6 + 0.32 * len(pairs))
        axes = figure.subplots()
        for label, place, color, marker in (("nearest", 0, VERMILLION, "s"), ("guided", 1, BLUE, "o")):
            rows = [pair[place] for pair in pairs]
            kl = [row["kl"] for row in rows]
            error = [
                [row["kl"] - row["kl_ci"][0] for row in rows],
                [row["kl_ci"][1] - row["kl"] for row in rows],
            ]
            axes.errorbar(
                kl,
                range(len(rows)),
                xerr=error,
                fmt=marker,
                color=color,
                capsize=2,
                markersize=6,
                label=label,
            )
        for height, (nearest, guided) in enumerate(pairs):
            axes.plot([guided["kl"], nearest["kl"]], [height, height], color="0.75", linewidth=2, zorder=0)
            axes.annotate(
                f"÷ {nearest['kl'] / guided['kl']:.1f}",
                ((nearest["kl"] * guided["kl"]) ** 0.5, height),
                (0, 3),
                textcoords="offset points",
                ha="center",
                fontsize=8,
            )
        axes.set_xscale("log")
        axes.set_yticks(
            range(len(pairs)),
            [
                f"{one['model'].split('/')[-1]}, {FORMATS[one['format']]} ({one['matrix_bits']:.2f} bits)"
                for _, one in pairs
            ],
        )
        axes.set_ylim(len(pairs) - 0.5, -0.7)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set(xlabel="mean KL(16-bit ‖ 4-bit), nats a token")
        axes.legend(loc="lower right")
        ratios = [nearest["kl"] / guided["kl"] for nearest, guided in pairs]
        headline(
            figure,
            f"At the same bytes guided rounding divides the KL by {min(ratios):.1f} to {max(ratios):.1f}",
            "Every matrix rounded; windows of WikiText-2 that nothing was chosen on; bars: 95 % intervals "
            "over windows.",
        )
        return figure

    picture().savefig(ROOT / "docs" / "rounding.png", dpi=110)


def pages(held: dict[str, Any]) -> dict[Path, str]:
    """Page -> its text with every block written anew, for pages that change."""
    found = {}
    for path in PAGES:
        old = path.read_text(encoding="utf-8")
        new = re.sub(
            r"(<!-- numbers:(\w+) -->\n).*?(<!-- end -->)",
            lambda match: f"{match[1]}{BLOCKS[match[2]](held)}\n{match[3]}",
            old,
            flags=re.DOTALL,
        )
        if new != old:
            found[path] = new
    return found


def main(arguments: list[str]) -> int:
    """Read runs, write pages, or check."""
    named = dict(one.split("=", 1) for one in arguments if "=" in one)
    if named:
        held: dict[str, Any] = {"runs": {}, "rounding": [], "models": []}
        if RESULTS.exists():
            held |= json.loads(RESULTS.read_text(encoding="utf-8"))
        held["machine"] = f"{os.cpu_count()} cores, {platform.machine()}, no GPU"
        if files := named.pop("rivals", ""):
            beside = [json.loads(Path(one).read_text(encoding="utf-8")) for one in files.split(",")]
            RIVALS.write_text(json.dumps(beside, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        if file := named.pop("serving", ""):
            ran = json.loads(Path(file).read_text(encoding="utf-8"))
            SERVING.write_text(json.dumps(ran, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        if files := named.pop("rounding", ""):
            held["rounding"] = read_rounding([Path(one) for one in files.split(",")])
            draw_rounding(held)
        if file := named.pop("formats", ""):
            held["formats"] = json.loads(Path(file).read_text(encoding="utf-8"))
        if folders := named.pop("models", ""):
            held["models"] = [read_run(Path(one)) for one in folders.split(",")]
        held["runs"] |= {name: read_run(Path(folder)) for name, folder in named.items()}
        RESULTS.write_text(json.dumps(held, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        for name in FIGURES if "claim" in named else ():
            shutil.copy(Path(named["claim"]) / "figures" / f"{name}.png", ROOT / "docs" / f"{name}.png")
    held = json.loads(RESULTS.read_text(encoding="utf-8"))
    beside = json.loads(RIVALS.read_text(encoding="utf-8")) if RIVALS.exists() else []
    ran = json.loads(SERVING.read_text(encoding="utf-8")) if SERVING.exists() else {}
    found = pages(held | {"rivals": beside, "serving": ran})
    for path, text in found.items():
        print(f"{'would change' if '--check' in arguments else 'wrote'} {path.relative_to(ROOT)}")
        if "--check" not in arguments:
            path.write_text(text, encoding="utf-8")
    return int(bool(found) and "--check" in arguments)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
