"""Room: what the cache takes, what eviction may free, and the sweeping of leftovers.

Everything is counted from the disk whenever it is asked; nothing is remembered, so nothing
remembered can be wrong after a kill.
"""

from __future__ import annotations

import logging
import os
import shutil
import stat
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from modelcache.store import leases
from modelcache.store.eviction import EvictionCandidate, choose
from modelcache.store.files import directories, files, remove, remove_empty, remove_tree
from modelcache.store.layout import REFS, Layout
from modelcache.store.partial_files import is_open
from modelcache.store.records import (
    FETCHING,
    MANIFEST,
    PIN,
    SPARE,
    USE,
    Record,
    read_all,
    read_known,
    scan,
)
from modelcache.store.snapshots import hub_place, remove_snapshot, sweep_hub
from modelcache.store.unfinished_results import (
    UnfinishedResult,
    read_unfinished_results,
    remove_unfinished,
    sweep_unfinished,
)
from modelcache.types import PREPARED, InUse, NoSpace

LOG = logging.getLogger("tidegate.modelcache")


OTHERS = frozenset({"bundles"})
"""What lies in the cache's directory too, and cannot be evicted to make room for models: what
engines have compiled, which has a limit of its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What the cache takes, to the byte: the sizes of its files, each counted once however many
    names it has. ``quota_bytes`` is ``None`` without a quota."""

    bytes_used: int
    """The sum of what follows."""
    bytes_blobs: int
    """Of models that were fetched, with their pieces' digests."""
    bytes_prepared: int
    """Of results of preparation steps: finished ones, as far as no fetched model has the same
    bytes, and unfinished ones."""
    bytes_partial: int
    """Files that are being fetched."""
    bytes_records: int
    bytes_promised: int
    """What steps under way will still take, as far as that can be told; not part of the sum."""
    free_bytes: int
    """Free bytes of the disk."""
    quota_bytes: int | None
    reserve_bytes: int


