"""The process backend with real processes: what it gives them, and that none outlives its care."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from process_fixtures import (
    SETTINGS,
    after_the_loop,
    ask,
    children_of,
    is_alive,
    record_of,
    tiny_backend,
    tiny_command,
    tiny_pool,
    wait_for_probe,
    wait_ready,
)

from autoscaler.backends.base import (
    BackendError,
    NoCapacity,
    ReplicaSpec,
    StateInUse,
    StillRunning,
)
from autoscaler.backends.process import guard, procs
from autoscaler.backends.process.family import ProcessRecord, ProcessRegistry
from autoscaler.settings import AutoscalerSettings
from autoscaler.types import GpuCapacity
from loaders.engines.base import EngineCommand

FOLDERS = [str(Path(__file__).parents[1] / "support"), str(Path(__file__).parents[2])]

OWNER = f"""
import asyncio, json, sys
sys.path[:0] = {FOLDERS!r}
from pathlib import Path
from process_fixtures import record_of, tiny_backend, tiny_pool, wait_ready
from autoscaler.backends.base import ReplicaSpec

async def main():
    backend = tiny_backend(Path(sys.argv[1]))
    await backend.adopt(())
    for number, extra in enumerate(sys.argv[2:]):
        pool = tiny_pool(*extra.split())
        await backend.start(ReplicaSpec(id=f"r-{{number}}", pool=pool, digest=extra or "none"))
        print((await wait_ready(backend, f"r-{{number}}")).pid, flush=True)
    for number, extra in enumerate(sys.argv[2:]):  # The keeper records who joins the family.
        record = record_of(Path(sys.argv[1]), f"r-{{number}}")
        while len(json.loads(record.read_text())["members"]) < (4 if "--family" in extra else 2):
            await asyncio.sleep(0.05)
    print("kept", flush=True)
    await asyncio.sleep(600)

asyncio.run(main())
"""


def spec(*engine_args: str, replica_id: str = "r-1", **fields: object) -> ReplicaSpec:
    pool = tiny_pool(*engine_args, **fields)
    return ReplicaSpec(id=replica_id, pool=pool, digest=" ".join(engine_args) or "none")


async def wait_gone(pids: list[int]) -> None:
    for _ in range(1_200):
        if not any(is_alive(pid) for pid in pids):
            return
        await asyncio.sleep(0.05)
    raise AssertionError(f"still there: {[pid for pid in pids if is_alive(pid)]}")


def start_owner(
    folder: Path, *replicas: str, keep_s: float = 60.0
) -> tuple[subprocess.Popen[str], list[int]]:
    """Another process that owns a backend and its engines; returns it and the engines' pids."""
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(folder), *replicas],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert owner.stdout is not None
    lines = [owner.stdout.readline().strip() for _ in range(len(replicas) + 1)]
    assert lines[-1] == "kept"
    return owner, [int(line) for line in lines[:-1]]


async def kill_owner(owner: subprocess.Popen[str]) -> None:
    owner.kill()
    await asyncio.to_thread(owner.wait)
    assert owner.stdout is not None
    owner.stdout.close()


def test_living_engines_of_a_killed_tidegate_are_taken_over(tmp_path: Path) -> None:
    """Those that would be started in the same way; the rest is ended, children included."""

    async def story() -> None:
        owner, pids = start_owner(tmp_path, "", "--family", "--stubborn --family")
        family = [child for pid in pids for child in children_of(pid)]
        assert len(family) == 4
        await kill_owner(owner)
        assert all(is_alive(pid) for pid in (*pids, *family))
        backend = tiny_backend(tmp_path, settings=brief(terminate_s=0.5))
        (adopted,) = await backend.adopt([spec("--family")])
        assert adopted.spec == spec("--family", replica_id="r-1")
        assert adopted.probe.pid == pids[1]
        assert ask(f"{adopted.probe.url}/facts")["pid"] == pids[1]
        with pytest.raises(BackendError, match="already"):
            await backend.start(spec("--family"))
        await backend.start(spec(replica_id="r-2"))  # waits until the rest has ended
        kept = {pids[1], *children_of(pids[1])}
        assert not any(is_alive(pid) for pid in {*pids, *family} - kept)
        assert all(is_alive(pid) for pid in kept)
        assert (await wait_ready(backend, "r-2")).url != adopted.probe.url
        os.kill(pids[1], signal.SIGKILL)
        probe = await wait_for_probe(backend, "r-1", lambda one: one.alive is False)
        assert "the engine has ended" in probe.detail
        await backend.stop("r-1", grace_s=1.0)
        await backend.close()
        assert not any(is_alive(pid) for pid in kept)
        assert list((tmp_path / "replicas").glob("*.json")) == []

    asyncio.run(story())


