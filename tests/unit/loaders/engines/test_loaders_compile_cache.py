"""What engines compile, kept by combination, brought along by models, within a quota."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import pytest

from loaders.engines.base import EngineCommand
from loaders.engines.vllm.compile_cache import (
    FACTS,
    BadBundle,
    BundleKey,
    CompileCache,
    bundle_env,
    make_key,
    pack,
    sha256_of,
    size_of,
    unpack,
)
from modelcache.types import BUNDLES

ARGS = ("--model", "/m", "--port", "8000", "--max-model-len", "2048")


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """The interpreter of an environment with an engine, as its files look."""
    site = tmp_path / "env/lib/python3.11/site-packages"
    for name in ("vllm-0.32.0", "torch-2.13.0", "triton-3.5.0"):
        (site / f"{name}.dist-info").mkdir(parents=True)
    python = tmp_path / "env/bin/python"
    python.parent.mkdir()
    python.touch()
    return python


def key_of(python: Path, args: tuple[str, ...] = ARGS, **given: object) -> BundleKey:
    fields = {"model": "digest", "gpus": [("H200", "580.1")], **given}
    key = make_key(python=python, args=args, **fields)  # type: ignore[arg-type]
    assert key is not None
    return key


SAME = [
    ("another port", ("--model", "/m", "--port", "9000", "--max-model-len", "2048")),
    ("another place", ("--model", "/n", "--port", "8000", "--max-model-len", "2048")),
    ("another order", ("--max-model-len", "2048", "--port", "1")),
    ("written with =", ("--max-model-len=2048",)),
    ("underscores", ("--max_model_len", "2048")),
]


@pytest.mark.parametrize("args", [pytest.param(args, id=name) for name, args in SAME])
def test_key_is_the_same_for_what_is_compiled_the_same(python: Path, args: tuple[str, ...]) -> None:
    assert key_of(python, args) == key_of(python)


OTHER = [
    ("longer", {"args": ("--max-model-len", "4096")}),
    ("one more flag", {"args": (*ARGS, "--enforce-eager")}),
    ("another model", {"model": "other"}),
    ("another GPU", {"gpus": [("A100", "580.1")]}),
    ("another driver", {"gpus": [("H200", "590.0")]}),
    ("two GPUs", {"gpus": [("H200", "580.1"), ("H200", "580.1")]}),
    ("no GPU", {"gpus": []}),
]


@pytest.mark.parametrize("given", [pytest.param(given, id=name) for name, given in OTHER])
def test_key_differs_with_what_is_compiled(python: Path, given: dict[str, object]) -> None:
    assert key_of(python, **given).digest != key_of(python).digest  # type: ignore[arg-type]


@pytest.mark.parametrize("upgraded", ["torch-2.14.0", "vllm-0.33.0", "triton-3.6.0"])
def test_key_differs_after_an_upgrade(python: Path, upgraded: str) -> None:
    before = key_of(python)
    site = python.parent.parent / "lib/python3.11/site-packages"
    name = upgraded.partition("-")[0]
    (old,) = site.glob(f"{name}-*.dist-info")
    old.rename(site / f"{upgraded}.dist-info")
    assert key_of(python).digest != before.digest


def test_there_is_no_key_without_an_engine(tmp_path: Path) -> None:
    assert make_key(python=tmp_path / "bin/python", model="m", args=()) is None


def test_environment_points_every_cache_into_the_bundle(tmp_path: Path) -> None:
    env = bundle_env(tmp_path / "b")
    shared = env.pop("FLASHINFER_WORKSPACE_BASE")
    places = [value for name, value in env.items() if name != "VLLM_ENABLE_STARTUP_PLAN"]
    assert all(value.startswith(f"{tmp_path}/b/") for value in places)
    assert len(set(places)) == len(places) >= 4
    # One for all that are forked from the process that has imported FlashInfer.
    assert shared == bundle_env(tmp_path / "other")["FLASHINFER_WORKSPACE_BASE"]


def fill_folder(root: Path) -> None:
    (root / "vllm/torch_compile_cache/ab").mkdir(parents=True)
    (root / "vllm/torch_compile_cache/ab/graph.py").write_text("graph")
    (root / "triton").mkdir()
    kernel = root / "triton/kernel.so"
    kernel.write_bytes(bytes(range(256)) * 9)
    kernel.chmod(0o755)


def unpack_known(file: Path, root: Path, max_bytes: int) -> int:
    """As for a file whose SHA-256 the operator has given."""
    return unpack(file, root, sha256=sha256_of(file), max_bytes=max_bytes)


def bring(bundles: CompileCache, given: EngineCommand, model: Path) -> int:
    """As for a model whose bundles the operator has given the SHA-256 of."""
    trusted = {file.stem: sha256_of(file) for file in (model / BUNDLES).glob("*.tar")}
    return bundles.bring(given, model, trusted=trusted)


def test_bundle_travels_whole(tmp_path: Path) -> None:
    fill_folder(tmp_path / "here")
    (tmp_path / "here/triton/half.tmp").write_text("not done")
    (tmp_path / "here/triton/link").symlink_to("/etc/hostname")
    pack(tmp_path / "here", tmp_path / "bundle.tar")
    written = unpack_known(tmp_path / "bundle.tar", tmp_path / "there", max_bytes=1 << 20)
    assert written == size_of(tmp_path / "there") == 5 + 256 * 9
    kernel = tmp_path / "there/triton/kernel.so"
    assert kernel.read_bytes() == bytes(range(256)) * 9
    assert kernel.stat().st_mode & 0o777 == 0o700
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle.tar", "here", "there"]


def test_same_content_packs_to_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        fill_folder(tmp_path / name)
        pack(tmp_path / name, tmp_path / f"{name}.tar")
    assert (tmp_path / "one.tar").read_bytes() == (tmp_path / "two.tar").read_bytes()


def test_what_is_there_is_not_replaced(tmp_path: Path) -> None:
    fill_folder(tmp_path / "here")
    pack(tmp_path / "here", tmp_path / "bundle.tar")
    (tmp_path / "there").mkdir()
    assert unpack_known(tmp_path / "bundle.tar", tmp_path / "there", max_bytes=1 << 20) == 0
    assert list((tmp_path / "there").iterdir()) == []


def entry(name: str, kind: bytes = tarfile.REGTYPE, size: int = 1) -> tarfile.TarInfo:
    made = tarfile.TarInfo(name)
    made.type = kind
    made.size = size
    made.linkname = "/etc/passwd"
    return made


HOSTILE = [
    ("absolute", entry("/etc/cron.d/x")),
    ("climbs out", entry("a/../../x")),
    ("symbolic link", entry("x", tarfile.SYMTYPE, 0)),
    ("hard link", entry("x", tarfile.LNKTYPE, 0)),
    ("device", entry("x", tarfile.CHRTYPE, 0)),
    ("too large", entry("x", size=2_000_000)),
]


@pytest.mark.parametrize("bad", [pytest.param(bad, id=name) for name, bad in HOSTILE])
def test_hostile_bundle_is_refused_and_leaves_nothing(tmp_path: Path, bad: tarfile.TarInfo) -> None:
    with tarfile.open(tmp_path / "bundle.tar", "w") as archive:
        archive.addfile(entry("good"), io.BytesIO(b"g"))
        archive.addfile(bad, io.BytesIO(b"x" * bad.size))
    with pytest.raises(BadBundle):
        unpack_known(tmp_path / "bundle.tar", tmp_path / "there", max_bytes=1_000_000)
    assert [path.name for path in tmp_path.iterdir()] == ["bundle.tar"]


@pytest.mark.parametrize("kept", [0, 100, 700, 1500, 3000])
def test_bundle_cut_short_is_refused(tmp_path: Path, kept: int) -> None:
    fill_folder(tmp_path / "here")
    pack(tmp_path / "here", tmp_path / "bundle.tar")
    whole = (tmp_path / "bundle.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[:kept])
    with pytest.raises(BadBundle):
        unpack_known(tmp_path / "cut.tar", tmp_path / "there", max_bytes=1 << 20)
    assert not (tmp_path / "there").exists()


GPU = ("NVIDIA H100", "570.1")


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
    here.ship(given, str(model), model / BUNDLES)
    assert there.env(given, str(model))  # only noted, nothing compiled
    assert bring(there, given, model) > 0


def test_without_an_engine_nothing_is_pointed_anywhere(model: Path, tmp_path: Path) -> None:
    bundles = make(tmp_path / "nowhere/bin/python", tmp_path / "bundles")
    assert bundles.env(command(tmp_path), str(model)) == {}
    assert bring(bundles, command(tmp_path), model) == 0


def test_packed_here_it_is_unpacked_on_the_next_node(
    python: Path, model: Path, tmp_path: Path
) -> None:
    here, there = make(python, tmp_path / "here"), make(python, tmp_path / "there")
    given = command(python, "--max-model-len", "2048")
    bring(here, given, model)
    fill(here, given, model)
    file = here.ship(given, str(model), model / BUNDLES)
    assert bring(there, given, model) > 0
    place = Path(there.env(given, str(model))["TRITON_CACHE_DIR"])
    assert (place / "one.so").read_bytes() == b"kernel"
    assert bring(there, given, model) == 0, "what is there is left alone"
    assert here.ship(given, str(model), tmp_path / "again").read_bytes() == file.read_bytes()


def test_one_for_other_settings_is_not_used(python: Path, model: Path, tmp_path: Path) -> None:
    here, there = make(python, tmp_path / "here"), make(python, tmp_path / "there")
    fill(here, command(python, "--max-model-len", "2048"), model)
    here.ship(command(python, "--max-model-len", "2048"), str(model), model / BUNDLES)
    assert bring(there, command(python, "--max-model-len", "4096"), model) == 0


def test_a_damaged_one_is_said_and_not_used(
    python: Path, model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    here, there = make(python, tmp_path / "here"), make(python, tmp_path / "there")
    given = command(python)
    fill(here, given, model, bytes(100_000))
    file = here.ship(given, str(model), model / BUNDLES)
    file.write_bytes(file.read_bytes()[:5_000])
    assert bring(there, given, model) == 0
    assert "is not used" in caplog.text
    assert not Path(there.env(given, str(model))["TRITON_CACHE_DIR"]).exists()


def test_nothing_compiled_yet_is_said(python: Path, model: Path, tmp_path: Path) -> None:
    bundles = make(python, tmp_path / "bundles")
    with pytest.raises(BadBundle, match="start it once"):
        bundles.ship(command(python), str(model), tmp_path / "out")
    bring(bundles, command(python), model)
    with pytest.raises(BadBundle, match="start it once"):
        bundles.ship(command(python), str(model), tmp_path / "out")


def test_past_the_quota_what_was_not_used_for_longest_goes(
    python: Path, model: Path, tmp_path: Path
) -> None:
    bundles = make(python, tmp_path / "bundles", quota_bytes=250_000)
    folders = []
    for number in range(3):
        given = command(python, "--seed", str(number))
        bring(bundles, given, model)
        place = fill(bundles, given, model, bytes(100_000)).parent
        os.utime(place, (1_000 + number, 1_000 + number))
        folders.append(place)
    # Used again by another process: now it is the newest. What a process has given to engines it
    # does not remove itself.
    bring(make(python, tmp_path / "bundles", 250_000), command(python, "--seed", "0"), model)
    assert [folder.exists() for folder in folders] == [True, False, True]
    assert (folders[0] / FACTS).exists()


def test_the_one_in_use_stays_whatever_the_quota(python: Path, model: Path, tmp_path: Path) -> None:
    bundles = make(python, tmp_path / "bundles", quota_bytes=0)
    given = command(python)
    place = fill(bundles, given, model)
    bring(bundles, given, model)
    assert place.exists()
