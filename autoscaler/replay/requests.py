"""A trace of requests played one by one, each placed by the real ``router.pick``.

Every replica has a queue of prefills and a batch that decodes, by the same ``ReplicaModel`` as the
fluid: while it prefills, engine time is shared with decode. The gateway holds what no replica has
room for, first come first served, with the same windows of fresh replicas as the data path
(``router.endpoint``). Replicas start, drain and cost as in the fluid (``supply``), second by
second; what happens within a second is exact.
"""

from __future__ import annotations

import heapq
import math
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from autoscaler.replay.engine import ReplicaModel, Slo
from autoscaler.replay.fleet import LATENCY_S, UTILIZATION_S, p90
from autoscaler.replay.score import Minutes, Score, WaitQuantiles
from autoscaler.replay.supply import Starts, Supply
from autoscaler.replay.traces import RequestTrace
from autoscaler.replay.types import PoolObservation, ScalingPolicy
from router.endpoint import Endpoint
from router.ledger import Ledger
from router.pick import pick
from router.request import RoutingRequest
from router.types import Replica, ReplicaState

INITIAL_WINDOW = 8
"""Requests that a fresh replica is given at once; the data path's default."""


@dataclass(slots=True, kw_only=True)
class PlayedRequest:
    """One request. Times are seconds since the beginning, 0 while they have not come."""

    at_s: float
    prompt_tokens: float
    output_tokens: float
    routed: RoutingRequest
    first_s: float = 0.0
    done_s: float = 0.0
    late: bool = False


class PlayedReplica:
    """One replica: prefills one after the other, and a batch of one pace."""

    def __init__(self, slot: int, engine: ReplicaModel, now_s: float) -> None:
        published = Replica(id=str(slot), pool="", slot=slot, url="", state=ReplicaState.READY)
        self.endpoint = Endpoint(
            published,
            initial_window=INITIAL_WINDOW,
            max_inflight_requests=engine.max_running_requests,
            max_inflight_tokens=None,
        )
        self.slot = slot
        self.engine = engine
        self.draining = False
        self.version = 0
        self.at_s = now_s
        self.prefills: deque[PlayedRequest] = deque()
        self.left_tokens = 0.0
        """Of the first prefill."""
        self.clock = 0.0
        self.running: list[tuple[float, int, PlayedRequest]] = []
        self.held_tokens = 0.0
        self._order = 0

    @property
    def empty(self) -> bool:
        """It has nothing left to do."""
        return not self.prefills and not self.running

    def add(self, request: PlayedRequest) -> None:
        """One more request."""
        self.prefills.append(request)
        if len(self.prefills) == 1:
            self.left_tokens = request.prompt_tokens

    def advance(self, now_s: float) -> None:
        """Time passes, in which no prefill and no answer ends."""
        passed_s = now_s - self.at_s
        self.at_s = now_s
        if passed_s <= 0.0:
            return
        step_s, rate = self._pace()
        if rate:
            self.left_tokens = max(0.0, self.left_tokens - passed_s * rate)
        if self.running:
            self.clock += passed_s / step_s

    def next_s(self) -> float:
        """When the next prefill or answer ends, if nothing comes in between."""
        step_s, rate = self._pace()
        soonest = math.inf
        if rate:
            soonest = self.at_s + self.left_tokens / rate
        if self.running:
            soonest = min(soonest, self.at_s + max(0.0, self.running[0][0] - self.clock) * step_s)
        return soonest

    def _pace(self) -> tuple[float, float]:
        """The ITL now, and the prompt tokens per second: none while the cache has no place for the
        first prefill."""
        engine = self.engine
        batch = len(self.running)
        itl_s = engine.itl_base_s + engine.itl_slope_s * batch if batch else 0.0
        if not self.prefills or (batch and not self._has_place(self.prefills[0])):
            return itl_s or 1.0, 0.0
        chunk = min(engine.chunk_tokens, max(1.0, self.prefills[0].prompt_tokens))
        chunk_s = chunk / engine.prefill_tokens_per_s
        share = chunk_s / (itl_s + chunk_s)
        return itl_s + chunk_s, engine.prefill_tokens_per_s * share

    def _has_place(self, request: PlayedRequest) -> bool:
        needs = request.prompt_tokens + request.output_tokens / 2
        return self.held_tokens + needs <= self.engine.kv_tokens

    def begin_decode(self) -> PlayedRequest:
        """The first prefill is done."""
        request = self.prefills.popleft()
        if self.prefills:
            self.left_tokens = self.prefills[0].prompt_tokens
        self._order += 1
        heapq.heappush(self.running, (self.clock + request.output_tokens, self._order, request))
        self.held_tokens += request.prompt_tokens + request.output_tokens / 2
        return request

    def finish(self) -> PlayedRequest:
        """The answer that is next has all its tokens."""
        _, _, request = heapq.heappop(self.running)
        self.held_tokens -= request.prompt_tokens + request.output_tokens / 2
        return request


