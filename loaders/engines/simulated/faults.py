"""Scripted faults: what goes wrong, when and how often. Pure; chance comes from a seed.

A fault is written ``KIND[:name=value,name=value…]``. It counts requests and seconds from when it
was set: at start, or with ``POST /simulated/faults``. Only requests that work for a model count
and are hit, never ``/health``, ``/metrics`` or the like, unless the kind says otherwise.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from loaders.engines.base import START_PHASES

KINDS = {
    "crash": "the process exits at once with `code` (1), as a segfault or an OOM kill would end it",
    "hang": "`scope=process` (default): nothing answers any more, SIGTERM neither; "
    "`scope=engine`: the HTTP server is fine, no token comes; "
    "`scope=requests`: the requests hit are never answered",
    "slow": "every step takes `factor` (10) times as long",
    "error500": "answers `status` (500) in place of the answer",
    "cut": "the connection ends after `after_chunks` (4) chunks of a stream, "
    "or in place of a whole answer; `how=close` (default) or `how=reset`",
    "reset": "the connection is reset (RST) when the request was read; `on=connect`: when accepted",
    "accept_close": "connections are accepted and closed without a byte",
    "unhealthy": "GET /health answers 503",
}
"""Every kind, and what it does."""

TRIGGERS = {
    "after_requests": "spare the first N requests (connections, for faults of connections)",
    "at_s": "not before N seconds (of wall time, also with --virtual-time)",
    "for_s": "only for N seconds from then on",
    "every": "hit every Nth only",
    "times": "hit N times only",
    "probability": "hit with this probability, 0..1, drawn from --seed",
    "during": "`startup` (crash and hang only): while starting, `phase=` says in which phase",
}
"""Every parameter that says when, and its meaning."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One scripted fault. Where a trigger is ``None`` it does not restrict."""

    kind: str
    after_requests: int = 0
    at_s: float | None = None
    for_s: float | None = None
    every: int = 1
    times: int | None = None
    probability: float = 1.0
    during: str | None = None
    phase: str | None = None
    factor: float = 10.0
    status: int = 500
    after_chunks: int = 4
    how: str = "close"
    scope: str = "process"
    on: str = "request"
    code: int = 1

    @property
    def strikes(self) -> str:
        """What brings it about: ``startup``, ``clock``, ``connection``, ``request`` or, for one

        that holds for a while, ``standing``.
        """
        if self.during:
            return "startup"
        if self.kind in ("slow", "unhealthy") or (self.kind, self.scope) == ("hang", "engine"):
            return "standing"
        if self.kind == "accept_close" or self.on == "connect":
            return "connection"
        if self.at_s is not None and self.kind in ("crash", "hang") and self.scope == "process":
            return "clock"
        return "request"


_CHOICES = {
    "during": ("startup",),
    "phase": START_PHASES,
    "how": ("close", "reset"),
    "scope": ("process", "engine", "requests"),
    "on": ("request", "connect"),
}
_LEAST = {"every": 1, "times": 1, "status": 400, "factor": 0.001}
_OWN = {
    "crash": {"during", "phase", "code"},
    "hang": {"during", "phase", "scope"},
    "slow": {"factor"},
    "error500": {"status"},
    "cut": {"after_chunks", "how"},
    "reset": {"on"},
    "accept_close": set(),
    "unhealthy": set(),
}
_COMMON = {"after_requests", "at_s", "for_s", "every", "times", "probability"}


def parse(text: str) -> Fault:
    """The fault that ``text`` describes. Raises ``ValueError`` with what would be right."""
    kind, _, rest = text.partition(":")
    kind = kind.strip().replace("-", "_")
    if kind not in KINDS:
        raise ValueError(f"unknown fault {kind!r}: one of {', '.join(KINDS)}")
    types = {f.name: str(f.type) for f in fields(Fault)}
    values: dict[str, Any] = {}
    for item in filter(None, (part.strip() for part in rest.split(","))):
        name, equals, value = (part.strip() for part in item.partition("="))
        allowed = _COMMON | _OWN[kind]
        if not equals or name not in allowed:
            raise ValueError(f"fault {kind}: {item!r} is not one of {', '.join(sorted(allowed))}")
        values[name] = _value(f"fault {kind}: {name}", name, value, types[name])
    return Fault(kind=kind, **values)


