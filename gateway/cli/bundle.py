"""``tidegate model bundle``: what an engine has compiled, packed to be shipped with its model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from gateway.cli.base import AsJson, Config, PoolName, Sets, as_text, load
from gateway.cli.progress import ProgressBar
from gateway.terminal import out, size
from modelcache.types import CacheError


def bundle(
    pool: PoolName,
    into: Annotated[
        Path, typer.Option("--out", metavar="FOLDER", help="Folder to write the file to.")
    ] = Path("tidegate-bundles"),
    as_json: AsJson = False,
    config: Config = None,
    sets: Sets = None,
) -> int:
    """Pack what a pool's engines have compiled and measured here into one file.

    Put the folder beside the model's weights in its store: nodes of the same kind (engine,
    libraries, GPU, driver, settings) that fetch the model then start without compiling.

    **Examples:** `tidegate model bundle qwen3-8b`,
    `tidegate model bundle qwen3-8b --out ~/models/Qwen3-8B/tidegate-bundles`
    """
    from gateway.compose.engines import make_compile_cache, plain_command
    from gateway.compose.tiers import locate
    from loaders.engines.base import engine_of
    from loaders.engines.vllm.compile_cache import BadBundle

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
    told = {"pool": given.name, "file": str(file), "size_bytes": file.stat().st_size}
    out(as_text(told) if as_json else f"{file}  ({size(file.stat().st_size)})\n")
    return 0
