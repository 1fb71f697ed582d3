"""Runs the preparation steps that the settings declare for a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

from gateway.settings.schema import Settings
from modelcache.cache import ModelCache
from modelcache.ports import CachedModel, IsCancelled, OnProgress, Transform
from modelcache.prepare.run import LeasedModel, Preparation, input_digest
from modelcache.settings import PreparationStep
from modelcache.types import FileEntry


def make_transform(settings: Settings, cache: ModelCache, environ: Mapping[str, str]) -> Transform:
    """The preparation steps of models, run in the engine's environment; results are kept in the
    cache, each leased for its user as long as the context is open. What steps begin with is given
    as the cache has it: found by its URL again it might be another revision by now."""
    preparation = Preparation(
        cache=cache, python=settings.loaders.engine_python.absolute(), environ=environ
    )

    def hold(
        source: CachedModel,
        steps: Sequence[PreparationStep],
        holder: str,
        on_progress: OnProgress,
        cancelled: IsCancelled,
    ) -> LeasedModel:
        """The last step's result, leased; made with its source leased, unless it is there."""
        digest = input_digest(list_entries(source))
        held = preparation.results.hold(preparation.keys(digest, steps)[-1], holder, final=True)
        if held is not None:
            return held
        with ExitStack() as leases:
            with cache.lease(source, f"preparation for {holder}"):
                made = preparation.prepare(
                    source.path,
                    digest,
                    steps,
                    model=source.url,
                    revision=source.revision,
                    holder=holder,
                    on_progress=on_progress,
                    cancelled=cancelled,
                )
                leases.enter_context(made.lease)
            leases.pop_all()  # its user has it from here on
        return made

    @contextmanager
    def transform(
        model: str,
        source: CachedModel,
        holder: str,
        on_progress: OnProgress,
        cancelled: IsCancelled,
    ) -> Iterator[CachedModel]:
        steps = settings.modelcache.steps_for(model)
        if not steps:
            yield source
            return
        held = hold(source, steps, holder, on_progress, cancelled)
        with held.lease:
            yield held.model

    return transform


def list_entries(model: CachedModel) -> Sequence[FileEntry]:
    """What a model consists of: its manifest, or for a directory that was not fetched its files by
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