def test_an_engine_may_be_taken_over_again_and_again(tmp_path: Path) -> None:
    async def story() -> None:
        backend = tiny_backend(tmp_path)
        await backend.start(spec())
        pid = (await wait_ready(backend, "r-1")).pid
        assert pid is not None
        for _ in range(3):
            await backend.close(keep=True)
            backend = tiny_backend(tmp_path)
            (adopted,) = await backend.adopt([spec()])
            assert adopted.probe.pid == pid
        await backend.stop("r-1", grace_s=5.0)
        assert not is_alive(pid)
        await backend.close()

    asyncio.run(story())


@pytest.mark.parametrize("keep_s", [0.0, 1.0])
def test_engines_end_by_themselves_when_no_control_process_comes(
    tmp_path: Path, keep_s: float
) -> None:
    """Those that ignore SIGTERM too, with all that they have started."""

    async def story() -> None:
        settings = brief(keep_engines_s=keep_s, terminate_s=0.5)
        backend = tiny_backend(tmp_path, settings=settings)
        await backend.start(spec("--stubborn", "--family"))
        pid = (await wait_ready(backend, "r-1")).pid
        assert pid is not None
        family = [pid, *children_of(pid)]
        assert len(family) == 3
        began_s = time.monotonic()
        await backend.close(keep=True)
        await wait_gone(family)
        assert time.monotonic() - began_s >= keep_s
        for _ in range(1_200):
            if record_files(tmp_path) == []:
                break
            await asyncio.sleep(0.05)
        assert record_files(tmp_path) == []

    asyncio.run(story())


def record_files(folder: Path) -> list[str]:
    return [path.name for path in (folder / "replicas").iterdir() if path.name != "lock"]


def test_an_engine_ends_when_its_guard_is_killed(tmp_path: Path) -> None:
    """Whatever kills everything at once kills the guards too: the kernel tells the engines."""

    async def story() -> None:
        backend = tiny_backend(tmp_path)
        await backend.start(spec())
        pid = (await wait_ready(backend, "r-1")).pid
        assert pid is not None
        stat = procs.read_stat(pid)
        assert stat is not None
        os.kill(stat.parent, signal.SIGKILL)
        await wait_gone([pid])
        probe = await wait_for_probe(backend, "r-1", lambda one: one.alive is False)
        assert "SIGKILL" in probe.detail
        await backend.close()

    asyncio.run(story())


def test_an_engine_whose_record_was_removed_ends(tmp_path: Path) -> None:
    """The next control process could not know of it. A living one writes its record again."""

    async def story() -> None:
        backend = tiny_backend(tmp_path, settings=brief(keep_engines_s=0.0))
        await backend.start(spec())
        pid = (await wait_ready(backend, "r-1")).pid
        assert pid is not None
        record = record_of(tmp_path, "r-1")
        await backend.close(keep=True)
        record.unlink(missing_ok=True)
        await wait_gone([pid])

    asyncio.run(story())


def brief(**fields: float) -> AutoscalerSettings:
    return SETTINGS.model_copy(update=fields)


@pytest.mark.parametrize("why", ["keep_engines_s", "pool", "digest"])
def test_what_is_not_taken_over_is_ended(tmp_path: Path, why: str) -> None:
    async def story() -> None:
        first = tiny_backend(tmp_path)
        await first.start(spec("--stubborn"))
        pid = (await wait_ready(first, "r-1")).pid
        assert pid is not None
        await first.close(keep=True)
        settings = brief(terminate_s=0.5)
        wanted = [] if why == "pool" else [spec("--stubborn", replica_id="any")]
        if why == "keep_engines_s":
            settings = brief(terminate_s=0.5, keep_engines_s=0.0)
        elif why == "digest":
            wanted = [replace(wanted[0], digest="other")]
        second = tiny_backend(tmp_path, settings=settings)
        assert await second.adopt(wanted) == []
        await second.close()
        assert not is_alive(pid)
        assert list((tmp_path / "replicas").glob("*.json")) == []

    asyncio.run(story())


