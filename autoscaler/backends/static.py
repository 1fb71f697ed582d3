"""Externally managed servers, at given URLs: watched and routed to, never started or stopped."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from autoscaler.backends.base import AdoptedReplica, BackendError, Probe, ReplicaSpec
from autoscaler.policy.packing import Device
from autoscaler.settings import AutoscalerSettings
from loaders.engines.base import ServedModel, choose_model, engine_of, list_names
from loaders.engines.client import EngineClient


@dataclass(slots=True, kw_only=True)
class Server:
    """One server that is watched, and what it said of its model."""

    url: str
    spec: ReplicaSpec
    headers: dict[str, str]
    model: ServedModel | None = None
    listed: tuple[str, ...] = ()


class StaticBackend:
    """Backend for pools with ``backend = "static"``: any OpenAI-compatible server."""

    owns_replicas = False

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
        self._servers[spec.id] = Server(url=spec.url, spec=spec, headers=headers)

    async def probe(self, replica_id: str) -> Probe:
        """Check a server's health, and learn its model when it has just become well."""
        server = self._servers.get(replica_id)
        if server is None:
            return Probe(alive=False, ready=False, detail="it is not watched")
        pool, engine = server.spec.pool, engine_of(server.spec.pool.engine)
        path = pool.static.health_path
        health = await engine.health(self._client, server.url, server.headers, path)
        if health.ready is False:
            server.model = None
        elif health.ready and server.model is None:
            models = await engine.list_models(self._client, server.url, server.headers)
            server.model = choose_model(models, pool.model, pool.name)
            server.listed = list_names(models)
        model = server.model
        learned = None if model is None else model.name
        length = None if model is None else model.max_model_len_tokens
        return Probe(
            alive=health.ready,
            ready=health.ready,
            detail=health.detail,
            url=server.url,
            served_model=pool.model or learned,
            listed=server.listed,
            max_model_len_tokens=pool.max_model_len_tokens or length,
            headers=tuple(server.headers.items()),
            stream_usage=model is not None and model.stream_usage,
        )

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
