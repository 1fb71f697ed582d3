"""The admin application of a cache agent, and what keeps an agent from starting."""

from __future__ import annotations

import errno
from dataclasses import replace
from pathlib import Path

import pytest
from fake_cache import FakeCache, fake_models
from starlette.testclient import TestClient

from gateway import cli
from gateway.agent import _check_writable, banner, create_agent_app

TRAFFIC = {
    "store_bytes": 7,
    "peer_bytes": 5,
    "wasted_bytes": 0,
    "sent_bytes": 3,
    "retries": 2,
    "peer_failures": 1,
    "peers": [],
}


def client(where: str | None = "http://10.0.0.7:8002") -> TestClient:
    models = replace(fake_models(FakeCache(Path("/cache"))), traffic=lambda: TRAFFIC)
    app = create_agent_app(models, lambda: where)
    return TestClient(app, base_url="http://127.0.0.1")


def test_status_tells_where_and_what() -> None:
    told = client().get("/status").json()
    assert told["peer_url"] == "http://10.0.0.7:8002"
    assert told["traffic"] == TRAFFIC
    assert told["usage"]["bytes_used"] == 0


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
    assert cli.main(arguments) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1


def test_a_full_disk_does_not_keep_it_from_serving_what_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(**_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("tempfile.TemporaryFile", full)
    _check_writable(tmp_path, "modelcache.dir")
    assert f"modelcache.dir = {tmp_path}: No space left" in caplog.text


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
    assert cli.main(["agent", "--admin-port", "0", "--peer-port", "0", *words]) == 2
    err = capsys.readouterr().err
    assert f"{field} = {tmp_path / 'file' / 'in it'}: cannot be written to" in err
    assert err.count("\n") == 1
