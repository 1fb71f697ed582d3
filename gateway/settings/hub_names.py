"""Pools whose model is a hub's ``org/name``: fetched into the model cache, as their URL would be.

Engines can fetch such a model themselves. Then it is fetched once for each place they keep it in,
by one connection after the other, and none of what the cache knows (pages, leases, quota, peers, a
fork server whose engines need no hub) is there for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

from autoscaler.settings import PoolSettings
from gateway.settings.schema import Settings
from loaders.engines.vllm.command import read_flags
from modelcache.refs import parse_ref

THEIR_OWN = frozenset(
    {
        *("--revision", "--code-revision", "--tokenizer-revision", "--download-dir"),
        # These may name another repository of the hub: whoever has its model here is offline.
        *("--tokenizer", "--hf-config-path", "--lora-modules", "--speculative-config", "--config"),
        *("--hf-token", "--hf-overrides", "-sc"),
    }
)
"""Arguments by which an engine is told what to fetch, from where, or where to keep it: then it
does."""

OTHERS_FORMATS = frozenset({"dummy", "pt", "npcache"})
"""Load formats that make weights up, or want files which are not fetched beside safetensors."""

THEIR_ENVIRONMENT = ("HF_", "HUGGING_FACE_", "TRANSFORMERS_", "VLLM_USE_MODELSCOPE", "MODELSCOPE_")
"""What variables begin with that say where a hub is and who asks it. Set for a pool alone, the
cache does not see them."""


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

    Left alone are simulated engines, names of directories that exist, pools whose arguments or
    environment say what is fetched or how, and all of them where the settings say so or nothing
    reads a hub.
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
    if pool.engine != "vllm" or "://" in model or is_directory(model):
        return pool
    if _fetches_itself(pool.engine_args, settings.loaders.load_format):
        return pool
    if any(name.startswith(THEIR_ENVIRONMENT) for name in pool.env):
        return pool
    try:
        ref = parse_ref(model)
    except ValueError:
        return pool  # a name that the engine knows
    if ref.scheme != "hf" or ref.location.count("/") != 1:
        return pool
    revision = "" if ref.revision is None else f"@{ref.revision}"
    return pool.model_copy(update={"model": f"{ref.url}{revision}"})


def _fetches_itself(args: Sequence[str], load_format: str) -> bool:
    for name, *values in read_flags(args):
        if name.partition(".")[0] in THEIR_OWN:  # --speculative-config.model
            return True
        if name == "--load-format" and values:
            load_format = values[0]
    return load_format in OTHERS_FORMATS
