"""What the console prints: tables on a terminal, aligned plain text in a pipe.

Pure functions from data to text. Rich is imported only where a table is drawn on a terminal.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gateway.cli.figures import NONE as NONE
from gateway.cli.figures import UNKNOWN as UNKNOWN
from gateway.cli.figures import ago as ago
from gateway.cli.figures import duration as duration
from gateway.cli.figures import figure as figure
from gateway.cli.figures import one_line as one_line
from gateway.cli.tier_tables import fork_lines, warmth_lines

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
    "warning": BUSY,
    "fail": BAD,
    "error": BAD,
    "missing": BAD,
}


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

    def render(self, screen: Screen) -> str:
        """The table for this screen, ending in a line break."""
        return self._rich(screen) if screen.terminal else self._plain()

    def _plain(self) -> str:
        lines = [[one_line(_text(cell)) for cell in row] for row in self.rows]
        table = [list(self.headings), *lines]
        widths = [max(len(row[column]) for row in table) for column in range(len(self.headings))]
        text = "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in table
        )
        return f"{text}\n"

    def _rich(self, screen: Screen) -> str:
        from rich.box import SIMPLE_HEAD
        from rich.table import Table as RichTable
        from rich.text import Text

        table = RichTable(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
        for heading in self.headings:
            table.add_column(heading, overflow="fold", min_width=len(heading))
        for row in self.rows:
            table.add_row(
                *(
                    Text(one_line(cell))
                    if isinstance(cell, str)
                    else Text(one_line(cell[0]), cell[1])
                    for cell in row
                )
            )
        return on_screen(table, screen)


def on_screen(thing: Any, screen: Screen) -> str:
    """Something of rich's as the text that draws it, colours and all."""
    from rich.console import Console

    console = Console(force_terminal=True, width=screen.width, highlight=False)
    with console.capture() as capture:
        console.print(thing)
    return capture.get()


def _text(cell: str | tuple[str, str]) -> str:
    return cell if isinstance(cell, str) else cell[0]


# ── status ────────────────────────────────────────────────────────────────────────────────────────


def status(report: Mapping[str, Any], screen: Screen, now_s: float) -> str:
    """What ``tidegate status`` shows; ``now_s`` is Unix time, as the report's moments are."""
    workers = report.get("workers") or []
    head = (
        f"tidegate {report.get('version', UNKNOWN)}  {report.get('endpoint', UNKNOWN)}  "
        f"admin {report.get('admin', UNKNOWN)}  up {duration(report.get('uptime_s'))}  "
        f"{len(workers)} worker{'' if len(workers) == 1 else 's'}"
    )
    pools = report.get("pools") or []
    parts = [head, "", _pools(pools, screen).rstrip("\n")]
    if any(pool.get("replicas") for pool in pools):
        parts += ["", _replicas(pools, screen).rstrip("\n")]
    if pools:
        parts += [
            "",
            *(
                f"{pool.get('name')}: {_decision(pool.get('last_decision'), now_s)}"
                for pool in pools
            ),
        ]
    if warmth := [*warmth_lines(pools), *fork_lines(report.get("fork_server"))]:
        parts += ["", *warmth]
    for pool in pools:
        if pool.get("error"):
            parts += ["", *_trouble(pool)]
    if report.get("last_error"):
        parts += ["", f"Last error of the control loop: {one_line(str(report['last_error']))}"]
    if any(pool.get("engine") == "simulated" for pool in pools):
        parts += ["", "Pools of engine simulated answer with made-up text at made-up speed."]
    return "\n".join(parts) + "\n"


