"""One worker's view of one pool: ready replicas, held requests, the estimated cost of a request.

Requests that no replica can take now wait here, first in first out: at zero, while all replicas
are full, and while the only replica is suspect. The queue is bounded in count and bytes over all
workers (each reads the others' share of it from shared memory, so under simultaneous arrival it
may be exceeded by at most one request per other worker), and each wait has a deadline.

The workers' queues are one line: each worker publishes since when its first request waits, none
takes a place before another whose first waits longer, and one that leaves a place to another wakes
it. Else the worker that frees a place would always fill it again, and the others' clients starve.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from array import array
from collections import deque
from typing import Any, Final

from gateway.datapath import metrics
from gateway.datapath.context import WorkerContext
from gateway.datapath.metrics import PoolCounters
from gateway.datapath.protocol.errors import ApiError, Reason
from gateway.datapath.protocol.http1 import RequestHead
from gateway.datapath.upstream import Upstream, UpstreamRequest
from router.endpoint import Endpoint
from router.failures import RetryBudget, add_answer, add_fault, add_pressure, without_ejected
from router.filters import find_subset
from router.pick import pick
from router.request import RoutingRequest
from router.tokens import TokenEstimator
from router.types import Fleet, Pool, Replica, ReplicaState

# The states of a request, in the order in which it passes them; ``exchange`` draws them.
GATHER: Final = 0
HELD: Final = 1
CONNECT: Final = 2
SENT: Final = 3
ANSWER: Final = 4
DONE: Final = 5

# A replica that refused a fresh connection is given nothing for this long, doubling up to the
# maximum, unless the control side, which checks it at once, publishes it again.
_SUSPECT_S: Final = 0.5
_SUSPECT_MAX_S: Final = 8.0
_UNKNOWN_WAKE_S: Final = 30.0
# Of a full queue, so many requests give way to one.
_MOST_GIVE_WAY: Final = 8


class PooledRequest(UpstreamRequest, ABC):
    """A request as its pool dispatches and holds it. Times are the event loop's clock, in seconds;
    ``routing`` is there once its pool is known, ``body_bytes`` is what was received so far."""

    head: RequestHead
    state: int
    model: str
    stream: bool = False
    body_bytes: int = 0
    started_s: float
    routing: RoutingRequest
    held_s: float | None = None
    held_bytes: int = 0
    comment_s: float

    @property
    @abstractmethod
    def address(self) -> str:
        """Where its client is, without the port."""

    @abstractmethod
    def send(self, endpoint: UpstreamEndpoint) -> None:
        """Send it to the replica that was picked."""

    @abstractmethod
    def reject(self, error: ApiError) -> None:
        """Answer an error in the engine's place."""

    @abstractmethod
    def comment(self, text: str, now: float) -> None:
        """Write a keep-alive comment into its held stream."""


