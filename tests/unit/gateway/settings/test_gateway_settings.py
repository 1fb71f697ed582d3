"""The tree of settings itself: defaults, contradictions, and that every field is explained."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
from pydantic import BaseModel, ValidationError

from gateway.datapath.settings import GatewaySettings, HoldingSettings
from gateway.settings import fields
from gateway.settings.fields import docstrings
from gateway.settings.load import ConfigError, load
from gateway.settings.schema import Settings, find_warnings, is_loopback

POOL = {"name": "a", "engine": "simulated", "model": "a"}


def test_defaults_are_usable_and_quiet() -> None:
    settings = Settings()
    assert settings.gateway.holding == HoldingSettings()
    assert settings.gateway.port != settings.gateway.admin_port


def test_settings_are_frozen_all_the_way_down() -> None:
    settings = Settings.model_validate({"pools": [POOL]})
    for section, name in (
        (settings, "state_dir"),
        (settings.gateway, "port"),
        (settings.gateway.holding, "max_requests"),
        (settings.router, "learning_rate"),
        (settings.autoscaler, "tick_s"),
        (settings.loaders, "engine_python"),
        (settings.pools[0], "name"),
    ):
        with pytest.raises(ValidationError):
            setattr(section, name, getattr(section, name))


@pytest.mark.parametrize(
    "path", ["", "gateway", "gateway.holding", "router", "autoscaler", "pools.0"]
)
def test_unknown_fields_are_forbidden_everywhere(path: str) -> None:
    tree: dict = {"pools": [dict(POOL)]}
    here = tree
    for part in path.split(".") if path else []:
        here = here[int(part)] if part.isdigit() else here.setdefault(part, {})
    here["no_such_field"] = 1
    with pytest.raises(ValidationError, match="no_such_field"):
        Settings.model_validate(tree)


def test_every_field_says_what_it_means() -> None:
    def sections(value: object) -> Iterator[BaseModel]:
        if isinstance(value, BaseModel):
            yield value
            value = tuple(dict(value).values())
        for one in value if isinstance(value, tuple) else ():
            yield from sections(one)

    settings = Settings.model_validate({"pools": [POOL]})
    silent, count = [], 0
    for kind in map(type, sections(settings)):
        said = docstrings(sys.modules[kind.__module__])[kind.__name__]
        silent += [name for name in kind.model_fields if len(said.get(name, "").split()) < 3]
        count += len(said)
    assert silent == []
    assert count > 80


def test_every_pattern_is_said_in_words() -> None:
    """A pattern itself is for the few who can read it."""

    def patterns(schema: object) -> set[str]:
        if isinstance(schema, dict):
            found = schema.get("pattern")
            below = set().union(*map(patterns, schema.values()))
            below |= set(schema.get("patternProperties", ()))
            return below | ({found} if isinstance(found, str) else set())
        return set().union(*map(patterns, schema)) if isinstance(schema, list) else set()

    assert patterns(Settings.model_json_schema()) == set(fields.PATTERNS)


def test_every_number_has_bounds() -> None:
    unbounded = []
    for path, node in fields.walk(fields.root()):
        schema = node.schema
        if schema.get("type") in {"integer", "number"} and not (
            {"minimum", "exclusiveMinimum"} & set(schema)
        ):
            unbounded.append(".".join(path))
    assert unbounded == []


@pytest.mark.parametrize(
    ("name", "tree", "path", "words"),
    [
        ("ports", {"gateway": {"port": 9, "admin_port": 9}}, "gateway.admin_port", "as port is"),
        ("cert alone", {"gateway": {"tls_certificate": "c"}}, "gateway.tls_key", "both"),
        ("key alone", {"gateway": {"tls_key": "k"}}, "gateway.tls_certificate", "both"),
        (
            "peek",
            {"gateway": {"peek_bytes": 16_777_216, "max_buffered_bytes": 65_536}},
            "gateway.peek_bytes",
            "max_buffered_bytes",
        ),
        ("two names", {"pools": [POOL, POOL]}, "pools.1.name", "pools.0.name"),
        (
            "alias is a name",
            {"pools": [POOL, {**POOL, "name": "b", "aliases": ["a"]}]},
            "pools.1.aliases.0",
            "pools.0.name",
        ),
        (
            "two aliases",
            {"pools": [{**POOL, "aliases": ["x"]}, {**POOL, "name": "b", "aliases": ["y", "x"]}]},
            "pools.1.aliases.1",
            "pools.0.aliases.0",
        ),
    ],
)
def test_contradictions(name: str, tree: dict, path: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(None, {}, base=tree)
    (problem,) = caught.value.problems
    assert problem.field == path
    assert words in problem.message


def test_two_ports_of_the_systems_choice_are_no_contradiction() -> None:
    assert GatewaySettings(port=0, admin_port=0).port == 0


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("127.0.0.1", True),
        ("127.8.9.1", True),
        ("::1", True),
        ("[::1]", True),
        ("localhost", True),
        ("LOCALHOST", True),
        ("0.0.0.0", False),
        ("::", False),
        ("10.0.0.1", False),
        ("example.org", False),
        ("localhost.example.org", False),
    ],
)
def test_what_is_loopback(host: str, loopback: bool) -> None:
    assert is_loopback(host) is loopback


def test_warnings() -> None:
    quiet = Settings.model_validate({"pools": [POOL]})
    assert list(find_warnings(quiet)) == []
    loud = Settings.model_validate(
        {"gateway": {"host": "::", "admin_host": "0.0.0.0", "admin_allowed_hosts": ["*"]}}
    )
    assert [path for path, _ in find_warnings(loud)] == [
        "gateway.host",
        "gateway.admin_host",
        "gateway.admin_allowed_hosts",
        "pools",
    ]
