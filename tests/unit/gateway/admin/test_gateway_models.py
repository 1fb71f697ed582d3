"""The verbs over a model cache, without console or listener."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fake_cache import FakeCache, FakeCached, FakePages, fake_models
from folder_store import Rig

from autoscaler.settings import PoolSettings
from gateway.admin import schema
from gateway.admin.models import Models, find_model
from gateway.admin.operations import VERBS
from gateway.compose.cache import open_models
from gateway.settings.schema import Settings
from modelcache.cache import ModelCache
from modelcache.types import Cancelled, FileRange, InUse, NoSpace, NotFound, Progress, Residency

URL = "hf://org/name"


def run(models: Models, verb: str, body: dict[str, Any]) -> Any:
    request: Any = VERBS[verb].request
    return models.run(verb, request.model_validate(body))


class FakeHolder:
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
    told = run(models, "preload", {"model": URL})
    assert asked == [(URL, cache.models[URL])], "what was fetched, and not what its URL is now"
    assert told.prepared == str(tmp_path / "prepared")


def test_prewarm_pages_what_engines_open(tmp_path: Path) -> None:
    made = tmp_path / "prepared"
    made.mkdir()
    (made / "model.safetensors").write_bytes(b"made")
    paged: list[FileRange] = []
    holder = FakeHolder()

    def page(files: list[FileRange], *_: object) -> FakePages:
        paged.extend(files)
        return FakePages(
            bytes_total=4, bytes_read=4, after=Residency(bytes_total=4, bytes_cached=4)
        )

    models = replace(
        fake_models(FakeCache(tmp_path)),
        transform=lambda *_: nullcontext(at(made)),
        prewarm=page,
        page_holder=holder,
    )
    told = run(models, "prewarm", {"model": URL})
    assert [Path(one.path) for one in paged] == [made / "model.safetensors"]
    assert told.prepared == str(made)
    assert told.path != told.prepared
    assert holder.kept == {f"asked for: {URL}": 1}
    run(models, "evict", {"model": URL, "prepared": True})
    assert holder.kept == {}  # or its bytes would not be free


def test_a_model_without_steps_is_what_was_fetched(tmp_path: Path) -> None:
    models = replace(
        fake_models(FakeCache(tmp_path)), transform=lambda url, cached, *_: nullcontext(cached)
    )
    assert run(models, "preload", {"model": URL}).prepared is None
    assert run(fake_models(FakeCache(tmp_path)), "preload", {"model": URL}).prepared is None


def test_prewarmed_pages_are_kept_until_the_model_is_let_go(tmp_path: Path) -> None:
    holder = FakeHolder()
    models = replace(fake_models(FakeCache(tmp_path)), page_holder=holder)
    assert run(models, "prewarm", {"model": URL}).not_kept == ""
    assert list(holder.kept.values()) == [1]
    run(models, "evict", {"model": URL})
    assert holder.kept == {}


def test_why_pages_are_not_kept_is_told(tmp_path: Path) -> None:
    full = replace(fake_models(FakeCache(tmp_path)), page_holder=FakeHolder(full=True))
    assert "page_budget_bytes" in run(full, "prewarm", {"model": URL}).not_kept
    alone = fake_models(FakeCache(tmp_path))
    assert "runs here" in run(alone, "prewarm", {"model": URL}).not_kept


def test_what_steps_took_is_told_where_they_ran_and_not_where_their_result_was(
    tmp_path: Path,
) -> None:
    rig = Rig(root=tmp_path)
    cache = rig.cache()
    url = rig.put("models/m", {"model.bin": b"weights"})
    folder = tmp_path / "made"
    folder.mkdir()
    (folder / "x").write_bytes(b"1")

    @contextmanager
    def transform(*_: object) -> Iterator[object]:
        found = cache.find("prepared://key")
        yield found or cache.publish(folder, url="prepared://key", revision="made")

    models = replace(over(cache), transform=transform)  # type: ignore[arg-type]
    told = run(models, "preload", {"model": url})
    assert told.prepared_s >= 0
    assert told.note == "", "what steps read need be nothing that engines read"
    assert run(models, "preload", {"model": url}).prepared_s is None
    told = run(models, "preload", {"model": "prepared://key"})
    assert (told.model, told.was_there) == ("prepared://key", True)


def over(cache: ModelCache) -> Models:
    """The verbs over a real cache."""
    return Models(cache=cache, prewarm=lambda *_: None, replicate=lambda *_: {})


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    return Rig(root=tmp_path)


def bring(rig: Rig, cache: ModelCache, count: int) -> tuple[str, list[str]]:
    """A model of which so many revisions are here, the newest last."""
    revisions = []
    url = ""
    for number in range(count):
        url = rig.put("models/a", {"model.safetensors": b"w", "config.json": bytes([number])})
        revisions.append(cache.preload(url).revision)
    return url, revisions


def test_evict_takes_the_newest_and_says_which(rig: Rig) -> None:
    cache = rig.cache()
    url, (first, second, third) = bring(rig, cache, 3)
    told = run(over(cache), "evict", {"model": url})
    assert (told.revision, told.revisions) == (third, (third,))
    assert set(told.left) == {first, second}
    told = run(over(cache), "evict", {"model": url, "revision": first[:12]})
    assert (told.revision, told.left) == (first, (second,))
    assert [entry.revision for entry in cache.ls()] == [second]


def test_evict_takes_all_where_that_is_said(rig: Rig) -> None:
    cache = rig.cache()
    url, revisions = bring(rig, cache, 3)
    with pytest.raises(ValueError, match=r"^all: "):
        run(over(cache), "evict", {"model": url, "all": True, "revision": revisions[0]})
    cache.pin(url, revisions[0])
    with pytest.raises(InUse):
        run(over(cache), "evict", {"model": url, "all": True})
    told = run(over(cache), "evict", {"model": url, "all": True, "force": True})
    assert set(told.revisions) == set(revisions)
    assert (told.revision, told.left, cache.ls()) == (None, (), [])
    with pytest.raises(NotFound):
        run(over(cache), "evict", {"model": url})


def test_what_is_only_half_here_can_be_evicted(rig: Rig) -> None:
    cache = rig.cache()
    url = rig.put("models/a", {"model.safetensors": bytes(100_000)})
    seen: list[Progress] = []
    with pytest.raises(Cancelled):
        cache.preload(url, on_progress=seen.append, cancelled=lambda: len(seen) > 3)
    (entry,) = cache.ls()
    assert not entry.complete
    told = run(over(cache), "evict", {"model": url})
    assert told.revisions == (entry.revision,)
    assert cache.ls() == []


def test_verify_and_pin_say_which_revision_they_mean(rig: Rig) -> None:
    cache = rig.cache()
    url, (first, second) = bring(rig, cache, 2)
    for verb in ("verify", "pin"):
        assert run(over(cache), verb, {"model": url}).revision == second
        told = run(over(cache), verb, {"model": url, "revision": first[:6]})
        assert told.revision == first
    with pytest.raises(NotFound, match=f"has no revision v9 here .it has: .*{first}"):
        run(over(cache), "verify", {"model": url, "revision": "v9"})


def test_a_result_is_preloaded_by_preloading_its_model(rig: Rig) -> None:
    for verb in ("preload", "prewarm"):
        with pytest.raises(NotFound, match="is made by preloading its model"):
            run(over(rig.cache()), verb, {"model": "prepared://3fe29c81d0e4"})


def test_what_has_no_weights_is_told(rig: Rig, tmp_path: Path) -> None:
    models = over(rig.cache())
    folder = tmp_path / "empty"
    folder.mkdir()
    (folder / "readme").write_text("x")
    for name in (str(folder), folder.as_uri()):
        told = run(models, "preload", {"model": name})
        assert told.note == "it has no weights (*.safetensors, *.gguf)"
    (folder / "sub").mkdir()
    (folder / "sub" / "m.gguf").write_bytes(b"w")
    for name in (str(folder), folder.as_uri()):
        assert run(models, "preload", {"model": name}).note == ""


POOLS = tuple(
    map(
        PoolSettings.model_validate,
        [
            {
                "name": "chat", "aliases": ("Qwen/Alias",), "engine": "vllm",
                "model": "hf://org/small@v1",
            },
            {"name": "toy", "model": "toy", "engine": "simulated"},
            {"name": "toyed", "model": "org/real", "engine": "simulated"},
            {"name": "known", "model": "a-name-of-its-own", "engine": "vllm"},
            {"name": "away", "backend": "static", "static": {"urls": ("http://h:1",)}},
        ],
    )
)  # fmt: skip


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("chat", ("hf://org/small", "v1")),
        ("Qwen/Alias", ("hf://org/small", "v1")),
        ("Qwen/Other", ("hf://Qwen/Other", None)),
        ("toyed", ("hf://org/real", None)),
        (" s3://models/a/ ", ("s3://models/a", None)),
        ("/nowhere/../x", ("/x", None)),
        ("prepared://ab", ("prepared://ab", None)),
    ],
)
def test_names(text: str, found: tuple[str, str | None]) -> None:
    assert find_model(text, None, POOLS) == found


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("toy", "pool 'toy': its engine loads no weights"),
        ("known", "pool 'known': its model 'a-name-of-its-own' is neither"),
        ("away", "pool 'away': it is externally managed"),
        ("unheard-of", "nor a pool .known here: chat, toy, toyed, known, away."),
        ("", "model: it is empty"),
        ("a/b/c", "nor a pool"),
    ],
)
def test_names_of_nothing(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        find_model(text, None, POOLS)


def test_a_pool_s_directory_comes_before_a_hub_s_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "real").mkdir(parents=True)
    assert find_model("toyed", None, POOLS) == (str(tmp_path / "org" / "real"), None)
    assert find_model("org/real", None, POOLS) == ("hf://org/real", None)


def test_the_verbs_of_a_node_know_its_pools(tmp_path: Path) -> None:
    given = {"name": "chat", "aliases": ["small"], "engine": "vllm", "model": "org/small"}
    settings = Settings.model_validate({"state_dir": str(tmp_path), "pools": [given]})
    models = open_models(settings, {})
    assert models.listing().pools == ("chat", "small")
    assert models.resolve(schema.ModelRequest(model="small")) == ("hf://org/small", None)
