"""The process backend with a fork server: engines forked, parked, started plainly, none left."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import fake_vllm
import pytest
from process_fixtures import (
    after_the_loop,
    ask,
    is_alive,
    record_of,
    tiny_backend,
    wait_for_probe,
    wait_ready,
)

from autoscaler.backends.base import BackendError, ReplicaSpec, Unsupported
from autoscaler.backends.process import fork_server
from autoscaler.backends.process.backend import ProcessBackend
from autoscaler.backends.process.family import Family, StartedEngine
from autoscaler.backends.process.fork_server import ForkPlan
from autoscaler.backends.process.procs import carries, list_stats
from autoscaler.settings import PoolSettings
from loaders.engines.base import EngineCommand, Placement

PLAIN = "import sys; sys.path.insert(0, {!r}); import tiny_engine; sys.exit(tiny_engine.main())"


def pool(*engine_args: str, **fields: Any) -> PoolSettings:
    return PoolSettings.model_validate(
        {"name": "tiny", "engine": "vllm", "model": "tiny", "engine_args": engine_args, **fields}
    )


def replica(replica_id: str, *engine_args: str, **fields: Any) -> ReplicaSpec:
    made = pool(*engine_args, **fields)
    return ReplicaSpec(id=replica_id, pool=made, digest=made.model_dump_json())


def command(spec: ReplicaSpec, placement: Placement) -> EngineCommand:
    plain = PLAIN.format(str(Path(fake_vllm.__file__).parent))
    args = ("--port", str(placement.port), *spec.pool.engine_args)
    return EngineCommand(argv=(sys.executable, "-c", plain, *args), env={"TINY": "yes"})


def run(
    directory: Path,
    story: Callable[[ProcessBackend], Awaitable[None]],
    *,
    without: str = "",
    endless: bool = False,
    late: bool = False,
    after_loop: bool = False,
    **limits: Any,
) -> None:
    """Tell a story with a backend whose vLLM is the fake one, to import which may be ``endless``;
    all it started is gone after it. Where the server answers ``late``, it may be ended while it
    forks: then the fork ends too, but as a child of this process of which nothing is known, and
    stays a zombie until this process ends. ``after_loop``: a command takes until the event loop has
    done something else."""
    environ = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(fake_vllm.make(directory / "fake", without=without)),
        "FAKE_VLLM_READS": "as it was",
    }
    if endless:
        (directory / "fake/vllm/__init__.py").write_text("import time\ntime.sleep(600)\n")
    plan = ForkPlan(
        python=Path(sys.executable),
        env=environ,
        device="cpu",
        backoff_s=0.05,
        backoff_max_s=0.1,
        **limits,
    )

    async def tell() -> None:
        before = set(zombies())  # an earlier test's, if any
        make = after_the_loop(asyncio.get_running_loop(), command) if after_loop else command
        backend = tiny_backend(
            directory / "state", command=make, environ=lambda: environ, fork_plan=plan
        )
        await backend.adopt(())
        try:
            await story(backend)
        finally:
            await backend.close()
        assert late or set(zombies()) <= before
        assert list((directory / "state" / "replicas").glob("*.json")) == []

    asyncio.run(tell())


def zombies() -> list[int]:
    return [one.id.pid for one in list_stats() if one.parent == os.getpid() and one.gone]


async def until(wanted: Callable[[], object]) -> None:
    """Look until it is so; the test's own time limit bounds it."""
    for _ in range(2_000):
        if wanted():
            return
        await asyncio.sleep(0.02)
    raise AssertionError("it never came to that")


def wait_for_forks(backend: ProcessBackend, timeout_s: float) -> None:
    """How long a start waits from now on. Only where the server hangs may that be short: a fork
    takes its time on a busy machine."""
    assert backend._forks is not None
    backend._forks._plan = replace(backend._forks._plan, timeout_s=timeout_s)


