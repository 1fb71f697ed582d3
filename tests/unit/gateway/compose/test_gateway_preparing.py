"""Preparation steps as a replica asks for them: what they made is held as long as it is used."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from fake_cache import NO_PAGES
from folder_store import Rig

from gateway.admin.models import Models
from gateway.admin.operations import VERBS
from gateway.compose.cache import make_transform
from gateway.settings.schema import Settings
from modelcache.cache import ModelCache
from modelcache.ports import CachedModel, Transform
from modelcache.store.leases import Lease
from modelcache.types import InUse, ModelEntry, Progress

WRITE = "import pathlib; pathlib.Path('made').write_bytes(b'made' * 5000)"
WRITE_WEIGHTS = WRITE.replace("'made')", "'made.safetensors')")
COPY = "shutil.copy(os.environ['TIDEGATE_INPUT'] + '/made', 'made')"
URL = "s3://models/m"


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    return Rig(root=tmp_path)


def transform_in(
    cache: ModelCache, model: str, *programs: str, environ: Mapping[str, str] | None = None
) -> Transform:
    steps = [
        {"kind": "command", "argv": [sys.executable, "-c", program]}
        for program in programs or (WRITE,)
    ]
    settings = Settings.model_validate({"modelcache": {"steps": {model: steps}}})
    transform = make_transform(settings, cache, environ or {})
    assert transform is not None
    return transform


def run(models: Models, verb: str, body: dict[str, Any], **watch: Any) -> Any:
    request: Any = VERBS[verb].request
    return models.run(verb, request.model_validate(body), **watch)


def silent(progress: Progress) -> None:
    return None


def never() -> bool:
    return False


def holders(cache: ModelCache) -> dict[str, tuple[str, ...]]:
    """Who holds the model and its result."""
    return {"result" if entry.made else "model": entry.leases for entry in cache.ls()}


def test_a_result_is_held_by_each_who_uses_it(rig: Rig) -> None:
    cache = rig.cache()
    rig.put("models/m", {"weights": b"weights"})
    transform = transform_in(cache, URL)
    model = cache.preload(URL)
    seen: list[dict[str, tuple[str, ...]]] = []
    with ExitStack() as first, ExitStack() as second:
        made = first.enter_context(
            transform(URL, model, "m-1", lambda _: seen.append(holders(cache)), never)
        )
        assert (made.path / "made").read_bytes() == b"made" * 5000
        assert seen[0]["model"] == ("preparation for m-1",), "what steps read stays meanwhile"
        assert holders(cache) == {"model": (), "result": ("m-1",)}
        again = second.enter_context(transform(URL, model, "m-2", silent, never))
        assert again.path == made.path
        assert holders(cache)["result"] == ("m-1", "m-2")
        with cache.lease(made, "m, at zero"):
            first.close()
            second.close()
            with pytest.raises(InUse, match="is leased by m, at zero"):
                cache.evict(URL)
    assert holders(cache) == {"model": (), "result": ()}
    cache.evict(URL)
    assert cache.ls() == []


def test_a_step_has_no_secret_of_ours_and_imports_nothing_from_where_it_works(rig: Rig) -> None:
    cache = rig.cache()
    rig.put("models/m", {"weights": b"weights"})
    program = (
        "import sys, os, pathlib; "
        "pathlib.Path('made').write_text(' '.join([str(sys.flags.safe_path), *os.environ]))"
    )
    environ = {"TIDEGATE_PEER_TOKEN": "x", "VLLM_PORT": "tcp://10.0.0.1:80", "MINE": "x"}
    model = cache.preload(URL)
    with transform_in(cache, URL, program, environ=environ)(
        URL, model, "m-1", silent, never
    ) as made:
        safe_path, *names = (made.path / "made").read_text().split()
    assert safe_path == "True"
    assert {*names} & {*environ} == {"MINE"}


def test_a_model_without_steps_is_what_was_fetched(rig: Rig) -> None:
    cache = rig.cache()
    rig.put("models/m", {"weights": b"weights"})
    model = cache.preload(URL)
    with transform_in(cache, "s3://models/other")(URL, model, "m-1", silent, never) as same:
        assert same is model


def test_a_directory_s_result_is_of_that_directory(rig: Rig, tmp_path: Path) -> None:
    cache = rig.cache()
    folder = tmp_path / "plain"
    folder.mkdir()
    (folder / "weights").write_bytes(b"weights")
    there = CachedModel.in_place(folder)
    with transform_in(cache, str(folder))(str(folder), there, "m-1", silent, never) as made:
        (entry,) = cache.ls()
        assert (entry.url, entry.leases) == (made.url, ("m-1",))
        assert entry.made is not None
        assert (entry.made.model, entry.made.steps) == (str(folder), ("command",))
    cache.evict(str(folder))
    assert cache.ls() == []


def test_a_revision_that_is_no_longer_the_newest_is_still_what_it_was(rig: Rig) -> None:
    cache = rig.cache()
    rig.put("models/m", {"weights": b"weights"})
    transform = transform_in(cache, URL)
    older = cache.preload(URL)
    rig.put("models/m", {"weights": b"other"})
    cache.preload(URL)
    with transform(URL, older, "m-1", silent, never) as made:
        assert (made.path / "made").is_file()
        entry = result_in(cache)
        assert entry.made is not None
        assert (entry.made.model, entry.made.revision) == (URL, older.revision)


def result_in(cache: ModelCache) -> ModelEntry:
    (entry,) = (entry for entry in cache.ls() if entry.made is not None)
    return entry


@pytest.mark.parametrize("verb", ["preload", "prewarm"])
def test_what_is_asked_for_by_its_revision_is_what_steps_begin_with(rig: Rig, verb: str) -> None:
    cache = rig.cache()
    rig.put("models/m", {"weights.safetensors": b"weights"})
    older = cache.preload(URL)
    rig.put("models/m", {"weights.safetensors": b"other"})
    newer = cache.preload(URL)
    transform = transform_in(cache, URL, WRITE_WEIGHTS)
    models = Models(
        cache=cache, prewarm=lambda *_: NO_PAGES, replicate=lambda *_: {}, transform=transform
    )
    seen: list[tuple[str, ...]] = []

    def look(progress: Progress) -> None:
        seen.extend(entry.leases for entry in cache.ls() if entry.revision == older.revision)

    told = run(models, verb, {"model": URL, "revision": older.revision}, on_progress=look)
    assert (f"preparation for {verb}",) in seen, "what steps read stays meanwhile"
    with transform(URL, older, "m-1", silent, never) as made:
        assert told.prepared == str(made.path), "what the pool needs, made once"
    run(models, "pin", {"model": URL, "revision": older.revision})
    assert result_in(cache).pinned
    run(models, "unpin", {"model": URL})
    run(models, "evict", {"model": URL, "revision": older.revision})
    assert [(entry.url, entry.revision) for entry in cache.ls()] == [(URL, newer.revision)]


class WithLease:
    """A cache whose leases are the test's to give."""

    def __init__(self, cache: ModelCache, lease: Callable[[CachedModel, str], Lease]) -> None:
        self._cache = cache
        self.lease = lease

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)


