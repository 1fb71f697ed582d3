"""Room: a quota and a disk are never overdrawn, what is used stays, and leftovers are found."""

from __future__ import annotations

import errno
import fcntl
import os
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import pytest
from folder_store import PIECE, Rig, bytes_of, count_bytes, expect, make_room, read_tree

from modelcache.cache import ModelCache
from modelcache.store import files, leases
from modelcache.store.capacity import OTHERS, disk_free_bytes
from modelcache.types import Cancelled, InUse, NoSpace, Progress

SIZE = 16 * PIECE
ROOM_FOR_RECORDS = 16_384


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    return Rig(root=tmp_path)


def put(rig: Rig, name: str, size_bytes: int = SIZE) -> str:
    seed = int.from_bytes(name.encode()[:3])
    return rig.put(f"models/{name}", {"model.bin": bytes_of(size_bytes, seed)})


def here(cache: ModelCache, *urls: str) -> str:
    """The last letters of those that are there and right."""
    return "".join(url[-1] for url in urls if cache.find(url) is not None)


def bring(cache: ModelCache, url: str, at_s: float | None = None) -> None:
    """Preload it, and forget how long that took: chance must not order what is evicted."""
    model = cache.preload(url, expected_use_at_s=at_s)
    with cache.store.lock():
        cache.store.note_use(url, model.revision, reload_s_per_gb=None)


class Clock:
    def __init__(self, now_s: float = 1_000_000.0) -> None:
        self.now_s = now_s

    def __call__(self) -> float:
        self.now_s += 1.0
        return self.now_s


def test_what_can_never_fit_is_said_before_a_byte_is_fetched(rig: Rig) -> None:
    cache = rig.cache(quota_bytes=SIZE - 1)
    url = put(rig, "a")
    with pytest.raises(NoSpace, match=f"models/a needs .* of its quota of {SIZE - 1}"):
        cache.preload(url)
    assert rig.fetched_bytes == 0
    assert count_bytes(cache.dir) == 0, "nothing of the attempt is left"
    assert cache.ls() == []


def test_a_full_disk_is_said_before_a_byte_is_fetched(rig: Rig) -> None:
    rig.free_bytes = SIZE
    cache = rig.cache()
    url = put(rig, "a")
    with pytest.raises(NoSpace, match=f"the disk has {SIZE} free, 0 of them reserved"):
        cache.preload(url)
    assert rig.fetched_bytes == 0
    assert count_bytes(cache.dir) == 0
    rig.free_bytes = SIZE + ROOM_FOR_RECORDS
    cache.preload(url)
    assert here(cache, url) == "a"


