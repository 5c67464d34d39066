"""Sensitivities: gradients against explicit derivatives and exact divergences; guided codes; resuming."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import AutoModelForCausalLM

from spi_utils import sensitivity
from spi_utils.analyze import layer_table
from spi_utils.errors import AnalysisError, EvaluationError
from spi_utils.formats import dequantize, layer_bytes, quantize
from spi_utils.models import list_layers, resolve
from spi_utils.rounding import Codes
from spi_utils.runs import open_run
from spi_utils.scoring import Switch
from spi_utils.sensitivity import BlockPass, all_slopes, draws, per_block, pick, refine, scaled, sensitivities
from tests.tiny import Originals, make_tiny

FORMATS = ("nf4", "int8")
FAMILIES = ["llama_untied", "gemma3", "qwen3_5", "gpt2", "phi3"]
WINDOWS = torch.randint(0, 256, (3, 12), generator=torch.Generator().manual_seed(2))


def load(arch, directory, dtype=torch.float32, **options):
    make_tiny(arch, directory, initializer_range=0.1, **options)
    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval().requires_grad_(False)


def make_switch(model):
    kinds = {"Linear", "Conv1D"}
    names = [n for n, m in model.named_modules() if type(m).__name__ in kinds and "head" not in n]
    return Switch(model, Originals(model, names, torch.float16), names)


def labels_of(p, windows, seed=0):
    return pick(p, draws(seed, "labels", *windows.shape).reshape(-1, 1)).view(windows.shape)


@pytest.fixture(scope="module")
def switch(tmp_path_factory):
    return make_switch(load("llama_untied", tmp_path_factory.mktemp("llama")))


def delta(switch, name, fmt):
    return switch.values(name, fmt).float() - switch.live(name)


# --- gradients --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", FAMILIES)
def test_slopes_are_derivatives_along_the_quantization_error_position_by_position(arch, tmp_path):
    model = load(arch, tmp_path)
    switch = make_switch(model)
    found = all_slopes(switch, WINDOWS, FORMATS, batch=2)
    with torch.no_grad():
        labels = labels_of(torch.softmax(model(input_ids=WINDOWS).logits.flatten(0, 1), -1), WINDOWS)
    for layer, name in enumerate(switch.layers):
        if layer % 5:
            continue
        change = delta(switch, name, "nf4")
        # Move the weight at one position only, by ε_bt: the derivative of ln p(labels) by ε_bt is the slope.
        epsilon = torch.zeros(WINDOWS.shape, requires_grad=True)
        handle = model.get_submodule(name).register_forward_hook(
            lambda module, inputs, output, e=epsilon, d=change: output + e[..., None] * (inputs[0] @ d.t())
        )
        log_p = torch.log_softmax(model(input_ids=WINDOWS).logits, -1)
        log_p.gather(2, labels[..., None]).sum().backward()
        handle.remove()
        expected = epsilon.grad.numpy()
        scale = np.abs(expected).max()
        assert scale > 0
        np.testing.assert_allclose(found["nf4"][layer], expected, atol=2e-4 * scale)


@pytest.mark.parametrize("arch", ["llama_untied", "qwen3_5", "gpt2"])
def test_block_by_block_is_the_whole_pass_whatever_the_batch(arch, tmp_path, monkeypatch, capsys):
    switch = make_switch(load(arch, tmp_path))
    by_block = all_slopes(switch, WINDOWS, ("nf4",), batch=2)["nf4"]
    single = all_slopes(switch, WINDOWS, ("nf4",), batch=1)["nf4"]
    assert "one block" not in capsys.readouterr().out
    monkeypatch.setattr(sensitivity, "find_blocks", lambda model, layers: ("", []))
    whole = all_slopes(switch, WINDOWS, ("nf4",), batch=3)["nf4"]
    assert "the whole model is one block" in capsys.readouterr().out
    scale = np.abs(whole).max()
    np.testing.assert_allclose(by_block, whole, atol=1e-5 * scale)
    np.testing.assert_allclose(single, whole, atol=1e-5 * scale)
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in switch.model.modules())


def test_whole_sequences_estimate_the_exact_second_order_divergence(switch):
    model, windows, repeats = switch.model, WINDOWS[:1], 400
    value, error = per_block(all_slopes(switch, windows.expand(repeats, -1), ("nf4",), batch=40)["nf4"], 12)
    for layer in (0, 11, 20):
        name = switch.layers[layer]
        weight, change = model.get_submodule(name).weight, delta(switch, name, "nf4")
        original, step = weight.clone(), 0.05
        with torch.no_grad():
            log_p = torch.log_softmax(model(input_ids=windows).logits[0].double(), -1)
            divergences = []
            for sign in (1, -1):  # the average of both sides has no third-order term
                weight.copy_(original + sign * step * change)
                log_q = torch.log_softmax(model(input_ids=windows).logits[0].double(), -1)
                divergences.append((log_p.exp() * (log_p - log_q)).sum(-1).mean().item())
            weight.copy_(original)
        expected = np.mean(divergences) / step**2
        assert abs(value[layer] - expected) < 4 * error[layer]
        assert error[layer] < 0.15 * expected  # so the line above can fail


@pytest.mark.parametrize(
    ("arch", "name", "parts"),
    [
        ("llama", "model.layers.1.mlp.down_proj", 1),
        ("gpt2", "transformer.h.1.mlp.c_proj", 1),
        ("gpt2", "transformer.h.1.attn.c_attn", 3),
        ("phi3", "model.layers.1.self_attn.qkv_proj", 3),
        ("phi3", "model.layers.1.mlp.gate_up_proj", 2),
        ("qwen3_5", "model.layers.1.linear_attn.in_proj_qkv", 3),
    ],
)
def test_second_moments_are_inputs_weighted_by_their_outputs_gradients(arch, name, parts, tmp_path):
    """Against autograd's own gradients of the sampled log-likelihood, by position and part."""
    model = load(arch, tmp_path)
    switch = make_switch(model)
    passing = BlockPass(switch, WINDOWS, 2, 0, split=3)
    found = {}
    for block in (3, 2, 1):
        found |= passing.moments(block)
        passing.descend(block)
    kept = {}

    def keep(module, inputs, output):
        output.retain_grad()
        kept["x"], kept["y"] = inputs[0].detach(), output

    handle = model.get_submodule(name).register_forward_hook(keep)
    model.get_input_embeddings().weight.requires_grad_(True)
    log_p = torch.log_softmax(model(input_ids=WINDOWS).logits.flatten(0, 1), -1)
    log_p.gather(1, labels_of(log_p.detach().exp(), WINDOWS).reshape(-1, 1)).sum().backward()
    handle.remove()
    assert len(found[name]) == parts
    gradients = kept["y"].grad.flatten(0, 1)
    sizes = [len(part) for part in switch.original(name).split(passing.parts[name])]
    assert sum(sizes) == gradients.shape[1]
    for moment, part in zip(found[name], gradients.split(sizes, dim=1), strict=True):
        expected = torch.zeros_like(moment)
        for x, g in zip(kept["x"].flatten(0, 1), part, strict=True):
            expected += g.square().sum() * torch.outer(x, x)
        assert torch.allclose(moment, expected, rtol=1e-3, atol=1e-5 * expected.abs().max().item())


