"""What may stand in Kubernetes manifests: Kubernetes' own schemas for its kinds, in every version
that the package ``kubernetes-validate`` has; for ModelPool its definition; for kinds of others the
fields that our manifests use, written down here from their API references. A field that is not in
these is looked up there and added.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import yaml
from kubernetes_validate.utils import schema_contents
from referencing import Registry, Resource

from autoscaler.operator.model_pool import InvalidModelPool, parse_spec

VERSIONS = tuple(f"1.{minor}" for minor in range(28, 38))
ROOT = Path(__file__).resolve().parents[2]
MODEL_POOLS = ROOT / "deploy" / "kubernetes" / "operator" / "modelpools.yaml"
POLICIES_SINCE = 30
"""Minor version from which Kubernetes has ValidatingAdmissionPolicy in v1."""

TEXT = {"type": "string", "minLength": 1}
FLAG = {"type": "boolean"}
COUNT = {"type": "integer", "minimum": 0}
PORT = {"type": "integer", "minimum": 1, "maximum": 65_535}
NAME = {"type": "string", "pattern": r"^[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?$"}
WORDS = {"type": "object", "additionalProperties": {"type": "string"}}


def only(required: Iterable[str] = (), **fields: Any) -> dict[str, Any]:
    """An object with these fields and no others."""
    return {
        "type": "object",
        "properties": fields,
        "required": list(required),
        "additionalProperties": False,
    }


def list_of(item: Any) -> dict[str, Any]:
    """A list that is not empty."""
    return {"type": "array", "items": item, "minItems": 1}


META = only(["name"], name=NAME, namespace=NAME, labels=WORDS, annotations=WORDS)
SELECTOR = only(["matchLabels"], matchLabels=WORDS)
QUANTITIES = {
    "type": "object",
    "additionalProperties": {
        "type": "string",
        "pattern": r"^[0-9]+(\.[0-9]+)?(m|k|Ki|M|Mi|G|Gi|T|Ti)?$",
    },
}
RESOURCES = only(requests=QUANTITIES, limits=QUANTITIES)
HTTP_PROBE = only(["httpGet"], httpGet=only(["path", "port"], path=TEXT, port=PORT))
SCALING_RULES = only(stabilizationWindowSeconds=COUNT)

SPECS: Mapping[tuple[str, str], dict[str, Any]] = {
    ("monitoring.coreos.com/v1", "ServiceMonitor"): only(
        ["selector", "endpoints"],
        selector=SELECTOR,
        endpoints=list_of(
            only(
                ["port"],
                port=TEXT,
                path=TEXT,
                interval={"type": "string", "pattern": r"^[0-9]+(ms|s|m)$"},
                scheme={"enum": ["http", "https"]},
                tlsConfig=only(insecureSkipVerify=FLAG),
            )
        ),
    ),
    ("cert-manager.io/v1", "Issuer"): only(["selfSigned"], selfSigned=only()),
    ("cert-manager.io/v1", "Certificate"): only(
        ["secretName", "issuerRef", "dnsNames"],
        secretName=NAME,
        issuerRef=only(["name"], name=NAME, kind={"enum": ["Issuer", "ClusterIssuer"]}),
        dnsNames=list_of(NAME),
        privateKey=only(
            algorithm={"enum": ["RSA", "ECDSA", "Ed25519"]},
            rotationPolicy={"enum": ["Never", "Always"]},
        ),
    ),
    ("keda.sh/v1alpha1", "ScaledObject"): only(
        ["scaleTargetRef", "triggers"],
        scaleTargetRef=only(["name"], apiVersion=TEXT, kind=TEXT, name=NAME),
        pollingInterval=COUNT,
        cooldownPeriod=COUNT,
        minReplicaCount=COUNT,
        maxReplicaCount=COUNT,
        advanced=only(
            horizontalPodAutoscalerConfig=only(
                behavior=only(scaleUp=SCALING_RULES, scaleDown=SCALING_RULES)
            )
        ),
        triggers=list_of(
            only(
                ["type", "metadata"],
                type={"enum": ["external", "external-push"]},
                # Every value is text.
                metadata={**WORDS, "required": ["scalerAddress"]},
            )
        ),
    ),
    ("serving.knative.dev/v1", "Service"): only(
        ["template"],
        template=only(
            ["spec"],
            metadata=only(name=NAME, annotations=WORDS),
            spec=only(
                ["containers"],
                containerConcurrency=COUNT,
                timeoutSeconds=COUNT,
                containers=list_of(
                    only(
                        ["image"],
                        name=NAME,
                        image=TEXT,
                        args=list_of({"type": "string"}),
                        ports={
                            **list_of(only(["containerPort"], containerPort=PORT)),
                            "maxItems": 1,
                        },
                        readinessProbe=HTTP_PROBE,
                        resources=RESOURCES,
                    )
                ),
            ),
        ),
    ),
    ("inference.networking.k8s.io/v1", "InferencePool"): only(
        ["selector", "targetPorts"],
        selector=SELECTOR,
        targetPorts={**list_of(only(["number"], number=PORT)), "maxItems": 8},
        endpointPickerRef=only(
            ["name"],
            group={"type": "string"},
            kind=TEXT,
            name=NAME,
            port=only(["number"], number=PORT),
            failureMode={"enum": ["FailOpen", "FailClose"]},
        ),
    ),
    ("gateway.networking.k8s.io/v1", "Gateway"): only(
        ["gatewayClassName", "listeners"],
        gatewayClassName=NAME,
        listeners=list_of(
            only(["name", "protocol", "port"], name=NAME, protocol={"enum": ["HTTP"]}, port=PORT)
        ),
    ),
    ("gateway.networking.k8s.io/v1", "HTTPRoute"): only(
        parentRefs=list_of(only(["name"], name=NAME)),
        rules=list_of(
            only(
                backendRefs=list_of(only(["name"], group={"type": "string"}, kind=TEXT, name=NAME)),
                timeouts=only(request={"type": "string", "pattern": r"^[0-9]{1,5}(h|m|s|ms)$"}),
            )
        ),
    ),
    ("serving.kserve.io/v1beta1", "InferenceService"): only(
        ["predictor"],
        predictor=only(
            ["model"],
            minReplicas=COUNT,
            maxReplicas=COUNT,
            model=only(
                ["modelFormat"],
                modelFormat=only(["name"], name=TEXT),
                args=list_of({"type": "string"}),
                storageUri=TEXT,
                resources=RESOURCES,
            ),
        ),
    ),
    ("kueue.x-k8s.io/v1beta1", "LocalQueue"): only(["clusterQueue"], clusterQueue=NAME),
}


def find_problems(document: Mapping[str, Any], versions: Iterable[str] = VERSIONS) -> list[str]:
    """What is wrong with an object, each with its place; in which version where it is a kind of
    Kubernetes' own."""
    key = (document["apiVersion"], document["kind"])
    if key in SPECS:
        schema = only(
            ["apiVersion", "kind", "metadata", "spec"],
            apiVersion=TEXT, kind=TEXT, metadata=META, spec=SPECS[key],
        )  # fmt: skip
        return [f"{key[1]}: {one}" for one in _errors(jsonschema.Draft7Validator(schema), document)]
    if key == ("tidegate.dev/v1alpha1", "ModelPool"):
        return _model_pool_problems(document)
    found = []
    for version in versions:
        if key[1].startswith("ValidatingAdmissionPolicy") and _minor(version) < POLICIES_SINCE:
            continue
        try:
            validator = _validator(version, *key)
        except FileNotFoundError:
            found.append(f"{version}: no such kind: {key[1]} of {key[0]}")
            continue
        found += [f"{version}: {key[1]}: {one}" for one in _errors(validator, document)]
    return found


