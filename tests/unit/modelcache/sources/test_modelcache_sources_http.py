"""Web servers that do not do as they should: an error that says so, and never a wrong byte."""

from __future__ import annotations

import datetime
import ipaddress
import os
import ssl
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from random import Random

import object_server as wrong
import pytest
from nginx_server import nginx
from object_server import IndexedServer, ObjectServer, serving

from modelcache.ports import RangeRead, Retries, Source
from modelcache.refs import parse_ref
from modelcache.settings import ModelCacheSettings
from modelcache.sources.opening import open_source
from modelcache.types import CacheError, Listing, NoSpace, NotFound, RemoteFile, SourceError

SIZE = 3_000_001
BODY = Random(7).randbytes(SIZE)
START, END = 1_000, 2_500_000


@pytest.fixture
def server() -> Iterator[IndexedServer]:
    with serving(made := IndexedServer()):
        made.objects["m/model.safetensors"] = BODY
        yield made


def open_at(url: str, environ: Mapping[str, str] | None = None, timeout_s: float = 30) -> Source:
    settings = ModelCacheSettings(timeout_s=timeout_s)
    return open_source(parse_ref(url), settings=settings, environ={"HOME": "/", **(environ or {})})


def list_at(url: str, environ: Mapping[str, str] | None = None) -> Listing:
    source = open_at(url, environ)
    try:
        return source.list()
    finally:
        source.close()


def fetch(
    source: Source, file: RemoteFile, target: Path, start: int = START, end: int = END
) -> bytes:
    """The bytes that a fetch writes between ``start`` and ``end``, and nothing beside them."""
    target.write_bytes(b"\xaa" * file.size_bytes)
    fd = os.open(target, os.O_RDWR)
    try:
        source.fetch(RangeRead(file=file, start=start, end=end, fd=fd))
    finally:
        os.close(fd)
    data = target.read_bytes()
    assert set(data[:start] + data[end:]) <= {0xAA}
    return data[start:end]


@pytest.mark.parametrize(
    ("fault", "says", "retryable"),
    [
        (wrong.ignores_range, "ignores ranges", False),
        (wrong.inclusive_end, "the source sent", True),
        (wrong.other_range, "the source sent 1001-", True),
        (wrong.no_content_range, "which range", False),
        (wrong.short_length, "the source sends", True),
        (wrong.cut_off, "cut off", True),
        (wrong.compressed, "compressed (gzip)", False),
        (wrong.chunked_short, "cut off", True),
        (wrong.changed, "has changed", False),
        (wrong.grown, "had 3,000,001", False),
        (wrong.not_http, "does not speak HTTP", True),
        (wrong.endless_head, "endless", False),
        (wrong.silent, "timed out", True),
        (wrong.status(404), "no such file", False),
        (wrong.status(403), "no credentials were found; credentials: ~/.netrc", False),
        (wrong.status(412), "has changed", False),
        (wrong.status(416), "shorter", False),
        (wrong.status(500), "answered 500", True),
        (wrong.status(418), "answered 418", False),
        (wrong.redirects(lambda path: ""), "redirects to nowhere", False),
        (wrong.redirects(lambda path: "ftp://h/x"), "redirects to nowhere", False),
        (wrong.redirects(lambda path: "http://h:99999/x"), "redirects to nowhere", False),
        (wrong.redirects(lambda path: "http://[::1/x"), "redirects to nowhere", False),
        (wrong.redirects(lambda path: f"http://{'h' * 64}.org/x"), "redirects to nowhere", False),
        (wrong.redirects(lambda path: f"/{path}"), "redirects more than", False),
    ],
)
def test_what_is_wrong_is_an_error(
    server: IndexedServer, tmp_path: Path, fault: wrong.Fault, says: str, retryable: bool
) -> None:
    # Short only where a time-out is waited for: a busy machine may take a second for any answer.
    short = fault is wrong.silent
    patient = open_at(f"{server.url}/m/", timeout_s=30)
    file = patient.list().files[0]
    source = open_at(f"{server.url}/m/", timeout_s=1) if short else patient
    server.fault = fault
    with pytest.raises(SourceError) as raised:
        fetch(source, file, tmp_path / "out")
    assert says in str(raised.value)
    assert raised.value.retryable is retryable
    server.fault = None
    if not short:  # a source that met it is none the worse for it
        assert fetch(source, file, tmp_path / "out") == BODY[START:END]
    source.close()
    patient.close()


