"""What an answer cost is read from it, however the engine's writes and the network cut it up."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from datapath_rig import STREAM, Gateway, ScriptedReplica, chunks, eventually, gateway, post, says

from gateway.datapath import metrics

TOKEN = b'data: {"choices":[{"index":0,"delta":{"content":"word "},"finish_reason":null}]}\n\n'
USAGE = (
    b'data: {"choices":[],"usage":{"prompt_tokens":31,"total_tokens":36,"completion_tokens":5},'
    b'"system_fingerprint":"vllm"}\n\n'
)
DONE = b"data: [DONE]\n\n"
LAST = b"0\r\n\r\n"
USAGE_CHUNK = chunks(USAGE)
WHOLE = (
    b'{"choices":[{"message":{"content":"a word"}}],"usage":{"prompt_tokens":31,'
    b'"total_tokens":36,"completion_tokens":5},"prompt_logprobs":null}'
)
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"

STREAMED = {
    "at once": [STREAM + chunks(*[TOKEN] * 5, USAGE, DONE) + LAST],
    # As vLLM writes it: every event, and the end, in a packet of its own.
    "one by one": [STREAM, *[chunks(TOKEN)] * 5, USAGE_CHUNK, chunks(DONE), LAST],
    "usage in two": [STREAM + chunks(*[TOKEN] * 5), USAGE_CHUNK[:60], USAGE_CHUNK[60:]]
    + [chunks(DONE), LAST],
    "end in scraps": [STREAM + chunks(TOKEN), USAGE_CHUNK]
    + [bytes([byte]) for byte in chunks(DONE) + LAST],
}
PLAIN = {
    "at once": [HEAD % len(WHOLE) + WHOLE],
    "usage in the first of two": [HEAD % len(WHOLE) + WHOLE[:-20], WHOLE[-20:]],
    "usage in two": [HEAD % len(WHOLE) + WHOLE[:70], WHOLE[70:]],
}


@pytest.fixture(scope="module")
def served() -> Iterator[Gateway]:
    with gateway() as running:
        yield running


@pytest.mark.parametrize("cut", STREAMED)
def test_usage_of_a_stream_is_found_wherever_it_is_cut(served: Gateway, cut: str) -> None:
    assert_usage_is_counted(served, STREAMED[cut], stream=True)


@pytest.mark.parametrize("cut", PLAIN)
def test_usage_of_a_plain_answer_is_found_wherever_it_is_cut(served: Gateway, cut: str) -> None:
    assert_usage_is_counted(served, PLAIN[cut], stream=False)


def assert_usage_is_counted(served: Gateway, pieces: list[bytes], *, stream: bool) -> None:
    def counts() -> tuple[int, int]:
        names = (metrics.PROMPT_TOKENS, metrics.OUTPUT_TOKENS)
        prompt, output = map(served.pool_count, names)
        return prompt, output

    prompt, output = counts()
    with ScriptedReplica(says(*pieces, pause_s=0.03)) as replica:
        served.publish(replica)
        assert served.ask(post({"model": "m", "prompt": "x", "stream": stream})).status == 200

        eventually(lambda: counts() == (prompt + 31, output + 5))
        served.publish()
    served.settle()
