"""What ``tidegate model`` prints: answers, listings, progress and sizes as text."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from fake_cache import REVISION

from gateway.cli import model_tables
from gateway.cli.progress import Bar, figures
from gateway.cli.tables import Screen
from modelcache.types import Progress

URL = "hf://org/name"
NOW_S = 1_800_000_000.0


@pytest.mark.parametrize(
    ("told", "text"),
    [
        ({"was_there": True}, "M abc, 2.0 MB, was there already: /views/m\n"),
        (
            {"was_there": True, "prepared": "/views/p", "prepared_s": 3.14},
            "M abc, 2.0 MB, was there already, prepared in 3.1 s: /views/p\n",
        ),
        (
            {"was_there": True, "prepared": "/views/p", "prepared_s": None},
            "M abc, 2.0 MB, was there already, prepared already: /views/p\n",
        ),
        (
            {"prepared": "/views/p", "prepared_s": 3.14},
            "M abc, 2.0 MB in 3 files (5.0 s), prepared in 3.1 s: /views/p\n",
        ),
        (
            {"size_bytes": None, "note": "it has no weights"},
            "M is used where it lies: /views/m\nNote: it has no weights\n",
        ),
    ],
)
def test_what_preload_says(told: dict[str, Any], text: str) -> None:
    base = {
        "verb": "preload", "model": "M", "revision": "abc", "size_bytes": 2_000_000, "files": 3,
        "path": "/views/m", "elapsed_s": 5.0, "was_there": False, "prepared": None, "note": "",
    }  # fmt: skip
    assert model_tables.done({**base, **told}) == text


def test_what_evict_says_is_left() -> None:
    told = {
        "verb": "evict", "model": "M", "revisions": ["b" * 40], "left": ["a" * 40],
        "freed_bytes": 1000,
    }  # fmt: skip
    assert model_tables.done(told) == (
        "M bbbbbbbbbbbb is evicted; 1 kB are free again.\n"
        "Still here: aaaaaaaaaaaa (`--revision` names one, `--all` all).\n"
    )
    assert model_tables.done({**told, "prepared": True}) == (
        "What was made of M bbbbbbbbbbbb is evicted; 1 kB are free again.\n"
    )


def test_what_was_made_of_a_model_stands_below_it() -> None:
    key = "3fe29c81d0e4" + "0" * 52
    made = {"model": URL, "revision": REVISION, "steps": ["gguf_to_safetensors", "cast"]}
    result = {
        "url": f"prepared://{key}", "revision": "made", "tier": "on_disk", "size_bytes": 2_000_000,
        "complete": True, "leases": ["m-1"], "made": made, "used_at_s": NOW_S - 60,
    }  # fmt: skip
    half = {**result, "complete": False, "leases": ["the step that makes it"], "tier": "remote"}
    left = {**half, "leases": [], "made": None}
    models = [
        left,
        half,
        {"url": "hf://org/other", "revision": "1", "complete": True},
        result,
        {"url": URL, "revision": REVISION, "complete": True},
        {**result, "made": {**made, "model": "hf://org/gone"}},
    ]
    usage = {"bytes_used": 9_000_000, "bytes_prepared": 5_000_000, "quota_bytes": 10**7}
    found = {"dir": "d", "models": models, "usage": usage}
    text = model_tables.listing(found, Screen(terminal=False, width=200), NOW_S)
    head, _, _, *rows = text.splitlines()
    assert head == "d: 9.0 MB taken of 10.0 MB allowed (5.0 MB by what was made here)"
    name = f"prepared://{key[:12]} (gguf_to_safetensors + cast of "
    begins = (
        f"prepared://{key[:12]}", "hf://org/other", URL, f"└ {name}{URL})", f"└ {name}{URL})",
        f"└ {name}hf://org/gone)",
    )  # fmt: skip
    assert all(row.startswith(begin) for row, begin in zip(rows, begins, strict=True)), text
    assert "not whole" in rows[0]
    assert "being made" in rows[3]
    assert "in use by m-1" in rows[4]


@pytest.mark.parametrize(
    ("progress", "text"),
    [
        (Progress(phase="listing"), ""),
        (Progress(phase="fetching", bytes_done=1_500_000), "1.5 MB"),
        (
            Progress(phase="fetching", bytes_done=10**9, bytes_total=3 * 10**9, rate_bytes_s=10**8),
            "1.0 GB of 3.0 GB, 100 MB/s, 20 s left",
        ),
        (Progress(phase="checking", detail="2 of 3 files"), "2 of 3 files"),
    ],
)
def test_progress_in_figures(progress: Progress, text: str) -> None:
    assert figures(progress) == text


def test_progress_without_a_terminal_is_a_line_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    clock = SimpleNamespace(monotonic=lambda: now[0])
    monkeypatch.setattr("gateway.cli.progress.time", clock)
    with Bar("preload m") as bar:
        for second in range(25):
            now[0] = float(second)
            bar.show(Progress(phase="fetching", bytes_done=second * 10**6, bytes_total=10**9))
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "tidegate: preload m: fetching 10.0 MB of 1.0 GB",
        "tidegate: preload m: fetching 20.0 MB of 1.0 GB",
    ]


def test_progress_on_a_terminal_is_a_bar_and_nothing_of_it_stays(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with Bar("preload m") as bar:
        bar.show(Progress(phase="fetching", bytes_done=10**9, bytes_total=2 * 10**9))
    out, err = capsys.readouterr()
    assert out == ""
    assert "preload m: fetching" in err
    assert "1.0 GB of 2.0 GB" in err


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "?"),
        (0, "0 B"),
        (999, "999 B"),
        (1_000, "1 kB"),
        (999_949, "1.0 MB"),
        (1_500_000, "1.5 MB"),
        (412_000_000, "412 MB"),
        (14_900_000_000, "14.9 GB"),
        (2.5e15, "2.5 PB"),
    ],
)
def test_sizes(value: float | None, text: str) -> None:
    assert model_tables.size(value) == text
