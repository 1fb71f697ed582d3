"""The disk store: what models share is there once, and every byte is accounted for."""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from folder_store import PIECE, OneByOne, Rig, bytes_of, count_bytes, flip_bit, read_tree

from modelcache.cache import ModelCache
from modelcache.fetch.fetch import Fetch, FetchRequest
from modelcache.ports import CachedModel
from modelcache.store import files
from modelcache.store.records import scan
from modelcache.types import Cancelled, Damaged, Listing, Manifest, ModelRef, RemoteFile

SAME = bytes_of(3 * PIECE + 7, 1)
OWN = bytes_of(2 * PIECE, 2)
OTHER = bytes_of(PIECE + 1, 3)


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    return Rig(root=tmp_path)


def manifest_of(model: CachedModel) -> Manifest:
    assert model.manifest is not None
    return model.manifest


def blob_of(cache: ModelCache, model: CachedModel, path: str) -> Path:
    digest = next(file.digest for file in manifest_of(model).files if file.path == path)
    return cache.store.layout.blob(digest)


def blob_bytes(cache: ModelCache) -> int:
    """The blobs themselves, without the digests beside them."""
    return sum(
        path.stat().st_size
        for path in (cache.dir / "blobs").rglob("*")
        if path.is_file() and path.suffix != ".pieces"
    )


def assert_accounted(cache: ModelCache) -> None:
    usage = cache.usage()
    assert usage.bytes_used == count_bytes(cache.dir)
    assert usage.bytes_used == usage.bytes_blobs + usage.bytes_partial + usage.bytes_records


@pytest.mark.parametrize("digests", [True, False])
def test_two_models_with_the_same_file_are_both_whole_and_it_is_there_once(
    rig: Rig, digests: bool
) -> None:
    # Without a published digest the second one is fetched, becomes the same blob, and must not
    # leave the first one's digests with its own time.
    rig.digests = digests
    cache = rig.cache()
    one = rig.put("models/one", {"same.bin": SAME, "own.bin": OWN})
    other = rig.put("models/other", {"name/differs.bin": SAME, "other.bin": OTHER})
    for url in (one, other):
        cache.preload(url)
        assert_accounted(cache)
    models = [cache.find(url) for url in (one, other)]
    assert models[0] is not None
    assert models[1] is not None
    assert read_tree(models[0].path) == {"same.bin": SAME, "own.bin": OWN}
    assert read_tree(models[1].path) == {"name/differs.bin": SAME, "other.bin": OTHER}
    assert blob_bytes(cache) == len(SAME) + len(OWN) + len(OTHER)
    assert rig.fetched_bytes == blob_bytes(cache) + (0 if digests else len(SAME))
    unique = {entry.url: entry.bytes_unique for entry in cache.ls()}
    assert unique == {one: len(OWN), other: len(OTHER)}
    assert all(cache.verify(url) == [] for url in (one, other))
    fetched = rig.fetched_bytes
    assert cache.preload(one).path == models[0].path
    assert rig.fetched_bytes == fetched


@pytest.mark.parametrize("digests", [True, False])
def test_what_is_shared_goes_with_the_last_that_has_it(rig: Rig, digests: bool) -> None:
    rig.digests = digests
    cache = rig.cache()
    one = rig.put("models/one", {"same.bin": SAME, "own.bin": OWN})
    other = rig.put("models/other", {"same.bin": SAME})
    for url in (one, other):
        cache.preload(url)
    for url, blobs_left in ((one, len(SAME)), (other, 0)):
        before = count_bytes(cache.dir)
        freed = cache.evict(url)
        assert freed == before - count_bytes(cache.dir)
        assert blob_bytes(cache) == blobs_left
        assert_accounted(cache)
        assert cache.find(url) is None
        if blobs_left:
            found = cache.find(other)
            assert found is not None
            assert read_tree(found.path) == {"same.bin": SAME}
    assert count_bytes(cache.dir) == 0


