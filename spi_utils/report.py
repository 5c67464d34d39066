"""report.html: a run on one page that can be sent to a colleague, and the figures that stand in it.

Self-contained (figures inline, no script, nothing fetched), readable in light and dark themes. Every sentence
with a number in it is made from the run's own files.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from spi_utils import runs, stats
from spi_utils.claims import Evaluation, audit, headline_of, size, switching_sentence
from spi_utils.figures.evaluation_figures import (
    kl_survival,
    predicted_and_real,
    quality_by_bytes,
    window_differences,
)
from spi_utils.figures.plotting import save_figure
from spi_utils.quantize import proof_by_use
from spi_utils.report_html import (
    Html,
    code,
    interval_cell,
    legend,
    p_cell,
    picture,
    section,
    signed,
    spread,
    table,
    text,
    verbatim,
    verdict_cell,
)
from spi_utils.report_runs import other_runs

HEADLINE = "quality_by_bytes"
FIGURES = {
    HEADLINE: quality_by_bytes,
    "window_differences": window_differences,
    "kl_survival": kl_survival,
    "predicted_and_real": predicted_and_real,
}
# Figures of notebook 02 that the report shows where they are there.
ANALYSIS = ("plan_map", "score_by_depth", "sensitivity", "frontier")


def figures(run: runs.Run) -> dict[str, Path]:
    """Draw and save the figures of the evaluation as it is now; older ones in the run are replaced.

    Returns:
        Figure name -> its PNG in the run's figures; an SVG lies beside it. `predicted_and_real` is there only
        if a sensitivity was computed.

    Raises:
        RunError: the run has no evaluation.
    """
    evaluation = Evaluation.read(run.evaluation_json)
    with _evaluated(run):
        drawn = {name: draw(evaluation) for name, draw in FIGURES.items()}
    for name, figure in drawn.items():
        if figure is None:  # what an earlier evaluation could show is not this one's
            for kind in ("png", "svg"):
                (run.figures / f"{name}.{kind}").unlink(missing_ok=True)
    return {name: save_figure(figure, run, name) for name, figure in drawn.items() if figure is not None}


def headline_figure(run: runs.Run) -> Path:
    """The PNG of quality against bytes, drawn from the evaluation as it is now."""
    evaluation = Evaluation.read(run.evaluation_json)
    with _evaluated(run):
        figure = quality_by_bytes(evaluation)
    return save_figure(figure, run, HEADLINE)


def headline(run: runs.Run) -> str:
    """The run in a few sentences: size, perplexity, what the selection is worth, and a better mix if any."""
    evaluation = Evaluation.read(run.evaluation_json)
    with _evaluated(run):
        return headline_of(evaluation)


def _evaluated(run: runs.Run) -> AbstractContextManager[None]:
    return runs.believing(run.evaluation_json, "evaluation", runs.NOTEBOOKS["evaluate"])


# --- the page --------------------------------------------------------------------------------------------


def write_report(run: runs.Run) -> Path:
    """Write report.html from the run's files, and return its path.

    Raises:
        RunError: the run has no evaluation; says which notebook to run.
    """
    evaluation = Evaluation.read(run.evaluation_json)
    info = runs.run_info(run)
    figures(run)
    with _evaluated(run):
        title, _ = f"{evaluation.model['id']}: what the hybrid is worth", evaluation.model["kind"]
    stages = {"quantize": {}, "evaluate": {}} | info["stages"]
    with runs.believing(run.info_json, "record of the stage quantize", runs.NOTEBOOKS["quantize"]):
        proof, answer = _proof(stages["quantize"]), _answer(stages["quantize"].get("proof"))
    with runs.believing(run.info_json, "record of the stage evaluate", runs.NOTEBOOKS["evaluate"]):
        speed = stages["evaluate"].get("speed")
        timed, environment = _speed_table(speed), _environment(stages["evaluate"], evaluation)
    with _evaluated(run):
        parts = [
            _top(evaluation, proof),
            _quality(run, evaluation),
            _selection(evaluation),
            _details(run),
            _claims(evaluation, speed),
            _other_texts(evaluation),
            other_runs(run),
            timed,
            answer,
            _tasks(evaluation),
            _analysis(run),
            _method(evaluation),
            environment,
        ]
    page = Template(resources.files("spi_utils").joinpath("report_page.html").read_text(encoding="utf-8"))
    body = "\n".join(filter(None, parts))
    runs.write_text(run.report, page.substitute(title=text(title), body=body))
    return run.report


def _top(evaluation: Evaluation, proof: str) -> str:
    plan, one = evaluation.plan, evaluation.variants["plan"]
    facts = {
        "weights on disk": size(plan["bytes_on_disk"]),
        "bits a weight, all · planned matrices": f"{plan['bits_per_weight']:.2f} · {plan['matrix_bits']:.2f}",
        "perplexity against 16-bit": f"×{one['perplexity_ratio'][0]:.3f}",
        "mean KL to 16-bit, nats a token, float32 from the file's tensors": f"{one['kl_mean']:.4f}",
        "tokens whose first choice stays": f"{one['same_top1']:.1%}",
    }
    tiles = (f'<div class="fact"><b>{text(v)}</b><span>{text(k)}</span></div>' for k, v in facts.items())
    return (
        f"<h1>{text(evaluation.model['id'])}</h1>"
        f'<p class="lead">{code(headline_of(evaluation))}</p>'
        f'<p class="advice">{code(switching_sentence(evaluation))}</p>'
        f'<div class="facts">{"".join(tiles)}</div>'
        f"{_handed_over(evaluation, proof)}"
        f'<p class="note">{text(plan["reason"])}{_gguf_note(evaluation)}</p>'
    )


def _proof(stage: Mapping[str, Any]) -> str:
    if stage.get("proof"):
        return proof_by_use(stage)
    notebook = runs.NOTEBOOKS["quantize"]
    return f"not proven: run notebook {notebook} where stock transformers can run the checkpoint"


def _handed_over(evaluation: Evaluation, proof: str) -> str:
    """The report's first table: is the file that is handed over the one that was measured?"""
    stock, one = evaluation.stock, evaluation.variants["plan"]
    rows = [["proof by use", proof]]
    if stock.get("agrees") is None:
        why = stock.get("reason", "this evaluation is older than that check: run 04_evaluate again")
        rows.append(["KL, stock as loaded", f"not measured: {why}"])
    else:
        where = f"the first {stock['windows']} windows of {stock['text']}"
        half = "not a number" if stock["kl_16bit"] is None else f"{stock['kl_16bit']:.4f}"
        said = f"{stock['kl']:.4f} on {where}; the 16-bit model loaded likewise: {half}"
        rows.append([f"KL, stock as loaded ({stock['dtype']} on {stock['device']})", said])
        rows.append(["KL, float32 from the file's tensors", f"{stock['kl_file']:.4f} on {where}"])
    shape = f"all {evaluation.text['windows']} windows of {evaluation.text['name']}"
    rows.append(["KL, float32 from the file's tensors", f"{one['kl_mean']:.4f} on {shape}"])
    return table(["the file that is handed over", "nats a token, to the 16-bit model"], rows, words=(0, 1))


