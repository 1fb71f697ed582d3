"""The past of pools over the admin API."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from admin_rig import BEARER

from autoscaler.settings import PoolSettings
from autoscaler.signals.history import HistoryStore
from autoscaler.signals.series import SERIES, PoolMinute
from gateway.admin.app import create_app
from gateway.admin.history import MOST_MINUTES, Histories
from gateway.admin.operations import MAX_BODY_BYTES, MAX_FILL_BYTES

NOW = 30_000_000
NOW_S = NOW * 60.0
CHAT = PoolSettings(name="org/chat", aliases=("chat",), engine="simulated", model="m")


class Site:
    """The API over a file."""

    def __init__(self, path: Path) -> None:
        self.store = HistoryStore(path, max_age_s=30 * 86_400.0, max_bytes=1 << 26)
        self.filled: list[str] = []
        histories = Histories(self.store, lambda: (CHAT,), lambda: NOW_S, filled=self.filled.append)
        self.app = create_app(SimpleNamespace(), histories=histories, token="t")  # type: ignore[arg-type]

    def call(self, method: str, path: str, **options: Any) -> httpx.Response:
        async def run() -> httpx.Response:
            transport = httpx.ASGITransport(app=self.app)
            async with httpx.AsyncClient(
                transport=transport,
                base_url="http://127.0.0.1:8001",
                headers={"authorization": "Bearer t"},
            ) as client:
                return await client.request(method, path, **options)

        return asyncio.run(run())

    def keep(self, *arrivals: float, pool: str = "org/chat") -> None:
        """Minutes up to now."""
        first = NOW - len(arrivals)
        self.store.record(
            [
                PoolMinute(pool=pool, minute=first + index, values={"arrivals": value})
                for index, value in enumerate(arrivals)
            ],
            NOW_S,
        )


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    made = Site(tmp_path / "history.sqlite3")
    yield made
    made.store.close()


def reason(answer: httpx.Response) -> tuple[int, str, str | None]:
    return answer.status_code, answer.json()["error"]["code"], answer.json()["error"]["param"]


def test_what_there_is(site: Site) -> None:
    assert site.call("GET", "/history").json()["pools"] == []
    site.keep(1, 2)
    found = site.call("GET", "/history").json()
    extent = {"pool": "org/chat", "from_s": NOW_S - 120, "until_s": NOW_S, "minutes": 2}
    assert found["pools"] == [extent]
    assert found["series"] == list(SERIES)
    assert found["size_bytes"] == site.store.size_bytes()


def test_a_pools_past_by_its_name_and_by_an_alias(site: Site) -> None:
    site.keep(1, 0, 5)
    site.store.record([PoolMinute(pool="org/chat", minute=NOW - 5, values={"errors": 2})], NOW_S)
    for name in ("org%2Fchat", "org/chat", "chat"):
        found = site.call("GET", f"/pools/{name}/history?series=arrivals,errors").json()
        assert found["pool"] == "org/chat"
        assert (found["start_s"], found["step_s"]) == (NOW_S - 300, 60)
        assert found["series"] == {
            "arrivals": [None, None, 1, 0, 5],
            "errors": [2, None, None, None, None],
        }
    part = site.call("GET", f"/pools/chat/history?from_s={NOW_S - 120}&until_s={NOW_S - 60}")
    assert part.json()["series"]["arrivals"] == [0]
    assert set(part.json()["series"]) == set(SERIES)


def test_a_pool_that_is_gone_has_its_past_and_one_that_never_was_has_none(site: Site) -> None:
    site.keep(4, pool="old")
    assert site.call("GET", "/pools/old/history").json()["series"]["arrivals"] == [4]
    assert site.call("GET", "/pools/chat/history").json()["series"]["arrivals"] == []
    assert reason(site.call("GET", "/pools/new/history")) == (404, "pool_not_found", "pool")
    body = {"start_s": NOW_S - 60, "series": {"arrivals": [1]}}
    assert reason(site.call("POST", "/pools/old/history", json=body))[:2] == (404, "pool_not_found")


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("series=sales", "series"),
        ("series=", "series"),
        ("from_s=yesterday", "from_s"),
        ("from_s=nan", "from_s"),
        ("until_s=inf", "until_s"),
        (f"until_s={NOW_S + MOST_MINUTES * 60}", "until_s"),
    ],
)
def test_what_cannot_be_asked(site: Site, query: str, param: str) -> None:
    site.keep(1)
    assert reason(site.call("GET", f"/pools/chat/history?{query}")) == (400, "bad_value", param)


def test_what_is_unknown_is_filled(site: Site) -> None:
    site.keep(1, 2)
    body = {
        "start_s": NOW_S - 180,
        "series": {"arrivals": [7, 8, None, 9], "errors": [None, 1, None, None]},
    }
    answer = site.call("POST", "/pools/chat/history", json=body)
    assert answer.json() == {"pool": "org/chat", "minutes": 2}  # the minute of now has not passed
    found = site.call("GET", "/pools/chat/history?series=arrivals,errors").json()["series"]
    assert found == {"arrivals": [7, 1, 2], "errors": [None, 1, None]}
    assert site.filled == ["org/chat"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"start_s": 0, "series": {"sales": [1]}}, "series"),
        ({"start_s": 0, "series": {"arrivals": [1], "errors": [1, 2]}}, "series"),
        ({"start_s": 61, "series": {}}, "start_s"),
        ({"start_s": -60, "series": {}}, "start_s"),
        ({"start_s": 1e300, "series": {}}, "start_s"),
        ({"start_s": 0, "series": {"arrivals": ["many"]}}, "series.arrivals.0"),
        ({"start_s": 0, "series": {"arrivals": [None, -1]}}, "series.arrivals.1"),
    ],
)
def test_what_cannot_be_filled(site: Site, body: object, param: str) -> None:
    answer = site.call("POST", "/pools/chat/history", json=body)
    assert reason(answer) == (400, "bad_value", param)
    assert site.store.extents() == []


def test_half_a_day_of_every_series_fits_and_much_more_does_not(site: Site) -> None:
    body = {"start_s": NOW_S - 720 * 60, "series": {name: [12345.678901] * 720 for name in SERIES}}
    answer = site.call("POST", "/pools/chat/history", json=body)
    assert answer.json() == {"pool": "org/chat", "minutes": 720}
    assert len(answer.request.content) > MAX_BODY_BYTES
    answer = site.call("POST", "/pools/chat/history", content=b" " * (MAX_FILL_BYTES + 1),
                       headers={"content-type": "application/json"})  # fmt: skip
    assert answer.status_code == 413


def test_a_file_that_cannot_be_had_is_an_error_of_its_own(site: Site, tmp_path: Path) -> None:
    site.store.path = tmp_path / "not there" / "history.sqlite3"
    for method, path in (("GET", "/history"), ("GET", "/pools/chat/history")):
        assert reason(site.call(method, path))[:2] == (500, "history_failed")
    body = {"start_s": NOW_S - 60, "series": {"arrivals": [1]}}
    answer = site.call("POST", "/pools/chat/history", json=body)
    assert reason(answer)[:2] == (500, "history_failed")


def test_the_token_is_wanted(site: Site) -> None:
    answer = site.call("GET", "/history", headers={**BEARER})
    assert answer.status_code == 401
