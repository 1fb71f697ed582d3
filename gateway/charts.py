"""Charts as plain SVG, and a page of them that works offline: no script, no font, no network.

Panels stand below each other over one x axis. Pure: numbers in, text out. Lines of more points than
pixels are drawn by the least and the largest value of each pixel, so that no peak is lost.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

WIDTH, LEFT, RIGHT, TOP, GAP, BOTTOM = 960, 64, 16, 40, 34, 36
COLOURS = ("#0b7a75", "#c9a227", "#a23b72", "#3d5a80", "#e07a5f", "#6a994e", "#8a8f98", "#5e548e")
INK, GRID = "#222", "#e4e4e4"
TICKS = 5
LETTER = 7.2
"""The width of one, at most in the mean."""
STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#222}.t{font-weight:600}.e{text-anchor:end}"
    ".m{text-anchor:middle}.n{fill:#666}"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """Values over x; NaN is a gap. ``steps`` holds each value until the next."""

    name: str
    values: Sequence[float]
    colour: str
    steps: bool = False
    filled: bool = False
    """Also fill the area below it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Band:
    """The area between two rows of values."""

    name: str
    low: Sequence[float]
    high: Sequence[float]
    colour: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """One plot of values over the same x."""

    title: str
    series: Sequence[Line | Band]
    unit: str = ""
    height: int = 180


@dataclass(frozen=True, slots=True, kw_only=True)
class Dot:
    """A named point of a scatter plot; ``strong`` ones are joined by a line."""

    name: str
    x: float
    y: float
    colour: str
    strong: bool = False


def over_time(
    panels: Sequence[Panel],
    *,
    step_s: float,
    title: str = "",
    label: Callable[[float], str] | None = None,
) -> str:
    """Panels over the time since the first value, ``step_s`` between two; the SVG.

    ``label`` names a moment (seconds since the first value); without it days and hours are counted.
    """
    count = max(len(s.values if isinstance(s, Line) else s.low) for p in panels for s in p.series)
    length_s = max(1, count) * step_s
    parts: list[str] = []
    y = TOP if title else 20
    if title:
        parts.append(f'<text x="{LEFT}" y="18" class="t">{escape(title)}</text>')
    plot_width = WIDTH - LEFT - RIGHT
    for panel in panels:
        parts += panel_parts(panel, y, plot_width, count)
        y += panel.height + GAP
    bottom = y - GAP
    free = 0.0  # from where on there is room for a label
    for at_s in time_ticks(length_s):
        x, text = LEFT + at_s / length_s * plot_width, (label or since)(at_s)
        side, half = ("m", LETTER * len(text) / 2) if x < WIDTH - 40 else ("e", LETTER * len(text))
        parts.append(
            f'<path d="M{x:.1f} {TOP if title else 20}V{bottom}" stroke="{GRID}" fill="none"/>'
        )
        if x - half >= free:
            free = x + half
            parts.append(
                f'<text x="{x:.1f}" y="{bottom + 16}" class="{side} n">{escape(text)}</text>'
            )
    return wrap("".join(parts), WIDTH, bottom + BOTTOM, title or panels[0].title)


def panel_parts(panel: Panel, top: int, width: int, count: int) -> list[str]:
    """One panel, with its grid, its series and their names."""
    known = [
        value
        for s in panel.series
        for value in ([*s.low, *s.high] if isinstance(s, Band) else s.values)
        if math.isfinite(value)
    ]
    most = nice_ceiling(max(known, default=1.0))
    parts = []
    for tick in range(TICKS + 1):
        value = most * tick / TICKS
        y = top + panel.height * (1 - tick / TICKS)
        parts.append(
            f'<path d="M{LEFT} {y:.1f}h{width}" stroke="{GRID}" fill="none"/>'
            f'<text x="{LEFT - 6}" y="{y + 4:.1f}" class="e n">{number(value)}</text>'
        )
    heading = f"{panel.title} ({panel.unit})" if panel.unit else panel.title
    parts.append(f'<text x="{LEFT}" y="{top - 8}" class="n">{escape(heading)}</text>')

    def place(index: float, value: float) -> str:
        y = top + panel.height * (1 - min(max(value, 0.0), most) / most)
        return f"{LEFT + index / max(1, count) * width:.1f} {y:.1f}"

    x = LEFT + width
    for series in reversed(panel.series):
        x -= 24 + round(LETTER * len(series.name))
        parts.append(
            f'<rect x="{x}" y="{top - 17}" width="12" height="10" fill="{series.colour}"'
            f"{OPACITY if isinstance(series, Band) else ''}/>"
            f'<text x="{x + 16}" y="{top - 8}">{escape(series.name)}</text>'
        )
    for series in panel.series:
        parts.append(drawn(series, place, width))
    return parts


OPACITY = ' fill-opacity="0.25"'


