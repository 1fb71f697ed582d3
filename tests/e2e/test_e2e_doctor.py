"""``tidegate doctor`` on the machine that the tests run on, with the real engine."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tidegate_process import MARK, marked

from gateway.doctor.machine import Machine

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(400)]


def test_it_says_what_forking_and_reading_take_here(
    engine_python: Path, model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark = f"doctor-{secrets.token_hex(8)}"  # another run may be going on beside this one
    monkeypatch.setenv(MARK, mark)
    pool = {"name": "small", "engine": "vllm", "model": str(model_dir)}
    config = tmp_path / "tidegate.toml"
    lines = [f"{name} = {json.dumps(value)}" for name, value in pool.items()]
    config.write_text(
        f"state_dir = {json.dumps(str(tmp_path / 'state'))}\n"
        "[gateway]\nport = 0\nadmin_port = 0\n"
        "[modelcache]\nreserve_bytes = 0\n"  # however full this disk is
        f"[loaders]\nengine_python = {json.dumps(str(engine_python))}\n"
        "[[pools]]\n" + "\n".join(lines) + "\n"
    )
    command = Path(sys.executable).parent / "tidegate"
    done = subprocess.run(
        [command, "doctor", "--json", "--config", config],
        capture_output=True,
        text=True,
        timeout=390,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    assert "can be forked" in found["fork server"]["finding"], found["fork server"]
    said = found["load format"]["finding"]
    for name in ("tidegate", "safetensors"):
        assert f"{name} " in said
    assert "/s from disk" in said
    assert "/s from the page cache" in said
    assert found["model cache"]["status"] == "ok"
    deadline_s = time.monotonic() + 30
    while left := marked(mark):
        assert time.monotonic() < deadline_s, f"nothing it started stays: {left}"
        time.sleep(0.05)
    assert not (tmp_path / "state").exists(), "it changes nothing"


def test_formats_that_are_not_installed_are_said_so(engine_python: Path, model_dir: Path) -> None:
    speeds = Machine(os.environ).speeds(engine_python, sorted(model_dir.glob("*.safetensors")))
    assert not isinstance(speeds, str), speeds
    by_name = {one.format: one for one in speeds}
    for name in ("tidegate", "safetensors"):
        assert (by_name[name].warm_bytes_s or 0) > 1e6, by_name[name]
        assert (by_name[name].cold_bytes_s or 0) > 1e6, by_name[name]
    assert by_name["instanttensor"].problem == "not installed"
