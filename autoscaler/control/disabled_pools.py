"""Which pools an operator has taken out of service, kept over restarts.

One small JSON file, replaced as a whole. One that cannot be read disables nothing: its pools are
served, and the log says so.
"""

from __future__ import annotations

import logging
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from modelcache.store.files import write_whole

LOG = logging.getLogger("tidegate.autoscaler")


class DisabledPoolsFile(BaseModel):
    """What is kept on disk."""

    model_config = ConfigDict(strict=True)

    pools: list[str]


class DisabledPools:
    """The names of the pools that are out of service, of those too that the settings do not have
    now. ``path`` unset: nothing is kept on disk."""

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._names: set[str] = set()

    def __contains__(self, pool: str) -> bool:
        return pool in self._names

    def load(self) -> None:
        """Take in what is on disk, if it can be read."""
        if self._path is None:
            return
        try:
            found = DisabledPoolsFile.model_validate_json(self._path.read_bytes())
        except FileNotFoundError:
            return
        except (OSError, ValueError) as error:
            LOG.warning("%s is not read (%s): no pool is disabled", self._path, error)
            return
        self._names = set(found.pools)

    def set(self, pool: str, *, disabled: bool) -> None:
        """Take a pool out of service, or back; written to disk first. Raises ``OSError``, and then
        nothing has changed."""
        names = self._names | {pool} if disabled else self._names - {pool}
        if self._path is not None:
            text = DisabledPoolsFile(pools=sorted(names)).model_dump_json(indent=1) + "\n"
            write_whole(self._path, text.encode(), tmp=self._path.parent)
        self._names = names
