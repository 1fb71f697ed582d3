"""Who is let in to the admin listener.

Its Unix socket is reached by the user who started Tidegate (and root) alone: mode 0600. Over TCP

- everything but health and metrics needs the bearer token;
- a ``Host`` that is a foreign name is refused, whatever address is listened on (DNS rebinding): a
  web page in an operator's browser could reach the listener through a name of its own;
- nothing is changed by a request that a page could send without asking first: a change is a POST
  with ``content-type: application/json``, and CORS is never granted;
- a request that a browser marks as coming from another site is refused whatever it asks.
"""

from __future__ import annotations

import hmac
import ipaddress
import re
from collections.abc import Mapping, Sequence
from typing import Any

from starlette.requests import Request

from gateway.admin.operations import OPEN, OPERATIONS
from gateway.admin.schema import AdminError
from gateway.settings.schema import LOOPBACK_NAMES

OPEN_PATHS = frozenset(one.path for one in OPERATIONS if one.name in OPEN)
SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
OWNER = "owner"
"""Key of a request's state: it came over the Unix socket."""

_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[^\s:@/\[\]]+)(:[0-9]{1,5})?", re.IGNORECASE)


def is_owner(scope: Mapping[str, Any]) -> bool:
    """Whether a request came over the Unix socket. One of unknown way did not."""
    return scope.get("state", {}).get(OWNER) is True


class Guard:
    """Which requests are let in.

    ``host`` is the address that is bound, ``allowed_hosts`` are further names, ``token`` is what
    requests over TCP carry. Without one only ``OPEN_PATHS`` are answered over TCP.
    """

    def __init__(self, *, host: str, allowed_hosts: Sequence[str], token: str | None) -> None:
        names = {name.lower() for name in allowed_hosts}
        self.any_host = "*" in names
        self.names = names | {host.lower().strip("[]")} | LOOPBACK_NAMES
        self.token = token

    def check(self, request: Request) -> None:
        """Raise ``AdminError`` for a request that is not let in."""
        owner = is_owner(request.scope)
        hosts = request.headers.getlist("host")
        # Without one (HTTP/1.0, a plain health check) it cannot be a browser.
        if not owner and (len(hosts) > 1 or (hosts and not self.knows(hosts[0]))):
            raise AdminError(
                "host_not_allowed",
                "This listener does not answer to that Host; "
                "list the name in gateway.admin_allowed_hosts.",
            )
        if request.headers.get("sec-fetch-site", "none") not in {"none", "same-origin"}:
            raise AdminError("cross_site", "Requests from other sites' pages are refused.")
        origin = request.headers.get("origin")
        if origin is not None and origin.partition("://")[2] not in hosts:
            raise AdminError("cross_site", "Requests from other origins' pages are refused.")
        if not owner and request.scope["path"] not in OPEN_PATHS:
            self.check_token(request)
        if request.method not in SAFE_METHODS:
            media = request.headers.getlist("content-type")
            if [one.partition(";")[0].strip().lower() for one in media] != ["application/json"]:
                raise AdminError(
                    "content_type", "Send it with the header content-type: application/json."
                )

    def check_token(self, request: Request) -> None:
        """Raise ``AdminError`` for a request without the token."""
        given = request.headers.getlist("authorization")
        scheme, _, token = given[0].partition(" ") if len(given) == 1 else ("", "", "")
        wanted = self.token or ""
        # As bytes: text that is not ASCII cannot be compared in constant time.
        matches = hmac.compare_digest(token.strip().encode(), wanted.encode())
        if not wanted or scheme.lower() != "bearer" or not matches:
            raise AdminError(
                "unauthorized",
                "This needs the header Authorization: Bearer TOKEN with the token of this admin "
                "listener: the file admin-token in the state directory of its Tidegate, or what "
                "gateway.admin_token_file names.",
                www_authenticate='Bearer realm="tidegate"',
            )

    def knows(self, host: str) -> bool:
        """Whether a ``Host`` is ours. An address always is: rebinding takes a name."""
        found = _HOST.fullmatch(host)
        if self.any_host:
            return True
        if found is None:
            return False
        name = found[1].lower().strip("[]")
        if name.rstrip(".") in self.names:
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True
