"""The fleet's shared vocabulary: what a replica is to the parts that route to it."""

from __future__ import annotations

from enum import StrEnum

import msgspec


class ReplicaState(StrEnum):
    """Where a replica is in its life. Only ``READY`` replicas are given new requests."""

    STARTING = "starting"
    READY = "ready"
    UNHEALTHY = "unhealthy"
    DRAINING = "draining"
    SLEEPING = "sleeping"
    WAKING = "waking"
    STOPPING = "stopping"
    STOPPED = "stopped"
    FAILED = "failed"


class Replica(msgspec.Struct, frozen=True, kw_only=True):
    """One engine of a pool, as the control side publishes it to the data path.

    ``slot`` indexes the shared ledger and is not reused while any worker still counts tokens on
    it; it is -1 until the gateway has given one. ``url`` is the engine's base URL
    (``http://127.0.0.1:9001``). The three limits are ``None`` where they are unknown: unknown
    is not zero and not infinity, the pool's setting applies. ``names`` are those of its
    pool that it knows models by itself: requests for them keep the name that the client wrote.
    ``stream_usage``: it reports the usage of a stream, at its end, if a request asks for it as
    vLLM's may.
    """

    id: str
    pool: str
    slot: int = -1
    url: str
    state: ReplicaState
    served_model: str | None = None
    max_model_len_tokens: int | None = None
    max_inflight_requests: int | None = None
    max_inflight_tokens: int | None = None
    headers: tuple[tuple[str, str], ...] = ()
    stream_usage: bool = False
    names: tuple[str, ...] = ()


class Pool(msgspec.Struct, frozen=True, kw_only=True):
    """The replicas of one model, and how its requests are held when none can take them.

    ``wake_eta_s`` is how long the next wake may take, ``None`` before one was measured. ``phase``
    says in a few words what the replica nearest to ready is doing, for clients that wait;
    ``failed_starts`` counts engines that did not come up, in a row, the last for ``cause``. A pool
    that is ``draining`` was removed: its names are unknown to new requests, those it has are
    served. One that is ``disabled`` is out of service: its requests are refused. ``slot`` is its
    place in the shared counters, -1 until the gateway has given one.
    ``adapters`` are further models that its replicas serve over the same base model;
    ``max_model_len_tokens`` is what its replicas reported last, ``None`` before the first did.
    """

    name: str
    slot: int = -1
    aliases: tuple[str, ...] = ()
    adapters: tuple[str, ...] = ()
    max_model_len_tokens: int | None = None
    replicas: tuple[Replica, ...] = ()
    wake_eta_s: float | None = None
    phase: str = ""
    failed_starts: int = 0
    cause: str = ""
    draining: bool = False
    disabled: bool = False


class Fleet(msgspec.Struct, frozen=True, kw_only=True):
    """Everything the data path knows of the fleet: one immutable picture, replaced whole."""

    version: int
    pools: tuple[Pool, ...] = ()