def _pools(pools: Iterable[Mapping[str, Any]], screen: Screen) -> str:
    table = Table(
        ("POOL", "ENGINE", "READY", "WANTED", "OTHERS", "QUEUED", "INFLIGHT", "TOKENS", "TIER")
        + ("WAKE",)
    )
    for pool in pools:
        ready, desired = pool.get("ready"), pool.get("desired")
        enough = ready is not None and desired is not None and ready >= desired
        pinned = " (held)" if pool.get("override") is not None else ""
        wake = pool.get("wake_eta_s")
        table.add(
            str(pool.get("name")),
            str(pool.get("engine") or pool.get("backend") or UNKNOWN),
            (figure(ready), GOOD if enough and ready else BUSY if not enough else ""),
            figure(desired) + pinned,
            _others(pool),
            figure(pool.get("queued_requests")),
            figure(pool.get("inflight_requests")),
            figure(_sum(pool.get("inflight_tokens"), pool.get("queued_tokens"))),
            str(pool.get("tier") or NONE),
            NONE if wake is None else duration(wake),
        )
    return table.render(screen)


def _others(pool: Mapping[str, Any]) -> str:
    """Replicas that are not ready, by what they are."""
    states = ("starting", "unhealthy", "draining", "sleeping")
    return ", ".join(f"{pool[state]} {state}" for state in states if pool.get(state)) or NONE


def _sum(*values: float | None) -> float | None:
    """Unknown as soon as one part is."""
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None


def _decision(decision: Mapping[str, Any] | None, now_s: float) -> str:
    if not decision:
        return "nothing decided yet"
    why = one_line(str(decision.get("detail") or decision.get("reason")))
    return f"{why} ({ago(decision.get('at_s'), now_s)})"


def _trouble(pool: Mapping[str, Any]) -> list[str]:
    """Why a pool's engines fail: what happened, and the engine's own last lines below it."""
    first, *rest = str(pool["error"]).strip().splitlines() or [UNKNOWN]
    failures = pool.get("failures") or 0
    times = f"{failures} failures in a row" if failures > 1 else "failed"
    retry = pool.get("retry_in_s")
    again = f", next try in {duration(retry)}" if retry is not None else ""
    return [f"{pool.get('name')}: {times}{again}: {one_line(first)}"] + [
        f"  {one_line(one)}" for one in rest
    ]


def _replicas(pools: Iterable[Mapping[str, Any]], screen: Screen) -> str:
    table = Table(("REPLICA", "STATE", "FOR", "INFLIGHT", "TOKENS", "PID", "URL", "DETAIL"))
    for pool in pools:
        for replica in pool.get("replicas") or []:
            state = str(replica.get("state"))
            pid = replica.get("pid")
            table.add(
                str(replica.get("id")),
                (state, STATE_STYLES.get(state, "")),
                duration(replica.get("since_s")),
                figure(replica.get("inflight_requests")),
                figure(replica.get("inflight_tokens")),
                NONE if pid is None else str(pid),
                str(replica.get("url") or NONE),
                _first(replica.get("error") or replica.get("phase")),
            )
    return table.render(screen)


def _first(text: object) -> str:
    """The first line of a text that may bring a log with it."""
    return next(iter(str(text or "").strip().splitlines()), "")


# ── explain ───────────────────────────────────────────────────────────────────────────────────────


def explain(pool: str, decisions: Sequence[Mapping[str, Any]], screen: Screen, now_s: float) -> str:
    """Why a pool has the replicas it has: the newest decision in full, then how it came to it.

    ``now_s`` is Unix time, as the decisions' moments are.
    """
    if not decisions:
        return f"{pool}: nothing has been decided yet.\n"
    flat = list(decisions)
    newest = flat[-1]
    lines = [
        f"{pool}: {figure(newest.get('desired'))} wanted, {figure(newest.get('supply'))} there "
        "or on their way",
        f"  why     {one_line(str(newest.get('detail') or newest.get('reason') or UNKNOWN))}",
        f"  signal  {SIGNALS.get(str(newest.get('signal')), newest.get('signal') or NONE)}",
        f"  bound   {BOUNDS.get(str(newest.get('bound')), newest.get('bound') or 'none')}",
    ]
    if newest.get("panicking"):
        lines.append("  panic   yes: demand rose so fast that the pool only grows for now")
    lines += [
        f"  {name.replace('_', ' '):<7} {value}"
        for name, value in newest.items()
        if name not in SHOWN and isinstance(value, int | float | str)
    ]
    table = Table(("SINCE", "UNTIL", "TIMES", "WANTED", "THERE", "REASON", "BOUND", "DETAIL"))
    for one in flat:
        table.add(
            ago(one.get("first_at_s", one.get("at_s")), now_s),
            ago(one.get("last_at_s", one.get("at_s")), now_s),
            figure(one.get("count", 1)),
            figure(one.get("desired")),
            figure(one.get("supply")),
            str(one.get("reason") or UNKNOWN),
            str(one.get("bound") or NONE),
            str(one.get("detail") or ""),
        )
    return "\n".join([*lines, "", table.render(screen)])


