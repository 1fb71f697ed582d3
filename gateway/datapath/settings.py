"""The gateway's section of the settings: its listeners, and how it treats clients and replicas.

Workers are handed the section as it is, but do not import this module: pydantic would cost each
of them about 10 MB of memory (``messages.WorkerConfig``).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationInfo,
    model_validator,
)
from pydantic_core import PydanticCustomError

ModelBeginning = Annotated[str, StringConstraints(pattern=r"^([a-z0-9]+://|/)[^\s?#@]*$")]


class HoldingSettings(BaseModel):
    """How requests wait while their pool has no replica that can take them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_requests: int = Field(default=1024, ge=0, le=1_000_000)
    """Requests of one pool that are held, over all workers; the next is answered 429 with a
    ``Retry-After`` from the measured wake time. 0 holds none. 1024 is far more than one replica
    can take at once, and cheap: a held request costs its body and a timer."""

    max_bytes: int = Field(default=134_217_728, ge=0, le=1_099_511_627_776)
    """Bytes of request bodies of one pool that are held, over all workers. 128 MiB is 1024 prompts
    of 128 kB; whichever of the two bounds is met first applies."""

    deadline_s: float = Field(default=300.0, gt=0.0, le=86_400.0)
    """Seconds a request is held before it is answered 503. 300 is longer than a large model's
    start from a local disk; clients with less patience hang up themselves."""

    keepalive_s: float = Field(default=10.0, ge=0.0, le=3_600.0)
    """Seconds between the comments sent on a held stream, so that no proxy's idle timeout cuts it.
    0 turns them off, and the status line is then sent only when the engine answers. 10 is below
    every common proxy's default."""

    release_initial: int = Field(default=8, ge=1, le=100_000)
    """Held requests given at once to a replica that has just woken; it doubles as answers come, so
    a fresh replica is not flooded. 8 fills a first batch of any engine."""


