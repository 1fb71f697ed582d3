"""The verbs of the ``tidegate`` command, and the options each of them takes."""

from __future__ import annotations

import os
import sys
from dataclasses import asdict
from functools import cache, partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gateway.cli import client, tables
from gateway.cli.adapter import adapter
from gateway.cli.base import (
    Admin,
    AsJson,
    Config,
    PoolName,
    Sets,
    address,
    as_text,
    load,
    screen,
)
from gateway.cli.cluster.deploy import deploy_app
from gateway.cli.cluster.import_resources import import_app
from gateway.cli.explain import explain
from gateway.cli.forecast import forecast
from gateway.cli.history import history_app
from gateway.cli.history_import import history_import
from gateway.cli.model import model_app
from gateway.cli.replay import replay
from gateway.terminal import complain, count, out
from gateway.terminal import version as installed_version
from loaders.engines.base import EngineName

if TYPE_CHECKING:
    from gateway.settings.load import Flag

CLEAR = "\x1b[H\x1b[2J"
HELP_NAMES = ["-h", "--help"]

app = typer.Typer(
    name="tidegate",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": HELP_NAMES},
)
config_app = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown")
app.add_typer(config_app, name="config", help="Check and show the settings.")
pool_app = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown")
app.add_typer(pool_app, name="pool", help="Take a pool out of service, and back.")
app.add_typer(model_app, name="model", help="The models in this node's cache.")
app.add_typer(deploy_app, name="deploy", help="Tidegate in a Kubernetes cluster.")
history_app.command("import")(history_import)
app.add_typer(history_app, name="history", help="The past of pools, minute by minute.")
app.command("adapter")(adapter)
app.add_typer(import_app, name="import", help="Resources of other products, as Tidegate's.")
app.command("explain")(explain)
app.command("forecast")(forecast)
app.command("replay")(replay)


@cache  # typer reads every signature for it
def make_command() -> Any:
    """The whole command line, whose help names no type behind what takes no value."""
    command = typer.main.get_command(app)
    _hide_types_of_flags(command)
    return command


def _hide_types_of_flags(command: Any) -> None:
    for one in command.get_params(typer.Context(command, help_option_names=HELP_NAMES)):
        if getattr(one, "is_flag", False) and one.metavar is None:
            one.metavar = ""
    for below in getattr(command, "commands", {}).values():
        _hide_types_of_flags(below)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"tidegate {installed_version()} (Python {sys.version.split()[0]})")
        raise typer.Exit


