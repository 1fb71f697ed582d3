"""A control process that is killed and started again: how soon it has its engines back.

Seconds count from the start of the new process until every worker listens and both replicas are
ready with the processes they had before; beside them the seconds of the same `tidegate up` that
starts its engines itself. A round is one of each.
"""

from __future__ import annotations

import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import machine, procs, stats, tidegate

BAR_S = 2.0
"""Most seconds to the adopted replicas, by the slowest round."""
REPLICAS = 2
POOL = "kept"

_POOLS = f"""
[[pools]]
name = "{POOL}"
engine = "simulated"
model = "{POOL}"
min_replicas = {REPLICAS}
max_replicas = {REPLICAS}

[autoscaler]
keep_engines_s = 30
"""
_POLL_S = 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """Seconds of a cold start, and of the start after the kill."""

    cold_s: float
    adopted_s: float


def _pids(gate: tidegate.Tidegate) -> frozenset[int]:
    return frozenset(
        int(one["pid"]) for one in gate.pool(POOL)["replicas"] if one["state"] == "ready"
    )


def _start(folder: Path, limit_s: float) -> tuple[tidegate.Tidegate, frozenset[int], float]:
    """A Tidegate with both replicas ready, their engines, and the seconds it took."""
    began_s = time.monotonic()
    gate = tidegate.start(_POOLS, folder, limit_s=limit_s)
    while len(pids := _pids(gate)) < REPLICAS:
        if time.monotonic() - began_s > limit_s or gate.child.popen.poll() is not None:
            gate.child.stop()
            raise procs.NotReadyError(f"no {REPLICAS} replicas\n{gate.child.log_tail()}")
        time.sleep(_POLL_S)
    return gate, pids, time.monotonic() - began_s


def _measure(folder: Path, limit_s: float) -> Round:
    gate, before, cold_s = _start(folder, limit_s)
    gate.child.popen.kill()
    gate.child.popen.wait()
    gate, after, adopted_s = _start(folder, limit_s)
    with procs.stopping(gate.child):
        if after != before:
            raise RuntimeError(f"other engines than before the kill\n{gate.child.log_tail()}")
    return Round(cold_s=cold_s, adopted_s=adopted_s)


def run(rounds: int, limit_s: float, out: Path | None) -> int:
    """Print the table; write the record to ``out``. 1 where the bar is missed."""
    before = machine.counters()
    made: list[Round] = []
    for number in range(1, rounds + 1):
        with tempfile.TemporaryDirectory(prefix="tidegate-bench-") as folder:
            made.append(_measure(Path(folder), limit_s))
        print(f"round {number}: cold {made[-1].cold_s:.2f} s, adopted {made[-1].adopted_s:.2f} s")
    noise = machine.load(before, machine.counters())
    slowest_s = max(one.adopted_s for one in made)
    passed = slowest_s <= BAR_S
    for name in ("cold_s", "adopted_s"):
        found = stats.spread([getattr(one, name) for one in made])
        assert found is not None
        print(f"{name:10} median {found.median:.2f}, {found.low:.2f} to {found.high:.2f}")
    print(f"bar: at most {BAR_S:g} s in every round: {'met' if passed else 'missed'}")
    print(f"machine: {noise['busy_fraction']:.0%} busy")
    if out is not None:
        record: dict[str, Any] = {
            "bar_s": BAR_S,
            "rounds": [{"cold_s": one.cold_s, "adopted_s": one.adopted_s} for one in made],
            "machine": machine.describe(),
            "noise": noise,
        }
        out.write_text(json.dumps(record, indent=2) + "\n")
        print(f"wrote {out}")
    return 0 if passed else 1
