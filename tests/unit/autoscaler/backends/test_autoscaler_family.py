"""The record of processes, the gate, and who belongs to a family."""

from __future__ import annotations

import asyncio
import os
import resource
import secrets
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from process_fixtures import (
    is_alive,
    tiny_backend,
    tiny_pool,
)

from autoscaler.backends.base import ReplicaSpec
from autoscaler.backends.process import guard, procs, replica
from autoscaler.backends.process.family import Family, ProcessRecord, ProcessRegistry, StartedEngine
from autoscaler.backends.process.logs import ReplicaLog
from autoscaler.backends.process.procs import ProcessId
from loaders.engines.base import EngineCommand, Placement

STARTED = StartedEngine(
    pool="tiny",
    model="/models/b",
    placement=Placement(host="127.0.0.1", port=1, gpus=(1, 2), cpus=(3,), gpu_memory_fraction=0.5),
    digest="d",
    log="/logs/r-1.log",
)


def record(mark: str, **fields: Any) -> ProcessRecord:
    known: dict[str, Any] = {"replica_id": "r-1", "boot_id": "b", "leader": ProcessId(7, 70)}
    return ProcessRecord(mark=mark, **{**known, **fields})


def start_stranger(**env: str) -> subprocess.Popen[bytes]:
    argv = [sys.executable, "-c", "import time; time.sleep(600)"]
    return subprocess.Popen(argv, env={**os.environ, **env})


MARKS = sorted(secrets.token_hex(16) for _ in range(6))
"""By which processes are found on the whole machine, where other tests may run."""


@pytest.mark.parametrize(("sizes", "told"), [({}, None), ({1: 5}, 5), ({1: 5, 2: 7}, 12)])
def test_memory_of_a_standby_that_cannot_be_read_is_not_zero(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sizes: dict[int, int], told: int | None
) -> None:
    monkeypatch.setattr(procs, "read_pss_bytes", sizes.get)
    parts: Any = {
        "port": None,
        "process": SimpleNamespace(pid=1, poll=lambda: None),
        "family": SimpleNamespace(pids=lambda: [1, 2]),
    }
    child = replica.ReplicaProcess(
        spec=ReplicaSpec(id="s-1", pool=tiny_pool()),
        placement=Placement(host="127.0.0.1", port=1),
        mark=MARKS[5],
        log=ReplicaLog(tmp_path / "s-1.log", max_bytes=1, files=1),
        command=EngineCommand(argv=(), env={}),
        **parts,
    )
    standby = replica.describe_standby(child)
    assert standby is not None
    assert standby.pss_bytes == told


def test_a_record_does_not_make_a_process_ours(tmp_path: Path) -> None:
    """Not its pid, nor its start time, nor another variable of its environment: whoever planted
    the record, only what carries the mark is ended or taken over."""

    async def story() -> None:
        stranger = start_stranger(SECRET=MARKS[4])
        try:
            stat = procs.read_stat(stranger.pid)
            assert stat is not None
            registry = ProcessRegistry(tmp_path / "replicas")
            registry.claim()
            other_life = ProcessId(stranger.pid, stat.id.start_ticks - 1)
            for number, identity in enumerate([other_life, stat.id]):
                registry.write(
                    ProcessRecord(
                        replica_id=f"r-{number}",
                        boot_id=procs.boot_id(),
                        leader=identity,
                        mark=MARKS[number + 3],
                        members=frozenset({identity}),
                        engine=STARTED,
                    )
                )
            registry.release()
            backend = tiny_backend(tmp_path)
            assert await backend.adopt([ReplicaSpec(id="any", pool=tiny_pool(), digest="d")]) == []
            await backend.close()
            assert registry.read() == []
            assert is_alive(stranger.pid)
        finally:
            stranger.kill()
            stranger.wait()

    asyncio.run(story())


def test_an_engine_that_cannot_be_looked_at_stays_on_record_and_the_start_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    proc = tmp_path / "proc"
    (proc / "4711" / "environ").mkdir(parents=True)  # reading it is an error other than "gone"
    (proc / "sys/kernel/random").mkdir(parents=True)
    (proc / "sys/kernel/random/boot_id").write_text("this boot")
    monkeypatch.setattr(procs, "PROC", proc)

    async def story() -> None:
        registry = ProcessRegistry(tmp_path / "replicas")
        registry.claim()
        record = ProcessRecord(
            replica_id="r-1",
            boot_id="this boot",
            leader=ProcessId(4711, 1),
            mark=MARKS[0],
            members=frozenset(),
            engine=STARTED,
        )
        registry.write(record)
        registry.release()
        backend = tiny_backend(tmp_path)
        assert await backend.adopt([ReplicaSpec(id="any", pool=tiny_pool(), digest="d")]) == []
        await backend.close()
        assert [one.mark for one in registry.read()] == [record.mark]

    asyncio.run(story())


