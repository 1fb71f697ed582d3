import math

from prometheus_client.parser import text_string_to_metric_families

from loaders.engines.simulated.metrics import FINISHED_REASONS, SLEEP_STATES, Metrics
from loaders.engines.simulated.scheduler import EngineModel, Scheduler, Sequence

GAUGES = {
    "tidegate_simulated_engine",
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:num_requests_waiting_by_reason",
    "vllm:kv_cache_usage_perc",
    "vllm:engine_sleep_state",
    "vllm:cache_config_info",
}
COUNTERS = {
    "vllm:prefix_cache_queries",
    "vllm:prefix_cache_hits",
    "vllm:prompt_tokens",
    "vllm:prompt_tokens_cached",
    "vllm:generation_tokens",
    "vllm:num_preemptions",
    "vllm:admission_rejections",
    "vllm:request_success",
}
HISTOGRAMS = {
    "vllm:time_to_first_token_seconds",
    "vllm:inter_token_latency_seconds",
    "vllm:request_time_per_output_token_seconds",
    "vllm:request_queue_time_seconds",
    "vllm:request_prefill_time_seconds",
    "vllm:request_decode_time_seconds",
    "vllm:request_inference_time_seconds",
    "vllm:e2e_request_latency_seconds",
    "vllm:request_prompt_tokens",
    "vllm:request_generation_tokens",
    "vllm:iteration_tokens_total",
}


def _scrape(metrics: Metrics, scheduler: Scheduler, level: int = 0) -> dict[str, object]:
    text = metrics.render(scheduler, model_name='a "b"\\c', sleep_level=level).decode()
    families = {family.name: family for family in text_string_to_metric_families(text)}
    assert len(families) == len(GAUGES | COUNTERS | HISTOGRAMS)
    return families  # type: ignore[return-value]


def _value(families: dict[str, object], sample: str, **labels: str) -> float:
    for family in families.values():
        for found in family.samples:  # type: ignore[attr-defined]
            if found.name == sample and labels.items() <= found.labels.items():
                return float(found.value)
    raise AssertionError(f"no {sample} with {labels}")


def test_the_names_kinds_and_labels_are_vllms() -> None:
    families = _scrape(Metrics(), Scheduler(EngineModel()))
    kinds = {name: family.type for name, family in families.items()}  # type: ignore[attr-defined]
    assert {name for name, kind in kinds.items() if kind == "gauge"} == GAUGES
    assert {name for name, kind in kinds.items() if kind == "counter"} == COUNTERS
    assert {name for name, kind in kinds.items() if kind == "histogram"} == HISTOGRAMS
    for family in families.values():
        for sample in family.samples:  # type: ignore[attr-defined]
            assert sample.labels["model_name"] == 'a "b"\\c'
            if family.name != "vllm:admission_rejections":  # type: ignore[attr-defined]
                assert sample.labels["engine"] == "0"


def test_one_request_is_counted_where_it_should_be() -> None:
    metrics = Metrics()
    model = EngineModel(prefill_tokens_per_s=100.0, decode_tokens_per_s=10.0)
    scheduler = Scheduler(model)
    sequence = Sequence(prompt_tokens=50, output_tokens=4, block_hashes=[1, 2, 3])
    scheduler.submit(sequence, 0.0)
    scheduler.advance(0.0)
    families = _scrape(metrics, scheduler)
    assert _value(families, "vllm:num_requests_running") == 1
    assert _value(families, "vllm:kv_cache_usage_perc") == 4 / 4096
    progress = scheduler.advance(10.0)
    metrics.record(progress)
    for first in progress.first:
        metrics.record_first_token(first)
    metrics.record_finished(sequence, "length")
    families = _scrape(metrics, scheduler)
    expected = {
        "vllm:num_requests_running": 0,
        "vllm:kv_cache_usage_perc": 0,
        "vllm:prompt_tokens_total": 50,
        "vllm:generation_tokens_total": 4,
        "vllm:prefix_cache_queries_total": 50,
        "vllm:time_to_first_token_seconds_sum": 0.5,
        "vllm:time_to_first_token_seconds_count": 1,
        "vllm:inter_token_latency_seconds_count": 3,
        "vllm:inter_token_latency_seconds_sum": 0.3,
        "vllm:request_prefill_time_seconds_sum": 0.5,
        "vllm:request_decode_time_seconds_sum": 0.3,
        "vllm:e2e_request_latency_seconds_sum": 0.8,
        "vllm:request_queue_time_seconds_count": 1,
    }
    for name, value in expected.items():
        assert math.isclose(_value(families, name), value, abs_tol=1e-9), name
    for reason in FINISHED_REASONS:
        count = _value(families, "vllm:request_success_total", finished_reason=reason)
        assert count == (reason == "length")


def test_an_aborted_request_counts_as_such_and_in_no_latency() -> None:
    metrics, scheduler = Metrics(), Scheduler(EngineModel())
    sequence = Sequence(prompt_tokens=50, output_tokens=4)
    scheduler.submit(sequence, 0.0)
    scheduler.abort(sequence, 1.0)
    metrics.record_finished(sequence, "abort")
    families = _scrape(metrics, scheduler)
    assert _value(families, "vllm:request_success_total", finished_reason="abort") == 1
    assert _value(families, "vllm:e2e_request_latency_seconds_count") == 0


def test_a_histogram_bucket_includes_its_bound() -> None:
    metrics = Metrics()
    for value in (0.001, 0.0011, 1e9):
        metrics.ttft_s.observe(value)
    families = _scrape(metrics, Scheduler(EngineModel()))
    name = "vllm:time_to_first_token_seconds_bucket"
    assert _value(families, name, le="0.001") == 1
    assert _value(families, name, le="0.005") == 2
    assert _value(families, name, le="2560.0") == 2
    assert _value(families, name, le="+Inf") == 3


def test_the_sleep_state_is_one_of_three() -> None:
    for level in range(3):
        families = _scrape(Metrics(), Scheduler(EngineModel()), level)
        states = [_value(families, "vllm:engine_sleep_state", sleep_state=s) for s in SLEEP_STATES]
        assert states == [float(n == level) for n in range(3)]