SHOWN = frozenset(
    {"pool", "at_s", "first_at_s", "last_at_s", "count", "desired", "supply", "reason", "detail"}
    | {"signal", "bound", "panicking"}
)

SIGNALS = {
    "none": "nothing asked for replicas",
    "stable_tokens": "tokens in flight and queued, mean over the stable window",
    "panic_tokens": "tokens in flight and queued, mean over the panic window",
    "stable_requests": "requests in flight and queued, mean over the stable window",
    "panic_requests": "requests in flight and queued, mean over the panic window",
    "arrivals": "requests that came since the last decision",
    "held": "requests held in the gateway",
    "override": "an operator's number (tidegate scale)",
}

BOUNDS = {
    "min_replicas": "raised to min_replicas",
    "max_replicas": "lowered to max_replicas",
    "max_scale_up": "lowered: only so many starts in one tick (max_scale_up_per_tick)",
    "scale_down_delay": "kept: the lower number has not been enough for scale_down_delay_s yet",
    "panic": "kept: nothing is taken away in a panic",
    "idle_to_zero": "kept: not idle for idle_to_zero_s yet",
    "never_zero": "kept: not to zero while there are requests, or a start because of one",
    "unknown_demand": "kept: demand is unknown, which is not zero",
}


# ── doctor ────────────────────────────────────────────────────────────────────────────────────────


def doctor(checks: Iterable[Mapping[str, Any]], screen: Screen) -> str:
    """The report of ``tidegate doctor``: what was found, and below it what to do."""
    table = Table(("CHECK", "STATUS", "FINDING"))
    advice = []
    for check in checks:
        state = str(check.get("status"))
        table.add(
            str(check.get("name")),
            (state, STATE_STYLES.get(state, "")),
            str(check.get("finding") or ""),
        )
        if check.get("advice"):
            advice.append(f"  {check.get('name')}: {one_line(str(check['advice']))}")
    text = table.render(screen)
    return text + ("\nWhat to do:\n" + "\n".join(advice) + "\n" if advice else "")


# ── up ────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True, kw_only=True)
class BannerPool:
    """A pool as the banner names it."""

    name: str
    engine: str = ""
    min_replicas: int = 0


def banner(
    *, url: str, admin_url: str, pools: Sequence[BannerPool], insecure_tls: bool = False
) -> str:
    """What ``tidegate up`` prints once it is ready: where it is, and one line to try it with."""
    lines = [f"Tidegate is ready at {url}/v1  (admin: {admin_url})", ""]
    for pool in pools:
        kind = "a simulation: made-up text" if pool.engine == "simulated" else pool.engine
        asleep = "" if pool.min_replicas else "; at zero, the first request wakes it"
        lines.append(f"  {pool.name}  ({kind}{asleep})")
    if not pools:
        lines.append("  No pool is configured; see tidegate.example.toml.")
    else:
        lines += ["", "Try it:", "", f"  {curlone_line(url, pools[0].name, insecure_tls)}"]
    lines += ["", "Watch it with `tidegate status --watch`; stop it with Ctrl-C.", ""]
    return "\n".join(lines)


def curlone_line(url: str, model: str, insecure_tls: bool = False) -> str:
    """One line for a shell that asks a pool for a sentence."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": "What is the capital of France?"}],
        "max_tokens": 32,
        "temperature": 0,
    }
    flags = "-sSk" if insecure_tls else "-sS"
    return (
        f"curl {flags} {shlex.quote(url + '/v1/chat/completions')} "
        "-H 'content-type: application/json' "
        f"-d {shlex.quote(json.dumps(body, ensure_ascii=False))}"
    )
