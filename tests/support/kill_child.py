"""A program whose children work on a model cache until they are killed.

It imports everything once and forks a child for each run, so a run begins within milliseconds.
One JSON order a line on standard input, one JSON answer a line on standard output. A child is
killed before (or in the middle of) its n-th step, or so many seconds after it began; a step is a
call that changes something on the disk, or reads a file. A child that gets to its end is killed
there.

Whatever a child leaves running is adopted by this program, which waits for it to end.
"""

from __future__ import annotations

import builtins
import contextlib
import ctypes
import json
import os
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from folder_store import make_room

from modelcache.cache import ModelCache
from modelcache.fetch.transfer import Transfer
from modelcache.pagecache import residency
from modelcache.pagecache.holder import PageHolder
from modelcache.prepare.run import Results
from modelcache.settings import ModelCacheSettings
from modelcache.sources.opening import open_source
from modelcache.store.files import open_lock, try_lock
from modelcache.store.records import StepRecord
from modelcache.types import FileRange, Made

PIECE_BYTES = 65_536
CONNECTIONS = 4
END_S = 60.0
"""Seconds after which a child, or what it left running, counts as hanging."""

BEGAN = b"\n"
PR_SET_CHILD_SUBREAPER = 36

LATE = ("httpx", "modelcache.sources.http")
"""What the cache imports when it first needs it."""

STEPS = (
    "copy_file_range", "fchmod", "fsync", "ftruncate", "link", "mkdir", "open", "posix_fadvise",
    "pwrite", "rename", "rmdir", "sendfile", "splice", "symlink", "unlink", "utime", "write",
)  # fmt: skip


def make_cache(directory: Path, quota_bytes: int | None = None) -> ModelCache:
    """A cache as the gateway makes it, with small pieces and few connections."""
    # No certificates, hub or netrc of this machine's: reading them takes longer than a test.
    environ = {"SSL_CERT_DIR": "/nowhere", "HOME": "/nowhere"}
    settings = ModelCacheSettings(
        connections=CONNECTIONS,
        quota_bytes=quota_bytes,
        reserve_bytes=0,
        hub_dirs=(Path("/nowhere"),),
    )
    return ModelCache(
        settings,
        dir=directory,
        open_source=lambda ref: open_source(ref, settings=settings, environ=environ),
        transfer=Transfer(settings),
        environ=environ,
        piece_bytes=PIECE_BYTES,
    )


def files_of(directory: Path) -> list[FileRange]:
    """All files of a model, as prewarming wants them."""
    return [FileRange(path=str(path)) for path in sorted(directory.rglob("*")) if path.is_file()]


# What a child does. Each may be told more by its order.


def preload(cache: ModelCache, order: Mapping[str, Any]) -> None:
    """Download, after an eviction where the quota wants one."""
    cache.preload(order["url"])


def evict(cache: ModelCache, order: Mapping[str, Any]) -> None:
    """Evict one model."""
    cache.evict(order["url"])


def evict_much(cache: ModelCache, order: Mapping[str, Any]) -> None:
    """Evict whatever it takes."""
    make_room(cache, order["size_bytes"])


def publish(cache: ModelCache, order: Mapping[str, Any]) -> None:
    """Make a directory a model, without copying it."""
    cache.publish(Path(order["from"]), url=order["url"], revision=order["revision"])


def repair(cache: ModelCache, order: Mapping[str, Any]) -> None:
    """Check a model, and fetch what is damaged."""
    cache.verify(order["url"], repair=True)


def prewarm(cache: ModelCache, order: Mapping[str, Any]) -> None:
    """Read a model's pages under a lease, and have a page holder keep them."""
    model = cache.find(order["url"])
    assert model is not None
    files = files_of(model.path)
    with cache.lease(model, "prewarming"):
        keeper = PageHolder(budget_bytes=1 << 30, touch_s=0.5) if order["keep"] else None
        if keeper is not None:
            keeper.keep(model.url, files)
        residency.prewarm(files)
        while keeper is not None and keeper.status().rounds == 0:
            time.sleep(0.005)


def take_over(cache: ModelCache, order: Mapping[str, Any]) -> None:
    """Take a preparation step's result into the cache, once the step has ended."""
    results, key, job = Results(cache), order["key"], job_of(order)
    with open_lock(cache.store.layout.step_lock(key)) as lock:
        assert try_lock(lock)
        if not results.is_finished(key):
            output = results.begin(key, job)
            for path in sorted(Path(order["from"]).iterdir()):
                with open(output / path.name, "wb") as file:
                    file.write(path.read_bytes())
            results.note_finished(key, job, 1.0)
        assert job.made is not None
        held = results.publish(
            key, job.made, "its user", final=True,
            on_progress=lambda progress: None, cancelled=lambda: False,
        )  # fmt: skip
        held.lease.release()


