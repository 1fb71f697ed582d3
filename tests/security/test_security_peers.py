"""The peers' port: what a client without the cluster's secret can do to a node, and what one with
it can say."""

from __future__ import annotations

import contextlib
import json
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator

import blake3
import pytest

from modelcache.peers import server, wire
from modelcache.peers.client import PeerBusy, PeerClient, PeerIntegrityError, PieceNotFound
from modelcache.peers.piece_inventory import PieceInventory
from modelcache.peers.replicate import LOOK, replicate
from modelcache.peers.server import PeerServer, read_body, read_head

TOKEN = "a secret of the whole cluster"
KEY = "a" * 40


def never() -> bool:
    return False


@pytest.fixture
def port() -> Iterator[int]:
    peer = PeerServer(PieceInventory(), wire.Keyring(TOKEN), node="a" * 32)
    yield peer.start("127.0.0.1", 0)
    peer.close()


def client_of(port: int) -> PeerClient:
    return PeerClient(f"http://127.0.0.1:{port}", wire.Keyring(TOKEN), "b" * 32, answer_s=60)


def signed(target: str, body: bytes, keyring: wire.Keyring) -> bytes:
    request = wire.PeerRequest(
        method="POST", target=target, sender="b" * 32, to="a" * 32, body=body,
        nonce=secrets.token_hex(16), at_ms=int(time.time() * 1000),
    )  # fmt: skip
    head = keyring.request_headers(request, "x")
    return wire.format_head(f"POST {target} HTTP/1.1", head)


