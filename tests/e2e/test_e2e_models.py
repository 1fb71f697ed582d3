"""``tidegate model`` as its users have it: the command itself, a real store, a real cache, alone
and beside a Tidegate that runs."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from object_server import Handler, IndexedServer, serving
from tidegate_process import Tidegate, simulated, up

from modelcache.types import PIECE_BYTES

WEIGHTS_BYTES = 3 * PIECE_BYTES + 12_345
HEADER_BYTES = 100
COMMAND = Path(sys.executable).parent / "tidegate"


@pytest.fixture(scope="module")
def weights() -> bytes:
    return random.Random(8).randbytes(WEIGHTS_BYTES)


@pytest.fixture
def store(weights: bytes) -> Iterator[IndexedServer]:
    server = IndexedServer()
    server.objects = {
        "models/tiny/config.json": b'{"model_type": "tiny"}',
        "models/tiny/model.safetensors": weights,
    }
    with serving(server):
        yield server


def url_of(store: IndexedServer) -> str:
    return f"{store.url}/models/tiny/"


def weights_read(store: IndexedServer, after: int) -> int:
    """Bytes of weights that were asked for in pieces; a listing looks at headers too."""
    ranges = [
        headers["range"].removeprefix("bytes=").split("-")
        for _, path, headers in store.reads()[after:]
        if path.endswith(".safetensors")
    ]
    sizes = [int(end) - int(start) + 1 for start, end in ranges]
    return sum(size for size in sizes if size > HEADER_BYTES)


class Console:
    """The command, with the state directory of one test."""

    def __init__(self, state_dir: Path) -> None:
        self.state_dir = state_dir

    def argv(self, *words: str) -> list[str]:
        return [str(COMMAND), "model", *words, "-s", f"state_dir={self.state_dir}"]

    def run(self, *words: str, status: int = 0) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            self.argv(*words), capture_output=True, text=True, timeout=100, check=False
        )
        assert done.returncode == status, (done.stdout, done.stderr)
        assert "Traceback" not in done.stderr
        return done

    def told(self, *words: str, status: int = 0) -> Any:
        return json.loads(self.run(*words, "--json", status=status).stdout)


@pytest.fixture(scope="module", autouse=True)
def ctrl_c() -> Iterator[None]:
    """A shell has what it runs in the background ignore SIGINT, and that is inherited."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def console(tmp_path: Path) -> Console:
    return Console(tmp_path / "state")


@pytest.fixture(params=[False, True], ids=["alone", "beside a Tidegate"])
def both_ways(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Console]:
    """The same commands with and without a Tidegate that runs with this state directory."""
    if not request.param:
        yield Console(tmp_path / "state")
        return
    with up(tmp_path, pools=[simulated("m")]) as tidegate:
        tidegate.expected_log.append("tidegate.modelcache")
        yield Console(tidegate.state_dir)


def test_a_model_s_life(both_ways: Console, store: IndexedServer, weights: bytes) -> None:
    console, url = both_ways, url_of(store)
    assert console.told("ls")["models"] == []
    told = console.told("preload", url)
    assert (told["model"], told["files"], told["was_there"]) == (url, 2, False)
    there = Path(told["path"])
    assert (there / "model.safetensors").read_bytes() == weights
    assert (there / "config.json").read_bytes() == b'{"model_type": "tiny"}'
    before = len(store.reads())
    assert console.told("preload", url)["was_there"] is True
    assert weights_read(store, before) == 0, "what is there is not fetched again"
    (entry,) = console.told("ls")["models"]
    assert (entry["url"], entry["complete"], entry["pinned"]) == (url, True, False)
    assert entry["size_bytes"] == WEIGHTS_BYTES + 22
    pages = console.told("prewarm", url)["pages"]
    assert pages["after"]["bytes_cached"] == WEIGHTS_BYTES
    console.run("pin", url)
    assert console.told("ls")["models"][0]["pinned"] is True
    refused = console.run("evict", url, status=1)
    assert refused.stderr.startswith("tidegate: ")
    assert refused.stderr.count("\n") == 1
    console.run("unpin", url)
    assert console.told("evict", url)["freed_bytes"] >= WEIGHTS_BYTES
    assert console.told("ls")["models"] == []
    assert not there.exists()


