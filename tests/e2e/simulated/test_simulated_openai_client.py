"""The official client, unchanged, straight to the simulated engine."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI, OpenAI

MESSAGES: Any = [{"role": "user", "content": "How high is the tide?"}]
TOOLS: Any = [
    {
        "type": "function",
        "function": {
            "name": "tide",
            "parameters": {"type": "object", "properties": {"harbour": {"type": "string"}}},
        },
    }
]


@pytest.fixture
def client(fast: Any) -> Iterator[OpenAI]:
    with OpenAI(base_url=fast.url + "/v1", api_key="any", max_retries=0) as made:
        yield made


def test_models(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["demo"]


def test_chat(client: OpenAI) -> None:
    reply = client.chat.completions.create(model="demo", messages=MESSAGES, max_tokens=5)
    assert reply.choices[0].message.content
    assert reply.system_fingerprint == "simulated"
    assert reply.usage is not None
    assert reply.usage.completion_tokens == 5


def test_chat_stream(client: OpenAI) -> None:
    stream = client.chat.completions.create(
        model="demo",
        messages=MESSAGES,
        max_completion_tokens=5,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 5
    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1])


def test_tools(client: OpenAI) -> None:
    with client.chat.completions.stream(
        model="demo", messages=MESSAGES, tools=TOOLS, tool_choice="required"
    ) as stream:
        final = stream.get_final_completion()
    (call,) = final.choices[0].message.tool_calls or []
    assert call.function.name == "tide"
    assert call.function.arguments == '{"harbour": "simulated"}'


def test_completions_and_embeddings(client: OpenAI) -> None:
    assert client.completions.create(model="demo", prompt="x").choices[0].text
    vectors = client.embeddings.create(model="demo", input=["a", "b"]).data
    assert [len(entry.embedding) for entry in vectors] == [64, 64]


def test_responses(client: OpenAI) -> None:
    whole = client.responses.create(model="demo", input="How high?")
    assert whole.status == "completed"
    with client.responses.stream(model="demo", input="How high?") as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    assert final.output_text == whole.output_text
    assert "response.output_text.delta" in kinds


def test_errors_are_the_clients_own(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.chat.completions.create(model="other", messages=MESSAGES)
    with pytest.raises(openai.BadRequestError, match="cannot be greater than"):
        client.chat.completions.create(model="demo", messages=MESSAGES, max_tokens=10_000)


def test_async_and_cancel_mid_stream(start: Any) -> None:
    engine = start("--decode-tokens-per-s", "20")

    async def main() -> None:
        client = AsyncOpenAI(base_url=engine.url + "/v1", api_key="any", max_retries=0)
        async with client:
            stream = await client.chat.completions.create(
                model="demo", messages=MESSAGES, max_tokens=1000, stream=True
            )
            seen = 0
            async for _ in stream:
                seen += 1
                if seen == 3:
                    break
            await stream.close()

    asyncio.run(main())
    engine.wait_for_metric("vllm:request_success_total", 1, finished_reason="abort")
    assert engine.metric("vllm:num_requests_running") == 0
