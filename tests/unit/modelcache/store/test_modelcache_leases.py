"""Leases: what is in use stays, and a dead user is none."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from folder_store import Rig, bytes_of, count_bytes, read_tree

from modelcache.ports import CachedModel
from modelcache.store import leases
from modelcache.store.leases import HOLDER_CHARACTERS, Lease
from modelcache.types import InUse, NotFound

DATA = {"model.bin": bytes_of(10_000)}


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    return Rig(root=tmp_path)


def directory_of(rig: Rig, model: CachedModel) -> Path:
    return rig.cache().store.layout.leases(model.url, model.revision)


def test_a_leased_model_stays_until_it_is_released(rig: Rig) -> None:
    cache = rig.cache()
    model = cache.preload(rig.put("models/a", DATA))
    with cache.lease(model, "engine 1") as lease:
        assert lease.held
        assert repr(lease) == "Lease('engine 1', held)"
        assert cache.ls()[0].leases == ("engine 1",)
        for force in (False, True):
            with pytest.raises(InUse, match="leased by engine 1"):
                cache.evict(model.url, force=force)
        assert read_tree(model.path) == DATA
    assert not lease.held
    assert repr(lease) == "Lease('engine 1', released)"
    assert cache.ls()[0].leases == ()
    cache.evict(model.url)
    assert count_bytes(cache.dir) == 0


def test_every_holder_counts(rig: Rig) -> None:
    caches = [rig.cache() for _ in range(3)]
    model = caches[0].preload(rig.put("models/a", DATA))
    held = [cache.lease(model, f"engine {index}") for index, cache in enumerate(caches)]
    for index, lease in enumerate(held):
        assert caches[0].ls()[0].leases == tuple(f"engine {left}" for left in range(index, 3))
        with pytest.raises(InUse):
            caches[0].evict(model.url)
        lease.release()
    caches[1].evict(model.url)


def test_releasing_twice_releases_nothing_of_others(rig: Rig) -> None:
    cache = rig.cache()
    model = cache.preload(rig.put("models/a", DATA))
    first = cache.lease(model, "same name")
    second = cache.lease(model, "same name")
    first.release()
    first.release()
    assert cache.ls()[0].leases == ("same name",)
    second.release()
    assert not directory_of(rig, model).exists(), "no empty directory is left"


def test_many_threads_release_once() -> None:
    count = []
    lease = Lease("x", lambda: count.append(1))
    threads = [threading.Thread(target=lease.release) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert count == [1]


def test_using_a_model_is_written_down(rig: Rig) -> None:
    now_s = [100.0]
    rig.clock = lambda: now_s[0]
    cache = rig.cache()
    model = cache.preload(rig.put("models/a", DATA))
    now_s[0] = 200.0
    lease = cache.lease(model, "engine")
    assert cache.ls()[0].used_at_s == 200.0
    now_s[0] = 300.0
    lease.release()
    assert cache.ls()[0].used_at_s == 300.0


def test_what_is_gone_cannot_be_leased(rig: Rig) -> None:
    cache = rig.cache()
    model = cache.preload(rig.put("models/a", DATA))
    cache.evict(model.url)
    with pytest.raises(NotFound, match="is not on this disk any more"):
        cache.lease(model, "engine")
    assert count_bytes(cache.dir) == 0


def test_a_directory_that_is_used_where_it_lies_needs_no_lease(rig: Rig) -> None:
    cache = rig.cache()
    plain = rig.root / "plain"
    plain.mkdir()
    model = cache.preload(str(plain))
    with cache.lease(model, "engine") as lease:
        assert lease.held
    assert not lease.held
    assert not cache.dir.exists()


def test_a_holder_is_shown_shortened(rig: Rig) -> None:
    cache = rig.cache()
    model = cache.preload(rig.put("models/a", DATA))
    with cache.lease(model, "é" * 500):
        assert cache.ls()[0].leases == ("é" * HOLDER_CHARACTERS,)


def test_what_else_lies_among_leases_is_none(tmp_path: Path) -> None:
    assert leases.holders(tmp_path / "none") == ()
    (tmp_path / "directory").mkdir()
    (tmp_path / "stale").write_text("engine of yesterday")
    assert leases.holders(tmp_path) == ()
    assert leases.holders(tmp_path / "stale") == ()
    leases.sweep(tmp_path)
    assert not (tmp_path / "stale").exists()


HOLD = """
import sys
from pathlib import Path
from folder_store import Rig
cache = Rig(root=Path(sys.argv[1])).cache()
lease = cache.lease(cache.find(sys.argv[2]), "child")
print(cache.ls()[0].leases, flush=True)
sys.stdin.read()
lease.release()
"""


@pytest.mark.parametrize("killed", [True, False])
def test_another_processs_lease_ends_with_it(rig: Rig, killed: bool) -> None:
    cache = rig.cache()
    model = cache.preload(rig.put("models/a", DATA))
    support = str(Path(sys.modules[Rig.__module__].__file__ or "").parent)
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(rig.root), model.url],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={"PYTHONPATH": support},
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"('child',)\n"
        assert cache.ls()[0].leases == ("child",)
        with pytest.raises(InUse, match="leased by child"):
            cache.evict(model.url)
        if killed:
            process.kill()
    # Its file is still there, and does not count.
    assert directory_of(rig, model).exists() == killed
    assert cache.ls()[0].leases == ()
    cache.evict(model.url)
    assert not directory_of(rig, model).exists()
    assert count_bytes(cache.dir) == 0


def test_a_lease_that_cannot_be_written_leaves_nothing_open(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = rig.cache()
    model = cache.preload(rig.put("models/a", DATA))

    def full(fd: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    before = open_below(cache.dir)
    with monkeypatch.context() as patch:
        patch.setattr(leases.os, "write", full)
        with pytest.raises(OSError, match="No space left"):
            leases.take(cache.store.layout, directory_of(rig, model), "m-1", lambda: None)
    assert open_below(cache.dir) == before
    assert cache.ls()[0].leases == ()
    assert list(cache.store.layout.tmp.iterdir()) == []


def open_below(directory: Path) -> list[str]:
    """What this process has open in a directory."""
    found = []
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            found.append(os.readlink(entry))
    return sorted(path for path in found if path.startswith(str(directory)))
