"""What failed answers cost a replica: a failure rate, ejection for a while, a budget of retries.

A fault is an answer that failed: an error of the engine (5xx), or a connection that broke. A
replica that lately fails more than it answers is ejected: its requests go to the others. Each
ejection in a row lasts twice as long. It is never most of a pool that is ejected: where many
replicas fail, they hardly do so for themselves, and the few that are left would fall to the load.

429 and 503 are pressure and no fault: the replica is spared for a moment and its rate stays.
"""

from __future__ import annotations

from typing import Final

from router.endpoint import Endpoint

_WEIGHT: Final = 0.125
"""Of the newest answer in the failure rate: six faults in a row make an outlier of a replica, and
it takes half of the answers of one that fails now and then."""
_OUTLIER_RATE: Final = 0.5
_GOOD_RATE: Final = 0.05
PRESSURE_S: Final = 1.0
"""A replica that answers 429 or 503 is spared for this long."""
_MOST_DOUBLINGS: Final = 30


def is_pressure(status: int) -> bool:
    """Whether a status says that the replica has too much to do now."""
    return status in (429, 503)


def is_fault(status: int) -> bool:
    """Whether a status says that the replica failed. What it does not implement (501), it answers
    as it should."""
    return status >= 500 and status not in (501, 503)


def add_answer(endpoint: Endpoint) -> None:
    """The replica answered a request well."""
    rate = endpoint.failure_rate * (1.0 - _WEIGHT)
    if rate < _GOOD_RATE:
        rate = 0.0
        endpoint.ejections = 0
    endpoint.failure_rate = rate


def add_fault(endpoint: Endpoint, now_s: float, *, base_s: float, max_s: float) -> bool:
    """The replica failed a request. Returns whether it is ejected for that: for ``base_s``,
    doubling up to ``max_s`` with each time in a row."""
    rate = endpoint.failure_rate
    endpoint.failure_rate = rate = rate + (1.0 - rate) * _WEIGHT
    if rate <= _OUTLIER_RATE or endpoint.ejected_until_s > now_s:
        return False
    doubled: float = base_s * 2 ** min(endpoint.ejections, _MOST_DOUBLINGS)
    endpoint.ejected_until_s = now_s + min(doubled, max_s)
    endpoint.ejections += 1
    return True


def add_pressure(endpoint: Endpoint, now_s: float) -> None:
    """The replica answered that it has too much to do."""
    endpoint.ejected_until_s = max(endpoint.ejected_until_s, now_s + PRESSURE_S)


def most_ejected(replicas: int, max_fraction: float) -> int:
    """How many of a pool's replicas may be ejected at a time: never all."""
    return max(0, min(int(replicas * max_fraction), replicas - 1))


def without_ejected(endpoints: list[Endpoint], now_s: float, max_fraction: float) -> list[Endpoint]:
    """The endpoints, all of them ready, that requests may go to: those that are not ejected, and
    of those that are the least failing, where more are than may be."""
    ejected = [one for one in endpoints if one.ejected_until_s > now_s]
    if not ejected:
        return endpoints
    ejected.sort(key=_failure_rate)
    most = most_ejected(len(endpoints), max_fraction)
    out = {one.id for one in ejected[len(ejected) - most :]}
    return [one for one in endpoints if one.id not in out]


def _failure_rate(endpoint: Endpoint) -> float:
    return endpoint.failure_rate


class RetryBudget:
    """Retries as a part of requests, so that a pool that fails is not asked several times as much.

    Each request adds ``fraction`` of a retry, up to ``MOST``, which there are at the start.
    """

    MOST: Final = 10.0

    __slots__ = ("_left", "fraction")

    def __init__(self, fraction: float) -> None:
        self.fraction = fraction
        self._left = self.MOST

    def add_request(self) -> None:
        """A request came."""
        left = self._left + self.fraction
        self._left = left if left < self.MOST else self.MOST

    def take(self) -> bool:
        """Take one retry out, if there is one."""
        if self._left < 1.0:
            return False
        self._left -= 1.0
        return True
