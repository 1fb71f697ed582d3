"""The main job, on the real vLLM: from zero, held, answered, back to zero, and again.

The tests of this file share one Tidegate and run in order: the engine is started twice in all.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import psutil
import pytest
from asking import CHAT, ask, ask_now, chat, client, spawn
from openai import AsyncOpenAI, OpenAI
from tidegate_process import Metrics, Tidegate, up

PATIENCE_S = 900.0
"""For an answer: 200 of them take vLLM half a minute on two idle cores, and five minutes beside ten
busy processes."""
HELD = 200
QUESTION = "What is the capital of France?"

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(PATIENCE_S + 120)]


@pytest.fixture(scope="module")
def running(
    engine_python: Path, model_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Tidegate]:
    pool = {
        "name": "small",
        "aliases": ["SmolLM2-135M-Instruct"],
        "engine": "vllm",
        "model": model_dir,
        "max_model_len_tokens": 2048,
        "idle_to_zero_s": 2,
    }
    with up(
        tmp_path_factory.mktemp("vllm"),
        pools=[pool],
        loaders={"engine_python": engine_python},
        gateway={"holding": {"keepalive_s": 0.5}},
        autoscaler={
            "scale_down_delay_s": 0,
            "stable_window_s": 2,
            "panic_window_s": 1,
            "metrics_interval_s": 0.5,
        },
    ) as tidegate:
        yield tidegate


@pytest.fixture
def tidegate(running: Tidegate) -> Iterator[Tidegate]:
    yield running
    running.assert_at_rest()


@pytest.fixture
def api(tidegate: Tidegate) -> Iterator[OpenAI]:
    with OpenAI(
        base_url=tidegate.url + "/v1", api_key="none", max_retries=0, timeout=PATIENCE_S
    ) as made:
        yield made


def finished(engine: Metrics) -> float:
    """Requests vLLM has finished."""
    return engine.sum("vllm:request_success_total")


def wait_finished(tidegate: Tidegate, count: float) -> None:
    """Until vLLM has counted so many: it does that beside its answers."""
    tidegate.wait(
        f"{count:g} counted by vLLM", lambda: finished(tidegate.engine_metrics("small")) == count
    )


def is_running(pid: int) -> bool:
    """Whether a process runs. A zombie does not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_200_requests_held_while_vllm_starts_are_all_answered_once(tidegate: Tidegate) -> None:
    async def story() -> tuple[list[httpx.Response], float]:
        async with client(tidegate) as http:
            http.timeout = httpx.Timeout(PATIENCE_S)
            began_s = time.monotonic()
            asks = [
                spawn(ask(http, chat("small", f"Say {n}."), request_id=f"held-{n:03}"))
                for n in range(HELD)
            ]
            await asyncio.to_thread(tidegate.wait_held, "small", HELD)
            assert tidegate.pool("small")["ready"] == 0
            # Whatever a stream's client thinks of silence, it hears that it is waited for.
            async with http.stream("POST", CHAT, json=chat("small", stream=True)) as stream:
                lines = [line async for line in stream.aiter_lines() if line]
            assert lines[0].startswith(": tidegate: waiting for small")
            assert lines[-1] == "data: [DONE]"
            # From here on it stays, until the test of going to zero.
            await asyncio.to_thread(tidegate.admin, "/pools/small/scale", {"replicas": 1})
            return await asyncio.gather(*asks), time.monotonic() - began_s

    answers, took_s = asyncio.run(story())
    assert Counter(answer.status_code for answer in answers) == {200: HELD}
    ids = [f"chatcmpl-held-{n:03}" for n in range(HELD)]
    assert [answer.json()["id"] for answer in answers] == ids
    assert all(answer.json()["usage"]["completion_tokens"] > 0 for answer in answers)
    assert tidegate.starts("small") == 1
    wait_finished(tidegate, HELD + 1)
    tidegate.wait_count(HELD + 1, "tidegate_requests_total", pool="small", outcome="ok")
    tidegate.wait_count(HELD + 1, "tidegate_held_total", pool="small")
    tidegate.wait_count(0, "tidegate_retries_total", pool="small")
    woke_s = tidegate.pool("small")["wake_eta_s"]
    print(f"{HELD} held: ready after {woke_s:.1f} s, all answered after {took_s:.1f} s")


