"""Settings as text: every value with its origin, and the file that explains every field.

``tidegate.example.toml`` is the output of ``example()``, made from the docstrings and bounds of the
fields themselves, so it cannot say anything that is no longer true.
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel

from autoscaler.adapters.settings import AdapterObjectSettings
from autoscaler.settings import PoolSettings, ScheduleSettings
from gateway.settings import defaults, fields
from gateway.settings.changes import needs_restart
from gateway.settings.errors import hide, show
from gateway.settings.load import LoadedSettings, leaves
from gateway.settings.schema import Settings
from loaders.engines.base import DEFAULT_ENGINE

WIDTH = 98
POOLS = "pools"

SAMPLES: Mapping[str, Any] = {
    "gateway.admin_token_file": "/etc/tidegate/admin-token",
    "gateway.tls_certificate": "/etc/tidegate/tls.crt",
    "gateway.tls_key": "/etc/tidegate/tls.key",
    "gateway.picker.port": 9002,
    "gateway.picker.tls_certificate": "/etc/tidegate/picker.crt",
    "gateway.picker.tls_key": "/etc/tidegate/picker.key",
    "router.max_inflight_tokens": 65_536,
    "adapter.tidegate_url": "http://tidegate:8001",
    "adapter.tls_certificate": "/etc/tidegate/adapter/tls.crt",
    "adapter.tls_key": "/etc/tidegate/adapter/tls.key",
    "adapter.kubeconfig": "/etc/tidegate/kubeconfig",
    "adapter.front_proxy_ca": "/etc/kubernetes/pki/front-proxy-ca.crt",
    "adapter.keda_tls_certificate": "/etc/tidegate/keda/tls.crt",
    "adapter.keda_tls_key": "/etc/tidegate/keda/tls.key",
    "adapter.keda_client_ca": "/etc/tidegate/keda/ca.crt",
    "autoscaler.host_memory_bytes": 25_769_803_776,
    "autoscaler.idle_to_zero_s": 900,
    "autoscaler.scale_down_delay_s": 120,
    "modelcache.dir": "/mnt/models",
    "modelcache.quota_bytes": 500_000_000_000,
    "modelcache.bandwidth_bytes_s": 500_000_000,
    "autoscaler.dcgm_url": "http://127.0.0.1:9400/metrics",
    "modelcache.page_budget_bytes": 64_000_000_000,
    "modelcache.peer_port": 8002,
    "kubernetes.kubeconfig": "/etc/tidegate/kubeconfig",
    "kubernetes.namespace": "models",
    "kubernetes.lease": "tidegate",
    "kubernetes.node": "gpu-node-7",
    "kubernetes.node_cache_image": "registry.example.com/tidegate:0.1.0",
    "pools.*.kubernetes.namespace": "models",
    "pools.*.kubernetes.name": "llama",
    "pools.*.kubernetes.service": "llama",
    "pools.*.kubernetes.port": 8_000,
    "pools.*.kubernetes.service_url": "http://llama-head:8000",
    "pools.*.kubernetes.zero_owner": "tidegate",
    "pools.*.engine": DEFAULT_ENGINE,
    "pools.*.model": "./models/my-model",
    "pools.*.max_inflight_requests": 64,
    "pools.*.max_inflight_tokens": 65_536,
    "pools.*.max_model_len_tokens": 8_192,
    "pools.*.replica_hour_price": 8,
    "pools.*.violated_second_price": 60,
    "pools.*.mode": "observe",
    "pools.*.slo.itl_s": 0.1,
    "pools.*.targets.requests_per_s": 4,
    "pools.*.targets.queued_requests": 2,
    "pools.*.targets.ttft_s": 2,
    "pools.*.targets.itl_s": 0.1,
    "pools.*.targets.e2e_s": 30,
    "pools.*.targets.gpu_utilization_fraction": 0.7,
    "pools.*.idle_to_zero_s": 900,
    "pools.*.scale_down_delay_s": 120,
    "pools.*.start_timeout_s": 1_800,
    "pools.*.prepare_timeout_s": 14_400,
    "pools.*.process.gpu_memory_bytes": 25_769_803_776,
    "pools.*.process.memory_bytes": 12_884_901_888,
    "pools.*.process.cpus_per_replica": 4,
    "pools.*.static.api_key_env": "MY_ENGINE_API_KEY",
    "pools.*.tiers.forked_s": 3_600,
    "pools.*.tiers.paged_s": 86_400,
    "pools.*.tiers.on_disk_s": 604_800,
}
"""What an unset field could be set to; a field that is not listed shows its bounds' lower end."""

