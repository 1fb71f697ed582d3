"""One body has one fate, however it comes and whatever it holds that does not route it."""

from __future__ import annotations

import gzip
import json
import time
from collections.abc import Iterator

import pytest
from datapath_rig import (
    Answer,
    Gateway,
    ScriptedReplica,
    answers,
    chunks,
    eventually,
    gateway,
    post,
)

MESSAGES = b'"messages":[{"role":"user","content":"hi"}]'
PAD = b'"pad":"' + b"x" * 70_000 + b'",'
BODIES = {
    "plain": b'{"model":"m",' + PAD + MESSAGES + b"}",
    "model last": b"{" + PAD + MESSAGES + b',"model":"m"}',
    "two models": b'{"model":"m",' + PAD + b'"model":"other"}',
    "a hidden model": b'{"model":"m",' + PAD + b'"\\u006dodel":"other"}',
    "half an emoji": b'{"model":"m",' + PAD + rb'"x":"\ud83d"}',
    "text for numbers": b'{"model":"m",' + PAD + b'"max_tokens":"5","stream":"true"}',
    "text after it": b'{"model":"m",' + PAD + MESSAGES + b"} x",
    "a comma too many": b'{"model":"m",' + PAD + MESSAGES + b",}",
    "cut short": b'{"model":"m",' + PAD + MESSAGES,
    "bytes that are not text": b'{"model":"m",' + PAD + b'"x":"\xff"}',
    "no object": b"[" + b"1," * 50_000 + b"1]",
    "no model": b"{" + PAD + MESSAGES + b"}",
    "an unknown model": b'{"model":"zzz",' + PAD + MESSAGES + b"}",
    "a byte order mark": b'\xef\xbb\xbf{"model":"m",' + PAD + MESSAGES + b"}",
    "utf-16": ('{"model":"m",' + PAD.decode() + MESSAGES.decode() + "}").encode("utf-16"),
}
REFUSED = {"two models", "a hidden model", "no object", "no model"}


@pytest.fixture(scope="module")
def replica() -> Iterator[ScriptedReplica]:
    with ScriptedReplica(answers()) as running:
        yield running


@pytest.fixture(scope="module")
def served(replica: ScriptedReplica) -> Iterator[Gateway]:
    with gateway(proxied_paths=("/v1/videos",)) as running:
        running.publish(running.replica(replica.url, served_model="org/real", names=("adapter",)))
        yield running


def send(served: Gateway, *pieces: bytes) -> Answer:
    with served.connect() as client:
        for piece in pieces:
            client.send(piece)
            time.sleep(0.03)
        return client.answer()


@pytest.mark.parametrize("name", BODIES)
def test_a_large_body_has_one_fate_however_it_is_cut(
    served: Gateway, replica: ScriptedReplica, name: str
) -> None:
    body = BODIES[name]
    whole = post(body)
    start = whole[: -len(body)]
    ways = [
        (whole,),
        (start, body),
        (start, body[:67_000], body[67_000:]),
        (start, body[:70_090], body[70_090:]),
        (
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n",
            chunks(body[:30_000], body[30_000:]),
            b"0\r\n\r\n",
        ),
    ]
    seen = []
    for way in ways:
        before = len(replica.requests)
        answer = send(served, *way)
        asked = [request.body for request in replica.requests[before:]]
        seen.append((answer.status, answer.reason, asked))
    assert seen[1:] == seen[:1] * 4
    if name in REFUSED:
        assert seen[0][::2] == (400, [])
    served.settle()


def test_a_second_model_in_the_tail_of_a_streamed_body_never_reaches_the_replica_whole(
    served: Gateway, replica: ScriptedReplica
) -> None:
    body, before = BODIES["two models"], replica.broken
    start = post(body)[: -len(body)]
    answer = send(served, start, body[:67_000], body[67_000:])
    assert (answer.status, answer.reason) == (400, "bad_request")
    eventually(lambda: replica.broken > before)


@pytest.mark.parametrize("size", [10, 100_000])
def test_a_model_is_renamed_without_touching_another_byte(
    served: Gateway, replica: ScriptedReplica, size: int
) -> None:
    start, end = b'{"a": 1.0e+02, "x":"' + b"\\u00e9" * size + b'", "model" : ', b', "b":[ 1 ,2] }'
    assert served.ask(post(start + b'"m"' + end)).status == 200
    assert replica.requests[-1].body == start + b'"org/real"' + end


