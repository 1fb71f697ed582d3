"""The command line over a pool's history, on a clock that stands."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from autoscaler.settings import PoolSettings
from autoscaler.signals.history import HistoryStore
from gateway.cli.base import Effects

POOLS = (PoolSettings(name="chat", aliases=("c",), engine="simulated", model="m"),)
CONFIG = '[[pools]]\nname = "chat"\naliases = ["c"]\nengine = "simulated"\nmodel = "m"\n'
Cli = Callable[..., int]


@dataclass(frozen=True, kw_only=True)
class AtNow(Effects):
    """Nothing but the time is another."""

    now_s: Callable[[], float]


def open_store(path: Path) -> HistoryStore:
    return HistoryStore(path, max_age_s=60 * 86_400.0, max_bytes=1 << 30)
