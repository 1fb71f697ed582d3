"""Who asks: the front proxy's word for it, or a bearer token.

The API aggregator authenticates a client and says who it is in headers. They are believed only on a
connection whose client certificate the front proxy's authority signed (TLS has verified that), with
a name that is allowed. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

CERTIFICATE = "client_certificate"
"""Key of a request's state: its connection's client certificate, as ``getpeercert`` has it; empty
or ``None`` where there is none, for only one that TLS has verified is known."""
AUTHENTICATED = "system:authenticated"
MAX_GROUPS = 1_000
MAX_TOKEN = 16_384


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """A user of the cluster."""

    user: str
    groups: tuple[str, ...] = ()
    uid: str = ""
    extra: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def key(self) -> tuple[object, ...]:
        """What two of them must share to be the same."""
        return self.user, self.groups, self.uid, tuple(sorted(self.extra.items()))


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontProxy:
    """What is known of the front proxy: the authority that signed its certificate (PEM), the names
    it may have there (none: any), and its headers, as in the ConfigMap
    ``kube-system/extension-apiserver-authentication``."""

    ca: str
    names: tuple[str, ...] = ()
    user_headers: tuple[str, ...] = ("x-remote-user",)
    group_headers: tuple[str, ...] = ("x-remote-group",)
    uid_headers: tuple[str, ...] = ("x-remote-uid",)
    extra_prefixes: tuple[str, ...] = ("x-remote-extra-",)


def common_name(certificate: Mapping[str, Any] | None) -> str | None:
    """The subject's common name of a verified certificate (``getpeercert``); ``None`` of none."""
    for part in (certificate or {}).get("subject", ()):
        for name, value in part:
            if name == "commonName":
                return str(value)
    return None


def is_front_proxy(proxy: FrontProxy, name: str | None) -> bool:
    """Whether a verified certificate with this name is the front proxy's."""
    return name is not None and (not proxy.names or name in proxy.names)


def proxied_identity(proxy: FrontProxy, headers: Sequence[tuple[bytes, bytes]]) -> Identity | None:
    """Who the front proxy says asks; ``None`` where it says nothing. Some of its own probes come
    without a group."""
    given = [(name.decode("latin-1").lower(), value.decode("utf-8", "replace"))
             for name, value in headers]  # fmt: skip
    user = _first(given, proxy.user_headers)
    if not user:
        return None
    groups = [value for name, value in given if name in proxy.group_headers and value]
    extra: dict[str, tuple[str, ...]] = {}
    for prefix in proxy.extra_prefixes:
        for name, value in given:
            if name.startswith(prefix) and len(name) > len(prefix):
                key = unquote(name[len(prefix) :])
                extra[key] = (*extra.get(key, ()), value)
    return Identity(
        user=user,
        groups=with_authenticated(groups[:MAX_GROUPS]),
        uid=_first(given, proxy.uid_headers),
        extra=extra,
    )


def with_authenticated(groups: Sequence[str]) -> tuple[str, ...]:
    """The groups, with that of all authenticated clients."""
    return tuple(groups) if AUTHENTICATED in groups else (*groups, AUTHENTICATED)


def bearer_token(headers: Sequence[tuple[bytes, bytes]]) -> str | None:
    """The token of a request; ``None`` where it has none, or one that cannot be one."""
    for name, value in headers:
        if name.lower() == b"authorization":
            scheme, _, token = value.decode("latin-1").partition(" ")
            token = token.strip()
            if scheme.lower() == "bearer" and token and len(token) <= MAX_TOKEN:
                return token
    return None


def _first(given: Sequence[tuple[str, str]], names: Sequence[str]) -> str:
    return next((value for name, value in given if name in names), "")
