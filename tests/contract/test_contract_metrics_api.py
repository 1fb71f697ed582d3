"""The metrics APIs against the requests that real clients sent to such a server: the API server's
aggregator, HPA, kubectl, over real TLS with the front proxy's client certificate.

``metrics_api_requests.json`` has them as they were recorded on a control plane.
"""

from __future__ import annotations

import asyncio
import json
import re
import ssl
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
from certificates import Authority
from signal_rig import Clock, Source, make_feed, signals, unknown, until

from autoscaler.adapters.feed import SignalFeed, running
from autoscaler.adapters.measures import AdapterMeasures
from autoscaler.adapters.metrics_api.access import Access, Attributes, ClusterError
from autoscaler.adapters.metrics_api.app import MetricsApi
from autoscaler.adapters.metrics_api.identity import FrontProxy, Identity
from autoscaler.adapters.metrics_api.tls import ServingTls
from autoscaler.adapters.series import METRICS
from autoscaler.adapters.settings import EVERY_API
from gateway.admin.server import serve_admin
from gateway.compose.listeners import listen

RECORDED = json.loads((Path(__file__).parent / "metrics_api_requests.json").read_text())
PROXY_NAME = "front-proxy-client"
HPA = "system:serviceaccount:kube-system:horizontal-pod-autoscaler"
AS_HPA = {"X-Remote-User": HPA, "X-Remote-Group": "system:serviceaccounts"}
HOSTS = ("localhost", "127.0.0.1", "adapter.tidegate.svc")
CUSTOM2 = "/apis/custom.metrics.k8s.io/v1beta2/namespaces/default"
CUSTOM1 = "/apis/custom.metrics.k8s.io/v1beta1/namespaces/default"
EXTERNAL = "/apis/external.metrics.k8s.io/v1beta1/namespaces/default"


def read(authority: Authority) -> str:
    return authority.certificate.read_text()


def make(folder: Path) -> Path:
    folder.mkdir()
    return folder


class Guard:
    """Lets HPA and admins read; knows one token."""

    def __init__(self, ca: str) -> None:
        self.front_proxy: FrontProxy | None = FrontProxy(ca=ca, names=(PROXY_NAME,))
        self.error = ""
        self.access = Access(review_access=self._review, review_token=self._token, cache_s=0.0)

    async def _review(self, who: Identity, what: Attributes) -> bool:
        if self.error:
            raise ClusterError(self.error)
        return who.user == HPA and "system:authenticated" in who.groups

    async def _token(self, token: str) -> Identity | None:
        return Identity(user=HPA, groups=("system:authenticated",)) if token == "good" else None


class Api:
    """The server on a real socket, and clients of it."""

    def __init__(self, folder: Path, source: Source, clock: Clock) -> None:
        self.front = Authority(folder, "front-proxy-ca")
        self.serving = Authority(folder, "serving-ca")
        self.folder = folder
        self.source, self.clock = source, clock
        self.guard = Guard(read(self.front))
        self.port = 0
        serving = self.serving.issue("serving", hosts=HOSTS)
        self.tls = ServingTls(serving.certificate, serving.key, read(self.front))
        self.feed: SignalFeed = make_feed(source, clock)
        self.measures = AdapterMeasures("test", self.feed)
        self.apis: tuple[str, ...] = EVERY_API

    @asynccontextmanager
    async def serve(self) -> AsyncIterator[None]:
        (listener,) = listen("127.0.0.1", 0, field="adapter.port")
        self.port, stop = listener.getsockname()[1], asyncio.Event()
        app = MetricsApi(
            self.feed, apis=self.apis, guard=self.guard, measures=self.measures,
        )  # fmt: skip
        async with running(self.feed):
            await until(lambda: self.feed.age_s is not None or self.source.error)
            serving = asyncio.create_task(
                serve_admin([listener], app, stop, tls=lambda: self.tls.context)
            )
            try:
                yield
            finally:
                stop.set()
                await serving

    def client(
        self, name: str | None = PROXY_NAME, authority: Authority | None = None
    ) -> httpx.AsyncClient:
        """One with a client certificate of this name, by the front proxy's authority or another;
        ``None``: without."""
        trust = ssl.create_default_context(cafile=str(self.serving.certificate))
        if name is not None:
            pair = (authority or self.front).issue(name)
            trust.load_cert_chain(pair.certificate, pair.key)
        return httpx.AsyncClient(
            base_url=f"https://localhost:{self.port}", verify=trust, trust_env=False, timeout=30
        )


