"""The command line: what each verb prints, its exit code, and that nothing ever is a traceback."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import typer
from admin_rig import (
    NOW_S,
    ServedAdmin,
    ServedApp,
    gateway_status,
    past_decision,
    pool,
    replica,
)
from datapath_rig import make_certificate

from autoscaler.policy.gpu_faults import GpuAction
from autoscaler.settings import PoolSettings, ProcessPoolSettings
from autoscaler.types import (
    Bound,
    CapacitySource,
    NotKnown,
    RecentTraffic,
    ReplicaCapacity,
    Signal,
    TierReport,
)
from gateway.admin import schema
from gateway.cli import client, main, tables, verbs
from gateway.cli.base import Effects
from gateway.cli.explain import BOUNDS, SIGNALS, explain_text
from gateway.cli.tables import Screen
from gateway.compose import listeners
from gateway.compose.up import banner
from gateway.doctor.checks import Check, Status, fail
from gateway.settings import defaults
from gateway.settings.changes import PoolChange
from gateway.settings.load import ConfigError, LoadedSettings
from gateway.settings.schema import Settings
from gateway.terminal import duration
from modelcache.types import Tier

ROOT = Path(__file__).resolve().parents[4]
PIPE = Screen()
TERMINAL = Screen(terminal=True, width=200)

STATUS = gateway_status(pool())


RELOADED = schema.ReloadAnswer(
    added=("code",),
    changed=(PoolChange(name="chat", fields=("engine_args",), replaces=True),),
    removed=("old",),
    applied=("autoscaler.tick_s",),
    needs_restart=("gateway.port",),
)


class ScriptedControl:
    """Answers with what is above."""

    def __init__(self) -> None:
        self.scaled: list[tuple[str, int | str | None]] = []
        self.mistakes: list[str] = []
        self.disabled = False

    def status(self) -> schema.GatewayStatus:
        return STATUS

    def explain(self, pool: str) -> list[schema.PastDecisionEntry]:
        if pool not in {"chat", "org/m 1"}:
            raise NotKnown("pool", pool, ("chat", "org/m 1"))
        old = past_decision(
            desired=0, reason="at_zero", detail="no demand", count=7,
            first_at_s=NOW_S - 90, last_at_s=NOW_S - 13,
        )  # fmt: skip
        return [old, past_decision()]

    async def scale(self, pool: str, replicas: int | None) -> schema.ScaleAnswer:
        if pool not in {"chat", "org/m 1"}:
            raise NotKnown("pool", pool, ("chat", "org/m 1"))
        if replicas is not None and replicas > 9:
            raise ValueError("replicas must be 0 to 9")
        self.scaled.append((pool, replicas))
        return schema.ScaleAnswer(pool=pool, override=replicas, disabled=self.disabled)

    async def set_disabled(self, pool: str, *, disabled: bool) -> schema.ServiceAnswer:
        self.scaled.append((pool, "disabled" if disabled else "enabled"))
        return schema.ServiceAnswer(pool=pool, disabled=disabled)

    async def reload(self) -> schema.ReloadAnswer:
        if self.mistakes:
            raise schema.AdminError("bad_settings", "\n".join(self.mistakes))
        return RELOADED


class Served(ServedAdmin):
    """A real admin listener over it."""

    def __init__(self) -> None:
        self.control = ScriptedControl()
        super().__init__(self.control)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with Served() as one:
        yield one


@dataclass(frozen=True, kw_only=True)
class Recorded(Effects):
    """Effects that are only written down; the time is that of the scripted answers."""

    now_s: Callable[[], float] = lambda: NOW_S
    started: list[LoadedSettings] = field(default_factory=list)
    raised: BaseException | None = None
    reloads: int = 0
    code: int = 0
    checks: tuple[Check, ...] = ()

    def up(self, loaded: LoadedSettings, read_again: Callable[[], LoadedSettings]) -> int:
        self.started.extend([loaded, read_again()][: 1 + self.reloads])
        if self.raised is not None:
            raise self.raised
        return self.code

    def doctor(self, settings: Settings, measure: bool) -> Sequence[Check]:
        return self.checks if measure else ()


@pytest.fixture
def effects() -> Recorded:
    return Recorded()


def tidegate(*words: str, effects: Effects | None = None) -> int:
    return main.main(words, effects or Recorded())


# ── Reading verbs ─────────────────────────────────────────────────────────────────────────────────


ENGINE = schema.EngineEntry(
    age_s=1.5,
    **{name: None for name in schema.EngineEntry.model_fields if name != "age_s"},
)


@pytest.mark.parametrize(
    ("state", "engine", "cells"),
    [
        ("ready", {"running_requests": 3, "waiting_requests": 0}, "3 0 ?"),
        ("ready", {"running_requests": 3, "kv_cache_usage_fraction": 0.257}, "3 ? 26 %"),
        ("unhealthy", None, "? ? ?"),
        ("starting", None, "- - -"),
    ],
)
def test_status_shows_what_engines_say_of_their_load(
    state: str, engine: dict[str, float] | None, cells: str
) -> None:
    entry = None if engine is None else ENGINE.model_copy(update=engine)
    one = replica(state=state, engine=entry, inflight_requests=8, inflight_tokens=9)
    text = tables.status(gateway_status(pool(replicas=(one,))), PIPE, NOW_S)
    heading, row = (line for line in text.splitlines() if line.startswith(("REPLICA", "chat-1")))
    at = slice(heading.index("RUNNING"), heading.index("PID"))
    assert " ".join(row[at].split()) == cells


def test_status_shows_what_a_replica_carries_and_where_that_is_known_from() -> None:
    known = ReplicaCapacity(tokens_per_s=5_204.6, source=CapacitySource.HISTORY)
    made = past_decision(capacity=known)
    text = tables.status(gateway_status(pool(last_decision=made)), PIPE, NOW_S)
    assert "chat: 5205 tokens/s per replica (history)" in text.splitlines()


def gpu(**given: Any) -> schema.GpuEntry:
    base = {
        "index": 0, "uuid": "GPU-0", "name": "NVIDIA H100", "driver": "1", "figures": {},
        "throttle_reasons": None, "xid_counts": {}, "processes": None, "error": None,
        "fault": None, "replicas": (),
    }  # fmt: skip
    return schema.GpuEntry(**{**base, **given})


FIGURES = {
    "utilization_fraction": 0.87, "memory_used_bytes": 19e9, "memory_total_bytes": 80e9,
    "power_watts": 312.4, "temperature_celsius": 61.0,
}  # fmt: skip
FAULT = schema.GpuFaultEntry(action=GpuAction.RESET_GPU, detail="XID 95", xid=95, at_s=NOW_S)


@pytest.mark.parametrize(
    ("entry", "row"),
    [
        (
            gpu(figures=FIGURES, replicas=("chat-1",), throttle_reasons=("power_cap",)),
            "0 NVIDIA H100 87 % 19.0 GB of 80.0 GB 312 W 61 °C chat-1 clocks lowered: power cap",
        ),
        (gpu(fault=FAULT), "0 NVIDIA H100 ? ? of ? ? ? - XID 95: reset the GPU"),
    ],
)
def test_status_shows_gpus(entry: schema.GpuEntry, row: str) -> None:
    node = schema.NodeGpus(source="nvml", age_s=1.0, why_not="", gpus=(entry,))
    text = tables.status(gateway_status(pool(), gpus=node), PIPE, NOW_S)
    assert row in [" ".join(line.split()) for line in text.splitlines()]


@pytest.mark.parametrize(
    ("source", "gpus", "shown"),
    [("nvml", None, ""), ("nvml", (), ""), ("dcgm", None, "it is down")],
)
def test_status_without_gpus_says_so_only_where_they_were_asked_for(
    source: str, gpus: tuple[()] | None, shown: str
) -> None:
    node = schema.NodeGpus(source=source, age_s=None, why_not="it is down", gpus=gpus)
    text = tables.gpu_table(node, PIPE)
    assert bool(text) is bool(shown)
    assert shown in text
    assert tables.gpu_table(None, PIPE) == ""


def test_a_fault_of_a_gpu_is_in_its_replicas_detail() -> None:
    one = replica(state="ready", phase="", gpu_fault=FAULT)
    text = tables.status(gateway_status(pool(replicas=(one,))), PIPE, NOW_S)
    assert "fault of its GPU: XID 95: reset the GPU" in text


def test_every_action_has_words() -> None:
    assert set(tables.GPU_ACTIONS) == set(GpuAction)


def test_status(served: Served, capsys: pytest.CaptureFixture[str]) -> None:
    assert tidegate("status", "--admin", served.url) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "\x1b" not in out
    head, _, titles, pool, _, _, replica, _, why = out.splitlines()
    assert head.startswith("tidegate 0.1.0  http://127.0.0.1:8000")
    assert "up 3 min 12 s" in head
    assert "2 workers" in head
    assert titles.split()[:4] == ["POOL", "ENGINE", "READY", "DESIRED"]
    assert pool.split()[:4] == ["chat", "vllm", "0", "1"]
    for text in ("1 starting", "900", "31 s"):
        assert text in pool
    assert why == "chat: 3 requests are held (12 s ago)"
    for text in ("chat-1", "starting", "12 s", "4242", "http://127.0.0.1:9001", "loading weights"):
        assert text in replica


def test_status_as_json(served: Served, capsys: pytest.CaptureFixture[str]) -> None:
    assert tidegate("status", "--json", "--admin", served.url.removeprefix("http://")) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown == json.loads(STATUS.model_dump_json())


def test_status_again_and_again_until_interrupted(
    served: Served, capsys: pytest.CaptureFixture[str]
) -> None:
    naps = []

    def nap(seconds: float) -> None:
        naps.append(seconds)
        if len(naps) == 3:
            raise KeyboardInterrupt

    words = ("status", "--watch", "--interval", "0.5", "--admin", served.url)
    assert tidegate(*words, effects=Recorded(sleep=nap)) == 130
    assert naps == [0.5] * 3
    assert capsys.readouterr().out.count("DESIRED") == 3


def test_a_watch_goes_on_while_nobody_answers(
    served: Served, somewhere_else: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not there yet, then there, then started again elsewhere."""
    looks = []
    urls = ["http://127.0.0.1:1", served.url, "http://127.0.0.1:2"]

    def leave() -> None:
        one = listeners.Running(pid=os.getpid(), url="http://x", admin_url=urls[len(looks)])
        listeners.leave_record(somewhere_else / ".tidegate", one)

    def nap(seconds: float) -> None:
        looks.append(capsys.readouterr())
        if len(looks) == len(urls):
            raise KeyboardInterrupt
        leave()

    for words in ([], ["--json"]):
        looks.clear()
        leave()
        assert tidegate("status", "--watch", *words, effects=Recorded(sleep=nap)) == 130
        away, there, gone = looks
        for look, url in ((away, urls[0]), (gone, urls[2])):
            said = look.err if words else look.out
            assert "ot reachable: nothing answers at " + url in said
            assert "READY" not in look.out
        assert "chat" in there.out
        assert there.err == ""
    assert tidegate("status") == 2


