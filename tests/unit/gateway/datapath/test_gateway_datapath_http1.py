"""Heads and chunks: tables, any split the same, and never laxer than llhttp."""

from __future__ import annotations

import random
import re

import httptools
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gateway.datapath.protocol.chunks import ChunkDecoder
from gateway.datapath.protocol.errors import ApiError
from gateway.datapath.protocol.http1 import (
    has_bare_line_end,
    parse_request_head,
    parse_response_head,
)

H = b"POST /v1/completions?a=b HTTP/1.1\r\nHost: x\r\n"


def test_a_head_is_cut_into_what_travels_and_what_does_not() -> None:
    head = parse_request_head(
        H + b"Authorization: Bearer k\r\ncontent-length: 12\r\nX-A:1\r\nTE: trailers\r\n"
        b"X-Request-ID:  abc \r\nExpect: 100-Continue\r\nOrigin: https://o\r\nX-B: 2\r\n\r\n"
    )
    assert (head.method, head.path, head.query) == (b"POST", b"/v1/completions", b"?a=b")
    assert head.kept == b"\r\nAuthorization: Bearer k\r\nX-A:1\r\nX-B: 2"
    assert (head.content_length, head.chunked, head.keep_alive) == (12, False, True)
    assert head.request_id == b"abc"
    assert head.origin == b"https://o"
    assert head.expect_continue


@pytest.mark.parametrize(
    ("endpoint", "path", "query"),
    [
        (b"/", b"/", b""),
        (b"/a?b?c", b"/a", b"?b?c"),
        (b"/a?", b"/a", b"?"),
        (b"http://h", b"/", b""),
        (b"http://h:1/a/b?c", b"/a/b", b"?c"),
        (b"HTTPS://h/a", b"/a", b""),
        (b"http://h?x=/v1/models", b"/", b"?x=/v1/models"),
        (b"*", b"*", b""),
        (b"//two/slashes", b"//two/slashes", b""),
    ],
)
def test_targets(endpoint: bytes, path: bytes, query: bytes) -> None:
    method = b"OPTIONS" if endpoint == b"*" else b"GET"
    head = parse_request_head(method + b" " + endpoint + b" HTTP/1.1\r\nHost: x\r\n\r\n")
    assert (head.path, head.query) == (path, query)


@pytest.mark.parametrize(
    ("version", "lines", "kept"),
    [
        (b"1.1", b"", True),
        (b"1.1", b"Connection: close\r\n", False),
        (b"1.1", b"Connection: Keep-Alive, Close\r\n", False),
        (b"1.1", b"Connection: close\r\nConnection: keep-alive\r\n", False),
        (b"1.1", b"Connection: closed\r\n", True),
        (b"1.0", b"", False),
        (b"1.0", b"Connection: keep-alive\r\n", True),
    ],
)
def test_keep_alive(version: bytes, lines: bytes, kept: bool) -> None:
    head = parse_request_head(b"GET / HTTP/" + version + b"\r\nHost: x\r\n" + lines + b"\r\n")
    assert head.keep_alive is kept


@pytest.mark.parametrize("first", [b"X-Named: 1\r\n", b""])
def test_headers_named_by_connection_do_not_travel(first: bytes) -> None:
    head = parse_request_head(
        H + first + b"Connection: X-named, keep-alive, x-other\r\nX-Kept: 1\r\n"
        b"x-OTHER: 2\r\nX-Named: 3\r\n\r\n"
    )
    lines = [line for line in head.kept.split(b"\r\n") if line]
    assert lines == [b"X-Kept: 1"]


@given(
    st.binary(max_size=60),
    st.integers(0, 60),
)
@example(b"a\r\nb\rc", 3)
@example(b"a\r", 1)
def test_a_bare_line_end_is_found_looking_only_at_what_is_new(data: bytes, cut: int) -> None:
    """Scanning piece by piece, from one byte before the new ones, misses nothing."""
    whole = re.sub(rb"\r\n", b"", data)
    bare = b"\n" in whole or b"\r" in whole[:-1] or (b"\r" in whole and not data.endswith(b"\r"))
    first = data[:cut]
    found = has_bare_line_end(first) or has_bare_line_end(data, max(0, len(first) - 1))
    assert found is bare


