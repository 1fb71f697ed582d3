"""The adapter between other autoscalers and Tidegate: HPA's metrics APIs, KEDA's external scaler.

The composition root of ``tidegate adapter``. It has no state: it asks the admin API of a running
Tidegate, keeps the newest answer in memory, and answers from there. Two of them may run side by
side.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import ssl
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import msgspec
import uvloop

from autoscaler.adapters.feed import FetchError, SignalFeed, running
from autoscaler.adapters.measures import AdapterMeasures
from autoscaler.adapters.metrics_api.access import Access, ClusterError
from autoscaler.adapters.metrics_api.app import MetricsApi
from autoscaler.adapters.metrics_api.cluster import ClusterReviews
from autoscaler.adapters.metrics_api.identity import FrontProxy
from autoscaler.adapters.metrics_api.tls import ServingTls
from autoscaler.adapters.settings import AdapterObjectSettings, AdapterSettings
from autoscaler.adapters.types import PoolSignals
from gateway.admin.schema import SignalsAnswer
from gateway.admin.server import serve_admin
from gateway.compose.listeners import listen, make_url, socket_path
from gateway.compose.process import set_up_logging, settle, take_signals
from gateway.settings.errors import Problem, show
from gateway.settings.load import ConfigError, LoadedSettings
from gateway.terminal import complain, out, version

if TYPE_CHECKING:
    from autoscaler.adapters.keda.server import ScalerServer

log = logging.getLogger("tidegate.adapter")

UNIX = "unix:"
KEEPALIVE_S = 120
"""Longer than the API server keeps an idle connection, so that it is the one that closes it."""
CONNECT_S = 3.0
MARGIN_S = 5.0
"""Seconds that an answer may take beyond those that it is asked to wait."""
TLS_RELOAD_S = 5.0
FRONT_PROXY_S = 60.0
"""Seconds between two readings of who the front proxy is; a tenth where one failed."""
NO_KEDA = (
    "the extra `keda` (grpcio) is not installed: install Tidegate with it, or leave keda out of "
    "adapter.apis"
)

YOUNG_OBJECTS = 100_000
"""A reading of a thousand pools makes a third of it, in place of as many that are freed: the
garbage collector would visit them all each second, and nothing is answered meanwhile."""
PARSED_A_TURN = 16
"""Pools that are parsed before others have their turn."""
_POOL = msgspec.json.Decoder(PoolSignals)

Find = Callable[[], tuple[str, str]]
"""The admin listener to ask, ``http://…`` or ``unix:PATH``, and the token to show it. Raises
``FetchError``."""


def run(loaded: LoadedSettings, find: Find) -> int:
    """Run until SIGTERM or Ctrl-C. Returns the exit status: 0 after an orderly end, 2 where it
    could not start (one line says why). Raises ``ConfigError``."""
    set_up_logging(loaded.settings.gateway.log_level)
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(_run(loaded, find))
    except (ClusterError, FetchError, ModuleNotFoundError) as error:
        is_grpc = isinstance(error, ModuleNotFoundError) and error.name in (
            "grpc", "grpc_health", "google",
        )  # fmt: skip
        if isinstance(error, ModuleNotFoundError) and not is_grpc:
            raise
        complain(NO_KEDA if is_grpc else str(error))
        return 2


async def _run(loaded: LoadedSettings, find: Find) -> int:
    stop = asyncio.Event()
    take_signals(stop, asyncio.Event())
    settings = loaded.settings.adapter
    source = SignalsSource(find, settings)
    feed = SignalFeed(source.fetch, refresh_s=settings.refresh_s, stale_s=settings.stale_s)
    measures = AdapterMeasures(version(), feed)
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(source.close)
        jobs: list[Callable[[], Coroutine[Any, Any, None]]] = []
        lines = []
        if settings.serves_metrics():
            tls = _make_tls(loaded)
            guard = None
            if settings.authorization == "kubernetes":
                guard = ClusterGuard(settings, tls, measures)
                stack.push_async_callback(guard.close)
                jobs.append(guard.run)
            (listener,) = listen(
                settings.metrics_host, settings.metrics_port, field="adapter.metrics_port"
            )
            stack.callback(listener.close)
            app = MetricsApi(feed, apis=settings.apis, guard=guard, measures=measures)
            scheme = "http" if tls is None else "https"
            url = make_url(settings.metrics_host, listener.getsockname()[1], scheme)
            served = ", ".join(one for one in settings.apis if one != "keda")
            lines.append(f"  metrics   {url}  ({served})")
            now = None if tls is None else lambda: tls.context
            jobs.append(
                lambda: serve_admin([listener], app, stop, keepalive_s=KEEPALIVE_S, tls=now)
            )
            jobs += [] if tls is None else [partial(_renew, tls)]
            if guard is not None:
                await guard.read()
        if "keda" in settings.apis:
            server = _make_keda(loaded, feed, measures)
            shown = make_url(settings.keda_host, server.port).removeprefix("http://")
            with_tls = " with TLS" if settings.keda_tls_certificate else ""
            lines.append(f"  keda      {shown}  (gRPC{with_tls})")
            jobs.append(partial(server.serve, stop))
        await stack.enter_async_context(running(feed))
        settle(young=YOUNG_OBJECTS)
        lines = ["Tidegate's adapter is up.", *lines, f"  tidegate  {source.url}"]
        out("\n".join([*lines, "Ctrl-C stops it.", ""]))
        return await _live([asyncio.create_task(job()) for job in jobs], stop)


async def _live(jobs: Sequence[asyncio.Task[None]], stop: asyncio.Event) -> int:
    """Until a stop is asked for, or a job ends by itself, which none should."""
    stopping = asyncio.create_task(stop.wait())
    status = 0
    await asyncio.wait({stopping, *jobs}, return_when=asyncio.FIRST_COMPLETED)
    if not stop.is_set():
        status = 1
        stop.set()
        for job in jobs:
            if job.done() and not job.cancelled() and (error := job.exception()) is not None:
                log.error("stopped by an internal error", exc_info=error)
    # Servers end in good order; those that only renew are cut.
    await asyncio.wait({*jobs}, timeout=5.0)
    for job in jobs:
        job.cancel()
    await asyncio.gather(*jobs, return_exceptions=True)
    return status


def _problem(loaded: LoadedSettings, field: str, why: str, value: object) -> ConfigError:
    return ConfigError([Problem(field, why, loaded.origins[field], show(str(value)))])


def _make_tls(loaded: LoadedSettings) -> ServingTls | None:
    settings = loaded.settings.adapter
    if settings.tls_certificate is None or settings.tls_key is None:
        if settings.authorization == "none":
            return None
        raise _problem(
            loaded,
            "adapter.tls_certificate",
            'is missing: the API server speaks TLS only (for tests: adapter.authorization="none")',
            "",
        )
    ca = ""
    if settings.front_proxy_ca is not None:
        ca = _read(loaded, "adapter.front_proxy_ca", settings.front_proxy_ca)
    for field, path in (
        ("adapter.tls_certificate", settings.tls_certificate),
        ("adapter.tls_key", settings.tls_key),
    ):
        _read(loaded, field, path)
    try:
        return ServingTls(settings.tls_certificate, settings.tls_key, ca)
    except ssl.SSLError as error:
        try:
            ServingTls(settings.tls_certificate, settings.tls_key)
        except ssl.SSLError:
            why = f"is no certificate in PEM with its key in {settings.tls_key}: {error}"
            field, path = "adapter.tls_certificate", settings.tls_certificate
            raise _problem(loaded, field, why, path) from error
        why = f"has no certificate in PEM: {error}"
        field = "adapter.front_proxy_ca"
        raise _problem(loaded, field, why, settings.front_proxy_ca) from error


def _read(loaded: LoadedSettings, field: str, path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        why = f"cannot be read: {error.strerror or error}"
        raise _problem(loaded, field, why, path) from error


async def _renew(tls: ServingTls) -> None:
    while True:
        await asyncio.sleep(TLS_RELOAD_S)
        tls.renew()


def _make_keda(loaded: LoadedSettings, feed: SignalFeed, measures: AdapterMeasures) -> ScalerServer:
    from autoscaler.adapters.keda.server import ExternalScaler, KedaTls, ScalerServer

    settings = loaded.settings.adapter
    tls = None
    if settings.keda_tls_certificate is not None and settings.keda_tls_key is not None:
        tls = KedaTls(
            certificate=settings.keda_tls_certificate,
            key=settings.keda_tls_key,
            client_ca=settings.keda_client_ca,
        )
    for name in ("keda_tls_certificate", "keda_tls_key", "keda_client_ca"):
        path: Path | None = getattr(settings, name)
        if path is not None:
            _read(loaded, f"adapter.{name}", path)
    scaler = ExternalScaler(feed, measures, max_streams=settings.keda_max_streams)
    try:
        return ScalerServer(
            scaler,
            host=settings.keda_host,
            port=settings.keda_port,
            max_streams=settings.keda_max_streams,
            tls=tls,
        )
    except OSError as error:
        raise _problem(loaded, "adapter.keda_port", str(error), settings.keda_port) from error


class _Envelope(msgspec.Struct):
    """An answer of the admin API whose pools are not parsed yet."""

    version: int
    at_s: float
    pools: list[msgspec.Raw]


class SignalsSource:
    """The admin API of a Tidegate. Where it does not answer, ``find`` is asked again where it is,
    and with which token: it may have been started anew."""

    def __init__(self, find: Find, settings: AdapterSettings) -> None:
        self._find = find
        self._objects: dict[str, list[AdapterObjectSettings]] = {}
        for one in settings.objects:
            self._objects.setdefault(one.pool, []).append(one)
        self._parsed: dict[bytes, PoolSignals] = {}
        self._stack = contextlib.AsyncExitStack()
        self._client: httpx.AsyncClient | None = None
        self.url, _ = find()

    async def fetch(self, after: int | None, wait_s: float) -> SignalsAnswer:
        """What it says of its pools. Raises ``FetchError``."""
        query: dict[str, str] = (
            {} if after is None else {"after": f"{after}", "wait_s": f"{wait_s}"}
        )
        try:
            client = self._client or await self._connect()
            asking = client.stream("GET", "/signals", params=query, timeout=wait_s + MARGIN_S)
            async with asking as answer:
                if answer.status_code == 401:
                    raise FetchError(
                        f"{self.url} wants its admin token: TIDEGATE_ADMIN_TOKEN, or "
                        "gateway.admin_token_file"
                    )
                if answer.status_code >= 400:
                    raise FetchError(f"{self.url} answered {answer.status_code}")
                # Not kept by the answer, which is in a cycle of references and lives on for long.
                body = b"".join([part async for part in answer.aiter_bytes()])
            found = await self._parse(body)
        except BaseException as error:
            await self.close()
            if isinstance(error, httpx.HTTPError | httpx.InvalidURL | OSError):
                why = str(error) or type(error).__name__
                raise FetchError(f"no answer from {self.url}: {why}") from error
            if isinstance(error, ValueError | msgspec.MsgspecError):
                why = f"{self.url} is no Tidegate admin listener of this version"
                raise FetchError(why) from error
            raise
        return found

    async def _parse(self, body: bytes) -> SignalsAnswer:
        """An answer, a few pools at a time: parsing all of many at once would hold up requests.
        What is said of a pool in the same bytes as before is not parsed again. Raises
        ``ValueError``."""
        envelope = msgspec.json.decode(body, type=_Envelope)
        pools: dict[bytes, PoolSignals] = {}
        for number, raw in enumerate(envelope.pools):
            text = bytes(raw)
            known = self._parsed.get(text)
            if known is None:
                known = self._with_objects(_POOL.decode(text))
                if number % PARSED_A_TURN == 0:
                    await asyncio.sleep(0)
            pools[text] = known
        self._parsed = pools
        return SignalsAnswer.model_construct(
            version=envelope.version, at_s=envelope.at_s, pools=tuple(pools.values())
        )

    def _with_objects(self, pool: PoolSignals) -> PoolSignals:
        given = self._objects.get(pool.pool)
        if not given:
            return pool
        return replace(pool, objects=(*pool.objects, *(one.object for one in given)))

    async def _connect(self) -> httpx.AsyncClient:
        self.url, token = self._find()
        url, transport = self.url, None
        if url.startswith(UNIX):
            path = self._stack.enter_context(socket_path(Path(url.removeprefix(UNIX))))
            url, transport = "http://localhost", httpx.AsyncHTTPTransport(uds=path)
        self._client = httpx.AsyncClient(
            base_url=url,
            transport=transport,
            headers={"authorization": f"Bearer {token}"} if token else {},
            timeout=httpx.Timeout(MARGIN_S, connect=CONNECT_S),
            trust_env=False,
            verify=url.startswith("https:"),
        )
        return await self._stack.enter_async_context(self._client)

    async def close(self) -> None:
        """Close the connection; the next ``fetch`` opens another."""
        stack, self._stack, self._client = self._stack, contextlib.AsyncExitStack(), None
        await stack.aclose()


class ClusterGuard:
    """Who is let in, by the cluster's word; whose authority signs client certificates is told to
    ``tls``."""

    def __init__(
        self, settings: AdapterSettings, tls: ServingTls | None, measures: AdapterMeasures
    ) -> None:
        self._cluster = ClusterReviews(settings.kubeconfig)
        self._tls = tls
        self._measures = measures
        self.access = Access(
            review_access=self._cluster.review_access,
            review_token=self._cluster.review_token,
            cache_s=settings.access_cache_s,
            on_review=measures.reviewed,
        )
        self.front_proxy: FrontProxy | None = None
        self._settings = settings

    async def read(self) -> bool:
        """Learn who the front proxy is. False where that failed, and what was known stays."""
        try:
            found = await self._read_front_proxy()
        except (ClusterError, OSError) as error:
            log.warning("who the front proxy is cannot be read: %s", error)
            return False
        if self._tls is not None and found.ca != self._tls.client_ca:
            self._tls.client_ca = found.ca
            self._tls.renew()
        self.front_proxy = found
        return True

    async def _read_front_proxy(self) -> FrontProxy:
        path = self._settings.front_proxy_ca
        if path is None:
            return await self._cluster.front_proxy()
        ca = path.read_text(encoding="utf-8", errors="replace")
        return FrontProxy(ca=ca, names=self._settings.front_proxy_names)

    async def run(self) -> None:
        """Read it again and again, until it is cancelled."""
        known = self.front_proxy is not None
        while True:
            await asyncio.sleep(FRONT_PROXY_S if known else FRONT_PROXY_S / 10)
            known = await self.read()

    async def close(self) -> None:
        """Close the connections to the cluster."""
        await self._cluster.close()
