"""The evaluation of a tiny model: against transformers' own losses, resumed, refused, beside rivals."""

import hashlib
import json
import math
import re
import shutil
import sys
import types
from dataclasses import replace
from importlib.machinery import ModuleSpec

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from spi_utils import controls, evaluate, report, runs, speed, texts
from spi_utils.checkpoint import read_saved, weight_files
from spi_utils.claims import QUESTIONS, SURVIVAL, Evaluation, audit, evaluated_beside, generalization
from spi_utils.errors import CheckpointError, EvaluationError, RunError
from spi_utils.plan import EQUAL, ProtectionPlan, fused_groups, make_plan
from spi_utils.scoring import TokenScores
from tests.evaluated_run import layer_table, ready_run, write_checkpoint
from tests.synthetic import layer_table as large_table
from tests.tiny import make_tiny

SMALL = {"texts": "pydoc", "windows": 12, "length": 48, "random_seeds": 2, "speed_repeats": 0}


@pytest.fixture(autouse=True)
def one_version_of_the_code(monkeypatch):
    """Files may change under a long test; the hash of the sources is not what is tested here."""
    monkeypatch.setattr(runs, "code_hash", lambda: "0" * 64)


@pytest.fixture(scope="module", autouse=True)
def a_short_text():
    """The first 30,000 characters of the offline text: a byte is a token here, all of it takes a second."""
    whole = texts.load_text("pydoc")
    short = replace(whole, text=whole.text[:30_000])
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(texts._LOADERS, "pydoc", lambda: short)
        yield


@pytest.fixture(scope="module")
def ready(tiny, tmp_path_factory):
    return ready_run(tiny("llama"), tmp_path_factory.mktemp("ready") / "run")


@pytest.fixture(scope="module")
def evaluated(ready):
    """A full evaluation with every control."""
    run, source = ready
    found = evaluate.evaluate(run, source, controls=controls.FULL, **SMALL)
    return run, source, found


@pytest.fixture
def copy_of(ready, tmp_path):
    """A run directory of one's own, to be spoiled."""

    def copy(name="copy"):
        run, source = ready
        shutil.copytree(run.path, tmp_path / name)
        return runs.existing_run(tmp_path / name), source

    return copy


# --- the numbers -----------------------------------------------------------------------------------------


def windows_of(source, found):
    return evaluate.make_samples(source, [texts.load_text("pydoc")], 12, 48, "auto")[0]


def test_the_reference_is_what_transformers_says_with_labels(evaluated):
    _, source, found = evaluated
    _, windows = windows_of(source, found)
    model = AutoModelForCausalLM.from_pretrained(source.directory, dtype=torch.float32)
    with torch.no_grad():
        losses = [model(ids[None], labels=ids[None]).loss.item() for ids in windows]
    assert found.variants["reference"]["window_nll"] == pytest.approx(losses, rel=1e-5)
    assert found.variants["reference"]["perplexity"] == pytest.approx(math.exp(np.mean(losses)), rel=1e-5)
    assert found.variants["reference"]["kl_mean"] == 0
    assert found.variants["reference"]["same_top1"] == 1


def test_the_plan_is_what_its_saved_checkpoint_says(evaluated):
    """transformers loads and dequantizes the checkpoint; KL, flips and Δp from whole float64 logits."""
    run, source, found = evaluated
    _, ids = windows_of(source, found)
    reference = AutoModelForCausalLM.from_pretrained(source.directory, dtype=torch.float32)
    saved = AutoModelForCausalLM.from_pretrained(run.model_dir).dequantize().float()
    with torch.no_grad():
        p = reference(ids).logits[:, :-1].double().log_softmax(-1)
        q = saved(ids).logits[:, :-1].double().log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1)
    true = ids[:, 1:, None]
    plan = found.variants["plan"]
    assert plan["window_nll"] == pytest.approx((-q.gather(-1, true)).mean((1, 2)).tolist(), rel=1e-5)
    assert plan["window_kl"] == pytest.approx(kl.mean(1).tolist(), rel=2e-3)
    assert plan["kl_p99"] == pytest.approx(np.quantile(kl, 0.99), rel=5e-3)
    assert plan["same_top1"] == pytest.approx(
        (p.argmax(-1) == q.argmax(-1)).double().mean().item(), abs=0.004
    )
    dp = (q.gather(-1, true) - p.gather(-1, true)).exp().sub(1) * p.gather(-1, true).exp()
    assert plan["dp_rms"] == pytest.approx(dp.pow(2).mean().sqrt().item(), rel=1e-2)
    assert plan["dp_mean"] == pytest.approx(dp.mean().item(), abs=1e-6)


