"""The pump: any plan, any number of threads, little room: every byte where it belongs."""

from __future__ import annotations

import os
import random
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors_files import sums_of

from loaders.weights import plan as plans
from loaders.weights.device import Arena
from loaders.weights.files import OpenFile, find_files, opened
from loaders.weights.pipeline import Pipeline
from loaders.weights.plan import ALIGN_BYTES, Batch, FileWant, Portion, make_plan
from loaders.weights.readers import How, WeightReader
from loaders.weights.staging_buffers import StagingBuffers, Stretch, Ticket
from modelcache.safetensors_index import BadFile

GRID = 8 * ALIGN_BYTES


class Memory:
    """Batches in plain memory; ``most_open`` is how many were open at once."""

    def __init__(self, *, staged: bool, fail_at: int | None = None) -> None:
        self.staged = staged
        self.fail_at = fail_at
        self.opened: list[Batch] = []

    def open(self, batch: Batch) -> Arena:
        if len(self.opened) == self.fail_at:
            raise MemoryError("no more")
        self.opened.append(batch)
        start = batch.start - batch.start % ALIGN_BYTES
        end = -(-batch.end // ALIGN_BYTES) * ALIGN_BYTES
        view = Stretch(max(end - start, 1)).view
        return Arena(batch=batch, start=start, base=view, view=view)

    def copy(self, arena: Arena, start: int, view: memoryview, worker: int) -> Ticket | None:
        assert self.staged
        arena.base[start - arena.start : start - arena.start + len(view)] = view
        return None

    def finish(self, arena: Arena) -> None:
        pass

    def lock_memory(self, stretch: Stretch) -> Callable[[], None] | None:
        return None

    def close(self) -> None:
        pass


def bytes_of(arena: Arena, portion: Portion) -> bytes:
    return bytes(arena.base[portion.start - arena.start : portion.end - arena.start])


def portions_of(sizes: list[int], wanted: list[bool], at: int) -> tuple[Portion, ...]:
    found = []
    for size, keep in zip(sizes, wanted, strict=True):
        if keep:
            found.append(Portion(name=f"{at}", dtype="U8", shape=(size,), start=at, end=at + size))
        at += size
    return tuple(found)


@contextmanager
def a_pump(
    files: list[OpenFile],
    wants: list[FileWant],
    *,
    staged: bool = False,
    threads: int = 3,
    ahead_bytes: int | None = None,
    how: How = "auto",
    target: Memory | None = None,
    batch_bytes: int = 5 * ALIGN_BYTES,
    make_reader: type[WeightReader] = WeightReader,
) -> Iterator[Pipeline]:
    plan = make_plan(wants, batch_bytes=batch_bytes, read_bytes=GRID, gap_bytes=100)
    yield Pipeline(
        plan=plan,
        files=files,
        reader=make_reader(how=how, count_cached=lambda *_: None, turns=threading.Semaphore(2)),
        target=target or Memory(staged=staged),
        ring=StagingBuffers(2, GRID) if staged else None,
        threads=threads,
        copiers=min(2, threads),
        ahead_bytes=ahead_bytes,
    )


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    staged=st.booleans(),
    how=st.sampled_from(["auto", "cached", "direct"]),
    threads=st.integers(1, 6),
    ahead_bytes=st.sampled_from([None, 1, 30_000, 200_000]),
)
def test_every_tensor_has_its_bytes(
    seed: int, staged: bool, how: How, threads: int, ahead_bytes: int | None
) -> None:
    chance = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        contents, paths, wants = [], [], []
        for number in range(chance.randint(1, 3)):
            size = chance.choice([0, 1, chance.randint(0, 200_000)])
            path = Path(folder, f"{number}")
            contents.append(chance.randbytes(size))
            path.write_bytes(contents[-1])
            paths.append(path)
            at = chance.randint(0, size)
            sizes = []
            while at + sum(sizes) < size and chance.random() < 0.9:
                sizes.append(chance.randint(0, min(40_000, size - at - sum(sizes))))
            wanted = [chance.random() < 0.8 for _ in sizes]
            wants.append(FileWant(size_bytes=size, portions=portions_of(sizes, wanted, at)))
        with opened(find_files(paths), lambda _: None) as files, a_pump(
            files, wants, staged=staged, threads=threads, ahead_bytes=ahead_bytes, how=how
        ) as pump:  # fmt: skip
            got = [
                (arena.batch.file, portion, bytes_of(arena, portion))
                for arena in pump.batches()
                for portion in arena.batch.portions
            ]
    assert [(f, p) for f, p, _ in got] == [(n, p) for n, w in enumerate(wants) for p in w.portions]
    assert all(data == contents[f][p.start : p.end] for f, p, data in got)


@pytest.fixture
def one_file(tmp_path: Path) -> Iterator[tuple[Path, list[OpenFile], list[FileWant]]]:
    path = tmp_path / "x"
    path.write_bytes(random.Random(1).randbytes(40 * GRID))
    os.utime(path, (1, 1))  # a file's clock may tick no finer than some milliseconds
    with opened(find_files(path), lambda _: None) as files:
        portions = portions_of([GRID] * 40, [True] * 40, 0)
        yield path, files, [FileWant(size_bytes=40 * GRID, portions=portions)]


