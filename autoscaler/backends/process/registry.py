"""The record on disk of the processes Tidegate owns, so that the next one can end what is left."""

from __future__ import annotations

import fcntl
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

from autoscaler.backends.base import StateInUse
from autoscaler.backends.process.procs import ProcessId

RECORD_ID = re.compile(r"[A-Za-z0-9._-]{1,200}")
VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessRecord:
    """The processes of one replica. ``mark`` is in the environment of all of them."""

    replica_id: str
    boot_id: str
    leader: ProcessId
    mark: str
    members: frozenset[ProcessId] = frozenset()


class ProcessRegistry:
    """One file per replica, replaced as a whole, in a directory only one Tidegate may own."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._lock: int | None = None

    def claim(self) -> None:
        """Become the owner of the directory. Raises ``StateInUse`` while another process is."""
        if self._lock is not None:
            return
        self._directory.mkdir(parents=True, exist_ok=True)
        lock = os.open(self._directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            raise StateInUse(
                f"{self._directory} belongs to another Tidegate that is running; "
                "give this one its own state_dir"
            ) from None
        except BaseException:
            os.close(lock)
            raise
        self._lock = lock

    def release(self) -> None:
        """Give the directory up; nothing to do for one that is not ours."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def write(self, record: ProcessRecord) -> None:
        """Put a record on disk, in place of the replica's earlier one; whole, or not at all."""
        path = self._path(record.replica_id)
        text = json.dumps(
            {
                "version": VERSION,
                "replica_id": record.replica_id,
                "boot_id": record.boot_id,
                "leader": [record.leader.pid, record.leader.start_ticks],
                "mark": record.mark,
                "members": [[one.pid, one.start_ticks] for one in sorted(record.members)],
            }
        )
        # Not synced to disk: a record is of use only until the next boot.
        draft = path.with_suffix(".new")
        draft.write_text(text)
        draft.replace(path)

    def remove(self, replica_id: str) -> None:
        """Forget a replica's processes."""
        self._path(replica_id).unlink(missing_ok=True)

    def read(self) -> list[ProcessRecord]:
        """All records. A file that is none (cut short by a full disk) is renamed ``*.unread``."""
        records = []
        for path in sorted(self._directory.glob("*.json")):
            try:
                records.append(parse_record(path.read_text()))
            except (ValueError, KeyError, TypeError):
                path.replace(path.with_suffix(".unread"))
        return records

    def _path(self, replica_id: str) -> Path:
        if not RECORD_ID.fullmatch(replica_id):
            raise ValueError(f"{replica_id!r} cannot be the id of a replica")
        return self._directory / f"{replica_id}.json"


def parse_record(text: str) -> ProcessRecord:
    """A record from its file's text. Raises ``ValueError``, ``KeyError`` or ``TypeError``."""
    fields = json.loads(text)
    if fields["version"] != VERSION:
        raise ValueError(f"a record of version {fields['version']} cannot be read")
    return ProcessRecord(
        replica_id=str(fields["replica_id"]),
        boot_id=str(fields["boot_id"]),
        leader=ProcessId(*map(int, fields["leader"])),
        mark=str(fields["mark"]),
        members=frozenset(ProcessId(*map(int, pair)) for pair in fields["members"]),
    )
