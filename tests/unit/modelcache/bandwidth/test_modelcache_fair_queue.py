"""Caps: never exceeded over any window, used almost wholly, shared fairly, and no flow starves."""

from __future__ import annotations

import math
import random
from collections import Counter
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelcache.bandwidth.fair_queue import CLASS_WEIGHTS, Cap, Claim, FairQueue, make_cap
from modelcache.types import Priority

MIB = 1 << 20


@dataclass(frozen=True)
class Reader:
    """A connection that asks again as soon as it has read what it was granted."""

    model: str
    priority: Priority = Priority.PRELOAD
    caps: tuple[str, ...] = ("node",)
    size_bytes: int = MIB
    read_s: float = 0.0


@dataclass(frozen=True)
class Grant:
    at_s: float
    claim: Claim


def simulate(caps: tuple[Cap, ...], readers: list[Reader], until_s: float) -> list[Grant]:
    """Readers on virtual time, from full buckets."""
    shares = FairQueue(caps, 0.0)
    owner = {shares.ask(r.model, r.priority, r.caps, r.size_bytes).ticket: r for r in readers}
    later: list[tuple[float, Reader]] = []
    grants: list[Grant] = []
    now_s = 0.0
    while now_s <= until_s:
        for at_s, reader in [entry for entry in later if entry[0] <= now_s]:
            later.remove((at_s, reader))
            asked = shares.ask(reader.model, reader.priority, reader.caps, reader.size_bytes)
            owner[asked.ticket] = reader
        for claim in shares.grant(now_s):
            reader = owner.pop(claim.ticket)
            grants.append(Grant(now_s, claim))
            later.append((now_s + reader.read_s, reader))
        found = shares.first()
        moments = [at_s for at_s, _ in later]
        if found is not None:
            moments.append(now_s + found[1])
        # The smallest step a clock would show: no moment is met exactly.
        now_s = max(min(moments), now_s + 1e-6)
    return grants


def served(grants: list[Grant]) -> Counter[str]:
    total: Counter[str] = Counter()
    for grant in grants:
        total[grant.claim.model] += grant.claim.size_bytes
    return total


readers = st.builds(
    Reader,
    model=st.sampled_from(["a", "b", "c"]),
    priority=st.sampled_from(list(Priority)),
    caps=st.sampled_from([("node",), ("node", "store"), ("store",)]),
    size_bytes=st.integers(16_384, MIB),
    read_s=st.sampled_from([0.0, 0.001, 0.05, 0.5]),
)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(readers, min_size=1, max_size=8),
    st.integers(65_536, 50 * MIB),
    st.integers(65_536, 50 * MIB),
)
def test_no_cap_is_exceeded_over_any_window(
    given_readers: list[Reader], node: int, store: int
) -> None:
    caps = (make_cap("node", node, MIB), make_cap("store", store, MIB))
    grants = simulate(caps, given_readers, 120 * MIB / max(node, store) / 10)
    for cap in caps:
        # A window begins with any grant; only the one least used up until now can be the worst.
        total = 0
        least = math.inf
        for grant in (one for one in grants if cap.name in one.claim.caps):
            least = min(least, total - cap.rate_bytes_s * grant.at_s)
            total += grant.claim.size_bytes
            assert total - cap.rate_bytes_s * grant.at_s - least <= cap.burst_bytes + 1


@settings(max_examples=20, deadline=None)
@given(
    st.integers(65_536, 2_000 * MIB),
    st.integers(1, 16),
    st.sampled_from(list(Priority)),
)
def test_a_cap_is_used_to_nine_tenths_while_it_is_wanted(
    rate: int, streams: int, priority: Priority
) -> None:
    cap = make_cap("node", rate, MIB)
    until_s = 50 * MIB / rate
    # A link ten times the cap; what one connection reads, the bucket refills meanwhile.
    reader = Reader(model="m", priority=priority, read_s=MIB / (10 * rate))
    grants = simulate((cap,), [reader] * streams, until_s)
    assert sum(g.claim.size_bytes for g in grants) >= 0.9 * rate * until_s


@pytest.mark.parametrize("rate", [64 * MIB, 1_000 * MIB])
def test_a_cap_stays_below_it_from_the_first_second_on(rate: int) -> None:
    cap = make_cap("node", rate, MIB)
    grants = simulate((cap,), [Reader(model="m", read_s=MIB / (10 * rate))] * 16, 2.0)
    for begin in range(11):
        second = [g.claim.size_bytes for g in grants if begin <= 10 * g.at_s < begin + 10]
        assert sum(second) <= 0.98 * rate  # and the store's own view has two per cent more


