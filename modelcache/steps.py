"""What a preparation step is, and when two are the same: values and digests, nothing done."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from modelcache.types import CacheError, FileEntry

Kind = Literal["gguf_to_safetensors", "cast", "tp_shard", "command"]

STEP_FORMATS: Mapping[Kind, int] = {
    "gguf_to_safetensors": 1,
    "cast": 1,
    "tp_shard": 1,
    "command": 1,
}
"""Raised when what a kind of step makes changes: what an older Tidegate made is then not used."""

TOOLS: Mapping[Kind, tuple[str, ...]] = {
    "gguf_to_safetensors": ("gguf", "torch", "transformers"),
    "cast": ("torch",),
    "tp_shard": (),
    "command": (),
}
"""Packages of the engine environment whose versions are part of what a step is."""

INPUT = "{input}"
OUTPUT = "{output}"
PYTHON = "{python}"
"""What a command's arguments may contain: the model's folder, an empty folder for what is made,
the engine's interpreter."""


class StepFailed(CacheError):
    """A step ended without its result; the message has its last lines and where its log is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One step from a model to another; ``PreparationStep`` of the settings says what is what."""

    kind: Kind
    file: str | None = None
    dtype: str | None = None
    world_size: int | None = None
    argv: tuple[str, ...] = ()
    env: tuple[tuple[str, str], ...] = ()
    version: str = ""
    resumable: bool = False
    timeout_s: float = 7_200.0

    @property
    def resumes(self) -> bool:
        """Whether it goes on with what an interrupted run of it left."""
        return self.resumable if self.kind == "command" else self.kind != "gguf_to_safetensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRun:
    """How one step went. ``cached``: its result was there already, so it was not run."""

    kind: Kind
    key: str
    cached: bool
    elapsed_s: float
    log: Path | None


def input_digest(files: Iterable[FileEntry]) -> str:
    """What a model is, for whatever is made of it: its files' names and digests."""
    return _digest(sorted((file.path, file.size_bytes, file.digest) for file in files))


def step_key(
    before: str, step: Step, *, tools: Mapping[str, str], programs: Mapping[str, str]
) -> str:
    """The key of a step's result: of what it is made, how, and with which tools.

    ``before`` is the input's digest or the key of the step before; ``tools`` the versions of the
    kind's ``TOOLS``; ``programs`` digests of the files that a command runs. How long it may take
    and whether it can resume change nothing about its result.
    """
    spec = asdict(step)
    for passing in ("timeout_s", "resumable"):
        del spec[passing]
    used = {name: tools[name] for name in TOOLS[step.kind]}
    return _digest([before, STEP_FORMATS[step.kind], spec, used, dict(programs)])


def _digest(value: object) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
