"""What one replica carries: learned from minutes in which it was loaded as far as it could be.

A minute in which requests waited, or whose tokens came beyond the SLO, shows a limit. Where they
waited and were still within the SLO, the throughput was the capacity. Where they were beyond it,
the capacity lies between the best minute within the SLO and that one. Minutes with requests of
about the same lengths, seen by this control process, count first; then those of earlier ones, then
of other lengths. Before any limit was seen there are what can be derived from the engine, and a
hint.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from autoscaler.types import CapacitySource, ReplicaCapacity

SAMPLES = 60
"""Minutes that are remembered."""
LIMITS_LEAST = 3
"""Minutes at a limit before they are believed: one may have been the start of a replica."""
ALIKE = 2.0
"""Requests whose prompts and answers are at most so many times as long count as of one mix."""
SHORT_TOKENS = 16.0
"""Lengths that differ by a few tokens are alike whatever their ratio."""
PROMPT_COST = 0.25
"""What a token of a prompt takes of a replica, in parts of one that is generated. Hosted models are
priced by about that ratio, and with it the capacities of the engine model of ``autoscaler.replay``
for different mixes are nearest to each other. It only matters where the mix changes."""


class Mix(NamedTuple):
    """How long requests are: mean tokens of a prompt and of an answer."""

    prompt_tokens: float
    output_tokens: float

    @property
    def tokens(self) -> float:
        """Of both."""
        return self.prompt_tokens + self.output_tokens

    def is_like(self, other: Mix) -> bool:
        """Whether what a replica carries of one says what it carries of the other."""
        prompt, output = self.prompt_tokens + SHORT_TOKENS, self.output_tokens + SHORT_TOKENS
        prompt /= other.prompt_tokens + SHORT_TOKENS
        output /= other.output_tokens + SHORT_TOKENS
        return 1.0 / ALIKE <= prompt <= ALIKE and 1.0 / ALIKE <= output <= ALIKE

    def convert(self, tokens_per_s: float, other: Mix) -> float:
        """Tokens per second of another mix that are as much work as these of this one."""
        if self == other:
            return tokens_per_s
        work = PROMPT_COST * self.prompt_tokens + self.output_tokens
        other_work = PROMPT_COST * other.prompt_tokens + other.output_tokens
        if not (work > 0.0 and other_work > 0.0):
            return tokens_per_s
        return tokens_per_s * (work / self.tokens) * (other.tokens / other_work)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadSample:
    """A minute of a pool in which the number of its replicas did not change: prompt and output
    tokens per second that each of them worked off, how long its requests were, whether all was
    within the SLO, and whether requests waited. ``accelerator`` is what the replicas compute on;
    empty where that is not known."""

    tokens_per_s: float
    mix: Mix
    within_slo: bool
    waited: bool
    accelerator: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class CapacityState:
    """Minutes that said something, oldest first: ``earlier`` those that an earlier control process
    saw, of replicas which were started alike."""

    samples: tuple[LoadSample, ...] = ()
    earlier: tuple[LoadSample, ...] = ()

    def known(self, accelerator: str) -> CapacityState:
        """What is known of this accelerator; where that is unknown, of the newest that was seen."""
        every = (*self.earlier, *self.samples)
        named = [one.accelerator for one in every if one.accelerator]
        if not named or {accelerator or named[-1]} == set(named):
            return self
        wanted = {"", accelerator or named[-1]}
        return CapacityState(
            samples=tuple(one for one in self.samples if one.accelerator in wanted),
            earlier=tuple(one for one in self.earlier if one.accelerator in wanted),
        )


def is_telling(state: CapacityState, sample: LoadSample) -> bool:
    """Whether a minute says more than was known: it shows a limit, or more work within the SLO than
    any before it with such requests."""
    if not sample.tokens_per_s > 0.0:
        return False
    if sample.waited or not sample.within_slo:
        return True
    seen = state.known(sample.accelerator)
    alike = of_mix((*seen.earlier, *seen.samples), sample.mix)
    return sample.tokens_per_s > find_best(alike, sample.mix)


def note_load(state: CapacityState, sample: LoadSample) -> CapacityState:
    """The state with one more minute."""
    return replace(state, samples=(*state.samples, sample)[-SAMPLES:])


def estimate_capacity(
    state: CapacityState,
    *,
    mix: Mix | None = None,
    accelerator: str = "",
    derived: float | None = None,
    hint: float | None = None,
) -> ReplicaCapacity | None:
    """What a replica sustains within the SLO of requests of this mix; ``None`` where nothing is
    known. Without a ``mix`` it is of that which came last.

    ``derived`` and ``hint`` are tokens per second. Neither they nor what was seen earlier count
    below what was done within the SLO already.
    """
    state = state.known(accelerator)
    every = (*state.earlier, *state.samples)
    if mix is None and every:
        mix = every[-1].mix
    best = 0.0
    if mix is not None:
        fresh = of_mix(state.samples, mix)
        seen = find_limit(fresh, mix)
        if seen is not None:
            return ReplicaCapacity(tokens_per_s=seen, source=CapacitySource.SATURATED)
        best, alike = find_best(fresh, mix), of_mix(every, mix)
        seen = find_limit(alike, mix) or find_limit(every, mix)
        if seen is not None:
            return ReplicaCapacity(tokens_per_s=max(best, seen), source=CapacitySource.HISTORY)
        best = max(best, find_best(alike, mix))
    for tokens_per_s, source in ((derived, CapacitySource.DERIVED), (hint, CapacitySource.HINT)):
        if tokens_per_s is not None and tokens_per_s > 0.0:
            return ReplicaCapacity(tokens_per_s=max(best, tokens_per_s), source=source)
    return None


def of_mix(samples: Sequence[LoadSample], mix: Mix) -> list[LoadSample]:
    """Those with requests of about these lengths."""
    return [one for one in samples if one.mix.is_like(mix)]


def find_best(samples: Sequence[LoadSample], mix: Mix) -> float:
    """The most tokens per second, as of this mix, that were worked off within the SLO."""
    return max(
        (one.mix.convert(one.tokens_per_s, mix) for one in samples if one.within_slo), default=0.0
    )


def find_limit(samples: Sequence[LoadSample], mix: Mix) -> float | None:
    """The tokens per second, as of this mix, that these minutes show to be the most within the SLO;
    ``None`` where too few were at a limit."""
    full, beyond = [], []
    for one in samples:
        if not one.within_slo:
            beyond.append(one.mix.convert(one.tokens_per_s, mix))
        elif one.waited:
            full.append(one.mix.convert(one.tokens_per_s, mix))
    if len(full) >= LIMITS_LEAST:
        return statistics.median(full)
    if len(beyond) >= LIMITS_LEAST:
        limit, best = statistics.median(beyond), find_best(samples, mix)
        return min(best, limit) if best else limit
    return None


def derive_tokens_per_s(
    mix: Mix,
    *,
    e2e_s: float,
    running_most: float,
    itl_s: float | None = None,
    batched_tokens_most: float | None = None,
) -> float | None:
    """Tokens per second of a replica that keeps as many requests running as it can (Little's law):
    each request of this mix is there for ``e2e_s``. A step of the engine, which takes ``itl_s``,
    works off no more than its most batched tokens. ``None`` where a figure is missing."""
    if e2e_s <= 0.0 or running_most <= 0.0:
        return None
    rate = running_most * mix.tokens / e2e_s
    if itl_s and batched_tokens_most is not None:
        rate = min(rate, batched_tokens_most / itl_s)
    return rate


def running_most(mix: Mix, *, kv_tokens: float | None, requests_most: float | None) -> float | None:
    """Requests that fit in the KV cache of a replica and below its limits at a time: each holds its
    prompt and on average half of its output (as the workload variant autoscaler of llm-d has it).
    ``None`` where neither is known."""
    limits = [] if requests_most is None else [requests_most]
    held = mix.prompt_tokens + mix.output_tokens / 2
    if kv_tokens is not None and held > 0.0:
        limits.append(kv_tokens / held)
    return min(limits, default=None)
