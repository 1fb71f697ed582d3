"""What a server answers and a source lists, judged before a byte of it is believed. Pure."""

from __future__ import annotations

import email.utils
import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from urllib.parse import urljoin, urlsplit

from modelcache.refs import find_path_problem
from modelcache.types import Listing, ModelRef, NotFound, RemoteFile, SourceError

MOST_HEAD_BYTES = 65_536
REDIRECTS = (301, 302, 303, 307, 308)
PASSING = (408, 425, 429, 500, 502, 503, 504)
"""Statuses that may be others the next time."""

MOST_RETRY_AFTER_S = 600.0
MOST_FILES = 100_000

_STATUS = re.compile(rb"^HTTP/1\.([01]) ([1-5][0-9][0-9])(?: |$)")
_CONTENT_RANGE = re.compile(r"^bytes (\d{1,19})-(\d{1,19})/(\d{1,19}|\*)$")


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceResponse:
    """Status and headers of an answer; header names are in lower case, repeated ones joined."""

    status: int
    headers: Mapping[str, str]
    persistent: bool
    """The connection may be used again once the body is read."""

    @property
    def length(self) -> int | None:
        """Bytes of the body; ``None`` where the head does not say (or says two things)."""
        text = self.headers.get("content-length", "")
        return int(text) if text.isascii() and text.isdigit() and len(text) < 20 else None

    @property
    def chunked(self) -> bool:
        """The body comes in chunks."""
        return bool(self.headers.get("transfer-encoding"))


def parse_head(data: bytes) -> SourceResponse:
    """Read an answer's head, without the empty line that ends it. Raises ``SourceError``."""
    lines = data.split(b"\r\n")
    found = _STATUS.match(lines[0])
    if found is None:
        raise SourceError("the server does not speak HTTP/1", retryable=True)
    headers: dict[str, str] = {}
    for line in lines[1:]:
        name, colon, value = line.partition(b":")
        if not colon or not name or name.strip() != name:
            raise SourceError("the server's answer has a malformed header", retryable=True)
        key, text = name.decode("latin-1").lower(), value.decode("latin-1").strip()
        headers[key] = f"{headers[key]}, {text}" if key in headers else text
    connection = headers.get("connection", "").lower()
    persistent = "close" not in connection and (found[1] == b"1" or "keep-alive" in connection)
    return SourceResponse(status=int(found[2]), headers=headers, persistent=persistent)


def check_status(status: int, headers: Mapping[str, str], what: str, hint: str = "") -> None:
    """Raise what a status outside 2xx means for ``what``. ``hint``: where credentials go."""
    if 200 <= status < 300:
        return
    if status in (404, 410):
        raise NotFound(f"{what}: the source has no such file ({status})")
    if status in (401, 403):
        more = f"; credentials: {hint}" if hint else ""
        raise SourceError(f"{what}: the source refuses access ({status}){more}")
    if status == 412:
        raise SourceError(f"{what}: it has changed since it was listed ({status})")
    if status == 416:
        raise SourceError(f"{what}: it is shorter than it was when it was listed ({status})")
    raise SourceError(
        f"{what}: the source answered {status}",
        retryable=status in PASSING,
        retry_after_s=retry_after(headers),
    )


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds the server asks to wait, bounded; ``None`` where it does not say. A date counts
    from the answer's own ``Date``."""
    text = headers.get("retry-after", "").strip()
    if not text:
        return None
    if text.isascii() and text.isdigit():
        return min(float(text[:9]), MOST_RETRY_AFTER_S)
    until_s, from_s = _date_s(text), _date_s(headers.get("date", ""))
    if until_s is None or from_s is None:
        return None
    return min(max(0.0, until_s - from_s), MOST_RETRY_AFTER_S)


def _date_s(text: str) -> float | None:
    try:
        return email.utils.parsedate_to_datetime(text).timestamp()
    except (ValueError, TypeError, OverflowError):
        return None


def check_range(
    head: SourceResponse, file: RemoteFile, start: int, end: int, what: str
) -> int | None:
    """Make sure that the body is exactly bytes ``[start, end)`` of ``file``.

    Returns its length, ``None`` where it comes in chunks (and has to be counted). Raises
    ``SourceError`` where it is anything else: compressed, the whole file, another range, a file
    of another size or version.
    """
    encoding = head.headers.get("content-encoding", "identity").lower()
    if encoding not in ("", "identity"):
        raise SourceError(f"{what}: the source sent it compressed ({encoding}), unasked")
    _check_version(head, file, what)
    wanted = end - start
    if head.status == 200:
        if (start, end) != (0, file.size_bytes):
            raise SourceError(
                f"{what}: the source ignores ranges: asked for {wanted:,} bytes at {start:,}, "
                "it sends the whole file"
            )
    elif head.status == 206:
        _check_content_range(head, file, start, end, what)
    else:
        raise SourceError(f"{what}: the source answered {head.status} to a read")
    if head.chunked:
        return None
    length = head.length
    if length is None and "content-length" in head.headers:
        raise SourceError(f"{what}: the source sent a length that is no number", retryable=True)
    if length is not None and length != wanted:
        raise SourceError(
            f"{what}: asked for {wanted:,} bytes at {start:,}, the source sends {length:,}",
            retryable=head.status == 206,
        )
    return length