def test_what_cannot_be_looked_at_is_not_taken_over_and_holds_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story() -> None:
        gpus = {"list_gpus": lambda: [GpuCapacity(index=0, memory_bytes=100)]}
        one = spec(process={"gpus_per_replica": 1})
        first = tiny_backend(tmp_path, **gpus)
        await first.start(one)
        pid = (await wait_ready(first, "r-1")).pid
        assert pid is not None
        await first.close(keep=True)
        second = tiny_backend(tmp_path, **gpus)

        def fail(guard_pid: int) -> int:
            raise OSError("too many open files")

        with monkeypatch.context() as patch:
            patch.setattr("autoscaler.backends.process.backend.find_engine", fail)
            assert await second.adopt([one]) == []
        await second.start(one)  # the same id, and the only GPU
        assert not is_alive(pid)
        assert (await wait_ready(second, "r-1")).gpus == (0,)
        await second.close()

    asyncio.run(story())


def start_stranger() -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])


def test_engines_of_a_tidegate_that_lives_are_not_touched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story() -> None:
        monkeypatch.setattr("autoscaler.backends.process.family.CLAIM_TRIES", 2)
        owner, pids = start_owner(tmp_path, "")
        try:
            with pytest.raises(StateInUse, match="state_dir"):
                await tiny_backend(tmp_path).adopt(())
            with pytest.raises(StateInUse):
                await tiny_backend(tmp_path).start(spec())
            assert is_alive(pids[0])
        finally:
            owner.kill()
            owner.wait()
            assert owner.stdout is not None
            owner.stdout.close()
        backend = tiny_backend(tmp_path)
        await backend.adopt(())
        await backend.close()
        assert not is_alive(pids[0])

    asyncio.run(story())


def test_the_gate_stays_shut_until_the_process_is_on_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story() -> None:
        def full(self: ProcessRegistry, record: ProcessRecord) -> None:
            command = Path(f"/proc/{record.leader.pid}/cmdline")
            for _ in range(1_000):  # empty for a moment: a program that has just replaced another
                if command.read_text():
                    break
                time.sleep(0.01)
            assert guard.__file__ in command.read_text()
            raise OSError("no space left on the device")

        monkeypatch.setattr(ProcessRegistry, "write", full)
        before = set(children_of(os.getpid()))  # an earlier test's, if any
        backend = tiny_backend(tmp_path)
        with pytest.raises(BackendError, match="no space left"):
            await backend.start(spec())
        assert set(children_of(os.getpid())) <= before
        assert (await backend.probe("r-1")).alive is False
        await backend.close()

    asyncio.run(story())


def test_a_program_that_is_not_there_is_said_so(tmp_path: Path) -> None:
    async def story() -> None:
        backend = tiny_backend(
            tmp_path, command=lambda spec, placement: EngineCommand(argv=("/no/such/engine",))
        )
        await backend.start(spec())
        probe = await wait_for_probe(backend, "r-1", lambda one: one.alive is False)
        assert "/no/such/engine was not started: [Errno 2]" in probe.detail
        await backend.close()

    asyncio.run(story())


def test_an_engine_that_fails_is_quoted(tmp_path: Path) -> None:
    async def story() -> None:
        backend = tiny_backend(tmp_path)
        await backend.start(spec("--fail"))
        probe = await wait_for_probe(backend, "r-1", lambda one: one.alive is False)
        assert "exited with status 3" in probe.detail
        assert probe.detail.endswith("reading the weights\nthe weights are not there")
        await backend.stop("r-1", grace_s=1.0)
        await backend.start(spec())  # The same replica may be started again.
        assert (await wait_ready(backend, "r-1")).pid
        os.kill((await backend.probe("r-1")).pid or 0, signal.SIGKILL)
        probe = await wait_for_probe(backend, "r-1", lambda one: one.alive is False)
        assert "was ended by SIGKILL" in probe.detail
        await backend.close()

    asyncio.run(story())


def test_command_that_cannot_be_made_fails_the_start(tmp_path: Path) -> None:
    async def story() -> None:
        def refuse(spec: ReplicaSpec, placement: object) -> None:
            raise ValueError("--port is Tidegate's to set")

        backend = tiny_backend(tmp_path, command=refuse)
        with pytest.raises(BackendError, match="--port is Tidegate's"):
            await backend.start(spec())
        assert (await backend.probe("r-1")).alive is False
        await backend.close()

    asyncio.run(story())


