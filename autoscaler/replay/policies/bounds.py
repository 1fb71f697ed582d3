"""Two bounds on what a policy can do: a fixed number, and one that knows the future."""

from __future__ import annotations

import math

import numpy as np

from autoscaler.replay.engine import ReplicaModel, Slo
from autoscaler.replay.types import PoolObservation
from forecaster.types import Floats


class Static:
    """Always the same number."""

    def __init__(self, replicas: int) -> None:
        self.name = f"static-{replicas}"
        self.interval_s = 60.0
        self._replicas = replicas

    def step(self, now_s: float, seen: PoolObservation) -> int:
        """The desired replicas."""
        return self._replicas


class Oracle:
    """The fewest replica-hours without a violation, by a policy that knows what will come.

    ``needed`` is how many replicas each second needs. They are started a cold start before, and one
    that will not be needed is kept where that costs no more than to start it again: each level of
    the number is on its own, so gaps in it that are no longer than a cold start are filled.
    """

    def __init__(self, needed: Floats, cold_start_s: float, *, start_s: float = 0.0) -> None:
        self.name = "oracle"
        self.interval_s = 1.0
        self._start_s = start_s
        self._desired = schedule(needed, math.ceil(cold_start_s)).tolist()

    def step(self, now_s: float, seen: PoolObservation) -> int:
        """The desired replicas."""
        at = min(int(now_s - self._start_s), len(self._desired) - 1)
        return int(self._desired[at])


def schedule(needed: Floats, cold_start_s: int) -> Floats:
    """What to desire in each second, so that ``needed`` are ready in each."""
    count = len(needed)
    held = np.zeros(count)
    for level in range(1, int(needed.max(initial=0.0)) + 1):
        over = np.flatnonzero(needed >= level)
        gaps = np.diff(over)
        # Runs of seconds that are no further apart than a start takes are one.
        breaks = np.flatnonzero(gaps > cold_start_s + 1)
        begins = np.concatenate([[over[0]], over[breaks + 1]])
        ends = np.concatenate([over[breaks], [over[-1]]])
        for begin, end in zip(begins, ends, strict=True):
            held[max(0, begin - cold_start_s) : end + 1] += 1
    return held


def needed_replicas(
    rate: Floats,
    prompt_tokens: Floats,
    output_tokens: Floats,
    engine: ReplicaModel,
    slo: Slo,
    margin: float = 1.0,
) -> Floats:
    """Replicas that each second needs, so that none waits longer than the TTFT allows and decode
    is not slower than the ITL.

    Prefill may be put off: each second's is spread over as many whole seconds as the TTFT has left
    after it. What a request takes in all is spread over its life, as its mean ITL is.
    """
    known: dict[tuple[float, float], float] = {}
    work = np.empty(len(rate))
    for index, sizes in enumerate(zip(prompt_tokens.tolist(), output_tokens.tolist(), strict=True)):
        each = known.get(sizes)
        if each is None:
            each = known[sizes] = engine.work_s(*sizes, slo)
        work[index] = each * rate[index]
    prefill = rate * prompt_tokens / engine.prefill_tokens_per_s
    requests = max(1e-300, float(rate.sum()))
    mean_prefill_s = float(prefill.sum()) / requests
    lasts_s = float((rate * output_tokens).sum()) / requests * slo.itl_s
    off = max(1, int(slo.ttft_s - mean_prefill_s))
    needed = np.maximum(spread(work, max(off, round(lasts_s))), spread(prefill, off))
    return np.ceil(needed * margin - 1e-9)


def spread(values: Floats, seconds: int) -> Floats:
    """Each value spread evenly over so many seconds from its own on."""
    sums = np.concatenate([np.zeros(seconds), np.cumsum(values)])
    result: Floats = (sums[seconds:] - sums[:-seconds]) / seconds
    return result