def test_paired_differences_are_window_by_window(evaluated):
    found = evaluated[2].variants
    difference = np.array(found["nf4"]["window_nll"]) - np.array(found["reference"]["window_nll"])
    assert found["nf4"]["delta"]["mean"] == pytest.approx(difference.mean())
    assert found["nf4"]["delta"]["se"] == pytest.approx(difference.std(ddof=1) / math.sqrt(12))
    ratio = found["nf4"]["perplexity"] / found["reference"]["perplexity"]
    assert found["nf4"]["perplexity_ratio"][0] == pytest.approx(ratio)
    drawn = np.mean([found[f"random_{i}"]["window_kl"] for i in range(2)], axis=0)
    against = found["plan"]["vs_random"]["kl"]
    assert against["mean"] == pytest.approx((np.array(found["plan"]["window_kl"]) - drawn).mean())
    assert against["p"] <= against["p_holm"] <= 1


def test_word_and_byte_perplexity_by_hand():
    """lm-evaluation-harness: exp(−Σ ln p / words), words = len(re.split(r"\\s+", text)); bytes in UTF-8."""
    counts = {"words": 3 + 2, "bytes": 6 + 4}  # of "a b  c" and "é f"
    flat = np.full((2, 4), 0.5, np.float32)
    zeros = np.zeros((2, 4), np.float32)
    scores = TokenScores(flat, zeros, np.ones((2, 4), bool), zeros)
    found = evaluate.variant_numbers(scores, counts)
    assert found["word_perplexity"] == pytest.approx(math.exp(4.0 / 5))
    assert found["byte_perplexity"] == pytest.approx(math.exp(4.0 / 10))
    assert found["perplexity"] == pytest.approx(math.exp(0.5))


def test_kl_on_a_toy_vocabulary_by_hand():
    """llama.cpp's KL divergence, Σ p ln(p/q), for p = (1/2, 1/4, 1/4), q = (1/4, 1/2, 1/4): ln(2)/4."""
    from spi_utils.scoring import Head, _compare

    head = object.__new__(Head)
    head.adjust = []
    p, q = torch.tensor([[0.5, 0.25, 0.25]]).log(), torch.tensor([[0.25, 0.5, 0.25]]).log()
    found = _compare(head, q + 7.0, torch.tensor([0]), p - 3.0, torch.tensor([0]))
    assert found["kl"].item() == pytest.approx(math.log(2) / 4, rel=1e-5)
    assert found["nll"].item() == pytest.approx(math.log(4), rel=1e-6)
    assert found["dp"].item() == pytest.approx(-0.25, rel=1e-6)
    assert not found["same_top1"].item()


def test_survival_curve_is_the_share_of_tokens_beyond():
    kl = np.linspace(0, 1, 2001).reshape(3, -1)
    found = evaluate.variant_numbers(TokenScores(kl, kl, kl > 1, kl), {"words": 1, "bytes": 1})
    for share, value in zip(SURVIVAL, found["kl_survival"], strict=False):
        assert (kl >= value - 1e-9).mean() == pytest.approx(share, abs=1e-3)
    quantiles = {"kl_mean": 0.5, "kl_median": 0.5, "kl_p99": 0.99, "kl_p999": 0.999}
    assert {name: found[name] for name in quantiles} == pytest.approx(quantiles)


def test_evaluation_json_says_everything_that_a_sceptic_asks(evaluated):
    run, _, found = evaluated
    held = json.loads(run.evaluation_json.read_text())
    assert held["text"]["start_token"] == 257 and held["text"]["tokens"] == 12 * 47
    assert held["text"]["window_length"] == 48 and "disjoint" in held["text"]["convention"]
    assert {"weights", "layers", "plan", "checkpoint", "code", "text:pydoc"} <= set(held["hashes"])
    assert held["checkpoint"] == {"nf4": 14, "16bit": 14}
    for key in ("reference", "nf4", "plan", "other_direction", "fisher", "fisher_int8", "int8", "random_0"):
        numbers = held["variants"][key]
        assert len(numbers["window_nll"]) == 12 and numbers["bytes"] > 0
        assert {"perplexity", "kl_p999", "kl_median", "word_perplexity", "same_top1", "dp_rms"} <= set(
            numbers
        )
    assert set(held["variants"]) >= {"noise", "first_last", "smallest_first", "type_prior", "random_1"}
    assert held["variants"]["nf4"]["kl_mean"] > held["variants"]["int8"]["kl_mean"] > 0
    assert not re.search(r"second|time", " ".join(held))
    assert Evaluation.read(run.evaluation_json) == found
    assert list(found.table().index) == list(found.variants)


