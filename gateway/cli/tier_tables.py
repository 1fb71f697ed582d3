"""What ``tidegate status`` says of the tiers of warmth: which a pool has, and what each costs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from gateway.cli.figures import duration, one_line


def warmth_lines(pools: Iterable[Mapping[str, Any]]) -> list[str]:
    """A line for each pool: measured wakes from hot to cold, and when the next step down is due."""
    return [line for pool in pools if (line := warmth_line(pool))]


def warmth_line(pool: Mapping[str, Any]) -> str:
    """``chat: wakes from forked in 3.1 s, paged in 5.2 s; colder in 4 min``; nothing to say of a
    pool without tiers."""
    tiers = pool.get("tiers") or []
    here = [one for one in tiers if one.get("available")]
    if not here:
        return ""
    said = ", ".join(wake(one) for one in here)
    text = f"{pool.get('name')}: wakes from {said}"
    left_s = pool.get("step_down_in_s")
    if left_s is not None:
        text += f"; colder in {duration(left_s)}"
    for one in tiers:
        if one.get("why_not"):
            text += f"; not {one.get('tier')}: {one.get('why_not')}"
    return one_line(text)


def wake(tier: Mapping[str, Any]) -> str:
    """A tier and its usual wake time, where it was measured."""
    measured = tier.get("wake_s")
    return f"{tier.get('tier')}" + ("" if measured is None else f" in {duration(measured)}")


def fork_lines(server: Mapping[str, Any] | None) -> list[str]:
    """How the fork server is, and what it and each engine that stands by take of the memory;
    nothing where there is to be none."""
    if server is None:
        return []
    state = server.get("state")
    if state != "ready":
        plain = "" if state == "importing" else ": engines start plainly"
        return [one_line(f"fork server: {state} ({server.get('reason')}){plain}")]
    parts = [f"fork server: ready, {memory(server.get('pss_bytes'))}"]
    for one in server.get("standbys") or []:
        ready = "stands by" if one.get("parked") else "is on its way to stand by"
        parts.append(f"{one.get('pool')} {ready}, {memory(one.get('pss_bytes'))}")
    return [one_line("; ".join(parts))]


def memory(size_bytes: float | None) -> str:
    """Memory in MB; ``?`` for unknown."""
    return "?" if size_bytes is None else f"{size_bytes / 1e6:.0f} MB"
