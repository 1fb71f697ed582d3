"""What to evict: a pure function of what there is, how it is used, and how much room is wanted.

Each revision is worth the seconds it would cost to load again, spread over the time until it will
be used next; what is worth least for the bytes it frees goes first. The next use is what the
caller expects, or, without that, as far ahead as the last one is behind: so without
expectations, and with equal costs, the order is LRU. An expectation that has passed counts for as
long again as it is overdue, then fades like any other. What is spare goes before all that.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

RELOAD_S_PER_GB = 1.0
"""What a GB costs to load again where it was not measured; equal for all, so it orders
nothing."""

LEAST_DISTANCE_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class EvictionCandidate:
    """One revision (or one that was never finished) as eviction sees it.

    ``parts`` are the bytes that would go with it, by name of blob or partial file; a part that
    another revision has too goes only with the last of them. ``kept_because`` says why it must stay
    (``leased by …``, ``pinned``), empty if it need not. ``spare``: it is not used while what was
    made of it is there, so it goes before whatever is used.
    """

    key: str
    parts: Mapping[str, int]
    kept_because: str = ""
    spare: bool = False
    used_at_s: float | None = None
    expected_use_at_s: float | None = None
    reload_s_per_gb: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What to evict, in order, and what that frees. ``enough`` is false where all that may go
    would not do; ``keys`` is empty then."""

    keys: tuple[str, ...]
    bytes_freed: int
    enough: bool
    kept: Mapping[str, str] = field(default_factory=dict)
    """Why what stays has to, by key."""


def choose(candidates: Sequence[EvictionCandidate], bytes_needed: int, now_s: float) -> Choice:
    """The least valuable candidates that together free ``bytes_needed``, each of them needed."""
    kept = {
        candidate.key: candidate.kept_because for candidate in candidates if candidate.kept_because
    }
    if bytes_needed <= 0:
        return Choice(keys=(), bytes_freed=0, enough=True, kept=kept)
    order = sorted(
        (candidate for candidate in candidates if not candidate.kept_because),
        key=lambda candidate: (not candidate.spare, worth(candidate, now_s), candidate.key),
    )
    going = Going(candidates)
    for candidate in order:
        if going.bytes_freed >= bytes_needed:
            break
        going.add(candidate)
    if going.bytes_freed < bytes_needed:
        return Choice(keys=(), bytes_freed=going.bytes_freed, enough=False, kept=kept)
    # What was taken early may have become superfluous by something bigger that came after.
    for candidate in reversed(list(going.chosen.values())):
        going.drop(candidate)
        if going.bytes_freed < bytes_needed:
            going.add(candidate)
    return Choice(
        keys=tuple(candidate.key for candidate in order if candidate.key in going.chosen),
        bytes_freed=going.bytes_freed,
        enough=True,
        kept=kept,
    )


class Going:
    """Candidates chosen to go, and the bytes that go with them: parts that no other candidate
    has."""

    def __init__(self, candidates: Iterable[EvictionCandidate]) -> None:
        self.chosen: dict[str, EvictionCandidate] = {}
        self.bytes_freed = 0
        self._holders = Counter(part for candidate in candidates for part in candidate.parts)

    def add(self, candidate: EvictionCandidate) -> None:
        """Let one more go."""
        self.chosen[candidate.key] = candidate
        for part, size_bytes in candidate.parts.items():
            self._holders[part] -= 1
            if self._holders[part] == 0:
                self.bytes_freed += size_bytes

    def drop(self, candidate: EvictionCandidate) -> None:
        """Let one stay after all."""
        del self.chosen[candidate.key]
        for part, size_bytes in candidate.parts.items():
            if self._holders[part] == 0:
                self.bytes_freed -= size_bytes
            self._holders[part] += 1


def worth(candidate: EvictionCandidate, now_s: float) -> float:
    """Seconds of loading, for a GB of it, over the seconds until its next use."""
    cost = candidate.reload_s_per_gb
    return (RELOAD_S_PER_GB if cost is None else cost) / distance_s(candidate, now_s)


def distance_s(candidate: EvictionCandidate, now_s: float) -> float:
    """How far away the next use is taken to be."""
    if candidate.expected_use_at_s is not None:
        return max(abs(candidate.expected_use_at_s - now_s), LEAST_DISTANCE_S)
    if candidate.used_at_s is None:
        return max(now_s, LEAST_DISTANCE_S)
    return max(now_s - candidate.used_at_s, LEAST_DISTANCE_S)
