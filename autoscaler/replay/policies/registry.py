"""All policies by name, and how one is built for a pool."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from autoscaler.replay.policies.ahpa import Ahpa
from autoscaler.replay.policies.bounds import Static
from autoscaler.replay.policies.dynamo import DynamoHybrid, DynamoLoad, DynamoThroughput
from autoscaler.replay.policies.facts import PoolFacts
from autoscaler.replay.policies.knative import Knative
from autoscaler.replay.policies.kubernetes import HpaRequests, HpaUtilization, Keda
from autoscaler.replay.policies.llm_d import LlmDSlo, LlmDWva
from autoscaler.replay.policies.ray_serve import RayServe
from autoscaler.replay.policies.tidegate import POLICY, Auto, Reactive
from autoscaler.replay.policies.windows import replicas_for
from autoscaler.replay.types import ScalingPolicy
from autoscaler.settings import PriceSettings

Build = Callable[[PoolFacts], ScalingPolicy]
ORACLE = "oracle"
"""Built for one trace, of which it knows all (``autoscaler.replay.run.find_oracle``)."""


class UnknownPolicyError(ValueError):
    """There is no policy of this name; the message names those that there are."""


def static_at_peak(facts: PoolFacts) -> ScalingPolicy:
    """As many as the busiest minute of the history needs; the most there may be without one."""
    if facts.history is None:
        return Static(facts.max_replicas)
    peak = float(facts.history.values.max())
    wanted = replicas_for(peak, facts.capacity_tokens_per_s)
    return Static(max(facts.min_replicas, min(facts.max_replicas, wanted)))


PEERS: Mapping[str, Build] = {
    "hpa": HpaUtilization,
    "hpa-requests": HpaRequests,
    "keda": Keda,
    "knative": Knative,
    "knative-delay": lambda facts: Knative(facts, scale_down_delay_s=300.0),
    "ray-serve": RayServe,
    "ahpa": Ahpa,
    "dynamo-load": DynamoLoad,
    "dynamo-throughput": DynamoThroughput,
    "dynamo-hybrid": DynamoHybrid,
    "llm-d-slo": LlmDSlo,
    "llm-d-wva": LlmDWva,
}
"""Our re-implementations of others' policies."""

POLICIES: Mapping[str, Build] = {
    "auto": Auto,
    "reactive": Reactive,
    **PEERS,
    "static": static_at_peak,
}
"""All that need no knowledge of the future."""

TOKENS_ONLY = frozenset({"llm-d-slo", "llm-d-wva"})
"""Those that watch the ITL or the KV cache, and see nothing where a trace only counts requests."""


def build(name: str, facts: PoolFacts) -> ScalingPolicy:
    """The policy of this name (``static:N``: N replicas, ``auto:PRICE``: the price of a violated
    second, ``prices.violated_second``). Raises ``UnknownPolicyError``."""
    kind, _, number = name.partition(":")
    if kind == "static" and number:
        if not number.isdigit():
            raise UnknownPolicyError(f"static:{number} is no number of replicas")
        return Static(int(number))
    if kind == "auto" and number:
        return Auto(facts, name=name, policy=replace(POLICY, violated_second=to_price(number)))
    make = POLICIES.get(name)
    if make is None:
        known = ", ".join([*POLICIES, ORACLE])
        raise UnknownPolicyError(
            f"there is no policy {name!r}; there are {known}, static:N and auto:PRICE"
        )
    return make(facts)


def to_price(text: str) -> float:
    """Raises ``UnknownPolicyError``, as the settings' range is exceeded."""
    try:
        return PriceSettings(violated_second=float(text)).violated_second
    except ValueError:
        raise UnknownPolicyError(
            f"auto:{text}: the price of a violated second is above 0 and at most 1000000"
        ) from None
