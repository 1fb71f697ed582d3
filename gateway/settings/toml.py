"""On which line of a TOML file each key stands: what the standard parser does not tell.

A scanner of text that ``tomllib`` has already accepted, so it only has to find the keys: it skips
strings, comments and brackets, and never judges. Keys inside inline tables are not listed; a caller
that asks
for one is given its parent's line.
"""

from __future__ import annotations

import tomllib
from collections.abc import Sequence

Path = tuple[str, ...]


def locate(text: str) -> dict[Path, int]:
    """Line numbers, from 1, by path; elements of arrays of tables are numbered from 0."""
    return _Scanner(text).scan()


def nearest(lines: dict[Path, int], parts: Sequence[str]) -> int | None:
    """The line of a path, or of the closest one above it; ``None`` where the file has neither."""
    for end in range(len(parts), 0, -1):
        line = lines.get(tuple(parts[:end]))
        if line is not None:
            return line
    return None


class _Scanner:
    """A cursor over the text; ``at`` only moves forward."""

    def __init__(self, text: str) -> None:
        self.text = text.replace("\r\n", "\n")
        self.at = 0
        self.lines: dict[Path, int] = {}
        self.elements: dict[Path, int] = {}

    def scan(self) -> dict[Path, int]:
        """Walk the file once, statement by statement."""
        table: Path = ()
        while self._skip_blank():
            line = self.text.count("\n", 0, self.at) + 1
            if self.text[self.at] == "[":
                table = self._header()
                self.lines.setdefault(table, line)
            else:
                path = (*table, *self._key("="))
                self.lines.setdefault(path, line)
                self._skip_value()
        return self.lines

    def _skip_blank(self) -> bool:
        while self.at < len(self.text):
            if self.text[self.at] == "#":
                self._skip_comment()
            elif self.text[self.at] in " \t\n":
                self.at += 1
            else:
                return True
        return False

    def _skip_comment(self) -> None:
        end = self.text.find("\n", self.at)
        self.at = len(self.text) if end < 0 else end

    def _header(self) -> Path:
        array = self.text.startswith("[[", self.at)
        self.at += 2 if array else 1
        path = self._numbered(self._key("]"), last=not array)
        self.at += 1 if array else 0
        if array:
            index = self.elements.get(path, -1) + 1
            self.elements[path] = index
            path = (*path, str(index))
        self._skip_comment()
        return path

    def _numbered(self, names: Path, *, last: bool) -> Path:
        """A header's path with the newest element of each array of tables it goes through."""
        path: Path = ()
        for position, name in enumerate(names):
            path = (*path, name)
            if path in self.elements and (last or position < len(names) - 1):
                path = (*path, str(self.elements[path]))
        return path

    def _key(self, end: str) -> Path:
        """A dotted key up to ``end``, which is stepped over."""
        start = self.at
        while self.text[self.at] != end:
            if self.text[self.at] in "\"'":
                self._skip_string()
            else:
                self.at += 1
        written = self.text[start : self.at]
        self.at += 1
        return split_key(written)

    def _skip_value(self) -> None:
        depth = 0
        while self.at < len(self.text):
            char = self.text[self.at]
            if char in "\"'":
                self._skip_string()
                continue
            if char == "#":
                self._skip_comment()
                continue
            if char == "\n" and depth == 0:
                return
            depth += (char in "[{") - (char in "]}")
            self.at += 1

    def _skip_string(self) -> None:
        quote = self.text[self.at]
        closing = quote * 3 if self.text.startswith(quote * 3, self.at) else quote
        self.at += len(closing)
        while not self.text.startswith(closing, self.at):
            self.at += 2 if quote == '"' and self.text[self.at] == "\\" else 1
        self.at += len(closing)
        # A multi-line string may end in one or two quotes of its own, before the closing three.
        while len(closing) == 3 and self.text.startswith(quote, self.at):
            self.at += 1


def split_key(written: str) -> Path:
    """The parts of a dotted TOML key, quotes taken off; ``ValueError`` where it is none."""
    if "\n" in written:
        raise ValueError("a key is on one line")
    found: object = tomllib.loads(f"{written} = 0")
    parts = []
    while isinstance(found, dict):
        (name, found), *more = found.items()
        if more:
            raise ValueError("a key is one path")
        parts.append(name)
    return tuple(parts)
