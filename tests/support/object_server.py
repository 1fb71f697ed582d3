"""A web server of a few objects in memory, right by default and wrong on demand.

Stores are subclasses: they say which object a request means, and refuse what is not signed.
"""

from __future__ import annotations

import email.utils
import gzip
import hashlib
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

Answer = tuple[int, dict[str, str], bytes]
Fault = Callable[["Handler", str, bytes], bool]
"""Answers a read of an object (its path, its bytes) in its own way; ``False``: it did not."""


class Handler(BaseHTTPRequestHandler):
    """One request."""

    protocol_version = "HTTP/1.1"
    server: ObjectServer

    def do_GET(self) -> None:
        self.server.note(self)
        if self.server.busy > 0 and len(self.server.asked) > self.server.busy_from:
            self.server.busy -= 1
            self.answer(503, {}, b"<Error><Code>SlowDown</Code></Error>")
            return
        path, query = self.split()
        special = self.server.special(self, path, query)
        if special is not None:
            self.answer(*special)
            return
        data = self.server.objects.get(path)
        if data is None:
            self.answer(404, {}, b"no such object")
            return
        fault = self.server.fault
        if self.command == "GET" and fault is not None and fault(self, path, data):
            return
        self.answer(*self.slice(path, data))

    do_HEAD = do_GET

    def split(self) -> tuple[str, dict[str, str]]:
        parts = urlsplit(self.path)
        query = parse_qs(parts.query, keep_blank_values=True)
        return unquote(parts.path).lstrip("/"), {name: v[0] for name, v in query.items()}

    def wanted(self, size: int) -> tuple[int, int] | None:
        """The range that is asked for, end exclusive; ``None``: all of it."""
        found = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if found is None:
            return None
        return int(found[1]), min(int(found[2]) + 1, size) if found[2] else size

    def slice(self, path: str, data: bytes) -> Answer:
        headers = {**self.server.headers_of(path, data), "Accept-Ranges": "bytes"}
        wanted = self.wanted(len(data))
        if wanted is None:
            return 200, headers, data
        start, end = wanted
        if start >= len(data):
            return 416, {"Content-Range": f"bytes */{len(data)}"}, b""
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(data)}"
        return 206, headers, data[start:end]

    def answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if "Content-Length" not in headers and "Transfer-Encoding" not in headers:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


class ObjectServer(ThreadingHTTPServer):
    """Serves ``objects`` by path on 127.0.0.1, and remembers what it was asked."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.objects: dict[str, bytes] = {}
        self.asked: list[tuple[str, str, dict[str, str]]] = []
        self.fault: Fault | None = None
        self.busy = 0
        """So many requests are answered 503 …"""
        self.busy_from = 0
        """… after so many in all."""
        self.changed_at_s = 1_790_000_000.0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def note(self, handler: Handler) -> None:
        headers = {name.lower(): value for name, value in handler.headers.items()}
        self.asked.append((handler.command, handler.path, headers))

    def reads(self) -> list[tuple[str, str, dict[str, str]]]:
        """The requests for ranges so far."""
        return [one for one in self.asked if "range" in one[2]]

    def headers_of(self, path: str, data: bytes) -> dict[str, str]:
        return {
            "ETag": f'"{hashlib.md5(data).hexdigest()}"',
            "Last-Modified": email.utils.formatdate(self.changed_at_s, usegmt=True),
            "Content-Type": "text/html" if path.endswith("/") else "application/octet-stream",
        }

    def special(self, handler: Handler, path: str, query: dict[str, str]) -> Answer | None:
        """An answer that is no object: a listing, a refusal."""
        return None

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is what many tests are about."""


class IndexedServer(ObjectServer):
    """A web server that lists its directories, as HTML or as nginx's JSON, or not at all."""

    def __init__(self) -> None:
        super().__init__()
        self.index: str | None = "html"

    def special(self, handler: Handler, path: str, query: dict[str, str]) -> Answer | None:
        if path in self.objects or (path and not path.endswith("/")):
            return None
        names = sorted({
            name.removeprefix(path).partition("/")[0]
            + ("/" if "/" in name.removeprefix(path) else "")
            for name in self.objects
            if name.startswith(path)
        })  # fmt: skip
        if not names or self.index is None:
            return 403 if names else 404, {}, b""
        if self.index == "json":
            kinds = ((name.rstrip("/"), name.endswith("/")) for name in names)
            text = json.dumps(
                [{"name": name, "type": "directory" if d else "file"} for name, d in kinds]
            )
            return 200, {"Content-Type": "application/json"}, text.encode()
        links = "".join(f'<a href="{name}">{name}</a>\n' for name in ["../", "?C=N", *names])
        page = f"<html>{links}<a href='https://elsewhere.example/x'>by</a></html>"
        return 200, {"Content-Type": "text/html"}, page.encode()


@contextmanager
def serving(server: ObjectServer) -> Iterator[ObjectServer]:
    """Serve in a thread until the block ends."""
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)


# -- faults --------------------------------------------------------------------------------------


