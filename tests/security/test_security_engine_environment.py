"""An engine's environment has what is its own, and nothing of ours, of stores, or of others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from asking import ask_now, chat, text_of
from tidegate_process import simulated, up

from autoscaler.backends.base import ReplicaSpec
from autoscaler.backends.process.replica import make_env
from gateway.compose.process import child_environ
from gateway.doctor.report import run_doctor
from gateway.settings.load import find_service_links, load
from gateway.settings.schema import Settings
from loaders.engines.base import EngineCommand, Placement

LINKS = {
    f"{service}{name}": value
    for service in ("VLLM", "TIDEGATE", "TIDEGATE__GATEWAY", "MY_OWN")
    for name, value in {
        "_SERVICE_HOST": "10.0.0.1",
        "_SERVICE_PORT": "8000",
        "_SERVICE_PORT_HTTP": "8000",
        "_PORT": "tcp://10.0.0.1:8000",
        "_PORT_8000_TCP": "tcp://10.0.0.1:8000",
        "_PORT_8000_TCP_PROTO": "tcp",
        "_PORT_8000_TCP_PORT": "8000",
        "_PORT_8000_TCP_ADDR": "10.0.0.1",
    }.items()
}
OURS = {
    "TIDEGATE_PEER_TOKEN": "x",
    "TIDEGATE__GATEWAY__PORT": "1",
    "PEERS": "x",
    "OTHER_POOLS_KEY": "x",
}
STORES = {
    **dict.fromkeys(("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH"), "x"),
    **dict.fromkeys(("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"), "x"),
    **dict.fromkeys(("AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_SHARED_CREDENTIALS_FILE"), "x"),
    **dict.fromkeys(("OSS_ACCESS_KEY_ID", "OSS_ACCESS_KEY_SECRET", "OSS_SESSION_TOKEN"), "x"),
    **dict.fromkeys(("ALIBABA_CLOUD_ACCESS_KEY_SECRET", "GOOGLE_APPLICATION_CREDENTIALS"), "x"),
}
KEPT = {
    **dict.fromkeys(("PATH", "HOME", "HF_HOME", "AWS_REGION", "VLLM_USE_V1"), "x"),
    # What looks like a service and is none.
    **dict.fromkeys(("MASTER_PORT", "VLLM_PORT", "FOO_PORT_1_TCP_PORT"), "29500"),
}


def environment(model: str | None, engine: str = "vllm", **pool: Any) -> dict[str, str]:
    settings = Settings.model_validate(
        {
            "modelcache": {"peer_token_env": "PEERS"},
            "pools": [
                {"name": "m", "engine": engine, "model": model, **pool},
                {
                    "name": "other",
                    "backend": "static",
                    "static": {"urls": ["http://127.0.0.1:1"], "api_key_env": "OTHER_POOLS_KEY"},
                },
            ],
        }
    )
    environ = child_environ(settings, {**LINKS, **OURS, **STORES, **KEPT})
    spec = ReplicaSpec(id="m-1", pool=settings.pools[0])
    placement = Placement(host="127.0.0.1", port=1)
    return make_env(environ, EngineCommand(argv=("x",)), spec, placement)


@pytest.mark.parametrize("engine", ["vllm", "simulated"])
def test_it_has_nothing_that_is_not_its_own(tmp_path: Path, engine: str) -> None:
    env = environment(str(tmp_path), engine)
    assert not {*env} & ({*LINKS} - {"VLLM_PORT"} | {*OURS} | {*STORES})
    assert KEPT.items() <= env.items()
    assert {*env} == {*KEPT, "SPT_NOENV"}


def test_it_has_what_its_pool_gives_it(tmp_path: Path) -> None:
    given = {"HF_TOKEN": "own", "VLLM_PORT": "1", "OTHER_POOLS_KEY": "own"}
    env = environment(str(tmp_path), env=given)
    assert given.items() <= env.items()


def test_an_engine_that_fetches_its_model_has_the_credentials_for_that() -> None:
    env = environment("org/name")
    assert STORES.items() <= env.items()
    assert not {*env} & {*OURS}


def test_services_of_the_namespace_are_no_settings() -> None:
    assert find_service_links({**LINKS, **KEPT, "VLLM_PORT": "tcp://10.0.0.1:80"}) == {*LINKS}
    loaded = load(None, LINKS, ())
    assert not [one for one in loaded.warnings if "environment" in one.origin]
    assert loaded.settings.gateway.port == Settings().gateway.port


def test_what_doctor_starts_to_try_the_engine_has_it_neither(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, python = tmp_path / "seen", tmp_path / "bin" / "python"
    (tmp_path / "lib/python3.11/site-packages/vllm-0.11.0+cpu.dist-info").mkdir(parents=True)
    python.parent.mkdir()
    python.write_text(f"#!/bin/sh\nenv > {seen}\necho device cpu\n")
    python.chmod(0o755)
    for name, value in {**LINKS, **OURS}.items():
        monkeypatch.setenv(name, value)
    settings = {
        "state_dir": tmp_path / "state",
        "loaders": {"engine_python": python},
        "modelcache": {"peer_token_env": "PEERS"},
        "pools": [
            {"name": "m", "engine": "vllm", "model": "org/name"},
            {
                "name": "other",
                "backend": "static",
                "static": {"urls": ["http://127.0.0.1:1"], "api_key_env": "OTHER_POOLS_KEY"},
            },
        ],
    }
    run_doctor(Settings.model_validate(settings), measure=False)
    names = {line.partition("=")[0] for line in seen.read_text().splitlines()}
    assert "PATH" in names
    assert not names & {*LINKS, *OURS}


def test_a_tidegate_among_services_runs(tmp_path: Path) -> None:
    secrets = {"TIDEGATE_PEER_TOKEN": "a secret for this very test", "HF_TOKEN": "x"}
    with up(tmp_path, pools=[simulated("one")], environ={**LINKS, **secrets}) as tidegate:
        text_of(ask_now(tidegate, chat("one")))
        (pid,) = (one["pid"] for one in tidegate.pool("one")["replicas"])
        given = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        names = {one.partition(b"=")[0].decode() for one in given}
        assert not names & {*LINKS, *secrets}