def gate(way: str, parent: int, directory: Path, *program: str) -> list[str]:
    argv = [sys.executable, "-I", "-S", guard.__file__, way, str(parent)]
    return [*argv, *([str(directory)] if way == "start" else []), "-", *program]


@pytest.mark.parametrize("way", ["start", "tie"])
def test_the_gate_ends_without_the_word_and_for_an_orphan(tmp_path: Path, way: str) -> None:
    for word, parent in ((b"", os.getpid()), (b"?", os.getpid()), (b"!", 1)):
        argv = gate(way, parent, tmp_path, "touch", str(tmp_path / "started"))
        done = subprocess.run(argv, input=word, capture_output=True, check=False)
        assert (done.returncode, done.stderr) == (guard.NOT_STARTED, b"")
    assert not (tmp_path / "started").exists()


@pytest.mark.parametrize(
    ("script", "status"), [("exit 3", 3), ("exit 0", 0), ("kill -9 $$", -9), ("kill -11 $$", -11)]
)
def test_a_guard_ends_as_its_engine_did(tmp_path: Path, script: str, status: int) -> None:
    registry = ProcessRegistry(tmp_path / "replicas")
    registry.claim()
    registry.write(record(MARKS[0]))
    argv = gate("start", os.getpid(), registry.directory, "/bin/sh", "-c", script)
    env = {"PATH": os.environ["PATH"], guard.MARK: MARKS[0]}
    done = subprocess.run(argv, input=b"!", env=env, check=False)
    assert done.returncode == status
    assert registry.has(MARKS[0])  # removed by the owner, when it has seen to the rest
    registry.release()


def test_the_last_owner_says_how_long_an_engine_is_kept(tmp_path: Path) -> None:
    directory = tmp_path / "replicas"
    first = ProcessRegistry(directory, keep_s=600.0, grace_s=5.0)
    first.claim()
    first.write(record(MARKS[0]))
    argv = gate("start", os.getpid(), directory, "sleep", "600")
    env = {"PATH": os.environ["PATH"], guard.MARK: MARKS[0]}
    process = subprocess.Popen(argv, stdin=subprocess.PIPE, env=env)
    assert process.stdin is not None
    process.stdin.write(b"!")
    process.stdin.close()
    first.release()
    time.sleep(0.3)
    assert process.poll() is None
    second = ProcessRegistry(directory, keep_s=0.0, grace_s=5.0)
    second.claim()
    second.release()
    assert process.wait(60) == -signal.SIGTERM
    assert [path.name for path in directory.iterdir()] == [guard.LOCK]


def test_a_guard_that_cannot_end_its_engine_leaves_it_on_record(tmp_path: Path) -> None:
    """For the next control process: its GPU is not free, whatever keeps it alive."""
    mark = secrets.token_hex(16)  # its own: what the shell has started outlives it a moment
    directory = tmp_path / "replicas"
    first = ProcessRegistry(directory, keep_s=0.0, grace_s=0.0)
    first.claim()
    first.write(record(mark))
    script = f"ulimit -Sn 64; trap '' TERM; echo $$ > {tmp_path}/pid; while :; do sleep 0.2; done"
    argv = gate("start", os.getpid(), directory, "/bin/sh", "-c", script)
    env = {"PATH": os.environ["PATH"], guard.MARK: mark}
    # Five descriptors: enough to look at processes, one too few to signal one.
    few = ["/bin/sh", "-c", 'ulimit -Sn 5; exec "$@"', "sh", *argv]
    process = subprocess.Popen(few, stdin=subprocess.PIPE, env=env)
    try:
        assert process.stdin is not None
        process.stdin.write(b"!")
        process.stdin.close()
        deadline_s = time.monotonic() + 30
        while not (pid := tmp_path / "pid").exists() or not pid.read_text():
            assert time.monotonic() < deadline_s
            time.sleep(0.01)
        first.release()
        assert process.wait(60) == -signal.SIGKILL
        assert [one.ending for one in ProcessRegistry(directory).read()] == [True]
    finally:
        process.kill()
        process.wait()
        if (tmp_path / "pid").exists():
            os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)


def test_a_process_that_cannot_be_looked_at_is_not_gone() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        with pytest.raises(OSError, match="Too many open files"):
            procs.read_stat(os.getpid())
        with pytest.raises(OSError, match="Too many open files"):
            procs.carries(ProcessId(os.getpid(), 1), "A=b")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert procs.read_stat(2**22 + 1) is None


