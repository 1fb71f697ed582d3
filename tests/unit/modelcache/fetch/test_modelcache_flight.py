"""Whoever wants the same model at the same time, in any thread or process, it is fetched once."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest
from folder_store import PIECE, Rig, bytes_of, count_bytes, read_tree

from modelcache.cache import ModelCache
from modelcache.ports import CachedModel
from modelcache.store.lookup import read_fetching
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


PRELOAD = """
import sys
from pathlib import Path
from folder_store import Rig

def on_progress(progress):
    global told
    if progress.detail == "by another process" and not told:
        told = True
        print("waits", flush=True)

told = False
model = Rig(root=Path(sys.argv[1])).cache().preload(sys.argv[2], on_progress=on_progress)
print(model.path, flush=True)
"""

KILLED = """
import os, signal, sys
from pathlib import Path
from folder_store import Rig

def on_progress(progress):
    if progress.bytes_done >= 4096 * 2:
        os.kill(os.getpid(), signal.SIGKILL)

Rig(root=Path(sys.argv[1])).cache().preload(sys.argv[2], on_progress=on_progress)
"""


def start(rig: Rig, code: str, url: str) -> subprocess.Popen[str]:
    support = str(Path(sys.modules[Rig.__module__].__file__ or "").parent)
    return subprocess.Popen(
        [sys.executable, "-c", code, str(rig.root), url],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": support},
    )


def test_processes_wait_for_the_one_that_fetches(rig: Rig) -> None:
    url = rig.put("models/a", FILES)
    with ExitStack() as stack:
        others: list[subprocess.Popen[str]] = []

        def on_progress(progress: Progress) -> None:
            if is_fetching(progress) and not others:
                others.extend(stack.enter_context(start(rig, PRELOAD, url)) for _ in range(3))
                for process in others:
                    assert process.stdout is not None
                    assert process.stdout.readline() == "waits\n"

        model = rig.cache().preload(url, on_progress=on_progress)
        for process in others:
            assert process.stdout is not None
            assert process.stdout.read() == f"{model.path}\n"
            assert process.wait() == 0
    assert rig.fetched_bytes == SIZE
    assert read_tree(model.path) == FILES


def test_processes_that_start_together_fetch_once(rig: Rig) -> None:
    url = rig.put("models/a", FILES)
    with ExitStack() as stack:
        processes = [stack.enter_context(start(rig, PRELOAD, url)) for _ in range(4)]
        outputs = [process.communicate()[0].split()[-1] for process in processes]
    assert len(set(outputs)) == 1
    assert read_tree(Path(outputs[0])) == FILES
    assert rig.fetched_bytes == SIZE
    cache = rig.cache()
    assert cache.usage().bytes_used == count_bytes(cache.dir)


def test_a_killed_process_leaves_its_pieces_to_the_next(rig: Rig) -> None:
    url = rig.put("models/a", {"model.safetensors": FILES["model.safetensors"]})
    with start(rig, KILLED, url) as process:
        process.wait()
    assert process.returncode < 0
    there = rig.fetched_bytes
    assert there == 2 * PIECE
    cache: ModelCache = rig.cache()
    assert read_fetching(cache.store, url) is None, "a dead one fetches nothing"
    assert cache.find(url) is None
    assert read_tree(cache.preload(url).path)["model.safetensors"] == FILES["model.safetensors"]
    assert rig.fetched_bytes == len(FILES["model.safetensors"])
