"""Reading a resource of another product, and what is said of each of its fields."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from autoscaler.settings import DNS_LABEL, DNS_NAME
from modelcache.refs import SECRET_NAME, redact

Object = dict[str, Any]
Outcome = Literal["kept", "changed", "not needed", "not supported"]

MOST_SHOWN = 60
MOST_OBJECTS = 10_000
SUFFIXES = {
    "": 1.0, "n": 1e-9, "u": 1e-6, "m": 1e-3,
    "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15,
    "Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40, "Pi": 2.0**50,
}  # fmt: skip
QUANTITY = re.compile(r"([0-9]{1,18}(?:\.[0-9]{1,9})?)(Ki|Mi|Gi|Ti|Pi|[numkMGTP]|)")


class InvalidResource(ValueError):
    """A resource that is not as its API says; the message names field, value and what may be."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MappedField:
    """What became of one field. ``became`` is the field here, or why there is none."""

    resource: str
    field: str
    value: str
    outcome: Outcome
    became: str


class Notes:
    """What became of the fields of one resource, in the order in which it is said."""

    def __init__(self, resource: str) -> None:
        self.resource = resource
        self.fields: list[MappedField] = []

    def add(self, field: str, value: Any, outcome: Outcome, became: str) -> None:
        """Say it of a field."""
        self.fields.append(
            MappedField(
                resource=self.resource,
                field=field,
                value=shown(field, value),
                outcome=outcome,
                became=became,
            )
        )


class Fields:
    """The fields of an object. Each is taken once; ``rest`` are those that were not taken.

    Raises ``InvalidResource`` for a field that is not of its type or range.
    """

    def __init__(self, value: Any, path: str) -> None:
        if not isinstance(value, Mapping):
            raise InvalidResource(f"{path or 'it'}: {shown(path, value)!r} is no object")
        self.path = path
        self._left = {str(name): one for name, one in value.items() if one is not None}

    def at(self, name: str) -> str:
        """The path of a field."""
        return f"{self.path}.{name}" if self.path else name

    def __contains__(self, name: str) -> bool:
        return name in self._left

    def take(self, name: str) -> Any:
        """A field as it is; ``None`` where there is none."""
        return self._left.pop(name, None)

    def text(self, name: str) -> str:
        """A text; empty where there is none."""
        value = self.take(name)
        if value is None:
            return ""
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            self._refuse(name, value, "a text")
        return str(value)

    def needed(self, name: str) -> str:
        """A text that has to be there."""
        value = self.text(name)
        if not value:
            raise InvalidResource(f"{self.at(name)}: it is missing")
        return value

    def whole(self, name: str, low: int, high: int) -> int | None:
        """A whole number within these."""
        value = self.take(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            self._refuse(name, value, f"a whole number from {low} to {high}")
        return int(value)

    def quantity(self, name: str) -> float | None:
        """A quantity as Kubernetes writes them (``10``, ``500m``, ``100Gi``)."""
        value = self.take(name)
        if value is None:
            return None
        found = None if isinstance(value, bool) else parse_quantity(str(value))
        if found is None:
            self._refuse(name, value, "a quantity such as 10, 500m or 100Gi")
        return found

    def part(self, name: str) -> Fields | None:
        """An object; ``None`` where there is none."""
        value = self.take(name)
        return None if value is None else Fields(value, self.at(name))

    def parts(self, name: str) -> list[Fields]:
        """A list of objects; empty where there is none."""
        value = self.take(name)
        if value is None:
            return []
        return [
            Fields(one, f"{self.at(name)}[{at}]") for at, one in enumerate(self._list(name, value))
        ]

    def texts(self, name: str) -> list[str]:
        """A list of texts, or one text; empty where there is none."""
        value = self.take(name)
        if value is None:
            return []
        if isinstance(value, str):
            return [value]
        return [str(one) for one in self._list(name, value)]

    def rest(self) -> Iterator[tuple[str, Any]]:
        """The paths and values of what was not taken, which are then taken."""
        left, self._left = self._left, {}
        for name, value in left.items():
            yield self.at(name), value

    def _list(self, name: str, value: Any) -> Sequence[Any]:
        if not isinstance(value, list) or len(value) > MOST_OBJECTS:
            self._refuse(name, value, "a list")
        return list(value)

    def _refuse(self, name: str, value: Any, wanted: str) -> None:
        raise InvalidResource(f"{self.at(name)}: {shown(name, value)!r} is not {wanted}")


def parse_quantity(text: str) -> float | None:
    """A quantity of Kubernetes; ``None`` where it is none."""
    found = QUANTITY.fullmatch(text.strip())
    return None if found is None else float(found[1]) * SUFFIXES[found[2]]


def shown(field: str, value: Any) -> str:
    """A value in a few characters, without what is secret."""
    if SECRET_NAME.search(field.rpartition(".")[2]) and not isinstance(value, Mapping | list):
        return "…"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return f"{{{', '.join(str(name) for name in list(value)[:6])}}}"[:MOST_SHOWN]
    if isinstance(value, list):
        return ", ".join(shown("", one) for one in value[:6])[:MOST_SHOWN]
    text = redact(" ".join(str(value).split()))
    return text if len(text) <= MOST_SHOWN else f"{text[: MOST_SHOWN - 1]}…"


def unpack(documents: Sequence[Any]) -> list[Object]:
    """The resources of a file's documents: lists are their items. Raises ``InvalidResource``."""
    found: list[Object] = []
    for number, one in enumerate(documents, 1):
        if one is None:
            continue
        where = f"document {number}"
        if not isinstance(one, dict) or not isinstance(one.get("kind"), str):
            raise InvalidResource(f"{where}: it is no resource: it has no kind")
        items = one.get("items")
        if one["kind"].endswith("List") and isinstance(items, list):
            kind = one["kind"].removesuffix("List")
            # The items of a typed list may leave out what the list says.
            given = {"apiVersion": one.get("apiVersion"), "kind": kind} if kind else {}
            found += unpack([{**given, **item} if isinstance(item, dict) else 0 for item in items])
        else:
            found.append(one)
        if len(found) > MOST_OBJECTS:
            raise InvalidResource(f"it has more than {MOST_OBJECTS} resources")
    return found


def group_of(found: Object) -> str:
    """The API group of a resource."""
    return str(found.get("apiVersion") or "").partition("/")[0]


def describe(found: Object) -> str:
    """A resource by its kind and name."""
    metadata = found.get("metadata")
    name = metadata.get("name") if isinstance(metadata, dict) else None
    return f"{found.get('kind')}/{name or '?'}"


def take_metadata(found: Object, notes: Notes) -> tuple[str, str]:
    """Name and namespace of a resource (empty where it has none); what else it has is not said."""
    metadata = Fields(found.get("metadata") or {}, "metadata")
    name, namespace = metadata.needed("name"), metadata.text("namespace")
    if len(name) > 253 or not re.match(DNS_NAME, name):
        raise InvalidResource(f"metadata.name: {name[:60]!r} is no name of an object")
    if namespace and (len(namespace) > 63 or not re.match(DNS_LABEL, namespace)):
        raise InvalidResource(f"metadata.namespace: {namespace[:60]!r} is no name of a namespace")
    for field in ("labels", "annotations"):
        if value := metadata.take(field):
            notes.add(metadata.at(field), value, "not needed", "nothing here reads them")
    if found.get("status"):
        notes.add("status", found["status"], "not needed", "it says what was, not what is wanted")
    return name, namespace
