"""KEDA's external scaler over gRPC, with the health service of gRPC beside it.

The one module that knows gRPC, which the extra ``keda`` brings.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.message import Message
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from autoscaler.adapters.feed import SignalFeed, StaleSignals
from autoscaler.adapters.keda.messages import SERVICE, make_messages
from autoscaler.adapters.keda.scaler import (
    BadTrigger,
    NotKnownYet,
    Trigger,
    find_pool,
    find_value,
    is_active,
    read_trigger,
)
from autoscaler.adapters.measures import AdapterMeasures

LOG = logging.getLogger("tidegate.adapter")

API = "keda"
MAX_UNARY = 256
"""Calls at once that are no streams."""
MAX_MESSAGE_BYTES = 65_536
MOST_INT = (1 << 63) - 1
GRACE_S = 2.0
FAULT = "Tidegate's adapter failed at this; its log says how."
OPTIONS = (
    ("grpc.so_reuseport", 0),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    # Streams are open for days: a peer that is gone is found out, and one that looks after us may.
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class KedaTls:
    """The scaler's certificate and key, and the authority of its clients' certificates, which they
    need then."""

    certificate: Path
    key: Path
    client_ca: Path | None = None


class ExternalScaler:
    """The calls, answered from the newest signals; at most ``max_streams`` streams at once."""

    def __init__(
        self,
        feed: SignalFeed,
        measures: AdapterMeasures,
        *,
        max_streams: int,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._feed = feed
        self._measures = measures
        self._max_streams = max_streams
        self._clock = clock
        self._streams = 0
        self._messages = make_messages()

    def handlers(self) -> grpc.GenericRpcHandler:
        """All calls, as a server takes them."""
        ref = self._messages["ScaledObjectRef"].FromString
        request = self._messages["GetMetricsRequest"].FromString
        streams = grpc.unary_stream_rpc_method_handler
        return grpc.method_handlers_generic_handler(
            SERVICE,
            {
                "IsActive": self._unary("IsActive", self._is_active, ref),
                "GetMetricSpec": self._unary("GetMetricSpec", self._spec, ref),
                "GetMetrics": self._unary("GetMetrics", self._metrics, request),
                "StreamIsActive": streams(self.stream_is_active, ref, _to_bytes),
                "StreamMetricSpec": streams(self.stream_metric_spec, ref, _to_bytes),
            },
        )

    def _unary(
        self, name: str, answer: Callable[[Any], Message], read: Callable[[bytes], Any]
    ) -> Any:
        async def call(request: Any, context: Any) -> Message:
            begun_s, code, message = self._clock(), grpc.StatusCode.OK, ""
            found: Message | None = None
            try:
                found = answer(request)
            except Exception as error:  # noqa: BLE001 -- becomes a status; a fault of ours is logged
                code, message = status_of(error)
            self._measures.answered(API, name, code.name, self._clock() - begun_s)
            if found is None:
                await context.abort(code, message)
                raise AssertionError("abort raises")
            return found

        return grpc.unary_unary_rpc_method_handler(call, read, _to_bytes)

    def _is_active(self, ref: Any) -> Message:
        trigger = _trigger(ref)
        return self._make("IsActiveResponse", result=is_active(find_pool(trigger, self._pools())))

    def _spec(self, ref: Any) -> Message:
        trigger = _trigger(ref)
        spec = self._make(
            "MetricSpec",
            metricName=trigger.metric.name,
            targetSize=_whole(trigger.target),
            targetSizeFloat=trigger.target,
        )
        return self._make("GetMetricSpecResponse", metricSpecs=[spec])

    def _metrics(self, request: Any) -> Message:
        trigger = _trigger(request.scaledObjectRef)
        value = find_value(trigger, find_pool(trigger, self._pools()))
        # Both: KEDA takes a float of 0 for one that is not set.
        found = self._make(
            "MetricValue",
            metricName=request.metricName or trigger.metric.name,
            metricValue=_whole(value),
            metricValueFloat=value,
        )
        return self._make("GetMetricsResponse", metricValues=[found])

    def _pools(self) -> Any:
        return self._feed.catalog().pools

    def _make(self, name: str, **fields: Any) -> Message:
        made: Message = self._messages[name](**fields)
        return made

    async def stream_is_active(self, ref: Any, context: Any) -> AsyncIterator[Message]:
        """Whether there shall be a replica: at once, and each time it changes. While it is not
        known nothing is said."""
        async with self._stream("StreamIsActive", ref, context) as trigger:
            said: bool | None = None
            async for _ in self._feed.changes():
                try:
                    active = is_active(find_pool(trigger, self._pools()))
                except (StaleSignals, NotKnownYet, BadTrigger):
                    continue
                if active is not said:
                    said = active
                    yield self._make("IsActiveResponse", result=active)

    async def stream_metric_spec(self, ref: Any, context: Any) -> AsyncIterator[Message]:
        """The metric and its target: at once; a change of them is another stream."""
        async with self._stream("StreamMetricSpec", ref, context):
            yield self._spec(ref)
            await asyncio.Event().wait()  # until the client hangs up

    def _stream(self, name: str, ref: Any, context: Any) -> _Stream:
        return _Stream(self, name, ref, context)

    @contextmanager
    def place(self) -> Iterator[None]:
        """A place for a stream. Raises ``_Full``."""
        if self._streams >= self._max_streams:
            raise _Full(
                f"{self._streams} streams are open, as many as there may be "
                "(adapter.keda_max_streams)"
            )
        self._streams += 1
        self._measures.streams.set(self._streams)
        try:
            yield
        finally:
            self._streams -= 1
            self._measures.streams.set(self._streams)

    def count(self, name: str, code: str) -> None:
        """A stream was opened, or refused."""
        self._measures.answered(API, name, code, 0.0)


class _Full(Exception):
    """There is no place for another stream."""


class _Stream:
    """A stream's place, and its trigger; what cannot be had ends it with its status."""

    def __init__(self, scaler: ExternalScaler, name: str, ref: Any, context: Any) -> None:
        self._scaler = scaler
        self._name = name
        self._ref = ref
        self._context = context
        self._place = scaler.place()

    async def __aenter__(self) -> Trigger:
        try:
            trigger = _trigger(self._ref)
            self._place.__enter__()
        except (BadTrigger, _Full) as error:
            code, message = status_of(error)
            self._scaler.count(self._name, code.name)
            await self._context.abort(code, message)
            raise AssertionError("abort raises") from None
        self._scaler.count(self._name, "OK")
        return trigger

    async def __aexit__(self, *error: object) -> None:
        self._place.__exit__(None, None, None)


