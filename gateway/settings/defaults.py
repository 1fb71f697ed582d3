"""What ``tidegate up`` starts: the settings it loads, and what stands in where nothing was said.

Which file, which pool when no file names one, and what the flags of ``up`` mean as settings.
"""

from __future__ import annotations

import os
import ssl
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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


@dataclass(frozen=True, slots=True, kw_only=True)
class UpFlags:
    """The flags of ``tidegate up`` that stand for settings; ``None`` where not given."""

    engine: str | None = None
    model: str | None = None
    host: str | None = None
    port: int | None = None
    admin_port: int | None = None
    workers: int | None = None


def find_config(given: Path | None, directory: Path = Path()) -> Path | None:
    """The file to read: the one given, else ``tidegate.toml`` of the directory if it is there."""
    if given is not None:
        return given
    here = directory / CONFIG_NAME
    return here if here.exists() else None


def load_for_up(
    config: Path | None, environ: Mapping[str, str], overrides: Sequence[str], up: UpFlags
) -> LoadedSettings:
    """Settings as ``tidegate up`` uses them; raises ``ConfigError`` as ``load`` does.

    Without a pool from any layer there is a built-in one: the simulated engine with ``--engine
    simulated``, else the default model. ``--model`` replaces all pools by one for that model.
    ``--engine`` applies to every pool whose engines are ours to start.
    """
    path = find_config(config)
    flags = _flags(up)
    if up.model is not None:
        model = model_pool(up.model, up.engine or DEFAULT_ENGINE)
        return load(path, environ, overrides, flags=[*flags, Flag("pools", [model], "--model")])
    base = {"pools": [built_in_pool(up.engine)]}
    loaded = load(path, environ, overrides, base=base, flags=flags)
    if up.engine is None:
        return loaded
    flags += _engine_flags(loaded, up.engine)
    return load(path, environ, overrides, base=base, flags=flags)


def load_for_agent(
    config: Path | None, environ: Mapping[str, str], overrides: Sequence[str], flags: Sequence[Flag]
) -> LoadedSettings:
    """Settings as ``tidegate agent`` uses them; raises ``ConfigError``. Pools are of no account."""
    base = {"pools": [built_in_pool(None)]}
    return load(find_config(config), environ, overrides, base=base, flags=list(flags))


def _flags(up: UpFlags) -> list[Flag]:
    named = {
        "gateway.host": ("--host", up.host),
        "gateway.port": ("--port", up.port),
        "gateway.admin_port": ("--admin-port", up.admin_port),
        "gateway.workers": ("--workers", up.workers),
    }
    return [Flag(field, value, flag) for field, (flag, value) in named.items() if value is not None]


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
        return {"name": engine, "engine": engine, "model": engine}
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


def check_installed(loaded: LoadedSettings) -> None:
    """Raise ``ConfigError`` where a file or directory that the settings name cannot be used."""
    found = find_missing(loaded)
    if found:
        raise ConfigError(found)


def find_missing(loaded: LoadedSettings, *, given_only: bool = False) -> list[Problem]:
    """What the settings name and is not there, or not what it should be.

    A pool without its engine or model would look well at zero, and fail its first request a minute
    later. With ``given_only`` the built-in pool is left out.
    """
    found = list(_find_tls(loaded))
    settings = loaded.settings
    pools = [
        (index, pool)
        for index, pool in enumerate(settings.pools)
        if engine_of(pool.engine).program(settings.loaders) is not None
        and not (given_only and loaded.origins[f"pools.{index}.name"] == BUILT_IN)
    ]
    python = settings.loaders.engine_python.expanduser()
    if pools and not python.exists():
        found.append(
            Problem(
                "loaders.engine_python",
                "there is no such program; `make run` sets up the engine, "
                "`--engine simulated` needs none",
                loaded.origins["loaders.engine_python"],
                str(python),
            )
        )
    for index, pool in pools:
        model = pool.model or ""
        if not model.startswith("/") or Path(model).exists():
            continue
        field = f"pools.{index}.model"
        hint = "; `make run` makes it" if Path(model).name == DEFAULT_MODEL else ""
        found.append(
            Problem(field, f"there is no such directory{hint}", loaded.origins[field], model)
        )
    return found


def _find_tls(loaded: LoadedSettings) -> Iterator[Problem]:
    """What is wrong with the files of the API's certificate."""
    gateway = loaded.settings.gateway
    whole = True
    for name in ("tls_certificate", "tls_key"):
        path: Path | None = getattr(gateway, name)
        field = f"gateway.{name}"
        try:
            if path is not None:
                path.open("rb").close()
        except OSError as error:
            whole = False
            why = f"cannot be read: {error.strerror or error}"
            yield Problem(field, why, loaded.origins[field], str(path))
    if gateway.tls_certificate is None or gateway.tls_key is None or not whole:
        return
    try:
        # With an empty password: a worker cannot ask for one.
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(gateway.tls_certificate, gateway.tls_key, password="")
    except (OSError, ValueError) as error:
        field = "gateway.tls_certificate"
        why = f"is no certificate in PEM with its key in {gateway.tls_key}: {error}"
        yield Problem(field, why, loaded.origins[field], str(gateway.tls_certificate))
