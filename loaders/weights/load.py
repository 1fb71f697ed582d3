"""Loading safetensors: all at once, one after the other, or only to see whether they are whole."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loaders.weights.device import Tensor, TensorTarget, make_target, make_tensor, torch_dtype
from loaders.weights.files import (
    FileSums,
    ModelPath,
    OpenFile,
    choose_tensors,
    find_files,
    find_sums,
    opened,
    read_index,
)
from loaders.weights.in_place import InPlaceCopies, in_place_copies
from loaders.weights.pipeline import Pipeline, usable_cores
from loaders.weights.plan import (
    ALIGN_BYTES,
    BATCH_BYTES,
    READ_BYTES,
    CutDim,
    FileWant,
    ReadPlan,
    cut,
    make_plan,
    plan_check,
    usual_cut,
)
from loaders.weights.readers import How, WeightReader
from loaders.weights.staging_buffers import StagingBuffers
from modelcache.pagecache.linux_pages import count_by_cachestat
from modelcache.safetensors_index import BadFile, TensorEntry

__all__ = ["BadFile", "Loaded", "check", "in_place_copies", "iterate", "load"]

THREADS = 8
"""Reads under way at once: what a disk needs to be busy. Copying from the page cache is limited to
the number of cores besides."""
MEMORY_BYTES = 128 * 1024 * 1024
"""Host memory for bytes on their way: the staging ring, or the batches read ahead."""
BATCHES_AHEAD = 8
"""Into how many batches what is read ahead is divided; a batch is not used again before the last
of its tensors is gone."""
SLOTS_A_THREAD = 2
"""One is read into while the other is copied from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How to read. ``verify``: check pieces against their checksums (``None``: where the model
    cache has them; ``True``: or fail). ``sums`` gives checksums by path beside the cache's.
    ``staged`` sends bytes through the ring even to the CPU."""

    threads: int = THREADS
    how: How = "auto"
    memory_bytes: int = MEMORY_BYTES
    verify: bool | None = None
    sums: Mapping[str, FileSums] | None = None
    staged: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.threads <= 256:
            raise ValueError(f"threads: {self.threads} is not from 1 to 256")
        if self.memory_bytes < READ_BYTES:
            raise ValueError(f"memory_bytes: {self.memory_bytes} is less than {READ_BYTES}")
        if self.how not in ("auto", "cached", "direct"):
            raise ValueError(f"how: {self.how!r} is not auto, cached or direct")

    def find_sums(self, path: Path) -> FileSums | None:
        """The checksums to verify a file with. Raises ``BadFile`` where they must be there and are
        not."""
        if self.verify is False:
            return None
        found = (self.sums or {}).get(str(path)) or find_sums(path)
        if found is None and self.verify:
            raise BadFile("there are no checksums to verify it with", path=str(path))
        if found is not None and found.piece_bytes != READ_BYTES:
            raise BadFile(f"its checksums are of {found.piece_bytes} bytes", path=str(path))
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """One load: ``size_bytes`` were read, ``tensor_bytes`` are those of tensors, ``direct_bytes``
    went past the page cache, ``verified_bytes`` agreed with their checksums."""

    files: int
    tensors: int
    size_bytes: int
    tensor_bytes: int
    direct_bytes: int
    verified_bytes: int


class Loaded(dict[str, Tensor]):
    """Tensors by name, and the ``report`` of what was read for them."""

    def __init__(self, tensors: Mapping[str, Tensor], report: Report) -> None:
        super().__init__(tensors)
        self.report = report


def load(
    path: ModelPath,
    device: Any = "cpu",
    *,
    tensors: Collection[str] | None = None,
    rank: int = 0,
    world_size: int = 1,
    cut_dim: CutDim = usual_cut,
    verify: bool | None = None,
    threads: int = THREADS,
    **more: Any,
) -> Loaded:
    """All tensors of a model (a directory, a safetensors file, several), or those named.

    Of ``world_size`` ranks, rank ``rank`` gets its part of what ``cut_dim`` says is cut. ``more``
    are further ``Options``. Tensors that are neighbours in a file share memory, 64 MiB or so,
    which is freed with the last of them. Raises ``BadFile`` for a file that is malformed, cut
    short, changed meanwhile or damaged; ``ValueError`` for arguments that make no sense.
    """
    options = Options(verify=verify, threads=threads, **more)
    ranks = _Ranks(rank=rank, world_size=world_size, cut_dim=cut_dim)
    found: dict[str, Tensor] = {}
    reports: list[Report] = []
    for name, tensor in _tensors(
        path, device, tensors, ranks, options, ahead_bytes=None, on_report=reports.append
    ):
        found[name] = tensor
    return Loaded(found, reports[0])


def iterate(
    path: ModelPath,
    *,
    device: Any = "cpu",
    tensors: Collection[str] | None = None,
    verify: bool | None = None,
    threads: int = THREADS,
    copies: InPlaceCopies | None = None,
    **more: Any,
) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of a model, in the order of the files, read ahead by at most
    ``memory_bytes``.

    A tensor stays valid for as long as it is referred to; its memory is used again afterwards, so
    a consumer that copies each and drops it needs little. Raises as ``load`` does, when the tensor
    concerned is due.

    ``copies`` of ``in_place_copies``, for a consumer that copies tensors into CPU memory it has:
    files whose pages are cached are then copied straight there. Damage may be found only when a
    tensor is copied, or the next is due.
    """
    options = Options(verify=verify, threads=threads, **more)
    return _tensors(
        path, device, tensors, _Ranks(), options, ahead_bytes=options.memory_bytes, copies=copies
    )


