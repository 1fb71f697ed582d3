"""Label selectors as Kubernetes reads them (``k8s.io/apimachinery/pkg/labels``). Pure.

``app=vllm,tier in (gold,silver),!canary``: all requirements must hold. ``!=`` and ``notin`` hold
too where the label is absent.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NoReturn

Operator = Literal["in", "notin", "exists", "!exists", ">", "<"]

MAX_LENGTH = 8_192
"""Characters of a selector."""
_TOKENS = frozenset({")", ",", "!", "==", "=", "!=", "(", ">", "<"})
_SPECIAL = frozenset("=!(),<>")
_BLANK = frozenset(" \t\r\n")
_NAME = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?")
_SUBDOMAIN = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
_INTEGER = re.compile(r"[+-]?[0-9]+")
_END = "end of string"


class SelectorError(ValueError):
    """A text that is no label selector; the message says where it is wrong."""


@dataclass(frozen=True, slots=True)
class Requirement:
    """One condition on one label."""

    key: str
    operator: Operator
    values: frozenset[str] = frozenset()

    def matches(self, labels: Mapping[str, str]) -> bool:
        """Whether it holds for these labels."""
        value = labels.get(self.key)
        match self.operator:
            case "exists":
                return value is not None
            case "!exists":
                return value is None
            case "in":
                return value in self.values
            case "notin":
                return value not in self.values
        if value is None or not _INTEGER.fullmatch(value):
            return False
        (limit,) = self.values
        return int(value) > int(limit) if self.operator == ">" else int(value) < int(limit)


@dataclass(frozen=True, slots=True)
class LabelSelector:
    """Requirements that must all hold; none selects everything."""

    requirements: tuple[Requirement, ...] = ()

    @property
    def is_everything(self) -> bool:
        """Whether it requires nothing."""
        return not self.requirements

    def matches(self, labels: Mapping[str, str]) -> bool:
        """Whether these labels are selected."""
        return all(one.matches(labels) for one in self.requirements)

    def required(self) -> Iterator[tuple[str, frozenset[str]]]:
        """Labels that must be there, and the values that each may have."""
        for one in self.requirements:
            if one.operator == "in":
                yield one.key, one.values


EVERYTHING = LabelSelector()


@lru_cache(maxsize=1_024)
def parse_selector(text: str) -> LabelSelector:
    """The selector of a text; the empty one selects everything. Raises ``SelectorError``."""
    if len(text) > MAX_LENGTH:
        raise SelectorError(f"it has {len(text)} characters, more than {MAX_LENGTH}")
    return LabelSelector(tuple(_Parser(text).requirements()))


class _Parser:
    """Tokens, one ahead. ``in`` and ``notin`` are operators only where one may stand."""

    def __init__(self, text: str) -> None:
        self._tokens = list(_scan(text))
        self._at = 0

    def requirements(self) -> Iterator[Requirement]:
        if self._peek() == "":
            return
        while True:
            yield self._requirement()
            token = self._take()
            if token == "":
                return
            if token != ",":
                _expected(token, f"',' or {_END!r}")
            if self._peek() != "!" and not _is_word(self._peek()):
                _expected(self._peek(), "identifier after ','")

    def _requirement(self) -> Requirement:
        if self._peek() == "!":
            self._take()
            return Requirement(self._key(), "!exists")
        key = self._key()
        if self._peek() in ("", ","):
            return Requirement(key, "exists")
        operator = self._take()
        match operator:
            case "=" | "==":
                return Requirement(key, "in", frozenset({self._value()}))
            case "!=":
                return Requirement(key, "notin", frozenset({self._value()}))
            case "in" | "notin":
                return Requirement(key, operator, self._values())
            case ">" | "<":
                value = self._value()
                if not _INTEGER.fullmatch(value):
                    raise SelectorError(f"{value!r} behind {operator!r} must be an integer")
                return Requirement(key, operator, frozenset({value}))
        _expected(operator, "one of in, notin, =, ==, !=, >, <")

    def _key(self) -> str:
        token = self._take()
        if not _is_word(token):
            _expected(token, "identifier")
        check_key(token)
        return token

    def _value(self) -> str:
        if self._peek() in ("", ","):
            return ""
        token = self._take()
        if not _is_word(token):
            _expected(token, "identifier")
        return check_value(token)

    def _values(self) -> frozenset[str]:
        if (token := self._take()) != "(":
            _expected(token, "'('")
        values: set[str] = set()
        before = "("
        while (token := self._take()) != ")":
            if token == ",":
                if before in "(,":
                    values.add("")
            elif not _is_word(token) or before not in "(,":
                _expected(token, "',' or identifier" if before in "(," else "',' or ')'")
            else:
                values.add(check_value(token))
            before = token
        if before == ",":
            values.add("")
        if not values:
            raise SelectorError("the values of 'in' and 'notin' must not be empty")
        return frozenset(values)

    def _peek(self) -> str:
        return self._tokens[self._at]

    def _take(self) -> str:
        token = self._tokens[self._at]
        if token:
            self._at += 1
        return token


def _scan(text: str) -> Iterator[str]:
    """Symbols and words; at the end an empty one."""
    at = 0
    while at < len(text):
        start = at
        if text[at] in _BLANK:
            at += 1
        elif text[at] in _SPECIAL:
            at += 2 if text[at : at + 2] in _TOKENS else 1
            yield text[start:at]
        else:
            while at < len(text) and text[at] not in _BLANK and text[at] not in _SPECIAL:
                at += 1
            yield text[start:at]
    yield ""


def _is_word(token: str) -> bool:
    return token != "" and token not in _TOKENS


def _expected(found: str, wanted: str) -> NoReturn:
    raise SelectorError(f"found {found or _END!r}, expected: {wanted}")


def check_key(key: str) -> None:
    """Raise ``SelectorError`` for what is no label key: a name of at most 63 characters, which a
    domain and a slash may stand before."""
    domain, slash, name = key.rpartition("/")
    ok = len(name) <= 63 and _NAME.fullmatch(name)
    if slash:
        ok = ok and len(domain) <= 253 and _SUBDOMAIN.fullmatch(domain)
    if not ok:
        raise SelectorError(f"{key!r} is no label key")


def check_value(value: str) -> str:
    """The same value. Raises ``SelectorError`` for what is no label value."""
    if value and (len(value) > 63 or not _NAME.fullmatch(value)):
        raise SelectorError(
            f"{value!r} is no label value: at most 63 letters, digits, '-', '_' and '.', the first "
            "and the last a letter or digit"
        )
    return value
