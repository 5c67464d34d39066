"""Nuclear initialization, the trace norm and the rank of mass, against closed forms, numpy and gradcheck."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from spi_utils.compactness import (
    NuclearInit,
    decay_for_rank,
    factored_trace_norm,
    nuclear_init_,
    rank_of_mass,
    trace_norm,
    trace_norm_penalty,
)
from spi_utils.errors import AnalysisError, SPIError

HALF = (torch.float16, torch.bfloat16)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def gaussian(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64).to(dtype)


def orthonormal(rows, cols, seed=0):
    return torch.linalg.qr(gaussian(rows, cols, seed=seed))[0]


def of_spectrum(sigma, rows, cols):
    sigma = torch.tensor(sigma, dtype=torch.float64)
    return orthonormal(rows, len(sigma), 1) * sigma @ orthonormal(cols, len(sigma), 2).T


def gradient(weight, **options):
    leaf = weight.clone().requires_grad_()
    trace_norm(leaf, **options).backward()
    return leaf.grad


# --- rank of mass -----------------------------------------------------------------------------------------


def test_the_preprints_ranks_count_strictly_before_and_one_more_reaches_it():
    k = np.arange(1, 101)
    for sigma, before in ((k**-0.5, 82), (np.exp(-0.2 * k), 11)):
        assert rank_of_mass(sigma, count="before") == before
        assert rank_of_mass(sigma) == before + 1
        assert sigma[:before].sum() < 0.9 * sigma.sum() <= sigma[: before + 1].sum()


def test_rank_of_a_geometric_spectrum_is_the_closed_form():
    q, n = math.exp(-0.05), 200
    wanted = math.log(1 - 0.7 * (1 - q**n)) / math.log(q)  # 1 - q^r = 0.7 (1 - q^n)
    assert rank_of_mass(q ** np.arange(n), 0.7) == math.ceil(wanted)


def test_exactly_the_share_counts_as_reached_whatever_the_order():
    assert rank_of_mass(np.ones(10)) == 9
    assert rank_of_mass(np.array([1.0, 9.0])) == 1
    assert rank_of_mass(np.array([5.0, 0.0, 0.0]), 1.0) == 1


@pytest.mark.parametrize("sigma", [[], [0.0, 0.0], [1.0, -1.0], [1.0, np.nan], [[1.0]]])
def test_what_is_no_spectrum_is_refused(sigma):
    with pytest.raises(AnalysisError, match="singular values"):
        rank_of_mass(np.array(sigma))


@pytest.mark.parametrize("options", [{"share": 0}, {"share": 1.1}, {"count": "after"}])
def test_shares_and_counts_that_arent_any_are_refused(options):
    with pytest.raises(AnalysisError, match="expected 0 < share"):
        rank_of_mass(np.ones(3), **options)


# --- initialization ---------------------------------------------------------------------------------------


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


def test_a_flat_spectrum_is_the_limit_of_the_largest_rank():
    assert decay_for_rank(60, 66) == 0.0 < decay_for_rank(59, 66)
    sigma = np.linalg.svd(nuclear_init_(torch.empty(66, 66), 60, generator=seeded()), compute_uv=False)
    assert sigma == pytest.approx(np.ones(66), rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_seed_alone_decides_in_every_precision(dtype):
    one, same, other = (
        nuclear_init_(torch.empty(32, 48, dtype=dtype), 8, generator=seeded(s)) for s in (3, 3, 4)
    )
    assert torch.equal(one, same) and not torch.equal(one, other) and one.dtype == dtype
    wide = nuclear_init_(torch.empty(32, 48), 8, generator=seeded(3))
    assert dtype == torch.float64 or torch.allclose(one.float(), wide, atol=8e-3)


def test_the_bases_are_spread_over_all_directions():
    weights = torch.stack([nuclear_init_(torch.empty(6, 6), 0.3, generator=seeded(s)) for s in range(400)])
    assert weights.mean(0).abs().max() < 0.2 and weights.square().mean(0) == pytest.approx(1 / 6, abs=0.05)


def test_a_module_is_initialized_by_apply_and_stays_trainable():
    model = nn.Sequential(nn.Linear(24, 16), nn.LayerNorm(16), nn.Linear(16, 24, bias=False))
    model.apply(NuclearInit(0.5, generator=seeded()))
    assert torch.equal(model[0].bias, torch.zeros(16)) and model[0].weight.requires_grad
    for layer in (model[0], model[2]):
        sigma = np.linalg.svd(layer.weight.detach().numpy(), compute_uv=False)
        assert sigma[1] / sigma[0] == pytest.approx(math.exp(-0.5), rel=1e-4)
    assert torch.equal(model[1].weight, torch.ones(16))


@pytest.mark.parametrize(
    ("weight", "value", "message"),
    [
        (torch.empty(2, 3, 4), 0.2, "got shape"),
        (torch.empty(5), 0.2, "got shape"),
        (torch.empty(0, 4), 0.2, "with entries"),
        (torch.empty(4, 4, dtype=torch.int32), 0.2, "int32"),
        (torch.empty(8, 4), 5, "outside 1…4"),
        (torch.empty(8, 4), 0, "outside 1…4"),
        (torch.empty(20, 20), 19, "at most 18"),
        (torch.empty(4, 4), -0.2, "above 0"),
        (torch.empty(4, 4), float("nan"), "above 0"),
        (torch.empty(4, 4), True, "expected an int"),
    ],
)
def test_bad_initializations_are_refused(weight, value, message):
    with pytest.raises(AnalysisError, match=message):
        nuclear_init_(weight, value)


def test_a_gain_that_isnt_positive_is_refused():
    with pytest.raises(SPIError, match="gain"):
        nuclear_init_(torch.empty(4, 4), 0.2, gain=0)


# --- trace norm -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["exact", "fast"])
@pytest.mark.parametrize("shape", [(5, 5), (4, 7), (7, 4), (1, 3)])
def test_value_is_numpys_and_the_gradient_passes_gradcheck(shape, method):
    weight = gaussian(*shape).requires_grad_()
    assert trace_norm(weight, method=method).item() == pytest.approx(np.linalg.norm(weight.detach(), "nuc"))
    assert torch.autograd.gradcheck(lambda w: trace_norm(w, method=method), weight, atol=1e-6)


@pytest.mark.parametrize("method", ["exact", "fast"])
def test_repeated_singular_values_have_the_same_smooth_gradient(method):
    weight = of_spectrum([2.0, 2.0, 2.0, 1.0, 1.0], 5, 6)
    assert torch.autograd.gradcheck(
        lambda w: trace_norm(w, method=method), weight.requires_grad_(), atol=1e-6
    )
    square = 3 * orthonormal(6, 6)
    assert torch.allclose(gradient(square, method=method), square / 3, atol=1e-7)


@pytest.mark.parametrize("method", ["exact", "fast"])
def test_zero_singular_values_get_no_gradient_and_no_nan(method):
    weight = of_spectrum([3.0, 1.0], 6, 5)
    u, _, vh = np.linalg.svd(weight.numpy())
    assert np.allclose(gradient(weight, method=method), u[:, :2] @ vh[:2], atol=1e-6)
    assert torch.equal(gradient(torch.zeros(4, 3), method=method), torch.zeros(4, 3))


@pytest.mark.parametrize("method", ["exact", "fast"])
def test_the_gradient_is_a_subgradient_at_a_rank_deficient_weight(method):
    weight = of_spectrum([2.0, 0.5], 6, 6)
    slope = gradient(weight, method=method)
    for seed in range(50):
        other = gaussian(6, 6, seed=seed)
        bound = np.linalg.norm(weight, "nuc") + float((slope * (other - weight)).sum())
        assert np.linalg.norm(other, "nuc") >= bound - 1e-6


@pytest.mark.parametrize("dtype", [*HALF, torch.float32])
@pytest.mark.parametrize("method", ["exact", "fast"])
def test_narrow_weights_are_computed_in_float32(dtype, method):
    weight = gaussian(48, 96, dtype=dtype)
    value = trace_norm(weight, method=method)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(np.linalg.norm(weight.double(), "nuc"), rel=1e-5)
    found = gradient(weight, method=method)
    u, _, vh = np.linalg.svd(weight.double().numpy(), full_matrices=False)
    assert found.dtype == dtype and np.allclose(found.double(), u @ vh, atol=2e-3)


def test_the_fast_gradient_differs_only_where_singular_values_are_tiny():
    weight = of_spectrum(np.geomspace(1, 1e-5, 20), 32, 20).float()
    u, _, vh = np.linalg.svd(weight.numpy(), full_matrices=False)
    pull = np.diag(u.T @ gradient(weight, method="fast").numpy() @ vh.T)
    sigma = np.geomspace(1, 1e-5, 20)
    assert pull[sigma > 1e-2] == pytest.approx(1, abs=5e-3)
    assert (pull[sigma < 1e-4] < 0.5).all() and (pull > -1e-3).all()


def test_descending_the_penalty_lowers_the_rank_and_keeps_the_strongest_direction():
    weight = of_spectrum([4.0, 1.0, 0.5], 8, 8).requires_grad_()
    for _ in range(12):
        (slope,) = torch.autograd.grad(trace_norm_penalty([weight], 1.0, method="exact"), weight)
        weight = (weight - 0.1 * slope).detach().requires_grad_()
    sigma = np.linalg.svd(weight.detach().numpy(), compute_uv=False)
    assert sigma[0] == pytest.approx(2.8, abs=1e-6) and sigma[1:].max() < 0.11


def test_the_penalty_is_the_coefficient_times_the_sum():
    weights = [gaussian(4, 6), gaussian(5, 5, seed=1)]
    wanted = 0.3 * sum(np.linalg.norm(w, "nuc") for w in weights)
    assert trace_norm_penalty(weights, 0.3, method="exact").item() == pytest.approx(wanted)
    assert trace_norm_penalty(weights, 0.0).item() == 0


def test_the_variational_form_bounds_the_norm_and_meets_it_for_balanced_factors():
    left, right = gaussian(6, 3), gaussian(3, 5, seed=1)
    assert factored_trace_norm(left, right).item() > np.linalg.norm(left @ right, "nuc")
    u, sigma, vh = torch.linalg.svd(left @ right, full_matrices=False)
    root = sigma.sqrt()
    assert factored_trace_norm(u * root, root[:, None] * vh).item() == pytest.approx(sigma.sum().item())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: trace_norm(torch.ones(2, 2, 2)), "got shape"),
        (lambda: trace_norm(torch.tensor([[1.0, float("nan")]])), "NaN or infinity"),
        (lambda: trace_norm(torch.tensor([[float("inf")]]), method="fast"), "NaN or infinity"),
        (lambda: trace_norm(torch.ones(2, 2, dtype=torch.int64)), "int64"),
        (lambda: trace_norm(torch.ones(2, 2), method="svd"), "'exact' or 'fast'"),
        (lambda: trace_norm_penalty([torch.ones(2, 2)], -1e-3), "0 or more"),
        (lambda: trace_norm_penalty([torch.ones(2, 2)], float("nan")), "0 or more"),
        (lambda: trace_norm_penalty([], 1e-3), "no weights"),
        (lambda: factored_trace_norm(torch.ones(2, 3), torch.ones(2, 3)), "no product"),
        (lambda: factored_trace_norm(torch.ones(3), torch.ones(3, 2)), "got shape"),
    ],
)
def test_bad_penalties_are_refused(call, message):
    with pytest.raises(SPIError, match=message):
        call()