def check(
    path: ModelPath, *, verify: bool | None = None, threads: int = THREADS, **more: Any
) -> Report:
    """Read a whole model and check it, keeping nothing. Raises ``BadFile`` for what is wrong."""
    options = Options(verify=verify, threads=threads, **more)
    with ExitStack() as stack:
        files, chosen = _look(stack, path, options)
        plan = plan_check(
            [FileWant(size_bytes=f.size_bytes, portions=(), verified=bool(f.sums)) for f in files]
        )
        pipeline = _make_pipeline(stack, plan, files, _make_reader(options), options, None, None)
        pipeline.run()
    return _report(chosen, plan, pipeline)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Ranks:
    rank: int = 0
    world_size: int = 1
    cut_dim: CutDim = usual_cut

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank: {self.rank} is not from 0 to {self.world_size - 1}")


def _tensors(
    path: ModelPath,
    device: Any,
    names: Collection[str] | None,
    ranks: _Ranks,
    options: Options,
    *,
    ahead_bytes: int | None,
    copies: InPlaceCopies | None = None,
    on_report: Callable[[Report], None] = lambda report: None,
) -> Iterator[tuple[str, Tensor]]:
    with ExitStack() as stack:
        files, chosen = _look(stack, path, options)
        chosen = _choose(chosen, names)
        wants = _wants(files, chosen, ranks)
        reader = _make_reader(options)

        def read(numbers: Sequence[int]) -> Iterator[tuple[str, Tensor]]:
            if not numbers:
                return iter(())
            part = [files[n] for n in numbers], [wants[n] for n in numbers]
            return _read(*part, reader, device, options, ahead_bytes, on_report)

        cold: list[int] = []
        for number, file in enumerate(files):
            warm = copies.map(file, reader) if copies is not None else None
            if copies is None or warm is None:
                cold.append(number)
                continue
            yield from read(cold)
            cold = []
            yield from copies.tensors(warm, wants[number].portions)
        yield from read(cold)


