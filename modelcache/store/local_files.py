"""Files of this machine that may be those of a model: in their place, or in a hub's cache.

Nothing is believed of them: whoever takes one over hashes it first.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from modelcache.ports import Listing
from modelcache.store.hub_layout import find_file, find_snapshot, hub_dirs
from modelcache.types import ModelRef, RemoteFile


@dataclass(frozen=True, slots=True, kw_only=True)
class Nearby:
    """``given`` and ``environ`` say which caches of a hub there are; ``own`` is ours, in the same
    layout, and is none of them."""

    given: Sequence[Path]
    own: Path
    environ: Mapping[str, str] | None = None

    def find(self, ref: ModelRef, file: RemoteFile) -> Path | None:
        """A file of this machine that may be a remote one, not hashed yet."""
        if ref.scheme == "file":
            root = Path(ref.location)
            path = root if root.is_file() else root / file.path
            return path if path.is_file() else None
        return find_file(self._dirs(), file)

    def snapshot(self, ref: ModelRef) -> Listing | None:
        """What a hub's cache has of a model, for when the hub cannot be asked."""
        return find_snapshot(self._dirs(), ref)

    def _dirs(self) -> tuple[Path, ...]:
        environ = os.environ if self.environ is None else self.environ
        return tuple(path for path in hub_dirs(self.given, environ) if path != self.own)
