"""The endpoint picker of a whole Tidegate, asked by a real Envoy that carries the requests."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from asking import CHAT, chat, text_of
from envoy_server import (
    SUBSET_FROM_HEADER,
    cluster,
    envoy,
    example,
    ext_proc,
    filters,
    override_host,
)
from simulated_server import SimulatedServer
from tidegate_process import SHUT, Tidegate, simulated, up

SLOW = ("--decode-tokens-per-s", 20, "--batch-slowdown", 0)
STREAM = "FULL_DUPLEX_STREAMED"


def address_of(url: str) -> str:
    return url.removeprefix("http://")


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[SimulatedServer]]:
    """Two engines that Tidegate looks at only when something has failed."""
    place = tmp_path_factory.mktemp("servers")
    with ExitStack() as stack:
        yield [stack.enter_context(SimulatedServer(place, "theirs")) for _ in range(2)]


@pytest.fixture(scope="module")
def tidegate(
    servers: list[SimulatedServer], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Tidegate]:
    pools = [
        simulated("m", "--max-model-len", 200_000, aliases=["gpt-4o"], min_replicas=1),
        simulated("slow", *SLOW, min_replicas=1),
        simulated("zero", *SHUT),
        simulated("full", *SLOW, min_replicas=1, max_inflight_requests=1),
        {"name": "pair", "backend": "static", "static": {"urls": [one.url for one in servers]}},
    ]
    gateway = {
        "picker": {"port": 0, "max_endpoints": 2},
        "holding": {"max_requests": 1, "deadline_s": 60, "keepalive_s": 0},
    }
    autoscaler = {"health_interval_s": 60, "health_failures": 1, "metrics_interval_s": 60}
    place = tmp_path_factory.mktemp("picker")
    with up(place, pools=pools, gateway=gateway, autoscaler=autoscaler) as running:
        for pool, count in (("m", 1), ("slow", 1), ("full", 1), ("pair", 2)):
            running.wait_ready(pool, count)
        yield running


@pytest.fixture(autouse=True)
def at_rest(tidegate: Tidegate) -> Iterator[None]:
    yield
    tidegate.assert_at_rest()


def picker(tidegate: Tidegate) -> str:
    return str(tidegate.admin("/status")["picker"])


@pytest.fixture(scope="module")
def url(tidegate: Tidegate, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An Envoy with the configuration that we ship, and subsets by a header."""
    config = example()
    filters(config).insert(0, SUBSET_FROM_HEADER)
    with envoy(tmp_path_factory.mktemp("envoy"), picker(tidegate), config) as running:
        yield running


