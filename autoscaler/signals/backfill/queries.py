"""Which PromQL a series is: by Tidegate's own metrics, an engine's, or as the user says. Pure.

A counter is queried as it is, one time series for each process, and its increase from minute to
minute is exact: Prometheus' ``increase`` extrapolates, and knows nothing of a minute with one
sample. Everything else is one expression, whose value at a moment is that of the minute that ends
then.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from loaders.engines.past_metrics import ENGINE_PASTS, PastMetrics

WINDOW = "2m"
"""Of latencies: two scrapes must lie in it."""

OWN = PastMetrics(
    label="pool",
    counters={
        "arrivals": ("tidegate_arrivals_total",),
        "input_tokens": ("tidegate_arrived_prompt_tokens_total",),
        "predicted_output_tokens": ("tidegate_arrived_output_tokens_total",),
        "output_tokens": ("tidegate_generation_tokens_total",),
        "errors": ('tidegate_requests_total{outcome=~"engine_error|rejected"}',),
    },
    gauges={
        "queued_requests": ("tidegate_queued_requests",),
        "queued_tokens": ("tidegate_queued_tokens",),
    },
    histograms={
        "queue_wait": ("tidegate_request_queue_time_seconds",),
        "ttft": ('tidegate_time_to_first_token_seconds{stream="true"}',),
        "itl": ("tidegate_inter_token_latency_seconds",),
        "e2e": ("tidegate_e2e_request_latency_seconds",),
    },
)
PRESETS: Mapping[str, PastMetrics] = {"tidegate": OWN, **ENGINE_PASTS}
"""Whose metrics a Prometheus may have of a pool, by name, in the order in which they are tried."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Query:
    """``text`` is a selector of counters where ``counter`` is set, else an expression whose value
    is one series'."""

    text: str
    counter: bool = False


Queries = Mapping[str, Sequence[Query]]
"""By series: the first of its queries that finds anything counts."""


def make_queries(
    preset: str | None,
    pool: str,
    *,
    match: str | None = None,
    own: Mapping[str, str] | None = None,
) -> Queries:
    """The queries of a pool by the metrics of a preset (``None``: by none). ``match`` are matchers
    in place of the pool's name, ``own`` the user's queries of single series."""
    queries: dict[str, Sequence[Query]] = {}
    if preset is not None:
        quoted = pool.replace("\\", "\\\\").replace('"', '\\"')
        metrics = PRESETS[preset]
        queries |= _queries(metrics, f'{metrics.label}="{quoted}"' if match is None else match)
    for series, text in (own or {}).items():
        queries[series] = (Query(text=text),)
    return queries


def _queries(metrics: PastMetrics, match: str) -> dict[str, Sequence[Query]]:
    found: dict[str, Sequence[Query]] = {}
    for series, selectors in metrics.counters.items():
        found[series] = [Query(text=_select(one, match), counter=True) for one in selectors]
    for series, selectors in metrics.gauges.items():
        texts = [f"sum(avg_over_time({_select(one, match)}[1m]))" for one in selectors]
        found[series] = [Query(text=text) for text in texts]
    for name, selectors in metrics.histograms.items():
        found[f"{name}_mean_s"] = [
            Query(text=f"sum({_rise(one, '_sum', match)}) / sum({_rise(one, '_count', match)})")
            for one in selectors
        ]
        found[f"{name}_p90_s"] = [
            Query(text=f"histogram_quantile(0.9, sum by (le) ({_rise(one, '_bucket', match)}))")
            for one in selectors
        ]
    return found


def _select(selector: str, match: str, end: str = "") -> str:
    """A metric with matchers, its name with this end."""
    name, _, own = selector.rstrip("}").partition("{")
    return f"{name}{end}{{{','.join(filter(None, (match, own)))}}}"


def _rise(selector: str, end: str, match: str) -> str:
    return f"increase({_select(selector, match, end)}[{WINDOW}])"
