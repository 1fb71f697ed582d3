"""An OSS of few words for the remote benchmark: objects by ``sendfile``, one listing.

nginx cannot stand in for OSS: ossfs sends ``If-Match`` without the quotes, which OSS takes and
nginx answers with 412. Signatures are not checked here (the tests' server does); clients sign all
the same, and that is what they are measured by.

    python -m bench.remote_oss FOLDER PORT
"""

from __future__ import annotations

import os
import re
import socket
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

_RANGE = re.compile(r"bytes=(\d+)-(\d+)$")


class Handler(BaseHTTPRequestHandler):
    """One request for an object of ``folder`` or for the listing that lies in it."""

    protocol_version = "HTTP/1.1"
    folder: Path

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if path.count("/") == 2 and path.endswith("/"):
            body = (self.folder / "oss.xml").read_bytes()
            self._head(200, {"Content-Type": "application/xml", "Content-Length": str(len(body))})
            self.wfile.write(body if self.command == "GET" else b"")
            return
        try:
            fd = os.open(self.folder / path.lstrip("/"), os.O_RDONLY)
        except OSError:
            self._head(404, {"Content-Length": "0"})
            return
        try:
            self._send(fd)
        finally:
            os.close(fd)

    do_HEAD = do_GET

    def _send(self, fd: int) -> None:
        size = os.fstat(fd).st_size
        wanted = _RANGE.match(self.headers.get("Range", ""))
        start, end = (int(wanted[1]), min(int(wanted[2]) + 1, size)) if wanted else (0, size)
        headers = {"Content-Length": str(end - start), "ETag": f'"{size:032X}"',
                   "Last-Modified": "Fri, 20 Nov 2026 10:00:00 GMT"}  # fmt: skip
        if wanted:
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
        self._head(206 if wanted else 200, headers)
        if self.command == "HEAD":
            return
        while start < end:
            start += os.sendfile(self.connection.fileno(), fd, start, end - start)

    def _head(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "x-oss-request-id": "1"}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.flush()

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing is logged."""


class Server(ThreadingHTTPServer):
    """One thread for each connection."""

    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients go when they have what they want."""

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        super().process_request_thread(request, client_address)


def main() -> int:
    """Serve the folder that is named until killed."""
    Handler.folder = Path(sys.argv[1])
    server = Server(("127.0.0.1", int(sys.argv[2])), Handler)
    server.serve_forever()
    return 0


if __name__ == "__main__":
    sys.exit(main())
