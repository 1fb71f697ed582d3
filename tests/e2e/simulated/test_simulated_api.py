"""The simulated engine's answers, as they are on the wire."""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Callable
from typing import Any

import httpx
import pytest

Events = Callable[[httpx.Response], list[Any]]
MESSAGES = [{"role": "user", "content": "How high is the tide?"}]
PARAMETERS = {
    "type": "object",
    "properties": {"harbour": {"type": "string"}, "hours": {"type": "integer", "minimum": 2}},
    "required": ["harbour", "hours"],
}


def test_everything_is_labelled_a_simulation(fast: Any) -> None:
    assert "SIMULATION" in fast.lines[0]
    assert fast.get("/version").json()["simulated"] is True
    assert fast.get("/health").headers["x-tidegate-simulated"] == "true"
    assert fast.chat().json()["system_fingerprint"] == "simulated"
    assert fast.metric("tidegate_simulated_engine", model_name="demo") == 1


def test_models_and_the_small_endpoints(fast: Any) -> None:
    (model,) = fast.get("/v1/models").json()["data"]
    assert (model["id"], model["object"], model["max_model_len"]) == ("demo", "model", 8192)
    assert (fast.get("/health").status_code, fast.get("/health").content) == (200, b"")
    assert fast.post("/ping").status_code == 200
    assert fast.get("/load").json() == {"server_load": 0}
    assert fast.get("/is_sleeping").json() == {"is_sleeping": False}


