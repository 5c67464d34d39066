"""Two published data-free scores that combine a layer's spectrum, its entries and its quantization error."""

from __future__ import annotations

import numpy as np
import pandas as pd

ALPHAQ_BITS = (4, 16)


def alphaq(alpha: pd.Series, variance: pd.Series, planned: pd.Series, gamma: float = 1.0) -> pd.Series:
    """AlphaQ: (median α / α_l)^γ · Var(W_l) · (2^-8 - 2^-32), high where 4 bits cost most.

    Args:
        alpha: (layers,) Hill's α on 128 × 128 blocks; NaN gives NaN.
        variance: (layers,) of the weights' entries.
        planned: (layers,) bool: whose median counts.
        gamma: how strongly α weighs.
    """
    low, high = ALPHAQ_BITS
    return (alpha[planned].median() / alpha) ** gamma * variance * (2.0 ** (-2 * low) - 2.0 ** (-2 * high))


def swan(inputs: pd.DataFrame, error: pd.Series) -> pd.Series:
    """SWAN: a weighted sum of four properties, each clipped to 0…1, high where 4 bits cost most.

    .20·(c - .1)/.8 + .45·kurtosis/10 + .15·(log10 δ + 2)/3 + .20·(NRMSE - .005)/.045, with c the energy
    share of the top tenth of the singular values, and NRMSE the root mean square error of 4 bits over the
    entries' range. δ is the relative change of the output on Gaussian probes x. Its mean needs no probe:
    E‖ΔW x‖² = ‖ΔW‖_F² and E‖W x‖² = ‖W‖_F², so δ is the relative error itself.

    Args:
        inputs: columns `top_share`, `kurtosis`, `variance`, `mean`, `span` (largest minus smallest entry).
        error: (layers,) ‖Q(W) - W‖_F / ‖W‖_F in NF4; NaN gives NaN.
    """
    rms = np.sqrt(inputs["variance"] + inputs["mean"] ** 2)
    with np.errstate(divide="ignore"):
        output = np.log10(error)
    parts = (
        0.20 * ((inputs["top_share"] - 0.1) / 0.8).clip(0, 1),
        0.45 * (inputs["kurtosis"] / 10).clip(0, 1),
        0.15 * ((output + 2) / 3).clip(0, 1),
        0.20 * ((error * rms / inputs["span"] - 0.005) / 0.045).clip(0, 1),
    )
    return parts[0] + parts[1] + parts[2] + parts[3]
