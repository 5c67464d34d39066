"""The report and the evaluation's figures, from numbers with known meaning; no model is loaded."""

import base64
import html
import itertools
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from IPython.display import HTML

from spi_utils import evaluate, report, runs
from spi_utils.claims import Evaluation, audit, better_sentence, dearest_sentence
from spi_utils.errors import RunError
from spi_utils.figures import (
    FORMAT_COLOURS,
    LOOKS,
    RANDOM,
    RIVAL,
    prediction_finding,
    quality_by_bytes,
    quality_finding,
    window_differences,
)
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


def make_evaluation(**changes):
    """An evaluation whose token scores are drawn: KL as in the table above, loss half of it and noise."""
    rng = np.random.default_rng(0)
    base = rng.gamma(2, 1.5, (WINDOWS, TOKENS)).astype(np.float32)
    counts = {"words": 600, "bytes": 4000}
    variants = {}
    for key, mean in KL.items():
        kl = (mean * rng.gamma(1, 1, (WINDOWS, TOKENS))).astype(np.float32)
        noise = (0.2 * mean * rng.normal(size=(WINDOWS, TOKENS))).astype(np.float32)
        scores = TokenScores(base + kl / 2 + noise, kl, rng.random(base.shape) > mean, noise / 10)
        described = {
            "label": "the plan (alpha_hill, high)" if key == "plan" else key,
            "bytes": int(SIZES.get(key, 205e6)),
            "bits_per_weight": 12.2,
            "matrix_bits": 11.2,
            "predicted_kl": None if key == "reference" else 0.9 * KL[key],
            "equal_bytes": key in EQUAL,
            "bytes_miss": 0.0,
            "layers": {},
        }
        variants[key] = described | evaluate.variant_numbers(scores, counts)
    evaluate.compare(variants)
    shape = {"tokens": WINDOWS * TOKENS, "windows": WINDOWS, "window_length": TOKENS + 1, "start_token": 1}
    held = {
        "model": {"id": "someone/<script>", "kind": "gguf", "revision": None, "sha256": "5" * 64},
        "plan": PLAN,
        "settings": {"seed": 0, "profile": "quick", "dtype": "float32", "device": "cpu"},
        "text": {"name": "pydoc", "source": "pydoc topics", "sha256": "6" * 64, **shape, **counts}
        | {"convention": "disjoint windows"},
        "variants": variants,
        "other_texts": [],
        "skipped": {"fisher_int8": "no sensitivity"},
        "checkpoint": {"nf4": 101, "16bit": 109},
        "checkpoint_sha256": "7" * 64,
        "hashes": dict.fromkeys(("weights", "layers", "plan", "checkpoint", "code", "text:pydoc"), "8" * 64),
        "kernel": "products by torch",
    }
    return Evaluation(**{**held, **changes})


@pytest.fixture(scope="module")
def evaluation():
    return make_evaluation()


@pytest.fixture
def run(tmp_path, evaluation):
    made = runs.open_run(tmp_path / "run", evaluation.model)
    with runs.stage(made, "evaluate", {}, ["evaluation.json"]) as stage:
        evaluation.write(made.evaluation_json)
        stage.record(speed={"plan": SPEED, "reference": SPEED})
    return made


class Page(HTMLParser):
    """What a reader sees of a page, and what it would fetch."""

    def __init__(self, content):
        super().__init__()
        self.words, self.sources, self.open = [], [], []
        self.feed(content)

    def handle_starttag(self, tag, attributes):
        self.sources += [value for name, value in attributes if name in ("src", "href")]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def test_the_report_is_whole_and_fetches_nothing(run, evaluation):
    page = Page(report.write_report(run).read_text(encoding="utf-8"))
    assert not page.open  # every tag is closed
    assert len(page.sources) == 4 and all(s.startswith("data:image/png;base64,") for s in page.sources)
    seen = " ".join(" ".join(page.words).split())
    assert "someone/<script>" in seen  # shown, so escaped in the file
    for row in audit(evaluation, {"plan": SPEED, "reference": SPEED}):
        assert (
            row["stated"].replace("`", "") in " ".join(seen.replace("` ", "").split()) or "`" in row["stated"]
        )
    assert seen.count("supported") >= 2 and "refuted" in seen
    assert "Not scored: fisher_int8" in seen
    assert "8" * 64 in seen and "disjoint windows" in seen
    advice = report.switching_sentence(evaluation).replace("`", "").split("would")[1].replace(" -", " −")
    assert advice in seen and seen.index(advice) < seen.index("Quality against bytes")
    assert not re.search(r"(?<![\w.])-\d", seen)
    for head in ("p (Holm)", "Δp mean, Δp RMS", "KL beats", "miss in bytes"):
        assert f"<dt>{html.escape(head, quote=True)}</dt>" in report.write_report(run).read_text("utf-8")


