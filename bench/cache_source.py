"""A store that is limited as a whole: one directory over HTTP ranges at so many bytes a second.

Run as a process of its own. It counts every byte of every body it sends, per file, and answers
``GET /stats`` with them. The limit is shared by all connections in turn, 64 KiB at a time, and a
socket's buffer is kept small, so that what is counted is what was taken.
"""

from __future__ import annotations

import argparse
import json
import mimetypes
import re
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

CHUNK_BYTES = 65_536
SEND_BUFFER_BYTES = 131_072
RANGE = re.compile(r"bytes=(\d+)-(\d*)$")


class Limit:
    """Hands out the right to send, first come, first served."""

    def __init__(self, rate_bytes_s: float) -> None:
        self._rate = rate_bytes_s
        self._lock = threading.Lock()
        self._free_at_s = 0.0
        self.sent_bytes = 0
        self.first_s: float | None = None
        self.last_s = 0.0

    def wait(self, size_bytes: int) -> None:
        with self._lock:
            now_s = time.monotonic()
            self.first_s = now_s if self.first_s is None else self.first_s
            # What a late waker leaves unused is made up for, up to a few hundredths of a second.
            begins_s = max(self._free_at_s, now_s - 0.05)
            self._free_at_s = begins_s + size_bytes / self._rate
            self.sent_bytes += size_bytes
            self.last_s = max(self._free_at_s, now_s)
            pause_s = self._free_at_s - now_s
        if pause_s > 0:
            time.sleep(pause_s)


class Handler(BaseHTTPRequestHandler):
    """Files of one directory, a listing of it, and the counters."""

    protocol_version = "HTTP/1.1"
    limit: Limit
    root: Path

    def setup(self) -> None:
        super().setup()
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        if self.path == "/stats":
            self._send_json({"sent_bytes": self.limit.sent_bytes, "first_s": self.limit.first_s,
                             "last_s": self.limit.last_s})  # fmt: skip
            return
        path = (self.root / unquote(self.path).lstrip("/")).resolve()
        if not path.is_relative_to(self.root) or not path.exists():
            self.send_error(404)
        elif path.is_dir():
            entries = [{"name": one.name, "type": "file"} for one in sorted(path.iterdir())]
            self._send_json(entries)
        else:
            self._send_file(path, body=body)

    def _send_json(self, value: object) -> None:
        data = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _send_file(self, path: Path, *, body: bool) -> None:
        info = path.stat()
        start, end = 0, info.st_size
        found = RANGE.match(self.headers.get("Range", ""))
        if found:
            start = int(found[1])
            end = min(int(found[2]) + 1 if found[2] else end, end)
        self.send_response(206 if found else 200)
        kind = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(end - start))
        self.send_header("ETag", f'"{info.st_mtime_ns:x}-{info.st_size:x}"')
        self.send_header("Accept-Ranges", "bytes")
        if found:
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{info.st_size}")
        self.end_headers()
        if body:
            self._send_range(path, start, end)

    def _send_range(self, path: Path, start: int, end: int) -> None:
        with path.open("rb") as file:
            file.seek(start)
            while start < end:
                data = file.read(min(CHUNK_BYTES, end - start))
                self.limit.wait(len(data))
                try:
                    self.connection.sendall(data)
                except OSError:
                    self.close_connection = True
                    return
                start += len(data)

    def log_message(self, format: str, *args: object) -> None:
        return


class Server(ThreadingHTTPServer):
    """Accepts as many connections at once as ten nodes open."""

    request_queue_size = 512
    daemon_threads = True


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("root", type=Path)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--rate-bytes-s", type=float, required=True)
    arguments = parser.parse_args()
    Handler.limit = Limit(arguments.rate_bytes_s)
    Handler.root = arguments.root.resolve()
    Server(("127.0.0.1", arguments.port), Handler).serve_forever()


if __name__ == "__main__":
    main()
