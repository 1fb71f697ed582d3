"""Models in Alibaba Cloud OSS: listed by ossfs, signed by oss2, read by ranges of signed URLs.

ossfs's own reads are not used: its ranges end one byte late, some of its cache types return wrong
bytes, and a checksum in Python makes it slow. Every range is checked here all the same.
"""

from __future__ import annotations

import configparser
import contextlib
import ipaddress
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from modelcache.ports import ONCE, Retries
from modelcache.refs import SCHEMES, redact
from modelcache.sources import answers
from modelcache.sources.proxy import proxy_of
from modelcache.sources.reader import (
    HttpReader,
    HttpRequest,
    RangedSource,
    ask_each,
    certificates,
    home_of,
)
from modelcache.sources.retry import keep_asking
from modelcache.types import CacheError, Listing, ModelRef, RemoteFile, SourceError

if TYPE_CHECKING:
    import oss2


SIGNED_FOR_S = 3_600

HINT = SCHEMES["oss"].credentials
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


class OssSource(RangedSource):
    """One model below a prefix of a bucket (or one object)."""

    def __init__(
        self, ref: ModelRef, reader: HttpReader, environ: Mapping[str, str], *, timeout_s: float
    ) -> None:
        super().__init__(ref, reader)
        host, _, self._prefix = ref.location.partition("/")
        self._bucket, _, endpoint = host.partition(".")
        self._access = find_access(environ, reader, endpoint=endpoint)
        self._timeout_s = timeout_s
        self._below = self._prefix
        self._session: oss2.Session | None = None

    def list(self, retries: Retries = ONCE) -> Listing:
        """See ``Source.list``."""
        keys = self._keys(retries)
        bucket = self._open_bucket(keys)
        below = f"{self._prefix}/" if self._prefix else ""

        def errors() -> AbstractContextManager[None]:
            return failing(self.ref.url, keys)

        found = keep_asking(lambda: self._find(keys, below), retries, errors)
        if not found and self._prefix:
            found, below = [self._prefix], self._prefix[: self._prefix.rfind("/") + 1]
        self._below = below.rstrip("/")
        files = ask_each(
            lambda key: keep_asking(
                lambda: _file_of(bucket, key, key.removeprefix(below)), retries, errors
            ),
            found,
        )
        return self.probed(answers.make_listing(self.ref, files), retries)

    def _keys(self, retries: Retries = ONCE) -> OssKeys:
        return keep_asking(self._access.keys, retries)

    def _find(self, keys: OssKeys, below: str) -> Sequence[str]:
        """The keys of all objects below a prefix but the markers of folders."""
        import ossfs

        system = ossfs.OSSFileSystem(
            endpoint=self._access.endpoint,
            key=keys.key or None,
            secret=keys.secret or None,
            token=keys.token or None,
            # fsspec would keep it, and the keys in it, for as long as the process lives.
            skip_instance_cache=True,
        )
        system._session = self._open_session(keys)
        # Not ``find``: a whole bucket it walks, where fsspec skips folders whose listing is cut off
        # and a last question (for all buckets of the account) goes over another session.
        found = system._ls_dir(
            self._bucket, delimiter="", prefix=below, connect_timeout=self._timeout_s
        )
        names = (str(one["name"]).removeprefix(f"{self._bucket}/") for one in found)
        return [key for key in names if not key.endswith("/")]

    def _open_bucket(self, keys: OssKeys) -> oss2.Bucket:
        import oss2

        if not keys.key:
            auth = oss2.AnonymousAuth()
        elif keys.token:
            auth = oss2.StsAuth(keys.key, keys.secret, keys.token)
        else:
            auth = oss2.Auth(keys.key, keys.secret)
        session = self._open_session(keys)
        with failing(self.ref.url, keys):
            return oss2.Bucket(
                auth,
                self._access.endpoint,
                self._bucket,
                session=session,
                connect_timeout=self._timeout_s,
            )

    def _open_session(self, keys: OssKeys) -> _Session:
        import oss2

        logging.getLogger("oss2").setLevel(logging.CRITICAL)  # it logs what was signed
        if self._session is None:
            proxy = proxy_of(self._url_of_bucket(), self.reader.environ)
            session = oss2.Session()
            session.session.trust_env = False  # its own rule for proxies, and netrc
            session.session.verify = certificates(self.reader.environ) or True
            session.session.proxies = {"http": proxy, "https": proxy} if proxy else {}
            self._session = session
        return _Session(self._session, self.ref.url, keys)

    def _url_of_bucket(self) -> str:
        """Where its requests go: the bucket's host, or the endpoint's where that is an address."""
        at = urlsplit(self._access.endpoint)
        try:
            ipaddress.ip_address(at.hostname or "")
        except ValueError:
            return f"{at.scheme}://{self._bucket}.{at.netloc}"
        return self._access.endpoint

    def request_of(self, file: RemoteFile) -> HttpRequest:
        """See ``RangedSource.request_of``."""
        key = f"{self._below}/{file.path}" if self._below else file.path
        shown = f"oss://{self._bucket}/{key}"
        keys = self._keys()
        bucket = self._open_bucket(keys)
        with failing(shown, keys):
            url = bucket.sign_url("GET", key, SIGNED_FOR_S, slash_safe=True)
        return HttpRequest(url=url, shown=shown, hint=HINT, signed=bool(keys.key))