@pytest.fixture(scope="module")
def pair_url(
    tidegate: Tidegate, servers: list[SimulatedServer], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """An Envoy that knows the two servers, and takes a list of them."""
    config = example()
    filters(config).insert(0, SUBSET_FROM_HEADER)
    override_host(config, [address_of(one.url) for one in servers])
    with envoy(tmp_path_factory.mktemp("pair"), picker(tidegate), config) as running:
        yield running


def ask(url: str, body: Any, *, path: str = CHAT, **headers: str) -> httpx.Response:
    given = {name.replace("_", "-"): value for name, value in headers.items()}
    return httpx.post(url + path, json=body, headers=given, timeout=120, trust_env=False)


@contextmanager
def endless(url: str, model: str) -> Iterator[Iterator[str]]:
    """A stream that ends when its client leaves; its first line has come."""
    body = chat(model, max_tokens=4_000, stream=True, ignore_eos=True)
    with httpx.stream("POST", url + CHAT, json=body, timeout=120, trust_env=False) as answer:
        lines = answer.iter_lines()
        assert next(lines).startswith("data: ")
        yield lines


def wait_inflight(tidegate: Tidegate, pool: str, count: int) -> None:
    tidegate.wait(
        f"{count} in flight of {pool}", lambda: tidegate.pool(pool)["inflight_requests"] == count
    )


def same(text: str) -> str:
    """An answer without what is another each time: when it was made, and what was cached."""
    return re.sub(r'"(created|cached_tokens)":\d+', r'"\1":0', text)


# Answers


def test_an_answer_is_that_of_the_engine(tidegate: Tidegate, url: str) -> None:
    body = chat("m", "Say something", max_tokens=20)
    through = ask(url, body, x_request_id="one")
    direct = ask(tidegate.engine_url("m"), body, x_request_id="one")
    assert text_of(through) == text_of(direct)
    assert same(through.text) == same(direct.text)


@pytest.mark.parametrize("mode", ["FULL_DUPLEX_STREAMED", "STREAMED"])
def test_a_stream_is_byte_for_byte_that_of_the_engine(
    tidegate: Tidegate, tmp_path: Path, mode: str
) -> None:
    config = example()
    ext_proc(config)["processing_mode"]["response_body_mode"] = mode
    body = chat("m", "Say more", max_tokens=200, stream=True, ignore_eos=True)
    before = tidegate.metrics()
    with envoy(tmp_path, picker(tidegate), config) as url:
        through = ask(url, body, x_request_id="two")
    direct = ask(tidegate.engine_url("m"), body, x_request_id="two")
    assert same(through.text) == same(direct.text)
    assert through.text.count("\n\n") == 202
    assert through.headers["content-type"] == direct.headers["content-type"]
    name = "tidegate_generation_tokens_total"
    tidegate.wait_count(before.sum(name, pool="m") + 200, name, pool="m")


@pytest.mark.parametrize("mode", ["FULL_DUPLEX_STREAMED", "BUFFERED"])
def test_a_large_body_arrives_whole_and_is_renamed(
    tidegate: Tidegate, tmp_path: Path, mode: str
) -> None:
    """By an alias, so that the body that arrives is another than the one that was sent."""
    config = example()
    ext_proc(config)["processing_mode"]["request_body_mode"] = mode
    text = "é large prompt " * 20_000
    before = tidegate.metrics()
    with envoy(tmp_path, picker(tidegate), config) as url:
        for model in ("m", "gpt-4o"):
            through = ask(url, chat(model, text, max_tokens=3), x_request_id="three")
            direct = ask(
                tidegate.engine_url("m"), chat("m", text, max_tokens=3), x_request_id="three"
            )
            assert through.status_code == 200, through.text
            assert same(through.text) == same(direct.text)
    count = direct.json()["usage"]["prompt_tokens"]
    assert count > 75_000
    name = "tidegate_prompt_tokens_total"
    tidegate.wait_count(before.sum(name, pool="m") + 2 * count, name, pool="m")


def test_openai_s_client_sees_no_difference(url: str) -> None:
    client = openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0)
    messages: Any = [{"role": "user", "content": "Hello"}]
    whole = client.chat.completions.create(model="m", messages=messages, max_tokens=9)
    stream = client.chat.completions.create(
        model="m",
        messages=messages,
        max_tokens=9,
        stream=True,
        stream_options={"include_usage": True},
    )
    *chunks, last = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == whole.choices[0].message.content
    assert last.usage is not None
    assert last.usage.completion_tokens == 9
    assert "gpt-4o" in [model.id for model in client.models.list()]
    with pytest.raises(openai.NotFoundError) as unknown:
        client.chat.completions.create(model="nobody", messages=messages)
    assert unknown.value.code == "model_not_found"
    client.close()


def test_errors_are_those_of_the_api_that_was_asked(url: str) -> None:
    answer = ask(url, chat("nobody"), path="/v1/messages")
    assert (answer.status_code, answer.json()["type"]) == (404, "error")
    assert answer.headers["x-tidegate-reason"] == "model_unknown"
    refused = ask(url, chat("m", max_tokens=-1))
    assert refused.status_code == 400
    assert "x-tidegate-reason" not in refused.headers  # the engine's own


# Demand


def test_a_request_at_zero_wakes_the_pool_and_waits(tidegate: Tidegate, url: str) -> None:
    with ThreadPoolExecutor() as others:
        asked = others.submit(ask, url, chat("zero"))
        tidegate.wait_held("zero", 1)
        second = ask(url, chat("zero"))
        assert second.status_code == 429
        assert int(second.headers["retry-after"]) >= 1
        assert second.json()["error"]["code"] == "hold_queue_full"
        tidegate.open_gate("zero")
        text_of(asked.result())
    assert tidegate.starts("zero") == 1
    tidegate.wait_count(1, "tidegate_requests_total", pool="zero", outcome="ok")
    metrics = tidegate.metrics()
    assert metrics.sum("tidegate_held_total", pool="zero") == 1
    assert metrics.sum("tidegate_time_to_first_token_seconds_count", pool="zero") == 1


def test_a_full_pool_holds_and_refuses_and_takes_turns_with_the_gateway(
    tidegate: Tidegate, url: str
) -> None:
    """One replica that takes one request: Envoy has it first, then who asks the gateway itself."""
    with ThreadPoolExecutor() as others:
        with endless(url, "full"):
            wait_inflight(tidegate, "full", 1)
            held = others.submit(ask, tidegate.url, chat("full"))
            tidegate.wait_held("full", 1)
            assert ask(url, chat("full")).status_code == 429
        text_of(held.result())


