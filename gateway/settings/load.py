"""Settings from their four layers, each value with where it came from.

Precedence, weakest first: the defaults in the code; the built-in pool of ``tidegate up`` where
nothing else names one; the file (TOML); the environment (``TIDEGATE__GATEWAY__PORT``); ``--set
gateway.port=8000``; a flag of its own such as ``--port``.

What every layer shares:

- A list replaces the list of the layer below, except that one element is reached by its index
  (``pools.0.max_replicas``, ``TIDEGATE__POOLS__0__MAX_REPLICAS``) or, in ``--set``, by the pool's
  name (``pools.chat.max_replicas``). The index after the last adds an element.
- A relative path in a file is relative to that file; in the environment, in ``--set`` and in the
  defaults it is relative to the working directory. A pool's ``model`` is a path where it begins
  with ``/``, ``.`` or ``~/``: otherwise it is a name for the engine, which may well look like one.
- A field of the table of a pool's backend may stand in the pool itself (``urls = [...]``).
- Values from the environment and ``--set`` are text: lists as ``a,b`` or ``["a", "b"]``, tables as
  TOML or JSON, ``none`` to unset what can be unset. A file's values have their type: no
  ``"8000"`` for 8000.

Everything wrong is found before anything starts and raised together, one line for each problem.
"""

from __future__ import annotations

import copy
import os
import re
import tomllib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from autoscaler.settings import BackendName
from gateway.settings import errors, fields, toml
from gateway.settings.errors import DEFAULT, Problem
from gateway.settings.schema import Settings, find_warnings, through_cache
from modelcache.refs import redact

ENV_PREFIX = "TIDEGATE__"
OUR_PREFIX = "TIDEGATE_"
MAX_FILE_BYTES = 4_194_304
"""A settings file is text that people write; what is larger was named by mistake."""

BUILT_IN = "built in"
"""The origin of a value that Tidegate brings where no layer says anything."""

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

SERVICE_LINK = re.compile(
    r"(?P<service>.+?)_(SERVICE_HOST|SERVICE_PORT(_.+)?"
    r"|PORT(_[0-9]+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)?)"
)
SERVICE_URLS = ("tcp://", "udp://", "sctp://")
"""What Kubernetes puts into each container for each service: ``VLLM_PORT=tcp://10.0.0.1:80`` and
more for one that is called ``vllm``."""

Parts = tuple[str, ...]


class ConfigError(Exception):
    """The settings cannot be used. ``problems`` says why, one line each; nothing was started.
    ``rest`` are the settings without what is wrong, to look for more; ``None`` where too much is.
    """

    def __init__(self, found: Sequence[Problem], rest: LoadedSettings | None = None) -> None:
        self.problems = tuple(found)
        self.rest = rest
        super().__init__("\n".join(str(problem) for problem in found))


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedSettings:
    """Settings that can be used, and where each value came from.

    ``origins`` has one entry for every field (``pools.0.model``), ``"default"`` where nothing was
    said. ``path`` is the file that was read, ``None`` without one. ``warnings`` are allowed, but
    probably not meant.
    """

    settings: Settings
    origins: Mapping[str, str]
    path: Path | None = None
    warnings: tuple[Problem, ...] = ()


@dataclass(frozen=True, slots=True)
class Flag:
    """A value given by a command line flag of its own; ``flag`` is how it was spelled."""

    field: str
    value: Any
    flag: str


def load(
    path: Path | None,
    environ: Mapping[str, str],
    overrides: Sequence[str] = (),
    *,
    base: Mapping[str, Any] | None = None,
    flags: Sequence[Flag] = (),
) -> LoadedSettings:
    """Settings from ``path`` (none: no file), the environment and ``dotted.field=value`` texts.

    ``base`` is laid under the file, over the defaults. Raises ``ConfigError`` with everything that
    is wrong, a file that cannot be read included.
    """
    try:
        return _load(path, environ, overrides, base, flags)
    except RecursionError:
        where = "settings" if path is None else str(path)
        raise ConfigError([Problem("", "is nested too deeply to be settings", where)]) from None