def _read(
    files: Sequence[OpenFile],
    wants: Sequence[FileWant],
    reader: WeightReader,
    device: Any,
    options: Options,
    ahead_bytes: int | None,
    on_report: Callable[[Report], None],
) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of files, read by the pipeline."""
    with ExitStack() as stack:
        batch_bytes = BATCH_BYTES if ahead_bytes is None else ahead_bytes // BATCHES_AHEAD
        plan = make_plan(wants, batch_bytes=batch_bytes)
        target = make_target(
            device,
            # Kept tensors' memory is just what they need; what is used again is all of one size.
            usual_bytes=0 if ahead_bytes is None else batch_bytes + 2 * ALIGN_BYTES,
            spare_bytes=ahead_bytes or 0,
            workers=options.threads,
            staged=options.staged,
        )
        # Closed in this order: the pipeline's threads, the ring's copies, the target.
        stack.callback(target.close)
        pipeline = _make_pipeline(stack, plan, files, reader, options, target, ahead_bytes)
        batches = pipeline.batches()
        stack.callback(batches.close)  # type: ignore[attr-defined]
        for arena in batches:
            path_text = str(files[arena.batch.file].path)
            for portion in arena.batch.portions:
                try:
                    tensor = make_tensor(arena, portion)
                except BadFile as error:
                    raise BadFile(error.message, path=path_text) from None
                yield portion.name, tensor
                del tensor
            del arena
    on_report(_report([want.portions for want in wants], plan, pipeline))


def _look(
    stack: ExitStack, path: ModelPath, options: Options
) -> tuple[list[OpenFile], list[tuple[TensorEntry, ...]]]:
    """A model's files, open, and the tensors to take from each."""
    found = find_files(path)
    files = stack.enter_context(opened(found, options.find_sums))
    indexes = [read_index(file) for file in files]
    return files, choose_tensors(found, files, indexes)


def _choose(
    chosen: Sequence[tuple[TensorEntry, ...]], names: Collection[str] | None
) -> list[tuple[TensorEntry, ...]]:
    if names is None:
        return list(chosen)
    wanted = frozenset(names)
    missing = wanted - {entry.name for entries in chosen for entry in entries}
    if missing:
        raise ValueError(f"tensors: there is no {min(missing)!r}")
    return [tuple(entry for entry in entries if entry.name in wanted) for entries in chosen]


def _wants(
    files: Sequence[OpenFile], chosen: Sequence[tuple[TensorEntry, ...]], ranks: _Ranks
) -> list[FileWant]:
    """What is wanted of each file, by this rank. Raises ``BadFile``."""
    wants = []
    for file, entries in zip(files, chosen, strict=True):
        portions = []
        for entry in entries:
            try:
                torch_dtype(entry.dtype)
            except BadFile as error:
                raise BadFile(f"{error.message} ({entry.name!r})", path=str(file.path)) from None
            dim = ranks.cut_dim(entry.name, entry.shape) if ranks.world_size > 1 else None
            portions.append(cut(entry, dim, ranks.rank, ranks.world_size))
        wants.append(
            FileWant(size_bytes=file.size_bytes, portions=tuple(portions), verified=bool(file.sums))
        )
    return wants


def _make_reader(options: Options) -> WeightReader:
    return WeightReader(
        how=options.how,
        count_cached=count_by_cachestat,
        turns=threading.Semaphore(_count_copiers(options)),
    )


def _count_copiers(options: Options) -> int:
    """Threads that copy out of the page cache at once."""
    return min(len(usable_cores()), options.threads)


def _make_pipeline(
    stack: ExitStack,
    plan: ReadPlan,
    files: Sequence[OpenFile],
    reader: WeightReader,
    options: Options,
    target: TensorTarget | None,
    ahead_bytes: int | None,
) -> Pipeline:
    """The pipeline of a load, with a staging ring where one is needed."""
    ring: StagingBuffers | None = None
    if target is None or target.staged:
        most = max(1, options.memory_bytes // READ_BYTES)
        slots = min(options.threads * SLOTS_A_THREAD, most, max(1, len(plan.reads)))
        ring = StagingBuffers(slots, READ_BYTES, target.lock_memory if target else None)
        stack.callback(ring.close)
    return Pipeline(
        plan=plan,
        files=files,
        reader=reader,
        target=target,
        ring=ring,
        threads=options.threads,
        copiers=_count_copiers(options),
        ahead_bytes=ahead_bytes,
    )


def _report(chosen: Sequence[Sequence[object]], plan: ReadPlan, pipeline: Pipeline) -> Report:
    return Report(
        files=len(chosen),
        tensors=sum(len(entries) for entries in chosen),
        size_bytes=plan.read_bytes,
        tensor_bytes=plan.tensor_bytes,
        direct_bytes=sum(tally.direct_bytes for tally in pipeline.tallies),
        verified_bytes=sum(tally.verified_bytes for tally in pipeline.tallies),
    )
