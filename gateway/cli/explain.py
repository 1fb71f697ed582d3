"""``tidegate explain``: why a pool has the replicas it has, or had, and what that cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from autoscaler.types import ScaleReason, first_line
from gateway.cli import client, tables
from gateway.cli.base import Admin, AsJson, Config, PoolName, Sets, address, as_text, screen
from gateway.cli.client import ValueRefused
from gateway.cli.history import moment, open_history
from gateway.terminal import NONE, ago, count, duration, figure, one_line, out, utc

if TYPE_CHECKING:
    from gateway.admin import schema


def explain(
    context: typer.Context,
    pool: PoolName,
    at: Annotated[
        str | None,
        typer.Option(
            "--at",
            metavar="TIME",
            help="Not now but then: 10m (ago), 14:05, or 2026-11-30T14:05Z. Times without a zone "
            "are UTC.",
        ),
    ] = None,
    score: Annotated[
        bool,
        typer.Option("--score", help="Say what its decisions cost and brought since `--since`."),
    ] = False,
    since: Annotated[
        str, typer.Option("--since", metavar="TIME", help="Of `--score`; as `--at`.")
    ] = "24h",
    as_json: AsJson = False,
    limit: Annotated[int, typer.Option(help="Decisions to show.", min=1, max=10_000)] = 20,
    admin: Admin = None,
    config: Config = None,
    sets: Sets = None,
) -> int:
    """Say why a pool has as many replicas as it has, or had at some time.

    The decision in full (which signal asked for the number, which bound changed it, what each rule
    would have said), then how it came to that, oldest first; equal decisions in a row are one line.
    Of the past one decision a minute is kept, and each change; it is read from the file where no
    Tidegate runs.

    `--score` says how right the forecasts were, and what the decisions cost beside those of
    reaction alone: replica-hours, and the time in which demand was above what ready replicas carry.

    **Examples:** `tidegate explain smollm2`, `tidegate explain smollm2 --at "10m ago"`,
    `tidegate explain smollm2 --score --since 7d`, `tidegate explain smollm2 --limit 5 --json`
    """
    now_s = context.obj.now_s()
    if score and at is not None:
        raise typer.BadParameter("--at and --score are two questions")
    if score:
        from_s = moment(since, now_s)
        found = open_history(context.obj.now_s, admin, config, sets).score(pool, from_s)
        out(as_text(found) if as_json else score_text(found, screen(), now_s))
        return 0
    if at is not None:
        at_s = moment(at, now_s)
        if at_s > now_s:
            raise ValueRefused(f"--at {at}: that is to come")
        past = open_history(context.obj.now_s, admin, config, sets).decisions(pool, at_s, limit)
        out(as_text(past) if as_json else past_text(past, screen(), now_s))
        return 0
    from gateway.admin.operations import EXPLAIN

    answer = client.ask(address(admin, config, sets), EXPLAIN, query={"limit": limit}, pool=pool)
    out(as_text(answer) if as_json else explain_text(answer, screen(), now_s))
    return 0


# ── As text ───────────────────────────────────────────────────────────────────────────────────────


def explain_text(answer: schema.ExplainAnswer, screen: tables.Screen, now_s: float) -> str:
    """Why a pool has the replicas it has: the newest decision in full, then how it came to it."""
    if not answer.decisions:
        return f"{answer.pool}: no decision yet.\n"
    newest, pool = answer.decisions[-1], answer.current
    there = [] if pool is None else [f"{figure(pool.ready)} ready", *tables.not_ready(pool)]
    lines = [
        f"{answer.pool}: {', '.join([f'{figure(newest.desired)} desired', *there])}",
        *(f"  problem {one_line(one)}" for one in ([] if pool is None else _problems(pool))),
        *decision_lines(newest),
    ]
    return "\n".join([*lines, "", decisions_table(answer.decisions, now_s).render(screen)])


def past_text(answer: schema.DecisionsAnswer, screen: tables.Screen, now_s: float) -> str:
    """The same of a moment of the past."""
    found = answer.decision
    there = [f"{figure(found.desired)} desired"]
    if found.inputs is not None:
        there.append(f"{figure(found.inputs.ready)} ready")
    at = utc(answer.at_s, "%Y-%m-%d %H:%M:%S UTC")
    lines = [
        f"{answer.pool} at {at} ({ago(answer.at_s, now_s)}): {', '.join(there)}",
        *decision_lines(found),
    ]
    return "\n".join([*lines, "", decisions_table(answer.decisions, now_s).render(screen)])


def decision_lines(one: schema.DecisionEntry) -> list[str]:
    """A decision in full: why, from what, and which rule would have said what."""
    lines = [
        f"  why     {one_line(one.detail or one.reason)}",
        f"  signal  {SIGNALS.get(one.signal, one.signal)}",
        f"  bound   {BOUNDS.get(one.bound or '', one.bound or 'none')}",
    ]
    if one.forecast is not None:
        lines.append(
            f"  ahead   the forecast asks for {one.forecast}, which covers "
            f"{one.level or 0.0:.1%} of what may come; demand by itself for "
            f"{figure(one.reactive)}"
        )
    elif one.fallback:
        lines.append(f"  ahead   it reacts alone: {one_line(one.fallback)}")
    if one.capacity is not None:
        lines.append(f"  each    {tables.capacity_text(one.capacity)}")
    if one.inputs is not None:
        lines += inputs_lines(one.inputs)
    if one.recommended is not None and one.reason == ScaleReason.STATIC:
        lines.append(f"  scaled  not by Tidegate, which would have {one.recommended}")
    elif one.recommended is not None:
        lines.append(f"  mode    {one.reason}: in the mode auto it would have {one.recommended}")
    if one.panicking:
        lines.append("  panic   yes: demand rose so fast that the pool only grows for now")
    return lines


def inputs_lines(seen: schema.DecisionInputsEntry) -> list[str]:
    """What a decision was made from."""
    demand = f"{figure(seen.requests)} requests, {figure(seen.tokens)} tokens in flight and queued"
    if seen.stable_tokens_per_s is not None:
        demand += (
            f"; {seen.stable_tokens_per_s:.0f} tokens/s came over {seen.stable_window_s:g} s, "
            f"{figure(seen.panic_tokens_per_s)} over the short window"
        )
    lines = [f"  demand  {demand}"]
    if seen.forecast_median_tokens_per_s is not None:
        within = "" if seen.lead_s is None else f" within {duration(seen.lead_s)}"
        lines.append(
            f"  expects at most {seen.forecast_median_tokens_per_s:.0f} tokens/s{within} in half "
            f"of all cases, {figure(seen.forecast_high_tokens_per_s)} in 95% ({seen.model})"
        )
    rules = [f"{name} {number}" for name, number in seen.rules]
    if seen.alone is not None:
        rules.append(f"reaction alone {seen.alone}")
    lines.append(f"  rules   {', '.join(rules) or 'none asks for any'}")
    held = "" if seen.override is None else f", held at {seen.override}"
    lines.append(f"  limits  {figure(seen.min_replicas)} to {figure(seen.max_replicas)}{held}")
    return lines


def decisions_table(decisions: Sequence[schema.PastDecisionEntry], now_s: float) -> tables.Table:
    """A row for each decision, oldest first."""
    table = tables.Table(
        ("SINCE", "UNTIL", "TIMES", "DESIRED", "SUPPLY", "REASON", "BOUND", "DETAIL")
    )
    for one in decisions:
        table.add(
            ago(one.first_at_s, now_s),
            ago(one.last_at_s, now_s),
            figure(one.count),
            figure(one.desired),
            figure(one.supply),
            one.reason,
            one.bound or NONE,
            one.detail,
        )
    return table


def score_text(found: schema.ScoreAnswer, screen: tables.Screen, now_s: float) -> str:
    """What a stretch cost and brought, against reaction alone."""
    total_s = found.scored_s + found.unknown_s
    lines = [
        f"{found.pool}: {duration(total_s)} from {ago(found.from_s, now_s)} on, "
        f"{duration(found.scored_s)} of it scored"
    ]
    if found.coverage is None:
        lines.append("  forecast  none was scored: its lead has to pass first")
    else:
        text = (
            f"{count(found.forecasts, 'lead window')} scored, {found.coverage:.1%} within its "
            "quantile 0.95"
        )
        if found.loss_ratio is not None:
            text += f"; its pinball loss is {found.loss_ratio:.2f} of the last value's"
        lines.append(f"  forecast  {text}")
    if not found.scored_s:
        lines.append(
            "  cost      nothing can be said: demand, or what a replica carries, is unknown"
        )
        return "\n".join(lines) + "\n"
    lines.append(f"  used      {found.trusted_s / found.scored_s:.0%} of the time")
    lines.append(
        f"  against   reaction alone: {found.above_replica_s / 3600:.2f} replica-hours above it, "
        f"{found.below_replica_s / 3600:.2f} below it"
    )
    table = tables.Table(("", "REPLICA-HOURS", "SHORT", "OF THE TIME"))
    rows = [("as it ran", found.ran), ("reaction alone (computed)", found.reactive)]
    if found.auto is not None:
        rows.append(("mode auto (computed)", found.auto))
    for name, cost in rows:
        table.add(
            name, f"{cost.replica_s / 3600:.2f}", duration(cost.short_s),
            f"{100 * cost.short_s / found.scored_s:.2f}%",
        )  # fmt: skip
    note = (
        "SHORT: demand was above what the ready replicas carry. Computed from the same demand, "
        "minute by minute: a replica\nserves one lead after it was asked for.\n"
    )
    return "\n".join([*lines, "", table.render(screen) + "\n" + note])


def _problems(pool: schema.PoolEntry) -> list[str]:
    """What keeps a pool from having the replicas it shall have: failures, and what is unhealthy."""
    problems = []
    if pool.error:
        times = "" if pool.failures < 2 else f" {pool.failures} times in a row, at last"
        retry = tables.retry_text(pool, "; ")
        problems.append(f"its engine failed{times}: {first_line(pool.error)}{retry}")
    for replica in pool.replicas:
        if replica.state == "unhealthy":
            why = f": {first_line(replica.error)}" if replica.error else ""
            problems.append(f"{replica.id} is unhealthy{why}")
    return problems


SIGNALS = {
    "none": "nothing asked for replicas",
    "stable_tokens": "tokens in flight and queued, mean over the stable window",
    "panic_tokens": "tokens in flight and queued, mean over the panic window",
    "stable_requests": "requests in flight and queued, mean over the stable window",
    "panic_requests": "requests in flight and queued, mean over the panic window",
    "stable_tokens_per_s": "tokens of the requests that came, per second of the stable window",
    "panic_tokens_per_s": "tokens of the requests that came, per second of the panic window",
    "backlog": "tokens held in the gateway, to be worked off within backlog_s",
    "forecast": "the highest demand until a new replica would serve, by the forecast",
    "target": "a figure that the pool has a target for (targets)",
    "arrivals": "requests that came since the last decision",
    "held": "requests held in the gateway",
    "override": "an operator's number (tidegate scale)",
}

BOUNDS = {
    "min_replicas": "raised to min_replicas",
    "max_replicas": "lowered to max_replicas",
    "max_scale_up": "lowered: only so many starts in one tick (max_scale_up_per_tick)",
    "max_scale_down": "kept: only so many go in one tick (max_scale_down_per_tick)",
    "scale_down_delay": "kept: the lower number has not been enough for scale_down_delay_s yet",
    "panic": "kept: nothing is taken away in a panic",
    "idle_to_zero": "kept: not idle for idle_to_zero_s yet",
    "never_zero": "kept: not to zero while there are requests, or a start because of one",
    "starting": "kept: none is ready yet, and a request may wait for one that is loading",
    "no_capacity": "lowered: no memory or GPU is free for more, so it waits, or makes room",
    "unknown_demand": "kept: demand is unknown, which is not zero",
}
