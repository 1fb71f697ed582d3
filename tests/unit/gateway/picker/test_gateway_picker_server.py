"""The gRPC server of the endpoint picker, asked by the published stubs instead of an Envoy."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from datapath_rig import WAIT_S, configure, make_certificate
from envoy.service.ext_proc.v3 import external_processor_pb2 as published
from envoy.service.ext_proc.v3.external_processor_pb2_grpc import ExternalProcessorStub
from ext_proc_rig import (
    chat,
    destination,
    mutated,
    request_body,
    request_headers,
    response_body,
    response_headers,
)
from grpc_health.v1 import health_pb2
from grpc_health.v1.health_pb2_grpc import HealthStub

from gateway.datapath.protocol.errors import ApiError, Reason
from gateway.datapath.settings import PickerSettings
from gateway.datapath.shared import Shared
from gateway.picker.server import PickerWorker
from gateway.picker.stream import PickerStream
from router.types import Fleet, Pool, Replica, ReplicaState

READY = Replica(id="r0", pool="m", slot=0, url="http://10.0.0.1:8000", state=ReplicaState.READY)
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
FOR_REQUESTS = ("", "readiness", "envoy.service.ext_proc.v3.ExternalProcessor")


@asynccontextmanager
async def serving(
    *replicas: Replica, picker: PickerSettings | None = None, **changes: Any
) -> AsyncIterator[PickerWorker]:
    """A picker in this process, on a port of the system's choice."""
    config = configure(**changes)
    picker = PickerSettings() if picker is None else picker
    gateway = config.gateway.model_copy(update={"picker": picker})
    config = type(config)(index=0, gateway=gateway, router=config.router)
    shared = Shared.create(workers=1, max_replicas=8, max_pools=4)
    loop = asyncio.get_running_loop()
    worker = PickerWorker(loop, config, shared, lambda message: None, lambda other: None)
    publish(worker, *replicas)
    await worker.listen()
    try:
        yield worker
    finally:
        await worker.drain()
    worker.check_integrity()
    assert not any(worker.context.ledger.requests)


def publish(worker: PickerWorker, *replicas: Replica) -> None:
    pool = Pool(name="m", slot=0, replicas=replicas)
    version = 1 + worker.context.shared.applied()
    worker.pools.apply(Fleet(version=version, pools=(pool,)))


@asynccontextmanager
async def channel(worker: PickerWorker) -> AsyncIterator[grpc.aio.Channel]:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{worker.port}") as made:
        yield made


def published_form(message: Any) -> published.ProcessingRequest:
    return published.ProcessingRequest.FromString(message.SerializeToString())


async def begin(made: grpc.aio.Channel, *messages: Any) -> Any:
    """A call that has sent these messages."""
    call = ExternalProcessorStub(made).Process(wait_for_ready=True)
    for message in messages:
        await call.write(published_form(message))
    return call


async def read(call: Any) -> published.ProcessingResponse:
    async with asyncio.timeout(WAIT_S):
        reply: published.ProcessingResponse = await call.read()
    return reply


async def health(made: grpc.aio.Channel, service: str) -> int:
    answer = await HealthStub(made).Check(
        health_pb2.HealthCheckRequest(service=service), wait_for_ready=True
    )
    return int(answer.status)


