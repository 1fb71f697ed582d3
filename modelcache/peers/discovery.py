"""Host names that stand for many nodes: every address of one is a peer of its own.

A headless Kubernetes service is such a name. It is looked up again and again, for nodes come and
go; a thread does that, because a name server may take its time.
"""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Callable, Sequence
from urllib.parse import urlsplit

log = logging.getLogger("tidegate.modelcache.peers")

LOOK_S = 10.0
"""Seconds between two looks."""

SOON_S = 2.0
"""Seconds between two looks at the least: each stranger that asks us something brings one."""

MOST_ADDRESSES = 1_024
"""Addresses of one name that are used."""

LookUp = Callable[[str, int], Sequence[str]]
"""The addresses of a host name, for connections to a port. ``OSError`` where there is no answer."""


def look_up(host: str, port: int) -> list[str]:
    """As the system does it, each address once."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return sorted({str(entry[4][0]) for entry in found})


class PeerNames:
    """Tells ``on_found`` the URLs that each name stands for: name, URLs. Thread-safe."""

    def __init__(
        self,
        names: Sequence[str],
        on_found: Callable[[str, Sequence[str]], None],
        look_up: LookUp = look_up,
    ) -> None:
        self._names = tuple(dict.fromkeys(name.rstrip("/") for name in names))
        self._on_found = on_found
        self._look_up = look_up
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._asked = self._closed = False
        self._problems: dict[str, str] = {}
        self.looked = False
        """Whether each name was looked up once, with or without an answer."""

    def look(self) -> None:
        """Look soon; returns at once. The first call begins with it."""
        with self._changed:
            self._asked = True
            if self._thread is None and not self._closed:
                self._thread = threading.Thread(target=self._run, name="peer names", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def close(self) -> None:
        """Look no more. One look may still be under way; nothing comes of it."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._asked = False
            for name in self._names:
                self._look(name)
            with self._changed:
                self.looked = True
                self._changed.wait_for(lambda: self._closed, SOON_S)
                self._changed.wait_for(lambda: self._closed or self._asked, LOOK_S - SOON_S)
                if self._closed:
                    return

    def _look(self, name: str) -> None:
        parts = urlsplit(name)
        port = parts.port or 80
        try:
            found = self._look_up(parts.hostname or "", port)[:MOST_ADDRESSES]
        except (OSError, UnicodeError) as error:
            # No answer is not an empty one: who was known stays.
            self._note(name, str(error) or type(error).__name__)
            return
        self._note(name, "")
        urls = [f"http://{f'[{one}]' if ':' in one else one}:{port}" for one in found]
        with self._changed:
            if self._closed:
                return
        self._on_found(name, urls)

    def _note(self, name: str, problem: str) -> None:
        """Into the log, once for each change."""
        if self._problems.get(name, "") == problem:
            return
        self._problems[name] = problem
        if problem:
            log.warning("peers %s cannot be looked up: %s", name, problem)
        else:
            log.info("peers %s are found again", name)
