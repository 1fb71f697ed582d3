"""How long wakes took: measured seconds per model, node and tier, kept over restarts.

One small JSON file, replaced as a whole. What cannot be read in it is as good as not measured.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import statistics
import tempfile
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from modelcache.types import TIERS, Tier

LOG = logging.getLogger("tidegate.autoscaler")

VERSION = 1
MOST_S = 1e9
MODELS = 1_000
"""Pairs of model and node that are remembered, the last used of them."""

Key = tuple[str, str]


class WakeTimes:
    """The newest ``samples`` wake times of each model and tier on ``node``, and those of other
    nodes as they were found. ``path`` unset: nothing is kept on disk."""

    def __init__(self, *, node: str = "", path: Path | None = None, samples: int = 8) -> None:
        self._node = node
        self._path = path
        self._samples = samples
        self._times: dict[Key, dict[Tier, deque[float]]] = {}
        self._saving = asyncio.Lock()

    @property
    def is_kept(self) -> bool:
        """Whether ``save`` writes anything."""
        return self._path is not None

    def add(self, model: str, tier: Tier, seconds: float) -> None:
        """Remember that a wake of ``model`` out of ``tier`` took so long."""
        self._put((model, self._node), tier, [seconds])

    def measured(self, model: str, tier: Tier) -> tuple[float, ...]:
        """The times of this model, node and tier, oldest first."""
        return tuple(self._times.get((model, self._node), {}).get(tier, ()))

    def median_s(self, model: str, tier: Tier) -> float | None:
        """The usual time; ``None`` where none was measured."""
        times_s = self.measured(model, tier)
        return statistics.median(times_s) if times_s else None

    def estimate_s(self, model: str, tier: Tier) -> float | None:
        """A time the next wake out of ``tier`` will hardly exceed: the longest of those measured.

        Where none was, that of the nearest colder tier, which takes longer; else of the nearest
        warmer one. ``None`` where this model was never woken here.
        """
        place = TIERS.index(tier)
        for near in (*TIERS[place:], *reversed(TIERS[:place])):
            if times_s := self.measured(model, near):
                return max(times_s)
        return None

    def load(self) -> None:
        """Take in what is on disk, as far as it can be read."""
        if self._path is None:
            return
        try:
            found = json.loads(self._path.read_text(encoding="utf-8"))
            entries = list(read_entries(found))
        except FileNotFoundError:
            return
        except (OSError, ValueError, RecursionError) as error:
            LOG.warning("%s is not read (%s); wake times are measured anew", self._path, error)
            return
        for key, tier, times_s in entries:
            self._put(key, tier, times_s)

    async def save(self) -> None:
        """Replace the file, in a thread. Raises ``OSError``."""
        if self._path is None:
            return
        async with self._saving:  # or an older text could replace a newer one
            text = json.dumps({"version": VERSION, "wakes": self._entries()}, indent=1) + "\n"
            await asyncio.to_thread(replace_file, self._path, text)

    def _put(self, key: Key, tier: Tier, times_s: Iterable[float]) -> None:
        tiers = self._times.pop(key, {})
        self._times[key] = tiers
        tiers.setdefault(tier, deque(maxlen=self._samples)).extend(times_s)
        while len(self._times) > MODELS:
            del self._times[next(iter(self._times))]

    def _entries(self) -> list[dict[str, Any]]:
        return [
            {
                "model": model,
                "node": node,
                "tier": tier.value,
                "seconds": [round(one, 3) for one in times_s],
            }
            for (model, node), tiers in self._times.items()
            for tier, times_s in tiers.items()
        ]


def replace_file(path: Path, text: str) -> None:
    """Write a file, durably, as a whole or not at all. Raises ``OSError``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with open(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


def read_entries(found: object) -> Iterable[tuple[Key, Tier, list[float]]]:
    """The entries of a file's content that make sense. Raises ``ValueError`` for another kind of
    file."""
    if not isinstance(found, dict) or found.get("version") != VERSION:
        raise ValueError(f"it is not a file of wake times of version {VERSION}")
    wakes = found.get("wakes")
    for entry in wakes if isinstance(wakes, list) else []:
        if not isinstance(entry, dict):
            continue
        model, node, tier = entry.get("model"), entry.get("node"), entry.get("tier")
        times_s = entry.get("seconds")
        if not (isinstance(model, str) and isinstance(node, str) and isinstance(times_s, list)):
            continue
        if tier in TIERS:
            yield (model, node), Tier(tier), [float(one) for one in times_s if is_time(one)]


def is_time(value: object) -> bool:
    """Whether a value can be a number of seconds that something took."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= MOST_S
