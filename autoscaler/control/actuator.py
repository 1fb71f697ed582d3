"""Applies the lifecycle table to replicas, and makes the calls to backends and engines it asks for.

Its events come from the control loop, from the calls, from probes, and with time: starts that are
due, time limits that are reached. A transition happens in one synchronous step on the event loop;
the calls run beside it, one at a time per replica, each bounded in time, and come back as events.
An error of a call ends here: it is recorded, and becomes the event that says the call failed.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

from autoscaler.backends.base import AdoptedReplica, BackendError, NoCapacity, Probe, Unsupported
from autoscaler.control.replicas import PoolRecord, ReplicaRecord
from autoscaler.control.reports import describe_phase
from autoscaler.policy.lifecycle import PROBED_STATES, Action, Event, InvalidTransition, State, step
from autoscaler.policy.packing import gpus_of
from autoscaler.policy.plan import LOADING
from autoscaler.settings import AutoscalerSettings
from autoscaler.tiers.preparer import Preparer
from autoscaler.types import ReplicaLoad, first_line
from loaders.engines.base import engine_of
from loaders.engines.client import EngineClient, EngineUnsupported
from modelcache.types import Progress, Tier

LOG = logging.getLogger("tidegate.autoscaler")

MAX_PROBES_PER_S = 100
"""Health checks in a second, at three milliseconds each: of more replicas each is checked less
often. One that the data path meets an error of is checked at once."""

Call = Callable[[PoolRecord, ReplicaRecord], Awaitable[None]]


class ErrorCounts:
    """Errors that the loop survived, counted by where they were raised."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.last: str | None = None
        self._logged: dict[str, str] = {}

    def add(self, where: str, error: BaseException) -> str:
        """Record an error and return its text. One that repeats is logged once as a warning."""
        text = str(error) or type(error).__name__
        self.counts[where] += 1
        self.last = f"{where}: {text}"
        repeated = self._logged.get(where) == text
        self._logged[where] = text
        LOG.log(logging.DEBUG if repeated else logging.WARNING, "%s: %s", where, text)
        return text

    @contextmanager
    def survive(self, where: str) -> Iterator[None]:
        """Record whatever error is raised within, and go on after it."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 -- the caller says why it may go on
            self.add(where, error)


class Actuator:
    """Takes replicas through their lifecycle. ``on_change`` is called after every transition,
    ``on_progress`` when a preparation made progress."""

    def __init__(
        self,
        *,
        settings: AutoscalerSettings,
        clock: Callable[[], float],
        sleep: Callable[[float], Awaitable[None]],
        on_change: Callable[[], None],
        on_progress: Callable[[], None],
        engine_client: EngineClient,
        preparer: Preparer,
        errors: ErrorCounts,
    ) -> None:
        self.settings = settings
        self._clock = clock
        self._sleep = sleep
        self._on_change = on_change
        self._on_progress = on_progress
        self._engine_client = engine_client
        self._preparer = preparer
        self._errors = errors
        self._tasks: set[asyncio.Task[None]] = set()
        self._probing: set[str] = set()
        self._watched = 0

    def apply(
        self, pool: PoolRecord, record: ReplicaRecord, event: Event, detail: str = ""
    ) -> None:
        """Take a replica one step further, where the event changes anything."""
        try:
            found = step(record.state, event)
        except InvalidTransition as error:
            self._errors.add("lifecycle", error)
            return
        if found is None:
            return
        now_s, before = self._clock(), record.state
        LOG.info("%s: %s -> %s (%s)", record.id, before, found.state, event)
        if found.state is not before:
            record.state = found.state
            record.since_s = now_s
            record.health_failures = 0
        if detail:
            record.error = detail
        elif found.state is State.READY:
            record.error = None
        if event is Event.KEEP:
            record.drain_at_s = None
            record.makes_room = False
        for action in found.actions:
            self._perform(pool, record, action, before, now_s)
        if found.state is State.READY and event in {Event.BECAME_READY, Event.WOKEN}:
            pool.ready_at_s = now_s
            pool.failed_starts = 0
        self._on_change()

    def _perform(
        self, pool: PoolRecord, record: ReplicaRecord, action: Action, before: State, now_s: float
    ) -> None:
        match action:
            case Action.PREPARE:
                record.woken_from = pool.start_tier()
                record.begun_at_s = now_s
                self._call(pool, record, self._prepare)
                record.preparation = record.operation
            case Action.CANCEL:
                if record.preparation is not None:
                    record.preparation.cancel()
                self._call(pool, record, self._release)
            case Action.START:
                self._call(pool, record, self._start)
                record.starting = record.operation
            case Action.STOP:
                # A start may wait for long (a fork server that imports), and is of no use any more.
                if record.starting not in {None, asyncio.current_task()}:
                    record.starting.cancel()
                self._call(pool, record, self._stop)
            case Action.STOP_LATER:
                self._call(pool, record, self._stop_later)
            case Action.SLEEP:
                self._call(pool, record, self._put_to_sleep)
            case Action.WAKE:
                record.woken_from = Tier.SLEEPING
                record.begun_at_s = now_s
                self._call(pool, record, self._wake)
            case Action.DRAIN:
                record.drain_at_s = now_s
            case Action.MEASURE:
                if record.begun_at_s is not None and record.woken_from is not None:
                    pool.tiers.record_wake(record.woken_from, now_s - record.begun_at_s)
            case Action.COUNT_FAILURE:
                self._count_failure(pool, record, before, now_s)

    def _count_failure(
        self, pool: PoolRecord, record: ReplicaRecord, before: State, now_s: float
    ) -> None:
        if before not in LOADING:
            pool.crashes += 1
        elif record.woken_from is not None:
            pool.tiers.record_failed_start(record.woken_from)
            others = [one for one in pool.replicas.values() if one is not record]
            if record.prepared is not None and not any(one.state in LOADING for one in others):
                pool.failed_starts += 1
        pool.failures += 1
        pool.retry_at_s = now_s + self.backoff_s(pool.failures)
        pool.error = record.error
        pool.cause = record.probe.cause or first_line(record.error or "")
        LOG.warning("%s failed: %s", record.id, first_line(record.error or ""))

    def backoff_s(self, failures: int) -> float:
        """The pause after this many failures in a row: doubled by each, up to the limit."""
        first_s, longest_s = self.settings.backoff_initial_s, self.settings.backoff_max_s
        return min(longest_s, first_s * 2.0 ** min(failures - 1, 60))

    def _call(self, pool: PoolRecord, record: ReplicaRecord, call: Call) -> None:
        """Make a call to the backend once the replica's earlier ones have come back."""
        earlier = record.operation

        async def follow() -> None:
            if earlier is not None and not earlier.done():
                await asyncio.wait({earlier})
            await call(pool, record)

        record.operation = self.spawn(follow(), f"{record.id}-call")

    def spawn(self, work: Awaitable[None], name: str) -> asyncio.Task[None]:
        """Do something beside the loop, until ``close``; an error in it is recorded."""

        async def guarded() -> None:
            try:
                await work
            except Exception as error:  # noqa: BLE001 -- one replica's bug must not stop the rest
                self._errors.add(name, error)

        task = asyncio.create_task(guarded(), name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _prepare(self, pool: PoolRecord, record: ReplicaRecord) -> None:
        def report(progress: Progress | None) -> None:
            if progress is None or record.state in {State.PREPARING, State.STARTING}:
                record.progress = progress
                self._on_progress()

        record.progress = None
        try:
            if record.woken_from is Tier.REMOTE:  # or its model has not been looked for yet
                await self._preparer.refresh(record.spec.pool)
                record.woken_from = pool.start_tier()
            prepared = await self._preparer.prepare(record.spec, report)
        except Exception as error:  # noqa: BLE001 -- whatever it is, there is nothing to start
            record.preparation = record.progress = None
            record.error = self._errors.add(f"preparation of {pool.pool.name}", error)
            self.apply(pool, record, Event.PREPARE_FAILED, record.error)
        else:
            record.preparation, record.prepared = None, prepared
            self.apply(pool, record, Event.PREPARED)

    async def is_asleep(self, found: AdoptedReplica) -> bool:
        """Whether a replica that runs already sleeps."""
        if not found.probe.ready:
            return False
        engine = engine_of(found.spec.pool.engine)
        return await engine.is_sleeping(self._engine_client, found.probe.url or "") is True

    def adopt(self, pool: PoolRecord, record: ReplicaRecord) -> None:
        """Watch a replica that runs already, and hold its model for it."""
        LOG.info("%s: taken over, %s", record.id, record.state)
        self.spawn(self._watch(pool, record), f"{record.id}-watch")
        self.spawn(self._hold_model(pool, record), f"{record.id}-model")
        self._on_change()

    async def _hold_model(self, pool: PoolRecord, record: ReplicaRecord) -> None:
        """Prepare the model of a replica that runs already: it is leased again. If a start would
        take another revision now, the replica is replaced."""
        runs_from = (record.prepared or record.spec).pool.model
        prepared = await self._preparer.prepare(record.spec, lambda progress: None)
        if record.ended:
            await self._release(pool, record)
        elif prepared.pool.model != runs_from:
            LOG.info("%s: its model is at %s now; it is replaced", record.id, prepared.pool.model)
            record.spec = replace(record.spec, digest="")
            self._on_change()

    async def _release(self, pool: PoolRecord, record: ReplicaRecord) -> None:
        record.prepared = record.progress = None
        try:
            await self._preparer.release(record.id)
        except Exception as error:  # noqa: BLE001 -- what is held for it ends with this process
            self._errors.add(f"release of {pool.pool.name}", error)

    async def _start(self, pool: PoolRecord, record: ReplicaRecord) -> None:
        try:
            async with asyncio.timeout(self.settings.call_timeout_s):
                spec = record.prepared or record.spec
                await record.backend.start(replace(spec, gpus=gpus_of(record.devices)))
        except NoCapacity as error:
            record.no_capacity, record.devices = True, ()
            record.not_before_s = self._clock() + self.settings.backoff_initial_s
            self.apply(pool, record, Event.NO_CAPACITY, str(error))
        except Exception as error:  # noqa: BLE001 -- whatever it is, the start has failed
            record.error = self._errors.add(f"start of {pool.pool.name}", error)
            self.apply(pool, record, Event.START_FAILED, record.error)
        else:
            record.launched = True
            record.no_capacity = False
            record.error = None
            self.spawn(self._watch(pool, record), f"{record.id}-watch")

    async def _stop(self, pool: PoolRecord, record: ReplicaRecord) -> None:
        grace_s = self.settings.terminate_s
        try:
            async with asyncio.timeout(grace_s + self.settings.call_timeout_s):
                await record.backend.stop(record.id, grace_s=grace_s)
        except Exception as error:  # noqa: BLE001 -- whatever it is, the stop is tried again
            record.stop_failures += 1
            text = self._errors.add(f"stop of {pool.pool.name}", error)
            self.apply(pool, record, Event.STOP_FAILED, text)
        else:
            record.ended = True
            self.apply(pool, record, Event.ENDED)
            await self._release(pool, record)

    async def _stop_later(self, pool: PoolRecord, record: ReplicaRecord) -> None:
        await self._sleep(self.backoff_s(record.stop_failures))
        await self._stop(pool, record)

    async def _put_to_sleep(self, pool: PoolRecord, record: ReplicaRecord) -> None:
        try:
            timeout_s, url = self.settings.call_timeout_s, record.probe.url or ""
            async with asyncio.timeout(timeout_s):
                engine, level = engine_of(record.spec.pool.engine), record.sleep_level
                await engine.sleep(self._engine_client, url, level, timeout_s=timeout_s)
        except Exception as error:  # noqa: BLE001 -- whatever it is, the replica is still awake
            text = self._errors.add(f"sleep of {pool.pool.name}", error)
            unsupported = isinstance(error, EngineUnsupported)
            record.sleep_error = (Unsupported if unsupported else BackendError)(text)
            pool.sleep_requested = False
            again_s = self._clock() + self.settings.backoff_max_s
            pool.tiers.exclude(Tier.SLEEPING, text, None if unsupported else again_s)
            self.apply(pool, record, Event.SLEEP_FAILED, text)
        else:
            self.apply(pool, record, Event.SLEPT)

    async def _wake(self, pool: PoolRecord, record: ReplicaRecord) -> None:
        try:
            timeout_s, url = self.settings.call_timeout_s, record.probe.url or ""
            async with asyncio.timeout(timeout_s):
                engine, level = engine_of(record.spec.pool.engine), record.sleep_level
                await engine.wake(self._engine_client, url, level, timeout_s=timeout_s)
        except Exception as error:  # noqa: BLE001 -- whatever it is, another must be started
            record.error = self._errors.add(f"wake of {pool.pool.name}", error)
            self.apply(pool, record, Event.WAKE_FAILED, record.error)
        else:
            self.apply(pool, record, Event.WOKEN)

    async def _watch(self, pool: PoolRecord, record: ReplicaRecord) -> None:
        """Probe a replica again and again, until it ends."""
        self._watched += 1
        try:
            while record.state in PROBED_STATES:
                self._take_probe(pool, record, await self._probe(pool, record))
                often_s = self._watched / MAX_PROBES_PER_S
                starting = record.state is State.STARTING
                await self._sleep(
                    self.settings.start_poll_s
                    if starting
                    else max(self.settings.health_interval_s, often_s)
                )
        finally:
            self._watched -= 1

    def probe_now(self, pool: PoolRecord, record: ReplicaRecord) -> None:
        """Probe a replica now, beside its health checks; at most one such probe at a time."""
        if record.state not in PROBED_STATES or record.id in self._probing:
            return
        self._probing.add(record.id)

        async def once() -> None:
            try:
                probe = await self._probe(pool, record)
                if record.state in PROBED_STATES:
                    self._take_probe(pool, record, probe)
            finally:
                self._probing.discard(record.id)

        self.spawn(once(), f"probe of {record.id}")

    async def _probe(self, pool: PoolRecord, record: ReplicaRecord) -> Probe:
        # A probe may be two requests, each with its own time limit; this bounds a backend's bug.
        try:
            async with asyncio.timeout(3 * self.settings.health_timeout_s + 1.0):
                return await record.backend.probe(record.id)
        except Exception as error:  # noqa: BLE001 -- what could not be seen is unknown
            self._errors.add(f"probe of {pool.pool.name}", error)
            return Probe()

    def _take_probe(self, pool: PoolRecord, record: ReplicaRecord, probe: Probe) -> None:
        """Apply what a probe showed. What is unknown has no consequence."""
        known = record.probe
        merged = replace(
            probe,
            url=probe.url or known.url,
            served_model=probe.served_model or known.served_model,
            listed=probe.listed or known.listed,
            max_model_len_tokens=probe.max_model_len_tokens or known.max_model_len_tokens,
            pid=probe.pid or known.pid,
            gpus=probe.gpus or known.gpus,
            cpus=probe.cpus or known.cpus,
            headers=probe.headers or known.headers,
            stream_usage=probe.stream_usage or known.stream_usage,
            pod=probe.pod or known.pod,
            node=probe.node or known.node,
        )
        record.probe = merged
        pool.reported_len_tokens = merged.max_model_len_tokens or pool.reported_len_tokens
        if merged != known:
            self._on_change()
        if probe.alive is False and record.backend.owns_replicas:
            self.apply(pool, record, Event.EXITED, probe.detail)
        elif probe.ready:
            record.health_failures = 0
            self._note_start(pool, probe)
            self.apply(pool, record, Event.BECAME_READY)
        elif probe.ready is False and record.state in {State.READY, State.UNHEALTHY}:
            record.health_failures += 1
            if record.state is State.UNHEALTHY:
                record.error = probe.detail
            elif probe.certain or record.health_failures >= self.settings.health_failures:
                self.apply(pool, record, Event.HEALTH_LOST, probe.detail)

    def _note_start(self, pool: PoolRecord, probe: Probe) -> None:
        """Remember how long a start took that something else asked for. Longer than one may take is
        none: it was ready before, and is again."""
        if probe.start_s is None or probe.start_s > pool.start_timeout_s:
            return
        if not probe.ran_before or pool.lead_s() is None:
            pool.tiers.record_wake(pool.start_tier(), probe.start_s)

    def apply_time_limits(
        self, pool: PoolRecord, loads: Mapping[str, ReplicaLoad], now_s: float
    ) -> None:
        """Apply the time limits that replicas of a pool have reached."""
        for record in list(pool.replicas.values()):
            # An externally managed server that is drained by hand stays so until it is taken back.
            owned = record.backend.owns_replicas
            if owned or pool.removed or pool.is_outdated(record):
                self._apply_time_limit(pool, record, loads.get(record.id), now_s)

    def _apply_time_limit(
        self, pool: PoolRecord, record: ReplicaRecord, load: ReplicaLoad | None, now_s: float
    ) -> None:
        in_state_s = now_s - record.since_s
        match record.state:
            case State.PREPARING if in_state_s >= pool.prepare_timeout_s:
                text = (
                    f"its model is not here after {pool.prepare_timeout_s:g} s "
                    f"(prepare_timeout_s); it was at: {describe_phase(record)}"
                )
                self.apply(pool, record, Event.TIMED_OUT, text)
            case State.STARTING if in_state_s >= pool.start_timeout_s:
                last = f"; it was at: {record.probe.phase}" if record.probe.phase else ""
                text = f"not ready after {pool.start_timeout_s:g} s (start_timeout_s){last}"
                self.apply(pool, record, Event.TIMED_OUT, text)
            case State.UNHEALTHY if in_state_s >= (
                pool.start_timeout_s if record.probe.starting else self.settings.unhealthy_restart_s
            ):
                text = f"unhealthy for {in_state_s:.0f} s: {record.error or 'no answer'}"
                self.apply(pool, record, Event.TIMED_OUT, text)
            case State.DRAINING | State.DRAINING_TO_SLEEP if self._is_drained(record, load, now_s):
                self.apply(pool, record, Event.DRAINED)
            case State.DRAINING if self._is_late(record, in_state_s):
                self.apply(pool, record, Event.DRAINED)
            case State.DRAINING_TO_SLEEP if self._is_late(record, in_state_s):
                # Sleep can be cancelled, so no answer is cut for it.
                text = f"{record.id} still has requests after {self.settings.drain_s:g} s (drain_s)"
                record.sleep_error = BackendError(text)
                pool.sleep_requested = False
                self.apply(pool, record, Event.KEEP)
            case State.READY if (
                in_state_s >= self.settings.backoff_reset_s and not pool.is_outdated(record)
            ):
                pool.failures, pool.retry_at_s, pool.error = 0, None, None
            case _:
                pass

    def _is_late(self, record: ReplicaRecord, in_state_s: float) -> bool:
        """Whether a drain takes too long. One that makes room for another pool has its time."""
        return in_state_s >= self.settings.drain_s and not record.makes_room

    def _is_drained(self, record: ReplicaRecord, load: ReplicaLoad | None, now_s: float) -> bool:
        """Whether a replica surely has no request left. Unknown is not none."""
        draining_s = 0.0 if record.drain_at_s is None else now_s - record.drain_at_s
        known = load is not None and load.inflight_requests == 0
        return known and draining_s >= self.settings.drain_settle_s

    def start_due(self, pool: PoolRecord, now_s: float) -> None:
        """Start what is due. While an engine keeps failing, one start at a time is enough."""
        for record in list(pool.replicas.values()):
            if record.state is not State.SCHEDULED or now_s < record.not_before_s:
                continue
            if not record.backend.owns_replicas:
                self.apply(pool, record, Event.FOUND)
                continue
            waiting = pool.retry_at_s is not None and now_s < pool.retry_at_s
            if pool.grants is not None and not record.devices:
                continue
            if pool.failures and (waiting or pool.count(State.PREPARING, State.STARTING)):
                continue
            self.apply(pool, record, Event.DUE)

    async def close(self) -> None:
        """Cancel all calls and probes that are still under way."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
