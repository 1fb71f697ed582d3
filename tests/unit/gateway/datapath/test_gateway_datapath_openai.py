"""What is read of a body, and that nothing else of it changes."""

from __future__ import annotations

import contextlib
import json
from itertools import pairwise
from typing import Any

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gateway.datapath.protocol.bodies import (
    BodyReader,
    FormReader,
    JsonReader,
    form_boundary,
    read_bool,
    read_json,
    smallest_bound,
    splice,
)
from gateway.datapath.protocol.errors import ApiError, Reason, render
from gateway.datapath.protocol.openai import read_head

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**53), 2**53),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(),
)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=8,
)
names = st.text(min_size=1, max_size=20)
members = st.dictionaries(
    st.one_of(st.sampled_from(["model", "stream_options", "messages", "p"]), st.text(max_size=8)),
    values,
    max_size=6,
)


@st.composite
def bodies(draw: st.DrawFn) -> tuple[dict[str, Any], bytes]:
    """An object that names a model somewhere, as some client would write it."""
    before, after = draw(members), draw(members)
    for used in ("stream", "max_tokens", "max_completion_tokens", "max_output_tokens"):
        before.pop(used, None)
        after.pop(used, None)
    before.pop("model", None)
    body = {**before, "model": draw(names), **{k: v for k, v in after.items() if k != "model"}}
    text = json.dumps(
        body,
        ensure_ascii=draw(st.booleans()),
        indent=draw(st.sampled_from([None, 1])),
        separators=draw(st.sampled_from([(",", ":"), (" , ", " : ")])),
    )
    return body, text.encode()


def read(body: bytes, *cuts: int) -> BodyReader:
    """A body read in pieces, as a large one is."""
    reader = JsonReader()
    for start, end in pairwise((0, *sorted(cuts), len(body))):
        reader.feed(body[start:end])
    return reader


def read_small(body: bytes) -> tuple[str | None, bool, int | None, bool]:
    """Model, stream, output bound and whether there are stream options, of a body that came
    whole."""
    found = read_head(body)
    if found is None:
        reader, _ = read_json(body)
        return reader.model, reader.stream, reader.output_bound(), reader.has_stream_options
    model, head = found
    bounds = (head.max_tokens, head.max_completion_tokens, head.max_output_tokens)
    says = head.stream_options is not msgspec.UNSET
    return model, read_bool(head.stream), smallest_bound(*bounds), says


@settings(max_examples=60, deadline=None)
@given(bodies(), st.lists(st.integers(0, 400), max_size=5))
def test_a_body_reads_the_same_however_it_is_cut(
    what: tuple[dict[str, Any], bytes], cuts: list[int]
) -> None:
    body, text = what
    reader = read(text, *(cut for cut in cuts if cut < len(text)))
    assert not reader.broken
    reader.check()
    assert reader.model == body["model"] == read_small(text)[0]
    assert json.loads(text[reader.start : reader.end]) == body["model"]
    other = 'new "name" \\'
    parts = [text[start:end] for start, end in pairwise((0, *sorted(cuts), len(text)))]
    renamed = b"".join(splice(parts, reader.start, reader.end, reader.quote(other)))
    assert json.loads(renamed) == {**body, "model": other}


