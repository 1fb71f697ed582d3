"""Tidegates that have resources of a cluster as pools, with the permissions that are deployed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from control_plane import ControlPlane
from openai import OpenAI
from tidegate_process import QUICK, Tidegate, start, wait_up

OPERATOR = Path(__file__).resolve().parents[2] / "deploy" / "kubernetes" / "operator"


class Operator:
    """Starts Tidegates in a namespace, with the permissions that are deployed, those for Knative
    among them."""

    def __init__(
        self, plane: ControlPlane, namespace: str, environ: dict[str, str], folder: Path
    ) -> None:
        self.plane, self.namespace, self.environ, self.folder = plane, namespace, environ, folder
        self.started: list[Tidegate] = []
        rules = yaml.safe_load((OPERATOR / "role.yaml").read_text())["rules"]
        component = yaml.safe_load((OPERATOR / "knative" / "kustomization.yaml").read_text())
        rules += [one["value"] for one in yaml.safe_load(component["patches"][0]["patch"])]
        self.rules: list[dict[str, Any]] = rules
        self.kubeconfig = plane.kubeconfig("tidegate", namespace=namespace, rules=rules)

    def start(self, name: str, **sections: Any) -> Tidegate:
        given = {"lease": "tidegate", "lease_s": 3.0, "model_pools": True}
        kubernetes = {**given, "kubeconfig": str(self.kubeconfig), "namespace": self.namespace}
        tidegate = start(
            self.folder / name,
            pools=[],
            environ={**self.environ, "HOSTNAME": name},
            autoscaler={**QUICK, "idle_to_zero_s": 3.0, **sections.pop("autoscaler", {})},
            kubernetes={**kubernetes, **sections.pop("kubernetes", {})},
            **sections,
        )
        self.started.append(tidegate)
        return tidegate

    @contextmanager
    def running(self, name: str = "one", **sections: Any) -> Iterator[Tidegate]:
        tidegate = self.start(name, **sections)
        try:
            yield wait_up(tidegate)
            tidegate.stop()
            tidegate.assert_log_is_clean()
        finally:
            tidegate.kill_all()


def ask(tidegate: Tidegate, model: str, **more: Any) -> str:
    """A chat completion's text."""
    client = OpenAI(base_url=f"{tidegate.url}/v1", api_key="none", timeout=280, max_retries=0)
    answer = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": "hello"}], **more
    )
    return answer.choices[0].message.content or ""
