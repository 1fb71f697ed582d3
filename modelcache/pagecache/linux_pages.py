"""What Linux tells and does about the page cache, call by call.

Everything here works on an open file and never reads mapped memory from user space: a mapping is
made only to ask about it (``mincore``), to have the kernel fill it (``MADV_POPULATE_READ``) or to
lock it. So a file that is truncated meanwhile costs an error number, where touching its pages
would be a ``SIGBUS`` that ends the process.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import mmap
import os
import platform
import stat
from collections.abc import Iterator
from types import TracebackType

PAGE_BYTES = mmap.PAGESIZE
WINDOW_BYTES = 64 * 1024 * 1024
"""Bytes mapped at once; also what is done between two looks at whether to go on."""

_CACHESTAT = 451
_IOPRIO = {"x86_64": (251, 252), "aarch64": (30, 31)}
_IOPRIO_IDLE = 3 << 13
_IOPRIO_THREAD = 1
_POPULATE_READ = 22
_OVERLAY = 0x794C7630
_LOW_BIT = bytes(value & 1 for value in range(256))


class _Range(ctypes.Structure):
    _fields_ = (("off", ctypes.c_uint64), ("len", ctypes.c_uint64))


class _Counts(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_uint64)
        for name in ("cache", "dirty", "writeback", "evicted", "recently_evicted")
    )


def count_by_cachestat(fd: int, start: int, length: int) -> int | None:
    """Pages of ``length`` bytes from ``start`` that are cached, in microseconds for gigabytes.

    ``None`` where the call cannot tell: a kernel before 6.5, a sandbox that forbids it, another
    user's file, or an overlay file system, whose own cache is empty because the pages belong to
    the file below.
    """
    if length <= 0:
        return 0
    if file_system(fd) == _OVERLAY:
        return None
    counts = _Counts()
    result = _libc().syscall(
        ctypes.c_long(_CACHESTAT),
        ctypes.c_long(fd),
        ctypes.byref(_Range(start, length)),
        ctypes.byref(counts),
        ctypes.c_long(0),
    )
    return int(counts.cache) if result == 0 else None


def count_by_mincore(fd: int, start: int, length: int) -> int | None:
    """Pages of ``length`` bytes from ``start`` that are cached; some 30 ms per gigabyte.

    ``None`` where the answer would not be true: of a file that is neither ours nor writable to us
    the kernel calls every page resident.
    """
    if not _is_ours(fd):
        return None
    found = 0
    states = ctypes.create_string_buffer(WINDOW_BYTES // PAGE_BYTES + 1)
    for at, size in windows(start, start + length):
        try:
            with Mapping(fd, at, size) as mapping:
                if _libc().mincore(mapping.address, size, states) != 0:
                    return None
        except OSError:
            return None
        found += states.raw[: pages(size)].translate(_LOW_BIT).count(1)
    return found


COUNTERS = (count_by_cachestat, count_by_mincore)
"""Ways to count cached pages, quickest first."""


class Mapping:
    """A shared read-only mapping of ``length`` bytes of a file from ``start``, which must be at a
    page. It stays valid when the file is closed. Nothing ever reads through it."""

    def __init__(self, fd: int, start: int, length: int) -> None:
        address = _libc().mmap(None, length, mmap.PROT_READ, mmap.MAP_SHARED, fd, start)
        if address == ctypes.c_void_p(-1).value:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))
        self.address: int = address
        self.length = length

    def populate(self, start: int, length: int) -> bool:
        """Read what is missing of a part into the page cache and mark all of it as used, which
        keeps it from being reclaimed; 15 ms per gigabyte that is there.

        Raises ``OSError``: ``EFAULT`` where the file ends before the part or cannot be read.
        ``False`` if the kernel has no ``MADV_POPULATE_READ`` (before 5.14).
        """
        while _libc().madvise(self.address + start, length, _POPULATE_READ) != 0:
            code = ctypes.get_errno()
            if code == errno.EINVAL:
                return False
            if code not in (errno.EAGAIN, errno.EINTR):
                raise OSError(code, os.strerror(code))
        return True

    def lock(self, start: int, length: int) -> None:
        """Read a part and keep it in memory until the mapping ends. Raises ``OSError``: ``EPERM``
        or ``ENOMEM`` where it is not allowed so much."""
        if _libc().mlock(self.address + start, length) != 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))

    def close(self) -> None:
        """Undo it, and every lock in it. Idempotent."""
        if self.length:
            _libc().munmap(self.address, self.length)
            self.length = 0

    def __enter__(self) -> Mapping:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


@contextlib.contextmanager
def idle_io() -> Iterator[None]:
    """This thread's reads wait for those of others, where the disk's scheduler heeds that."""
    numbers = _IOPRIO.get(platform.machine())
    if numbers is None:
        yield
        return
    put, get = (ctypes.c_long(number) for number in numbers)
    who, self_id = ctypes.c_long(_IOPRIO_THREAD), ctypes.c_long(0)
    before = _libc().syscall(get, who, self_id)
    _libc().syscall(put, who, self_id, ctypes.c_long(_IOPRIO_IDLE))
    try:
        yield
    finally:
        if before >= 0:
            _libc().syscall(put, who, self_id, ctypes.c_long(before))


def file_system(fd: int) -> int | None:
    """The magic number of the file system a file is on; ``None`` if it cannot be told."""
    # struct statfs begins with its type, a long on every 64-bit machine but s390.
    space = ctypes.create_string_buffer(256)
    if _libc().fstatfs(fd, space) != 0:
        return None
    return ctypes.c_ulong.from_buffer(space).value & 0xFFFFFFFF


def windows(start: int, end: int) -> Iterator[tuple[int, int]]:
    """``(start, length)`` of mappings that together cover a range; each starts at a page."""
    at = start - start % PAGE_BYTES
    while at < end:
        size = min(WINDOW_BYTES, end - at)
        yield at, size
        at += size


def pages(length: int) -> int:
    """Pages that ``length`` bytes from the beginning of one take."""
    return -(-length // PAGE_BYTES)


def _is_ours(fd: int) -> bool:
    found = os.fstat(fd)
    uid = os.geteuid()
    if uid in (0, found.st_uid):
        return True
    if os.getegid() == found.st_gid or found.st_gid in os.getgroups():
        return bool(found.st_mode & stat.S_IWGRP)
    return bool(found.st_mode & stat.S_IWOTH)


@functools.cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    pointer, size, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    libc.syscall.restype = ctypes.c_long
    libc.mmap.restype = pointer
    libc.mmap.argtypes = (pointer, size, number, number, number, ctypes.c_long)
    libc.munmap.argtypes = (pointer, size)
    libc.madvise.argtypes = (pointer, size, number)
    libc.mlock.argtypes = (pointer, size)
    libc.mincore.argtypes = (pointer, size, ctypes.c_char_p)
    libc.fstatfs.argtypes = (number, ctypes.c_char_p)
    return libc
