"""Models in S3 and what speaks its protocol: listed and signed by obstore, read by ranges of signed
URLs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from modelcache.ports import Listing
from modelcache.sources import answers, obstores
from modelcache.sources.listings import ask_each, make_listing
from modelcache.sources.ranged import RangedSource
from modelcache.sources.reader import Reader, Request
from modelcache.sources.s3_access import HINT, Access
from modelcache.types import ModelRef, RemoteFile

if TYPE_CHECKING:
    from obstore.store import S3Store

SIGNED_FOR = timedelta(hours=1)
DEFAULT_REGION = "us-east-1"

_MD5 = re.compile(r"^[0-9a-f]{32}$")


class S3Source(RangedSource):
    """One model below a prefix of a bucket (or one object)."""

    def __init__(self, ref: ModelRef, reader: Reader, access: Access, *, timeout_s: float) -> None:
        super().__init__(ref, reader)
        self._bucket, _, self._prefix = ref.location.partition("/")
        self._access = access
        self._region = access.region or self._find_region()
        self._store = self._make_store(timeout_s)
        self._single = False

    def _make_store(self, timeout_s: float) -> S3Store:
        from obstore.store import S3Store

        access = self._access
        config: dict[str, Any] = {**access.config, "region": self._region}
        if access.endpoint:
            config["endpoint"] = access.endpoint
        if access.anonymous:
            config["skip_signature"] = True
        if access.provider is not None:
            config["credential_provider"] = access.provider
        with obstores.failing(self.ref.url, HINT, access.secrets):
            return S3Store(
                self._bucket,
                client_options=obstores.client_options(timeout_s),
                retry_config=obstores.retry_config(),
                **config,
            )

    def _find_region(self) -> str:
        """The bucket's region, which S3 tells to anybody. Other stores do not mind which."""
        if self._access.endpoint:
            return DEFAULT_REGION
        url = f"https://s3.amazonaws.com/{self._bucket}"
        head = self.reader.raw_head(Request(url=url, shown=self.ref.url))
        return head.headers.get("x-amz-bucket-region") or DEFAULT_REGION

    def list(self) -> Listing:
        """See ``Source.list``."""
        import obstore

        with obstores.failing(self.ref.url, HINT, self._access.secrets):
            prefix = self._prefix or None
            found = [meta for page in obstore.list(self._store, prefix=prefix) for meta in page]
        below = f"{self._prefix}/" if self._prefix else ""
        metas = [m for m in found if m["path"].startswith(below) and not m["path"].endswith("/")]
        self._single = not metas and bool(self._prefix)
        if self._single:
            with obstores.failing(self.ref.url, HINT, self._access.secrets):
                metas = [obstore.head(self._store, self._prefix)]
            below = self._prefix.rpartition("/")[0]
            below += "/" if below else ""
        files = ask_each(lambda meta: self._file_of(meta, below), metas)
        return self.probed(make_listing(self.ref, files))

    def _file_of(self, meta: Mapping[str, Any], below: str) -> RemoteFile:
        path, etag = str(meta["path"]), answers.plain_etag(meta["e_tag"] or "")
        digests = {}
        if _MD5.match(etag):
            # Of an encrypted object the ETag has the form of an MD5 and is none.
            head = self.reader.head(self._request("HEAD", path))
            if head.headers.get("x-amz-server-side-encryption", "AES256") == "AES256" and not any(
                name.startswith("x-amz-server-side-encryption-customer") for name in head.headers
            ):
                digests["md5"] = etag
        return RemoteFile(
            path=path.removeprefix(below),
            size_bytes=int(meta["size"]),
            version=f"etag:{etag}" if etag else "",
            digests=digests,
        )

    def request_of(self, file: RemoteFile) -> Request:
        """See ``RangedSource.request_of``."""
        below = self._prefix
        if self._single:
            below = self._prefix.rpartition("/")[0]
        return self._request("GET", f"{below}/{file.path}" if below else file.path)

    def _request(self, method: Any, key: str) -> Request:
        shown = f"s3://{self._bucket}/{key}"
        if self._access.anonymous:
            endpoint = self._access.endpoint or f"https://s3.{self._region}.amazonaws.com"
            url = f"{endpoint.rstrip('/')}/{self._bucket}/{quote(key)}"
            return Request(url=url, shown=shown, hint=HINT)
        import obstore

        with obstores.failing(shown, HINT, self._access.secrets):
            url = obstore.sign(self._store, method, key, SIGNED_FOR)
        return Request(url=url, shown=shown, hint=HINT)
