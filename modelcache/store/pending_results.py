"""Results of preparation steps on their way, read from the disk: being made, or left by a kill.

What a step writes lies in a folder named by its result's key, beside a note of what it is
(``StepJob``). Whether it is being made is a question to its lock, which the step itself holds too.
"""

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import Set as AbstractSet
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from modelcache.store.files import (
    directories,
    is_locked,
    remove,
    remove_tree,
    write_whole,
)
from modelcache.store.layout import Layout, result_url
from modelcache.store.records import StepJob, name_result, read_record, seal
from modelcache.types import PREPARED, Damaged, Made

LOG = logging.getLogger("tidegate.modelcache")

JOB = "job.json"
OUTPUT = "output"
"""What lies in the folder of a result on its way: the note of what it is, and what is written."""

LEFTOVER_S = 7 * 86_400.0
"""Seconds after which what an interrupted step left is no longer kept for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PendingResult:
    """One result on its way.

    ``job`` is ``None`` where nothing says what it is. ``bytes_taken`` is what its files take,
    ``bytes_alone`` what removing them would free. ``busy``: it is being made now.
    """

    key: str
    job: StepJob | None
    bytes_taken: int
    bytes_alone: int
    busy: bool
    used_at_s: float

    @property
    def made(self) -> Made | None:
        """What it is made of."""
        return None if self.job is None else self.job.made

    @property
    def url(self) -> str:
        """What it will be called in the cache."""
        return result_url(self.key)

    @property
    def name(self) -> str:
        """What people are told it is."""
        return name_result(self.key, self.made)

    @property
    def kept(self) -> str:
        """Why it must not be removed; empty if it may."""
        return "being made" if self.busy else ""

    @property
    def bytes_to_come(self) -> int:
        """What it will still take, as far as that can be told."""
        promised = 0 if self.job is None or not self.busy else self.job.promised_bytes
        return max(promised - self.bytes_taken, 0)


def read_pending_results(layout: Layout) -> list[PendingResult]:
    """Every result that is on its way, or was."""
    return [
        read_pending(layout, path.name) for path in directories(layout.root / PREPARED / "work")
    ]


def read_pending(layout: Layout, key: str) -> PendingResult:
    """The result ``key`` on its way; of nothing if it is not."""
    taken: dict[tuple[int, int], int] = {}
    alone = 0
    used_at_s = 0.0
    folder = layout.work(key)
    for directory, _, names in os.walk(folder):
        for name in names:
            try:
                info = os.lstat(os.path.join(directory, name))
            except FileNotFoundError:
                continue  # a step renames and removes as it likes
            taken[info.st_dev, info.st_ino] = info.st_size
            # What has another name (of a blob that a step has linked to) frees nothing.
            alone += info.st_size if info.st_nlink == 1 else 0
    with suppress(FileNotFoundError):
        used_at_s = os.stat(folder).st_mtime
    return PendingResult(
        key=key,
        job=read_job(layout, key),
        bytes_taken=sum(taken.values()),
        bytes_alone=alone,
        busy=is_locked(layout.step_lock(key)),
        used_at_s=used_at_s,
    )


def read_job(layout: Layout, key: str) -> StepJob | None:
    """What the result ``key`` on its way is; ``None`` where nothing says so."""
    try:
        return read_record(layout.work(key) / JOB, StepJob)
    except Damaged:
        return None


def note_job(layout: Layout, key: str, job: StepJob) -> None:
    """Write down what a result on its way is. Call it with the store locked."""
    write_whole(layout.work(key) / JOB, seal(job), tmp=layout.tmp)


def remove_pending(layout: Layout, key: str) -> None:
    """Remove a result on its way, and what its step said. Call it with the store locked, for one
    that is not being made."""
    remove_tree(layout.work(key))
    remove(layout.step_log(key))


def sweep_pending(layout: Layout, whole: AbstractSet[str], now_s: float) -> None:
    """Remove what no step can go on with: call it with the store locked.

    ``whole`` are the keys of results that the cache has. What an interrupted step left stays if
    the next try can use it, for ``LEFTOVER_S`` at most; so does what a failed one said.
    """
    for work in read_pending_results(layout):
        if work.busy:
            continue
        job = work.job
        useless = not (job.whole or job.resumes) if job is not None else work.bytes_taken == 0
        if work.key in whole or useless or now_s - work.used_at_s > LEFTOVER_S:
            remove_tree(layout.work(work.key))
    _sweep_locks(layout)
    try:
        logs = sorted((layout.root / PREPARED / "logs").iterdir())
    except FileNotFoundError:
        return
    for log in logs:
        key = log.name.removesuffix(".log")
        if key in whole or layout.work(key).is_dir() or is_locked(layout.step_lock(key)):
            continue
        if now_s - log.stat().st_mtime > LEFTOVER_S:
            remove(log)


def has_name(fd: int, path: Path) -> bool:
    """Whether the file that is open is still the one at ``path``: a lock may be swept between
    being opened and being locked."""
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except FileNotFoundError:
        return False


def _sweep_locks(layout: Layout) -> None:
    """Remove the locks of steps that are free. A process that has one open, and locks it later,
    asks ``has_name``."""
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
