"""One small JSON file of the control process in ``state_dir``, replaced as a whole."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Generic, TypeVar

from pydantic import BaseModel

from modelcache.store.files import write_whole

LOG = logging.getLogger("tidegate.autoscaler")

Kept = TypeVar("Kept", bound=BaseModel)


class StateFile(Generic[Kept]):
    """A file that has one ``model``. ``path`` unset: nothing is kept on disk. ``what`` says, for
    the log, what it means that it cannot be read."""

    def __init__(self, path: Path | None, model: type[Kept], what: str) -> None:
        self._path = path
        self._model = model
        self._what = what
        self._writing = asyncio.Lock()

    def read(self) -> Kept | None:
        """What is on disk; ``None`` where there is nothing that can be read."""
        if self._path is None:
            return None
        try:
            return self._model.model_validate_json(self._path.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            LOG.warning("%s is not read (%s): %s", self._path, error, self._what)
            return None

    async def write(self, kept: Kept) -> None:
        """Replace the file, in a thread; several in the order of the calls. Raises ``OSError``."""
        if self._path is None:
            return
        text = kept.model_dump_json(indent=1) + "\n"
        async with self._writing:
            await asyncio.to_thread(write_whole, self._path, text.encode(), tmp=self._path.parent)
