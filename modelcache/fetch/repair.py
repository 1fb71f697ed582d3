"""What a repair needs to know: which pieces of which blobs, and where to get them again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace

from modelcache.fetch.request import Salvage
from modelcache.ports import Listing, Source
from modelcache.store.verify import Damage
from modelcache.types import CacheError, Manifest, ModelRef, NotFound


def plan_salvage(manifest: Manifest, found: Sequence[Damage]) -> dict[str, Salvage]:
    """By path: the blobs that are damaged, and the pieces of them that are."""
    pieces: dict[str, set[int]] = {damage.digest: set() for damage in found if damage.digest}
    for damage in found:
        if damage.piece is not None:
            pieces[damage.digest].add(damage.piece)
    return {
        file.path: Salvage(digest=file.digest, bad_pieces=frozenset(pieces[file.digest]))
        for file in manifest.files
        if file.digest in pieces
    }


def list_again(
    open_source: Callable[[ModelRef], Source], ref: ModelRef, manifest: Manifest
) -> tuple[ModelRef, Listing]:
    """The files of a manifest as their store lists them now, and how to ask for them.

    Some stores can be asked for that revision, others only for what they have now. Raises
    ``CacheError`` where it is history.
    """
    seen = ""
    for revision in (manifest.revision, None):
        asked = replace(ref, revision=revision)
        try:
            with closing(open_source(asked)) as source:
                listing = source.list()
        except NotFound:
            continue
        if listing.revision == manifest.revision:
            wanted = {file.path for file in manifest.files}
            files = tuple(file for file in listing.files if file.path in wanted)
            return asked, replace(listing, files=files)
        seen = listing.revision
    raise CacheError(
        f"{manifest.url}: its store has {f'revision {seen}' if seen else 'nothing'} now, so "
        f"{manifest.revision} cannot be mended; evict it and preload it anew"
    )
