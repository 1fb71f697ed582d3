"""Settings that are read again while requests are on their way."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pty
import signal
import subprocess
import sys
import time
import urllib.error
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
from asking import CHAT, ask, ask_now, chat, run, spawn
from tidegate_process import (
    MARK,
    POLL_S,
    SHUT,
    WAIT_S,
    Tidegate,
    let_go,
    simulated,
    up,
    wait_up,
    write_settings,
)

STREAMS = 50
HELD = 50
TOKENS = 60
RATE = ("--decode-tokens-per-s", 50, "--batch-slowdown", 0)
SLOW = ("--fault", "slow:factor=100")
"""Two seconds for a token, until the test says otherwise: streams last as long as it takes."""


def reload(tidegate: Tidegate, *arguments: str) -> subprocess.CompletedProcess[str]:
    """``tidegate reload``, as an operator calls it."""
    config = tidegate.state_dir.parent / "tidegate.toml"
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "gateway.cli.main",
            "reload",
            "--admin",
            str(tidegate.state_dir / "admin.sock"),
        ]
        + ["--config", str(config), *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def pools_of(tidegate: Tidegate) -> dict[str, dict[str, Any]]:
    return {pool["name"]: pool for pool in tidegate.admin("/status")["pools"]}


async def stream(http: httpx.AsyncClient, model: str) -> int:
    """A streamed answer to its end; how many pieces of text it had."""
    pieces, done = 0, False
    body = chat(model, stream=True, max_tokens=TOKENS, ignore_eos=True)
    async with http.stream("POST", CHAT, json=body) as answer:
        assert answer.status_code == 200, await answer.aread()
        async for line in answer.aiter_lines():
            assert not (done and line), "there was more after the end"
            if line == "data: [DONE]":
                done = True
            elif line.startswith("data: "):
                choices = json.loads(line.removeprefix("data: "))["choices"]
                pieces += sum(bool(one["delta"].get("content")) for one in choices)
    assert done
    return pieces


def test_nothing_is_lost_while_pools_are_added_changed_and_removed(tmp_path: Path) -> None:
    bounds = {"min_replicas": 1, "max_replicas": 2, "target_inflight_tokens": 100_000}
    before = [
        simulated("changes", *RATE, *SLOW, **bounds),
        simulated("goes", *RATE, *SLOW, **bounds),
        simulated("waits", *SHUT),
        simulated("leaves", *SHUT),
    ]
    after = [
        simulated("changes", *RATE, **bounds),
        simulated("waits", *SHUT, aliases=["waits-too"], max_inflight_requests=9),
        simulated("comes", min_replicas=1),
    ]
    options: dict[str, Any] = {
        "gateway": {"holding": {"deadline_s": 100}},
        "autoscaler": {"drain_s": 600},
    }

    async def story(tidegate: Tidegate, http: httpx.AsyncClient) -> None:
        def all_stream() -> bool:
            pools = pools_of(tidegate)
            return all(pools[one]["inflight_requests"] == STREAMS for one in ("changes", "goes"))

        streams = [
            spawn(stream(http, model)) for model in ("changes", "goes") for _ in range(STREAMS)
        ]
        held = [
            spawn(ask(http, chat(model, f"number {n}")))
            for model in ("waits", "leaves")
            for n in range(HELD)
        ]
        await asyncio.to_thread(tidegate.wait, "all streams", all_stream)
        for model in ("waits", "leaves"):
            await asyncio.to_thread(tidegate.wait_held, model, HELD)
        assert all_stream()
        write_settings(tmp_path, pools=after, **options)
        done = await asyncio.to_thread(reload, tidegate, "--json")
        assert done.returncode == 0, done.stderr
        answer = json.loads(done.stdout)
        assert (answer["added"], answer["removed"]) == (["comes"], ["goes", "leaves"])
        assert [(one["name"], one["replaces"]) for one in answer["changed"]] == [
            ("changes", True),
            ("waits", False),
        ]
        assert answer["needs_restart"] == []
        # From now on the removed names are unknown, the new ones known, and the rest goes on.
        for model in ("goes", "leaves"):
            refused = await ask(http, chat(model))
            assert refused.status_code == 404
            assert refused.headers["x-tidegate-reason"] == "model_unknown"
        more = [spawn(ask(http, chat(model))) for model in ("comes", "changes", "waits-too")]
        for model in ("leaves", "waits"):
            await asyncio.to_thread(tidegate.open_gate, model)
        answers = await asyncio.gather(*held)
        assert not any(one.done() for one in streams)
        for url in old:
            assert await asyncio.to_thread(let_go, url)
        answers += await asyncio.gather(*more)
        assert [one.status_code for one in answers] == [200] * len(answers)
        assert await asyncio.gather(*streams) == [TOKENS] * len(streams)

    with up(tmp_path, pools=before, **options) as tidegate:
        for name in ("changes", "goes"):
            tidegate.wait_ready(name)
        old = [tidegate.engine_url(name) for name in ("changes", "goes")]
        run(tidegate, lambda http: story(tidegate, http))
        tidegate.wait("the pools to be those of the file", lambda: len(pools_of(tidegate)) == 3)
        tidegate.wait(
            "the old replica to be gone",
            lambda: [one["url"] in old for one in tidegate.pool("changes")["replicas"]] == [False],
        )
        assert ask_now(tidegate, chat("changes")).status_code == 200
        assert not tidegate.metrics().has("tidegate_arrivals_total", pool="goes")


def test_the_three_ways_to_reload_do_the_same(tmp_path: Path) -> None:
    def pools(*names: str) -> Sequence[dict[str, Any]]:
        return [simulated(name) for name in names]

    with up(tmp_path, pools=pools("a"), arguments=["--set", 'pools.0.aliases=["z"]']) as tidegate:
        write_settings(tmp_path, pools=pools("b"))
        done = reload(tidegate)
        assert (done.returncode, done.stdout.splitlines()) == (
            0,
            ["pool b is added", "pool a is removed; it serves the requests it has"],
        )
        write_settings(tmp_path, pools=pools("c"), autoscaler={"idle_to_zero_s": 9})
        answer = tidegate.admin("/reload", {})
        assert answer == {
            "added": ["c"],
            "changed": [],
            "removed": ["b"],
            "applied": ["autoscaler.idle_to_zero_s"],
            "needs_restart": [],
        }
        write_settings(tmp_path, pools=pools("d"), state_dir=str(tmp_path / "elsewhere"))
        os.kill(tidegate.pid, signal.SIGHUP)
        tidegate.wait("pool d alone", lambda: list(pools_of(tidegate)) == ["d"])
        assert "needs a restart: state_dir" in tidegate.log()
        assert pools_of(tidegate)["d"]["aliases"] == ["z"]  # --set counts as at the start
        assert ask_now(tidegate, chat("z")).status_code == 200
        assert reload(tidegate).stdout.splitlines()[-1] == "needs a restart: state_dir"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[autoscaler\n", "tidegate.toml"),
        ("[autoscaler]\ntick_s = -1\n", "autoscaler.tick_s"),
        ('[[pools]]\nname = "a"\nengine = "simulated"\nmodel = "a"\n'
         'engine_args = ["--port", "1"]\n', "--port"),
    ],
)  # fmt: skip
def test_settings_with_a_mistake_change_nothing(tmp_path: Path, text: str, says: str) -> None:
    with up(tmp_path, pools=[simulated("a"), simulated("b")]) as tidegate:
        tidegate.expected_log.append("the settings were not reloaded")
        before = pools_of(tidegate)
        (tmp_path / "tidegate.toml").write_text(text, encoding="utf-8")
        done = reload(tidegate)
        assert done.returncode == 2
        assert says in done.stderr
        with pytest.raises(urllib.error.HTTPError) as refused:
            tidegate.admin("/reload", {})
        assert refused.value.code == 400
        assert refused.value.headers["x-tidegate-reason"] == "bad_settings"
        os.kill(tidegate.pid, signal.SIGHUP)
        tidegate.wait(
            "the log to say so", lambda: "the settings were not reloaded" in tidegate.log()
        )
        assert pools_of(tidegate).keys() == before.keys()
        assert ask_now(tidegate, chat("b")).status_code == 200


def test_a_signal_to_reload_during_the_start_is_taken_when_all_is_there(tmp_path: Path) -> None:
    config = write_settings(tmp_path, pools=[simulated("a")])
    text = config.read_bytes()
    config.unlink()
    os.mkfifo(config)
    with (tmp_path / "log").open("wb") as log:
        words = ["-m", "gateway.cli.main", "up", "--config", str(config)]
        environ = {**os.environ, MARK: str(tmp_path)}
        process = subprocess.Popen([sys.executable, *words], stdout=log, stderr=log, env=environ)
    tidegate = Tidegate(
        process=process,
        state_dir=tmp_path / "state",
        log_path=tmp_path / "log",
        mark=str(tmp_path),
    )
    try:
        with config.open("wb") as file:  # from here on it reads its settings, and waits for them
            config.unlink()
            write_settings(tmp_path, pools=[simulated("b")])
            os.kill(process.pid, signal.SIGHUP)
            file.write(text)
        wait_up(tidegate)
        tidegate.wait("pool b alone", lambda: list(pools_of(tidegate)) == ["b"])
        tidegate.stop()
    finally:
        tidegate.kill_all()


def test_started_with_nohup_it_still_reloads(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        context = up(tmp_path, pools=[simulated("a")])
        tidegate = context.__enter__()
    finally:
        signal.signal(signal.SIGHUP, before)
    with contextlib.ExitStack() as stack:
        stack.push(context)
        write_settings(tmp_path, pools=[simulated("b")])
        os.kill(tidegate.pid, signal.SIGHUP)
        tidegate.wait("pool b alone", lambda: list(pools_of(tidegate)) == ["b"])
        pid = tidegate.admin("/status")["workers"][0]["pid"]
        os.kill(pid, signal.SIGHUP)
        assert ask_now(tidegate, chat("b")).status_code == 200
        assert tidegate.admin("/status")["workers"][0]["pid"] == pid


def test_a_terminal_that_is_closed_stops_it_and_reloads_nothing(tmp_path: Path) -> None:
    config = write_settings(tmp_path, pools=[simulated("a")])
    pid, terminal = pty.fork()
    if pid == 0:
        words = ["-m", "gateway.cli.main", "up", "--config", str(config)]
        os.execv(sys.executable, [sys.executable, *words])
    ended = (0, 0)
    try:
        record = tmp_path / "state" / "running.json"
        seen = b""
        while b"stop it with Ctrl-C" not in seen:
            seen += os.read(terminal, 65536)
        assert json.loads(record.read_text())["pid"] == pid
        os.close(terminal)
        deadline_s = time.monotonic() + WAIT_S
        while (ended := os.waitpid(pid, os.WNOHANG))[0] == 0:
            assert time.monotonic() < deadline_s
            time.sleep(POLL_S)
        assert os.waitstatus_to_exitcode(ended[1]) == 0
        assert not record.exists()
    finally:
        if not ended[0]:
            os.kill(pid, signal.SIGKILL)


def test_limits_of_the_data_path_apply_at_once(tmp_path: Path) -> None:
    pool = simulated("a", *SHUT)
    with up(tmp_path, pools=[pool], gateway={"workers": 2}) as tidegate:

        async def story(http: httpx.AsyncClient) -> None:
            first = spawn(ask(http, chat("a")))
            await asyncio.to_thread(tidegate.wait_held, "a", 1)
            write_settings(
                tmp_path, pools=[pool], gateway={"workers": 2, "holding": {"max_requests": 1}}
            )
            answer = await asyncio.to_thread(tidegate.admin, "/reload", {})
            assert answer["applied"] == ["gateway.holding.max_requests"]

            async def is_full() -> bool:
                """A worker that has not read of it yet holds the request; asked again, it has."""
                with contextlib.suppress(httpx.ReadTimeout):
                    answer = await http.post(CHAT, json=chat("a"), timeout=1.0)
                    return answer.status_code == 429
                return False

            while not await is_full():
                pass
            await asyncio.to_thread(tidegate.open_gate, "a")
            assert (await first).status_code == 200

        run(tidegate, story)
