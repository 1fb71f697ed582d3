"""vLLM as an engine: its command line, sleep calls, log phases, metrics, and what it can do."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import httpx

from loaders.engines.base import (
    Capabilities,
    EngineCommand,
    EngineOptions,
    LoadMetrics,
    Placement,
)
from loaders.engines.client import EngineClient
from loaders.engines.openai_compatible import OpenAICompatibleEngine
from loaders.engines.vllm.command import check_address, read_flags, vllm_command
from loaders.settings import LoaderSettings

PHASE_SIGNS: Sequence[tuple[str, re.Pattern[str]]] = (
    ("loading", re.compile(
        r"Starting to load model|Loading (safetensors|pt|weights)|checkpoint shards",
        re.IGNORECASE)),
    ("compiling", re.compile(
        r"torch\.compile takes|directory: .* for vLLM's torch\.compile|Dynamo bytecode|"
        r"Compiling (a|the) ", re.IGNORECASE)),
    ("warming", re.compile(
        r"KV cache size|Capturing |Warming up|init engine|Supported tasks|vLLM server on|"
        r"Loading weights took|Available routes|^Route:", re.IGNORECASE)),
)  # fmt: skip
"""Log messages, by the start phase they show to have begun."""

WAKE_AND_RELOAD: tuple[tuple[str, Mapping[str, object] | None], ...] = (
    ("/wake_up?tags=weights", None),
    ("/collective_rpc", {"method": "reload_weights"}),
    ("/wake_up?tags=kv_cache", None),
    ("/reset_prefix_cache", None),
)
"""At level 2 the weights were dropped. Waking allocates memory for them and fills it with nothing,
so they are read again before the cache is made, as vLLM's documentation has it."""

FETCH_FLAGS = frozenset(
    {
        *("--revision", "--code-revision", "--tokenizer-revision", "--download-dir"),
        # These may name another repository of the hub, and an engine with a model here is offline.
        *("--tokenizer", "--hf-config-path", "--lora-modules", "--speculative-config", "--config"),
        *("--hf-token", "--hf-overrides", "-sc"),
    }
)
"""Arguments by which vLLM is told what to fetch, from where, or where to keep it."""

UNCACHED_FORMATS = frozenset({"dummy", "pt", "npcache"})
"""Load formats that make weights up, or want files which are not fetched beside safetensors."""

HUB_VARIABLES = ("HF_", "HUGGING_FACE_", "TRANSFORMERS_", "VLLM_USE_MODELSCOPE", "MODELSCOPE_")
"""What variables begin with that say where a hub is and which token to use. Set for a pool alone,
the model cache does not see them."""


class VllmEngine(OpenAICompatibleEngine):
    """vLLM, installed for ``loaders.engine_python``."""

    name = "vllm"
    capabilities = Capabilities(
        loads_weights=True,
        sleep_levels=frozenset({1, 2}),
        fork=True,
        compile_cache=True,
        kv_events=True,
        lora=True,
        prefill_decode=True,
    )
    load_metrics = LoadMetrics(
        requests_running="vllm:num_requests_running",
        requests_waiting="vllm:num_requests_waiting",
        kv_cache_usage_fraction="vllm:kv_cache_usage_perc",
    )
    phase_signs = PHASE_SIGNS

    def check(self, args: Sequence[str]) -> Iterator[str]:
        """See ``Engine``."""
        return check_address(args)

    def program(self, settings: LoaderSettings) -> Path | None:
        """See ``Engine``."""
        return settings.engine_python.expanduser()

    def fetches_model(
        self, args: Sequence[str], env: Mapping[str, str], settings: LoaderSettings
    ) -> bool:
        """See ``Engine``."""
        load_format = settings.load_format
        for name, *values in read_flags(args):
            if name.partition(".")[0] in FETCH_FLAGS:  # --speculative-config.model
                return True
            if name == "--load-format" and values:
                load_format = values[0]
        return load_format in UNCACHED_FORMATS or any(one.startswith(HUB_VARIABLES) for one in env)

    def command(
        self, options: EngineOptions, placement: Placement, settings: LoaderSettings
    ) -> EngineCommand:
        """See ``Engine``."""
        return vllm_command(options, placement, settings)

    async def sleep(self, client: EngineClient, url: str, level: int, *, timeout_s: float) -> None:
        """See ``Engine``. Needs ``--enable-sleep-mode``."""
        await client.post(f"{url}/sleep?level={level}", timeout_s=timeout_s)

    async def is_sleeping(self, client: EngineClient, url: str) -> bool | None:
        """See ``Engine``."""
        try:
            status, body = await client.request("GET", f"{url}/is_sleeping", {})
            answer = json.loads(body) if status == 200 else None
        except (httpx.HTTPError, httpx.InvalidURL, ValueError, RecursionError):
            return None
        sleeps = answer.get("is_sleeping") if isinstance(answer, dict) else None
        return sleeps if isinstance(sleeps, bool) else None

    async def wake(self, client: EngineClient, url: str, level: int, *, timeout_s: float) -> None:
        """See ``Engine``."""
        for path, body in WAKE_AND_RELOAD if level == 2 else (("/wake_up", None),):
            await client.post(f"{url}{path}", timeout_s=timeout_s, body=body)
