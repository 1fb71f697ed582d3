"""``tidegate model``: what the model cache has, and what is done with it by hand.

Where a Tidegate or a cache agent runs with this state directory it is asked, for it knows what is
in use and keeps pages; where none does, the verbs work on the cache's directory themselves.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import typer

from gateway import cli_client, cli_render_models
from gateway.cli_base import Admin, AsJson, Config, Sets, as_text, load, out, screen
from gateway.cli_progress import Bar
from modelcache.types import PREPARED, Progress

if TYPE_CHECKING:
    from gateway.models import Models
    from gateway.settings import Settings

model_app = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown")

ModelName = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A URL (hf://, s3://, gs://, oss://, https://, file://), org/name of a hub, a "
        "directory, a pool's name, or prepared://KEY for what steps have made.",
    ),
]
Revision = Annotated[
    str | None,
    typer.Option(
        "--revision", "-r", metavar="NAME", help="Branch, tag or commit; else the newest."
    ),
]

_CALL_OFF_S = 30.0


class Doer(Protocol):
    """Whoever does it: this process, or one that runs already."""

    def listing(self) -> dict[str, Any]:
        """What is there."""
        ...

    def run(
        self, verb: str, body: dict[str, Any], on_progress: Callable[[Progress], None]
    ) -> dict[str, Any]:
        """Do it, and tell what was done."""
        ...


class Remote:
    """The admin listener of one that runs."""

    def __init__(self, base: str) -> None:
        self._base = base

    def listing(self) -> dict[str, Any]:
        """What is there."""
        return cli_client.ask(self._base, "/models")

    def run(
        self, verb: str, body: dict[str, Any], on_progress: Callable[[Progress], None]
    ) -> dict[str, Any]:
        """Do it, and tell what was done."""
        from gateway.models import SLOW_VERBS

        if verb not in SLOW_VERBS:
            return cli_client.ask(self._base, f"/models/{verb}", body)
        return cli_client.follow(
            self._base, f"/models/{verb}", body, lambda told: on_progress(progress_of(told))
        )


class Here:
    """This process, on the cache's directory."""

    def __init__(self, models: Models) -> None:
        self._models = models

    def listing(self) -> dict[str, Any]:
        """What is there."""
        return self._models.listing()

    def run(
        self, verb: str, body: dict[str, Any], on_progress: Callable[[Progress], None]
    ) -> dict[str, Any]:
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
            return Remote(cli_client.check_address(admin))
        except ValueError as error:
            raise typer.BadParameter(str(error)) from None
    from gateway.running import AGENT_NAME, RECORD_NAME, read_record

    for name in (RECORD_NAME, AGENT_NAME):
        running = read_record(settings.state_dir, name)
        if running is not None:
            return Remote(running.admin_url)
    from gateway.cache import open_models

    return Here(open_models(settings, os.environ))


