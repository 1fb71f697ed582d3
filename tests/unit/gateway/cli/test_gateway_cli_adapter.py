"""``tidegate adapter``: what it lists, and what it refuses with one line before it serves."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from admin_rig import TOKEN, ServedAdmin
from certificates import Authority
from signal_rig import signals, unknown

from gateway.admin.schema import SignalsAnswer
from gateway.cli.client import TOKEN_VARIABLE
from gateway.cli.main import main

POOLS = (signals(), unknown("new"))


@pytest.fixture
def admin(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(TOKEN_VARIABLE, TOKEN)
    answer = SignalsAnswer(version=1, at_s=0.0, pools=POOLS)
    with ServedAdmin(SimpleNamespace(signals=lambda: answer)) as served:
        yield served


def run(*arguments: str) -> int:
    return main(["adapter", *arguments])


def test_the_metrics_that_there_are(admin: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--list", "--tidegate", admin.url) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["METRIC", "LABELS", "VALUE"]
    assert ["tidegate_desired_replicas", "pool=chat", "3"] in lines
    assert ["tidegate_desired_replicas", "pool=new", "?"] in lines
    assert ["tidegate_ttft_seconds", "pool=chat,quantile=0.95", "0.5"] in lines
    assert ["tidegate_inflight_tokens", "pool=chat,replica=chat-2", "4000"] in lines


def test_the_same_for_scripts(admin: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--json", "--tidegate", admin.url) == 0
    found = json.loads(capsys.readouterr().out)["metrics"]
    ttft = [one for one in found if one["metric"] == "tidegate_ttft_seconds"]
    assert {"metric": "tidegate_ttft_seconds", "labels": {"pool": "chat", "quantile": "0.95"},
            "value": 0.5} in ttft  # fmt: skip
    assert {one["value"] for one in ttft if one["labels"]["pool"] == "new"} == {None}


def test_no_tidegate_to_list_is_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("--list", "--tidegate", "http://127.0.0.1:1") == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Files that settings may name, and a cluster that does not answer."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("KUBECONFIG", raising=False)
    authority = Authority(tmp_path, "ca")
    pair = authority.issue("adapter", hosts=("localhost",))
    other = authority.issue("other", hosts=("localhost",))
    text = tmp_path / "text"
    text.write_text("no certificate")
    cluster = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "c", "cluster": {"server": "http://127.0.0.1:1"}}],
        "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
        "users": [{"name": "u", "user": {}}],
        "current-context": "c",
    }
    (tmp_path / "kubeconfig").write_text(json.dumps(cluster))
    return {
        "CERT": str(pair.certificate), "KEY": str(pair.key), "TEXT": str(text),
        "OTHER": str(other.certificate),
        "CLUSTER": str(tmp_path / "kubeconfig"), "NONE": str(tmp_path / "none"),
    }  # fmt: skip


TLS = ("adapter.tls_certificate=CERT", "adapter.tls_key=KEY", "adapter.kubeconfig=CLUSTER")


@pytest.mark.parametrize(
    ("sets", "words"),
    [
        ((), ["adapter.tls_certificate", "missing"]),
        (("adapter.tls_certificate=CERT",), ["adapter", "tls_key"]),
        (("adapter.tls_certificate=NONE", "adapter.tls_key=KEY"), ["adapter.tls_cert", "none"]),
        (("adapter.tls_certificate=OTHER", *TLS[1:]), ["adapter.tls_certificate", "other"]),
        (("adapter.tls_certificate=TEXT", *TLS[1:]), ["adapter.tls_certificate", "text"]),
        ((*TLS, "adapter.front_proxy_ca=NONE"), ["adapter.front_proxy_ca", "none"]),
        ((*TLS, "adapter.front_proxy_ca=TEXT"), ["adapter.front_proxy_ca", "text"]),
        ((*TLS[:2], "adapter.kubeconfig=NONE"), ["cluster"]),
        ((*TLS, "adapter.front_proxy_names=['a']"), ["front_proxy_ca", "missing"]),
        (
            ("adapter.authorization=none", "adapter.metrics_host=0.0.0.0"),
            ["metrics_host", "0.0.0.0", "loopback"],
        ),
        (("adapter.apis=['v1']",), ["adapter.apis", "v1"]),
        (("adapter.apis=[]",), ["adapter", "apis", "empty"]),
        (("adapter.keda_port=8003",), ["keda_port", "8003"]),
        (("adapter.keda_client_ca=CERT",), ["keda_tls_certificate", "missing"]),
        (
            (
                "adapter.authorization=none", "adapter.keda_tls_certificate=NONE",
                "adapter.keda_tls_key=KEY", "adapter.metrics_port=0",
            ),
            ["adapter.keda_tls_certificate", "none"],
        ),
        (("adapter.stale_s=0",), ["adapter.stale_s", "0.5"]),
        (("adapter.refresh_s=10",), ["stale_s", "15", "refresh_s", "20"]),
        (("adapter.tidegate_url=ftp://x",), ["adapter.tidegate_url", "ftp"]),
    ],
)  # fmt: skip
def test_settings_that_cannot_be_used(
    sets: tuple[str, ...],
    words: list[str],
    files: dict[str, str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = []
    for one in sets:
        name, _, value = one.partition("=")
        given += ["-s", f"{name}={files.get(value, value)}"]
    assert run(*given) == 2
    lines = capsys.readouterr().err.splitlines()
    told = [line for line in lines if line.startswith("tidegate: ") and "warning" not in line]
    assert len(told) == 1, lines
    assert all(word in told[0] for word in words), told


@pytest.mark.parametrize("field", ["metrics", "keda"])
def test_a_port_that_is_taken(
    field: str, files: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        sets = ["-s", "adapter.metrics_port=0", "-s", "adapter.keda_port=0"]
        sets += ["-s", f"adapter.{field}_port={port}", "-s", "adapter.authorization=none"]
        assert run(*sets) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert f"adapter.{field}_port" in told
    assert str(port) in told
