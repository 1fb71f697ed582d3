"""What the router knows of a request."""

from __future__ import annotations

from typing import Final

_NO_REPLICAS: Final[frozenset[str]] = frozenset()


class RoutingRequest:
    """What filters and scorers may know of one request; it lives as long as the request.

    ``prompt_tokens`` and ``tokens`` (prompt plus expected output) are estimates. ``exclude`` holds
    the ids of replicas that already failed it. The rest is ``None`` where it is not known:
    ``tenant`` is the client's tenant, ``adapter`` the LoRA adapter asked for, and ``block_hashes``
    are those of the prompt's KV cache blocks, each of them over all tokens up to its block's end.
    ``subset`` is the addresses (``Endpoint.address``) that it may go to, ``None`` for all.
    """

    __slots__ = (
        "adapter",
        "block_hashes",
        "exclude",
        "prompt_tokens",
        "subset",
        "tenant",
        "tokens",
    )

    def __init__(
        self,
        prompt_tokens: int,
        tokens: int,
        *,
        tenant: str | None = None,
        adapter: str | None = None,
        block_hashes: tuple[bytes, ...] | None = None,
    ) -> None:
        self.prompt_tokens = prompt_tokens
        self.tokens = tokens
        self.exclude: frozenset[str] = _NO_REPLICAS
        self.tenant = tenant
        self.adapter = adapter
        self.block_hashes = block_hashes
        self.subset: frozenset[str] | None = None

    def clear_exclude(self) -> None:
        """Let every replica be tried again."""
        self.exclude = _NO_REPLICAS
