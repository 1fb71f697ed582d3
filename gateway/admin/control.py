"""What the admin listener shows and does: the control loop, the workers and the counters as one.

Turns reports into answers of the admin API; readings of our monotonic clock become Unix times
(``at_s``) or durations (``since_s``).
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Protocol, TypeVar

from autoscaler.backends.base import BackendError
from autoscaler.control.loop import ControlLoop
from autoscaler.policy.gpu_faults import find_fault
from autoscaler.signals.activity import Activity
from autoscaler.signals.history import HistoryWriter
from autoscaler.types import (
    NO_TALLY,
    Decision,
    EngineObservation,
    FleetReport,
    ForecastTally,
    GpuReport,
    Observation,
    PoolReport,
    RecentTraffic,
    ReplicaReport,
)
from gateway.admin import metrics_page, schema
from gateway.admin.decisions import inputs_of
from gateway.admin.schema import AdminError
from gateway.admin.signals import FindObjects, FindPod, make_signals
from gateway.datapath import metrics
from gateway.datapath.shared import Shared
from gateway.settings.changes import SettingsChanges
from gateway.settings.load import ConfigError

SIGNALS_S = 0.25
"""Seconds for which signals are used again."""
FORKS_S = 2.0
"""Seconds for which a look at the fork server is used: its memory is read from the kernel."""


class WorkerPool(Protocol):
    """The workers, as far as they are shown; ``gateway.compose.workers.Workers`` are."""

    @property
    def shared(self) -> Shared:
        """The block with their counters."""
        ...

    @property
    def all_listening(self) -> bool:
        """Whether every worker takes connections."""
        ...

    def is_draining(self) -> bool:
        """Whether they only finish what runs."""
        ...

    def status(self) -> list[dict[str, Any]]:
        """Index, pid, state and restarts of each."""
        ...


class LiveControl:
    """The running Tidegate.

    ``NotKnown`` means an unknown pool or replica, ``ValueError`` a value that is not allowed (its
    message is shown), ``TimeoutError`` that it is still under way.
    """

    def __init__(
        self,
        *,
        loop: ControlLoop,
        workers: WorkerPool,
        version: str,
        url: str,
        admin_url: str,
        picker: str | None = None,
        clock: Callable[[], float],
        observe: Callable[[], Observation],
        pool_slots: Callable[[], Mapping[str, int]],
        replica_slots: Callable[[], Mapping[str, int]],
        recent: Callable[[str], RecentTraffic | None],
        traffic: Callable[[], Mapping[str, Any]],
        forks: Callable[[], schema.ForkServerEntry | None],
        reload: Callable[[], Awaitable[SettingsChanges]],
        history: HistoryWriter | None = None,
        tally: Callable[[str], ForecastTally] = lambda pool: NO_TALLY,
        activity: Activity | None = None,
        standby: Callable[[], str] = lambda: "",
        find_objects: FindObjects = lambda pool: (),
        find_pod: FindPod | None = None,
        standby_is_ready: Callable[[], bool] = lambda: False,
        pools_known: Callable[[], bool] = lambda: True,
    ) -> None:
        self._loop = loop
        self._workers = workers
        self._version = version
        self._url = url
        self._admin_url = admin_url
        self._picker = picker
        self._clock = clock
        self._observe = observe
        self._pool_slots = pool_slots
        self._replica_slots = replica_slots
        self._recent = recent
        self._traffic = traffic
        self._forks = forks
        self._reload = reload
        self._history = history
        self._tally = tally
        self._activity = activity or Activity()
        self._signals_seen: tuple[float, schema.SignalsAnswer] | None = None
        self._find_objects, self._find_pod = find_objects, find_pod
        self._standby, self._standby_is_ready = standby, standby_is_ready
        self._pools_known = pools_known
        self._forks_seen: tuple[float, schema.ForkServerEntry | None] | None = None
        self._started_s = clock()

    def status(self) -> schema.GatewayStatus:
        """Workers, pools, replicas, last decisions."""
        report = self._loop.status()
        seen = self._observe()  # now, not at the loop's last tick
        faults = _faults(seen.gpus, report.at_s)
        return schema.GatewayStatus(
            version=self._version,
            endpoint=self._url,
            admin=self._admin_url,
            picker=self._picker,
            uptime_s=round(self._clock() - self._started_s, 3),
            workers=tuple(map(self._worker, self._workers.status())),
            pools=tuple(self._pool(pool, seen, faults, report.at_s) for pool in report.pools),
            fork_server=self._fork_server(),
            gpus=_gpus(seen.gpus, report, faults),
            history=self._history_state(),
            errors=dict(report.errors),
            last_error=report.last_error,
        )

    def _worker(self, worker: dict[str, Any]) -> schema.WorkerEntry:
        counters = self._workers.shared.worker_counters(worker["index"])
        return schema.WorkerEntry(
            **worker,
            connections=counters[metrics.CONNECTIONS],
            upstream_connections=counters[metrics.UPSTREAM_CONNECTIONS],
        )

    def _fork_server(self) -> schema.ForkServerEntry | None:
        now = self._clock()
        if self._forks_seen is None or now - self._forks_seen[0] >= FORKS_S:
            self._forks_seen = (now, self._forks())
        return self._forks_seen[1]

    def _pool(
        self,
        report: PoolReport,
        seen: Observation,
        faults: Mapping[int, schema.GpuFaultEntry],
        now: float,
    ) -> schema.PoolEntry:
        settings = self._loop.pools()[report.name]
        demand = seen.pools.get(report.name)
        return _filled(
            schema.PoolEntry,
            report,
            demand,
            settings,
            engine=settings.engine or settings.backend,
            step_down_in_s=_seconds_until(report.step_down_at_s, now),
            recent=self._recent(report.name),
            last_decision=_decision(report.last_decision, now),
            retry_in_s=_seconds_until(report.retry_at_s, now),
            replicas=tuple(_replica(one, seen, faults, now) for one in report.replicas),
        )

    def _history_state(self) -> schema.HistoryState | None:
        return None if self._history is None else schema.HistoryState.model_validate(self._history)

    def ready(self) -> tuple[bool, str]:
        """Whether requests are accepted: the workers listen, and none hangs. A pool at zero is no
        obstacle; nor, where it may, is waiting to lead."""
        if standby := self._standby():
            return self._standby_is_ready(), standby
        if self._workers.all_listening:
            if not self._pools_known():
                return False, "its pools are not read from the cluster yet"
            return True, "accepting requests"
        if self._workers.is_draining():
            return False, "Tidegate is stopping"
        return False, "not every worker listens and responds"

    def metrics(self) -> bytes:
        """Prometheus text."""
        report, seen = self._loop.status(), self._observe()
        page = metrics_page.render(
            shared=self._workers.shared,
            pools=self._pool_slots(),
            report=report,
            version=self._version,
            traffic=self._traffic(),
            replicas=self._replica_slots(),
            workers=self._workers.status(),
            forks=self._fork_server(),
            engines=seen.engines,
            gpus=seen.gpus,
        )
        page += metrics_page.render_forecasts(
            {one.name: self._tally(one.name) for one in report.pools}
        )
        history = self._history_state()
        return page if history is None else page + metrics_page.render_history(history)

    def signals(self) -> schema.SignalsAnswer:
        """What is published of the pools to other autoscalers; made once for those who ask at about
        the same time. ``AdminError`` while another Tidegate leads: only that knows."""
        if standby := self._standby():
            raise AdminError("not_ready", standby)
        now_s = self._clock()
        if self._signals_seen is not None:
            made_s, answer = self._signals_seen
            if now_s - made_s < SIGNALS_S and answer.version == self._activity.version:
                return answer
        answer = make_signals(
            self._loop.status(),
            self._observe(),
            self._recent,
            self._activity,
            self._find_objects,
            self._find_pod,
        )
        self._signals_seen = now_s, answer
        return answer

    async def wait_for_activity(self, after: int, wait_s: float) -> None:
        """Until the signals have another version than this, for at most ``wait_s``."""
        await self._activity.wait(after, wait_s)

    def explain(self, pool: str) -> list[schema.PastDecisionEntry]:
        """The pool's decisions, newest last. ``NotKnown`` for an unknown pool."""
        now = self._clock()
        return [
            _filled(
                schema.PastDecisionEntry,
                past,
                past.decision,
                inputs=inputs_of(past.decision),
                at_s=_wall(past.decision.at_s, now),
                first_at_s=_wall(past.first_at_s, now),
                last_at_s=_wall(past.last_at_s, now),
            )
            for past in self._loop.decisions(pool)
        ]

    async def scale(self, pool: str, replicas: int | None) -> schema.ScaleAnswer:
        """Hold the pool at this many replicas; ``None`` gives it back to the autoscaler."""
        report = self._loop.set_replicas(pool, replicas)
        return schema.ScaleAnswer(pool=pool, override=replicas, disabled=report.disabled)

    async def sleep(self, pool: str, level: int) -> schema.SleepAnswer:
        """Put the pool's ready replicas to sleep: level 1 keeps weights in host memory, 2 drops
        them."""
        try:
            report = await self._loop.sleep(pool, level)
        except BackendError as error:
            raise ValueError(str(error)) from error
        return schema.SleepAnswer(pool=pool, sleeping=report.sleeping, ready=report.ready)

    async def wake(self, pool: str) -> schema.WakeAnswer:
        """Wake the pool's sleeping replicas, or see that one is started."""
        report = await self._loop.wake(pool)
        return schema.WakeAnswer(pool=pool, starting=report.starting, ready=report.ready)

    async def set_disabled(self, pool: str, *, disabled: bool) -> schema.ServiceAnswer:
        """Take a pool out of service, or back."""
        change = self._loop.disable if disabled else self._loop.enable
        report = await change(pool)
        return schema.ServiceAnswer(pool=report.name, disabled=report.disabled)

    async def drain(self, replica_id: str) -> schema.DrainAnswer:
        """Give a replica no more requests and stop it when it has finished."""
        await self._loop.drain(replica_id)
        return schema.DrainAnswer(replica=replica_id)

    async def reload(self) -> schema.ReloadAnswer:
        """Read the settings again, and apply what is different."""
        if self._workers.is_draining():
            raise AdminError("not_ready", "Tidegate is stopping.")
        try:
            changes = await self._reload()
        except ConfigError as error:
            first = error.problems[0].field or None
            raise AdminError("bad_settings", str(error), param=first) from None
        return schema.ReloadAnswer.model_validate(changes)


