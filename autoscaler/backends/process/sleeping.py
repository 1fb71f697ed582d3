"""Puts an engine to sleep and wakes it, by the calls that vLLM has for that."""

from __future__ import annotations

from collections.abc import Mapping

from autoscaler.backends.health import HealthClient
from autoscaler.backends.process.replica import ReplicaProcess

WAKE = (("/wake_up", None),)
RELOAD: tuple[tuple[str, Mapping[str, object] | None], ...] = (
    ("/wake_up?tags=weights", None),
    ("/collective_rpc", {"method": "reload_weights"}),
    ("/wake_up?tags=kv_cache", None),
    ("/reset_prefix_cache", None),
)
"""At level 2 the weights were dropped. Waking gives room for them and leaves what lies there, so
they are read again before the cache is made, as vLLM's documentation of the sleep mode has it."""


async def put_to_sleep(
    client: HealthClient, child: ReplicaProcess, level: int, timeout_s: float
) -> None:
    """Have it sleep. Raises ``Unsupported`` or ``BackendError``."""
    await client.post(f"{child.url}/sleep?level={level}", {}, timeout_s=timeout_s)
    child.sleep_level = level


async def wake(client: HealthClient, child: ReplicaProcess, timeout_s: float) -> None:
    """Have it answer again, with its own weights. Raises as ``put_to_sleep`` does."""
    reload = child.sleep_level == 2 and child.spec.pool.engine == "vllm"
    for path, body in RELOAD if reload else WAKE:
        await client.post(f"{child.url}{path}", {}, timeout_s=timeout_s, body=body)
    child.sleep_level = 0
