"""The model cache's settings: where weights are kept on a node, and what it may take for them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, TypeVar
from urllib.parse import urlsplit

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    field_validator,
    model_validator,
)

from modelcache.refs import parse_ref
from modelcache.types import PIECE_BYTES

BaseUrl = Annotated[str, StringConstraints(pattern=r"^https?://[^\s/@?#]+$")]
NameUrl = Annotated[str, StringConstraints(pattern=r"^http://[^\s/@?#:\[\]]+(:[0-9]{1,5})?$")]


Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
BundleName = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{32}$")]
FilePattern = Annotated[str, StringConstraints(pattern=r"^!?[^!/\s][^\s]*$", max_length=255)]
Of = TypeVar("Of")


StepKind = Literal["gguf_to_safetensors", "cast", "command"]

STEP_FIELDS: Mapping[StepKind, frozenset[str]] = {
    "gguf_to_safetensors": frozenset({"file", "dtype"}),
    "cast": frozenset({"dtype"}),
    "command": frozenset({"argv", "env", "version", "resumable"}),
}
NEEDED: Mapping[StepKind, str] = {"cast": "dtype", "command": "argv"}


class PreparationStep(BaseModel):
    """One step that makes a model of a model, run in the engine's environment, ahead of its use.

    Its result is kept, and made again only when the input, the step or the tools are others.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: StepKind
    """``gguf_to_safetensors`` undoes a GGUF file's quantization; ``cast`` changes the type of all
    floating-point tensors; ``command`` is any program (a quantizer, TensorRT-LLM's converter and
    builder)."""

    file: str | None = Field(default=None, pattern=r"^[^/].*$")
    """``gguf_to_safetensors``: which GGUF file of the model. Unset: the only one."""

    dtype: Literal["bfloat16", "float16", "float32"] | None = None
    """``cast``, and ``gguf_to_safetensors`` (unset: bfloat16): the type of the result."""

    argv: tuple[str, ...] = ()
    """``command``: program and arguments. ``{input}`` in them becomes the model's folder,
    ``{output}`` the folder for the result (also the working directory), ``{python}`` the engine's
    interpreter."""

    env: dict[str, str] = Field(default_factory=dict)
    """``command``: added to its environment."""

    version: str = ""
    """``command``: change it to have the result made again, for what cannot be seen in ``argv``
    (scripts named there by their absolute path are seen)."""

    resumable: bool = False
    """``command``: it goes on with what an interrupted run left in ``{output}``. Otherwise it
    begins with an empty folder."""

    timeout_s: float = Field(default=7_200.0, gt=0.0, le=604_800.0)
    """Seconds after which it counts as failed. Two hours: quantizing a large model takes one."""

    @model_validator(mode="after")
    def _fields_of_its_kind(self) -> PreparationStep:
        given = self.model_fields_set - {"kind", "timeout_s"}
        foreign = sorted(given - STEP_FIELDS[self.kind])
        if foreign:
            raise ValueError(f"a {self.kind} step has no {', '.join(foreign)}")
        needed = NEEDED.get(self.kind)
        if needed and not getattr(self, needed):
            raise ValueError(f"a {self.kind} step needs {needed}")
        return self

    @property
    def resumes(self) -> bool:
        """Whether it goes on with what an interrupted run of it left."""
        return self.resumable if self.kind == "command" else self.kind == "cast"


