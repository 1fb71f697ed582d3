"""A real Kubernetes control plane on 127.0.0.1: etcd, kube-apiserver, kube-controller-manager.

``with running(folder) as plane`` starts them from the directory that ``KUBEBUILDER_ASSETS`` names
(`make cluster-test` sets it) and ends them. It is set up as a cluster is: TLS everywhere, RBAC,
tokens of service accounts, an aggregation layer with its front proxy, controllers with service
accounts of their own. What differs: no scheduler and no kubelet (``fake_kubelet`` is both), periods
that are short, and HPA may scale to zero, as it may from 1.37.

Each server leads a process group of its own, and the kernel kills it when the thread that started
it ends: a plane belongs to the main thread of the test run, and does not outlive it.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import pkgutil
import random
import re
import secrets
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import httpx
import lightkube.resources
import msgspec
from certificates import Authority, KeyPair, signing_keys
from lightkube import AsyncClient, Client, KubeConfig
from lightkube.core.decoders import WatchEvent, decode_list
from lightkube.core.exceptions import ApiError
from lightkube.models.authentication_v1 import BoundObjectReference, TokenRequestSpec
from lightkube.models.meta_v1 import ObjectMeta, Status
from lightkube.models.rbac_v1 import PolicyRule, RoleRef, Subject
from lightkube.resources.core_v1 import Namespace, Pod, ServiceAccount, ServiceAccountToken
from lightkube.resources.rbac_authorization_v1 import (
    ClusterRole,
    ClusterRoleBinding,
    Role,
    RoleBinding,
)

from bench import procs

Found = TypeVar("Found")

ASSETS_VARIABLE = "KUBEBUILDER_ASSETS"
PROGRAMS = ("etcd", "kube-apiserver", "kube-controller-manager")
START_S = 180.0
WAIT_S = 120.0
POLL_S = 0.1
TOKEN_S = 24 * 3600
FRONT_PROXY = "front-proxy-client"
ISSUER = "https://kubernetes.default.svc"

TIE = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)
if os.getppid() != int(sys.argv[1]):
    sys.exit(1)
os.execv(sys.argv[2], sys.argv[2:])
"""
"""Becomes a program that the kernel kills when its parent dies (PR_SET_PDEATHSIG)."""

CONTROLLERS = (
    "clusterrole-aggregation",
    "cronjob",
    "daemonset",
    "deployment",
    "disruption",
    "endpoint",
    "endpointslice",
    "endpointslicemirroring",
    "garbagecollector",
    "horizontalpodautoscaling",
    "job",
    "namespace",
    "replicaset",
    "root-ca-cert-publisher",
    "serviceaccount",
    "serviceaccount-token",
    "statefulset",
    "ttl-after-finished",
)
"""All that a workload needs. Not those that look after nodes: these have no kubelet to renew their
leases."""


def assets() -> Path:
    """Where the programs are."""
    told = os.environ.get(ASSETS_VARIABLE, "")
    folder = Path(told)
    missing = [name for name in PROGRAMS if not os.access(folder / name, os.X_OK)]
    if not told or missing:
        raise RuntimeError(
            f"{ASSETS_VARIABLE} is {told!r}, and {', '.join(missing)} are to be in it: "
            "`make cluster-test` makes and sets it"
        )
    return folder


def steady_port() -> int:
    """A free port on 127.0.0.1 which no outgoing connection takes while its server is down: below
    those that the kernel gives to connections."""
    lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    for _ in range(1_000):
        port = random.randrange(10_000, max(lowest, 11_000))
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise RuntimeError("no port is free")


def program_version(program: Path) -> tuple[int, int]:
    """Major and minor version, as ``--version`` says it."""
    said = subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout
    match = re.search(r"v(\d+)\.(\d+)", said)
    if match is None:
        raise RuntimeError(f"{program} --version says {said!r}")
    return int(match[1]), int(match[2])


