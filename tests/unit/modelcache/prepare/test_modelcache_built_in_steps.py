"""The built-in steps as far as they need no torch: what a cast does not convert stays as it is."""

from __future__ import annotations

import json
import os
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest

from modelcache.prepare.built_in_steps import cast, main, read_index
from modelcache.types import CacheError

TENSORS = {
    "__metadata__": {"format": "pt"},
    "b": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]},
    "a": {"dtype": "I64", "shape": [2], "data_offsets": [12, 28]},
    "empty": {"dtype": "F32", "shape": [0, 4], "data_offsets": [28, 28]},
}
DATA = bytes(range(28))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    text = json.dumps(TENSORS).encode()
    for name in ("model-1.safetensors", "model-2.safetensors"):
        (folder / name).write_bytes(len(text).to_bytes(8, "little") + text + DATA)
    (folder / "config.json").write_text('{"torch_dtype": "float32", "text_config": {"dtype": 1}}')
    (folder / "sub/tokenizer.json").write_text("{}")
    (folder / "pytorch_model.bin").write_text("never copied")
    return folder


def test_what_a_cast_does_not_convert_stays_as_it_is(model: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    cast(model, target, "bfloat16")
    made = target / "model-1.safetensors"
    index = read_index(made)
    assert [(one.name, one.dtype, one.shape) for one in index.tensors] == [
        ("b", "BF16", (2, 3)), ("a", "I64", (2,)), ("empty", "BF16", (0, 4)),
    ]  # fmt: skip
    assert made.read_bytes()[index.header_end :] == DATA
    assert index.metadata == {"format": "pt"}
    config = json.loads((target / "config.json").read_text())
    assert config == {"torch_dtype": "bfloat16", "text_config": {"dtype": "bfloat16"}}
    assert sorted(path.name for path in target.rglob("*")) == [
        "config.json", "model-1.safetensors", "model-2.safetensors", "sub", "tokenizer.json",
    ]  # fmt: skip


def test_an_interrupted_cast_keeps_the_files_that_are_whole(model: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    cast(model, target, "bfloat16")
    kept = target / "model-1.safetensors"
    before = kept.stat().st_ino
    (target / "model-2.safetensors").rename(target / ".model-2.safetensors.partial")
    cast(model, target, "bfloat16")
    assert kept.stat().st_ino == before
    assert (target / "model-2.safetensors").read_bytes() == kept.read_bytes()


def test_a_model_that_cannot_be_cast_is_an_error(model: Path, tmp_path: Path) -> None:
    arguments = ["cast", str(model), str(tmp_path / "out"), "--dtype", "bfloat16"]
    (model / "config.json").write_text('{"quantization_config": {"bits": 4}}')
    with pytest.raises(CacheError, match="quantized"):
        cast(model, tmp_path, "bfloat16")
    assert main(arguments) == 1
    (model / "config.json").write_text('{"a":' * 50_000)
    assert main(arguments) == 1
    (model / "config.json").write_text("{}")
    (model / "model.safetensors.index.json").write_text("[" * 50_000)
    assert main([*arguments[:2], str(tmp_path / "deep"), *arguments[3:]]) == 1
    (model / "model-1.safetensors").write_bytes(b"nonsense")
    assert main(arguments) == 1


def test_a_file_that_is_none_is_named(model: Path, tmp_path: Path) -> None:
    (model / "model-1.safetensors").write_bytes(b"nonsense, and more of it")
    with pytest.raises(CacheError, match=r"in/model-1\.safetensors: "):
        cast(model, tmp_path / "out", "bfloat16")


def test_a_file_that_is_cut_short_while_it_is_cast_gives_no_result(tmp_path: Path) -> None:
    source, target = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    target.mkdir()
    size = 1 << 20
    tensors = {
        name: {"dtype": "U8", "shape": [size], "data_offsets": [at * size, (at + 1) * size]}
        for at, name in enumerate(("a", "b"))
    }
    text = json.dumps(tensors).encode()
    file = source / "model.safetensors"
    file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(2 * size))
    (source / "config.json").write_text("{}")

    class Cutting(StringIO):
        """Cuts the file when the step says that it has the first tensor."""

        def write(self, line: str) -> int:
            os.truncate(file, size + size // 2)
            return super().write(line)

    with redirect_stdout(Cutting()), pytest.raises(CacheError, match=r"model\.safetensors: cut"):
        cast(source, target, "bfloat16")
    assert not (target / file.name).exists()
