import dataclasses
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loaders.engines.simulated.scheduler import (
    EngineModel,
    QueueFullError,
    Scheduler,
    Sequence,
    SequenceState,
)

MODEL = EngineModel(
    prefill_tokens_per_s=1000.0,
    decode_tokens_per_s=10.0,
    batch_slowdown=0.1,
    max_num_seqs=4,
    max_num_batched_tokens=512,
    max_model_len_tokens=1024,
    kv_blocks=64,
    block_size_tokens=16,
)


def make(prompt: int, output: int, **more: object) -> Sequence:
    return Sequence(prompt_tokens=prompt, output_tokens=output, **more)  # type: ignore[arg-type]


def run_out(scheduler: Scheduler, now: float = 0.0) -> tuple[list[Sequence], float]:
    """Run until nothing is left; the finished sequences in order, and when that was."""
    finished = scheduler.advance(now).finished
    while scheduler.next_at is not None:
        now = scheduler.next_at
        finished += scheduler.advance(now).finished
        scheduler.check_integrity()
    return finished, now


def test_one_sequence_takes_its_prompt_at_one_rate_and_its_answer_at_the_other() -> None:
    scheduler = Scheduler(MODEL)
    sequence = make(100, 5)
    scheduler.submit(sequence, 2.0)
    run_out(scheduler, 2.0)
    assert sequence.scheduled_s == 2.0
    assert sequence.first_token_s == pytest.approx(2.1)  # 100 tokens at 1000/s
    assert sequence.finished_s == pytest.approx(2.1 + 4 * 0.1)  # and 4 more tokens at 10/s
    assert sequence.state is SequenceState.FINISHED


def test_decoding_slows_down_with_the_batch() -> None:
    scheduler = Scheduler(dataclasses.replace(MODEL, prefill_tokens_per_s=math.inf))
    sequences = [make(16, 11) for _ in range(3)]
    for sequence in sequences:
        scheduler.submit(sequence, 0.0)
    run_out(scheduler)
    assert {round(s.finished_s or 0, 6) for s in sequences} == {10 * 0.12}


def test_more_than_the_batch_holds_waits_first_come_first_served() -> None:
    scheduler = Scheduler(MODEL)
    sequences = [make(16, 3) for _ in range(9)]
    for sequence in sequences:
        scheduler.submit(sequence, 0.0)
    scheduler.advance(0.0)
    assert (len(scheduler.running), len(scheduler.waiting)) == (4, 5)
    finished, _ = run_out(scheduler)
    assert finished == sequences
    starts = [s.scheduled_s for s in sequences]
    assert starts == sorted(starts)  # type: ignore[type-var]
    assert starts[4] > starts[3]  # type: ignore[operator]


def test_a_long_prompt_is_computed_in_chunks_beside_the_decoding_of_others() -> None:
    scheduler = Scheduler(dataclasses.replace(MODEL, kv_blocks=128))
    talker = make(16, 30)
    scheduler.submit(talker, 0.0)
    scheduler.advance(0.0)
    scheduler.advance(scheduler.next_at or 0)
    long = make(1000, 1)
    scheduler.submit(long, 0.02)
    while long.first_token_s is None:
        before = talker.produced
        progress = scheduler.advance(scheduler.next_at or 0)
        assert talker.produced == before + progress.steps  # never starved
    assert long.first_token_s > 1.0


def test_without_chunks_a_prompt_waits_for_a_step_with_room() -> None:
    model = dataclasses.replace(MODEL, chunked_prefill=False, max_num_batched_tokens=1024)
    scheduler = Scheduler(model)
    first, second = make(900, 1), make(900, 1)
    scheduler.submit(first, 0.0)
    scheduler.submit(second, 0.0)
    scheduler.advance(0.0)
    assert scheduler.running == [first]
    run_out(scheduler)
    assert second.scheduled_s == first.finished_s


