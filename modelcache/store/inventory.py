"""What the cache has, as people are shown it."""

from __future__ import annotations

from collections import Counter

from modelcache.store.files import is_locked
from modelcache.store.layout import RESULT, file_key
from modelcache.store.manifest import Fetching
from modelcache.store.partial_files import read_progress
from modelcache.store.pending_results import Work, read_works
from modelcache.store.revisions import Record, read_all
from modelcache.store.store import Store
from modelcache.types import CacheError, FileRange, ModelEntry, Progress, Tier

PAGED_FRACTION = 0.95
"""From this part of its bytes on, a model counts as being in the page cache."""


def list_entries(store: Store) -> list[ModelEntry]:
    """Every revision that is on the disk or on its way, fetched or made."""
    records = read_all(store.layout)
    holders = Counter(part for record in records for part in (record.blobs | record.partials))
    works = read_works(store.layout)
    # A result is shown once: where it is written until it is whole, and only then as a revision.
    on_its_way = {work.url for work in works}
    shown = [one for one in records if one.manifest is not None or one.url not in on_its_way]
    whole = {one.url for one in records if one.manifest is not None}
    entries = [_entry(store, record, holders) for record in shown]
    return entries + [_entry_of_work(work) for work in works if work.url not in whole]


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


def _entry_of_work(work: Work) -> ModelEntry:
    return ModelEntry(
        url=work.url,
        revision=RESULT,
        tier=Tier.REMOTE,
        size_bytes=work.bytes_taken,
        bytes_unique=work.bytes_alone,
        bytes_cached=None,
        complete=False,
        pinned=False,
        leases=("the step that makes it",) if work.busy else (),
        used_at_s=work.used_at_s,
        made=work.made,
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
