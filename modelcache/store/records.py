"""What is written down about a revision: its manifest when whole, its listing until then.

Each record is sealed: JSON with the BLAKE3 of its body, so a flipped bit is noticed rather than
believed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import blake3
import msgspec

from modelcache.refs import find_path_problem
from modelcache.store import leases
from modelcache.store.files import directories, is_locked
from modelcache.store.layout import REFS, Layout, file_key, result_key, result_url
from modelcache.types import (
    DIGEST,
    MOST_SIZE_BYTES,
    SHORT_CHARACTERS,
    CacheError,
    Damaged,
    FileEntry,
    Made,
    Manifest,
    RemoteFile,
)

FORMAT = 1
Body = TypeVar("Body")


MANIFEST = "manifest.json"
SPARE = "manifest.copy.json"
FETCHING = "fetching.json"
PIN = "pin"
USE = "use.json"


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
class StepRecord:
    """A preparation step whose result is unfinished, as it is written beside the result.

    ``promised_bytes`` is the most that the result will take, as far as that can be told; 0 where it
    cannot. ``resumes``: the next run of the step can go on with what an interrupted one wrote.
    ``finished``: the step has ended well, in ``took_s`` seconds, and the cache has only to take the
    result over. ``made`` is ``None`` where it is not recorded what the result is made of.
    """

    made: Made | None
    resumes: bool
    promised_bytes: int = 0
    finished: bool = False
    took_s: float = 0.0


class Sealed(msgspec.Struct, forbid_unknown_fields=True):
    """A record as it is written: its body, and the body's BLAKE3."""

    format: int
    blake3: str
    body: msgspec.Raw


def seal(body: Manifest | Fetching | Use | StepRecord) -> bytes:
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
    except (msgspec.DecodeError, ValueError, RecursionError, OverflowError) as error:
        raise Damaged(f"{name} cannot be read: {error}") from None


def read_record(path: Path, kind: type[Body]) -> Body | None:
    """The record at ``path``; ``None`` if there is none. Raises ``Damaged``."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise Damaged(f"{path.name} cannot be read: {error.strerror}") from error
    body = unseal(data, kind, name=path.name)
    problem = _find_problem(body)
    if problem is not None:
        raise Damaged(f"{path.name} {problem}")
    return body


def _find_problem(body: object) -> str | None:
    """What no record of ours says, for what is said here becomes names of files."""
    if not isinstance(body, Manifest | Fetching):
        return None
    problem = find_path_problem([file.path for file in body.files])
    if problem is None and not all(0 <= f.size_bytes <= MOST_SIZE_BYTES for f in body.files):
        problem = "lists a file of a size that there is not"
    digests = [file.digest for file in body.files if isinstance(file, FileEntry)]
    if problem is None and not all(map(DIGEST.fullmatch, digests)):
        problem = "lists a file without a digest"
    return problem


def check_listing(files: tuple[RemoteFile, ...]) -> None:
    """Refuse a listing that cannot become a directory. Raises ``CacheError``."""
    if not files:
        raise CacheError("the model has no files")
    problem = find_path_problem([file.path for file in files])
    if problem is not None:
        raise CacheError(f"its source {problem}")
    for file in files:
        if file.size_bytes < 0:
            raise CacheError(f"its source says that {file.path} has {file.size_bytes} bytes")


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One revision. It has a manifest when it is whole, ``fetching`` until then.

    ``busy``: a process is fetching a revision of this model just now. ``blobs`` are the sizes of
    the blobs that are its own or shared, ``partials`` those of its unfinished files.
    """

    url: str
    revision: str
    manifest: Manifest | None
    fetching: Fetching | None
    pinned: bool = False
    holders: tuple[str, ...] = ()
    busy: bool = False
    use: Use = field(default_factory=Use)
    blobs: dict[str, int] = field(default_factory=dict)
    partials: dict[str, int] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """A name for it, for people and for the eviction policy."""
        return f"{self.url}@{self.revision}"

    @property
    def made(self) -> Made | None:
        """What it was made of; ``None`` for a model that was fetched."""
        return None if self.manifest is None else self.manifest.made

    @property
    def result_key(self) -> str | None:
        """The key of the preparation step whose result it is; ``None`` if it is none."""
        return result_key(self.url)

    @property
    def name(self) -> str:
        """How messages name it."""
        key = self.result_key
        return self.key if key is None else name_result(key, self.made)

    @property
    def size_bytes(self) -> int:
        """What it takes when whole."""
        found = self.manifest or self.fetching
        return found.size_bytes if found else 0

    @property
    def kept_because(self) -> str:
        """Why it must not be evicted; empty if it may."""
        if self.holders:
            return f"leased by {', '.join(self.holders)}"
        if self.busy and self.fetching is not None:
            return "being fetched"
        return "pinned" if self.pinned else ""


