"""A pool on virtual time, second by second, as a fluid: requests are counts, not things.

Each second's arrivals are a cohort (how many, which may be a fraction, and their mean tokens). They
wait in the gateway, first come first served, until the ready replicas have prefill time and places
for them; then they decode at the pace of ``ReplicaModel``. All that run are given tokens at the
same pace, so one clock that counts tokens per request (as a virtual clock of fair queueing does)
says when a cohort is done, and a heap of the clock's readings makes that O(log n).

**Replicas are loaded alike.** The router picks the replica with the least outstanding tokens; where
requests are small beside what a replica has in flight, its limit is an equal split, and that is
what is assumed here. Left out are chance within a second, and that a fresh replica fills over one
service time.

Waits are exact to the part of a second under the assumption that arrivals and service are spread
evenly within one.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from dataclasses import dataclass

from autoscaler.replay.engine import ReplicaModel, Slo
from autoscaler.replay.score import WaitQuantiles
from autoscaler.replay.supply import Starts, Supply
from autoscaler.replay.types import PoolObservation

EPSILON = 1e-9
LEAST_SHARE = 1e-100
UTILIZATION_S = 15
LATENCY_S = 60


@dataclass(slots=True)
class Cohort:
    """What is left in the queue of one second's arrivals. ``served`` is the part that has gone."""

    second: int
    arrived: float
    left: float
    prompt_tokens: float
    output_tokens: float
    served: float = 0.0


@dataclass(slots=True, kw_only=True)
class RunningCohort:
    """Requests that began together. ``share`` and ``epoch`` say which part of them is with replicas
    that are ready: the pool's share when they began, beside what it is now."""

    count: float
    tokens: float
    output_tokens: float
    began_s: float
    came: int
    late: bool
    share: float
    epoch: int


