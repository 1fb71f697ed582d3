"""Reading engines' metrics: spread over a round, bounded, and unknown where it failed."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable
from dataclasses import replace

import httpx
import pytest
from virtual_time import now, run_virtual

from autoscaler.signals.engine_scraper import (
    MAX_AT_ONCE,
    MAX_PER_S,
    MAX_SKIPPED_ROUNDS,
    EngineScraper,
    observe,
)
from autoscaler.types import EngineObservation
from loaders.engines.base import EngineLoad
from loaders.engines.client import EngineClient
from router.types import Pool, Replica, ReplicaState

INTERVAL_S = 5.0
TIMEOUT_S = 2.0
PAGE = "vllm:num_requests_running 3\nvllm:generation_tokens_total {tokens}\n"


class Engines:
    """Servers whose answers a test sets, and which note when they were asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[float, str]] = []
        self.headers: list[str | None] = []
        self.answer: Callable[[str], Awaitable[httpx.Response]] = self.tell
        self.under_way = self.most_at_once = 0

    async def tell(self, host: str) -> httpx.Response:
        return httpx.Response(200, text=PAGE.format(tokens=int(10 * now())))

    async def handle(self, request: httpx.Request) -> httpx.Response:
        self.asked.append((now(), request.url.host))
        self.headers.append(request.headers.get("authorization"))
        self.under_way += 1
        self.most_at_once = max(self.most_at_once, self.under_way)
        try:
            return await self.answer(request.url.host)
        finally:
            self.under_way -= 1

    def scraper(self) -> EngineScraper:
        transport = httpx.MockTransport(self.handle)
        client = EngineClient(timeout_s=TIMEOUT_S, transport=transport)
        return EngineScraper(interval_s=INTERVAL_S, timeout_s=TIMEOUT_S, client=client, clock=now)


def replica(name: str, state: ReplicaState = ReplicaState.READY, **given: object) -> Replica:
    fields = {"id": name, "pool": "p", "url": f"http://{name}", "state": state, **given}
    return Replica(**fields)  # type: ignore[arg-type]


def pool(*replicas: Replica) -> list[Pool]:
    return [Pool(name="p", replicas=replicas)]


def story(tell: Callable[[Engines, EngineScraper], Awaitable[None]], *replicas: Replica) -> Engines:
    """Run one with a scraper that watches these replicas."""
    engines = Engines()

    async def run() -> None:
        scraper = engines.scraper()
        scraper.watch(pool(*replicas), {"p": None})
        running = asyncio.create_task(scraper.run())
        await tell(engines, scraper)
        running.cancel()
        await scraper.close()

    run_virtual(run())
    return engines


def test_every_replica_is_read_once_a_round_and_not_all_at_once() -> None:
    async def tell(engines: Engines, scraper: EngineScraper) -> None:
        await asyncio.sleep(2 * INTERVAL_S - 0.1)
        seen = scraper.observations()
        assert set(seen) == {f"r{n}" for n in range(10)}
        assert seen["r0"].load == EngineLoad(running_requests=3, generation_tokens=10_050)
        assert seen["r0"].generation_tokens_per_s == pytest.approx(10, rel=0.1)

    engines = story(tell, *(replica(f"r{n}") for n in range(10)))
    assert sorted(host for _, host in engines.asked) == sorted([f"r{n}" for n in range(10)] * 2)
    times = [at for at, _ in engines.asked]
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert min(gaps) >= INTERVAL_S / 10 - 0.01


def test_of_very_many_replicas_a_bounded_number_is_read_in_a_second() -> None:
    many = 1_000

    async def tell(engines: Engines, scraper: EngineScraper) -> None:
        await asyncio.sleep(10)
        assert 9.5 * MAX_PER_S <= len(engines.asked) <= 10.5 * MAX_PER_S
        assert len({host for _, host in engines.asked}) == len(engines.asked)
        await asyncio.sleep(many / MAX_PER_S - 10)
        assert len(scraper.observations()) > 0.99 * many  # a round ago is not stale yet

    story(tell, *(replica(f"r{n}") for n in range(many)))


@pytest.mark.parametrize(
    ("state", "read"),
    [
        (ReplicaState.READY, True),
        (ReplicaState.UNHEALTHY, True),
        (ReplicaState.DRAINING, True),
        (ReplicaState.SLEEPING, True),
        (ReplicaState.STARTING, False),
        (ReplicaState.WAKING, False),
        (ReplicaState.STOPPING, False),
        (ReplicaState.FAILED, False),
    ],
)
def test_engines_that_have_something_to_tell_are_read(state: ReplicaState, read: bool) -> None:
    async def tell(engines: Engines, scraper: EngineScraper) -> None:
        await asyncio.sleep(1)
        assert bool(scraper.observations()) is read

    assert bool(story(tell, replica("r", state)).asked) is read


def test_it_is_asked_with_the_headers_of_all_requests() -> None:
    async def tell(engines: Engines, scraper: EngineScraper) -> None:
        await asyncio.sleep(1)

    engines = story(tell, replica("r", headers=(("Authorization", "Bearer key"),)))
    assert engines.headers == ["Bearer key"]


async def hang(host: str) -> httpx.Response:
    await asyncio.sleep(10_000)
    raise AssertionError


async def drip(host: str) -> httpx.Response:
    """A byte now and then: each comes in time, and the page never does."""

    class Dripping(httpx.AsyncByteStream):
        async def __aiter__(self):  # type: ignore[no-untyped-def]
            while True:
                await asyncio.sleep(0.5 * TIMEOUT_S)
                yield b"v"

    return httpx.Response(200, stream=Dripping())


