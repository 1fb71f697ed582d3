"""The whole tree of settings: the gateway's own section, and the composition of every package's.

Loading them from defaults, file, environment and command line is ``gateway.settings.load``. This
module
only says what the values are, what they mean, which are allowed, and which contradict each other.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator, Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from autoscaler.settings import AutoscalerSettings, PoolSettings
from gateway.datapath.settings import GatewaySettings
from loaders.settings import LoaderSettings
from modelcache.settings import ModelCacheSettings
from router.settings import RouterSettings

LOOPBACK_NAMES = frozenset({"localhost", "ip6-localhost"})
CONFLICTS = "tidegate_conflicts"
"""Type of the validation error whose ``ctx["conflicts"]`` holds contradictions between fields."""


class Settings(BaseModel):
    """Everything Tidegate can be told, as one immutable value."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    state_dir: Path = Path(".tidegate")
    """Directory for everything Tidegate writes: logs of the replicas, history, the record of
    processes it owns. Created at start, by default in the working directory."""

    gateway: GatewaySettings = GatewaySettings()
    """The two listeners and the data path between clients and engines."""

    router: RouterSettings = RouterSettings()
    """How requests are sized and how much one replica is given."""

    autoscaler: AutoscalerSettings = AutoscalerSettings()
    """How many replicas a pool has, and how they are started, watched and stopped."""

    loaders: LoaderSettings = LoaderSettings()
    """How engines are started."""

    modelcache: ModelCacheSettings = ModelCacheSettings()
    """Where weights are kept on this node, and what it may take for them."""

    pools: tuple[PoolSettings, ...] = Field(default=(), max_length=1_000)
    """The models that are served, one pool of replicas each."""

    @model_validator(mode="after")
    def _no_conflicts(self) -> Settings:
        conflicts = list(find_conflicts(self))
        if conflicts:
            text = "; ".join(f"{path}: {message}" for path, message in conflicts)
            raise PydanticCustomError(
                CONFLICTS,
                "{text}",
                {"text": text, "conflicts": conflicts},
            )
        return self


def find_conflicts(settings: Settings) -> Iterator[tuple[str, str]]:
    """Contradictions between fields, each as (dotted path of one of them, what is wrong)."""
    yield from find_gateway_conflicts(settings.gateway)
    yield from find_name_conflicts([(pool.name, pool.aliases) for pool in settings.pools])


def find_gateway_conflicts(gateway: GatewaySettings) -> Iterator[tuple[str, str]]:
    """Those within the gateway's own section."""
    if gateway.port == gateway.admin_port != 0:
        yield "gateway.admin_port", f"{gateway.admin_port} is gateway.port too; give each its own"
    if gateway.tls_certificate is not None and gateway.tls_key is None:
        yield "gateway.tls_key", "is missing: gateway.tls_certificate is set, TLS needs both"
    if gateway.tls_key is not None and gateway.tls_certificate is None:
        yield "gateway.tls_certificate", "is missing: gateway.tls_key is set, TLS needs both"
    if gateway.peek_bytes > gateway.max_buffered_bytes:
        yield "gateway.peek_bytes", "is more than gateway.max_buffered_bytes"


def find_name_conflicts(
    pools: Sequence[tuple[str | None, Sequence[str | None]]],
) -> Iterator[tuple[str, str]]:
    """Names that mean two pools, of pools given as name and aliases; ``None`` is no name."""
    taken: dict[str, str] = {}
    for index, (own, aliases) in enumerate(pools):
        names = [(f"pools.{index}.name", own)]
        names += [(f"pools.{index}.aliases.{i}", name) for i, name in enumerate(aliases)]
        for path, name in names:
            if name is None:
                continue
            if name in taken:
                yield path, f"{name!r} is {taken[name]} too; a name means one pool"
            else:
                taken[name] = path


def find_warnings(settings: Settings) -> Iterator[tuple[str, str]]:
    """What is allowed but probably not meant, each as (dotted path, what to think about)."""
    gateway = settings.gateway
    if not is_loopback(gateway.admin_host):
        yield (
            "gateway.admin_host",
            f"{gateway.admin_host} is reachable from other machines and the admin listener has no "
            "authentication: every client that reaches it can scale and drain pools",
        )
    if "*" in gateway.admin_allowed_hosts:
        yield (
            "gateway.admin_allowed_hosts",
            '"*" lets any web page that a local browser opens read the admin listener',
        )
    if not settings.pools:
        yield "pools", "no pool is configured, so every request will be answered 404"


def is_loopback(host: str) -> bool:
    """Whether a listener bound to ``host`` can be reached from this machine only."""
    if host.lower() in LOOPBACK_NAMES:
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
