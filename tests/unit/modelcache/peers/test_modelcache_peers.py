"""Nodes that give each other pieces, over real sockets: about one read of the store for all, and
nobody who is slow, dead, silent or lying is waited for or believed."""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import blake3
import pytest
from swarm_rig import PATIENT, TOKEN, MemorySource, Node, key_of, make_content, make_node

from modelcache.peers import wire as wire
from modelcache.peers.client import PeerClient, PeerIntegrityError, PeerUnavailable, PieceNotFound
from modelcache.peers.group import MOST_HEARD, PeerGroup, make_peers
from modelcache.peers.piece_inventory import PieceInventory
from modelcache.peers.server import PeerServer, read_body, read_head
from modelcache.settings import ModelCacheSettings
from modelcache.types import PIECE_BYTES

MIB = 1 << 20


def never() -> bool:
    return False


@pytest.fixture
def nodes() -> Iterator[Callable[..., Node]]:
    """Makes nodes that end with the test."""
    made: list[Node] = []

    def make(*given: object, **more: object) -> Node:
        made.append(make_node(*given, **more))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for node in made:
        node.close()


@contextlib.contextmanager
def reserved(count: int = 1) -> Iterator[list[int]]:
    """Ports that nobody is given meanwhile, and that can be listened at."""
    with contextlib.ExitStack() as stack:
        ports = []
        for _ in range(count):
            held = stack.enter_context(socket.socket())
            held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            held.bind(("127.0.0.1", 0))
            ports.append(int(held.getsockname()[1]))
        yield ports


def make_cluster(root: Path, count: int, **settings: object) -> list[Node]:
    """Nodes that all know each other, themselves included, as one configuration for all has it."""
    made = []
    with reserved(count) as ports:
        urls = tuple(f"http://127.0.0.1:{port}" for port in ports)
        for port in ports:
            node = make_node(root / str(port), peers=urls, serve=False, **settings)
            assert node.group is not None
            node.port = node.group.serve("127.0.0.1", port)
            made.append(node)
    return made