LIST_SAMPLES: Mapping[str, BaseModel] = {
    "adapter.objects": AdapterObjectSettings(
        pool="elsewhere",
        resource="deployments.apps",
        namespace="default",
        name="elsewhere",
        labels={"app": "elsewhere"},
    ),
    "pools.*.schedules": ScheduleSettings(
        name="office hours",
        cron="0 8 * * mon-fri",
        duration_s=36_000,
        timezone="Europe/Berlin",
        min_replicas=1,
        max_replicas=4,
    ),
}
"""An element of each list of sections that is empty by default."""

HEAD = """\
Tidegate's settings: every field, its default, and what it means.

Made by `tidegate config example`. Apart from the sample pools at the end it changes nothing: keep
what you change, delete the rest, and ask `tidegate config check`.

- Tidegate reads ./tidegate.toml, or the file given with --config.
- A line like `# name = value` is a field that is unset by default, with a value it could have.
- A relative path in this file is relative to this file.
- Names end in their unit: _s seconds, _bytes, _tokens.
- The environment goes over this file (TIDEGATE__GATEWAY__PORT=9000), `--set gateway.port=9000`
  over both. `tidegate config show` says where each value came from.
- `tidegate reload` applies changes while Tidegate runs, but for fields that need a restart.
"""

STATIC_HEAD = """\
A second pool, of externally managed servers: any OpenAI-compatible one. Take the
`#:` off its lines to use it; the fields that are not here are the same as above.
"""


class Row(NamedTuple):
    """One value as ``tidegate config show`` prints it."""

    field: str
    shown: str
    plain: Any
    origin: str


def rows(loaded: LoadedSettings) -> Iterator[Row]:
    """Every value with its origin, in the order of the tree; secrets are hidden."""
    for parts, value in leaves(loaded.settings):
        name = fields.dotted(parts)
        plain = hide(_plain(value), parts)
        yield Row(name, show(plain), plain, loaded.origins[name])


def _plain(value: Any) -> Any:
    """A value as JSON has it."""
    if isinstance(value, tuple):
        return [_plain(one) for one in value]
    if isinstance(value, dict):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, BaseModel):
        return _plain(dict(value))
    return str(value) if isinstance(value, Path) else value


def example() -> str:
    """The text of ``tidegate.example.toml``."""
    settings = Settings()
    lines = [*_comment(HEAD), ""]
    lines += _section(settings, fields.root(), ())
    sample = PoolSettings.model_validate(defaults.built_in_pool(None))
    pool_node = fields.root().fields[POOLS].element
    lines += [*_comment(_meaning(settings, POOLS)), f"[[{POOLS}]]", ""]
    lines += _section(sample, pool_node, (POOLS, "*"))
    lines += [*_comment(STATIC_HEAD), f"#: [[{POOLS}]]"]
    lines += [f"#: {name} = {show(value)}" for name, value in STATIC_SAMPLE.items()]
    lines += [f"#: [{POOLS}.static]"]
    lines += [f"#: {name} = {show(value)}" for name, value in SERVERS_SAMPLE.items()]
    lines += ["", *_comment(KUBERNETES_HEAD), f"#: [[{POOLS}]]"]
    lines += [f"#: {name} = {show(value)}" for name, value in KUBERNETES_SAMPLE.items()]
    lines += [f"#: [{POOLS}.kubernetes]"]
    lines += [f"#: {name} = {show(value)}" for name, value in WORKLOAD_SAMPLE.items()]
    return "\n".join(lines).rstrip("\n") + "\n"


