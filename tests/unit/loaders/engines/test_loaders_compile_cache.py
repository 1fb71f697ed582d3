"""What engines compile, kept by combination, brought along by models, within a quota."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from loaders.engines.base import EngineCommand
from loaders.engines.vllm.compile_cache import FACTS, SHIPPED, BadBundle, CompileCache

GPU = ("NVIDIA H100", "570.1")


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """The interpreter of an environment with a vLLM in it."""
    root = tmp_path / "venv"
    (root / "lib/python3.11/site-packages/vllm-0.32.0.dist-info").mkdir(parents=True)
    (root / "bin").mkdir()
    (root / "bin/python").touch()
    return root / "bin/python"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    return folder


def make(python: Path, directory: Path, quota_bytes: int = 1 << 20) -> CompileCache:
    return CompileCache(directory, python=python, quota_bytes=quota_bytes, gpus=lambda: [GPU])


def command(python: Path, *args: str) -> EngineCommand:
    return EngineCommand(argv=(str(python), "-c", "launcher", *args))


def fill(bundles: CompileCache, given: EngineCommand, model: Path, data: bytes = b"kernel") -> Path:
    """As an engine does: into the folder its environment names."""
    folder = Path(bundles.env(given, str(model))["TRITON_CACHE_DIR"])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "one.so").write_bytes(data)
    return folder


def test_settings_that_matter_make_another_folder(
    python: Path, model: Path, tmp_path: Path
) -> None:
    bundles = make(python, tmp_path / "bundles")
    one = bundles.env(command(python, "--port", "1", "--max-model-len", "2048"), str(model))
    same = bundles.env(command(python, "--port", "2", "--max-model-len", "2048"), str(model))
    other = bundles.env(command(python, "--port", "1", "--max-model-len", "4096"), str(model))
    assert one == same
    assert one["VLLM_CACHE_ROOT"] != other["VLLM_CACHE_ROOT"]
    assert one["VLLM_ENABLE_STARTUP_PLAN"] == "1"


def test_a_model_of_the_same_shape_elsewhere_is_the_same(
    python: Path, model: Path, tmp_path: Path
) -> None:
    bundles = make(python, tmp_path / "bundles")
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    (moved / "config.json").write_bytes((model / "config.json").read_bytes())
    given = command(python, "--dtype", "bfloat16")
    assert bundles.env(given, str(model)) == bundles.env(given, str(moved))
    (moved / "config.json").write_text("{}")
    assert bundles.env(given, str(model)) != bundles.env(given, str(moved))


@pytest.mark.parametrize(
    ("args", "env"),
    [(("-O3",), {}), (("-tp", "2"), {}), ((), {"VLLM_ATTENTION_BACKEND": "FLASHINFER"})],
)
def test_short_flags_and_the_pool_s_own_variables_matter_too(
    python: Path, model: Path, tmp_path: Path, args: tuple[str, ...], env: dict[str, str]
) -> None:
    bundles = make(python, tmp_path / "bundles")
    plain = ("--load-format", "tidegate")
    first = bundles.env(command(python, *plain), str(model))
    assert bundles.env(command(python, *plain, *args), str(model), env) != first


def test_gpus_that_cannot_be_told_now_are_asked_again(
    python: Path, model: Path, tmp_path: Path
) -> None:
    told: list[list[tuple[str, str]] | None] = [[GPU], None]
    bundles = CompileCache(tmp_path / "b", python=python, quota_bytes=1, gpus=lambda: told.pop())
    assert bundles.env(command(python), str(model)) == {}
    assert bundles.env(command(python), str(model)) != {}


def test_what_a_fork_server_was_told_of_does_not_keep_a_shipped_one_out(
    python: Path, model: Path, tmp_path: Path
) -> None:
    here, there = make(python, tmp_path / "here"), make(python, tmp_path / "there")
    given = command(python)
    fill(here, given, model)
    here.ship(given, str(model), model / SHIPPED)
    assert there.env(given, str(model))  # only noted, nothing compiled
    assert there.bring(given, model) > 0


def test_without_an_engine_nothing_is_pointed_anywhere(model: Path, tmp_path: Path) -> None:
    bundles = make(tmp_path / "nowhere/bin/python", tmp_path / "bundles")
    assert bundles.env(command(tmp_path), str(model)) == {}
    assert bundles.bring(command(tmp_path), model) == 0


def test_packed_here_it_is_unpacked_on_the_next_node(
    python: Path, model: Path, tmp_path: Path
) -> None:
    here, there = make(python, tmp_path / "here"), make(python, tmp_path / "there")
    given = command(python, "--max-model-len", "2048")
    here.bring(given, model)
    fill(here, given, model)
    file = here.ship(given, str(model), model / SHIPPED)
    assert there.bring(given, model) > 0
    place = Path(there.env(given, str(model))["TRITON_CACHE_DIR"])
    assert (place / "one.so").read_bytes() == b"kernel"
    assert there.bring(given, model) == 0, "what is there is left alone"
    assert here.ship(given, str(model), tmp_path / "again").read_bytes() == file.read_bytes()


def test_one_for_other_settings_is_not_used(python: Path, model: Path, tmp_path: Path) -> None:
    here, there = make(python, tmp_path / "here"), make(python, tmp_path / "there")
    fill(here, command(python, "--max-model-len", "2048"), model)
    here.ship(command(python, "--max-model-len", "2048"), str(model), model / SHIPPED)
    assert there.bring(command(python, "--max-model-len", "4096"), model) == 0


def test_a_damaged_one_is_said_and_not_used(
    python: Path, model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    here, there = make(python, tmp_path / "here"), make(python, tmp_path / "there")
    given = command(python)
    fill(here, given, model, bytes(100_000))
    file = here.ship(given, str(model), model / SHIPPED)
    file.write_bytes(file.read_bytes()[:5_000])
    assert there.bring(given, model) == 0
    assert "is not used" in caplog.text
    assert not Path(there.env(given, str(model))["TRITON_CACHE_DIR"]).exists()


def test_nothing_compiled_yet_is_said(python: Path, model: Path, tmp_path: Path) -> None:
    bundles = make(python, tmp_path / "bundles")
    with pytest.raises(BadBundle, match="start it once"):
        bundles.ship(command(python), str(model), tmp_path / "out")
    bundles.bring(command(python), model)
    with pytest.raises(BadBundle, match="start it once"):
        bundles.ship(command(python), str(model), tmp_path / "out")


def test_past_the_quota_what_was_not_used_for_longest_goes(
    python: Path, model: Path, tmp_path: Path
) -> None:
    bundles = make(python, tmp_path / "bundles", quota_bytes=250_000)
    folders = []
    for number in range(3):
        given = command(python, "--seed", str(number))
        bundles.bring(given, model)
        place = fill(bundles, given, model, bytes(100_000)).parent
        os.utime(place, (1_000 + number, 1_000 + number))
        folders.append(place)
    # Used again by another process: now it is the newest. What a process has given to engines it
    # does not remove itself.
    make(python, tmp_path / "bundles", 250_000).bring(command(python, "--seed", "0"), model)
    assert [folder.exists() for folder in folders] == [True, False, True]
    assert (folders[0] / FACTS).exists()


def test_the_one_in_use_stays_whatever_the_quota(python: Path, model: Path, tmp_path: Path) -> None:
    bundles = make(python, tmp_path / "bundles", quota_bytes=0)
    given = command(python)
    place = fill(bundles, given, model)
    bundles.bring(given, model)
    assert place.exists()