# Chunks


def decode(data: bytes, cuts: list[int]) -> tuple[bytes, bytes | None] | None:
    """Payload and what follows the body (``None`` while it lasts); ``None`` where it is refused."""
    decoder = ChunkDecoder()
    payload = b""
    pieces = []
    for size in cuts:
        pieces.append(data[:size])
        data = data[size:]
    pieces.append(data)
    for number, piece in enumerate(pieces):
        try:
            parts, rest = decoder.feed(piece)
        except ApiError:
            return None
        payload += b"".join(parts)
        if rest is not None:
            assert decoder.done
            return payload, rest + b"".join(pieces[number + 1 :])
    return payload, None


class Heard:
    """llhttp's view of the same body."""

    def __init__(self) -> None:
        self.body = b""
        self.complete = False

    def on_body(self, data: bytes) -> None:
        self.body += data

    def on_message_complete(self) -> None:
        self.complete = True


def llhttp(data: bytes) -> Heard | None:
    heard = Heard()
    parser = httptools.HttpRequestParser(heard)
    parser.feed_data(b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
    try:
        parser.feed_data(data)
    except httptools.HttpParserError:
        if not heard.complete:  # else it stumbled over what follows, which is not this body
            return None
    return heard


parts = st.lists(st.binary(min_size=1, max_size=40), max_size=6)
extensions = st.sampled_from([b"", b";a", b";a=b", b';q="x; y"', b";a;b=c"])
trailers = st.sampled_from([b"", b"X: y\r\n", b"A:\r\nB: c d\r\n"])


@given(
    parts, extensions, trailers, st.binary(max_size=20), st.lists(st.integers(1, 9), max_size=40)
)
def test_a_body_is_the_same_however_it_is_cut(
    payload: list[bytes], extension: bytes, trailer: bytes, after: bytes, cuts: list[int]
) -> None:
    wire = b"".join(b"%X%b\r\n%b\r\n" % (len(part), extension, part) for part in payload)
    wire += b"0" + extension + b"\r\n" + trailer + b"\r\n"
    assert decode(wire + after, cuts) == (b"".join(payload), after)
    assert decode(wire + after, [1] * len(wire)) == (b"".join(payload), after)
    assert decode(wire[:-1], cuts) == (b"".join(payload), None)


def mutate(data: bytes, seed: int) -> bytes:
    chance = random.Random(seed)
    result = bytearray(data)
    for _ in range(chance.randint(1, 3)):
        at = chance.randrange(len(result) + 1)
        kind = chance.randrange(3)
        if kind == 0:
            result[at : at + 1] = bytes([chance.choice(b"\r\n \t\0:;0aFgx\x7f\x80+-_")])
        elif kind == 1:
            del result[at : at + chance.randint(1, 2)]
        else:
            result[at:at] = chance.choice([b"\r\n", b"\n", b"\r", b" ", b"0", b"\t", b";"])
    return bytes(result)


@settings(max_examples=300, deadline=None)
@given(
    st.one_of(
        st.binary(max_size=40),
        st.tuples(parts, extensions, trailers, st.integers(0, 1 << 32)),
    ),
    st.lists(st.integers(1, 9), max_size=10),
)
@example(b"1 \r\na\r\n0\r\n\r\n", [])
@example(b"1;\r\na\r\n0\r\n\r\n", [])
@example(b"1 ;a\r\na\r\n0\r\n\r\n", [])
@example(b"1;a \r\na\r\n0\r\n\r\n", [])
@example(b"1;a=b=c\r\na\r\n0\r\n\r\n", [])
@example(b"1\r\na\r\n0\r\nX : y\r\n\r\n", [])
@example(b"1\r\na\r\n0\r\n\n", [])
@example(b"1\r\na\r\n0\r\nX: a\rb\r\n\r\n", [14])
def test_never_laxer_than_llhttp(
    what: bytes | tuple[list[bytes], bytes, bytes, int], cuts: list[int]
) -> None:
    if isinstance(what, bytes):
        wire = what
    else:
        payload, extension, trailer, seed = what
        wire = b"".join(b"%x%b\r\n%b\r\n" % (len(part), extension, part) for part in payload)
        wire = mutate(wire + b"0" + extension + b"\r\n" + trailer + b"\r\n", seed)
    ours, whole = decode(wire, cuts), decode(wire, [])
    assert ours == whole
    if ours is None:
        return  # we may be stricter
    theirs = llhttp(wire)
    if ours[1] is None and theirs is None:
        # They refuse it already, we still wait: only what is not decided yet may differ.
        assert decode(wire + b"\r\n\r\n0\r\n\r\n", []) != (ours[0], b"")
        return
    assert theirs is not None, (ours, wire)
    assert theirs.complete is (ours[1] is not None)
    assert theirs.body == ours[0]


@pytest.mark.parametrize("size", [1, 4095, 4097])
def test_a_line_or_trailer_that_never_ends_is_refused_soon(size: int) -> None:
    for start, byte in ((b"1;", b"a"), (b"0\r\nX: ", b"y"), (b"0\r\n", b"X")):
        decoder = ChunkDecoder()
        decoder.feed(start)
        refused = None
        for _ in range(10_000 // size):
            try:
                decoder.feed(byte * size)
            except ApiError as error:
                refused = error.status
                break
        assert refused == 400


# Answers


@pytest.mark.parametrize(
    ("head", "status", "length", "chunked", "keep_alive", "stream"),
    [
        (b"HTTP/1.1 200 OK\r\ncontent-length: 5", 200, 5, False, True, False),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nX: y", 200, 5, False, True, False),
        (b"HTTP/1.1 200\r\ncontent-length: 0", 200, 0, False, True, False),
        (b"HTTP/1.1 500 X Y\r\ntransfer-encoding: chunked", 500, None, True, True, False),
        (b"HTTP/1.1 200 OK\r\nconnection: Close", 200, None, False, False, False),
        (b"HTTP/1.0 200 OK\r\ncontent-length: 5", 200, 5, False, False, False),
        (b"HTTP/1.1 204 No Content", 204, 0, False, True, False),
        (
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
            b"Transfer-Encoding: chunked",
            200,
            None,
            True,
            True,
            True,
        ),
    ],
)
def test_answers(
    head: bytes, status: int, length: int | None, chunked: bool, keep_alive: bool, stream: bool
) -> None:
    result = parse_response_head(head)
    assert (result.status, result.content_length, result.chunked) == (status, length, chunked)
    assert (result.keep_alive, result.is_stream) == (keep_alive, stream)
    assert result.kept.startswith(b"HTTP/1.1 ")
    framing = len(re.findall(rb"(?i)\r\n(?:content-length|transfer-encoding):", result.kept))
    assert framing == (1 if (length is not None and status == 200) or chunked else 0)
    assert b"connection" not in result.kept.lower()
    assert b"content-length" not in result.without_framing().lower()


header = st.sampled_from(
    [
        b"date: now",
        b"Server: uvicorn",
        b"content-type: application/json",
        b"content-length: 5",
        b"Content-Length: 5",
        b"content-length: 6",
        b"transfer-encoding: chunked",
        b"connection: close",
        b"keep-alive: 5",
        b"upgrade: h2c",
        b"x-request-id: theirs",
        b"x-content-length: 9",
        b"trailer: x",
    ]
)


@given(st.lists(header, max_size=6))
def test_the_quick_way_through_an_answers_head_is_the_thorough_one(lines: list[bytes]) -> None:
    """The order of headers must not change what they mean."""

    def meaning(order: list[bytes]) -> tuple[object, ...]:
        try:
            head = parse_response_head(b"\r\n".join([b"HTTP/1.1 200 OK", *order]))
        except ValueError:
            return ("refused",)
        kept = sorted(line.lower() for line in head.kept.split(b"\r\n"))
        return head.content_length, head.chunked, head.keep_alive, kept

    expected = meaning(lines)
    assert meaning(lines[::-1]) == expected
    assert meaning(sorted(lines)) == expected
    if expected != ("refused",):
        kept = expected[3]
        assert not any(
            line.startswith((b"connection", b"keep-alive", b"upgrade", b"x-request-id", b"trailer"))
            for line in kept  # type: ignore[attr-defined]
        )
        assert sum(line.startswith(b"content-length") for line in kept) <= 1  # type: ignore[attr-defined]
