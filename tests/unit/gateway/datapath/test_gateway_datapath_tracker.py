"""The framing of an answer's chunks, followed as they pass: any split, never laxer than llhttp."""

from __future__ import annotations

import random

import httptools
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gateway.datapath.protocol.chunks import ChunkTracker

Seen = tuple[bool, int] | None


def track(data: bytes, cuts: list[int]) -> Seen:
    """(ended, chunks with payload), or ``None`` where the framing is refused."""
    tracker = ChunkTracker()
    pieces = []
    for size in cuts:
        pieces.append(data[:size])
        data = data[size:]
    pieces.append(data)
    try:
        for piece in pieces:
            if piece:
                tracker.feed(piece)
    except ValueError:
        return None
    return tracker.done, tracker.chunks


class Heard:
    """llhttp's view of the same answer."""

    def __init__(self) -> None:
        self.chunks = 0
        self.complete = 0

    def on_body(self, data: bytes) -> None:
        self.body = data

    def on_chunk_header(self) -> None:
        self.chunks += 1

    def on_message_begin(self) -> None:
        if self.complete:
            raise ValueError("more than one")

    def on_message_complete(self) -> None:
        self.complete += 1


def llhttp(data: bytes) -> Seen:
    heard = Heard()
    parser = httptools.HttpResponseParser(heard)
    try:
        parser.feed_data(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n" + data)
    except httptools.HttpParserError:
        return None
    last = 1 if heard.complete or data.rstrip(b"\r\n").endswith(b"\n0") else 0
    return bool(heard.complete), heard.chunks - last


parts = st.lists(st.binary(min_size=1, max_size=40), max_size=6)
extensions = st.sampled_from([b"", b";a", b";a=b", b';q="x; y"'])
trailers = st.sampled_from([b"", b"X: y\r\n", b"A:\r\nB: c d\r\n"])


def frame(payload: list[bytes], extension: bytes, trailer: bytes) -> bytes:
    wire = b"".join(b"%x%b\r\n%b\r\n" % (len(part), extension, part) for part in payload)
    return wire + b"0" + extension + b"\r\n" + trailer + b"\r\n"


@given(parts, extensions, trailers, st.lists(st.integers(1, 9), max_size=40))
def test_an_answer_ends_where_it_ends_however_it_is_cut(
    payload: list[bytes], extension: bytes, trailer: bytes, cuts: list[int]
) -> None:
    wire = frame(payload, extension, trailer)
    for pieces in (cuts, [1] * len(wire), []):
        assert track(wire, pieces) == (True, len(payload))
        assert track(wire[:-1], pieces) == (False, len(payload))
        for more in (b"\r\n", b"0\r\n\r\n", b"x"):
            assert track(wire + more, pieces) is None


def mutate(data: bytes, seed: int) -> bytes:
    chance = random.Random(seed)
    result = bytearray(data)
    for _ in range(chance.randint(1, 3)):
        at = chance.randrange(len(result) + 1)
        kind = chance.randrange(3)
        if kind == 0:
            result[at : at + 1] = bytes([chance.choice(b"\r\n \t\0:;0aFgxX\x7f\x80+-_")])
        elif kind == 1:
            del result[at : at + chance.randint(1, 2)]
        else:
            result[at:at] = chance.choice([b"\r\n", b"\n", b"\r", b" ", b"0", b"\t", b";"])
    return bytes(result)


@settings(max_examples=150, deadline=None)
@given(
    st.one_of(
        st.binary(max_size=40),
        st.tuples(parts, extensions, trailers, st.integers(0, 1 << 32)),
    ),
    st.lists(st.integers(1, 9), max_size=10),
)
@example(b"1;\n\r\na\r\n0\r\n\r\n", [])
@example(b"1;a\0\r\na\r\n0\r\n\r\n", [])
@example(b"1 \r\na\r\n0\r\n\r\n", [])
@example(b"1 ;a\r\na\r\n0\r\n\r\n", [])
@example(b"0x1\r\na\r\n0\r\n\r\n", [])
@example(b"1_0\r\n" + b"a" * 16 + b"\r\n0\r\n\r\n", [])
@example(b"1\r\na\r\n0\r\nX: a\nb\r\n\r\n", [])
@example(b"1\r\na\r\n0\r\nnothing\r\n\r\n", [])
@example(b"1\r\na\r\n0\r\n\r\n\r\n", [])
@example(b"1\r\na\r\r\n0\r\n\r\n", [4])
@example(b"1\r\na\rx", [4])
@example(b"1\r", [2])
def test_never_laxer_than_llhttp(
    what: bytes | tuple[list[bytes], bytes, bytes, int], cuts: list[int]
) -> None:
    if isinstance(what, bytes):
        wire = what
    else:
        payload, extension, trailer, seed = what
        wire = mutate(frame(payload, extension, trailer), seed)
    ours, whole = track(wire, cuts), track(wire, [])
    if ours is None or whole is None:
        if whole != ours:
            # A cut may delay a refusal to the end of the line, never lose it.
            assert track(wire + b"\r\n\r\n", cuts) is None
            assert track(wire + b"\r\n\r\n", []) is None
        return
    assert ours == whole
    theirs = llhttp(wire)
    if theirs is None:
        # They refuse it already, we still wait for the end of the line: it must be refused then.
        assert not ours[0], wire
        for end in (b"\r\n", b"\r\n\r\n", b"\n", b"\r\n0\r\n\r\n"):
            assert track(wire + end, []) in (None, ours), (wire, end)
        return
    assert theirs[0] is ours[0]


@pytest.mark.parametrize("start", [b"1;", b"0\r\nX: ", b"0\r\n", b"0" * 10])
@pytest.mark.parametrize("step", [1, 500])
def test_a_line_that_never_ends_is_refused_soon(start: bytes, step: int) -> None:
    tracker = ChunkTracker()
    tracker.feed(start)
    sent = 0
    while sent < 20_000:
        try:
            tracker.feed(b"0" * step)
        except ValueError:
            break
        sent += step
    assert sent < 10_000
