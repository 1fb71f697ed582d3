"""The routers that are compared, each started as its own documentation says, pinned to one core.

Every contender forwards to the same mock replicas over kept-alive connections, listens on
127.0.0.1, and logs no line per request.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import venv
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench import nginx, procs, tidegate, workload

PEER_PACKAGES = ("sglang-router==0.3.2", "vllm-router==0.1.17")
"""Pinned so that two runs compare the same programs; raise them together with the results."""

_PROBE = workload.http_request(
    workload.body(workload.Shape(name="probe", prompt_bytes=32, tokens=1), 0)
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where contenders run."""

    folder: Path
    """Configurations and logs."""
    peers: Path
    """Virtual environment of the PyPI routers."""
    replicas: tuple[int, ...]
    """Ports of the mock replicas."""
    core: int
    """The core of the router under test."""
    other_core: int
    """The core of everything else, a contender's control process included."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    """A started contender."""

    name: str
    port: int
    child: procs.Child
    data_pids: tuple[int, ...]
    """Processes that carry requests: the measured ones."""
    control_pids: tuple[int, ...] = ()
    """Processes beside the data path: reported, not added to the cost of a request."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """How to start one router, and how to ask its version."""

    name: str
    title: str
    start: Callable[[str, Place], Running]
    version: Callable[[Place], str]


def _settled(name: str, child: procs.Child, port: int, place: Place, limit_s: float) -> Running:
    try:
        procs.wait_ready(child, port, _PROBE, limit_s=limit_s)
    except procs.NotReadyError:
        child.stop()
        raise
    return Running(name=name, port=port, child=child, data_pids=tuple(child.tree()))


# -- nginx: the limit --------------------------------------------------------------------------

_NGINX = """\
daemon off;
worker_processes 1;
pid {folder}/nginx.pid;
error_log {folder}/error.log warn;
{user}
worker_rlimit_nofile 16384;
events {{ worker_connections 8192; }}
http {{
  access_log off;
  client_max_body_size 64m;
  client_body_buffer_size 1m;
  client_body_temp_path {folder}/body;
  proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/fastcgi;
  uwsgi_temp_path {folder}/uwsgi;
  scgi_temp_path {folder}/scgi;
  keepalive_requests 100000000;
  keepalive_timeout 75s;
  upstream replicas {{
    {servers}
    keepalive 512;
    keepalive_requests 100000000;
  }}
  server {{
    listen 127.0.0.1:{port} backlog=4096;
    location / {{
      proxy_pass http://replicas;
      proxy_http_version 1.1;
      proxy_set_header Connection "";
      proxy_buffering off;
      proxy_request_buffering {request_buffering};
      proxy_read_timeout 900s;
    }}
  }}
}}
"""


def _nginx_path() -> str:
    return str(nginx.nginx_path(Path(__file__).resolve().parent.parent))


def _start_nginx(name: str, place: Place) -> Running:
    folder, port = place.folder / name, procs.free_port()
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "nginx.conf"
    config.write_text(
        _NGINX.format(
            folder=folder,
            port=port,
            servers=" ".join(f"server 127.0.0.1:{p};" for p in place.replicas),
            user="user root;" if os.geteuid() == 0 else "",
            request_buffering="off" if name == "nginx-unbuffered" else "on",
        )
    )
    argv: list[str | Path] = [_nginx_path(), "-c", config, "-p", folder]
    child = procs.start(name, argv, log=folder / "log", cores=[place.core])
    return _settled(name, child, port, place, limit_s=10)


def _nginx_version(place: Place) -> str:
    done = subprocess.run([_nginx_path(), "-v"], capture_output=True, text=True, timeout=10)
    return done.stderr.strip().removeprefix("nginx version: ")


# -- the PyPI routers: the peers ---------------------------------------------------------------


def ensure_peers(folder: Path) -> None:
    """Create the peers' virtual environment, once; a few seconds and about 220 MB."""
    marker = folder / "installed.json"
    if marker.exists() and json.loads(marker.read_text()) == list(PEER_PACKAGES):
        return
    print(f"installing {', '.join(PEER_PACKAGES)} into {folder} (about 220 MB)", flush=True)
    if not (folder / "bin" / "python").exists():
        venv.create(folder, with_pip=True)
    command = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", *PEER_PACKAGES]
    subprocess.run(command, check=True, timeout=600)
    marker.write_text(json.dumps(list(PEER_PACKAGES)))