def _gguf_note(evaluation: Evaluation) -> str:
    if evaluation.model["kind"] not in ("bundled", "gguf"):
        return ""
    return (
        " The 16-bit reference was read from a GGUF file: where that file is quantized, the reference "
        "already lies on its grid, which flatters formats that share the grid."
    )


LOSS_HEADS = ("variant", "size", "matrix bits", "perplexity", "Δ loss", "p (Holm)", "KL")
DIVERGENCE_HEADS = (
    *("variant", "KL median", "99 %", "99.9 %", "same top-1", "Δp mean", "Δp RMS", "predicted KL"),
    *("word perplexity", "byte perplexity"),
)
LOSS_MEANINGS = {
    "matrix bits": "bits a weight over the matrices that a plan decides on, the formats' overhead included",
    "Δ loss": "loss minus the 16-bit reference's on the same windows; above zero is worse",
    "p (Holm)": "how often chance alone would give a Δ loss this far from zero, corrected for all rows",
    "KL": "how far the predictions are from the 16-bit model's; zero is the same model. In float32 from the "
    "file's tensors, as all numbers here; the table at the top has the plan's as stock loads it",
}
DIVERGENCE_MEANINGS = {
    "KL median, 99 %, 99.9 %": "of single tokens: half, and all but 1 % or 0.1 % of them, lie below",
    "same top-1": "tokens for which the most probable next token is the 16-bit model's",
    "Δp mean, Δp RMS": "change of the probability given to the text's own next token: its mean, and the root "
    "of its mean square",
    "predicted KL": "what notebook 01's sensitivity foretold, before anything was quantized",
    "word, byte perplexity": "the same loss spread over words or bytes, for models with other tokenizers",
}
SELECTION_MEANINGS = {
    "loss − random's, KL − random's": "difference to the mean of the random selections; below zero is better",
    "p (Holm)": "how often chance alone would give a KL this far from random's, corrected for all rows",
    "KL beats": "of how many random selections this one has the lower KL",
    "miss in bytes": "its size minus the plan's, as a share of the 16-bit model's",
}


