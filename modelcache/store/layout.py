"""Where everything lies below the cache's directory.

blobs/<aa>/<digest>           the bytes of a file, read-only, named by tree digest
blobs/<aa>/<digest>.pieces    the digests of its pieces
partial/<file key>/           a file that is being fetched: data, and a journal of good pieces
known/<file key>              which blob a remote file became; also by a published SHA-256
models/<model key>/<rev>/     manifest.json once it is whole, fetching.json until then;
                              pin, use.json
models/<model key>/refs/      which revision a name (``main``) last stood for
views/<model key>/<rev>/      the model as a directory: hard links to blobs
hub/                          the same in the layout of a Hugging Face cache
leases/<model key>/<rev>/     one locked file for each holder
locks/                        the store's lock, and one for each model being fetched or made
prepared/work/<key>/          a preparation step's unfinished result: output/, and job.json;
                              whole, it is a model like any other, ``prepared://<key>``
prepared/logs/<key>.log       what the step said
tmp/                          what is being written; nothing in it counts
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

import blake3

from modelcache.types import PREPARED, RemoteFile

PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}")
REFS = "refs"
RESULT = "made"
"""The one revision that each of them has."""


def file_key(url: str, file: RemoteFile, revision: str) -> str:
    """One name for one content of one remote file, the same on every node.

    A file whose source gives it neither a version nor a digest could change without a sign, so
    its key holds for one revision of the model only.
    """
    versioned = bool(file.version or file.digests)
    identity = [
        url,
        "" if versioned else revision,
        file.path,
        file.version,
        file.size_bytes,
        sorted(file.digests.items()),
    ]
    return blake3.blake3(json.dumps(identity).encode()).hexdigest()[:40]


def model_key(url: str) -> str:
    """A directory's name for a model: readable, and different for different URLs."""
    last = re.sub(r"[^A-Za-z0-9._-]+", "-", url.rstrip("/").rsplit("/", 1)[-1]).strip("-._")
    return f"{last[:40] or 'model'}-{blake3.blake3(url.encode()).hexdigest()[:16]}"


def safe_name(text: str) -> str:
    """``text`` where it can be a file's name, else a digest of it."""
    if PLAIN.fullmatch(text) and text != REFS:
        return text
    return "x-" + blake3.blake3(text.encode()).hexdigest()[:32]


def result_url(key: str) -> str:
    """What a preparation step's result is called in the cache."""
    return f"{PREPARED}://{key}"


def result_key(url: str) -> str | None:
    """The key of the result that ``url`` is; ``None`` for a model that was fetched."""
    scheme, _, key = url.partition("://")
    return key if scheme == PREPARED else None


@dataclass(frozen=True, slots=True)
class Layout:
    """The paths below ``root``."""

    root: Path

    def blob(self, digest: str) -> Path:
        """The bytes of a blob."""
        return self.root / "blobs" / digest[:2] / digest

    def pieces(self, digest: str) -> Path:
        """The digests of a blob's pieces."""
        return self.root / "blobs" / digest[:2] / f"{digest}.pieces"

    def partial(self, key: str) -> Path:
        """The directory of a file that is being fetched."""
        return self.root / "partial" / key

    def known(self, key: str) -> Path:
        """The record of which blob a remote file became."""
        return self.root / "known" / key

    def known_sha256(self, sha256: str) -> Path:
        """The record of which blob has this SHA-256."""
        return self.root / "known" / f"sha256-{safe_name(sha256)}"

    def model(self, url: str) -> Path:
        """The directory of a model's revisions."""
        return self.root / "models" / model_key(url)

    def revision(self, url: str, revision: str) -> Path:
        """The directory of one revision's records."""
        return self.model(url) / safe_name(revision)

    def ref(self, url: str, name: str | None) -> Path:
        """The record of the revision that ``name`` (``None``: the newest) last stood for."""
        return self.model(url) / REFS / ("@newest" if name is None else safe_name(name))

    def snapshot(self, url: str, revision: str) -> Path:
        """The revision as a directory that engines open."""
        return self.root / "views" / model_key(url) / safe_name(revision)

    def leases(self, url: str, revision: str) -> Path:
        """The directory of a revision's leases."""
        return self.root / "leases" / model_key(url) / safe_name(revision)

    def fetch_lock(self, url: str) -> Path:
        """Locked by the process that fetches a revision of this model."""
        return self.root / "locks" / f"{model_key(url)}.fetch"

    def unfinished(self, key: str) -> Path:
        """The directory of an unfinished result of a preparation step."""
        return self.root / PREPARED / "work" / key

    def unfinished_output(self, key: str) -> Path:
        """Where the step writes the files of its result."""
        return self.unfinished(key) / "output"

    def step_lock(self, key: str) -> Path:
        """Locked while a step's result is being made, by the process that runs the step and by the
        step."""
        return self.root / "locks" / f"{key}.step"

    def step_log(self, key: str) -> Path:
        """What a step said while it made its result."""
        return self.root / PREPARED / "logs" / f"{key}.log"

    @property
    def store_lock(self) -> Path:
        """Locked, briefly, by a process that changes what the store consists of."""
        return self.root / "locks" / "store"

    @property
    def tmp(self) -> Path:
        """Where files are written before they are renamed into place, under the store's lock."""
        return self.root / "tmp"

    @property
    def hub(self) -> Path:
        """The store in the layout of a Hugging Face cache."""
        return self.root / "hub"