def test_the_admin_listener_is_found_by_record_then_settings(
    served: Served, somewhere_else: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = listeners.Running(pid=os.getpid(), url="http://x", admin_url=served.url)
    listeners.leave_record(somewhere_else / ".tidegate", one)
    assert tidegate("status") == 0
    listeners.remove_record(somewhere_else / ".tidegate", os.getpid() + 1)
    assert tidegate("status") == 0
    listeners.remove_record(somewhere_else / ".tidegate", os.getpid())
    port = served.url.rpartition(":")[2]
    Path("tidegate.toml").write_text(f"[gateway]\nadmin_port = {port}\n", encoding="utf-8")
    assert tidegate("status") == 0
    assert tidegate("status", "--set", "gateway.admin_port=1") == 2
    assert "http://127.0.0.1:1:" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "[]", "[" * 100_000),
        *(f'{{"pid": {pid}, "url": "a", "admin_url": "b"}}' for pid in (0, -1, "1e400", 10**30)),
    ],
)
def test_a_damaged_or_stale_record_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / listeners.RECORD_NAME).write_text(text, encoding="utf-8")
    assert listeners.read_record(tmp_path) is None
    assert listeners.read_record(tmp_path / "nowhere") is None


def test_a_record_that_cannot_be_left_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / listeners.RECORD_NAME / "in the way").mkdir(parents=True)
    with pytest.raises(OSError):
        listeners.leave_record(tmp_path, listeners.Running(pid=1, url="a", admin_url="b"))
    assert [one.name for one in tmp_path.iterdir()] == [listeners.RECORD_NAME]


