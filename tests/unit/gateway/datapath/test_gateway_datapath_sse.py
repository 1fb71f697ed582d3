"""Frames of our own in a stream, and the usage that is read in passing."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.datapath.protocol import sse


def unframe(data: bytes) -> bytes:
    """The payload of whole chunks."""
    payload = b""
    while data:
        size, _, data = data.partition(b"\r\n")
        payload += data[: int(size, 16)]
        assert data[int(size, 16) :][:2] == b"\r\n"
        data = data[int(size, 16) + 2 :]
    return payload


@given(st.text())
def test_a_comment_is_one_line_whatever_is_in_it(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        return
    payload = unframe(sse.comment(text))
    assert payload.startswith(b": ")
    assert payload.endswith(b"\n")
    assert b"\n" not in payload[:-1]  # a blank line would be an event to some readers
    assert b"\r" not in payload


def answer(**usage: object) -> bytes:
    return json.dumps({"choices": [], "usage": usage}).encode()


@pytest.mark.parametrize(
    ("tail", "expected"),
    [
        (b"", (None, None)),
        (b'{"usage":null}', (None, None)),
        (answer(prompt_tokens=5, total_tokens=12, completion_tokens=7), (5, 7)),
        (answer(prompt_tokens=5, completion_tokens=7, total_tokens=12), (5, 7)),
        (answer(completion_tokens=7, prompt_tokens=5), (5, 7)),
        (answer(input_tokens=5, output_tokens=7), (5, 7)),
        (answer(prompt_tokens=5, total_tokens=5), (5, None)),
        (
            b'{"usage":{"prompt_tokens":5,"total_tokens":12,"completion_tokens":7,'
            b'"prompt_tokens_details":{"cached_tokens":3}}}',
            (5, 7),
        ),
        (
            b'data: {"usage":{"prompt_tokens":1,"completion_tokens":1}}\n\n'
            b'data: {"usage":{"prompt_tokens":5,"completion_tokens":7}}\n\ndata: [DONE]\n\n',
            (5, 7),
        ),
        (b'"usage": {"prompt_tokens": 99999999999999999999}', (999999999, None)),
        (b'rompt_tokens":5,"completion_tokens":7}}', (None, None)),
    ],
)
def test_usage(tail: bytes, expected: tuple[int | None, int | None]) -> None:
    assert sse.read_usage(tail) == expected


@given(st.binary(max_size=200))
def test_no_tail_crashes_the_reader(tail: bytes) -> None:
    sse.read_usage(tail + b'"usage"' + tail)


@pytest.mark.parametrize(
    ("tail", "reason"),
    [
        (b'{"choices":[{"finish_reason":"stop","stop_reason":null}],"usage":{}}', "stop"),
        (
            b'data: {"choices":[{"delta":{},"finish_reason": "length"}]}\n\ndata: [DONE]\n\n',
            "length",
        ),
        (b'{"finish_reason":"tool_calls","stop_reason":128001}', "tool_calls"),
        (b'{"finish_reason":"stop"}\n{"finish_reason":null,"stop_reason":null}', "stop"),
        (b'{"finish_reason":"length"}\n{"finish_reason":null,"stop_reason":null}', "length"),
        (b'{"finish_reason":"stop","stop_reason":"</s>"}', "stop"),
        (b'{"finish_reason":"content_filter"}', "other"),
        (b'{"type":"message_delta","delta":{"stop_reason":"end_turn"}}', "stop"),
        (b'{"delta":{"stop_reason":"max_tokens","stop_sequence":null}}', "length"),
        (b'{"stop_reason":"tool_use"}', "tool_calls"),
        (b'{"output":[{"status":"completed"}],"status":"incomplete","usage":{}}', "length"),
        (b'{"data":[{"embedding":[0.1]}],"usage":{}}', None),
        (b'{"finish_reason":null}', None),
        (b"", None),
    ],
)
def test_why_an_answer_ended(tail: bytes, reason: str | None) -> None:
    assert sse.read_finish_reason(tail) == reason
