"""Files from a source and from peers into partial files, piece by piece, until none is missing.

A piece comes in one of two ways: from the source into the file, or from a peer into memory first.
One ``Transfer`` serves a process: its downloads share a ``TransferState``.
``modelcache.fetch.download`` is one of them under way.
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence

from modelcache.fetch.download import (
    Attempt,
    Download,
    DownloadJob,
    Totals,
    TransferState,
    TransferTimeouts,
)
from modelcache.fetch.plan import PlannedFile
from modelcache.peers.client import PeerBusy
from modelcache.peers.group import PeerGroup
from modelcache.peers.piece_inventory import FetchingFile
from modelcache.ports import ANNOUNCE_BYTES, IsCancelled, OnProgress, RangeRead, Source
from modelcache.settings import ModelCacheSettings
from modelcache.sources.retry import pause
from modelcache.store.partial_files import Partial
from modelcache.types import (
    FULL,
    PIECE_BYTES,
    CacheError,
    Cancelled,
    Damaged,
    NoSpace,
    Priority,
    RemoteFile,
    SourceError,
)

LOG = logging.getLogger("tidegate.modelcache")

STREAM_BYTES = 2 * ANNOUNCE_BYTES
"""Memory that is set aside for a range from a source: what is read ahead, and a copy of it."""

KEEP_S = 2.0
"""How often what has come of a piece is kept, where it takes so long: a killed process loses no
more than that."""

WAIT_S = 0.5
WRITES = 2
"""Times that a checked piece is written before the disk is given up on."""

SLOW_FACTOR, LOST_FACTOR = 4.0, 8.0
"""How many times the usual for its size: see ``TransferTimeouts``."""

MOST_CUTS = 2
"""Times that a piece's connection is cut for being slow. Failures are counted apart."""


