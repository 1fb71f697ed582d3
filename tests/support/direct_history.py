"""What is learned of pools, in a real file, on virtual time: there are no threads on it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from direct_writer import DirectWriter
from virtual_time import wall_s

from autoscaler.control.learned_history import LearnedHistory, read_gaps, read_loads
from autoscaler.policy.capacity import LoadSample


class DirectHistory(LearnedHistory):
    """Reads and writes at once."""

    def __init__(self, path: Path) -> None:
        writer = DirectWriter(path, wall_s)
        self.store = writer.store
        super().__init__(store=self.store, writer=writer, wall_s=wall_s)  # type: ignore[arg-type]

    async def read_loads(self, setups: Mapping[str, str]) -> dict[str, tuple[LoadSample, ...]]:
        return self.store.transact(lambda connection: read_loads(connection, setups))

    async def read_gaps(self, pools: Iterable[str]) -> dict[str, bytes]:
        return self.store.transact(lambda connection: read_gaps(connection, tuple(pools)))