def test_a_prefix_seen_before_is_not_computed_again() -> None:
    scheduler = Scheduler(MODEL)
    hashes = list(range(10))
    cold, warm = make(160, 2, block_hashes=hashes), make(160, 2, block_hashes=hashes)
    scheduler.submit(cold, 0.0)
    _, now = run_out(scheduler)
    scheduler.submit(warm, now)
    run_out(scheduler, now)
    assert (cold.cached_tokens, warm.cached_tokens) == (0, 144)  # the last block is computed
    assert (warm.first_token_s or 0) - now == pytest.approx(16 / 1000)
    assert (scheduler.prefix_queries_tokens, scheduler.prefix_hits_tokens) == (320, 144)


def test_the_answer_is_cached_too_for_the_next_turn() -> None:
    scheduler = Scheduler(MODEL)
    hashes = list(range(8))
    scheduler.submit(make(64, 64, block_hashes=hashes), 0.0)
    _, now = run_out(scheduler)
    turn = make(140, 1, block_hashes=[*hashes, 99])
    scheduler.submit(turn, now)
    run_out(scheduler, now)
    # The last token of the answer was produced but never computed, so its block is not cached.
    assert turn.cached_tokens == 7 * 16


def test_when_blocks_run_out_the_youngest_is_preempted_and_still_finishes() -> None:
    model = dataclasses.replace(MODEL, kv_blocks=16, max_model_len_tokens=256)
    scheduler = Scheduler(model)
    old, young = make(60, 150), make(60, 150)
    scheduler.submit(old, 0.0)
    scheduler.submit(young, 0.0)
    finished, _ = run_out(scheduler)
    assert finished == [old, young]
    assert scheduler.preemptions == 1
    assert young.produced == 150
    assert scheduler.blocks.used == 0


def test_abort_frees_blocks_wherever_the_sequence_is() -> None:
    scheduler = Scheduler(dataclasses.replace(MODEL, max_num_seqs=1))
    running, waiting = make(100, 50), make(100, 50)
    scheduler.submit(running, 0.0)
    scheduler.submit(waiting, 0.0)
    scheduler.advance(0.0)
    assert scheduler.abort(waiting, 0.01)
    assert scheduler.abort(running, 0.02)
    assert not scheduler.abort(running, 0.03)
    scheduler.check_integrity()
    assert scheduler.blocks.used == 0
    finished, _ = run_out(scheduler)
    assert finished == []
    assert (running.produced, running.finished_s) == (0, 0.02)


def test_a_paused_engine_ends_its_step_and_begins_none() -> None:
    scheduler = Scheduler(MODEL)
    sequence = make(10, 100)
    scheduler.submit(sequence, 0.0)
    scheduler.advance(0.0)
    scheduler.paused = True
    scheduler.advance(50.0)
    assert sequence.produced == 1
    assert scheduler.next_at is None
    scheduler.paused = False
    scheduler.advance(60.0)
    assert scheduler.next_at == pytest.approx(60.1)


def test_slow_factor_stretches_the_steps_that_begin_from_then_on() -> None:
    scheduler = Scheduler(MODEL)
    scheduler.slow_factor = 10.0
    sequence = make(100, 1)
    scheduler.submit(sequence, 0.0)
    run_out(scheduler)
    assert sequence.finished_s == pytest.approx(1.0)


def test_infinite_rates_take_no_time_and_a_limit_of_steps_bounds_a_turn() -> None:
    free = dataclasses.replace(MODEL, prefill_tokens_per_s=math.inf, decode_tokens_per_s=math.inf)
    scheduler = Scheduler(free)
    sequence = make(100, 100)
    scheduler.submit(sequence, 5.0)
    assert scheduler.advance(5.0, max_steps=10).steps == 10
    assert scheduler.next_at == 5.0
    scheduler.advance(5.0)
    assert sequence.finished_s == 5.0


def test_a_pooling_request_ends_when_its_prompt_is_computed() -> None:
    scheduler = Scheduler(MODEL)
    sequence = make(700, 0)
    scheduler.submit(sequence, 0.0)
    scheduler.advance(0.0)
    progress = scheduler.advance(10.0)
    assert progress.finished == progress.first == [sequence]
    assert progress.produced == []
    assert sequence.finished_s == pytest.approx(0.7)


