"""Results of preparation steps in the cache: each a revision of its own, leased while it is used.

A step writes into a folder of the cache's (``modelcache.store.pending_results``), within the
quota, with room made
before it begins. Whole, its files become blobs by links, and it is what any model is: counted,
shown, leased, pinned, evicted.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from modelcache.cache import ModelCache
from modelcache.refs import check_file_path
from modelcache.store.files import remove_empty, remove_tree
from modelcache.store.layout import RESULT, result_url
from modelcache.store.leases import Lease
from modelcache.store.lookup import CachedModel
from modelcache.store.manifest import Job
from modelcache.store.pending_results import OUTPUT, note_job, read_job, read_work
from modelcache.store.revisions import PIN, name_result, read_directory, read_use
from modelcache.types import Made, NoSpace, NotFound, Progress


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """A model that stays as long as this is held: until ``lease.release``, or the process ends."""

    model: CachedModel
    lease: Lease


class Results:
    """The results in one cache, for whoever makes them and whoever uses them."""

    def __init__(self, cache: ModelCache) -> None:
        self._cache = cache
        self._store = cache.store
        self._layout = cache.store.layout

    def find(self, key: str) -> Path | None:
        """The folder with this result; ``None`` if there is none."""
        model = self._cache.find(result_url(key))
        return None if model is None else model.path

    def hold(self, key: str, holder: str, *, final: bool) -> Held | None:
        """This result, leased; ``None`` if it is not here. ``final``: it is wanted for itself, not
        only as a step on the way."""
        model = self._cache.find(result_url(key))
        if model is None:
            return None
        try:
            lease = self._cache.lease(model, holder)
        except NotFound:
            return None
        try:
            if final:
                self._note_final(model)
        except BaseException:
            lease.release()
            raise
        return Held(model=model, lease=lease)

    def _note_final(self, model: CachedModel) -> None:
        if not read_use(self._layout.revision(model.url, model.revision)).final:
            with self._store.lock():
                self._store.advise(model.url, model.revision, final=True)

    # Making one. Whoever calls these holds the result's lock.

    def begin(self, key: str, job: Job) -> Path:
        """Have room for a result, and where it is to be written. Raises ``NoSpace``."""
        with self._store.lock():
            work = self._layout.work(key)
            if not job.resumes:
                remove_tree(work)
            fresh = not work.exists()
            missing = max(job.promised_bytes - read_work(self._layout, key).bytes_taken, 1)
            what = name_result(key, job.made)
            try:
                self._store.room.make_room(missing, missing, what=what, making=key)
            except NoSpace:
                if fresh:
                    remove_empty(work)
                raise
            output = work / OUTPUT
            output.mkdir(parents=True, exist_ok=True)
            note_job(self._layout, key, job)
            os.utime(work)
        return output

    def check_room(self, key: str, size_bytes: int) -> None:
        """See whether a result that has grown to this still fits, and make room where it has grown
        past what was promised. Raises ``NoSpace``."""
        job = read_job(self._layout, key)
        if job is None or size_bytes <= job.promised_bytes:
            return
        with self._store.lock():
            what = name_result(key, job.made)
            self._store.room.make_room(1, 1, what=what, making=key, grown_bytes=size_bytes)

    @property
    def reserve_bytes(self) -> int:
        """What the cache leaves free of its disk."""
        return self._store.room.reserve_bytes

    def free_bytes(self) -> int:
        """What the cache's disk has left."""
        return self._store.room.free_bytes()

    def is_whole(self, key: str) -> bool:
        """Whether the step has done its work, and the cache has only to take it over."""
        job, output = read_job(self._layout, key), self._layout.work(key) / OUTPUT
        if job is None or not job.whole or not output.is_dir():
            return False
        return find_refused(output) is None

    def note_whole(self, key: str, job: Job, took_s: float) -> None:
        """The step has done its work: whoever is interrupted from now on need not repeat it."""
        output = self._layout.work(key) / OUTPUT
        for path in (*sorted(output.rglob("*")), output):
            _sync(path)
        with self._store.lock():
            done = replace(job, whole=True, promised_bytes=0, took_s=took_s)
            note_job(self._layout, key, done)

    def publish(
        self,
        key: str,
        made: Made,
        holder: str,
        *,
        final: bool,
        on_progress: Callable[[Progress], None],
        cancelled: Callable[[], bool],
    ) -> Held:
        """Take a whole result into the cache, leased before anybody could evict it."""
        url, layout = result_url(key), self._layout
        job = read_job(layout, key)
        took_s = (job.took_s if job is not None else 0.0) + self._cost_s(made.before)
        with self._store.lock():
            lease = self._store.take_lease(url, RESULT, holder, ahead=True)
        assert lease is not None, "it is taken ahead"
        try:
            model = self._cache.publish(
                layout.work(key) / OUTPUT, url=url, revision=RESULT, made=made,
                on_progress=on_progress, cancelled=cancelled,
            )  # fmt: skip
            size_bytes = 0 if model.manifest is None else model.manifest.size_bytes
            with self._store.lock():
                cost = took_s / (size_bytes / 1e9) if size_bytes and took_s else None
                self._store.advise(url, RESULT, reload_s_per_gb=cost, final=final)
                # What is used of a pinned model is as pinned as the model.
                if final and (layout.revision(made.model, made.revision) / PIN).exists():
                    self._store.set_pin(url, RESULT, pinned=True)
                remove_tree(layout.work(key))
        except BaseException:
            lease.release()
            raise
        return Held(model=model, lease=lease)

    def _cost_s(self, key: str) -> float:
        """Seconds to make a result of its model, as far as they were measured."""
        record = read_directory(self._layout, self._layout.revision(result_url(key), RESULT))
        if not key or record is None:
            return 0.0
        return (record.use.reload_s_per_gb or 0.0) * record.size_bytes / 1e9

    def discard(self, key: str) -> None:
        """Remove what a step has left that could not go on with it. What it said stays."""
        with self._store.lock():
            remove_tree(self._layout.work(key))

    def sweep(self) -> None:
        """Remove what no step can go on with, and what was left long ago."""
        with self._store.lock():
            self._store.room.sweep()


def find_refused(output: Path) -> str | None:
    """The path of a file that no model may have, below a result; ``None`` if all may stay."""
    for path in sorted(output.rglob("*")):
        name = path.relative_to(output).as_posix()
        if path.is_file() and not check_file_path(name):
            return name
    return None


def _sync(path: Path) -> None:
    """Have the disk have it: once its digests are written down its bytes are believed."""
    if path.is_symlink() or not (path.is_file() or path.is_dir()):
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