PROOF = {
    **{"dtype": "bfloat16", "device": "cpu", "transformers": "5.1", "text": "pydoc", "tokens": 1024},
    "generation": {"prompt": "Why?", "chat_template": True, "text": "Because <b>.", "tokens": 3},
}
STOCK = {
    **{"dtype": "bfloat16", "device": "cpu", "text": "pydoc", "windows": 4, "agrees": True},
    **{"kl": 0.1234, "kl_file": 0.1212, "kl_16bit": None},
}


def first_table(run):
    page = report.write_report(run).read_text(encoding="utf-8")
    return " ".join(" ".join(Page(page[page.index("<table") : page.index("</table>")]).words).split())


def test_the_first_table_is_about_the_file_that_is_handed_over(run, evaluation):
    unknown = first_table(run)
    assert "not proven: run notebook 03_quantize" in unknown and "not measured: this evaluation is" in unknown
    with runs.stage(run, "quantize", {}, []) as stage:
        stage.record(proof=PROOF)
    make_evaluation(stock=STOCK).write(run.evaluation_json)
    known = first_table(run)
    assert "proven by use: transformers 5.1, bfloat16 on cpu" in known and "not proven" not in known
    assert "stock, as loaded (bfloat16 on cpu)" in known and "0.1234 on the first 4 windows" in known
    assert "float32, from the file's tensors 0.1212" in known and "likewise: not a number" in known
    whole = f"{evaluation.variants['plan']['kl_mean']:.4f} on all 24 windows"
    assert f"float32, from the file's tensors {whole}" in known
    make_evaluation(stock={"agrees": None, "reason": "no GPU"}).write(run.evaluation_json)
    assert "not measured: no GPU" in first_table(run)


def test_numbers_of_kl_say_which_arithmetic_they_are(run):
    page = Page(report.write_report(run).read_text(encoding="utf-8"))
    seen = " ".join(" ".join(page.words).split())
    assert seen.count("float32") >= 3 and "KL are in nats a token, float32, from the file's tensors" in seen


def without(*path):
    def damage(held):
        for key in path[:-1]:
            held = held[key]
        del held[path[-1]]

    return damage


def with_value(value, *path):
    def damage(held):
        for key in path[:-1]:
            held = held[key]
        held[path[-1]] = value

    return damage


@pytest.mark.parametrize(
    ("file", "damage", "notebook"),
    [
        ("evaluation.json", without("variants", "plan"), "04_evaluate"),
        ("evaluation.json", without("variants", "reference", "bytes"), "04_evaluate"),
        ("evaluation.json", without("variants", "plan", "kl_mean"), "04_evaluate"),
        ("evaluation.json", with_value("seven", "variants", "nf4", "perplexity"), "04_evaluate"),
        ("evaluation.json", with_value(None, "variants", "int8", "window_nll"), "04_evaluate"),
        ("evaluation.json", without("plan", "score"), "04_evaluate"),
        ("evaluation.json", without("text", "windows"), "04_evaluate"),
        ("evaluation.json", without("model", "id"), "04_evaluate"),
        ("evaluation.json", without("settings"), "04_evaluate"),
        ("run.json", with_value(None, "stages"), "01_analyze"),
        ("run.json", without("model"), "01_analyze"),
        ("run.json", without("stages", "evaluate", "speed", "plan", "decode"), "04_evaluate"),
        ("run.json", with_value("seven", "stages", "evaluate", "environment"), "04_evaluate"),
        ("run.json", without("stages", "quantize", "proof", "generation"), "03_quantize"),
    ],
)
def test_damaged_files_are_told_in_one_sentence(run, file, damage, notebook):
    with runs.stage(run, "quantize", {}, []) as stage:
        stage.record(proof=PROOF)
    held = json.loads((run.path / file).read_text())
    damage(held)
    (run.path / file).write_text(json.dumps(held))
    with pytest.raises(RunError, match=rf"{file}: .*{notebook}") as told:
        report.write_report(run)
    assert "\n" not in str(told.value) and not run.report.exists()


def test_speed_says_in_which_dtype_it_was_timed(run):
    seen = " ".join(report.write_report(run).read_text("utf-8").split())
    assert "in bfloat16, as the file ships" in seen


def test_the_same_run_gives_the_same_report(run):
    first = report.write_report(run).read_bytes()
    for figure in run.figures.iterdir():
        figure.unlink()
    assert report.write_report(run).read_bytes() == first


