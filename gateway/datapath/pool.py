"""One worker's picture of one pool: who is ready, who waits, what a request is likely to cost.

Requests that no replica can take now wait here, first in first out: at zero, while all replicas
are full, and while the only replica is suspect. The queue is bounded in count and bytes over all
workers (each reads the others' share of it from shared memory, so under simultaneous arrival it
may be exceeded by at most one request per other worker), and each wait has a deadline.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Final

from gateway.datapath import metrics
from gateway.datapath.answer import GATHER, HELD
from gateway.datapath.metrics import PoolCounters
from gateway.datapath.protocol.errors import ApiError, Reason
from gateway.datapath.upstream import Upstream
from router.pick import pick
from router.tokens import TokenEstimator
from router.types import Pool, Replica, ReplicaState
from router.view import ReplicaView

if TYPE_CHECKING:
    from gateway.datapath.exchange import Exchange
    from gateway.datapath.worker import Worker

# A replica that refused a fresh connection is left alone this long, doubling up to the maximum,
# unless the control side republishes it: it looks at the replica as soon as it is told.
_SUSPECT_S: Final = 0.5
_SUSPECT_MAX_S: Final = 8.0
_UNKNOWN_WAKE_S: Final = 30.0


class Target:
    """A published replica with this worker's connections to it."""

    __slots__ = ("failures", "served", "suspect_until_s", "upstream", "view")

    def __init__(self, view: ReplicaView, upstream: Upstream) -> None:
        self.view = view
        self.upstream = upstream
        self.served = view.replica.served_model
        self.failures = 0
        self.suspect_until_s = 0.0