def test_label_gradients_have_the_covariance_of_the_fisher_information():
    p = torch.softmax(2 * torch.randn(1, 12, generator=torch.Generator().manual_seed(5)), -1)

    class Head:
        adjust = ()
        finish = staticmethod(lambda raw: raw)

    uniform = torch.rand(40_000, 1, generator=torch.Generator().manual_seed(0))
    gradient = sensitivity._logit_gradient(Head(), p.log().expand(40_000, -1), uniform)
    assert gradient.mean(0).abs().max() < 0.01
    expected = torch.diag(p[0]) - p.t() @ p
    assert (gradient.t() @ gradient / 40_000 - expected).abs().max() < 0.01


def test_accumulations_by_hand():
    slopes = np.array([[[1.0, 2.0, 1.0], [3.0, -3.0, 1.0]]], dtype=np.float32)  # a layer, two windows
    assert per_block(slopes, 1)[0] == pytest.approx([(6 + 19) / 6 / 2])
    value, error = per_block(slopes, 3)
    assert value == pytest.approx([(16 + 1) / 6 / 2])
    assert error == pytest.approx([15 / 12])  # half the distance of two values
    # blocks of two: (1 + 2)² + 1² and (3 - 3)² + 1²
    assert per_block(slopes, 2)[0] == pytest.approx([(10 + 1) / 6 / 2])


