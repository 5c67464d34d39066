"""report.html: a run on one page that can be sent to a colleague, and the figures that stand in it.

Self-contained (figures inline, no script, nothing fetched), readable in light and dark themes. Every sentence
with a number in it is made from the run's own files.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

from spi_utils import runs, stats
from spi_utils.claims import audit
from spi_utils.evaluate import Evaluation
from spi_utils.evaluation_figures import (
    kl_survival,
    predicted_and_real,
    quality_by_bytes,
    window_differences,
)
from spi_utils.plotting import gigabytes, save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HEADLINE = "quality_by_bytes"
FIGURES = {
    HEADLINE: quality_by_bytes,
    "window_differences": window_differences,
    "kl_survival": kl_survival,
    "predicted_and_real": predicted_and_real,
}
# Figures of notebook 02 that the report shows where they are there.
ANALYSIS = ("plan_map", "score_by_depth", "sensitivity", "frontier")
CAPTIONS = {"supported": "✓ supported", "refuted": "✗ refuted"}


def figures(run: runs.Run) -> list[Figure]:
    """Draw and save the evaluation's figures (PNG and SVG in the run's figures), and return them.

    Raises:
        RunError: the run has no evaluation.
    """
    evaluation = Evaluation.read(run.evaluation_json)
    drawn = {name: draw(evaluation) for name, draw in FIGURES.items()}
    for name, figure in drawn.items():
        if figure is not None:
            save_figure(figure, run, name)
    return [figure for figure in drawn.values() if figure is not None]


def headline_figure(run: runs.Run) -> Path:
    """The PNG of quality against bytes; drawn if it isn't there."""
    path = run.figures / f"{HEADLINE}.png"
    if not path.exists():
        save_figure(quality_by_bytes(Evaluation.read(run.evaluation_json)), run, HEADLINE)
    return path


def headline(run: runs.Run) -> str:
    """The run in two sentences: size, perplexity, KL, and whether the selection is worth something."""
    return _headline(Evaluation.read(run.evaluation_json))


def _headline(evaluation: Evaluation) -> str:
    variants, kept = evaluation.variants, evaluation.plan
    plan, reference = variants["plan"], variants["reference"]
    ratio, low, high = plan["perplexity_ratio"]
    saved = 1 - kept["bytes_on_disk"] / reference["bytes"]
    sentence = (
        f"{kept['protected']} of {kept['planned']} matrices in 16-bit, the others quantized: "
        f"{gigabytes(reference['bytes'])} become {gigabytes(kept['bytes_on_disk'])} (−{saved:.0%}), and "
        f"perplexity {reference['perplexity']:.2f} becomes {plan['perplexity']:.2f} "
        f"(×{ratio:.3f}, 95 % interval {low:.3f}–{high:.3f})."
    )
    held = plan.get("vs_random")
    if held is None:
        return sentence
    verdict = stats.verdict(stats.Estimate.from_dict(held["kl"]), "lower")
    meaning = {
        "supported": "the selection beats random layers at equal bytes",
        "refuted": "random layers at equal bytes do better",
        "not separable": "the selection can't be told from random layers at equal bytes",
    }[verdict]
    return f"{sentence} By KL to the 16-bit model, {meaning}."


def switching_sentence(evaluation: Evaluation) -> str:
    """What switching `score` to fisher would gain, from this run's own numbers."""
    score, variants = evaluation.plan["score"], evaluation.variants
    if score == "fisher":
        return "This plan already uses `fisher`: switching the score would gain nothing."
    if "fisher" not in variants:
        why = evaluation.skipped.get("fisher", "the control `fisher` was left out of this evaluation.")
        return f"What switching `score` to `fisher` would gain was not measured: {why}"
    plan, fisher = variants["plan"], variants["fisher"]
    paired = stats.paired(fisher["window_kl"], plan["window_kl"], seed=evaluation.settings["seed"])
    lower = 1 - fisher["kl_mean"] / plan["kl_mean"]
    verdict = stats.verdict(paired, "lower")
    change = f"lower the KL by {lower:.0%}" if lower >= 0 else f"raise the KL by {-lower:.0%}"
    sentence = (
        f"Switching `score` from `{score}` to `fisher` would, at the same bytes, {change}: from "
        f"{plan['kl_mean']:.4f} to {fisher['kl_mean']:.4f} nats a token (difference {paired.mean:+.4f}, 95 % "
        f"interval {paired.low:+.4f} … {paired.high:+.4f}; “fisher is better” is {verdict}), and the "
        f"perplexity from {plan['perplexity']:.3f} to {fisher['perplexity']:.3f}"
    )
    if "fisher_int8" in variants:
        sentence += f"; with int8 as a third tier the KL would be {variants['fisher_int8']['kl_mean']:.4f}"
    return f"{sentence}."