# --- the controls ----------------------------------------------------------------------------------------


def test_controls_weigh_what_the_plan_weighs():
    layers = large_table(210)
    plan = make_plan(layers)
    variants, skipped = controls.make_variants(layers, plan, controls.FULL)
    assert not skipped
    for variant in variants.values():
        if variant.equal_bytes:
            assert abs(variant.bytes_miss) <= EQUAL, variant.label
    assert variants["noise"].formats.keys() == plan.formats.keys()
    assert set(variants["noise"].formats.values()) == {"noise", "16bit"}
    assert set(variants["int8"].formats.values()) == {"int8"}
    chosen = [
        frozenset(n for n, f in variants[f"random_{i}"].formats.items() if f == "16bit") for i in range(5)
    ]
    assert len(set(chosen)) == 5
    best = min(
        (v for v in variants.values() if v.equal_bytes and v.predicted_kl), key=lambda v: v.predicted_kl
    )
    assert best is variants["fisher_int8"]
    assert variants["fisher"].predicted_kl < variants["plan"].predicted_kl


@pytest.mark.parametrize("bits", [7.0, 9.0])
def test_controls_of_a_plan_with_int8_have_the_same_bits_of_each_kind(bits):
    """Else a random control would differ from the plan in its formats, not only in its choice."""
    layers = large_table(210)
    mixed = {"score": "fisher", "rule": "matrix_bits", "value": bits}
    plan = make_plan(layers, **mixed, formats=("int4_g64", "int8", "16bit"), group="fused")
    assert set(plan.formats.values()) == {7.0: {"int4_g64", "int8"}, 9.0: {"int8", "16bit"}}[bits]
    variants, skipped = controls.make_variants(layers, plan, controls.FULL)
    assert skipped.keys() >= {"noise"} and "no NF4 layer" in skipped["noise"]
    numel = dict(zip(layers["name"], layers["numel"], strict=True))

    def weights(formats, fmt):
        return sum(numel[name] for name, held in formats.items() if held == fmt)

    for key in ("random_0", "random_1", "type_prior", "first_last", "other_direction"):
        variant = variants[key]
        assert abs(variant.bytes_miss) <= EQUAL, key
        assert variant.formats != plan.formats
        for fmt in ("16bit", "int8", "int4_g64"):
            assert weights(variant.formats, fmt) == pytest.approx(weights(plan.formats, fmt), rel=0.1)
        for group in fused_groups(list(plan.formats)):
            names = [list(plan.formats)[place] for place in group]
            assert len({variant.formats[name] for name in names}) == 1
    assert variants["plan"].predicted_kl < variants["random_0"].predicted_kl


def test_without_sensitivity_fisher_is_left_out_and_said(tiny):
    from spi_utils.models import resolve

    layers = layer_table(resolve(str(tiny("llama"))), sensitivity=False)
    variants, skipped = controls.make_variants(layers, make_plan(layers), controls.QUICK)
    assert set(skipped) == {"fisher", "fisher_int8", "fisher_int4"} and not set(skipped) & set(variants)
    assert all("01_analyze" in why for why in skipped.values())
    assert variants["plan"].predicted_kl is None


def test_quick_holds_the_mix_to_take_home():
    """Above int8's bytes the optimum leaves nothing in NF4 and raises the costliest layers to 16-bit."""
    layers = large_table(210)
    variants, _ = controls.make_variants(layers, make_plan(layers), controls.QUICK)
    mix, int8 = variants["fisher_int8"], variants["int8"]
    assert mix.equal_bytes and mix.bytes > int8.bytes and mix.predicted_kl < int8.predicted_kl
    assert {"16bit", "int8"} <= set(mix.formats.values()) and len(variants) == 3 + 6 + 5


def test_an_unknown_control_or_profile_is_refused(ready):
    run, source = ready
    with pytest.raises(EvaluationError, match="no control 'magic'"):
        evaluate.evaluate(run, source, controls=["magic"], **SMALL)
    with pytest.raises(EvaluationError, match="quick or full"):
        evaluate.evaluate(run, source, profile="huge")


