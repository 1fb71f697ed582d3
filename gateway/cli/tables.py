"""What the console prints: tables on a terminal, aligned plain text in a pipe.

Pure functions from answers of the admin API to text; moments they are given are Unix time. Rich is
imported only where a table is drawn on a terminal.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from autoscaler.types import first_line
from gateway.terminal import NONE, UNKNOWN, ago, count, duration, figure, one_line, percent, size
from loaders.engines.base import ENGINES, engine_of
from modelcache.types import PREPARED, SHORT_CHARACTERS, ModelEntry

if TYPE_CHECKING:
    from autoscaler.types import ReplicaCapacity
    from gateway.admin import schema
    from gateway.doctor.checks import Check

GOOD = "green"
BUSY = "yellow"
BAD = "red"
STATE_STYLES = {
    "ready": GOOD,
    "starting": BUSY,
    "waking": BUSY,
    "draining": BUSY,
    "stopping": BUSY,
    "sleeping": "cyan",
    "stopped": "dim",
    "unhealthy": BAD,
    "failed": BAD,
    "ok": GOOD,
    "warn": BUSY,
    "fail": BAD,
}
TIER_STYLES = {"running": GOOD, "sleeping": GOOD, "paged": GOOD, "forked": GOOD, "on_disk": "cyan"}
GPU_ACTIONS = {
    "ignore": "nothing to be done",
    "restart_process": "restart the engine",
    "check_nvlink": "check NVLink",
    "reset_gpu": "reset the GPU",
    "drain_and_reset": "drain the node and reset the GPU",
    "restart_vm": "restart the virtual machine",
    "reboot_node": "reboot the node",
    "replace_gpu": "replace the GPU",
    "unknown": "look it up in NVIDIA's catalog of XIDs",
}
"""What is to be done about a fault of a GPU, in words."""
WITH_METRICS = frozenset({"ready", "unhealthy", "draining", "sleeping"})
"""States of replicas whose engines say how they are loaded."""
PEERS_NAMED = 5
"""Peers that are named where they are not reached; of more the number is enough."""
FEW = 20
"""Of fewer values a mean is shown: a 95th percentile would be the largest of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Screen:
    """Where text goes: a terminal of so many columns, or a pipe."""

    terminal: bool = False
    width: int = 100


