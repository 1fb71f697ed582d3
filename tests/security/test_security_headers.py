"""What may not pass in a head, in either direction: control bytes, and headers of one hop."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from datapath_rig import Gateway, ScriptedReplica, answers, gateway, post, says

CONTROLS = [byte for byte in range(32) if byte not in b"\t\r\n"] + [0x7F]
BODY = {"model": "m", "prompt": "x"}
HEAD = b"HTTP/1.1 200 OK\r\n%bcontent-length: 2\r\n\r\n{}"


@pytest.fixture(scope="module")
def served() -> Iterator[Gateway]:
    with gateway(max_retries=0) as running:
        yield running


@pytest.mark.parametrize("byte", CONTROLS)
def test_no_control_byte_of_a_client_reaches_a_replica(served: Gateway, byte: int) -> None:
    with ScriptedReplica(answers()) as replica:
        served.publish(replica)
        for line in (b"X-Y: a%cb" % byte, b"X%cY: a" % byte):
            assert served.ask(post(BODY, line)).status == 400
        assert not replica.requests


@pytest.mark.parametrize("byte", CONTROLS)
@pytest.mark.parametrize("where", ["value", "name", "reason"])
def test_no_control_byte_of_a_replica_reaches_a_client(
    served: Gateway, byte: int, where: str
) -> None:
    answer = {
        "value": HEAD % (b"x: a%cb\r\n" % byte),
        "name": HEAD % (b"x%cy: a\r\n" % byte),
        "reason": (HEAD % b"").replace(b"OK", b"O%cK" % byte),
    }[where]
    with ScriptedReplica(says(answer)) as replica, served.connect() as client:
        served.publish(replica)
        client.send(post(BODY))
        head = client.until(b"\r\n\r\n")
    assert b" 502 " in head
    assert bytes([byte]) not in head


def test_tabs_and_letters_beyond_ascii_pass(served: Gateway) -> None:
    line = b"X-Y: a\tb \xc3\xa9"
    with ScriptedReplica(says(HEAD % (line + b"\r\n"))) as replica, served.connect() as client:
        served.publish(replica)
        client.send(post(BODY, line))
        assert line in client.until(b"\r\n\r\n")
    assert line in replica.requests[0].raw


NAMED = [
    (b"Connection: X-Secret",),
    (b"connection: close, x-secret",),
    (b"Connection: keep-alive", b"CONNECTION:\tx-other ,X-SECRET"),
]


@pytest.mark.parametrize("lines", NAMED)
def test_what_connection_names_stays_with_the_hop(
    served: Gateway, lines: tuple[bytes, ...]
) -> None:
    secret = (b"X-Secret: 1", b"X-Kept: 2", b"x-secret: 3")
    for order in ((*lines, *secret), (*secret, *lines)):
        answer = HEAD % b"".join(line + b"\r\n" for line in order)
        with ScriptedReplica(says(answer)) as replica, served.connect() as client:
            served.publish(replica)
            client.send(post(BODY, *order))
            got = client.until(b"\r\n\r\n")
            assert client.exactly(2) == b"{}"
        for head in (got, replica.requests[0].raw):
            assert b"x-secret" not in head.lower()
            assert b"x-kept: 2" in head.lower()
