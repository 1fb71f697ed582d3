"""Environment variables that look like settings and are none: one underscore where two belong."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping

from gateway.settings import fields
from gateway.settings.errors import Problem

PREFIX = "TIDEGATE_"
SETTING_PREFIX = "TIDEGATE__"

OURS = frozenset(
    {
        "TIDEGATE_COMPILED",
        "TIDEGATE_CONFIG",
        "TIDEGATE_DEBUG",
        "TIDEGATE_ENGINE",
        "TIDEGATE_ENGINE_PIP_ARGS",
        "TIDEGATE_PEER_TOKEN",
        "TIDEGATE_REPLICA_MARK",
    }
)
"""Variables with one underscore that something reads."""

SERVICE_LINKS = ("tcp://", "udp://", "sctp://")
"""How values begin that Kubernetes puts into a container for a service called ``tidegate-…``."""


def find_misnamed(environ: Mapping[str, str], named: Collection[str]) -> Iterator[Problem]:
    """A warning for each variable that is not read and was probably meant as a setting.

    ``named`` are variables that the settings themselves name, for keys and secrets.
    """
    for name in sorted(environ):
        ours = name in OURS or name in named or environ[name].startswith(SERVICE_LINKS)
        if ours or not name.startswith(PREFIX) or name.startswith(SETTING_PREFIX):
            continue
        meant = _meant(name.removeprefix(PREFIX))
        if meant is not None:
            message = f"is not read; {meant}, with two underscores, is probably meant"
            yield Problem("", message, f"environment {name}")


def _meant(tail: str) -> str | None:
    """The variable of the setting that a name without its prefix stands for: all of its path, or
    the last part where only one setting ends so."""
    words = re.sub(r"_+", "_", tail).lower()
    ends = []
    for path, _ in fields.walk(fields.root()):
        pattern = "_".join("([0-9]+)" if part == "*" else part for part in path)
        found = re.fullmatch(pattern, words)
        if found is not None:
            return _variable(path, *found.groups())
        if path[-1] == words:
            ends.append(path)
    return _variable(ends[0]) if len(ends) == 1 else None


def _variable(path: fields.Parts, index: str = "0") -> str:
    return SETTING_PREFIX + "__".join(index if part == "*" else part for part in path).upper()
