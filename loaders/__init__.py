"""Local bytes to tensors, and engines to started processes.

``load``, ``iterate`` (with ``in_place_copies``) and ``check`` read safetensors; they are imported
when first asked for, and torch when they are called, so that importing this package costs nothing.
They are in ``weights``;
``engines`` are what serves a model, ``settings`` the section of that name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loaders.weights.load import Loaded, check, in_place_copies, iterate, load
    from modelcache.safetensors_index import BadFile

__all__ = ["BadFile", "Loaded", "check", "in_place_copies", "iterate", "load"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from loaders.weights import load

    return getattr(load, name)
