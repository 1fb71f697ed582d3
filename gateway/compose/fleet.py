"""Between the control loop and the data path: pools and replicas get slots, counters become demand.

The data path counts by slot, in shared memory; the control loop speaks of pools and replicas by
name. This is the only place that knows both. A replica's slot is given to another only when no
worker counts anything on it any more, so a late answer is never counted for another replica; a
pool's only when every worker has applied a fleet without the pool, which clears its counters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence, Set
from operator import add

import msgspec

from autoscaler.signals.series import PoolTotals
from autoscaler.types import HistogramCounts, Observation, PoolDemand, ReplicaLoad
from gateway.datapath import metrics
from gateway.datapath.shared import Shared, buckets_of
from router.types import Fleet, Pool

_STREAMS = range(metrics.TTFT + 1, metrics.TTFT + 2 * len(metrics.ENDPOINTS), 2)
_E2E = range(metrics.E2E, metrics.E2E + 2 * len(metrics.ENDPOINTS))
_ERRORS = (metrics.ENGINE_ERROR, metrics.REJECTED)
_ENDS = (metrics.OK, metrics.CLIENT_ERROR, metrics.CANCELLED, *_ERRORS)


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

    def publish(self, pools: Sequence[Pool]) -> Fleet:
        """The next fleet: the pools with their slots. Replicas and pools for which no slot is free
        are left out until one is."""
        self._version += 1
        self._forget({replica.id for pool in pools for replica in pool.replicas})
        self._forget_pools(pools)
        free = _free(self._shared.max_replicas, {*self._slots.values(), *self._retiring})
        free_pools = _free(
            self._shared.max_pools, {*self._pool_slots.values(), *self._retiring_pools}
        )
        published = []
        for pool in pools:
            replicas = []
            for replica in pool.replicas:
                slot = _find(self._slots, replica.id, free)
                if slot is not None:
                    replicas.append(msgspec.structs.replace(replica, slot=slot))
            slot = _find(self._pool_slots, pool.name, free_pools)
            if slot is not None:
                published.append(msgspec.structs.replace(pool, slot=slot, replicas=tuple(replicas)))
        return Fleet(version=self._version, pools=tuple(published))

    def pool_slots(self) -> dict[str, int]:
        """Where each pool counts, by name."""
        return dict(self._pool_slots)

    def replica_slots(self) -> dict[str, int]:
        """Where each replica is counted, by its id."""
        return dict(self._slots)

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
        pools = {}
        for name, slot in self._pool_slots.items():
            if self._draining.get(name, 0) > applied:
                # A worker may still be giving it new requests: what it has is not known.
                pools[name] = PoolDemand(observed_at_s=now)
            else:
                pools[name] = self._demand(slot, now)
        slots = max(self._slots.values(), default=-1) + 1
        requests, tokens = self._shared.replica_totals(slots)
        replicas = {
            replica_id: ReplicaLoad(inflight_requests=requests[slot], inflight_tokens=tokens[slot])
            for replica_id, slot in self._slots.items()
        }
        return Observation(pools=pools, replicas=replicas)

    def _demand(self, slot: int, now_s: float) -> PoolDemand:
        counts = self._shared.pool_totals(slot, metrics.QUEUED_TOKENS + 1)
        prompts, answers = metrics.ARRIVED_PROMPT_TOKENS, metrics.ARRIVED_OUTPUT_TOKENS
        return PoolDemand(
            observed_at_s=now_s,
            inflight_requests=counts[metrics.INFLIGHT_REQUESTS],
            inflight_tokens=counts[metrics.INFLIGHT_TOKENS],
            queued_requests=counts[metrics.QUEUED_REQUESTS],
            queued_tokens=counts[metrics.QUEUED_TOKENS],
            arrivals_total=counts[metrics.ARRIVALS],
            arrived_tokens_total=counts[prompts] + counts[answers],
        )

    def totals(self, pool: str) -> PoolTotals | None:
        """What a pool's counters have come to; ``None`` for one without a slot."""
        slot = self._pool_slots.get(pool)
        if slot is None:
            return None
        counts, sums = self._shared.pool_totals(slot), self._shared.pool_sums(slot)

        def histogram(numbers: Sequence[int]) -> HistogramCounts:
            """Those of these numbers, which have the same bounds, as one."""
            total = counts[buckets_of(numbers[0])]
            for number in numbers[1:]:
                total = list(map(add, total, counts[buckets_of(number)]))
            return HistogramCounts(
                bounds_s=metrics.POOL_HISTOGRAMS[numbers[0]].bounds,
                counts=tuple(total),
                sum_s=sum(sums[number] for number in numbers),
            )

        return PoolTotals(
            arrivals=counts[metrics.ARRIVALS],
            input_tokens=counts[metrics.ARRIVED_PROMPT_TOKENS],
            predicted_output_tokens=counts[metrics.ARRIVED_OUTPUT_TOKENS],
            prompt_tokens=counts[metrics.PROMPT_TOKENS],
            output_tokens=counts[metrics.OUTPUT_TOKENS],
            ended=sum(counts[index] for index in _ENDS),
            errors=sum(counts[index] for index in _ERRORS),
            queue_wait=histogram((metrics.QUEUE_WAIT,)),
            ttft=histogram(_STREAMS),
            itl=histogram((metrics.ITL,)),
            e2e=histogram(_E2E),
        )

    def check_integrity(self) -> None:
        """Raise ``AssertionError`` where a slot is given twice."""
        slots, pools = list(self._slots.values()), list(self._pool_slots.values())
        if len(set(slots)) != len(slots) or self._retiring & set(slots):
            raise AssertionError(f"a slot is used twice: {self._slots}, {self._retiring}")
        if len(set(pools)) != len(pools) or set(self._retiring_pools) & set(pools):
            raise AssertionError(f"a pool's slot is used twice: {self._pool_slots}")


def _free(count: int, used: Set[int]) -> Iterator[int]:
    """The slots that are not used, the first ones first."""
    return (slot for slot in range(count) if slot not in used)


def _find(slots: dict[str, int], name: str, free: Iterator[int]) -> int | None:
    """The slot that a name has, or is given now; ``None`` where none is free."""
    if name not in slots:
        slot = next(free, None)
        if slot is None:
            return None
        slots[name] = slot
    return slots[name]
