"""A store that is a folder, and a transfer that brings one piece after the other: both real."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from modelcache.cache import ModelCache
from modelcache.ports import ONCE, RangeRead, Retries
from modelcache.settings import ModelCacheSettings
from modelcache.store.partial_files import Partial
from modelcache.types import (
    Cancelled,
    Listing,
    ModelRef,
    NotFound,
    Priority,
    Progress,
    RemoteFile,
    SourceError,
)

PIECE = 4096
WRITE = 1024
"""What the source writes at a time: much less than a piece, so that a kill leaves parts of one."""


@dataclass
class FolderSource:
    """A model in ``root / <location>``; its revision is as long as a commit, of its files.

    Every range that is fetched is noted in ``log`` by the bytes that were written, with one
    append each, so that they are counted whichever process is killed.
    """

    ref: ModelRef
    root: Path
    log: Path | None = None
    digests: bool = True
    down: bool = False
    before: Callable[[RangeRead], None] = lambda want: None
    revisions: Iterator[str] | None = None

    @property
    def folder(self) -> Path:
        return self.root / self.ref.location

    def list(self, retries: Retries = ONCE) -> Listing:
        if self.down:
            raise SourceError("the line is dead", retryable=True)
        if not self.folder.is_dir():
            raise NotFound(f"{self.ref.url}: there is no such model")
        files = []
        for path in sorted(path for path in self.folder.rglob("*") if path.is_file()):
            data = path.read_bytes()
            sha256 = hashlib.sha256(data).hexdigest()
            files.append(
                RemoteFile(
                    path=path.relative_to(self.folder).as_posix(),
                    size_bytes=len(data),
                    version=sha256[:16],
                    digests={"sha256": sha256} if self.digests else {},
                )
            )
        listed = json.dumps([(file.path, file.version) for file in files])
        revision = hashlib.sha256(listed.encode()).hexdigest()[:40]
        if self.revisions is not None:
            revision = next(self.revisions)
        if self.ref.revision not in (None, "main", revision):
            raise NotFound(f"{self.ref.url}: there is no revision {self.ref.revision}")
        return Listing(revision=revision, files=tuple(files))

    def fetch(self, want: RangeRead) -> None:
        self.before(want)
        with open(self.folder / want.file.path, "rb") as source:
            for at in range(want.start, want.end, WRITE):
                if want.cancelled():
                    raise Cancelled("not wanted any more")
                data = os.pread(source.fileno(), min(WRITE, want.end - at), at)
                os.pwrite(want.fd, data, at)
                self._note(len(data))
                want.on_bytes(len(data))

    def _note(self, count: int) -> None:
        if self.log is not None:
            fd = os.open(self.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            os.write(fd, b"%d\n" % count)
            os.close(fd)

    def close(self) -> None:
        return None


class OneByOne:
    """Brings one piece after the other."""

    def run(
        self,
        source: FolderSource,
        files: Sequence[tuple[RemoteFile, Partial]],
        *,
        priority: Priority = Priority.PRELOAD,
        on_progress: Callable[[Progress], None] | None = None,
        cancelled: Callable[[], bool] | None = None,
    ) -> None:
        stopped = cancelled or (lambda: False)
        total = sum(partial.size_bytes for _, partial in files)
        done = sum(partial.bytes_done for _, partial in files)
        for file, partial in files:
            for index in partial.missing():
                start, end = partial.span(index)
                source.fetch(
                    RangeRead(file=file, start=start, end=end, fd=partial.fd, cancelled=stopped)
                )
                partial.commit(index)
                done += end - start
                if on_progress is not None:
                    on_progress(Progress(phase="fetching", bytes_done=done, bytes_total=total))


@dataclass
class Rig:
    """Caches over one store of folders, as many as there are nodes or processes."""

    root: Path
    free_bytes: int = 1 << 40
    down: bool = False
    shut: bool = False
    """Its source cannot even be opened."""
    digests: bool = True
    clock: Callable[[], float] = time.time
    before: Callable[[RangeRead], None] = lambda want: None
    """Called ahead of every range that is fetched; may raise."""
    revisions: Iterator[str] | None = None
    """What the revisions of models are, one after the other as they are listed."""
    sources: list[ModelRef] = field(default_factory=list)

    @property
    def models(self) -> Path:
        return self.root / "store"

    @property
    def log(self) -> Path:
        return self.root / "fetched"

    @property
    def fetched_bytes(self) -> int:
        """Every byte that any process has read from the store."""
        return sum(map(int, self.log.read_text().split())) if self.log.exists() else 0

    def source(self, ref: ModelRef) -> FolderSource:
        self.sources.append(ref)
        if self.shut:
            raise SourceError("the line is dead")
        return FolderSource(
            ref=ref, root=self.models, log=self.log, down=self.down, digests=self.digests,
            before=self.before, revisions=self.revisions,
        )  # fmt: skip

    def cache(self, name: str = "cache", **settings: object) -> ModelCache:
        given = {"hub_dirs": (self.root / "hub",), "reserve_bytes": 0, **settings}
        return ModelCache(
            ModelCacheSettings.model_validate(given),
            dir=self.root / name,
            open_source=self.source,  # type: ignore[arg-type]
            transfer=OneByOne(),  # type: ignore[arg-type]
            piece_bytes=PIECE,
            free_bytes=lambda _: self.free_bytes,
            clock=lambda: self.clock(),
            environ={},
        )

    def put(self, model: str, files: dict[str, bytes]) -> str:
        """Make the store's model consist of these files, and no others; its URL."""
        ref = ModelRef(url=f"s3://{model}", scheme="s3", location=model)
        folder = self.models / model
        for path in [*folder.rglob("*")] if folder.exists() else []:
            if path.is_file() and path.relative_to(folder).as_posix() not in files:
                path.unlink()
        for name, data in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)
        return ref.url


def make_room(cache: ModelCache, size_bytes: int) -> int:
    """Have the cache evict until so many bytes fit in; the bytes freed."""
    with cache.store.lock():
        return cache.store.capacity.make_room(size_bytes, size_bytes, what="a test")


def expect(cache: ModelCache, url: str, at_s: float | None) -> None:
    """Note when a model that is there will be used next."""
    found = cache.find(url)
    assert found is not None
    with cache.store.lock():
        cache.store.note_use(found.url, found.revision, expected_use_at_s=at_s)


def read_tree(directory: Path) -> dict[str, bytes]:
    """What a directory consists of."""
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


def bytes_of(size_bytes: int, seed: int = 0) -> bytes:
    """Bytes of which no two pieces are alike, the same ones for the same seed."""
    block = b"".join(b"%08d%08d" % (seed, at) for at in range(-(-size_bytes // 16)))
    return block[:size_bytes]


def count_bytes(directory: Path) -> int:
    """The bytes of all files below a directory, each once; counted without the cache's code."""
    seen: dict[tuple[int, int], int] = {}
    for folder, _, names in os.walk(directory):
        for name in names:
            info = os.lstat(os.path.join(folder, name))
            seen[info.st_dev, info.st_ino] = info.st_size
    return sum(seen.values())


def flip_bit(path: Path, bit: int) -> None:
    """Flip one bit as a disk would: nothing about the file says so."""
    info = path.stat()
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.seek(bit // 8)
        byte = file.read(1)[0] ^ (1 << bit % 8)
        file.seek(bit // 8)
        file.write(bytes([byte]))
    os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns))
    path.chmod(info.st_mode & 0o777)
