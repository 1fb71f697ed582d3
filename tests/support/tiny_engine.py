"""The smallest engine the process backend can run: a few endpoints, and the manners asked for."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--fail", action="store_true", help="write two lines and exit 3")
    parser.add_argument("--stubborn", action="store_true", help="ignore SIGTERM")
    parser.add_argument("--family", action="store_true", help="have a child, and one that left")
    parser.add_argument("--unwell", action="store_true", help="answer 503 to GET /health")
    parser.add_argument("--no-health", action="store_true", help="answer 404 to GET /health")
    parser.add_argument("--chatty-bytes", type=int, default=0, help="written before serving")
    options = parser.parse_args()
    if options.fail:
        print("reading the weights", flush=True)
        print("the weights are not there", file=sys.stderr, flush=True)
        return 3
    if options.stubborn:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if options.family:
        nap = [sys.executable, "-c", "import time; time.sleep(600)"]
        subprocess.Popen(nap)
        subprocess.Popen(nap, start_new_session=True)
    line = "x" * 99 + "\n"
    for _ in range(options.chatty_bytes // len(line)):
        sys.stdout.write(line)
    print("serving", os.environ.get("CUDA_VISIBLE_DEVICES", "no GPU"), flush=True)
    serve(options)
    return 0


def serve(options: argparse.Namespace) -> None:
    asleep = False

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/health":
                status = 503 if options.unwell else 404 if options.no_health else 200
                self.answer(status)
            elif self.path == "/v1/models":
                model = {"id": options.model, "object": "model", "max_model_len": 2048}
                self.answer(200, {"object": "list", "data": [model]})
            elif self.path == "/facts":
                facts = {"cpus": sorted(os.sched_getaffinity(0)), "env": dict(os.environ)}
                self.answer(200, {**facts, "asleep": asleep, "pid": os.getpid()})
            elif self.path == "/shout":
                print("y" * 5_000, flush=True)
                self.answer(200)
            else:
                self.answer(404)

        def do_POST(self) -> None:
            nonlocal asleep
            if self.path not in {"/sleep?level=1", "/wake_up"}:
                self.answer(404)
                return
            asleep = self.path != "/wake_up"
            self.answer(200)

        def answer(self, status: int, body: object = None) -> None:
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: object) -> None:
            """Nothing per request."""

    class Server(ThreadingHTTPServer):
        allow_reuse_port = True  # the backend has reserved it

    server = Server(("127.0.0.1", options.port), Handler)
    while True:
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            time.sleep(0.01)


if __name__ == "__main__":
    sys.exit(main())
