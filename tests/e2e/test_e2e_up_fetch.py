"""Pools whose model has a URL: fetched by the first request, held while in use, given up when
no request comes for long enough."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Iterator
from contextlib import suppress

import httpx
import pytest
from asking import CHAT, ask_now, chat, run, spawn, text_of
from object_server import Handler, IndexedServer, serving
from tidegate_process import Tidegate, simulated, up

from gateway.compose.cache import open_cache
from gateway.settings.schema import Settings

PIECE_BYTES = 8 * 1024 * 1024
PROBE_BYTES = 100
SIZE_BYTES = 2 * PIECE_BYTES + 1_000_000


class Store(IndexedServer):
    """A store that keeps all but the first piece of a file back while its gate is shut."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()
        self.gate.set()
        self.fault = self.wait

    def wait(self, handler: Handler, path: str, data: bytes) -> bool:
        wanted = handler.wanted(len(data))
        # A few bytes from the middle are how a listing finds out whether ranges are given.
        if wanted is not None and wanted[0] >= PIECE_BYTES and wanted[1] - wanted[0] > PROBE_BYTES:
            self.gate.wait()
        return False

    def whole_reads(self, name: str) -> int:
        """How often the last byte of a file was read."""
        return sum(path.endswith(name) for _, path, headers in self.reads())


@pytest.fixture(scope="module")
def store() -> Iterator[Store]:
    with serving(Store()) as server:
        assert isinstance(server, Store)
        for name in ("told", "cold", "off", "two"):
            server.objects[f"{name}/config.json"] = b"{}"
            server.objects[f"{name}/model.safetensors"] = name.encode() * (SIZE_BYTES // len(name))
        yield server
        server.gate.set()


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory, store: Store) -> Iterator[Tidegate]:
    def url(name: str) -> str:
        return f"{store.url}/{name}/"

    nothing = {"paged_s": 0, "forked_s": 0, "on_disk_s": 0.5}
    pools = [
        simulated("told", model=url("told")),
        simulated("cold", model=url("cold"), idle_to_zero_s=0.5, tiers=nothing),
        simulated("off", model=url("off")),
        simulated("two", model=url("two"), max_replicas=2),
        simulated("gone", model=url("gone")),
    ]
    autoscaler = {"scale_down_delay_s": 0, "stable_window_s": 1, "panic_window_s": 0.5}
    gateway = {"holding": {"keepalive_s": 0.2, "deadline_s": 60}}
    place = tmp_path_factory.mktemp("fetch")
    with up(place, pools=pools, autoscaler=autoscaler, gateway=gateway) as tidegate:
        tidegate.expected_log.append("preparation of gone")
        yield tidegate


@pytest.fixture
def tidegate(running: Tidegate, store: Store) -> Iterator[Tidegate]:
    yield running
    store.gate.set()
    running.assert_at_rest()


def leases(tidegate: Tidegate, url: str) -> tuple[str, ...]:
    node = open_cache(Settings(state_dir=tidegate.state_dir), os.environ)
    return tuple(holder for one in node.cache.ls() if one.url == url for holder in one.leases)


def test_who_waits_is_told_how_far_the_model_is(tidegate: Tidegate, store: Store) -> None:
    store.gate.clear()
    assert tidegate.pool("told")["tier"] == "remote"

    async def story(http: httpx.AsyncClient) -> list[str]:
        async with http.stream("POST", CHAT, json=chat("told", stream=True)) as answer:
            lines = []
            async for line in answer.aiter_lines():
                lines.append(line)
                if "(fetching 8.4 of " in line and not store.gate.is_set():
                    await asyncio.to_thread(look)
                    store.gate.set()
            return lines

    def look() -> None:
        (replica,) = tidegate.pool("told")["replicas"]
        assert (replica["state"], replica["step"]) == ("starting", "fetching")
        assert replica["phase"].startswith("fetching 8.4 of 17.8 MB")
        assert replica["progress"]["bytes_total"] == SIZE_BYTES // 4 * 4 + 2
        metrics = tidegate.metrics()
        assert metrics.sum("tidegate_starting_replicas", pool="told", step="fetching") == 1
        assert metrics.sum("tidegate_prepared_bytes", pool="told") >= PIECE_BYTES
        assert metrics.sum("tidegate_prepare_bytes", pool="told") > SIZE_BYTES - 10

    lines = run(tidegate, story)
    assert store.gate.is_set(), lines
    assert "data: [DONE]" in lines
    (replica,) = tidegate.pool("told")["replicas"]
    assert replica["woken_from"] == "remote"
    assert leases(tidegate, f"{store.url}/told/") == ("told-1",)
    assert not tidegate.metrics().has("tidegate_prepared_bytes", pool="told")


