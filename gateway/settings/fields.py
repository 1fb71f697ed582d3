"""The tree of settings as data: which field is where, what it allows, and how text becomes it.

Everything is read off the JSON schema that pydantic makes of ``Settings``, so that a field added to
any package's section is loaded, explained and suggested without a line here.
"""

from __future__ import annotations

import ast
import difflib
import inspect
import json
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from types import ModuleType
from typing import Any, Literal

from autoscaler.settings import DNS_LABEL, DNS_NAME
from gateway.settings.schema import Settings

Kind = Literal["section", "table", "list", "value"]
Parts = tuple[str, ...]

UNSET_WORDS = frozenset({"", "none", "null", "unset"})
TRUE_WORDS = frozenset({"true", "1", "yes", "on"})
FALSE_WORDS = frozenset({"false", "0", "no", "off"})
BARE_KEY = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_-")


@cache
def _document() -> dict[str, Any]:
    return Settings.model_json_schema()


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """One place in the tree: its schema, with references followed and ``null`` taken apart."""

    schema: dict[str, Any]
    optional: bool = False

    @property
    def kind(self) -> Kind:
        """``section`` has named fields, ``table`` free keys, ``list`` elements, ``value`` none."""
        if "properties" in self.schema:
            return "section"
        if self.schema.get("type") == "object":
            return "table"
        if self.schema.get("type") == "array":
            return "list"
        return "value"

    @property
    def fields(self) -> dict[str, Node]:
        """The fields of a section by name, in the order they were written; else empty."""
        return {name: _node(sub) for name, sub in self.schema.get("properties", {}).items()}

    @property
    def element(self) -> Node:
        """What a list holds, or the values of a table."""
        key = "items" if self.kind == "list" else "additionalProperties"
        sub = self.schema.get(key) or next(iter(self._by_pattern.values()), None)
        return _node(sub if isinstance(sub, dict) else {})

    @property
    def key_pattern(self) -> str:
        """The pattern that the keys of a table have to match; empty where any may be used."""
        return next(iter(self._by_pattern), "")

    @property
    def _by_pattern(self) -> dict[str, Any]:
        found: dict[str, Any] = self.schema.get("patternProperties", {})
        return found

    @property
    def is_path(self) -> bool:
        """Whether the value is a path of the file system."""
        return self.schema.get("format") in {"path", "file-path", "directory-path"}

    def child(self, part: str) -> Node | None:
        """The place one step down, ``None`` where there is none."""
        if self.kind == "section":
            return self.fields.get(part)
        if self.kind == "table" or (self.kind == "list" and is_index(part)):
            return self.element
        return None


def _node(schema: dict[str, Any]) -> Node:
    optional = False
    for _ in range(16):
        if "$ref" in schema:
            schema = _document()["$defs"][schema["$ref"].rsplit("/", 1)[1]]
        elif len(schema.get("allOf", ())) == 1:
            schema = schema["allOf"][0]
        elif any(choice.get("type") == "null" for choice in schema.get("anyOf", ())):
            optional = True
            rest = [choice for choice in schema["anyOf"] if choice.get("type") != "null"]
            schema = rest[0] if len(rest) == 1 else {"anyOf": rest}
        else:
            break
    return Node(schema=schema, optional=optional)


def root() -> Node:
    """The whole tree."""
    return _node(_document())


def find(parts: Sequence[str]) -> Node | None:
    """The place with this path, ``None`` where there is none."""
    node: Node | None = root()
    for part in parts:
        node = node.child(part) if node is not None else None
    return node


@cache
def docstrings(module: ModuleType) -> dict[str, dict[str, str]]:
    """The text below each field of a module's models, inherited ones too, by class and field.

    Read from the source where a document is made of it: pydantic's ``use_attribute_docstrings``
    reads it for every class at import, which is a tenth of the time of a start.
    """
    found: dict[str, dict[str, str]] = {}
    for node in ast.parse(inspect.getsource(module)).body:
        if not isinstance(node, ast.ClassDef):
            continue
        fields = found[node.name] = {}
        for base in node.bases:
            fields |= found.get(ast.unparse(base), {})
        for field, text in pairwise(node.body):
            match field, text:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(
                    value=ast.Constant(value=str(said))
                ):
                    fields[name] = inspect.cleandoc(said)
    return found


