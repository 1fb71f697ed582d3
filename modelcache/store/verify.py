"""Hashing again what is on the disk, to find what is not as it was."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from modelcache.store.digest import PieceDigests, count_pieces, digest_piece, piece_span
from modelcache.store.layout import Layout
from modelcache.store.manifest import read_record
from modelcache.store.partial_files import compare_digests, mapped
from modelcache.store.revisions import MANIFEST, SPARE
from modelcache.store.store import Store
from modelcache.types import Cancelled, Damaged, FileEntry, Manifest

THREADS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Damage:
    """Something that is not as it was. ``piece`` is ``None`` where it is not a piece of a file
    but the file itself (missing, of another size) or a record about it."""

    path: str
    problem: str
    digest: str = ""
    piece: int | None = None


def hash_file(
    path: Path,
    *,
    piece_bytes: int,
    on_bytes: Callable[[int], None] = lambda count: None,
    cancelled: Callable[[], bool] = lambda: False,
) -> PieceDigests:
    """The digests of a file's pieces, by a few threads. Raises ``Cancelled``."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        size_bytes = os.fstat(fd).st_size

        def hash_piece(index: int) -> tuple[bytes, int]:
            if cancelled():
                raise Cancelled("not wanted any more")
            start, end = piece_span(index, size_bytes, piece_bytes)
            with mapped(fd, start, end) as buffer:
                return digest_piece(buffer)

        pieces = []
        with ThreadPoolExecutor(THREADS, thread_name_prefix="check") as threads:
            for index, piece in enumerate(
                threads.map(hash_piece, range(count_pieces(size_bytes, piece_bytes)))
            ):
                pieces.append(piece)
                start, end = piece_span(index, size_bytes, piece_bytes)
                on_bytes(end - start)
    finally:
        os.close(fd)
    return PieceDigests(size_bytes=size_bytes, pieces=tuple(pieces), piece_bytes=piece_bytes)


def compare_file(path: Path, tree: str, expected: Mapping[str, str]) -> str | None:
    """What is wrong with a file by the digests its store published, if anything is."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return compare_digests(fd, os.fstat(fd).st_size, tree, expected)
    finally:
        os.close(fd)


def check_manifest(layout: Layout, url: str, revision: str) -> list[Damage]:
    """What is wrong with the two copies of a manifest."""
    directory = layout.revision(url, revision)
    found = []
    for name in (MANIFEST, SPARE):
        try:
            problem = None if read_record(directory / name, Manifest) else f"{name} is missing"
        except Damaged as damage:
            problem = str(damage)
        if problem:
            found.append(Damage(path=name, problem=problem))
    return found


def check_files(
    store: Store,
    manifest: Manifest,
    *,
    on_bytes: Callable[[int], None] = lambda count: None,
    cancelled: Callable[[], bool] = lambda: False,
) -> Iterator[Damage]:
    """Read every byte of a revision; what is not as it was."""
    checked: set[str] = set()
    for file in manifest.files:
        if file.digest not in checked:
            checked.add(file.digest)
            yield from check_blob(store, file, on_bytes=on_bytes, cancelled=cancelled)


def check_blob(
    store: Store,
    file: FileEntry,
    *,
    on_bytes: Callable[[int], None] = lambda count: None,
    cancelled: Callable[[], bool] = lambda: False,
) -> Iterator[Damage]:
    """What is wrong with one blob and with the digests beside it."""
    blob = store.layout.blob(file.digest)

    def damage(problem: str, piece: int | None = None) -> Damage:
        return Damage(path=file.path, problem=problem, digest=file.digest, piece=piece)

    try:
        size_bytes = os.stat(blob).st_size
        if size_bytes != file.size_bytes:
            yield damage(f"it has {size_bytes} bytes instead of {file.size_bytes}")
            return
        found = hash_file(
            blob, piece_bytes=store.piece_bytes, on_bytes=on_bytes, cancelled=cancelled
        )
    except FileNotFoundError:
        yield damage("it is missing")
        return
    except OSError as error:
        yield damage(f"it cannot be read: {error.strerror}")
        return
    try:
        known = store.read_pieces(file.digest, file.size_bytes)
    except Damaged as problem:
        yield damage(str(problem))
        if found.digest != file.digest:
            yield damage("its content is not what it was, nor is the record of its pieces")
        return
    for index, (now, then) in enumerate(zip(found.pieces, known.pieces, strict=True)):
        if now[0] != then[0]:
            yield damage("its content is not what it was", index)
        elif now[1] != then[1]:
            yield damage("the record of this piece is not what it was", index)