def _start_peer(name: str, place: Place) -> Running:
    program, policy = ("sglang-router", "vllm-router")[name.startswith("vllm")], name.split(":")[1]
    folder, port = place.folder / name.replace(":", "-"), procs.free_port()
    folder.mkdir(parents=True, exist_ok=True)
    argv: list[str | Path] = [place.peers / "bin" / program]
    if program == "sglang-router":
        argv.append("launch")
    argv += ["--host", "127.0.0.1", "--port", str(port), "--policy", policy]
    argv += ["--prometheus-host", "127.0.0.1", "--prometheus-port", str(procs.free_port())]
    argv += ["--log-level", "error", "--worker-urls"]
    argv += [f"http://127.0.0.1:{p}" for p in place.replicas]
    child = procs.start(name, argv, log=folder / "log", cores=[place.core])
    return _settled(name, child, port, place, limit_s=40)


def _peer_version(package: str) -> Callable[[Place], str]:
    def version(place: Place) -> str:
        listed = subprocess.run(
            [place.peers / "bin" / "python", "-m", "pip", "show", package],
            capture_output=True, text=True, timeout=60, check=False,
        ).stdout  # fmt: skip
        found = re.search(r"^Version: (\S+)", listed, re.MULTILINE)
        return found[1] if found else "unknown"

    return version


# -- Tidegate ----------------------------------------------------------------------------------

PLAIN = "tidegate-plain"
"""Tidegate without the compiled modules, where those are built."""

_POOL = """
[[pools]]
name = "{model}"
backend = "static"
# The replicas here take anything; 2,000 streams over four of them need 500 each.
max_inflight_requests = 1024
[pools.static]
urls = [{urls}]
"""


def _start_tidegate(name: str, place: Place) -> Running:
    urls = ", ".join(f'"http://127.0.0.1:{p}"' for p in place.replicas)
    pool = _POOL.format(model=workload.MODEL, urls=urls)
    env = {"TIDEGATE_COMPILED": "0"} if name == PLAIN else {}
    gate = tidegate.start(pool, place.folder / name, cores=[place.other_core], env=env)
    running = _settled(name, gate.child, gate.port, place, limit_s=20)
    workers = gate.worker_pids()
    procs.pin(workers, place.core)
    control = tuple(pid for pid in running.data_pids if pid not in workers)
    return Running(
        name=name, port=gate.port, child=gate.child, data_pids=workers, control_pids=control
    )


def compile_tidegate() -> None:
    """Compile the data path as `make run` does; without a compiler plain Python is measured."""
    command = [sys.executable, "-m", "gateway.compiled", "build"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    if done.returncode != 0:
        print(f"not compiled, plain Python is measured: {done.stderr.strip()}", flush=True)


def _tidegate_version(place: Place) -> str:
    """The commit, and whether a worker runs the compiled modules or plain Python."""
    head = ["git", "describe", "--always", "--dirty=, with changes"]
    which = [sys.executable, "-m", "gateway.compiled"]
    said = [
        subprocess.run(command, capture_output=True, text=True, timeout=30, check=False).stdout
        for command in (head, which)
    ]
    commit, kind = (text.strip() or "unknown" for text in said)
    return f"commit {commit}, {kind}, CPython {sys.version.split()[0]}"


def _plain_version(place: Place) -> str:
    return f"the same, plain Python, CPython {sys.version.split()[0]}"


CONTENDERS: dict[str, Contender] = {
    c.name: c
    for c in (
        Contender(name="tidegate", title="Tidegate", start=_start_tidegate,
                  version=_tidegate_version),
        Contender(name=PLAIN, title="Tidegate, not compiled", start=_start_tidegate,
                  version=_plain_version),
        Contender(name="nginx", title="nginx", start=_start_nginx, version=_nginx_version),
        Contender(name="nginx-unbuffered", title="nginx, request unbuffered", start=_start_nginx,
                  version=_nginx_version),
        *(
            Contender(name=f"{short}:{policy}", title=f"{short}-router {policy}",
                      start=_start_peer, version=_peer_version(f"{short}-router"))
            for short in ("sglang", "vllm")
            for policy in ("round_robin", "cache_aware")
        ),
    )
}  # fmt: skip
"""By the name used on the command line."""

PEERS = tuple(name for name in CONTENDERS if ":" in name)
DEFAULT = ("tidegate", "nginx", *PEERS)


def start_all(names: Sequence[str], place: Place) -> list[Running]:
    """Start the named contenders one after the other; on a failure those started are ended."""
    running: list[Running] = []
    try:
        for name in names:
            began_s = time.monotonic()
            running.append(CONTENDERS[name].start(name, place))
            print(f"  {name} ready after {time.monotonic() - began_s:.1f} s", flush=True)
    except BaseException:
        for one in reversed(running):
            one.child.stop()
        raise
    return running
