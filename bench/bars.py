"""The bars that Tidegate is held to, and whether a run meets them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from bench import stats

Costs = Mapping[str, Mapping[str, Mapping[int, float]]]
"""Scenario → contender → round → CPU seconds per unit (request or chunk)."""

SUBJECT = "tidegate"
LIMIT = "nginx"


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """One comparison. The ratio is units per CPU second of Tidegate over the other's."""

    text: str
    scenario: str
    against: Literal["nginx", "better peer", "better peer's round robin"]
    at_least: float


BARS = (
    Bar(text="small bodies, requests/s per core", scenario="small", against="better peer",
        at_least=1.6),
    Bar(text="small bodies, requests/s per core", scenario="small", against="nginx",
        at_least=0.6),
    Bar(text="32 kB prompts, requests/s per core", scenario="32kB", against="better peer",
        at_least=1.5),
    Bar(text="220 kB prompts, requests/s per core", scenario="220kB",
        against="better peer's round robin", at_least=1.0),
    Bar(text="streaming, chunks/s per core (CPU per chunk at most 1.15x)", scenario="stream",
        against="nginx", at_least=1 / 1.15),
)  # fmt: skip

MEMORY_GROWTH_LIMIT = 0.10
"""Resident bytes added per body byte added, with the model named before the prompt."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """One line of the report: ``passed`` is ``None`` where the run did not measure it."""

    text: str
    limit: str
    measured: str
    passed: bool | None


def _opponent(bar: Bar, by_contender: Mapping[str, Mapping[int, float]]) -> str | None:
    if bar.against == "nginx":
        return LIMIT if LIMIT in by_contender else None
    peers = {
        name: stats.spread(list(rounds.values()))
        for name, rounds in by_contender.items()
        if ":" in name and (bar.against == "better peer" or name.endswith(":round_robin"))
    }
    return stats.best(peers)


def judge(bar: Bar, costs: Costs, errors: Mapping[tuple[str, str], int]) -> Verdict:
    """Hold one bar against the measured costs; an error on Tidegate's side fails it."""
    by_contender = costs.get(bar.scenario, {})
    text, limit = f"{bar.text}, against {bar.against}", f"≥ {bar.at_least:.2f}x"
    subject, opponent = by_contender.get(SUBJECT), _opponent(bar, by_contender)
    if not subject or opponent is None:
        return Verdict(text=text, limit=limit, measured="not measured", passed=None)
    ratio = stats.paired_ratio(by_contender[opponent], subject)
    if ratio is None:
        return Verdict(text=text, limit=limit, measured="not measured", passed=None)
    measured = f"{ratio.median:.2f}x {opponent} ({ratio.low:.2f}–{ratio.high:.2f})"
    failures = errors.get((bar.scenario, SUBJECT), 0)
    if failures:
        measured += f", with {failures} errors"
    passed = ratio.median >= bar.at_least and not failures
    return Verdict(text=text, limit=limit, measured=measured, passed=passed)


def judge_memory(peaks_kib: Mapping[str, float], added_body_bytes: int, in_flight: int) -> Verdict:
    """Resident memory must not grow with the body: 220 kB against 880 kB, many in flight."""
    text = f"memory does not grow with the body ({in_flight} in flight, 220 → 880 kB)"
    limit = f"≤ {MEMORY_GROWTH_LIMIT:.0%} of the added bytes"
    if not {"rss-220kB", "rss-880kB"} <= peaks_kib.keys():
        return Verdict(text=text, limit=limit, measured="not measured", passed=None)
    grown_bytes = (peaks_kib["rss-880kB"] - peaks_kib["rss-220kB"]) * 1024
    fraction = grown_bytes / (added_body_bytes * in_flight)
    return Verdict(
        text=text,
        limit=limit,
        measured=f"{fraction:.1%} ({grown_bytes / 1e6:+.1f} MB)",
        passed=fraction <= MEMORY_GROWTH_LIMIT,
    )


def judge_held(result: Mapping[str, object] | None, streams: int) -> Verdict:
    """All streams open at one moment, and every one answered to its last byte."""
    text, limit = f"{streams:,} concurrent streams held", "all whole, no error"
    if result is None:
        return Verdict(text=text, limit=limit, measured="not measured", passed=None)
    done, errors, peak = (int(str(result[k])) for k in ("done", "errors", "peak_active"))
    return Verdict(
        text=text,
        limit=limit,
        measured=f"{done:,} whole, {errors} errors, {peak:,} open at once",
        passed=done == streams and errors == 0 and peak == streams,
    )
