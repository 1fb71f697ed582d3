"""The engine environment as it is: vLLM starts from our command line, answers, and goes cleanly."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from gateway.doctor.machine import Machine
from loaders.engines.base import EngineOptions, Placement, engine_of
from loaders.engines.vllm.engine import find_install, site_packages
from loaders.engines.vllm.tool_calls import FORMATS, has_parser
from loaders.settings import LoaderSettings
from modelcache.prepare.default_model import find_damage

START_TIMEOUT_S = 240.0
STOP_TIMEOUT_S = 90.0

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(START_TIMEOUT_S + 120)]


@dataclass(frozen=True)
class Engine:
    process: subprocess.Popen[bytes]
    url: str
    log: Path

    def ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        request = urllib.request.Request(
            self.url + path,
            data=None if body is None else json.dumps(body).encode(),
            headers={"content-type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.loads(answer.read() or b"null")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until_ready(engine: Engine) -> None:
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline_s:
        assert engine.process.poll() is None, engine.log.read_text()[-3000:]
        try:
            engine.ask("/health")
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.2)
        else:
            return
    pytest.fail(f"vLLM was not ready in {START_TIMEOUT_S} s:\n{engine.log.read_text()[-3000:]}")


@pytest.fixture(scope="module")
def engine(
    engine_python: Path, model_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Engine]:
    place = tmp_path_factory.mktemp("engine")
    port = free_port()
    options = EngineOptions(model=str(model_dir), served_model="small", max_model_len_tokens=2048)
    placement = Placement(host="127.0.0.1", port=port)
    settings = LoaderSettings(engine_python=engine_python)
    command = engine_of("vllm").command(options, placement, settings)
    log = place / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command.argv,
            env={**os.environ, **command.env},
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            cwd=place,
            start_new_session=True,
        )
    started = Engine(process=process, url=f"http://127.0.0.1:{port}", log=log)
    try:
        wait_until_ready(started)
        yield started
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def test_the_environment_is_what_it_says(engine_python: Path, model_dir: Path) -> None:
    install = find_install(engine_python)
    assert install is not None
    assert Machine(os.environ).engine_device(engine_python) == (install.device, "")
    assert find_damage(model_dir) == []


def test_our_own_packages_are_installed_beside_vllm(engine_python: Path, tmp_path: Path) -> None:
    code = (
        "import gateway.cli.main as o; o.assert_ours(); "
        "import loaders, modelcache.prepare.default_model"
    )
    subprocess.run([str(engine_python), "-I", "-c", code], cwd=tmp_path, check=True, timeout=200)


def test_it_serves_the_model_under_the_name_given(engine: Engine) -> None:
    models = engine.ask("/v1/models")["data"]
    assert [(model["id"], model["max_model_len"]) for model in models] == [("small", 2048)]


def test_it_answers_a_question(engine: Engine) -> None:
    question = {"role": "user", "content": "What is the capital of France?"}
    body = {"model": "small", "messages": [question], "max_tokens": 20, "temperature": 0}
    answer = engine.ask("/v1/chat/completions", body)
    assert "Paris" in answer["choices"][0]["message"]["content"]
    assert answer["usage"]["completion_tokens"] > 0


def test_its_log_is_quiet_about_requests(engine: Engine) -> None:
    for _ in range(3):
        engine.ask("/health")
    assert "GET /health" not in engine.log.read_text()


def test_sigterm_ends_its_whole_process_group(engine: Engine) -> None:
    """Last in this file: the engine is gone afterwards."""
    os.killpg(engine.process.pid, signal.SIGTERM)
    engine.process.wait(STOP_TIMEOUT_S)
    deadline_s = time.monotonic() + STOP_TIMEOUT_S
    while time.monotonic() < deadline_s:
        try:
            os.killpg(engine.process.pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.2)
    pytest.fail("processes of the engine outlived SIGTERM")


def test_every_parser_of_tool_calls_that_we_choose_is_in_this_vllm(engine_python: Path) -> None:
    sites = site_packages(engine_python)
    assert [name for name, _ in FORMATS if not has_parser(name, sites)] == []