def is_asked(backend: ProcessBackend) -> bool:
    """Whether the fork server has a question that it has not answered."""
    assert backend._forks is not None
    return backend._forks._server is not None and backend._forks._server._lock.locked()


def has_another(backend: ProcessBackend, pid: int | None) -> bool:
    """Whether a fork server is ready that is not the one with this pid."""
    now = backend.fork_server()
    return now is not None and now.state == "ready" and now.pid not in (None, pid)


async def pid_of(backend: ProcessBackend, replica_id: str) -> int:
    found = (await wait_ready(backend, replica_id)).pid
    assert found is not None
    return found


def is_forked(pid: int) -> bool:
    return b"forkserver" in Path(f"/proc/{pid}/cmdline").read_bytes()


def test_a_forked_engine_is_like_one_that_was_started(tmp_path: Path) -> None:
    async def story(backend: ProcessBackend) -> None:
        core = min(os.sched_getaffinity(0))
        await backend.start(replica("r-1", process={"cpus_per_replica": 1}, env={"OWN": "1"}))
        probe = await wait_ready(backend, "r-1")
        pid = await pid_of(backend, "r-1")
        assert is_forked(pid)
        stats = {one.id.pid: one for one in list_stats()}
        guard = stats[stats[pid].parent]
        assert (guard.parent, guard.session) == (os.getpid(), guard.id.pid)
        assert stats[pid].session == guard.id.pid
        facts = ask(f"{probe.url}/facts")
        assert facts["cpus"] == [core]
        assert facts["env"].items() >= {"OWN": "1", "TINY": "yes"}.items()
        path = record_of(tmp_path / "state", "r-1")
        for process in (guard.id, stats[pid].id):
            assert carries(process, f"TIDEGATE_REPLICA_MARK={path.stem}")
        assert json.loads(path.read_text())["leader"][0] == guard.id.pid
        server = backend.fork_server()
        assert server is not None
        assert (server.state, server.forked) == ("ready", 1)
        assert server.pss_bytes is not None
        assert server.pss_bytes > 1 << 20
        os.kill(pid, signal.SIGKILL)
        ended = await wait_for_probe(backend, "r-1", lambda one: one.alive is False)
        assert "SIGKILL" in ended.detail

    run(tmp_path, story)


def test_the_gate_of_a_forked_engine_opens_when_it_is_on_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    async def story(backend: ProcessBackend) -> None:
        write = backend._registry.write

        def spy(record: Any) -> None:
            if record.replica_id == "r-1":  # and not the fork server's, which may come first
                seen.append((tmp_path / "state/logs/tiny/r-1.log").read_text())
            write(record)

        monkeypatch.setattr(backend._registry, "write", spy)
        await backend.start(replica("r-1"))
        assert is_forked(await pid_of(backend, "r-1"))

    run(tmp_path, story)
    assert seen[0] == ""


def test_what_imports_have_read_must_be_the_same(tmp_path: Path) -> None:
    async def story(backend: ProcessBackend) -> None:
        await backend.start(replica("r-1", env={"FAKE_VLLM_READS": "otherwise"}))
        assert not is_forked(await pid_of(backend, "r-1"))
        await backend.start(replica("r-2", "--unwell", env={"OMP_NUM_THREADS": "3"}))
        probe = await wait_for_probe(backend, "r-2", lambda one: "503" in one.detail)
        assert "differs in OMP_NUM_THREADS" in probe.phase
        await backend.start(replica("r-3", env={"NOBODY_READS": "1", "CUDA_VISIBLE_DEVICES": "1"}))
        assert is_forked(await pid_of(backend, "r-3"))

    run(tmp_path, story)


