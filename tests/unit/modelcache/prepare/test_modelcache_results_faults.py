"""Results of preparation steps where something goes wrong: full disks, kills, names, locks."""

from __future__ import annotations

import errno
import fcntl
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from folder_store import PIECE, Rig, bytes_of

from modelcache.cache import ModelCache
from modelcache.ports import CachedModel
from modelcache.prepare.run import LeasedModel, Preparation, PrepareRequest, Results, input_digest
from modelcache.prepare.step_process import DEFAULT_LIMITS, StepFailed, StepLimits
from modelcache.settings import PreparationStep
from modelcache.store.files import open_lock, try_lock, write_whole
from modelcache.store.records import USE, StepRecord
from modelcache.store.store import Store
from modelcache.store.unfinished_results import read_unfinished_results
from modelcache.types import Made, NoSpace, Progress

SIZE = 16 * PIECE
KEY = "k" * 64
FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
SAYS_FULL = f"import os; raise OSError({errno.ENOSPC}, os.strerror({errno.ENOSPC}))"


class Killed(BaseException):
    """As far as this process got."""


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    return Rig(root=tmp_path)


def fetch(rig: Rig, cache: ModelCache, name: str = "a", size_bytes: int = SIZE) -> CachedModel:
    url = rig.put(f"models/{name}", {"weights": bytes_of(size_bytes, ord(name))})
    return cache.preload(url)


def python(text: str, *arguments: str) -> PreparationStep:
    return PreparationStep(kind="command", argv=(sys.executable, "-S", "-c", text, *arguments))


STEP = python("open('made', 'w').write('made here')")


def preparation_of(cache: ModelCache, limits: StepLimits = DEFAULT_LIMITS) -> Preparation:
    return Preparation(
        cache=cache, python=Path(sys.executable), environ=dict(os.environ), limits=limits
    )


def prepare(
    cache: ModelCache, model: CachedModel, step: PreparationStep = STEP, *,
    limits: StepLimits = DEFAULT_LIMITS, **asked: Any,
) -> LeasedModel:  # fmt: skip
    assert model.manifest is not None
    return preparation_of(cache, limits).prepare(
        model.path, input_digest(model.manifest.files), [step],
        model=model.url, revision=model.revision, **asked,
    )  # fmt: skip


def key_of(cache: ModelCache, model: CachedModel, step: PreparationStep = STEP) -> str:
    assert model.manifest is not None
    return preparation_of(cache).keys(input_digest(model.manifest.files), [step])[0]


def alone(cache: ModelCache, key: str) -> Any:
    asked = PrepareRequest(holder="", on_progress=lambda progress: None, cancelled=lambda: False)
    return preparation_of(cache).exclusive(key, asked)


def leases_of(cache: ModelCache) -> list[str]:
    return [holder for entry in cache.ls() for holder in entry.leases]


def locks_of(cache: ModelCache) -> list[str]:
    return sorted(path.name for path in (cache.dir / "locks").glob("*.step"))


@pytest.fixture
def no_leak() -> Iterator[None]:
    def opened() -> int:
        return len(os.listdir("/proc/self/fd"))

    before = opened()
    yield
    deadline_s = time.monotonic() + 30
    while opened() > before:  # a thread of an earlier test may have one open for a moment
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


def fail(wanted: Callable[..., bool], error: BaseException, real: Callable[..., Any]) -> Any:
    """``real``, but an error where ``wanted`` says so."""

    def call(*args: Any, **kwargs: Any) -> Any:
        if wanted(*args, **kwargs):
            raise error
        return real(*args, **kwargs)

    return call


# Leases on a full disk


def let_no_use_be_noted(patch: pytest.MonkeyPatch) -> None:
    """From now on no record of a use can be written."""

    def wanted(path: Path, *args: Any, **more: Any) -> bool:
        return path.name == USE

    patch.setattr("modelcache.store.store.write_whole", fail(wanted, FULL, write_whole))