@dataclass
class ControlPlane:
    """One that runs. ``version`` is that of kube-apiserver, ``ca`` signs what its clients trust,
    ``front_proxy`` signs the certificate that the aggregation layer shows to its servers."""

    folder: Path
    programs: Path
    version: tuple[int, int]
    ca: Authority
    front_proxy: Authority
    etcd_ports: tuple[int, int]
    port: int
    controllers_port: int
    children: dict[str, procs.Child] = field(default_factory=dict)

    @property
    def url(self) -> str:
        """Of the apiserver."""
        return f"https://127.0.0.1:{self.port}"

    @property
    def admin(self) -> Path:
        """The kubeconfig of a cluster administrator."""
        return self.folder / "admin.kubeconfig"

    def client(self, kubeconfig: Path | None = None, **options: Any) -> Client:
        """A client of the administrator's, or of whoever has this kubeconfig."""
        config = KubeConfig.from_file(kubeconfig or self.admin)
        return Client(config, trust_env=False, **options)

    def async_client(self, kubeconfig: Path | None = None, **options: Any) -> AsyncClient:
        """The same, for an event loop."""
        config = KubeConfig.from_file(kubeconfig or self.admin)
        return AsyncClient(config, trust_env=False, **options)

    def http(self) -> httpx.Client:
        """A plain HTTP client of the administrator's, for paths that no client library has."""
        pair = KeyPair(self.folder / "admin.crt", self.folder / "admin.key")
        return httpx.Client(
            base_url=self.url,
            verify=_trusting(self.ca.certificate, pair),
            trust_env=False,
            timeout=30,
        )

    def kubeconfig(
        self,
        account: str,
        *,
        namespace: str = "default",
        rules: Sequence[Mapping[str, Any]] = (),
        cluster_rules: Sequence[Mapping[str, Any]] = (),
        cluster_roles: Sequence[str] = (),
        roles: Sequence[tuple[str, str]] = (),
        pod: Pod | None = None,
    ) -> Path:
        """Make a service account with these permissions, and a kubeconfig with a token of it.

        ``rules`` hold in its namespace and ``cluster_rules`` everywhere; ``cluster_roles`` exist
        already, as do ``roles``, each a namespace and a name. What is there of the same name
        already is kept. The token is that of a ``pod``, where one is given.
        """
        meta = ObjectMeta(name=account, namespace=namespace)
        wide = ObjectMeta(name=f"{namespace}-{account}")
        subject = Subject(kind="ServiceAccount", name=account, namespace=namespace)
        made: list[Any] = [ServiceAccount(metadata=meta)]
        if rules:
            made += [
                Role(metadata=meta, rules=[PolicyRule.from_dict(dict(rule)) for rule in rules]),
                RoleBinding(metadata=meta, roleRef=_role("Role", account), subjects=[subject]),
            ]
        if cluster_rules:
            parsed = [PolicyRule.from_dict(dict(rule)) for rule in cluster_rules]
            made += [
                ClusterRole(metadata=wide, rules=parsed),
                ClusterRoleBinding(
                    metadata=wide, roleRef=_role("ClusterRole", str(wide.name)), subjects=[subject]
                ),
            ]
        for name in cluster_roles:
            bound = ObjectMeta(name=f"{namespace}-{account}-{name.replace(':', '-')}")
            made.append(
                ClusterRoleBinding(
                    metadata=bound, roleRef=_role("ClusterRole", name), subjects=[subject]
                )
            )
        for place, name in roles:
            bound = ObjectMeta(name=f"{namespace}-{account}-{name}", namespace=place)
            made.append(
                RoleBinding(metadata=bound, roleRef=_role("Role", name), subjects=[subject])
            )
        with self.client() as client:
            for one in made:
                create_missing(client, one)
            token = self._token(client, meta, pod)
        path = self.folder / f"{namespace}-{account}.kubeconfig"
        return self._write_kubeconfig(path, {"token": token}, namespace)

    def _token(self, client: Client, account: ObjectMeta, pod: Pod | None) -> str:
        bound = None
        if pod is not None:
            bound = BoundObjectReference(
                apiVersion="v1", kind="Pod", name=pod.metadata.name, uid=pod.metadata.uid
            )
        spec = TokenRequestSpec(audiences=[], boundObjectRef=bound, expirationSeconds=TOKEN_S)
        request = ServiceAccountToken(metadata=account, spec=spec)
        made = client.create(request, account.name, namespace=account.namespace)
        return str(made.status.token)

    def make_namespace(self, prefix: str) -> str:
        """A namespace that a test has for itself, with its default service account."""
        name = f"{prefix}-{secrets.token_hex(3)}"
        with self.client() as client:
            client.create(Namespace(metadata=ObjectMeta(name=name)))
        self._wait_account(name)
        return name

    def _wait_account(self, namespace: str) -> None:
        """The controllers make it; without it the apiserver refuses pods."""
        with self.client() as client:
            wait(
                f"service account of {namespace}",
                lambda: exists(client, ServiceAccount, "default", namespace=namespace),
            )

    def start(self) -> None:
        """Start everything, and wait until it works."""
        self._start_etcd()
        self.start_apiserver()
        self.start_controllers()
        self._wait_account("default")

    def kill_apiserver(self) -> None:
        """End it at once, as a crash does; everything else goes on."""
        self._kill("kube-apiserver")

    def start_apiserver(self) -> None:
        """Start it, again at the same port with the same state, and wait until it is ready."""
        self._start("kube-apiserver", self._apiserver_flags())
        with self.http() as http:
            self._wait_ready("kube-apiserver", lambda: http.get("/readyz").status_code == 200)

    def kill_controllers(self) -> None:
        """End kube-controller-manager at once."""
        self._kill("kube-controller-manager")

    def start_controllers(self) -> None:
        """Start kube-controller-manager, and wait until it is healthy."""
        self._start("kube-controller-manager", self._controllers_flags())
        url = f"https://127.0.0.1:{self.controllers_port}/healthz"
        # It makes that certificate itself.
        with httpx.Client(verify=False, trust_env=False, timeout=10) as http:
            self._wait_ready("kube-controller-manager", lambda: http.get(url).status_code == 200)

    def stop(self) -> None:
        """End everything at once: its state is the test's."""
        for name in reversed(PROGRAMS):
            self._kill(name)

    def log(self, name: str) -> Path:
        """What this program has written."""
        return self.folder / f"{name}.log"

    def write_files(self) -> None:
        """Keys, certificates and kubeconfigs of the plane itself."""
        self.ca.issue("apiserver", hosts=("127.0.0.1", "localhost", "kubernetes.default.svc"))
        self.front_proxy.issue(FRONT_PROXY)
        signing_keys(self.folder, "service-accounts")
        users = {"admin": ("system:masters",), "system:kube-controller-manager": ()}
        for user, groups in users.items():
            pair = self.ca.issue(user, groups=groups)
            files = {"client-certificate": str(pair.certificate), "client-key": str(pair.key)}
            name = user.rpartition(":")[2]
            self._write_kubeconfig(self.folder / f"{name}.kubeconfig", files, "default")

    def _write_kubeconfig(self, path: Path, user: Mapping[str, str], namespace: str) -> Path:
        name = "tests"
        cluster = {"server": self.url, "certificate-authority": str(self.ca.certificate)}
        context = {"cluster": name, "user": name, "namespace": namespace}
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": name, "cluster": cluster}],
            "users": [{"name": name, "user": dict(user)}],
            "contexts": [{"name": name, "context": context}],
            "current-context": name,
        }
        path.touch(mode=0o600)
        path.write_text(json.dumps(config, indent=1))
        return path

    def _start_etcd(self) -> None:
        client, peer = (f"http://127.0.0.1:{port}" for port in self.etcd_ports)
        flags = {
            "name": "tests",
            "data-dir": self.folder / "etcd",
            "listen-client-urls": client,
            "advertise-client-urls": client,
            "listen-peer-urls": peer,
            "initial-advertise-peer-urls": peer,
            "initial-cluster": f"tests={peer}",
            "unsafe-no-fsync": "true",
        }
        self._start("etcd", flags)
        with httpx.Client(base_url=client, trust_env=False, timeout=10) as http:
            self._wait_ready("etcd", lambda: http.get("/health").json()["health"] == "true")

    def _apiserver_flags(self) -> dict[str, object]:
        flags: dict[str, object] = {
            "etcd-servers": f"http://127.0.0.1:{self.etcd_ports[0]}",
            "bind-address": "127.0.0.1",
            "advertise-address": "127.0.0.1",
            # Kubernetes refuses loopback addresses as endpoints, also those of its own service.
            "endpoint-reconciler-type": "none",
            "secure-port": self.port,
            "cert-dir": self.folder,
            "tls-cert-file": self.folder / "apiserver.crt",
            "tls-private-key-file": self.folder / "apiserver.key",
            "client-ca-file": self.ca.certificate,
            "authorization-mode": "RBAC",
            "service-cluster-ip-range": "10.96.0.0/16",
            "service-account-issuer": ISSUER,
            "service-account-key-file": self.folder / "service-accounts.pub",
            "service-account-signing-key-file": self.folder / "service-accounts.key",
            "requestheader-client-ca-file": self.front_proxy.certificate,
            "requestheader-allowed-names": FRONT_PROXY,
            "requestheader-username-headers": "X-Remote-User",
            "requestheader-group-headers": "X-Remote-Group",
            "requestheader-extra-headers-prefix": "X-Remote-Extra-",
            "proxy-client-cert-file": self.folder / f"{FRONT_PROXY}.crt",
            "proxy-client-key-file": self.folder / f"{FRONT_PROXY}.key",
            "enable-aggregator-routing": "false",
            "shutdown-delay-duration": "0s",
            "profiling": "false",
        }
        if self.version < (1, 24):
            flags["insecure-port"] = 0
        return flags | self._feature_gates()

    def _feature_gates(self) -> dict[str, object]:
        """HPA from and to zero, which is on from 1.37."""
        return {"feature-gates": "HPAScaleToZero=true"} if self.version < (1, 37) else {}

    def _controllers_flags(self) -> dict[str, object]:
        kubeconfig = self.folder / "kube-controller-manager.kubeconfig"
        flags: dict[str, object] = {
            "kubeconfig": kubeconfig,
            "authentication-kubeconfig": kubeconfig,
            "authorization-kubeconfig": kubeconfig,
            "bind-address": "127.0.0.1",
            "secure-port": self.controllers_port,
            "cert-dir": self.folder / "controllers",
            "controllers": ",".join(CONTROLLERS),
            "use-service-account-credentials": "true",
            "service-account-private-key-file": self.folder / "service-accounts.key",
            "root-ca-file": self.ca.certificate,
            "leader-elect": "false",
            "horizontal-pod-autoscaler-sync-period": "2s",
            "horizontal-pod-autoscaler-downscale-stabilization": "4s",
            "concurrent-gc-syncs": 5,
            "profiling": "false",
        }
        if self.version < (1, 24):
            flags["port"] = 0
        return flags | self._feature_gates()

    def _start(self, name: str, flags: Mapping[str, object]) -> None:
        program = [self.programs / name, *(f"--{flag}={value}" for flag, value in flags.items())]
        self.children[name] = start_tied(name, program, log=self.log(name))

    def _kill(self, name: str) -> None:
        child = self.children.pop(name, None)
        if child is not None:
            child.popen.kill()
            child.stop()

    def _wait_ready(self, name: str, look: Callable[[], bool]) -> None:
        deadline_s = time.monotonic() + START_S
        while True:
            with contextlib.suppress(httpx.HTTPError, ValueError, KeyError):
                if look():
                    return
            child = self.children[name]
            if child.popen.poll() is not None or time.monotonic() > deadline_s:
                ended = "ended" if child.popen.poll() is not None else "is not ready"
                raise RuntimeError(f"{name} {ended}:\n{child.log_tail(20)}")
            time.sleep(POLL_S)


