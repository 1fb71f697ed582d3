"""What an engine's metrics say of its load: by which names each engine tells it. Pure.

The names are those of vLLM (up to 0.33, and as they were before 0.9), SGLang, TensorRT-LLM
(``trtllm-serve``) and llama.cpp. A metric that an engine, or its version, does not have is unknown.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace

from loaders.engines.base import EngineLoad
from loaders.engines.prometheus_text import MAX_VALUE, MetricsPage, lines_named

SLEEP_STATES = ("awake", "weights_offloaded", "discard_all")
"""vLLM's ``sleep_state``, by sleep level 0, 1 and 2."""

Names = tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadNames:
    """By which metrics an engine tells a field of ``EngineLoad``: of several the first that it has.
    ``others`` are those that ``finish`` reads, which adds what no single metric is."""

    running_requests: Names
    waiting_requests: Names
    kv_cache_usage_fraction: Names = ()
    kv_cache_tokens: Names = ()
    max_running_requests: Names = ()
    prefix_cache_queries_tokens: Names = ()
    prefix_cache_hits_tokens: Names = ()
    preemptions: Names = ()
    prompt_tokens: Names = ()
    generation_tokens: Names = ()
    others: Names = ()
    finish: Callable[[EngineLoad, MetricsPage], EngineLoad] = lambda load, page: load

    def all(self) -> frozenset[str]:
        """Every name in it."""
        fields = (getattr(self, name) for name in self.__slots__ if name != "finish")
        return frozenset(name for names in fields for name in names)

    def read(self, page: MetricsPage) -> EngineLoad:
        """The load by a page of this engine."""
        load = EngineLoad(
            running_requests=_count(page.total(*self.running_requests)),
            waiting_requests=_count(page.total(*self.waiting_requests)),
            kv_cache_usage_fraction=_fraction(page.mean(*self.kv_cache_usage_fraction)),
            kv_cache_tokens=_count(page.total(*self.kv_cache_tokens)),
            max_running_requests=_count(page.total(*self.max_running_requests)),
            prefix_cache_queries_tokens=page.total(*self.prefix_cache_queries_tokens),
            prefix_cache_hits_tokens=page.total(*self.prefix_cache_hits_tokens),
            preemptions=_count(page.total(*self.preemptions)),
            prompt_tokens=page.total(*self.prompt_tokens),
            generation_tokens=page.total(*self.generation_tokens),
        )
        return self.finish(load, page)


def _finish_vllm(load: EngineLoad, page: MetricsPage) -> EngineLoad:
    tokens = []
    for labels, _ in page.samples("vllm:cache_config_info"):
        size = _label_figure(labels.get("kv_cache_size_tokens"))
        if size is None:
            blocks = _label_figure(labels.get("num_gpu_blocks"))
            size = _product(blocks, _label_figure(labels.get("block_size")))
        if size:
            tokens.append(round(size))
    levels = [
        SLEEP_STATES.index(state)
        for labels, value in page.samples("vllm:engine_sleep_state")
        if value and (state := labels.get("sleep_state")) in SLEEP_STATES
    ]
    # Each engine of a data-parallel server has a line, with the sum over all of them.
    size_tokens, level = max(tokens, default=None), max(levels, default=None)
    return replace(load, kv_cache_tokens=size_tokens, sleep_level=level)


def _finish_sglang(load: EngineLoad, page: MetricsPage) -> EngineLoad:
    if load.kv_cache_tokens is None:
        for labels, _ in page.samples("sglang:cache_config_info"):
            pages = _label_figure(labels.get("num_pages"))
            tokens = _product(pages, _label_figure(labels.get("page_size")))
            return replace(load, kv_cache_tokens=_count(tokens))
    return load


def _finish_trtllm(load: EngineLoad, page: MetricsPage) -> EngineLoad:
    """Its cache counts in blocks."""
    block = page.mean("trtllm_kv_cache_tokens_per_block")
    hits, misses = load.prefix_cache_hits_tokens, load.prefix_cache_queries_tokens
    return replace(
        load,
        kv_cache_tokens=_count(_product(page.total("trtllm_kv_cache_max_blocks"), block)),
        prefix_cache_queries_tokens=_product(_sum(hits, misses), block),
        prefix_cache_hits_tokens=_product(hits, block),
    )


