"""Pools whose model is a hub's ``org/name``: fetched into the model cache, as their URL would be.

Engines can fetch such a model themselves. Then it is fetched once for each place they keep it in,
by one connection after the other, and none of what the cache knows (pages, leases, quota, peers, a
fork server whose engines need no hub) is there for it.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from autoscaler.settings import PoolSettings
from gateway.settings.schema import Settings
from loaders.engines.base import engine_of
from modelcache.refs import parse_ref


def has_hub() -> bool:
    """Whether what reads a hub is installed."""
    return find_spec("huggingface_hub") is not None


def through_cache(
    settings: Settings,
    *,
    can_read: Callable[[], bool] = has_hub,
    is_directory: Callable[[str], bool] = lambda name: Path(name).is_dir(),
) -> Settings:
    """Settings in which such a pool names its model by ``hf://``; the same where there is none.

    Left alone are names of directories that exist, pools whose engine fetches its model itself, and
    all of them where the settings say so or nothing reads a hub.
    """
    if not settings.modelcache.hub_names:
        return settings
    pools = [_through_cache(pool, settings, is_directory) for pool in settings.pools]
    if tuple(pools) == settings.pools or not can_read():
        return settings
    return settings.model_copy(update={"pools": tuple(pools)})


def _through_cache(
    pool: PoolSettings, settings: Settings, is_directory: Callable[[str], bool]
) -> PoolSettings:
    model = pool.model or ""
    if "://" in model or is_directory(model):
        return pool
    if engine_of(pool.engine).fetches_model(pool.engine_args, pool.env, settings.loaders):
        return pool
    try:
        ref = parse_ref(model)
    except ValueError:
        return pool  # a name that the engine knows
    if ref.scheme != "hf" or ref.location.count("/") != 1:
        return pool
    revision = "" if ref.revision is None else f"@{ref.revision}"
    return pool.model_copy(update={"model": f"{ref.url}{revision}"})