def _quality(run: runs.Run, evaluation: Evaluation) -> str:
    variants = evaluation.variants.values()
    return section(
        "Quality against bytes",
        "Loss and KL are in nats a token, float32 from the file's tensors, with 95 % intervals over windows "
        "below them. Δ loss is paired with the 16-bit reference, window by window; p is corrected for all "
        "rows. A lower perplexity with a high KL is a different model, not a better one.",
        picture(run.figures / f"{HEADLINE}.png"),
        table(LOSS_HEADS, [_loss_row(one) for one in variants], _marks(evaluation)),
        legend(LOSS_MEANINGS),
        *(f'<p class="note">Not scored: {text(k)}. {text(why)}</p>' for k, why in evaluation.skipped.items()),
        table(DIVERGENCE_HEADS, [_divergence_row(one) for one in variants], _marks(evaluation)),
        legend(DIVERGENCE_MEANINGS),
    )


def _loss_row(one: Mapping[str, Any]) -> list[str]:
    delta, bits = one.get("delta"), one["matrix_bits"]
    return [
        one["label"],
        size(one["bytes"]),
        "–" if bits is None else f"{bits:.2f}",
        f"{one['perplexity']:.3f}",
        interval_cell(delta),
        p_cell(delta and delta["p_holm"]),
        interval_cell(one.get("kl"), plus=False),
    ]


def _divergence_row(one: Mapping[str, Any]) -> list[str]:
    predicted = one["predicted_kl"]
    return [
        one["label"],
        f"{one['kl_median']:.4f}",
        f"{one['kl_p99']:.3f}",
        f"{one['kl_p999']:.3f}",
        f"{one['same_top1']:.1%}",
        signed(one["dp_mean"]),
        f"{one['dp_rms']:.4f}",
        "–" if predicted is None else f"{predicted:.4f}",
        f"{one['word_perplexity']:.1f}",
        f"{one['byte_perplexity']:.3f}",
    ]


def _selection(evaluation: Evaluation) -> str:
    held = {key: one for key, one in evaluation.variants.items() if "vs_random" in one}
    rows = []
    for one in held.values():
        beside = one["vs_random"]
        kl = stats.Estimate.from_dict(beside["kl"])
        rows.append(
            [
                one["label"],
                verdict_cell(stats.verdict(kl, "lower")),
                interval_cell(beside["kl"]),
                p_cell(kl.p_holm),
                f"{beside['kl_beats']} of {beside['controls']}",
                interval_cell(beside["nll"]),
                f"{100 * one['bytes_miss']:+.2f} %",
            ]
        )
    heads = ["at equal bytes", "better than random?", "KL − random's", "p (Holm)", "KL beats"]
    return section(
        "Is the selection worth something?",
        "A rule is worth something only if it beats random layers of the same size. The intervals hold for "
        "the random selections that were drawn.",
        table(
            [*heads, "loss − random's", "miss in bytes"],
            rows,
            ["plan" if key == "plan" else "" for key in held],
        ),
        legend(SELECTION_MEANINGS) if rows else "",
    )


def _details(run: runs.Run) -> str:
    pictures = [picture(run.figures / f"{name}.png") for name in FIGURES if name != HEADLINE]
    return section("Where the difference comes from", "", *pictures)


def _claims(evaluation: Evaluation, speed: Mapping[str, Any] | None) -> str:
    rows = [
        [code(row["stated"]), verdict_cell(row["verdict"]), code(row["measured"])]
        for row in audit(evaluation, speed)
    ]
    return section(
        "The claim, audited",
        "Verdicts are computed: from intervals over windows where chance is involved, else from whether the "
        "measured number rounds to the stated one.",
        table(["stated", "verdict", "measured here"], rows, words=(0, 1, 2)),
    )


def _other_texts(evaluation: Evaluation) -> str:
    parts = [
        f"<p>{text(_convention(other['text']))}</p>"
        + table(LOSS_HEADS, [_loss_row(one) for one in other["variants"].values()], _marks(evaluation))
        for other in evaluation.other_texts
    ]
    return section("Other texts", "", *parts) if parts else ""


