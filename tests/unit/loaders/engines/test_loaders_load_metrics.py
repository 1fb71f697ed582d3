"""What engines' metrics say of their load: by each engine's names, whole pages only."""

from __future__ import annotations

import asyncio
import json

import httpx
import pytest

from loaders.engines.base import EngineLoad, engine_of
from loaders.engines.client import READ_BYTES, EngineClient
from loaders.engines.load_metrics import read_iterations, read_load
from loaders.engines.openai_compatible import MAX_METRICS_BYTES
from loaders.engines.prometheus_text import MAX_FOUND_BYTES

URL = "http://server:8000"

VLLM = """\
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="m"} 3.0
vllm:num_requests_waiting{engine="0",model_name="m"} 12.0
vllm:num_requests_waiting_by_reason{engine="0",model_name="m",reason="capacity"} 12.0
vllm:engine_sleep_state{engine="0",model_name="m",sleep_state="awake"} 0.0
vllm:engine_sleep_state{engine="0",model_name="m",sleep_state="weights_offloaded"} 1.0
vllm:engine_sleep_state{engine="0",model_name="m",sleep_state="discard_all"} 0.0
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.25
vllm:prefix_cache_queries_total{engine="0",model_name="m"} 1000.0
vllm:prefix_cache_queries_created{engine="0",model_name="m"} 1.7e+09
vllm:prefix_cache_hits_total{engine="0",model_name="m"} 400.0
vllm:num_preemptions_total{engine="0",model_name="m"} 2.0
vllm:prompt_tokens_total{engine="0",model_name="m"} 1234.0
vllm:prompt_tokens_by_source_total{engine="0",model_name="m",source="local_compute"} 834.0
vllm:generation_tokens_total{engine="0",model_name="m"} 5.5e+03
vllm:cache_config_info{block_size="16",cache_dtype="auto",engine="0",kv_cache_size_tokens="65000",\
num_gpu_blocks="4096",swap_space="None"} 1.0
vllm:time_to_first_token_seconds_bucket{engine="0",le="0.001",model_name="m"} 0.0
"""
VLLM_0_8 = """\
vllm:num_requests_running{model_name="m"} 1.0
vllm:num_requests_waiting{model_name="m"} 0.0
vllm:gpu_cache_usage_perc{model_name="m"} 0.5
vllm:gpu_prefix_cache_queries_total{model_name="m"} 10.0
vllm:gpu_prefix_cache_hits_total{model_name="m"} 5.0
vllm:cache_config_info{block_size="16",num_gpu_blocks="100"} 1.0
"""
SGLANG = """\
sglang:num_running_reqs{engine_type="unified",model_name="m",pp_rank="0",tp_rank="0"} 4.0
sglang:num_running_reqs{engine_type="unified",model_name="m",pp_rank="0",tp_rank="1"} 4.0
sglang:num_queue_reqs{engine_type="unified",model_name="m",pp_rank="0",tp_rank="0"} 7.0
sglang:token_usage{engine_type="unified",model_name="m",pp_rank="0",tp_rank="0"} 0.28
sglang:max_total_num_tokens{engine_type="unified",model_name="m",pp_rank="0",tp_rank="0"} 471258.0
sglang:cache_hit_rate{engine_type="unified",model_name="m",pp_rank="0",tp_rank="0"} 0.9
sglang:prompt_tokens_total{is_streaming="true",model_name="m"} 8.0
sglang:prompt_tokens_total{is_streaming="false",model_name="m"} 2.0
sglang:cached_tokens_total{cache_source="device",model_name="m"} 3.0
sglang:cached_tokens_total{cache_source="host",model_name="m"} 1.0
sglang:generation_tokens_total{model_name="m"} 20.0
sglang:num_retracted_reqs{model_name="m"} 1.0
sglang:num_retracted_requests_total{model_name="m"} 6.0
"""
SGLANG_0_5 = """\
sglang:num_running_reqs{model_name="m"} 1.0
sglang:cache_config_info{model_name="m",num_pages="50",page_size="64"} 1.0
"""
TRTLLM = """\
trtllm_num_requests_running{engine_type="trtllm",model_name="m"} 5.0
trtllm_num_requests_waiting{engine_type="trtllm",model_name="m"} 3.0
trtllm_kv_cache_utilization{engine_type="trtllm",model_name="m"} 0.6
trtllm_kv_cache_max_blocks{engine_type="trtllm",model_name="m"} 1000.0
trtllm_kv_cache_tokens_per_block{engine_type="trtllm",model_name="m"} 32.0
trtllm_max_num_active_requests{engine_type="trtllm",model_name="m"} 64.0
trtllm_kv_cache_reused_blocks_total{engine_type="trtllm",model_name="m"} 30.0
trtllm_kv_cache_missed_blocks_total{engine_type="trtllm",model_name="m"} 10.0
trtllm_prompt_tokens_total{engine_type="trtllm",model_name="m"} 100.0
trtllm_generation_tokens_total{engine_type="trtllm",model_name="m"} 200.0
"""
ITERATIONS = json.dumps(
    [
        {"iter": 1, "numActiveRequests": 99},
        {
            "iter": 2, "numActiveRequests": 5, "numQueuedRequests": 3, "maxNumActiveRequests": 64,
            "kvCacheStats": {
                "usedNumBlocks": 600, "maxNumBlocks": 1000, "tokensPerBlock": 32,
                "reusedBlocks": 30, "missedBlocks": 10,
            },
        },
    ]
)  # fmt: skip
LLAMACPP = """\
llamacpp:prompt_tokens_total 96641
llamacpp:tokens_predicted_total 23210
llamacpp:kv_cache_usage_ratio 0.63
llamacpp:requests_processing 2
llamacpp:requests_deferred 1
"""

