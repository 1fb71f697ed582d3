"""What a safetensors file says it holds, believed only after every claim was checked.

A file begins with the header's length (8 bytes, little-endian), then the header (JSON), then the
tensors' bytes. The header may come from a hostile author, so nothing in it is taken on trust:
a tensor must lie inside the file, have exactly the bytes its shape and type need, share none with
another, and together they must leave no hole, which could hide something or stem from damage.
Whatever is off is a ``BadFile``. Only bytes and text come in here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from modelcache.types import CacheError

DTYPE_BITS: Mapping[str, int] = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F8_E8M0": 8,
    "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip
"""Bits of one element, by the format's name for its type."""

LENGTH_BYTES = 8
HEADER_LIMIT_BYTES = 100_000_000
"""The format's own limit; a header beyond it is an attempt to make us allocate."""
DIMENSIONS_LIMIT = 32
"""No model comes near; numbers beyond it are no real shape."""
SIZE_LIMIT = 2**63 - 1
"""Bytes and elements are signed 64-bit numbers to torch and to the kernel."""
TENSOR_FIELDS = frozenset({"dtype", "shape", "data_offsets"})
WEIGHT_MAP_LIMIT_BYTES = 100_000_000


class BadFile(CacheError):
    """A file is not what it should be: malformed, cut short, changed or damaged.

    ``path`` is the file, empty where only its bytes were seen; ``piece`` the index of the piece
    whose checksum is wrong, where that is what is wrong.
    """

    def __init__(self, message: str, *, path: str = "", piece: int | None = None) -> None:
        super().__init__(f"{path}: {message}" if path else message)
        self.message = message
        self.path = path
        self.piece = piece


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorEntry:
    """One tensor of a file: ``dtype`` by the format's name; its bytes are ``start`` to ``end``
    (exclusive), counted from the beginning of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Index:
    """What one file holds. ``tensors`` are in the order of their bytes; ``header_end`` is where
    the first one's begin."""

    size_bytes: int
    header_end: int
    tensors: tuple[TensorEntry, ...]
    metadata: Mapping[str, str] = field(default_factory=dict)


def find_header_end(first: bytes, size_bytes: int) -> int:
    """Where the header of a file of ``size_bytes`` ends, from its ``first`` 8 bytes.

    Raises ``BadFile`` unless that many bytes can be there.
    """
    if size_bytes < LENGTH_BYTES or len(first) < LENGTH_BYTES:
        raise BadFile(f"{size_bytes} bytes are too few for a safetensors file")
    length = int.from_bytes(first[:LENGTH_BYTES], "little")
    if length > HEADER_LIMIT_BYTES:
        raise BadFile(f"its header is said to be {length} bytes, {HEADER_LIMIT_BYTES} at most")
    if LENGTH_BYTES + length > size_bytes:
        raise BadFile(f"cut short: the header takes {length} bytes, the file has {size_bytes}")
    if length < 2:
        raise BadFile(f"a header of {length} bytes says nothing")
    return LENGTH_BYTES + length


def parse_header(data: bytes, size_bytes: int) -> Index:
    """The index of a file of ``size_bytes`` that begins with ``data``, which must hold the whole
    header. Raises ``BadFile`` for anything but a correct one."""
    header_end = find_header_end(data, size_bytes)
    document = _parse_object(data[LENGTH_BYTES:header_end], "header")
    metadata = _parse_metadata(document.pop("__metadata__", {}))
    entries = [
        _parse_tensor(name, value, header_end, size_bytes) for name, value in document.items()
    ]
    # Empty tensors share their place with a neighbour; its end tells which comes first.
    entries.sort(key=lambda entry: (entry.start, entry.end))
    at = header_end
    for entry in entries:
        if entry.start != at:
            what = "overlaps another" if entry.start < at else f"leaves {entry.start - at} unused"
            raise BadFile(f"tensor {entry.name!r} begins at byte {entry.start} and {what}")
        at = entry.end
    if at != size_bytes:
        raise BadFile(f"its tensors end at byte {at}, the file at {size_bytes}")
    return Index(
        size_bytes=size_bytes, header_end=header_end, tensors=tuple(entries), metadata=metadata
    )


def parse_weight_map(data: bytes) -> dict[str, str]:
    """Which file each tensor is in, from a ``*.safetensors.index.json``.

    Raises ``BadFile`` where it is malformed or names a file outside its own directory.
    """
    if len(data) > WEIGHT_MAP_LIMIT_BYTES:
        raise BadFile(f"{len(data)} bytes are no index of tensors")
    weight_map = _parse_object(data, "index").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise BadFile("it has no weight_map")
    for name, file in weight_map.items():
        if not isinstance(file, str) or not _is_inside(file):
            raise BadFile(f"tensor {name!r} is said to be in {file!r}, outside the model")
    return weight_map