def is_index(part: str) -> bool:
    """Whether a part of a path is an element's number, written the one way there is."""
    return part.isascii() and part.isdigit() and (part == "0" or part[0] != "0")


def dotted(parts: Sequence[str | int]) -> str:
    """A path as people write it: ``pools.0.name``; parts with a dot in them are quoted."""
    return ".".join(key(str(part)) for part in parts)


def key(name: str) -> str:
    """A TOML key: bare where TOML allows it, quoted otherwise."""
    return name if name and set(name) <= BARE_KEY else json.dumps(name, ensure_ascii=False)


def walk(node: Node, parts: Parts = ()) -> Iterator[tuple[Parts, Node]]:
    """Every field below a section, depth first; the elements of a list of sections under ``*``."""
    for name, field in node.fields.items():
        here = (*parts, name)
        yield here, field
        if field.kind == "section":
            yield from walk(field, here)
        elif field.kind == "list" and field.element.kind == "section":
            yield from walk(field.element, (*here, "*"))


def suggest(parts: Sequence[str]) -> str:
    """What an unknown path was probably meant to be, as ``; did you mean ...?``, or nothing.

    Likeness of spelling is no likeness of meaning, so the less of it there is, the later it counts:
    a sibling that is spelled nearly the same, siblings with all of its words, fields of the same
    name elsewhere, a sibling that is spelled alike, one elsewhere that is nearly the same.
    """
    above, name = parts[:-1], parts[-1].lower().replace("-", "_")
    parent = find(above)
    siblings = list(parent.fields) if parent is not None else []
    near = {dotted([*above, one]): one for one in siblings}
    far = {
        ".".join("N" if one == "*" else one for one in path): path[-1]
        for path, _ in walk(root())
        if path[:-1] != tuple(above)
    }
    meant = (
        _alike(name, near, 0.9)
        or [path for path, one in near.items() if _words(name) <= _words(one)]
        or _nearest_root([path for path, one in far.items() if one == name])
        or _alike(name, near, 0.75)
        or [path for path, one in far.items() if _without_unit(one) == name]
        or _alike(name, far, 0.9)
    )
    if meant:
        return f"; did you mean {' or '.join(meant[:3])}?"
    return f"; known here: {', '.join(siblings)}" if siblings and len(siblings) <= 12 else ""


def _nearest_root(paths: list[str]) -> list[str]:
    """Without those that lie in a list below another of them: a pool's, not its schedules'."""
    least = min((path.count(".N.") for path in paths), default=0)
    return [path for path in paths if path.count(".N.") <= max(1, least)]


_UNITS = frozenset({"s", "bytes", "tokens", "fraction"})


def _alike(name: str, fields: Mapping[str, str], likeness: float) -> list[str]:
    """The paths of the fields whose name is spelled most like this one."""
    best = difflib.get_close_matches(name, sorted(set(fields.values())), n=1, cutoff=likeness)
    return [path for path, one in fields.items() if best and one == best[0]]


def _words(name: str) -> frozenset[str]:
    """The words of a field's name, without its unit."""
    return frozenset(_without_unit(name).split("_"))


def _without_unit(name: str) -> str:
    stem, _, unit = name.rpartition("_")
    return stem if unit in _UNITS else name.removesuffix("s")


def describe(node: Node) -> str:
    """What a field allows, to be read after "must be": ``an integer from 0 to 65535``."""
    text = _describe(node)
    return f"{text}, or unset" if node.optional else text


def _describe(node: Node) -> str:
    schema = node.schema
    if "anyOf" in schema:
        return " or ".join(_describe(_node(choice)) for choice in schema["anyOf"])
    if "enum" in schema:
        return "one of " + ", ".join(json.dumps(choice) for choice in schema["enum"])
    if "const" in schema:
        return json.dumps(schema["const"])
    if node.kind == "section":
        return "a table"
    if node.kind == "table":
        keys = f" each key {PATTERNS[node.key_pattern]}," if node.key_pattern else ""
        return f"a table,{keys} each value {_describe(node.element)}"
    if node.kind == "list":
        most = f" of at most {number(schema['maxItems'])}" if "maxItems" in schema else ""
        return f"a list{most}, each {_describe(node.element)}"
    match schema.get("type"):
        case "boolean":
            return "true or false"
        case "integer" | "number" as kind:
            return ("an integer" if kind == "integer" else "a number") + _range(schema)
        case "string" if node.is_path:
            return "a path"
        case "string":
            return PATTERNS.get(schema.get("pattern", ""), "text{}").format(_length(schema))
    return "a value"


