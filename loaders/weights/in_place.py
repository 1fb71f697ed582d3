"""Copies out of warm files, made by reading straight to where they go.

vLLM takes weights one by one and copies each, or a part of it, to where the model has it. A tensor
of a file whose pages are all cached need not be read for that: it is a piece of a mapping of the
file, and while ``in_place_copies`` holds, torch's ``copy_`` out of it is done by ``pread`` into the
destination, on several threads, hashed there while it is in the processor's caches. So bytes are
copied once, and what is checked is what the model has. All else that torch does with such a tensor
reads the mapping, and then what no copy has hashed is read for its checksum.

A process that touches a mapping of a file that was cut short is ended (``SIGBUS``). Files are
mapped only under a read lease, by which the kernel lets no one write or cut them meanwhile; where
it gives none (another's file, one open for writing, a network's), the file is not mapped.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import signal
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

import xxhash

from loaders.weights.device import Arena, Tensor, make_tensor
from loaders.weights.files import OpenFile
from loaders.weights.pipeline import usable_cores
from loaders.weights.plan import READ_BYTES, Batch, Portion
from loaders.weights.readers import STEP_BYTES, ReadBuffer, WeightReader
from modelcache.pagecache.linux_pages import COUNTERS, PAGE_BYTES
from modelcache.safetensors_index import BadFile

WARM_FRACTION = 0.99
"""Part of a file that must be cached for it to be warm."""
PART_BYTES = 2 * 1024 * 1024
"""What a thread copies at a time where nothing is checked; with checksums it is their piece."""
MOST_THREADS = 8
"""More than a processor's memory takes."""