@pytest.mark.parametrize(("status", "after_s"), [(429, 7.0), (503, 7.0)])
def test_how_long_to_wait_is_handed_on(
    server: IndexedServer, tmp_path: Path, status: int, after_s: float
) -> None:
    source = open_at(f"{server.url}/m/")
    file = source.list().files[0]
    server.fault = wrong.first(1, wrong.status(status, Retry_After="7"))
    with pytest.raises(SourceError) as raised:
        fetch(source, file, tmp_path / "out")
    assert (raised.value.retryable, raised.value.retry_after_s) == (True, after_s)
    assert fetch(source, file, tmp_path / "out") == BODY[START:END]
    source.close()


def test_a_body_in_chunks_is_as_good(server: IndexedServer, tmp_path: Path) -> None:
    source = open_at(f"{server.url}/m/")
    file = source.list().files[0]
    server.fault = wrong.chunked
    assert fetch(source, file, tmp_path / "out") == BODY[START:END]
    source.close()


def test_the_whole_of_a_file_needs_no_ranges(server: IndexedServer, tmp_path: Path) -> None:
    source = open_at(f"{server.url}/m/")
    file = source.list().files[0]
    server.fault = wrong.ignores_range
    assert fetch(source, file, tmp_path / "out", 0, SIZE) == BODY
    source.close()


def test_a_store_without_ranges_is_found_out_before_gigabytes(server: IndexedServer) -> None:
    server.objects["m/model.safetensors"] = bytes(9_000_000)
    server.fault = wrong.ignores_range
    with pytest.raises(SourceError, match="ignores ranges"):
        list_at(f"{server.url}/m/")


def test_a_redirect_is_followed_and_the_password_is_not_taken_along(
    server: IndexedServer, tmp_path: Path
) -> None:
    (tmp_path / "netrc").write_text("machine localhost login ada password lovelace-1815\n")
    with serving(other := ObjectServer()):
        other.objects["m/model.safetensors"] = BODY
        url = server.url.replace("127.0.0.1", "localhost")
        source = open_at(f"{url}/m/", {"NETRC": str(tmp_path / "netrc")})
        file = source.list().files[0]
        server.fault = wrong.redirects(lambda path: f"{other.url}/{path}?X-Amz-Signature=abcdef")
        assert fetch(source, file, tmp_path / "out") == BODY[START:END]
        assert all("authorization" in headers for _, _, headers in server.asked)
        assert not [headers for _, _, headers in other.asked if "authorization" in headers]
        other.objects.clear()
        with pytest.raises(NotFound) as raised:
            fetch(source, file, tmp_path / "out")
        assert "abcdef" not in str(raised.value)
        source.close()


def test_where_a_redirect_led_is_remembered_until_it_fails(
    server: IndexedServer, tmp_path: Path
) -> None:
    with serving(other := ObjectServer()):
        other.objects["m/model.safetensors"] = BODY
        source = open_at(f"{server.url}/m/")
        file = source.list().files[0]
        asked = len(server.reads())
        server.fault = wrong.redirects(lambda path: f"{other.url}/{path}")
        for _ in range(3):
            assert fetch(source, file, tmp_path / "out") == BODY[START:END]
        assert len(server.reads()) == asked + 1
        other.fault = wrong.status(403)  # what was signed has run out
        server.fault = None
        assert fetch(source, file, tmp_path / "out") == BODY[START:END]
        source.close()


def test_a_kept_connection_that_was_closed_is_no_error(
    server: IndexedServer, tmp_path: Path
) -> None:
    closing = threading.Event()

    def hang_up(handler: wrong.Handler, path: str, data: bytes) -> bool:
        if closing.is_set():
            handler.close_connection = True  # without a word of it in the answer
        return False

    source = open_at(f"{server.url}/m/")
    file = source.list().files[0]
    server.fault = hang_up
    closing.set()
    for _ in range(4):
        assert fetch(source, file, tmp_path / "out") == BODY[START:END]
    source.close()


def test_nobody_there_is_an_error_that_may_pass(tmp_path: Path) -> None:
    with serving(gone := IndexedServer()):
        gone.objects["m/model.safetensors"] = BODY
        source = open_at(f"{gone.url}/m/")
        file = source.list().files[0]
    with pytest.raises(SourceError, match="refused") as raised:
        fetch(source, file, tmp_path / "out")
    assert raised.value.retryable
    source.close()
    with pytest.raises(SourceError, match="refused") as raised:
        list_at(f"{gone.url}/m/")
    assert raised.value.retryable


