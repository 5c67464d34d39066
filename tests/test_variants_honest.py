"""Controls, rivals and references are what their names say: faults that gave wrong numbers without a word."""

import copy
import html
import shutil
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from spi_utils import controls, runs, scoring, texts
from spi_utils import evaluate as judging
from spi_utils.claims import better_sentence, switching_sentence
from spi_utils.evaluate import TwoHeads, evaluate
from spi_utils.models import load_model, resolve
from spi_utils.plan import EQUAL, ProtectionPlan, decide, make_plan
from spi_utils.report import other_runs
from spi_utils.scoring import Head, reference_states, token_scores
from tests.evaluated_run import ready_run
from tests.finished_run import make_finished_run
from tests.synthetic import layer_table as large_table
from tests.synthetic import make_run
from tests.test_report import make_evaluation
from tests.tiny import VOCABULARY


@pytest.fixture(scope="module")
def model(tiny):
    return load_model(resolve(str(tiny("llama_untied"))), device="cpu", dtype=torch.float32)


@pytest.fixture(scope="module")
def windows():
    return torch.randint(0, VOCABULARY - 64, (4, 24), generator=torch.Generator().manual_seed(0))


def test_a_rivals_4_bit_head_scores_as_its_dequantized_weights_do(model, windows):
    bnb = pytest.importorskip("bitsandbytes")
    weight = model.lm_head.weight.detach()
    packed, state = bnb.functional.quantize_4bit(weight, quant_type="nf4")
    plain, quantized = copy.deepcopy(model), copy.deepcopy(model)
    with torch.no_grad():
        plain.lm_head.weight.copy_(bnb.functional.dequantize_4bit(packed, state))
    head = bnb.nn.Linear4bit(128, VOCABULARY, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    head.load_state_dict({"weight": weight.clone()})
    quantized.lm_head = head.to("cpu").requires_grad_(False)
    if quantized.lm_head.weight.dtype != torch.uint8:
        quantized.lm_head.weight = quantized.lm_head.weight._quantize(torch.device("cpu"))
    assert quantized.lm_head.weight.dtype == torch.uint8

    reference, own = reference_states(model, windows), Head(model)
    want, got = (token_scores(one, windows, reference, head=TwoHeads(one, own)) for one in (plain, quantized))
    assert want.kl.mean() > 1e-4  # a 4-bit head is another head
    # bitsandbytes multiplies in bfloat16 on some CPUs
    assert got.nll == pytest.approx(want.nll, abs=5e-3)
    assert got.kl.mean() == pytest.approx(want.kl.mean(), rel=0.05)


@pytest.mark.parametrize("column", ["nll", "top1"])
def test_running_out_of_memory_between_two_columns_keeps_the_reference_aligned(
    model, windows, column, monkeypatch
):
    want = reference_states(model, windows, batch=2)
    rows, calls = scoring._rows, []

    class Full:
        def view(self, *shape):
            raise torch.OutOfMemoryError("injected")

    def failing(*args):
        calls.append(1)
        columns = rows(*args)
        return columns | {column: Full()} if len(calls) == 2 else columns

    monkeypatch.setattr(scoring, "_rows", failing)
    monkeypatch.setattr(scoring, "_check_finite", lambda *_: None)
    got = reference_states(model, windows, batch=2)
    assert len(calls) == 4  # two windows, a failure, then one and one
    for name in ("hidden", "nll", "top1"):
        assert getattr(got, name).shape == getattr(want, name).shape
        assert torch.allclose(getattr(got, name).float(), getattr(want, name).float(), atol=1e-4)
    assert token_scores(model, windows, got).kl == pytest.approx(0, abs=1e-5)


@pytest.fixture
def bfloat16_run(tiny, tmp_path, monkeypatch):
    """A float16 source's run whose file was written in bfloat16, and a short text to judge it on."""
    whole = texts.load_text("pydoc")
    monkeypatch.setitem(texts._LOADERS, "pydoc", lambda: replace(whole, text=whole.text[:20_000]))
    monkeypatch.setattr(runs, "code_hash", lambda: "0" * 64)
    run, source = ready_run(tiny("llama"), tmp_path / "run")
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        llm_int8_skip_modules=["lm_head", *ProtectionPlan.read(run.plan_json).protected],
    )
    saved = AutoModelForCausalLM.from_pretrained(
        source.directory, quantization_config=config, dtype=torch.bfloat16
    )
    shutil.rmtree(run.model_dir)
    saved.save_pretrained(run.model_dir)
    return run, source


ASKED = {"texts": "pydoc", "windows": 10, "length": 32, "random_seeds": 1, "speed_repeats": 0}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_controls_do_not_depend_on_the_plan_scored_before_them_nor_on_where_a_run_was_resumed(
    dtype, bfloat16_run, tmp_path, monkeypatch
):
    run, source = bfloat16_run
    asked = {**ASKED, "controls": ["fisher", "int8", "random"], "dtype": dtype}
    at_once = evaluate(run, source, **asked)
    content = run.evaluation_json.read_bytes()

    resumed = runs.Run(tmp_path / "resumed")
    shutil.copytree(run.path, resumed.path)
    resumed.evaluation_json.unlink()
    shutil.rmtree(resumed.partial, ignore_errors=True)
    score = scoring.token_scores
    for stop in (0, 1, 1, 2):  # variants until the process is killed: in NF4, the plan, the controls
        left = [stop]

        def killed(*args, left=left, **kwargs):
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
            return score(*args, **kwargs)

        monkeypatch.setattr(judging, "token_scores", killed)
        try:
            evaluate(resumed, source, **asked)
            break
        except KeyboardInterrupt:
            continue
    monkeypatch.setattr(judging, "token_scores", score)
    evaluate(resumed, source, **asked)
    assert resumed.evaluation_json.read_bytes() == content

    alone = evaluate(run, source, **{**asked, "controls": ["int8"]}, force=True)
    for name in ("window_nll", "window_kl"):
        assert alone.variants["int8"][name] == at_once.variants["int8"][name]


