"""Answers, indexes and listings: what is believed of them, without a server."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelcache.refs import parse_ref
from modelcache.sources import answers, http, wire
from modelcache.sources.answers import check_status, digest_of, make_listing
from modelcache.sources.file import FileSource
from modelcache.sources.oss import OssKeys, failing
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


def test_checksums_are_read_leniently() -> None:
    digest = "A1" * 32
    text = f"{digest}  model.safetensors\n{digest} *./sub/x y\nshort  z\n\n{'g' * 64}  q\n"
    assert http.read_checksums(text.encode()) == {
        "model.safetensors": digest.lower(),
        "sub/x y": digest.lower(),
    }


@pytest.mark.parametrize(
    ("status", "headers", "code", "signed", "says"),
    [
        (400, {}, "ExpiredToken", True, "expired"),
        (403, {}, "InvalidAccessKeyId", True, "does not know the access key"),
        (403, {}, "InvalidAccessKeyId.NotFound", True, "does not know the access key"),
        (403, {}, "SignatureDoesNotMatch", True, "secret key"),
        (403, {}, "RequestTimeTooSkewed", True, "clock"),
        (404, {}, "NoSuchBucket", True, "no bucket 'models'"),
        (301, {"x-amz-bucket-region": "eu-west-1"}, "PermanentRedirect", True,
         "AWS_REGION=eu-west-1"),
        (400, {}, "AuthorizationHeaderMalformed</Code><Region>eu-west-3</Region><Code>", True,
         "AWS_REGION=eu-west-3"),
        (403, {}, "AccessDenied", True, "do not allow it"),
        (403, {}, "AccessDenied", False, "no credentials were found"),
        (407, {}, "", True, "proxy"),
    ],
)  # fmt: skip
def test_what_a_store_says_becomes_what_to_do(
    status: int, headers: dict[str, str], code: str, signed: bool, says: str
) -> None:
    body = f"<Error><Code>{code}</Code><AWSAccessKeyId>AKIASECRET</AWSAccessKeyId></Error>"
    with pytest.raises(SourceError) as raised:
        check_status(
            status, headers, "s3://models/m", "AWS_ACCESS_KEY_ID",
            text=body if code else "", signed=signed,
        )  # fmt: skip
    assert says in str(raised.value)
    assert "AKIASECRET" not in str(raised.value)
    assert not raised.value.retryable


def test_an_oss_bucket_elsewhere_is_said_with_its_endpoint_and_without_a_key() -> None:
    from oss2.exceptions import ServerError

    said = (
        "<Message>The bucket you are attempting to access must be addressed using the specified "
        "endpoint.</Message><OSSAccessKeyId>AKSECRET</OSSAccessKeyId>"
    )
    body = f"<Endpoint>oss-cn-beijing.aliyuncs.com</Endpoint>{said}".encode()
    details = {"Code": "AccessDenied", "Message": said}
    with (
        pytest.raises(SourceError, match="OSS_ENDPOINT=https://oss-cn-beijing") as raised,
        failing("oss://models/m", OssKeys(key="AKSECRET", secret="s3cret")),
    ):
        raise ServerError(403, {}, body, details)
    assert "AKSECRET" not in str(raised.value)


@pytest.mark.parametrize(
    ("status", "headers", "signed", "says"),
    [
        (403, {"x-error-code": "GatedRepo"}, True, "accept them there, then try again"),
        (401, {"x-error-code": "GatedRepo"}, False, "set the token of that account: HF_TOKEN"),
        (401, {"x-error-message": "Invalid credentials in Authorization header"}, True,
         "does not accept the credentials: check HF_TOKEN"),
        (401, {"x-error-code": "RepoNotFound"}, False, "needs a token"),
        (404, {"x-error-code": "RepoNotFound"}, True, "check the name"),
        (404, {"x-error-code": "RevisionNotFound"}, True, "no such revision"),
        (403, {"x-error-code": "DisabledRepo", "x-error-message": "Disabled."}, True, "disabled"),
    ],
)  # fmt: skip
def test_what_a_hub_says_becomes_what_to_do(
    status: int, headers: dict[str, str], signed: bool, says: str
) -> None:
    with pytest.raises(SourceError, match=re.escape(says)):
        check_status(status, headers, "hf://org/m", "HF_TOKEN", signed=signed)


@pytest.mark.parametrize("size", [-1, 2**63, 10**30])
def test_a_size_that_is_none_is_refused(size: int) -> None:
    with pytest.raises(SourceError, match="bytes"):
        make_listing(REF, [RemoteFile(path="a", size_bytes=size)])


def test_what_stands_for_a_folder_is_no_file_and_an_empty_file_is_one() -> None:
    given = {"": 0, "logs/": 0, "a": 0, "a/b.json": 2, "c_$folder$": 0, "__init__.py": 0, "d": 1}
    listing = make_listing(REF, [RemoteFile(path=p, size_bytes=n) for p, n in given.items() if p])
    assert [file.path for file in listing.files] == ["__init__.py", "a/b.json", "d"]


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