def test_half_precision_rescales_what_overflows(tmp_path, monkeypatch):
    model = load("llama", tmp_path)
    whole = all_slopes(make_switch(model), WINDOWS, ("nf4",))["nf4"]
    half = model.half()
    found = {}
    for scales in ((2.0**4,), (2.0**40, 2.0**4), (1.0,)):
        monkeypatch.setattr(sensitivity, "SCALES", scales)
        found[scales] = all_slopes(make_switch(half), WINDOWS, ("nf4",))["nf4"]
    straight, retried, unscaled = found.values()
    np.testing.assert_array_equal(retried, straight)  # the first scale overflows, and leaves no trace
    assert np.corrcoef(unscaled.ravel(), straight.ravel())[0, 1] > 0.9999
    assert np.corrcoef(whole.ravel(), straight.ravel())[0, 1] > 0.9  # rounding turns one label in some dozens
    monkeypatch.setattr(sensitivity, "SCALES", (2.0**40,))
    with pytest.raises(AnalysisError, match="float16, at any scale"):
        all_slopes(make_switch(half), WINDOWS, ("nf4",))


# --- the text ---------------------------------------------------------------------------------------------


def test_picking_follows_the_probabilities():
    p = torch.tensor([[0.2, 0.0, 0.5, 0.3]]).expand(20_000, -1)
    uniform = torch.rand(20_000, 1, generator=torch.Generator().manual_seed(0))
    counts = torch.bincount(pick(p, uniform)[:, 0], minlength=4)
    np.testing.assert_allclose(counts / 20_000, p[0], atol=0.015)
    assert counts[1] == 0
    assert pick(p[:1], torch.tensor([[0.9999999]])).item() == 3


def test_the_model_samples_its_own_text(switch):
    sample = sensitivity.sample_windows
    sampled = sample(switch.model, 40, 6, 257, seed=0)
    assert sampled.shape == (40, 6)
    assert (sampled[:, 0] == 257).all()
    alone = sample(switch.model, 3, 6, 257, seed=0)
    assert torch.equal(sampled[:3], alone)  # a window hangs on its index alone
    assert not torch.equal(sampled, sample(switch.model, 40, 6, 257, seed=1))
    many = sample(switch.model, 4000, 3, 257, seed=0)
    with torch.no_grad():
        first = torch.softmax(switch.model(input_ids=torch.tensor([[257]])).logits[0, -1], -1)
        second = torch.softmax(switch.model(input_ids=many[:500, :2]).logits[:, -1], -1)
    share = torch.bincount(many[:, 1], minlength=len(first)) / 4000
    assert (share - first).abs().max() < 0.02
    # the cache carries the context: tokens are as likely under a fresh forward as entropy says
    told = -second.gather(1, many[:500, 2:]).log().mean()
    entropy = -(second * second.log()).sum(-1).mean()
    assert told.item() == pytest.approx(entropy.item(), abs=0.25)


# --- the whole --------------------------------------------------------------------------------------------


OPTIONS = {"device": "cpu", "windows": 5, "length": 16, "text": "pydoc"}
SMALL = {"num_hidden_layers": 3, "hidden_size": 64, "intermediate_size": 128, "head_dim": 16}


def make_frame(source):
    layers = [x for x in list_layers(source) if x.quantizable]
    rows = {"name": [x.name for x in layers], "quantizable": True, "numel": [x.numel for x in layers]}
    sizes = {f"bytes_{f}": [layer_bytes(f, x.rows, x.cols) for x in layers] for f in ("16bit", *FORMATS)}
    return pd.DataFrame(rows | sizes)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    directory = tmp_path_factory.mktemp("source")
    make_tiny("llama", directory, initializer_range=0.15, **SMALL)
    return resolve(str(directory))


