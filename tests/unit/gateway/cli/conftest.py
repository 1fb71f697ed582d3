"""The command line is run in a directory of its own; over a history where a test asks for one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from admin_rig import TOKEN, ServedAdmin
from history_cli import CONFIG, POOLS, AtNow, Cli, open_store

from autoscaler.signals.history import HistoryStore
from gateway.admin.history import Histories
from gateway.cli.client import TOKEN_VARIABLE


@pytest.fixture(autouse=True)
def somewhere_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("TIDEGATE")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv(TOKEN_VARIABLE, TOKEN)
    return tmp_path


@pytest.fixture
def store(somewhere_else: Path) -> Iterator[HistoryStore]:
    """The history in the state directory of settings with one pool."""
    (somewhere_else / "tidegate.toml").write_text(CONFIG)
    (somewhere_else / ".tidegate").mkdir()
    made = open_store(somewhere_else / ".tidegate" / "history.sqlite3")
    yield made
    made.close()


@pytest.fixture(params=["on the file", "of the one that runs"])
def cli(request: pytest.FixtureRequest, store: HistoryStore) -> Iterator[Cli]:
    """``run`` of the test's module, both ways: they do and say the same."""
    run: Cli = request.module.run
    if request.param == "on the file":
        yield run
        return
    now: AtNow = request.module.AT_NOW
    with ServedAdmin(histories=Histories(store, lambda: POOLS, now.now_s)) as served:
        yield lambda *words: run(*words, "--admin", served.url)
