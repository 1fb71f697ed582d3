"""Names that stand for many nodes: found, found again, let go of, and never a hindrance."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from pydantic import ValidationError
from swarm_rig import TOKEN, MemorySource, Node, make_content, make_node

from modelcache.peers.group import PeerGroup, PeerNames, look_up, make_peers
from modelcache.peers.piece_inventory import PieceInventory
from modelcache.settings import ModelCacheSettings
from modelcache.store.layout import Layout
from modelcache.types import PIECE_BYTES, SourceError

WAIT_S = 60.0
NAME = "nodes.example"


class NameServer:
    """Answers as it is told, and counts the questions."""

    def __init__(self, *addresses: str) -> None:
        self.addresses: list[str] = list(addresses)
        self.problem: OSError | None = None
        self.asked: list[tuple[str, int]] = []

    def __call__(self, host: str, port: int) -> Sequence[str]:
        self.asked.append((host, port))
        if self.problem is not None:
            raise self.problem
        return list(self.addresses)


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Callable[..., Node]]:
    """Makes nodes, each at an address of its own and all at one port, that end with the test."""
    made: list[Node] = []

    def make(address: str, server: NameServer, port: int = 0, **settings: object) -> Node:
        names = (f"http://{NAME}:{port}",)
        node = make_node(tmp_path / address, serve=False, names=names, look_up=server, **settings)
        made.append(node)
        assert node.group is not None
        node.port = node.group.serve(address, port)
        return node

    yield make
    for node in made:
        node.close()


def free_port(*addresses: str) -> int:
    """A port that is free at each of them."""
    for _ in range(100):
        with socket.create_server((addresses[0], 0)) as first:
            port = int(first.getsockname()[1])
            try:
                for address in addresses[1:]:
                    socket.create_server((address, port)).close()
            except OSError:
                continue
        return port
    raise AssertionError("no port is free")


def wait(what: str, look: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + WAIT_S
    while not look():
        assert time.monotonic() < deadline_s, what
        time.sleep(0.01)


def urls(group: PeerGroup) -> list[str]:
    return [one.url for one in group.status()]


def group_of(server: NameServer, tmp_path: Path, *peers: str, look_s: float = 0.1) -> PeerGroup:
    return PeerGroup(
        peers, TOKEN, inventory=PieceInventory(Layout(tmp_path)), names=(f"http://{NAME}:8002/",),
        look_up=server, look_s=look_s, soon_s=0.02,
    )  # fmt: skip


# -- finding -------------------------------------------------------------------------------------


def test_every_address_of_a_name_is_a_node_to_take_from(nodes: Callable[..., Node]) -> None:
    addresses = ["127.0.0.2", "127.0.0.3", "127.0.0.4"]
    server = NameServer(*addresses)
    port = free_port(*addresses)
    source = MemorySource({"w": make_content(6 * PIECE_BYTES + 7)})
    first, *others = [nodes(address, server, port) for address in addresses]
    first.fetch(source)
    source.reads.clear()
    for node in others:
        node.fetch(source)
        assert node.read(source, "w") == source.files["w"]
    assert not source.reads
    # Its own address is in the name too, and is known for its own.
    assert others[0].group is not None
    assert f"http://127.0.0.3:{port}" not in urls(others[0].group)


def test_who_comes_into_the_name_meanwhile_is_asked_by_downloads_under_way(
    nodes: Callable[..., Node],
) -> None:
    server = NameServer("127.0.0.2")
    port = free_port("127.0.0.2", "127.0.0.3")
    content = {"w": make_content(6 * PIECE_BYTES)}
    giver = nodes("127.0.0.3", server, port)
    taker = nodes("127.0.0.2", server, port, connections=1)
    giver.fetch(MemorySource(content))
    group = taker.group
    assert group is not None

    def hold(path: str, index: int) -> None:
        """The store gives nothing before the other node has given something."""
        server.addresses = ["127.0.0.2", "127.0.0.3"]
        deadline_s = time.monotonic() + WAIT_S
        while not any(one.given_bytes for one in group.status()):
            if time.monotonic() > deadline_s:
                raise SourceError("nobody came", retryable=False)
            time.sleep(0.01)

    source = MemorySource(content, before=hold)
    taker.fetch(source)
    assert taker.read(source, "w") == content["w"]
    assert sum(source.reads.values()) < 6


def test_a_name_without_an_answer_is_no_hindrance(nodes: Callable[..., Node]) -> None:
    server = NameServer()
    server.problem = socket.gaierror(socket.EAI_NONAME, "no such name")
    node = nodes("127.0.0.2", server)
    source = MemorySource({"w": make_content(3 * PIECE_BYTES)})
    node.fetch(source)
    assert set(source.reads.values()) == {1}


def test_a_node_that_is_heard_of_is_looked_for_at_once(tmp_path: Path) -> None:
    server = NameServer("10.0.0.1")
    group = group_of(server, tmp_path, look_s=3_600.0)
    try:
        group.serve("127.0.0.1", 0)
        wait("the first look", lambda: urls(group) == ["http://10.0.0.1:8002"])
        server.addresses = ["10.0.0.1", "10.0.0.2"]
        group.heard("f" * 32)
        wait("another", lambda: len(urls(group)) == 2)
        assert set(server.asked) == {(NAME, 8002)}
    finally:
        group.close()


# -- letting go ----------------------------------------------------------------------------------


def test_who_left_the_name_is_let_go_of_and_who_is_named_otherwise_is_not(tmp_path: Path) -> None:
    server = NameServer("10.0.0.1", "10.0.0.2")
    group = group_of(server, tmp_path, "http://10.0.0.9:8002")
    fixed = "http://10.0.0.9:8002"
    try:
        group.serve("127.0.0.1", 0)
        wait("all", lambda: len(urls(group)) == 3)
        server.addresses = ["10.0.0.2", "10.0.0.3"]
        known = [fixed, "http://10.0.0.2:8002", "http://10.0.0.3:8002"]
        wait("the others", lambda: urls(group) == known)
        server.problem = socket.gaierror(socket.EAI_AGAIN, "later")
        asked = len(server.asked)
        wait("answers that fail", lambda: len(server.asked) > asked + 2)
        assert urls(group) == known, "no answer is not an empty one"
        server.problem, server.addresses = None, []
        wait("an empty one", lambda: urls(group) == [fixed])
    finally:
        group.close()


def test_who_left_the_name_but_answers_stays_until_it_does_not(nodes: Callable[..., Node]) -> None:
    server = NameServer("127.0.0.2", "127.0.0.3")
    port = free_port("127.0.0.2", "127.0.0.3")
    giver, taker = nodes("127.0.0.3", server, port), nodes("127.0.0.2", server, port)
    group = taker.group
    assert group is not None
    first = MemorySource({"w": make_content(2 * PIECE_BYTES)})
    giver.fetch(first)
    taker.fetch(first)
    server.addresses = ["127.0.0.2"]
    asked = len(server.asked)
    wait("looks", lambda: len(server.asked) > asked + 3)
    assert urls(group) == [f"http://127.0.0.3:{port}"]
    giver.close()
    taker.fetch(MemorySource({"v": make_content(2 * PIECE_BYTES, seed=2)}))
    wait("that it is let go of", lambda: urls(group) == [])


def test_a_group_that_is_closed_looks_no_more(tmp_path: Path) -> None:
    server = NameServer("10.0.0.1")
    group = group_of(server, tmp_path)
    group.serve("127.0.0.1", 0)
    wait("a look", lambda: len(urls(group)) == 1)
    group.close()

    def ended() -> bool:
        return all(one.name != "peer names" for one in threading.enumerate())

    wait("its thread's end", ended)


# -- names and addresses -------------------------------------------------------------------------


def test_addresses_of_either_kind_become_urls() -> None:
    found: list[tuple[str, list[str]]] = []
    names = PeerNames(
        ["http://a:1", "http://a:1/", "http://b"],
        lambda name, urls: found.append((name, list(urls))),
        NameServer("10.0.0.1", "fd00::7"),
    )
    names.look()
    wait("a look", lambda: names.looked)
    names.close()
    assert found[:2] == [
        ("http://a:1", ["http://10.0.0.1:1", "http://[fd00::7]:1"]),
        ("http://b", ["http://10.0.0.1:80", "http://[fd00::7]:80"]),
    ]


def test_the_system_is_asked_for_all_addresses() -> None:
    assert "127.0.0.1" in look_up("localhost", 8002)
    with pytest.raises(OSError):
        look_up("no-such-name.invalid", 8002)


@pytest.mark.parametrize(
    "name",
    [
        "https://a:1",
        "a:1",
        "http://a:1/x",
        "http://k:v@a:1",
        "http://[fd00::7]:1",
        "http://a:65536",
    ],
)
def test_what_is_no_name_is_refused(name: str) -> None:
    with pytest.raises(ValidationError, match="peer_names"):
        ModelCacheSettings(peer_names=(name,))


def test_names_alone_make_peers_and_need_the_secret(tmp_path: Path) -> None:
    settings = ModelCacheSettings(peer_names=(f"http://{NAME}:8002",))
    inventory = PieceInventory(Layout(tmp_path))
    with pytest.raises(ValueError, match="TIDEGATE_PEER_TOKEN"):
        make_peers(settings, {}, inventory)
    group = make_peers(settings, {"TIDEGATE_PEER_TOKEN": TOKEN}, inventory)
    assert group is not None
    group.close()
