"""The admin application of a cache agent, and what keeps an agent from starting."""

from __future__ import annotations

import errno
import os
import socket
from dataclasses import replace
from pathlib import Path

import pytest
from admin_rig import BEARER, TOKEN, ServedApp
from fake_cache import FakeCache, fake_models
from starlette.applications import Starlette
from starlette.testclient import TestClient

from gateway.admin import schema
from gateway.cli import main
from gateway.cli.tables import agent_status
from gateway.compose.agent import banner, create_agent_app
from gateway.compose.listeners import (
    AGENT_NAME,
    ClaimError,
    Running,
    admin_listeners,
    claim_for_agent,
    leave_record,
    read_record,
)
from gateway.compose.process import check_writable
from gateway.settings.load import ConfigError, load

TRAFFIC = {
    "store_bytes": 7,
    "peer_bytes": 5,
    "wasted_bytes": 0,
    "sent_bytes": 3,
    "retries": 2,
    "peer_failures": 1,
    "peers": [],
}


def agent_app(where: str | None = "http://10.0.0.7:8002") -> Starlette:
    models = replace(fake_models(FakeCache(Path("/cache"))), traffic=lambda: TRAFFIC)
    return create_agent_app(models, lambda: where, token=TOKEN)


def client(where: str | None = "http://10.0.0.7:8002") -> TestClient:
    return TestClient(agent_app(where), base_url="http://127.0.0.1", headers=BEARER)


def test_status_tells_where_and_what() -> None:
    told = client().get("/status").json()
    assert told["peer_url"] == "http://10.0.0.7:8002"
    assert told["kind"] == "agent"
    assert told["traffic"] == TRAFFIC
    assert told["usage"]["bytes_used"] == 0


PEERS = [
    {"url": "http://10.0.0.8:8002", "reached": True},
    {"url": "http://10.0.0.9:8002", "reached": False},
]


def test_status_of_an_agent_is_a_few_lines() -> None:
    told = client().get("/status").json()
    given = schema.AgentStatus.model_validate({**told, "traffic": {**TRAFFIC, "peers": PEERS}})
    text = agent_status(given, "http://127.0.0.1:8001")
    for said in (
        "a cache agent",
        "served at http://10.0.0.7:8002; 1 of 2 peers reached, not http://10.0.0.9:8002",
        "http://127.0.0.1:8001",
        "/cache: 0 B of 1.0 GB quota",
        "read 7 B from stores and 5 B from peers, sent 3 B",
    ):
        assert said in text
    alone = schema.AgentStatus.model_validate({**told, "peer_url": None})
    text = agent_status(alone, "http://127.0.0.1:8001")
    assert "not served yet; no peers are known" in text


def test_status_asks_the_agent_that_runs_here(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TIDEGATE_ADMIN_TOKEN", TOKEN)
    with ServedApp(agent_app()) as served:
        running = Running(pid=os.getpid(), url="http://a", admin_url=served.url)
        leave_record(tmp_path, running, AGENT_NAME)
        assert main.main(["status", "-s", f"state_dir={tmp_path}"]) == 0
    assert "a cache agent" in capsys.readouterr().out


@pytest.mark.parametrize("path", ["/pools/x/explain?limit=20", "/pools/a/b/explain"])
def test_it_says_that_it_has_no_pools(path: str) -> None:
    for answer in (client().get(path), client().post("/pools/x/scale", json={"replicas": 1})):
        assert answer.status_code == 404
        told = answer.json()["error"]
        assert told["message"] == "A cache agent runs here; it has no pools."
    assert client().post("/replicas/x-1/drain", json={}).status_code == 404


def test_metrics_are_those_of_the_cache() -> None:
    text = client().get("/metrics").text
    assert 'tidegate_cache_read_bytes_total{origin="store"} 7.0' in text
    assert 'tidegate_cache_read_bytes_total{origin="peers"} 5.0' in text
    assert "tidegate_cache_sent_bytes_total 3.0" in text
    assert 'tidegate_cache_bytes{kind="prepared"} 0.0' in text
    assert "tidegate_cache_quota_bytes 1e+09" in text
    assert "tidegate_arrivals_total" not in text


@pytest.mark.parametrize(("where", "status"), [("http://10.0.0.7:8002", 200), (None, 503)])
def test_ready_while_peers_are_served(where: str | None, status: int) -> None:
    assert client(where).get("/readyz").status_code == status
    assert client(where).get("/healthz").status_code == 200


def test_it_has_the_verbs_and_the_guard_of_the_admin_listener() -> None:
    app = client()
    index = app.get("/").json()["endpoints"]
    assert {"GET /models", "POST /models/preload", "GET /status"} <= set(index)
    assert app.get("/models").json()["models"] == []
    assert app.get("/models", headers={"host": "evil.example"}).status_code == 421
    assert app.post("/models/pin", content=b"{}").status_code == 415
    assert app.get("/none").json()["error"]["code"] == "route_not_found"


def test_banner_names_both_listeners() -> None:
    text = banner("http://10.0.0.7:8002", "http://127.0.0.1:8001", "/cache")
    assert all(one in text for one in ("http://10.0.0.7:8002", "http://127.0.0.1:8001", "/cache"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "set modelcache.peer_port"),
        (("--peer-port", "0"), "TIDEGATE_PEER_TOKEN"),
        (("-s", "modelcache.peer_port=no"), "modelcache.peer_port"),
    ],
)
def test_what_it_lacks_is_one_line(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    words: tuple[str, ...],
    said: str,
) -> None:
    monkeypatch.delenv("TIDEGATE_PEER_TOKEN", raising=False)
    monkeypatch.chdir(tmp_path)
    arguments = ["agent", "--admin-port", "0", "-s", f"state_dir={tmp_path}", *words]
    assert main.main(arguments) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1


