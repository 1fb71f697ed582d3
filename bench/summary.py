"""From what the load generator saw to the figures of the report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bench import bars, scenarios, stats

Rounds = Mapping[str, Mapping[str, Mapping[int, Mapping[str, Any]]]]
"""Scenario → contender → round → the load generator's answer."""


def units(unit: str, result: Mapping[str, Any]) -> int:
    """How many requests or chunks ended inside the window."""
    return int(result["events" if unit == "chunk" else "done"])


def costs(rounds: Rounds) -> dict[str, dict[str, dict[int, float]]]:
    """CPU seconds of the data path per request or chunk. Rounds without any are left out."""
    made: dict[str, dict[str, dict[int, float]]] = {}
    for scenario in scenarios.ROUNDS:
        for name, by_round in rounds.get(scenario.name, {}).items():
            for number, result in by_round.items():
                count, data = units(scenario.unit, result), result["watch"].get("data")
                if count and data:
                    cost_s = data["cpu_s"] / count
                    made.setdefault(scenario.name, {}).setdefault(name, {})[number] = cost_s
    return made


def errors(rounds: Rounds) -> dict[tuple[str, str], int]:
    """(scenario, contender) → failed requests, all rounds together."""
    return {
        (scenario, name): sum(int(result["errors"]["total"]) for result in by_round.values())
        for scenario, by_contender in rounds.items()
        for name, by_round in by_contender.items()
    }


def _spread_of(by_round: Mapping[int, float], factor: float = 1.0) -> dict[str, float] | None:
    found = stats.spread([value * factor for value in by_round.values()])
    return None if found is None else {
        "median": found.median, "low": found.low, "high": found.high, "rounds": found.rounds
    }  # fmt: skip


def table(rounds: Rounds) -> dict[str, dict[str, dict[str, Any]]]:
    """Scenario → contender → figures: medians and spreads over the rounds."""
    cost = costs(rounds)
    failed = errors(rounds)
    made: dict[str, dict[str, dict[str, Any]]] = {}
    for scenario in scenarios.ROUNDS:
        for name, by_round in rounds.get(scenario.name, {}).items():
            own = cost.get(scenario.name, {}).get(name, {})
            row: dict[str, Any] = {
                "cpu_ms_per_1000": _spread_of(own, 1e6),
                "per_cpu_s": _spread_of({r: 1 / c for r, c in own.items() if c > 0}),
                "per_s": _spread_of(
                    {r: units(scenario.unit, x) / x["window_s"] for r, x in by_round.items()}
                ),
                "router_core_use": _spread_of(
                    {r: x["watch"]["data"]["cpu_s"] / x["window_s"]
                     for r, x in by_round.items() if "data" in x["watch"]}
                ),
                "control_cpu_fraction": _spread_of(
                    {r: x["watch"]["control"]["cpu_s"] / x["window_s"]
                     for r, x in by_round.items() if "control" in x["watch"]}
                ),
                "chunks_per_read": _spread_of(
                    {r: x["events"] / x["reads"] for r, x in by_round.items() if x.get("reads")}
                ) if scenario.unit == "chunk" else None,
                "errors": failed[(scenario.name, name)],
            }  # fmt: skip
            for against in (bars.LIMIT, "better peer"):
                row[f"ratio_to_{against.replace(' ', '_')}"] = _ratio(
                    cost.get(scenario.name, {}), name, against
                )
            made.setdefault(scenario.name, {})[name] = row
    return made


def _ratio(
    by_contender: Mapping[str, Mapping[int, float]], name: str, against: str
) -> dict[str, Any] | None:
    """Units per CPU second over the other's, round by round."""
    other: str | None = against
    if against == "better peer":
        other = stats.best(
            {n: stats.spread(list(r.values())) for n, r in by_contender.items() if ":" in n}
        )
    if other is None or other not in by_contender or name not in by_contender:
        return None
    found = stats.paired_ratio(by_contender[other], by_contender[name])
    if found is None:
        return None
    return {"of": other, "median": found.median, "low": found.low, "high": found.high}


def added_latency(rounds: Rounds, direct: str) -> dict[str, dict[str, Any]]:
    """Contender → microseconds that it adds to a replica's own answer, at a modest fixed rate."""
    latency = rounds.get("latency", {})
    base = latency.get(direct, {})
    made: dict[str, dict[str, Any]] = {}
    for name, by_round in latency.items():
        row: dict[str, Any] = {}
        for quantile in ("p50", "p99"):
            own = {r: x["latency_us"][quantile] for r, x in by_round.items()
                   if quantile in x["latency_us"]}  # fmt: skip
            row[quantile] = _spread_of(own)
            row[f"added_{quantile}"] = _spread_of(
                {r: value - base[r]["latency_us"][quantile] for r, value in own.items()
                 if r in base and quantile in base[r]["latency_us"]}
            )  # fmt: skip
        made[name] = row
    return made


def memory(results: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> dict[str, dict[str, float]]:
    """Contender → load → highest resident KiB of its data path."""
    return {
        name: {load: x["watch"]["data"]["rss_peak_kib"] for load, x in by_load.items()}
        for name, by_load in results.items()
    }


def verdicts(
    rounds: Rounds,
    held: Mapping[str, Mapping[str, Any]],
    peaks_kib: Mapping[str, Mapping[str, float]],
    body_bytes: Mapping[str, int],
) -> list[bars.Verdict]:
    """Every bar, judged."""
    cost, failed = costs(rounds), errors(rounds)
    made = [bars.judge(bar, cost, failed) for bar in bars.BARS]
    added = body_bytes.get("rss-880kB", 0) - body_bytes.get("rss-220kB", 0)
    made.append(
        bars.judge_memory(
            peaks_kib.get(bars.SUBJECT, {}), max(added, 1), scenarios.MEMORY_CONNECTIONS
        )
    )
    seen = held.get(bars.SUBJECT)
    flat = None if seen is None else {
        "done": seen["done"], "errors": seen["errors"]["total"], "peak_active": seen["peak_active"]
    }  # fmt: skip
    made.append(bars.judge_held(flat, scenarios.HELD_STREAMS))
    return made
