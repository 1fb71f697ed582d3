"""What every engine promises. An engine's tests are a subclass, with a server of it that runs."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import TypeVar

import httpx
import pytest
from simulated_server import SimulatedServer

from loaders.engines.base import (
    START_PHASES,
    Engine,
    EngineCommand,
    EngineLoad,
    EngineOptions,
    Placement,
    ServedModel,
    engine_of,
)
from loaders.engines.client import EngineClient, EngineError, EngineUnsupported
from loaders.settings import LoaderSettings

T = TypeVar("T")
START_TIMEOUT_S = 400.0
CALL_TIMEOUT_S = 100.0
MODEL = "demo"
MAX_MODEL_LEN_TOKENS = 2048


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


@contextlib.contextmanager
def running(command: EngineCommand, url: str, log: Path) -> Iterator[str]:
    """A process that ``command`` starts, once it is healthy, in a group of its own."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            command.argv,
            env={**os.environ, **command.env},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        end_s = time.monotonic() + START_TIMEOUT_S
        while True:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{url}/health", trust_env=False, timeout=60).status_code == 200:
                    break
            assert process.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < end_s, log.read_text()[-3000:]
            time.sleep(0.1)
        yield url
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(30)


class EngineContract(ABC):
    """Inherited by the tests of each engine, which say how a server of it is started."""

    name: str
    model = MODEL
    settings = LoaderSettings()
    log: Path | None = None
    """What the server wrote while it started, where Tidegate starts it."""

    @pytest.fixture(scope="class")
    @classmethod
    @abstractmethod
    def url(cls) -> Iterator[str]:
        """The base URL of a running server."""

    @property
    def engine(self) -> Engine:
        return engine_of(self.name)

    @property
    def can_sleep_here(self) -> bool:
        """Whether this server was started so that the levels of its engine work."""
        return bool(self.engine.capabilities.sleep_levels)

    def ask(self, call: Callable[[EngineClient], Awaitable[T]]) -> T:
        async def story() -> T:
            client = EngineClient(timeout_s=60.0)
            try:
                return await call(client)
            finally:
                await client.close()

        return asyncio.run(story())

    def is_healthy(self, url: str, path: str = "/health") -> bool | None:
        return self.ask(lambda client: self.engine.health(client, url, {}, path)).ready

    def test_is_an_engine(self) -> None:
        assert isinstance(self.engine, Engine)
        assert self.engine.name == self.name

    def test_a_running_server_is_healthy_by_any_path(self, url: str) -> None:
        assert self.is_healthy(url) is True
        assert self.is_healthy(url, "/no/such/path") is True  # then /v1/models is asked

    def test_no_server_is_not_healthy_and_lists_nothing(self) -> None:
        nowhere = f"http://127.0.0.1:{free_port()}"
        assert self.is_healthy(nowhere) is False
        assert self.ask(lambda client: self.engine.list_models(client, nowhere, {})) is None

    def test_it_tells_its_models_and_their_limits(self, url: str) -> None:
        models = self.ask(lambda client: self.engine.list_models(client, url, {}))
        known = ServedModel(
            name=self.model, max_model_len_tokens=MAX_MODEL_LEN_TOKENS, stream_usage=True
        )
        assert models == (known,)  # all of them answer as vLLM does

    def test_it_tells_its_load(self, url: str) -> None:
        def load() -> EngineLoad:
            found = self.ask(lambda client: self.engine.load(client, url, {}))
            assert found is not None
            return found

        at_rest = load()
        assert (at_rest.running_requests, at_rest.waiting_requests) == (0, 0)
        assert at_rest.kv_cache_usage_fraction == 0
        assert at_rest.kv_cache_tokens is not None
        assert at_rest.kv_cache_tokens >= MAX_MODEL_LEN_TOKENS
        assert at_rest.preemptions == 0
        body = {"model": self.model, "prompt": "word " * 20, "max_tokens": 7, "ignore_eos": True}
        httpx.post(
            f"{url}/v1/completions", json=body, trust_env=False, timeout=60
        ).raise_for_status()
        end_s = time.monotonic() + 30  # vLLM counts beside its answers
        while (after := load()).generation_tokens == at_rest.generation_tokens:
            assert time.monotonic() < end_s
            time.sleep(0.05)
        assert after.generation_tokens is not None
        assert after.generation_tokens - (at_rest.generation_tokens or 0) == 7
        assert after.prompt_tokens is not None
        assert after.prompt_tokens - (at_rest.prompt_tokens or 0) >= 20
        assert after.prefix_cache_queries_tokens is not None
        assert after.prefix_cache_hits_tokens is not None

    def test_no_server_tells_no_load(self) -> None:
        nowhere = f"http://127.0.0.1:{free_port()}"
        assert self.ask(lambda client: self.engine.load(client, nowhere, {})) is None

    def test_it_sleeps_and_wakes_or_says_that_it_cannot(self, url: str) -> None:
        async def sleep_and_wake(client: EngineClient, level: int) -> None:
            await self.engine.sleep(client, url, level, timeout_s=CALL_TIMEOUT_S)
            assert await self.engine.is_sleeping(client, url) is True
            await self.engine.wake(client, url, level, timeout_s=CALL_TIMEOUT_S)
            assert await self.engine.is_sleeping(client, url) is False

        for level in sorted(self.engine.capabilities.sleep_levels) or [1]:
            if self.can_sleep_here:
                self.ask(lambda client, level=level: sleep_and_wake(client, level))  # type: ignore[misc]
            else:
                with pytest.raises(EngineError):
                    self.ask(lambda client, level=level: sleep_and_wake(client, level))  # type: ignore[misc]
            assert self.is_healthy(url) is True

    def test_its_start_phases_only_go_forward(self, url: str) -> None:
        lines = [] if self.log is None else self.log.read_text(errors="replace").splitlines()
        phases = [START_PHASES[0]]
        for line in lines:
            phases.append(self.engine.start_phase([line], phases[-1]))
        assert phases == sorted(phases, key=START_PHASES.index)
        last = START_PHASES[-1]
        assert {last} | {self.engine.start_phase([line], last) for line in lines} == {last}
        if lines:
            assert phases[-1] == START_PHASES[-1]


