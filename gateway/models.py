"""What can be done with the model cache by hand: verbs over a cache, JSON in and JSON out.

One ``Models`` serves the console (``tidegate model …`` where nothing runs) and the admin listener
(``POST /models/…``), so both do the same and answer the same. All of it blocks, some of it for as
long as a download takes; it is called from threads.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any

from gateway.model_parts import (
    Cache,
    Cached,
    IsCancelled,
    Keeper,
    OnProgress,
    Prewarm,
    Replicate,
    Transform,
    nothing_read,
)
from modelcache.types import (
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

SLOW_VERBS = ("preload", "prewarm", "verify", "replicate")
"""Verbs that take long and tell how far they are."""
QUICK_VERBS = ("pin", "unpin", "evict")

_KEPT = "asked for: "
"""Before the keys of pages that somebody wants kept, apart from those of pools."""

_OPTIONS: Mapping[str, Mapping[str, type]] = {
    "preload": {"expected_use_at_s": float},
    "prewarm": {"rank": int, "world_size": int},
    "verify": {"repair": bool},
    "replicate": {"sites": list},
    "pin": {},
    "unpin": {},
    "evict": {"force": bool, "prepared": bool},
}

_ERRORS: tuple[tuple[type[CacheError], int, str], ...] = (
    (NotFound, 404, "model_not_found"),
    (SourceError, 502, "source_failed"),
    (InUse, 409, "model_in_use"),
    (NoSpace, 507, "no_space"),
    (Damaged, 500, "model_damaged"),
    (Cancelled, 499, "cancelled"),
    (CacheError, 500, "cache_failed"),
)
"""Error classes, the more special ones first, with the status and the reason they are told by."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Models:
    """The verbs over one cache. Safe to use from several threads, as the cache is.

    What is prewarmed is kept with ``keeper``, until it is evicted or unpinned.
    """

    cache: Cache
    prewarm: Prewarm
    replicate: Replicate
    sites: tuple[str, ...] = ()
    keeper: Keeper | None = None
    traffic: Callable[[], Mapping[str, Any]] = nothing_read
    """What this process has read from stores and from peers, and given to them."""
    transform: Transform | None = None
    """Runs a model's preparation steps, where it has any."""

    def listing(self) -> dict[str, Any]:
        """Every revision that is on the disk or on its way, and what all of it takes."""
        return {
            "dir": str(self.cache.dir),
            "usage": as_json(self.cache.usage()),
            "traffic": as_json(self.traffic()),
            "models": [as_json(entry) for entry in self.cache.ls()],
        }

    def run(
        self,
        verb: str,
        body: Mapping[str, Any],
        *,
        on_progress: OnProgress = lambda progress: None,
        cancelled: IsCancelled = lambda: False,
    ) -> dict[str, Any]:
        """Do what ``verb`` says to the model that ``body`` names.

        Raises ``ValueError`` for a body that is not right, ``CacheError`` where it cannot be done.
        """
        url, revision, options = read_body(verb, body)
        began_s = time.monotonic()
        if verb == "preload":
            told = self._preload(url, revision, options, on_progress, cancelled)
        elif verb == "prewarm":
            told = self._prewarm(url, revision, options, on_progress, cancelled)
        elif verb == "verify":
            told = self._verify(url, revision, options, on_progress, cancelled)
        elif verb == "replicate":
            told = self._replicate(url, revision, options, on_progress, cancelled)
        elif verb == "evict":
            force, prepared = options.get("force", False), options.get("prepared", False)
            told = {"freed_bytes": self.cache.evict(url, revision, force, prepared)}
            told |= {"prepared": True} if prepared else {}
            self._let_go(url)
        elif verb == "pin":
            self.cache.pin(url, revision)
            told = {"pinned": True}
        else:
            self.cache.unpin(url, revision)
            self._let_go(url)
            told = {"pinned": False}
        base = {"verb": verb, "model": url, "revision": revision}
        return {**base, **told, "elapsed_s": round(time.monotonic() - began_s, 3)}

    def _preload(
        self,
        url: str,
        revision: str | None,
        options: Mapping[str, Any],
        on_progress: OnProgress,
        cancelled: IsCancelled,
    ) -> dict[str, Any]:
        there = self.cache.find(url, revision) is not None
        cached = self.cache.preload(
            url,
            revision=revision,
            on_progress=on_progress,
            cancelled=cancelled,
            expected_use_at_s=options.get("expected_use_at_s"),
        )
        told = {**about(cached), "was_there": there}
        with self._made(url, cached, "preload", on_progress, cancelled) as made:
            return {**told, **what_was_made(cached, made)}

    @contextmanager
    def _made(
        self,
        url: str,
        cached: Cached,
        holder: str,
        on_progress: OnProgress,
        cancelled: IsCancelled,
    ) -> Iterator[Cached]:
        """A model after its preparation steps: what engines open. Held as long as it is needed."""
        if self.transform is None:
            yield cached
            return
        with self.transform(url, cached, holder, on_progress, cancelled) as made:
            yield made

    def _prewarm(
        self,
        url: str,
        revision: str | None,
        options: Mapping[str, Any],
        on_progress: OnProgress,
        cancelled: IsCancelled,
    ) -> dict[str, Any]:
        rank, world_size = options.get("rank", 0), options.get("world_size", 1)
        if not 0 <= rank < world_size:
            raise ValueError(f"rank: must be from 0 to world_size - 1 = {world_size - 1}")
        cached = self.cache.find(url, revision)
        if cached is None:
            cached = self.cache.preload(
                url, revision=revision, on_progress=on_progress, cancelled=cancelled
            )
        with self._made(url, cached, "prewarm", on_progress, cancelled) as made:
            wanted = (
                weights_of(made.path)
                if world_size == 1
                else ranges_of_rank(made.path, rank, world_size)
            )
            pages = as_json(self.prewarm(wanted, on_progress, cancelled))
            told = {**about(cached), **what_was_made(cached, made), "pages": pages}
            return {**told, "not_kept": self._keep(url, wanted)}

    def _keep(self, url: str, files: Sequence[FileRange]) -> str:
        """Have the pages kept; why they are not, empty where they are."""
        if self.keeper is None:
            return "nobody runs here who would keep them"
        try:
            self.keeper.keep(_KEPT + url, files)
        except CacheError as error:
            return str(error)
        return ""

    def _let_go(self, url: str) -> None:
        if self.keeper is not None:
            self.keeper.drop(_KEPT + url)

    def _verify(
        self,
        url: str,
        revision: str | None,
        options: Mapping[str, Any],
        on_progress: OnProgress,
        cancelled: IsCancelled,
    ) -> dict[str, Any]:
        repair = options.get("repair", False)
        on_progress(Progress(phase="checking"))
        damage = self.cache.verify(
            url, revision, repair=repair, on_progress=on_progress, cancelled=cancelled
        )
        return {"damage": [as_json(one) for one in damage], "repaired": bool(damage) and repair}

    def _replicate(
        self,
        url: str,
        revision: str | None,
        options: Mapping[str, Any],
        on_progress: OnProgress,
        cancelled: IsCancelled,
    ) -> dict[str, Any]:
        names = options.get("sites") or list(self.sites)
        unknown = [name for name in names if name not in self.sites]
        if unknown:
            known = ", ".join(self.sites) or "none"
            raise ValueError(f"sites: {unknown[0]!r} is not in modelcache.sites (known: {known})")
        if not names:
            raise ValueError("sites: modelcache.sites names none, so there is nowhere to go")
        outcomes = self.replicate(url, revision, names, on_progress, cancelled)
        return {"sites": as_json(outcomes)}