def _check_content_range(
    head: SourceResponse, file: RemoteFile, start: int, end: int, what: str
) -> None:
    text = head.headers.get("content-range", "")
    found = _CONTENT_RANGE.match(text)
    if found is None:
        raise SourceError(f"{what}: the source does not say which range it sent")
    first, last = int(found[1]), int(found[2])
    if (first, last) != (start, end - 1):
        raise SourceError(
            f"{what}: asked for bytes {start}-{end - 1}, the source sent {first}-{last}",
            retryable=True,
        )
    if found[3] != "*" and int(found[3]) != file.size_bytes:
        raise SourceError(
            f"{what}: it has {int(found[3]):,} bytes now, and had {file.size_bytes:,} when it was "
            "listed"
        )


def _check_version(head: SourceResponse, file: RemoteFile, what: str) -> None:
    """The answer must be of the version that was listed, where both say which that is."""
    kind, colon, wanted = file.version.partition(":")
    if not colon:
        return
    given = {
        "etag": plain_etag(head.headers.get("etag", "")),
        "date": head.headers.get("last-modified", ""),
    }.get(kind, "")
    if given and given != wanted:
        raise SourceError(f"{what}: it has changed since it was listed")


def plain_etag(text: str) -> str:
    """An entity tag without its quotes and its mark of weakness."""
    return text.strip().removeprefix("W/").strip('"')


def version_of(headers: Mapping[str, str]) -> str:
    """The version that an answer's headers tell: ``etag:…``, else ``date:…``, else nothing."""
    etag = plain_etag(headers.get("etag", ""))
    if etag:
        return f"etag:{etag}"
    modified = headers.get("last-modified", "")
    return f"date:{modified}" if modified else ""


def next_url(url: str, head: SourceResponse, what: str) -> str:
    """Where a redirect leads. Raises ``SourceError`` where it may not be followed."""
    nowhere = SourceError(f"{what}: the source redirects to nowhere ({head.status})")
    try:
        target = urljoin(url, head.headers.get("location", ""))
        before, after = urlsplit(url), urlsplit(target)
        host = (after.hostname or "").encode("idna")
        after.port  # noqa: B018 - raises for one that is out of range
    except ValueError:
        raise nowhere from None
    if not head.headers.get("location") or after.scheme not in ("http", "https") or not host:
        raise nowhere
    if before.scheme == "https" and after.scheme != "https":
        raise SourceError(f"{what}: the source redirects from https to http; not followed")
    return target


def same_origin(one: str, other: str) -> bool:
    """Whether two URLs are served by the same server: only then may credentials go along."""
    a, b = urlsplit(one), urlsplit(other)
    return (a.scheme, a.hostname, a.port) == (b.scheme, b.hostname, b.port)


def make_listing(
    ref: ModelRef, files: Iterable[RemoteFile], *, revision: str | None = None
) -> Listing:
    """The listing of ``ref``. ``revision`` is the source's own exact one; without it the revision
    is a digest of what is listed, and one that was asked for must be that.

    Raises ``NotFound`` where nothing is listed or it is another revision, ``SourceError`` where a
    path could not become a file below a directory.
    """
    ordered = sorted(files, key=lambda file: file.path)
    if not ordered:
        raise NotFound(f"{ref.url}: there is nothing there")
    if len(ordered) > MOST_FILES:
        raise SourceError(f"{ref.url}: it has more than {MOST_FILES:,} files; is it one model?")
    problem = find_path_problem([file.path for file in ordered])
    if problem is not None:
        raise SourceError(f"{ref.url}: the source {problem}")
    if revision is None:
        revision = digest_of(ordered)
        if ref.revision is not None and ref.revision != revision:
            raise NotFound(
                f"{ref.url}: the source has revision {revision} of it now, not {ref.revision}"
            )
    return Listing(revision=revision, files=tuple(ordered))


def digest_of(files: Iterable[RemoteFile]) -> str:
    """40 hexadecimal digits that change with any file's path, size, version or digest."""
    found = hashlib.sha256(b"tidegate-listing-1\n")
    for file in files:
        digests = sorted(file.digests.items())
        found.update(repr((file.path, file.size_bytes, file.version, digests)).encode())
    return found.hexdigest()[:40]
