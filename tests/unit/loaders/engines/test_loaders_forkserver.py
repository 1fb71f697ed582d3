"""The fork server's parts: messages, what it compares, what it writes over, where it looks."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from loaders.engines.vllm.forkserver import wire
from loaders.engines.vllm.forkserver.patches import may_have_processor
from loaders.engines.vllm.forkserver.server import (
    USUAL,
    differences,
    watched_environment,
    with_added,
)
from loaders.engines.vllm.forkserver.wire import Marks, read_marks
from loaders.engines.vllm.load_format import ENTRY_POINT, read_files

RESTAMP = """
import os, sys
from loaders.engines.vllm.forkserver.server import restamp
child = os.fork()
if child:
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
restamp("A_MARK", "b" * 32)
print(open("/proc/self/environ").read().replace(chr(0), chr(10)))
print("parent:", "a" * 32 in open(f"/proc/{os.getppid()}/environ").read())
try:
    restamp("A_MARK", "short")
except RuntimeError as error:
    print(error)
"""


def test_the_load_format_is_imported_before_the_fork() -> None:
    """A name that no longer exists would be passed over, and every engine import it for itself."""
    ours = [name for name in USUAL if name.startswith("loaders.")]
    assert ENTRY_POINT.partition(":")[0] in ours
    assert all(importlib.util.find_spec(name) for name in ours)


def test_messages_carry_file_descriptors() -> None:
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    reading, writing = os.pipe()
    with one, other:
        wire.send(one, {"number": 1, "text": "x" * 50_000 + "ü"}, [writing])
        wire.send(one, {"number": 2})
        message, (got,) = wire.receive(other)
        assert message["number"] == 1
        assert len(message["text"]) == 50_001
        os.write(got, b"!")
        assert os.read(reading, 2) == b"!"
        assert wire.receive(other) == ({"number": 2}, [])
        with pytest.raises(OSError, match="too long"):
            wire.send(one, {"text": "x" * 4_000_000})
        one.send(b"[1, 2]")
        with pytest.raises(ValueError, match="object"):
            wire.receive(other)
        one.close()
        with pytest.raises(wire.Closed):
            wire.receive(other)
    for fd in (reading, writing, got):
        os.close(fd)


@pytest.mark.parametrize(
    ("ours", "theirs", "found"),
    [
        ({"A": "1"}, {"A": "1"}, []),
        ({"READ": "1"}, {"READ": "2"}, ["READ"]),
        ({"READ": "1"}, {}, ["READ"]),
        ({}, {"READ": "1"}, ["READ"]),
        ({"UNREAD": "1"}, {"UNREAD": "2", "OTHER": "3"}, []),
        ({}, {"OMP_NUM_THREADS": "2", "LD_PRELOAD": "x"}, ["LD_PRELOAD", "OMP_NUM_THREADS"]),
        ({}, {"CUDA_VISIBLE_DEVICES": "1", "VLLM_CPU_KVCACHE_SPACE": "2"}, []),
    ],
)
def test_what_differs_matters_if_it_was_read(
    ours: dict[str, str], theirs: dict[str, str], found: list[str]
) -> None:
    assert differences(ours, theirs, {"READ", "CUDA_VISIBLE_DEVICES"}) == found


def test_what_imports_set_is_an_engine_s_too_but_not_where_it_names_its_own_caches() -> None:
    """Inductor writes its folder into the environment when it is imported."""
    added = {"LD_PRELOAD": "/new.so", "TORCHINDUCTOR_CACHE_DIR": "/tmp/theirs"}
    own = {"LD_PRELOAD": "/old.so", "TORCHINDUCTOR_CACHE_DIR": "/bundle", "HOME": "/"}
    assert with_added(own, added) == {**own, "LD_PRELOAD": "/new.so"}
    assert with_added({"HOME": "/"}, added) == {"HOME": "/", **added}


def test_looks_at_the_environment_are_seen_and_then_no_more() -> None:
    with watched_environment() as seen:
        os.environ.get("ONE_NOT_THERE")
        os.getenv("TWO_NOT_THERE", "x")
        assert "THREE_NOT_THERE" not in os.environ
    os.environ.get("FOUR_NOT_THERE")
    assert seen >= {"ONE_NOT_THERE", "TWO_NOT_THERE", "THREE_NOT_THERE"}
    assert "FOUR_NOT_THERE" not in seen


def test_a_fork_gets_a_mark_of_its_own_in_proc() -> None:
    env = {**os.environ, "A_MARK": "a" * 32, "XA_MARK": "a" * 32}
    root = Path(__file__).resolve().parents[4]
    ran = subprocess.run(
        [sys.executable, "-c", RESTAMP], env=env, cwd=root, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    lines = ran.stdout.splitlines()
    assert ran.returncode == 0, ran.stderr
    assert "A_MARK=" + "b" * 32 in lines
    assert "XA_MARK=" + "a" * 32 in lines
    assert "parent: True" in lines
    assert any("cannot be found" in line for line in lines)


def test_marks_are_read_as_they_are_written() -> None:
    reading, writing = os.pipe()
    marks = Marks(writing)
    marks("importing: engine core")
    marks("serving")
    (first, second) = read_marks(os.read(reading, 4_096) + b"not a mark\n")
    assert (first[1], first[2], second[2]) == (os.getpid(), "importing: engine core", "serving")
    assert first[0] <= second[0]
    os.close(reading)
    marks("nobody reads")
    os.close(writing)


@pytest.mark.parametrize(
    ("files", "may"),
    [
        ({"config.json": "{}", "tokenizer_config.json": "{}"}, False),
        ({"config.json": "{}", "preprocessor_config.json": "{}"}, True),
        ({"config.json": "{}", "processor_config.json": "{}"}, True),
        ({"tokenizer_config.json": json.dumps({"processor_class": "X"})}, True),
        ({"config.json": json.dumps({"auto_map": {"AutoProcessor": "x.X"}})}, True),
        ({"chat_template.json": "{}"}, True),
    ],
)
def test_a_model_without_a_processor_is_known_by_its_files(
    tmp_path: Path, files: dict[str, str], may: bool
) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert may_have_processor(str(tmp_path)) is may
    assert may_have_processor("somebody/on-a-hub")


def test_weights_come_from_our_reader_unless_it_cannot() -> None:
    def reads(files: list[str]):  # type: ignore[no-untyped-def]
        yield from ((file, len(file)) for file in files)

    def cannot(files: list[str]):  # type: ignore[no-untyped-def]
        raise NotImplementedError("not here")
        yield

    def damaged(files: list[str]):  # type: ignore[no-untyped-def]
        raise ValueError("it is cut short")
        yield

    found = read_files(["a", "bc"], reads)
    assert not isinstance(found, str)
    assert list(found) == [("a", 1), ("bc", 2)]
    assert read_files(["a"], cannot) == "not here"
    assert read_files([], reads) == "there are no tensors"
    with pytest.raises(ValueError, match="cut short"):
        read_files(["a"], damaged)
