"""Why a pool had the replicas it had: while Tidegate runs, after it was killed, and its score."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from tidegate_process import Tidegate, fetch, simulated, start, wait_up

POOLS = [simulated("chat", max_replicas=3, target_inflight_tokens=64), simulated("idle")]


def cli(directory: Path, *words: object, status: int = 0) -> str:
    """``tidegate explain``, as its users run it: what it says."""
    done = subprocess.run(
        [sys.executable, "-m", "gateway.cli.main", "explain", *map(str, words)]
        + ["-c", str(directory / "tidegate.toml")],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == status, done.stderr
    return done.stdout if status == 0 else done.stderr


def ask(tidegate: Tidegate) -> None:
    body = {"model": "chat", "prompt": "hello there", "max_tokens": 16, "stream": True}
    fetch(f"{tidegate.url}/v1/completions", body)


def decisions_of(directory: Path, at_s: float) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(
        cli(directory, "chat", "--at", f"{at_s:.3f}", "--json", "--limit", 50)
    )
    return found


@pytest.mark.timeout(400)
def test_decisions_are_explained_while_it_runs_and_after_a_kill(tmp_path: Path) -> None:
    tidegate = start(tmp_path, pools=POOLS)
    try:
        wait_up(tidegate)
        ask(tidegate)
        tidegate.wait_ready("chat")
        woken_s = time.time()
        for _ in range(10):
            ask(tidegate)
        # Before anything is in the file.
        found = decisions_of(tmp_path, woken_s)
        assert found["pool"] == "chat"
        reasons = [one["reason"] for one in found["decisions"]]
        assert reasons[:2] == ["at_zero", "wake"]
        assert found["decision"]["inputs"]["ready"] in {0, 1}
        assert "desired" in cli(tmp_path, "chat", "--at", "1s ago")
        early = woken_s - 3600
        said = cli(tmp_path, "chat", "--at", f"{early:.0f}", status=1)
        assert "No decision of chat is known at" in said
        assert "the nearest is at" in said
        assert "There is no pool 'none'" in cli(tmp_path, "none", "--at", "1m", status=2)

        while time.time() < woken_s + 66:  # decisions are written once a minute
            ask(tidegate)
            time.sleep(1.0)
        scored = json.loads(cli(tmp_path, "chat", "--score", "--json"))
        total_s = scored["scored_s"] + scored["unknown_s"]
        assert total_s == pytest.approx(time.time() - woken_s, abs=30)
        text = cli(tmp_path, "chat", "--score", "--since", "1h")
        assert "forecast" in text
        tidegate.process.kill()
        tidegate.process.wait(30)
    finally:
        tidegate.kill_all()
    again = decisions_of(tmp_path, woken_s)  # from the file
    assert again["decision"] == found["decision"] | {
        "count": again["decision"]["count"],
        "last_at_s": again["decision"]["last_at_s"],
    }
    assert "wake" in cli(tmp_path, "chat", "--at", f"{woken_s:.3f}")
    said = cli(tmp_path, "idle", "--at", f"{woken_s + 1:.0f}")
    assert "scaled to zero, no demand" in said
