"""Models in S3 and what speaks its protocol: listed and signed by obstore, read by ranges of signed
URLs."""

from __future__ import annotations

import configparser
import os
import re
import socket
import threading
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from modelcache.ports import ONCE, Retries
from modelcache.refs import SCHEMES
from modelcache.sources import answers
from modelcache.sources.obstore_client import (
    ObjectStoreAccess,
    list_objects,
    obstore_errors,
    open_bucket,
)
from modelcache.sources.proxy import proxy_of
from modelcache.sources.reader import HttpReader, HttpRequest, RangedSource, ask_each, home_of
from modelcache.types import Listing, ModelRef, RemoteFile, SourceError

if TYPE_CHECKING:
    from obstore.store import S3Store

SIGNED_FOR = timedelta(hours=1)
DEFAULT_REGION = "us-east-1"

_REGION = re.compile(r"[a-z0-9-]{2,40}")
_MD5 = re.compile(r"^[0-9a-f]{32}$")

HINT = SCHEMES["s3"].credentials
INSTANCE = ("169.254.169.254", 80)
INSTANCE_WAIT_S = 1.0
_GIVEN_ELSEWHERE = (
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
)
"""Where one of these is set, obstore fetches and renews credentials by itself."""

_NEEDS_BOTO = ("sso_session", "sso_start_url", "role_arn", "credential_process", "login_session")


class S3Source(RangedSource):
    """One model below a prefix of a bucket (or one object)."""

    def __init__(
        self, ref: ModelRef, reader: HttpReader, environ: Mapping[str, str], *, timeout_s: float
    ) -> None:
        super().__init__(ref, reader)
        self._bucket, _, self._prefix = ref.location.partition("/")
        self._below = f"{self._prefix}/" if self._prefix else ""
        self._timeout_s = timeout_s
        self._access = find_access(environ)
        self._store: S3Store | None = None
        self._opening = threading.Lock()

    def _open(self, retries: Retries = ONCE) -> S3Store:
        """The bucket, in its region."""
        from obstore.store import S3Store

        with self._opening:
            if self._store is None:
                access = self._access
                region = access.region or self._find_region(access.endpoint, retries)
                endpoint = access.endpoint or f"https://s3.{region}.amazonaws.com"
                proxy = proxy_of(endpoint, self.reader.environ)
                self._access = replace(access, region=region, proxy=proxy)
                with self._errors(self.ref.url):
                    self._store = open_bucket(
                        S3Store, self._bucket, self._access, timeout_s=self._timeout_s
                    )
            return self._store

    def _errors(self, what: str) -> AbstractContextManager[None]:
        access = self._access
        return obstore_errors(what, HINT, access.secrets, signed=not access.anonymous)

    def _find_region(self, endpoint: str | None, retries: Retries) -> str:
        """The bucket's region, which S3 tells without credentials. Other sources accept any."""
        if endpoint:
            return DEFAULT_REGION
        url = f"https://s3.amazonaws.com/{self._bucket}"
        head = self.reader.raw_head(HttpRequest(url=url, shown=self.ref.url), retries)
        region = head.headers.get("x-amz-bucket-region", "")
        return region if _REGION.fullmatch(region) else DEFAULT_REGION

    def list(self, retries: Retries = ONCE) -> Listing:
        """See ``Source.list``."""
        metas, below = list_objects(
            self._open(retries), self._prefix, lambda: self._errors(self.ref.url), retries
        )
        self._below = below
        files = ask_each(lambda meta: self._file_of(meta, below, retries), metas)
        return self.probed(answers.make_listing(self.ref, files), retries)

    def _file_of(self, meta: Mapping[str, Any], below: str, retries: Retries) -> RemoteFile:
        path, etag = str(meta["path"]), answers.plain_etag(meta["e_tag"] or "")
        digests = {}
        if _MD5.match(etag):
            # Of an encrypted object the ETag has the form of an MD5 and is none.
            head = self.reader.head(self._request("HEAD", path), retries)
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

    def request_of(self, file: RemoteFile) -> HttpRequest:
        """See ``RangedSource.request_of``."""
        return self._request("GET", self._below + file.path)

    def _request(self, method: Any, key: str) -> HttpRequest:
        shown, store = f"s3://{self._bucket}/{key}", self._open()
        if self._access.anonymous:
            endpoint = self._access.endpoint or f"https://s3.{self._access.region}.amazonaws.com"
            url = f"{endpoint.rstrip('/')}/{self._bucket}/{quote(key)}"
            return HttpRequest(url=url, shown=shown, hint=HINT, signed=False)
        import obstore

        with self._errors(shown):
            url = obstore.sign(store, method, key, SIGNED_FOR)
        return HttpRequest(url=url, shown=shown, hint=HINT)