@pytest.fixture
def table(source, tmp_path):
    """The columns of a fresh run, by its name and options."""

    def make(name="run", **options):
        run = open_run(tmp_path / name, source.identity())
        return sensitivities(run, source, make_frame(source), **OPTIONS | options)

    return make


@pytest.fixture(scope="module")
def finished(source, tmp_path_factory):
    run = open_run(tmp_path_factory.mktemp("run") / "run", source.identity())
    return run, sensitivities(run, source, make_frame(source), **OPTIONS)


def test_columns_and_what_is_recorded(finished, source):
    _, table = finished
    assert list(table.index) == list(make_frame(source)["name"])
    expected = [c.format(f) for f in FORMATS for c in ("fisher_{}", "fisher_{}_se")]
    assert list(table.columns) == [*expected, "predicted_nf4", "predicted_int8"]
    assert np.isfinite(table.to_numpy()).all()
    assert (table > 0).all(axis=None)
    notes = table.attrs["sensitivity"]
    for fmt in FORMATS:
        assert table[f"predicted_{fmt}"].sum() == pytest.approx(notes["kl_all_layers"][fmt])
    assert notes["kl_all_layers"]["nf4"] > 10 * notes["kl_all_layers"]["int8"]
    # Half of the bytes go to the dearest layers by byte; the others' sum is what they were measured at.
    frame = make_frame(source).set_index("name")
    extra = frame["bytes_16bit"] - frame["bytes_nf4"]
    by_byte = (table["fisher_nf4"] / extra).sort_values(ascending=False)
    left = [name for name, spent in extra[by_byte.index].cumsum().items() if spent > extra.sum() / 2]
    assert 0 < len(left) < len(table)
    assert table["predicted_nf4"][left].sum() == pytest.approx(notes["kl_cheap_half"]["nf4"])
    assert notes["text"]["name"] == "pydoc"
    assert notes["start_token"] == 257
    assert sum(notes["guided"].values()) == len(table)


def test_guided_codes_are_on_disk(finished, source):
    run, table = finished
    codes = Codes(run.rounded)
    assert set(codes) == {(name, "nf4") for name in table.index}
    model = AutoModelForCausalLM.from_pretrained(source.directory, dtype=torch.float32)
    moved = 0
    for name in table.index:
        weight = model.get_submodule(name).weight.detach().to(getattr(torch, source.storage_dtype))
        nearest = dequantize(quantize(weight, "nf4"))
        moved += not torch.equal(dequantize(codes[name, "nf4"]), nearest)
    assert moved == len(table)


def test_guided_codes_cost_less_than_the_nearest_ones(table, tmp_path):
    found = {name: table(name, windows=64, length=48, rounding=name) for name in ("guided", "nearest")}
    kl = {name: one.attrs["sensitivity"]["kl_all_layers"] for name, one in found.items()}
    assert kl["guided"]["nf4"] < 0.8 * kl["nearest"]["nf4"]
    assert kl["guided"]["int8"] == kl["nearest"]["int8"]
    assert found["guided"]["fisher_nf4"].sum() < 0.8 * found["nearest"]["fisher_nf4"].sum()
    assert not (tmp_path / "nearest" / "rounded").exists()


def test_the_estimate_ranks_layers_as_measuring_them_does(table):
    measured = table("measured", rounding="nearest", sensitivity="measured", windows=8)
    assert list(measured.columns) == ["measured_nf4", "measured_int8", "predicted_nf4", "predicted_int8"]
    guess = table("guess", rounding="nearest", sensitivity="random", windows=24)
    assert guess["fisher_nf4"].corr(measured["measured_nf4"], method="spearman") > 0.9


def test_same_seed_same_numbers_whatever_the_batch(finished, table, monkeypatch):
    pd.testing.assert_frame_equal(table("again"), finished[1], check_exact=True)
    assert not np.allclose(table("again", seed=1), finished[1], rtol=1e-2)  # nor are the first's codes taken
    plain = table("plain", rounding="nearest")
    monkeypatch.setattr(sensitivity, "BATCH_TOKENS", 32)
    pd.testing.assert_frame_equal(table("batch", rounding="nearest"), plain, rtol=1e-3)


