"""What a replica on its way is said to be at, to machines, to operators and to those who wait."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoscaler.lifecycle import State
from autoscaler.phases import STEPS, describe_progress, describe_step, name_step
from modelcache.types import Progress

FETCHING = Progress(
    phase="fetching", bytes_done=3_100_000_000, bytes_total=14_900_000_000, rate_bytes_s=1.2e9
)
PAGING = Progress(phase="paging", bytes_done=100_000_000, bytes_total=300_000_000)


@pytest.mark.parametrize(
    ("progress", "text"),
    [
        (FETCHING, "fetching 3.1 of 14.9 GB at 1.2 GB/s"),
        (PAGING, "paging 100.0 of 300.0 MB"),
        (Progress(phase="listing"), "listing"),
        (Progress(phase="fetching", bytes_done=5), "fetching 5 B"),
        (Progress(phase="fetching", bytes_done=5, bytes_total=7), "fetching 5 of 7 B"),
        (Progress(phase="fetching", bytes_total=0), "fetching 0 of 0 B"),
        (Progress(phase="checking", bytes_total=1_500, rate_bytes_s=0.0), "checking 0.0 of 1.5 kB"),
    ],
)
def test_progress_in_words(progress: Progress, text: str) -> None:
    assert describe_progress(progress) == text


@pytest.mark.parametrize(
    ("state", "progress", "said", "step", "text"),
    [
        (State.SCHEDULED, None, "", "scheduled", "scheduled"),
        (State.PREPARING, None, "", "preparing", "preparing"),
        (State.PREPARING, FETCHING, "", "fetching", "fetching 3.1 of 14.9 GB at 1.2 GB/s"),
        (State.PREPARING, Progress(phase="odd"), "", "preparing", "preparing"),
        (State.STARTING, None, "", "starting", "starting"),
        (State.STARTING, None, "loading: shard 1 of 3 of /secret", "loading", "loading"),
        (State.STARTING, None, "reading /secret", "starting", "starting"),
        (State.STARTING, PAGING, "importing", "importing", "importing, paging 100.0 of 300.0 MB"),
        (State.WAKING, None, "", "waking", "waking"),
        (State.READY, PAGING, "loading", "", ""),
        (State.FAILED, None, "loading", "", ""),
    ],
)
def test_step_and_what_clients_are_told(
    state: State, progress: Progress | None, said: str, step: str, text: str
) -> None:
    assert name_step(state, progress, said) == step
    assert describe_step(step, progress) == text


@given(
    st.sampled_from(State),
    st.none() | st.builds(Progress, phase=st.text(), detail=st.text(), bytes_done=st.integers(0)),
    st.text(),
)
def test_clients_are_told_a_short_line_of_our_own_words(
    state: State, progress: Progress | None, said: str
) -> None:
    step = name_step(state, progress, said)
    assert step == "" or step in STEPS
    text = describe_step(step, progress)
    assert text.partition(" ")[0].rstrip(",") in (step, "")
    assert text.isprintable()
    assert text.isascii()