class PickerSettings(BaseModel):
    """The endpoint picker: an Envoy that carries requests itself asks it for each where to send it,
    by ext_proc as in the Gateway API Inference Extension. It needs the extra ``picker``
    (``pip install "tidegate[picker]"``)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    port: int | None = Field(default=None, ge=0, le=65_535)
    """TCP port of the endpoint picker (gRPC). Unset: there is none. 0 lets the system choose one,
    which is printed at start."""

    host: str = Field(default="127.0.0.1", min_length=1)
    """Address it listens on. Who reaches it may ask for any model, and sees the addresses of its
    replicas: beyond loopback only the proxies should."""

    max_endpoints: int = Field(default=1, ge=1, le=16)
    """Replicas that Envoy is given for a request: the one to send it to, and after it those of the
    same pool to go on with where its route retries. 1, as of the reference picker, because a
    cluster of the type ``ORIGINAL_DST`` takes no list; 3 with the policy ``override_host``."""

    tls: bool = False
    """Speak TLS, as Gateway API implementations expect of an endpoint picker, with a self-signed
    certificate made at each start where ``tls_certificate`` is unset."""

    tls_certificate: Path | None = None
    """PEM file with the certificate chain of the endpoint picker, which then speaks TLS; with
    ``tls_key``. A changed pair is used for new connections without a restart."""

    tls_key: Path | None = None
    """PEM file with the private key of ``tls_certificate``."""

    @model_validator(mode="after")
    def _consistent(self, info: ValidationInfo) -> PickerSettings:
        text = "; ".join(self._conflicts())
        if text and info.context is None:  # as in ``autoscaler.settings.ConsistentSettings``
            raise PydanticCustomError("conflict", "{text}", {"text": text})
        return self

    def _conflicts(self) -> Iterator[str]:
        if self.tls_certificate is not None and self.tls_key is None:
            yield "tls_key is missing: tls_certificate is set, TLS needs both"
        if self.tls_key is not None and self.tls_certificate is None:
            yield "tls_certificate is missing: tls_key is set, TLS needs both"


class GatewaySettings(BaseModel):
    """The two listeners and the data path between clients and engines."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    host: str = Field(default="127.0.0.1", min_length=1)
    """Address the API listens on. Loopback, so that nothing is exposed unasked; ``0.0.0.0`` or
    ``::`` for every interface."""

    port: int = Field(default=8000, ge=0, le=65_535)
    """TCP port of the API. 0 lets the system choose one, which is printed at start."""

    workers: int = Field(default=1, ge=0, le=256)
    """Processes that share the API port, each on its own event loop. 0 is one per CPU core. One
    carries some 30,000 small requests a second, so 1 leaves the cores to the engines."""

    admin_host: str = Field(default="127.0.0.1", min_length=1)
    """Address of the admin listener (metrics, status, scale). Everything but health and metrics
    needs the token of ``admin_token_file`` there. It speaks plain HTTP, which shows the token to
    the network: beyond loopback put TLS in front of it. The command line on this machine does not
    use it, but the socket ``admin.sock`` in ``state_dir``."""

    admin_port: int = Field(default=8001, ge=0, le=65_535)
    """TCP port of the admin listener. 0 lets the system choose one, which is printed at start."""

    admin_allowed_hosts: tuple[str, ...] = ()
    """Further ``Host`` names the admin listener answers to, without port. IP addresses, loopback
    names and ``admin_host`` itself always work; any other name is refused, so that a web page
    cannot reach it through a name of its own (DNS rebinding). ``"*"`` accepts every name."""

    worker_timeout_s: float = Field(default=10.0, ge=1.0, le=3_600.0)
    """Seconds for which a worker may not respond before it is killed and replaced; its answers
    under way are cut. No request keeps a healthy worker busy for a second. ``/readyz`` says so
    after two."""

    admin_token_file: Path | None = None
    """File with the token (16 characters or more) that requests to the admin listener carry as
    ``Authorization: Bearer``. Unset: ``admin-token`` in ``state_dir``, made at the first start with
    mode 0600. A file that is another user's (but not root's), or that others may use or its group
    may write, is an error at the start. Where none can be made (a full disk) Tidegate starts on
    loopback only, and answers health and metrics over TCP."""

    admin_allowed_models: tuple[ModelBeginning, ...] = ()
    """Models that requests to the admin listener may name beside those of the pools, by the
    beginning of their URL or path (``"hf://Qwen"``, ``"s3://models/llm"``, ``"hf://"`` for all of
    a hub). The command line on this machine may name any."""

    max_connections: int = Field(default=10_000, ge=1, le=1_000_000)
    """Client connections one worker keeps open; the next is answered 503 and closed. Each costs
    about 10 kB, and one file descriptor."""

    max_head_bytes: int = Field(default=32_768, ge=1_024, le=1_048_576)
    """Bytes of a request's line and headers; more is answered 431. Cookies and tokens fit well."""

    max_headers: int = Field(default=100, ge=8, le=10_000)
    """Headers of a request; more are answered 431. Apache's own limit."""

    max_body_bytes: int = Field(default=67_108_864, ge=1_024, le=1_099_511_627_776)
    """Bytes of a request's body; more is answered 413. 64 MiB takes a long prompt with several
    images in it."""

    max_buffered_bytes: int = Field(default=268_435_456, ge=65_536, le=1_099_511_627_776)
    """Bytes of request bodies one worker has in memory at once, held requests included; past it
    new requests are answered 503. 256 MiB bounds a worker's memory whatever the clients send."""

    proxied_paths: tuple[Annotated[str, Field(pattern=r"^(/[A-Za-z0-9._~-]+)+$")], ...] = Field(
        default=(), max_length=1_000
    )
    """Further paths, besides those of vLLM, OpenAI's audio and OpenAI's images, that are passed to
    the pool which the ``model`` of a POST's body names, as JSON or as a form
    (``["/v1/videos"]``)."""

    peek_bytes: int = Field(default=65_536, ge=1_024, le=16_777_216)
    """Bytes of a body read before a replica is chosen, and more until its ``model`` is found. What
    follows is streamed through and not kept."""

    head_timeout_s: float = Field(default=10.0, gt=0.0, le=3_600.0)
    """Seconds a client has to send a whole request head. 10 ends slow-head attacks and forgives a
    bad mobile line."""

    body_timeout_s: float = Field(default=30.0, gt=0.0, le=3_600.0)
    """Seconds between two pieces of a request's body; longer is answered 408."""

    min_body_bytes_per_s: int = Field(default=16_384, ge=0, le=1_073_741_824)
    """Bytes per second at which a large body must come to be streamed to a replica before it is
    whole; one that comes more slowly is read whole first, and one that slows down to less while it
    has a place at a replica is answered 408. 16 kB/s is a bad mobile line. 0 asks for no speed."""

    idle_timeout_s: float = Field(default=75.0, gt=0.0, le=86_400.0)
    """Seconds a keep-alive connection may wait for its next request. 75 is nginx's default, and
    longer than the pools of the usual clients."""

    request_timeout_s: float = Field(default=900.0, gt=0.0, le=86_400.0)
    """Seconds for the whole of one answer, from its head to its last byte. 15 minutes are some
    30,000 tokens of a slow engine."""

    upstream_connect_timeout_s: float = Field(default=5.0, gt=0.0, le=300.0)
    """Seconds to connect to a replica before another is tried. It is near: 5 is generous."""

    upstream_idle_timeout_s: float = Field(default=300.0, gt=0.0, le=86_400.0)
    """Seconds without one byte from the engine before the answer is given up (504, or the stream is
    cut). A long prompt in a full queue may well take minutes to its first token."""

    upstream_max_idle_connections: int = Field(default=256, ge=0, le=100_000)
    """Idle connections to one replica that one worker keeps for reuse; further ones are closed."""

    upstream_keepalive_s: float = Field(default=4.0, ge=0.0, le=3_600.0)
    """Seconds an idle connection to a replica is reused. vLLM closes its own after 5: stay below,
    or a request may be sent into a closing connection. 0 opens a new one for each request."""

    max_retries: int = Field(default=2, ge=0, le=10)
    """Further attempts of a request after one that ended before its first byte of answer, or was
    answered 5xx or 429 (see ``router.retry_fraction``). A refused connection is no attempt. After
    the first byte there is never a retry."""

    drain_s: float = Field(default=30.0, ge=0.0, le=3_600.0)
    """Seconds that answers under way are given after SIGTERM, while nothing new is accepted; then
    they are cut. Kubernetes' own default of 30."""

    tls_certificate: Path | None = None
    """PEM file with the certificate chain of the API; with ``tls_key``. Unset: plain HTTP."""

    tls_key: Path | None = None
    """PEM file with the private key of ``tls_certificate``."""

    tls_reload_s: float = Field(default=10.0, gt=0.0, le=86_400.0)
    """Seconds between two checks of the certificate's files; a changed pair is used for new
    connections without a restart."""

    cors_allow_origins: tuple[str, ...] = ()
    """Origins whose web pages may call the API (``https://chat.example.org``; ``"*"`` for all).
    Empty: no CORS headers are sent, so only same-origin pages can."""

    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """How much is written to the log (standard error). ``info`` writes starts, stops and
    decisions, nothing per request."""

    count_stream_usage: bool = True
    """Have vLLM report the usage of each stream, for the token metrics and the token estimates, and
    take the event with it out again where the client did not ask for it. Without it the tokens of
    such streams are estimated."""

    holding: HoldingSettings = HoldingSettings()
    """How requests wait while their pool has no replica that can take them."""

    picker: PickerSettings = PickerSettings()
    """Where an Envoy asks to which replica a request goes."""

    @model_validator(mode="after")
    def _consistent(self, info: ValidationInfo) -> GatewaySettings:
        text = "; ".join(self._conflicts())
        if text and info.context is None:  # as in ``autoscaler.settings.ConsistentSettings``
            raise PydanticCustomError("conflict", "{text}", {"text": text})
        return self

    def _conflicts(self) -> Iterator[str]:
        if self.port == self.admin_port != 0:
            yield f"admin_port is {self.admin_port}, as port is: give each its own"
        if self.tls_certificate is not None and self.tls_key is None:
            yield "tls_key is missing: tls_certificate is set, TLS needs both"
        if self.tls_key is not None and self.tls_certificate is None:
            yield "tls_certificate is missing: tls_key is set, TLS needs both"
        if self.peek_bytes > self.max_buffered_bytes:
            yield "peek_bytes is more than max_buffered_bytes"
