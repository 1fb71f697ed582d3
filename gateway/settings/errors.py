"""What is wrong with settings, one line each: field, value, what is allowed, where it came from."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from autoscaler.settings import PoolSettings
from gateway.settings import fields
from modelcache.refs import redact, secret_arguments

SHOWN_CHARACTERS = 60
"""Characters of a wrong value that an error repeats."""

HIDDEN = "(hidden)"
HIDDEN_TABLES = frozenset({"headers", "env"})
"""Tables whose values are people's own: any of them may be a secret, whatever its name is."""
COMMAND_LINES = frozenset({"engine_args", "argv"})
"""Lists that may have secrets in them, as values of flags."""

DEFAULT = "default"
"""The origin of a value that was not given."""

DATE = "a date"
"""Key that marks a TOML date, which JSON has no word for."""

OWN_WORDS = frozenset({"value_error", "assertion_error"})
"""Errors of validators written for one field: their text is better than the field's schema."""


class Problem(NamedTuple):
    """One thing wrong. ``field`` is empty where it is a whole file or argument; ``value`` is what
    was given, as it is shown, where the message is about that."""

    field: str
    message: str
    origin: str
    value: str | None = None

    def __str__(self) -> str:
        if not self.field:
            return one_line(f"{self.origin}: {self.message}")
        if self.value is not None:
            return one_line(f"{self.field} = {self.value}: {self.message} ({self.origin})")
        return one_line(f"{self.field} {self.message} ({self.origin})")

    def as_warning(self) -> str:
        """Its line where it is only a warning: the message is then a sentence of its own."""
        if not self.field or self.value is not None:
            return str(self)
        return one_line(f"{self.field}: {self.message} ({self.origin})")


def one_line(text: str) -> str:
    """Text with everything escaped that would break the line or steer a terminal."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode("ascii")
        for char in text
    )


Origin = Callable[[Sequence[str]], str]


def explain(
    error: ValidationError,
    origin: Origin,
    blame: Origin,
    unless_about: Collection[tuple[str, ...]] = (),
) -> Iterator[Problem]:
    """The problems in a validation error.

    ``origin`` says where the value of a path came from (``"default"`` where it was not given),
    ``blame`` where to look when it is wrong or missing. ``unless_about``: contradictions only, and
    not those that mention one of these fields.
    """
    for detail in error.errors(include_url=False):
        parts = _field_path(detail["loc"])
        if detail["type"] == "conflict":
            for text in str(detail["ctx"]["text"]).split("; "):
                words = set(re.findall(r"[a-z_]+", text))
                below = (one[len(parts) :] for one in unless_about if one[: len(parts)] == parts)
                if not any(words & set(one) for one in below):
                    yield _contradiction(parts, text, origin, blame)
        elif not unless_about:
            message, value = _say(detail, parts)
            yield Problem(fields.dotted(parts) or "settings", message, blame(parts), value)


def find_wrong(error: ValidationError) -> list[tuple[str, ...]]:
    """The paths of the fields in a validation error that are wrong by themselves."""
    return [_field_path(one["loc"]) for one in error.errors() if one["type"] != "conflict"]


def find_name_conflicts(tree: Mapping[str, Any], origin: Origin) -> Iterator[Problem]:
    """Names that mean two pools, of a tree of plain values that may be wrong otherwise."""
    taken: dict[str, str] = {}
    pools = tree.get("pools")
    for index, pool in enumerate(pools if isinstance(pools, list) else ()):
        if not isinstance(pool, dict):
            continue
        names = [(f"pools.{index}.name", pool.get("name"))]
        for field in ("aliases", "adapters"):
            given = pool.get(field)
            names += [
                (f"pools.{index}.{field}.{number}", name)
                for number, name in enumerate(given if isinstance(given, list) else ())
            ]
        for path, name in names:
            if not isinstance(name, str):
                continue
            if name in taken:
                message = f"{name!r} is {taken[name]} too; a name means one pool"
                yield Problem(path, message, origin(path.split(".")))
            else:
                taken[name] = path


def find_workload_conflicts(
    pools: Sequence[PoolSettings], namespace: str | None, origin: Origin
) -> Iterator[Problem]:
    """Workloads of a cluster whose number two pools would write. ``namespace`` is that of pools
    which name none, if it is known."""
    taken: dict[tuple[str | None, ...], str] = {}
    for index, pool in enumerate(pools):
        given = pool.kubernetes
        if pool.backend == "kubernetes" and given.is_written:
            place = given.namespace or namespace
            workload = place, given.kind, given.name, given.worker_group
            first = taken.setdefault(workload, pool.name)
            if first != pool.name:
                path = f"pools.{index}.kubernetes.name"
                message = f"{given.kind} {given.name} is the workload of pool {first!r} already"
                yield Problem(path, message, origin(path.split(".")))


def _field_path(loc: Sequence[str | int]) -> tuple[str, ...]:
    """pydantic's location without what it adds for unions, keys and the like."""
    parts = tuple(str(part) for part in loc)
    for end in range(len(parts)):
        above = fields.find(parts[:end])
        if above is None or above.kind == "value":
            return parts[:end]
    return parts


