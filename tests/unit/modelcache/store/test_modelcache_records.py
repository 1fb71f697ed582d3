"""Records: sealed, so a damaged one is noticed; listings, so that none becomes a bad directory."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import blake3
import pytest
from folder_store import PIECE, Rig, bytes_of, read_tree
from hypothesis import given
from hypothesis import strategies as st

from modelcache.store.layout import Layout, file_key, model_key, safe_name
from modelcache.store.records import (
    MANIFEST,
    SPARE,
    Fetching,
    Use,
    check_listing,
    read_known,
    read_manifest,
    read_record,
    read_use,
    seal,
    unseal,
)
from modelcache.types import CacheError, Damaged, FileEntry, Manifest, RemoteFile

URL = "s3://models/qwen"
MADE = Manifest(
    url=URL,
    revision="r1",
    files=(
        FileEntry(path="a/model.safetensors", size_bytes=9, digest="ab" * 32),
        FileEntry(path="config.json", size_bytes=0, digest="cd" * 32, version="é"),
    ),
    created_at_s=12.5,
)
UNDER_WAY = Fetching(
    url=URL,
    revision="r1",
    files=(RemoteFile(path="x", size_bytes=3, version="v", digests={"md5": "00"}),),
    started_at_s=1.0,
)


@pytest.mark.parametrize("body", [MADE, UNDER_WAY, Use(), Use(used_at_s=1.0, reload_s_per_gb=2.5)])
def test_a_record_is_read_as_it_was_written(
    tmp_path: Path, body: Manifest | Fetching | Use
) -> None:
    path = tmp_path / "record"
    path.write_bytes(seal(body))
    assert read_record(path, type(body)) == body
    assert body.size_bytes in (9, 3) if not isinstance(body, Use) else True


def test_no_record_is_none_and_an_unreadable_one_is_damage(tmp_path: Path) -> None:
    assert read_record(tmp_path / "none", Use) is None
    with pytest.raises(Damaged, match="cannot be read"):
        read_record(tmp_path, Use)


@pytest.mark.parametrize("body", [MADE, UNDER_WAY])
def test_every_flipped_bit_of_a_record_is_noticed(body: Manifest | Fetching) -> None:
    data = seal(body)
    for bit in range(len(data) * 8):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(Damaged):
            unseal(bytes(flipped), type(body))


@given(st.integers(0, 10_000), st.binary(max_size=20))
def test_a_torn_record_is_noticed(at: int, tail: bytes) -> None:
    data = seal(MADE)
    torn = data[: at % len(data)] + tail
    if torn != data:
        with pytest.raises(Damaged):
            unseal(torn, Manifest)


def test_a_record_of_another_kind_or_format_is_refused() -> None:
    with pytest.raises(Damaged, match="cannot be read"):
        unseal(seal(Use(used_at_s=1.0)), Manifest)
    newer = seal(MADE).replace(b'"format":1', b'"format":2')
    with pytest.raises(Damaged, match="has format 2, this is 1"):
        unseal(newer, Manifest, name="manifest.json")


def test_a_damaged_manifest_is_read_from_its_spare_copy(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    directory = layout.revision(URL, "r1")
    directory.mkdir(parents=True)
    assert read_manifest(layout, URL, "r1") is None
    (directory / SPARE).write_bytes(seal(MADE))
    # The spare comes first: a revision is whole only once the manifest has its name.
    assert read_manifest(layout, URL, "r1") is None
    (directory / MANIFEST).write_bytes(seal(MADE)[:-3])
    assert read_manifest(layout, URL, "r1") == MADE
    (directory / SPARE).write_bytes(b"{}")
    with pytest.raises(Damaged):
        read_manifest(layout, URL, "r1")
    (directory / SPARE).unlink()
    with pytest.raises(Damaged):
        read_manifest(layout, URL, "r1")


def test_a_damaged_note_of_use_is_no_note(tmp_path: Path) -> None:
    (tmp_path / "use.json").write_bytes(b"\xff\xfe")
    assert read_use(tmp_path) == Use()


@pytest.mark.parametrize(
    ("text", "known"),
    [
        (b"ab" * 32, True),
        (b"AB" * 32, False),
        (b"ab" * 31, False),
        (b"../" * 21 + b"x", False),
        (b"\xff" * 64, False),
        (b"", False),
    ],
)
def test_a_known_blob_is_a_digest_or_nothing(tmp_path: Path, text: bytes, known: bool) -> None:
    path = tmp_path / "known"
    path.write_bytes(text)
    assert read_known(path) == (text.decode() if known else None)


def listing(*paths: str, size_bytes: int = 1) -> tuple[RemoteFile, ...]:
    return tuple(RemoteFile(path=path, size_bytes=size_bytes) for path in paths)


@pytest.mark.parametrize(
    ("files", "problem"),
    [
        ((), "no files"),
        (listing("a", "a"), "twice"),
        (listing("../a"), "called"),
        (listing("/a"), "called"),
        (listing("a//b"), "called"),
        (listing("a/./b"), "called"),
        (listing(""), "called"),
        (listing("a\\b"), "called"),
        (listing("a\nb"), "called"),
        (listing("x" * 256), "called"),
        (listing("a", size_bytes=-1), "-1 bytes"),
        (listing("a", "a/b"), "a is a file and a directory"),
        (listing("a/b/c/d", "a/b"), "a/b is a file and a directory"),
    ],
)
def test_a_listing_that_cannot_become_a_directory_is_refused(
    files: tuple[RemoteFile, ...], problem: str
) -> None:
    with pytest.raises(CacheError, match=problem):
        check_listing(files)


def test_any_other_listing_is_taken() -> None:
    check_listing(listing("a", "ab/c", "a.b/c", "ab/d e", "é"))


def test_a_files_key_changes_with_whatever_may_change_its_content() -> None:
    file = RemoteFile(path="p", size_bytes=1, version="v", digests={"md5": "0", "sha256": "1"})
    others = [
        RemoteFile(path="q", size_bytes=1, version="v", digests=file.digests),
        RemoteFile(path="p", size_bytes=2, version="v", digests=file.digests),
        RemoteFile(path="p", size_bytes=1, version="w", digests=file.digests),
        RemoteFile(path="p", size_bytes=1, version="v", digests={"md5": "0"}),
        RemoteFile(path="p", size_bytes=1),
    ]
    keys = {file_key(URL, file, "r1"), file_key(URL + "2", file, "r1")}
    assert len(keys | {file_key(URL, other, "r1") for other in others}) == 7
    # The order in which a store names digests is chance.
    again = RemoteFile(
        path="p", size_bytes=1, version="v", digests=dict(sorted(file.digests.items())[::-1])
    )
    assert file_key(URL, again, "r1") == file_key(URL, file, "r1")


def test_a_file_without_a_version_is_of_one_revision_only() -> None:
    bare, versioned = (
        RemoteFile(path="p", size_bytes=1),
        RemoteFile(path="p", size_bytes=1, version="v"),
    )
    assert file_key(URL, bare, "r1") != file_key(URL, bare, "r2")
    assert file_key(URL, versioned, "r1") == file_key(URL, versioned, "r2")


@given(st.text(max_size=300))
def test_every_name_becomes_one_that_a_file_can_have(text: str) -> None:
    for name in (safe_name(text), model_key(f"s3://b/{text}")):
        assert 0 < len(name) <= 80
        assert not set(name) & set("/\\\0")
        assert name not in (".", "..", "refs")
    if len(text) <= 80 and text.isascii() and text.isalnum() and text != "refs":
        assert safe_name(text) == text


def test_models_of_the_same_name_have_different_keys() -> None:
    assert model_key("s3://a/qwen") != model_key("s3://b/qwen")
    assert model_key("s3://a/qwen").startswith("qwen-")


def test_what_is_written_down_is_json_for_people() -> None:
    assert json.loads(seal(MADE))["body"]["files"][0]["path"] == "a/model.safetensors"


DEEP = b"[" * 50_000


def sealed(body: bytes) -> bytes:
    """A record whose digest is right, whatever is in it."""
    digest = blake3.blake3(body).hexdigest().encode()
    return b'{"format":1,"blake3":"%s","body":%s}' % (digest, body)


def manifest_with(path: bytes, size_bytes: bytes, digest: bytes) -> bytes:
    file = b'{"path":"%s","size_bytes":%s,"digest":"%s"}' % (path, size_bytes, digest)
    return sealed(
        b'{"url":"s3://models/a","revision":"x","files":[%s],"created_at_s":1,"started_at_s":1}'
        % file
    )


ODD = {
    "deep": DEEP,
    "sealed and deep": sealed(b'{"x":' + DEEP + b"]" * len(DEEP) + b"}"),
    "climbs out": manifest_with(b"../../x", b"1", b"a" * 64),
    "a digest that climbs out": manifest_with(b"x", b"1", b"../../../../etc/passwd"),
    "a size beyond numbers": manifest_with(b"x", b"9" * 400, b"a" * 64),
    "less than nothing": manifest_with(b"x", b"-1", b"a" * 64),
    "a directory": None,
}


@pytest.mark.parametrize("name", sorted(ODD))
def test_what_is_no_record_of_ours_is_not_believed(tmp_path: Path, name: str) -> None:
    odd, path = ODD[name], tmp_path / MANIFEST
    path.write_bytes(manifest_with(b"x", b"1", b"a" * 64))
    assert read_record(path, Manifest) is not None
    path.unlink()
    if odd is None:
        path.mkdir()
    else:
        path.write_bytes(odd)
    with pytest.raises(Damaged):
        read_record(path, Manifest)


@pytest.mark.parametrize("odd", [pytest.param(odd, id=name) for name, odd in ODD.items()])
def test_whatever_a_file_of_the_cache_is_it_is_an_error_of_the_cache_or_mended(
    tmp_path: Path, odd: bytes | None
) -> None:
    rig = Rig(root=tmp_path)
    url = rig.put("models/a", {"config.json": b"{}", "model.safetensors": bytes_of(2 * PIECE)})
    whole = rig.cache("whole")
    whole.preload(url)
    whole.pin(url)
    found = [path.relative_to(whole.dir) for path in whole.dir.rglob("*") if path.is_file()]
    kinds = {(path.parts[0], path.name if path.parts[0] == "models" else path.suffix): path
             for path in found}  # fmt: skip
    for name in kinds.values():
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        cache = rig.cache("copy")
        shutil.copytree(whole.dir, cache.dir, symlinks=True)
        (cache.dir / name).unlink()
        if odd is None:
            (cache.dir / name / "within").mkdir(parents=True)
        else:
            (cache.dir / name).write_bytes(odd)
        verbs: list[Callable[[], object]] = [
            cache.ls, cache.usage, partial(cache.find, url), partial(cache.verify, url),
            partial(cache.preload, url), partial(cache.evict, url, force=True), cache.sweep,
        ]  # fmt: skip
        for verb in verbs:
            with suppress(CacheError):
                verb()
        if name.parts[0] != "locks":
            assert read_tree(cache.preload(url).path).keys() == {"config.json", "model.safetensors"}