def test_late_calls_do_not_slow_the_engine_down() -> None:
    """Steps follow each other at their own times, however late ``advance`` is called."""
    prompt, late = Scheduler(MODEL), Scheduler(MODEL)
    one, other = make(100, 20), make(100, 20)
    prompt.submit(one, 0.0)
    late.submit(other, 0.0)
    run_out(prompt)
    late.advance(0.0)
    late.advance(100.0)
    assert one.finished_s == other.finished_s


def test_an_engine_that_stood_still_makes_up_for_nothing() -> None:
    scheduler = Scheduler(MODEL)
    sequence = make(100, 20)
    scheduler.submit(sequence, 0.0)
    scheduler.advance(0.0)
    scheduler.hold(50.0)
    assert scheduler.advance(50.0).steps == 1
    assert scheduler.next_at == pytest.approx(50.1)
    scheduler.hold(50.05)  # earlier than the end of the step: nothing changes
    assert scheduler.next_at == pytest.approx(50.1)


def test_what_does_not_fit_is_refused() -> None:
    scheduler = Scheduler(dataclasses.replace(MODEL, max_num_queued_reqs=1))
    for prompt, output in ((0, 5), (1000, 25), (1025, 0)):
        with pytest.raises(ValueError, match="does not fit"):
            scheduler.submit(make(prompt, output), 0.0)
    scheduler.submit(make(1000, 24), 0.0)
    with pytest.raises(QueueFullError):
        scheduler.submit(make(1, 1), 0.0)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prefill_tokens_per_s", 0.0),
        ("decode_tokens_per_s", -1.0),
        ("decode_tokens_per_s", math.nan),
        ("batch_slowdown", -0.1),
        ("step_overhead_s", math.inf),
        ("max_num_seqs", 0),
        ("kv_blocks", 63),
        ("block_size_tokens", 0),
    ],
)
def test_an_impossible_engine_is_refused(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=r"must be|cannot hold"):
        dataclasses.replace(MODEL, **{field: value})


def test_without_chunked_prefill_a_step_must_hold_the_longest_prompt() -> None:
    with pytest.raises(ValueError, match="chunked prefill"):
        dataclasses.replace(MODEL, chunked_prefill=False)


def _day(seed: int, requests: int) -> tuple[list[tuple[float, float]], Scheduler]:
    rng = random.Random(seed)
    scheduler = Scheduler(dataclasses.replace(MODEL, kv_blocks=70, max_num_seqs=8))
    alive: list[Sequence] = []
    sequences = []
    now = 0.0
    for _ in range(requests):
        now += rng.expovariate(1.0)
        while scheduler.next_at is not None and scheduler.next_at <= now:
            scheduler.advance(scheduler.next_at)
        prompt = rng.randint(1, 400)
        family = rng.randint(0, 3)
        sequence = make(
            prompt,
            rng.randint(0, 80),
            block_hashes=[family * 1000 + n for n in range(prompt // 16)],
        )
        scheduler.submit(sequence, now)
        scheduler.advance(now)
        sequences.append(sequence)
        alive.append(sequence)
        if rng.random() < 0.1:
            scheduler.abort(alive.pop(rng.randrange(len(alive))), now)
        scheduler.check_integrity()
    run_out(scheduler, now)
    for sequence in sequences:
        if sequence.state is SequenceState.FINISHED:
            assert sequence.produced == sequence.output_tokens
            times = (sequence.arrived_s, sequence.scheduled_s, sequence.finished_s)
            assert list(times) == sorted(times)  # type: ignore[type-var]
        else:
            assert sequence.state is SequenceState.ABORTED
    assert not scheduler.running
    assert not scheduler.waiting
    assert scheduler.blocks.used == 0
    return [(s.arrived_s, s.finished_s or 0.0) for s in sequences], scheduler


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32))
def test_nothing_is_lost_whatever_comes_and_goes(seed: int) -> None:
    _day(seed, 60)


def test_the_same_seed_gives_the_same_day_and_blocks_ran_out_in_it() -> None:
    first, scheduler = _day(7, 300)
    assert first == _day(7, 300)[0]
    assert scheduler.preemptions > 0
    assert scheduler.prefix_hits_tokens > 0