def _range(schema: dict[str, Any]) -> str:
    low, above = schema.get("minimum"), schema.get("exclusiveMinimum")
    high, below = schema.get("maximum"), schema.get("exclusiveMaximum")
    if low is not None and high is not None:
        return f" from {number(low)} to {number(high)}"
    bounds = []
    if low is not None:
        bounds.append(f"at least {number(low)}")
    if above is not None:
        bounds.append(f"above {number(above)}")
    if high is not None:
        bounds.append(f"at most {number(high)}")
    if below is not None:
        bounds.append(f"below {number(below)}")
    return f" {' and '.join(bounds)}" if bounds else ""


PATTERNS = {
    r"^https?://[^\s/@?#]+$": "a URL like http://host:port, without user, path or final /",
    r"^http://[^\s/@?#:\[\]]+(:[0-9]{1,5})?$": "a URL like http://name:port, without user, path or "
    "final /",
    r"^(wss?://[\x21-\x7e]+)?$": "a URL like ws://host:port, or nothing",
    r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$": "a name of small letters, digits, dots and hyphens",
    r"^(/[A-Za-z0-9._~-]+)+$": "a path such as /v1/videos",
    r"^!?[^!/\s][^\s]*$": "a pattern of file names{}, without white space or a leading /",
    r"^[0-9a-f]{32}$": "32 digits 0 to f",
    r"^[0-9a-f]{64}$": "a SHA-256 of 64 digits 0 to f",
    r"^[^/].*$": "text{} that does not begin with /",
    r"^[^\s\x00-\x1f\x7f]+$": "text{} without white space",
    r"^[A-Za-z_][A-Za-z0-9_]*$": "the name of an environment variable",
    r"^([a-z0-9]+://|/)[^\s?#@]*$": "the beginning of a model's URL, or a path that begins with /",
    r"^/[\x21-\x7e]*$": "a path that begins with /, without white space",
    DNS_LABEL: "a name{} of small letters, digits and -",
    DNS_NAME: "a name{} of small letters, digits, - and .",
    r"^([a-z0-9.-]+/)?v[a-z0-9]+$": "a group and version, such as apps/v1",
    r"^[A-Z][A-Za-z0-9]*$": "a kind, such as Deployment",
}
"""What a pattern of the settings asks for, in words; the braces are for its length."""


def _length(schema: dict[str, Any]) -> str:
    low, high = schema.get("minLength", 0), schema.get("maxLength")
    if high is not None:
        return f" of {low} to {number(high)} characters"
    return " (not empty)" if low == 1 else ""


def number(value: float) -> str:
    """A number as TOML reads it, with its thousands apart where there are many."""
    if isinstance(value, int) or value.is_integer():
        whole = int(value)
        return f"{whole:_}" if abs(whole) >= 100_000 else str(whole)
    return repr(value)


def parse(node: Node, text: str) -> Any:
    """The value that text from an environment variable or ``--set`` stands for.

    Text that cannot be it is returned unchanged, for validation to name it with what is allowed.
    ``ValueError`` where the text is meant as a list or table and cannot be read as one.
    """
    text = text.strip()
    if node.optional and text.lower() in UNSET_WORDS:
        return None
    if node.kind == "list":
        if text.startswith("["):
            return literal(text)
        items = [item for item in text.split(",") if item.strip()]
        return [parse(node.element, item) for item in items]
    if node.kind in {"section", "table"}:
        return literal(text)
    match node.schema.get("type"):
        case "boolean":
            return _boolean(text)
        case "integer" | "number":
            return _number(text)
    return text


def literal(text: str) -> Any:
    """A list or table written as TOML or as JSON; ``ValueError`` where it is neither."""
    if "\n" not in text:
        try:
            return tomllib.loads(f"value = {text}")["value"]
        except (ValueError, RecursionError):
            pass  # JSON is tried next; both failing is the error below
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError("cannot be read as TOML or JSON") from None


def _boolean(text: str) -> bool | str:
    if text.lower() in TRUE_WORDS:
        return True
    return False if text.lower() in FALSE_WORDS else text


def _number(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
