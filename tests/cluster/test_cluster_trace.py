"""A trace is replayed to two pools beside each other, each scaled by a stock
HorizontalPodAutoscaler: of one by its tokens in flight, of the other by what Tidegate's forecast
asks for.

What is replayed is made here, and short: a burst of three minutes in every ten, from a minute
before one until a minute into it. Another trace, of requests by minute, is given by the
environment: ``TRACE_FILE`` is a parquet file with a column ``requests``, ``TRACE_AT``
the minute of it with which the comparison begins, ``TRACE_MINUTES`` how many it is of, and
``TRACE_FACTOR`` how many requests come for each of the trace.
"""

from __future__ import annotations

import asyncio
import csv
import os
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import metrics_api_server
import pytest
from cluster_engines import simulated_engines
from cluster_objects import autoscaler, deployment, external_metric
from control_plane import ControlPlane
from fake_kubelet import FakeKubelet
from lightkube import Client
from lightkube.generic_resource import create_namespaced_resource
from lightkube.resources.apps_v1 import Deployment
from operator_rig import Operator
from scaling_times import ScalingTimes
from tidegate_process import Tidegate

ModelPool = create_namespaced_resource("tidegate.dev", "v1alpha1", "ModelPool", "modelpools")

MINUTE_S = 60.0
WARM_MINUTES = 3
"""So long forecasts of the imported past are tried before they are trusted, and a little more."""
PAST_MINUTES = 8 * 1_440
START_S = 46.0
"""From a pod's creation until it is ready: with the 15 s for the HPA a forecast of minutes."""
ANSWER_S = 4.0
PROMPT, PROMPT_TOKENS, ANSWER_TOKENS = "x " * 60, 34, 20
"""A prompt, what Tidegate counts it for, and an answer."""
SEATS = 16
"""Requests that an engine answers at once."""
TARGET_TOKENS = int(0.7 * SEATS * (PROMPT_TOKENS + ANSWER_TOKENS))
"""In flight, to a replica: by them the one is scaled, and both pools are told so."""
LATE_S = 1.0
"""An answer whose first token comes later is late."""
POOLS = {
    "inflight": ("tidegate_inflight_tokens", TARGET_TOKENS, 300),
    "forecast": ("tidegate_desired_replicas", 1, 0),
}
"""What the autoscaler of each pool scales by, how much of that is a replica's, and for how many
seconds it waits before it scales down: as it does unless told otherwise, and as our example says.
"""


@dataclass(frozen=True)
class Trace:
    """Requests in each minute; compared are those from ``at`` on."""

    requests: Sequence[float]
    at: int
    minutes: int

    def of_minute(self, number: int) -> int:
        """How many requests there are in a minute, counted from that with which it begins."""
        return round(self.requests[self.at + number])


def given_trace() -> Trace:
    """That of the environment, else the made one."""
    path = os.environ.get("TRACE_FILE")
    if path is None:
        demand = [80.0] * 7 + [600.0] * 3
        return Trace(demand * 300, at=2_996, minutes=2)
    import pyarrow.parquet

    factor = float(os.environ.get("TRACE_FACTOR", "1"))
    column = pyarrow.parquet.read_table(path).column("requests").to_pylist()
    at, minutes = (int(os.environ[f"TRACE_{one}"]) for one in ("AT", "MINUTES"))
    return Trace([factor * one for one in column], at, minutes)


TRACE = given_trace()
pytestmark = pytest.mark.timeout(600 + MINUTE_S * (WARM_MINUTES + TRACE.minutes))


@dataclass
class Outcome:
    """What became of a pool in the minutes that are compared."""

    requests: int = 0
    late: int = 0
    lost: list[str] = field(default_factory=list)
    replica_seconds: float = 0.0
    most: int = 0
    at_first: int = 0
    """Replicas at the end of the first minute."""
    is_forecast: bool = False
    """Whether a forecast of it was published."""


