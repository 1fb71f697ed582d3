"""What a benchmark ran on."""

from __future__ import annotations

import os
import platform
import re
import resource
import time
from pathlib import Path
from typing import Any


def _field(text: str, name: str) -> str | None:
    found = re.search(rf"^{re.escape(name)}\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1].strip() if found else None


def describe() -> dict[str, Any]:
    """Hardware, kernel and Python; ``None`` where the system does not say."""
    cpuinfo, meminfo = (Path(f"/proc/{name}").read_text() for name in ("cpuinfo", "meminfo"))
    memory = _field(meminfo, "MemTotal")
    return {
        "cpu": _field(cpuinfo, "model name") or platform.processor() or None,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(int(memory.split()[0]) / 2**20, 1) if memory else None,
        "virtual": "hypervisor" in (_field(cpuinfo, "flags") or "").split(),
        "kernel": platform.release(),
        "python": platform.python_version(),
    }


def _own_cpu_s() -> float:
    """CPU of this process and of every process it started that has ended."""
    kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    used = [resource.getrusage(kind) for kind in kinds]
    return sum(one.ru_utime + one.ru_stime for one in used)


def counters() -> dict[str, float]:
    """To difference over a run: seconds busy, stolen by the host, our own, and the clock."""
    fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    tick_s = 1 / os.sysconf("SC_CLK_TCK")
    user, nice, system, _idle, _iowait, irq, softirq, steal = (int(f) for f in fields[:8])
    return {
        "busy_s": (user + nice + system + irq + softirq) * tick_s,
        "stolen_s": steal * tick_s,
        "own_s": _own_cpu_s(),
        "waited_s": _waited_s(),
        "at_s": time.monotonic(),
    }


def noise(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    """How much else the machine did between two :func:`counters`: a run's trustworthiness."""
    passed = {name: after[name] - before[name] for name in before}
    other_s = max(0.0, passed["busy_s"] - passed["own_s"])
    return {
        "other_busy_fraction": round(other_s / max(passed["at_s"], 1e-9), 3),
        "stolen_s": round(passed["stolen_s"], 2),
    }


def load(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    """How busy the machine was between two :func:`counters`, by any process: cores in use, and how
    much of the time something waited for a core."""
    passed = {name: after[name] - before[name] for name in before}
    time_s = max(passed["at_s"], 1e-9)
    return {
        "busy_fraction": round(passed["busy_s"] / time_s, 3),
        "pressure_fraction": round(passed["waited_s"] / time_s, 3),
    }


def _waited_s() -> float:
    """Seconds in which something that could run did not; 0 where the kernel does not count."""
    try:
        found = re.search(r"^some .*total=(\d+)", Path("/proc/pressure/cpu").read_text())
    except OSError:
        return 0.0
    return int(found[1]) / 1e6 if found else 0.0
