"""Which gaps between requests are remembered, and for how much they count."""

from __future__ import annotations

import pytest

from autoscaler.signals.gaps import KEPT, LONGEST_S, GapRecord
from autoscaler.types import Gap


def test_gaps_are_kept() -> None:
    record = GapRecord()
    for length_s, at_s in ((10.0, 100.0), (0.0, 101.0), (300.0, 500.0)):
        record.add(length_s, at_s)
    assert sorted(record.read(600.0)) == [Gap(10.0, 1.0), Gap(300.0, 1.0)]


def test_many_short_ones_do_not_push_out_the_long() -> None:
    record = GapRecord()
    record.add(30_000.0, 30_000.0)
    for number in range(10 * KEPT):
        record.add(5.0, 30_000.0 + 10.0 * number)
    gaps = record.read(30_000.0 + 100.0 * KEPT)
    assert len(gaps) == KEPT + 1
    short = [one.weight for one in gaps if one.length_s == 5.0]
    # So many as there would have been at the rate of the newest.
    assert short[0] == pytest.approx((30_000.0 + 100.0 * KEPT) / (10.0 * KEPT), rel=0.01)
    assert [one.weight for one in gaps if one.length_s > 5.0] == [1.0]


def test_they_are_the_same_on_another_clock() -> None:
    record = GapRecord()
    for number in range(2 * KEPT):
        record.add(5.0, 10.0 * number)
        if number % 40 == 0:
            record.add(300.0, 10.0 * number)
    assert record.is_new
    packed = record.pack(1_000_000.0)
    assert not record.is_new
    later = GapRecord()
    later.add(70.0, 9_000.0)
    later.recall(packed, 1_000_000.0 - 5_000.0)  # its clock is 5,000 s behind the first one's
    record.add(70.0, 4_000.0)
    assert sorted(later.read(10_000.0)) == sorted(record.read(5_000.0))


@pytest.mark.parametrize("packed", [b"", b"x", b"\x92\x01\xa1x"])
def test_what_is_no_record_is_refused(packed: bytes) -> None:
    record = GapRecord()
    record.add(70.0, 100.0)
    with pytest.raises(ValueError, match=r"."):
        record.recall(packed, 0.0)
    assert record.read(200.0) == (Gap(70.0, 1.0),)


def test_old_ones_are_forgotten() -> None:
    record = GapRecord()
    record.add(100.0, 1_000.0)
    record.add(200.0, 2_000.0 + LONGEST_S)
    assert record.read(2_000.0 + LONGEST_S) == (Gap(200.0, 1.0),)
