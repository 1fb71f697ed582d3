"""Have other sites' caches fetch a model, ahead of its use there.

Sites are asked over their agents' peer listener, signed with the cluster's secret like everything
else there. An agent fetches from the source itself, at ``REPLICATE`` priority, and goes on when
the client has gone; asking again joins what is under way, also after the agent was started anew.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol, TypeVar

from modelcache.peers.client import PeerClient, PeerIntegrityError, PeerRefused, PeerUnavailable
from modelcache.peers.server import Verb
from modelcache.peers.wire import (
    BadMessage,
    Keyring,
    read_int,
    read_seconds,
    read_text,
    read_token,
)
from modelcache.ports import CachedModel, IsCancelled, OnProgress
from modelcache.refs import PATH, parse_ref
from modelcache.settings import ModelCacheSettings
from modelcache.types import PREPARED, CacheError, Cancelled, Priority, Progress

T = TypeVar("T")

BEGIN = "/v1/replicate"
LOOK = "/v1/replicate/progress"
MOST_RUNNING = 4
"""Models that an agent fetches for other sites at once; the next wait."""

MOST_REMEMBERED = 256
LOOK_S = 1.0
ANSWER_S = 15.0
GIVE_UP_S = 60.0
"""Seconds without a word from a site until it counts as failed."""

RETRY_S = 1.0


class Cache(Protocol):
    """As much of ``ModelCache`` as is needed here."""

    def preload(
        self,
        url: str,
        *,
        revision: str | None = None,
        priority: Priority = Priority.PRELOAD,
        on_progress: OnProgress | None = None,
        cancelled: IsCancelled | None = None,
    ) -> CachedModel:
        """Fetch it, unless it is here. Raises ``CacheError``."""
        ...


# -- the site that is asked -----------------------------------------------------------------------


@dataclass(slots=True)
class ReplicationJob:
    """A model that another site has asked for."""

    url: str
    revision: str | None
    progress: Progress = field(default_factory=lambda: Progress(phase="waiting"))
    state: str = "running"
    """``running``, ``done`` or ``failed``."""
    told: dict[str, Any] = field(default_factory=dict)


class ReplicationJobs:
    """What other sites have asked for. Thread-safe."""

    def __init__(self, cache: Cache, *, look_s: float = LOOK_S) -> None:
        self._cache = cache
        self._look_s = look_s
        self._orders: OrderedDict[str, ReplicationJob] = OrderedDict()
        self._changed = threading.Condition()
        self._turns = threading.BoundedSemaphore(MOST_RUNNING)
        self._closing = False

    def verbs(self) -> dict[str, Verb]:
        """For the peer server."""
        return {BEGIN: self.begin, LOOK: self.look}

    def begin(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Begin to fetch ``model``, or join where that is under way; the order's name."""
        url, revision = _read_order(body)
        with self._changed:
            for name, order in self._orders.items():
                same = (order.url, order.revision) == (url, revision)
                if same and order.state == "running":
                    return {"order": name}
            self._drop_old()
            name = secrets.token_hex(8)
            order = self._orders[name] = ReplicationJob(url, revision)
        threading.Thread(target=self._run, args=(order,), name="replicate", daemon=True).start()
        return {"order": name}

    def look(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """How far an order is, after ``look_s`` at most. ``KeyError`` where it is not known, or
        this agent ends: the client asks for it again once the agent was started anew."""
        name = body.get("order")
        if not isinstance(name, str):
            raise ValueError("order: must be the name that the order was given")
        with self._changed:
            order = self._orders[name]
            self._changed.wait_for(lambda: order.state != "running" or self._closing, self._look_s)
            if self._closing:
                raise KeyError(name)
            return {"state": order.state, "progress": asdict(order.progress), **order.told}

    def close(self) -> None:
        """Call off what is under way; what was fetched stays for the next time."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()

    def _drop_old(self) -> None:
        ended = [name for name, order in self._orders.items() if order.state != "running"]
        if len(self._orders) >= MOST_REMEMBERED:
            if not ended:
                raise ValueError(f"{MOST_REMEMBERED} models have been asked for already")
            del self._orders[ended[0]]

    def _run(self, order: ReplicationJob) -> None:
        def note(progress: Progress) -> None:
            order.progress = progress

        told: dict[str, Any]
        with self._turns:
            try:
                found = self._cache.preload(
                    order.url, revision=order.revision, priority=Priority.REPLICATE,
                    on_progress=note, cancelled=lambda: self._closing,
                )  # fmt: skip
                size = None if found.manifest is None else found.manifest.size_bytes
                state, told = "done", {"revision": found.revision, "size_bytes": size}
            except CacheError as error:
                state, told = "failed", {"error": str(error)}
            except Exception:
                self._end(order, "failed", {"error": "the agent failed at this; its log says how"})
                raise
        self._end(order, state, told)

    def _end(self, order: ReplicationJob, state: str, told: dict[str, Any]) -> None:
        with self._changed:
            order.state, order.told = state, told
            self._changed.notify_all()


def _read_order(body: Mapping[str, Any]) -> tuple[str, str | None]:
    url, revision = body.get("model"), body.get("revision")
    if not isinstance(url, str) or not (revision is None or isinstance(revision, str)):
        raise ValueError("model: a URL, and revision: text or null")
    if url.startswith(f"{PREPARED}://"):
        raise ValueError(f"{url}: each site makes its own, from the model that it was made of")
    ref = parse_ref(url, revision)
    if ref.scheme in ("file", PATH):
        raise ValueError(f"{url}: a path is another directory at another site")
    return url, revision


# -- the site that asks ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of it at one site."""

    site: str
    done: bool
    revision: str | None = None
    size_bytes: int | None = None
    error: str | None = None


@dataclass(slots=True)
class _Asked:
    """One site while it is being asked."""

    site: str
    client: PeerClient
    progress: Progress = field(default_factory=lambda: Progress(phase="waiting"))
    outcome: Outcome | None = None
    trouble: str = ""
    """Why it could not be asked when it was last tried; empty while it answers."""
    heard_at_s: float = field(default_factory=time.monotonic)


def replicate(
    url: str,
    revision: str | None,
    sites: Mapping[str, PeerClient],
    *,
    on_progress: OnProgress,
    cancelled: IsCancelled,
    give_up_s: float = GIVE_UP_S,
) -> dict[str, Outcome]:
    """Have every site fetch a model, all at once; blocks until the last has it or has failed.

    A site's failure is its outcome, and no other's. Raises ``ValueError`` for a model that another
    site cannot fetch; ``Cancelled``, and then the sites go on without us.
    """
    _read_order({"model": url, "revision": revision})
    asked = [_Asked(site, client) for site, client in sites.items()]
    threads = [
        threading.Thread(
            target=_ask_site, args=(one, url, revision, cancelled, give_up_s), daemon=True
        )
        for one in asked
    ]
    for thread in threads:
        thread.start()
    try:
        while any(thread.is_alive() for thread in threads):
            on_progress(_together(asked))
            if cancelled():
                raise Cancelled("cancelled here; the sites go on")
            next(thread for thread in threads if thread.is_alive() or thread is threads[-1]).join(
                0.25
            )
    finally:
        for one in asked:
            one.client.close()
    on_progress(_together(asked))
    return {one.site: one.outcome or Outcome(site=one.site, done=False) for one in asked}


def make_replicator(
    settings: ModelCacheSettings, environ: Mapping[str, str]
) -> Callable[[str, str | None, Sequence[str], OnProgress, IsCancelled], Mapping[str, Outcome]]:
    """:func:`replicate` to sites of the settings, by name.

    What it returns raises ``CacheError`` where the cluster's secret is missing, ``ValueError``
    where it is too short or a site is not known.
    """

    def run(
        url: str,
        revision: str | None,
        names: Sequence[str],
        on_progress: OnProgress,
        cancelled: IsCancelled,
    ) -> Mapping[str, Outcome]:
        token = read_token(environ, settings.peer_token_env)
        if not token:
            raise CacheError(
                f"other sites' agents want the cluster's secret: set {settings.peer_token_env}"
            )
        unknown = [name for name in names if name not in settings.sites]
        if unknown:
            raise ValueError(f"sites: {unknown[0]!r} is not in modelcache.sites")
        keyring, sender = Keyring(token), secrets.token_hex(16)
        clients = {name: PeerClient(settings.sites[name], keyring, sender) for name in names}
        return replicate(url, revision, clients, on_progress=on_progress, cancelled=cancelled)

    return run


def _together(asked: list[_Asked]) -> Progress:
    totals = [one.progress.bytes_total for one in asked]
    known = [total for total in totals if total is not None]
    rates = [one.progress.rate_bytes_s for one in asked if one.outcome is None]
    return Progress(
        phase="fetching",
        bytes_done=sum(one.progress.bytes_done for one in asked),
        bytes_total=sum(known) if len(known) == len(totals) else None,
        rate_bytes_s=sum(rate or 0.0 for rate in rates),
        detail=", ".join(f"{one.site}: {_state(one)}" for one in asked),
    )


def _state(one: _Asked) -> str:
    if one.outcome is not None:
        return "done" if one.outcome.done else "failed"
    how_far = one.progress.phase
    if one.progress.bytes_total:
        how_far = f"{one.progress.bytes_done / one.progress.bytes_total:.0%}"
    return f"{how_far} ({one.trouble})" if one.trouble else how_far


def _ask_site(
    one: _Asked, url: str, revision: str | None, cancelled: IsCancelled, give_up_s: float
) -> None:
    order: str | None = None
    while one.outcome is None and not cancelled():
        try:
            if order is None:
                order = _begin(one, url, revision, cancelled)
            answer = one.client.tell(LOOK, {"order": order}, ANSWER_S, cancelled)
            one.heard_at_s, one.trouble = time.monotonic(), ""
            one.outcome = _take_in(one, answer)
        except Cancelled:
            return
        except PeerRefused as error:
            one.outcome = Outcome(site=one.site, done=False, error=str(error))
        except (PeerUnavailable, PeerIntegrityError) as error:
            # It may have been started anew and know nothing of the order: it is asked for again.
            order, one.trouble = None, str(error)
            one.client.node = None
            if time.monotonic() - one.heard_at_s > give_up_s or isinstance(
                error, PeerIntegrityError
            ):
                one.outcome = Outcome(site=one.site, done=False, error=str(error))
            else:
                time.sleep(min(RETRY_S, give_up_s))


def _begin(one: _Asked, url: str, revision: str | None, cancelled: IsCancelled) -> str:
    one.client.hello(cancelled)
    body = {"model": url, "revision": revision}
    order = one.client.tell(BEGIN, body, ANSWER_S, cancelled).get("order")
    if not isinstance(order, str):
        raise PeerIntegrityError(f"{one.client.url}: an answer of another shape")
    return order


def _take_in(one: _Asked, answer: Mapping[str, Any]) -> Outcome | None:
    def unless_none(read: Callable[[object], T], name: str) -> T | None:
        return None if answer.get(name) is None else read(answer[name])

    try:
        one.progress, state = _read_progress(answer.get("progress")), answer.get("state")
        if state == "running":
            return None
        if state not in ("done", "failed"):
            raise BadMessage("a state that is none")
        return Outcome(
            site=one.site,
            done=state == "done",
            revision=unless_none(read_text, "revision"),
            size_bytes=unless_none(read_int, "size_bytes"),
            error=unless_none(read_text, "error"),
        )
    except BadMessage as error:
        raise PeerIntegrityError(f"{one.client.url}: an answer of another shape") from error


def _read_progress(given: object) -> Progress:
    if not isinstance(given, dict):
        raise BadMessage("a progress that is none")
    total, rate = given.get("bytes_total"), given.get("rate_bytes_s")
    return Progress(
        phase=read_text(given.get("phase")),
        bytes_done=read_int(given.get("bytes_done", 0)),
        bytes_total=None if total is None else read_int(total),
        rate_bytes_s=None if rate is None else read_seconds(rate),
        detail=read_text(given.get("detail", "")),
    )
