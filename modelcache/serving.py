"""What a node does for others: gives its pieces to peers, and fetches what other sites ask for.

``tidegate up`` does it beside its replicas where ``modelcache.peer_port`` is set; on a node without
replicas (a DaemonSet, another site) ``tidegate agent`` does only this. The JSON admin API of both
is the gateway's, over the same cache.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from typing import Any

from modelcache.fetch.transfer import Transfer
from modelcache.peers.group import PeerGroup
from modelcache.peers.replicate import LOOK_S, Cache, ReplicationJobs
from modelcache.settings import ModelCacheSettings
from modelcache.types import CacheError

log = logging.getLogger("tidegate.modelcache.agent")


@dataclass(slots=True)
class Serving:
    """A node that gives. Made by :func:`start_serving`."""

    peers: PeerGroup
    orders: ReplicationJobs
    host: str
    port: int

    def close(self) -> None:
        """Give no more. What was being fetched for others stays for the next time."""
        self.orders.close()
        self.peers.close()


def start_serving(
    settings: ModelCacheSettings,
    peers: PeerGroup | None,
    cache: Cache,
    *,
    look_s: float = LOOK_S,
) -> Serving | None:
    """Give this node's pieces to its peers, and take orders from other sites, if
    ``modelcache.peer_port`` says so. Raises ``CacheError`` where the address cannot be had.
    """
    if peers is None or settings.peer_port is None:
        return None
    orders = ReplicationJobs(cache, look_s=look_s)
    host = settings.peer_host.strip("[]")
    try:
        port = peers.serve(host, settings.peer_port, orders.verbs())
    except OSError as error:
        where = f"modelcache.peer_host {host!r}, modelcache.peer_port {settings.peer_port}"
        raise CacheError(f"{where}: {error.strerror or error}") from error
    log.info("gives pieces to peers at %s:%d", host, port)
    return Serving(peers, orders, host, port)


def describe(peers: PeerGroup | None, transfer: Transfer) -> dict[str, Any]:
    """Bytes read from sources and from peers, bytes given, and every peer; as JSON has it."""
    told: dict[str, Any] = asdict(transfer.totals())
    told["sent_bytes"] = 0 if peers is None else peers.sent_bytes
    told["peers"] = [] if peers is None else [asdict(one) for one in peers.status()]
    return told


async def run_agent(
    settings: ModelCacheSettings,
    *,
    cache: Cache,
    peers: PeerGroup | None,
    serve_admin: Callable[[asyncio.Event], Awaitable[None]],
    stop: asyncio.Event,
    on_serving: Callable[[Serving], None] | None = None,
) -> None:
    """Run a cache agent until ``stop``: the peer server in threads, and ``serve_admin``, which runs
    the admin API until the event it is given.

    Raises ``CacheError`` before anything is served where this node is not set up to give anything,
    or its address cannot be had.
    """
    serving = await asyncio.to_thread(start_serving, settings, peers, cache)
    if serving is None:
        raise CacheError(
            "an agent gives pieces to peers: set modelcache.peer_port, and the environment "
            f"variable {settings.peer_token_env}"
        )
    try:
        if on_serving is not None:
            on_serving(serving)
        await serve_admin(stop)
    finally:
        await asyncio.to_thread(serving.close)