@dataclass(slots=True)
class Table:
    """Rows of text under headings; a cell may be (text, style)."""

    headings: tuple[str, ...]
    rows: list[tuple[str | tuple[str, str], ...]] = field(default_factory=list)

    def add(self, *cells: str | tuple[str, str]) -> None:
        """One more row."""
        self.rows.append(cells)

    def texts(self) -> list[list[str]]:
        """The rows without styles."""
        return [[one if isinstance(one, str) else one[0] for one in row] for row in self.rows]

    def render(self, screen: Screen) -> str:
        """The table for this screen, ending in a line break."""
        cells = [
            [(cell, "") if isinstance(cell, str) else cell for cell in row] for row in self.rows
        ]
        clean = [[(one_line(text), style) for text, style in row] for row in cells]
        return self._rich(clean, screen) if screen.terminal else self._plain(clean)

    def _plain(self, rows: Sequence[Sequence[tuple[str, str]]]) -> str:
        table = [list(self.headings), *([text for text, _ in row] for row in rows)]
        widths = [max(len(row[column]) for row in table) for column in range(len(self.headings))]
        return "".join(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            + "\n"
            for row in table
        )

    def _rich(self, rows: Sequence[Sequence[tuple[str, str]]], screen: Screen) -> str:
        from rich.box import SIMPLE_HEAD
        from rich.console import Console
        from rich.table import Table as RichTable
        from rich.text import Text

        table = RichTable(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
        for heading in self.headings:
            table.add_column(heading, overflow="fold", min_width=len(heading))
        for row in rows:
            table.add_row(*(Text(text, style) for text, style in row))
        console = Console(force_terminal=True, width=screen.width, highlight=False)
        with console.capture() as capture:
            console.print(table)
        return capture.get()


# ── status ────────────────────────────────────────────────────────────────────────────────────────


def status(report: schema.GatewayStatus, screen: Screen, now_s: float) -> str:
    """What ``tidegate status`` shows of a gateway."""
    pools = report.pools
    parts = [
        f"tidegate {report.version}  {report.endpoint}  admin {report.admin}  "
        f"up {duration(report.uptime_s)}  {count(len(report.workers), 'worker')}",
        "",
        _pools(pools, screen).rstrip("\n"),
    ]
    if any(pool.replicas for pool in pools):
        parts += ["", _replicas(pools, screen).rstrip("\n")]
    if gpus := gpu_table(report.gpus, screen):
        parts += ["", gpus.rstrip("\n")]
    if pools:
        parts += ["", *(f"{pool.name}: {_decision(pool.last_decision, now_s)}" for pool in pools)]
    if capacities := capacity_lines(pools):
        parts += ["", "What a replica sustains within the SLO:", *capacities]
    if traffic := traffic_lines(pools):
        parts += ["", "In the last minute:", *traffic]
    if tiers := [*tier_lines(pools), *fork_lines(report.fork_server)]:
        parts += ["", *tiers]
    if report.history is not None and report.history.error:
        parts += ["", f"The history is not kept: {one_line(report.history.error)}"]
    for pool in pools:
        if pool.error:
            parts += ["", *_errors(pool, pool.error)]
    if report.last_error:
        parts += ["", f"Last error of the control loop: {one_line(report.last_error)}"]
    for engine in map(engine_of, sorted({pool.engine for pool in pools if pool.engine in ENGINES})):
        if engine.notice:
            parts += ["", f"Engine {engine.name} is {engine.notice}."]
    return "\n".join(parts) + "\n"


def _pools(pools: Iterable[schema.PoolEntry], screen: Screen) -> str:
    table = Table(
        ("POOL", "ENGINE", "READY", "DESIRED", "NOT READY", "QUEUED", "INFLIGHT", "TOKENS", "TIER")
        + ("WAKE",)
    )
    for pool in pools:
        enough = pool.ready >= pool.desired
        tokens = (pool.inflight_tokens, pool.queued_tokens)
        table.add(
            pool.name + (" (removed)" if pool.removed else " (disabled)" if pool.disabled else ""),
            pool.engine,
            (figure(pool.ready), GOOD if enough and pool.ready else BUSY if not enough else ""),
            figure(pool.desired) + (" (held)" if pool.override is not None else ""),
            ", ".join(not_ready(pool)) or NONE,
            figure(pool.queued_requests),
            figure(pool.inflight_requests),
            figure(None if None in tokens else sum(filter(None, tokens))),
            pool.tier or NONE,
            NONE if pool.wake_eta_s is None else duration(pool.wake_eta_s),
        )
    return table.render(screen)


def not_ready(pool: schema.PoolEntry) -> list[str]:
    """How many replicas are in each state but ready: ``1 starting``."""
    states = ("starting", "unhealthy", "draining", "sleeping")
    return [f"{number} {state}" for state in states if (number := getattr(pool, state))]


def _decision(decision: schema.DecisionEntry | None, now_s: float) -> str:
    if decision is None:
        return "no decision yet"
    return f"{one_line(decision.detail or decision.reason)} ({ago(decision.at_s, now_s)})"


def _errors(pool: schema.PoolEntry, error: str) -> list[str]:
    """Why a pool's engines fail: what happened, and the engine's own last lines below it."""
    first, *rest = error.strip().splitlines() or [UNKNOWN]
    times = f"{pool.failures} failures in a row" if pool.failures > 1 else "failed"
    retry = retry_text(pool, ", ")
    return [f"{pool.name}: {times}{retry}: {one_line(first)}"] + [
        f"  {one_line(one)}" for one in rest
    ]


def retry_text(pool: schema.PoolEntry, separator: str) -> str:
    """When an engine is started again after failures; nothing where none is to be."""
    if pool.retry_in_s is None or not pool.starting:
        return ""
    due = f"next try in {duration(pool.retry_in_s)}" if pool.retry_in_s else "trying again now"
    return separator + due


def _replicas(pools: Iterable[schema.PoolEntry], screen: Screen) -> str:
    table = Table(
        ("REPLICA", "STATE", "FOR", "INFLIGHT", "TOKENS", "RUNNING", "WAITING", "KV", "PID", "URL")
        + ("DETAIL",)
    )
    for replica in (replica for pool in pools for replica in pool.replicas):
        table.add(
            replica.id,
            (replica.state, STATE_STYLES.get(replica.state, "")),
            duration(replica.since_s),
            figure(replica.inflight_requests),
            figure(replica.inflight_tokens),
            *_engine_figures(replica),
            NONE if replica.pid is None else str(replica.pid),
            replica.url or NONE,
            _detail(replica),
        )
    return table.render(screen)


def _engine_figures(replica: schema.ReplicaEntry) -> tuple[str, str, str]:
    """Requests that the engine runs, those that wait in it, and the use of its KV cache."""
    engine = replica.engine
    if engine is None:
        text = UNKNOWN if replica.state in WITH_METRICS else NONE
        return (text, text, text)
    return (
        figure(engine.running_requests),
        figure(engine.waiting_requests),
        percent(engine.kv_cache_usage_fraction),
    )


def _detail(replica: schema.ReplicaEntry) -> str:
    text = first_line(replica.error or replica.phase)
    outdated = "to be replaced: its start-up arguments have changed" if replica.outdated else ""
    fault = "" if replica.gpu_fault is None else f"fault of its GPU: {_fault(replica.gpu_fault)}"
    return "; ".join(part for part in (text, outdated, fault) if part)


def gpu_table(node: schema.NodeGpus | None, screen: Screen) -> str:
    """The GPUs of this node; nothing where there are none, and a line where their readings have
    failed though they were asked of a DCGM exporter."""
    if node is None or node.gpus is None:
        failed = node is not None and node.source == "dcgm"
        return one_line(f"GPUs: not known: {node.why_not}") if node is not None and failed else ""
    if not node.gpus:
        return ""
    table = Table(("GPU", "NAME", "USE", "MEMORY", "POWER", "TEMP", "REPLICAS", "DETAIL"))
    for gpu in node.gpus:
        has = gpu.figures.get
        used, power, temperature = (
            has("memory_used_bytes"),
            has("power_watts"),
            has("temperature_celsius"),
        )
        slowed = ", ".join(gpu.throttle_reasons or ()).replace("_", " ")
        detail = [f"clocks lowered: {slowed}"] if slowed else []
        if gpu.fault is not None:
            detail.insert(0, _fault(gpu.fault))
        table.add(
            str(gpu.index),
            gpu.name or UNKNOWN,
            percent(has("utilization_fraction")),
            f"{size(used)} of {size(has('memory_total_bytes'))}",
            UNKNOWN if power is None else f"{power:.0f} W",
            UNKNOWN if temperature is None else f"{temperature:.0f} °C",
            ", ".join(gpu.replicas) or NONE,
            ("; ".join(detail), BAD if gpu.fault is not None else ""),
        )
    return table.render(screen)


def _fault(fault: schema.GpuFaultEntry) -> str:
    return f"{fault.detail}: {GPU_ACTIONS[fault.action]}"


def capacity_lines(pools: Iterable[schema.PoolEntry]) -> list[str]:
    """A line for each pool of which it is known: ``chat: 5200 tokens/s per replica (history)``."""
    return [
        f"{pool.name}: {capacity_text(pool.last_decision.capacity)}"
        for pool in pools
        if pool.last_decision is not None and pool.last_decision.capacity is not None
    ]


def capacity_text(capacity: ReplicaCapacity) -> str:
    """What a replica carries, and where that is known from."""
    return f"{capacity.tokens_per_s:.0f} tokens/s per replica ({capacity.source})"


def tier_lines(pools: Iterable[schema.PoolEntry]) -> list[str]:
    """A line for each pool with tiers: medians of its last wakes from hot to cold, and when the
    next step down is due: ``chat: wakes from forked in 3.1 s, paged in 5.2 s; colder in 4 min``."""
    lines = []
    for pool in pools:
        known = [one for one in pool.tiers if one.available]
        measured = [
            f"{one.tier} in {duration(one.wake_s)}" for one in known if one.wake_s is not None
        ]
        others = [one.tier for one in known if one.wake_s is None]
        parts = [", ".join(measured)] if measured else []
        parts += [f"{', '.join(others)}: not measured yet"] if others else []
        if not parts:
            continue
        text = f"{pool.name}: wakes from {'; '.join(parts)}"
        if pool.step_down_in_s is not None:
            text += f"; colder in {duration(pool.step_down_in_s)}"
        text += "".join(f"; not {one.tier}: {one.why_not}" for one in pool.tiers if one.why_not)
        lines.append(one_line(text))
    return lines


def traffic_lines(pools: Iterable[schema.PoolEntry]) -> list[str]:
    """A line for each pool that had requests in the last minute: ``chat: 2.1 requests/s, first
    token in 210 ms (p95 1.2 s), 24 ms between tokens, 310 prompt and 140 output tokens/s``. Times
    are medians; of few values, where a histogram's quantiles are only its bounds, the mean."""
    lines = []
    for pool in pools:
        seen = pool.recent
        if seen is None or not seen.requests_per_s:
            continue
        parts = [f"{seen.requests_per_s:.3g} requests/s"]
        if seen.errors_per_s:
            parts[0] += f" ({seen.errors_per_s:.3g}/s failed)"
        if seen.ttft_mean_s is not None:
            few = seen.ttft_count < FEW
            first = f"first token in {_brief(seen.ttft_mean_s if few else seen.ttft_p50_s)} "
            parts.append(
                first
                + (f"(mean of {seen.ttft_count})" if few else f"(p95 {_brief(seen.ttft_p95_s)})")
            )
        if seen.itl_mean_s is not None:
            pause_s = seen.itl_mean_s if seen.itl_count < FEW else seen.itl_p50_s
            parts.append(f"{_brief(pause_s)} between tokens")
        parts.append(
            f"{seen.prompt_tokens_per_s:,.0f} prompt and "
            f"{seen.generation_tokens_per_s:,.0f} output tokens/s"
        )
        lines.append(one_line(f"{pool.name}: {', '.join(parts)}"))
    return lines


def _brief(seconds: float | None) -> str:
    """A time that is often below a second."""
    if seconds is None or seconds >= 1.0:
        return duration(seconds)
    return f"{seconds * 1000:.3g} ms"


def fork_lines(server: schema.ForkServerEntry | None) -> list[str]:
    """How the fork server is, and what it and each standby take of the memory; nothing where there
    is to be none."""
    if server is None:
        return []
    if server.state != "ready":
        plain = "" if server.state == "importing" else ": engines start plainly"
        return [one_line(f"fork server: {server.state} ({server.reason}){plain}")]
    parts = [f"fork server: ready, {size(server.pss_bytes)}"]
    for one in server.standbys:
        ready = "stands by" if one.parked else "is on its way to stand by"
        parts.append(f"{one.pool} {ready}, {size(one.pss_bytes)}")
    return [one_line("; ".join(parts))]


def agent_status(report: schema.AgentStatus, admin_url: str) -> str:
    """What ``tidegate status`` shows of a cache agent: where peers are served, which are reached,
    what the cache takes, what went through it."""
    traffic, usage = report.traffic, report.usage
    allowed = "" if usage.quota_bytes is None else f" of {size(usage.quota_bytes)} quota"
    served = f"served at {report.peer_url}" if report.peer_url else "not served yet"
    lines = [
        f"tidegate {report.version}, a cache agent: no pools, no engines",
        "",
        f"  peers    {served}; {_reached(traffic.peers)}",
        f"  admin    {admin_url}",
        f"  cache    {report.dir}: {size(usage.bytes_used)}{allowed}; "
        f"{size(usage.free_bytes)} free on disk",
        f"  traffic  read {size(traffic.store_bytes)} from stores and "
        f"{size(traffic.peer_bytes)} from peers, sent {size(traffic.sent_bytes)}",
        f"           {size(traffic.wasted_bytes)} wasted, "
        f"{count(traffic.retries, 'retry', 'retries')}, "
        f"{count(traffic.peer_failures, 'failure', 'failures')} of peers",
    ]
    return "\n".join(map(one_line, lines)) + "\n\nIts models: `tidegate model ls`.\n"


def _reached(peers: Sequence[schema.PeerEntry]) -> str:
    if not peers:
        return "no peers are known"
    away = [one.url for one in peers if not one.reached]
    text = f"{len(peers) - len(away)} of {len(peers)} peers reached"
    if not away:
        return text
    more = f" and {len(away) - PEERS_NAMED} more" if len(away) > PEERS_NAMED else ""
    return f"{text}, not {', '.join(away[:PEERS_NAMED])}{more}"


# ── doctor ────────────────────────────────────────────────────────────────────────────────────────


def doctor(checks: Iterable[Check], screen: Screen) -> str:
    """The report of ``tidegate doctor``: what was found, and below it what to do."""
    table = Table(("CHECK", "STATUS", "FINDING"))
    advice = []
    for check in checks:
        table.add(check.name, (check.status, STATE_STYLES[check.status]), check.finding)
        if check.advice:
            advice.append(f"  {check.name}: {one_line(check.advice)}")
    text = table.render(screen)
    return text + ("\nWhat to do:\n" + "\n".join(advice) + "\n" if advice else "")


# ── model ─────────────────────────────────────────────────────────────────────────────────────────


def models(found: schema.CacheListing, screen: Screen, now_s: float) -> str:
    """What ``tidegate model ls`` shows; ``now_s`` is Unix time."""
    usage = found.usage
    head = f"{found.dir}: {size(usage.bytes_used)} used"
    if usage.quota_bytes is not None:
        head += f" of a quota of {size(usage.quota_bytes)}"
    if usage.bytes_prepared:
        head += f" ({size(usage.bytes_prepared)} by prepared results)"
    head += f", {size(usage.free_bytes)} free on the disk"
    if not found.models:
        return f"{head}\nNo model is in it; `tidegate model preload MODEL` brings one.\n"
    table = Table(("MODEL", "REVISION", "TIER", "SIZE", "UNIQUE", "PAGE CACHE", "STATE", "USED"))
    for entry in _below_their_models(found.models):
        table.add(
            _model_name(entry),
            _short(entry.revision),
            (entry.tier, TIER_STYLES.get(entry.tier, "")),
            size(entry.size_bytes),
            size(entry.bytes_unique),
            _share(entry.bytes_cached, entry.size_bytes),
            _model_state(entry),
            NONE if entry.used_at_s is None else ago(entry.used_at_s, now_s),
        )
    return f"{head}\n\n{table.render(screen)}"


def _below_their_models(models: Sequence[ModelEntry]) -> list[ModelEntry]:
    """What was made of a model after the model; of one that is not here at the end."""
    made: dict[tuple[str, str], list[ModelEntry]] = {}
    for entry in models:
        if entry.made is not None:
            made.setdefault((entry.made.model, entry.made.revision), []).append(entry)
    found: list[ModelEntry] = []
    for entry in models:
        if entry.made is None:
            found += [entry, *made.pop((entry.url, entry.revision), [])]
    return found + [entry for rest in made.values() for entry in rest]


def _model_name(entry: ModelEntry) -> str:
    """What a model is called; of a result what it is, whose, and enough of its key to name it."""
    scheme, _, key = entry.url.partition("://")
    if scheme != PREPARED:
        return entry.url
    name = f"{PREPARED}://{key[:SHORT_CHARACTERS]}"
    if entry.made is None:
        return name
    return f"└ {name} ({' + '.join(entry.made.steps)} of {entry.made.model})"


def _short(revision: str | None) -> str:
    """A revision as it is told apart by eye: the beginning of a long digest."""
    text = revision or NONE
    return text[:12] if len(text) >= 32 else text


def _share(part: float | None, whole: float | None) -> str:
    if part is None or whole is None:
        return UNKNOWN
    return NONE if not whole else f"{100 * part / whole:.0f} %"


def _model_state(entry: ModelEntry) -> str | tuple[str, str]:
    parts = ["pinned"] if entry.pinned else []
    parts += [f"in use by {', '.join(entry.leases)}"] if entry.leases else []
    if entry.complete:
        return ", ".join(parts) or NONE
    if entry.leases and entry.url.startswith(PREPARED):
        return "preparing", BUSY
    return ", ".join(["incomplete", *parts]), BUSY


def model_done(answer: schema.ModelAnswer) -> str:
    """What a verb has done, in a line or two."""
    from gateway.admin import schema

    took = duration(answer.elapsed_s)
    if isinstance(answer, schema.PreloadAnswer):
        return _preloaded(answer, took)
    if isinstance(answer, schema.PrewarmAnswer):
        pages = answer.pages
        share = _share(pages.after.bytes_cached, pages.after.bytes_total)
        return (
            f"{answer.model}: {size(pages.bytes_read)} read, {share} in the page cache ({took})\n"
        )
    if isinstance(answer, schema.VerifyAnswer):
        return _verified(answer, took)
    if isinstance(answer, schema.ReplicateAnswer):
        return "".join(
            f"{name}: {one.error or ('done' if one.done else 'not done')}\n"
            for name, one in answer.sites.items()
        )
    if isinstance(answer, schema.EvictAnswer):
        return _evicted(answer)
    if isinstance(answer, schema.PinAnswer) and answer.pinned:
        return f"{answer.model} is pinned; `tidegate model unpin` lets it be evicted again.\n"
    return f"{answer.model} may be evicted again.\n"


def _evicted(answer: schema.EvictAnswer) -> str:
    model = f"{answer.model} {' and '.join(map(_short, answer.revisions))}".rstrip()
    what = f"the prepared results of {model}" if answer.prepared else model
    text = f"Evicted: {what}, {size(answer.freed_bytes)} freed.\n"
    if answer.left and not answer.prepared:
        left = ", ".join(map(_short, answer.left))
        text += f"Left: {left} (`--revision` names one, `--all` all).\n"
    return text


def _preloaded(answer: schema.PreloadAnswer, took: str) -> str:
    """What is opened in the end stands last: the result of the steps, where there are any."""
    if answer.size_bytes is None:
        text = f"{answer.model} is used in place"
    else:
        text = f"{answer.model} {_short(answer.revision)}, {size(answer.size_bytes)}"
        text += ", already cached" if answer.was_there else f" in {answer.files} files ({took})"
    if answer.prepared and answer.prepared_s is not None:
        text += f", prepared in {duration(answer.prepared_s)}"
    elif answer.prepared:
        text += ", prepared already"
    note = f"Note: {answer.note}\n" if answer.note else ""
    return f"{text}: {answer.prepared or answer.path}\n{note}"


def _verified(answer: schema.VerifyAnswer, took: str) -> str:
    model = f"{answer.model} {_short(answer.revision)}" if answer.revision else answer.model
    if not answer.damage:
        return f"{model}: every byte verified ({took}).\n"
    lines = [f"{model}: {len(answer.damage)} damaged{', repaired' if answer.repaired else ''}"]
    for one in answer.damage:
        piece = "" if one.piece is None else f" (piece {one.piece})"
        lines.append(f"  {one.path}: {one.problem}{piece}")
    return "\n".join(lines) + "\n"
