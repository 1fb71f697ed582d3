"""What a preparation step's result will take, told from the headers of the files it begins with.

Room for it is made before the step begins, so this must not say too little; where it says much too
much, a step is refused that would have fitted.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

from modelcache.prepare.child import CODES, read_index
from modelcache.safetensors_index import tensor_bytes
from modelcache.settings import PreparationStep
from modelcache.types import CacheError

GROWTH: Mapping[str, float] = {"gguf_to_safetensors": 5.0, "cast": 2.0}
"""What a result takes where its input's headers do not tell, as a multiple of that."""

CAST = frozenset({"BF16", "F16", "F32", "F64"})
"""What a cast casts, as safetensors calls it."""

SLACK_BYTES = 65_536
"""For indexes, configurations and headers that are longer than what they were made of."""

TOKENIZER_GROWTH = 4
"""A tokenizer as files takes so many times what it takes in a GGUF file's metadata."""

GGUF_ITEM_BYTES: Mapping[int, int] = {
    0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8,
}  # fmt: skip
GGUF_STRING, GGUF_ARRAY = 8, 9
"""Types of values in a GGUF file's metadata, by its numbers."""

GGUF_MOST = 1 << 24
"""Most entries of one kind in a GGUF file that is believed."""


def expect_bytes(step: PreparationStep, source: Path) -> int | None:
    """About what the result of ``step`` will take at most; ``None`` where that is unknown (a
    command's). Reads the headers of files in ``source``, and nothing else."""
    if step.kind == "command":
        return None
    try:
        if step.kind == "gguf_to_safetensors":
            return _after_gguf(step, source)
        return _after_cast(step, source)
    except (OSError, ValueError, KeyError, struct.error, CacheError):
        # The step itself will say what is wrong with them, if anything is.
        growth = GROWTH[step.kind] * (2.0 if step.dtype == "float32" else 1.0)
        return int(size_of(source) * growth)


def size_of(path: Path) -> int:
    """The bytes of a file, or of all files in a folder."""
    if path.is_file():
        return path.stat().st_size
    return sum(one.stat().st_size for one in path.rglob("*") if one.is_file())


def _after_cast(step: PreparationStep, source: Path) -> int:
    """Each number in its new type; all else stays."""
    files = sorted(source.glob("*.safetensors"))
    if not files:
        raise CacheError(f"{source} has no safetensors file")
    total = size_of(source) + SLACK_BYTES
    for path in files:
        for one in read_index(path).tensors:
            made = CODES[step.dtype or "bfloat16"] if one.dtype in CAST else one.dtype
            total += tensor_bytes(made, one.shape) - (one.end - one.start)
    return total


def _after_gguf(step: PreparationStep, source: Path) -> int:
    """Every weight in the new type, and the tokenizer from the file's metadata."""
    path = source
    if source.is_dir():
        (path,) = [source / step.file] if step.file else sorted(source.glob("*.gguf"))
    with path.open("rb") as file:
        count, metadata_bytes = _read_gguf(file)
    made_bytes = tensor_bytes(CODES[step.dtype or "bfloat16"], (count,))
    return made_bytes + TOKENIZER_GROWTH * metadata_bytes + SLACK_BYTES


def _read_gguf(file: BinaryIO) -> tuple[int, int]:
    """How many weights a GGUF file has, and the bytes of what stands before them."""
    magic, version, tensors, values = struct.unpack("<4sIQQ", file.read(24))
    if magic != b"GGUF" or version < 2 or max(tensors, values) > GGUF_MOST:
        raise ValueError("no GGUF file of a version that is known")
    for _ in range(values):
        _skip_text(file)
        _skip_value(file, *_unpack(file, "<I"))
    count = 0
    for _ in range(tensors):
        _skip_text(file)
        (dims,) = _unpack(file, "<I")
        if dims > 8:
            raise ValueError("no tensor has so many dimensions")
        count += math.prod(_unpack(file, f"<{dims}Q"))
        file.seek(12, os.SEEK_CUR)  # its type and where it lies
    return count, file.tell()


def _skip_value(file: BinaryIO, kind: int) -> None:
    if kind == GGUF_STRING:
        _skip_text(file)
    elif kind == GGUF_ARRAY:
        inner, length = _unpack(file, "<IQ")
        if length > GGUF_MOST:
            raise ValueError("no list is so long")
        if inner in GGUF_ITEM_BYTES:
            file.seek(length * GGUF_ITEM_BYTES[inner], os.SEEK_CUR)
            return
        if inner != GGUF_STRING:
            raise ValueError("no list of lists is known")
        for _ in range(length):
            _skip_text(file)
    else:
        file.seek(GGUF_ITEM_BYTES[kind], os.SEEK_CUR)


def _skip_text(file: BinaryIO) -> None:
    (length,) = _unpack(file, "<Q")
    file.seek(length, os.SEEK_CUR)


def _unpack(file: BinaryIO, form: str) -> tuple[int, ...]:
    return struct.unpack(form, file.read(struct.calcsize(form)))
