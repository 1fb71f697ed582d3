"""The verbs over a model cache, without console or listener."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

from fake_cache import FakeCache, FakeCached, fake_models

from modelcache.types import FileRange, NoSpace, Progress

URL = "hf://org/name"


class FakeKeeper:
    """Keeps what it is given, unless it is full."""

    def __init__(self, full: bool = False) -> None:
        self.kept: dict[str, int] = {}
        self.full = full

    def keep(self, key: str, files: list[FileRange]) -> None:
        if self.full:
            raise NoSpace("page_budget_bytes: no room")
        self.kept[key] = len(files)

    def drop(self, key: str) -> bool:
        return self.kept.pop(key, None) is not None


def at(path: Path) -> FakeCached:
    return FakeCached(url="prepared://key", revision="made", path=path, manifest=None)


def test_preload_runs_a_model_s_preparation_steps_ahead_of_its_use(tmp_path: Path) -> None:
    asked: list[tuple[str, FakeCached]] = []

    @contextmanager
    def transform(
        model: str,
        source: FakeCached,
        holder: str,
        on_progress: Callable[[Progress], None],
        cancelled: Callable[[], bool],
    ) -> Iterator[FakeCached]:
        asked.append((model, source))
        yield at(tmp_path / "prepared")

    cache = FakeCache(tmp_path)
    models = replace(fake_models(cache), transform=transform)
    told = models.run("preload", {"model": URL})
    assert asked == [(URL, cache.models[URL])], "what was fetched, and not what its URL is now"
    assert told["prepared"] == str(tmp_path / "prepared")


def test_prewarm_pages_what_engines_open(tmp_path: Path) -> None:
    made = tmp_path / "prepared"
    made.mkdir()
    (made / "model.safetensors").write_bytes(b"made")
    paged: list[FileRange] = []
    keeper = FakeKeeper()
    models = replace(
        fake_models(FakeCache(tmp_path)),
        transform=lambda *_: nullcontext(at(made)),
        prewarm=lambda files, on_progress, cancelled: paged.extend(files),
        keeper=keeper,
    )
    told = models.run("prewarm", {"model": URL})
    assert [Path(one.path) for one in paged] == [made / "model.safetensors"]
    assert told["prepared"] == str(made)
    assert told["path"] != told["prepared"]
    assert keeper.kept == {f"asked for: {URL}": 1}
    models.run("evict", {"model": URL, "prepared": True})
    assert keeper.kept == {}  # or its bytes would not be free


def test_a_model_without_steps_is_what_was_fetched(tmp_path: Path) -> None:
    models = replace(
        fake_models(FakeCache(tmp_path)), transform=lambda url, cached, *_: nullcontext(cached)
    )
    assert models.run("preload", {"model": URL})["prepared"] is None
    assert fake_models(FakeCache(tmp_path)).run("preload", {"model": URL})["prepared"] is None


def test_prewarmed_pages_are_kept_until_the_model_is_let_go(tmp_path: Path) -> None:
    keeper = FakeKeeper()
    models = replace(fake_models(FakeCache(tmp_path)), keeper=keeper)
    assert models.run("prewarm", {"model": URL})["not_kept"] == ""
    assert list(keeper.kept.values()) == [1]
    models.run("evict", {"model": URL})
    assert keeper.kept == {}


def test_why_pages_are_not_kept_is_told(tmp_path: Path) -> None:
    full = replace(fake_models(FakeCache(tmp_path)), keeper=FakeKeeper(full=True))
    assert "page_budget_bytes" in full.run("prewarm", {"model": URL})["not_kept"]
    alone = fake_models(FakeCache(tmp_path))
    assert "nobody runs here" in alone.run("prewarm", {"model": URL})["not_kept"]
