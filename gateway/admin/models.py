"""What can be done with the model cache by hand: verbs over a cache, typed requests and answers.

One ``Models`` serves the console (``tidegate model …`` where nothing runs) and the admin listener
(``POST /models/…``), so both do the same and answer the same. All of it blocks, some of it for as
long as a download takes; it is called from threads.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autoscaler.settings import PoolSettings
from gateway.admin import schema
from loaders.engines.base import engine_of
from modelcache.ports import CachedModel, IsCancelled, OnProgress, Prewarm, Transform
from modelcache.refs import PATH, is_below, parse_ref
from modelcache.types import (
    PREPARED,
    CacheError,
    Cancelled,
    Damaged,
    FileRange,
    InUse,
    NoSpace,
    NotFound,
    Progress,
    SourceError,
)

if TYPE_CHECKING:
    from modelcache.cache import ModelCache
    from modelcache.pagecache.holder import PageHolder

_HELD = "asked for: "
"""Before the keys of pages that an operator had prewarmed, apart from those of pools."""

WEIGHTS = ("*.safetensors", "*.gguf")
"""What engines read their weights from."""
NO_WEIGHTS = f"it has no weights ({', '.join(WEIGHTS)})"
MOST_LOOKED_AT = 100_000
"""Files of a directory without a manifest among which weights are looked for."""

_CODES: tuple[tuple[type[Exception], str], ...] = (
    (ValueError, "bad_value"),
    (NotFound, "model_not_found"),
    (SourceError, "source_failed"),
    (InUse, "model_in_use"),
    (NoSpace, "no_space"),
    (Damaged, "model_damaged"),
    (Cancelled, "cancelled"),
    (CacheError, "cache_failed"),
    (OSError, "cache_failed"),
)
"""Error classes, the more special ones first, with their code."""


def error_of(problem: Exception) -> schema.AdminError | None:
    """What a verb raised as the error that is answered; ``None`` for a fault of our own."""
    code = next((code for kind, code in _CODES if isinstance(problem, kind)), None)
    if code is None:
        return None
    field = str(problem).partition(":")[0]
    param = (field if field.isidentifier() else "model") if code == "bad_value" else None
    return schema.AdminError(code, str(problem), param=param)


@dataclass(frozen=True, slots=True, kw_only=True)
class Models:
    """The verbs over one cache. Safe to use from several threads, as the cache is.

    What is prewarmed is kept in the page cache by ``page_holder``, until it is evicted or unpinned.
    """

    cache: ModelCache
    prewarm: Prewarm
    replicate: Callable[
        [str, str | None, Sequence[str], OnProgress, IsCancelled], Mapping[str, Any]
    ]
    """Has other sites preload a model: URL, revision, site names; returns an outcome by site."""
    sites: tuple[str, ...] = ()
    page_holder: PageHolder | None = None
    traffic: Callable[[], Mapping[str, Any]] = dict
    """What this process has read from stores and from peers, and given to them."""
    transform: Transform | None = None
    """Runs a model's preparation steps, where it has any."""
    pools: Callable[[], Sequence[PoolSettings]] = tuple
    """The pools that are served here now; their names stand for their models."""
    allowed: Sequence[str] = ()
    """Beginnings of URLs and paths that clients without the owner's rights may name too."""

    def listing(self) -> schema.CacheListing:
        """Every revision that is on the disk or on its way, and what all of it takes."""
        return schema.CacheListing(
            dir=str(self.cache.dir),
            usage=schema.CacheUsage.model_validate(self.cache.usage()),
            traffic=schema.CacheTraffic.model_validate(self.traffic()),
            models=tuple(self.cache.ls()),
            pools=tuple(name for pool in self.pools() for name in (pool.name, *pool.aliases)),
        )

    def resolve(self, asked: schema.ModelRequest) -> tuple[str, str | None]:
        """The model's canonical URL or its path, and the revision that is named. Raises
        ``ValueError`` for what names no model."""
        return find_model(asked.model, asked.revision, self.pools())

    def is_named(self, url: str) -> bool:
        """Whether a model, by its canonical URL or path, is a pool's, was made of one by
        preparation steps, or is below one of ``allowed``."""
        if any(is_below(url, beginning) for beginning in (f"{PREPARED}://", *self.allowed)):
            return True
        for pool in self.pools():
            with suppress(ValueError):  # it has none of the cache's
                if _model_of(pool, pool.name, None)[0] == url:
                    return True
        return False

    def run(
        self,
        verb: str,
        asked: schema.ModelRequest,
        *,
        on_progress: OnProgress = lambda progress: None,
        cancelled: IsCancelled = lambda: False,
    ) -> schema.ModelAnswer:
        """Do what ``verb`` says to the model.

        Raises ``ValueError`` for a request that is not right, ``CacheError`` where it cannot be
        done.
        """
        began_s = time.monotonic()
        url, revision = self.resolve(asked)
        answer: schema.ModelAnswer
        if isinstance(asked, schema.PreloadRequest):
            answer = self._preload(asked, url, revision, on_progress, cancelled)
        elif isinstance(asked, schema.PrewarmRequest):
            answer = self._prewarm(asked, url, revision, on_progress, cancelled)
        elif isinstance(asked, schema.VerifyRequest):
            answer = self._verify(asked, url, revision, on_progress, cancelled)
        elif isinstance(asked, schema.ReplicateRequest):
            answer = self._replicate(asked, url, revision, on_progress, cancelled)
        elif isinstance(asked, schema.EvictRequest):
            answer = self._evict(asked, url, revision)
            self._drop_pages(url)
        elif verb == "pin":
            url, revision = self._exact(url, revision)
            self.cache.pin(url, revision)
            answer = schema.PinAnswer(verb=verb, model=url, revision=revision, pinned=True)
        else:
            self.cache.unpin(url, revision)
            self._drop_pages(url)
            answer = schema.PinAnswer(verb=verb, model=url, revision=revision, pinned=False)
        return answer.model_copy(update={"elapsed_s": round(time.monotonic() - began_s, 3)})

    def _exact(self, url: str, revision: str | None) -> tuple[str, str | None]:
        """The exact revision that is meant, the newest where none is named, as far as it is known
        on this disk; else what was given."""
        whole, exact = self.cache.lookup.name(url, revision)
        return whole, exact or revision

    def _evict(
        self, asked: schema.EvictRequest, url: str, revision: str | None
    ) -> schema.EvictAnswer:
        """One revision, the newest where none is named; all with ``all``, or where none of those
        that are here is whole."""
        if asked.all and revision is not None:
            raise ValueError(f"all: one revision is named too, {revision}")
        if not asked.all:
            url, revision = self._exact(url, revision)
        before = self.cache.lookup.revisions(url)
        gone = before if revision is None else [revision]
        return schema.EvictAnswer(
            verb="evict",
            model=url,
            revision=revision,
            revisions=tuple(gone),
            freed_bytes=self.cache.evict(url, revision, asked.force, asked.prepared),
            left=tuple(one for one in before if asked.prepared or one not in gone),
            prepared=asked.prepared,
        )

    def _preload(
        self,
        asked: schema.PreloadRequest,
        url: str,
        revision: str | None,
        on_progress: OnProgress,
        cancelled: IsCancelled,
    ) -> schema.PreloadAnswer:
        was_there = self.cache.find(url, revision) is not None
        cached = self.cache.preload(
            url,
            revision=revision,
            on_progress=on_progress,
            cancelled=cancelled,
            expected_use_at_s=asked.expected_use_at_s,
        )
        prepared_s = None
        began_s, began_at_s = time.monotonic(), time.time()
        with self._after_steps(url, cached, "preload", on_progress, cancelled) as made:
            if made.path != cached.path and (
                made.manifest is None or made.manifest.created_at_s >= began_at_s
            ):
                prepared_s = round(time.monotonic() - began_s, 3)
            told = _on_disk("preload", cached, made)
        if told["prepared"] is None and not has_weights(cached):
            told["note"] = "; ".join([*filter(None, [cached.note]), NO_WEIGHTS])
        return schema.PreloadAnswer(**told, was_there=was_there, prepared_s=prepared_s)

    @contextmanager
    def _after_steps(
        self,
        url: str,
        cached: CachedModel,
        holder: str,
        on_progress: OnProgress,
        cancelled: IsCancelled,
    ) -> Iterator[CachedModel]:
        """A model after its preparation steps: what engines open. Leased meanwhile."""
        if self.transform is None or url.startswith(f"{PREPARED}://"):
            yield cached
            return
        with self.transform(url, cached, holder, on_progress, cancelled) as made:
            yield made

    def _prewarm(
        self,
        asked: schema.PrewarmRequest,
        url: str,
        revision: str | None,
        on_progress: OnProgress,
        cancelled: IsCancelled,
    ) -> schema.PrewarmAnswer:
        rank, world_size = asked.rank, asked.world_size
        if rank >= world_size:
            raise ValueError(f"rank: must be from 0 to world_size - 1 = {world_size - 1}")
        cached = self.cache.find(url, revision)
        if cached is None:
            cached = self.cache.preload(
                url, revision=revision, on_progress=on_progress, cancelled=cancelled
            )
        with self._after_steps(url, cached, "prewarm", on_progress, cancelled) as made:
            files = (
                weights_of(made.path)
                if world_size == 1
                else ranges_of_rank(made.path, rank, world_size)
            )
            pages = schema.PrewarmedPages.model_validate(
                self.prewarm(files, on_progress, cancelled)
            )
            not_kept = self._keep_pages(url, files)
            return schema.PrewarmAnswer(
                **_on_disk("prewarm", cached, made), pages=pages, not_kept=not_kept
            )

    def _keep_pages(self, url: str, files: Sequence[FileRange]) -> str:
        """Have the pages kept; why they are not, empty where they are."""
        if self.page_holder is None:
            return "no Tidegate or agent runs here that would keep them"
        try:
            self.page_holder.keep(_HELD + url, files)
        except CacheError as error:
            return str(error)
        return ""

    def _drop_pages(self, url: str) -> None:
        if self.page_holder is not None:
            self.page_holder.drop(_HELD + url)

    def _verify(
        self,
        asked: schema.VerifyRequest,
        url: str,
        revision: str | None,
        on_progress: OnProgress,
        cancelled: IsCancelled,
    ) -> schema.VerifyAnswer:
        on_progress(Progress(phase="checking"))
        url, revision = self._exact(url, revision)
        damage = self.cache.verify(
            url, revision, repair=asked.repair, on_progress=on_progress, cancelled=cancelled
        )
        return schema.VerifyAnswer(
            verb="verify",
            model=url,
            revision=revision,
            damage=tuple(schema.DamagedFile.model_validate(one) for one in damage),
            repaired=bool(damage) and asked.repair,
        )

    def _replicate(
        self,
        asked: schema.ReplicateRequest,
        url: str,
        revision: str | None,
        on_progress: OnProgress,
        cancelled: IsCancelled,
    ) -> schema.ReplicateAnswer:
        names = asked.sites or self.sites
        unknown = [name for name in names if name not in self.sites]
        if unknown:
            known = ", ".join(self.sites) or "none"
            raise ValueError(f"sites: {unknown[0]!r} is not in modelcache.sites (known: {known})")
        if not names:
            raise ValueError("sites: modelcache.sites is empty")
        outcomes = self.replicate(url, revision, names, on_progress, cancelled)
        return schema.ReplicateAnswer(
            verb="replicate",
            model=url,
            revision=revision,
            sites={name: schema.SiteOutcome.model_validate(one) for name, one in outcomes.items()},
        )


