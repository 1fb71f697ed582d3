"""What ``tidegate status`` shows of a cache agent. A pure function from data to text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gateway.cli.figures import UNKNOWN, count, one_line
from gateway.cli.model_tables import size

PEERS_NAMED = 5
"""Peers that are named where they are not reached; of more the number is enough."""


def is_agent(report: Mapping[str, Any]) -> bool:
    """Whether what answered ``/status`` is a cache agent, and no gateway."""
    return "peer_url" in report and "pools" not in report


def agent_status(report: Mapping[str, Any], admin_url: str) -> str:
    """Where peers are served, which are reached, what the cache takes, what went through it."""
    traffic = report.get("traffic") or {}
    lines = [
        f"tidegate {report.get('version', UNKNOWN)}, a cache agent: no pools, no engines",
        "",
        f"  peers    {_served(report.get('peer_url'))}; {_reached(traffic.get('peers') or [])}",
        f"  admin    {admin_url}",
        f"  cache    {report.get('dir', UNKNOWN)}: {_taken(report.get('usage') or {})}",
        f"  traffic  read {size(traffic.get('store_bytes'))} from stores and "
        f"{size(traffic.get('peer_bytes'))} from peers, gave {size(traffic.get('sent_bytes'))}",
        f"           {size(traffic.get('wasted_bytes'))} read in vain, "
        f"{count(traffic.get('retries'), 'retry', 'retries')}, "
        f"{count(traffic.get('peer_failures'), 'failure', 'failures')} of peers",
    ]
    return "\n".join(map(one_line, lines)) + "\n\nIts models: `tidegate model ls`.\n"


def _served(peer_url: object) -> str:
    return f"served at {peer_url}" if peer_url else "not served yet"


def _reached(peers: Sequence[Mapping[str, Any]]) -> str:
    if not peers:
        return "no others are known"
    away = [str(one.get("url")) for one in peers if not one.get("reached")]
    text = f"{len(peers) - len(away)} of {len(peers)} others reached"
    if not away:
        return text
    more = f" and {len(away) - PEERS_NAMED} more" if len(away) > PEERS_NAMED else ""
    return f"{text}, not {', '.join(away[:PEERS_NAMED])}{more}"


def _taken(usage: Mapping[str, Any]) -> str:
    quota = usage.get("quota_bytes")
    allowed = "" if quota is None else f" of {size(quota)} allowed"
    return f"{size(usage.get('bytes_used'))}{allowed}; {size(usage.get('free_bytes'))} free on disk"
