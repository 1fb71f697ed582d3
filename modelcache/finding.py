"""Finding what is asked for among what is on this disk. Asks no store, and changes nothing."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from modelcache.records import Record, read_all, read_manifest
from modelcache.refs import PATH, parse_ref
from modelcache.store import Store
from modelcache.types import Damaged, Manifest, ModelRef, NotFound

LOG = logging.getLogger("tidegate.modelcache")

PREPARED = "prepared"
"""The scheme of models that were made here: ``prepared://<key>``. No store has them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CachedModel:
    """A model as a directory that engines open.

    ``manifest`` is ``None`` for a directory that is used where it lies. ``note`` says what its
    user should know: that the store could not be asked whether it is still the newest.
    """

    url: str
    revision: str
    path: Path
    manifest: Manifest | None
    note: str = ""


class Finder:
    """Looks models up in one store, by what people call them."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def ref(self, url: str, revision: str | None) -> ModelRef:
        """What people mean by ``url``: a directory before a hub's model of the same name."""
        if url and "://" not in url and revision is None and Path(url).expanduser().is_dir():
            return ModelRef(url=url, scheme=PATH, location=url)
        if url.startswith(f"{PREPARED}://"):
            return ModelRef(url=url, scheme=PREPARED, location=url, revision=revision)
        return parse_ref(url, revision)

    def in_place(self, ref: ModelRef) -> CachedModel | None:
        """A plain path is used where it lies. Raises ``NotFound`` where there is nothing."""
        if ref.scheme != PATH:
            return None
        path = Path(ref.location).expanduser().absolute()
        if not path.is_dir():
            raise NotFound(f"{path} is not a directory")
        return CachedModel(url=str(path), revision="in place", path=path, manifest=None)

    def resolve(self, ref: ModelRef) -> Manifest | None:
        """The manifest of what was asked for, by what is known on this disk."""
        if ref.revision is not None:
            exact = self.read(ref.url, ref.revision)
            if exact is not None:
                return exact
        try:
            revision = self.store.layout.ref(ref.url, ref.revision).read_text()
            found = self.read(ref.url, revision)
        except (FileNotFoundError, UnicodeDecodeError):
            found = None
        if found is None and ref.revision is None:
            records = [record.manifest for record in self._all(ref.url)]
            whole = [manifest for manifest in records if manifest is not None]
            found = max(whole, key=lambda manifest: manifest.created_at_s, default=None)
        return found

    def read(self, url: str, revision: str) -> Manifest | None:
        """The manifest of an exact revision; ``None`` if it is not here, or is damaged."""
        try:
            return read_manifest(self.store.layout, url, revision)
        except Damaged as damage:
            LOG.warning("%s: %s", url, damage)
            return None

    def open(self, manifest: Manifest | None) -> CachedModel | None:
        """The directory of a revision; ``None`` where not all of it is here and sound."""
        if manifest is None or not self.store.is_whole(manifest):
            return None
        try:
            path = self.store.open_view(manifest)
        except FileNotFoundError:
            return None  # evicted just now
        return CachedModel(
            url=manifest.url, revision=manifest.revision, path=path, manifest=manifest
        )

    def wanted(self, url: str, revision: str | None) -> Manifest:
        """The manifest of a model that has to be here. Raises ``NotFound``."""
        ref = self.ref(url, revision)
        if ref.scheme == PATH:
            raise NotFound(f"{url} is used where it lies; the cache has nothing of it")
        manifest = self.resolve(ref)
        if manifest is None:
            raise NotFound(f"{ref.url} is not on this disk")
        return manifest

    def _all(self, url: str) -> list[Record]:
        return [record for record in read_all(self.store.layout) if record.url == url]

    def records(self, url: str, revision: str | None) -> list[Record]:
        """A model's revisions, or the one that is named. Raises ``NotFound`` if there is none."""
        ref = self.ref(url, revision)
        found = self._all(ref.url)
        if ref.revision is not None:
            manifest = self.resolve(ref)
            exact = ref.revision if manifest is None else manifest.revision
            found = [record for record in found if record.revision == exact]
        if not found:
            raise NotFound(f"{ref.url} is not on this disk")
        return found
