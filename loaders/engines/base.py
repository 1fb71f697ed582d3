"""What a serving engine is, wherever it runs: the ``Engine`` protocol, and the engines by name.

Everything that differs from engine to engine is asked of it (``engine_of(name)``): its command
line, health, models, sleep, start phases, what it can do. No other package compares the name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol, get_args, runtime_checkable

if TYPE_CHECKING:
    from loaders.engines.client import EngineClient
    from loaders.settings import LoaderSettings

EngineName = Literal["vllm", "simulated"]
"""Engines that Tidegate can start."""

ENGINES: tuple[str, ...] = get_args(EngineName)
DEFAULT_ENGINE = "vllm"
OPENAI_COMPATIBLE = "openai_compatible"

START_PHASES = ("importing", "loading", "compiling", "warming")
"""What an engine does before it is ready, in order."""

DEFAULT_HEALTH_PATH = "/health"

MAX_SIGN_CHARACTERS = 300
"""Length of a log message that shows a phase; vLLM's dumps of its configuration, which have all the
words in them, are longer."""

MAX_LISTED_NAMES = 1_000
"""Models of one server whose names are remembered: some bases and all of their adapters."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Where a replica runs: its address, GPUs (indices) and CPU cores (empty: not pinned).
    ``gpu_memory_fraction`` is the share of each GPU's memory that it may take; ``None`` leaves that
    to the engine."""

    host: str
    port: int
    gpus: tuple[int, ...] = ()
    cpus: tuple[int, ...] = ()
    gpu_memory_fraction: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """What a pool asks of its engines.

    ``model`` is a directory or a name on a hub, ``served_model`` what clients call it, ``args`` the
    user's own arguments. ``sleep``: it is put to sleep later.
    """

    model: str
    served_model: str
    args: tuple[str, ...] = ()
    max_model_len_tokens: int | None = None
    sleep: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineCommand:
    """What to run. ``env`` is added to the environment that Tidegate itself was given."""

    argv: tuple[str, ...]
    env: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """What an engine can do.

    ``loads_weights``: it reads a model from disk. ``fork``: it can be forked from a process that
    has imported it. ``compile_cache``: what it compiles can be kept for the next start.
    """

    loads_weights: bool = False
    sleep_levels: frozenset[int] = frozenset()
    fork: bool = False
    compile_cache: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineHealth:
    """What a health check found; ``ready`` is ``None`` when it could not be made."""

    ready: bool | None
    detail: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """One model an engine lists. ``max_model_len_tokens`` is ``None`` where it does not say.
    ``stream_usage``: the engine reports the usage of a stream, at its end, if asked as vLLM is."""

    name: str
    max_model_len_tokens: int | None = None
    stream_usage: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLoad:
    """What an engine says of its load at one moment; ``None`` is what it does not say.

    ``kv_cache_tokens`` is how many tokens its KV cache holds, ``max_running_requests`` how many
    requests it runs at once. Counters grow from the engine's start: the prompt tokens looked up and
    found in its prefix cache, preemptions, prompt and generated tokens. ``sleep_level`` is 0 while
    it is awake.
    """

    running_requests: int | None = None
    waiting_requests: int | None = None
    kv_cache_usage_fraction: float | None = None
    kv_cache_tokens: int | None = None
    max_running_requests: int | None = None
    prefix_cache_queries_tokens: float | None = None
    prefix_cache_hits_tokens: float | None = None
    preemptions: int | None = None
    prompt_tokens: float | None = None
    generation_tokens: float | None = None
    sleep_level: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLimits:
    """What an engine's arguments say that it does at most; ``None`` is what they do not say:
    requests that it runs at once, and tokens of a step, prompt and generated together."""

    running_requests: int | None = None
    batched_tokens: int | None = None


@runtime_checkable
class Engine(Protocol):
    """One kind of serving engine. Stateless; every call says which server it is about. What an
    implementation leaves out is as for a server that Tidegate does not start.
    """

    name: ClassVar[str]
    """Its name in settings."""
    notice: ClassVar[str] = ""
    """What a user has to know of its answers; empty where a model gives them."""
    capabilities: ClassVar[Capabilities] = Capabilities()
    phase_signs: ClassVar[Sequence[tuple[str, re.Pattern[str]]]] = ()
    """What is found in log messages, by the start phase it shows to have begun."""

    consequences: ClassVar[re.Pattern[str]] = re.compile("(?!)")
    """Found in the errors of its log that only say that another of its processes has failed."""

    def check(self, args: Sequence[str]) -> Iterator[str]:
        """What is wrong with a pool's ``engine_args``, each as words that follow the field."""
        if args:
            yield f"is only for engines that Tidegate starts, not for {self.name}"

    def limits(self, args: Sequence[str]) -> EngineLimits:
        """What a pool's ``engine_args`` say that one replica does at most."""
        return EngineLimits()

    def program(self, settings: LoaderSettings) -> Path | None:
        """The interpreter that has to exist before it can start; ``None``: it is Tidegate's own."""
        return None

    def fetches_model(
        self, args: Sequence[str], env: Mapping[str, str], settings: LoaderSettings
    ) -> bool:
        """Whether it has to fetch a model of a hub itself: it has none, or these arguments and
        variables of its pool say what is fetched, from where, or how."""
        return True

    def command(
        self, options: EngineOptions, placement: Placement, settings: LoaderSettings
    ) -> EngineCommand:
        """The command line of one replica. Raises ``ValueError`` where it cannot be started."""
        raise ValueError(f"Tidegate has no command line for engine {self.name!r}")

    def image_arguments(self, options: EngineOptions, port: int) -> Sequence[str] | None:
        """The arguments of the image that the engine's makers publish, for a pod with one replica;
        ``None`` where there is none."""
        return None

    def start_phase(self, messages: Iterable[str], known: str) -> str:
        """The one of ``START_PHASES`` that its log messages show, ``known`` or a later one."""
        for message in messages:
            if len(message) <= MAX_SIGN_CHARACTERS:
                for phase, sign in self.phase_signs:
                    if sign.search(message):
                        known = later_phase(known, phase)
        return known

    async def health(
        self, client: EngineClient, url: str, headers: Mapping[str, str], path: str
    ) -> EngineHealth:
        """Whether the server at ``url`` answers as healthy. Never raises for one that does not."""
        ...

    async def list_models(
        self, client: EngineClient, url: str, headers: Mapping[str, str]
    ) -> tuple[ServedModel, ...] | None:
        """The models a server lists; ``None`` when it does not say in a way that can be read."""
        ...

    async def load(
        self, client: EngineClient, url: str, headers: Mapping[str, str]
    ) -> EngineLoad | None:
        """What a server's own metrics say of its load; ``None`` where they cannot be had whole, or
        are those of no engine that is known. Never raises for a server that is gone."""
        ...

    async def sleep(self, client: EngineClient, url: str, level: int, *, timeout_s: float) -> None:
        """Put an idle server to sleep: 1 keeps its weights in host memory, 2 drops them.

        Returns when it sleeps. Raises ``EngineUnsupported`` or ``EngineError``.
        """
        ...

    async def is_sleeping(self, client: EngineClient, url: str) -> bool | None:
        """Whether a server sleeps; ``None`` where it does not say. Never raises for one that is
        gone."""
        return None

    async def wake(self, client: EngineClient, url: str, level: int, *, timeout_s: float) -> None:
        """Wake a server that sleeps at ``level``; returns when it can answer, with its own weights.

        Raises as ``sleep`` does; ``timeout_s`` bounds each call to the server.
        """
        ...


