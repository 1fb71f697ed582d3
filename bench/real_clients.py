"""Real clients and load tools against Tidegate: do its outcomes and tokens agree with the engine's?

Each client runs from an environment of its own below ``.tidegate/clients`` (never the engine's),
against one Tidegate in front of the simulated engine or the real vLLM. What Tidegate counted
meanwhile (``tidegate_requests_total``, ``tidegate_prompt_tokens_total``,
``tidegate_generation_tokens_total``) stands beside what the engine's own ``/metrics`` counted.
What cannot be installed or found is said so.
"""

from __future__ import annotations

import datetime
import json
import re
import shutil
import subprocess
import tempfile
import time
import urllib.request
import venv
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import machine, procs, tidegate
from bench.coldhold import ENGINE_PYTHON, MODEL_FOLDER

FOLDER = Path(".tidegate/clients")
CHILD = Path(__file__).with_name("real_clients_child.py")
POOL = "small"
BAR_PERCENT = 1.0
INSTALL_LIMIT_S = 1800
SETTLE_LIMIT_S = 30.0

_ENGINE_PROGRAM = "the engine's interpreter"
# `vllm bench serve`: the `vllm` command needs a package of that name, which not all builds are.
_VLLM_BENCH = (
    "from argparse import ArgumentParser; from vllm.benchmarks.serve import add_cli_args, main; "
    "parser = ArgumentParser(); add_cli_args(parser); main(parser.parse_args())"
)
_TOKENS = {
    "prompt": ("tidegate_prompt_tokens_total", "vllm:prompt_tokens_total"),
    "output": ("tidegate_generation_tokens_total", "vllm:generation_tokens_total"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """One run. ``engine`` is ``simulated`` or ``vllm``; ``requests`` is what each client sends;
    ``only`` are names of clients, all when empty; ``model`` has the tokenizer of the load tools."""

    engine: str = "simulated"
    requests: int = 40
    only: tuple[str, ...] = ()
    model: Path = MODEL_FOLDER
    engine_python: Path = ENGINE_PYTHON
    limit_s: float = 300.0
    out: Path = Path("bench/out")


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """What a client is told. ``env`` is the folder of its environment, ``folder`` one to write
    in."""

    url: str
    env: Path
    folder: Path
    body: Path
    options: Options

    @property
    def python(self) -> Path:
        return self.env / "bin" / "python"


@dataclass(frozen=True, slots=True, kw_only=True)
class Client:
    """A client: what to install, or which program has to be there, and how to run it."""

    name: str
    command: Callable[[Place], list[str | Path]]
    packages: tuple[str, ...] = ()
    program: str = ""


def _library(case: str, *packages: str) -> Client:
    """One way of asking with a library; ``real_clients_child.py`` has the code."""

    def command(place: Place) -> list[str | Path]:
        return [place.python, CHILD, case, place.url, POOL, str(place.options.requests)]

    return Client(name=case, command=command, packages=packages)


def _guidellm(place: Place) -> list[str | Path]:
    return [
        *(place.env / "bin" / "guidellm", "run", "--disable-console-interactive"),
        *("--backend", f"kind=openai_http,target={place.url},model={POOL}"),
        *("--tokenizer", f"kind=hf_auto,model={place.options.model.resolve()}"),
        *("--data", "kind=synthetic_text,prompt_tokens=64,output_tokens=24"),
        *("--profile", "kind=concurrent,streams=4"),
        *("--constraint", f"kind=max_requests,count={place.options.requests}"),
    ]


def _aiperf(place: Place) -> list[str | Path]:
    # It takes a tokenizer from the hub or the hub's cache, and from no other folder.
    cached = place.folder / "hub" / "models--local--tokenizer"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("0" * 40)
    (cached / "snapshots").mkdir()
    (cached / "snapshots" / ("0" * 40)).symlink_to(place.options.model.resolve())
    return [
        *(place.env / "bin" / "aiperf", "profile", "--model", POOL, "--url", place.url),
        *("--endpoint-type", "chat", "--streaming", "--tokenizer", "local/tokenizer"),
        *("--request-count", str(place.options.requests), "--concurrency", "4"),
        *("--isl", "64", "--osl", "24"),
        *("--output-artifact-dir", place.folder, "--ui-type", "none"),
    ]


def _genai_bench(place: Place) -> list[str | Path]:
    return [
        *(place.env / "bin" / "genai-bench", "benchmark", "--api-backend", "openai"),
        *("--api-base", place.url, "--api-key", "none", "--api-model-name", POOL),
        *("--model-tokenizer", place.options.model.resolve(), "--task", "text-to-text"),
        *("--max-time-per-run", "1", "--max-requests-per-run", str(place.options.requests)),
        *("--num-concurrency", "4", "--traffic-scenario", "D(64,24)"),
        *("--experiment-base-dir", place.folder),
    ]


def _vllm_bench(place: Place) -> list[str | Path]:
    return [
        *(place.options.engine_python.absolute(), "-P", "-c", _VLLM_BENCH),
        *("--backend", "openai-chat", "--base-url", place.url),
        *("--endpoint", "/v1/chat/completions", "--model", POOL),
        *("--tokenizer", place.options.model.resolve(), "--dataset-name", "random"),
        *("--random-input-len", "64", "--random-output-len", "24"),
        *("--num-prompts", str(place.options.requests), "--max-concurrency", "4"),
    ]


def _load_tool(name: str, command: Callable[[Place], list[str | Path]]) -> Client:
    return Client(name=name, command=command, program=name)


CLIENTS: tuple[Client, ...] = (
    _library("openai", "openai"),
    _library("openai-usage", "openai"),
    _library("openai-early-close", "openai"),
    _library("openai-completions", "openai"),
    _library("openai-responses", "openai"),
    _library("openai-async", "openai"),
    _library("anthropic", "anthropic"),
    _library("anthropic-stream", "anthropic"),
    _library("httpx-sse", "httpx-sse", "httpx"),
    _library("sseclient-py", "sseclient-py", "requests"),
    _library("langchain-openai", "langchain-openai"),
    Client(name="guidellm", command=_guidellm, packages=("guidellm",)),
    Client(name="aiperf", command=_aiperf, packages=("aiperf",)),
    Client(name="genai-bench", command=_genai_bench, packages=("genai-bench",)),
    Client(name="vllm bench serve", command=_vllm_bench, program=_ENGINE_PROGRAM),
    _load_tool("ab", lambda place: [
        *("ab", "-n", str(place.options.requests), "-c", "4", "-p", place.body),
        *("-T", "application/json", f"{place.url}/v1/chat/completions"),
    ]),
    _load_tool("hey", lambda place: [
        *("hey", "-n", str(place.options.requests), "-c", "4", "-m", "POST", "-D", place.body),
        *("-T", "application/json", f"{place.url}/v1/chat/completions"),
    ]),
    _load_tool("oha", lambda place: [
        *("oha", "--no-tui", "-n", str(place.options.requests), "-c", "4", "-m", "POST"),
        *("-D", place.body, "-T", "application/json", f"{place.url}/v1/chat/completions"),
    ]),
    _load_tool("wrk", lambda place: [
        *("wrk", "-t", "1", "-c", "4", "-d", "3s", "-s", _wrk_script(place)),
        f"{place.url}/v1/chat/completions",
    ]),
)  # fmt: skip


def _wrk_script(place: Place) -> Path:
    script = place.folder / "post.lua"
    script.write_text(
        f"wrk.method = 'POST'\nwrk.body = [[{place.body.read_text()}]]\n"
        "wrk.headers['content-type'] = 'application/json'\n"
    )
    return script


class UnavailableError(RuntimeError):
    """A client cannot be run here; the message says why."""


def _provide(client: Client, options: Options) -> Path:
    """The client's environment. Raises :class:`UnavailableError`."""
    folder = (FOLDER / "-".join(client.packages or ("none",))).absolute()
    program = client.program
    if program == _ENGINE_PROGRAM:
        program = str(options.engine_python)
    if program and shutil.which(program) is None:
        raise UnavailableError(f"{program} is not installed")
    marker = folder / "installed"
    if client.packages and not marker.exists():
        print(f"installing {', '.join(client.packages)} into {folder}", flush=True)
        if not (folder / "bin" / "python").exists():
            venv.create(folder, with_pip=True)
        pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", *client.packages]
        try:
            done = subprocess.run(
                pip, timeout=INSTALL_LIMIT_S, capture_output=True, text=True, check=False
            )
        except subprocess.TimeoutExpired:
            raise UnavailableError(f"pip did not end in {INSTALL_LIMIT_S} s") from None
        if done.returncode != 0:
            said = done.stderr.strip().splitlines() or ["no output"]
            raise UnavailableError(f"pip: {said[-1][:200]}")
        marker.write_text(" ".join(client.packages))
    return folder


# What was counted


def _read(url: str) -> str:
    with urllib.request.urlopen(url, timeout=10) as answer:
        text: str = answer.read().decode()
        return text


def _sum(text: str, name: str, labels: str = "") -> int:
    """The sum of all series of a metric whose labels contain ``labels``."""
    lines = re.findall(rf"^{re.escape(name)}(\{{[^}}]*\}})? (\S+)", text, re.MULTILINE)
    return round(sum(float(value) for found, value in lines if labels in found))


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """What both sides have counted since they started. ``outcomes`` are Tidegate's."""

    outcomes: dict[str, int]
    tidegate: dict[str, int]
    engine: dict[str, int]
    busy: int

    def since(self, before: Counts) -> Counts:
        """What was counted from ``before`` on."""

        def less(now: dict[str, int], then: dict[str, int]) -> dict[str, int]:
            return {name: count - then.get(name, 0) for name, count in now.items()}

        return Counts(
            outcomes={k: v for k, v in less(self.outcomes, before.outcomes).items() if v},
            tidegate=less(self.tidegate, before.tidegate),
            engine=less(self.engine, before.engine),
            busy=self.busy,
        )


def _count(gate: tidegate.Tidegate) -> Counts:
    ours = gate.admin("/metrics")[1].decode()
    urls = [replica["url"] for replica in gate.pool(POOL)["replicas"] if replica["url"]]
    engine = "\n".join(_read(f"{url}/metrics") for url in urls)
    outcomes = re.findall(
        r'^tidegate_requests_total\{[^}]*outcome="(\w+)"[^}]*\} (\S+)', ours, re.MULTILINE
    )
    counted = {name: 0 for name, _ in outcomes}
    for name, value in outcomes:
        counted[name] += round(float(value))
    return Counts(
        outcomes=counted,
        tidegate={kind: _sum(ours, names[0]) for kind, names in _TOKENS.items()},
        engine={
            **{kind: _sum(engine, names[1]) for kind, names in _TOKENS.items()},
            "requests": _sum(engine, "vllm:request_success_total"),
        },
        busy=_sum(ours, "tidegate_inflight_requests") + _sum(engine, "vllm:num_requests_running"),
    )


def _settled(gate: tidegate.Tidegate) -> Counts:
    """The counts once nothing runs and they stand still: each side publishes a moment later."""
    deadline_s = time.monotonic() + SETTLE_LIMIT_S
    before = _count(gate)
    while time.monotonic() < deadline_s:
        time.sleep(1.0)
        now = _count(gate)
        if now == before and not now.busy:
            break
        before = now
    return before


def _difference(ours: int, engines: int) -> float | None:
    """By how many percent Tidegate's count is off; ``None`` where neither counted anything."""
    return None if not ours and not engines else 100 * (ours - engines) / max(engines, 1)


def _row(
    client: Client, options: Options, gate: tidegate.Tidegate, scratch: Path
) -> dict[str, Any]:
    try:
        env = _provide(client, options)
    except UnavailableError as error:
        return {"client": client.name, "unavailable": str(error)}
    folder = scratch / client.name.replace(" ", "-")
    folder.mkdir()
    body = scratch / "body.json"
    place = Place(
        url=f"http://127.0.0.1:{gate.port}", env=env, folder=folder, body=body, options=options
    )
    before = _settled(gate)
    child = procs.start(
        client.name,
        client.command(place),
        log=folder / "log",
        env={
            "OPENAI_API_KEY": "none",
            "ANTHROPIC_API_KEY": "none",
            "HF_HUB_OFFLINE": "1",
            "HF_HUB_CACHE": str(folder / "hub"),
            "COLUMNS": "200",
        },
        cwd=folder,
    )
    try:
        status: int | None = child.popen.wait(options.limit_s)
    except subprocess.TimeoutExpired:
        status = None
    finally:
        child.stop()
    counts = _settled(gate).since(before)
    row: dict[str, Any] = {
        "client": client.name,
        "exit_status": status,
        "outcomes": counts.outcomes,
        "engine_requests": counts.engine["requests"],
    }
    for kind in _TOKENS:
        ours, engines = counts.tidegate[kind], counts.engine[kind]
        row[f"{kind}_tokens"] = {"tidegate": ours, "engine": engines}
        row[f"{kind}_off_percent"] = _difference(ours, engines)
    if status != 0:
        row["log"] = child.log_tail(8)
    return row


def find_problem(row: dict[str, Any]) -> str:
    """Why the row of a client is no good: how it ended, its outcomes or its tokens; empty where it
    is. What was not there is not judged, nor are the tokens of a client that left before every
    answer: of those that do not stream nothing is known."""
    if "unavailable" in row:
        return ""
    if row["exit_status"] is None:
        return "it did not end"
    if row["exit_status"] != 0:
        return f"exit status {row['exit_status']}"
    if not row["outcomes"]:
        return "no request"
    failed = row["outcomes"].keys() & {"client_error", "engine_error", "rejected"}
    if failed:
        return ", ".join(sorted(failed))
    off = {kind: row[f"{kind}_off_percent"] for kind in _TOKENS}
    beyond = [kind for kind, value in off.items() if value and abs(value) > BAR_PERCENT]
    if beyond and row["outcomes"].keys() != {"cancelled"}:
        return f"{' and '.join(beyond)} tokens are off by more than {BAR_PERCENT:g} %"
    return ""


def terminal(rows: Sequence[dict[str, Any]]) -> str:
    """The table."""
    lines = [
        f"{'client':20} {'outcomes (Tidegate)':28} {'engine':>7} "
        f"{'prompt tokens':>17} {'%':>6} {'output tokens':>17} {'%':>6}"
    ]
    for row in rows:
        if "unavailable" in row:
            lines.append(f"{row['client']:20} not run: {row['unavailable']}")
            continue
        outcomes = ", ".join(f"{name} {count}" for name, count in row["outcomes"].items())
        text = f"{row['client']:20} {outcomes or '-':28} {row['engine_requests']:>7}"
        for kind in _TOKENS:
            tokens, off = row[f"{kind}_tokens"], row[f"{kind}_off_percent"]
            both = f"{tokens['tidegate']} / {tokens['engine']}"
            text += f" {both:>17} {'-' if off is None else f'{off:+.1f}':>6}"
        problem = find_problem(row)
        lines.append(f"{text}  <- {problem}" if problem else text)
        lines += [f"    {line[:160]}" for line in row.get("log", "").splitlines()]
    return "\n".join(lines)


def _pool(options: Options) -> str:
    model = options.model.resolve()
    if options.engine == "simulated":
        name = model if model.exists() else POOL
        return f'[[pools]]\nname = "{POOL}"\nengine = "simulated"\nmodel = "{name}"\n'
    if not (options.engine_python.exists() and model.exists()):
        raise RuntimeError(
            f"no vLLM at {options.engine_python} or no model at {model}: make engine"
        )
    return (
        f'[[pools]]\nname = "{POOL}"\nengine = "vllm"\nmodel = "{model}"\n'
        "max_model_len_tokens = 2048\nmin_replicas = 1\n"
        f'[loaders]\nengine_python = "{options.engine_python.absolute()}"\n'
    )


def _warm(gate: tidegate.Tidegate, body: Path, limit_s: float) -> None:
    """One whole answer, so that no client waits for the engine."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{gate.port}/v1/chat/completions",
        data=body.read_bytes(),
        headers={"content-type": "application/json"},
    )
    deadline_s = time.monotonic() + limit_s
    while True:
        try:
            urllib.request.urlopen(request, timeout=limit_s).read()
            return
        except OSError:
            if time.monotonic() > deadline_s:
                raise
            time.sleep(1.0)


def run(options: Options) -> int:
    """Run all; prints the table, writes the record, returns the exit code."""
    known = {client.name for client in CLIENTS}
    unknown = set(options.only) - known
    if unknown:
        raise RuntimeError(f"unknown client {min(unknown)!r}; known: {', '.join(sorted(known))}")
    chosen = [one for one in CLIENTS if not options.only or one.name in options.only]
    with tempfile.TemporaryDirectory(prefix="tidegate-clients-") as text:
        scratch = Path(text)
        body = scratch / "body.json"
        question = {"role": "user", "content": "Count upwards from one."}
        body.write_text(json.dumps({"model": POOL, "messages": [question], "max_tokens": 24}))
        settings = "[gateway.holding]\ndeadline_s = 600\n"
        gate = tidegate.start(_pool(options), scratch / "gate", settings=settings)
        rows = []
        with procs.stopping(gate.child):
            _warm(gate, body, options.limit_s + 300)
            for client in chosen:
                rows.append(_row(client, options, gate, scratch))
                print(terminal(rows[-1:]).splitlines()[1], flush=True)
    print("\n" + terminal(rows))
    date = datetime.date.today().isoformat()
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"clients-{options.engine}-{date}.json"
    record = {"date": date, "engine": options.engine, "machine": machine.describe(), "rows": rows}
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"\nwrote {path}")
    return 1 if any(map(find_problem, rows)) else 0