ODD_KEYS = st.sampled_from(
    [
        *(
            b'"%b"' % name
            for name in (
                b"model",
                b"stream",
                b"stream_options",
                b"max_tokens",
                b"x",
                b"a b",
                b"model ",
            )
        ),
        b'"\\u006dodel"',
        b'"m\\u006Fdel"',
        b'"\\"model"',
        b'"\\\\"',
        b'""',
        b'"' + b"k" * 5000 + b'"',
    ]
)
ODD_VALUES = st.recursive(
    st.sampled_from(
        [
            b'"m"',
            b'"a\\"b"',
            b'"\\\\"',
            b'"\\u006d"',
            b'"\\ud83d"',
            b"1",
            b"-1.5e3",
            b"true",
            b"null",
            b"NaN",
            b"-Infinity",
            b'"' + b"v" * 5000 + b'"',
            b'"}"',
            b'"]"',
            b'"\\"model\\":"',
            b"[]",
            b"{}",
        ]
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3).map(lambda some: b"[" + b", ".join(some) + b"]"),
        st.lists(st.tuples(ODD_KEYS, inner), max_size=3).map(
            lambda some: b"{" + b",".join(key + b" :" + value for key, value in some) + b"}"
        ),
    ),
    max_leaves=6,
)
SPACES = st.sampled_from([b"", b" ", b"\n\t", b" " * 5000])


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(SPACES, ODD_KEYS, SPACES, ODD_VALUES, SPACES), max_size=6),
    st.sampled_from([b"", b"\xef\xbb\xbf"]),
    st.lists(st.integers(0, 30_000), max_size=6),
)
@example([(b"", b'"model"', b"", b'"m"', b""), (b"", b'"model"', b"", b'"n"', b"")], b"", [])
@example([(b"", b'"model"', b"", b'"m"', b""), (b"", b'"\\u006dodel"', b"", b"7", b"")], b"", [9])
def test_what_pythons_json_accepts_is_read_as_it_reads_it(
    members: list[tuple[bytes, ...]], start: bytes, cuts: list[int]
) -> None:
    """The engines parse with it: another model seen here would be one that nobody checked."""
    text = start + b"{" + b",".join(a + k + b + b":" + v + c for a, k, b, v, c in members) + b"}"
    pairs: list[tuple[str, Any]] = []

    def keep(given: list[tuple[str, Any]]) -> dict[str, Any]:
        pairs[:] = given  # the outermost object ends last
        return dict(given)

    body = json.loads(text, object_pairs_hook=keep)
    cuts = [cut for cut in cuts if cut < len(text)]
    if [key for key, _ in pairs].count("model") > 1:
        with pytest.raises(ApiError):
            read(text, *cuts)
        with pytest.raises(ApiError):
            read_small(text)
        return
    reader = read(text, *cuts)
    assert not reader.broken
    model = body.get("model")
    known = isinstance(model, str) and len(model) < 1000
    if known:
        assert reader.model == model.encode("utf-8", "replace").decode()
        assert json.loads(text[reader.start : reader.end]) == model
    else:
        # A name longer than any that a pool can have may be replaced by another such.
        assert reader.model == model or (reader.model is None) != isinstance(model, str)
        assert reader.model != "m"
    assert reader.stream == read_bool(body.get("stream"))
    if known and model:
        says = reader.has_stream_options
        assert read_small(text) == (reader.model, reader.stream, reader.output_bound(), says)


@given(st.binary(max_size=60), st.lists(st.integers(0, 60), max_size=3))
@example(b'{"model":"m","x":' + b"[" * 40, [])
@example(b'{"model" "m"}', [3])
def test_no_body_crashes_the_readers(body: bytes, cuts: list[int]) -> None:
    with contextlib.suppress(ApiError):
        assert read_small(body)[0]
    with contextlib.suppress(ApiError):
        read(body, *(cut for cut in cuts if cut < len(body))).check()
    with contextlib.suppress(ApiError):
        form = FormReader(b"B")
        form.feed(b"--B\r\n" + body)
        form.check()


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-32", "utf-32-be"])
def test_every_encoding_that_pythons_json_reads_is_read(encoding: str) -> None:
    reader, plain = read_json('{"é":1, "model":"m"}'.encode(encoding))
    assert reader.model == "m"
    assert json.loads(plain) == {"é": 1, "model": "m"}
    assert plain[reader.start : reader.end] == b'"m"'


def test_renaming_keeps_the_very_bytes_of_every_other_value() -> None:
    """A number is not reformatted, a string not escaped anew."""
    odd = b'{"a": 1.0e+02, "model": "x\\"y", "b": "\\u00e9\\/", "c": [ 1 ,2]}'
    reader = read(odd)
    assert odd[reader.start : reader.end] == b'"x\\"y"'


@pytest.mark.parametrize(
    ("fields", "bound"),
    [
        ({}, None),
        ({"max_tokens": None}, None),
        ({"max_tokens": 5}, 5),
        ({"max_tokens": 5.0}, 5),
        ({"max_tokens": "5"}, 5),
        ({"max_tokens": "many"}, None),
        ({"max_tokens": True}, 1),
        ({"max_tokens": [5]}, None),
        ({"max_tokens": 0}, None),
        ({"max_tokens": -1}, None),
        ({"max_completion_tokens": 7}, 7),
        ({"max_tokens": 5, "max_completion_tokens": 7}, 5),
        ({"max_tokens": -1, "max_output_tokens": 9}, 9),
        ({"max_tokens": 1e300}, int(1e300)),
        ({"max_tokens": "1e999"}, None),
    ],
)
def test_output_bounds(fields: dict[str, Any], bound: int | None) -> None:
    body = json.dumps({"model": "m", **fields}).encode()
    assert read_small(body)[2] == bound == read(body).output_bound()