def ignores_range(handler: Handler, path: str, data: bytes) -> bool:
    """The whole object, whatever was asked."""
    handler.answer(200, handler.server.headers_of(path, data), data)
    return True


def inclusive_end(handler: Handler, path: str, data: bytes) -> bool:
    """One byte more than was asked, as some clients' servers understand an end."""
    start, end = handler.wanted(len(data)) or (0, len(data))
    handler.answer(206, {"Content-Range": f"bytes {start}-{end}/{len(data)}"},
                   data[start : end + 1])  # fmt: skip
    return True


def other_range(handler: Handler, path: str, data: bytes) -> bool:
    """As many bytes as were asked, from elsewhere."""
    start, end = handler.wanted(len(data)) or (0, len(data))
    handler.answer(206, {"Content-Range": f"bytes {start + 1}-{end}/{len(data)}"},
                   data[start + 1 : end + 1])  # fmt: skip
    return True


def no_content_range(handler: Handler, path: str, data: bytes) -> bool:
    start, end = handler.wanted(len(data)) or (0, len(data))
    handler.answer(206, {}, data[start:end])
    return True


def short_length(handler: Handler, path: str, data: bytes) -> bool:
    """It says and sends fewer bytes than the range has."""
    start, end = handler.wanted(len(data)) or (0, len(data))
    handler.answer(206, {"Content-Range": f"bytes {start}-{end - 1}/{len(data)}"},
                   data[start : end - 3])  # fmt: skip
    return True


def cut_off(handler: Handler, path: str, data: bytes) -> bool:
    """It says all and sends half."""
    status, headers, body = handler.slice(path, data)
    headers["Content-Length"] = str(len(body))
    handler.answer(status, headers, body[: len(body) // 2])
    handler.wfile.flush()
    handler.close_connection = True
    return True


def compressed(handler: Handler, path: str, data: bytes) -> bool:
    status, headers, body = handler.slice(path, data)
    handler.answer(status, {**headers, "Content-Encoding": "gzip"}, gzip.compress(body))
    return True


def chunked(handler: Handler, path: str, data: bytes) -> bool:
    """The right bytes, in chunks, without a length."""
    status, headers, body = handler.slice(path, data)
    parts = [body[at : at + 40_000] for at in range(0, len(body), 40_000)]
    framed = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"
    handler.answer(status, {**headers, "Transfer-Encoding": "chunked"}, framed)
    return True


def chunked_short(handler: Handler, path: str, data: bytes) -> bool:
    """Well-formed chunks that end before the range does."""
    return chunked(handler, path, data[:-5]) if handler.wanted(len(data)) is None else _short(
        handler, path, data
    )  # fmt: skip


def _short(handler: Handler, path: str, data: bytes) -> bool:
    status, headers, body = handler.slice(path, data)
    framed = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body) - 5, body[:-5])
    handler.answer(status, {**headers, "Transfer-Encoding": "chunked"}, framed)
    return True


def changed(handler: Handler, path: str, data: bytes) -> bool:
    """The same size, another version."""
    status, headers, body = handler.slice(path, data)
    handler.answer(status, {**headers, "ETag": '"another"'}, bytes(len(body)))
    return True


def grown(handler: Handler, path: str, data: bytes) -> bool:
    """More bytes than were listed, and no ETag to tell it by."""
    start, end = handler.wanted(len(data)) or (0, len(data))
    headers = {"Content-Range": f"bytes {start}-{end - 1}/{len(data) + 7}"}
    handler.answer(206, headers, data[start:end])
    return True


def not_http(handler: Handler, path: str, data: bytes) -> bool:
    handler.wfile.write(b"SSH-2.0-OpenSSH_9.2\r\n\r\n")
    handler.close_connection = True
    return True


def endless_head(handler: Handler, path: str, data: bytes) -> bool:
    handler.wfile.write(b"HTTP/1.1 206 Partial Content\r\n" + b"X: y\r\n" * 20_000)
    handler.close_connection = True
    return True


def silent(handler: Handler, path: str, data: bytes) -> bool:
    """It takes the request and says nothing for longer than a test waits."""
    time.sleep(3)
    handler.close_connection = True
    return True


def status(code: int, **headers: str) -> Fault:
    """Answers with a status; header names with ``_`` for ``-``."""

    def fault(handler: Handler, path: str, data: bytes) -> bool:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        handler.answer(code, named, b"sorry")
        return True

    return fault


def redirects(target: Callable[[str], str], code: int = 302) -> Fault:
    """Sends readers elsewhere."""

    def fault(handler: Handler, path: str, data: bytes) -> bool:
        handler.answer(code, {"Location": target(path)}, b"")
        return True

    return fault


def first(count: int, fault: Fault) -> Fault:
    """The first ``count`` reads go wrong."""
    lock, left = threading.Lock(), [count]

    def limited(handler: Handler, path: str, data: bytes) -> bool:
        with lock:
            left[0] -= 1
            wrong = left[0] >= 0
        return wrong and fault(handler, path, data)

    return limited