class PoolRuntime:
    """See the module. ``apply`` brings in what the control side published."""

    def __init__(self, worker: Worker, pool: Pool) -> None:
        config = worker.config
        self.worker = worker
        self.pool = pool
        self.counters = PoolCounters(*worker.shared.pool_rows(config.index, pool.slot))
        self.estimator = self._new_estimator()
        self.targets: dict[str, Target] = {}
        self.ready: list[ReplicaView] = []
        self.queue: deque[Exchange] = deque()
        self._closed = False
        self._releasing = False

    def _new_estimator(self) -> TokenEstimator:
        config = self.worker.config
        return TokenEstimator(
            bytes_per_token=config.default_bytes_per_token,
            output_tokens=config.default_output_tokens,
            learning_rate=config.learning_rate,
        )

    def configure(self) -> None:
        """The worker's settings have changed. What was learned of tokens is learned again."""
        self.estimator = self._new_estimator()
        for target in self.targets.values():
            target.view = self._renewed(target.view, target.view.replica)
        self._renew_ready()
        self.release()

    # The fleet's side

    def apply(self, pool: Pool) -> None:
        """A new picture of the pool: keep the connections of replicas that stay."""
        self.pool = pool
        old = self.targets
        self.targets = {}
        for replica in pool.replicas:
            target = old.get(replica.id)
            if target is not None and self._same_endpoint(target, replica):
                del old[replica.id]
                if target.view.replica != replica:
                    target.view = self._renewed(target.view, replica)
                target.served = replica.served_model
                target.suspect_until_s = 0.0
            else:
                view = self._new_view(replica)
                target = Target(view, Upstream(self.worker, replica.url, replica.headers))
            self.targets[replica.id] = target
        for gone in old.values():
            gone.upstream.close()
        self._renew_ready()
        self.release()

    @staticmethod
    def _same_endpoint(target: Target, replica: Replica) -> bool:
        old = target.view.replica
        return (old.url, old.headers, old.slot) == (replica.url, replica.headers, replica.slot)

    def _renewed(self, view: ReplicaView, replica: Replica) -> ReplicaView:
        renewed = self._new_view(replica)
        if view.replica.state is ReplicaState.READY and replica.state is ReplicaState.READY:
            renewed.window = min(view.window, renewed.max_inflight_requests)
        return renewed

    def _new_view(self, replica: Replica) -> ReplicaView:
        config = self.worker.config
        return ReplicaView(
            replica,
            initial_window=config.release_initial,
            max_inflight_requests=config.max_inflight_requests,
            max_inflight_tokens=config.max_inflight_tokens,
        )

    def _renew_ready(self) -> None:
        now = self.worker.loop.time()
        self.ready = [
            target.view
            for target in self.targets.values()
            if target.view.replica.state is ReplicaState.READY and target.suspect_until_s <= now
        ]

    def failing(self, target: Target, *, suspect: bool) -> None:
        """A replica failed a request. Suspect: give it nothing for a moment."""
        target.view.failed(self.worker.config.release_initial)
        if suspect:
            pause_s = min(_SUSPECT_S * 2**target.failures, _SUSPECT_MAX_S)
            if pause_s < _SUSPECT_MAX_S:
                target.failures += 1
            target.suspect_until_s = self.worker.loop.time() + pause_s
            self._renew_ready()
        self.worker.report_failing(target.view.replica.id)

    # A request's side

    def dispatch(self, exchange: Exchange) -> None:
        """Send a request to a replica now, or hold it. Raises ``ApiError`` if it may do neither."""
        if self._closed:
            raise self.worker.unknown_model(exchange.model)
        if not self.queue:
            target = self._pick(exchange)
            if target is not None:
                exchange.send(target)
                return
        self._hold(exchange)

    def _pick(self, exchange: Exchange) -> Target | None:
        worker = self.worker
        ledger = worker.ledger
        if ledger.shared:
            worker.refresh_ledger()
        view = pick(self.ready, exchange, ledger, worker.random)
        return None if view is None else self.targets[view.replica.id]

    # Holding

    def retry_after_s(self) -> float:
        """When it makes sense to come back: the measured wake time, or a guess without one."""
        return _UNKNOWN_WAKE_S if self.pool.wake_eta_s is None else max(1.0, self.pool.wake_eta_s)

    def _hold(self, exchange: Exchange) -> None:
        worker, config = self.worker, self.worker.config
        if worker.orphaned:
            raise self._nobody_wakes()
        shared, slot = worker.shared, self.pool.slot
        self.counters.flush()  # so that the totals hold our own share as it is now
        held = shared.pool_total(slot, metrics.QUEUED_REQUESTS)
        held_bytes = shared.pool_total(slot, metrics.QUEUED_BYTES)
        size = exchange.head.content_length or exchange.body_bytes
        if held >= config.hold_max_requests or held_bytes + size > config.hold_max_bytes:
            raise ApiError(
                429,
                Reason.HOLD_QUEUE_FULL,
                f"The model '{exchange.model}' is not ready, and as many requests as are held "
                f"already wait for it ({held}).",
                retry_after_s=self.retry_after_s(),
            )
        exchange.exclude = frozenset()
        exchange.state = HELD
        now = worker.loop.time()
        if exchange.held_s is None:
            exchange.held_s = now
            exchange.comment_s = now
            self.counters.integers[metrics.HELD] += 1
            self.queue.append(exchange)
        else:  # its replica failed before it answered: it keeps its place in line
            self.queue.appendleft(exchange)
        exchange.held_bytes = size
        self._count_held(exchange, 1)
        self.counters.flush()  # before the control side is told to look
        worker.poke(self.pool.name)

    def _count_held(self, exchange: Exchange, sign: int) -> None:
        integers = self.counters.integers
        integers[metrics.QUEUED_REQUESTS] += sign
        integers[metrics.QUEUED_TOKENS] += sign * exchange.tokens
        integers[metrics.QUEUED_BYTES] += sign * exchange.held_bytes

    @staticmethod
    def _nobody_wakes() -> ApiError:
        return ApiError(
            503,
            Reason.DRAINING,
            "The gateway is ending and the model has no replica that can take the request.",
            retry_after_s=1.0,
        )

    def refuse_held(self) -> None:
        """Tell all who are held that they wait in vain."""
        for exchange in list(self.queue):
            exchange.reject(self._nobody_wakes())

    def unhold(self, exchange: Exchange) -> None:
        """A held request leaves the queue without being sent (cancelled, refused)."""
        try:
            self.queue.remove(exchange)
        except ValueError:
            return
        self._count_held(exchange, -1)

    def release(self) -> None:
        """Send held requests, oldest first, as long as some replica has room for the next."""
        if self._releasing:
            return
        self._releasing = True
        try:
            while self.queue and self.ready:
                exchange = self.queue[0]
                target = self._pick(exchange)
                if target is None:
                    break
                self.queue.popleft()
                self._count_held(exchange, -1)
                if exchange.held_s is not None:
                    waited_s = self.worker.loop.time() - exchange.held_s
                    self.counters.observe(metrics.HELD_TIME, waited_s)
                exchange.state = GATHER
                self.counters.dirty = True
                exchange.send(target)
        finally:
            self._releasing = False

    def tick(self, now: float) -> None:
        """Deadlines, keep-alive comments, suspects that may be tried again, other workers' room."""
        if self.counters.dirty:
            self.counters.flush()
        if any(target.suspect_until_s for target in self.targets.values()):
            for target in self.targets.values():
                if target.suspect_until_s and target.suspect_until_s <= now:
                    target.suspect_until_s = 0.0
            self._renew_ready()
        if not self.queue:
            return
        self.release()
        config = self.worker.config
        while self.queue and self._waited_s(self.queue[0], now) >= config.hold_deadline_s:
            self.queue[0].reject(
                ApiError(
                    503,
                    Reason.HOLD_DEADLINE,
                    f"The model '{self.queue[0].model}' did not become ready within "
                    f"{config.hold_deadline_s:g} s.",
                    retry_after_s=self.retry_after_s(),
                )
            )
        if config.hold_keepalive_s > 0:
            due = now - config.hold_keepalive_s
            for exchange in self.queue:
                if exchange.stream and exchange.comment_s <= due and not exchange.head.http10:
                    exchange.comment(self._progress(exchange, now), now)

    @staticmethod
    def _waited_s(exchange: Exchange, now: float) -> float:
        return 0.0 if exchange.held_s is None else now - exchange.held_s

    def _progress(self, exchange: Exchange, now: float) -> str:
        phase = self.pool.phase
        if not phase:
            states = sorted({target.view.replica.state.value for target in self.targets.values()})
            phase = ", ".join(states) or "at zero"
        eta = self.pool.wake_eta_s
        return (
            f"tidegate: waiting for {self.pool.name} ({phase}), "
            f"{self._waited_s(exchange, now):.0f} s"
            + ("" if eta is None else f" of about {eta:.0f} s")
        )

    def check_integrity(self) -> None:
        """Raise ``AssertionError`` where the counts and the queue disagree."""
        queued = self.counters.integers[metrics.QUEUED_REQUESTS]
        if queued != len(self.queue):
            raise AssertionError(f"{self.pool.name}: {queued} counted, {len(self.queue)} queued")

    def close(self) -> None:
        """The pool is gone from the fleet: give its slot back. The control side waits until
        nothing of it is left, so whatever is held here is refused."""
        self._closed = True
        for exchange in list(self.queue):
            exchange.reject(self.worker.unknown_model(exchange.model))
        for target in self.targets.values():
            target.upstream.close()
        self.worker.shared.clear_pool(self.worker.config.index, self.pool.slot)

    def __repr__(self) -> str:
        return (
            f"<pool {self.pool.name} ready={len(self.ready)}/{len(self.targets)} "
            f"queue={len(self.queue)}>"
        )
