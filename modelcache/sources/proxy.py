"""Which proxy a URL is asked over: one rule for every client of the cache. Pure.

``http_proxy``, ``https_proxy`` and ``all_proxy``, in small letters before capitals, and
``no_proxy`` as curl, Go and Python's tools write it: hosts, domains with or without a leading dot
or ``*.``, addresses, networks (``10.0.0.0/8``), each with or without a port, ``*`` for all; between
them commas or spaces. This machine and link-local addresses (a cloud's metadata) are never asked
over a proxy: it would ask its own.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from urllib.parse import urlsplit

from modelcache.types import SourceError

KINDS = ("http", "https", "socks5", "socks5h")
PORTS = {"http": 80, "https": 443}

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def proxy_of(url: str, environ: Mapping[str, str]) -> str | None:
    """The URL of the proxy for ``url``; ``None`` where it is asked directly. Raises ``SourceError``
    where the environment names a proxy that is none, without showing it."""
    parts = urlsplit(url)
    host, port = (parts.hostname or "").rstrip("."), parts.port or PORTS.get(parts.scheme, 0)
    name, proxy = _find(environ, f"{parts.scheme}_proxy")
    if not proxy:
        name, proxy = _find(environ, "all_proxy")
    if not proxy or is_direct(host, port, _find(environ, "no_proxy")[1]):
        return None
    proxy = proxy if "://" in proxy else f"http://{proxy}"
    try:
        at = urlsplit(proxy)
        usable = at.scheme.lower() in KINDS and bool(at.hostname) and at.port != 0
    except ValueError:
        usable = False
    if not usable:
        raise SourceError(f"{name} is no URL of a proxy: http://host:port is wanted")
    return proxy


def _find(environ: Mapping[str, str], name: str) -> tuple[str, str]:
    for spelled in (name, name.upper()):
        value = environ.get(spelled, "").strip()
        if value:
            return spelled, value
    return name, ""


def is_direct(host: str, port: int, no_proxy: str) -> bool:
    """Whether a host is asked directly: it is this machine, link-local or in ``no_proxy``."""
    host = host.lower()
    address = _address(host)
    if host == "localhost" or host.endswith(".localhost"):
        return True
    if address is not None and (address.is_loopback or address.is_link_local):
        return True
    entries = no_proxy.replace(",", " ").lower().split()
    return any(_fits(entry, host, port, address) for entry in entries)


def _address(text: str) -> Address | None:
    try:
        found = ipaddress.ip_address(text.strip("[]").partition("%")[0])
    except ValueError:
        return None
    mapped = found.ipv4_mapped if isinstance(found, ipaddress.IPv6Address) else None
    return mapped or found


def _fits(entry: str, host: str, port: int, address: Address | None) -> bool:
    if entry == "*":
        return True
    if "/" in entry:
        try:
            network = ipaddress.ip_network(entry.replace("[", "").replace("]", ""), strict=False)
        except ValueError:
            return False
        return address is not None and address.version == network.version and address in network
    name, wanted = entry, ""
    if entry.startswith("["):
        name, _, wanted = entry[1:].partition("]")
        wanted = wanted.removeprefix(":")
    elif entry.count(":") == 1:
        name, _, wanted = entry.partition(":")
    if wanted and wanted != str(port):
        return False
    given = _address(name)
    if given is not None:
        return given == address
    name = name.removeprefix("*").strip(".")
    return address is None and bool(name) and (host == name or host.endswith(f".{name}"))