def _load(
    path: Path | None,
    environ: Mapping[str, str],
    overrides: Sequence[str],
    base: Mapping[str, Any] | None,
    flags: Sequence[Flag],
) -> LoadedSettings:
    draft = _Draft()
    draft.merge((), dict(base or {}), BUILT_IN)
    if path is not None:
        _read_file(draft, path)
        if draft.found:  # what the other layers say of its lists cannot be judged without it
            raise ConfigError(draft.found)
    _read_environment(draft, environ)
    for text in overrides:
        _read_override(draft, text)
    for flag in flags:
        draft.merge(tuple(flag.field.split(".")), flag.value, flag.flag)
    loaded = draft.finish(path)
    named = [key for pool in loaded.settings.pools if (key := pool.static.api_key_env) is not None]
    named.append(loaded.settings.modelcache.peer_token_env)
    return replace(loaded, warnings=(*loaded.warnings, *find_misnamed(environ, named)))


@dataclass(slots=True)
class _Draft:
    """The layers so far: one tree of plain values, and the origin of each of them."""

    tree: dict[str, Any] = field(default_factory=dict)
    origins: dict[Parts, str] = field(default_factory=dict)
    found: list[Problem] = field(default_factory=list)

    def merge(self, parts: Parts, value: Any, origin: str | _FileOrigin) -> None:
        """Lay a value over the tree: sections field by field, everything else whole."""
        node = fields.find(parts)
        if isinstance(value, dict) and node is not None and node.kind == "section":
            for name, below in value.items():
                self.merge((*parts, name), below, origin)
            if value or not parts:
                return
        if node is not None:
            anchor = origin.path.parent if isinstance(origin, _FileOrigin) else None
            value = _place(node, parts, value, anchor)
        try:
            self._put(parts, value)
        except _NoPlace as error:
            self.found.append(Problem(fields.dotted(parts), str(error), str(origin)))
            return
        for known in [known for known in self.origins if known[: len(parts)] == parts]:
            del self.origins[known]
        for below in _paths(value, parts):
            self.origins[below] = (
                origin.of(below) if isinstance(origin, _FileOrigin) else str(origin)
            )

    def _put(self, parts: Parts, value: Any) -> None:
        here: Any = self.tree
        for depth, (part, after) in enumerate(zip(parts, (*parts[1:], None), strict=True)):
            new: Any = value
            if after is not None:
                below = fields.find(parts[: depth + 1])
                new = [] if below is not None and below.kind == "list" else {}
            if isinstance(here, list):
                index = int(part)
                if index > len(here):
                    raise _NoPlace(f"is past the end: the next index is {len(here)}")
                if index == len(here):
                    here.append(new)
                elif after is None:
                    here[index] = new
                here = here[index]
            elif isinstance(here, dict):
                if after is None or part not in here:
                    here[part] = new
                here = here[part]
            else:
                raise _NoPlace("is below something that was given as a single value")

    def origin(self, parts: Sequence[str]) -> str:
        """Where a value came from: its own origin, or the newest of what is in it."""
        here = tuple(parts)
        if here in self.origins:
            return self.origins[here]
        below = [origin for path, origin in self.origins.items() if path[: len(here)] == here]
        return below[-1] if below and here else DEFAULT

    def blame(self, parts: Sequence[str]) -> str:
        """Where to look for what is wrong with a field: its origin, or the closest above it."""
        for end in range(len(parts), 0, -1):
            origin = self.origin(parts[:end])
            if origin != DEFAULT and (end == len(parts) or tuple(parts[:end]) in self.origins):
                return origin
        return DEFAULT

    def finish(self, path: Path | None) -> LoadedSettings:
        """The settings, or ``ConfigError`` with every problem of every layer."""
        settings: Settings | None = None
        rest: Settings | None = None
        try:
            settings = rest = _validate(self.tree)
        except ValidationError as error:
            self.found += errors.explain(error, self.origin, self.blame)
            rest = self._without(error)
        self.found += errors.find_name_conflicts(self.tree, self.origin)
        if settings is not None:
            self.found += errors.find_workload_conflicts(
                settings.pools, settings.kubernetes.namespace, self.origin
            )
        if settings is None or self.found:
            found = list(dict.fromkeys(self.found))
            raise ConfigError(found, None if rest is None else self._loaded(rest, path))
        return self._loaded(settings, path)

    def _without(self, error: ValidationError) -> Settings | None:
        """The settings without what is wrong, to find what else is: pydantic looks for the
        contradictions of a section only where each of its fields is right."""
        tree = copy.deepcopy(self.tree)
        wrong = errors.find_wrong(error)
        for parts in wrong:
            _drop(tree, parts)
        try:
            _validate(tree)
        except ValidationError as more:
            self.found += errors.explain(more, self.origin, self.blame, unless_about=wrong)
        try:
            return _validate(tree, context="contradictions are known")
        except ValidationError:
            return None

    def _loaded(self, settings: Settings, path: Path | None) -> LoadedSettings:
        settings = through_cache(settings)
        return LoadedSettings(
            settings=settings,
            origins={fields.dotted(parts): self.origin(parts) for parts, _ in leaves(settings)},
            path=path,
            warnings=tuple(
                Problem(name, message, self.origin(name.split(".")))
                for name, message in find_warnings(settings)
            ),
        )


