"""What all downloads of a process share: limits, totals, and which peer gave which piece.

What a store publishes of a file's content can be checked only when the file is whole. If it is
wrong then, and pieces of it came from peers, the next download of the file is from the store
alone; each piece that turns out different names the peer that made it up.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from urllib.parse import urlsplit

from modelcache.bandwidth.budget import Budget, Slots
from modelcache.peers.group import PeerGroup
from modelcache.settings import ModelCacheSettings

MOST_REMEMBERED = 1_024
"""Files of which is remembered who gave which piece."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Totals:
    """What has been read since the process began."""

    store_bytes: int = 0
    peer_bytes: int = 0
    wasted_bytes: int = 0
    """Read and thrown away: broken off, wrong, or twice."""
    retries: int = 0
    peer_failures: int = 0


@dataclass(slots=True)
class Suspicion:
    """Who gave which piece of a file, with which BLAKE3."""

    given: dict[int, tuple[str, bytes]] = field(default_factory=dict)
    doubted: bool = False


class TransferState:
    """Shared by the downloads of a process. Thread-safe."""

    def __init__(
        self,
        settings: ModelCacheSettings,
        *,
        budget: Budget | None = None,
        peers: PeerGroup | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.settings = settings
        self.budget = budget if budget is not None else Budget(settings)
        self.peers = peers
        self.clock = clock
        self.memory = Slots(settings.memory_bytes)
        self._slots: dict[str, Slots] = {}
        self._suspicions: OrderedDict[str, Suspicion] = OrderedDict()
        self._totals = Totals()
        self._lock = threading.Lock()

    def totals(self) -> Totals:
        """What has been read so far."""
        return self._totals

    def count(
        self,
        *,
        store_bytes: int = 0,
        peer_bytes: int = 0,
        wasted_bytes: int = 0,
        retries: int = 0,
        peer_failures: int = 0,
    ) -> None:
        """Add to the totals."""
        with self._lock:
            total = self._totals
            self._totals = replace(
                total,
                store_bytes=total.store_bytes + store_bytes,
                peer_bytes=total.peer_bytes + peer_bytes,
                wasted_bytes=total.wasted_bytes + wasted_bytes,
                retries=total.retries + retries,
                peer_failures=total.peer_failures + peer_failures,
            )

    def slots_of(self, url: str) -> Slots:
        """The connections to the store that ``url`` lies in, shared by all its models."""
        parts = urlsplit(url)
        # A hub's models all lie in one store; elsewhere the host or bucket is one.
        store = parts.scheme if parts.scheme == "hf" else f"{parts.scheme}://{parts.netloc}"
        with self._lock:
            return self._slots.setdefault(store, Slots(self.settings.connections))

    def note_given(self, key: str, index: int, node: str, digest: bytes) -> None:
        """A piece was taken from a peer."""
        with self._lock:
            found = self._suspicions.setdefault(key, Suspicion())
            self._suspicions.move_to_end(key)
            found.given[index] = (node, digest)
            if len(self._suspicions) > MOST_REMEMBERED:
                self._suspicions.popitem(last=False)

    def doubt(self, key: str) -> None:
        """The file was whole, and wrong: take it from the store alone, and see who lied."""
        with self._lock:
            self._suspicions.setdefault(key, Suspicion()).doubted = True

    def doubted(self, key: str) -> bool:
        """Whether the file must come from the store alone."""
        with self._lock:
            found = self._suspicions.get(key)
            return found is not None and found.doubted

    def compare(self, key: str, index: int, digest: bytes) -> None:
        """The store's own bytes of a piece: whoever gave others is left alone from now on."""
        with self._lock:
            found = self._suspicions.get(key)
            node, given = ("", digest) if found is None else found.given.get(index, ("", digest))
        if given != digest and self.peers is not None:
            self.peers.ban(node, f"piece {index} of {key} is not what the store has")

    def believe(self, key: str) -> None:
        """The file is whole and right: who gave what need not be remembered."""
        with self._lock:
            self._suspicions.pop(key, None)
