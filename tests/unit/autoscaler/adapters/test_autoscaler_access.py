"""Who asks, and whether they may: believed only from the front proxy, asked of the cluster once."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from signal_rig import Clock, within

from autoscaler.adapters.metrics_api import access
from autoscaler.adapters.metrics_api.access import Access, Attributes, ClusterError, Remembered
from autoscaler.adapters.metrics_api.cluster import read_front_proxy
from autoscaler.adapters.metrics_api.identity import (
    FrontProxy,
    Identity,
    bearer_token,
    common_name,
    is_front_proxy,
    proxied_identity,
)
from autoscaler.adapters.metrics_api.paths import (
    CustomQuery,
    ExternalQuery,
    MetricQuery,
    NamespaceQuery,
)

PROXY = FrontProxy(ca="pem", names=("front-proxy-client",))
HPA = Identity(user="system:serviceaccount:kube-system:horizontal-pod-autoscaler")
EXTERNAL = ExternalQuery(version="v1beta1", namespace="ml", metric="m", selector="")
CUSTOM = CustomQuery(
    version="v1beta2", namespace="ml", resource="deployments.apps", name="chat", metric="m",
    selector="", metric_selector="",
)  # fmt: skip
NAMESPACE = NamespaceQuery(
    version="v1beta2", namespace="ml", metric="m", metric_selector="", is_root_scoped=False
)
ROOT_SCOPED = NamespaceQuery(
    version="v1beta2", namespace="ml", metric="m", metric_selector="", is_root_scoped=True
)


class Cluster:
    """What is allowed, and what was asked."""

    def __init__(self, *allowed: Attributes) -> None:
        self.allowed = set(allowed)
        self.asked: list[Attributes] = []
        self.tokens: list[str] = []
        self.error = ""
        self.gate: asyncio.Event | None = None

    async def review_access(self, who: Identity, what: Attributes) -> bool:
        self.asked.append(what)
        if self.gate is not None:
            await self.gate.wait()
        if self.error:
            raise ClusterError(self.error)
        return what in self.allowed

    async def review_token(self, token: str) -> Identity | None:
        self.tokens.append(token)
        return HPA if token == "good" else None


def make(cluster: Cluster, clock: Clock, reviews: list[tuple[str, str]] | None = None) -> Access:
    seen = [] if reviews is None else reviews
    return Access(
        review_access=cluster.review_access,
        review_token=cluster.review_token,
        cache_s=10.0,
        on_review=lambda kind, outcome: seen.append((kind, outcome)),
        clock=clock,
    )


ALL_EXTERNAL = Attributes(verb="list", group="external.metrics.k8s.io")
ONE_EXTERNAL = Attributes(
    verb="list", group="external.metrics.k8s.io", version="v1beta1", resource="m", namespace="ml"
)
ONE_CUSTOM = Attributes(
    verb="get", group="custom.metrics.k8s.io", version="v1beta2", resource="deployments.apps",
    subresource="m", namespace="ml", name="chat",
)  # fmt: skip
ONE_NAMESPACE = Attributes(
    verb="get", group="custom.metrics.k8s.io", version="v1beta2", resource="metrics",
    namespace="ml", name="m",
)  # fmt: skip
ONE_ROOT_SCOPED = Attributes(
    verb="list", group="custom.metrics.k8s.io", version="v1beta2", resource="m", namespace="ml"
)


def test_who_may_read_all_is_asked_of_once_in_ten_seconds() -> None:
    async def run() -> None:
        cluster, clock, reviews = Cluster(ALL_EXTERNAL), Clock(), []
        made = make(cluster, clock, reviews)
        other = ExternalQuery(version="v1beta1", namespace="x", metric="n", selector="")
        for query in (EXTERNAL, EXTERNAL, other):
            assert await made.may_read(HPA, query)
        assert cluster.asked == [ALL_EXTERNAL]
        clock.now_s += 10.1
        assert await made.may_read(HPA, EXTERNAL)
        assert cluster.asked == [ALL_EXTERNAL] * 2
        assert reviews == [("access", "allowed")] * 2
        somebody = Identity(user="somebody")
        await made.may_read(somebody, EXTERNAL)
        assert len(cluster.asked) == 3  # another is another

    asyncio.run(run())


@pytest.mark.parametrize(
    ("allowed", "query", "expected"),
    [
        (ONE_EXTERNAL, EXTERNAL, True),
        (ONE_CUSTOM, CUSTOM, True),
        (ONE_CUSTOM, EXTERNAL, False),
        (Attributes(verb="get", group="custom.metrics.k8s.io"), CUSTOM, True),
        (ALL_EXTERNAL, CUSTOM, False),
        (ONE_NAMESPACE, NAMESPACE, True),
        (Attributes(verb="get", group="custom.metrics.k8s.io"), NAMESPACE, True),
        (ONE_ROOT_SCOPED, ROOT_SCOPED, True),
        (ONE_NAMESPACE, ROOT_SCOPED, False),
        (ONE_CUSTOM, NAMESPACE, False),
    ],
)
def test_what_a_query_needs(allowed: Attributes, query: MetricQuery, expected: bool) -> None:
    async def run() -> None:
        cluster = Cluster(allowed)
        made = make(cluster, Clock())
        assert await made.may_read(HPA, query) is expected
        asked = len(cluster.asked)
        assert await made.may_read(HPA, query) is expected  # denials are remembered too
        assert len(cluster.asked) == asked

    asyncio.run(run())


def test_masters_need_not_be_asked_of() -> None:
    async def run() -> None:
        cluster = Cluster()
        admin = Identity(user="admin", groups=("system:masters",))
        assert await make(cluster, Clock()).may_read(admin, EXTERNAL)
        assert cluster.asked == []

    asyncio.run(run())


def test_a_cluster_that_does_not_answer_allows_nothing_and_is_asked_again() -> None:
    async def run() -> None:
        cluster, reviews = Cluster(ALL_EXTERNAL), []
        made = make(cluster, Clock(), reviews)
        cluster.error = "gone"
        with pytest.raises(ClusterError):
            await made.may_read(HPA, EXTERNAL)
        cluster.error = ""
        assert await made.may_read(HPA, EXTERNAL)
        assert reviews == [("access", "failed"), ("access", "allowed")]

    asyncio.run(run())


def test_many_at_once_ask_once() -> None:
    async def run() -> None:
        cluster = Cluster(ALL_EXTERNAL)
        cluster.gate = asyncio.Event()
        made = make(cluster, Clock())
        waiting = [asyncio.create_task(made.may_read(HPA, EXTERNAL)) for _ in range(50)]
        await asyncio.sleep(0)
        waiting[0].cancel()  # that one hangs up, the others have their answer
        await asyncio.sleep(0)
        cluster.gate.set()
        assert all(await within(asyncio.gather(*waiting[1:])))
        assert cluster.asked == [ALL_EXTERNAL]

    asyncio.run(run())


def test_what_is_remembered_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(access, "MAX_ENTRIES", 3)

    async def run() -> None:
        asked: list[int] = []

        async def ask(number: int) -> int:
            asked.append(number)
            return number

        kept = Remembered[int](10.0, Clock())
        for number in (1, 2, 3, 4, 4, 2, 1):
            assert await kept.get(number, lambda number=number: ask(number)) == number  # type: ignore[misc]
        assert asked == [1, 2, 3, 4, 1]

    asyncio.run(run())


def test_a_token_is_asked_of_once() -> None:
    async def run() -> None:
        cluster, clock = Cluster(), Clock()
        made = make(cluster, clock)
        for _ in range(2):
            assert await made.identify("good") == HPA
            assert await made.identify("bad") is None
        assert cluster.tokens == ["good", "bad"]
        clock.now_s += 10.1
        await made.identify("good")
        assert cluster.tokens == ["good", "bad", "good"]

    asyncio.run(run())


# -- identity ---------------------------------------------------------------------------------


def headers(*given: tuple[str, str]) -> list[tuple[bytes, bytes]]:
    return [(name.encode(), value.encode()) for name, value in given]


def subject(*names: str) -> dict[str, Any]:
    return {"subject": tuple((("commonName", name),) for name in names)}


@pytest.mark.parametrize(
    ("certificate", "expected"),
    [
        (subject("front-proxy-client"), True),
        (subject("kubelet"), False),
        (subject(), False),
        ({"subject": ((("organizationName", "front-proxy-client"),),)}, False),
        ({}, False),
        (None, False),
    ],
)
def test_the_front_proxy_by_its_certificate(
    certificate: dict[str, Any] | None, expected: bool
) -> None:
    assert is_front_proxy(PROXY, common_name(certificate)) is expected


def test_any_name_will_do_where_none_is_given_but_there_must_be_one() -> None:
    anybody = FrontProxy(ca="pem")
    assert is_front_proxy(anybody, "whoever")
    assert not is_front_proxy(anybody, None)


def test_the_identity_that_the_front_proxy_tells() -> None:
    found = proxied_identity(
        PROXY,
        headers(
            ("X-Remote-User", "jane"),
            ("x-remote-group", "a"),
            ("X-Remote-Group", "b"),
            ("X-Remote-Uid", "7"),
            ("X-Remote-Extra-scopes", "one"),
            ("X-Remote-Extra-scopes", "two"),
            ("X-Remote-Extra-acme.com%2Fproject", "p"),
            ("X-Remote-Extra-", "nothing"),
        ),
    )
    assert found == Identity(
        user="jane",
        groups=("a", "b", "system:authenticated"),
        uid="7",
        extra={"scopes": ("one", "two"), "acme.com/project": ("p",)},
    )


def test_a_probe_without_groups_is_authenticated_and_one_without_user_nobody() -> None:
    found = proxied_identity(PROXY, headers(("X-Remote-User", "system:kube-aggregator")))
    assert found is not None
    assert found.groups == ("system:authenticated",)
    assert proxied_identity(PROXY, headers(("X-Remote-Group", "system:masters"))) is None
    assert proxied_identity(PROXY, headers(("X-Remote-User", ""))) is None


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("Bearer abc", "abc"),
        ("bearer  abc ", "abc"),
        ("Basic abc", None),
        ("Bearer ", None),
        ("Bearer " + "x" * 20_000, None),
    ],
)
def test_a_bearer_token(value: str, expected: str | None) -> None:
    assert bearer_token(headers(("Authorization", value))) == expected


def test_the_config_map_of_the_cluster() -> None:
    found = read_front_proxy(
        {
            "requestheader-client-ca-file": "PEM",
            "requestheader-allowed-names": '["front-proxy-client"]',
            "requestheader-username-headers": '["X-Remote-User"]',
            "requestheader-group-headers": '["X-Remote-Group"]',
            "requestheader-extra-headers-prefix": '["X-Remote-Extra-"]',
        }
    )
    assert found == FrontProxy(ca="PEM", names=("front-proxy-client",))
    assert read_front_proxy({"requestheader-client-ca-file": "PEM"}).names == ()


@pytest.mark.parametrize(
    "data",
    [
        {},
        {"requestheader-client-ca-file": " "},
        {"requestheader-client-ca-file": "PEM", "requestheader-allowed-names": "front"},
        {"requestheader-client-ca-file": "PEM", "requestheader-allowed-names": "[1]"},
    ],
)
def test_a_config_map_that_says_nothing(data: dict[str, str]) -> None:
    with pytest.raises(ClusterError):
        read_front_proxy(data)