def test_one_model_may_have_the_same_bytes_under_two_names(rig: Rig) -> None:
    files = {"a.bin": SAME, "deep/b.bin": SAME, "empty": b"", "void": b""}
    for digests in (True, False):
        rig.digests = digests
        cache = rig.cache(f"cache-{digests}")
        model = cache.preload(rig.put("models/one", files))
        assert read_tree(model.path) == files
        assert blob_bytes(cache) == len(SAME)
        assert_accounted(cache)


def test_a_directory_published_with_bytes_that_are_there_adds_none(rig: Rig) -> None:
    cache = rig.cache()
    model = cache.preload(rig.put("models/one", {"same.bin": SAME}))
    made = rig.root / "made"
    made.mkdir()
    (made / "copy.bin").write_bytes(SAME)
    published = cache.publish(made, url="prepared://x", revision="r1")
    assert read_tree(published.path) == {"copy.bin": SAME}
    assert blob_bytes(cache) == len(SAME)
    # Counted over all that is below it: not one name may still stand for a second copy.
    assert count_bytes(cache.dir) < 2 * len(SAME)
    assert_accounted(cache)
    assert cache.find(model.url) is not None


def test_a_view_that_was_touched_is_made_again(rig: Rig) -> None:
    cache = rig.cache()
    url = rig.put("models/one", {"a/b.bin": SAME, "c.bin": OWN})
    path = cache.preload(url).path
    damages: list[Callable[[], object]] = [
        (path / "c.bin").unlink,
        lambda: os.replace(path / "c.bin", path / "d.bin"),
        lambda: ((path / "c.bin").unlink(), (path / "c.bin").write_bytes(b"mine")),
        lambda: ((path / "a" / "b.bin").unlink(), (path / "a").rmdir()),
        lambda: files.remove_tree(path),
    ]
    for damage in damages:
        damage()
        found = cache.find(url)
        assert found is not None
        assert read_tree(found.path) == {"a/b.bin": SAME, "c.bin": OWN}
        assert_accounted(cache)


