"""Which bytes to read, in which order, and where each belongs.

Neighbouring tensors form a *batch*: they get one stretch of memory, in which they lie as they do
in the file, so that one read fills many and none needs a copy. Reads follow a grid of pieces (the
unit of checksums, and a size disks like); a read that meets the border of two batches has a
*segment* for each. Threads take reads from the front of one list, whatever file they are of, so
none is ever left with less to do than another.

A tensor-parallel rank reads only its rows of what is cut along the first dimension. What is cut
along another one is read whole: its parts are too short and too many to be worth a read each.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from modelcache.safetensors_index import DTYPE_BITS, TensorEntry

ALIGN_BYTES = 4096
"""What offset, length and memory of a read past the page cache are multiples of."""
READ_BYTES = 8 * 1024 * 1024
"""Bytes of one read at most, and the grid of them: the piece of modelcache.types, so that what is
read is what has a checksum."""
BATCH_BYTES = 64 * 1024 * 1024
"""Bytes of a batch at most, unless one tensor has more."""
GAP_BYTES = 256 * 1024
"""Unwanted bytes between two tensors that are read rather than left out: less than what another
read costs."""

CutDim = Callable[[str, tuple[int, ...]], int | None]
"""Along which dimension a tensor of this name and shape is cut between ranks; ``None``: every rank
has all of it."""

BY_COLUMN = r"(q|k|v|qkv|gate|up|gate_up)_proj|w1|w3|wq|wk|wv|embed_tokens|lm_head"
BY_ROW = r"(o|down)_proj|w2|wo"


@dataclass(frozen=True, slots=True, kw_only=True)
class Portion:
    """What is wanted of one tensor: its bytes ``start`` to ``end`` of the file, a tensor of
    ``shape``, of which (``narrow``: dimension, start, length) may be wanted only a part."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int
    narrow: tuple[int, int, int] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Neighbours in one file (``file`` is its number) that share a stretch of memory."""

    file: int
    start: int
    end: int
    portions: tuple[Portion, ...]

    @property
    def size_bytes(self) -> int:
        """Bytes from the first to the last."""
        return self.end - self.start


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """Bytes of a file that go to one batch (its number), or, ``None``, only into the checksum."""

    batch: int | None
    start: int
    end: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Read:
    """What one thread does at a time. Its segments touch each other and are in order; ``piece``
    is the index of the piece they amount to, ``None`` where nothing is to be checked."""

    file: int
    piece: int | None
    segments: tuple[Segment, ...]

    @property
    def start(self) -> int:
        """The first byte."""
        return self.segments[0].start

    @property
    def end(self) -> int:
        """The byte after the last."""
        return self.segments[-1].end


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadPlan:
    """Everything to read. Batches are in the order in which they are wanted, and so are reads."""

    batches: tuple[Batch, ...]
    reads: tuple[Read, ...]

    @property
    def read_bytes(self) -> int:
        """Bytes that are read, checksums' included."""
        return sum(read.end - read.start for read in self.reads)

    @property
    def tensor_bytes(self) -> int:
        """Bytes of what is wanted, before narrowing."""
        return sum(p.end - p.start for batch in self.batches for p in batch.portions)


@dataclass(frozen=True, slots=True, kw_only=True)
class FileWant:
    """What is wanted of one file of ``size_bytes``; ``verified`` if whole pieces are checked."""

    size_bytes: int
    portions: tuple[Portion, ...]
    verified: bool = False


def usual_cut(name: str, shape: tuple[int, ...]) -> int | None:
    """How Llama-like models are cut: projections into attention and MLP, embeddings and output by
    rows, projections back by columns, all else whole."""
    layer, _, kind = name.rpartition(".")
    if kind not in ("weight", "bias") or not shape:
        return None
    last = layer.rpartition(".")[2]
    if re.fullmatch(BY_COLUMN, last):
        return 0
    if re.fullmatch(BY_ROW, last) and kind == "weight" and len(shape) > 1:
        return 1
    return None


