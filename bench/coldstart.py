"""From a request sent at zero to its first token, for each tier a pool can wait in, and for plain
vLLM started the ordinary way from cold disk; through the whole of Tidegate, phases included.

Each contender has a Tidegate of its own, one after the other, so that no fork server keeps the
engine's files mapped while a cold start is measured. Between two rounds the pool goes to zero and
is brought to its tier: pages are dropped, or read, or the standby is waited for. The phases are
those that ``/status`` shows, looked at every few milliseconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench import cache, coldstart_report, machine, tidegate, workload
from bench.asking import Answer, ask
from bench.coldhold import ENGINE_PYTHON, MODEL_FOLDER, EngineMissingError
from modelcache.pagecache import residency
from modelcache.types import FileRange

POOL = "cold"
LOOK_S = 0.02
FORK_SERVER_S = 120.0
QUESTION = "What is the capital of France?"
STARTING = "starting"
STORE_BYTES_S = 200e6
WORDS = {"listing": "fetching", "checking": "fetching", "preparing": "deciding"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """One way to wait at zero. ``tier`` is what ``/status`` must show before the request."""

    name: str
    title: str
    loaders: str = ""
    tiers: str = ""
    cold_engine: bool = False
    cold_model: bool = False
    tier: str = ""
    remote: bool = False
    """The model is in a store of ``STORE_BYTES_S`` and nowhere on this disk."""


CONTENDERS = (
    Contender(
        name="plain",
        title="plain vLLM, cold disk",
        loaders='fork_server = false\nload_format = "auto"',
        tiers="forked_s = 0, paged_s = 0",
        cold_engine=True,
        cold_model=True,
    ),
    Contender(
        name="plain_warm",
        title="plain vLLM, all pages warm",
        loaders='fork_server = false\nload_format = "auto"',
        tiers="forked_s = 0, paged_s = 0",
    ),
    Contender(
        name="on_disk",
        title="on_disk: fork server, weights on cold disk",
        tiers="forked_s = 0, paged_s = 0",
        cold_model=True,
    ),
    Contender(
        name="paged",
        title="paged: fork server, weights in page cache",
        tiers="forked_s = 0",
    ),
    Contender(
        name="remote",
        title="remote: weights in a store of 200 MB/s",
        tiers="forked_s = 0, paged_s = 0, on_disk_s = 0",
        tier="remote",
        remote=True,
    ),
    Contender(name="forked", title="forked: an engine stands by", tiers="", tier="forked"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """One run."""

    rounds: int = 5
    only: tuple[str, ...] = ()
    limit_s: float = 240.0
    out: Path = Path("bench/results")


@dataclass(slots=True, kw_only=True)
class Round:
    """One start. ``phases_s`` are seconds by phase, in order, up to the first token."""

    ttft_s: float
    text: str
    phases_s: dict[str, float] = field(default_factory=dict)
    cold_left: float | None = None


def run(options: Options, command: str) -> int:
    """Measure, write the report; 1 when a bar was missed or an answer was wrong."""
    if not (ENGINE_PYTHON.exists() and (MODEL_FOLDER / "config.json").exists()):
        raise EngineMissingError(
            f"no vLLM at {ENGINE_PYTHON} or no model at {MODEL_FOLDER}: `make engine` prepares both"
        )
    before, began_s = machine.counters(), time.monotonic()
    rounds: dict[str, list[Round]] = {}
    missing: dict[str, str] = {}
    memory: dict[str, Any] = {}
    for contender in CONTENDERS:
        if options.only and contender.name not in options.only:
            continue
        try:
            rounds[contender.name], memory[contender.name] = measure(contender, options)
        except (RuntimeError, KeyError) as error:
            missing[contender.name] = str(error)
            print(f"{contender.name}: {error}", flush=True)
    date = datetime.date.today().isoformat()
    made = coldstart_report.document(
        {name: [vars_of(one) for one in found] for name, found in rounds.items()},
        titles={one.name: one.title for one in CONTENDERS},
        missing=missing,
        memory=memory,
        command=command,
        date=date,
        machine=machine.describe(),
        noise=machine.noise(before, machine.counters()),
        elapsed_s=time.monotonic() - began_s,
    )
    paths = coldstart_report.write(made, options.out, f"coldstart-{date}")
    print("\n" + coldstart_report.terminal(made))
    print(f"wrote {', '.join(str(path) for path in paths)}")
    return 1 if missing or any(one["passed"] is False for one in made["verdicts"]) else 0


def vars_of(one: Round) -> dict[str, Any]:
    """A round as JSON has it."""
    return {
        "ttft_s": round(one.ttft_s, 3),
        "text": one.text,
        "phases_s": {name: round(value, 3) for name, value in one.phases_s.items()},
        "cold_left": one.cold_left,
    }


def measure(contender: Contender, options: Options) -> tuple[list[Round], dict[str, int]]:
    """All rounds of one contender, and its memory at zero. Raises ``RuntimeError``."""
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="tidegate-coldstart-"))
        model = str(MODEL_FOLDER.resolve())
        if contender.remote:
            log = Path(folder) / "source.log"
            source, port = cache.start_source(Path(model), STORE_BYTES_S, log, sys.executable)
            stack.callback(source.stop)
            model = f"http://127.0.0.1:{port}/"
        gate = tidegate.start(_pool(contender, model), Path(folder))
        try:
            if "fork_server" not in contender.loaders:
                _wait_for_fork_server(gate, Path(folder))
            found = []
            for number in range(options.rounds):
                if number:
                    _to_zero(gate)
                _settle(gate, contender)
                cold_left = _set_pages(contender)
                time.sleep(0.5)
                memory = _memory(gate)
                one = asyncio.run(_ask(gate, options.limit_s))
                one.cold_left = cold_left
                print(
                    f"{contender.name:12}{number:3} {one.ttft_s:7.2f} s  {_line(one)}", flush=True
                )
                found.append(one)
            return found, memory
        finally:
            gate.child.stop(grace_s=30.0)


def _pool(contender: Contender, model: str) -> str:
    lines = [
        "[[pools]]",
        f'name = "{POOL}"',
        'backend = "process"',
        'engine = "vllm"',
        f'model = "{model}"',
        "max_model_len_tokens = 2048",
        "max_replicas = 1",
        "idle_to_zero_s = 3600",
        f"tiers = {{ {contender.tiers} }}" if contender.tiers else "",
        "[loaders]",
        f'engine_python = "{ENGINE_PYTHON.absolute()}"',
        contender.loaders,
        "",
    ]
    return "\n".join(lines)


def _wait_for_fork_server(gate: tidegate.Tidegate, folder: Path) -> None:
    deadline_s = time.monotonic() + FORK_SERVER_S
    while "the fork server is ready" not in gate.child.log_tail(lines=100):
        if time.monotonic() > deadline_s:
            raise RuntimeError(f"no fork server in {FORK_SERVER_S:g} s: {gate.child.log_tail()}")
        time.sleep(0.2)


def _to_zero(gate: tidegate.Tidegate) -> None:
    for replicas in (0, None):
        gate.admin(f"/pools/{POOL}/scale", {"replicas": replicas}, timeout_s=30)
        if not tidegate.wait_at_zero(gate, POOL, limit_s=60):
            raise RuntimeError("the pool did not come to zero")


def _settle(gate: tidegate.Tidegate, contender: Contender) -> None:
    """Wait until the pool is in the contender's tier."""
    if not contender.tier:
        return
    deadline_s = time.monotonic() + 60
    while gate.pool(POOL).get("tier") != contender.tier:
        if time.monotonic() > deadline_s:
            raise RuntimeError(f"the pool is {gate.pool(POOL).get('tier')}, not {contender.tier}")
        time.sleep(0.1)
    time.sleep(2.0)


