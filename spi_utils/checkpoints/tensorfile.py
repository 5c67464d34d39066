"""Safetensors files one tensor at a time, so that a file larger than memory can be read and written.

The safetensors library maps a file into memory, so what has been read counts as the process' resident memory
until the file is closed; and it writes a file only from tensors that are all in memory. Both are a few lines
here: a file is the length of a JSON header (8 bytes), the header, then the tensors' bytes without gaps.
https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from spi_utils.errors import CheckpointError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
PIECE = 1 << 24  # values read or cast at once where a whole tensor needn't be in memory
ALIGNMENT = 8  # bytes; a tensor must start at a multiple of its item size to be viewed without a copy


@dataclass(frozen=True)
class _Slice:
    shape: list[int]

    def get_shape(self) -> list[int]:
        return self.shape


class TensorReader:
    """The tensors of one safetensors file, each read into fresh memory when asked for."""

    def __init__(self, path: str | Path) -> None:
        """Open a file and check its header against its size.

        Raises:
            CheckpointError: not a safetensors file, or a truncated one.
        """
        self.path = Path(path)
        self._file = self.path.open("rb")
        try:
            self.entries, self._start = _read_header(self._file, self.path)
        except CheckpointError:
            self._file.close()
            raise

    def keys(self) -> list[str]:
        """The tensors' names, in file order."""
        return list(self.entries)

    def nbytes(self) -> int:
        """Bytes of all tensors, header apart."""
        return max((entry["data_offsets"][1] for entry in self.entries.values()), default=0)

    def get_tensor(self, name: str) -> torch.Tensor:
        """One tensor on the CPU.

        Raises:
            KeyError: no such tensor.
            CheckpointError: the file ends before it.
        """
        entry = self.entries[name]
        data = self._read(name, *entry["data_offsets"])
        return data.view(self._dtype(name)).reshape(entry["shape"])

    def pieces(self, name: str, values: int = PIECE) -> Iterator[torch.Tensor]:
        """A tensor's values in file order, flat, at most `values` at a time; errors as `get_tensor`."""
        entry = self.entries[name]
        dtype = self._dtype(name)
        begin, end = entry["data_offsets"]
        step = values * dtype.itemsize
        for start in range(begin, end, step):
            yield self._read(name, start, min(start + step, end)).view(dtype)

    def get_slice(self, name: str) -> _Slice:
        """A tensor's shape without reading it, as the safetensors library gives it."""
        return _Slice(self.entries[name]["shape"])

    def _dtype(self, name: str) -> torch.dtype:
        if (held := self.entries[name]["dtype"]) not in DTYPES:
            raise CheckpointError(
                f"{self.path}: tensor {name!r} is of a type {held!r} that isn't known here. Write or fetch "
                "it again."
            )
        return DTYPES[held]

    def _read(self, name: str, begin: int, end: int) -> torch.Tensor:
        data = torch.empty(end - begin, dtype=torch.uint8)
        self._file.seek(self._start + begin)
        if end > begin and self._file.readinto(data.numpy().data) != end - begin:
            raise CheckpointError(f"{self.path}: ends before tensor {name!r}. Write or fetch it again.")
        return data

    def __enter__(self) -> TensorReader:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()


def _read_header(file: BufferedReader, path: Path) -> tuple[dict[str, Any], int]:
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    try:
        header = json.loads(file.read(length)) if 0 < length <= size - 8 else None
    except (json.JSONDecodeError, UnicodeDecodeError):
        header = None
    entries = header.items() if isinstance(header, dict) else ()
    if not entries or not all(name == "__metadata__" or _sound(entry) for name, entry in entries):
        raise CheckpointError(
            f"{path}: not a safetensors file, or its head is damaged. Write or fetch it again."
        )
    assert isinstance(header, dict)
    header.pop("__metadata__", None)
    end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if 8 + length + end != size:
        raise CheckpointError(
            f"{path}: truncated: {size} bytes, expected {8 + length + end}. Write or fetch it again."
        )
    return header, 8 + length


def _sound(entry: Any) -> bool:
    """Whether a header's entry describes a tensor: its parts are there, and its bytes hold its shape."""
    try:
        begin, end = entry["data_offsets"]
        count = math.prod(entry["shape"])
        dtype = DTYPES.get(entry["dtype"])
    except (KeyError, TypeError, ValueError):
        return False
    whole = all(type(number) is int and number >= 0 for number in (begin, end, *entry["shape"]))
    return whole and begin <= end and (dtype is None or count * dtype.itemsize == end - begin)


class TensorWriter:
    """Writes a safetensors file tensor by tensor; the header goes into space reserved before them.

    Args:
        path: the new file.
        reserve: bytes for the header; `header_bound` tells how many.
    """

    def __init__(self, path: str | Path, reserve: int) -> None:
        self.path = Path(path)
        self._reserve = -(-reserve // ALIGNMENT) * ALIGNMENT
        self._header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        self._odd: list[tuple[str, torch.Tensor]] = []
        self._end = 0
        self._file = self.path.open("wb")
        self._file.seek(8 + self._reserve)

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Append a tensor. One whose length would misalign the next is kept back until `close`."""
        tensor = tensor.detach().cpu().contiguous()
        if tensor.nbytes % ALIGNMENT:
            self._odd.append((name, tensor))
        else:
            self._write(name, tensor)

    def close(self) -> None:
        """Write what was kept back, then the header."""
        for name, tensor in sorted(self._odd, key=lambda item: -item[1].element_size()):
            self._write(name, tensor)
        header = json.dumps(self._header, separators=(",", ":")).encode()
        if len(header) > self._reserve:
            raise CheckpointError(
                f"{self.path}: header of {len(header)} bytes, only {self._reserve} reserved."
            )
        self._file.seek(0)
        self._file.write(self._reserve.to_bytes(8, "little") + header.ljust(self._reserve))
        self._file.close()

    def _write(self, name: str, tensor: torch.Tensor) -> None:
        begin, self._end = self._end, self._end + tensor.nbytes
        entry = {
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, self._end],
        }
        self._header[name] = entry
        if tensor.numel():
            self._file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)

    def __enter__(self) -> TensorWriter:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None:
            self.close()
        self._file.close()


def header_bound(names: Sequence[str], nbytes: int) -> int:
    """Bytes that are enough for the header of tensors with these names (matrices) and this total size."""
    entry = len('"":{"dtype":"BF16","shape":[,],"data_offsets":[,]},') + 2 * len(str(2 * nbytes)) + 16
    return len('{"__metadata__":{"format":"pt"}}') + sum(len(json.dumps(n)) + entry for n in names)
