"""Between the control loop and the data path: pools and replicas get slots, counters become demand.

The data path counts by slot, in shared memory; the control loop speaks of pools and replicas by
name. This is the only place that knows both. A replica's slot is given to another only when no
worker counts anything on it any more, so a late answer is never counted for another replica; a
pool's only when every worker has applied a fleet without the pool, which clears its counters.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec

from autoscaler.types import Observation, PoolDemand, ReplicaLoad
from gateway.admin.schema import RecentTraffic
from gateway.datapath import metrics
from gateway.datapath.shared import Shared, buckets_of
from router.types import Fleet, Pool, Replica

RECENT_S = 60.0
SAMPLE_S = 5.0
_STREAMS = range(metrics.TTFT + 1, metrics.TTFT + 2 * len(metrics.ENDPOINTS), 2)
_ERRORS = (metrics.ENGINE_ERROR, metrics.REJECTED)
_ENDS = (metrics.OK, metrics.CLIENT_ERROR, metrics.CANCELLED, *_ERRORS)


@dataclass(frozen=True, slots=True)
class _Sample:
    """A pool's counters at one moment: those of requests, and the buckets and sums of two
    histograms."""

    at_s: float
    counts: list[int]
    ttft: list[int]
    ttft_sum_s: float
    itl: list[int]
    itl_sum_s: float


class FleetBook:
    """The slots, and the newest fleet made from what the control loop published."""

    def __init__(self, shared: Shared, clock: Callable[[], float]) -> None:
        self._shared = shared
        self._clock = clock
        self._slots: dict[str, int] = {}
        self._retiring: set[int] = set()
        self._pool_slots: dict[str, int] = {}
        self._retiring_pools: dict[int, int] = {}
        """Slots of pools that are gone, with the first version of the fleet without them."""
        self._draining: dict[str, int] = {}
        """Pools that were removed, with the first version of the fleet that says so."""
        self._version = 0
        self._samples: dict[str, deque[_Sample]] = {}

    def publish(self, pools: Sequence[Pool]) -> Fleet:
        """The next fleet: the pools with their slots. Replicas and pools for which no slot is free
        are left out until one is."""
        self._version += 1
        self._forget({replica.id for pool in pools for replica in pool.replicas})
        self._forget_pools(pools)
        published = []
        for pool in pools:
            replicas = []
            for replica in pool.replicas:
                slot = self._slot(replica)
                if slot is not None:
                    replicas.append(msgspec.structs.replace(replica, slot=slot))
            slot = self._pool_slot(pool.name)
            if slot is not None:
                published.append(msgspec.structs.replace(pool, slot=slot, replicas=tuple(replicas)))
        return Fleet(version=self._version, pools=tuple(published))

    def pool_slots(self) -> dict[str, int]:
        """Where each pool counts, by name."""
        return dict(self._pool_slots)

    def replica_slots(self) -> dict[str, int]:
        """Where each replica is counted, by its id."""
        return dict(self._slots)

    def _slot(self, replica: Replica) -> int | None:
        slot = self._slots.get(replica.id)
        if slot is None:
            used = set(self._slots.values()) | self._retiring
            free = (index for index in range(self._shared.max_replicas) if index not in used)
            slot = next(free, None)
            if slot is not None:
                self._slots[replica.id] = slot
        return slot

    def _pool_slot(self, name: str) -> int | None:
        slot = self._pool_slots.get(name)
        if slot is None:
            used = set(self._pool_slots.values()) | set(self._retiring_pools)
            free = (index for index in range(self._shared.max_pools) if index not in used)
            slot = next(free, None)
            if slot is not None:
                self._pool_slots[name] = slot
        return slot

    def _forget(self, present: set[str]) -> None:
        for replica_id in [known for known in self._slots if known not in present]:
            self._retiring.add(self._slots.pop(replica_id))
        self._retiring = {
            slot for slot in self._retiring if self._shared.replica_total(slot) != (0, 0)
        }

    def _forget_pools(self, pools: Sequence[Pool]) -> None:
        applied = self._shared.applied()
        self._retiring_pools = {
            slot: version for slot, version in self._retiring_pools.items() if version > applied
        }
        present = {pool.name for pool in pools}
        for name in [known for known in self._pool_slots if known not in present]:
            self._retiring_pools[self._pool_slots.pop(name)] = self._version
        self._draining = {
            pool.name: self._draining.get(pool.name, self._version)
            for pool in pools
            if pool.draining
        }

    def observe(self) -> Observation:
        """Read the counters: demand per pool, load per replica."""
        now = self._clock()
        applied = self._shared.applied()
        self._sample(now)
        pools = {}
        for name, slot in self._pool_slots.items():
            if self._draining.get(name, 0) > applied:
                # A worker may still be giving it new requests: what it has is not known.
                pools[name] = PoolDemand(observed_at_s=now)
            else:
                pools[name] = self._demand(slot, now)
        replicas = {}
        for replica_id, slot in self._slots.items():
            requests, tokens = self._shared.replica_total(slot)
            replicas[replica_id] = ReplicaLoad(inflight_requests=requests, inflight_tokens=tokens)
        return Observation(pools=pools, replicas=replicas)

    def _demand(self, slot: int, now_s: float) -> PoolDemand:
        total = self._shared.pool_total
        return PoolDemand(
            observed_at_s=now_s,
            inflight_requests=total(slot, metrics.INFLIGHT_REQUESTS),
            inflight_tokens=total(slot, metrics.INFLIGHT_TOKENS),
            queued_requests=total(slot, metrics.QUEUED_REQUESTS),
            queued_tokens=total(slot, metrics.QUEUED_TOKENS),
            arrivals_total=total(slot, metrics.ARRIVALS),
            arrived_tokens_total=total(slot, metrics.ARRIVED_PROMPT_TOKENS)
            + total(slot, metrics.ARRIVED_OUTPUT_TOKENS),
        )

    def recent_traffic(self, pool: str) -> RecentTraffic | None:
        """What the pool answered in the last minute; ``None`` where it is too new to say."""
        samples, slot = self._samples.get(pool), self._pool_slots.get(pool)
        if not samples or slot is None:
            return None
        now, old = self._read(slot, self._clock()), samples[0]
        window_s = now.at_s - old.at_s
        if window_s < 1.0:
            return None

        def rate(*indexes: int) -> float:
            return round(sum(now.counts[i] - old.counts[i] for i in indexes) / window_s, 3)

        ttft, itl = _minus(now.ttft, old.ttft), _minus(now.itl, old.itl)
        ttft_count, itl_count = sum(ttft), sum(itl)
        return RecentTraffic(
            window_s=round(window_s, 3),
            requests_per_s=rate(*_ENDS),
            errors_per_s=rate(*_ERRORS),
            prompt_tokens_per_s=rate(metrics.PROMPT_TOKENS),
            generation_tokens_per_s=rate(metrics.OUTPUT_TOKENS),
            ttft_count=ttft_count,
            ttft_mean_s=_mean(now.ttft_sum_s - old.ttft_sum_s, ttft_count),
            ttft_p50_s=metrics.quantile(metrics.TTFT, ttft, 0.5),
            ttft_p95_s=metrics.quantile(metrics.TTFT, ttft, 0.95),
            itl_count=itl_count,
            itl_mean_s=_mean(now.itl_sum_s - old.itl_sum_s, itl_count),
            itl_p50_s=metrics.quantile(metrics.ITL, itl, 0.5),
            itl_p95_s=metrics.quantile(metrics.ITL, itl, 0.95),
        )

    def _sample(self, now_s: float) -> None:
        """Remember the counters of each pool, every few seconds, for as long as they are recent."""
        for gone in self._samples.keys() - self._pool_slots.keys():
            del self._samples[gone]
        for name, slot in self._pool_slots.items():
            samples = self._samples.setdefault(name, deque())
            if not samples or now_s - samples[-1].at_s >= SAMPLE_S:
                samples.append(self._read(slot, now_s))
            while now_s - samples[0].at_s > RECENT_S + SAMPLE_S:
                samples.popleft()

    def _read(self, slot: int, now_s: float) -> _Sample:
        counts = self._shared.pool_totals(slot)
        streams = [counts[buckets_of(histogram)] for histogram in _STREAMS]
        return _Sample(
            at_s=now_s,
            counts=counts[: metrics.RESPONSE_BYTES],
            ttft=[sum(column) for column in zip(*streams, strict=True)],
            ttft_sum_s=sum(self._shared.pool_sum(slot, histogram) for histogram in _STREAMS),
            itl=counts[buckets_of(metrics.ITL)],
            itl_sum_s=self._shared.pool_sum(slot, metrics.ITL),
        )

    def check_integrity(self) -> None:
        """Raise ``AssertionError`` where a slot is given twice."""
        slots, pools = list(self._slots.values()), list(self._pool_slots.values())
        if len(set(slots)) != len(slots) or self._retiring & set(slots):
            raise AssertionError(f"a slot is used twice: {self._slots}, {self._retiring}")
        if len(set(pools)) != len(pools) or set(self._retiring_pools) & set(pools):
            raise AssertionError(f"a pool's slot is used twice: {self._pool_slots}")


def _mean(total: float, count: int) -> float | None:
    return total / count if count > 0 else None


def _minus(now: list[int], old: list[int]) -> list[int]:
    return [new - before for new, before in zip(now, old, strict=True)]
