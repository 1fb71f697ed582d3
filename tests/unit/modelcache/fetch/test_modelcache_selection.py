"""Which files of a listing make a model: its weights once, and all of them."""

from __future__ import annotations

import json

import pytest

from modelcache.fetch.selection import narrow, select_files
from modelcache.types import Listing, NotFound, RemoteFile, SourceError

INDEX = "model.safetensors.index.json"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
SMALL = ("config.json", "tokenizer.json", INDEX)


def listing(*paths: str) -> tuple[RemoteFile, ...]:
    return tuple(RemoteFile(path=path, size_bytes=1) for path in paths)


def chosen(*paths: str, named: tuple[str, ...] = SHARDS) -> set[str]:
    index = json.dumps({"weight_map": {f"t{at}": name for at, name in enumerate(named)}})
    return {file.path for file in select_files(listing(*paths), read=lambda file: index.encode())}


FILES = listing("a.safetensors", "b.bin", "c.json", "d/e.pt", "d/f.txt")


@pytest.mark.parametrize(
    ("include", "exclude", "wanted"),
    [
        ((), (), "a.safetensors c.json d/f.txt"),
        ((), ("*.json", "d/*"), "a.safetensors"),
        (("*.bin", "*.pt"), (), "b.bin d/e.pt"),
        (("*",), ("*.pt",), "a.safetensors b.bin c.json d/f.txt"),
        (("none",), (), ""),
    ],
)
def test_files_are_chosen_by_patterns_and_pickles_only_when_asked_for(
    include: tuple[str, ...], exclude: tuple[str, ...], wanted: str
) -> None:
    assert " ".join(file.path for file in select_files(FILES, include, exclude)) == wanted


def test_what_other_runtimes_read_is_not_wanted_beside_safetensors() -> None:
    others = (
        "flax_model.msgpack", "tf_model.h5", "rust_model.ot", "onnx/model_q4.onnx",
        "onnx/model.onnx_data", "onnx/model.onnx_data_1", "openvino/openvino_model.bin",
        "openvino/openvino_model.xml", "gguf/model-q4.gguf",
        "coreml/text.mlpackage/Data/weights/weight.data",
    )  # fmt: skip
    kept = ("config.json", "model.safetensors", "gguf/README.md", "onnx/README.md")
    chosen = select_files(listing(*kept, *others))
    assert {file.path for file in chosen} == set(kept)
    assert len(select_files(listing("config.json", *others))) == len(others) + 1
    assert len(select_files(listing(*kept, *others), include=("*",))) == len(kept) + len(others)


def test_pickles_are_wanted_of_a_model_that_has_nothing_else() -> None:
    assert len(select_files(listing("pytorch_model.bin", "config.json"))) == 2


@pytest.mark.parametrize(
    "twice",
    [
        ("consolidated.safetensors",),
        ("consolidated-00001-of-00002.safetensors", "consolidated-00002-of-00002.safetensors",
         "consolidated.safetensors.index.json"),
        ("original/model-00001-of-00001.safetensors", "original/config.json"),
        ("model.safetensors",),
        ("model.fp16.safetensors",),
        ("model.fp16-00001-of-00002.safetensors", "model.fp16.safetensors.index.json"),
        ("pytorch_model-00001-of-00002.bin", "model-q4.gguf", "original/consolidated.00.pth"),
    ],
)  # fmt: skip
def test_weights_that_an_index_does_not_name_are_not_wanted(twice: tuple[str, ...]) -> None:
    assert chosen(*SMALL, *SHARDS, *twice) == {*SMALL, *SHARDS}


@pytest.mark.parametrize(
    ("paths", "wanted"),
    [
        # Without an index: the usual name before Mistral's own, one precision, not the original.
        (("model.safetensors", "consolidated.safetensors"), {"model.safetensors"}),
        (("model.safetensors", "model.fp16.safetensors"), {"model.safetensors"}),
        (("model.safetensors", "original/model.safetensors"), {"model.safetensors"}),
        # What nothing else has stays.
        (("consolidated.safetensors", "params.json"), {"consolidated.safetensors", "params.json"}),
        (("original/a.safetensors",), {"original/a.safetensors"}),
        (("model.fp16.safetensors",), {"model.fp16.safetensors"}),
        (("model.safetensors", "adapter_model.safetensors"),
         {"model.safetensors", "adapter_model.safetensors"}),
        # Parts of a model in folders of their own.
        (("model.safetensors", "2_Dense/model.safetensors", "2_Dense/config.json"),
         {"model.safetensors", "2_Dense/model.safetensors", "2_Dense/config.json"}),
        (("vae/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.fp16.safetensors",
          "text_encoder/model.safetensors"),
         {"vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"}),
        (("__init__.py", "model.safetensors"), {"__init__.py", "model.safetensors"}),
    ],
)  # fmt: skip
def test_weights_are_wanted_once_without_an_index_too(
    paths: tuple[str, ...], wanted: set[str]
) -> None:
    assert chosen(*paths) == wanted


def test_an_index_names_files_below_its_own_folder() -> None:
    named = ("parts/a.safetensors", "parts/b.safetensors")
    assert chosen("config.json", INDEX, *named, named=named) == {"config.json", INDEX, *named}
    below = [f"llm/{name}" for name in (INDEX, *SHARDS)]
    assert chosen("config.json", *below, "llm/consolidated.safetensors") == {"config.json", *below}


@pytest.mark.parametrize(
    "paths",
    [
        (*SMALL, SHARDS[0]),
        (*SMALL, SHARDS[0], "model.safetensors"),
        ("config.json", SHARDS[1]),
        ("model-00000-of-00003.safetensors", "model-00002-of-00003.safetensors"),
    ],
)
def test_a_shard_that_is_missing_is_said_before_anything_is_fetched(paths: tuple[str, ...]) -> None:
    with pytest.raises(NotFound, match=r"model-0000\d-of-0000\d"):
        chosen(*paths)


def test_shards_that_the_operator_leaves_out_are_not_missed() -> None:
    files = listing("config.json", *SHARDS)
    assert len(select_files(files, exclude=(SHARDS[1],))) == 2
    assert len(select_files(files[:2], include=("*",))) == 2


def test_gguf_is_wanted_where_a_step_reads_it() -> None:
    files = listing("model.safetensors", "q4.gguf")
    assert len(select_files(files, gguf=True)) == 2
    assert len(select_files(files)) == 1


@pytest.mark.parametrize(
    "index", [b"", b"[]", b'{"weight_map": {}}', b'{"weight_map": {"a": "../x"}}', b"[" * 100_000]
)
def test_an_index_that_is_none_is_named(index: bytes) -> None:
    given = Listing(revision="1", files=listing(*SMALL, *SHARDS))
    with pytest.raises(SourceError, match=r"hf://org/m: model\.safetensors\.index\.json"):
        narrow(given, "hf://org/m", None, (), (), read=lambda file: index)