def test_a_chat_answer_has_the_tokens_that_tokenize_counts(fast: Any) -> None:
    reply = fast.chat(max_tokens=20).json()
    (choice,) = reply["choices"]
    assert reply["object"] == "chat.completion"
    assert choice["finish_reason"] == "length"
    prompt = fast.post("/tokenize", {"model": "demo", "messages": MESSAGES}).json()
    text = choice["message"]["content"]
    answer = fast.post("/tokenize", {"model": "demo", "prompt": text}).json()
    usage = reply["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (prompt["count"], 20)
    assert answer["count"] == 20
    assert usage["total_tokens"] == prompt["count"] + 20
    again = fast.post("/detokenize", {"model": "demo", "tokens": answer["tokens"]}).json()
    assert again == {"prompt": text}


def test_a_chat_stream_says_what_the_whole_answer_says(fast: Any, events: Events) -> None:
    whole = fast.chat(max_tokens=12).json()
    options = {"include_usage": True}
    chunks = events(fast.chat(max_tokens=12, stream=True, stream_options=options))
    assert chunks.pop() == "[DONE]"
    last = chunks.pop()
    assert (last["choices"], last["usage"]["completion_tokens"]) == ([], 12)
    assert all(chunk["object"] == "chat.completion.chunk" for chunk in chunks)
    assert len({chunk["id"] for chunk in chunks}) == 1
    deltas = [chunk["choices"][0] for chunk in chunks]
    assert deltas[0]["delta"] == {"role": "assistant", "content": ""}
    text = "".join(entry["delta"].get("content") or "" for entry in deltas)
    assert text == whole["choices"][0]["message"]["content"]
    assert [entry["finish_reason"] for entry in deltas] == [None] * 12 + ["length"]


def test_without_include_usage_a_stream_has_none(fast: Any, events: Events) -> None:
    chunks = events(fast.chat(stream=True))
    assert all("usage" not in chunk for chunk in chunks[:-1])


def test_an_answer_gets_as_many_tokens_as_there_is_room_for(fast: Any) -> None:
    body = {"prompt": "x" * 32_000, "max_tokens": 8000, "ignore_eos": True}
    usage = fast.post("/v1/completions", body).json()["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (8000, 192)


def test_several_choices_are_several_answers_to_one_prompt(fast: Any, events: Events) -> None:
    reply = fast.chat(n=3).json()
    assert [choice["index"] for choice in reply["choices"]] == [0, 1, 2]
    assert len({choice["message"]["content"] for choice in reply["choices"]}) == 3
    single = fast.chat().json()["usage"]
    assert reply["usage"]["prompt_tokens"] == single["prompt_tokens"]
    assert reply["usage"]["completion_tokens"] == 12
    chunks = events(fast.chat(n=3, stream=True))[:-1]
    ends = [c["choices"][0]["index"] for c in chunks if c["choices"][0]["finish_reason"]]
    assert sorted(ends) == [0, 1, 2]


def test_stop_ends_the_answer(fast: Any) -> None:
    text = fast.chat(max_tokens=30).json()["choices"][0]["message"]["content"]
    word = text.split()[3]
    (choice,) = fast.chat(max_tokens=30, stop=[word]).json()["choices"]
    assert choice["message"]["content"] == text[: text.index(word)]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", word)


@pytest.mark.parametrize("named", [False, True])
def test_a_required_tool_is_called_with_arguments_that_fit(
    fast: Any, events: Events, named: bool
) -> None:
    tools = [
        {"type": "function", "function": {"name": name, "parameters": PARAMETERS}}
        for name in ("one", "two")
    ]
    choice: Any = {"type": "function", "function": {"name": "two"}} if named else "required"
    fields = {"tools": tools, "tool_choice": choice, "max_tokens": 100}
    (whole,) = fast.chat(**fields).json()["choices"]
    (call,) = whole["message"]["tool_calls"]
    assert whole["finish_reason"] == "tool_calls"
    assert call["function"]["name"] == ("two" if named else "one")
    arguments = json.loads(call["function"]["arguments"])
    assert arguments == {"harbour": "simulated", "hours": 2}
    chunks = [chunk["choices"][0] for chunk in events(fast.chat(stream=True, **fields))[:-1]]
    calls = [c["delta"]["tool_calls"][0] for c in chunks if "tool_calls" in c["delta"]]
    assert calls[0]["function"]["name"] == call["function"]["name"]
    assert json.loads("".join(c["function"]["arguments"] for c in calls)) == arguments
    assert chunks[-1]["finish_reason"] == "tool_calls"


def test_tools_that_may_be_called_are_not(fast: Any) -> None:
    tools = [{"type": "function", "function": {"name": "one", "parameters": PARAMETERS}}]
    (choice,) = fast.chat(tools=tools).json()["choices"]
    assert choice["message"]["tool_calls"] == []


def test_an_answer_in_a_schema_fits_it(fast: Any) -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": PARAMETERS}}
    (choice,) = fast.chat(response_format=wanted, max_tokens=50).json()["choices"]
    assert json.loads(choice["message"]["content"])["hours"] == 2


@pytest.mark.parametrize(
    "prompt", ["hello", ["hello"], [1, 2, 3], [[1, 2], [3]], ["a", "b", "c"]], ids=str
)
def test_completions_take_every_form_of_prompt(fast: Any, events: Events, prompt: Any) -> None:
    count = len(prompt) if isinstance(prompt, list) and not isinstance(prompt[0], int) else 1
    body = {"model": "demo", "prompt": prompt, "max_tokens": 3}
    reply = fast.post("/v1/completions", body).json()
    assert reply["object"] == "text_completion"
    assert [choice["index"] for choice in reply["choices"]] == list(range(count))
    assert reply["usage"]["completion_tokens"] == 3 * count
    chunks = events(fast.post("/v1/completions", {**body, "stream": True}))
    assert chunks.pop() == "[DONE]"
    for choice in reply["choices"]:
        pieces = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == choice["index"]]
        assert "".join(piece["text"] for piece in pieces) == choice["text"]


def test_completions_default_to_16_tokens_and_echo_the_prompt(fast: Any) -> None:
    body = {"model": "demo", "prompt": "ahoy: ", "echo": True}
    reply = fast.post("/v1/completions", body).json()
    assert reply["usage"]["completion_tokens"] == 16
    assert reply["choices"][0]["text"].startswith("ahoy: ")


def test_messages_whole_and_streamed(fast: Any, events: Events) -> None:
    body = {"model": "demo", "system": "Be brief.", "messages": MESSAGES, "max_tokens": 5}
    reply = fast.post("/v1/messages", body).json()
    counted = fast.post("/v1/messages/count_tokens", body).json()
    assert reply["type"] == "message"
    assert reply["stop_reason"] == "max_tokens"
    assert reply["usage"] == {"input_tokens": counted["input_tokens"], "output_tokens": 5}
    stream = events(fast.post("/v1/messages", {**body, "stream": True}))
    kinds = [event["type"] for event in stream]
    assert kinds == [
        "message_start",
        "content_block_start",
        *["content_block_delta"] * 5,
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    text = "".join(event["delta"]["text"] for event in stream if event["type"].endswith("k_delta"))
    assert text == reply["content"][0]["text"]


def test_messages_call_tools(fast: Any, events: Events) -> None:
    body = {
        "model": "demo",
        "messages": MESSAGES,
        "max_tokens": 50,
        "tools": [{"name": "tide", "input_schema": PARAMETERS}],
        "tool_choice": {"type": "tool", "name": "tide"},
    }
    (block,) = fast.post("/v1/messages", body).json()["content"]
    assert (block["type"], block["name"], block["input"]["hours"]) == ("tool_use", "tide", 2)
    stream = events(fast.post("/v1/messages", {**body, "stream": True}))
    pieces = [e["delta"]["partial_json"] for e in stream if e["type"] == "content_block_delta"]
    assert json.loads("".join(pieces)) == block["input"]


def test_responses_whole_and_streamed(fast: Any, events: Events) -> None:
    body = {"model": "demo", "input": "How high?", "max_output_tokens": 6}
    reply = fast.post("/v1/responses", body).json()
    assert (reply["object"], reply["status"]) == ("response", "incomplete")
    assert reply["incomplete_details"] == {"reason": "max_output_tokens"}
    text = reply["output"][0]["content"][0]["text"]
    stream = events(fast.post("/v1/responses", {**body, "stream": True}))
    assert [event["sequence_number"] for event in stream] == list(range(len(stream)))
    kinds = [event["type"] for event in stream]
    assert kinds[:2] == ["response.created", "response.in_progress"]
    assert kinds[-1] == "response.completed"
    assert kinds.count("response.output_text.delta") == 6
    assert stream[-1]["response"]["output"][0]["content"][0]["text"] == text


def test_embeddings_are_unit_vectors_in_either_encoding(fast: Any) -> None:
    body = {"model": "demo", "input": ["one", "two"]}
    reply = fast.post("/v1/embeddings", body).json()
    vectors = [entry["embedding"] for entry in reply["data"]]
    assert [len(vector) for vector in vectors] == [64, 64]
    assert all(abs(sum(v * v for v in vector) - 1) < 1e-4 for vector in vectors)
    assert reply["usage"]["prompt_tokens"] == 2
    packed = fast.post("/v1/embeddings", {**body, "encoding_format": "base64"}).json()
    raw = base64.b64decode(packed["data"][1]["embedding"])
    assert struct.unpack("<64f", raw) == pytest.approx(vectors[1], abs=1e-6)


def test_rerank_and_score_prefer_words_in_common(fast: Any) -> None:
    documents = ["a lighthouse", "low tide at noon", "tide tables"]
    body = {"model": "demo", "query": "low tide", "documents": documents, "top_n": 2}
    results = fast.post("/v1/rerank", body).json()["results"]
    assert [result["index"] for result in results] == [1, 2]
    assert results[0]["document"]["text"] == documents[1]
    scores = fast.post(
        "/v1/score", {"model": "demo", "text_1": "low tide", "text_2": documents}
    ).json()["data"]
    assert max(scores, key=lambda entry: entry["score"])["index"] == 1


@pytest.mark.parametrize(
    ("path", "body", "status", "says"),
    [
        ("/v1/chat/completions", {"model": "no", "messages": MESSAGES}, 404, "`no` does not exist"),
        ("/v1/chat/completions", {"model": "demo"}, 400, "messages"),
        ("/v1/chat/completions", {"model": "demo", "messages": [{}]}, 400, "role"),
        (
            "/v1/chat/completions",
            {"messages": MESSAGES, "max_tokens": 9000},
            400,
            "cannot be greater",
        ),
        ("/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 0}, 400, "max_tokens"),
        ("/v1/chat/completions", {"messages": MESSAGES, "max_tokens": "x"}, 400, "max_tokens"),
        ("/v1/chat/completions", {"messages": MESSAGES, "n": 1000}, 400, "answers"),
        ("/v1/chat/completions", {"messages": MESSAGES, "stop": 5}, 400, "stop"),
        ("/v1/chat/completions", {"messages": MESSAGES, "temperature": -1}, 400, "temperature"),
        ("/v1/chat/completions", {"messages": MESSAGES, "stream_options": {}}, 400, "stream"),
        ("/v1/chat/completions", {"messages": MESSAGES, "tool_choice": "required"}, 400, "tools"),
        ("/v1/chat/completions", [1], 400, "object"),
        ("/v1/completions", {"prompt": "x" * 40_000}, 400, "even without any output"),
        ("/v1/completions", {"prompt": "x" * 32_768}, 400, "maximum context"),
        ("/v1/completions", {"prompt": [[]]}, 400, "prompt"),
        ("/v1/completions", {"prompt": ["a", ""]}, 400, "must not be empty"),
        ("/v1/completions", {"prompt": [2**40]}, 400, "vocabulary"),
        ("/v1/embeddings", {"input": "x", "dimensions": 65}, 400, "dimensions"),
        ("/v1/responses", {"input": "x", "previous_response_id": "r"}, 404, "not found"),
        ("/sleep?level=7", {}, 400, "level"),
        ("/simulated/faults", {"faults": ["explode"]}, 400, "unknown fault"),
    ],
)
def test_errors_are_openais(fast: Any, path: str, body: Any, status: int, says: str) -> None:
    reply = fast.post(path, body)
    error = reply.json()["error"]
    assert (reply.status_code, error["code"]) == (status, status)
    assert says in error["message"]
    assert error["type"]


def test_what_is_not_there_is_answered_as_by_vllms_framework(fast: Any) -> None:
    reply = fast.post("/v1/nothing", {})
    assert (reply.status_code, reply.json()) == (404, {"detail": "Not Found"})
    for path, method in (("/health", "GET, HEAD"), ("/version", "GET")):
        reply = fast.post(path, {})
        assert (reply.status_code, reply.json()) == (405, {"detail": "Method Not Allowed"})
        assert reply.headers["allow"] == method


def test_errors_on_messages_are_anthropics(fast: Any) -> None:
    reply = fast.post("/v1/messages", {"model": "demo", "messages": MESSAGES})
    assert reply.status_code == 400
    assert reply.json()["type"] == "error"
    assert "max_tokens" in reply.json()["error"]["message"]


def test_a_body_that_is_not_json_is_a_400(fast: Any) -> None:
    for body in (b"", b"{", b'{"model": "\xff"}'):
        reply = fast.http.post(fast.url + "/v1/chat/completions", content=body)
        assert reply.status_code == 400
        assert "JSON" in reply.json()["error"]["message"]


def test_keys_are_asked_for_on_v1_only_and_ids_returned_where_asked(start: Any) -> None:
    engine = start("--api-key", "secret", "--enable-request-id-headers")
    assert engine.get("/health").status_code == 200
    assert engine.chat().status_code == 401
    headers = {"authorization": "Bearer secret", "x-request-id": "r-1"}
    reply = engine.post(
        "/v1/completions", {"model": "demo", "prompt": "x", "max_tokens": 1}, headers=headers
    )
    assert reply.status_code == 200
    assert reply.headers["x-request-id"] == "r-1"
    assert reply.json()["id"] == "cmpl-r-1"
