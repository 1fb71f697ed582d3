"""Results of preparation steps as earlier versions kept them: taken over, or evicted."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from folder_store import PIECE, Rig, bytes_of, read_tree

from modelcache.cache import ModelCache
from modelcache.prepare.results import Results
from modelcache.store import pending_results
from modelcache.store.layout import result_url
from modelcache.store.lookup import CachedModel
from modelcache.store.manifest import Job
from modelcache.store.pending_results import OUTPUT, read_works
from modelcache.types import Made

SIZE = 16 * PIECE
KEY = "k" * 64
FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class Killed(BaseException):
    """As far as this process got."""


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    return Rig(root=tmp_path)


def fetch(rig: Rig, cache: ModelCache, name: str = "a", size_bytes: int = SIZE) -> CachedModel:
    url = rig.put(f"models/{name}", {"weights": bytes_of(size_bytes, ord(name))})
    return cache.preload(url)


def fail(wanted: Callable[..., bool], error: BaseException, real: Callable[..., Any]) -> Any:
    """``real``, but an error where ``wanted`` says so."""

    def call(*args: Any, **kwargs: Any) -> Any:
        if wanted(*args, **kwargs):
            raise error
        return real(*args, **kwargs)

    return call


def put_old(cache: ModelCache, key: str = KEY, size_bytes: int = SIZE) -> Path:
    folder = cache.dir / "prepared/outputs" / key
    folder.mkdir(parents=True)
    (folder / "made").write_bytes(bytes_of(size_bytes))
    return folder


@pytest.mark.parametrize("last", ["mkdir", "note", "rename"])
def test_an_old_result_outlives_a_kill_while_it_is_taken_over(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, last: str
) -> None:
    """Whichever of these it was killed after, or at."""
    cache = rig.cache()
    folder = put_old(cache)
    before = read_tree(folder)
    if last == "mkdir":
        cache.store.layout.work(KEY).mkdir(parents=True)
    else:
        at = {"note": pending_results.JOB, "rename": OUTPUT}[last]
        with monkeypatch.context() as patch:

            def wanted(source: Path, target: Path) -> bool:
                return Path(target).name == at

            patch.setattr(os, "rename", fail(wanted, Killed(), os.rename))
            with pytest.raises(Killed):
                cache.sweep()
        assert not Results(cache).is_whole(KEY)
    cache.sweep()
    assert Results(cache).is_whole(KEY)
    assert read_tree(cache.store.layout.work(KEY) / OUTPUT) == before
    assert not folder.parent.exists()


def test_what_was_made_again_takes_the_old_one_s_place(rig: Rig) -> None:
    cache = rig.cache()
    made = Made(model="s3://models/m", revision="r", steps=("command",))
    job = Job(made=made, resumes=True)
    (Results(cache).begin(KEY, job) / "made").write_bytes(b"new")
    Results(cache).note_whole(KEY, job, 1.0)
    put_old(cache)
    cache.sweep()
    assert read_tree(cache.store.layout.work(KEY) / OUTPUT) == {"made": b"new"}
    assert not (cache.dir / "prepared/outputs").exists()


def test_a_note_without_its_result_is_not_whole(rig: Rig) -> None:
    cache = rig.cache()
    with cache.store.lock():
        pending_results.note_job(cache.store.layout, KEY, Job(made=None, resumes=True, whole=True))
    assert not Results(cache).is_whole(KEY)


def test_a_full_disk_is_swept_although_an_old_result_cannot_be_taken_over(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = rig.cache(quota_bytes=6 * SIZE)
    model = fetch(rig, cache, "a", 3 * SIZE)
    with cache.store.lock():  # as if it had not been used for longest
        cache.store.note_use(model.url, model.revision, used_at_s=1.0, reload_s_per_gb=None)
    folders = [put_old(cache, key) for key in (KEY, "l" * 64)]
    before = read_tree(folders[0])
    with monkeypatch.context() as patch:

        def wanted(path: Path, *args: Any, **kwargs: Any) -> bool:
            return path.parent.name == KEY

        patch.setattr(
            pending_results, "write_whole", fail(wanted, FULL, pending_results.write_whole)
        )
        fetch(rig, cache, "b", 2 * SIZE)
    assert [entry.complete for entry in cache.ls() if entry.url == model.url] == []
    assert read_tree(folders[0]) == before, "it stays where it is until there is room"
    assert not folders[1].exists(), "the next one is taken over all the same"
    cache.sweep()
    assert {work.key for work in read_works(cache.store.layout)} == {KEY, "l" * 64}
    assert Results(cache).is_whole(KEY)


def test_a_full_disk_is_freed_of_old_results_that_cannot_be_taken_over(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = rig.cache(quota_bytes=4 * SIZE)
    folders = [put_old(cache, key, 3 * SIZE // 2) for key in (KEY, "l" * 64)]
    monkeypatch.setattr(
        pending_results,
        "write_whole",
        fail(lambda *a, **k: True, FULL, pending_results.write_whole),
    )
    assert {entry.url for entry in cache.ls()} == {result_url(folder.name) for folder in folders}
    fetch(rig, cache, "b", 2 * SIZE)
    assert sum(folder.exists() for folder in folders) == 1
    cache.evict(next(result_url(folder.name) for folder in folders if folder.exists()))
    assert not folders[0].parent.exists()
