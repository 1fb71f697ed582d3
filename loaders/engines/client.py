"""HTTP to engines, each request bounded in time and size."""

from __future__ import annotations

import json
from collections.abc import Mapping

import httpx

NO_SUCH_CALL = frozenset({404, 405, 501})
MAX_ANSWER_BYTES = 1 << 20
READ_BYTES = 1 << 16
IDLE_CONNECTIONS = 16
"""Kept for the next request. For each request httpcore compares all of them with one another: with
100 that took four times as long as the request."""


class EngineError(Exception):
    """An engine did not do what it was asked; the message says why, for people."""


class EngineUnsupported(EngineError):
    """The engine has no such call. Asking again will not help."""


class EngineClient:
    """Connections to engines. Proxies of the environment are not used."""

    def __init__(
        self,
        *,
        timeout_s: float,
        headers: Mapping[str, str] | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        """``timeout_s`` bounds a request where the caller gives no other limit. ``headers`` are
        sent with every request."""
        self.timeout_s = timeout_s
        self._headers = dict(headers or {})
        self._transport = transport
        self._clients: dict[bool, httpx.AsyncClient] = {}
        """By whether the connections are encrypted: without TLS no certificates are loaded, which
        takes longer than the requests of a start."""

    async def request(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str],
        *,
        timeout_s: float | None = None,
        body: Mapping[str, object] | None = None,
        max_bytes: int = MAX_ANSWER_BYTES,
    ) -> tuple[int, bytes]:
        """Status and body of an answer, ``body`` sent as JSON if there is one; of one longer than
        ``max_bytes`` somewhat more than so many. Raises ``httpx.HTTPError`` or
        ``httpx.InvalidURL``."""
        secure = url.startswith("https:")
        if secure not in self._clients:
            self._clients[secure] = httpx.AsyncClient(
                trust_env=False,
                verify=secure,
                transport=self._transport,
                limits=httpx.Limits(
                    max_connections=1_000, max_keepalive_connections=IDLE_CONNECTIONS
                ),
            )
        answered = bytearray()
        # Uncompressed, so that the bound on what is read is one on what is kept.
        asked = {"Accept-Encoding": "identity", **self._headers, **headers}
        content = None if body is None else json.dumps(body).encode()
        if content is not None:
            asked["Content-Type"] = "application/json"
        timeout = httpx.Timeout(self.timeout_s if timeout_s is None else timeout_s)
        async with self._clients[secure].stream(
            method, url, headers=asked, timeout=timeout, content=content
        ) as answer:
            async for piece in answer.aiter_bytes(READ_BYTES):
                answered += piece
                if len(answered) > max_bytes:
                    break
        return answer.status_code, bytes(answered)

    async def post(
        self, url: str, *, timeout_s: float, body: Mapping[str, object] | None = None
    ) -> None:
        """POST, with ``body`` as JSON if there is one. Raises ``EngineUnsupported`` where the
        server has no such path, and ``EngineError`` for any other failure."""
        path = httpx.URL(url).path
        try:
            status, answer = await self.request("POST", url, {}, timeout_s=timeout_s, body=body)
        except httpx.TimeoutException:
            raise EngineError(f"no answer to POST {path} in {timeout_s:g} s") from None
        except httpx.HTTPError as error:
            raise EngineError(f"POST {path} failed: {describe(error)}") from error
        if status in NO_SUCH_CALL:
            raise EngineUnsupported(f"the engine has no POST {path} (it answered {status})")
        if not 200 <= status < 300:
            text = answer[:200].decode(errors="replace")
            raise EngineError(f"POST {path} was answered {status}: {text}")

    async def close(self) -> None:
        """Close all connections."""
        for client in self._clients.values():
            await client.aclose()
        self._clients.clear()


def describe(error: Exception) -> str:
    """An error in a few words, its type where it says nothing itself."""
    return str(error) or type(error).__name__
