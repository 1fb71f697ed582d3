"""What is to be made whole, and by whom: what ``modelcache.fetch.fetch`` works from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Protocol

from modelcache.ports import Listing, OnProgress, Source
from modelcache.store.partial_files import Partial
from modelcache.types import (
    Made,
    Manifest,
    ModelRef,
    NotFound,
    Priority,
    RemoteFile,
)

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
"""Weights that can run code when they are read; nobody needs them beside safetensors."""

FOREIGN = (
    *("*.onnx", "*.onnx_data*", "*.h5", "*.msgpack", "*.ot", "*.tflite", "*.mlmodel"),
    *("*.mlpackage/*", "*openvino_model.*"),
)
"""The same weights for runtimes that are none of our engines; hubs often have several of them, and
together more bytes than what is opened."""


class Transfer(Protocol):
    """Whoever brings pieces (``modelcache.fetch.transfer.Transfer``)."""

    def run(
        self,
        source: Source,
        files: Sequence[tuple[RemoteFile, Partial]],
        *,
        priority: Priority = ...,
        on_progress: OnProgress | None = ...,
        cancelled: Callable[[], bool] | None = ...,
    ) -> None:
        """Commit every missing piece of ``files``. Its progress is of all their bytes, those that
        were there before included. Raises ``Damaged`` where ``Partial.on_whole`` did."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Salvage:
    """A blob of which some pieces are damaged; the others need not be fetched again."""

    digest: str
    bad_pieces: frozenset[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Want:
    """What is to be made whole, and how. ``find_local`` gives a file on this machine that may have
    a remote file's content; it is hashed, and checked against what the store publishes.
    ``created_at_s``: when it was made whole first, where it is mended. ``given``: its local files
    are given away to the cache, which takes their names and never copies their bytes. ``made``:
    what it was made of."""

    ref: ModelRef
    listing: Listing
    priority: Priority = Priority.PRELOAD
    find_local: Callable[[RemoteFile], Path | None] = lambda file: None
    salvage: Mapping[str, Salvage] = field(default_factory=dict)
    created_at_s: float | None = None
    given: bool = False
    made: Made | None = None
    on_progress: OnProgress = lambda progress: None
    cancelled: Callable[[], bool] = lambda: False


def select_files(
    files: Sequence[RemoteFile], include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> tuple[RemoteFile, ...]:
    """The files wanted of a listing, by shell patterns over their paths.

    Without ``include``: all, but of a model that has safetensors no pickles, nor what other
    runtimes read.
    """

    def matches(file: RemoteFile, patterns: Sequence[str]) -> bool:
        return any(fnmatchcase(file.path, pattern) for pattern in patterns)

    if include:
        chosen = [file for file in files if matches(file, include)]
    else:
        safe = any(file.path.endswith(".safetensors") for file in files)
        needless = (*PICKLES, *FOREIGN) if safe else ()
        chosen = [file for file in files if not matches(file, needless)]
    return tuple(file for file in chosen if not matches(file, exclude))


def narrow(
    listing: Listing,
    url: str,
    earlier: Manifest | None,
    include: Sequence[str],
    exclude: Sequence[str],
) -> Listing:
    """The files wanted of a model at ``url``, with those that were wanted ``earlier``: asking for
    fewer loses none. Raises ``NotFound`` where patterns leave nothing."""
    chosen = select_files(listing.files, include, exclude)
    if listing.files and not chosen:
        patterns = ", ".join([*include, *(f"!{one}" for one in exclude)])
        raise NotFound(f"{url}: none of its {len(listing.files)} files is wanted by {patterns}")
    paths = {file.path for file in chosen}
    paths |= {entry.path for entry in (earlier.files if earlier is not None else ())}
    return replace(listing, files=tuple(file for file in listing.files if file.path in paths))
