"""HTTP/1.1 heads, strictly (chunked bodies are in ``chunks.py``).

llhttp (through httptools) judges whether a head is well formed; what it lets through is then cut
up here once, by regular expressions, because a Python call per header line costs more than the
rest of the request. Only CRLF ends a line by then, and no line is folded, so lines are lines.

Refused with 400 (RFC 9112 allows it, request smuggling lives there): Content-Length together with
Transfer-Encoding, two lengths, any transfer coding but ``chunked``, chunked in HTTP/1.0, bare LF
or CR, folded lines, a missing or second Host, HTTP/0.9 and 1.x other than 1.0 and 1.1.
"""

from __future__ import annotations

import re
from typing import Any, Final

import httptools

from gateway.datapath.protocol.errors import ApiError, Reason


def _header_lines(*names: str) -> re.Pattern[bytes]:
    """Matches a header line with one of these names: the name, and the value. By the first letter,
    of either case, most lines are passed over before any name is tried."""
    by_letter: dict[str, list[str]] = {}
    for name in names:
        by_letter.setdefault(name[0], []).append(name[1:])
    tried = "|".join(
        f"[{letter.upper()}{letter}](?i:{'|'.join(rests)})" for letter, rests in by_letter.items()
    )
    return re.compile(rb"\r\n(%b):[ \t]*([^\r]*)" % tried.encode())


# Headers of a request that do not travel: hop-by-hop ones (RFC 9110 7.6.1), framing, which the
# gateway sets itself, accept-encoding (a compressed answer would hide its usage and its first
# token), origin (CORS is the gateway's to answer; an engine that saw it would answer "*"), and
# content-encoding (only "identity" is taken).
_REQUEST_SPECIAL: Final = _header_lines(
    *("host", "connection", "keep-alive", "proxy-connection", "proxy-authorization", "te"),
    *("trailer", "transfer-encoding", "content-length", "upgrade", "expect", "accept-encoding"),
    *("x-request-id", "http2-settings", "origin", "content-encoding"),
)
_RESPONSE_SPECIAL: Final = _header_lines(
    *("connection", "keep-alive", "proxy-connection", "transfer-encoding", "content-length"),
    *("upgrade", "trailer", "x-request-id", "request-id"),
)
_HOST: Final = 1
_LENGTH: Final = 2
_CONNECTION: Final = 3
_CODING: Final = 4
_REQUEST_ID: Final = 5
_ORIGIN: Final = 6
_EXPECT: Final = 7
_UPGRADE: Final = 8
_ENCODING: Final = 9
_KINDS: Final = {
    b"host": _HOST,
    b"Host": _HOST,
    b"content-length": _LENGTH,
    b"Content-Length": _LENGTH,
    b"connection": _CONNECTION,
    b"Connection": _CONNECTION,
    b"transfer-encoding": _CODING,
    b"x-request-id": _REQUEST_ID,
    b"origin": _ORIGIN,
    b"expect": _EXPECT,
    b"upgrade": _UPGRADE,
    b"content-encoding": _ENCODING,
}
# The status line, of which llhttp lets any byte but a line end pass; then, where no other header of
# note comes first, a plain Content-Length.
_STATUS: Final = re.compile(
    rb"HTTP/1\.[01] ([1-9][0-9][0-9])(?=(?: [\t -~\x80-\xff]*)?(?:\r|\Z))"
    rb"(?:(?<=HTTP/1\.1 200)[^\r]*(?:\r\n(?![CcKkPpRrTtUuXx])[^\r]*)*"
    rb"\r\ncontent-length: ([0-9]{1,15})(?=\r|\Z))?"
)
# HTTP/1.0 closes unless both sides say otherwise, and ``ab`` waits for that end.
KEEP_ALIVE: Final = b"connection: keep-alive\r\n"
_CONNECTION_OPTIONS: Final = frozenset((b"", b"close", b"keep-alive", b"te", b"upgrade"))
_BARE_LF: Final = re.compile(rb"(?<!\r)\n|\r(?![\n])(?=.)", re.DOTALL)
_AUTHORITY: Final = re.compile(rb"\A[^/?#]*")
_ID_FORM: Final = re.compile(rb"[\x21-\x7e]{1,128}\Z")


