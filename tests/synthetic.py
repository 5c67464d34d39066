"""A layer table and spectra with plausible values, of any size, for tests and benchmarks that need no model.

The numbers are made up but keep what real tables show: α differs more between layer types than within
them, sensitivity goes with the type and the layer's size, embeddings and norms are listed and not planned.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from safetensors.numpy import save_file

from spi_utils.runs import Run, open_run

# type: (rows, cols, mean of alpha_hill, log10 of the mean Fisher cost in NF4)
LLAMA_TYPES = {
    "self_attn.q_proj": (576, 576, 2.6, -3.2),
    "self_attn.k_proj": (192, 576, 3.6, -3.3),
    "self_attn.v_proj": (192, 576, 5.2, -2.7),
    "self_attn.o_proj": (576, 576, 3.1, -3.2),
    "mlp.gate_proj": (1536, 576, 4.1, -2.9),
    "mlp.up_proj": (1536, 576, 5.9, -2.7),
    "mlp.down_proj": (576, 1536, 5.4, -2.4),
}
STATUSES = ("ok", "short_tail", "poor_fit")


def spectrum(rng: np.random.Generator, count: int, alpha: float, scale: float = 1.0) -> np.ndarray:
    """`count` descending singular values; their upper squares are a power law of exponent alpha."""
    tail = (1 - rng.random(count // 2)) ** (-1 / (alpha - 1))
    body = rng.uniform(0.02, 1.0, count - count // 2)
    return np.sqrt(np.sort(np.concatenate([tail, body]))[::-1] * scale)


def _row(rng: np.random.Generator, kind: str, depth: int, blocks: int) -> dict:
    rows, cols, alpha, cost = LLAMA_TYPES[kind]
    position = depth / max(blocks - 1, 1)
    alpha = max(alpha + 0.8 * (position - 0.5) + rng.normal(0, 0.35), 1.3)
    fisher = 10 ** (cost + rng.normal(0, 0.25) + 0.4 * (position < 0.1))
    size, null = rows * cols, 2.2 + 1.1 * max(rows, cols) / min(rows, cols)
    small = min(rows, cols)
    return {
        "name": f"model.layers.{depth}.{kind}",
        "type": kind.rsplit(".", 1)[-1],
        "depth": depth,
        "role": "linear",
        "rows": rows,
        "cols": cols,
        "numel": size,
        "quantizable": True,
        "status": STATUSES[int(rng.choice(3, p=[0.6, 0.35, 0.05]))],
        "alpha_pl": alpha * rng.lognormal(0, 0.2),
        "alpha_pl_xmin": 1.0,
        "alpha_pl_ks": rng.uniform(0.02, 0.09),
        "alpha_pl_tail": small // 2,
        "alpha_pl_sigma": (alpha - 1) / np.sqrt(small // 2),
        "alpha_hill": alpha,
        "alpha_decay": 1 / (2 * (alpha - 1)),
        "alpha_farms": alpha * rng.lognormal(0, 0.05),
        "alpha_excess": alpha - null,
        "alpha_excess_z": (alpha - null) / 0.15,
        "effective_rank": small * (1 - 1 / alpha),
        "effective_rank_rel": 1 - 1 / alpha,
        "stable_rank": 5 * alpha * rng.lognormal(0, 0.3),
        "nuclear_rank_90": int(small * (1 - 0.9 / alpha)),
        "nuclear_rank_90_rel": 1 - 0.9 / alpha,
        "log_frobenius_norm": rng.normal(3, 0.2),
        "log_spectral_norm": rng.normal(1.5, 0.2),
        "log_alpha_norm": rng.normal(4, 0.4),
        "alpha_weighted": alpha * rng.normal(1.5, 0.2),
        "mp_excess": rng.uniform(0.02, 0.3),
        "kurtosis": rng.lognormal(0, 1),
        "alphaq": rng.lognormal(-5, 0.5),
        "swan": rng.uniform(0.1, 0.4),
        "bytes_16bit": 2 * size,
        "bytes_nf4": size // 2 + size // 64 * 4,
        "bytes_nf4_dq": size // 2 + size // 64 + size // 64 // 256 * 4,
        "bytes_int8": size + 2 * rows,
        "bytes_int4_g64": size // 2 + size // 64 * 2,
        "error_nf4": 0.092 * rng.lognormal(0, 0.03),
        "error_int8": 0.008 * rng.lognormal(0, 0.03),
        "error_int4_g64": 0.095,
        "fisher_nf4": fisher,
        "fisher_nf4_se": fisher * 0.1,
        "fisher_int8": fisher / 80,
        "fisher_int8_se": fisher / 800,
        "fisher_int4_g64": fisher * 1.05,
        "fisher_int4_g64_se": fisher * 0.105,
        "fisher_16bit": 0.0,
        "fisher_16bit_se": 0.0,
        "measured_nf4": fisher * rng.lognormal(0.2, 0.15),
        "predicted_nf4": fisher * 1.3,
        "predicted_int8": fisher / 80 * 1.1,
        "predicted_int4_g64": fisher * 1.3 * 1.05,
    }


def _listed(name: str, role: str, rows: int, cols: int, numel: int) -> dict:
    size = {"numel": numel, "bytes_16bit": 2 * numel, "bytes_nf4": 2 * numel, "bytes_nf4_dq": 2 * numel}
    return {
        "name": name,
        "type": name.rsplit(".", 1)[-1],
        "depth": -1,
        "role": role,
        "rows": rows,
        "cols": cols,
        "quantizable": False,
        "status": "listed",
        "bytes_int8": 2 * numel,
        **size,
    }


def layer_table(count: int = 210, seed: int = 0) -> pd.DataFrame:
    """A layer table with `count` quantizable rows between an embedding row and the row of the rest."""
    rng = np.random.default_rng(seed)
    kinds, blocks = list(LLAMA_TYPES), -(-count // len(LLAMA_TYPES))
    rows = [_row(rng, kinds[index % len(kinds)], index // len(kinds), blocks) for index in range(count)]
    first = _listed("model.embed_tokens", "embedding", 49152, 576, 49152 * 576)
    last = _listed("(norms, biases and the rest)", "other", 0, 0, 35_136)
    order = list(rows[0]) if rows else list(first)
    return pd.DataFrame([first, *rows, last], columns=order)


def spectra_of(layers: pd.DataFrame, seed: int = 0) -> dict[str, np.ndarray]:
    """Singular values for every planned row, float64, descending: name -> (min(rows, cols),)."""
    rng = np.random.default_rng(seed)
    kept = layers[layers["quantizable"] & (layers["status"] != "failed")]
    small = kept[["rows", "cols"]].min(axis=1).to_numpy(int)
    alpha = kept["alpha_hill"].to_numpy(float)
    exponent = np.where(np.isfinite(alpha), alpha, 3.0).clip(1.3, 12)
    return {
        name: spectrum(rng, count, a) for name, count, a in zip(kept["name"], small, exponent, strict=True)
    }


def make_run(directory: Path, count: int = 210, seed: int = 0, layers: pd.DataFrame | None = None) -> Run:
    """A run directory as the analysis would leave it, with a made-up table and spectra."""
    layers = layer_table(count, seed) if layers is None else layers
    identity = {"id": "synthetic/model", "kind": "local", "revision": None, "sha256": "0" * 64}
    run = open_run(directory, identity | {"storage_dtype": "float16"})
    layers.to_csv(run.layers_csv, index=False)
    save_file(spectra_of(layers, seed), run.spectra)
    return run
