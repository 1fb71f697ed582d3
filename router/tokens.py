"""How many tokens a request will cost, learned from what the engine said earlier ones did.

A tokenizer per request would cost more than the whole data path (a 220 kB prompt: milliseconds),
so bytes are divided by a ratio. The ratio and the mean answer length are exponential means over
the ``usage`` of a model's own answers, so they fit its tokenizer, its language and its clients'
JSON escaping without knowing any of them.
"""

from __future__ import annotations

from typing import Final

# A ratio outside these is a broken usage report or a body that is mostly not prompt (an image as
# base64): learning from it would mis-size every other request of the model.
_MIN_BYTES_PER_TOKEN: Final = 0.5
_MAX_BYTES_PER_TOKEN: Final = 64.0
# Short prompts are mostly JSON scaffolding; they say little about the prompt text's own ratio.
_MIN_PROMPT_TOKENS_TO_LEARN: Final = 16


class TokenEstimator:
    """Token estimates for one model. Owned by one worker; not shared, not locked.

    ``bytes_per_token`` and ``output_tokens`` are the current means. ``estimate`` never returns
    less than one token, so that a ledger entry is never free.
    """

    __slots__ = ("_rate", "bytes_per_token", "output_tokens")

    def __init__(
        self, *, bytes_per_token: float, output_tokens: float, learning_rate: float
    ) -> None:
        self.bytes_per_token = bytes_per_token
        self.output_tokens = output_tokens
        self._rate = learning_rate

    def estimate(self, body_bytes: int, max_tokens: int | None) -> tuple[int, int]:
        """Estimated (prompt tokens, prompt plus output tokens) of a request body of that many
        bytes; ``max_tokens`` is the request's own bound on its output, ``None`` without one."""
        prompt = int(body_bytes / self.bytes_per_token) + 1
        output = self.output_tokens
        if max_tokens is not None and max_tokens < output:
            return prompt, prompt + max_tokens
        return prompt, prompt + int(output)

    def learn(self, body_bytes: int, prompt_tokens: int | None, output_tokens: int | None) -> None:
        """Move the means towards one finished answer. ``None`` is unknown and teaches nothing."""
        if prompt_tokens is not None and prompt_tokens >= _MIN_PROMPT_TOKENS_TO_LEARN:
            ratio = body_bytes / prompt_tokens
            if _MIN_BYTES_PER_TOKEN <= ratio <= _MAX_BYTES_PER_TOKEN:
                self.bytes_per_token += self._rate * (ratio - self.bytes_per_token)
        if output_tokens is not None and output_tokens >= 0:
            self.output_tokens += self._rate * (output_tokens - self.output_tokens)
