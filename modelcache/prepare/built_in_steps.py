"""The built-in preparation steps, run in the engine's environment as a process of their own.

    python -P -m modelcache.prepare.built_in_steps gguf_to_safetensors INPUT OUTPUT --dtype bfloat16
    python -P -m modelcache.prepare.built_in_steps cast INPUT OUTPUT --dtype float16

One tensor is in memory at a time, but for GGUF, which transformers reads whole. A file of the
output that is there is whole: a run that was interrupted is gone on with.

What a step's result will take is told before from the headers of the files it begins with, by
``expect_bytes``. Room is made for it, so it must not say too little; where it says much too much, a
step is refused that would have fitted.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import struct
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from modelcache.safetensors_index import (
    LENGTH_BYTES,
    BadFile,
    Index,
    TensorEntry,
    find_header_end,
    parse_header,
    tensor_bytes,
)
from modelcache.types import CacheError

if TYPE_CHECKING:
    from modelcache.settings import PreparationStep

INDEX = "model.safetensors.index.json"
CODES: Mapping[str, str] = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
"""Types of a result as safetensors calls them."""
TORCH_NAMES: Mapping[str, str] = {
    "BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64",
}  # fmt: skip
"""What a cast casts."""
ALIGN_BYTES = 8
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")

GROWTH: Mapping[str, float] = {"gguf_to_safetensors": 5.0, "cast": 2.0}
"""What a result takes where its input's headers do not tell, as a multiple of that."""

SLACK_BYTES = 65_536
"""For indexes, configurations and headers that are longer than what they were made of."""

TOKENIZER_GROWTH = 4
"""A tokenizer as files takes so many times what it takes in a GGUF file's metadata."""

GGUF_ITEM_BYTES: Mapping[int, int] = {
    0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8,
}  # fmt: skip
GGUF_STRING, GGUF_ARRAY = 8, 9
"""Types of values in a GGUF file's metadata, by its numbers."""

GGUF_MOST = 1 << 24
"""Most entries of one kind in a GGUF file that is believed."""


def read_index(path: Path) -> Index:
    """What a safetensors file holds, from its header alone. Raises ``CacheError``."""
    with path.open("rb") as file:
        size_bytes = os.fstat(file.fileno()).st_size
        try:
            first = file.read(LENGTH_BYTES)
            header_end = find_header_end(first, size_bytes)
            return parse_header(first + file.read(header_end - len(first)), size_bytes)
        except BadFile as error:
            raise BadFile(error.message, path=str(path)) from None


def cast(source: Path, target: Path, dtype: str) -> None:
    """Every floating-point tensor in another type; integers and 8-bit floats stay.

    Raises ``CacheError`` where a number does not fit the type, or the model is quantized.
    """
    config = _read_object(source / "config.json")
    if config.get("quantization_config"):
        raise CacheError("the model is quantized: casting what is left would only lose precision")
    total = 0
    for path in _weights(source):
        done = target / path.name
        if not done.exists():
            _cast_file(path, done, CODES[dtype])
        total += sum(tensor.end - tensor.start for tensor in read_index(done).tensors)
    _copy_rest(source, target, without=(INDEX, "config.json"))
    if (source / INDEX).exists():
        index = _read_object(source / INDEX)
        metadata = index.get("metadata")
        known = metadata if isinstance(metadata, dict) else {}
        _write_json(target / INDEX, {**index, "metadata": {**known, "total_size": total}})
    _write_json(target / "config.json", _with_dtype(config, dtype))


