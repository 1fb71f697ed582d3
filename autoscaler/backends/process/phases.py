"""What a starting engine is at, in one of four words, from what it writes to its log."""

from __future__ import annotations

import re
from collections.abc import Iterable

PHASES = ("importing", "loading", "compiling", "warming")
"""In the order of a start."""

SIGNS = (
    ("loading", re.compile(
        r"Starting to load model|Loading (safetensors|pt|weights)|checkpoint shards|"
        r"start-up: .*(load|weight)", re.IGNORECASE)),
    ("compiling", re.compile(
        r"torch\.compile takes|directory: .* for vLLM's torch\.compile|Dynamo bytecode|"
        r"Compiling (a|the) |start-up: .*compil", re.IGNORECASE)),
    ("warming", re.compile(
        r"KV cache size|Capturing |Warming up|init engine|Supported tasks|vLLM server on|"
        r"Loading weights took|Available routes|^Route:|start-up: .*(warm|captur|profil)",
        re.IGNORECASE)),
)  # fmt: skip
"""Lines of vLLM, by the phase they show to have begun."""


LONGEST = 300
"""Characters of a line that tells a phase; vLLM's dumps of its configuration, which have all the
words in them, are longer."""


def later(one: str, other: str) -> str:
    """The later of two phases; an unknown word is before all."""
    return max(one, other, key=lambda word: PHASES.index(word) if word in PHASES else -1)


def phase_of(lines: Iterable[str], known: str = PHASES[0]) -> str:
    """The phase that log messages show, not before the one that is ``known`` to be reached."""
    phase = known
    for line in lines:
        if len(line) > LONGEST:
            continue
        for word, sign in SIGNS:
            if sign.search(line):
                phase = later(phase, word)
    return phase
