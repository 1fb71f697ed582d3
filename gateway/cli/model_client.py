"""Who does what ``tidegate model`` is told: a Tidegate or an agent that runs, else this process.

All of them do and say the same: what is wrong with a command line is ``typer.BadParameter``, what
could not be done ``Refused`` or ``CacheError``.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import typer

from gateway.admin.model_errors import BAD_VALUE
from gateway.cli import client
from gateway.cli.client import Refused, Unreachable
from modelcache.types import CacheError, Progress

if TYPE_CHECKING:
    from gateway.admin.models import Models
    from gateway.settings.schema import Settings

_CALL_OFF_S = 30.0

OnProgress = Callable[[Progress], None]


class Doer(Protocol):
    """Whoever does it: this process, or one that runs already."""

    def listing(self) -> dict[str, Any]:
        """What is there."""
        ...

    def pools(self) -> Sequence[str]:
        """The names that stand for pools there."""
        ...

    def run(self, verb: str, body: dict[str, Any], on_progress: OnProgress) -> dict[str, Any]:
        """Do it, and tell what was done."""
        ...


class Remote:
    """The admin listener of one that runs."""

    def __init__(self, base: str) -> None:
        self._base = base

    def listing(self) -> dict[str, Any]:
        """What is there."""
        return client.ask(self._base, "/models")

    def pools(self) -> Sequence[str]:
        """The names that stand for pools there."""
        return [str(name) for name in self.listing().get("pools") or ()]

    def run(self, verb: str, body: dict[str, Any], on_progress: OnProgress) -> dict[str, Any]:
        """Do it, and tell what was done. The connection keeps slow work going: leaving calls it
        off."""
        base = self._base
        with (
            client.reach(base) as http,
            http.stream("POST", f"/models/{verb}", json=body) as answer,
        ):
            for line in answer.iter_lines():
                try:
                    found = json.loads(line) if line.strip() else {}
                except ValueError:
                    found = None
                if not isinstance(found, dict):
                    raise Unreachable(f"{base} is no Tidegate admin listener: not JSON lines")
                if "error" in found:
                    raise _refusal(found["error"], f"{base} answered {answer.status_code}")
                if "result" in found or "verb" in found:
                    result: dict[str, Any] = found.get("result", found)
                    return result
                if "progress" in found:
                    on_progress(progress_of(found["progress"]))
        raise Unreachable(f"{base} ended its answer before it was done")


def _refusal(error: Any, otherwise: str) -> Exception:
    """What an admin listener's error is on a command line."""
    told = error if isinstance(error, dict) else {}
    message = str(told.get("message") or otherwise)
    return typer.BadParameter(message) if told.get("code") == BAD_VALUE else Refused(message)


class Here:
    """This process, on the cache's directory."""

    def __init__(self, models: Models) -> None:
        self._models = models

    def listing(self) -> dict[str, Any]:
        """What is there."""
        try:
            return self._models.listing()
        except OSError as error:
            raise CacheError(str(error)) from error

    def pools(self) -> Sequence[str]:
        """The names that stand for pools in these settings."""
        from gateway.admin.model_names import names_of

        return names_of(self._models.pools)

    def run(self, verb: str, body: dict[str, Any], on_progress: OnProgress) -> dict[str, Any]:
        """Do it, and tell what was done. Ctrl-C calls it off in good order first."""
        left = threading.Event()
        ends: list[dict[str, Any] | BaseException] = []

        def work() -> None:
            try:
                ends.append(
                    self._models.run(verb, body, on_progress=on_progress, cancelled=left.is_set)
                )
            except BaseException as error:  # noqa: BLE001 - raised again where it is waited for
                ends.append(error)

        thread = threading.Thread(target=work, name=f"model {verb}", daemon=True)
        thread.start()
        try:
            while thread.is_alive():
                thread.join(0.2)
        except KeyboardInterrupt:
            left.set()
            thread.join(_CALL_OFF_S)
            raise
        (end,) = ends
        if isinstance(end, ValueError):
            raise typer.BadParameter(str(end)) from end
        if isinstance(end, OSError):
            raise CacheError(str(end)) from end
        if isinstance(end, BaseException):
            raise end
        return end


def progress_of(told: Mapping[str, Any]) -> Progress:
    """Progress as an admin listener tells it."""
    return Progress(
        phase=str(told.get("phase")),
        bytes_done=int(told.get("bytes_done") or 0),
        bytes_total=told.get("bytes_total"),
        rate_bytes_s=told.get("rate_bytes_s"),
        detail=str(told.get("detail") or ""),
    )


def find_doer(admin: str | None, settings: Settings) -> Doer:
    """Who does it: the one named, the one that runs here, else this process."""
    if admin is not None:
        try:
            return Remote(client.check_address(admin))
        except ValueError as error:
            raise typer.BadParameter(str(error)) from None
    from gateway.compose.run_record import AGENT_NAME, RECORD_NAME, read_record

    for name in (RECORD_NAME, AGENT_NAME):
        running = read_record(settings.state_dir, name)
        if running is not None:
            return Remote(running.admin_url)
    from gateway.compose.cache import cache_dir, open_models

    _check_directory(
        cache_dir(settings), "state_dir" if settings.modelcache.dir is None else "modelcache.dir"
    )
    return Here(open_models(settings, os.environ))


def _check_directory(path: Path, field: str) -> None:
    """A directory, or one that could be made. ``typer.BadParameter`` where a file is in its way."""
    there = next((one for one in (path, *path.parents) if os.path.lexists(one)), None)
    if there is not None and there.exists() and not there.is_dir():
        raise typer.BadParameter(f"{field}: {there} is not a directory")


def name_model(text: str, doer: Doer) -> str:
    """The model as it is asked for: a directory by its whole path, everything else as it is
    written, for whoever is asked knows its pools. ``typer.BadParameter`` where there is none."""
    if not text.strip():
        raise typer.BadParameter("model: it is empty")
    if "://" in text:
        return text
    here = Path(text).expanduser()
    is_path = text.startswith(("/", "./", "../", "~")) or text in (".", "..")
    if here.is_dir() and (is_path or text not in doer.pools()):
        return os.path.abspath(here)
    if is_path:
        raise typer.BadParameter(f"there is no directory {text}")
    return text
