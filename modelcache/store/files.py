"""Files written so that they are whole or not there, and blocks shared instead of copied."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

FICLONE = 0x40049409
COPY_BYTES = 64 * 1024 * 1024
CANNOT = frozenset(
    {errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EXDEV, errno.EPERM, errno.ENOTTY}
)
"""What a file system answers that cannot do what was asked at all."""


def write_whole(path: Path, data: bytes, *, tmp: Path, mtime_ns: int | None = None) -> None:
    """Write a small file by way of ``tmp`` (a directory on the same file system).

    After a crash at any moment ``path`` has its old content or all of the new. ``mtime_ns`` is
    the modification time to give it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp.mkdir(parents=True, exist_ok=True)
    fresh = tmp / f"{path.name}.{os.getpid()}"
    with open(fresh, "wb") as file:
        file.write(data)
        file.flush()
        if mtime_ns is not None:
            os.utime(file.fileno(), ns=(mtime_ns, mtime_ns))
        os.fsync(file.fileno())
    os.rename(fresh, path)
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable, where its file system can."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in CANNOT:
            raise
    finally:
        os.close(fd)


def directories(path: Path) -> list[Path]:
    """The directories in one, by name; none where it is not there, or not there any more."""
    try:
        return [child for child in sorted(path.iterdir()) if child.is_dir()]
    except FileNotFoundError:
        return []


def files(path: Path) -> list[Path]:
    """The files in a directory, by name; none where it is not there, or not there any more."""
    try:
        return [child for child in sorted(path.iterdir()) if child.is_file()]
    except (FileNotFoundError, NotADirectoryError):
        return []


def remove(path: Path) -> bool:
    """Remove a file; whether there was one."""
    try:
        path.unlink()
    except FileNotFoundError:
        return False
    return True


def remove_empty(*directories: Path) -> None:
    """Remove directories that are empty; leave the others."""
    for directory in directories:
        with suppress(OSError):
            directory.rmdir()


def remove_tree(path: Path) -> None:
    """Remove a directory and all below it, if it is there."""
    with suppress(FileNotFoundError):
        shutil.rmtree(path)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock at ``path``, waiting for it. It goes with the process that holds it."""
    with open_lock(path) as fd:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield


@contextmanager
def open_lock(path: Path) -> Iterator[int]:
    """The descriptor of a lock file, not locked yet; closing it unlocks it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        yield fd
    finally:
        os.close(fd)


def try_lock(fd: int) -> bool:
    """Lock without waiting; whether that worked."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def has_name(fd: int, path: Path) -> bool:
    """Whether an open lock file is still the one at ``path``: it may have been swept between being
    opened and being locked."""
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except FileNotFoundError:
        return False


def is_locked(path: Path) -> bool:
    """Whether some process holds the lock at ``path``."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        # A shared lock: two that look at once must not take each other for a holder.
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def allocate(fd: int, size_bytes: int) -> None:
    """Give a file its size and its blocks, so that writing it cannot run out of space.

    Where the file system cannot reserve blocks it only gets its size. Raises ``OSError`` with
    ``ENOSPC`` where the blocks are not there.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if size_bytes > 0 and hasattr(libc, "fallocate64"):
        call = libc.fallocate64
        call.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
        if call(fd, 0, 0, size_bytes) != 0:
            code = ctypes.get_errno()
            if code not in CANNOT:
                raise OSError(code, os.strerror(code))
    # Only now: a file that has its full size has its blocks too.
    os.ftruncate(fd, size_bytes)


def link_or_clone(source: Path, target: Path) -> bool:
    """Make ``target`` the same bytes as ``source`` without copying, by a clone of its blocks, else
    by a hard link; whether the file system could."""
    return clone(source, target) or link(source, target)


def link(source: Path, target: Path) -> bool:
    """Make ``target`` another name of ``source``; whether the file system could."""
    try:
        os.link(source, target, follow_symlinks=True)
    except OSError as error:
        if error.errno in CANNOT or error.errno == errno.EMLINK:
            return False
        raise
    return True


def clone(source: Path, target: Path) -> bool:
    """Make ``target`` a copy that shares the blocks of ``source``; whether the file system can."""
    with open(source, "rb") as from_file, open(target, "xb") as to_file:
        try:
            fcntl.ioctl(to_file.fileno(), FICLONE, from_file.fileno())
        except OSError as error:
            target.unlink()
            if error.errno in CANNOT:
                return False
            raise
    return True


def copy_range(source_fd: int, target_fd: int, start: int, end: int) -> None:
    """Copy bytes at the same offsets within the kernel. Raises ``EOFError`` where they end."""
    at = start
    while at < end:
        count = _copy_some(source_fd, target_fd, min(end - at, COPY_BYTES), at)
        if count == 0:
            raise EOFError(f"ends at byte {at} instead of {end}")
        at += count


def _copy_some(source_fd: int, target_fd: int, count: int, at: int) -> int:
    try:
        return os.copy_file_range(source_fd, target_fd, count, at, at)
    except OSError as error:
        if error.errno not in CANNOT:
            raise
    data = os.pread(source_fd, min(count, 1 << 20), at)
    return os.pwrite(target_fd, data, at)
