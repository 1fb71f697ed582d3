"""Log files: their size, their last lines, and the message in a line."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from autoscaler.backends.process.logs import ReplicaLog, find_error, message_of, prune
from loaders.engines.vllm.engine import VllmEngine


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


def test_an_engine_that_writes_as_fast_as_it_is_copied_does_not_hold_the_rotation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = ReplicaLog(tmp_path / "a.log", max_bytes=1_000, files=2)
    engine, copied, send = log.open(), 0, os.sendfile

    def send_while_it_writes(target: int, source: int, offset: int, count: int) -> int:
        nonlocal copied
        copied += (sent := send(target, source, offset, count))
        assert copied < 1_000_000
        os.write(engine, b"y" * sent)
        return sent

    os.write(engine, b"x" * 50_000)
    monkeypatch.setattr(os, "sendfile", send_while_it_writes)
    assert log.rotate() is True
    os.close(engine)
    assert (tmp_path / "a.log.1").read_text().startswith("x" * 1_000)
    assert (tmp_path / "a.log.1").stat().st_size <= 2_000
    assert log.path.stat().st_size == 0


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


CORE = "(EngineCore pid=9) ERROR 11-29 18:28:34 [core.py:1510] "
ROOT_CAUSE = f"""\
(APIServer pid=8) INFO 11-29 18:16:31 [api_utils.py:286] non-default args: {{'port': 1}}
{CORE}EngineCore failed to start.
{CORE}Traceback (most recent call last):
{CORE}  File "core.py", line 1482, in run_engine_core
{CORE}    engine_core = EngineCoreProc(*args)
{CORE}                  ^^^^^^^^^^^^^^^^^^^^^
{CORE}ValueError: No available memory for the cache blocks.
Process EngineCore:
Traceback (most recent call last):
  File "process.py", line 314, in _bootstrap
(APIServer pid=8) INFO 11-29 18:28:35 [x.py:1] meanwhile
ValueError: No available memory for the cache blocks.
(APIServer pid=8) Traceback (most recent call last):
(APIServer pid=8)   File "entry.py", line 33, in main
(APIServer pid=8) RuntimeError: Engine core initialization failed. See root cause above.
Exception ignored in: <function Client.__del__ at 0x7f>
Traceback (most recent call last):
  File "client.py", line 9, in __del__
AttributeError: 'NoneType' object has no attribute 'close'
nanobind: leaked 12 functions!
""" + "".join(f' - leaked function "f{number}"\n' for number in range(12))
PYDANTIC = """\
Traceback (most recent call last):
  File "config.py", line 3
ValidationError: 1 validation error for ModelConfig
  Value error, The checkpoint has model type `foo`
"""
CHAINED = """\
Traceback (most recent call last):
  File "a.py", line 3
KeyError: 'x'

During handling of the above exception, another exception occurred:

Traceback (most recent call last):
  File "b.py", line 3
OSError: Can't load the configuration
"""


@pytest.mark.parametrize(
    ("log", "error"),
    [
        (ROOT_CAUSE, "ValueError: No available memory for the cache blocks."),
        (PYDANTIC, "ValidationError: 1 validation error for ModelConfig Value error, The "
                   "checkpoint has model type `foo`"),
        (CHAINED, "OSError: Can't load the configuration"),
        ("usage: x\nx.py: error: unrecognized arguments: --foo\n",
         "x.py: error: unrecognized arguments: --foo"),
        ("ERROR 2026-11-29 17:00:00,1 no such GPU\nINFO 2026-11-29 17:00:00,1 bye\n",
         "no such GPU"),
        ("Traceback (most recent call last):\n  File\nEOFError\n", "EOFError"),
        ("Traceback (most recent call last):\n  File\nE: \x1b[31mred\x07 " + "x" * 999 + "\n",
         ("E: [31mred " + "x" * 999)[:300]),
        ("INFO all is well\n", ""),
        ("", ""),
    ],
)  # fmt: skip
def test_the_line_that_says_why_an_engine_failed(log: str, error: str) -> None:
    lines = [line for line in log.splitlines() if line.strip()]
    found = find_error(lines, VllmEngine.consequences)
    assert re.sub(" +", " ", found) == error
