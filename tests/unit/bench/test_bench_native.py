"""The load generator and the mock replicas: right answers pass, every kind of wrong one is seen."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench import native, procs, workload

DOCUMENT = workload.Shape(name="document", prompt_bytes=200, variants=4)
STREAM = workload.Shape(
    name="stream", prompt_bytes=200, variants=4, stream=True, tokens=5, interval_ms=5
)


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> native.Programs:
    assert shutil.which("gcc") or shutil.which("cc"), "the benchmark needs a C compiler"
    return native.build(tmp_path_factory.mktemp("native"))


@pytest.fixture
def replica(programs: native.Programs, tmp_path: Path) -> Iterator[int]:
    child = procs.start(
        "replica", [programs.replica, "--ports", "2"], log=tmp_path / "log", pipes=True
    )
    with procs.stopping(child):
        assert child.popen.stdout is not None
        yield int(child.popen.stdout.readline().split()[1])


async def load(programs: native.Programs, file: Path, port: int, *more: str) -> dict[str, Any]:
    process = await asyncio.create_subprocess_exec(
        str(programs.loadgen), "--port", str(port), "--requests", str(file), "--warmup-s", "0.05",
        "--window-s", "0.3", *(more or ("--connections", "3")), stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    output, _ = await asyncio.wait_for(process.communicate(), 100)
    assert process.returncode == 0
    made: dict[str, Any] = json.loads(output)
    return made


def written(shape: workload.Shape, folder: Path) -> Path:
    path = folder / shape.name
    workload.write_requests(shape, path)
    return path


@pytest.mark.parametrize("shape", [DOCUMENT, STREAM], ids=lambda shape: shape.name)
def test_right_answers_are_counted(
    programs: native.Programs, replica: int, tmp_path: Path, shape: workload.Shape
) -> None:
    made = asyncio.run(load(programs, written(shape, tmp_path), replica))
    assert made["done"] > 0
    assert made["errors"]["total"] == 0, made["first_error"]
    assert made["events"] >= (made["done"] if shape.stream else 0)


def test_a_large_body_and_its_size_class(
    programs: native.Programs, replica: int, tmp_path: Path
) -> None:
    shape = workload.Shape(name="large", prompt_bytes=220_000, variants=2)
    made = asyncio.run(load(programs, written(shape, tmp_path), replica))
    assert made["done"] > 0
    assert made["errors"]["total"] == 0, made["first_error"]


def test_all_streams_are_open_at_once(
    programs: native.Programs, replica: int, tmp_path: Path
) -> None:
    shape = workload.Shape(
        name="held", prompt_bytes=50, variants=2, stream=True, tokens=10, interval_ms=150
    )
    made = asyncio.run(
        load(programs, written(shape, tmp_path), replica, "--connections", "40", "--once")
    )
    assert (made["done"], made["peak_active"], made["events"]) == (40, 40, 400)


def test_a_rate_is_kept_and_processes_are_watched(
    programs: native.Programs, replica: int, tmp_path: Path
) -> None:
    more = ("--connections", "4", "--rate", "200", "--watch", f"me={os.getpid()}")
    made = asyncio.run(load(programs, written(DOCUMENT, tmp_path), replica, *more))
    assert 1 <= made["done"] <= 120
    assert made["watch"]["me"]["rss_peak_kib"] > 1000


class Spoiler:
    """Forwards to the replica and spoils what comes back."""

    def __init__(self, replica: int, how: str) -> None:
        self.replica, self.how = replica, how

    def spoil(self, data: bytes) -> bytes:
        match self.how:
            case "flip":
                return data.replace(b"tide", b"tidy").replace(b"t000003", b"t000004")
            case "status":
                return data.replace(b"200 OK", b"502 No", 1)
            case "framing":
                return data.replace(b"\r\n0\r\n\r\n", b"\r\nx\r\n\r\n")
            case "cut":  # a busy machine may read all of the answer at once
                return data.partition(b"t000002")[0]
            case _:
                return data

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        upstream, sender = await asyncio.open_connection("127.0.0.1", self.replica)
        sender.write(await reader.readuntil(b"\r\n\r\n"))

        async def onwards() -> None:
            while data := await reader.read(65536):
                sender.write(data)

        forward = asyncio.create_task(onwards())
        while data := await upstream.read(65536):
            writer.write(self.spoil(data))
            if self.how == "cut" and b"t000002" in data:
                break
        forward.cancel()
        writer.close()
        sender.close()


@pytest.mark.parametrize(
    ("shape", "how", "kind"),
    [
        (DOCUMENT, "none", None),
        (DOCUMENT, "flip", "mismatch"),
        (DOCUMENT, "status", "status"),
        (STREAM, "flip", "mismatch"),
        (STREAM, "cut", "cut"),
        (STREAM, "framing", "mismatch"),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_a_spoiled_answer_is_an_error_of_its_kind(
    programs: native.Programs, replica: int, tmp_path: Path, shape: workload.Shape, how: str,
    kind: str | None,
) -> None:  # fmt: skip
    async def scene() -> dict[str, Any]:
        spoiler = Spoiler(replica, how)
        server = await asyncio.start_server(spoiler.serve, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        try:
            return await load(
                programs, written(shape, tmp_path), port, "--connections", "2", "--once",
                "--limit-s", "60",
            )  # fmt: skip
        finally:
            server.close()

    made = asyncio.run(scene())
    if kind is None:
        assert (made["done"], made["errors"]["total"]) == (2, 0)
    else:
        assert made["errors"][kind] == 2
        assert made["done"] == 0


def test_nobody_listening_is_an_error(programs: native.Programs, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        file = written(DOCUMENT, tmp_path)
        made = asyncio.run(load(programs, file, port, "--connections", "2", "--once"))
    assert made["errors"]["connect"] == 2
