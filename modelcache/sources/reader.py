"""Files behind HTTP: pages of a listing, heads of files, and ranges of them into local files.

Ranges go over ``wire``; over httpx only what that cannot do (a proxy, a body in chunks). Redirects
are followed, credentials never to another server; where a file was redirected to is remembered, so
that not every piece of it asks the hub again.
"""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, TypeVar

from modelcache.ports import ANNOUNCE_BYTES, ONCE, RangeRead, Retries, Source
from modelcache.refs import redact
from modelcache.sources import answers, wire
from modelcache.sources.proxy import proxy_of
from modelcache.sources.retry import keep_asking
from modelcache.types import PIECE_BYTES, Listing, ModelRef, RemoteFile, SourceError

if TYPE_CHECKING:
    import httpx


AGENT = "tidegate"
MOST_REDIRECTS = 5
MOST_PAGE_BYTES = 32 * 1024 * 1024
REMEMBER_S = 300.0
"""Seconds a redirect's target is used again: signed ones are good for an hour or so."""

MOST_REMEMBERED = 4_096
AHEAD_S = 0.03


PROBE_BYTES = 8
ASKED_AT_ONCE = 16

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpRequest:
    """A URL to be read, with the credentials its own server is to get. ``shown`` is what it is
    called in errors, ``hint`` where its credentials would go. ``signed``: whether it carries any;
    ``page`` is where a person asks for access."""

    url: str
    shown: str
    hint: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)
    signed: bool = True
    page: str = ""