def _cast_file(source: Path, target: Path, code: str) -> None:
    """Write the file anew; it gets its name when it is whole."""
    index = read_index(source)
    entries = index.tensors
    header: dict[str, Any] = {"__metadata__": dict(index.metadata)} if index.metadata else {}
    at = 0
    for entry in entries:
        made = code if entry.dtype in TORCH_NAMES else entry.dtype
        size_bytes = tensor_bytes(made, entry.shape)
        header[entry.name] = {
            "dtype": made, "shape": list(entry.shape), "data_offsets": [at, at + size_bytes],
        }  # fmt: skip
        at += size_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGN_BYTES)
    partial = target.with_name(f".{target.name}.partial")
    with source.open("rb") as reader, partial.open("wb") as writer:
        writer.write(len(text).to_bytes(8, "little") + text)
        for number, entry in enumerate(entries, 1):
            reader.seek(entry.start)
            data = bytearray(entry.end - entry.start)
            if reader.readinto(data) != len(data):
                raise BadFile("cut short while it was read", path=str(source))
            if entry.dtype in TORCH_NAMES and entry.dtype != code and data:
                data = _cast_bytes(entry, data, code)
            writer.write(data)
            _say(f"{source.name}: tensor {number} of {len(entries)}")
        writer.flush()
        os.fsync(writer.fileno())
    partial.rename(target)


def _cast_bytes(tensor: TensorEntry, data: bytearray, code: str) -> bytearray:
    import torch

    before = torch.frombuffer(data, dtype=getattr(torch, TORCH_NAMES[tensor.dtype]))
    after = before.to(getattr(torch, TORCH_NAMES[code]))
    if bool((torch.isfinite(before) & ~torch.isfinite(after)).any()):
        raise CacheError(f"tensor {tensor.name!r} has numbers too large for {TORCH_NAMES[code]}")
    return bytearray(after.view(torch.uint8).numpy())


def gguf_to_safetensors(source: Path, target: Path, dtype: str, file: str | None) -> None:
    """The one GGUF file of the model, or the one that is named, as a safetensors checkpoint."""
    found = [source] if source.is_file() else sorted(source.glob("*.gguf"))
    if file is not None:
        found = [source / file]
        if not found[0].is_file():
            raise CacheError(f"the model has no file {file}")
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise CacheError(f"set `file` to one of its GGUF files: {names}")
    convert_gguf(found[0], target, dtype=dtype, say=_say, sampling={})


def convert_gguf(
    source: Path,
    target: Path,
    *,
    dtype: str = "bfloat16",
    say: Callable[[str], None],
    sampling: dict[str, Any],
) -> None:
    """Write ``source`` as a safetensors checkpoint, with tokenizer and chat template, into
    ``target``, undoing its quantization. ``sampling`` goes into its ``generation_config.json``.

    Takes the model in ``dtype`` of memory. Raises ``CacheError`` where something is missing.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    say("importing transformers")
    try:
        import torch
        import transformers
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    except ImportError as error:
        raise CacheError(f"this environment cannot convert a GGUF file: {error}") from error
    transformers.utils.logging.disable_progress_bar()
    place = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name}
    say("reading the tokenizer")
    tokenizer: Any = AutoTokenizer.from_pretrained(**place)
    say("reading the weights and undoing their quantization")
    model: Any = AutoModelForCausalLM.from_pretrained(
        **place, quantization_config=GgufConfig(dequantize=True), dtype=getattr(torch, dtype)
    )
    model.generation_config.update(**sampling)
    say("writing safetensors")
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    if not any(target.glob("*.safetensors")):
        raise CacheError("transformers wrote no safetensors file")


def _weights(source: Path) -> list[Path]:
    found = sorted(source.glob("*.safetensors"))
    if not found:
        raise CacheError(f"{source} has no safetensors file")
    return found


def _read_object(path: Path) -> dict[str, Any]:
    """A JSON file of the model. Raises ``CacheError``."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CacheError(f"{path.name} of the model cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise CacheError(f"{path.name} of the model is no object")
    return found


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


def expect_bytes(step: PreparationStep, source: Path) -> int | None:
    """About what the result of ``step`` will take at most; ``None`` where that is unknown (a
    command's). Reads the headers of files in ``source``, and nothing else."""
    if step.kind == "command":
        return None
    try:
        if step.kind == "gguf_to_safetensors":
            return _after_gguf(step, source)
        return _after_cast(step, source)
    except (OSError, ValueError, KeyError, struct.error, CacheError):
        # The step itself will say what is wrong with them, if anything is.
        growth = GROWTH[step.kind] * (2.0 if step.dtype == "float32" else 1.0)
        return int(size_of(source) * growth)