# --- what a plan's patterns settle is settled in its controls ---------------------------------------------


@pytest.mark.parametrize("group", [None, "fused"])
@pytest.mark.parametrize("bits", [6.0, 9.0])
@pytest.mark.parametrize("formats", [("nf4", "16bit"), ("int4_g64", "int8", "16bit")])
def test_controls_at_equal_bytes_obey_the_plans_patterns(formats, bits, group):
    layers = large_table(210)
    plan = make_plan(
        layers,
        score="fisher",
        rule="matrix_bits",
        value=bits,
        formats=formats,
        group=group,
        force_16bit=[r"layers\.0\.", r"layers\.7\..*down_proj"],
        forbid_16bit=r"layers\.(1|2[0-9])\.",
    )
    forced = {n for n in plan.formats if ".layers.0." in n or n.endswith("layers.7.mlp.down_proj")}
    forbidden = {n for n in plan.formats if n.split(".")[2] in ("1", *map(str, range(20, 30)))}
    assert forced and forbidden and set(plan.protected) >= forced and not set(plan.protected) & forbidden
    variants, _ = controls.make_variants(layers, plan, controls.FULL)
    equal = {key: one for key, one in variants.items() if one.equal_bytes}
    assert equal.keys() >= {"other_direction", "fisher_int8", "fisher_int4", "type_prior", "random_4"}
    for key, one in equal.items():
        assert {one.formats[name] for name in forced} == {"16bit"}, key
        assert "16bit" not in {one.formats[name] for name in forbidden}, key
        assert abs(one.bytes_miss) <= EQUAL, key
    assert len({tuple(variants[f"random_{i}"].formats.values()) for i in range(5)}) == 5


# --- names say what is held, not what was allowed ----------------------------------------------------------

WORDS = {"nf4": "NF4", "int4_g64": "int4", "int8": "int8", "16bit": "16-bit"}


@pytest.mark.parametrize("bits", [5.0, 7.0, 11.2])
@pytest.mark.parametrize("key", ["fisher_int8", "fisher_int4"])
def test_a_mixs_label_names_the_formats_that_it_holds_and_no_other(key, bits):
    layers = large_table(210)
    plan = make_plan(layers, score="fisher", rule="matrix_bits", value=bits)
    variants, _ = controls.make_variants(layers, plan, [key])
    one = variants[key]
    assert {fmt for fmt, word in WORDS.items() if word in one.label} == set(one.formats.values())


def test_a_uniform_control_says_where_its_format_does_not_fit():
    layers = large_table(14)
    plan = make_plan(layers)
    label = controls.make_variants(layers, plan, ["int4"])[0]["int4"].label
    assert label == "int4 (groups of 64) everywhere"
    layers.loc[layers["name"].str.endswith("down_proj"), "cols"] = 100
    one = controls.make_variants(layers, plan, ["int4"])[0]["int4"]
    assert set(one.formats.values()) == {"int4_g64", "16bit"} and one.label.endswith("where it fits")


@pytest.mark.parametrize("key", ["fisher_int8", "fisher_int4"])
def test_sentences_about_a_mix_name_the_formats_that_it_holds(key):
    found = make_evaluation()
    fisher = found.variants["fisher"]
    mix = {
        **fisher,
        "layers": {"16bit": 114, "int8": 96},
        "kl_mean": 0.1 * fisher["kl_mean"],
        "window_kl": [0.1 * value for value in fisher["window_kl"]],
    }
    others = {name: one for name, one in found.variants.items() if name not in ("int8", "fisher_int4")}
    found = make_evaluation(variants={**others, key: mix})
    assert "it holds int8 and 16-bit" in switching_sentence(found)
    said = better_sentence(found)
    assert ("int8 and 16-bit chosen by predicted cost" in said) == (key == "fisher_int4")  # a writer holds it
    assert not {"NF4,", "int4,"} & set(said.split())


@pytest.mark.parametrize(
    ("backend", "remark"), [("compressed-tensors", False), ("bitsandbytes", True)], ids=["ct", "bnb"]
)
def test_a_plan_names_another_backend_only_if_the_chosen_one_cannot_hold_it(backend, remark, tmp_path):
    run = make_run(tmp_path / "run", 70)
    run.plan_json.unlink(missing_ok=True)
    formats = ("int4_g64", "int8", "16bit")
    choices = {"score": "fisher", "rule": "matrix_bits", "value": 7, "formats": formats}
    plan = decide(run, backend=backend, **choices)
    assert "int8" in plan.formats.values()
    assert ("backend='compressed-tensors' can" in plan.reason) is remark
    assert ("can't hold int8" in plan.reason.replace("int4_g64, ", "")) is remark


@pytest.mark.parametrize("spoilt", ["evaluation.json", "run.json"])
@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"schema": 1}', '{"schema": 1, "variants": []}'])
def test_a_damaged_run_beside_this_one_is_named_and_this_ones_report_stands(content, spoilt, tmp_path):
    run = make_finished_run(tmp_path)
    make_evaluation().write(run.evaluation_json)
    other = runs.Run(tmp_path / "other")
    shutil.copytree(run.path, other.path)
    (other.path / spoilt).write_text(content)
    assert "other: its evaluation can't be read" in html.unescape(other_runs(run))