class RequestPool:
    """A pool of such replicas, and the gateway's queue before them."""

    def __init__(
        self,
        trace: RequestTrace,
        engine: ReplicaModel,
        slo: Slo,
        starts: Starts,
        *,
        ready: int,
        max_replicas: int,
        scored_from_s: float,
        seed: int,
    ) -> None:
        self.engine, self.slo = engine, slo
        self.supply = Supply(starts, ready, 0.0)
        self.now_s = 0.0
        self.scored_from_s = scored_from_s
        self.arrivals = self.answered = 0
        self.arrived_tokens = self.work_arrived_s = 0.0
        self.violations = 0
        self.scored_requests = 0
        self.violated: set[int] = set()
        self.waits = WaitQuantiles()
        self.longest_wait_s = 0.0
        self.queue: deque[PlayedRequest] = deque()
        self.queued_tokens = self.inflight_tokens = 0.0
        self.on_answer: Callable[[PlayedRequest], None] | None = None
        self._trace = trace
        self._next = 0
        # A slot is used again only when its replica is empty, so draining ones need more.
        slots = 4 * max_replicas + ready
        self._ledger = Ledger([0] * slots, [0] * slots, [0] * slots)
        self._free = list(range(slots))
        heapq.heapify(self._free)
        self._replicas: dict[int, PlayedReplica] = {}
        self._endpoints: list[Endpoint] = []
        self._events: list[tuple[float, int, int]] = []
        self._random = random.Random(seed)
        self._busy_s = [0.0] * UTILIZATION_S
        self._offered_s = [0.0] * UTILIZATION_S
        self._latencies: deque[tuple[float, float, float]] = deque()
        for _ in range(ready):
            self._add_replica()

    @property
    def inflight(self) -> int:
        """Requests with replicas."""
        return self.arrivals - self.answered - len(self.queue)

    def scale(self, desired: int) -> None:
        """Have this many replicas; the least loaded drain."""
        for _ in range(self.supply.scale(desired, self.now_s)):
            endpoint = min(self._endpoints, key=lambda one: self._ledger.tokens[one.slot])
            self._endpoints.remove(endpoint)
            replica = self._replicas[endpoint.slot]
            replica.draining = True
            if replica.empty:
                self._remove(replica)

    def observe(self) -> PoolObservation:
        """What a policy sees."""
        while self._latencies and self._latencies[0][0] < self.now_s - LATENCY_S:
            self._latencies.popleft()
        offered_s = sum(self._offered_s)
        return PoolObservation(
            ready=self.supply.ready,
            starting=self.supply.starting,
            arrivals_total=float(self.arrivals),
            arrived_tokens_total=self.arrived_tokens,
            queued_requests=float(len(self.queue)),
            queued_tokens=self.queued_tokens,
            inflight_requests=float(self.inflight),
            inflight_tokens=self.inflight_tokens,
            utilization=min(1.0, sum(self._busy_s) / offered_s) if offered_s else None,
            ttft_s=p90([ttft_s for _, ttft_s, _ in self._latencies]),
            itl_s=p90([itl_s for _, _, itl_s in self._latencies]),
        )

    def advance(self) -> None:
        """One second passes."""
        second = round(self.now_s)
        slot = second % UTILIZATION_S
        for _ in range(self.supply.begin(self.now_s)):
            self._add_replica()
        self._busy_s[slot] = 0.0
        self._offered_s[slot] = float(self.supply.ready)
        self._dispatch()
        at_s, count = self._trace.at_s, len(self._trace.at_s)
        until_s = self.now_s + 1.0
        while True:
            arrival_s = at_s[self._next] if self._next < count else math.inf
            event_s = self._events[0][0] if self._events else math.inf
            if min(arrival_s, event_s) >= until_s:
                break
            if event_s <= arrival_s:
                self._happen()
            else:
                self.now_s = float(arrival_s)
                self._arrive()
        self.now_s = until_s
        self.supply.end()

    def close(self) -> None:
        """The trace is over: what has waited too long is hurt."""
        for request in self.queue:
            if self.now_s - request.at_s > self.slo.ttft_s:
                self._violate(request)

    def check_integrity(self) -> None:
        """Raise where a request was lost, or the ledger differs from what replicas have."""
        self._ledger.check_integrity()
        with_replicas = sum(len(one.prefills) + len(one.running) for one in self._replicas.values())
        assert with_replicas == self.inflight == sum(self._ledger.requests)
        assert len(self._replicas) == self.supply.ready + self.supply.draining

    def _add_replica(self) -> None:
        replica = PlayedReplica(heapq.heappop(self._free), self.engine, self.now_s)
        self._ledger.close_window(replica.slot)
        self._replicas[replica.slot] = replica
        self._endpoints.append(replica.endpoint)

    def _remove(self, replica: PlayedReplica) -> None:
        del self._replicas[replica.slot]
        heapq.heappush(self._free, replica.slot)
        self.supply.release(1)

    def _arrive(self) -> None:
        index = self._next
        self._next += 1
        prompt = float(self._trace.prompt_tokens[index])
        output = float(self._trace.output_tokens[index])
        request = PlayedRequest(
            at_s=float(self._trace.at_s[index]),
            prompt_tokens=prompt,
            output_tokens=output,
            routed=RoutingRequest(int(prompt), max(1, int(prompt + output))),
        )
        self.arrivals += 1
        self.arrived_tokens += prompt + output
        self.work_arrived_s += self.engine.work_s(prompt, output, self.slo)
        if request.at_s >= self.scored_from_s:
            self.scored_requests += 1
        self.queue.append(request)
        self.queued_tokens += prompt + output
        self._dispatch()

    def _dispatch(self) -> None:
        """Give out what is held, in order, as far as there is room."""
        while self.queue:
            request = self.queue[0]
            endpoint = pick(self._endpoints, request.routed, self._ledger, self._random.random)
            if endpoint is None:
                return
            self.queue.popleft()
            tokens = request.prompt_tokens + request.output_tokens
            self.queued_tokens -= tokens
            self.inflight_tokens += tokens
            self._ledger.reserve(endpoint.slot, request.routed.tokens)
            wait_s = self.now_s - request.at_s
            if request.at_s >= self.scored_from_s:
                self.waits.add(wait_s, 1.0)
                self.longest_wait_s = max(self.longest_wait_s, wait_s)
            work_s = self.engine.work_s(request.prompt_tokens, request.output_tokens, self.slo)
            self._busy_s[int(self.now_s) % UTILIZATION_S] += work_s
            replica = self._replicas[endpoint.slot]
            replica.advance(self.now_s)
            replica.add(request)
            self._expect(replica)

    def _expect(self, replica: PlayedReplica) -> None:
        replica.version += 1
        at_s = replica.next_s()
        if at_s < math.inf:
            heapq.heappush(self._events, (at_s, replica.slot, replica.version))

    def _happen(self) -> None:
        """The next prefill or answer of some replica ends, unless that has changed since."""
        at_s, slot, version = heapq.heappop(self._events)
        replica = self._replicas.get(slot)
        if replica is None or replica.version != version:
            return
        self.now_s = max(self.now_s, at_s)
        replica.advance(self.now_s)
        if replica.running and replica.running[0][0] <= replica.clock + 1e-9:
            self._answered(replica, replica.finish())
        elif replica.prefills and replica.left_tokens <= 1e-6:
            self._first_token(replica, replica.begin_decode())
        if replica.slot in self._replicas:
            self._expect(replica)
        self._dispatch()

    def _first_token(self, replica: PlayedReplica, request: PlayedRequest) -> None:
        request.first_s = self.now_s
        if request.first_s - request.at_s > self.slo.ttft_s:
            request.late = True
            self._violate(request)
        if not replica.draining:
            endpoint, opened = replica.endpoint, self._ledger.opened[replica.slot]
            if endpoint.initial_window + opened < endpoint.max_inflight_requests:
                self._ledger.open_window(replica.slot)

    def _answered(self, replica: PlayedReplica, request: PlayedRequest) -> None:
        self.answered += 1
        request.done_s = self.now_s
        if self.on_answer is not None:
            self.on_answer(request)
        self.inflight_tokens -= request.prompt_tokens + request.output_tokens
        self._ledger.settle(replica.slot, request.routed.tokens)
        itl_s = 0.0
        if request.output_tokens:
            itl_s = (self.now_s - request.first_s) / request.output_tokens
        if itl_s > self.slo.itl_s * (1 + 1e-9) and not request.late:
            self._violate(request)
        self._latencies.append((self.now_s, request.first_s - request.at_s, itl_s))
        if replica.draining and replica.empty:
            self._remove(replica)

    def _violate(self, request: PlayedRequest) -> None:
        if request.at_s >= self.scored_from_s:
            self.violations += 1
            self.violated.add(int(request.at_s))


