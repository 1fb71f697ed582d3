"""The adapter's certificate, and whose client certificates it takes: renewed without a restart."""

from __future__ import annotations

import logging
import os
import ssl
from pathlib import Path

LOG = logging.getLogger("tidegate.adapter")


class ServingTls:
    """``context`` is what new connections are made with. ``client_ca`` (PEM) is the authority of
    client certificates; without one none is asked for.

    A context is made anew for each change: one that is in use does not forget an authority.
    Raises ``OSError`` or ``ssl.SSLError`` where the files cannot be used at the start.
    """

    def __init__(self, certificate: Path, key: Path, client_ca: str = "") -> None:
        self.client_ca = client_ca
        self._certificate = certificate
        self._key = key
        self._made_of = self._read_stamp()
        self.context = self._make()

    def renew(self) -> None:
        """Take the files if they changed, and the authority if it did. What does not load (half
        written, a key that does not match yet) is left alone until it does."""
        try:
            stamp = self._read_stamp()
            if stamp != self._made_of:
                self.context, self._made_of = self._make(), stamp
        except (OSError, ValueError) as error:
            LOG.warning("the TLS certificate was not reloaded: %s", error)

    def _read_stamp(self) -> tuple[object, ...]:
        seen = [os.stat(path) for path in (self._certificate, self._key)]
        return self.client_ca, *((one.st_mtime_ns, one.st_ino, one.st_size) for one in seen)

    def _make(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.set_alpn_protocols(["http/1.1"])
        context.load_cert_chain(self._certificate, self._key, password="")
        if self.client_ca:
            # Between its certificates there may be text in any language.
            authority = self.client_ca.encode("ascii", "ignore").decode()
            context.load_verify_locations(cadata=authority)
            # A probe of the kubelet has none; whose is not of this authority is refused.
            context.verify_mode = ssl.CERT_OPTIONAL
        return context
