"""The loaders' settings: where engines are installed, and how they are started."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class LoaderSettings(BaseModel):
    """How engines are started."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    engine_python: Path = Path(".venv-engine/bin/python")
    """Python interpreter of the environment vLLM is installed in. Engines live apart from the
    gateway so that their pins never meet ours; ``make run`` makes this one. The default is relative
    to the working directory, a path in a file to that file."""

    engine_log_level: Literal["debug", "info", "warning", "error"] = "info"
    """How much an engine writes to its own log file. ``info`` shows the phases of a start, which
    is what is asked for when one fails."""

    cpu_kv_cache_gib: int = Field(default=1, ge=1, le=65_536)
    """GiB of memory that vLLM's CPU build takes for its KV cache, per replica. 1 holds some 46,000
    tokens of the default model; vLLM's own default is a share of all memory, which leaves nothing
    for a second replica. No effect on GPUs."""

    cpu_bind: Literal["auto", "nobind"] = "auto"
    """How vLLM's CPU build places its threads where the pool pins no cores. ``auto`` is vLLM's own
    choice, one thread on each physical core but one; two replicas then choose the same cores, so
    give such a pool ``process.cpus_per_replica`` or use ``nobind``. No effect on GPUs."""

    cpu_enforce_eager: bool = True
    """Whether vLLM's CPU build runs without compiling the model. Compiling takes minutes of every
    start for a few per cent of speed; a pool that never sleeps may want it. No effect on GPUs."""

    load_format: str = Field(default="tidegate", min_length=1, max_length=100)
    """How vLLM reads weights: ``tidegate`` is our reader, used where Tidegate is installed in the
    engine's environment (``make run`` does that); any of vLLM's own ``--load-format`` names works
    too, ``auto`` is its default. A pool's ``engine_args`` may name another.
    ``tidegate doctor`` says which is the fastest here."""

    fork_server: bool = True
    """Whether a fork server is kept: a process that has imported vLLM and from which engines are
    forked. A start then takes some 2 s instead of some 30. The fork server is idle, and costs the
    memory of what it has imported (about 0.6 GB, of which its engines share most). Without it, or
    when it cannot be used, engines are started the plain way, and ``tidegate status`` says why."""

    fork_import_timeout_s: float = Field(default=600.0, gt=0.0, le=86_400.0)
    """Longest time, in seconds, that the fork server may import; then it is ended and begun anew.
    Generous: from a slow disk, on a busy machine, vLLM takes minutes."""

    fork_wait_s: float = Field(default=45.0, ge=0.0, le=3_600.0)
    """Longest time, in seconds, that an engine's start waits for a fork server that still imports.
    A plain start beside the import would slow down both, and takes longer."""

    fork_timeout_s: float = Field(default=10.0, gt=0.0, le=3_600.0)
    """Longest time, in seconds, in which the fork server has to fork; forking takes milliseconds. A
    fork server that hangs is ended, and the engine is started the plain way."""

    keep_compiled: bool = True
    """Whether what vLLM compiles, tunes and measures when it starts is kept for the next start, a
    folder for each combination of engine, libraries, GPU, driver, model and settings, in
    ``bundles`` in the cache's directory. ``tidegate model bundle`` packs one, to be shipped with
    the model."""

    compiled_quota_bytes: int = Field(default=8_589_934_592, ge=0)
    """Most bytes of compiled code and measurements (``keep_compiled``) that are kept; what was not
    used for longest goes first. 8 GiB holds some tens of combinations."""