def bad_request(message: str) -> ApiError:
    """A malformed message: the connection is closed after it."""
    return ApiError(400, Reason.BAD_REQUEST, message)


class RequestHead:
    """One request head, cut up. ``kept`` is the header lines that travel on, each led by CRLF;
    ``named`` are headers that ``Connection`` says are for this hop only, which do not."""

    method: bytes
    path: bytes
    kept: bytes
    query: bytes = b""
    content_length: int = 0
    chunked: bool = False
    keep_alive: bool = True
    http10: bool = False
    expect_continue: bool = False
    request_id: bytes | None = None
    origin: bytes | None = None
    named: frozenset[bytes] = frozenset()
    content_encoding: bytes | None = None


class _Silent:
    """A protocol without callbacks: llhttp then only judges."""


def check_head(head: bytes) -> None:
    """Let llhttp judge a whole request head (with its final blank line). Raises 400."""
    parser = httptools.HttpRequestParser(_Silent())
    try:
        parser.feed_data(head)
    except httptools.HttpParserUpgrade:
        pass
    except httptools.HttpParserError as error:
        raise bad_request(f"The request head is not valid HTTP/1.1: {error}.") from None


def parse_request_head(head: bytes) -> RequestHead:
    """Cut up a head that ends with its blank line. Raises ``ApiError`` on anything not strict.

    An upgrade offer (``Upgrade: h2c``, as Java's client makes on every request) is ignored, as
    RFC 9110 7.8 allows; one to ``websocket`` is refused, as the client would wait for it.
    """
    check_head(head)
    parts = _REQUEST_SPECIAL.split(head[:-4])
    line, _, first = parts[0].partition(b"\r\n")
    words = line.split(b" ")
    if len(words) != 3:
        raise bad_request("The request line is not 'METHOD target HTTP/1.1'.")
    result = RequestHead()
    result.method, target, version = words
    if version != b"HTTP/1.1":
        if version != b"HTTP/1.0":
            raise bad_request("The HTTP version must be 1.0 or 1.1.")
        result.http10 = True
        result.keep_alive = False
    if target[:1] != b"/":
        target = _origin_form(target)
    result.path, mark, query = target.partition(b"?")
    if mark:
        result.query = mark + query
    rest = parts[3::3]
    if first:
        rest.insert(0, b"\r\n" + first)
    result.kept = b"".join(rest)
    _set_special(result, parts)
    return result


def _origin_form(target: bytes) -> bytes:
    """The path of an absolute-form target, which a client that takes us for a proxy sends."""
    scheme, _, rest = target.partition(b"://")
    if scheme.lower() in (b"http", b"https") and rest:
        path = _AUTHORITY.sub(b"", rest, count=1)
        return path if path.startswith(b"/") else b"/" + path
    if target != b"*":
        raise bad_request("The request target must be a path.")
    return target


def _set_special(result: RequestHead, parts: list[Any]) -> None:
    hosts = lengths = 0
    for index in range(1, len(parts), 3):
        name = parts[index]
        kind = _KINDS.get(name) or _KINDS.get(name.lower())
        if kind == _HOST:
            hosts += 1
        elif kind == _LENGTH:
            lengths += 1
            result.content_length = int(parts[index + 1])
        elif kind is not None:
            _set_rare(result, kind, parts[index + 1].strip())
    if hosts != 1 and not (result.http10 and hosts == 0):
        raise bad_request("There must be exactly one Host header.")
    if result.named:
        result.kept = without_named(result.kept, result.named)
    if lengths and (result.chunked or lengths > 1):
        raise bad_request("Content-Length must stand once, and not beside Transfer-Encoding.")


def _set_rare(result: RequestHead, kind: int, value: bytes) -> None:
    if kind == _CONNECTION:
        options = {option.strip() for option in value.lower().split(b",")}
        if b"close" in options:
            result.keep_alive = False
        elif result.http10 and b"keep-alive" in options:
            result.keep_alive = True
        result.named |= options - _CONNECTION_OPTIONS
    elif kind == _CODING:
        if result.chunked or result.http10 or value.lower() != b"chunked":
            raise bad_request("The only transfer coding understood is 'chunked', once.")
        result.chunked = True
    elif kind == _REQUEST_ID:
        result.request_id = value if _ID_FORM.match(value) else None
    elif kind == _ORIGIN:
        result.origin = value
    elif kind == _EXPECT:
        if value.lower() != b"100-continue":
            raise ApiError(
                417, Reason.EXPECTATION_UNSUPPORTED, "Only 'Expect: 100-continue' is met."
            )
        result.expect_continue = not result.http10
    elif kind == _ENCODING:
        if value.lower() not in (b"", b"identity"):
            result.content_encoding = value
    elif kind == _UPGRADE and value.lower() == b"websocket":
        raise ApiError(400, Reason.UPGRADE_UNSUPPORTED, "WebSocket is not spoken here.")


