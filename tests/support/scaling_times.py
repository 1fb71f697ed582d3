"""What tests scaled on a control plane, through what, and how long that took."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass
class ScalingTimes:
    """A table, printed at the end of a run."""

    rows: list[tuple[str, str, float]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What else was seen, a line each."""

    def since_now(self, what: str, through: str) -> Callable[[], None]:
        """To be called when it has happened."""
        begun_s = time.monotonic()
        return lambda: self.rows.append((what, through, time.monotonic() - begun_s))

    def lines(self) -> list[str]:
        """The table."""
        rows = [f"{what:44}{through:48}{took_s:7.2f} s" for what, through, took_s in self.rows]
        return rows + self.notes