@contextmanager
def in_place_copies() -> Iterator[InPlaceCopies]:
    """While this lasts, this thread's ``copy_`` from tensors of the yielded object's files to the
    CPU are made by reading; all others are torch's own."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    copy_ = torch.ops.aten.copy_.default
    copies = InPlaceCopies()

    class Copying(TorchDispatchMode):  # type: ignore[misc]
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if types:  # tensors that are not made of plain memory
                return func(*args, **(kwargs or {}))
            if func is copy_ and copies.copy(args[0], args[1]):
                return args[0]
            if func._schema.is_mutable:
                copies.note_written(_written(func, args, kwargs or {}))
            return func(*args, **(kwargs or {}))

    try:
        with Copying():
            yield copies
    finally:
        copies.close()


class InPlaceCopies:
    """The warm files being copied from."""

    def __init__(self) -> None:
        self._files: list[WarmFile] = []
        self._helpers = _Helpers()

    def map(self, file: OpenFile, reader: WeightReader) -> WarmFile | None:
        """``file`` if it is warm and stays as it is: no one else can write it from now on, until it
        is closed and the last tensor of it gone."""
        if reader.how == "direct":
            return None
        counts = (count(file.fd, 0, file.size_bytes) for count in COUNTERS)
        cached = next((pages for pages in counts if pages is not None), 0)
        if cached * PAGE_BYTES < WARM_FRACTION * file.size_bytes or not _lease(file.fd):
            return None
        try:
            return WarmFile(file, reader, self._helpers)
        except OSError:  # more than the system promises to a process
            return None

    def tensors(self, warm: WarmFile, portions: Sequence[Portion]) -> Iterator[tuple[str, Tensor]]:
        """Names and tensors of a file. What no copy has checked is checked when the next tensor is
        asked for, or the next that has bytes of the same piece. Raises ``BadFile``."""
        self._files.append(warm)
        try:
            for portion, following in zip_longest(portions, portions[1:]):
                yield portion.name, warm.make_tensor(portion)
                warm.check(portion, following)
        finally:
            self._files.remove(warm)

    def copy(self, to: Tensor, source: Tensor) -> bool:
        """Fill ``to`` from the file that ``source`` lies in. ``False``: nothing was done, because
        it is in none, was written to, or the copy is not one of bytes."""
        warm = self._find(source)
        if warm is None or not _is_copy_of_bytes(to, source) or warm.was_written(source):
            return False
        warm.copy(source.data_ptr() - warm.address, _memory(to))
        return True

    def note_written(self, tensors: Sequence[Tensor]) -> None:
        """What is changed in memory must be copied from there."""
        for tensor in tensors:
            warm = self._find(tensor)
            if warm is not None:
                warm.written.append(_extent(tensor))

    def close(self) -> None:
        """End the threads."""
        self._helpers.close()

    def _find(self, tensor: Tensor) -> WarmFile | None:
        if not self._files or not _is_plain(tensor):
            return None
        address = tensor.data_ptr()
        return next(
            (w for w in self._files if w.address <= address < w.address + w.file.size_bytes), None
        )


class WarmFile:
    """A mapped file, and how far each of its pieces is hashed; ``written`` are the addresses that
    are not as in the file any more.

    One thread at a time may call this; a piece is then one helper's for the time of the call, so
    nothing here is locked.
    """

    def __init__(self, file: OpenFile, reader: WeightReader, helpers: _Helpers) -> None:
        import torch

        # Private and writable, because torch has no tensors that cannot be written to.
        memory = mmap.mmap(file.fd, file.size_bytes, access=mmap.ACCESS_COPY)
        self.file = file
        self._view = memoryview(memory)
        self._base = torch.frombuffer(memory, dtype=torch.uint8)
        self.address: int = self._base.data_ptr()
        self.written: list[tuple[int, int]] = []
        self._reader = reader
        self._helpers = helpers
        self._pieces: dict[int, _Piece] = {}

    def make_tensor(self, portion: Portion) -> Tensor:
        """The tensor of ``portion``. Raises ``BadFile``, also where another process changed the
        file or waits to do so."""
        if fcntl.fcntl(self.file.fd, fcntl.F_GETLEASE) != fcntl.F_RDLCK:
            raise BadFile("changed while it was read", path=str(self.file.path))
        self.file.check_unchanged()
        batch = Batch(file=0, start=0, end=self.file.size_bytes, portions=(portion,))
        try:
            return make_tensor(
                Arena(batch=batch, start=0, base=self._base, view=self._view), portion
            )
        except BadFile as error:
            raise BadFile(error.message, path=str(self.file.path)) from None

    def was_written(self, tensor: Tensor) -> bool:
        """Whether memory of ``tensor`` is not as in the file any more."""
        start, end = _extent(tensor)
        return any(start < written[1] and written[0] < end for written in self.written)

    def copy(self, start: int, to: memoryview) -> None:
        """Fill ``to`` from byte ``start`` on. Raises ``BadFile``."""
        end = start + len(to)
        grid = READ_BYTES if self.file.sums else PART_BYTES
        cells = range(start // grid, -(-end // grid))
        place = ReadBuffer(to, start)
        self._helpers.share(
            self._fill,
            [(max(start, cell * grid), min(end, (cell + 1) * grid), place) for cell in cells],
        )

    def check(self, portion: Portion, following: Portion | None) -> None:
        """Check the pieces ``portion`` has bytes of, but for one that ``following`` has, too. Of
        each, what no copy has hashed is read for that. Raises ``BadFile``."""
        sums = self.file.sums
        if sums is None:
            return
        last = min((max(portion.end, portion.start + 1) - 1) // READ_BYTES, len(sums.xxh3) - 1)
        numbers = set(range(portion.start // READ_BYTES, last + 1))
        if following is not None:
            numbers.discard(following.start // READ_BYTES)
        ends = {number: sums.cover(number * READ_BYTES + 1) for number in numbers}
        self._helpers.share(
            self._fill,
            [(end, end, None) for number, end in ends.items() if self._piece(number).at < end],
        )

    def _fill(self, start: int, end: int, place: ReadBuffer | None) -> None:
        """Bytes of one cell of the grid to ``place``; hashed as far as the piece goes on there,
        and before them what it lacks."""
        sums = self.file.sums
        if sums is None:
            assert place is not None
            self._reader.copy_cached(self.file, start, end, place)
            return
        number = (end - 1) // READ_BYTES
        piece = self._piece(number)
        while piece.at < start:
            self._skip(piece, min(piece.at + STEP_BYTES, start))
        if place is not None:
            again = min(max(piece.at, start), end)  # up to here it was hashed before
            self._reader.copy_cached(self.file, start, again, place)
            self._reader.copy_cached(self.file, again, end, place, piece.hasher)
        piece.at = max(piece.at, end)
        if piece.at == sums.cover(end):
            with self._reader.errors_of(self.file):
                sums.check(number, piece.hasher.intdigest())

    def _skip(self, piece: _Piece, until: int) -> None:
        scratch = ReadBuffer(memoryview(bytearray(until - piece.at)), piece.at)
        self._reader.copy_cached(self.file, piece.at, until, scratch, piece.hasher)
        piece.at = until

    def _piece(self, number: int) -> _Piece:
        return self._pieces.setdefault(number, _Piece(at=number * READ_BYTES))


class _Helpers:
    """Threads that do a part of what the one that loads does. With it there is one a core, up to
    ``MOST_THREADS``."""

    def __init__(self) -> None:
        cores = usable_cores()
        self._count = min(MOST_THREADS, len(cores)) - 1
        self._threads = ThreadPoolExecutor(
            max_workers=max(self._count, 1),
            thread_name_prefix="loader",
            initializer=_use_cores,
            initargs=(cores,),
        )

    def share(self, work: Callable[..., None], parts: Sequence[tuple[Any, ...]]) -> None:
        """Do ``work`` with each of ``parts``; raises the first error."""
        left = deque(parts)

        def work_on() -> None:
            while True:
                try:
                    part = left.popleft()
                except IndexError:
                    return
                work(*part)

        others = [self._threads.submit(work_on) for _ in range(min(len(parts) - 1, self._count))]
        try:
            work_on()
        finally:
            # Waited for, whatever this thread ran into: they write to the caller's memory.
            errors = [other.exception() for other in others]
        for error in errors:
            if error is not None:
                raise error

    def close(self) -> None:
        """End them."""
        self._threads.shutdown()


@dataclass(slots=True)
class _Piece:
    """One piece of the checksums' grid, hashed up to byte ``at`` of the file."""

    at: int
    hasher: xxhash.xxh3_64 = field(default_factory=xxhash.xxh3_64)


