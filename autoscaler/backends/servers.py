"""What a server answers of itself: its health, and the models it lists, learned when it has just
become well. For every backend whose engines are reached by an address."""

from __future__ import annotations

from dataclasses import dataclass, field

from autoscaler.backends.base import Probe
from autoscaler.settings import PoolSettings
from loaders.engines.base import ServedModel, choose_model, engine_of, list_names
from loaders.engines.client import EngineClient


@dataclass(slots=True, kw_only=True)
class Server:
    """One server that is watched, and what it said of its model."""

    url: str
    pool: PoolSettings
    headers: dict[str, str] = field(default_factory=dict)
    health_path: str = "/health"
    model: ServedModel | None = None
    listed: tuple[str, ...] = ()

    async def probe(self, client: EngineClient) -> Probe:
        """Check its health, and learn its model when it has just become well."""
        pool, engine = self.pool, engine_of(self.pool.engine)
        health = await engine.health(client, self.url, self.headers, self.health_path)
        if health.ready is False:
            self.model = None
        elif health.ready and self.model is None:
            models = await engine.list_models(client, self.url, self.headers)
            self.model = choose_model(models, pool.model, pool.name)
            self.listed = list_names(models)
        model = self.model
        length = None if model is None else model.max_model_len_tokens
        return Probe(
            alive=health.ready,
            ready=health.ready,
            detail=health.detail,
            url=self.url,
            served_model=None if model is None else model.name,
            listed=self.listed,
            max_model_len_tokens=pool.max_model_len_tokens or length,
            headers=tuple(self.headers.items()),
            stream_usage=model is not None and model.stream_usage,
        )
