"""What lies below the cache's directory, counted: every file once, however many names it has."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from modelcache.store.layout import Layout
from modelcache.store.revisions import Record
from modelcache.types import PREPARED

OTHERS = frozenset({"bundles"})
"""What lies in the cache's directory too, and cannot be evicted to make room for models: what
engines have compiled, which has a limit of its own."""


def walk(root: Path) -> Iterator[tuple[str, os.stat_result]]:
    """Every file and symbolic link below ``root``, with the name at the top it is under; not what
    others keep there (``OTHERS``)."""
    for directory, folders, names in os.walk(root):
        if directory == str(root):
            folders[:] = [name for name in folders if name not in OTHERS]
        top = Path(directory).relative_to(root).parts[:1]
        for name in names:
            try:
                info = os.lstat(os.path.join(directory, name))
            except FileNotFoundError:
                continue
            if stat.S_ISREG(info.st_mode) or stat.S_ISLNK(info.st_mode):
                yield (top[0] if top else ""), info


def count_names(root: Path) -> dict[tuple[int, int], int]:
    """How many names each file has below ``root``."""
    names: dict[tuple[int, int], int] = {}
    for _, info in walk(root):
        file = (info.st_dev, info.st_ino)
        names[file] = names.get(file, 0) + 1
    return names


def count_kinds(root: Path) -> dict[tuple[int, int], tuple[str, int]]:
    """Each file below ``root`` once: the folder at the top that it counts for (``blobs``,
    ``partial``, ``prepared``; empty for records), and its size."""
    kinds: dict[tuple[int, int], tuple[str, int]] = {}
    for top, info in walk(root):
        kind = top if top in ("blobs", "partial", PREPARED) else ""
        file = (info.st_dev, info.st_ino)
        # A blob has names in views too, and is one wherever it was met first.
        kinds[file] = max(kinds.get(file, ("", 0)), (kind, info.st_size))
    return kinds


def find_made(layout: Layout, records: Sequence[Record]) -> Iterator[tuple[int, int]]:
    """The blobs, with their pieces' digests, that only results of preparation steps have."""
    fetched = {digest for one in records if one.result_key is None for digest in one.blobs}
    made = {digest for one in records if one.result_key is not None for digest in one.blobs}
    for digest in made - fetched:
        for path in (layout.blob(digest), layout.pieces(digest)):
            with suppress(FileNotFoundError):
                info = os.stat(path)
                yield info.st_dev, info.st_ino
