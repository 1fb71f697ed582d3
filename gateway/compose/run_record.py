"""Where the Tidegate of a state directory listens, for the verbs that ask it something.

``up`` leaves a small record while it runs, so that ``tidegate status`` finds it whatever port it
was given, a port of the system's choice included.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

RECORD_NAME = "running.json"
AGENT_NAME = "agent.json"
"""The record of a cache agent, which may run beside a Tidegate."""
AGENT_LOCK = "agent.lock"


class ClaimError(Exception):
    """The state directory is another agent's that is running, or cannot be locked; the message
    says which."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    """One running Tidegate: its control process and its two listeners. An agent's ``url`` is where
    its peers are served."""

    pid: int
    url: str
    admin_url: str


def leave_record(state_dir: Path, running: Running, name: str = RECORD_NAME) -> None:
    """Write the record, whole or not at all. Raises ``OSError`` where it cannot be written."""
    state_dir.mkdir(parents=True, exist_ok=True)
    fresh = state_dir / f".{name}.{running.pid}"
    try:
        fresh.write_text(json.dumps(asdict(running)), encoding="utf-8")
        fresh.replace(state_dir / name)
    except OSError:
        with contextlib.suppress(OSError):
            fresh.unlink()
        raise


@contextlib.contextmanager
def claim_for_agent(state_dir: Path) -> Iterator[None]:
    """Be the one agent of a state directory meanwhile, as a Tidegate is by its registry.

    Raises ``ClaimError``. The lock goes with the process, however it ends.
    """
    with contextlib.ExitStack() as stack:
        try:
            lock = os.open(state_dir / AGENT_LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            stack.callback(os.close, lock)
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ClaimError(
                f"{state_dir} belongs to another cache agent that is running; "
                "give this one its own state_dir"
            ) from None
        except OSError as error:
            raise ClaimError(f"{state_dir} cannot be locked: {error.strerror or error}") from error
        yield


def read_record(state_dir: Path, name: str = RECORD_NAME) -> Running | None:
    """The Tidegate that runs with this state directory, ``None`` where none is known to."""
    try:
        found = json.loads((state_dir / name).read_text(encoding="utf-8"))
        running = Running(
            pid=int(found["pid"]), url=str(found["url"]), admin_url=str(found["admin_url"])
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return running if _alive(running.pid) else None


def find_running(state_dir: Path) -> Running | None:
    """The Tidegate that runs with this state directory, else the cache agent."""
    return read_record(state_dir) or read_record(state_dir, AGENT_NAME)


def remove_record(state_dir: Path, pid: int, name: str = RECORD_NAME) -> None:
    """Take the record away if it is still this process's own."""
    running = read_record(state_dir, name)
    if running is not None and running.pid == pid:
        with contextlib.suppress(OSError):
            (state_dir / name).unlink()


def _alive(pid: int) -> bool:
    if pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True  # it is there, another user's
    except OverflowError:
        return False
    return True
