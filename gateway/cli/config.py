"""``tidegate config``: check the settings, show them with their origins, print an example."""

from __future__ import annotations

from typing import Annotated

import typer

from gateway.cli import tables
from gateway.cli.base import AsJson, Config, Sets, as_text, load, screen
from gateway.terminal import complain, out

config_app = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown")


@config_app.command("check")
def config_check(config: Config = None, sets: Sets = None, as_json: AsJson = False) -> int:
    """Check the settings without starting anything, and that the files they name are there.

    Every problem is a line: field, value, what is allowed, where it was given. Exit code 2 when
    there is one.

    **Examples:** `tidegate config check`, `tidegate config check -c prod.toml -s gateway.port=0`
    """
    from gateway.settings.defaults import find_missing
    from gateway.settings.load import ConfigError

    try:
        loaded = load(config, sets)
        if missing := find_missing(loaded, given_only=True):
            raise ConfigError(missing)
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
    given = sum(origin != "default" for origin in loaded.origins.values())
    source = f"{loaded.path}" if loaded.path else "no file (there is no ./tidegate.toml)"
    out(f"The settings are valid: {source}, {given} of {len(loaded.origins)} values given.\n")
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
