"""The simulated tokenizer, and prompts as the engine sees them. Pure.

A token is up to four bytes of UTF-8, and its id spells those bytes, so that any text comes back
from its ids and nothing has to be looked up. Four bytes a token is about what real tokenizers
give for English text; for other scripts and for code they differ by half or more.

A prompt is one byte string in which every segment (a role marker, a message, an answer) is padded
with NUL to whole tokens. A conversation that goes on therefore begins with exactly the bytes, and
the KV blocks, that the engine has already seen, as it does with a real chat template.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

BYTES_PER_TOKEN = 4
"""Bytes that one token stands for, at most."""

_FIRST_ID = (0, 0, 1 << 8, (1 << 8) + (1 << 16), (1 << 8) + (1 << 16) + (1 << 24))
VOCABULARY_SIZE = _FIRST_ID[4] + (1 << 32)
"""One past the largest token id."""

MESSAGE_END = b"\x03\n\0\0"
"""The token that closes a message in a rendered conversation."""


def token_count(text: bytes) -> int:
    """How many tokens ``text`` is."""
    return -(-len(text) // BYTES_PER_TOKEN)


def encode(text: bytes) -> list[int]:
    """The token ids of ``text``."""
    step = BYTES_PER_TOKEN
    whole = len(text) - len(text) % step
    first = _FIRST_ID[step]
    ids = [first + int.from_bytes(text[i : i + step]) for i in range(0, whole, step)]
    if rest := text[whole:]:
        ids.append(_FIRST_ID[len(rest)] + int.from_bytes(rest))
    return ids


def decode(ids: Iterable[int]) -> bytes:
    """The bytes that ``ids`` spell. Raises ``ValueError`` for an id outside the vocabulary."""
    pieces = []
    for token in ids:
        if not 0 <= token < VOCABULARY_SIZE:
            raise ValueError(f"token id {token} is out of vocabulary (size {VOCABULARY_SIZE})")
        length = next(n for n in (4, 3, 2, 1) if token >= _FIRST_ID[n])
        pieces.append((token - _FIRST_ID[length]).to_bytes(length))
    return b"".join(pieces)


def padded(text: bytes) -> bytes:
    """``text`` filled with NUL to whole tokens."""
    return text + b"\0" * (-len(text) % BYTES_PER_TOKEN)


def render_chat(messages: Iterable[tuple[str, str]], *, tools: bytes = b"") -> bytes:
    """A conversation as one prompt, ending where the assistant is to speak.

    ``messages`` are (role, text); ``tools`` is the JSON of the tools offered, or empty.
    """
    parts = []
    if tools:
        parts += [_role("tools"), padded(tools), MESSAGE_END]
    for role, text in messages:
        parts += [_role(role), padded(text.encode("utf-8", "surrogatepass")), MESSAGE_END]
    parts.append(_role("assistant"))
    return b"".join(parts)


def _role(name: str) -> bytes:
    return b"\x02" + name.encode("utf-8", "replace")[:2].ljust(2, b"_") + b"\n"


def block_hashes(text: bytes, block_size_tokens: int) -> Sequence[int]:
    """A chained hash for every whole KV block of ``text``: equal where all the text before is.

    Hashes are comparable within one process only: Python salts them.
    """
    size = block_size_tokens * BYTES_PER_TOKEN
    chain = 0
    hashes = []
    for start in range(0, len(text) - size + 1, size):
        chain = hash((chain, text[start : start + size]))
        hashes.append(chain)
    return hashes
