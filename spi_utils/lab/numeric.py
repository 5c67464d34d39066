"""The preprint's synthetic experiments, with everything made explicit that an abstract leaves open.

Two spectra of n = 100 singular values: "flat" σ_k = k^-½ (the preprint calls it heavy-tailed) and "compact"
σ_k = e^(-0.2k). Three questions: how many values hold 90 % of the sum; how many stay apart when they are
quantized; and what is left of a product of t such matrices in float32.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import ortho_group

from spi_utils.compactness import rank_of_mass

Floats = NDArray[np.float64]

DIMENSION = 100
STATED = {"flat": 0.360, "compact": 0.636}  # of distinguishable eigenvalues, as the abstract gives them
DEPTH = 1000
# 1.2e-38: below it a float32 loses its digits one by one, and is zero (or stuck at 1.4e-45) soon after.
FLOOR = float(np.finfo(np.float32).tiny)


def spectra(n: int = DIMENSION) -> dict[str, Floats]:
    """{"flat": k^-½, "compact": e^(-0.2k)}, k = 1…n, descending."""
    k = np.arange(1, n + 1, dtype=np.float64)
    return {"flat": k**-0.5, "compact": np.exp(-0.2 * k)}


def mass_table(n: int = DIMENSION, share: float = 0.9) -> pd.DataFrame:
    """How many values hold `share` of Σσ, counted both ways, and what these counts really hold."""
    rows = []
    for name, sigma in spectra(n).items():
        before, least = (rank_of_mass(sigma, share, count=count) for count in ("before", "at_least"))
        held = np.cumsum(sigma) / sigma.sum()
        rows.append((name, before, held[before - 1] if before else 0.0, least, held[least - 1]))
    titles = ["spectrum", "strictly before", "they hold", "at least", "these hold"]
    return pd.DataFrame(rows, columns=titles)


# --- distinguishable after quantization ------------------------------------------------------------------

# What the largest code stands for. "log" codes ln σ evenly between the spectrum's ends.
SCALINGS: dict[str, Callable[[Floats], Floats]] = {
    "largest value": lambda s: s / s.max(),
    "one": lambda s: s,
    "trace norm": lambda s: s / s.sum(),
    "Frobenius norm": lambda s: s / np.linalg.norm(s),
    "logarithmic": lambda s: (np.log(s) - np.log(s.min())) / math.log(s.max() / s.min()),
}
# Steps between zero and the largest code: unsigned; signed and symmetric; unsigned with one code reserved.
STEPS: dict[str, Callable[[int], int]] = {
    "2^b − 1": lambda bits: 2**bits - 1,
    "2^(b−1) − 1": lambda bits: 2 ** (bits - 1) - 1,
    "2^b − 2": lambda bits: 2**bits - 2,
}
# (all codes, how many of them count) -> how many are distinguishable
COUNTS: dict[str, Callable[[Floats, int], int]] = {
    "not zero": lambda codes, size: int((codes[:size] > 0).sum()),
    "different codes": lambda codes, size: len(np.unique(codes[:size][codes[:size] > 0])),
    "apart from the next": lambda codes, size: int((np.diff(codes[: size + 1]) != 0).sum()),
}


def quantizer_grid(n: int = DIMENSION, bits: range = range(2, 11)) -> pd.DataFrame:
    """Distinguishable values of both spectra under a grid of quantizers, ways to count, and denominators.

    A row is a quantizer (bits, scaling, steps; round half up), a way to count, and whether it counts among
    all n values or among those that come strictly before 90 % of Σσ (82 and 11). Columns `flat` and `compact`
    are counts; `…/n` and `…/held` are shares of n and of the values before 90 %.
    """
    sigmas = spectra(n)
    held = {name: rank_of_mass(sigma, count="before") for name, sigma in sigmas.items()}
    rows = []
    for width, scaling, steps in itertools.product(bits, SCALINGS, STEPS):
        scaled = {name: SCALINGS[scaling](s) * STEPS[steps](width) for name, s in sigmas.items()}
        # Rounding to 9 digits first: k^-½ meets halves exactly (36^-½ · 3), and only exactly.
        codes = {name: np.floor(np.round(s, 9) + 0.5) for name, s in scaled.items()}
        for count, among in itertools.product(COUNTS, ("all", "held")):
            row: dict[str, Any] = {"bits": width, "scaling": scaling, "steps": steps}
            row |= {"count": count, "among": among}
            for name in sigmas:
                found = COUNTS[count](codes[name], n if among == "all" else held[name])
                row |= {name: found, f"{name}/n": found / n, f"{name}/held": found / held[name]}
            rows.append(row)
    return pd.DataFrame(rows)


def stated_shares(grid: pd.DataFrame) -> pd.DataFrame:
    """The grid's rows in which a stated share arises, and with which denominators.

    `36.0 %` and `63.6 %` say over which denominator the flat and the compact share arise ("n", "held", "");
    rows in which both do come first.
    """
    found = grid.copy()
    for name, title in (("flat", "36.0 %"), ("compact", "63.6 %")):
        hits = [(np.abs(found[f"{name}/{base}"] - STATED[name]) < 5e-4, base) for base in ("n", "held")]
        found[title] = np.select([hit for hit, _ in hits], [base for _, base in hits], default="")
    found = found[(found["36.0 %"] != "") | (found["63.6 %"] != "")]
    both = (found["36.0 %"] != "") & (found["63.6 %"] != "")
    return found.assign(both=both).sort_values("both", ascending=False, kind="stable").reset_index(drop=True)


def comparison(grid: pd.DataFrame) -> pd.DataFrame:
    """On what "the compact spectrum keeps a larger share" depends: for each count, scaling and denominator,
    in how many of the grid's quantizers it does."""
    rows = []
    for (count, scaling), part in grid[grid["among"] == "all"].groupby(["count", "scaling"], sort=False):
        wins = [(part[f"compact/{base}"] > part[f"flat/{base}"]).mean() for base in ("n", "held")]
        rows.append((count, scaling, *wins))
    return pd.DataFrame(rows, columns=["count", "scaling", "compact wins, of n", "compact wins, of the held"])


