"""What a server answers and a source lists, judged before a byte of it is believed. Pure."""

from __future__ import annotations

import email.utils
import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from urllib.parse import urljoin, urlsplit

from modelcache.refs import find_path_problem, redact
from modelcache.types import (
    MOST_SIZE_BYTES,
    Listing,
    ModelRef,
    NotFound,
    RemoteFile,
    SourceError,
)

MOST_HEAD_BYTES = 65_536
REDIRECTS = (301, 302, 303, 307, 308)
PASSING = (408, 425, 429, 500, 502, 503, 504)
"""Statuses that may be others the next time."""

MOST_RETRY_AFTER_S = 600.0
MOST_FILES = 100_000

MOST_ERROR_BYTES = 16_384
"""Of the body of an answer that is an error: the code is there."""

_CODE = re.compile(r"<Code>\s*([^<]{1,80}?)\s*</Code>")
_IS_CODE = re.compile(r"[A-Za-z][A-Za-z0-9._-]{1,63}")
_REGION = re.compile(r"<Region>([a-z0-9-]{2,40})</Region>")
_ENDPOINT = re.compile(r"<Endpoint>([a-z0-9.-]{2,120})</Endpoint>")
_STATUS = re.compile(rb"^HTTP/1\.([01]) ([1-5][0-9][0-9])(?: |$)")
_CONTENT_RANGE = re.compile(r"^bytes (\d{1,19})-(\d{1,19})/(\d{1,19}|\*)$")


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceResponse:
    """Status and headers of an answer; header names are in lower case, repeated ones joined."""

    status: int
    headers: Mapping[str, str]
    persistent: bool
    """The connection may be used again once the body is read."""
    url: str = ""
    """Where it came from, after redirects; empty where it was asked for one place only."""

    @property
    def length(self) -> int | None:
        """Bytes of the body; ``None`` where the head does not say (or says two things)."""
        text = self.headers.get("content-length", "")
        return int(text) if text.isascii() and text.isdigit() and len(text) < 20 else None

    @property
    def redirects(self) -> bool:
        """It says to ask elsewhere, and where (S3 says only why)."""
        return self.status in REDIRECTS and "location" in self.headers

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


def check_status(
    status: int,
    headers: Mapping[str, str],
    what: str,
    hint: str = "",
    *,
    code: str = "",
    text: str = "",
    signed: bool = True,
    page: str = "",
) -> None:
    """Raise what a status outside 2xx means for ``what``, and what to do about it.

    ``hint``: where credentials go; ``signed``: whether any were sent. ``code`` is the store's own
    name for what is wrong, where it is known apart from the headers and ``text``, the beginning of
    the answer's body, in which S3 and OSS say where a bucket is: it is searched, and not shown.
    ``page`` is where a person asks the owners for access.
    """
    if 200 <= status < 300:
        return
    code = _code_of(code, headers, text)
    said = _message_of(headers)
    known = _explain(code, text, what, hint, signed, headers, page, said)
    if known is not None:
        raise known
    if status == 401 and signed and "credential" in said.lower():
        raise SourceError(f"{what}: the source does not accept the credentials: check {hint}")
    if status in (404, 410):
        raise NotFound(f"{what}: the source has no such file ({status})")
    if status in (401, 403):
        raise SourceError(f"{what}: {_refused(hint, signed, f'{status}{_in_words(code, said)}')}")
    if status == 407:
        raise SourceError(
            f"{what}: the proxy asks for a user and a password (407): put them into its URL in the "
            "environment (HTTPS_PROXY=http://user:password@host:port)"
        )
    if status == 412:
        raise SourceError(f"{what}: it has changed since it was listed ({status})")
    if status == 416:
        raise SourceError(f"{what}: it is shorter than it was when it was listed ({status})")
    raise SourceError(
        f"{what}: the source answered {status}{_in_words(code, said)}",
        retryable=status in PASSING,
        retry_after_s=retry_after(headers),
    )


def _code_of(code: str, headers: Mapping[str, str], text: str) -> str:
    """The store's own name for what is wrong: never a key."""
    code = code or headers.get("x-error-code", "") or headers.get("x-oss-ec-code", "")
    if not code and (found := _CODE.search(text)) is not None:
        code = found[1]
    return code if _IS_CODE.fullmatch(code) else ""


def _message_of(headers: Mapping[str, str]) -> str:
    """What the store says in words: never a key."""
    said = headers.get("x-error-message", "")[:200]
    return redact(said) if said.isprintable() else ""


def _in_words(code: str, said: str) -> str:
    words = ": ".join(part for part in (code, said) if part)
    return f", {words}" if words else ""


def _refused(hint: str, signed: bool, why: str) -> str:
    if not hint:
        return f"the source refuses access ({why})"
    if signed:
        return (
            f"the source refuses access ({why}): the credentials it was given do not allow it; "
            f"credentials: {hint}"
        )
    return f"the source refuses access ({why}), and no credentials were found; credentials: {hint}"


