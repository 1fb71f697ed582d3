"""Unfinished results of preparation steps, read from the disk.

A step writes its result into ``Layout.unfinished_output``, beside a record of the step
(``StepRecord``). A result is unfinished until the cache has taken it over, and may be what an
interrupted step left. It is being made while its lock is held, which the step itself holds too.
"""

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import Set as AbstractSet
from contextlib import suppress
from dataclasses import dataclass

from modelcache.store.files import (
    directories,
    files,
    is_locked,
    remove,
    remove_tree,
    write_whole,
)
from modelcache.store.layout import Layout, result_url
from modelcache.store.records import StepRecord, name_result, read_record, seal
from modelcache.types import PREPARED, Damaged, Made

LOG = logging.getLogger("tidegate.modelcache")

STEP = "job.json"
"""The file of the step's record."""

LEFTOVER_S = 7 * 86_400.0
"""Seconds for which the result of an interrupted step is kept for the next run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UnfinishedResult:
    """One unfinished result.

    ``step`` is ``None`` where no record says which step makes it. Its files take ``bytes_taken``,
    of which removing it would free ``bytes_unique``. ``busy``: a step is making it now.
    """

    key: str
    step: StepRecord | None
    bytes_taken: int
    bytes_unique: int
    busy: bool
    used_at_s: float

    @property
    def made(self) -> Made | None:
        """The model and the steps that the result is made of."""
        return None if self.step is None else self.step.made

    @property
    def url(self) -> str:
        """The result's URL in the cache."""
        return result_url(self.key)

    @property
    def name(self) -> str:
        """The result's name in messages."""
        return name_result(self.key, self.made)

    @property
    def kept_because(self) -> str:
        """Why the result must not be removed; empty if it may."""
        return "being made" if self.busy else ""

    @property
    def bytes_to_come(self) -> int:
        """The bytes that its step will still write, as far as that can be told."""
        if self.step is None or not self.busy:
            return 0
        return max(self.step.promised_bytes - self.bytes_taken, 0)


def read_unfinished_results(layout: Layout) -> list[UnfinishedResult]:
    """Every unfinished result in the cache."""
    return [
        read_unfinished(layout, path.name) for path in directories(layout.root / PREPARED / "work")
    ]


def read_unfinished(layout: Layout, key: str) -> UnfinishedResult:
    """The unfinished result ``key``; without bytes and step where there is none."""
    taken: dict[tuple[int, int], int] = {}
    unique = 0
    used_at_s = 0.0
    folder = layout.unfinished(key)
    for directory, _, names in os.walk(folder):
        for name in names:
            try:
                info = os.lstat(os.path.join(directory, name))
            except FileNotFoundError:
                continue  # a step renames and removes as it likes
            taken[info.st_dev, info.st_ino] = info.st_size
            # What has another name (of a blob that a step has linked to) frees nothing.
            unique += info.st_size if info.st_nlink == 1 else 0
    with suppress(FileNotFoundError):
        used_at_s = os.stat(folder).st_mtime
    return UnfinishedResult(
        key=key,
        step=read_step(layout, key),
        bytes_taken=sum(taken.values()),
        bytes_unique=unique,
        busy=is_locked(layout.step_lock(key)),
        used_at_s=used_at_s,
    )


def read_step(layout: Layout, key: str) -> StepRecord | None:
    """The step that makes the unfinished result ``key``; ``None`` without a sound record."""
    try:
        return read_record(layout.unfinished(key) / STEP, StepRecord)
    except Damaged:
        return None


def write_step(layout: Layout, key: str, step: StepRecord) -> None:
    """Record the step that makes the result ``key``. Call it with the store locked."""
    write_whole(layout.unfinished(key) / STEP, seal(step), tmp=layout.tmp)


def remove_unfinished(layout: Layout, key: str) -> None:
    """Remove an unfinished result and its step's log. Call it with the store locked, for one that
    is not being made."""
    remove_tree(layout.unfinished(key))
    remove(layout.step_log(key))


def sweep_unfinished(layout: Layout, cached: AbstractSet[str], now_s: float) -> None:
    """Remove what no step can go on with. Call it with the store locked.

    ``cached`` are the keys of the results that the cache has. The result of an interrupted step
    stays for ``LEFTOVER_S`` if the next run can use it; so does a failed step's log.
    """
    for result in read_unfinished_results(layout):
        if result.busy:
            continue
        step = result.step
        usable = result.bytes_taken > 0 if step is None else step.finished or step.resumes
        if result.key in cached or not usable or now_s - result.used_at_s > LEFTOVER_S:
            remove_tree(layout.unfinished(result.key))
    _sweep_locks(layout)
    for log in files(layout.root / PREPARED / "logs"):
        key = log.name.removesuffix(".log")
        needed = key in cached or layout.unfinished(key).is_dir()
        if needed or is_locked(layout.step_lock(key)):
            continue
        if now_s - log.stat().st_mtime > LEFTOVER_S:
            remove(log)


def _sweep_locks(layout: Layout) -> None:
    """Remove the locks of steps that are free. A process that has one open, and locks it later,
    asks ``files.has_name``."""
    for path in (layout.root / "locks").glob("*.step"):
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            continue  # it stays, and is no harm
        try:
            # Shared: a process that asks meanwhile whether the step is being made hears no.
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            remove(path)
        except BlockingIOError:
            continue
        finally:
            os.close(fd)