def test_the_reserve_is_nobodys(rig: Rig) -> None:
    rig.free_bytes = SIZE + ROOM_FOR_RECORDS
    cache = rig.cache(reserve_bytes=ROOM_FOR_RECORDS)
    with pytest.raises(NoSpace, match=f"{ROOM_FOR_RECORDS} of them reserved"):
        cache.preload(put(rig, "a"))
    assert rig.fetched_bytes == 0


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_disk_that_says_so_itself_is_full_and_any_other_fault_is_told_as_it_is(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def allocate(fd: int, size_bytes: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("modelcache.store.partial_files.allocate", allocate)
    cache = rig.cache()
    with pytest.raises(OSError if code == errno.EIO else NoSpace):
        cache.preload(put(rig, "a"))
    assert rig.fetched_bytes == 0


def test_the_least_recently_used_goes_first(rig: Rig) -> None:
    rig.clock = Clock()
    cache = rig.cache(quota_bytes=3 * SIZE + 2 * ROOM_FOR_RECORDS)
    urls = [put(rig, name) for name in "abcd"]
    for url in urls[:3]:
        bring(cache, url)
    bring(cache, urls[0])  # used again
    bring(cache, urls[3])
    assert here(cache, *urls) == "acd"
    assert cache.usage().bytes_used <= 3 * SIZE + 2 * ROOM_FOR_RECORDS
    with cache.lease(cache.preload(urls[2]), "engine"):
        pass
    bring(cache, urls[1])
    assert here(cache, *urls) == "bcd"


def test_what_is_expected_last_goes_first_then_what_is_cheap(rig: Rig) -> None:
    rig.clock = Clock()
    cache = rig.cache(quota_bytes=3 * SIZE + 2 * ROOM_FOR_RECORDS)
    urls = [put(rig, name) for name in "abcd"]
    soon, late = 1_000_060.0, 1_009_000.0
    for url, at_s in zip(urls[:3], (soon, late, soon), strict=True):
        bring(cache, url, at_s)
    assert [entry.expected_use_at_s for entry in cache.ls()] == [soon, late, soon]
    bring(cache, urls[3], soon)
    assert here(cache, *urls) == "acd"
    for url, cost in zip((urls[0], urls[2], urls[3]), (5.0, 1.0, 9.0), strict=True):
        found = cache.find(url)
        assert found is not None
        with cache.store.lock():
            cache.store.note_use(url, found.revision, reload_s_per_gb=cost)
    bring(cache, urls[1])
    assert here(cache, *urls) == "abd"
    expect(cache, urls[0], None)
    assert cache.ls()[0].expected_use_at_s is None


def test_what_is_pinned_leased_or_being_fetched_never_goes(rig: Rig) -> None:
    cache = rig.cache(quota_bytes=3 * SIZE + 2 * ROOM_FOR_RECORDS)
    a, b, c, d = (put(rig, name) for name in "abcd")
    cache.preload(a)
    cache.pin(a)
    lease = cache.lease(cache.preload(b), "engine 7")

    def on_progress(progress: Progress) -> None:
        if progress.phase != "fetching" or progress.detail:
            return
        before = rig.fetched_bytes
        with pytest.raises(NoSpace, match="being fetched"):
            make_room(cache, SIZE)
        with pytest.raises(InUse, match="being fetched"):
            cache.evict(c)
        assert rig.fetched_bytes == before

    cache.preload(c, on_progress=on_progress)
    cache.pin(c)
    fetched = rig.fetched_bytes
    with pytest.raises(NoSpace) as refused:
        cache.preload(d)
    for why in ("(pinned)", "(leased by engine 7)"):
        assert why in str(refused.value)
    assert rig.fetched_bytes == fetched
    assert here(cache, a, b, c, d) == "abc"
    lease.release()
    cache.preload(d)
    assert here(cache, a, b, c, d) == "acd"


def test_shared_bytes_free_nothing_unless_all_that_have_them_go(rig: Rig) -> None:
    rig.clock = Clock()
    same = bytes_of(SIZE, 7)
    cache = rig.cache(quota_bytes=3 * SIZE + ROOM_FOR_RECORDS)
    one = rig.put("models/one", {"same.bin": same})
    two = rig.put("models/two", {"same.bin": same})
    big = put(rig, "z", 2 * SIZE)
    for url in (one, two, big):
        bring(cache, url)
    assert here(cache, one, two, big) == "eoz"
    cache.pin(two)
    # One is the oldest, and its going would not help: the pinned one has the same bytes.
    cache.preload(put(rig, "y"))
    assert here(cache, one, two, big) == "eo"


def test_adopted_bytes_free_nothing_of_the_disk(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "modelcache.fetch.fetch.link_or_clone",
        lambda source, target: os.link(source, target) or "link",
    )
    source = rig.root / "mine"
    source.mkdir()
    (source / "model.bin").write_bytes(bytes_of(SIZE, 5))
    cache = rig.cache()
    cache.preload(source.as_uri())
    rig.free_bytes = SIZE
    with pytest.raises(NoSpace):
        make_room(cache, SIZE + 1)
    assert cache.find(source.as_uri()) is not None
    # Its other name gone, it is the cache's alone.
    (source / "model.bin").unlink()
    assert make_room(cache, SIZE + 1) >= SIZE
    assert cache.ls() == []


def test_room_is_made_by_hand_and_only_as_much(rig: Rig) -> None:
    rig.clock = Clock()
    cache = rig.cache(quota_bytes=4 * SIZE)
    urls = [put(rig, name) for name in "abc"]
    for url in urls:
        bring(cache, url)
    assert make_room(cache, 100) == 0
    before = count_bytes(cache.dir)
    freed = make_room(cache, SIZE)
    assert freed == before - count_bytes(cache.dir)
    assert here(cache, *urls) == "bc"
    with pytest.raises(NoSpace, match="a test needs"):
        make_room(cache, 5 * SIZE)
    assert here(cache, *urls) == "bc", "what would not be enough goes not in part either"


def interrupt(cache: ModelCache, url: str, pieces: int = 2) -> None:
    """Fetch so many pieces and stop."""
    seen: list[Progress] = []

    def on_progress(progress: Progress) -> None:
        if progress.phase == "fetching":
            seen.append(progress)

    with pytest.raises(Cancelled):
        cache.preload(url, on_progress=on_progress, cancelled=lambda: len(seen) >= pieces)


def test_what_was_stopped_goes_on_with_the_room_it_has(rig: Rig) -> None:
    cache = rig.cache(quota_bytes=SIZE + ROOM_FOR_RECORDS)
    url = put(rig, "a")
    interrupt(cache, url)
    assert rig.fetched_bytes == 2 * PIECE
    usage = cache.usage()
    assert usage.bytes_partial >= SIZE, "all of its room is taken from the start"
    assert usage.bytes_used == count_bytes(cache.dir)
    entry = cache.ls()[0]
    assert (entry.complete, entry.size_bytes, entry.bytes_unique) == (False, SIZE, SIZE)
    rig.free_bytes = ROOM_FOR_RECORDS
    cache.preload(url)
    assert rig.fetched_bytes == SIZE
    assert cache.usage().bytes_partial == 0


def test_what_was_stopped_goes_when_others_need_the_room(rig: Rig) -> None:
    cache = rig.cache(quota_bytes=SIZE + ROOM_FOR_RECORDS)
    a, b = put(rig, "a"), put(rig, "b")
    interrupt(cache, a)
    cache.preload(b)
    assert [entry.url for entry in cache.ls()] == [b]
    assert cache.usage().bytes_partial == 0


def test_an_older_revision_that_was_stopped_does_not_count_as_being_fetched(rig: Rig) -> None:
    # The store has another revision by now: nobody will ever go on with the first.
    cache = rig.cache(quota_bytes=SIZE + ROOM_FOR_RECORDS)
    url = put(rig, "a")
    interrupt(cache, url)
    rig.put("models/a", {"model.bin": bytes_of(SIZE, 99)})
    model = cache.preload(url)
    assert read_tree(model.path) == {"model.bin": bytes_of(SIZE, 99)}
    assert [entry.revision for entry in cache.ls()] == [model.revision]


def test_what_others_keep_in_the_folder_is_not_the_models(rig: Rig) -> None:
    """It could not be evicted to make room, so it must not take any."""
    cache = rig.cache(quota_bytes=2 * SIZE)
    bring(cache, put(rig, "a"))
    before = cache.usage().bytes_used
    for name in OTHERS:
        (cache.dir / name).mkdir()
        (cache.dir / name / "file").write_bytes(bytes(5 * SIZE))
    assert cache.usage().bytes_used == before


def test_sweeping_takes_leftovers_and_nothing_else(rig: Rig) -> None:
    cache = rig.cache()
    whole, stopped = put(rig, "a"), put(rig, "b")
    model = cache.preload(whole)
    interrupt(cache, stopped)
    before = read_tree(cache.dir)
    layout = cache.store.layout
    digest = "ab" * 32
    leftovers = [
        layout.tmp / "half-written",
        layout.blob(digest),
        layout.pieces(digest),
        layout.blob("cd" * 32),
        layout.pieces("ef" * 32),
        layout.partial("f" * 40) / "data",
        layout.known("f" * 40),
        layout.snapshot("s3://models/gone", "r1") / "model.bin",
        layout.leases(whole, model.revision) / "dead",
        layout.revision("s3://models/lost", "r1") / "manifest.json",
        layout.model("s3://models/other") / "refs" / "main",
        layout.hub / "models--org--gone" / "snapshots" / "c0ffee" / "x",
    ]
    for path in leftovers:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(digest if path.parent.name == "known" else "left over")
    cache.sweep()
    assert read_tree(cache.dir) == before
    assert not any(path.exists() for path in leftovers)
    assert here(cache, whole) == "a"
    cache.preload(stopped)
    assert rig.fetched_bytes == 2 * SIZE, "what was stopped kept its pieces"


def test_what_is_open_is_not_swept(rig: Rig) -> None:
    from modelcache.store.partial_files import Partial

    cache = rig.cache()
    with Partial.open(cache.store.layout, "f" * 40, SIZE, piece_bytes=PIECE):
        cache.sweep()
        assert cache.store.layout.partial("f" * 40).is_dir()
    cache.sweep()
    assert not cache.store.layout.partial("f" * 40).exists()


def test_who_opens_a_file_while_it_is_looked_at_is_not_refused(rig: Rig) -> None:
    from modelcache.store.partial_files import JOURNAL, Partial

    layout = rig.cache().store.layout
    with Partial.open(layout, "f" * 40, SIZE, piece_bytes=PIECE):
        pass
    with ThreadPoolExecutor(1) as threads:
        with files.locked(layout.store_lock), open(layout.partial("f" * 40) / JOURNAL) as journal:
            fcntl.flock(journal, fcntl.LOCK_SH)  # as a sweep looks, with the store locked
            opening = threads.submit(Partial.open, layout, "f" * 40, SIZE, piece_bytes=PIECE)
            # Long enough to be refused; were it slower, it would be let in all the same.
            wait([opening], timeout=0.2)
        opening.result().close()


def test_the_view_of_a_lease_outlives_its_records(rig: Rig) -> None:
    # Somebody took the records away by hand; an engine still reads the directory.
    cache = rig.cache()
    model = cache.preload(put(rig, "a"))
    lease = cache.lease(model, "engine")
    for name in ("manifest.json", "manifest.copy.json"):
        (cache.store.layout.revision(model.url, model.revision) / name).unlink()
    cache.sweep()
    assert read_tree(model.path) == {"model.bin": bytes_of(SIZE, ord("a"))}
    lease.release()
    cache.sweep()
    assert not model.path.exists()
    assert leases.holders(cache.store.layout.leases(model.url, model.revision)) == ()


def test_usage_is_the_sum_of_its_files_through_everything(rig: Rig) -> None:
    cache = rig.cache(quota_bytes=1 << 30, reserve_bytes=5)
    assert cache.usage().bytes_used == 0
    assert not cache.dir.exists(), "asking makes nothing"
    a, b = put(rig, "a"), put(rig, "b", 3 * SIZE + 1)
    model = cache.preload(a)
    interrupt(cache, b)
    with cache.lease(model, "engine"):
        usage = cache.usage()
        assert usage.bytes_used == count_bytes(cache.dir)
        assert usage.bytes_blobs == SIZE + 16 * 40
        assert usage.bytes_partial >= 3 * SIZE + 1
        assert (usage.quota_bytes, usage.reserve_bytes) == (1 << 30, 5)
        assert usage.free_bytes == rig.free_bytes
    cache.pin(a)
    for url, force in ((b, False), (a, True)):
        before = count_bytes(cache.dir)
        assert cache.evict(url, force=force) == before - count_bytes(cache.dir)
        assert cache.usage().bytes_used == count_bytes(cache.dir)
    assert count_bytes(cache.dir) == 0


def test_the_disk_is_asked_below_the_nearest_directory_there_is(tmp_path: Path) -> None:
    assert disk_free_bytes(tmp_path / "not" / "yet") > 0
