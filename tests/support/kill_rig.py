"""Caches that are worked on by children which are killed, over a web server that counts."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import kill_child
from folder_store import count_bytes, read_tree
from kill_child import PIECE_BYTES, make_cache
from object_server import Handler, IndexedServer, serving

from modelcache.cache import ModelCache
from modelcache.ports import CachedModel
from modelcache.store.store import Damage
from modelcache.types import Manifest

SLICE_BYTES = 8_192
"""What the server sends at a time: less than a piece, so that a kill leaves parts of one."""

SLICE_PAUSE_S = 0.0005

HOLDER = "a living process"
REVISION = "0123456789abcdef"
"""Of models that were made here."""


class PromptHandler(Handler):
    """Sends a head at once; otherwise its body waits 40 ms until that has been acknowledged."""

    disable_nagle_algorithm = True


class CountingServer(IndexedServer):
    """Sends ranges slice by slice, and counts their bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.RequestHandlerClass = PromptHandler
        self.served_bytes = 0
        self.slow = False
        self.fault = self._send
        self._counting = threading.Condition()
        self._sending = 0

    def _send(self, handler: Handler, path: str, data: bytes) -> bool:
        if "Range" not in handler.headers:
            return False
        status, headers, body = handler.slice(path, data)
        handler.answer(status, {**headers, "Content-Length": str(len(body))}, b"")
        with self._counting:
            self._sending += 1
        try:
            self._send_slices(handler, body)
        finally:
            with self._counting:
                self._sending -= 1
                self._counting.notify_all()
        return True

    def _send_slices(self, handler: Handler, body: bytes) -> None:
        slice_bytes = SLICE_BYTES if self.slow else PIECE_BYTES
        for at in range(0, len(body), slice_bytes):
            part = body[at : at + slice_bytes]
            with self._counting:
                self.served_bytes += len(part)
            handler.wfile.write(part)
            if self.slow:
                time.sleep(SLICE_PAUSE_S)

    def count(self) -> int:
        """The bytes served so far, once those under way are."""
        with self._counting:
            assert self._counting.wait_for(lambda: not self._sending, timeout=kill_child.END_S)
            return self.served_bytes


class Forker:
    """The program ``kill_child``, running."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, kill_child.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, order: dict[str, Any]) -> dict[str, Any]:
        """What a child said at its end; nothing if it was killed before."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        assert "problem" not in answer, answer["problem"]
        return answer

    def close(self) -> None:
        """Wait for its end."""
        with self._process:
            assert self._process.stdin is not None
            self._process.stdin.close()
            try:
                self._process.wait(kill_child.END_S)
            except subprocess.TimeoutExpired:
                self._process.kill()


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """When a child is killed, as a part of what the whole takes: of its steps, or of its time.

    ``torn``: how much of a write is still done where the step is one.
    """

    fraction: float
    by_time: bool = False
    torn: float = 0.0


@dataclass(slots=True, kw_only=True)
class Work:
    """Something a child does, and what the whole of it takes."""

    start: str
    order: dict[str, Any]
    steps: int = 0
    seconds: float = 0.0


@dataclass(slots=True)
class Struck:
    """What a killed child has left: the cache, the leases on it here, and the bytes the store
    served until then."""

    cache: ModelCache
    leases: ExitStack
    served_bytes: int