def without_named(kept: bytes, named: frozenset[bytes]) -> bytes:
    """Header lines, each led by CRLF or the status line, less those of ``named`` headers."""
    return b"\r\n".join(
        line for line in kept.split(b"\r\n") if line.partition(b":")[0].lower() not in named
    )


def has_bare_line_end(partial: bytes | bytearray, start: int = 0) -> bool:
    """Whether a head that is not whole yet already has a line end that is not CRLF, looking from
    ``start`` on."""
    return _BARE_LF.search(partial, start) is not None


class ResponseHead:
    """An engine's response head: where its body ends, and the head as it goes to the client.

    ``kept`` is the status line and the headers that travel on, framing included, without the blank
    line. ``content_length`` is ``None`` for chunks, and for a body that ends with its connection.
    """

    def __init__(self, status: int, kept: bytes) -> None:
        self.status = status
        self.kept = kept
        self.is_stream = kept.find(b"text/event-stream") >= 0
        self.content_length: int | None = None
        self.chunked = False
        self.keep_alive = True

    def without_framing(self) -> bytes:
        """``kept`` for a client that needs another framing, or none."""
        parts = _RESPONSE_SPECIAL.split(self.kept)
        return parts[0] + b"".join(parts[3::3])


def parse_response_head(head: bytes) -> ResponseHead:
    """Cut up an engine's head, given without its blank line. Raises ``ValueError`` where it is not
    HTTP, or does not say clearly where its body ends."""
    match = _STATUS.match(head)
    if match is None:
        raise ValueError(f"not an HTTP/1 status line: {head[:80]!r}")
    try:
        httptools.HttpResponseParser(_Silent()).feed_data(head + b"\r\n\r\n")
    except httptools.HttpParserError as error:
        raise ValueError(str(error)) from None
    if match[2] is not None and _RESPONSE_SPECIAL.search(head, match.end()) is None:
        # As uvicorn writes it, and nothing else of note: the head can go on as it is.
        result = ResponseHead(int(match[1]), head)
        result.content_length = int(match[2])
        return result
    return _parse_any_response_head(head, int(match[1]))


def _parse_any_response_head(head: bytes, status: int) -> ResponseHead:
    parts = _RESPONSE_SPECIAL.split(head)
    result = ResponseHead(status, parts[0] + b"".join(parts[3::3]))
    if head.startswith(b"HTTP/1.0"):
        result.keep_alive = False
        # The version is the sender's, which is the gateway now.
        result.kept = b"HTTP/1.1" + result.kept[8:]
    named: set[bytes] = set()
    for index in range(1, len(parts), 3):
        kind = _KINDS.get(parts[index].lower())
        value = parts[index + 1].strip()
        if kind == _LENGTH:
            if not value.isdigit() or result.content_length not in (None, int(value)):
                raise ValueError(f"bad Content-Length {value[:40]!r}")
            result.content_length = int(value)
        elif kind == _CODING:
            if value.lower() != b"chunked":
                raise ValueError(f"transfer coding {value[:40]!r}")
            result.chunked = True
        elif kind == _CONNECTION:
            named.update(option.strip() for option in value.lower().split(b","))
    if b"close" in named:
        result.keep_alive = False
    if not named <= _CONNECTION_OPTIONS:
        result.kept = without_named(result.kept, frozenset(named))
    if result.chunked and result.content_length is not None:
        raise ValueError("both Content-Length and Transfer-Encoding")
    if status in (204, 304):
        result.content_length, result.chunked = 0, False
    elif result.chunked:
        result.kept += b"\r\ntransfer-encoding: chunked"
    elif result.content_length is not None:
        result.kept += b"\r\ncontent-length: %d" % result.content_length
    return result