@pytest.mark.parametrize(
    ("count", "expected", "says"),
    [("2", 2, "held at 2"), ("0", 0, "held at 0"), ("auto", None, "by the autoscaler again")],
)
def test_scale(
    served: Served,
    capsys: pytest.CaptureFixture[str],
    count: str,
    expected: int | None,
    says: str,
) -> None:
    assert tidegate("scale", "org/m 1", count, "--admin", served.url) == 0
    assert served.control.scaled[-1] == ("org/m 1", expected)
    assert says in capsys.readouterr().out


def test_a_number_that_is_refused_is_no_wrong_usage(
    served: Served, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tidegate("scale", "chat", "99", "--admin", served.url) == 2
    err = capsys.readouterr().err
    assert err.startswith("tidegate: replicas must be 0 to 9")
    assert "--help" not in err


@pytest.mark.parametrize(("number", "how"), [("1", "held at 1"), ("auto", "scaled by the")])
def test_scale_says_that_a_pool_is_out_of_service(
    served: Served,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    number: str,
    how: str,
) -> None:
    monkeypatch.setattr(served.control, "disabled", True)
    assert tidegate("scale", "chat", number, "--admin", served.url) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"chat is out of service: {how}")
    assert out.endswith("from `tidegate pool enable chat` on.\n")


def test_a_pool_is_taken_out_of_service_and_back(
    served: Served, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tidegate("pool", "disable", "org/m 1", "--admin", served.url) == 0
    assert "out of service" in capsys.readouterr().out
    assert tidegate("pool", "enable", "org/m 1", "--json", "--admin", served.url) == 0
    assert json.loads(capsys.readouterr().out) == {"pool": "org/m 1", "disabled": False}
    assert served.control.scaled[-2:] == [("org/m 1", "disabled"), ("org/m 1", "enabled")]


def test_explain(served: Served, capsys: pytest.CaptureFixture[str]) -> None:
    assert tidegate("explain", "chat", "--admin", served.url) == 0
    out = capsys.readouterr().out
    for text in (
        "chat: 1 desired, 0 ready, 1 starting",
        "why     3 requests are held",
        "signal  requests held in the gateway",
        "bound   none",
        "no demand",
        "1 min 30 s ago",
    ):
        assert text in out
    assert tidegate("explain", "chat", "--limit", "1", "--json", "--admin", served.url) == 0
    assert len(json.loads(capsys.readouterr().out)["decisions"]) == 1


@pytest.mark.parametrize("verb", [["explain", "none"], ["scale", "none", "1"]])
def test_an_unknown_pool_is_one_line_and_2(
    served: Served, capsys: pytest.CaptureFixture[str], verb: list[str]
) -> None:
    assert tidegate(*verb, "--admin", served.url) == 2
    assert capsys.readouterr().err == (
        "tidegate: There is no pool 'none'; the pools are chat, org/m 1.\n"
    )


@pytest.mark.parametrize(
    "arguments",
    [
        ["status"],
        ["status", "--json"],
        ["explain", "p"],
        ["scale", "p", "1"],
        ["scale", "p", "auto"],
        ["pool", "disable", "p"],
    ],
)
def test_no_answer_is_one_line_and_2(
    capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    assert tidegate(*arguments, "--admin", "http://127.0.0.1:1") == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("tidegate: nothing answers at http://127.0.0.1:1")
    assert err.count("\n") == 1


def test_another_server_there_is_one_line_and_2(capsys: pytest.CaptureFixture[str]) -> None:
    class Other:
        """An HTTP server that is no Tidegate."""

        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            start = {"type": "http.response.start", "status": 200, "headers": []}
            await send(start)
            await send({"type": "http.response.body", "body": b"<html>"})

    with ServedApp(Other()) as served:
        assert tidegate("status", "--admin", served.url) == 2
    assert "is no Tidegate admin listener" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("http://h:1", "http://h:1"),
        ("h:1/", "http://h:1"),
        ("https://[::1]:2", "https://[::1]:2"),
        ("localhost", "http://localhost"),
        ("/run/tidegate/admin.sock", "unix:/run/tidegate/admin.sock"),
        ("unix:/run/tidegate/admin.sock", "unix:/run/tidegate/admin.sock"),
        ("ftp://h", None),
        (":::", None),
        ("h:99999", None),
        ("", None),
    ],
)
def test_addresses(address: str, expected: str | None) -> None:
    if expected is None:
        with pytest.raises(typer.BadParameter, match="is not an address"):
            client.check_address(address)
    else:
        assert client.check_address(address) == expected


