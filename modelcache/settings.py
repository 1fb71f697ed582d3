"""The model cache's settings: where weights are kept on a node, and what it may take for them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from modelcache.types import PIECE_BYTES

BaseUrl = Annotated[str, StringConstraints(pattern=r"^https?://[^\s/@?#]+$")]


class ModelCacheSettings(BaseModel):
    """Where weights are kept on this node, and what it may take for them."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    dir: Path | None = None
    """Directory of the cache. Unset: ``cache`` in ``state_dir``. Put it on the node's fastest
    disk; several Tidegates on one node may share it."""

    quota_bytes: int | None = Field(default=None, ge=0)
    """Most bytes the cache may take; what was not used for longest goes first, never what is
    pinned or leased. Unset: all of the disk but ``reserve_bytes``."""

    reserve_bytes: int = Field(default=2_147_483_648, ge=0)
    """Bytes of the disk that are left free whatever the quota says. 2 GiB keeps logs and a
    system's own needs alive."""

    connections: int = Field(default=16, ge=1, le=256)
    """Ranges read at once from one store. Object stores give some 60 MB/s to a connection: 16
    fill a 10 Gbit/s line."""

    peer_connections: int = Field(default=8, ge=1, le=256)
    """Ranges read at once from other nodes' caches."""

    memory_bytes: int = Field(default=268_435_456, ge=PIECE_BYTES)
    """Most bytes of host memory for downloads under way, over all models. Bounds memory whatever
    the number of connections."""

    retries: int = Field(default=5, ge=0, le=100)
    """Times one range is asked for again after an error that may pass, with growing pauses."""

    timeout_s: float = Field(default=30.0, gt=0.0, le=3_600.0)
    """Seconds without one byte before a read counts as failed."""

    bandwidth_bytes_s: int | None = Field(default=None, ge=65_536)
    """Most bytes a second this node reads from stores, all models together. Unset: no limit."""

    source_bandwidth_bytes_s: dict[str, int] = Field(default_factory=dict)
    """Most bytes a second from one store, by the beginning of its URL (``"oss://models"``); the
    longest that fits applies."""

    page_budget_bytes: int | None = Field(default=None, ge=0)
    """Most bytes of weights that are kept in the page cache (mapped, and touched now and then: the
    kernel drops what is not). Unset: half of the memory. 0 keeps nothing."""

    page_touch_s: float = Field(default=10.0, ge=0.5, le=3_600.0)
    """Seconds between two touches of kept pages."""

    page_lock: bool = False
    """Lock kept pages (``mlock``) instead of touching them. Needs the right to (RLIMIT_MEMLOCK)."""

    hub_dirs: tuple[Path, ...] = ()
    """Hugging Face caches whose files are taken over (hard-linked where possible) rather than
    fetched again. Unset: ``HF_HUB_CACHE``, ``HF_HOME/hub`` or ``~/.cache/huggingface/hub``."""

    peers: tuple[BaseUrl, ...] = ()
    """Other nodes' caches (``http://10.0.0.7:8002``), asked for pieces before the store."""

    peer_token_env: str = "TIDEGATE_PEER_TOKEN"
    """Environment variable with the secret that all nodes of a cluster share. Without it this
    node neither serves peers nor asks them."""

    peer_host: str = Field(default="127.0.0.1", min_length=1)
    """Address at which this node serves its pieces to peers."""

    peer_port: int | None = Field(default=None, ge=0, le=65_535)
    """Port at which this node serves its pieces to peers; 0 lets the system choose. Unset: it
    serves none."""

    sites: dict[str, BaseUrl] = Field(default_factory=dict)
    """Other sites' cache agents by site name, for ``tidegate model replicate``."""
