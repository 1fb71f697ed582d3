"""The whole tree of settings, composed of every package's section.

Loading them from defaults, file, environment and command line is ``gateway.settings.load``; each
section says itself what its values mean, which are allowed, and which contradict each other.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Iterator
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from autoscaler.adapters.settings import AdapterSettings
from autoscaler.settings import AutoscalerSettings, KubernetesSettings, PoolSettings
from gateway.datapath.settings import GatewaySettings
from loaders.engines.base import engine_of
from loaders.settings import LoaderSettings
from modelcache.refs import parse_ref, secret_arguments
from modelcache.settings import ModelCacheSettings
from router.settings import RouterSettings

LOOPBACK_NAMES = frozenset({"localhost", "ip6-localhost"})


class Settings(BaseModel):
    """Everything Tidegate can be told, as one immutable value."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    state_dir: Path = Path(".tidegate")
    """Directory for everything Tidegate writes: logs of the replicas, the record of its processes,
    wake times, which pools are disabled, the admin socket and token, and the model cache unless
    ``modelcache.dir`` is set. Created at start, by default in the working directory."""

    gateway: GatewaySettings = GatewaySettings()
    """The two listeners and the data path between clients and engines."""

    router: RouterSettings = RouterSettings()
    """How requests are sized and how much one replica is given."""

    autoscaler: AutoscalerSettings = AutoscalerSettings()
    """How many replicas a pool has, and how they are started, watched and stopped."""

    kubernetes: KubernetesSettings = KubernetesSettings()
    """The cluster that ``kubernetes`` pools are in."""

    loaders: LoaderSettings = LoaderSettings()
    """How engines are started."""

    modelcache: ModelCacheSettings = ModelCacheSettings()
    """Where weights are kept on this node, and what it may take for them."""

    adapter: AdapterSettings = AdapterSettings()
    """``tidegate adapter``: what HPA and KEDA ask, answered from what a running Tidegate says."""

    pools: tuple[PoolSettings, ...] = Field(default=(), max_length=1_000)
    """The models that are served, one pool of replicas each."""


def find_warnings(settings: Settings) -> Iterator[tuple[str, str]]:
    """What is allowed but probably not meant, each as (dotted path, what to think about)."""
    gateway = settings.gateway
    if not is_loopback(gateway.host):
        yield (
            "gateway.host",
            f"{gateway.host} is reachable from other machines, and clients are not authenticated; "
            "put a proxy that does it in front",
        )
    if not is_loopback(gateway.admin_host):
        yield (
            "gateway.admin_host",
            f"{gateway.admin_host} is reachable from other machines, and the admin listener has no "
            "TLS: the network sees its token; put TLS in front of it",
        )
    adapter = settings.adapter
    if not is_loopback(adapter.keda_host) and adapter.keda_client_ca is None:
        yield (
            "adapter.keda_host",
            f"{adapter.keda_host} is reachable from other machines, and KEDA is not authenticated: "
            "set keda_client_ca, or keep others away by a network policy",
        )
    if "*" in gateway.admin_allowed_hosts:
        yield (
            "gateway.admin_allowed_hosts",
            '"*" lets any web page that a local browser opens read the admin listener',
        )
    for index, pool in enumerate(settings.pools):
        if any(secret_arguments(pool.engine_args)):
            yield (
                f"pools.{index}.engine_args",
                "a secret is in there, and every user of the machine sees an engine's command "
                "line; give it by the pool's env (vLLM reads VLLM_API_KEY and HF_TOKEN)",
            )
    if not settings.pools and not settings.kubernetes.has_pools:
        yield "pools", "no pool is configured, so every request will be answered 404"


def is_loopback(host: str) -> bool:
    """Whether a listener bound to ``host`` can be reached from this machine only."""
    if host.lower() in LOOPBACK_NAMES:
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def through_cache(
    settings: Settings,
    *,
    is_directory: Callable[[str], bool] = lambda name: Path(name).is_dir(),
) -> Settings:
    """Settings in which a pool whose model is a hub's ``org/name`` names it by ``hf://``, so that
    it is fetched into the model cache; the same settings where there is none.

    Engines can fetch such a model themselves. Then it is fetched once for each place they keep it
    in, by one connection after the other, and none of what the cache knows (pages, leases, quota,
    peers, a fork server whose engines need no hub) is there for it.

    Left alone are names of directories that exist, pools whose engine fetches its model itself, and
    all of them where the settings say so.
    """
    if not settings.modelcache.hub_names:
        return settings
    pools = [_through_cache(pool, settings, is_directory) for pool in settings.pools]
    if tuple(pools) == settings.pools:
        return settings
    return settings.model_copy(update={"pools": tuple(pools)})


def _through_cache(
    pool: PoolSettings, settings: Settings, is_directory: Callable[[str], bool]
) -> PoolSettings:
    model = pool.model or ""
    if pool.backend != "process" or "://" in model or is_directory(model):
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
