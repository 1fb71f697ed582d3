"""A file that is being fetched: its bytes, and a journal of the pieces that are good.

The downloader writes any bytes anywhere into ``fd`` and then commits a piece: it is hashed from the
file, not from the fetcher's memory, and its digests are appended to the journal. What came of a
piece that is not whole can be kept too, as its beginning. A killed process
leaves the journal with perhaps half a record at its end, and that is dropped. Nothing is synced on
the way: the process that opens the file again hashes everything that the journal names, so a power
cut or a flipped bit costs a piece, never a wrong one. ``finish`` syncs, and only then does the file
get its name among the blobs.
"""

from __future__ import annotations

import fcntl
import hashlib
import mmap
import os
import struct
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from modelcache.store.digest import RECORD as PIECE_RECORD
from modelcache.store.digest import Piece, PieceDigests, count_pieces, digest_piece, piece_span
from modelcache.store.files import (
    allocate,
    create,
    is_locked,
    locked,
    make_directory,
    put,
    remove_tree,
    sync_directory,
    write_whole,
)
from modelcache.store.layout import Layout
from modelcache.types import PIECE_BYTES, CacheError, Damaged, InUse

DATA = "data"
JOURNAL = "journal"
HEADER = struct.Struct("<8sQQ")
MAGIC = b"tidegj01"
RECORD = struct.Struct("<I32sQI")
"""A good piece: its index, BLAKE3, XXH3-64, and the CRC-32 of those. The beginning of a piece: its
index and ``BEGINNING``, BLAKE3, how many bytes it is, and the CRC-32."""
BEGINNING = 1 << 31

CHECK_THREADS = 4
TREE = "tidegate-tree"
"""The name of the tree digest where digests are given by algorithm."""


