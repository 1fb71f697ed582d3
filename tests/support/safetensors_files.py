"""Safetensors files made by hand, so that tests decide every byte of them."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loaders.weights.files import FileSums, of_pieces
from modelcache.store.digest import PieceDigests, digest_piece
from modelcache.types import PIECE_BYTES


def header(document: Any, *, pad: int = 8) -> bytes:
    """A header with its length before it; ``document`` may be JSON text already."""
    text = document if isinstance(document, str) else json.dumps(document)
    data = text.encode("utf-8", "surrogatepass")
    data += b" " * (-len(data) % pad)
    return len(data).to_bytes(8, "little") + data


def layout(tensors: Sequence[tuple[str, str, Sequence[int], int]]) -> dict[str, Any]:
    """Header entries of tensors (name, dtype, shape, bytes) one behind the other."""
    at, document = 0, {}
    for name, dtype, shape, size in tensors:
        document[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    return document


def write_file(path: Path, sizes: Mapping[str, int], *, seed: int = 0) -> bytes:
    """A file of U8 tensors of these sizes with seeded bytes; returns all of its bytes."""
    rows = [(name, "U8", [size], size) for name, size in sizes.items()]
    data = header(layout(rows)) + random.Random(seed).randbytes(sum(sizes.values()))
    path.write_bytes(data)
    return data


def sums_of(data: bytes) -> FileSums:
    """The checksums of a file with this content."""
    pieces = tuple(
        digest_piece(data[start : start + PIECE_BYTES])
        for start in range(0, len(data), PIECE_BYTES)
    )
    return of_pieces(PieceDigests(size_bytes=len(data), pieces=pieces))
