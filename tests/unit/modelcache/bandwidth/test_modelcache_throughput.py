"""What is known of how fast pieces come, and who is behind whom, on virtual time."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from modelcache.bandwidth.throughput import PieceRead, Throughput, compare

MIB = 1 << 20
PIECE = 8 * MIB


def test_a_pace_is_that_of_pieces_of_about_the_size_or_larger() -> None:
    pace = Throughput()
    assert pace.expected_s(PIECE) is None
    for _ in range(50):
        pace.learn(300, 0.05)
    assert pace.expected_s(PIECE) is None
    assert pace.expected_s(300) == pytest.approx(0.05)
    for took_s in (10.0, 12.0, 30.0):
        pace.learn(PIECE, took_s)
    assert pace.expected_s(PIECE) == pytest.approx(12.0)
    assert pace.slowest_s(PIECE) == pytest.approx(30.0)
    assert pace.expected_s(MIB) == pytest.approx(1.5)
    for _ in range(100):
        pace.learn(300, 0.1)
    assert pace.expected_s(PIECE) == pytest.approx(12.0)
    assert pace.expected_s(300) == pytest.approx(0.1)


Rates = Callable[[float], float]


def watch(rates: list[Rates], until_s: float, size_bytes: int = PIECE) -> list[PieceRead]:
    """Readings that begin together, each with its rate in MiB/s by time, looked at ten times a
    second. Whoever is done is not compared with any more."""
    began_s = 1_000.0
    every = [PieceRead(size_bytes=size_bytes, began_s=began_s) for _ in rates]
    moved = [0.0 for _ in rates]
    for one in every:
        one.begin(began_s)
    for step in range(1, round(until_s * 10) + 1):
        for n, (one, rate) in enumerate(zip(every, rates, strict=True)):
            moved[n] = min(size_bytes, moved[n] + rate(step / 10) * MIB / 10)
            one.moved_bytes = int(moved[n])
        compare([one for one in every if one.moved_bytes < size_bytes], began_s + step / 10)
    return every


def test_who_hangs_is_behind_and_stays_so_when_the_others_are_done() -> None:
    *others, slow = watch([lambda at_s: 4.0] * 5 + [lambda at_s: 0.0], 11.0)
    assert [one.fresh_s() for one in others] == [None] * 5
    fresh_s = slow.fresh_s()
    assert fresh_s is not None
    assert 1.5 < fresh_s < 5.0
    assert slow.left_s(1_011.0) > 20 * fresh_s
    assert slow.lost(1_011.0, 4 * fresh_s, 10.0)
    assert not slow.lost(1_011.0, 4 * fresh_s, 12.0)


def test_nobody_is_behind_where_all_are_slow() -> None:
    assert not any(one.fresh_s() for one in watch([lambda at_s: 0.05] * 6, 60.0))
    uneven = [lambda at_s, n=n: 0.1 + 0.02 * n for n in range(6)]
    assert not any(one.fresh_s() for one in watch(uneven, 60.0))


def test_nobody_is_behind_where_all_stall_at_once() -> None:
    rates: list[Rates] = [lambda at_s: 0.0 if 1.0 < at_s < 25.0 else 2.0] * 4
    assert not any(one.fresh_s() for one in watch(rates, 20.0))
    assert not any(one.fresh_s() for one in watch(rates, 26.0))


def test_who_catches_up_is_not_behind_any_more() -> None:
    rates: list[Rates] = [lambda at_s: 1.0, lambda at_s: 1.0, lambda at_s: 0.0 if at_s < 6 else 1.0]
    assert watch(rates, 6.0)[2].fresh_s() is not None
    assert watch(rates, 12.0)[2].fresh_s() is None


def test_alone_nobody_is_behind() -> None:
    (one,) = watch([lambda at_s: 0.01], 30.0)
    assert one.fresh_s() is None


def test_bytes_that_are_told_of_late_are_not_missed_too_early() -> None:
    """Over TLS a source tells of whole MiB: what has not been told of may be there."""
    one = PieceRead(size_bytes=PIECE, began_s=0.0)
    one.begin(0.0)
    assert one.most_bytes_s(0.0) == math.inf
    assert one.most_bytes_s(4.0) == MIB / 4
    one.moved_bytes = MIB
    assert one.least_bytes_s(4.0) == 0.0


def test_what_waits_for_memory_is_not_slow() -> None:
    waiting = PieceRead(size_bytes=PIECE, began_s=0.0)
    moving = PieceRead(size_bytes=PIECE, began_s=0.0)
    moving.begin(0.0)
    moving.moved_bytes = 6 * MIB
    compare([waiting, moving], 30.0)
    assert waiting.fresh_s() is None
    assert moving.left_s(30.0) < 30.0
