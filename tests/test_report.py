"""The report and the evaluation's figures, from numbers with known meaning; no model is loaded."""

import html
import json
import re
from copy import deepcopy
from functools import cache

import numpy as np
import pytest
from IPython.display import HTML

from spi_utils import evaluate, figures, report, runs
from spi_utils.claims import Evaluation, audit
from spi_utils.errors import RunError
from spi_utils.scoring import TokenScores
from tests.synthetic import layer_table

WINDOWS, TOKENS = 24, 40
KL = {
    **{"reference": 0.0, "nf4": 0.33, "plan": 0.12, "other_direction": 0.16, "fisher": 0.05, "int8": 0.004},
    **{f"random_{seed}": 0.18 + 0.01 * seed for seed in range(5)},
}
EQUAL = ("plan", "other_direction", "fisher", *(f"random_{seed}" for seed in range(5)))
SIZES = {"reference": 269e6, "nf4": 117e6, "int8": 164e6}
PLAN = {
    **{"score": "alpha_hill", "direction": "high", "rule": "claim", "reason": "The flattest 109 stay."},
    **{"protected": 109, "planned": 210, "weights": 134_515_008, "matrix_weights": 106_168_320},
    **{"protected_weights": 60_000_000, "bytes": {"total": 205_000_000}, "bytes_on_disk": 205_043_671},
    **{"bits_per_weight": 12.2, "matrix_bits": 11.2, "predicted_kl": 0.11, "double_quant": False},
}
SPEED = {
    **{"device": "x86_64", "threads": 2, "repeats": 5, "prompt_tokens": 128, "new_tokens": 32},
    "dtype": "bfloat16",
    **{"prefill": [100.0, 90.0, 110.0], "decode": [20.0, 19.0, 21.0], "first_token_s": [1.2, 1.1, 1.3]},
    **{"gb_per_token": 0.2, "bandwidth_gb_s": 20.0, "decode_bound": 100.0, "memory": {"peak_rss_gb": 0.8}},
    **{"kernels": {"modules": {"torch.Linear": 110}}},
}


COUNTS = {"words": 600, "bytes": 4000}


@cache
def _variants():
    """Token scores are drawn: KL as in the table above, loss half of it and noise."""
    rng, variants = np.random.default_rng(0), {}
    base = rng.gamma(2, 1.5, (WINDOWS, TOKENS)).astype(np.float32)
    for key, mean in KL.items():
        kl = (mean * rng.gamma(1, 1, (WINDOWS, TOKENS))).astype(np.float32)
        noise = (0.2 * mean * rng.normal(size=(WINDOWS, TOKENS))).astype(np.float32)
        scores = TokenScores(base + kl / 2 + noise, kl, rng.random(base.shape) > mean, noise / 10)
        variants[key] = {
            **{"label": "the plan (alpha_hill, high)" if key == "plan" else key, "layers": {}},
            **{"bytes": int(SIZES.get(key, 205e6)), "bits_per_weight": 12.2, "matrix_bits": 11.2},
            **{"predicted_kl": None if key == "reference" else 0.9 * KL[key], "bytes_miss": 0.0},
            **{"equal_bytes": key in EQUAL, **evaluate.variant_numbers(scores, COUNTS)},
        }
    evaluate.compare(variants)
    return variants


def make_evaluation(**changes):
    """An evaluation with the variants above."""
    shape = {"tokens": WINDOWS * TOKENS, "windows": WINDOWS, "window_length": TOKENS + 1, "start_token": 1}
    text = {"name": "pydoc", "source": "pydoc topics", "sha256": "6" * 64, "convention": "disjoint windows"}
    parts = ("weights", "layers", "plan", "checkpoint", "code", "text:pydoc")
    held = {
        "model": {"id": "someone/<script>", "kind": "gguf", "revision": None, "sha256": "5" * 64},
        "settings": {"seed": 0, "profile": "quick", "dtype": "float32", "device": "cpu"},
        **{"plan": PLAN, "text": text | shape | COUNTS, "variants": deepcopy(_variants()), "other_texts": []},
        **{"skipped": {"fisher_int8": "no sensitivity"}, "checkpoint": {"nf4": 101, "16bit": 109}},
        **{"checkpoint_sha256": "7" * 64, "hashes": dict.fromkeys(parts, "8" * 64), "kernel": "by torch"},
    }
    return Evaluation(**{**held, **changes})


@pytest.fixture(scope="module")
def evaluation():
    return make_evaluation()


PROOF = {
    **{"dtype": "bfloat16", "device": "cpu", "transformers": "5.1", "text": "pydoc", "tokens": 1024},
    "generation": {"prompt": "Why?", "chat_template": True, "text": "Because <b>.", "tokens": 3},
}
STOCK = {
    **{"dtype": "bfloat16", "device": "cpu", "text": "pydoc", "windows": 4, "agrees": True},
    **{"kl": 0.1234, "kl_file": 0.1212, "kl_16bit": None},
}


def make_run(folder, evaluation):
    made = runs.open_run(folder, evaluation.model)
    with runs.stage(made, "evaluate", {}, ["evaluation.json"]) as stage:
        evaluation.write(made.evaluation_json)
        stage.record(speed={"plan": SPEED, "reference": SPEED})
    return made


