"""The shared block's layout, the metrics page made from it, and the messages between processes."""

from __future__ import annotations

import os
import random
from pathlib import Path

import msgspec
import pytest
from datapath_rig import configure
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from gateway.admin.metrics_page import PREFIX, render
from gateway.datapath import metrics
from gateway.datapath.messages import (
    MAX_MESSAGE_BYTES,
    Drain,
    FailureReport,
    FleetUpdate,
    Listening,
    ToControl,
    ToWorker,
    Unpacker,
    WakeSignal,
    pack,
)
from gateway.datapath.metrics import PoolCounters
from gateway.datapath.protocol.errors import Reason
from gateway.datapath.shared import Shared
from router.types import Fleet, Pool, Replica, ReplicaState


def make(workers: int = 3, replicas: int = 5, pools: int = 2) -> Shared:
    return Shared.create(workers=workers, max_replicas=replicas, max_pools=pools)


def every_row(shared: Shared) -> list[object]:
    """Every array there is in the block."""
    rows: list[object] = [shared.waiting_rows(pool) for pool in range(shared.max_pools)]
    for worker in range(shared.workers):
        rows.extend(shared.replica_rows(worker))
        rows.extend(shared.replica_counters(worker, slot) for slot in range(shared.max_replicas))
        rows.append(shared.worker_counters(worker))
        for pool in range(shared.max_pools):
            rows.extend(shared.pool_rows(worker, pool))
    return rows


def test_no_two_rows_share_a_word_and_an_attached_view_is_the_same() -> None:
    shared = make()
    other = Shared.attach(shared.fd)
    assert (other.workers, other.max_replicas, other.max_pools) == (3, 5, 2)
    value = 0
    for row in every_row(shared):
        for index in range(len(row)):  # type: ignore[arg-type]
            value += 1
            row[index] = value  # type: ignore[index]
    value = 0
    for row in every_row(other):
        for item in row:  # type: ignore[attr-defined]
            value += 1
            assert item == value
    words = os.fstat(shared.fd).st_size // 8
    assert words == value + 8 + 2 * 3  # the header, each worker's version and beat: nothing more


def test_rows_beyond_the_block_do_not_exist() -> None:
    shared = make()
    for call in (
        lambda: shared.replica_rows(3),
        lambda: shared.replica_rows(-1),
        lambda: shared.worker_counters(3),
        lambda: shared.waiting_rows(2),
        lambda: shared.pool_rows(0, 2),
        lambda: shared.pool_rows(0, -1),
    ):
        with pytest.raises(IndexError):
            call()


def test_another_block_is_not_attached() -> None:
    fd = os.memfd_create("other")
    os.ftruncate(fd, 4096)
    with pytest.raises(ValueError, match="not a Tidegate"):
        Shared.attach(fd)
    os.close(fd)


def test_totals_and_the_others_share() -> None:
    shared = make()
    for worker in range(3):
        requests, tokens, opened = shared.replica_rows(worker)
        for slot in range(5):
            requests[slot] = worker + 1
            tokens[slot] = 10 ** (worker + 1)
            opened[slot] = 5
    assert shared.replica_total(4) == (6, 1110)
    assert shared.replica_totals(2) == ([6, 6], [1110, 1110])
    requests, tokens, opened = shared.other_rows(1, 3)
    assert opened == [10, 10, 10]
    assert requests == [4, 4, 4]
    assert tokens == [1010, 1010, 1010]


def test_a_dead_workers_gauges_go_and_its_counters_stay() -> None:
    shared = make()
    for row in every_row(shared):
        for index in range(len(row)):  # type: ignore[arg-type]
            row[index] = 7  # type: ignore[index]
    shared.clear_worker(1)
    for row in shared.replica_rows(1):
        assert list(row) == [0] * 5
    for pool in range(2):
        assert list(shared.waiting_rows(pool)) == [7, 0, 7]
    for metric, value in zip(metrics.WORKER_METRICS, shared.worker_counters(1), strict=True):
        assert value == (0 if metric.gauge else 7), metric
    for pool in range(2):
        integers, sums = shared.pool_rows(1, pool)
        for metric, value in zip(metrics.POOL_METRICS, integers, strict=False):
            assert value == (0 if metric.gauge else 7), metric
        assert set(sums) == {7.0}
    for worker in (0, 2):
        assert set(shared.replica_rows(worker)[0]) == {7}
        assert set(shared.pool_rows(worker, 0)[0]) == {7}