def test_it_runs_no_further_ahead_than_it_may(one_file: Any) -> None:
    _, files, wants = one_file
    target = Memory(staged=False)
    with a_pump(
        files, wants, target=target, ahead_bytes=3 * GRID, batch_bytes=GRID
    ) as pump:  # fmt: skip
        for taken, _ in enumerate(pump.batches(), start=1):
            assert len(target.opened) <= taken + 3
    assert len(target.opened) == 40


def test_a_consumer_that_stops_leaves_no_thread_behind(one_file: Any) -> None:
    _, files, wants = one_file
    with a_pump(files, wants, ahead_bytes=2 * GRID) as pump:
        batches = pump.batches()
        next(batches)
        batches.close()  # type: ignore[attr-defined]
    assert not [t for t in threading.enumerate() if t.name.startswith("loader-")]


def test_what_a_thread_runs_into_is_raised_to_the_consumer(one_file: Any) -> None:
    _, files, wants = one_file
    with (
        a_pump(files, wants, target=Memory(staged=False, fail_at=7)) as pump,
        pytest.raises(MemoryError, match="no more"),
    ):
        list(pump.batches())
    assert not [t for t in threading.enumerate() if t.name.startswith("loader-")]


def consume(pump: Pipeline, meanwhile: Callable[[], object], *, after: int = 3) -> int:
    """Take all batches, and do something after some; returns how many were taken."""
    taken = 0
    for _ in pump.batches():
        taken += 1
        if taken == after:
            meanwhile()
    return taken


def write_over(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(b"x")


@pytest.mark.parametrize("how", ["cached", "direct"])
def test_a_file_cut_short_meanwhile_is_an_error(one_file: Any, how: How) -> None:
    path, files, wants = one_file
    with a_pump(files, wants, ahead_bytes=2 * GRID, how=how) as pump, pytest.raises(BadFile):
        consume(pump, lambda: os.truncate(path, 20 * GRID + 17))


def test_a_file_written_to_meanwhile_is_an_error(one_file: Any) -> None:
    path, files, wants = one_file
    with a_pump(files, wants, ahead_bytes=2 * GRID) as pump, pytest.raises(BadFile, match="change"):
        consume(pump, lambda: write_over(path))


def test_even_after_the_last_tensor(one_file: Any) -> None:
    path, files, wants = one_file
    with a_pump(files, wants) as pump:
        total = consume(pump, lambda: None)
    with a_pump(files, wants) as pump, pytest.raises(BadFile, match="changed"):
        consume(pump, lambda: write_over(path), after=total)


def test_another_file_in_its_place_is_an_error(one_file: Any, tmp_path: Path) -> None:
    path, files, wants = one_file
    other = tmp_path / "y"
    other.write_bytes(path.read_bytes())
    with a_pump(files, wants) as pump, pytest.raises(BadFile, match="changed"):
        consume(pump, lambda: other.replace(path))


@settings(max_examples=20, deadline=None)
@given(at=st.integers(0, 2 * plans.READ_BYTES + 4999), bit=st.integers(0, 7), staged=st.booleans())
def test_a_flipped_bit_is_caught_wherever_it_is(at: int, bit: int, staged: bool) -> None:
    """Two pieces and a bit; whichever tensors are wanted, all of their pieces are checked."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "x")
        size = 2 * plans.READ_BYTES + 5000
        data = bytearray(size)
        sums = sums_of(bytes(data))
        data[at] ^= 1 << bit
        path.write_bytes(data)
        with opened(find_files(path), lambda _: sums) as files:
            piece = at // plans.READ_BYTES
            start = piece * plans.READ_BYTES
            wanted = Portion(name="t", dtype="U8", shape=(9,), start=start + 7, end=start + 16)
            want = FileWant(size_bytes=size, portions=(wanted,), verified=True)
            pump = Pipeline(
                plan=make_plan([want]),
                files=files,
                reader=WeightReader(
                    how="auto", count_cached=lambda *_: None, turns=threading.Semaphore(2)
                ),
                target=Memory(staged=staged),
                ring=StagingBuffers(2, plans.READ_BYTES) if staged else None,
                threads=2,
                copiers=2,
                ahead_bytes=None,
            )
            with pytest.raises(BadFile, match="damaged") as caught:
                list(pump.batches())
            assert (caught.value.piece, caught.value.path) == (piece, str(path))


@pytest.mark.parametrize(("how", "most"), [("cached", 2), ("direct", 6)])
def test_only_as_many_threads_as_cores_copy_out_of_the_page_cache(
    tmp_path: Path, how: How, most: int
) -> None:
    """What is read past the cache is for all of them. The rest of a plan is theirs as well."""
    path = tmp_path / "x"
    path.write_bytes(bytes(40 * GRID))
    seen: set[str] = set()
    together = threading.Event()

    class Patient(WeightReader):
        def fill(self, *given: Any) -> None:
            seen.add(threading.current_thread().name)
            if len(seen) > 2:
                together.set()
            # So that every thread that may gets one, however late it comes to run.
            together.wait(60.0 if how == "direct" else 0.002)
            super().fill(*given)

    size = path.stat().st_size
    portion = Portion(name="t", dtype="U8", shape=(size,), start=0, end=size)
    want = FileWant(size_bytes=size, portions=(portion,), verified=False)
    with (
        opened(find_files(path), lambda _: None) as files,
        a_pump(files, [want], threads=6, how=how, batch_bytes=size, make_reader=Patient) as pump,
    ):
        list(pump.batches())
    assert len(seen) <= most
    if how == "direct":
        assert len(seen) > 2
    else:
        assert {"loader-0", "loader-1"} & seen