def test_a_killed_run_goes_on_where_it_stopped(finished, source, tmp_path, monkeypatch, capsys):
    run = open_run(tmp_path / "run", source.identity())
    script = f"""
        import os, signal
        from spi_utils import sensitivity
        from spi_utils.models import resolve
        from spi_utils.runs import open_run
        from tests.test_sensitivity import OPTIONS, make_frame
        whole, count = sensitivity.BlockPass.moments, [0]
        def dying(*args):
            count[0] += 1
            if count[0] == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            return whole(*args)
        sensitivity.BlockPass.moments = dying
        source = resolve({str(source.directory)!r})
        run = open_run({str(run.path)!r}, source.identity())
        sensitivity.sensitivities(run, source, make_frame(source), **OPTIONS)
    """
    killed = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], cwd=os.getcwd(), check=False)
    assert killed.returncode == -signal.SIGKILL
    calls = []
    whole = BlockPass.moments
    monkeypatch.setattr(BlockPass, "moments", lambda self, block: calls.append(block) or whole(self, block))
    resumed = sensitivities(run, source, make_frame(source), **OPTIONS)
    assert calls == [0]  # of three blocks, two were finished
    pd.testing.assert_frame_equal(resumed, finished[1], check_exact=True)
    sensitivities(run, source, make_frame(source), **OPTIONS)
    assert calls == [0]
    held = dict(Codes(run.rounded).items())
    damaged = run.rounded / "block-002.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:90])
    healed = sensitivities(run, source, make_frame(source), **OPTIONS)
    assert calls == [0, 2, 1, 0] and "damaged" in capsys.readouterr().out
    pd.testing.assert_frame_equal(healed, resumed, check_exact=True)
    assert all(torch.equal(held[key].codes, packed.codes) for key, packed in Codes(run.rounded).items())


def test_where_memory_runs_out_a_smaller_batch_goes_on(table, monkeypatch, capsys):
    whole = BlockPass._visit

    def full(most):
        def visit(self, block, k):
            if len(self.ids[k]) > most:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return whole(self, block, k)

        return visit

    monkeypatch.setattr(BlockPass, "_visit", full(1))
    monkeypatch.setattr(sensitivity, "BATCH_TOKENS", 32)
    assert np.isfinite(table()["fisher_nf4"]).all()
    said = capsys.readouterr().out
    assert "2 at a time" in said and "1 at a time" in said
    monkeypatch.setattr(BlockPass, "_visit", full(0))
    with pytest.raises(AnalysisError, match=r"memory with a single window.*Use shorter windows"):
        table("b")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sensitivity": "sefl"}, "no text 'sefl'"),
        ({"sensitivity": "measured", "refine_at": (6.0,)}, "every layer"),
        ({"length": 100_000}, r"longer than this model's limit.*≤ \d+"),
        ({}, r"need about .* GB.*length=8"),
    ],
)
def test_settings_that_make_no_sense_are_refused(table, monkeypatch, options, message):
    if not options:
        monkeypatch.setattr(sensitivity.psutil, "virtual_memory", lambda: type("M", (), {"available": 1000}))
    with pytest.raises((AnalysisError, EvaluationError), match=message):
        table(**options)


# a decoder cut from its encoder, whose cross attention is never called
DECODER = {"decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 256}


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("mamba", {}, "no key-value cache.*'random'"),
        ("bart", DECODER, r"encoder_attn\..* doesn't see every token"),
    ],
)
def test_what_a_model_cannot_give_is_refused_and_said(tmp_path, kind, options, message):
    source = resolve(str(make_tiny("llama", tmp_path / kind, model_type=kind, **options)))
    frame = layer_table(list_layers(source), {}, FORMATS, source.storage_dtype)
    run = open_run(tmp_path / "run", source.identity())
    with pytest.raises(AnalysisError, match=message):
        sensitivities(run, source, frame, windows=2, length=12, text="pydoc")


def test_own_text_that_collapses_is_replaced_and_said(table, monkeypatch, capsys):
    monkeypatch.setattr(
        sensitivity, "sample_windows", lambda model, n, length, *rest: torch.full((n, length), 7)
    )
    found = table()
    assert "own text collapses" in capsys.readouterr().out
    assert found.attrs["sensitivity"]["own_text"] == "random tokens: its own text collapses"
    pd.testing.assert_frame_equal(found, table("random", sensitivity="random"), check_exact=True)