class FluidPool:
    """See the module. One owner calls ``advance`` for each second, and ``scale`` in between."""

    def __init__(
        self,
        engine: ReplicaModel,
        slo: Slo,
        starts: Starts,
        *,
        ready: int,
        seconds: int,
        scored_from: int = 0,
    ) -> None:
        self.engine = engine
        self.slo = slo
        self.supply = Supply(starts, ready, 0.0)
        self.second = 0
        # What came, and what became of it.
        self.arrivals_total = 0.0
        self.arrived_tokens_total = 0.0
        self.answered = 0.0
        self.queued_requests = 0.0
        self.queued_tokens = 0.0
        self.running = 0.0
        self.running_tokens = 0.0
        self.work_arrived_s = 0.0
        # The score.
        self.scored_from = scored_from
        self.scored_requests = 0.0
        self.violations = 0.0
        self.violated = bytearray(seconds)
        self.waits = WaitQuantiles()
        self.longest_wait_s = 0.0
        # Decode.
        self._queue: deque[Cohort] = deque()
        self._clock = 0.0
        self._last_finish = 0.0
        self._heap: list[tuple[float, int, RunningCohort]] = []
        self._order = 0
        self._freed = 0.0
        """Places that the last second freed. In the next as many again are freed while it lasts, so
        arrivals, which are spread over it too, do not have to wait for its end."""
        self._leaving: list[tuple[RunningCohort, float]] = []
        """The parts that leave in the next second."""
        self._at_ready = 0.0
        """Running requests with ready replicas; the rest are with draining ones."""
        self._share = 1.0
        self._epoch = 0
        self._drains: deque[tuple[float, int]] = deque()
        self._after: deque[tuple[int, float, float]] = deque()
        self._drains_after: deque[tuple[int, int]] = deque()
        self._quick = 0.0
        """Places taken by requests that end within the second they begin in."""
        self._prefilling = 0.0
        """Requests in prefill, as the mean of the last second."""
        self._prefilling_tokens = 0.0
        self._quick_begun: list[tuple[int, float]] = []
        # What an observer sees.
        self._busy_s = [0.0] * UTILIZATION_S
        self._offered_s = [0.0] * UTILIZATION_S
        self._ttft_s = [0.0] * LATENCY_S
        self._itl_s = [0.0] * LATENCY_S

    # ── Scaling ──────────────────────────────────────────────────────────────────────────────────

    def scale(self, desired: int) -> None:
        """Have this many replicas. Those that drain keep what they run, and cost until it is
        done."""
        before = self.supply.ready
        drained = self.supply.scale(desired, self.second)
        if not drained:
            return
        stays = (before - drained) / before
        self._at_ready *= stays
        if stays > 0.0:
            self._share *= stays
            if self._share < LEAST_SHARE:
                for one in [one for _, _, one in self._heap] + [one for one, _ in self._leaving]:
                    one.share /= self._share
                self._share = 1.0
        else:
            self._epoch += 1
            self._share = 1.0
            self._at_ready = 0.0
        if self._heap or self._leaving:
            self._drains.append((self._last_finish, drained))
        elif self._after:
            self._drains_after.append((self._after[-1][0], drained))
        else:
            self.supply.release(drained)

    def observe(self) -> PoolObservation:
        """What a policy sees at the beginning of a second."""
        offered_s = sum(self._offered_s)
        second = self.second
        return PoolObservation(
            ready=self.supply.ready,
            starting=self.supply.starting,
            arrivals_total=self.arrivals_total,
            arrived_tokens_total=self.arrived_tokens_total,
            queued_requests=self.queued_requests,
            queued_tokens=self.queued_tokens,
            inflight_requests=self.running + self._quick + self._prefilling,
            inflight_tokens=self.running_tokens + self._prefilling_tokens,
            utilization=min(1.0, sum(self._busy_s) / offered_s) if offered_s else None,
            ttft_s=p90(self._ttft_s[: min(second, LATENCY_S)]),
            itl_s=p90(self._itl_s[: min(second, LATENCY_S)]),
        )

    # ── One second ───────────────────────────────────────────────────────────────────────────────

    def advance(self, arrivals: float, prompt_tokens: float, output_tokens: float) -> None:
        """One second passes, in which so many requests of these means come."""
        engine, supply, second = self.engine, self.supply, self.second
        supply.begin(second)
        if self._after or self._drains_after:
            self._finish_after()
        ready = supply.ready
        if ready:
            per_replica = (self._at_ready + self._quick) / ready
        else:
            per_replica = self.running / supply.draining if supply.draining else 0.0
        itl_s = engine.itl_base_s + engine.itl_slope_s * per_replica
        chunk_s = engine.chunk_tokens / engine.prefill_tokens_per_s
        share = chunk_s / (itl_s + chunk_s)
        full = ready * engine.prefill_tokens_per_s
        budget = full * share
        self._quick = self._prefilling = self._prefilling_tokens = 0.0

        tokens = prompt_tokens + output_tokens
        if arrivals:
            self.arrivals_total += arrivals
            self.arrived_tokens_total += arrivals * tokens
            self.work_arrived_s += arrivals * engine.work_s(prompt_tokens, output_tokens, self.slo)
            if second >= self.scored_from:
                self.scored_requests += arrivals
        used = 0.0
        slot = second % LATENCY_S
        self._ttft_s[slot] = 0.0
        self._busy_s[second % UTILIZATION_S] = 0.0
        if arrivals and not self._queue:
            need = arrivals * prompt_tokens
            if need <= budget and self._fits(arrivals, prompt_tokens, output_tokens, itl_s, ready):
                used = need
                self._admit(second, arrivals, prompt_tokens, output_tokens, 0.0, itl_s)
                arrivals = 0.0
        if arrivals:
            self._queue.append(Cohort(second, arrivals, arrivals, prompt_tokens, output_tokens))
            self.queued_requests += arrivals
            self.queued_tokens += arrivals * tokens
        if self._queue and budget > 0.0:
            used = self._serve(budget, itl_s, ready)

        seen_s = itl_s / (1.0 - used / full) if used and itl_s else itl_s
        self._itl_s[slot] = seen_s if self.running + self._quick > EPSILON else 0.0
        self._offered_s[second % UTILIZATION_S] = float(ready)
        self.second = second + 1
        supply.end()
        if self._quick_begun:
            self._quick *= seen_s / itl_s
            if seen_s > self.slo.itl_s:
                for came, count in self._quick_begun:
                    self._violate(came, count)
            self._quick_begun.clear()
        if self._heap or self._leaving:
            self._decode(seen_s)
        elif self._drains:
            self._release()

    def _finish_after(self) -> None:
        """What only stays in flight for a while (``after_s``) leaves, and the drained replicas with
        it."""
        after, drains = self._after, self._drains_after
        while after and after[0][0] <= self.second:
            _, count, tokens = after.popleft()
            self.answered += count
            self.running -= count
            self.running_tokens -= tokens
        while drains and (not after or drains[0][0] <= self.second):
            self.supply.release(drains.popleft()[1])

    def _fits(
        self, arrivals: float, prompt: float, output: float, itl_s: float, ready: int
    ) -> bool:
        places = min(1.0, output * itl_s)
        most = ready * self.engine.most_running(prompt, output)
        return arrivals * places <= most - self._at_ready + self._freed

    def _serve(self, budget: float, itl_s: float, ready: int) -> float:
        """Take from the queue what this second has time and places for; the prompt tokens used."""
        queue, second = self._queue, self.second
        used = 0.0
        while queue:
            cohort = queue[0]
            prompt, output = cohort.prompt_tokens, cohort.output_tokens
            count = cohort.left
            if prompt > 0.0:
                count = min(count, (budget - used) / prompt)
            places = min(1.0, output * itl_s)
            if places > 0.0:
                most = ready * self.engine.most_running(prompt, output)
                count = min(count, (most - self._at_ready - self._quick + self._freed) / places)
            if cohort.left - count <= EPSILON * cohort.arrived:
                count = cohort.left
            elif count <= EPSILON * cohort.arrived:
                break
            middle = second + (used + count * prompt / 2) / budget
            came = cohort.second + (cohort.served + count / 2) / cohort.arrived
            used += count * prompt
            self.queued_requests -= count
            self.queued_tokens -= count * (prompt + output)
            self._admit(cohort.second, count, prompt, output, max(0.0, middle - came), itl_s)
            cohort.left -= count
            cohort.served += count
            if cohort.left > 0.0:
                break
            queue.popleft()
        if not queue:
            self.queued_requests = self.queued_tokens = 0.0
        return used

    def _admit(
        self,
        came: int,
        count: float,
        prompt: float,
        output: float,
        wait_s: float,
        itl_s: float,
    ) -> None:
        """These requests begin on the ready replicas."""
        second, slo = self.second, self.slo
        # A prompt takes as many engine steps as it has chunks, in each of which decode goes on.
        engine = self.engine
        prefill_s = prompt / engine.prefill_tokens_per_s
        prefill_s += itl_s * max(1.0, prompt / engine.chunk_tokens)
        ttft_s = wait_s + prefill_s
        self._prefilling += count * prefill_s
        slot = second % LATENCY_S
        if ttft_s > self._ttft_s[slot]:
            self._ttft_s[slot] = ttft_s
        self._busy_s[second % UTILIZATION_S] += count * self.engine.work_s(prompt, output, slo)
        if came >= self.scored_from:
            self.waits.add(wait_s, count)
            if wait_s > self.longest_wait_s:
                self.longest_wait_s = wait_s
        late = ttft_s > slo.ttft_s
        if late:
            self._violate(came, count)
        if output == 0.0 and self.engine.after_s:
            self._after.append((second + self.engine.after_s, count, count * prompt))
            self.running += count
            self.running_tokens += count * prompt
            return
        if output * itl_s <= 1.0:
            self.answered += count
            quick = count * output * itl_s
            self._quick += quick
            self._prefilling_tokens += (count * prefill_s + quick) * (prompt + output)
            if output > 0.0 and not late:
                self._quick_begun.append((came, count))
            return
        running = RunningCohort(
            count=count,
            tokens=prompt + output,
            output_tokens=output,
            began_s=float(second),
            came=came,
            late=late,
            share=self._share,
            epoch=self._epoch,
        )
        finish = self._clock + output
        self._order += 1
        heapq.heappush(self._heap, (finish, self._order, running))
        self._last_finish = max(finish, self._last_finish)
        self.running += count
        self._at_ready += count
        self.running_tokens += count * running.tokens

    def _decode(self, itl_s: float) -> None:
        """Each running request is given a second's tokens; those that have all leave.

        A cohort came over the whole of a second, so it leaves over the whole of one, which is two
        by the calendar: its places are taken for as long as they were in the mean.
        """
        before = self._at_ready
        for one, count in self._leaving:
            self._leave(one, count)
        self._leaving.clear()
        heap = self._heap
        step = 1.0 / itl_s
        clock = self._clock = self._clock + step
        while heap and heap[0][0] <= clock:
            finish, _, one = heapq.heappop(heap)
            now = one.count * (clock - finish) / step
            self._leave(one, now)
            self._leaving.append((one, one.count - now))
            lasted_s = self.second - (clock - finish) * itl_s - one.began_s
            if not one.late and lasted_s > self.slo.itl_s * one.output_tokens * (1 + EPSILON):
                self._violate(one.came, one.count)
        if not heap and not self._leaving:
            self._freed = 0.0
            self.running = self.running_tokens = self._at_ready = 0.0
            self._release()
            return
        self._freed = before - self._at_ready
        if self._drains:
            self._release(clock - step)

    def _leave(self, one: RunningCohort, count: float) -> None:
        """So many of these have all their tokens."""
        self.answered += count
        self.running -= count
        self.running_tokens -= count * one.tokens
        if one.epoch == self._epoch:
            self._at_ready -= count * self._share / one.share

    def _release(self, due: float = math.inf) -> None:
        drains = self._drains
        while drains and drains[0][0] <= due:
            self.supply.release(drains.popleft()[1])

    def _violate(self, came: int, count: float) -> None:
        if came >= self.scored_from:
            self.violations += count
            self.violated[came] = 1

    def close(self) -> None:
        """The trace is over: what has waited longer than the SLO allows is hurt, answered or
        not."""
        for cohort in self._queue:
            if self.second - cohort.second > self.slo.ttft_s:
                self._violate(cohort.second, cohort.left)

    def check_integrity(self) -> None:
        """Raise ``AssertionError`` where a request was lost or answered twice."""
        known = self.answered + self.running + self.queued_requests
        assert abs(self.arrivals_total - known) <= 1e-6 * max(1.0, self.arrivals_total), (
            f"{self.arrivals_total} came, {known} are accounted for"
        )
        assert min(self.supply.ready, self.supply.draining) >= 0
        assert -1e-6 <= self._at_ready <= self.running + 1e-6 * max(1.0, self.running)
        assert self.violations <= self.scored_requests * (1 + 1e-9)


def p90(values: list[float]) -> float | None:
    """The 90th percentile of the values that are above zero; none without any."""
    known = sorted(value for value in values if value > 0.0)
    return known[math.ceil(0.9 * len(known)) - 1] if known else None