def test_stream_with_usage_is_what_the_whole_answer_is(api: OpenAI) -> None:
    ask_for = {"model": "small", "max_tokens": 24, "temperature": 0}
    messages = [{"role": "user", "content": QUESTION}]
    *chunks, last = list(
        api.chat.completions.create(
            **ask_for, messages=messages, stream=True, stream_options={"include_usage": True}
        )
    )
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert "Paris" in streamed
    assert last.usage is not None
    assert last.usage.completion_tokens > 3
    whole = api.chat.completions.create(**ask_for, messages=messages)
    assert whole.choices[0].message.content == streamed
    assert whole.usage == last.usage
    by_alias = api.chat.completions.create(
        **{**ask_for, "model": "SmolLM2-135M-Instruct"}, messages=messages
    )
    assert by_alias.choices[0].message.content == streamed


def test_other_paths_of_vllm(tidegate: Tidegate, api: OpenAI) -> None:
    def post(path: str, **fields: object) -> dict[str, object]:
        answer = ask_now(tidegate, {"model": "small", **fields}, path=path)
        assert answer.status_code == 200, answer.text
        read: dict[str, object] = answer.json()
        return read

    tokens = post("/tokenize", prompt=QUESTION)
    assert tokens["count"] == len(tokens["tokens"]) > 3  # type: ignore[arg-type]
    assert post("/detokenize", tokens=tokens["tokens"])["prompt"] == QUESTION
    turns = [{"role": "user", "content": QUESTION}]
    message = post("/v1/messages", messages=turns, max_tokens=24, temperature=0)
    assert "Paris" in json.dumps(message["content"])
    counted = post("/v1/messages/count_tokens", messages=turns)
    assert counted["input_tokens"] == message["usage"]["input_tokens"]  # type: ignore[index]
    response = api.responses.create(
        model="small", input=QUESTION, max_output_tokens=24, temperature=0
    )
    assert "Paris" in response.output_text
    text = api.completions.create(model="small", prompt="The capital of France is", max_tokens=4)
    assert text.choices[0].text


