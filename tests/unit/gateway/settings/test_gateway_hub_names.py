"""Which pools have a hub's model fetched into the cache, and which leave that to the engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gateway.settings.load import load
from gateway.settings.schema import Settings, through_cache


def settings(model: str, *args: str, **fields: Any) -> Settings:
    pool = {"name": "p", "engine": "vllm", "model": model, "engine_args": args}
    given = {"pools": [{**pool, **fields.pop("pool", {})}], **fields}
    return Settings.model_validate(given)


def model_of(given: Settings, *directories: str) -> str | None:
    seen = through_cache(given, is_directory=lambda name: name in directories)
    return seen.pools[0].model


@pytest.mark.parametrize(
    ("model", "args", "meant"),
    [
        ("Qwen/Qwen3-8B", (), "hf://Qwen/Qwen3-8B"),
        ("Qwen/Qwen3-8B@v1", (), "hf://Qwen/Qwen3-8B@v1"),
        ("Qwen/Qwen3-8B", ("--dtype", "bfloat16"), "hf://Qwen/Qwen3-8B"),
        ("hf://Qwen/Qwen3-8B", (), "hf://Qwen/Qwen3-8B"),
        ("s3://models/qwen", (), "s3://models/qwen"),
        ("/models/qwen", (), "/models/qwen"),
        ("./qwen", (), "./qwen"),
        ("gpt2", (), "gpt2"),
        ("unsloth/Qwen3-8B-GGUF:Q4_K_M", (), "unsloth/Qwen3-8B-GGUF:Q4_K_M"),
        ("models/here", (), "models/here"),  # a directory
        ("Qwen/Qwen3-8B", ("--revision", "v1"), "Qwen/Qwen3-8B"),
        ("Qwen/Qwen3-8B", ("--revision=v1",), "Qwen/Qwen3-8B"),
        ("Qwen/Qwen3-8B", ("--download_dir", "/data"), "Qwen/Qwen3-8B"),
        ("Qwen/Qwen3-8B", ("--tokenizer", "org/tokens"), "Qwen/Qwen3-8B"),
        ("Qwen/Qwen3-8B", ("--speculative-config", '{"model": "org/eagle"}'), "Qwen/Qwen3-8B"),
        ("Qwen/Qwen3-8B", ("--speculative-config.model=org/eagle",), "Qwen/Qwen3-8B"),
        ("Qwen/Qwen3-8B", ("--lora-modules", "a=org/lora"), "Qwen/Qwen3-8B"),
        ("Qwen/Qwen3-8B", ("--tokenizer-mode", "slow"), "hf://Qwen/Qwen3-8B"),
        ("Qwen/Qwen3-8B", ("--load-format", "npcache"), "Qwen/Qwen3-8B"),
        ("Qwen/Qwen3-8B", ("--load-format", "dummy"), "Qwen/Qwen3-8B"),
        ("Qwen/Qwen3-8B", ("--load-format=dummy",), "Qwen/Qwen3-8B"),
        ("Qwen/Qwen3-8B", ("--load-format", "auto"), "hf://Qwen/Qwen3-8B"),
    ],
)
def test_what_a_model_means(model: str, args: tuple[str, ...], meant: str) -> None:
    assert model_of(settings(model, *args), "models/here") == meant


def test_pools_that_are_left_alone() -> None:
    name = "Qwen/Qwen3-8B"
    assert model_of(settings(name, pool={"engine": "simulated"})) == name
    assert model_of(settings(name, loaders={"load_format": "dummy"})) == name
    assert model_of(settings(name, modelcache={"hub_names": False})) == name
    for variable in ("HF_TOKEN", "HF_ENDPOINT", "VLLM_USE_MODELSCOPE", "HUGGING_FACE_HUB_TOKEN"):
        assert model_of(settings(name, pool={"env": {variable: "1"}})) == name
    assert model_of(settings(name, pool={"env": {"VLLM_X": "1"}})) == f"hf://{name}"
    static = {
        "name": "p",
        "backend": "static",
        "model": name,
        "static": {"urls": ["http://127.0.0.1:1"]},
    }
    assert model_of(Settings.model_validate({"pools": [static]})) == name


def test_settings_are_loaded_that_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "here").mkdir(parents=True)
    config = tmp_path / "tidegate.toml"
    pool = '[[pools]]\nname = "{}"\nengine = "vllm"\nmodel = "org/{}"\n'
    config.write_text(pool.format("a", "here") + pool.format("b", "there"))
    loaded = load(config, {})
    assert [one.model for one in loaded.settings.pools] == ["org/here", "hf://org/there"]
    assert loaded.origins["pools.1.model"].startswith(str(config))  # where it was written
    off = load(config, {"TIDEGATE__MODELCACHE__HUB_NAMES": "false"})
    assert [one.model for one in off.settings.pools] == ["org/here", "org/there"]