def replay_requests(
    trace: RequestTrace,
    policy: ScalingPolicy,
    *,
    engine: ReplicaModel,
    slo: Slo,
    starts: Starts,
    ready: int,
    min_replicas: int = 1,
    max_replicas: int = 100,
    price_per_hour: float = 1.0,
    run_in_s: int = 0,
    seed: int = 0,
    progress: Callable[[float], None] | None = None,
) -> Score:
    """Play each request of ``trace`` with ``policy``, beginning with so many ``ready`` replicas,
    and score all but the first ``run_in_s``. The score's minutes are empty."""
    pool = RequestPool(
        trace,
        engine,
        slo,
        starts,
        ready=ready,
        max_replicas=max_replicas,
        scored_from_s=run_in_s,
        seed=seed,
    )
    supply = pool.supply
    seconds = int(trace.at_s[-1]) + 1
    next_s = paid_s = 0.0
    for second in range(seconds):
        if second == run_in_s:
            paid_s = supply.replica_s
        if second >= next_s or (pool.queue and not supply.ready + supply.starting):
            desired = policy.step((trace.start_s or 0.0) + second, pool.observe())
            pool.scale(max(min_replicas, min(max_replicas, desired)))
            if second >= next_s:
                next_s += policy.interval_s * max(1.0, (second - next_s) // policy.interval_s + 1)
        pool.advance()
        if progress is not None and second % 60 == 0:
            progress(second / seconds)
    pool.close()
    pool.check_integrity()
    replica_hours = (supply.replica_s - paid_s) / 3600
    return Score(
        policy=policy.name,
        trace=trace.name,
        requests=float(pool.scored_requests),
        violations=float(pool.violations),
        seconds=seconds - run_in_s,
        violated_s=len(pool.violated),
        replica_hours=replica_hours,
        cost=replica_hours * price_per_hour,
        wait_s={
            "p50": pool.waits.quantile(0.5),
            "p90": pool.waits.quantile(0.9),
            "p99": pool.waits.quantile(0.99),
            "max": pool.longest_wait_s,
        },
        started=supply.started,
        cancelled=supply.cancelled,
        minutes=Minutes(),
    )
