"""Damage on the disk: every bit of it is found, and only what it hit is fetched again."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from folder_store import PIECE, Rig, bytes_of, count_bytes, flip_bit, read_tree
from hypothesis import given, settings
from hypothesis import strategies as st

from modelcache.cache import ModelCache
from modelcache.fetch.fetch import Salvage, plan_salvage
from modelcache.ports import CachedModel
from modelcache.store.store import Damage
from modelcache.types import CacheError, Cancelled, FileEntry, Manifest, Progress, SourceError

WEIGHTS = bytes_of(5 * PIECE + 77, 1)
FILES = {"config.json": b'{"a": 1}', "model.safetensors": WEIGHTS}
SIZE = sum(map(len, FILES.values()))


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    return Rig(root=tmp_path)


def blob_of(cache: ModelCache, model: CachedModel, path: str = "model.safetensors") -> Path:
    assert model.manifest is not None
    digest = next(file.digest for file in model.manifest.files if file.path == path)
    return cache.store.layout.blob(digest)


def piece_bytes(index: int) -> int:
    return min(PIECE, len(WEIGHTS) - index * PIECE)


@pytest.fixture(scope="module")
def standing(tmp_path_factory: pytest.TempPathFactory) -> tuple[Rig, ModelCache, CachedModel]:
    """A cache that is as it should be again after each example."""
    rig = Rig(root=tmp_path_factory.mktemp("standing"))
    cache = rig.cache()
    return rig, cache, cache.preload(rig.put("models/a", FILES))


@given(st.integers(0, len(WEIGHTS) * 8 - 1))
@settings(max_examples=20, deadline=None)
def test_any_bit_of_a_blob_is_found_and_its_piece_alone_fetched_again(
    standing: tuple[Rig, ModelCache, CachedModel], bit: int
) -> None:
    rig, cache, model = standing
    flip_bit(blob_of(cache, model), bit)
    piece = bit // 8 // PIECE
    found = cache.verify(model.url)
    assert [(damage.path, damage.piece) for damage in found] == [("model.safetensors", piece)]
    fetched = rig.fetched_bytes
    assert cache.verify(model.url, repair=True) == found
    assert rig.fetched_bytes - fetched == piece_bytes(piece)
    assert read_tree(model.path) == FILES
    assert cache.verify(model.url) == []
    assert cache.find(model.url) == model
    assert cache.usage().bytes_used == count_bytes(cache.dir)
    assert cache.usage().bytes_partial == 0


@given(st.integers(0, 6 * 40 * 8 - 1))
@settings(max_examples=15, deadline=None)
def test_any_bit_of_the_record_of_pieces_is_found_and_mended(
    standing: tuple[Rig, ModelCache, CachedModel], bit: int
) -> None:
    rig, cache, model = standing
    blob = blob_of(cache, model)
    flip_bit(blob.with_name(f"{blob.name}.pieces"), bit)
    assert read_tree(model.path) == FILES, "the bytes are as they were"
    fetched = rig.fetched_bytes
    (damage,) = cache.verify(model.url, repair=True)
    assert damage.path == "model.safetensors"
    # A piece's own record is believed no more than its bytes; without any, all bytes are hashed.
    lost = piece_bytes(damage.piece) if damage.piece is not None else 0
    assert rig.fetched_bytes - fetched == lost
    assert cache.verify(model.url) == []
    assert read_tree(model.path) == FILES


@given(st.sets(st.integers(0, len(WEIGHTS) * 8 - 1), min_size=1, max_size=4), st.booleans())
@settings(max_examples=12, deadline=None)
def test_any_number_of_bits_is_found_and_mended(
    standing: tuple[Rig, ModelCache, CachedModel], bits: set[int], record_too: bool
) -> None:
    rig, cache, model = standing
    blob = blob_of(cache, model)
    for bit in bits:
        flip_bit(blob, bit)
    if record_too:
        flip_bit(blob.with_name(f"{blob.name}.pieces"), min(bits) % (32 * 8))
    fetched = rig.fetched_bytes
    assert cache.verify(model.url, repair=True)
    if not record_too:
        pieces = {bit // 8 // PIECE for bit in bits}
        assert rig.fetched_bytes - fetched == sum(map(piece_bytes, pieces))
    assert read_tree(model.path) == FILES
    assert cache.verify(model.url) == []


@pytest.mark.parametrize(
    ("problem", "damage", "lost"),
    [
        ("it is missing", lambda blob: blob.unlink(), SIZE),
        ("it has 4096 bytes instead of", lambda blob: os.truncate(blob, PIECE), SIZE),
        ("cannot be read", lambda blob: blob.with_name(f"{blob.name}.pieces").unlink(), 0),
        (
            "has 7 bytes instead of 240",
            lambda blob: os.truncate(blob.with_name(f"{blob.name}.pieces"), 7),
            0,
        ),
    ],
)
def test_whatever_is_lost_is_named_and_brought_again(
    rig: Rig, problem: str, damage: Callable[[Path], object], lost: int
) -> None:
    cache = rig.cache()
    model = cache.preload(rig.put("models/a", FILES))
    damage(blob_of(cache, model))
    fetched = rig.fetched_bytes
    (found,) = cache.verify(model.url, repair=True)
    assert problem in found.problem
    assert found.piece is None
    assert rig.fetched_bytes - fetched <= lost
    assert read_tree(model.path) == FILES
    assert cache.verify(model.url) == []
    assert cache.usage().bytes_used == count_bytes(cache.dir)


@pytest.mark.parametrize("name", ["manifest.json", "manifest.copy.json"])
@pytest.mark.parametrize("gone", [True, False])
def test_a_damaged_record_is_written_again_from_the_other(rig: Rig, name: str, gone: bool) -> None:
    cache = rig.cache()
    model = cache.preload(rig.put("models/a", FILES))
    record = cache.store.layout.revision(model.url, model.revision) / name
    whole = record.read_bytes()
    if not gone:
        flip_bit(record, 99)
    elif name == "manifest.copy.json":
        record.unlink()
    else:
        record.write_bytes(b"")
    found = cache.verify(model.url, repair=True)
    assert [damage.path for damage in found] == [name]
    assert record.read_bytes() == whole
    assert cache.verify(model.url) == []
    assert rig.fetched_bytes == SIZE


def test_what_two_models_share_is_mended_for_both(rig: Rig) -> None:
    cache = rig.cache()
    one = cache.preload(rig.put("models/a", FILES))
    other = cache.preload(rig.put("models/b", {"w.safetensors": WEIGHTS, "copy.txt": WEIGHTS}))
    flip_bit(blob_of(cache, one), 8 * (PIECE + 1))
    for model in (one, other):
        assert [damage.piece for damage in cache.verify(model.url)] == [1], "each blob once"
    fetched = rig.fetched_bytes
    cache.verify(other.url, repair=True)
    assert rig.fetched_bytes - fetched <= 2 * PIECE
    for url, files in (
        (one.url, FILES),
        (other.url, {"w.safetensors": WEIGHTS, "copy.txt": WEIGHTS}),
    ):
        found = cache.find(url)
        assert found is not None
        assert read_tree(found.path) == files
        assert cache.verify(url) == []
    assert cache.usage().bytes_used == count_bytes(cache.dir)


def test_a_leased_model_is_mended_and_its_lease_stays(rig: Rig) -> None:
    cache = rig.cache()
    model = cache.preload(rig.put("models/a", FILES))
    flip_bit(blob_of(cache, model), 3)
    with cache.lease(model, "engine"), open(model.path / "model.safetensors", "rb") as file:
        cache.verify(model.url, repair=True)
        # Whoever has it open keeps what it opened, and nobody writes beneath it.
        assert file.read() != WEIGHTS
        assert cache.ls()[0].leases == ("engine",)
        assert read_tree(model.path) == FILES


def test_verify_reads_all_of_it_and_says_how_far_it_is(rig: Rig) -> None:
    cache = rig.cache()
    model = cache.preload(rig.put("models/a", FILES))
    told: list[Progress] = []
    assert cache.verify(model.url, on_progress=told.append) == []
    done = [progress.bytes_done for progress in told]
    assert done == sorted(done)
    assert told[-1] == Progress(phase="checking", bytes_done=SIZE, bytes_total=SIZE)
    with pytest.raises(Cancelled):
        cache.verify(model.url, cancelled=lambda: True)
    assert cache.find(model.url) == model


def test_a_revision_that_is_history_cannot_be_mended(rig: Rig) -> None:
    cache = rig.cache()
    model = cache.preload(rig.put("models/a", FILES))
    flip_bit(blob_of(cache, model), 3)
    rig.put("models/a", {"config.json": b"{}"})
    with pytest.raises(CacheError, match=f"so {model.revision} cannot be mended; evict it"):
        cache.verify(model.url, repair=True)
    (rig.models / "models" / "a" / "config.json").unlink()
    (rig.models / "models" / "a").rmdir()
    with pytest.raises(CacheError, match="cannot be mended; evict it"):
        cache.verify(model.url, repair=True)
    assert [damage.piece for damage in cache.verify(model.url)] == [0], "it is still there"


def test_without_its_store_nothing_is_mended_and_nothing_lost(rig: Rig) -> None:
    cache = rig.cache()
    model = cache.preload(rig.put("models/a", FILES))
    flip_bit(blob_of(cache, model), 3)
    rig.down = True
    with pytest.raises(SourceError, match="the line is dead"):
        cache.verify(model.url, repair=True)
    assert len(cache.verify(model.url)) == 1
    rig.down = False
    cache.verify(model.url, repair=True)
    assert cache.verify(model.url) == []


def test_an_older_revision_is_mended_where_its_store_still_has_it(rig: Rig) -> None:
    cache = rig.cache()
    model = cache.preload(rig.put("models/a", FILES))
    cache.preload(rig.put("models/b", FILES))
    flip_bit(blob_of(cache, model), 3)
    newest = cache.preload(rig.put("models/a", {**FILES, "more": b"x"}))
    # It shares the damaged file: looks do not show a silent flip, reading does.
    assert len(cache.verify(newest.url)) == 1
    cache.verify(newest.url, repair=True)
    for url, revision in ((model.url, model.revision), (newest.url, None), ("s3://models/b", None)):
        assert cache.verify(url, revision) == []


def test_an_older_revision_that_is_mended_is_not_the_newest(rig: Rig) -> None:
    cache = rig.cache()
    older = cache.preload(rig.put("models/a", FILES), revision="main")
    rig.put("models/a", {**FILES, "config.json": b"{}"})
    newer = cache.preload(older.url, revision="main")
    assert cache.find(older.url) == newer
    rig.put("models/a", FILES)
    flip_bit(blob_of(cache, older), 3)
    cache.verify(older.url, older.revision, repair=True)
    assert cache.find(older.url) == newer
    assert cache.find(older.url, older.revision) == older


def test_a_repair_names_pieces_by_file() -> None:
    entries = tuple(
        FileEntry(path=path, size_bytes=9, digest=digest)
        for path, digest in (("a", "d1"), ("b", "d2"), ("c", "d1"), ("d", "d3"))
    )
    manifest = Manifest(url="u", revision="r", files=entries, created_at_s=0.0)
    found = [
        Damage(path="a", problem="p", digest="d1", piece=0),
        Damage(path="a", problem="p", digest="d1", piece=4),
        Damage(path="b", problem="gone", digest="d2"),
        Damage(path="manifest.json", problem="p"),
    ]
    assert plan_salvage(manifest, found) == {
        "a": Salvage(digest="d1", bad_pieces=frozenset({0, 4})),
        "b": Salvage(digest="d2", bad_pieces=frozenset()),
        "c": Salvage(digest="d1", bad_pieces=frozenset({0, 4})),
    }
    assert plan_salvage(manifest, found[3:]) == {}
