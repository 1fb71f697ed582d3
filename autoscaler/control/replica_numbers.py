"""The numbers in replicas' ids: none is given twice, over restarts either.

Logs, metrics and records of an earlier run are told from those of this one by the ids. One small
JSON file, replaced as a whole; where it cannot be read, numbers begin at 1.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from modelcache.store.files import write_whole

LOG = logging.getLogger("tidegate.autoscaler")
MOST_DIGITS = 15


class ReplicaNumbersFile(BaseModel):
    """What is kept on disk."""

    model_config = ConfigDict(strict=True)

    numbers: dict[str, Annotated[int, Field(ge=0, le=1 << 53)]]


class ReplicaNumbers:
    """The last numbers given, by slug, of pools that are gone too: so no id is used twice,
    whichever pools come and go. ``path`` unset: nothing is kept on disk."""

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._last: Counter[str] = Counter()
        self._saving = asyncio.Lock()
        self.are_new = False
        """Whether ``save`` has something to write. What it could not write waits for the next."""

    def load(self) -> None:
        """Take in what is on disk, if it can be read."""
        if self._path is None:
            return
        try:
            found = ReplicaNumbersFile.model_validate_json(self._path.read_bytes())
        except FileNotFoundError:
            return
        except (OSError, ValueError) as error:
            LOG.warning("%s is not read (%s); replicas are numbered anew", self._path, error)
            return
        self._last = Counter(found.numbers)

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
        """Replace the file, in a thread. Raises ``OSError``."""
        self.are_new = False
        if self._path is None:
            return
        async with self._saving:  # or an older text could replace a newer one
            text = ReplicaNumbersFile(numbers=dict(self._last)).model_dump_json(indent=1) + "\n"
            await asyncio.to_thread(write_whole, self._path, text.encode(), tmp=self._path.parent)
