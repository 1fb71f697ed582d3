"""What every backend promises. A backend, the fake of the simulations included, is a subclass."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_engine
from fake_fleet import FakeBackend
from process_fixtures import SETTINGS, ask, tiny_backend, tiny_pool, wait_for_probe, wait_ready

from autoscaler.backends.base import Backend, BackendError, NoCapacity, ReplicaSpec
from autoscaler.backends.static import StaticBackend
from autoscaler.settings import PoolSettings, StaticPoolSettings

FOLDER = str(Path(tiny_engine.__file__).parent)


class BackendContract(ABC):
    """Inherited by the tests of each backend, which say how to make one."""

    can_adopt = True

    @abstractmethod
    def make(self, folder: Path) -> Backend:
        """The backend, with its state in this folder."""

    def make_next(self, folder: Path, before: Backend) -> Backend:
        """The backend of the next control process."""
        return self.make(folder)

    @abstractmethod
    def spec(self, replica_id: str) -> ReplicaSpec:
        """A replica that it can start."""

    @asynccontextmanager
    async def backend(self, folder: Path) -> AsyncIterator[Backend]:
        backend = self.make(folder)
        try:
            await backend.adopt(())
            yield backend
        finally:
            await backend.close()

    def test_is_a_backend(self, tmp_path: Path) -> None:
        assert isinstance(self.make(tmp_path), Backend)

    def test_first_adoption_finds_nothing(self, tmp_path: Path) -> None:
        async def story() -> None:
            async with self.backend(tmp_path) as backend:
                assert await backend.adopt(()) == []

        asyncio.run(story())

    def test_never_started_is_not_alive_and_stopping_it_is_nothing(self, tmp_path: Path) -> None:
        async def story() -> None:
            async with self.backend(tmp_path) as backend:
                probe = await backend.probe("nobody")
                assert probe.alive is False
                assert probe.ready is False
                assert probe.detail
                await backend.stop("nobody", grace_s=1.0)

        asyncio.run(story())

    def test_started_becomes_ready_and_tells_its_address(self, tmp_path: Path) -> None:
        async def story() -> None:
            async with self.backend(tmp_path) as backend:
                await backend.start(self.spec("r-1"))
                probe = await wait_ready(backend, "r-1")
                assert probe.alive is True
                assert probe.url is not None
                assert probe.url.startswith("http://127.0.0.1:")
                assert probe.served_model == "tiny"
                assert probe.max_model_len_tokens == 2048

        asyncio.run(story())

    def test_a_second_start_of_the_same_replica_is_refused(self, tmp_path: Path) -> None:
        async def story() -> None:
            async with self.backend(tmp_path) as backend:
                await backend.start(self.spec("r-1"))
                with pytest.raises(BackendError):
                    await backend.start(self.spec("r-1"))
                assert (await wait_ready(backend, "r-1")).alive is True

        asyncio.run(story())

    def test_stop_ends_it_and_may_be_repeated(self, tmp_path: Path) -> None:
        async def story() -> None:
            async with self.backend(tmp_path) as backend:
                await backend.start(self.spec("r-1"))
                await wait_ready(backend, "r-1")
                await backend.stop("r-1", grace_s=5.0)
                assert (await backend.probe("r-1")).alive is False
                await backend.stop("r-1", grace_s=5.0)

        asyncio.run(story())

    def test_stopped_at_once_after_its_start(self, tmp_path: Path) -> None:
        async def story() -> None:
            async with self.backend(tmp_path) as backend:
                await backend.start(self.spec("r-1"))
                await backend.stop("r-1", grace_s=0.0)
                assert (await backend.probe("r-1")).alive is False

        asyncio.run(story())

    def test_replicas_are_apart(self, tmp_path: Path) -> None:
        async def story() -> None:
            async with self.backend(tmp_path) as backend:
                for name in ("r-1", "r-2"):
                    await backend.start(self.spec(name))
                await wait_ready(backend, "r-1")
                await wait_ready(backend, "r-2")
                await backend.stop("r-1", grace_s=5.0)
                assert (await backend.probe("r-2")).ready is True

        asyncio.run(story())

    @pytest.mark.parametrize("wanted", [True, False])
    def test_what_is_kept_is_adopted_if_it_is_still_wanted(
        self, tmp_path: Path, wanted: bool
    ) -> None:
        async def story() -> None:
            spec = replace(self.spec("r-1"), digest="d")
            first = self.make(tmp_path)
            await first.adopt([spec])
            await first.start(spec)
            before = await wait_ready(first, "r-1")
            await first.close(keep=True)
            second = self.make_next(tmp_path, first)
            adopted = await second.adopt([replace(spec, id="tiny")] if wanted else [])
            assert [one.spec.id for one in adopted] == (
                ["r-1"] if wanted and self.can_adopt else []
            )
            for one in adopted:
                assert (one.probe.url, one.probe.pid) == (before.url, before.pid)
                assert one.probe.served_model == "tiny"
                with pytest.raises(BackendError):
                    await second.start(spec)
                await second.stop("r-1", grace_s=5.0)
            assert (await second.probe("r-1")).alive is False
            await second.close()
            if self.can_adopt:  # what is not wanted, and what was stopped, is not left running
                with pytest.raises(OSError):
                    await asyncio.to_thread(ask, f"{before.url}/health")

        asyncio.run(story())

    def test_close_ends_all_and_may_be_repeated(self, tmp_path: Path) -> None:
        async def story() -> None:
            async with self.backend(tmp_path) as backend:
                await backend.start(self.spec("r-1"))
                await wait_ready(backend, "r-1")
                await backend.close()
                assert (await backend.probe("r-1")).alive is False
                await backend.close()

        asyncio.run(story())


class TestFakeBackend(BackendContract):
    def make(self, folder: Path) -> Backend:
        return FakeBackend(clock=time.monotonic, start_s=0.1)

    def make_next(self, folder: Path, before: Backend) -> Backend:
        assert isinstance(before, FakeBackend)
        return FakeBackend(clock=time.monotonic, start_s=0.1, engines=before.engines)

    def spec(self, replica_id: str) -> ReplicaSpec:
        return ReplicaSpec(id=replica_id, pool=tiny_pool())

    def test_says_when_there_is_no_room(self, tmp_path: Path) -> None:
        async def story() -> None:
            backend = FakeBackend(clock=time.monotonic, room=1)
            await backend.start(self.spec("r-1"))
            with pytest.raises(NoCapacity):
                await backend.start(self.spec("r-2"))

        asyncio.run(story())


class TestProcessBackend(BackendContract):
    def make(self, folder: Path) -> Backend:
        return tiny_backend(folder)

    def spec(self, replica_id: str) -> ReplicaSpec:
        return ReplicaSpec(id=replica_id, pool=tiny_pool())


def static_pool(url: str) -> PoolSettings:
    static = StaticPoolSettings(urls=(url,))
    return PoolSettings(name="tiny", backend="static", static=static)


class TestStaticBackend(BackendContract):
    can_adopt = False
    url = ""

    @pytest.fixture(autouse=True)
    def _server(self) -> Iterator[None]:
        server = subprocess.Popen(
            [
                sys.executable,
                "-u",
                "-c",
                SERVER.format(folder=str(Path(tiny_engine.__file__).parent)),
            ],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert server.stdout is not None
        type(self).url = f"http://127.0.0.1:{int(server.stdout.readline())}"
        yield
        server.kill()
        server.wait()
        server.stdout.close()

    def make(self, folder: Path) -> Backend:
        return StaticBackend(settings=SETTINGS)

    def spec(self, replica_id: str) -> ReplicaSpec:
        pool = static_pool(self.url)
        return ReplicaSpec(id=replica_id, pool=pool, url=self.url)

    def test_stop_leaves_the_server_alone(self, tmp_path: Path) -> None:
        async def story() -> None:
            async with self.backend(tmp_path) as backend:
                await backend.start(self.spec("r-1"))
                await wait_ready(backend, "r-1")
                await backend.stop("r-1", grace_s=0.0)
            assert ask(f"{self.url}/facts")["pid"] > 0

        asyncio.run(story())

    def test_a_server_that_is_down_is_not_ready(self, tmp_path: Path) -> None:
        async def story() -> None:
            async with self.backend(tmp_path) as backend:
                pool = static_pool("http://127.0.0.1:1")
                spec = ReplicaSpec(id="r-1", pool=pool, url="http://127.0.0.1:1")
                await backend.start(spec)
                probe = await wait_for_probe(backend, "r-1", lambda one: one.ready is False)
                assert probe.url == "http://127.0.0.1:1"
                assert "/health" in probe.detail

        asyncio.run(story())


SERVER = """
import argparse, socket, sys
sys.path.insert(0, {folder!r})
import tiny_engine
with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    port = probe.getsockname()[1]
print(port)
sys.argv = ["tiny_engine", "--port", str(port)]
tiny_engine.main()
"""
