"""What ``tidegate up`` starts: the settings it loads, and what stands in where nothing was said.

Which file, which pool when no file names one, and what the flags of ``up`` mean as settings.
"""

from __future__ import annotations

import os
import ssl
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gateway.datapath.settings import GatewaySettings, PickerSettings
from gateway.settings.errors import Problem
from gateway.settings.load import BUILT_IN, ConfigError, Flag, LoadedSettings, load
from loaders.engines.base import DEFAULT_ENGINE, engine_of
from modelcache.refs import parse_ref

CONFIG_NAME = "tidegate.toml"
DEFAULT_POOL = "smollm2"
DEFAULT_MODEL = "SmolLM2-135M-Instruct"
DEFAULT_MODEL_DIRECTORY = Path(".tidegate/models") / DEFAULT_MODEL
"""Where ``make run`` puts the model that Tidegate brings along."""
DEFAULT_MODEL_LEN_TOKENS = 2048
"""What the default model is served with: its cache then fits beside it on a small machine."""


def find_config(given: Path | None) -> Path | None:
    """The file to read: the one given, else ``tidegate.toml`` of the working directory if it is
    there."""
    if given is not None:
        return given
    here = Path(CONFIG_NAME)
    return here if here.exists() else None


def load_for_up(
    config: Path | None,
    environ: Mapping[str, str],
    overrides: Sequence[str],
    flags: Sequence[Flag] = (),
    *,
    engine: str | None = None,
    model: str | None = None,
) -> LoadedSettings:
    """Settings as ``tidegate up`` uses them; raises ``ConfigError`` as ``load`` does.

    Without a pool from any layer, and where none come from a cluster, there is a built-in
    one: the simulated engine with ``--engine simulated``, else the default model. ``model``
    (``--model``) replaces all pools by one for that model. ``engine`` (``--engine``) applies to
    every pool whose engines are ours to start.
    """
    path = find_config(config)
    if model is not None:
        pool = model_pool(model, engine or DEFAULT_ENGINE)
        return load(path, environ, overrides, flags=[*flags, Flag("pools", [pool], "--model")])
    base = {"pools": [built_in_pool(engine)]}
    loaded = load(path, environ, overrides, base=base, flags=flags)
    if loaded.settings.kubernetes.has_pools:
        loaded = load(path, environ, overrides, flags=flags)
    if engine is None:
        return loaded
    flags = [*flags, *_engine_flags(loaded, engine)]
    if loaded.settings.kubernetes.has_pools:
        return load(path, environ, overrides, flags=flags)
    return load(path, environ, overrides, base=base, flags=flags)


def _engine_flags(loaded: LoadedSettings, engine: str) -> list[Flag]:
    """What makes every process pool one of this engine, arguments for another left behind."""
    flags = []
    for index, pool in enumerate(loaded.settings.pools):
        if pool.backend != "process" or pool.engine == engine:
            continue
        values: dict[str, Any] = {"engine": engine, "engine_args": []}
        if not engine_of(engine).capabilities.loads_weights:  # it computes nothing: no GPU
            values |= {
                "process.gpus": [],
                "process.gpus_per_replica": 0,
                "process.gpu_memory_bytes": None,
            }
        flags += [
            Flag(f"pools.{index}.{name}", value, "--engine") for name, value in values.items()
        ]
    return flags


def built_in_pool(engine: str | None) -> dict[str, Any]:
    """The pool of a Tidegate without configured pools."""
    if engine is not None and not engine_of(engine).capabilities.loads_weights:
        # More than one, so that scaling out can be tried where it costs nothing.
        return {"name": engine, "engine": engine, "model": engine, "max_replicas": 4}
    return {
        "name": DEFAULT_POOL,
        "aliases": [DEFAULT_MODEL],
        "engine": DEFAULT_ENGINE,
        "model": str(DEFAULT_MODEL_DIRECTORY),
        "max_model_len_tokens": DEFAULT_MODEL_LEN_TOKENS,
    }


