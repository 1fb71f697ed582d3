"""Other sites fetch what they are asked to, tell how far they are, and a lost one fails alone."""

from __future__ import annotations

import asyncio
import secrets
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from swarm_rig import TOKEN

from modelcache.fetch.transfer import Transfer
from modelcache.peers.client import PeerClient
from modelcache.peers.group import PeerGroup
from modelcache.peers.piece_inventory import PieceInventory
from modelcache.peers.replicate import Outcome, make_replicator, replicate
from modelcache.peers.wire import Keyring
from modelcache.serving import Serving, describe, run_agent, start_serving
from modelcache.settings import ModelCacheSettings
from modelcache.types import (
    CacheError,
    Cancelled,
    FileEntry,
    Manifest,
    NotFound,
    Priority,
    Progress,
)

URL = "s3://models/qwen"


@dataclass(frozen=True)
class Cached:
    revision: str
    manifest: Manifest | None


@dataclass
class SlowCache:
    """Has a model once the test lets it."""

    go: threading.Event = field(default_factory=threading.Event)
    error: CacheError | None = None
    asked: list[tuple[str, str | None, Priority]] = field(default_factory=list)
    called_off: threading.Event = field(default_factory=threading.Event)

    def preload(
        self,
        url: str,
        *,
        revision: str | None = None,
        priority: Priority = Priority.PRELOAD,
        on_progress: Callable[[Progress], None] | None = None,
        cancelled: Callable[[], bool] | None = None,
    ) -> Cached:
        self.asked.append((url, revision, priority))
        assert on_progress is not None
        assert cancelled is not None
        on_progress(Progress(phase="fetching", bytes_done=30, bytes_total=100))
        while not self.go.wait(0.02):
            if cancelled():
                self.called_off.set()
                raise Cancelled("called off")
        if self.error is not None:
            raise self.error
        entry = FileEntry(path="w", size_bytes=100, digest="d")
        return Cached("abc", Manifest(url=url, revision="abc", files=(entry,), created_at_s=0.0))


@dataclass
class Site:
    cache: SlowCache
    serving: Serving

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.serving.port}"

    def client(self, token: str = TOKEN) -> PeerClient:
        return PeerClient(self.url, Keyring(token), secrets.token_hex(16))


@pytest.fixture
def sites(tmp_path: Path) -> Iterator[Callable[..., Site]]:
    made: list[Site] = []

    def make(port: int = 0) -> Site:
        cache = SlowCache()
        group = PeerGroup((), TOKEN, inventory=PieceInventory())
        serving = start_serving(ModelCacheSettings(peer_port=port), group, cache, look_s=0.05)
        assert serving is not None
        made.append(Site(cache, serving))
        return made[-1]

    yield make
    for site in made:
        site.cache.go.set()
        site.serving.close()


def never() -> bool:
    return False


def test_every_site_fetches_it_and_says_what_it_has(sites: Callable[..., Site]) -> None:
    eu, us = sites(), sites()
    seen: list[Progress] = []

    def note(progress: Progress) -> None:
        seen.append(progress)
        if progress.bytes_done == 60:
            eu.cache.go.set()
            us.cache.go.set()

    outcomes = replicate(
        URL, "main", {"eu": eu.client(), "us": us.client()}, on_progress=note, cancelled=never
    )
    assert outcomes == {
        name: Outcome(site=name, done=True, revision="abc", size_bytes=100) for name in ("eu", "us")
    }
    assert eu.cache.asked == [(URL, "main", Priority.REPLICATE)]
    assert any(one.bytes_total == 200 and "eu: 30%" in one.detail for one in seen)
    assert "us: done" in seen[-1].detail


def test_one_sites_failure_is_its_own(sites: Callable[..., Site]) -> None:
    eu, us = sites(), sites()
    us.cache.error = NotFound("there is no such model")
    for site in (eu, us):
        site.cache.go.set()
    outcomes = replicate(
        URL, None, {"eu": eu.client(), "us": us.client()}, on_progress=lambda p: None,
        cancelled=never,
    )  # fmt: skip
    assert outcomes["eu"].done
    assert outcomes["us"] == Outcome(site="us", done=False, error="there is no such model")


def test_asking_twice_joins_what_is_under_way(sites: Callable[..., Site]) -> None:
    eu = sites()
    found: list[dict[str, Outcome]] = []
    joined = threading.Barrier(4, timeout=60)

    def ask() -> None:
        told: list[int] = []

        def note(progress: Progress) -> None:
            # It tells of bytes only when it has been told of them: it has joined.
            if progress.bytes_done and not told:
                told.append(progress.bytes_done)
                joined.wait()

        found.append(replicate(URL, None, {"eu": eu.client()}, on_progress=note, cancelled=never))

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    joined.wait()
    eu.cache.go.set()
    for thread in threads:
        thread.join(60)
    assert [one["eu"].done for one in found] == [True] * 3
    assert len(eu.cache.asked) == 1


def test_a_site_that_cannot_be_reached_is_given_up_on() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    client = PeerClient(f"http://127.0.0.1:{port}", Keyring(TOKEN), "a" * 32)
    seen: list[Progress] = []
    outcomes = replicate(
        URL, None, {"eu": client}, on_progress=seen.append, cancelled=never, give_up_s=0.5
    )
    assert not outcomes["eu"].done
    assert str(port) in (outcomes["eu"].error or "")
    waiting = f"eu: waiting (http://127.0.0.1:{port}: "
    assert any(one.detail.startswith(waiting) for one in seen), "why it waits"