@dataclass
class Replay:
    """The trace from ``begin_s`` (wall time) on, to both pools."""

    tidegate: Tidegate
    client: Client
    namespace: str
    begin_s: float
    outcomes: dict[str, Outcome] = field(
        default_factory=lambda: {name: Outcome() for name in POOLS}
    )

    async def run(self) -> None:
        """Until the last answer."""
        end_s = self.begin_s + TRACE.minutes * MINUTE_S
        limits = httpx.Limits(max_connections=None)
        async with (
            httpx.AsyncClient(
                base_url=self.tidegate.url, timeout=280, limits=limits, trust_env=False
            ) as http,
            asyncio.TaskGroup() as group,
        ):
            group.create_task(self._watch(end_s))
            for at_s in self._arrivals():
                if at_s >= time.time() - 1.0:
                    await asyncio.sleep(max(0.0, at_s - time.time()))
                    for name in POOLS:
                        group.create_task(self._ask(http, name, counts=at_s >= self.begin_s))

    def _arrivals(self) -> list[float]:
        """When requests come, wall time."""
        found = []
        for number in range(-WARM_MINUTES - 1, TRACE.minutes):
            chance = random.Random(number)
            minute_s = self.begin_s + number * MINUTE_S
            found += [minute_s + MINUTE_S * chance.random() for _ in range(TRACE.of_minute(number))]
        return sorted(found)

    async def _ask(self, http: httpx.AsyncClient, name: str, *, counts: bool) -> None:
        outcome = self.outcomes[name]
        body = {
            "model": name,
            "messages": [{"role": "user", "content": PROMPT}],
            "max_tokens": ANSWER_TOKENS,
            "stream": True,
        }
        asked_s, first_s, last = time.monotonic(), None, ""
        try:
            async with http.stream("POST", "/v1/chat/completions", json=body) as answer:
                answer.raise_for_status()
                async for line in answer.aiter_lines():
                    first_s = first_s or time.monotonic() - asked_s
                    last = line or last
            if last != "data: [DONE]":
                outcome.lost.append(f"the stream ended with {last!r}")
        except httpx.HTTPError as error:
            outcome.lost.append(repr(error))
        if counts:
            outcome.requests += 1
            outcome.late += first_s is None or first_s > LATE_S

    async def _watch(self, end_s: float) -> None:
        """Sum up the pods that there are while the minutes that are compared last."""
        await asyncio.sleep(max(0.0, self.begin_s - time.time()))
        seen_s = time.monotonic()
        while time.time() < end_s:
            await asyncio.sleep(1.0)
            then_s, seen_s = seen_s, time.monotonic()
            signals = await asyncio.to_thread(self.tidegate.admin, "/signals")
            for one in signals["pools"]:
                self.outcomes[one["pool"]].is_forecast |= bool(one["forecast"])
            for name, outcome in self.outcomes.items():
                number = await asyncio.to_thread(self._count_pods, name)
                outcome.replica_seconds += number * (seen_s - then_s)
                outcome.most = max(outcome.most, number)
                if time.time() <= self.begin_s + MINUTE_S:
                    outcome.at_first = number

    def _count_pods(self, name: str) -> int:
        status = self.client.get(Deployment, name, namespace=self.namespace).status
        return 0 if status is None else status.replicas or 0


def model_pool(name: str, namespace: str) -> Any:
    return ModelPool(
        metadata={"name": name, "namespace": namespace},
        spec={
            "targetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": name},
            "scaledBy": "hpa",
            "zeroOwner": "none",
            "minReplicas": 1,
            "maxReplicas": 8,
            "targetInflightTokens": TARGET_TOKENS,
            "slo": {"ttftSeconds": LATE_S},
        },
    )


def import_past(tidegate: Tidegate, path: Path, begin_s: float) -> None:
    """What would have come to the pools before this minute."""
    this = int(time.time() - begin_s) // int(MINUTE_S)
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["time", "requests", "input_tokens", "output_tokens"])
        for number in range(max(-TRACE.at, -PAST_MINUTES), this):
            count = TRACE.of_minute(number)
            at = datetime.fromtimestamp(begin_s + number * MINUTE_S, UTC).isoformat()
            rows.writerow([at, count, count * PROMPT_TOKENS, count * ANSWER_TOKENS])
    token = (tidegate.state_dir / "admin-token").read_text().strip()
    for name in POOLS:
        argv = ["history", "import", name, "--file", str(path), "--admin", tidegate.admin_url]
        subprocess.run(
            [sys.executable, "-m", "gateway.cli.main", *argv],
            env={**os.environ, "TIDEGATE_ADMIN_TOKEN": token},
            check=True,
        )


def test_a_forecast_beside_tokens_in_flight(
    plane: ControlPlane,
    kubelet: FakeKubelet,
    client: Client,
    operator: Operator,
    namespace: str,
    tmp_path: Path,
    times: ScalingTimes,
) -> None:
    flags = ("--decode-tokens-per-s", ANSWER_TOKENS / ANSWER_S, "--batch-slowdown", 0)
    flags += ("--max-num-seqs", SEATS, "--output-tokens", ANSWER_TOKENS, "--output-spread", 0)
    kubelet.treat(
        namespace, on_pod=simulated_engines(*flags), pull_s=START_S, terminate_s=2 * ANSWER_S
    )
    for name in POOLS:
        client.create(deployment(name, namespace))
        client.create(model_pool(name, namespace))
    with operator.running() as tidegate:
        tidegate.wait("pools", lambda: len(tidegate.admin("/status")["pools"]) == len(POOLS))
        for name in POOLS:
            tidegate.wait_ready(name, within_s=3 * START_S)
        token = (tidegate.state_dir / "admin-token").read_text().strip()
        place = plane.make_namespace("metrics")
        with metrics_api_server.serving(plane, place, tmp_path, tidegate.admin_url, token):
            for name, (metric, each, delay_s) in POOLS.items():
                by = external_metric(metric, each, pool=name)
                client.create(autoscaler(plane, name, namespace, by, highest=8, delay_s=delay_s))
            begin_s = (time.time() // MINUTE_S + 1 + WARM_MINUTES) * MINUTE_S
            import_past(tidegate, tmp_path / "past.csv", begin_s)
            replay = Replay(tidegate, client, namespace, begin_s)
            asyncio.run(replay.run())
    for name, outcome in replay.outcomes.items():
        share = outcome.late / max(1, outcome.requests)
        times.notes.append(
            f"{TRACE.minutes} minutes of a trace, stock HPA on {POOLS[name][0]}: "
            f"{outcome.late} of {outcome.requests} late ({share:.1%}), "
            f"{outcome.replica_seconds:.0f} replica-seconds, "
            f"at most {outcome.most}, {outcome.at_first} after the first minute"
        )
        assert outcome.lost == []
        assert outcome.most > 1
        assert outcome.is_forecast
