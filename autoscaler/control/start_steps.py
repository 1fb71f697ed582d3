"""The step that a replica on its way to ready is at: one word for machines, a line for people.

A replica is at one step. Its words are those of the replica's own states, of the phases of its
model's progress (``Progress.phase``), and of its engine's start phases.
"""

from __future__ import annotations

from autoscaler.policy.lifecycle import State
from loaders.engines.base import START_PHASES
from modelcache.types import PROGRESS_PHASES, Progress

SCHEDULED = "scheduled"
STARTING = "starting"
WAKING = "waking"
STEPS_TO_READY = (SCHEDULED, *PROGRESS_PHASES, STARTING, *START_PHASES, WAKING)
"""In the order in which they come."""

UNITS = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


def name_step(state: State, progress: Progress | None, probe_phase: str) -> str:
    """The step a replica is at; nothing unless it is on its way to ready. ``probe_phase``: what the
    engine is at; it begins with one of ``START_PHASES`` where that is known."""
    match state:
        case State.SCHEDULED:
            return SCHEDULED
        case State.WAKING:
            return WAKING
        case State.PREPARING:
            known = progress is not None and progress.phase in PROGRESS_PHASES
            return progress.phase if progress is not None and known else "preparing"
        case State.STARTING:
            word = first_word(probe_phase)
            return word if word in START_PHASES else STARTING
        case _:
            return ""


def describe_step(step: str, progress: Progress | None, failures: int = 0) -> str:
    """A step and how far it is, without text of the engine: waiting clients see this.

    Bytes that are read beside the engine's start come after the engine's own step.
    ``failures``: starts that failed in a row before this one.
    """
    if step == SCHEDULED and failures:
        return f"{step}, after {failures} failed start{'s' if failures > 1 else ''}"
    if progress is None or progress.phase not in PROGRESS_PHASES:
        return step
    if step in PROGRESS_PHASES:
        return describe_progress(progress)
    if step in (STARTING, *START_PHASES):
        return f"{step}, {describe_progress(progress)}"
    return step


def describe_progress(progress: Progress) -> str:
    """``fetching 3.1 of 14.9 GB at 1.2 GB/s``, as far as it is known."""
    done, total = progress.bytes_done, progress.bytes_total
    size, unit = scale(done if total is None else total)
    text = progress.phase
    if total is not None:
        text += f" {show(done, size)} of {show(total, size)} {unit}"
    elif done:
        text += f" {show(done, size)} {unit}"
    if progress.rate_bytes_s:
        size, unit = scale(progress.rate_bytes_s)
        text += f" at {show(progress.rate_bytes_s, size)} {unit}/s"
    return text


def scale(value: float) -> tuple[float, str]:
    """The unit that fits a number of bytes: its size in bytes, and its name."""
    return next(((size, unit) for size, unit in UNITS if value >= size), (1.0, "B"))


def show(value: float, size: float) -> str:
    """A number of bytes in a unit, with one decimal unless they are single bytes."""
    return f"{value / size:.1f}" if size > 1 else f"{value:.0f}"


def first_word(text: str) -> str:
    """The first word of a line, without what punctuates it."""
    return (text.split(maxsplit=1) or [""])[0].rstrip(":,;.")
