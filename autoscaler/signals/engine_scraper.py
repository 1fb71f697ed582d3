"""Engines' own metrics, read from each replica in turn.

One round goes over all replicas and takes ``interval_s``: the requests are spread over it, and are
never more per second than the control loop can spare; with many replicas a round takes longer. What
could not be read whole and in time is unknown, and so is what was read more than two rounds before.
A server without metrics, or one that hangs, is left out of ever more rounds.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass

import httpx

from autoscaler.types import EngineObservation
from loaders.engines.base import Engine, EngineLoad, engine_of
from loaders.engines.client import EngineClient
from router.types import Pool, ReplicaState

LOG = logging.getLogger("tidegate.signals")

SCRAPED = frozenset(
    {ReplicaState.READY, ReplicaState.UNHEALTHY, ReplicaState.DRAINING, ReplicaState.SLEEPING}
)
"""States of replicas whose engine has metrics to tell."""

MAX_PER_S = 50
"""Replicas read in a second: a fifth of a core, at three to four milliseconds each. All but half a
millisecond of these is the HTTP client."""
MAX_AT_ONCE = 64
MAX_SKIPPED_ROUNDS = 15
"""Rounds that a server is left out of after failures in a row, at most."""


@dataclass(slots=True, kw_only=True)
class _Target:
    """A replica whose metrics are read, with the headers of all requests to it: its last reading
    that was whole, and how many attempts have failed since then."""

    replica: str
    url: str
    headers: tuple[tuple[str, str], ...]
    engine: Engine
    seen: EngineObservation | None = None
    failures: int = 0
    skip_rounds: int = 0


class EngineScraper:
    """Reads the metrics of the replicas it is told to watch. For one event loop."""

    def __init__(
        self,
        *,
        interval_s: float,
        timeout_s: float,
        client: EngineClient | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        """``timeout_s`` bounds one reading as a whole, however slowly its bytes come."""
        self.interval_s = interval_s
        self._timeout_s = timeout_s
        self._client = client or EngineClient(timeout_s=timeout_s)
        self._clock = clock
        self._sleep = sleep
        self._targets: dict[str, _Target] = {}
        self._places = asyncio.Semaphore(MAX_AT_ONCE)
        self._tasks: set[asyncio.Task[None]] = set()

    def watch(self, pools: Sequence[Pool], engines: Mapping[str, str | None]) -> None:
        """Read the replicas of these pools from now on, and no others. ``engines`` are the names of
        the pools' engines. Of a replica whose address is as before what is known stays."""
        before = self._targets
        self._targets = {}
        for pool in pools:
            engine = engine_of(engines.get(pool.name))
            for one in pool.replicas:
                if one.state not in SCRAPED:
                    continue
                target = before.get(one.id)
                now = (one.url, one.headers, engine)
                if target is None or (target.url, target.headers, target.engine) != now:
                    target = _Target(
                        replica=one.id, url=one.url, headers=one.headers, engine=engine
                    )
                self._targets[one.id] = target

    def observations(self) -> dict[str, EngineObservation]:
        """What engines said, by replica: of those whose last reading was whole, and is not older
        than two rounds."""
        oldest_s = self._clock() - 2 * self._round_s() - self._timeout_s
        return {
            replica: target.seen
            for replica, target in self._targets.items()
            if target.seen is not None
            and not target.failures
            and target.seen.observed_at_s >= oldest_s
        }

    def _round_s(self) -> float:
        return max(self.interval_s, len(self._targets) / MAX_PER_S)

    async def run(self) -> None:
        """Read round after round, until it is cancelled."""
        while True:
            begun_s = self._clock()
            due = [one for one in self._targets.values() if not self._is_skipped(one)]
            gap_s = self._round_s() / max(1, len(due))
            for target in due:
                if self._targets.get(target.replica) is not target:
                    continue  # it has gone since the round began
                await self._places.acquire()
                task = asyncio.create_task(self._scrape(target))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
                await self._sleep(gap_s)
            await self._sleep(max(0.01, begun_s + self._round_s() - self._clock()))

    @staticmethod
    def _is_skipped(target: _Target) -> bool:
        if not target.skip_rounds:
            return False
        target.skip_rounds -= 1
        return True

    async def _scrape(self, target: _Target) -> None:
        load: EngineLoad | None = None
        try:
            async with asyncio.timeout(self._timeout_s):
                load = await target.engine.load(self._client, target.url, dict(target.headers))
        except (TimeoutError, httpx.HTTPError):
            pass
        except Exception:
            LOG.exception("the metrics of %s cannot be read", target.replica)
        finally:
            self._places.release()
        if load is None:
            target.failures += 1
            target.skip_rounds = min(MAX_SKIPPED_ROUNDS, 2 ** min(target.failures - 1, 10) - 1)
            return
        target.failures = 0
        target.seen = observe(self._clock(), load, target.seen)

    async def close(self) -> None:
        """End what is under way."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._client.close()


def observe(now_s: float, load: EngineLoad, earlier: EngineObservation | None) -> EngineObservation:
    """A reading, with the rates since the ``earlier`` one."""
    if earlier is None or now_s <= earlier.observed_at_s:
        return EngineObservation(observed_at_s=now_s, load=load)
    window_s, old = now_s - earlier.observed_at_s, earlier.load
    queries = _growth(load.prefix_cache_queries_tokens, old.prefix_cache_queries_tokens)
    hits = _growth(load.prefix_cache_hits_tokens, old.prefix_cache_hits_tokens)

    def rate(now: float | None, before: float | None) -> float | None:
        grown = _growth(now, before)
        return None if grown is None else grown / window_s

    return EngineObservation(
        observed_at_s=now_s,
        load=load,
        window_s=window_s,
        prefix_cache_hit_fraction=min(1.0, hits / queries)
        if queries and hits is not None
        else None,
        prompt_tokens_per_s=rate(load.prompt_tokens, old.prompt_tokens),
        generation_tokens_per_s=rate(load.generation_tokens, old.generation_tokens),
        preemptions_per_s=rate(load.preemptions, old.preemptions),
    )


def _growth(now: float | None, before: float | None) -> float | None:
    """How much a counter has grown; ``None`` where it began again in between."""
    return now - before if now is not None and before is not None and now >= before else None
