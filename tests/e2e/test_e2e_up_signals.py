"""What other autoscalers are told by a real Tidegate, and how soon they hear of a held request."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

from asking import ask_now, chat
from tidegate_process import SHUT, simulated, up


def test_a_held_request_ends_the_wait_for_signals(tmp_path: Path) -> None:
    pools = [simulated("org/chat", *SHUT), simulated("idle")]
    with up(tmp_path, pools=pools) as tidegate:

        def pool(answer: dict[str, Any], name: str) -> dict[str, Any]:
            return next(one for one in answer["pools"] if one["pool"] == name)

        def at_rest() -> dict[str, Any] | None:
            answer: dict[str, Any] = tidegate.admin("/signals")
            idle = all(one["active"] is False for one in answer["pools"])
            return answer if idle and answer["pools"][0]["window_s"] else None

        before = tidegate.wait("pools at rest", at_rest)
        first = pool(before, "org/chat")
        assert (first["slug"], first["queued_requests"], first["desired_replicas"]) == (
            "org-chat", 0, 0,
        )  # fmt: skip
        assert (first["ttft"]["p95_s"], first["kv_cache_usage_mean_fraction"]) == (None, None)

        heard: list[tuple[float, dict[str, Any]]] = []

        def wait() -> None:
            answer = tidegate.admin(f"/signals?after={before['version']}&wait_s=30")
            heard.append((time.monotonic(), answer))

        waiting = threading.Thread(target=wait)
        waiting.start()
        time.sleep(0.5)
        assert heard == []  # nothing has changed
        asking = threading.Thread(target=ask_now, args=(tidegate, chat("org/chat")))
        asked_s = time.monotonic()
        asking.start()
        waiting.join(60)
        heard_s, answer = heard[0]
        assert heard_s - asked_s < 25  # long before the wait would have ended
        assert pool(answer, "org/chat")["active"] is True
        assert pool(answer, "idle")["active"] is False
        tidegate.wait_held("org/chat", 1)

        def held() -> bool:
            found = pool(tidegate.admin("/signals"), "org/chat")
            return (found["queued_requests"], found["desired_replicas"]) == (1, 1)

        tidegate.wait("the held request in the signals", held)
        tidegate.open_gate("org/chat")
        asking.join(60)
        tidegate.wait("its end", at_rest)
