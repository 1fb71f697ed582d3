"""Runs the preparation steps that the settings declare for a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from gateway.settings import Settings
from modelcache.finding import CachedModel
from modelcache.prepare import Preparation
from modelcache.prepare_types import input_digest
from modelcache.refs import parse_ref
from modelcache.types import FileEntry, Progress

if TYPE_CHECKING:
    from gateway.cache import NodeCache

Transform = Callable[
    [str, Path, str, Callable[[Progress], None], Callable[[], bool]],
    AbstractContextManager[CachedModel],
]


def make_transform(settings: Settings, node: NodeCache, environ: Mapping[str, str]) -> Transform:
    """The preparation steps of models, run in the engine's environment; results are kept in the
    cache, each leased for its user as long as the context is open."""
    preparation = Preparation(
        cache=node.cache, python=settings.loaders.engine_python.absolute(), environ=environ
    )

    @contextmanager
    def transform(
        model: str,
        source: Path,
        holder: str,
        on_progress: Callable[[Progress], None],
        cancelled: Callable[[], bool],
    ) -> Iterator[CachedModel]:
        found = find_source(model, source, node)
        steps = settings.modelcache.steps_for(model)
        if not steps:
            yield found
            return
        with ExitStack() as leases:
            with node.cache.lease(found, f"preparation for {holder}"):
                made = preparation.prepare(
                    source,
                    input_digest(list_entries(found)),
                    steps,
                    model=found.url,
                    revision=found.revision,
                    holder=holder,
                    on_progress=on_progress,
                    cancelled=cancelled,
                )
                assert made.held is not None, "there is a step"
                leases.enter_context(made.held.lease)
            yield made.held.model

    return transform


def find_source(model: str, source: Path, node: NodeCache) -> CachedModel:
    """What steps begin with: the cache's; or a directory that is used where it lies, as one is of
    which the cache has another revision by now."""
    if "://" not in model:
        where = str(Path(model).expanduser().absolute())
        return CachedModel(url=where, revision="in place", path=source, manifest=None)
    ref = parse_ref(model)
    found = node.cache.find(ref.url, ref.revision)
    if found is None or found.path != source:
        return CachedModel(url=ref.url, revision="in place", path=source, manifest=None)
    return found


def list_entries(model: CachedModel) -> Sequence[FileEntry]:
    """What a model consists of: its manifest, or for a directory that nobody fetched its files by
    size and time of change, so that it need not be read."""
    if model.manifest is not None:
        return tuple(model.manifest.files)
    entries = []
    for path in sorted(model.path.rglob("*")):
        if path.is_file():
            seen = path.stat()
            name = path.relative_to(model.path).as_posix()
            changed = f"changed {seen.st_mtime_ns}"
            entries.append(FileEntry(path=name, size_bytes=seen.st_size, digest=changed))
    return entries
