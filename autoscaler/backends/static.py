"""Engines that somebody else runs, at given URLs: watched and routed to, never stopped."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from autoscaler.backends.base import BackendError, Leftover, Probe, ReplicaSpec, Unsupported
from autoscaler.backends.health import HealthClient, ServedModel, choose_model
from autoscaler.settings import AutoscalerSettings


@dataclass(slots=True, kw_only=True)
class Server:
    """One server that is watched, and what it said of its model."""

    url: str
    spec: ReplicaSpec
    headers: dict[str, str]
    model: ServedModel | None = None


class StaticBackend:
    """Backend for pools with ``backend = "static"``: any OpenAI-compatible server."""

    owns_replicas = False

    def __init__(
        self,
        *,
        settings: AutoscalerSettings,
        environ: Mapping[str, str] | None = None,
        client: HealthClient | None = None,
    ) -> None:
        self._environ = os.environ if environ is None else environ
        self._client = client or HealthClient(timeout_s=settings.health_timeout_s)
        self._servers: dict[str, Server] = {}

    async def start(self, spec: ReplicaSpec) -> None:
        """Begin to watch a server. Raises ``BackendError`` when its API key is not set."""
        if spec.url is None:
            raise BackendError(f"{spec.id} has no URL; a static replica needs one")
        if spec.id in self._servers:
            raise BackendError(f"{spec.id} is watched already")
        headers = dict(spec.pool.headers)
        variable = spec.pool.api_key_env
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
        pool = server.spec.pool
        health = await self._client.check(server.url, pool.health_path, server.headers)
        if health.ready is False:
            server.model = None
        elif health.ready and server.model is None:
            models = await self._client.list_models(server.url, server.headers)
            server.model = choose_model(models, pool.model, pool.name)
        model = server.model
        learned = None if model is None else model.name
        length = None if model is None else model.max_model_len_tokens
        return Probe(
            alive=health.ready,
            ready=health.ready,
            detail=health.detail,
            url=server.url,
            served_model=pool.model or learned,
            max_model_len_tokens=pool.max_model_len_tokens or length,
            headers=tuple(server.headers.items()),
        )

    async def stop(self, replica_id: str, *, grace_s: float) -> None:
        """Stop watching a server. The server itself is left alone."""
        self._servers.pop(replica_id, None)

    async def sleep(self, replica_id: str, level: int) -> None:
        """Not for servers that somebody else runs."""
        raise Unsupported("a static replica is somebody else's: it cannot be put to sleep here")

    async def wake(self, replica_id: str) -> None:
        """Not for servers that somebody else runs."""
        raise Unsupported("a static replica is somebody else's: it cannot be woken here")

    async def adopt(self) -> list[Leftover]:
        """Nothing: it never left anything."""
        return []

    async def close(self) -> None:
        """Stop watching all servers."""
        self._servers.clear()
        await self._client.close()
