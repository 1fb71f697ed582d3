"""One step's process: started, watched, logged, ended when it takes too long or is cancelled."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from modelcache.ports import IsCancelled, OnProgress
from modelcache.store.files import create, make_directory
from modelcache.types import CacheError, Cancelled, NoSpace, Progress

WATCH_S = 0.1
GRACE_S = 10.0
FAILURE_LINES = 12
LINE_CHARACTERS = 200


_PR_SET_PDEATHSIG = 1
NOT_STARTED = 127


class StepFailed(CacheError):
    """A step ended without its result; the message has its last lines and where its log is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepLimits:
    """What is looked at while a step runs, and when it has failed."""

    measure_s: float = 2.0
    """Between two looks at the sizes of its output and its log."""
    log_bytes: int = 16 * 1024 * 1024
    """A log longer than this loses its beginning."""
    log_tail_bytes: int = 1024 * 1024
    nearly_full_bytes: int = 64 * 1024 * 1024
    """What a disk may have left that a step has found full: less than its next write."""


DEFAULT_LIMITS = StepLimits()


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What is run: its name for people, the command, its whole environment, where its output and
    its log go, the seconds it may take, and descriptors (a lock's) it keeps open to its end.
    ``on_size`` gets the size of the output now and then; what it raises ends the step.
    ``free_bytes`` says what the output's disk has left, of which ``reserve_bytes`` stay free."""

    name: str
    argv: tuple[str, ...]
    env: Mapping[str, str]
    log: Path
    output: Path
    timeout_s: float
    free_bytes: Callable[[], int]
    reserve_bytes: int
    hold: tuple[int, ...] = ()
    on_size: Callable[[int], None] = lambda size_bytes: None
    limits: StepLimits = DEFAULT_LIMITS


def run_step(run: Run, *, on_progress: OnProgress, cancelled: IsCancelled) -> None:
    """Run it to its end. Raises ``StepFailed`` with its last lines, ``NoSpace`` where those say
    that a disk is full and its output's is, ``Cancelled``."""
    make_directory(run.log.parent)
    guard = [
        sys.executable, "-I", "-m", "modelcache.prepare.step_process",
        str(os.getpid()), str(GRACE_S),
    ]  # fmt: skip
    with open(create(run.log, os.O_APPEND), "ab") as log:
        log.write(f"\n$ {' '.join(run.argv)}\n".encode())
        log.flush()
        process = subprocess.Popen(
            [*guard, *run.argv], stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
            env=dict(run.env), cwd=run.output, start_new_session=True,
            pass_fds=run.hold,
        )  # fmt: skip
        try:
            _watch(process, run, on_progress, cancelled)
        finally:
            # Nothing may go on writing where the next try will.
            if process.poll() is None:
                process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(2 * GRACE_S)
                if process.poll() is None:
                    process.kill()
                    process.wait()
    if process.returncode != 0:
        raise _explain(run, process.returncode)


def _watch(
    process: subprocess.Popen[bytes],
    run: Run,
    on_progress: OnProgress,
    cancelled: IsCancelled,
) -> None:
    began_s = measured_s = time.monotonic()
    size = 0
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(WATCH_S)
            return
        now_s = time.monotonic()
        if cancelled():
            raise Cancelled(f"{run.name} was cancelled")
        if now_s - began_s > run.timeout_s:
            raise StepFailed(f"{run.name} took longer than {run.timeout_s:g} s; log: {run.log}")
        if now_s - measured_s >= run.limits.measure_s:
            measured_s, size = now_s, bytes_under(run.output)
            _bound(run.log, run.limits)
            run.on_size(size)
        line = next(reversed(_tail(run.log, 4096)), "")
        on_progress(
            Progress(phase="preparing", bytes_done=size, detail=f"{run.name}: {line}".rstrip(": "))
        )


def _explain(run: Run, code: int) -> StepFailed | NoSpace:
    """Why it has failed. What it says of a full disk may be of any (``/tmp``, ``/dev/shm``)."""
    failure = _failure(run, code)
    if os.strerror(errno.ENOSPC) not in failure:
        return StepFailed(failure)
    free_bytes = run.free_bytes()
    if free_bytes <= max(run.reserve_bytes, run.limits.nearly_full_bytes):
        return NoSpace(f"the disk of {run.output} is full ({free_bytes} bytes free): {failure}")
    return StepFailed(
        f"{run.name} says that a disk is full, perhaps that of its temporary files; the disk of "
        f"{run.output} has {free_bytes} bytes free: {failure}"
    )


def _failure(run: Run, code: int) -> str:
    how = f"signal {code - 128}" if code > 128 else f"exit code {code}"
    lines = "\n".join(f"    {line}" for line in _tail(run.log, 65_536)[-FAILURE_LINES:])
    return f"{run.name} failed ({how}):\n{lines}\n  log: {run.log}"


def _tail(log: Path, length: int) -> list[str]:
    """The last lines that say something; a bar redrawn in place counts as its newest state."""
    with log.open("rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - length))
        text = file.read().decode(errors="replace")
    lines = [line.rpartition("\r")[2].strip() for line in re.split(r"\n", text)]
    return [line[:LINE_CHARACTERS] for line in lines if line and not line.startswith("$ ")]


def _bound(log: Path, limits: StepLimits) -> None:
    """Cut a log that has grown too long; its writer appends, so what comes next follows."""
    if log.stat().st_size <= limits.log_bytes:
        return
    with log.open("r+b") as file:
        file.seek(-limits.log_tail_bytes, os.SEEK_END)
        tail = file.read()
        file.truncate(0)
        file.seek(0)
        file.write(b"[the beginning was cut off]\n" + tail)


def bytes_under(folder: Path) -> int:
    """The bytes of all files below a folder, which may change meanwhile."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.stat(os.path.join(parent, name), follow_symlinks=False).st_size
    return total


class _End(BaseException):
    """We were told to end."""


def main(arguments: Sequence[str]) -> int:
    """Run the command to its end, or to ours, or to that of the process that started us."""
    parent, grace_s, argv = int(arguments[0]), float(arguments[1]), list(arguments[2:])

    def end(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise _End

    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    process = None
    try:
        if os.getppid() != parent:
            return 128 + signal.SIGTERM  # It died before it could be noticed.
        process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, process_group=0)
        code = process.wait()
    except OSError as error:
        sys.stderr.write(f"cannot start {argv[0]}: {error.strerror}\n")
        return NOT_STARTED
    except _End:
        code = -signal.SIGTERM
    if process is not None:
        # What the command left running in its group ends with it.
        _end_group(process, grace_s)
    return code if code >= 0 else 128 - code


def _end_group(process: subprocess.Popen[bytes], grace_s: float) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(grace_s)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
