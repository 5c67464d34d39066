"""Sensitivities: gradients against explicit derivatives and exact divergences; resuming; refining."""

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
from spi_utils.costs import fisher, footprint
from spi_utils.costs.refine import cut, refine
from spi_utils.errors import AnalysisError
from spi_utils.formats import layer_bytes
from spi_utils.models import list_layers, resolve
from spi_utils.runs import open_run
from spi_utils.sensitivity import sensitivities
from spi_utils.variants import Originals, Switch
from tests.tiny import make_tiny

FORMATS = ("nf4", "int8")
WINDOWS = torch.randint(0, 256, (3, 12), generator=torch.Generator().manual_seed(2))


def load(arch, directory, dtype=torch.float32, **options):
    make_tiny(arch, directory, initializer_range=0.1, **options)
    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval().requires_grad_(False)


def make_switch(model):
    kinds = {"Linear", "Conv1D"}
    names = [n for n, m in model.named_modules() if type(m).__name__ in kinds and "head" not in n]
    return Switch(model, Originals(model, names, torch.float16), names)


def draws(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def switch(tmp_path_factory):
    return make_switch(load("llama_untied", tmp_path_factory.mktemp("llama")))


def delta(switch, name, fmt):
    return switch.values(name, fmt).float() - switch.live(name)


# --- gradients --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["llama_untied", "gemma3", "qwen3_5", "gpt2", "phi3"])
def test_slopes_are_derivatives_along_the_quantization_error_position_by_position(arch, tmp_path):
    model = load(arch, tmp_path)
    switch = make_switch(model)
    found = fisher.slopes(model, switch, WINDOWS, FORMATS, draws())
    with torch.no_grad():
        p = torch.softmax(model(input_ids=WINDOWS).logits.flatten(0, 1), -1)
    uniform = torch.rand(p.shape[0], 1, generator=draws())
    labels = fisher.pick(p, uniform).view(WINDOWS.shape)
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


def test_the_sum_of_slopes_is_the_product_with_the_weight_gradient(switch):
    model, name = switch.model, switch.layers[4]
    found = fisher.slopes(model, switch, WINDOWS[:1], FORMATS, draws())
    weight = model.get_submodule(name).weight
    weight.requires_grad_(True)
    log_p = torch.log_softmax(model(input_ids=WINDOWS[:1]).logits[0], -1)
    labels = fisher.pick(log_p.detach().exp(), torch.rand(12, 1, generator=draws()))
    log_p.gather(1, labels).sum().backward()
    for fmt in FORMATS:
        expected = (weight.grad * delta(switch, name, fmt)).sum().item()
        assert found[fmt][4].sum() == pytest.approx(expected, rel=1e-3)
    weight.requires_grad_(False)
    weight.grad = None


def test_per_sequence_estimates_the_exact_second_order_divergence(switch):
    model, windows = switch.model, WINDOWS[:1]
    repeats = 400
    parts = [
        fisher.slopes(model, switch, windows.expand(40, -1), ("nf4",), draws(i))["nf4"]
        for i in range(repeats // 40)
    ]
    found = fisher.per_sequence(np.concatenate(parts, axis=1))
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
        assert abs(found.value[layer] - expected) < 4 * found.error[layer]
        assert found.error[layer] < 0.15 * expected  # so the line above can fail


def test_label_gradients_have_the_covariance_of_the_fisher_information():
    p = torch.softmax(2 * torch.randn(1, 12, generator=draws(5)), -1)

    class Head:
        adjust = ()
        finish = staticmethod(lambda raw: raw)

    uniform = torch.rand(40_000, 1, generator=draws())
    gradient = fisher._logit_gradient(Head(), p.log().expand(40_000, -1), uniform)
    assert gradient.mean(0).abs().max() < 0.01
    expected = torch.diag(p[0]) - p.t() @ p
    assert (gradient.t() @ gradient / 40_000 - expected).abs().max() < 0.01


def test_accumulations_by_hand():
    slopes = np.array([[[1.0, 2.0, 1.0], [3.0, -3.0, 1.0]]], dtype=np.float32)  # a layer, two windows
    token, sequence = fisher.per_token(slopes), fisher.per_sequence(slopes)
    assert token.value == pytest.approx([(6 + 19) / 6 / 2])
    assert sequence.value == pytest.approx([(16 + 1) / 6 / 2])
    assert sequence.error == pytest.approx([15 / 12])  # half the distance of two values
    # blocks of two: (1 + 2)² + 1² and (3 - 3)² + 1²
    assert fisher.per_block(slopes, 2).value == pytest.approx([(10 + 1) / 6 / 2])


def test_checkpointing_changes_no_slope_and_wakes_no_dropout(tmp_path):
    for arch in ("llama", "gpt2"):  # gpt2's configuration has dropout
        model = load(arch, tmp_path / arch)
        switch = make_switch(model)
        plain = fisher.slopes(model, switch, WINDOWS, ("nf4",), draws())["nf4"]
        with footprint.checkpointed(switch, True):
            saved = fisher.slopes(model, switch, WINDOWS, ("nf4",), draws())["nf4"]
        np.testing.assert_allclose(saved, plain, rtol=1e-4, atol=1e-6 * np.abs(plain).max())
        assert not any(module.training for module in model.modules())


def test_half_precision_rescales_what_overflows(tmp_path, monkeypatch):
    model = load("llama", tmp_path)
    whole = fisher.slopes(model, make_switch(model), WINDOWS, ("nf4",), draws())["nf4"]
    half = model.half()
    found = {}
    for scales in ((2.0**4,), (2.0**40, 2.0**4), (1.0,)):
        monkeypatch.setattr(fisher, "SCALES", scales)
        found[scales] = fisher.slopes(half, make_switch(half), WINDOWS, ("nf4",), draws())["nf4"]
    straight, retried, unscaled = found.values()
    np.testing.assert_array_equal(retried, straight)  # the first scale overflows, and leaves no trace
    assert np.corrcoef(unscaled.ravel(), straight.ravel())[0, 1] > 0.9999
    assert np.corrcoef(whole.ravel(), straight.ravel())[0, 1] > 0.9  # rounding turns one label in some dozens
    monkeypatch.setattr(fisher, "SCALES", (2.0**40,))
    with pytest.raises(AnalysisError, match="float16, at any scale"):
        fisher.slopes(half, make_switch(half), WINDOWS, ("nf4",), draws())


def test_picking_follows_the_probabilities():
    p = torch.tensor([[0.2, 0.0, 0.5, 0.3]]).expand(20_000, -1)
    counts = torch.bincount(fisher.pick(p, torch.rand(20_000, 1, generator=draws()))[:, 0], minlength=4)
    np.testing.assert_allclose(counts / 20_000, p[0], atol=0.015)
    assert counts[1] == 0
    assert fisher.pick(p[:1], torch.tensor([[0.9999999]])).item() == 3


def test_the_model_samples_its_own_text(switch):
    sampled = fisher.sample_windows(switch.model, 64, 6, 257, seed=0)
    assert sampled.shape == (64, 6)
    assert (sampled[:, 0] == 257).all()
    assert torch.equal(sampled, fisher.sample_windows(switch.model, 64, 6, 257, seed=0))
    assert not torch.equal(sampled, fisher.sample_windows(switch.model, 64, 6, 257, seed=1))
    many = fisher.sample_windows(switch.model, 4000, 3, 257, seed=0)
    with torch.no_grad():
        first = torch.softmax(switch.model(input_ids=torch.tensor([[257]])).logits[0, -1], -1)
        second = torch.softmax(switch.model(input_ids=many[:500, :2]).logits[:, -1], -1)
    share = torch.bincount(many[:, 1], minlength=len(first)) / 4000
    assert (share - first).abs().max() < 0.02
    # the cache carries the context: tokens are as likely under a fresh forward as entropy says
    told = -second.gather(1, many[:500, 2:]).log().mean()
    entropy = -(second * second.log()).sum(-1).mean()
    assert told.item() == pytest.approx(entropy.item(), abs=0.25)


# --- memory -----------------------------------------------------------------------------------------------


def test_memory_is_estimated_and_refused_with_advice(switch, monkeypatch):
    kept = footprint.kept_bytes(switch, 256)
    full = footprint.estimate(switch, kept, 3, 256, 2, checkpoint=False)
    assert footprint.estimate(switch, kept, 3, 256, 2, checkpoint=True) < full
    monkeypatch.setattr(footprint, "_memory", lambda device: (64_000_000_000, 64_000_000_000))
    plans = footprint.footprints(switch, 256, 2)
    assert plans[0] == footprint.Footprint(3, False, full)
    assert [(plan.batch, plan.checkpoint) for plan in plans[1:]] == [
        *[(2, False), (1, False)],
        *[(3, True), (2, True), (1, True)],
    ]
    monkeypatch.setattr(footprint, "_memory", lambda device: (1_000_000, 1_000_000))
    with pytest.raises(AnalysisError, match=r"GB are free.*length=128"):
        footprint.footprints(switch, 256, 2)


@pytest.mark.parametrize("arch", ["llama", "gpt2", "qwen3_5", "gemma3"])
def test_what_a_graph_keeps_is_counted_without_keeping_it(arch, tmp_path):
    model = load(arch, tmp_path)
    switch = make_switch(model)
    held = {p.untyped_storage().data_ptr(): p for p in (*model.parameters(), *model.buffers())}
    weights = set(held)

    def hold(tensor):  # alive until the end, so that no address is used twice
        return held.setdefault(tensor.untyped_storage().data_ptr(), tensor)

    def hold_input(module, inputs, output):
        hold(inputs[0])

    handles = [model.get_submodule(name).register_forward_hook(hold_input) for name in switch.layers]
    embedding = model.get_input_embeddings()
    handles.append(embedding.register_forward_hook(lambda m, i, out: out.requires_grad_(True)))
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor):
        model.base_model(input_ids=torch.zeros((1, 64), dtype=torch.long), use_cache=False)
    for handle in handles:
        handle.remove()
    expected = sum(t.untyped_storage().nbytes() for key, t in held.items() if key not in weights)
    kept = footprint.kept_bytes(switch, 64)
    assert kept.total == expected
    assert kept.total / 5 < kept.block < kept.total / 2  # four blocks and what is outside them
    assert all(not module._forward_hooks for module in model.modules())


# --- the whole --------------------------------------------------------------------------------------------


def make_source(directory):
    make_tiny("llama", directory, initializer_range=0.1)
    return resolve(str(directory))


def make_frame(source):
    layers = [x for x in list_layers(source) if x.quantizable]
    rows = {"name": [x.name for x in layers], "quantizable": True, "numel": [x.numel for x in layers]}
    sizes = {f"bytes_{f}": [layer_bytes(f, x.rows, x.cols) for x in layers] for f in ("16bit", *FORMATS)}
    return pd.DataFrame(rows | sizes)


OPTIONS = {"device": "cpu", "windows": 5, "length": 16, "text": "pydoc"}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_source(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def table(source, tmp_path_factory):
    run = open_run(tmp_path_factory.mktemp("run") / "run", source.identity())
    return sensitivities(run, source, make_frame(source), **OPTIONS)


def test_columns_and_what_is_recorded(table, source):
    assert list(table.index) == list(make_frame(source)["name"])
    expected = [f"{c.format(f)}" for f in FORMATS for c in
                ("fisher_{}", "fisher_{}_se", "fisher_token_{}", "fisher_token_{}_se",
                 "fisher_seq_{}", "fisher_seq_{}_se")]  # fmt: skip
    assert list(table.columns) == [*expected, "predicted_nf4", "predicted_int8"]
    assert np.isfinite(table.to_numpy()).all()
    assert (table > 0).all(axis=None)
    notes = table.attrs["sensitivity"]
    for fmt in FORMATS:
        assert table[f"predicted_{fmt}"].sum() == pytest.approx(notes["kl_all_layers"][fmt])
    assert notes["kl_all_layers"]["nf4"] > 20 * notes["kl_all_layers"]["int8"]
    assert notes["text"]["name"] == "pydoc"
    assert notes["start_token"] == 257


def test_the_estimate_ranks_layers_as_measuring_them_does(source, tmp_path):
    run = open_run(tmp_path / "run", source.identity())
    frame = make_frame(source)
    measured = sensitivities(run, source, frame, **OPTIONS | {"sensitivity": "measured", "windows": 8})
    assert list(measured.columns) == ["measured_nf4", "measured_int8", "predicted_nf4", "predicted_int8"]
    guess = sensitivities(run, source, frame, **OPTIONS | {"sensitivity": "random", "windows": 24})
    ranks = guess["fisher_nf4"].corr(measured["measured_nf4"], method="spearman")
    assert ranks > 0.9


def test_same_seed_same_numbers(table, source, tmp_path):
    again = sensitivities(open_run(tmp_path / "a", source.identity()), source, make_frame(source), **OPTIONS)
    pd.testing.assert_frame_equal(again, table, check_exact=True)
    other = sensitivities(
        open_run(tmp_path / "b", source.identity()), source, make_frame(source), **OPTIONS, seed=1
    )
    assert not np.allclose(other["fisher_nf4"], table["fisher_nf4"], rtol=1e-3)


def test_a_killed_run_goes_on_where_it_stopped(source, tmp_path, monkeypatch):
    run = open_run(tmp_path / "run", source.identity())
    script = f"""
        import os, signal
        from spi_utils import sensitivity
        from spi_utils.costs import footprint
        from spi_utils.models import resolve
        from spi_utils.runs import open_run
        from tests.test_sensitivity import OPTIONS, make_frame
        footprint.BATCH_TOKENS = 32
        whole, count = sensitivity.slopes, [0]
        def dying(*args, **kwargs):
            count[0] += 1
            if count[0] == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            return whole(*args, **kwargs)
        sensitivity.slopes = dying
        source = resolve({str(source.directory)!r})
        run = open_run({str(run.path)!r}, source.identity())
        sensitivity.sensitivities(run, source, make_frame(source), **OPTIONS)
    """
    killed = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], cwd=os.getcwd(), check=False)
    assert killed.returncode == -signal.SIGKILL
    monkeypatch.setattr(footprint, "BATCH_TOKENS", 32)
    calls = []
    whole = sensitivity.slopes
    monkeypatch.setattr(sensitivity, "slopes", lambda *a, **k: calls.append(1) or whole(*a, **k))
    resumed = sensitivities(run, source, make_frame(source), **OPTIONS)
    assert len(calls) == 1  # of three batches, two were finished
    sensitivities(run, source, make_frame(source), **OPTIONS)
    assert len(calls) == 1
    whole_again = sensitivities(run, source, make_frame(source), **OPTIONS, force=True)
    assert len(calls) == 4
    pd.testing.assert_frame_equal(resumed, whole_again, check_exact=True)


