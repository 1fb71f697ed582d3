"""How fast the adapter answers HPA, and what it costs: 500 HPAs, and 200 requests a second.

`tidegate adapter` as it runs in a cluster: TLS, the front proxy's client certificate, permissions
asked of an API server. What it asks is in a process beside it: the admin API of a Tidegate with 500
pools of two replicas, each of which changes every second, and an API server that allows everything
after 5 ms. The load is open: requests are sent at their times whatever became of earlier ones, over
kept connections, as the API server's aggregator sends them: one that is free, else a new one. A
latency counts from the time at which a request was due. All processes share the machine's cores.

So the same client asks a floor too, in the same run: a TLS server that reads a head, and answers
the same bytes to everybody. What the client and the machine take is in both columns.

- `500 HPAs`: each polls its metric every 15 s, all at other times.
- `200 requests/s`: external metrics of one pool and of all, and the pods of one.
- both at once.
"""

from __future__ import annotations

import asyncio
import json
import math
import multiprocessing
import os
import random
import ssl
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psutil
import uvloop
from prometheus_client.parser import text_string_to_metric_families
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp

from autoscaler.adapters.types import (
    ForecastQuantile,
    KubernetesObject,
    LatencyQuantiles,
    PoolSignals,
    ReplicaSignals,
)
from bench import procs, stats
from gateway.admin.schema import SignalsAnswer
from gateway.admin.server import serve_admin
from gateway.compose.listeners import listen