@dataclass(slots=True, kw_only=True)
class HttpReader:
    """Reads from HTTP servers; safe for many threads at once. Made by :func:`make_reader`."""

    environ: Mapping[str, str]
    timeout_s: float
    connections: wire.HttpConnections
    _clients: dict[str, httpx.Client] = field(default_factory=dict)
    _targets: dict[str, tuple[str, float]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    # -- ranges ----------------------------------------------------------------------------------

    def fetch(self, request: HttpRequest, want: RangeRead) -> None:
        """Read a range of what ``request`` names, as ``Source.fetch`` promises it."""
        want = replace(want, what=request.shown, hint=request.hint)
        if wire.is_empty(want):
            return
        with failing(request.shown):
            known = self._target_of(request.url)
            if known is not None:
                try:
                    return self._follow(request, known, want)
                except SourceError as error:
                    if error.retryable:
                        raise
                    self._forget(request.url)  # a signed target may have run out: ask anew
            self._follow(request, request.url, want)

    def _follow(self, request: HttpRequest, url: str, want: RangeRead) -> None:
        asked = url
        for _ in range(MOST_REDIRECTS + 1):
            trusted = answers.same_origin(request.url, url)
            headers = {**_headers(want), **(request.headers if trusted else {})}
            target = self._read(request, url, headers, want)
            if target is None:
                if url != asked == request.url:
                    self._remember(request.url, url)
                return
            url = target
        raise SourceError(f"{want.what}: the source redirects more than {MOST_REDIRECTS} times")

    def _next(self, url: str, head: answers.SourceResponse, what: str) -> str:
        """Where a redirect leads, unless that is more internal than where it comes from: a store
        elsewhere has no say over what is asked inside of this network."""
        target = answers.next_url(url, head, what)
        if not answers.same_origin(url, target) and not wire.may_lead(
            url, target, resolve=self._proxy_of(target) is None
        ):
            raise SourceError(
                f"{what}: the source redirects to an address inside of this network or this "
                "machine; not followed"
            )
        return target

    def _read(
        self, request: HttpRequest, url: str, headers: Mapping[str, str], want: RangeRead
    ) -> str | None:
        """One request; where it redirects to, or ``None`` when the range is written."""
        if self._proxy_of(url):
            return self._read_by_httpx(request, url, headers, want)
        bytes_ = wire.format_request(url, headers)
        try:
            connection = self.connections.take(url)
            answer = self._ask(connection, bytes_, want)
        except wire.Stale:
            connection = self.connections.take(url, fresh=True)
            answer = self._ask(connection, bytes_, want)
        head, first = answer
        whole = False
        try:
            if head.redirects:
                return self._next(url, head, want.what)
            if not 200 <= head.status < 300:
                body = connection.read_error(head, first, want.cancelled)
                _check(request, head, body)
            length = answers.check_range(head, want.file, want.start, want.end, want.what)
            if length is not None:
                connection.receive(want, first)
                whole = head.persistent
                return None
        finally:
            if whole:
                self.connections.give_back(connection)
            else:
                connection.close()
        return self._read_by_httpx(request, url, headers, want)

    def _ask(
        self, connection: wire.HttpConnection, request: bytes, want: RangeRead
    ) -> tuple[answers.SourceResponse, bytes]:
        try:
            return connection.ask(request, want.cancelled)
        except BaseException:
            connection.close()
            raise

    def _read_by_httpx(
        self, request: HttpRequest, url: str, headers: Mapping[str, str], want: RangeRead
    ) -> str | None:
        with self.client(url).stream("GET", url, headers=dict(headers)) as answer:
            head = _head_of(answer, url)
            if head.redirects:
                return self._next(url, head, want.what)
            if not 200 <= head.status < 300:
                _check(request, head, _beginning(answer))
            answers.check_range(head, want.file, want.start, want.end, want.what)
            wire.write_chunks(want, answer.iter_raw(ANNOUNCE_BYTES // 4))
        return None

    # -- pages and heads -------------------------------------------------------------------------

    def head(self, request: HttpRequest, retries: Retries = ONCE) -> answers.SourceResponse:
        """Headers of a file. Raises what its status means."""
        return keep_asking(lambda: self._once("HEAD", request)[0], retries)

    def page(
        self, request: HttpRequest, retries: Retries = ONCE
    ) -> tuple[answers.SourceResponse, bytes]:
        """A whole small answer, such as a listing. Raises what its status means."""
        return keep_asking(lambda: self._once("GET", request), retries)

    def raw_head(self, request: HttpRequest, retries: Retries = ONCE) -> answers.SourceResponse:
        """Headers whatever the status, redirects not followed."""

        def ask() -> answers.SourceResponse:
            with failing(request.shown):
                answer = self.client(request.url).head(request.url, headers=_plain(request))
            return _head_of(answer, request.url)

        return keep_asking(ask, retries)

    def _once(self, method: str, request: HttpRequest) -> tuple[answers.SourceResponse, bytes]:
        url, what = request.url, request.shown
        with failing(what):
            for _ in range(MOST_REDIRECTS + 1):
                trusted = answers.same_origin(request.url, url)
                headers = _plain(request) if trusted else _plain(replace(request, headers={}))
                with self.client(url).stream(method, url, headers=headers) as answer:
                    head = _head_of(answer, url)
                    if head.redirects:
                        url = self._next(url, head, what)
                        continue
                    if not 200 <= head.status < 300:
                        _check(request, head, _beginning(answer))
                    data = bytearray()
                    for more in answer.iter_bytes():
                        data += more
                        if len(data) > MOST_PAGE_BYTES:
                            raise SourceError(f"{what}: an endless page")
                    return head, bytes(data)
            raise SourceError(f"{what}: the source redirects more than {MOST_REDIRECTS} times")

    def client(self, url: str) -> httpx.Client:
        """The httpx client for a URL: direct, or over the proxy the environment names for it."""
        import httpx

        proxy = self._proxy_of(url) or ""
        with self._lock:
            found = self._clients.get(proxy)
            if found is None:
                try:
                    found = self._clients[proxy] = httpx.Client(
                        proxy=proxy or None,
                        trust_env=False,
                        verify=tls_context(self.environ),
                        timeout=httpx.Timeout(self.timeout_s, connect=wire.CONNECT_S),
                        follow_redirects=False,
                        headers={"User-Agent": AGENT},
                    )
                except ImportError:
                    raise SourceError(
                        "the proxy of the environment is a SOCKS proxy, which takes socksio: "
                        f"{sys.executable} -m pip install 'httpx[socks]'"
                    ) from None
        return found

    def _proxy_of(self, url: str) -> str | None:
        return proxy_of(url, self.environ)

    # -- redirects -------------------------------------------------------------------------------

    def _target_of(self, url: str) -> str | None:
        with self._lock:
            target, until_s = self._targets.get(url, ("", 0.0))
        return target if time.monotonic() < until_s else None

    def _remember(self, url: str, target: str) -> None:
        with self._lock:
            if url not in self._targets and len(self._targets) >= MOST_REMEMBERED:
                self._targets.clear()
            self._targets[url] = (target, time.monotonic() + REMEMBER_S)

    def _forget(self, url: str) -> None:
        with self._lock:
            self._targets.pop(url, None)

    def close(self) -> None:
        """Close all connections. May be called twice."""
        self.connections.close()
        with self._lock:
            clients, self._clients = list(self._clients.values()), {}
        for client in clients:
            client.close()


def make_reader(
    environ: Mapping[str, str], *, timeout_s: float, connections: int, rate_bytes_s: int | None
) -> HttpReader:
    """A reader for ``connections`` ranges at once. Where the source's bandwidth is limited to
    ``rate_bytes_s``, sockets take in little ahead of the reader: a few hundredths of a second of
    it in all, which is enough for a source that is as far away."""
    ahead = None
    if rate_bytes_s is not None:
        ahead = max(65_536, int(AHEAD_S * rate_bytes_s) // connections)
    return HttpReader(
        environ=environ,
        timeout_s=timeout_s,
        connections=wire.HttpConnections(
            timeout_s=timeout_s,
            most_idle=connections,
            context=lambda: tls_context(environ),
            receive_bytes=ahead,
        ),
    )


def certificates(environ: Mapping[str, str]) -> str | None:
    """The file of certificates that the environment names, if it does."""
    return environ.get("SSL_CERT_FILE") or environ.get("REQUESTS_CA_BUNDLE") or None


def tls_context(environ: Mapping[str, str]) -> ssl.SSLContext:
    """Verifies servers by the system's certificates, or those that the environment names."""
    file = certificates(environ)
    try:
        return ssl.create_default_context(cafile=file, capath=environ.get("SSL_CERT_DIR"))
    except OSError as error:
        raise SourceError(f"certificates cannot be read from {file}: {error.strerror}") from error


@contextlib.contextmanager
def failing(what: str) -> Iterator[None]:
    """Make network errors a ``SourceError`` that names ``what``, and no URL but that."""
    import httpx

    try:
        yield
    except ssl.SSLCertVerificationError as error:
        reason = error.verify_message or error.reason
        raise SourceError(f"{what}: {_untrusted(str(reason))}") from None
    except socket.gaierror as error:
        raise SourceError(
            f"{what}: its host is unknown: {error.strerror}; {_NO_HOST}", retryable=True
        ) from None
    except TimeoutError as error:
        raise SourceError(f"{what}: timed out: {error}", retryable=True) from None
    except OSError as error:
        reason = error.strerror or str(error)
        raise SourceError(f"{what}: {reason}", retryable=True) from None
    except httpx.TransportError as error:
        # Its text may quote the URL, and that may be a signed one.
        shown = redact(str(error)) or type(error).__name__
        if "CERTIFICATE_VERIFY_FAILED" in shown:
            reason = shown.rpartition("failed: ")[2].partition(" (_ssl")[0]
            raise SourceError(f"{what}: {_untrusted(reason)}") from None
        if (unknown := _find_unknown(error)) is not None:
            host = error.request.url.host
            raise SourceError(
                f"{what}: the host {host}, or the proxy to it, is unknown: {unknown}; {_NO_HOST}",
                retryable=True,
            ) from None
        if isinstance(error, httpx.ProxyError):
            if "407" in shown:
                answers.check_status(407, {}, what)
            raise SourceError(f"{what}: the proxy: {shown}", retryable=True) from None
        raise SourceError(f"{what}: {shown}", retryable=True) from None
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise SourceError(f"{what}: {redact(str(error))}") from None


_NO_HOST = "is there a network and DNS, and is HTTPS_PROXY right where one is needed?"


def _find_unknown(error: BaseException | None) -> str | None:
    """Why a name could not be looked up, where that is what is behind this error."""
    while error is not None and not isinstance(error, socket.gaierror):
        error = error.__cause__ or error.__context__
    return None if error is None else str(error.strerror)


def _untrusted(reason: str) -> str:
    when = "; or this machine's clock is wrong" if "expired" in reason or "yet" in reason else ""
    return (
        f"the server's certificate is not trusted: {reason} (SSL_CERT_FILE names others to trust"
        f"{when})"
    )


def _check(request: HttpRequest, head: answers.SourceResponse, body: bytes) -> None:
    answers.check_status(
        head.status,
        head.headers,
        request.shown,
        request.hint,
        text=body.decode("utf-8", "replace"),
        signed=request.signed,
        page=request.page,
    )


def _beginning(answer: httpx.Response) -> bytes:
    """Of an error's body as much as tells what is wrong."""
    data = b""
    for more in answer.iter_bytes():
        data += more
        if len(data) >= answers.MOST_ERROR_BYTES:
            break
    return data[: answers.MOST_ERROR_BYTES]


def _headers(want: RangeRead) -> dict[str, str]:
    return {
        "User-Agent": AGENT,
        "Accept": "*/*",
        "Accept-Encoding": "identity",
        "Range": f"bytes={want.start}-{want.end - 1}",
    }


def _head_of(answer: httpx.Response, url: str) -> answers.SourceResponse:
    return answers.SourceResponse(
        status=answer.status_code, headers=dict(answer.headers), persistent=True, url=url
    )


def _plain(request: HttpRequest) -> dict[str, str]:
    return {"Accept-Encoding": "identity", **request.headers}


def home_of(environ: Mapping[str, str]) -> str:
    """The home directory, by the environment first."""
    return environ.get("HOME") or os.path.expanduser("~")


def ask_each(ask: Callable[[T], R], items: Sequence[T]) -> list[R]:
    """``ask`` of every item, several at once, in order. The first error is raised."""
    if len(items) < 2:
        return [ask(item) for item in items]
    with ThreadPoolExecutor(min(ASKED_AT_ONCE, len(items)), "listing") as threads:
        return list(threads.map(ask, items))


def read_file(source: Source, file: RemoteFile, retries: Retries = ONCE) -> bytes:
    """A small file of a model, whole."""
    return _read_span(source, file, 0, file.size_bytes, retries)


def _read_span(source: Source, file: RemoteFile, start: int, end: int, retries: Retries) -> bytes:
    fd = os.memfd_create("tidegate-small-file")
    want = RangeRead(file=file, start=start, end=end, fd=fd, cancelled=retries.cancelled)
    try:
        keep_asking(lambda: source.fetch(want), retries)
        return os.pread(fd, end - start, start)
    finally:
        os.close(fd)


class RangedSource(ABC):
    """A source whose files are URLs. What differs is how they are listed and signed."""

    def __init__(self, ref: ModelRef, reader: HttpReader) -> None:
        self.ref = ref
        self.reader = reader

    @abstractmethod
    def list(self, retries: Retries = ONCE) -> Listing:
        """What the model consists of; see ``Source.list``."""

    @abstractmethod
    def request_of(self, file: RemoteFile) -> HttpRequest:
        """The URL of a file, good for a read that begins now."""

    def fetch(self, want: RangeRead) -> None:
        """See ``Source.fetch``."""
        self.reader.fetch(self.request_of(want.file), want)

    def probed(self, listing: Listing, retries: Retries) -> Listing:
        """The listing, once the source has shown that it serves ranges as asked.

        Eight bytes from the middle of the largest file: a source that cannot is told from one that
        can before gigabytes are under way. Files that are read whole need no ranges.
        """
        largest = max(listing.files, key=lambda file: file.size_bytes)
        if largest.size_bytes > PIECE_BYTES:
            middle = largest.size_bytes // 2
            _read_span(self, largest, middle, middle + PROBE_BYTES, retries)
        return listing

    def close(self) -> None:
        """Close its connections. May be called twice."""
        self.reader.close()