def test_a_full_disk_does_not_keep_it_from_serving_what_is_there(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def full(directory: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    loaded = load(None, {})
    check_writable(loaded, "modelcache.dir", tmp_path, may_be_full=True, write=full)
    assert f"modelcache.dir = {tmp_path}: No space left" in caplog.text
    # A gateway writes down which engines are its own: it does not start.
    with pytest.raises(ConfigError, match="No space left on device"):
        check_writable(loaded, "state_dir", tmp_path, write=full)


@pytest.mark.parametrize("field", ["state_dir", "modelcache.dir"])
def test_a_directory_that_cannot_be_written_to_is_one_line(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    field: str,
) -> None:
    monkeypatch.setenv("TIDEGATE_PEER_TOKEN", "a secret for this very test")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    places = {"state_dir": tmp_path / "state", field: tmp_path / "file" / "in it"}
    words = [word for name, place in places.items() for word in ("-s", f"{name}={place}")]
    assert main.main(["agent", "--admin-port", "0", "--peer-port", "0", *words]) == 2
    err = capsys.readouterr().err
    assert f"{field} = {tmp_path / 'file' / 'in it'}: cannot be written to" in err
    assert err.count("\n") == 1


def test_a_state_directory_has_one_agent(tmp_path: Path) -> None:
    with (
        claim_for_agent(tmp_path),
        pytest.raises(ClaimError, match="belongs to another cache agent that is running"),
        claim_for_agent(tmp_path),
    ):
        pass
    with claim_for_agent(tmp_path):
        pass
    with pytest.raises(ClaimError, match="cannot be locked"), claim_for_agent(tmp_path / "none"):
        pass


def test_the_second_agent_of_a_state_directory_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TIDEGATE_PEER_TOKEN", "a secret for this very test")
    monkeypatch.chdir(tmp_path)
    first = Running(pid=os.getpid(), url="http://a", admin_url="http://b")
    leave_record(tmp_path, first, AGENT_NAME)
    with claim_for_agent(tmp_path):
        words = ["--admin-port", "0", "--peer-port", "0", "-s", f"state_dir={tmp_path}"]
        assert main.main(["agent", *words]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"tidegate: {tmp_path} belongs to another cache agent that is running; ")
    assert err.count("\n") == 1
    assert read_record(tmp_path, AGENT_NAME) == first


def test_one_in_another_container_is_known_by_its_socket(tmp_path: Path) -> None:
    """Its process number is of another namespace: here nobody has it."""
    pid = (1 << 22) + 1  # above the most that Linux gives
    leave_record(tmp_path, Running(pid=pid, url="http://a", admin_url="http://b"), AGENT_NAME)
    assert read_record(tmp_path, AGENT_NAME) is None
    with socket.create_server(("127.0.0.1", 0)) as tcp:
        with admin_listeners(tcp, tmp_path, AGENT_NAME):
            found = read_record(tmp_path, AGENT_NAME)
            assert found is not None
            assert found.admin_socket is not None
        assert read_record(tmp_path, AGENT_NAME) is None