@dataclass(slots=True)
class Yard:
    """Models in a store, caches that have some of them, and who is sent to work on those."""

    root: Path
    server: CountingServer
    forker: Forker
    models: dict[str, dict[str, bytes]] = field(default_factory=dict)
    """The files of each model by URL."""
    kills: int = 0
    """Children killed before they were done."""
    _made: int = 0

    def put(self, name: str, files: dict[str, bytes], *, checksums: bool = True) -> str:
        """A model of the store; its URL."""
        if checksums:
            sums = [f"{sha256(data).hexdigest()}  {path}\n" for path, data in files.items()]
            files = {**files, "SHA256SUMS": "".join(sums).encode()}
        self.server.objects |= {f"{name}/{path}": data for path, data in files.items()}
        url = f"{self.server.url}/{name}"
        self.models[url] = files
        return url

    def put_here(self, name: str, url: str, files: dict[str, bytes]) -> str:
        """A model in a directory of this disk; its URL."""
        for path, data in files.items():
            target = self.root / name / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data)
        self.models[url] = files
        return url

    def size_bytes(self, url: str) -> int:
        """The bytes of a model."""
        return sum(map(len, self.models[url].values()))

    def prepare(self, name: str, *urls: str) -> None:
        """A cache with these models, to begin with."""
        cache = make_cache(self.root / name)
        for url in urls:
            cache.preload(url)

    def keep(self, directory: Path, name: str) -> None:
        """Begin with a cache as it is now, later."""
        copy(directory, self.root / name)

    @contextmanager
    def copied(self, name: str) -> Iterator[Path]:
        """A cache like one that was prepared: the same links, times and rights."""
        self._made += 1
        directory = self.root / f"run-{self._made}"
        copy(self.root / name, directory)
        try:
            yield directory
        finally:
            shutil.rmtree(directory)

    def measure(self, work: Work) -> Work:
        """Find out what the whole of some work takes."""
        with self.copied(work.start) as directory:
            self.server.slow = True
            answer = self.forker.run({**work.order, "dir": str(directory)})
            self.server.slow = False
        work.steps, work.seconds = answer["steps"], answer["seconds"]
        return work

    @contextmanager
    def struck(self, work: Work, moment: Moment, *leased: str) -> Iterator[Struck]:
        """Some work that was begun and killed, in a cache of which ``leased`` are in use here.

        A moment at which it was done already is moved forward, so that every one is a kill.
        """
        while True:
            with self.copied(work.start) as directory, ExitStack() as leases:
                cache = make_cache(directory, work.order.get("quota_bytes"))
                for url in leased:
                    leases.enter_context(cache.lease(self.find(cache, url), HOLDER))
                before = self.server.count()
                if self.kill(work, moment, directory):
                    yield Struck(cache, leases, self.server.count() - before)
                    return
            moment = replace(moment, fraction=moment.fraction / 2)

    def kill(self, work: Work, moment: Moment, directory: Path) -> bool:
        """Do some work and be killed; whether that was before it was done."""
        order = {**work.order, "dir": str(directory)}
        if moment.by_time:
            order["seconds"] = moment.fraction * work.seconds
        else:
            order |= {"step": int(moment.fraction * work.steps), "part": moment.torn}
        self.server.slow = True
        done = self.forker.run(order)
        self.server.slow = False
        self.kills += not done
        return not done

    def manifest(self, cache: ModelCache, url: str) -> Manifest:
        """Of a model that has to be here."""
        found = self.find(cache, url).manifest
        assert found is not None
        return found

    def find(self, cache: ModelCache, url: str) -> CachedModel:
        """A model that has to be here."""
        found = cache.find(url)
        assert found is not None
        return found

    # What must be true

    def check_leased(self, cache: ModelCache, *urls: str) -> None:
        """What is leased here is here and right, and the killed process holds nothing."""
        holders = {entry.url: entry.leases for entry in cache.ls() if entry.leases}
        assert holders == dict.fromkeys(urls, (HOLDER,))
        for url in urls:
            assert read_tree(self.find(cache, url).path) == self.models[url]

    def check_whole(self, cache: ModelCache) -> None:
        """Whatever is said to be here is, and is right."""
        here = {entry.url for entry in cache.ls() if entry.complete}
        for url in self.models:
            found = cache.find(url)
            assert (found is not None) == (url in here)
            if found is not None:
                assert read_tree(found.path) == self.models[url]
                assert cache.verify(url) == []

    def check_accounts(self, cache: ModelCache) -> None:
        """Its bytes are counted right, and after a sweep nothing is left without an owner."""
        assert cache.usage().bytes_used == count_bytes(cache.dir)
        cache.sweep()
        usage = cache.usage()
        assert usage.bytes_used == count_bytes(cache.dir)
        assert usage.bytes_partial == 0
        assert not read_tree(cache.dir / "tmp")
        assert not read_tree(cache.dir / "partial")
        digests = {file.digest for manifest in manifests(cache) for file in manifest.files}
        blobs = {path.rpartition("/")[2] for path in read_tree(cache.dir / "blobs")}
        assert blobs == digests | {f"{digest}.pieces" for digest in digests}
        left = list((cache.dir / "models").glob("*/*/fetching.json"))
        assert not left, "nothing is being fetched"

    def check_empties(self, cache: ModelCache) -> None:
        """With everything evicted it takes what an empty cache takes."""
        for url in {entry.url for entry in cache.ls()}:
            cache.evict(url)
        assert cache.usage().bytes_used == count_bytes(cache.dir) == 0
        assert {path.partition("/")[0] for path in read_tree(cache.dir)} <= {"locks"}


def copy(source: Path, target: Path) -> None:
    """The same links, times and rights at another place."""
    subprocess.run(["cp", "-a", source, target], check=True)


def manifests(cache: ModelCache) -> list[Manifest]:
    """Of all models that are whole."""
    found = [cache.find(entry.url, entry.revision) for entry in cache.ls()]
    return [model.manifest for model in found if model is not None and model.manifest is not None]


def repaired(cache: ModelCache, url: str) -> list[Damage]:
    """What is still wrong with a model after it was repaired, or fetched again if it is not
    whole."""
    if cache.find(url) is None:
        cache.preload(url)
    cache.verify(url, repair=True)
    return cache.verify(url)


def make_bytes(size_bytes: int, seed: int) -> bytes:
    """Bytes that look like weights."""
    return random.Random(seed).randbytes(size_bytes)


@contextmanager
def kill_yard(root: Path) -> Iterator[Yard]:
    """A yard below ``root``."""
    forker = Forker()
    try:
        with serving(CountingServer()) as server:
            assert isinstance(server, CountingServer)
            yield Yard(root, server, forker)
    finally:
        forker.close()