def test_a_name_that_the_replica_lists_is_not_renamed(
    served: Gateway, replica: ScriptedReplica
) -> None:
    pool = {"adapters": ("adapter",)}
    known = served.replica(replica.url, served_model="org/real", names=("adapter",))
    served.publish(known, **pool)
    asked = []
    for name in ("m", "adapter", "alias"):
        if served.ask(post({"model": name})).status == 200:
            asked.append(replica.requests[-1].json()["model"])
    assert asked == ["org/real", "adapter", "org/real"]


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "zstd", "gzip, identity"])
def test_an_encoded_body_is_refused_by_name(served: Gateway, encoding: str) -> None:
    body = gzip.compress(b'{"model":"m"}')
    answer = served.ask(post(body, b"Content-Encoding: " + encoding.encode()))
    assert (answer.status, answer.reason) == (415, "encoding_unsupported")
    assert f"'{encoding}'" in answer.json()["error"]["message"]
    assert answer.headers["accept-encoding"] == "identity"


def test_the_encoding_identity_is_none(served: Gateway) -> None:
    assert served.ask(post({"model": "m"}, b"Content-Encoding: identity")).status == 200


FORM = (
    b'--B\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\n%b\r\n'
    b'--B\r\nContent-Disposition: form-data; name="model"\r\n\r\n%b\r\n--B--\r\n'
)
FORM_TYPE = b"Content-Type: multipart/form-data; boundary=B"


@pytest.mark.parametrize("size", [100, 200_000])
@pytest.mark.parametrize(
    "path", [b"/v1/audio/transcriptions", b"/v1/audio/translations", b"/v1/images/edits"]
)
def test_a_form_goes_to_the_pool_that_its_model_names(
    served: Gateway, replica: ScriptedReplica, path: bytes, size: int
) -> None:
    file = b"\r\n--R" * (size // 5)
    answer = served.ask(post(FORM % (file, b"m"), FORM_TYPE, path=path))
    assert answer.status == 200
    assert replica.requests[-1].body == FORM % (file, b"org/real")
    assert replica.requests[-1].line == b"POST " + path + b" HTTP/1.1"
    missing = served.ask(post(FORM % (file, b"zzz"), FORM_TYPE, path=path))
    assert (missing.status, missing.reason) == (404, "model_unknown")


def test_paths_of_the_settings_are_passed_on(served: Gateway, replica: ScriptedReplica) -> None:
    assert served.ask(post({"model": "m"}, path=b"/v1/videos")).status == 200
    assert served.ask(post(FORM % (b"f", b"m"), FORM_TYPE, path=b"/v1/videos/")).status == 200
    assert replica.requests[-1].line == b"POST /v1/videos HTTP/1.1"


@pytest.mark.parametrize(
    "path",
    [b"/v1/completions/", b"//v1/completions", b"/v1//completions//", b"/v1/completions/?a=b"],
)
def test_stray_slashes_are_forgiven(served: Gateway, replica: ScriptedReplica, path: bytes) -> None:
    assert served.ask(post({"model": "m"}, path=path)).status == 200
    line = replica.requests[-1].line
    assert line == b"POST /v1/completions%b HTTP/1.1" % path.partition(b"/?")[2].replace(
        b"a", b"?a"
    )


def test_a_replica_behind_a_path_is_asked_there(replica: ScriptedReplica) -> None:
    with gateway() as running:
        running.publish(running.replica(replica.url + "/team-a"))
        assert running.ask(post({"model": "m"})).status == 200
    assert replica.requests[-1].line == b"POST /team-a/v1/completions HTTP/1.1"


def test_a_model_with_slashes_is_found_and_its_card_is_as_vllm_writes_it(served: Gateway) -> None:
    served.publish(aliases=("org/name",), adapters=("org/lora",), max_model_len_tokens=2048)
    try:
        for path in (b"/v1/models/org/name", b"/v1/models/org%2Fname", b"//v1/models/org/name/"):
            card = served.ask(b"GET %b HTTP/1.1\r\nHost: x\r\n\r\n" % path).json()
            assert card["id"] == "org/name"
            assert (card["root"], card["parent"], card["max_model_len"]) == ("m", None, 2048)
            assert card["created"] > 0
            assert card["owned_by"]
        lora = served.ask(b"GET /v1/models/org/lora HTTP/1.1\r\nHost: x\r\n\r\n").json()
        assert (lora["root"], lora["parent"]) == ("org/lora", "m")
    finally:
        served.publish()


@pytest.mark.parametrize(
    "request_start",
    [b"GET /health", b"GET /nowhere", b"POST /v1/completions"],
)
def test_an_http_1_0_client_that_asks_for_it_is_told_that_the_connection_is_kept(
    served: Gateway, replica: ScriptedReplica, request_start: bytes
) -> None:
    """As ``ab -k`` does; without the header it waits for the connection to end."""
    served.publish(served.replica(replica.url))
    body = json.dumps({"model": "zzz" if b"no" in request_start else "m"}).encode()
    head = b"%b HTTP/1.0\r\nConnection: Keep-Alive\r\n" % request_start
    if request_start.startswith(b"POST"):
        head += b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
    else:
        head += b"\r\n"
    with served.connect() as client:
        for _ in range(2):
            client.send(head)
            assert client.answer().headers["connection"] == "keep-alive"
