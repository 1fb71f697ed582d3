"""KEDA's external scaler over a real connection, asked by a client whose messages were compiled
from the protocol's own file.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from certificates import Authority, KeyPair
from grpc_health.v1 import health_pb2, health_pb2_grpc
from keda_client import metrics_request, ref, stub
from signal_rig import Clock, Source, make_feed, signals, unknown, until, within

from autoscaler.adapters.feed import running
from autoscaler.adapters.keda.messages import SERVICE
from autoscaler.adapters.keda.server import ExternalScaler, KedaTls, ScalerServer
from autoscaler.adapters.measures import AdapterMeasures

CODE = grpc.StatusCode


class Scaler:
    """The server on a real port."""

    def __init__(self, source: Source, *, max_streams: int = 10, tls: KedaTls | None = None):
        self.source, self.clock = source, Clock()
        self.feed = make_feed(source, self.clock, refresh_s=1e4)
        self.measures = AdapterMeasures("test", self.feed)
        scaler = ExternalScaler(self.feed, self.measures, max_streams=max_streams)
        self.server = ScalerServer(
            scaler, host="127.0.0.1", port=0, max_streams=max_streams, tls=tls
        )

    @asynccontextmanager
    async def serve(self) -> AsyncIterator[None]:
        stop = asyncio.Event()
        serving = asyncio.create_task(self.server.serve(stop))
        async with running(self.feed):
            await until(lambda: self.feed.age_s is not None or self.source.error)
            try:
                yield
            finally:
                stop.set()
                await within(serving)

    @property
    def address(self) -> str:
        return f"localhost:{self.server.port}"


Story = Callable[[Scaler, Any], Coroutine[Any, Any, None]]


def play(story: Story, *pools: Any, **given: Any) -> None:
    """Run a story with a scaler that knows these pools, and a client of it."""

    async def run() -> None:
        scaler = Scaler(Source(*pools), **given)
        async with scaler.serve(), grpc.aio.insecure_channel(scaler.address) as channel:
            await story(scaler, stub(channel))

    asyncio.run(run())


async def code_of(call: Any) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await within(call)
    return raised.value.code(), raised.value.details() or ""


def test_a_stock_trigger() -> None:
    async def story(scaler: Scaler, client: Any) -> None:
        (spec,) = (await within(client.GetMetricSpec(ref()))).metricSpecs
        assert (spec.metricName, spec.targetSize, spec.targetSizeFloat) == (
            "tidegate_desired_replicas", 1, 1.0,
        )  # fmt: skip
        (value,) = (await within(client.GetMetrics(metrics_request(ref())))).metricValues
        assert (value.metricName, value.metricValue, value.metricValueFloat) == (
            "tidegate_desired_replicas", 3, 3.0,
        )  # fmt: skip
        assert (await within(client.IsActive(ref()))).result is True

    play(story, signals())


def test_fractions_are_whole_upwards_in_the_older_fields() -> None:
    async def story(scaler: Scaler, client: Any) -> None:
        given = ref(metric="tidegate_ttft_seconds", quantile="0.95", target="0.25")
        (spec,) = (await within(client.GetMetricSpec(given))).metricSpecs
        assert (spec.targetSize, spec.targetSizeFloat) == (1, 0.25)
        request = metrics_request(given, "s1-tidegate_ttft_seconds")
        (value,) = (await within(client.GetMetrics(request))).metricValues
        assert (value.metricName, value.metricValue, value.metricValueFloat) == (
            "s1-tidegate_ttft_seconds", 1, 0.5,
        )  # fmt: skip

    play(story, signals())


def test_a_value_of_zero_is_zero_in_both_fields() -> None:
    async def story(scaler: Scaler, client: Any) -> None:
        (value,) = (await within(client.GetMetrics(metrics_request(ref())))).metricValues
        assert (value.metricValue, value.metricValueFloat) == (0, 0.0)
        assert (await within(client.IsActive(ref()))).result is False

    play(story, signals(active=False, desired_replicas=0))


def test_what_is_not_known_is_an_error() -> None:
    async def story(scaler: Scaler, client: Any) -> None:
        for call in (client.IsActive(ref()), client.GetMetrics(metrics_request(ref()))):
            assert (await code_of(call))[0] is CODE.UNAVAILABLE
        scaler.source.set(signals())
        await until(lambda: scaler.feed.catalog().pools[0].active)
        assert (await within(client.IsActive(ref()))).result is True
        scaler.clock.now_s += 16  # stale now
        for call in (client.IsActive(ref()), client.GetMetrics(metrics_request(ref()))):
            code, message = await code_of(call)
            assert code is CODE.UNAVAILABLE
            assert "stale_s" in message
        # What a trigger is scaled by does not depend on it.
        assert len((await within(client.GetMetricSpec(ref()))).metricSpecs) == 1

    play(story, unknown())


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"pool": None}, ["pool"]),
        ({"metric": "nix"}, ["metric", "nix", "tidegate_queued_requests"]),
        ({"target": "none"}, ["target", "none"]),
        ({"metric": "tidegate_queued_requests"}, ["target"]),
    ],
)
def test_a_wrong_trigger_is_told_what_there_is(given: dict[str, Any], words: list[str]) -> None:
    async def story(scaler: Scaler, client: Any) -> None:
        wrong = ref(**given)
        for call in (
            client.GetMetricSpec(wrong),
            client.IsActive(wrong),
            client.GetMetrics(metrics_request(wrong)),
            client.StreamIsActive(wrong).read(),
            client.StreamMetricSpec(wrong).read(),
        ):
            code, message = await code_of(call)
            assert code is CODE.INVALID_ARGUMENT
            assert all(word in message for word in words), message

    play(story, signals())


def test_a_pool_that_there_is_not() -> None:
    async def story(scaler: Scaler, client: Any) -> None:
        code, message = await code_of(client.IsActive(ref("nobody")))
        assert code is CODE.INVALID_ARGUMENT
        assert "nobody" in message
        assert "chat" in message

    play(story, signals())


def test_activity_is_pushed_as_it_changes() -> None:
    async def story(scaler: Scaler, client: Any) -> None:
        stream = client.StreamIsActive(ref())
        assert (await within(stream.read())).result is False
        scaler.source.set(signals(active=False, desired_replicas=0, queued_requests=0))
        scaler.source.set(signals(active=True, desired_replicas=0))
        assert (await within(stream.read())).result is True
        scaler.source.set(unknown())  # says nothing
        await until(lambda: scaler.feed.catalog().pools[0].active is None)
        scaler.source.set(signals(active=False, desired_replicas=0))
        assert (await within(stream.read())).result is False
        scaler.source.set(signals(active=False, desired_replicas=1))  # ahead of a request
        assert (await within(stream.read())).result is True
        stream.cancel()

    play(story, signals(active=False, desired_replicas=0))


def test_a_stream_that_is_opened_while_a_request_is_held() -> None:
    async def story(scaler: Scaler, client: Any) -> None:
        assert (await within(client.StreamIsActive(ref()).read())).result is True

    play(story, signals(active=True, desired_replicas=0))


def test_the_pushed_spec_is_that_which_is_polled() -> None:
    async def story(scaler: Scaler, client: Any) -> None:
        given = ref(metric="tidegate_inflight_tokens", target="8000")
        stream = client.StreamMetricSpec(given)
        assert await within(stream.read()) == await within(client.GetMetricSpec(given))
        reading = asyncio.ensure_future(stream.read())
        done, _ = await asyncio.wait({reading}, timeout=0.3)
        assert not done  # it stays open
        stream.cancel()
        await asyncio.gather(reading, return_exceptions=True)

    play(story, signals())


def test_streams_have_a_limit_and_their_places_are_given_back() -> None:
    async def story(scaler: Scaler, client: Any) -> None:
        streams = [client.StreamIsActive(ref()), client.StreamMetricSpec(ref())]
        for stream in streams:
            await within(stream.read())
        code, message = await code_of(client.StreamIsActive(ref()).read())
        assert code is CODE.RESOURCE_EXHAUSTED
        assert "keda_max_streams" in message
        assert (await within(client.IsActive(ref()))).result is True  # calls go on
        streams[1].cancel()

        async def try_again() -> bool:
            stream = client.StreamIsActive(ref())
            try:
                return bool((await within(stream.read())).result)
            except grpc.aio.AioRpcError:
                return False
            finally:
                stream.cancel()

        for _ in range(300):
            if await try_again():
                return
            await asyncio.sleep(0.02)
        raise AssertionError("the place of a stream that was cancelled is not free again")

    play(story, signals(), max_streams=2)


def test_health_by_name() -> None:
    async def run() -> None:
        scaler = Scaler(Source(signals()))
        async with scaler.serve(), grpc.aio.insecure_channel(scaler.address) as channel:
            health = health_pb2_grpc.HealthStub(channel)
            for name in ("", SERVICE):
                answer = await within(health.Check(health_pb2.HealthCheckRequest(service=name)))
                assert answer.status == health_pb2.HealthCheckResponse.SERVING

    asyncio.run(run())


def test_tls_with_client_certificates(tmp_path: Path) -> None:
    authority, clients = Authority(tmp_path, "ca"), Authority(tmp_path, "clients")
    serving = authority.issue("serving", hosts=("localhost",))
    tls = KedaTls(certificate=serving.certificate, key=serving.key, client_ca=clients.certificate)
    own, foreign = clients.issue("keda"), authority.issue("stranger")

    def channel(address: str, pair: KeyPair | None) -> Any:
        key = None if pair is None else pair.key.read_bytes()
        certificate = None if pair is None else pair.certificate.read_bytes()
        trust = authority.certificate.read_bytes()
        made = grpc.ssl_channel_credentials(trust, key, certificate)
        return grpc.aio.secure_channel(address, made)

    async def run() -> None:
        nonlocal authority
        scaler = Scaler(Source(signals()), tls=tls)
        async with scaler.serve():
            for pair in (None, foreign):
                async with channel(scaler.address, pair) as refused:
                    call = stub(refused).IsActive(ref())
                    assert (await code_of(call))[0] is CODE.UNAVAILABLE
            async with channel(scaler.address, own) as let_in:
                assert (await within(stub(let_in).IsActive(ref()))).result is True
            # Another certificate is taken without a restart.
            (tmp_path / "later").mkdir()
            authority = Authority(tmp_path / "later", "ca")
            later = authority.issue("serving", hosts=("localhost",))
            serving.certificate.write_bytes(later.certificate.read_bytes())
            serving.key.write_bytes(later.key.read_bytes())
            async with channel(scaler.address, own) as let_in:
                assert (await within(stub(let_in).IsActive(ref()))).result is True

    asyncio.run(run())


def test_calls_and_streams_are_counted() -> None:
    async def story(scaler: Scaler, client: Any) -> None:
        await within(client.IsActive(ref()))
        await code_of(client.IsActive(ref("nobody")))
        await within(client.StreamIsActive(ref()).read())
        page = scaler.measures.page().decode()
        name = "tidegate_adapter_requests_total"
        assert f'{name}{{api="keda",code="OK",verb="IsActive"}} 1.0' in page
        assert f'{name}{{api="keda",code="INVALID_ARGUMENT",verb="IsActive"}} 1.0' in page
        assert f'{name}{{api="keda",code="OK",verb="StreamIsActive"}} 1.0' in page

    play(story, signals())


def test_a_port_that_is_taken() -> None:
    async def run() -> None:
        scaler = Scaler(Source())
        with pytest.raises(OSError, match=str(scaler.server.port)):
            ScalerServer(
                ExternalScaler(scaler.feed, scaler.measures, max_streams=1),
                host="127.0.0.1", port=scaler.server.port, max_streams=1, tls=None,
            )  # fmt: skip

    asyncio.run(run())
