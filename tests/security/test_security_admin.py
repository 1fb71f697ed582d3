"""Who gets in to the admin listener, by which way, and what those who do not can cost.

Trusted: the user who runs Tidegate (and root), who alone may connect to the Unix socket; over TCP
who has the token. Everybody else gets health and metrics.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import stat
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import typer
from admin_rig import BEARER, TOKEN, ServedAdmin, gateway_status
from fake_cache import FakeCache, fake_models

from autoscaler.settings import PoolSettings
from gateway.admin import server
from gateway.admin.operations import OPEN, OPERATIONS, STATUS, VERBS
from gateway.cli import client
from gateway.compose.admin_token import admin_token
from gateway.compose.listeners import (
    RECORD_NAME,
    SOCKET_NAMES,
    Running,
    leave_record,
)
from gateway.settings.load import ConfigError
from gateway.settings.schema import Settings

URL = "hf://org/chat"
POOL = PoolSettings.model_validate(
    {"name": "chat", "aliases": ("talk",), "engine": "vllm", "model": URL}
)


def control() -> Any:
    return SimpleNamespace(
        metrics=lambda: b"# HELP up 1\n", ready=lambda: (True, "yes"), status=gateway_status
    )


@pytest.fixture
def cache(tmp_path: Path) -> FakeCache:
    return FakeCache(tmp_path / "cache")


@pytest.fixture
def served(cache: FakeCache, tmp_path: Path) -> Iterator[ServedAdmin]:
    models = replace(fake_models(cache), pools=lambda: (POOL,), allowed=("s3://models/llm",))
    with ServedAdmin(control(), models, state_dir=tmp_path) as one:
        yield one


# ── Who gets in ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda one: one.name)
def test_without_the_token_tcp_answers_health_and_metrics_only(
    served: ServedAdmin, cache: FakeCache, operation: Any
) -> None:
    path = operation.path.format(pool="chat", replica="chat-1")
    for headers in (
        {},
        {"authorization": "Bearer " + "x" * len(TOKEN)},
        {"authorization": f"Bearer {TOKEN}x"},
        {"authorization": f"Basic {TOKEN}"},
        {"authorization": TOKEN},
        {"authorization": "Bearer"},
        [("authorization", f"Bearer {TOKEN}"), ("authorization", f"Bearer {TOKEN}")],
    ):
        body = {"model": URL} if operation.request else None
        answer = httpx.request(
            operation.method, served.url + path, json=body, headers=headers, trust_env=False
        )
        if operation.name in OPEN:
            assert answer.status_code == 200
        else:
            assert answer.status_code == 401
            assert answer.json()["error"]["code"] == "unauthorized"
            assert answer.headers["www-authenticate"].startswith("Bearer")
    assert cache.calls == []


def test_a_listener_without_a_token_lets_nobody_in_over_tcp() -> None:
    with ServedAdmin(control(), token=None) as served:
        for headers in ({}, BEARER, {"authorization": "Bearer"}, {"authorization": "Bearer None"}):
            answer = httpx.get(f"{served.url}/status", headers=headers, trust_env=False)
            assert answer.status_code == 401
        for path in ("/metrics", "/healthz", "/readyz"):
            assert httpx.get(served.url + path, trust_env=False).status_code == 200


def test_the_token_and_the_socket_open_everything(served: ServedAdmin) -> None:
    assert served.http.get("/status").status_code == 200
    assert served.owner.get("/status").status_code == 200
    assert served.owner.get("/status", headers={"host": "any.name"}).status_code == 200


def test_a_foreign_name_is_refused_on_every_address(served: ServedAdmin) -> None:
    for bound in ("127.0.0.1", "0.0.0.0", "::", "10.1.2.3"):
        with ServedAdmin(control(), host=bound) as one:
            for host in ("evil.example", "localhost.evil.example", "[::1]evil", "a@127.0.0.1"):
                for path in ("/status", "/metrics"):
                    answer = one.http.get(path, headers={"host": host})
                    assert answer.status_code == 421, (bound, host, path)
            assert one.http.get("/status", headers={"host": "10.9.8.7:80"}).status_code == 200


# ── Which models ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("model", "let_in"),
    [
        (URL, True),
        ("org/chat", True),
        (f"{URL}@v2", True),
        ("chat", True),
        ("talk", True),
        ("s3://models/llm", True),
        ("s3://models/llm/big", True),
        ("prepared://abc", True),
        ("hf://org/chat-2", False),
        ("hf://org/chat/folder", False),
        ("s3://models/llm-2", False),
        ("s3://models", False),
        ("file:///etc", False),
        ("file:///var/lib/secrets", False),
        ("/etc", False),
        ("/", False),
        ("http://169.254.169.254/latest/meta-data/", False),
    ],
)
def test_over_tcp_only_models_that_the_settings_name(
    served: ServedAdmin, cache: FakeCache, model: str, let_in: bool
) -> None:
    for verb in VERBS:
        answer = served.http.post(f"/models/{verb}", json={"model": model})
        if let_in:
            assert answer.status_code not in {401, 403}, verb
        else:
            assert answer.status_code == 403, verb
            assert answer.json()["error"]["code"] == "model_not_allowed"
    if not let_in:
        assert cache.calls == []
        answer = served.owner.post("/models/pin", json={"model": model})
        assert answer.status_code not in {401, 403}, "the owner names any"


# ── The socket ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["state", "deep/" * 40])
def test_the_socket_is_the_owners_whatever_its_path_is_long(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The address of a Unix socket has room for 107 bytes; paths may be longer."""
    monkeypatch.delenv(client.TOKEN_VARIABLE, raising=False)
    state_dir = tmp_path / name
    state_dir.mkdir(parents=True)
    path = state_dir / SOCKET_NAMES[RECORD_NAME]
    path.write_text("left by one that was killed")
    umask = os.umask(0)
    try:
        with ServedAdmin(control(), state_dir=state_dir) as served:
            mode = path.stat().st_mode
            assert stat.S_ISSOCK(mode)
            assert stat.S_IMODE(mode) == 0o600
            starting = client.find_listener(None, lambda: Settings(state_dir=state_dir))
            assert (starting.url, starting.token) == (f"unix:{path}", ""), "before its record"
            leave_record(state_dir, Running(pid=os.getpid(), url="", admin_url=served.url))
            listener = client.find_listener(None, lambda: Settings(state_dir=state_dir))
            assert (listener.url, listener.token) == (f"unix:{path}", "")
            assert client.ask(listener, STATUS).root.version
            by_url = client.find_listener(served.url, lambda: Settings(state_dir=state_dir))
            assert by_url == listener, "its own address is its socket, too"
    finally:
        os.umask(umask)
    assert not path.exists()


