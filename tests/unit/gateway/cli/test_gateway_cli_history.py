"""``tidegate history``: on the file and through a Tidegate that runs; imports from everywhere."""

from __future__ import annotations

import csv
import json
import math
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from admin_rig import ServedAdmin
from history_cli import AtNow, Cli, open_store

from autoscaler.settings import PoolSettings
from autoscaler.signals.history import HistoryStore
from autoscaler.signals.series import SERIES, PoolMinute
from gateway.admin.history import Histories
from gateway.cli import main
from gateway.cli.history import moment, sparkline
from gateway.cli.history_files import BadTable, read_points, write_table

NOW = 30_000_000
NOW_S = NOW * 60.0
AT_NOW = AtNow(now_s=lambda: NOW_S + 30)


def run(*words: str) -> int:
    return main.main(["history", *words], AT_NOW)


def keep(store: HistoryStore, *arrivals: float, pool: str = "chat", until: int = NOW) -> None:
    first = until - len(arrivals)
    minutes = [
        PoolMinute(pool=pool, minute=first + at, values={"arrivals": value})
        for at, value in enumerate(arrivals)
    ]
    store.record(minutes, NOW_S)


def known(store: HistoryStore, series: str = "arrivals") -> dict[int, float]:
    """Values by how many minutes ago."""
    window = store.read("chat", [series], None, NOW_S)
    first = round(window.start_s / 60)
    return {
        NOW - first - at: value
        for at, value in enumerate(window.values[series])
        if not math.isnan(value)
    }


def printed(capsys: pytest.CaptureFixture[str]) -> Any:
    return json.loads(capsys.readouterr().out)


# -- show, export ------------------------------------------------------------------------------