def job_of(order: Mapping[str, Any]) -> StepRecord:
    """What that step is."""
    made = Made(model=order["url"], revision="r", steps=("command",))
    return StepRecord(made=made, resumes=False, promised_bytes=order["size_bytes"])


VERBS = {
    verb.__name__: verb
    for verb in (preload, evict, evict_much, publish, repair, prewarm, take_over)
}


class Steps:
    """Counts the steps of this process, and kills it at one of them."""

    def __init__(self, last: int | None, part: float) -> None:
        self.count = 0
        self._last = last
        self._part = part
        self._lock = threading.Lock()

    def watch(self) -> None:
        """Count from now on."""
        for name in STEPS:
            setattr(os, name, self._watched(name, getattr(os, name)))
        builtins.open = self._watched("create", builtins.open)

    def _watched(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*arguments: Any, **named: Any) -> Any:
            with self._lock:
                if self.count == self._last:
                    torn = self._tear(name, arguments)
                    if torn is not None:
                        call(*torn, **named)
                    os.kill(os.getpid(), signal.SIGKILL)
                    time.sleep(END_S)
                self.count += 1
            return call(*arguments, **named)

        return watched

    def _tear(self, name: str, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """The same call for a part of its bytes, where it has any; opening a file makes it."""
        if name == "create":
            return arguments
        if name in ("write", "pwrite"):
            data = bytes(arguments[1])
            return arguments[0], data[: int(len(data) * self._part)], *arguments[2:]
        if name == "splice":
            return *arguments[:2], max(1, int(arguments[2] * self._part)), *arguments[3:]
        return None


def child(order: Mapping[str, Any], told: int) -> None:
    """One run; it never returns."""
    report: dict[str, Any] = {}
    write = os.write  # the report is no step
    try:
        cache = make_cache(Path(order["dir"]), order.get("quota_bytes"))
        if order["verb"] == "prewarm":
            found = cache.find(order["url"])
            assert found is not None
            residency.drop(files_of(found.path))
        steps = Steps(order.get("step"), order.get("part", 0.0))
        steps.watch()
        write(told, BEGAN)
        began_s = time.monotonic()
        VERBS[order["verb"]](cache, order)
        report = {"seconds": time.monotonic() - began_s, "steps": steps.count}
    except BaseException:  # noqa: BLE001 (the parent is told, whatever it is)
        report = {"problem": traceback.format_exc()}
    write(told, json.dumps(report).encode())
    os.kill(os.getpid(), signal.SIGKILL)


def run(order: Mapping[str, Any]) -> dict[str, Any]:
    """Fork a child for an order, kill it when it is time, and wait until all of it is gone.

    The answer is what it said at its end, or nothing where it was killed before.
    """
    hears, tells = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(hears)
        child(order, tells)
    os.close(tells)
    try:
        said = hear(hears, END_S)
        if said == BEGAN:
            said = hear(hears, order.get("seconds", END_S))
    finally:
        os.close(hears)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    if said is None and "seconds" not in order:
        return {"problem": f"it did not end within {END_S:.0f} s"}
    if not reap(END_S):
        return {"problem": "it left processes behind"}
    answer: dict[str, Any] = json.loads(said or b"{}")
    return answer


def hear(fd: int, limit_s: float) -> bytes | None:
    """What a child says next: nothing where it is gone, ``None`` where it takes longer."""
    ready, _, _ = select.select([fd], [], [], limit_s)
    return os.read(fd, 1 << 16) if ready else None


def reap(limit_s: float) -> bool:
    """Wait until there are no children any more; whether that came about. Otherwise they are
    killed, so that nothing is left running."""
    until_s = time.monotonic() + limit_s
    while True:
        try:
            pid, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return True
        if pid == 0:
            if time.monotonic() > until_s:
                me = os.getpid()
                for left in Path(f"/proc/{me}/task/{me}/children").read_text().split():
                    os.kill(int(left), signal.SIGKILL)
                    os.waitpid(int(left), 0)
                return False
            time.sleep(0.002)


def main() -> None:
    """Answer orders until there are no more."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    for name in LATE:
        import_module(name)
    assert threading.active_count() == 1, "a fork takes only one thread along"
    for line in sys.stdin:
        sys.stdout.write(json.dumps(run(json.loads(line))) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
