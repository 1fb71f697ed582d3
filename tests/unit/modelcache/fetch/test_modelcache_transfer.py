"""Downloads from one store: whole and right whatever fails, bounded, and quick to end."""

from __future__ import annotations

import itertools
import math
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from swarm_rig import PATIENT, FailingTimes, MemorySource, make_alone, make_content, make_node

from modelcache.ports import RangeRead
from modelcache.sources.retry import pause
from modelcache.store.partial_files import read_progress
from modelcache.types import PIECE_BYTES, CacheError, Cancelled, Damaged, Progress, SourceError

MIB = 1 << 20


def small_model() -> dict[str, bytes]:
    return {
        "model.safetensors": make_content(5 * PIECE_BYTES + 12_345),
        "config.json": b"{}",
        "empty": b"",
        "exact.bin": make_content(2 * PIECE_BYTES, seed=2),
    }


def test_every_file_arrives_whole_and_every_piece_is_read_once(tmp_path: Path) -> None:
    source = MemorySource(small_model())
    node = make_alone(tmp_path)
    node.fetch(source)
    for path, data in source.files.items():
        assert node.read(source, path) == data
    assert set(source.reads.values()) == {1}
    totals = node.transfer.totals()
    assert totals.store_bytes == sum(map(len, source.files.values()))
    assert (totals.peer_bytes, totals.wasted_bytes, totals.retries) == (0, 0, 0)


def test_what_is_there_already_is_not_read_again(tmp_path: Path) -> None:
    source = MemorySource({"w": make_content(6 * PIECE_BYTES)})
    node = make_alone(tmp_path)
    (file, partial), *_ = node.open(source)
    with partial:
        node.transfer.run(source, [(file, partial)])
    source.reads.clear()
    (file, partial), *_ = node.open(source)
    with partial:
        node.transfer.run(source, [(file, partial)])
    assert not source.reads


