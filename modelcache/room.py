"""Room: what the cache takes, what eviction may free, and the sweeping of leftovers.

Everything is counted from the disk whenever it is asked; nothing is remembered, so nothing
remembered can be wrong after a kill.
"""

from __future__ import annotations

import os
import shutil
import stat
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from modelcache import leases
from modelcache.evict import Candidate, choose
from modelcache.files import directories, remove, remove_empty, remove_tree
from modelcache.hub import hub_place, sweep_hub
from modelcache.layout import REFS, Layout
from modelcache.partial import is_open
from modelcache.records import (
    FETCHING,
    MANIFEST,
    PIN,
    SPARE,
    USE,
    Record,
    read_all,
    read_directory,
    read_known,
    scan,
)
from modelcache.types import InUse, NoSpace
from modelcache.views import remove_view, view_of

OTHERS = frozenset({"bundles", "prepared"})
"""What lies in the cache's directory too, and cannot be evicted to make room for models: what
engines have compiled (which has a limit of its own) and results of preparation steps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What the cache takes, to the byte: the sizes of its files, each counted once however many
    names it has. ``quota_bytes`` is ``None`` without a quota."""

    bytes_used: int
    """All of it: blobs with their pieces' digests, files on their way, records."""
    bytes_blobs: int
    bytes_partial: int
    bytes_records: int
    free_bytes: int
    """What the disk has left for anybody."""
    quota_bytes: int | None
    reserve_bytes: int


