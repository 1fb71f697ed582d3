"""A model cache in memory, for tests of what is built on one. Its slowness is the test's to end."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gateway.admin.models import Models
from modelcache.types import (
    Cancelled,
    FileEntry,
    FileRange,
    InUse,
    Manifest,
    ModelEntry,
    NotFound,
    Priority,
    Progress,
    Residency,
    Tier,
)

REVISION = "0123456789abcdef0123456789abcdef01234567"
SIZE_BYTES = 3_000_000


@dataclass(frozen=True)
class FakeCached:
    url: str
    revision: str
    path: Path
    manifest: Manifest | None
    note: str = ""


@dataclass(frozen=True)
class FakeUsage:
    bytes_used: int
    bytes_blobs: int
    quota_bytes: int | None
    free_bytes: int
    bytes_prepared: int = 0
    bytes_partial: int = 0
    bytes_records: int = 0


@dataclass(frozen=True)
class FakeDamage:
    path: str
    piece: int
    problem: str = "its content is not what it was"


@dataclass
class FakeCache:
    """Models appear in it when they are preloaded, unless ``errors`` says otherwise."""

    dir: Path
    models: dict[str, FakeCached] = field(default_factory=dict)
    pinned: set[str] = field(default_factory=set)
    leased: set[str] = field(default_factory=set)
    damaged: set[str] = field(default_factory=set)
    errors: dict[str, Exception] = field(default_factory=dict)
    calls: list[tuple[Any, ...]] = field(default_factory=list)
    ranges: list[tuple[int, int | None]] = field(default_factory=list)
    """What the last prewarm was to read."""
    go: threading.Event = field(default_factory=threading.Event)
    begun: threading.Event = field(default_factory=threading.Event)
    left: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.go.set()

    def preload(
        self,
        url: str,
        *,
        revision: str | None = None,
        priority: Priority = Priority.PRELOAD,
        on_progress: Callable[[Progress], None] | None = None,
        cancelled: Callable[[], bool] | None = None,
        expected_use_at_s: float | None = None,
    ) -> FakeCached:
        self.calls.append(("preload", url, revision, priority, expected_use_at_s))
        if url in self.errors:
            raise self.errors[url]
        if on_progress is not None:
            on_progress(Progress(phase="fetching", bytes_done=1_000_000, bytes_total=SIZE_BYTES))
        self.begun.set()
        while not self.go.wait(0.01):
            if cancelled is not None and cancelled():
                self.left.set()
                raise Cancelled("called off")
        folder = self.dir / "views" / url.rpartition("/")[2]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "model.safetensors").write_bytes(bytes(1000))
        entry = FileEntry(path="model.safetensors", size_bytes=SIZE_BYTES, digest="d")
        manifest = Manifest(url=url, revision=REVISION, files=(entry,), created_at_s=0.0)
        cached = FakeCached(url=url, revision=REVISION, path=folder, manifest=manifest)
        self.models[url] = cached
        return cached

    def find(self, url: str, revision: str | None = None) -> FakeCached | None:
        return self.models.get(url)

    @property
    def lookup(self) -> FakeCache:
        return self

    def name(self, url: str, revision: str | None = None) -> tuple[str, str | None]:
        return url, self.models[url].revision if url in self.models else None

    def revisions(self, url: str) -> list[str]:
        return [one.revision for one in self.models.values() if one.url == url]

    def pin(self, url: str, revision: str | None = None) -> None:
        self.calls.append(("pin", url, revision))
        self._there(url)
        self.pinned.add(url)

    def unpin(self, url: str, revision: str | None = None) -> None:
        self.calls.append(("unpin", url, revision))
        self._there(url)
        self.pinned.discard(url)

    def evict(
        self, url: str, revision: str | None = None, force: bool = False, prepared: bool = False
    ) -> int:
        self.calls.append(("evict", url, revision, force, prepared))
        self._there(url)
        if url in self.leased or (url in self.pinned and not force):
            raise InUse(f"{url} is pinned")
        del self.models[url]
        return SIZE_BYTES

    def ls(self) -> Sequence[ModelEntry]:
        return [
            ModelEntry(
                url=one.url,
                revision=one.revision,
                tier=Tier.ON_DISK,
                size_bytes=SIZE_BYTES,
                bytes_unique=1_000_000,
                bytes_cached=750_000,
                complete=True,
                pinned=one.url in self.pinned,
                leases=("replica a-1",) if one.url in self.leased else (),
                used_at_s=1_799_999_940.0,
            )
            for one in self.models.values()
        ]

    def verify(
        self,
        url: str,
        revision: str | None = None,
        *,
        repair: bool = False,
        on_progress: Callable[[Progress], None] | None = None,
        cancelled: Callable[[], bool] | None = None,
    ) -> Sequence[FakeDamage]:
        self.calls.append(("verify", url, revision, repair))
        self._there(url)
        return [FakeDamage(path="model.safetensors", piece=2)] if url in self.damaged else []

    def usage(self) -> FakeUsage:
        used = SIZE_BYTES * len(self.models)
        return FakeUsage(bytes_used=used, bytes_blobs=used, quota_bytes=10**9, free_bytes=5 * 10**9)

    def _there(self, url: str) -> None:
        if url not in self.models:
            raise NotFound(f"{url} is not in the cache")


@dataclass(frozen=True)
class FakePages:
    """What a prewarm tells."""

    bytes_total: int
    bytes_read: int
    after: Residency


NO_PAGES = FakePages(bytes_total=0, bytes_read=0, after=Residency(bytes_total=0, bytes_cached=0))


def fake_models(cache: FakeCache, sites: dict[str, str] | None = None) -> Models:
    """The verbs over it, over any model. ``sites`` are names with what is wrong there, empty for
    nothing."""
    outcomes = sites or {}

    def prewarm(
        files: Sequence[FileRange],
        on_progress: Callable[[Progress], None],
        cancelled: Callable[[], bool],
    ) -> FakePages:
        cache.calls.append(("prewarm", [Path(file.path).name for file in files]))
        cache.ranges = [(file.start, file.end) for file in files]
        on_progress(Progress(phase="paging", bytes_done=500, bytes_total=1000))
        return FakePages(
            bytes_total=1000,
            bytes_read=1000,
            after=Residency(bytes_total=1000, bytes_cached=1000, how="cachestat"),
        )

    def replicate(
        url: str,
        revision: str | None,
        names: Sequence[str],
        on_progress: Callable[[Progress], None],
        cancelled: Callable[[], bool],
    ) -> dict[str, Any]:
        cache.calls.append(("replicate", url, revision, tuple(names)))
        return {
            name: {"site": name, "done": not outcomes[name], "error": outcomes[name] or None}
            for name in names
        }

    return Models(
        cache=cache,
        prewarm=prewarm,
        replicate=replicate,
        sites=tuple(outcomes),
        allowed=("hf://", "https://", "file://", "/"),
    )