def test_one_that_was_starting_is_asked_over_its_socket(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It listens on TCP before it has a socket, and answers there without a token 401."""
    monkeypatch.delenv(client.TOKEN_VARIABLE, raising=False)
    with ServedAdmin(control(), state_dir=tmp_path) as served:
        nowhere = {
            "state_dir": tmp_path / "none",
            "gateway": {"admin_port": int(served.url.rpartition(":")[2])},
        }
        listener = client.find_listener(None, lambda: Settings.model_validate(nowhere))
        with pytest.raises(client.RequestRefused, match="it wants its token"):
            client.ask(listener, STATUS)
        assert client.ask(replace(listener, state_dir=tmp_path), STATUS).root.version


# ── The token ─────────────────────────────────────────────────────────────────────────────────────


def settings(tmp_path: Path, **gateway: Any) -> Settings:
    return Settings.model_validate({"state_dir": tmp_path, "gateway": gateway})


def test_the_token_is_made_once_for_its_owner(tmp_path: Path) -> None:
    umask = os.umask(0)
    try:
        token = admin_token(settings(tmp_path))
    finally:
        os.umask(umask)
    path = tmp_path / "admin-token"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert token
    assert len(token) >= 32
    assert path.read_text().strip() == token == admin_token(settings(tmp_path))
    assert [one.name for one in tmp_path.iterdir()] == ["admin-token"]


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize(
    ("text", "mode", "owner"),
    [
        ("a token of seventeen", 0o600, None),
        ("short", 0o600, None),
        ("", 0o600, None),
        ("x" * 20, 0o644, None),
        ("x" * 20, 0o660, None),
        ("x" * 20, 0o602, None),
        ("x" * 20, 0o600, 12_345),
    ],
)
def test_a_token_that_others_may_know_is_none(
    tmp_path: Path, host: str, named: bool, text: str, mode: int, owner: int | None
) -> None:
    path = tmp_path / ("my-token" if named else "admin-token")
    path.write_text(text)
    path.chmod(mode)
    if owner is not None:
        if os.geteuid():
            pytest.skip("only root may give a file away")
        os.chown(path, owner, -1)
    given = settings(tmp_path, admin_host=host, admin_token_file=path if named else None)
    with pytest.raises(ConfigError) as error:
        admin_token(given)
    (problem,) = error.value.problems
    assert problem.field == "gateway.admin_token_file"
    assert "x" * 20 not in str(problem)


def test_a_group_may_be_given_a_token_file(tmp_path: Path) -> None:
    """As Kubernetes mounts a secret for a user who is not root."""
    path = tmp_path / "token"
    path.write_text("x" * 20 + "\n")
    path.chmod(0o440)
    assert admin_token(settings(tmp_path, admin_token_file=path)) == "x" * 20


def test_without_a_token_it_listens_on_loopback_at_most(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    nowhere = tmp_path / "is" / "not" / "there"  # as a disk that is full or read-only
    assert admin_token(settings(nowhere)) is None
    assert "health and metrics only" in caplog.text
    for host in ("0.0.0.0", "10.1.2.3", "gpu-1.lan"):
        with pytest.raises(ConfigError):
            admin_token(settings(nowhere, admin_host=host))
    with pytest.raises(ConfigError):
        admin_token(settings(tmp_path, admin_token_file=nowhere))


def test_the_command_line_shows_the_token_to_nobody_unasked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What listens at an address may be another user's: the token goes where the operator says."""
    monkeypatch.delenv(client.TOKEN_VARIABLE, raising=False)
    token = admin_token(settings(tmp_path))
    for url in ("http://127.0.0.1:8001", "http://gpu-1.lan:8001", None):
        assert client.find_listener(url, lambda: settings(tmp_path)).token == ""
    named = settings(tmp_path, admin_token_file=tmp_path / "admin-token")
    assert client.find_listener(url, lambda: named).token == token
    monkeypatch.setenv(client.TOKEN_VARIABLE, "from-the-environment")
    assert client.find_listener(url, lambda: named).token == "from-the-environment"


@pytest.mark.parametrize("token", ["a token with white space", "short", "tökentökentökentöken"])
def test_what_can_be_no_token_is_not_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, token: str
) -> None:
    monkeypatch.setenv(client.TOKEN_VARIABLE, token)
    with pytest.raises(typer.BadParameter) as error:
        client.find_listener("gpu-1.lan:8001", lambda: settings(tmp_path))
    assert client.TOKEN_VARIABLE in str(error.value)
    assert token not in str(error.value)