@pytest.fixture
def use_is_not_noted(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    return lambda: let_no_use_be_noted(monkeypatch)


def test_a_full_disk_is_no_reason_to_have_no_lease(
    rig: Rig, use_is_not_noted: Callable[[], None], no_leak: None
) -> None:
    cache = rig.cache()
    model = fetch(rig, cache)
    use_is_not_noted()
    for _ in range(3):
        with cache.lease(model, "m-1"):
            assert leases_of(cache) == ["m-1"]
        assert leases_of(cache) == []


def test_no_lease_is_left_where_taking_one_fails(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, no_leak: None
) -> None:
    cache = rig.cache()
    model = fetch(rig, cache)
    with monkeypatch.context() as patch:
        patch.setattr(Store, "note_use", fail(lambda *a, **k: True, Killed(), Store.note_use))
        with pytest.raises(Killed):
            cache.lease(model, "m-1")
    assert leases_of(cache) == []
    cache.evict(model.url)


def test_a_result_is_published_and_held_although_its_use_is_not_noted(
    rig: Rig, use_is_not_noted: Callable[[], None]
) -> None:
    cache = rig.cache()
    model = fetch(rig, cache)
    made = prepare(cache, model, holder="m-1")
    use_is_not_noted()
    again = prepare(cache, model, holder="m-2")
    assert sorted(leases_of(cache)) == ["m-1", "m-2"]
    made.lease.release()
    again.lease.release()
    assert leases_of(cache) == []
    cache.evict(made.model.url)


@pytest.mark.parametrize("fails", ["set_pin", "note_use"])
def test_no_lease_is_left_where_publishing_fails(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, no_leak: None, fails: str
) -> None:
    cache = rig.cache()
    model = fetch(rig, cache)
    cache.pin(model.url)
    error = FULL if fails == "set_pin" else Killed()

    def wanted(store: Store, url: str, *args: Any, **changes: Any) -> bool:
        return url.startswith("prepared://") and (fails == "set_pin" or "final" in changes)

    with monkeypatch.context() as patch:
        patch.setattr(Store, fails, fail(wanted, error, getattr(Store, fails)))
        with pytest.raises(NoSpace if fails == "set_pin" else Killed):
            prepare(cache, model)
    assert leases_of(cache) == []
    made = prepare(cache, model)
    log = cache.store.layout.step_log(key_of(cache, model))
    assert log.read_text().count("\n$ ") == 1, "the step was not run again"
    made.lease.release()


def test_no_lease_is_left_where_holding_fails(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, no_leak: None
) -> None:
    cache = rig.cache()
    model = fetch(rig, cache)
    results = Results(cache)
    made = prepare(cache, model)
    made.lease.release()
    with cache.store.lock():
        cache.store.note_use(made.model.url, "made", final=False)

    def wanted(*args: Any, **changes: Any) -> bool:
        return "final" in changes

    with monkeypatch.context() as patch:
        let_no_use_be_noted(patch)
        held = results.hold(key_of(cache, model), "m-1", final=True)
        assert held is not None, "that it is wanted for itself is advice only"
        held.lease.release()
    with monkeypatch.context() as patch:
        patch.setattr(Store, "note_use", fail(wanted, Killed(), Store.note_use))
        with pytest.raises(Killed):
            results.hold(key_of(cache, model), "m-1", final=True)
    assert leases_of(cache) == []


# Names that the cache refuses


@pytest.mark.parametrize("name", ["a\\b", "a\nb", "d/a\tb", "d\\e/f"])
def test_a_file_of_a_name_that_no_model_may_have_is_the_step_s_error(rig: Rig, name: str) -> None:
    cache = rig.cache()
    model = fetch(rig, cache)
    text = (
        "import os, sys; name = sys.argv[1]; os.makedirs(os.path.dirname(name) or '.', "
        "exist_ok=True); open(name, 'w').close(); open('ok', 'w').close()"
    )
    for _ in range(2):
        with pytest.raises(StepFailed, match="command made a file called ") as said:
            prepare(cache, model, python(text, name))
        assert repr(name) in str(said.value)
    assert read_unfinished_results(cache.store.layout) == [], "nobody can go on with it"


# What is full


def test_a_disk_is_full_where_it_is(rig: Rig) -> None:
    cache = rig.cache()
    model = fetch(rig, cache)
    rig.free_bytes = DEFAULT_LIMITS.nearly_full_bytes - 1
    said = rf"(?s)the disk of .* is full \({rig.free_bytes} bytes free\): command failed"
    with pytest.raises(NoSpace, match=said):
        prepare(cache, model, python(SAYS_FULL))


@pytest.mark.parametrize(("reserve_bytes", "error"), [(0, StepFailed), (SIZE, NoSpace)])
def test_a_disk_is_full_where_only_its_reserve_is_left(
    rig: Rig, reserve_bytes: int, error: type[Exception]
) -> None:
    limits = StepLimits(nearly_full_bytes=1)
    cache = rig.cache(reserve_bytes=reserve_bytes)
    model = fetch(rig, cache)
    go = rig.root / "go"

    def fill(progress: Progress) -> None:
        rig.free_bytes = SIZE - 1
        go.touch()

    wait = f"import os, time\nwhile not os.path.exists({str(go)!r}): time.sleep(0.01)\n{SAYS_FULL}"
    with pytest.raises(error):
        prepare(cache, model, python(wait), limits=limits, on_progress=fill)


def test_another_disk_that_is_full_is_not_the_cache_s(rig: Rig) -> None:
    cache = rig.cache()
    model = fetch(rig, cache)
    with pytest.raises(StepFailed, match=r"(?s)says that a disk is full.*: command failed") as said:
        prepare(cache, model, python(SAYS_FULL))
    assert f"has {rig.free_bytes} bytes free" in str(said.value)


def test_what_has_grown_too_large_is_told_how_large_and_for_what(rig: Rig) -> None:
    cache = rig.cache(quota_bytes=4 * SIZE)
    model = fetch(rig, cache)
    write = python(f"open('made', 'wb').write(bytes({8 * SIZE}))")
    with (
        cache.lease(model, "preparation"),
        pytest.raises(NoSpace, match=r"command of s3://models/a .* has grown to \d+ bytes") as said,
    ):
        prepare(cache, model, write, limits=StepLimits(measure_s=0.0))
    assert f"more than modelcache.quota_bytes ({4 * SIZE}) leaves it" in str(said.value)
    assert "needs" not in str(said.value)
    reserved = rig.cache(reserve_bytes=SIZE)
    made = Made(model=model.url, revision=model.revision, steps=("command",))
    Results(reserved).begin(KEY, StepRecord(made=made, resumes=True))
    rig.free_bytes = SIZE
    with reserved.lease(model, "preparation"), alone(reserved, KEY), pytest.raises(NoSpace) as said:
        Results(reserved).check_room(KEY, 12345)
    assert "has grown to 12345 bytes" in str(said.value)
    assert f"more than modelcache.reserve_bytes ({SIZE}) leaves it of the disk" in str(said.value)


# Locks


def test_locks_that_nobody_holds_are_swept(rig: Rig) -> None:
    cache = rig.cache()
    model = fetch(rig, cache)
    made = prepare(cache, model)
    made.lease.release()
    with alone(cache, KEY):
        cache.sweep()
        assert locks_of(cache) == [f"{KEY}.step"]
    cache.sweep()
    assert locks_of(cache) == []
    with cache.store.lock():  # the others stay
        assert (cache.dir / "locks/store").exists()


def test_whoever_waits_for_a_lock_that_is_swept_takes_the_next(rig: Rig) -> None:
    """Two must not hold one each, of which one has no name any more."""
    cache = rig.cache()
    path = cache.store.layout.step_lock(KEY)
    inside, done = threading.Event(), threading.Event()

    def make() -> None:
        with alone(cache, KEY):
            inside.set()
            done.wait(100)

    with open_lock(path) as before:
        assert try_lock(before)
        waiting = threading.Thread(target=make)
        waiting.start()
        assert not inside.wait(0.3)
        path.unlink()
        with open_lock(path) as other:
            assert try_lock(other)
            fcntl.flock(before, fcntl.LOCK_UN)
            assert not inside.wait(0.5), "it has a lock without a name"
        assert inside.wait(100)
    cache.sweep()
    assert locks_of(cache) == [f"{KEY}.step"]
    done.set()
    waiting.join()
