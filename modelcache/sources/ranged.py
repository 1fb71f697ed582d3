"""What the sources that are read by HTTP ranges share."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable

from modelcache.ports import Listing, OnBytes
from modelcache.sources.reader import Reader, Request
from modelcache.types import PIECE_BYTES, ModelRef, RemoteFile

PROBE_BYTES = 8


class RangedSource(ABC):
    """A source whose files are URLs. What differs is how they are listed and signed."""

    def __init__(self, ref: ModelRef, reader: Reader) -> None:
        self.ref = ref
        self.reader = reader

    @abstractmethod
    def list(self) -> Listing:
        """What the model consists of; see ``Source.list``."""

    @abstractmethod
    def request_of(self, file: RemoteFile) -> Request:
        """The URL of a file, good for a read that begins now."""

    def fetch(
        self,
        file: RemoteFile,
        start: int,
        end: int,
        fd: int,
        *,
        on_bytes: OnBytes,
        cancelled: Callable[[], bool],
    ) -> None:
        """Write a range into a file; see ``Source.fetch``."""
        request = self.request_of(file)
        self.reader.fetch(request, file, start, end, fd, on_bytes=on_bytes, cancelled=cancelled)

    def probed(self, listing: Listing) -> Listing:
        """The listing, once the store has shown that it serves ranges as asked.

        Eight bytes from the middle of the largest file: a store that cannot is told from one that
        can before gigabytes are under way. Files that are read whole need no ranges.
        """
        largest = max(listing.files, key=lambda file: file.size_bytes)
        if largest.size_bytes > PIECE_BYTES:
            middle = largest.size_bytes // 2
            fd = os.memfd_create("tidegate-probe")
            try:
                self.fetch(largest, middle, middle + PROBE_BYTES, fd,
                           on_bytes=lambda n: None, cancelled=lambda: False)  # fmt: skip
            finally:
                os.close(fd)
        return listing

    def close(self) -> None:
        """Close its connections. May be called twice."""
        self.reader.close()