def test_engines_outlive_a_fork_server_that_dies_and_the_next_one_forks(tmp_path: Path) -> None:
    async def story(backend: ProcessBackend) -> None:
        await backend.start(replica("r-1"))
        first = await pid_of(backend, "r-1")
        server = backend.fork_server()
        assert server is not None
        assert server.pid is not None
        os.kill(server.pid, signal.SIGKILL)
        await backend.start(replica("r-2"))  # forked by the next one, or started plainly
        await wait_ready(backend, "r-2")
        await until(lambda: has_another(backend, server.pid))
        await backend.start(replica("r-3"))
        assert is_forked(await pid_of(backend, "r-3"))
        assert is_alive(first)
        after = backend.fork_server()
        assert after is not None
        assert after.pid != server.pid
        assert after.crashes == 1

    run(tmp_path, story)


def test_a_fork_server_that_hangs_holds_up_no_start(tmp_path: Path) -> None:
    """It is asked, and says nothing: the start is a plain one, the next comes from a new server."""

    async def story(backend: ProcessBackend) -> None:
        await backend.start(replica("r-1"))
        first = await pid_of(backend, "r-1")
        server = backend.fork_server()
        assert server is not None
        assert server.pid is not None
        os.kill(server.pid, signal.SIGSTOP)
        wait_for_forks(backend, 0.5)
        # The second is asked while the first waits, and must not be given the first one's answer.
        await asyncio.gather(backend.start(replica("r-2")), backend.start(replica("r-3")))
        for replica_id in ("r-2", "r-3"):
            assert not is_forked(await pid_of(backend, replica_id))
        wait_for_forks(backend, 60.0)
        await until(lambda: not is_alive(server.pid or 0))
        await until(lambda: has_another(backend, server.pid))
        await backend.start(replica("r-4"))
        assert is_forked(await pid_of(backend, "r-4"))
        assert is_alive(first)

    run(tmp_path, story, timeout_s=60.0)


def test_a_start_that_is_called_off_does_not_wait_for_a_server_that_hangs(tmp_path: Path) -> None:
    async def story(backend: ProcessBackend) -> None:
        await backend.start(replica("r-1"))
        server = backend.fork_server()
        assert server is not None
        assert server.pid is not None
        os.kill(server.pid, signal.SIGSTOP)
        wait_for_forks(backend, 3.0)
        start = asyncio.create_task(backend.start(replica("r-2")))
        await until(lambda: is_asked(backend))
        start.cancel()
        with pytest.raises(asyncio.CancelledError):
            await start
        wait_for_forks(backend, 60.0)
        os.kill(server.pid, signal.SIGCONT)  # its answer comes late, and is nobody's
        await backend.start(replica("r-3"))
        await wait_ready(backend, "r-3")
        await backend.stop("r-1", grace_s=0.0)
        await backend.stop("r-3", grace_s=0.0)

    run(tmp_path, story, late=True, timeout_s=60.0)


def test_closing_while_a_fork_server_is_taken_down_leaves_no_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taking_down = asyncio.Event()
    end = fork_server.Family.end

    async def slow(self: fork_server.Family, **given: Any) -> None:
        taking_down.set()
        await asyncio.sleep(0.2)
        await end(self, **given)

    async def story(backend: ProcessBackend) -> None:
        await backend.start(replica("r-1"))
        await backend.stop("r-1", grace_s=0.0)
        server = backend.fork_server()
        assert server is not None
        assert server.pid is not None
        monkeypatch.setattr(fork_server.Family, "end", slow)
        os.kill(server.pid, signal.SIGKILL)
        await taking_down.wait()
        ending = backend.fork_server()
        assert ending is not None
        assert (ending.state, ending.crashes) == ("waiting", 1)  # and not ready any more

    run(tmp_path, story)


def test_imports_that_never_end_are_ended(tmp_path: Path) -> None:
    async def story(backend: ProcessBackend) -> None:
        await backend.start(replica("r-1"))
        assert not is_forked(await pid_of(backend, "r-1"))
        server = backend.fork_server()
        assert server is not None
        assert server.crashes >= 1 or server.state == "importing"
        await until(lambda: "within 0.01 s" in backend.fork_server().reason)  # type: ignore[union-attr]

    run(tmp_path, story, endless=True, import_timeout_s=0.01, wait_s=0.2)


