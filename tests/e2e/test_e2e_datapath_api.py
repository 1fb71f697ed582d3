"""What the gateway answers itself, and what it says in every answer."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from datapath_rig import (
    Answer,
    Gateway,
    ScriptedReplica,
    answers,
    eventually,
    gateway,
    get,
    post,
    says,
)

from gateway.datapath import metrics
from gateway.datapath.protocol.errors import Reason
from gateway.datapath.protocol.openai import PROXIED

ORIGIN = b"Origin: https://app.example"


@pytest.fixture(scope="module")
def replica() -> Iterator[ScriptedReplica]:
    with ScriptedReplica(answers()) as running:
        yield running


@pytest.fixture(scope="module")
def served(replica: ScriptedReplica) -> Iterator[Gateway]:
    with gateway() as running:
        running.publish(replica)
        yield running


@pytest.fixture(scope="module")
def for_browsers(replica: ScriptedReplica) -> Iterator[Gateway]:
    with gateway(cors_allow_origins=("https://app.example",)) as running:
        running.publish(replica)
        yield running


def check_error(answer: Answer, status: int, reason: str) -> dict[str, str | None]:
    """The shape that OpenAI's clients parse."""
    assert (answer.status, answer.reason) == (status, reason)
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-request-id"]
    body = answer.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["message"]
    return body["error"]


@pytest.mark.parametrize("path", sorted(PROXIED))
def test_every_proxied_path_reaches_the_pool(
    served: Gateway, replica: ScriptedReplica, path: bytes
) -> None:
    assert served.ask(post({"model": "alias"}, path=path)).status == 200
    assert replica.requests[-1].line == b"POST " + path + b" HTTP/1.1"


def test_models_lists_names_and_aliases(served: Gateway) -> None:
    listed = served.ask(get(b"/v1/models")).json()
    assert listed["object"] == "list"
    assert [(card["id"], card["root"], card["object"]) for card in listed["data"]] == [
        ("m", "m", "model"),
        ("alias", "m", "model"),
    ]
    assert all(card["created"] > 1_600_000_000 for card in listed["data"])


@pytest.mark.parametrize(
    ("name", "model"),
    [(b"m", "m"), (b"alias", "alias"), (b"%6D", "m")],
)
def test_one_model(served: Gateway, name: bytes, model: str) -> None:
    assert served.ask(get(b"/v1/models/" + name)).json()["id"] == model


def test_models_at_zero_are_listed_too() -> None:
    with gateway() as empty:
        assert [card["id"] for card in empty.ask(get(b"/v1/models")).json()["data"]] == [
            "m",
            "alias",
        ]


def test_an_unknown_model_is_404(served: Gateway) -> None:
    for answer in (served.ask(post({"model": "zzz"})), served.ask(get(b"/v1/models/zzz"))):
        error = check_error(answer, 404, "model_unknown")
        assert error["code"] == "model_not_found"
        assert error["param"] == "model"
        assert "zzz" in (error["message"] or "")


@pytest.mark.parametrize(
    ("body", "reason", "param"),
    [
        (b"", "bad_json", None),
        (b"{", "bad_json", None),
        (b"not json", "bad_json", None),
        (b'{"model":"m"} more', "bad_json", None),
        (b'{"model":"\xff"}', "bad_json", None),
        (b'{"model":"m","x":' + b"[" * 60_000, "bad_json", None),  # below peek_bytes
        (b"[]", "bad_request", None),
        (b"null", "bad_request", None),
        (b'"m"', "bad_request", None),
        (b"{}", "model_missing", "model"),
        (b'{"model":""}', "model_missing", "model"),
        (b'{"model":null}', "model_missing", "model"),
        (b'{"model":5}', "model_missing", "model"),
        (b'{"model":["m"]}', "model_missing", "model"),
        (b'{"model":"m","model":"m"}', "bad_request", "model"),
        (b'{"model":"m","\\u006dodel":null}', "bad_request", "model"),
    ],
)
def test_a_body_that_cannot_be_routed_is_400_and_names_the_field(
    served: Gateway, body: bytes, reason: str, param: str | None
) -> None:
    with served.connect() as client:
        client.send(post(body))
        error = check_error(client.answer(), 400, reason)
        assert error["type"] == "invalid_request_error"
        assert error["param"] == param
        client.send(get(b"/health"))  # the framing was fine: the connection is kept
        assert client.answer().status == 200


def test_an_unknown_path_is_404_and_a_wrong_method_405(served: Gateway) -> None:
    check_error(served.ask(get(b"/nowhere")), 404, "path_unknown")
    check_error(served.ask(post({"model": "m"}, path=b"/v1/nothing")), 404, "path_unknown")
    wrong = served.ask(get(b"/v1/completions"))
    assert check_error(wrong, 405, "method_not_allowed")["param"] is None
    assert wrong.headers["allow"] == "POST, OPTIONS"
    wrong = served.ask(post({}, path=b"/v1/models"))
    check_error(wrong, 405, "method_not_allowed")
    assert wrong.headers["allow"] == "GET, HEAD, OPTIONS"