def test_where_memory_runs_out_a_smaller_batch_goes_on(source, tmp_path, monkeypatch, capsys):
    def full(most):
        def slopes(model, switch, ids, *rest):
            if len(ids) > most:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return whole(model, switch, ids, *rest)

        return slopes

    whole = sensitivity.slopes
    monkeypatch.setattr(sensitivity, "slopes", full(1))
    run = open_run(tmp_path / "run", source.identity())
    table = sensitivities(run, source, make_frame(source), **OPTIONS)
    assert np.isfinite(table["fisher_nf4"]).all()
    said = capsys.readouterr().out
    assert "out of memory, 2 at a time" in said and "1 at a time" in said
    monkeypatch.setattr(sensitivity, "slopes", full(0))
    with pytest.raises(AnalysisError, match="out of memory, 1 at a time, with gradient"):
        sensitivities(open_run(tmp_path / "b", source.identity()), source, make_frame(source), **OPTIONS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sensitivity": "sefl"}, r"'sefl' is none of self, random.*no file"),
        ({"refine_at": (3.0,)}, "between 4 and 16"),
        ({"sensitivity": "measured", "refine_at": (6.0,)}, "every layer already"),
    ],
)
def test_settings_that_make_no_sense_are_refused(source, tmp_path, options, message):
    run = open_run(tmp_path / "run", source.identity())
    with pytest.raises(AnalysisError, match=message):
        sensitivities(run, source, make_frame(source), **OPTIONS | options)