class Partial:
    """A file on its way into the store. One process has it open at a time; its threads share it.

    ``key`` is the file's key (``layout.file_key``), ``fd`` is open for reading and writing.
    ``on_whole`` is called once, by the thread that commits the last missing piece.
    """

    def __init__(
        self,
        layout: Layout,
        key: str,
        size_bytes: int,
        *,
        piece_bytes: int = PIECE_BYTES,
        on_whole: Callable[[Partial], None] | None = None,
    ) -> None:
        self.layout = layout
        self.key = key
        self.size_bytes = size_bytes
        self.piece_bytes = piece_bytes
        self.on_whole = on_whole
        self._directory = layout.partial(key)
        self._lock = threading.Lock()
        self._pieces: dict[int, Piece] = {}
        self._beginnings: dict[int, int] = {}
        self._journal = -1
        self.fd = -1

    @classmethod
    def open(
        cls,
        layout: Layout,
        key: str,
        size_bytes: int,
        *,
        piece_bytes: int = PIECE_BYTES,
        on_whole: Callable[[Partial], None] | None = None,
    ) -> Partial:
        """Begin, or resume: pieces that are there are hashed again.

        Reserves the whole file's space. Raises ``InUse`` where another process has it open,
        ``OSError`` (``ENOSPC``) where the disk is full.
        """
        partial = cls(layout, key, size_bytes, piece_bytes=piece_bytes, on_whole=on_whole)
        try:
            partial._open()
        except BaseException:
            partial.close()
            raise
        return partial

    @staticmethod
    def reserve(layout: Layout, key: str, size_bytes: int) -> None:
        """Give a file its space on the disk without opening it. Raises ``OSError`` (``ENOSPC``)."""
        directory = layout.partial(key)
        make_directory(directory)
        fd = create(directory / DATA)
        try:
            allocate(fd, size_bytes)
        finally:
            os.close(fd)

    @staticmethod
    def is_reserved(layout: Layout, key: str, size_bytes: int) -> bool:
        """Whether a file has its space on the disk already."""
        try:
            return os.stat(layout.partial(key) / DATA).st_size == size_bytes
        except FileNotFoundError:
            return False

    def __enter__(self) -> Partial:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Partial({self.key} {self.bytes_done}/{self.size_bytes} bytes)"

    def _open(self) -> None:
        with locked(self.layout.store_lock):  # not while a sweep looks whether it is open
            make_directory(self._directory)
            self._journal = create(self._directory / JOURNAL, os.O_APPEND)
            try:
                fcntl.flock(self._journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InUse(f"{self.key} is being fetched by another process") from None
        self.fd = create(self._directory / DATA)
        header = HEADER.pack(MAGIC, self.size_bytes, self.piece_bytes)
        journal = os.pread(self._journal, os.fstat(self._journal).st_size, 0)
        whole = os.fstat(self.fd).st_size == self.size_bytes
        if not journal.startswith(header) or not whole:
            os.ftruncate(self._journal, 0)
            allocate(self.fd, self.size_bytes)
            os.write(self._journal, header)
            return
        records = (len(journal) - HEADER.size) // RECORD.size
        os.ftruncate(self._journal, HEADER.size + records * RECORD.size)
        self._check(*decode_journal(journal, self.size_bytes, self.piece_bytes))

    def _check(self, claimed: Mapping[int, Piece], begun: Mapping[int, Piece]) -> None:
        """Keep what the data still has of the journal's pieces and their beginnings."""
        with ThreadPoolExecutor(CHECK_THREADS, thread_name_prefix="check") as threads:
            found = threads.map(self._digest, claimed)
            started = threads.map(
                lambda index: self._digest(index, begun[index][1])[0] == begun[index][0], begun
            )
            self._pieces = {
                index: piece
                for (index, piece), now in zip(claimed.items(), found, strict=True)
                if piece == now
            }
            self._beginnings = {
                index: size_bytes
                for (index, (_, size_bytes)), same in zip(begun.items(), started, strict=True)
                if same
            }

    def span(self, index: int) -> tuple[int, int]:
        """Where piece ``index`` begins and ends (exclusive)."""
        return piece_span(index, self.size_bytes, self.piece_bytes)

    def missing(self) -> list[int]:
        """The pieces that are not committed yet, in order."""
        count = count_pieces(self.size_bytes, self.piece_bytes)
        with self._lock:
            return [index for index in range(count) if index not in self._pieces]

    @property
    def bytes_done(self) -> int:
        """The bytes of committed pieces."""
        with self._lock:
            spans = [self.span(index) for index in self._pieces]
        return sum(end - start for start, end in spans)

    def beginning(self, index: int) -> int:
        """How many bytes are there of a piece that is not committed, from its start on."""
        with self._lock:
            return self._beginnings.get(index, 0)

    @property
    def bytes_begun(self) -> int:
        """The bytes that are there of pieces that are not committed."""
        with self._lock:
            return sum(self._beginnings.values())

    def keep(self, index: int, size_bytes: int) -> None:
        """Count the first bytes of piece ``index`` as there, for the fetch of the rest. Nothing
        to do for a piece that is committed, or for fewer than are there."""
        with self._lock:
            if index in self._pieces or size_bytes <= self._beginnings.get(index, 0):
                return
        blake, _ = self._digest(index, size_bytes)
        with self._lock:
            if index not in self._pieces:
                self._note(index | BEGINNING, (blake, size_bytes))
                self._beginnings[index] = size_bytes

    def _note(self, index: int, piece: Piece) -> None:
        body = RECORD.pack(index, *piece, 0)[:-4]
        os.write(self._journal, body + struct.pack("<I", zlib.crc32(body)))

    def commit(self, index: int) -> bytes:
        """Count piece ``index`` as good, with the bytes the file has now; its BLAKE3.

        The fetcher's write must have returned. Committing again replaces what was known.
        """
        piece = self._digest(index)
        with self._lock:
            self._note(index, piece)
            self._beginnings.pop(index, None)
            fresh = index not in self._pieces
            self._pieces[index] = piece
            whole = fresh and len(self._pieces) == count_pieces(self.size_bytes, self.piece_bytes)
        if whole and self.on_whole is not None:
            self.on_whole(self)
        return piece[0]

    def piece(self, index: int) -> Piece | None:
        """Both digests of a committed piece, ``None`` for any other."""
        with self._lock:
            return self._pieces.get(index)

    def finish(self, expected: Mapping[str, str], *, replace: bool = False) -> str:
        """Check the whole against what its source published, and make it a blob; its tree digest.

        ``expected`` gives digests by algorithm (``sha256``, ``md5``, ``git-sha1``,
        ``tidegate-tree``); others are not checked. ``replace`` puts it in the place of a blob
        that is there, which otherwise stays and this one goes.

        Raises ``CacheError`` where pieces are missing; ``Damaged`` where a digest differs, and
        then nothing of it is kept.
        """
        count = count_pieces(self.size_bytes, self.piece_bytes)
        with self._lock:
            pieces = tuple(self._pieces[index] for index in range(count) if index in self._pieces)
        if len(pieces) != count:
            raise CacheError(f"{count - len(pieces)} of {count} pieces of {self.key} are missing")
        digests = PieceDigests(
            size_bytes=self.size_bytes, pieces=pieces, piece_bytes=self.piece_bytes
        )
        problem = compare_digests(self.fd, self.size_bytes, digests.digest, expected)
        if problem:
            self.discard()
            raise Damaged(problem)
        os.fsync(self.fd)
        self._publish(digests, expected.get("sha256"), replace=replace)
        return digests.digest

    def _publish(self, digests: PieceDigests, sha256: str | None, *, replace: bool) -> None:
        """Give the data its name. The order leaves after any crash either a partial or a blob."""
        layout, digest = self.layout, digests.digest
        blob = layout.blob(digest)
        with locked(layout.store_lock):
            # Another model's file may be the same blob; its digests go by its own bytes' time.
            stays = not replace and is_sound(layout, digest, self.size_bytes, self.piece_bytes)
            if not stays:
                write_pieces(layout, digests, os.fstat(self.fd).st_mtime_ns)
            note_known(layout, self.key, digest, sha256)
            if not stays:
                put(self._directory / DATA, blob)
                os.fchmod(self.fd, 0o400)  # after it: a partial has to stay writable
                sync_directory(blob.parent)
            self.close()
            remove_tree(self._directory)

    def discard(self) -> None:
        """Forget every piece and free the space; the next ``open`` begins anew."""
        with locked(self.layout.store_lock):
            self.close()
            remove_tree(self._directory)

    def close(self) -> None:
        """Let go of the file; what was committed stays for the next ``open``."""
        for fd in (self.fd, self._journal):
            if fd >= 0:
                os.close(fd)
        self.fd = self._journal = -1

    def _digest(self, index: int, most_bytes: int | None = None) -> Piece:
        start, end = self.span(index)
        end = end if most_bytes is None else start + most_bytes
        with mapped(self.fd, start, end) as buffer:
            return digest_piece(buffer)


def write_pieces(layout: Layout, digests: PieceDigests, mtime_ns: int) -> None:
    """Write a blob's ``.pieces`` file, with the modification time of its bytes: while the two
    agree the blob was not written to since it was hashed. Call it with the store locked."""
    path = layout.pieces(digests.digest)
    write_whole(path, digests.encode(), tmp=layout.tmp, mtime_ns=mtime_ns)


def is_sound(layout: Layout, digest: str, size_bytes: int, piece_bytes: int) -> bool:
    """Whether a blob is there and was not written to since it was hashed.

    A look at sizes and times, microseconds; whether the disk still gives the same bytes only
    ``check_blob`` can say.
    """
    try:
        blob = os.stat(layout.blob(digest))
        pieces = os.stat(layout.pieces(digest))
    except FileNotFoundError:
        return False
    return (
        blob.st_size == size_bytes
        and blob.st_mtime_ns == pieces.st_mtime_ns
        and pieces.st_size == count_pieces(size_bytes, piece_bytes) * PIECE_RECORD.size
    )


def note_known(layout: Layout, key: str, digest: str, sha256: str | None) -> None:
    """Record that a remote file is this blob. Call it with the store locked, before the blob gets
    its name: a record without a blob is harmless, an unrecorded blob is swept."""
    write_whole(layout.known(key), digest.encode(), tmp=layout.tmp)
    if sha256:
        write_whole(layout.known_sha256(sha256), digest.encode(), tmp=layout.tmp)


def decode_journal(
    journal: bytes, size_bytes: int, piece_bytes: int
) -> tuple[dict[int, Piece], dict[int, Piece]]:
    """The pieces that a journal of such a file claims, and the beginnings of others: their BLAKE3
    and how many bytes they are. What is torn, damaged or impossible in it claims nothing."""
    whole: dict[int, Piece] = {}
    begun: dict[int, Piece] = {}
    count = count_pieces(size_bytes, piece_bytes)
    end = len(journal) - (len(journal) - HEADER.size) % RECORD.size
    for at in range(HEADER.size, end, RECORD.size):
        index, blake, number, check = RECORD.unpack_from(journal, at)
        kind = begun if index & BEGINNING else whole
        index &= ~BEGINNING
        if zlib.crc32(journal[at : at + RECORD.size - 4]) != check or index >= count:
            continue
        start, stop = piece_span(index, size_bytes, piece_bytes)
        if kind is whole or 0 < number <= stop - start:
            kind[index] = (blake, number)
    return whole, {index: begun[index] for index in begun.keys() - whole.keys()}


def read_progress(directory: Path) -> int:
    """About how many bytes of a partial file are there, read from outside while it is fetched."""
    try:
        journal = (directory / JOURNAL).read_bytes()
    except OSError:
        return 0
    if len(journal) < HEADER.size:
        return 0
    magic, size_bytes, piece_bytes = HEADER.unpack_from(journal)
    if magic != MAGIC or piece_bytes == 0:
        return 0  # damaged: the next download begins again
    whole, begun = decode_journal(journal, size_bytes, piece_bytes)
    done = sum(number for _, number in begun.values())
    for index in whole:
        start, end = piece_span(index, size_bytes, piece_bytes)
        done += end - start
    return done


def is_open(directory: Path) -> bool:
    """Whether some process has this partial file open. Call it with the store locked."""
    return is_locked(directory / JOURNAL)


@contextmanager
def mapped(fd: int, start: int, end: int) -> Iterator[memoryview]:
    """Bytes ``[start, end)`` of a file without a copy. ``start`` is a multiple of the page size."""
    with (
        mmap.mmap(
            fd,
            end - start,
            flags=mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0),
            prot=mmap.PROT_READ,
            offset=start,
        ) as area,
        memoryview(area) as view,
    ):
        yield view


def compare_digests(fd: int, size_bytes: int, tree: str, expected: Mapping[str, str]) -> str | None:
    """What is wrong with a file by the digests that were published for it, if anything is."""
    if expected.get(TREE, tree) != tree:
        return f"its content is {tree} instead of {expected[TREE]}"
    for algorithm in ("sha256", "git-sha1", "md5"):
        wanted = expected.get(algorithm)
        if wanted is None:
            continue
        found = whole_digest(fd, size_bytes, algorithm)
        if found != wanted.lower():
            return f"its {algorithm} is {found}, its source says {wanted}"
        return None
    return None


def whole_digest(fd: int, size_bytes: int, algorithm: str) -> str:
    """A published kind of digest (``sha256``, ``md5``, ``git-sha1``) over a whole file."""
    digest: Any = hashlib.new("sha1" if algorithm == "git-sha1" else algorithm)
    if algorithm == "git-sha1":
        digest.update(b"blob %d\0" % size_bytes)
    for start in range(0, size_bytes, PIECE_BYTES):
        with mapped(fd, start, min(start + PIECE_BYTES, size_bytes)) as buffer:
            digest.update(buffer)
    return str(digest.hexdigest())
