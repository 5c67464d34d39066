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
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from safetensors import SafetensorError

from spi_utils import formats as number_formats
from spi_utils import sensitivity
from spi_utils.errors import AnalysisError
from spi_utils.models import Layer, ModelSource, list_layers, open_weights, resolve_device
from spi_utils.progress import progress, spread
from spi_utils.runs import LAYER_KEYS, Run, atomic_path, read_layers, sha256_file, stage
from spi_utils.spectra import COLUMNS, INPUTS, LayerSpectrum, alphaq, analyze_matrix, choose_precision, swan

if TYPE_CHECKING:
    from spi_utils.models import Weights

ENGINE = 2  # raise it when the same weights would give other numbers: finished spectra are then made again
ANALYSED = ("linear", "conv1d", "experts")
ON_REQUEST = ("embedding", "head")


@dataclass(frozen=True)
class Options:
    """What the numbers of a layer depend on beside its weight."""

    device: str
    precision: str
    seed: int
    min_tail: int | None
    formats: tuple[str, ...]


@dataclass(frozen=True)
class Piece:
    """One finished matrix: its row's name, its spectrum, its relative error in each format."""

    name: str
    spectrum: LayerSpectrum
    errors: dict[str, float]


def analyze(
    run: Run,
    source: ModelSource,
    *,
    device: str = "auto",
    dtype: str = "auto",
    precision: str = "auto",
    seed: int = 0,
    workers: int | None = None,
    backend: str = "threading",
    scheduler: str | None = None,
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
        precision: of the decomposition, see `analyze_matrix`.
        seed: of the Gaussian null, the blocks of FARMS and the sensitivities.
        workers: layers at a time; None is one a core on the CPU, and one on CUDA.
        backend: "threading", "loky" or "dask", see `spread`. It never changes a result.
        scheduler: address of a Dask scheduler.
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
    options = Options(str(place), choose_precision(precision, place), seed, min_tail, formats)
    how = {"workers": 1 if place.type == "cuda" else workers, "backend": backend, "scheduler": scheduler}
    listed = list_layers(source)
    pieces = _spectra(run, source, _chosen(listed, layers, include_embeddings), options, how, force)
    costs: dict[str, Any] = {"sensitivity": sensitivity, "refine_at": list(refine_at), "text": text}
    costs["rounding"] = rounding
    costs |= {"windows": windows, "length": length, "dtype": dtype, "seed": seed, "device": str(place)}
    return _table(run, source, listed, pieces, formats, costs, force)


def _table(
    run: Run,
    source: ModelSource,
    listed: list[Layer],
    pieces: dict[str, Piece],
    formats: tuple[str, ...],
    costs: dict[str, Any],
    force: bool,
) -> pd.DataFrame:
    """The `analyze` stage: the layer table, sensitivities joined on, as `layers.csv`."""
    files = [sha256_file(name) for name in (costs["sensitivity"], costs["text"]) if Path(name).is_file()]
    inputs = {**costs, "formats": formats, "spectra": sha256_file(run.spectra), "files": files}
    inputs |= {"engine": sensitivity.ENGINE} if costs["sensitivity"] != "none" else {}
    guided = run.rounded.name if costs["sensitivity"] != "none" and costs["rounding"] == "guided" else None
    outputs = [run.layers_csv.name, *([guided] if guided else [])]
    with stage(run, "analyze", inputs, outputs, force=force) as current:
        if current.finished:
            return read_layers(run)
        run.rounded.mkdir(exist_ok=True) if guided else shutil.rmtree(run.rounded, ignore_errors=True)
        table = layer_table(listed, pieces, formats, source.storage_dtype)
        if costs["sensitivity"] != "none" and _can_run(source, pieces):
            found = sensitivity.sensitivities(run, source, table, formats=formats, force=force, **costs)
            table = table.join(found, on="name")
            current.record(sensitivity=found.attrs["sensitivity"])
        with atomic_path(run.layers_csv) as path:
            table.to_csv(path, index=False, lineterminator="\n")
        current.record(rounding=costs["rounding"])
        current.record(layers=len(table), statuses=table["status"].value_counts().to_dict())
    return read_layers(run)


def _can_run(source: ModelSource, pieces: dict[str, Piece]) -> bool:
    """Whether every weight is finite, norms and embeddings among them; says which is not."""
    broken = next((name for name, piece in pieces.items() if not len(piece.spectrum.singular_values)), None)
    if broken is None:
        with open_weights(source) as weights:
            others = (n for n in weights.names if n not in pieces and n.removesuffix(".weight") not in pieces)
            broken = next((name for name in others if not weights.read_source(name).isfinite().all()), None)
    if broken is not None:
        print(
            f"{broken} holds NaN or Inf in the source model itself: the model can't run, so no sensitivities "
            "are computed. Fetch the model again, or ask those who made it.",
            flush=True,
        )
    return broken is None


# --- the spectra stage ------------------------------------------------------------------------------------


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


def _spectra(
    run: Run, source: ModelSource, todo: list[Layer], options: Options, how: dict[str, Any], force: bool
) -> dict[str, Piece]:
    """Decompose what is not yet on disk; return every finished matrix by row name."""
    inputs = {"engine": ENGINE, **asdict(options), "layers": [layer.name for layer in todo]}
    with stage(run, "spectra", inputs, [run.spectra.name], force=force) as current:
        if current.finished:
            return _read_pieces(run.spectra)
        paths = {x.name: run.partial / "spectra" / f"{i:05d}.safetensors" for i, x in enumerate(todo)}
        left = [layer for layer in todo if not _is_sound(paths[layer.name], layer)]
        with open_weights(source) as weights:
            jobs = ((layer, *_packed(weights, layer), options) for layer in left)
            results = spread(analyze_weight, jobs, **how)
            for name, pieces in progress(results, len(todo), "spectra", done=len(todo) - len(left)):
                _write_pieces(paths[name], pieces)
        _write_pieces(run.spectra, [p for layer in todo for p in _read_pieces(paths[layer.name]).values()])
        current.record(resumed_layers=len(todo) - len(left), **how)
    return _read_pieces(run.spectra)


def _packed(weights: Weights, layer: Layer) -> tuple[np.ndarray, torch.dtype]:
    """A layer's weight as integers of its width (numpy has no bfloat16), and what they stand for."""
    name = f"{layer.name}.weight"
    weight = weights.read(name if name in weights.shapes else layer.name)
    codes = {2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.element_size()]
    return weight.view(codes).numpy(), weight.dtype


def analyze_weight(
    layer: Layer, codes: np.ndarray, dtype: torch.dtype, options: Options
) -> tuple[str, list[Piece]]:
    """The work on one tensor: (its layer's name, its matrices' results: of a stack, one an expert)."""
    weight = torch.from_numpy(np.require(codes, requirements="W")).view(dtype)
    if layer.role == "conv1d":
        weight = weight.T.contiguous()
    if weight.ndim == 2:
        return layer.name, [_piece(layer.name, weight, layer.quantizable, options)]
    names = (f"{layer.name}[{index}]" for index in range(len(weight)))
    return layer.name, [_piece(name, one, False, options) for name, one in zip(names, weight, strict=True)]


def _piece(name: str, weight: torch.Tensor, quantizable: bool, options: Options) -> Piece:
    weight = weight.to(options.device)
    spectrum = analyze_matrix(
        weight, precision=options.precision, min_tail=options.min_tail, seed=options.seed
    )
    sound = quantizable and np.isfinite(spectrum.singular_values).all()
    errors = {
        fmt: number_formats.relative_error(weight, fmt)
        if sound and number_formats.fits(fmt, weight.shape[1])
        else np.nan
        for fmt in options.formats
    }
    return Piece(name, spectrum, errors)


def _write_pieces(path: Path, pieces: list[Piece]) -> None:
    """Singular values as tensors; all else as JSON in the file's metadata. Failed matrices have no tensor."""
    from safetensors.numpy import save

    rows = {p.name: [p.spectrum.status, p.spectrum.statistics, p.errors] for p in pieces}
    values = {p.name: p.spectrum.singular_values for p in pieces}
    tensors = {name: sigma for name, sigma in values.items() if len(sigma) and np.isfinite(sigma).all()}
    with atomic_path(path) as temporary:
        temporary.write_bytes(save(tensors, metadata={"rows": json.dumps(rows)}))


def _is_sound(path: Path, layer: Layer) -> bool:
    """Whether a finished piece is there, readable and this layer's: a damaged one is merely made again."""
    if not path.is_file():
        return False
    try:
        pieces = _read_pieces(path)
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        print(f"spectra: {path} is damaged ({error}); {layer.name} is analysed again.", flush=True)
        return False
    count = layer.numel // (layer.rows * layer.cols)
    names = [layer.name] if layer.name in pieces else [f"{layer.name}[{index}]" for index in range(count)]
    sizes = {len(piece.spectrum.singular_values) for piece in pieces.values()}
    return list(pieces) == names and sizes <= {0, min(layer.rows, layer.cols)}


def _read_pieces(path: Path) -> dict[str, Piece]:
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        rows = json.loads(file.metadata()["rows"])
        values = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return {
        name: Piece(name, LayerSpectrum(values.get(name, np.empty(0)), statistics, status), errors)
        for name, (status, statistics, errors) in rows.items()
    }


# --- the table --------------------------------------------------------------------------------------------


def layer_table(
    listed: Sequence[Layer], pieces: dict[str, Piece], formats: Sequence[str], storage_dtype: str
) -> pd.DataFrame:
    """The layer table without sensitivities: a row a matrix, columns in a fixed order.

    Args:
        listed: every layer of the model, in its order.
        pieces: the finished matrices by row name.
        formats: whose bytes and errors to list.
        storage_dtype: "float16" or "bfloat16".
    """
    rows = [_row(layer, pieces.get(layer.name)) for entry in listed for layer in _rows_of(entry, pieces)]
    table = pd.DataFrame(rows)
    sizes = _bytes(table, formats, storage_dtype)
    errors = {f"error_{fmt}": [_error(pieces.get(name), fmt) for name in table["name"]] for fmt in formats}
    table = table.assign(**sizes, **errors)
    nf4 = table["error_nf4"] if "nf4" in formats else pd.Series(np.nan, table.index)
    table["alphaq"] = alphaq(table["alpha_farms"], table["variance"], table["quantizable"])
    table["swan"] = swan(table, nf4)
    return table[[*LAYER_KEYS, *COLUMNS, "alphaq", "swan", *sizes, *errors]]


def _rows_of(layer: Layer, pieces: dict[str, Piece]) -> Iterator[Layer]:
    """The layer itself, or one for each expert of an analysed stack."""
    count = layer.numel // (layer.rows * layer.cols) if layer.role == "experts" else 0
    if f"{layer.name}[0]" not in pieces:
        yield layer
        return
    for index in range(count):
        yield replace(layer, name=f"{layer.name}[{index}]", numel=layer.numel // count)


def _row(layer: Layer, piece: Piece | None) -> dict[str, Any]:
    if piece is None:
        return {**asdict(layer), "status": "listed", **dict.fromkeys((*COLUMNS, *INPUTS), np.nan)}
    return {**asdict(layer), "status": piece.spectrum.status, **piece.spectrum.statistics}


def _bytes(table: pd.DataFrame, formats: Sequence[str], storage_dtype: str) -> dict[str, list[float]]:
    """Exact bytes of each row's tensors in each format; 16-bit bytes where a row can't be quantized, NaN
    where a format's groups don't divide a quantizable row's columns."""
    full = [2 * int(numel) for numel in table["numel"]]
    columns: dict[str, list[float]] = {"bytes_16bit": list(full)}
    for fmt in formats:
        for double_quant in (False, True) if fmt == "nf4" else (False,):
            columns[f"bytes_{fmt}_dq" if double_quant else f"bytes_{fmt}"] = [
                whole
                if not planned
                else number_formats.layer_bytes(
                    fmt, int(rows), int(cols), double_quant=double_quant, dtype=storage_dtype
                )
                if number_formats.fits(fmt, int(cols))
                else np.nan
                for rows, cols, planned, whole in zip(
                    table["rows"], table["cols"], table["quantizable"], full, strict=True
                )
            ]
    return columns


def _error(piece: Piece | None, fmt: str) -> float:
    return piece.errors[fmt] if piece is not None else float("nan")
