"""How tensors are cut between ranks: what all ranks have together is the whole, and no more."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest

from modelcache.prepare import child
from modelcache.prepare.child import SHARDS, tp_shard
from modelcache.prepare.sharding import Cut, Heads, ShardError, check, cut_of, heads_of
from modelcache.prepare.tensor_file import TensorPlace, TensorReader, TensorWriter
from modelcache.types import CacheError

HEADS = Heads(query=4, key_value=2)

CUTS: list[tuple[str, tuple[int, ...], int, int, Cut | None]] = [
    ("l.q_proj.weight", (8, 5), 1, 2, Cut(dim=0, slices=((4, 8),))),
    ("l.q_proj.bias", (8,), 0, 2, Cut(dim=0, slices=((0, 4),))),
    ("l.k_proj.weight", (4, 5), 1, 2, Cut(dim=0, slices=((2, 4),))),
    ("l.k_proj.weight", (4, 5), 1, 4, Cut(dim=0, slices=((0, 2),))),
    ("l.k_proj.weight", (4, 5), 2, 4, Cut(dim=0, slices=((2, 4),))),
    ("l.o_proj.weight", (5, 8), 1, 2, Cut(dim=1, slices=((4, 8),))),
    ("l.o_proj.bias", (5,), 1, 2, None),
    ("l.qkv_proj.weight", (16, 5), 1, 2, Cut(dim=0, slices=((4, 8), (10, 12), (14, 16)))),
    ("l.qkv_proj.weight", (16, 5), 3, 4, Cut(dim=0, slices=((6, 8), (10, 12), (14, 16)))),
    ("l.gate_up_proj.weight", (12, 5), 1, 2, Cut(dim=0, slices=((3, 6), (9, 12)))),
    ("l.down_proj.weight", (5, 6), 0, 2, Cut(dim=1, slices=((0, 3),))),
    ("model.embed_tokens.weight", (10, 5), 1, 2, Cut(dim=0, slices=((5, 10),))),
    ("model.embed_tokens.weight", (11, 5), 1, 2, None),
    ("lm_head.weight", (10, 5), 0, 2, Cut(dim=0, slices=((0, 5),))),
    ("l.input_layernorm.weight", (5,), 1, 2, None),
    ("l.experts.gate_up_proj", (4, 12, 5), 1, 2, None),
    ("l.rotary.inv_freq", (8,), 1, 2, None),
    ("l.q_proj.weight", (), 1, 2, None),
]


@pytest.mark.parametrize(("name", "shape", "rank", "world_size", "expected"), CUTS)
def test_cuts(
    name: str, shape: tuple[int, ...], rank: int, world_size: int, expected: Cut | None
) -> None:
    assert cut_of(name, shape, HEADS, rank, world_size) == expected


@pytest.mark.parametrize(
    ("config", "world_size", "words"),
    [
        ({"num_attention_heads": 9, "num_key_value_heads": 3}, 2, "9 attention heads"),
        ({"num_attention_heads": 8, "num_key_value_heads": 3}, 4, "3 key-value heads"),
        ({}, 2, "how many attention heads"),
        ({"num_attention_heads": 8, "quantization_config": {"bits": 4}}, 2, "quantized"),
    ],
)
def test_refuses_what_cannot_be_cut(config: dict[str, Any], world_size: int, words: str) -> None:
    with pytest.raises(ShardError, match=words):
        check(config, world_size)


def test_refuses_a_projection_that_cannot_be_divided() -> None:
    with pytest.raises(ShardError, match=r"up_proj.*7 cannot be divided by 2"):
        cut_of("l.up_proj.weight", (7, 4), HEADS, 0, 2)
    with pytest.raises(ShardError, match="no whole number of heads"):
        cut_of("l.qkv_proj.weight", (15, 4), HEADS, 0, 2)


def test_heads_of_a_model_with_several_parts_and_without_grouped_heads() -> None:
    assert heads_of({"text_config": {"num_attention_heads": 4}}) == Heads(query=4, key_value=4)


TENSORS: dict[str, tuple[str, tuple[int, ...]]] = {
    "model.embed_tokens.weight": ("F16", (10, 6)),
    "model.layers.0.self_attn.q_proj.weight": ("F16", (8, 6)),
    "model.layers.0.self_attn.k_proj.weight": ("F16", (4, 6)),
    "model.layers.0.self_attn.v_proj.weight": ("F16", (4, 6)),
    "model.layers.0.self_attn.o_proj.weight": ("F32", (6, 8)),
    "model.layers.0.mlp.gate_up_proj.weight": ("BF16", (12, 6)),
    "model.layers.0.mlp.down_proj.weight": ("F16", (6, 6)),
    "model.norm.weight": ("F32", (6,)),
    "model.empty.weight": ("F32", (0, 6)),
}


def write_model(folder: Path) -> dict[str, bytes]:
    """A small model in two files, with numbers from a seed; its tensors' bytes."""
    folder.mkdir(exist_ok=True)
    rng = random.Random(7)
    data: dict[str, bytes] = {}
    names = list(TENSORS)
    for number, part in enumerate((names[:4], names[4:])):
        places = [TensorPlace(name=n, dtype=TENSORS[n][0], shape=TENSORS[n][1]) for n in part]
        writer = TensorWriter(folder / f"model-{number}.safetensors", places, {"format": "pt"})
        for place in places:
            data[place.name] = rng.randbytes(place.size_bytes)
            writer.write([data[place.name]])
        writer.finish()
    config = {"num_attention_heads": 4, "num_key_value_heads": 2, "dtype": "float16"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "pytorch_model.bin").write_text("never copied")
    return data