def _validate(tree: dict[str, Any], context: str | None = None) -> Settings:
    return Settings.model_validate_json(errors.to_json(tree), strict=True, context=context)


def _drop(tree: dict[str, Any], parts: Parts) -> None:
    """Take a field out; of a list of values the whole list, since it means nothing without one."""
    here: Any = tree
    for depth, part in enumerate(parts):
        node = fields.find(parts[: depth + 1])
        last = depth == len(parts) - 1 or node is None or node.kind != "section"
        if isinstance(here, list) and part.isdecimal() and int(part) < len(here):
            here = here[int(part)]
        elif isinstance(here, dict) and part in here:
            if last and not (node is not None and node.element.kind == "section"):
                del here[part]
                return
            here = here[part]


class _NoPlace(Exception):
    """A path that leads nowhere in the tree as it is; the message says why."""


def leaves(settings: BaseModel, above: Parts = ()) -> Iterator[tuple[Parts, Any]]:
    """Every single value of the tree with its path; elements of lists of sections by index."""
    for name in type(settings).model_fields:
        value = getattr(settings, name)
        here = (*above, name)
        if isinstance(value, BaseModel):
            yield from leaves(value, here)
        elif isinstance(value, tuple) and any(isinstance(one, BaseModel) for one in value):
            for index, one in enumerate(value):
                yield from leaves(one, (*here, str(index)))
        else:
            yield here, value


def _paths(value: Any, parts: Parts) -> Iterator[Parts]:
    """A value's own path and those of everything in it."""
    yield parts
    if isinstance(value, dict):
        for name, below in value.items():
            yield from _paths(below, (*parts, name))
    elif isinstance(value, list):
        for index, below in enumerate(value):
            yield from _paths(below, (*parts, str(index)))


def _place(node: fields.Node, parts: Parts, value: Any, anchor: Path | None) -> Any:
    """A value with the paths in it made to mean the same from the working directory."""
    if isinstance(value, dict):
        return {
            name: _place(below, (*parts, name), one, anchor)
            if (below := node.child(name)) is not None
            else one
            for name, one in value.items()
        }
    if isinstance(value, list) and node.kind == "list":
        return [
            _place(node.element, (*parts, str(index)), one, anchor)
            for index, one in enumerate(value)
        ]
    if not isinstance(value, str) or "\0" in value:
        return value
    if node.is_path and value:
        return str((anchor or Path()) / Path(value).expanduser())
    if parts[0] == "pools" and parts[-1] == "model" and value.startswith((".", "~/")):
        return os.path.abspath((anchor or Path()) / Path(value).expanduser())
    return value


