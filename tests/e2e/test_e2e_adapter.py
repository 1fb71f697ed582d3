"""``tidegate adapter`` beside a real Tidegate and the simulated engine: HPA's metrics, KEDA's
push.
"""

from __future__ import annotations

import json
import queue
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from adapter_process import Adapter, adapter
from asking import ask_now, chat
from certificates import Authority
from keda_client import metrics_request, ref, stub
from prometheus_server import prometheus
from tidegate_process import SHUT, Tidegate, port_of, simulated, start, up

EXTERNAL = "/apis/external.metrics.k8s.io/v1beta1/namespaces/default"
CUSTOM = "/apis/custom.metrics.k8s.io/v1beta2/namespaces/default"
OPEN = ("--authorization", "none", "-s", "adapter.refresh_s=0.3", "-s", "adapter.stale_s=2")


def config(folder: Path) -> Path:
    return folder / "tidegate.toml"


def get(running: Adapter, path: str, **query: str) -> httpx.Response:
    return httpx.get(running.url + path, params=query, trust_env=False, timeout=30)


def value(running: Adapter, metric: str, selector: str = "") -> str | int:
    """An external metric's only value, or the status of its error."""
    answer = get(running, f"{EXTERNAL}/{metric}", labelSelector=selector)
    if answer.status_code != 200:
        return answer.status_code
    (item,) = answer.json()["items"]
    return str(item["value"])


def until(look: Callable[[], object], what: str, within_s: float = 60.0) -> None:
    deadline_s = time.monotonic() + within_s
    while not look():
        assert time.monotonic() < deadline_s, f"no {what} in {within_s} s"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def tidegate(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tidegate]:
    pools = [simulated("held", *SHUT), simulated("advised", mode="advise"), simulated("quiet")]
    folder = tmp_path_factory.mktemp("adapter")
    with up(folder, pools=pools) as running:
        yield running


def folder_of(tidegate: Tidegate) -> Path:
    return tidegate.state_dir.parent


def test_a_held_request_is_pushed_to_keda(tidegate: Tidegate) -> None:
    with (
        adapter(config(folder_of(tidegate)), *OPEN) as running,
        grpc.insecure_channel(running.keda) as channel,
    ):
        client = stub(channel)
        heard: queue.Queue[bool] = queue.Queue()

        def listen() -> None:
            try:
                for answer in client.StreamIsActive(ref("held")):
                    heard.put(answer.result)
            except grpc.RpcError:
                return  # the channel was closed

        listening = threading.Thread(target=listen)
        listening.start()
        assert heard.get(timeout=60) is False
        assert client.IsActive(ref("held"), timeout=30).result is False
        asking = threading.Thread(target=ask_now, args=(tidegate, chat("held")))
        asked_s = time.monotonic()
        asking.start()
        assert heard.get(timeout=60) is True
        print(f"request held -> pushed: {time.monotonic() - asked_s:.3f} s")
        tidegate.wait_held("held", 1)

        def wanted() -> int:
            request = metrics_request(ref("held"))
            return int(client.GetMetrics(request, timeout=30).metricValues[0].metricValue)

        until(lambda: wanted() == 1, "replica that is wanted")
        assert client.IsActive(ref("held"), timeout=30).result is True
        assert client.IsActive(ref("quiet"), timeout=30).result is False
        until(lambda: value(running, "tidegate_queued_requests", "pool=held") == "1", "held one")
        tidegate.open_gate("held")
        asking.join(60)
        channel.close()
        listening.join(60)


def test_what_a_pool_that_another_scales_should_have(tidegate: Tidegate) -> None:
    with adapter(config(folder_of(tidegate)), *OPEN) as running:
        metric = ("tidegate_desired_replicas", "pool=advised")
        until(lambda: value(running, *metric) == "0", "pool at zero")
        ask_now(tidegate, chat("advised"))
        until(lambda: value(running, *metric) == "1", "recommendation")
        for name, selector in (
            ("tidegate_e2e_seconds", "pool=advised,quantile=0.95"),
            ("tidegate_output_tokens_per_second", "pool=advised"),
        ):

            def is_known(name: str = name, selector: str = selector) -> bool:
                found = value(running, name, selector)
                return isinstance(found, str) and found != "0"

            until(is_known, name)


def test_two_adapters_say_the_same(tidegate: Tidegate) -> None:
    place = config(folder_of(tidegate))
    with adapter(place, *OPEN) as first, adapter(place, *OPEN) as second:
        for path in ("/apis", f"{EXTERNAL}/tidegate_ready_replicas"):
            answers = [get(one, path).json() for one in (first, second)]
            for answer in answers:
                for item in answer.get("items", ()):
                    del item["timestamp"]
            assert answers[0] == answers[1]


