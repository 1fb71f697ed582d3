"""Two models on the real vLLM, and host memory for one: each request is answered by its model."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from openai import OpenAI
from tidegate_process import up

PATIENCE_S = 600.0
GIB = 2**30

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(3 * PATIENCE_S)]


def test_two_models_take_turns(engine_python: Path, model_dir: Path, tmp_path: Path) -> None:
    pools = [
        {
            "name": name,
            "engine": "vllm",
            "model": model_dir,
            "max_model_len_tokens": 512,
            "env": {"VLLM_CPU_KVCACHE_SPACE": "1"},
            "process": {"memory_bytes": 3 * GIB},
        }
        for name in ("first", "second")
    ]
    autoscaler = {"host_memory_bytes": 4 * GIB, "idle_to_zero_s": 3_600, "min_loaded_s": 1}
    with up(
        tmp_path,
        pools=pools,
        loaders={"engine_python": engine_python},
        autoscaler=autoscaler,
    ) as tidegate:
        # The other pool may have to wait for the fork server, which has to import vLLM first.
        tidegate.expected_log.append("no engine can be kept forked: the fork server is importing")
        api = OpenAI(
            base_url=tidegate.url + "/v1", api_key="none", max_retries=0, timeout=PATIENCE_S
        )
        with api:
            for name, other in (("first", "second"), ("second", "first"), ("first", "second")):
                began_s = time.monotonic()
                answer = api.chat.completions.create(
                    model=name,
                    max_tokens=16,
                    temperature=0,
                    messages=[{"role": "user", "content": "What is the capital of France?"}],
                )
                assert "Paris" in (answer.choices[0].message.content or "")
                assert answer.model == name
                assert tidegate.pool(name)["ready"] == 1
                assert tidegate.pool(other)["ready"] == 0
                print(f"{name}: answered after {time.monotonic() - began_s:.1f} s")
        assert (tidegate.starts("first"), tidegate.starts("second")) == (2, 1)
