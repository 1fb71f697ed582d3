"""What is measured: the load of each scenario, and how long."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from bench.workload import Shape

KB = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """One load, offered to every contender in every round."""

    name: str
    title: str
    shape: Shape
    unit: Literal["request", "chunk"] = "request"
    """What the CPU is divided by."""
    connections: int = 64
    warmup_s: float = 0.2
    window_s: float = 1.2
    rate: float = 0.0
    """Requests per second on a fixed schedule; 0: each connection asks again once answered."""
    spread_s: float = 0.0
    drain_s: float = 1.0
    spin: bool = True
    """The load generator never sleeps, so that no router is charged for waking it."""
    direct: bool = False
    """Also measured against a replica itself, without a router."""

    def arguments(self, scale: float) -> list[str]:
        """The load generator's options; ``scale`` shortens the window (a quick run)."""
        options = {
            "--connections": self.connections,
            "--warmup-s": self.warmup_s,
            "--window-s": self.window_s * scale,
            "--rate": self.rate,
            "--spread-s": self.spread_s,
            "--drain-s": self.drain_s,
        }
        given = [part for name, value in options.items() for part in (name, f"{value:g}")]
        return [*given, "--spin"] if self.spin else given


SMALL = Shape(name="small", prompt_bytes=300)
# Enough streams to keep the core busy for a third of the time: at a tenth, what waking up costs on
# a virtual machine hides what a chunk costs, and the same router measures 9 or 17 us a chunk.
STREAM = Shape(name="stream", prompt_bytes=300, stream=True, tokens=100, interval_ms=20)

ROUNDS = (
    Scenario(name="small", title="small bodies (0.6 kB)", shape=SMALL, direct=True),
    Scenario(
        name="32kB",
        title="32 kB prompts",
        shape=Shape(name="32kB", prompt_bytes=32 * KB),
        window_s=1.0,
    ),
    Scenario(
        name="220kB",
        title="220 kB prompts, messages first",
        shape=Shape(name="220kB", prompt_bytes=220 * KB, variants=16),
        connections=32,
        window_s=1.0,
    ),
    Scenario(
        name="220kB-model-first",
        title="220 kB prompts, model first",
        shape=Shape(
            name="220kB-model-first", prompt_bytes=220 * KB, variants=16, order="model-first"
        ),
        connections=32,
        window_s=1.0,
    ),
    Scenario(
        name="stream",
        title="streaming, 500 streams of 50 chunks/s",
        shape=STREAM,
        unit="chunk",
        connections=500,
        warmup_s=2.1,
        window_s=2.0,
        spread_s=2.0,
        drain_s=0.0,
    ),
    Scenario(
        name="latency",
        title="small bodies at 300 requests/s",
        shape=SMALL,
        connections=16,
        window_s=2.0,
        rate=300.0,
        spin=False,
        direct=True,
    ),
)
"""In the order of a round."""

HELD_STREAMS = 2000
HELD = Shape(name="held", prompt_bytes=300, stream=True, tokens=20, interval_ms=250)
HELD_QUICK = Shape(name="held-quick", prompt_bytes=300, stream=True, tokens=10, interval_ms=250)
HELD_SPREAD_S = 1.5
"""Streams are opened over this long; each lives tokens x interval longer than that."""

MEMORY_CONNECTIONS = 128
MEMORY_THINK_MS = 200
"""The replica answers this long after it has the body, so that requests are in flight together."""


def _memory(name: str, prompt_bytes: int, order: Literal["messages-first", "model-first"]) -> Shape:
    return Shape(
        name=name, prompt_bytes=prompt_bytes, variants=4, interval_ms=MEMORY_THINK_MS, order=order
    )


MEMORY = (
    _memory("rss-small", 300, "model-first"),
    _memory("rss-220kB", 220 * KB, "model-first"),
    _memory("rss-220kB-messages-first", 220 * KB, "messages-first"),
    _memory("rss-880kB", 880 * KB, "model-first"),
)
MEMORY_WINDOW_S = 0.9