def name_result(key: str, made: Made | None) -> str:
    """How messages name a result of preparation steps."""
    short = result_url(key[:SHORT_CHARACTERS])
    return short if made is None else f"{' + '.join(made.steps)} of {made.model} ({short})"


def read_manifest(layout: Layout, url: str, revision: str) -> Manifest | None:
    """The manifest of a whole revision; ``None`` where it is not there or not whole. Raises
    ``Damaged`` where both copies are."""
    return _read_either(layout.revision(url, revision))


def _read_either(directory: Path) -> Manifest | None:
    """A manifest, from its spare copy where the first is damaged."""
    try:
        return read_record(directory / MANIFEST, Manifest)
    except Damaged as damage:
        found = read_record(directory / SPARE, Manifest)
        if found is None:
            raise damage from None
        return found


def read_use(directory: Path) -> Use:
    """When a revision was used; nothing known where the record is missing or damaged."""
    try:
        return read_record(directory / USE, Use) or Use()
    except Damaged:
        return Use()


def read_known(path: Path) -> str | None:
    """The digest that a record below ``known/`` names, ``None`` if there is none."""
    try:
        text = path.read_bytes().decode("ascii")
    except (OSError, UnicodeDecodeError):
        return None
    return text if DIGEST.fullmatch(text) else None


def known_blobs(layout: Layout, key: str, file: RemoteFile) -> list[str]:
    """The blobs that a remote file is known to be, there or not, sound or not."""
    paths = [layout.known(key)]
    if "sha256" in file.digests:
        paths.append(layout.known_sha256(file.digests["sha256"]))
    return [digest for path in paths if (digest := read_known(path)) is not None]


def read_all(layout: Layout) -> list[Record]:
    """Every revision that is there, whole or not."""
    return [record for _, record in scan(layout) if record is not None]


def scan(layout: Layout) -> Iterator[tuple[Path, Record | None]]:
    """Every revision's directory, with what it says; ``None`` where nothing of it can be read."""
    for model in directories(layout.root / "models"):
        for directory in directories(model):
            if directory.name != REFS:
                yield directory, read_directory(layout, directory)


def read_directory(layout: Layout, directory: Path) -> Record | None:
    """The revision recorded in ``directory``, ``None`` if no record of it can be read."""
    manifest = fetching = None
    with suppress(Damaged):
        manifest = _read_either(directory)
    with suppress(Damaged):
        fetching = read_record(directory / FETCHING, Fetching)
    if manifest is not None:
        url, revision = manifest.url, manifest.revision
    elif fetching is not None:
        url, revision = fetching.url, fetching.revision
    else:
        return None
    blobs: dict[str, int] = {}
    partials: dict[str, int] = {}
    if manifest is not None:
        blobs = {file.digest: file.size_bytes for file in manifest.files}
    for file in fetching.files if fetching is not None else ():
        key = file_key(url, file, revision)
        known = [
            digest for digest in known_blobs(layout, key, file) if layout.blob(digest).exists()
        ]
        if known:
            blobs[known[0]] = file.size_bytes
        if layout.partial(key).is_dir():
            partials[key] = file.size_bytes
    return Record(
        url=url,
        revision=revision,
        manifest=manifest,
        fetching=fetching,
        pinned=(directory / PIN).exists(),
        holders=leases.holders(layout.leases(url, revision)),
        busy=is_locked(layout.fetch_lock(url)),
        use=read_use(directory),
        blobs=blobs,
        partials=partials,
    )
