"""Safetensors files read and written a tensor at a time, in little memory, by preparation steps.

Only what steps need, with the standard library. Loading weights for use is ``loaders``' work.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from modelcache.types import CacheError

ITEM_BYTES: Mapping[str, int] = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "U16": 2, "I16": 2,
    "F16": 2, "BF16": 2, "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8, "C64": 8,
}  # fmt: skip
HEADER_MOST_BYTES = 100_000_000
ALIGN_BYTES = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorPlace:
    """A tensor: what it is and, in a file that is read, at which byte it begins."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int = 0

    @property
    def size_bytes(self) -> int:
        """Its bytes."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


class TensorReader:
    """An open safetensors file. Raises ``CacheError`` where it is not a whole, sound one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise CacheError(f"cannot read {path}: {error.strerror}") from error
        try:
            self.tensors, self.metadata = self._read_header()
        except BaseException:
            self.close()
            raise

    def read(self, tensor: TensorPlace) -> bytearray:
        """All bytes of a tensor, in memory of its own."""
        found = bytearray(tensor.size_bytes)
        view = memoryview(found)
        done = 0
        while done < len(found):
            count = os.preadv(self._fd, [view[done:]], tensor.start + done)
            if count == 0:
                raise CacheError(f"{self.path} was cut short while it was read")
            done += count
        return found

    def close(self) -> None:
        """Close it."""
        os.close(self._fd)

    def __enter__(self) -> TensorReader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _read_header(self) -> tuple[tuple[TensorPlace, ...], dict[str, str]]:
        size = os.fstat(self._fd).st_size
        length = int.from_bytes(os.pread(self._fd, 8, 0), "little")
        if size < 8 or length > min(size - 8, HEADER_MOST_BYTES):
            raise CacheError(f"{self.path} is no safetensors file, or was cut short")
        try:
            header = json.loads(os.pread(self._fd, length, 8))
            metadata = header.pop("__metadata__", None) or {}
            places = [_place(name, entry, 8 + length) for name, entry in header.items()]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CacheError(f"{self.path} has a header that is not one: {error}") from error
        places.sort(key=lambda place: place.start)
        at = 8 + length
        for place in places:
            if place.start < at:
                raise CacheError(f"{self.path}: tensor {place.name!r} overlaps another")
            at = place.start + place.size_bytes
        if at > size:
            raise CacheError(f"{self.path} was cut short: {size} bytes of {at}")
        return tuple(places), metadata


def _place(name: str, entry: Mapping[str, Any], data_at: int) -> TensorPlace:
    start, end = entry["data_offsets"]
    shape = tuple(entry["shape"])
    if entry["dtype"] not in ITEM_BYTES:
        raise ValueError(f"tensor {name!r} has the unknown type {entry['dtype']!r}")
    if not all(isinstance(one, int) and one >= 0 for one in (*shape, start, end)):
        raise ValueError(f"tensor {name!r} has a shape or place that is not one")
    place = TensorPlace(name=name, dtype=entry["dtype"], shape=shape, start=data_at + start)
    if place.size_bytes != end - start:
        raise ValueError(f"tensor {name!r} has {end - start} bytes, its shape another number")
    return place


class TensorWriter:
    """Writes a safetensors file beside its place, and puts it there when it is whole."""

    def __init__(
        self, path: Path, tensors: Sequence[TensorPlace], metadata: Mapping[str, str]
    ) -> None:
        self._path = path
        self._partial = path.with_name(f".{path.name}.partial")
        self._left = [tensor.size_bytes for tensor in tensors]
        header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
        at = 0
        for tensor in tensors:
            header[tensor.name] = {
                "dtype": tensor.dtype,
                "shape": list(tensor.shape),
                "data_offsets": [at, at + tensor.size_bytes],
            }
            at += tensor.size_bytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % ALIGN_BYTES)
        self._file = self._partial.open("wb", buffering=0)
        self._put(len(text).to_bytes(8, "little") + text)

    def write(self, pieces: Iterable[bytes | bytearray | memoryview]) -> None:
        """The bytes of the next tensor. Raises ``ValueError`` for a wrong number of them."""
        expected = self._left.pop(0)
        for piece in pieces:
            expected -= len(piece)
            self._put(piece)
        if expected:
            raise ValueError(f"a tensor of {self._path.name} has {expected} bytes too few")

    def finish(self) -> None:
        """Sync the file and put it in its place. Raises ``ValueError`` if tensors are missing."""
        if self._left:
            raise ValueError(f"{len(self._left)} tensors of {self._path.name} were not written")
        os.fsync(self._file.fileno())
        self._file.close()
        self._partial.rename(self._path)

    def _put(self, data: bytes | bytearray | memoryview) -> None:
        view = memoryview(data)
        while view:
            view = view[self._file.write(view) or 0 :]