def test_the_codes_hash_follows_the_sources(monkeypatch, tmp_path):
    monkeypatch.undo()
    assert re.fullmatch(r"[0-9a-f]{64}", runs.code_hash())
    monkeypatch.setattr(runs, "__file__", str(tmp_path / "runs.py"))
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "one.py").write_text("x = 1\n")
    (tmp_path / "note.txt").write_text("no code\n")
    content = hashlib.sha256(b"x = 1\n").hexdigest()
    assert runs.code_hash() == hashlib.sha256(f"part/one.py {content}\n".encode()).hexdigest()
    (tmp_path / "part" / "one.py").rename(tmp_path / "one.py")
    assert runs.code_hash() == hashlib.sha256(f"one.py {content}\n".encode()).hexdigest()


def test_the_checkpoints_hash_is_one_line_a_file(ready):
    from tests.finished_run import checkpoint_hash

    run, _ = ready
    assert runs.checkpoint_hash(reversed(weight_files(run.model_dir))) == checkpoint_hash(run.model_dir)


# --- resume and determinism ------------------------------------------------------------------------------


def test_a_finished_evaluation_is_recognised_and_force_gives_the_same_file(copy_of, monkeypatch):
    run, source = copy_of()
    small = {**SMALL, "controls": ["random", "int8"]}
    evaluate.evaluate(run, source, **small)
    first = run.evaluation_json.read_bytes()
    evaluate.evaluate(run, source, force=True, **small)
    assert run.evaluation_json.read_bytes() == first
    monkeypatch.setattr(evaluate.models, "load_model", lambda *a, **k: pytest.fail("a model was loaded"))
    evaluate.evaluate(run, source, **small)
    assert not run.partial.exists()


def test_a_killed_evaluation_goes_on_where_it_stopped(copy_of, monkeypatch):
    run, source = copy_of("whole")
    small = {**SMALL, "controls": ["random"]}
    evaluate.evaluate(run, source, **small)
    whole = run.evaluation_json.read_bytes()

    run, source = copy_of("killed")
    run.evaluation_json.unlink(missing_ok=True)
    scored = []
    score = evaluate.token_scores

    def counting(*args, **kwargs):
        if len(scored) == 3:
            raise KeyboardInterrupt
        scored.append(kwargs["label"])
        return score(*args, **kwargs)

    monkeypatch.setattr(evaluate, "token_scores", counting)
    with pytest.raises(KeyboardInterrupt):
        evaluate.evaluate(run, source, **small)
    assert not run.evaluation_json.exists()
    assert scored == ["nf4", "plan", "random_0"]
    scored[:] = []
    monkeypatch.setattr(
        evaluate, "token_scores", lambda *a, **k: (scored.append(k["label"]), score(*a, **k))[1]
    )
    evaluate.evaluate(run, source, **small)
    assert scored == ["random_1"]
    assert run.evaluation_json.read_bytes() == whole


@pytest.mark.slow
def test_a_corrupt_piece_is_scored_again(copy_of, capsys):
    run, source = copy_of()
    small = {**SMALL, "controls": []}
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(evaluate, "compare", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
        evaluate.evaluate(run, source, **small)
    for piece, content in {"nf4.0.npz": b"PK\x03\x04half", "plan.0.npz": b""}.items():
        next((run.partial / "evaluate").glob(f"*/{piece}")).write_bytes(content)
    found = evaluate.evaluate(run, source, **small)
    said = capsys.readouterr().out
    assert said.count("is damaged") == 2 and "evaluate: variants: 3/3" in said
    again = evaluate.evaluate(run, source, **small, force=True)
    assert found.variants["nf4"] == again.variants["nf4"]


# --- the saved checkpoint --------------------------------------------------------------------------------


def test_saved_values_are_bitsandbytes_own(ready):
    run, _ = ready
    model = AutoModelForCausalLM.from_pretrained(run.model_dir).dequantize()
    saved = {name: (fmt, value) for name, fmt, value in read_saved(run.model_dir, model)}
    for name, parameter in model.named_parameters():
        assert torch.equal(saved[name][1].float(), parameter.detach().float()), name
    assert sum(fmt == "nf4" for fmt, _ in saved.values()) == 14


def spoil(run, change):
    file = run.model_dir / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def test_a_checkpoint_that_is_not_the_plan_is_refused(copy_of):
    run, source = copy_of("weights")
    kept = ProtectionPlan.read(run.plan_json).protected[0]
    spoil(run, lambda tensors: tensors[f"{kept}.weight"].add_(0.5))
    with pytest.raises(CheckpointError, match=re.escape(f"{kept}.weight differs")):
        evaluate.evaluate(run, source, **SMALL)

    run, source = copy_of("format")
    write_checkpoint(source.directory, run.model_dir)  # nothing is protected
    with pytest.raises(CheckpointError, match="saved as nf4, the plan says 16bit"):
        evaluate.evaluate(run, source, **SMALL)

    run, source = copy_of("truncated")
    file = run.model_dir / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match="03_quantize"):
        evaluate.evaluate(run, source, **SMALL)

    run, source = copy_of("missing")
    (run.model_dir / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="03_quantize"):
        evaluate.evaluate(run, source, **SMALL)


