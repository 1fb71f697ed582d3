"""Sources in memory that count, limit and fail on demand, and nodes of a small cluster."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from modelcache.fetch.download import TransferTimeouts
from modelcache.fetch.transfer import Transfer
from modelcache.peers.group import LookUp, PeerGroup, look_up
from modelcache.peers.piece_inventory import PieceInventory
from modelcache.ports import ANNOUNCE_BYTES, ONCE, RangeRead, Retries
from modelcache.settings import ModelCacheSettings
from modelcache.store.layout import Layout, file_key
from modelcache.store.partial_files import Partial
from modelcache.types import PIECE_BYTES, Cancelled, Listing, ModelRef, RemoteFile, SourceError

PATIENT = TransferTimeouts(census_s=30.0, tick_s=0.02)
"""Whoever answers is waited for, however busy this machine is."""

TOKEN = "the secret of a small cluster"
URL = "http://store.example/model"
REVISION = "r1"


@functools.lru_cache(maxsize=4)
def make_content(size_bytes: int, seed: int = 1) -> bytes:
    """Bytes of which no two pieces are alike, the same ones for the same seed."""
    content = bytearray(_noise(seed)[: min(PIECE_BYTES, size_bytes)])
    content *= -(-size_bytes // PIECE_BYTES)
    for at in range(0, size_bytes, PIECE_BYTES):
        content[at : at + 8] = at.to_bytes(8, "little")
    return bytes(content[:size_bytes])


@functools.lru_cache(maxsize=8)
def _noise(seed: int) -> bytes:
    return random.Random(seed).randbytes(PIECE_BYTES)


@functools.lru_cache(maxsize=16)
def sha256_of(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


class SourceClock:
    """Time that passes only while all who read from a source wait for it to: however busy the
    machine is, what a test says takes one second takes one second. It goes on by ``STEP_S`` when
    the thread that made it, which watches the download, looks at it."""

    STEP_S = 1.0

    def __init__(self) -> None:
        self.now_s = 0.0
        self.reading = 0
        self.due: list[float] = []
        self.watcher = threading.current_thread()
        self.moved = threading.Condition()

    def __call__(self) -> float:
        with self.moved:
            idle = len(self.due) == self.reading and all(at_s > self.now_s for at_s in self.due)
            if idle and threading.current_thread() is self.watcher:
                self.now_s += self.STEP_S
                self.moved.notify_all()
            return self.now_s

    @contextlib.contextmanager
    def reads(self) -> Iterator[None]:
        with self.moved:
            self.reading += 1
        try:
            yield
        finally:
            with self.moved:
                self.reading -= 1

    def wait(self, seconds: float, cancelled: Callable[[], bool]) -> None:
        with self.moved:
            due_s = self.now_s + seconds
            self.due.append(due_s)
            while self.now_s < due_s and not cancelled():
                self.moved.wait(0.05)
            self.due.remove(due_s)


@dataclass
class MemorySource:
    """A store in memory. ``before`` is called ahead of every range, ``after`` when all of its bytes
    have come; both may raise."""

    files: dict[str, bytes]
    publishes: bool = True
    before: Callable[[str, int], None] = lambda path, index: None
    after: Callable[[str, int], None] = lambda path, index: None
    rate_bytes_s: float | None = None
    """Of each range."""
    clock: SourceClock = field(default_factory=SourceClock)
    chunk_s: Callable[[str, int, int, int], float] = lambda path, index, nth, chunk: 0.0
    """Seconds of ``clock`` that a chunk takes, infinity to hang: by piece, which reading of it this
    is (from 1), and the chunk's place in it."""
    reads: Counter[tuple[str, int]] = field(default_factory=Counter)
    at_once: int = 0
    most_at_once: int = 0
    ref: ModelRef = field(
        default_factory=lambda: ModelRef(url=URL, scheme="http", location="store.example/model")
    )
    lock: threading.Lock = field(default_factory=threading.Lock)

    def list(self, retries: Retries = ONCE) -> Listing:
        return Listing(revision=REVISION, files=tuple(self.remote(path) for path in self.files))

    def remote(self, path: str) -> RemoteFile:
        data = self.files[path]
        digests = {"sha256": sha256_of(data)} if self.publishes else {}
        return RemoteFile(path=path, size_bytes=len(data), version="v1", digests=digests)

    def fetch(self, want: RangeRead) -> None:
        index = want.start // PIECE_BYTES
        with self.lock:
            self.reads[want.file.path, index] += 1
            nth = self.reads[want.file.path, index]
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        with self.clock.reads():
            self.read(want, index, nth)

    def read(self, want: RangeRead, index: int, nth: int) -> None:
        path = want.file.path
        try:
            self.before(path, index)
            data = self.files[path]
            for at in range(want.start, want.end, ANNOUNCE_BYTES):
                if want.cancelled():
                    raise Cancelled("not wanted any more")
                chunk = data[at : min(at + ANNOUNCE_BYTES, want.end)]
                if self.rate_bytes_s is not None:
                    time.sleep(len(chunk) / self.rate_bytes_s)
                took_s = self.chunk_s(path, index, nth, (at - want.start) // ANNOUNCE_BYTES)
                if took_s:
                    self.clock.wait(took_s, want.cancelled)
                    if want.cancelled():
                        raise Cancelled("not wanted any more")
                os.pwrite(want.fd, chunk, at)
                want.on_bytes(len(chunk))
            self.after(path, index)
        finally:
            with self.lock:
                self.at_once -= 1

    def close(self) -> None:
        return None

    @property
    def read_bytes(self) -> int:
        """By whole pieces."""
        total = 0
        for (path, index), count in self.reads.items():
            size = len(self.files[path])
            total += count * (min((index + 1) * PIECE_BYTES, size) - index * PIECE_BYTES)
        return total


class FailingTimes:
    """Fails each piece so many times, in a way that may pass or not."""

    def __init__(self, times: int, *, retryable: bool = True) -> None:
        self.times = times
        self.retryable = retryable
        self.failed: Counter[tuple[str, int]] = Counter()

    def __call__(self, path: str, index: int) -> None:
        if self.failed[path, index] < self.times:
            self.failed[path, index] += 1
            raise SourceError("the line broke", retryable=self.retryable)


@dataclass
class Node:
    """A node with a directory of its own, in this process."""

    layout: Layout
    transfer: Transfer
    group: PeerGroup | None = None
    port: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def open(self, source: MemorySource) -> list[tuple[RemoteFile, Partial]]:
        files = source.list().files
        return [(f, Partial.open(self.layout, key_of(f), f.size_bytes)) for f in files]

    def fetch(self, source: MemorySource, **more: object) -> None:
        """Fetch and finish every file."""
        opened = self.open(source)
        try:
            self.transfer.run(source, opened, **more)  # type: ignore[arg-type]
            for file, partial in opened:
                partial.finish(file.digests)
        finally:
            for _, partial in opened:
                partial.close()

    def read(self, source: MemorySource, path: str) -> bytes:
        digest = self.layout.known(key_of(source.remote(path))).read_text()
        return self.layout.blob(digest).read_bytes()

    def close(self) -> None:
        if self.group is not None:
            self.group.close()


def key_of(file: RemoteFile) -> str:
    return file_key(URL, file, REVISION)


def make_node(
    root: Path, *, peers: tuple[str, ...] = (), serve: bool = True, token: str = TOKEN,
    names: tuple[str, ...] = (), look_up: LookUp = look_up,
    clock: Callable[[], float] = time.monotonic, timeouts: TransferTimeouts = PATIENT,
    **settings: object,
) -> Node:  # fmt: skip
    """A node whose peers are given now; :func:`introduce` gives them later."""
    chosen = ModelCacheSettings(peers=peers, **settings)  # type: ignore[arg-type]
    layout = Layout(root)
    # Names are looked up often.
    group = PeerGroup(
        peers, token, inventory=PieceInventory(layout), names=names, look_up=look_up,
        answer_s=30.0, look_s=0.1, soon_s=0.02,
    )  # fmt: skip
    port = group.serve("127.0.0.1", 0) if serve else 0
    transfer = Transfer(chosen, peers=group, clock=clock, timeouts=timeouts)
    return Node(layout, transfer, group, port)


def make_alone(
    root: Path, clock: Callable[[], float] = time.monotonic,
    timeouts: TransferTimeouts = PATIENT, **settings: object,
) -> Node:  # fmt: skip
    """A node without peers."""
    chosen = ModelCacheSettings(**settings)  # type: ignore[arg-type]
    return Node(Layout(root), Transfer(chosen, clock=clock, timeouts=timeouts))
