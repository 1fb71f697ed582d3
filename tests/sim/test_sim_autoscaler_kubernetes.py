"""Pools in a cluster that change hands while the control loop runs, on virtual time.

The loop and both Kubernetes backends are the real ones; the cluster is made up: its workloads have
as many pods as they were told, at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, cast

import fake_fleet
import pytest
from fake_fleet import FakeBackend, World
from virtual_time import now, run_virtual

from autoscaler.backends.base import Probe
from autoscaler.backends.kubernetes import backend as scaled
from autoscaler.backends.kubernetes import external
from autoscaler.backends.kubernetes.cluster import Cluster
from autoscaler.backends.kubernetes.pods import Pod
from autoscaler.backends.kubernetes.workloads import WorkloadRef, WorkloadScale
from autoscaler.settings import EXTERNAL_KUBERNETES, AutoscalerSettings, PoolSettings
from gateway.compose.engines import start_digest
from loaders.engines.client import EngineClient
from loaders.settings import LoaderSettings

QUICK = AutoscalerSettings(
    idle_to_zero_s=3_000.0,
    scale_down_delay_s=10.0,
    stable_window_s=20.0,
    panic_window_s=2.0,
    drain_s=20.0,
    start_timeout_s=120.0,
)
PROBE_S = 0.5
"""What a health check takes: time passes while a pool is taken over."""
LONG_S = 150.0
"""Longer than any start, and than several looks at whether a workload has its number."""


class HealthyServer:
    """An engine in a pod, which is well."""

    def __init__(self, *, url: str, pool: PoolSettings, health_path: str) -> None:
        self.url, self.pool, self.health_path = url, pool, health_path

    async def probe(self, client: EngineClient) -> Probe:
        await asyncio.sleep(PROBE_S)
        return Probe(ready=True, url=self.url, served_model=self.health_path)


@pytest.fixture(autouse=True)
def healthy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaled, "Server", HealthyServer)
    monkeypatch.setattr(external, "Server", HealthyServer)
    monkeypatch.setattr(fake_fleet, "digests", digests)


def digests(pools: Iterable[PoolSettings]) -> dict[str, str]:
    return {one.name: start_digest(one, LoaderSettings()) for one in pools}


@dataclass
class MadeUpCluster:
    """Workloads by name, with their numbers and pods. ``written`` is what Tidegate wrote."""

    numbers: dict[str, int]
    selector: str | None = "app=m"
    written: list[tuple[str, int]] = field(default_factory=list)
    pods_of: dict[str, list[Pod]] = field(default_factory=dict)
    made: int = 0

    def __post_init__(self) -> None:
        for name, number in self.numbers.items():
            self.set_number(name, number)

    @property
    def client(self) -> MadeUpCluster:
        return self

    async def merge(self, kind: Any, name: str, patch: Any, namespace: str) -> None:
        """The deletion cost of a pod."""

    async def close(self) -> None:
        pass

    def set_number(self, name: str, number: int) -> None:
        self.numbers[name] = number
        pods = self.pods_of.setdefault(name, [])
        del pods[number:]
        while len(pods) < number:
            self.made += 1
            address = f"10.0.0.{self.made}"
            pod = Pod(name=f"{name}-{self.made}", created=f"{self.made:04}", ready=True)
            pods.append(replace(pod, address=address, url=f"http://{address}:8000"))

    def ref(self, pool: PoolSettings) -> WorkloadRef:
        name = pool.kubernetes.name or ""
        return WorkloadRef(namespace="d", api_version="apps/v1", kind="Deployment", name=name)

    async def read_scale(self, pool: PoolSettings) -> WorkloadScale:
        number = self.numbers[pool.kubernetes.name or ""]
        return WorkloadScale(replicas=number, selector=self.selector)

    track = read_scale

    async def write_scale(self, pool: PoolSettings, number: int) -> None:
        self.written.append((pool.kubernetes.name or "", number))
        self.set_number(*self.written[-1])

    def scale(self, pool: PoolSettings) -> WorkloadScale:
        return WorkloadScale(
            replicas=self.numbers[pool.kubernetes.name or ""], selector=self.selector
        )

    def pods(self, pool: PoolSettings) -> list[Pod]:
        return list(self.pods_of[pool.kubernetes.name or ""])

    def endpoints(self, pool: PoolSettings) -> None:
        return None

    def error(self, pool: PoolSettings) -> str:
        return ""


def pool(name: str = "llama", **fields: Any) -> PoolSettings:
    given = {"name": name} | fields.pop("kubernetes", {})
    shape = {"name": "m", "backend": "kubernetes", "max_replicas": 4, "kubernetes": given}
    return PoolSettings.model_validate(shape | fields)


def make_world(made_up: MadeUpCluster, first: PoolSettings, *, begun_at: str = "") -> World:
    cluster, client = cast(Cluster, made_up), EngineClient(timeout_s=1.0)
    return World(
        [first],
        QUICK,
        FakeBackend(),
        more_backends={
            "kubernetes": scaled.KubernetesBackend(cluster=cluster, client=client, clock=now),
            EXTERNAL_KUBERNETES: external.ExternalBackend(
                cluster=cluster, client=client, begun_at=begun_at
            ),
        },
    )


async def apply(world: World, *pools: PoolSettings) -> None:
    """Have these pools from now on, as a reload or a changed ModelPool does."""
    found = await world.loop.find_replicas(pools, digests(pools))
    world.loop.set_pools(pools, digests(pools), None, found)


async def begin(world: World, ready: int) -> None:
    await world.until(lambda: len(world.ready()) == ready)
    await asyncio.sleep(20)


def test_what_another_autoscaler_takes_over_keeps_its_number_and_is_routed_to() -> None:
    async def story() -> None:
        made_up, mine = MadeUpCluster({"llama": 2}), pool(min_replicas=2)
        async with make_world(made_up, mine) as world:
            await begin(world, 2)
            taken = {"scaled_by": "hpa", "zero_owner": "none"}
            await apply(world, pool(min_replicas=2, kubernetes=taken))
            made_up.set_number("llama", 3)
            await asyncio.sleep(LONG_S)
            assert made_up.written == []
            assert len(world.ready()) == 3
            await apply(world, mine)  # and back
            await asyncio.sleep(LONG_S)
            assert made_up.numbers["llama"] == 2
            assert len(world.ready()) == 2

    run_virtual(story())


def test_a_pool_that_is_removed_at_zero_is_let_go_and_may_come_back() -> None:
    async def story() -> None:
        made_up, mine = MadeUpCluster({"llama": 0}), pool()
        async with make_world(made_up, mine) as world:
            await begin(world, 0)
            await apply(world)
            await asyncio.sleep(5)
            made_up.set_number("llama", 3)
            await asyncio.sleep(LONG_S)
            assert made_up.written == []
            await apply(world, mine)
            await apply(world)
            await apply(world, pool(min_replicas=3))
            await asyncio.sleep(LONG_S)
            assert made_up.written == []
            assert len(world.ready()) == 3

    run_virtual(story())


def test_another_workload_gets_the_number_and_the_old_one_keeps_its_own() -> None:
    async def story() -> None:
        made_up, mine = MadeUpCluster({"old": 2, "new": 0}), pool("old", min_replicas=2)
        async with make_world(made_up, mine) as world:
            await begin(world, 2)
            await apply(world, pool("new", min_replicas=2))
            await asyncio.sleep(LONG_S)
            assert made_up.numbers == {"old": 2, "new": 2}
            assert {name for name, _ in made_up.written} == {"new"}
            assert [one.url for one in world.ready()] == [one.url for one in made_up.pods_of["new"]]

    run_virtual(story())


def test_how_pods_are_asked_may_change_and_none_is_started_anew() -> None:
    async def story() -> None:
        made_up, mine = MadeUpCluster({"llama": 2}), pool(min_replicas=2)
        async with make_world(made_up, mine) as world:
            await begin(world, 2)
            before = [one.id for one in world.ready()]
            changed = {"health_path": "/other", "port": 9000}
            await apply(world, pool(min_replicas=2, kubernetes=changed))
            await asyncio.sleep(LONG_S)
            assert [one.id for one in world.ready()] == before
            assert made_up.written == []

    run_virtual(story())


def test_a_workload_that_does_not_say_which_pods_it_has_is_no_pool() -> None:
    async def story() -> None:
        made_up, mine = MadeUpCluster({"llama": 2}, selector=None), pool()
        world = make_world(made_up, mine)
        with pytest.raises(scaled.BackendError, match="selector"):
            await world.loop.open()
        assert made_up.written == []

    run_virtual(story())


@pytest.mark.parametrize("gone_s", [0.0, 0.3, 0.5, 2.0, 5.0, LONG_S])
@pytest.mark.parametrize("busy", [False, True])
def test_a_pool_that_comes_back_keeps_the_number_of_its_workload(gone_s: float, busy: bool) -> None:
    async def story() -> None:
        made_up, mine = MadeUpCluster({"llama": 3}), pool(min_replicas=3)
        # The same workload: the namespace is that of pools which name none.
        again = pool(min_replicas=3, kubernetes={"namespace": "d"})
        async with make_world(made_up, mine) as world:
            await begin(world, 3)
            world.inflight.update({one.id: int(busy) for one in world.ready()})
            await apply(world)
            await asyncio.sleep(gone_s)
            back = asyncio.create_task(apply(world, again))
            await asyncio.sleep(PROBE_S / 2)
            world.inflight.clear()  # the last answers end while it is taken over
            await back
            await asyncio.sleep(LONG_S)
            assert made_up.written == []
            assert len(world.ready()) == 3

    run_virtual(story())


def test_what_runs_goes_on_where_only_its_namespace_is_spelled_out() -> None:
    async def story() -> None:
        made_up, mine = MadeUpCluster({"llama": 3}), pool(min_replicas=3)
        async with make_world(made_up, mine) as world:
            await begin(world, 3)
            before = [one.id for one in world.ready()]
            await apply(world, pool(min_replicas=3, kubernetes={"namespace": "d"}))
            await asyncio.sleep(LONG_S)
            assert made_up.written == []
            assert [one.id for one in world.ready()] == before

    run_virtual(story())


@pytest.mark.parametrize("gone_s", [0.0, 0.3, 5.0])
def test_a_pool_that_comes_back_is_scaled_down_only_after_the_delay(gone_s: float) -> None:
    async def story() -> None:
        made_up, mine = MadeUpCluster({"llama": 3}), pool(min_replicas=1)
        async with make_world(made_up, mine) as world:
            await world.until(lambda: len(world.ready()) == 3)
            await asyncio.sleep(1)
            await apply(world)
            await asyncio.sleep(gone_s)
            await apply(world, mine)
            await asyncio.sleep(3)
            assert made_up.written == []
            await asyncio.sleep(LONG_S)
            assert made_up.numbers["llama"] == 1

    run_virtual(story())


@pytest.mark.parametrize("busy", [False, True])
def test_a_number_that_was_set_while_the_pool_was_gone_holds(busy: bool) -> None:
    async def story() -> None:
        made_up, mine = MadeUpCluster({"llama": 3}), pool(min_replicas=3)
        async with make_world(made_up, mine) as world:
            await begin(world, 3)
            world.inflight.update({one.id: int(busy) for one in world.ready()})
            await apply(world)
            await asyncio.sleep(15)  # longer than the scale-down delay, shorter than a drain
            made_up.set_number("llama", 1)
            await apply(world, pool(min_replicas=1))
            world.inflight.clear()
            await asyncio.sleep(LONG_S)
            assert made_up.written == []
            assert len(world.ready()) == 1

    run_virtual(story())


def test_how_pods_are_asked_may_have_changed_when_a_pool_comes_back() -> None:
    async def story() -> None:
        made_up, mine = MadeUpCluster({"llama": 2}), pool(min_replicas=2)
        async with make_world(made_up, mine) as world:
            await begin(world, 2)
            await apply(world)
            await apply(world, pool(min_replicas=2, kubernetes={"health_path": "/other"}))
            await asyncio.sleep(LONG_S)
            replicas = world.loop.status().pools[0].replicas
            assert {one.served_model for one in replicas} == {"/other"}

    run_virtual(story())


TAKEN = {"scaled_by": "hpa", "zero_owner": "none"}


def test_a_pool_that_changes_hands_again_and_again_keeps_its_number() -> None:
    async def story() -> None:
        made_up, mine = MadeUpCluster({"llama": 3}), pool(min_replicas=3)
        async with make_world(made_up, mine) as world:
            await begin(world, 3)
            for held_s in (0.0, 0.3, 1.0, 3.0, 40.0):
                await apply(world, pool(min_replicas=3, kubernetes=TAKEN))
                await asyncio.sleep(held_s)
                await apply(world, mine)
                await asyncio.sleep(held_s)
            await asyncio.sleep(LONG_S)
            assert made_up.written == []
            assert len(world.ready()) == 3

    run_virtual(story())


def test_a_pod_that_was_not_ready_when_its_pool_changed_hands_is_kept() -> None:
    async def story() -> None:
        made_up, mine = MadeUpCluster({"llama": 3}), pool(min_replicas=3)
        async with make_world(made_up, mine) as world:
            await begin(world, 3)
            own = made_up.pods_of["llama"]
            own[0] = replace(own[0], ready=False)
            await asyncio.sleep(10)
            world.inflight.update({one.id: 1 for one in world.views})
            await apply(world, pool(min_replicas=3, kubernetes=TAKEN))
            await asyncio.sleep(2)
            own[0] = replace(own[0], ready=True)
            await apply(world, mine)
            world.inflight.clear()
            await asyncio.sleep(LONG_S)
            assert made_up.written == []

    run_virtual(story())


def test_replicas_that_were_found_and_not_taken_are_found_again() -> None:
    async def story() -> None:
        made_up, mine = MadeUpCluster({"llama": 0, "other": 3}), pool()
        async with make_world(made_up, mine) as world:
            await begin(world, 0)
            other = pool("other", min_replicas=1).model_copy(update={"name": "o"})
            await world.loop.find_replicas([mine, other], digests([mine, other]))  # then refused
            await asyncio.sleep(LONG_S)
            made_up.set_number("other", 1)
            await apply(world, mine, other)
            await asyncio.sleep(LONG_S)
            assert made_up.written == []
            assert len(world.ready("o")) == 1

    run_virtual(story())


@pytest.mark.parametrize("number", [0, 1])
def test_a_workload_is_not_scaled_up_for_a_pool_that_was_removed(number: int) -> None:
    async def story() -> None:
        made_up, mine = MadeUpCluster({"llama": number}), pool()
        async with make_world(made_up, mine) as world:
            await begin(world, number)
            world.inflight.update({one.id: 250 for one in world.ready()})
            world.arrivals["m"] = world.held["m"] = 1
            await apply(world)
            await asyncio.sleep(60)
            assert made_up.written == []
            assert world.loop.status().pools[0].failures == 0

    run_virtual(story())


def test_pods_of_two_stateful_sets_that_are_named_alike_are_two_replicas() -> None:
    async def story() -> None:
        made_up = MadeUpCluster({"old": 1, "new": 1})
        for pods in made_up.pods_of.values():
            pods[0] = replace(pods[0], name="engine-0")
        async with make_world(made_up, pool("old", min_replicas=1)) as world:
            await begin(world, 1)
            await apply(world, pool("new", min_replicas=1))
            await asyncio.sleep(LONG_S)
            assert made_up.written == []
            assert [one.url for one in world.ready()] == [made_up.pods_of["new"][0].url]

    run_virtual(story())


def lead_s(world: World) -> float | None:
    """How long ahead of demand a replica of its pool is to be asked for."""
    decision = world.loop.status().pools[0].last_decision
    assert decision is not None
    assert decision.inputs is not None
    return decision.inputs.status.lead_s


def test_what_another_autoscaler_starts_says_how_long_a_start_takes() -> None:
    async def story() -> None:
        taken = pool(kubernetes={"scaled_by": "hpa"})
        made_up = MadeUpCluster({"llama": 2})
        own = made_up.pods_of["llama"]
        own[0] = replace(own[0], start_s=40.0)
        own[1] = replace(own[1], start_s=9_000.0)  # it was ready before
        async with make_world(made_up, taken) as world:
            await begin(world, 2)
            assert lead_s(world) == 55.0  # the other one looks each 15 s
            own[0] = replace(own[0], start_s=90.0, ready=False)
            await asyncio.sleep(5)
            own[0] = replace(own[0], ready=True)
            await begin(world, 2)
            assert lead_s(world) == 55.0  # that was no start

    run_virtual(story())


def test_older_pods_say_how_long_a_start_takes_only_where_nothing_else_does() -> None:
    async def story() -> None:
        taken = pool(kubernetes={"scaled_by": "hpa"})
        made_up = MadeUpCluster({"llama": 1})
        own = made_up.pods_of["llama"]
        own[0] = replace(own[0], start_s=40.0)
        async with make_world(made_up, taken, begun_at="0002") as world:
            await begin(world, 1)
            assert lead_s(world) == 55.0
            own.append(replace(own[0], name="b", created="0001", url="http://b", start_s=90.0))
            await begin(world, 2)
            assert lead_s(world) == 55.0  # it may have been ready before
            own.append(replace(own[0], name="c", created="0003", url="http://c", start_s=50.0))
            await begin(world, 3)
            assert lead_s(world) == 65.0

    run_virtual(story())
