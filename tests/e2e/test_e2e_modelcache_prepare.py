"""Preparation steps on a real model, in the engine's environment, the values compared there."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from folder_store import Rig

from modelcache.prepare.built_in_steps import expect_bytes
from modelcache.prepare.run import LeasedModel, Preparation
from modelcache.prepare.step_process import StepFailed
from modelcache.settings import PreparationStep

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(420)]

FIND_GGUF = "from modelcache.prepare.default_model import find_source; print(find_source())"

COMPARE_GGUF = """
import sys
import gguf, torch
from pathlib import Path
from safetensors import safe_open
source, made = sys.argv[1:]
names = {"output_norm.weight": "model.norm.weight"}
for layer in (0, 17, 29):
    for theirs, ours in (("ffn_down", "mlp.down_proj"), ("ffn_gate", "mlp.gate_proj"),
                         ("attn_v", "self_attn.v_proj"), ("attn_output", "self_attn.o_proj"),
                         ("attn_norm", "input_layernorm")):
        names[f"blk.{layer}.{theirs}.weight"] = f"model.layers.{layer}.{ours}.weight"
names["token_embd.weight"] = "model.embed_tokens.weight"
compared = 0
with safe_open(Path(made, "model.safetensors"), "pt") as file:
    for tensor in gguf.GGUFReader(source).tensors:
        if tensor.name in names:
            values = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
            ours = file.get_tensor(names[tensor.name])
            assert ours.dtype == torch.bfloat16
            assert torch.equal(values.to(torch.bfloat16), ours), tensor.name
            compared += 1
assert compared == len(names), (compared, len(names))
print("same", compared)
"""

COMPARE_CAST = """
import sys
import torch
from safetensors.torch import load_file
before, after = load_file(sys.argv[1]), load_file(sys.argv[2])
assert before.keys() == after.keys() and len(before) > 200
for name, tensor in before.items():
    assert tensor.dtype == torch.bfloat16 and after[name].dtype == torch.float16
    assert torch.equal(tensor.to(torch.float16), after[name]), name
print("same", len(before))
"""

OVERFLOW = """
import sys, torch
from safetensors.torch import save_file
save_file({"fine": torch.ones(4, dtype=torch.bfloat16),
           "large": torch.tensor([1.0, 1e6], dtype=torch.bfloat16),
           "count": torch.arange(3)}, sys.argv[1])
"""

COMPARE_F32 = """
import sys, torch
from safetensors.torch import load_file
made = load_file(sys.argv[1])
assert made["large"].dtype == torch.float32 and made["large"].tolist() == [1.0, 999424.0]
assert made["count"].dtype == torch.int64 and made["count"].tolist() == [0, 1, 2]
print("same", len(made))
"""


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(dir="/var/tmp", prefix="tidegate-prepare-"))
    yield path
    shutil.rmtree(path)


def ask(python: Path, script: str, *arguments: object) -> str:
    ran = subprocess.run(
        [python, "-I", "-c", script, *map(str, arguments)],
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-3000:]
    return ran.stdout.strip()


def make(folder: Path, python: Path, source: Path, *steps: PreparationStep) -> LeasedModel:
    return Preparation(
        cache=Rig(root=folder).cache(),
        python=python,
        environ={"PATH": os.environ["PATH"], "HOME": str(folder)},
    ).prepare(
        source, hashlib.sha256(str(source).encode()).hexdigest(), steps,
        model=str(source), revision="in place",
    )  # fmt: skip


def check_size(step: PreparationStep, source: Path, made: LeasedModel) -> None:
    """What a step was given room for is what it takes, or little more."""
    taken = sum(path.stat().st_size for path in made.model.path.rglob("*") if path.is_file())
    expected = expect_bytes(step, source)
    assert expected is not None
    assert taken <= expected <= 1.05 * taken, (step.kind, taken, expected)


def test_gguf_to_safetensors_then_cast(folder: Path, engine_python: Path) -> None:
    """The whole way, each step's values compared with those of the one before."""
    gguf = Path(ask(engine_python, FIND_GGUF))
    convert = PreparationStep(kind="gguf_to_safetensors", file=gguf.name)
    cast = PreparationStep(kind="cast", dtype="float16")
    converted = make(folder, engine_python, gguf.parent, convert)
    assert ask(engine_python, COMPARE_GGUF, gguf, converted.model.path) == "same 17"
    assert (converted.model.path / "tokenizer.json").exists()
    check_size(convert, gguf.parent, converted)

    smaller = make(folder, engine_python, gguf.parent, convert, cast)
    log = folder / "cache/prepared/logs" / f"{converted.model.url.partition('://')[2]}.log"
    assert log.read_text().count("\n$ ") == 1, "it was not converted again"
    weights = converted.model.path / "model.safetensors"
    check_size(cast, converted.model.path, smaller)
    said = ask(engine_python, COMPARE_CAST, weights, smaller.model.path / "model.safetensors")
    assert said == "same 272"
    assert '"float16"' in (smaller.model.path / "config.json").read_text()


def test_a_cast_that_would_lose_numbers_is_an_error(folder: Path, engine_python: Path) -> None:
    source = folder / "overflow"
    source.mkdir()
    (source / "config.json").write_text('{"torch_dtype": "bfloat16", "text_config": {"dtype": 1}}')
    ask(engine_python, OVERFLOW, source / "model.safetensors")
    with pytest.raises(StepFailed, match="'large' has numbers too large for float16"):
        make(folder, engine_python, source, PreparationStep(kind="cast", dtype="float16"))
    made = make(folder, engine_python, source, PreparationStep(kind="cast", dtype="float32"))
    assert ask(engine_python, COMPARE_F32, made.model.path / "model.safetensors") == "same 3"
    config = (made.model.path / "config.json").read_text()
    assert config.count('"float32"') == 2
