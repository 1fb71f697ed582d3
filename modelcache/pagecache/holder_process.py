"""The page keeper's process: told on standard input what to keep, tells on standard output how it
goes, and ends with whoever started it.

Each line is a JSON object. In: ``{"files": {key: [[path, start, end], ...]}}``, always everything.
Out, after each round: ``{"rounds", "pressed", "cpu_s", "keys"}`` (``Keeping.report``).
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from modelcache.pagecache import memory
from modelcache.pagecache.holding import Keeping
from modelcache.types import FileRange

RESERVE_FRACTION = 0.05
"""Of the memory: less than this available, and nothing is kept by force."""

READ_BYTES = 65_536


def main(arguments: Sequence[str]) -> int:
    """``TOUCH_S LOCK`` (0 or 1); ends with code 0 when standard input does."""
    touch_s, lock = float(arguments[0]), arguments[1] == "1"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Under a shortage of memory this is the process to end: it costs a slower start, no answer.
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
    keeping = Keeping(
        lock=lock,
        available=memory.available_bytes,
        reserve_bytes=int((memory.total_bytes() or 0) * RESERVE_FRACTION),
    )
    with suppress(BrokenPipeError):
        _serve(keeping, touch_s)
    keeping.close()
    return 0


def _serve(keeping: Keeping, touch_s: float) -> None:
    received = b""
    steps = None
    next_s = time.monotonic()
    while True:
        now_s = time.monotonic()
        wait_s = 0.0 if steps is not None else max(0.0, next_s - now_s)
        if select.select([0], [], [], wait_s)[0]:
            data = os.read(0, READ_BYTES)
            if not data:
                return
            *lines, received = (received + data).split(b"\n")
            if lines:
                # Only the newest counts: each says everything.
                keeping.want(parse(lines[-1]))
                steps, next_s = None, now_s
        if steps is None and time.monotonic() >= next_s:
            steps = keeping.round()
        if steps is not None and next(steps, StopIteration) is StopIteration:
            steps, next_s = None, time.monotonic() + touch_s
            _tell(keeping)


def parse(line: bytes) -> dict[str, list[FileRange]]:
    """What a line says is to be kept."""
    files = json.loads(line)["files"]
    return {
        key: [FileRange(path=path, start=start, end=end) for path, start, end in ranges]
        for key, ranges in files.items()
    }


def _tell(keeping: Keeping) -> None:
    told = {
        "rounds": keeping.rounds,
        "pressed": keeping.pressed,
        "cpu_s": time.process_time(),
        "keys": keeping.report(),
    }
    data = json.dumps(told).encode() + b"\n"
    while data:
        data = data[os.write(1, data) :]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
