"""The other nodes: which there are, what they have, and which are avoided for a while or always.

One that cannot be reached is asked again after a pause that grows; one that is slow is asked for
no pieces for a while; one that gave bytes which were not what it said, or what the source says, is
left alone until it starts anew.
"""

from __future__ import annotations

import logging
import random
import secrets
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from modelcache.peers.client import (
    ANSWER_S,
    PeerBusy,
    PeerClient,
    PeerIntegrityError,
    PeerSlow,
    PeerUnavailable,
    PieceNotFound,
)
from modelcache.peers.piece_inventory import PieceInventory
from modelcache.peers.server import PeerServer, Verb
from modelcache.peers.wire import Keyring, PieceState, read_token
from modelcache.ports import IsCancelled, OnBytes
from modelcache.settings import ModelCacheSettings
from modelcache.types import Cancelled

log = logging.getLogger("tidegate.modelcache.peers")


LOOK_S = 10.0
"""Seconds between two looks."""

SOON_S = 2.0
"""Seconds between two looks at the least: each request from an unknown node causes one."""

MOST_ADDRESSES = 1_024
"""Addresses of one name that are used."""

LookUp = Callable[[str, int], Sequence[str]]
"""The addresses of a host name, for connections to a port. ``OSError`` where there is no answer."""

POLL_WAIT_S = 2.0
"""Seconds that a peer may keep a question about its files open."""

GAP_S = 0.05
"""Seconds between two questions to one peer at the least: news travels in bundles."""

PAUSES_S = (0.25, 30.0)
"""The first pause after a failure and the longest; each doubles the one before."""

LIAR_S = 3_600.0
MOST_LIARS = 1_024
MOST_HEARD = 1_024
"""Names of nodes that are no peers, and have asked us, that are remembered."""

MOST_WATCHED = 64
"""Peers that one download watches: a thread each. In a larger cluster, any so many."""


@dataclass(slots=True)
class Peer:
    """One other node."""

    client: PeerClient
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
    on_states: Callable[[str, Mapping[str, PieceState]], None]
    on_lost: Callable[[str], None]
    stopped: IsCancelled
    asked: set[str] = field(default_factory=set)
    """URLs of peers that have answered, or failed to, at least once."""


def look_up(host: str, port: int) -> list[str]:
    """As the system does it, each address once."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return sorted({str(entry[4][0]) for entry in found})


class PeerNames:
    """Tells ``on_found`` the URLs that each name stands for: name, URLs. Thread-safe."""

    def __init__(
        self,
        names: Sequence[str],
        on_found: Callable[[str, Sequence[str]], None],
        look_up: LookUp = look_up,
        look_s: float = LOOK_S,
        soon_s: float = SOON_S,
    ) -> None:
        self._look_s = look_s
        self._soon_s = soon_s
        self._names = tuple(dict.fromkeys(name.rstrip("/") for name in names))
        self._on_found = on_found
        self._look_up = look_up
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._asked = self._closed = False
        self._problems: dict[str, str] = {}
        self.looked = False
        """Whether each name was looked up once, with or without an answer."""

    def look(self) -> None:
        """Look soon; returns at once. The first call begins with it."""
        with self._changed:
            self._asked = True
            if self._thread is None and not self._closed:
                self._thread = threading.Thread(target=self._run, name="peer names", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def close(self) -> None:
        """Look no more. One look may still be under way; nothing comes of it."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._asked = False
            for name in self._names:
                self._look(name)
            with self._changed:
                self.looked = True
                self._changed.wait_for(lambda: self._closed, self._soon_s)
                more_s = self._look_s - self._soon_s
                self._changed.wait_for(lambda: self._closed or self._asked, more_s)
                if self._closed:
                    return

    def _look(self, name: str) -> None:
        parts = urlsplit(name)
        port = parts.port or 80
        try:
            found = self._look_up(parts.hostname or "", port)[:MOST_ADDRESSES]
        except (OSError, UnicodeError) as error:
            # No answer is not an empty one: known peers stay.
            self._note(name, str(error) or type(error).__name__)
            return
        self._note(name, "")
        urls = [f"http://{f'[{one}]' if ':' in one else one}:{port}" for one in found]
        with self._changed:
            if self._closed:
                return
        self._on_found(name, urls)

    def _note(self, name: str, problem: str) -> None:
        """Into the log, once for each change."""
        if self._problems.get(name, "") == problem:
            return
        self._problems[name] = problem
        if problem:
            log.warning("peers %s cannot be looked up: %s", name, problem)
        else:
            log.info("peers %s are found again", name)