@pytest.mark.parametrize("chunks", [False, True])
def test_a_full_disk_is_not_the_store_s_fault(server: IndexedServer, chunks: bool) -> None:
    source = open_at(f"{server.url}/m/")
    file = source.list().files[0]
    server.fault = wrong.chunked if chunks else None
    with open("/dev/full", "wb") as full, pytest.raises(CacheError) as raised:
        source.fetch(RangeRead(file=file, start=START, end=END, fd=full.fileno()))
    assert not isinstance(raised.value, SourceError)
    assert isinstance(raised.value, NoSpace) or "cannot be written" in str(raised.value)
    source.close()


def test_files_by_their_usual_names_where_nothing_is_listed(server: IndexedServer) -> None:
    server.index = None
    shards = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    weights = ",".join(f'"t{n}":"{name}"' for n, name in enumerate(shards))
    server.objects = {f"q/{name}": b"12345678" for name in (*shards, "config.json", "other.bin")}
    server.objects["q/model.safetensors.index.json"] = b'{"weight_map":{%s}}' % weights.encode()
    found = {file.path for file in list_at(f"{server.url}/q").files}
    assert found == {"config.json", "model.safetensors.index.json", *shards}
    del server.objects[f"q/{shards[1]}"]
    with pytest.raises(NotFound):
        list_at(f"{server.url}/q")
    server.objects = {"q/config.json": b"{}"}
    with pytest.raises(NotFound, match="lists no files"):
        list_at(f"{server.url}/q")


def test_each_listing_has_retries_of_its_own(server: IndexedServer) -> None:
    source = open_at(f"{server.url}/m/")
    another: list[Listing] = []

    def pausing() -> bool:
        """While the first listing waits to ask again, another is made, which does not retry."""
        if not another:
            another.append(source.list())
            server.busy, server.busy_from = 1, len(server.asked) + 1
        return False

    server.busy = 1
    assert source.list(Retries(most=2, cancelled=pausing)) == another[0]
    assert server.busy == 0
    source.close()


def test_one_file_is_a_model_too(server: IndexedServer, tmp_path: Path) -> None:
    source = open_at(f"{server.url}/m/model.safetensors")
    listing = source.list()
    assert [file.path for file in listing.files] == ["model.safetensors"]
    assert fetch(source, listing.files[0], tmp_path / "out") == BODY[START:END]
    source.close()


def test_checksums_that_lie_beside_the_files_are_told(server: IndexedServer) -> None:
    import hashlib

    digest = hashlib.sha256(BODY).hexdigest()
    server.objects["m/SHA256SUMS"] = f"{digest} *model.safetensors\nnot a line\n".encode()
    files = {file.path: file for file in list_at(f"{server.url}/m/").files}
    assert files["model.safetensors"].digests == {"sha256": digest}
    assert files["SHA256SUMS"].digests == {}


def test_a_listing_does_not_lead_out_of_the_model(server: IndexedServer) -> None:
    server.objects["secret.txt"] = b"x"
    page = b"""<html><a href="/secret.txt">a</a><a href="../secret.txt">b</a>
      <a href="%2e%2e/secret.txt">c</a><a href="https://elsewhere.example/m/d">d</a>
      <a href="model.safetensors?C=M">e</a><a href="model.safetensors#f">f</a>
      <a href="..%2fsecret.txt">g</a></html>"""
    server.objects["m/"] = page
    with pytest.raises((SourceError, NotFound)):
        list_at(f"{server.url}/m/")  # g: a file that cannot be called so
    server.objects["m/"] = page.replace(b'<a href="..%2fsecret.txt">g</a>', b"")
    assert [file.path for file in list_at(f"{server.url}/m/").files] == ["model.safetensors"]


def test_a_proxy_of_the_environment_is_used_and_its_exceptions_are_kept(
    server: IndexedServer, tmp_path: Path
) -> None:
    # Whatever host a proxy is asked for, this one answers with its own objects.
    environ = {"HTTP_PROXY": server.url, "NO_PROXY": "localhost, .intern"}
    source = open_at("http://models.invalid/m/", environ)
    file = source.list().files[0]
    assert fetch(source, file, tmp_path / "out") == BODY[START:END]
    assert {path.partition("/m/")[0] for _, path, _ in server.asked} == {"http://models.invalid"}
    source.close()
    for host in ("localhost", "models.intern"):
        before = len(server.asked)
        with pytest.raises(SourceError):
            list_at(f"http://{host}:9/m/", environ)
        assert len(server.asked) == before


