"""Whether the packages that would be imported are Tidegate's own.

Their names are plain words (``router``, ``gateway``), so another distribution in the same
environment, or a folder on ``PYTHONPATH``, could stand before or over them. That is looked at
before anything is imported, because what it causes otherwise is hard to recognise.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

LEAVES = {
    "gateway": "datapath/worker",
    "autoscaler": "policy/decide",
    "loaders": "weights/plan",
    "modelcache": "refs",
    "router": "pick",
}
"""Each package with a module that it has and a stranger of the same name would not."""


class NotOursError(ImportError):
    """Another distribution has a package of that name; the message says where it lies."""


def assert_ours(
    root: Path | None = None, locate: Callable[[str], Path | None] | None = None
) -> None:
    """Raise ``NotOursError`` unless every package lies where this one does, and has our modules.

    ``root`` is the directory that holds the packages, by default that of this very file; ``locate``
    finds where a package would be imported from. Nothing is imported.
    """
    root = (root or Path(__file__).resolve().parents[2]).resolve()
    for package, leaf in LEAVES.items():
        found = (locate or _locate)(package)
        if found is None:
            raise NotOursError(
                f"the package {package!r} of Tidegate cannot be found; install Tidegate again"
            )
        if found == root / package and not (found / f"{leaf}.py").is_file():
            raise NotOursError(
                f"{found} is not Tidegate's package {package!r}, or incomplete ({leaf}.py is not "
                "there): another package of that name was installed over it; install Tidegate "
                "again, in an environment of its own"
            )
        if found != root / package:
            raise NotOursError(
                f"the package {package!r} would be imported from {found}, which is not Tidegate's "
                f"({root / package}): give Tidegate an environment of its own, and no PYTHONPATH"
            )


def _locate(package: str) -> Path | None:
    """The directory a package would be imported from."""
    spec = importlib.util.find_spec(package)
    if spec is None:
        return None
    if spec.origin is not None:
        return Path(spec.origin).resolve().parent
    places = list(spec.submodule_search_locations or ())
    return Path(places[0]).resolve() if places else None
