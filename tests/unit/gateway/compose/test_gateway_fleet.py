"""Slots of pools and replicas while both come and go."""

from __future__ import annotations

from gateway.compose.fleet import FleetBook
from gateway.datapath import metrics
from gateway.datapath.shared import Shared
from router.types import Pool, Replica, ReplicaState

WORKERS = 2


def make(max_pools: int = 3) -> tuple[FleetBook, Shared]:
    shared = Shared.create(workers=WORKERS, max_replicas=4, max_pools=max_pools)
    return FleetBook(shared, lambda: 5.0), shared


def apply(shared: Shared, version: int, *workers: int) -> None:
    for worker in workers or range(WORKERS):
        shared.set_applied(worker, version)


def test_a_fleet_carries_the_pools_with_what_is_published_of_them() -> None:
    book, _ = make()
    replica = Replica(id="b-1", pool="b", url="http://x", state=ReplicaState.READY)
    known = Pool(name="b", aliases=("c",), replicas=(replica,), draining=True)
    fleet = book.publish((Pool(name="a"), known))
    first, second = fleet.pools
    assert (first.name, first.slot, first.replicas, first.draining) == ("a", 0, (), False)
    assert (second.aliases, second.draining) == (("c",), True)
    assert [replica.id for replica in second.replicas] == ["b-1"]
    assert second.replicas[0].slot == 0
    assert book.pool_slots() == {"a": 0, "b": 1}


def test_a_slot_is_given_again_only_when_every_worker_has_let_go_of_it() -> None:
    book, shared = make(max_pools=1)
    gone = book.publish((Pool(name="a"),)).version + 1
    assert book.publish((Pool(name="b"),)).pools == ()  # the block is full: b waits
    apply(shared, gone, 0)
    assert book.publish((Pool(name="b"),)).pools == ()
    apply(shared, gone, 1)
    (pool,) = book.publish((Pool(name="b"),)).pools
    assert (pool.name, pool.slot) == ("b", 0)
    book.check_integrity()


def test_what_a_removed_pool_has_is_unknown_until_no_worker_gives_it_more() -> None:
    book, shared = make()
    apply(shared, book.publish((Pool(name="a"),)).version)
    assert book.observe().pools["a"].inflight_requests == 0
    version = book.publish((Pool(name="a", draining=True),)).version
    book.publish((Pool(name="a", draining=True, phase="still"),))
    assert book.observe().pools["a"].inflight_requests is None
    apply(shared, version)
    shared.pool_rows(1, 0)[0][metrics.INFLIGHT_REQUESTS] = 2
    assert book.observe().pools["a"].inflight_requests == 2
    shared.clear_worker(1)  # its successor may not know yet
    assert book.observe().pools["a"].inflight_requests is None
    book.publish((Pool(name="a"),))  # it was added again
    assert book.observe().pools["a"].inflight_requests == 0