@pytest.mark.parametrize(
    ("value", "stream"),
    [
        *[(value, True) for value in (True, 1, 1.0, "true", "True", "1", "on", "YES", "y", "t")],
        *[(value, False) for value in (False, 0, None, "false", "off", "0", "maybe", [], {}, 2)],
    ],
)
def test_stream_is_read_as_pydantic_reads_a_boolean(value: object, stream: bool) -> None:
    body = json.dumps({"model": "m", "stream": value}).encode()
    assert read_small(body)[1] is stream is read(body).stream


@pytest.mark.parametrize(
    "number", [b"1e999", b"-1e999", b"1" * 400, b"1" * 6000, b"NaN", b"Infinity"]
)
def test_absurd_numbers_are_an_answer_and_not_a_crash(number: bytes) -> None:
    body = b'{"model":"m","max_tokens":' + number + b"}"
    with contextlib.suppress(ApiError):
        bound = read_small(body)[2]
        assert bound is None or bound > 0
    bound = read(body).output_bound()
    assert bound is None or bound > 0


def test_deep_nesting_is_an_answer_and_not_a_crash() -> None:
    for deep in (b"[" * 200_000, b'{"a":' * 200_000):
        with pytest.raises(ApiError):
            read_small(b'{"model":"m","x":' + deep)
    deep = b"[" * 5_000 + b"]" * 5_000  # which some Pythons read and some do not
    assert read_small(b'{"x":' + deep + b',"model":"m"}')[0] == "m"


FORM = (
    b'--B\r\nContent-Disposition: form-data; name="file"; filename="a; name=model.wav"\r\n'
    b"Content-Type: audio/wav\r\n\r\n" + b"RIFF\r\n--A\r\n" * 1000 + b"\r\n--B\r\n"
    b"content-disposition:form-data;name=model\r\n\r\nwhisper\r\n--B\r\n"
    b'Content-Disposition: form-data; name="stream"\r\n\r\ntrue\r\n--B--\r\n'
)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, len(FORM)), max_size=8))
def test_a_form_reads_the_same_however_it_is_cut(cuts: list[int]) -> None:
    reader = FormReader(b"B")
    for start, end in pairwise((0, *sorted(cuts), len(FORM))):
        reader.feed(FORM[start:end])
    reader.check()
    assert (reader.model, reader.stream) == ("whisper", True)
    assert FORM[reader.start : reader.end] == b"whisper"


def test_a_form_that_names_two_models_is_refused() -> None:
    part = b'--B\r\nContent-Disposition: form-data; name="model"\r\n\r\nx\r\n'
    with pytest.raises(ApiError):
        FormReader(b"B").feed(part + part + b"--B--")


@pytest.mark.parametrize(
    ("line", "boundary"),
    [
        (b"Content-Type: multipart/form-data; boundary=B", b"B"),
        (b'content-type:Multipart/Form-Data;charset=UTF-8; Boundary="a b:c"', b"a b:c"),
        (b"content-type: multipart/form-data", None),
        (b"content-type: multipart/form-data; charset=utf-7; boundary=B", None),
        (b"content-type: application/json", None),
        (b"x-content-type: multipart/form-data; boundary=B", None),
    ],
)
def test_boundaries(line: bytes, boundary: bytes | None) -> None:
    assert form_boundary(b"\r\nA: b\r\n" + line + b"\r\nC: d") == boundary


@pytest.mark.parametrize("reason", Reason)
def test_every_reason_renders_as_openais_error(reason: Reason) -> None:
    error = ApiError(429, reason, "No.", param="p", retry_after_s=1.2)
    head, _, body = render(error, request_id=b"r", close=True, extra=b"x: y\r\n").partition(
        b"\r\n\r\n"
    )
    lines = head.split(b"\r\n")
    assert lines[0] == b"HTTP/1.1 429 Too Many Requests"
    assert {
        b"x-tidegate-reason: " + reason.value.encode(),
        b"retry-after: 2",
        b"connection: close",
        b"x: y",
        b"content-length: %d" % len(body),
    } < set(lines)
    assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}
