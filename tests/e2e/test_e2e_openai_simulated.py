"""OpenAI's own Python client against a whole Tidegate, unchanged: only the base URL is ours."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from openai.types.chat import ChatCompletionMessageParam, ChatCompletionToolParam
from tidegate_process import SHUT, Tidegate, simulated, up

HELLO: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Hello"}]
SLOW = ("--decode-tokens-per-s", 20, "--batch-slowdown", 0)
WEATHER: ChatCompletionToolParam = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": ["Paris"]}},
            "required": ["city"],
        },
    },
}


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tidegate]:
    pools = [
        simulated("m", aliases=["gpt-4o"]),
        simulated("slow", *SLOW),
        simulated("waking", "--startup-s", 1.5),
        simulated("full", *SHUT),
    ]
    holding = {"keepalive_s": 0.3, "max_requests": 2, "release_initial": 64}
    with up(
        tmp_path_factory.mktemp("openai"), pools=pools, gateway={"holding": holding}
    ) as tidegate:
        yield tidegate


@pytest.fixture(scope="module")
def hopeless(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tidegate]:
    """Its only engine takes far longer than anybody may wait."""
    pools = [simulated("stuck", "--startup-s", 600)]
    holding = {"keepalive_s": 0.3, "deadline_s": 2}
    with up(
        tmp_path_factory.mktemp("hopeless"), pools=pools, gateway={"holding": holding}
    ) as tidegate:
        yield tidegate


@pytest.fixture
def tidegate(running: Tidegate) -> Iterator[Tidegate]:
    yield running
    running.assert_at_rest()


@pytest.fixture
def client(tidegate: Tidegate) -> Iterator[OpenAI]:
    with OpenAI(base_url=tidegate.url + "/v1", api_key="none", max_retries=0) as made:
        yield made


@asynccontextmanager
async def asynchronous(tidegate: Tidegate) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=tidegate.url + "/v1", api_key="none", max_retries=0) as made:
        yield made


def finished(tidegate: Tidegate, pool: str, reason: str) -> float:
    """How many requests the engine is done with for this reason."""
    return tidegate.engine_metrics(pool).sum("vllm:request_success_total", finished_reason=reason)


# What works


def test_models_are_listed_and_retrieved(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [
        "m", "gpt-4o", "slow", "waking", "full",
    ]  # fmt: skip
    model = client.models.retrieve("gpt-4o")
    assert (model.id, model.object, model.owned_by) == ("gpt-4o", "model", "tidegate")


def test_chat(client: OpenAI) -> None:
    answer = client.chat.completions.create(model="m", messages=HELLO, max_tokens=5, n=2)
    assert len(answer.choices) == 2
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 10


def test_chat_stream_with_usage(client: OpenAI) -> None:
    stream = client.chat.completions.create(
        model="m",
        messages=HELLO,
        max_tokens=12,
        stream=True,
        stream_options={"include_usage": True},
    )
    *chunks, last = list(stream)
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.completion_tokens == 12
    whole = client.chat.completions.create(model="m", messages=HELLO, max_tokens=12)
    assert streamed == whole.choices[0].message.content


def test_tools(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model="m", messages=HELLO, tools=[WEATHER], tool_choice="required"
    )
    (call,) = answer.choices[0].message.tool_calls or ()
    assert call.type == "function"
    assert call.function.name == "get_weather"
    assert json.loads(call.function.arguments) == {"city": "Paris"}
    assert answer.choices[0].finish_reason == "tool_calls"


def test_tools_streamed(client: OpenAI) -> None:
    with client.chat.completions.stream(
        model="m", messages=HELLO, tools=[WEATHER], tool_choice="required"
    ) as stream:
        (call,) = stream.get_final_completion().choices[0].message.tool_calls or ()
    assert json.loads(call.function.arguments) == {"city": "Paris"}


def test_completions(client: OpenAI) -> None:
    answer = client.completions.create(model="m", prompt="Once", max_tokens=7)
    assert answer.choices[0].text
    chunks = client.completions.create(model="m", prompt="Once", max_tokens=7, stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == answer.choices[0].text


def test_embeddings(client: OpenAI) -> None:
    """The client asks for base64 unless told otherwise, and decodes it."""
    packed = client.embeddings.create(model="m", input=["one", "two"])
    plain = client.embeddings.create(model="m", input=["one", "two"], encoding_format="float")
    assert [len(one.embedding) for one in packed.data] == [64, 64]
    for one, other in zip(packed.data, plain.data, strict=True):
        assert one.embedding == pytest.approx(other.embedding, abs=1e-6)


def test_responses(client: OpenAI) -> None:
    answer = client.responses.create(model="m", input="Hello", max_output_tokens=9)
    assert answer.output_text
    with client.responses.stream(model="m", input="Hello", max_output_tokens=9) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    assert kinds[0] == "response.created"
    assert final.output_text == answer.output_text


def test_raw_headers(client: OpenAI) -> None:
    headers = {"X-Request-Id": "my-own-id"}
    raw = client.chat.completions.with_raw_response.create(
        model="m", messages=HELLO, max_tokens=3, extra_headers=headers
    )
    assert raw.headers["x-request-id"] == "my-own-id"
    assert raw.parse()._request_id == "my-own-id"
    made_up = client.chat.completions.with_raw_response.create(
        model="m", messages=HELLO, max_tokens=3
    )
    assert made_up.headers["x-request-id"].startswith("req-")


def test_asynchronous_client_many_at_once(tidegate: Tidegate) -> None:
    async def story() -> None:
        async with asynchronous(tidegate) as client:
            answers = await asyncio.gather(
                *(
                    client.chat.completions.create(
                        model="m", messages=[{"role": "user", "content": f"{n}"}], max_tokens=4
                    )
                    for n in range(30)
                )
            )
            assert len({answer.id for answer in answers}) == 30
            stream = await client.chat.completions.create(
                model="m", messages=HELLO, max_tokens=6, stream=True
            )
            assert len([chunk async for chunk in stream]) >= 6

    asyncio.run(story())


def test_held_stream_s_comments_do_not_disturb_the_client(
    tidegate: Tidegate, client: OpenAI
) -> None:
    before = time.monotonic()
    stream = client.chat.completions.create(
        model="waking", messages=HELLO, max_tokens=6, stream=True
    )
    opened_s = time.monotonic() - before  # the head came with the first comment
    content = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert opened_s < time.monotonic() - before
    assert content
    assert tidegate.metrics().sum("tidegate_held_total", pool="waking") == 1


# Going away


def test_cancelled_stream_is_cancelled_in_the_engine(tidegate: Tidegate, client: OpenAI) -> None:
    stream = client.chat.completions.create(
        model="slow", messages=HELLO, max_tokens=4_000, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    stream.close()
    tidegate.wait("the abort seen", lambda: finished(tidegate, "slow", "abort") == 1)
    assert tidegate.engine_metrics("slow").sum("vllm:num_requests_running") == 0


def test_cancelled_call_is_cancelled_in_the_engine(tidegate: Tidegate) -> None:
    async def story() -> None:
        async with asynchronous(tidegate) as client:
            await client.chat.completions.create(model="slow", messages=HELLO, max_tokens=1)
            call = asyncio.create_task(
                client.chat.completions.create(
                    model="slow",
                    messages=HELLO,
                    max_tokens=4_000,
                    extra_body={"ignore_eos": True},
                )
            )
            before = await asyncio.to_thread(finished, tidegate, "slow", "abort")
            await asyncio.to_thread(
                tidegate.wait,
                "it running",
                lambda: tidegate.engine_metrics("slow").sum("vllm:num_requests_running") == 1,
            )
            call.cancel()
            await asyncio.to_thread(
                tidegate.wait,
                "the abort seen",
                lambda: finished(tidegate, "slow", "abort") == before + 1,
            )

    asyncio.run(story())


def test_client_s_timeout_while_held_leaves_the_queue(hopeless: Tidegate) -> None:
    with (
        OpenAI(base_url=hopeless.url + "/v1", api_key="none", max_retries=0) as client,
        pytest.raises(openai.APITimeoutError),
    ):
        client.chat.completions.create(model="stuck", messages=HELLO, timeout=0.5)
    hopeless.wait_held("stuck", 0)
    hopeless.assert_at_rest()


# What goes wrong


def test_errors_are_the_right_exceptions(tidegate: Tidegate, client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as unknown:
        client.chat.completions.create(model="nobody", messages=HELLO)
    assert unknown.value.code == "model_not_found"
    assert unknown.value.param == "model"
    assert unknown.value.response.headers["x-tidegate-reason"] == "model_unknown"
    assert "nobody" in unknown.value.message
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nobody")
    with pytest.raises(openai.BadRequestError) as bad:  # the engine's own
        client.chat.completions.create(model="m", messages=[])
    assert bad.value.param == "messages"
    with pytest.raises(openai.BadRequestError) as missing:  # ours
        client.chat.completions.create(model="", messages=HELLO)
    assert missing.value.code == "model_missing"
    tidegate.set_faults("m", "error500:times=1")
    with pytest.raises(openai.InternalServerError):
        client.chat.completions.create(model="m", messages=HELLO, max_tokens=3)
    assert client.chat.completions.create(model="m", messages=HELLO, max_tokens=3).choices


def test_deadline_is_a_503_and_in_a_stream_an_api_error(hopeless: Tidegate) -> None:
    async def story() -> tuple[BaseException | None, BaseException | None]:
        async with asynchronous(hopeless) as client:
            create = client.chat.completions.create
            stream = await create(model="stuck", messages=HELLO, stream=True)
            plain = asyncio.create_task(create(model="stuck", messages=HELLO))
            with pytest.raises(openai.APIError) as streamed:
                await anext(stream)
            await asyncio.wait({plain})
            return streamed.value, plain.exception()

    streamed, plain = asyncio.run(story())
    assert isinstance(streamed, openai.APIError)
    assert streamed.code == "hold_deadline"
    assert isinstance(plain, openai.InternalServerError)
    assert plain.status_code == 503
    assert plain.code == "hold_deadline"
    assert int(plain.response.headers["retry-after"]) >= 1


def test_broken_stream_raises_and_does_not_look_whole(tidegate: Tidegate, client: OpenAI) -> None:
    client.chat.completions.create(model="slow", messages=HELLO, max_tokens=1)
    tidegate.set_faults("slow", "cut:after_chunks=4,times=1")
    stream = client.chat.completions.create(
        model="slow", messages=HELLO, max_tokens=50, stream=True, extra_body={"ignore_eos": True}
    )
    assert [next(stream) for _ in range(4)]
    with pytest.raises(openai.APIError) as broken:
        next(stream)
    assert broken.value.code == "replica_cut"


def test_retry_after_is_heeded(tidegate: Tidegate) -> None:
    """Past the bound of held requests the client is told when to come back; with retries it
    does, and is answered."""

    def refusals() -> float:
        """One more for each time it comes back too early."""
        return tidegate.metrics().sum("tidegate_requests_total", pool="full", outcome="rejected")

    async def story() -> None:
        async with asynchronous(tidegate) as client:
            full = client.chat.completions
            first = asyncio.create_task(full.create(model="full", messages=HELLO, max_tokens=1))
            await asyncio.to_thread(tidegate.wait_held, "full", 1)
            await asyncio.to_thread(tidegate.starting_url, "full")  # from here on it is measured
            await asyncio.sleep(1.1)
            await asyncio.to_thread(tidegate.open_gate, "full")
            await first
            await asyncio.to_thread(tidegate.admin, "/pools/full/scale", {"replicas": 0})
            await asyncio.to_thread(tidegate.wait_at_zero, "full")
            await asyncio.to_thread(tidegate.admin, "/pools/full/scale", {"replicas": None})
            held = [
                asyncio.create_task(full.create(model="full", messages=HELLO, max_tokens=2))
                for _ in range(2)
            ]
            await asyncio.to_thread(tidegate.wait_held, "full", 2)
            with pytest.raises(openai.RateLimitError) as refused:
                await full.create(model="full", messages=HELLO, max_tokens=2)
            wait_s = int(refused.value.response.headers["retry-after"])
            assert wait_s >= tidegate.pool("full")["wake_eta_s"] >= 1.0
            patient = client.with_options(max_retries=10).chat.completions
            began_s = time.monotonic()
            late = asyncio.create_task(patient.create(model="full", messages=HELLO, max_tokens=2))
            await asyncio.to_thread(tidegate.wait, "it refused", lambda: refusals() >= 2)
            await asyncio.to_thread(tidegate.open_gate, "full")
            answers = await asyncio.gather(late, *held)
            assert time.monotonic() - began_s >= wait_s
            assert all(answer.choices[0].message.content for answer in answers)

    asyncio.run(story())
    tidegate.wait_count(4, "tidegate_requests_total", pool="full", outcome="ok")
