"""The token that requests to the admin listener carry over TCP."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import secrets
import stat
from pathlib import Path

from gateway.settings.errors import Problem, show
from gateway.settings.load import ConfigError
from gateway.settings.schema import Settings, is_loopback
from modelcache.store.files import create

log = logging.getLogger("tidegate")

TOKEN_NAME = "admin-token"
MIN_TOKEN_CHARACTERS = 16


def admin_token(settings: Settings) -> str | None:
    """The token that requests to the admin listener carry over TCP; it is made where there is none.

    Raises ``ConfigError`` where the file is not one to be trusted. ``None``, with a warning, where
    none can be made (a full disk) and the listener is on loopback: then only health and metrics
    are answered over TCP. Beyond loopback that is an error too.
    """
    gateway = settings.gateway
    path = gateway.admin_token_file or settings.state_dir / TOKEN_NAME
    try:
        if gateway.admin_token_file is None:
            _make_token(path)
        return read_token(path)
    except ValueError as error:
        raise ConfigError([_token_problem(path, str(error))]) from None
    except OSError as error:
        why = error.strerror or str(error)
        if gateway.admin_token_file is not None or not is_loopback(gateway.admin_host):
            raise ConfigError([_token_problem(path, why)]) from None
        log.warning(
            "%s: %s; over TCP the admin listener answers health and metrics only", path, why
        )
        return None


def _token_problem(path: Path, why: str) -> Problem:
    message = f"there is no token for the admin listener, so it is not started: {why}"
    return Problem("gateway.admin_token_file", message, "at start", show(str(path)))


def _make_token(path: Path) -> None:
    """Write a new token, whole, unless there is a file."""
    if os.path.lexists(path):
        return
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    fresh.unlink(missing_ok=True)
    try:
        with open(create(fresh, os.O_EXCL), "w", encoding="ascii") as file:
            file.write(f"{secrets.token_urlsafe(32)}\n")
        with contextlib.suppress(FileExistsError):  # an agent's start was quicker
            os.link(fresh, path)
    finally:
        fresh.unlink(missing_ok=True)


def read_token(path: Path) -> str:
    """The token in a file. Raises ``OSError``, and ``ValueError`` for what is none, or is not kept
    from other users."""
    with open(path, encoding="utf-8") as file:
        seen = os.fstat(file.fileno())
        if not stat.S_ISREG(seen.st_mode):
            raise ValueError("it is no file")
        if seen.st_uid not in {0, os.geteuid()}:
            raise ValueError(f"it belongs to user {seen.st_uid}, who is not the one that runs this")
        if seen.st_mode & 0o037:
            mode = stat.S_IMODE(seen.st_mode)
            raise ValueError(f"other users may use it (mode {mode:04o}): chmod 600, or 640")
        return check_token(file.read(4_096).strip())


def check_token(token: str) -> str:
    """The same, where it can be a token. Raises ``ValueError``."""
    if len(token) < MIN_TOKEN_CHARACTERS or not re.fullmatch(r"[\x21-\x7e]+", token):
        raise ValueError(
            f"a token is {MIN_TOKEN_CHARACTERS} characters or more of ASCII, without white space"
        )
    return token