class Room:
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
        kinds: dict[tuple[int, int], tuple[str, int]] = {}
        for top, info in walk(self.layout.root):
            kind = top if top in ("blobs", "partial") else ""
            file = (info.st_dev, info.st_ino)
            # A blob has names in views too, and is one wherever it was met first.
            kinds[file] = max(kinds.get(file, ("", 0)), (kind, info.st_size))
        sizes = {"blobs": 0, "partial": 0, "": 0}
        for kind, size_bytes in kinds.values():
            sizes[kind] += size_bytes
        return Usage(
            bytes_used=sum(sizes.values()),
            bytes_blobs=sizes["blobs"],
            bytes_partial=sizes["partial"],
            bytes_records=sizes[""],
            free_bytes=self._free_bytes(self.layout.root),
            quota_bytes=self.quota_bytes,
            reserve_bytes=self.reserve_bytes,
        )

    def make_room(self, quota_need: int, disk_need: int, *, what: str, keep: str = "") -> int:
        """Evict until so many bytes fit into the quota and on the disk; the bytes freed.

        ``keep`` is the key of a record that stays. Raises ``NoSpace``, and then nothing but
        leftovers has gone.
        """
        if self._short(quota_need, disk_need) == (0, 0):
            return 0
        before = self.usage().bytes_used
        self.sweep()
        records = read_all(self.layout)
        short_quota, short_disk = self._short(quota_need, disk_need)
        now_s = self._clock()
        by_quota = choose(self._candidates(records, keep), short_quota, now_s)
        by_disk = choose(self._candidates(records, keep, on_disk=True), short_disk, now_s)
        if not (by_quota.enough and by_disk.enough):
            raise NoSpace(self._explain(what, quota_need, disk_need, by_quota.kept))
        going = {*by_quota.keys, *by_disk.keys}
        self.remove_records([record for record in records if record.key in going])
        return before - self.usage().bytes_used

    def evict(self, url: str, revision: str, *, force: bool = False) -> int:
        """Remove one revision, whole or not; the bytes freed.

        Raises ``InUse`` for one that is leased or being fetched, and for one that is pinned
        unless ``force`` is given.
        """
        record = read_directory(self.layout, self.layout.revision(url, revision))
        if record is None:
            return 0
        if record.kept and not (force and record.kept == "pinned"):
            raise InUse(f"{record.key} is {record.kept}")
        before = self.usage().bytes_used
        self.remove_records([record])
        return before - self.usage().bytes_used

    def remove_records(self, records: Sequence[Record]) -> None:
        """Remove revisions and whatever only they had."""
        for record in records:
            directory = self.layout.revision(record.url, record.revision)
            for name in (MANIFEST, SPARE, FETCHING, PIN, USE):
                remove(directory / name)
            remove_empty(directory)
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
        self._sweep_views(records)
        self._sweep_blobs({digest for record in records for digest in record.blobs})
        self._sweep_partials({key for record in records for key in record.partials})
        self._sweep_fetching(records)
        self._sweep_refs()
        for path in _files(layout.root / "known"):
            digest = read_known(path)
            if digest is None or not layout.blob(digest).exists():
                remove(path)

    def _sweep_views(self, records: Sequence[Record]) -> None:
        layout = self.layout
        whole = [record.manifest for record in records if record.manifest is not None]
        views = {view_of(layout, manifest) for manifest in whole}
        for view in _grandchildren(layout.root / "views"):
            held = leases.holders(layout.root / "leases" / view.parent.name / view.name)
            if view not in views and not held:
                remove_view(view)
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
        """Whoever was killed after the manifest had its name has left what led up to it."""
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

    def _short(self, quota_need: int, disk_need: int) -> tuple[int, int]:
        """By how many bytes the quota and the disk are too small."""
        disk = disk_need - (self._free_bytes(self.layout.root) - self.reserve_bytes)
        if disk_need <= 0:
            disk = 0
        if self.quota_bytes is None or quota_need <= 0:
            return 0, max(disk, 0)
        return max(quota_need + self.usage().bytes_used - self.quota_bytes, 0), max(disk, 0)

    def _candidates(
        self, records: Sequence[Record], keep: str, *, on_disk: bool = False
    ) -> list[Candidate]:
        """The revisions as eviction sees them; ``on_disk``: with what the disk would get back."""
        names = count_names(self.layout.root) if on_disk else {}
        own = next((record.url for record in records if record.key == keep), None)

        def kept(record: Record) -> str:
            if record.key == keep:
                return "being fetched"
            # Whoever fetches one revision of a model is the only one that fetches any of it.
            return (replace(record, busy=False) if record.url == own else record).kept

        def size(path: Path, size_bytes: int) -> int:
            if not on_disk:
                return size_bytes
            info = os.stat(path)
            # A blob that has names outside (adopted from another cache) frees nothing.
            shared = info.st_nlink > names.get((info.st_dev, info.st_ino), 1)
            return 0 if shared else size_bytes

        return [
            Candidate(
                key=record.key,
                parts={
                    digest: size(self.layout.blob(digest), size_bytes)
                    for digest, size_bytes in record.blobs.items()
                    if self.layout.blob(digest).exists()
                }
                | record.partials,
                kept=kept(record),
                used_at_s=record.use.used_at_s,
                expected_use_at_s=record.use.expected_use_at_s,
                reload_s_per_gb=record.use.reload_s_per_gb,
            )
            for record in records
        ]

    def _explain(self, what: str, quota_need: int, disk_need: int, kept: Mapping[str, str]) -> str:
        usage = self.usage()
        text = (
            f"{what} needs {max(quota_need, disk_need)} bytes more; the cache at "
            f"{self.layout.root} takes {usage.bytes_used}"
        )
        if usage.quota_bytes is not None:
            text += f" of its quota of {usage.quota_bytes}"
        text += f", the disk has {usage.free_bytes} free, {usage.reserve_bytes} of them reserved"
        if kept:
            stays = "; ".join(f"{key} ({why})" for key, why in sorted(kept.items()))
            text += f". What cannot be evicted: {stays}"
        return text


def disk_free_bytes(path: Path) -> int:
    """The bytes that the disk below ``path``, or below its nearest parent, has for us."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


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


def _grandchildren(directory: Path) -> list[Path]:
    return [path for child in directories(directory) for path in sorted(child.iterdir())]


def _files(directory: Path) -> list[Path]:
    try:
        return [path for path in sorted(directory.iterdir()) if path.is_file()]
    except FileNotFoundError:
        return []
