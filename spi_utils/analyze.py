"""A model -> the layer table: what every weight matrix looks like, and what quantizing it costs.

Two stages. `spectra` reads one weight at a time, decomposes it and measures its quantization error: a
finished layer is on disk before its successor is asked for. `analyze` adds the bytes, the scores that need
the whole table and the sensitivities, and writes `layers.csv`. Changing a sensitivity setting repeats no
decomposition.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors import SafetensorError, safe_open

from spi_utils import formats as number_formats
from spi_utils import sensitivity as costs
from spi_utils.errors import AnalysisError
from spi_utils.models import Layer, ModelSource, list_layers, open_weights, resolve_device
from spi_utils.progress import progress, spread
from spi_utils.runs import LAYER_KEYS, Run, atomic_path, read_layers, sha256_file, stage, write_tensors
from spi_utils.spectra import COLUMNS, INPUTS, alphaq, analyze_matrix, choose_precision, swan

ENGINE = 2  # raise it when the same weights would give other numbers: finished spectra are then made again
ANALYSED = ("linear", "conv1d", "experts")
ON_REQUEST = ("embedding", "head")


Rows = dict[str, list[Any]]  # a finished matrix: its row's name -> status, statistics, error by format
Values = dict[str, np.ndarray]  # the same name -> singular values; a failed matrix has none


def analyze(
    run: Run,
    source: ModelSource,
    *,
    device: str = "auto",
    dtype: str = "auto",
    seed: int = 0,
    workers: int | None = None,
    layers: str | None = None,
    include_embeddings: bool = False,
    min_tail: int | None = None,
    formats: Sequence[str] = ("nf4", "int8", "int4_g64"),
    sensitivity: str = "self",
    rounding: str = "guided",
    refine_at: Sequence[float] = (),
    windows: int | None = None,
    length: int | None = None,
    text: str = "auto",
    force: bool = False,
) -> pd.DataFrame:
    """Write `spectra.safetensors` and `layers.csv`, and return the table.

    A row a matrix in model order. Stacked experts become a row an expert, named `…experts.gate_up_proj[3]`.
    Rows that are not analysed (embeddings unless asked for, what `layers` leaves out, the rest of the
    parameters) have the status `listed`. Layers that failed have no entry in `spectra.safetensors`.

    Args:
        run: where to write.
        source: the model.
        device: "auto", "cpu", "cuda": where matrices are decomposed and sensitivities computed.
        dtype: compute dtype of the sensitivities; see `resolve_dtype`.
        seed: of the Gaussian null, the blocks of FARMS and the sensitivities.
        workers: layers at a time; None is one a core on the CPU, and one on CUDA.
        layers: regular expression; only matrices whose name it finds are analysed.
        include_embeddings: analyse the embedding and an untied head too.
        min_tail: floor under the fitted tail of alpha_pl, see `fit_power_law`.
        formats: whose bytes, errors and sensitivities are wanted beside 16-bit.
        sensitivity: "self", "random", a text file, "measured" or "none", see `spi_utils.sensitivity`.
        rounding: of the 4-bit formats: "guided" writes the codes to `rounded/`, or "nearest".
        refine_at: matrix bits at whose cut the sensitivities are measured layer by layer.
        windows, length: of the sensitivities, and tokens in each; None takes their defaults.
        text: what all layers together are measured on, see `spi_utils.texts`.
        force: do everything again.

    Raises:
        AnalysisError: a bad setting, or `layers` finds nothing.
    """
    place = resolve_device(device)
    formats = tuple(fmt for fmt in formats if number_formats.format_row(fmt).name != "16bit")
    options = {"device": str(place), "precision": choose_precision("auto", place), "seed": seed}
    options |= {"min_tail": min_tail, "formats": formats}
    workers = 1 if place.type == "cuda" else workers
    listed = list_layers(source)
    todo = _chosen(listed, layers, include_embeddings)
    inputs = {"engine": ENGINE, **options, "layers": [layer.name for layer in todo]}
    with stage(run, "spectra", inputs, [run.spectra.name], force=force) as current:
        if not current.finished:
            paths = {x.name: run.partial / "spectra" / f"{i:05d}.safetensors" for i, x in enumerate(todo)}
            left = [layer for layer in todo if not _is_sound(paths[layer.name], layer)]
            with open_weights(source) as weights:
                jobs = ((layer, weights.read(layer.tensor), options) for layer in left)
                results = spread(analyze_weight, jobs, workers=workers)
                for name, *piece in progress(results, len(todo), "spectra", done=len(todo) - len(left)):
                    _write_piece(paths[name], *piece)
            _write_piece(run.spectra, *_read_pieces(paths.values()))
            current.record(resumed_layers=len(todo) - len(left), workers=workers)
    rows, values = _read_pieces([run.spectra])

    settings: dict[str, Any] = {"sensitivity": sensitivity, "refine_at": list(refine_at), "text": text}
    settings |= {"rounding": rounding, "windows": windows, "length": length}
    settings |= {"dtype": dtype, "seed": seed, "device": str(place)}
    files = [sha256_file(name) for name in (sensitivity, text) if Path(name).is_file()]
    inputs = {**settings, "formats": formats, "spectra": sha256_file(run.spectra), "files": files}
    inputs |= {"engine": costs.ENGINE} if sensitivity != "none" else {}
    guided = sensitivity != "none" and rounding == "guided"
    outputs = [run.layers_csv.name, *([run.rounded.name] if guided else [])]
    with stage(run, "analyze", inputs, outputs, force=force) as current:
        if not current.finished:
            run.rounded.mkdir(exist_ok=True) if guided else shutil.rmtree(run.rounded, ignore_errors=True)
            table = layer_table(listed, rows, formats, source.storage_dtype)
            if sensitivity != "none" and _can_run(source, rows, values):
                found = costs.sensitivities(run, source, table, formats=formats, force=force, **settings)
                table = table.join(found, on="name")
                current.record(sensitivity=found.attrs["sensitivity"])
            with atomic_path(run.layers_csv) as path:
                table.to_csv(path, index=False, lineterminator="\n")
            current.record(rounding=rounding)
            current.record(layers=len(table), statuses=table["status"].value_counts().to_dict())
    return read_layers(run)


def _chosen(listed: Sequence[Layer], pattern: str | None, include_embeddings: bool) -> list[Layer]:
    roles = ANALYSED + (ON_REQUEST if include_embeddings else ())
    try:
        found = [x for x in listed if x.role in roles and (pattern is None or re.search(pattern, x.name))]
    except re.error as error:
        raise AnalysisError(f"layers={pattern!r} is no regular expression: {error}.") from error
    if not found:
        names = ", ".join(x.name for x in listed[:3])
        raise AnalysisError(f"layers={pattern!r} finds none of the model's matrices, which are {names}, …")
    return found


def _can_run(source: ModelSource, rows: Rows, values: Values) -> bool:
    """Whether every weight is finite, norms and embeddings among them; says which is not."""
    broken = next((name for name in rows if name not in values), None)
    if broken is None:
        with open_weights(source) as weights:
            others = (n for n in weights.names if n not in rows and n.removesuffix(".weight") not in rows)
            broken = next((name for name in others if not weights.read_source(name).isfinite().all()), None)
    if broken is not None:
        print(
            f"{broken} holds NaN or Inf in the source model itself: the model can't run, so no sensitivities "
            "are computed. Fetch the model again, or ask those who made it.",
            flush=True,
        )
    return broken is None


# --- the spectra stage ------------------------------------------------------------------------------------


def analyze_weight(
    layer: Layer, weight: torch.Tensor, options: Mapping[str, Any]
) -> tuple[str, Rows, Values]:
    """The work on one tensor: its layer's name, and its matrices' results (of a stack, one an expert)."""
    if layer.role == "conv1d":
        weight = weight.T.contiguous()
    matrices = {layer.name: weight}
    if weight.ndim > 2:
        matrices = {f"{layer.name}[{i}]": one for i, one in enumerate(weight)}
    rows, values = {}, {}
    how = {name: options[name] for name in ("precision", "min_tail", "seed")}
    for name, one in matrices.items():
        matrix = one.to(options["device"])
        found = analyze_matrix(matrix, **how)
        if np.isfinite(found.singular_values).all():
            values[name] = found.singular_values
        errors = dict.fromkeys(options["formats"], np.nan)
        for fmt in errors:
            if layer.quantizable and name in values and number_formats.fits(fmt, matrix.shape[1]):
                errors[fmt] = number_formats.relative_error(matrix, fmt)
        rows[name] = [found.status, found.statistics, errors]
    return layer.name, rows, values


def _write_piece(path: Path, rows: Rows, values: Values) -> None:
    """Singular values as tensors; all else as JSON in the file's metadata."""
    write_tensors(path, {name: torch.from_numpy(x) for name, x in values.items()}, rows=json.dumps(rows))


