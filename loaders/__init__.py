"""Local bytes to tensors, and engines to started processes.

``load``, ``iterate`` (with ``in_place_copies``) and ``check`` read safetensors; they are imported
when first asked for, and torch when they are called, so that importing this package costs nothing.
They are in ``weights``;
``engines`` are what serves a model, ``settings`` the section of that name.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loaders.weights.load import Loaded, check, in_place_copies, iterate, load
    from modelcache.safetensors_index import BadFile

if sys.argv[:1] == ["-m"] and not sys.flags.safe_path and sys.path[0] == os.getcwd():
    # ``python -m`` looks in the working directory first: whatever lies there would be imported in
    # place of modules of the same names. It comes last, and only where this package is from there.
    here = sys.path.pop(0)
    sys.path += [here] if __file__.startswith(f"{here}/loaders/") else []

__all__ = ["BadFile", "Loaded", "check", "in_place_copies", "iterate", "load"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from loaders.weights import load

    return getattr(load, name)