class UpstreamEndpoint(Endpoint):
    """An endpoint with this worker's connections to it. ``failures`` counts connections that were
    not taken in a row, ``suspect_until_s`` is until when it is given nothing because of them."""

    def __init__(self, context: WorkerContext, replica: Replica) -> None:
        limits = context.router
        super().__init__(
            replica,
            initial_window=context.gateway.holding.release_initial,
            max_inflight_requests=limits.max_inflight_requests,
            max_inflight_tokens=limits.max_inflight_tokens,
        )
        context.ledger.close_window(self.slot)  # of whichever replica had the slot before
        self.upstream = Upstream(context, replica.url, replica.headers)
        self._row: Any = context.shared.replica_counters(context.index, replica.slot)
        self._counts = [0] * metrics.REPLICA_INTEGERS
        self.publish_counters()  # the slot was another replica's
        self.served_model: str | None = replica.served_model
        self.names: frozenset[str] = frozenset(replica.names)
        self.failures = 0
        self.suspect_until_s: float = 0.0

    def count_first_token(self, wait_s: float) -> None:
        """The first byte of an answer has come, so long after the request was sent."""
        self._counts[metrics.REPLICA_FIRST_TOKENS] += 1
        self._counts[metrics.REPLICA_FIRST_TOKEN_US] += int(wait_s * 1e6)

    def count_answer(self, *, ok: bool) -> None:
        """An answer has ended."""
        self._counts[metrics.REPLICA_OK if ok else metrics.REPLICA_ERROR] += 1

    def publish_counters(self) -> None:
        """Copy what was counted into shared memory."""
        self._row[:] = array("q", self._counts)

    def publish(self, context: WorkerContext, replica: Replica) -> None:
        """The replica was published again, or the settings changed."""
        limits = context.router
        begins = self.update(
            replica,
            initial_window=context.gateway.holding.release_initial,
            max_inflight_requests=limits.max_inflight_requests,
            max_inflight_tokens=limits.max_inflight_tokens,
        )
        if begins:
            context.ledger.close_window(self.slot)
        self.served_model = replica.served_model
        self.names = frozenset(replica.names)

    def is_at(self, replica: Replica) -> bool:
        """Whether the replica still has this address, headers and slot."""
        old = self.replica
        return (old.url, old.headers, old.slot) == (replica.url, replica.headers, replica.slot)


