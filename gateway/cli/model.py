"""``tidegate model``: what the model cache has, and what is done with it by hand.

Where a Tidegate or a cache agent runs with this state directory it is asked, for it knows what is
in use and keeps pages; where none does, the verbs work on the cache's directory themselves.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gateway.cli import tables
from gateway.cli.base import Admin, AsJson, Config, PoolName, Sets, as_text, load, screen
from gateway.cli.client import model_verbs, name_model
from gateway.terminal import complain, duration, out, size
from modelcache.types import CacheError, NotFound, Progress

if TYPE_CHECKING:
    from gateway.admin.schema import PreloadAnswer
    from modelcache.cache import ModelCache
    from modelcache.store.leases import Lease

HOLD_ATTEMPTS = 3
PLAIN_S = 10.0
"""Seconds between two lines where there is no terminal."""

model_app = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown")

ModelName = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A URL (hf://, s3://, gs://, oss://, https://, file://), org/name of a hub, a "
        "directory, the name of a pool that is served, or prepared://KEY for a result of "
        "preparation steps.",
    ),
]
Revision = Annotated[
    str | None,
    typer.Option(
        "--revision",
        "-r",
        metavar="NAME",
        help="Branch, tag or commit; for a revision that is here, its first characters (6 or "
        "more). Default: the newest.",
    ),
]


def _do(
    context: typer.Context,
    verb: str,
    model: str,
    revision: str | None,
    as_json: bool,
    where: tuple[str | None, Path | None, list[str] | None],
    **options: Any,
) -> Any:
    """One verb: done, shown, and its answer."""
    from gateway.admin.operations import VERBS

    admin, config, sets = where
    verbs = model_verbs(admin, load(config, sets).settings, context.obj.open_models)
    given = {name: value for name, value in options.items() if value is not None}
    name = name_model(model, lambda: verbs.listing().pools)
    request = VERBS[verb].request
    assert request is not None
    asked: Any = request.model_validate({"model": name, "revision": revision, **given})
    with ProgressBar(f"{verb} {model}") as bar:
        answer = verbs.run(verb, asked, bar.show)
    out(as_text(answer) if as_json else tables.model_done(answer))
    return answer


@model_app.command("ls")
def model_ls(
    context: typer.Context,
    as_json: AsJson = False,
    admin: Admin = None,
    config: Config = None,
    sets: Sets = None,
) -> int:
    """Show the models in this node's cache, and what they take.

    TIER is how warm a model is here, UNIQUE what evicting it would free (files that no other
    revision has), PAGE CACHE how much of it is cached in memory. A `?` is unknown. What preparation
    steps have made of a model stands below it.

    **Examples:** `tidegate model ls`, `tidegate model ls --json | jq '.models[].url'`
    """
    found = model_verbs(admin, load(config, sets).settings, context.obj.open_models).listing()
    text = tables.models(found, screen(), context.obj.now_s())
    out(as_text(found) if as_json else text)
    return 0


@model_app.command("preload")
def model_preload(
    context: typer.Context,
    model: ModelName,
    revision: Revision = None,
    expected_in_s: Annotated[
        float | None,
        typer.Option(
            "--expected-in-s",
            metavar="SECONDS",
            min=0,
            help="Time until its expected use: a model used later is evicted sooner.",
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
    expected = None if expected_in_s is None else context.obj.now_s() + expected_in_s
    where = (admin, config, sets)
    _do(context, "preload", model, revision, as_json, where, expected_use_at_s=expected)
    return 0


@model_app.command("hold")
def model_hold(
    context: typer.Context,
    model: ModelName,
    revision: Revision = None,
    link: Annotated[
        Path | None,
        typer.Option(
            "--link",
            metavar="PATH",
            help="Symbolic link to make to its directory, once all of it is there.",
        ),
    ] = None,
    as_json: AsJson = False,
    admin: Admin = None,
    config: Config = None,
    sets: Sets = None,
) -> int:
    """Bring a model to this node's disk and keep it there until this command is ended.

    For an engine that Tidegate does not start: it opens the directory that `--link` names. Needs
    the cache's directory itself. SIGTERM and Ctrl-C end it; the link stays.

    **Example:** `tidegate model hold Qwen/Qwen3-8B --link /run/engine/model`
    """
    import signal

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the first process of a container
    cache = context.obj.open_models(load(config, sets).settings).cache
    with contextlib.ExitStack() as stack:
        for attempt in range(HOLD_ATTEMPTS):
            answer = _do(context, "preload", model, revision, as_json, (admin, config, sets))
            try:
                stack.enter_context(hold(cache, answer, f"held by process {os.getpid()}"))
                break
            except NotFound:  # evicted in the moment between
                if attempt == HOLD_ATTEMPTS - 1:
                    raise
        if link is not None:
            make_link(link, Path(answer.prepared or answer.path))
        ending = {signal.SIGTERM, signal.SIGINT}
        signal.pthread_sigmask(signal.SIG_BLOCK, ending)
        signal.sigwait(ending)
    return 0


def hold(cache: ModelCache, answer: PreloadAnswer, holder: str) -> Lease:
    """A lease on what engines open of a model that was preloaded. Raises ``NotFound``."""
    directory = Path(answer.prepared or answer.path)
    names = [(answer.model, answer.revision)]
    if answer.prepared is not None:
        names = [(one.url, one.revision) for one in cache.ls() if one.made is not None]
    for url, revision in names:
        found = cache.find(url, revision)
        if found is not None and found.path == directory:
            return cache.lease(found, holder)
    raise NotFound(f"{answer.model} is not in the cache at {cache.dir}")


def make_link(path: Path, directory: Path) -> None:
    """Have a symbolic link point at a directory, in place of one that is there. Raises
    ``CacheError``."""
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        fresh.symlink_to(directory)
        try:
            os.replace(fresh, path)
        except OSError:
            fresh.unlink()
            raise
    except OSError as error:
        raise CacheError(f"--link {path}: {error.strerror}") from None


@model_app.command("prewarm")
def model_prewarm(
    context: typer.Context,
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
    _do(context, "prewarm", model, revision, as_json, where, rank=rank, world_size=world_size)
    return 0


@model_app.command("pin")
def model_pin(
    context: typer.Context,
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
    _do(context, "pin", model, revision, as_json, (admin, config, sets))
    return 0


@model_app.command("unpin")
def model_unpin(
    context: typer.Context,
    model: ModelName,
    revision: Revision = None,
    as_json: AsJson = False,
    admin: Admin = None,
    config: Config = None,
    sets: Sets = None,
) -> int:
    """Let a pinned model be evicted again, all its revisions unless one is named.

    **Example:** `tidegate model unpin hf://Qwen/Qwen3-8B`
    """
    _do(context, "unpin", model, revision, as_json, (admin, config, sets))
    return 0


@model_app.command("evict")
def model_evict(
    context: typer.Context,
    model: ModelName,
    revision: Revision = None,
    force: Annotated[
        bool, typer.Option("--force", help="Also where it is pinned; never where it is in use.")
    ] = False,
    prepared: Annotated[
        bool,
        typer.Option("--prepared", help="Only the results of its preparation steps, not it."),
    ] = False,
    everything: Annotated[
        bool, typer.Option("--all", help="All its revisions, not the newest alone.")
    ] = False,
    as_json: AsJson = False,
    admin: Admin = None,
    config: Config = None,
    sets: Sets = None,
) -> int:
    """Take a revision of a model from this node's disk, with what preparation steps made of it.

    It is the newest that is here unless `--revision` names one or `--all` takes them all; the
    answer says which went and which are left. Files that another revision has too stay. Where some
    of it is in use nothing goes.

    **Examples:** `tidegate model evict hf://Qwen/Qwen3-8B`,
    `tidegate model evict Qwen/Qwen3-8B --revision main --force`,
    `tidegate model evict Qwen/Qwen3-8B --all`,
    `tidegate model evict my-pool --prepared`
    """
    if everything and revision is not None:
        raise typer.BadParameter("--all and --revision do not go together")
    where = (admin, config, sets)
    options = {"force": force, "prepared": prepared, "all": everything}
    _do(context, "evict", model, revision, as_json, where, **options)
    return 0


@model_app.command("verify")
def model_verify(
    context: typer.Context,
    model: ModelName,
    revision: Revision = None,
    repair: Annotated[bool, typer.Option("--repair", help="Fetch damaged pieces again.")] = False,
    as_json: AsJson = False,
    admin: Admin = None,
    config: Config = None,
    sets: Sets = None,
) -> int:
    """Read every byte of a model again and compare it with its digests.

    Exit code 1 when something is damaged and was not repaired.

    **Examples:** `tidegate model verify Qwen/Qwen3-8B`,
    `tidegate model verify Qwen/Qwen3-8B --repair --json`
    """
    answer = _do(context, "verify", model, revision, as_json, (admin, config, sets), repair=repair)
    return 1 if answer.damage and not answer.repaired else 0


@model_app.command("replicate")
def model_replicate(
    context: typer.Context,
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
    """Have other sites' cache agents preload a model, each from the source that is nearest to it.

    Exit code 1 when a site could not.

    **Examples:** `tidegate model replicate oss://models/qwen3-8b`,
    `tidegate model replicate oss://models/qwen3-8b --to eu --to us`
    """
    answer = _do(context, "replicate", model, revision, as_json, (admin, config, sets), sites=to)
    return 1 if any(one.error or not one.done for one in answer.sites.values()) else 0


@model_app.command("bundle")
def model_bundle(
    pool: PoolName,
    into: Annotated[
        Path, typer.Option("--out", metavar="FOLDER", help="Folder to write the file to.")
    ] = Path("tidegate-bundles"),
    as_json: AsJson = False,
    config: Config = None,
    sets: Sets = None,
) -> int:
    """Pack what a pool's engines have compiled and measured here into one file.

    Put the folder beside the model's weights in its source, and the lines that are printed into the
    settings: nodes of the same kind (engine, libraries, GPU, driver, settings) that fetch the model
    then start without compiling. Compiled code runs, so a file that the settings do not give the
    SHA-256 of is neither fetched nor used.

    **Examples:** `tidegate model bundle qwen3-8b`,
    `tidegate model bundle qwen3-8b --out ~/models/Qwen3-8B/tidegate-bundles`
    """
    from gateway.compose.cache import locate
    from gateway.compose.engines import make_compile_cache, plain_command
    from loaders.engines.base import engine_of
    from loaders.engines.vllm.compile_cache import BadBundle, sha256_of

    settings = load(config, sets).settings
    given = next((one for one in settings.pools if pool in (one.name, *one.aliases)), None)
    if given is None:
        names = ", ".join(one.name for one in settings.pools)
        raise typer.BadParameter(f"there is no pool {pool!r} (known: {names})")
    compiled = make_compile_cache(settings)
    keeps = engine_of(given.engine).capabilities.compile_cache
    if compiled is None or not keeps:
        raise typer.BadParameter(
            f"{given.name}: its engine compiles nothing, or loaders.keep_compiled is off"
        )
    with ProgressBar(given.model or given.name) as bar:
        here = locate(given, settings, os.environ, bar.show)
    placed = given.model_copy(update={"model": here})
    try:
        command = plain_command(placed, settings.loaders)
        file = compiled.ship(command, here, into, given.env)
    except (BadBundle, OSError, ValueError) as error:
        raise CacheError(str(error)) from None
    size_bytes, sha256 = file.stat().st_size, sha256_of(file)
    told = {"pool": given.name, "file": str(file), "size_bytes": size_bytes, "sha256": sha256}
    lines = (
        f"{file}  ({size(size_bytes)})\n\nFor the settings of nodes that fetch the model:\n\n"
        f'[modelcache.bundles."{given.model or given.name}"]\n{file.stem} = "{sha256}"\n'
    )
    out(as_text(told) if as_json else lines)
    return 0


# ── Progress ──────────────────────────────────────────────────────────────────────────────────────


class ProgressBar:
    """Shows on standard error how far one piece of work is, while the ``with`` block lasts: a bar
    on a terminal, of which nothing stays, a line now and then elsewhere.

    ``show`` may be called as often as one likes, from any thread.
    """

    def __init__(self, what: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._what = what
        self._clock = clock
        self._live = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
        self._bar: Any = None
        self._task: Any = None
        self._said_s = clock()

    def __enter__(self) -> ProgressBar:
        if self._live:
            self._begin()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def _begin(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as Bars

        self._bar = Bars(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[figures]}"),
            console=Console(stderr=True),
            transient=True,
            expand=True,
        )
        self._bar.start()
        self._task = self._bar.add_task(self._what, total=None, figures="")

    def show(self, progress: Progress) -> None:
        """Where it is now."""
        self.show_part(progress.phase, progress.bytes_done, progress.bytes_total, figures(progress))

    def show_part(self, phase: str, done: int, total: int | None, text: str) -> None:
        """The same in other units than bytes; ``text`` is what people read of it."""
        if self._bar is not None:
            self._bar.update(
                self._task,
                description=f"{self._what}: {phase}",
                completed=done,
                total=total,
                figures=text,
            )
        elif self._clock() - self._said_s >= PLAIN_S:
            self._said_s = self._clock()
            complain(" ".join(f"{self._what}: {phase} {text}".split()))


def figures(progress: Progress) -> str:
    """``3.1 of 14.9 GB, 412 MB/s, 29 s left``, as far as it is known."""
    parts = []
    if progress.bytes_total:
        done, total = progress.bytes_done, progress.bytes_total
        parts.append(f"{size(done)} of {size(total)}")
    elif progress.bytes_done:
        parts.append(size(progress.bytes_done))
    if progress.rate_bytes_s:
        parts.append(f"{size(progress.rate_bytes_s)}/s")
        if progress.bytes_total:
            left_s = (progress.bytes_total - progress.bytes_done) / progress.rate_bytes_s
            parts.append(f"{duration(left_s)} left")
    if progress.detail:
        parts.append(progress.detail)
    return ", ".join(parts)
