"""Which pools an operator has taken out of service, kept over restarts."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict

from autoscaler.state_file import StateFile


class DisabledPoolsFile(BaseModel):
    """What is kept on disk."""

    model_config = ConfigDict(strict=True)

    pools: list[str]


class DisabledPools:
    """The names of the pools that are out of service, of those too that the settings do not have
    now; those on disk at first. ``path`` unset: nothing is kept on disk."""

    def __init__(self, path: Path | None = None) -> None:
        self._file = StateFile(path, DisabledPoolsFile, "no pool is disabled")
        found = self._file.read()
        self._names = set() if found is None else set(found.pools)

    def __contains__(self, pool: str) -> bool:
        return pool in self._names

    def set(self, pool: str, *, disabled: bool) -> None:
        """Take a pool out of service, or back."""
        (self._names.add if disabled else self._names.discard)(pool)

    async def save(self) -> None:
        """Keep them on disk. Raises ``OSError``."""
        await self._file.write(DisabledPoolsFile(pools=sorted(self._names)))
