"""Runs the preparation steps that the settings declare for a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gateway.settings import Settings
from modelcache.prepare import FolderOutputs, Preparation
from modelcache.prepare_types import input_digest
from modelcache.refs import parse_ref
from modelcache.types import FileEntry, Progress

if TYPE_CHECKING:
    from gateway.cache import NodeCache

Transform = Callable[[str, Path, Callable[[Progress], None], Callable[[], bool]], Path]


def make_transform(settings: Settings, node: NodeCache, environ: Mapping[str, str]) -> Transform:
    """The preparation steps of models, run in the engine's environment; results are kept beside
    the cache."""
    from gateway.cache import cache_dir

    directory = cache_dir(settings) / "prepared"
    preparation = Preparation(
        directory=directory,
        python=settings.loaders.engine_python.absolute(),
        outputs=FolderOutputs(directory / "outputs"),
        environ=environ,
    )

    def transform(
        model: str,
        source: Path,
        on_progress: Callable[[Progress], None],
        cancelled: Callable[[], bool],
    ) -> Path:
        steps = settings.modelcache.steps_for(model)
        if not steps:
            return source
        digest = input_digest(list_entries(model, source, node))
        prepared = preparation.prepare(
            source, digest, steps, on_progress=on_progress, cancelled=cancelled
        )
        return prepared.path

    return transform


def list_entries(model: str, source: Path, node: NodeCache) -> Sequence[FileEntry]:
    """What a model consists of: its manifest, or for a directory that nobody fetched its files by
    size and time of change, so that it need not be read."""
    if "://" in model:
        ref = parse_ref(model)
        found = node.cache.find(ref.url, ref.revision)
        if found is not None and found.manifest is not None and found.path == source:
            return tuple(found.manifest.files)
    entries = []
    for path in sorted(source.rglob("*")):
        if path.is_file():
            seen = path.stat()
            name = path.relative_to(source).as_posix()
            changed = f"changed {seen.st_mtime_ns}"
            entries.append(FileEntry(path=name, size_bytes=seen.st_size, digest=changed))
    return entries
