"""A revision as a directory: names for blobs, never copies of them."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from modelcache.store.files import link, make_directory, remove_empty, remove_tree, write_changed
from modelcache.store.layout import Layout
from modelcache.store.records import check_listing
from modelcache.types import CacheError, FileEntry, Listing, Manifest, ModelRef, RemoteFile

SHA1_CHARACTERS = 40
SHA256_CHARACTERS = 64


def snapshot_is_whole(layout: Layout, directory: Path, files: Sequence[FileEntry]) -> bool:
    """Whether every name in the view still stands for the blob that it should."""
    try:
        return all(
            os.path.samestat(os.stat(directory / file.path), os.stat(layout.blob(file.digest)))
            for file in files
        )
    except (FileNotFoundError, NotADirectoryError):
        return False


def build_snapshot(layout: Layout, directory: Path, files: Sequence[FileEntry]) -> None:
    """Make the view at ``directory`` anew. Call it with the store locked.

    Hard links; where the file system has none, symbolic links. Built aside and renamed, so it is
    never seen half made.
    """
    fresh = layout.tmp / f"view-{uuid.uuid4().hex}"
    for file in files:
        target = fresh / file.path
        make_directory(target.parent)
        if not link(layout.blob(file.digest), target):
            # As seen from where the view will be, which is as deep below the root.
            place = (directory / file.path).parent
            target.symlink_to(os.path.relpath(layout.blob(file.digest), place))
    make_directory(directory.parent)
    if directory.exists():
        old = layout.tmp / f"old-{uuid.uuid4().hex}"
        os.rename(directory, old)
        os.rename(fresh, directory)
        remove_tree(old)
    else:
        os.rename(fresh, directory)


def remove_snapshot(directory: Path) -> None:
    """Remove a view; the blobs stay."""
    remove_tree(directory)
    parent = directory.parent
    if parent.is_dir() and not any(parent.iterdir()):
        parent.rmdir()


def hub_dirs(given: Sequence[Path], environ: Mapping[str, str]) -> tuple[Path, ...]:
    """The Hugging Face caches to look in: those of the settings, else where that library looks."""
    if given:
        return tuple(given)
    if environ.get("HF_HUB_CACHE"):
        return (Path(environ["HF_HUB_CACHE"]).expanduser(),)
    if environ.get("HF_HOME"):
        return (Path(environ["HF_HOME"]).expanduser() / "hub",)
    return (Path(environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "huggingface" / "hub",)


def find_file(dirs: Iterable[Path], file: RemoteFile) -> Path | None:
    """A file of that digest and size in one of these caches, not hashed yet."""
    names = [file.digests[kind] for kind in ("sha256", "git-sha1") if kind in file.digests]
    for name in names:
        if not name.isalnum():
            continue
        for directory in dirs:
            for found in directory.glob(f"models--*/blobs/{name}"):
                path = found.resolve()
                if path.is_file() and path.stat().st_size == file.size_bytes:
                    return path
    return None


def find_snapshot(dirs: Iterable[Path], ref: ModelRef) -> Listing | None:
    """What a cache has of a hub's model, for when the hub cannot be asked.

    A file's digest is the name of the blob its link leads to; one that leads to none has no
    digest that could be checked, so its snapshot is left alone.
    """
    parts = ref.location.split("/")
    if ref.scheme != "hf" or len(parts) != 2:
        return None
    for directory in dirs:
        model = directory / f"models--{parts[0]}--{parts[1]}"
        commit = _resolve(model, ref.revision or "main")
        if commit is not None:
            listing = _list_snapshot(model / "snapshots" / commit, commit)
            if listing is not None:
                return listing
    return None


def _resolve(model: Path, name: str) -> str | None:
    """The commit that a branch, tag or commit stands for in a cache."""
    try:
        commit = (model / "refs" / name).read_text().strip()
    except (OSError, UnicodeDecodeError):
        commit = name
    good = commit.isalnum() and (model / "snapshots" / commit).is_dir()
    return commit if good else None


def _list_snapshot(directory: Path, commit: str) -> Listing | None:
    files = []
    for path in sorted(directory.rglob("*")):
        if path.is_dir():
            continue
        blob = path.resolve()
        kind = {SHA1_CHARACTERS: "git-sha1", SHA256_CHARACTERS: "sha256"}.get(len(blob.name))
        if kind is None or not blob.is_file():
            return None
        files.append(
            RemoteFile(
                path=str(path.relative_to(directory)),
                size_bytes=blob.stat().st_size,
                version=blob.name,
                digests={kind: blob.name},
            )
        )
    listing = Listing(revision=commit, files=tuple(files))
    try:
        check_listing(listing.files)
    except CacheError:
        return None
    return listing


def hub_place(layout: Layout, url: str, revision: str) -> tuple[Path, str] | None:
    """The snapshot's directory in our own ``hub/`` and the folder within the model that ``url``
    means; ``None`` for what is not a hub's model."""
    if not url.startswith("hf://"):
        return None
    parts = url.removeprefix("hf://").split("/")
    model = layout.hub / f"models--{parts[0]}--{parts[1]}"
    return model / "snapshots" / revision, "/".join(parts[2:])


def show_in_hub(layout: Layout, manifest: Manifest, name: str | None) -> None:
    """Make a hub's model visible in ``hub/``. Call it with the store locked.

    A folder of a model is not shown: its snapshot would look complete without the rest.
    """
    place = hub_place(layout, manifest.url, manifest.revision)
    if place is None or place[1]:
        return
    snapshot = place[0]
    if not snapshot_is_whole(layout, snapshot, manifest.files):
        build_snapshot(layout, snapshot, manifest.files)
    make_directory(snapshot.parent.parent / "blobs")
    ref = snapshot.parent.parent / "refs" / (name or "main")
    if (name or "main") != manifest.revision:
        write_changed(ref, manifest.revision.encode(), tmp=layout.tmp)


def sweep_hub(layout: Layout, shown: set[Path]) -> None:
    """Leave these snapshots in ``hub/`` and no others, nor what led to others; a process killed
    at it may have left either. Call it with the store locked."""
    for model in sorted(layout.hub.glob("models--*")):
        names_left = {path.name for path in shown if path.parent.parent == model}
        for snapshot in sorted(model.glob("snapshots/*")):
            if snapshot not in shown:
                remove_snapshot(snapshot)
        refs = model / "refs"
        for directory, _, names in os.walk(refs, topdown=False):
            for name in names:
                path = Path(directory) / name
                if path.read_text(errors="replace").strip() not in names_left:
                    path.unlink()
            remove_empty(Path(directory))
        remove_empty(model / "blobs", refs, model / "snapshots", model)


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalFiles:
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
