"""A pool's past from a Prometheus server, or one that speaks its HTTP API (Thanos, Mimir,
VictoriaMetrics): range queries, minute by minute.

What a server does not have is unknown. So is a minute in which a counter was not scraped that was
there before and after: a part of the sum is missing. A counter that begins again at zero was a
process that began again; while it was gone it counted nothing.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any
from urllib.parse import urlsplit

import httpx
import msgspec

from autoscaler.signals.backfill.queries import Queries, Query
from autoscaler.signals.series import MINUTE_S

MOST_POINTS = 11_000
"""Of one time series in one answer: Prometheus refuses more."""
LEAST_POINTS = 60
"""A query that is too much for the server is halved down to this."""
TRIES = 4
PAUSE_S = 1.0
"""Before the second try of a query, doubled before each further one."""
TIMEOUT_S = 120.0
TOO_MUCH = frozenset({413, 422, 504})
"""Statuses of a query that a shorter range may get through."""
AGAIN = frozenset({429, 500, 502, 503})

Points = dict[int, float]
"""Values by minute (Unix time / 60)."""
OnProgress = Callable[[str, int, int], None]
"""Called with the series at hand, how many are done, and of how many."""


class PrometheusError(Exception):
    """The server cannot be asked, or not so; the message says why."""


class _TimeSeries(msgspec.Struct):
    metric: dict[str, str]
    values: list[tuple[float, str]]


class _Data(msgspec.Struct):
    result: list[_TimeSeries] = []


class _Answer(msgspec.Struct):
    status: str
    data: _Data = msgspec.field(default_factory=_Data)
    error: str = ""


class _TooMuch(Exception):
    pass


class Prometheus:
    """One server, by the URL under which its ``/api/v1`` is. ``token`` is sent as a bearer token,
    a user and a password may be in the URL."""

    def __init__(
        self,
        url: str,
        *,
        token: str | None = None,
        headers: Mapping[str, str] | None = None,
        sleep: Callable[[float], None] = time.sleep,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise PrometheusError(f"{url!r} is no URL of a Prometheus (http://host:9090)")
        given = dict(headers or {})
        if token:
            given["authorization"] = f"Bearer {token}"
        self._url = f"{url.rstrip('/')}/api/v1/query_range"
        self._shown = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path.rstrip('/')}"
        self._sleep = sleep
        self._client = httpx.Client(
            headers=given, timeout=TIMEOUT_S, transport=transport, follow_redirects=True
        )

    def close(self) -> None:
        """Close its connections."""
        self._client.close()

    def read(
        self, queries: Queries, first: int, end: int, on_progress: OnProgress = lambda *_: None
    ) -> dict[str, Points]:
        """The series that are found, of the minutes from ``first`` up to ``end``."""
        found = {}
        for done, (series, candidates) in enumerate(queries.items()):
            on_progress(series, done, len(queries))
            points = self.find(candidates, first, end)
            if points:
                found[series] = points
        return found

    def find(self, candidates: Sequence[Query], first: int, end: int) -> Points:
        """What the first of these queries that finds anything gives."""
        for query in candidates:
            if query.counter:
                # Not the plain selector: it gives values that are up to five minutes old.
                text = f"last_over_time({query.text}[1m])"
                points = increases(self._range(text, first, end).values())
            else:
                results = self._range(query.text, first + 1, end)
                if len(results) > 1:
                    text = f"{query.text!r} gives {len(results)} time series; aggregate it to one"
                    raise PrometheusError(text)
                points = {at - 1: value for one in results.values() for at, value in one.items()}
            if points:
                return points
        return {}

    def _range(self, text: str, first: int, last: int) -> dict[tuple[Any, ...], Points]:
        """The values at the full minutes from ``first`` to ``last``, by time series."""
        found: dict[tuple[Any, ...], Points] = {}
        ranges = [
            (start, min(start + MOST_POINTS - 1, last))
            for start in range(first, last + 1, MOST_POINTS)
        ]
        while ranges:
            start, stop = ranges.pop(0)
            try:
                results = self._ask(text, start, stop)
            except _TooMuch as problem:
                points = (stop - start + 1) // 2
                if points < LEAST_POINTS:
                    raise PrometheusError(str(problem)) from None
                ranges[:0] = [(start, start + points - 1), (start + points, stop)]
                continue
            for one in results:
                points_of = found.setdefault(tuple(sorted(one.metric.items())), {})
                for at_s, value in one.values:
                    if math.isfinite(number := float(value)):
                        points_of[round(at_s / MINUTE_S)] = number
        return found

    def _ask(self, text: str, first: int, last: int) -> list[_TimeSeries]:
        given: dict[str, str | int] = {
            "query": text,
            "start": first * MINUTE_S,
            "end": last * MINUTE_S,
            "step": MINUTE_S,
        }
        problem = ""
        for number in range(TRIES):
            if number:
                self._sleep(PAUSE_S * 2.0 ** (number - 1))
            try:
                answer = self._client.get(self._url, params=given)
            except httpx.InvalidURL as error:
                raise PrometheusError(f"{self._shown}: {error}") from None
            except httpx.HTTPError as error:
                problem = str(error) or type(error).__name__
                continue
            parsed = _parse(answer.content)
            if answer.status_code == 200 and parsed is not None and parsed.status == "success":
                return parsed.data.result
            said = "" if parsed is None else parsed.error
            problem = f"it answered {answer.status_code}: {said or 'not as a Prometheus does'}"
            if answer.status_code in TOO_MUCH or "timed out" in said:
                raise _TooMuch(f"{self._shown}: {problem}")
            if answer.status_code not in AGAIN:
                break
        raise PrometheusError(f"{self._shown}: {problem} (asked for {text})")


def _parse(content: bytes) -> _Answer | None:
    try:
        return msgspec.json.decode(content, type=_Answer)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None


def increases(counters: Iterable[Mapping[int, float]]) -> Points:
    """How much counters rose together in each minute, from their values at full minutes.

    A minute is known where one of them was known at both its ends, and none was missing that went
    on later, nor about to be: its last value is from somewhere within that minute. What a counter
    had when it was seen for the first time came before.
    """
    sums: Points = {}
    missing: set[int] = set()
    for counter in counters:
        at = sorted(counter)
        for before, after in pairwise(at):
            rise = counter[after] - counter[before]
            if after == before + 1:
                sums[before] = sums.get(before, 0.0) + (rise if rise >= 0 else counter[after])
            elif rise >= 0:
                missing.update(range(before - 1, after))
    return {minute: value for minute, value in sums.items() if minute not in missing}
