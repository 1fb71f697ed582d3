"""What the console's verbs share: common options, where they print, which listener they ask."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gateway.cli import client
from gateway.cli.client import ValueRefused
from gateway.cli.tables import Screen
from gateway.terminal import complain

if TYPE_CHECKING:
    from pydantic import BaseModel

    from gateway.admin.models import Models
    from gateway.doctor.checks import Check
    from gateway.settings.load import LoadedSettings
    from gateway.settings.schema import Settings

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
        help="Admin listener to ask, or the path of its socket. Over TCP it wants its token: from "
        "`TIDEGATE_ADMIN_TOKEN`, else the file `gateway.admin_token_file`. Without it: the "
        "Tidegate running with this state directory, by its socket, which wants none; else the "
        "address in the settings.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]
Plot = Annotated[
    Path | None,
    typer.Option(
        "--plot",
        metavar="FILE",
        help="Draw it: an .svg, or an .html page that works offline.",
    ),
]
PoolName = Annotated[str, typer.Argument(metavar="POOL", help="A pool's name, or an alias.")]


@dataclass(frozen=True, slots=True, kw_only=True)
class Effects:
    """What verbs do beyond reading settings and asking an admin listener; what is heavy is imported
    when it is called. A verb finds it in ``Context.obj``."""

    now_s: Callable[[], float] = time.time
    sleep: Callable[[float], None] = time.sleep

    def up(self, loaded: LoadedSettings, read_again: Callable[[], LoadedSettings]) -> int:
        """Run a Tidegate until it is stopped; returns the exit code."""
        from gateway.compose import up

        return up.run(loaded, read_again)

    def agent(self, loaded: LoadedSettings) -> int:
        """Run a cache agent until it is stopped; returns the exit code."""
        from gateway.compose import agent

        return agent.run(loaded)

    def adapter(self, loaded: LoadedSettings, find: Callable[[], tuple[str, str]]) -> int:
        """Run the adapter of other autoscalers until it is stopped; returns the exit code.
        ``find`` says which admin listener it asks, and with which token."""
        from gateway.compose import adapter

        return adapter.run(loaded, find)

    def open_models(self, settings: Settings) -> Models:
        """The verbs over this node's cache."""
        from gateway.compose.cache import open_models

        return open_models(settings, os.environ)

    def doctor(self, settings: Settings, measure: bool) -> Sequence[Check]:
        """What this machine has and what is missing."""
        from gateway.doctor.report import run_doctor

        return run_doctor(settings, measure=measure)

    def deploy_check(
        self, settings: Settings, kubeconfig: str | None, account: str | None
    ) -> Sequence[Check]:
        """What a cluster has and what is missing; raises ``NoClusterError``."""
        from gateway.doctor.cluster import run_cluster_check

        return run_cluster_check(settings, kubeconfig, account)


def load(config: Path | None, sets: list[str] | None) -> LoadedSettings:
    """The settings ``tidegate up`` would use; raises ``ConfigError``."""
    from gateway.settings import defaults

    return defaults.load_for_up(config, os.environ, sets or ())


def address(admin: str | None, config: Path | None, sets: list[str] | None) -> client.Listener:
    """The admin listener to ask."""
    return client.find_listener(admin, lambda: load(config, sets).settings)


def screen() -> Screen:
    """Where standard output goes."""
    terminal = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    return Screen(terminal=terminal, width=shutil.get_terminal_size((100, 24)).columns)


def as_text(value: BaseModel | dict[str, Any]) -> str:
    """JSON for scripts; NaN is ``null``."""
    if isinstance(value, dict):
        import msgspec

        text = msgspec.json.encode(value, enc_hook=str)
        return msgspec.json.format(text, indent=2).decode() + "\n"
    return value.model_dump_json(indent=2) + "\n"


@contextmanager
def numeric_imports(verb: str) -> Iterator[None]:
    """What a verb imports that needs numpy and scipy; raises ``ValueRefused`` without them."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name not in ("numpy", "scipy"):
            raise
        raise ValueRefused(
            f"`tidegate {verb}` needs numpy and scipy: install Tidegate with its extra `forecast`"
        ) from None


def check_plot(plot: Path | None) -> None:
    """Raises ``ValueRefused`` for a file that cannot be drawn to, before anything is computed."""
    if plot is not None and plot.suffix not in (".svg", ".html"):
        raise ValueRefused(f"--plot {plot}: a file that ends in .svg or .html")
    if plot is not None and not plot.parent.is_dir():
        raise ValueRefused(f"--plot {plot}: there is no directory {plot.parent}")


def write_plot(plot: Path, picture: str) -> None:
    """Write a picture or a page. Raises ``ValueRefused`` where that fails."""
    try:
        plot.write_text(picture)
    except OSError as error:
        raise ValueRefused(f"--plot {plot}: {error.strerror}") from None
    complain(f"wrote {plot}")
