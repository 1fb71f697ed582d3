"""The files that every loader reads: a model of Llama's proportions, seeded, in four shards."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import xxhash

PIECE_BYTES = 8 * 1024 * 1024
BLOCK_BYTES = 16 * 1024 * 1024
SHARDS = 4
HIDDEN, VOCABULARY = 2048, 64_000
FULL_LAYERS = 34
FULL_GB = 4.06


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """What was written: ``xxh3`` by piece for each file, and ``digest``, the XXH3-64 of all
    tensors' bytes, file after file."""

    files: tuple[str, ...]
    size_bytes: int
    tensors: int
    xxh3: dict[str, list[int]]
    digest: int

    def save(self, path: Path) -> None:
        """For the processes that read it."""
        path.write_text(json.dumps(asdict(self)))


def shapes(layers: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of all tensors."""
    inner, heads = 4 * HIDDEN, HIDDEN // 4
    yield "model.embed_tokens.weight", (VOCABULARY, HIDDEN)
    for layer in range(layers):
        at = f"model.layers.{layer}"
        yield f"{at}.input_layernorm.weight", (HIDDEN,)
        yield f"{at}.self_attn.q_proj.weight", (HIDDEN, HIDDEN)
        yield f"{at}.self_attn.k_proj.weight", (heads, HIDDEN)
        yield f"{at}.self_attn.v_proj.weight", (heads, HIDDEN)
        yield f"{at}.self_attn.o_proj.weight", (HIDDEN, HIDDEN)
        yield f"{at}.post_attention_layernorm.weight", (HIDDEN,)
        yield f"{at}.mlp.gate_proj.weight", (inner, HIDDEN)
        yield f"{at}.mlp.up_proj.weight", (inner, HIDDEN)
        yield f"{at}.mlp.down_proj.weight", (HIDDEN, inner)
    yield "model.norm.weight", (HIDDEN,)
    yield "lm_head.weight", (VOCABULARY, HIDDEN)


@contextmanager
def made(folder: Path, *, gb: float) -> Iterator[Model]:
    """The files of about ``gb`` GB, on disk (synced) for as long as this lasts. Raises
    ``RuntimeError`` where there is no room."""
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    try:
        free = shutil.disk_usage(folder).free
        if free < 3 * gb * 1e9:
            raise RuntimeError(f"{folder} has {free / 1e9:.1f} GB free, {3 * gb:.0f} are needed")
        yield _write(folder, gb)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _write(folder: Path, gb: float) -> Model:
    rows = list(shapes(max(1, round(FULL_LAYERS * gb / FULL_GB))))
    total = sum(2 * math.prod(shape) for _, shape in rows)
    chance = random.Random(20261124)
    block = chance.randbytes(BLOCK_BYTES)
    files, sums = [], {}
    whole = xxhash.xxh3_64()
    shards: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    size = 0
    for row in rows:
        if size >= total / SHARDS and len(shards) < SHARDS:
            shards.append([])
            size = 0
        shards[-1].append(row)
        size += 2 * math.prod(row[1])
    for number, shard in enumerate(shards, start=1):
        path = folder / f"model-{number:05}-of-{len(shards):05}.safetensors"
        sums[str(path)] = _write_shard(path, shard, block, chance, whole)
        files.append(str(path))
    return Model(
        files=tuple(files), size_bytes=sum(os.path.getsize(file) for file in files),
        tensors=len(rows), xxh3=sums, digest=whole.intdigest(),
    )  # fmt: skip


def _write_shard(
    path: Path,
    rows: list[tuple[str, tuple[int, ...]]],
    block: bytes,
    chance: random.Random,
    whole: xxhash.xxh3_64,
) -> list[int]:
    """The file, and the XXH3-64 of each of its pieces."""
    at, document = 0, {}
    for name, shape in rows:
        size = 2 * math.prod(shape)
        document[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    head = json.dumps(document).encode()
    head += b" " * (-len(head) % 8)
    with path.open("wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        while at:
            turn = chance.randrange(BLOCK_BYTES)
            part = (block[turn:] + block[:turn])[: min(at, BLOCK_BYTES)]
            file.write(part)
            whole.update(part)
            at -= len(part)
        file.flush()
        os.fsync(file.fileno())
    with path.open("rb") as file:
        return [
            xxhash.xxh3_64_intdigest(piece) for piece in iter(lambda: file.read(PIECE_BYTES), b"")
        ]
