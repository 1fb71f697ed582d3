"""Long commands with something to look at: what is being done, for how long, how large it grows."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

LIVE_INTERVAL_S = 0.25
PLAIN_INTERVAL_S = 10.0
PLAIN_COLUMNS = 120
STOP_GRACE_S = 10.0
TAIL_BYTES = 8192
FAILURE_LINES = 15

PIP_PHRASES = (
    (re.compile(r"\s*Processing (?:\S*/)?([^/\s]+)"), "preparing: {0}"),
    (re.compile(r"\s*Collecting (\S+?)[\s(]"), "looking for {0}"),
    (re.compile(r"\s*Downloading (?:\S+/)?([^/\s]+) \(([^)]+)\)"), "downloading {0} ({1})"),
    (re.compile(r"\s*Using cached (?:\S+/)?([^/\s]+)"), "from the cache: {0}"),
    (re.compile(r"\s*Requirement already satisfied: (\S+)"), "there already: {0}"),
    (re.compile(r"\s*Installing collected packages: (.+)"), "installing {count} packages"),
    (
        re.compile(r"\s*(?:Attempting uninstall|Found existing|Uninstalling|Successfully un)(.*)"),
        "replacing a package by the one that is wanted",
    ),
    (re.compile(r"\s*Successfully installed (.+)"), "checking every file"),
    (re.compile(r"\s*(?:Installing|Getting|Preparing|Building) (.+)"), "preparing: {0}"),
)

PIP_NOISE = ("WARNING:", "[notice]", "$ ", "  WARNING:")


class StepFailed(Exception):
    """A step's command ended with an error; the message has its last lines and its log."""


class Display:
    """One line that is rewritten on a terminal, and a line now and then anywhere else."""

    def __init__(self) -> None:
        self._live = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
        self._shown = ""
        self._shown_at_s = time.monotonic()

    def update(self, text: str) -> None:
        """Show ``text`` as the present state."""
        now_s = time.monotonic()
        if self._live:
            width = shutil.get_terminal_size().columns - 1
            sys.stdout.write("\r\x1b[2K" + text[:width])
            sys.stdout.flush()
        elif text != self._shown and now_s - self._shown_at_s >= PLAIN_INTERVAL_S:
            self._shown, self._shown_at_s = text, now_s
            say(text[:PLAIN_COLUMNS])

    def finish(self, text: str) -> None:
        """Replace the state by a line that stays."""
        if self._live:
            sys.stdout.write("\r\x1b[2K")
        say(text)

    def clear(self) -> None:
        """Leave an empty line for the next writer."""
        if self._live:
            sys.stdout.write("\r\x1b[2K")
            sys.stdout.flush()


def say(text: str) -> None:
    """Write a line now, also into a pipe."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def run_shown(
    title: str,
    argv: Sequence[str],
    *,
    log: Path,
    env: Mapping[str, str],
    grows: Sequence[Path],
    hold: Sequence[int] = (),
    cwd: Path | None = None,
    describe: Callable[[str], str | None] | None = None,
) -> None:
    """Run ``argv`` to its end, showing elapsed time, its newest line and the growth of ``grows``.

    Its whole output goes to ``log``. ``hold`` are descriptors it keeps open: a lock held so lasts
    as long as the command does, even if we are killed. Raises ``StepFailed``. When we are
    interrupted the command is stopped first, so that nothing goes on writing behind our back.
    """
    display = Display()
    meter = _Meter(grows)
    began_s = time.monotonic()
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        output.write(f"\n$ {' '.join(argv)}\n".encode())
        output.flush()
        begins_at = output.tell()
        process = subprocess.Popen(
            argv, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=dict(env),
            pass_fds=tuple(hold), cwd=cwd,
        )  # fmt: skip
        try:
            while process.poll() is None:
                line = _newest(log, begins_at, describe or describe_pip)
                elapsed = duration_text(time.monotonic() - began_s)
                display.update(f"  {title}  {elapsed}  {meter.read()}  {line}")
                _wait(process, LIVE_INTERVAL_S)
        except BaseException:
            display.clear()
            stop(process)
            raise
    elapsed = duration_text(time.monotonic() - began_s)
    if process.returncode != 0:
        display.finish(f"  {title}  failed after {elapsed}")
        tail = _tail(log, begins_at).splitlines()[-FAILURE_LINES:]
        lines = "\n".join(f"    {line}" for line in tail)
        raise StepFailed(f"{title} failed (exit code {process.returncode}):\n{lines}\n  log: {log}")
    display.finish(f"  {title}  done in {elapsed}  {meter.read(fresh=True)}")


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a command that was interrupted: it has had the terminal's Ctrl-C already, then SIGTERM,
    then SIGKILL. A second Ctrl-C must not leave it behind, and is ignored from here on."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for send, grace_s in ((None, 2.0), (signal.SIGTERM, STOP_GRACE_S), (signal.SIGKILL, None)):
        if send is not None and process.poll() is None:
            process.send_signal(send)
        try:
            process.wait(grace_s)
            return
        except subprocess.TimeoutExpired:
            continue


def describe_pip(line: str) -> str | None:
    """What a line of pip's output says, in a few words; ``None`` for a line that says nothing."""
    for pattern, phrase in PIP_PHRASES:
        match = pattern.match(line + " ")
        if match:
            return phrase.format(*match.groups(), count=len(match[1].split(","))).strip()
    return None if line.startswith(PIP_NOISE) else line.strip() or None


def bytes_under(paths: Sequence[Path]) -> int:
    """Bytes that files under ``paths`` take on disk; what vanishes meanwhile is not counted."""
    total = 0
    pending = [str(path) for path in paths]
    while pending:
        try:
            with os.scandir(pending.pop()) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        pending.append(entry.path)
                    else:
                        total += entry.stat(follow_symlinks=False).st_blocks * 512
        except OSError:
            continue
    return total


def size_text(size_bytes: float) -> str:
    """``3.4 GB``, ``12 MB``."""
    if size_bytes >= 1e9:
        return f"{size_bytes / 1e9:.1f} GB"
    return f"{size_bytes / 1e6:.0f} MB"


def duration_text(elapsed_s: float) -> str:
    """``1:05``, minutes and seconds."""
    minutes, seconds = divmod(int(elapsed_s), 60)
    return f"{minutes}:{seconds:02}"


class _Meter:
    """Size on disk, looked at so seldom that looking costs a few per cent at most."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = paths
        self._bytes = 0
        self._next_s = 0.0

    def read(self, *, fresh: bool = False) -> str:
        began_s = time.monotonic()
        if fresh or began_s >= self._next_s:
            self._bytes = bytes_under(self._paths)
            now_s = time.monotonic()
            self._next_s = now_s + max(1.0, 20 * (now_s - began_s))
        return size_text(self._bytes)


def _wait(process: subprocess.Popen[bytes], timeout_s: float) -> None:
    try:
        process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        return


def _tail(log: Path, begins_at: int) -> str:
    with log.open("rb") as file:
        file.seek(max(begins_at, log.stat().st_size - TAIL_BYTES))
        return file.read().decode(errors="replace")


def _newest(log: Path, begins_at: int, describe: Callable[[str], str | None]) -> str:
    """The newest line that says something; a bar redrawn in place counts as its newest state."""
    for line in reversed(re.split(r"[\r\n]", _tail(log, begins_at))):
        told = describe(line)
        if told:
            return told
    return "working"
