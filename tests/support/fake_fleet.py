"""Engines that exist only in memory, as a backend, and the requests they carry."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import httpx
from fake_models import NullPreparer
from virtual_time import now, wall_s

from autoscaler.backends.base import (
    AdoptedReplica,
    Backend,
    BackendError,
    NoCapacity,
    Probe,
    ReplicaSpec,
)
from autoscaler.control.disabled_pools import DisabledPools
from autoscaler.control.learned_history import LearnedHistory
from autoscaler.control.loop import ControlLoop
from autoscaler.policy.packing import Device
from autoscaler.settings import AutoscalerSettings, PoolSettings
from autoscaler.tiers.preparer import Preparer
from autoscaler.tiers.wake_times import WakeTimes
from autoscaler.types import Decision, Observation, PoolDemand, RecentTraffic, ReplicaLoad
from loaders.engines.client import EngineClient
from router.types import Pool, Replica, ReplicaState

TOKENS = 100
"""Tokens of every request here."""


@dataclass
class Engine:
    """One engine: when it was started, whether it lives, and how it answers."""

    spec: ReplicaSpec
    started_at_s: float
    start_s: float
    alive: bool = True
    healthy: bool | None = True
    asleep: bool = False
    stopped_at_s: float | None = None


@dataclass
class FakeBackend:
    """A backend without processes. Its faults are set by the test."""

    clock: Callable[[], float] = now
    owns_replicas: bool = True
    outlives_us: bool = False
    found_urls: tuple[str, ...] | None = None
    recommended: list[int] = field(default_factory=list)
    start_s: float = 5.0
    start_call_s: float = 0.0
    """How long it takes before there is an engine."""
    wake_s: float = 1.0
    stop_s: float = 0.0
    room: int = 1_000
    can_sleep: bool = True
    can_wake: bool = True
    start_error: Exception | None = None
    stop_error: Exception | None = None
    probe_error: Exception | None = None
    adopt_error: Exception | None = None
    dies_after_s: float | None = None
    """How long after its start an engine dies by itself."""
    engines: dict[str, Engine] = field(default_factory=dict)
    started: list[str] = field(default_factory=list)
    stopped: list[str] = field(default_factory=list)
    calls: list[tuple[str, str]] = field(default_factory=list)
    closed: bool = False
    shared: tuple[Device, ...] = ()
    measured_bytes: dict[str, int] = field(default_factory=dict)

    def urls(self, pool: PoolSettings) -> tuple[str, ...]:
        return pool.static.urls if self.found_urls is None else self.found_urls

    def recommend(self, pool: PoolSettings, decision: Decision, demand: PoolDemand | None) -> None:
        self.recommended.append(decision.desired)

    def devices(self) -> tuple[Device, ...]:
        return self.shared

    async def measure_memory(self, replica_id: str) -> int | None:
        return self.measured_bytes.get(self.engines[replica_id].spec.pool.name)

    async def start(self, spec: ReplicaSpec) -> None:
        self.calls.append(("start", spec.id))
        if self.start_call_s:
            await asyncio.sleep(self.start_call_s)
        if self.start_error is not None:
            raise self.start_error
        if len(self.living()) >= self.room:
            raise NoCapacity("all is taken")
        if spec.id in self.engines:
            raise BackendError(f"{spec.id} has been started already")
        self.started.append(spec.id)
        self.engines[spec.id] = Engine(spec=spec, started_at_s=self.clock(), start_s=self.start_s)

    def living(self) -> list[Engine]:
        return [engine for engine in self.engines.values() if engine.alive]

    async def probe(self, replica_id: str) -> Probe:
        if self.probe_error is not None:
            raise self.probe_error
        engine = self.engines.get(replica_id)
        if engine is None:
            return Probe(alive=False, ready=False, detail="it was never started")
        age_s = self.clock() - engine.started_at_s
        if self.dies_after_s is not None and age_s >= self.dies_after_s:
            engine.alive = False
        url = engine.spec.url or f"http://127.0.0.1:1/{replica_id}"
        if not engine.alive:
            return Probe(alive=False, ready=False, detail="it died: out of luck", url=url)
        loaded = age_s >= engine.start_s
        ready = engine.healthy if loaded else False
        return Probe(
            alive=True,
            ready=ready,
            detail="" if ready else "not well",
            phase="" if loaded else "loading weights",
            url=url,
            served_model=engine.spec.pool.name,
            max_model_len_tokens=2048,
            pid=1,
        )

    def set_pools(self, pools: Sequence[PoolSettings]) -> None:
        pass

    async def stop(self, replica_id: str, *, grace_s: float) -> None:
        self.calls.append(("stop", replica_id))
        if self.stop_error is not None:
            raise self.stop_error
        if self.stop_s:
            await asyncio.sleep(self.stop_s)
        engine = self.engines.pop(replica_id, None)
        if engine is not None:
            engine.alive = False
            self.stopped.append(replica_id)

    async def answer(self, request: httpx.Request) -> httpx.Response:
        """What the engines answer to the calls that put them to sleep and wake them."""
        _, replica_id, path = request.url.path.split("/", 2)
        if path == "is_sleeping":
            return httpx.Response(200, json={"is_sleeping": self.engines[replica_id].asleep})
        call = {"sleep": "sleep", "wake_up": "wake"}[path]
        self.calls.append((call, replica_id))
        if not self.can_sleep:
            return httpx.Response(404)
        engine = self.engines.get(replica_id)
        if engine is None:
            raise httpx.ConnectError(f"{replica_id} is not there")
        if call == "wake" and not self.can_wake:
            return httpx.Response(500)
        if call == "wake":
            await asyncio.sleep(self.wake_s)
        engine.asleep = call == "sleep"
        return httpx.Response(200)

    async def adopt(self, wanted: Sequence[ReplicaSpec]) -> list[AdoptedReplica]:
        if self.adopt_error is not None:
            raise self.adopt_error
        alike = {(one.pool.name, one.digest) for one in wanted}
        for replica_id, engine in list(self.engines.items()):
            if not engine.alive or (engine.spec.pool.name, engine.spec.digest) not in alike:
                await self.stop(replica_id, grace_s=0.0)
        return [
            AdoptedReplica(spec=engine.spec, probe=await self.probe(replica_id))
            for replica_id, engine in self.engines.items()
        ]

    async def close(self, *, keep: bool = False) -> None:
        self.closed = True
        for replica_id in () if keep else list(self.engines):
            await self.stop(replica_id, grace_s=0.0)


def process_pool(**fields: object) -> PoolSettings:
    """A pool of made-up engines."""
    return PoolSettings.model_validate(
        {"name": "m", "engine": "simulated", "model": "m", "max_replicas": 8, **fields}
    )


def digests(pools: Iterable[PoolSettings]) -> dict[str, str]:
    """Of what the made-up engines are started with."""
    return {pool.name: repr((pool.backend, pool.engine_args)) for pool in pools}


@dataclass
class World:
    """A control loop with made-up engines and requests, on virtual time.

    Requests of a pool are held until a replica is ready, given to the least busy one, answered
    after their time. What the loop is told can be withheld or falsified.
    """

    pools: list[PoolSettings]
    settings: AutoscalerSettings
    backend: FakeBackend = field(default_factory=FakeBackend)
    capacity: int = 1_000
    more_backends: dict[str, Backend] = field(default_factory=dict)
    preparer: Preparer = field(default_factory=NullPreparer)
    wake_times: WakeTimes = field(default_factory=lambda: WakeTimes(samples=8))
    loop: ControlLoop = field(init=False)
    views: tuple[Replica, ...] = ()
    etas: dict[str, float | None] = field(default_factory=dict)
    phases: dict[str, str] = field(default_factory=dict)
    published: int = 0
    held: dict[str, int] = field(default_factory=dict)
    inflight: dict[str, int] = field(default_factory=dict)
    arrivals: dict[str, int] = field(default_factory=dict)
    answered: int = 0
    cut: int = 0
    refused: int = 0
    unknown: int = 0
    seen: Mapping[str, Pool] = field(default_factory=dict)
    """The pools as they were last published."""
    blind: bool = False
    silent: bool = False
    """The data path reports nothing, not even unknown demand."""
    observe_error: Exception | None = None
    publish_error: Exception | None = None
    earlier_drain_s: float = 0.0
    disabled_pools: DisabledPools | None = None
    learned_history: LearnedHistory | None = None
    recent: RecentTraffic | None = None
    """What every pool was asked in the last minute."""

    def __post_init__(self) -> None:
        self.loop = ControlLoop(
            pools=self.pools,
            settings=self.settings,
            backends={pool.backend: self.backend for pool in self.pools} | self.more_backends,
            digests=digests(self.pools),
            observe=self.observe,
            publish=self.publish,
            preparer=self.preparer,
            wake_times=self.wake_times,
            disabled_pools=self.disabled_pools,
            recent=lambda pool: self.recent,
            learned_history=self.learned_history,
            engine_client=EngineClient(
                timeout_s=self.settings.call_timeout_s,
                transport=httpx.MockTransport(self.backend.answer),
            ),
            earlier_drain_s=self.earlier_drain_s,
            clock=now,
            wall_s=wall_s,
            sleep=asyncio.sleep,
        )

    def set_pools(self, *pools: PoolSettings, settings: AutoscalerSettings | None = None) -> None:
        self.loop.set_pools(pools, digests(pools), settings)

    def names(self) -> list[str]:
        return list(self.seen) or [pool.name for pool in self.pools]

    def observe(self) -> Observation:
        if self.observe_error is not None:
            raise self.observe_error
        if self.silent:
            return Observation()
        if self.blind:
            return Observation(
                pools={name: PoolDemand(observed_at_s=now()) for name in self.names()}
            )
        pools = {}
        for name in self.names():
            inflight = sum(
                self.inflight.get(view.id, 0) for view in self.views if view.pool == name
            )
            held = self.held.get(name, 0)
            pools[name] = PoolDemand(
                observed_at_s=now(),
                inflight_requests=inflight,
                inflight_tokens=inflight * TOKENS,
                queued_requests=held,
                queued_tokens=held * TOKENS,
                arrivals_total=self.arrivals.get(name, 0),
            )
        loads = {
            view.id: ReplicaLoad(
                inflight_requests=self.inflight.get(view.id, 0),
                inflight_tokens=self.inflight.get(view.id, 0) * TOKENS,
            )
            for view in self.views
        }
        return Observation(pools=pools, replicas=loads)

    def publish(self, pools: tuple[Pool, ...]) -> None:
        if self.publish_error is not None:
            raise self.publish_error
        self.published += 1
        self.seen = {pool.name: pool for pool in pools}
        self.views = tuple(replica for pool in pools for replica in pool.replicas)
        self.etas = {pool.name: pool.wake_eta_s for pool in pools}
        self.phases = {pool.name: pool.phase for pool in pools}

    def ready(self, pool: str = "m") -> list[Replica]:
        return [
            view for view in self.views if view.pool == pool and view.state is ReplicaState.READY
        ]

    async def request(self, seconds: float, pool: str = "m") -> None:
        """One request: held while no replica is ready, then answered after ``seconds``. A pool
        that is not published, or drains, is unknown to it; one that is disabled refuses it."""
        if self.seen and (pool not in self.seen or self.seen[pool].draining):
            self.unknown += 1
            return
        if self.seen and self.seen[pool].disabled:
            self.refused += 1
            return
        self.arrivals[pool] = self.arrivals.get(pool, 0) + 1
        self.held[pool] = self.held.get(pool, 0) + 1
        try:
            while not (ready := self.free(pool)):
                self.loop.signal_wake(pool)
                await asyncio.sleep(0.05)
        finally:
            self.held[pool] -= 1
        replica = min(ready, key=lambda view: self.inflight.get(view.id, 0)).id
        self.inflight[replica] = self.inflight.get(replica, 0) + 1
        try:
            for _ in range(max(1, round(seconds / 0.25))):
                await asyncio.sleep(min(seconds, 0.25))
                engine = self.backend.engines.get(replica)
                if engine is None or engine.asleep:
                    self.cut += 1
                    return
            self.answered += 1
        finally:
            self.inflight[replica] -= 1

    def free(self, pool: str) -> list[Replica]:
        return [view for view in self.ready(pool) if self.inflight.get(view.id, 0) < self.capacity]

    def burst(self, count: int, seconds: float, pool: str = "m") -> list[asyncio.Task[None]]:
        return [asyncio.create_task(self.request(seconds, pool)) for _ in range(count)]

    async def until(self, condition: Callable[[], bool], within_s: float = 600.0) -> float:
        """Wait for something; returns how long it took, fails if it does not come."""
        began_s = now()
        while not condition():
            assert now() - began_s < within_s, f"not within {within_s} s: {self.loop.status()}"
            await asyncio.sleep(0.05)
        return now() - began_s

    async def __aenter__(self) -> World:
        self._running = asyncio.create_task(self.loop.run())
        await asyncio.sleep(0.02)
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.loop.close(drain_s=0.0)
        await self._running