# ── Names of models ───────────────────────────────────────────────────────────────────────────────


def find_model(
    text: str, revision: str | None, pools: Sequence[PoolSettings]
) -> tuple[str, str | None]:
    """The canonical URL (or the path) that is meant, and the revision that was named.

    A pool comes before all else, for its name may look like a hub's; it is a pool of the process
    that is asked, so that a name means the same as in a request to it. A directory has to be
    written as a path (``/…``, ``./…``). Raises ``ValueError`` for what is none of these.
    """
    text = text.strip()
    if not text:
        raise ValueError("model: it is empty")
    if text.startswith(f"{PREPARED}://"):
        return text, revision
    pool = next((one for one in pools if text in (one.name, *one.aliases)), None)
    if pool is not None:
        return _model_of(pool, text, revision)
    try:
        return _read(text, revision)
    except ValueError as error:
        if "://" in text or text.startswith(("/", "./", "../", "~")) or "neither" not in str(error):
            raise
        known = ", ".join(one.name for one in pools) or "none"
        raise ValueError(f"{error}, nor a pool (known here: {known})") from None


def _model_of(pool: PoolSettings, name: str, revision: str | None) -> tuple[str, str | None]:
    """The model of a pool."""
    model = pool.model or ""
    here = Path(model).expanduser()
    if model and "://" not in model and here.is_dir():
        return _read(os.path.abspath(here), revision)
    try:
        parse_ref(model)
    except ValueError:
        if pool.backend == "static":
            why = "it is externally managed, so the cache has nothing of it"
        elif not engine_of(pool.engine).capabilities.loads_weights:
            why = "its engine loads no weights"
        else:
            why = f"its model {model!r} is neither a directory here nor one that can be fetched"
        raise ValueError(f"model: pool {name!r}: {why}") from None
    return _read(model, revision)


