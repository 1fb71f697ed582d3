"""Which piece to read next, and where from, while other nodes fetch the same files. Pure.

Every piece has an owner among the nodes that fetch its file: the one with the highest hash of
(file, piece, node), which all nodes work out alike. The owner reads it from the source and the
others from the owner, so a source is read about once however many nodes begin together. A node that
leaves or stalls owns nothing from then on, and each of its pieces falls to the next in rank. A node
that has nothing left of its own takes over what no node has begun, the second in rank first, so a
slow node is helped rather than waited for.

Sets of pieces are whole numbers, one bit for each piece: a file of 100 GB has 12,000.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from modelcache.peers.wire import PieceState

STEAL_STEP_S = 0.25
"""Seconds between one node's turn to take over a piece and the next one's: as long as the news of
it needs."""

STALL_S = 3.0
"""Seconds without news from a node, at the least, until it counts as stalled."""

STALL_FACTOR = 4.0
"""How many times longer than others' pieces its own may take before it counts as stalled."""


def bits(mask: int) -> Iterator[int]:
    """The positions of the bits that are set, lowest first."""
    while mask:
        low = mask & -mask
        yield low.bit_length() - 1
        mask ^= low


def mask_of(indices: Iterable[int]) -> int:
    """The set of these indices."""
    mask = 0
    for index in indices:
        mask |= 1 << index
    return mask


def weight(key: str, index: int, node: str) -> bytes:
    """What decides which node owns piece ``index`` of file ``key``: the highest does."""
    return hashlib.blake2b(f"{key}/{index}/{node}".encode(), digest_size=8).digest()


def rank(key: str, index: int, node: str, nodes: Iterable[str]) -> int:
    """How many of ``nodes`` come before ``node`` for this piece; 0 is the owner."""
    own = weight(key, index, node)
    return sum(weight(key, index, other) > own for other in nodes if other != node)


@dataclass(slots=True, kw_only=True)
class Seen:
    """What a node has of one file, as it last said: see ``PieceState``."""

    has: int = 0
    fetching: int = 0
    active: bool = False
    failed: int = 0
    """Pieces that a peer did not have after all."""
    moved_at_s: float = 0.0
    """When ``has`` or ``fetching`` last changed."""


@dataclass(slots=True)
class PlannedFile:
    """One file that is being fetched: which pieces are missing, and which reader has which."""

    key: str
    count: int
    missing: int
    storing: int = 0
    """Being read from the source, here."""
    asking: int = 0
    """Being read from a peer, here."""
    peers: dict[str, Seen] = field(default_factory=dict)
    owners: tuple[str, ...] | None = None
    shares: dict[str, int] = field(default_factory=dict)
    """What each owner owns; empty while there is one owner alone."""
    stalled: set[str] = field(default_factory=set)

    @property
    def open(self) -> int:
        """Missing, and not being read here."""
        return self.missing & ~self.storing & ~self.asking

    def available(self, away: frozenset[str]) -> int:
        """Pieces that some peer has that is not ``away``."""
        mask = 0
        for node, seen in self.peers.items():
            if node not in away:
                mask |= seen.has & ~seen.failed
        return mask