# ── up ────────────────────────────────────────────────────────────────────────────────────────────


def test_up_simulated_needs_nothing(effects: Recorded) -> None:
    assert (
        tidegate("up", "--engine", "simulated", "--port", "0", "--admin-port", "0", effects=effects)
        == 0
    )
    (loaded,) = effects.started
    (pool,) = loaded.settings.pools
    assert (pool.name, pool.engine, pool.min_replicas) == ("simulated", "simulated", 0)
    assert pool.max_replicas > 1  # or scaling out cannot be tried
    assert (loaded.settings.gateway.port, loaded.origins["gateway.port"]) == (0, "--port")


def test_up_without_engine_says_how_to_get_one(
    effects: Recorded, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tidegate("up", effects=effects) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("tidegate: loaders.engine_python")
    assert "--engine simulated" in lines[0]
    assert "`make run`" in lines[1]
    assert effects.started == []


def test_up_with_the_built_in_pool(effects: Recorded) -> None:
    Path(".venv-engine/bin").mkdir(parents=True)
    Path(".venv-engine/bin/python").touch()
    defaults.DEFAULT_MODEL_DIRECTORY.mkdir(parents=True)
    assert tidegate("up", "--workers", "2", effects=effects) == 0
    (pool,) = effects.started[0].settings.pools
    assert (pool.name, pool.engine) == ("smollm2", "vllm")
    assert Path(pool.model or "") == defaults.DEFAULT_MODEL_DIRECTORY.absolute()
    assert effects.started[0].settings.gateway.workers == 2


def test_up_turns_configured_pools_to_simulated(effects: Recorded) -> None:
    Path("tidegate.toml").write_text(
        '[[pools]]\nname = "big"\nengine = "vllm"\nmodel = "/no/such"\nengine_args = ["--x"]\n'
        "max_replicas = 3\n[pools.process]\ngpus = [0, 1]\ngpus_per_replica = 2\n"
        '[[pools]]\nname = "far"\nbackend = "static"\n[pools.static]\nurls = ["http://h:1"]\n',
        encoding="utf-8",
    )
    assert tidegate("up", effects=effects) == 2
    assert tidegate("up", "--engine", "simulated", effects=effects) == 0
    big, far = effects.started[0].settings.pools
    assert (big.engine, big.engine_args, big.process) == ("simulated", (), ProcessPoolSettings())
    assert (big.max_replicas, effects.started[0].origins["pools.0.engine"]) == (3, "--engine")
    assert (far.backend, far.engine) == ("static", None)


@pytest.mark.parametrize(
    ("model", "name", "aliases", "meant"),
    [
        ("Qwen/Qwen3-8B", "Qwen3-8B", ("Qwen/Qwen3-8B",), "hf://Qwen/Qwen3-8B"),
        ("hf://Qwen/Qwen3-8B@v1", "Qwen3-8B", ("Qwen/Qwen3-8B",), "hf://Qwen/Qwen3-8B@v1"),
        ("s3://models/qwen", "qwen", (), "s3://models/qwen"),
        ("tiny", "tiny", (), "tiny"),
        ("./here/model dir", "model-dir", (), "{here}/here/model dir"),
    ],
)
def test_up_with_one_model(
    effects: Recorded, model: str, name: str, aliases: tuple[str, ...], meant: str
) -> None:
    Path("here/model dir").mkdir(parents=True)
    python = Path("python")
    python.touch()
    sets = ["--set", "loaders.engine_python=python", "--set", "gateway.drain_s=1"]
    assert tidegate("up", "--model", model, *sets, effects=effects) == 0
    (pool,) = effects.started[0].settings.pools
    assert (pool.name, pool.aliases, pool.engine) == (name, aliases, "vllm")
    assert pool.model == meant.format(here=Path.cwd())
    assert tidegate("up", "--model", model, "--engine", "simulated", effects=effects) == 0
    assert effects.started[1].settings.pools[0].engine == "simulated"


def test_status_marks_what_a_reload_left_behind() -> None:
    old = replica(state="ready", phase="", outdated=True)
    report = gateway_status(pool(name="chat", replicas=(old,)), pool(name="old", removed=True))
    text = tables.status(report, PIPE, NOW_S)
    assert "old (removed)" in text
    (line,) = [one for one in text.splitlines() if one.startswith("chat-1 ") and "ready" in one]
    assert "to be replaced" in line


def test_every_bound_and_signal_of_a_decision_has_words() -> None:
    assert {*BOUNDS} == {*Bound}
    assert {*Signal} - {Signal.NONE} <= {*SIGNALS}


def test_reload_says_what_is_different(served: Served, capsys: pytest.CaptureFixture[str]) -> None:
    assert tidegate("reload", "--admin", served.url) == 0
    assert capsys.readouterr().out.splitlines() == [
        "pool code is added",
        "pool chat is changed: engine_args; its replicas are replaced",
        "pool old is removed; it serves the requests it has",
        "applied: autoscaler.tick_s",
        "needs a restart: gateway.port",
    ]
    assert tidegate("reload", "--json", "--admin", served.url) == 0
    out = capsys.readouterr().out
    assert schema.ReloadAnswer.model_validate_json(out) == RELOADED


def test_reload_of_settings_with_mistakes_is_2_and_a_line_for_each(
    served: Served, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(served.control, "mistakes", ["a.b: one", "c.d: another"])
    assert tidegate("reload", "--admin", served.url) == 2
    assert capsys.readouterr().err.splitlines() == [
        "tidegate: a.b: one",
        "tidegate: c.d: another",
    ]


def test_what_up_reads_again_is_read_as_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TIDEGATE__AUTOSCALER__TICK_S", "3")
    effects = Recorded(reloads=1)
    words = ("up", "--engine", "simulated", "--set", "gateway.port=9")
    assert tidegate(*words, effects=effects) == 0
    first, again = effects.started
    assert first == again
    assert (again.settings.gateway.port, again.settings.autoscaler.tick_s) == (9, 3.0)


def test_what_up_reads_again_is_the_file_of_the_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Removed(Recorded):
        def up(self, loaded: LoadedSettings, read_again: Callable[[], LoadedSettings]) -> int:
            file.unlink()
            read_again()
            return 0

    file = tmp_path / "tidegate.toml"
    file.write_text('[[pools]]\nname = "a"\nengine = "simulated"\nmodel = "a"\n')
    assert tidegate("up", effects=Removed()) == 2
    assert "cannot be read" in capsys.readouterr().err


def test_up_passes_the_exit_code_and_warnings_on(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("up", "--engine", "simulated", "--set", "gateway.admin_host=0.0.0.0")
    assert tidegate(*words, effects=Recorded(code=7)) == 7
    assert "tidegate: warning: gateway.admin_host" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("raised", "code", "says"),
    [
        (KeyboardInterrupt(), 130, ""),
        (ConfigError([]), 2, ""),
        (RuntimeError("it\nbroke"), 70, "tidegate: internal error at "),
        (OSError(28, "No space left on device"), 70, "No space left on device"),
    ],
)
def test_nothing_is_ever_a_traceback(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    raised: BaseException,
    code: int,
    says: str,
) -> None:
    effects = Recorded(raised=raised)
    assert tidegate("up", "--engine", "simulated", effects=effects) == code
    err = capsys.readouterr().err
    assert "Traceback" not in err
    assert says in err
    assert err.count("\n") == (1 if says else 0)
    monkeypatch.setenv("TIDEGATE_DEBUG", "1")
    tidegate("up", "--engine", "simulated", effects=effects)
    assert ("Traceback" in capsys.readouterr().err) is (code == 70)


@pytest.mark.parametrize("place", ["a file", "a file/in it", "/proc/foo"])
def test_a_state_dir_that_cannot_be_written_to_is_one_line(
    capsys: pytest.CaptureFixture[str], somewhere_else: Path, place: str
) -> None:
    (somewhere_else / "a file").touch()
    words = ["--port", "0", "--admin-port", "0", "-s", f"state_dir={place}"]
    assert tidegate("up", "--engine", "simulated", *words, effects=Effects()) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"tidegate: state_dir = {place}: cannot be written to: ")
    assert err.count("\n") == 1


# ── config and doctor ─────────────────────────────────────────────────────────────────────────────


def test_config_check(capsys: pytest.CaptureFixture[str]) -> None:
    assert tidegate("config", "check") == 0
    out = capsys.readouterr().out
    assert "The settings are valid" in out
    assert "0 values given" in out  # what the built-in pool says, nobody gave
    assert "`tidegate doctor`" in out  # and it was not looked for
    assert tidegate("config", "check", "-s", "pools=[]", "-s", "gateway.port=1") == 0
    out = capsys.readouterr().out
    assert "2 values given" in out
    assert "doctor" not in out
    Path("other.toml").write_text("[gateway]\nport = 1\nprot = 2\n", encoding="utf-8")
    assert tidegate("config", "check", "-c", "other.toml", "-s", "gateway.workers=-1") == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "tidegate: gateway.workers = -1: it must be an integer from 0 to 256 "
        "(--set gateway.workers=-1)",
        "tidegate: gateway.prot is an unknown setting; did you mean gateway.port? "
        "(other.toml, line 3)",
    ]
    assert tidegate("config", "check", "-c", "other.toml", "--json") == 2
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] is False
    assert report["problems"][0]["field"] == "gateway.prot"
    assert tidegate("config", "check", "-s", "gateway.workers=-1", "--json") == 2
    assert json.loads(capsys.readouterr().out)["problems"] == [
        {
            "field": "gateway.workers",
            "message": "it must be an integer from 0 to 256",
            "origin": "--set gateway.workers=-1",
            "value": "-1",
        }
    ]
    assert tidegate("config", "check", "-c", "nowhere.toml") == 2


