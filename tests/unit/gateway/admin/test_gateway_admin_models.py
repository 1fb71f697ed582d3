"""``/models…`` of the admin listener: each verb, its progress, its errors, and being left."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from admin_rig import ServedAdmin
from fake_cache import REVISION, SIZE_BYTES, FakeCache, fake_models
from safetensors_files import header, layout

from autoscaler.settings import PoolSettings
from gateway.admin.models import error_of
from modelcache.store.lookup import Ambiguous
from modelcache.types import (
    CacheError,
    Cancelled,
    Damaged,
    InUse,
    NoSpace,
    NotFound,
    Priority,
    SourceError,
)

URL = "hf://org/name"


class Served(ServedAdmin):
    """A real admin listener over a model cache."""

    def post(self, verb: str, **body: Any) -> httpx.Response:
        return self.http.post(f"/models/{verb}", json=body)

    def lines(self, verb: str, **body: Any) -> list[dict[str, Any]]:
        answer = self.post(verb, **body)
        assert answer.status_code == 200, answer.text
        assert answer.headers["content-type"] == "application/x-ndjson"
        return [json.loads(line) for line in answer.text.splitlines()]


@pytest.fixture
def cache(tmp_path: Path) -> FakeCache:
    return FakeCache(tmp_path)


@pytest.fixture
def served(cache: FakeCache) -> Iterator[Served]:
    with Served(models=fake_models(cache, {"eu": "", "us": "no answer"})) as one:
        yield one


def test_preload_tells_its_progress_and_its_result(served: Served, cache: FakeCache) -> None:
    cache.go.clear()
    with served.http.stream("POST", "/models/preload", json={"model": URL}) as answer:
        lines = (json.loads(line) for line in answer.iter_lines())
        progress = next(line["progress"] for line in lines if line["progress"]["bytes_done"])
        assert (progress["phase"], progress["bytes_total"]) == ("fetching", SIZE_BYTES)
        cache.go.set()
        *_, last = lines
    result = last["result"]
    assert result["elapsed_s"] >= 0
    assert {name: result[name] for name in ("verb", "model", "revision", "files")} == {
        "verb": "preload",
        "model": URL,
        "revision": REVISION,
        "files": 1,
    }
    assert result["size_bytes"] == SIZE_BYTES
    assert result["was_there"] is False
    assert served.lines("preload", model=URL)[-1]["result"]["was_there"] is True
    assert cache.calls[0] == ("preload", URL, None, Priority.PRELOAD, None)


def test_a_client_that_leaves_calls_it_off(served: Served, cache: FakeCache) -> None:
    cache.go.clear()
    with served.http.stream("POST", "/models/preload", json={"model": URL}) as answer:
        lines = answer.iter_lines()
        next(lines)
        assert cache.begun.wait(30)
    assert cache.left.wait(30)
    assert cache.models == {}


def test_prewarm_preloads_first_and_reads_the_weights(served: Served, cache: FakeCache) -> None:
    result = served.lines("prewarm", model=URL)[-1]["result"]
    assert [call[0] for call in cache.calls] == ["preload", "prewarm"]
    assert cache.calls[-1] == ("prewarm", ["model.safetensors"])
    assert result["pages"]["after"]["bytes_cached"] == 1000
    served.lines("prewarm", model=URL)
    assert [call[0] for call in cache.calls] == ["preload", "prewarm", "prewarm"]


def test_prewarm_of_one_rank_reads_only_its_bytes(
    served: Served, cache: FakeCache, tmp_path: Path
) -> None:
    rows = [
        ("model.layers.0.mlp.up_proj.weight", "U8", (8, 100), 800),
        ("model.norm.weight", "U8", (50,), 50),
    ]
    data = header(layout(rows)) + bytes(850)
    served.lines("preload", model=URL)
    file = cache.models[URL].path / "model.safetensors"
    file.write_bytes(data)
    start = len(data) - 850
    served.lines("prewarm", model=URL, rank=1, world_size=2)
    assert cache.ranges == [(0, start), (start + 400, start + 800), (start + 800, start + 850)]
    for body, says in (({"rank": 2, "world_size": 2}, "rank"), ({"rank": 1}, "world_size - 1 = 0")):
        error = served.lines("prewarm", model=URL, **body)[-1]["error"]
        assert (error["code"], says in error["message"]) == ("bad_value", True)
    error = served.lines("prewarm", model=URL, rank=0, world_size=3)[-1]["error"]
    assert "cannot be cut into 3" in error["message"]
    assert served.post("prewarm", model=URL, rank=1.5).status_code == 400


def test_pin_unpin_evict_and_the_listing(served: Served, cache: FakeCache) -> None:
    served.lines("preload", model=URL, revision="main", expected_use_at_s=12)
    assert cache.calls[-1] == ("preload", URL, "main", Priority.PRELOAD, 12.0)
    assert served.post("pin", model=URL).json()["pinned"] is True
    listing = served.http.get("/models").json()
    assert listing["dir"] == str(cache.dir)
    assert listing["usage"]["bytes_used"] == SIZE_BYTES
    (entry,) = listing["models"]
    assert (entry["url"], entry["tier"], entry["pinned"]) == (URL, "on_disk", True)
    refused = served.post("evict", model=URL)
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "model_in_use")
    assert refused.headers["x-tidegate-reason"] == "model_in_use"
    assert served.post("evict", model=URL, force=True).json()["freed_bytes"] == SIZE_BYTES
    gone = served.post("unpin", model=URL)
    assert (gone.status_code, gone.json()["error"]["code"]) == (404, "model_not_found")


@pytest.mark.parametrize("repair", [False, True])
def test_verify(served: Served, cache: FakeCache, repair: bool) -> None:
    served.lines("preload", model=URL)
    assert served.lines("verify", model=URL)[-1]["result"]["damage"] == []
    cache.damaged.add(URL)
    result = served.lines("verify", model=URL, repair=repair)[-1]["result"]
    (damage,) = result["damage"]
    assert (damage["path"], damage["piece"]) == ("model.safetensors", 2)
    assert result["revision"] == REVISION
    assert result["repaired"] is repair


def test_replicate_to_all_sites_or_those_named(served: Served, cache: FakeCache) -> None:
    sites = served.lines("replicate", model=URL)[-1]["result"]["sites"]
    assert {name: (one["done"], one["error"]) for name, one in sites.items()} == {
        "eu": (True, None),
        "us": (False, "no answer"),
    }
    served.lines("replicate", model=URL, sites=["eu"])
    assert cache.calls[-1] == ("replicate", URL, None, ("eu",))
    error = served.lines("replicate", model=URL, sites=["moon"])[-1]["error"]
    assert (error["status"], error["code"]) == (400, "bad_value")
    assert "'moon'" in error["message"]


@pytest.mark.parametrize(
    ("verb", "body", "param"),
    [
        ("preload", {}, "model"),
        ("preload", {"model": 5}, "model"),
        ("preload", {"model": URL, "revision": 1}, "revision"),
        ("preload", {"model": URL, "force": True}, "force"),
        ("preload", {"model": URL, "expected_use_at_s": "soon"}, "expected_use_at_s"),
        ("evict", {"model": URL, "force": "yes"}, "force"),
        ("evict", {"model": URL, "all": 1}, "all"),
        ("preload", {"model": " "}, "model"),
        ("preload", {"model": "just-a-word"}, "model"),
        ("pin", {"model": "ftp://x/y"}, "model"),
        ("verify", {"model": URL, "repair": 1}, "repair"),
        ("replicate", {"model": URL, "sites": "eu"}, "sites"),
    ],
)
def test_a_body_that_is_not_right_is_400_and_names_the_field(
    served: Served, cache: FakeCache, verb: str, body: dict[str, Any], param: str
) -> None:
    answer = served.post(verb, **body)
    error = answer.json()["error"]
    code = "unknown_field" if param == "force" and verb == "preload" else "bad_value"
    assert (answer.status_code, error["code"], error["param"]) == (400, code, param)
    assert cache.calls == []


def test_a_pool_s_name_stands_for_its_model(cache: FakeCache) -> None:
    given = {"name": "chat", "aliases": ("small",), "engine": "vllm", "model": "hf://org/name"}
    pool = PoolSettings.model_validate(given)
    with Served(models=replace(fake_models(cache), pools=lambda: (pool,))) as served:
        assert served.lines("preload", model="chat")[-1]["result"]["model"] == URL
        assert served.post("pin", model="small").json()["model"] == URL
        assert served.http.get("/models").json()["pools"] == [
            "chat", "small",
        ]  # fmt: skip


def test_an_error_of_a_slow_verb_is_its_last_line(served: Served, cache: FakeCache) -> None:
    cache.errors = {URL: NoSpace("3 GB are wanted, 1 GB is free"), "hf://a/b": KeyError("ours")}
    error = served.lines("preload", model=URL)[-1]["error"]
    assert (error["code"], error["status"]) == ("no_space", 507)
    assert error["message"] == "3 GB are wanted, 1 GB is free"
    fault = served.lines("preload", model="hf://a/b")[-1]["error"]
    assert (fault["status"], fault["code"]) == (500, "internal_error")
    assert "ours" not in fault["message"]


def test_slow_verbs_at_once_have_a_bound(cache: FakeCache) -> None:
    with Served(models=fake_models(cache), max_slow=1) as served:
        check_slow_verbs(served, cache)


def check_slow_verbs(served: Served, cache: FakeCache) -> None:
    cache.go.clear()
    with served.http.stream("POST", "/models/preload", json={"model": URL}) as answer:
        lines = answer.iter_lines()
        next(lines)
        refused = served.post("verify", model=URL)
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "too_many")
        assert refused.headers["retry-after"]
        assert served.post("pin", model=URL).status_code == 404  # quick ones go on
        cache.go.set()
        assert [line for line in lines if '"result"' in line]
    deadline_s = time.monotonic() + 30
    while served.post("verify", model=URL).status_code != 200:
        assert time.monotonic() < deadline_s
        time.sleep(0.02)


def test_a_page_of_another_site_cannot_preload(served: Served, cache: FakeCache) -> None:
    for headers in ({"origin": "https://evil.example"}, {"content-type": "text/plain"}):
        answer = served.http.post(
            "/models/preload",
            content=json.dumps({"model": URL}),
            headers=headers,
        )
        assert answer.status_code in (403, 415)
    assert cache.calls == []


@pytest.mark.parametrize(
    ("problem", "status", "reason"),
    [
        (NotFound("x"), 404, "model_not_found"),
        (SourceError("x"), 502, "source_failed"),
        (InUse("x"), 409, "model_in_use"),
        (NoSpace("x"), 507, "no_space"),
        (Damaged("x"), 500, "model_damaged"),
        (Cancelled("x"), 499, "cancelled"),
        (CacheError("x"), 500, "cache_failed"),
        (OSError("x"), 500, "cache_failed"),
        (Ambiguous("x"), 400, "bad_value"),
        (ValueError("x"), 400, "bad_value"),
    ],
)
def test_every_error_of_the_cache_has_a_reason(
    problem: Exception, status: int, reason: str
) -> None:
    error = error_of(problem)
    assert error is not None
    assert (error.status, error.code, str(error)) == (status, reason, "x")
    assert error_of(KeyError("x")) is None
