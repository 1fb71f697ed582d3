"""Bundles of compiled artefacts: which combination they belong to, and how they travel."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest

from loaders.engines.vllm.compile_cache import (
    BadBundle,
    BundleKey,
    bundle_env,
    make_key,
    pack,
    size_of,
    unpack,
)

ARGS = ("--model", "/m", "--port", "8000", "--max-model-len", "2048")


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """The interpreter of an environment with an engine, as its files look."""
    site = tmp_path / "env/lib/python3.11/site-packages"
    for name in ("vllm-0.32.0", "torch-2.13.0", "triton-3.5.0"):
        (site / f"{name}.dist-info").mkdir(parents=True)
    return tmp_path / "env/bin/python"


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


def fill(root: Path) -> None:
    (root / "vllm/torch_compile_cache/ab").mkdir(parents=True)
    (root / "vllm/torch_compile_cache/ab/graph.py").write_text("graph")
    (root / "triton").mkdir()
    kernel = root / "triton/kernel.so"
    kernel.write_bytes(bytes(range(256)) * 9)
    kernel.chmod(0o755)


def test_bundle_travels_whole(tmp_path: Path) -> None:
    fill(tmp_path / "here")
    (tmp_path / "here/triton/half.tmp").write_text("not done")
    (tmp_path / "here/triton/link").symlink_to("/etc/hostname")
    pack(tmp_path / "here", tmp_path / "bundle.tar")
    written = unpack(tmp_path / "bundle.tar", tmp_path / "there", max_bytes=1 << 20)
    assert written == size_of(tmp_path / "there") == 5 + 256 * 9
    kernel = tmp_path / "there/triton/kernel.so"
    assert kernel.read_bytes() == bytes(range(256)) * 9
    assert kernel.stat().st_mode & 0o777 == 0o755
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle.tar", "here", "there"]


def test_same_content_packs_to_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        fill(tmp_path / name)
        pack(tmp_path / name, tmp_path / f"{name}.tar")
    assert (tmp_path / "one.tar").read_bytes() == (tmp_path / "two.tar").read_bytes()


def test_what_is_there_is_not_replaced(tmp_path: Path) -> None:
    fill(tmp_path / "here")
    pack(tmp_path / "here", tmp_path / "bundle.tar")
    (tmp_path / "there").mkdir()
    assert unpack(tmp_path / "bundle.tar", tmp_path / "there", max_bytes=1 << 20) == 0
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
        unpack(tmp_path / "bundle.tar", tmp_path / "there", max_bytes=1_000_000)
    assert [path.name for path in tmp_path.iterdir()] == ["bundle.tar"]


@pytest.mark.parametrize("kept", [0, 100, 700, 1500, 3000])
def test_bundle_cut_short_is_refused(tmp_path: Path, kept: int) -> None:
    fill(tmp_path / "here")
    pack(tmp_path / "here", tmp_path / "bundle.tar")
    whole = (tmp_path / "bundle.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[:kept])
    with pytest.raises(BadBundle):
        unpack(tmp_path / "cut.tar", tmp_path / "there", max_bytes=1 << 20)
    assert not (tmp_path / "there").exists()
