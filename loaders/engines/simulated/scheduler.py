"""A model of one engine: continuous batching over paged KV blocks. Pure: time is a parameter.

The theory, after vLLM's scheduler. The engine works in steps. A step is planned at its start: the
running sequences first, in order, then waiting ones, first come first served, until the step's
token budget, the sequence limit or the KV blocks run out. A sequence that has its whole prompt
computed takes one token of the budget and produces one; a longer need is computed in chunks. Where
a running sequence cannot be given a block, the youngest running one is preempted: it loses its
blocks, goes back to the head of the queue and is computed again. A step lasts

    overhead + prompt tokens / prefill rate + (1 + slowdown · (n - 1)) / decode rate    [n decoding]

and what it produced is visible at its end, when the next one is planned.

Use: ``submit`` and ``abort`` as requests come and go, ``advance(now)`` to let every step that ends
by ``now`` end, ``next_at`` to know when that is worth calling again. Nothing happens in between,
so a test or a fleet simulator can move a day in seconds by calling ``advance(next_at)``.
"""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineModel:
    """What the simulated engine can do. Rates may be ``math.inf``: that part then takes no time."""

    prefill_tokens_per_s: float = 20_000.0
    decode_tokens_per_s: float = 60.0
    batch_slowdown: float = 0.004
    step_overhead_s: float = 0.0
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 8192
    max_num_queued_reqs: int = 16_384
    max_model_len_tokens: int = 8192
    kv_blocks: int = 4096
    block_size_tokens: int = 16
    prefix_caching: bool = True
    chunked_prefill: bool = True

    def __post_init__(self) -> None:
        for name in ("prefill_tokens_per_s", "decode_tokens_per_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, is {getattr(self, name)}")
        for name in ("batch_slowdown", "step_overhead_s"):
            value = getattr(self, name)
            if not (value >= 0 and math.isfinite(value)):
                raise ValueError(f"{name} must be a finite number of at least 0, is {value}")
        for name in ("max_num_seqs", "max_num_batched_tokens", "max_num_queued_reqs", "kv_blocks"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, is {getattr(self, name)}")
        if self.block_size_tokens < 1 or self.max_model_len_tokens < 1:
            raise ValueError("block_size_tokens and max_model_len_tokens must be at least 1")
        if self.kv_blocks * self.block_size_tokens < self.max_model_len_tokens:
            raise ValueError(
                f"{self.kv_blocks} KV blocks of {self.block_size_tokens} tokens cannot hold one "
                f"sequence of max_model_len {self.max_model_len_tokens}: more blocks are needed, "
                "or a smaller max_model_len"
            )
        if not self.chunked_prefill and self.max_num_batched_tokens < self.max_model_len_tokens:
            raise ValueError(
                f"without chunked prefill, max_num_batched_tokens ({self.max_num_batched_tokens}) "
                f"must be at least max_model_len ({self.max_model_len_tokens})"
            )


class BlockTable:
    """The blocks of one sequence: ``hashes`` it shares, in order, and ``anonymous`` of its own."""

    __slots__ = ("anonymous", "hashes")

    def __init__(self) -> None:
        self.hashes: list[int] = []
        self.anonymous = 0

    def __len__(self) -> int:
        return len(self.hashes) + self.anonymous


class BlockPool:
    """``capacity`` KV-cache blocks with prefix caching, as vLLM keeps them, handed to sequences and
    taken back. Counts only: there is no memory.

    A block is one of three things: in use and anonymous (its tokens are not all computed yet, or it
    repeats a block that is already cached), in use under the hash of everything up to its end
    (shared by every sequence that begins that way), or idle: cached under its hash, unused, evicted
    least recently used first when a new block is needed. The rest is blank.
    """

    __slots__ = ("_anonymous", "_idle", "_shared", "caching", "capacity")

    def __init__(self, capacity: int, *, caching: bool = True) -> None:
        self.capacity = capacity
        self.caching = caching
        self._shared: dict[int, int] = {}  # hash → how many sequences use it (at least 1)
        self._idle: OrderedDict[int, None] = OrderedDict()  # oldest first
        self._anonymous = 0

    @property
    def used(self) -> int:
        """Blocks that some sequence uses."""
        return self._anonymous + len(self._shared)

    @property
    def available(self) -> int:
        """Blocks that a sequence could be given now: blank ones and idle ones."""
        return self.capacity - self.used

    @property
    def cached_idle(self) -> int:
        """Blocks kept only because their prefix may come again."""
        return len(self._idle)

    @property
    def usage_fraction(self) -> float:
        """Blocks in use over all blocks, 0..1: what vLLM calls ``kv_cache_usage_perc``."""
        return self.used / self.capacity

    def match(self, hashes: SequenceOf[int], limit: int) -> int:
        """How many of the first ``limit`` of ``hashes`` are cached, from the beginning."""
        if not self.caching:
            return 0
        shared, idle = self._shared, self._idle
        count = 0
        for value in hashes[:limit]:
            if value not in shared and value not in idle:
                break
            count += 1
        return count

    def take(self, holding: BlockTable, hashes: SequenceOf[int], fresh: int) -> bool:
        """Give ``holding`` the cached blocks ``hashes`` and ``fresh`` new ones, or nothing at all.

        Every one of ``hashes`` must be cached (see ``match``). False where there is no room.
        """
        idle, shared = self._idle, self._shared
        waking = sum(1 for value in hashes if value in idle)
        if waking + fresh > self.available:
            return False
        for value in hashes:
            if value in idle:
                del idle[value]
                shared[value] = 1
            else:
                shared[value] += 1
        holding.hashes.extend(hashes)
        for _ in range(fresh - (self.available - len(idle))):
            idle.popitem(last=False)
        holding.anonymous += fresh
        self._anonymous += fresh
        return True

    def publish(self, holding: BlockTable, value: int) -> None:
        """One anonymous block of ``holding`` is full and computed: cache it under its hash.

        Where another sequence computed the same block meanwhile, this one stays a private copy,
        as in vLLM, and is blank again when released.
        """
        if not self.caching or value in self._shared or holding.anonymous == 0:
            return
        self._idle.pop(value, None)
        holding.anonymous -= 1
        self._anonymous -= 1
        holding.hashes.append(value)
        self._shared[value] = 1

    def release(self, holding: BlockTable) -> None:
        """Take back all blocks of ``holding``; its cached ones stay, last block evicted first."""
        self._anonymous -= holding.anonymous
        holding.anonymous = 0
        for value in reversed(holding.hashes):
            users = self._shared[value] - 1
            if users:
                self._shared[value] = users
            else:
                del self._shared[value]
                self._idle[value] = None
        holding.hashes.clear()

    def forget(self) -> None:
        """Drop every idle cached block (``/reset_prefix_cache``, and sleep, which loses the KV)."""
        self._idle.clear()

    def check_integrity(self) -> None:
        """Raise ``AssertionError`` where the counts contradict each other."""
        problems = []
        if self.used + len(self._idle) > self.capacity:
            problems.append(f"{self.used} used + {len(self._idle)} idle > {self.capacity}")
        if self._anonymous < 0:
            problems.append(f"{self._anonymous} anonymous blocks")
        if not self._shared.keys().isdisjoint(self._idle):
            problems.append("a block is both in use and idle")
        if any(users < 1 for users in self._shared.values()):
            problems.append("a shared block without a user")
        if problems:
            raise AssertionError("; ".join(problems))


class SequenceState(StrEnum):
    """Where a sequence is."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"
    ABORTED = "aborted"


@dataclass(slots=True, kw_only=True, eq=False)
class Sequence:
    """One prompt and the answer it will get: how long both are is known from the start.

    ``output_tokens`` 0 is a pooling request (an embedding): done when the prompt is computed.
    ``block_hashes`` name the whole KV blocks of prompt and answer (``tokens.block_hashes``; any
    chain of hashes will do). ``owner`` is the caller's own. The times are what ``now`` was, and
    ``None`` before the event.
    """

    prompt_tokens: int
    output_tokens: int
    block_hashes: SequenceOf[int] = ()
    owner: Any = None

    state: SequenceState = SequenceState.WAITING
    produced: int = 0
    computed: int = 0
    cached_tokens: int = 0
    arrived_s: float = 0.0
    scheduled_s: float | None = None
    first_token_s: float | None = None
    last_token_s: float | None = None
    finished_s: float | None = None
    holding: BlockTable = field(default_factory=BlockTable, repr=False)
    published: int = field(default=0, repr=False)


@dataclass(slots=True, kw_only=True)
class StepOutput:
    """What ended between two calls of ``advance``, in order.

    ``produced`` has a sequence once for every token, ``first`` once for its first (or when a
    pooling request is done). ``intervals_s`` are the times between two tokens of a sequence.
    """

    steps: int = 0
    first: list[Sequence] = field(default_factory=list)
    produced: list[Sequence] = field(default_factory=list)
    finished: list[Sequence] = field(default_factory=list)
    intervals_s: list[float] = field(default_factory=list)
    computed_prompt_tokens: int = 0


class QueueFullError(Exception):
    """As many sequences wait or run as ``max_num_queued_reqs`` allows."""


class Scheduler:
    """The engine's state. It has one owner, which calls it in order of time."""

    def __init__(self, model: EngineModel) -> None:
        self.model = model
        self.blocks = BlockPool(model.kv_blocks, caching=model.prefix_caching)
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.slow_factor = 1.0
        self.paused = False
        self.preemptions = 0
        self.prefix_queries_tokens = 0
        self.prefix_hits_tokens = 0
        self._plan: list[tuple[Sequence, int]] = []
        self._ends_s: float | None = None

    @property
    def next_at(self) -> float | None:
        """When the step under way ends, or ``None`` where none is."""
        return self._ends_s

    def submit(self, sequence: Sequence, now: float) -> None:
        """Queue ``sequence``. It starts with the next step: call ``advance`` after the last one.

        Raises ``ValueError`` for one longer than the model's context, ``QueueFullError`` where
        there are too many already.
        """
        length = sequence.prompt_tokens + sequence.output_tokens
        if sequence.prompt_tokens < 1 or length > self.model.max_model_len_tokens:
            raise ValueError(
                f"a sequence of {sequence.prompt_tokens} + {sequence.output_tokens} tokens does "
                f"not fit the context of {self.model.max_model_len_tokens}"
            )
        unfinished = len(self.waiting) + len(self.running)
        if unfinished >= self.model.max_num_queued_reqs:
            raise QueueFullError(f"{unfinished} sequences wait or run already")
        sequence.arrived_s = now
        self.waiting.append(sequence)

    def hold(self, now: float) -> None:
        """The engine stood still until ``now``: the step under way ends no earlier."""
        if self._ends_s is not None:
            self._ends_s = max(self._ends_s, now)

    def abort(self, sequence: Sequence, now: float) -> bool:
        """Forget ``sequence`` and free its blocks. False where it had ended already."""
        if sequence.state is SequenceState.WAITING:
            self.waiting.remove(sequence)
        elif sequence.state is SequenceState.RUNNING:
            self.running.remove(sequence)
            self.blocks.release(sequence.holding)
        else:
            return False
        sequence.state = SequenceState.ABORTED
        sequence.finished_s = now
        return True

    def advance(self, now: float, max_steps: int | None = None) -> StepOutput:
        """End every step that is due by ``now``, at most ``max_steps``, and begin what follows.

        Where the limit cuts it short, ``next_at`` is not after ``now``: call again.
        """
        progress = StepOutput()
        while True:
            if self._ends_s is None:
                self._begin_step(now)
            ends = self._ends_s
            if ends is None or ends > now or progress.steps == max_steps:
                return progress
            self._end_step(ends, progress)
            self._begin_step(ends)

    def _begin_step(self, now: float) -> None:
        self._ends_s = None
        if self.paused or not (self.waiting or self.running):
            return
        plan: list[tuple[Sequence, int]] = []
        budget = self._plan_running(plan, self.model.max_num_batched_tokens)
        if budget is not None:
            self._plan_waiting(plan, budget, now)
        self._plan = plan
        if plan:
            self._ends_s = now + self._duration_s(plan) * self.slow_factor

    def _plan_running(self, plan: list[tuple[Sequence, int]], budget: int) -> int | None:
        """Plan the running sequences; the budget left, or ``None`` where one was preempted."""
        running, blocks, size = self.running, self.blocks, self.model.block_size_tokens
        index = 0
        preempted = False
        while index < len(running) and budget > 0:
            sequence = running[index]
            computed = sequence.computed
            tokens = min(sequence.prompt_tokens + sequence.produced - computed, budget)
            fresh = -(-(computed + tokens) // size) - len(sequence.holding)
            while fresh > 0 and not blocks.take(sequence.holding, (), fresh):
                preempted = True
                if self._preempt_youngest() is sequence:
                    break
            else:
                plan.append((sequence, tokens))
                budget -= tokens
                index += 1
        return None if preempted else budget

    def _preempt_youngest(self) -> Sequence:
        victim = self.running.pop()
        self.blocks.release(victim.holding)
        victim.state = SequenceState.WAITING
        victim.computed = victim.published = 0
        self.preemptions += 1
        self.waiting.appendleft(victim)
        return victim

    def _plan_waiting(self, plan: list[tuple[Sequence, int]], budget: int, now: float) -> None:
        model, blocks, size = self.model, self.blocks, self.model.block_size_tokens
        waiting, running = self.waiting, self.running
        while waiting and budget > 0 and len(running) < model.max_num_seqs:
            sequence = waiting[0]
            known = sequence.prompt_tokens + sequence.produced
            # The last token is always computed: its logits are what the next one is drawn from.
            hits = blocks.match(sequence.block_hashes, (known - 1) // size)
            cached = hits * size
            tokens = known - cached
            if tokens > budget:
                if not model.chunked_prefill:
                    return
                tokens = budget
            fresh = -(-(cached + tokens) // size) - hits
            if not blocks.take(sequence.holding, sequence.block_hashes[:hits], fresh):
                return
            waiting.popleft()
            running.append(sequence)
            sequence.state = SequenceState.RUNNING
            sequence.computed, sequence.published = cached, hits
            if sequence.scheduled_s is None:
                # A caller that lags may submit after the end of the step before was due.
                sequence.scheduled_s = max(now, sequence.arrived_s)
                sequence.cached_tokens = cached
                self.prefix_queries_tokens += known
                self.prefix_hits_tokens += cached
            plan.append((sequence, tokens))
            budget -= tokens

    def _duration_s(self, plan: list[tuple[Sequence, int]]) -> float:
        decoding = prefill = 0
        for sequence, tokens in plan:
            if tokens == 1 and sequence.produced and sequence.computed >= sequence.prompt_tokens:
                decoding += 1
            else:
                prefill += tokens
        model = self.model
        duration = model.step_overhead_s + prefill / model.prefill_tokens_per_s
        if decoding:
            duration += (1 + model.batch_slowdown * (decoding - 1)) / model.decode_tokens_per_s
        return duration

    def _end_step(self, now: float, progress: StepOutput) -> None:
        progress.steps += 1
        size = self.model.block_size_tokens
        done = False
        for sequence, tokens in self._plan:
            if sequence.state is not SequenceState.RUNNING:
                continue  # aborted during the step
            if sequence.computed < sequence.prompt_tokens:
                progress.computed_prompt_tokens += tokens
            sequence.computed += tokens
            hashes, full = sequence.block_hashes, sequence.computed // size
            while sequence.published < full and sequence.published < len(hashes):
                self.blocks.publish(sequence.holding, hashes[sequence.published])
                sequence.published += 1
            if sequence.computed < sequence.prompt_tokens + sequence.produced:
                continue  # more of the prompt is to come
            if sequence.produced < sequence.output_tokens:
                sequence.produced += 1
                progress.produced.append(sequence)
                if sequence.last_token_s is None:
                    sequence.first_token_s = now
                    progress.first.append(sequence)
                else:
                    progress.intervals_s.append(now - sequence.last_token_s)
                sequence.last_token_s = now
            if sequence.produced >= sequence.output_tokens:
                sequence.state = SequenceState.FINISHED
                sequence.finished_s = now
                self.blocks.release(sequence.holding)
                progress.finished.append(sequence)
                if not sequence.output_tokens:
                    progress.first.append(sequence)
                done = True
        if done:
            self.running = [s for s in self.running if s.state is SequenceState.RUNNING]

    def check_integrity(self) -> None:
        """Raise ``AssertionError`` where the state contradicts itself. For tests, and when idle."""
        self.blocks.check_integrity()
        held = [s for s in self.running if s.state is not SequenceState.RUNNING]
        held += [s for s in self.waiting if s.state is not SequenceState.WAITING]
        if held:
            raise AssertionError(f"{held} are in a list of another state")
        if any(len(s.holding) for s in self.waiting):
            raise AssertionError("a waiting sequence holds blocks")
        if not self.running and self.blocks.used:
            raise AssertionError(f"{self.blocks.used} blocks are in use, and nothing runs")
        if len(self.running) > self.model.max_num_seqs:
            raise AssertionError(f"{len(self.running)} run of at most {self.model.max_num_seqs}")
