"""Memory that is used again, and never while somebody still has it."""

from __future__ import annotations

import threading

import pytest

from loaders.weights.staging_buffers import BufferPool, StagingBuffers, Stretch


class Copy:
    """A copy that is over when told, or waited for."""

    def __init__(self) -> None:
        self.over = False
        self.waited = False

    def done(self) -> bool:
        return self.over

    def wait(self) -> None:
        self.waited = self.over = True


def test_a_stretch_is_at_a_page_and_writable() -> None:
    stretch = Stretch(3 * 1024 * 1024)
    assert stretch.address % 4096 == 0
    stretch.view[5:7] = b"ab"
    assert bytes(stretch.export())[4:8] == b"\0ab\0"


def test_memory_comes_back_only_when_nothing_refers_to_it() -> None:
    pool = BufferPool(0, spare_bytes=1 << 20)
    first = pool.take(5000)
    export = pool.lend(first)
    tensor_like = memoryview(export)
    assert pool.take(5000) is not first
    del export
    assert pool.take(5000) is not first
    tensor_like.release()
    del tensor_like
    assert pool.take(5000) is first


def test_the_smallest_that_fits_is_used_and_spares_are_bounded() -> None:
    pool = BufferPool(3000, spare_bytes=10_000)
    stretches = [pool.take(size) for size in (4000, 6000, 9000)]
    assert pool.take(1).size_bytes == 3000
    for stretch in reversed(stretches):
        pool.lend(stretch)  # referred to by nobody: back at once
    assert pool.take(5000) is stretches[1]
    assert pool.take(9001).size_bytes == 9001
    assert pool.take(100) is stretches[0]
    assert pool.take(100) is stretches[2]
    many = [pool.take(4000) for _ in range(5)]
    largest = pool.take(50_000)
    for stretch in (*many, largest):
        pool.lend(stretch)
    again = [pool.take(4000) for _ in range(4)]
    assert sum(stretch in many for stretch in again) == 3, "one taken and two spares"
    assert largest in again


def test_a_closed_pool_keeps_nothing() -> None:
    pool = BufferPool(0, spare_bytes=10_000)
    one, two = pool.take(100), pool.take(100)
    pool.lend(one)
    export = pool.lend(two)
    pool.close()
    del export
    assert pool.take(100) not in (one, two)


def test_a_slot_is_free_when_the_copy_out_of_it_is_done() -> None:
    ring = StagingBuffers(2, 4096)
    one, two = ring.take(), ring.take()
    assert not {id(one.view.obj)} - {id(two.view.obj)}, "one stretch for all slots"
    copies = Copy(), Copy()
    ring.give_back(one, copies[0])
    ring.give_back(two, copies[1])
    copies[1].over = True
    assert ring.take() is two, "the one whose copy is done"
    assert ring.take() is one
    assert copies[0].waited, "there was no other, so it was waited for"


def test_the_slot_used_last_is_used_next() -> None:
    ring = StagingBuffers(3, 4096)
    one, two = ring.take(), ring.take()
    ring.give_back(two)
    ring.give_back(one)
    assert ring.take() is one


@pytest.mark.timeout(20)
def test_who_finds_no_slot_waits_for_one() -> None:
    ring = StagingBuffers(1, 4096)
    slot = ring.take()
    got = []
    thread = threading.Thread(target=lambda: got.append(ring.take()))
    thread.start()
    assert got == []
    ring.give_back(slot)
    thread.join()
    assert got == [slot]


def test_pinned_memory_is_unpinned_when_no_copy_reads_it_any_more() -> None:
    events: list[str] = []
    copy = Copy()

    def pin(stretch: Stretch) -> object:
        events.append(f"pinned {stretch.size_bytes}")
        return lambda: events.append(f"unpinned, waited {copy.waited}")

    ring = StagingBuffers(2, 4096, pin)  # type: ignore[arg-type]
    ring.give_back(ring.take(), copy)
    ring.close()
    ring.close()
    assert events == ["pinned 8192", "unpinned, waited True"]
    StagingBuffers(1, 4096, lambda _: None).close()
