"""Answers, indexes and listings: what is believed of them, without a server."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelcache.refs import parse_ref
from modelcache.sources import answers, http, wire
from modelcache.sources.answers import digest_of, make_listing
from modelcache.sources.file import FileSource
from modelcache.types import NotFound, RemoteFile, SourceError

REF = parse_ref("s3://models/tiny")


def test_a_head_is_read() -> None:
    head = answers.parse_head(
        b'HTTP/1.1 206 Partial Content\r\nContent-Length: 12\r\nX-A: 1\r\nx-a:2\r\nETag: W/"e"'
    )
    assert (head.status, head.length, head.persistent, head.chunked) == (206, 12, True, False)
    assert head.headers["x-a"] == "1, 2"
    assert answers.version_of(head.headers) == "etag:e"


@pytest.mark.parametrize(
    ("text", "persistent"),
    [
        (b"HTTP/1.1 200 OK\r\nConnection: close", False),
        (b"HTTP/1.0 200 OK", False),
        (b"HTTP/1.0 200 OK\r\nConnection: Keep-Alive", True),
    ],
)
def test_whether_a_connection_lives_on(text: bytes, persistent: bool) -> None:
    assert answers.parse_head(text).persistent is persistent


@given(st.binary(max_size=200))
def test_no_head_is_anything_but_a_head_or_an_error(data: bytes) -> None:
    for text in (data, b"HTTP/1.1 200 OK\r\n" + data, b"HTTP/1.1 " + data):
        try:
            head = answers.parse_head(text)
        except SourceError:
            continue
        assert 100 <= head.status < 600
        assert head.length is None or head.length >= 0


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"retry-after": "3"}, 3.0),
        ({"retry-after": "999999999999"}, 600.0),
        ({"retry-after": "-3"}, None),
        ({"retry-after": "soon"}, None),
        ({}, None),
        (
            {
                "retry-after": "Tue, 24 Nov 2026 10:00:30 GMT",
                "date": "Tue, 24 Nov 2026 10:00:00 GMT",
            },
            30.0,
        ),
        ({"retry-after": "Tue, 24 Nov 2026 10:00:30 GMT"}, None),
    ],
)
def test_when_to_ask_again(headers: dict[str, str], seconds: float | None) -> None:
    assert answers.retry_after(headers) == seconds


def test_requests_cannot_be_smuggled() -> None:
    text = wire.format_request("http://h:81/a%20b?c=d", {"Range": "bytes=0-1"})
    assert text == b"GET /a%20b?c=d HTTP/1.1\r\nHost: h:81\r\nRange: bytes=0-1\r\n\r\n"
    for url, headers in (
        ("http://h/a b", {}),
        ("http://h/", {"A": "b\r\nX: y"}),
        ("http://h/", {"A": "b\nX: y"}),
    ):
        with pytest.raises(SourceError):
            wire.format_request(url, headers)
    with pytest.raises(SourceError):
        wire.origin_of("file:///etc/passwd")


def file(path: str, size: int = 1, version: str = "v") -> RemoteFile:
    return RemoteFile(path=path, size_bytes=size, version=version)


@pytest.mark.parametrize(
    "paths",
    [["../x"], ["/x"], ["a//b"], ["a/./b"], ["a", "a"], ["a", "a/b"], ["a/b/c", "a"], ["a\nb"]],
)
def test_a_hostile_listing_is_refused(paths: list[str]) -> None:
    with pytest.raises(SourceError) as raised:
        make_listing(REF, [file(path) for path in paths])
    assert not isinstance(raised.value, NotFound)


def test_a_revision_changes_with_everything_that_is_listed() -> None:
    base = [file("a"), file("b")]
    others = [
        [file("a")],
        [file("a"), file("c")],
        [file("a", 2), file("b")],
        [file("a", 1, "w"), file("b")],
        [RemoteFile(path="a", size_bytes=1, version="v", digests={"md5": "0"}), file("b")],
    ]
    assert len({digest_of(files) for files in [base, *others]}) == 6
    assert make_listing(REF, reversed(base)) == make_listing(REF, base)
    with pytest.raises(NotFound):
        make_listing(REF, [])


def test_checksums_and_shards_are_read_leniently() -> None:
    digest = "A1" * 32
    text = f"{digest}  model.safetensors\n{digest} *./sub/x y\nshort  z\n\n{'g' * 64}  q\n"
    assert http.read_checksums(text.encode()) == {
        "model.safetensors": digest.lower(),
        "sub/x y": digest.lower(),
    }
    assert http.read_shards(b'{"weight_map": {"a": "2", "b": "1", "c": "2"}}') == ["1", "2"]
    for page in (b"", b"[]", b"{}", b'{"weight_map": 3}', b"\xff"):
        assert http.read_shards(page) == []


def test_links_are_followed_and_folders_that_are_links_are_not(tmp_path: Path) -> None:
    model, blobs = tmp_path / "model", tmp_path / "blobs"
    model.mkdir()
    blobs.mkdir()
    (blobs / "1").write_bytes(b"12345678")
    (model / "model.safetensors").symlink_to(blobs / "1")
    (model / "more").symlink_to(blobs)
    os.mkfifo(model / "pipe")
    listing = FileSource(parse_ref(f"file://{model}")).list()
    assert {f.path: f.size_bytes for f in listing.files} == {"model.safetensors": 8}
    single = FileSource(parse_ref(f"file://{blobs}/1")).list()
    assert [f.path for f in single.files] == ["1"]
