"""What is written down about a revision: its manifest when whole, its listing until then.

Each record is sealed: JSON with the BLAKE3 of its body, so a flipped bit is noticed rather than
believed.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import blake3
import msgspec

from modelcache.refs import check_file_path
from modelcache.types import CacheError, Damaged, Made, Manifest, RemoteFile

FORMAT = 1
Body = TypeVar("Body")


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetching:
    """A revision that is being fetched, or whose fetching stopped."""

    url: str
    revision: str
    files: tuple[RemoteFile, ...]
    started_at_s: float

    @property
    def size_bytes(self) -> int:
        """The sum of its files."""
        return sum(file.size_bytes for file in self.files)


@dataclass(frozen=True, slots=True, kw_only=True)
class Use:
    """When a revision was used, and when it is expected to be. Advice only: losing it is no harm.

    ``reload_s_per_gb``: seconds that one GB of it took to fetch, or to make of its model, where
    that was measured. ``final``: a result of steps that was wanted for itself, not only as a step
    on the way to another.
    """

    used_at_s: float | None = None
    expected_use_at_s: float | None = None
    reload_s_per_gb: float | None = None
    final: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A preparation step that makes a result, or that was interrupted at it.

    ``promised_bytes`` is what the result will take at most, as far as that can be told; 0 where it
    cannot. ``resumes``: the next try can go on with what is there. ``whole``: the step has ended
    well after ``took_s`` seconds, and its result has only to be taken into the cache. ``made`` is
    ``None`` where nobody has written down what it was made of.
    """

    made: Made | None
    resumes: bool
    promised_bytes: int = 0
    whole: bool = False
    took_s: float = 0.0


class Sealed(msgspec.Struct, forbid_unknown_fields=True):
    """A record as it is written: its body, and the body's BLAKE3."""

    format: int
    blake3: str
    body: msgspec.Raw


def seal(body: Manifest | Fetching | Use | Job) -> bytes:
    """A record's bytes."""
    data = msgspec.json.encode(body)
    return msgspec.json.encode(
        Sealed(format=FORMAT, blake3=blake3.blake3(data).hexdigest(), body=msgspec.Raw(data))
    )


def unseal(data: bytes, kind: type[Body], *, name: str = "the record") -> Body:
    """What ``seal`` was given. Raises ``Damaged`` for anything that is not exactly that."""
    try:
        sealed = msgspec.json.decode(data, type=Sealed)
        body = bytes(sealed.body)
        if sealed.format != FORMAT:
            raise Damaged(f"{name} has format {sealed.format}, this is {FORMAT}")
        if blake3.blake3(body).hexdigest() != sealed.blake3:
            raise Damaged(f"{name} is not what was written")
        return msgspec.json.decode(body, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise Damaged(f"{name} cannot be read: {error}") from None


def read_record(path: Path, kind: type[Body]) -> Body | None:
    """The record at ``path``; ``None`` if there is none. Raises ``Damaged``."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise Damaged(f"{path.name} cannot be read: {error.strerror}") from error
    return unseal(data, kind, name=path.name)


def check_listing(files: tuple[RemoteFile, ...]) -> None:
    """Refuse a listing that cannot become a directory: no files, a path that leads elsewhere or
    comes twice, a file where another wants a directory. Raises ``CacheError``."""
    if not files:
        raise CacheError("the model has no files")
    paths = {file.path for file in files}
    if len(paths) != len(files):
        raise CacheError("its store lists a file twice")
    for file in files:
        if not check_file_path(file.path):
            raise CacheError(f"its store lists a file called {file.path!r}")
        if file.size_bytes < 0:
            raise CacheError(f"{file.path} has {file.size_bytes} bytes by its store's word")
        parts = file.path.split("/")
        for depth in range(1, len(parts)):
            if "/".join(parts[:depth]) in paths:
                raise CacheError(f"{'/'.join(parts[:depth])} is a file and a directory")