def read_body(verb: str, body: Mapping[str, Any]) -> tuple[str, str | None, dict[str, Any]]:
    """The model's URL, its revision and the verb's own options. ``ValueError`` names the field."""
    url, revision = body.get("model"), body.get("revision")
    if not isinstance(url, str) or not url:
        raise ValueError('model: send {"model": "URL"}')
    if revision is not None and not isinstance(revision, str):
        raise ValueError("revision: must be text or null")
    known = _OPTIONS[verb]
    options = {}
    for name, value in body.items():
        if name in ("model", "revision"):
            continue
        if name not in known:
            raise ValueError(f"{name}: unknown field")
        if value is None:
            continue
        options[name] = _option(name, value, known[name])
    return url, revision, options


def _option(name: str, value: Any, kind: type) -> Any:
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if kind is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if kind is list and isinstance(value, list) and all(isinstance(one, str) for one in value):
        return value
    if kind is bool and isinstance(value, bool):
        return value
    wanted = {int: "an integer", float: "a number", list: "a list of names", bool: "true or false"}[
        kind
    ]
    raise ValueError(f"{name}: must be {wanted}")


def about(cached: Cached) -> dict[str, Any]:
    """What is told of a model that is on the disk."""
    manifest = cached.manifest
    return {
        "model": cached.url,
        "revision": cached.revision,
        "path": str(cached.path),
        "size_bytes": None if manifest is None else manifest.size_bytes,
        "files": None if manifest is None else len(manifest.files),
        "note": cached.note,
    }


def what_was_made(cached: Cached, made: Cached) -> dict[str, Any]:
    """Where the result of a model's preparation steps is; ``None`` for one without steps."""
    return {"prepared": None if made.path == cached.path else str(made.path)}


def weights_of(directory: Path) -> list[FileRange]:
    """The files of a model that an engine reads whole at its start. Raises ``NotFound``."""
    found = sorted(path for path in directory.rglob("*.safetensors") if path.is_file())
    found = found or sorted(path for path in directory.rglob("*.gguf") if path.is_file())
    if not found:
        raise NotFound(f"{directory} has no weights (*.safetensors, *.gguf)")
    return [FileRange(path=str(path)) for path in found]


def ranges_of_rank(directory: Path, rank: int, world_size: int) -> list[FileRange]:
    """The bytes that one tensor-parallel rank needs of a model cut as Llama-like ones are.

    Raises ``CacheError`` where it has no safetensors, or they cannot be cut so.
    """
    from loaders.files import choose_tensors, find_files, opened, read_index
    from loaders.index import BadFile
    from loaders.plan import cut, usual_cut

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


def as_json(value: Any) -> Any:
    """Dataclasses, paths and sequences as JSON has them."""
    if is_dataclass(value) and not isinstance(value, type):
        return {name: as_json(inner) for name, inner in asdict(value).items()}
    if isinstance(value, Mapping):
        return {str(name): as_json(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(inner) for inner in value]
    if isinstance(value, Path):
        return str(value)
    return value


def error_of(problem: Exception) -> tuple[int, str, str] | None:
    """Status, reason and message of an error that is told; ``None`` for a fault of ours."""
    if isinstance(problem, ValueError):
        return 400, "bad_value", str(problem)
    for kind, status, reason in _ERRORS:
        if isinstance(problem, kind):
            return status, reason, str(problem)
    return None