# ── The file ──────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True, kw_only=True)
class _FileOrigin:
    """A file, and on which line each of its keys stands."""

    path: Path
    lines: dict[Parts, int]

    def of(self, parts: Parts) -> str:
        line = toml.nearest(self.lines, parts)
        return str(self.path) if line is None else f"{self.path}, line {line}"

    def __str__(self) -> str:
        return str(self.path)


def _read_file(draft: _Draft, path: Path) -> None:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
        if len(data) > MAX_FILE_BYTES:
            raise ValueError(
                f"is larger than {MAX_FILE_BYTES} bytes, so it is an unknown settings file"
            )
        text = data.decode("utf-8-sig")
        tree = tomllib.loads(text)
    except OSError as error:
        draft.found.append(Problem("", f"cannot be read: {error.strerror or error}", str(path)))
    except UnicodeDecodeError:
        draft.found.append(Problem("", "is not UTF-8 text", str(path)))
    except tomllib.TOMLDecodeError as error:
        draft.found.append(Problem("", f"is not valid TOML: {error}", str(path)))
    except (ValueError, RecursionError) as error:
        draft.found.append(Problem("", str(error), str(path)))
    else:
        for pool in pools if isinstance(pools := tree.get("pools"), list) else ():
            _lengthen(pool)
        lines = toml.locate(text)
        lines = {_long(parts): line for parts, line in lines.items()} | lines
        draft.merge((), tree, _FileOrigin(path=path, lines=lines))


def _lengthen(pool: Any) -> None:
    """Move a pool's fields in short form to the table that they belong to."""
    for name in list(pool) if isinstance(pool, dict) else ():
        *table, name_below = _long(("pools", "0", name))[2:]
        below = pool.setdefault(table[0], {}) if table else None
        if isinstance(below, dict) and name_below not in below:
            below[name_below] = pool.pop(name)


def _long(parts: Parts) -> Parts:
    """The whole path of a setting. The fields of a pool's backend may be written without the name
    of their table: a pool has one backend, and no name is in two tables."""
    if len(parts) > 2 and parts[0] == "pools" and not fields.find(("pools", "0", parts[2])):
        for backend in get_args(BackendName):
            if fields.find(("pools", "0", backend, parts[2])):
                return (*parts[:2], backend, *parts[2:])
    return parts


# ── Environment and --set ─────────────────────────────────────────────────────────────────────────


def _read_environment(draft: _Draft, environ: Mapping[str, str]) -> None:
    links = find_service_links(environ)
    names = [name for name in environ if name.startswith(ENV_PREFIX) and name not in links]
    # Sections before what is in them, and elements in the order of their index.
    for name in sorted(names, key=_env_order):
        parts = tuple(name.removeprefix(ENV_PREFIX).split("__"))
        _assign(draft, _lowered(parts), environ[name], f"environment {name}")


def _env_order(name: str) -> list[tuple[int, str]]:
    return [(int(part) if fields.is_index(part) else -1, part) for part in name.split("__")]


def _lowered(parts: Parts) -> Parts:
    """Names of fields in lower case, keys of free tables as they are."""
    result: Parts = ()
    for part in parts:
        above = fields.find(result)
        free = above is not None and above.kind == "table"
        result = (*result, part if free else part.lower())
    return result


def find_service_links(environ: Mapping[str, str]) -> set[str]:
    """The variables by which Kubernetes tells of the services of a namespace: named after
    services, they may be called like anything, and are not meant for Tidegate."""
    found = set()
    for name, value in environ.items():
        link = SERVICE_LINK.fullmatch(name)
        if link is not None:
            service = link["service"]
            known = f"{service}_SERVICE_HOST" in environ and name != f"{service}_PORT"
            if known or value.startswith(SERVICE_URLS):
                found.add(name)
    return found


