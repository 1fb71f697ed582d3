"""What the console's verbs share: their common options, where they print, whom they ask."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gateway.cli import client
from gateway.cli.tables import Screen

if TYPE_CHECKING:
    from gateway.settings.load import LoadedSettings

Config = Annotated[
    Path | None,
    typer.Option(
        "--config",
        "-c",
        metavar="FILE",
        envvar="TIDEGATE_CONFIG",
        help="Settings file. Without it: ./tidegate.toml, if it is there.",
    ),
]
Sets = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        "-s",
        metavar="FIELD=VALUE",
        help="One setting over the file's and the environment's, such as "
        "`autoscaler.stable_window_s=30` or `pools.0.max_replicas=2`. May be repeated.",
    ),
]
Admin = Annotated[
    str | None,
    typer.Option(
        "--admin",
        metavar="URL",
        help="Admin listener to ask. Without it: the Tidegate running with this state directory, "
        "else the address in the settings.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]
PoolName = Annotated[str, typer.Argument(metavar="POOL", help="A pool's name.")]


def load(config: Path | None, sets: list[str] | None) -> LoadedSettings:
    """The settings ``tidegate up`` would use; raises ``ConfigError``."""
    from gateway.settings import defaults

    return defaults.load_for_up(config, os.environ, sets or (), defaults.UpFlags())


def address(admin: str | None, config: Path | None, sets: list[str] | None) -> str:
    """Whom to ask: the one named, the one that runs here, the one in the settings."""
    if admin is not None:
        try:
            return client.check_address(admin)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from None
    from gateway.compose.run_record import AGENT_NAME, RECORD_NAME, make_url, read_record

    settings = load(config, sets).settings
    for name in (RECORD_NAME, AGENT_NAME):
        running = read_record(settings.state_dir, name)
        if running is not None:
            return running.admin_url
    return make_url(settings.gateway.admin_host, settings.gateway.admin_port)


def screen() -> Screen:
    """Where standard output goes."""
    terminal = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    return Screen(terminal=terminal, width=shutil.get_terminal_size((100, 24)).columns)


def as_text(value: Any) -> str:
    """JSON for scripts."""
    return json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n"


def out(text: str) -> None:
    """Text on standard output, at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


def complain(line: str) -> None:
    """One line on standard error, with whose it is."""
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.write(f"tidegate: {line}\n")


def version() -> str:
    """The installed version; ``(not installed)`` from a bare checkout."""
    from importlib import metadata

    try:
        return metadata.version("tidegate")
    except metadata.PackageNotFoundError:
        return "(not installed)"