async def eventually(what: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not await what():  # noqa: ASYNC110  (what happens in a server says nothing of it)
            await asyncio.sleep(0.01)


def test_a_request_is_picked_and_its_answer_passed_on() -> None:
    async def story() -> None:
        async with serving(READY) as worker, channel(worker) as made:
            call = await begin(made, request_headers(), request_body(chat()))
            assert destination(await read(call)) == ["10.0.0.1:8000"]
            assert (await read(call)).WhichOneof("response") == "request_body"
            assert worker.context.ledger.requests[0] == 1
            for message in (response_headers(), response_body(b"{}", end=True)):
                await call.write(published_form(message))
            assert (await read(call)).WhichOneof("response") == "response_headers"
            assert (await read(call)).WhichOneof("response") == "response_body"
            await call.done_writing()
            assert await call.read() is grpc.aio.EOF
            assert await call.code() is grpc.StatusCode.OK

    asyncio.run(story())


def test_a_held_request_is_answered_without_a_further_message() -> None:
    async def story() -> None:
        async with serving() as worker, channel(worker) as made:
            call = await begin(made, request_headers(), request_body(chat()))
            assert (await read(call)).override_message_timeout.seconds > 0
            publish(worker, READY)
            assert destination(await read(call)) == ["10.0.0.1:8000"]
            call.cancel()

            async def is_free() -> bool:
                return worker.context.ledger.requests[0] == 0

            await eventually(is_free)

    asyncio.run(story())


def test_an_internal_error_is_500_and_ends_one_request(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def story() -> None:
        async with serving(READY) as worker, channel(worker) as made:

            def broken(model: str) -> Any:
                raise RuntimeError("a secret of the implementation")

            with monkeypatch.context() as patched:
                patched.setattr(worker.pools, "find", broken)
                call = await begin(made, request_headers(), request_body(chat()))
                answer = (await read(call)).immediate_response
                assert answer.status.code == 500
                assert mutated(answer.headers)["x-tidegate-reason"] == "internal"
                assert b"secret" not in answer.body
                assert b'"type":"server_error"' in answer.body
                assert await call.read() is grpc.aio.EOF
                assert await call.code() is grpc.StatusCode.OK
            call = await begin(made, request_headers(), request_body(chat()))
            assert destination(await read(call)) == ["10.0.0.1:8000"]
            call.cancel()

    asyncio.run(story())
    assert "a secret of the implementation" in caplog.text


def test_messages_out_of_order_end_the_call_with_an_error() -> None:
    async def story() -> None:
        async with serving(READY) as worker, channel(worker) as made:
            call = await begin(made, response_body(b"text"))
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await read(call)
            assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert "response_body" in str(refused.value.details())

    asyncio.run(story())


def test_a_call_that_is_ended_by_us_is_no_internal_error(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refused(*given: Any) -> None:
        raise ApiError(503, Reason.DRAINING, "no more")

    async def story() -> None:
        async with serving(READY) as worker, channel(worker) as made:
            call = await begin(made, request_headers(), request_body(chat()))
            await read(call)
            await read(call)
            monkeypatch.setattr(PickerStream, "_judge", refused)
            await call.write(published_form(response_headers()))
            assert (await read(call)).WhichOneof("response") == "response_headers"
            with pytest.raises(grpc.aio.AioRpcError) as ended:
                await read(call)
            assert ended.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED

    asyncio.run(story())
    assert "internal error" not in caplog.text


def test_streams_beyond_the_limit_are_refused() -> None:
    async def story() -> None:
        async with serving(READY, max_connections=2) as worker, channel(worker) as made:
            calls = [await begin(made, request_headers(), request_body(chat())) for _ in range(2)]
            for call in calls:
                await read(call)
            third = await begin(made, request_headers(), request_body(chat()))
            answer = (await read(third)).immediate_response
            assert answer.status.code == 503
            assert mutated(answer.headers)["x-tidegate-reason"] == "connections_full"
            for call in (*calls, third):
                call.cancel()

    asyncio.run(story())


def test_what_waits_too_long_ends_without_a_further_message() -> None:
    async def story() -> None:
        limits = {"body_timeout_s": 0.05, "request_timeout_s": 90.0}
        async with serving(READY, **limits) as worker, channel(worker) as made:
            sweeping = asyncio.create_task(worker.sweep())
            slow = await begin(made, request_headers())
            assert (await read(slow)).immediate_response.status.code == 408
            sweeping.cancel()
        async with serving(READY, upstream_idle_timeout_s=0.05) as worker, channel(worker) as made:
            sweeping = asyncio.create_task(worker.sweep())
            silent = await begin(made, request_headers(), request_body(chat()))
            await read(silent)
            await read(silent)
            with pytest.raises(grpc.aio.AioRpcError) as ended:
                await read(silent)
            assert ended.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            sweeping.cancel()

    asyncio.run(story())


def test_health_says_who_leads() -> None:
    async def story() -> None:
        async with serving(READY) as worker, channel(worker) as made:
            for service in (*FOR_REQUESTS, "liveness"):
                assert await health(made, service) == SERVING
            with pytest.raises(grpc.aio.AioRpcError) as unknown:
                await health(made, "another")
            assert unknown.value.code() is grpc.StatusCode.NOT_FOUND
            watching = HealthStub(made).Watch(health_pb2.HealthCheckRequest(service=""))
            assert (await watching.read()).status == SERVING
            worker.lead(False)
            assert (await watching.read()).status == NOT_SERVING
            for service in FOR_REQUESTS:
                assert await health(made, service) == NOT_SERVING
            assert await health(made, "liveness") == SERVING
            worker.lead(True)
            assert (await watching.read()).status == SERVING
            worker.control_lost()
            assert (await watching.read()).status == NOT_SERVING
            watching.cancel()

    asyncio.run(story())


def test_a_drain_refuses_what_is_held_at_its_end() -> None:
    async def story() -> None:
        async with serving(drain_s=0.05) as worker, channel(worker) as made:
            call = await begin(made, request_headers(), request_body(chat()))
            await read(call)
            draining = asyncio.create_task(worker.drain())
            answer = (await read(call)).immediate_response
            assert answer.status.code == 503
            assert mutated(answer.headers)["x-tidegate-reason"] == "draining"
            await call.done_writing()
            await draining

    asyncio.run(story())


def test_a_changed_certificate_is_shown_to_new_connections(tmp_path: Path) -> None:
    async def story() -> None:
        make_certificate(tmp_path, "first")
        pem = tmp_path / "cert.pem"
        picker = PickerSettings(tls=True, tls_certificate=pem, tls_key=tmp_path / "key.pem")
        async with serving(READY, picker=picker, tls_reload_s=0.02) as worker:
            reloading = asyncio.create_task(worker.reload_tls())
            await is_taken(worker, pem.read_bytes())
            first = pem.read_bytes()
            make_certificate(tmp_path, "second")
            await is_taken(worker, pem.read_bytes())
            assert pem.read_bytes() != first
            reloading.cancel()

    asyncio.run(story())


async def is_taken(worker: PickerWorker, root: bytes) -> None:
    """Until the picker shows the certificate that this client trusts, and no other."""
    credentials = grpc.ssl_channel_credentials(root_certificates=root)

    async def answers() -> bool:
        # Another channel each time: one would wait longer and longer after each failure.
        options = [("grpc.use_local_subchannel_pool", 1)]
        address = f"localhost:{worker.port}"
        async with grpc.aio.secure_channel(address, credentials, options=options) as made:
            try:
                request = health_pb2.HealthCheckRequest()
                await HealthStub(made).Check(request, timeout=5)
            except grpc.aio.AioRpcError:
                return False
        return True

    await eventually(answers)
