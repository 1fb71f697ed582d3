"""The admin API against its own description: operations, document, real answers, the docs page."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from admin_rig import ServedAdmin, gateway_status, past_decision, pool
from decision_rig import record
from fake_cache import FakeCache, fake_models
from jsonschema import Draft202012Validator
from openapi_spec_validator import validate

from autoscaler.adapters.types import (
    ForecastQuantile,
    KubernetesObject,
    LatencyQuantiles,
    PoolSignals,
    ReplicaSignals,
)
from autoscaler.settings import PoolSettings
from autoscaler.signals.decisions import put_decisions
from autoscaler.signals.history import HistoryStore
from autoscaler.signals.series import PoolMinute
from gateway.admin import schema
from gateway.admin.history import Histories
from gateway.admin.operations import CACHE, OPERATIONS, VERBS, Operation, describe
from gateway.settings.changes import PoolChange

ROOT = Path(__file__).resolve().parents[4]
URL = "hf://org/name"
DOCUMENT = describe(OPERATIONS, "1")
FULL_POOL = pool(
    tiers=[{"tier": "paged", "available": True, "wake_s": 3.0}],
    replicas=(
        {
            "id": "chat-1", "state": "starting", "url": None, "pid": 1, "served_model": None,
            "gpus": (0,), "cpus": (), "inflight_requests": None, "inflight_tokens": None,
            "phase": "fetching 3 GB", "step": "fetching", "since_s": 1.0, "error": None,
            "progress": {"phase": "fetching", "bytes_done": 1}, "woken_from": "remote",
        },
    ),
    tier="remote",
)  # fmt: skip


class OnePool:
    """A control with one pool and one replica, both called ``chat``."""

    def status(self) -> schema.GatewayStatus:
        return gateway_status(FULL_POOL)

    def signals(self) -> schema.SignalsAnswer:
        pod = KubernetesObject(
            resource="pods", namespace="ml", name="chat-0", labels={"app": "chat"}
        )
        replica = ReplicaSignals(replica="chat-1", ready=True, pod=pod, inflight_tokens=5)
        forecast = ForecastQuantile(
            horizon="lead", horizon_s=30.0, quantile=0.95, tokens_per_s=12.5
        )
        one = PoolSignals(
            pool="chat", namespace="ml", objects=(pod,), active=True, ready_replicas=1,
            ttft=LatencyQuantiles(p95_s=0.5), forecast=(forecast,), replicas=(replica,),
        )  # fmt: skip
        return schema.SignalsAnswer(version=7, at_s=1.5, pools=(one,))

    def ready(self) -> tuple[bool, str]:
        return True, "accepting requests"

    def metrics(self) -> bytes:
        return b""

    def explain(self, pool: str) -> list[schema.PastDecisionEntry]:
        return [past_decision()]

    async def scale(self, pool: str, replicas: int | None) -> schema.ScaleAnswer:
        return schema.ScaleAnswer(pool=pool, override=replicas)

    async def sleep(self, pool: str, level: int) -> schema.SleepAnswer:
        return schema.SleepAnswer(pool=pool, sleeping=1, ready=0)

    async def set_disabled(self, pool: str, *, disabled: bool) -> schema.ServiceAnswer:
        return schema.ServiceAnswer(pool=pool, disabled=disabled)

    async def wake(self, pool: str) -> schema.WakeAnswer:
        return schema.WakeAnswer(pool=pool, starting=1, ready=0)

    async def drain(self, replica_id: str) -> schema.DrainAnswer:
        return schema.DrainAnswer(replica=replica_id)

    async def reload(self) -> schema.ReloadAnswer:
        change = PoolChange(name="chat", fields=("engine_args",), replaces=True)
        return schema.ReloadAnswer(
            added=("code",), changed=(change,), removed=(), applied=(), needs_restart=("loaders",)
        )


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    cache = FakeCache(tmp_path_factory.mktemp("cache"))
    cache.preload(URL)
    store = HistoryStore(cache.dir / "history.sqlite3", max_age_s=1e6, max_bytes=1 << 24)
    chat = PoolSettings(name="chat", engine="simulated", model="m")
    histories = Histories(store, lambda: (chat,), lambda: 1e9)
    minute = PoolMinute(pool="chat", minute=int(1e9 // 60) - 1, values={"arrivals": 1.0})
    store.record([minute], 1e9)
    kept = [record(1e9 - 60), record(1e9 - 1)]
    store.write([lambda connection: put_decisions(connection, kept)], 1e9)
    with ServedAdmin(OnePool(), fake_models(cache, {"eu": ""}), histories=histories) as one:
        yield one.http


def body_of(operation: Operation) -> dict[str, Any] | None:
    if operation.request is None:
        return None
    if operation in CACHE:
        return {"model": URL}
    if operation.name == "fill_history":
        return {"start_s": 999_999_900, "series": {"arrivals": [1, None]}}
    return {"replicas": 2} if operation.name == "scale" else {}


def check(operation: Operation, status: int, media: str, text: str) -> None:
    """An answer is what the document says of it, and is parsed as its type."""
    described = DOCUMENT["paths"][operation.path][operation.method.lower()]["responses"]
    content = described[str(status)]["content"]
    found = {**content[media]["schema"], "components": DOCUMENT["components"]}
    Draft202012Validator(found).validate(json.loads(text))


def test_the_document_is_openapi_and_has_every_operation(served: httpx.Client) -> None:
    answer = served.get("/openapi.json").json()
    validate(answer)
    described = {
        (method.upper(), path) for path, methods in answer["paths"].items() for method in methods
    }
    assert described == {(one.method, one.path) for one in OPERATIONS}
    assert answer["components"] == DOCUMENT["components"]
    fields = answer["components"]["schemas"]["PreloadAnswer"]["properties"]
    assert all("description" in fields[name] for name in ("prepared", "prepared_s"))
    index = served.get("/").json()["endpoints"]
    assert set(index) == {f"{one.method} {one.path}" for one in OPERATIONS}


# Evicting comes last in the table: what the others ask of is gone then.
@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda one: one.name)
def test_a_real_answer_is_as_described(served: httpx.Client, operation: Operation) -> None:
    url = operation.path.format(pool="chat", replica="chat")
    answer = served.request(operation.method, url, json=body_of(operation))
    assert answer.status_code == 200, answer.text
    media = answer.headers["content-type"]
    if operation.answer is None:
        assert media in DOCUMENT["paths"][operation.path]["get"]["responses"]["200"]["content"]
        return
    for line in answer.text.splitlines():
        check(operation, 200, media, line)
        parsed = operation.parse(line)
        assert parsed.model_dump(mode="json") == json.loads(line)
    if operation.lines:
        assert isinstance(parsed, schema.ResultLine)


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda one: one.name)
def test_an_error_is_as_described(served: httpx.Client, operation: Operation) -> None:
    url = operation.path.format(pool="chat", replica="chat")
    foreign = {"origin": "http://evil.example"}
    answer = served.request(operation.method, url, headers=foreign)
    check(operation, 403, "application/json", answer.text)
    if operation.request is not None:
        answer = served.post(url, json={"unheard_of": 1})
        check(operation, 400, "application/json", answer.text)
        error = schema.ErrorAnswer.model_validate_json(answer.content).error
        assert (error.code, error.param, error.status) == ("unknown_field", "unheard_of", 400)


def test_the_docs_have_the_same_operations() -> None:
    text = (ROOT / "docs" / "reference" / "admin-api.md").read_text()
    table = re.findall(r"^\| (`.*?) \|", text, re.MULTILINE)
    documented = set()
    for cell in table:
        method = ""
        for code in re.findall(r"`([^`{]+)`", cell):
            first, _, path = code.rpartition(" ")
            method = first or method
            path = path.partition("?")[0].replace("POOL", "{pool}").replace("ID", "{replica}")
            documented.add((method, path))
    assert documented == {(one.method, one.path) for one in OPERATIONS}
    for verb in VERBS.values():
        assert verb.request is not None
        for field in verb.request.model_fields:
            assert re.search(rf"`[^`]*\b{field}\b[^`]*`", text), f"{verb.name}: {field}"
    for code in schema.ERRORS:
        assert f"`{code}`" in text, code