@dataclass(slots=True)
class Board:
    """All files of one download. One owner (``transfer`` guards it with a lock).

    ``me`` is this node's name, ``None`` where it serves no peers: then it owns nothing while
    another node does, and takes from the source only what no other node will.
    """

    me: str | None
    files: list[PlannedFile]
    away: frozenset[str] = frozenset()
    """Peers that are paused or banned."""
    expects_others: bool = False
    """Whether there are nodes that may be fetching the same and have not said so yet."""
    piece_s: float | None = None
    """Seconds that a piece from the source takes here, by the last ones."""
    idle_since_s: float | None = None
    delays_s: dict[tuple[int, int], float] = field(default_factory=dict)
    """Until when a piece that failed is left alone."""

    def learn(self, node: str, states: Mapping[str, PieceState], now_s: float) -> bool:
        """Take in what a peer said of the files; whether anything changed."""
        changed = False
        for file in self.files:
            state, seen = states.get(file.key), file.peers.get(node)
            if state is None:
                changed |= file.peers.pop(node, None) is not None
                continue
            everything = (1 << file.count) - 1
            told = (state.has & everything, state.fetching & everything, state.active)
            if seen is None or (seen.has, seen.fetching, seen.active) != told:
                seen = file.peers.setdefault(node, Seen())
                seen.has, seen.fetching, seen.active = told
                seen.moved_at_s = now_s
                changed = True
        return changed

    def lose(self, node: str) -> None:
        """A peer is gone."""
        for file in self.files:
            file.peers.pop(node, None)

    def refuse(self, file: PlannedFile, index: int, node: str) -> None:
        """A peer did not give a piece it said it had."""
        seen = file.peers.get(node)
        if seen is not None:
            seen.failed |= 1 << index

    def stall_s(self) -> float:
        """Seconds without news after which a node counts as stalled."""
        return max(STALL_S, STALL_FACTOR * (self.piece_s if self.piece_s is not None else 2.5))

    def settle(self, now_s: float) -> int:
        """Work out the owners from the nodes that are there; how many read from the source."""
        most = 1
        for file in self.files:
            if not file.missing:
                continue
            for node, seen in file.peers.items():
                self._watch(file, node, seen, now_s)
            nodes = {node for node, seen in file.peers.items() if seen.active}
            nodes -= self.away | file.stalled
            owners = tuple(sorted(nodes | ({self.me} if self.me is not None else set())))
            most = max(most, len(owners))
            if owners != file.owners:
                file.owners, file.shares = owners, _share(file, owners)
        return most

    def _watch(self, file: PlannedFile, node: str, seen: Seen, now_s: float) -> None:
        """Note whether a node has not moved for too long although it has something to read."""
        if now_s - seen.moved_at_s <= self.stall_s():
            file.stalled.discard(node)
        elif (file.shares.get(node, 0) | seen.fetching) & file.missing & ~seen.has:
            file.stalled.add(node)

    def _owned(self, file: PlannedFile) -> int:
        """What this node is to read: its share, or all where it is alone."""
        if not file.owners or file.owners == (self.me,):
            return file.missing
        return file.shares.get(self.me, 0) if self.me is not None else 0

    def next_from_source(self, now_s: float) -> tuple[PlannedFile, int] | None:
        """A piece to read from the source now, marked as being read; ``None`` if there is none."""
        for file in self.files:
            if not file.missing:
                continue
            mask = file.open & self._owned(file) & ~self._begun(file)
            mask &= ~file.available(self.away)
            for index in self._from_own_place(file, mask):
                if self._due(file, index, now_s):
                    return self._from_source(file, index)
        return self._take_over(now_s)

    def _from_own_place(self, file: PlannedFile, mask: int) -> Iterator[int]:
        """A set's pieces in the order they are read. Every node begins elsewhere: nodes that do not
        know of each other yet then seldom read the same."""
        if self.me is None or (not file.peers and not self.expects_others):
            yield from bits(mask)
            return
        place = int.from_bytes(weight(file.key, -1, self.me)) % file.count
        below = mask & ((1 << place) - 1)
        yield from bits(mask & ~below)
        yield from bits(below)

    def _take_over(self, now_s: float) -> tuple[PlannedFile, int] | None:
        """A piece of another node that no node has begun, once our own are all under way."""
        if any(file.open & self._owned(file) & ~file.available(self.away) for file in self.files):
            self.idle_since_s = None
            return None
        if self.idle_since_s is None:
            self.idle_since_s = now_s
        idle_s = now_s - self.idle_since_s
        for file in self.files:
            mask = file.open & ~self._owned(file) & ~self._begun(file)
            mask &= ~file.available(self.away)
            for index in reversed(list(bits(mask))):
                if not self._due(file, index, now_s):
                    continue
                if self.me is None and not self._orphan(file, index):
                    continue
                turn = rank(file.key, index, self.me or "", file.owners) if file.owners else 0
                if idle_s >= turn * STEAL_STEP_S:
                    return self._from_source(file, index)
        return None

    def _orphan(self, file: PlannedFile, index: int) -> bool:
        """Whether no node that reads from the source is going to give us this piece: there is none,
        or one has it and we could not get it."""
        return not file.owners or any(s.failed >> index & 1 for s in file.peers.values())

    def _begun(self, file: PlannedFile) -> int:
        """Pieces that a peer which is alive reads from the source."""
        mask = 0
        for node, seen in file.peers.items():
            if node not in self.away and node not in file.stalled:
                mask |= seen.fetching
        return mask

    def _due(self, file: PlannedFile, index: int, now_s: float) -> bool:
        return self.delays_s.get((id(file), index), now_s) <= now_s

    def _from_source(self, file: PlannedFile, index: int) -> tuple[PlannedFile, int]:
        file.storing |= 1 << index
        return file, index

    def next_peer(
        self, busy: Mapping[str, int], most_each: int, tie: Mapping[str, float]
    ) -> tuple[PlannedFile, int, str] | None:
        """A piece to read from a peer now, and from which, marked as being read.

        ``busy`` is how many each peer is reading for us, ``tie`` decides between equals.
        """
        nodes = {node for file in self.files for node in file.peers}
        ready = [n for n in nodes - self.away if busy.get(n, 0) < most_each]
        for node in sorted(ready, key=lambda n: (busy.get(n, 0), tie.get(n, 0.0), n)):
            for file in self.files:
                seen = file.peers.get(node)
                mask = file.open & seen.has & ~seen.failed if seen is not None else 0
                if mask:
                    index = next(bits(mask))
                    file.asking |= 1 << index
                    return file, index, node
        return None

    def hedge(self, slow: Iterable[tuple[PlannedFile, int]]) -> tuple[PlannedFile, int] | None:
        """One of these pieces, which a peer takes too long over, to be read from the source too."""
        for file, index in slow:
            bit = 1 << index
            if file.missing & bit and not file.storing & bit:
                file.storing |= bit
                return file, index
        return None

    def done(self, file: PlannedFile, index: int) -> None:
        """A piece is there."""
        bit = 1 << index
        file.missing &= ~bit
        file.storing &= ~bit
        file.asking &= ~bit
        self.delays_s.pop((id(file), index), None)

    def drop_source(self, file: PlannedFile, index: int, until_s: float) -> None:
        """Reading a piece from the source failed; it is left alone until then."""
        file.storing &= ~(1 << index)
        self.delays_s[id(file), index] = until_s

    def drop_peer(self, file: PlannedFile, index: int) -> None:
        """Reading a piece from a peer ended without it."""
        file.asking &= ~(1 << index)

    @property
    def left(self) -> int:
        """Pieces that are missing."""
        return sum(file.missing.bit_count() for file in self.files)

    def check_integrity(self) -> None:
        """What must hold between two changes."""
        for file in self.files:
            everything = (1 << file.count) - 1
            assert file.missing & ~everything == 0
            assert (file.storing | file.asking) & ~file.missing == 0


def _share(file: PlannedFile, owners: tuple[str, ...]) -> dict[str, int]:
    shares = dict.fromkeys(owners, 0)
    if len(owners) > 1:
        for index in bits(file.missing):
            shares[max(owners, key=lambda node: weight(file.key, index, node))] |= 1 << index
    return shares