ENGINE_NAMES: tuple[LoadNames, ...] = (
    LoadNames(
        running_requests=("vllm:num_requests_running",),
        waiting_requests=("vllm:num_requests_waiting",),
        kv_cache_usage_fraction=("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc"),
        prefix_cache_queries_tokens=(
            *("vllm:prefix_cache_queries_total", "vllm:gpu_prefix_cache_queries_total"),
            *("vllm:prefix_cache_queries", "vllm:gpu_prefix_cache_queries"),
        ),
        prefix_cache_hits_tokens=(
            *("vllm:prefix_cache_hits_total", "vllm:gpu_prefix_cache_hits_total"),
            *("vllm:prefix_cache_hits", "vllm:gpu_prefix_cache_hits"),
        ),
        preemptions=("vllm:num_preemptions_total", "vllm:num_preemptions"),
        prompt_tokens=("vllm:prompt_tokens_total", "vllm:prompt_tokens"),
        generation_tokens=("vllm:generation_tokens_total", "vllm:generation_tokens"),
        others=("vllm:cache_config_info", "vllm:engine_sleep_state"),
        finish=_finish_vllm,
    ),
    LoadNames(
        running_requests=("sglang:num_running_reqs",),
        waiting_requests=("sglang:num_queue_reqs",),
        kv_cache_usage_fraction=("sglang:token_usage",),
        kv_cache_tokens=("sglang:max_total_num_tokens",),
        prefix_cache_queries_tokens=("sglang:prompt_tokens_total",),
        prefix_cache_hits_tokens=("sglang:cached_tokens_total",),
        preemptions=("sglang:num_retracted_requests_total",),
        prompt_tokens=("sglang:prompt_tokens_total",),
        generation_tokens=("sglang:generation_tokens_total",),
        others=("sglang:cache_config_info",),
        finish=_finish_sglang,
    ),
    LoadNames(
        running_requests=("trtllm_num_requests_running",),
        waiting_requests=("trtllm_num_requests_waiting",),
        kv_cache_usage_fraction=("trtllm_kv_cache_utilization",),
        max_running_requests=("trtllm_max_num_active_requests",),
        prefix_cache_queries_tokens=("trtllm_kv_cache_missed_blocks_total",),
        prefix_cache_hits_tokens=("trtllm_kv_cache_reused_blocks_total",),
        prompt_tokens=("trtllm_prompt_tokens_total",),
        generation_tokens=("trtllm_generation_tokens_total",),
        others=("trtllm_kv_cache_max_blocks", "trtllm_kv_cache_tokens_per_block"),
        finish=_finish_trtllm,
    ),
    LoadNames(
        running_requests=("llamacpp:requests_processing",),
        waiting_requests=("llamacpp:requests_deferred",),
        kv_cache_usage_fraction=("llamacpp:kv_cache_usage_ratio",),
        prompt_tokens=("llamacpp:prompt_tokens_total",),
        generation_tokens=("llamacpp:tokens_predicted_total",),
    ),
)

_WANTED = lines_named(sorted(name for names in ENGINE_NAMES for name in names.all()))


def read_load(body: bytes) -> EngineLoad | None:
    """The load that a page of metrics tells, in whichever engine's names; ``None`` where it is none
    of theirs, or was cut short."""
    try:
        page = MetricsPage(body, _WANTED)
    except ValueError:
        return None
    found = frozenset(page.names())
    for names in ENGINE_NAMES:
        if found & names.all():
            return names.read(page)
    return None


def read_iterations(body: bytes) -> EngineLoad | None:
    """The load by the newest entry of TensorRT-LLM's statistics of iterations, which are JSON;
    ``None`` for any other text, and where there was none since they were asked for last."""
    try:
        entries = json.loads(body)
    except (ValueError, RecursionError):
        return None
    if not isinstance(entries, list) or not entries or not isinstance(entries[-1], dict):
        return None
    newest = entries[-1]
    cache = newest.get("kvCacheStats")
    cache = cache if isinstance(cache, dict) else {}
    used, most = _figure(cache.get("usedNumBlocks")), _figure(cache.get("maxNumBlocks"))
    block = _figure(cache.get("tokensPerBlock"))
    hits, misses = _figure(cache.get("reusedBlocks")), _figure(cache.get("missedBlocks"))
    return EngineLoad(
        running_requests=_count(_figure(newest.get("numActiveRequests"))),
        waiting_requests=_count(_figure(newest.get("numQueuedRequests"))),
        kv_cache_usage_fraction=_fraction(used / most) if used is not None and most else None,
        kv_cache_tokens=_count(_product(most, block)),
        max_running_requests=_count(_figure(newest.get("maxNumActiveRequests"))),
        prefix_cache_queries_tokens=_product(_sum(hits, misses), block),
        prefix_cache_hits_tokens=_product(hits, block),
    )


def _count(value: float | None) -> int | None:
    return None if value is None else round(value)


def _fraction(value: float | None) -> float | None:
    """A share of 0 to 1; what is clearly above is in other units, and unknown."""
    return None if value is None or value > 1.5 else min(1.0, value)


def _figure(value: object) -> float | None:
    """A number of JSON that is a count or a size."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if 0 <= value <= MAX_VALUE else None


def _label_figure(text: str | None) -> float | None:
    """A number in a label; ``None`` for what Python calls ``None``, too."""
    return float(text) if text is not None and text.isdecimal() and len(text) < 16 else None


def _product(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one * other


def _sum(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one + other
