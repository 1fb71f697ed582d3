"""The decisions of the recent past, for ``tidegate explain``."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import replace

from autoscaler.types import Bound, Decision, PastDecision, ScaleReason, Signal


class DecisionHistory:
    """The newest decisions of each pool, bounded in number. Equal ones in a row count as one."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._pools: dict[str, deque[PastDecision]] = {}
        self._counts: Counter[tuple[str, ScaleReason]] = Counter()

    def add(self, decision: Decision) -> None:
        """Take in a decision, as a repetition of the newest where it says the same.

        A repetition keeps the time of the first and shows the figures of the last.
        """
        past = self._pools.setdefault(decision.pool, deque(maxlen=self._size))
        self._counts[decision.pool, decision.reason] += 1
        if past and same(past[-1].decision) == same(decision):
            last = past.pop()
            past.append(
                replace(last, decision=decision, count=last.count + 1, last_at_s=decision.at_s)
            )
            return
        past.append(
            PastDecision(
                decision=decision,
                count=1,
                first_at_s=decision.at_s,
                last_at_s=decision.at_s,
            )
        )

    def forget(self, pool: str) -> None:
        """The pool is gone: drop its decisions."""
        self._pools.pop(pool, None)
        for key in [key for key in self._counts if key[0] == pool]:
            del self._counts[key]

    def of(self, pool: str) -> list[PastDecision]:
        """The decisions of one pool, newest last; none for a pool without any."""
        return list(self._pools.get(pool, ()))

    def counts(self) -> Mapping[tuple[str, ScaleReason], int]:
        """How many decisions there were since the start, by pool and reason."""
        return dict(self._counts)


def same(decision: Decision) -> tuple[int, int, ScaleReason, Signal, Bound | None, bool]:
    """What two decisions must share to say the same: all but their time and their figures."""
    return (
        decision.desired,
        decision.supply,
        decision.reason,
        decision.signal,
        decision.bound,
        decision.panicking,
    )
