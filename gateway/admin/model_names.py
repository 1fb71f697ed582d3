"""What people call a model: a URL, a hub's ``org/name``, a directory, or the name of a pool.

Pools are those of whoever is asked, so that a name means the same as in a request to it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from modelcache.refs import PATH, parse_ref
from modelcache.types import PREPARED

if TYPE_CHECKING:
    from gateway.settings.schema import Settings


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolModel:
    """A pool as far as its model has to be found: its names, and what its settings say."""

    names: tuple[str, ...]
    model: str | None
    simulated: bool = False
    elsewhere: bool = False
    """Its engines are run by somebody else."""


def pools_of(settings: Settings) -> tuple[PoolModel, ...]:
    """The pools of the settings."""
    return tuple(
        PoolModel(
            names=(pool.name, *pool.aliases),
            model=pool.model,
            simulated=pool.engine == "simulated",
            elsewhere=pool.backend == "static",
        )
        for pool in settings.pools
    )


def names_of(pools: Iterable[PoolModel]) -> list[str]:
    """Every name that stands for a pool."""
    return [name for pool in pools for name in pool.names]


def find_model(
    text: str, revision: str | None, pools: Sequence[PoolModel]
) -> tuple[str, str | None]:
    """The canonical URL (or the path) that is meant, and the revision that was named.

    A pool comes before all else, for its name may look like a hub's. A directory has to be written
    as a path (``/…``, ``./…``). Raises ``ValueError`` for what is none of these.
    """
    text = text.strip()
    if not text:
        raise ValueError("model: it is empty")
    if text.startswith(f"{PREPARED}://"):
        return text, revision
    pool = next((one for one in pools if text in one.names), None)
    if pool is not None:
        return _model_of(pool, text, revision)
    try:
        return _read(text, revision)
    except ValueError as error:
        if "://" in text or text.startswith(("/", "./", "../", "~")) or "neither" not in str(error):
            raise
        known = ", ".join(one.names[0] for one in pools) or "none"
        raise ValueError(f"{error}, nor a pool (known here: {known})") from None


def _model_of(pool: PoolModel, name: str, revision: str | None) -> tuple[str, str | None]:
    """The model of a pool."""
    model = pool.model or ""
    here = Path(model).expanduser()
    if model and "://" not in model and here.is_dir():
        return _read(os.path.abspath(here), revision)
    try:
        parse_ref(model)
    except ValueError:
        if pool.simulated:
            raise ValueError(f"model: pool {name!r} is simulated: it has no weights") from None
        if pool.elsewhere:
            why = "somebody else runs its engines, so the cache has nothing of it"
        else:
            why = f"its model {model!r} is neither a directory here nor one that can be fetched"
        raise ValueError(f"model: pool {name!r}: {why}") from None
    return _read(model, revision)


def _read(text: str, revision: str | None) -> tuple[str, str | None]:
    ref = parse_ref(text, revision)
    if ref.scheme == PATH:
        return os.path.abspath(Path(text).expanduser()), None
    return ref.url, ref.revision
