"""`tidegate deploy check` against a real API server, as an administrator and as Tidegate's own
account."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from control_plane import ControlPlane, create_missing, wait
from lightkube.codecs import from_dict

pytestmark = pytest.mark.timeout(600)

ROOT = Path(__file__).resolve().parents[2]
OPERATOR = ROOT / "deploy" / "kubernetes" / "operator"


def check(folder: Path, *words: str) -> tuple[int, dict[str, Any], str]:
    """Exit code, the checks by their name, and standard error."""
    command = [sys.executable, "-m", "gateway.cli.main", "deploy", "check", "--json", *words]
    settings = ["-s", "kubernetes.model_pools=true", "-s", "kubernetes.lease=tidegate"]
    done = subprocess.run(
        [*command, *settings],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert "Traceback" not in done.stderr
    checks = json.loads(done.stdout)["checks"] if done.stdout else []
    return done.returncode, {one["name"]: one for one in checks}, done.stderr


def test_what_a_cluster_has_and_lacks(plane: ControlPlane, namespace: str, tmp_path: Path) -> None:
    document = yaml.safe_load((OPERATOR / "modelpools.yaml").read_text())
    with plane.client() as client, plane.http() as http:
        create_missing(client, from_dict(document))
        pools = "/apis/tidegate.dev/v1alpha1/modelpools"
        wait("ModelPools", lambda: http.get(pools).status_code == 200)
    rules = yaml.safe_load((OPERATOR / "role.yaml").read_text())["rules"]
    given = plane.kubeconfig("tidegate", namespace=namespace, rules=rules)
    code, checks, said = check(tmp_path, "--kubeconfig", str(given))
    assert (code, said) == (0, ""), checks
    assert checks["rights"]["status"] == "ok"
    assert checks["modelpools"]["status"] == "ok"
    assert f"v{plane.version[0]}.{plane.version[1]}" in checks["kubernetes"]["finding"]
    assert "nobody has led" in checks["lease"]["finding"]
    assert "not there" in checks["KEDA"]["finding"]
    assert "may not" in checks["nodes"]["finding"]
    # An account with one right less, by its own eyes and by an administrator's.
    fewer = [rule for rule in rules if rule["resources"] != ["endpointslices"]]
    lesser = plane.kubeconfig("lesser", namespace=namespace, rules=fewer)
    code, checks, _ = check(tmp_path, "--kubeconfig", str(lesser))
    assert code == 1
    assert "watch endpointslices.discovery.k8s.io" in checks["rights"]["finding"]
    admin = ["--kubeconfig", str(plane.admin)]
    for name, wanted in (("tidegate", 0), ("lesser", 1)):
        place = ["--account", f"{namespace}/{name}", "-s", f"kubernetes.namespace={namespace}"]
        code, checks, _ = check(tmp_path, *admin, *place)
        assert code == wanted, checks
    assert "as this Tidegate knows it" in checks["modelpools"]["finding"]


def test_without_a_cluster_it_says_so(tmp_path: Path) -> None:
    code, checks, said = check(tmp_path, "--kubeconfig", str(tmp_path / "none"))
    assert (code, checks) == (2, {})
    assert said.count("\n") == 1
