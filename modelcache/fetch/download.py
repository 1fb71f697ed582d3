"""One download under way: a plan decides which thread reads what, and threads of two kinds read it.

The calling thread watches: it notices that it is cancelled, reports progress, and has the last
word. Those that read from the source write straight into the partial file; those that ask peers
read into memory, because a piece is checked before one byte of it reaches the file.
"""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from urllib.parse import urlsplit

from modelcache.bandwidth.budget import Budget, Slots
from modelcache.bandwidth.throughput import PieceRead, Throughput, compare
from modelcache.fetch.plan import Board, PlannedFile, mask_of
from modelcache.peers.group import Follower, PeerGroup
from modelcache.peers.piece_inventory import FetchingFile, PieceInventory
from modelcache.peers.wire import PieceState
from modelcache.ports import IsCancelled, OnProgress, Source
from modelcache.settings import ModelCacheSettings
from modelcache.store.digest import count_pieces
from modelcache.store.partial_files import Partial
from modelcache.types import (
    FULL,
    CacheError,
    Cancelled,
    Damaged,
    NoSpace,
    Priority,
    Progress,
    RemoteFile,
)

JOIN_S = 5.0
MOST_REMEMBERED = 1_024
"""Files of which is remembered which peer gave which piece."""


TELL_S = 0.25
RATE_S = 5.0
GENTLE_S = 1.0
GENTLE_CONNECTIONS = 4
"""As long as others may be about to begin too, a node takes no more of a source than this: what
two read at the same time is read twice."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferTimeouts:
    """How long, in seconds of the download's clock, what a download waits for may take."""

    census_s: float = 0.5
    """Until every peer has said what it has, before the source is read."""
    join_s: float = JOIN_S
    """Until a thread notices the end. One that does not (a source's library that hangs) is left
    behind: it has a descriptor of its own, and commits nothing any more."""
    peer_piece_s: float = 4.0
    """What a piece from a peer is taken to need before one of its size has come."""
    slow_s: float = 3.0
    """From so long on, if it is ``SLOW_FACTOR`` times the usual, a peer's piece is read from the
    source too, unless the peer will have given the rest sooner."""
    lost_s: float = 5.0
    """From so long on, if it is ``LOST_FACTOR`` times the usual, it is not waited for at all."""
    most_s: float = 60.0
    """The longest wait for a peer's piece, where pieces do come sooner than that."""
    straggler_s: float = 10.0
    """What a connection to the source has at the least, however fast the others are."""
    tick_s: float = 0.1
    """Real time between two looks at whether it is still wanted, and at the owners of pieces."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Totals:
    """What has been read since the process began."""

    store_bytes: int = 0
    peer_bytes: int = 0
    wasted_bytes: int = 0
    """Read and thrown away: broken off, wrong, or twice."""
    retries: int = 0
    peer_failures: int = 0


@dataclass(slots=True)
class Suspicion:
    """Which peer gave which piece of a file, with which BLAKE3."""

    given: dict[int, tuple[str, bytes]] = field(default_factory=dict)
    doubted: bool = False


class TransferState:
    """Shared by the downloads of a process. Thread-safe."""

    def __init__(
        self,
        settings: ModelCacheSettings,
        *,
        peers: PeerGroup | None,
        clock: Callable[[], float],
        timeouts: TransferTimeouts,
    ) -> None:
        self.settings = settings
        self.timeouts = timeouts
        self.budget = Budget(settings)
        self.peers = peers
        self.clock = clock
        self.memory = Slots(settings.memory_bytes)
        self._slots: dict[str, Slots] = {}
        self._suspicions: OrderedDict[str, Suspicion] = OrderedDict()
        self._totals = Totals()
        self._lock = threading.Lock()

    def totals(self) -> Totals:
        """What has been read so far."""
        return self._totals

    def count(self, **more: int) -> None:
        """Add to the totals, by the names of their fields."""
        with self._lock:
            total = self._totals
            self._totals = replace(
                total, **{name: getattr(total, name) + value for name, value in more.items()}
            )

    def slots_of(self, url: str) -> Slots:
        """The connections to the source that ``url`` lies in, shared by all its models."""
        parts = urlsplit(url)
        # A hub's models all lie in one source; elsewhere the host or bucket is one.
        source = parts.scheme if parts.scheme == "hf" else f"{parts.scheme}://{parts.netloc}"
        with self._lock:
            return self._slots.setdefault(source, Slots(self.settings.connections))

    def note_given(self, key: str, index: int, node: str, digest: bytes) -> None:
        """A piece was taken from a peer."""
        with self._lock:
            found = self._suspicions.setdefault(key, Suspicion())
            self._suspicions.move_to_end(key)
            found.given[index] = (node, digest)
            if len(self._suspicions) > MOST_REMEMBERED:
                self._suspicions.popitem(last=False)

    def doubt(self, key: str) -> None:
        """The file was whole, and wrong: take it from the source alone, and find the peer that sent
        wrong bytes."""
        with self._lock:
            self._suspicions.setdefault(key, Suspicion()).doubted = True

    def doubted(self, key: str) -> bool:
        """Whether the file must come from the source alone."""
        with self._lock:
            found = self._suspicions.get(key)
            return found is not None and found.doubted

    def compare(self, key: str, index: int, digest: bytes) -> None:
        """The source's own bytes of a piece: a peer that gave others is left alone from now on."""
        with self._lock:
            found = self._suspicions.get(key)
            node, given = ("", digest) if found is None else found.given.get(index, ("", digest))
        if given != digest and self.peers is not None:
            self.peers.ban(node, f"piece {index} of {key} is not what the source has")

    def believe(self, key: str) -> None:
        """The file is whole and right: which peer gave what need not be remembered."""
        with self._lock:
            self._suspicions.pop(key, None)