PAGES = {
    "vllm": (
        VLLM,
        EngineLoad(
            running_requests=3,
            waiting_requests=12,
            kv_cache_usage_fraction=0.25,
            kv_cache_tokens=65_000,
            prefix_cache_queries_tokens=1_000,
            prefix_cache_hits_tokens=400,
            preemptions=2,
            prompt_tokens=1_234,
            generation_tokens=5_500,
            sleep_level=1,
        ),
    ),
    "vllm before 0.9": (
        VLLM_0_8,
        EngineLoad(
            running_requests=1,
            waiting_requests=0,
            kv_cache_usage_fraction=0.5,
            kv_cache_tokens=1_600,
            prefix_cache_queries_tokens=10,
            prefix_cache_hits_tokens=5,
        ),
    ),
    "sglang": (
        SGLANG,
        EngineLoad(
            running_requests=4,
            waiting_requests=7,
            kv_cache_usage_fraction=0.28,
            kv_cache_tokens=471_258,
            prefix_cache_queries_tokens=10,
            prefix_cache_hits_tokens=4,
            preemptions=6,
            prompt_tokens=10,
            generation_tokens=20,
        ),
    ),
    "sglang with a size in pages": (
        SGLANG_0_5,
        EngineLoad(running_requests=1, kv_cache_tokens=3_200),
    ),
    "trtllm-serve": (
        TRTLLM,
        EngineLoad(
            running_requests=5,
            waiting_requests=3,
            kv_cache_usage_fraction=0.6,
            kv_cache_tokens=32_000,
            max_running_requests=64,
            prefix_cache_queries_tokens=1_280,
            prefix_cache_hits_tokens=960,
            prompt_tokens=100,
            generation_tokens=200,
        ),
    ),
    "llama.cpp": (
        LLAMACPP,
        EngineLoad(
            running_requests=2,
            waiting_requests=1,
            kv_cache_usage_fraction=0.63,
            prompt_tokens=96_641,
            generation_tokens=23_210,
        ),
    ),
}


@pytest.mark.parametrize(("page", "load"), PAGES.values(), ids=PAGES)
def test_each_engine_tells_its_load_by_its_own_names(page: str, load: EngineLoad) -> None:
    assert read_load(page.encode()) == load
    assert read_load(page.replace("\n", "\r\n").encode()) == load


def test_engines_of_a_data_parallel_server_are_one() -> None:
    one = "".join(line + "\n" for line in VLLM.splitlines() if not line.startswith("#"))
    other = one.replace('engine="0"', 'engine="1"').replace("} 0.25", "} 0.75")
    both = read_load((one + other).encode())
    assert both is not None
    assert (both.running_requests, both.waiting_requests) == (6, 24)
    assert both.kv_cache_usage_fraction == 0.5
    assert both.kv_cache_tokens == 65_000  # each says the sum of both
    assert both.generation_tokens == 11_000


@pytest.mark.parametrize(
    "line",
    [
        "vllm:num_requests_running",
        "vllm:num_requests_running{} NaN",
        "vllm:num_requests_running +Inf",
        "vllm:num_requests_running -1",
        "vllm:num_requests_running 1e300",
        "vllm:num_requests_running one",
        'vllm:num_requests_running{engine="0" 1',
        "vllm:num_requests_running_other 1",
        "other:vllm:num_requests_running 1",
        "# vllm:num_requests_running 1",
    ],
)
def test_what_is_no_figure_is_unknown_and_not_zero(line: str) -> None:
    load = read_load(f"{line}\nvllm:num_requests_waiting 4\n".encode())
    assert load == EngineLoad(waiting_requests=4)


@pytest.mark.parametrize(
    ("line", "running"),
    [
        ("vllm:num_requests_running 2", 2),
        ("vllm:num_requests_running\t2", 2),
        ("vllm:num_requests_running{} 2 1395066363000", 2),
        ('vllm:num_requests_running{model_name="a } b, \\"c\\" \\\\"} 2', 2),
        ('vllm:num_requests_running{a="b",} 2', 2),
        ('vllm:num_requests_running{a="b"} 2 # {trace="x"} 1', 2),
    ],
)
def test_lines_of_all_shapes(line: str, running: int) -> None:
    assert read_load(f"{line}\n".encode()) == EngineLoad(running_requests=running)