def _read_pieces(paths: Iterable[Path]) -> tuple[Rows, Values]:
    rows: Rows = {}
    values: Values = {}
    for path in paths:
        with safe_open(path, framework="numpy") as file:
            rows |= json.loads(file.metadata()["rows"])
            values |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return rows, values


def _is_sound(path: Path, layer: Layer) -> bool:
    """Whether a finished piece is there and readable: a damaged one is merely made again."""
    if not path.is_file():
        return False
    try:
        _read_pieces([path])
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        print(f"spectra: {path} is damaged ({error}); {layer.name} is analysed again.", flush=True)
        return False
    return True


# --- the table --------------------------------------------------------------------------------------------


def layer_table(
    listed: Sequence[Layer], pieces: Rows, formats: Sequence[str], storage_dtype: str
) -> pd.DataFrame:
    """The layer table without sensitivities: a row a matrix, columns in a fixed order.

    Bytes are exact; 16-bit bytes where a row can't be quantized, NaN where a format's groups don't divide a
    quantizable row's columns.

    Args:
        listed: every layer of the model, in its order.
        pieces: the finished matrices by row name.
        formats: whose bytes and errors to list.
        storage_dtype: "float16" or "bfloat16".
    """
    rows = []
    stored = [kind for fmt in formats for kind in ((fmt, number_formats.NF4_DQ) if fmt == "nf4" else (fmt,))]
    for layer in listed:
        names = [layer.name]
        if f"{layer.name}[0]" in pieces:  # an analysed stack: a row for each expert
            names = [f"{layer.name}[{i}]" for i in range(layer.numel // (layer.rows * layer.cols))]
        sizes: dict[str, float] = dict.fromkeys(
            (f"bytes_{fmt}" for fmt in ("16bit", *stored)), 2 * layer.numel // len(names)
        )
        for fmt in stored if layer.quantizable else ():
            able = number_formats.fits(fmt, layer.cols)
            size = number_formats.layer_bytes(fmt, layer.rows, layer.cols, dtype=storage_dtype)
            sizes[f"bytes_{fmt}"] = size if able else np.nan
        for name in names:
            status, statistics, errors = pieces.get(name, ["listed", {}, {}])
            row = {**asdict(layer), "name": name, "numel": layer.numel // len(names), "status": status}
            row |= dict.fromkeys((*COLUMNS, *INPUTS), np.nan) | statistics | sizes
            rows.append(row | {f"error_{fmt}": errors.get(fmt, np.nan) for fmt in formats})
    table = pd.DataFrame(rows)
    nf4 = table["error_nf4"] if "nf4" in formats else pd.Series(np.nan, table.index)
    table["alphaq"] = alphaq(table["alpha_farms"], table["variance"], table["quantizable"])
    table["swan"] = swan(table, nf4)
    return table[[*LAYER_KEYS, *COLUMNS, "alphaq", "swan", *sizes, *(f"error_{fmt}" for fmt in formats)]]
