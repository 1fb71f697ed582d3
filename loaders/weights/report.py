"""What a load took: bytes, seconds, and how fast each stage was while it ran."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One stage over all threads: ``busy_s`` is the sum of what each spent in it."""

    name: str
    size_bytes: int
    busy_s: float

    @property
    def gb_s(self) -> float | None:
        """GB (10⁹ bytes) a second of one thread in it; ``None`` where it did nothing."""
        return self.size_bytes / self.busy_s / 1e9 if self.busy_s > 0 else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """One load. ``size_bytes`` is what was read, ``tensor_bytes`` what tensors were made of;
    ``direct_bytes`` went past the page cache, ``verified_bytes`` agreed with their checksums."""

    seconds: float
    files: int
    tensors: int
    size_bytes: int
    tensor_bytes: int
    direct_bytes: int
    verified_bytes: int
    threads: int
    staging_bytes: int
    """Host memory beyond the tensors themselves: the staging ring, threads' scratch."""
    pinned: bool
    """Whether the staging ring is locked for the GPU."""
    stages: tuple[Stage, ...]

    @property
    def gb_s(self) -> float:
        """GB a second from the first open to the last tensor."""
        return self.size_bytes / self.seconds / 1e9 if self.seconds > 0 else 0.0

    def __str__(self) -> str:
        busy = ", ".join(
            f"{stage.name} {stage.gb_s:.1f} GB/s a thread"
            for stage in self.stages
            if stage.gb_s is not None and stage.size_bytes
        )
        return (
            f"{self.tensors} tensors, {self.size_bytes / 1e9:.2f} GB from {self.files} files in "
            f"{self.seconds:.2f} s ({self.gb_s:.2f} GB/s; {self.threads} threads; {busy})"
        )


@dataclass(slots=True, kw_only=True)
class Tally:
    """What one thread counts for itself, so that none waits for another to count."""

    cached_bytes: int = 0
    cached_s: float = 0.0
    direct_bytes: int = 0
    direct_s: float = 0.0
    verified_bytes: int = 0
    verify_s: float = 0.0
    copied_bytes: int = 0
    copy_s: float = 0.0
    waited_s: float = 0.0

    @classmethod
    def sum(cls, tallies: Iterable[Tally]) -> Tally:
        """All of them together."""
        total = cls()
        for tally in tallies:
            for one in fields(cls):
                setattr(total, one.name, getattr(total, one.name) + getattr(tally, one.name))
        return total

    def stages(self) -> tuple[Stage, ...]:
        """The stages bytes passed through. ``wait`` is for memory, room or a turn."""
        return (
            Stage(name="read", size_bytes=self.cached_bytes, busy_s=self.cached_s),
            Stage(name="read past the cache", size_bytes=self.direct_bytes, busy_s=self.direct_s),
            Stage(name="verify", size_bytes=self.verified_bytes, busy_s=self.verify_s),
            Stage(name="copy", size_bytes=self.copied_bytes, busy_s=self.copy_s),
            Stage(name="wait", size_bytes=0, busy_s=self.waited_s),
        )