class ModelCacheSettings(BaseModel):
    """Where weights are kept on this node, and what it may take for them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    dir: Path | None = None
    """Directory of the cache. Unset: ``cache`` in ``state_dir``. Put it on the node's fastest
    disk; several Tidegates on one node may share it."""

    quota_bytes: int | None = Field(default=None, ge=0)
    """Most bytes the cache may take, results of preparation steps included. What goes first is what
    costs least to load again for the time until its next use, never what is pinned or leased.
    Unset: all of the disk but ``reserve_bytes``."""

    reserve_bytes: int = Field(default=2_147_483_648, ge=0)
    """Bytes of the disk that are left free whatever the quota says. 2 GiB keeps logs and a
    system's own needs alive."""

    connections: int = Field(default=16, ge=1, le=256)
    """Ranges read at once from one source. Object stores give some 60 MB/s to a connection: 16
    fill a 10 Gbit/s line."""

    peer_connections: int = Field(default=8, ge=1, le=256)
    """Ranges read at once from other nodes' caches."""

    memory_bytes: int = Field(default=268_435_456, ge=PIECE_BYTES)
    """Most bytes of host memory for downloads under way, over all models. Bounds memory whatever
    the number of connections."""

    retries: int = Field(default=5, ge=0, le=100)
    """Times a listing, a head or a range is asked for again after an error that may pass, with
    growing pauses."""

    timeout_s: float = Field(default=30.0, gt=0.0, le=3_600.0)
    """Seconds without one byte before a read counts as failed."""

    bandwidth_bytes_s: int | None = Field(default=None, ge=65_536)
    """Most bytes a second this node reads from sources, all models together. Unset: no limit."""

    source_bandwidth_bytes_s: dict[str, int] = Field(default_factory=dict)
    """Most bytes a second from one source, by the beginning of its URL (``"oss://models"``); the
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

    hub_names: bool = True
    """Whether a pool whose model is a hub's ``org/name`` has it fetched into this cache, as
    ``hf://org/name`` is. Without, engines fetch such a model themselves; so they do where their
    arguments name a revision, a place for downloads, a token, another repository (LoRA adapters, a
    draft model, a tokenizer, a config) or the load format ``dummy``, ``pt`` or ``npcache``, or the
    pool's ``env`` says where the hub is or which token to use."""

    peers: tuple[BaseUrl, ...] = ()
    """Other nodes' caches (``http://10.0.0.7:8002``), asked for pieces before the source."""

    peer_names: tuple[NameUrl, ...] = ()
    """The same by host names that stand for many nodes, one for each address of the name
    (``http://tidegate-cache-agent:8002``, a headless Kubernetes service). Looked up every 10
    seconds, for nodes come and go."""

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

    files: dict[str, tuple[FilePattern, ...]] = Field(default_factory=dict)
    """Which files of a model are fetched, by the model as pools name it; a pattern that begins with
    ``!`` leaves files out: ``"hf://org/Qwen3-8B-GGUF" = ["*Q4_K_M.gguf", "*.json"]``. Without: all,
    but of a model that has safetensors its weights once (what ``model.safetensors.index.json``
    names; no ``original/``, no ``consolidated*``, no second precision), no pickles, and nothing
    that other runtimes read (GGUF, ONNX, TensorFlow, Flax)."""

    steps: dict[str, tuple[PreparationStep, ...]] = Field(default_factory=dict)
    """What is done to a model before it is used, by the model as pools name it:
    ``"oss://models/qwen" = [{ kind = "cast", dtype = "bfloat16" }]``. Kinds:
    ``gguf_to_safetensors`` (``file``, ``dtype``), ``cast`` (``dtype``), ``command`` (``argv``,
    ``env``, ``version``, ``resumable``); each takes ``timeout_s``. In ``argv`` ``{input}`` becomes
    the model's folder, ``{output}`` the folder for the result, ``{python}`` the engine's
    interpreter. docs/configure.md has an example."""

    bundles: dict[str, dict[BundleName, Sha256]] = Field(default_factory=dict)
    """Compiled code that a model's store ships and engines here may run: SHA-256 by the name of the
    file below ``tidegate-bundles`` (without ``.tar``), by the model as pools name it. ``tidegate
    model bundle`` prints what to write. No other is fetched or used: anyone who can write to a
    store could run code here."""

    @field_validator("peer_names")
    @classmethod
    def _have_ports(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            urlsplit(name).port  # noqa: B018 - raises for one that is out of range
        return names

    @field_validator("steps", "files", "bundles")
    @classmethod
    def _are_models(cls, given: dict[str, Of]) -> dict[str, Of]:
        for name in given:
            parse_ref(os.path.expanduser(name))  # raises for what is none
        return given

    def steps_for(self, model: str) -> tuple[PreparationStep, ...]:
        """The steps of a model, however the same place is written. Raises ``ValueError`` where
        ``model`` is no reference."""
        return _find(self.steps, model, ())

    def files_for(self, model: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Patterns of the files of a model that are wanted, and of those that are not; none where
        nothing is said of it. Raises ``ValueError`` where ``model`` is no reference."""
        given = _find(self.files, model, ()) if self.files else ()
        wanted = tuple(one for one in given if not one.startswith("!"))
        return wanted, tuple(one[1:] for one in given if one.startswith("!"))

    def bundles_for(self, model: str) -> Mapping[str, str]:
        """SHA-256 of the compiled bundles of a model that may be used, by name; none where nothing
        is said of it. Raises ``ValueError`` where ``model`` is no reference."""
        return _find(self.bundles, model, {}) if self.bundles else {}


def _find(given: Mapping[str, Of], model: str, without: Of) -> Of:
    """What is given for a model, however the same place is written."""
    url = parse_ref(os.path.expanduser(model)).url
    for name, values in given.items():
        if parse_ref(os.path.expanduser(name)).url == url:
            return values
    return without