def _set_pages(contender: Contender) -> float | None:
    """Drop or read what the contender wants cold or warm; the part that could not be dropped."""
    model = [path for path in MODEL_FOLDER.resolve().rglob("*") if path.is_file()]
    engine = ENGINE_PYTHON.absolute().parent.parent
    cold = list(model) if contender.cold_model else []
    if contender.cold_engine:
        cold += [path for path in engine.rglob("*") if path.is_file()]
        cold += _interpreter_files()
    if not contender.cold_model:
        for path in model:
            path.read_bytes()
    if not cold:
        return None
    os.sync()
    left = residency.drop([FileRange(path=str(path)) for path in cold])
    if left.bytes_cached is None:
        return None
    return round(left.bytes_cached / max(left.bytes_total, 1), 4)


def _interpreter_files() -> Iterable[Path]:
    library = ENGINE_PYTHON.resolve().parent.parent / "lib"
    return [path for path in library.glob("**/*") if path.is_file()]


async def _ask(gate: tidegate.Tidegate, limit_s: float) -> Round:
    document = {
        "model": POOL,
        "messages": [{"role": "user", "content": QUESTION}],
        "max_tokens": 16,
        "temperature": 0,
        "stream": True,
    }
    answer = Answer(index=0, stream=True)
    asking = asyncio.create_task(
        ask(gate.port, workload.http_request(json.dumps(document).encode()), answer,
            limit_s=limit_s)
    )  # fmt: skip
    seen: list[tuple[float, str]] = []
    while not asking.done():
        with contextlib.suppress(OSError, KeyError, ValueError):
            seen.append((time.monotonic(), label(await asyncio.to_thread(gate.pool, POOL))))
        await asyncio.sleep(LOOK_S)
    await asking
    if answer.error or answer.first_s is None:
        raise RuntimeError(f"no answer: {answer.error}\n{gate.child.log_tail()}")
    phases_s = split(seen, answer.sent_s, answer.first_s)
    return Round(ttft_s=answer.first_s - answer.sent_s, text=answer.text, phases_s=phases_s)


