"""Finding what is asked for among what is on this disk. Asks no source, and changes nothing."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from modelcache.ports import CachedModel
from modelcache.refs import PATH, parse_ref
from modelcache.store.files import directories, is_locked
from modelcache.store.layout import RESULT, file_key, result_key, result_url
from modelcache.store.partial_files import read_progress
from modelcache.store.records import Fetching, Record, read_all, read_manifest
from modelcache.store.store import Store
from modelcache.store.unfinished_results import UnfinishedResult, read_unfinished_results
from modelcache.types import (
    PREPARED,
    CacheError,
    Damaged,
    FileRange,
    Made,
    Manifest,
    ModelEntry,
    ModelRef,
    NotFound,
    Progress,
    Tier,
)

LOG = logging.getLogger("tidegate.modelcache")

KEY_CHARACTERS = 64
"""Letters of a result's whole key."""
FEWEST_CHARACTERS = 6
"""From so many letters on, the beginning of a revision names it, where no other begins so."""
MOST_NAMED = 8
"""Revisions that an error names."""


PAGED_FRACTION = 0.95
"""From this part of its bytes on, a model counts as being in the page cache."""


class Ambiguous(NotFound, ValueError):
    """What was given for a revision may be one of several."""


class Lookup:
    """Looks models up in one store, by what people call them."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def ref(self, url: str, revision: str | None) -> ModelRef:
        """What people mean by ``url``: a directory before a hub's model of the same name."""
        if url and "://" not in url and revision is None and Path(url).expanduser().is_dir():
            return ModelRef(url=url, scheme=PATH, location=url)
        if url.startswith(f"{PREPARED}://"):
            url = self._whole_name(url)
            return ModelRef(url=url, scheme=PREPARED, location=url, revision=revision)
        return parse_ref(url, revision)

    def in_place(self, ref: ModelRef) -> CachedModel | None:
        """A plain path is used where it lies. Raises ``NotFound`` where there is nothing."""
        if ref.scheme != PATH:
            return None
        path = Path(ref.location).expanduser().absolute()
        if not path.is_dir():
            raise NotFound(f"{path} is not a directory")
        return CachedModel.in_place(path)

    def resolve(self, ref: ModelRef) -> Manifest | None:
        """The manifest of what was asked for, by what is known on this disk: an exact revision, a
        name that was looked up, or the beginning of a revision. Raises ``Ambiguous``."""
        if ref.revision is not None:
            exact = self.read(ref.url, ref.revision)
            if exact is not None:
                return exact
        try:
            revision = self.store.layout.ref(ref.url, ref.revision).read_text()
            found = self.read(ref.url, revision)
        except (OSError, UnicodeDecodeError):
            found = None
        if found is None and ref.revision is not None:
            begun = self._whole_revision(ref.url, ref.revision)
            found = None if begun is None else self.read(ref.url, begun)
        if found is None and ref.revision is None:
            records = [record.manifest for record in self._all(ref.url)]
            whole = [manifest for manifest in records if manifest is not None]
            found = max(whole, key=lambda manifest: manifest.created_at_s, default=None)
        return found

    def read(self, url: str, revision: str) -> Manifest | None:
        """The manifest of an exact revision; ``None`` if it is not here, or is damaged."""
        try:
            return read_manifest(self.store.layout, url, revision)
        except Damaged as damage:
            LOG.warning("%s: %s", url, damage)
            return None

    def open(self, manifest: Manifest | None) -> CachedModel | None:
        """The directory of a revision; ``None`` where not all of it is here and sound."""
        if manifest is None or not self.store.is_whole(manifest):
            return None
        try:
            path = self.store.open_snapshot(manifest)
        except FileNotFoundError:
            return None  # evicted just now
        return CachedModel(
            url=manifest.url, revision=manifest.revision, path=path, manifest=manifest
        )

    def made(self, ref: ModelRef) -> CachedModel:
        """A result of preparation steps, which no source has. Raises ``NotFound``."""
        found = self.open(self.resolve(ref))
        if found is None:
            raise NotFound(f"{ref.url} is not on this disk: it is made by preloading its model")
        return found

    def require(self, url: str, revision: str | None) -> Manifest:
        """The manifest of a model that has to be here. Raises ``NotFound``."""
        ref = self.ref(url, revision)
        if ref.scheme == PATH:
            raise NotFound(f"{url} is used where it lies; the cache has nothing of it")
        manifest = self.resolve(ref)
        if manifest is None:
            raise self._missing(ref.url, ref.revision)
        return manifest

    def name(self, url: str, revision: str | None) -> tuple[str, str | None]:
        """The canonical URL and the exact revision that are meant, by what is on this disk; no
        revision where it is not known which: nothing is here, or nothing whole. Raises
        ``Ambiguous``."""
        ref = self.ref(url, revision)
        if ref.scheme == PATH:
            return url, None
        manifest = self.resolve(ref)
        if manifest is not None:
            return ref.url, manifest.revision
        return ref.url, ref.revision and self._whole_revision(ref.url, ref.revision)

    def revisions(self, url: str) -> list[str]:
        """The revisions of a model that are here, whole or not, the newest last."""
        ref = self.ref(url, None)
        return [record.revision for record in sorted(self._all(ref.url), key=_begun_at_s)]

    def to_pin(self, url: str, revision: str | None) -> list[Record]:
        """One revision of a model, the newest unless it is named, with the results of its last
        steps: what is used of it. Raises ``NotFound``."""
        if self.ref(url, revision).scheme == PATH:
            named, records = "", self.records(url, revision)[0]
        else:
            manifest = self.require(url, revision)
            named, records = manifest.url, self.records(manifest.url, manifest.revision)[0]
        used = [one for one in records if one.use.final or one.url == named]
        if not used:
            raise NotFound(f"{url} is not on this disk")
        return used

    def _all(self, url: str) -> list[Record]:
        return [record for record in read_all(self.store.layout) if record.url == url]

    def _whole_revision(self, url: str, given: str) -> str | None:
        """The revision on this disk that begins so, also one of which only results are left."""
        found = set()
        for record in read_all(self.store.layout):
            found |= {record.revision} if record.url == url else set()
            made = record.made
            found |= {made.revision} if made is not None and made.model == url else set()
        if given in found:
            return given
        fits = sorted(one for one in found if one.startswith(given))
        if len(given) < FEWEST_CHARACTERS or not fits:
            return None
        if len(fits) > 1:
            raise Ambiguous(f"revision {given!r} of {url} may be any of {_some(fits)}")
        return fits[0]

    def _missing(self, url: str, revision: str | None) -> NotFound:
        here = sorted(record.revision for record in self._all(url) if record.manifest is not None)
        if revision is None or not here:
            return NotFound(f"{url} is not on this disk")
        return NotFound(f"{url} has no revision {revision} here (it has: {_some(here)})")

    def _whole_name(self, url: str) -> str:
        """The name of a result of which the beginning of the key was given."""
        layout, given = self.store.layout, result_key(url) or ""
        if len(given) == KEY_CHARACTERS:
            return url
        names = {path.name for path in directories(layout.root / PREPARED / "work")}
        names |= {
            result_key(record.url) or ""
            for record in read_all(layout)
            if record.result_key is not None
        }
        fits = [name for name in names if given and name.startswith(given)]
        return result_url(fits[0]) if len(fits) == 1 else url

    def records(
        self, url: str, revision: str | None, *, prepared: bool = False
    ) -> tuple[list[Record], list[UnfinishedResult]]:
        """A model's revisions, or the one that is named, with what was made of them; and what is
        being made, or was left half made. ``prepared``: without the model itself.

        Raises ``NotFound`` if there is nothing.
        """
        ref = self.ref(url, revision)
        exact = ref.revision
        if exact is not None:
            manifest = self.resolve(ref)
            if manifest is not None:
                exact = manifest.revision
            else:
                exact = self._whole_revision(ref.url, exact) or exact
        model = str(Path(ref.location).expanduser().absolute()) if ref.scheme == PATH else ref.url

        def is_meant(found_url: str, found_revision: str, made: Made | None) -> bool:
            if found_url == ref.url and not (prepared and ref.scheme != PREPARED):
                return exact in (None, found_revision)
            return made is not None and made.model == model and exact in (None, made.revision)

        layout = self.store.layout
        records = [one for one in read_all(layout) if is_meant(one.url, one.revision, one.made)]
        unfinished = [
            one for one in read_unfinished_results(layout) if is_meant(one.url, RESULT, one.made)
        ]
        if not (records or unfinished) and ref.scheme == PATH:
            raise NotFound(f"{url} is used where it lies; the cache has nothing of it")
        if not (records or unfinished) and prepared:
            raise NotFound(f"nothing that was made of {model} is on this disk")
        if not (records or unfinished):
            raise self._missing(ref.url, ref.revision)
        return records, unfinished


