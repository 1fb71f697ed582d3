"""KV-cache blocks with prefix caching, as vLLM keeps them. Pure.

A block is one of three things: in use and anonymous (its tokens are not all computed yet, or it
repeats a block that is already cached), in use under the hash of everything up to its end (shared
by every sequence that begins that way), or idle: cached under its hash, unused, evicted
least recently used first when a new block is needed. The rest is blank.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence


class BlockTable:
    """The blocks of one sequence: ``hashes`` it shares, in order, and ``anonymous`` of its own."""

    __slots__ = ("anonymous", "hashes")

    def __init__(self) -> None:
        self.hashes: list[int] = []
        self.anonymous = 0

    def __len__(self) -> int:
        return len(self.hashes) + self.anonymous


class BlockPool:
    """``capacity`` blocks, handed to sequences and taken back. Counts only: there is no memory."""

    __slots__ = ("_anonymous", "_idle", "_shared", "caching", "capacity")

    def __init__(self, capacity: int, *, caching: bool = True) -> None:
        self.capacity = capacity
        self.caching = caching
        self._shared: dict[int, int] = {}  # hash → how many sequences use it (at least 1)
        self._idle: OrderedDict[int, None] = OrderedDict()  # oldest first
        self._anonymous = 0

    @property
    def used(self) -> int:
        """Blocks that some sequence uses."""
        return self._anonymous + len(self._shared)

    @property
    def available(self) -> int:
        """Blocks that a sequence could be given now: blank ones and idle ones."""
        return self.capacity - self.used

    @property
    def cached_idle(self) -> int:
        """Blocks kept only because their prefix may come again."""
        return len(self._idle)

    @property
    def usage_fraction(self) -> float:
        """Blocks in use over all blocks, 0..1: what vLLM calls ``kv_cache_usage_perc``."""
        return self.used / self.capacity

    def match(self, hashes: Sequence[int], limit: int) -> int:
        """How many of the first ``limit`` of ``hashes`` are cached, from the beginning."""
        if not self.caching:
            return 0
        shared, idle = self._shared, self._idle
        count = 0
        for value in hashes[:limit]:
            if value not in shared and value not in idle:
                break
            count += 1
        return count

    def take(self, holding: BlockTable, hashes: Sequence[int], fresh: int) -> bool:
        """Give ``holding`` the cached blocks ``hashes`` and ``fresh`` new ones, or nothing at all.

        Every one of ``hashes`` must be cached (see ``match``). False where there is no room.
        """
        idle, shared = self._idle, self._shared
        waking = sum(1 for value in hashes if value in idle)
        if waking + fresh > self.available:
            return False
        for value in hashes:
            if value in idle:
                del idle[value]
                shared[value] = 1
            else:
                shared[value] += 1
        holding.hashes.extend(hashes)
        for _ in range(fresh - (self.available - len(idle))):
            idle.popitem(last=False)
        holding.anonymous += fresh
        self._anonymous += fresh
        return True

    def publish(self, holding: BlockTable, value: int) -> None:
        """One anonymous block of ``holding`` is full and computed: cache it under its hash.

        Where another sequence computed the same block meanwhile, this one stays a private copy,
        as in vLLM, and is blank again when released.
        """
        if not self.caching or value in self._shared or holding.anonymous == 0:
            return
        self._idle.pop(value, None)
        holding.anonymous -= 1
        self._anonymous -= 1
        holding.hashes.append(value)
        self._shared[value] = 1

    def release(self, holding: BlockTable) -> None:
        """Take back all blocks of ``holding``; its cached ones stay, last block evicted first."""
        self._anonymous -= holding.anonymous
        holding.anonymous = 0
        for value in reversed(holding.hashes):
            users = self._shared[value] - 1
            if users:
                self._shared[value] = users
            else:
                del self._shared[value]
                self._idle[value] = None
        holding.hashes.clear()

    def forget(self) -> None:
        """Drop every idle cached block (``/reset_prefix_cache``, and sleep, which loses the KV)."""
        self._idle.clear()

    def check_integrity(self) -> None:
        """Raise ``AssertionError`` where the counts contradict each other."""
        problems = []
        if self.used + len(self._idle) > self.capacity:
            problems.append(f"{self.used} used + {len(self._idle)} idle > {self.capacity}")
        if self._anonymous < 0:
            problems.append(f"{self._anonymous} anonymous blocks")
        if not self._shared.keys().isdisjoint(self._idle):
            problems.append("a block is both in use and idle")
        if any(users < 1 for users in self._shared.values()):
            problems.append("a shared block without a user")
        if problems:
            raise AssertionError("; ".join(problems))