def drawn(series: Line | Band, place: Callable[[float, float], str], width: int) -> str:
    """The path of one series."""
    if isinstance(series, Band):
        upper = thinned(series.high, width, max)
        lower = thinned(series.low, width, min)
        ring = [place(i + 0.5, v) for i, v in upper] + [place(i + 0.5, v) for i, v in lower[::-1]]
        if not ring:
            return ""
        return f'<path d="M{"L".join(ring)}Z" fill="{series.colour}"{OPACITY}/>'
    paths: list[str] = []
    points: list[str] = []
    before: float | None = None
    for index, value in peaks(series.values, width):
        if not math.isfinite(value):
            if points:
                paths.append("M" + "L".join(points))
            points, before = [], None
            continue
        if series.steps and before is not None:
            points.append(place(index, before))
        points.append(place(index if series.steps else index + 0.5, value))
        before = value
    if points:
        if series.steps and before is not None:
            points.append(place(len(series.values), before))
        paths.append("M" + "L".join(points))
    line = f'<path d="{"".join(paths)}" fill="none" stroke="{series.colour}" stroke-width="1.5"/>'
    if not series.filled or not paths:
        return line
    areas = "".join(f"{path}V{place(0, 0.0).split()[1]}H{path[1:].split()[0]}Z" for path in paths)
    return f'<path d="{areas}" fill="{series.colour}"{OPACITY}/>{line}'


def peaks(values: Sequence[float], width: int) -> list[tuple[float, float]]:
    """Index and value, all of them, or the least and the largest of each pixel in their order."""
    if len(values) <= 2 * width:
        return [(float(index), value) for index, value in enumerate(values)]
    result: list[tuple[float, float]] = []
    for pixel in range(width):
        first, last = pixel * len(values) // width, (pixel + 1) * len(values) // width
        known = [(i, values[i]) for i in range(first, last) if math.isfinite(values[i])]
        if not known:
            result.append((float(first), math.nan))
            continue
        pair = {min(known, key=lambda one: one[1]), max(known, key=lambda one: one[1])}
        result += [(float(i), value) for i, value in sorted(pair)]
    return result


def thinned(
    values: Sequence[float], width: int, of: Callable[[list[float]], float]
) -> list[tuple[float, float]]:
    """Index and value, or one of each pixel."""
    buckets = min(len(values), width)
    result = []
    for pixel in range(buckets):
        first, last = pixel * len(values) // buckets, (pixel + 1) * len(values) // buckets
        known = [value for value in values[first:last] if math.isfinite(value)]
        if known:
            result.append((float(first), of(known)))
    return result


def scatter(
    dots: Sequence[Dot], *, title: str, x_name: str, y_name: str, floor: float = 0.001
) -> str:
    """Dots over two axes; y is logarithmic from ``floor`` on, below which everything is at the
    bottom."""
    height, width = 380, WIDTH - LEFT - RIGHT
    most_x = nice_ceiling(max((dot.x for dot in dots), default=1.0))
    top_decade = max(0, math.ceil(math.log10(max([floor * 10, *(dot.y for dot in dots)]))))
    low_decade = round(math.log10(floor))
    parts = [f'<text x="{LEFT}" y="18" class="t">{escape(title)}</text>']

    def place(x: float, y: float) -> tuple[float, float]:
        part = (math.log10(max(y, floor)) - low_decade) / (top_decade - low_decade)
        return LEFT + x / most_x * width, TOP + height * (1 - part)

    for decade in range(low_decade, top_decade + 1):
        _, y = place(0, 10.0**decade)
        name = f"≤ {floor:g}" if decade == low_decade else f"{10.0**decade:g}"
        parts.append(
            f'<path d="M{LEFT} {y:.1f}h{width}" stroke="{GRID}" fill="none"/>'
            f'<text x="{LEFT - 6}" y="{y + 4:.1f}" class="e n">{name}</text>'
        )
    for tick in range(TICKS + 1):
        x, _ = place(most_x * tick / TICKS, floor)
        parts.append(
            f'<path d="M{x:.1f} {TOP}v{height}" stroke="{GRID}" fill="none"/>'
            f'<text x="{x:.1f}" y="{TOP + height + 16}" class="m n">'
            f"{number(most_x * tick / TICKS)}</text>"
        )
    parts.append(
        f'<text x="{LEFT + width / 2:.0f}" y="{TOP + height + 32}" class="m">'
        f"{escape(x_name)}</text>"
        f'<text x="{LEFT}" y="{TOP - 6}" class="n">{escape(y_name)}</text>'
    )
    strong = sorted(place(dot.x, dot.y) for dot in dots if dot.strong)
    if len(strong) > 1:
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in strong)
        parts.append(f'<path d="M{path}" fill="none" stroke="{INK}" stroke-dasharray="3 3"/>')
    places = [place(dot.x, dot.y) for dot in dots]
    taken = [(x - 5, y - 5, x + 5, y + 5) for x, y in places]
    for dot, (x, y) in zip(dots, places, strict=True):
        left, text_y = label_place(x, y, LETTER * len(dot.name), taken)
        taken.append((left, text_y - 10, left + LETTER * len(dot.name), text_y + 2))
        if abs(text_y - 4 - y) > 1:
            near = left - 2 if left > x else left + LETTER * len(dot.name)
            parts.append(f'<path d="M{x:.1f} {y:.1f}L{near:.1f} {text_y - 4:.1f}" stroke="#999"/>')
        parts.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{5 if dot.strong else 3.5}" '
            f'fill="{dot.colour}"><title>{escape(dot.name)}: {dot.x:,.1f}, {dot.y:.3g}</title>'
            f'</circle><text x="{left:.1f}" y="{text_y:.1f}">{escape(dot.name)}</text>'
        )
    return wrap("".join(parts), WIDTH, TOP + height + 44, title)