def _minor(version: str) -> int:
    return int(version.partition(".")[2])


def _errors(validator: Any, document: object) -> list[str]:
    return [f"{one.json_path}: {one.message}" for one in validator.iter_errors(document)]


@cache
def _registry(version: str) -> Any:
    definitions = schema_contents(f"{_folder(version)}/_definitions.json", version)
    return Resource.from_contents(definitions) @ Registry()


@cache
def _validator(version: str, api_version: str, kind: str) -> Any:
    group, _, number = api_version.rpartition("/")
    name = "-".join(part for part in (kind.lower(), group.partition(".")[0], number) if part)
    schema = schema_contents(f"{_folder(version)}/{name}.json", version)
    registry = Resource.from_contents(schema) @ _registry(version)
    return jsonschema.Draft202012Validator(schema, registry=registry)


def _folder(version: str) -> str:
    return f"kubernetes-json-schema/v{version}.0-local-strict"


@cache
def _model_pool_validator() -> Any:
    (version,) = yaml.safe_load(MODEL_POOLS.read_text())["spec"]["versions"]
    schema = copy.deepcopy(version["schema"]["openAPIV3Schema"])
    _forbid_others(schema)
    schema["properties"]["metadata"] = META
    return jsonschema.Draft7Validator(schema)


def _forbid_others(schema: dict[str, Any]) -> None:
    """What the API server drops without a word is an error here."""
    if schema.get("exclusiveMinimum") is True:
        schema["exclusiveMinimum"] = schema.pop("minimum")
    if schema.get("properties") and not schema.get("x-kubernetes-preserve-unknown-fields"):
        schema["additionalProperties"] = False
        for below in schema["properties"].values():
            _forbid_others(below)
    if "items" in schema:
        _forbid_others(schema["items"])


def _model_pool_problems(document: Mapping[str, Any]) -> list[str]:
    """By the definition, and by what reads it, which knows what fields say of each other."""
    found = [f"ModelPool: {one}" for one in _errors(_model_pool_validator(), document)]
    try:
        parse_spec(document)
    except InvalidModelPool as error:
        found.append(f"ModelPool: {error}")
    template = document["spec"].get("template")
    if template is not None:
        pod = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": template.get("metadata") or {},
            "spec": template["spec"],
        }
        found += find_problems(pod)
    return found


class _Strict(yaml.SafeLoader):
    """Refuses a key that stands twice, of which YAML would keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]  # type: ignore[no-untyped-call]
        twice = {key for key in keys if keys.count(key) > 1}
        if twice:
            raise yaml.YAMLError(f"{node.start_mark}: {sorted(twice)} stands twice")
        return super().construct_mapping(node, deep=deep)


def read_all(path: Path) -> list[dict[str, Any]]:
    """The documents of a file. Raises ``yaml.YAMLError`` where a key stands twice."""
    return [one for one in yaml.load_all(path.read_text(), Loader=_Strict) if one]


def read(path: Path) -> dict[str, Any]:
    """The only document of a file."""
    (document,) = read_all(path)
    return document
