"""The same answers as WeightWatcher 0.7.7: on made-up spectra, and on every matrix of the bundled model."""

import logging
import os

import numpy as np
import pytest
import torch

from spi_utils.models import list_layers, open_weights
from spi_utils.progress import one_thread
from spi_utils.spectra import analyze_matrix, fit_power_law

if "CI" not in os.environ:  # there a missing reference is an error, not a skip
    pytest.importorskip("weightwatcher", exc_type=ImportError)
logging.getLogger("weightwatcher").setLevel(logging.ERROR)

# ours: WeightWatcher's
COLUMNS = {
    "alpha_pl": "alpha",
    "alpha_pl_xmin": "xmin",
    "alpha_pl_ks": "D",
    "alpha_pl_tail": "num_pl_spikes",
    "alpha_pl_sigma": "sigma",
    "alpha_weighted": "alpha_weighted",
    "log_alpha_norm": "log_alpha_norm",
    "log_frobenius_norm": "log_norm",
    "log_spectral_norm": "log_spectral_norm",
    "stable_rank": "stable_rank",
}


def spectrum(kind: str, count: int, rng: np.random.Generator) -> np.ndarray:
    if kind == "pareto":
        return rng.pareto(1.2, count) + 1
    if kind == "lognormal":
        return rng.lognormal(0, 1.5, count) + 1e-4
    return np.linalg.svd(rng.standard_normal((count, 2 * count)), compute_uv=False) ** 2


@pytest.mark.parametrize("kind", ["gaussian", "pareto", "lognormal"])
@pytest.mark.parametrize("count", [2, 8, 19, 20, 400])
def test_fit_is_weightwatchers(kind, count):
    """Below 20 eigenvalues too, where 0.7.7 corrects the exponent's bias and wants tails of at least 8."""
    from weightwatcher.WW_powerlaw import WWFit

    for seed in range(3):
        values = spectrum(kind, count, np.random.default_rng(seed))
        theirs, ours = WWFit(values), fit_power_law(values)
        got = (ours.alpha, ours.xmin, ours.ks)
        assert got == pytest.approx((theirs.alpha, theirs.xmin, theirs.D), rel=1e-9)
        if count >= 8:  # below it WeightWatcher's sigma belongs to an exponent of 0, and is negative
            assert ours.sigma == pytest.approx(theirs.sigma, rel=1e-9)
        if count >= 20:
            assert ours.tail == len(theirs.data)


@pytest.mark.parametrize("shape", [(12, 80), (80, 12), (15, 15), (60, 90)])
def test_rows_are_weightwatchers(shape):
    torch.manual_seed(0)
    layers = [torch.nn.Linear(shape[1], shape[0], bias=False) for _ in range(3)]
    for layer in layers:
        layer.weight.data = (torch.randn(shape) * torch.rand(shape[0], 1) ** 2).half().float()
    assert_weightwatchers([layer.weight.detach() for layer in layers], torch.nn.Sequential(*layers))


@pytest.mark.slow
def test_every_matrix_of_the_bundled_model(bundled):
    names = [layer.name for layer in list_layers(bundled) if layer.role == "linear"]
    assert len(names) == 210
    with open_weights(bundled) as weights:
        matrices = [weights.read(f"{name}.weight") for name in names]
    linears = []
    for matrix in matrices:
        linear = torch.nn.Linear(*reversed(matrix.shape), bias=False)
        linear.weight.data = matrix.float()
        linears.append(linear)
    assert_weightwatchers(matrices, torch.nn.Sequential(*linears))


def assert_weightwatchers(matrices: list[torch.Tensor], model: torch.nn.Module) -> None:
    """WeightWatcher's analysis of the model, row by row against ours, to 1e-6 (measured: 1e-12)."""
    import weightwatcher

    with one_thread():
        theirs = weightwatcher.WeightWatcher(model=model).analyze(min_evals=1)
        ours = [analyze_matrix(matrix, farms=False).statistics for matrix in matrices]
    assert len(theirs) == len(ours)
    for column, name in COLUMNS.items():
        if len(matrices[0]) < 20 and column == "alpha_pl_tail":
            continue  # there WeightWatcher counts what its first, discarded choice left over
        np.testing.assert_allclose([row[column] for row in ours], theirs[name], rtol=1e-6, err_msg=column)