def test_packages_that_have_changed_are_imported_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story(backend: ProcessBackend) -> None:
        await backend.start(replica("r-1"))
        assert is_forked(await pid_of(backend, "r-1"))
        before = backend.fork_server()
        monkeypatch.setattr(fork_server, "identity", lambda python: "another version")
        await backend.start(replica("r-2", "--unwell"))
        probe = await wait_for_probe(backend, "r-2", lambda one: "503" in one.detail)
        assert "packages have changed" in probe.phase
        await until(lambda: backend.fork_server().state == "ready")  # type: ignore[union-attr]
        assert before is not None
        assert backend.fork_server().pid != before.pid  # type: ignore[union-attr]

    run(tmp_path, story)


def test_where_nothing_can_be_forked_engines_start_plainly(tmp_path: Path) -> None:
    async def story(backend: ProcessBackend) -> None:
        await backend.start(replica("r-1"))
        assert not is_forked(await pid_of(backend, "r-1"))
        server = backend.fork_server()
        assert server is not None
        assert server.state == "unfit"
        assert "vllm.v1.engine.core" in server.reason
        with pytest.raises(Unsupported, match="unfit"):
            await backend.standby(replica("s-1"))

    run(tmp_path, story, without="vllm.v1.engine.core")


def test_a_standby_becomes_the_next_replica(tmp_path: Path) -> None:
    async def story(backend: ProcessBackend) -> None:
        await backend.standby(replica("s-1"))
        await until(lambda: [one for one in backend.standbys() if one.parked])
        (standby,) = backend.standbys()
        assert standby.pss_bytes > 0
        await backend.standby(replica("s-2"))  # it has one that would serve
        assert [one.pid for one in backend.standbys()] == [standby.pid]
        log = tmp_path / "state/logs/tiny"
        assert "loading weights" not in (log / "s-1.log").read_text()
        await backend.start(replica("r-1"))
        assert await pid_of(backend, "r-1") == standby.pid
        assert backend.standbys() == ()
        assert "loading weights" in (log / "r-1.log").read_text()
        assert record_of(tmp_path / "state", "r-1").exists()
        with pytest.raises(FileNotFoundError):
            record_of(tmp_path / "state", "s-1")
        await backend.stop("r-1", grace_s=5.0)
        assert not is_alive(standby.pid)

    run(tmp_path, story)


def test_a_standby_for_something_else_is_ended(tmp_path: Path) -> None:
    async def story(backend: ProcessBackend) -> None:
        await backend.standby(replica("s-1"))
        (first,) = backend.standbys()
        await backend.start(replica("r-1", "--model", "tiny"))
        assert await pid_of(backend, "r-1") != first.pid
        assert not is_alive(first.pid)
        await backend.standby(replica("s-2"))
        (second,) = backend.standbys()
        await backend.standby(replica("s-3", env={"OWN": "1"}))
        (third,) = backend.standbys()
        assert third.pid != second.pid
        await backend.end_standby("tiny")
        assert backend.standbys() == ()
        assert not is_alive(third.pid)

    run(tmp_path, story)


def test_the_event_loop_goes_on_while_a_standby_is_compared(tmp_path: Path) -> None:
    async def story(backend: ProcessBackend) -> None:
        await backend.standby(replica("s-1"))
        (standby,) = backend.standbys()
        await backend.standby(replica("s-2"))
        await backend.start(replica("r-1"))
        assert await pid_of(backend, "r-1") == standby.pid

    run(tmp_path, story, after_loop=True)


