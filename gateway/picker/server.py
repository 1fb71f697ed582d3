"""The endpoint picker's process: a worker that Envoy asks over gRPC, instead of one with clients.

Its streams are ``PickerStream``s; here is what they are sent and send. It is started and kept like
the other workers, but for its port: gRPC binds that itself, beside the control process's socket
that keeps it reserved (SO_REUSEPORT).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from gateway.datapath import metrics
from gateway.datapath.messages import WorkerConfig
from gateway.datapath.protocol.errors import ApiError, Reason
from gateway.datapath.shared import Shared
from gateway.datapath.worker import Worker, run
from gateway.picker import ext_proc
from gateway.picker.certificate import PickerCertificate
from gateway.picker.stream import ExtProcError, PickerStream

log = logging.getLogger("tidegate.picker")

LIVENESS = "liveness"
READINESS = "readiness"
# Streams beyond ``max_connections`` that are answered before gRPC refuses further ones.
_MOST_BEYOND = 256
# A message is a body, at most, and what is around it.
_MESSAGE_SLACK_BYTES = 1_048_576
# At the end of a drain: time for the last replies to be sent.
_FLUSH_S = 1.0
# Envoy ends a stream soon after the last reply.
_CLOSED_S = 10.0


class PickerCall:
    """One call of ``Process``: what Envoy sends goes to its stream, the replies go back."""

    def __init__(self, worker: PickerWorker, call: Any, *, is_beyond: bool) -> None:
        self._worker = worker
        self._call = call
        self._is_beyond = is_beyond
        self._is_waiting = False
        self._writing: asyncio.Task[None] | None = None
        self._task = asyncio.current_task()
        self.stream = PickerStream(worker.context, worker.pools, self._changed)

    async def run(self) -> None:
        """Until Envoy ends the call, or the stream is over."""
        stream, call = self.stream, self._call
        try:
            await self._converse()
        except ExtProcError as error:
            await call.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        except asyncio.CancelledError:
            if not stream.is_over:
                raise  # Envoy has reset the call
            if self._task is not None:
                self._task.uncancel()
            if stream.is_broken:
                await call.abort(grpc.StatusCode.DEADLINE_EXCEEDED, "given up by the picker")
        except grpc.aio.AbortError:
            raise  # ended so by us
        except Exception:
            log.exception("internal error of the endpoint picker")
            stream.reject(ApiError(500, Reason.INTERNAL, "Internal error of the gateway."))
            await self._write()
        finally:
            stream.cancel()
            if self._writing is not None:
                self._writing.cancel()

    async def _converse(self) -> None:
        stream, call = self.stream, self._call
        while True:
            self._is_waiting = True
            message = await call.read()
            self._is_waiting = False
            if message is grpc.aio.EOF:
                return
            if self._is_beyond:
                self._is_beyond = False
                stream.reject(_streams_full())
            is_more = stream.receive(message)
            while is_more:
                await asyncio.sleep(0)  # others have their turn
                is_more = stream.read_on()
            if self._writing is not None:
                await self._writing
            await self._write()
            if stream.is_broken:
                await call.abort(grpc.StatusCode.DEADLINE_EXCEEDED, "given up by the picker")

    async def _write(self) -> None:
        replies = self.stream.replies
        while replies:
            await self._call.write(replies.pop(0))

    def _changed(self) -> None:
        """Something happened to the stream. While nothing is received, nothing else writes."""
        if self._is_waiting and self._writing is None:
            self._writing = asyncio.get_running_loop().create_task(self._write_unasked())

    async def _write_unasked(self) -> None:
        try:
            await self._write()
        except (grpc.RpcError, grpc.aio.BaseError) as error:
            log.debug("a reply was not sent, the call is over: %s", error)
        finally:
            self._writing = None
        if self.stream.is_broken:
            self.close()

    def close(self) -> None:
        """End the call: Envoy has all that it will get."""
        if self._task is not None and self._is_waiting:
            self._task.cancel()

    def sweep(self, now: float) -> None:
        """End what waited too long."""
        self.stream.sweep(now)
        if self.stream.is_over and now - self.stream.heard_s >= _CLOSED_S:
            self.close()


class PickerWorker(Worker):
    """See the module."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        config: WorkerConfig,
        shared: Shared,
        send: Any,
        nudge: Callable[[int], None],
        port: int = 0,
    ) -> None:
        """``port`` is the one to listen on."""
        super().__init__(loop, config, shared, send, nudge)
        self.port = port
        self._calls: set[PickerCall] = set()
        self._server: Any = None
        self._health = health.aio.HealthServicer()
        self._publishing: set[asyncio.Task[None]] = set()
        self._stopping: asyncio.Task[None] | None = None
        self._all_ended = asyncio.Event()
        self._certificate: PickerCertificate | None = None

    async def listen(self) -> None:
        """See ``Worker``."""
        gateway = self.context.gateway
        picker = gateway.picker
        largest = gateway.max_body_bytes + _MESSAGE_SLACK_BYTES
        self._server = server = grpc.aio.server(
            options=[
                ("grpc.so_reuseport", 1),
                ("grpc.max_receive_message_length", min(largest, 2**31 - 1)),
                ("grpc.max_send_message_length", min(largest, 2**31 - 1)),
            ],
            maximum_concurrent_rpcs=gateway.max_connections + _MOST_BEYOND,
        )
        method = grpc.stream_stream_rpc_method_handler(
            self._process, request_deserializer=ext_proc.ProcessingRequest.FromString
        )
        server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(ext_proc.SERVICE, {ext_proc.METHOD: method}),)
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        await self._publish_health()
        host = picker.host.strip("[]")
        address = f"[{host}]:{self.port}" if ":" in host else f"{host}:{self.port}"
        if picker.tls or picker.tls_certificate is not None:
            self._certificate = PickerCertificate(picker.tls_certificate, picker.tls_key)
            self._count_certificate(self._certificate)
            self.port = server.add_secure_port(address, self._certificate.credentials)
        else:
            self.port = server.add_insecure_port(address)
        await server.start()

    async def _process(self, _requests: Any, call: Any) -> None:
        counters = self.context.counters
        counters[metrics.CONNECTIONS] += 1
        counters[metrics.ACCEPTED] += 1
        beyond = len(self._calls) - self.context.gateway.max_connections
        made = PickerCall(self, call, is_beyond=beyond >= 0)
        self._calls.add(made)
        try:
            await made.run()
        finally:
            self._calls.discard(made)
            counters[metrics.CONNECTIONS] -= 1
            if self.context.draining and not self._calls:
                self._all_ended.set()

    # Health

    def lead(self, leads: bool) -> None:
        """See ``Worker``. A Tidegate that does not lead is not to be asked: its health says so."""
        super().lead(leads)
        self._renew_health()

    def control_lost(self) -> None:
        """See ``Worker``."""
        super().control_lost()
        self._renew_health()

    def _renew_health(self) -> None:
        task = asyncio.get_running_loop().create_task(self._publish_health())
        self._publishing.add(task)
        task.add_done_callback(self._publishing.discard)

    async def _publish_health(self) -> None:
        status = health_pb2.HealthCheckResponse
        is_ready = self.leads and not self.context.draining and not self.context.is_orphaned
        ready = status.SERVING if is_ready else status.NOT_SERVING
        for name in ("", READINESS, ext_proc.SERVICE):
            await self._health.set(name, ready)
        await self._health.set(LIVENESS, status.SERVING)

    # Ends

    def sweep_requests(self, now: float) -> None:
        """See ``Worker``."""
        for call in list(self._calls):
            call.sweep(now)

    def stop_listening(self) -> None:
        """See ``Worker``."""
        self._renew_health()
        if self._server is not None:
            limit_s = self.context.gateway.drain_s + 2 * _FLUSH_S
            self._stopping = asyncio.get_running_loop().create_task(self._server.stop(limit_s))

    async def finish(self, limit_s: float) -> None:
        """See ``Worker``."""
        if not await self._wait_ended(limit_s):
            for call in list(self._calls):
                call.stream.reject(_draining())
            await self._wait_ended(_FLUSH_S)
        if self._server is not None:
            await self._server.stop(0)

    async def _wait_ended(self, limit_s: float) -> bool:
        if not self._calls:
            return True
        try:
            await asyncio.wait_for(self._all_ended.wait(), limit_s)
        except TimeoutError:
            return False
        return True

    # TLS

    async def reload_tls(self) -> None:
        """See ``Worker``."""
        while self._certificate is not None:
            await asyncio.sleep(self.context.gateway.tls_reload_s)
            self._certificate.renew()
            self._count_certificate(self._certificate)

    def _count_certificate(self, certificate: PickerCertificate) -> None:
        self.context.counters[metrics.TLS_NOT_AFTER] = certificate.not_after_s


def _streams_full() -> ApiError:
    return ApiError(
        503,
        Reason.CONNECTIONS_FULL,
        "The endpoint picker has as many requests as it may have.",
        retry_after_s=1.0,
    )


def _draining() -> ApiError:
    return ApiError(
        503,
        Reason.DRAINING,
        "The gateway stops and can wait no longer for this answer; ask again.",
        retry_after_s=1.0,
    )


def main(arguments: list[str]) -> int:
    """Entry of the endpoint picker's process."""
    port, *others = map(int, arguments)
    return run(partial(PickerWorker, port=port), others)
