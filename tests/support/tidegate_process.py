"""A whole ``tidegate up`` as a child process, for tests that use it as its users do.

``with up(tmp_path, pools=[...]) as tidegate:`` writes a settings file, starts the command, waits
until it has said where it listens, and at the end checks what must always hold: nothing is counted
as in flight any more, SIGTERM ends it with status 0, no process of it survives, and it logged
neither an error nor a traceback.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from prometheus_client.parser import text_string_to_metric_families

Found = TypeVar("Found")

START_S = 60.0
STOP_S = 60.0
WAIT_S = 60.0
POLL_S = 0.05
ENGINE_FAILED = r" WARNING tidegate\.autoscaler: [\w-]+-\d+ failed: "
"""Engines fail in many tests; where none should, the test looks at what becomes of its requests."""
ROOT = Path(__file__).resolve().parents[2]
MARK = "TEST_RUN_OF_TIDEGATE"
"""Environment variable that all descendants inherit: by it they are found, wherever they went."""

QUICK: Mapping[str, Any] = {
    "tick_s": 0.1,
    "start_poll_s": 0.05,
    "drain_settle_s": 0.2,
    "idle_to_zero_s": 300.0,
}
"""Settings of the autoscaler with which little time is spent on waiting. A simulated engine starts
at once, so that a pool which learns how long to stay would go to zero within seconds."""

SHUT = ("--fault", "unhealthy")
"""Flags of a simulated engine that is not ready before ``Tidegate.open_gate`` says so: what has to
be seen while a pool starts may then take as long as it takes."""

AT_REST = (
    "inflight_requests",
    "inflight_tokens",
    "queued_requests",
    "queued_tokens",
    "queued_bytes",
    "buffered_bytes",
)
"""Gauges that are zero without requests."""


@dataclass(frozen=True)
class Metrics:
    """One Prometheus page."""

    samples: dict[tuple[str, frozenset[tuple[str, str]]], float]

    def sum(self, name: str, **labels: str) -> float:
        """The sum of the samples of this name that carry these labels; 0 where there is none."""
        wanted = set(labels.items())
        return sum(
            value
            for (sample, given), value in self.samples.items()
            if sample == name and wanted <= given
        )

    def has(self, name: str, **labels: str) -> bool:
        """Whether there is such a sample."""
        wanted = set(labels.items())
        return any(sample == name and wanted <= given for sample, given in self.samples)


def read_metrics(url: str) -> Metrics:
    """The page at ``url`` (``…/metrics``), parsed as Prometheus would."""
    samples = {}
    for family in text_string_to_metric_families(fetch(url).decode()):
        for sample in family.samples:
            samples[sample.name, frozenset(sample.labels.items())] = sample.value
    return Metrics(samples)


def fetch(
    url: str, body: object = None, *, method: str | None = None, state_dir: Path | None = None
) -> bytes:
    """GET, or POST of JSON; with the admin token of a state directory, where one is given. Raises
    ``urllib.error.HTTPError`` for an error."""
    headers = {"content-type": "application/json"}
    if state_dir is not None:
        headers["authorization"] = f"Bearer {(state_dir / 'admin-token').read_text().strip()}"
    request = urllib.request.Request(
        url,
        data=None if body is None else json.dumps(body).encode(),
        headers=headers,
        method=method,
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        read: bytes = answer.read()
        return read


@dataclass
class Tidegate:
    """One running ``tidegate up``."""

    process: subprocess.Popen[bytes]
    state_dir: Path
    log_path: Path
    mark: str
    url: str = ""
    admin_url: str = ""
    expected_log: list[str] = field(default_factory=lambda: [ENGINE_FAILED])
    """Patterns of error lines that the test brings about itself."""

    @property
    def pid(self) -> int:
        """The control process."""
        return self.process.pid

    def log(self) -> str:
        """What it has written so far, standard output included."""
        return self.log_path.read_text(encoding="utf-8", errors="replace")

    def admin(self, path: str, body: object = None) -> Any:
        """Ask the admin listener: GET, or POST with a body."""
        return json.loads(fetch(self.admin_url + path, body, state_dir=self.state_dir))

    def pool(self, name: str) -> dict[str, Any]:
        """One pool as ``/status`` shows it."""
        found: dict[str, Any] = next(
            pool for pool in self.admin("/status")["pools"] if pool["name"] == name
        )
        return found

    def metrics(self) -> Metrics:
        """Tidegate's own metrics."""
        return read_metrics(self.admin_url + "/metrics")

    def engine_url(self, pool: str) -> str:
        """The only ready replica of a pool."""
        (replica,) = [one for one in self.pool(pool)["replicas"] if one["state"] == "ready"]
        return str(replica["url"])

    def engine_metrics(self, pool: str) -> Metrics:
        """The metrics of the only ready replica of a pool."""
        return read_metrics(self.engine_url(pool) + "/metrics")

    def engine_logs(self, pool: str) -> list[Path]:
        """One log per replica that was ever started for a pool.

        An engine that stands by writes one of its own, whenever it comes to it: not a replica's.
        """
        logs = (self.state_dir / "logs" / pool).glob("*.log")
        return sorted(log for log in logs if not log.stem.endswith("-standby"))

    def starts(self, pool: str) -> int:
        """How many engines were started for a pool, by what the control loop says it did."""
        return len(re.findall(rf" {re.escape(pool)}-\d+: preparing -> starting", self.log()))

    def set_faults(self, pool: str, *faults: str) -> None:
        """Set the faults of the only ready (simulated) replica of a pool."""
        fetch(self.engine_url(pool) + "/simulated/faults", {"faults": faults})

    def starting_url(self, pool: str) -> str:
        """Where the engine of a pool that is starting will be; waits until that is known."""

        def look() -> str | None:
            urls = [one["url"] for one in self.pool(pool)["replicas"] if one["state"] == "starting"]
            return urls[0] if urls else None

        return str(self.wait(f"an engine of {pool} that starts", look))

    def open_gate(self, pool: str) -> None:
        """Let the engine of a pool that was started ``SHUT`` become ready."""
        self.wait(f"a gate of {pool} to open", lambda: let_go(self.starting_url(pool)))

    def wait_ready(self, pool: str, count: int = 1, within_s: float = WAIT_S) -> None:
        """Until a pool has this many ready replicas."""
        self.wait(f"{count} ready of {pool}", lambda: self.pool(pool)["ready"] == count, within_s)

    def wait_at_zero(self, pool: str, within_s: float = WAIT_S) -> None:
        """Until a pool has no replica left that is not a remembered failure."""

        def is_at_zero() -> bool:
            return all(one["state"] == "failed" for one in self.pool(pool)["replicas"])

        self.wait(f"{pool} at zero", is_at_zero, within_s)

    def wait_held(self, pool: str, count: int, within_s: float = WAIT_S) -> None:
        """Until this many requests of a pool are held."""
        self.wait(
            f"{count} held of {pool}",
            lambda: self.pool(pool)["queued_requests"] == count,
            within_s,
        )

    def wait_count(self, value: float, name: str, **labels: str) -> None:
        """Until a counter of Tidegate's has this value (workers count ahead of the page a bit)."""
        self.wait(
            f"{name} {labels} of {value:g}",
            lambda: self.metrics().sum(name, **labels) == value,
        )

    def wait(self, what: str, look: Callable[[], Found], within_s: float = WAIT_S) -> Found:
        """Until ``look`` returns something true; returns it. Fails with Tidegate's log."""
        deadline_s = time.monotonic() + within_s
        while True:
            found = look()
            if found:
                return found
            if self.process.poll() is not None:
                raise AssertionError(f"tidegate ended, waiting for {what}\n{self.log()[-4000:]}")
            if time.monotonic() > deadline_s:
                status = json.dumps(self.admin("/status"), indent=1)
                raise AssertionError(f"no {what} in {within_s} s\n{status}\n{self.log()[-4000:]}")
            time.sleep(POLL_S)

    def assert_at_rest(self) -> None:
        """Nothing in flight or queued is counted any more, and no count went below zero."""

        def busy() -> dict[str, float]:
            metrics = self.metrics()
            return {
                f"{name}{dict(labels)}": value
                for (name, labels), value in metrics.samples.items()
                if name.removeprefix("tidegate_") in AT_REST and value != 0
            }

        deadline_s = time.monotonic() + WAIT_S
        while left := busy():
            assert time.monotonic() < deadline_s, f"still counted at rest: {left}"
            time.sleep(POLL_S)

    def survivors(self) -> dict[int, str]:
        """Living processes of this run, by pid, with their command lines; itself not included."""
        return {pid: line for pid, line in marked(self.mark).items() if pid != self.pid}

    def stop(self, number: int = signal.SIGTERM, *, status: int = 0) -> None:
        """End it and see it end with this status, everything it started included."""
        self.process.send_signal(number)
        try:
            ended = self.process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"it did not end in {STOP_S} s\n{self.log()[-4000:]}") from None
        assert ended == status, f"it ended with {ended}\n{self.log()[-4000:]}"
        assert self.survivors() == {}

    def assert_log_is_clean(self) -> None:
        """No error and no traceback that the test did not bring about."""
        bad = [
            line
            for line in self.log().splitlines()
            if (" ERROR " in line or " WARNING " in line or "Traceback" in line)
            and not any(re.search(pattern, line) for pattern in self.expected_log)
        ]
        assert bad == [], self.log()[-6000:]

    def kill_all(self) -> None:
        """End every process of this run, whatever it does."""
        for _ in range(100):
            living = marked(self.mark)
            if not living:
                break
            for pid in living:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(0.1)


