"""What listens on an engine's port is that engine, or nothing is sent to it."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from process_fixtures import SETTINGS, tiny_backend, tiny_pool, wait_for_probe, wait_ready

from autoscaler.backends.base import ReplicaSpec
from autoscaler.backends.process.placement import reserve_port
from loaders.engines.base import EngineCommand, Placement

HOST = "127.0.0.1"
NOBODY = 65_534
OPTIONS = [(), (socket.SO_REUSEADDR,), (socket.SO_REUSEPORT,)]
BIND = """
import os, socket, sys
uid, host, port, *options = sys.argv[1:]
if uid:
    os.setuid(int(uid))
bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
if ":" in host:
    bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
for option in options:
    bound.setsockopt(socket.SOL_SOCKET, int(option), 1)
try:
    bound.bind((host, int(port)))
except OSError as error:
    sys.exit(error.errno)
"""


def spec(pool_args: tuple[str, ...] = ()) -> ReplicaSpec:
    return ReplicaSpec(id="r-1", pool=tiny_pool(*pool_args), digest="d")


def binds(port: int, *options: int, host: str = HOST, uid: int | None = None) -> bool:
    """Whether another process, of this user or of ``uid``, can bind a port."""
    words = ["" if uid is None else str(uid), host, str(port), *map(str, options)]
    done = subprocess.run([sys.executable, "-I", "-c", BIND, *words], check=False)
    assert done.returncode in (0, errno.EADDRINUSE)
    return done.returncode == 0


@contextmanager
def spy(port: int) -> Iterator[socket.socket]:
    """A process of our own user that shares a port, as the most it could do."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind((HOST, port))
        listener.listen()
        listener.setblocking(False)
        yield listener


def test_a_reserved_port_is_shared_with_those_who_ask_to_and_refuses_connections() -> None:
    with closing(reserve_port()) as held:
        port = held.getsockname()[1]
        assert not binds(port)
        assert not binds(port, socket.SO_REUSEADDR)
        assert not binds(port, socket.SO_REUSEADDR, host="0.0.0.0")
        assert binds(port, socket.SO_REUSEPORT)
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((HOST, port))
        with closing(reserve_port(port)):  # the next control process, while this one goes
            assert not binds(port)


if os.geteuid() == 0:

    @pytest.mark.parametrize("options", [*OPTIONS, (*OPTIONS[1], *OPTIONS[2])])
    @pytest.mark.parametrize("host", [HOST, "0.0.0.0", "::"])
    def test_another_user_cannot_bind_a_reserved_port(options: tuple[int, ...], host: str) -> None:
        with closing(reserve_port()) as held:
            assert not binds(held.getsockname()[1], *options, host=host, uid=NOBODY)


def test_nothing_is_sent_to_another_process_on_the_port_of_a_starting_engine(
    tmp_path: Path,
) -> None:
    """Not even a health check."""

    def slow(spec: ReplicaSpec, placement: Placement) -> EngineCommand:
        return EngineCommand(argv=("sleep", "600", str(placement.port)))

    async def story() -> None:
        backend = tiny_backend(tmp_path, command=slow)
        await backend.start(spec())
        url = (await backend.probe("r-1")).url
        assert url is not None
        with spy(int(url.rpartition(":")[2])) as listener:
            for _ in range(5):
                probe = await backend.probe("r-1")
                assert (probe.alive, probe.ready) == (True, False)
                assert "another process" in probe.detail
            with pytest.raises(BlockingIOError):
                listener.accept()
        await backend.close()

    asyncio.run(story())


def test_the_port_of_an_engine_that_died_stays_ours(tmp_path: Path) -> None:
    """Workers may try it again before they hear of its end."""

    async def story() -> None:
        backend = tiny_backend(tmp_path)
        await backend.start(spec())
        probe = await wait_ready(backend, "r-1")
        assert probe.pid is not None
        assert probe.url is not None
        port = int(probe.url.rpartition(":")[2])
        os.kill(probe.pid, signal.SIGKILL)
        await wait_for_probe(backend, "r-1", lambda seen: seen.alive is False)
        for _ in range(2):
            assert not binds(port, socket.SO_REUSEADDR)
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection((HOST, port))
            await backend.stop("r-1", grace_s=0.0)
        await backend.close()
        assert binds(port, socket.SO_REUSEADDR)

    asyncio.run(story())


@pytest.mark.parametrize("taken", [True, False])
def test_an_engine_on_record_is_adopted_on_a_port_of_its_own_only(
    tmp_path: Path, taken: bool
) -> None:
    """Its guard lives, and somebody else answers where it is on record."""

    async def story() -> None:
        first = tiny_backend(tmp_path)
        await first.start(spec())
        probe = await wait_ready(first, "r-1")
        assert probe.url is not None
        await first.close(keep=True)
        with closing(socket.socket()) as other:
            other.bind((HOST, 0))
            other.listen()
            port = str(other.getsockname()[1])
            if taken:
                for record in (tmp_path / "replicas").glob("*.json"):
                    record.write_text(record.read_text().replace(probe.url[-5:], port))
            second = tiny_backend(tmp_path)
            adopted = await second.adopt([replace(spec(), id="tiny")])
            assert len(adopted) == (0 if taken else 1)
            other.setblocking(False)
            with pytest.raises(BlockingIOError):
                other.accept()
            await second.close()

    asyncio.run(story())


def test_an_engine_that_is_too_busy_to_answer_is_adopted_as_unhealthy(tmp_path: Path) -> None:
    async def story() -> None:
        first = tiny_backend(tmp_path)
        await first.start(spec())
        pid = (await wait_ready(first, "r-1")).pid
        assert pid is not None
        await first.close(keep=True)
        os.kill(pid, signal.SIGSTOP)
        settings = SETTINGS.model_copy(update={"health_timeout_s": 0.5})
        second = tiny_backend(tmp_path, settings=settings)
        (adopted,) = await second.adopt([replace(spec(), id="tiny")])
        assert (adopted.probe.alive, adopted.probe.ready) == (True, False)
        os.kill(pid, signal.SIGCONT)
        await wait_ready(second, "r-1")
        await second.close()

    asyncio.run(story())