def find_misnamed(environ: Mapping[str, str], named: Collection[str]) -> Iterator[Problem]:
    """A warning for each variable that is not read and was probably meant as a setting: one
    underscore where two belong.

    ``named`` are variables that the settings themselves name, for keys and secrets.
    """
    links = find_service_links(environ)
    for name in sorted(environ):
        ours = name in OURS or name in named or name in links
        if ours or not name.startswith(OUR_PREFIX) or name.startswith(ENV_PREFIX):
            continue
        meant = _meant(name.removeprefix(OUR_PREFIX))
        if meant is not None:
            message = f"is not read; {meant}, with two underscores, is probably meant"
            yield Problem("", message, f"environment {name}")


def _meant(tail: str) -> str | None:
    """The variable of the setting that a name without its prefix stands for: all of its path, or
    the last part where only one setting ends so, or only one of the nearest to the root."""
    words = re.sub(r"_+", "_", tail).lower()
    ends = []
    for path, _ in fields.walk(fields.root()):
        pattern = "_".join("([0-9]+)" if part == "*" else part for part in path)
        found = re.fullmatch(pattern, words)
        if found is not None:
            return _variable(path, *found.groups())
        if path[-1] == words:
            ends.append(path)
    ends = [path for path in ends if len(path) == min(map(len, ends))]
    return _variable(ends[0]) if len(ends) == 1 else None


def _variable(path: Parts, index: str = "0") -> str:
    return ENV_PREFIX + "__".join(index if part == "*" else part for part in path).upper()


def _read_override(draft: _Draft, text: str) -> None:
    name, equals, value = text.partition("=")
    # Words of the whole: the value may be a table with such a field in it.
    may_tell = errors.HIDDEN_TABLES.union(errors.COMMAND_LINES).isdisjoint(re.findall(r"\w+", text))
    shown = redact(text) if may_tell else f"{name}=..."
    origin = f"--set {shown}" if len(shown) <= 60 else f"--set {shown[:57]}..."
    try:
        if not equals:
            raise ValueError
        parts = toml.split_key(name)
    except ValueError:
        draft.found.append(Problem("", "is not of the form section.field=value", origin))
        return
    _assign(draft, _indexed(draft, parts), value, origin)


def _indexed(draft: _Draft, parts: Parts) -> Parts:
    """A pool named by its name as its index."""
    if len(parts) > 2 and parts[0] == "pools" and not fields.is_index(parts[1]):
        for index, pool in enumerate(draft.tree.get("pools", [])):
            if isinstance(pool, dict) and pool.get("name") == parts[1]:
                return ("pools", str(index), *parts[2:])
    return parts


def _assign(draft: _Draft, parts: Parts, text: str, origin: str) -> None:
    """Lay text over the tree as the value it stands for, or note why it cannot be."""
    parts = _long(parts)
    name = fields.dotted(parts)
    node = fields.find(parts)
    if node is None:
        draft.found.append(Problem(name, _why_unknown(draft, parts), origin))
        return
    try:
        text.encode("utf-8")  # what the system could not decode comes as lone surrogates
        value = fields.parse(node, text)
    except UnicodeEncodeError:
        draft.found.append(Problem(name, "is not UTF-8 text", origin))
        return
    except ValueError as error:
        message = f"{error}; it must be {fields.describe(node)}"
        draft.found.append(Problem(name, message, origin))
        return
    draft.merge(parts, value, origin)


def _why_unknown(draft: _Draft, parts: Parts) -> str:
    for end in range(1, len(parts)):
        above = fields.find(parts[:end])
        if above is None:
            return f"is an unknown setting{fields.suggest(parts[:end])}"
        if above.kind == "value":
            return f"is an unknown setting: {fields.dotted(parts[:end])} is a single value"
        if above.kind == "list" and not fields.is_index(parts[end]):
            given = draft.tree.get("pools", []) if parts[:end] == ("pools",) else []
            names = [str(one["name"]) for one in given if isinstance(one, dict) and "name" in one]
            known = f"; the pools are {', '.join(names)}" if names else ""
            return (
                f"is an unknown setting: {fields.dotted(parts[:end])} takes an index from 0{known}"
            )
    return f"is an unknown setting{fields.suggest(parts)}"
