"""One other node, and what a download wants to know of all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from modelcache.bandwidth.budget import Asked
from modelcache.peers.client import Client
from modelcache.peers.piece_inventory import State


@dataclass(slots=True)
class Peer:
    """One other node."""

    client: Client
    failures: int = 0
    slow: int = 0
    paused_until_s: float = 0.0
    """Not asked at all until then."""
    slow_until_s: float = 0.0
    """Not asked for pieces until then."""
    banned: str | None = None
    """Why it is left alone, if it is."""
    given_bytes: int = 0
    name: str | None = None
    """The name whose address it is, for one that was looked up."""
    gone: bool = False
    """That name is not its any more."""

    @property
    def node(self) -> str | None:
        """Its name, while it is known."""
        return self.client.node


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerStatus:
    """A peer as status shows it."""

    url: str
    node: str | None
    reached: bool
    banned: str | None
    given_bytes: int


@dataclass(slots=True, kw_only=True)
class Follower:
    """What a download wants to know of peers."""

    keys: Callable[[], Sequence[str]]
    """The files that are still missing."""
    on_states: Callable[[str, Mapping[str, State]], None]
    on_lost: Callable[[str], None]
    stopped: Asked
    asked: set[str] = field(default_factory=set)
    """URLs of peers that have answered, or failed to, at least once."""