def test_a_run_without_evaluation_says_which_notebook(ready, tmp_path):
    with pytest.raises(RunError, match="04_evaluate"):
        Evaluation.read(tmp_path / "evaluation.json")


# --- rivals ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_rivals_are_judged_by_the_same_protocol(copy_of, tmp_path):
    run, source = copy_of()
    config = BitsAndBytesConfig(load_in_8bit=True)
    eight = AutoModelForCausalLM.from_pretrained(source.directory, quantization_config=config)
    eight.save_pretrained(tmp_path / "eight-bit")
    others = [str(source.directory), str(run.model_dir), str(tmp_path / "eight-bit")]
    found = evaluate.evaluate(run, source, **{**SMALL, "controls": ["int8"]}, rivals=others).variants
    same = found[f"rival:{source.directory.name}"]
    assert same["kl_mean"] == pytest.approx(0, abs=1e-6) and same["delta"]["mean"] == pytest.approx(
        0, abs=1e-6
    )
    # Stock 4-bit kernels round differently on different machines, to bfloat16 on some: near, not equal.
    own = found["rival:model"]
    assert own["kl_mean"] == pytest.approx(found["plan"]["kl_mean"], rel=0.2)
    assert own["bytes"] == (run.model_dir / "model.safetensors").stat().st_size
    assert 0 < found["rival:eight-bit"]["kl_mean"] < found["nf4"]["kl_mean"]
    assert found["rival:eight-bit"]["label"] == "eight-bit (bitsandbytes)"


def write_compressed_tensors(source, target):
    """Four bits in groups of 32, data-free, packed by the compressed-tensors package itself."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        apply_quantization_config,
    )

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    four = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=32)
    groups = {"group_0": QuantizationScheme(targets=["Linear"], weights=four)}
    apply_quantization_config(model, QuantizationConfig(config_groups=groups, ignore=["lm_head"]))
    for module in model.modules():
        if hasattr(module, "weight_scale"):
            largest = module.weight.detach().unflatten(1, (-1, 32)).abs().amax(-1)
            module.weight_scale.data.copy_(largest / 7.5)
    compressor = ModelCompressor.from_pretrained_model(model, "pack-quantized")
    compressor.compress_model(model)
    model.save_pretrained(target)
    compressor.update_config(target)
    return target


@pytest.mark.slow
def test_a_rival_in_compressed_tensors(copy_of, tmp_path):
    pytest.importorskip("compressed_tensors", reason="pip install compressed-tensors to judge such a rival")
    run, source = copy_of()
    packed = write_compressed_tensors(source.directory, tmp_path / "w4")
    found = evaluate.evaluate(run, source, **{**SMALL, "controls": ["int8"]}, rivals=[str(packed)]).variants
    rival = found["rival:w4"]
    assert rival["label"] == "w4 (compressed-tensors)" and rival["bytes"] < found["reference"]["bytes"]
    assert found["int8"]["kl_mean"] < rival["kl_mean"] < 3 * found["nf4"]["kl_mean"]


def test_rivals_of_one_name_are_kept_apart(ready):
    found = evaluate.find_rivals([str(ready[0].model_dir)] * 3)
    assert list(found) == ["rival:model", "rival:model#2", "rival:model#3"]


def test_bad_rivals(copy_of, tmp_path):
    run, source = copy_of()
    small = {**SMALL, "controls": []}
    with pytest.raises(EvaluationError, match="no folder here"):
        evaluate.evaluate(run, source, rivals=[str(tmp_path / "nowhere")], **small)
    (tmp_path / "empty").mkdir()
    with pytest.raises(EvaluationError, match=r"no config\.json"):
        evaluate.evaluate(run, source, rivals=[str(tmp_path / "empty")], **small)
    other = make_tiny("llama", tmp_path / "other", vocab_size=384)
    with pytest.raises(EvaluationError, match="vocabulary of 384"):
        evaluate.evaluate(run, source, rivals=[str(other)], **small)


# --- other architectures ---------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["gpt2", "qwen3_5", "gemma3", "phi3"])
def test_other_architectures(tiny, tmp_path, arch):
    run, source = ready_run(tiny(arch), tmp_path / arch)
    found = evaluate.evaluate(run, source, **{**SMALL, "controls": ["int8"]})
    planned = make_plan(layer_table(source)).formats
    assert sum(found.checkpoint.values()) == len(planned)
    kl = {key: one["kl_mean"] for key, one in found.variants.items()}
    assert kl["nf4"] > kl["plan"] > kl["reference"] == 0 and kl["nf4"] > kl["int8"] > 0


@pytest.mark.slow
def test_stacked_experts_stay_as_they_are(tiny, tmp_path):
    """bitsandbytes leaves a mixture's 3-D experts alone: they are never planned, and counted in 16-bit."""
    run, source = ready_run(tiny("mixtral"), tmp_path / "mixtral")
    found = evaluate.evaluate(run, source, **{**SMALL, "controls": ["int8", "noise"]})
    layers = runs.read_layers(run)
    experts = layers[layers["role"] == "experts"]
    assert len(experts) == 2 * 4 and not experts["quantizable"].any()
    assert found.checkpoint == {"nf4": 8, "16bit": 8}  # the attention's four matrices in four blocks
    assert found.variants["nf4"]["bytes"] > 2 * experts["numel"].sum()
    kl = {key: one["kl_mean"] for key, one in found.variants.items()}
    assert kl["nf4"] > kl["plan"] > kl["reference"] == 0 and kl["nf4"] > kl["int8"] > 0