Story = Callable[[Api], Coroutine[Any, Any, None]]


def play(folder: Path, story: Story, *pools: Any, **given: Any) -> None:
    """Run a story with a served API."""

    async def run() -> None:
        api = Api(folder, Source(*(pools or (signals(),))), Clock())
        for name, value in given.items():
            setattr(api, name, value)
        async with api.serve():
            await story(api)

    asyncio.run(run())


def headers_of(recorded: dict[str, Any]) -> list[tuple[str, str]]:
    found = []
    for name, value in recorded["headers"].items():
        for one in value if isinstance(value, list) else [] if value is None else [value]:
            found.append((name, one))
    return found


def check_status(answer: httpx.Response, code: int, reason: str) -> dict[str, Any]:
    """An error as Kubernetes has it."""
    assert answer.status_code == code, answer.text
    found: dict[str, Any] = answer.json()
    assert (found["kind"], found["apiVersion"], found["status"]) == ("Status", "v1", "Failure")
    assert (found["code"], found["reason"]) == (code, reason)
    assert found["message"]
    return found


def test_every_recorded_request_as_it_was_sent(tmp_path: Path) -> None:
    async def story(api: Api) -> None:
        async with api.client() as client:
            for recorded in RECORDED:
                assert recorded["client_cn"] == PROXY_NAME
                answer = await client.send(
                    httpx.Request(
                        recorded["method"],
                        f"https://localhost:{api.port}{recorded['path']}",
                        headers=headers_of(recorded),
                    )
                )
                assert answer.headers["content-type"].startswith("application/json")
                if "/namespaces/" in recorded["path"]:  # metrics that are not ours
                    check_status(answer, 404, "NotFound")
                else:
                    assert answer.status_code == 200, recorded["path"]
                    assert answer.json()

    play(tmp_path, story)


@pytest.mark.parametrize(
    "recorded",
    [one for one in RECORDED if "/namespaces/" in one["path"] and "/metrics/" not in one["path"]],
    ids=lambda one: one["path"],
)
def test_recorded_requests_for_metrics_of_ours(tmp_path: Path, recorded: dict[str, Any]) -> None:
    path = re.sub("tidegate_running", "tidegate_running_requests", recorded["path"])
    path = re.sub("tidegate_queue_tokens|queue_tokens", "tidegate_queued_tokens", path)
    path = path.replace("pool%3Da", "pool%3Dvllm").replace("model%3Dm", "pool%3Dvllm")

    async def story(api: Api) -> None:
        async with api.client() as client:
            answer = await client.get(path, headers=headers_of(recorded))
            assert answer.status_code == 200, answer.text
            found = answer.json()
            values = sorted(one["value"] for one in found["items"])
            assert values == (["3", "3"] if "/pods/" in path else ["900"])

    play(tmp_path, story, signals("vllm"))


