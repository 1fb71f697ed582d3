"""What ``tidegate model`` prints: answers, listings, progress and sizes as text."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from admin_rig import NOW_S
from fake_cache import REVISION

from gateway.admin import schema
from gateway.cli import tables
from gateway.cli.model import ProgressBar, figures
from gateway.cli.tables import Screen
from gateway.terminal import size
from modelcache.types import Made, ModelEntry, Progress, Tier

URL = "hf://org/name"


@pytest.mark.parametrize(
    ("told", "text"),
    [
        ({"was_there": True}, "M abc, 2.0 MB, already cached: /views/m\n"),
        (
            {"was_there": True, "prepared": "/views/p", "prepared_s": 3.14},
            "M abc, 2.0 MB, already cached, prepared in 3.1 s: /views/p\n",
        ),
        (
            {"was_there": True, "prepared": "/views/p", "prepared_s": None},
            "M abc, 2.0 MB, already cached, prepared already: /views/p\n",
        ),
        (
            {"prepared": "/views/p", "prepared_s": 3.14},
            "M abc, 2.0 MB in 3 files (5.0 s), prepared in 3.1 s: /views/p\n",
        ),
        (
            {"size_bytes": None, "note": "it has no weights"},
            "M is used in place: /views/m\nNote: it has no weights\n",
        ),
    ],
)
def test_what_preload_says(told: dict[str, Any], text: str) -> None:
    base = {
        "verb": "preload", "model": "M", "revision": "abc", "size_bytes": 2_000_000, "files": 3,
        "path": "/views/m", "elapsed_s": 5.0, "was_there": False, "prepared": None, "note": "",
    }  # fmt: skip
    assert tables.model_done(schema.PreloadAnswer(**{**base, **told})) == text


@pytest.mark.parametrize("prepared", [False, True])
def test_what_evict_says_is_left(prepared: bool) -> None:
    answer = schema.EvictAnswer(
        verb="evict", model="M", revision="b" * 40, revisions=("b" * 40,), left=("a" * 40,),
        freed_bytes=1000, prepared=prepared,
    )  # fmt: skip
    assert tables.model_done(answer) == (
        "Evicted: the prepared results of M bbbbbbbbbbbb, 1 kB freed.\n"
        if prepared
        else "Evicted: M bbbbbbbbbbbb, 1 kB freed.\n"
        "Left: aaaaaaaaaaaa (`--revision` names one, `--all` all).\n"
    )


def entry(url: str, revision: str, **given: Any) -> ModelEntry:
    base = {
        "tier": Tier.ON_DISK, "size_bytes": 2_000_000, "bytes_unique": 0, "bytes_cached": None,
        "complete": True, "pinned": False,
    }  # fmt: skip
    return ModelEntry(url=url, revision=revision, **{**base, **given})


def test_what_was_made_of_a_model_stands_below_it() -> None:
    key = "3fe29c81d0e4" + "0" * 52
    made = Made(model=URL, revision=REVISION, steps=("gguf_to_safetensors", "cast"))
    result = entry(f"prepared://{key}", "made", leases=("m-1",), made=made, used_at_s=NOW_S - 60)
    half = replace(result, complete=False, leases=("the step that makes it",), tier=Tier.REMOTE)
    models = (
        replace(half, leases=(), made=None),
        half,
        entry("hf://org/other", "1"),
        result,
        entry(URL, REVISION),
        replace(result, made=replace(made, model="hf://org/gone")),
    )
    usage = schema.CacheUsage(
        bytes_used=9_000_000, bytes_blobs=0, bytes_prepared=5_000_000, bytes_partial=0,
        bytes_records=0, free_bytes=10**9, quota_bytes=10**7,
    )  # fmt: skip
    found = schema.CacheListing(
        dir="d", usage=usage, traffic=schema.CacheTraffic(), models=models, pools=()
    )
    assert "\x1b[" in tables.models(found, Screen(terminal=True, width=120), NOW_S)
    text = tables.models(found, Screen(terminal=False, width=200), NOW_S)
    head, _, _, *rows = text.splitlines()
    assert head.startswith("d: 9.0 MB used of a quota of 10.0 MB (5.0 MB by prepared results), ")
    name = f"prepared://{key[:12]} (gguf_to_safetensors + cast of "
    begins = (
        f"prepared://{key[:12]}", "hf://org/other", URL, f"└ {name}{URL})", f"└ {name}{URL})",
        f"└ {name}hf://org/gone)",
    )  # fmt: skip
    assert all(row.startswith(begin) for row, begin in zip(rows, begins, strict=True)), text
    assert "incomplete" in rows[0]
    assert "preparing" in rows[3]
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
    capsys: pytest.CaptureFixture[str],
) -> None:
    now = [0.0]
    with ProgressBar("preload m", clock=lambda: now[0]) as bar:
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
    with ProgressBar("preload m") as bar:
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
    assert size(value) == text
