"""Files written so that they are whole or not there, and blocks shared instead of copied.

Directories and files are made for our user alone, whatever the umask: what is copied here may have
been its owner's alone, and anyone who can open a lock file for reading can lock it.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import logging
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from modelcache.types import CacheError

LOG = logging.getLogger("tidegate.modelcache")

FICLONE = 0x40049409
COPY_BYTES = 64 * 1024 * 1024
CANNOT = frozenset(
    {errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EXDEV, errno.EPERM, errno.ENOTTY}
)
"""What a file system answers that cannot do what was asked at all."""


def make_directory(path: Path) -> None:
    """Make a directory that only our user can enter, and its parents so; one that is there stays as
    it is."""
    try:
        path.mkdir(mode=0o700, exist_ok=True)
    except FileNotFoundError:
        make_directory(path.parent)
        path.mkdir(mode=0o700, exist_ok=True)


def make_private(path: Path) -> bool:
    """Make a directory that only our user can enter, or narrow one that others can; whether that
    was needed.

    Raises ``CacheError`` where it is another user's, or cannot be narrowed; ``OSError``.
    """
    make_directory(path)
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        seen = os.fstat(fd)
        owners = {seen.st_uid} | ({os.lstat(path).st_uid} - {0})  # the link's, where it is one
        if owners != {os.geteuid()}:
            raise CacheError(
                f"{path} belongs to user {seen.st_uid}, and this is user {os.geteuid()}: give it "
                "to this user, or name a directory in it that can be made"
            )
        mode = stat.S_IMODE(seen.st_mode)
        if not mode & 0o077:
            return False
        os.fchmod(fd, 0o700)
        if os.fstat(fd).st_mode & 0o077:
            raise CacheError(f"{path} is open to other users, and its file system keeps it so")
    except PermissionError as error:
        raise CacheError(f"{path} is open to other users: {error.strerror}") from error
    finally:
        os.close(fd)
    LOG.warning("%s was open to other users (mode %o): it is this user's alone now", path, mode)
    return True


def create(path: Path, flags: int = 0) -> int:
    """A descriptor of a file for reading and writing, made for our user alone where it is not
    there."""
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | flags, 0o600)


def write_whole(path: Path, data: bytes, *, tmp: Path, mtime_ns: int | None = None) -> None:
    """Write a small file by way of ``tmp`` (a directory on the same file system).

    After a crash at any moment ``path`` has its old content or all of the new; what could not be
    written (a full disk) leaves nothing behind. ``mtime_ns`` is the modification time to give it.
    """
    make_directory(path.parent)
    make_directory(tmp)
    fresh = tmp / f"{path.name}.{os.getpid()}"
    try:
        with open(create(fresh, os.O_TRUNC), "wb") as file:
            file.write(data)
            file.flush()
            if mtime_ns is not None:
                os.utime(file.fileno(), ns=(mtime_ns, mtime_ns))
            os.fsync(file.fileno())
        put(fresh, path)
    except OSError:
        with suppress(OSError):
            fresh.unlink()
        raise
    sync_directory(path.parent)


def put(fresh: Path, path: Path) -> None:
    """Give a file its name, in place of whatever has it."""
    try:
        os.rename(fresh, path)
    except IsADirectoryError:
        remove_tree(path)
        os.rename(fresh, path)


def write_changed(path: Path, data: bytes, *, tmp: Path) -> None:
    """``write_whole`` where the file has another content, or is not there."""
    try:
        if path.read_bytes() == data:
            return
    except OSError:
        pass
    write_whole(path, data, tmp=tmp)


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
    """Remove a file, or the directory that is in its place; whether there was one."""
    try:
        path.unlink()
    except FileNotFoundError:
        return False
    except IsADirectoryError:
        remove_tree(path)
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
    make_directory(path.parent)
    fd = create(path)
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
    by a hard link; whether the file system could. Another user's file gets no link: its owner could
    write to it at any time."""
    ours = os.stat(source).st_uid == os.geteuid()
    return clone(source, target) or (ours and link(source, target))


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
    with open(source, "rb") as from_file, open(create(target, os.O_EXCL), "wb") as to_file:
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
