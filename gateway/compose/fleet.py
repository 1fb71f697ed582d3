"""Between the control loop and the data path: replicas get slots, counters become demand.

The data path counts by slot, in shared memory; the control loop speaks of pools and replicas by
name. This is the only place that knows both. A slot is given to another replica only when no
worker counts anything on it any more, so a late answer never settles on a stranger's account.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from autoscaler.settings import PoolSettings
from autoscaler.types import Observation, PoolDemand, PoolView, ReplicaLoad, ReplicaView
from gateway.datapath import metrics
from gateway.datapath.shared import Shared
from router.types import Fleet, Pool, Replica, ReplicaState

UNTOLD = PoolView()


class FleetBook:
    """The slots, and the newest fleet made from what the control loop published."""

    def __init__(
        self, shared: Shared, pools: Sequence[PoolSettings], clock: Callable[[], float]
    ) -> None:
        self._shared = shared
        self._pools = tuple(pools)
        self._clock = clock
        self._slots: dict[str, int] = {}
        self._retiring: set[int] = set()
        self._version = 0

    def publish(self, replicas: Sequence[ReplicaView], views: Mapping[str, PoolView]) -> Fleet:
        """The next fleet, with what is told of pools by name. Replicas for which no slot is free
        are left out until one is."""
        self._forget({view.id for view in replicas})
        by_pool: dict[str, list[Replica]] = {pool.name: [] for pool in self._pools}
        for view in replicas:
            slot = self._slot(view)
            if slot is not None and view.pool in by_pool:
                by_pool[view.pool].append(
                    Replica(
                        id=view.id,
                        pool=view.pool,
                        slot=slot,
                        url=view.url,
                        state=view.state,
                        served_model=view.served_model,
                        max_model_len_tokens=view.max_model_len_tokens,
                        max_inflight_requests=view.max_inflight_requests,
                        max_inflight_tokens=view.max_inflight_tokens,
                        headers=view.headers,
                    )
                )
        self._version += 1
        return Fleet(
            version=self._version,
            pools=tuple(
                Pool(
                    name=pool.name,
                    slot=index,
                    aliases=pool.aliases,
                    replicas=tuple(by_pool[pool.name]),
                    wake_eta_s=views.get(pool.name, UNTOLD).wake_eta_s,
                    max_replicas=pool.max_replicas,
                    phase=views.get(pool.name, UNTOLD).phase,
                )
                for index, pool in enumerate(self._pools)
            ),
        )

    def _slot(self, view: ReplicaView) -> int | None:
        slot = self._slots.get(view.id)
        if slot is None and view.state in (ReplicaState.STOPPED, ReplicaState.FAILED):
            return None
        if slot is None:
            used = set(self._slots.values()) | self._retiring
            free = (index for index in range(self._shared.max_replicas) if index not in used)
            slot = next(free, None)
            if slot is not None:
                self._slots[view.id] = slot
        return slot

    def _forget(self, present: set[str]) -> None:
        for replica_id in [known for known in self._slots if known not in present]:
            self._retiring.add(self._slots.pop(replica_id))
        self._retiring = {
            slot for slot in self._retiring if self._shared.replica_total(slot) != (0, 0)
        }

    def observe(self) -> Observation:
        """One look at the counters: demand per pool, load per replica."""
        now = self._clock()
        total = self._shared.pool_total
        pools = {
            pool.name: PoolDemand(
                observed_at_s=now,
                inflight_requests=total(index, metrics.INFLIGHT_REQUESTS),
                inflight_tokens=total(index, metrics.INFLIGHT_TOKENS),
                queued_requests=total(index, metrics.QUEUED_REQUESTS),
                queued_tokens=total(index, metrics.QUEUED_TOKENS),
                arrivals_total=total(index, metrics.ARRIVALS),
            )
            for index, pool in enumerate(self._pools)
        }
        replicas = {}
        for replica_id, slot in self._slots.items():
            requests, tokens = self._shared.replica_total(slot)
            replicas[replica_id] = ReplicaLoad(inflight_requests=requests, inflight_tokens=tokens)
        return Observation(pools=pools, replicas=replicas)

    def check_integrity(self) -> None:
        """Raise ``AssertionError`` where a slot is given twice."""
        slots = list(self._slots.values())
        if len(set(slots)) != len(slots) or self._retiring & set(slots):
            raise AssertionError(f"a slot is used twice: {self._slots}, {self._retiring}")