async def refuse(host: str) -> httpx.Response:
    raise httpx.ConnectError("refused")


async def break_down(host: str) -> httpx.Response:
    raise RuntimeError("a bug of ours")


async def find_nothing(host: str) -> httpx.Response:
    return httpx.Response(404)


async def tell_half(host: str) -> httpx.Response:
    return httpx.Response(200, text="vllm:num_requests_running 3")


FAILURES = [hang, drip, refuse, break_down, find_nothing, tell_half]


@pytest.mark.parametrize("failure", FAILURES)
def test_what_cannot_be_read_is_unknown_at_once_and_known_again_later(
    failure: Callable[[str], Awaitable[httpx.Response]],
) -> None:
    async def tell(engines: Engines, scraper: EngineScraper) -> None:
        await asyncio.sleep(0.1)
        assert "r" in scraper.observations()
        engines.answer = failure
        await asyncio.sleep(INTERVAL_S + TIMEOUT_S + 0.1)
        assert scraper.observations() == {}
        engines.answer = engines.tell
        await asyncio.sleep(2 * INTERVAL_S)
        assert scraper.observations()["r"].load.running_requests == 3

    story(tell, replica("r"))


@pytest.mark.parametrize("failure", FAILURES)
def test_a_server_that_never_answers_is_asked_ever_more_rarely_and_others_are_not(
    failure: Callable[[str], Awaitable[httpx.Response]],
) -> None:
    rounds = 100

    async def tell(engines: Engines, scraper: EngineScraper) -> None:
        async def answer(host: str) -> httpx.Response:
            return await (engines.tell if host == "good" else failure)(host)

        engines.answer = answer
        await asyncio.sleep(rounds * INTERVAL_S)
        assert set(scraper.observations()) == {"good"}

    engines = story(tell, replica("good"), replica("bad"))
    asked = [host for _, host in engines.asked]
    assert asked.count("good") >= rounds - 2
    assert rounds / (MAX_SKIPPED_ROUNDS + 1) <= asked.count("bad") <= 12


def test_servers_that_hang_take_a_bounded_number_of_connections() -> None:
    async def tell(engines: Engines, scraper: EngineScraper) -> None:
        engines.answer = hang
        await asyncio.sleep(30)

    engines = story(tell, *(replica(f"r{n}") for n in range(1_000)))
    assert engines.most_at_once == MAX_AT_ONCE


def test_what_is_old_is_unknown() -> None:
    async def run() -> None:
        scraper = Engines().scraper()
        scraper.watch(pool(replica("r")), {"p": None})
        running = asyncio.create_task(scraper.run())
        await asyncio.sleep(0.1)
        running.cancel()
        await asyncio.sleep(2 * INTERVAL_S + TIMEOUT_S - 0.2)
        assert "r" in scraper.observations()
        await asyncio.sleep(0.2)
        assert scraper.observations() == {}
        await scraper.close()

    run_virtual(run())


def test_a_replica_that_is_gone_is_forgotten_and_one_at_another_address_begins_anew() -> None:
    async def tell(engines: Engines, scraper: EngineScraper) -> None:
        await asyncio.sleep(INTERVAL_S)
        assert set(scraper.observations()) == {"a", "b"}
        sleeping = replica("a", ReplicaState.SLEEPING)
        scraper.watch(pool(sleeping, replica("b", url="http://elsewhere")), {"p": None})
        assert set(scraper.observations()) == {"a"}
        scraper.watch([], {})
        assert scraper.observations() == {}

    story(tell, replica("a"), replica("b"), replica("c", ReplicaState.FAILED))


def test_a_replica_that_goes_before_its_turn_is_not_asked() -> None:
    async def tell(engines: Engines, scraper: EngineScraper) -> None:
        await asyncio.sleep(0.1)
        assert [host for _, host in engines.asked] == ["a"]
        scraper.watch(pool(replica("a")), {"p": None})
        await asyncio.sleep(4 * INTERVAL_S)

    assert {host for _, host in story(tell, replica("a"), replica("b")).asked} == {"a"}


LOAD = EngineLoad(
    prefix_cache_queries_tokens=100,
    prefix_cache_hits_tokens=50,
    prompt_tokens=1_000,
    generation_tokens=2_000,
    preemptions=1,
)


@pytest.mark.parametrize(
    ("later", "hit_fraction", "prompt_per_s", "generation_per_s"),
    [
        (
            {"prefix_cache_queries_tokens": 200, "prefix_cache_hits_tokens": 75},
            0.25,
            0.0,
            0.0,
        ),
        ({"prompt_tokens": 1_100, "generation_tokens": 2_030}, None, 10.0, 3.0),  # no look-ups
        ({"prompt_tokens": 10}, None, None, 0.0),  # the engine was started again
        ({"prefix_cache_queries_tokens": None}, None, 0.0, 0.0),
        ({"prefix_cache_queries_tokens": 110, "prefix_cache_hits_tokens": 70}, 1.0, 0.0, 0.0),
    ],
)
def test_rates_are_over_the_time_between_two_readings(
    later: dict[str, float],
    hit_fraction: float | None,
    prompt_per_s: float | None,
    generation_per_s: float | None,
) -> None:
    first = observe(100.0, LOAD, None)
    assert first == EngineObservation(observed_at_s=100.0, load=LOAD)
    second = observe(110.0, replace(LOAD, **later), first)  # type: ignore[arg-type]
    assert (second.observed_at_s, second.window_s) == (110.0, 10.0)
    assert second.prefix_cache_hit_fraction == hit_fraction
    assert second.prompt_tokens_per_s == prompt_per_s
    assert second.generation_tokens_per_s == generation_per_s
    assert second.preemptions_per_s == 0.0