def test_what_guided_rounding_treats_otherwise_is_said(tmp_path, capsys):
    model = make_tiny("llama", tmp_path / "m", **SMALL | {"hidden_size": 96})
    source = resolve(str(model))
    run = open_run(tmp_path / "run", source.identity())
    notes = sensitivities(run, source, make_frame(source), **OPTIONS).attrs["sensitivity"]
    frame = [x for x in list_layers(source) if x.quantizable]
    narrow = sum(x.cols % 64 != 0 for x in frame)
    assert 0 < narrow < len(frame) and sum(notes["guided"].values()) == len(frame) - narrow
    said = f"{narrow} with nearest levels of nf4, as 64 doesn't divide their columns"
    assert said in notes["rounding_exceptions"] and said in capsys.readouterr().out


def test_a_users_own_text_is_used_throughout(table, tmp_path, monkeypatch):
    monkeypatch.setattr(sensitivity, "start_token", lambda *_: None)  # nor does it need a start token
    file = tmp_path / "mine.txt"
    file.write_text("All of this is my own text. " * 40)
    found = table(sensitivity=str(file))
    assert found.attrs["sensitivity"]["text"]["name"] == "mine"
    assert found.attrs["sensitivity"]["start_token"] is None
    assert (found["fisher_nf4"] > 0).all()


# --- refining ---------------------------------------------------------------------------------------------


def test_refining_measures_only_layers_near_the_cut_and_stops():
    rng = np.random.default_rng(0)
    truth = np.exp(rng.normal(0, 1.5, 200))
    estimate = truth * 0.8 * np.exp(rng.normal(0, 0.1, 200))
    asked = []

    def measure(index):
        asked.append(index)
        return truth[index]

    extra = np.ones(200)
    values, measured, settled = refine(estimate, 0.1 * estimate, extra, [60.0], measure, limit=30)
    assert len(asked) == len(set(asked)) == measured.sum() <= 30
    assert settled
    best, kept = set(np.argsort(-truth)[:60]), set(np.argsort(-values)[:60])
    plain = set(np.argsort(-estimate)[:60])
    assert truth[list(kept)].sum() >= truth[list(plain)].sum()
    assert truth[list(kept)].sum() > 0.998 * truth[list(best)].sum()
    # what was not measured is scaled by what was: the estimate is a fifth too low
    assert np.median(values[~measured] / truth[~measured]) == pytest.approx(1.0, abs=0.05)
    far = [i for i in asked if abs(np.log(truth[i] / np.sort(truth)[-60])) > 1]
    assert not far
    assert not refine(estimate, estimate, extra, [60.0], measure, limit=6)[2]  # not done, and said


@pytest.mark.parametrize(
    ("total", "half", "expected"),
    [
        (10.0, 4.0, [2.0, 2.0, 6.0, np.nan]),
        (10.0, 12.0, [2.0, 2.0, 6.0, np.nan]),  # contradictory: one scale, 10/5
        (0.0, 0.0, [0.0, 0.0, 0.0, np.nan]),
    ],
)
def test_predictions_add_up_to_what_was_measured_in_each_half(total, half, expected):
    cheap = np.array([True, True, False, False])
    found = scaled(np.array([1.0, 1.0, 3.0, np.nan]), cheap, total, half)
    np.testing.assert_allclose(found, expected)


def test_refined_column_holds_measured_costs(table):
    table = table(refine_at=(6.0, 9.0))
    notes = table.attrs["sensitivity"]["refined_nf4"]
    assert 0 < notes["evaluations"] <= 4
    ratio = table["refined_nf4"] / table["fisher_nf4"]
    # the layers that were not measured share one factor
    assert (np.isclose(ratio, ratio.median(), rtol=1e-9)).sum() == len(table) - notes["evaluations"]
    total = table.attrs["sensitivity"]["kl_all_layers"]["nf4"]
    assert table["predicted_nf4"].sum() == pytest.approx(total)
    # one factor for the cheaper half, one for the others
    assert len(set(np.round(table["predicted_nf4"] / table["refined_nf4"], 9))) <= 2