def _wall(at_s: float, now: float) -> float:
    """A reading of our monotonic clock as Unix time, for people and their logs."""
    return round(time.time() - (now - at_s), 3)


def _seconds_until(at_s: float | None, now: float) -> float | None:
    return None if at_s is None else round(max(0.0, at_s - now), 3)


Entry = TypeVar("Entry", bound=schema.AdminAnswer)


def _filled(kind: type[Entry], *sources: object, **given: object) -> Entry:
    """An answer whose fields are those given, else those of the first source that has them, else
    unknown."""
    for name in kind.model_fields:
        if name not in given:
            source = next((one for one in sources if hasattr(one, name)), None)
            given[name] = getattr(source, name, None)
    return kind(**given)


def _decision(decision: Decision | None, now: float) -> schema.DecisionEntry | None:
    if decision is None:
        return None
    return _filled(schema.DecisionEntry, decision, inputs=None, at_s=_wall(decision.at_s, now))


def _engine(seen: EngineObservation | None, now: float) -> schema.EngineEntry | None:
    if seen is None:
        return None
    return _filled(schema.EngineEntry, seen.load, seen, age_s=round(now - seen.observed_at_s, 3))


def _faults(report: GpuReport | None, now: float) -> dict[int, schema.GpuFaultEntry]:
    """The faults of GPUs, by their index."""
    found = {}
    for one in (report.gpus if report is not None else None) or ():
        fault = find_fault(one, now)
        if fault is not None:
            at_s = None if fault.at_s is None else _wall(fault.at_s, now)
            found[one.gpu.index] = _filled(schema.GpuFaultEntry, fault, at_s=at_s)
    return found