@dataclass(frozen=True, slots=True)
class _Session:
    """What oss2 and ossfs send requests by. Its errors are ours at once: oss2 would ask again by a
    rule of its own, and ossfs would take a bucket that may not be listed for an empty one."""

    session: oss2.Session
    what: str
    keys: OssKeys

    def do_request(self, request: Any, timeout: Any) -> Any:
        import oss2

        with failing(self.what, self.keys):
            answer = self.session.do_request(request, timeout)
            if answer.status // 100 != 2:
                raise oss2.exceptions.make_exception(answer)
            return answer


def _file_of(bucket: oss2.Bucket, key: str, path: str) -> RemoteFile:
    head = bucket.head_object(key)
    etag = answers.plain_etag(head.headers.get("ETag", ""))
    digests = {}
    crc = head.headers.get("x-oss-hash-crc64ecma", "")
    if crc.isdigit():
        digests["crc64"] = f"{int(crc):016x}"
    return RemoteFile(
        path=path,
        size_bytes=int(head.content_length),
        version=f"etag:{etag}" if etag else "",
        digests=digests,
    )


@contextlib.contextmanager
def failing(what: str, keys: OssKeys) -> Iterator[None]:
    """Make oss2's and ossfs's errors ``SourceError``s that name ``what`` and show no secret."""
    import oss2

    try:
        yield
    except CacheError:
        raise
    except oss2.exceptions.RequestError as error:
        reason = _untrusted_or(error.exception)
        raise SourceError(f"{what}: it cannot be reached ({reason})", retryable=True) from None
    except oss2.exceptions.ServerError as error:
        # Its message repeats the key and the signed text: only the code is shown.
        text = f"{error.body} {error.message}"
        answers.check_status(
            error.status, error.headers, what, HINT,
            code=error.code or "", text=text, signed=bool(keys.key),
        )  # fmt: skip
        raise SourceError(f"{what}: the source answered {error.status}") from None
    except Exception as error:  # noqa: BLE001 - oss2 lets those of its XML parser and others through
        text = redact(" ".join(str(error).split())[:300], keys.secrets) or type(error).__name__
        raise SourceError(f"{what}: {text}", retryable=isinstance(error, OSError)) from None


def _untrusted_or(error: Exception) -> str:
    name = type(error).__name__
    return f"{name}: its certificate, or the proxy's, is not trusted" if "SSL" in name else name


@dataclass(frozen=True, slots=True, kw_only=True)
class OssKeys:
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
class OssAccess:
    """How one bucket is reached. ``keys()`` renews credentials that run out."""

    endpoint: str
    fetch: Callable[[], OssKeys]
    clock: Callable[[], float] = time.time
    _keys: OssKeys | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def keys(self) -> OssKeys:
        """Credentials that are good for a while yet. Raises ``SourceError``."""
        with self._lock:
            kept = self._keys
            if kept is None or (
                kept.good_until_s is not None and kept.good_until_s - self.clock() < RENEW_BEFORE_S
            ):
                kept = self._keys = self.fetch()
            return kept


def find_access(environ: Mapping[str, str], reader: HttpReader, *, endpoint: str = "") -> OssAccess:
    """Look in the usual places. ``endpoint`` is the URL's, if it names one
    (``oss-cn-hangzhou.aliyuncs.com``). Raises ``SourceError`` where none is known."""
    file = _read_file(environ)
    endpoint = endpoint or environ.get("OSS_ENDPOINT") or file.get("endpoint") or ""
    region = environ.get("OSS_REGION")
    if not endpoint and region:
        endpoint = f"oss-{region.removeprefix('oss-')}.aliyuncs.com"
    if not endpoint:
        raise SourceError(
            "oss:// needs an endpoint: set OSS_ENDPOINT (https://oss-cn-hangzhou.aliyuncs.com)"
            ", or OSS_REGION, or write oss://bucket.oss-cn-hangzhou.aliyuncs.com/prefix"
        )
    if "://" not in endpoint:
        endpoint = f"https://{endpoint}"
    if not urlsplit(endpoint).hostname:
        raise SourceError("OSS_ENDPOINT is no address")
    return OssAccess(endpoint=endpoint, fetch=_fetcher(environ, file, reader))


def _fetcher(
    environ: Mapping[str, str], file: Mapping[str, str], reader: HttpReader
) -> Callable[[], OssKeys]:
    for key, secret, token in _NAMES:
        if environ.get(key) and environ.get(secret):
            keys = OssKeys(key=environ[key], secret=environ[secret], token=environ.get(token, ""))
            return lambda: keys
    if file.get("accesskeyid") and file.get("accesskeysecret"):
        given = OssKeys(
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
    return OssKeys


def _ask(url: str, reader: HttpReader) -> OssKeys:
    """Credentials for a while from a URL, in the form that the metadata server has."""
    request = HttpRequest(url=url, shown="the credentials of this instance or container")
    _, page = reader.page(request)
    try:
        found = json.loads(page)
        return OssKeys(
            key=str(found["AccessKeyId"]),
            secret=str(found["AccessKeySecret"]),
            token=str(found["SecurityToken"]),
            good_until_s=datetime.fromisoformat(found["Expiration"]).timestamp(),
        )
    except (ValueError, TypeError, KeyError, RecursionError, OverflowError):
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
