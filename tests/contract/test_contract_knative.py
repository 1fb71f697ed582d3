"""The stream of statistics, read by a websocket server whose messages were compiled from the
protocol's own file.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import compiled_protos
import pytest
from google.protobuf import descriptor_pb2
from signal_rig import until
from stat_server import StatServer

from autoscaler.backends.kubernetes.knative import RevisionScaling
from autoscaler.backends.kubernetes.stat_stream import FIELDS, PACKAGE, StatStream
from autoscaler.protobuf import make_messages
from autoscaler.types import PoolDemand

CHAT = RevisionScaling(revision="chat-00001", target=10.0)
KEY = "models/chat-00001"


def demand(
    inflight: int | None = 0, arrivals: int | None = None, at_s: float = 0.0, queued: int = 0
) -> PoolDemand:
    return PoolDemand(
        observed_at_s=at_s,
        inflight_requests=inflight,
        arrivals_total=arrivals,
        queued_requests=queued,
    )


Story = Callable[[StatServer, StatStream], Coroutine[Any, Any, None]]


def play(story: Story) -> None:
    """With a server that listens, and a stream to it."""

    async def played() -> None:
        server = StatServer()
        await server.start()
        stream = StatStream(server.url)
        try:
            await story(server, stream)
        finally:
            await stream.close()
            await server.stop()

    asyncio.run(played())


def test_a_recommendation_is_reported_until_it_is_met() -> None:
    async def story(server: StatServer, stream: StatStream) -> None:
        def ask(replicas: int, inflight: int) -> None:
            stream.prewarm("chat", "models", CHAT, replicas, demand(inflight))

        ask(3, 0)
        await until(lambda: server.stats)
        assert [(one.revision, one.concurrency) for one in server.stats] == [(KEY, 25.0)]
        assert server.stats[0].at_s == 0, "the autoscaler's own clock counts"
        ask(3, 15)
        await until(lambda: len(server.stats) >= 2)
        assert server.stats[1].concurrency == 10.0
        ask(3, 25)
        count = len(server.stats)
        await asyncio.sleep(2.5)
        assert len(server.stats) == count, "real load is enough"
        assert len(server.hosts) == 1, "one connection"

    play(story)


def test_what_is_not_confirmed_is_reported_no_more() -> None:
    async def story(server: StatServer, stream: StatStream) -> None:
        stream.prewarm("chat", "models", CHAT, 1, demand())
        await until(lambda: len(server.stats) >= 3)
        await asyncio.sleep(6)
        count = len(server.stats)
        await asyncio.sleep(2.5)
        assert len(server.stats) == count

    play(story)


@pytest.mark.parametrize("seen", [None, demand(None)], ids=["no demand", "unknown"])
def test_what_is_unknown_is_not_reported(seen: PoolDemand | None) -> None:
    async def story(server: StatServer, stream: StatStream) -> None:
        stream.prewarm("chat", "models", CHAT, 3, seen)
        stream.prewarm("other", "models", RevisionScaling(revision="o", target=1), 1, demand())
        await until(lambda: server.stats)
        await asyncio.sleep(1.5)
        assert {one.revision for one in server.stats} == {"models/o"}

    play(story)


def test_requests_per_second_are_those_that_came() -> None:
    async def story(server: StatServer, stream: StatStream) -> None:
        rps = RevisionScaling(revision="chat-00001", metric="rps", target=10.0)

        def ask(replicas: int, seen: PoolDemand) -> None:
            stream.prewarm("chat", "models", rps, replicas, seen)

        ask(2, demand(0, arrivals=100, at_s=0.0, queued=1))
        await until(lambda: server.stats)  # held, so the pods see none
        assert server.stats[0].requests == 15.0
        assert server.stats[0].concurrency > 0, "which is what wakes a revision at zero"
        ask(2, demand(3, arrivals=108, at_s=2.0))
        count = len(server.stats)
        await until(lambda: len(server.stats) > count)
        assert server.stats[-1].requests == 11.0

    play(story)


def test_it_connects_again_to_an_autoscaler_that_was_away() -> None:
    async def story(server: StatServer, stream: StatStream) -> None:
        def ask() -> bool:
            stream.prewarm("chat", "models", CHAT, 1, demand())
            return False

        ask()
        await until(lambda: server.stats)
        await server.stop()
        await until(lambda: ask() or stream.failing)
        await server.start()
        count = len(server.stats)
        await until(lambda: ask() or len(server.stats) > count)
        assert len(server.hosts) == 2

    play(story)


def test_the_table_says_what_the_protocol_says() -> None:
    messages, _ = compiled_protos.compiled("knative_stat")
    made = make_messages(PACKAGE, FIELDS)
    for name, message in made.items():
        ours, theirs = descriptor_pb2.DescriptorProto(), descriptor_pb2.DescriptorProto()
        message.DESCRIPTOR.CopyToProto(ours)
        getattr(messages, name).DESCRIPTOR.CopyToProto(theirs)
        for one in (*ours.field, *theirs.field):
            one.ClearField("json_name")
        assert ours == theirs
    assert set(made) == set(messages.DESCRIPTOR.message_types_by_name)
