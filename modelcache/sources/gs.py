"""Models in Google Cloud Storage, listed and read by obstore.

Not by signed URLs as S3: signing takes a service account's own key, which a process on Google's
machines does not have.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

from modelcache.ports import ANNOUNCE_BYTES, ONCE, RangeRead, Retries
from modelcache.refs import SCHEMES
from modelcache.sources import answers, wire
from modelcache.sources.obstore_client import (
    ObjectStoreAccess,
    list_objects,
    obstore_errors,
    open_bucket,
)
from modelcache.sources.proxy import proxy_of
from modelcache.sources.reader import home_of
from modelcache.types import Listing, ModelRef, RemoteFile, SourceError

STORE = "https://storage.googleapis.com"
METADATA_WAIT_S = 1.0
HINT = SCHEMES["gs"].credentials


class GsSource:
    """One model below a prefix of a bucket (or one object)."""

    def __init__(self, ref: ModelRef, environ: Mapping[str, str], *, timeout_s: float) -> None:
        self.ref = ref
        self._bucket, _, self._prefix = ref.location.partition("/")
        self._below = f"{self._prefix}/" if self._prefix else ""
        from obstore.store import GCSStore

        with obstore_errors(self.ref.url, HINT, ()):
            access = find_access(environ)
            proxy = proxy_of(access.endpoint or STORE, environ)
            self._access = replace(access, proxy=proxy)
            opened = replace(self._access, endpoint=None)  # the emulator's is in its config
            self._store = open_bucket(GCSStore, self._bucket, opened, timeout_s=timeout_s)

    def _errors(self, what: str) -> AbstractContextManager[None]:
        return obstore_errors(what, HINT, (), signed=not self._access.anonymous)

    def list(self, retries: Retries = ONCE) -> Listing:
        """See ``Source.list``."""
        metas, self._below = list_objects(
            self._store, self._prefix, lambda: self._errors(self.ref.url), retries
        )
        return answers.make_listing(self.ref, [_file_of(meta, self._below) for meta in metas])

    def fetch(self, want: RangeRead) -> None:
        """See ``Source.fetch``."""
        import obstore

        file, span = want.file, (want.start, want.end)
        key = self._below + file.path
        shown = f"gs://{self._bucket}/{key}"
        want = replace(want, what=shown)
        if wire.is_empty(want):
            return
        with self._errors(shown):
            got = obstore.get(self._store, key, options={"range": span})
            if got.range != span or got.meta["size"] != file.size_bytes:
                raise SourceError(f"{shown}: the source sent another range than was asked for")
            if _version_of(got.meta) != file.version:
                raise SourceError(f"{shown}: it has changed since it was listed")
            chunks = got.stream(min_chunk_size=ANNOUNCE_BYTES // 4)
            wire.write_chunks(want, map(memoryview, chunks))

    def close(self) -> None:
        """Obstore's connections go with the object."""


def _version_of(meta: Mapping[str, Any]) -> str:
    etag = answers.plain_etag(meta["e_tag"] or "")
    return f"etag:{etag}" if etag else f"date:{meta['last_modified'].isoformat()}"


def _file_of(meta: Mapping[str, Any], below: str) -> RemoteFile:
    return RemoteFile(
        path=str(meta["path"]).removeprefix(below),
        size_bytes=int(meta["size"]),
        version=_version_of(meta),
    )


def find_access(environ: Mapping[str, str]) -> ObjectStoreAccess:
    """Look in the usual places: an emulator (``STORAGE_EMULATOR_HOST``), a file of credentials,
    what the metadata server gives, or nothing (public buckets)."""
    emulator = environ.get("STORAGE_EMULATOR_HOST")
    if emulator:
        url = emulator if "://" in emulator else f"http://{emulator}"
        key = {
            "gcs_base_url": url,
            "disable_oauth": True,
            "client_email": "",
            "private_key": "",
            "private_key_id": "",
        }
        return ObjectStoreAccess(config={"service_account_key": json.dumps(key)}, endpoint=url)
    usual = os.path.join(home_of(environ), ".config/gcloud/application_default_credentials.json")
    path = environ.get("GOOGLE_APPLICATION_CREDENTIALS")
    if path or os.path.exists(usual):
        return ObjectStoreAccess(config={"application_credentials": _readable(path or usual)})
    return ObjectStoreAccess(anonymous=not _is_on_google(environ))


def _is_on_google(environ: Mapping[str, str]) -> bool:
    """Whether the metadata server answers; a second at most where there is none."""
    if environ.get("NO_GCE_CHECK", "").lower() == "true":
        return False
    host = environ.get("GCE_METADATA_HOST") or "metadata.google.internal"
    try:
        socket.create_connection((host, 80), timeout=METADATA_WAIT_S).close()
    except OSError:
        return False
    return True


def _readable(path: str) -> str:
    if not os.access(path, os.R_OK):
        raise SourceError(f"GOOGLE_APPLICATION_CREDENTIALS names {path}, which cannot be read")
    return path
