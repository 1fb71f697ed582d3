"""Anything in any order: what the cache gives is right, what is used stays, each byte is counted.

The machine knows what the store has had, who holds what and which blobs it has damaged; all else
it reads from the disk with its own eyes.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

from folder_store import PIECE, Rig, bytes_of, count_bytes, flip_bit, make_room, read_tree
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from modelcache.ports import CachedModel
from modelcache.store.leases import Lease
from modelcache.types import CacheError, Cancelled, InUse, NoSpace, NotFound, Progress

NAMES = ("aaa", "bbb", "ccc")
# Few contents, so that models share blobs.
CONTENTS = [bytes_of(size, seed) for seed, size in enumerate((0, 5, PIECE, PIECE + 1, 3 * PIECE))]
PATHS = ("config.json", "model.safetensors", "sub/model.safetensors")
QUOTA = 9 * PIECE
SLACK = 16_384
"""Records are counted about, not exactly, when room is made for a model."""

names = st.sampled_from(NAMES)
trees = st.dictionaries(st.sampled_from(PATHS), st.sampled_from(CONTENTS), min_size=1)


class CacheMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp(prefix="tidegate-machine-"))
        self.rig = Rig(root=self.root, clock=self.tick)
        self.cache = self.rig.cache(quota_bytes=QUOTA)
        self.layout = self.cache.store.layout
        self.now_s = 1_000.0
        self.published: dict[tuple[str, str], dict[str, bytes]] = {}
        self.contents: dict[str, bytes] = {}  # by digest, of every blob ever seen
        self.pins: set[tuple[str, str]] = set()
        self.leased: list[tuple[CachedModel, Lease]] = []
        self.hurt: set[str] = set()  # digests whose blobs were damaged and not seen right since

    def tick(self) -> float:
        self.now_s += 1.0
        return self.now_s

    def teardown(self) -> None:
        shutil.rmtree(self.root)

    # What happens

    @initialize(some=st.tuples(trees, trees, trees), digests=st.booleans())
    def fill(self, some: tuple[dict[str, bytes], ...], digests: bool) -> None:
        self.rig.digests = digests
        for name, files in zip(NAMES, some, strict=True):
            self.publish(name, files)

    @rule(name=names, files=trees)
    def publish(self, name: str, files: dict[str, bytes]) -> None:
        url = self.rig.put(f"models/{name}", files)
        (source := self.rig.source(self.ref(url))).close()
        self.published[url, source.list().revision] = files

    @rule(name=names, at_s=st.none() | st.integers(0, 3_000), by_name=st.booleans())
    def preload(self, name: str, at_s: int | None, by_name: bool) -> None:
        fetched = self.rig.fetched_bytes
        try:
            model = self.cache.preload(
                self.url(name), expected_use_at_s=at_s, revision="main" if by_name else None
            )
        except NoSpace:
            assert self.rig.fetched_bytes == fetched
            return
        self.see(model)
        assert self.cache.usage().bytes_used <= QUOTA + SLACK
        assert model == self.cache.find(model.url, model.revision)

    @rule(name=names, calls=st.integers(1, 6))
    def stop(self, name: str, calls: int) -> None:
        told: list[Progress] = []
        with suppress(Cancelled, NoSpace):
            self.see(
                self.cache.preload(
                    self.url(name), on_progress=told.append, cancelled=lambda: len(told) > calls
                )
            )

    @rule(name=names, force=st.booleans())
    def evict(self, name: str, force: bool) -> None:
        url, before = self.url(name), count_bytes(self.cache.dir)
        kept = any(model.url == url for model, _ in self.leased)
        kept = kept or (not force and any(pin[0] == url for pin in self.pins))
        try:
            freed = self.cache.evict(url, force=force)
        except InUse:
            assert kept
        except NotFound:
            assert all(entry.url != url for entry in self.cache.ls())
        else:
            assert not kept
            assert freed == before - count_bytes(self.cache.dir)
        self.pins = {pin for pin in self.pins if self.is_recorded(*pin)} if force else self.pins

    @rule(name=names)
    def pin(self, name: str) -> None:
        model = self.cache.find(self.url(name))
        if model is not None:
            self.cache.pin(model.url, model.revision)
            self.pins.add((model.url, model.revision))

    @rule(name=names)
    def unpin(self, name: str) -> None:
        with suppress(NotFound):
            self.cache.unpin(self.url(name))
        self.pins = {pin for pin in self.pins if pin[0] != self.url(name)}

    @rule(name=names)
    def lease(self, name: str) -> None:
        model = self.cache.find(self.url(name))
        if model is not None:
            self.leased.append((model, self.cache.lease(model, f"engine {len(self.leased)}")))

    @precondition(lambda self: self.leased)
    @rule(chance=st.integers(0, 100))
    def release(self, chance: int) -> None:
        self.leased.pop(chance % len(self.leased))[1].release()

    @rule(size_bytes=st.integers(0, QUOTA + PIECE))
    def make_room(self, size_bytes: int) -> None:
        before = count_bytes(self.cache.dir)
        try:
            freed = make_room(self.cache, size_bytes)
        except NoSpace:
            return
        assert freed == before - count_bytes(self.cache.dir)
        assert count_bytes(self.cache.dir) + size_bytes <= QUOTA or size_bytes == 0

    @rule(name=names, chance=st.integers(0, 1 << 20), aloud=st.booleans())
    def damage(self, name: str, chance: int, aloud: bool) -> None:
        """A disk that flips a bit, or (aloud) somebody who writes, which the time tells."""
        model = self.cache.find(self.url(name))
        if model is None or model.manifest is None:
            return
        files = [file for file in model.manifest.files if file.size_bytes]
        if files:
            file = files[chance % len(files)]
            blob = self.layout.blob(file.digest)
            flip_bit(blob, chance % (file.size_bytes * 8))
            if aloud:
                os.utime(blob)
            self.hurt.add(file.digest)

    @rule(name=names)
    def verify(self, name: str) -> None:
        try:
            found = self.cache.verify(self.url(name))
        except NotFound:
            return
        model = self.cache.lookup.require(self.url(name), None)
        wrong = {file.digest for file in model.files if not self.is_right(file.digest)}
        assert {damage.digest for damage in found} == wrong

    @rule(name=names)
    def repair(self, name: str) -> None:
        with suppress(NotFound, NoSpace):
            model = self.cache.lookup.require(self.url(name), None)
            try:
                self.cache.verify(self.url(name), repair=True)
            except CacheError as error:
                if "cannot be mended" in str(error):
                    return
                raise
            assert self.cache.verify(model.url, model.revision) == []

    @rule()
    def sweep(self) -> None:
        before = {entry.url: entry.complete for entry in self.cache.ls()}
        self.cache.sweep()
        assert {entry.url: entry.complete for entry in self.cache.ls()} == before

    # What always holds

    @invariant()
    def every_byte_is_counted(self) -> None:
        assert self.cache.usage().bytes_used == count_bytes(self.cache.dir)

    @invariant()
    def what_is_found_is_right(self) -> None:
        self.hurt = {digest for digest in self.hurt if not self.is_right(digest, timely=True)}
        for url, revision in self.published:
            model = self.cache.find(url, revision)
            if model is None or model.manifest is None:
                continue
            wanted = self.published[url, revision]
            hurt = {file.path for file in model.manifest.files if file.digest in self.hurt}
            assert read_tree(model.path).keys() == wanted.keys()
            for path, data in read_tree(model.path).items():
                assert data == wanted[path] or path in hurt

    @invariant()
    def what_is_kept_is_there(self) -> None:
        kept = {(model.url, model.revision) for model, _ in self.leased} | self.pins
        for url, revision in kept:
            assert self.is_recorded(url, revision)
            manifest = self.cache.lookup.require(url, revision)
            if not {file.digest for file in manifest.files} & self.hurt:
                assert self.cache.find(url, revision) is not None
        holders = sorted(lease.holder for _, lease in self.leased)
        assert sorted(sum((entry.leases for entry in self.cache.ls()), ())) == holders

    # Its own eyes

    def url(self, name: str) -> str:
        return f"s3://models/{name}"

    def ref(self, url: str):  # type: ignore[no-untyped-def]
        return self.cache.lookup.ref(url, None)

    def see(self, model: CachedModel) -> None:
        assert model.manifest is not None
        files = self.published[model.url, model.revision]
        for file in model.manifest.files:
            assert self.contents.setdefault(file.digest, files[file.path]) == files[file.path]

    def is_recorded(self, url: str, revision: str) -> bool:
        return (self.layout.revision(url, revision) / "manifest.json").exists()

    def is_right(self, digest: str, *, timely: bool = False) -> bool:
        blob, pieces = self.layout.blob(digest), self.layout.pieces(digest)
        if not blob.exists() or blob.read_bytes() != self.contents[digest]:
            return False
        return not timely or blob.stat().st_mtime_ns == pieces.stat().st_mtime_ns


TestCacheMachine = CacheMachine.TestCase
TestCacheMachine.settings = settings(
    max_examples=15,
    stateful_step_count=25,
    deadline=None,
    # Others use the machine too.
    suppress_health_check=[HealthCheck.too_slow],
)
