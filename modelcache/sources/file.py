"""Models in a directory that is mounted here, such as NFS: copied into the cache, by the kernel
alone, and without copying where the file system can share blocks."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from modelcache.ports import ANNOUNCE_BYTES, ONCE, RangeRead, Retries
from modelcache.sources import answers, wire
from modelcache.types import FULL, Cancelled, Listing, ModelRef, NotFound, RemoteFile, SourceError

_NOT_HERE = (errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM)
"""What ``copy_file_range`` says where two file systems cannot do it between them."""


class FileSource:
    """One model in a directory, or in one file."""

    def __init__(self, ref: ModelRef) -> None:
        self.ref = ref
        self._root = Path(ref.location)

    def list(self, retries: Retries = ONCE) -> Listing:
        """See ``Source.list``."""
        try:
            if self._root.is_file():
                name = self._root.name
                return answers.make_listing(self.ref, [_file_of(self._root, name)])
            files = [
                _file_of(path, path.relative_to(self._root).as_posix())
                for path in _walk(self._root)
            ]
        except FileNotFoundError:
            raise NotFound(f"{self.ref.url}: there is no such file or directory") from None
        except OSError as error:
            raise SourceError(f"{self.ref.url}: {error.strerror}: {error.filename}") from None
        return answers.make_listing(self.ref, files)

    def fetch(self, want: RangeRead) -> None:
        """See ``Source.fetch``."""
        file, what = want.file, f"{self.ref.url}: {want.file.path}"
        if wire.is_empty(replace(want, what=what)):
            return
        path = self._root if self._root.is_file() else self._root / file.path
        try:
            source = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise NotFound(f"{what}: there is no such file") from None
        except OSError as error:
            raise SourceError(f"{what}: {error.strerror}") from None
        try:
            _check_same(source, file, what)
            at = want.start
            while at < want.end:
                if want.cancelled():
                    raise Cancelled("not wanted any more")
                moved = _copy(source, want.fd, at, min(want.end - at, ANNOUNCE_BYTES), what)
                at += moved
                want.on_bytes(moved)
            _check_same(source, file, what)
        finally:
            os.close(source)

    def close(self) -> None:
        """Nothing is kept open."""


def _walk(root: Path) -> Iterator[Path]:
    """All regular files below a directory, links to files included, links to folders not."""
    for entry in os.scandir(root):
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(Path(entry.path))
        elif entry.is_file():
            yield Path(entry.path)


def _version_of(found: os.stat_result) -> str:
    return f"stat:{found.st_mtime_ns}-{found.st_ino}"


def _file_of(path: Path, name: str) -> RemoteFile:
    found = path.stat()
    return RemoteFile(path=name, size_bytes=found.st_size, version=_version_of(found))


def _check_same(source: int, file: RemoteFile, what: str) -> None:
    found = os.fstat(source)
    if not stat.S_ISREG(found.st_mode):
        raise SourceError(f"{what}: it is no file any more")
    if (found.st_size, _version_of(found)) != (file.size_bytes, file.version):
        raise SourceError(f"{what}: it has changed since it was listed")


def _copy(source: int, target: int, at: int, most: int, what: str) -> int:
    """Copy up to ``most`` bytes at the same offset; at least one."""
    try:
        moved = os.copy_file_range(source, target, most, at, at)
        if moved:
            return moved
    except OSError as error:
        if error.errno in FULL:
            with wire.writing():
                raise
        if error.errno not in _NOT_HERE:
            raise SourceError(f"{what}: {error.strerror}", retryable=True) from None
    try:
        data = os.pread(source, most, at)
    except OSError as error:
        raise SourceError(f"{what}: {error.strerror}", retryable=True) from None
    if not data:
        raise SourceError(f"{what}: it is shorter than it was when it was listed")
    wire.write_at(target, memoryview(data), at)
    return len(data)
