"""The static backend: externally managed servers, watched and routed to, never touched."""

from __future__ import annotations

import asyncio
import json
import urllib.error
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest
from asking import CHAT, ask, ask_now, chat, error_of, held, run, spawn, text_of, wait_told
from simulated_server import SimulatedServer
from tidegate_process import Tidegate, port_of, up

KEY = "a-secret-key"
KEY_VARIABLE = "TIDEGATE_TEST_KEY"
SLOW = ("--decode-tokens-per-s", 20, "--batch-slowdown", 0)
SETTINGS = {
    "autoscaler": {
        "health_interval_s": 0.2,
        "health_timeout_s": 20,
        "health_failures": 1,
        "metrics_interval_s": 0.5,
    },
    "gateway": {"holding": {"deadline_s": 30, "keepalive_s": 0.3}},
}


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[SimulatedServer]]:
    place = tmp_path_factory.mktemp("servers")
    with ExitStack() as stack:
        one = SimulatedServer(place, "their-name", *SLOW, "--api-key", KEY)
        two = SimulatedServer(place, "their-name", *SLOW, "--api-key", KEY)
        yield [stack.enter_context(one), stack.enter_context(two)]


@pytest.fixture(scope="module")
def running(
    servers: list[SimulatedServer], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Tidegate]:
    pool = {
        "name": "ours",
        "backend": "static",
        "static": {
            "urls": [servers[0].url, servers[1].url + "/v1"],
            "api_key_env": KEY_VARIABLE,
        },
    }
    place, environ = tmp_path_factory.mktemp("static"), {KEY_VARIABLE: KEY}
    with up(place, pools=[pool], environ=environ, **SETTINGS) as tidegate:
        tidegate.wait_ready("ours", 2)
        yield tidegate


@pytest.fixture
def tidegate(running: Tidegate) -> Iterator[Tidegate]:
    yield running
    running.assert_at_rest()


def test_servers_say_their_load_themselves(tidegate: Tidegate) -> None:
    """Their metrics are read with the headers of their pool, whatever path their URL has."""

    def loads() -> list[dict[str, float] | None]:
        return [one["engine"] for one in tidegate.pool("ours")["replicas"]]

    tidegate.wait("both", lambda: None not in loads())
    for load in loads():
        assert load is not None
        assert (load["running_requests"], load["waiting_requests"]) == (0, 0)
        assert load["kv_cache_tokens"] > 0


def test_name_is_rewritten_both_servers_are_used_and_the_key_is_sent(
    tidegate: Tidegate, servers: list[SimulatedServer]
) -> None:
    """The servers know the model by another name and ask for a key that the client never had."""

    async def story(http: httpx.AsyncClient) -> list[httpx.Response]:
        text = 'Is "model" a \\"model\\"? ☂ ' * 10
        bodies = [chat("ours", f"{text} {n}", user="ours", max_tokens=20) for n in range(8)]
        for server in servers:  # so that each request sees all those before it
            server.set_faults("slow:factor=100")
        asks = [spawn(ask(http, body)) for body in bodies]
        await asyncio.to_thread(
            tidegate.wait, "all sent", lambda: tidegate.pool("ours")["inflight_requests"] == 8
        )
        for server in servers:
            server.set_faults()
        return await asyncio.gather(*asks)

    before = [server.answered() for server in servers]
    for answer in run(tidegate, story):
        text_of(answer)
        assert answer.json()["model"] == "their-name"
    after = [server.answered() for server in servers]
    assert (after[0] - before[0], after[1] - before[1]) == (4, 4)
    status = tidegate.pool("ours")
    assert [one["served_model"] for one in status["replicas"]] == ["their-name"] * 2
    assert KEY not in json.dumps(tidegate.admin("/status"))
    assert KEY not in tidegate.log()