class PoolRuntime:
    """See the module. ``apply`` brings in what the control side published."""

    def __init__(self, context: WorkerContext, pool: Pool) -> None:
        self.context = context
        self.pool = pool
        self.counters = PoolCounters(*context.shared.pool_rows(context.index, pool.slot))
        self.estimator = self._new_estimator()
        self.retries = RetryBudget(context.router.retry_fraction)
        self.endpoints: dict[str, UpstreamEndpoint] = {}
        self.ready: list[Endpoint] = []
        self.queue: deque[PooledRequest] = deque()
        self.uploads = 0
        """Requests that were given a place, or are held for one, before their bodies were whole."""
        self._longest_tokens = 0
        self._held_by: dict[str, list[int]] = {}
        """[requests, bytes] held, by the address of the client."""
        self._waiting: Any = context.shared.waiting_rows(pool.slot)
        self._waiting_since = 0
        self._failed_starts = pool.failed_starts
        self._closed = False
        self._releasing = False

    def _new_estimator(self) -> TokenEstimator:
        router = self.context.router
        return TokenEstimator(
            bytes_per_token=router.default_bytes_per_token,
            output_tokens=router.default_output_tokens,
            learning_rate=router.learning_rate,
        )

    def configure(self, *, learn_again: bool) -> None:
        """The worker's settings have changed. ``learn_again``: also those that what was learned of
        tokens began with."""
        if learn_again:
            self.estimator = self._new_estimator()
        self.retries.fraction = self.context.router.retry_fraction
        for endpoint in self.endpoints.values():
            endpoint.publish(self.context, endpoint.replica)
        self._renew_ready()
        self.release()

    # The fleet's side

    def apply(self, pool: Pool) -> None:
        """A new picture of the pool: keep the connections of replicas that stay."""
        self.pool = pool
        known = [one.max_model_len_tokens or 0 for one in pool.replicas]
        self._longest_tokens = max(known, default=0) or self._longest_tokens
        old = self.endpoints
        self.endpoints = {}
        for replica in pool.replicas:
            endpoint = old.get(replica.id)
            if endpoint is not None and endpoint.is_at(replica):
                del old[replica.id]
                endpoint.publish(self.context, replica)
                endpoint.suspect_until_s = 0.0
            else:
                endpoint = UpstreamEndpoint(self.context, replica)
            self.endpoints[replica.id] = endpoint
        for gone in old.values():
            gone.upstream.close()
        self._renew_ready()
        if pool.disabled:
            for request in list(self.queue):
                request.reject(out_of_service(request.model))
        self.release()
        before, self._failed_starts = self._failed_starts, pool.failed_starts
        if pool.failed_starts > max(before, 1) and not self.ready:
            # The first may have been bad luck. Who comes from now on waits for the next try.
            for request in list(self.queue):
                request.reject(self._engine_failed(request))

    def _renew_ready(self) -> None:
        now = self.context.now()
        reachable: list[Endpoint] = []
        for endpoint in self.endpoints.values():
            if endpoint.replica.state is ReplicaState.READY and endpoint.suspect_until_s <= now:
                reachable.append(endpoint)
        self.ready = without_ejected(reachable, now, self.context.router.max_ejected_fraction)
        self._publish_waiting()

    def unreachable(self, endpoint: UpstreamEndpoint) -> None:
        """A replica took no connection: give it nothing for a moment."""
        context = self.context
        context.ledger.close_window(endpoint.slot)
        pause_s = min(_SUSPECT_S * 2**endpoint.failures, _SUSPECT_MAX_S)
        if pause_s < _SUSPECT_MAX_S:
            endpoint.failures += 1
        endpoint.suspect_until_s = context.now() + pause_s
        self._renew_ready()
        context.report_failure(endpoint.id)

    def answered(self, endpoint: UpstreamEndpoint) -> None:
        """A replica answered a request well."""
        endpoint.failures = 0
        ledger = self.context.ledger
        if endpoint.initial_window + ledger.opened[endpoint.slot] < endpoint.max_inflight_requests:
            ledger.open_window(endpoint.slot)
        if endpoint.failure_rate > 0.0:
            add_answer(endpoint)

    def failed(self, endpoint: UpstreamEndpoint) -> None:
        """A replica failed a request, and it was not the request's fault, as far as is known."""
        router, now = self.context.router, self.context.now()
        self.context.ledger.close_window(endpoint.slot)
        if add_fault(endpoint, now, base_s=router.ejection_s, max_s=router.ejection_max_s):
            self.counters.integers[metrics.EJECTIONS] += 1
            self.counters.dirty = True
            self._renew_ready()

    def pressed(self, endpoint: UpstreamEndpoint) -> None:
        """A replica has too much to do: spare it for a moment."""
        add_pressure(endpoint, self.context.now())
        self._renew_ready()

    def pick_other(self, request: PooledRequest) -> UpstreamEndpoint | None:
        """Another replica for a request that was answered with an error, if one has room now and
        the budget of retries lasts."""
        endpoint = self._pick(request)
        return endpoint if endpoint is not None and self.retries.take() else None

    # A request's side

    def estimate(self, body_bytes: int, output_bound: int | None) -> tuple[int, int]:
        """Estimated (prompt tokens, prompt plus output tokens) of a body. No request costs an
        engine more than its longest context, as far as that is known: it refuses a longer one."""
        prompt_tokens, tokens = self.estimator.estimate(body_bytes, output_bound)
        if tokens > self._longest_tokens > 0:
            tokens = self._longest_tokens
            prompt_tokens = min(prompt_tokens, tokens)
        return prompt_tokens, tokens

    def may_stream(self, request: PooledRequest, now: float) -> bool:
        """Whether a request may have a place before its body is whole: while it comes fast enough,
        and for half of the places at most. Whole requests have the others, however many clients
        begin bodies that they do not end."""
        gateway, opened = self.context.gateway, self.context.ledger.opened
        places = gateway.holding.release_initial
        if self.ready:
            places = sum([endpoint.window(opened[endpoint.slot]) for endpoint in self.ready])
        most = places // (2 * self.context.shared.workers)
        took_s = now - request.started_s
        slowest = gateway.min_body_bytes_per_s
        return self.uploads < max(1, most) and request.body_bytes >= took_s * slowest

    def dispatch(self, request: PooledRequest) -> None:
        """Send a request to a replica now, or hold it. Raises ``ApiError`` if it may do neither."""
        if self._closed:
            raise unknown_model(request.model)
        if self.pool.disabled:
            raise out_of_service(request.model)
        if not self.queue and self._worker_before_us() < 0:
            endpoint = self._pick(request)
            if endpoint is not None:
                request.send(endpoint)
                return
        if request.routing.subset is not None:
            raise self._subset_unavailable(request.model, request.routing.subset)
        self._hold(request)

    def find_others(
        self, request: PooledRequest, endpoint: UpstreamEndpoint, most: int
    ) -> list[UpstreamEndpoint]:
        """The replicas that would be picked where ``endpoint`` does not take the request, and then
        where those do not, ``most`` at most."""
        routing, others = request.routing, list[UpstreamEndpoint]()
        before = routing.exclude
        other: UpstreamEndpoint | None = endpoint
        while other is not None and len(others) < most:
            routing.exclude = routing.exclude | {other.id}
            other = self._pick(request)
            if other is not None:
                others.append(other)
        routing.exclude = before
        return others

    def find_at(self, address: str) -> UpstreamEndpoint | None:
        """The replica at ``host:port``."""
        for endpoint in self.endpoints.values():
            if endpoint.address == address:
                return endpoint
        return None

    def _subset_unavailable(self, model: str, subset: frozenset[str]) -> ApiError:
        """Of the replicas that a request may go to, none takes it now. It is not held: while it
        waited for them, those behind it would wait for it."""
        if find_subset(self.ready, subset):
            return ApiError(
                429,
                Reason.SUBSET_FULL,
                f"The replicas of the model '{model}' that the proxy allows have no room now.",
                retry_after_s=1.0,
            )
        if not self.ready:
            self.context.send_wake_signal(self.pool.name)
        return ApiError(
            503,
            Reason.SUBSET_UNAVAILABLE,
            f"None of the replicas of the model '{model}' that the proxy allows is ready.",
            retry_after_s=1.0 if self.ready else self.retry_after_s(),
        )

    def _pick(self, request: PooledRequest) -> UpstreamEndpoint | None:
        """The endpoint that takes the request, by ``DEFAULT_SCORERS`` of ``router.pick``."""
        context = self.context
        ledger = context.ledger
        if ledger.shared:
            context.refresh_ledger()
        picked = pick(self.ready, request.routing, ledger, context.random)
        assert picked is None or isinstance(picked, UpstreamEndpoint)
        return picked

    # Holding

    def retry_after_s(self) -> float:
        """When it makes sense to come back: the measured wake time, or a guess without one."""
        return _UNKNOWN_WAKE_S if self.pool.wake_eta_s is None else max(1.0, self.pool.wake_eta_s)

    def _hold(self, request: PooledRequest) -> None:
        context, holding = self.context, self.context.gateway.holding
        if context.is_orphaned:
            raise self._cannot_be_woken()
        shared, slot = context.shared, self.pool.slot
        self.counters.flush()  # so that the totals hold our own share as it is now
        size = request.body_bytes
        for _ in range(_MOST_GIVE_WAY):
            held = shared.pool_total(slot, metrics.QUEUED_REQUESTS)
            held_bytes = shared.pool_total(slot, metrics.QUEUED_BYTES)
            too_many = held >= holding.max_requests
            if not too_many and held_bytes + size <= holding.max_bytes:
                break
            heaviest = self._find_heaviest(request, by_bytes=not too_many)
            if heaviest is None:
                raise self._hold_queue_full(request, held)
            heaviest.reject(self._hold_queue_full(heaviest, held))
            self.counters.flush()
        else:
            raise self._hold_queue_full(request, held)
        request.routing.clear_exclude()
        request.state = HELD
        now = context.now()
        if request.held_s is None:
            request.held_s = now
            request.comment_s = now
            self.counters.integers[metrics.HELD] += 1
            self.queue.append(request)
        else:  # its replica failed before it answered: it keeps its place in line
            self.queue.appendleft(request)
        request.held_bytes = size
        self._count_held(request, 1)
        self._publish_waiting()
        self.counters.flush()  # before the control side reads them
        context.send_wake_signal(self.pool.name)

    def _hold_queue_full(self, request: PooledRequest, held: int) -> ApiError:
        return ApiError(
            429,
            Reason.HOLD_QUEUE_FULL,
            f"The model '{request.model}' is not ready, and as many requests as are held "
            f"already wait for it ({held}).",
            retry_after_s=self.retry_after_s(),
        )

    def _find_heaviest(self, request: PooledRequest, *, by_bytes: bool) -> PooledRequest | None:
        """The newest held request of the client that has most of the queue, where that is still
        more than the client of ``request`` has with it: in a full queue that one gives way. Else a
        single client could have the whole queue, and all others 429."""
        which = 1 if by_bytes else 0
        heaviest, most = "", 0
        for address, weights in self._held_by.items():
            if weights[which] > most:
                heaviest, most = address, weights[which]
        own = self._held_by.get(request.address)
        with_it = 0 if own is None else own[which]
        if request.state != HELD:
            with_it += request.body_bytes if by_bytes else 1
        if most <= with_it:
            return None
        for held in reversed(self.queue):
            if held.address == heaviest:
                return held
        return None

    def grow_held(self, request: PooledRequest, more_bytes: int) -> None:
        """More came of a held request's body. Raises ``ApiError`` where that is too much."""
        request.held_bytes += more_bytes
        self.counters.integers[metrics.QUEUED_BYTES] += more_bytes
        self._held_by[request.address][1] += more_bytes
        total, slot = self.context.shared.pool_total, self.pool.slot
        most_bytes = self.context.gateway.holding.max_bytes
        for _ in range(_MOST_GIVE_WAY):
            self.counters.flush()
            if total(slot, metrics.QUEUED_BYTES) <= most_bytes:
                return
            held = total(slot, metrics.QUEUED_REQUESTS)
            heaviest = self._find_heaviest(request, by_bytes=True)
            if heaviest is None:
                raise self._hold_queue_full(request, held)
            heaviest.reject(self._hold_queue_full(heaviest, held))

    def _count_held(self, request: PooledRequest, sign: int) -> None:
        integers = self.counters.integers
        integers[metrics.QUEUED_REQUESTS] += sign
        integers[metrics.QUEUED_TOKENS] += sign * request.routing.tokens
        integers[metrics.QUEUED_BYTES] += sign * request.held_bytes
        address = request.address
        weights = self._held_by.get(address)
        if weights is None:
            self._held_by[address] = weights = [0, 0]
        weights[0] += sign
        weights[1] += sign * request.held_bytes
        if weights[0] == 0:
            del self._held_by[address]

    @staticmethod
    def _cannot_be_woken() -> ApiError:
        return ApiError(
            503,
            Reason.DRAINING,
            "The gateway is ending and the model has no replica that can take the request.",
            retry_after_s=1.0,
        )

    def _engine_failed(self, request: PooledRequest) -> ApiError:
        return ApiError(
            503,
            Reason.ENGINE_FAILED,
            f"The model '{request.model}' does not start: its engine failed "
            f"{self.pool.failed_starts} times in a row, at last with: {self.pool.cause}",
            retry_after_s=self.retry_after_s(),
        )

    def refuse_held(self) -> None:
        """Refuse the held requests: no replica will be woken for them."""
        for request in list(self.queue):
            request.reject(self._cannot_be_woken())

    def unhold(self, request: PooledRequest) -> None:
        """A held request leaves the queue without being sent (cancelled, refused)."""
        try:
            self.queue.remove(request)
        except ValueError:
            return
        self._count_held(request, -1)
        self._publish_waiting()

    def _publish_waiting(self) -> None:
        """Say since when the first request waits here, if a replica may be able to take it."""
        if not self.context.ledger.shared:
            return
        since_us = 0
        if self.queue and self.ready:
            since_s = self.queue[0].held_s
            since_us = 1 if since_s is None else max(1, int(since_s * 1e6))
        if since_us != self._waiting_since:
            self._waiting_since = since_us
            self._waiting[self.context.index] = since_us

    def _worker_before_us(self) -> int:
        """The worker whose first held request has waited longest, and longer than ours; -1 where it
        is our turn."""
        context = self.context
        if not context.ledger.shared:
            return -1
        first, earliest = -1, self._waiting_since
        waiting: list[int] = self._waiting.tolist()
        for worker, since in enumerate(waiting):
            if (
                since > 0
                and (earliest == 0 or since < earliest)
                and worker != context.index
                and context.responds(worker)
            ):
                first, earliest = worker, since
        return first

    def release(self) -> None:
        """Send held requests, oldest first, as long as some replica has room for the next."""
        if self._releasing:
            return
        self._releasing = True
        try:
            while self.ready:
                before = self._worker_before_us()
                if before >= 0:
                    self.context.nudge(before)
                    break
                if not self.queue:
                    break
                request = self.queue[0]
                endpoint = self._pick(request)
                if endpoint is None:
                    break
                self.queue.popleft()
                self._count_held(request, -1)
                self._publish_waiting()
                if request.held_s is not None:
                    waited_s = self.context.now() - request.held_s
                    self.counters.observe(metrics.HELD_TIME, waited_s)
                request.state = GATHER
                self.counters.dirty = True
                request.send(endpoint)
        finally:
            self._releasing = False

    def tick(self, now: float) -> None:
        """Deadlines, keep-alive comments, suspects that may be tried again, other workers' room."""
        integers = self.counters.integers
        since_ms = int((self.queue[0].held_s or 0.0) * 1000) if self.queue else 0
        if since_ms != integers[metrics.HELD_SINCE]:
            integers[metrics.HELD_SINCE] = since_ms
            self.counters.dirty = True
        if self.counters.dirty:
            self.counters.flush()
            for endpoint in self.endpoints.values():
                endpoint.publish_counters()
        if len(self.ready) < len(self.endpoints):
            self._renew_ready()  # those whose time is over may be tried again
        if not self.queue:
            return
        self.release()
        holding = self.context.gateway.holding
        while self.queue and self._waited_s(self.queue[0], now) >= holding.deadline_s:
            self.queue[0].reject(
                ApiError(
                    503,
                    Reason.HOLD_DEADLINE,
                    f"The model '{self.queue[0].model}' did not become ready within "
                    f"{holding.deadline_s:g} s."
                    + (f" Its engine failed: {self.pool.cause}" if self.pool.cause else ""),
                    retry_after_s=self.retry_after_s(),
                )
            )
        if holding.keepalive_s > 0:
            due = now - holding.keepalive_s
            for request in self.queue:
                if request.stream and request.comment_s <= due and not request.head.http10:
                    request.comment(self._progress(request, now), now)

    @staticmethod
    def _waited_s(request: PooledRequest, now: float) -> float:
        return 0.0 if request.held_s is None else now - request.held_s

    def _progress(self, request: PooledRequest, now: float) -> str:
        phase = self.pool.phase
        if not phase:
            states = sorted({endpoint.replica.state.value for endpoint in self.endpoints.values()})
            phase = ", ".join(states) or "at zero"
        eta = self.pool.wake_eta_s
        return (
            f"tidegate: waiting for {self.pool.name} ({phase}), "
            f"{self._waited_s(request, now):.0f} s"
            + ("" if eta is None else f" of about {eta:.0f} s")
        )

    def check_integrity(self) -> None:
        """Raise ``AssertionError`` where the counts and the queue disagree."""
        queued = self.counters.integers[metrics.QUEUED_REQUESTS]
        if queued != len(self.queue):
            raise AssertionError(f"{self.pool.name}: {queued} counted, {len(self.queue)} queued")
        by_client = [sum(one) for one in zip(*self._held_by.values(), strict=True)] or [0, 0]
        if by_client != [queued, self.counters.integers[metrics.QUEUED_BYTES]]:
            raise AssertionError(f"{self.pool.name}: clients have {by_client} of {queued} held")
        if not 0 <= self.uploads <= queued + self.counters.integers[metrics.INFLIGHT_REQUESTS]:
            raise AssertionError(f"{self.pool.name}: {self.uploads} bodies that are not whole")

    def close(self) -> None:
        """The pool is gone from the fleet: give its slot back. The control side waits until
        nothing of it is left, so whatever is held here is refused."""
        self._closed = True
        self.ready = []
        for request in list(self.queue):
            request.reject(unknown_model(request.model))
        for endpoint in self.endpoints.values():
            endpoint.upstream.close()
        self.context.shared.clear_pool(self.context.index, self.pool.slot)

    def __repr__(self) -> str:
        return (
            f"<pool {self.pool.name} ready={len(self.ready)}/{len(self.endpoints)} "
            f"queue={len(self.queue)}>"
        )