STATIC_SAMPLE: Mapping[str, Any] = {
    "name": "elsewhere",
    "backend": "static",
    "model": "meta-llama/Llama-3.1-8B-Instruct",
}
SERVERS_SAMPLE: Mapping[str, Any] = {
    "urls": ["http://10.0.0.5:8000", "http://10.0.0.6:8000"],
    "api_key_env": "ELSEWHERE_API_KEY",
    "headers": {"x-team": "search"},
}

KUBERNETES_HEAD = """\
A third one, of a workload in a Kubernetes cluster, whose number of replicas is set by demand.
"""
KUBERNETES_SAMPLE: Mapping[str, Any] = {
    "name": "llama-3.1-8b",
    "backend": "kubernetes",
    "max_replicas": 4,
}
WORKLOAD_SAMPLE: Mapping[str, Any] = {"namespace": "models", "kind": "Deployment", "name": "llama"}


def _section(model: BaseModel, node: fields.Node, parts: fields.Parts) -> list[str]:
    """A section's values, then its sections: TOML reads what follows a header as part of it."""
    lines: list[str] = []
    below: list[str] = []
    for name, field in node.fields.items():
        here = (*parts, name)
        value = getattr(model, name)
        if isinstance(value, BaseModel):
            below += [
                *_comment(_meaning(model, name)),
                f"[{fields.dotted([part for part in here if part != '*'])}]",
                "",
            ]
            below += _section(value, field, here)
        elif here == (POOLS,):
            continue
        elif field.kind == "list" and field.element.kind == "section":
            below += _sample(
                LIST_SAMPLES[".".join(here)], field.element, here, _meaning(model, name)
            )
        else:
            restart = " Needs a restart." if needs_restart(fields.dotted(here)) else ""
            allowed = f"Must be {fields.describe(field)}.{restart}"
            lines += _comment(f"{_meaning(model, name)}\n{allowed}")
            lines += [_assignment(name, value, field, here), ""]
    return lines + below


def _sample(sample: BaseModel, node: fields.Node, parts: fields.Parts, meaning: str) -> list[str]:
    """A sample element of a list of sections, to be uncommented, with the meaning of each field."""
    name = ".".join(part for part in parts if part != "*")
    lines = [*_comment(f"{meaning}\nTake the `#:` off these lines for one."), f"#: [[{name}]]"]
    for one, field in node.fields.items():
        lines += _comment(f"{_meaning(sample, one)}\nMust be {fields.describe(field)}.")
        lines.append(f"#: {one} = {show(_plain(getattr(sample, one)))}")
    return [*lines, ""]


def _meaning(model: BaseModel, name: str) -> str:
    """The docstring of a field, on one line."""
    section = type(model)
    return " ".join(
        fields.docstrings(sys.modules[section.__module__])[section.__name__][name].split()
    )


def _assignment(name: str, value: Any, node: fields.Node, parts: fields.Parts) -> str:
    if value is not None:
        return f"{name} = {show(_plain(value))}"
    sample = SAMPLES.get(".".join(parts), node.schema.get("minimum", ""))
    return f"# {name} = {show(sample)}"


def _comment(text: str) -> list[str]:
    """Text as comment lines, each line of it wrapped; the double quotes of docstrings made one."""
    lines: list[str] = []
    for line in text.replace("``", "`").strip("\n").split("\n"):
        wrapped = textwrap.wrap(line, WIDTH, break_long_words=False, break_on_hyphens=False)
        lines += wrapped or [""]
    return [f"# {line}".rstrip() for line in lines]