def test_headline_and_advice_are_the_runs_own_numbers(run, evaluation):
    plan, fisher = evaluation.variants["plan"], evaluation.variants["fisher"]
    headline = report.headline(run)
    assert "109 of 210 matrices" in headline and "269 MB become 205 MB (−24%)" in headline
    assert f"{plan['perplexity']:.2f}" in headline and "beats random layers" in headline
    last = report.switching_sentence(evaluation)
    assert f"{1 - fisher['kl_mean'] / plan['kl_mean']:.0%}" in last and "supported" in last


def test_the_advice_without_or_with_fisher(evaluation):
    without = {key: one for key, one in evaluation.variants.items() if key != "fisher"}
    said = report.switching_sentence(make_evaluation(variants=without, skipped={"fisher": "run notebook 01"}))
    assert "not measured" in said and "run notebook 01" in said
    already = report.switching_sentence(make_evaluation(plan={**PLAN, "score": "fisher"}))
    assert "already uses" in already


def test_findings_follow_the_numbers(evaluation):
    assert "lower than random layers'" in quality_finding(evaluation)
    worse = {**evaluation.variants, "plan": {**evaluation.variants["other_direction"], "label": "p"}}
    held = {"nll": {}, "controls": 5, "kl_beats": 0, "nll_beats": 0}
    high = {"mean": 0.1, "se": 0.01, "low": 0.08, "high": 0.12, "p": 0.0, "p_holm": 0.0, "clusters": 24}
    worse["plan"]["vs_random"] = {**held, "kl": high}
    assert "higher than random layers'" in quality_finding(make_evaluation(variants=worse))


def test_figures_show_every_variant_and_its_interval(evaluation):
    figure = quality_by_bytes(evaluation)
    left, right = figure.axes
    assert len(left.containers) == len(KL) and len(right.containers) == len(KL) - 1
    labels = [label.get_text() for label in figure.legends[0].get_texts()]
    assert labels.count("random, equal bytes") == 1 and len(labels) == len(KL) - 4
    drawn = {c.get_label(): c[0].get_ydata()[0] for c in right.containers}
    assert drawn["fisher"] == pytest.approx(evaluation.variants["fisher"]["kl_mean"])
    wide, fine = window_differences(evaluation).axes  # int8 is nearly lossless, and has its own scale
    assert (len(wide.lines), len(fine.lines)) == (5, 2)
    for line in [*wide.lines[:4], fine.lines[0]]:
        assert len(line.get_ydata()) == WINDOWS and np.all(np.diff(line.get_ydata()) >= 0)


def test_points_stand_at_their_true_size_and_draws_beside_it_in_order_of_seeds(evaluation):
    drawn = [
        (c.get_label(), float(c[0].get_xdata()[0])) for c in quality_by_bytes(evaluation).axes[0].containers
    ]
    at = [x for label, x in drawn if label == "random, equal bytes"]
    assert at == sorted(at) and np.mean(at) == pytest.approx(205)
    assert np.ptp(at) < 0.03 * (269 - 117)  # of the axis: two millimetres
    for label, x in drawn:
        if label in ("plan", "other_direction", "fisher", "nf4", "int8", "reference"):
            assert x == SIZES.get(label, 205e6) / 1e6


def test_variants_are_told_apart_and_draws_lie_under_the_plan():
    looks = [*LOOKS.values(), RIVAL, RANDOM]
    assert len({(one["color"], one["ls"], one["marker"]) for one in looks}) == len(looks)
    assert len({(one["color"], one["marker"], one["mfc"]) for one in looks}) == len(looks)
    for variant, fmt in (("int8", "int8"), ("int4", "int4_g64")):
        same = {key for key, one in LOOKS.items() if one["color"] == FORMAT_COLOURS[fmt]}
        assert same == {variant} and RIVAL["color"] != FORMAT_COLOURS[fmt]
    assert RANDOM["zorder"] < LOOKS["plan"]["zorder"] and RANDOM["ms"] < LOOKS["plan"]["ms"] / 2


def test_the_predictions_finding_names_the_plans_own_error():
    said = prediction_finding({"plan": (0.1155, 0.0924), "nf4": (0.28, 0.28), "int8": (0.0031, 0.0030)})
    assert "off by 3% (median of 3" in said and "plan's is 25% too high: 0.116 predicted, 0.0924 real" in said
    assert "50% too low" in prediction_finding({"plan": (0.05, 0.1)})