def cut(entry: TensorEntry, dim: int | None, rank: int, world_size: int) -> Portion:
    """What rank ``rank`` of ``world_size`` wants of a tensor cut along ``dim``.

    Raises ``ValueError`` where that dimension cannot be divided evenly.
    """
    whole = Portion(
        name=entry.name, dtype=entry.dtype, shape=entry.shape, start=entry.start, end=entry.end
    )
    if dim is None or world_size == 1:
        return whole
    if not 0 <= dim < len(entry.shape):
        raise ValueError(f"tensor {entry.name!r} of shape {entry.shape} has no dimension {dim}")
    length, left = divmod(entry.shape[dim], world_size)
    row_bits = DTYPE_BITS[entry.dtype] * math.prod(entry.shape[dim + 1 :])
    if left or row_bits * length % 8:
        raise ValueError(
            f"tensor {entry.name!r} of shape {entry.shape} cannot be cut into {world_size} along "
            f"dimension {dim}"
        )
    if math.prod(entry.shape[:dim]) != 1:
        narrow = (dim, rank * length, length)
        return Portion(
            name=entry.name, dtype=entry.dtype, shape=entry.shape, start=entry.start,
            end=entry.end, narrow=narrow,
        )  # fmt: skip
    part = row_bits * length // 8
    return Portion(
        name=entry.name,
        dtype=entry.dtype,
        shape=(*entry.shape[:dim], length, *entry.shape[dim + 1 :]),
        start=entry.start + rank * part,
        end=entry.start + (rank + 1) * part,
    )


def make_plan(
    files: Sequence[FileWant],
    *,
    batch_bytes: int = BATCH_BYTES,
    read_bytes: int = READ_BYTES,
    gap_bytes: int = GAP_BYTES,
) -> ReadPlan:
    """The batches and reads that bring what is wanted of ``files``, numbered as they come."""
    batches: list[Batch] = []
    reads: list[Read] = []
    for number, file in enumerate(files):
        first = len(batches)
        batches += _group(number, file.portions, batch_bytes, gap_bytes)
        spans = [
            Segment(batch=first + i, start=batch.start, end=batch.end)
            for i, batch in enumerate(batches[first:])
            if batch.size_bytes
        ]
        reads += _on_grid(number, spans, file, read_bytes)
    return ReadPlan(batches=tuple(batches), reads=tuple(reads))


def plan_check(files: Sequence[FileWant], *, read_bytes: int = READ_BYTES) -> ReadPlan:
    """Reads of every byte of ``files``, for nothing but their checksums (or their speed)."""
    reads: list[Read] = []
    for number, file in enumerate(files):
        for start in range(0, file.size_bytes, read_bytes):
            end = min(start + read_bytes, file.size_bytes)
            piece = start // read_bytes if file.verified else None
            segment = Segment(batch=None, start=start, end=end)
            reads.append(Read(file=number, piece=piece, segments=(segment,)))
    return ReadPlan(batches=(), reads=tuple(reads))


def _group(
    file: int, portions: Iterable[Portion], batch_bytes: int, gap_bytes: int
) -> Iterator[Batch]:
    group: list[Portion] = []

    def batch() -> Batch:
        return Batch(file=file, start=group[0].start, end=group[-1].end, portions=tuple(group))

    for portion in sorted(portions, key=lambda one: (one.start, one.end)):
        # What is narrowed is copied out of its batch, whose memory goes then: keep it apart.
        if group and (
            portion.end - group[0].start > batch_bytes
            or portion.start - group[-1].end > gap_bytes
            or (portion.narrow is None) != (group[-1].narrow is None)
        ):
            yield batch()
            group = []
        group.append(portion)
    if group:
        yield batch()


def _on_grid(
    number: int, spans: Sequence[Segment], file: FileWant, read_bytes: int
) -> Iterator[Read]:
    """Reads of ``spans``, cut where the grid is. A verified file's are whole pieces."""
    cells: dict[int, list[Segment]] = {}
    for span in spans:
        at = span.start
        while at < span.end:
            cell = at // read_bytes
            end = min(span.end, (cell + 1) * read_bytes)
            cells.setdefault(cell, []).append(Segment(batch=span.batch, start=at, end=end))
            at = end
    for cell, segments in cells.items():
        if file.verified:
            end = min((cell + 1) * read_bytes, file.size_bytes)
            whole = tuple(_fill(segments, cell * read_bytes, end))
            yield Read(file=number, piece=cell, segments=whole)
        else:
            for run in _runs(segments):
                yield Read(file=number, piece=None, segments=tuple(run))


def _fill(segments: Sequence[Segment], start: int, end: int) -> Iterator[Segment]:
    """``segments`` with what lies between, before and after them."""
    for segment in segments:
        if segment.start > start:
            yield Segment(batch=None, start=start, end=segment.start)
        yield segment
        start = segment.end
    if start < end:
        yield Segment(batch=None, start=start, end=end)


def _runs(segments: Sequence[Segment]) -> Iterator[list[Segment]]:
    """``segments`` in groups whose members touch."""
    run: list[Segment] = []
    for segment in segments:
        if run and segment.start != run[-1].end:
            yield run
            run = []
        run.append(segment)
    if run:
        yield run
