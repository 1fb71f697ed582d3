"""Past decisions in the history's file: what each was made from, what came of it, and why.

A row holds from ``at_s`` until the next row of its pool, and was last seen at ``until_s``: a
decision that says the same with the same figures again makes its row longer, and not another. The
figures are packed into one column.
"""

from __future__ import annotations

import math
import sqlite3
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from autoscaler.signals.history import minute_of, pool_id
from autoscaler.types import (
    NO_TALLY,
    Bound,
    CapacitySource,
    Decision,
    ForecastTally,
    Outlook,
    ScaleReason,
    Signal,
)

ENCODER = msgspec.msgpack.Encoder()
WORDS = (
    b" unknown, which is never a reason to remove a replica replicas the last none is removed; a "
    b"request is held or in flight; min_replicas is max_replicas saturatedderivedhinthistory "
    b"automatic direct last_value periodic_quantile scale_down_delayed scale_down_delay minimum "
    b"demand panic steady idle at_zero; the largest recommendation of the last 60 s is tokens in "
    b"flight and queued over 60 s, per replica no request; to zero after scaled to zero, no demand "
    b"there is no forecast yet h of history, 48 h are needed only of the last 1440 forecasts "
    b"covered what came tokens/s arrived over 60 s, per replica tokens/s at most within s with a "
    b"chance of % (automatic), stable_tokens_per_s panic_tokens_per_s forecast"
)
"""What decisions often say: records are compressed with it to a good third. It must not change, or
those of before cannot be read."""
MEDIAN, HIGH = 0.5, 0.95
NEWEST = 1_440
SEEN = (CapacitySource.SATURATED, CapacitySource.HISTORY)
"""Sources of a capacity that is no guess."""


class DecisionFigures(msgspec.Struct, array_like=True, frozen=True, kw_only=True):
    """One decision, packed. New fields are added at the end, with a default. Rates are tokens per
    second; ``None`` is unknown, which is not zero."""

    desired: int
    supply: int
    reason: ScaleReason
    detail: str
    signal: Signal
    bound: Bound | None
    panicking: bool
    reactive: int | None
    forecast: int | None
    level: float | None
    capacity_tokens_per_s: float | None
    capacity_source: str
    fallback: str
    recommended: int | None
    ready: int | None = None
    lead_s: float | None = None
    min_replicas: int | None = None
    """As they were at that time; so are the other settings."""
    max_replicas: int | None = None
    override: int | None = None
    scale_down_delay_s: float = 0.0
    stable_window_s: float = 60.0
    tokens: int | None = None
    requests: int | None = None
    queued_tokens: int | None = None
    stable_tokens_per_s: float | None = None
    panic_tokens_per_s: float | None = None
    model: str = ""
    forecast_median_tokens_per_s: float | None = None
    """Quantiles of the highest demand within the lead, by the forecast."""
    forecast_high_tokens_per_s: float | None = None
    rules: tuple[tuple[str, int], ...] = ()
    alone: int | None = None
    """What reaction without a forecast recommends, loading replicas to the target utilization."""


