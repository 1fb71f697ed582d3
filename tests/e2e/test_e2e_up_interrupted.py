"""Ctrl-C and other signals before Tidegate is ready, and while it ends.

A terminal gives Ctrl-C to the whole process group, workers too.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

COMMAND = str(Path(sys.executable).parent / "tidegate")
LIMIT_S = 60.0

# Python runs this before a worker's first line of its own: there it waits to be let on.
WAIT_IN_WORKERS = """
import os, sys, time
if "gateway.datapath" in sys.orig_argv:
    open(os.environ["GATE"] + f"/came-{os.getpid()}", "w").close()
    end_s = time.monotonic() + 60
    while not os.path.exists(os.environ["GATE"] + "/go") and time.monotonic() < end_s:
        time.sleep(0.02)
"""


def eventually(look: Callable[[], object], what: str) -> None:
    end_s = time.monotonic() + LIMIT_S
    while not look():
        assert time.monotonic() < end_s, what
        time.sleep(0.02)


@pytest.fixture
def gate(tmp_path: Path) -> Path:
    """A directory in which workers leave a file when they begin, and wait for one called ``go``."""
    there = tmp_path / "gate"
    there.mkdir()
    (there / "sitecustomize.py").write_text(WAIT_IN_WORKERS)
    return there


@pytest.fixture
def up(tmp_path: Path, gate: Path) -> Iterator[subprocess.Popen[bytes]]:
    """``tidegate up`` with two workers, in a process group of its own."""
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            [COMMAND, "up", "--engine", "simulated", "--port", "0", "--admin-port", "0"]
            + ["--workers", "2", "-s", f"state_dir={tmp_path / 'state'}"],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(gate), "GATE": str(gate)},
            start_new_session=True,
        )
    try:
        yield process
    finally:
        (gate / "go").touch()
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(LIMIT_S)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_while_workers_start_is_no_fault(
    tmp_path: Path, gate: Path, up: subprocess.Popen[bytes], number: signal.Signals
) -> None:
    def log() -> str:
        return (tmp_path / "log").read_text()

    eventually(lambda: len(list(gate.glob("came-*"))) == 2 or up.poll() is not None, "two workers")
    workers = [int(path.name.removeprefix("came-")) for path in gate.glob("came-*")]
    os.killpg(up.pid, number)
    eventually(lambda: "stopping: " in log() or up.poll() is not None, "stopping")
    (gate / "go").touch()
    assert up.wait(LIMIT_S) == 0, log()
    for word in ("Traceback", "KeyboardInterrupt", "ERROR", "starting it again", "ready at"):
        assert word not in log(), log()
    assert len(list(gate.glob("came-*"))) == 2
    assert not [pid for pid in workers if Path(f"/proc/{pid}").exists()]


def test_kill_9_while_workers_start_leaves_none(gate: Path, up: subprocess.Popen[bytes]) -> None:
    """They heed no Ctrl-C; that their channel is closed they see as soon as they look."""
    eventually(lambda: len(list(gate.glob("came-*"))) == 2, "two workers")
    workers = [int(path.name.removeprefix("came-")) for path in gate.glob("came-*")]
    up.kill()
    up.wait(LIMIT_S)
    (gate / "go").touch()
    eventually(
        lambda: not [pid for pid in workers if Path(f"/proc/{pid}").exists()], "no worker left"
    )


def test_an_interrupt_while_it_imports_is_130_and_no_traceback(tmp_path: Path) -> None:
    """The first that takes time is typer: here Ctrl-C comes while it is being imported."""
    (tmp_path / "typer.py").write_text(
        "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(20)\n"
    )
    done = subprocess.run(
        [COMMAND, "status"],
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


# The command sends itself a signal at a chosen moment: when it imports typer, when it has bound its
# first port, when its event loop has closed, when the interpreter ends.
SIGNAL_AT = """
import asyncio, atexit, os, signal, sys

def send(moment):
    if os.environ["MOMENT"] == moment:
        os.kill(os.getpid(), int(os.environ["SIGNAL"]))

def audit(event, arguments):
    global bound
    if event == "import" and arguments[0] == "typer":
        send("import")
    if event == "socket.bind" and not bound:
        bound = True
        os.kill(os.getpid(), signal.SIGTERM)
        send("bind")

bound = False
close = asyncio.SelectorEventLoop.close

def close_and_send(loop):
    close(loop)
    send("loop closed")

if "gateway.datapath" not in sys.orig_argv:
    sys.addaudithook(audit)
    asyncio.SelectorEventLoop.close = close_and_send
    atexit.register(send, "exit")
"""
MOMENTS = [
    ("up", "import", signal.SIGINT),
    ("up", "import", signal.SIGTERM),
    ("up", "bind", signal.SIGINT),
    ("up", "bind", signal.SIGQUIT),
    ("up", "loop closed", signal.SIGINT),
    ("up", "loop closed", signal.SIGHUP),
    ("up", "exit", signal.SIGTERM),
    ("agent", "import", signal.SIGTERM),
    ("agent", "bind", signal.SIGQUIT),
    ("agent", "loop closed", signal.SIGTERM),
    ("agent", "exit", signal.SIGINT),
]


@pytest.mark.parametrize(("verb", "moment", "number"), MOMENTS)
def test_a_signal_at_any_moment_ends_it_in_order(
    tmp_path: Path, verb: str, moment: str, number: signal.Signals
) -> None:
    (tmp_path / "sitecustomize.py").write_text(SIGNAL_AT)
    flags = {
        "up": ["--engine", "simulated", "--port", "0", "--workers", "1"],
        "agent": ["--peer-port", "0", "-s", f"modelcache.dir={tmp_path / 'cache'}"],
    }
    done = subprocess.run(
        [COMMAND, verb, *flags[verb], "--admin-port", "0", "-s", f"state_dir={tmp_path / 'state'}"],
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        cwd=tmp_path,
        env={
            **os.environ,
            "PYTHONPATH": str(tmp_path),
            "MOMENT": moment,
            "SIGNAL": str(int(number)),
            "TIDEGATE_PEER_TOKEN": "a-secret-of-this-test-only-0123456789",
        },
        check=False,
    )
    interrupted = (moment, number) == ("import", signal.SIGINT)
    assert done.returncode == (130 if interrupted else 0), done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    assert not (tmp_path / "state" / "running.json").exists()
