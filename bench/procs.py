"""Child processes of a benchmark: pinned, logged, found again by pid, always ended."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil


class NotReadyError(RuntimeError):
    """A server did not get ready in time; the message carries the end of its log."""


@dataclass(slots=True, kw_only=True)
class Child:
    """One started process: the leader of its own process group, which is what is ended."""

    name: str
    popen: subprocess.Popen[bytes]
    log: Path
    cores: tuple[int, ...] = field(default=())

    @property
    def pid(self) -> int:
        return self.popen.pid

    def tree(self) -> list[int]:
        """This process and its descendants, parents first."""
        try:
            top = psutil.Process(self.pid)
            return [top.pid, *(child.pid for child in top.children(recursive=True))]
        except psutil.NoSuchProcess:
            return []

    def log_tail(self, lines: int = 12) -> str:
        try:
            return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])
        except OSError:
            return ""

    def stop(self, grace_s: float = 5.0) -> None:
        """SIGTERM to the process, SIGKILL to its group if it is still there after ``grace_s``."""
        if self.popen.stdin is not None:
            with contextlib.suppress(OSError):
                self.popen.stdin.close()
        if self.popen.poll() is None:
            self.popen.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.popen.wait(grace_s)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.popen.wait(grace_s)


def start(
    name: str,
    argv: Sequence[str | Path],
    *,
    log: Path,
    cores: Sequence[int] = (),
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    pipes: bool = False,
) -> Child:
    """Start ``argv`` on ``cores`` (all when empty), its output in ``log``."""
    command = [str(part) for part in argv]
    if cores:
        command = ["taskset", "-c", ",".join(map(str, cores)), *command]
    with log.open("ab") as output:
        popen = subprocess.Popen(
            command,
            stdin=subprocess.PIPE if pipes else subprocess.DEVNULL,
            stdout=subprocess.PIPE if pipes else output,
            stderr=output,
            env={**os.environ, **(env or {})},
            cwd=cwd,
            start_new_session=True,
        )
    return Child(name=name, popen=popen, log=log, cores=tuple(cores))


@contextlib.contextmanager
def stopping(*children: Child) -> Iterator[None]:
    """End the children on the way out, in reverse order."""
    try:
        yield
    finally:
        for child in reversed(children):
            child.stop()


def pin(pids: Sequence[int], core: int) -> None:
    """Pin every thread of these processes to one core."""
    for pid in pids:
        for task in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(ProcessLookupError):
                os.sched_setaffinity(int(task.name), {core})


def free_port() -> int:
    """A port on 127.0.0.1 that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def http_status(port: int, request: bytes, *, timeout_s: float = 2.0) -> int | None:
    """Status of one raw request on a fresh connection; ``None``: no answer."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=timeout_s) as peer:
            peer.sendall(request)
            return int(peer.recv(64).split(b" ", 2)[1])
    except (OSError, ValueError, IndexError):
        return None


def wait_ready(child: Child, port: int, request: bytes, *, limit_s: float = 30.0) -> None:
    """Return when ``request`` is answered with 200; :class:`NotReadyError` after ``limit_s``."""
    deadline_s = time.monotonic() + limit_s
    status = None
    while time.monotonic() < deadline_s:
        if child.popen.poll() is not None:
            break
        status = http_status(port, request)
        if status == 200:
            return
        time.sleep(0.01)
    state = "ended" if child.popen.poll() is not None else f"last answer: {status}"
    raise NotReadyError(
        f"{child.name} not ready after {limit_s:.0f} s ({state})\n{child.log_tail()}"
    )
