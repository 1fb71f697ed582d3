"""A revision as a directory: names for blobs, never copies of them."""

from __future__ import annotations

import os
import uuid
from collections.abc import Sequence
from pathlib import Path

from modelcache.store.files import link, remove_tree
from modelcache.store.layout import Layout
from modelcache.types import FileEntry, Manifest


def view_of(layout: Layout, manifest: Manifest) -> Path:
    """Where the view of a revision is."""
    return layout.view(manifest.url, manifest.revision)


def view_is_whole(layout: Layout, directory: Path, files: Sequence[FileEntry]) -> bool:
    """Whether every name in the view still stands for the blob that it should."""
    try:
        return all(
            os.path.samestat(os.stat(directory / file.path), os.stat(layout.blob(file.digest)))
            for file in files
        )
    except (FileNotFoundError, NotADirectoryError):
        return False


def build_view(layout: Layout, directory: Path, files: Sequence[FileEntry]) -> None:
    """Make the view at ``directory`` anew. Call it with the store locked.

    Hard links; where the file system has none, symbolic links. Built aside and renamed, so it is
    never seen half made.
    """
    fresh = layout.tmp / f"view-{uuid.uuid4().hex}"
    for file in files:
        target = fresh / file.path
        target.parent.mkdir(parents=True, exist_ok=True)
        if not link(layout.blob(file.digest), target):
            # As seen from where the view will be, which is as deep below the root.
            place = (directory / file.path).parent
            target.symlink_to(os.path.relpath(layout.blob(file.digest), place))
    directory.parent.mkdir(parents=True, exist_ok=True)
    if directory.exists():
        old = layout.tmp / f"old-{uuid.uuid4().hex}"
        os.rename(directory, old)
        os.rename(fresh, directory)
        remove_tree(old)
    else:
        os.rename(fresh, directory)


def remove_view(directory: Path) -> None:
    """Remove a view; the blobs stay."""
    remove_tree(directory)
    parent = directory.parent
    if parent.is_dir() and not any(parent.iterdir()):
        parent.rmdir()
