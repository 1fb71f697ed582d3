"""Credentials and endpoint for Alibaba Cloud OSS, from where its tools look: the environment, the
file of ``ossutil``, then what a container (a URL) or an instance (its RAM role) is given. Nothing
anywhere: unsigned requests, as public buckets take them."""

from __future__ import annotations

import configparser
import json
import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from urllib.parse import urlsplit

from modelcache.sources.reader import Reader, Request, home_of
from modelcache.types import SourceError

HINT = "OSS_ACCESS_KEY_ID and OSS_ACCESS_KEY_SECRET (and OSS_SESSION_TOKEN), or ~/.ossutilconfig"
METADATA = "http://100.100.100.200/latest/meta-data/ram/security-credentials/"
RENEW_BEFORE_S = 300.0

_NAMES = (
    ("OSS_ACCESS_KEY_ID", "OSS_ACCESS_KEY_SECRET", "OSS_SESSION_TOKEN"),
    (
        "ALIBABA_CLOUD_ACCESS_KEY_ID",
        "ALIBABA_CLOUD_ACCESS_KEY_SECRET",
        "ALIBABA_CLOUD_SECURITY_TOKEN",
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Keys:
    """What signs a request. Without a ``key`` requests are unsigned."""

    key: str = ""
    secret: str = field(default="", repr=False)
    token: str = field(default="", repr=False)
    good_until_s: float | None = None

    @property
    def secrets(self) -> tuple[str, ...]:
        """What must not be shown."""
        return tuple(text for text in (self.key, self.secret, self.token) if text)


@dataclass(slots=True, kw_only=True)
class Access:
    """How one bucket is reached. ``keys()`` renews credentials that run out."""

    endpoint: str
    fetch: Callable[[], Keys]
    clock: Callable[[], float] = time.time
    _keys: Keys | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def keys(self) -> Keys:
        """Credentials that are good for a while yet. Raises ``SourceError``."""
        with self._lock:
            kept = self._keys
            if kept is None or (
                kept.good_until_s is not None and kept.good_until_s - self.clock() < RENEW_BEFORE_S
            ):
                kept = self._keys = self.fetch()
            return kept


def find_access(bucket_host: str, environ: Mapping[str, str], reader: Reader) -> tuple[str, Access]:
    """The bucket's name, and how it is reached.

    ``bucket_host`` is the first part of the URL: a bucket, or a bucket with its endpoint
    (``models.oss-cn-hangzhou.aliyuncs.com``). Raises ``SourceError`` where no endpoint is known.
    """
    file = _read_file(environ)
    bucket, _, host = bucket_host.partition(".")
    endpoint = host if host else environ.get("OSS_ENDPOINT") or file.get("endpoint") or ""
    region = environ.get("OSS_REGION")
    if not endpoint and region:
        endpoint = f"oss-{region.removeprefix('oss-')}.aliyuncs.com"
    if not endpoint:
        raise SourceError(
            f"oss://{bucket}: which endpoint? Set OSS_ENDPOINT (https://oss-cn-hangzhou.aliyuncs.com)"
            ", or OSS_REGION, or write oss://bucket.oss-cn-hangzhou.aliyuncs.com/prefix"
        )
    if "://" not in endpoint:
        endpoint = f"https://{endpoint}"
    if not urlsplit(endpoint).hostname:
        raise SourceError("OSS_ENDPOINT is no address")
    return bucket, Access(endpoint=endpoint, fetch=_fetcher(environ, file, reader))


def _fetcher(
    environ: Mapping[str, str], file: Mapping[str, str], reader: Reader
) -> Callable[[], Keys]:
    for key, secret, token in _NAMES:
        if environ.get(key) and environ.get(secret):
            keys = Keys(key=environ[key], secret=environ[secret], token=environ.get(token, ""))
            return lambda: keys
    if file.get("accesskeyid") and file.get("accesskeysecret"):
        given = Keys(
            key=file["accesskeyid"],
            secret=file["accesskeysecret"],
            token=file.get("ststoken", ""),
        )
        return lambda: given
    url = environ.get("ALIBABA_CLOUD_CREDENTIALS_URI")
    role = environ.get("ALIBABA_CLOUD_ECS_METADATA")
    if not url and role:
        url = METADATA + role
    if url:
        return lambda: _ask(url, reader)
    return Keys


def _ask(url: str, reader: Reader) -> Keys:
    """Credentials for a while from a URL, in the form that the metadata server has."""
    request = Request(url=url, shown="the credentials of this instance or container")
    _, page = reader.page(request)
    try:
        found = json.loads(page)
        return Keys(
            key=str(found["AccessKeyId"]),
            secret=str(found["AccessKeySecret"]),
            token=str(found["SecurityToken"]),
            good_until_s=datetime.fromisoformat(found["Expiration"]).timestamp(),
        )
    except (ValueError, TypeError, KeyError):
        raise SourceError(f"{request.shown} are not in the form that is expected") from None


def _read_file(environ: Mapping[str, str]) -> dict[str, str]:
    """The settings of ``ossutil``; none where it has no file."""
    path = environ.get("OSSUTIL_CONFIG_FILE") or os.path.join(home_of(environ), ".ossutilconfig")
    parser = configparser.RawConfigParser()
    try:
        parser.read(path, encoding="utf-8")
    except (configparser.Error, UnicodeDecodeError):
        # The parser's own message quotes the line, which may hold a key.
        raise SourceError(f"{path} is not as ossutil writes it") from None
    return dict(parser.items("Credentials")) if parser.has_section("Credentials") else {}