class Capacity:
    """The room of one cache. What changes anything is called with the store locked."""

    def __init__(
        self,
        layout: Layout,
        *,
        quota_bytes: int | None = None,
        reserve_bytes: int = 0,
        free_bytes: Callable[[Path], int] | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.layout = layout
        self.quota_bytes = quota_bytes
        self.reserve_bytes = reserve_bytes
        self._free_bytes = disk_free_bytes if free_bytes is None else free_bytes
        self._clock = clock

    def usage(self) -> Usage:
        """What the cache takes now."""
        kinds = count_kinds(self.layout.root)
        for file in find_made(self.layout, read_all(self.layout)):
            if file in kinds:
                kinds[file] = (PREPARED, kinds[file][1])
        sizes = {"blobs": 0, "partial": 0, PREPARED: 0, "": 0}
        for kind, size_bytes in kinds.values():
            sizes[kind] += size_bytes
        return Usage(
            bytes_used=sum(sizes.values()),
            bytes_blobs=sizes["blobs"],
            bytes_prepared=sizes[PREPARED],
            bytes_partial=sizes["partial"],
            bytes_records=sizes[""],
            bytes_promised=self._promised(),
            free_bytes=self.free_bytes(),
            quota_bytes=self.quota_bytes,
            reserve_bytes=self.reserve_bytes,
        )

    def free_bytes(self) -> int:
        """Free bytes of the disk."""
        return self._free_bytes(self.layout.root)

    def make_room(
        self,
        quota_need: int,
        disk_need: int,
        *,
        what: str,
        keep: str = "",
        making: str = "",
        grown_bytes: int | None = None,
    ) -> int:
        """Evict until so many bytes fit into the quota and on the disk; the bytes freed.

        ``keep`` is the key of a record that stays, ``making`` that of the preparation step which
        asks: what it was promised earlier does not count. ``grown_bytes`` is what ``what`` takes
        already, where that is too much. Raises ``NoSpace``, and then nothing but leftovers has
        gone.
        """
        if self._short(quota_need, disk_need, making) == (0, 0):
            return 0
        before = self._used()
        self.sweep()
        records, unfinished = read_all(self.layout), read_unfinished_results(self.layout)
        short_quota, short_disk = self._short(quota_need, disk_need, making)
        now_s = self._clock()
        by_quota = choose(self._candidates(records, unfinished, keep), short_quota, now_s)
        by_disk = choose(
            self._candidates(records, unfinished, keep, on_disk=True), short_disk, now_s
        )
        if not (by_quota.enough and by_disk.enough):
            names = {one.key: one.name for one in records} | {
                one.url: one.name for one in unfinished
            }
            kept = {names[key]: why for key, why in by_quota.kept.items() if key != keep}
            if grown_bytes is None:
                problem = f"{what} needs {max(quota_need, disk_need)} bytes more"
            else:
                limit = self._limit(quota=not by_quota.enough)
                problem = f"{what} has grown to {grown_bytes} bytes, more than {limit}"
            raise NoSpace(self._explain(problem, kept))
        going = {*by_quota.keys, *by_disk.keys}
        self._remove(
            [record for record in records if record.key in going],
            [result for result in unfinished if result.url in going],
        )
        return before - self._used()

    def evict(
        self,
        records: Sequence[Record],
        unfinished: Sequence[UnfinishedResult],
        *,
        force: bool,
    ) -> int:
        """Remove revisions, whole or not, and unfinished results; the bytes freed.

        Raises ``InUse`` where one is leased, being fetched or made, or pinned and ``force`` is not
        given; then none has gone.
        """
        kept = [(one.name, one.kept_because) for one in records] + [
            (one.name, one.kept_because) for one in unfinished
        ]
        for name, why in kept:
            if why and not (force and why == "pinned"):
                raise InUse(f"{name} is {why}")
        before = self._used()
        self._remove(records, unfinished)
        return before - self._used()

    def _remove(self, records: Sequence[Record], unfinished: Sequence[UnfinishedResult]) -> None:
        """Remove revisions and whatever only they had, and unfinished results."""
        for result in unfinished:
            LOG.info("evicted: %s", result.name)
            remove_unfinished(self.layout, result.key)
        for record in records:
            LOG.info("evicted: %s", record.name)
            directory = self.layout.revision(record.url, record.revision)
            for name in (MANIFEST, SPARE, FETCHING, PIN, USE):
                remove(directory / name)
            remove_empty(directory)
            if record.result_key is not None:
                remove(self.layout.step_log(record.result_key))
        self.sweep()

    def sweep(self) -> None:
        """Remove what no revision has: what a kill left behind, and what eviction leaves to it."""
        layout = self.layout
        remove_tree(layout.tmp)
        for directory in _grandchildren(layout.root / "leases"):
            leases.sweep(directory)
        records = []
        for directory, record in list(scan(layout)):
            if record is None:
                # Nothing of it can be read: neither what it was nor what it had.
                remove_tree(directory)
            else:
                records.append(record)
        records = self._sweep_unmade(records)
        sweep_unfinished(layout, {one.result_key or "" for one in records}, self._clock())
        self._sweep_views(records)
        self._sweep_blobs({digest for record in records for digest in record.blobs})
        self._sweep_partials({key for record in records for key in record.partials})
        self._sweep_fetching(records)
        self._sweep_refs()
        for path in files(layout.root / "known"):
            digest = read_known(path)
            if digest is None or not layout.blob(digest).exists():
                remove(path)

    def _sweep_unmade(self, records: Sequence[Record]) -> list[Record]:
        """A process that was killed while a step's result became a revision left it whole where the
        step wrote it: what the cache has of it is only other names. What remains of ``records``."""
        left = []
        for record in records:
            if record.result_key is None or record.manifest is not None or record.busy:
                left.append(record)
            else:
                remove(self.layout.revision(record.url, record.revision) / FETCHING)
        return left

    def _sweep_views(self, records: Sequence[Record]) -> None:
        layout = self.layout
        whole = [record.manifest for record in records if record.manifest is not None]
        views = {layout.snapshot(manifest.url, manifest.revision) for manifest in whole}
        for view in _grandchildren(layout.root / "views"):
            held = leases.holders(layout.root / "leases" / view.parent.name / view.name)
            if view not in views and not held:
                remove_snapshot(view)
        shown = {hub_place(layout, manifest.url, manifest.revision) for manifest in whole}
        sweep_hub(layout, {place[0] for place in shown if place is not None})

    def _sweep_blobs(self, wanted: set[str]) -> None:
        for path in _grandchildren(self.layout.root / "blobs"):
            digest = path.name.removesuffix(".pieces")
            orphan = path.name != digest and not self.layout.blob(digest).exists()
            if digest not in wanted or orphan:
                remove(path)
                remove_empty(path.parent)

    def _sweep_partials(self, wanted: set[str]) -> None:
        for directory in directories(self.layout.root / "partial"):
            digest = read_known(self.layout.known(directory.name))
            finished = digest is not None and self.layout.blob(digest).exists()
            if (directory.name not in wanted or finished) and not is_open(directory):
                remove_tree(directory)

    def _sweep_fetching(self, records: Sequence[Record]) -> None:
        """A process that was killed after the manifest had its name left what led up to it."""
        for record in records:
            if record.manifest is None or record.fetching is None or record.busy:
                continue
            whole = {file.path for file in record.manifest.files}
            more = any(file.path not in whole for file in record.fetching.files)
            if not more and not any(self.layout.partial(key).is_dir() for key in record.partials):
                remove(self.layout.revision(record.url, record.revision) / FETCHING)

    def _sweep_refs(self) -> None:
        for model in directories(self.layout.root / "models"):
            if [directory.name for directory in directories(model)] == [REFS]:
                remove_tree(model / REFS)
            remove_empty(model)

    def _used(self) -> int:
        """``bytes_used`` alone, which needs no record read."""
        return sum(size_bytes for _, size_bytes in count_kinds(self.layout.root).values())

    def _promised(self, making: str = "") -> int:
        """What steps under way will still take, those of ``making`` left out."""
        unfinished = read_unfinished_results(self.layout)
        return sum(result.bytes_to_come for result in unfinished if result.key != making)

    def _short(self, quota_need: int, disk_need: int, making: str = "") -> tuple[int, int]:
        """By how many bytes the quota and the disk are too small."""
        promised = self._promised(making)
        quota = disk = 0
        if disk_need > 0:
            disk = max(disk_need + promised - (self.free_bytes() - self.reserve_bytes), 0)
        if self.quota_bytes is not None and quota_need > 0:
            quota = max(quota_need + promised + self._used() - self.quota_bytes, 0)
        return quota, disk

    def _candidates(
        self,
        records: Sequence[Record],
        unfinished: Sequence[UnfinishedResult],
        keep: str,
        *,
        on_disk: bool = False,
    ) -> list[EvictionCandidate]:
        """The revisions and unfinished results as eviction sees them; ``on_disk``: with what
        the disk would get back."""
        names = count_names(self.layout.root) if on_disk else {}
        own = next((record.url for record in records if record.key == keep), None)
        expected = {record.key: record.use.expected_use_at_s for record in records}
        steps_on = {record.made.before for record in records if record.made is not None}

        def kept_because(record: Record) -> str:
            if record.key == keep:
                return "being fetched"
            # One process at a time fetches revisions of a model.
            return (replace(record, busy=False) if record.url == own else record).kept_because

        def size(path: Path, size_bytes: int) -> int:
            if not on_disk:
                return size_bytes
            info = os.stat(path)
            # A blob that has names outside (adopted from another cache) frees nothing.
            shared = info.st_nlink > names.get((info.st_dev, info.st_ino), 1)
            return 0 if shared else size_bytes

        def expected_use(record: Record) -> float | None:
            """A result is used when its model is."""
            if record.use.expected_use_at_s is not None or record.made is None:
                return record.use.expected_use_at_s
            return expected.get(f"{record.made.model}@{record.made.revision}")

        found = [
            EvictionCandidate(
                key=record.key,
                parts={
                    digest: size(self.layout.blob(digest), size_bytes)
                    for digest, size_bytes in record.blobs.items()
                    if self.layout.blob(digest).exists()
                }
                | record.partials,
                kept_because=kept_because(record),
                spare=record.result_key in steps_on and not record.use.final,
                used_at_s=record.use.used_at_s,
                expected_use_at_s=expected_use(record),
                reload_s_per_gb=record.use.reload_s_per_gb,
            )
            for record in records
        ]
        return found + [
            EvictionCandidate(
                key=result.url,
                parts={result.url: result.bytes_unique},
                kept_because=result.kept_because,
                used_at_s=result.used_at_s,
            )
            for result in unfinished
        ]

    def explain_full(self, error: OSError) -> str:
        """What to do where the disk turned out to be full, for people."""
        records, unfinished = read_all(self.layout), read_unfinished_results(self.layout)
        names = {one.key: one.name for one in records} | {one.url: one.name for one in unfinished}
        found = self._candidates(records, unfinished, "", on_disk=True)
        sizes = {names[one.key]: sum(one.parts.values()) for one in found if not one.kept_because}
        largest = sorted(sizes, key=lambda name: -sizes[name])[:3]
        free = ", ".join(f"{name} ({sizes[name]} bytes)" for name in largest)
        return (
            self._explain(f"the disk is full ({error.strerror})", {})
            + ". Make room on it"
            + (f", or `tidegate model evict` what is not needed: {free}" if free else "")
        )

    def _limit(self, *, quota: bool) -> str:
        """What is in the way of more, for people: the quota's setting, or the disk's."""
        if quota:
            return f"modelcache.quota_bytes ({self.quota_bytes}) leaves it"
        return f"modelcache.reserve_bytes ({self.reserve_bytes}) leaves it of the disk"

    def _explain(self, problem: str, kept: Mapping[str, str]) -> str:
        usage = self.usage()
        text = f"{problem}; the cache at {self.layout.root} takes {usage.bytes_used}"
        if usage.quota_bytes is not None:
            text += f" of its quota of {usage.quota_bytes}"
        text += f", the disk has {usage.free_bytes} free, {usage.reserve_bytes} of them reserved"
        if usage.bytes_promised:
            text += f"; preparation steps under way take {usage.bytes_promised} more"
        if kept:
            stays = "; ".join(f"{key} ({why})" for key, why in sorted(kept.items()))
            text += f". What cannot be evicted: {stays}"
        return text


def disk_free_bytes(path: Path) -> int:
    """The bytes that the disk below ``path``, or below its nearest parent, has for us."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def _grandchildren(directory: Path) -> list[Path]:
    return [path for child in directories(directory) for path in sorted(child.iterdir())]


def walk(root: Path) -> Iterator[tuple[str, os.stat_result]]:
    """Every file and symbolic link below ``root``, with the name at the top it is under; not what
    others keep there (``OTHERS``)."""
    for directory, folders, names in os.walk(root):
        if directory == str(root):
            folders[:] = [name for name in folders if name not in OTHERS]
        top = Path(directory).relative_to(root).parts[:1]
        for name in names:
            try:
                info = os.lstat(os.path.join(directory, name))
            except FileNotFoundError:
                continue
            if stat.S_ISREG(info.st_mode) or stat.S_ISLNK(info.st_mode):
                yield (top[0] if top else ""), info


def count_names(root: Path) -> dict[tuple[int, int], int]:
    """How many names each file has below ``root``."""
    names: dict[tuple[int, int], int] = {}
    for _, info in walk(root):
        file = (info.st_dev, info.st_ino)
        names[file] = names.get(file, 0) + 1
    return names


def count_kinds(root: Path) -> dict[tuple[int, int], tuple[str, int]]:
    """Each file below ``root`` once: the folder at the top that it counts for (``blobs``,
    ``partial``, ``prepared``; empty for records), and its size."""
    kinds: dict[tuple[int, int], tuple[str, int]] = {}
    for top, info in walk(root):
        kind = top if top in ("blobs", "partial", PREPARED) else ""
        file = (info.st_dev, info.st_ino)
        # A blob has names in views too, and is one wherever it was met first.
        kinds[file] = max(kinds.get(file, ("", 0)), (kind, info.st_size))
    return kinds


def find_made(layout: Layout, records: Sequence[Record]) -> Iterator[tuple[int, int]]:
    """The blobs, with their pieces' digests, that only results of preparation steps have."""
    fetched = {digest for one in records if one.result_key is None for digest in one.blobs}
    made = {digest for one in records if one.result_key is not None for digest in one.blobs}
    for digest in made - fetched:
        for path in (layout.blob(digest), layout.pieces(digest)):
            with suppress(FileNotFoundError):
                info = os.stat(path)
                yield info.st_dev, info.st_ino
