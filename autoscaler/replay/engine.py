"""The engine model: what one simulated replica can do, and what it carries within an SLO.

One engine step serves one token to each running request and a chunk of one prompt. So engine
time is shared between decode and prefill:

    itl(b)   = itl_base_s + itl_slope_s * b          with b requests running and no prefill
    itl seen = itl(b) / (1 - u)                      with a part u of the time spent on prefill
    u        = prompt tokens per second / prefill_tokens_per_s, at most chunk / (itl(b) + chunk)

where ``chunk`` is the time that ``chunk_tokens`` take. A steady r requests per second of I prompt
and O output tokens keep b = r * O * itl seen running (Little's law), which solves to

    itl seen = itl_base_s / (1 - r * c),   c = I / prefill_tokens_per_s + O * itl_slope_s

and gives the rate at which the ITL, or the most running requests, are reached in closed form.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Slo:
    """What a request is promised. It is violated by a TTFT or a mean ITL above these."""

    ttft_s: float = 2.0
    itl_s: float = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaModel:
    """One replica. The defaults are of the size of a 32B model on two H100.

    ``max_running_requests`` and ``kv_tokens`` bound what runs at a time: a request holds its prompt
    and on average half of its output in the KV cache. What is beyond them waits in the gateway.
    """

    prefill_tokens_per_s: float = 16_000.0
    itl_base_s: float = 0.015
    itl_slope_s: float = 0.00015
    max_running_requests: int = 256
    kv_tokens: float = 400_000.0
    chunk_tokens: float = 8_192.0
    after_s: int = 0
    """How long a request without output stays in flight after its prefill. It takes nothing of the
    replica; those who watch requests in flight, and replicas that drain, see it."""

    def most_running(self, prompt_tokens: float, output_tokens: float) -> float:
        """Requests of this size that run at a time; at least one, or none could ever be served."""
        held = prompt_tokens + output_tokens / 2
        return max(1.0, min(self.max_running_requests, self.kv_tokens / held if held else 1e9))

    def work_s(self, prompt_tokens: float, output_tokens: float, slo: Slo) -> float:
        """Seconds of one replica that a request takes, where the replica is loaded as far as the
        SLO allows: the reciprocal of the most requests per second. Raises ``ValueError`` for an ITL
        that even an idle replica exceeds."""
        engine_s = prompt_tokens / self.prefill_tokens_per_s + output_tokens * self.itl_slope_s
        decode_s = output_tokens * self.itl_base_s
        if decode_s == 0.0:
            return engine_s
        spare = 1.0 - self.itl_base_s / slo.itl_s
        if spare <= 0.0:
            raise ValueError(
                f"an ITL of {slo.itl_s:g} s is out of reach: an idle replica has "
                f"{self.itl_base_s:g} s"
            )
        most = self.most_running(prompt_tokens, output_tokens)
        return max(engine_s / spare, engine_s + decode_s / most)

    def capacity_tokens_per_s(self, prompt_tokens: float, output_tokens: float, slo: Slo) -> float:
        """Prompt and output tokens per second that one replica sustains within the SLO, where
        requests have these means."""
        return (prompt_tokens + output_tokens) / self.work_s(prompt_tokens, output_tokens, slo)

    def in_flight(
        self, prompt_tokens: float, output_tokens: float, slo: Slo, load: float = 1.0
    ) -> float:
        """Requests that one replica has in prefill and decode at this part of that capacity."""
        rate = load / self.work_s(prompt_tokens, output_tokens, slo)
        prefill_s = prompt_tokens / self.prefill_tokens_per_s
        if output_tokens == 0.0:
            return rate * (prefill_s + self.after_s)
        itl_s = self.itl_base_s / (1.0 - rate * (prefill_s + output_tokens * self.itl_slope_s))
        return rate * (prefill_s + output_tokens * itl_s)


COUNTED = ReplicaModel(
    prefill_tokens_per_s=20.0,
    itl_base_s=0.0,
    itl_slope_s=0.0,
    max_running_requests=1_000_000,
    kv_tokens=1e12,
    chunk_tokens=1.0,
    after_s=5,
)
"""The model for traces that only count requests: each is one token and takes 50 ms of a replica, so
what can go wrong is its wait in a queue; and it is in flight for 5 s, as an answer of an LLM is."""
