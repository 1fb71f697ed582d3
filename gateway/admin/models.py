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
from fnmatch import fnmatch
from itertools import islice
from pathlib import Path
from typing import Any

from gateway.admin.model_names import PoolModel, find_model, names_of
from gateway.admin.model_parts import (
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
from modelcache.types import PREPARED, CacheError, FileRange, NotFound, Progress

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
    "evict": {"force": bool, "prepared": bool, "all": bool},
}

WEIGHTS = ("*.safetensors", "*.gguf")
"""What engines read their weights from."""
NO_WEIGHTS = f"it has no weights ({', '.join(WEIGHTS)})"
MOST_LOOKED_AT = 100_000
"""Files of a directory among which weights are looked for, where nobody knows what is in it."""


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
    pools: tuple[PoolModel, ...] = ()
    """The pools that are served here; their names stand for their models."""

    def listing(self) -> dict[str, Any]:
        """Every revision that is on the disk or on its way, and what all of it takes."""
        return {
            "dir": str(self.cache.dir),
            "usage": as_json(self.cache.usage()),
            "traffic": as_json(self.traffic()),
            "models": [as_json(entry) for entry in self.cache.ls()],
            "pools": names_of(self.pools),
        }

    def read(self, verb: str, body: Mapping[str, Any]) -> tuple[str, str | None, dict[str, Any]]:
        """The model that ``body`` means, by its canonical URL or its path, the revision it names,
        and the verb's own options. ``ValueError`` says what is wrong."""
        name, revision, options = read_body(verb, body)
        url, revision = find_model(name, revision, self.pools)
        return url, revision, options

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
        url, revision, options = self.read(verb, body)
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
            told = self._evict(url, revision, options)
            self._let_go(url)
        elif verb == "pin":
            url, revision = self._named(url, revision)
            self.cache.pin(url, revision)
            told = {"pinned": True}
        else:
            self.cache.unpin(url, revision)
            self._let_go(url)
            told = {"pinned": False}
        base = {"verb": verb, "model": url, "revision": revision}
        return {**base, **told, "elapsed_s": round(time.monotonic() - began_s, 3)}

    def _named(self, url: str, revision: str | None) -> tuple[str, str | None]:
        """The exact revision that is meant, the newest where none is named, as far as it is known
        on this disk; else what was given."""
        whole, exact = self.cache.name(url, revision)
        return whole, exact or revision

    def _evict(self, url: str, revision: str | None, options: Mapping[str, Any]) -> dict[str, Any]:
        """One revision, the newest where none is named; all with ``all``, or where none of those
        that are here is whole."""
        prepared = options.get("prepared", False)
        if options.get("all") and revision is not None:
            raise ValueError(f"all: one revision is named too, {revision}")
        if not options.get("all"):
            url, revision = self._named(url, revision)
        before = self.cache.revisions(url)
        gone = before if revision is None else [revision]
        return {
            "model": url,
            "revision": revision,
            "revisions": gone,
            "freed_bytes": self.cache.evict(url, revision, options.get("force", False), prepared),
            "left": [one for one in before if prepared or one not in gone],
            **({"prepared": True} if prepared else {}),
        }

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
        began_s, began_at_s = time.monotonic(), time.time()
        with self._made(url, cached, "preload", on_progress, cancelled) as made:
            told |= what_was_made(cached, made)
            took_s = round(time.monotonic() - began_s, 3)
            if told["prepared"] is not None:
                is_new = made.manifest is None or made.manifest.created_at_s >= began_at_s
                return {**told, "prepared_s": took_s if is_new else None}
        if not has_weights(cached):
            told["note"] = "; ".join([*filter(None, [cached.note]), NO_WEIGHTS])
        return told

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
        if self.transform is None or url.startswith(f"{PREPARED}://"):
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
        url, revision = self._named(url, revision)
        damage = self.cache.verify(
            url, revision, repair=repair, on_progress=on_progress, cancelled=cancelled
        )
        told = {"damage": [as_json(one) for one in damage], "repaired": bool(damage) and repair}
        return {"model": url, "revision": revision, **told}

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


def has_weights(cached: Cached) -> bool:
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
