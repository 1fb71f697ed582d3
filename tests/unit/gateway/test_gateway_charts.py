"""Charts: well-formed, complete, and nothing that a name could break out of."""

from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import pytest

from gateway import charts

SVG = "{http://www.w3.org/2000/svg}"


def line(values: list[float], **fields: object) -> charts.Line:
    return charts.Line(name="demand", values=values, colour="#123456", **fields)  # type: ignore[arg-type]


def draw(*series: charts.Line | charts.Band, unit: str = "") -> ElementTree.Element:
    panel = charts.Panel(title="replicas", series=series, unit=unit)
    return ElementTree.fromstring(charts.over_time([panel], step_s=60.0, title="a < b & c"))


def paths_of(root: ElementTree.Element, colour: str) -> list[str]:
    return [one.get("d", "") for one in root.iter(f"{SVG}path") if one.get("stroke") == colour]


def test_a_line_has_a_point_for_each_value_and_a_gap_for_nan() -> None:
    (path,) = paths_of(draw(line([1.0, 2.0, math.nan, 4.0])), "#123456")
    assert path.count("M") == 2
    assert len(re.findall(r"[\d.]+ [\d.]+", path)) == 3


def test_steps_hold_their_value_until_the_next() -> None:
    (path,) = paths_of(draw(line([1.0, 2.0], steps=True)), "#123456")
    points = [tuple(map(float, one.split())) for one in path[1:].split("L")]
    assert [y for _, y in points] == [points[0][1], points[0][1], points[2][1], points[2][1]]
    assert points[1][0] == points[2][0]


def test_a_long_line_keeps_its_peak() -> None:
    values = [1.0] * 50_000
    values[31_234] = 100.0
    (path,) = paths_of(draw(line(values)), "#123456")
    ys = [float(one.split()[1]) for one in path[1:].split("L")]
    assert len(ys) < 3_000
    assert min(ys) < sorted(ys)[1]


def test_a_band_is_closed_and_named() -> None:
    band = charts.Band(
        name="forecast", low=[1.0, math.nan, 2.0], high=[2.0, 3.0, 4.0], colour="#abcdef"
    )
    root = draw(band, line([1.0, 2.0, 3.0]), unit="tokens/s")
    filled = [one for one in root.iter(f"{SVG}path") if one.get("fill") == "#abcdef"]
    assert filled[0].get("d", "").endswith("Z")
    texts = {one.text for one in root.iter(f"{SVG}text")}
    assert {"forecast", "demand", "replicas (tokens/s)", "a < b & c"} <= texts


def test_empty_and_flat_series_are_drawn_too() -> None:
    for values in ([], [0.0, 0.0], [math.nan]):
        assert draw(line(values)).tag == f"{SVG}svg"


def test_a_scatter_has_each_dot_and_joins_the_strong_ones() -> None:
    dots = [
        charts.Dot(name="<hpa>", x=10.0, y=2.0, colour="#111111"),
        charts.Dot(name="ours", x=9.0, y=0.0, colour="#222222", strong=True),
        charts.Dot(name="oracle", x=5.0, y=0.5, colour="#333333", strong=True),
    ]
    root = ElementTree.fromstring(charts.scatter(dots, title="t", x_name="x", y_name="y"))
    assert len(list(root.iter(f"{SVG}circle"))) == 3
    assert len([one for one in root.iter(f"{SVG}path") if one.get("stroke-dasharray")]) == 1


def test_dots_that_are_close_have_their_names_apart_within_the_picture() -> None:
    names = [f"policy-{number}" for number in range(6)]
    for x, y in ((10.0, 100.0), (0.1, 0.001)):
        dots = [charts.Dot(name=name, x=x, y=y, colour="#111111") for name in names]
        root = ElementTree.fromstring(charts.scatter(dots, title="t", x_name="x", y_name="y"))
        words = [one for one in root.iter(f"{SVG}text") if one.text in names]
        places = [(float(one.get("x", "")), float(one.get("y", ""))) for one in words]
        assert len(places) == 6
        for place, (left, top) in enumerate(places):
            assert 0 <= left <= charts.WIDTH - 60
            assert 10 <= top <= float(root.get("height", ""))
            for other, line in places[:place]:
                assert abs(left - other) > 60 or abs(top - line) >= 11


def test_pictures_are_stacked_and_a_page_needs_no_network() -> None:
    picture = charts.scatter([], title="t", x_name="x", y_name="y")
    root = ElementTree.fromstring(charts.stacked([picture, picture]))
    inner = root.findall(f"{SVG}svg")
    assert [one.get("y") for one in inner] == ["0", inner[0].get("height")]
    page = charts.page("<t>", [("one", picture), ("two", charts.html_table(["a"], [["<b>"]]))])
    assert "<b>" not in page
    assert not re.search(r"(src|href)=|@import|<script", page)


@pytest.mark.parametrize(
    ("value", "expected"),
    [(0.0, 1.0), (0.9, 1.0), (1.2, 2.0), (2.2, 2.5), (31.0, 50.0), (700, 1000)],
)
def test_axes_end_on_a_round_number(value: float, expected: float) -> None:
    assert charts.nice_ceiling(value) == pytest.approx(expected)
