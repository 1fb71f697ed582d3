"""The shape of the packages: no import circles, no crowded folders, every folder mapped."""

from __future__ import annotations

import ast
import graphlib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("gateway", "autoscaler", "loaders", "modelcache", "router")
MOST_MODULES = 18
"""In one folder. Lower it as folders are cleared."""

KNOWN_CIRCLE = {
    f"gateway.datapath.{name}"
    for name in (
        "answer",
        "client",
        "connection",
        "exchange",
        "local",
        "pool",
        "upstream",
        "worker",
    )
}
"""These modules of the data path still know each other; nothing else may."""


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
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            # What is no module is a name in ``node.module``; what is one makes the package behind
            # it no more than a path to it.
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                names.add(full if full in known else node.module)
    return names & known


def test_modules_do_not_import_in_a_circle() -> None:
    found = modules()
    known = set(found)
    graph = {
        name: {
            other for other in imported(path, known) - {name} if not {name, other} <= KNOWN_CIRCLE
        }
        for name, path in found.items()
    }
    assert len(graph) > 100
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


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
