"""Finding a model's safetensors files, opening them, noticing when they change, and the checksums
that the model cache has of them.

Every file is opened once, before anything is read, and stays the same file whatever happens to its
name. What was seen of it then (size, time of change, inode) must still hold when bytes are used.

A model in the cache is a directory of links to blobs, and each blob has a file with the digests of
its pieces beside it. Checking their XXH3-64 costs less than the reading it is done beside.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from modelcache.safetensors_index import (
    LENGTH_BYTES,
    WEIGHT_MAP_LIMIT_BYTES,
    BadFile,
    Index,
    TensorEntry,
    assign,
    find_header_end,
    parse_header,
    parse_weight_map,
)
from modelcache.store.digest import PieceDigests, read_pieces
from modelcache.store.layout import Layout
from modelcache.types import DIGEST, Damaged

SINGLE = "model.safetensors"
INDEX_ENDING = ".safetensors.index.json"

ModelPath = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
"""A model's directory, one safetensors file, or several."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """The files of a model, in order, and which of them has which tensor (``None``: unsaid)."""

    paths: tuple[Path, ...]
    weight_map: Mapping[str, Path] | None = None


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


@dataclass(slots=True, kw_only=True, eq=False)
class OpenFile:
    """One file being read. ``direct_fd`` is the same file past the page cache, opened when first
    wanted; ``-1`` until then, ``None`` where that cannot be."""

    path: Path
    fd: int
    seen: os.stat_result
    sums: FileSums | None
    direct_fd: int | None = -1

    @property
    def size_bytes(self) -> int:
        """As when it was opened."""
        return self.seen.st_size

    def direct(self) -> int | None:
        """A descriptor that reads past the page cache; ``None`` where there is none."""
        if self.direct_fd == -1:
            try:
                # By descriptor, not by path: the path may be another file's by now.
                self.direct_fd = os.open(
                    f"/proc/self/fd/{self.fd}", os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC
                )
            except OSError:
                self.direct_fd = None
        return self.direct_fd

    def check_unchanged(self) -> None:
        """Raises ``BadFile`` where it is not as it was when it was opened, or not there."""
        try:
            now, named = os.fstat(self.fd), os.stat(self.path)
        except OSError as error:
            raise BadFile(
                f"gone while it was read: {error.strerror}", path=str(self.path)
            ) from None
        if _identity(now) != _identity(self.seen) or not os.path.samestat(now, named):
            raise BadFile("changed while it was read", path=str(self.path))

    def close(self) -> None:
        """Idempotent."""
        for fd in {self.fd, self.direct_fd} - {-1, None}:
            os.close(fd)  # type: ignore[arg-type]
        self.fd = -1
        self.direct_fd = None


def find_files(path: ModelPath) -> Found:
    """The safetensors files that ``path`` stands for.

    Of a directory: those its index names, else ``model.safetensors``, else all. Raises ``BadFile``
    where there is none or the index is malformed.
    """
    if not isinstance(path, str | os.PathLike):
        paths = tuple(dict.fromkeys(Path(one) for one in path))
        if not paths:
            raise BadFile("no file was named")
        return Found(paths=paths)
    place = Path(path)
    try:
        if not place.is_dir():
            return Found(paths=(place,))
        index = _find_index(place)
    except OSError as error:
        raise BadFile(f"cannot be looked at: {error.strerror}", path=str(place)) from None
    if index is not None:
        file = _open(index, lambda path: None)
        try:
            names = parse_weight_map(_read(file, WEIGHT_MAP_LIMIT_BYTES + 1))
        except BadFile as error:
            raise BadFile(error.message, path=str(index)) from None
        finally:
            file.close()
        weight_map = {name: place / file for name, file in names.items()}
        return Found(paths=tuple(sorted(set(weight_map.values()))), weight_map=weight_map)
    if (place / SINGLE).exists():
        return Found(paths=(place / SINGLE,))
    paths = tuple(sorted(place.glob("*.safetensors")))
    if not paths:
        raise BadFile("there is no safetensors file in it", path=str(place))
    return Found(paths=paths)


