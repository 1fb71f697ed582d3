"""What is read of a body, and that nothing else of it changes."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gateway.datapath.protocol.errors import ApiError, Reason, render
from gateway.datapath.protocol.openai import peek_model, quote_model, read_head, rewrite_model

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


@settings(max_examples=60, deadline=None)
@given(bodies(), st.integers(0, 400))
def test_the_peeked_model_is_the_decoded_one_and_stands_where_it_says(
    what: tuple[dict[str, Any], bytes], cut: int
) -> None:
    body, text = what
    for prefix in (text, text[:cut]):
        seen = peek_model(prefix)
        if seen is not None:
            model, start, end = seen
            assert model == body["model"] == read_head(text).model
            assert json.loads(prefix[start:end]) == model
            renamed = prefix[:start] + quote_model('new "name" \\') + prefix[end:]
            if prefix is text:
                assert json.loads(renamed) == {**body, "model": 'new "name" \\'}


@pytest.mark.parametrize(
    ("prefix", "model"),
    [
        (b'{"model":"m","messages":[', "m"),
        (b' {\n "stream" : true, "n": -1.5e3, "x": null, "model" : "a/b" }', "a/b"),
        (b'{"messages":[{"model":"inner"}],"model":"m"}', None),
        (b'{"metadata":{"model":"inner"},"model":"m"}', None),
        (b'{"p":"\\"model\\":\\"inner\\",","model":"m"}', None),
        (b'{"p":"\\",\\"model\\":\\"inner', None),
        (b'{"model":"m', None),
        (b'{"model":"m"', None),
        (b'{"model":5,', None),
        (b'{"model":"",', None),
        (b'[{"model":"m"}]', None),
        (b'{"my model":"m","x":1', None),
        (b'{"model":"\xff",', None),
    ],
)
def test_peeking(prefix: bytes, model: str | None) -> None:
    seen = peek_model(prefix)
    assert (seen[0] if seen else None) == model


def test_peeking_into_much_that_is_not_json_takes_no_time() -> None:
    for prefix in (
        b'{"a":' * 20_000,
        b'{"a":"b",' * 20_000,
        b'{"a":1,' + b'"b":2,' * 20_000,
        b" " * 65_536,
        b"{" + b" " * 65_536,
        b'{"a"' + b" " * 65_536,
        b'{"' + b"a" * 65_536,
        b'{"a":"' + b"b" * 65_536,
    ):
        assert peek_model(prefix) is None


@settings(max_examples=50, deadline=None)
@given(bodies(), names)
def test_rewriting_changes_the_model_and_nothing_else(
    what: tuple[dict[str, Any], bytes], model: str
) -> None:
    body, text = what
    renamed = rewrite_model(text, model)
    assert json.loads(renamed) == {**body, "model": model}
    assert list(json.loads(renamed)) == list(body)


def test_rewriting_keeps_the_very_bytes_of_every_value() -> None:
    """A number is not reformatted, a string not escaped anew."""
    odd = b'{"a": 1.0e+02, "model": "x", "b": "\\u00e9\\/", "c": [ 1 ,2]}'
    for value in (b"1.0e+02", b'"\\u00e9\\/"', b"[ 1 ,2]"):
        assert value in rewrite_model(odd, "other")


def test_what_cannot_be_rewritten_is_left_to_the_engine() -> None:
    body = b'{"\xff": 1, "model": "m"}'
    assert rewrite_model(body, "other") == body


@pytest.mark.parametrize(
    ("fields", "bound"),
    [
        ({}, None),
        ({"max_tokens": None}, None),
        ({"max_tokens": 5}, 5),
        ({"max_tokens": 5.0}, 5),
        ({"max_tokens": 0}, None),
        ({"max_tokens": -1}, None),
        ({"max_completion_tokens": 7}, 7),
        ({"max_tokens": 5, "max_completion_tokens": 7}, 5),
        ({"max_tokens": -1, "max_output_tokens": 9}, 9),
        ({"max_tokens": 1e300}, int(1e300)),
    ],
)
def test_output_bounds(fields: dict[str, Any], bound: int | None) -> None:
    head = read_head(json.dumps({"model": "m", **fields}).encode())
    assert head.output_bound() == bound


@pytest.mark.parametrize("number", [b"1e999", b"-1e999", b"1" * 400, b"NaN", b"Infinity"])
def test_absurd_numbers_are_an_answer_and_not_a_crash(number: bytes) -> None:
    body = b'{"model":"m","max_tokens":' + number + b"}"
    try:
        head = read_head(body)
    except ApiError:
        return
    bound = head.output_bound()
    assert bound is None or bound > 0


@given(st.binary(max_size=60))
@example(b'{"model":"m","x":' + b"[" * 40)
def test_no_body_crashes_the_reader(body: bytes) -> None:
    with contextlib.suppress(ApiError):
        assert read_head(body).model


def test_deep_nesting_is_an_answer_and_not_a_crash() -> None:
    for deep in (b"[" * 200_000, b'{"a":' * 200_000):
        with pytest.raises(ApiError):
            read_head(b'{"model":"m","x":' + deep)


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
