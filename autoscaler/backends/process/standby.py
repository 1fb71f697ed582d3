"""Engines that stand by: forked, ready but for their weights, until a replica is wanted."""

from __future__ import annotations

from dataclasses import dataclass

from autoscaler.backends.process.child import Child
from autoscaler.backends.process.procs import read_pss_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Standby:
    """An engine that is forked and waits for its weights. ``parked`` is false until it has come
    so far; ``pss_bytes`` is the memory of its processes, of what they share only their part."""

    pool: str
    pid: int
    parked: bool
    pss_bytes: int


def describe_standby(child: Child) -> Standby | None:
    """A standby that lives, or ``None``."""
    if child.process is None or child.family is None or child.process.poll() is not None:
        return None
    child.listen()
    return Standby(
        pool=child.spec.pool.name,
        pid=child.process.pid,
        parked=child.is_parked,
        pss_bytes=sum(read_pss_bytes(pid) or 0 for pid in child.family.pids()),
    )