def label_place(
    x: float, y: float, width: float, taken: Sequence[tuple[float, float, float, float]]
) -> tuple[float, float]:
    """Where the words of a dot begin, beside it or a few lines off, over nothing that is there;
    right beside it where there is no such place."""
    for away in (0, 1, -1, 2, -2, 3, -3, 4, -4, 5, -5):
        for left in (x + 8 + 4 * abs(away), x - 8 - 4 * abs(away) - width):
            at = y + 4 + 13 * away
            inside = left >= LEFT and left + width <= WIDTH and at >= TOP
            if inside and not any(
                left < x1 and x0 < left + width and at - 10 < y1 and y0 < at + 2
                for x0, y0, x1, y1 in taken
            ):
                return left, at
    return (x + 8 if x + 8 + width <= WIDTH else x - 8 - width), y + 4


def wrap(inner: str, width: int, height: int, label: str) -> str:
    """A whole SVG, on white."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label, QUOTES)}">'
        f'<style>{STYLE}</style><rect width="{width}" height="{height}" fill="#fff"/>{inner}'
        "</svg>\n"
    )


QUOTES = {'"': "&quot;"}


def stacked(pictures: Sequence[str]) -> str:
    """Several of these SVGs below each other as one."""
    sizes = [(int(one.split('height="')[1].split('"')[0]), one) for one in pictures]
    parts, top = [], 0
    for height, picture in sizes:
        parts.append(picture.replace("<svg ", f'<svg y="{top}" ', 1))
        top += height
    return wrap("".join(parts), WIDTH, top, "charts")


def page(title: str, blocks: Sequence[tuple[str, str]]) -> str:
    """An HTML page of (heading, HTML or SVG) blocks; those after the first two are folded."""
    folded = "".join(
        f"<details{' open' if index < 2 else ''}><summary>{escape(heading)}</summary>{body}"
        "</details>\n"
        for index, (heading, body) in enumerate(blocks)
    )
    return (
        f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>{escape(title)}</title>\n'
        "<style>body{font:14px system-ui,sans-serif;margin:2em auto;max-width:1000px;color:#222}"
        "summary{font-weight:600;margin:1em 0;cursor:pointer}svg{max-width:100%;height:auto}"
        "table{border-collapse:collapse}td,th{padding:.2em .8em;text-align:right;"
        "border-bottom:1px solid #e4e4e4}td:first-child,th:first-child{text-align:left}</style>\n"
        f"<h1>{escape(title)}</h1>\n{folded}</html>\n"
    )


def html_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; the cells are text."""
    head = "".join(f"<th>{escape(one)}</th>" for one in headings)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f"<table><tr>{head}</tr>{body}</table>"


def nice_ceiling(value: float) -> float:
    """The next of 1, 2, 2.5, 5 times a power of ten."""
    if value <= 0.0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(
        step * power for step in (1.0, 2.0, 2.5, 5.0, 10.0) if step * power >= value * 0.999
    )


def number(value: float) -> str:
    """A short number for an axis."""
    return f"{value:,.0f}" if value >= 100 or value == round(value) else f"{value:.3g}"


def time_ticks(length_s: float) -> list[float]:
    """Moments to mark: at most a dozen, on round distances."""
    steps = (60, 300, 600, 1_800, 3_600, 10_800, 21_600, 43_200, 86_400, 172_800, 604_800)
    step = next((one for one in steps if length_s / one <= 12), steps[-1])
    return [float(at) for at in range(0, int(length_s) + 1, step)]


def since(at_s: float) -> str:
    """A moment as the time since the beginning."""
    minutes = round(at_s / 60)
    days, minutes = divmod(minutes, 1_440)
    clock = f"{minutes // 60}:{minutes % 60:02d}"
    return f"day {days + 1} {clock}" if days or at_s >= 86_400 else clock