def unknown_model(model: str) -> ApiError:
    """404 for a name that no pool has; a model at zero is not unknown."""
    return ApiError(
        404,
        Reason.MODEL_UNKNOWN,
        f"The model '{model[:200]}' does not exist here. GET /v1/models lists those that do.",
        param="model",
    )


def out_of_service(model: str) -> ApiError:
    """503 for a model whose pool is disabled."""
    return ApiError(
        503,
        Reason.MODEL_DISABLED,
        f"The model '{model[:200]}' is out of service: an operator has disabled it.",
        retry_after_s=60.0,
        param="model",
    )


class PoolDirectory:
    """The pools of this worker by name, as the control side last published them."""

    def __init__(self, context: WorkerContext) -> None:
        self._context = context
        self._version = -1
        self.by_name: dict[str, PoolRuntime] = {}
        self._names: dict[str, PoolRuntime] = {}

    def apply(self, fleet: Fleet) -> None:
        """Take a new picture of the fleet. One that is not newer than the last is ignored."""
        if fleet.version <= self._version:
            return
        if self._version < 0:
            self._clear_free_slots(fleet)
        self._version = fleet.version
        slots = [replica.slot for pool in fleet.pools for replica in pool.replicas]
        self._context.replica_slots = 1 + max(slots, default=-1)
        old = self.by_name
        self.by_name = {}
        self._names = {}
        for pool in fleet.pools:
            runtime = old.get(pool.name)
            if runtime is not None and runtime.pool.slot == pool.slot:
                del old[pool.name]
            else:
                runtime = PoolRuntime(self._context, pool)
            self.by_name[pool.name] = runtime
            if not pool.draining:
                for name in (pool.name, *pool.aliases, *pool.adapters):
                    self._names[name] = runtime
        for gone in old.values():
            gone.close()
        for pool in fleet.pools:
            self.by_name[pool.name].apply(pool)
        for runtime in self.by_name.values():
            runtime.counters.flush()  # a reader of the version reads what was counted until now
        self._context.shared.set_applied(self._context.index, fleet.version)

    def _clear_free_slots(self, fleet: Fleet) -> None:
        """Zero the counters of pools that were removed after the worker before this one ended."""
        taken = {pool.slot for pool in fleet.pools}
        for slot in range(self._context.shared.max_pools):
            if slot not in taken:
                self._context.shared.clear_pool(self._context.index, slot)

    def configure(self, *, learn_again: bool) -> None:
        """The worker's settings have changed; see ``PoolRuntime.configure``."""
        for runtime in self.by_name.values():
            runtime.configure(learn_again=learn_again)

    def find(self, model: str) -> PoolRuntime:
        """The pool that a model name or alias stands for. Raises ``ApiError`` 404."""
        runtime = self._names.get(model)
        if runtime is None:
            raise unknown_model(model)
        return runtime

    def models(self) -> list[tuple[str, Pool]]:
        """All names clients may use, with the pool that each stands for."""
        return [
            (name, runtime.pool)
            for name, runtime in self._names.items()
            if not runtime.pool.disabled
        ]
