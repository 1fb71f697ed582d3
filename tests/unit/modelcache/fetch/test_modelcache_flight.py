"""Whoever wants the same model at the same time, in any thread, it is fetched once."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from folder_store import PIECE, Rig, bytes_of, count_bytes, read_tree

from modelcache.ports import CachedModel
from modelcache.types import Cancelled, NoSpace, Progress, SourceError

FILES = {"model.safetensors": bytes_of(6 * PIECE + 1, 1), "config.json": b"{}"}
SIZE = sum(map(len, FILES.values()))
BY_ANOTHER = "by another process"
PATIENCE_S = 60.0


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    return Rig(root=tmp_path)


def is_fetching(progress: Progress) -> bool:
    return progress.phase == "fetching" and progress.detail != BY_ANOTHER


def test_threads_wait_for_the_one_that_fetches(rig: Rig) -> None:
    url = rig.put("models/a", FILES)
    waiting: set[int] = set()
    all_wait = threading.Event()
    told: list[Progress] = []

    def preload(index: int) -> CachedModel:
        def on_progress(progress: Progress) -> None:
            if progress.detail == BY_ANOTHER:
                told.append(progress)
                waiting.add(index)
                if len(waiting) == 4:
                    all_wait.set()
            elif is_fetching(progress):
                # Whoever fetches goes on only once the others are seen to wait.
                assert all_wait.wait(PATIENCE_S)

        return rig.cache().preload(url, on_progress=on_progress)

    with ThreadPoolExecutor(5) as threads:
        models = list(threads.map(preload, range(5)))
    assert len({model.path for model in models}) == 1
    assert read_tree(models[0].path) == FILES
    assert rig.fetched_bytes == SIZE
    assert {progress.bytes_total for progress in told} <= {None, SIZE}


def test_one_cache_is_safe_for_many_threads(rig: Rig) -> None:
    urls = [
        rig.put(f"models/{name}", {**FILES, "own.txt": name.encode() * PIECE}) for name in "abcd"
    ]
    cache = rig.cache()

    def use(index: int) -> None:
        url = urls[index % 4]
        model = cache.preload(url)
        with cache.lease(model, f"thread {index}"):
            assert read_tree(model.path) == {**FILES, "own.txt": url[-1].encode() * PIECE}
            cache.ls()
            cache.usage()
            cache.sweep()

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(use, range(24)))
    assert [entry.leases for entry in cache.ls()] == [()] * 4
    assert cache.usage().bytes_used == count_bytes(cache.dir)
    for url in urls:
        cache.evict(url)
    assert count_bytes(cache.dir) == 0


def test_who_waits_may_change_their_mind(rig: Rig) -> None:
    url = rig.put("models/a", FILES)
    refused: list[str] = []

    def on_progress(progress: Progress) -> None:
        if is_fetching(progress) and not refused:
            with pytest.raises(Cancelled, match="is not wanted any more") as error:
                rig.cache().preload(url, cancelled=lambda: True)
            refused.append(str(error.value))

    model = rig.cache().preload(url, on_progress=on_progress)
    assert len(refused) == 1
    assert read_tree(model.path) == FILES


def test_who_waits_fetches_where_the_other_failed(rig: Rig) -> None:
    url = rig.put("models/a", FILES)
    brought, waits = threading.Event(), threading.Event()

    def first() -> None:
        def on_progress(progress: Progress) -> None:
            if is_fetching(progress):
                brought.set()
                assert waits.wait(PATIENCE_S)
                raise SourceError("out of luck")

        with pytest.raises(SourceError, match="out of luck"):
            rig.cache().preload(url, on_progress=on_progress)

    def second() -> CachedModel:
        def on_progress(progress: Progress) -> None:
            if progress.detail == BY_ANOTHER:
                waits.set()

        return rig.cache().preload(url, on_progress=on_progress)

    with ThreadPoolExecutor(2) as threads:
        failing = threads.submit(first)
        assert brought.wait(PATIENCE_S)
        model = threads.submit(second).result()
        failing.result()
    assert read_tree(model.path) == FILES
    assert rig.fetched_bytes == SIZE, "what the first had brought was kept"


def test_two_models_are_fetched_beside_each_other(rig: Rig) -> None:
    one, other = rig.put("models/a", FILES), rig.put("models/b", {"x.bin": bytes_of(PIECE, 9)})
    inner: list[CachedModel] = []

    def on_progress(progress: Progress) -> None:
        if is_fetching(progress) and not inner:
            inner.append(rig.cache().preload(other))

    rig.cache().preload(one, on_progress=on_progress)
    assert read_tree(inner[0].path) == {"x.bin": bytes_of(PIECE, 9)}


def test_room_is_counted_with_what_others_have_reserved(rig: Rig) -> None:
    quota = {"quota_bytes": SIZE + 5 * PIECE}
    one, other = rig.put("models/a", FILES), rig.put("models/b", {"x": bytes_of(5 * PIECE, 9)})
    refused: list[int] = []

    def on_progress(progress: Progress) -> None:
        if is_fetching(progress) and not refused:
            fetched = rig.fetched_bytes
            with pytest.raises(NoSpace, match="being fetched"):
                rig.cache(**quota).preload(other)
            refused.append(rig.fetched_bytes - fetched)

    rig.cache(**quota).preload(one, on_progress=on_progress)
    assert refused == [0]
    assert rig.cache().find(one) is not None
