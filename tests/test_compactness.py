"""Nuclear initialization, the trace norm and the rank of mass, against closed forms, numpy and gradcheck."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from spi_utils.compactness import (
    NuclearInit,
    decay_for_rank,
    nuclear_init_,
    rank_of_mass,
    trace_norm,
    trace_norm_penalty,
)
from spi_utils.errors import AnalysisError


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def gaussian(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64).to(dtype)


def of_spectrum(sigma, rows, cols):
    left, right = (torch.linalg.qr(gaussian(n, len(sigma), seed=n))[0] for n in (rows, cols))
    return left * torch.tensor(sigma, dtype=torch.float64) @ right.T


def gradient(weight, **options):
    leaf = weight.clone().requires_grad_()
    trace_norm(leaf, **options).backward()
    return leaf.grad


def test_the_preprints_ranks_count_strictly_before_and_one_more_reaches_it():
    k = np.arange(1, 101)
    for sigma, before in ((k**-0.5, 82), (np.exp(-0.2 * k), 11)):
        assert rank_of_mass(sigma, count="before") == before == rank_of_mass(sigma) - 1
        assert sigma[:before].sum() < 0.9 * sigma.sum() <= sigma[: before + 1].sum()
    assert rank_of_mass(np.ones(10)) == 9 and rank_of_mass(np.array([1.0, 9.0])) == 1
    q, n = math.exp(-0.05), 200
    wanted = math.log(1 - 0.7 * (1 - q**n)) / math.log(q)  # 1 - q^r = 0.7 (1 - q^n)
    assert rank_of_mass(q ** np.arange(n), 0.7) == math.ceil(wanted)


@pytest.mark.parametrize("shape", [(40, 40), (64, 24), (24, 64), (1, 7)])
def test_singular_values_fall_exponentially_at_the_usual_norm(shape):
    weight = torch.empty(shape, dtype=torch.float64)
    assert nuclear_init_(weight, 0.2, gain=1.5, generator=seeded()) is weight
    sigma = np.linalg.svd(weight.numpy(), compute_uv=False)
    assert np.allclose(sigma / sigma[0], np.exp(-0.2 * np.arange(len(sigma))), atol=1e-12)
    assert np.linalg.norm(weight) == pytest.approx(1.5 * math.sqrt(shape[0]))


@pytest.mark.parametrize("rank", [1, 2, 7, 30, 57])
def test_an_integer_is_the_rank_that_holds_ninety_per_cent(rank):
    weight = nuclear_init_(torch.empty(64, 96), rank, generator=seeded())
    assert rank_of_mass(np.linalg.svd(weight.double().numpy(), compute_uv=False)) == rank
    assert decay_for_rank(60, 66) == 0.0 < decay_for_rank(59, 66)  # a flat spectrum is the limit


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_seed_alone_decides_in_every_precision(dtype):
    made = [nuclear_init_(torch.empty(32, 48, dtype=dtype), 8, generator=seeded(s)) for s in (3, 3, 4)]
    assert torch.equal(made[0], made[1]) and not torch.equal(made[0], made[2]) and made[0].dtype == dtype
    wide = nuclear_init_(torch.empty(32, 48), 8, generator=seeded(3))
    assert dtype == torch.float64 or torch.allclose(made[0].float(), wide, atol=8e-3)


def test_the_bases_are_spread_over_all_directions():
    weights = torch.stack([nuclear_init_(torch.empty(6, 6), 0.3, generator=seeded(s)) for s in range(400)])
    assert weights.mean(0).abs().max() < 0.2 and weights.square().mean(0) == pytest.approx(1 / 6, abs=0.05)


def test_a_module_is_initialized_by_apply_and_stays_trainable():
    model = nn.Sequential(nn.Linear(24, 16), nn.LayerNorm(16), nn.Linear(16, 24, bias=False))
    model.apply(NuclearInit(0.5, generator=seeded()))
    assert torch.equal(model[0].bias, torch.zeros(16)) and model[0].weight.requires_grad
    sigma = np.linalg.svd(model[2].weight.detach().numpy(), compute_uv=False)
    assert sigma[1] / sigma[0] == pytest.approx(math.exp(-0.5), rel=1e-4)
    assert torch.equal(model[1].weight, torch.ones(16))


@pytest.mark.parametrize("method", ["exact", "fast"])
@pytest.mark.parametrize(
    "weight",
    [gaussian(5, 5), gaussian(4, 7), gaussian(7, 4), gaussian(1, 3), of_spectrum([2, 2, 2, 1, 1], 5, 6)],
)
def test_value_is_numpys_and_the_gradient_passes_gradcheck(weight, method):
    value = trace_norm(weight, method=method).item()
    assert value == pytest.approx(np.linalg.norm(weight, "nuc"))
    leaf = weight.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda w: trace_norm(w, method=method), leaf, atol=1e-6)


@pytest.mark.parametrize("method", ["exact", "fast"])
def test_zero_singular_values_get_no_gradient_and_what_there_is_is_a_subgradient(method):
    weight = of_spectrum([3.0, 1.0], 6, 5)
    u, _, vh = np.linalg.svd(weight.numpy())
    slope = gradient(weight, method=method)
    assert np.allclose(slope, u[:, :2] @ vh[:2], atol=1e-6)
    assert torch.equal(gradient(torch.zeros(4, 3), method=method), torch.zeros(4, 3))
    for seed in range(20):
        other = gaussian(6, 5, seed=seed)
        bound = np.linalg.norm(weight, "nuc") + float((slope * (other - weight)).sum())
        assert np.linalg.norm(other, "nuc") >= bound - 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("method", ["exact", "fast"])
def test_narrow_weights_are_computed_in_float32(dtype, method):
    weight = gaussian(48, 96, dtype=dtype)
    value = trace_norm(weight, method=method)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(np.linalg.norm(weight.double(), "nuc"), rel=1e-5)
    found = gradient(weight, method=method)
    u, _, vh = np.linalg.svd(weight.double().numpy(), full_matrices=False)
    assert found.dtype == dtype and np.allclose(found.double(), u @ vh, atol=2e-3)


def test_the_penalty_is_the_coefficient_times_the_sum():
    weights = [gaussian(4, 6), gaussian(5, 5, seed=1)]
    wanted = 0.3 * sum(np.linalg.norm(w, "nuc") for w in weights)
    assert trace_norm_penalty(weights, 0.3, method="exact").item() == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        *(
            (lambda s=s: rank_of_mass(np.array(s)), "singular values")
            for s in ([], [0.0], [1, -1.0], [[1.0]])
        ),
        (lambda: rank_of_mass(np.ones(3), 1.1), "expected 0 < share"),
        (lambda: rank_of_mass(np.ones(3), count="after"), "'at_least' or 'before'"),
        (lambda: nuclear_init_(torch.empty(2, 3, 4), 0.2), "got shape"),
        (lambda: nuclear_init_(torch.empty(0, 4), 0.2), "with entries"),
        (lambda: nuclear_init_(torch.empty(4, 4, dtype=torch.int32), 0.2), "int32"),
        (lambda: nuclear_init_(torch.empty(8, 4), 0), "outside 1…4"),
        (lambda: nuclear_init_(torch.empty(20, 20), 19), "outside 1…18"),
        (lambda: nuclear_init_(torch.empty(4, 4), -0.2), "above 0"),
        (lambda: nuclear_init_(torch.empty(4, 4), True), "expected an int"),
        (lambda: nuclear_init_(torch.empty(4, 4), 0.2, gain=0), "gain"),
        (lambda: trace_norm(torch.ones(2, 2, 2)), "got shape"),
        (lambda: trace_norm(torch.tensor([[1.0, float("nan")]])), "NaN or infinity"),
        (lambda: trace_norm(torch.ones(2, 2), method="svd"), "'exact' or 'fast'"),
        (lambda: trace_norm_penalty([torch.ones(2, 2)], float("nan")), "0 or more"),
        (lambda: trace_norm_penalty([], 1e-3), "no weights"),
    ],
)
def test_what_is_none_is_refused(call, message):
    with pytest.raises(AnalysisError, match=message):
        call()
