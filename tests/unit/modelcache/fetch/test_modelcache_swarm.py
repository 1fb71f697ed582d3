"""Who reads what: a whole cluster's boards on virtual time, with nodes that lag, die and stall."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelcache.fetch.plan import Board, PlannedFile, bits, mask_of, rank, weight
from modelcache.peers.wire import PieceState

PIECES = 60
NEWS_S = 0.1


@dataclass
class Node:
    """A node that follows its board; ``piece_s`` is how long the store takes for a piece."""

    name: str
    board: Board
    starts_s: float = 0.0
    piece_s: float = 1.0
    connections: int = 2
    dies_s: float = float("inf")
    stalls_s: float = float("inf")
    vouches: int = 0
    storing: list[tuple[float, int]] = field(default_factory=list)
    asking: list[tuple[float, int, str]] = field(default_factory=list)
    done_s: float | None = None

    @property
    def file(self) -> PlannedFile:
        return self.board.files[0]

    def shown(self) -> PieceState:
        return PieceState(has=self.vouches, fetching=self.file.storing, active=self.done_s is None)


def make_node(name: str, **more: float) -> Node:
    file = PlannedFile(key="k" * 40, count=PIECES, missing=(1 << PIECES) - 1)
    board = Board(me=name, files=[file], piece_s=1.0, expects_others=True)
    return Node(name=name, board=board, **more)  # type: ignore[arg-type]


class Cluster:
    """Steps all nodes through time; counts what the store was asked for."""

    def __init__(self, nodes: list[Node]) -> None:
        self.nodes = nodes
        self.reads: Counter[int] = Counter()
        self.now_s = 0.0

    def run(self, until_s: float = 400.0) -> None:
        while self.now_s < until_s and any(
            n.done_s is None and n.dies_s > self.now_s and n.stalls_s > self.now_s
            for n in self.nodes
        ):
            self.now_s += 0.05
            for node in self.nodes:
                if node.starts_s <= self.now_s < min(node.dies_s, node.stalls_s):
                    self.step(node)

    def step(self, node: Node) -> None:
        now_s, board = self.now_s, node.board
        # Everybody asks all others first, and from then on hears of them a little late.
        if now_s - node.starts_s < 0.06 or int(now_s / 0.05) % round(NEWS_S / 0.05) == 0:
            for other in self.nodes:
                if other is node or other.starts_s > now_s:
                    continue
                if other.dies_s <= now_s:
                    board.lose(other.name)
                else:
                    board.learn(other.name, {node.file.key: other.shown()}, now_s)
        board.settle(now_s)
        for done in [one for one in node.storing if one[0] <= now_s]:
            node.storing.remove(done)
            node.vouches |= 1 << done[1]
            board.done(node.file, done[1])
        for given_ in [one for one in node.asking if one[0] <= now_s]:
            node.asking.remove(given_)
            alive = next(n for n in self.nodes if n.name == given_[2]).dies_s > now_s
            if alive:
                board.done(node.file, given_[1])
            else:
                board.refuse(node.file, given_[1], given_[2])
                board.drop_peer(node.file, given_[1])
        while len(node.storing) < node.connections and (found := board.next_from_source(now_s)):
            self.reads[found[1]] += 1
            node.storing.append((now_s + node.piece_s, found[1]))
        busy = Counter(one[2] for one in node.asking)
        while len(node.asking) < 8 and (pick := board.next_peer(busy, 2, {})):
            node.asking.append((now_s + 0.1, pick[1], pick[2]))
            busy[pick[2]] += 1
        board.check_integrity()
        if board.left == 0 and node.done_s is None:
            node.done_s = now_s
            node.vouches = (1 << PIECES) - 1


def names(count: int) -> list[str]:
    return [f"node{n}" for n in range(count)]


def test_ten_nodes_at_once_read_every_piece_once() -> None:
    cluster = Cluster([make_node(name) for name in names(10)])
    cluster.run()
    assert sorted(cluster.reads) == list(range(PIECES))
    assert cluster.reads.total() <= 1.05 * PIECES
    assert all(node.done_s is not None for node in cluster.nodes)
    alone = PIECES / 2 * 1.0
    assert max(node.done_s or 0 for node in cluster.nodes) < alone / 4


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(0, 8), min_size=2, max_size=8))
def test_nodes_that_begin_at_different_times_hardly_read_anything_twice(
    starts: list[float],
) -> None:
    starts[0] = 0.0
    cluster = Cluster(
        [make_node(name, starts_s=s) for name, s in zip(names(len(starts)), starts, strict=True)]
    )
    cluster.run()
    assert all(node.done_s is not None for node in cluster.nodes)
    assert cluster.reads.total() <= 1.2 * PIECES


def test_a_slow_node_is_helped_and_does_not_hold_up_the_others() -> None:
    nodes = [make_node(name) for name in names(5)]
    nodes[2].piece_s = 30.0
    cluster = Cluster(nodes)
    cluster.run()
    fast = [node.done_s for node in nodes if node is not nodes[2]]
    assert max(t or 1e9 for t in fast) < 20.0
    assert cluster.reads.total() <= 1.2 * PIECES


@pytest.mark.parametrize("way", ["dies_s", "stalls_s"])
def test_what_a_lost_node_owned_is_read_by_the_next_in_rank(way: str) -> None:
    nodes = [make_node(name) for name in names(5)]
    setattr(nodes[1], way, 1.5)
    cluster = Cluster(nodes)
    cluster.run()
    left = [node for node in nodes if node is not nodes[1]]
    assert all(node.done_s is not None for node in left)
    assert max(node.done_s or 0 for node in left) < 40.0
    assert cluster.reads.total() <= 1.35 * PIECES


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000))
def test_whatever_dies_stalls_or_lags_the_others_finish(seed: int) -> None:
    rng = random.Random(seed)
    nodes = [
        make_node(name, starts_s=rng.uniform(0, 3), piece_s=rng.choice([0.5, 1.0, 5.0]))
        for name in names(6)
    ]
    for node in rng.sample(nodes, 3):
        setattr(node, rng.choice(["dies_s", "stalls_s"]), rng.uniform(0, 10))
    cluster = Cluster(nodes)
    cluster.run()
    for node in nodes:
        if node.dies_s == node.stalls_s == float("inf"):
            assert node.done_s is not None


def test_a_node_that_serves_nobody_owns_nothing_while_others_do() -> None:
    file = PlannedFile(key="k", count=4, missing=0b1111)
    board = Board(me=None, files=[file])
    board.learn("a", {"k": PieceState(active=True, fetching=1)}, 0.0)
    board.settle(0.0)
    assert board.next_from_source(0.0) is None
    assert board.next_from_source(2.0) is None
    board.lose("a")
    board.settle(2.0)
    assert board.next_from_source(2.0) == (file, 0)


def test_a_peer_with_the_whole_file_is_asked_and_the_store_is_not() -> None:
    file = PlannedFile(key="k", count=4, missing=0b1111)
    board = Board(me="me", files=[file])
    board.learn("whole", {"k": PieceState(has=0b1111)}, 0.0)
    board.settle(0.0)
    assert board.next_from_source(0.0) is None
    assert board.next_from_source(60.0) is None
    picked = [board.next_peer({}, 8, {}) for _ in range(5)]
    assert [p and (p[1], p[2]) for p in picked] == [(n, "whole") for n in range(4)] + [None]
    board.refuse(file, 2, "whole")
    board.drop_peer(file, 2)
    assert board.next_from_source(60.0) == (file, 2)


def test_a_peer_that_is_away_is_not_asked_and_not_waited_for() -> None:
    file = PlannedFile(key="k", count=2, missing=0b11)
    board = Board(me=None, files=[file], away=frozenset({"whole"}))
    board.learn("whole", {"k": PieceState(has=0b11)}, 0.0)
    board.settle(0.0)
    assert board.next_peer({}, 8, {}) is None
    assert board.next_from_source(0.0) == (file, 0)
    assert board.next_from_source(0.0) == (file, 1)


def test_a_piece_that_failed_is_left_alone_for_its_pause() -> None:
    file = PlannedFile(key="k", count=1, missing=1)
    board = Board(me=None, files=[file])
    board.settle(0.0)
    assert board.next_from_source(0.0) == (file, 0)
    board.drop_source(file, 0, 5.0)
    assert board.next_from_source(4.9) is None
    assert board.next_from_source(5.0) == (file, 0)


def test_a_hedged_piece_is_read_once_from_the_store() -> None:
    file = PlannedFile(key="k", count=1, missing=1, asking=1)
    board = Board(me="me", files=[file])
    assert board.hedge([(file, 0)]) == (file, 0)
    assert board.hedge([(file, 0)]) is None
    board.done(file, 0)
    assert (file.missing, file.storing, file.asking) == (0, 0, 0)


def test_nodes_that_do_not_know_of_each_other_begin_at_different_places() -> None:
    first = set()
    for name in names(10):
        board = make_node(name).board
        board.settle(0.0)
        found = board.next_from_source(0.0)
        assert found is not None
        first.add(found[1])
    assert len(first) >= 7


def test_owners_share_evenly_and_only_the_lost_ones_pieces_move() -> None:
    def owner(index: int, nodes: list[str]) -> str:
        return max(nodes, key=lambda node: weight("key", index, node))

    ten = names(10)
    share = Counter(owner(index, ten) for index in range(2_000))
    assert all(120 < count < 280 for count in share.values())
    moved = [i for i in range(2_000) if owner(i, ten) != owner(i, ten[:9])]
    assert all(owner(index, ten) == "node9" for index in moved)
    assert sorted(rank("key", 5, node, ten) for node in ten) == list(range(10))


@given(st.sets(st.integers(0, 500)))
def test_bits_are_sets(indices: set[int]) -> None:
    assert list(bits(mask_of(indices))) == sorted(indices)
