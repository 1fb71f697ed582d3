"""The record of processes, the gate, and who belongs to a family."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from process_fixtures import (
    is_alive,
    tiny_backend,
)

from autoscaler.backends.process import procs, start_gate
from autoscaler.backends.process.family import Family, ProcessRecord, ProcessRegistry
from autoscaler.backends.process.procs import ProcessId


def start_stranger() -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])


def test_a_process_that_only_has_the_same_pid_is_left_alone(tmp_path: Path) -> None:
    async def story() -> None:
        stranger = start_stranger()
        try:
            stat = procs.read_stat(stranger.pid)
            assert stat is not None
            registry = ProcessRegistry(tmp_path / "replicas")
            registry.claim()
            other_life = ProcessId(stranger.pid, stat.id.start_ticks - 1)
            for number, (boot, identity) in enumerate(
                [(procs.boot_id(), other_life), ("another-boot", stat.id)]
            ):
                registry.write(
                    ProcessRecord(
                        replica_id=f"r-{number}",
                        boot_id=boot,
                        leader=identity,
                        mark="X=1",
                        members=frozenset({identity}),
                    )
                )
            registry.release()
            backend = tiny_backend(tmp_path)
            leftovers = await backend.adopt()
            assert [one.pids for one in leftovers] == [(), ()]
            assert is_alive(stranger.pid)
            await backend.close()
        finally:
            stranger.kill()
            stranger.wait()

    asyncio.run(story())


@pytest.mark.parametrize("word", [b"", b"?"])
def test_the_gate_ends_without_the_word(word: bytes) -> None:
    gate = [sys.executable, "-I", "-S", start_gate.__file__, str(os.getpid()), "-", "touch", "/x/y"]
    done = subprocess.run(gate, input=word, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (start_gate.NOT_STARTED, b"")


def test_the_gate_ends_when_it_is_an_orphan_already() -> None:
    gate = [sys.executable, "-I", "-S", start_gate.__file__, "1", "-", "true"]
    done = subprocess.run(gate, input=b"!", capture_output=True, check=False)
    assert done.returncode == start_gate.NOT_STARTED


def test_unreadable_record_is_put_aside(tmp_path: Path) -> None:
    registry = ProcessRegistry(tmp_path)
    registry.claim()
    (tmp_path / "r-1.json").write_text('{"version": 1, "lea')
    (tmp_path / "r-2.json").write_text('{"version": 2}')
    assert registry.read() == []
    assert sorted(path.name for path in tmp_path.glob("*.unread")) == ["r-1.unread", "r-2.unread"]
    registry.release()


@pytest.mark.parametrize("name", ["", "a/b", "../x", "a b", "x" * 201])
def test_replica_ids_cannot_leave_the_directory(tmp_path: Path, name: str) -> None:
    registry = ProcessRegistry(tmp_path)
    with pytest.raises(ValueError, match="cannot be the id"):
        registry.remove(name)


def test_record_survives_its_file(tmp_path: Path) -> None:
    registry = ProcessRegistry(tmp_path)
    registry.claim()
    record = ProcessRecord(
        replica_id="r-1",
        boot_id="b",
        leader=ProcessId(7, 70),
        mark="M=1",
        members=frozenset({ProcessId(8, 80), ProcessId(9, 90)}),
    )
    registry.write(record)
    assert registry.read() == [record]
    registry.remove("r-1")
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
        assert stranger.wait(20) == -signal.SIGKILL
        procs.send_signal(stat.id, signal.SIGKILL)
    finally:
        stranger.kill()
        stranger.wait()


def test_end_of_a_family_that_is_gone_is_quick(tmp_path: Path) -> None:
    async def story() -> None:
        registry = ProcessRegistry(tmp_path)
        registry.claim()
        record = ProcessRecord(
            replica_id="r-1", boot_id="b", leader=ProcessId(2**22 + 1, 1), mark="M=1"
        )
        registry.write(record)
        family = Family(record, registry)
        assert await family.end(grace_s=60.0, sleep=asyncio.sleep, reap=lambda: None) == set()
        assert registry.read() == []
        registry.release()

    asyncio.run(story())