# --- the page --------------------------------------------------------------------------------------------


def write_report(run: runs.Run) -> Path:
    """Write report.html from the run's files, and return its path.

    Raises:
        RunError: the run has no evaluation; says which notebook to run.
    """
    evaluation = Evaluation.read(run.evaluation_json)
    info = runs.run_info(run)
    if not headline_figure(run).exists() or not all(_has(run, name) for name in FIGURES):
        figures(run)
    stage = info["stages"].get("evaluate", {})
    speed = stage.get("speed")
    parts = [
        _top(evaluation),
        _quality(run, evaluation),
        _selection(evaluation),
        _details(run),
        _claims(evaluation, speed),
        _other_texts(evaluation),
        _speed_table(speed),
        _tasks(evaluation),
        _analysis(run),
        _method(evaluation),
        _environment(info, evaluation),
        f'<p class="end">{_code(switching_sentence(evaluation))}</p>',
    ]
    page = Template(resources.files("spi_utils").joinpath("report_page.html").read_text(encoding="utf-8"))
    title = f"{evaluation.model['id']}: what the hybrid is worth"
    text = page.substitute(title=html.escape(title), body="\n".join(part for part in parts if part))
    runs.write_text(run.report, text)
    return run.report


def _has(run: runs.Run, name: str) -> bool:
    return name == "predicted_and_real" or (run.figures / f"{name}.png").exists()


def _top(evaluation: Evaluation) -> str:
    variants, plan = evaluation.variants, evaluation.plan
    one = variants["plan"]
    facts = {
        "weights on disk": gigabytes(plan["bytes_on_disk"]),
        "bits a weight, all · planned matrices": f"{plan['bits_per_weight']:.2f} · {plan['matrix_bits']:.2f}",
        "perplexity against 16-bit": f"×{one['perplexity_ratio'][0]:.3f}",
        "mean KL to 16-bit, nats a token": f"{one['kl_mean']:.4f}",
        "tokens whose first choice stays": f"{one['same_top1']:.1%}",
    }
    tiles = "".join(
        f'<div class="fact"><b>{_text(v)}</b><span>{_text(k)}</span></div>' for k, v in facts.items()
    )
    return (
        f"<h1>{_text(evaluation.model['id'])}</h1>"
        f'<p class="lead">{_text(_headline(evaluation))}</p><div class="facts">{tiles}</div>'
        f'<p class="note">{_text(plan["reason"])}{_gguf_note(evaluation)}</p>'
    )


def _gguf_note(evaluation: Evaluation) -> str:
    if evaluation.model["kind"] not in ("bundled", "gguf"):
        return ""
    return (
        " The 16-bit reference was read from a GGUF file: where that file is quantized, the reference already lies "
        "on its grid, which flatters formats that share the grid."
    )


def _quality(run: runs.Run, evaluation: Evaluation) -> str:
    heads = ["variant", "size", "matrix bits", "perplexity", "Δ loss (95 % interval)", "p (Holm)"]
    heads += ["KL mean", "median", "99 %", "99.9 %", "same top-1", "Δp RMS"]
    return _section(
        "Quality against bytes",
        "Loss and KL are in nats a token. A lower perplexity with a high KL is a different model, not a better "
        "one. Δ loss is paired with the 16-bit reference, window by window; p is corrected for all rows.",
        _picture(run, HEADLINE),
        _table(heads, [_quality_row(one) for one in evaluation.variants.values()], _marks(evaluation)),
        _skipped(evaluation),
    )


def _quality_row(one: Mapping[str, Any]) -> list[str]:
    delta = one.get("delta")
    bits = one["matrix_bits"]
    return [
        one["label"],
        gigabytes(one["bytes"]),
        "–" if bits is None else f"{bits:.2f}",
        f"{one['perplexity']:.3f}",
        "–" if delta is None else _interval(delta),
        "–" if delta is None else _p(delta["p_holm"]),
        f"{one['kl_mean']:.4f}",
        f"{one['kl_median']:.4f}",
        f"{one['kl_p99']:.3f}",
        f"{one['kl_p999']:.3f}",
        f"{one['same_top1']:.1%}",
        f"{one['dp_rms']:.4f}",
    ]


