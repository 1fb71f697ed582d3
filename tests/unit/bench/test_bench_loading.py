"""The loading bench: its bars, and that what it installs is not where vLLM is."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from bench import loading, loading_report


def rows(**speeds: float) -> dict[str, dict[str, list[tuple[float, float]]]]:
    return {n.replace("_", "-"): {"warm": [(speed, 0.1)] * 3} for n, speed in speeds.items()}


@pytest.mark.parametrize(("ours", "passed"), [(9.0, True), (8.9, False)])
def test_in_place_and_warm_the_best_peer_is_the_bar(ours: float, passed: bool) -> None:
    figures = rows(tidegate=ours, tidegate_unverified=99.0, vllm_lazy=9.0, runai=3.0)
    *others, in_place = loading_report.verdicts({"model": figures})
    assert in_place.passed is passed
    assert "vllm-lazy" in in_place.measured
    assert [verdict.passed for verdict in others] == [None] * 3


def test_peers_are_installed_beside_the_engine_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = tmp_path / "engine"
    packages = engine / "lib" / "python3.11" / "site-packages"
    packages.mkdir(parents=True)
    python = engine / "bin" / "python"
    python.parent.mkdir()
    python.touch()
    peers = tmp_path / "peers"
    ran: list[list[str]] = []

    def run(argv: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        ran.append(argv)
        if "venv" in argv:
            (peers / "lib" / "python3.11" / "site-packages").mkdir(parents=True)
        return subprocess.CompletedProcess(argv, 0, stdout='{"torch": "2"}')

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(loading, "ENGINE_PYTHON", python)
    monkeypatch.setattr(loading, "PEERS_FOLDER", peers)
    results = loading.Results()
    quick = loading.pythons([("model", name) for name in loading.QUICK], results)
    assert set(quick.values()) == {python}
    assert not [argv for argv in ran if "pip" in argv], "the short form installs nothing"
    found = loading.pythons([("ring", name) for name in loading.RING], results)
    ours = {name for name, runs in found.items() if runs == python}
    assert {"tidegate", "vllm-lazy", "load_file"} <= ours
    assert {"runai", "tensorizer", "fastsafetensors", "instanttensor"}.isdisjoint(ours)
    installs = [argv for argv in ran if "install" in argv]
    assert [argv[0] for argv in installs] == [str(peers / "bin" / "python")]
    assert not list(packages.iterdir())