def ask(port: int, target: str, body: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        connection.sendall(signed(target, body, wire.Keyring(TOKEN)) + body)
        return connection.recv(65_536)


# -- without the secret --------------------------------------------------------------------------


def test_connections_that_say_nothing_keep_no_peer_out(
    port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "HEAD_S", 600.0)
    with contextlib.ExitStack() as idle:
        for _ in range(400):
            idle.enter_context(socket.create_connection(("127.0.0.1", port), timeout=60))
        client = client_of(port)
        assert client.hello(never) == "a" * 32
        client.close()
        for _ in range(3_000):  # those that gave way are about to end
            serving = [thread for thread in threading.enumerate() if thread.name == "peer"]
            if len(serving) <= server.MOST_UNPROVEN_EACH <= 100:
                break
            time.sleep(0.01)
        else:
            raise AssertionError(f"{len(serving)} are served")


def test_a_head_that_does_not_come_is_given_up(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "HEAD_S", 0.2)
    for sent in (b"", b"POST "):
        with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
            connection.sendall(sent)
            assert connection.recv(1) == b""


@pytest.mark.parametrize("length", [1, 8 * 1024 * 1024])
def test_no_byte_of_a_body_is_waited_for_without_the_secret(port: int, length: int) -> None:
    head = signed(wire.STATE, bytes(length), wire.Keyring("another cluster's secret"))
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        connection.sendall(head)  # and nothing of the body
        assert b" 401 " in connection.recv(1_000)


def test_a_body_that_is_not_what_the_head_says_is_not_taken(port: int) -> None:
    body = b'{"keys":[],"since":0,"wait_s":0}'
    head = signed(wire.STATE, body, wire.Keyring(TOKEN))
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        connection.sendall(head + body.replace(b"0", b"1"))
        assert connection.recv(1_000) == b""


def test_refusals_do_not_fill_the_log(port: int, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(50):
        with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
            connection.sendall(b"GET /v1/hello HTTP/1.1\r\n\r\n")
            connection.recv(1_000)
    assert len([one for one in caplog.records if one.levelname == "WARNING"]) == 1


# -- with it: numbers and shapes -----------------------------------------------------------------

ODD = ("NaN", "-NaN", "Infinity", "1e999", "-1", "-1e9", "1" + "0" * 5_000, '"1"', "null", "true",
       "[]", "[" * 100_000)  # fmt: skip


@pytest.mark.parametrize("value", ODD)
@pytest.mark.parametrize("name", ["since", "wait_s"])
def test_odd_numbers_are_refused_at_once(port: int, name: str, value: str) -> None:
    fields = {"keys": f'["{KEY}"]', "since": "0", "wait_s": "0", name: value}
    body = "{" + ",".join(f'"{key}":{text}' for key, text in fields.items()) + "}"
    assert b" 400 " in ask(port, wire.STATE, body.encode())


@pytest.mark.parametrize("keys", ['"a"', "{}", "7", '["../../etc"]', "[[]]", "null"])
def test_keys_that_are_none_are_refused(port: int, keys: str) -> None:
    body = f'{{"keys":{keys},"since":0,"wait_s":0}}'
    assert b" 400 " in ask(port, wire.STATE, body.encode())


class Answering:
    """A node with the secret that answers every request with this body."""

    def __init__(self, answer: Callable[[str], tuple[int, bytes]], close: bool = False) -> None:
        self.answer, self.close_after, self.connections = answer, close, 0
        self.keyring = wire.Keyring(TOKEN)
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self.run, daemon=True).start()

    def run(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self.listener.accept()
                self.connections += 1
                threading.Thread(target=self.serve, args=(connection,), daemon=True).start()

    def serve(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError, wire.BadMessage):
            while (read := read_head(connection)) is not None:
                read_body(connection, *read)
                request = self.keyring.read_head(read[0])
                assert request is not None
                status, body = self.answer(request.target.partition("?")[0])
                digest = blake3.blake3(body).hexdigest()
                headers = self.keyring.answer_headers(request.nonce, status, len(body), digest)
                if self.close_after:
                    headers["connection"] = "close"
                connection.sendall(wire.format_head(f"HTTP/1.1 {status} X", headers) + body)

    def client(self) -> PeerClient:
        client = PeerClient(self.url, self.keyring, "b" * 32, answer_s=60)
        client.node = "a" * 32
        return client


@contextlib.contextmanager
def answering(
    answer: Callable[[str], tuple[int, bytes]], *, close: bool = False
) -> Iterator[Answering]:
    peer = Answering(answer, close)
    try:
        yield peer
    finally:
        with contextlib.suppress(OSError):
            peer.listener.shutdown(socket.SHUT_RDWR)
        peer.listener.close()


GOOD = {"has": "f", "fetching": "0", "active": False}


@pytest.mark.parametrize(
    "answer",
    [
        "[]", "null", "", "{", "[" * 200_000, '{"files":[],"sequence":1}', '{"sequence":1}',
        *(json.dumps({"files": {KEY: {**GOOD, "has": bits}}, "sequence": 1})
          for bits in ("-f", "+f", "0xf", "f_f", " f", "", "g", 15, None, [])),
        *(f'{{"files":{{}},"sequence":{number}}}' for number in ODD),
        f'{{"files":{{"{KEY}":7}},"sequence":1}}',
    ],
)  # fmt: skip
def test_an_odd_answer_about_files_is_a_peer_s_lie(answer: str) -> None:
    with answering(lambda target: (200, answer.encode())) as peer:
        client = peer.client()
        with pytest.raises(PeerIntegrityError):
            client.states([KEY], 0, 0, never)
        client.close()


def test_files_that_were_not_asked_for_are_not_taken() -> None:
    body = json.dumps({"files": {KEY: GOOD, "b" * 40: GOOD}, "sequence": 3}).encode()
    with answering(lambda target: (200, body)) as peer:
        client = peer.client()
        sequence, files = client.states([KEY], 0, 0, never)
        assert (sequence, list(files), files[KEY].has) == (3, [KEY], 15)
        client.close()


@pytest.mark.parametrize(
    "changed",
    [
        {"progress": {"phase": "x", "bytes_done": "many"}},
        {"progress": {"phase": "x", "bytes_done": -1}},
        {"progress": {"phase": 7, "bytes_done": 1}},
        {"progress": {"phase": "x", "bytes_total": [1]}},
        {"progress": {"phase": "x", "rate_bytes_s": "fast"}},
        {"progress": [1]},
        {"state": "gone"},
        {"state": 1},
        {"state": "done", "size_bytes": "7"},
        {"state": "done", "revision": {}},
    ],
)
def test_a_site_that_answers_oddly_has_failed(changed: dict[str, object]) -> None:
    told = {"state": "running", "progress": {"phase": "fetching", "bytes_done": 1}, **changed}

    def answer(target: str) -> tuple[int, bytes]:
        body = {"node": "a" * 32, "order": "1"} if target != LOOK else told
        return 200, json.dumps(body).encode()

    with answering(answer) as peer:
        outcome = replicate(
            "hf://org/m", None, {"there": peer.client()},
            on_progress=lambda progress: None, cancelled=never,
        )["there"]  # fmt: skip
    assert not outcome.done
    assert outcome.error is not None


# -- connections ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("status", "error"), [(404, PieceNotFound), (503, PeerBusy)])
@pytest.mark.parametrize("close", [False, True])
def test_a_connection_is_kept_unless_the_answer_says_close(
    status: int, error: type[Exception], close: bool
) -> None:
    with answering(lambda target: (status, b'{"error":"x"}'), close=close) as peer:
        client, into = peer.client(), memoryview(bytearray(10))
        for _ in range(3):
            with pytest.raises(error):
                client.piece(
                    KEY, 0, into, timeout_s=60, cancelled=never, on_bytes=lambda size_bytes: None
                )
        client.close()
        assert peer.connections == (3 if close else 1)