def test_show(cli: Cli, store: HistoryStore, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli("show") == 0
    assert "Nothing is kept yet" in capsys.readouterr().out
    keep(store, 10, 0, 20)
    keep(store, 7, until=NOW - 9)
    assert cli("show") == 0
    head, _, titles, row = capsys.readouterr().out.splitlines()
    assert re.search(r"history\.sqlite3  \d\d kB of 1\.1 GB", head)
    assert (titles.split()[0], row.split()[0], row.split()[-1]) == ("POOL", "chat", "40%")
    assert cli("show", "--json") == 0
    assert printed(capsys)["pools"][0]["minutes"] == 4
    assert cli("show", "c", "--series", "arrivals,errors") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "chat: 10 minutes from 10 min 30 s ago on"
    assert lines[3].split()[:5] == ["arrivals", "40%", "9.25", "20", "20"]
    assert lines[4].split() == ["errors", "0%", "-", "-", "-"]
    assert cli("show", "chat", "--since", "3m", "--series", "arrivals", "--json") == 0
    found = printed(capsys)
    assert found["series"] == {"arrivals": [0, 20]}
    assert (found["pool"], found["start_s"], found["step_s"]) == ("chat", NOW_S - 120, 60)


def test_a_long_past_is_read_in_parts(
    cli: Cli, store: HistoryStore, capsys: pytest.CaptureFixture[str]
) -> None:
    keep(store, *range(5), until=NOW - 40_000)
    keep(store, 1)
    assert cli("show", "chat", "--since", "50d", "--series", "arrivals", "--json") == 0
    (values,) = printed(capsys)["series"].values()
    assert len(values) == 40_005
    assert (values[:6], values[-2:]) == ([0, 1, 2, 3, 4, None], [None, 1])


@pytest.mark.parametrize("name", ["past.csv", "past.parquet"])
def test_what_was_exported_can_be_imported(
    cli: Cli, store: HistoryStore, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    values = {series: 0.1 + index for index, series in enumerate(SERIES)}
    some = {"arrivals": 3.0}
    store.record(
        [
            PoolMinute(pool="chat", minute=NOW - ago, values=some if ago == 4 else values)
            for ago in (9, 4, 3)
        ],
        NOW_S,
    )
    before = store.read("chat", SERIES, None, NOW_S)
    assert cli("export", "chat", name, "--json") == 0
    assert printed(capsys)["minutes"] == 9
    store.transact(lambda connection: connection.execute("DELETE FROM minutes"), writes=True)
    assert known(store) == {}
    assert cli("import", "chat", "--file", name, "--json") == 0
    told = printed(capsys)
    assert (told["pool"], told["minutes"]) == ("chat", 3)
    assert (told["from_s"], told["until_s"]) == (NOW_S - 540, NOW_S - 120)
    assert told["series"]["arrivals"] == 3
    after = store.read("chat", SERIES, None, NOW_S)
    assert after.start_s == before.start_s
    for series in SERIES:
        assert after.values[series].tolist() == pytest.approx(
            before.values[series].tolist(), rel=1e-9, nan_ok=True
        )


def test_csv_goes_to_standard_output(
    cli: Cli, store: HistoryStore, capsys: pytest.CaptureFixture[str]
) -> None:
    keep(store, 5, until=NOW - 1)
    keep(store, 2.5, until=NOW - 3)
    assert cli("export", "chat", "--series", "arrivals") == 0
    rows = list(csv.reader(capsys.readouterr().out.splitlines()))
    assert rows == [
        ["time", "arrivals"],
        ["2027-01-15T07:56:00Z", "2.5"],
        ["2027-01-15T07:57:00Z", ""],
        ["2027-01-15T07:58:00Z", "5"],
        ["2027-01-15T07:59:00Z", ""],
    ]


# -- import ------------------------------------------------------------------------------------


def test_own_figures_stay_and_old_ones_are_left_out(
    cli: Cli, store: HistoryStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keep(store, 100)
    times = [NOW_S - 61 * 86_400, NOW_S - 61 * 86_400 + 60, NOW_S - 120, NOW_S - 60, NOW_S + 600]
    rows = [f"{round(at_s)},{number}" for number, at_s in enumerate(times)]
    (tmp_path / "x.csv").write_text("\n".join(["time,requests", *rows]))
    assert cli("import", "c", "--file", "x.csv") == 0
    assert known(store) == {1: 100, 2: 2}
    assert "chat: 2 minutes" in capsys.readouterr().out


class FakePrometheus:
    """Serves one counter of any label values, which rises by the minute's number modulo 7."""

    def __init__(self, metric: str) -> None:
        self.asked: list[str] = []
        self.authorization: set[str | None] = set()
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                given = {name: one[0] for name, one in parse_qs(urlsplit(self.path).query).items()}
                fake.asked.append(given["query"])
                fake.authorization.add(self.headers["authorization"])
                result = []
                if f"({metric}{{" in given["query"] or given["query"] == metric:
                    minutes = range(int(given["start"]) // 60, int(given["end"]) // 60 + 1)
                    total = [sum(at % 7 for at in range(NOW - 3_000, minute)) for minute in minutes]
                    values = [[at * 60, str(one)] for at, one in zip(minutes, total, strict=True)]
                    result = [{"metric": {}, "values": values}]
                body = json.dumps({"status": "success", "data": {"result": result}}).encode()
                self.send_response(200)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: Any) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> FakePrometheus:
        threading.Thread(target=self.server.serve_forever, args=(0.05,)).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.mark.parametrize(
    ("metric", "options", "selects"),
    [
        ("tidegate_arrivals_total", [], 'pool="chat"'),
        ("vllm:request_success_total", [], 'model_name="chat"'),
        ("vllm:request_success_total", ["--match", 'job="x"'], 'job="x"'),
        ("vllm:request_success_total", ["--metrics", "vllm"], 'model_name="chat"'),
    ],
)
def test_from_a_prometheus(
    cli: Cli,
    store: HistoryStore,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    metric: str,
    options: list[str],
    selects: str,
) -> None:
    monkeypatch.setenv("TIDEGATE_PROMETHEUS_TOKEN", "t0ken")
    with FakePrometheus(metric) as fake:
        assert cli("import", "chat", "--prometheus", fake.url, "--since", "1d", *options) == 0
    assert known(store) == {ago: (NOW - ago) % 7 for ago in range(1, 1_440)}
    assert selects in fake.asked[-1]
    assert fake.authorization == {"Bearer t0ken"}
    assert "arrivals" in capsys.readouterr().out


def test_from_a_prometheus_with_a_query_of_ones_own(cli: Cli, store: HistoryStore) -> None:
    with FakePrometheus("my_errors") as fake:
        own = ["--query", "errors=my_errors", "--header", "X-Scope-OrgID: team"]
        assert cli("import", "chat", "--prometheus", fake.url, "--since", "1h", *own) == 0
    assert len(known(store, "errors")) == 59
    assert known(store) == {}


def test_from_another_tidegate(cli: Cli, store: HistoryStore, tmp_path: Path) -> None:
    other = open_store(tmp_path / "other.sqlite3")
    keep(other, *range(20_000), pool="theirs")
    pools = (PoolSettings(name="theirs", engine="simulated", model="m"),)
    with ServedAdmin(histories=Histories(other, lambda: pools, AT_NOW.now_s)) as there:
        given = ["--tidegate", there.url, "--from-pool", "theirs"]
        assert cli("import", "chat", *given) == 0
    assert known(store) == {20_000 - at: at for at in range(20_000)}
    other.close()


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["import", "chat"], 2, "one of --prometheus, --file and --tidegate"),
        (["import", "chat", "--file", "a", "--tidegate", "b"], 2, "one of --prometheus"),
        (["import", "chat", "--prometheus", "prom:9090"], 1, "no URL of a Prometheus"),
        (["import", "chat", "--prometheus", "http://127.0.0.1:9", "--since", "x"], 2, "is no time"),
        (["import", "chat", "--prometheus", "http://x", "--query", "sales=1"], 2, "no series"),
        (["import", "chat", "--prometheus", "http://x", "--query", "errors"], 2, "SERIES=PROMQL"),
        (
            ["import", "chat", "--tidegate", "http://127.0.0.1:9"],
            2,
            "--tidegate http://127.0.0.1:9",
        ),
        (["import", "chat", "--file", "missing.csv"], 2, "missing.csv: No such file"),
        (["import", "chat", "--file", "odd.csv"], 2, "no column of times"),
        (["import", "chat", "--file", "future.csv"], 1, "nothing is known there of chat"),
        (["import", "nobody", "--file", "good.csv"], 2, "no pool 'nobody'"),
        (["show", "nobody"], 2, "no pool 'nobody'"),
        (["show", "chat", "--series", "sales"], 2, "no 'sales'"),
        (["export", "chat", "no/where.csv"], 2, "no/where.csv: No such file"),
        (["export", "chat", "--json"], 2, "there is none"),
    ],
)
def test_mistakes_are_a_line(
    cli: Cli,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    code: int,
    said: str,
) -> None:
    (tmp_path / "odd.csv").write_text("colour,size\nred,1\nblue,2\n")
    for name, at_s in (("good", NOW_S - 600), ("future", NOW_S + 600)):
        (tmp_path / f"{name}.csv").write_text(f"time,value\n{at_s},1\n{at_s + 60},1\n")
    assert cli(*words) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert said in err


