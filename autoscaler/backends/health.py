"""Asking a server over HTTP how it is, which models it has, and to sleep or wake."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

import httpx

from autoscaler.backends.base import BackendError, Unsupported

MODELS_PATH = "/v1/models"
ABSENT = frozenset({404, 405, 501})
MAX_ANSWER_BYTES = 1 << 20
READ_BYTES = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Health:
    """What a health check found; ``ready`` is ``None`` when it could not be made."""

    ready: bool | None
    detail: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """One model a server lists. ``max_model_len_tokens`` is ``None`` where it does not say."""

    name: str
    max_model_len_tokens: int | None = None


class HealthClient:
    """HTTP to engines, each request bounded in time and size. Environment proxies are not used."""

    def __init__(self, *, timeout_s: float, transport: httpx.AsyncBaseTransport | None = None):
        self._timeout_s = timeout_s
        self._transport = transport
        self._client: httpx.AsyncClient | None = None

    async def check(self, url: str, path: str, headers: Mapping[str, str]) -> Health:
        """Whether a server is well; ``/v1/models`` is asked where it has no such path."""
        health, status = await self._get_health(url, path, headers)
        if status in ABSENT and path != MODELS_PATH:
            health, _ = await self._get_health(url, MODELS_PATH, headers)
        return health

    async def _get_health(
        self, url: str, path: str, headers: Mapping[str, str]
    ) -> tuple[Health, int | None]:
        try:
            status, _ = await self._ask("GET", url + path, headers, self._timeout_s)
        except httpx.PoolTimeout:
            return Health(ready=None, detail="too many health checks are under way"), None
        except httpx.TimeoutException:
            detail = f"no answer to GET {path} in {self._timeout_s:g} s"
            return Health(ready=False, detail=detail), None
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            return Health(ready=False, detail=f"GET {path} failed: {describe(error)}"), None
        if 200 <= status < 300:
            return Health(ready=True), status
        hint = "; is the API key right?" if status in {401, 403} else ""
        return Health(ready=False, detail=f"GET {path} was answered {status}{hint}"), status

    async def list_models(
        self, url: str, headers: Mapping[str, str]
    ) -> tuple[ServedModel, ...] | None:
        """The models a server lists; ``None`` when it does not say in a way that can be read."""
        try:
            status, body = await self._ask("GET", url + MODELS_PATH, headers, self._timeout_s)
            if status != 200:
                return None
            return read_models(json.loads(body))
        except (httpx.HTTPError, ValueError, RecursionError):
            return None

    async def post(
        self,
        url: str,
        headers: Mapping[str, str],
        *,
        timeout_s: float,
        body: Mapping[str, object] | None = None,
    ) -> None:
        """POST, with ``body`` as JSON if there is one. Raises ``Unsupported`` where the server has
        no such path, and ``BackendError`` for any other failure."""
        path = httpx.URL(url).path
        try:
            status, answer = await self._ask("POST", url, headers, timeout_s, body)
        except httpx.TimeoutException:
            raise BackendError(f"no answer to POST {path} in {timeout_s:g} s") from None
        except httpx.HTTPError as error:
            raise BackendError(f"POST {path} failed: {describe(error)}") from error
        if status in ABSENT:
            raise Unsupported(f"the engine has no POST {path} (it answered {status})")
        if not 200 <= status < 300:
            text = answer[:200].decode(errors="replace")
            raise BackendError(f"POST {path} was answered {status}: {text}")

    async def close(self) -> None:
        """Close all connections."""
        if self._client is not None:
            await self._client.aclose()
            self._client = None

    async def _ask(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str],
        timeout_s: float,
        content: Mapping[str, object] | None = None,
    ) -> tuple[int, bytes]:
        if self._client is None:
            self._client = httpx.AsyncClient(
                trust_env=False,
                transport=self._transport,
                limits=httpx.Limits(max_connections=1_000, max_keepalive_connections=100),
            )
        timeout = httpx.Timeout(timeout_s)
        body = bytearray()
        # Uncompressed, so that the bound on what is read is one on what is kept.
        asked = {"Accept-Encoding": "identity", **headers}
        sent = None if content is None else json.dumps(content).encode()
        if sent is not None:
            asked["Content-Type"] = "application/json"
        async with self._client.stream(
            method, url, headers=asked, timeout=timeout, content=sent
        ) as answer:
            async for piece in answer.aiter_bytes(READ_BYTES):
                body += piece
                if len(body) > MAX_ANSWER_BYTES:
                    break
        return answer.status_code, bytes(body)


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
                ServedModel(name=entry["id"], max_model_len_tokens=length if known else None)
            )
    return tuple(models)


def choose_model(
    models: tuple[ServedModel, ...] | None, *preferred: str | None
) -> ServedModel | None:
    """The first preferred name that is listed, else the first model of the list."""
    if not models:
        return None
    listed = {model.name: model for model in models}
    for name in preferred:
        if name in listed:
            return listed[name]
    return models[0]


def describe(error: Exception) -> str:
    """An error in a few words, its type where it says nothing itself."""
    return str(error) or type(error).__name__
