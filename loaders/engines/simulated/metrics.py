"""What the simulated engine counts, under the names and labels that vLLM exports. Pure.

Written by hand rather than with a client library: it is the engine's hottest bookkeeping, and it
must be importable with nothing but the standard library.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as SequenceOf

from loaders.engines.simulated.scheduler import Scheduler, Sequence, StepOutput

_TTFT_S = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
    20.0, 40.0, 80.0, 160.0, 640.0, 2560.0,
)  # fmt: skip
_ITL_S = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
    20.0, 40.0, 80.0,
)  # fmt: skip
_REQUEST_S = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0,
    240.0, 480.0, 960.0, 1920.0, 7680.0,
)  # fmt: skip
_TOKENS = tuple(
    float(m * 10**e) for e in range(6) for m in (1, 2, 5) if m * 10**e <= 200_000
)  # fmt: skip

FINISHED_REASONS = ("stop", "length", "abort", "error", "repetition")
"""The values of ``finished_reason``."""
SLEEP_STATES = ("awake", "weights_offloaded", "discard_all")
"""The values of ``sleep_state``, by sleep level 0, 1 and 2."""


class Histogram:
    """Counts in buckets with upper bounds ``bounds`` (inclusive), and the sum."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: SequenceOf[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        """Count ``value``."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def lines(self, name: str, labels: str) -> Iterable[str]:
        """The samples, as Prometheus text has them."""
        running = 0
        for bound, count in zip((*self.bounds, None), self.counts, strict=True):
            running += count
            edge = "+Inf" if bound is None else str(bound)
            yield f'{name}_bucket{{{labels},le="{edge}"}} {float(running)}'
        yield f"{name}_count{{{labels}}} {float(running)}"
        yield f"{name}_sum{{{labels}}} {self.total}"