def test_a_prometheus_without_the_pool_says_what_helps(
    cli: Cli, capsys: pytest.CaptureFixture[str]
) -> None:
    with FakePrometheus("other") as fake:
        assert cli("import", "chat", "--prometheus", fake.url) == 1
    assert "--match" in capsys.readouterr().err


def test_without_a_state_directory_there_is_no_history(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.main(["history", "show", "-s", f"state_dir={tmp_path / 'new'}"], AT_NOW) == 1
    assert "there is no history" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_a_past_can_be_imported_before_the_first_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "past.csv").write_text(f"time,requests\n{NOW_S - 120},30\n{NOW_S - 60},60\n")
    sets = ("-s", f"state_dir={tmp_path / 'new'}")
    assert run("import", "smollm2", "--file", str(tmp_path / "past.csv"), *sets) == 0
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o700
    capsys.readouterr()
    assert run("show", "--json", *sets) == 0
    assert [one["pool"] for one in printed(capsys)["pools"]] == ["smollm2"]


# -- files -------------------------------------------------------------------------------------

START = NOW - 10
START_S = START * 60


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("minutes", "t_s,requests\n{0},5\n{60},6\n{180},7\n", {"arrivals": {0: 5, 1: 6, 3: 7}}),
        (
            "fives",
            "timestamp,value\n{0},10\n{300},5\n",
            {"arrivals": {0: 2, 1: 2, 2: 2, 3: 2, 4: 2, 5: 1, 6: 1, 7: 1, 8: 1, 9: 1}},
        ),
        (
            "parts of a minute",
            "time,count,ttft_mean_s\n{0},1,2\n{20},2,3\n{40},3,4\n{60},4,5\n{80},,5\n{100},6,5\n"
            "{120},7,1\n",
            {"arrivals": {0: 6}, "ttft_mean_s": {0: 3.0, 1: 5.0}},
        ),
        (
            "a row for each request",
            "t,input_tokens,output_tokens\n{30},1,1\n{70},10,2\n{80},20,3\n{190},40,4\n{250},9,9\n",
            {
                "arrivals": {1: 2, 2: 0, 3: 1},
                "input_tokens": {1: 30, 2: 0, 3: 40},
                "output_tokens": {1: 5, 2: 0, 3: 4},
            },
        ),
        ("out of order", "time,requests\n{60},6\n{0},5\n", {"arrivals": {0: 5, 1: 6}}),
    ],
)
def test_tables_of_several_kinds(
    tmp_path: Path, name: str, text: str, expected: dict[str, dict[int, float]]
) -> None:
    lines = []
    for line in text.splitlines():
        mark, brace, rest = line.partition("}")
        lines.append(f"{START_S + int(mark[1:])}{rest}" if brace else line)
    (tmp_path / "x.csv").write_text("\n".join(lines))
    found = read_points(tmp_path / "x.csv")
    shown = {
        series: {minute - START: value for minute, value in points.items()}
        for series, points in found.items()
    }
    assert shown == {
        series: {at: pytest.approx(value) for at, value in points.items()}
        for series, points in expected.items()
    }