# Metrics


def test_the_places_of_the_metrics_are_those_their_names_say() -> None:
    """The order is part of the layout that several processes read."""
    names = [metric.name for metric in metrics.POOL_METRICS]
    assert names[metrics.INFLIGHT_TOKENS] == "inflight_tokens"
    assert names[metrics.QUEUED_BYTES] == "queued_bytes"
    assert metrics.POOL_METRICS[metrics.CANCELLED].labels == (("outcome", "cancelled"),)
    assert names[metrics.RESPONSE_BYTES] == "response_bytes_total"
    assert metrics.WORKER_METRICS[metrics.UPSTREAM_OPENED].name.startswith("upstream_connections_o")
    for metric, index in (
        (metrics.POOL_METRICS, metrics.REASON_INDEX),
        (metrics.WORKER_METRICS, metrics.WORKER_REASON_INDEX),
    ):
        for reason in Reason:
            assert metric[index[reason]].name == "rejections_total"
            assert metric[index[reason]].labels[0] == ("reason", reason.value)
    for name, index in metrics.FINISH_INDEX.items():
        assert metrics.POOL_METRICS[index].labels == (("finished_reason", name),)
    for name, index in (
        ("time_to_first_token_seconds", metrics.TTFT),
        ("e2e_request_latency_seconds", metrics.E2E),
    ):
        for kind, endpoint in enumerate(metrics.ENDPOINTS):
            for stream, text in enumerate(("false", "true")):
                spec = metrics.POOL_HISTOGRAMS[index + 2 * kind + stream]
                assert spec.name == name
                assert spec.labels == (("endpoint", endpoint), ("stream", text))
    assert metrics.POOL_HISTOGRAMS[metrics.OUTPUT_LENGTH].name == "request_generation_tokens"


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (200, "200"),
        (207, "2xx"),
        (404, "404"),
        (418, "4xx"),
        (503, "503"),
        (599, "5xx"),
        (999, "5xx"),
        (302, "3xx"),
        (100, "1xx"),
    ],
)
def test_a_status_is_counted_by_itself_or_by_its_class(status: int, code: str) -> None:
    assert dict(metrics.POOL_METRICS[metrics.code_index(status)].labels) == {"code": code}
    labels = dict(metrics.WORKER_METRICS[metrics.worker_code_index(status)].labels)
    assert labels == {"code": code, "pool": ""}


def test_counters_are_published_by_a_flush() -> None:
    shared = make()
    counters = PoolCounters(*shared.pool_rows(1, 1))
    counters.integers[metrics.OK] += 3
    counters.observe(metrics.TTFT, 0.3)
    assert shared.pool_total(1, metrics.OK) == 0
    counters.flush()
    assert shared.pool_total(1, metrics.OK) == 3
    assert shared.pool_sums(1)[metrics.TTFT] == pytest.approx(0.3)
    again = PoolCounters(*shared.pool_rows(1, 1))  # a worker's successor goes on from there
    again.integers[metrics.OK] += 1
    again.flush()
    assert shared.pool_total(1, metrics.OK) == 4


