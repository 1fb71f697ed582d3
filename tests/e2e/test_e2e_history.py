"""The past of a pool: out of a real Prometheus, over restarts and kills, next to a real one."""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from prometheus_server import make_blocks, prometheus
from tidegate_process import Tidegate, fetch, simulated, start, up, wait_up, write_settings

from autoscaler.signals.history import HistoryStore
from autoscaler.signals.series import SERIES

WEEK = 7 * 24 * 60
SCRAPE_S = 30
BOUNDS_S = ("0.5", "1.0", "2.5", "+Inf")


def cli(directory: Path, *words: object) -> Any:
    """A verb of ``tidegate history`` with ``--json``, as its users run it."""
    return tidegate_json(directory, "history", *words)


def tidegate_json(directory: Path, *words: object) -> Any:
    """A verb of ``tidegate`` with ``--json``."""
    config = ["--json", "-c", str(directory / "tidegate.toml")]
    done = subprocess.run(
        [sys.executable, "-m", "gateway.cli.main", *map(str, words), *config],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def series_of(directory: Path, pool: str, *, since: str = "520w") -> dict[str, dict[int, float]]:
    """What is known of a pool: by series, the values by minute."""
    found = cli(directory, "show", pool, "--since", since)
    first = round(found["start_s"] / 60)
    return {
        name: {first + at: value for at, value in enumerate(values) if value is not None}
        for name, values in found["series"].items()
    }


# -- a week out of a Prometheus ----------------------------------------------------------------


class Week:
    """Two Tidegates' counters of one pool, minute by minute, and as Prometheus has scraped them.

    The first is not scraped for a while, and is restarted later; the second comes after five days.
    Requests come twice a minute, each time before it is scraped.
    """

    def __init__(self) -> None:
        chance = random.Random(7)
        self.first = int(time.time() // 60) - WEEK - 5
        day = 24 * 60
        self.arrivals = {
            one: [
                round(5 + 4 * math.sin(2 * math.pi * (minute % day) / day)) + chance.randrange(3)
                for minute in range(WEEK)
            ]
            for one in "ab"
        }
        self.not_scraped = range(3_000, 3_025)
        self.restart = range(6_000, 6_004)
        self.second_from = 5 * day

    def expected(self) -> dict[int, float]:
        """Arrivals by minute, where they are known."""
        known = {}
        # At a full minute a counter is what it was when it was scraped last, in the minute before.
        for minute in range(1, WEEK):
            silent = self.not_scraped.start - 1 <= minute <= self.not_scraped.stop
            down = self.restart.start <= minute <= self.restart.stop
            second = minute > self.second_from
            if silent or (down and not second):
                continue
            total = 0 if down else self.arrivals["a"][minute]
            known[self.first + minute] = float(total + second * self.arrivals["b"][minute])
        return known

    def write(self, folder: Path) -> Iterator[Path]:
        """All of it as OpenMetrics text, a file for each day: for each two hours that there are in
        a file, promtool reads the whole of it."""
        days: dict[int, dict[str, list[str]]] = {}
        for one in "ab":
            count = 0
            for step in range(WEEK * 60 // SCRAPE_S):
                minute, second = divmod(step * SCRAPE_S, 60)
                half = self.arrivals[one][minute] // 2
                count += self.arrivals[one][minute] - half if second else half
                if one == "a" and minute in self.restart:
                    count = 0
                    continue
                if (one == "a" and minute in self.not_scraped) or (
                    one == "b" and minute < self.second_from
                ):
                    continue
                at_s = self.first * 60 + step * SCRAPE_S + 7
                lines = days.setdefault(at_s // 86_400, {})
                self._scrape(lines, f'pool="chat",instance="{one}"', count, at_s)
        for day, lines in days.items():
            with (folder / f"{day}.txt").open("w") as file:
                for name, samples in lines.items():
                    kind = {"queued_requests": "gauge", "e2e_request_latency_seconds": "histogram"}
                    file.write(f"# TYPE tidegate_{name} {kind.get(name, 'counter')}\n")
                    file.writelines(samples)
                file.write("# EOF\n")
            yield folder / f"{day}.txt"

    def _scrape(self, lines: dict[str, list[str]], labels: str, count: int, at_s: int) -> None:
        def add(family: str, end: str, value: float, more: str = "") -> None:
            text = f"tidegate_{family}{end}{{{labels}{more}}} {value} {at_s}\n"
            lines.setdefault(family, []).append(text)

        add("arrivals", "_total", count)
        add("arrived_prompt_tokens", "_total", 100 * count)
        add("generation_tokens", "_total", 10 * count)
        add("requests", "_total", count // 10, ',outcome="engine_error"')
        add("queued_requests", "", 2)
        for bound in BOUNDS_S:  # every answer took between 0.5 and 1 s, 0.75 s on the mean
            value = 0 if bound == "0.5" else count
            add("e2e_request_latency_seconds", "_bucket", value, f',le="{bound}"')
        add("e2e_request_latency_seconds", "_sum", 0.75 * count)
        add("e2e_request_latency_seconds", "_count", count)


@pytest.fixture(scope="module")
def week(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Week, str]]:
    """A week in the database of a Prometheus that runs."""
    folder = tmp_path_factory.mktemp("week")
    made = Week()
    for day in made.write(folder):
        make_blocks(day, folder / "data")
    with prometheus(folder) as url:
        yield made, url


def check(week: Week, found: dict[str, dict[int, float]]) -> None:
    expected = week.expected()
    assert found["arrivals"] == expected
    assert found["input_tokens"] == {at: 100 * value for at, value in expected.items()}
    assert found["output_tokens"] == {at: 10 * value for at, value in expected.items()}
    assert sum(found["errors"].values()) == pytest.approx(sum(expected.values()) / 10, rel=0.01)
    assert set(found["queued_requests"].values()) == {2.0, 4.0}
    assert len(found["e2e_p90_s"]) > 0.99 * len(expected)
    for name, value in (("e2e_p90_s", 0.95), ("e2e_mean_s", 0.75)):
        assert list(found[name].values()) == pytest.approx([value] * len(found[name]))
    assert found["ttft_p90_s"] == {}


def test_a_week_of_a_prometheus_before_the_first_start(
    week: tuple[Week, str], tmp_path: Path
) -> None:
    made, url = week
    write_settings(tmp_path, pools=[simulated("chat")])
    (tmp_path / "state").mkdir(mode=0o700)
    told = cli(tmp_path, "import", "chat", "--prometheus", url, "--since", "8d")
    assert told["series"]["arrivals"] == len(made.expected())
    check(made, series_of(tmp_path, "chat"))
    export = tmp_path / "chat.parquet"
    assert cli(tmp_path, "export", "chat", export)["minutes"] >= WEEK
    cli(tmp_path, "import", "chat", "--file", export)
    check(made, series_of(tmp_path, "chat"))


def test_a_week_of_a_prometheus_while_it_runs(week: tuple[Week, str], tmp_path: Path) -> None:
    made, url = week
    with up(tmp_path, pools=[simulated("one"), simulated("two"), simulated("three")]) as tidegate:
        match = ["--match", 'pool="chat",instance=~"a|b"']
        cli(tmp_path, "import", "one", "--prometheus", url, "--since", "8d", *match)
        found = series_of(tmp_path, "one")
        newest = made.first + WEEK
        check(made, {name: {at: one for at, one in points.items() if at < newest}
                     for name, points in found.items()})  # fmt: skip
        query = 'errors=sum(increase(tidegate_requests_total{outcome="engine_error"}[2m])) / 2'
        cli(tmp_path, "import", "two", "--prometheus", url, "--since", "1d", "--query", query,
            "--metrics", "vllm")  # fmt: skip
        found = series_of(tmp_path, "two", since="1d")
        assert len(found["errors"]) > 1_400
        ahead = tidegate_json(tmp_path, "forecast", "one", "--horizon", "12h", "--backtest")
        assert ahead["unit"] == "tokens_per_s"
        assert ahead["periods_s"][0] == 86_400.0
        assert time.time() - 900 < ahead["start_s"] <= time.time()
        tried = [one for one in ahead["backtest"] if one["model"] == "automatic"]
        assert all(one["origins"] > 40 and one["wape"] < 0.5 for one in tried)
        listing = tidegate.admin("/history")
        assert {one["pool"] for one in listing["pools"]} >= {"one", "two"}
        assert tidegate.metrics().sum("tidegate_history_write_failures_total") == 0


# -- its own -----------------------------------------------------------------------------------


def ask(tidegate: Tidegate, count: int) -> None:
    body = {"model": "chat", "prompt": "hello there", "max_tokens": 7, "stream": True}
    for _ in range(count):
        fetch(f"{tidegate.url}/v1/completions", body)


def wait_until(at_s: float) -> None:
    while (left_s := at_s - time.time()) > 0:
        time.sleep(min(left_s, 1.0))


@pytest.mark.timeout(400)
def test_a_minute_is_kept_and_a_prometheus_that_scrapes_knows_it_too(tmp_path: Path) -> None:
    other = tmp_path / "other"  # its own history of the same time would be known, and stay
    (other / "state").mkdir(parents=True)
    write_settings(other, pools=[simulated("scraped"), simulated("told")])
    tidegate = start(tmp_path, pools=[simulated("chat", min_replicas=1)])
    try:
        wait_up(tidegate)
        target = tidegate.admin_url.removeprefix("http://")
        with prometheus(tmp_path / "prometheus", targets=(target,)) as url:
            tidegate.wait_ready("chat")
            minute = int(time.time() // 60) + 1
            wait_until(60 * minute + 3)
            ask(tidegate, 13)
            wait_until(60 * minute + 63)
            own = tidegate.wait("the minute", lambda: series_of(tmp_path, "chat")["arrivals"])
            assert own[minute] == 13
            cli(other, "import", "scraped", "--prometheus", url, "--match", 'pool="chat"')
        there = ["--tidegate", tidegate.state_dir / "admin.sock", "--from-pool", "chat"]
        cli(other, "import", "told", *there)
        found = series_of(tmp_path, "chat")
        scraped, told = (series_of(other, pool) for pool in ("scraped", "told"))
        sums = {name: points[minute] for name, points in found.items() if minute in points}
        assert (sums["arrivals"], sums["output_tokens"]) == (13, 13 * 7)
        assert sums["predicted_output_tokens"] == 13 * 7
        assert (sums["errors"], sums["queued_requests"]) == (0, 0)
        assert sums["input_tokens"] > 13
        assert 0 < sums["ttft_mean_s"] < sums["e2e_mean_s"]
        assert sums["itl_p90_s"] > 0
        assert told == found
        for name in SERIES:
            if not name.endswith("_s"):
                assert scraped[name][minute] == pytest.approx(sums[name]), name
            else:  # of two minutes, and without what came before the first scrape of a series
                assert scraped[name][minute] == pytest.approx(sums[name], rel=0.9), name
        tidegate.process.kill()
        tidegate.process.wait(30)
    finally:
        tidegate.kill_all()
    again = series_of(tmp_path, "chat")
    assert again["arrivals"][minute] == 13
    at = datetime.fromtimestamp(60 * minute, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    export = tmp_path / "chat.csv"
    cli(tmp_path, "export", "chat", export, "--series", "arrivals")
    assert f"{at},13\n" in export.read_text()


def test_a_damaged_history_is_set_aside_and_serves_on(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir(mode=0o700)
    (tmp_path / "state" / "history.sqlite3").write_bytes(b"not a database" * 4096)
    with up(tmp_path, pools=[simulated("chat", min_replicas=1)]) as tidegate:
        tidegate.expected_log.append("history.sqlite3 cannot be used")
        tidegate.wait_ready("chat")
        assert tidegate.admin("/history")["pools"] == []
        ask(tidegate, 1)
        assert "is set aside as history.sqlite3.damaged" in tidegate.log()
    assert (tmp_path / "state" / "history.sqlite3.damaged").exists()
    store = HistoryStore(tmp_path / "state" / "history.sqlite3", max_age_s=1e6, max_bytes=1 << 24)
    assert store.extents() == []
    store.close()
