"""Past decisions, from the history's file, as the admin API shows and scores them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import pairwise

from autoscaler.control.decision_log import find_alone
from autoscaler.signals.decisions import DecisionFigures, DecisionRecord, make_figures
from autoscaler.signals.hindsight import Hindsight, PastMoment, judge
from autoscaler.signals.series import MINUTE_S
from autoscaler.types import NO_TALLY, CapacitySource, Decision, ForecastTally, ReplicaCapacity
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
    return schema.DecisionInputsEntry(
        ready=figures.ready,
        lead_s=figures.lead_s,
        min_replicas=figures.least,
        max_replicas=figures.most,
        override=figures.override,
        requests=figures.requests,
        tokens=figures.tokens,
        queued_tokens=figures.queued_tokens,
        stable_window_s=figures.window_s,
        stable_tokens_per_s=figures.stable_rate,
        panic_tokens_per_s=figures.panic_rate,
        model=figures.model,
        forecast_median_tokens_per_s=figures.median,
        forecast_high_tokens_per_s=figures.high,
        rules=figures.rules,
        alone=figures.alone,
    )


def entry_of(record: DecisionRecord) -> schema.PastDecisionEntry:
    """A record as it is answered."""
    figures = record.figures
    capacity = None
    if figures.capacity is not None and figures.capacity_source:
        capacity = ReplicaCapacity(
            tokens_per_s=figures.capacity, source=CapacitySource(figures.capacity_source)
        )
    return schema.PastDecisionEntry(
        at_s=record.at_s,
        desired=figures.desired,
        supply=figures.supply,
        reason=figures.reason,
        detail=figures.detail,
        signal=figures.signal,
        bound=figures.bound,
        panicking=figures.panicking,
        reactive=figures.reactive,
        forecast=figures.forecast,
        level=figures.level,
        capacity=capacity,
        fallback=figures.fallback,
        recommended=figures.recommended,
        inputs=_inputs(figures),
        count=record.count,
        first_at_s=record.at_s,
        last_at_s=record.until_s,
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
    total = NO_TALLY
    for one in records:
        tally = one.tally
        total = ForecastTally(
            scored=total.scored + tally.scored,
            covered=total.covered + tally.covered,
            loss=total.loss + tally.loss,
            last_value_loss=total.last_value_loss + tally.last_value_loss,
        )
    return judge([moment for one in records for moment in _moments(one)], total)


def _moments(record: DecisionRecord) -> list[PastMoment]:
    """One for the beginning of what a record says, and one for its end, where that is later."""
    figures = record.figures
    first = PastMoment(
        at_s=record.at_s,
        until_s=record.until_s + KNOWN_FOR_S,
        supply=figures.supply,
        ready=figures.ready,
        tokens_per_s=figures.stable_rate,
        capacity_tokens_per_s=figures.capacity,
        alone=figures.alone,
        recommended=figures.recommended,
        trusted=figures.ready is not None and not figures.fallback,
        lead_s=figures.lead_s,
        delay_s=figures.delay_s,
        least=figures.least or 0,
        most=max(1, figures.most or 1),
    )
    if record.until_s <= record.at_s:
        return [first]
    return [first, replace(first, at_s=record.until_s)]