def test_a_client_that_leaves_frees_the_engine(tidegate: Tidegate, url: str) -> None:
    def ended() -> float:
        metrics = tidegate.metrics()
        return metrics.sum("tidegate_requests_total", pool="slow", outcome="cancelled")

    before = ended()

    def running() -> float:
        return tidegate.engine_metrics("slow").sum("vllm:num_requests_running")

    with endless(url, "slow"):
        wait_inflight(tidegate, "slow", 1)
        assert running() == 1
    tidegate.wait("it is cancelled", lambda: ended() == before + 1)
    wait_inflight(tidegate, "slow", 0)
    tidegate.wait("the engine is idle", lambda: running() == 0)


def test_a_client_that_leaves_while_it_is_held_is_forgotten(tidegate: Tidegate, url: str) -> None:
    with endless(url, "full"):

        async def story() -> None:
            async with httpx.AsyncClient(trust_env=False, timeout=120) as http:
                held = asyncio.create_task(http.post(url + CHAT, json=chat("full")))
                await asyncio.to_thread(tidegate.wait_held, "full", 1)
                held.cancel()
            await asyncio.to_thread(tidegate.wait_held, "full", 0)

        asyncio.run(story())


# Which replica


def served_by(answer: httpx.Response, servers: list[SimulatedServer], before: list[int]) -> int:
    text_of(answer)
    (found,) = [n for n, server in enumerate(servers) if server.answered() > before[n]]
    return found


def test_only_the_subset_is_asked(servers: list[SimulatedServer], pair_url: str) -> None:
    for number in (0, 1, 0, 1):
        before = [server.answered() for server in servers]
        allowed = address_of(servers[number].url)
        answer = ask(pair_url, chat("pair"), x_test_subset=f"9.9.9.9:80,{allowed}")
        assert served_by(answer, servers, before) == number
    refused = ask(pair_url, chat("pair"), x_test_subset="9.9.9.9:80")
    assert refused.status_code == 503
    assert refused.json()["error"]["code"] == "subset_unavailable"


def test_a_replica_that_dies_costs_no_client_an_error(
    tidegate: Tidegate, servers: list[SimulatedServer], pair_url: str
) -> None:
    """Last of these: the first of a list is dead, and Envoy goes on with the second."""
    retries = "tidegate_retries_total"
    before = tidegate.metrics().sum(retries, pool="pair")
    servers[0].kill()

    def fell_back() -> bool:
        text_of(ask(pair_url, chat("pair")))
        return tidegate.metrics().sum(retries, pool="pair") > before

    tidegate.wait("a request that went on", fell_back)
    tidegate.wait("one ready", lambda: tidegate.pool("pair")["ready"] == 1)
    servers[1].kill()
    answer = ask(pair_url, chat("pair"))  # the only one that is left in the list is dead too
    assert answer.status_code == 503
    tidegate.wait("none ready", lambda: tidegate.pool("pair")["ready"] == 0)
    # From here on requests are held for them, as the gateway holds them.
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(pair_url + CHAT, json=chat("pair"), timeout=2, trust_env=False)
    tidegate.expected_log.append(r"pair-\d+")


# Failures


def test_the_picker_is_started_again_when_it_dies(tidegate: Tidegate, url: str) -> None:
    def entry() -> dict[str, Any]:
        (found,) = [one for one in tidegate.admin("/status")["workers"] if one["kind"] == "picker"]
        return dict(found)

    first = entry()
    with endless(url, "slow") as lines:
        os.kill(first["pid"], signal.SIGKILL)
        with pytest.raises(httpx.RemoteProtocolError):
            for _ in lines:
                pass
    tidegate.expected_log.append(r"worker \d+ ended; starting it again")
    tidegate.wait("another picker", lambda: entry()["state"] == "listening")
    assert (entry()["restarts"], entry()["pid"] != first["pid"]) == (first["restarts"] + 1, True)
    tidegate.assert_at_rest()

    def is_back() -> bool:
        return ask(url, chat("m")).status_code == 200

    tidegate.wait("an answer", is_back)


def test_envoy_may_speak_tls_to_it(tmp_path: Path) -> None:
    """As Gateway API implementations do, to whatever certificate."""
    config = example()
    socket = {
        "name": "envoy.transport_sockets.tls",
        "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3"
            ".UpstreamTlsContext",
            "common_tls_context": {"alpn_protocols": ["h2"]},
        },
    }
    cluster(config, "picker")["transport_socket"] = socket
    gateway = {"picker": {"port": 0, "tls": True}}
    with up(tmp_path / "tls", pools=[simulated("m", min_replicas=1)], gateway=gateway) as tls:
        tls.wait_ready("m")
        with envoy(tmp_path / "envoy", picker(tls), config) as url:
            text_of(ask(url, chat("m")))
        expires = "tidegate_tls_certificate_not_after_timestamp_seconds"
        assert tls.metrics().sum(expires, worker="1") > time.time() + 86_400
