"""The router's settings: what is assumed of a replica or a request that does not say."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class RouterSettings(BaseModel):
    """How requests are sized and how much one replica is given."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    default_bytes_per_token: float = Field(default=4.0, ge=0.5, le=64.0)
    """Bytes of request body per prompt token, until a model's own ratio has been learned from the
    ``usage`` of its answers. 4 is what English text costs most tokenizers."""

    default_output_tokens: int = Field(default=256, ge=1, le=1_000_000)
    """Output tokens expected of a request, until a model's own mean has been learned. A smaller
    ``max_tokens`` in the request lowers it."""

    learning_rate: float = Field(default=0.05, gt=0.0, le=1.0)
    """Weight of the newest answer in the learned ratios (exponential mean). 0.05 follows a change
    of traffic within about 20 answers and is not moved much by one unusual request."""

    max_inflight_requests: int = Field(default=256, ge=1, le=100_000)
    """Requests one replica is given at once, where the pool does not say. 256 is vLLM's own
    ``max_num_seqs``: what is beyond it waits in the gateway, where it can still be sent to another
    replica."""

    max_inflight_tokens: int | None = Field(default=None, ge=1)
    """Estimated tokens one replica is given at once; unset: bounded by requests only. A single
    request larger than this is still sent to an idle replica."""

    max_ejected_fraction: float = Field(default=0.5, ge=0.0, le=1.0)
    """Part of a pool's replicas that may be ejected at a time because they fail more requests than
    they answer; never all of them. Half: where most replicas fail, the load of the ejected would
    take down the others too. 0 ejects none."""

    ejection_s: float = Field(default=5.0, gt=0.0, le=3_600.0)
    """Seconds of a replica's first ejection; each one in a row is twice as long. 5 is soon enough
    for an engine that had a bad moment."""

    ejection_max_s: float = Field(default=300.0, gt=0.0, le=86_400.0)
    """Seconds of a replica's longest ejection. Then it is given requests again, and out with the
    first that it fails."""

    retry_fraction: float = Field(default=0.2, ge=0.0, le=1.0)
    """Retries of error answers (5xx, 429) per request, beside ten that a pool may always begin
    with. A fifth hides one bad replica of five, and adds no more than a fifth to the load of a pool
    that fails altogether. 0 passes error answers on as they come, after those ten."""
