"""The real vLLM behind a real Envoy that asks the endpoint picker, for a client of OpenAI."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from envoy_server import envoy, example
from openai import OpenAI
from tidegate_process import Tidegate, up

PATIENCE_S = 600.0
QUESTION: list[Any] = [{"role": "user", "content": "What is the capital of France?"}]

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(PATIENCE_S + 120)]


@pytest.fixture(scope="module")
def tidegate(
    engine_python: Path, model_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Tidegate]:
    pool = {"name": "small", "engine": "vllm", "model": model_dir, "max_model_len_tokens": 2048}
    with up(
        tmp_path_factory.mktemp("vllm-picker"),
        pools=[pool],
        loaders={"engine_python": engine_python},
        gateway={"picker": {"port": 0}, "holding": {"deadline_s": PATIENCE_S}},
    ) as running:
        yield running
        running.assert_at_rest()


@pytest.fixture(scope="module")
def api(tidegate: Tidegate, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenAI]:
    picker = str(tidegate.admin("/status")["picker"])
    with (
        envoy(tmp_path_factory.mktemp("vllm-envoy"), picker, example()) as url,
        OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=PATIENCE_S) as client,
    ):
        yield client


def test_a_stream_that_was_held_at_zero_is_that_of_vllm(tidegate: Tidegate, api: OpenAI) -> None:
    assert tidegate.pool("small")["ready"] == 0
    *chunks, last = api.chat.completions.create(
        model="small",
        messages=QUESTION,
        max_tokens=30,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    assert last.usage is not None
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert "Paris" in streamed
    with OpenAI(base_url=f"{tidegate.engine_url('small')}/v1", api_key="none") as direct:
        whole = direct.chat.completions.create(
            model="small", messages=QUESTION, max_tokens=30, temperature=0
        )
    assert streamed == whole.choices[0].message.content
    assert whole.usage is not None
    assert last.usage.completion_tokens == whole.usage.completion_tokens
    name = "tidegate_generation_tokens_total"
    tidegate.wait_count(whole.usage.completion_tokens, name, pool="small")
    assert tidegate.metrics().sum("tidegate_held_total", pool="small") == 1


def test_a_long_prompt_reaches_vllm_whole_and_its_error_the_client(api: OpenAI) -> None:
    text = "é " * 150_000
    with pytest.raises(openai.BadRequestError) as refused:
        api.chat.completions.create(
            model="small", messages=[{"role": "user", "content": text}], max_tokens=1
        )
    assert "2048" in str(refused.value)


def test_a_client_that_leaves_frees_vllm(tidegate: Tidegate, api: OpenAI) -> None:
    stream = api.chat.completions.create(
        model="small",
        messages=QUESTION,
        max_tokens=1_900,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    next(iter(stream))
    stream.close()

    def running() -> float:
        return tidegate.engine_metrics("small").sum("vllm:num_requests_running")

    tidegate.wait("vLLM is idle", lambda: running() == 0)
    tidegate.wait("none in flight", lambda: tidegate.pool("small")["inflight_requests"] == 0)
