"""Past decisions over the admin API: of a moment, around it, and scored."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from decision_rig import record

from autoscaler.settings import PoolSettings
from autoscaler.signals.decisions import DecisionRecord, put_decisions
from autoscaler.signals.history import HistoryStore
from autoscaler.types import ForecastTally, ScaleReason
from gateway.admin.app import create_app
from gateway.admin.history import Histories

NOW_S = 1_700_000_000.0
CHAT = PoolSettings(name="chat", aliases=("c",), engine="simulated", model="m")


class Site:
    """The API over a file, and over decisions that wait to be written."""

    def __init__(self, path: Path) -> None:
        self.store = HistoryStore(path, max_age_s=30 * 86_400.0, max_bytes=1 << 26)
        self.waiting: list[DecisionRecord] = []
        histories = Histories(
            self.store, lambda: (CHAT,), lambda: NOW_S, waiting=lambda pool: self.waiting
        )
        self.app = create_app(SimpleNamespace(), histories=histories, token="t")  # type: ignore[arg-type]

    def get(self, path: str, **query: Any) -> httpx.Response:
        async def run() -> httpx.Response:
            async with httpx.AsyncClient(
                transport=httpx.ASGITransport(app=self.app),
                base_url="http://127.0.0.1:8001",
                headers={"authorization": "Bearer t"},
            ) as client:
                return await client.get(path, params=query)

        return asyncio.run(run())

    def keep(self, *records: DecisionRecord) -> None:
        self.store.write([partial(put_decisions, records=records)], NOW_S)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    made = Site(tmp_path / "history.sqlite3")
    yield made
    made.store.close()


def test_the_decision_of_a_moment_and_those_around_it(site: Site) -> None:
    site.keep(*(record(NOW_S - 60 * ago, desired=ago % 8) for ago in range(30, 0, -1)))
    found = site.get("/pools/c/decisions", at_s=NOW_S - 590, limit=4).json()
    assert (found["pool"], found["at_s"]) == ("chat", NOW_S - 590)
    assert found["decision"]["first_at_s"] == NOW_S - 600
    assert found["decision"]["inputs"]["rules"] == [["stable_tokens_per_s", 2], ["forecast", 3]]
    assert found["decision"]["capacity"] == {"tokens_per_s": 200.0, "source": "saturated"}
    ago = [round((NOW_S - one["first_at_s"]) / 60) for one in found["decisions"]]
    assert ago == [11, 10, 9, 8]
    assert len(site.get("/pools/chat/decisions", at_s=NOW_S - 590).json()["decisions"]) == 19
    assert site.get("/pools/chat/decisions").json()["decision"]["first_at_s"] == NOW_S - 60


def test_one_that_lasts_holds_all_the_time(site: Site) -> None:
    site.keep(record(NOW_S - 3_600, until_s=NOW_S - 120, reason=ScaleReason.AT_ZERO))
    for ago in (3_600, 1_800, 120, 60):
        found = site.get("/pools/chat/decisions", at_s=NOW_S - ago)
        assert found.json()["decision"]["reason"] == "at_zero", ago


def test_no_decision_then_names_the_nearest(site: Site) -> None:
    site.keep(record(NOW_S - 7_200), record(NOW_S - 60))
    for ago, nearest in ((9_000, 7_200), (7_000, 7_200), (600, 60)):
        answer = site.get("/pools/chat/decisions", at_s=NOW_S - ago)
        assert answer.status_code == 404
        error = answer.json()["error"]
        assert (error["code"], error["param"]) == ("decision_not_found", "at_s")
        text = {7_200: "2023-11-14T20:13:20Z", 60: "2023-11-14T22:12:20Z"}[nearest]
        assert f"the nearest is at {text}" in error["message"]
    site.store.write([lambda connection: connection.execute("DELETE FROM decisions")], NOW_S)
    assert "nor at any other time" in site.get("/pools/chat/decisions").json()["error"]["message"]


@pytest.mark.parametrize("what", ["decisions", "score"])
def test_unknown_pools_and_values(site: Site, what: str) -> None:
    site.keep(record(NOW_S - 120, pool="gone"), record(NOW_S - 60, pool="gone"))
    error = site.get(f"/pools/none/{what}").json()["error"]
    assert (error["code"], error["status"]) == ("pool_not_found", 404)
    assert site.get(f"/pools/gone/{what}").status_code == 200  # it was configured once
    name = "at_s" if what == "decisions" else "from_s"
    for value in ("nan", "-1", "soon"):
        assert site.get(f"/pools/chat/{what}", **{name: value}).json()["error"]["param"] == name
    site.store.path.unlink()
    site.store.close()
    site.store.path.mkdir()
    assert site.get(f"/pools/chat/{what}").json()["error"]["code"] == "history_failed"


def test_what_waits_to_be_written_counts(site: Site) -> None:
    site.keep(record(NOW_S - 120), record(NOW_S - 60, count=7))
    site.waiting = [record(NOW_S - 60, until_s=NOW_S - 5, count=1), record(NOW_S - 2, desired=7)]
    found = site.get("/pools/chat/decisions").json()["decisions"]
    assert [one["desired"] for one in found] == [3, 3, 7]
    assert (found[1]["count"], found[1]["last_at_s"]) == (7 + 59, NOW_S - 2)
    assert site.get("/pools/chat/score").json()["until_s"] == NOW_S - 2


def test_the_score_of_a_stretch(site: Site) -> None:
    tally = ForecastTally(scored=2, covered=1, loss=30.0, last_value_loss=40.0)
    site.keep(
        *(record(NOW_S - 60 * ago, rate=250.0, ready=3, tally=tally) for ago in range(30, 0, -1))
    )
    found = site.get("/pools/chat/score").json()
    assert (found["scored_s"], found["unknown_s"], found["trusted_s"]) == (1_740.0, 0.0, 1_740.0)
    assert (found["forecasts"], found["coverage"], found["loss_ratio"]) == (60, 0.5, 0.75)
    # Of 200 tokens/s each: three ran; at 0.7 of it reaction alone has two for 250.
    assert found["ran"] == {"replica_s": 3 * 1_740.0, "short_s": 0.0}
    assert found["reactive"] == {"replica_s": 2 * 1_740.0, "short_s": 0.0}
    assert (found["above_replica_s"], found["below_replica_s"]) == (1_740.0, 0.0)
    part = site.get("/pools/chat/score", from_s=NOW_S - 300, until_s=NOW_S - 59).json()
    assert part["scored_s"] == 240.0
    none = site.get("/pools/chat/score", from_s=NOW_S - 30)
    assert none.json()["error"]["code"] == "decision_not_found"
