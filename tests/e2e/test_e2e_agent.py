"""Cache agents as their users have them: the command, other sites' orders, peers that give."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from object_server import IndexedServer, serving
from tidegate_process import fetch, read_metrics, simulated, up

from modelcache.types import PIECE_BYTES

SECRET = "a secret for the tests of agents"
HEADER_BYTES = 100
WEIGHTS = random.Random(11).randbytes(2 * PIECE_BYTES + 999)
COMMAND = str(Path(sys.executable).parent / "tidegate")
ENVIRON = {**os.environ, "TIDEGATE_PEER_TOKEN": SECRET}


@dataclass
class Agent:
    """One running ``tidegate agent``."""

    process: subprocess.Popen[str]
    state_dir: Path
    url: str = ""
    admin_url: str = ""

    def admin(self, path: str) -> Any:
        return json.loads(fetch(self.admin_url + path, state_dir=self.state_dir))

    def listing(self) -> Any:
        return self.admin("/models")

    def sent_bytes(self) -> float:
        """What it has given to peers."""
        return float(self.admin("/status")["traffic"]["sent_bytes"])


def start(state_dir: Path, *sets: str, peers: tuple[str, ...] = ()) -> Agent:
    """Start one and wait until it has said where it listens."""
    settings = [f"state_dir={state_dir}", f"modelcache.peers={json.dumps(peers)}", *sets]
    words = [word for one in settings for word in ("-s", one)]
    process = subprocess.Popen(
        [COMMAND, "agent", "--admin-port", "0", "--peer-port", "0", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=ENVIRON,
    )
    agent = Agent(process, state_dir)
    assert process.stdout is not None
    seen = ""
    for line in process.stdout:
        seen += line
        words = line.split()
        if words[:1] == ["peers"]:
            agent.url = words[1]
        elif words[:1] == ["admin"]:
            agent.admin_url = words[1]
        elif words[:1] == ["Ctrl-C"]:
            return agent
    raise AssertionError(seen)


def stop(agent: Agent) -> str:
    """SIGTERM, an orderly end, and what it printed meanwhile."""
    if agent.process.poll() is None:
        agent.process.send_signal(signal.SIGTERM)
    text, _ = agent.process.communicate(timeout=60)
    assert agent.process.returncode == 0, text
    assert "Traceback" not in text
    assert not (agent.state_dir / "agent.json").exists()
    return text


@pytest.fixture
def agents(tmp_path: Path) -> Iterator[Callable[..., Agent]]:
    """Starts agents that end, in good order, with the test."""
    with ExitStack() as stack:

        def begin(name: str, *sets: str, peers: tuple[str, ...] = ()) -> Agent:
            agent = start(tmp_path / name, *sets, peers=peers)
            stack.callback(stop, agent)
            return agent

        yield begin


@pytest.fixture
def store() -> Iterator[IndexedServer]:
    server = IndexedServer()
    server.objects = {
        "models/tiny/config.json": b'{"model_type": "tiny"}',
        "models/tiny/model.safetensors": WEIGHTS,
    }
    with serving(server):
        yield server


def weights_read(store: IndexedServer, after: int = 0) -> int:
    """Bytes of weights that were asked for in pieces; a listing looks at headers too."""
    ranges = [
        headers["range"].removeprefix("bytes=").split("-")
        for _, path, headers in store.reads()[after:]
        if path.endswith(".safetensors")
    ]
    sizes = [int(end) - int(start) + 1 for start, end in ranges]
    return sum(size for size in sizes if size > HEADER_BYTES)


@contextmanager
def gives_late(store: IndexedServer, sent_bytes: Callable[[], float]) -> Iterator[None]:
    """The store gives no more weights before another node has given a piece, however late that one
    answers on a busy machine. With one connection to the store, the node then has two ways."""
    sent_before = sent_bytes()
    read_before = weights_read(store)

    def wait(handler: Any, path: str, data: bytes) -> bool:
        wanted = handler.wanted(len(data))
        if path.endswith(".safetensors") and wanted and wanted[1] - wanted[0] > HEADER_BYTES:
            deadline_s = time.monotonic() + 60
            while sent_bytes() < sent_before + PIECE_BYTES and time.monotonic() < deadline_s:
                time.sleep(0.05)
        return False

    store.fault = wait
    yield
    store.fault = None
    assert sent_bytes() >= sent_before + PIECE_BYTES
    assert weights_read(store) - read_before < len(WEIGHTS)


def console(state_dir: Path, *words: str, status: int = 0) -> Any:
    done = subprocess.run(
        [COMMAND, "model", *words, "--json", "-s", f"state_dir={state_dir}"],
        capture_output=True,
        text=True,
        timeout=100,
        env=ENVIRON,
        check=False,
    )
    assert done.returncode == status, (done.stdout, done.stderr)
    return json.loads(done.stdout)


def test_an_agent_says_how_it_is(agents: Callable[..., Agent], store: IndexedServer) -> None:
    agent = agents("a")
    ready = agent.admin("/readyz")
    assert ready["ready"] is True
    status = agent.admin("/status")
    assert (status["peer_url"], status["traffic"]["store_bytes"]) == (agent.url, 0)
    told = console(agent.state_dir, "preload", f"{store.url}/models/tiny/")
    assert (Path(told["path"]) / "model.safetensors").read_bytes() == WEIGHTS
    # It did that, not the console: its counters moved, and it keeps pages.
    metrics = read_metrics(agent.admin_url + "/metrics")
    assert metrics.sum("tidegate_cache_read_bytes_total", origin="store") >= len(WEIGHTS)
    assert console(agent.state_dir, "prewarm", f"{store.url}/models/tiny/")["not_kept"] == ""


def test_a_signal_to_reload_does_not_end_an_agent(agents: Callable[..., Agent]) -> None:
    agent = agents("one")
    assert agent.process.stdout is not None
    agent.process.send_signal(signal.SIGHUP)
    assert any("SIGHUP" in line for line in agent.process.stdout), "it ended"
    assert json.loads(fetch(agent.admin_url + "/readyz"))["ready"] is True
    assert agent.process.poll() is None


def test_a_second_agent_of_a_state_directory_is_refused(agents: Callable[..., Agent]) -> None:
    first = agents("a")
    second = subprocess.run(
        [COMMAND, "agent", "--admin-port", "0", "--peer-port", "0"]
        + ["-s", f"state_dir={first.state_dir}"],
        capture_output=True,
        text=True,
        timeout=60,
        env=ENVIRON,
        check=False,
    )
    assert second.returncode == 2
    (line,) = second.stderr.splitlines()
    assert f"{first.state_dir} belongs to another cache agent that is running" in line
    assert json.loads((first.state_dir / "agent.json").read_text())["pid"] == first.process.pid


def test_an_agent_and_a_gateway_share_a_state_directory(
    store: IndexedServer, tmp_path: Path
) -> None:
    """Each has its record, and both have the one cache; the console asks the gateway."""
    url = f"{store.url}/models/tiny/"
    with up(tmp_path / "a", pools=[simulated("m")], environ=ENVIRON) as tidegate:
        agent = start(tidegate.state_dir)
        console(agent.state_dir, "preload", url)
        assert tidegate.metrics().sum("tidegate_cache_read_bytes_total", origin="store") > 0
        (entry,) = agent.listing()["models"]
        assert (entry["url"], entry["complete"]) == (url, True)
        stop(agent)
        assert (tidegate.state_dir / "running.json").exists()
        told = verb("status", "-s", f"state_dir={tidegate.state_dir}")
        assert tidegate.url in told.stdout


def test_the_console_knows_an_agent(agents: Callable[..., Agent]) -> None:
    agent = agents("a")
    here = ("-s", f"state_dir={agent.state_dir}")
    told = verb("status", *here)
    assert told.returncode == 0
    assert f"served at {agent.url}; no peers are known" in told.stdout
    assert f"unix:{agent.state_dir / 'agent.sock'}" in told.stdout
    for words in (("explain", "x"), ("scale", "x", "1")):
        told = verb(*words, *here)
        assert (told.returncode, told.stdout) == (1, "")
        assert told.stderr == "tidegate: A cache agent runs here; it has no pools.\n"
    port = agent.admin_url.rpartition(":")[2]
    told = verb("doctor", "--no-measure", *here, "-s", f"gateway.admin_port={port}")
    assert told.returncode == 0, told.stdout
    assert "held by the cache agent that runs here" in told.stdout


def verb(*words: str) -> subprocess.CompletedProcess[str]:
    """The console, as it is typed; where its output goes has no width."""
    return subprocess.run(
        [COMMAND, *words],
        capture_output=True,
        text=True,
        timeout=100,
        env=ENVIRON,
        check=False,
    )


def test_sites_fetch_what_they_are_told_to(
    agents: Callable[..., Agent], store: IndexedServer, tmp_path: Path
) -> None:
    eu, us = agents("eu"), agents("us")
    url = f"{store.url}/models/tiny/"
    sites = json.dumps({"eu": eu.url, "us": us.url})
    told = console(tmp_path / "here", "replicate", url, "-s", f"modelcache.sites={sites}")
    for name, agent in (("eu", eu), ("us", us)):
        assert told["sites"][name]["done"] is True, told
        (entry,) = agent.listing()["models"]
        assert (entry["url"], entry["complete"]) == (url, True)
        assert entry["size_bytes"] == len(WEIGHTS) + 22


def test_a_site_that_is_not_there_is_exit_code_1(
    agents: Callable[..., Agent], store: IndexedServer, tmp_path: Path
) -> None:
    eu = agents("eu")
    sites = json.dumps({"eu": eu.url})
    words = ("replicate", f"{store.url}/models/none/", "-s", f"modelcache.sites={sites}")
    told = console(tmp_path / "here", *words, status=1)
    assert told["sites"]["eu"]["done"] is False
    assert "none" in told["sites"]["eu"]["error"]


def test_a_node_takes_from_an_agent_what_the_store_gave_it(
    agents: Callable[..., Agent], store: IndexedServer, tmp_path: Path
) -> None:
    """A Tidegate takes from an agent, and gives as an agent does."""
    url = f"{store.url}/models/tiny/"
    first = agents("first")
    console(first.state_dir, "preload", url)
    cache = {"peers": [first.url], "peer_port": 0, "connections": 1}
    with up(tmp_path / "up", pools=[simulated("m")], modelcache=cache, environ=ENVIRON) as tidegate:
        tidegate.expected_log.append("tidegate.modelcache")
        with gives_late(store, first.sent_bytes):
            told = console(tidegate.state_dir, "preload", url)
        assert (Path(told["path"]) / "model.safetensors").read_bytes() == WEIGHTS
        metrics = tidegate.metrics()
        assert metrics.sum("tidegate_cache_read_bytes_total", origin="peers") >= PIECE_BYTES
        found = tidegate.wait("its peers' port", lambda: peer_url_in(tidegate.log()))
        third = agents("third", "modelcache.connections=1", peers=(found,))
        with gives_late(store, lambda: tidegate.metrics().sum("tidegate_cache_sent_bytes_total")):
            told = console(third.state_dir, "preload", url)
        assert (Path(told["path"]) / "model.safetensors").read_bytes() == WEIGHTS


def test_a_node_finds_an_agent_by_a_name(
    agents: Callable[..., Agent], store: IndexedServer
) -> None:
    """``localhost`` stands for a headless service: all its addresses are asked, and one gives."""
    url = f"{store.url}/models/tiny/"
    first = agents("first")
    console(first.state_dir, "preload", url)
    names = json.dumps([f"http://localhost:{first.url.rpartition(':')[2]}"])
    second = agents("second", f"modelcache.peer_names={names}", "modelcache.connections=1")
    with gives_late(store, first.sent_bytes):
        told = console(second.state_dir, "preload", url)
    assert (Path(told["path"]) / "model.safetensors").read_bytes() == WEIGHTS
    traffic = second.admin("/status")["traffic"]
    assert traffic["peer_bytes"] >= PIECE_BYTES
    assert first.url in [one["url"] for one in traffic["peers"] if one["reached"]]


def peer_url_in(log: str) -> str | None:
    """Where a Tidegate says it gives to peers."""
    for line in log.splitlines():
        if "gives pieces to peers at " in line:
            return f"http://{line.rpartition(' ')[2]}"
    return None


def test_a_download_of_an_agent_that_ended_goes_on_with_the_next(
    agents: Callable[..., Agent], store: IndexedServer, tmp_path: Path
) -> None:
    """kill -9 in the middle: what was whole by then is not fetched again."""
    slow: list[str] = []

    def hold(handler: Any, path: str, data: bytes) -> bool:
        if handler.headers.get("Range") and path.endswith(".safetensors"):
            slow.append(path)
            while not over and len(slow) > 2:
                time.sleep(0.02)
        return False

    over: list[bool] = []
    store.fault = hold
    agent = start(tmp_path / "a", "modelcache.connections=1")
    url = f"{store.url}/models/tiny/"
    asking = subprocess.Popen(
        [COMMAND, "model", "preload", url, "-s", f"state_dir={tmp_path / 'a'}"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline_s = time.monotonic() + 60
    while len(slow) < 3:
        assert time.monotonic() < deadline_s
        time.sleep(0.02)
    agent.process.kill()
    agent.process.communicate(timeout=30)
    assert asking.wait(60) == 2
    over.append(True)
    before = len(store.reads())
    agents("a")
    told = console(tmp_path / "a", "preload", url)
    assert (Path(told["path"]) / "model.safetensors").read_bytes() == WEIGHTS
    assert weights_read(store, before) < len(WEIGHTS)