def test_values_in_each_form(tmp_path: Path) -> None:
    async def story(api: Api) -> None:
        async with api.client() as client:
            asked_s = datetime.now(UTC)

            async def get(path: str) -> dict[str, Any]:
                answer = await client.get(path, headers=AS_HPA)
                assert answer.status_code == 200, answer.text
                found: dict[str, Any] = answer.json()
                (item,) = found["items"]
                at = datetime.strptime(item.pop("timestamp"), "%Y-%m-%dT%H:%M:%S%z")
                assert abs((at - asked_s).total_seconds()) < 60
                return {**found, "items": [item]}

            assert await get(f"{EXTERNAL}/tidegate_requests_per_second") == {
                "kind": "ExternalMetricValueList",
                "apiVersion": "external.metrics.k8s.io/v1beta1",
                "metadata": {},
                "items": [
                    {
                        "metricName": "tidegate_requests_per_second",
                        "metricLabels": {"pool": "chat"},
                        "value": "2500m",
                        "window": 60,
                    }
                ],
            }
            reference = {
                "kind": "Deployment", "apiVersion": "apps/v1", "namespace": "default",
                "name": "chat",
            }  # fmt: skip
            path = "deployments.apps/chat/tidegate_ttft_seconds?metricLabelSelector=quantile%3D0.95"
            assert await get(f"{CUSTOM2}/{path}") == {
                "kind": "MetricValueList",
                "apiVersion": "custom.metrics.k8s.io/v1beta2",
                "metadata": {},
                "items": [
                    {
                        "describedObject": reference,
                        "metric": {
                            "name": "tidegate_ttft_seconds",
                            "selector": {"matchLabels": {"quantile": "0.95"}},
                        },
                        "windowSeconds": 60,
                        "value": "500m",
                    }
                ],
            }
            assert await get(f"{CUSTOM1}/{path}") == {
                "kind": "MetricValueList",
                "apiVersion": "custom.metrics.k8s.io/v1beta1",
                "metadata": {},
                "items": [
                    {
                        "describedObject": reference,
                        "metricName": "tidegate_ttft_seconds",
                        "window": 60,
                        "value": "500m",
                        "selector": {"matchLabels": {"quantile": "0.95"}},
                    }
                ],
            }

    play(tmp_path, story)


def test_a_namespace_has_sums_of_its_pools(tmp_path: Path) -> None:
    async def story(api: Api) -> None:
        async with api.client() as client:
            for form in ("metrics/tidegate_requests_per_second", "tidegate_requests_per_second"):
                answer = await client.get(f"{CUSTOM2}/{form}", headers=AS_HPA)
                assert answer.status_code == 200, answer.text
                (item,) = answer.json()["items"]
                assert item.pop("timestamp")
                assert item == {
                    "describedObject": {"kind": "Namespace", "apiVersion": "v1", "name": "default"},
                    "metric": {"name": "tidegate_requests_per_second", "selector": None},
                    "windowSeconds": 60,
                    "value": "5",
                }
                (old,) = (await client.get(f"{CUSTOM1}/{form}", headers=AS_HPA)).json()["items"]
                assert (old["metricName"], old["value"]) == ("tidegate_requests_per_second", "5")
            one = "metrics/tidegate_queued_tokens?metricLabelSelector=pool%3Dchat"
            answer = await client.get(f"{CUSTOM2}/{one}", headers=AS_HPA)
            assert answer.json()["items"][0]["value"] == "900"
            answer = await client.get(f"{CUSTOM2}/metrics/tidegate_ttft_seconds", headers=AS_HPA)
            assert "sum" in check_status(answer, 404, "NotFound")["message"]
            answer = await client.get(f"{CUSTOM2}/metrics/tidegate_queued_tokens")
            check_status(answer, 401, "Unauthorized")

    play(tmp_path, story, signals(), signals("org/other"), signals("away", namespace="ml"))


