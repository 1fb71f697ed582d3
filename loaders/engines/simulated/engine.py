"""The simulated engine as an engine among others: how it is started, put to sleep, and read."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from loaders.engines.base import (
    START_PHASES,
    Capabilities,
    EngineCommand,
    EngineOptions,
    Placement,
)
from loaders.engines.client import EngineClient
from loaders.engines.vllm.engine import VllmEngine, merge_flags
from loaders.settings import LoaderSettings

ROOT = str(Path(__file__).resolve().parents[3])


class SimulatedEngine(VllmEngine):
    """The simulated engine, run by Tidegate's own interpreter. To its clients it is a vLLM."""

    name = "simulated"
    notice = "a simulation: made-up text"
    capabilities = Capabilities(sleep_levels=frozenset({1, 2}))
    phase_signs = tuple((phase, re.compile(f"start-up: {phase} ")) for phase in START_PHASES)

    def program(self, settings: LoaderSettings) -> Path | None:
        """See ``Engine``."""
        return None

    def fetches_model(
        self, args: Sequence[str], env: Mapping[str, str], settings: LoaderSettings
    ) -> bool:
        """See ``Engine``. It has none."""
        return True

    def command(
        self, options: EngineOptions, placement: Placement, settings: LoaderSettings
    ) -> EngineCommand:
        """See ``Engine``. It loads nothing, so its model is what clients call it."""
        flags: list[tuple[str, str | None]] = [
            ("--model", options.served_model),
            ("--host", placement.host),
            ("--port", str(placement.port)),
            ("--share-port", None),
        ]
        if options.max_model_len_tokens is not None:
            flags.append(("--max-model-len", str(options.max_model_len_tokens)))
        # Our own packages are found from any working directory, and nothing that lies in it.
        given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
        path = os.pathsep.join(filter(None, (ROOT, *given)))  # an empty part is that directory
        return EngineCommand(
            argv=(
                *(sys.executable, "-P", "-m", "loaders.engines.simulated"),
                *merge_flags(flags, options.args),
            ),
            env={"PYTHONSAFEPATH": "1", "PYTHONPATH": path},
        )

    async def wake(self, client: EngineClient, url: str, level: int, *, timeout_s: float) -> None:
        """See ``Engine``. There are no weights to be read again."""
        await super().wake(client, url, 1, timeout_s=timeout_s)