@contextmanager
def opened(found: Found, find_sums: Callable[[Path], FileSums | None]) -> Iterator[list[OpenFile]]:
    """All files of a model, opened; closed again at the end. Raises ``BadFile``."""
    files: list[OpenFile] = []
    try:
        for path in found.paths:
            files.append(_open(path, find_sums))
        yield files
    finally:
        for file in files:
            file.close()


def read_index(file: OpenFile) -> Index:
    """What a file holds; its header is checked first where it has checksums. Raises ``BadFile``."""
    path = str(file.path)
    try:
        header_end = find_header_end(_read(file, LENGTH_BYTES), file.size_bytes)
        data = _read(file, file.sums.cover(header_end) if file.sums else header_end)
        if file.sums:
            file.sums.check_beginning(data)
        return parse_header(data[:header_end], file.size_bytes)
    except BadFile as error:
        raise BadFile(error.message, path=path, piece=error.piece) from None


def choose_tensors(
    found: Found, files: Iterable[OpenFile], indexes: Iterable[Index]
) -> list[tuple[TensorEntry, ...]]:
    """The tensors to take from each file, every name once. Raises ``BadFile``."""
    by_path = {str(file.path): index for file, index in zip(files, indexes, strict=True)}
    weight_map = found.weight_map
    homes = None if weight_map is None else {n: str(p) for n, p in weight_map.items()}
    chosen = assign(by_path, homes)
    return [chosen[str(path)] for path in found.paths]


def _find_index(place: Path) -> Path | None:
    usual = place / f"model{INDEX_ENDING}"
    if usual.exists():
        return usual
    others = sorted(place.glob(f"*{INDEX_ENDING}"))
    return others[0] if len(others) == 1 and not (place / SINGLE).exists() else None


def _open(path: Path, find_sums: Callable[[Path], FileSums | None]) -> OpenFile:
    try:
        # Without O_NONBLOCK a named pipe would be waited for.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise BadFile(f"cannot be opened: {reason}", path=str(path)) from None
    file = OpenFile(path=path, fd=fd, seen=os.fstat(fd), sums=None)
    try:
        if not stat.S_ISREG(file.seen.st_mode):
            raise BadFile("not a regular file", path=str(path))
        file.sums = find_sums(path)
        if file.sums and file.sums.size_bytes != file.size_bytes:
            raise BadFile(
                f"has {file.size_bytes} bytes instead of {file.sums.size_bytes}", path=str(path)
            )
    except BaseException:
        file.close()
        raise
    return file


def _read(file: OpenFile, length: int) -> bytes:
    """The file's first ``length`` bytes, or all of them where it has fewer."""
    data = b""
    try:
        while part := os.pread(file.fd, length - len(data), len(data)):
            data += part
    except OSError as error:
        raise BadFile(f"cannot be read: {error.strerror}") from None
    if len(data) < min(length, file.size_bytes):
        raise BadFile("changed while it was read")
    return data


def _identity(seen: os.stat_result) -> tuple[int, int, int, int]:
    return seen.st_dev, seen.st_ino, seen.st_size, seen.st_mtime_ns


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
    except (Damaged, ValueError) as error:  # such as a digest with a zero byte in it
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
        entries = document["body"]["files"]  # a sealed record, see store.records
        files: Mapping[str, Any] = {entry["path"]: entry for entry in entries}
        entry = files[place.relative_to(view).as_posix()]
        return Layout(root), str(entry["digest"]), int(entry["size_bytes"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError, OverflowError):
        return None


def _find_by_blob(place: Path) -> tuple[Layout, str, int] | None:
    """A file that is, or links to, ``blobs/<aa>/<digest>``."""
    try:
        blob = place.resolve(strict=True)
        size_bytes = blob.stat().st_size
    except (OSError, RuntimeError, ValueError):
        return None
    if not DIGEST.fullmatch(blob.name) or blob.parent.parent.name != "blobs":
        return None
    if not blob.with_name(f"{blob.name}.pieces").exists():
        return None
    return Layout(blob.parents[2]), blob.name, size_bytes