def test_a_flipped_bit_is_found_and_mended(
    both_ways: Console, store: IndexedServer, weights: bytes
) -> None:
    console, url = both_ways, url_of(store)
    there = Path(console.told("preload", url)["path"]) / "model.safetensors"
    assert console.told("verify", url)["damage"] == []
    blob = there.resolve()
    os.chmod(blob, 0o644)
    with blob.open("r+b") as file:
        file.seek(PIECE_BYTES + 5)
        file.write(bytes([weights[PIECE_BYTES + 5] ^ 1]))
    told = console.told("verify", url, status=1)
    assert len(told["damage"]) == 1
    assert "model.safetensors" in json.dumps(told["damage"])
    assert console.told("verify", url, "--repair")["repaired"] is True
    assert there.read_bytes() == weights
    assert console.told("verify", url)["damage"] == []


def test_what_is_not_there_is_one_line(both_ways: Console, store: IndexedServer) -> None:
    for words in (("preload", f"{store.url}/models/none/"), ("verify", url_of(store))):
        failed = both_ways.run(*words, status=1)
        assert failed.stdout == ""
        assert failed.stderr.startswith("tidegate: ")
        assert failed.stderr.count("\n") == 1


class Slow:
    """Holds back the weights until it is told to go on, or who asked has gone."""

    def __init__(self) -> None:
        self.asked = 0
        self.left = 0
        self.over = False

    def __call__(self, handler: Handler, path: str, data: bytes) -> bool:
        if handler.headers.get("Range") and path.endswith(".safetensors"):
            self.asked += 1
            while not self.over and self.asked > 2:
                if has_left(handler.connection):
                    self.left += 1
                    handler.close_connection = True
                    return True
                time.sleep(0.02)
        return False


def has_left(connection: socket.socket) -> bool:
    """Whether the other side has closed a connection."""
    try:
        return not connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:
        return False
    except ConnectionError:
        return True


def test_ctrl_c_ends_a_download_and_the_next_goes_on(
    console: Console, store: IndexedServer, weights: bytes
) -> None:
    slow = Slow()
    store.fault = slow
    process = subprocess.Popen(
        console.argv("preload", url_of(store), "-s", "modelcache.connections=1"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline_s = time.monotonic() + 60
    while slow.asked < 3:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline_s
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert "Traceback" not in err
    slow.over = True
    before = len(store.reads())
    there = Path(console.told("preload", url_of(store))["path"])
    assert (there / "model.safetensors").read_bytes() == weights
    fetched = weights_read(store, before)
    assert fetched < WEIGHTS_BYTES, "pieces that were whole are not fetched again"


def test_a_model_is_held_for_an_engine_that_opens_a_link(
    both_ways: Console, store: IndexedServer, weights: bytes, tmp_path: Path
) -> None:
    console, link = both_ways, tmp_path / "model"
    link.symlink_to(tmp_path / "of an earlier one")
    process = subprocess.Popen(
        console.argv("hold", url_of(store), "--link", str(link)), stderr=subprocess.PIPE, text=True
    )
    try:
        deadline_s = time.monotonic() + 60
        while not link.exists():
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline_s
            time.sleep(0.02)
        assert (link / "model.safetensors").read_bytes() == weights
        refused = console.run("evict", url_of(store), "--force", status=1)
        assert f"held by process {process.pid}" in refused.stderr
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0, process.communicate()
    finally:
        process.kill()
        process.communicate()
    console.run("evict", url_of(store))
    assert not link.exists()


def test_a_link_that_cannot_be_made_is_one_line(
    both_ways: Console, store: IndexedServer, tmp_path: Path
) -> None:
    link = str(tmp_path / "no" / "model")
    told = both_ways.run("hold", url_of(store), "--link", link, status=1)
    assert f"--link {link}: No such file or directory" in told.stderr


def test_a_running_one_s_download_goes_when_its_console_goes(
    tmp_path: Path, store: IndexedServer
) -> None:
    """The work is the Tidegate's; the console's end calls it off."""
    slow = Slow()
    store.fault = slow
    with up(tmp_path, pools=[simulated("m")]) as tidegate:
        tidegate.expected_log.append("tidegate.modelcache")
        console = Console(tidegate.state_dir)
        process = subprocess.Popen(console.argv("preload", url_of(store)))
        wait(tidegate, lambda: slow.asked >= 3)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
        wait(tidegate, lambda: slow.left)  # else it could have fetched all before it is called off
        slow.over = True
        wait(tidegate, lambda: not console.told("ls")["models"][0]["complete"])
        console.run("preload", url_of(store))
        assert console.told("ls")["models"][0]["complete"] is True


def wait(tidegate: Tidegate, look: Any) -> None:
    tidegate.wait("it", look)