def test_an_agent_that_was_started_anew_is_asked_again(sites: Callable[..., Site]) -> None:
    eu = sites()
    url = eu.url
    anew: list[Site] = []

    def note(progress: Progress) -> None:
        if progress.bytes_done and not anew:
            eu.serving.close()
            assert eu.cache.called_off.wait(60)
            anew.append(sites(eu.serving.port))
            anew[0].cache.go.set()

    client = PeerClient(url, Keyring(TOKEN), "a" * 32)
    outcomes = replicate(URL, None, {"eu": client}, on_progress=note, cancelled=never)
    assert outcomes["eu"].done
    assert len(anew[0].cache.asked) == 1


def test_called_off_the_sites_go_on(sites: Callable[..., Site]) -> None:
    eu = sites()
    called_off = threading.Event()

    def note(progress: Progress) -> None:
        if progress.bytes_done:
            called_off.set()

    with pytest.raises(Cancelled):
        replicate(URL, None, {"eu": eu.client()}, on_progress=note, cancelled=called_off.is_set)
    assert not eu.cache.called_off.is_set()
    eu.cache.go.set()
    again = replicate(URL, None, {"eu": eu.client()}, on_progress=lambda p: None, cancelled=never)
    assert again["eu"].done


def test_a_stranger_gives_no_orders(sites: Callable[..., Site]) -> None:
    eu = sites()
    stranger = eu.client("another cluster's secret")
    outcomes = replicate(URL, None, {"eu": stranger}, on_progress=lambda p: None, cancelled=never)
    assert not outcomes["eu"].done
    assert not eu.cache.asked


@pytest.mark.parametrize("url", ["/etc", "file:///etc", "./model"])
def test_a_path_is_not_ordered_anywhere(url: str, sites: Callable[..., Site]) -> None:
    eu = sites()
    with pytest.raises(ValueError, match="another directory at another site"):
        replicate(url, None, {"eu": eu.client()}, on_progress=lambda p: None, cancelled=never)
    client = eu.client()
    client.hello(never)
    with pytest.raises(CacheError, match="another directory at another site"):
        client.tell("/v1/replicate", {"model": url}, 10.0, never)
    assert not eu.cache.asked


def test_sites_are_named_in_the_settings_and_need_the_secret(sites: Callable[..., Site]) -> None:
    eu = sites()
    eu.cache.go.set()
    settings = ModelCacheSettings(sites={"eu": eu.url})
    run = make_replicator(settings, {"TIDEGATE_PEER_TOKEN": TOKEN})
    assert run(URL, None, ["eu"], lambda p: None, never)["eu"].done
    with pytest.raises(ValueError, match=r"'mars' is not in modelcache\.sites"):
        run(URL, None, ["mars"], lambda p: None, never)
    with pytest.raises(CacheError, match="TIDEGATE_PEER_TOKEN"):
        make_replicator(settings, {})(URL, None, ["eu"], lambda p: None, never)
    with pytest.raises(ValueError, match=r"TIDEGATE_PEER_TOKEN.* 16 characters"):
        make_replicator(settings, {"TIDEGATE_PEER_TOKEN": "short"})(
            URL, None, ["eu"], lambda p: None, never
        )


# -- the agent -----------------------------------------------------------------------------------


def test_an_agent_serves_until_it_is_stopped(tmp_path: Path) -> None:
    group = PeerGroup((), TOKEN, inventory=PieceInventory())
    cache = SlowCache()
    seen: list[str] = []
    greeted = asyncio.Event()

    async def admin(stop: asyncio.Event) -> None:
        (serving,) = served
        client = PeerClient(f"http://127.0.0.1:{serving.port}", Keyring(TOKEN), "a" * 32)
        seen.append(await asyncio.to_thread(client.hello, never))
        client.close()
        greeted.set()
        await stop.wait()

    served: list[Serving] = []

    async def run() -> None:
        stop = asyncio.Event()
        running = asyncio.create_task(
            run_agent(ModelCacheSettings(peer_port=0), cache=cache, peers=group, serve_admin=admin,
                      stop=stop, on_serving=served.append)
        )  # fmt: skip
        await greeted.wait()
        stop.set()
        await running

    asyncio.run(run())
    assert len(seen[0]) == 32
    with (
        pytest.raises(ConnectionRefusedError),
        socket.create_connection(("127.0.0.1", served[0].port)),
    ):
        pass


def test_an_agent_that_would_give_nothing_says_what_is_missing() -> None:
    async def run() -> None:
        await run_agent(
            ModelCacheSettings(),
            cache=SlowCache(),
            peers=None,
            serve_admin=lambda stop: asyncio.sleep(0),
            stop=asyncio.Event(),
        )

    with pytest.raises(CacheError, match=r"modelcache\.peer_port"):
        asyncio.run(run())


def test_an_address_that_is_taken_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        group = PeerGroup((), TOKEN, inventory=PieceInventory())
        with pytest.raises(CacheError, match=f"modelcache.peer_port {port}: Address"):
            start_serving(ModelCacheSettings(peer_port=port), group, SlowCache())


def test_what_was_read_and_given_is_described() -> None:
    told = describe(None, Transfer(ModelCacheSettings()))
    assert told == {
        "store_bytes": 0, "peer_bytes": 0, "wasted_bytes": 0, "retries": 0, "peer_failures": 0,
        "sent_bytes": 0, "peers": [],
    }  # fmt: skip
    group = PeerGroup(("http://10.0.0.1:8002",), TOKEN, inventory=PieceInventory())
    (peer,) = describe(group, Transfer(ModelCacheSettings(), peers=group))["peers"]
    assert peer["url"] == "http://10.0.0.1:8002"
    assert peer["reached"] is False
