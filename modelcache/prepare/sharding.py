"""How a model's tensors are cut between tensor-parallel ranks: pure rules for Llama-like models.

Projections into attention and MLP, embeddings and the output layer are cut by rows, projections
back by columns. Where several projections lie fused in one tensor each is cut for itself. With
fewer key-value heads than ranks, neighbouring ranks get the same head. All else every rank has
whole, which costs bytes but is never wrong.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

PARALLEL = re.compile(r"(q|gate|up)_proj|w1|w3|wq|embed_tokens|lm_head")
KEY_VALUE = re.compile(r"[kv]_proj|w[kv]")
BACK = re.compile(r"(o|down)_proj|w2|wo")
VOCABULARY = re.compile(r"embed_tokens|lm_head")

Slices = tuple[tuple[int, int], ...]
"""``(start, end)`` of what is taken along a dimension, in order."""


class ShardError(ValueError):
    """The model cannot be cut so; the message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Heads:
    """Attention as a model's config has it."""

    query: int
    key_value: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """One rank's part of a tensor: ``slices`` along dimension ``dim``."""

    dim: int
    slices: Slices


def heads_of(config: Mapping[str, Any]) -> Heads:
    """The attention heads of a ``config.json``. Raises ``ShardError`` where it does not say."""
    text = config.get("text_config") or config
    query = text.get("num_attention_heads")
    key_value = text.get("num_key_value_heads") or query
    if not isinstance(query, int) or not isinstance(key_value, int) or min(query, key_value) < 1:
        raise ShardError("config.json does not say how many attention heads the model has")
    return Heads(query=query, key_value=key_value)


def check(config: Mapping[str, Any], world_size: int) -> Heads:
    """The heads, where the model can be cut into ``world_size``. Raises ``ShardError`` if not."""
    if config.get("quantization_config"):
        raise ShardError(
            "the model is quantized, and how its packed tensors are cut depends on the method: "
            "cut it before it is quantized, or let the engine do it"
        )
    heads = heads_of(config)
    if heads.query % world_size:
        raise ShardError(f"{heads.query} attention heads cannot be shared by {world_size} ranks")
    if heads.key_value % world_size and world_size % heads.key_value:
        raise ShardError(
            f"{heads.key_value} key-value heads cannot be shared by {world_size} ranks"
        )
    return heads


def cut_of(
    name: str, shape: tuple[int, ...], heads: Heads, rank: int, world_size: int
) -> Cut | None:
    """What rank ``rank`` has of a tensor; ``None``: all of it.

    Raises ``ShardError`` for a projection that cannot be divided.
    """
    layer, _, kind = name.rpartition(".")
    if kind not in ("weight", "bias") or not shape:
        return None
    last = layer.rpartition(".")[2]
    if BACK.fullmatch(last):
        if kind == "bias" or len(shape) < 2:
            return None
        return Cut(dim=1, slices=(_even(name, 0, shape[1], rank, world_size),))
    if KEY_VALUE.fullmatch(last):
        return Cut(dim=0, slices=(_key_value(name, 0, shape[0], heads, rank, world_size),))
    if last == "gate_up_proj":
        half, odd = divmod(shape[0], 2)
        if odd:
            raise ShardError(f"{name} of shape {shape} has no two halves")
        parts = tuple(_even(name, at, half, rank, world_size) for at in (0, half))
        return Cut(dim=0, slices=parts)
    if last == "qkv_proj":
        return Cut(dim=0, slices=_fused_attention(name, shape[0], heads, rank, world_size))
    if not PARALLEL.fullmatch(last):
        return None
    if VOCABULARY.fullmatch(last) and shape[0] % world_size:
        return None
    return Cut(dim=0, slices=(_even(name, 0, shape[0], rank, world_size),))


def _fused_attention(name: str, rows: int, heads: Heads, rank: int, world_size: int) -> Slices:
    size, left = divmod(rows, heads.query + 2 * heads.key_value)
    if left:
        raise ShardError(f"{name} has {rows} rows, which are no whole number of heads")
    query, key_value = heads.query * size, heads.key_value * size
    return (
        _even(name, 0, query, rank, world_size),
        _key_value(name, query, key_value, heads, rank, world_size),
        _key_value(name, query + key_value, key_value, heads, rank, world_size),
    )


def _key_value(
    name: str, at: int, length: int, heads: Heads, rank: int, world_size: int
) -> tuple[int, int]:
    if world_size <= heads.key_value:
        return _even(name, at, length, rank, world_size)
    same = world_size // heads.key_value
    return _even(name, at, length, rank // same, heads.key_value)


def _even(name: str, at: int, length: int, rank: int, world_size: int) -> tuple[int, int]:
    size, left = divmod(length, world_size)
    if left:
        raise ShardError(f"{name}: {length} cannot be divided by {world_size}")
    return at + rank * size, at + (rank + 1) * size
