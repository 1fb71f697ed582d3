"""The GPUs of a node out of the page of its DCGM exporter. Pure."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from autoscaler.signals.gpus.figures import GPU_FIGURES, MAX_GPUS, MIB, XIDS_KEPT, throttle_reasons
from autoscaler.types import GpuCapacity, GpuReading, XidEvent
from loaders.engines.prometheus_text import MetricsPage, lines_named

MAX_XID = 999
_LAST_XID = "DCGM_FI_DEV_XID_ERRORS"
"""The newest error of a GPU, until there is another: no count, and no time."""
_REASONS = ("DCGM_FI_DEV_CLOCKS_EVENT_REASONS", "DCGM_FI_DEV_CLOCK_THROTTLE_REASONS")
_FREE = "DCGM_FI_DEV_FB_FREE"
_WANTED = lines_named(
    {_LAST_XID, *_REASONS, _FREE} | {name for figure in GPU_FIGURES for name in figure.dcgm}
)
_BLANKS = frozenset(float(blank + n) for blank in (2147483632, 140737488355328) for n in range(8))
"""What DCGM says for "not known", "not supported" and the like."""


@dataclass(slots=True)
class DcgmXids:
    """The errors that were seen of one GPU, over several pages."""

    last: int = 0
    events: deque[XidEvent] = field(default_factory=lambda: deque(maxlen=XIDS_KEPT))
    counts: Counter[int] = field(default_factory=Counter)

    def see(self, xid: int, now_s: float) -> None:
        """Take in what a page has as the newest error; 0 is none."""
        if 0 < xid <= MAX_XID and xid != self.last:
            self.events.append(XidEvent(xid=xid, at_s=now_s))
            self.counts[xid] += 1
        self.last = xid


def read_dcgm(
    body: bytes, xids: dict[str, DcgmXids], now_s: float
) -> tuple[GpuReading, ...] | None:
    """The GPUs on a page, by their index; ``None`` where it has none, or was cut short. ``xids`` is
    what is kept from page to page, by UUID. Figures of parts of a GPU (MIG) are left out."""
    try:
        page = MetricsPage(body, _WANTED)
    except ValueError:
        return None
    values: dict[str, dict[str, float]] = {}
    labels: dict[str, Mapping[str, str]] = {}
    for name in page.names():
        for found, value in page.samples(name):
            index = found.get("gpu", "")
            if not index.isdecimal() or int(index) >= MAX_GPUS or found.get("GPU_I_ID"):
                continue
            if value not in _BLANKS:
                values.setdefault(index, {}).setdefault(name, value)
                labels.setdefault(index, found)
    gpus = [
        _read_gpu(int(index), labels[index], values[index], xids, now_s)
        for index in sorted(values, key=int)
    ]
    return tuple(gpus) or None


def _read_gpu(
    index: int,
    labels: Mapping[str, str],
    values: Mapping[str, float],
    xids: dict[str, DcgmXids],
    now_s: float,
) -> GpuReading:
    figures = {}
    for figure in GPU_FIGURES:
        for name in figure.dcgm:
            if name in values:
                figures[figure.name] = values[name] * figure.dcgm_scale
                break
    parts = [figures.get(f"memory_{one}_bytes") for one in ("used", "free")]
    if "memory_total_bytes" not in figures and None not in parts:
        reserved = figures.get("memory_reserved_bytes", 0.0)
        figures["memory_total_bytes"] = sum(one or 0.0 for one in parts) + reserved
    total, free = figures.get("memory_total_bytes"), values.get(_FREE)
    uuid = labels.get("UUID", "")
    seen = xids.setdefault(uuid or str(index), DcgmXids())
    if _LAST_XID in values:
        seen.see(round(values[_LAST_XID]), now_s)
    reasons = next((values[name] for name in _REASONS if name in values), None)
    return GpuReading(
        gpu=GpuCapacity(
            index=index,
            memory_bytes=None if total is None else round(total),
            name=labels.get("modelName", ""),
            free_bytes=None if free is None else round(free * MIB),
            driver=labels.get("DCGM_FI_DRIVER_VERSION", ""),
            uuid=uuid,
        ),
        figures=figures,
        throttle_reasons=None if reasons is None else throttle_reasons(round(reasons)),
        xids=tuple(seen.events),
        xid_counts=dict(seen.counts),
    )