def read_all(path: Path) -> dict[str, tuple[TensorPlace, bytes]]:
    with TensorReader(path) as reader:
        return {one.name: (one, bytes(reader.read(one))) for one in reader.tensors}


def rows(place: TensorPlace, data: bytes) -> list[bytes]:
    """The tensor as a list of rows."""
    width = len(data) // place.shape[0]
    return [data[at : at + width] for at in range(0, len(data), width)]


def test_shards_have_the_values_of_the_whole(tmp_path: Path) -> None:
    data = write_model(tmp_path / "in")
    (tmp_path / "out").mkdir()
    tp_shard(tmp_path / "in", tmp_path / "out", 2)
    shards = [
        read_all(tmp_path / f"out/model-0-rank-{rank}-of-2.safetensors")
        | read_all(tmp_path / f"out/model-1-rank-{rank}-of-2.safetensors")
        for rank in (0, 1)
    ]
    said = json.loads((tmp_path / "out" / SHARDS).read_text())
    for name, (_, shape) in TENSORS.items():
        dim = said["tensors"][name]["dim"]
        assert said["tensors"][name]["shape"] == list(shape)
        (one, left), (_, right) = shards[0][name], shards[1][name]
        if name.endswith("gate_up_proj.weight"):
            left_rows, right_rows = rows(one, left), rows(one, right)
            assert left_rows[:3] + right_rows[:3] + left_rows[3:] + right_rows[3:] == rows(
                TensorPlace(name=name, dtype="BF16", shape=shape), data[name]
            )
        elif dim is None:
            assert left == right == data[name]
        elif dim == 0:
            assert left + right == data[name]
        else:
            pairs = zip(rows(one, left), rows(one, right), strict=True)
            assert b"".join(a + b for a, b in pairs) == data[name]
    assert {name for name, one in said["tensors"].items() if one["dim"] is None} == {
        "model.norm.weight",
        "model.empty.weight",
    }
    kept = {path.name for path in (tmp_path / "out").iterdir() if "rank" not in path.name}
    assert kept == {"config.json", "tokenizer.json", SHARDS}


def test_goes_on_where_it_was_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_model(tmp_path / "in")
    (tmp_path / "out").mkdir()
    shard_file = child._shard_file

    def interrupted(reader: TensorReader, *rest: Any) -> None:
        if reader.path.name == "model-1.safetensors":
            raise KeyboardInterrupt
        shard_file(reader, *rest)

    monkeypatch.setattr(child, "_shard_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tp_shard(tmp_path / "in", tmp_path / "out", 2)
    done = tmp_path / "out/model-0-rank-1-of-2.safetensors"
    before = done.stat().st_mtime_ns
    again: list[str] = []

    def watched(reader: TensorReader, *rest: Any) -> None:
        again.append(reader.path.name)
        shard_file(reader, *rest)

    monkeypatch.setattr(child, "_shard_file", watched)
    tp_shard(tmp_path / "in", tmp_path / "out", 2)
    assert again == ["model-1.safetensors"]
    assert done.stat().st_mtime_ns == before


def test_a_file_that_is_not_finished_is_not_there(tmp_path: Path) -> None:
    places = [TensorPlace(name="a", dtype="U8", shape=(4,))]
    writer = TensorWriter(tmp_path / "f.safetensors", places, {})
    with pytest.raises(ValueError, match=r"1 tensors .* not written"):
        writer.finish()
    with pytest.raises(ValueError, match="1 bytes too few"):
        writer.write([b"abc"])
    assert not (tmp_path / "f.safetensors").exists()


def header(text: bytes, data: bytes = b"") -> bytes:
    return len(text).to_bytes(8, "little") + text + data


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("empty", b"", "no safetensors file"),
        ("long header", (1 << 60).to_bytes(8, "little") + b"{}", "no safetensors file"),
        ("no json", header(b"nonsense"), "no.*header|header that is not one"),
        ("a list", header(b"[1]"), "header that is not one"),
        (
            "wrong size",
            header(b'{"a":{"dtype":"U8","shape":[3],"data_offsets":[0,4]}}', b"abcd"),
            "its shape another number",
        ),
        (
            "unknown type",
            header(b'{"a":{"dtype":"X","shape":[4],"data_offsets":[0,4]}}', b"abcd"),
            "unknown type 'X'",
        ),
        (
            "negative",
            header(b'{"a":{"dtype":"U8","shape":[-4],"data_offsets":[4,0]}}', b"abcd"),
            "not one",
        ),
        (
            "overlapping",
            header(
                b'{"a":{"dtype":"U8","shape":[3],"data_offsets":[0,3]},'
                b'"b":{"dtype":"U8","shape":[3],"data_offsets":[1,4]}}',
                b"abcd",
            ),
            "overlaps",
        ),
        (
            "cut short",
            header(b'{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}', b"abc"),
            "cut short",
        ),
    ],
)
def test_files_that_are_no_safetensors_are_errors(
    tmp_path: Path, name: str, content: bytes, words: str
) -> None:
    path = tmp_path / "f.safetensors"
    path.write_bytes(content)
    with pytest.raises(CacheError, match=words):
        TensorReader(path)
    # Of this file: what other tests' threads have open comes and goes.
    assert os.path.realpath(path) not in {
        os.path.realpath(fd) for fd in Path("/proc/self/fd").iterdir()
    }
