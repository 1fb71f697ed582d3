"""Externally managed servers, at given URLs: watched and routed to, never started or stopped."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace

from autoscaler.backends.base import AdoptedReplica, BackendError, Probe, ReplicaSpec
from autoscaler.backends.servers import Server
from autoscaler.policy.packing import Device
from autoscaler.settings import AutoscalerSettings, PoolSettings
from autoscaler.types import Decision, PoolDemand
from loaders.engines.client import EngineClient


class StaticBackend:
    """Backend for pools with ``backend = "static"``: any OpenAI-compatible server."""

    owns_replicas = False
    outlives_us = True

    def __init__(
        self,
        *,
        settings: AutoscalerSettings,
        environ: Mapping[str, str] | None = None,
        client: EngineClient | None = None,
    ) -> None:
        self._environ = os.environ if environ is None else environ
        self._client = client or EngineClient(timeout_s=settings.health_timeout_s)
        self._servers: dict[str, Server] = {}

    def set_pools(self, pools: Sequence[PoolSettings]) -> None:
        """Nothing of them is kept."""

    def urls(self, pool: PoolSettings) -> Sequence[str]:
        """Those that the settings name."""
        return pool.static.urls

    def recommend(self, pool: PoolSettings, decision: Decision, demand: PoolDemand | None) -> None:
        """Not its to scale."""

    def devices(self) -> Sequence[Device]:
        """None of ours."""
        return ()

    async def measure_memory(self, replica_id: str) -> int | None:
        """Not ours to tell."""
        return None

    async def start(self, spec: ReplicaSpec) -> None:
        """Begin to watch a server. Raises ``BackendError`` when its API key is not set."""
        if spec.url is None:
            raise BackendError(f"{spec.id} has no URL; a static replica needs one")
        if spec.id in self._servers:
            raise BackendError(f"{spec.id} is watched already")
        headers = dict(spec.pool.static.headers)
        variable = spec.pool.static.api_key_env
        if variable is not None:
            key = self._environ.get(variable, "").strip()
            if not key:
                raise BackendError(f"the environment variable {variable} (api_key_env) is not set")
            headers["Authorization"] = f"Bearer {key}"
        self._servers[spec.id] = Server(
            url=spec.url,
            pool=spec.pool,
            headers=headers,
            health_path=spec.pool.static.health_path,
        )

    async def probe(self, replica_id: str) -> Probe:
        """Check a server's health, and learn its model when it has just become well."""
        server = self._servers.get(replica_id)
        if server is None:
            return Probe(alive=False, ready=False, detail="it is not watched")
        seen = await server.probe(self._client)
        return replace(seen, served_model=server.pool.model or seen.served_model)

    async def stop(self, replica_id: str, *, grace_s: float) -> None:
        """Stop watching a server. The server itself is left alone."""
        self._servers.pop(replica_id, None)

    async def adopt(self, wanted: Sequence[ReplicaSpec]) -> list[AdoptedReplica]:
        """Nothing: its servers are found by their addresses."""
        return []

    async def close(self, *, keep: bool = False) -> None:
        """Stop watching all servers."""
        self._servers.clear()
        await self._client.close()