class SourceReader:
    """Reads pieces from the source."""

    def __init__(self, download: Download) -> None:
        self.download = download
        self.shared = download.shared
        self.tries: dict[tuple[str, int], int] = {}
        self.cuts: dict[tuple[str, int], int] = {}
        self._waiting = 0

    def run(self) -> None:
        """What each of its threads does."""
        with _failing_with(self.download):
            self._run()

    def _run(self) -> None:
        own = self.download
        while not own.over:
            if not self._enter():
                continue
            try:
                own.slots.take(own.model, own.priority, 1, lambda: own.over)
            except Cancelled:
                self._leave()
                continue
            attempt = None
            try:
                attempt = self._pick()
                if attempt is not None:
                    self._read(attempt)
            finally:
                own.slots.give_back(own.model, 1)
                self._leave(idle=attempt is None)

    def _enter(self) -> bool:
        """Whether one more may read; waits a little if not."""
        own = self.download
        with own.lock:
            if self._waiting >= own.source_limit or not own.board.left:
                own.source_work.wait(WAIT_S)
                return False
            self._waiting += 1
            return True

    def _leave(self, *, idle: bool = False) -> None:
        own = self.download
        with own.lock:
            self._waiting -= 1
            if idle and not own.over:
                own.source_work.wait(WAIT_S)

    def _pick(self) -> Attempt | None:
        own = self.download
        with own.lock:
            now_s = own.clock()
            found = own.board.next_from_source(now_s) or own.board.hedge(self._slow(now_s))
            if found is None:
                self._give_up_stragglers(now_s)
                return None
            attempt = own.attempt(*found, whole=False)
            own.reading.add(attempt)
            return attempt

    def _slow(self, now_s: float) -> list[tuple[PlannedFile, int]]:
        """Pieces that a peer takes too long over, and the source would have sooner."""
        own, slow, timeouts = self.download, [], self.shared.timeouts
        for one in own.asking:
            usual_s = own.peer_throughput.expected_s(one.size_bytes)
            limit_s = max(
                timeouts.slow_s,
                SLOW_FACTOR * (timeouts.peer_piece_s if usual_s is None else usual_s),
            )
            if one.lost(now_s, own.source_throughput.expected_s(one.size_bytes) or 0.0, limit_s):
                slow.append((one.job.file, one.index))
        return slow

    def _give_up_stragglers(self, now_s: float) -> None:
        """A connection that is far slower than the others, at the end when all wait for it, is
        cut, and its piece asked for again. Not where a cap may be what it waits for, nor where it
        is not much farther from its end than a new one would be.

        The last one of all may have no other to be compared with; then those before it count, and
        once only: it may be the line that has become slow.
        """
        own = self.download
        if own.share.caps:
            return
        for one in own.reading:
            cuts = self.cuts.get((one.job.partial.key, one.index), 0)
            if one.given_up or not one.asked or cuts >= MOST_CUTS:
                continue
            fresh_s, factor = one.fresh_s(), SLOW_FACTOR
            if fresh_s is None and len(own.reading) == 1 and not cuts:
                fresh_s, factor = own.source_throughput.slowest_s(one.size_bytes), LOST_FACTOR
            if fresh_s is not None:
                limit_s = max(self.shared.timeouts.straggler_s, factor * fresh_s)
                one.given_up = one.lost(now_s, SLOW_FACTOR * fresh_s, limit_s)

    def _read(self, attempt: Attempt) -> None:
        own, job, index = self.download, attempt.job, attempt.index
        good = False
        kept_bytes = 0
        job.fetching_file.begin(index)
        try:
            self._fetch(attempt)
            with own.commits():
                digest = own.commit(job, index)
                if self.shared.doubted(job.partial.key):
                    self.shared.compare(job.partial.key, index, digest)
                job.fetching_file.end(index, good=True)
                good = True
                self.tries.pop((job.partial.key, index), None)
                self.cuts.pop((job.partial.key, index), None)
                own.done(attempt, given=False)
        except Cancelled:
            kept_bytes = own.keep(attempt)
            if not own.over:
                self._cut(attempt)
        except SourceError as error:
            kept_bytes = own.keep(attempt) if error.retryable else 0
            self._again(attempt, error)
        except Damaged as error:
            # Its last piece came from the source, so this one is right whatever the others are.
            own.fail(error)
        except (CacheError, OSError) as error:
            own.fail(error if isinstance(error, CacheError) else _disk(job, error))
        finally:
            if not good:
                job.fetching_file.end(index, good=False)
                wasted_bytes = attempt.moved_bytes - kept_bytes
                self.shared.count(store_bytes=kept_bytes, wasted_bytes=wasted_bytes)
            with own.lock:
                own.reading.discard(attempt)

    def _fetch(self, attempt: Attempt) -> None:
        own = self.download
        end = attempt.start + attempt.size_bytes

        def stopped() -> bool:
            return own.over or attempt.given_up

        with self._memory(stopped):
            attempt.begin(own.clock())
            fd = attempt.job.fetching_file.duplicate()
            try:
                with own.share.meter(attempt.size_bytes, stopped) as meter:
                    kept_s = own.clock()

                    def arrived(count: int) -> None:
                        nonlocal kept_s
                        attempt.moved_bytes += count
                        if own.clock() - kept_s >= KEEP_S:
                            own.keep(attempt)
                            kept_s = own.clock()
                        meter.count(count)

                    want = RangeRead(file=attempt.job.remote, start=attempt.start, end=end, fd=fd,
                                     on_bytes=arrived, cancelled=stopped)  # fmt: skip
                    own.source.fetch(want)
            finally:
                os.close(fd)

    @contextlib.contextmanager
    def _memory(self, stopped: IsCancelled) -> Iterator[None]:
        own = self.download
        self.shared.memory.take(own.model, own.priority, STREAM_BYTES, stopped)
        try:
            yield
        finally:
            self.shared.memory.give_back(own.model, STREAM_BYTES)

    def _cut(self, attempt: Attempt) -> None:
        """Put a piece back whose connection was too slow, to be read anew at once."""
        own, key = self.download, (attempt.job.partial.key, attempt.index)
        self.shared.count(retries=1)
        with own.lock:
            self.cuts[key] = self.cuts.get(key, 0) + 1
            own.board.drop_source(attempt.job.file, attempt.index, own.clock())

    def _again(self, attempt: Attempt, error: SourceError) -> None:
        """Put a piece back, to be read after a pause; or give up."""
        own = self.download
        key = (attempt.job.partial.key, attempt.index)
        tries = self.tries.get(key, 0)
        if not error.retryable or tries >= own.settings.retries:
            own.fail(error)
            return
        self.tries[key] = tries + 1
        self.shared.count(retries=1)
        pause_s = pause(tries, random.random(), error.retry_after_s)
        with own.lock:
            own.board.drop_source(attempt.job.file, attempt.index, own.clock() + pause_s)


