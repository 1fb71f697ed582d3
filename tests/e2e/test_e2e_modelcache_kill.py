"""Kill -9 at any moment: real processes, a real web server, real files."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from folder_store import count_bytes, flip_bit, read_tree
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kill_child import CONNECTIONS, PIECE_BYTES, files_of, make_cache, take_over
from kill_rig import REVISION, Moment, Struck, Work, Yard, kill_yard, make_bytes, repaired

from modelcache.cache import ModelCache
from modelcache.pagecache import residency
from modelcache.store.digest import digest_piece
from modelcache.store.unfinished_results import read_unfinished_results
from modelcache.types import Damaged

pytestmark = pytest.mark.timeout(600)
"""Processes by the hundred: on a busy machine a test of these takes minutes, and nothing hangs."""

WASTE_BYTES = CONNECTIONS * PIECE_BYTES
"""What a kill may cost: what each connection was about to bring, once."""

DOWNLOADS, EVICTIONS, PREWARMS, REPAIRS, RESULTS = 90, 70, 50, 15, 40
"""Kills of each kind."""

WEIGHTS = "model-00001-of-00002.safetensors"
HURT_PIECES = (0, 3, 4, 9)

examples = {
    "deadline": None,
    "print_blob": True,
    "suppress_health_check": [HealthCheck.too_slow],
}

parts = st.integers(0, 9_999).map(lambda number: number / 10_000)
moments = st.builds(Moment, fraction=parts, torn=st.sampled_from([0.0, 0.01, 0.5, 0.99])) | (
    st.builds(Moment, fraction=parts, by_time=st.just(True))
)


@dataclass(frozen=True, slots=True)
class Models:
    """``old`` has a file in common with ``leased``, and another with ``new``. ``made`` is a hub's,
    by its name, and comes from a directory. Of ``plain`` the store publishes no checksums.

    Caches to begin with, all with ``leased``: ``bare`` has nothing else, ``mixed`` has ``old``,
    ``hurt`` has it with pieces that have decayed, ``shown`` has ``made``, ``half`` what a killed
    download of ``plain`` has left.
    """

    old: str
    leased: str
    new: str
    plain: str
    made: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Flip:
    """A bit of a file, both by numbers that may be too high. ``noticed``: the file's time says
    that it was written to."""

    file: int
    bit: int
    noticed: bool

    def apply(self, paths: list[Path]) -> Path:
        """Flip it in one of ``paths``; in which."""
        path = paths[self.file % len(paths)]
        flip_bit(path, self.bit % (8 * path.stat().st_size))
        if self.noticed:
            os.utime(path)
        return path


flips = st.builds(
    Flip,
    file=st.integers(0, 999),
    bit=st.integers(0, 10**8),
    noticed=st.sampled_from([False, False, True]),
)


@pytest.fixture(scope="module")
def yard(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Yard]:
    with kill_yard(tmp_path_factory.mktemp("yard")) as yard:
        yield yard


@pytest.fixture(scope="module")
def models(yard: Yard) -> Models:
    common, tokens = make_bytes(150_000, 1), make_bytes(70_001, 2)
    old = {
        WEIGHTS: make_bytes(1_000_000, 3),
        "model-00002-of-00002.safetensors": make_bytes(7 * PIECE_BYTES, 4),
        "config.json": b'{"model_type": "old"}',
        "merges.txt": b"",
        "more/common.model": common,
        "tokens.json": tokens,
    }
    leased = {"model.safetensors": make_bytes(300_000, 5), "common.model": common}
    new = {"model.safetensors": make_bytes(800_000, 6), "tokens.json": tokens}
    found = Models(
        old=yard.put("old", old),
        leased=yard.put("leased", leased),
        new=yard.put("new", new),
        plain=yard.put("plain", {**old, "tokens.json": common}, checksums=False),
        made=yard.put_here("made", "hf://org/made", {"model.safetensors": tokens}),
    )
    yard.prepare("bare", found.leased)
    yard.prepare("mixed", found.old, found.leased)
    with yard.copied("mixed") as directory:
        for piece in HURT_PIECES:
            blob = blob_of(yard, make_cache(directory), found.old, WEIGHTS)
            flip_bit(blob, 8 * PIECE_BYTES * piece + 77)
        yard.keep(directory, "hurt")
    with yard.copied("bare") as directory:
        make_cache(directory).publish(yard.root / "made", url=found.made, revision=REVISION)
        yard.keep(directory, "shown")
    fetch = yard.measure(Work(start="bare", order={"verb": "preload", "url": found.plain}))
    with yard.struck(fetch, Moment(fraction=0.6, torn=0.5)) as struck:
        assert files_below(struck.cache.dir / "partial")
        yard.keep(struck.cache.dir, "half")
    return found


def blob_of(yard: Yard, cache: ModelCache, url: str, path: str) -> Path:
    """The blob that a file of a model is."""
    files = yard.manifest(cache, url).files
    digest = next(file.digest for file in files if file.path == path)
    return cache.store.layout.blob(digest)


def preload(yard: Yard, cache: ModelCache, url: str) -> int:
    """Fetch a model after a kill, and see that it is right; the bytes the store served."""
    before = yard.server.count()
    model = cache.preload(url)
    assert read_tree(model.path) == yard.models[url]
    return yard.server.count() - before


def check_end(yard: Yard, struck: Struck) -> None:
    """Nothing is wrong, nothing is left over, and nothing stays that is not wanted."""
    yard.check_whole(struck.cache)
    yard.check_accounts(struck.cache)
    struck.leases.close()
    yard.check_empties(struck.cache)


def check_caught(yard: Yard, cache: ModelCache) -> bool:
    """No model has a wrong byte that is not noticed; whether anything was."""
    noticed = False
    for url in {entry.url for entry in cache.ls()}:
        found = cache.find(url)
        if found is None:
            noticed = True
            continue
        damage = cache.verify(url)
        noticed = noticed or bool(damage)
        if not damage:
            assert read_tree(found.path) == yard.models[url]
        check_pieces(yard, cache, url)
    return noticed


def check_pieces(yard: Yard, cache: ModelCache, url: str) -> None:
    """Whoever checks pieces while loading takes no wrong one for right."""
    found = yard.find(cache, url)
    for file in yard.manifest(cache, url).files:
        right, now = yard.models[url][file.path], (found.path / file.path).read_bytes()
        try:
            pieces = cache.store.read_pieces(file.digest, file.size_bytes)
        except Damaged:
            continue
        for index in range(len(pieces.pieces)):
            span = slice(index * PIECE_BYTES, (index + 1) * PIECE_BYTES)
            assert right[span] == now[span] or digest_piece(now[span]) != pieces.pieces[index]


def check_mended(yard: Yard, cache: ModelCache) -> None:
    """Every model can be made right again."""
    for url in yard.models:
        if any(entry.url == url for entry in cache.ls()):
            assert repaired(cache, url) == []
    yard.check_whole(cache)
    yard.check_accounts(cache)


def files_below(directory: Path) -> list[Path]:
    """All files with a bit to flip, in order."""
    paths = sorted(path for path in directory.rglob("*") if path.is_file())
    return [path for path in paths if path.stat().st_size]


def test_a_killed_download_costs_at_most_a_piece_for_each_connection(
    yard: Yard, models: Models
) -> None:
    work = yard.measure(Work(start="bare", order={"verb": "preload", "url": models.old}))
    missing = yard.size_bytes(models.old) - len(yard.models[models.leased]["common.model"])

    @settings(max_examples=DOWNLOADS, **examples)
    @given(moment=moments, more=st.lists(moments, max_size=1))
    def download(moment: Moment, more: list[Moment]) -> None:
        with yard.struck(work, moment, models.leased) as struck:
            before = yard.server.count() - struck.served_bytes
            for another in more:
                yard.check_whole(struck.cache)
                yard.kill(work, another, struck.cache.dir)
            yard.check_whole(struck.cache)
            yard.check_leased(struck.cache, models.leased)
            preload(yard, struck.cache, models.old)
            served = yard.server.count() - before
            assert missing <= served <= missing + WASTE_BYTES * (1 + len(more))
            yard.check_leased(struck.cache, models.leased)
            check_end(yard, struck)

    before = yard.kills
    download()
    assert yard.kills - before >= DOWNLOADS


def test_a_killed_eviction_takes_all_of_a_model_or_nothing_and_nobody_elses(
    yard: Yard, models: Models
) -> None:
    with yard.copied("mixed") as directory:
        mixed = make_cache(directory)
        used_bytes = mixed.usage().bytes_used
        digests = {file.path: file.digest for file in yard.manifest(mixed, models.old).files}
    works = [
        yard.measure(Work(start="mixed", order=order))
        for order in (
            {"verb": "evict", "url": models.old},
            {"verb": "evict_much", "size_bytes": 500_000, "quota_bytes": used_bytes + 10},
            {"verb": "preload", "url": models.new, "quota_bytes": used_bytes + 400_000},
        )
    ]

    @settings(max_examples=EVICTIONS, **examples)
    @given(work=st.sampled_from(works), moment=moments)
    def evict(work: Work, moment: Moment) -> None:
        with yard.struck(work, moment, models.leased) as struck:
            cache = struck.cache
            yard.check_whole(cache)
            yard.check_leased(cache, models.leased)
            if work.order["verb"] == "preload":
                served = struck.served_bytes + preload(yard, cache, models.new)
                assert served <= yard.size_bytes(models.new) + WASTE_BYTES
                assert cache.usage().bytes_used <= work.order["quota_bytes"]
            else:
                whole = cache.find(models.old) is not None
                missing = sum(
                    len(yard.models[models.old][path])
                    for path, digest in digests.items()
                    if not cache.store.layout.blob(digest).exists()
                )
                assert not (whole and missing)
                cache = struck.cache = make_cache(cache.dir)
                assert preload(yard, cache, models.old) <= missing
            yard.check_leased(cache, models.leased)
            check_end(yard, struck)

    before = yard.kills
    evict()
    assert yard.kills - before >= EVICTIONS


def test_a_killed_prewarming_leaves_no_lease_no_process_and_no_trace(
    yard: Yard, models: Models
) -> None:
    works = [
        yard.measure(
            Work(start="mixed", order={"verb": "prewarm", "url": models.old, "keep": keep})
        )
        for keep in (False, True)
    ]

    @settings(max_examples=PREWARMS, **examples)
    @given(work=st.sampled_from(works), moment=moments)
    def prewarm(work: Work, moment: Moment) -> None:
        with yard.struck(work, moment, models.leased) as struck:
            yard.check_whole(struck.cache)
            yard.check_leased(struck.cache, models.leased)
            files = files_of(yard.find(struck.cache, models.old).path)
            report = residency.prewarm(files)
            assert report.bytes_missing == 0
            assert report.bytes_read + report.bytes_skipped == yard.size_bytes(models.old)
            assert preload(yard, struck.cache, models.old) == struck.served_bytes == 0
            check_end(yard, struck)

    before = yard.kills
    prewarm()
    assert yard.kills - before >= PREWARMS


def test_a_killed_repair_goes_on_and_serves_nothing_that_is_damaged(
    yard: Yard, models: Models
) -> None:
    work = yard.measure(Work(start="hurt", order={"verb": "repair", "url": models.old}))

    @settings(max_examples=REPAIRS, **examples)
    @given(moment=moments)
    def repair(moment: Moment) -> None:
        with yard.struck(work, moment, models.leased) as struck:
            before = yard.server.count() - struck.served_bytes
            yard.check_leased(struck.cache, models.leased)
            check_caught(yard, struck.cache)
            assert repaired(struck.cache, models.old) == []
            served = yard.server.count() - before
            assert served <= len(HURT_PIECES) * PIECE_BYTES + WASTE_BYTES
            check_end(yard, struck)

    before = yard.kills
    repair()
    assert yard.kills - before >= REPAIRS


@pytest.mark.parametrize("start", ["bare", "shown"])
def test_killed_at_any_step_publishing_or_evicting_leaves_nothing_of_a_hub_s_model(
    yard: Yard, models: Models, start: str
) -> None:
    url, made = models.made, yard.root / "made"
    evict = {"verb": "evict", "url": url}
    publish = {"verb": "publish", "url": url, "from": str(made), "revision": REVISION}
    work = yard.measure(Work(start=start, order=publish if start == "bare" else evict))
    for step in range(work.steps):
        with yard.struck(work, Moment(fraction=step / work.steps), models.leased) as struck:
            yard.check_whole(struck.cache)
            yard.check_leased(struck.cache, models.leased)
            if step % 2 and start == "bare":
                model = struck.cache.publish(made, url=url, revision=REVISION)
                assert read_tree(model.path) == yard.models[url]
            elif url in {entry.url for entry in struck.cache.ls() if not entry.complete}:
                struck.cache.evict(url)
            check_end(yard, struck)


def test_a_step_s_result_killed_anywhere_is_all_there_or_left_to_be_made(
    yard: Yard, models: Models
) -> None:
    """Half made it is swept, whole it is taken over later without being made again; its bytes are
    counted all the while, and it is never believed half."""
    files = {"model.safetensors": make_bytes(300_000, 8), "config.json": b"{}"}
    yard.put_here("step", "prepared://step", files)
    del yard.models["prepared://step"]
    order = {
        "verb": "take_over", "key": "step", "url": models.leased, "from": str(yard.root / "step"),
        "size_bytes": 310_000,
    }  # fmt: skip
    work = yard.measure(Work(start="bare", order=order))
    again, kills = 0, range(0, work.steps, max(1, work.steps // RESULTS))
    for step in kills:
        moment = Moment(fraction=step / work.steps, torn=0.5)
        with yard.struck(work, moment, models.leased) as struck:
            cache = struck.cache
            assert cache.usage().bytes_used == count_bytes(cache.dir)
            yard.check_leased(cache, models.leased)
            found = cache.find("prepared://step")
            if found is not None:
                assert read_tree(found.path) == files
                assert cache.verify("prepared://step") == []
            cache.sweep()
            left = read_unfinished_results(cache.store.layout)
            assert all(one.step is not None and one.step.finished for one in left)
            assert not (left and cache.find("prepared://step") is not None)
            again += not left and cache.find("prepared://step") is None
            take_over(cache, order)
            found = cache.find("prepared://step")
            assert found is not None
            assert read_tree(found.path) == files
            assert read_unfinished_results(cache.store.layout) == []
            cache.evict("prepared://step")
            check_end(yard, struck)
    assert 0 < again < len(kills), "some kills are before it was whole, and some after"


@settings(max_examples=70, **examples)
@given(flip=flips, where=st.sampled_from(["blobs", "pieces", "models"]))
def test_a_flipped_bit_in_what_is_whole_is_caught_and_mended(
    yard: Yard, models: Models, flip: Flip, where: str
) -> None:
    with yard.copied("mixed") as directory:
        cache = make_cache(directory)
        paths = files_below(directory / ("blobs" if where == "pieces" else where))
        path = flip.apply([path for path in paths if where != "pieces" or path.suffix])
        noticed = check_caught(yard, cache)
        counts = where != "models" or path.name.startswith("manifest.")
        assert noticed or not counts, f"{path} is not what it was, and nobody notices"
        check_mended(yard, cache)
        yard.check_empties(cache)


@settings(max_examples=35, **examples)
@given(flip=flips, where=st.sampled_from([".", "partial"]))
def test_a_flipped_bit_in_what_a_kill_has_left_is_caught_and_mended(
    yard: Yard, models: Models, flip: Flip, where: str
) -> None:
    with yard.copied("half") as directory:
        cache = make_cache(directory)
        path = flip.apply(files_below(directory / where))
        check_caught(yard, cache)
        model = cache.preload(models.plain)
        check_caught(yard, cache)
        if "partial" in path.parts:
            assert read_tree(model.path) == yard.models[models.plain]
            assert cache.verify(models.plain) == []
        check_mended(yard, cache)
        assert read_tree(yard.find(cache, models.plain).path) == yard.models[models.plain]
        yard.check_empties(cache)