@pytest.mark.slow
def test_two_texts(copy_of, tmp_path):
    run, source = copy_of()
    (tmp_path / "numbers.txt").write_text(" ".join(map(str, range(2000))), encoding="utf-8")
    both = ["pydoc", str(tmp_path / "numbers.txt")]
    found = evaluate.evaluate(run, source, **{**SMALL, "texts": both, "controls": []})
    assert [other["text"]["name"] for other in found.other_texts] == ["numbers"]
    assert found.other_texts[0]["variants"]["plan"]["delta"]["clusters"] == 12
    assert found.variants["plan"]["nll"] != found.other_texts[0]["variants"]["plan"]["nll"]


def test_bad_texts(ready, tmp_path):
    run, source = ready
    (tmp_path / "short.txt").write_text("too short", encoding="utf-8")
    with pytest.raises(EvaluationError, match="too short"):
        evaluate.evaluate(run, source, **{**SMALL, "texts": str(tmp_path / "short.txt")})
    with pytest.raises(EvaluationError, match="limit"):
        evaluate.evaluate(run, source, **{**SMALL, "length": 100_000})
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1") * 9999)
    with pytest.raises(EvaluationError, match="UTF-8"):
        evaluate.evaluate(run, source, **{**SMALL, "texts": str(tmp_path / "latin.txt")})


# --- tasks and speed -------------------------------------------------------------------------------------


def test_tasks_without_the_harness_say_what_to_install(copy_of, monkeypatch):
    run, source = copy_of()
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(EvaluationError, match="pip install lm_eval"):
        evaluate.evaluate(run, source, **{**SMALL, "controls": []}, lm_eval_tasks=["arc_easy"])


def test_tasks_score_reference_nf4_and_plan(copy_of, monkeypatch):
    """Only the seam to the harness: what is handed over and what is read back."""
    run, source = copy_of()
    weights = []

    def simple_evaluate(model, tasks, limit, **seeds):
        first = next(iter(source_planned)).split(".")
        weights.append(model.pretrained.get_submodule(".".join(first)).weight.clone())
        results = {task: {"acc,none": 0.25 * len(weights), "acc_stderr,none": 0.1} for task in tasks}
        return {"results": results, "n-samples": {task: {"effective": limit} for task in tasks}}

    source_planned = ProtectionPlan.read(run.plan_json).formats
    harness = types.ModuleType("lm_eval")
    harness.__spec__ = ModuleSpec("lm_eval", None)
    harness.simple_evaluate = simple_evaluate
    wrapper = types.ModuleType("lm_eval.models.huggingface")
    wrapper.HFLM = types.SimpleNamespace
    for name, module in {
        "": harness,
        ".models": types.ModuleType("m"),
        ".models.huggingface": wrapper,
    }.items():
        monkeypatch.setitem(sys.modules, f"lm_eval{name}", module)
    found = evaluate.evaluate(
        run, source, **{**SMALL, "controls": []}, lm_eval_tasks=["arc_easy"], lm_eval_limit=7
    )
    assert found.tasks == {
        "arc_easy": {
            key: {"value": value, "stderr": 0.1, "samples": 7}
            for key, value in (("reference", 0.25), ("nf4", 0.5), ("plan", 0.75))
        }
    }
    assert not torch.equal(weights[0], weights[1])