def test_a_standby_that_is_cancelled_while_a_replica_takes_it_is_ended_once(tmp_path: Path) -> None:
    async def story(backend: ProcessBackend) -> None:
        await until(lambda: backend.fork_server().state == "ready")  # type: ignore[union-attr]
        for number in range(40):
            standing = asyncio.create_task(backend.standby(replica(f"s-{number}")))
            await asyncio.sleep(number / 1_000)
            starting = asyncio.create_task(backend.start(replica(f"r-{number}")))
            for _ in range(number % 4):
                await asyncio.sleep(0.0)
            standing.cancel()
            await asyncio.wait({standing, starting})
            assert standing.cancelled() or standing.exception() is None
            assert starting.exception() is None
            assert (await backend.probe(f"r-{number}")).alive
            await backend.stop(f"r-{number}", grace_s=0.0)
            await backend.end_standby("tiny")
        assert backend.standbys() == ()

    run(tmp_path, story)


def test_stop_ends_the_family_of_a_forked_engine(tmp_path: Path) -> None:
    async def story(backend: ProcessBackend) -> None:
        await backend.start(replica("r-1", "--family", "--stubborn"))
        leader = await pid_of(backend, "r-1")
        family = {one.id.pid for one in list_stats() if one.parent == leader}
        assert len(family) == 2
        await backend.stop("r-1", grace_s=0.2)
        assert not any(map(is_alive, family | {leader}))

    run(tmp_path, story)


def test_a_start_that_is_called_off_leaves_nothing(tmp_path: Path) -> None:
    before = set(zombies())  # an earlier test's, if any

    async def story(backend: ProcessBackend) -> None:
        await until(lambda: backend.fork_server().state == "ready")  # type: ignore[union-attr]
        for pause_s in (0.0, 0.005, 0.02, 0.05):
            starting = asyncio.create_task(backend.start(replica("r-1")))
            await asyncio.sleep(pause_s)
            starting.cancel()
            await asyncio.wait({starting})
            if starting.cancelled():
                assert (await backend.probe("r-1")).alive is False
            else:
                await backend.stop("r-1", grace_s=0.0)
        await until(lambda: set(zombies()) <= before)
        await backend.start(replica("r-2"))
        assert is_forked(await pid_of(backend, "r-2"))
        with pytest.raises(BackendError, match="already"):
            await backend.start(replica("r-2"))

    run(tmp_path, story)


def test_a_forked_engine_outlives_tidegate_and_its_fork_server(tmp_path: Path) -> None:
    async def story(backend: ProcessBackend) -> None:
        await backend.start(replica("r-1", "--family"))
        pid = await pid_of(backend, "r-1")
        family = {one.id.pid for one in list_stats() if one.parent == pid}
        guard = next(one.parent for one in list_stats() if one.id.pid == pid)
        await backend.close(keep=True)
        other = tiny_backend(
            tmp_path / "state", command=command, environ=lambda: {"PATH": os.environ["PATH"]}
        )
        (adopted,) = await other.adopt([replica("any", "--family")])
        assert adopted.probe.pid == pid
        assert all(map(is_alive, family))
        await other.close()
        assert not any(map(is_alive, {pid, *family}))
        # Here only it is the child of the one that adopted its engine.
        await asyncio.to_thread(os.waitpid, guard, 0)

    run(tmp_path, story)


def test_a_start_that_is_cancelled_while_it_takes_the_standby_leaves_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = Family.rename

    def slowly(family: Family, replica_id: str, engine: StartedEngine) -> None:
        time.sleep(0.3)
        rename(family, replica_id, engine)

    async def story(backend: ProcessBackend) -> None:
        await backend.standby(replica("s-1"))
        (standby,) = backend.standbys()
        monkeypatch.setattr(Family, "rename", slowly)
        starting = asyncio.create_task(backend.start(replica("r-1")))
        await asyncio.sleep(0.1)
        starting.cancel()
        await asyncio.wait({starting})
        assert starting.cancelled()
        assert [one.pid for one in backend.standbys()] == [standby.pid]
        taking = asyncio.create_task(backend.start(replica("r-2")))
        await asyncio.sleep(0.1)
        await backend.end_standby("tiny")  # too late: it is a replica by then
        await taking
        assert await pid_of(backend, "r-2") == standby.pid
        assert backend.standbys() == ()

    run(tmp_path, story)
