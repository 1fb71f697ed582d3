"""Results of preparation steps in the cache: counted, shown, leased, evicted, cleaned up."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
from folder_store import PIECE, Rig, bytes_of, count_bytes, make_room, read_tree

from modelcache.cache import ModelCache
from modelcache.ports import CachedModel
from modelcache.prepare.run import LeasedModel, Preparation, PrepareRequest, Results, input_digest
from modelcache.prepare.step_process import DEFAULT_LIMITS, StepFailed, StepLimits
from modelcache.settings import PreparationStep
from modelcache.store.layout import result_url
from modelcache.store.records import StepRecord
from modelcache.store.unfinished_results import read_unfinished_results
from modelcache.types import CacheError, InUse, Made, ModelEntry, NoSpace, NotFound, Progress

SIZE = 16 * PIECE
RECORDS = 16_384
"""Enough for the records of a few models."""

WRITE = "head -c {} /dev/zero | tr '\\0' $0 >made"


class Clock:
    """Each look is a second later."""

    def __init__(self) -> None:
        self.now_s = 1_000_000.0

    def __call__(self) -> float:
        self.now_s += 1.0
        return self.now_s


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    return Rig(root=tmp_path, clock=Clock())


def fetch(rig: Rig, cache: ModelCache, name: str, size_bytes: int = SIZE) -> CachedModel:
    """A model, fetched, of which nobody knows how long that took."""
    seed = int.from_bytes(name.encode()[:3])
    url = rig.put(f"models/{name}", {"weights": bytes_of(size_bytes, seed)})
    model = cache.preload(url)
    with cache.store.lock():
        cache.store.note_use(url, model.revision, reload_s_per_gb=None)
    return model


def writes(letter: str, size_bytes: int = SIZE, **fields: Any) -> PreparationStep:
    """A step whose result is so many bytes."""
    argv = ("/bin/sh", "-c", WRITE.format(size_bytes), letter)
    return PreparationStep(kind="command", argv=argv, **fields)


def prepare(
    cache: ModelCache, model: CachedModel, *steps: PreparationStep,
    limits: StepLimits = DEFAULT_LIMITS, **asked: Any,
) -> LeasedModel:  # fmt: skip
    """A model after some steps, held."""
    assert model.manifest is not None
    return Preparation(
        cache=cache, python=Path(sys.executable), environ=dict(os.environ),
        ask_versions=lambda python, names: dict.fromkeys(names, "1"), limits=limits,
    ).prepare(
        model.path, input_digest(model.manifest.files), steps,
        model=model.url, revision=model.revision, **asked,
    )  # fmt: skip


def let_go(cache: ModelCache, made: LeasedModel, cost: float | None = None) -> str:
    """Hold a result no more, and forget how long it took; its name in the cache."""
    made.lease.release()
    url = made.model.url
    with cache.store.lock():
        cache.store.note_use(url, "made", reload_s_per_gb=cost)
    return url


def url_before(made: LeasedModel) -> str:
    """The result that the last step began with."""
    assert made.model.manifest is not None
    assert made.model.manifest.made is not None
    return result_url(made.model.manifest.made.before)


def log_of(cache: ModelCache, made: LeasedModel) -> Path:
    return cache.store.layout.step_log(made.model.url.removeprefix("prepared://"))


def entries(cache: ModelCache) -> dict[str, ModelEntry]:
    return {entry.url: entry for entry in cache.ls()}


def test_a_result_is_counted_and_shown_like_a_model(rig: Rig) -> None:
    cache = rig.cache(quota_bytes=1 << 30)
    model = fetch(rig, cache, "a")
    before = cache.usage()
    assert before.bytes_prepared == 0
    made = prepare(cache, model, writes("x", 3 * SIZE), holder="m-1")
    usage = cache.usage()
    assert usage.bytes_used == count_bytes(cache.dir)
    assert 3 * SIZE <= usage.bytes_prepared <= 3 * SIZE + RECORDS
    assert usage.bytes_blobs == before.bytes_blobs, "what was fetched is counted as before"
    parts = usage.bytes_blobs + usage.bytes_prepared + usage.bytes_partial + usage.bytes_records
    assert parts == usage.bytes_used
    entry = entries(cache)[made.model.url]
    assert entry.made == Made(model=model.url, revision=model.revision, steps=("command",))
    assert (entry.size_bytes, entry.complete, entry.leases) == (3 * SIZE, True, ("m-1",))
    assert entry.used_at_s is not None
    assert log_of(cache, made).is_file()
    assert not list((cache.dir / "prepared/work").iterdir())
    again = rig.cache().ls()
    assert {one.url for one in again} == {model.url, made.model.url}


def test_a_result_is_evicted_to_make_room_and_made_again(rig: Rig) -> None:
    cache = rig.cache(quota_bytes=3 * SIZE + RECORDS)
    model = fetch(rig, cache, "a")
    cache.pin(model.url)
    made = prepare(cache, model, writes("x"))
    url = let_go(cache, made)
    cache.unpin(url)  # it is pinned with its model, and let go of alone
    fetch(rig, cache, "b", 2 * SIZE - PIECE)
    assert url not in entries(cache), "it was not used for longest, but for what is pinned"
    assert not log_of(cache, made).exists(), "what its step said goes with it"
    assert cache.usage().bytes_used <= 3 * SIZE + RECORDS
    again = prepare(cache, model, writes("x"))
    assert log_of(cache, again).is_file(), "its step was run again"
    assert again.model.path == made.model.path


def test_what_is_leased_or_pinned_stays(rig: Rig) -> None:
    cache = rig.cache(quota_bytes=4 * SIZE)
    model = fetch(rig, cache, "a")
    leased = prepare(cache, model, writes("x"), holder="m-1")
    pinned = let_go(cache, prepare(cache, model, writes("y")))
    cache.pin(pinned)
    with pytest.raises(NoSpace) as refused:
        fetch(rig, cache, "b", 3 * SIZE)
    said = str(refused.value)
    assert f"command of {model.url} ({leased.model.url[:23]}) (leased by m-1)" in said
    assert "(pinned)" in said
    assert {leased.model.url, pinned, model.url} == set(entries(cache))


def test_the_order_is_that_of_models(rig: Rig) -> None:
    """Least recently used first, over models and results; then what is quick to make."""
    cache = rig.cache(quota_bytes=4 * SIZE + 2 * RECORDS)
    a = fetch(rig, cache, "a")
    x = let_go(cache, prepare(cache, a, writes("x")))
    b = fetch(rig, cache, "b")
    cache.pin(a.url)
    cache.unpin(x)
    made = prepare(cache, a, writes("x"))
    let_go(cache, made)
    fetch(rig, cache, "c", 2 * SIZE)
    assert set(entries(cache)) == {a.url, x, "s3://models/c"}, "b was used before x"
    cache.evict("s3://models/c")
    b = fetch(rig, cache, "b")
    with cache.store.lock():
        cache.store.note_use(x, "made", reload_s_per_gb=100.0)
        cache.store.note_use(b.url, b.revision, reload_s_per_gb=0.001)
    fetch(rig, cache, "c", 2 * SIZE)
    assert set(entries(cache)) == {a.url, x, "s3://models/c"}, "x takes longer to make again"


def test_a_result_is_wanted_when_its_model_is(rig: Rig) -> None:
    cache = rig.cache(quota_bytes=4 * SIZE + 2 * RECORDS)
    soon, late = fetch(rig, cache, "a"), fetch(rig, cache, "b")
    x = let_go(cache, prepare(cache, soon, writes("x")))
    y = let_go(cache, prepare(cache, late, writes("y")))
    cache.preload(soon.url, expected_use_at_s=1_000_100.0)
    cache.preload(late.url, expected_use_at_s=1_900_000.0)
    for url in (soon.url, late.url):
        cache.pin(url)
    for url in (x, y):
        cache.unpin(url)
    fetch(rig, cache, "c", SIZE // 2)
    assert x in entries(cache)
    assert y not in entries(cache)


def test_making_it_is_what_loading_it_again_costs(rig: Rig) -> None:
    cache = rig.cache()
    model = fetch(rig, cache, "a")
    slow = ("/bin/sh", "-c", f"sleep 0.2; {WRITE.format(SIZE)}", "x")
    made = prepare(cache, model, PreparationStep(kind="command", argv=slow), writes("y"))
    records = {one.url: one for one in cache.lookup.records(model.url, None)[0]}
    last = records.pop(made.model.url).use
    (first,) = (one.use for one in records.values() if one.made is not None)
    assert first.reload_s_per_gb is not None
    assert last.reload_s_per_gb is not None
    assert first.reload_s_per_gb >= 0.2 / (SIZE / 1e9)
    assert last.reload_s_per_gb > first.reload_s_per_gb, "the way there is made again too"
    assert (first.final, last.final) == (False, True)


def test_a_step_on_the_way_goes_first_unless_somebody_uses_it(rig: Rig) -> None:
    cache = rig.cache(quota_bytes=5 * SIZE + 2 * RECORDS)
    a, b = fetch(rig, cache, "a"), fetch(rig, cache, "b")
    made = prepare(cache, a, writes("x"), writes("y"))
    last, middle = let_go(cache, made), url_before(made)
    assert entries(cache)[last].made == Made(
        model=a.url, revision=a.revision, steps=("command", "command"),
        before=middle.removeprefix("prepared://"),
    )  # fmt: skip
    with cache.store.lock():  # as if it were the dearest and freshest of all
        cache.store.note_use(middle, "made", reload_s_per_gb=1e9)
    fetch(rig, cache, "c", 2 * SIZE)
    assert set(entries(cache)) == {a.url, b.url, last, "s3://models/c"}
    # Wanted for itself it is like any other.
    cache.evict("s3://models/c")
    again = prepare(cache, a, writes("x"))
    assert again.model.url == middle
    let_go(cache, again, 1e9)
    with cache.store.lock():
        cache.store.note_use(last, "made", reload_s_per_gb=1e9)
    fetch(rig, cache, "c", 2 * SIZE)
    assert {middle, last} <= set(entries(cache))


def test_what_a_step_begins_with_is_not_evicted_under_it(rig: Rig) -> None:
    cache = rig.cache(quota_bytes=1 << 30)
    model = fetch(rig, cache, "a")
    seen: list[str] = []
    evict = (
        "import os, pathlib, shutil, time; pathlib.Path('began').touch()\n"
        "while not os.path.exists(os.environ['GO']): time.sleep(0.01)\n"
        "shutil.copy(os.path.join(os.environ['TIDEGATE_INPUT'], 'made'), 'made')"
    )
    go = rig.root / "go"

    def on_progress(progress: Progress) -> None:
        busy = [one for one in read_unfinished_results(cache.store.layout) if one.busy]
        made = busy[0].made if busy else None
        if go.exists() or made is None or len(made.steps) < 2:
            return
        with pytest.raises(NoSpace) as refused:
            make_room(cache, 1 << 30)
        seen.append(str(refused.value))
        with pytest.raises(InUse, match="being made"):
            cache.evict(busy[0].url)
        assert [one.leases for one in cache.ls() if not one.complete] == [
            ("the step that makes it",)
        ]
        go.touch()

    last = PreparationStep(kind="command", argv=(sys.executable, "-c", evict), env={"GO": str(go)})
    with cache.lease(model, "preparation"):
        made = prepare(cache, model, writes("x"), last, holder="m-1", on_progress=on_progress)
    assert (made.model.path / "made").read_bytes() == b"x" * SIZE
    assert "(leased by m-1)" in seen[0]
    assert "(being made)" in seen[0]


# Room before it begins

CAST = PreparationStep(kind="cast", dtype="float16")


def test_what_cannot_fit_is_said_before_the_step_begins(rig: Rig) -> None:
    cache = rig.cache(quota_bytes=SIZE + SIZE // 2 + RECORDS)
    model = fetch(rig, cache, "a")
    with (
        cache.lease(model, "preparation"),
        pytest.raises(NoSpace, match=r"cast of s3://models/a .* needs \d+ bytes more") as said,
    ):
        prepare(cache, model, CAST)
    assert "leased by preparation" in str(said.value)
    assert not read_unfinished_results(cache.store.layout)
    assert not (cache.dir / "prepared/logs").exists(), "nothing was run"


def test_a_full_disk_is_said_before_the_step_begins(rig: Rig) -> None:
    cache = rig.cache()
    model = fetch(rig, cache, "a")
    rig.free_bytes = SIZE
    with (
        cache.lease(model, "preparation"),
        pytest.raises(NoSpace, match=rf"cast .* the disk has {SIZE} free"),
    ):
        prepare(cache, model, CAST)
    assert not (cache.dir / "prepared/logs").exists()


def test_room_is_made_before_the_step_begins(rig: Rig) -> None:
    cache = rig.cache(quota_bytes=3 * SIZE + RECORDS)
    old, model = fetch(rig, cache, "old"), fetch(rig, cache, "a")
    with cache.lease(model, "preparation"), holding(cache, "k"):
        with pytest.raises(NoSpace):
            begin(cache, "k", 3 * SIZE)
        assert old.url in entries(cache), "where it cannot be enough nothing goes"
        begin(cache, "k", 3 * SIZE // 2)
        assert set(entries(cache)) == {model.url, "prepared://k"}


def begin(cache: ModelCache, key: str, promised_bytes: int) -> None:
    """A step that has begun, and has written nothing yet."""
    made = Made(model="s3://models/m", revision="r", steps=("cast",))
    Results(cache).begin(key, StepRecord(made=made, resumes=True, promised_bytes=promised_bytes))


def holding(cache: ModelCache, key: str) -> Any:
    asked = PrepareRequest(holder="", on_progress=lambda progress: None, cancelled=lambda: False)
    preparation = Preparation(cache=cache, python=Path(sys.executable), environ={})
    return preparation.exclusive(key, asked)


def test_what_was_promised_to_a_step_is_nobody_elses(rig: Rig) -> None:
    cache = rig.cache(quota_bytes=4 * SIZE + RECORDS)
    with holding(cache, "k"):
        begin(cache, "k", 3 * SIZE)
        assert cache.usage().bytes_promised == pytest.approx(3 * SIZE, abs=1000)
        with pytest.raises(NoSpace, match="steps under way take"):
            fetch(rig, cache, "a", 2 * SIZE)
        (cache.store.layout.unfinished_output("k") / "x").write_bytes(bytes(2 * SIZE))
        assert cache.usage().bytes_promised == pytest.approx(SIZE, abs=1000)
        fetch(rig, cache, "a", SIZE // 2)
        cache.pin("s3://models/a")
        begin(cache, "k", 3 * SIZE)  # it asks again: it has that room already
        with holding(cache, "other"), pytest.raises(NoSpace):
            begin(cache, "other", SIZE)
    assert cache.usage().bytes_promised == 0, "nobody makes it any more"


def test_a_disk_s_room_is_promised_once_too(rig: Rig) -> None:
    cache = rig.cache()
    rig.free_bytes = 3 * SIZE
    with holding(cache, "k"):
        begin(cache, "k", 2 * SIZE)
        with pytest.raises(NoSpace):
            fetch(rig, cache, "a", 2 * SIZE)
    fetch(rig, cache, "a", 2 * SIZE)


def test_a_command_that_grows_past_the_quota_is_ended(rig: Rig) -> None:
    cache = rig.cache(quota_bytes=4 * SIZE)
    old, model = fetch(rig, cache, "old"), fetch(rig, cache, "a")
    grows = (
        f"import time\nfile = open('made', 'wb')\nwhile True:\n"
        f"    file.write(bytes({PIECE})); file.flush(); time.sleep(0.01)"
    )
    step = PreparationStep(kind="command", argv=(sys.executable, "-c", grows))
    with (
        cache.lease(model, "preparation"),
        pytest.raises(NoSpace, match=r"command of s3://models/a .* of its quota"),
    ):
        prepare(cache, model, step, limits=StepLimits(measure_s=0.0))
    assert old.url not in entries(cache), "what may go went first"
    assert model.url in entries(cache)
    assert not list((cache.dir / "prepared/work").iterdir()), "it could not be gone on with"
    assert cache.usage().bytes_used <= 4 * SIZE


def test_a_result_too_large_is_found_before_it_is_taken_over(rig: Rig) -> None:
    cache = rig.cache(quota_bytes=4 * SIZE)
    model = fetch(rig, cache, "a")
    with cache.lease(model, "preparation"), pytest.raises(NoSpace):
        prepare(cache, model, writes("x", 8 * SIZE))
    assert set(entries(cache)) == {model.url}


# By hand


def test_evicting_a_model_takes_what_was_made_of_it_along(rig: Rig) -> None:
    cache = rig.cache()
    model, other = fetch(rig, cache, "a"), fetch(rig, cache, "b")
    made = prepare(cache, model, writes("x"), holder="m-1")
    kept = let_go(cache, prepare(cache, other, writes("z")))
    with pytest.raises(InUse, match=rf"command of {model.url} \(prepared://\w+\) is leased by m-1"):
        cache.evict(model.url)
    with pytest.raises(InUse, match="m-1"):
        cache.evict(model.url, prepared=True)
    assert model.url in entries(cache), "all of it or nothing"
    url = let_go(cache, made)
    cache.pin(url)
    with pytest.raises(InUse, match="is pinned"):
        cache.evict(url)
    before = count_bytes(cache.dir)
    assert cache.evict(model.url, prepared=True, force=True) == before - count_bytes(cache.dir)
    assert set(entries(cache)) == {model.url, other.url, kept}
    with pytest.raises(NotFound, match="nothing that was made of s3://models/a is on this disk"):
        cache.evict(model.url, prepared=True)
    let_go(cache, prepare(cache, model, writes("x")))
    cache.evict(model.url)
    assert set(entries(cache)) == {other.url, kept}
    cache.evict(other.url)
    assert count_bytes(cache.dir) == 0


def test_one_result_is_named_by_the_beginning_of_its_key(rig: Rig) -> None:
    cache = rig.cache()
    model = fetch(rig, cache, "a")
    x = let_go(cache, prepare(cache, model, writes("x")))
    y = let_go(cache, prepare(cache, model, writes("y")))
    cache.pin(x[:24])
    assert entries(cache)[x].pinned
    assert cache.verify(x[:24]) == []
    cache.evict(y[:24])
    assert y not in entries(cache)
    with pytest.raises(NotFound):
        cache.evict("prepared://")
    cache.unpin(model.url)
    assert not entries(cache)[x].pinned, "what is let go of is the model with all made of it"


def test_a_pinned_model_s_results_are_pinned(rig: Rig) -> None:
    cache = rig.cache()
    model = fetch(rig, cache, "a")
    x = let_go(cache, prepare(cache, model, writes("x")))
    cache.pin(model.url)
    made = prepare(cache, model, writes("y"), writes("z"))
    let_go(cache, made)
    middle, last = url_before(made), made.model.url
    pinned = {url for url, entry in entries(cache).items() if entry.pinned}
    assert pinned == {model.url, x, last}
    assert middle in entries(cache)


def test_a_directory_s_results_are_named_by_it(rig: Rig) -> None:
    cache = rig.cache()
    folder = rig.root / "plain"
    folder.mkdir()
    (folder / "weights").write_bytes(b"w")
    made = Preparation(cache=cache, python=Path(sys.executable), environ={}).prepare(
        folder, "d", [writes("x")], model=str(folder), revision="in place"
    )
    url = let_go(cache, made)
    cache.pin(str(folder))
    assert entries(cache)[url].pinned
    with pytest.raises(InUse):
        cache.evict(str(folder))
    cache.unpin(str(folder))
    cache.evict(str(folder))
    assert entries(cache) == {}
    assert (folder / "weights").exists()


def test_a_damaged_result_is_not_used_and_not_fetched(rig: Rig) -> None:
    cache = rig.cache()
    model = fetch(rig, cache, "a")
    made = prepare(cache, model, writes("x"))
    url = let_go(cache, made)
    blob = cache.store.layout.blob(next(iter(cache.lookup.read(url, "made").files)).digest)  # type: ignore[union-attr]
    blob.chmod(0o644)
    blob.write_bytes(b"y" * SIZE)
    with pytest.raises(CacheError, match="was made here: evict it"):
        cache.verify(url, repair=True)
    again = prepare(cache, model, writes("x"))
    assert log_of(cache, again).is_file(), "its step was run again"
    assert (again.model.path / "made").read_bytes() == b"x" * SIZE


# What is left half made


def test_what_a_kill_left_is_counted_shown_and_goes_for_others(rig: Rig) -> None:
    cache = rig.cache(quota_bytes=4 * SIZE)
    begin(cache, "k", 4 * SIZE - RECORDS)
    (cache.store.layout.unfinished_output("k") / "x").write_bytes(bytes(2 * SIZE))
    usage = cache.usage()
    assert usage.bytes_used == count_bytes(cache.dir)
    assert usage.bytes_prepared >= 2 * SIZE
    (entry,) = cache.ls()
    assert (entry.url, entry.complete, entry.leases) == ("prepared://k", False, ())
    assert entry.size_bytes >= 2 * SIZE
    assert entry.made is not None
    assert entry.made.model == "s3://models/m"
    cache.sweep()
    assert len(cache.ls()) == 1, "the next try goes on with it"
    fetch(rig, cache, "a", 3 * SIZE)
    assert set(entries(cache)) == {"s3://models/a"}


def test_what_nobody_can_go_on_with_is_swept(rig: Rig) -> None:
    cache = rig.cache()
    made = Made(model="s3://models/m", revision="r", steps=("command",))
    Results(cache).begin("k", StepRecord(made=made, resumes=False))
    with holding(cache, "k"):
        cache.sweep()
        assert [work.key for work in read_unfinished_results(cache.store.layout)] == ["k"]
    cache.sweep()
    assert read_unfinished_results(cache.store.layout) == []


def test_what_a_kill_left_is_evicted_by_name(rig: Rig) -> None:
    cache = rig.cache()
    begin(cache, "k", SIZE)
    begin(cache, "other", SIZE)
    cache.evict("prepared://ot")
    assert set(entries(cache)) == {"prepared://k"}
    cache.evict("s3://models/m")
    assert cache.ls() == []


def test_a_whole_result_is_taken_over_without_the_step(rig: Rig) -> None:
    """Killed after the step had ended, and before the cache had its result."""
    cache = rig.cache()
    model = fetch(rig, cache, "a")
    step = writes("x")
    assert model.manifest is not None
    preparation = Preparation(cache=cache, python=Path(sys.executable), environ={})
    (key,) = preparation.keys(input_digest(model.manifest.files), [step])
    made = Made(model=model.url, revision=model.revision, steps=("command",))
    job = StepRecord(made=made, resumes=False)
    Results(cache).begin(key, job)
    (cache.store.layout.unfinished_output(key) / "made").write_bytes(b"left over")
    Results(cache).note_finished(key, job, 5.0)
    cache.sweep()
    found = prepare(cache, model, step)
    assert read_tree(found.model.path) == {"made": b"left over"}
    assert not (cache.dir / "prepared/work" / key).exists()
    cost = cache.lookup.records(result_url(key), None)[0][0].use.reload_s_per_gb
    assert cost == pytest.approx(5.0 / (9 / 1e9))


def test_a_note_that_was_torn_is_no_reason_to_fail(rig: Rig) -> None:
    cache = rig.cache()
    begin(cache, "k", SIZE)
    (cache.dir / "prepared/work/k/job.json").write_bytes(b"{")
    (entry,) = cache.ls()
    assert (entry.url, entry.made) == ("prepared://k", None)
    cache.evict("prepared://k")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("ln -s /no/such x; : >y", "x, a link to no file"),
        ("mkdir d; ln -s d x; : >y", "x, a link to no file"),
    ],
)
def test_what_a_result_would_lose_is_an_error(rig: Rig, text: str, words: str) -> None:
    cache = rig.cache()
    model = fetch(rig, cache, "a")
    with pytest.raises(StepFailed, match=words):
        prepare(
            cache,
            model,
            PreparationStep(kind="command", argv=("/bin/sh", "-c", text)),
        )


def test_links_into_the_model_become_the_same_bytes(rig: Rig) -> None:
    """Evicting the model must not break what was made of it."""
    cache = rig.cache()
    model = fetch(rig, cache, "a")
    link = 'ln -s "$TIDEGATE_INPUT/weights" s; ln "$TIDEGATE_INPUT/weights" h'
    made = prepare(cache, model, PreparationStep(kind="command", argv=("/bin/sh", "-c", link)))
    assert cache.usage().bytes_prepared < PIECE, "the model has the same bytes"
    weights = read_tree(model.path)["weights"]
    found, _ = cache.lookup.records(model.url, model.revision)
    record = next(one for one in found if one.url == model.url)  # and not its result
    with cache.store.lock():
        cache.store.capacity.evict([record], [], force=False)
    assert read_tree(made.model.path) == {"s": weights, "h": weights}
    assert cache.usage().bytes_prepared >= SIZE


def test_two_who_make_one_result_hold_it_both(rig: Rig) -> None:
    cache, other = rig.cache(), rig.cache()
    model = fetch(rig, cache, "a")
    first = prepare(cache, model, writes("x"), holder="m-1")
    second = prepare(other, model, writes("x"), holder="m-2")
    assert entries(cache)[first.model.url].leases == ("m-1", "m-2")
    let_go(cache, first)
    with pytest.raises(InUse, match="m-2"):
        cache.evict(model.url)
    let_go(cache, second)
    cache.evict(model.url)