def assign(
    indexes: Mapping[str, Index], weight_map: Mapping[str, str] | None = None
) -> dict[str, tuple[TensorEntry, ...]]:
    """The tensors to take from each file, every name once.

    ``weight_map`` says which of several files has a tensor. Raises ``BadFile`` where it names a
    file or a tensor that is not there, and where files share a name and it does not choose.
    """
    for file in (weight_map or {}).values():
        if file not in indexes:
            raise BadFile(f"the index names the file {file!r}, which is not there")
    homes: dict[str, str] = {}
    chosen: dict[str, tuple[TensorEntry, ...]] = {}
    for file, index in indexes.items():
        kept = []
        for entry in index.tensors:
            if weight_map is not None and weight_map.get(entry.name, file) != file:
                continue
            if entry.name in homes:
                raise BadFile(f"tensor {entry.name!r} is in {homes[entry.name]!r} and {file!r}")
            homes[entry.name] = file
            kept.append(entry)
        chosen[file] = tuple(kept)
    for name, file in (weight_map or {}).items():
        if homes.get(name) != file:
            raise BadFile(f"the index says that {file!r} has the tensor {name!r}; it has not")
    return chosen


def _parse_object(data: bytes, what: str) -> dict[str, Any]:
    """A JSON object that begins at the first byte, no key twice."""
    if data[:1] != b"{":
        raise BadFile(f"its {what} is not a JSON object")
    try:
        document = json.loads(
            data.decode("utf-8"), object_pairs_hook=_no_key_twice, parse_constant=_refuse_constant
        )
    except RecursionError:
        raise BadFile(f"its {what} is nested too deeply") from None
    except ValueError as error:
        raise BadFile(f"its {what} is not valid JSON: {error}") from None
    return dict(document)


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise BadFile(f"the name {twice[:200]!r} is there twice")
    return found


def _refuse_constant(text: str) -> NoReturn:
    raise BadFile(f"{text} is not a number")


def _parse_metadata(value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise BadFile("__metadata__ is not a map of texts")
    return value


def _parse_tensor(name: str, value: Any, header_end: int, size_bytes: int) -> TensorEntry:
    _check_name(name)
    if not isinstance(value, dict) or value.keys() != TENSOR_FIELDS:
        raise BadFile(f"tensor {name!r} needs exactly {', '.join(sorted(TENSOR_FIELDS))}")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise BadFile(f"tensor {name!r} has the unknown type {str(dtype)[:40]!r}")
    if not _are_sizes(shape) or len(shape) > DIMENSIONS_LIMIT:
        raise BadFile(f"tensor {name!r} has a shape that is none")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise BadFile(f"tensor {name!r} has data_offsets that are none")
    start, end = offsets
    if not start <= end <= size_bytes - header_end:
        raise BadFile(
            f"tensor {name!r} has bytes {start} to {end}, there are {size_bytes - header_end}"
        )
    needed = _count_bytes(name, dtype, shape)
    if end - start != needed:
        raise BadFile(f"tensor {name!r} has {end - start} bytes, its shape needs {needed}")
    return TensorEntry(
        name=name,
        dtype=dtype,
        shape=tuple(shape),
        start=header_end + start,
        end=header_end + end,
    )


def _check_name(name: str) -> None:
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        raise BadFile(f"the name {name[:200]!r} is not text") from None


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(v) is int and 0 <= v <= SIZE_LIMIT for v in value)


def tensor_bytes(dtype: str, shape: Sequence[int]) -> int:
    """Bytes of a tensor whose type and shape are sound, as ``parse_header`` gives them."""
    return math.prod(shape) * DTYPE_BITS[dtype] // 8


def _count_bytes(name: str, dtype: str, shape: list[int]) -> int:
    """Bytes of such a tensor. The product without zeros must fit too: torch multiplies it for
    strides, whether there are elements or not."""
    bits = DTYPE_BITS[dtype]
    for size in shape:
        bits *= size or 1
        if bits > 8 * SIZE_LIMIT:
            raise BadFile(f"tensor {name!r} has a shape beyond what can be addressed")
    if bits % 8:
        raise BadFile(f"tensor {name!r} does not end at a whole byte")
    return 0 if 0 in shape else bits // 8


def _is_inside(file: str) -> bool:
    parts = file.split("/")
    return not ({"", ".", ".."} & set(parts)) and "\\" not in file and "\0" not in file