def marked(mark: str) -> dict[int, str]:
    """Living processes with this mark in the environment they were started with."""
    needle = f"{MARK}={mark}".encode()
    found = {}
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        place = Path("/proc") / entry
        try:
            if needle in (place / "environ").read_bytes().split(b"\0"):
                line = (place / "cmdline").read_bytes().replace(b"\0", b" ")
                found[int(entry)] = line.decode(errors="replace").strip()
        except OSError:
            continue
    return found


def let_go(engine_url: str) -> bool:
    """End the faults of a simulated engine; false where it does not listen yet, or no more."""
    try:
        fetch(engine_url + "/simulated/faults", {"faults": []})
    except OSError:
        return False
    return True


def port_of(url: str) -> int:
    """The port of a URL that names one."""
    return int(url.rpartition(":")[2])


def toml(settings: Mapping[str, Any]) -> str:
    """Settings as TOML: sections of plain values one level deep, ``pools`` as tables."""
    lines = []
    sections = {**settings}
    pools = sections.pop("pools", [])
    for name, value in list(sections.items()):
        if not isinstance(value, Mapping):
            lines.append(f"{name} = {_value(sections.pop(name))}")
    for name, section in sections.items():
        lines += ["", f"[{name}]"]
        lines += [f"{key} = {_value(value)}" for key, value in section.items()]
    for pool in pools:
        lines += ["", "[[pools]]"]
        lines += [f"{key} = {_value(value)}" for key, value in pool.items()]
    return "\n".join(lines) + "\n"


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key} = {_value(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_value, value)) + "]"
    return json.dumps(str(value) if isinstance(value, Path) else value)


