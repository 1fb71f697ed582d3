"""Where one contender's CPU goes: sampled stacks of its data path under each load.

Python contenders are sampled with py-spy (``pip install py-spy``), which reads the process without
stopping it. A sample is booked on the Python function that runs, with the system calls and C code
that it called: for the kernel's share use ``perf``.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

from bench import contenders, datapath, procs, scenarios

SAMPLE_S = 4
RATE_HZ = 1000

_LINE = re.compile(r":\d+\)$")


def _py_spy() -> str | None:
    beside = Path(sys.executable).with_name("py-spy")
    return str(beside) if beside.exists() else shutil.which("py-spy")


def shares(folded: str) -> tuple[Counter[str], Counter[str], int]:
    """Folded stacks (``a;b;c 12`` a line) to samples by function, samples by any function on the
    stack, and all."""
    leaf: Counter[str] = Counter()
    within: Counter[str] = Counter()
    total = 0
    for line in folded.splitlines():
        stack, _, count = line.rpartition(" ")
        if not stack or not count.isdigit():
            continue
        frames = [_LINE.sub(")", frame.strip()) for frame in stack.split(";")]
        leaf[frames[-1]] += int(count)
        for frame in set(frames):
            within[frame] += int(count)
        total += int(count)
    return leaf, within, total


def _show(title: str, folded: str) -> str:
    leaf, within, total = shares(folded)
    lines = [f"== {title}: {total} samples", "   self  frame"]
    lines += [f"{count / total:7.1%}  {frame}" for frame, count in leaf.most_common(25)]
    lines += [" within  frame (itself and what it calls)"]
    lines += [f"{count / total:7.1%}  {frame}" for frame, count in within.most_common(40)]
    return "\n".join(lines) + "\n"


def run(name: str, options: datapath.Options, folder: Path) -> int:
    """Profile ``name`` under every scenario of the rounds; prints shares, writes folded stacks."""
    spy = _py_spy()
    if spy is None or name not in contenders.CONTENDERS:
        known = ", ".join(contenders.CONTENDERS)
        print(f"needs py-spy (pip install py-spy) and one of: {known}", file=sys.stderr)
        return 2
    folder.mkdir(parents=True, exist_ok=True)
    wanted = options.scenarios or tuple(s.name for s in scenarios.ROUNDS)
    with datapath.opened(options) as (bench, _):
        (target,) = contenders.start_all([name], bench.place)
        with procs.stopping(target.child):
            for scenario in scenarios.ROUNDS:
                if scenario.name not in wanted:
                    continue
                output = folder / f"profile-{name}-{scenario.name}.folded"
                argv = [spy, "record", "--pid", str(target.data_pids[0]), "--format", "raw",
                        "--duration", str(SAMPLE_S), "--rate", str(RATE_HZ), "--nonblocking",
                        "--output", str(output)]  # fmt: skip
                sampler = subprocess.Popen(
                    argv, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
                )
                scale = (SAMPLE_S + 1) / scenario.window_s
                bench.load(scenario.shape.name, target, scenario.arguments(scale))
                _, problem = sampler.communicate(timeout=60)
                if sampler.returncode != 0:
                    print(f"py-spy: {problem.strip()}", file=sys.stderr)
                    return 1
                print(_show(scenario.title, output.read_text()))
    return 0
