"""What one pick of the router costs: filters, scorers and the draw, without a request around it.

The replicas are busy and different, so that nothing is decided early; the ledger has a second
worker's figures. With two scorers the second looks up the blocks of an 8,192-token prompt, of which
each replica has cached a different beginning. A sample is the CPU time of a batch of picks; the
figure is the median over batches, with the fastest beside it.
"""

from __future__ import annotations

import json
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

REPLICAS = (4, 32, 128)
BARS_US = {32: 10.0, 128: 40.0}
"""Most microseconds of a compiled pick with two scorers, by number of replicas."""

_BATCHES = 300
_BATCH_S = 0.001
_BLOCK_TOKENS = 16
_BLOCKS = 512


def _measure(replicas: int, scorer_count: int) -> dict[str, Any]:
    # Here and not above: the compiled modules must be installed before they are imported.
    from router.endpoint import Endpoint
    from router.ledger import Ledger
    from router.pick import pick
    from router.request import RoutingRequest
    from router.scorers import OutstandingTokens, PrefillTokens
    from router.types import Replica, ReplicaState

    chance = random.Random(replicas)
    ready = [
        Endpoint(
            Replica(
                id=f"r{slot}",
                pool="m",
                slot=slot,
                url="http://127.0.0.1:1",
                state=ReplicaState.READY,
                max_model_len_tokens=32_768,
            ),
            initial_window=256,
            max_inflight_requests=256,
            max_inflight_tokens=1 << 30,
        )
        for slot in range(replicas)
    ]
    requests = [chance.randrange(1, 50) for _ in ready]
    tokens = [count * chance.randrange(500, 2000) for count in requests]
    others = (
        [chance.randrange(50) for _ in ready],
        [chance.randrange(50_000) for _ in ready],
        [0 for _ in ready],
    )
    ledger = Ledger(requests, tokens, [0 for _ in ready], lambda: others)
    blocks = [chance.randbytes(32) for _ in range(_BLOCKS)]
    cached: list[set[bytes] | None] = [set(blocks[: chance.randrange(8)]) for _ in ready]
    scorers = (OutstandingTokens(), PrefillTokens(cached, _BLOCK_TOKENS))[:scorer_count]
    request = RoutingRequest(_BLOCKS * _BLOCK_TOKENS, 9000, block_hashes=tuple(blocks))

    def batch(count: int) -> float:
        began_s = time.thread_time()
        for _ in range(count):
            pick(ready, request, ledger, chance.random, scorers)
        return (time.thread_time() - began_s) / count

    count = max(1, int(_BATCH_S / min(batch(20) for _ in range(5))))
    samples = [batch(count) for _ in range(_BATCHES)]
    return {
        "replicas": replicas,
        "scorers": scorer_count,
        "median_us": round(statistics.median(samples) * 1e6, 3),
        "fastest_us": round(min(samples) * 1e6, 3),
    }


def run(out: Path | None) -> int:
    """Print the table; write the record to ``out``. 1 where a compiled pick misses a bar."""
    from bench import machine
    from gateway import compiled

    is_compiled = compiled.install()
    rows = [_measure(replicas, scorers) for replicas in REPLICAS for scorers in (1, 2)]
    print(f"one pick, {'compiled' if is_compiled else 'plain Python'}")
    print("replicas  scorers  median µs  fastest µs   bar µs")
    missed = False
    for row in rows:
        bar = BARS_US.get(row["replicas"]) if row["scorers"] == 2 and is_compiled else None
        missed = missed or (bar is not None and row["median_us"] >= bar)
        print(
            f"{row['replicas']:8}  {row['scorers']:7}  {row['median_us']:9.2f}  "
            f"{row['fastest_us']:10.2f}  {'–' if bar is None else f'{bar:g}':>7}"
        )
    if not is_compiled:
        print("python -m gateway.compiled build compiles it", file=sys.stderr)
    if out is not None:
        record = {"compiled": is_compiled, "machine": machine.describe(), "picks": rows}
        out.write_text(json.dumps(record, indent=2) + "\n")
        print(f"wrote {out}")
    return 1 if missed else 0