def test_client_s_own_key_does_not_reach_the_servers(tidegate: Tidegate) -> None:
    async def story(http: httpx.AsyncClient) -> httpx.Response:
        return await http.post(CHAT, json=chat("ours"), headers={"authorization": "Bearer wrong"})

    text_of(run(tidegate, story))


def test_number_of_servers_is_not_ours_to_change(tidegate: Tidegate) -> None:
    for path, body in (("scale", {"replicas": 0}), ("sleep", {"level": 1})):
        with pytest.raises(urllib.error.HTTPError) as refused:
            tidegate.admin(f"/pools/ours/{path}", body)
        assert refused.value.code == 400
        assert "static" in json.loads(refused.value.read())["error"]["message"]


def test_server_that_is_unwell_gets_nothing_until_it_is_well_again(
    tidegate: Tidegate, servers: list[SimulatedServer]
) -> None:
    servers[0].set_faults("unhealthy")
    tidegate.wait("one unhealthy", lambda: tidegate.pool("ours")["unhealthy"] == 1)
    wait_told(tidegate, "ours")
    before = [server.answered() for server in servers]

    async def story(http: httpx.AsyncClient) -> None:
        for answer in await asyncio.gather(*(ask(http, chat("ours")) for _ in range(6))):
            text_of(answer)

    run(tidegate, story)
    after = [server.answered() for server in servers]
    assert (after[0] - before[0], after[1] - before[1]) == (0, 6)
    servers[0].set_faults()
    tidegate.wait_ready("ours", 2)


def test_server_that_dies_costs_no_client_an_error_and_comes_back(
    tidegate: Tidegate, servers: list[SimulatedServer], tmp_path: Path
) -> None:
    """Last in this module: a server is killed under load, then both, then one is there again."""

    async def story(http: httpx.AsyncClient) -> None:
        for server in servers:
            server.set_faults("slow:factor=100")
        asks = [spawn(ask(http, chat("ours", f"n {n}", max_tokens=20))) for n in range(10)]
        await asyncio.to_thread(
            tidegate.wait, "all sent", lambda: tidegate.pool("ours")["inflight_requests"] == 10
        )
        await asyncio.to_thread(servers[0].kill)
        servers[1].set_faults()
        for answer in await asyncio.gather(*asks):  # those of the dead one were asked again
            text_of(answer)
        await asyncio.to_thread(tidegate.wait_ready, "ours", 1)
        await asyncio.to_thread(servers[1].kill)
        await asyncio.to_thread(tidegate.wait_ready, "ours", 0)
        # A configured model is never 404, and never started by us: it waits.
        listed = (await http.get("/v1/models")).json()["data"]
        assert [model["id"] for model in listed] == ["ours"]
        waiting = await held(tidegate, http, "ours", 2)
        again = SimulatedServer(
            tmp_path, "their-name", "--api-key", KEY, port=port_of(servers[1].url)
        )
        with again:
            for answer in await asyncio.gather(*waiting):
                text_of(answer)
            assert await asyncio.to_thread(again.answered) == 2
            await asyncio.to_thread(tidegate.assert_at_rest)

    run(tidegate, story)


def test_missing_key_is_said_and_requests_get_503(tmp_path: Path) -> None:
    with SimulatedServer(tmp_path, "theirs", "--api-key", KEY) as server:
        pool = {
            "name": "ours",
            "backend": "static",
            "static": {"urls": [server.url], "api_key_env": KEY_VARIABLE},
        }
        gateway = {"holding": {"deadline_s": 0.5}}
        with up(tmp_path, pools=[pool], gateway=gateway) as tidegate:
            tidegate.expected_log.append(KEY_VARIABLE)
            answer = ask_now(tidegate, chat("ours"))
            assert answer.status_code == 503
            assert error_of(answer)["code"] == "hold_deadline"
            tidegate.wait("why", lambda: KEY_VARIABLE in json.dumps(tidegate.pool("ours")))
        assert server.alive()
        assert server.answered() == 0