@pytest.mark.parametrize("path", [b"/health", b"/v1/models", b"/nowhere", b"/v1/models/m"])
def test_head_is_get_without_the_body(served: Gateway, path: bytes) -> None:
    with served.connect() as client:
        client.send(get(path, method=b"HEAD"))
        head = client.answer(head_only=True)
        client.send(get(path))
        full = client.answer()
    for name in ("content-length", "content-type", "x-tidegate-reason"):
        assert head.headers.get(name) == full.headers.get(name)
    assert head.status == full.status


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        (b"/v1/chat/completions", "POST, OPTIONS"),
        (b"/v1/models", "GET, HEAD, OPTIONS"),
        (b"*", "POST, OPTIONS"),
    ],
)
def test_options_says_what_is_allowed(served: Gateway, path: bytes, allowed: str) -> None:
    with served.connect() as client:
        client.send(get(path, method=b"OPTIONS"))
        answer = client.answer()
        assert (answer.status, answer.headers["allow"]) == (204, allowed)
        client.send(get(b"/health"))
        assert client.answer().status == 200


def cors(answer: Answer) -> dict[str, str]:
    return {name: value for name, value in answer.headers.items() if name.startswith("access-")}


def test_cors_off_says_nothing(served: Gateway) -> None:
    for request in (
        get(b"/v1/completions", ORIGIN, method=b"OPTIONS"),
        post({"model": "m"}, ORIGIN),
        get(b"/v1/models", ORIGIN),
    ):
        assert cors(served.ask(request)) == {}


def test_cors_on_answers_the_preflight(for_browsers: Gateway) -> None:
    answer = for_browsers.ask(
        get(
            b"/v1/chat/completions",
            ORIGIN,
            b"Access-Control-Request-Method: POST",
            b"Access-Control-Request-Headers: authorization, content-type",
            method=b"OPTIONS",
        )
    )
    assert answer.status == 204
    lines = cors(answer)
    assert lines["access-control-allow-origin"] == "https://app.example"
    assert "POST" in lines["access-control-allow-methods"]
    assert "authorization" in lines["access-control-allow-headers"]
    assert int(lines["access-control-max-age"]) > 0


@pytest.mark.parametrize(
    "request_bytes",
    [
        post({"model": "m"}, ORIGIN),
        post({"model": "m"}, ORIGIN).replace(b"HTTP/1.1", b"HTTP/1.0"),
        post({"model": "zzz"}, ORIGIN),
        get(b"/v1/models", ORIGIN),
        get(b"/nowhere", ORIGIN),
    ],
)
def test_cors_on_lets_the_page_read_every_answer(
    for_browsers: Gateway, replica: ScriptedReplica, request_bytes: bytes
) -> None:
    answer = for_browsers.ask(request_bytes)
    lines = cors(answer)
    assert lines["access-control-allow-origin"] == "https://app.example"
    assert "x-request-id" in lines["access-control-expose-headers"]
    assert answer.headers["vary"] == "origin"
    if replica.requests:
        assert "origin" not in replica.requests[-1].headers
    other = for_browsers.ask(request_bytes.replace(b"app.example", b"evil.example"))
    assert cors(other) == {}
    assert other.status == answer.status


def test_cors_for_everybody(replica: ScriptedReplica) -> None:
    with gateway(cors_allow_origins=("*",)) as served:
        served.publish(replica)
        answer = served.ask(post({"model": "m"}, b"Origin: https://any.example"))
    assert cors(answer)["access-control-allow-origin"] == "https://any.example"


def test_request_ids_are_taken_made_and_returned(served: Gateway, replica: ScriptedReplica) -> None:
    mine = served.ask(post({"model": "m"}, b"X-Request-Id: my-id_1"))
    assert mine.headers["x-request-id"] == "my-id_1"
    assert replica.requests[-1].headers["x-request-id"] == "my-id_1"
    made = {served.ask(post({"model": "m"})).headers["x-request-id"] for _ in range(5)}
    assert len(made) == 5
    for bad in (b"X-Request-Id: two words", b"X-Request-Id: " + b"x" * 200, b"X-Request-Id:"):
        answer = served.ask(post({"model": "m"}, bad))
        assert answer.headers["x-request-id"].startswith("req-")
    for request in (get(b"/v1/models", b"X-Request-Id: q"), post(b"", b"X-Request-Id: q")):
        assert served.ask(request).headers["x-request-id"] == "q"


def test_the_engines_own_request_id_does_not_reach_the_client_twice(served: Gateway) -> None:
    engine = says(b"HTTP/1.1 200 OK\r\nx-request-id: engine\r\ncontent-length: 2\r\n\r\n{}")
    with ScriptedReplica(engine) as other, gateway() as own:
        own.publish(other)
        answer = own.ask(post({"model": "m"}, b"X-Request-Id: mine"))
    assert [v for k, v in answer.lines if k.lower() == b"x-request-id"] == [b"mine"]


def test_requests_and_their_usage_are_counted(replica: ScriptedReplica) -> None:
    usage = {"usage": {"prompt_tokens": 30, "total_tokens": 37, "completion_tokens": 7}}
    with ScriptedReplica(answers(json.dumps(usage).encode())) as other, gateway() as own:
        own.publish(other)
        for _ in range(3):
            assert own.ask(post({"model": "m"})).status == 200
        eventually(lambda: own.pool_count(metrics.OK) == 3)  # told a moment after the answer
        assert own.pool_count(metrics.ARRIVALS) == 3
        assert own.pool_count(metrics.PROMPT_TOKENS) == 90
        assert own.pool_count(metrics.OUTPUT_TOKENS) == 21
        own.ask(post({"model": "zzz"}))
        eventually(lambda: own.rejected(Reason.MODEL_UNKNOWN) == 1)
        assert own.pool_count(metrics.ARRIVALS) == 3