@pytest.fixture(scope="module")
def reported(tmp_path_factory, evaluation):
    """A run with its report, in full; never written into."""
    run = make_run(tmp_path_factory.mktemp("report") / "run", evaluation)
    return run, report.write_report(run).read_text("utf-8")


@pytest.fixture
def run(tmp_path, evaluation, monkeypatch):
    """A run whose figures are drawn, but not rendered."""

    def save(figure, run, name):
        runs.write_text(run.figures / f"{name}.png", str(id(figure)))
        return run.figures / f"{name}.png"

    monkeypatch.setattr(figures, "save_figure", save)
    return make_run(tmp_path / "run", evaluation)


def words_of(page):
    """What a reader sees of a page."""
    bare = re.sub(r"<(style|title).*?</\1>|<[^>]+>", " ", page, flags=re.DOTALL)
    return " ".join(html.unescape(bare).split())


def test_the_report_is_whole_and_fetches_nothing(reported, evaluation):
    run, page = reported
    seen, sources = words_of(page), re.findall(r'(?:src|href)="(.{30})', page)
    assert len(sources) == 4 and all(source.startswith("data:image/png;base64,iVBOR") for source in sources)
    assert {path.suffix for path in run.figures.iterdir()} == {".png", ".svg"}
    for words in (
        *("someone/<script>", "Not scored: fisher_int8", "8" * 64, "disjoint windows"),
        *("KL are in nats a token, float32, from the file's tensors", "in bfloat16, as the file ships"),
        *(row["stated"] for row in audit(evaluation) if "`" not in row["stated"]),
    ):
        assert words in seen
    assert seen.index("109 of 210 matrices") < seen.index("Quality against bytes")
    assert not re.search(r"(?<![\w.])-\d", seen)
    for head in ("p (Holm)", "Δp mean, Δp RMS", "KL beats", "miss in bytes"):
        assert f"<dt>{head}</dt>" in page


def test_notebooks_show_the_reports_own_tables(reported, evaluation):
    """The same cells in the same words, the plan highlighted, columns explained, nothing that runs."""
    speed = {"plan": SPEED, "reference": SPEED}
    for shown in (report.table_html(evaluation), report.claims_html(evaluation, speed)):
        assert isinstance(shown, HTML) and "<script" not in shown.data
        for table in re.findall(r"<table>.*?</table>", shown.data, re.DOTALL):
            assert table in reported[1]
        assert '<dl class="legend">' in shown.data
    numbers = report.table_html(evaluation).data
    assert numbers.count("<tr class=plan>") == 2 and ">100 %<" in numbers and ">1.0000<" not in numbers


def test_the_first_table_is_about_the_file_that_is_handed_over(run, evaluation):
    def first_table():
        page = report.write_report(run).read_text(encoding="utf-8")
        return words_of(page[page.index("<table") : page.index("</table>")])

    unknown = first_table()
    assert "not proven: run notebook 03_quantize" in unknown and "not measured: this evaluation is" in unknown
    with runs.stage(run, "quantize", {}, []) as stage:
        stage.record(proof=PROOF)
    with runs.stage(run, "analyze", {}, []) as stage:
        stage.record(sensitivity={"rounding_exceptions": "the exceptions: 2 with damping 0.5"})
    make_evaluation(stock=STOCK).write(run.evaluation_json)
    known = first_table()
    for words in (
        *("proven by use: transformers 5.1, bfloat16 on cpu", "stock, as loaded (bfloat16 on cpu)"),
        *("0.1234 on the first 4 windows", "tensors 0.1212", "likewise: not a number"),
        f"tensors {evaluation.variants['plan']['kl_mean']:.4f} on all 24 windows",
    ):
        assert words in known
    make_evaluation(stock={"agrees": None, "reason": "no GPU"}).write(run.evaluation_json)
    assert "not measured: no GPU" in first_table()
    assert "the exceptions: 2 with damping 0.5" in run.report.read_text(encoding="utf-8")


DELETED = object()


@pytest.mark.parametrize(
    ("file", "path", "value", "notebook"),
    [
        ("evaluation.json", ("variants", "plan"), DELETED, "04_evaluate"),
        ("evaluation.json", ("variants", "nf4", "perplexity"), "seven", "04_evaluate"),
        ("evaluation.json", ("variants", "int8", "window_nll"), None, "04_evaluate"),
        ("evaluation.json", ("settings",), DELETED, "04_evaluate"),
        ("run.json", ("stages",), None, "01_analyze"),
        ("run.json", ("stages", "evaluate", "speed", "plan", "decode"), DELETED, "04_evaluate"),
        ("run.json", ("stages", "evaluate", "environment"), "seven", "04_evaluate"),
        ("run.json", ("stages", "quantize", "proof", "generation"), DELETED, "03_quantize"),
    ],
)
def test_damaged_files_are_told_in_one_sentence(run, file, path, value, notebook):
    with runs.stage(run, "quantize", {}, []) as stage:
        stage.record(proof=PROOF)
    whole = held = json.loads((run.path / file).read_text())
    for key in path[:-1]:
        held = held[key]
    held[path[-1]] = value
    if value is DELETED:
        del held[path[-1]]
    (run.path / file).write_text(json.dumps(whole))
    with pytest.raises(RunError, match=rf"{file}\b.*{notebook}") as told:
        report.write_report(run)
    assert "\n" not in str(told.value) and not run.report.exists()