_EXPIRED = frozenset({
    "ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "SecurityTokenExpired",
    "InvalidSecurityToken.Expired", "RequestExpired",
})  # fmt: skip
_UNKNOWN_KEY = frozenset({
    "InvalidAccessKeyId", "InvalidAccessKeyId.NotFound", "InvalidAccessKeyId.Inactive",
    "InvalidClientTokenId", "InvalidToken", "InvalidSecurityToken", "InvalidSecurity",
    "UnrecognizedClientException", "InvalidAccessKeyIdError",
})  # fmt: skip
_WRONG_SECRET = frozenset({"SignatureDoesNotMatch", "SignatureNotMatch"})
_SKEWED = frozenset({"RequestTimeTooSkewed", "RequestNotYetValid"})
_ELSEWHERE = frozenset({
    "PermanentRedirect", "TemporaryRedirect", "AuthorizationHeaderMalformed",
    "AuthorizationQueryParametersError", "IllegalLocationConstraintException",
    "SecondLevelDomainForbidden", "InvalidRegionName",
})  # fmt: skip
_NO_BUCKET = frozenset({"NoSuchBucket", "InvalidBucketName", "NoSuchHost"})
_NO_RIGHTS = frozenset({
    "AccessDenied", "AllAccessDisabled", "AccountProblem", "UserDisable", "Forbidden",
})  # fmt: skip


def _explain(
    code: str,
    text: str,
    what: str,
    hint: str,
    signed: bool,
    headers: Mapping[str, str],
    page: str,
    said: str,
) -> SourceError | None:
    """What a store's own error ``code`` means; ``None`` for one that is not known."""
    refused = f"{what}: the source refuses access ({code})"
    if code in _EXPIRED:
        return SourceError(f"{refused}: the credentials have expired, get new ones: {hint}")
    if code in _UNKNOWN_KEY:
        return SourceError(f"{refused}: it does not know the access key or token: check {hint}")
    if code in _WRONG_SECRET:
        return SourceError(f"{refused}: the secret key is not that of the access key: check {hint}")
    if code in _SKEWED or "Request has expired" in text:
        return SourceError(f"{refused}: this machine's clock is wrong: set it (NTP) and try again")
    region = headers.get("x-amz-bucket-region", "")
    if code in _ELSEWHERE or (code in _NO_RIGHTS and "specified endpoint" in text):
        return SourceError(f"{what}: {_say_region(what, region, text)}")
    if code in _NO_BUCKET:
        bucket = what.partition("://")[2].partition("/")[0]
        return NotFound(f"{what}: the source has no bucket {bucket!r} ({code}): check the name")
    if code in ("NoSuchKey", "NoSuchObject", "EntryNotFound"):
        return NotFound(f"{what}: the source has no such file ({code})")
    if code in _NO_RIGHTS:
        return SourceError(f"{what}: {_refused(hint, signed, code)}")
    return _explain_hub(code, what, hint, signed, page, said)


def _explain_hub(
    code: str, what: str, hint: str, signed: bool, page: str, said: str
) -> SourceError | None:
    if code == "GatedRepo":
        more = f" (the hub says: {said})" if said else ""
        token = "then try again" if signed else f"then set the token of that account: {hint}"
        where = f" ({page})" if page else ""
        return SourceError(
            f"{what}: it is gated: its owners ask that their terms be accepted on its page{where} "
            f"by the account of the token; accept them there, {token}{more}"
        )
    if code == "RepoNotFound":
        private = (
            f"or the token's account may not see it: check the name, and {hint}"
            if signed
            else f"or it is private and needs a token: check the name, or set {hint}"
        )
        return NotFound(f"{what}: the hub has no such model, {private}")
    if code == "RevisionNotFound":
        return NotFound(f"{what}: the hub has the model, and no such revision of it")
    if code == "DisabledRepo":
        return SourceError(f"{what}: the hub has disabled it{f': {said}' if said else ''}")
    return None


def _say_region(what: str, region: str, text: str) -> str:
    """Which region or endpoint a bucket wants, as its store says it."""
    found = _REGION.search(text)
    region = region or (found[1] if found is not None else "")
    found = _ENDPOINT.search(text)
    endpoint = found[1] if found is not None else ""
    if what.startswith("oss://"):
        to = f"=https://{endpoint}" if endpoint else " to the bucket's own"
        return f"its bucket is in another region than was asked: set OSS_ENDPOINT{to}"
    to = f"={region}" if re.fullmatch(r"[a-z0-9-]{2,40}", region) else " to the bucket's own"
    at = f" (it is at {endpoint})" if endpoint and not region else ""
    return f"its bucket is in another region than was asked{at}: set AWS_REGION{to}"


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
    ordered = sorted(drop_markers(files), key=lambda file: file.path)
    if not ordered:
        raise NotFound(f"{ref.url}: there is nothing there")
    if len(ordered) > MOST_FILES:
        raise SourceError(f"{ref.url}: it has more than {MOST_FILES:,} files; is it one model?")
    for file in ordered:
        if not 0 <= file.size_bytes <= MOST_SIZE_BYTES:
            raise SourceError(f"{ref.url}: the source says that {file.path[:200]!r} has "
                              f"{str(file.size_bytes)[:40]} bytes")  # fmt: skip
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


def drop_markers(files: Iterable[RemoteFile]) -> Iterable[RemoteFile]:
    """The files without what stands for folders in stores that have none: paths that end with
    ``/``, Hadoop's ``name_$folder$``, and empty objects below which others lie. An empty file that
    is only empty is a file."""
    there = list(files)
    folders: set[str] = set()
    for file in there:
        folder = file.path.rpartition("/")[0]
        while folder and folder not in folders:
            folders.add(folder)
            folder = folder.rpartition("/")[0]
    return [
        file
        for file in there
        if not file.path.endswith("/")
        and (file.size_bytes or not (file.path in folders or file.path.endswith("_$folder$")))
    ]


def digest_of(files: Iterable[RemoteFile]) -> str:
    """40 hexadecimal digits that change with any file's path, size, version or digest."""
    found = hashlib.sha256(b"tidegate-listing-1\n")
    for file in files:
        digests = sorted(file.digests.items())
        found.update(repr((file.path, file.size_bytes, file.version, digests)).encode())
    return found.hexdigest()[:40]
