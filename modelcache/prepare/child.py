"""The built-in preparation steps, run in the engine's environment as a process of their own.

    python -m modelcache.prepare.child gguf_to_safetensors INPUT OUTPUT --dtype bfloat16
    python -m modelcache.prepare.child cast INPUT OUTPUT --dtype float16
    python -m modelcache.prepare.child tp_shard INPUT OUTPUT --world-size 2

One tensor is in memory at a time, but for GGUF, which transformers reads whole. A file of the
output that is there is whole: a run that was interrupted is gone on with.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from modelcache.prepare import sharding
from modelcache.prepare.gguf import convert_gguf
from modelcache.prepare.tensor_file import TensorPlace, TensorReader, TensorWriter
from modelcache.types import CacheError

SHARDS = "tidegate-shards.json"
INDEX = "model.safetensors.index.json"
CODES: Mapping[str, str] = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
TORCH_NAMES: Mapping[str, str] = {
    "BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64",
}  # fmt: skip
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")


def cast(source: Path, target: Path, dtype: str) -> None:
    """Every floating-point tensor in another type; integers and 8-bit floats stay.

    Raises ``CacheError`` where a number does not fit the type, or the model is quantized.
    """
    config = _config(source)
    if config.get("quantization_config"):
        raise CacheError("the model is quantized: casting what is left would only lose precision")
    total = 0
    for path in _weights(source):
        done = target / path.name
        if not done.exists():
            _cast_file(path, done, CODES[dtype])
        with TensorReader(done) as made:
            total += sum(tensor.size_bytes for tensor in made.tensors)
    _copy_rest(source, target, without=(INDEX, "config.json"))
    if (source / INDEX).exists():
        index = json.loads((source / INDEX).read_bytes())
        index.setdefault("metadata", {})["total_size"] = total
        _write_json(target / INDEX, index)
    _write_json(target / "config.json", _with_dtype(config, dtype))


def _cast_file(source: Path, target: Path, code: str) -> None:
    with TensorReader(source) as reader:
        made = [
            TensorPlace(
                name=tensor.name,
                dtype=code if tensor.dtype in TORCH_NAMES else tensor.dtype,
                shape=tensor.shape,
            )
            for tensor in reader.tensors
        ]
        writer = TensorWriter(target, made, reader.metadata)
        for number, tensor in enumerate(reader.tensors, 1):
            data = reader.read(tensor)
            if tensor.dtype in TORCH_NAMES and tensor.dtype != code and data:
                data = _cast_bytes(tensor, data, code)
            writer.write([data])
            _say(f"{source.name}: tensor {number} of {len(made)}")
        writer.finish()


def _cast_bytes(tensor: TensorPlace, data: bytearray, code: str) -> bytearray:
    import torch

    before = torch.frombuffer(data, dtype=getattr(torch, TORCH_NAMES[tensor.dtype]))
    after = before.to(getattr(torch, TORCH_NAMES[code]))
    if bool((torch.isfinite(before) & ~torch.isfinite(after)).any()):
        raise CacheError(f"tensor {tensor.name!r} has numbers too large for {TORCH_NAMES[code]}")
    return bytearray(after.view(torch.uint8).numpy())


def tp_shard(source: Path, target: Path, world_size: int) -> None:
    """Each file cut into one per rank (``NAME-rank-R-of-N.safetensors``).

    ``tidegate-shards.json`` says for each tensor its whole shape, and the dimension along which
    it was cut, or null where every rank has all of it.
    """
    heads = sharding.check(_config(source), world_size)
    cuts: dict[str, dict[str, Any]] = {}
    files: dict[str, list[str]] = {}
    for path in _weights(source):
        names = [
            f"{path.stem}-rank-{rank}-of-{world_size}.safetensors" for rank in range(world_size)
        ]
        files[path.name] = names
        with TensorReader(path) as reader:
            for tensor in reader.tensors:
                cut = sharding.cut_of(tensor.name, tensor.shape, heads, 0, world_size)
                cuts[tensor.name] = {
                    "shape": list(tensor.shape), "dim": cut.dim if cut else None, "file": path.name,
                }  # fmt: skip
            if not all((target / name).exists() for name in names):
                _shard_file(reader, [target / name for name in names], heads)
    if all(one["dim"] is None for one in cuts.values()):
        raise CacheError("none of the model's tensors is of a kind that can be cut")
    _copy_rest(source, target, without=(INDEX,))
    _write_json(target / SHARDS, {"world_size": world_size, "files": files, "tensors": cuts})


def _shard_file(reader: TensorReader, targets: Sequence[Path], heads: sharding.Heads) -> None:
    count = len(targets)
    cuts = [
        [sharding.cut_of(one.name, one.shape, heads, rank, count) for one in reader.tensors]
        for rank in range(count)
    ]
    writers = []
    for rank, target in enumerate(targets):
        parts = [
            TensorPlace(name=tensor.name, dtype=tensor.dtype, shape=_cut_shape(tensor.shape, cut))
            for tensor, cut in zip(reader.tensors, cuts[rank], strict=True)
        ]
        own = {"tidegate.rank": str(rank), "tidegate.world_size": str(count)}
        writers.append(TensorWriter(target, parts, {**reader.metadata, **own}))
    for number, tensor in enumerate(reader.tensors):
        data = reader.read(tensor)
        for rank, writer in enumerate(writers):
            writer.write([_cut_bytes(data, tensor, cuts[rank][number])])
        _say(f"{reader.path.name}: tensor {number + 1} of {len(reader.tensors)}")
    for writer in writers:
        writer.finish()


def _cut_shape(shape: tuple[int, ...], cut: sharding.Cut | None) -> tuple[int, ...]:
    if cut is None:
        return shape
    length = sum(end - start for start, end in cut.slices)
    return (*shape[: cut.dim], length, *shape[cut.dim + 1 :])


def _cut_bytes(data: bytearray, tensor: TensorPlace, cut: sharding.Cut | None) -> bytes | bytearray:
    """A rank's bytes of a tensor: of each row of what lies before the dimension, its slices."""
    if cut is None or not data:
        return data
    rows = math.prod(tensor.shape[: cut.dim])
    row_bytes = len(data) // rows
    item_bytes = row_bytes // tensor.shape[cut.dim]
    view = memoryview(data)
    return b"".join(
        view[at + start * item_bytes : at + end * item_bytes]
        for at in range(0, len(data), row_bytes)
        for start, end in cut.slices
    )


