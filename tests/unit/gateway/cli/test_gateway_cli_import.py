"""``tidegate import``: what it reads, prints and refuses."""

from __future__ import annotations

import io
import json
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from autoscaler.operator.model_pool import parse_spec
from gateway.cli import main
from gateway.cli.base import Effects
from gateway.cli.cluster.import_resources import MOST_BYTES, to_toml
from gateway.settings.schema import Settings
from modelcache.settings import ModelCacheSettings

NOW_S = 1_796_072_000.0  # 2026-11-30 20:53 UTC
AHPA = """\
apiVersion: autoscaling.alibabacloud.com/v1beta1
kind: AdvancedHorizontalPodAutoscaler
metadata:
  name: qwen
  namespace: models
spec:
  scaleStrategy: auto
  scaleTargetRef: {apiVersion: apps/v1, kind: Deployment, name: qwen}
  metrics:
  - {type: Resource, resource: {name: gpu, target: {type: Utilization, averageUtilization: 70}}}
  minReplicas: 1
  maxReplicas: 4
  instanceBounds:
  - startTime: 2021-12-16 00:00:00
    endTime: "2026-11-30 23:00:00"
    bounds: [{cron: "* 9-17 ? * MON-FRI", minReplicas: 2, maxReplicas: 4}]
"""
FLUID = """\
apiVersion: data.fluid.io/v1alpha1
kind: Dataset
metadata: {name: llm}
spec:
  mounts: [{mountPoint: "s3://models/llm", name: llm, options: {aws.region: eu-1}}]
---
apiVersion: data.fluid.io/v1alpha1
kind: AlluxioRuntime
metadata: {name: llm}
spec:
  tieredstore: {levels: [{mediumtype: SSD, path: /mnt/a, quota: 1Gi}]}
---
apiVersion: data.fluid.io/v1alpha1
kind: DataLoad
metadata: {name: llm}
spec: {dataset: {name: llm}, target: [{path: /llm/qwen}]}
---
apiVersion: data.fluid.io/v1alpha1
kind: DataProcess
metadata: {name: llm}
spec:
  dataset: {name: llm, mountPath: /data, subPath: qwen}
  processor: {script: {command: [sh], source: "quantize /data"}}
"""


def run(*words: str) -> int:
    return main.main(["import", *words], Effects(now_s=lambda: NOW_S))


@pytest.fixture
def ahpa(tmp_path: Path) -> str:
    (tmp_path / "ahpa.yaml").write_text(AHPA)
    return str(tmp_path / "ahpa.yaml")


@pytest.fixture
def fluid(tmp_path: Path) -> str:
    (tmp_path / "fluid.yaml").write_text(FLUID)
    return str(tmp_path / "fluid.yaml")


def test_a_model_pool_on_standard_output_and_its_fields_on_standard_error(
    ahpa: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("ahpa", ahpa) == 0
    said = capsys.readouterr()
    pool = yaml.safe_load(said.out)
    assert (pool["kind"], pool["metadata"]["namespace"]) == ("ModelPool", "models")
    spec = parse_spec(pool)
    assert spec.max_replicas == 4
    assert spec.targets.gpu_utilization_fraction == 0.7
    lines = said.err.splitlines()
    assert "AdvancedHorizontalPodAutoscaler/qwen" in lines
    (line,) = (one for one in lines if one.startswith("spec.instanceBounds[0].endTime"))
    assert "not supported" in line
    assert "kept" in lines[-1]


def test_several_from_standard_input_with_the_zone_of_their_bounds(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = AHPA.replace("2021-12-16 00:00:00", "'2021-12-16 00:00:00'")
    one = yaml.safe_load(text.replace('endTime: "2026', 'endTime: "2036'))
    other = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "c"}}
    listed = {"apiVersion": "v1", "kind": "List", "items": [one, other, one]}
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(json.dumps(listed).encode())))
    assert run("ahpa", "-", "--timezone", "Asia/Shanghai") == 0
    said = capsys.readouterr()
    pools = list(yaml.safe_load_all(said.out))
    assert len(pools) == 2
    assert pools[0]["spec"]["schedules"][0]["timezone"] == "Asia/Shanghai"
    assert "not read: ConfigMap/c" in said.err


def test_the_end_of_bounds_is_in_their_zone(ahpa: str, capsys: pytest.CaptureFixture[str]) -> None:
    def schedules(zone: str) -> Any:
        assert run("ahpa", ahpa, "--timezone", zone, "--json") == 0
        return json.loads(capsys.readouterr().out)["model_pools"][0]["spec"].get("schedules")

    # 2026-11-30 20:53 UTC is on the next day in Shanghai.
    assert schedules("UTC")
    assert schedules("Asia/Shanghai") is None