@app.callback()
def tidegate(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """One OpenAI-compatible endpoint in front of vLLM that scales to zero and back without losing
    a request.

    **Start it:** `tidegate up` serves the pools of ./tidegate.toml, or a small built-in model.
    `tidegate up --engine simulated` is instant and needs no engine.

    **Look at it:** `tidegate status` shows pools and replicas, `tidegate explain POOL` why there
    are as many as there are.

    **Take over:** `tidegate scale POOL 1` holds a pool at one replica, `tidegate scale POOL auto`
    gives it back.

    **Bring models here ahead of time:** `tidegate model preload MODEL`, `tidegate model ls`.

    **Set it up:** `tidegate config example > tidegate.toml`, `tidegate config check`,
    `tidegate doctor`.
    """


def _flags(*given: tuple[str, str | int | None, str]) -> list[Flag]:
    """The settings that have a flag of their own (field, value, flag), where it was given."""
    from gateway.settings.load import Flag

    return [Flag(*one) for one in given if one[1] is not None]


@app.command()
def up(
    context: typer.Context,
    config: Config = None,
    sets: Sets = None,
    engine: Annotated[
        EngineName | None,
        typer.Option(help="Engine of every pool that Tidegate starts itself."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="Serve this one model instead of the configured pools: a checkpoint directory, "
            "org/name of a hub, a URL (hf://, s3://, gs://, oss://, https://, file://), or a name "
            "the engine knows.",
        ),
    ] = None,
    host: Annotated[
        str | None, typer.Option(help="Address of the API; 0.0.0.0 for all.", metavar="ADDRESS")
    ] = None,
    port: Annotated[
        int | None, typer.Option(help="Port of the API; 0 for any free one.", min=0, max=65_535)
    ] = None,
    admin_port: Annotated[
        int | None, typer.Option(help="Port of the admin listener.", min=0, max=65_535)
    ] = None,
    workers: Annotated[
        int | None, typer.Option(help="Gateway processes; 0 for one per core.", min=0, max=256)
    ] = None,
) -> int:
    """Run the gateway, the autoscaler and the engines, until Ctrl-C.

    Prints the URL and a `curl` line once requests are accepted. A pool at zero starts its first
    engine when it is asked for; meanwhile the request waits.

    **Examples**

    - `tidegate up` — ./tidegate.toml, or the small model that `make run` brings

    - `tidegate up --engine simulated` — try everything without an engine

    - `tidegate up --model Qwen/Qwen3-0.6B` — fetched by the first request

    - `tidegate up --model ~/models/Qwen3-8B -s pools.0.process.gpus_per_replica=1`

    - `tidegate up -c prod.toml --port 9000 --workers 4`
    """
    from gateway.settings import defaults
    from gateway.settings.load import LoadedSettings

    flags = _flags(
        ("gateway.host", host, "--host"),
        ("gateway.port", port, "--port"),
        ("gateway.admin_port", admin_port, "--admin-port"),
        ("gateway.workers", workers, "--workers"),
    )
    environ = dict(os.environ)
    config = defaults.find_config(config)  # the file of the start: without it a reload fails

    def read() -> LoadedSettings:
        return defaults.load_installed(
            partial(
                defaults.load_for_up,
                config, environ, sets or (), flags, engine=engine, model=model,
            )
        )  # fmt: skip

    loaded = read()
    for warning in loaded.warnings:
        complain(f"warning: {warning.as_warning()}")
    code: int = context.obj.up(loaded, read)
    return code


@app.command()
def agent(
    context: typer.Context,
    config: Config = None,
    sets: Sets = None,
    admin_port: Annotated[
        int | None, typer.Option(help="Port of the admin listener.", min=0, max=65_535)
    ] = None,
    peer_port: Annotated[
        int | None,
        typer.Option(help="Port at which peers are served; 0 for any free one.", min=0, max=65_535),
    ] = None,
) -> int:
    """Run this node's model cache without gateway, autoscaler or engines, until Ctrl-C.

    It gives pieces of models to its peers, fetches what other sites order with `tidegate model
    replicate`, and answers the other `tidegate model` verbs. Meant for nodes that hold models for
    others: a DaemonSet, another site. Needs the cluster's secret in `TIDEGATE_PEER_TOKEN`.

    **Examples**

    - `TIDEGATE_PEER_TOKEN=... tidegate agent --peer-port 8002 -s modelcache.peer_host=10.0.0.7`

    - `tidegate agent -c node.toml`
    """
    from gateway.settings import defaults

    flags = _flags(
        ("gateway.admin_port", admin_port, "--admin-port"),
        ("modelcache.peer_port", peer_port, "--peer-port"),
    )
    loaded = defaults.load_for_up(config, os.environ, sets or (), flags)
    for warning in loaded.warnings:
        complain(f"warning: {warning.as_warning()}")
    code: int = context.obj.agent(loaded)
    return code


@app.command()
def status(
    context: typer.Context,
    as_json: AsJson = False,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Keep updating it.")] = False,
    interval: Annotated[
        float, typer.Option(help="Seconds between two updates.", min=0.2, max=3600)
    ] = 2.0,
    admin: Admin = None,
    config: Config = None,
    sets: Sets = None,
) -> int:
    """Show pools, replicas, load, and the last decision for each pool.

    DESIRED is what the autoscaler decided; "(held)" after it means an operator did. QUEUED requests
    wait in the gateway, INFLIGHT ones are with an engine, TOKENS are estimates of both. WAKE is how
    long the next start takes at most: the longest of the last ones from the tier it is in, or from
    the nearest that was measured; "wakes from" has their medians. A `?` is unknown, which is not
    zero. Of a cache agent it shows its peers, disk use and traffic.

    **Examples:** `tidegate status`, `tidegate status --watch`,
    `tidegate status --json | jq '.pools[].ready'`
    """
    from gateway.admin.operations import STATUS

    while True:
        base = address(admin, config, sets)  # each time: one that was started again has new ports
        clear = CLEAR if watch and not as_json and screen().terminal else ""
        try:
            report = client.ask(base, STATUS).root
        except client.Unreachable as error:
            if not watch:
                raise
            if as_json:
                complain(f"not reachable: {error}")
            else:
                out(f"{clear}Not reachable: {error}\n")
        else:
            out(clear + _status_text(report, base, as_json, context.obj.now_s()))
        if not watch:
            return 0
        context.obj.sleep(interval)


def _status_text(report: Any, base: client.Listener, as_json: bool, now_s: float) -> str:
    """A gateway's status or an agent's, as it is printed."""
    if as_json:
        return as_text(report)
    if report.kind == "agent":
        return tables.agent_status(report, str(base))
    return tables.status(report, screen(), now_s)


@app.command()
def scale(
    pool: PoolName,
    replicas: Annotated[
        str, typer.Argument(metavar="N|auto", help="Replicas to hold it at, or `auto`.")
    ],
    as_json: AsJson = False,
    admin: Admin = None,
    config: Config = None,
    sets: Sets = None,
) -> int:
    """Hold a pool at N replicas, or give it back to the autoscaler with `auto`.

    N is from 0 to the pool's max_replicas, and may be less than its min_replicas. Nothing is taken
    from a request: replicas that go finish what they have, and at 0 the next request still wakes
    the pool (`tidegate pool disable` takes it out of service).

    **Examples:** `tidegate scale smollm2 1`, `tidegate scale smollm2 0`,
    `tidegate scale smollm2 auto`
    """
    if replicas != "auto" and not (replicas.isascii() and replicas.isdigit()):
        raise typer.BadParameter(f"{replicas!r} is neither a number from 0 nor auto")
    from gateway.admin.operations import SCALE

    number = None if replicas == "auto" else int(replicas)
    answer = client.ask(address(admin, config, sets), SCALE, {"replicas": number}, pool=pool)
    if as_json:
        out(as_text(answer))
    elif answer.disabled:
        how = "scaled by the autoscaler" if number is None else f"held at {number}"
        out(f"{pool} is out of service: {how} from `tidegate pool enable {pool}` on.\n")
    elif number is None:
        out(f"{pool} is scaled by the autoscaler again.\n")
    else:
        out(f"{pool} is held at {number}; `tidegate scale {pool} auto` gives it back.\n")
    return 0


@pool_app.command("disable")
def disable_pool(
    pool: PoolName,
    as_json: AsJson = False,
    admin: Admin = None,
    config: Config = None,
    sets: Sets = None,
) -> int:
    """Take a pool out of service: its model is answered 503 and listed no more.

    Requests under way are finished, then its engines end, and no request wakes it. It stays so over
    restarts, until `tidegate pool enable`. To put it at zero until the next request:
    `tidegate scale POOL 0`.

    **Examples:** `tidegate pool disable smollm2`, `tidegate pool enable smollm2`
    """
    return _set_disabled(pool, address(admin, config, sets), as_json, disabled=True)


@pool_app.command("enable")
def enable_pool(
    pool: PoolName,
    as_json: AsJson = False,
    admin: Admin = None,
    config: Config = None,
    sets: Sets = None,
) -> int:
    """Take a pool back into service; the next request wakes it, or its min_replicas do.

    **Examples:** `tidegate pool enable smollm2`
    """
    return _set_disabled(pool, address(admin, config, sets), as_json, disabled=False)


def _set_disabled(pool: str, listener: client.Listener, as_json: bool, *, disabled: bool) -> int:
    from gateway.admin.operations import DISABLE, ENABLE

    answer = client.ask(listener, DISABLE if disabled else ENABLE, {}, pool=pool)
    if as_json:
        out(as_text(answer))
    elif disabled:
        out(f"{pool} is out of service; `tidegate pool enable {pool}` takes it back.\n")
    else:
        out(f"{pool} is in service again.\n")
    return 0


@app.command()
def reload(
    as_json: AsJson = False,
    admin: Admin = None,
    config: Config = None,
    sets: Sets = None,
) -> int:
    """Have a running Tidegate read its settings again: pools are added, changed and removed.

    It reads the same file, environment and `--set` as when it was started. No request is lost: a
    removed pool serves those it has, and replicas with other start-up arguments are replaced one by
    one, a new one first. What needs a restart is named. Settings with a mistake change nothing.

    **Examples:** `tidegate reload`, `tidegate reload --json | jq .needs_restart`
    """
    from gateway.admin.operations import RELOAD
    from gateway.settings.changes import describe

    answer = client.ask(address(admin, config, sets), RELOAD)
    if as_json:
        out(as_text(answer))
        return 0
    out("".join(f"{line}\n" for line in describe(**dict(answer))))
    return 0


@app.command()
def doctor(
    context: typer.Context,
    as_json: AsJson = False,
    measure: Annotated[
        bool,
        typer.Option(
            "--measure/--no-measure",
            help="Try whether engines can be forked, and how fast each load format reads.",
        ),
    ] = True,
    config: Config = None,
    sets: Sets = None,
) -> int:
    """Look at this machine and these settings: what is there, what is missing, what to do about it.

    Changes nothing, and nothing it starts stays. Measuring takes up to a minute, and for a moment
    the room of one file of weights in the temporary directory. Exit code 1 when something would
    keep `tidegate up` from working.

    **Examples:** `tidegate doctor`, `tidegate doctor --no-measure`,
    `tidegate doctor -c prod.toml --json`
    """
    loaded = load(config, sets)
    if sys.stderr.isatty() and not as_json:
        complain("checking this machine; the engine's checks take up to a minute")
    checks = context.obj.doctor(loaded.settings, measure)
    if as_json:
        out(as_text({"checks": [asdict(check) for check in checks]}))
    else:
        out(tables.doctor(checks, screen()))
    return 1 if any(check.status == "fail" for check in checks) else 0


# ── config ────────────────────────────────────────────────────────────────────────────────────────


@config_app.command("check")
def config_check(config: Config = None, sets: Sets = None, as_json: AsJson = False) -> int:
    """Check the settings without starting anything, and that the files they name are there.

    Every problem is a line: field, value, what is allowed, where it was given. Exit code 2 when
    there is one.

    **Examples:** `tidegate config check`, `tidegate config check -c prod.toml -s gateway.port=0`
    """
    from gateway.settings.defaults import load_installed
    from gateway.settings.load import BUILT_IN, ConfigError

    try:
        loaded = load_installed(partial(load, config, sets), given_only=True)
    except ConfigError as error:
        if as_json:
            out(as_text({"ok": False, "problems": [one._asdict() for one in error.problems]}))
            return 2
        raise
    warnings = [one._asdict() for one in loaded.warnings]
    if as_json:
        out(as_text({"ok": True, "problems": [], "warnings": warnings}))
        return 0
    for warning in loaded.warnings:
        complain(f"warning: {warning.as_warning()}")
    given = sum(origin not in {"default", BUILT_IN} for origin in loaded.origins.values())
    source = f"{loaded.path}" if loaded.path else "no file (there is no ./tidegate.toml)"
    out(f"The settings are valid: {source}, {count(given, 'value')} given.\n")
    if BUILT_IN in loaded.origins.values():
        out(
            "The built-in pool's engine and model were not looked for; `tidegate doctor` does "
            "that.\n"
        )
    return 0


@config_app.command("show")
def config_show(
    config: Config = None,
    sets: Sets = None,
    as_json: AsJson = False,
    changed: Annotated[
        bool, typer.Option("--changed", help="Only values that are not the default's.")
    ] = False,
) -> int:
    """Show each value and where it came from: default, file and line, environment, --set.

    **Examples:** `tidegate config show`, `tidegate config show --changed`,
    `TIDEGATE__GATEWAY__PORT=9000 tidegate config show | grep port`
    """
    from gateway.settings import docs

    loaded = load(config, sets)
    rows = [row for row in docs.rows(loaded) if not changed or row.origin != "default"]
    if as_json:
        out(as_text({row.field: {"value": row.plain, "origin": row.origin} for row in rows}))
        return 0
    table = tables.Table(("FIELD", "VALUE", "FROM"))
    for row in rows:
        table.add(row.field, row.shown, (row.origin, "dim" if row.origin == "default" else ""))
    out(table.render(screen()))
    return 0


@config_app.command("example")
def config_example() -> int:
    """Print a settings file with every field, its default, and what it means.

    **Example:** `tidegate config example > tidegate.toml`
    """
    from gateway.settings import docs

    out(docs.example())
    return 0
