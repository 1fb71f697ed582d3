"""Leases: a revision in use is not evicted. They die with the process that has them.

A lease is a file that its holder keeps locked (``flock``). Whether it counts is a question to the
kernel, not to what the file says, so a killed holder leaves nothing to clean up by hand and no
timeout is needed. A child that is forked without ``exec`` shares the lock.
"""

from __future__ import annotations

import fcntl
import os
import threading
import uuid
from collections.abc import Callable
from pathlib import Path

from modelcache.store.files import (
    create,
    files,
    is_locked,
    make_directory,
    remove,
    remove_empty,
)
from modelcache.store.layout import Layout

HOLDER_CHARACTERS = 200


class Lease:
    """A hold on one revision until ``release``, the end of the ``with`` block, or of the process.

    ``holder`` is the user's name, for people. Releasing twice is harmless.
    """

    def __init__(self, holder: str, release: Callable[[], None]) -> None:
        self.holder = holder
        self._release: Callable[[], None] | None = release
        self._lock = threading.Lock()

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def __repr__(self) -> str:
        return f"Lease({self.holder!r}, {'held' if self.held else 'released'})"

    @property
    def held(self) -> bool:
        """Whether it still holds."""
        return self._release is not None

    def release(self) -> None:
        """Let the revision go."""
        with self._lock:
            release, self._release = self._release, None
        if release is not None:
            release()


def take(layout: Layout, directory: Path, holder: str, released: Callable[[], None]) -> Lease:
    """A lease in ``directory`` (``Layout.leases``). Call it with the store locked.

    The file is locked before it gets its name there, so no process ever sees it free.
    """
    make_directory(layout.tmp)
    make_directory(directory)
    name = uuid.uuid4().hex
    fd = create(layout.tmp / name, os.O_EXCL)
    path = directory / name
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        os.write(fd, holder[:HOLDER_CHARACTERS].encode())
        os.rename(layout.tmp / name, path)
    except BaseException:
        remove(layout.tmp / name)
        os.close(fd)
        raise

    def release() -> None:
        remove(path)
        os.close(fd)
        released()

    return Lease(holder, release)


def holders(directory: Path) -> tuple[str, ...]:
    """The holders of leases in ``directory`` now."""
    found = [_holder(path) for path in files(directory)]
    return tuple(sorted(holder for holder in found if holder is not None))


def sweep(directory: Path) -> None:
    """Remove the leases of processes that are gone. Call it with the store locked."""
    for path in files(directory):
        if not is_locked(path):
            remove(path)
    remove_empty(directory, directory.parent)


def _holder(path: Path) -> str | None:
    """The holder of the lease at ``path``; ``None`` if it is not held any more."""
    try:
        return path.read_bytes().decode(errors="replace") if is_locked(path) else None
    except FileNotFoundError:
        return None  # released just now