def test_the_event_loop_goes_on_while_a_command_is_made(tmp_path: Path) -> None:
    """It asks the GPU's driver, which may hang."""

    async def story() -> None:
        loop = asyncio.get_running_loop()
        backend = tiny_backend(tmp_path, command=after_the_loop(loop, tiny_command))
        await backend.start(spec())
        await wait_ready(backend, "r-1")
        await backend.close()

    asyncio.run(story())


def test_engines_are_started_and_ended_whatever_other_threads_wait_for(tmp_path: Path) -> None:
    """The event loop's own threads are anybody's: name servers, stores and disks that hang."""
    until_the_end = threading.Event()

    async def story() -> None:
        loop = asyncio.get_running_loop()
        loop.set_default_executor(ThreadPoolExecutor(1))
        waiting = loop.run_in_executor(None, until_the_end.wait, 100.0)
        async with asyncio.timeout(60.0):
            first = tiny_backend(tmp_path)
            await first.adopt(())
            await first.start(spec())
            await wait_ready(first, "r-1")
            await first.close(keep=True)
            second = tiny_backend(tmp_path)
            assert len(await second.adopt([spec(replica_id="any")])) == 1
            await second.stop("r-1", grace_s=5.0)
            await second.close()
        assert not waiting.done()
        until_the_end.set()
        await waiting

    asyncio.run(story())


def test_stop_ends_the_whole_family_and_forces_the_stubborn(tmp_path: Path) -> None:
    async def story() -> None:
        backend = tiny_backend(tmp_path)
        await backend.start(spec("--stubborn", "--family"))
        pid = (await wait_ready(backend, "r-1")).pid
        assert pid is not None
        family = [pid, *children_of(pid)]
        assert len(family) == 3
        await backend.stop("r-1", grace_s=0.3)
        assert not any(is_alive(one) for one in family)
        assert list((tmp_path / "replicas").glob("*.json")) == []
        await backend.close()

    asyncio.run(story())


def test_family_of_an_engine_that_died_is_ended_too(tmp_path: Path) -> None:
    async def story() -> None:
        backend = tiny_backend(tmp_path)
        await backend.start(spec("--family"))
        pid = (await wait_ready(backend, "r-1")).pid
        assert pid is not None
        children = children_of(pid)
        assert len(children) == 2
        os.kill(pid, signal.SIGKILL)
        await wait_for_probe(backend, "r-1", lambda one: one.alive is False)
        await backend.stop("r-1", grace_s=2.0)
        assert not any(is_alive(one) for one in children)
        await backend.close()

    asyncio.run(story())


def test_survivor_of_sigkill_is_reported_and_stays_on_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story() -> None:
        backend = tiny_backend(tmp_path)
        await backend.start(spec())
        await wait_ready(backend, "r-1")
        with monkeypatch.context() as patch:
            patch.setattr(procs, "KILL_ROUNDS", 2)  # here only: a real end may take longer
            patch.setattr(procs, "send_signal", lambda process, number: None)
            with pytest.raises(StillRunning, match="survive SIGKILL"):
                await backend.stop("r-1", grace_s=0.0)
        record = record_of(tmp_path, "r-1")
        assert (await backend.probe("r-1")).ready is True
        await backend.stop("r-1", grace_s=0.0)
        assert not record.exists()
        await backend.close()

    asyncio.run(story())


def test_what_an_engine_is_given(tmp_path: Path) -> None:
    async def story() -> None:
        core = sorted(os.sched_getaffinity(0))[-1]
        given = {"HF_TOKEN": "x", "KEPT": "yes"}
        backend = tiny_backend(
            tmp_path,
            cpus=[core],
            list_gpus=lambda: [GpuCapacity(index=index, memory_bytes=100) for index in range(4)],
            environ=lambda: {**os.environ, **given},
        )
        pool = {"process": {"gpus_per_replica": 2, "gpus": (1, 2, 3), "cpus_per_replica": 1}}
        await backend.start(spec(env={"OWN": "1", "TINY": "mine"}, **pool))
        probe = await wait_ready(backend, "r-1")
        assert (probe.gpus, probe.cpus) == ((1, 2), (core,))
        facts = ask(f"{probe.url}/facts")
        assert facts["cpus"] == [core]
        env = facts["env"]
        assert env["CUDA_VISIBLE_DEVICES"] == "1,2"
        assert (env["OWN"], env["TINY"], env["KEPT"]) == ("1", "mine", "yes")
        assert {*given} & {*env} == {"KEPT"}
        assert facts["pid"] == probe.pid
        with pytest.raises(NoCapacity, match="2 GPU of"):
            await backend.start(spec(replica_id="r-2", **pool))
        await backend.stop("r-1", grace_s=5.0)
        await backend.start(spec(replica_id="r-2", **pool))
        await backend.close()

    asyncio.run(story())


