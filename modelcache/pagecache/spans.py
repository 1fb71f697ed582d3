"""Ranges of files as they are asked for, made into what there is to read."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from modelcache.types import CacheError, FileRange


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """Merged, sorted, non-empty ranges of one file that exist; ``bytes_missing`` lie past its
    end."""

    path: str
    ranges: tuple[tuple[int, int], ...]
    bytes_missing: int = 0

    @property
    def size_bytes(self) -> int:
        """Bytes in its ranges."""
        return sum(end - start for start, end in self.ranges)


class Opened:
    """A file open for reading. Raises ``CacheError`` where it cannot be."""

    def __init__(self, path: str) -> None:
        try:
            self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise CacheError(f"cannot look at {path}: {error.strerror}") from error

    def __enter__(self) -> Opened:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.fd)


def merge(files: Sequence[FileRange]) -> list[Span]:
    """One span per file, in the order of first mention. Raises ``CacheError`` for a file that is
    not there, ``ValueError`` for a range that begins before the file or after its own end."""
    wanted: dict[tuple[int, int], tuple[str, int, list[tuple[int, int]]]] = {}
    missing: dict[tuple[int, int], int] = {}
    for file in files:
        try:
            found = os.stat(file.path)
        except OSError as error:
            raise CacheError(f"cannot look at {file.path}: {error.strerror}") from error
        size = found.st_size
        end = size if file.end is None else file.end
        if file.start < 0 or end < min(file.start, size):
            raise ValueError(f"{file.path}: bytes {file.start} to {end} are not a range")
        key = (found.st_dev, found.st_ino)
        _, _, ranges = wanted.setdefault(key, (file.path, size, []))
        ranges.append((min(file.start, size), min(end, size)))
        beyond = max(0, end - max(size, file.start))
        missing[key] = max(missing.get(key, 0), beyond)
    return [
        Span(path=path, ranges=tuple(_merged(ranges)), bytes_missing=missing[key])
        for key, (path, _, ranges) in wanted.items()
    ]


def _merged(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    merged: list[tuple[int, int]] = []
    for start, end in sorted(ranges):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        elif end > start:
            merged.append((start, end))
    return [(start, end) for start, end in merged if end > start]