def test_settings_of_pools_are_those_that_are_read(
    ahpa: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("ahpa", ahpa, "--toml") == 0
    (pool,) = Settings.model_validate(tomllib.loads(capsys.readouterr().out)).pools
    assert (pool.name, pool.backend, pool.max_replicas) == ("qwen", "kubernetes", 4)
    assert pool.kubernetes.namespace == "models"
    assert pool.schedules[0].min_replicas == 2
    assert pool.targets.gpu_utilization_fraction == 0.7


def test_a_patch_of_the_agents_with_what_else_there_is_in_comments(
    fluid: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("fluid", fluid) == 0
    said = capsys.readouterr()
    patch = yaml.safe_load(said.out)
    assert (patch["kind"], patch["metadata"]["name"]) == ("DaemonSet", "tidegate-cache-agent")
    comments = [line[1:].strip() for line in said.out.splitlines() if line.startswith("#")]
    assert "tidegate model preload s3://models/llm/qwen" in comments
    commented = [line[4:] for line in said.out.splitlines() if line.startswith("#   ")]
    text = "\n".join(line for line in commented if not line.startswith("tidegate"))
    assert tomllib.loads(text)["modelcache"]["steps"]
    assert "Dataset/llm" in said.err


def test_settings_of_the_agents_are_those_that_are_read(
    fluid: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("fluid", fluid, "--toml") == 0
    found = tomllib.loads(capsys.readouterr().out)["modelcache"]
    settings = ModelCacheSettings.model_validate(found)
    assert settings.quota_bytes == 2**30
    (step,) = settings.steps_for("s3://models/llm/qwen")
    assert step.argv == ("sh", "-c", "quantize {input}")


def test_json_of_fluid(fluid: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("fluid", fluid, "--json") == 0
    said = capsys.readouterr()
    found = json.loads(said.out)
    assert found["models"] == ["s3://models/llm"]
    assert found["commands"] == ["tidegate model preload s3://models/llm/qwen"]
    assert {one["outcome"] for one in found["fields"]} >= {"kept", "changed"}
    assert said.err == ""


def test_a_dataset_that_needs_nothing_of_the_agents(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = FLUID.partition("---")[0].replace(", options: {aws.region: eu-1}", "")
    (tmp_path / "f.yaml").write_text(text)
    assert run("fluid", "f.yaml") == 0
    out = capsys.readouterr().out
    assert list(yaml.safe_load_all(out)) == []
    assert "tidegate model preload s3://models/llm" in out


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["AdvancedHorizontalPodAutoscaler", "nothing"]),
        (FLUID, ["AdvancedHorizontalPodAutoscaler", "only", "Dataset"]),
        ("a: [", ["line 1", "YAML"]),
        ("[" * 5_000, ["YAML"]),
        ("a: &a [1]\nb: *a\n", ["line 2", "anchors"]),
        ("- kind: x\n", ["document 1", "no resource"]),
        ("!!python/object/apply:os.system [id]", ["YAML"]),
        ("a: \x00", ["YAML"]),
        (AHPA.replace("maxReplicas: 4\n  i", "maxReplicas: x\n  i"), ["spec.maxReplicas", "'x'"]),
        (AHPA.replace("  name: qwen\n", "  name: Q_w\n", 1), ["metadata.name", "'Q_w'"]),
        ("#" * (MOST_BYTES + 1), [str(MOST_BYTES), "bytes"]),
    ],
)
def test_what_cannot_be_read_is_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, words: list[str]
) -> None:
    (tmp_path / "x.yaml").write_text(text)
    assert run("ahpa", "x.yaml") == 2
    said = capsys.readouterr()
    assert said.out == ""
    (line,) = said.err.splitlines()
    assert line.startswith("tidegate: x.yaml: ")
    assert [word for word in words if word not in line] == []
    assert len(line) < 400


def test_files_and_zones_that_are_not_there(ahpa: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("ahpa", "nowhere.yaml") == 2
    assert "nowhere.yaml: No such file" in capsys.readouterr().err
    assert run("fluid", ".") == 2
    assert "directory" in capsys.readouterr().err
    assert run("ahpa", ahpa, "--timezone", "Mars") == 2
    assert "--timezone: 'Mars'" in capsys.readouterr().err


def test_without_the_extra_it_says_what_to_install(
    ahpa: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "yaml", None)
    assert run("ahpa", ahpa) == 2
    assert "extra `kubernetes`" in capsys.readouterr().err


def test_settings_as_toml() -> None:
    tree = {
        "a": 'text "quoted" \x7f é\n',
        "b.c": [1, 2.5, True],
        "pools": [{"name": "x", "schedules": [{"cron": "0 * * * *"}], "slo": {"ttft_s": 1.0}}, {}],
        "deep": {"er": {"x": {"y": [{"k": {"v": "w"}}]}}},
    }
    assert tomllib.loads(to_toml(tree)) == tree
    assert to_toml({}) == ""