def test_pods_of_a_selector_and_escapes(tmp_path: Path) -> None:
    async def story(api: Api) -> None:
        async with api.client() as client:
            for path, expected in (
                ("pods/*/tidegate_inflight_tokens?labelSelector=app%20in%20(chat,x)", [2, 4]),
                ("pods/%2A/tidegate_inflight_tokens?labelSelector=app%3Dchat%2C!nix", [2, 4]),
                ("pods/%2a/tidegate_inflight_tokens?metricLabelSelector=replica!=chat-1", [4]),
                ("pods/chat%2D1/tidegate_inflight_tokens?labelSelector=app%3Dnobody", [2]),
            ):
                answer = await client.get(f"{CUSTOM2}/{path}", headers=AS_HPA)
                assert answer.status_code == 200, (path, answer.text)
                values = [int(one["value"]) // 1_000 for one in answer.json()["items"]]
                assert values == expected, path

    play(tmp_path, story)


def test_errors_are_said_as_kubernetes_does(tmp_path: Path) -> None:
    async def story(api: Api) -> None:
        async with api.client() as client:
            for path, code, reason in (
                (f"{EXTERNAL}/nix", 404, "NotFound"),
                (f"{EXTERNAL}/tidegate_queued_requests", 404, "NotFound"),  # unknown of one
                (f"{EXTERNAL}/tidegate_queued_requests?labelSelector=pool%3D(", 400, "BadRequest"),
                (f"{EXTERNAL}/tidegate_queued_requests?labelSelector=%FF", 400, "BadRequest"),
                (f"{CUSTOM2}/deployments.apps/chat/tidegate_ttft_seconds", 400, "BadRequest"),
                (f"{CUSTOM2}/deployments.apps/nix/tidegate_ttft_seconds", 404, "NotFound"),
                (f"{CUSTOM2}/metrics/tidegate_queued_requests", 404, "NotFound"),
                ("/apis/custom.metrics.k8s.io/v1/namespaces/default/pods/a/b", 404, "NotFound"),
                (f"{EXTERNAL}/", 404, "NotFound"),
                (f"{EXTERNAL}/a/b", 404, "NotFound"),
                ("/apis/nix", 404, "NotFound"),
                ("/" + "x" * 9_000, 400, "BadRequest"),
            ):
                answer = await client.get(path, headers=AS_HPA)
                check_status(answer, code, reason)
            posted = await client.post(f"{EXTERNAL}/tidegate_queued_requests", headers=AS_HPA)
            check_status(posted, 405, "MethodNotAllowed")

    play(tmp_path, story, signals(), unknown("new"))


def test_stale_signals_are_an_error_and_discovery_goes_on(tmp_path: Path) -> None:
    async def story(api: Api) -> None:
        async with api.client() as client:
            path = f"{EXTERNAL}/tidegate_queued_requests"
            assert (await client.get(path, headers=AS_HPA)).status_code == 200
            api.source.error = "gone"
            await until(lambda: api.feed.failures)
            api.clock.now_s += 16
            check_status(await client.get(path, headers=AS_HPA), 503, "ServiceUnavailable")
            for open_path in (
                "/apis", "/apis/external.metrics.k8s.io", "/apis/external.metrics.k8s.io/v1beta1",
                "/apis/custom.metrics.k8s.io/v1beta2", "/openapi/v2", "/openapi/v3",
            ):  # fmt: skip
                answer = await client.get(open_path)
                assert answer.status_code == 200
                assert answer.json()
            for probe in ("/healthz", "/livez", "/readyz"):
                assert (await client.get(probe)).text == "ok"
            api.source.error = ""
            await until(lambda: api.feed.age_s == 0.0)
            assert (await client.get(path, headers=AS_HPA)).status_code == 200

    play(tmp_path, story)


def test_negative_values_are_zero(tmp_path: Path) -> None:
    async def story(api: Api) -> None:
        async with api.client() as client:
            path = f"{EXTERNAL}/tidegate_desired_replicas"
            answer = await client.get(path, headers=AS_HPA)
            assert answer.json()["items"][0]["value"] == "0"

    play(tmp_path, story, signals(desired_replicas=-2))


def test_discovery_names_what_is_answered(tmp_path: Path) -> None:
    async def story(api: Api) -> None:
        async with api.client(None) as client:
            groups = (await client.get("/apis")).json()["groups"]
            versions = {
                one["name"]: [each["version"] for each in one["versions"]] for one in groups
            }
            assert versions == {
                "external.metrics.k8s.io": ["v1beta1"],
                "custom.metrics.k8s.io": ["v1beta2", "v1beta1"],
            }
            listed = (await client.get("/apis/external.metrics.k8s.io/v1beta1")).json()
            assert listed["kind"] == "APIResourceList"
            assert listed["groupVersion"] == "external.metrics.k8s.io/v1beta1"
            assert {one["name"] for one in listed["resources"]} == set(METRICS)
            custom = (await client.get("/apis/custom.metrics.k8s.io/v1beta2")).json()
            names = {one["name"] for one in custom["resources"]}
            assert "deployments.apps/tidegate_desired_replicas" in names
            assert "pods/tidegate_inflight_tokens" in names
            assert "pods/tidegate_desired_replicas" not in names
            (sums,) = (
                one
                for one in custom["resources"]
                if one["name"] == "namespaces/tidegate_queued_requests"
            )
            assert not sums["namespaced"]
            assert "namespaces/tidegate_ttft_seconds" not in names
            root = (await client.get("/")).json()["paths"]
            assert "/apis/custom.metrics.k8s.io/v1beta1" in root

    play(tmp_path, story)


def test_an_api_that_is_not_served_is_not_there(tmp_path: Path) -> None:
    async def story(api: Api) -> None:
        async with api.client() as client:
            path = f"{EXTERNAL}/tidegate_queued_requests"
            check_status(await client.get(path, headers=AS_HPA), 404, "NotFound")
            check_status(await client.get("/apis/external.metrics.k8s.io/v1beta1"), 404, "NotFound")
            custom = f"{CUSTOM2}/services/chat/tidegate_queued_requests"
            assert (await client.get(custom, headers=AS_HPA)).status_code == 200

    play(tmp_path, story, apis=("custom.metrics.k8s.io/v1beta2", "keda"))


def test_who_is_let_in(tmp_path: Path) -> None:
    async def story(api: Api) -> None:
        path = f"{EXTERNAL}/tidegate_queued_requests"
        async with api.client() as proxy, api.client(None) as plain:
            nobody = {"X-Remote-User": "system:serviceaccount:default:default"}
            admin = {"X-Remote-User": "admin", "X-Remote-Group": "system:masters"}
            good, bad = {"authorization": "Bearer good"}, {"authorization": "Bearer bad"}
            for client, headers, code, reason in (
                (proxy, nobody, 403, "Forbidden"),
                (proxy, {}, 401, "Unauthorized"),
                (proxy, good, 401, "Unauthorized"),  # the proxy says who asks, nothing else
                (plain, AS_HPA, 401, "Unauthorized"),
                (plain, admin, 401, "Unauthorized"),
                (plain, bad, 401, "Unauthorized"),
                (plain, {**bad, **admin}, 401, "Unauthorized"),
            ):
                check_status(await client.get(path, headers=headers), code, reason)
            for client, headers in ((proxy, AS_HPA), (proxy, admin), (plain, good)):
                assert (await client.get(path, headers=headers)).status_code == 200
            api.guard.error = "the API server has gone"
            failed = await proxy.get(path, headers=AS_HPA)
            check_status(failed, 503, "ServiceUnavailable")
            assert (await proxy.get(path, headers=admin)).status_code == 200
            assert (await proxy.get("/apis", headers=AS_HPA)).status_code == 200

        async with api.client("somebody-else") as client:
            check_status(await client.get(path, headers=AS_HPA), 401, "Unauthorized")
        stranger = Authority(make(api.folder / "stranger"), "stranger")
        async with api.client(PROXY_NAME, stranger) as client:
            with pytest.raises(httpx.HTTPError):
                await client.get(path, headers=AS_HPA)
        assert api.guard.front_proxy is not None
        api.guard.front_proxy = None  # as before the cluster has said who it is
        async with api.client() as client:
            check_status(await client.get(path, headers=AS_HPA), 401, "Unauthorized")

    play(tmp_path, story)


def test_a_connection_from_before_the_front_proxy_was_known_is_not_refused_on_and_on(
    tmp_path: Path,
) -> None:
    async def story(api: Api) -> None:
        path = f"{EXTERNAL}/tidegate_queued_requests"
        known, api.guard.front_proxy = api.guard.front_proxy, None
        api.tls.client_ca = ""
        api.tls.renew()
        async with api.client() as client:
            assert (await client.get("/apis")).status_code == 200
            api.tls.client_ca = read(api.front)
            api.tls.renew()
            api.guard.front_proxy = known
            # This connection was asked for no certificate; the next one is.
            check_status(await client.get(path, headers=AS_HPA), 401, "Unauthorized")
            assert (await client.get(path, headers=AS_HPA)).status_code == 200

    play(tmp_path, story)


def test_an_authority_with_text_in_another_language(tmp_path: Path) -> None:
    async def story(api: Api) -> None:
        path = f"{EXTERNAL}/tidegate_queued_requests"
        api.tls.client_ca = f"# Zertifizierungsstelle für uns\n{read(api.front)}# Ende \ufffd\n"
        api.tls.renew()
        async with api.client() as client:
            assert (await client.get(path, headers=AS_HPA)).status_code == 200

    play(tmp_path, story)


def test_certificate_and_authority_are_renewed_while_it_runs(tmp_path: Path) -> None:
    async def story(api: Api) -> None:
        path = f"{EXTERNAL}/tidegate_queued_requests"
        async with api.client() as before:
            assert (await before.get(path, headers=AS_HPA)).status_code == 200
            later = Authority(make(api.folder / "later"), "serving-ca")
            pair = later.issue("serving", hosts=HOSTS)
            (api.folder / "serving.crt").write_bytes(pair.certificate.read_bytes())
            api.tls.renew()  # the key does not match yet
            async with api.client() as again:
                assert (await again.get(path, headers=AS_HPA)).status_code == 200
            (api.folder / "serving.key").write_bytes(pair.key.read_bytes())
            api.tls.renew()
            assert (await before.get(path, headers=AS_HPA)).status_code == 200  # it goes on
        async with api.client() as old:
            with pytest.raises(httpx.HTTPError):
                await old.get(path, headers=AS_HPA)
        api.serving = later
        async with api.client() as new:
            assert (await new.get(path, headers=AS_HPA)).status_code == 200
        other = Authority(make(api.folder / "other"), "front-proxy-ca-2")
        api.tls.client_ca = read(other)
        api.tls.renew()
        api.guard.front_proxy = replace(api.guard.front_proxy or FrontProxy(ca=""), ca=read(other))
        async with api.client() as old:
            with pytest.raises(httpx.HTTPError):
                await old.get(path, headers=AS_HPA)
        async with api.client(PROXY_NAME, other) as new:
            assert (await new.get(path, headers=AS_HPA)).status_code == 200

    play(tmp_path, story)


def test_what_it_was_asked_is_counted(tmp_path: Path) -> None:
    async def story(api: Api) -> None:
        async with api.client() as client:
            for _ in range(3):
                await client.get(f"{EXTERNAL}/tidegate_queued_requests", headers=AS_HPA)
            await client.get(f"{EXTERNAL}/nix", headers=AS_HPA)
            page = (await client.get("/metrics")).text
        name = 'tidegate_adapter_requests_total{api="external.metrics.k8s.io/v1beta1"'
        assert f'{name},code="200",verb="GET"}} 3.0' in page
        assert f'{name},code="404",verb="GET"}} 1.0' in page
        assert "tidegate_adapter_signals_age_seconds 0.0" in page

    play(tmp_path, story)
