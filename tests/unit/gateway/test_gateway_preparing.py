"""Preparation steps as a replica asks for them: what they made is held as long as it is used."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
from folder_store import Rig

from gateway.cache import NodeCache
from gateway.preparing import Transform, make_transform
from gateway.settings import Settings
from modelcache.cache import ModelCache
from modelcache.types import InUse, Progress

WRITE = "import pathlib; pathlib.Path('made').write_bytes(b'made' * 5000)"
URL = "s3://models/m"


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    return Rig(root=tmp_path)


def transform_in(cache: ModelCache, model: str) -> Transform:
    step = {"kind": "command", "argv": [sys.executable, "-c", WRITE]}
    settings = Settings.model_validate({"modelcache": {"steps": {model: [step]}}})
    node = NodeCache(cache=cache, transfer=None, peers=None)  # type: ignore[arg-type]
    return make_transform(settings, node, {})


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
            transform(URL, model.path, "m-1", lambda _: seen.append(holders(cache)), never)
        )
        assert (made.path / "made").read_bytes() == b"made" * 5000
        assert seen[0]["model"] == ("preparation for m-1",), "what steps read stays meanwhile"
        assert holders(cache) == {"model": (), "result": ("m-1",)}
        again = second.enter_context(transform(URL, model.path, "m-2", silent, never))
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


def test_a_model_without_steps_is_what_was_fetched(rig: Rig) -> None:
    cache = rig.cache()
    rig.put("models/m", {"weights": b"weights"})
    model = cache.preload(URL)
    with transform_in(cache, "s3://models/other")(URL, model.path, "m-1", silent, never) as same:
        assert same == model


def test_a_directory_s_result_is_of_that_directory(rig: Rig, tmp_path: Path) -> None:
    cache = rig.cache()
    folder = tmp_path / "plain"
    folder.mkdir()
    (folder / "weights").write_bytes(b"weights")
    with transform_in(cache, str(folder))(str(folder), folder, "m-1", silent, never) as made:
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
    with transform(URL, older.path, "m-1", silent, never) as made:
        assert (made.path / "made").is_file()
