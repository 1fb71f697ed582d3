"""Whatever a body says, it is either read or refused as the client's mistake."""

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loaders.engines.simulated.api import completions, messages, pooling, responses
from loaders.engines.simulated.api.answers import Speaker
from loaders.engines.simulated.api.bodies import Context, Prepare, RequestError
from loaders.engines.simulated.tokens import token_count

CONTEXT = Context(
    served_models=("demo",),
    max_model_len_tokens=256,
    embedding_size=8,
    speaker=Speaker(mean_tokens=20, spread_fraction=0.5, seed=0),
)
PREPARES: dict[str, Prepare] = {
    "chat": completions.prepare_chat,
    "completions": completions.prepare_completion,
    "responses": responses.prepare,
    "messages": messages.prepare,
    "embeddings": pooling.embeddings,
    "rerank": pooling.rerank,
    "score": pooling.score,
}
KEYS = (
    "model messages prompt input query documents text_1 text_2 stream stream_options max_tokens "
    "max_completion_tokens max_output_tokens min_tokens n stop stop_sequences temperature top_p "
    "seed tools tool_choice response_format text system instructions echo ignore_eos dimensions "
    "encoding_format top_n background previous_response_id tokens role content type name "
    "function parameters format json_schema schema text_format input_schema"
)
LIMITS = "model stream stream_options max_tokens min_tokens n stop temperature seed ignore_eos "
TOOLS = "tools tool_choice "
FIELDS = {
    "chat": LIMITS + TOOLS + "messages max_completion_tokens response_format",
    "completions": LIMITS + "prompt echo",
    "responses": LIMITS + TOOLS + "input instructions max_output_tokens text background",
    "messages": LIMITS + TOOLS + "messages system stop_sequences",
    "embeddings": "model input messages dimensions encoding_format",
    "rerank": "model query documents top_n",
    "score": "model queries documents text_1 text_2",
}
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 300),
    st.floats(allow_nan=False),
    st.sampled_from(["demo", "", "a", "user", "function", "message", "auto", "required", "tool"]),
    st.text(max_size=8),
)
EDGES = st.sampled_from(
    [
        *("", [""], [], {}, [[]], [[0]], [[1, 2], [3]], [{}], ["a", ""], "x" * 1024, "x" * 1025),
        *(0, 1, -1, 255, 256, 257, 2**70, True, None, 0.5, "required", {"type": "any"}),
        [{"role": "user"}],
        [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url"}]}],
        [{"role": "assistant", "content": None, "tool_calls": [{"function": {"arguments": 1}}]}],
        [{"type": "function", "function": {"name": "f", "parameters": {"type": "array"}}}],
        [{"type": "function", "name": "f", "parameters": {"enum": []}}],
        [{"name": "f", "input_schema": {"properties": {"a": {"type": "integer"}}}}],
        {"type": "function", "function": {"name": "f"}},
        {"type": "json_schema", "json_schema": {"schema": {"anyOf": [{"$ref": "#/a/b"}]}}},
        {"format": {"type": "json_object"}},
        {"include_usage": True},
    ]
)
VALUES = EDGES | st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(KEYS.split()), inner, max_size=4),
    ),
    max_leaves=12,
)
LIKELY: dict[str, Any] = {
    "messages": [{"role": "user", "content": "hello"}],
    "prompt": "hello",
    "input": "hello",
    "query": "a",
    "documents": ["a", "b"],
    "text_1": "a",
    "text_2": ["a", "b"],
    "max_tokens": 5,
}


@pytest.mark.parametrize("name", PREPARES)
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_a_body_is_read_or_refused(name: str, data: st.DataObject) -> None:
    keys = st.sampled_from(FIELDS[name].split())
    fields = data.draw(st.dictionaries(keys, VALUES, min_size=1, max_size=4))
    body = json.loads(json.dumps({**LIKELY, **fields}))
    with contextlib.suppress(RequestError):
        reply = PREPARES[name](body, CONTEXT)
        assert reply.answers
        for prompt, answer in zip(reply.prompts, reply.answers, strict=True):
            assert token_count(prompt) >= 1
            assert token_count(prompt) + answer.tokens <= CONTEXT.max_model_len_tokens
            assert len(answer.text) <= 4 * answer.tokens


@settings(max_examples=30, deadline=None)
@given(st.dictionaries(st.sampled_from(KEYS.split()), VALUES, max_size=5))
def test_so_is_one_to_be_counted(fields: dict[str, Any]) -> None:
    for count in (pooling.tokenize, pooling.detokenize, messages.count_tokens):
        with contextlib.suppress(RequestError):
            json.dumps(count({**fields}, CONTEXT))


@pytest.mark.parametrize("name", PREPARES)
def test_what_is_likely_is_read(name: str) -> None:
    assert PREPARES[name]({"model": "demo", **LIKELY}, CONTEXT).answers