def test_figures_are_saved_as_png_and_svg(run):
    drawn = report.figures(run)
    assert drawn == {name: run.figures / f"{name}.png" for name in report.FIGURES}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn.values())
    names = {path.name for path in run.figures.iterdir()}
    assert {"quality_by_bytes.png", "quality_by_bytes.svg", "kl_survival.png"} <= names
    assert report.headline_figure(run) == run.figures / "quality_by_bytes.png"


def test_figures_follow_the_present_evaluation(run, evaluation):
    """A picture of an earlier evaluation is never shown: redrawn, or gone where it can't be drawn."""
    first = report.write_report(run).read_text(encoding="utf-8")
    before = {name: (run.figures / f"{name}.png").read_bytes() for name in report.FIGURES}
    without = {key: {**one, "predicted_kl": None} for key, one in evaluation.variants.items() if key != "nf4"}
    without["nf4"] = {**evaluation.variants["int8"], "label": "nf4", "predicted_kl": None}
    make_evaluation(variants=without).write(run.evaluation_json)
    second = report.write_report(run).read_text(encoding="utf-8")
    assert not list(run.figures.glob("predicted_and_real.*"))
    for name in set(report.FIGURES) - {"predicted_and_real"}:
        drawn = (run.figures / f"{name}.png").read_bytes()
        assert drawn != before[name]
        assert base64.b64encode(drawn).decode() in second
        assert base64.b64encode(before[name]).decode() in first