def test_a_users_own_text_is_used_throughout(source, tmp_path):
    file = tmp_path / "mine.txt"
    file.write_text("All of this is my own text. " * 40)
    run = open_run(tmp_path / "run", source.identity())
    table = sensitivities(run, source, make_frame(source), **OPTIONS | {"sensitivity": str(file)})
    assert table.attrs["sensitivity"]["text"]["name"] == "mine"
    assert (table["fisher_nf4"] > 0).all()


# --- refining ---------------------------------------------------------------------------------------------


def test_the_cut_is_where_the_budget_ends():
    values, extra = np.array([8.0, 1.0, 4.0, 2.0]), np.array([2.0, 1.0, 1.0, 1.0])
    # by cost per byte: 4 and 4 (3 bytes together), then 2, then 1
    assert cut(values, extra, 3) == 2.0
    assert cut(values, extra, 4) == 1.0
    assert cut(values, extra, 5) == 0.0


def test_refining_measures_only_layers_near_the_cut_and_stops():
    rng = np.random.default_rng(0)
    truth = np.exp(rng.normal(0, 1.5, 200))
    estimate = truth * 0.8 * np.exp(rng.normal(0, 0.1, 200))
    asked = []

    def measure(index):
        asked.append(index)
        return truth[index]

    extra = np.ones(200)
    found = refine(estimate, 0.1 * estimate, extra, [60.0], measure)
    assert len(asked) == len(set(asked)) == found.measured.sum() <= 30  # 15 % of the layers
    assert found.settled
    best, kept = set(np.argsort(-truth)[:60]), set(np.argsort(-found.values)[:60])
    plain = set(np.argsort(-estimate)[:60])
    assert truth[list(kept)].sum() >= truth[list(plain)].sum()
    assert truth[list(kept)].sum() > 0.998 * truth[list(best)].sum()
    # what was not measured is scaled by what was: the estimate is a fifth too low
    left = ~found.measured
    assert np.median(found.values[left] / truth[left]) == pytest.approx(1.0, abs=0.05)
    far = [i for i in asked if abs(np.log(truth[i] / np.sort(truth)[-60])) > 1]
    assert not far


def test_refining_keeps_to_its_limit_and_says_that_it_is_not_done():
    values = np.full(50, 1.0)
    found = refine(values, 0.5 * values, np.ones(50), [20.0], lambda i: 1.0 + i / 50, limit=6)
    assert found.measured.sum() == 6
    assert not found.settled


def test_refined_column_holds_measured_costs(source, tmp_path):
    run = open_run(tmp_path / "run", source.identity())
    table = sensitivities(run, source, make_frame(source), **OPTIONS, refine_at=(6.0, 9.0))
    notes = table.attrs["sensitivity"]["refined_nf4"]
    assert 0 < notes["evaluations"] <= 4
    ratio = table["refined_nf4"] / table["fisher_nf4"]
    # the layers that were not measured share one factor
    assert (np.isclose(ratio, ratio.median(), rtol=1e-9)).sum() == len(table) - notes["evaluations"]
    total = table.attrs["sensitivity"]["kl_all_layers"]["nf4"]
    assert table["predicted_nf4"].sum() == pytest.approx(total)
    np.testing.assert_allclose(
        table["predicted_nf4"] / table["refined_nf4"], total / table["refined_nf4"].sum()
    )
