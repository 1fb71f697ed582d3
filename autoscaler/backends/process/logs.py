"""An engine's log on disk: written by the engine itself, kept within its size by us.

The engine appends to a file, not to a pipe: a Tidegate that hangs or is killed can neither block
it nor break its output. Rotation copies the file and cuts it to nothing; since the engine appends,
its next line is at the new beginning. What it writes in the microseconds between the end of the
copy and the cut is lost, and of one that floods its log most is; that is the price of needing no
reader at the other end.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Sequence
from pathlib import Path

from modelcache.refs import redact
from modelcache.store.files import create, make_directory

TAIL_BYTES = 65_536
LINE_CHARACTERS = 1_000
PREFIX = re.compile(
    r"(?P<process>\([^()]* pid=\d+\)\s?)?"  # (EngineCore pid=987)
    r"((?P<level>DEBUG|INFO|WARNING|ERROR|CRITICAL)\s+)?"
    r"([\d/-]+[ T][\d:,.]+\s)?"  # 11-23 17:09:20
    r"(\[[\w./]+:\d+\]\s?)?"  # [compilation.py:317]
)
"""What logging writes before a message, of vLLM and of most others."""
CAUSE_CHARACTERS = 300
CONSEQUENCE = re.compile(
    r"^(EOFError|BrokenPipeError|Connection\w*Error|KeyboardInterrupt|SystemExit|\w*CancelledError)\b"
)
"""Errors that processes end with because another one has ended, or they were told to."""


class ReplicaLog:
    """The log files of one replica: ``NAME.log``, then ``NAME.log.1`` and older."""

    def __init__(
        self, path: Path, *, max_bytes: int, files: int, secrets: Sequence[str] = ()
    ) -> None:
        """``secrets`` are what the engine was given that must not be shown."""
        self.path = path
        self._secrets = tuple(secrets)
        self._max_bytes = max_bytes
        self._files = files

    def open(self) -> int:
        """A file descriptor that appends to the log; its owner closes it."""
        make_directory(self.path.parent)
        return create(self.path, os.O_APPEND)

    def rotate(self) -> bool:
        """Begin a new file if this one has reached its size; says whether it did."""
        try:
            if self.path.stat().st_size < self._max_bytes:
                return False
        except FileNotFoundError:
            return False
        for number in range(self._files - 2, 0, -1):
            with contextlib.suppress(FileNotFoundError):
                self._older(number).replace(self._older(number + 1))
        with self.path.open("rb+") as source:
            if self._files > 1:
                with open(create(self._older(1), os.O_TRUNC), "wb") as target:
                    self._copy_end(source.fileno(), target.fileno())
            source.truncate(0)
        return True

    def _copy_end(self, source: int, target: int) -> None:
        """Copy the last ``max_bytes`` of the file, and as much again of what is written meanwhile:
        an engine that writes as fast as this copies would have it go on for ever."""
        offset = max(0, os.fstat(source).st_size - self._max_bytes)
        end = offset + 2 * self._max_bytes
        while sent := os.sendfile(target, source, offset, min(1 << 20, end - offset)):
            offset += sent

    def _older(self, number: int) -> Path:
        return self.path.with_name(f"{self.path.name}.{number}")

    def tail(self, lines: int) -> list[str]:
        """The last lines that are not blank, oldest first, as they may be shown: without secrets,
        and cut to ``LINE_CHARACTERS``; none if there is no log."""
        try:
            with self.path.open("rb") as file:
                file.seek(max(0, os.fstat(file.fileno()).st_size - TAIL_BYTES))
                text = file.read(TAIL_BYTES).decode(errors="replace")
        except FileNotFoundError:
            return []
        said = [line.rstrip() for line in text.splitlines() if line.strip()][-lines:]
        return [redact(line[:LINE_CHARACTERS], self._secrets) for line in said]


def message_of(line: str) -> str:
    """A log line without what logging wrote before the message."""
    return line[match.end() :] if (match := PREFIX.match(line)) else line


def find_error(lines: Sequence[str], consequences: re.Pattern[str]) -> str:
    """The line of a log that says why its engine failed; empty where none is seen to.

    Errors that only say that another process has failed (``consequences``) are left out, if there
    are others, and so is all that a process writes when it ends. Of the errors of tracebacks the
    last is taken, else the last line that was logged as an error, or says "error:".
    """
    raised: list[str] = []
    logged: list[str] = []
    unfinished: dict[str, bool] = {}  # by process: a traceback has begun, and counts
    last: dict[str, str] = {}
    for line in lines:
        match = PREFIX.match(line)
        process, level = (match["process"] or "", match["level"]) if match else ("", None)
        message = line if match is None else line[match.end() :]
        if message.startswith("Traceback (most recent call last)"):
            unfinished[process] = not last.get(process, "").startswith("Exception ignored")
        elif process in unfinished:
            ends = bool(message[:1].strip())  # the first line that is not indented is the error
            if ends and unfinished.pop(process):
                raised.append(message)
        elif raised and last.get(process) == raised[-1] and message[:1].isspace():
            raised[-1] = f"{raised[-1]} {message.strip()}"  # pydantic says what in the next ones
            message = raised[-1]
        elif level in {"ERROR", "CRITICAL"} or re.search(r"\berror: ", message):
            logged.append(message)
        last[process] = message
    for found in (raised, logged):
        causes = [one for one in found if not (CONSEQUENCE.search(one) or consequences.search(one))]
        if causes or found:
            return make_printable((causes or found)[-1])[:CAUSE_CHARACTERS]
    return ""


def make_printable(text: str) -> str:
    """A text on one line, without control characters."""
    return " ".join("".join(one if one.isprintable() else " " for one in text).split())


def prune(directory: Path, *, keep: int, living: set[Path]) -> None:
    """Delete the logs of all but the ``keep`` newest replicas that are not living."""
    if not directory.is_dir():
        return
    ended = [path for path in directory.glob("*.log") if path not in living]
    ended.sort(key=modified_ns, reverse=True)
    for path in ended[keep:]:
        for part in directory.glob(f"{path.name}*"):
            part.unlink(missing_ok=True)


def modified_ns(path: Path) -> int:
    """When a file was last written; 0 for one that has gone meanwhile."""
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0