def test_models_share_evenly_however_many_connections_each_has() -> None:
    cap = make_cap("node", 10 * MIB, MIB)
    grants = simulate((cap,), [Reader(model="many")] * 15 + [Reader(model="one")], 30)
    total = served(grants)
    assert total["one"] == pytest.approx(total["many"], rel=0.05)


def test_a_waking_replica_comes_first_and_a_preload_does_not_starve() -> None:
    cap = make_cap("node", 10 * MIB, MIB)
    all_three = [Reader(model=p.name, priority=p) for p in Priority for _ in range(4)]
    total = served(simulate((cap,), all_three, 100))
    for priority in Priority:
        share = total[priority.name] / total.total()
        assert share == pytest.approx(CLASS_WEIGHTS[priority] / 100, rel=0.2)


def test_what_one_class_does_not_use_the_others_have() -> None:
    cap = make_cap("node", 10 * MIB, MIB)
    total = served(simulate((cap,), [Reader(model="r", priority=Priority.REPLICATE)], 20))
    assert total["r"] >= 0.9 * 200 * MIB


def test_a_model_that_was_away_is_not_repaid() -> None:
    cap = make_cap("node", 10 * MIB, MIB)
    shares = FairQueue((cap,), 0.0)
    now_s = 0.0
    for _ in range(500):
        shares.ask("busy", Priority.WAKE, ("node",), MIB)
        now_s += 0.1
        shares.grant(now_s)
    for _ in range(100):
        shares.ask("busy", Priority.WAKE, ("node",), MIB)
        shares.ask("fresh", Priority.WAKE, ("node",), MIB)
    models = [c.model for step in range(1, 60) for c in shares.grant(now_s + step * 0.1)]
    assert abs(models.count("busy") - models.count("fresh")) <= 2


def test_a_slow_store_does_not_hold_up_another() -> None:
    caps = (make_cap("slow", 65_536, MIB), make_cap("node", 100 * MIB, MIB))
    slow = Reader(model="s", caps=("node", "slow"), priority=Priority.WAKE)
    total = served(simulate(caps, [slow] * 8 + [Reader(model="fast")], 10))
    assert total["fast"] >= 0.85 * 1000 * MIB


def test_small_claims_do_not_overtake_a_large_one_for_ever() -> None:
    cap = Cap(name="node", rate_bytes_s=MIB, burst_bytes=MIB)
    small = [Reader(model="small", size_bytes=10_000)] * 8
    grants = simulate((cap,), [*small, Reader(model="large")], 20)
    assert served(grants)["large"] >= 8 * MIB


def test_more_at_once_than_a_cap_ever_holds_is_refused() -> None:
    shares = FairQueue((Cap(name="node", rate_bytes_s=1, burst_bytes=10),), 0.0)
    with pytest.raises(ValueError, match="11 bytes at once, but node holds 10"):
        shares.ask("m", Priority.WAKE, ("node",), 11)


def test_a_clock_that_jumps_back_neither_drains_nor_fills() -> None:
    shares = FairQueue((Cap(name="node", rate_bytes_s=10, burst_bytes=100),), 1000.0)
    shares.ask("m", Priority.WAKE, ("node",), 100)
    assert len(shares.grant(1000.0)) == 1
    shares.ask("m", Priority.WAKE, ("node",), 50)
    assert shares.grant(10.0) == []
    assert shares.grant(1004.9) == []
    assert len(shares.grant(1005.1)) == 1


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000))
def test_whatever_is_withdrawn_or_given_back_no_bucket_overflows(seed: int) -> None:
    rng = random.Random(seed)
    shares = FairQueue((make_cap("node", 5 * MIB, MIB),), 0.0)
    now_s = 0.0
    open_claims: list[Claim] = []
    for _ in range(200):
        step = rng.random()
        if step < 0.5:
            open_claims.append(
                shares.ask(rng.choice("ab"), rng.choice(list(Priority)), ("node",), MIB)
            )
        elif step < 0.6 and open_claims:
            shares.withdraw(open_claims.pop(rng.randrange(len(open_claims))))
        elif step < 0.7:
            shares.give_back(("node",), rng.randrange(MIB))
        now_s += rng.random() / 10
        shares.grant(now_s)
        bucket = shares.buckets["node"]
        assert -1e-6 <= bucket.level_bytes <= bucket.cap.burst_bytes