def test_without_hard_links_a_view_is_of_symbolic_ones(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("modelcache.store.snapshots.link", lambda source, target: False)
    cache = rig.cache()
    url = rig.put("models/one", {"a/b.bin": SAME, "c.bin": OWN})
    path = cache.preload(url).path
    assert (path / "a" / "b.bin").is_symlink()
    assert not os.readlink(path / "c.bin").startswith("/"), "the cache may be mounted elsewhere"
    moved = rig.root / "moved"
    os.rename(cache.dir, moved)
    found = rig.cache("moved").find(url)
    assert found is not None
    assert read_tree(found.path) == {"a/b.bin": SAME, "c.bin": OWN}
    assert rig.cache("moved").usage().bytes_used == count_bytes(moved)


def test_a_blob_that_was_written_to_is_not_found_and_is_fetched_again(rig: Rig) -> None:
    cache = rig.cache()
    url = rig.put("models/one", {"a.bin": SAME, "b.bin": OWN})
    blob = blob_of(cache, cache.preload(url), "a.bin")
    blob.chmod(0o644)
    with blob.open("r+b") as file:
        file.write(b"xx")
    os.utime(blob, (1, 1))
    assert cache.find(url) is None
    assert not cache.ls()[0].complete
    fetched = rig.fetched_bytes
    assert read_tree(cache.preload(url).path) == {"a.bin": SAME, "b.bin": OWN}
    assert rig.fetched_bytes - fetched == len(SAME), "the other file was as it was"
    assert_accounted(cache)


def test_a_blob_with_another_time_but_its_own_bytes_is_only_hashed_again(rig: Rig) -> None:
    cache = rig.cache()
    url = rig.put("models/one", {"a.bin": SAME})
    blob = blob_of(cache, cache.preload(url), "a.bin")
    os.utime(blob, (1, 1))
    assert cache.find(url) is None
    seen: list[str] = []
    model = cache.preload(url, on_progress=lambda progress: seen.append(progress.phase))
    assert read_tree(model.path) == {"a.bin": SAME}
    assert rig.fetched_bytes == len(SAME)
    assert "checking" in seen
    assert cache.find(url) == model


@pytest.mark.parametrize("lost", ["blob", "pieces"])
def test_a_blob_or_its_record_that_is_gone_is_brought_again(rig: Rig, lost: str) -> None:
    cache = rig.cache()
    url = rig.put("models/one", {"a.bin": SAME})
    blob = blob_of(cache, cache.preload(url), "a.bin")
    (blob if lost == "blob" else blob.with_name(blob.name + ".pieces")).unlink()
    assert cache.find(url) is None
    model = cache.preload(url)
    assert read_tree(model.path) == {"a.bin": SAME}
    assert cache.verify(url) == []
    assert rig.fetched_bytes == len(SAME) * (2 if lost == "blob" else 1)


def test_a_damaged_manifest_is_made_again_from_its_copy(rig: Rig) -> None:
    cache = rig.cache()
    url = rig.put("models/one", {"a.bin": SAME})
    model = cache.preload(url)
    directory = cache.store.layout.revision(url, model.revision)
    flip_bit(directory / "manifest.json", 333)
    assert cache.find(url) == model
    assert [damage.path for damage in cache.verify(url, repair=True)] == ["manifest.json"]
    assert cache.verify(url) == []
    assert rig.fetched_bytes == len(SAME)
    for name in ("manifest.json", "manifest.copy.json"):
        flip_bit(directory / name, 333)
    assert cache.find(url) is None
    assert cache.ls() == []
    assert read_tree(cache.preload(url).path) == {"a.bin": SAME}
    assert rig.fetched_bytes == len(SAME), "its bytes were there all the time"


def test_a_name_that_leads_nowhere_is_answered_with_the_newest(rig: Rig) -> None:
    cache = rig.cache()
    url = rig.put("models/one", {"a.bin": OWN})
    cache.preload(url)
    rig.put("models/one", {"a.bin": OTHER})
    newest = cache.preload(url)
    for broken in (b"gone", b"\xff\xff", b"../../x", b"a\0b"):
        cache.store.layout.ref(url, None).write_bytes(broken)
        found = cache.find(url)
        assert found is not None
        assert found.revision == newest.revision


def test_what_is_recognised_and_evicted_before_it_is_held_is_fetched(rig: Rig) -> None:
    # Between seeing that another model has the same file and writing down that it is wanted,
    # that model may go.
    cache = rig.cache()
    one = rig.put("models/one", {"same.bin": SAME})
    cache.preload(one)
    rig.put("models/other", {"a.bin": SAME, "b.bin": OTHER})
    ref = ModelRef(url="s3://models/other", scheme="s3", location="models/other")
    source = rig.source(ref)

    def find_local(file: RemoteFile) -> Path | None:
        if cache.find(one) is not None:
            cache.evict(one)
        return None

    want = FetchRequest(ref=ref, listing=source.list(), find_local=find_local)
    Fetch(cache.store, OneByOne(), source, want).run()  # type: ignore[arg-type]
    found = cache.find(ref.url)
    assert found is not None
    assert read_tree(found.path) == {"a.bin": SAME, "b.bin": OTHER}
    assert_accounted(cache)


def test_looking_at_the_models_while_one_goes_is_no_error(rig: Rig) -> None:
    cache = rig.cache()
    urls = [rig.put(f"models/{name}", {"a.bin": OWN}) for name in ("one", "two")]
    for url in urls:
        cache.preload(url)
    looking = scan(cache.store.layout)
    _, first = next(looking)
    assert first is not None
    cache.evict(next(url for url in urls if url != first.url))
    assert [record for _, record in looking] == []


def test_two_that_look_whether_a_model_is_being_fetched_do_not_take_each_other_for_it(
    rig: Rig,
) -> None:
    lock = rig.root / "lock"
    lock.touch()
    assert not files.is_locked(rig.root / "none")
    with files.open_lock(lock) as fd:
        assert not files.is_locked(lock)
        files.fcntl.flock(fd, files.fcntl.LOCK_SH)  # as the other one looks
        assert not files.is_locked(lock)
        files.fcntl.flock(fd, files.fcntl.LOCK_EX)
        assert files.is_locked(lock)
    assert not files.is_locked(lock)


def test_what_is_damaged_as_it_is_asked_for_is_fetched_again(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Whoever fetches another model with the same file may drop a damaged blob at any moment.
    cache = rig.cache()
    url = rig.put("models/one", {"a.bin": SAME})
    model = cache.preload(url)
    shutil.rmtree(model.path)
    is_whole = cache.store.is_whole
    dropped: list[str] = []

    def look(manifest: Manifest) -> bool:
        whole = is_whole(manifest)
        if not dropped:
            dropped.append(manifest.files[0].digest)
            cache.store.drop_blob(dropped[0])
        return whole

    monkeypatch.setattr(cache.store, "is_whole", look)
    assert read_tree(cache.preload(url).path) == {"a.bin": SAME}
    assert rig.fetched_bytes == 2 * len(SAME)
    assert len(dropped) == 1


def test_what_was_fetched_is_kept_though_one_note_of_it_is_damaged(rig: Rig) -> None:
    cache = rig.cache()
    url = rig.put("models/one", {"a.bin": OTHER, "b.bin": SAME})
    with pytest.raises(Cancelled):
        cache.preload(url, cancelled=lambda: rig.fetched_bytes > len(OTHER))
    notes = [path for path in (cache.dir / "known").iterdir() if len(path.name) == 40]
    assert len(notes) == 1
    notes[0].write_text("ab" * 32)
    cache.sweep()
    before = rig.fetched_bytes
    assert read_tree(cache.preload(url).path) == {"a.bin": OTHER, "b.bin": SAME}
    assert rig.fetched_bytes - before <= len(SAME), "its SHA-256 is a note of it too"


def test_a_listing_that_leads_out_of_the_cache_is_refused(rig: Rig) -> None:
    cache = rig.cache()
    ref = ModelRef(url="s3://models/evil", scheme="s3", location="models/evil")
    listing = Listing(revision="r", files=(RemoteFile(path="../../x", size_bytes=1),))
    with pytest.raises(Exception, match="lists a file called"):
        Fetch(cache.store, OneByOne(), None, FetchRequest(ref=ref, listing=listing))  # type: ignore[arg-type]
    assert not cache.dir.exists()


def test_what_is_not_what_its_store_says_is_asked_for_twice_and_not_kept(rig: Rig) -> None:
    cache = rig.cache()
    url = rig.put("models/one", {"a.bin": SAME, "b.bin": OWN})
    source = rig.source(ModelRef(url=url, scheme="s3", location="models/one"))
    listing = source.list()
    lying = Listing(
        revision=listing.revision,
        files=(
            RemoteFile(path="a.bin", size_bytes=len(SAME), digests={"sha256": "0" * 64}),
            listing.files[1],
        ),
    )
    want = FetchRequest(ref=source.ref, listing=lying)
    with pytest.raises(Damaged, match=r"models/one: a\.bin: its sha256 is"):
        Fetch(cache.store, OneByOne(), source, want).run()  # type: ignore[arg-type]
    assert rig.fetched_bytes == 2 * len(SAME)
    assert cache.find(url) is None
    assert not any((cache.dir / "blobs").rglob("*"))
    assert_accounted(cache)
    assert read_tree(cache.preload(url).path) == {"a.bin": SAME, "b.bin": OWN}


def test_a_small_file_that_cannot_be_written_leaves_the_one_before(tmp_path: Path) -> None:
    files.write_whole(tmp_path / "a.json", b"{}", tmp=tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            files.write_whole(tmp_path / "a.json", b"[1]", tmp=tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert read_tree(tmp_path) == {"a.json": b"{}"}
