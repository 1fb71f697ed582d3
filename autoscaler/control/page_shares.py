"""Whose models are kept in the page cache, where those of all pools at zero do not fit beside the
others'."""

from __future__ import annotations

from collections.abc import Iterable

from autoscaler.control.replicas import PoolRecord
from autoscaler.policy.memory_shares import MemoryBid, share_memory
from autoscaler.tiers.preparer import Preparer


def share_pages(pools: Iterable[PoolRecord], preparer: Preparer, now_s: float) -> None:
    """Deny pages to the pools at zero that save least by them, as far as memory is short."""
    budget_bytes = preparer.page_budget_bytes
    if budget_bytes is None:
        return
    at_zero: list[tuple[PoolRecord, int]] = []
    for pool in pools:
        size = preparer.size_bytes(pool.pool)
        if size is None or not pool.backend.owns_replicas:
            continue
        if not pool.make_status(now_s).supply:
            at_zero.append((pool, size))
        elif preparer.has_pages(pool.pool):
            budget_bytes -= size
    if sum(size for _, size in at_zero) <= budget_bytes:
        preparer.deny_pages(frozenset())
        return
    bids = [
        MemoryBid(
            pool=pool.pool.name,
            size_bytes=size,
            saved_price_s=pool.tiers.planner.page_saving_s(now_s),
            held=preparer.has_pages(pool.pool),
        )
        for pool, size in at_zero
    ]
    kept = share_memory(max(0, budget_bytes), bids)
    preparer.deny_pages({one.pool for one in bids} - kept)
