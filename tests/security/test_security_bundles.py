"""A model's store cannot run code here: compiled code comes with a model only where the operator
has named the file and its SHA-256."""

from __future__ import annotations

import hashlib
import io
import tarfile
from pathlib import Path

import pytest
from folder_store import PIECE, Rig, bytes_of

from loaders.engines.base import EngineCommand
from loaders.engines.vllm.compile_cache import CompileCache
from modelcache.settings import ModelCacheSettings
from modelcache.types import BUNDLES

GPU = ("NVIDIA H100", "570.1")
CODE = b"\x80\x04c__import__('os').system"


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """The interpreter of an environment with an engine, as its files look."""
    (tmp_path / "env/lib/python3.11/site-packages/vllm-0.32.0.dist-info").mkdir(parents=True)
    (tmp_path / "env/bin").mkdir()
    (tmp_path / "env/bin/python").touch()
    return tmp_path / "env/bin/python"


@pytest.fixture
def kept(tmp_path: Path, python: Path) -> CompileCache:
    directory = tmp_path / "node/bundles"
    return CompileCache(directory, python=python, quota_bytes=1 << 30, gpus=lambda: [GPU])


@pytest.fixture
def command(python: Path) -> EngineCommand:
    return EngineCommand(argv=(str(python), "-c", "launcher"))


def model_with_code(folder: Path, kept: CompileCache, command: EngineCommand) -> Path:
    """A model whose store has put a bundle of the right name beside it; the bundle."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    key = kept.key(command, str(folder))
    assert key is not None
    (folder / BUNDLES).mkdir()
    file = folder / BUNDLES / f"{key.digest}.tar"
    with tarfile.open(file, "w") as archive:
        entry = tarfile.TarInfo("inductor/fxgraph/graph")
        entry.size = len(CODE)
        archive.addfile(entry, io.BytesIO(CODE))
    return file


def code_in(kept: CompileCache) -> list[Path]:
    return [path for path in kept.directory.rglob("graph") if path.is_file()]


@pytest.mark.parametrize("files", [(), ("*",), (f"{BUNDLES}/*", "*.json")])
def test_a_bundle_that_the_settings_do_not_name_is_not_fetched(
    tmp_path: Path, files: tuple[str, ...]
) -> None:
    rig = Rig(root=tmp_path)
    one, two = "1" * 32, "2" * 32
    url = rig.put(
        "models/a",
        {
            "config.json": b"{}",
            f"{BUNDLES}/{one}.tar": bytes_of(PIECE, 1),
            f"{BUNDLES}/{two}.tar": bytes_of(PIECE, 2),
            f"{BUNDLES}/x.so": b"code",
        },
    )
    given = {"files": {url: files}} if files else {}
    model = rig.cache("a", **given).preload(url)
    assert [path.name for path in model.path.rglob("*")] == ["config.json"]
    assert rig.fetched_bytes == 2
    named = rig.cache("a", **given, bundles={f"{url}/": {two: "0" * 64}})
    # Also for a model that is here already, asked for by its exact revision.
    model = named.preload(url, revision=model.revision)
    assert sorted(path.name for path in (model.path / BUNDLES).iterdir()) == [f"{two}.tar"]


def test_a_bundle_is_not_used_unless_the_settings_give_its_sha256(
    tmp_path: Path,
    kept: CompileCache,
    command: EngineCommand,
    caplog: pytest.LogCaptureFixture,
) -> None:
    file = model_with_code(tmp_path / "model", kept, command)
    model, sha256 = file.parent.parent, hashlib.sha256(file.read_bytes()).hexdigest()
    for trusted in ({}, {"f" * 32: sha256}, {file.stem: "0" * 64}):
        caplog.clear()
        assert kept.bring(command, model, trusted=trusted) == 0
        assert code_in(kept) == []
        assert "is not used" in caplog.text
        assert "modelcache.bundles" in caplog.text
    assert kept.bring(command, model, trusted={file.stem: sha256}) == len(CODE)
    assert len(code_in(kept)) == 1


@pytest.mark.parametrize(
    "given",
    [
        {"no scheme at all://": {"1" * 32: "0" * 64}},
        {"s3://bucket/m": {"../../x": "0" * 64}},
        {"s3://bucket/m": {"1" * 32: "sha256"}},
        {"s3://bucket/m": {"1" * 32: ""}},
    ],
)
def test_a_bundle_is_named_exactly(given: dict[str, dict[str, str]]) -> None:
    with pytest.raises(ValueError, match="bundles"):
        ModelCacheSettings.model_validate({"bundles": given})
    ModelCacheSettings.model_validate({"bundles": {"s3://bucket/m": {"1" * 32: "0" * 64}}})


def test_what_others_could_write_to_is_not_run(
    tmp_path: Path,
    kept: CompileCache,
    command: EngineCommand,
    caplog: pytest.LogCaptureFixture,
) -> None:
    file = model_with_code(tmp_path / "model", kept, command)
    model = str(file.parent.parent)
    folder = Path(kept.env(command, model)["TORCHINDUCTOR_CACHE_DIR"]).parent
    (folder / "inductor").mkdir()
    (folder / "inductor/graph").write_bytes(CODE)
    # Below a folder that nobody else can enter the modes that engines give do not matter.
    (folder / "inductor").chmod(0o777)
    kept.env(command, model)
    assert len(code_in(kept)) == 1
    # As an earlier version left it: with nothing that others could write to it stays.
    (folder / "inductor").chmod(0o755)
    folder.chmod(0o755)
    kept.env(command, model)
    assert len(code_in(kept)) == 1
    assert folder.stat().st_mode & 0o777 == 0o700
    (folder / "inductor").chmod(0o777)
    folder.chmod(0o755)
    kept.env(command, model)
    assert code_in(kept) == []
    assert "others could write" in caplog.text