# ── What strangers cost ───────────────────────────────────────────────────────────────────────────


def connect(served: ServedAdmin, sent: bytes = b"") -> socket.socket:
    host, port = served.url.removeprefix("http://").split(":")
    made = socket.create_connection((host, int(port)), timeout=30)
    made.sendall(sent)
    return made


def test_idle_connections_keep_nobody_out(
    served: ServedAdmin, caplog: pytest.LogCaptureFixture
) -> None:
    idle = [connect(served, b"GET /metrics HTTP/1.1\r\nhost: " * (n % 2)) for n in range(400)]
    for path in ("/healthz", "/readyz", "/metrics"):
        assert httpx.get(served.url + path, trust_env=False).status_code == 200
    assert served.http.get("/status").status_code == 200
    assert served.owner.get("/status").status_code == 200
    kept = sum(not is_closed(one) for one in idle)
    assert kept <= server.MAX_CONNECTIONS_PER_ADDRESS < 200
    assert len(caplog.records) <= 1, "a line a minute"
    for one in idle:
        one.close()


def is_closed(one: socket.socket) -> bool:
    """Whatever was answered on it before."""
    one.setblocking(False)
    try:
        while one.recv(65_536):
            pass
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


@pytest.mark.parametrize(
    ("sent", "drop"),
    [(b"", b"\n"), (b"GET /healthz HTTP/1.1\r\n", b"x"), (b"GET /", b"a"), (b"G", b"")],
)
def test_a_head_that_does_not_come_is_given_up(
    served: ServedAdmin, monkeypatch: pytest.MonkeyPatch, sent: bytes, drop: bytes
) -> None:
    monkeypatch.setattr(server, "HEAD_TIMEOUT_S", 0.3)
    one = connect(served, sent)
    for _ in range(1_000):
        time.sleep(0.01)
        try:
            one.sendall(drop)  # it drips
        except OSError:
            break
        if is_closed(one):
            break
    assert is_closed(one)