def label(pool: dict[str, Any]) -> str:
    """What the newest replica of a pool is at, in a word."""
    replicas = pool["replicas"]
    if not replicas:
        return "deciding"
    newest = replicas[-1]
    if newest["state"] != STARTING:
        return "answering" if newest["state"] == "ready" else "deciding"
    word = str(newest.get("phase") or "importing").split(":")[0].split(" ")[0]
    return WORDS.get(word, word)


def split(
    seen: Sequence[tuple[float, str]], sent_s: float, first_s: float
) -> dict[str, float]:  # fmt: skip
    """Seconds by what was seen, from the request to the first token: each look counts until the
    next, and the time before the first one is that of deciding."""
    phases_s: dict[str, float] = {}
    at_s, what = sent_s, "deciding"
    for look_s, word in [*seen, (first_s, "")]:
        until_s = min(max(look_s, sent_s), first_s)
        if until_s > at_s:
            phases_s[what] = phases_s.get(what, 0.0) + until_s - at_s
            at_s = until_s
        what = word or what
    return phases_s


def _line(one: Round) -> str:
    return "  ".join(f"{name} {value:.2f}" for name, value in one.phases_s.items())


def _memory(gate: tidegate.Tidegate) -> dict[str, int]:
    """Bytes (PSS) of what waits at zero, beside Tidegate itself: fork server and standby."""
    found = {}
    for pid in gate.child.tree():
        with contextlib.suppress(OSError):
            line = Path(f"/proc/{pid}/cmdline").read_bytes()
            if b"forkserver" in line or b"VLLM" in line:
                text = Path(f"/proc/{pid}/smaps_rollup").read_text()
                found[str(pid)] = next(
                    int(row.split()[1]) * 1024 for row in text.splitlines() if row[:4] == "Pss:"
                )
    return {"processes": len(found), "pss_bytes": sum(found.values())}