def _is_on_instance(environ: Mapping[str, str]) -> bool:
    """Whether an instance's metadata answers; a second at most where there is none."""
    if environ.get("AWS_EC2_METADATA_DISABLED", "").lower() == "true":
        return False
    try:
        socket.create_connection(INSTANCE, timeout=INSTANCE_WAIT_S).close()
    except OSError:
        return False
    return True


def find_access(
    environ: Mapping[str, str],
    *,
    on_instance: Callable[[Mapping[str, str]], bool] = _is_on_instance,
) -> ObjectStoreAccess:
    """Look in the usual places. Raises ``SourceError`` where a profile is named and not there, or
    needs boto3 and that is not installed."""
    profile = _read_profile(environ)
    endpoint = (
        environ.get("AWS_ENDPOINT_URL_S3")
        or environ.get("AWS_ENDPOINT_URL")
        or environ.get("AWS_ENDPOINT")
        or profile.get("endpoint_url")
    )
    region = environ.get("AWS_REGION") or environ.get("AWS_DEFAULT_REGION") or profile.get("region")
    place: dict[str, Any] = {"endpoint": endpoint or None, "region": region or None}
    key, secret = environ.get("AWS_ACCESS_KEY_ID"), environ.get("AWS_SECRET_ACCESS_KEY")
    if key and secret:
        return ObjectStoreAccess(**place, **_static(key, secret, environ.get("AWS_SESSION_TOKEN")))
    if profile.get("aws_access_key_id") and profile.get("aws_secret_access_key"):
        return ObjectStoreAccess(
            **place,
            **_static(
                profile["aws_access_key_id"],
                profile["aws_secret_access_key"],
                profile.get("aws_session_token"),
            ),
        )
    if any(profile.get(name) for name in _NEEDS_BOTO):
        provider = _boto_provider(environ.get("AWS_PROFILE"))
        return ObjectStoreAccess(**place, config={"credential_provider": provider})
    given_elsewhere = any(environ.get(name) for name in _GIVEN_ELSEWHERE) or on_instance(environ)
    return ObjectStoreAccess(**place, anonymous=not given_elsewhere)


def _static(key: str, secret: str, token: str | None) -> dict[str, Any]:
    config = {"access_key_id": key, "secret_access_key": secret}
    if token:
        config["session_token"] = token
    return {"config": config, "secrets": (key, secret, *([token] if token else []))}


def _read_profile(environ: Mapping[str, str]) -> dict[str, str]:
    """The profile's settings and keys; none where there are no such files."""
    folder = os.path.join(home_of(environ), ".aws")
    files = (
        environ.get("AWS_CONFIG_FILE") or os.path.join(folder, "config"),
        environ.get("AWS_SHARED_CREDENTIALS_FILE") or os.path.join(folder, "credentials"),
    )
    name = environ.get("AWS_PROFILE") or environ.get("AWS_DEFAULT_PROFILE") or "default"
    found: dict[str, str] = {}
    for path in files:
        parser = configparser.RawConfigParser()
        try:
            parser.read(path, encoding="utf-8")
        except (configparser.Error, UnicodeDecodeError):
            # The parser's own message quotes the line, which may hold a key.
            raise SourceError(f"{path} is not as the AWS tools write it") from None
        for section in (name, f"profile {name}"):
            if parser.has_section(section):
                found.update(parser.items(section))
    if not found and environ.get("AWS_PROFILE"):
        raise SourceError(f"AWS_PROFILE names {name!r}, and {' and '.join(files)} have no such one")
    return found


def _boto_provider(profile: str | None) -> Any:
    try:
        import boto3
        from obstore.auth.boto3 import Boto3CredentialProvider
    except ImportError:
        raise SourceError(
            "the AWS profile gets its credentials by single sign-on, a role or a command; that "
            "takes boto3: pip install boto3"
        ) from None
    try:
        return Boto3CredentialProvider(boto3.Session(profile_name=profile))
    except Exception as error:  # noqa: BLE001 - botocore's errors have no common base of their own
        raise SourceError(
            f"the AWS profile gives no credentials ({type(error).__name__})"
        ) from None
