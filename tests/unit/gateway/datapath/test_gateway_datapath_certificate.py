"""When a certificate expires, as its gauge says."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from gateway.datapath.worker import read_not_after_s


@pytest.mark.parametrize("year", [2026, 2049, 2050, 2100])  # UTCTime ends with 2049
@pytest.mark.parametrize("names", [1, 40])  # lengths of one byte, and of more
def test_when_a_certificate_expires(year: int, names: int) -> None:
    expires = datetime(year, 12, 31, 23, 59, 58, tzinfo=UTC)
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"h{n}") for n in range(names)])
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(datetime(2020, 1, 1, tzinfo=UTC))
        .not_valid_after(expires)
        .sign(key, hashes.SHA256())
    )
    pem = made.public_bytes(serialization.Encoding.PEM).decode()
    assert read_not_after_s(f"# a comment\n{pem}{pem}") == expires.timestamp()


@pytest.mark.parametrize(
    "text",
    ["", "-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n"],
)
def test_what_is_no_certificate_has_no_date(text: str) -> None:
    assert read_not_after_s(text) == 0
