"""A pool that an operator takes out of service, and puts back."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
from asking import ask, chat, run, spawn
from tidegate_process import SHUT, Tidegate, simulated, up


def pool(tidegate: Tidegate, *arguments: str) -> subprocess.CompletedProcess[str]:
    """``tidegate pool``, as an operator calls it."""
    return subprocess.run(
        [sys.executable, "-m", "gateway.cli.main", "pool", *arguments]
        + ["--config", str(tidegate.state_dir.parent / "tidegate.toml")],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_a_disabled_pool_refuses_new_and_held_requests_by_name_and_alias(tmp_path: Path) -> None:
    pools: list[dict[str, Any]] = [
        simulated("gone", *SHUT, aliases=["gone-too"]),
        simulated("stays"),
    ]

    async def story(tidegate: Tidegate, http: httpx.AsyncClient) -> None:
        held = spawn(ask(http, chat("gone")))
        await asyncio.to_thread(tidegate.wait_held, "gone", 1)
        done = await asyncio.to_thread(pool, tidegate, "disable", "gone-too")
        assert (done.returncode, "out of service" in done.stdout) == (0, True), done.stderr
        answers = [await held, await ask(http, chat("gone")), await ask(http, chat("gone-too"))]
        for answer in answers:
            assert answer.status_code == 503
            assert answer.headers["x-tidegate-reason"] == "model_disabled"
        listed = (await http.get("/v1/models")).json()["data"]
        assert [one["id"] for one in listed] == ["stays"]
        assert (await ask(http, chat("stays"))).status_code == 200
        shown = {one["name"]: one["disabled"] for one in tidegate.admin("/status")["pools"]}
        assert shown == {"gone": True, "stays": False}
        unknown = await asyncio.to_thread(pool, tidegate, "disable", "nobody")
        assert unknown.returncode == 2
        assert "gone, stays" in unknown.stderr
        done = await asyncio.to_thread(pool, tidegate, "enable", "gone")
        assert done.returncode == 0, done.stderr
        again = spawn(ask(http, chat("gone-too")))
        await asyncio.to_thread(tidegate.open_gate, "gone")
        assert (await again).status_code == 200

    with up(tmp_path, pools=pools) as tidegate:
        run(tidegate, lambda http: story(tidegate, http))
