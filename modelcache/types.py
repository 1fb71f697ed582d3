"""The model cache's vocabulary: what a model is called, what it consists of, how warm it is.

Digests. A blob (the bytes of one file) is addressed by its *tree digest*: the BLAKE3 of the
BLAKE3s of its pieces, so that pieces can be checked in any order, by several threads, from several
places at once. Beside each piece's BLAKE3 stands its XXH3-64, which is fast enough to check while
weights are loaded. What a source itself publishes (a SHA-256, an MD5) is checked too.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum

PIECE_BYTES = 8 * 1024 * 1024
"""Bytes of a piece: the unit of checking, of resuming and of sharing between nodes. Part of what a
digest means, so not a setting."""

DIGEST = re.compile(r"[0-9a-f]{64}")
"""A BLAKE3 or a SHA-256 as it is written."""

MOST_SIZE_BYTES = 2**63 - 1
"""The largest size of a file: what any file system can say."""

FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
"""What a file system answers that has no room left."""

PREPARED = "prepared"
"""The scheme of models that were made here: ``prepared://<key>``. No source has them."""

BUNDLES = "tidegate-bundles"
"""The folder of a model in which its store may keep what engines have compiled for it. Such files
are code: they are fetched only where the settings give their SHA-256."""

SHORT_CHARACTERS = 12
"""So many letters of such a key are shown, and are enough to name it."""


class CacheError(Exception):
    """The cache could not do what it was asked; the message says why, for people."""


class SourceError(CacheError):
    """A source did not give what was asked. ``retryable``: asking again may help, not before
    ``retry_after_s`` where the source said so."""

    def __init__(
        self, message: str, *, retryable: bool = False, retry_after_s: float | None = None
    ) -> None:
        super().__init__(message)
        self.retryable = retryable
        self.retry_after_s = retry_after_s


class NotFound(SourceError):
    """There is no such model, revision or file."""


class Damaged(CacheError):
    """Bytes are not what they were, or not what their source says they are."""


class NoSpace(CacheError):
    """What is asked for does not fit, on the disk or in the quota. Said before a byte is read."""


class InUse(CacheError):
    """It is leased or pinned, so it cannot be evicted."""


class Cancelled(CacheError):
    """The caller has cancelled."""


class Tier(StrEnum):
    """How warm a model is on a node, from hot to cold."""

    RUNNING = "running"
    SLEEPING = "sleeping"
    """An engine's weights are in host memory."""
    FORKED = "forked"
    """An engine process stands by with everything imported, and nothing loaded."""
    PAGED = "paged"
    """The weights are in the page cache."""
    ON_DISK = "on_disk"
    REMOTE = "remote"


TIERS: tuple[Tier, ...] = tuple(Tier)
"""All tiers, hottest first."""


class Priority(IntEnum):
    """The order of service where bandwidth is short; lower goes first."""

    WAKE = 0
    """A client waits for an answer."""
    PRELOAD = 1
    """It will be wanted."""
    REPLICATE = 2
    """Another site may want it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRef:
    """Where a model comes from. ``url`` is canonical and carries no credentials.

    ``location`` is what follows the scheme: ``bucket/prefix``, ``org/name``, a path. ``revision``
    is what was asked for (a branch, tag, commit, version); ``None`` is the source's newest.
    """

    url: str
    scheme: str
    location: str
    revision: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteFile:
    """One file of a model as its source lists it.

    ``path`` is relative to the model, with ``/``. ``version`` changes when the content does (an
    ETag, a commit, a modification time); ``digests`` is what the source says of the content, by
    algorithm (``sha256``, ``md5``, ``crc64``, ``git-sha1``), lower-case hexadecimal.
    """

    path: str
    size_bytes: int
    version: str = ""
    digests: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """The files of one revision of a model. ``revision`` is exact: it names these bytes and no
    others, where what was asked for (a branch, nothing at all) may mean others tomorrow."""

    revision: str
    files: tuple[RemoteFile, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class FileEntry:
    """One file of a manifest. ``digest`` is the tree digest."""

    path: str
    size_bytes: int
    digest: str
    version: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """What a result of preparation steps was made of.

    ``model`` and ``revision`` are those of the model (a URL; or a path, and what it was then);
    ``steps`` the kinds of all steps from it to this result. ``before`` is the key of the result
    that the last of them began with, empty where it began with the model itself.
    """

    model: str
    revision: str
    steps: tuple[str, ...]
    before: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """Everything one revision of a model consists of. ``revision`` is exact (a commit, or a digest
    of the listing), where a ref's may be a name that moves. ``made`` is set where it was made
    here, by preparation steps."""

    url: str
    revision: str
    files: tuple[FileEntry, ...]
    created_at_s: float
    made: Made | None = None

    @property
    def size_bytes(self) -> int:
        """The sum of its files; what it takes on disk unless blobs are shared."""
        return sum(file.size_bytes for file in self.files)


PROGRESS_PHASES = ("listing", "fetching", "checking", "preparing", "paging")
"""What the cache does with a model before an engine starts, in order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far something is. ``bytes_total`` is ``None`` while it is unknown; ``rate_bytes_s`` is
    the mean over the last seconds."""

    phase: str
    """One of ``PROGRESS_PHASES``."""
    bytes_done: int = 0
    bytes_total: int | None = None
    rate_bytes_s: float | None = None
    detail: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class FileRange:
    """Bytes ``start`` to ``end`` (exclusive) of a file; ``end=None`` is its end."""

    path: str
    start: int = 0
    end: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Residency:
    """How much of some files is in the page cache. ``bytes_cached`` is ``None`` where neither
    ``cachestat`` nor ``mincore`` is to be had."""

    bytes_total: int
    bytes_cached: int | None
    how: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelEntry:
    """One model revision in the cache, as ``tidegate model ls`` shows it.

    ``bytes_unique`` is what evicting it would free: blobs that no other revision has.
    ``complete`` is false while it is being fetched or made, or where that stopped. ``made`` is set
    for a result of preparation steps.
    """

    url: str
    revision: str
    tier: Tier
    size_bytes: int
    bytes_unique: int
    bytes_cached: int | None
    complete: bool
    pinned: bool
    leases: tuple[str, ...] = ()
    used_at_s: float | None = None
    expected_use_at_s: float | None = None
    made: Made | None = None