@pytest.mark.parametrize("index", ["html", "json"])
def test_nginx_of_every_kind(tmp_path: Path, index: str) -> None:
    served, scratch = tmp_path / "served", tmp_path / "nginx"
    scratch.mkdir()
    for place in ("listed", "plain", "compressed", "once"):
        (served / place / "m" / "sub").mkdir(parents=True)
        (served / place / "m" / "config.json").write_text('{"a": 1}' * 5_000)
        (served / place / "m" / "model.safetensors").write_bytes(BODY * 3)
        (served / place / "m" / "sub" / "x y.txt").write_text("x")
    with nginx(served, scratch, index=index) as url:
        found = {f.path: f.size_bytes for f in list_at(f"{url}/listed/m/").files}
        assert found == {
            "config.json": 40_000,
            "model.safetensors": 3 * SIZE,
            "sub/x y.txt": 1,
        }
        assert len(list_at(f"{url}/plain/m").files) == 2
        source = open_at(f"{url}/compressed/m/")
        config = next(f for f in source.list().files if f.path == "config.json")
        assert fetch(source, config, tmp_path / "out", 3, 39_000)  # nginx compresses no range
        source.close()
        with pytest.raises(SourceError, match="ignores ranges"):
            list_at(f"{url}/once/m/")


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """A key and a certificate for 127.0.0.1 that nobody knows, in one file."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "tests")])
    now = datetime.datetime.now(datetime.UTC)
    address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([address]), critical=False)
        .sign(key, hashes.SHA256())
    )
    path = tmp_path / "server.pem"
    path.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        + made.public_bytes(serialization.Encoding.PEM)
    )
    return path


def test_over_tls_every_byte_is_the_same_and_strangers_are_refused(
    certificate: Path, tmp_path: Path
) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    made = IndexedServer()
    made.socket = context.wrap_socket(made.socket, server_side=True)
    made.objects["m/model.safetensors"] = BODY
    with serving(made):
        url = made.url.replace("http:", "https:") + "/m/"
        source = open_at(url, {"SSL_CERT_FILE": str(certificate)})
        file = source.list().files[0]
        assert fetch(source, file, tmp_path / "out") == BODY[START:END]
        assert fetch(source, file, tmp_path / "out", 0, 1) == BODY[:1]
        made.fault = wrong.cut_off
        with pytest.raises(SourceError) as raised:
            fetch(source, file, tmp_path / "out")
        assert raised.value.retryable
        source.close()
        stranger = open_at(url)
        for ask in (stranger.list, lambda: fetch(stranger, file, tmp_path / "out")):
            with pytest.raises(SourceError) as raised:
                ask()
            assert not raised.value.retryable
            assert "certificate" in str(raised.value).lower()
        stranger.close()


def test_with_a_bandwidth_limit_little_is_taken_in_ahead(server: IndexedServer) -> None:
    """What the kernel receives nobody counts, so it may not receive much."""
    import socket

    from modelcache.sources.reader import make_reader

    def buffer_bytes(rate_bytes_s: int | None) -> int:
        reader = make_reader({}, timeout_s=5, connections=4, rate_bytes_s=rate_bytes_s)
        connection = reader.connections.take(server.url)
        size = connection.sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)
        connection.close()
        return size

    assert buffer_bytes(1_000_000) == 2 * 65_536  # the kernel doubles what it is given
    assert buffer_bytes(24_000_000) == 2 * 180_000
    assert buffer_bytes(None) != buffer_bytes(24_000_000)


@pytest.mark.parametrize("url", ["hf://org/m", "https://no-such-host.invalid/m"])
def test_a_host_without_an_address_is_named(url: str) -> None:
    with pytest.raises(SourceError) as caught:
        list_at(url, {"HF_ENDPOINT": "https://no-such-host.invalid"})
    assert "no-such-host.invalid" in str(caught.value)
    assert "DNS" in str(caught.value)
    assert "PROXY" in str(caught.value)
    assert "Errno" not in str(caught.value)
    assert caught.value.retryable
