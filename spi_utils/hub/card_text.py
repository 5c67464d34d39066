"""The text of the model card: what was measured, how to load it, what was not verified.

Every number is read from the run's own files; the prose around them is fixed, so that two runs of one model
give the same card.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from spi_utils.hub.card_facts import Facts, source_name
from spi_utils.plan import nominal_bits
from spi_utils.stats import Estimate, verdict

# (variant key of evaluation.json, row of the table); random_* is added as the mean over its seeds.
ROWS = {
    "reference": "16-bit (the base)",
    "nf4": "NF4 everywhere",
    "nf4_nearest": "NF4 everywhere, rounded to nearest as bitsandbytes does",
    "plan": "**this model**",
    "plan_nearest": "this model's layers, rounded to nearest as bitsandbytes does",
    "other_direction": "the score's other end, equal bytes",
    "fisher": "chosen by Fisher information, equal bytes",
    "fisher_int8": "chosen by Fisher information from NF4, 8-bit and 16-bit, equal bytes",
    "fisher_int4": "chosen by Fisher information from 4-bit integers, 8-bit and 16-bit, equal bytes",
    "int8": "8-bit everywhere",
    "int4": "4-bit integers (groups of 64) everywhere",
}
HEADER = """| weights | GB | perplexity | Δ loss to 16-bit (95 %) | mean KL | 99.9 % KL | same top token |
| --- | --- | --- | --- | --- | --- | --- |"""
EQUAL_BYTES = 0.005  # "equal bytes" as the evaluation's controls mean it
# What a backend does with the weights in memory, where a user would be surprised.
LOADED = {
    "bitsandbytes": "",
    "compressed-tensors": " transformers unpacks the weights to 16 bits at the first forward pass, so the "
    "file is small but the memory is not. A vLLM that knows this architecture keeps them packed (`vllm "
    "serve`, by its public source; not tried here).",
}
# What stats.verdict says of "a lower KL than random choices".
VERDICTS = {
    "supported": "the choice of layers matters.",
    "refuted": "the choice is worse than chance.",
    "not separable": "these windows cannot tell the choice from chance.",
}
# (pattern below figures/, what it shows); the first match of each is shown.
FIGURES = (("*plan*.png", "Which layers stay in 16-bit."), ("*bytes*.png", "Quality against bytes."))
CITATION = """```bibtex
@misc{moon-compactness,
  title = {Spectral Compactness Ensures Robustness in Low-Precision Neural Networks},
  author = {Moon, J.},
  doi = {10.21203/rs.3.rs-8880704/v1},
  note = {Preprint, not peer reviewed; the idea of choosing layers by their spectra}
}
@inproceedings{dettmers2023qlora,
  title = {{QLoRA}: Efficient Finetuning of Quantized {LLMs}},
  author = {Dettmers, Tim and Pagnoni, Artidoro and Holtzman, Ari and Zettlemoyer, Luke},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2023},
  note = {The NF4 data type}
}
```"""


def body(facts: Facts) -> str:
    """The card below its YAML: sections in the order in which a stranger asks."""
    sections = (_summary, _loading, _measured, _plan, _figures, _limits, _not_verified, _licence, _citation)
    return "\n\n".join(part for part in (section(facts) for section in sections) if part)


def _gb(count: float) -> str:
    return f"{count / 1e9:.3f}" if count < 1e9 else f"{count / 1e9:.2f}"


def _summary(facts: Facts) -> str:
    plan, rows = facts.plan, facts.layers
    planned = int(rows["quantizable"].sum())
    lower = " and ".join(sorted(set(plan["formats"].values()) - {"16bit"})) or "no lower format"
    rates = (
        f"{plan['bits_per_weight']:.2f} over all weights, {plan['matrix_bits']:.2f} over the planned matrices"
    )
    base = f"[{facts.base}](https://huggingface.co/{facts.base})" if facts.base else facts.base_name
    return f"""# {facts.repo_id.split("/")[-1]}

{base} with {len(plan["protected"])} of its {planned} weight matrices kept in 16-bit and the others
in {lower}. It is a plain transformers checkpoint: nothing but `transformers`, `accelerate` and
`{facts.backend}` is needed to load it.

For whom: for those who run {facts.base_name} where its 16-bit weights are too large, and who want to see what
the smaller file costs before using it.

