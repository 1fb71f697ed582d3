"""Custom resources: what the apiserver refuses by a structural schema, and by rules in CEL."""

from __future__ import annotations

import secrets
from typing import Any

import pytest
from control_plane import ControlPlane, exists, wait
from lightkube import ApiError, Client
from lightkube.generic_resource import create_namespaced_resource
from lightkube.models.meta_v1 import ObjectMeta
from lightkube.resources.apiextensions_v1 import CustomResourceDefinition

pytestmark = pytest.mark.timeout(600)

GROUP = "tests.tidegate.example"
CEL_SINCE = (1, 25)


def definition(kind: str, spec: dict[str, Any]) -> CustomResourceDefinition:
    plural = f"{kind.lower()}s"
    schema = {"type": "object", "properties": {"spec": spec}}
    version = {
        "name": "v1",
        "served": True,
        "storage": True,
        "schema": {"openAPIV3Schema": schema},
    }
    return CustomResourceDefinition.from_dict(
        {
            "metadata": {"name": f"{plural}.{GROUP}"},
            "spec": {
                "group": GROUP,
                "names": {"kind": kind, "plural": plural},
                "scope": "Namespaced",
                "versions": [version],
            },
        }
    )


def make(client: Client, spec: dict[str, Any]) -> Any:
    """A new kind with such a spec, served."""
    kind = f"Kind{secrets.token_hex(4)}"
    made = definition(kind, spec)
    client.create(made)
    name = str(made.metadata.name)

    def is_established() -> bool:
        status = client.get(CustomResourceDefinition, name).status
        conditions = (status.conditions if status else None) or []
        return any(one.type == "Established" and one.status == "True" for one in conditions)

    wait(f"{name} established", is_established)
    return create_namespaced_resource(GROUP, "v1", kind, f"{kind.lower()}s")


def test_a_structural_schema_refuses_defaults_and_prunes(client: Client, namespace: str) -> None:
    replicas = {"type": "integer", "minimum": 0, "default": 1}
    kind = make(client, {"type": "object", "properties": {"replicas": replicas}})
    meta = ObjectMeta(name="one", namespace=namespace)
    with pytest.raises(ApiError) as refused:
        client.create(kind(metadata=meta, spec={"replicas": -1}))
    assert refused.value.status.code == 422
    assert refused.value.status.details.causes[0].field == "spec.replicas"
    assert not exists(client, kind, "one", namespace=namespace)
    client.create(kind(metadata=meta, spec={"other": "x"}))
    assert client.get(kind, "one", namespace=namespace)["spec"] == {"replicas": 1}


def test_a_rule_in_cel_is_kept(plane: ControlPlane, client: Client, namespace: str) -> None:
    number = {"type": "integer"}
    rule = {"rule": "self.lowest <= self.highest", "message": "lowest is above highest"}
    kind = make(
        client,
        {
            "type": "object",
            "properties": {"lowest": number, "highest": number},
            "x-kubernetes-validations": [rule],
        },
    )
    meta = ObjectMeta(name="one", namespace=namespace)
    wrong = kind(metadata=meta, spec={"lowest": 2, "highest": 1})
    if plane.version < CEL_SINCE:
        client.create(wrong)  # the field is unknown to it, and left out
        return
    with pytest.raises(ApiError) as refused:
        client.create(wrong)
    assert refused.value.status.code == 422
    assert "lowest is above highest" in refused.value.status.message
    client.create(kind(metadata=meta, spec={"lowest": 1, "highest": 2}))
