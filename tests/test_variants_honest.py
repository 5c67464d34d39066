"""Controls, rivals and references are what their names say: faults that gave wrong numbers without a word."""

import copy

import pytest
import torch

from spi_utils import scoring
from spi_utils.judging.rivals import LoadedRival, Rival
from spi_utils.models import load_model, resolve
from spi_utils.scoring import Head, reference_states, token_scores
from tests.tiny import VOCABULARY


@pytest.fixture(scope="module")
def model(tiny):
    return load_model(resolve(str(tiny("llama_untied"))), device="cpu", dtype=torch.float32)


@pytest.fixture(scope="module")
def windows():
    return torch.randint(0, VOCABULARY - 64, (4, 24), generator=torch.Generator().manual_seed(0))


def test_a_rivals_4_bit_head_scores_as_its_dequantized_weights_do(model, windows, tmp_path):
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
    rival = Rival("rival:x", "x", tmp_path, 0, "bitsandbytes")
    want, got = (LoadedRival(rival, one).score(windows, reference, own) for one in (plain, quantized))
    assert want.kl.mean() > 1e-4  # a 4-bit head is another head
    # bitsandbytes multiplies in bfloat16 on some CPUs
    assert got.nll == pytest.approx(want.nll, abs=5e-3)
    assert got.kl.mean() == pytest.approx(want.kl.mean(), rel=0.05)


class FailsOnce:
    """A column that can't be copied at its first use: memory ran out."""

    def __init__(self, held):
        self.held, self.failed = held, False

    def view(self, *shape):
        if not self.failed:
            self.failed = True
            raise torch.OutOfMemoryError("injected")
        return self.held.view(*shape)


@pytest.mark.parametrize("column", [0, 1], ids=["nll", "top1"])
def test_running_out_of_memory_between_two_columns_keeps_the_reference_aligned(
    model, windows, column, monkeypatch
):
    want = reference_states(model, windows, batch=2)
    rows, calls = scoring._reference_rows, []

    def failing(*args):
        columns = list(rows(*args))
        if len(calls) == 1:  # of the second batch, after the check that numbers are finite
            columns[column] = FailsOnce(columns[column])
        calls.append(1)
        return columns

    monkeypatch.setattr(scoring, "_reference_rows", failing)
    monkeypatch.setattr(scoring, "_check_finite", lambda *_: None)
    got = reference_states(model, windows, batch=2)
    assert len(calls) == 4  # two windows, a failure, then one and one
    for name in ("hidden", "nll", "top1"):
        assert getattr(got, name).shape == getattr(want, name).shape
        assert torch.allclose(getattr(got, name).float(), getattr(want, name).float(), atol=1e-4)
    assert token_scores(model, windows, got).kl == pytest.approx(0, abs=1e-5)
