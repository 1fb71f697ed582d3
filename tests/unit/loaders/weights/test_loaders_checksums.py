"""Where checksums of a file come from: the model cache's own layout, by view and by blob."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors_files import sums_of, write_file

from loaders.weights.files import find_sums
from modelcache.safetensors_index import BadFile
from modelcache.store.digest import PieceDigests, digest_piece
from modelcache.store.layout import Layout
from modelcache.store.records import seal
from modelcache.types import FileEntry, Manifest

URL, REVISION = "hf://org/model", "0123abcd"


@pytest.fixture
def cached(tmp_path: Path) -> tuple[Layout, str, bytes]:
    """A cache with one model of one file, ``sub/x.safetensors``."""
    layout = Layout(tmp_path / "cache")
    data = write_file(tmp_path / "x", {"a": 4000})
    pieces = PieceDigests(size_bytes=len(data), pieces=(digest_piece(data),))
    blob = layout.blob(pieces.digest)
    view = layout.snapshot(URL, REVISION) / "sub"
    for folder in (blob.parent, view, layout.revision(URL, REVISION)):
        folder.mkdir(parents=True)
    (tmp_path / "x").rename(blob)
    layout.pieces(pieces.digest).write_bytes(pieces.encode())
    (view / "x.safetensors").hardlink_to(blob)
    entry = FileEntry(path="sub/x.safetensors", size_bytes=len(data), digest=pieces.digest)
    manifest = Manifest(url=URL, revision=REVISION, files=(entry,), created_at_s=0.0)
    (layout.revision(URL, REVISION) / "manifest.json").write_bytes(seal(manifest))
    return layout, pieces.digest, data


def test_a_file_of_a_view_has_its_blob_s_checksums(cached: tuple[Layout, str, bytes]) -> None:
    layout, _, data = cached
    assert find_sums(layout.snapshot(URL, REVISION) / "sub" / "x.safetensors") == sums_of(data)


def test_a_digest_that_names_no_file_is_an_error(cached: tuple[Layout, str, bytes]) -> None:
    layout, _, data = cached
    entry = FileEntry(path="sub/x.safetensors", size_bytes=len(data), digest="\0")
    manifest = Manifest(url=URL, revision=REVISION, files=(entry,), created_at_s=0.0)
    (layout.revision(URL, REVISION) / "manifest.json").write_bytes(seal(manifest))
    with pytest.raises(BadFile, match="cannot be verified"):
        find_sums(layout.snapshot(URL, REVISION) / "sub" / "x.safetensors")


def test_so_has_a_link_to_the_blob(cached: tuple[Layout, str, bytes], tmp_path: Path) -> None:
    layout, digest, data = cached
    (tmp_path / "link").symlink_to(layout.blob(digest))
    assert find_sums(tmp_path / "link") == find_sums(layout.blob(digest)) == sums_of(data)


def test_other_files_have_none(cached: tuple[Layout, str, bytes], tmp_path: Path) -> None:
    layout, digest, _ = cached
    write_file(tmp_path / "other", {"a": 4})
    view = layout.snapshot(URL, REVISION)
    assert find_sums(tmp_path / "other") is None
    assert find_sums(tmp_path / "gone") is None
    assert find_sums(view / "unknown.safetensors") is None
    layout.pieces(digest).unlink()
    assert find_sums(layout.blob(digest)) is None


@pytest.mark.parametrize("change", [b"", b"short", None])
def test_checksums_that_are_damaged_are_an_error(
    cached: tuple[Layout, str, bytes], change: bytes | None
) -> None:
    layout, digest, _ = cached
    if change is None:
        layout.pieces(digest).unlink()
    else:
        layout.pieces(digest).write_bytes(change)
    with pytest.raises(BadFile, match="cannot be verified"):
        find_sums(layout.snapshot(URL, REVISION) / "sub" / "x.safetensors")


def test_a_changed_checksum_is_an_error_not_a_verdict(cached: tuple[Layout, str, bytes]) -> None:
    """Its BLAKE3 would still hold; what a wrong XXH3-64 says of the bytes must not count."""
    layout, digest, data = cached
    pieces = bytearray(layout.pieces(digest).read_bytes())
    pieces[3] ^= 1
    layout.pieces(digest).write_bytes(pieces)
    with pytest.raises(BadFile, match="cannot be verified"):
        find_sums(layout.blob(digest))
    assert len(data) > 0