def name_model(text: str, settings: Settings) -> str:
    """The URL or path that is meant: a pool's name stands for its model, a path is absolute.

    ``typer.BadParameter`` for what is none of these.
    """
    from modelcache.refs import PATH, parse_ref

    if text.startswith(f"{PREPARED}://"):
        return text
    for pool in settings.pools:
        if text == pool.name or text in pool.aliases:
            text = pool.model or text
            break
    here = Path(text).expanduser()
    if "://" not in text and here.is_dir():
        return os.path.abspath(here)
    try:
        ref = parse_ref(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    if ref.scheme == PATH:
        raise typer.BadParameter(f"there is no directory {text}")
    return ref.url if ref.revision is None else text


def _do(
    verb: str,
    model: str,
    revision: str | None,
    as_json: bool,
    where: tuple[str | None, Path | None, list[str] | None],
    **options: Any,
) -> dict[str, Any]:
    """One verb: done, shown, and its answer."""
    admin, config, sets = where
    settings = load(config, sets).settings
    url = name_model(model, settings)
    given = {name: value for name, value in options.items() if value not in (None, False, [])}
    body = {"model": url, "revision": revision, **given}
    with Bar(f"{verb} {model}") as bar:
        told = find_doer(admin, settings).run(verb, body, bar.show)
    out(as_text(told) if as_json else cli_render_models.done(told))
    return told


@model_app.command("ls")
def model_ls(
    as_json: AsJson = False, admin: Admin = None, config: Config = None, sets: Sets = None
) -> int:
    """Show the models in this node's cache, and what they take.

    TIER is how warm a model is here, ALONE what evicting it would free (files that no other
    revision has), IN PAGES how much of it is in the page cache. A `?` is unknown. What preparation
    steps have made of a model stands below it.

    **Examples:** `tidegate model ls`, `tidegate model ls --json | jq '.models[].url'`
    """
    settings = load(config, sets).settings
    found = find_doer(admin, settings).listing()
    text = cli_render_models.listing(found, screen(), time.time())
    out(as_text(found) if as_json else text)
    return 0


@model_app.command("preload")
def model_preload(
    model: ModelName,
    revision: Revision = None,
    expected_in_s: Annotated[
        float | None,
        typer.Option(
            "--expected-in-s",
            metavar="SECONDS",
            min=0,
            help="When it will be wanted: what is wanted later is evicted sooner.",
        ),
    ] = None,
    as_json: AsJson = False,
    admin: Admin = None,
    config: Config = None,
    sets: Sets = None,
) -> int:
    """Bring a model to this node's disk.

    What was fetched before an interruption is not fetched again. Where the disk or the quota is
    too small, that is said before the first byte.

    **Examples:** `tidegate model preload Qwen/Qwen3-8B`,
    `tidegate model preload oss://models/qwen3-8b --json`
    """
    expected = None if expected_in_s is None else time.time() + expected_in_s
    where = (admin, config, sets)
    _do("preload", model, revision, as_json, where, expected_use_at_s=expected)
    return 0


@model_app.command("prewarm")
def model_prewarm(
    model: ModelName,
    revision: Revision = None,
    rank: Annotated[
        int | None,
        typer.Option(min=0, help="Only what this tensor-parallel rank needs; with --world-size."),
    ] = None,
    world_size: Annotated[
        int | None, typer.Option("--world-size", min=1, help="Tensor-parallel ranks in all.")
    ] = None,
    as_json: AsJson = False,
    admin: Admin = None,
    config: Config = None,
    sets: Sets = None,
) -> int:
    """Bring a model's weights into the page cache; to the disk first, if need be.

    An engine that starts next reads them from memory. The kernel may drop them again: a running
    Tidegate or agent keeps them, within `modelcache.page_budget_bytes`.

    **Examples:** `tidegate model prewarm smollm2`, `tidegate model prewarm ~/models/Qwen3-8B`
    """
    if (rank is None) != (world_size is None):
        raise typer.BadParameter("--rank and --world-size belong together")
    where = (admin, config, sets)
    _do("prewarm", model, revision, as_json, where, rank=rank, world_size=world_size)
    return 0


@model_app.command("pin")
def model_pin(
    model: ModelName,
    revision: Revision = None,
    as_json: AsJson = False,
    admin: Admin = None,
    config: Config = None,
    sets: Sets = None,
) -> int:
    """Keep a model on the disk, whatever else needs the space.

    **Example:** `tidegate model pin hf://Qwen/Qwen3-8B`
    """
    _do("pin", model, revision, as_json, (admin, config, sets))
    return 0


@model_app.command("unpin")
def model_unpin(
    model: ModelName,
    revision: Revision = None,
    as_json: AsJson = False,
    admin: Admin = None,
    config: Config = None,
    sets: Sets = None,
) -> int:
    """Let a pinned model be evicted again.

    **Example:** `tidegate model unpin hf://Qwen/Qwen3-8B`
    """
    _do("unpin", model, revision, as_json, (admin, config, sets))
    return 0


@model_app.command("evict")
def model_evict(
    model: ModelName,
    revision: Revision = None,
    force: Annotated[
        bool, typer.Option("--force", help="Also where it is pinned; never where it is in use.")
    ] = False,
    prepared: Annotated[
        bool,
        typer.Option("--prepared", help="Only what preparation steps have made of it, not itself."),
    ] = False,
    as_json: AsJson = False,
    admin: Admin = None,
    config: Config = None,
    sets: Sets = None,
) -> int:
    """Take a model from this node's disk, with what preparation steps have made of it.

    Files that another revision has too stay. Where some of it is in use nothing goes.

    **Examples:** `tidegate model evict hf://Qwen/Qwen3-8B`,
    `tidegate model evict Qwen/Qwen3-8B --revision main --force`,
    `tidegate model evict my-pool --prepared`
    """
    where = (admin, config, sets)
    _do("evict", model, revision, as_json, where, force=force, prepared=prepared)
    return 0


@model_app.command("verify")
def model_verify(
    model: ModelName,
    revision: Revision = None,
    repair: Annotated[
        bool, typer.Option("--repair", help="Fetch again what is not as it was.")
    ] = False,
    as_json: AsJson = False,
    admin: Admin = None,
    config: Config = None,
    sets: Sets = None,
) -> int:
    """Read every byte of a model again and compare it with its digests.

    Exit code 1 when something is damaged and was not mended.

    **Examples:** `tidegate model verify Qwen/Qwen3-8B`,
    `tidegate model verify Qwen/Qwen3-8B --repair --json`
    """
    told = _do("verify", model, revision, as_json, (admin, config, sets), repair=repair)
    return 1 if told["damage"] and not told["repaired"] else 0


@model_app.command("replicate")
def model_replicate(
    model: ModelName,
    revision: Revision = None,
    to: Annotated[
        list[str] | None,
        typer.Option(
            "--to", metavar="SITE", help="A site of modelcache.sites; else all. May be repeated."
        ),
    ] = None,
    as_json: AsJson = False,
    admin: Admin = None,
    config: Config = None,
    sets: Sets = None,
) -> int:
    """Have other sites' cache agents preload a model, each from the store that is nearest to it.

    Exit code 1 when a site could not.

    **Examples:** `tidegate model replicate oss://models/qwen3-8b`,
    `tidegate model replicate oss://models/qwen3-8b --to eu --to us`
    """
    told = _do("replicate", model, revision, as_json, (admin, config, sets), sites=to)
    outcomes = (told.get("sites") or {}).values()
    return 1 if any(one.get("error") or one.get("done") is False for one in outcomes) else 0
