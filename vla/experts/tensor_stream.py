"""Safetensors files read and written one tensor at a time, so that a merge never holds a model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vla.errors import UserError

_DTYPE_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
_PIECE = 1 << 22  # bytes
_DTYPES = {name: dtype for dtype, name in _DTYPE_NAMES.items()}


@dataclass(frozen=True)
class Slot:
    """What a file holds, or is to hold, under one name."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()


class TensorFile(Mapping[str, Tensor]):
    """A safetensors file as a lazy mapping from names to tensors.

    Tensors are read, not mapped: the library maps the whole file, whose pages count as this process's memory
    once they were touched, and parses the header anew at every opening (1 ms for 1500 names). Raises
    `UserError` if the file is absent, damaged or not safetensors.
    """

    def __init__(self, path: Path):
        self.path = Path(path)
        try:
            with safe_open(self.path, framework="pt") as file:  # which also checks it, lengths included
                self.metadata: dict[str, str] = file.metadata() or {}
            self._places = dict(sorted(_read_places(self.path)))
        except FileNotFoundError:
            raise UserError(f"{self.path} does not exist; copy its folder again in full.") from None
        except (SafetensorError, OSError) as error:
            raise UserError(f"{self.path} cannot be read ({error}); copy it again.") from None

    def __getitem__(self, name: str) -> Tensor:
        start, slot = self._places[name]
        tensor = torch.empty(slot.shape, dtype=slot.dtype)
        with open(self.path, "rb") as file:
            file.seek(start)
            self._require(file.readinto(_bytes_of(tensor)), slot.size)
        return tensor

    def pieces(self, name: str) -> Iterator[bytes]:
        """The tensor's bytes as they lie in the file, some megabytes at a time."""
        start, slot = self._places[name]
        with open(self.path, "rb") as file:
            file.seek(start)
            for begin in range(0, slot.size, _PIECE):
                piece = file.read(min(_PIECE, slot.size - begin))
                self._require(len(piece), min(_PIECE, slot.size - begin))
                yield piece

    def _require(self, count: int, wanted: int) -> None:
        if count != wanted:
            raise UserError(f"{self.path} was cut short while it was read; copy it again.")

    @cached_property
    def slots(self) -> dict[str, Slot]:
        """Every tensor's dtype and shape, from the header alone."""
        return {name: slot for name, (_, slot) in self._places.items()}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor's shape, from the header alone."""
        return {name: slot.shape for name, slot in self.slots.items()}

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, name: object) -> bool:
        return name in self._places


class TensorWriter:
    """Writes a safetensors file tensor by tensor, in the order of `layout`, and hashes it on the way.

    The header comes first in the format, so names, dtypes and shapes must be known beforehand. Dtypes must
    not widen along `layout`: readers view the data in place and need it aligned.
    """

    def __init__(self, path: Path, layout: Mapping[str, Slot], metadata: Mapping[str, str] | None = None):
        self._pending = list(layout.items())[::-1]
        widths = [slot.dtype.itemsize for slot in layout.values()]
        if widths != sorted(widths, reverse=True):
            raise ValueError("the layout must list wider dtypes first")
        header = _header(layout, {"format": "pt", **(metadata or {})})
        self._digest = hashlib.sha256()
        self._file = open(path, "wb")  # noqa: SIM115 - closed by close()
        self._put(len(header).to_bytes(8, "little"))
        self._put(header)

    def write(self, name: str, tensor: Tensor) -> None:
        """Append the next tensor; raises `ValueError` if it is not the one that the layout announces."""
        self._expect(name, Slot(tensor.dtype, tuple(tensor.shape)))
        self._put(_bytes_of(tensor.detach().cpu().contiguous()))

    def copy(self, name: str, file: TensorFile) -> None:
        """Append the next tensor as it is in `file`; raises `ValueError` as `write` does."""
        self._expect(name, file.slots[name])
        for piece in file.pieces(name):
            self._put(piece)

    def close(self) -> str:
        """Finish the file and return its SHA-256; raises `ValueError` if tensors are missing."""
        self._file.close()
        if self._pending:
            raise ValueError(f"{len(self._pending)} announced tensors were not written")
        return self._digest.hexdigest()

    def abandon(self) -> None:
        """Close an unfinished file."""
        self._file.close()

    def _expect(self, name: str, slot: Slot) -> None:
        expected, announced = self._pending.pop()
        if (name, slot) != (expected, announced):
            raise ValueError(f"{expected} {announced} was announced, not {name} {slot}")

    def _put(self, content) -> None:
        self._file.write(content)
        self._digest.update(content)


def file_hash(path: Path) -> str:
    """SHA-256 of a file's content, what ``sha256sum`` prints."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _bytes_of(tensor: Tensor) -> np.ndarray:
    """The memory of a contiguous tensor on the CPU, (bytes,) uint8."""
    return tensor.view(-1).view(torch.uint8).numpy()


def _read_places(path: Path) -> Iterator[tuple[str, tuple[int, Slot]]]:
    """Every tensor's name with its first byte in the file and what lies there, from a sound header."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        entries = json.loads(file.read(length))
    entries.pop("__metadata__", None)
    for name, entry in entries.items():
        if entry["dtype"] not in _DTYPES:
            raise UserError(f"{path} holds '{name}' as {entry['dtype']}, which cannot be read; convert it.")
        slot = Slot(_DTYPES[entry["dtype"]], tuple(entry["shape"]))
        yield name, (8 + length + entry["data_offsets"][0], slot)


def _header(layout: Mapping[str, Slot], metadata: Mapping[str, str]) -> bytes:
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    start = 0
    for name, slot in layout.items():
        entries[name] = {
            "dtype": _DTYPE_NAMES[slot.dtype],
            "shape": list(slot.shape),
            "data_offsets": [start, start + slot.size],
        }
        start += slot.size
    text = json.dumps(entries, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8)  # the data starts on an 8-byte boundary
