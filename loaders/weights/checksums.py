"""The checksums of a file's pieces, where the model cache has them.

A model in the cache is a directory of links to blobs, and each blob has a file with the digests of
its pieces beside it. Checking their XXH3-64 costs less than the reading it is done beside.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from modelcache.safetensors_index import BadFile
from modelcache.store.digest import PieceDigests, read_pieces
from modelcache.store.layout import Layout
from modelcache.types import Damaged

DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True, kw_only=True)
class FileSums:
    """The XXH3-64 of each piece of a file of ``size_bytes``."""

    size_bytes: int
    piece_bytes: int
    xxh3: tuple[int, ...]

    def cover(self, end: int) -> int:
        """The end of the piece that byte ``end - 1`` is in."""
        return min(-(-end // self.piece_bytes) * self.piece_bytes, self.size_bytes)

    def check(self, piece: int, digest: int) -> None:
        """Raises ``BadFile`` unless ``digest`` is that of piece ``piece``."""
        if self.xxh3[piece] != digest:
            start = piece * self.piece_bytes
            end = min(start + self.piece_bytes, self.size_bytes)
            raise BadFile(f"damaged: bytes {start} to {end} are not what was stored", piece=piece)

    def check_beginning(self, data: bytes) -> None:
        """Check the whole pieces that ``data``, the file's beginning, consists of."""
        for piece, start in enumerate(range(0, len(data), self.piece_bytes)):
            self.check(piece, xxhash.xxh3_64_intdigest(data[start : start + self.piece_bytes]))


def of_pieces(pieces: PieceDigests) -> FileSums:
    """The checksums among a blob's digests."""
    return FileSums(
        size_bytes=pieces.size_bytes,
        piece_bytes=pieces.piece_bytes,
        xxh3=tuple(xxh3 for _, xxh3 in pieces.pieces),
    )


def find_sums(path: Path) -> FileSums | None:
    """The checksums the model cache has of a file in one of its views; ``None`` where the file is
    not in one. Raises ``BadFile`` where they are there and cannot be used."""
    place = path.absolute()
    found = _find_in_view(place) or _find_by_blob(place)
    if found is None:
        return None
    layout, digest, size_bytes = found
    try:
        return of_pieces(read_pieces(layout.pieces(digest), digest, size_bytes))
    except Damaged as error:
        raise BadFile(f"cannot be verified: {error}", path=str(path)) from None


def _find_in_view(place: Path) -> tuple[Layout, str, int] | None:
    """A file of ``views/<model key>/<revision>/``: its digest is in that revision's manifest."""
    for view in place.parents:
        if len(view.parents) > 2 and view.parent.parent.name == "views":
            break
    else:
        return None
    root = view.parents[2]
    manifest = root / "models" / view.parent.name / view.name / "manifest.json"
    try:
        document: Any = json.loads(manifest.read_bytes())
        files: Mapping[str, Any] = {entry["path"]: entry for entry in document["files"]}
        entry = files[place.relative_to(view).as_posix()]
        return Layout(root), str(entry["digest"]), int(entry["size_bytes"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _find_by_blob(place: Path) -> tuple[Layout, str, int] | None:
    """A file that is, or links to, ``blobs/<aa>/<digest>``."""
    try:
        blob = place.resolve(strict=True)
        size_bytes = blob.stat().st_size
    except (OSError, RuntimeError):
        return None
    if not DIGEST.fullmatch(blob.name) or blob.parent.parent.name != "blobs":
        return None
    if not blob.with_name(f"{blob.name}.pieces").exists():
        return None
    return Layout(blob.parents[2]), blob.name, size_bytes