def fetch_all(nodes: list[Node], sources: list[MemorySource]) -> None:
    errors: list[BaseException] = []

    def fetch(node: Node, source: MemorySource) -> None:
        try:
            node.fetch(source)
        except BaseException as error:  # noqa: BLE001 - told to the test
            errors.append(error)

    threads = [
        threading.Thread(target=fetch, args=pair) for pair in zip(nodes, sources, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(100)
    assert not errors
    assert not any(thread.is_alive() for thread in threads)


# -- together ------------------------------------------------------------------------------------


def test_nodes_that_begin_together_read_the_store_about_once(tmp_path: Path) -> None:
    content = {"w": make_content(8 * PIECE_BYTES), "config.json": b"{}" * 100}
    sources = [MemorySource(content, rate_bytes_s=16 * MIB) for _ in range(4)]
    cluster = make_cluster(tmp_path, 4)
    try:
        fetch_all(cluster, sources)
        size = sum(map(len, content.values()))
        # Apart they would read 4 times. How close to once depends on how busy this machine is:
        # `bench cache` measures that, and who reads how much.
        assert sum(source.read_bytes for source in sources) <= 2 * size
        assert sum(node.transfer.totals().peer_bytes for node in cluster) >= 2 * size
        for node, source in zip(cluster, sources, strict=True):
            assert node.read(source, "w") == content["w"]
    finally:
        for node in cluster:
            node.close()


def test_who_comes_later_takes_it_from_those_who_have_it(
    tmp_path: Path, nodes: Callable[..., Node]
) -> None:
    source = MemorySource({"w": make_content(5 * PIECE_BYTES + 7)})
    first = nodes(tmp_path / "a")
    first.fetch(source)
    source.reads.clear()
    second = nodes(tmp_path / "b", peers=(first.url,), serve=False)
    second.fetch(source)
    assert not source.reads
    assert second.read(source, "w") == source.files["w"]
    assert first.group is not None
    assert first.group.sent_bytes == len(source.files["w"])


def test_a_peer_that_is_not_there_is_no_hindrance(
    tmp_path: Path, nodes: Callable[..., Node]
) -> None:
    source = MemorySource({"w": make_content(3 * PIECE_BYTES)})
    with reserved() as (port,):
        node = nodes(tmp_path, peers=(f"http://127.0.0.1:{port}",))
        node.fetch(source)
    assert set(source.reads.values()) == {1}


def test_a_peer_with_another_token_gives_and_gets_nothing(
    tmp_path: Path, nodes: Callable[..., Node]
) -> None:
    source = MemorySource({"w": make_content(2 * PIECE_BYTES)})
    stranger = nodes(tmp_path / "a", token="another cluster's secret")
    stranger.fetch(source)
    node = nodes(tmp_path / "b", peers=(stranger.url,))
    node.fetch(source)
    assert node.transfer.totals().peer_bytes == 0
    assert stranger.group is not None
    assert stranger.group.sent_bytes == 0


def test_what_came_from_a_peer_is_passed_on_only_once_it_is_whole_and_right(
    tmp_path: Path, nodes: Callable[..., Node]
) -> None:
    source = MemorySource({"w": make_content(3 * PIECE_BYTES)})
    first = nodes(tmp_path / "a")
    first.fetch(source)
    second = nodes(tmp_path / "b", peers=(first.url,))
    assert second.group is not None
    (file, partial), *_ = second.open(source)
    shown: list[wire.PieceState | None] = []

    def note(progress: object) -> None:
        shown.append(second.group.inventory.states([partial.key]).get(partial.key))  # type: ignore[union-attr]

    second.transfer.run(source, [(file, partial)], on_progress=note)
    assert shown
    assert all(state is not None and state.has == 0 for state in shown)
    partial.finish(file.digests)
    state = second.group.inventory.states([key_of(file)])[key_of(file)]
    assert state == wire.PieceState(has=0b111, fetching=0, active=False)


# -- peers that are slow, dead or liars ----------------------------------------------------------


class BadPeer:
    """A node with the cluster's secret that says it has everything, and then does what it does."""

    def __init__(self, count: int, content: bytes, way: str) -> None:
        self.count = count
        self.content = content
        self.way = way
        self.pieces = 0
        self.node = "f" * 32
        self.keyring = wire.Keyring(TOKEN)
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        self.connections: list[socket.socket] = []
        self.closing = threading.Event()
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self) -> None:
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            self.connections.append(connection)
            threading.Thread(target=self.serve, args=(connection,), daemon=True).start()

    def serve(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError, wire.BadMessage):
            while (read := read_head(connection)) is not None:
                head, _ = read
                request, body = self.keyring.read_head(head), read_body(connection, *read)
                assert request is not None
                assert body is not None
                request = wire.with_body(request, head, body)
                assert request is not None
                self.answer(connection, request)

    def answer(self, connection: socket.socket, request: wire.PeerRequest) -> None:
        if request.target == wire.HELLO:
            self.say(connection, request, json.dumps({"node": self.node}).encode())
        elif request.target == wire.STATE:
            asked = json.loads(request.body)
            if asked["wait_s"]:
                self.closing.wait(asked["wait_s"])
            state = {"has": f"{(1 << self.count) - 1:x}", "fetching": "0", "active": False}
            files = dict.fromkeys(asked["keys"], state)
            body = json.dumps({"sequence": 1, "files": files}).encode()
            self.say(connection, request, body)
        else:
            self.pieces += 1
            index = int(request.target.rpartition("=")[2])
            self.piece(connection, request, self.content[index * PIECE_BYTES :][:PIECE_BYTES])

    def piece(self, connection: socket.socket, request: wire.PeerRequest, data: bytes) -> None:
        wrong = bytes([data[0] ^ 1]) + data[1:]
        if self.way == "flipped":
            self.say(connection, request, wrong, digest_of=data)
        elif self.way == "consistent":
            self.say(connection, request, wrong)
        elif self.way == "short":
            self.say(connection, request, data[:-1])
        elif self.way == "unsigned":
            self.say(connection, request, data, keyring=wire.Keyring("x" * 20))
        elif self.way == "cut":
            self.say(connection, request, data, send=len(data) // 2)
            connection.shutdown(socket.SHUT_RDWR)
        elif self.way == "garbage":
            connection.sendall(os.urandom(2_000) + b"\r\n\r\n")
        elif self.way == "lacks":
            self.say(connection, request, b"{}", status=404)
        elif self.way == "busy":
            self.say(connection, request, b"{}", status=503)
        elif self.way == "trickle":
            self.say(connection, request, data, send=1_000)
            for at in range(1_000, len(data), 100):
                connection.sendall(data[at : at + 100])
                if self.closing.wait(0.05):
                    return
        elif self.way == "silent":
            self.closing.wait(60)

    def say(
        self, connection: socket.socket, request: wire.PeerRequest, body: bytes, *,
        status: int = 200, digest_of: bytes | None = None, keyring: wire.Keyring | None = None,
        send: int | None = None,
    ) -> None:  # fmt: skip
        digest = blake3.blake3(body if digest_of is None else digest_of).hexdigest()
        headers = (keyring or self.keyring).answer_headers(request.nonce, status, len(body), digest)
        connection.sendall(wire.format_head(f"HTTP/1.1 {status} X", headers) + body[:send])

    def close(self) -> None:
        self.closing.set()
        with contextlib.suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        for connection in self.connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()


LIES = ("flipped", "short", "unsigned", "garbage")


@pytest.mark.parametrize("way", [*LIES, "cut", "lacks", "silent", "trickle"])
def test_whatever_a_peer_does_the_model_is_right_and_comes(
    way: str, tmp_path: Path, nodes: Callable[..., Node]
) -> None:
    timeouts = PATIENT
    if way in ("silent", "trickle"):
        # Short only where it is what ends the waiting: all others answer, on a busy machine late.
        timeouts = replace(PATIENT, lost_s=0.5, peer_piece_s=0.06)
    data = make_content(4 * PIECE_BYTES)
    bad = BadPeer(4, data, way)
    try:
        source = MemorySource({"w": data})
        node = nodes(tmp_path, peers=(bad.url,), timeouts=timeouts)
        node.fetch(source)
        assert node.read(source, "w") == data
        assert node.transfer.totals().peer_bytes == 0
        assert source.read_bytes == len(data)
        assert node.group is not None
        (status,) = node.group.status()
        assert (status.banned is not None) == (way in LIES)
        before = bad.pieces
        assert before > 0
        if way in LIES:
            node.fetch(MemorySource({"other": data}))
            assert bad.pieces == before
    finally:
        bad.close()


def test_a_busy_peer_is_asked_again_later(tmp_path: Path, nodes: Callable[..., Node]) -> None:
    data = make_content(2 * PIECE_BYTES)
    bad = BadPeer(2, data, "busy")
    try:
        source = MemorySource({"w": data})
        node = nodes(tmp_path, peers=(bad.url,))
        node.fetch(source)
        assert node.read(source, "w") == data
        assert node.group is not None
        assert node.group.status()[0].banned is None
    finally:
        bad.close()


def test_a_lie_that_only_the_whole_file_shows_is_found_out_and_its_author_left_alone(
    tmp_path: Path, nodes: Callable[..., Node]
) -> None:
    data = make_content(4 * PIECE_BYTES)
    bad = BadPeer(4, data, "consistent")
    honest = nodes(tmp_path / "honest")
    honest.fetch(MemorySource({"w": data}))
    try:
        source = MemorySource({"w": data})
        node = nodes(tmp_path / "node", peers=(bad.url, honest.url))
        assert node.group is not None
        (file, partial), *_ = node.open(source)
        node.transfer.run(source, [(file, partial)])
        given = node.transfer.totals().peer_bytes
        assert given == len(data)
        with pytest.raises(Exception, match="sha256"):
            partial.finish(file.digests)
        node.transfer.state.doubt(partial.key)
        node.fetch(source)
        assert node.read(source, "w") == data
        assert source.read_bytes == len(data)
        banned = {one.url: one.banned for one in node.group.status()}
        assert "not what the source has" in (banned[bad.url] or "")
        assert banned[honest.url] is None
        before = bad.pieces
        other = MemorySource({"other": data})
        node.fetch(other)
        assert bad.pieces == before
    finally:
        bad.close()


def test_a_slow_peer_does_not_hold_up_what_others_have(
    tmp_path: Path, nodes: Callable[..., Node]
) -> None:
    data = make_content(8 * PIECE_BYTES)
    slow = BadPeer(8, data, "trickle")
    timeouts = replace(PATIENT, peer_piece_s=0.2, slow_s=0.5)
    good = nodes(tmp_path / "good")
    good.fetch(MemorySource({"w": data}))
    try:
        source = MemorySource({"w": data})
        node = nodes(tmp_path / "node", peers=(slow.url, good.url), timeouts=timeouts)
        node.fetch(source)
        assert node.read(source, "w") == data
        # What was being read from the slow one the store gave in the end; if busy, more than that.
        assert node.transfer.totals().peer_bytes >= PIECE_BYTES
    finally:
        slow.close()


def test_a_node_that_dies_in_the_middle_is_made_up_for(tmp_path: Path) -> None:
    content = {"w": make_content(6 * PIECE_BYTES)}
    cluster = make_cluster(tmp_path, 3)
    sources = [MemorySource(content, rate_bytes_s=20 * MIB) for _ in cluster]
    dead = cluster[1]

    def die(path: str, index: int) -> None:
        if sources[1].reads.total() >= 2:
            dead.close()
            threading.Event().wait(0.2)

    sources[1].before = die
    try:
        fetch_all(cluster, sources)
        for node, source in zip(cluster, sources, strict=True):
            assert node.read(source, "w") == content["w"]
    finally:
        for node in cluster:
            node.close()


def test_a_peer_that_starts_anew_is_believed_again(
    tmp_path: Path, nodes: Callable[..., Node]
) -> None:
    data = make_content(2 * PIECE_BYTES)
    bad = BadPeer(2, data, "flipped")
    node = nodes(tmp_path / "node", peers=(bad.url,))
    node.fetch(MemorySource({"w": data}))
    assert node.group is not None
    assert node.group.status()[0].banned
    bad.close()
    port = int(bad.url.rpartition(":")[2])
    anew = nodes(tmp_path / "anew", serve=False, peers=(node.url,))
    anew.fetch(MemorySource({"x": data}))
    assert anew.group is not None
    deadline_s = time.monotonic() + 60
    while True:
        try:
            anew.group.serve("127.0.0.1", port)
            break
        except OSError:
            assert time.monotonic() < deadline_s
            time.sleep(0.05)
    # Anything it asks shows that it is there again.
    anew.fetch(MemorySource({"y": data}))
    source = MemorySource({"x": data})
    node.fetch(source)
    assert not source.reads
    assert node.group.status()[0].banned is None


# -- the server ----------------------------------------------------------------------------------


@contextlib.contextmanager
def serving(root: Path, **limits: int) -> Iterator[tuple[PeerServer, int, Node]]:
    node = make_node(root, serve=False)
    assert node.group is not None
    server = PeerServer(node.group.inventory, wire.Keyring(TOKEN), node="a" * 32, **limits)  # type: ignore[arg-type]
    port = server.start("127.0.0.1", 0)
    try:
        yield server, port, node
    finally:
        server.close()


def make_client(port: int) -> PeerClient:
    client = PeerClient(f"http://127.0.0.1:{port}", wire.Keyring(TOKEN), "b" * 32)
    client.hello(never)
    return client


def raw(port: int, data: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        connection.sendall(data)
        with contextlib.suppress(ConnectionError):
            return connection.recv(65_536)
    return b""


def signed(target: str, *, to: str, nonce: str = "1" * 32, at_ms: int | None = None) -> bytes:
    request = wire.PeerRequest(
        method="GET", target=target, sender="b" * 32, to=to, nonce=nonce,
        at_ms=int(time.time() * 1000) if at_ms is None else at_ms,
    )  # fmt: skip
    head = wire.Keyring(TOKEN).request_headers(request, "x")
    return wire.format_head(f"GET {target} HTTP/1.1", head)


def test_a_request_is_answered_once_for_this_node_and_for_a_while(tmp_path: Path) -> None:
    with serving(tmp_path) as (_, port, _node):
        request = signed(wire.HELLO, to="")
        assert b" 200 " in raw(port, request)
        assert b" 401 " in raw(port, request)
        assert b" 421 " in raw(port, signed("/v1/piece?x", to="c" * 32, nonce="2" * 32))
        stale = signed(wire.HELLO, to="", nonce="3" * 32, at_ms=10**12)
        assert b" 401 " in raw(port, stale)
        assert b" 404 " in raw(port, signed("/else", to="a" * 32, nonce="4" * 32))


@pytest.mark.parametrize(
    "data",
    [
        b"\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET /v1/piece?key=../../etc/passwd&index=0 HTTP/1.1\r\n\r\n",
        b"POST /v1/state HTTP/1.1\r\ncontent-length: 99999999999\r\n\r\n",
        b"POST /v1/state HTTP/1.1\r\ncontent-length: 0\r\n\r\nmore",
        b"A" * 20_000,
    ],
)
def test_whoever_lacks_the_secret_learns_nothing(data: bytes, tmp_path: Path) -> None:
    with serving(tmp_path) as (_, port, _node):
        answer = raw(port, data)
        assert answer == b"" or b" 401 " in answer
        assert b"node" not in answer


@pytest.mark.parametrize(
    "query",
    [
        "",
        "key=..&index=0",
        f"key={'a' * 40}&index=-1",
        f"key={'a' * 40}&index=²",
        f"key={'A' * 40}&index=0",
    ],
)
def test_a_piece_is_named_by_a_key_and_a_number(query: str, tmp_path: Path) -> None:
    with serving(tmp_path) as (_, port, _node):
        request = signed(f"{wire.PIECE}?{query}".encode().decode("latin-1"), to="a" * 32)
        assert b" 400 " in raw(port, request)


def test_connections_and_pieces_on_their_way_are_bounded(tmp_path: Path) -> None:
    with serving(tmp_path, most_connections=2, most_sending=1) as (_server, port, node):
        source = MemorySource({"w": make_content(PIECE_BYTES)})
        node.fetch(source)
        key = key_of(source.remote("w"))
        holding = socket.create_connection(("127.0.0.1", port))
        holding.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
        holding.sendall(signed(f"{wire.PIECE}?key={key}&index=0", to="a" * 32))
        assert holding.recv(10)
        assert b" 503 " in raw(
            port, signed(f"{wire.PIECE}?key={key}&index=0", to="a" * 32, nonce="5" * 32)
        )
        # The second one may not be gone yet, so any of the next may be the first beyond the limit.
        others = [socket.create_connection(("127.0.0.1", port), timeout=60) for _ in range(4)]
        cut, _, _ = select.select(others, [], [], 60)
        assert cut
        for one in (holding, *others):
            one.close()


class EndlessInventory(PieceInventory):
    """Of which a question waits until it is stopped."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = threading.Event()

    def wait(
        self, keys: Sequence[str], since: int, wait_s: float, stopped: Callable[[], bool]
    ) -> int:
        self.asked.set()
        return super().wait(keys, since, 3_600.0, stopped)


def test_questions_that_wait_end_with_the_server() -> None:
    inventory = EndlessInventory()
    server = PeerServer(inventory, wire.Keyring(TOKEN), node="a" * 32)
    client = make_client(server.start("127.0.0.1", 0))

    def ask() -> None:
        with contextlib.suppress(PeerUnavailable, PeerIntegrityError):
            client.states(["a" * 40], 1 << 60, 9.0, never)

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    assert inventory.asked.wait(60)
    server.close()
    asking.join(60)
    assert not asking.is_alive()
    assert not [one for one in threading.enumerate() if one.name == "peer" and one.is_alive()]


def test_a_blob_whose_digests_are_damaged_is_not_given(tmp_path: Path) -> None:
    with serving(tmp_path) as (_, port, node):
        source = MemorySource({"w": make_content(PIECE_BYTES)})
        node.fetch(source)
        key = key_of(source.remote("w"))
        digest = node.layout.known(key).read_text()
        pieces = node.layout.pieces(digest)
        pieces.chmod(0o644)
        pieces.write_bytes(b"x" * 40)
        client = make_client(port)
        assert client.states([key], 0, 0.0, never)[1] == {}
        with pytest.raises(PieceNotFound):
            client.piece(key, 0, memoryview(bytearray(PIECE_BYTES)), timeout_s=60,
                         cancelled=never, on_bytes=lambda n: None)  # fmt: skip


def test_a_bit_that_flipped_on_the_peers_disk_is_seen_by_who_receives_it(tmp_path: Path) -> None:
    with serving(tmp_path) as (_, port, node):
        source = MemorySource({"w": make_content(PIECE_BYTES)})
        node.fetch(source)
        key = key_of(source.remote("w"))
        blob = node.layout.blob(node.layout.known(key).read_text())
        blob.chmod(0o644)
        with blob.open("r+b") as file:
            file.seek(1_000)
            byte = file.read(1)
            file.seek(1_000)
            file.write(bytes([byte[0] ^ 4]))
        with pytest.raises(PeerIntegrityError, match="not what it says it is"):
            make_client(port).piece(key, 0, memoryview(bytearray(PIECE_BYTES)), timeout_s=60,
                                    cancelled=never, on_bytes=lambda n: None)  # fmt: skip


def test_news_of_a_piece_ends_a_question_that_waits(tmp_path: Path) -> None:
    with serving(tmp_path) as (_, port, node):
        source = MemorySource({"w": make_content(2 * PIECE_BYTES)})
        (file, partial), *_ = node.open(source)
        client = make_client(port)
        assert node.group is not None
        with partial:
            holding = node.group.inventory.open(partial)
            since, states = client.states([partial.key], 0, 0.0, never)
            assert states[partial.key] == wire.PieceState(has=0, fetching=0, active=True)
            found: list[dict[str, wire.PieceState]] = []
            asking = threading.Thread(
                target=lambda: found.append(client.states([partial.key], since, 9.0, never)[1])
            )
            asking.start()
            os.pwrite(partial.fd, source.files["w"][:PIECE_BYTES], 0)
            partial.commit(0)
            holding.end(0, good=True)
            asking.join(30)
            assert found[0][partial.key].has == 1
            into = bytearray(PIECE_BYTES)
            client.piece(partial.key, 0, memoryview(into), timeout_s=60, cancelled=never,
                         on_bytes=lambda n: None)  # fmt: skip
            assert into == source.files["w"][:PIECE_BYTES]
            holding.close()
        assert file.path == "w"


def test_an_answer_that_comes_byte_by_byte_is_not_waited_for() -> None:
    def trickle(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            connection.recv(65_536)
            connection.sendall(b"HTTP/1.1 200 OK\r\n")
            for _ in range(1_000):
                connection.sendall(b"x")
                time.sleep(0.02)

    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(30)
        serving = threading.Thread(target=lambda: trickle(server.accept()[0]), daemon=True)
        serving.start()
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        client = PeerClient(url, wire.Keyring(TOKEN), "me", answer_s=0.3)
        began_s = time.monotonic()
        with pytest.raises(PeerUnavailable, match="no answer within"):
            client.hello(never)
        assert time.monotonic() - began_s < 10
        serving.join(30)


# -- settings ------------------------------------------------------------------------------------


def test_peers_need_the_clusters_secret() -> None:
    wanted = ModelCacheSettings(peers=("http://10.0.0.1:8002",))
    with pytest.raises(ValueError, match="TIDEGATE_PEER_TOKEN"):
        make_peers(wanted, {}, PieceInventory())
    with pytest.raises(ValueError, match=r"TIDEGATE_PEER_TOKEN.* 16 characters"):
        make_peers(wanted, {"TIDEGATE_PEER_TOKEN": "short"}, PieceInventory())
    assert make_peers(ModelCacheSettings(), {}, PieceInventory()) is None
    assert isinstance(
        make_peers(wanted, {"TIDEGATE_PEER_TOKEN": TOKEN}, PieceInventory()), PeerGroup
    )


# -- who asks ------------------------------------------------------------------------------------


def test_a_stranger_that_asks_again_and_again_does_not_undo_pauses() -> None:
    urls = [f"http://10.9.9.{n}:8002" for n in (1, 2, 3)]
    group = PeerGroup(
        urls, "a secret for this test", inventory=PieceInventory(), clock=lambda: 100.0
    )
    lost, unknown, fine = group._peers
    for peer, node in ((lost, "lost"), (fine, "fine")):
        peer.client.node = node

    def pause() -> None:
        for peer in (lost, unknown):
            peer.failures, peer.paused_until_s = 7, 130.0

    try:
        pause()
        group.heard("fine")  # a peer that is reached, and may ask as often as it likes
        assert (lost.paused_until_s, unknown.paused_until_s) == (130.0, 130.0)
        group.heard("stranger")  # it may be either of the two, begun anew
        assert (lost.paused_until_s, unknown.paused_until_s) == (0.0, 0.0)
        pause()
        group.heard("stranger")
        assert (lost.paused_until_s, unknown.paused_until_s) == (130.0, 130.0)
        group.heard("lost")  # it is back under its own name, and the other is not
        assert (lost.paused_until_s, unknown.paused_until_s) == (0.0, 130.0)
        for n in range(MOST_HEARD + 5):
            group.heard(f"s{n}")
        assert len(group._heard) == MOST_HEARD
    finally:
        group.close()
