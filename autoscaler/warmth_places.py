"""What ``warmth`` knows of each pool's model and each replica: where it is, and what holds it."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from autoscaler.settings import PoolSettings
from modelcache.refs import parse_ref
from modelcache.types import ModelRef


@dataclass(slots=True, kw_only=True, eq=False)
class Place:
    """Where one pool's model is on this node. ``ref`` is set where it has a URL. ``path`` is where
    the model is, ``made`` what its preparation steps have made, after what they began from."""

    pool: PoolSettings
    slug: str
    ref: ModelRef | None
    path: Path | None = None
    made: tuple[Path, Any] | None = None
    kept: bool = False
    standby: bool = False
    paging: asyncio.Lock = field(default_factory=asyncio.Lock)
    """One at a time brings its pages in: who is called off lets go of what is kept."""
    lease: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)


@dataclass(slots=True, kw_only=True, eq=False)
class Hold:
    """What one replica keeps from going."""

    lease: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    leased: Path | None = None
    made: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    """What preparation steps have made for it, leased too."""
    paging: asyncio.Task[None] | None = None

    def let_go(self) -> None:
        """Keep nothing any more. Blocks."""
        self.made.close()
        self.lease.close()


def make_place(pool: PoolSettings, slug: str) -> Place:
    """Where a pool's model may be, before anybody has looked."""
    model = pool.model or ""
    ref = parse_ref(model) if "://" in model else None
    return Place(pool=pool, slug=slug, ref=ref)