def _some(names: Sequence[str]) -> str:
    """Names for a message, not more than one can read."""
    more = len(names) - MOST_NAMED
    return ", ".join(names[:MOST_NAMED]) + (f" and {more} more" if more > 0 else "")


def _begun_at_s(record: Record) -> float:
    if record.manifest is not None:
        return record.manifest.created_at_s
    return record.fetching.started_at_s if record.fetching is not None else 0.0


def list_entries(store: Store) -> list[ModelEntry]:
    """Every revision that is on the disk or on its way, fetched or made."""
    records = read_all(store.layout)
    holders = Counter(part for record in records for part in (record.blobs | record.partials))
    unfinished = read_unfinished_results(store.layout)
    # A result is shown once: where it is written until it is whole, and only then as a revision.
    on_its_way = {result.url for result in unfinished}
    shown = [one for one in records if one.manifest is not None or one.url not in on_its_way]
    whole = {one.url for one in records if one.manifest is not None}
    entries = [_entry(store, record, holders) for record in shown]
    return entries + [_unfinished_entry(result) for result in unfinished if result.url not in whole]


def _entry(store: Store, record: Record, holders: Counter[str]) -> ModelEntry:
    complete = record.manifest is not None and store.is_whole(record.manifest)
    cached = _cached(store, record) if complete else None
    paged = cached is not None and cached >= PAGED_FRACTION * record.size_bytes
    tier = Tier.REMOTE if not complete else Tier.PAGED if paged else Tier.ON_DISK
    parts = record.blobs | record.partials
    return ModelEntry(
        url=record.url,
        revision=record.revision,
        tier=tier,
        size_bytes=record.size_bytes,
        bytes_unique=sum(size for part, size in parts.items() if holders[part] == 1),
        bytes_cached=cached,
        complete=complete,
        pinned=record.pinned,
        leases=record.holders,
        used_at_s=record.use.used_at_s,
        expected_use_at_s=record.use.expected_use_at_s,
        made=record.made,
    )


