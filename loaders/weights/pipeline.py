"""Threads that carry out a plan, and the order in which its batches come out.

Threads take reads from the front of the plan; the consumer gets batches in the plan's order, each
when all of it is there. How far threads may run ahead of the consumer is bounded in bytes.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from loaders.weights.device import Arena, TensorTarget
from loaders.weights.files import OpenFile
from loaders.weights.plan import ALIGN_BYTES, Batch, Read, ReadPlan, Segment
from loaders.weights.readers import ReadBuffer, Tally, WeightReader
from loaders.weights.staging_buffers import StagingBuffers, Stretch

STAND_BACK_S = 0.005
"""How often a thread that is for the disk looks whether there is something for it again."""


@dataclass(slots=True, kw_only=True)
class _Progress:
    """What is guarded by the pipeline's lock."""

    next_read: int = 0
    arenas: dict[int, Arena] = field(default_factory=dict)
    left: list[int] = field(default_factory=list)
    ahead_bytes: int = 0
    error: BaseException | None = None
    stopped: bool = False


class Pipeline:
    """Carries out one plan. ``target`` is ``None`` where bytes are only read and checked;
    ``ahead_bytes`` bounds the batches that are under way or done and not yet taken (``None``: no
    bound). Reads go through ``ring`` if there is one.

    Only the first ``copiers`` threads read what is in the page cache. That is work for a core, and
    the memory of more threads than cores does not fit into the processor's caches (measured on two
    cores: 32 GB/s with two threads, 20 with eight). The others are for the disk.
    """

    def __init__(
        self,
        *,
        plan: ReadPlan,
        files: Sequence[OpenFile],
        reader: WeightReader,
        target: TensorTarget | None,
        ring: StagingBuffers | None,
        threads: int,
        copiers: int,
        ahead_bytes: int | None,
    ) -> None:
        self._plan = plan
        self._files = files
        self._reader = reader
        self._target = target
        self._ring = ring
        self._ahead_bytes = ahead_bytes
        self._copiers = copiers
        self._now = _Progress(left=_count_reads(plan))
        self._changed = threading.Condition()
        self.tallies = [Tally() for _ in range(max(1, min(threads, len(plan.reads))))]
        self._threads = [
            threading.Thread(target=self._work, args=(n,), name=f"loader-{n}", daemon=True)
            for n in range(len(self.tallies))
        ]

    def batches(self) -> Iterator[Arena]:
        """Every batch, in order, filled and checked. Raises what a thread ran into, ``BadFile``
        where a file is not what it was. Threads are gone when this ends, however it ends."""
        for thread in self._threads:
            thread.start()
        try:
            for number, batch in enumerate(self._plan.batches):
                arena = self._await(number, batch)
                self._files[batch.file].check_unchanged()
                yield arena
                del arena
                with self._changed:
                    self._now.ahead_bytes -= batch.size_bytes
                    self._changed.notify_all()
            self._await_all()
        finally:
            self._stop()

    def run(self) -> None:
        """Carry out a plan without batches."""
        for _ in self.batches():
            pass

    def _await(self, number: int, batch: Batch) -> Arena:
        target = self._target
        assert target is not None, "a plan with batches needs a target"
        now = self._now
        with self._changed:
            while now.left[number] and now.error is None:
                self._changed.wait()
            if now.error is not None:
                raise now.error
            if number not in now.arenas:  # nothing to read: all of its tensors are empty
                now.arenas[number] = target.open(batch)
            arena = now.arenas.pop(number)
        target.finish(arena)
        return arena

    def _await_all(self) -> None:
        """Until every thread is through; raises what one ran into."""
        for thread in self._threads:
            thread.join()
        if self._now.error is not None:
            raise self._now.error
        for file in self._files:
            file.check_unchanged()

    def _stop(self) -> None:
        with self._changed:
            self._now.stopped = True
            self._changed.notify_all()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()
        self._now.arenas.clear()

    def _work(self, worker: int) -> None:
        tally = self.tallies[worker]
        scratch: list[Stretch] = []
        with suppress(OSError):  # a core that went away meanwhile
            os.sched_setaffinity(0, usable_cores())
        try:
            while (job := self._take(worker)) is not None:
                read, arenas = job
                if self._ring is not None:
                    self._through_ring(self._ring, read, arenas, worker)
                else:
                    self._in_place(read, arenas, scratch, tally)
                self._done(read)
        except BaseException as error:  # noqa: BLE001 -- handed to the consumer, which raises it
            with self._changed:
                self._now.error = self._now.error or error
                self._changed.notify_all()

    def _take(self, worker: int) -> tuple[Read, dict[int, Arena]] | None:
        """The next read, and the arenas of the batches it meets; ``None`` when all is done."""
        now = self._now
        with self._changed:
            while True:
                if now.stopped or now.error is not None or now.next_read >= len(self._plan.reads):
                    return None
                read = self._plan.reads[now.next_read]
                if worker >= self._copiers and self._reader.is_cached(self._files[read.file], read):
                    self._changed.wait(STAND_BACK_S)
                    continue
                wanted = {s.batch for s in read.segments if s.batch is not None}
                if self._has_room(wanted):
                    break
                self._changed.wait()
            now.next_read += 1
            if now.next_read == len(self._plan.reads):
                self._changed.notify_all()  # the readers that stood back go on
            for number in wanted - now.arenas.keys():
                batch = self._plan.batches[number]
                assert self._target is not None, "a plan with batches needs a target"
                now.arenas[number] = self._target.open(batch)
                now.ahead_bytes += batch.size_bytes
            return read, {number: now.arenas[number] for number in wanted}

    def _has_room(self, wanted: set[int]) -> bool:
        """Whether the batches of the next read fit.

        Those it meets that are open already do not count: the consumer may be waiting for one, and
        then no room would ever be made.
        """
        now = self._now
        if self._ahead_bytes is None:
            return True
        batches = self._plan.batches
        other = now.ahead_bytes - sum(batches[n].size_bytes for n in wanted & now.arenas.keys())
        new = sum(batches[n].size_bytes for n in wanted - now.arenas.keys())
        return new == 0 or other <= 0 or other + new <= self._ahead_bytes

    def _done(self, read: Read) -> None:
        with self._changed:
            for number in {s.batch for s in read.segments if s.batch is not None}:
                self._now.left[number] -= 1
                if not self._now.left[number]:
                    self._changed.notify_all()

    def _in_place(
        self, read: Read, arenas: dict[int, Arena], scratch: list[Stretch], tally: Tally
    ) -> None:
        """Straight into the tensors' memory; what belongs to none of them into a scratch."""
        places = []
        for segment in read.segments:
            view = arenas[segment.batch].view if segment.batch is not None else None
            if segment.batch is not None and view is not None:
                places.append(ReadBuffer(view, arenas[segment.batch].start))
                continue
            if not scratch:
                scratch.append(
                    Stretch(max(r.end - r.start for r in self._plan.reads) + ALIGN_BYTES)
                )
            places.append(ReadBuffer(scratch[0].view, segment.start - segment.start % ALIGN_BYTES))
        self._reader.fill(self._files[read.file], read, places, tally)

    def _through_ring(
        self, ring: StagingBuffers, read: Read, arenas: dict[int, Arena], worker: int
    ) -> None:
        """Into a slot, and from there to wherever its segments belong."""
        slot = ring.take()
        try:
            place = ReadBuffer(slot.view, read.start - read.start % ALIGN_BYTES)
            whole = Segment(batch=None, start=read.start, end=read.end)
            at_once = Read(file=read.file, piece=read.piece, segments=(whole,))
            self._reader.fill(self._files[read.file], at_once, (place,), self.tallies[worker])
            for segment in read.segments:
                if segment.batch is None or self._target is None:
                    continue
                view = slot.view[segment.start - place.start : segment.end - place.start]
                ticket = self._target.copy(arenas[segment.batch], segment.start, view, worker)
                # A worker's copies are on one stream, so the last is done when all are.
                slot.ticket = ticket
        finally:
            ring.give_back(slot, slot.ticket)


def usable_cores() -> set[int]:
    """The cores that any thread of this process may use. The one that loads may be pinned to a few
    (vLLM's CPU build pins it to one), and what it starts would be too."""
    cores = set(os.sched_getaffinity(0))
    for thread in os.listdir("/proc/self/task"):
        with suppress(OSError):
            cores |= os.sched_getaffinity(int(thread))
    return cores


def _count_reads(plan: ReadPlan) -> list[int]:
    counts = [0] * len(plan.batches)
    for read in plan.reads:
        for number in {s.batch for s in read.segments if s.batch is not None}:
            counts[number] += 1
    return counts
