"""Token scores, variants and measured costs, against hand computations and the models' own losses."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from spi_utils import scoring
from spi_utils.errors import EvaluationError
from spi_utils.formats import dequantize, quantize
from spi_utils.scoring import Switch
from tests.tiny import Originals, make_tiny


def load(directory, dtype=torch.float32):
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()
    return model.requires_grad_(False)


def linear_names(model):
    kinds = {"Linear", "Conv1D"}
    found = [name for name, module in model.named_modules() if type(module).__name__ in kinds]
    return [name for name in found if "head" not in name]


def make_switch(model, **options):
    names = linear_names(model)
    return Switch(model, Originals(model, names, torch.float16), names, **options)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    # larger weights than at initialization: a tiny random model is otherwise nearly insensitive
    directory = make_tiny("llama_untied", tmp_path_factory.mktemp("llama"), initializer_range=0.15)
    return directory


@pytest.fixture
def model(directory):
    return load(directory)


@pytest.fixture
def windows():
    return torch.randint(0, 256, (5, 24), generator=torch.Generator().manual_seed(1))


def exact(model, windows):
    with torch.no_grad():
        return torch.log_softmax(model(input_ids=windows).logits[:, :-1].double(), dim=-1)


def test_scores_by_hand_on_a_vocabulary_of_three():
    # One token, hidden state (1): logits are the head's column. p = (1/2, 1/4, 1/4), q = (1/4, 1/2, 1/4).
    p, q = torch.tensor([0.5, 0.25, 0.25]), torch.tensor([0.25, 0.5, 0.25])

    class Toy(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(2, 3, bias=False)
            self.head.weight.data = torch.stack([p.log(), q.log()], dim=1) + 5.0  # a constant changes nothing

        def get_output_embeddings(self):
            return self.head

        config = type("Config", (), {"get_text_config": lambda self: None})()

    head = scoring.Head(Toy().requires_grad_(False))
    hidden = torch.tensor([[0.0, 1.0]])  # the variant sees q
    reference = scoring.Reference(torch.tensor([[[1.0, 0.0]]]), -p[:1].log()[None], torch.tensor([[0]]))
    got = scoring._rows(head, hidden, torch.tensor([0]), scoring.COLUMNS, scoring._compare, reference)
    assert got["nll"].item() == pytest.approx(math.log(4))
    assert got["kl"].item() == pytest.approx(0.5 * math.log(2) + 0.25 * math.log(0.5))
    assert got["dp"].item() == pytest.approx(-0.25)
    assert not got["same_top1"].item()


def test_losses_are_those_of_transformers(model, windows):
    scores = scoring.token_scores(model, windows, scoring.reference_states(model, windows))
    assert scores.nll.shape == scores.kl.shape == (5, 23) and scores.kl.max() == 0
    assert scores.nll.mean() == pytest.approx(model(input_ids=windows, labels=windows).loss.item(), rel=1e-5)


def test_divergence_is_exact_whatever_the_batch_and_the_chunks(model, windows, monkeypatch):
    switch = make_switch(model)
    reference = scoring.reference_states(model, windows)
    log_p = exact(model, windows)
    formats = dict.fromkeys(switch.layers[::2], "nf4")
    switch.to(formats)
    log_q = exact(model, windows)
    expected = (log_p.exp() * (log_p - log_q)).sum(-1).numpy()
    target = windows[:, 1:, None]
    dp = (log_q.gather(2, target).exp() - log_p.gather(2, target).exp())[..., 0].numpy()
    assert expected.mean() > 1e-4
    for batch, logit_bytes in ((None, 10**9), (2, 100 * 320), (1, 1)):
        monkeypatch.setattr(scoring, "LOGIT_BYTES", logit_bytes)
        scores = scoring.token_scores(model, windows, reference, batch=batch)
        np.testing.assert_allclose(scores.kl, expected, rtol=2e-3, atol=2e-7)
        np.testing.assert_allclose(scores.dp, dp, atol=1e-6)
        np.testing.assert_array_equal(scores.same_top1, (log_p.argmax(-1) == log_q.argmax(-1)).numpy())


LLAMA4 = {"model_type": "llama4_text", "intermediate_size_mlp": 256}  # its `base_model` is the whole model


@pytest.mark.parametrize(
    ("arch", "options"),
    [
        *((arch, {}) for arch in ("llama", "qwen3_5", "gemma3", "phi3", "gpt2", "mixtral")),
        ("mixtral", LLAMA4),
    ],
)
def test_every_architecture_is_scored_and_comes_back_to_16bit(arch, options, tmp_path):
    model = load(make_tiny(arch, tmp_path, **options))
    windows = torch.randint(0, 256, (2, 16), generator=torch.Generator().manual_seed(0))
    switch = make_switch(model)
    reference = scoring.reference_states(model, windows)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    name = switch.layers[1]
    switch.to(dict.fromkeys(switch.layers, "nf4"))
    weight = model.get_submodule(name).weight
    original = before[f"{name}.weight"].half()
    turned = "Conv1D" in type(model.get_submodule(name)).__name__
    expected = dequantize(quantize(original.t().contiguous() if turned else original, "nf4"), torch.float16)
    assert torch.equal(weight, (expected.t() if turned else expected).float())
    assert scoring.token_scores(model, windows, reference).kl.mean() > 0
    switch.restore()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert np.abs(scoring.token_scores(model, windows, reference).kl).max() == 0


@pytest.mark.parametrize(
    ("arch", "attribute"),
    [("gemma2", "final_logit_softcapping"), ("granite", "logits_scaling"), ("cohere", "logit_scale")],
)
def test_capped_and_scaled_logits_are_the_models_own(arch, attribute):
    from transformers import AutoConfig

    options = dict(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, pad_token_id=0, initializer_range=0.3, **{attribute: 2.5},
    )  # fmt: skip
    torch.manual_seed(0)
    model = (
        AutoModelForCausalLM.from_config(AutoConfig.for_model(arch, **options)).eval().requires_grad_(False)
    )
    windows = torch.randint(0, 97, (2, 12))
    expected = -exact(model, windows).gather(2, windows[:, 1:, None])[..., 0]
    got = scoring.reference_states(model, windows).nll
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-5)


def test_an_unknown_change_of_the_logits_is_an_error(model, windows):
    head = model.get_output_embeddings()
    head.register_forward_hook(lambda module, inputs, output: output * 0.5)
    with pytest.raises(EvaluationError, match="_ADJUST"):
        scoring.reference_states(model, windows)


def test_noise_has_the_norm_of_the_nf4_error_and_its_own_seed(model):
    name = linear_names(model)[3]
    values = {seed: make_switch(model, seed=seed).values(name, "noise").float() for seed in (0, 1)}
    again = make_switch(model, seed=0).values(name, "noise").float()
    weight = model.get_submodule(name).weight
    error = (dequantize(quantize(weight.half(), "nf4")) - weight).norm()
    assert (values[0] - weight).norm().item() == pytest.approx(error.item(), rel=5e-3)
    assert torch.equal(values[0], again)
    assert not torch.equal(values[0], values[1])


def test_overflow_names_the_variant_and_what_to_do(model, windows):
    reference = scoring.reference_states(model, windows)
    model.get_submodule("model.layers.2.mlp.down_proj").weight.fill_(torch.inf)
    with pytest.raises(EvaluationError, match=r"'broken'.*float32"):
        scoring.token_scores(model, windows, reference, label="broken")


def test_out_of_memory_halves_the_batch_says_so_and_goes_on(model, windows, monkeypatch, capsys):
    reference = scoring.reference_states(model, windows)
    whole = scoring.token_scores(model, windows, reference).nll
    states = scoring._states

    def tight(model, ids):
        if len(ids) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return states(model, ids)

    monkeypatch.setattr(scoring, "_states", tight)
    scores = scoring.token_scores(model, windows, reference, batch=4)
    np.testing.assert_allclose(scores.nll, whole, rtol=1e-5)
    assert capsys.readouterr().out.splitlines() == [
        "out of memory: going on with 2 windows at a time",
        "out of memory: going on with 1 windows at a time",
    ]
    monkeypatch.setattr(scoring, "_states", lambda model, ids: tight(model, torch.cat([ids, ids])))
    with pytest.raises(EvaluationError, match="single window of 24 tokens"):
        scoring.token_scores(model, windows, reference)
