"""Past decisions, from the history's file, as the admin API shows and scores them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import pairwise

import msgspec

from autoscaler.control.decision_log import find_alone
from autoscaler.signals.decisions import DecisionFigures, DecisionRecord, make_figures
from autoscaler.signals.hindsight import Hindsight, PastMoment, judge
from autoscaler.signals.series import MINUTE_S
from autoscaler.types import NO_TALLY, CapacitySource, Decision, ReplicaCapacity
from gateway.admin import schema

KNOWN_FOR_S = 1.5 * MINUTE_S
"""A record says what holds for as long after it was last seen: the next comes a minute later."""


def inputs_of(decision: Decision) -> schema.DecisionInputsEntry | None:
    """What a decision of this process was made from."""
    if decision.inputs is None:
        return None
    return _inputs(make_figures(decision, find_alone(decision)))


def _inputs(figures: DecisionFigures) -> schema.DecisionInputsEntry | None:
    if figures.ready is None:
        return None
    return schema.DecisionInputsEntry.model_validate(figures)


def entry_of(record: DecisionRecord) -> schema.PastDecisionEntry:
    """A record as it is answered."""
    figures = record.figures
    capacity = None
    if figures.capacity_tokens_per_s is not None and figures.capacity_source:
        capacity = ReplicaCapacity(
            tokens_per_s=figures.capacity_tokens_per_s,
            source=CapacitySource(figures.capacity_source),
        )
    return schema.PastDecisionEntry.model_validate(
        msgspec.structs.asdict(figures)
        | {
            "at_s": record.at_s,
            "capacity": capacity,
            "inputs": _inputs(figures),
            "count": record.count,
            "first_at_s": record.at_s,
            "last_at_s": record.until_s,
        }
    )


def merge(
    kept: Sequence[DecisionRecord], waiting: Iterable[DecisionRecord]
) -> list[DecisionRecord]:
    """Records of the file, and those that may not be in it yet; oldest first. Of one that is in
    both the file's sums may be a minute behind."""
    known = {one.at_s: one for one in kept}
    for one in waiting:
        there = known.get(one.at_s)
        if there is not None:
            one = replace(there, until_s=max(there.until_s, one.until_s))
        known[one.at_s] = one
    return [known[at_s] for at_s in sorted(known)]


def joined(records: Sequence[DecisionRecord]) -> list[DecisionRecord]:
    """Each until the next begins, where nothing lies between that is not known."""
    found = list(records)
    for index, (one, then) in enumerate(pairwise(records)):
        if one.until_s < then.at_s <= one.until_s + KNOWN_FOR_S:
            found[index] = replace(one, until_s=then.at_s, count=one.count + then.before)
    return found


def in_force(records: Sequence[DecisionRecord], at_s: float) -> DecisionRecord | None:
    """The one that held at a moment; ``None`` where none is known to."""
    earlier = [one for one in records if one.at_s <= at_s]
    if not earlier or at_s > earlier[-1].until_s + KNOWN_FOR_S:
        return None
    return earlier[-1]


def score(records: Sequence[DecisionRecord]) -> Hindsight:
    """What a stretch cost and brought."""
    tally = sum((one.tally for one in records), NO_TALLY)
    return judge([moment for one in records for moment in _moments(one)], tally)


def _moments(record: DecisionRecord) -> list[PastMoment]:
    """One for the beginning of what a record says, and one for its end, where that is later."""
    figures = record.figures
    first = PastMoment(
        at_s=record.at_s,
        until_s=record.until_s + KNOWN_FOR_S,
        supply=figures.supply,
        ready=figures.ready,
        tokens_per_s=figures.stable_tokens_per_s,
        capacity_tokens_per_s=figures.capacity_tokens_per_s,
        alone=figures.alone,
        recommended=figures.recommended,
        trusted=figures.ready is not None and not figures.fallback,
        lead_s=figures.lead_s,
        scale_down_delay_s=figures.scale_down_delay_s,
        min_replicas=figures.min_replicas or 0,
        max_replicas=max(1, figures.max_replicas or 1),
    )
    if record.until_s <= record.at_s:
        return [first]
    return [first, replace(first, at_s=record.until_s)]
