"""Renders and lints a chart by Helm's own code: the Helm SDK of Go, version 4, as a library.

In a process of its own: a Go runtime takes signals, and does not survive a fork.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from fetched_wheels import FetchedWheel

HELM = FetchedWheel(
    name="helm-python-sdk",
    version="0.2.2",
    sha256={
        "x86_64": "28cc13abaf134c3a7e37f070c939be8d9cdc9825c3c8b8b2d35161073bcd4578",
        "aarch64": "078bac2464ea2f4b5af24cf7873e8f78ee3f3c216766fcdea41b7c61f47275b1",
    },
)
LIMIT_S = 200
CODE = """
import json, sys
import helm_python as helm
chart_dir, cases = sys.argv[1], json.load(sys.stdin)
found = {"version": helm.helm_sdk_version(), "lint": helm.lint(chart_dir, strict=True)}
found["renderings"] = renderings = []
with helm.Chart.load(chart_dir) as chart:
    for case in cases:
        try:
            chart.validate_schema(case["values"])
            files = chart.render(
                case["values"], name=case["name"], namespace=case["namespace"], is_install=True
            )
            renderings.append({"files": files})
        except helm.HelmError as error:
            renderings.append({"error": str(error)})
json.dump(found, sys.stdout)
"""

DEPLOY = """
import json, sys
import helm_python as helm
verb, kubeconfig, namespace, name, chart, values = json.load(sys.stdin)
with helm.Config(kubeconfig_path=kubeconfig, namespace=namespace) as config:
    if verb == "uninstall":
        done = config.uninstall(name)
    else:
        done = getattr(config, verb)(chart, name, values, wait="watcher", timeout=120)
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendering:
    """What a chart becomes with some values; ``error`` is why Helm refused."""

    objects: Sequence[dict[str, Any]]
    notes: str
    error: str


def render(
    chart: Path,
    cases: Sequence[Mapping[str, Any]],
    *,
    name: str = "tidegate",
    namespace: str = "models",
) -> tuple[list[Rendering], list[str]]:
    """A rendering for each set of values, and what Helm's lint says is wrong with the chart."""
    given = [{"values": values, "name": name, "namespace": namespace} for values in cases]
    found = json.loads(_run(CODE, given, str(chart)))
    assert found["version"].startswith("v4.")
    lint = [*found["lint"]["errors"]]
    lint += [one["error"] for one in found["lint"]["messages"] if one["severity"] > 1]
    return [_rendering(one) for one in found["renderings"]], lint


def deploy(verb: str, kubeconfig: Path, namespace: str, chart: Path, **values: Any) -> None:
    """``install``, ``upgrade`` or ``uninstall`` the release ``tidegate``; waits until it is
    ready."""
    _run(DEPLOY, [verb, str(kubeconfig), namespace, "tidegate", str(chart), values])


def _run(code: str, given: object, *words: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *words],
        input=json.dumps(given),
        env={**os.environ, "PYTHONPATH": str(HELM.find())},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def _rendering(found: dict[str, Any]) -> Rendering:
    files = found.get("files", {})
    texts = [text for path, text in files.items() if path.endswith(".yaml")]
    objects = [one for text in texts for one in yaml.safe_load_all(text) if one]
    notes = "".join(text for path, text in files.items() if path.endswith("NOTES.txt"))
    return Rendering(objects=objects, notes=notes, error=found.get("error", ""))
