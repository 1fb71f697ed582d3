"""What is asked of a Prometheus, and what its answers mean; against one made of functions."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

import httpx
import pytest

from autoscaler.signals.backfill import queries
from autoscaler.signals.backfill.prometheus import (
    MOST_POINTS,
    TRIES,
    Prometheus,
    PrometheusError,
    increases,
)
from autoscaler.signals.backfill.queries import Query, make_queries
from autoscaler.signals.series import SERIES

FIRST = 29_000_000

NAN = math.nan


@pytest.mark.parametrize(
    ("name", "counters", "expected"),
    [
        ("none", [], {}),
        ("one value is no increase", [[5]], {}),
        ("steady", [[0, 5, 5, 9]], {0: 5, 1: 0, 2: 4}),
        ("two together", [[0, 5, 9], [1, 1, 2]], {0: 5, 1: 5}),
        ("begins again", [[7, 9, 3, 4]], {0: 2, 1: 3, 2: 1}),
        ("was not scraped for a while", [[0, 1, 2, NAN, NAN, 8, 9]], {0: 1, 5: 1}),
        ("nor was one of two", [[0, 1, 2, NAN, 8, 9], [0, 0, 1, 1, 1, 2]], {0: 1, 4: 2}),
        ("ended and began again", [[5, 6, NAN, NAN, 2, 3]], {0: 1, 4: 1}),
        ("so did one of two", [[5, 6, NAN, NAN, 2, 3], [0] * 6], {0: 1, 1: 0, 2: 0, 3: 0, 4: 1}),
        ("one ends, one comes", [[0, 1, 3, NAN], [NAN, NAN, 50, 55]], {0: 1, 1: 2, 2: 5}),
    ],
)  # fmt: skip
def test_increases(name: str, counters: list[list[float]], expected: dict[int, float]) -> None:
    given = [
        {at: value for at, value in enumerate(values) if not math.isnan(value)}
        for values in counters
    ]
    assert increases(given) == expected


class Server:
    """Answers range queries by functions of the minute, by a part of the query."""

    def __init__(self, **series: Callable[[int], float | None]) -> None:
        self.series = series
        self.asked: list[Mapping[str, str]] = []
        self.refuses: list[tuple[int, str]] = []
        """Statuses and errors of the next answers."""
        self.most = MOST_POINTS
        self.slept: list[float] = []
        self.headers: httpx.Headers | None = None

    def __call__(self, request: httpx.Request) -> httpx.Response:
        assert request.url.path == "/prom/api/v1/query_range"
        self.headers = request.headers
        given = dict(request.url.params)
        self.asked.append(given)
        start, end, step = (int(given[name]) for name in ("start", "end", "step"))
        assert (start % 60, end % 60, step) == (0, 0, 60)
        if self.refuses:
            status, error = self.refuses.pop(0)
            if status == 0:
                raise httpx.ConnectError(error)
            return httpx.Response(status, json={"status": "error", "error": error})
        points = (end - start) // 60 + 1
        assert points <= MOST_POINTS
        if points > self.most:
            error = "query processing would load too many samples into memory"
            return httpx.Response(422, json={"status": "error", "error": error})
        result: list[dict[str, Any]] = []
        for name, function in self.series.items():
            if name in given["query"]:
                values = [(at * 60, function(at)) for at in range(start // 60, end // 60 + 1)]
                shown = [[float(at_s), str(value)] for at_s, value in values if value is not None]
                if shown:
                    result.append({"metric": {"__name__": name}, "values": shown})
        body = {"status": "success", "data": {"resultType": "matrix", "result": result}}
        return httpx.Response(200, content=json.dumps(body))

    def client(self, **given: Any) -> Prometheus:
        return Prometheus(
            "http://prom.example/prom/",
            transport=httpx.MockTransport(self),
            sleep=self.slept.append,
            **given,
        )


def test_counters_and_expressions_become_minutes() -> None:
    server = Server(
        tidegate_arrivals_total=lambda at: 100.0 + 7 * (at - FIRST),
        tidegate_queued_requests=lambda at: float(at - FIRST) if at != FIRST + 3 else math.nan,
    )
    found = server.client().read(make_queries("tidegate", "chat"), FIRST, FIRST + 5)
    assert found["arrivals"] == {FIRST + n: 7.0 for n in range(5)}
    assert found["queued_requests"] == {FIRST + n: n + 1 for n in (0, 1, 3, 4)}
    assert set(found) == {"arrivals", "queued_requests"}
    assert {'pool="chat"' in one["query"] for one in server.asked} == {True}


def test_long_ranges_are_asked_in_parts_and_lose_nothing_between_them() -> None:
    server = Server(x=lambda at: 3.0 * at)
    minutes = 25_000
    points = server.client().find([Query(text="x", counter=True)], FIRST, FIRST + minutes)
    assert points == {FIRST + n: 3.0 for n in range(minutes)}
    assert len(server.asked) == 3


def test_a_query_that_is_too_much_is_halved() -> None:
    server = Server(x=lambda at: 3.0 * at)
    server.most = 400
    points = server.client().find([Query(text="x", counter=True)], FIRST, FIRST + 2_000)
    assert points == {FIRST + n: 3.0 for n in range(2_000)}
    server.most = 10
    with pytest.raises(PrometheusError, match="too many samples"):
        server.client().find([Query(text="x", counter=True)], FIRST, FIRST + 2_000)


def test_what_passes_is_tried_again_a_few_times() -> None:
    server = Server(x=lambda at: 1.0)
    server.refuses = [(503, "starting"), (0, "refused"), (500, "oops")]
    query = [Query(text="x")]
    assert server.client().find(query, FIRST, FIRST + 1) == {FIRST: 1.0}
    assert server.slept == [1.0, 2.0, 4.0]
    server.refuses = [(503, "starting")] * TRIES
    with pytest.raises(PrometheusError, match=r"http://prom.example/prom: .*503: starting"):
        server.client().find(query, FIRST, FIRST + 1)


def test_what_does_not_pass_is_not_tried_again() -> None:
    server = Server()
    server.refuses = [(400, "parse error")]
    with pytest.raises(PrometheusError, match=r"parse error \(asked for sum\(\)"):
        server.client().find([Query(text="sum(")], FIRST, FIRST + 1)
    assert server.slept == []


def test_the_first_query_that_finds_anything_counts() -> None:
    server = Server(**{"vllm:request_success_total": lambda at: float(at)})
    client = server.client()
    found = client.read(make_queries("vllm", 'a"b'), FIRST, FIRST + 2)
    assert found["arrivals"] == {FIRST: 1.0, FIRST + 1: 1.0}
    assert r'model_name="a\"b"' in server.asked[0]["query"]


def test_an_expression_must_give_one_series() -> None:
    server = Server(a=lambda at: 1.0, b=lambda at: 1.0)
    with pytest.raises(PrometheusError, match="'a or b' gives 2 time series"):
        server.client().find([Query(text="a or b")], FIRST, FIRST + 1)


def test_who_asks_is_said_and_is_in_no_message() -> None:
    server = Server()
    client = server.client(token="t0ken", headers={"X-Scope-OrgID": "team"})
    client.find([Query(text="x")], FIRST, FIRST + 1)
    assert server.headers is not None
    assert server.headers["authorization"] == "Bearer t0ken"
    assert server.headers["x-scope-orgid"] == "team"
    with pytest.raises(PrometheusError) as caught:
        Prometheus("https://u:secret@127.0.0.1:1", sleep=lambda s: None).find(
            [Query(text="x")], FIRST, FIRST + 1
        )
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("url", ["prom:9090", "ftp://x", "http://", ""])
def test_what_is_no_url_of_a_server(url: str) -> None:
    with pytest.raises(PrometheusError, match="no URL"):
        Prometheus(url)


def test_an_answer_of_another_kind_is_said() -> None:
    transport = httpx.MockTransport(lambda request: httpx.Response(200, text="<html>hello"))
    client = Prometheus("http://x", transport=transport, sleep=lambda s: None)
    with pytest.raises(PrometheusError, match="not as a Prometheus does"):
        client.find([Query(text="x")], FIRST, FIRST + 1)


@pytest.mark.parametrize("preset", queries.PRESETS)
def test_presets_have_series_that_there_are(preset: str) -> None:
    made = make_queries(preset, "p", match='job="x"', own={"errors": "my_errors"})
    assert set(made) <= set(SERIES)
    assert made["errors"] == (Query(text="my_errors"),)
    texts = [one.text for candidates in made.values() for one in candidates]
    assert all('{job="x"' in text for text in texts if text != "my_errors")
    assert all(text.count("{") == text.count("}") for text in texts)
    assert set(make_queries(None, "p", own={"arrivals": "x"})) == {"arrivals"}