def start_tied(name: str, argv: Sequence[str | Path], *, log: Path) -> procs.Child:
    """Start a program in a process group of its own, which does not outlive this thread."""
    tie = [sys.executable, "-I", "-S", "-c", TIE, str(os.getpid())]
    return procs.start(name, [*tie, *argv], log=log)


@contextlib.contextmanager
def running(folder: Path) -> Iterator[ControlPlane]:
    """A control plane whose files are in ``folder``."""
    programs = assets()
    build_decoders()
    folder.mkdir(parents=True, exist_ok=True)
    ports = [steady_port() for _ in range(4)]
    plane = ControlPlane(
        folder=folder,
        programs=programs,
        version=program_version(programs / "kube-apiserver"),
        ca=Authority(folder, "ca"),
        front_proxy=Authority(folder, "front-proxy-ca"),
        etcd_ports=(ports[0], ports[1]),
        port=ports[2],
        controllers_port=ports[3],
    )
    plane.write_files()
    try:
        plane.start()
        yield plane
    finally:
        plane.stop()


def build_decoders() -> None:
    """Have msgspec look at all of lightkube's types now, in one thread: it does so when it first
    decodes one, and two threads that do so at the same time crash the interpreter."""
    kinds = {WatchEvent, Status}
    for found in pkgutil.iter_modules(lightkube.resources.__path__):
        module = importlib.import_module(f"lightkube.resources.{found.name}")
        some = [kind for kind in vars(module).values() if isinstance(kind, type)]
        kinds.update(kind for kind in some if issubclass(kind, msgspec.Struct))
    for kind in kinds:
        msgspec.json.Decoder(kind)
        decode_list(b'{"items": []}', kind)


def wait(what: str, look: Callable[[], Found], *, within_s: float = WAIT_S) -> Found:
    """Until ``look`` returns something true; returns it."""
    deadline_s = time.monotonic() + within_s
    while True:
        found = look()
        if found:
            return found
        if time.monotonic() > deadline_s:
            raise AssertionError(f"no {what} in {within_s:.0f} s; the last was {found!r}")
        time.sleep(POLL_S)


def exists(client: Client, kind: Any, name: str, *, namespace: str | None = None) -> bool:
    """Whether there is such an object."""
    where = {} if namespace is None else {"namespace": namespace}
    try:
        client.get(kind, name, **where)
    except ApiError as error:
        if error.status.code == 404:
            return False
        raise
    return True


def create_missing(client: Client, made: Any) -> None:
    """Create an object, unless there is one of its name."""
    try:
        client.create(made)
    except ApiError as error:
        if error.status.reason != "AlreadyExists":
            raise


def _role(kind: str, name: str) -> RoleRef:
    return RoleRef(apiGroup="rbac.authorization.k8s.io", kind=kind, name=name)


def _trusting(ca: Path, pair: KeyPair) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(ca))
    context.load_cert_chain(pair.certificate, pair.key)
    return context
