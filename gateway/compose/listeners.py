"""Where a Tidegate listens: its sockets, and the record by which the other verbs find them.

Sockets are made in the control process, so that a port that is taken is an error before anything
starts. ``up`` leaves a small record while it runs, so that ``tidegate status`` finds it whatever
port it was given, a port of the system's choice included.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from gateway.settings.errors import Problem, show
from gateway.settings.load import ConfigError, LoadedSettings
from modelcache.store.files import create, make_directory

log = logging.getLogger("tidegate")

BACKLOG = 4096
RECORD_NAME = "running.json"
AGENT_NAME = "agent.json"
"""The record of a cache agent, which may run beside a Tidegate."""
AGENT_LOCK = "agent.lock"
SOCKET_NAMES = {RECORD_NAME: "admin.sock", AGENT_NAME: "agent.sock"}
"""The Unix socket of the admin listener, beside the record."""
MOST_PATH_BYTES = 107
"""What the address of a Unix socket has room for."""


def listen(
    host: str, port: int, *, field: str, shared_by: int | None = None
) -> list[socket.socket]:
    """Listening TCP sockets on one port (0: of the system's choice): one, or with ``shared_by`` so
    many that share it (SO_REUSEPORT).

    ``field`` is that of the port. Raises ``ConfigError`` where the address cannot be had: in use,
    not permitted, or not of this machine, which is laid to the host beside that port.
    """
    return _open(host, port, field=field, shared_by=shared_by, listening=True)


def reserve(host: str, port: int, *, field: str) -> socket.socket:
    """A TCP socket bound to a port, for another process of ours to listen there (SO_REUSEPORT). As
    it does not listen itself, it is given no connection. Otherwise as ``listen``."""
    (reserved,) = _open(host, port, field=field, shared_by=1, listening=False)
    return reserved


def _open(
    host: str, port: int, *, field: str, shared_by: int | None, listening: bool
) -> list[socket.socket]:
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
            if listening:
                listener.listen(BACKLOG)
            listener.setblocking(False)
    except OSError as error:
        for listener in listeners:
            listener.close()
        raise ConfigError([_problem(field, host, port, error)]) from error
    return listeners


@contextlib.contextmanager
def socket_path(path: Path) -> Iterator[str]:
    """The path of a Unix socket as its address has room for it, while the context is open: a long
    one goes by way of its directory, open meanwhile."""
    if len(os.fsencode(path)) <= MOST_PATH_BYTES:
        yield str(path)
        return
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{directory}/{path.name}"
    finally:
        os.close(directory)


@contextlib.contextmanager
def admin_listeners(
    tcp: socket.socket, state_dir: Path, name: str
) -> Iterator[list[socket.socket]]:
    """The admin API's listening sockets: ``tcp``, and the Unix socket beside the record ``name``,
    which only this user may connect to. It is gone afterwards.

    Of one state directory there must be one caller: what a killed one has left is replaced. Where
    the directory takes no socket (a full disk) there is a warning, and TCP alone.
    """
    path = state_dir / SOCKET_NAMES[name]
    listeners = [tcp]
    try:
        listeners.append(_listen_for_owner(path))
    except OSError as error:
        why = error.strerror or error
        log.warning("%s: %s; `tidegate` needs --admin and the token instead", path, why)
    try:
        yield listeners
    finally:
        if len(listeners) > 1:
            with contextlib.suppress(OSError):
                path.unlink()


def _listen_for_owner(path: Path) -> socket.socket:
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        # Before it has a name, so that there is no moment at which others could connect. On Linux
        # the file gets the mode of the socket.
        os.fchmod(listener.fileno(), 0o600)
        with socket_path(path) as address:
            listener.bind(address)
        listener.listen(BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener


def _problem(field: str, host: str, port: int, error: OSError) -> Problem:
    value = str(port)
    if error.errno == errno.EADDRINUSE:
        why = "another program listens there; stop it, or choose another port"
    elif error.errno == errno.EADDRNOTAVAIL or isinstance(error, socket.gaierror):
        field, value = field.replace("port", "host"), show(host)
        why = "this machine has no such address"
    elif error.errno in {errno.EACCES, errno.EPERM}:
        why = "not permitted (ports below 1024 need a privilege)"
    else:
        why = error.strerror or str(error)
    where = f"[{host.strip('[]')}]:{port}" if ":" in host else f"{host}:{port}"
    return Problem(field, f"cannot listen on {where}: {why}", "at start", value)


@contextlib.contextmanager
def naming_origins(loaded: LoadedSettings) -> Iterator[None]:
    """Settings that turn out not to be usable at the start: the error says where they came from."""
    try:
        yield
    except ConfigError as error:
        problems = [
            one._replace(origin=loaded.origins.get(one.field, one.origin)) for one in error.problems
        ]
        raise ConfigError(problems) from error


@contextlib.contextmanager
def naming_this_one(state_dir: Path) -> Iterator[None]:
    """A port that is taken by the Tidegate that runs with this very state directory: then it is a
    ``ClaimError`` that says so."""
    try:
        yield
    except ConfigError as error:
        running = read_record(state_dir)
        cause = error.__cause__
        in_use = isinstance(cause, OSError) and cause.errno == errno.EADDRINUSE
        if running is None or not in_use or running.pid == os.getpid():
            raise
        its_ports = {str(urlsplit(one).port) for one in (running.url, running.admin_url)}
        if error.problems[0].value not in its_ports:
            raise
        raise ClaimError(
            f"Tidegate already runs here (process {running.pid}, {running.url}): "
            "see `tidegate status`"
        ) from error


def url(listener: socket.socket) -> str:
    """Where a listening socket is reached from this machine."""
    host, port = listener.getsockname()[:2]
    return make_url(host, port)


def make_url(host: str, port: int, scheme: str = "http") -> str:
    """Where a listener is reached from this machine; every-interface addresses become loopback."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(host, host).strip("[]")
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"


# ── The record ────────────────────────────────────────────────────────────────────────────────────


class ClaimError(Exception):
    """The state directory is that of another that is running, or cannot be locked; the message
    says which."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    """One running Tidegate: its control process and its two listeners. An agent's ``url`` is where
    its peers are served. ``admin_socket`` is where the admin API is served to its user, ``None``
    where it is not."""

    pid: int
    url: str
    admin_url: str
    admin_socket: Path | None = None


def leave_record(state_dir: Path, running: Running, name: str = RECORD_NAME) -> None:
    """Write the record, whole or not at all. Raises ``OSError`` where it cannot be written."""
    fresh = state_dir / f".{name}.{running.pid}"
    found = {"pid": running.pid, "url": running.url, "admin_url": running.admin_url}
    try:
        make_directory(state_dir)
        with open(create(fresh, os.O_TRUNC), "w", encoding="utf-8") as file:
            file.write(json.dumps(found))
        fresh.replace(state_dir / name)
    except OSError:
        with contextlib.suppress(OSError):
            fresh.unlink()
        raise


@contextlib.contextmanager
def claim_for_agent(state_dir: Path) -> Iterator[None]:
    """Be the one agent of a state directory meanwhile, as a Tidegate is by its registry.

    Raises ``ClaimError``. The lock goes with the process, however it ends.
    """
    with contextlib.ExitStack() as stack:
        try:
            lock = create(state_dir / AGENT_LOCK)
            stack.callback(os.close, lock)
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ClaimError(
                f"{state_dir} belongs to another cache agent that is running; "
                "give this one its own state_dir"
            ) from None
        except OSError as error:
            raise ClaimError(f"{state_dir} cannot be locked: {error.strerror or error}") from error
        yield


def read_record(state_dir: Path, name: str = RECORD_NAME) -> Running | None:
    """The Tidegate that runs with this state directory, ``None`` where none is known to."""
    socket_file = state_dir.absolute() / SOCKET_NAMES[name]
    try:
        found = json.loads((state_dir / name).read_text(encoding="utf-8"))
        running = Running(
            pid=int(found["pid"]),
            url=str(found["url"]),
            admin_url=str(found["admin_url"]),
            admin_socket=socket_file if socket_file.is_socket() else None,
        )
    except (OSError, ValueError, KeyError, TypeError, RecursionError, OverflowError):
        return None
    # In another container its number says nothing, but its socket takes connections there too.
    known = 0 < running.pid < 1 << 31 and (_alive(running.pid) or _takes_connections(socket_file))
    return running if known else None


def find_running(state_dir: Path) -> Running | None:
    """The Tidegate that runs with this state directory, else the cache agent."""
    return read_record(state_dir) or read_record(state_dir, AGENT_NAME)


def find_socket(state_dir: Path) -> Path | None:
    """The admin socket of what takes connections here without a record: it is starting or ending,
    or could not leave one."""
    for name in SOCKET_NAMES.values():
        path = state_dir.absolute() / name
        if _takes_connections(path):
            return path
    return None


def remove_record(state_dir: Path, pid: int, name: str = RECORD_NAME) -> None:
    """Take the record away if it is still this process's own."""
    running = read_record(state_dir, name)
    if running is not None and running.pid == pid:
        with contextlib.suppress(OSError):
            (state_dir / name).unlink()


def _takes_connections(path: Path) -> bool:
    """Whether somebody listens on a Unix socket."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as probe:
        with socket_path(path) as address:
            probe.settimeout(1.0)
            probe.connect(address)
        return True
    return False


def _alive(pid: int) -> bool:
    if pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True  # it is there, another user's
    except OverflowError:
        return False
    return True
