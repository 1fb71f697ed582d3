"""Processes of a whole Tidegate: how it stops, and that nothing outlives it."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
from asking import CHAT, ask, ask_now, chat, held, run, spawn, text_of
from tidegate_process import SHUT, Tidegate, let_go, port_of, simulated, start, up, wait_up

SLOW = ("--decode-tokens-per-s", 20, "--batch-slowdown", 0)


def wait_gone(tidegate: Tidegate, within_s: float = 60.0) -> float:
    """Until no process of this run is left; returns how long that took."""
    began_s = time.monotonic()
    while left := tidegate.survivors():
        assert time.monotonic() - began_s < within_s, left
        time.sleep(0.05)
    return time.monotonic() - began_s


def is_shut(url: str) -> bool:
    """Whether no process listens there."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port_of(url))) != 0


def assert_port_is_free(url: str) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", port_of(url)))


def test_sigterm_finishes_streams_and_held_requests_and_takes_no_new_ones(tmp_path: Path) -> None:
    pools = [simulated("busy", *SLOW), simulated("asleep", *SHUT)]

    async def story(http: httpx.AsyncClient) -> None:
        await ask(http, chat("busy"))
        body = chat("busy", stream=True, max_tokens=40, ignore_eos=True)
        async with http.stream("POST", CHAT, json=body) as answer:
            lines = answer.aiter_lines()
            assert (await anext(lines)).startswith("data: ")
            (waiting,) = await held(tidegate, http, "asleep", 1)
            asleep_url = await asyncio.to_thread(tidegate.starting_url, "asleep")
            tidegate.process.send_signal(signal.SIGTERM)
            await asyncio.to_thread(tidegate.wait, "stopping", lambda: "stopping" in tidegate.log())
            await asyncio.to_thread(tidegate.wait, "its port shut", lambda: is_shut(tidegate.url))
            with pytest.raises(httpx.ConnectError):
                await ask(http, chat("busy"))
            await asyncio.to_thread(tidegate.wait, "it awake", lambda: let_go(asleep_url))
            rest = [line async for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert sum('"content":"' in line for line in rest) >= 40
        text_of(await waiting)

    with up(tmp_path, pools=pools) as tidegate:
        run(tidegate, story)
        assert tidegate.process.wait(60) == 0
        assert tidegate.survivors() == {}
        assert not (tidegate.state_dir / "running.json").exists()
        assert_port_is_free(tidegate.url)
        assert_port_is_free(tidegate.admin_url)


def test_second_sigterm_cuts_and_stops_at_once(tmp_path: Path) -> None:
    async def story(http: httpx.AsyncClient) -> None:
        task = spawn(ask(http, chat("busy", max_tokens=5_000, ignore_eos=True)))
        await asyncio.to_thread(
            tidegate.wait, "one in flight", lambda: tidegate.pool("busy")["inflight_requests"]
        )
        tidegate.process.send_signal(signal.SIGTERM)
        await asyncio.to_thread(tidegate.wait, "stopping", lambda: "stopping" in tidegate.log())
        await asyncio.sleep(1.2)  # sooner it would count as the same signal, passed on by a parent
        tidegate.process.send_signal(signal.SIGTERM)
        with pytest.raises(httpx.HTTPError):
            await task

    with up(tmp_path, pools=[simulated("busy", *SLOW)]) as tidegate:
        began_s = time.monotonic()
        run(tidegate, story)
        assert tidegate.process.wait(60) == 0
        assert time.monotonic() - began_s < 100  # the answer would have taken four minutes
        assert tidegate.survivors() == {}


def test_kill_9_tells_held_clients_at_once_and_finishes_streams(tmp_path: Path) -> None:
    """No process is left that could wake an engine, so waiting would be in vain."""
    pools = [simulated("busy", *SLOW), simulated("asleep", "--startup-s", 600)]

    async def story(http: httpx.AsyncClient) -> None:
        await ask(http, chat("busy"))
        body = chat("busy", stream=True, max_tokens=40, ignore_eos=True)
        async with http.stream("POST", CHAT, json=body) as answer:
            lines = answer.aiter_lines()
            assert (await anext(lines)).startswith("data: ")
            (waiting,) = await held(tidegate, http, "asleep", 1)
            tidegate.process.kill()
            told = await asyncio.wait_for(waiting, 60)
            rest = [line async for line in lines if line]
        assert told.status_code == 503
        assert told.headers["x-tidegate-reason"] == "draining"
        assert int(told.headers["retry-after"]) >= 1
        assert rest[-1] == "data: [DONE]"

    with up(tmp_path, pools=pools, autoscaler={"keep_engines_s": 1}) as tidegate:
        run(tidegate, story)
        tidegate.process.wait()
        wait_gone(tidegate)


def test_sigterm_gives_held_requests_no_longer_than_the_drain(tmp_path: Path) -> None:
    pools = [simulated("asleep", "--startup-s", 600)]

    async def story(http: httpx.AsyncClient) -> httpx.Response:
        (waiting,) = await held(tidegate, http, "asleep", 1)
        tidegate.process.send_signal(signal.SIGTERM)
        return await waiting

    with up(tmp_path, pools=pools, gateway={"drain_s": 0.5}) as tidegate:
        told = run(tidegate, story)
        assert told.status_code == 503
        assert told.headers["x-tidegate-reason"] == "draining"
        assert tidegate.process.wait(60) == 0


def test_trap_4_second_tidegate_of_a_state_directory_is_refused(tmp_path: Path) -> None:
    pools = [simulated("one")]
    with up(tmp_path, pools=pools) as first:
        text_of(ask_now(first, chat("one")))
        second = start(tmp_path, pools=pools)
        try:
            assert second.process.wait(60) == 2
            assert second.survivors() == {}
            (line,) = [line for line in second.log().splitlines() if line]
            assert str(tmp_path) in line
            assert "belongs to another Tidegate that is running" in line
        finally:
            second.kill_all()
        # The first has not lost its engine, nor its record.
        text_of(ask_now(first, chat("one")))
        assert first.starts("one") == 1
        assert (first.state_dir / "running.json").exists()


@pytest.mark.parametrize("field", ["port", "admin_port"])
def test_port_in_use_is_refused_in_one_line(tmp_path: Path, field: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        second = start(tmp_path, pools=[simulated("one")], gateway={field: port})
        try:
            assert second.process.wait(60) == 2
            assert re.fullmatch(
                f"tidegate: gateway.{field} = {port}: cannot listen on 127.0.0.1:{port}: another "
                r"program listens there; stop it, or choose another port \(.*, line \d+\)\n",
                second.log(),
            )
        finally:
            second.kill_all()


def test_each_replica_has_a_log_of_its_own(tmp_path: Path) -> None:
    with up(tmp_path, pools=[simulated("a/b c".replace(" ", "-"), idle_to_zero_s=0.2)]) as gate:
        for number in (1, 2):
            text_of(ask_now(gate, chat("a/b-c")))
            gate.wait_at_zero("a/b-c")
            assert len(gate.engine_logs("a-b-c")) == number
        for log in gate.engine_logs("a-b-c"):
            assert "startup complete (simulated)" in log.read_text()
        # Nothing was written beside the state directory.
        assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["state"]


def test_the_installed_command_is_the_same(tmp_path: Path) -> None:
    """``tidegate`` itself, not its module: what a user types."""
    command = Path(sys.executable).parent / "tidegate"
    state = f"state_dir={tmp_path}"
    up_command = [command, "up", "--engine", "simulated", "--port", "0", "--admin-port", "0"]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            [*up_command, "-s", state], stdout=log, stderr=log, env={**os.environ}
        )
    gate = Tidegate(process=process, state_dir=tmp_path, log_path=tmp_path / "log", mark="none")
    try:
        wait_up(gate)
        text_of(ask_now(gate, chat("simulated")))
        shown = subprocess.run(
            [command, "status", "-s", state], capture_output=True, text=True, timeout=60, check=True
        )
        assert "simulated" in shown.stdout
        assert gate.url in gate.log()  # the banner
        process.send_signal(signal.SIGINT)  # Ctrl-C
        assert process.wait(60) == 0
    finally:
        process.kill()
