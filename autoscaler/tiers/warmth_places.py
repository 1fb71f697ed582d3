"""What ``warmth`` knows of each pool's model and each replica: where it is, and what holds it."""

from __future__ import annotations

import asyncio
import threading
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from autoscaler.settings import PoolSettings
from modelcache.refs import parse_ref
from modelcache.store.lookup import CachedModel
from modelcache.types import Cancelled, ModelRef

Entered = TypeVar("Entered")


class Leases:
    """What is held together until it is closed, in parts that may be closed before. Thread-safe.

    A thread cannot be called off while it takes a lease. One that comes with it too late, because
    nobody waits any more, finds these closed, and what it has brought is released at once.
    """

    def __init__(self, whole: Leases | None = None) -> None:
        self._lock = threading.Lock()
        self._closed = False
        self._held: list[AbstractContextManager[Any]] = []
        self._parts: set[Leases] = set()
        self._whole = whole

    def part(self) -> Leases:
        """Leases that are closed with these, unless they are before."""
        part = Leases(self)
        with self._lock:
            part._closed = self._closed
            if not self._closed:
                self._parts.add(part)
        return part

    def enter(self, context: AbstractContextManager[Entered]) -> Entered:
        """Enter it, and hold it until ``close``. Blocks as long as that takes. Raises
        ``Cancelled``, with nothing held, where these are closed by then."""
        entered = context.__enter__()
        with self._lock:
            if not self._closed:
                self._held.append(context)
                return entered
        context.__exit__(None, None, None)
        raise Cancelled("nobody waits for it any more")

    def refuse(self) -> bool:
        """Hold nothing more; whether there is something for ``close`` to release. Does not
        block."""
        with self._lock:
            self._closed = True
            parts, holds = tuple(self._parts), bool(self._held)
        for part in parts:
            holds |= part.refuse()
        return holds

    def close(self) -> None:
        """Release all of it, and hold nothing any more. Blocks."""
        with self._lock:
            self._closed = True
            parts, self._parts = self._parts, set()
            held, self._held = self._held, []
        if self._whole is not None:
            self._whole._forget(self)
        with ExitStack() as stack:  # one that cannot be released does not keep the others
            for context in held:
                stack.push(context)
            for part in parts:
                stack.callback(part.close)

    def _forget(self, part: Leases) -> None:
        with self._lock:
            self._parts.discard(part)


@dataclass(slots=True, kw_only=True, eq=False)
class Place:
    """Where one pool's model is on this node. ``ref`` is set where it has a URL. ``model`` is what
    the cache has of it, or the directory that is used where it lies; ``made`` what its preparation
    steps have made, after the path they began from."""

    pool: PoolSettings
    slug: str
    ref: ModelRef | None
    leases: Leases
    """What is held for the pool at zero."""
    model: Any = None
    made: tuple[Path, Any] | None = None
    kept: bool = False
    standby: bool = False
    paging: asyncio.Lock = field(default_factory=asyncio.Lock)
    """One at a time brings its pages in: who is called off lets go of what is kept."""

    @property
    def path(self) -> Path | None:
        """Where the model is as it was fetched."""
        return None if self.model is None else Path(self.model.path)


@dataclass(slots=True, kw_only=True, eq=False)
class Hold:
    """What one replica keeps from going: its model, which is at ``leased``, and what preparation
    steps have made of it. Both are parts of ``leases``."""

    leases: Leases
    model: Leases = field(init=False)
    leased: Path | None = None
    made: Leases = field(init=False)
    paging: asyncio.Task[None] | None = None

    def __post_init__(self) -> None:
        self.model, self.made = self.leases.part(), self.leases.part()


def make_place(pool: PoolSettings, slug: str, leases: Leases) -> Place:
    """Where a pool's model may be, before anybody has looked."""
    model = pool.model or ""
    ref = parse_ref(model) if "://" in model else None
    return Place(pool=pool, slug=slug, ref=ref, leases=leases)


def in_place(directory: Path) -> CachedModel:
    """A directory that is used where it lies, as the cache has it."""
    url = str(directory.absolute())
    return CachedModel(url=url, revision="in place", path=directory, manifest=None)