class StartedContract(EngineContract):
    """Of engines that Tidegate starts: the server is started by the engine's own command line."""

    options = EngineOptions(
        model=MODEL, served_model=MODEL, max_model_len_tokens=MAX_MODEL_LEN_TOKENS
    )

    @classmethod
    @contextlib.contextmanager
    def started(cls, folder: Path, options: EngineOptions) -> Iterator[str]:
        cls.log = folder / "log"
        placement = Placement(host="127.0.0.1", port=free_port())
        command = engine_of(cls.name).command(options, placement, cls.settings)
        with running(command, f"http://127.0.0.1:{placement.port}", folder / "log") as url:
            yield url

    def test_the_address_is_not_among_a_pools_arguments(self) -> None:
        assert list(self.engine.check(["--port", "1"])) != []
        assert list(self.engine.check(["--max-model-len", "9"])) == []

    def test_the_users_arguments_replace_those_of_tidegate(self) -> None:
        options = EngineOptions(
            model=MODEL, served_model=MODEL, args=("--max-model-len", "9"), max_model_len_tokens=5
        )
        placement = Placement(host="127.0.0.1", port=1)
        argv = self.engine.command(options, placement, self.settings).argv
        assert argv.count("--max-model-len") == 1
        assert argv[argv.index("--max-model-len") + 1] == "9"


class TestSimulatedEngine(StartedContract):
    name = "simulated"

    @pytest.fixture(scope="class")
    @classmethod
    def url(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:  # type: ignore[override]
        args = ("--startup-s", "0.1", "--sleep-s", "0", "0", "--wake-s", "0", "0")
        options = EngineOptions(
            model=MODEL,
            served_model=MODEL,
            args=args,
            max_model_len_tokens=MAX_MODEL_LEN_TOKENS,
        )
        with cls.started(tmp_path_factory.mktemp("simulated"), options) as url:
            yield url


class TestOpenAICompatibleEngine(EngineContract):
    name = "openai_compatible"

    @pytest.fixture(scope="class")
    @classmethod
    def url(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:  # type: ignore[override]
        folder = tmp_path_factory.mktemp("compatible")
        with SimulatedServer(folder, MODEL, "--max-model-len", MAX_MODEL_LEN_TOKENS) as server:
            yield server.url

    def test_it_is_not_started_here(self) -> None:
        options = EngineOptions(model=MODEL, served_model=MODEL)
        with pytest.raises(ValueError, match=self.name):
            self.engine.command(options, Placement(host="127.0.0.1", port=1), self.settings)

    def test_it_never_sleeps(self) -> None:
        client = EngineClient(timeout_s=1.0)
        for call in (self.engine.sleep, self.engine.wake):
            with pytest.raises(EngineUnsupported):
                asyncio.run(call(client, "http://127.0.0.1:1", 1, timeout_s=1.0))


@pytest.mark.vllm
@pytest.mark.timeout(600)
class TestVllmEngine(StartedContract):
    name = "vllm"
    on_gpu = False

    @pytest.fixture(scope="class")
    @classmethod
    def url(  # type: ignore[override]
        cls, engine_python: Path, model_dir: Path, tmp_path_factory: pytest.TempPathFactory
    ) -> Iterator[str]:
        cls.settings = LoaderSettings(engine_python=engine_python)
        options = EngineOptions(
            model=str(model_dir),
            served_model=MODEL,
            max_model_len_tokens=MAX_MODEL_LEN_TOKENS,
            sleep=True,
        )
        command = engine_of(cls.name).command(options, Placement(host="", port=1), cls.settings)
        cls.on_gpu = "--enable-sleep-mode" in command.argv
        with cls.started(tmp_path_factory.mktemp("vllm"), options) as url:
            yield url

    @property
    def can_sleep_here(self) -> bool:
        return self.on_gpu  # vLLM's CPU build has no sleep mode


def test_an_unknown_engine_is_named() -> None:
    with pytest.raises(ValueError, match="no engine 'other'"):
        engine_of("other")