def gguf_to_safetensors(source: Path, target: Path, dtype: str, file: str | None) -> None:
    """The one GGUF file of the model, or the one that is named, as a safetensors checkpoint."""
    found = [source] if source.is_file() else sorted(source.glob("*.gguf"))
    if file is not None:
        found = [source / file]
        if not found[0].is_file():
            raise CacheError(f"the model has no file {file}")
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise CacheError(f"which GGUF file is meant must be said as `file`; there are: {names}")
    convert_gguf(found[0], target, dtype=dtype, say=_say, sampling={})


def _weights(source: Path) -> list[Path]:
    found = sorted(source.glob("*.safetensors"))
    if not found:
        raise CacheError(f"{source} has no safetensors file")
    return found


def _config(source: Path) -> dict[str, Any]:
    try:
        config = json.loads((source / "config.json").read_bytes())
    except (OSError, ValueError) as error:
        raise CacheError(f"config.json of the model cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise CacheError("config.json of the model is no object")
    return config


def _with_dtype(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """The config with its type changed, wherever it is said."""
    changed = {
        key: _with_dtype(value, dtype) if isinstance(value, dict) and key.endswith("_config")
        else value
        for key, value in config.items()
    }  # fmt: skip
    said = [key for key in ("dtype", "torch_dtype") if key in config]
    return {**changed, **dict.fromkeys(said, dtype)}


def _copy_rest(source: Path, target: Path, without: Sequence[str]) -> None:
    """All that is not weights: tokenizer, templates, configs."""
    for path in sorted(source.rglob("*")):
        name = path.relative_to(source)
        if path.suffix in WEIGHTS or str(name) in without or not path.is_file():
            continue
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target / name)


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def main(arguments: Sequence[str]) -> int:
    """Run one step: exit code 0 when it is done, 1 with the reason as the last line."""
    parser = argparse.ArgumentParser(prog="modelcache.prepare.child")
    parser.add_argument("kind", choices=("gguf_to_safetensors", "cast", "tp_shard"))
    parser.add_argument("input", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--dtype", choices=sorted(CODES))
    parser.add_argument("--world-size", type=int)
    parser.add_argument("--file")
    given = parser.parse_args(arguments)
    given.output.mkdir(parents=True, exist_ok=True)
    try:
        if given.kind == "cast":
            cast(given.input, given.output, given.dtype)
        elif given.kind == "tp_shard":
            tp_shard(given.input, given.output, given.world_size)
        else:
            gguf_to_safetensors(given.input, given.output, given.dtype or "bfloat16", given.file)
    except (CacheError, sharding.ShardError, OSError) as error:
        _say(f"error: {error}")
        return 1
    return 0


if __name__ == "__main__":
    os.umask(0o022)
    sys.exit(main(sys.argv[1:]))
