"""One finding of ``tidegate doctor``: what was looked at, how it is, what to do about it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Status(StrEnum):
    """``fail`` keeps ``tidegate up`` from serving; ``warn`` will hurt sooner or later."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One thing that was looked at. ``advice`` is what to do, where there is something to do."""

    name: str
    status: Status
    finding: str
    advice: str | None = None


def ok(name: str, finding: str) -> Check:
    """What is well."""
    return Check(name=name, status=Status.OK, finding=finding)


def warn(name: str, finding: str, advice: str) -> Check:
    """What will hurt sooner or later, and what to do about it."""
    return Check(name=name, status=Status.WARN, finding=finding, advice=advice)


def fail(name: str, finding: str, advice: str) -> Check:
    """What keeps ``tidegate up`` from serving, and what to do about it."""
    return Check(name=name, status=Status.FAIL, finding=finding, advice=advice)