def _read(text: str, revision: str | None) -> tuple[str, str | None]:
    ref = parse_ref(text, revision)
    if ref.scheme == PATH:
        return os.path.abspath(Path(text).expanduser()), None
    return ref.url, ref.revision


# ── Files of models ───────────────────────────────────────────────────────────────────────────────


def _on_disk(verb: str, cached: CachedModel, made: CachedModel) -> dict[str, Any]:
    """The fields of ``ModelOnDisk``, of a model and what its preparation steps made of it."""
    manifest = cached.manifest
    return {
        "verb": verb,
        "model": cached.url,
        "revision": cached.revision,
        "path": str(cached.path),
        "size_bytes": None if manifest is None else manifest.size_bytes,
        "files": None if manifest is None else len(manifest.files),
        "note": cached.note,
        "prepared": None if made.path == cached.path else str(made.path),
    }


def has_weights(cached: CachedModel) -> bool:
    """Whether there is something in it that engines read weights from, as far as one has looked."""
    if cached.manifest is not None:
        names = [file.path for file in cached.manifest.files]
    else:
        names = [path.name for path in islice(cached.path.rglob("*"), MOST_LOOKED_AT)]
        if len(names) == MOST_LOOKED_AT:
            return True
    return any(fnmatch(name, pattern) for name in names for pattern in WEIGHTS)