def _gpus(
    seen: GpuReport | None, fleet: FleetReport, faults: Mapping[int, schema.GpuFaultEntry]
) -> schema.NodeGpus | None:
    if seen is None:
        return None
    replicas = [one for pool in fleet.pools for one in pool.replicas]
    gpus = tuple(
        _filled(
            schema.GpuEntry,
            one,
            one.gpu,
            fault=faults.get(one.gpu.index),
            replicas=tuple(each.id for each in replicas if one.gpu.index in each.gpus),
        )
        for one in seen.gpus or ()
    )
    at_s = seen.observed_at_s
    return _filled(
        schema.NodeGpus,
        seen,
        gpus=None if seen.gpus is None else gpus,
        age_s=None if at_s is None else round(fleet.at_s - at_s, 3),
    )


def _replica(
    replica: ReplicaReport,
    seen: Observation,
    faults: Mapping[int, schema.GpuFaultEntry],
    now: float,
) -> schema.ReplicaEntry:
    load = seen.replicas.get(replica.id)
    return _filled(
        schema.ReplicaEntry,
        replica,
        inflight_requests=load.inflight_requests if load else None,
        inflight_tokens=load.inflight_tokens if load else None,
        since_s=round(now - replica.since_s, 3),
        engine=_engine(seen.engines.get(replica.id), now),
        gpu_fault=next((faults[gpu] for gpu in replica.gpus if gpu in faults), None),
    )