class PeerGroup:
    """All peers of this node, and its own server for them. Thread-safe."""

    def __init__(
        self,
        urls: Sequence[str],
        token: str,
        *,
        inventory: PieceInventory,
        names: Sequence[str] = (),
        look_up: LookUp = look_up,
        clock: Callable[[], float] = time.monotonic,
        answer_s: float = ANSWER_S,
        look_s: float = LOOK_S,
        soon_s: float = SOON_S,
    ) -> None:
        self.me: str | None = None
        """This node's name, once it serves."""
        self.inventory = inventory
        self._name = secrets.token_hex(16)
        self._keyring = Keyring(token)
        self._clock = clock
        self._answer_s = answer_s
        # Replaced and never changed, so that it can be read at any time.
        self._peers = [Peer(self.client(url)) for url in dict.fromkeys(urls)]
        self._names = PeerNames(names, self._found, look_up, look_s, soon_s) if names else None
        self._server: PeerServer | None = None
        self._liars: dict[str, str] = {}
        self._heard: dict[str, None] = {}
        self._changed = threading.Condition()

    def serve(self, host: str, port: int, verbs: Mapping[str, Verb] | None = None) -> int:
        """Give peers what this node has, and do what ``verbs`` says; the port. Raises
        ``OSError`` where it cannot listen."""
        server = PeerServer(
            self.inventory,
            self._keyring,
            node=self._name,
            on_heard=self.heard,
            verbs=verbs,
        )
        bound = server.start(host, port)
        self._server, self.me = server, self._name
        self._look()
        return bound

    def close(self) -> None:
        """Serve no more, and let go of all connections."""
        if self._names is not None:
            self._names.close()
        if self._server is not None:
            self._server.close()
        for peer in self._peers:
            peer.client.close()

    @property
    def sent_bytes(self) -> int:
        """Bytes of pieces given to peers."""
        return self._server.sent_bytes if self._server is not None else 0

    def client(self, url: str) -> PeerClient:
        """For asking a node that is no peer, such as another site's. The caller closes it."""
        return PeerClient(url.rstrip("/"), self._keyring, self._name, answer_s=self._answer_s)

    def status(self) -> list[PeerStatus]:
        """Every peer but ourselves."""
        now_s = self._clock()
        return [
            PeerStatus(
                url=peer.client.url,
                node=peer.node,
                reached=peer.node is not None and peer.paused_until_s <= now_s,
                banned=peer.banned,
                given_bytes=peer.given_bytes,
            )
            for peer in self._peers
            if peer.node != self._name
        ]

    def heard(self, node: str) -> None:
        """A node has asked us something. If it is one that we wait to reach, now is the time: it,
        or one that is not reached and may have begun anew under this name. Once for each name, for
        nodes that are not peers may send requests again and again."""
        with self._changed:
            waited_for = [peer for peer in self._peers if peer.node == node and peer.failures]
            if not waited_for:
                if node in self._heard or any(peer.node == node for peer in self._peers):
                    return
                self._heard[node] = None
                while len(self._heard) > MOST_HEARD:
                    del self._heard[next(iter(self._heard))]
                waited_for = [peer for peer in self._peers if peer.node is None or peer.failures]
            for peer in waited_for:
                peer.paused_until_s = 0.0
            self._changed.notify_all()
            self._look()

    def _look(self) -> None:
        if self._names is not None:
            self._names.look()

    def _found(self, name: str, urls: Sequence[str]) -> None:
        """What a name stands for now. A peer that is not among it any more is dropped where it was
        never reached, or cannot be: a node may leave its name for a moment and still give."""
        with self._changed:
            kept = [
                peer
                for peer in self._peers
                if peer.name != name
                or peer.client.url in urls
                or (peer.node is not None and not peer.failures)
            ]
            for peer in self._peers:
                peer.gone = all(peer is not one for one in kept)
            known = {peer.client.url for peer in kept}
            added = [Peer(self.client(url), name=name) for url in urls if url not in known]
            left = [peer for peer in self._peers if peer.gone]
            self._peers = kept + added
            self._changed.notify_all()
        for peer in left:
            peer.client.close()

    def ban(self, node: str, why: str) -> None:
        """Never believe a node again, until it starts anew."""
        with self._changed:
            for peer in self._peers:
                if peer.node == node:
                    self._ban(peer, why)

    def _ban(self, peer: Peer, why: str) -> None:
        log.warning("peer %s is left alone: %s", peer.client.url, why)
        peer.banned = why
        peer.paused_until_s = self._clock() + LIAR_S
        if peer.node is not None:
            self._liars[peer.node] = why
            while len(self._liars) > MOST_LIARS:
                del self._liars[next(iter(self._liars))]
        # Its name is asked for again when its time is over: a new one is a new start.
        peer.client.node = None

    def away(self) -> frozenset[str]:
        """Names of peers that are not to be asked for pieces now."""
        now_s = self._clock()
        with self._changed:
            resting = {
                peer.node
                for peer in self._peers
                if peer.node is not None and max(peer.paused_until_s, peer.slow_until_s) > now_s
            }
            return frozenset(resting | self._liars.keys())

    def follow(self, follower: Follower) -> list[threading.Thread]:
        """Keep a download told of what every peer has, by threads that end when it stops."""
        followed: dict[str, Peer] = {}
        threads = self._threads(follower, followed)
        if self._names is not None:
            self._look()
            threads.append(
                threading.Thread(target=self._follow_more, args=(follower, followed), daemon=True)
            )
        for thread in threads:
            thread.start()
        return threads

    def _threads(self, follower: Follower, followed: dict[str, Peer]) -> list[threading.Thread]:
        """Threads, not started yet, for peers that are not followed yet, as far as may be."""
        fresh = [peer for peer in self._peers if followed.get(peer.client.url) is not peer]
        room = MOST_WATCHED - sum(not peer.gone for peer in followed.values())
        if len(fresh) > room:
            fresh = random.sample(fresh, max(0, room))
        followed.update({peer.client.url: peer for peer in fresh})
        return [
            threading.Thread(
                target=self._follow, args=(peer, follower), name="peer news", daemon=True
            )
            for peer in fresh
            if peer.node is None or peer.node != self._name
        ]

    def _follow_more(self, follower: Follower, followed: dict[str, Peer]) -> None:
        """Follow also whom the names bring later, until the download stops."""
        started: list[threading.Thread] = []
        while not follower.stopped():
            with self._changed:
                fresh = self._threads(follower, followed)
                if not fresh:
                    self._changed.wait(1.0)
            for thread in fresh:
                thread.start()
            started = [one for one in (*started, *fresh) if one.is_alive()]
        for thread in started:
            thread.join()

    def wake(self) -> None:
        """Let followers see whether they are to stop."""
        with self._changed:
            self._changed.notify_all()

    def settled(self, follower: Follower) -> bool:
        """Whether every peer has been asked once, with or without an answer."""
        if self._names is not None and not self._names.looked:
            return False
        return (
            all(
                peer.node == self._name or peer.client.url in follower.asked for peer in self._peers
            )
            or len(follower.asked) >= MOST_WATCHED
        )

    def _follow(self, peer: Peer, follower: Follower) -> None:
        since, known = 0, peer.node
        while not follower.stopped() and self._await_turn(peer, follower):
            try:
                node = peer.node or peer.client.hello(follower.stopped)
                if node == self._name:
                    return
                if not self._believed(peer, node):
                    continue
                if node != known:
                    since, known = 0, node
                wait_s = POLL_WAIT_S if since else 0.0
                since, states = peer.client.states(follower.keys(), since, wait_s, follower.stopped)
                with self._changed:
                    peer.failures = 0
                if self._believed(peer, node):
                    follower.on_states(node, states)
            except Cancelled:
                return
            except (PeerUnavailable, PeerIntegrityError) as error:
                since = 0
                self._failed(peer, error)
                if known is not None:
                    follower.on_lost(known)
            finally:
                follower.asked.add(peer.client.url)
            if not follower.stopped():
                time.sleep(GAP_S)
        if peer.gone and known is not None:
            follower.on_lost(known)

    def _believed(self, peer: Peer, node: str) -> bool:
        """Whether a node never sent wrong bytes; one that did is avoided for another while."""
        with self._changed:
            if node in self._liars:
                peer.paused_until_s = self._clock() + LIAR_S
                return False
            peer.banned = None
            return True

    def _await_turn(self, peer: Peer, follower: Follower) -> bool:
        with self._changed:
            while not follower.stopped() and not peer.gone:
                left_s = peer.paused_until_s - self._clock()
                if left_s <= 0:
                    return True
                follower.asked.add(peer.client.url)
                self._changed.wait(min(left_s, 1.0))
        return False

    def _failed(self, peer: Peer, error: Exception) -> None:
        with self._changed:
            peer.failures += 1
            first_s, most_s = PAUSES_S
            pause_s = min(most_s, first_s * 2 ** min(peer.failures - 1, 16))
            until_s = self._clock() + pause_s * random.uniform(0.5, 1.0)
            peer.paused_until_s = max(peer.paused_until_s, until_s)
            if isinstance(error, PeerIntegrityError):
                self._ban(peer, str(error))
        log.info("peer %s cannot be asked: %s", peer.client.url, error)

    def fetch(
        self,
        node: str,
        key: str,
        index: int,
        into: memoryview,
        *,
        timeout_s: float,
        cancelled: IsCancelled,
        on_bytes: OnBytes,
    ) -> bytes | None:
        """A piece from a peer into memory, checked: its BLAKE3. ``None`` where it did not come,
        for whatever reason: the peer is dealt with here, and the caller looks elsewhere. Raises
        ``PeerBusy`` where it will have it later, and ``Cancelled``.
        """
        peer = next((one for one in self._peers if one.node == node), None)
        if peer is None or peer.banned is not None:
            return None
        try:
            digest = peer.client.piece(
                key, index, into, timeout_s=timeout_s, cancelled=cancelled, on_bytes=on_bytes
            )
        except PeerBusy:
            self._slow(peer, 0.25)
            raise
        except PieceNotFound:
            return None
        except PeerSlow as error:
            log.info("%s", error)
            self._slow(peer, 5.0)
            return None
        except (PeerUnavailable, PeerIntegrityError) as error:
            self._failed(peer, error)
            return None
        with self._changed:
            peer.slow = 0
            peer.given_bytes += len(into)
        return digest

    def _slow(self, peer: Peer, first_s: float) -> None:
        with self._changed:
            peer.slow += 1
            pause_s = min(300.0, first_s * 2 ** min(peer.slow - 1, 16))
            peer.slow_until_s = self._clock() + pause_s * random.uniform(0.5, 1.0)


def make_peers(
    settings: ModelCacheSettings, environ: Mapping[str, str], inventory: PieceInventory
) -> PeerGroup | None:
    """The peers that settings name, or ``None`` where there are none and none are served.

    Raises ``ValueError`` where peers are wanted and the token is missing or too short.
    """
    if not settings.peers and not settings.peer_names and settings.peer_port is None:
        return None
    token = read_token(environ, settings.peer_token_env)
    if not token:
        raise ValueError(
            f"modelcache.peers, peer_names and peer_port need the environment variable "
            f"{settings.peer_token_env}: the secret that all nodes of the cluster share"
        )
    return PeerGroup(settings.peers, token, inventory=inventory, names=settings.peer_names)