| | |
| --- | --- |
| Parameters | {facts.parameters:,} (the page's own count is lower: it counts packed bytes) |
| Size of the weights | {_gb(facts.file_bytes)} GB (10⁹ bytes; exactly {facts.file_bytes:,}) |
| Bits a weight | {rates} |
| Base weights | SHA-256 `{facts.identity["sha256"]}`{_revision(facts)} |"""


def _revision(facts: Facts) -> str:
    revision = facts.identity.get("revision")
    return f", revision `{revision}`" if revision else ""


def _loading(facts: Facts) -> str:
    return f"""## Load it

```python
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("{facts.repo_id}", device_map="auto")
tokenizer = AutoTokenizer.from_pretrained("{facts.repo_id}")
```

`pip install transformers accelerate {facts.backend}` comes first. `generate.py` in this repository answers
a prompt and prints tokens a second and peak memory.{LOADED[facts.backend]}"""


def _measured(facts: Facts) -> str:
    text, variants = facts.evaluation["text"], facts.evaluation["variants"]
    lines = [_row(label, variants[key]) for key, label in ROWS.items() if key in variants]
    chance = _random_row(variants)
    if chance:
        lines.insert(min(3, len(lines)), chance)
    return f"""## What was measured

{_text_sentence(text)} Δ loss is the paired difference in nats a token; its interval comes from a
cluster bootstrap over the windows. KL is KL(16-bit ‖ variant) in nats a token. GB counts the weights.
The table is computed in float32 from the file's tensors.

{HEADER}
{chr(10).join(lines)}

{_stock(facts)}

{_verdict(facts)}"""


def _stock(facts: Facts) -> str:
    """The number of the model as a user loads it, beside the one from the file's tensors."""
    stock = facts.evaluation.get("stock") or {}
    if stock.get("agrees") is None:
        reason = stock.get("reason") or "the evaluation holds no such score"
        return f"**As loaded by stock transformers it was not scored** ({reason})."
    return f"""On the first {stock.get("windows")} of these windows ({stock.get("length")} tokens each):

| what was scored | mean KL to the 16-bit base in float32 |
| --- | --- |
| this model, **stock as loaded**: {_loaded_with(stock)} | {_kl(stock, "kl")} |
| this model, **float32 from the file's tensors** | {_kl(stock, "kl_file")} |
| the 16-bit base, stock as loaded in {stock.get("dtype")} | {_kl(stock, "kl_16bit")} |"""


def _loaded_with(stock: Mapping[str, Any]) -> str:
    return f"{stock.get('dtype')} on {stock.get('device')}, transformers {stock.get('transformers')}"


def _kl(stock: Mapping[str, Any], key: str) -> str:
    value = stock.get(key)
    return f"{value:.4f}" if isinstance(value, int | float) else "not a number"


def _text_sentence(text: Mapping[str, Any]) -> str:
    return (
        f"Text: {source_name(text)} (SHA-256 `{str(text['sha256'])[:16]}…`), {text['windows']} windows of "
        f"{text['window_length']} tokens. Convention: {text['convention']}."
    )


def _row(label: str, variant: Mapping[str, Any]) -> str:
    delta = variant.get("delta")
    cells = (
        label,
        _gb(variant["bytes"]),
        f"{variant['perplexity']:.3f}",
        "0" if delta is None else _interval(delta),
        f"{variant['kl_mean']:.4f}",
        f"{variant['kl_p999']:.3f}",
        f"{100 * variant['same_top1']:.1f} %",
    )
    return "| " + " | ".join(cells) + " |"


def _interval(delta: Mapping[str, Any]) -> str:
    ends = ("unbounded" if delta[end] is None else f"{delta[end]:+.4f}" for end in ("low", "high"))
    return f"{delta['mean']:+.4f} ({' … '.join(ends)})"


def _randoms(variants: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [value for key, value in sorted(variants.items()) if key.startswith("random")]


def _random_row(variants: Mapping[str, Any]) -> str | None:
    """Mean over the random selections; the range of their Δ loss in place of an interval."""
    draws = _randoms(variants)
    if not draws:
        return None
    mean = {key: statistics.fmean(draw[key] for draw in draws) for key in ("bytes", "perplexity", "kl_mean")}
    tail = statistics.fmean(draw["kl_p999"] for draw in draws)
    top = statistics.fmean(draw["same_top1"] for draw in draws)
    deltas = [draw["delta"]["mean"] for draw in draws]
    delta = f"{statistics.fmean(deltas):+.4f} (seeds: {min(deltas):+.4f} … {max(deltas):+.4f})"
    return (
        f"| random layers, equal bytes (mean of {len(draws)}) | {_gb(mean['bytes'])} | "
        f"{mean['perplexity']:.3f} | {delta} | {mean['kl_mean']:.4f} | {tail:.3f} | {100 * top:.1f} % |"
    )


def _verdict(facts: Facts) -> str:
    """What the windows say about the choice of layers: the evaluation's interval, and the verdict from it."""
    variants = facts.evaluation["variants"]
    against = variants["plan"].get("vs_random")
    if against is None:
        return "No random choice at equal bytes was measured: nothing here says that the choice matters."
    said = VERDICTS[verdict(Estimate.from_dict(against["kl"]), "lower")]
    return (
        f"Against the mean of {against['controls']} random layer choices at equal bytes, this one's "
        f"mean KL differs by {_interval(against['kl'])} nats a token: **{said}** "
        f"It beats {against['kl_beats']} of them.{_rivals(variants)}"
    )


def _rivals(variants: Mapping[str, Any]) -> str:
    """Rows of the table that are no larger than this model and nearer to the base, said in words."""
    own = variants["plan"]
    better = [
        label
        for key, label in ROWS.items()
        if key in variants and key != "plan"
        if variants[key]["bytes"] <= own["bytes"] * (1 + EQUAL_BYTES)
        if variants[key]["kl_mean"] < own["kl_mean"]
    ]
    return f" No larger and nearer to the base: {'; '.join(better)}." if better else ""


def _plan(facts: Facts) -> str:
    plan, rows = facts.plan, facts.layers[facts.layers["quantizable"]]
    held = rows["name"].map(plan["formats"])
    used = sorted(set(held), key=nominal_bits, reverse=True)
    lines = [
        f"| `{kind}` | {' | '.join(str(int((of == fmt).sum())) for fmt in used)} |"
        for kind, of in held.groupby(rows["type"], sort=False)
    ]
    depths = sorted(rows.loc[held == "16bit", "depth"].unique())
    span = f" The 16-bit layers lie in blocks {depths[0]} to {depths[-1]}." if depths else ""
    value = "" if plan.get("value") is None else f", value {plan['value']:g}"
    reason = f"\n\n{plan['reason']}" if plan.get("reason") else ""
    return f"""## The plan

Decided by the score `{plan["score"]}`, whose **{plan["direction"]}** end is protected
(rule `{plan["rule"]}`{value}).{span} `plan.json` names every module, `layers.csv` holds each one's
statistics and `evaluation.json` the losses of every window.{reason}

| layers by type | {" | ".join(used)} |
| ---{" | ---" * len(used)} |
{chr(10).join(lines)}"""


def _figures(facts: Facts) -> str:
    return "\n\n".join(f"![{caption}]({path})\n\n*{caption}*" for path, caption in _pick(facts.figures))


def _pick(figures: Iterable[str]) -> list[tuple[str, str]]:
    """The figures that the card shows, with their captions."""
    paths = [Path(figure) for figure in figures]
    found = ((next((p for p in paths if p.match(pattern)), None), caption) for pattern, caption in FIGURES)
    return [(path.as_posix(), caption) for path, caption in found if path is not None]


def _limits(facts: Facts) -> str:
    text = facts.evaluation["text"]
    others = facts.evaluation["other_texts"]
    points = [
        f"Measured on {1 + len(others)} text{'s' if others else ''}, in windows of {text['window_length']} "
        "tokens: other domains, languages and longer contexts may lose more or less.",
        "A lower perplexity than the base's, where the table shows one, is chance or a different model, not "
        "a better one; the KL says how different.",
        "Whatever the base does wrong, this does too.",
    ]
    if facts.identity["kind"] in ("bundled", "gguf"):
        points.append(
            "The base weights used here were read from a GGUF file, so the “16-bit” row is that file's "
            "content, rounded where the file is quantized, not the original training result."
        )
    return "## Limits\n\n" + "\n".join(f"- {point}" for point in points)


def _not_verified(facts: Facts) -> str:
    kernel = facts.evaluation.get("kernel") or facts.evaluation.get("kernel_path")
    run_on = f" (they were measured with: {kernel})" if isinstance(kernel, str) else ""
    points = [
        f"speed, memory and outputs on hardware other than the measuring machine's{run_on}",
        "downstream tasks, instruction following, safety behaviour, tool use",
        f"contexts longer than {facts.evaluation['text']['window_length']} tokens",
        f"loaders other than transformers with {facts.backend} (vLLM, llama.cpp, MLX, …), and fine-tuning",
    ]
    return "## Not verified\n\n" + "\n".join(f"- {point}" for point in points)


def _licence(facts: Facts) -> str:
    licence = facts.licence
    stated = " **The publisher stated this; it was not read from the base.**" if licence.stated else ""
    condition = f"\n\n{licence.condition}" if licence.condition else ""
    return f"## Licence\n\nThe base's: `{licence.id or 'unknown'}` — {licence.found}.{stated}{condition}"


def _citation(facts: Facts) -> str:
    made = f"[spi-utils]({facts.repository})" if facts.repository else "spi-utils"
    return f"## Citation\n\nMade with {made}; cite the base model as its authors ask, and\n\n{CITATION}"