def weights_of(directory: Path) -> list[FileRange]:
    """The files of a model that an engine reads whole at its start. Raises ``NotFound``."""
    for pattern in WEIGHTS:
        found = sorted(path for path in directory.rglob(pattern) if path.is_file())
        if found:
            return [FileRange(path=str(path)) for path in found]
    raise NotFound(f"{directory}: {NO_WEIGHTS}")


def ranges_of_rank(directory: Path, rank: int, world_size: int) -> list[FileRange]:
    """The bytes that one tensor-parallel rank needs of a model cut as Llama-like ones are.

    Raises ``CacheError`` where it has no safetensors, or they cannot be cut so.
    """
    from loaders.weights.files import choose_tensors, find_files, opened, read_index
    from loaders.weights.plan import cut, usual_cut
    from modelcache.safetensors_index import BadFile

    ranges = []
    try:
        found = find_files(directory)
        with opened(found, lambda path: None) as files:
            indexes = [read_index(file) for file in files]
            for file, index, entries in zip(
                files, indexes, choose_tensors(found, files, indexes), strict=True
            ):
                path = str(file.path)
                ranges.append(FileRange(path=path, end=index.header_end))
                for entry in entries:
                    dim = usual_cut(entry.name, entry.shape)
                    part = cut(entry, dim, rank, world_size)
                    ranges.append(FileRange(path=path, start=part.start, end=part.end))
    except (BadFile, ValueError) as error:
        raise CacheError(str(error)) from None
    return ranges