_IMPLEMENTATIONS = {
    "vllm": ("loaders.engines.vllm.engine", "VllmEngine"),
    "simulated": ("loaders.engines.simulated.engine", "SimulatedEngine"),
    OPENAI_COMPATIBLE: ("loaders.engines.openai_compatible", "OpenAICompatibleEngine"),
}


@cache
def engine_of(name: str | None) -> Engine:
    """The engine with this name in settings; any OpenAI-compatible server where a pool names none.

    Raises ``ValueError`` for a name that no engine has.
    """
    try:
        module, implementation = _IMPLEMENTATIONS[name or OPENAI_COMPATIBLE]
    except KeyError:
        raise ValueError(f"there is no engine {name!r} (known: {', '.join(ENGINES)})") from None
    engine: Engine = getattr(import_module(module), implementation)()
    return engine


def later_phase(one: str, other: str) -> str:
    """The later of two start phases; an unknown word is before all."""
    order = START_PHASES
    return max(one, other, key=lambda word: order.index(word) if word in order else -1)


def choose_model(
    models: tuple[ServedModel, ...] | None, *preferred: str | None
) -> ServedModel | None:
    """The first preferred name that is listed, else the first model of the list."""
    if not models:
        return None
    listed = {model.name: model for model in models}
    for name in preferred:
        if name in listed:
            return listed[name]
    return models[0]


def list_names(models: tuple[ServedModel, ...] | None) -> tuple[str, ...]:
    """The names that are listed, the first ``MAX_LISTED_NAMES`` of them."""
    return tuple(model.name for model in (models or ())[:MAX_LISTED_NAMES])
