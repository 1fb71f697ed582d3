"""The servers of the remote benchmark: a model behind nginx and an OSS, a relay that watches."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from bench import procs
from bench.nginx import nginx_path

BUCKET, PREFIX = "models", "bench"
SLICE_BYTES = 1 << 20

_NGINX = """\
daemon off;
worker_processes 2;
pid {folder}/nginx.pid;
error_log {folder}/error.log warn;
{user}
events {{ worker_connections 1024; }}
http {{
  access_log off;
  sendfile on;
  sendfile_max_chunk 2m;
  tcp_nopush on;
  keepalive_requests 100000000;
  client_body_temp_path {folder}/body;
  proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/fastcgi;
  uwsgi_temp_path {folder}/uwsgi;
  scgi_temp_path {folder}/scgi;
  default_type application/octet-stream;
  ssl_certificate {folder}/server.pem;
  ssl_certificate_key {folder}/server.pem;
  server {{
    listen 127.0.0.1:{port};
    listen 127.0.0.1:{tls_port} ssl;
    root {folder}/served;
    # What S3 clients ask for a listing of a bucket.
    location = /{bucket} {{ rewrite ^ /s3.xml last; }}
    location ~ xml$ {{ default_type application/xml; }}
    location /{bucket}/{prefix}/ {{ autoindex on; autoindex_format json; }}
  }}
}}
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """A model behind nginx, and behind what stands for OSS."""

    port: int
    tls_port: int
    oss_port: int
    certificate: Path
    files: dict[str, int]
    """Sizes by name."""

    @property
    def size_bytes(self) -> int:
        return sum(self.files.values())


def make_files(folder: Path, count: int, size_bytes: int) -> dict[str, int]:
    """Files of bytes that nothing compresses; kept when they are there."""
    target = folder / "served" / BUCKET / PREFIX
    target.mkdir(parents=True, exist_ok=True)
    found = {}
    for number in range(count):
        path = target / f"model-{number + 1:05}-of-{count:05}.safetensors"
        if not path.exists() or path.stat().st_size != size_bytes:
            _fill(path, Random(number), size_bytes)
        path.read_bytes()  # into the page cache: the store's disk is not what is measured
        found[path.name] = size_bytes
    return found


def _fill(path: Path, random: Random, size_bytes: int) -> None:
    with path.open("wb") as file:
        for start in range(0, size_bytes, SLICE_BYTES):
            file.write(random.randbytes(min(SLICE_BYTES, size_bytes - start)))


def _listings(files: dict[str, int]) -> tuple[str, str]:
    """What S3 and OSS answer when they are asked for the bucket's objects."""
    entries = "".join(
        f"<Contents><Key>{PREFIX}/{name}</Key><LastModified>2026-11-20T10:00:00.000Z"
        f'</LastModified><ETag>"0"</ETag><Type>Normal</Type><Size>{size}</Size>'
        "<StorageClass>Standard</StorageClass><Owner><ID>0</ID><DisplayName>0</DisplayName>"
        "</Owner></Contents>"
        for name, size in files.items()
    )
    head = f'<?xml version="1.0" encoding="UTF-8"?><ListBucketResult><Name>{BUCKET}</Name>'
    more = f"<Prefix>{PREFIX}/</Prefix><MaxKeys>1000</MaxKeys><IsTruncated>false</IsTruncated>"
    tail = f"<KeyCount>{len(files)}</KeyCount>{entries}</ListBucketResult>"
    oss = f"{head}{more}<Marker></Marker><Delimiter>/</Delimiter>{tail}"
    # nginx has ETags of its own: with another in the listing, the objects would look changed.
    s3 = (head + more + tail).replace('<ETag>"0"</ETag>', "")
    return s3, oss


def _certificate(path: Path) -> None:
    import datetime
    import ipaddress

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "bench")])
    now, hour = datetime.datetime.now(datetime.UTC), datetime.timedelta(hours=1)
    address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - hour)
        .not_valid_after(now + 24 * hour)
        .add_extension(x509.SubjectAlternativeName([address]), critical=False)
        .sign(key, hashes.SHA256())
    )
    path.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        + made.public_bytes(serialization.Encoding.PEM)
    )


@contextlib.contextmanager
def serving(root: Path, folder: Path, *, count: int, size_bytes: int) -> Iterator[Served]:
    """nginx with the model, until the block ends."""
    folder.mkdir(parents=True, exist_ok=True)
    files = make_files(folder, count, size_bytes)
    s3, oss = _listings(files)
    (folder / "served" / "s3.xml").write_text(s3)
    (folder / "served" / "oss.xml").write_text(oss)
    _certificate(folder / "server.pem")
    port, tls_port, oss_port = (procs.free_port() for _ in range(3))
    config = folder / "nginx.conf"
    user = "user root;" if os.geteuid() == 0 else ""
    config.write_text(_NGINX.format(folder=folder, user=user, port=port, tls_port=tls_port,
                                    bucket=BUCKET, prefix=PREFIX))  # fmt: skip
    argv: Sequence[str | Path] = [nginx_path(root), "-c", config, "-p", folder]
    child = procs.start("nginx", argv, log=folder / "nginx.log")
    command = [sys.executable, "-m", "bench.remote_oss", folder / "served", str(oss_port)]
    oss_child = procs.start("oss", command, log=folder / "oss.log", cwd=root)
    with procs.stopping(child, oss_child):
        probe = f"HEAD /{BUCKET}/{PREFIX}/{next(iter(files))} HTTP/1.0\r\n\r\n".encode()
        procs.wait_ready(child, port, probe)
        procs.wait_ready(oss_child, oss_port, probe)
        yield Served(port=port, tls_port=tls_port, oss_port=oss_port,
                     certificate=folder / "server.pem", files=files)  # fmt: skip


@dataclass(slots=True)
class Relay:
    """Passes connections on to a port, and notes when how many bytes went to the client."""

    port: int
    to_port: int
    listener: socket.socket
    seen: list[tuple[float, int]] = field(default_factory=list)

    def run(self) -> None:
        while True:
            try:
                client, _ = self.listener.accept()
            except OSError:
                return
            # Little room to send: what has left this program is what the client may have.
            client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65_536)
            server = socket.create_connection(("127.0.0.1", self.to_port))
            for source, target, note in ((client, server, False), (server, client, True)):
                threading.Thread(
                    target=self._pass_on, args=(source, target, note), daemon=True
                ).start()

    def _pass_on(self, source: socket.socket, target: socket.socket, note: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65_536):
                view = memoryview(data)
                while view:
                    sent = target.send(view)
                    view = view[sent:]
                    if note:
                        self.seen.append((time.monotonic(), sent))
        for one in (source, target):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def relaying(to_port: int) -> Iterator[Relay]:
    """A relay in front of a port, until the block ends."""
    listener = socket.create_server(("127.0.0.1", 0))
    relay = Relay(listener.getsockname()[1], to_port, listener)
    threading.Thread(target=relay.run, daemon=True).start()
    try:
        yield relay
    finally:
        listener.close()


def window_peak(seen: Sequence[tuple[float, int]], window_s: float) -> int:
    """Most bytes within any ``window_s``."""
    ordered, peak, inside, begin = sorted(seen), 0, 0, 0
    for at_s, size in ordered:
        inside += size
        while at_s - ordered[begin][0] > window_s:
            inside -= ordered[begin][1]
            begin += 1
        peak = max(peak, inside)
    return peak
