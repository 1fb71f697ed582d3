"""What KEDA is answered: a value, or an error, but never zero for what is not known."""

from __future__ import annotations

import pytest
from signal_rig import signals, unknown

from autoscaler.adapters.keda.messages import FIELDS, make_messages
from autoscaler.adapters.keda.scaler import (
    BadTrigger,
    NotKnownYet,
    find_pool,
    find_value,
    is_active,
    read_trigger,
)
from autoscaler.adapters.types import PoolSignals

CHAT, OTHER = signals(), signals("org/other", namespace="ml")


@pytest.mark.parametrize(
    ("metadata", "metric", "target", "value"),
    [
        ({"pool": "chat"}, "tidegate_desired_replicas", 1.0, 3),
        ({"pool": "chat", "target": "2.5"}, "tidegate_desired_replicas", 2.5, 3),
        (
            {"pool": "chat", "metric": "tidegate_inflight_tokens", "target": "8000"},
            "tidegate_inflight_tokens", 8_000.0, 4_000,
        ),
        (
            {
                "pool": "chat", "metric": "tidegate_ttft_seconds", "quantile": "0.95",
                "target": "0.5", "scalerAddress": "tidegate:8004",
            },
            "tidegate_ttft_seconds", 0.5, 0.5,
        ),
        (
            {
                "pool": "chat", "metric": "tidegate_forecast_tokens_per_second",
                "quantile": "0.95", "horizon": "lead", "target": "100",
            },
            "tidegate_forecast_tokens_per_second", 100.0, 140.0,
        ),
    ],
)  # fmt: skip
def test_a_trigger_and_its_value(
    metadata: dict[str, str], metric: str, target: float, value: float
) -> None:
    trigger = read_trigger("default", metadata)
    assert (trigger.metric.name, trigger.target) == (metric, target)
    assert find_value(trigger, find_pool(trigger, (OTHER, CHAT))) == pytest.approx(value)


@pytest.mark.parametrize(
    ("metadata", "names"),
    [
        ({}, ["pool"]),
        ({"pool": " "}, ["pool"]),
        ({"pool": "chat", "metric": "nix"}, ["metric", "nix", "tidegate_desired_replicas"]),
        ({"pool": "chat", "metric": "tidegate_inflight_tokens"}, ["target"]),
        ({"pool": "chat", "target": "many"}, ["target", "many"]),
        ({"pool": "chat", "target": "0"}, ["target", "0"]),
        ({"pool": "chat", "target": "-1"}, ["target", "-1"]),
        ({"pool": "chat", "target": "nan"}, ["target", "nan"]),
        ({"pool": "chat", "target": "inf"}, ["target", "inf"]),
        ({"pool": "chat", "metric": "tidegate_ttft_seconds", "target": "1"}, ["quantile"]),
    ],
)
def test_metadata_that_cannot_be_used(metadata: dict[str, str], names: list[str]) -> None:
    with pytest.raises(BadTrigger) as raised:
        read_trigger("default", metadata)
    for name in names:
        assert name in str(raised.value)


@pytest.mark.parametrize(("namespace", "pool"), [("default", "nobody"), ("default", "org-other")])
def test_a_pool_that_a_namespace_does_not_see(namespace: str, pool: str) -> None:
    trigger = read_trigger(namespace, {"pool": pool})
    with pytest.raises(BadTrigger, match="chat") as raised:
        find_pool(trigger, (CHAT, OTHER))
    assert "org-other" not in str(raised.value).partition("there are")[2]


@pytest.mark.parametrize("name", ["org/other", "org-other"])
def test_a_pool_by_its_name_and_by_its_label(name: str) -> None:
    assert find_pool(read_trigger("ml", {"pool": name}), (CHAT, OTHER)) is OTHER


@pytest.mark.parametrize(
    ("pool", "expected"),
    [
        (signals(active=True, desired_replicas=0), True),
        (signals(active=True, desired_replicas=None), True),
        (signals(active=False, desired_replicas=2), True),  # ahead of a request
        (signals(active=None, desired_replicas=2), True),
        (signals(active=False, desired_replicas=0), False),
        (signals(active=False, desired_replicas=None), False),
    ],
)
def test_whether_there_shall_be_a_replica(pool: PoolSignals, expected: bool) -> None:
    assert is_active(pool) is expected


@pytest.mark.parametrize("desired", [0, None])
def test_what_is_not_known_is_not_inactive(desired: int | None) -> None:
    with pytest.raises(NotKnownYet):
        is_active(signals(active=None, desired_replicas=desired))


def test_a_value_that_is_not_known_is_none() -> None:
    for metadata in (
        {"pool": "chat"},
        {"pool": "chat", "metric": "tidegate_queued_requests", "target": "1"},
        {
            "pool": "chat", "metric": "tidegate_forecast_tokens_per_second", "target": "1",
            "quantile": "0.95", "horizon": "lead",
        },
        {
            "pool": "chat", "metric": "tidegate_ttft_seconds", "target": "1", "quantile": "0.95",
        },
    ):  # fmt: skip
        trigger = read_trigger("default", metadata)
        with pytest.raises(NotKnownYet):
            find_value(trigger, unknown())


def test_a_series_that_there_is_not_is_named() -> None:
    metadata = {"pool": "chat", "metric": "tidegate_ttft_seconds", "target": "1"}
    trigger = read_trigger("default", {**metadata, "quantile": "0.42"})
    with pytest.raises(BadTrigger, match=r"0\.42.*0\.5, 0\.95, 0\.99"):
        find_value(trigger, CHAT)


def test_a_negative_value_is_zero() -> None:
    trigger = read_trigger("default", {"pool": "chat"})
    assert find_value(trigger, signals(desired_replicas=-3)) == 0.0


def test_messages_have_all_fields_and_survive_the_wire() -> None:
    made = make_messages()
    assert set(made) == set(FIELDS)
    ref = made["ScaledObjectRef"](name="n", namespace="s", scalerMetadata={"pool": "chat"})
    again = made["ScaledObjectRef"].FromString(ref.SerializeToString())
    assert (again.name, again.namespace, dict(again.scalerMetadata)) == (
        "n", "s", {"pool": "chat"},
    )  # fmt: skip
    make_messages()  # a second copy does no harm
