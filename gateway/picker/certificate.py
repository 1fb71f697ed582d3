"""The certificate that the endpoint picker shows Envoy: from files, or a self-signed one.

Gateway API implementations connect to an endpoint picker by TLS and do not verify it, so that a
certificate made at the start is what most of them need.
"""

from __future__ import annotations

import datetime
import ipaddress
import socket
import ssl
import sys
from pathlib import Path
from typing import Any

import grpc

from gateway.datapath.worker import read_not_after_s

_SELF_SIGNED_DAYS = 3650


class PickerCertificate:
    """A chain and its key in PEM, and the gRPC credentials that show them.

    Raises ``OSError`` or ``ssl.SSLError`` where the files cannot be used at the start.
    """

    def __init__(self, certificate: Path | str | None, key: Path | str | None) -> None:
        self._files = None if certificate is None or key is None else (certificate, key)
        self._stamp: tuple[float, ...] = ()
        if self._files is None:
            self._pair = make_self_signed()
        else:
            self._stamp = self._read_stamp()
            self._pair = self._load()
        self._shown = self._pair
        self.credentials: Any = grpc.dynamic_ssl_server_credentials(
            _configuration(self._pair), self._fetch
        )

    @property
    def not_after_s(self) -> int:
        """The Unix time at which it expires."""
        return read_not_after_s(self._pair[0].decode("latin-1"))

    def renew(self) -> None:
        """Load the files if they changed. What does not load is left alone until it does."""
        try:
            stamp = self._read_stamp()
            if stamp != self._stamp:
                self._pair = self._load()
                self._stamp = stamp
        except (OSError, ssl.SSLError) as error:
            print(f"tidegate: the picker's certificate was not reloaded: {error}", file=sys.stderr)  # noqa: T201

    def _read_stamp(self) -> tuple[float, ...]:
        return tuple(Path(path).stat().st_mtime for path in self._files or ())

    def _load(self) -> tuple[bytes, bytes]:
        certificate, key = self._files or ("", "")
        # gRPC would take any bytes, and fail with each client.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password="")
        return Path(certificate).read_bytes(), Path(key).read_bytes()

    def _fetch(self) -> Any:
        """Called by gRPC, in a thread of its own, for each connection: what has changed."""
        pair = self._pair
        if pair is self._shown:
            return None
        self._shown = pair
        return _configuration(pair)


def _configuration(pair: tuple[bytes, bytes]) -> Any:
    certificate, key = pair
    return grpc.ssl_server_certificate_configuration([(key, certificate)])


def make_self_signed() -> tuple[bytes, bytes]:
    """A new certificate for this host and loopback, and its key."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "tidegate endpoint picker")])
    names = [
        x509.DNSName("localhost"),
        x509.DNSName(socket.gethostname()),
        x509.IPAddress(ipaddress.ip_address("127.0.0.1")),
    ]
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=_SELF_SIGNED_DAYS))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .sign(key, hashes.SHA256())
    )
    return (
        made.public_bytes(serialization.Encoding.PEM),
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        ),
    )
