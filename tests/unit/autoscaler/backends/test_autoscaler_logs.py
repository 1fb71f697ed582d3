"""Log files: their size, their last lines, and the message in a line."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from autoscaler.backends.process.logs import ReplicaLog, message_of, prune


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("(EngineCore pid=987) INFO 11-23 17:09:47 [core.py:402] init engine", "init engine"),
        ("INFO 2026-11-23 17:08:30,425 start-up: importing", "start-up: importing"),
        ("WARNING: nothing", "WARNING: nothing"),
        ("[1/3] loading", "[1/3] loading"),
        ("plain words", "plain words"),
        ("", ""),
    ],
)
def test_message_of_a_line(line: str, message: str) -> None:
    assert message_of(line) == message


def write(log: ReplicaLog, text: str) -> None:
    handle = log.open()
    os.write(handle, text.encode())
    os.close(handle)


def test_rotation_keeps_so_many_files_of_so_many_bytes(tmp_path: Path) -> None:
    log = ReplicaLog(tmp_path / "a.log", max_bytes=100, files=3)
    assert log.rotate() is False
    for number in range(10):
        write(log, f"{number}" * 150)
        assert log.rotate() is True
    assert log.path.read_text() == ""
    assert (tmp_path / "a.log.1").read_text() == "9" * 100
    assert (tmp_path / "a.log.2").read_text() == "8" * 100
    assert len(list(tmp_path.iterdir())) == 3
    write(log, "short")
    assert log.rotate() is False


def test_rotation_with_one_file_cuts_it(tmp_path: Path) -> None:
    log = ReplicaLog(tmp_path / "a.log", max_bytes=100, files=1)
    write(log, "x" * 150)
    assert log.rotate() is True
    assert [path.name for path in tmp_path.iterdir()] == ["a.log"]
    assert log.path.stat().st_size == 0


def test_a_writer_goes_on_at_the_new_beginning(tmp_path: Path) -> None:
    log = ReplicaLog(tmp_path / "a.log", max_bytes=10, files=2)
    handle = log.open()
    os.write(handle, b"before the cut\n")
    log.rotate()
    os.write(handle, b"after\n")
    os.close(handle)
    assert log.path.read_text() == "after\n"


def test_last_lines(tmp_path: Path) -> None:
    log = ReplicaLog(tmp_path / "a.log", max_bytes=10**7, files=2)
    assert log.tail(3) == []
    write(log, "one\n\ntwo  \n" + "x" * 200_000 + "\nthree\n\n\xff\n")
    assert log.tail(2) == ["three", "\xff"]
    assert log.tail(10)[0].startswith("xxx")
    assert len(log.tail(10)) == 3


def test_pruning_spares_the_living_and_the_newest(tmp_path: Path) -> None:
    for age, name in enumerate(["a-1", "a-10", "a-2", "a-3"]):
        for suffix in (".log", ".log.1"):
            path = tmp_path / f"{name}{suffix}"
            path.write_text("x")
            os.utime(path, (1_000 - age, 1_000 - age))
    prune(tmp_path, keep=1, living={tmp_path / "a-3.log"})
    assert {path.name for path in tmp_path.iterdir()} == {
        "a-1.log",
        "a-1.log.1",
        "a-3.log",
        "a-3.log.1",
    }
    prune(tmp_path / "absent", keep=1, living=set())
