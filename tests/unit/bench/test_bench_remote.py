"""How the remote benchmark judges, counts and reports. No download is timed here."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from bench import remote, remote_clients, remote_report, remote_servers
from bench.debian import ProgramMissing
from bench.nginx import nginx_path

ROOT = Path(__file__).resolve().parents[3]


def rows(**gb_s: float) -> list[dict[str, Any]]:
    return [
        {"client": client.replace("__", ":"), "round": number, "gb_s": speed,
         "cpu_s_per_gb": 1 / speed, "peak_kib": 1024.0, "right": True}
        for client, speed in gb_s.items()
        for number in range(3)
    ]  # fmt: skip


GOOD = rows(oss__tidegate=1.0, oss__ossfs=0.2, s3__tidegate=1.0, s3__boto3=0.5, s3__obstore=0.9,
            http__tidegate=1.0, http__aiohttp=1.0)  # fmt: skip
CAP = {"used_fraction": 0.92, "peak_fraction": 0.97, "window_s": 1.0, "right": True}


def verdicts(given: list[dict[str, Any]], cap: dict[str, Any] | None) -> list[bool | None]:
    return [verdict["passed"] for verdict in remote.judge(given, cap)]


def test_all_bars_can_be_met() -> None:
    assert verdicts(GOOD, CAP) == [True] * 7
    assert remote.judge(GOOD, CAP)[2]["text"].endswith("(obstore)")


def test_what_was_not_measured_is_not_judged() -> None:
    assert verdicts([], None) == [None] * 5
    assert verdicts(rows(http__tidegate=1.0), None) == [None, None, None, None, True]


@pytest.mark.parametrize(
    ("changed", "missed"),
    [
        ({"oss__ossfs": 0.21}, {0, 1}),
        ({"s3__obstore": 1.1}, {2}),
        ({"http__aiohttp": 1.1}, {3}),
    ],
)
def test_each_bar_can_be_missed(changed: dict[str, float], missed: set[int]) -> None:
    names = {name.replace("__", ":") for name in changed}
    given = [row for row in GOOD if row["client"] not in names] + rows(**changed)
    assert {at for at, passed in enumerate(verdicts(given, CAP)) if not passed} == missed


def test_a_wrong_digest_and_a_passed_cap_are_missed() -> None:
    wrong = [{**row, "right": row["round"] != 1} for row in GOOD]
    assert verdicts(wrong, CAP)[4] is False
    assert verdicts(GOOD, {**CAP, "used_fraction": 0.89})[5:] == [False, True]
    assert verdicts(GOOD, {**CAP, "peak_fraction": 1.01})[5:] == [True, False]


def test_the_most_within_a_window() -> None:
    seen = [(0.0, 5), (0.4, 5), (1.2, 7), (1.3, 1), (5.0, 9)]
    assert remote_servers.window_peak(seen, 1.0) == 13
    assert remote_servers.window_peak(seen, 0.1) == 9
    assert remote_servers.window_peak([], 1.0) == 0


def test_digests_are_of_every_byte(tmp_path: Path) -> None:
    size = remote_clients.PIECE_BYTES + 3
    (tmp_path / "a").write_bytes(b"x" * size)
    fields: dict[str, Any] = {"client": "c", "url": "", "bucket": "", "prefix": "",
                              "files": {"a": size}, "target": str(tmp_path),
                              "certificate": ""}  # fmt: skip
    found = remote_clients.digest_files(remote_clients.Job(**fields, digests={}))
    whole = remote_clients.tree_digest(size, [found["a", 0], found["a", size - 3]])
    job = remote_clients.Job(**fields, digests={"a": whole})
    assert remote_clients.compare(job, found)
    (tmp_path / "a").write_bytes(b"x" * (size - 1) + b"y")
    assert not remote_clients.compare(job, remote_clients.digest_files(job))


def test_the_report_names_what_was_missed(tmp_path: Path) -> None:
    made = {
        "date": "2026-11-24", "command": "c", "size_bytes": 10**9, "files": 4, "rounds": 3,
        "machine": {"cores": 2, "memory_gib": 8, "cpu": "x", "kernel": "6", "python": "3"},
        "noise": {"other_busy_fraction": 0.5}, "versions": {"obstore": "1"},
        "figures": remote.summarise(GOOD), "verdicts": remote.judge(GOOD[3:], CAP), "raw": [],
    }  # fmt: skip
    paths = remote_report.write(made, tmp_path)
    text = paths[1].read_text()
    assert "| tidegate | **1.00** (1.00–1.00)" in text
    assert "not measured" in text
    assert "## S3" in text
    assert "## HTTPS" not in text


def test_the_oss_of_the_benchmark_serves_what_clients_ask(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "a").write_bytes(b"0123456789")
    (tmp_path / "oss.xml").write_text("<x/>")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "bench.remote_oss", str(tmp_path), str(port)]
    process = subprocess.Popen(command, cwd=ROOT)
    try:
        assert _ask(port, "/models/a", "Range: bytes=2-4\r\n").endswith(b"\r\n\r\n234")
        assert _ask(port, "/models/a").endswith(b"\r\n\r\n0123456789")
        assert _ask(port, "/models/?prefix=x").endswith(b"<x/>")
        assert b" 404 " in _ask(port, "/models/none")
    finally:
        process.terminate()
        process.wait(20)


def _ask(port: int, path: str, headers: str = "") -> bytes:
    deadline_s = time.monotonic() + 30
    while True:
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=20) as peer:
                text = f"GET {path} HTTP/1.1\r\n{headers}Connection: close\r\n\r\n"
                peer.sendall(text.encode())
                return b"".join(iter(lambda: peer.recv(65_536), b""))
        except ConnectionRefusedError:
            if time.monotonic() > deadline_s:
                raise
            time.sleep(0.05)


def test_nginx_is_the_installed_one_or_fetched(tmp_path: Path) -> None:
    found = nginx_path(ROOT)
    assert subprocess.run([found, "-v"], check=False).returncode == 0
    with pytest.raises(ProgramMissing, match="no Debian"):
        nginx_path(tmp_path, which=lambda name: None)