def _value(what: str, name: str, text: str, kind: str) -> Any:
    if name in _CHOICES:
        if text not in _CHOICES[name]:
            raise ValueError(f"{what} must be one of {', '.join(_CHOICES[name])}, is {text!r}")
        return text
    try:
        number = float(text) if "float" in kind else int(text)
    except ValueError:
        raise ValueError(f"{what} must be a number, is {text!r}") from None
    least = _LEAST.get(name, 0)
    most = 1.0 if name == "probability" else 599 if name == "status" else 1e12
    if not least <= number <= most:
        raise ValueError(f"{what} must be between {least} and {most:g}, is {text}")
    return number


class _Armed:
    __slots__ = ("armed_s", "eligible", "fault", "hits", "seen", "started_s", "text")

    def __init__(self, text: str, fault: Fault, now: float) -> None:
        self.text = text
        self.fault = fault
        self.armed_s = now
        self.seen = self.eligible = self.hits = 0
        self.started_s: float | None = None

    def over(self, now: float) -> bool:
        fault = self.fault
        if fault.times is not None and self.hits >= fault.times:
            return True
        began = self.started_s
        return began is not None and fault.for_s is not None and now >= began + fault.for_s

    def begun(self, now: float) -> bool:
        fault = self.fault
        if now < self.armed_s + (fault.at_s or 0.0) or self.seen < fault.after_requests:
            return False
        if self.started_s is None:
            self.started_s = now
        return not self.over(now)


class FaultPlan:
    """The faults that are set. ``now`` is any clock that only goes forward."""

    def __init__(self, seed: int = 0) -> None:
        self._rng = random.Random(seed)
        self._armed: list[_Armed] = []

    def arm(self, texts: Sequence[str], now: float) -> None:
        """Set these faults in place of all that were. Raises ``ValueError``, changing nothing."""
        self._armed = [_Armed(text, parse(text), now) for text in texts]

    def describe(self) -> list[dict[str, Any]]:
        """What is set, and how often each hit."""
        return [{"fault": a.text, "seen": a.seen, "hits": a.hits} for a in self._armed]

    def __bool__(self) -> bool:
        return bool(self._armed)

    def hit(self, strikes: str, now: float) -> Fault | None:
        """One more request (or connection) passes: the first fault that hits it."""
        found: Fault | None = None
        for armed in self._armed:
            fault = armed.fault
            if fault.strikes != strikes:
                continue
            begun = armed.begun(now)
            armed.seen += 1
            if not begun or found is not None:
                continue
            armed.eligible += 1
            if armed.eligible % fault.every:
                continue
            if fault.probability < 1 and self._rng.random() >= fault.probability:
                continue
            armed.hits += 1
            found = fault
        return found

    def count(self) -> None:
        """One more request passes, for the faults that hold from so many requests on."""
        for armed in self._armed:
            if armed.fault.strikes == "standing":
                armed.seen += 1

    def standing(self, kind: str, now: float) -> Fault | None:
        """The fault of ``kind`` that holds at ``now``."""
        for armed in self._armed:
            fault = armed.fault
            if fault.kind == kind and fault.strikes == "standing" and armed.begun(now):
                return fault
        return None

    def due(self, now: float) -> Fault | None:
        """The fault that the clock brings about by ``now``, each one once."""
        for armed in self._armed:
            if armed.fault.strikes == "clock" and not armed.hits and armed.begun(now):
                armed.hits = 1
                return armed.fault
        return None

    def during_startup(self, phase: str) -> Fault | None:
        """The fault that strikes in start-up ``phase``: the first, where it names none."""
        for armed in self._armed:
            fault = armed.fault
            if fault.during and (fault.phase or START_PHASES[0]) == phase:
                return fault
        return None

    def next_s(self, now: float) -> float | None:
        """When something begins or ends by time alone, or ``None``: look again then."""
        times = []
        for armed in self._armed:
            if armed.fault.at_s is not None:
                times.append(armed.armed_s + armed.fault.at_s)
            if armed.started_s is not None and armed.fault.for_s is not None:
                times.append(armed.started_s + armed.fault.for_s)
        return min((at for at in times if at > now), default=None)
