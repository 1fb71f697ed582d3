"""Runs the data-path comparison: contenders take turns within rounds, one core for the router."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench import contenders, native, procs, scenarios, workload
from bench.contenders import Place, Running

REPLICAS = 4
DIRECT = "direct"


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What a run covers."""

    names: tuple[str, ...] = contenders.DEFAULT
    rounds: int = 5
    scale: float = 1.0
    """Windows are this much of their full length."""
    quick: bool = False
    router_core: int = 1
    other_core: int = 0
    scenarios: tuple[str, ...] = ()
    """Only these of the rounds' scenarios (and no held streams, no memory); empty: everything."""
    headers: workload.Headers = "openai"
    work: Path = Path(".tidegate")


@dataclass(slots=True, kw_only=True)
class Results:
    """Everything a run measured, as it came."""

    rounds: dict[str, dict[str, dict[int, dict[str, Any]]]] = field(
        default_factory=lambda: defaultdict(lambda: defaultdict(dict))
    )
    """Scenario → contender → round → the load generator's answer."""
    held: dict[str, dict[str, Any]] = field(default_factory=dict)
    memory: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    body_bytes: dict[str, int] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    """Contenders that did not start, and why."""
    elapsed_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """The parts every measurement needs."""

    programs: native.Programs
    place: Place
    replica: procs.Child
    requests: Path
    options: Options

    def load(self, shape: str, target: Running | None, arguments: Sequence[str]) -> dict[str, Any]:
        """One run of the load generator; ``target`` None: a replica itself."""
        port = self.place.replicas[0] if target is None else target.port
        watches: dict[str, tuple[int, ...]] = {"replica": (self.replica.pid,)}
        if target is not None:
            watches |= {"data": target.data_pids, "control": target.control_pids}
        argv = ["taskset", "-c", str(self.place.other_core), str(self.programs.loadgen)]
        argv += ["--port", str(port), "--requests", str(self.requests / shape), *arguments]
        for label, pids in watches.items():
            if pids:
                argv += ["--watch", f"{label}={','.join(map(str, pids))}"]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=90, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"load generator: {done.stderr.strip()}")
        result: dict[str, Any] = json.loads(done.stdout)
        return result


def _prepare_requests(folder: Path, options: Options) -> dict[str, int]:
    shapes = [s.shape for s in scenarios.ROUNDS] + list(scenarios.MEMORY)
    shapes.append(scenarios.HELD_QUICK if options.quick else scenarios.HELD)
    written: dict[str, int] = {}
    for shape in shapes:
        if shape.name not in written:
            written[shape.name] = workload.write_requests(
                shape, folder / shape.name, options.headers
            )
    return written


@contextlib.contextmanager
def opened(options: Options) -> Iterator[tuple[Bench, dict[str, int]]]:
    """Compile, write the requests, start the replicas; all gone afterwards."""
    options.work.mkdir(parents=True, exist_ok=True)
    programs = native.build(options.work.resolve() / "bench-native")
    peers = options.work.resolve() / "bench-peers"
    if any(name in contenders.PEERS for name in options.names):
        contenders.ensure_peers(peers)
    if "tidegate" in options.names:
        contenders.compile_tidegate()
    with tempfile.TemporaryDirectory(prefix="tidegate-bench-") as temporary:
        folder = Path(temporary)
        folder.chmod(0o755)
        body_bytes = _prepare_requests(folder, options)
        replica = procs.start(
            "replicas",
            [programs.replica, "--ports", str(REPLICAS), "--spin"],
            log=folder / "replicas.log",
            cores=[options.other_core],
            pipes=True,
        )
        with procs.stopping(replica):
            assert replica.popen.stdout is not None
            ports = tuple(int(p) for p in replica.popen.stdout.readline().split()[1:])
            place = Place(
                folder=folder,
                peers=peers,
                replicas=ports,
                core=options.router_core,
                other_core=options.other_core,
            )
            bench = Bench(
                programs=programs, place=place, replica=replica, requests=folder, options=options
            )
            yield bench, body_bytes


def _start(bench: Bench, results: Results) -> list[Running]:
    """Start what can be started; a contender that cannot is reported, the others still run."""
    running: list[Running] = []
    for name in bench.options.names:
        contender = contenders.CONTENDERS[name]
        try:
            running += contenders.start_all([name], bench.place)
            results.versions[name] = contender.version(bench.place)
        except (procs.NotReadyError, OSError, RuntimeError, KeyError, ValueError) as error:
            results.missing[name] = str(error)
            print(f"  {name} did not start: {error}", flush=True)
    return running


def _measure_rounds(bench: Bench, running: Sequence[Running], results: Results) -> None:
    options = bench.options
    chosen = [s for s in scenarios.ROUNDS if not options.scenarios or s.name in options.scenarios]
    for number in range(options.rounds):
        for scenario in chosen:
            arguments = scenario.arguments(options.scale)
            targets: list[Running | None] = [*running]
            # A different contender begins each time: none is always first after another's load.
            first = number % len(targets) if targets else 0
            targets = targets[first:] + targets[:first]
            if scenario.direct:
                targets.insert(0, None)
            for target in targets:
                name = DIRECT if target is None else target.name
                result = bench.load(scenario.shape.name, target, arguments)
                results.rounds[scenario.name][name][number] = result
                if result["errors"]["total"]:
                    print(f"  {scenario.name} {name}: {result['errors']['total']} errors, first: "
                          f"{result['first_error']}", flush=True)  # fmt: skip
        print(f"  round {number + 1} of {options.rounds} done", flush=True)


def _measure_fresh(bench: Bench, names: Sequence[str], results: Results) -> None:
    """Held streams and memory, each contender alone and freshly started."""
    quick = bench.options.quick
    shape = scenarios.HELD_QUICK if quick else scenarios.HELD
    for name in names:
        (target,) = contenders.start_all([name], bench.place)
        with procs.stopping(target.child):
            memory: dict[str, dict[str, Any]] = {}
            for one in scenarios.MEMORY:
                window_s = scenarios.MEMORY_WINDOW_S * (0.6 if quick else 1)
                memory[one.name] = bench.load(
                    one.name, target,
                    ["--connections", str(scenarios.MEMORY_CONNECTIONS), "--warmup-s", "0.3",
                     "--window-s", f"{window_s:g}"],
                )  # fmt: skip
            results.memory[name] = memory
        (target,) = contenders.start_all([name], bench.place)
        with procs.stopping(target.child):
            results.held[name] = bench.load(
                shape.name, target,
                ["--connections", str(scenarios.HELD_STREAMS), "--once", "--limit-s", "30",
                 "--spread-s", f"{scenarios.HELD_SPREAD_S:g}"],
            )  # fmt: skip


def run(options: Options) -> Results:
    """The whole comparison. Bounded: every load has its window, every wait its limit."""
    began_s = time.monotonic()
    results = Results()
    if len(os.sched_getaffinity(0)) < 2:
        raise RuntimeError("two cores are needed: one for the router, one for everything else")
    with opened(options) as (bench, body_bytes):
        results.body_bytes = body_bytes
        print(f"starting {len(options.names)} contenders", flush=True)
        running = _start(bench, results)
        with procs.stopping(*(one.child for one in running)):
            _measure_rounds(bench, running, results)
        if not options.scenarios:
            print("held streams and memory, each contender freshly started", flush=True)
            _measure_fresh(bench, [one.name for one in running], results)
    results.elapsed_s = time.monotonic() - began_s
    return results
