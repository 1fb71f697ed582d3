"""What a pool can be told about how warm it stays while nobody asks."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from autoscaler.policy.tier_policy import LadderPolicy

LONGEST_S = 31_536_000.0


class WarmthSettings(BaseModel):
    """How warm a pool stays at zero: seconds on each step of the ladder before the next one down.
    0 leaves a step out, and so does a machine or an engine that has no such step."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    sleeping_s: float | None = Field(default=0.0, ge=0.0, le=LONGEST_S)
    """Seconds an engine sleeps, its weights in host memory, before it is ended. It wakes in about
    a second and costs its memory for as long, so 0 unless somebody wants that. Needs an engine
    that can (vLLM on a GPU, the simulated one); where it cannot, this step is left out."""

    forked_s: float | None = Field(default=None, ge=0.0, le=LONGEST_S)
    """Seconds an engine process stands by, everything imported and no weights loaded. Shares most
    of its memory with the fork server. Unset: for ever, where there is a fork server."""

    paged_s: float | None = Field(default=None, ge=0.0, le=LONGEST_S)
    """Seconds the weights are kept in the page cache, within ``modelcache.page_budget_bytes``.
    Unset: for ever."""

    on_disk_s: float | None = Field(default=None, ge=0.0, le=LONGEST_S)
    """Seconds the weights of a model with a URL stay on this node's disk before they are given up;
    a directory is never removed. Unset: until the model cache needs the room."""

    sleep_level: int = Field(default=1, ge=1, le=2)
    """How deep an engine sleeps: 1 keeps its weights in host memory, 2 drops them."""

    @property
    def keeps_pages(self) -> bool:
        """Whether there is any step on which the weights are in the page cache."""
        return self.forked_s != 0 or self.paged_s != 0


def make_ladder(warmth: WarmthSettings) -> LadderPolicy:
    """What ``choose_rung`` is told of one pool."""
    return LadderPolicy(
        sleeping_s=warmth.sleeping_s,
        forked_s=warmth.forked_s,
        paged_s=warmth.paged_s,
        on_disk_s=warmth.on_disk_s,
    )
