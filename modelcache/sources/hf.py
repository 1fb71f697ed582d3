"""Models on the Hugging Face hub, or what speaks its API (``HF_ENDPOINT``): listed by its API, read
by ranges from where the hub redirects to."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from modelcache.ports import ONCE, Retries
from modelcache.refs import SCHEMES
from modelcache.sources import answers
from modelcache.sources.reader import HttpReader, HttpRequest, RangedSource, home_of
from modelcache.types import DIGEST, Listing, ModelRef, NotFound, RemoteFile, SourceError

ENDPOINT = "https://huggingface.co"
HINT = SCHEMES["hf"].credentials
_TRUE = ("1", "on", "yes", "true")
_COMMIT = re.compile(r"[0-9a-zA-Z]{6,64}")
_HEX = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


class HfSource(RangedSource):
    """One revision of a model of the hub, or one folder of it."""

    def __init__(self, ref: ModelRef, reader: HttpReader, environ: Mapping[str, str]) -> None:
        super().__init__(ref, reader)
        parts = ref.location.split("/")
        self._repo, self._folder = "/".join(parts[:2]), "/".join(parts[2:])
        self._endpoint = (environ.get("HF_ENDPOINT") or ENDPOINT).rstrip("/")
        self._token = find_token(environ)
        self._offline = any(
            environ.get(name, "").lower() in _TRUE
            for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
        )
        self._commit: str | None = None

    def list(self, retries: Retries = ONCE) -> Listing:
        """See ``Source.list``."""
        if self._offline:
            raise SourceError(f"{self.ref.url}: HF_HUB_OFFLINE says not to ask the hub")
        asked = f"/revision/{quote(self.ref.revision, safe='')}" if self.ref.revision else ""
        url = f"{self._endpoint}/api/models/{self._repo}{asked}?blobs=true"
        try:
            _, page = self.reader.page(self._request(url, self.ref.url), retries)
        except NotFound as error:
            if self.ref.revision and "revision" in str(error):
                raise NotFound(
                    f"{self.ref.url}: the hub has no revision {self.ref.revision!r} of it"
                ) from None
            raise
        self._commit, siblings = read_info(self.ref.url, page)
        below = f"{self._folder}/" if self._folder else ""
        files = [
            _file_of(self.ref, sibling, below)
            for sibling in siblings
            if str(sibling.get("rfilename", "")).startswith(below)
        ]
        return self.probed(answers.make_listing(self.ref, files, revision=self._commit), retries)

    def request_of(self, file: RemoteFile) -> HttpRequest:
        """See ``RangedSource.request_of``."""
        path = f"{self._folder}/{file.path}" if self._folder else file.path
        # A revision that is read without having been listed here is what was asked for.
        revision = quote(self._commit or self.ref.revision or "main", safe="")
        url = f"{self._endpoint}/{self._repo}/resolve/{revision}/{quote(path)}"
        return self._request(url, f"hf://{self._repo}/{path}")

    def _request(self, url: str, shown: str) -> HttpRequest:
        return HttpRequest(
            url=url,
            shown=shown,
            hint=HINT,
            headers={"Authorization": f"Bearer {self._token}"} if self._token else {},
            signed=self._token is not None,
            page=f"{self._endpoint}/{self._repo}",
        )


def read_info(url: str, page: bytes) -> tuple[str, list[dict[str, Any]]]:
    """The commit and the files that the hub's API tells of a model. Raises ``SourceError``."""
    nonsense = SourceError(f"{url}: the hub's answer makes no sense")
    try:
        info = json.loads(page)
    except (ValueError, RecursionError):
        raise nonsense from None
    if not isinstance(info, dict):
        raise nonsense
    commit, siblings = info.get("sha"), info.get("siblings") or []
    if not isinstance(commit, str) or not _COMMIT.fullmatch(commit):
        raise nonsense
    if not isinstance(siblings, list) or not all(isinstance(one, dict) for one in siblings):
        raise nonsense
    return commit, siblings


def _file_of(ref: ModelRef, sibling: Mapping[str, Any], below: str) -> RemoteFile:
    path, size, lfs = sibling.get("rfilename"), sibling.get("size"), sibling.get("lfs")
    if not isinstance(path, str):
        raise SourceError(f"{ref.url}: the hub lists a file without a name")
    if type(size) is not int:
        raise SourceError(f"{ref.url}: the hub does not say how long {path[:200]!r} is")
    digests, blob = {}, sibling.get("blobId")
    blob = blob.lower() if isinstance(blob, str) and _HEX.fullmatch(blob.lower()) else ""
    if isinstance(lfs, dict):
        sha256 = str(lfs.get("sha256") or lfs.get("oid") or "").lower().removeprefix("sha256:")
        if not DIGEST.fullmatch(sha256):
            raise SourceError(f"{ref.url}: the hub has no SHA-256 of {path[:200]!r}")
        digests["sha256"] = sha256
    elif blob:
        digests["git-sha1"] = blob
    return RemoteFile(
        path=path.removeprefix(below),
        size_bytes=size,
        version=f"git:{blob}" if blob else "",
        digests=digests,
    )


def find_token(environ: Mapping[str, str]) -> str | None:
    """The hub's token: the environment, else the file that logging in leaves."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        token = "".join(environ.get(name, "").split())
        if token:
            return token
    cache = environ.get("XDG_CACHE_HOME") or f"{home_of(environ)}/.cache"
    home = environ.get("HF_HOME") or f"{cache}/huggingface"
    try:
        text = Path(environ.get("HF_TOKEN_PATH") or f"{home}/token").expanduser().read_text()
    except (OSError, UnicodeDecodeError):
        return None
    return "".join(text.split()) or None