def _speed_table(speed: Mapping[str, Any] | None) -> str:
    if not speed:
        return ""
    one = speed["plan"]
    modules = ", ".join(f"{count} {name}" for name, count in one["kernels"]["modules"].items())
    heads = ["batch 1", "prefill, tokens/s", "decode, tokens/s", "bandwidth allows", "first token, s"]
    rows = [_speed_row("16-bit model", speed["reference"]), _speed_row("this checkpoint", one)]
    return section(
        "Speed and memory",
        f"Median (least–most) of {one['repeats']} generations of {one['new_tokens']} tokens after "
        f"{one['prompt_tokens']}, on {one['device']} ({one['threads']} threads), with stock transformers "
        f"in {one['dtype']}, as the file ships ({modules}). The bound is the device's measured bandwidth "
        "over the bytes that a token reads.",
        table([*heads, "GB a token", "peak GB"], rows, ["", "plan"]),
    )


def _answer(proof: Mapping[str, Any] | None) -> str:
    """What the checkpoint said when notebook 03 used it, in a process of its own."""
    if not proof:
        return ""
    said = proof["generation"]
    return section(
        "What it says",
        f"Asked “{said['prompt']}”, the checkpoint as loaded by stock transformers ({proof['dtype']}, greedy"
        f"{', its own chat template' if said['chat_template'] else ''}) answers:",
        f"<blockquote>{verbatim(said['text'].strip())}</blockquote>",
    )


def _speed_row(label: str, one: Mapping[str, Any]) -> list[str]:
    memory = one["memory"].get("peak_allocated_gb", one["memory"]["peak_rss_gb"])
    return [
        label,
        spread(one["prefill"], ".0f"),
        spread(one["decode"], ".1f"),
        f"{one['decode_bound']:.0f}",
        spread(one["first_token_s"], ".2f"),
        f"{one['gb_per_token']:.2f}",
        f"{memory:.2f}",
    ]


def _tasks(evaluation: Evaluation) -> str:
    rows = [
        [task, variant, f"{score['value']:.3f} ± {score['stderr']:.3f}", str(score["samples"])]
        for task, scores in evaluation.tasks.items()
        for variant, score in scores.items()
    ]
    return (
        section("Tasks", "", table(["task", "variant", "accuracy ± s.e.", "samples"], rows)) if rows else ""
    )


def _analysis(run: runs.Run) -> str:
    pictures = [picture(run.figures / f"{name}.png") for name in ANALYSIS]
    return section("The layers and the plan", "", *pictures) if any(pictures) else ""


def _method(evaluation: Evaluation) -> str:
    return section(
        "How it was measured",
        _convention(evaluation.text),
        f"<p>Intervals: paired cluster bootstrap over windows, studentized, {stats.DRAWS:,} draws; below "
        f"{stats.MIN_CLUSTERS} windows no verdict is given. Arithmetic: {text(evaluation.kernel)}. All "
        "variants come from the same 16-bit weights; the plan alone is scored from the tensors of the saved "
        "checkpoint, each of which was compared with its source first.</p>",
    )


def _convention(held: Mapping[str, Any]) -> str:
    return (
        f"{held['source']}: {held['windows']} windows of {held['window_length']} tokens, {held['tokens']:,} "
        f"scored tokens ({held['words']:,} words, {held['bytes']:,} bytes); {held['convention']}."
    )


def _environment(stage: Mapping[str, Any], evaluation: Evaluation) -> str:
    found = stage.get("environment", {})
    versions = ", ".join(f"{name} {version}" for name, version in found.get("versions", {}).items())
    facts = {
        "model": f"{evaluation.model['id']} ({evaluation.model['kind']})",
        "revision": evaluation.model.get("revision") or "–",
        "machine": f"{found.get('machine')}, {found.get('cores')} cores, GPU: {found.get('gpu') or 'none'}",
        "versions": f"Python {found.get('python')}, {versions}",
        **{f"SHA-256 of {name}": value for name, value in evaluation.hashes.items()},
    }
    rows = [[name, Html(f'<span class="code">{text(value)}</span>')] for name, value in facts.items()]
    return section("Environment and hashes", "", table([], rows, words=(1,)))


def _marks(evaluation: Evaluation) -> list[str]:
    return ["plan" if key == "plan" else "" for key in evaluation.variants]
