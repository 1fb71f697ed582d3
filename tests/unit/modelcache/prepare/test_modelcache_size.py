"""What a step's result will take, told from headers: neither too little nor much too much."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path

import pytest
from safetensors_files import header, layout

from modelcache.prepare.built_in_steps import SLACK_BYTES, TOKENIZER_GROWTH, expect_bytes
from modelcache.settings import PreparationStep

HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 64}


def text(value: str) -> bytes:
    data = value.encode()
    return struct.pack("<Q", len(data)) + data


def gguf(path: Path, shapes: list[tuple[int, ...]], *, version: int = 3, cut: int = 0) -> int:
    """A GGUF file's head with all kinds of metadata; the bytes of it."""
    words = [f"word {number}" for number in range(50)]
    values = [
        text("general.architecture") + struct.pack("<I", 8) + text("llama"),
        text("a.number") + struct.pack("<II", 4, 7),
        text("a.flag") + struct.pack("<IB", 7, 1),
        text("a.double") + struct.pack("<Id", 12, 0.5),
        text("tokens") + struct.pack("<IIQ", 9, 8, len(words)) + b"".join(map(text, words)),
        text("scores") + struct.pack("<IIQ", 9, 6, 50) + bytes(200),
    ]
    tensors = [
        text(f"blk.{number}.weight") + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, 2, 0)
        for number, shape in enumerate(shapes)
    ]
    head = struct.pack("<4sIQQ", b"GGUF", version, len(tensors), len(values))
    data = head + b"".join(values) + b"".join(tensors)
    path.write_bytes(data[: len(data) - cut] + bytes(0 if cut else 1000))
    return len(data)


def test_a_gguf_file_says_how_many_weights_it_has(tmp_path: Path) -> None:
    shapes = [(1000, 30), (64,), (10, 20, 30)]
    head_bytes = gguf(tmp_path / "a.gguf", shapes)
    (tmp_path / "other.txt").write_bytes(bytes(10_000))
    count = sum(math.prod(shape) for shape in shapes)
    more = TOKENIZER_GROWTH * head_bytes + SLACK_BYTES
    step = PreparationStep(kind="gguf_to_safetensors")
    assert expect_bytes(step, tmp_path) == 2 * count + more
    wide = PreparationStep(kind="gguf_to_safetensors", file="a.gguf", dtype="float32")
    gguf(tmp_path / "b.gguf", [(5, 5)])
    assert expect_bytes(wide, tmp_path) == 4 * count + more


@pytest.mark.parametrize("broken", ["version", "cut", "magic", "two", "none", "strange"])
def test_what_cannot_be_told_is_a_multiple_of_what_there_is(tmp_path: Path, broken: str) -> None:
    path = tmp_path / "a.gguf"
    if broken != "none":
        gguf(path, [(100, 100)], version=1 if broken == "version" else 3,
             cut=30 if broken == "cut" else 0)  # fmt: skip
    data = bytearray(path.read_bytes()) if path.exists() else bytearray(100)
    if broken == "magic":
        data[:4] = b"GGML"
    if broken == "strange":
        data[24:32] = b"\xff" * 8
    (tmp_path / "a.bin" if broken == "none" else path).write_bytes(data)
    size_bytes = len(data)
    if broken == "two":
        (tmp_path / "b.gguf").write_bytes(data)
        size_bytes *= 2
    step = PreparationStep(kind="gguf_to_safetensors")
    assert expect_bytes(step, tmp_path) == 5 * size_bytes


def model(folder: Path) -> int:
    """A small model as Llama's are; the bytes of its config."""
    heads = 64 // HEADS["num_attention_heads"]
    shapes = {
        "model.embed_tokens.weight": [128, 64],
        "model.layers.0.self_attn.q_proj.weight": [4 * heads, 64],
        "model.layers.0.self_attn.k_proj.weight": [2 * heads, 64],
        "model.layers.0.mlp.down_proj.weight": [64, 256],
        "model.norm.weight": [64],
    }
    rows = [(name, "BF16", shape, 2 * math.prod(shape)) for name, shape in shapes.items()]
    rows.append(("counts", "I64", [100], 800))
    data = header(layout(rows)) + bytes(sum(row[3] for row in rows))
    (folder / "model.safetensors").write_bytes(data)
    config = json.dumps(HEADS).encode()
    (folder / "config.json").write_bytes(config)
    return len(config)


def weights(folder: Path) -> int:
    return (folder / "model.safetensors").stat().st_size


def test_a_cast_changes_what_is_a_float(tmp_path: Path) -> None:
    config_bytes = model(tmp_path)
    same = weights(tmp_path) + config_bytes + SLACK_BYTES
    assert expect_bytes(PreparationStep(kind="cast", dtype="float16"), tmp_path) == same
    floats = weights(tmp_path) - 800  # the integers stay, and so does the header
    wide = expect_bytes(PreparationStep(kind="cast", dtype="float32"), tmp_path)
    assert wide is not None
    assert same < wide <= same + floats


def test_a_command_s_result_nobody_knows(tmp_path: Path) -> None:
    assert expect_bytes(PreparationStep(kind="command", argv=("x",)), tmp_path) is None


def test_files_that_are_no_safetensors_are_left_to_the_step(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(bytes(1000))
    assert expect_bytes(PreparationStep(kind="cast", dtype="float32"), tmp_path) == 4000