def test_health_by_another_path_and_its_absence(tmp_path: Path) -> None:
    async def story() -> None:
        backend = tiny_backend(tmp_path)
        await backend.start(spec("--no-health"))
        await backend.start(spec("--unwell", replica_id="r-2"))
        assert (await wait_ready(backend, "r-1")).served_model == "tiny"
        probe = await wait_for_probe(backend, "r-2", lambda one: "503" in one.detail)
        assert (probe.alive, probe.ready) == (True, False)
        assert probe.phase == "importing: serving no GPU"
        await backend.close()

    asyncio.run(story())


def test_logs_are_rotated_while_the_engine_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story() -> None:
        monkeypatch.setattr("autoscaler.backends.process.backend.KEEP_S", 0.02)
        settings = SETTINGS.model_copy(update={"log_bytes": 20_000, "log_files": 3})
        backend = tiny_backend(tmp_path, settings=settings)
        await backend.start(spec("--chatty-bytes", "50000"))
        url = (await wait_ready(backend, "r-1")).url
        folder = tmp_path / "logs" / "tiny"
        for _ in range(1_200):
            ask(f"{url}/shout")
            await asyncio.sleep(0.03)
            # What was written before serving may fill two files, or one and a part of another.
            rotated = folder / "r-1.log.1"
            if (folder / "r-1.log.2").exists() and rotated.read_bytes().count(b"y") >= 5_000:
                break
        await backend.close()
        files = sorted(folder.iterdir())
        assert [file.name for file in files] == ["r-1.log", "r-1.log.1", "r-1.log.2"]
        assert all(file.stat().st_size <= 40_000 for file in files[1:])  # some came meanwhile
        assert files[1].read_bytes().count(b"y") >= 5_000

    asyncio.run(story())


def test_logs_of_old_replicas_are_deleted(tmp_path: Path) -> None:
    async def story() -> None:
        settings = SETTINGS.model_copy(update={"log_replicas": 2})
        backend = tiny_backend(tmp_path, settings=settings)
        for number in range(5):
            await backend.start(spec("--fail", replica_id=f"r-{number}"))
            await wait_for_probe(backend, f"r-{number}", lambda one: one.alive is False)
            await backend.stop(f"r-{number}", grace_s=1.0)
        assert len(list((tmp_path / "logs" / "tiny").iterdir())) == 3
        await backend.close()

    asyncio.run(story())


def test_the_registry_keeps_up_with_the_family(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story() -> None:
        monkeypatch.setattr("autoscaler.backends.process.backend.KEEP_S", 0.02)
        backend = tiny_backend(tmp_path)
        await backend.start(spec("--family"))
        pid = (await wait_ready(backend, "r-1")).pid
        assert pid is not None
        record = record_of(tmp_path, "r-1")
        for _ in range(1_200):
            stored = json.loads(record.read_text())
            members = {pair[0] for pair in stored["members"]}
            if members == {stored["leader"][0], pid, *children_of(pid)}:
                break
            await asyncio.sleep(0.05)
        assert members == {stored["leader"][0], pid, *children_of(pid)}
        await backend.close()

    asyncio.run(story())


def test_cancelled_start_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def story() -> None:
        before = set(children_of(os.getpid()))
        backend = tiny_backend(tmp_path)
        await backend.adopt(())
        for pause in (0, 1, 2, 3, 5, 8):
            start = asyncio.create_task(backend.start(spec()))
            for _ in range(pause):
                await asyncio.sleep(0)
            start.cancel()
            await asyncio.gather(start, return_exceptions=True)
            await backend.stop("r-1", grace_s=0.0)
        assert set(children_of(os.getpid())) <= before
        assert list((tmp_path / "replicas").glob("*.json")) == []
        await backend.close()

    asyncio.run(story())