def test_connections_and_memory_are_bounded_over_all_models(tmp_path: Path) -> None:
    # 8 MiB of memory is four ranges, whatever the number of connections.
    node = make_alone(tmp_path, connections=16, memory_bytes=PIECE_BYTES)
    source = MemorySource({f"f{n}": make_content(PIECE_BYTES, n) for n in range(6)})
    source.rate_bytes_s = 100 * MIB
    node.fetch(source)
    assert source.most_at_once <= 4

    few = make_alone(tmp_path / "few", connections=3)
    source.most_at_once = 0
    opened = few.open(source)
    threads = [
        threading.Thread(target=few.transfer.run, args=(source, opened[n : n + 2]))
        for n in (0, 2, 4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert all(not partial.missing() for _, partial in opened)
    assert source.most_at_once <= 3


def test_a_line_that_breaks_costs_a_retry_and_not_the_model(tmp_path: Path) -> None:
    source = MemorySource(small_model(), before=FailingTimes(2))
    node = make_alone(tmp_path, retries=2)
    node.fetch(source)
    assert node.read(source, "model.safetensors") == source.files["model.safetensors"]
    assert set(source.reads.values()) == {3}
    assert node.transfer.totals().retries == 2 * len(source.reads)


def test_used_up_retries_are_the_stores_own_error(tmp_path: Path) -> None:
    source = MemorySource({"w": make_content(3 * PIECE_BYTES)}, before=FailingTimes(9))
    node = make_alone(tmp_path, retries=1, connections=1)
    with pytest.raises(SourceError, match="the line broke"):
        node.fetch(source)
    assert max(source.reads.values()) == 2


def test_an_error_that_asking_again_cannot_mend_ends_it_at_once(tmp_path: Path) -> None:
    source = MemorySource({"w": make_content(PIECE_BYTES)})
    source.before = FailingTimes(1, retryable=False)
    with pytest.raises(SourceError, match="the line broke"):
        make_alone(tmp_path).fetch(source)
    assert source.reads.total() == 1


def test_an_error_that_nobody_has_foreseen_ends_it_too(tmp_path: Path) -> None:
    def broken(path: str, index: int) -> None:
        raise RuntimeError("a library's own")

    source, node = (
        MemorySource({"w": make_content(PIECE_BYTES)}, before=broken),
        make_alone(tmp_path),
    )
    errors: list[BaseException] = []

    def fetch() -> None:
        try:
            node.fetch(source)
        except CacheError as error:
            errors.append(error)

    fetching = threading.Thread(target=fetch, daemon=True)
    fetching.start()
    fetching.join(20)
    assert [str(error) for error in errors] == [
        f"fetching {source.ref.url} failed: RuntimeError: a library's own"
    ]


def test_called_off_it_ends_and_goes_on_later_where_it_was(tmp_path: Path) -> None:
    source = MemorySource({"w": make_content(6 * PIECE_BYTES)})
    source.rate_bytes_s = 80 * MIB
    node = make_alone(tmp_path, connections=2)
    (file, partial), *_ = node.open(source)
    with partial:
        with pytest.raises(Cancelled):
            node.transfer.run(
                source, [(file, partial)], cancelled=lambda: len(partial.missing()) <= 4
            )
        left = partial.missing()
        assert 0 < len(left) <= 4
        assert source.at_once == 0
    source.rate_bytes_s = None
    source.reads.clear()
    node.fetch(source)
    # At most a piece for each connection was under way when it ended.
    assert source.reads.total() == len(left)
    assert node.read(source, "w") == source.files["w"]


def test_called_off_within_pieces_no_byte_that_came_is_fetched_again(tmp_path: Path) -> None:
    total = 4 * PIECE_BYTES + 3 * MIB
    source = MemorySource({"w": make_content(total)}, publishes=False)
    source.rate_bytes_s = 20 * MIB
    seen: list[Progress] = []
    came = threading.Event()

    def tell(progress: Progress) -> None:
        seen.append(progress)
        if progress.bytes_done > 6 * MIB:
            came.set()

    first = make_alone(tmp_path, connections=5)
    with pytest.raises(Cancelled):
        first.fetch(source, on_progress=tell, cancelled=came.is_set)
    before = first.transfer.totals()
    assert before.store_bytes >= 6 * MIB, "and no piece of them was whole"
    assert before.wasted_bytes == 0
    told_bytes = seen[-1].bytes_done
    seen.clear()
    source.rate_bytes_s = None
    second = make_alone(tmp_path, connections=5)
    second.fetch(source, on_progress=seen.append)
    assert second.read(source, "w") == source.files["w"]
    totals = second.transfer.totals()
    assert before.store_bytes + totals.store_bytes == total
    assert totals.wasted_bytes == 0
    assert told_bytes <= seen[0].bytes_done <= seen[-1].bytes_done == total


def test_what_came_of_a_piece_that_takes_long_outlives_the_process(tmp_path: Path) -> None:
    source = MemorySource({"w": make_content(PIECE_BYTES)})
    now_s = itertools.count(step=1.5)
    node = make_alone(tmp_path, clock=lambda: next(now_s))
    left: list[int] = []
    source.after = lambda path, index: left.extend(
        read_progress(path) for path in (tmp_path / "partial").iterdir()
    )
    node.fetch(source)
    # As a kill at the end of the piece would have left it.
    assert left[0] >= PIECE_BYTES - 2 * MIB


def test_a_connection_that_breaks_within_a_piece_costs_none_of_what_came(tmp_path: Path) -> None:
    source = MemorySource({"w": make_content(PIECE_BYTES)})
    moved: list[tuple[int, int]] = []
    read = source.read

    def breaking(want: RangeRead, index: int, nth: int) -> None:
        moved.append((want.start, want.end))
        if nth == 1:
            read(replace(want, end=3 * MIB), index, nth)
            raise SourceError("the connection broke", retryable=True)
        read(want, index, nth)

    source.read = breaking  # type: ignore[method-assign]
    node = make_alone(tmp_path, retries=2)
    node.fetch(source)
    assert node.read(source, "w") == source.files["w"]
    assert moved == [(0, PIECE_BYTES), (3 * MIB, PIECE_BYTES)]
    assert node.transfer.totals().wasted_bytes == 0


def test_what_came_before_the_file_was_another_counts_for_nothing(tmp_path: Path) -> None:
    source = MemorySource({"w": make_content(PIECE_BYTES)})

    def changed(path: str, index: int) -> None:
        raise SourceError("it has changed since it was listed")

    source.after = changed
    node = make_alone(tmp_path)
    with pytest.raises(SourceError):
        node.fetch(source)
    source.after = lambda path, index: None
    node.fetch(source)
    assert node.transfer.totals().store_bytes == PIECE_BYTES


def test_a_wait_for_bandwidth_ends_when_it_is_called_off(tmp_path: Path) -> None:
    source = MemorySource({"w": make_content(4 * PIECE_BYTES)})
    node = make_alone(tmp_path, bandwidth_bytes_s=65_536)
    called_off = threading.Event()
    source.before = lambda path, index: called_off.set()
    with pytest.raises(Cancelled):
        node.fetch(source, cancelled=called_off.is_set)


def test_progress_grows_to_the_whole_and_tells_the_rate(tmp_path: Path) -> None:
    source = MemorySource(small_model())
    source.rate_bytes_s = 80 * MIB
    seen: list[Progress] = []
    make_alone(tmp_path, connections=2).fetch(source, on_progress=seen.append)
    total = sum(map(len, source.files.values()))
    assert {one.bytes_total for one in seen} == {total}
    assert [one.bytes_done for one in seen] == sorted(one.bytes_done for one in seen)
    assert seen[-1].bytes_done == total
    assert seen[-1].rate_bytes_s
    assert {one.phase for one in seen} == {"fetching"}


def test_progress_does_not_go_back_when_a_piece_is_read_again(tmp_path: Path) -> None:
    """The first reading of one piece breaks off at its end, after it was told of."""
    source = MemorySource({"w": make_content(4 * PIECE_BYTES)})
    source.rate_bytes_s = 40 * MIB
    broken: list[int] = []

    def arrived(path: str, index: int) -> None:
        if index == 1 and not broken:
            broken.append(index)
            told = len(seen)
            for _ in range(3_000):
                if len(seen) >= told + 2:
                    break
                time.sleep(0.01)
            raise SourceError("the connection broke", retryable=True)

    source.after = arrived
    seen: list[Progress] = []
    make_alone(tmp_path, connections=2).fetch(source, on_progress=seen.append)
    assert broken == [1]
    assert [one.bytes_done for one in seen] == sorted(one.bytes_done for one in seen)
    assert seen[-1].bytes_done == 4 * PIECE_BYTES


def test_what_was_kept_of_a_piece_on_its_way_is_told_once(tmp_path: Path) -> None:
    source = MemorySource({"w": make_content(PIECE_BYTES)})
    seen: list[Progress] = []
    told: list[int] = []

    def look(path: str, index: int, nth: int, chunk: int) -> float:
        if chunk == 6:
            enough = len(seen) + 2
            for _ in range(3_000):
                if len(seen) >= enough:
                    break
                time.sleep(0.01)
            told.append(seen[-1].bytes_done)
        return 0.0

    source.chunk_s = look
    now_s = itertools.count(step=1.5)
    node = make_alone(tmp_path, clock=lambda: next(now_s))
    node.fetch(source, on_progress=seen.append)
    assert told == [6 * MIB]


# -- slow lines and slow connections ---------------------------------------------------------------

SMALL = {f"{n}.json": b"{}" * 50 for n in range(8)}


def test_small_files_say_nothing_of_how_long_a_large_piece_takes(tmp_path: Path) -> None:
    """All connections are slow alike, and the small files came in no time."""
    source = MemorySource(SMALL | {f"w{n}": make_content(PIECE_BYTES, n) for n in range(4)})
    source.chunk_s = lambda path, index, nth, chunk: 5.0 if path.startswith("w") else 0.0
    node = make_alone(tmp_path, clock=source.clock)
    node.fetch(source)
    totals = node.transfer.totals()
    assert (totals.retries, totals.wasted_bytes) == (0, 0)
    assert set(source.reads.values()) == {1}


Chunk = Callable[[int, int], float]


@pytest.mark.parametrize("slow", [(7,), (0, 1)], ids=["the last", "two of the first"])
@pytest.mark.parametrize(
    "chunk_s",
    [
        lambda nth, chunk: math.inf if nth == 1 else 1.0,
        lambda nth, chunk: math.inf if (nth, chunk) == (1, 4) else 1.0,
    ],
    ids=["hangs at once", "hangs halfway"],
)
def test_a_connection_far_slower_than_the_others_is_cut_at_the_end(
    slow: tuple[int, ...], chunk_s: Chunk, tmp_path: Path
) -> None:
    source = MemorySource(SMALL | {"w": make_content(8 * PIECE_BYTES)})

    def wait_s(path: str, index: int, nth: int, chunk: int) -> float:
        if path != "w":
            return 0.0
        return chunk_s(nth, chunk) if index in slow else 1.0

    source.chunk_s = wait_s
    # A cut is not one of the retries, which are for failures.
    node = make_alone(tmp_path, clock=source.clock, connections=4, retries=0)
    node.fetch(source)
    assert node.read(source, "w") == source.files["w"]
    assert {index for (_, index), count in source.reads.items() if count > 1} == set(slow)
    assert node.transfer.totals().retries == len(slow)


def test_a_piece_that_is_slow_each_time_is_cut_a_few_times_at_most(tmp_path: Path) -> None:
    source = MemorySource({"w": make_content(6 * PIECE_BYTES)})

    def wait_s(path: str, index: int, nth: int, chunk: int) -> float:
        if index:
            return 0.5
        return math.inf if nth == 1 else 10.0

    source.chunk_s = wait_s
    node = make_alone(tmp_path, clock=source.clock, connections=4, retries=50)
    node.fetch(source)
    assert 1 < source.reads["w", 0] <= 3
    assert node.read(source, "w") == source.files["w"]


def test_a_line_that_stalls_as_a_whole_is_waited_for(tmp_path: Path) -> None:
    """The last two pieces are under way when nothing comes any more for a while."""
    source = MemorySource({"w": make_content(8 * PIECE_BYTES)})
    source.chunk_s = lambda path, index, nth, chunk: 50.0 if index > 5 and chunk == 4 else 0.5
    node = make_alone(tmp_path, clock=source.clock, connections=6)
    node.fetch(source)
    totals = node.transfer.totals()
    assert (totals.retries, totals.wasted_bytes) == (0, 0)


def test_small_pieces_of_a_peer_say_nothing_of_how_long_a_large_one_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = MemorySource(SMALL | {"w": make_content(PIECE_BYTES)})
    has = make_node(tmp_path / "a")
    node = make_node(
        tmp_path / "b", peers=(has.url,), serve=False,
        timeouts=replace(PATIENT, slow_s=0.1, lost_s=0.2),
    )  # fmt: skip
    assert has.group is not None
    assert node.group is not None
    limits_s: dict[int, list[float]] = {}
    ask = node.group.fetch

    def fetch(*given: object, timeout_s: float, **more: object) -> bytes | None:
        size_bytes = len(given[3])  # type: ignore[arg-type]
        limits_s.setdefault(size_bytes, []).append(timeout_s)
        if size_bytes == PIECE_BYTES:
            time.sleep(0.6)
        return ask(*given, timeout_s=60.0, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(node.group, "fetch", fetch)
    try:
        has.fetch(source)
        source.reads.clear()
        node.fetch(source)
        assert not source.reads
        assert node.transfer.totals().peer_bytes == sum(map(len, source.files.values()))
        # No piece of its size has come yet, so it is not known to be lost soon.
        assert limits_s[PIECE_BYTES][0] == 32.0
    finally:
        has.close()
        node.close()


# -- what goes wrong -------------------------------------------------------------------------------


def test_wrong_content_is_noticed_when_the_file_is_whole(tmp_path: Path) -> None:
    source = MemorySource({"w": make_content(2 * PIECE_BYTES)})
    listed = source.list().files[0]
    source.files["w"] = make_content(2 * PIECE_BYTES, seed=3)
    node = make_alone(tmp_path)
    (_, partial), *_ = node.open(source)
    with partial:
        node.transfer.run(source, [(listed, partial)])
        with pytest.raises(Damaged, match="sha256"):
            partial.finish(listed.digests)


def test_a_full_disk_is_told_as_one(tmp_path: Path) -> None:
    def full(path: str, index: int) -> None:
        raise OSError(28, "No space left on device")

    source = MemorySource({"w": make_content(PIECE_BYTES)}, before=full)
    with pytest.raises(Exception, match="w cannot be written: No space left on device"):
        make_alone(tmp_path).fetch(source)


def test_a_thread_that_hangs_is_left_behind_and_commits_nothing_later(tmp_path: Path) -> None:
    inside, release = threading.Event(), threading.Event()

    def hang(path: str, index: int) -> None:
        inside.set()
        release.wait(60)

    source = MemorySource({"w": make_content(PIECE_BYTES)}, before=hang)
    node = make_alone(tmp_path, timeouts=replace(PATIENT, join_s=0.05))
    (file, partial), *_ = node.open(source)
    with pytest.raises(Cancelled):
        node.transfer.run(source, [(file, partial)], cancelled=inside.is_set)
    partial.close()
    hung = [thread for thread in threading.enumerate() if thread.name == "source"]
    assert hung
    release.set()
    for thread in hung:
        thread.join(30)
    (_, partial), *_ = node.open(source)
    with partial:
        assert partial.missing() == [0]


def test_pauses_grow_are_never_the_same_and_end_somewhere() -> None:
    assert [pause(n, 1.0) for n in range(4)] == [0.2, 0.4, 0.8, 1.6]
    assert pause(3, 0.0) == 0.8
    assert pause(1_000, 1.0) == 10.0
    assert pause(0, 1.0, asked_s=7.0) == 7.0
    assert pause(0, 1.0, asked_s=1e9) == 60.0