def _lease(fd: int) -> bool:
    """Have the kernel keep others from writing to an open file; it goes when the file is closed and
    no longer mapped."""
    try:
        # That another waits to write is told by a signal, which is ignored; SIGIO would end us.
        fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGURG)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
    except OSError:
        return False
    return True


def _is_plain(tensor: Tensor) -> bool:
    """Whether it lies in this process's memory, element by element."""
    return tensor.device.type == "cpu" and str(tensor.layout) == "torch.strided"


def _is_copy_of_bytes(to: Tensor, source: Tensor) -> bool:
    return bool(
        _is_plain(to)
        and to.dtype == source.dtype
        and to.shape == source.shape
        and source.numel()
        and all(
            t.is_contiguous() and not t.is_conj() and not t.is_neg() for t in (to, source)
        )
    )  # fmt: skip


def _written(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """The tensors that an operator changes."""
    found: list[Tensor] = []
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[place] if place < len(args) else kwargs.get(argument.name)
            found += value if isinstance(value, list | tuple) else [value]
    return [tensor for tensor in found if tensor is not None]


def _extent(tensor: Tensor) -> tuple[int, int]:
    """The addresses of a tensor's first byte and of the one behind its last."""
    elements = 1 + sum(
        (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
    return tensor.data_ptr(), tensor.data_ptr() + max(elements, 0) * tensor.element_size()


def _memory(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor."""
    size_bytes = tensor.numel() * tensor.element_size()
    return memoryview((ctypes.c_char * size_bytes).from_address(tensor.data_ptr())).cast("B")


def _use_cores(cores: set[int]) -> None:
    """The thread that loads may be pinned to one core, and threads it starts are then, too."""
    with suppress(OSError):
        os.sched_setaffinity(0, cores)
