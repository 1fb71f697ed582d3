"""Host memory that is used again: fresh memory costs more than what is read into it.

A ``Stretch`` is memory at a page boundary. ``StagingBuffers`` are a fixed number of slots for bytes
on their way to a device. The ``BufferPool`` gives out stretches that become tensors' own memory,
and takes each back when the last tensor in it is gone: a consumer that copies what it gets and
moves on runs in the same memory all the way, and one that keeps tensors simply keeps them.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import threading
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

HUGE_PAGE_BYTES = 2 * 1024 * 1024


class Ticket(Protocol):
    """A copy under way out of a slot."""

    def done(self) -> bool:
        """Whether it is over."""

    def wait(self) -> None:
        """Until it is over."""


class Stretch:
    """``size_bytes`` of memory at a page boundary, zeroed by the kernel when first touched."""

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self.memory = mmap.mmap(-1, max(size_bytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if size_bytes >= HUGE_PAGE_BYTES:
            # A page fault for every 4 KiB takes longer than reading them.
            with contextlib.suppress(OSError):
                self.memory.madvise(mmap.MADV_HUGEPAGE)
        self.view = memoryview(self.memory)

    def export(self) -> Any:
        """An object that has this memory as its buffer and can be asked when it is gone."""
        return (ctypes.c_char * len(self.memory)).from_buffer(self.memory)

    @property
    def address(self) -> int:
        """Where it begins."""
        return ctypes.addressof(ctypes.c_char.from_buffer(self.memory))


class BufferPool:
    """Stretches to be tensors' memory, of ``usual_bytes`` or what is asked if that is more. At
    most ``spare_bytes`` of given-back ones are kept, and the largest in any case."""

    def __init__(self, usual_bytes: int, spare_bytes: int) -> None:
        self._usual_bytes = usual_bytes
        self._spare_bytes = spare_bytes
        # Stretches come back wherever a tensor dies, maybe inside of one of our own locks, so
        # only what is atomic may be done then: appending.
        self._back: deque[Stretch] = deque()
        self._open = True

    def take(self, size_bytes: int) -> Stretch:
        """A stretch of at least that size: the smallest that is there, else a new one.

        One thread at a time may take.
        """
        spare = []
        while self._back:
            spare.append(self._back.popleft())
        spare.sort(key=lambda stretch: stretch.size_bytes)
        best = next((s for s in spare if s.size_bytes >= size_bytes), None)
        kept_bytes = 0
        for stretch in spare:
            if stretch is best:
                continue
            kept_bytes += stretch.size_bytes
            if kept_bytes <= self._spare_bytes or stretch is spare[-1]:
                self._back.append(stretch)
        return best or Stretch(max(size_bytes, self._usual_bytes))

    def lend(self, stretch: Stretch) -> Any:
        """The buffer of ``stretch``, which comes back when nothing refers to the buffer."""
        export = stretch.export()
        final = weakref.finalize(export, self._give_back, stretch)
        final.atexit = False
        return export

    def close(self) -> None:
        """Keep nothing from now on."""
        self._open = False
        self._back.clear()

    def _give_back(self, stretch: Stretch) -> None:
        if self._open:
            self._back.append(stretch)


@dataclass(slots=True, eq=False)
class Slot:
    """A slot of the ring; ``ticket`` is the copy that is still reading from it."""

    view: memoryview
    ticket: Ticket | None = None


class StagingBuffers:
    """``slots`` slots of ``slot_bytes`` each in one stretch of memory.

    ``lock_memory`` may pin the stretch for a device; what it returns undoes that.
    """

    def __init__(
        self,
        slots: int,
        slot_bytes: int,
        lock_memory: Callable[[Stretch], Callable[[], None] | None] | None = None,
    ) -> None:
        self._stretch = Stretch(slots * slot_bytes)
        self._unlock = lock_memory(self._stretch) if lock_memory else None
        view = self._stretch.view
        self._free = deque(Slot(view[i * slot_bytes : (i + 1) * slot_bytes]) for i in range(slots))
        self._changed = threading.Condition()

    def take(self) -> Slot:
        """A slot that is neither read nor written; waits for one."""
        with self._changed:
            while not self._free:
                self._changed.wait()
            slot = self._choose()
        if slot.ticket is not None:
            slot.ticket.wait()
            slot.ticket = None
        return slot

    def give_back(self, slot: Slot, ticket: Ticket | None = None) -> None:
        """``slot`` is free once ``ticket`` is done."""
        slot.ticket = ticket
        with self._changed:
            self._free.append(slot)
            self._changed.notify()

    def close(self) -> None:
        """Wait for the copies under way, and unlock the memory."""
        for slot in self._free:
            if slot.ticket is not None:
                slot.ticket.wait()
        if self._unlock is not None:
            self._unlock()
            self._unlock = None

    def _choose(self) -> Slot:
        """The one used last whose copy is done, because the processor still has it in its caches;
        else the one whose copy began first."""
        for back in range(len(self._free) - 1, -1, -1):
            slot = self._free[back]
            if slot.ticket is None or slot.ticket.done():
                del self._free[back]
                return slot
        return self._free.popleft()
