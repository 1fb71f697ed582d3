"""What the simulated engine can be told, with defaults and bounds."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from loaders.engines.simulated.exchange import HttpLimits
from loaders.engines.simulated.faults import parse
from loaders.engines.simulated.scheduler import EngineModel


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """One simulated engine. ``startup_s`` has a duration for each of ``START_PHASES``."""

    served_models: tuple[str, ...]
    model_path: str
    host: str = "127.0.0.1"
    port: int = 8000
    model: EngineModel = field(default_factory=EngineModel)
    limits: HttpLimits = field(default_factory=HttpLimits)
    startup_s: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    late_port: bool = False
    sleep_s: tuple[float, float] = (0.5, 0.5)
    wake_s: tuple[float, float] = (0.5, 2.0)
    output_tokens: int = 128
    output_spread_fraction: float = 0.5
    embedding_size: int = 64
    seed: int = 0
    virtual_time: bool = False
    drain_s: float = 30.0
    api_keys: tuple[str, ...] = ()
    request_id_headers: bool = False
    faults: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.served_models or not all(self.served_models):
            raise ValueError("a model name is needed")
        if not 0 <= self.port <= 65_535:
            raise ValueError(f"port must be 0..65535, is {self.port}")
        durations = (*self.startup_s, *self.sleep_s, *self.wake_s, self.drain_s)
        if not all(d >= 0 and math.isfinite(d) for d in durations):
            raise ValueError(f"durations must be finite and at least 0: {durations}")
        if self.output_tokens < 1 or not 0 <= self.output_spread_fraction <= 1:
            raise ValueError("output-tokens must be at least 1, its spread a fraction 0..1")
        if not 1 <= self.embedding_size <= 16_384:
            raise ValueError(f"embedding-size must be 1..16384, is {self.embedding_size}")
        for text in self.faults:
            parse(text)
