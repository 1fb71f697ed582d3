"""Digests of pieces and of whole files, and the small file beside each blob that holds them.

A blob is named by its *tree digest*: the BLAKE3 of its size and of the BLAKE3s of its pieces. So
pieces can be hashed by several threads in any order, and a blob is known as soon as its last
piece is. The XXH3-64 of each piece is for checks while loading, at memory speed; it guards
against decay, not against malice.

Only the standard library and what vLLM brings (``blake3``, ``xxhash``): engines read this too.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import blake3
import xxhash

from modelcache.types import PIECE_BYTES, Damaged

DOMAIN = b"tidegate-tree-1\0"
RECORD = struct.Struct("<32sQ")
"""A piece in a ``.pieces`` file: its BLAKE3, then its XXH3-64, little-endian."""

Piece: TypeAlias = "tuple[bytes, int]"
"""A piece's BLAKE3 (32 bytes) and XXH3-64."""

Buffer: TypeAlias = "bytes | bytearray | memoryview"


def digest_piece(buffer: Buffer) -> Piece:
    """Both digests of a piece's bytes. Lets other threads run meanwhile."""
    return blake3.blake3(buffer).digest(), xxhash.xxh3_64_intdigest(buffer)


def tree_digest(size_bytes: int, piece_digests: Iterable[bytes]) -> str:
    """The name of a blob of this size whose pieces have these BLAKE3s, in order."""
    tree = blake3.blake3(DOMAIN + struct.pack("<Q", size_bytes))
    for digest in piece_digests:
        tree.update(digest)
    return tree.hexdigest()


def count_pieces(size_bytes: int, piece_bytes: int = PIECE_BYTES) -> int:
    """How many pieces a file of this size has; an empty one has none."""
    return -(-size_bytes // piece_bytes)


def piece_span(index: int, size_bytes: int, piece_bytes: int = PIECE_BYTES) -> tuple[int, int]:
    """Where piece ``index`` begins and ends (exclusive). Raises ``IndexError`` beyond the last."""
    if not 0 <= index < count_pieces(size_bytes, piece_bytes):
        raise IndexError(f"piece {index} of a file of {size_bytes} bytes")
    start = index * piece_bytes
    return start, min(start + piece_bytes, size_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class PieceDigests:
    """The digests of all pieces of one blob, in order."""

    size_bytes: int
    pieces: tuple[Piece, ...]
    piece_bytes: int = PIECE_BYTES

    @property
    def digest(self) -> str:
        """The tree digest they amount to."""
        return tree_digest(self.size_bytes, (blake for blake, _ in self.pieces))

    def encode(self) -> bytes:
        """As a ``.pieces`` file holds them: ``RECORD`` for each piece."""
        return b"".join(RECORD.pack(*piece) for piece in self.pieces)


def read_pieces(
    path: Path, digest: str, size_bytes: int, *, piece_bytes: int = PIECE_BYTES
) -> PieceDigests:
    """The ``.pieces`` file of blob ``digest``.

    Raises ``Damaged`` where it is missing, has the wrong length or does not amount to ``digest``.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise Damaged(f"{path.name} cannot be read: {error.strerror}") from error
    count = count_pieces(size_bytes, piece_bytes)
    if len(data) != count * RECORD.size:
        raise Damaged(f"{path.name} has {len(data)} bytes instead of {count * RECORD.size}")
    found = PieceDigests(
        size_bytes=size_bytes, pieces=tuple(RECORD.iter_unpack(data)), piece_bytes=piece_bytes
    )
    if found.digest != digest:
        raise Damaged(f"{path.name} does not amount to {digest}")
    return found