@given(
    st.lists(
        st.tuples(
            st.integers(0, len(metrics.POOL_HISTOGRAMS) - 1),
            st.one_of(
                st.floats(0, 2000),
                st.sampled_from([b for h in metrics.POOL_HISTOGRAMS for b in h.bounds]),
            ),
        ),
        max_size=60,
    ),
    st.integers(0, 1 << 32),
)
def test_the_page_parses_and_its_histograms_are_true(
    observed: list[tuple[int, float]], seed: int
) -> None:
    shared = make(workers=2, pools=2)
    chance = random.Random(seed)
    parts = [PoolCounters(*shared.pool_rows(worker, 1)) for worker in range(2)]
    for histogram, value in observed:
        chance.choice(parts).observe(histogram, value)
    for part in parts:
        part.integers[metrics.ENGINE_ERROR] += 2
        part.integers[metrics.INFLIGHT_TOKENS] += 5
        part.flush()
    for worker in range(2):
        shared.worker_counters(worker)[metrics.WORKER_REASON_INDEX[Reason.MODEL_UNKNOWN]] = 9
    page = render(
        shared=shared,
        pools={"idle": 0, "m": 1},
        report=None,
        version="1",
        traffic={},
        replicas={},
        workers=(),
    ).decode()
    families = {family.name: family for family in text_string_to_metric_families(page)}
    assert all(name.startswith((PREFIX, "process_")) for name in families)

    def value(name: str, **labels: str) -> float:
        family = families[name.removesuffix("_total").removesuffix("_bucket")]
        (found,) = [s.value for s in family.samples if s.name == name and s.labels == labels]
        return float(found)

    assert value("tidegate_requests_total", pool="m", outcome="engine_error") == 4
    assert value("tidegate_inflight_tokens", pool="m") == 10
    assert value("tidegate_inflight_tokens", pool="idle") == 0
    assert value("tidegate_rejections_total", pool="", reason="model_unknown") == 18
    assert value("tidegate_rejections_total", pool="m", reason="model_unknown") == 0
    assert families["tidegate_requests"].type == "counter"
    assert families["tidegate_inflight_tokens"].type == "gauge"
    assert all(family.documentation for family in families.values())
    for number, spec in enumerate(metrics.POOL_HISTOGRAMS):
        mine = [seen for histogram, seen in observed if histogram == number]
        if not mine and spec.labels:
            continue
        assert families[PREFIX + spec.name].type == "histogram"
        samples = [
            one
            for one in families[PREFIX + spec.name].samples
            if spec.labels == tuple((name, one.labels[name]) for name, _ in spec.labels)
        ]
        buckets = [
            (float(s.labels["le"]), s.value)
            for s in samples
            if s.name.endswith("_bucket") and s.labels["pool"] == "m"
        ]
        assert [bound for bound, _ in buckets] == [*spec.bounds, float("inf")]
        counts = [count for _, count in buckets]
        assert counts == sorted(counts)
        for bound, count in buckets:
            assert count == sum(seen <= bound for seen in mine)
        (count,) = [
            s.value for s in samples if s.name.endswith("_count") and "m" in s.labels["pool"]
        ]
        assert count == len(mine)
        (total,) = [s.value for s in samples if s.name.endswith("_sum") and "m" in s.labels["pool"]]
        assert total == pytest.approx(sum(mine))


def test_buckets_rise_and_offsets_do_not_overlap() -> None:
    end = len(metrics.POOL_METRICS)
    for offset, spec in zip(metrics.HISTOGRAM_OFFSETS, metrics.POOL_HISTOGRAMS, strict=True):
        assert list(spec.bounds) == sorted(set(spec.bounds))
        assert offset == end
        end = offset + len(spec.bounds) + 1
    assert end == metrics.POOL_INTEGERS


# Messages

REPLICA = Replica(
    id="r", pool="m", slot=3, url="http://x", state=ReplicaState.READY, headers=(("a", "b"),)
)
FLEET = Fleet(
    version=7,
    pools=(Pool(name="m", slot=0, aliases=("a",), replicas=(REPLICA,), wake_eta_s=1.5),),
)


@given(st.lists(st.integers(1, 50), max_size=60))
def test_messages_arrive_whole_however_the_channel_cuts_them(cuts: list[int]) -> None:
    down = [FleetUpdate(fleet=FLEET), Drain(), FleetUpdate(fleet=Fleet(version=8))]
    up = [Listening(pid=5), WakeSignal(pool="m"), FailureReport(replica="r")]
    for sent, kind in ((down, ToWorker), (up, ToControl)):
        wire = b"".join(pack(message) for message in sent)
        unpacker, got = Unpacker(kind), []
        for size in cuts:
            got += unpacker.feed(wire[:size])
            wire = wire[size:]
        got += unpacker.feed(wire)
        assert got == sent


def test_a_worker_reads_the_settings_as_they_were_set() -> None:
    sent = configure(
        tls_key=Path("/k"), cors_allow_origins=("a", "b"), deadline_s=7.5, learning_rate=0.5
    )
    (got,) = Unpacker(ToWorker).feed(pack(sent))
    assert (got.index, got.gateway.tls_key, got.gateway.tls_certificate) == (0, "/k", None)
    assert got.gateway.cors_allow_origins == ("a", "b")
    assert got.gateway.holding.deadline_s == 7.5
    assert got.router.learning_rate == 0.5
    assert vars(got.router) == dict(sent.router)


def test_a_message_that_is_too_long_or_not_ours_is_refused() -> None:
    with pytest.raises(ValueError, match="bytes on the control channel"):
        Unpacker(ToWorker).feed((MAX_MESSAGE_BYTES + 1).to_bytes(4, "big"))
    with pytest.raises(msgspec.ValidationError):
        Unpacker(ToControl).feed(pack(Drain()))
