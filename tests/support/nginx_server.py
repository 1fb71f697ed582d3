"""A real nginx that serves a folder on 127.0.0.1."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bench import procs
from bench.nginx import nginx_path

ROOT = Path(__file__).resolve().parent.parent.parent

CONFIG = """\
daemon off;
worker_processes 1;
pid {scratch}/nginx.pid;
error_log {scratch}/error.log warn;
{user}
events {{ worker_connections 256; }}
http {{
  access_log off;
  sendfile on;
  client_body_temp_path {scratch}/body;
  proxy_temp_path {scratch}/proxy;
  fastcgi_temp_path {scratch}/fastcgi;
  uwsgi_temp_path {scratch}/uwsgi;
  scgi_temp_path {scratch}/scgi;
  server {{
    listen 127.0.0.1:{port};
    root {folder};
    default_type application/octet-stream;
    types {{ application/json json; text/html html; }}
    location /listed/ {{ autoindex on; autoindex_format {index}; }}
    location /plain/ {{ }}
    location /compressed/ {{ gzip on; gzip_types application/json; gzip_min_length 1; }}
    location /once/ {{ max_ranges 0; }}
    location /private/ {{
      autoindex on;
      auth_basic "models";
      auth_basic_user_file {scratch}/users;
    }}
  }}
}}
"""


@contextmanager
def nginx(folder: Path, scratch: Path, *, index: str = "html") -> Iterator[str]:
    """Its URL, while it serves ``folder``; who may read ``private`` is in ``scratch/users``."""
    import os

    program, port = nginx_path(ROOT), procs.free_port()
    user = "user root;" if os.geteuid() == 0 else ""
    config = scratch / "nginx.conf"
    config.write_text(
        CONFIG.format(scratch=scratch, user=user, port=port, folder=folder, index=index)
    )
    (scratch / "users").write_text("ada:{PLAIN}lovelace-1815\n")
    with (scratch / "output.log").open("wb") as output:
        process = subprocess.Popen(
            [program, "-c", config, "-p", scratch], stdout=output, stderr=output
        )
    try:
        _wait(process, port, scratch)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(20)


def _wait(process: subprocess.Popen[bytes], port: int, scratch: Path) -> None:
    deadline_s = time.monotonic() + 60
    while procs.http_status(port, b"GET / HTTP/1.0\r\n\r\n") is None:
        if process.poll() is not None or time.monotonic() > deadline_s:
            raise RuntimeError(f"nginx did not start: {(scratch / 'output.log').read_text()}")
        time.sleep(0.05)
