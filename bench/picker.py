"""What the endpoint picker costs: Envoy that asks it for each request, beside Envoy alone.

Three ways to the same four replicas, in turns within each round: Envoy by itself (round robin, no
ext_proc), Envoy that asks the picker (the configuration in ``deploy/envoy``), and Tidegate's own
gateway, which is the same process tree. Envoy (one thread) and whatever it asks share one core,
load generator and replicas have the other, so requests/s are those of one core. CPU is the run time
of all threads, as in ``bench datapath``.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import contenders, envoy, machine, native, procs, scenarios, stats, tidegate, workload
from bench.workload import Shape

REPLICAS = 4
ALONE, PICKER, GATEWAY = "Envoy alone", "Envoy with the picker", "Tidegate's gateway"

_POOL = """
[gateway.picker]
port = 0

[[pools]]
name = "{model}"
backend = "static"
max_inflight_requests = 1024
[pools.static]
urls = [{urls}]
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """One load: ``unit`` is what is counted of it."""

    name: str
    shape: Shape
    arguments: Mapping[str, float]
    unit: str = "requests"


_KB = 1000
LOADS = (
    Load(
        name="small bodies (0.6 kB)",
        shape=scenarios.SMALL,
        arguments={"connections": 16, "warmup-s": 0.5, "window-s": 3.0},
    ),
    Load(
        name="300 kB prompts",
        shape=Shape(name="300kB", prompt_bytes=300 * _KB, variants=16),
        arguments={"connections": 8, "warmup-s": 0.5, "window-s": 3.0},
    ),
    Load(
        name="20 streams of 50 chunks/s",
        shape=scenarios.STREAM,
        arguments={
            "connections": 20,
            "warmup-s": 2.1,
            "window-s": 3.0,
            "spread-s": 2,
            "drain-s": 0,
        },
        unit="chunks",
    ),
    Load(
        name="small bodies at 50 requests/s",
        shape=scenarios.SMALL,
        arguments={"connections": 8, "warmup-s": 0.5, "window-s": 5.0, "rate": 50},
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """Where the load goes, and the processes whose CPU counts."""

    name: str
    port: int
    envoy: tuple[int, ...] = ()
    picker: tuple[int, ...] = ()


def _measure(
    programs: native.Programs, way: Way, load: Load, requests: Path, core: int
) -> dict[str, Any]:
    argv = ["taskset", "-c", str(core), str(programs.loadgen), "--port", str(way.port)]
    argv += ["--requests", str(requests)]
    for name, value in load.arguments.items():
        argv += [f"--{name}", f"{value:g}"]
    for label, pids in (("envoy", way.envoy), ("tidegate", way.picker)):
        if pids:
            argv += ["--watch", f"{label}={','.join(map(str, pids))}"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=90, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"load generator: {done.stderr.strip()}")
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def _start(
    stack: ExitStack, folder: Path, ports: Sequence[int], cores: tuple[int, int]
) -> list[Way]:
    core, other = cores
    urls = ", ".join(f'"http://127.0.0.1:{port}"' for port in ports)
    pool = _POOL.format(model=workload.MODEL, urls=urls)
    gate = tidegate.start(pool, folder / "tidegate", cores=[other])
    stack.enter_context(procs.stopping(gate.child))
    status = gate.status()
    pids = {entry["kind"]: int(entry["pid"]) for entry in status["workers"]}
    procs.pin(pids.values(), core)
    alone = envoy.example()
    envoy.round_robin(alone, [f"127.0.0.1:{port}" for port in ports])
    ways = [Way(name=GATEWAY, port=gate.port, picker=(pids["http"],))]
    for name, config, asked in ((ALONE, alone, ()), (PICKER, None, (pids["picker"],))):
        started = envoy.envoy(
            folder / name.replace(" ", "-"), status["picker"], config, cores=[core]
        )
        url, pid = stack.enter_context(started)
        port = int(url.rpartition(":")[2])
        ways.append(Way(name=name, port=port, envoy=(pid,), picker=asked))
    return ways


def run(rounds: int, out: Path, command: str, date: str) -> int:
    """Measure, print, and write a report into ``out``. 1 where an answer was wrong."""
    cores = sorted(os.sched_getaffinity(0))[:2]
    core, other = cores[0], cores[-1]
    contenders.compile_tidegate()
    programs = native.build(Path(".tidegate").resolve() / "bench-native")
    before = machine.counters()
    made: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="tidegate-bench-") as temporary, ExitStack() as stack:
        folder = Path(temporary)
        for load in LOADS:
            workload.write_requests(load.shape, folder / load.shape.name)
        replica = procs.start(
            "replicas",
            [programs.replica, "--ports", str(REPLICAS)],
            log=folder / "replicas.log",
            cores=[other],
            pipes=True,
        )
        stack.enter_context(procs.stopping(replica))
        assert replica.popen.stdout is not None
        ports = [int(port) for port in replica.popen.stdout.readline().split()[1:]]
        ways = _start(stack, folder, ports, (core, other))
        for number in range(rounds):
            for load in LOADS:
                for way in ways[number % len(ways) :] + ways[: number % len(ways)]:
                    result = _measure(programs, way, load, folder / load.shape.name, other)
                    made.append({"round": number, "load": load.name, "way": way.name, **result})
            print(f"round {number + 1} of {rounds}")
        for error in sorted({one["first_error"] for one in made} - {""}):
            print(f"error: {error}")
    noise = machine.load(before, machine.counters())
    text = _report(made, command, date, noise)
    print(text)
    record = {"command": command, "machine": machine.describe(), "noise": noise, "runs": made}
    out.mkdir(parents=True, exist_ok=True)
    (out / f"picker-{date}.md").write_text(text)
    (out / f"picker-{date}.json").write_text(json.dumps(record, indent=1) + "\n")
    return 1 if any(one["errors"]["total"] for one in made) else 0


def _report(
    made: Sequence[Mapping[str, Any]], command: str, date: str, noise: Mapping[str, float]
) -> str:
    described = machine.describe()
    lines = [
        f"# The endpoint picker, {date}",
        "",
        f"`{command}`, {described.get('cpu')}, {described.get('cores')} cores, the machine busy to "
        f"{noise['busy_fraction']:.0%}. Medians, lowest and highest of "
        f"{1 + max(one['round'] for one in made)} rounds. Envoy and the picker share one core.",
        "",
        "| load | way | per s | Envoy, CPU µs each | Tidegate, CPU µs each | p50 ms | p99 ms "
        "| errors |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for load in LOADS:
        for way in (ALONE, PICKER, GATEWAY):
            runs = [one for one in made if (one["load"], one["way"]) == (load.name, way)]
            counts = [one["done" if load.unit == "requests" else "events"] for one in runs]
            cells = [
                _cell([n / one["window_s"] for n, one in zip(counts, runs, strict=True)], 0),
                *(
                    _cell(
                        [
                            one["watch"][label]["cpu_s"] / n * 1e6
                            for n, one in zip(counts, runs, strict=True)
                            if label in one["watch"] and n
                        ],
                        0,
                    )
                    for label in ("envoy", "tidegate")
                ),
                *(_cell(_quantile(runs, load, name), 2) for name in ("p50", "p99")),
                str(sum(one["errors"]["total"] for one in runs)),
            ]
            lines.append(f"| {load.name} ({load.unit}) | {way} | {' | '.join(cells)} |")
    paced = next(load for load in LOADS if "rate" in load.arguments)
    by_round: dict[str, dict[int, float]] = {ALONE: {}, PICKER: {}}
    for one in made:
        if one["load"] == paced.name and one["way"] in by_round and "p50" in one["latency_us"]:
            by_round[one["way"]][one["round"]] = one["latency_us"]["p50"] / 1000
    shared = by_round[ALONE].keys() & by_round[PICKER].keys()
    added = [by_round[PICKER][number] - by_round[ALONE][number] for number in shared]
    lines += ["", f"Added by the picker at 50 requests/s, p50: {_cell(added, 2)} ms.", ""]
    return "\n".join(lines)


def _quantile(runs: Sequence[Mapping[str, Any]], load: Load, name: str) -> list[float]:
    if load.unit != "requests":
        return []
    return [one["latency_us"][name] / 1000 for one in runs if name in one["latency_us"]]


def _cell(values: Sequence[float], digits: int) -> str:
    found = stats.spread(values)
    if found is None:
        return "–"
    return f"{found.median:,.{digits}f} ({found.low:,.{digits}f}–{found.high:,.{digits}f})"
