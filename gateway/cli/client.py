"""Asks a running Tidegate's admin listener, for the verbs of the console.

The verbs of ``tidegate model`` are done by a Tidegate or an agent that runs, else by this process;
all of them do and say the same.
"""

from __future__ import annotations

import _thread
import contextlib
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit

import typer

from modelcache.types import CacheError, Progress

if TYPE_CHECKING:
    import httpx

    from gateway.admin.models import Models
    from gateway.admin.operations import Operation
    from gateway.admin.schema import CacheListing, ModelAnswer, ModelRequest
    from gateway.settings.schema import Settings

CONNECT_TIMEOUT_S = 3.0
ANSWER_TIMEOUT_S = 70.0
"""Longer than a call to a backend may take by default, so that the answer says what happened."""
CANCEL_TIMEOUT_S = 30.0
"""Seconds that a verb in this process is given to end in good order after Ctrl-C."""

TOKEN_VARIABLE = "TIDEGATE_ADMIN_TOKEN"
UNIX = "unix:"

OnProgress = Callable[[Progress], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Listener:
    """An admin listener: ``http://host:port``, or ``unix:`` and the path of its socket. ``token``
    is what it is shown over TCP. ``state_dir`` is set where its socket was looked for in vain: one
    that is starting listens on TCP first."""

    url: str
    token: str = ""
    state_dir: Path | None = None

    def __str__(self) -> str:
        return self.url


MISTAKES = frozenset({"bad_value", "pool_not_found"})
"""Errors of the admin API that are of the command line: exit code 2."""


class Unreachable(Exception):
    """Nothing answers at that address, or it is no Tidegate; the message says which."""


class RequestRefused(Exception):
    """Tidegate answered with an error; the message is its own."""


class ValueRefused(Exception):
    """Tidegate, or its part in this process, cannot take a value it was given; the message is its
    own."""


class SettingsRefused(Exception):
    """Tidegate cannot use the settings that it read again; a line for each mistake."""


def check_address(address: str) -> str:
    """A base URL without a trailing slash; ``host:port`` gets ``http://``, a path ``unix:``. Else
    a usage error."""
    path = address.removeprefix(UNIX).removeprefix("//")
    if path != address or path.startswith(("/", "./", "../")) or Path(path).is_socket():
        return f"{UNIX}{os.path.abspath(path)}"
    text = address if "://" in address else f"http://{address}"
    try:
        parts = urlsplit(text)
        ok = parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
    except ValueError:
        ok = False
    if not ok:
        raise typer.BadParameter(
            f"{address!r} is not an address: write it like http://127.0.0.1:8001"
        )
    return text.rstrip("/")


def find_listener(admin: str | None, load: Callable[[], Settings]) -> Listener:
    """The listener that is asked: the one that ``admin`` names, else that of what runs or starts
    with this state directory, else the one in the settings. What runs here is asked over its socket
    where it has one, which only its user can connect to."""
    from gateway.compose.listeners import find_running, find_socket, make_url

    url = None if admin is None else check_address(admin)
    if url is not None and url.startswith(UNIX):
        return Listener(url=url)
    settings = load()
    running = find_running(settings.state_dir)
    if running is not None and url in {None, running.admin_url}:
        if running.admin_socket is not None:
            return Listener(url=f"{UNIX}{running.admin_socket}")
        url = running.admin_url
    elif running is None and url is None and (own := find_socket(settings.state_dir)) is not None:
        return Listener(url=f"{UNIX}{own}")
    gateway = settings.gateway
    url = url or make_url(gateway.admin_host, gateway.admin_port)
    state_dir = settings.state_dir if admin is None and running is None else None
    return Listener(url=url, token=_find_token(settings), state_dir=state_dir)


def _find_token(settings: Settings) -> str:
    """The token of the environment, else that of the file that the settings name; else none.

    The token in a state directory is not used: who listens there may be another than made it.
    """
    from gateway.compose.admin_token import check_token, read_token

    token = os.environ.get(TOKEN_VARIABLE, "").strip()
    path = settings.gateway.admin_token_file
    where = TOKEN_VARIABLE if token else f"gateway.admin_token_file: {path}"
    try:
        if token:
            return check_token(token)
        return "" if path is None else read_token(path)
    except (OSError, ValueError) as error:
        raise typer.BadParameter(f"{where}: {error}") from None


@contextmanager
def reach(listener: Listener) -> Iterator[httpx.Client]:
    """A client for an admin listener; what fails on the way to it is ``Unreachable``."""
    import httpx

    from gateway.compose.listeners import socket_path

    timeout = httpx.Timeout(ANSWER_TIMEOUT_S, connect=CONNECT_TIMEOUT_S)
    url, transport, headers = listener.url, None, {}
    try:
        with contextlib.ExitStack() as stack:
            if url.startswith(UNIX):
                path = stack.enter_context(socket_path(Path(url.removeprefix(UNIX))))
                url, transport = "http://localhost", httpx.HTTPTransport(uds=path)
            elif listener.token:
                headers["authorization"] = f"Bearer {listener.token}"
            # The environment's proxies are for elsewhere: this is our own machine or network.
            # Without TLS there is no need to load certificates, which takes longer than the
            # request.
            verify = url.startswith("https:")
            yield stack.enter_context(
                httpx.Client(
                    base_url=url,
                    timeout=timeout,
                    trust_env=False,
                    verify=verify,
                    transport=transport,
                    headers=headers,
                )
            )
    except httpx.ConnectError:
        raise Unreachable(
            f"nothing answers at {listener}: is Tidegate running (`tidegate up`)? "
            "Another address is given with --admin"
        ) from None
    except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
        reason = str(error) or type(error).__name__
        raise Unreachable(f"no answer from {listener}: {reason}") from None


def ask(
    base: Listener,
    operation: Operation,
    body: dict[str, Any] | None = None,
    *,
    query: dict[str, Any] | None = None,
    **path: str,
) -> Any:
    """Do an operation of the admin API, and its parsed answer. ``path`` has the parts of its path.

    Raises ``Unreachable``, ``RequestRefused`` and ``ValueRefused``.
    """
    quoted = {name: quote(part, safe="") for name, part in path.items()}
    with reach(base) as client:
        answer = client.request(
            operation.method,
            operation.path.format(**quoted),
            params=query,
            json=(body or {}) if operation.request is not None else None,
        )
    if answer.status_code == 401 and base.state_dir is not None:
        from gateway.compose.listeners import find_socket

        if (own := find_socket(base.state_dir)) is not None:  # it was starting
            return ask(Listener(url=f"{UNIX}{own}"), operation, body, query=query, **path)
    if answer.status_code >= 400:
        raise _refusal(answer.content, f"{base} answered {answer.status_code}")
    try:
        return operation.parse(answer.content)
    except ValueError:
        raise Unreachable(_no_answer(base)) from None


def _refusal(text: str | bytes, otherwise: str) -> Exception:
    """What an admin listener's error is on a command line."""
    from gateway.admin.schema import ErrorAnswer

    try:
        error = ErrorAnswer.model_validate_json(text).error
    except ValueError:
        return RequestRefused(otherwise)
    if error.code == "bad_settings":
        return SettingsRefused(error.message)
    if error.code == "unauthorized":
        return RequestRefused(
            f"{otherwise}: it wants its token. Run this with the state directory of the Tidegate "
            "that is meant (one that is starting takes a moment), or put its token into "
            f"{TOKEN_VARIABLE} (or a file, gateway.admin_token_file)"
        )
    if error.code in MISTAKES:
        return ValueRefused(error.message)
    return RequestRefused(error.message)


def _no_answer(base: Listener) -> str:
    return f"{base} is no Tidegate admin listener of this version: its answer has an unknown form"


# ── tidegate model ────────────────────────────────────────────────────────────────────────────────


class RemoteVerbs:
    """The verbs over the model cache of an admin listener."""

    def __init__(self, base: Listener) -> None:
        self._base = base

    def listing(self) -> CacheListing:
        """The models in its cache."""
        from gateway.admin.operations import MODELS

        found: CacheListing = ask(self._base, MODELS)
        return found

    def run(self, verb: str, asked: ModelRequest, on_progress: OnProgress) -> ModelAnswer:
        """Do it. The connection keeps slow work going: closing it cancels it. Wrong values are
        ``ValueRefused``, what could not be done is ``RequestRefused``."""
        from gateway.admin import schema
        from gateway.admin.operations import VERBS

        operation, body = VERBS[verb], asked.model_dump(mode="json")
        if not operation.lines:
            answer: ModelAnswer = ask(self._base, operation, body)
            return answer
        with (
            reach(self._base) as client,
            client.stream("POST", operation.path, json=body) as lines,
        ):
            if lines.status_code >= 400:
                raise _refusal(lines.read(), f"{self._base} answered {lines.status_code}")
            for line in filter(str.strip, lines.iter_lines()):
                try:
                    found = operation.parse(line)
                except ValueError:
                    raise Unreachable(_no_answer(self._base)) from None
                if isinstance(found, schema.ErrorAnswer):
                    raise _refusal(line, "")
                if isinstance(found, schema.ProgressLine):
                    on_progress(found.progress)
                elif isinstance(found, schema.ResultLine):
                    result: ModelAnswer = found.result
                    return result
        raise Unreachable(f"{self._base} ended its answer before it was done")


class LocalVerbs:
    """The same verbs in this process, on the cache's directory."""

    def __init__(self, models: Models) -> None:
        self._models = models

    def listing(self) -> CacheListing:
        """The models in the cache."""
        try:
            return self._models.listing()
        except OSError as error:
            raise CacheError(str(error)) from error

    def run(self, verb: str, asked: ModelRequest, on_progress: OnProgress) -> ModelAnswer:
        """Do it. Ctrl-C cancels it in good order first. Wrong values are ``ValueRefused``, what
        could not be done is ``CacheError``."""
        left, running = threading.Event(), threading.Lock()
        ends: list[ModelAnswer | BaseException] = []

        def work() -> None:
            try:
                ends.append(
                    self._models.run(verb, asked, on_progress=on_progress, cancelled=left.is_set)
                )
            except BaseException as error:  # noqa: BLE001 - raised again where it is waited for
                ends.append(error)
            running.release()

        running.acquire()
        try:
            # Not `threading.Thread`, nor an `Event`: where the interrupt arrives while one of them
            # waits, it may release a lock that is not held, or take the thread for ended (CPython
            # 3.11). A bare lock has no such moment.
            _thread.start_new_thread(work, ())
            running.acquire()
        except KeyboardInterrupt:
            left.set()
            if not ends:
                running.acquire(timeout=CANCEL_TIMEOUT_S)
            raise
        (end,) = ends
        if isinstance(end, ValueError):
            raise ValueRefused(str(end)) from end
        if isinstance(end, OSError):
            raise CacheError(str(end)) from end
        if isinstance(end, BaseException):
            raise end
        return end


def model_verbs(
    admin: str | None, settings: Settings, open_models: Callable[[Settings], Models]
) -> RemoteVerbs | LocalVerbs:
    """Those of the listener that is named, of what runs with this state directory, or else of this
    process."""
    from gateway.compose.cache import cache_dir
    from gateway.compose.listeners import find_running

    if admin is not None or find_running(settings.state_dir) is not None:
        return RemoteVerbs(find_listener(admin, lambda: settings))
    _check_directory(
        cache_dir(settings), "state_dir" if settings.modelcache.dir is None else "modelcache.dir"
    )
    return LocalVerbs(open_models(settings))


def _check_directory(path: Path, field: str) -> None:
    """A directory, or one that could be made. A usage error where a file is in its way."""
    there = next((one for one in (path, *path.parents) if os.path.lexists(one)), None)
    if there is not None and there.exists() and not there.is_dir():
        raise typer.BadParameter(f"{field}: {there} is not a directory")


def name_model(text: str, pools: Callable[[], Sequence[str]]) -> str:
    """The model as it is asked for: a directory by its whole path, everything else as it is
    written; ``pools`` has the names of pools where it is asked. A usage error where there is
    none."""
    if not text.strip():
        raise typer.BadParameter("model: it is empty")
    if "://" in text:
        return text
    here = Path(text).expanduser()
    is_path = text.startswith(("/", "./", "../", "~")) or text in (".", "..")
    if here.is_dir() and (is_path or text not in pools()):
        return os.path.abspath(here)
    if is_path:
        raise typer.BadParameter(f"there is no directory {text}")
    return text
