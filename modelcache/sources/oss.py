"""Models in Alibaba Cloud OSS: listed by ossfs, signed by oss2, read by ranges of signed URLs.

ossfs's own reads are not used: its ranges end one byte late, some of its cache types return wrong
bytes, and a checksum in Python makes it slow. Every range is checked here all the same.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from modelcache.ports import Listing
from modelcache.refs import redact
from modelcache.sources import answers
from modelcache.sources.listings import ask_each, make_listing
from modelcache.sources.oss_access import HINT, Keys, find_access
from modelcache.sources.ranged import RangedSource
from modelcache.sources.reader import Reader, Request
from modelcache.types import ModelRef, NotFound, RemoteFile, SourceError

if TYPE_CHECKING:
    import oss2

SIGNED_FOR_S = 3_600


class OssSource(RangedSource):
    """One model below a prefix of a bucket (or one object)."""

    def __init__(
        self, ref: ModelRef, reader: Reader, environ: Mapping[str, str], *, timeout_s: float
    ) -> None:
        super().__init__(ref, reader)
        host, _, self._prefix = ref.location.partition("/")
        self._bucket, self._access = find_access(host, environ, reader)
        self._timeout_s = timeout_s
        self._single = False

    def list(self) -> Listing:
        """See ``Source.list``."""
        keys = self._access.keys()
        with failing(self.ref.url, keys):
            found = self._find(keys)
        below = f"{self._bucket}/{self._prefix}".rstrip("/")
        self._single = below in found
        paths = (
            [below] if self._single else [name for name in found if name.startswith(f"{below}/")]
        )
        cut = len(below.rpartition("/")[0] if self._single else below) + 1
        bucket = self._open_bucket(keys)
        with failing(self.ref.url, keys):
            files = ask_each(
                lambda name: _file_of(bucket, name.partition("/")[2], name[cut:]), paths
            )
        return self.probed(make_listing(self.ref, files))

    def _find(self, keys: Keys) -> Mapping[str, Any]:
        """Every object below the prefix, by ``bucket/key``."""
        import ossfs

        system = ossfs.OSSFileSystem(
            endpoint=self._access.endpoint,
            key=keys.key or None,
            secret=keys.secret or None,
            token=keys.token or None,
            # fsspec would keep it, and the keys in it, for as long as the process lives.
            skip_instance_cache=True,
        )
        found = system.find(f"{self._bucket}/{self._prefix}", detail=True)
        return {name: info for name, info in found.items() if not name.endswith("/")}

    def _open_bucket(self, keys: Keys) -> oss2.Bucket:
        import oss2

        if not keys.key:
            auth = oss2.AnonymousAuth()
        elif keys.token:
            auth = oss2.StsAuth(keys.key, keys.secret, keys.token)
        else:
            auth = oss2.Auth(keys.key, keys.secret)
        return oss2.Bucket(
            auth, self._access.endpoint, self._bucket, connect_timeout=self._timeout_s
        )

    def request_of(self, file: RemoteFile) -> Request:
        """See ``RangedSource.request_of``."""
        below = self._prefix.rpartition("/")[0] if self._single else self._prefix
        key = f"{below}/{file.path}" if below else file.path
        shown = f"oss://{self._bucket}/{key}"
        keys = self._access.keys()
        with failing(shown, keys):
            bucket = self._open_bucket(keys)
            url = bucket.sign_url("GET", key, SIGNED_FOR_S, slash_safe=True)
        return Request(url=url, shown=shown, hint=HINT)


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
def failing(what: str, keys: Keys) -> Iterator[None]:
    """Make oss2's and ossfs's errors ``SourceError``s that name ``what`` and show no secret."""
    import oss2

    try:
        yield
    except (FileNotFoundError, oss2.exceptions.NotFound):
        raise NotFound(f"{what}: the store has no such bucket or file") from None
    except (PermissionError, oss2.exceptions.AccessDenied) as error:
        raise SourceError(
            f"{what}: the store refuses access{_code(error)}; credentials: {HINT}"
        ) from None
    except oss2.exceptions.RequestError as error:
        reason = type(error.exception).__name__
        raise SourceError(f"{what}: it cannot be reached ({reason})", retryable=True) from None
    except oss2.exceptions.ServerError as error:
        answers.check_status(error.status, error.headers, what, HINT)
        raise SourceError(f"{what}: the store answered {error.status}{_code(error)}") from None
    except (oss2.exceptions.OssError, OSError, ValueError) as error:
        text = redact(" ".join(str(error).split())[:300], keys.secrets)
        raise SourceError(f"{what}: {text}", retryable=isinstance(error, OSError)) from None


def _code(error: Exception) -> str:
    """OSS's own name for what was wrong; its message repeats the key and the signed text."""
    cause = error.__cause__ if not hasattr(error, "code") else error
    code = getattr(cause, "code", "")
    return f" ({code})" if isinstance(code, str) and code.isalnum() else ""