DECODER = msgspec.msgpack.Decoder(DecisionFigures)
MOST_BYTES = 1 << 20
"""Of one record, unpacked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DecisionRecord:
    """A row. ``count`` decisions said so, as far as they were looked at for it; ``before`` it came
    others that are those of the row before. ``tally`` is what came of the forecasts whose window
    ended meanwhile. Times are Unix time."""

    pool: str
    at_s: float
    until_s: float
    count: int
    figures: DecisionFigures
    before: int = 0
    tally: ForecastTally = NO_TALLY


def make_figures(decision: Decision, alone: int | None) -> DecisionFigures:
    """What is kept of a decision."""
    capacity, inputs = decision.capacity, decision.inputs
    own = DecisionFigures(
        desired=decision.desired,
        supply=decision.supply,
        reason=decision.reason,
        detail=decision.detail,
        signal=decision.signal,
        bound=decision.bound,
        panicking=decision.panicking,
        reactive=decision.reactive,
        forecast=decision.forecast,
        level=None if decision.level is None else round(decision.level, 4),
        capacity_tokens_per_s=None if capacity is None else short(capacity.tokens_per_s),
        capacity_source="" if capacity is None else capacity.source,
        fallback=decision.fallback,
        recommended=decision.recommended,
        alone=alone,
    )
    if inputs is None:
        return own
    policy, status, demand, outlook = inputs.policy, inputs.status, inputs.demand, inputs.outlook
    return msgspec.structs.replace(
        own,
        ready=status.ready,
        lead_s=short(status.lead_s),
        min_replicas=policy.min_replicas,
        max_replicas=policy.max_replicas,
        override=status.override,
        scale_down_delay_s=policy.delay_s(status.lead_s),
        stable_window_s=policy.stable_window_s,
        tokens=demand.tokens,
        requests=demand.requests,
        queued_tokens=demand.queued_tokens,
        stable_tokens_per_s=short(demand.stable_tokens_per_s),
        panic_tokens_per_s=short(demand.panic_tokens_per_s),
        model="" if outlook is None else outlook.model,
        forecast_median_tokens_per_s=quantile(outlook, MEDIAN),
        forecast_high_tokens_per_s=quantile(outlook, HIGH),
        rules=inputs.rules,
    )


def quantile(outlook: Outlook | None, level: float) -> float | None:
    """One of the quantiles that a forecast has."""
    if outlook is None or level not in outlook.levels:
        return None
    return short(outlook.tokens_per_s[outlook.levels.index(level)])


def short(value: float | None) -> float | None:
    """A figure in few bytes: whole from a hundred on, else to a thousandth."""
    if value is None or not math.isfinite(value):
        return None
    return int(value) if value >= 100.0 or value == int(value) else round(value, 3)


def pack(figures: DecisionFigures) -> bytes:
    """As they are in the file."""
    press = zlib.compressobj(wbits=-zlib.MAX_WBITS, zdict=WORDS)
    return press.compress(ENCODER.encode(figures)) + press.flush()


def unpack(packed: bytes) -> DecisionFigures | None:
    """``None`` where a newer Tidegate made them, with a reason that this one does not know."""
    try:
        plain = zlib.decompressobj(wbits=-zlib.MAX_WBITS, zdict=WORDS).decompress(
            packed, MOST_BYTES
        )
        return DECODER.decode(plain)
    except (msgspec.MsgspecError, zlib.error):
        return None


# -- rows --------------------------------------------------------------------------------------


def put_decisions(connection: sqlite3.Connection, records: Iterable[DecisionRecord]) -> None:
    """Keep these; of one that is there already, the longer time and the larger sums."""
    ids: dict[str, int] = {}
    connection.executemany(
        "INSERT INTO decisions (pool, minute, at_s, until_s, count, before, scored, covered, "
        "loss, last_loss, record) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) "
        "ON CONFLICT (pool, minute, at_s) DO UPDATE SET until_s = excluded.until_s, "
        "record = excluded.record, "
        "count = count + excluded.count, scored = scored + excluded.scored, "
        "covered = covered + excluded.covered, loss = loss + excluded.loss, "
        "last_loss = last_loss + excluded.last_loss",
        [
            (
                pool_id(connection, one.pool, ids),
                minute_of(one.at_s),
                one.at_s,
                one.until_s,
                one.count,
                one.before,
                one.tally.scored,
                one.tally.covered,
                short(one.tally.loss),
                short(one.tally.last_value_loss),
                pack(one.figures),
            )
            for one in records
        ],
    )


_READ = (
    "SELECT at_s, until_s, count, before, scored, covered, loss, last_loss, record FROM decisions "
    "WHERE pool = (SELECT id FROM pools WHERE name = ?) AND "
)


def read_between(
    connection: sqlite3.Connection, pool: str, from_s: float, until_s: float, most: int
) -> list[DecisionRecord]:
    """The records from one moment until another, oldest first, ``most`` of them."""
    rows = connection.execute(
        f"{_READ} minute BETWEEN ? AND ? AND at_s >= ? AND at_s < ? ORDER BY minute, at_s LIMIT ?",
        (pool, minute_of(from_s), minute_of(until_s), from_s, until_s, most),
    ).fetchall()
    return _unpack(pool, rows)


def read_around(
    connection: sqlite3.Connection, pool: str, at_s: float, before: int, after: int
) -> list[DecisionRecord]:
    """The records up to a moment and after it, oldest first, so many of each."""
    minute = minute_of(at_s)
    earlier = connection.execute(
        f"{_READ} minute <= ? AND at_s <= ? ORDER BY minute DESC, at_s DESC LIMIT ?",
        (pool, minute, at_s, before),
    ).fetchall()
    later = connection.execute(
        f"{_READ} minute >= ? AND at_s > ? ORDER BY minute, at_s LIMIT ?",
        (pool, minute, at_s, after),
    ).fetchall()
    return _unpack(pool, [*reversed(earlier), *later])


def newest_known(connection: sqlite3.Connection, pool: str) -> DecisionFigures | None:
    """The newest of ``NEWEST`` decisions that was made with a capacity seen of its replicas."""
    rows = connection.execute(f"{_READ} 1 ORDER BY minute DESC, at_s DESC LIMIT ?", (pool, NEWEST))
    for one in _unpack(pool, rows.fetchall()):
        if one.figures.capacity_tokens_per_s is not None and one.figures.capacity_source in SEEN:
            return one.figures
    return None


def pools_with_decisions(connection: sqlite3.Connection) -> list[str]:
    """The pools that there are records of."""
    rows = connection.execute(
        "SELECT name FROM pools WHERE EXISTS (SELECT 1 FROM decisions WHERE pool = pools.id) "
        "ORDER BY name"
    ).fetchall()
    return [name for (name,) in rows]


def _unpack(pool: str, rows: Sequence[tuple[Any, ...]]) -> list[DecisionRecord]:
    found = []
    for at_s, until_s, count, before, scored, covered, loss, last_loss, packed in rows:
        figures = unpack(packed)
        if figures is None:
            continue
        tally = ForecastTally(
            scored=int(scored), covered=int(covered), loss=loss, last_value_loss=last_loss
        )
        found.append(
            DecisionRecord(
                pool=pool,
                at_s=at_s,
                until_s=until_s,
                count=int(count),
                before=int(before or 0),
                figures=figures,
                tally=tally,
            )
        )
    return found