def test_the_headline_names_the_better_file_with_its_command(evaluation):
    plan, fisher = evaluation.variants["plan"], evaluation.variants["fisher"]

    def scaled(factor, bytes=plan["bytes"]):
        values = [factor * value for value in fisher["window_kl"]]
        return {**fisher, "bytes": bytes, "kl_mean": factor * fisher["kl_mean"], "window_kl": values}

    def said(**changed):
        variants = {**evaluation.variants, "int8": plan, "nf4": plan, "fisher": plan, **changed}
        return better_sentence(make_evaluation(variants=variants))

    assert said(fisher_int4=plan) == ""  # nothing is better than the plan
    won = said(fisher_int4=scaled(0.1))
    assert f"{0.1 * fisher['kl_mean']:.4f}" in won and f"{plan['kl_mean']:.4f}" in won
    bits = f"{evaluation.plan['matrix_bits']:.2f}"
    assert f"-p backend compressed-tensors -p score fisher -p rule matrix_bits -p value {bits}`" in won
    assert said(fisher_int4=scaled(0.1, bytes=2 * plan["bytes"])) == ""  # it is larger
    assert said(fisher_int8=scaled(0.1), fisher_int4=plan) == ""  # no writer holds it
    assert "only" in said(int8=scaled(0.1, bytes=plan["bytes"] // 2), fisher_int4=plan)


def test_the_dearest_quantized_layer_is_named_where_it_matters(evaluation):
    kl = evaluation.variants["plan"]["kl_mean"]
    dearest = {"name": "model.layers.29.mlp.down_proj", "format": "nf4", "predicted_kl": 0.4 * kl}
    said = dearest_sentence(make_evaluation(plan={**PLAN, "dearest": dearest}))
    assert "`29.mlp.down_proj`" in said and f"{0.4 * kl:.3f}" in said
    for unknown in (None, {**dearest, "predicted_kl": 0.01 * kl}):
        assert dearest_sentence(make_evaluation(plan={**PLAN, "dearest": unknown})) == ""


def test_runs_beside_this_one_are_compared(run, tmp_path, evaluation):
    assert "Does it generalize?" not in report.write_report(run).read_text(encoding="utf-8")
    other = runs.open_run(tmp_path / "other", {**evaluation.model, "id": "other/model", "sha256": "1" * 64})
    variants = {**evaluation.variants, "plan": {**evaluation.variants["other_direction"], "label": "plan"}}
    variants["plan"]["kl_mean"] = 0.4321
    worse = make_evaluation(variants={key: one for key, one in variants.items() if key != "int8"})
    for made, held in ((run, evaluation), (other, worse)):
        held.write(made.evaluation_json)
    (tmp_path / "unfinished").mkdir()
    page = Page(report.write_report(run).read_text(encoding="utf-8"))
    seen = " ".join(" ".join(page.words).split())
    assert "other: other/model, alpha_hill, high, 24 windows of pydoc" in seen and "0.4321" in seen
    assert "“beats int8 everywhere” is not tested in 1 of 2 runs, refuted in 1" in seen
    (tmp_path / "other" / "evaluation.json").write_text("{", encoding="utf-8")
    assert "other: its evaluation can't be read" in html.unescape(
        report.write_report(run).read_text(encoding="utf-8")
    )


def test_a_rival_and_a_variant_without_prediction_are_drawn(evaluation):
    rival = {
        **evaluation.variants["nf4"],
        "label": "theirs (gptq)",
        "matrix_bits": None,
        "predicted_kl": None,
    }
    variants = {**evaluation.variants, "rival:theirs": rival}
    found = make_evaluation(variants=variants)
    labels = [label.get_text() for label in quality_by_bytes(found).legends[0].get_texts()]
    assert "theirs (gptq)" in labels
    unpredicted = {key: {**one, "predicted_kl": None} for key, one in variants.items()}
    assert report.predicted_and_real(make_evaluation(variants=unpredicted)) is None


def test_a_run_without_evaluation(tmp_path, evaluation):
    empty = runs.open_run(tmp_path / "run", evaluation.model)
    with pytest.raises(RunError, match="04_evaluate"):
        report.write_report(empty)


def test_how_values_are_written():
    pieces = report._pieces()
    negative = "−0.5, -0.00 %, (-1 … -0.2), 2018-01-22, smollm2-135m"
    cells = pieces.row([negative, "<&>"], plan=True, words=(1,))
    seen = "<tr class=plan><td>−0.5, −0.00 %, (−1 … −0.2), 2018-01-22, smollm2-135m</td>"
    assert cells.strip() == f"{seen}<td class=words>&lt;&amp;&gt;</td></tr>"
    assert report.code("use `x<y` now") == "use <code>x&lt;y</code> now"
    assert [report.percent(share) for share in (1.0, 0.8988)] == ["100 %", "89.9 %"]
    assert [report.p_value(p) for p in (0.0002, 0.04, None)] == ["< 0.001", "0.040", "–"]
    open_end = {"mean": 0.5, "low": None, "high": 1.0}
    assert pieces.interval(open_end) == "+0.5000<br><small>unbounded … +1.0000</small>"


def test_notebooks_show_the_reports_own_tables(run, evaluation):
    """The same cells in the same words, the plan highlighted, columns explained, nothing that runs."""
    speed = {"plan": SPEED, "reference": SPEED}
    page = report.write_report(run).read_text("utf-8")
    for shown in (report.table_html(evaluation), report.claims_html(evaluation, speed)):
        assert isinstance(shown, HTML) and "<script" not in shown.data and not Page(shown.data).open
        for table in re.findall(r"<table>.*?</table>", shown.data, re.DOTALL):
            assert table in page
        assert '<dl class="legend">' in shown.data
    numbers = report.table_html(evaluation).data
    assert numbers.count("<tr class=plan>") == 2
    assert ">100 %<" in numbers and ">1.0000<" not in numbers


def test_a_layer_table_explains_its_columns_and_statuses():
    rows = layer_table(8)[["name", "rows", "status", "alpha_pl", "fisher_nf4"]]
    shown = report.layers_html(rows)
    words = " ".join(Page(shown.data).words)
    assert "model.embed_tokens" in words and "–" in words and "49152" in words
    assert f"{rows['fisher_nf4'][1]:.6f}" in words and f"{rows['alpha_pl'][1]:.3f}" in words
    for column in ("status", "alpha_pl", "fisher_nf4"):
        assert f"<dt>{column}</dt>" in shown.data
    for status in ("ok", "short_tail", "few_values", "poor_fit", "failed", "listed"):
        assert f"<b>{status}</b>" in shown.data


@pytest.mark.browser
def test_in_a_browser_nothing_is_cut_off(run, browser):
    """Neither the page nor a table scrolls sideways, and text stands out from the ground, in both themes."""
    address = report.write_report(run).as_uri()
    for width, scheme in itertools.product((1280, 800), ("light", "dark")):
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        errors, asked = [], []
        page.on("pageerror", lambda error, errors=errors: errors.append(str(error)))
        page.on("request", lambda request, asked=asked: asked.append(request.url))
        page.goto(address)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        hidden = "[...document.querySelectorAll('.scroll')].map(e => e.scrollWidth - e.clientWidth)"
        assert max(page.evaluate(hidden)) <= 1, (width, scheme)
        style = "(({color, backgroundColor}) => [color, backgroundColor])(getComputedStyle(document.body))"
        ink, ground = (np.mean([int(x) for x in re.findall(r"\d+", c)[:3]]) for c in page.evaluate(style))
        assert (ink < ground) == (scheme == "light") and abs(ink - ground) > 120
        assert not errors and all(url.startswith(("file:", "data:")) for url in asked)
        page.close()