@pytest.mark.parametrize(
    "begin", [b"GET /", b"GET / HTTP/1.1\r\nx: ", b"\r\n", b"GET / HTTP/1.1\r\n"]
)
def test_a_head_without_end_is_refused_whatever_it_is_of(
    served: ServedAdmin, monkeypatch: pytest.MonkeyPatch, begin: bytes
) -> None:
    monkeypatch.setattr(server, "HEAD_TIMEOUT_S", 600.0)
    with connect(served, begin) as one:
        one.settimeout(30)
        more = {b"\r\n": b"\r\n", b"GET / HTTP/1.1\r\n": b"a: b\r\n"}.get(begin, b"a")
        answer = b""
        try:
            for _ in range(3):
                one.sendall(more * (16_384 // len(more)))
                time.sleep(0.05)
            while read := one.recv(4_096):
                answer += read
        except ConnectionError:
            pass
        assert answer.startswith(b"HTTP/1.1 400") or not answer
        assert is_closed(one)


def test_a_connection_is_used_again_while_it_asks(
    served: ServedAdmin, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "HEAD_TIMEOUT_S", 3.0)
    with connect(served) as one:
        for _ in range(8):
            time.sleep(0.5)  # all of it takes longer, none of it does
            one.sendall(b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n\r\n")
            answer = b""
            while not answer.endswith(b"}"):
                more = one.recv(4_096)
                assert more, "it was closed"
                answer += more


def test_a_listener_that_can_take_no_connection_goes_on_later(
    served: ServedAdmin, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As where all file descriptors are used up."""
    accept, failures = socket.socket.accept, 3

    def fail(self: socket.socket) -> Any:
        nonlocal failures
        if failures:
            failures -= 1
            raise OSError(24, "Too many open files")
        return accept(self)

    monkeypatch.setattr(server, "_ACCEPT_PAUSE_S", 0.05)
    monkeypatch.setattr(socket.socket, "accept", fail)
    assert httpx.get(f"{served.url}/healthz", trust_env=False, timeout=30).status_code == 200
    assert failures == 0
    assert len(caplog.records) == 1


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
        b"GET / HTTP/1.1\r\n: x\r\n\r\n",
        b"GET /" + b"a" * 40_000,
        b"GET /healthz HTTP/1.1\r\nhost: localhost\r\nupgrade: websocket\r\n"
        b"connection: upgrade\r\n\r\n",
        b"POST /reload HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\nZZ\r\n",
        b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n\r\nnonsense\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nhost: localhost\r\ncontent-length: 9\r\n\r\n",
    ],
)
def test_what_strangers_send_writes_no_log(
    served: ServedAdmin, caplog: pytest.LogCaptureFixture, sent: bytes
) -> None:
    caplog.set_level(logging.WARNING)
    for _ in range(3):
        with connect(served, sent) as one:
            one.settimeout(0.3)
            try:
                while one.recv(4_096):
                    pass
            except OSError:
                pass
    assert served.http.get("/status").status_code == 200
    assert caplog.records == []


def test_slow_verbs_at_once_are_bounded_however_they_come(cache: FakeCache) -> None:
    """They are counted before anything is waited for."""
    most, asked = 4, 40
    cache.go.clear()
    before = set(threading.enumerate())
    with ServedAdmin(control(), fake_models(cache), max_slow=most) as served:
        body = json.dumps({"model": URL}).encode()
        head = (
            f"POST /models/preload HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {TOKEN}\r\n"
            f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        ).encode()
        asking = [connect(served) for _ in range(asked)]
        for one in asking:
            one.sendall(head + body)
        statuses = Counter(one.recv(4_096)[9:12] for one in asking)
        assert statuses == {b"200": most, b"429": asked - most}
        made = set(threading.enumerate()) - before
        assert sum(one.name.startswith("slow-verb") for one in made) == most
        assert served.http.get("/models").status_code == 200, "the others go on"
        for one in asking:
            one.close()
        cache.go.set()