def test_bytes_that_a_token_reads_by_hand(tiny, tmp_path):
    """Tied: all weights once. Packed: 0.5 byte a weight and a float32 absmax for 64 of them."""
    model = AutoModelForCausalLM.from_pretrained(tiny("llama"), dtype=torch.float32)
    assert speed.bytes_per_token(model) == 4 * sum(p.numel() for p in model.parameters())
    untied = AutoModelForCausalLM.from_pretrained(tiny("llama_untied"), dtype=torch.float32)
    embedding = untied.get_input_embeddings().weight.numel()
    assert speed.bytes_per_token(untied) == 4 * (sum(p.numel() for p in untied.parameters()) - embedding)
    packed = AutoModelForCausalLM.from_pretrained(write_checkpoint(tiny("llama"), tmp_path / "nf4"))
    matrices = sum(m.weight.numel() for n, m in model.named_modules() if "_proj" in n)
    rest = 2 * (sum(p.numel() for p in model.parameters()) - matrices)
    assert speed.bytes_per_token(packed) == rest + matrices // 2 + matrices // 64 * 4


@pytest.mark.slow
def test_speed_of_a_checkpoint_in_a_process_of_its_own(ready):
    run, _ = ready
    found = speed.measure_in_subprocess(
        run.model_dir, device="cpu", dtype="float32", prompt_tokens=16, new_tokens=4, repeats=2
    )
    for name in ("prefill", "decode", "first_token_s"):
        median, least, most = found[name]
        assert 0 < least <= median <= most
    assert found["decode_bound"] == pytest.approx(found["bandwidth_gb_s"] / found["gb_per_token"])
    path = r"bitsandbytes \d+\..+, (native CPU kernels|no native library: .+)"
    assert re.fullmatch(path, found["kernel_path"])
    assert found["kernels"]["modules"] == {"bitsandbytes.Linear4bit": 14, "torch.Linear": 15}
    assert 0.1 < found["memory"]["peak_rss_gb"] < 3


@pytest.mark.slow
def test_a_folder_that_does_not_load_is_an_error(tmp_path):
    with pytest.raises(EvaluationError, match="speed_repeats=0"):
        speed.measure_in_subprocess(tmp_path, device="cpu", dtype="float32")


@pytest.mark.slow
def test_scores_stand_where_speed_can_not_be_measured(ready, tmp_path, monkeypatch, capsys):
    def too_large(*_, **__):
        raise EvaluationError("measuring model/ in a process of its own failed: out of memory.")

    monkeypatch.setattr(evaluate, "measure_in_subprocess", too_large)
    shutil.copytree(ready[0].path, tmp_path / "run")
    run = runs.Run(tmp_path / "run")
    options = SMALL | {"speed_repeats": 1, "controls": []}
    found = evaluate.evaluate(run, ready[1], device="cpu", **options)
    assert found.variants["plan"]["kl_mean"] > 0
    assert "Speed was not measured: measuring model/" in capsys.readouterr().out
    assert "out of memory" in runs.run_info(run)["stages"]["evaluate"]["speed_failed"]


# --- the audit -------------------------------------------------------------------------------------------


@pytest.fixture
def claim_of(evaluated):
    """The verdict of one row of the audit after changes to an evaluation."""

    def claim(key, *, speed=None, variant=None, **changes):
        found = evaluated[2]
        variants = {name: dict(one) for name, one in found.variants.items()}
        for name, numbers in (variant or {}).items():
            variants[name] |= numbers
        changed = replace(found, variants=variants, **changes)
        return next(row for row in audit(changed, speed) if row["key"] == key)

    return claim


def shifted(evaluated, key, other, by):
    values = np.array(evaluated[2].variants[other]["window_kl"]) + by
    return {key: {"window_kl": (values + 1e-4 * np.sin(np.arange(12))).tolist()}}


