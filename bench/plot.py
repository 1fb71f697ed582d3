"""The report's picture: one panel of bars per scenario, as plain SVG."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from xml.sax.saxutils import escape

from bench import contenders, scenarios

_PANEL_PX, _ROW_PX, _LABEL_PX, _BAR_PX = 620, 20, 190, 330
_COLOURS = {"tidegate": "#0b7a75", "nginx": "#8a8f98"}
_PEER_COLOUR = "#c9a227"


def _panel(title: str, rows: Mapping[str, Mapping[str, float]], top_px: int) -> list[str]:
    longest = max(row["median"] for row in rows.values())
    parts = [f'<text x="0" y="{top_px}" class="t">{escape(title)}</text>']
    for index, (name, row) in enumerate(sorted(rows.items(), key=lambda item: item[1]["median"])):
        y = top_px + 10 + index * _ROW_PX
        width, low, high = (row[k] / longest * _BAR_PX for k in ("median", "low", "high"))
        known = contenders.CONTENDERS.get(name)
        colour = _COLOURS.get(name, _PEER_COLOUR)
        label = escape(known.title if known else name)
        middle = y + 7
        parts += [
            f'<text x="{_LABEL_PX - 8}" y="{y + 11}" class="l">{label}</text>',
            f'<rect x="{_LABEL_PX}" y="{y}" width="{width:.1f}" height="14" fill="{colour}"/>',
            f'<path d="M{_LABEL_PX + low:.1f} {middle}H{_LABEL_PX + high:.1f}" class="w"/>',
            f'<text x="{_LABEL_PX + max(width, high) + 6:.1f}" y="{y + 11}">'
            f"{row['median']:,.1f}</text>",
        ]
    return parts


def svg(made: Mapping[str, Any]) -> str:
    """CPU milliseconds per 1,000 requests (or chunks); shorter is cheaper; whiskers: the rounds."""
    parts: list[str] = []
    top_px = 24
    for scenario in scenarios.ROUNDS:
        rows = {
            name: row["cpu_ms_per_1000"]
            for name, row in made["figures"].get(scenario.name, {}).items()
            if row["cpu_ms_per_1000"]
        }
        if rows and scenario.name != "latency":
            title = f"{scenario.title}: CPU ms per 1,000 {scenario.unit}s"
            parts += _panel(title, rows, top_px)
            top_px += len(rows) * _ROW_PX + 40
    style = (
        "text{font:12px sans-serif;fill:#222}.t{font-weight:600}.l{text-anchor:end}"
        ".w{stroke:#222;stroke-width:1.5}"
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_PANEL_PX}" height="{top_px}" '
        f'viewBox="-10 0 {_PANEL_PX + 20} {top_px}" role="img" '
        f'aria-label="CPU per unit of work, by contender"><style>{style}</style>'
        f'<rect x="-10" width="{_PANEL_PX + 20}" height="{top_px}" fill="#fff"/>'
        + "".join(parts)
        + "</svg>\n"
    )