@dataclass(slots=True, eq=False)
class DownloadJob:
    """One file of a download."""

    remote: RemoteFile
    partial: Partial
    file: PlannedFile
    fetching_file: FetchingFile


@dataclass(slots=True, kw_only=True, eq=False)
class Attempt(PieceRead):
    """One reading of one piece."""

    job: DownloadJob
    index: int
    start: int
    """Where in the file it begins: behind what is there of the piece."""


class Download:
    """Fetches the missing pieces of some files. Used once."""

    def __init__(
        self,
        shared: TransferState,
        source: Source,
        files: Sequence[tuple[RemoteFile, Partial]],
        *,
        priority: Priority,
        on_progress: OnProgress,
        cancelled: IsCancelled,
    ) -> None:
        self.shared = shared
        self.source = source
        self.model = source.ref.url
        self.priority = priority
        self.settings = shared.settings
        self.share = shared.budget.share(self.model, self.model, priority)
        self.slots = shared.slots_of(self.model)
        self.peers = shared.peers
        self.clock = shared.clock
        self.lock = threading.Lock()
        self.watcher = threading.Condition(self.lock)
        self.source_work = threading.Condition(self.lock)
        self.peer_work = threading.Condition(self.lock)
        self.reading: set[Attempt] = set()
        self.asking: set[Attempt] = set()
        self.source_throughput = Throughput()
        self.peer_throughput = Throughput()
        self.source_limit = self.settings.connections
        self.problem: BaseException | None = None
        self.over = False
        self._ended = False
        self._began_s = self.clock()
        self._on_progress = on_progress
        self._cancelled = cancelled
        self._committing = 0
        self._given_bytes = 0
        self._threads: list[threading.Thread] = []
        self._samples: deque[tuple[float, int]] = deque()
        self._inventory = self.peers.inventory if self.peers is not None else PieceInventory()
        self._total_bytes = sum(partial.size_bytes for _, partial in files)
        self._done_bytes = self._told_bytes = sum(partial.bytes_done for _, partial in files)
        self.jobs = [self._job(remote, partial) for remote, partial in files if partial.missing()]
        me = self.peers.me if self.peers is not None else None
        self.board = Board(
            me=me, files=[job.file for job in self.jobs], expects_others=self.peers is not None
        )
        self._job_of = {id(job.file): job for job in self.jobs}
        sizes = [min(job.partial.piece_bytes, job.partial.size_bytes) for job in self.jobs]
        self._piece_bytes = max(sizes, default=0)

    def _job(self, remote: RemoteFile, partial: Partial) -> DownloadJob:
        missing = mask_of(partial.missing())
        count = count_pieces(partial.size_bytes, partial.piece_bytes)
        file = PlannedFile(key=partial.key, count=count, missing=missing)
        return DownloadJob(remote, partial, file, self._inventory.open(partial))

    def run(self, from_source: Callable[[], None], from_peers: Callable[[], None]) -> None:
        """Fetch all of it, or raise why not. On return no thread of it commits anything.

        ``from_source`` and ``from_peers`` are what each thread of the two kinds runs.
        """
        try:
            follower = self._follow()
            self._start(from_source, from_peers)
            self._watch()
        finally:
            self._stop()
        del follower
        for job in self.jobs:
            if self.shared.doubted(job.partial.key):
                self.shared.believe(job.partial.key)

    def job_of(self, file: PlannedFile) -> DownloadJob:
        """The job of a file on the board."""
        return self._job_of[id(file)]

    def attempt(self, file: PlannedFile, index: int, *, whole: bool) -> Attempt:
        """A reading of a piece, about to begin: of the ``whole`` piece, or of what is not there of
        it."""
        job = self.job_of(file)
        start, end = job.partial.span(index)
        # A byte at the least: what nothing is asked for would never be seen to end.
        start += 0 if whole else min(job.partial.beginning(index), end - start - 1)
        return Attempt(
            job=job, index=index, start=start, size_bytes=end - start, began_s=self.clock()
        )

    # -- peers' news -----------------------------------------------------------------------------

    def _follow(self) -> Follower | None:
        if self.peers is None or not self.jobs:
            return None
        follower = Follower(
            keys=self._keys,
            on_states=self._on_states,
            on_lost=self._on_lost,
            stopped=lambda: self.over,
        )
        self._threads += self.peers.follow(follower)
        until_s = self.clock() + self.shared.timeouts.census_s
        with self.watcher:
            while self.clock() < until_s and not self.peers.settled(follower):
                self._check()
                self.watcher.wait(0.02)
        return follower

    def _keys(self) -> list[str]:
        with self.lock:
            keys = [job.partial.key for job in self.jobs if job.file.missing]
        return [key for key in keys if not self.shared.doubted(key)]

    def _on_states(self, node: str, states: Mapping[str, PieceState]) -> None:
        believed = {key: one for key, one in states.items() if not self.shared.doubted(key)}
        with self.lock:
            if self.board.learn(node, believed, self.clock()):
                self.peer_work.notify(self.settings.peer_connections)

    def _on_lost(self, node: str) -> None:
        with self.lock:
            self.board.lose(node)

    # -- watching --------------------------------------------------------------------------------

    def _start(self, from_source: Callable[[], None], from_peers: Callable[[], None]) -> None:
        with self.lock:
            left = self.board.left
            self._settle()
        for _ in range(min(self.settings.connections, left)):
            self._threads.append(threading.Thread(target=from_source, name="source", daemon=True))
        if self.peers is not None:
            for _ in range(min(self.settings.peer_connections, left)):
                self._threads.append(threading.Thread(target=from_peers, name="ask", daemon=True))
        for thread in self._threads:
            if thread.ident is None:
                thread.start()

    def _watch(self) -> None:
        told_s = -TELL_S
        while True:
            with self.watcher:
                if self._check():
                    break
                self._settle()
                self.watcher.wait(self.shared.timeouts.tick_s)
            if self.clock() - told_s >= TELL_S:
                told_s = self.clock()
                self._on_progress(self._progress())
        self._on_progress(self._progress())

    def _check(self) -> bool:
        """Whether all is there. Raises what went wrong."""
        if self.problem is not None:
            raise self.problem
        if self._cancelled():
            raise Cancelled(f"fetching {self.model} was cancelled")
        return self.board.left == 0 and self._committing == 0

    def _settle(self) -> None:
        """See which nodes there are, and which is to read what."""
        now_s = self.clock()
        board = self.board
        board.away = self.peers.away() if self.peers is not None else frozenset()
        compare(self.reading, now_s)
        for one in self.asking:
            one.note(now_s)
        usual_s = self.source_throughput.expected_s(self._piece_bytes)
        oldest_s = max((now_s - one.began_s for one in self.reading), default=None)
        if usual_s is not None or oldest_s is not None:
            board.piece_s = max(usual_s or 0.0, oldest_s or 0.0)
        nodes = board.settle(now_s)
        connections = self.settings.connections
        # Together the nodes keep about as many connections as one alone, so that pieces come whole
        # one after another, for others to have, and not all at the very end.
        self.source_limit = max(2, -(-connections // nodes)) if nodes > 1 else connections
        if board.expects_others and nodes == 1 and now_s - self._began_s < GENTLE_S:
            self.source_limit = min(connections, GENTLE_CONNECTIONS)
        if self.source_limit > len(self.reading):
            self.source_work.notify(self.source_limit - len(self.reading))
        self.peer_work.notify()

    def _progress(self) -> Progress:
        with self.lock:
            moving = sum(job.partial.bytes_begun for job in self.jobs)
            # By piece, as two may read the same one; part of what came of it may be kept already.
            ahead: dict[tuple[DownloadJob, int], int] = {}
            for one in (*self.reading, *self.asking):
                job, index = one.job, one.index
                kept = job.partial.span(index)[0] + job.partial.beginning(index)
                more = one.start + one.moved_bytes - kept
                ahead[job, index] = max(more, ahead.get((job, index), 0))
            moving += sum(ahead.values())
            # What was thrown away is read again before it counts anew: a bar does not go back.
            done = max(self._told_bytes, min(self._total_bytes, self._done_bytes + moving))
            self._told_bytes = done
            given, nodes = self._given_bytes, len({n for f in self.board.files for n in f.peers})
        now_s = self.clock()
        self._samples.append((now_s, done))
        while len(self._samples) > 2 and now_s - self._samples[1][0] > RATE_S:
            self._samples.popleft()
        since_s, before = self._samples[0]
        rate = (done - before) / (now_s - since_s) if now_s > since_s else None
        detail = f"{given / 1e9:.1f} GB from {nodes} peers" if given else ""
        return Progress(
            phase="fetching",
            bytes_done=done,
            bytes_total=self._total_bytes,
            rate_bytes_s=None if rate is None else max(0.0, rate),
            detail=detail,
        )

    def _stop(self) -> None:
        with self.lock:
            self.over = True
            for condition in (self.watcher, self.source_work, self.peer_work):
                condition.notify_all()
        if self.peers is not None:
            self.peers.wake()
        until_s = self.clock() + self.shared.timeouts.join_s
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(max(0.0, until_s - self.clock()))
        with self.watcher:
            self._ended = True
            while self._committing:
                self.watcher.wait(self.shared.timeouts.tick_s)
        for job in self.jobs:
            job.fetching_file.close()

    # -- what readers call ---------------------------------------------------------------------

    def fail(self, problem: BaseException) -> None:
        """It cannot be done; the first reason is the one told."""
        with self.lock:
            self.problem = self.problem or problem
            self.watcher.notify_all()

    @contextlib.contextmanager
    def commits(self) -> Iterator[None]:
        """While a piece is committed, the end is put off. Raises ``Cancelled`` after it."""
        with self.lock:
            if self.over:
                raise Cancelled("not wanted any more")
            self._committing += 1
        try:
            yield
        finally:
            with self.lock:
                self._committing -= 1
                if self.over or (self.board.left == 0 and self._committing == 0):
                    self.watcher.notify_all()

    def keep(self, attempt: Attempt) -> int:
        """Keep what came of a piece that is not whole, for the next attempt at it, in this run or
        in the next; how many bytes came to be of use."""
        job, index = attempt.job, attempt.index
        with self.lock:
            if self._ended:
                return 0
            self._committing += 1
        try:
            start, _ = job.partial.span(index)
            job.partial.keep(index, attempt.start - start + attempt.moved_bytes)
            return attempt.moved_bytes
        except (OSError, ValueError):
            return 0  # the disk fails, or the file became whole meanwhile
        finally:
            with self.lock:
                self._committing -= 1
                self.watcher.notify_all()

    def commit(self, job: DownloadJob, index: int) -> bytes:
        """Count a piece as good, by what the file has now; its BLAKE3. Within :meth:`commits`."""
        try:
            return job.partial.commit(index)
        except Damaged:
            # The last piece made it whole, and it is not what its source says it is.
            self.shared.doubt(job.partial.key)
            raise
        except OSError as error:
            kind = NoSpace if error.errno in FULL else CacheError
            raise kind(f"{job.remote.path}: {error.strerror}") from error

    def done(self, attempt: Attempt, *, given: bool) -> None:
        """A piece is there, from a peer (``given``) or from the source."""
        start, end = attempt.job.partial.span(attempt.index)
        size_bytes = end - start
        with self.lock:
            self.board.done(attempt.job.file, attempt.index)
            self.reading.discard(attempt)  # or it would be counted twice
            self.asking.discard(attempt)
            self._done_bytes += size_bytes
            self._given_bytes += size_bytes if given else 0
            pace = self.peer_throughput if given else self.source_throughput
            pace.learn(attempt.size_bytes, self.clock() - attempt.began_s)
        if given:
            self.shared.count(peer_bytes=attempt.size_bytes)
        else:
            self.shared.count(store_bytes=attempt.size_bytes)