def _trigger(ref: Any) -> Trigger:
    return read_trigger(ref.namespace, dict(ref.scalerMetadata))


def status_of(error: Exception) -> tuple[grpc.StatusCode, str]:
    """A failure as gRPC says it."""
    code = grpc.StatusCode
    match error:
        case BadTrigger():
            return code.INVALID_ARGUMENT, str(error)
        case StaleSignals() | NotKnownYet():
            return code.UNAVAILABLE, str(error)
        case _Full():
            return code.RESOURCE_EXHAUSTED, str(error)
    LOG.error("a call of KEDA could not be answered", exc_info=error)
    return code.INTERNAL, FAULT


def _whole(value: float) -> int:
    return min(math.ceil(value), MOST_INT)


def _to_bytes(message: Message) -> bytes:
    data: bytes = message.SerializeToString()
    return data


class ScalerServer:
    """The gRPC server. Raises ``OSError`` where the address cannot be had, or a file not be
    read."""

    def __init__(
        self, scaler: ExternalScaler, *, host: str, port: int, max_streams: int, tls: KedaTls | None
    ) -> None:
        self._server = grpc.aio.server(
            maximum_concurrent_rpcs=max_streams + MAX_UNARY, options=OPTIONS
        )
        self._server.add_generic_rpc_handlers((scaler.handlers(),))
        self._health = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        address = f"[{host.strip('[]')}]:{port}" if ":" in host else f"{host}:{port}"
        try:
            if tls is None:
                self.port = self._server.add_insecure_port(address)
            else:
                self.port = self._server.add_secure_port(address, _credentials(tls))
        except RuntimeError as error:
            raise OSError(f"{address} cannot be listened on: {error}") from error

    async def serve(self, stop: asyncio.Event) -> None:
        """Serve until ``stop`` is set."""
        await self._server.start()
        for name in ("", SERVICE):
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        try:
            await stop.wait()
        finally:
            await self._health.enter_graceful_shutdown()
            await self._server.stop(GRACE_S)


def _credentials(tls: KedaTls) -> grpc.ServerCredentials:
    """Read again for each connection: files are replaced while it runs."""

    def read() -> Any:
        ca = None if tls.client_ca is None else tls.client_ca.read_bytes()
        pair = (tls.key.read_bytes(), tls.certificate.read_bytes())
        return grpc.ssl_server_certificate_configuration([pair], root_certificates=ca)

    def renewed() -> Any:
        try:
            return read()
        except OSError as error:
            LOG.warning("the TLS certificate was not reloaded: %s", error)
            return None

    return grpc.dynamic_ssl_server_credentials(
        read(), renewed, require_client_authentication=tls.client_ca is not None
    )
