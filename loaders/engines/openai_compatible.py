"""Any server with OpenAI's API: SGLang, NIM, TensorRT-LLM, llama.cpp, or another gateway."""

from __future__ import annotations

import json
from collections.abc import Mapping

import httpx

from loaders.engines.base import OPENAI_COMPATIBLE, Engine, EngineHealth, EngineLoad, ServedModel
from loaders.engines.client import NO_SUCH_CALL, EngineClient, EngineUnsupported, describe
from loaders.engines.load_metrics import read_iterations, read_load

MODELS_PATH = "/v1/models"
METRICS_PATH = "/metrics"
TRTLLM_METRICS_PATH = "/prometheus/metrics"
"""Where ``trtllm-serve`` has its Prometheus page; at ``/metrics`` it tells of its iterations."""

MAX_METRICS_BYTES = 2 << 20
"""Some 20 engines of a data-parallel vLLM, each with some 90 kB."""


class OpenAICompatibleEngine(Engine):
    """What every engine behind Tidegate has: health and a list of models. It is not started here,
    and cannot be put to sleep."""

    name = OPENAI_COMPATIBLE

    async def health(
        self, client: EngineClient, url: str, headers: Mapping[str, str], path: str
    ) -> EngineHealth:
        """See ``Engine``. ``/v1/models`` is asked where the server has no such path."""
        health, status = await _get_health(client, url, headers, path)
        if status in NO_SUCH_CALL and path != MODELS_PATH:
            health, _ = await _get_health(client, url, headers, MODELS_PATH)
        return health

    async def list_models(
        self, client: EngineClient, url: str, headers: Mapping[str, str]
    ) -> tuple[ServedModel, ...] | None:
        """See ``Engine``."""
        try:
            status, body = await client.request("GET", url + MODELS_PATH, headers)
            return read_models(json.loads(body)) if status == 200 else None
        except (httpx.HTTPError, ValueError, RecursionError):
            return None

    async def load(
        self, client: EngineClient, url: str, headers: Mapping[str, str]
    ) -> EngineLoad | None:
        """See ``Engine``."""
        page = await _get_metrics(client, url + METRICS_PATH, headers)
        if page is None or not page.startswith(b"["):
            return None if page is None else read_load(page)
        iterations = read_iterations(page)
        page = await _get_metrics(client, url + TRTLLM_METRICS_PATH, headers)
        # The statistics are gone once they are read; those of an engine at rest are none.
        return iterations if page is None else read_load(page) or iterations

    async def sleep(self, client: EngineClient, url: str, level: int, *, timeout_s: float) -> None:
        """See ``Engine``."""
        raise EngineUnsupported(f"engine {self.name} cannot be put to sleep")

    async def wake(self, client: EngineClient, url: str, level: int, *, timeout_s: float) -> None:
        """See ``Engine``."""
        raise EngineUnsupported(f"engine {self.name} cannot be woken")


async def _get_metrics(client: EngineClient, url: str, headers: Mapping[str, str]) -> bytes | None:
    """A page of metrics; ``None`` where there is none, or it is longer than it may be."""
    try:
        status, page = await client.request("GET", url, headers, max_bytes=MAX_METRICS_BYTES)
    except (httpx.HTTPError, httpx.InvalidURL):
        return None
    return page if status == 200 and len(page) <= MAX_METRICS_BYTES else None


async def _get_health(
    client: EngineClient, url: str, headers: Mapping[str, str], path: str
) -> tuple[EngineHealth, int | None]:
    try:
        status, _ = await client.request("GET", url + path, headers)
    except httpx.PoolTimeout:
        return EngineHealth(ready=None, detail="too many health checks are under way"), None
    except httpx.TimeoutException:
        detail = f"no answer to GET {path} in {client.timeout_s:g} s"
        return EngineHealth(ready=False, detail=detail), None
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        return EngineHealth(ready=False, detail=f"GET {path} failed: {describe(error)}"), None
    if 200 <= status < 300:
        return EngineHealth(ready=True), status
    hint = "; is the API key right?" if status in {401, 403} else ""
    return EngineHealth(ready=False, detail=f"GET {path} was answered {status}{hint}"), status


def read_models(answer: object) -> tuple[ServedModel, ...] | None:
    """The models in the body of ``GET /v1/models``; ``None`` if it has another shape."""
    data = answer.get("data") if isinstance(answer, dict) else None
    if not isinstance(data, list):
        return None
    models = []
    for entry in data:
        if isinstance(entry, dict) and isinstance(entry.get("id"), str):
            length = entry.get("max_model_len")
            known = isinstance(length, int) and not isinstance(length, bool) and length > 0
            models.append(
                ServedModel(
                    name=entry["id"],
                    max_model_len_tokens=length if known else None,
                    stream_usage=entry.get("owned_by") == "vllm",
                )
            )
    return tuple(models)