def test_objects_of_the_settings_and_tls_over_the_admin_listener_s_port(
    tidegate: Tidegate, tmp_path: Path
) -> None:
    """As in a cluster: another directory, over TCP with the token, and with TLS."""
    authority = Authority(tmp_path, "ca")
    serving = authority.issue("adapter", hosts=("localhost",))
    settings = {
        "tls_certificate": str(serving.certificate),
        "tls_key": str(serving.key),
        "tidegate_url": tidegate.admin_url,
        "apis": ["custom.metrics.k8s.io/v1beta2"],
    }
    lines = ["[adapter]", *(f"{name} = {json.dumps(one)}" for name, one in settings.items())]
    lines += ["[[adapter.objects]]", 'pool = "quiet"', 'resource = "deployments.apps"']
    lines += ['namespace = "default"', 'name = "web"', "labels = {app = 'web'}"]
    place = tmp_path / "tidegate.toml"
    place.write_text("\n".join(lines))
    token = (tidegate.state_dir / "admin-token").read_text().strip()
    with adapter(place, *OPEN, environ={"TIDEGATE_ADMIN_TOKEN": token}) as running:
        assert running.url.startswith("https://")
        assert running.keda == ""

        trust = ssl.create_default_context(cafile=str(authority.certificate))

        def ask(path: str) -> httpx.Response:
            return httpx.get(
                running.url.replace("127.0.0.1", "localhost") + path,
                verify=trust, trust_env=False, timeout=30,
            )  # fmt: skip

        path = f"{CUSTOM}/deployments.apps/%2A/tidegate_ready_replicas?labelSelector=app%3Dweb"
        until(lambda: ask(path).status_code == 200, "metric")
        (item,) = ask(path).json()["items"]
        assert (item["describedObject"]["name"], item["value"]) == ("web", "0")
        assert ask(f"{EXTERNAL}/tidegate_ready_replicas").status_code == 404  # not served


def test_a_wrong_token_is_said_and_nothing_is_answered(tidegate: Tidegate, tmp_path: Path) -> None:
    place = tmp_path / "tidegate.toml"
    place.write_text("")
    wrong = {"TIDEGATE_ADMIN_TOKEN": "x" * 20}
    with adapter(place, *OPEN, "--tidegate", tidegate.admin_url, environ=wrong) as running:
        until(lambda: "admin token" in running.log(), "word on the token")
        answer = get(running, f"{EXTERNAL}/tidegate_ready_replicas")
        assert answer.status_code == 503
        assert "admin token" in answer.json()["message"]
        assert get(running, "/readyz").status_code == 200


def test_a_real_prometheus_scrapes_it(tidegate: Tidegate, tmp_path: Path) -> None:
    with adapter(config(folder_of(tidegate)), *OPEN) as running:
        until(lambda: value(running, "tidegate_ready_replicas", "pool=quiet") == "0", "value")
        target = running.url.removeprefix("http://")
        with prometheus(tmp_path / "prometheus", targets=(target,)) as url:

            def ask(query: str) -> list[Any]:
                answer = httpx.get(
                    f"{url}/api/v1/query", params={"query": query}, trust_env=False, timeout=30
                )
                found: list[Any] = answer.json()["data"]["result"]
                return found

            codes = 'tidegate_adapter_requests_total{code="200",verb="GET"} >= 1'
            until(lambda: ask(codes), "requests in Prometheus")
            assert ask("tidegate_adapter_signals_age_seconds < 60")
            quantile = (
                "histogram_quantile(0.99, "
                "sum by (le) (tidegate_adapter_request_duration_seconds_bucket))"
            )
            assert float(ask(quantile)[0]["value"][1]) > 0
            assert ask("tidegate_adapter_build_info")


def test_a_tidegate_that_goes_and_comes_again(tmp_path: Path) -> None:
    pools = [simulated("chat")]
    with up(tmp_path, pools=pools) as first, adapter(config(tmp_path), *OPEN) as running:
        until(lambda: value(running, "tidegate_ready_replicas") == "0", "value")
        first.stop()
        until(lambda: value(running, "tidegate_ready_replicas") == 503, "error")
        with grpc.insecure_channel(running.keda) as channel, pytest.raises(grpc.RpcError) as raised:
            stub(channel).IsActive(ref("chat"), timeout=30)
        assert raised.value.code() is grpc.StatusCode.UNAVAILABLE
        second = start(tmp_path, pools=pools)
        try:
            until(lambda: value(running, "tidegate_ready_replicas") == "0", "value again")
            assert "Tidegate answers again" in running.log()
            assert port_of(running.url)
        finally:
            second.stop()
            second.kill_all()
