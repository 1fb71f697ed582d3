"""Signatures: nobody without the secret is believed, and nothing is good for a second time."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelcache.peers.wire import (
    WINDOW_S,
    BadMessage,
    Keyring,
    Nonces,
    PeerHead,
    PeerRequest,
    format_head,
    parse_head,
    with_body,
)
from modelcache.sources.answers import SourceResponse

TOKEN = "a secret of the whole cluster"
OURS, OTHERS = Keyring(TOKEN), Keyring(TOKEN + "!")


def ask(**changes: object) -> PeerRequest:
    request = PeerRequest(
        method="GET",
        target="/v1/piece?key=aa&index=3",
        sender="a" * 32,
        to="b" * 32,
        at_ms=1_700_000_000_000,
        nonce=secrets.token_hex(16),
    )
    return dataclasses.replace(request, **changes)  # type: ignore[arg-type]


def sent(request: PeerRequest, keyring: Keyring = OURS) -> PeerHead:
    headers = keyring.request_headers(request, "10.0.0.1:8002")
    return parse_head(
        format_head(f"{request.method} {request.target} HTTP/1.1", headers).removesuffix(
            b"\r\n\r\n"
        )
    )


def read_request(head: PeerHead, body: bytes) -> PeerRequest | None:
    request = OURS.read_head(head)
    return None if request is None else with_body(request, head, body)


def answer(status: int, headers: Mapping[str, str]) -> SourceResponse:
    return SourceResponse(status=status, headers=headers, persistent=True)


def test_a_request_arrives_as_it_was_meant() -> None:
    request = ask(method="POST", body=b"{}")
    assert read_request(sent(request), b"{}") == request


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("x-tidegate-from", "c" * 32),
        ("x-tidegate-to", "c" * 32),
        ("x-tidegate-at", "1700000000001"),
        ("x-tidegate-at", "-1"),
        ("x-tidegate-nonce", "0" * 32),
        ("x-tidegate-nonce", "../../etc"),
        ("x-tidegate-signature", ""),
        ("x-tidegate-signature", "0" * 64),
        ("x-tidegate-signature", "é" * 64),
    ],
)
def test_no_header_can_be_changed(name: str, value: str) -> None:
    head = sent(ask())
    changed = dataclasses.replace(head, headers={**head.headers, name: value})
    assert read_request(changed, b"") is None


def test_neither_target_nor_method_nor_body_can_be_changed() -> None:
    head = sent(ask(body=b"one"))
    assert read_request(head, b"one") is not None
    assert read_request(head, b"two") is None
    assert read_request(dataclasses.replace(head, first="POST"), b"one") is None
    assert read_request(dataclasses.replace(head, second="/v1/state"), b"one") is None


def test_another_clusters_node_is_not_believed() -> None:
    assert read_request(sent(ask(), OTHERS), b"") is None
    head = answer(200, OTHERS.answer_headers("n", 200, 5, "d"))
    with pytest.raises(BadMessage, match="not signed with the peers' token"):
        OURS.check_answer(head, "n")


@pytest.mark.parametrize(
    ("nonce", "status", "changes"),
    [
        ("other", 200, {}),
        ("n", 404, {}),
        ("n", 200, {"content-length": "6"}),
        ("n", 200, {"content-length": "5, 5"}),
        ("n", 200, {"x-tidegate-digest": "e"}),
        ("n", 200, {"x-tidegate-signature": "é"}),
    ],
)
def test_no_part_of_an_answer_can_be_changed(
    nonce: str, status: int, changes: dict[str, str]
) -> None:
    headers = OURS.answer_headers("n", 200, 5, "d")
    assert OURS.check_answer(answer(200, headers), "n") == "d"
    with pytest.raises(BadMessage):
        OURS.check_answer(answer(status, {**headers, **changes}), nonce)


def test_the_secret_is_not_shown_and_must_be_one() -> None:
    assert TOKEN not in repr(OURS)
    with pytest.raises(ValueError, match="16 characters"):
        Keyring("short")


def test_a_request_is_good_once_and_for_a_while() -> None:
    nonces, now_ms = Nonces(), 10**12
    assert nonces.admit("a", now_ms, now_ms)
    assert not nonces.admit("a", now_ms, now_ms)
    late_ms = now_ms + int(WINDOW_S * 1000) + 1
    assert not nonces.admit("b", now_ms, late_ms)
    assert not nonces.admit("c", late_ms, now_ms)


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(-100_000, 100_000)), max_size=200))
def test_no_number_is_let_in_twice_however_little_is_remembered(
    steps: list[tuple[int, int]],
) -> None:
    nonces, now_ms = Nonces(most=4), 10**12
    admitted = set()
    for number, ahead_ms in steps:
        now_ms += 1_000
        # A replay is the same number with the same moment: both are signed.
        first_ms = 10**12 + number * 5_000
        for at_ms in {first_ms, now_ms + ahead_ms}:
            if nonces.admit(f"{number}-{at_ms}", at_ms, now_ms):
                assert (number, at_ms) not in admitted
                admitted.add((number, at_ms))
        assert len(nonces) <= 4


def test_remembering_is_bounded_and_honest_requests_still_pass() -> None:
    nonces = Nonces(most=100)
    passed = sum(nonces.admit(str(n), 10**12 + n, 10**12 + n) for n in range(10_000))
    assert passed == 10_000
    assert len(nonces) <= 100


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"GET /",
        b"GET / HTTP/1.1\r\nno colon",
        b"GET / HTTP/1.1\r\na: 1\r\nA: 2",
        b"GET / HTTP/1.1\r\n folded: 1",
        b"GET / HTTP/1.1\r\ntransfer-encoding: chunked",
    ],
)
def test_a_head_that_is_none_is_refused(data: bytes) -> None:
    with pytest.raises(BadMessage):
        parse_head(data)


@pytest.mark.parametrize("length", ["-1", "1e3", "x", "1" * 16, "²"])
def test_a_length_is_digits(length: str) -> None:
    with pytest.raises(BadMessage):
        _ = PeerHead(first="", second="", headers={"content-length": length}).length


@given(st.binary(max_size=300))
def test_no_bytes_break_the_parser(data: bytes) -> None:
    try:
        head = parse_head(data)
        _ = head.length
    except BadMessage:
        return
    assert read_request(head, b"") is None
