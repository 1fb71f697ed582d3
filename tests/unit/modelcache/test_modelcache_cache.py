"""The cache's face: what is asked of it, and what it says."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from folder_store import PIECE, Rig, bytes_of, count_bytes, read_tree

from modelcache.cache import ModelCache
from modelcache.ports import RangeRead
from modelcache.store import files
from modelcache.store.lookup import read_fetching
from modelcache.types import (
    CacheError,
    Cancelled,
    InUse,
    ModelRef,
    NoSpace,
    NotFound,
    Progress,
    SourceError,
    Tier,
)

WEIGHTS = bytes_of(4 * PIECE + 9, 1)
FILES = {"model.safetensors": WEIGHTS, "config.json": b"{}", "sub/vocab.txt": b"a b"}
SIZE = sum(map(len, FILES.values()))


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    return Rig(root=tmp_path)


@pytest.fixture
def cache(rig: Rig) -> ModelCache:
    return rig.cache()


@pytest.fixture
def url(rig: Rig) -> str:
    return rig.put("models/a", FILES)


def test_a_model_is_brought_once(rig: Rig, cache: ModelCache, url: str) -> None:
    assert cache.find(url) is None
    assert not cache.dir.exists(), "looking makes nothing"
    model = cache.preload(url)
    assert read_tree(model.path) == FILES
    assert model.note == ""
    assert cache.find(url) == model == rig.cache().find(url)
    assert cache.preload(url) == model
    assert rig.fetched_bytes == SIZE
    assert cache.usage().bytes_used == count_bytes(cache.dir)


def test_a_cache_is_listed_as_it_is(rig: Rig, cache: ModelCache, url: str) -> None:
    rig.clock = lambda: 50.0
    assert cache.ls() == []
    model = cache.preload(url, expected_use_at_s=77.0)
    (entry,) = cache.ls()
    assert (entry.url, entry.revision, entry.size_bytes) == (url, model.revision, SIZE)
    assert (entry.complete, entry.pinned, entry.leases) == (True, False, ())
    assert (entry.used_at_s, entry.expected_use_at_s) == (50.0, 77.0)
    assert entry.bytes_unique == SIZE
    assert entry.tier in (Tier.PAGED, Tier.ON_DISK)


def test_a_name_that_moves_is_asked_for_and_an_exact_revision_is_not(
    rig: Rig, cache: ModelCache, url: str
) -> None:
    first = cache.preload(url, revision="main")
    asked = len(rig.sources)
    assert cache.preload(url, revision=first.revision) == first
    assert len(rig.sources) == asked
    rig.put("models/a", {**FILES, "config.json": b"[]"})
    assert cache.find(url, "main") == first, "nobody has asked yet"
    second = cache.preload(url, revision="main")
    assert len(rig.sources) == asked + 1
    assert second.revision != first.revision
    assert cache.find(url, "main") == second
    assert cache.find(url, first.revision) == first
    assert read_tree(first.path) == FILES
    assert rig.fetched_bytes == SIZE + 2, "only what has changed"
    assert len(cache.ls()) == 2
    assert cache.find(url, "v3") is None


@pytest.mark.parametrize("fails", ["down", "shut"])
def test_where_the_store_cannot_be_asked_what_is_here_is_used(
    rig: Rig, cache: ModelCache, url: str, fails: str
) -> None:
    model = cache.preload(url)
    setattr(rig, fails, True)
    offline = cache.preload(url, expected_use_at_s=9.0)
    assert offline.path == model.path
    assert offline.note == (
        f"revision {model.revision} from this disk; its source cannot be asked: the line is dead"
    )
    assert cache.ls()[0].expected_use_at_s == 9.0
    with pytest.raises(SourceError, match="the line is dead"):
        cache.preload("s3://models/never")
    cache.evict(url)
    with pytest.raises(SourceError, match="the line is dead"):
        cache.preload(url)


def test_where_the_store_says_there_is_none_that_is_the_answer(
    rig: Rig, cache: ModelCache, url: str
) -> None:
    cache.preload(url)
    for path in (rig.models / "models" / "a", rig.models / "models" / "moved"):
        if path.name == "a":
            path.rename(path.with_name("moved"))
        with pytest.raises(NotFound, match="no such model"):
            cache.preload(url)
    assert cache.find(url) is not None, "what is here can still be used"
    with pytest.raises(NotFound, match="no revision v9"):
        cache.preload("s3://models/moved", revision="v9")


@pytest.mark.parametrize("text", ["", "ftp://x/y", "s3://u:p@models/a", "s3://models/../a"])
def test_what_is_no_model_is_a_value_error(cache: ModelCache, text: str) -> None:
    for ask in (cache.preload, cache.find, cache.evict, cache.pin, cache.verify):
        with pytest.raises(ValueError):
            ask(text)  # type: ignore[operator]


def test_only_the_files_wanted_are_brought(rig: Rig, url: str) -> None:
    model = rig.cache(files={url: ["!*.safetensors"]}).preload(url)
    assert set(read_tree(model.path)) == {"config.json", "sub/vocab.txt"}
    assert rig.fetched_bytes == SIZE - len(WEIGHTS)
    more = rig.cache(files={url: ["*.safetensors"]}).preload(url)
    assert read_tree(more.path) == FILES
    assert rig.fetched_bytes == SIZE
    # Asking for fewer loses none: somebody may use the others.
    cache = rig.cache(files={url: ["config.json"]})
    fewer = cache.preload(url)
    assert read_tree(fewer.path) == FILES
    assert rig.fetched_bytes == SIZE
    assert cache.usage().bytes_used == count_bytes(cache.dir)


def test_settings_say_which_files_are_wanted(rig: Rig, url: str) -> None:
    cache = rig.cache(files={url: ["*.safetensors", "*.json"]})
    model = cache.preload(url)
    assert set(read_tree(model.path)) == {"model.safetensors", "config.json"}
    all_but = rig.cache("other", files={f"{url}/": ["!sub/*"]})
    assert read_tree(all_but.preload(url).path) == read_tree(model.path)


def test_more_files_of_an_exact_revision_are_brought(rig: Rig, url: str) -> None:
    revision = rig.cache(files={url: ["config.json"]}).preload(url).revision
    model = rig.cache(files={url: ["sub/*"]}).preload(url, revision=revision)
    assert set(read_tree(model.path)) == {"config.json", "sub/vocab.txt"}


def test_no_file_wanted_is_an_error(rig: Rig, url: str) -> None:
    cache = rig.cache(files={url: ["nothing*", "!x"]})
    with pytest.raises(CacheError, match=r"none of its 3 files .* nothing\*, !x"):
        cache.preload(url)
    assert count_bytes(cache.dir) == 0


def test_files_of_this_machine_are_linked_and_not_copied(
    rig: Rig, cache: ModelCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Where blocks can be shared, two files have the same ones; a link is easier to see.
    monkeypatch.setattr("modelcache.store.files.clone", lambda source, target: False)
    folder = rig.root / "mine"
    (folder / "sub").mkdir(parents=True)
    for path, data in FILES.items():
        (folder / path).write_bytes(data)
    modes = {path: (folder / path).stat().st_mode for path in FILES}
    model = cache.preload(folder.as_uri())
    assert read_tree(model.path) == FILES
    assert rig.fetched_bytes == 0
    assert (model.path / "model.safetensors").samefile(folder / "model.safetensors")
    assert {path: (folder / path).stat().st_mode for path in FILES} == modes, "still theirs"
    cache.evict(folder.as_uri())
    assert read_tree(folder) == FILES


def test_a_plain_directory_is_used_where_it_lies(rig: Rig, cache: ModelCache) -> None:
    folder = rig.root / "plain"
    folder.mkdir()
    model = cache.preload(str(folder))
    assert (model.path, model.manifest, model.revision) == (folder, None, "in place")
    assert cache.find(str(folder)) == model
    assert not cache.dir.exists()
    with pytest.raises(NotFound, match="is not a directory"):
        cache.preload(str(rig.root / "none"))
    with pytest.raises(NotFound, match="used where it lies"):
        cache.pin(str(folder))
    assert rig.sources == []


def test_a_directory_comes_before_a_hubs_model_of_its_name(
    rig: Rig, cache: ModelCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(rig.root)
    rig.put("org/name", {"a": b"1"})
    assert cache.preload("org/name").url == "hf://org/name"
    (rig.root / "org" / "name").mkdir(parents=True)
    assert cache.preload("org/name").manifest is None
    assert cache.preload("hf://org/name").manifest is not None


def test_a_pinned_model_stays_unless_it_is_forced(cache: ModelCache, url: str) -> None:
    with pytest.raises(NotFound):
        cache.pin(url)
    cache.preload(url)
    cache.pin(url)
    cache.pin(url)
    assert cache.ls()[0].pinned
    with pytest.raises(InUse, match="is pinned"):
        cache.evict(url)
    cache.unpin(url)
    assert not cache.ls()[0].pinned
    cache.pin(url)
    assert cache.evict(url, force=True) > SIZE
    for ask in (cache.evict, cache.unpin, cache.verify):
        with pytest.raises(NotFound, match="is not on this disk"):
            ask(url)  # type: ignore[operator]
    cache.preload(url)
    assert not cache.ls()[0].pinned, "a pin goes with what was pinned"


def test_one_revision_is_evicted_or_all(rig: Rig, cache: ModelCache, url: str) -> None:
    revisions = []
    for text in (b"1", b"2", b"3"):
        rig.put("models/a", {**FILES, "config.json": text})
        revisions.append(cache.preload(url, revision="main").revision)
    cache.pin(url, revisions[0])
    assert [entry.revision for entry in cache.ls() if entry.pinned] == [revisions[0]]
    cache.evict(url, revision="main")
    assert {entry.revision for entry in cache.ls()} == set(revisions[:2])
    cache.unpin(url)
    cache.evict(url)
    assert cache.ls() == []
    assert count_bytes(cache.dir) == 0


def test_a_directory_made_here_becomes_a_model(rig: Rig, cache: ModelCache) -> None:
    made = rig.root / "made"
    (made / "sub").mkdir(parents=True)
    for path, data in FILES.items():
        (made / path).write_bytes(data)
    name = "prepared://abc"
    model = cache.publish(made, url=name, revision="r1")
    assert read_tree(model.path) == FILES
    assert rig.fetched_bytes == 0
    assert cache.find(name) == cache.find(name, "r1") == model
    assert cache.publish(made, url=name, revision="r1") == model
    assert cache.usage().bytes_used == count_bytes(cache.dir)
    with cache.lease(model, "engine"), pytest.raises(InUse):
        cache.evict(name)
    for path in FILES:
        (made / path).unlink()
    assert read_tree(model.path) == FILES
    cache.evict(name)
    assert count_bytes(cache.dir) == 0


def test_an_empty_directory_is_no_model(rig: Rig, cache: ModelCache) -> None:
    (rig.root / "made").mkdir()
    with pytest.raises(CacheError, match="no files"):
        cache.publish(rig.root / "made", url="prepared://abc", revision="r1")


def test_how_far_it_is_can_be_asked_from_anywhere(rig: Rig, cache: ModelCache, url: str) -> None:
    other = rig.cache()
    asked: list[Progress | None] = []
    told: list[Progress] = []

    def on_progress(progress: Progress) -> None:
        told.append(progress)
        if progress.phase == "fetching":
            asked.append(read_fetching(other.store, url))

    assert read_fetching(other.store, url) is None
    cache.preload(url, on_progress=on_progress)
    assert told[0] == Progress(phase="listing")
    fetching = [progress for progress in told if progress.phase == "fetching"]
    assert [progress.bytes_done for progress in fetching] == sorted(
        progress.bytes_done for progress in fetching
    )
    assert fetching[-1].bytes_done == fetching[-1].bytes_total == SIZE
    assert asked == fetching, "journals say the same as whoever fetches"
    assert read_fetching(other.store, url) is None


def test_how_far_it_is_does_not_tell_of_an_older_revision(
    rig: Rig, cache: ModelCache, url: str
) -> None:
    calls: list[Progress] = []
    with pytest.raises(Cancelled):
        cache.preload(url, on_progress=calls.append, cancelled=lambda: len(calls) > 4)
    assert read_fetching(cache.store, url) is None
    for seed in range(6):  # the names of revisions are chance, and so is their order
        rig.put("models/a", {"model.safetensors": bytes_of(2 * PIECE, seed)})
        totals = set()

        def on_progress(progress: Progress, totals: set[int | None] = totals) -> None:
            found = read_fetching(cache.store, url)
            if progress.phase == "fetching" and found is not None:
                totals.add(found.bytes_total)

        cache.preload(url, on_progress=on_progress)
        assert totals == {2 * PIECE}


def test_what_was_stopped_goes_on(rig: Rig, cache: ModelCache, url: str) -> None:
    seen: list[Progress] = []
    with pytest.raises(Cancelled):
        cache.preload(url, on_progress=seen.append, cancelled=lambda: len(seen) > 5)
    there = rig.fetched_bytes
    assert 0 < there < SIZE
    assert cache.find(url) is None
    assert not cache.ls()[0].complete
    model = rig.cache().preload(url, on_progress=seen.append)
    assert read_tree(model.path) == FILES
    # What was written of the piece that it was stopped in comes again.
    assert SIZE <= rig.fetched_bytes < SIZE + PIECE
    assert cache.usage().bytes_used == count_bytes(cache.dir)


def test_a_store_that_fails_on_the_way_costs_what_was_not_there_yet(
    rig: Rig, cache: ModelCache, url: str
) -> None:
    def fail(want: RangeRead) -> None:
        if want.start >= 2 * PIECE:
            raise SourceError("reset by peer", retryable=True)

    rig.before = fail
    with pytest.raises(SourceError, match="reset by peer"):
        cache.preload(url)
    rig.before = lambda want: None
    assert read_tree(cache.preload(url).path) == FILES
    assert rig.fetched_bytes == SIZE, "every byte came once"


def test_a_model_at_its_own_pace_is_measured(rig: Rig, cache: ModelCache, url: str) -> None:
    model = cache.preload(url)
    from modelcache.store.records import read_use

    use = read_use(cache.store.layout.revision(url, model.revision))
    assert use.reload_s_per_gb is not None
    assert use.reload_s_per_gb > 0
    assert rig.sources == [ModelRef(url=url, scheme="s3", location="models/a")]


def test_a_full_disk_is_said_with_what_can_be_freed_and_keeps_nobody_from_what_is_here(
    rig: Rig, cache: ModelCache, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = cache.preload(url, revision="main")
    other = rig.put("models/b", {"config.json": b"[]"})

    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", full)
        with pytest.raises(NoSpace, match=f"disk is full.*tidegate model evict.*{url}@"):
            cache.preload(other)
        assert cache.preload(url, revision="main", expected_use_at_s=5.0) == here
        with cache.lease(here, "an engine"):
            pass
        assert cache.evict(url) >= SIZE
    cache.preload(other)


def test_room_is_made_on_a_full_disk_before_a_record_is_written(
    rig: Rig, cache: ModelCache, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.preload(url)
    other = rig.put("models/b", {"config.json": b"[]"})
    sync = os.fsync

    def full(fd: int) -> None:
        if cache.find(url) is not None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        rig.free_bytes = 1 << 40
        sync(fd)

    rig.free_bytes = 0
    monkeypatch.setattr(files.os, "fsync", full)
    assert read_tree(cache.preload(other).path) == {"config.json": b"[]"}
    assert cache.find(url) is None
