"""The shape of the packages: no import circles, no crowded folders, every folder mapped, and what
the documentation says of it.
"""

from __future__ import annotations

import ast
import functools
import graphlib
import os
import re
import tomllib
from pathlib import Path
from typing import NamedTuple

import pytest

from gateway.settings.schema import Settings
from loaders.engines.base import ENGINES

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("gateway", "autoscaler", "loaders", "forecaster", "modelcache", "router")
MOST_MODULES = 14
"""In one folder."""


class Facts(NamedTuple):
    """What the tests here look at in a module: kept, so that each is parsed once."""

    imports: list[ast.Import | ast.ImportFrom]
    classes: list[str]
    engines: list[int]
    """The lines that have an engine's name."""


@functools.cache
def facts(path: Path) -> Facts:
    found = Facts([], [], [])
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom):
            found.imports.append(node)
        elif isinstance(node, ast.ClassDef):
            found.classes.append(node.name)
        elif isinstance(node, ast.Constant) and node.value in ENGINES:
            found.engines.append(node.lineno)
    return found


@functools.cache
def modules() -> dict[str, Path]:
    found = {}
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = path
    return found


def imported(path: Path, known: set[str]) -> set[str]:
    """The modules that a file imports anywhere, in functions and for type checking too."""
    names: set[str] = set()
    for node in facts(path).imports:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif node.module:
            # What is no module is a name in ``node.module``; what is one makes the package behind
            # it no more than a path to it.
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                names.add(full if full in known else node.module)
    return names & known


def test_modules_do_not_import_in_a_circle() -> None:
    found = modules()
    known = set(found)
    graph = {name: imported(path, known) - {name} for name, path in found.items()}
    assert len(graph) > 100
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


def test_a_class_name_is_used_once() -> None:
    found: dict[str, list[str]] = {}
    for name, path in modules().items():
        for class_name in facts(path).classes:
            found.setdefault(class_name, []).append(name)
    assert {name: places for name, places in found.items() if len(places) > 1} == {}


def test_folders_are_not_crowded() -> None:
    counts: dict[Path, int] = {}
    for path in modules().values():
        if path.name != "__init__.py":
            counts[path.parent] = counts.get(path.parent, 0) + 1
    crowded = {str(folder): count for folder, count in counts.items() if count > MOST_MODULES}
    assert crowded == {}


def test_every_folder_names_its_modules() -> None:
    found = modules()
    for name, path in found.items():
        if path.name != "__init__.py":
            continue
        text = ast.get_docstring(ast.parse(path.read_text())) or ""
        inside = {other.rpartition(".")[2] for other in found if other.rpartition(".")[0] == name}
        missing = {one for one in inside - {"__main__"} if f"``{one}``" not in text}
        assert missing == set(), f"the map of {name}"


PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
ARCHITECTURE = (ROOT / "docs" / "ARCHITECTURE.md").read_text()
PAGES = [
    path
    for pattern in ("*.md", "docs/**/*.md", "bench/README.md", "deploy/**/*.md")
    for path in sorted(ROOT.glob(pattern))
    if not path.name.startswith(".")
]
DEFAULTS = Settings()
MADE = {"bench/out/", "bench/results/"}
"""Folders that appear with what is written there."""


def block(name: str) -> str:
    """What stands between two comments of the architecture page."""
    start, end = f"<!-- {name}:start -->", f"<!-- {name}:end -->"
    assert ARCHITECTURE.count(start) == ARCHITECTURE.count(end) == 1
    return ARCHITECTURE.partition(start)[2].partition(end)[0].strip()


def test_architecture_lists_the_import_contracts() -> None:
    items = re.split(r"^\d+\. ", block("contracts"), flags=re.MULTILINE)[1:]
    listed = []
    for item in items:
        match = re.fullmatch(r"\*\*(.+?)\*\*(?:: (.+))?", " ".join(item.split()))
        assert match is not None, item
        listed.append((match[1], match[2]))
    expected = []
    contracts = PYPROJECT["tool"]["importlinter"]["contracts"]
    texts = dict(listed)
    for contract in contracts:
        name = contract["name"]
        if contract["type"] != "layers":
            expected.append((name, texts.get(name)))  # what is said of it is not compared
            continue
        layers = " > ".join(contract["layers"])
        paths = [name.replace(".", "/") for name in re.findall(r"[\w.]+", layers)]
        common = os.path.commonpath(paths).replace("/", ".")
        layers = layers.replace(f"{common}.", "")
        expected.append((name, layers))
    assert listed == expected


def test_architecture_is_short_and_maps_every_folder() -> None:
    assert len(ARCHITECTURE.splitlines()) <= 170
    listed = re.findall(r"^\| `([\w/]+)/` \|", block("map"), re.MULTILINE)
    assert len(set(listed)) == len(listed)
    folders = {str(path.parent.relative_to(ROOT)) for path in modules().values()}
    assert {one for one in listed if one.partition("/")[0] in PACKAGES} == folders
    assert all((ROOT / one).is_dir() for one in listed)


@functools.cache
def names_in(path: Path) -> set[str]:
    """What a module defines at its top."""
    names: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names |= {one.id for one in node.targets if isinstance(one, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
        elif isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names}
    return names


@functools.cache
def is_setting(name: str) -> bool:
    here: object = DEFAULTS
    for part in name.split("."):
        if part not in getattr(type(here), "model_fields", {}):
            return False
        here = getattr(here, part)
    return True


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_pages_name_only_modules_files_and_settings_that_exist(page: Path) -> None:
    text = page.read_text()
    tops = "|".join((*PACKAGES, "deploy", "bench", "tests", "docs", r"\.ci"))
    paths = set(re.findall(rf"`((?:{tops})/[\w./-]*)`", text)) - MADE
    assert {one for one in paths if not (ROOT / one).exists()} == set()
    found = modules()
    missing = set()
    for name in re.findall(rf"(?<![\w./-])(?:{'|'.join(PACKAGES)})(?:\.\w+)+", text):
        parts = name.split(".")
        module = next(
            one for n in range(len(parts), 0, -1) if (one := ".".join(parts[:n])) in found
        )
        rest = parts[module.count(".") + 1 :]
        if rest and rest[0] not in names_in(found[module]) and not is_setting(name):
            missing.add(name)
    assert missing - {"autoscaler.stable_windw_s"} == set()  # the mistake that the tour shows


def test_no_package_but_the_loaders_names_an_engine() -> None:
    """What differs from engine to engine is asked of it, so that another can be added."""
    named = set()
    for name, path in modules().items():
        if not name.startswith("loaders.engines"):
            named |= {f"{name}, line {line}" for line in facts(path).engines}
    assert named == set()