def _unfinished_entry(result: UnfinishedResult) -> ModelEntry:
    return ModelEntry(
        url=result.url,
        revision=RESULT,
        tier=Tier.REMOTE,
        size_bytes=result.bytes_taken,
        bytes_unique=result.bytes_unique,
        bytes_cached=None,
        complete=False,
        pinned=False,
        leases=("the step that makes it",) if result.busy else (),
        used_at_s=result.used_at_s,
        made=result.made,
    )


def _cached(store: Store, record: Record) -> int | None:
    """The bytes in the page cache, ``None`` where the system does not say."""
    from modelcache.pagecache.residency import residency

    files = [FileRange(path=str(store.layout.blob(digest))) for digest in record.blobs]
    try:
        return residency(files).bytes_cached
    except (CacheError, OSError):
        return None


def read_fetching(store: Store, url: str) -> Progress | None:
    """How far the revision of ``url`` is that some process is fetching; ``None`` if none is."""
    if not is_locked(store.layout.fetch_lock(url)):
        return None
    under_way = [
        (record.fetching, record)
        for record in read_all(store.layout)
        if record.url == url and record.fetching is not None
    ]
    if not under_way:
        return Progress(phase="listing")
    # Earlier ones have stopped; the lock is the model's, and only one has it.
    fetching, record = max(under_way, key=lambda found: found[0].started_at_s)
    done, total = _bytes_there(store, fetching, record), fetching.size_bytes
    return Progress(phase="fetching", bytes_done=min(done, total), bytes_total=total)


def _bytes_there(store: Store, fetching: Fetching, record: Record) -> int:
    done = 0
    for file in fetching.files:
        key = file_key(fetching.url, file, fetching.revision)
        if key in record.partials:
            done += read_progress(store.layout.partial(key))
        elif store.lookup(key, file) is not None:
            done += file.size_bytes
    return done