class PeerReader:
    """Reads pieces from peers."""

    def __init__(self, download: Download) -> None:
        self.download = download
        self.shared = download.shared
        self.busy: dict[str, int] = {}
        self.tie: dict[str, float] = {}

    def run(self) -> None:
        """What each of its threads does."""
        with _failing_with(self.download):
            self._run()

    def _run(self) -> None:
        own = self.download
        buffer: bytearray | None = None
        try:
            while not own.over:
                found = self._pick()
                if found is None:
                    if buffer is not None:
                        buffer = None
                        self._free()
                    with own.lock:
                        if not own.over:
                            own.peer_work.wait(WAIT_S)
                    continue
                attempt, node = found
                try:
                    if buffer is None:
                        own.shared.memory.take(
                            own.model, own.priority, PIECE_BYTES, lambda: own.over
                        )
                        buffer = bytearray(PIECE_BYTES)
                    self._read(attempt, node, memoryview(buffer))
                except Cancelled:
                    continue
                finally:
                    self._left(attempt, node)
        finally:
            if buffer is not None:
                self._free()

    def _free(self) -> None:
        own = self.download
        own.shared.memory.give_back(own.model, PIECE_BYTES)

    def _pick(self) -> tuple[Attempt, str] | None:
        own = self.download
        with own.lock:
            nodes = {node for file in own.board.files for node in file.peers}
            for node in nodes - self.tie.keys():
                self.tie[node] = random.random()
            each = max(2, -(-own.settings.peer_connections // max(1, len(nodes))))
            found = own.board.next_peer(self.busy, each, self.tie)
            if found is None:
                return None
            file, index, node = found
            self.busy[node] = self.busy.get(node, 0) + 1
            attempt = own.attempt(file, index, whole=True)
            own.asking.add(attempt)
            return attempt, node

    def _left(self, attempt: Attempt, node: str) -> None:
        own = self.download
        with own.lock:
            self.busy[node] -= 1
            own.asking.discard(attempt)
            own.board.drop_peer(attempt.job.file, attempt.index)

    def _read(self, attempt: Attempt, node: str, buffer: memoryview) -> None:
        own, job, index = self.download, attempt.job, attempt.index
        start, end = job.partial.span(index)
        into = buffer[: end - start]
        attempt.begin(own.clock())
        good = False
        try:
            digest = self._ask(attempt, node, into)
            if digest is not None and self._still_wanted(attempt):
                good = self._keep(attempt, node, into, start, digest)
        except (CacheError, OSError) as error:
            if isinstance(error, Cancelled):
                raise
            own.fail(error if isinstance(error, CacheError) else _disk(job, error))
        finally:
            if not good:
                self.shared.count(wasted_bytes=attempt.moved_bytes)

    def _ask(self, attempt: Attempt, node: str, into: memoryview) -> bytes | None:
        own, job, index = self.download, attempt.job, attempt.index
        assert own.peers is not None

        def arrived(count: int) -> None:
            attempt.moved_bytes += count

        def stopped() -> bool:
            return own.over or not job.file.missing >> index & 1

        try:
            digest = own.peers.fetch(
                node, job.partial.key, index, into, timeout_s=self._limit_s(len(into)),
                cancelled=stopped, on_bytes=arrived,
            )  # fmt: skip
        except PeerBusy:
            return None
        if digest is None:
            self.shared.count(peer_failures=1)
            with own.lock:
                if attempt.moved_bytes * 2 > len(into):
                    # It came, if too slowly: next time it is known how long one takes.
                    took_s = own.clock() - attempt.began_s
                    own.peer_throughput.learn(len(into), took_s * len(into) / attempt.moved_bytes)
                own.board.refuse(job.file, index, node)
                own.board.away = own.peers.away()
        return digest

    def _limit_s(self, size_bytes: int) -> float:
        """Seconds to wait for a peer's piece at the most."""
        with self.download.lock:
            usual_s = self.download.peer_throughput.expected_s(size_bytes)
        timeouts = self.shared.timeouts
        if usual_s is None:
            usual_s = timeouts.peer_piece_s
        most_s = max(timeouts.most_s, SLOW_FACTOR * usual_s)
        return min(most_s, max(timeouts.lost_s, LOST_FACTOR * usual_s))

    def _still_wanted(self, attempt: Attempt) -> bool:
        """Whether no other reader has it, or is writing it: then it may be written here, and no
        other begins to."""
        own, bit = self.download, 1 << attempt.index
        with own.lock:
            file = attempt.job.file
            own.asking.discard(attempt)
            return bool(file.missing & bit) and not file.storing & bit

    def _keep(
        self, attempt: Attempt, node: str, into: memoryview, start: int, digest: bytes
    ) -> bool:
        own, job, index = self.download, attempt.job, attempt.index
        with own.commits():
            self.shared.note_given(job.partial.key, index, node, digest)
            for _ in range(WRITES):
                write_all(job.fetching_file, into, start)
                if own.commit(job, index) == digest:
                    break
            else:
                raise CacheError(f"{job.remote.path}: the disk does not give back what is written")
            own.done(attempt, given=True)
        return True


@contextlib.contextmanager
def _failing_with(download: Download) -> Iterator[None]:
    """An unforeseen error (a source's library fails in a way of its own) ends the download:
    without the thread that it ended, a piece would be waited for without end."""
    try:
        yield
    except BaseException as error:
        LOG.exception("fetching %s", download.model)
        problem = CacheError(f"fetching {download.model} failed: {type(error).__name__}: {error}")
        problem.__cause__ = error
        download.fail(problem)


def _disk(job: DownloadJob, error: OSError) -> CacheError:
    kind = NoSpace if error.errno in FULL else CacheError
    return kind(f"{job.remote.path} cannot be written: {error.strerror or error}")


def write_all(holding: FetchingFile, data: memoryview, start: int) -> None:
    """Write bytes into a file that is being fetched."""
    fd = holding.duplicate()
    try:
        at = 0
        while at < len(data):
            at += os.pwrite(fd, data[at:], start + at)
    finally:
        os.close(fd)


class Transfer:
    """Downloads, sharing what there is. Thread-safe."""

    def __init__(
        self,
        settings: ModelCacheSettings,
        *,
        peers: PeerGroup | None = None,
        clock: Callable[[], float] = time.monotonic,
        timeouts: TransferTimeouts = TransferTimeouts(),  # noqa: B008 - it is frozen
    ) -> None:
        self.state = TransferState(settings, peers=peers, clock=clock, timeouts=timeouts)
        self._running: dict[str, int] = {}
        self._lock = threading.Lock()

    def run(
        self,
        source: Source,
        files: Sequence[tuple[RemoteFile, Partial]],
        *,
        priority: Priority = Priority.PRELOAD,
        on_progress: OnProgress | None = None,
        cancelled: IsCancelled | None = None,
    ) -> None:
        """Fetch every missing piece of ``files``; blocks until all are committed.

        ``on_progress`` is called from this thread a few times a second, ``cancelled`` more often.
        Raises ``SourceError`` where the source fails a piece ``retries`` + 1 times in a row or says
        that asking again is of no use; ``Cancelled``; ``Damaged`` where a file that became whole
        is not what its source says (run again with a fresh ``Partial``: it then comes from the
        source alone); ``CacheError`` where the disk fails.
        """
        model = source.ref.url
        with self._lock:
            self._running[model] = self._running.get(model, 0) + 1
        try:
            download = Download(
                self.state,
                source,
                files,
                priority=priority,
                on_progress=on_progress or (lambda progress: None),
                cancelled=cancelled or (lambda: False),
            )
            download.run(SourceReader(download).run, PeerReader(download).run)
        finally:
            with self._lock:
                self._running[model] -= 1
                last = not self._running[model]
                if last:
                    del self._running[model]
            if last:
                self.state.budget.forget(model)

    def totals(self) -> Totals:
        """What has been read so far."""
        return self.state.totals()
