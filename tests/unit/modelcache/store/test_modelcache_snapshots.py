"""Hugging Face caches: their files are taken over, and ours are shown to whatever reads one."""

from __future__ import annotations

import errno
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
from folder_store import PIECE, Rig, bytes_of, count_bytes, flip_bit, read_tree

from modelcache.refs import parse_ref
from modelcache.store.layout import Layout
from modelcache.store.snapshots import find_file, find_snapshot, hub_dirs, hub_place
from modelcache.types import ModelRef, NoSpace, NotFound, RemoteFile, SourceError

URL = "hf://org/name"
COMMIT = "c0ffee" + "0" * 34
FILES = {
    "model.safetensors": bytes_of(3 * PIECE + 5, 1),
    "config.json": b'{"architectures": []}',
    "sub/vocab.txt": b"a b c",
}


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    return Rig(root=tmp_path)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def git_sha1(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def fill_hub(
    hub: Path, files: dict[str, bytes] = FILES, name: str = "org/name", commit: str = COMMIT
) -> Path:
    """A cache as that library makes it; the model's folder."""
    model = hub / f"models--{name.replace('/', '--')}"
    for path, data in files.items():
        digest = sha256(data) if path.endswith(".safetensors") else git_sha1(data)
        blob = model / "blobs" / digest
        blob.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(data)
        link = model / "snapshots" / commit / path
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    (model / "refs").mkdir(exist_ok=True)
    (model / "refs" / "main").write_text(commit)
    return model


@pytest.mark.parametrize(
    ("given", "environ", "dirs"),
    [
        ((Path("/a"), Path("/b")), {"HF_HUB_CACHE": "/c"}, ("/a", "/b")),
        ((), {"HF_HUB_CACHE": "/c", "HF_HOME": "/h"}, ("/c",)),
        ((), {"HF_HOME": "/h", "XDG_CACHE_HOME": "/x"}, ("/h/hub",)),
        ((), {"XDG_CACHE_HOME": "/x"}, ("/x/huggingface/hub",)),
        ((), {}, ("~/.cache/huggingface/hub",)),
        ((), {"HF_HUB_CACHE": "~/models"}, ("~/models",)),
    ],
)
def test_the_caches_are_looked_for_where_that_library_does(
    given: tuple[Path, ...], environ: dict[str, str], dirs: tuple[str, ...]
) -> None:
    assert hub_dirs(given, environ) == tuple(Path(path).expanduser() for path in dirs)


def test_a_file_is_found_by_either_digest_and_its_size(tmp_path: Path) -> None:
    fill_hub(tmp_path)
    weights, config = FILES["model.safetensors"], FILES["config.json"]

    def find(size_bytes: int, **digests: str) -> Path | None:
        named = {kind.replace("_", "-"): digest for kind, digest in digests.items()}
        file = RemoteFile(path="any", size_bytes=size_bytes, digests=named)
        return find_file([tmp_path / "none", tmp_path], file)

    found = find(len(weights), sha256=sha256(weights))
    assert found is not None
    assert found.read_bytes() == weights
    found = find(len(config), sha256="0" * 64, git_sha1=git_sha1(config))
    assert found is not None
    assert found.read_bytes() == config
    assert find(len(weights) + 1, sha256=sha256(weights)) is None
    assert find(len(weights), md5=sha256(weights)) is None
    assert find(len(weights)) is None
    # A store's word becomes part of a pattern: nothing but a plain name may.
    assert find(len(weights), sha256="*") is None
    assert find(len(config), git_sha1="../refs/main") is None


def test_a_snapshot_is_listed_with_the_digests_its_links_lead_to(tmp_path: Path) -> None:
    fill_hub(tmp_path)
    for url in (URL, f"{URL}@main", f"{URL}@{COMMIT}"):
        listing = find_snapshot([tmp_path / "none", tmp_path], parse_ref(url))
        assert listing is not None
        assert listing.revision == COMMIT
        assert {file.path: file.size_bytes for file in listing.files} == {
            path: len(data) for path, data in FILES.items()
        }
        by_path = {file.path: file.digests for file in listing.files}
        assert by_path["model.safetensors"] == {"sha256": sha256(FILES["model.safetensors"])}
        assert by_path["config.json"] == {"git-sha1": git_sha1(FILES["config.json"])}


@pytest.mark.parametrize("url", ["s3://models/name", "hf://org/name/sub", "hf://org/other"])
def test_other_models_have_no_snapshot(tmp_path: Path, url: str) -> None:
    fill_hub(tmp_path)
    assert find_snapshot([tmp_path], parse_ref(url)) is None
    assert find_snapshot([tmp_path], parse_ref(f"{URL}@v2")) is None


@pytest.mark.parametrize("how", ["dangling", "a file of its own", "a ref elsewhere", "empty"])
def test_a_snapshot_that_cannot_be_checked_is_left_alone(tmp_path: Path, how: str) -> None:
    model = fill_hub(tmp_path)
    config = model / "snapshots" / COMMIT / "config.json"
    if how == "dangling":
        (model / "blobs" / git_sha1(FILES["config.json"])).unlink()
    elif how == "a file of its own":
        config.unlink()
        config.write_bytes(b"{}")
    elif how == "a ref elsewhere":
        (model / "refs" / "main").write_text("../../elsewhere")
    else:
        (model / "snapshots" / "e").mkdir()
        (model / "refs" / "main").write_text("e")
    assert find_snapshot([tmp_path], parse_ref(URL)) is None


def test_an_existing_cache_is_adopted_without_a_download(rig: Rig) -> None:
    rig.put("org/name", FILES)
    hub = rig.root / "hub"
    # The source publishes SHA-256 only, so every file has to be known by that.
    model = hub / "models--org--name" / "blobs"
    model.mkdir(parents=True)
    for data in FILES.values():
        (model / sha256(data)).write_bytes(data)
    before = read_tree(hub)
    cache = rig.cache()
    seen: list[str] = []
    found = cache.preload(URL, on_progress=lambda progress: seen.append(progress.phase))
    assert read_tree(found.path) == FILES
    assert rig.fetched_bytes == 0
    assert "checking" in seen
    assert cache.usage().bytes_used == count_bytes(cache.dir)
    assert cache.verify(URL) == []
    cache.evict(URL)
    assert read_tree(hub) == before, "theirs stays theirs"


@pytest.mark.parametrize("by_kernel", [True, False])
def test_a_file_on_another_disk_is_copied(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, by_kernel: bool
) -> None:
    def refuse(*_: object) -> int:
        raise OSError(errno.EXDEV, "between file systems")

    if not by_kernel:
        monkeypatch.setattr(os, "copy_file_range", refuse)
    monkeypatch.setattr("modelcache.fetch.fetch.link_or_clone", lambda source, target: None)
    rig.put("org/name", FILES)
    blobs = rig.root / "hub" / "models--any--thing" / "blobs"
    blobs.mkdir(parents=True)
    weights = FILES["model.safetensors"]
    (blobs / sha256(weights)).write_bytes(weights)
    cache = rig.cache()
    assert read_tree(cache.preload(URL).path) == FILES
    assert rig.fetched_bytes == sum(map(len, FILES.values())) - len(weights)
    (blobs / sha256(weights)).write_bytes(b"theirs")
    assert cache.verify(URL) == []


def test_a_damaged_file_of_an_existing_cache_is_not_adopted(rig: Rig) -> None:
    rig.put("org/name", FILES)
    blobs = rig.root / "hub" / "models--org--name" / "blobs"
    blobs.mkdir(parents=True)
    for data in FILES.values():
        (blobs / sha256(data)).write_bytes(data)
    weights = FILES["model.safetensors"]
    flip_bit(blobs / sha256(weights), 12_345)
    cache = rig.cache()
    assert read_tree(cache.preload(URL).path) == FILES
    assert rig.fetched_bytes == len(weights)
    assert cache.verify(URL) == []


def test_a_damaged_file_that_cannot_be_fetched_for_want_of_room_is_no_space(rig: Rig) -> None:
    # What is linked costs nothing; that it must be fetched after all is found out by hashing it.
    rig.put("org/name", {"w.safetensors": bytes_of(20 * PIECE)})
    blobs = rig.root / "hub" / "models--org--name" / "blobs"
    blobs.mkdir(parents=True)
    blob = blobs / sha256(bytes_of(20 * PIECE))
    blob.write_bytes(bytes_of(20 * PIECE))
    flip_bit(blob, 5)
    rig.free_bytes = PIECE
    with pytest.raises(NoSpace):
        rig.cache().preload(URL)
    assert rig.fetched_bytes == 0


def test_without_the_hub_its_cache_is_enough(rig: Rig) -> None:
    fill_hub(rig.root / "hub")
    rig.down = True
    cache = rig.cache()
    model = cache.preload(URL)
    assert model.revision == COMMIT
    assert read_tree(model.path) == FILES
    assert "its source cannot be asked: the line is dead" in model.note
    found = cache.find(URL)
    assert found is not None
    assert found.note == ""
    with pytest.raises(SourceError, match="the line is dead"):
        cache.preload("hf://org/other")


def test_without_the_hub_a_damaged_cache_is_not_enough(rig: Rig) -> None:
    model = fill_hub(rig.root / "hub")
    flip_bit(model / "blobs" / sha256(FILES["model.safetensors"]), 77)
    rig.down = True
    cache = rig.cache()
    with pytest.raises(SourceError, match="the line is dead"):
        cache.preload(URL)
    assert cache.find(URL) is None


LOOK = """
import sys
from huggingface_hub import hf_hub_download, scan_cache_dir, snapshot_download
print(snapshot_download("org/name"))
print(snapshot_download("org/name", revision=sys.argv[1]))
print(hf_hub_download("org/name", "sub/vocab.txt"))
print(len(scan_cache_dir().repos))
"""


def test_whatever_reads_a_hubs_cache_finds_our_models(rig: Rig) -> None:
    rig.put("org/name", FILES)
    cache = rig.cache()
    model = cache.preload(URL)
    hub = cache.dir / "hub"
    done = subprocess.run(
        [sys.executable, "-c", LOOK, model.revision],
        env={"HF_HUB_CACHE": str(hub), "HF_HUB_OFFLINE": "1", "HOME": str(rig.root)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    newest, exact, vocab, count = done.stdout.split()
    assert newest == exact
    assert read_tree(Path(newest)) == FILES
    assert Path(vocab).read_bytes() == FILES["sub/vocab.txt"]
    assert count == "1"
    assert model.manifest is not None
    blob = cache.store.layout.blob(model.manifest.files[1].digest)
    assert Path(newest, "model.safetensors").samefile(blob), "names, not copies"


def test_an_evicted_model_is_shown_no_more(rig: Rig) -> None:
    cache = rig.cache()
    rig.put("org/name", FILES)
    first = cache.preload(URL)
    rig.put("org/name", {**FILES, "config.json": b"{}"})
    second = cache.preload(URL, revision="main")
    refs = cache.dir / "hub" / "models--org--name" / "refs" / "main"
    assert refs.read_text() == second.revision
    snapshots = refs.parent.parent / "snapshots"
    assert {path.name for path in snapshots.iterdir()} == {first.revision, second.revision}
    cache.evict(URL, revision=first.revision)
    assert [path.name for path in snapshots.iterdir()] == [second.revision]
    assert refs.read_text() == second.revision
    cache.evict(URL)
    assert not refs.parent.parent.exists()
    assert count_bytes(cache.dir) == 0


def test_only_whole_models_of_a_hub_are_shown(rig: Rig) -> None:
    layout = Layout(rig.root / "cache")
    assert hub_place(layout, "s3://models/name", "r") is None
    cache = rig.cache()
    rig.put("org/name/sub", {"x.json": b"1"})
    cache.preload("hf://org/name/sub")
    cache.preload(rig.put("models/name", FILES))
    assert not (cache.dir / "hub").exists()


def test_our_own_hub_is_not_adopted_from(rig: Rig) -> None:
    rig.put("org/name", FILES)
    cache = rig.cache(hub_dirs=(rig.root / "cache" / "hub",))
    cache.preload(URL)
    assert (
        cache.local_files.find(
            ModelRef(url=URL, scheme="hf", location="org/name"),
            RemoteFile(
                path="config.json",
                size_bytes=len(FILES["config.json"]),
                digests={"sha256": sha256(FILES["config.json"])},
            ),
        )
        is None
    )
    rig.down = True
    cache.evict(URL)
    with pytest.raises(SourceError):
        cache.preload(URL)
    with pytest.raises(NotFound):
        cache.verify(URL)