def test_times_since_some_beginning_need_to_be_told_when_that_was(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("t_s,clients,requests\n0,9,1\n60,9,2\n")
    with pytest.raises(BadTable, match="--start"):
        read_points(path)
    assert read_points(path, start_s=START_S)["arrivals"] == {START: 1, START + 1: 2}
    found = read_points(path, start_s=START_S, column="clients")
    assert found["arrivals"] == {START: 9, START + 1: 9}
    with pytest.raises(BadTable, match="no column 'x'"):
        read_points(path, start_s=START_S, column="x")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "empty"),
        ("time,requests\n1700000000,1\n", "one row"),
        ("time,requests\n1700000000,1\n1700000000,2\n", "do not fit minutes"),
        ("time,requests\n1700000000,1\n1700000045,2\n1700000090,2\n", "45 s, which do not fit"),
        ("time,requests\nnoon,1\none,2\n", "'noon' in row 1 is no time"),
        ("time,requests\n1700000000,x\n1700000060,2\n", "'x' in row 1 is no number"),
        ("time,requests\n1700000000,-1\n1700000060,2\n", "-1 in row 1 is below 0"),
        ("time,colour\n1700000000,1\n1700000060,2\n", "no column of a series"),
    ],
)
def test_what_is_no_past_of_a_pool(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "x.csv").write_text(text)
    with pytest.raises(BadTable, match=said):
        read_points(tmp_path / "x.csv")


def test_an_empty_past_is_written_too(tmp_path: Path) -> None:
    for name in ("x.csv", "x.parquet"):
        write_table(tmp_path / name, 0.0, {})
        assert (tmp_path / name).stat().st_size > 0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("90m", NOW_S - 5_400), ("36h", NOW_S - 129_600), ("1.5d", NOW_S - 129_600),
        ("4w", NOW_S - 28 * 86_400), ("1700000000", 1_700_000_000.0),
        ("2026-11-30", 1_795_996_800.0), ("2026-11-30T01:00+01:00", 1_795_996_800.0),
        ("2026-11-30T00:00:00Z", 1_795_996_800.0), ("10m ago", NOW_S - 600),
        ("5 min ago", NOW_S - 300), ("30s", NOW_S - 30), ("00:00", NOW_S - NOW_S % 86_400),
        ("0:00:10", NOW_S - NOW_S % 86_400 + 10 - 86_400 * (NOW_S % 86_400 < 10)),
        ("23:59", NOW_S - NOW_S % 86_400 - 60 + 86_400 * (NOW_S % 86_400 >= 86_340)),
    ],
)  # fmt: skip
def test_moments(text: str, expected: float) -> None:
    assert moment(text, NOW_S) == expected


@pytest.mark.parametrize(
    ("values", "bars"),
    [([0.0, 1.0, None, 8.0], "▁▂ █"), ([None], " "), ([0.0, 0.0], "▁▁"), ([1.0] * 80, "█" * 40)],
)
def test_a_trend(values: list[float | None], bars: str) -> None:
    assert sparkline(values) == bars