def test_the_headline_is_the_runs_own_numbers(run, evaluation):
    plan = evaluation.variants["plan"]
    headline = report.headline(run)
    assert "109 of 210 matrices" in headline and "269 MB become 205 MB (−24%)" in headline
    assert f"{plan['perplexity']:.2f}" in headline and "beats random layers" in headline


def test_figures_show_every_variant_at_its_size_with_its_interval(evaluation):
    figure = figures.quality_by_bytes(evaluation)
    left, right = figure.axes
    assert len(left.containers) == len(KL) and len(right.containers) == len(KL) - 1
    labels = [label.get_text() for label in figure.legends[0].get_texts()]
    assert labels.count("random, equal bytes") == 1 and len(labels) == len(KL) - 4
    drawn = {c.get_label(): c[0].get_xydata()[0] for c in right.containers}
    assert drawn["fisher"].tolist() == pytest.approx([205, evaluation.variants["fisher"]["kl_mean"]])
    draws = [c[0].get_xdata()[0] for c in left.containers if c.get_label().startswith("random")]
    assert draws == pytest.approx([205] * len(draws))
    axes = figures.window_differences(evaluation).axes[0]
    assert len(axes.lines) == 6
    for line in axes.lines[:5]:
        assert len(line.get_ydata()) == WINDOWS and np.all(np.diff(line.get_ydata()) >= 0)


def test_figures_follow_the_present_evaluation(run, evaluation):
    """A picture of an earlier evaluation is never shown: redrawn, or gone where it can't be drawn."""
    assert report.figures(run) == {name: run.figures / f"{name}.png" for name in report.FIGURES}
    first = report.headline_figure(run).read_text()
    variants = {key: {**one, "predicted_kl": None} for key, one in evaluation.variants.items()}
    make_evaluation(variants=variants).write(run.evaluation_json)
    report.write_report(run)
    assert not list(run.figures.glob("predicted_and_real.*"))
    assert (run.figures / "quality_by_bytes.png").read_text() != first


def test_minus_signs_escapes_and_open_intervals():
    pieces = report._pieces()
    negative = "−0.5, -0.00 %, (-1 … -0.2), 2018-01-22, smollm2-135m"
    cells = pieces.row([negative, "<&>"], plan=True, words=(1,))
    seen = "<tr class=plan><td>−0.5, −0.00 %, (−1 … −0.2), 2018-01-22, smollm2-135m</td>"
    assert cells.strip() == f"{seen}<td class=words>&lt;&amp;&gt;</td></tr>"
    assert report.code("use `x<y` now") == "use <code>x&lt;y</code> now"
    for end in (None, np.nan):
        open_end = {"mean": 0.5, "low": end, "high": 1.0}
        assert pieces.interval(open_end) == "+0.5000<br><small>unbounded … +1.0000</small>"
    html = pieces.answer({"generation": {**PROOF["generation"], "prompt": "Why <b>?"}, "dtype": "bfloat16"})
    assert "Because &lt;b&gt;." in html and "Why &lt;b&gt;?" in html and "bfloat16" in html


def test_a_layer_table_explains_its_columns_and_statuses():
    rows = layer_table(8)[["name", "rows", "status", "alpha_pl", "fisher_nf4"]]
    shown = report.layers_html(rows)
    words = words_of(shown.data)
    assert "model.embed_tokens" in words and "–" in words and "49152" in words
    assert f"{rows['fisher_nf4'][1]:.6f}" in words and f"{rows['alpha_pl'][1]:.3f}" in words
    assert all(f"<dt>{column}</dt>" in shown.data for column in ("status", "alpha_pl", "fisher_nf4"))
    assert all(f"<b>{status}</b>" in shown.data for status in ("ok", "short_tail", "poor_fit", "failed"))


@pytest.mark.browser
@pytest.mark.parametrize(("width", "theme"), [(1280, "light"), (800, "dark")])
def test_in_a_browser_nothing_is_cut_off(reported, visit, width, theme):
    """Neither the page nor a table scrolls sideways, and text stands out from the ground, in both themes."""
    one = visit(width, theme, offline=True)
    one.page.goto(reported[0].report.as_uri())
    assert one.cut_off() == []
    hidden = "[...document.querySelectorAll('.scroll')].map(e => e.scrollWidth - e.clientWidth)"
    assert max(one.page.evaluate(hidden)) <= 1
    style = "(({color, backgroundColor}) => [color, backgroundColor])(getComputedStyle(document.body))"
    ink, ground = (np.mean([int(x) for x in re.findall(r"\d+", c)[:3]]) for c in one.page.evaluate(style))
    assert (ink < ground) == (theme == "light") and abs(ink - ground) > 120
    assert one.errors == []
