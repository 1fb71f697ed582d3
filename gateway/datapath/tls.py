"""The listener's certificate, taken anew when its files change."""

from __future__ import annotations

import os
import ssl
import sys
from pathlib import Path


class Certificate:
    """A certificate chain and its key, in the context that new connections are made with.

    Raises ``OSError`` or ``ssl.SSLError`` where they cannot be loaded at the start.
    """

    def __init__(self, certificate: Path | str, key: Path | str | None) -> None:
        self._certificate = certificate
        self._key = key
        self._stamp = self._read_stamp()
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.minimum_version = ssl.TLSVersion.TLSv1_2
        self.context.set_alpn_protocols(["http/1.1"])
        self.context.load_cert_chain(certificate, key)

    def _read_stamp(self) -> tuple[float, ...]:
        paths = (self._certificate, self._key)
        return tuple(os.stat(path).st_mtime for path in paths if path is not None)

    def renew(self) -> None:
        """Load the files if they changed. What does not load (half written, a key that does not
        match yet) is left alone until it does, and the pair in force stays."""
        try:
            stamp = self._read_stamp()
            if stamp == self._stamp:
                return
            # Tried elsewhere first: a pair that does not match (one file is replaced before the
            # other) would leave the context in use without a key.
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(self._certificate, self._key)
            self.context.load_cert_chain(self._certificate, self._key)
            self._stamp = stamp
        except (OSError, ssl.SSLError) as error:
            print(f"tidegate: the TLS certificate was not reloaded: {error}", file=sys.stderr)  # noqa: T201