def _skipped(evaluation: Evaluation) -> str:
    return "".join(
        f'<p class="note">Not scored: {_text(key)}. {_text(why)}</p>'
        for key, why in evaluation.skipped.items()
    )


def _selection(evaluation: Evaluation) -> str:
    rows, marks = [], []
    for key, one in evaluation.variants.items():
        held = one.get("vs_random")
        if held is None:
            continue
        kl = stats.Estimate.from_dict(held["kl"])
        row = [one["label"], _interval(held["kl"]), _p(held["kl"]["p_holm"])]
        row += [_interval(held["nll"]), f"{held['kl_beats']} of {held['controls']}"]
        rows.append([*row, f"{one['bytes_miss']:+.2%}", _verdict(stats.verdict(kl, "lower"))])
        marks.append("plan" if key == "plan" else "")
    if not rows:
        return ""
    heads = ["at equal bytes", "KL − random's (95 % interval)", "p (Holm)", "loss − random's (95 % interval)"]
    return _section(
        "Is the selection worth something?",
        "A rule is worth something only if it beats random layers of the same size. Intervals are over windows, "
        "for the random selections that were drawn; the last but one column is the miss in bytes.",
        _table([*heads, "beats", "bytes", "better than random?"], rows, marks),
    )


def _details(run: runs.Run) -> str:
    pictures = [_picture(run, name) for name in FIGURES if name != HEADLINE]
    return _section("Where the difference comes from", "", *pictures)


def _claims(evaluation: Evaluation, speed: Mapping[str, Any] | None) -> str:
    rows = audit(evaluation, speed)
    body = "".join(
        f'<tr><td class="words">{_text(row["stated"])}</td><td class="words">{_text(row["measured"])}</td>'
        f"<td>{_verdict(row['verdict'])}</td></tr>"
        for row in rows
    )
    heads = '<tr><th class="words">stated</th><th class="words">measured here</th><th>verdict</th></tr>'
    return _section(
        "The claim, audited",
        "Verdicts are computed: from intervals over windows where chance is involved, else from whether the "
        "measured number rounds to the stated one.",
        f'<div class="scroll"><table><thead>{heads}</thead><tbody>{body}</tbody></table></div>',
    )


def _other_texts(evaluation: Evaluation) -> str:
    parts = []
    for other in evaluation.other_texts:
        rows = [_quality_row(one)[:7] for one in other["variants"].values()]
        heads = [
            "variant",
            "size",
            "matrix bits",
            "perplexity",
            "Δ loss (95 % interval)",
            "p (Holm)",
            "KL mean",
        ]
        parts.append(f"<p>{_text(_convention(other['text']))}</p>" + _table(heads, rows, _marks(evaluation)))
    return _section("Other texts", "", *parts) if parts else ""


def _speed_table(speed: Mapping[str, Any] | None) -> str:
    if not speed:
        return ""
    labels = {"reference": "16-bit model", "plan": "this checkpoint"}
    rows = []
    for key, label in labels.items():
        one = speed[key]
        memory = one["memory"].get("peak_allocated_gb", one["memory"]["peak_rss_gb"])
        rows.append(
            [
                label,
                _spread(one["prefill"], ".0f"),
                _spread(one["decode"], ".1f"),
                f"{one['decode_bound']:.0f}",
            ]
            + [_spread(one["first_token_s"], ".2f"), f"{one['gb_per_token']:.2f}", f"{memory:.2f}"]
        )
    one = speed["plan"]
    modules = ", ".join(f"{count} {name}" for name, count in one["kernels"]["modules"].items())
    heads = ["batch 1", "prefill, tokens/s", "decode, tokens/s", "bandwidth allows", "first token, s"]
    sample = (
        f"<p>The checkpoint continues “{_text(one['prompt'])}” with:</p><blockquote>{_text(one['sample'])}</blockquote>"
        if one.get("sample")
        else ""
    )
    return _section(
        "Speed and memory",
        f"Median (least–most) of {one['repeats']} generations of {one['new_tokens']} tokens after "
        f"{one['prompt_tokens']}, on {one['device']} ({one['threads']} threads), stock transformers: {modules}. "
        "The bound is the device's measured bandwidth over the bytes that a token reads.",
        _table([*heads, "GB a token", "peak GB"], rows, ["", "plan"]),
        sample,
    )


def _tasks(evaluation: Evaluation) -> str:
    rows = [
        [task, variant, f"{score['value']:.3f} ± {score['stderr']:.3f}", str(score["samples"])]
        for task, scores in evaluation.tasks.items()
        for variant, score in scores.items()
    ]
    return (
        _section("Tasks", "", _table(["task", "variant", "accuracy ± s.e.", "samples"], rows)) if rows else ""
    )