def _contradiction(parts: tuple[str, ...], message: str, origin: Origin, blame: Origin) -> Problem:
    """A section's fields that contradict each other: it is laid to a field that was given."""
    section = fields.find(parts)
    names = section.fields if section is not None else {}
    mentioned = [word for word in re.findall(r"[a-z_]+", message) if word in names]
    given = [word for word in mentioned if origin((*parts, word)) != DEFAULT]
    source = origin((*parts, given[0])) if given else blame(parts)
    first, _, rest = message.partition(" ")
    if fields.find((*parts, *first.split("."))) is not None:
        return Problem(fields.dotted((*parts, *first.split("."))), rest, source)
    return Problem(fields.dotted(parts), message, source)


def _say(detail: ErrorDetails, parts: tuple[str, ...]) -> tuple[str, str | None]:
    """What is wrong, and the value where it is about that."""
    kind = detail["type"]
    if kind == "extra_forbidden":
        return f"is an unknown setting{fields.suggest(parts)}", None
    node = fields.find(parts)
    allowed = fields.describe(node) if node is not None else "something else"
    if kind == "missing":
        return f"is missing: it must be {allowed}", None
    value = detail["input"]
    shown = value.get(DATE, "{...}") if isinstance(value, dict) else show(value, parts)
    if parts and parts[-1].endswith("_env"):
        shown = HIDDEN  # the secret itself, where its variable's name belongs
    if len(shown) > SHOWN_CHARACTERS:
        shown = shown[: SHOWN_CHARACTERS - 3] + "..."
    if kind in OWN_WORDS:
        return detail["msg"].partition(", ")[2] or detail["msg"], shown
    return f"it must be {allowed}", shown


def show(value: Any, parts: Sequence[str] = ()) -> str:
    """A value as TOML writes it, on one line, without its secrets (``hide``)."""
    return _write(hide(value, parts))


def hide(value: Any, parts: Sequence[str]) -> Any:
    """A value of the field at this path without secrets: those in headers, environments and command
    lines, and users and queries of URLs wherever they stand."""
    name, above = (*parts[-1:], "")[0], (*parts[-2:-1], "")[0]
    if isinstance(value, dict):
        return {key: hide(one, (*parts, str(key))) for key, one in value.items()}
    if name in HIDDEN_TABLES or above in HIDDEN_TABLES | COMMAND_LINES:
        return HIDDEN
    if isinstance(value, list | tuple):
        if name in COMMAND_LINES and all(isinstance(one, str) for one in value):
            secrets = set(secret_arguments(value))
            return [HIDDEN if one in secrets else redact(one, secrets) for one in value]
        return [hide(one, (*parts, "0")) for one in value]
    if name in COMMAND_LINES:
        return HIDDEN
    return redact(value) if isinstance(value, str) else value


def _write(value: Any) -> str:
    """A value as TOML writes it, on one line."""
    if value is None:
        return "(unset)"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return fields.number(value) if value == value and abs(value) < 1e300 else str(value)
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_write, value)) + "]"
    if isinstance(value, dict):
        if not value:
            return "{}"
        inside = (f"{fields.key(str(name))} = {_write(one)}" for name, one in value.items())
        return "{ " + ", ".join(inside) + " }"
    return json.dumps(str(value), ensure_ascii=False)


def to_json(tree: Any) -> str:
    """A tree of TOML's values as JSON; dates become something that no setting takes."""
    return json.dumps(tree, default=lambda date: {DATE: str(date)})
