"""``tidegate model``: both ways to do it, what is printed, exit codes, one line for an error."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from admin_rig import NOW_S, ServedAdmin
from fake_cache import REVISION, FakeCache, fake_models

from autoscaler.settings import PoolSettings
from gateway.admin.models import Models
from gateway.cli import main
from gateway.cli.base import Effects
from gateway.compose import listeners
from gateway.settings.schema import Settings
from modelcache.types import Cancelled, NoSpace

URL = "hf://org/name"


@dataclass(frozen=True, kw_only=True)
class OverFake(Effects):
    """Effects over a cache in memory."""

    cache: FakeCache
    now_s: Callable[[], float] = lambda: NOW_S

    def open_models(self, settings: Settings) -> Models:
        return replace(
            fake_models(self.cache, {"eu": "", "us": "no answer"}), pools=lambda: settings.pools
        )


@pytest.fixture
def cache(tmp_path: Path) -> FakeCache:
    """The cache of this node, which both ways lead to."""
    return FakeCache(tmp_path / "cache")


@pytest.fixture
def here(cache: FakeCache) -> Callable[..., int]:
    """The command line where no Tidegate runs: this process works on the cache."""
    return lambda *words: main.main(["model", *words], OverFake(cache=cache))


@pytest.fixture(params=["here", "the one that runs", "an agent", "named"])
def tidegate(
    request: pytest.FixtureRequest,
    cache: FakeCache,
    here: Callable[..., int],
    tmp_path: Path,
) -> Iterator[Callable[..., int]]:
    """The command line, for each process that may do the work: all do and say the same."""
    if request.param == "here":
        yield here
        return
    models = fake_models(cache, {"eu": "", "us": "no answer"})
    with ServedAdmin(models=models) as served:
        if request.param == "named":
            yield lambda *words: here(*words, "--admin", served.url)
            return
        name = listeners.AGENT_NAME if request.param == "an agent" else listeners.RECORD_NAME
        record = listeners.Running(pid=os.getpid(), url="", admin_url=served.url)
        listeners.leave_record(tmp_path / ".tidegate", record, name)
        yield here


@pytest.fixture(params=["here", "named"])
def chatting(
    request: pytest.FixtureRequest,
    cache: FakeCache,
    here: Callable[..., int],
    tmp_path: Path,
) -> Iterator[Callable[..., int]]:
    """The command line, and a pool: of these settings, or of the Tidegate that is asked only."""
    if request.param == "here":
        Path("tidegate.toml").write_text(
            '[[pools]]\nname = "chat"\naliases = ["org/other"]\nengine = "vllm"\n'
            'model = "hf://org/small"\n'
        )
        yield here
        return
    given = {
        "name": "chat", "aliases": ("org/other",), "engine": "vllm", "model": "hf://org/small",
    }  # fmt: skip
    pool = PoolSettings.model_validate(given)
    models = replace(fake_models(cache, {"eu": ""}), pools=lambda: (pool,))
    with ServedAdmin(models=models) as served:
        yield lambda *words: here(*words, "--admin", served.url)


def printed(capsys: pytest.CaptureFixture[str]) -> Any:
    return json.loads(capsys.readouterr().out)


def test_every_verb_both_ways(
    tidegate: Callable[..., int], cache: FakeCache, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tidegate("preload", URL, "--json") == 0
    told = printed(capsys)
    assert (told["verb"], told["model"], told["revision"]) == ("preload", URL, REVISION)
    assert tidegate("prewarm", "org/name", "--json") == 0  # a hub's name is its URL
    assert printed(capsys)["pages"]["bytes_read"] == 1000
    assert tidegate("pin", URL, "--json") == 0
    assert printed(capsys)["pinned"] is True
    assert tidegate("ls", "--json") == 0
    (entry,) = printed(capsys)["models"]
    assert (entry["url"], entry["pinned"], entry["complete"]) == (URL, True, True)
    assert tidegate("verify", URL, "--json") == 0
    assert printed(capsys)["damage"] == []
    assert tidegate("evict", URL) == 1
    out, err = capsys.readouterr()
    assert (out, err) == ("", f"tidegate: {URL} is pinned\n")
    assert tidegate("unpin", URL, "--json") == 0
    assert printed(capsys)["pinned"] is False
    assert tidegate("evict", URL, "--json") == 0
    assert printed(capsys)["freed_bytes"] == 3_000_000
    assert tidegate("verify", URL) == 1
    assert capsys.readouterr().err == f"tidegate: {URL} is not in the cache\n"
    assert [call[0] for call in cache.calls] == [
        "preload", "prewarm", "pin", "verify", "evict", "unpin", "evict", "verify",
    ]  # fmt: skip


def test_options_arrive(tidegate: Callable[..., int], cache: FakeCache) -> None:
    assert tidegate("preload", URL, "-r", "main", "--expected-in-s", "60") == 0
    assert cache.calls[-1][1:3] == (URL, "main")
    assert cache.calls[-1][-1] == NOW_S + 60
    assert tidegate("verify", URL, "--repair") == 0
    assert cache.calls[-1] == ("verify", URL, REVISION, True)
    assert tidegate("evict", URL, "--revision", REVISION, "--force") == 0
    assert cache.calls[-1] == ("evict", URL, REVISION, True, False)
    assert tidegate("preload", URL) == 0
    assert tidegate("evict", URL, "--prepared") == 0
    assert cache.calls[-1] == ("evict", URL, REVISION, False, True)
    assert tidegate("preload", URL) == 0
    assert tidegate("evict", URL, "--all") == 0
    assert cache.calls[-1] == ("evict", URL, None, False, False)
    assert tidegate("evict", URL, "--all", "-r", REVISION) == 2
    assert tidegate("replicate", URL, "--to", "eu") == 0
    assert cache.calls[-1] == ("replicate", URL, None, ("eu",))


def test_what_is_damaged_or_cannot_be_replicated_is_exit_code_1(
    tidegate: Callable[..., int], cache: FakeCache, capsys: pytest.CaptureFixture[str]
) -> None:
    tidegate("preload", URL)
    cache.damaged.add(URL)
    capsys.readouterr()
    assert tidegate("verify", URL) == 1
    assert capsys.readouterr().out == (
        f"{URL} 0123456789ab: 1 damaged\n"
        "  model.safetensors: its content is not what it was (piece 2)\n"
    )
    assert tidegate("verify", URL, "--repair") == 0
    assert "1 damaged, repaired" in capsys.readouterr().out
    assert tidegate("replicate", URL) == 1
    assert capsys.readouterr().out == "eu: done\nus: no answer\n"
    assert tidegate("replicate", URL, "--to", "moon") == 2
    assert "'moon' is not in modelcache.sites" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("replicate", URL, "--to", "moon"), "sites: 'moon' is not in modelcache.sites"),
        (("prewarm", URL, "--rank", "3", "--world-size", "2"), "rank: must be from 0 to"),
        (("preload", "ftp://x/y"), "model URL: unknown scheme 'ftp'"),
        (("pin", "s3://u:p@models/a"), "carries no user or password"),
        (("preload", "just-a-word"), "nor a pool (known here: chat)"),
        (("evict", "nothing-here"), "nor a pool (known here: chat)"),
        (("preload", URL, "-r", "a b"), "model revision 'a b'"),
        (("preload", ""), "model: it is empty"),
    ],
)
def test_what_is_wrong_is_a_line_and_exit_code_2(
    chatting: Callable[..., int], capsys: pytest.CaptureFixture[str], words: Any, line: str
) -> None:
    assert chatting(*words) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("tidegate: ")
    assert line in err


def test_a_pool_s_name_is_that_of_whoever_is_asked(
    chatting: Callable[..., int], cache: FakeCache, tmp_path: Path
) -> None:
    for name in ("chat", "org/other"):
        assert chatting("preload", name) == 0
        assert cache.calls[-1][1] == "hf://org/small"
    (tmp_path / "chat").mkdir()  # a pool comes before a directory of its name
    assert chatting("preload", "chat") == 0
    assert cache.calls[-1][1] == "hf://org/small"
    assert chatting("preload", "./chat") == 0
    assert cache.calls[-1][1] == str(tmp_path / "chat")


def test_what_a_system_refuses_is_a_line(
    tidegate: Callable[..., int], cache: FakeCache, capsys: pytest.CaptureFixture[str]
) -> None:
    cache.errors[URL] = PermissionError(13, "Permission denied", "/cache")  # type: ignore[assignment]
    assert tidegate("preload", URL) == 1
    assert capsys.readouterr().err == "tidegate: [Errno 13] Permission denied: '/cache'\n"


@pytest.mark.parametrize("words", [("ls",), ("preload", URL), ("evict", URL), ("pin", URL)])
@pytest.mark.parametrize("field", ["state_dir", "modelcache.dir"])
def test_a_file_where_the_cache_would_be_is_named(
    here: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    words: tuple[str, ...],
    field: str,
) -> None:
    file = tmp_path / "file"
    file.write_text("x")
    assert here(*words, "-s", f"{field}={file}") == 2
    assert f"{field}: {file} is not a directory" in capsys.readouterr().err


def test_an_error_is_one_line(
    tidegate: Callable[..., int], cache: FakeCache, capsys: pytest.CaptureFixture[str]
) -> None:
    cache.errors[URL] = NoSpace("3 GB are wanted\nand 1 GB is free")
    assert tidegate("preload", URL) == 1
    out, err = capsys.readouterr()
    assert (out, err) == ("", "tidegate: 3 GB are wanted and 1 GB is free\n")


def test_texts(
    here: Callable[..., int], cache: FakeCache, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(*words: str) -> str:
        assert here(*words) == 0
        return capsys.readouterr().out

    assert "No model is in it; `tidegate model preload MODEL` brings one." in said("ls")
    path = cache.dir / "views" / "name"
    shown = f"{URL} 0123456789ab, 3.0 MB in 1 files (TIME): {path}\n"
    # How long it took is up to the machine.
    assert re.sub(r"\(\d+(\.\d)? s\)", "(TIME)", said("preload", URL)) == shown
    assert said("preload", URL) == f"{URL} 0123456789ab, 3.0 MB, already cached: {path}\n"
    assert said("prewarm", URL).startswith(f"{URL}: 1 kB read, 100 % in the page cache")
    assert "is pinned" in said("pin", URL)
    cache.leased.add(URL)
    head, _, titles, row = said("ls").splitlines()
    assert head == f"{cache.dir}: 3.0 MB used of a quota of 1.0 GB, 5.0 GB free on the disk"
    assert titles.split()[:4] == ["MODEL", "REVISION", "TIER", "SIZE"]
    for text in (URL, "0123456789ab", "on_disk", "25 %", "pinned, in use by replica a-1", "1 min"):
        assert text in row
    cache.leased.clear()
    assert "may be evicted again" in said("unpin", URL)
    assert said("evict", URL) == f"Evicted: {URL} 0123456789ab, 3.0 MB freed.\n"


@pytest.mark.parametrize(
    ("name", "model", "says"),
    [
        ("prepared://3fe29c81d0e4", "prepared://3fe29c81d0e4", None),
        ("chat", "hf://org/small", None),
        ("other-name", "hf://org/small", None),
        ("Qwen/Qwen3-8B", "hf://Qwen/Qwen3-8B", None),
        ("hf://org/name@v1", "hf://org/name", None),
        ("s3://bucket/prefix/", "s3://bucket/prefix", None),
        ("here/model", "{here}/here/model", None),
        ("./here/model", "{here}/here/model", None),
        ("./nowhere", "", "there is no directory ./nowhere"),
        ("ftp://x/y", "", "unknown scheme 'ftp'"),
        ("https://user:secret@host/x", "", "carries no user or password"),
        ("just-a-word", "", "neither a URL"),
        ("just-a-word", "", "nor a pool (known here: chat, toy)"),
        ("toy", "", "pool 'toy': its engine loads no weights"),
        ("", "", "model: it is empty"),
        (" ", "", "model: it is empty"),
    ],
)
def test_what_a_model_may_be_called(
    here: Callable[..., int],
    cache: FakeCache,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    model: str,
    says: str | None,
) -> None:
    (tmp_path / "here" / "model").mkdir(parents=True)
    Path("tidegate.toml").write_text(
        '[[pools]]\nname = "chat"\naliases = ["other-name"]\nengine = "vllm"\n'
        'model = "hf://org/small"\n'
        '[[pools]]\nname = "toy"\nengine = "simulated"\nmodel = "toy"\n'
    )
    code = here("preload", name)
    err = capsys.readouterr().err
    if says is None:
        assert code == 0, err
        assert cache.calls[-1][1] == model.format(here=tmp_path)
    else:
        assert code == 2
        assert says in err
        assert "secret" not in err
        assert err.count("\n") == 1
        assert cache.calls == []


def test_nobody_at_the_address_is_exit_code_2(
    here: Callable[..., int], cache: FakeCache, capsys: pytest.CaptureFixture[str]
) -> None:
    for verb in ("preload", "pin"):
        assert here(verb, URL, "--admin", "http://127.0.0.1:1") == 2
        assert "nothing answers at http://127.0.0.1:1" in capsys.readouterr().err
    assert here("ls", "--admin", "::") == 2
    assert cache.calls == []


def test_ctrl_c_cancels_it_and_waits_for_that(here: Callable[..., int], cache: FakeCache) -> None:
    cache.go.clear()

    def interrupt() -> None:
        if cache.begun.wait(30):
            os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    assert here("preload", URL) == 130
    thread.join()
    assert cache.left.is_set()
    assert cache.models == {}


def test_an_interrupt_that_a_cleanup_turns_into_another_error_is_an_interrupt(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def run() -> int:
        try:
            raise KeyboardInterrupt
        finally:
            threading.Lock().release()

    assert main.guard(run) == 130
    assert capsys.readouterr().err == ""


def test_a_cancelled_one_is_no_traceback(
    here: Callable[..., int], cache: FakeCache, capsys: pytest.CaptureFixture[str]
) -> None:
    cache.errors[URL] = Cancelled("called off")
    assert here("preload", URL) == 1
    assert capsys.readouterr().err == "tidegate: called off\n"