def test_config_show(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    Path("tidegate.toml").write_text("[gateway]\nport = 9000\n", encoding="utf-8")
    monkeypatch.setenv("TIDEGATE__GATEWAY__DRAIN_S", "5")
    assert tidegate("config", "show") == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert lines["gateway.port"].split(maxsplit=2)[1:] == ["9000", "tidegate.toml, line 2"]
    assert lines["gateway.drain_s"].endswith("environment TIDEGATE__GATEWAY__DRAIN_S")
    assert lines["gateway.tls_key"].split(maxsplit=2)[1:] == ["(unset)", "default"]
    assert tidegate("config", "show", "--changed", "--json", "-s", "router.learning_rate=0.5") == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["router.learning_rate"] == {
        "value": 0.5,
        "origin": "--set router.learning_rate=0.5",
    }
    assert "gateway.host" not in shown
    assert shown["pools.0.name"]["origin"] == "built in"


def test_the_printed_example_is_a_good_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert tidegate("config", "example") == 0
    Path("tidegate.toml").write_text(capsys.readouterr().out, encoding="utf-8")
    sets = ["--set", "loaders.engine_python=python", "--set", "pools.0.model=."]
    Path("python").touch()
    assert tidegate("config", "check", *sets) == 0
    # The engine and the model that it names are `make run`'s to bring.
    assert tidegate("config", "check") == 2
    fields = [line.split()[1] for line in capsys.readouterr().err.splitlines()]
    assert fields == ["loaders.engine_python", "pools.0.model"]


def test_config_check_finds_what_up_would_refuse_all_at_once(
    capsys: pytest.CaptureFixture[str], effects: Recorded
) -> None:
    text = '[[pools]]\nname = "{0}"\nengine = "vllm"\nmodel = "./{0}"\n'
    tls = '[gateway]\ntls_certificate = "no.crt"\ntls_key = "no.key"\n'
    Path("tidegate.toml").write_text(tls + text.format("a") + text.format("b"), encoding="utf-8")
    for verb in (["config", "check"], ["up"]):
        assert tidegate(*verb, effects=effects) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert [line.split()[1] for line in err.splitlines()] == [
            "gateway.tls_certificate",
            "gateway.tls_key",
            "loaders.engine_python",
            "pools.0.model",
            "pools.1.model",
        ]
        assert "= no.key: cannot be read: No such file or directory (tidegate.toml, " in err
    assert effects.started == []
    assert tidegate("config", "check", "--json", effects=effects) == 2
    report = json.loads(capsys.readouterr().out)
    assert (report["ok"], len(report["problems"])) == (False, 5)
    Path("no.crt").write_text("no certificate")
    Path("no.key").write_text("no key")
    words = ["--engine", "simulated"]
    assert tidegate("up", *words, effects=effects) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("tidegate: gateway.tls_certificate = no.crt: is no ")
    make_certificate(Path(), "localhost")
    words += ["-s", "gateway.tls_certificate=cert.pem", "-s", "gateway.tls_key=key.pem"]
    assert tidegate("up", *words, effects=effects) == 0
    assert len(effects.started) == 1


def test_a_warning_has_its_field_before_a_colon(capsys: pytest.CaptureFixture[str]) -> None:
    assert tidegate("config", "check", "-s", "pools=[]") == 0
    assert capsys.readouterr().err == (
        "tidegate: warning: pools: no pool is configured, so every request will be answered 404 "
        "(--set pools=[])\n"
    )


@pytest.mark.parametrize(("worst", "code"), [("ok", 0), ("warn", 0), ("fail", 1)])
def test_doctor(capsys: pytest.CaptureFixture[str], worst: str, code: int) -> None:
    checks = (
        Check(name="python", status=Status.OK, finding="3.11"),
        Check(name="disk", status=Status(worst), finding="little", advice="make room"),
    )
    effects = Recorded(checks=checks)
    assert tidegate("doctor", effects=effects) == code
    out = capsys.readouterr().out
    assert "disk: make room" in out
    assert tidegate("doctor", "--json", effects=effects) == code
    assert [one["status"] for one in json.loads(capsys.readouterr().out)["checks"]] == ["ok", worst]
    assert tidegate("doctor", "--json", "--no-measure", effects=effects) == 0


# ── Usage ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nonsense"], "No such command 'nonsense'"),
        (["stats"], "status"),
        (["status", "--nonsense"], "--nonsense"),
        (["scale", "p"], "N|auto"),
        (["scale", "p", "many"], "'many' is neither"),
        (["scale", "p", "1.5"], "neither"),
        (["up", "--engine", "sglang"], "--engine"),
        (["up", "--port", "x"], "--port"),
        (["up", "--workers", "-1"], "--workers"),
        (["status", "--admin", ":::"], "is not an address"),
        (["explain", "p", "--limit", "0"], "--limit"),
    ],
)
def test_wrong_usage_is_one_line_and_2(
    capsys: pytest.CaptureFixture[str], arguments: list[str], says: str
) -> None:
    assert tidegate(*arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert says in err
    assert err.count("\n") == 1
    assert "--help`)" in err


@pytest.mark.parametrize("verb", ["up", "agent", "status", "scale", "explain", "doctor", "config"])
def test_help_teaches(capsys: pytest.CaptureFixture[str], verb: str) -> None:
    assert tidegate("--help") == 0
    overview = capsys.readouterr().out
    assert verb in overview
    assert tidegate(verb, "--help") == 0
    text = capsys.readouterr().out
    assert "tidegate" in text
    if verb != "config":
        assert f"tidegate {verb}" in text.partition("Examples")[2] + text.partition("Example")[2]


@pytest.mark.parametrize("words", [[], ["status"], ["doctor"], ["model"], ["model", "evict"]])
def test_a_flag_has_no_type_behind_it(capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
    assert tidegate(*words, "--help") == 0
    text = capsys.readouterr().out
    assert "--help" in text
    assert " -h " in text
    assert "bool" not in text


def test_no_arguments_is_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert tidegate() == 2
    assert "Commands" in capsys.readouterr().out


def test_every_verb_has_help_with_an_example() -> None:
    group = typer.main.get_command(verbs.app)
    found = dict(group.commands)
    found |= found.pop("config").commands
    found |= found.pop("model").commands
    found |= found.pop("pool").commands
    past = found.pop("history").commands
    found |= {f"history {name}": verb for name, verb in past.items()}
    found |= {f"import {name}": verb for name, verb in found.pop("import").commands.items()}
    found |= {f"deploy {name}": verb for name, verb in found.pop("deploy").commands.items()}
    assert set(found) == {
        *(
            "up",
            "agent",
            "adapter",
            "status",
            "scale",
            "reload",
            "explain",
            "forecast",
            "replay",
            "doctor",
            "check",
            "show",
            "example",
        ),
        *("disable", "enable"),
        *("deploy check", "history show", "history export", "history import"),
        *("import ahpa", "import fluid"),
        *("ls", "preload", "prewarm", "pin", "unpin", "evict", "verify", "replicate", "bundle"),
        "hold",
    }
    for name, verb in found.items():
        assert "**Example" in (verb.help or ""), name
        assert all(getattr(one, "help", "") for one in verb.params if one.name != "help"), name


def test_the_command_itself_is_quick_and_light() -> None:
    """In its own process: version, no heavy import, and an end to a pipe that closed."""
    code = (
        "import sys; from gateway.cli.main import main; code = main(['--version']); "
        "heavy = {'pydantic', 'httpx', 'uvicorn', 'starlette', 'uvloop', 'rich.table'}; "
        "print(sorted(heavy & set(sys.modules))); sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
    version, heavy = done.stdout.splitlines()
    assert version.startswith("tidegate ")
    assert heavy == "[]"


def test_a_pipe_that_closed_is_no_error() -> None:
    code = "import sys; from gateway.cli.main import main; sys.exit(main(['config', 'example']))"
    script = f"{shlex.quote(sys.executable)} -c {shlex.quote(code)} | head -c 10"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", script],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "# Tidegate", "")


# ── Rendering ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (None, "?"),
        (float("nan"), "?"),
        (-1, "0.0 s"),
        (0.44, "0.4 s"),
        (9.96, "10 s"),
        (59.4, "59 s"),
        (60, "1 min"),
        (192, "3 min 12 s"),
        (3_599.6, "1 h"),
        (7_500, "2 h 5 min"),
        (200_000, "2 days 7 h"),
    ],
)
def test_durations(seconds: float | None, expected: str) -> None:
    assert duration(seconds) == expected


def test_unknown_is_not_zero() -> None:
    unknown = pool(queued_requests=None, queued_tokens=None, wake_eta_s=None, replicas=())
    text = tables.status(gateway_status(unknown), PIPE, NOW_S)
    cells = text.splitlines()[3].split("  ")
    assert [cell.strip() for cell in cells if cell.strip() == "?"] == ["?"] * 2


def test_a_terminal_gets_a_table_a_pipe_gets_text() -> None:
    drawn = tables.status(STATUS, TERMINAL, NOW_S)
    assert "\x1b[" in drawn
    assert "loading weights" in drawn
    assert "\x1b[" not in tables.status(STATUS, PIPE, NOW_S)
    explained = schema.ExplainAnswer(pool="chat", decisions=(past_decision(),))
    assert "\x1b[" in explain_text(explained, TERMINAL, NOW_S)
    assert "\x1b[" in tables.doctor([fail("a", "f", "do")], TERMINAL)


@pytest.mark.parametrize("screen", [PIPE, TERMINAL])
def test_an_engines_words_do_not_steer_the_terminal(screen: Screen) -> None:
    evil = "\x1b]0;title\x07\x1b[2Jgone\r"
    failed = pool(
        error=f"first {evil}\nsecond {evil}",
        failures=3,
        retry_in_s=8,
        replicas=(replica(error=f"{evil}\nthe log", phase=evil),),
    )
    text = tables.status(gateway_status(failed), screen, NOW_S)
    assert "\x1b]" not in text
    assert "\x1b[2J" not in text
    assert "\x07" not in text
    assert "chat: 3 failures in a row, next try in 8.0 s: first" in text
    assert "\n  second" in text
    assert "the log" not in text


def test_status_says_what_is_simulated_and_what_is_held() -> None:
    text = tables.status(gateway_status(pool(engine="simulated", override=1)), PIPE, NOW_S)
    assert "made-up" in text
    assert "1 (held)" in text


def test_status_of_no_pools() -> None:
    assert "POOL" in tables.status(gateway_status(), PIPE, NOW_S)
    nothing = schema.ExplainAnswer(pool="p", decisions=())
    assert "no decision yet" in explain_text(nothing, PIPE, NOW_S)


def explained(current: schema.PoolEntry) -> list[str]:
    answer = schema.ExplainAnswer(
        pool="chat", decisions=(past_decision(desired=1, supply=1),), current=current
    )
    return explain_text(answer, PIPE, NOW_S).splitlines()


def test_explain_says_what_fails() -> None:
    failing = pool(error="CUDA out of\x1b memory\nthe log", failures=4, retry_in_s=4)
    assert explained(failing)[:2] == [
        "chat: 1 desired, 0 ready, 1 starting",
        "  problem its engine failed 4 times in a row, at last: CUDA out of  memory; "
        "next try in 4.0 s",
    ]
    once = explained(pool(error="it ended", failures=1, retry_in_s=0.0))
    assert once[1] == "  problem its engine failed: it ended; trying again now"
    assert not any("  problem " in line for line in explained(pool()))


def test_explain_does_not_count_an_unhealthy_server_as_ready() -> None:
    dead = pool(
        starting=0,
        unhealthy=1,
        replicas=(replica(id="s-1", state="unhealthy", error="connection refused"),),
    )
    assert explained(dead)[:2] == [
        "chat: 1 desired, 0 ready, 1 unhealthy",
        "  problem s-1 is unhealthy: connection refused",
    ]


def test_a_try_under_way_is_not_one_in_no_time() -> None:
    failing = pool(error="it ended", failures=2, retry_in_s=0.0)
    text = tables.status(gateway_status(failing), PIPE, NOW_S)
    assert "chat: 2 failures in a row, trying again now: it ended" in text
    recovered = pool(error="it ended", failures=2, retry_in_s=0.0, starting=0, ready=1)
    text = tables.status(gateway_status(recovered), PIPE, NOW_S)
    assert "chat: 2 failures in a row: it ended" in text


def test_banner() -> None:
    pools = [
        {"name": "it's", "engine": "vllm", "model": "m"},
        {"name": "fake", "engine": "simulated", "model": "m", "min_replicas": 1},
    ]
    text = banner(
        "http://127.0.0.1:8000",
        "http://127.0.0.1:8001",
        list(map(PoolSettings.model_validate, pools)),
    )
    assert "http://127.0.0.1:8000/v1" in text
    assert "http://127.0.0.1:8001" in text
    assert "Ctrl-C" in text
    assert "fake  (a simulation: made-up text)" in text
    (line,) = [line for line in text.splitlines() if line.strip().startswith("curl")]
    words = shlex.split(line)
    assert words[:3] == ["curl", "-sS", "http://127.0.0.1:8000/v1/chat/completions"]
    body = json.loads(words[words.index("-d") + 1])
    assert body["model"] == "it's"
    assert body["messages"]


def test_banner_names_the_command_as_this_shell_finds_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = tmp_path / ".venv" / "bin" / "tidegate"
    command.parent.mkdir(parents=True)
    command.touch(0o755)
    monkeypatch.setattr(sys, "argv", [str(command), "up"])
    monkeypatch.setenv("PATH", "/nowhere")
    assert "`.venv/bin/tidegate status --watch`" in banner("http://h", "http://a", [])
    monkeypatch.setenv("PATH", str(command.parent))
    assert "`tidegate status --watch`" in banner("http://h", "http://a", [])


def test_banner_without_pools() -> None:
    text = banner("http://h", "http://a", [])
    assert "No pool is configured" in text
    assert "curl" not in text


def tier(name: str, **given: Any) -> TierReport:
    return TierReport(**{"tier": Tier(name), "available": True, **given})


@pytest.mark.parametrize(
    ("given", "lines"),
    [
        (
            {"tiers": (tier("forked", wake_s=3.14), tier("paged", wake_s=5.2), tier("on_disk"))},
            ["chat: wakes from forked in 3.1 s, paged in 5.2 s; on_disk: not measured yet"],
        ),
        (
            {"tiers": (tier("sleeping", wake_s=0.4),), "step_down_in_s": 250.0},
            ["chat: wakes from sleeping in 0.4 s; colder in 4 min 10 s"],
        ),
        (
            {
                "tiers": (
                    tier("sleeping", available=False, why_not="the engine\nhas no \x1b[1m/sleep"),
                    tier("on_disk"),
                )
            },
            [
                "chat: wakes from on_disk: not measured yet; "
                "not sleeping: the engine has no  [1m/sleep"
            ],
        ),
        (
            {"tiers": (tier("forked"), tier("paged"), tier("on_disk", wake_s=45.0))},
            ["chat: wakes from on_disk in 45 s; forked, paged: not measured yet"],
        ),
        ({"tiers": ()}, []),
        ({"tiers": (tier("forked", available=False),)}, []),
    ],
)
def test_a_line_for_each_pool_with_tiers(given: dict[str, Any], lines: list[str]) -> None:
    assert tables.tier_lines([pool(**given)]) == lines


def test_a_line_for_each_pool_that_had_requests() -> None:
    def seen(**given: Any) -> RecentTraffic:
        values: dict[str, Any] = {
            "window_s": 60.0, "requests_per_s": 2.12, "errors_per_s": 0.0,
            "prompt_tokens_per_s": 310.04, "generation_tokens_per_s": 1400.0,
            "ttft_count": 20, "ttft_mean_s": 0.3, "ttft_p50_s": 0.2104, "ttft_p95_s": 12.0,
            "itl_count": 500, "itl_mean_s": 0.03, "itl_p50_s": 0.0237, "itl_p95_s": 0.1,
        }  # fmt: skip
        return RecentTraffic(**(values | given))

    pools = [
        pool(name="new", recent=None),
        pool(name="idle", recent=seen(requests_per_s=0.0)),
        pool(name="chat", recent=seen()),
        pool(name="bad", recent=seen(errors_per_s=1.5, ttft_mean_s=None, itl_mean_s=None)),
        pool(
            name="one",
            recent=seen(
                ttft_count=1, ttft_mean_s=42.0, ttft_p50_s=60.0, ttft_p95_s=78.0, itl_count=19
            ),
        ),
    ]
    assert tables.traffic_lines(pools) == [
        "chat: 2.12 requests/s, first token in 210 ms (p95 12 s), 23.7 ms between tokens, "
        "310 prompt and 1,400 output tokens/s",
        "bad: 2.12 requests/s (1.5/s failed), 310 prompt and 1,400 output tokens/s",
        "one: 2.12 requests/s, first token in 42 s (mean of 1), 30 ms between tokens, "
        "310 prompt and 1,400 output tokens/s",
    ]


@pytest.mark.parametrize(
    ("given", "line"),
    [
        (
            {"state": "unfit", "reason": "another vLLM"},
            "fork server: unfit (another vLLM): engines start plainly",
        ),
        (
            {"state": "importing", "reason": "it imports vLLM"},
            "fork server: importing (it imports vLLM)",
        ),
        (
            {
                "pss_bytes": 630_000_000,
                "standbys": [
                    {"pool": "a", "pid": 1, "parked": True, "pss_bytes": 560_000_000},
                    {"pool": "b", "pid": 2, "parked": False, "pss_bytes": None},
                ],
            },
            "fork server: ready, 630 MB; a stands by, 560 MB; b is on its way to stand by, ?",
        ),
    ],
)
def test_how_the_fork_server_is(given: dict[str, Any], line: str) -> None:
    base = {
        "state": "ready", "reason": "", "pid": 1, "pss_bytes": None, "import_s": None, "forked": 0,
        "crashes": 0, "standbys": [],
    }  # fmt: skip
    server = schema.ForkServerEntry.model_validate({**base, **given})
    assert tables.fork_lines(server) == [line]
    assert tables.fork_lines(None) == []