@pytest.mark.parametrize(("by", "expected"), [(-0.1, "supported"), (0.1, "refuted"), (0.0, "not separable")])
def test_verdicts_of_comparisons_are_computed(evaluated, claim_of, by, expected):
    assert claim_of("int8", variant=shifted(evaluated, "plan", "int8", by))["verdict"] == expected


def test_the_original_models_arithmetic(evaluated, claim_of):
    """METHOD §7: 3.9 GB in FP16 is 1.95 B weights, 54.6 % of the matrices; 16 GB is the FP32 size."""
    found = evaluated[2]
    plan = {
        **found.plan,
        "protected": 129,
        "planned": 248,
        "protected_weights": 1_950_000_000,
        "matrix_weights": 3_569_000_000,
        "bytes_on_disk": 6_080_000_000,
    }
    model = {**found.model, "id": "Qwen/Qwen3.5-4B"}
    sizes = {"reference": {"bytes": 8_410_000_000}, "plan": {"bytes": 6_080_000_000}}
    changes = {"plan": plan, "model": model, "variant": sizes}
    assert claim_of("kept", **changes)["verdict"] == "supported"
    rest = claim_of("rest", **changes)
    assert rest["verdict"] == "refuted" and rest["measured"].startswith("45%")
    assert claim_of("size", **changes)["verdict"] == "refuted"
    saving = claim_of("saving", **changes)
    assert saving["verdict"] == "refuted" and saving["measured"].startswith("28%")
    speed_row = claim_of("speed", **changes)
    assert "53 tokens/s (in 16-bit 38" in speed_row["measured"] and speed_row["verdict"] == "not tested"
    measured = {"decode": [9.8, 9.7, 9.9], "device": "Tesla T4", "decode_bound": 50.0, "dtype": "float16"}
    with_speed = claim_of("speed", speed={"plan": measured, "reference": measured}, **changes)
    assert with_speed["verdict"] == "supported"


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(-0.2, -0.1, "supported"), (-0.1, -0.05, "refuted"), (-0.3, 0.1, "not separable")],
)
def test_the_stated_gain(claim_of, evaluated, low, high, expected):
    """7.79 → 6.74 is −0.1448 nats a token."""
    delta = {"mean": (low + high) / 2, "se": 0.1, "low": low, "high": high, "p": 0.01, "p_holm": 0.02}
    model = {**evaluated[2].model, "id": "Qwen/Qwen3.5-4B"}
    found = claim_of("gain", model=model, variant={"plan": {"delta": {**delta, "clusters": 96}}})
    assert found["verdict"] == expected


def test_rows_that_need_the_original_say_so(claim_of):
    for key in ("kept", "rest", "size", "saving", "gain"):
        assert claim_of(key)["verdict"] == "needs Qwen/Qwen3.5-4B"
    assert claim_of("texts")["verdict"] == "not tested"
    assert claim_of("verified")["verdict"] == "supported"


@pytest.mark.slow
def test_two_models_side_by_side(evaluated, tiny, tmp_path):
    """The table over runs, and the report that shows it, from a llama and a gpt2 beside each other."""
    run, source, first = evaluated
    shutil.copytree(run.path, tmp_path / "llama")
    other, others_source = ready_run(tiny("gpt2"), tmp_path / "gpt2")
    second = evaluate.evaluate(other, others_source, **{**SMALL, "controls": ["int8", "random"]})
    folders = evaluated_beside(other)
    assert [path.name for path in folders] == ["gpt2", "llama"]
    rows = generalization(folders)
    assert list(rows["run"]) == ["gpt2", "llama"] and list(rows["model"]) == [others_source.id, source.id]
    assert list(rows["KL plan"]) == [found.variants["plan"]["kl_mean"] for found in (second, first)]
    assert rows["KL fisher_int8"].isna().tolist() == [True, False]
    for row, found in zip(rows.to_dict("records"), (second, first), strict=True):
        assert {claim["key"]: claim["verdict"] for claim in found.claims}.items() >= {
            key: row[key] for key in QUESTIONS
        }.items()
    assert rows["direction"][0] == "not tested"
    page = report.write_report(other).read_text(encoding="utf-8")
    assert "Does it generalize?" in page and f"llama: {source.id}" in page


def test_a_folder_that_is_no_evaluated_run_is_refused(tmp_path):
    with pytest.raises(RunError, match="01_analyze"):
        generalization([tmp_path])
    (tmp_path / "begun").mkdir()
    assert evaluated_beside(runs.Run(tmp_path / "begun")) == []