def size_of(path: Path) -> int:
    """The bytes of a file, or of all files in a folder."""
    if path.is_file():
        return path.stat().st_size
    return sum(one.stat().st_size for one in path.rglob("*") if one.is_file())


def _after_cast(step: PreparationStep, source: Path) -> int:
    """Each number in its new type; all else stays."""
    total = size_of(source) + SLACK_BYTES
    for path in _weights(source):
        for one in read_index(path).tensors:
            made = CODES[step.dtype or "bfloat16"] if one.dtype in TORCH_NAMES else one.dtype
            total += tensor_bytes(made, one.shape) - (one.end - one.start)
    return total


def _after_gguf(step: PreparationStep, source: Path) -> int:
    """Every weight in the new type, and the tokenizer from the file's metadata."""
    path = source
    if source.is_dir():
        (path,) = [source / step.file] if step.file else sorted(source.glob("*.gguf"))
    with path.open("rb") as file:
        count, metadata_bytes = _read_gguf(file)
    made_bytes = tensor_bytes(CODES[step.dtype or "bfloat16"], (count,))
    return made_bytes + TOKENIZER_GROWTH * metadata_bytes + SLACK_BYTES


def _read_gguf(file: BinaryIO) -> tuple[int, int]:
    """How many weights a GGUF file has, and the bytes of what stands before them."""
    magic, version, tensors, values = struct.unpack("<4sIQQ", file.read(24))
    if magic != b"GGUF" or version < 2 or max(tensors, values) > GGUF_MOST:
        raise ValueError("no GGUF file of a version that is known")
    for _ in range(values):
        _skip_text(file)
        _skip_value(file, *_unpack(file, "<I"))
    count = 0
    for _ in range(tensors):
        _skip_text(file)
        (dims,) = _unpack(file, "<I")
        if dims > 8:
            raise ValueError("no tensor has so many dimensions")
        count += math.prod(_unpack(file, f"<{dims}Q"))
        file.seek(12, os.SEEK_CUR)  # its type and where it lies
    return count, file.tell()


def _skip_value(file: BinaryIO, kind: int) -> None:
    if kind == GGUF_STRING:
        _skip_text(file)
    elif kind == GGUF_ARRAY:
        inner, length = _unpack(file, "<IQ")
        if length > GGUF_MOST:
            raise ValueError("no list is so long")
        if inner in GGUF_ITEM_BYTES:
            file.seek(length * GGUF_ITEM_BYTES[inner], os.SEEK_CUR)
            return
        if inner != GGUF_STRING:
            raise ValueError("no list of lists is known")
        for _ in range(length):
            _skip_text(file)
    else:
        file.seek(GGUF_ITEM_BYTES[kind], os.SEEK_CUR)


def _skip_text(file: BinaryIO) -> None:
    (length,) = _unpack(file, "<Q")
    file.seek(length, os.SEEK_CUR)


def _unpack(file: BinaryIO, form: str) -> tuple[int, ...]:
    return struct.unpack(form, file.read(struct.calcsize(form)))


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def main(arguments: Sequence[str]) -> int:
    """Run one step: exit code 0 when it is done, 1 with the reason as the last line."""
    parser = argparse.ArgumentParser(prog="modelcache.prepare.built_in_steps")
    parser.add_argument("kind", choices=("gguf_to_safetensors", "cast"))
    parser.add_argument("input", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--dtype", choices=sorted(CODES))
    parser.add_argument("--file")
    given = parser.parse_args(arguments)
    given.output.mkdir(parents=True, exist_ok=True)
    try:
        if given.kind == "cast":
            cast(given.input, given.output, given.dtype)
        else:
            gguf_to_safetensors(given.input, given.output, given.dtype or "bfloat16", given.file)
    except (CacheError, OSError) as error:
        _say(f"error: {error}")
        return 1
    return 0


if __name__ == "__main__":
    os.umask(0o077)
    sys.exit(main(sys.argv[1:]))