def model_pool(model: str, engine: str) -> dict[str, Any]:
    """A pool for the model that ``--model`` names: a directory, a URL, a hub's name or a name that
    the engine knows."""
    here = Path(model).expanduser()
    if engine_of(engine).capabilities.loads_weights and here.is_dir():
        model = os.path.abspath(here)
    known_as = _known_as(model)
    name = "-".join(Path(known_as).name.split()) or known_as
    # A name on a hub is what its users will write; no client writes a path.
    is_name = not known_as.startswith((".", "/", "~")) and not any(map(str.isspace, known_as))
    aliases = [known_as] if is_name and "://" not in known_as and known_as != name else []
    return {"name": name, "aliases": aliases, "engine": engine, "model": model}


def _known_as(model: str) -> str:
    """``org/name`` of a hub's model, however it is given; everything else as it is."""
    try:
        ref = parse_ref(model)
    except ValueError:
        return model
    return ref.location if ref.scheme == "hf" else model


def load_installed(
    load_settings: Callable[[], LoadedSettings], *, given_only: bool = False
) -> LoadedSettings:
    """The settings, if every file and directory that they name can be used too.

    A pool without its engine or model would look well at zero, and fail its first request a minute
    later. Raises ``ConfigError`` with all that is wrong. With ``given_only`` the built-in pool is
    left out.
    """
    try:
        loaded = load_settings()
        found: list[Problem] = []
    except ConfigError as error:
        if error.rest is None:
            raise
        loaded, found = error.rest, list(error.problems)
    found += (
        Problem(field, why, loaded.origins[field], str(path))
        for field, path, why in find_bad_tls(loaded.settings.gateway)
    )
    found += _find_missing(loaded, given_only)
    if found:
        raise ConfigError(found)
    return loaded


def _find_missing(loaded: LoadedSettings, given_only: bool) -> Iterator[Problem]:
    """Engines and models of pools that are not there."""
    settings = loaded.settings
    pools = [
        (index, pool)
        for index, pool in enumerate(settings.pools)
        if engine_of(pool.engine).program(settings.loaders) is not None
        and not (given_only and loaded.origins[f"pools.{index}.name"] == BUILT_IN)
    ]
    python = settings.loaders.engine_python.expanduser()
    if pools and not python.exists():
        yield Problem(
            "loaders.engine_python",
            "there is no such program; `make run` sets up the engine, "
            "`--engine simulated` needs none",
            loaded.origins["loaders.engine_python"],
            str(python),
        )
    for index, pool in pools:
        model = pool.model or ""
        if not model.startswith("/") or Path(model).exists():
            continue
        field = f"pools.{index}.model"
        hint = "; `make run` makes it" if Path(model).name == DEFAULT_MODEL else ""
        yield Problem(field, f"there is no such directory{hint}", loaded.origins[field], model)


def find_bad_tls(gateway: GatewaySettings) -> Iterator[tuple[str, Path, str]]:
    """What is wrong with the files of the certificates that the API and the endpoint picker show:
    the setting, the file and why."""
    yield from _find_bad_pair("gateway", gateway)
    yield from _find_bad_pair("gateway.picker", gateway.picker)


def _find_bad_pair(
    section: str, settings: GatewaySettings | PickerSettings
) -> Iterator[tuple[str, Path, str]]:
    whole = True
    for name in ("tls_certificate", "tls_key"):
        path: Path | None = getattr(settings, name)
        if path is None:
            continue
        try:
            path.open("rb").close()
        except OSError as error:
            whole = False
            yield f"{section}.{name}", path, f"cannot be read: {error.strerror or error}"
    if settings.tls_certificate is None or settings.tls_key is None or not whole:
        return
    try:
        # With an empty password: a worker cannot ask for one.
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(settings.tls_certificate, settings.tls_key, password="")
    except (OSError, ValueError) as error:
        why = f"is no certificate in PEM with its key in {settings.tls_key}: {error}"
        yield f"{section}.tls_certificate", settings.tls_certificate, why