def test_a_result_that_is_there_costs_one_lease(rig: Rig) -> None:
    """Nothing is made then, so what steps would read need not stay."""
    cache = rig.cache()
    rig.put("models/m", {"weights": b"weights"})
    model = cache.preload(URL)
    with transform_in(cache, URL)(URL, model, "m-1", silent, never) as made:
        pass
    taken: list[str] = []

    def count(model: CachedModel, holder: str) -> Lease:
        taken.append(holder)
        return cache.lease(model, holder)

    # One that has started since does not know that it is there.
    with transform_in(WithLease(cache, count), URL)(URL, model, "m-2", silent, never) as again:
        assert (again.path, taken) == (made.path, ["m-2"])


def test_a_result_is_let_go_where_its_model_cannot_be(rig: Rig) -> None:
    cache = rig.cache()
    rig.put("models/m", {"weights": b"weights"})
    model = cache.preload(URL)

    def fail() -> None:
        raise OSError("no space left")

    failing = WithLease(cache, lambda model, holder: Lease(holder, fail))
    with (
        pytest.raises(OSError, match="no space left"),
        transform_in(failing, URL)(URL, model, "m-1", silent, never),
    ):
        raise AssertionError("it is not used")
    assert holders(cache) == {"model": (), "result": ()}


def test_a_step_on_the_way_to_a_result_is_not_made_again_for_it(rig: Rig) -> None:
    cache = rig.cache()
    rig.put("models/m", {"weights": b"weights"})
    model = cache.preload(URL)
    transform = transform_in(cache, URL, WRITE, "import shutil, os; " + COPY)
    with transform(URL, model, "m-1", silent, never) as made:
        (between,) = (one.url for one in cache.ls() if one.made and one.url != made.url)
    cache.evict(between)
    with transform(URL, model, "m-2", silent, never) as again:
        assert again.path == made.path
        assert between not in [entry.url for entry in cache.ls()]
