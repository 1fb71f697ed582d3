"""What a model of the cache may be called: the beginning of a revision, a result's name."""

from __future__ import annotations

from pathlib import Path

import pytest
from folder_store import Rig

from modelcache.cache import ModelCache
from modelcache.store.lookup import Ambiguous
from modelcache.types import NotFound


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    return Rig(root=tmp_path)


@pytest.fixture
def cache(rig: Rig) -> ModelCache:
    return rig.cache()


@pytest.fixture
def url(rig: Rig) -> str:
    return rig.put("models/a", {"model.safetensors": b"weights"})


def test_the_beginning_of_a_revision_names_it(rig: Rig, cache: ModelCache, url: str) -> None:
    rig.revisions = iter(["abcdef1" + "0" * 33, "abcdef2" + "0" * 33])
    first, second = cache.preload(url), cache.preload(url)
    for model in (first, second):
        assert cache.find(url, model.revision[:7]) == model
        assert cache.lookup.name(url, model.revision[:7]) == (url, model.revision)
    assert cache.lookup.name(url, None) == (url, second.revision)
    assert cache.find(url, "abcde") is None, "too short to be anybody's"
    for ask in (cache.find, cache.pin, cache.unpin, cache.evict, cache.verify):
        with pytest.raises(Ambiguous, match=f"{first.revision}, {second.revision}"):
            ask(url, "abcdef")  # type: ignore[operator]
    cache.pin(url, "abcdef1")
    assert [entry.revision for entry in cache.ls() if entry.pinned] == [first.revision]
    cache.unpin(url, "abcdef1")
    assert cache.verify(url, "abcdef1") == []
    for ask in (cache.pin, cache.unpin, cache.evict, cache.verify):
        with pytest.raises(NotFound, match=f"{url} has no revision v9 here .it has: abcdef1"):
            ask(url, "v9")  # type: ignore[operator]
    cache.evict(url, "abcdef1")
    assert cache.lookup.revisions(url) == [second.revision]
    assert cache.find(url, "abcdef") == second


def test_a_result_that_is_not_here_is_made_by_preloading_its_model(
    rig: Rig, cache: ModelCache
) -> None:
    with pytest.raises(NotFound, match="it is made by preloading its model"):
        cache.preload("prepared://abc")
    (rig.root / "made").mkdir()
    (rig.root / "made" / "x").write_bytes(b"1")
    made = cache.publish(rig.root / "made", url="prepared://abc", revision="made")
    assert cache.preload("prepared://abc", expected_use_at_s=5.0) == made
    assert cache.ls()[0].expected_use_at_s == 5.0
    assert rig.sources == []
