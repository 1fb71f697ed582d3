"""By which metrics an engine tells a Prometheus of the requests it had. Pure.

``load_metrics`` has what is read of an engine that runs; these are what a server that has scraped
it for weeks is asked.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

Selectors = tuple[str, ...]
"""Metrics, with matchers in braces where not all of a metric counts: the first that is there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PastMetrics:
    """``label`` has the model's name. ``counters`` of requests and tokens, ``gauges`` of what
    waits, and ``histograms`` of seconds, by what they tell."""

    label: str
    counters: Mapping[str, Selectors]
    gauges: Mapping[str, Selectors]
    histograms: Mapping[str, Selectors]


ENGINE_PASTS: Mapping[str, PastMetrics] = {
    # It has no count of arrivals: its requests are counted as their first token comes.
    "vllm": PastMetrics(
        label="model_name",
        counters={
            "arrivals": ("vllm:time_to_first_token_seconds_count", "vllm:request_success_total"),
            "input_tokens": ("vllm:prompt_tokens_total",),
            "output_tokens": ("vllm:generation_tokens_total",),
            "errors": ('vllm:request_success_total{finished_reason="error"}',),
        },
        gauges={"queued_requests": ("vllm:num_requests_waiting",)},
        histograms={
            "queue_wait": ("vllm:request_queue_time_seconds",),
            "ttft": ("vllm:time_to_first_token_seconds",),
            "itl": ("vllm:inter_token_latency_seconds", "vllm:time_per_output_token_seconds"),
            "e2e": ("vllm:e2e_request_latency_seconds",),
        },
    ),
    "sglang": PastMetrics(
        label="model_name",
        counters={
            "arrivals": ("sglang:num_requests_received_total", "sglang:num_requests_total"),
            "input_tokens": ("sglang:prompt_tokens_total",),
            "output_tokens": ("sglang:generation_tokens_total",),
        },
        gauges={"queued_requests": ("sglang:num_queue_reqs",)},
        histograms={
            "queue_wait": ("sglang:queue_time_seconds",),
            "ttft": ("sglang:time_to_first_token_seconds",),
            "itl": ("sglang:inter_token_latency_seconds", "sglang:time_per_output_token_seconds"),
            "e2e": ("sglang:e2e_request_latency_seconds",),
        },
    ),
}