POOLS = 500
REPLICAS_EACH = 2
PERIOD_S = 15.0
RATE = 200.0
MOST_CONNECTIONS = 64
FLOOR_BODY = b"{" + b" " * 400 + b"}"
"""About as long as the list of one value."""
REVIEW_S = 0.005
BAR_P99_S = 0.010
SCHEDULING = {
    os.SCHED_RR: "real-time (`chrt -r 5`), so that other processes do not delay it",
    os.SCHED_FIFO: "real-time (`chrt -f`), so that other processes do not delay it",
}
TOKEN = "the-token-of-the-bench"
EXTERNAL = "/apis/external.metrics.k8s.io/v1beta1/namespaces/default"
CUSTOM = "/apis/custom.metrics.k8s.io/v1beta2/namespaces/default"
NAMES = (
    "tidegate_desired_replicas",
    "tidegate_inflight_tokens",
    "tidegate_queued_requests",
    "tidegate_requests_per_second",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """Requests due at these seconds, by path."""

    name: str
    due: tuple[tuple[float, str], ...]


@dataclass(slots=True)
class Outcome:
    """Latencies of answers with 200, and how many others there were."""

    latencies_s: list[float] = field(default_factory=list)
    errors: int = 0
    connections: int = 0


def make_pools() -> tuple[PoolSignals, ...]:
    """Pools of which everything is known."""
    quantiles = LatencyQuantiles(p50_s=0.1, p95_s=0.5, p99_s=0.9)
    forecast = tuple(
        ForecastQuantile(horizon=horizon, horizon_s=60.0, quantile=level, tokens_per_s=1e3 * level)
        for horizon in ("lead", "1m", "5m", "15m")
        for level in (0.5, 0.9, 0.95, 0.99)
    )
    return tuple(
        PoolSignals(
            pool=f"org/model-{number}", slug=f"org-model-{number}", active=True, window_s=60.0,
            objects=(
                KubernetesObject(
                    group="apps", resource="deployments", namespace="default",
                    name=f"model-{number}", labels={"app": f"model-{number}"},
                ),
            ),
            requests_per_s=2.5, input_tokens_per_s=300.0, output_tokens_per_s=80.0,
            queued_requests=1, queued_tokens=300, inflight_requests=8, inflight_tokens=4_000,
            queue_wait=quantiles, ttft=quantiles, itl=quantiles, e2e=quantiles,
            kv_cache_usage_mean_fraction=0.4, kv_cache_usage_max_fraction=0.6,
            gpu_utilization_fraction=0.9, ready_replicas=REPLICAS_EACH, desired_replicas=3,
            forecast=forecast,
            replicas=tuple(
                ReplicaSignals(
                    replica=f"model-{number}-{each}", ready=True, inflight_requests=4,
                    inflight_tokens=2_000, running_requests=3, waiting_requests=1,
                    kv_cache_usage_fraction=0.4,
                    pod=KubernetesObject(
                        resource="pods", namespace="default", name=f"model-{number}-{each}",
                        labels={"app": f"model-{number}"},
                    ),
                )
                for each in range(REPLICAS_EACH)
            ),
        )
        for number in range(POOLS)
    )  # fmt: skip


def admin_app(pools: tuple[PoolSignals, ...]) -> ASGIApp:
    """The admin API, as far as the adapter asks it."""
    # What is said of a pool is another each time, as of one that is in use.
    bodies = [
        SignalsAnswer(
            version=1, at_s=0.0, pools=tuple(replace(one, queued_tokens=turn) for one in pools)
        )
        .model_dump_json()
        .encode()
        for turn in range(2)
    ]

    async def app(scope: Any, receive: Any, send: Any) -> None:
        wait_s = float(Request(scope).query_params.get("wait_s", 0.0))
        await asyncio.sleep(wait_s)
        bodies.reverse()
        await Response(bodies[0], media_type="application/json")(scope, receive, send)

    return app


def api_server_app(front_proxy_ca: str, asked: Any) -> ASGIApp:
    """An API server that knows the front proxy, and allows everything; ``asked`` counts."""
    data = {
        "requestheader-client-ca-file": front_proxy_ca,
        "requestheader-allowed-names": '["front-proxy-client"]',
    }

    async def app(scope: Any, receive: Any, send: Any) -> None:
        path = scope["path"]
        asked.value += 1
        await asyncio.sleep(REVIEW_S)
        if "configmaps" in path:
            found: dict[str, Any] = {"kind": "ConfigMap", "apiVersion": "v1", "data": data}
        else:
            found = json.loads(await Request(scope, receive).body())
            found["status"] = {"allowed": True}
        await JSONResponse(found, 200)(scope, receive, send)

    return app


Pair = tuple[Path, Path]
"""A certificate and its key."""


def make_authority(folder: Path, name: str) -> Pair:
    """One that signs."""
    certificate, key = folder / f"{name}.crt", folder / f"{name}.key"
    _openssl("req", "-x509", *NEW_KEY, "-keyout", key, "-out", certificate, "-subj", f"/CN={name}")
    return certificate, key


def issue(folder: Path, authority: Pair, name: str) -> Pair:
    """A certificate of this name."""
    certificate, key = folder / f"{name}.crt", folder / f"{name}.key"
    asked, names = folder / f"{name}.csr", folder / f"{name}.ext"
    names.write_text(f"subjectAltName=DNS:{name}\n")
    _openssl("req", *NEW_KEY, "-keyout", key, "-out", asked, "-subj", f"/CN={name}")
    _openssl("x509", "-req", "-in", asked, "-CA", authority[0], "-CAkey", authority[1],
             "-CAcreateserial", "-out", certificate, "-extfile", names)  # fmt: skip
    return certificate, key


NEW_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")


def _openssl(*arguments: str | Path) -> None:
    subprocess.run(["openssl", *arguments], check=True, capture_output=True, timeout=60)


def serve_others(front_proxy_ca: str, asked: Any, ports: Any) -> None:
    """What the adapter asks, in a process of its own; its ports go to ``ports``."""

    async def run() -> None:
        (admin,) = listen("127.0.0.1", 0, field="admin")
        (api,) = listen("127.0.0.1", 0, field="api")
        ports.put((admin.getsockname()[1], api.getsockname()[1]))
        never = asyncio.Event()
        await asyncio.gather(
            serve_admin([admin], admin_app(make_pools()), never),
            serve_admin([api], api_server_app(front_proxy_ca, asked), never),
        )

    asyncio.run(run())


def serve_floor(certificate: Pair, ports: Any) -> None:
    """The floor: TLS and one answer, as little as a server in Python can do."""
    answer = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(FLOOR_BODY) + FLOOR_BODY

    class Floor(asyncio.Protocol):
        def connection_made(self, transport: Any) -> None:
            self._transport, self._seen = transport, b""

        def data_received(self, data: bytes) -> None:
            self._seen += data
            if self._seen.endswith(b"\r\n\r\n"):
                self._seen = b""
                self._transport.write(answer)

    async def run() -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*certificate)
        server = await asyncio.get_running_loop().create_server(Floor, "127.0.0.1", 0, ssl=context)
        ports.put(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    uvloop.run(run())


def scenarios(seconds: float) -> list[Scenario]:
    """What is sent, each for so long."""
    rng = random.Random(1)
    polls = []
    for number in range(POOLS):
        path = (
            f"{EXTERNAL}/{NAMES[number % len(NAMES)]}?labelSelector="
            f"{quote(f'pool=org-model-{number}')}"
        )
        first_s = rng.uniform(0.0, PERIOD_S)
        polls += [
            (first_s + PERIOD_S * turn, path)
            for turn in range(int(seconds // PERIOD_S) + 1)
            if first_s + PERIOD_S * turn < seconds
        ]
    paths = [
        *(f"{EXTERNAL}/{name}?labelSelector=pool%3Dorg-model-{7}" for name in NAMES),
        f"{EXTERNAL}/tidegate_desired_replicas?labelSelector=pool%20in%20(org-model-1,org-model-9)",
        f"{CUSTOM}/deployments.apps/model-3/tidegate_inflight_tokens",
        f"{CUSTOM}/pods/%2A/tidegate_inflight_tokens?labelSelector=app%3Dmodel-5",
    ]
    even = [(turn / RATE, rng.choice(paths)) for turn in range(int(seconds * RATE))]
    return [
        Scenario(name=f"{POOLS} HPAs every {PERIOD_S:g} s", due=tuple(sorted(polls))),
        Scenario(name=f"{RATE:g} requests/s", due=tuple(even)),
        Scenario(name="both at once", due=tuple(sorted(polls + even))),
    ]


class Connections:
    """Kept connections, as Go's transport has them: a request takes the one that was last given
    back, or opens another."""

    def __init__(self, port: int, trust: ssl.SSLContext) -> None:
        self._port, self._trust = port, trust
        self._free: list[Connection] = []
        self._places = asyncio.Semaphore(MOST_CONNECTIONS)
        self.opened = 0

    async def get(self, path: str) -> int:
        """The status of an answer that was read whole."""
        async with self._places:
            if self._free:
                connection = self._free.pop()
            else:
                connection = Connection(self._port, self._trust)
                self.opened += 1
            status = await connection.get(path)
            self._free.append(connection)
            return status

    def close(self) -> None:
        """Close them."""
        for connection in self._free:
            connection.close()


class Connection:
    """One kept connection, for one request at a time."""

    def __init__(self, port: int, trust: ssl.SSLContext) -> None:
        self._port, self._trust = port, trust
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    def close(self) -> None:
        """Close it."""
        if self._streams is not None:
            self._streams[1].close()

    async def get(self, path: str) -> int:
        """The status of an answer that was read whole."""
        return (await self.read(path))[0]

    async def read(self, path: str) -> tuple[int, bytes]:
        """The same, and its body."""
        if self._streams is None:
            self._streams = await asyncio.open_connection(
                "127.0.0.1", self._port, ssl=self._trust, server_hostname="localhost"
            )
        reader, writer = self._streams
        writer.write(
            f"GET {path} HTTP/1.1\r\nhost: localhost\r\n"
            "x-remote-user: system:serviceaccount:kube-system:horizontal-pod-autoscaler\r\n"
            "x-remote-group: system:serviceaccounts\r\n"
            "x-remote-group: system:authenticated\r\n\r\n".encode()
        )
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
        return int(head[9:12]), await reader.readexactly(length)


async def play(scenario: Scenario, port: int, trust: ssl.SSLContext) -> Outcome:
    """Send what is due when it is due."""
    connections = Connections(port, trust)
    outcome = Outcome()
    await asyncio.gather(*(connections.get("/healthz") for _ in range(5)))
    begun_s = time.perf_counter()

    async def ask(due_s: float, path: str) -> None:
        status = await connections.get(path)
        if status == 200:
            outcome.latencies_s.append(time.perf_counter() - begun_s - due_s)
        else:
            outcome.errors += 1

    tasks = []
    for due_s, path in scenario.due:
        wait_s = begun_s + due_s - time.perf_counter()
        if wait_s > 0:
            await asyncio.sleep(wait_s)
        tasks.append(asyncio.create_task(ask(due_s, path)))
    await asyncio.gather(*tasks)
    connections.close()
    outcome.connections = connections.opened
    return outcome


async def measure(folder: Path, seconds: float) -> list[dict[str, Any]]:
    """All scenarios against one adapter."""
    front, serving = make_authority(folder, "front-ca"), make_authority(folder, "serving-ca")
    own = issue(folder, serving, "localhost")
    trust = ssl.create_default_context(cafile=str(serving[0]))
    trust.load_cert_chain(*issue(folder, front, "front-proxy-client"))
    spawn = multiprocessing.get_context("spawn")
    asked, ports = spawn.Value("i", 0), spawn.Queue()
    others = spawn.Process(
        target=serve_others, args=(front[0].read_text(), asked, ports), daemon=True
    )
    others.start()
    admin_port, api_port = await asyncio.to_thread(ports.get, timeout=60)
    floor = spawn.Process(target=serve_floor, args=(own, ports), daemon=True)
    floor.start()
    floor_port = await asyncio.to_thread(ports.get, timeout=60)
    cluster = {
        "apiVersion": "v1", "kind": "Config", "current-context": "c",
        "clusters": [
            {"name": "c", "cluster": {"server": f"http://127.0.0.1:{api_port}"}}
        ],
        "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
        "users": [{"name": "u", "user": {}}],
    }  # fmt: skip
    (folder / "kubeconfig").write_text(json.dumps(cluster))
    port = procs.free_port()
    sets = {
        "adapter.tidegate_url": f"http://127.0.0.1:{admin_port}",
        "adapter.kubeconfig": folder / "kubeconfig",
        "adapter.tls_certificate": own[0],
        "adapter.tls_key": own[1],
        "adapter.metrics_port": port,
        "adapter.keda_port": 0,
    }
    argv = [sys.executable, "-m", "gateway.cli.main", "adapter"]
    for name, value in sets.items():
        argv += ["--set", f"{name}={value}"]
    child = procs.start(
        "adapter", argv, log=folder / "adapter.log", env={"TIDEGATE_ADMIN_TOKEN": TOKEN}
    )
    rows = []
    try:
        await _until_it_answers(child, port, trust)
        process = psutil.Process(child.pid)
        for scenario in scenarios(seconds):
            lowest = (await play(scenario, floor_port, trust)).latencies_s
            inside = await read_inside(port, trust)
            before, asked_before, begun_s = process.cpu_times(), asked.value, time.monotonic()
            outcome = await play(scenario, port, trust)
            after, took_s = process.cpu_times(), time.monotonic() - begun_s
            used_s = after.user + after.system - before.user - before.system
            latencies = outcome.latencies_s
            rows.append(
                {
                    "scenario": scenario.name,
                    "seconds": took_s,
                    "requests": len(scenario.due),
                    "errors": outcome.errors,
                    "p50_s": statistics.median(latencies),
                    "p99_s": stats.percentile(latencies, 0.99),
                    "most_s": max(latencies),
                    "floor_p50_s": statistics.median(lowest),
                    "floor_p99_s": stats.percentile(lowest, 0.99),
                    "connections": outcome.connections,
                    "inside_p99_s": quantile_of(await read_inside(port, trust), inside, 0.99),
                    "cpu_fraction": used_s / took_s,
                    "cpu_ms_per_request": 1e3 * used_s / len(scenario.due),
                    "reviews": asked.value - asked_before,
                    "memory_bytes": process.memory_info().rss,
                }
            )
        idle_before = process.cpu_times()
        await asyncio.sleep(10)
        idle = process.cpu_times()
        used_s = idle.user + idle.system - idle_before.user - idle_before.system
        rows.append({"scenario": "idle", "cpu_fraction": used_s / 10})
    finally:
        await asyncio.to_thread(child.stop)
        for process_beside in (others, floor):
            process_beside.terminate()
            await asyncio.to_thread(process_beside.join, 10)
    return rows


async def read_inside(port: int, trust: ssl.SSLContext) -> Counter[float]:
    """How many requests took up to each bound, by the adapter's own histogram."""
    _, page = await Connection(port, trust).read("/metrics")
    found: Counter[float] = Counter()
    for family in text_string_to_metric_families(page.decode()):
        for sample in family.samples:
            if sample.name == "tidegate_adapter_request_duration_seconds_bucket":
                found[float(sample.labels["le"])] += sample.value  # type: ignore[assignment]
    return found


def quantile_of(now: Counter[float], before: Counter[float], q: float) -> float:
    """The bound that so many of the requests between two readings are not above."""
    counts = {bound: now[bound] - before[bound] for bound in now}
    return next(bound for bound in sorted(counts) if counts[bound] >= q * counts[math.inf])


async def _until_it_answers(child: procs.Child, port: int, trust: ssl.SSLContext) -> None:
    deadline_s = time.monotonic() + 60
    path = f"{EXTERNAL}/tidegate_desired_replicas?labelSelector=pool%3Dorg-model-0"
    while True:
        try:
            if await Connection(port, trust).get(path) == 200:
                return
        except (OSError, asyncio.IncompleteReadError):
            pass
        if time.monotonic() > deadline_s or child.popen.poll() is not None:
            raise procs.NotReadyError(f"the adapter does not answer\n{child.log_tail()}")
        await asyncio.sleep(0.2)


def run(seconds: float, out: Path, command: str, date: str) -> int:
    """Measure, write the report to the folder ``out``, and say whether the bars are met."""
    from bench import machine

    before = machine.counters()
    with tempfile.TemporaryDirectory() as folder:
        rows = uvloop.run(measure(Path(folder), seconds))
    after = machine.counters()
    made: dict[str, Any] = {
        "command": command,
        "date": date,
        "machine": machine.describe(),
        "noise": machine.noise(before, after),
        "scheduling": SCHEDULING.get(os.sched_getscheduler(0), "the usual"),
        "rows": rows,
    }
    made["verdicts"] = find_verdicts(rows)
    text = render(made)
    out.mkdir(parents=True, exist_ok=True)
    (out / f"adapter-{date}.md").write_text(text)
    (out / f"adapter-{date}.json").write_text(json.dumps(made, indent=1) + "\n")
    print(text)
    return 0 if all(one["passed"] for one in made["verdicts"]) else 1


def find_verdicts(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Whether the figures are below their bars, and every request was answered."""
    loads = [one for one in rows if "p99_s" in one]
    found = [
        {
            "text": f"{one['scenario']}: p99 inside, ms, at most",
            "value": 1e3 * one["inside_p99_s"],
            "bar": 1e3 * BAR_P99_S,
            "passed": one["inside_p99_s"] < BAR_P99_S,
        }
        for one in loads
    ]
    errors = sum(one["errors"] for one in loads)
    found.append(
        {"text": "answers that are errors", "value": errors, "bar": 1, "passed": errors == 0}
    )
    return found


def render(made: dict[str, Any]) -> str:
    """The report."""
    info, busy = made["machine"], made["noise"]["other_busy_fraction"]
    lines = [
        f"# The adapter under load, {made['date']}",
        "",
        f"`{made['command']}`, {info['cpu']}, {info['cores']} cores shared with the load "
        f"generator; other processes took {100 * busy:.0f} % of a core. Scheduling: "
        f"{made['scheduling']}.",
        "",
        "Milliseconds from the time a request was due to its whole answer, over TLS. Floor: of a "
        "server that only answers, asked by the same client in the same run. Inside: from "
        "a request that was read to its answer, by the bounds of the adapter's own histogram. CPU "
        "of the adapter as a share of one core. Reviews: what the API server was asked.",
        "",
        "| load | requests | p50 | p99 | most | floor p50 | floor p99 | p99 inside | CPU | "
        "CPU ms a request | reviews |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for one in made["rows"]:
        if "p99_s" not in one:
            lines.append(
                f"| {one['scenario']} |  |  |  |  |  |  |  | "
                f"{100 * one['cpu_fraction']:.1f} % |  |  |"
            )
            continue
        lines.append(
            f"| {one['scenario']} | {one['requests']:,} | {1e3 * one['p50_s']:.1f} | "
            f"{1e3 * one['p99_s']:.1f} | {1e3 * one['most_s']:.1f} | "
            f"{1e3 * one['floor_p50_s']:.1f} | {1e3 * one['floor_p99_s']:.1f} | "
            f"≤ {1e3 * one['inside_p99_s']:g} | "
            f"{100 * one['cpu_fraction']:.1f} % | {one['cpu_ms_per_request']:.2f} | "
            f"{one['reviews']} |"
        )
    memory = max(one.get("memory_bytes", 0) for one in made["rows"])
    lines += ["", f"{POOLS} pools of {REPLICAS_EACH} replicas; {memory / 1e6:.0f} MB resident.", ""]
    for one in made["verdicts"]:
        verdict = "met" if one["passed"] else "MISSED"
        lines.append(f"- {one['text']}: {one['value']:.3g}, bar < {one['bar']:g}: {verdict}")
    return "\n".join(lines) + "\n"