def test_a_share_in_percent_is_no_share() -> None:
    page = b"vllm:num_requests_running 1\nvllm:kv_cache_usage_perc 43\n"
    assert read_load(page) == EngineLoad(running_requests=1)


@pytest.mark.parametrize(
    "page",
    [
        b"",
        b"\n",
        b"<html>no metrics here</html>\n",
        b"python_info 1\n",
        VLLM.encode()[:-1],  # its last line is not whole
        VLLM.encode()[:200],
        b'vllm:num_requests_running{a="b"} 1\n' * (MAX_FOUND_BYTES // 30),
    ],
)
def test_a_page_that_is_cut_short_or_too_much_or_another_is_unknown(page: bytes) -> None:
    assert read_load(page) is None


def test_iterations_of_tensorrt_llm_are_read_by_their_newest() -> None:
    assert read_iterations(ITERATIONS.encode()) == EngineLoad(
        running_requests=5,
        waiting_requests=3,
        kv_cache_usage_fraction=0.6,
        kv_cache_tokens=32_000,
        max_running_requests=64,
        prefix_cache_queries_tokens=1_280,
        prefix_cache_hits_tokens=960,
    )


@pytest.mark.parametrize(
    ("text", "load"),
    [
        ("[]", None),
        ("[", None),
        ("[" * 100_000, None),
        ('{"numActiveRequests": 1}', None),
        ("[7]", None),
        ('[{"numActiveRequests": 1, "kvCacheStats": null}]', EngineLoad(running_requests=1)),
        ('[{"numActiveRequests": -1, "numQueuedRequests": true}]', EngineLoad()),
        ('[{"kvCacheStats": {"usedNumBlocks": 1, "maxNumBlocks": 0}}]', EngineLoad()),
    ],
)
def test_iterations_of_all_shapes(text: str, load: EngineLoad | None) -> None:
    assert read_iterations(text.encode()) == load


def load_of(
    *, engine: str | None = None, path: str = "", error: Exception | None = None, **answers: object
) -> tuple[EngineLoad | None, list[str]]:
    """What an engine's load is found to be, and what was asked for."""
    asked = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request.url.path)
        assert request.headers["authorization"] == "Bearer key"
        if error is not None:
            raise error
        found = answers.get(request.url.path.removeprefix(path).strip("/").replace("/", "_"))
        if isinstance(found, int):
            return httpx.Response(found, text=VLLM)
        return httpx.Response(404) if found is None else httpx.Response(200, text=str(found))

    async def story() -> EngineLoad | None:
        client = EngineClient(timeout_s=1.0, transport=httpx.MockTransport(answer))
        headers = {"authorization": "Bearer key"}
        return await engine_of(engine).load(client, URL + path, headers)

    return asyncio.run(story()), asked


@pytest.mark.parametrize("engine", [None, "vllm", "simulated"])
def test_an_engine_is_asked_for_its_metrics_with_the_headers_of_all_requests(
    engine: str | None,
) -> None:
    assert load_of(engine=engine, metrics=VLLM) == (PAGES["vllm"][1], ["/metrics"])
    assert load_of(engine=engine, path="/team-a", metrics=VLLM)[1] == ["/team-a/metrics"]


def test_tensorrt_llm_is_asked_for_its_page_too() -> None:
    both = load_of(metrics=ITERATIONS, prometheus_metrics=TRTLLM)
    assert both == (PAGES["trtllm-serve"][1], ["/metrics", "/prometheus/metrics"])
    assert load_of(metrics="[]", prometheus_metrics=TRTLLM)[0] == PAGES["trtllm-serve"][1]
    assert load_of(metrics=ITERATIONS)[0] == read_iterations(ITERATIONS.encode())
    assert load_of(metrics="[]")[0] is None


@pytest.mark.parametrize("status", [204, 302, 401, 404, 500])
def test_what_is_not_answered_with_200_is_unknown(status: int) -> None:
    assert load_of(metrics=status)[0] is None


@pytest.mark.parametrize("error", [httpx.ConnectError("refused"), httpx.ReadTimeout("slow")])
def test_what_does_not_answer_is_unknown(error: Exception) -> None:
    assert load_of(error=error)[0] is None


def test_a_page_without_end_is_not_read_without_end() -> None:
    sent = 0

    class Endless(httpx.AsyncByteStream):
        async def __aiter__(self):  # type: ignore[no-untyped-def]
            nonlocal sent
            line = b"vllm:num_requests_running 1\n"
            while True:  # wherever it is cut, that is after a line
                sent += READ_BYTES
                yield line + b"#" * (READ_BYTES - 1 - len(line)) + b"\n"
                line = b""

    client = EngineClient(
        timeout_s=1.0,
        transport=httpx.MockTransport(lambda request: httpx.Response(200, stream=Endless())),
    )
    assert asyncio.run(engine_of(None).load(client, URL, {})) is None
    assert sent <= 2 * MAX_METRICS_BYTES
