"""Judging a cold hold: whole, once, and in what order."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from bench import coldhold
from bench.asking import Answer, ask

EVENT = b'data: {"id":"a","choices":[{"delta":{"content":"hi"},"finish_reason":null}]}\n\n'
FINISH = b'data: {"id":"a","choices":[{"delta":{},"finish_reason":"stop"}]}\n\n'
DONE = b"data: [DONE]\n\n"
DOCUMENT = b'{"id":"b","choices":[{"message":{"content":"hi"},"finish_reason":"stop"}]}'


def chunked(*pieces: bytes) -> bytes:
    body = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces)
    return b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n" + body + b"0\r\n\r\n"


def sized(status: str, body: bytes) -> bytes:
    return f"HTTP/1.1 {status}\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body


def answer_to(raw: bytes, *, stream: bool) -> Answer:
    async def scene() -> Answer:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(raw)
            writer.close()

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        try:
            made = Answer(index=0, stream=stream)
            return await ask(port, b"POST / HTTP/1.1\r\n\r\n", made, limit_s=60)
        finally:
            server.close()

    return asyncio.run(scene())


@pytest.mark.parametrize(
    ("raw", "stream", "whole"),
    [
        (chunked(EVENT, FINISH, DONE), True, True),
        (chunked(b": held\n\n", EVENT + FINISH[:20], FINISH[20:] + DONE), True, True),
        (sized("200 OK", DOCUMENT), False, True),
        (chunked(EVENT, FINISH), True, False),
        (chunked(EVENT, FINISH, DONE, EVENT, FINISH, DONE), True, False),
        (chunked(EVENT, FINISH, DONE)[:-40], True, False),
        (chunked(b'data: {"error":{"message":"gone"}}\n\n', DONE), True, False),
        (sized("503 Busy", b'{"error":{"message":"full"}}'), False, False),
        (sized("200 OK", DOCUMENT)[:-5], False, False),
        (b"", True, False),
    ],
    ids=["stream", "split", "document", "no done", "twice", "cut", "error event", "503",
         "short document", "nothing"],
)  # fmt: skip
def test_only_a_whole_answer_counts(raw: bytes, stream: bool, whole: bool) -> None:
    answer = answer_to(raw, stream=stream)
    assert answer.whole_once() is whole
    assert whole or answer.error or answer.done_marks != 1


def made_answers(count: int, first: Callable[[int], float] = lambda i: 10.0 + i) -> list[Answer]:
    return [
        Answer(index=i, stream=True, sent_s=i * 0.01, status=200, first_s=first(i),
               ended_s=first(i) + 1, ids={f"id-{i}"}, done_marks=1, finishes=1, tokens=3)
        for i in range(count)
    ]  # fmt: skip


def test_all_answered_in_order() -> None:
    made = coldhold.summarise(made_answers(10), 9.0, 10)
    assert coldhold.passed(made)
    assert made["out_of_order_fraction"] == 0
    assert made["held_at_ready"] == 10
    assert made["first_token_s"]["max"] == pytest.approx(19.0 - 0.09)


def test_reversed_order_is_seen() -> None:
    made = coldhold.summarise(made_answers(10, lambda i: 30.0 - i), 9.0, None)
    assert made["out_of_order_fraction"] == 1.0
    assert coldhold.passed(made)


def test_an_answer_given_twice_fails() -> None:
    answers = made_answers(3)
    answers[1].ids = {"id-0"}
    assert not coldhold.passed(coldhold.summarise(answers, 9.0, 3))


@pytest.mark.parametrize("counted", [2, 4])
def test_the_engine_must_have_counted_as_many_as_were_sent(counted: int) -> None:
    assert not coldhold.passed(coldhold.summarise(made_answers(3), 9.0, counted))


def test_request_success_is_summed_over_its_reasons() -> None:
    metrics = (
        "# TYPE vllm:request_success_total counter\n"
        'vllm:request_success_total{engine="0",finished_reason="stop"} 3.0\n'
        'vllm:request_success_total{engine="0",finished_reason="length"} 1.97e+02\n'
        'vllm:request_success_created{engine="0"} 1.0e9\n'
    )
    assert coldhold.finished_by_engine(metrics) == 200
    assert coldhold.finished_by_engine("up 1\n") is None