# --- depth -----------------------------------------------------------------------------------------------

BASES = ("diagonal", "one orthogonal pair", "new orthogonal pairs")
# What a matrix is divided by. Each is a statement about a layer; none of them is the preprint's, which is
# unknown.
NORMALISATIONS: dict[str, Callable[[Floats], float]] = {
    "none": lambda s: 1.0,
    "spectral: σ₁ = 1": lambda s: float(s[0]),
    "Frobenius: mean σ² = 1": lambda s: math.sqrt(float(np.mean(s**2))),
    "nuclear: mean σ = 1": lambda s: float(np.mean(s)),
    "nuclear: Σσ = 1": lambda s: float(s.sum()),
}


def depth_table(depth: int = DEPTH, n: int = DIMENSION, seed: int = 0) -> tuple[pd.DataFrame, dict]:
    """What is left of a product of `depth` matrices U diag(σ) Vᵀ, in exact arithmetic and in float32.

    A row is a spectrum, a choice of bases and a normalisation. `log10_norm` is the product's exact spectral
    norm; `float32` is what happens to it in float32: "floor at t" (no entry is a normal number), "overflow
    at t", or "decays", "grows", "stays" (within a factor of ten). `directions` is how many singular values
    of the product are above 2^-24 of its largest: what float32 can still tell apart, whatever the
    normalisation; `directions_10` is the same after ten layers.

    Returns:
        The table, and {(spectrum, bases): (depth, n) exact natural logarithms of the singular values of the
        product without normalisation} for the figure.
    """
    rows, curves = [], {}
    for (name, sigma), bases in itertools.product(spectra(n).items(), BASES):
        logs = product_logs(sigma, bases, depth, seed)
        curves[name, bases] = logs
        apart = (logs > logs[:, :1] - 24 * math.log(2)).sum(axis=1)
        for title, norm in NORMALISATIONS.items():
            scale = norm(sigma)
            exact = (logs[-1].max() - depth * math.log(scale)) / math.log(10)
            outcome = float32_outcome(sigma / scale, bases, depth, seed, exact)
            rows.append((name, bases, title, exact, outcome, apart[-1], apart[min(10, depth) - 1]))
    titles = ["spectrum", "bases", "normalisation", "log10_norm", "float32", "directions", "directions_10"]
    return pd.DataFrame(rows, columns=titles), curves


def collapsed(table: pd.DataFrame) -> tuple[int, int, int, int]:
    """Of a depth table's pairs of bases and normalisation: all; those in which both spectra, only the flat
    one, only the compact one reach the float floor."""
    floor = table.assign(floor=table["float32"].str.startswith("floor"))
    wide = floor.pivot(index=["bases", "normalisation"], columns="spectrum", values="floor").astype(bool)
    flat, compact = wide["flat"], wide["compact"]
    both, alone, other = (flat & compact).sum(), (flat & ~compact).sum(), (compact & ~flat).sum()
    return len(wide), int(both), int(alone), int(other)


def layers(sigma: Floats, bases: str, seed: int) -> Iterator[Floats]:
    """Endless matrices of these singular values: one diagonal, one U diag(σ) Vᵀ, or a new pair each time."""
    haar = partial(ortho_group.rvs, len(sigma), random_state=np.random.default_rng(seed))
    fixed = np.diag(sigma) if bases == "diagonal" else haar() @ (sigma[:, None] * haar())
    while True:
        yield fixed
        if bases == "new orthogonal pairs":
            # In V's own basis each new layer is Q diag(σ) with Q = Vᵀ_next U Haar: one draw is enough.
            fixed = haar() * sigma


def product_logs(sigma: Floats, bases: str, depth: int, seed: int) -> Floats:
    """ln of the singular values of the product after each layer (depth, n), descending, in float64.

    Diagonal: t·ln σ. Else the diagonals of R in repeated QR decompositions (Benettin et al. 1980), which
    never under- or overflow; they equal the logarithms of the singular values to O(1) out of hundreds.
    """
    if bases == "diagonal":
        return np.arange(1.0, depth + 1)[:, None] * np.log(sigma)
    q, total, found = np.eye(len(sigma)), np.zeros(len(sigma)), np.empty((depth, len(sigma)))
    for t, matrix in zip(range(depth), layers(sigma, bases, seed), strict=False):
        q, r = np.linalg.qr(matrix @ q)
        total += np.log(np.maximum(np.abs(np.diag(r)), np.finfo(float).tiny))
        found[t] = np.sort(total)[::-1]
    return found


def float32_outcome(sigma: Floats, bases: str, depth: int, seed: int, exact: float) -> str:
    """What becomes of the product in float32: see `depth_table`; `exact` is its exact log10 norm."""
    product = np.eye(len(sigma), dtype=np.float32)
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        for t, matrix in zip(range(1, depth + 1), layers(sigma, bases, seed), strict=False):
            product = matrix.astype(np.float32) @ product
            if not np.isfinite(product).all():
                return f"overflow at {t}"
            if np.abs(product).max() < FLOOR:
                return f"floor at {t}"
    return "decays" if exact < -1 else "grows" if exact > 1 else "stays"