def test_vllm_s_own_errors_reach_the_client(api: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as long:
        api.chat.completions.create(
            model="small", messages=[{"role": "user", "content": "word " * 3_000}]
        )
    assert "2048" in long.value.message
    assert "x-tidegate-reason" not in long.value.response.headers


def test_cancelled_stream_is_cancelled_in_vllm(tidegate: Tidegate, api: OpenAI) -> None:
    """vLLM does not count what was aborted: it stops running it, long before its end."""
    wanted = 1_800
    before = tidegate.engine_metrics("small")
    stream = api.chat.completions.create(
        model="small",
        messages=[{"role": "user", "content": "Tell me a long story."}],
        max_tokens=wanted,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    next(iter(stream))
    tidegate.wait(
        "it run by vLLM",
        lambda: tidegate.engine_metrics("small").sum("vllm:num_requests_running") == 1,
    )
    stream.close()
    tidegate.wait(
        "nothing run by vLLM",
        lambda: tidegate.engine_metrics("small").sum("vllm:num_requests_running") == 0,
    )
    after = tidegate.engine_metrics("small")
    assert finished(after) == finished(before)
    made = "vllm:generation_tokens_total"
    assert 0 < after.sum(made) - before.sum(made) < wanted / 2
    tidegate.wait_count(1, "tidegate_requests_total", pool="small", outcome="cancelled")


def test_what_vllm_says_of_its_load_is_in_status_and_metrics(
    tidegate: Tidegate, api: OpenAI
) -> None:
    def said() -> dict[str, float | None]:
        replicas = tidegate.pool("small")["replicas"]
        found: dict[str, float | None] = (replicas[0]["engine"] if replicas else None) or {}
        return found

    stream = api.chat.completions.create(
        model="small",
        messages=[{"role": "user", "content": "Tell me a long story of a lighthouse."}],
        max_tokens=1_800,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    next(iter(stream))
    tidegate.wait("it among the running in status", lambda: said().get("running_requests") == 1)
    tidegate.wait("use of the KV cache", lambda: (said().get("kv_cache_usage_fraction") or 0) > 0)
    tidegate.wait("a rate of tokens", lambda: (said().get("generation_tokens_per_s") or 0) > 0)
    assert said()["waiting_requests"] == 0
    assert (said()["kv_cache_tokens"] or 0) >= 2_048
    tidegate.wait_count(1, "tidegate_engine_running_requests", pool="small")
    of_engine = tidegate.engine_metrics("small").sum("vllm:prompt_tokens_total")
    tidegate.wait_count(of_engine, "tidegate_engine_prompt_tokens_total", pool="small")
    stream.close()
    tidegate.wait("nothing running in status", lambda: said().get("running_requests") == 0)
    tidegate.wait_count(0, "tidegate_engine_running_requests", pool="small")


def test_many_at_once_agree_with_the_metrics(tidegate: Tidegate) -> None:
    count, tokens = 24, 12
    names = ("time_to_first_token_seconds_count", "arrivals_total", "generation_tokens_total")
    engine_before = tidegate.engine_metrics("small")
    before = tidegate.metrics()

    async def one(client: AsyncOpenAI, number: int) -> str | None:
        ask_for = {
            "model": "small",
            "messages": [{"role": "user", "content": f"Write about {number}."}],
            "max_tokens": tokens,
            "extra_body": {"ignore_eos": True},
        }
        if number % 2:
            answer = await client.chat.completions.create(**ask_for)
            return answer.choices[0].message.content
        stream = await client.chat.completions.create(
            **ask_for, stream=True, stream_options={"include_usage": True}
        )
        return "".join(
            [chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices]
        )

    async def story() -> list[str | None]:
        async with AsyncOpenAI(base_url=tidegate.url + "/v1", api_key="none") as client:
            return await asyncio.gather(*(one(client, number) for number in range(count)))

    assert all(asyncio.run(story()))
    wait_finished(tidegate, finished(engine_before) + count)
    for name, expected in zip(names, (count, count, count * tokens), strict=True):
        had = before.sum(f"tidegate_{name}", pool="small")
        tidegate.wait_count(had + expected, f"tidegate_{name}", pool="small")


def test_goes_to_zero_when_idle_and_no_process_is_left(tidegate: Tidegate) -> None:
    (replica,) = tidegate.pool("small")["replicas"]
    family = {replica["pid"]} | {
        child.pid for child in psutil.Process(replica["pid"]).children(recursive=True)
    }
    assert len(family) > 1, "vLLM is expected to have processes of its own"
    assert family <= set(tidegate.survivors())
    tidegate.admin("/pools/small/scale", {"replicas": None})
    tidegate.wait_at_zero("small")
    assert not [pid for pid in family if is_running(pid)]
    # What the engine compiles and measures has a place of its own.
    assert list((tidegate.state_dir / "cache" / "bundles").glob("*/facts.json"))
    assert not set(tidegate.survivors()) & family
    # What is meant to stay: the workers, who forecasts, the fork server with an engine that stands
    # by, and who keeps pages. One that is being started shows its parent's command line, or none.
    meant = (
        "gateway.datapath",
        "autoscaler.control.forecast_worker",
        "loaders.engines.vllm.forkserver",
        "modelcache.pagecache.holder_process",
    )
    tidegate.wait(
        "an end of all others",
        lambda: all(any(part in line for part in meant) for line in tidegate.survivors().values()),
    )
    reasons = [one["reason"] for one in tidegate.admin("/pools/small/explain")["decisions"]]
    assert "idle_to_zero" in reasons


def test_one_request_wakes_it_again_and_gets_the_right_answer(
    tidegate: Tidegate, api: OpenAI
) -> None:
    """What a stranger does first: one plain question, and nothing is up."""
    assert [model.id for model in api.models.list()] == ["small", "SmolLM2-135M-Instruct"]
    assert tidegate.pool("small")["replicas"] == []
    began_s = time.monotonic()
    answer = api.chat.completions.create(
        model="small",
        messages=[{"role": "user", "content": QUESTION}],
        max_tokens=24,
        temperature=0,
    )
    took_s = time.monotonic() - began_s
    assert "Paris" in (answer.choices[0].message.content or "")
    assert tidegate.starts("small") == 2
    logs = tidegate.engine_logs("small")
    assert [log.name for log in logs] == ["small-1.log", "small-2.log"]
    assert all(log.stat().st_size > 0 for log in logs)
    print(f"from zero to an answer: {took_s:.1f} s")