class Metrics:
    """Everything counted since the start."""

    def __init__(self) -> None:
        self.prompt_tokens = 0
        self.cached_prompt_tokens = 0
        self.generation_tokens = 0
        self.refused = 0
        self.finished = dict.fromkeys(FINISHED_REASONS, 0)
        self.ttft_s = Histogram(_TTFT_S)
        self.itl_s = Histogram(_ITL_S)
        self.tpot_s = Histogram(_ITL_S)
        self.queue_s = Histogram(_REQUEST_S)
        self.prefill_s = Histogram(_REQUEST_S)
        self.decode_s = Histogram(_REQUEST_S)
        self.inference_s = Histogram(_REQUEST_S)
        self.e2e_s = Histogram(_REQUEST_S)
        self.prompt_lengths = Histogram(_TOKENS)
        self.generation_lengths = Histogram(_TOKENS)
        self.iteration_tokens = Histogram(tuple(float(1 << n) for n in (0, *range(3, 15))))

    def record(self, progress: StepOutput) -> None:
        """Count the tokens of ``progress``. Its finished sequences: ``record_finished``."""
        self.generation_tokens += len(progress.produced)
        observe = self.itl_s.observe
        for interval in progress.intervals_s:
            observe(interval)
        if progress.steps:
            tokens = len(progress.intervals_s) + progress.computed_prompt_tokens
            self.iteration_tokens.observe(tokens / progress.steps)

    def record_first_token(self, sequence: Sequence) -> None:
        """Count what is known when the first token (or a pooling result) is there."""
        first, scheduled = sequence.first_token_s or sequence.finished_s, sequence.scheduled_s
        if first is None or scheduled is None:
            return
        self.prompt_tokens += sequence.prompt_tokens
        self.cached_prompt_tokens += sequence.cached_tokens
        if sequence.output_tokens:
            self.ttft_s.observe(first - sequence.arrived_s)

    def record_finished(self, sequence: Sequence, reason: str) -> None:
        """Count a sequence that ended, aborted ones included."""
        self.finished[reason] += 1
        end, scheduled = sequence.finished_s, sequence.scheduled_s
        first, last = sequence.first_token_s, sequence.last_token_s
        if end is None or reason == "abort":
            return
        self.e2e_s.observe(end - sequence.arrived_s)
        self.prompt_lengths.observe(sequence.prompt_tokens)
        self.generation_lengths.observe(sequence.produced)
        if scheduled is not None:
            self.queue_s.observe(scheduled - sequence.arrived_s)
            self.prefill_s.observe((end if first is None else first) - scheduled)
            self.inference_s.observe(end - scheduled)
        if first is not None and last is not None:
            self.decode_s.observe(last - first)
            if sequence.produced > 1:
                self.tpot_s.observe((last - first) / (sequence.produced - 1))

    def render(self, scheduler: Scheduler, *, model_name: str, sleep_level: int) -> bytes:
        """All of it as Prometheus text, format 0.0.4."""
        model_label = f'model_name="{_escaped(model_name)}"'
        labels = f'engine="0",{model_label}'
        out: list[str] = []

        def family(kind: str, name: str, text: str, samples: Iterable[str]) -> None:
            out.append(f"# HELP {name} {text}")
            out.append(f"# TYPE {name} {kind}")
            out.extend(samples)

        def rows(kind: str, name: str, text: str, values: Mapping[str, float]) -> None:
            """A sample for each value, which is under its own labels."""
            samples = (f"vllm:{name}{{{own}{labels}}} {float(v)}" for own, v in values.items())
            family(kind, f"vllm:{name}", text, samples)

        family(
            "gauge",
            "tidegate_simulated_engine",
            "These figures are simulated, not measured.",
            [f"tidegate_simulated_engine{{{labels}}} 1.0"],
        )
        blocks, gauge, counter = scheduler.blocks, "gauge", "counter"
        for kind, name, text, value in (
            (gauge, "num_requests_running", "Sequences in the batch.", len(scheduler.running)),
            (gauge, "num_requests_waiting", "Sequences waiting.", len(scheduler.waiting)),
            (gauge, "kv_cache_usage_perc", "KV blocks in use, 0..1.", blocks.usage_fraction),
            (counter, "prefix_cache_queries_total", "Prompt tokens looked up in the prefix cache.",
             scheduler.prefix_queries_tokens),
            (counter, "prefix_cache_hits_total", "Prompt tokens found in the prefix cache.",
             scheduler.prefix_hits_tokens),
            (counter, "num_preemptions_total", "Preemptions.", scheduler.preemptions),
            (counter, "prompt_tokens_total", "Prompt tokens.", self.prompt_tokens),
            (counter, "prompt_tokens_cached_total", "Prompt tokens that were cached.",
             self.cached_prompt_tokens),
            (counter, "generation_tokens_total", "Generated tokens.", self.generation_tokens),
        ):  # fmt: skip
            rows(kind, name, text, {"": value})
        reasons = {'reason="capacity",': len(scheduler.waiting), 'reason="deferred",': 0}
        rows(gauge, "num_requests_waiting_by_reason", "Requests waiting, by reason.", reasons)
        refused = "vllm:admission_rejections_total"
        full = f'{refused}{{reason="max_num_queued_reqs",{model_label}}} {self.refused}.0'
        family(counter, refused, "Requests refused, the queue being full.", [full])
        finished = {f'finished_reason="{reason}",': n for reason, n in self.finished.items()}
        rows(counter, "request_success_total", "Count of finished requests.", finished)
        states = {f'sleep_state="{s}",': sleep_level == n for n, s in enumerate(SLEEP_STATES)}
        rows(gauge, "engine_sleep_state", "Engine sleep state: 1 for the state that holds.", states)
        rows(gauge, "cache_config_info", "Cache configuration.", {_cache_labels(scheduler): 1})
        for name, text, histogram in self._histograms():
            family("histogram", f"vllm:{name}", text, histogram.lines(f"vllm:{name}", labels))
        return ("\n".join(out) + "\n").encode()

    def _histograms(self) -> Iterable[tuple[str, str, Histogram]]:
        yield "time_to_first_token_seconds", "Arrival to first token.", self.ttft_s
        yield "inter_token_latency_seconds", "Between two tokens.", self.itl_s
        yield "request_time_per_output_token_seconds", "Mean between tokens.", self.tpot_s
        yield "e2e_request_latency_seconds", "Arrival to last token.", self.e2e_s
        yield "request_queue_time_seconds", "Arrival to first scheduling.", self.queue_s
        yield "request_prefill_time_seconds", "Scheduling to first token.", self.prefill_s
        yield "request_decode_time_seconds", "First token to last.", self.decode_s
        yield "request_inference_time_seconds", "Scheduling to last token.", self.inference_s
        yield "request_prompt_tokens", "Prompt tokens of a request.", self.prompt_lengths
        yield "request_generation_tokens", "Tokens generated.", self.generation_lengths
        yield "iteration_tokens_total", "Tokens per engine step.", self.iteration_tokens


def _cache_labels(scheduler: Scheduler) -> str:
    model = scheduler.model
    fields = {
        "block_size": model.block_size_tokens,
        "enable_prefix_caching": model.prefix_caching,
        "kv_cache_size_tokens": model.kv_blocks * model.block_size_tokens,
        "num_gpu_blocks": model.kv_blocks,
        "simulated": True,
    }
    return "".join(f'{key}="{value}",' for key, value in fields.items())


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