def test_two_replicas_are_one_download(tidegate: Tidegate, store: Store) -> None:
    tidegate.admin("/pools/two/scale", {"replicas": 2})
    tidegate.wait_ready("two", 2)
    reads = store.whole_reads("/two/model.safetensors")
    assert set(leases(tidegate, f"{store.url}/two/")) >= {"two-1", "two-2"}
    tidegate.admin("/pools/two/scale", {"replicas": 1})
    tidegate.wait_ready("two", 1)
    tidegate.wait("one lease", lambda: len(leases(tidegate, f"{store.url}/two/")) == 1)
    tidegate.admin("/pools/two/scale", {"replicas": 2})
    tidegate.wait_ready("two", 2)
    assert store.whole_reads("/two/model.safetensors") == reads


def test_a_model_nobody_asks_for_is_given_up_and_fetched_again(
    tidegate: Tidegate, store: Store
) -> None:
    def blobs() -> list[str]:
        return [
            os.path.join(folder, name)
            for folder, _, names in os.walk(tidegate.state_dir / "cache")
            for name in names
            if is_cold(os.path.join(folder, name))
        ]

    def is_cold(path: str) -> bool:
        with suppress(FileNotFoundError), open(path, "rb") as file:  # the cache is at work on them
            return b"coldcold" in file.read(100)
        return False

    tidegate.admin("/pools/cold/scale", {"replicas": 1})  # so that it stays while we look
    text_of(ask_now(tidegate, chat("cold")))
    assert blobs()
    tidegate.admin("/pools/cold/scale", {"replicas": None})
    tidegate.wait_at_zero("cold")
    tidegate.wait("remote", lambda: tidegate.pool("cold")["tier"] == "remote")
    tidegate.wait("its bytes gone", lambda: not blobs())
    text_of(ask_now(tidegate, chat("cold")))
    assert tidegate.starts("cold") == 2


def test_an_operator_calls_a_download_off(tidegate: Tidegate, store: Store) -> None:
    store.gate.clear()

    async def story(http: httpx.AsyncClient) -> None:
        waiting = spawn(http.post(CHAT, json=chat("off")))

        def is_fetching() -> bool:
            replicas = tidegate.pool("off")["replicas"]
            return any(one["step"] == "fetching" for one in replicas)

        await asyncio.to_thread(tidegate.wait, "a download", is_fetching)
        waiting.cancel()

    run(tidegate, story)
    tidegate.admin("/pools/off/scale", {"replicas": 0})
    tidegate.wait_at_zero("off")
    assert tidegate.starts("off") == 0
    # What it held is let go after it is gone from the status.
    tidegate.wait("no lease", lambda: leases(tidegate, f"{store.url}/off/") == ())
    store.gate.set()
    text_of(ask_now(tidegate, chat("off")))


def test_a_model_that_is_not_there_says_so(tidegate: Tidegate, store: Store) -> None:
    tidegate.admin("/pools/gone/scale", {"replicas": 1})
    pool = tidegate.wait("a failure", lambda: (p := tidegate.pool("gone"))["failures"] and p)
    assert "gone" in pool["error"]
    assert tidegate.starts("gone") == 0
    tidegate.admin("/pools/gone/scale", {"replicas": 0})
    tidegate.wait_at_zero("gone")