def test_a_record_that_cannot_be_written_leaves_the_one_before(tmp_path: Path) -> None:
    registry = ProcessRegistry(tmp_path)
    registry.claim()
    registry.write(record(MARKS[0]))
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1, hard))
    try:
        for mark in MARKS[:2]:
            with pytest.raises(OSError, match="File too large"):
                registry.write(record(mark, replica_id="r-2"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    registry.release()


def test_a_record_that_cannot_be_read_is_still_a_mark(tmp_path: Path) -> None:
    registry = ProcessRegistry(tmp_path)
    registry.claim()
    texts = ['{"version": 2, "lea', '{"version": 1}', '{"members":' + "[" * 3_000]
    for mark, text in zip(MARKS, texts, strict=False):
        (tmp_path / f"{mark}.json").write_text(text)
    (tmp_path / f"{MARKS[2]}.json").rename(tmp_path / f"{MARKS[2]}.ending")
    found = registry.read()
    assert [(one.mark, one.engine, one.ending) for one in found] == [
        (MARKS[0], None, False), (MARKS[1], None, False), (MARKS[2], None, True),
    ]  # fmt: skip
    for one in found:
        registry.remove(one.mark)
    assert registry.read() == []
    registry.release()


def test_what_is_no_record_of_ours_is_put_aside(tmp_path: Path) -> None:
    registry = ProcessRegistry(tmp_path)
    registry.claim()
    registry.write(record(MARKS[0]))
    registry.write(record(MARKS[1]))
    (tmp_path / f"{MARKS[1]}.json").chmod(0o666)
    (tmp_path / f"{MARKS[2]}.json").symlink_to(tmp_path / f"{MARKS[0]}.json")
    (tmp_path / "r-1.json").write_text("{}")
    assert [one.mark for one in registry.read()] == [MARKS[0]]
    aside = sorted(path.stem for path in tmp_path.glob("*.unread"))
    assert aside == [MARKS[1], MARKS[2], "r-1"]
    registry.release()


@pytest.mark.parametrize("name", ["", "a/b", "../x", "a b", "x" * 201])
def test_replica_ids_cannot_leave_the_directory(tmp_path: Path, name: str) -> None:
    registry = ProcessRegistry(tmp_path)
    with pytest.raises(ValueError, match="cannot be the id"):
        registry.write(record(MARKS[0], replica_id=name))
    with pytest.raises(ValueError, match="cannot be the mark"):
        registry.write(record(name))


def test_record_survives_its_file(tmp_path: Path) -> None:
    registry = ProcessRegistry(tmp_path)
    registry.claim()
    members = frozenset({ProcessId(8, 80), ProcessId(9, 90)})
    kept = record(MARKS[0], members=members, engine=STARTED)
    registry.write(kept)
    assert registry.read() == [kept]
    (path,) = tmp_path.glob("*.json")
    assert path.stat().st_mode & 0o777 == 0o600
    registry.remove(MARKS[0])
    assert registry.read() == []
    registry.release()


def test_family_is_found_by_session_and_descent_not_by_pid_alone() -> None:
    def stat(pid: int, parent: int, session: int, ticks: int = 1) -> procs.ProcessStat:
        return procs.ProcessStat(
            id=ProcessId(pid, ticks), parent=parent, session=session, gone=False
        )

    leader = ProcessId(10, 1)
    table = [
        stat(10, 1, 10),
        stat(11, 10, 10),
        stat(12, 1, 10),  # its parent died, its session is ours
        stat(13, 11, 13),  # left the session, its parent is ours
        stat(14, 13, 13),
        stat(20, 1, 20),
        stat(99, 11, 10),  # ourselves
    ]
    found = procs.find_family(leader, (), table, 99)
    assert {one.pid for one in found} == {10, 11, 12, 13, 14}
    reused = [stat(10, 1, 10, ticks=5), stat(15, 10, 10, ticks=6)]
    assert procs.find_family(leader, (), reused, 99) == set()
    # The leader is dead, a member on record is not: the session cannot be anyone else's.
    orphaned = [stat(11, 1, 10), stat(16, 1, 10)]
    found = procs.find_family(leader, {ProcessId(11, 1)}, orphaned, 99)
    assert {one.pid for one in found} == {11, 16}
    assert procs.find_family(leader, {ProcessId(11, 9)}, orphaned, 99) == set()


def test_signal_for_another_life_of_a_pid_is_not_sent() -> None:
    stranger = start_stranger()
    try:
        stat = procs.read_stat(stranger.pid)
        assert stat is not None
        procs.send_signal(ProcessId(stranger.pid, stat.id.start_ticks + 1), signal.SIGKILL)
        assert stranger.poll() is None
        procs.send_signal(stat.id, signal.SIGKILL)
        assert stranger.wait(60) == -signal.SIGKILL
        procs.send_signal(stat.id, signal.SIGKILL)
    finally:
        stranger.kill()
        stranger.wait()


def test_end_of_a_family_that_is_gone_is_quick(tmp_path: Path) -> None:
    async def story() -> None:
        registry = ProcessRegistry(tmp_path)
        registry.claim()
        gone = record(MARKS[0], leader=ProcessId(2**22 + 1, 1))
        registry.write(gone)
        family = Family(gone, registry)
        assert await family.end(grace_s=60.0, reap=lambda: None) == set()
        assert registry.read() == []
        registry.release()

    asyncio.run(story())