def simulated(name: str, *engine_args: object, **fields: Any) -> dict[str, Any]:
    """A pool of simulated engines."""
    return {
        "name": name,
        "engine": "simulated",
        "model": name,
        "engine_args": [str(argument) for argument in engine_args],
        **fields,
    }


def write_settings(directory: Path, *, pools: Sequence[Mapping[str, Any]], **sections: Any) -> Path:
    """The settings file of a Tidegate in ``directory``; written anew for a reload."""
    settings = {
        "state_dir": str(directory / "state"),
        "gateway": {"port": 0, "admin_port": 0},
        "autoscaler": {},
        **{name: value for name, value in sections.items() if name not in {"gateway"}},
        "pools": pools,
    }
    settings["gateway"] = {**settings["gateway"], **sections.get("gateway", {})}
    settings["autoscaler"] = {**QUICK, **settings["autoscaler"]}
    config = directory / "tidegate.toml"
    config.write_text(toml(settings), encoding="utf-8")
    return config


def start(
    directory: Path,
    *,
    pools: Sequence[Mapping[str, Any]],
    arguments: Sequence[str] = (),
    environ: Mapping[str, str] | None = None,
    cwd: Path = ROOT,
    **sections: Any,
) -> Tidegate:
    """Start ``tidegate up`` with its state in ``directory``; does not wait for anything."""
    directory.mkdir(parents=True, exist_ok=True)
    config = write_settings(directory, pools=pools, **sections)
    state_dir = directory / "state"
    mark = secrets.token_hex(8)
    log_path = directory / f"tidegate-{mark}.log"
    # The record of an earlier one in the same directory must not be taken for this one's.
    with log_path.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "gateway.cli.main", "up", "--config", str(config), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, MARK: mark, **(environ or {})},
            cwd=cwd,
        )
    return Tidegate(process=process, state_dir=state_dir, log_path=log_path, mark=mark)


def wait_up(tidegate: Tidegate) -> Tidegate:
    """Until its record says where it listens."""
    deadline_s = time.monotonic() + START_S
    while True:
        with contextlib.suppress(OSError, ValueError):
            record = json.loads((tidegate.state_dir / "running.json").read_text())
            if record["pid"] == tidegate.pid:
                tidegate.url, tidegate.admin_url = record["url"], record["admin_url"]
                return tidegate
        if tidegate.process.poll() is not None or time.monotonic() > deadline_s:
            raise AssertionError(f"tidegate did not come up\n{tidegate.log()}")
        time.sleep(POLL_S)


@contextlib.contextmanager
def up(directory: Path, **options: Any) -> Iterator[Tidegate]:
    """A ``tidegate up`` that listens; see ``start`` for the options and the module for the rest."""
    tidegate = start(directory, **options)
    try:
        yield wait_up(tidegate)
        if tidegate.process.poll() is None:
            tidegate.assert_at_rest()
            tidegate.stop()
        assert tidegate.survivors() == {}
        tidegate.assert_log_is_clean()
    except BaseException:
        sys.stderr.write(f"--- tidegate's log\n{tidegate.log()[-6000:]}\n")
        raise
    finally:
        tidegate.kill_all()
