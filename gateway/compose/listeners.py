"""Listening sockets: made in the control process, so that a port that is taken is an error before
anything starts."""

from __future__ import annotations

import errno
import socket

from gateway.settings.errors import Problem
from gateway.settings.load import ConfigError

BACKLOG = 4096


def listen(
    host: str, port: int, *, field: str, shared_by: int | None = None
) -> list[socket.socket]:
    """Listening TCP sockets on one port (0: of the system's choice): one, or with ``shared_by`` so
    many that share it (SO_REUSEPORT).

    Raises ``ConfigError``, naming ``field``, where the address cannot be had: in use, not of this
    machine, not permitted.
    """
    listeners: list[socket.socket] = []
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        if shared_by is not None and port:
            # Without this the port would silently be shared with another program's server that also
            # set SO_REUSEPORT.
            with socket.socket(family, kind, protocol) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(address)
        for _ in range(shared_by or 1):
            listener = socket.socket(family, kind, protocol)
            listeners.append(listener)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if shared_by is not None:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            if family == socket.AF_INET6 and host.strip("[]") == "::":
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            listener.bind(address)
            address = listener.getsockname()
            listener.listen(BACKLOG)
            listener.setblocking(False)
    except OSError as error:
        for listener in listeners:
            listener.close()
        raise ConfigError([_problem(field, host, port, error)]) from error
    return listeners


def _problem(field: str, host: str, port: int, error: OSError) -> Problem:
    if error.errno == errno.EADDRINUSE:
        why = "another program listens there; stop it, or choose another port"
    elif error.errno == errno.EADDRNOTAVAIL or isinstance(error, socket.gaierror):
        why = "this machine has no such address"
    elif error.errno in {errno.EACCES, errno.EPERM}:
        why = "not permitted (ports below 1024 need a privilege)"
    else:
        why = error.strerror or str(error)
    where = f"[{host.strip('[]')}]:{port}" if ":" in host else f"{host}:{port}"
    return Problem(field, f"cannot listen on {where}: {why}", "at start", str(port))


def url(listener: socket.socket, scheme: str = "http") -> str:
    """Where a listening socket is reached from this machine."""
    host, port = listener.getsockname()[:2]
    return make_url(host, port, scheme)


def make_url(host: str, port: int, scheme: str = "http") -> str:
    """Where a listener is reached from this machine; every-interface addresses become loopback."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(host, host).strip("[]")
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"
