"""Asks a running Tidegate's admin listener, for the verbs of the console."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit

if TYPE_CHECKING:
    import httpx

CONNECT_TIMEOUT_S = 3.0
ANSWER_TIMEOUT_S = 70.0
"""Longer than a call to a backend may take by default, so that the answer says what happened."""


class Unreachable(Exception):
    """Nobody answers at that address, or it is no Tidegate; the message says which."""


class Refused(Exception):
    """Tidegate answered, and the answer is no; the message is its own."""


def check_address(address: str) -> str:
    """A base URL without a trailing slash; ``host:port`` gets ``http://``. Else ``ValueError``."""
    text = address if "://" in address else f"http://{address}"
    try:
        parts = urlsplit(text)
        ok = parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
    except ValueError:
        ok = False
    if not ok:
        raise ValueError(f"{address!r} is no address: write it like http://127.0.0.1:8001")
    return text.rstrip("/")


def pool_path(pool: str, verb: str) -> str:
    """The admin path of a pool, whatever characters are in its name."""
    return f"/pools/{quote(pool, safe='')}/{verb}"


@contextmanager
def reach(base: str) -> Iterator[httpx.Client]:
    """A client for an admin listener; what fails on the way to it is ``Unreachable``."""
    import httpx

    # The environment's proxies are for elsewhere: this is our own machine or network.
    timeout = httpx.Timeout(ANSWER_TIMEOUT_S, connect=CONNECT_TIMEOUT_S)
    try:
        with httpx.Client(base_url=base, timeout=timeout, trust_env=False) as client:
            yield client
    except httpx.ConnectError:
        raise Unreachable(
            f"nothing answers at {base}: is Tidegate running (`tidegate up`)? "
            "Another address is given with --admin"
        ) from None
    except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
        reason = str(error) or type(error).__name__
        raise Unreachable(f"no answer from {base}: {reason}") from None


def ask(base: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    """GET a path, or POST a body to it, and the JSON object that is answered.

    Raises ``Unreachable`` and ``Refused``.
    """
    with reach(base) as client:
        answer = client.get(path) if body is None else client.post(path, json=body)
    try:
        found = answer.json()
    except ValueError:
        found = None
    if answer.status_code >= 400:
        raise Refused(_message(answer) or f"{base} answered {answer.status_code}")
    if not isinstance(found, dict):
        raise Unreachable(f"{base} is no Tidegate admin listener: it did not answer with JSON")
    return found


def _message(answer: Any) -> str | None:
    """The message of an error in OpenAI's shape, where the answer is one."""
    try:
        found = answer.json()
    except ValueError:
        return None
    return found.get("error", {}).get("message") if isinstance(found, dict) else None
