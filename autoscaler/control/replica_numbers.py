"""The numbers in replicas' ids: none is given twice, over restarts either.

Logs, metrics and records of an earlier run are told from those of this one by the ids.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from autoscaler.state_file import StateFile

MOST_DIGITS = 15


class ReplicaNumbersFile(BaseModel):
    """What is kept on disk."""

    model_config = ConfigDict(strict=True)

    numbers: dict[str, Annotated[int, Field(ge=0, le=1 << 53)]]


class ReplicaNumbers:
    """The last numbers given, by slug, of pools that are gone too: so no id is used twice,
    whichever pools come and go. ``path`` unset: nothing is kept on disk."""

    def __init__(self, path: Path | None = None) -> None:
        self._file = StateFile(path, ReplicaNumbersFile, "replicas are numbered from 1")
        found = self._file.read()
        self._last: Counter[str] = Counter({} if found is None else found.numbers)
        self.are_new = False
        """Whether ``save`` has something to write. What it could not write waits for the next."""

    def make_id(self, slug: str) -> str:
        """The id of the next replica."""
        self._last[slug] += 1
        self.are_new = True
        return f"{slug}-{self._last[slug]}"

    def note(self, replica_id: str) -> None:
        """There is a replica of this id. Its slug may be another pool's now."""
        slug, _, number = replica_id.rpartition("-")
        if number.isdecimal() and len(number) < MOST_DIGITS:
            self._last[slug] = max(self._last[slug], int(number))
            self.are_new = True

    async def save(self) -> None:
        """Keep them on disk. Raises ``OSError``."""
        self.are_new = False
        await self._file.write(ReplicaNumbersFile(numbers=dict(self._last)))