def _analysis(run: runs.Run) -> str:
    pictures = [_picture(run, name) for name in ANALYSIS if (run.figures / f"{name}.png").exists()]
    return _section("The layers and the plan", "", *pictures) if pictures else ""


def _method(evaluation: Evaluation) -> str:
    return _section(
        "How it was measured",
        _convention(evaluation.text),
        f"<p>Intervals: paired cluster bootstrap over windows, studentized, {stats.DRAWS:,} draws; below "
        f"{stats.MIN_CLUSTERS} windows no verdict is given. Arithmetic: {_text(evaluation.kernel)}. All variants "
        "come from the same 16-bit weights; the plan alone is scored from the tensors of the saved checkpoint, "
        "each of which was compared with its source first.</p>",
    )


def _convention(text: Mapping[str, Any]) -> str:
    return (
        f"{text['source']}: {text['windows']} windows of {text['window_length']} tokens, {text['tokens']:,} scored "
        f"tokens ({text['words']:,} words, {text['bytes']:,} bytes); {text['convention']}."
    )


def _environment(info: Mapping[str, Any], evaluation: Evaluation) -> str:
    environment = info["stages"].get("evaluate", {}).get("environment", {})
    versions = ", ".join(f"{name} {version}" for name, version in environment.get("versions", {}).items())
    rows = [["model", f"{evaluation.model['id']} ({evaluation.model['kind']})"]]
    rows += [["revision", evaluation.model["revision"]]] if evaluation.model.get("revision") else []
    rows += [
        [
            "machine",
            f"{environment.get('machine')}, {environment.get('cores')} cores, GPU {environment.get('gpu')}",
        ],
        ["versions", f"Python {environment.get('python')}, {versions}"],
        *([f"SHA-256 of {name}", value] for name, value in evaluation.hashes.items()),
    ]
    body = "".join(f'<tr><td>{_text(k)}</td><td class="code">{_text(v)}</td></tr>' for k, v in rows)
    return _section(
        "Environment and hashes", "", f'<div class="scroll"><table><tbody>{body}</tbody></table></div>'
    )


# --- pieces of HTML --------------------------------------------------------------------------------------


def _section(title: str, introduction: str, *parts: str) -> str:
    lead = f"<p>{_text(introduction)}</p>" if introduction else ""
    return f"<section><h2>{_text(title)}</h2>{lead}{''.join(parts)}</section>"


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]], marks: Sequence[str] = ()) -> str:
    """A table whose cells are text, or HTML that `_verdict` made; `marks` are the rows' classes."""
    top = "".join(f"<th>{_text(head)}</th>" for head in heads)
    body = ""
    for index, row in enumerate(rows):
        mark = f' class="{marks[index]}"' if index < len(marks) and marks[index] else ""
        cells = "".join(f"<td>{c if c.startswith('<span class=') else _text(c)}</td>" for c in row)
        body += f"<tr{mark}>{cells}</tr>"
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _marks(evaluation: Evaluation) -> list[str]:
    return ["plan" if key == "plan" else "" for key in evaluation.variants]


def _verdict(verdict: str) -> str:
    kind = verdict if verdict in CAPTIONS else "open"
    return f'<span class="verdict {kind}">{_text(CAPTIONS.get(verdict, verdict))}</span>'


def _picture(run: runs.Run, name: str) -> str:
    path = run.figures / f"{name}.png"
    if not path.exists():
        return ""
    data = base64.b64encode(path.read_bytes()).decode()
    label = name.replace("_", " ")
    return f'<figure><img alt="{label}" src="data:image/png;base64,{data}"></figure>'


def _interval(one: Mapping[str, Any]) -> str:
    low, high = ("unbounded" if one[end] is None else f"{one[end]:+.4f}" for end in ("low", "high"))
    return f"{one['mean']:+.4f} ({low} … {high})"


def _p(value: float | None) -> str:
    if value is None:
        return "–"
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _spread(values: Sequence[float], form: str) -> str:
    median, least, most = (format(value, form) for value in values)
    return f"{median} ({least}–{most})"


def _text(value: Any) -> str:
    return html.escape(str(value), quote=True)


def _code(sentence: str) -> str:
    """Escaped text in which `names` in backticks become code."""
    pieces = _text(sentence).split("`")
    return "".join(f"<code>{piece}</code>" if index % 2 else piece for index, piece in enumerate(pieces))
