"""Files into the page cache, by every way there is; what is cached, told how fast; and whether it
stays.

Ways take turns within a round, each on files whose pages were just dropped. Unused pages are
watched beside those that the page holder keeps, in the same minutes.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import resource
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from modelcache.pagecache import linux_pages, residency
from modelcache.pagecache.holder import PageHolder
from modelcache.pagecache.pressure import ForegroundReads
from modelcache.types import FileRange, Residency

FILES_FOLDER = Path(".tidegate/bench-pages")
FILES = 4
MIB = 1024 * 1024
PIECE = 8 * MIB
BLOCK = 16 * MIB
MOST_LEFT_FRACTION = 0.01
LOOKS = 21
FOREGROUND_READ = 4 * MIB
HEAD_START_S = 0.05
LIMIT_S = 240.0

Files = Sequence[FileRange]


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """One run."""

    gb: float = 4.0
    rounds: int = 5
    decay_s: float = 120.0
    out: Path = Path("bench/results")


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """One way, once: GB a second, CPU seconds a GB, and the part that is cached afterwards."""

    gb_s: float
    cpu_s_gb: float
    cached_fraction: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """What was left after so many seconds, as fractions, by what was done to keep it."""

    at_s: float
    cached: dict[str, float]


@dataclass(slots=True, kw_only=True)
class Results:
    """Everything measured. ``looks_ms``: way → state of the files → times. ``foreground``: what a
    reader of another file got (GB/s), alone and beside prewarming, by round."""

    size_bytes: int
    ways: dict[str, list[Pass]] = field(default_factory=dict)
    looks_ms: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    decay: list[Sample] = field(default_factory=list)
    keeper_cpu_fraction: float | None = None
    foreground: dict[str, list[float]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    elapsed_s: float = 0.0


def prewarm(files: Files) -> None:
    """Tidegate's way."""
    residency.prewarm(files)


def prewarm_background(files: Files) -> None:
    """The same, standing back for others."""
    residency.prewarm(files, yield_to=ForegroundReads([file.path for file in files]))


def sendfile(files: Files) -> None:
    """The plain loop."""
    with open("/dev/null", "wb") as nowhere:
        for file in files:
            with open(file.path, "rb", buffering=0) as source:
                at = 0
                while moved := os.sendfile(nowhere.fileno(), source.fileno(), at, PIECE):
                    at += moved


def read(files: Files) -> None:
    """One thread, one buffer."""
    buffer = bytearray(PIECE)
    for file in files:
        with open(file.path, "rb", buffering=0) as source:
            while source.readinto(buffer):
                pass


def read_threads(files: Files) -> None:
    """Eight threads, blocks of 16 MiB, as vLLM's prefetch reads."""
    blocks = [
        (file.path, at) for file in files for at in range(0, os.stat(file.path).st_size, BLOCK)
    ]
    local = threading.local()

    def one(block: tuple[str, int]) -> None:
        if not hasattr(local, "buffer"):
            local.buffer = bytearray(BLOCK)
        with open(block[0], "rb", buffering=0) as source:
            os.preadv(source.fileno(), [local.buffer], block[1])

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(one, blocks))


def readahead(files: Files) -> None:
    """``POSIX_FADV_WILLNEED`` chunk by chunk, waiting until each is there."""
    for file in files:
        with open(file.path, "rb", buffering=0) as source:
            fd, size = source.fileno(), os.stat(file.path).st_size
            for at in range(0, size, PIECE):
                os.posix_fadvise(fd, at, PIECE, os.POSIX_FADV_WILLNEED)
            for at in range(0, size, PIECE):
                os.pread(fd, 1, min(size, at + PIECE) - 1)


def willneed(files: Files) -> None:
    """``POSIX_FADV_WILLNEED`` on whole files, as one would think it works."""
    for file in files:
        with open(file.path, "rb", buffering=0) as source:
            os.posix_fadvise(source.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)


def populate(files: Files) -> None:
    """``MADV_POPULATE_READ``, 64 MiB at a time."""
    for file in files:
        with open(file.path, "rb", buffering=0) as source:
            for at, size in linux_pages.windows(0, os.stat(file.path).st_size):
                with linux_pages.Mapping(source.fileno(), at, size) as mapping:
                    if not mapping.populate(0, size):
                        raise OSError("this kernel has no MADV_POPULATE_READ")


def touch(files: Files) -> None:
    """Mapped, and a byte of each page read."""
    for file in files:
        with (
            open(file.path, "rb") as source,
            mmap.mmap(source.fileno(), 0, prot=mmap.PROT_READ) as mapped,
        ):
            _ = mapped[:: mmap.PAGESIZE]


def vmtouch(files: Files) -> None:
    """The tool."""
    argv = ["vmtouch", "-q", "-t", *(file.path for file in files)]
    subprocess.run(argv, check=True, timeout=LIMIT_S, stdout=subprocess.DEVNULL)


WAYS: dict[str, Callable[[Files], None]] = {
    "tidegate": prewarm,
    "tidegate, background": prewarm_background,
    "sendfile": sendfile,
    "populate": populate,
    "read": read,
    "8 threads": read_threads,
    "readahead": readahead,
    "willneed": willneed,
    "touch": touch,
    "vmtouch": vmtouch,
}


@contextlib.contextmanager
def made(folder: Path, size_bytes: int) -> Iterator[list[FileRange]]:
    """Files of random bytes, removed afterwards."""
    folder.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(folder).free < 2 * size_bytes:
        raise RuntimeError(f"{folder} has no room for {2 * size_bytes / 1e9:.0f} GB")
    try:
        block = os.urandom(PIECE)
        paths = [folder / f"file-{number}.bin" for number in range(FILES)]
        for path in paths:
            with path.open("wb", buffering=0) as file:
                for _ in range(size_bytes // FILES // PIECE):
                    file.write(block)
                os.fsync(file.fileno())
        yield [FileRange(path=str(path.absolute())) for path in paths]
    finally:
        shutil.rmtree(folder)


def run(options: Options) -> Results:
    """Make the files, measure, remove them."""
    began_s = time.monotonic()
    with made(FILES_FOLDER, int(options.gb * 1e9)) as files:
        results = Results(size_bytes=sum(os.stat(file.path).st_size for file in files))
        _measure_ways(files, options, results)
        _measure_looks(files, results)
        _measure_foreground(files, options, results)
        if options.decay_s:
            _measure_decay(files, options, results)
    results.elapsed_s = time.monotonic() - began_s
    return results


def _measure_ways(files: Files, options: Options, results: Results) -> None:
    ways = list(WAYS.items())
    if shutil.which("vmtouch") is None:
        results.missing["vmtouch"] = "not installed"
        ways = [way for way in ways if way[0] != "vmtouch"]
    for number in range(options.rounds):
        turn = number % len(ways)
        for name, way in ways[turn:] + ways[:turn]:
            make_cold(files)
            cpu_s, began_s = _cpu_s(), time.monotonic()
            way(files)
            took_s, cpu_s = time.monotonic() - began_s, _cpu_s() - cpu_s
            after = residency.residency(files)
            gb = results.size_bytes / 1e9
            done = Pass(gb_s=gb / took_s, cpu_s_gb=cpu_s / gb, cached_fraction=_fraction(after))
            results.ways.setdefault(name, []).append(done)
            print(f"  {name:22} {done.gb_s:6.2f} GB/s  {done.cpu_s_gb:.3f} CPU-s/GB  "
                  f"{done.cached_fraction:.0%} cached", flush=True)  # fmt: skip


def _measure_looks(files: Files, results: Results) -> None:
    for state, prepare in (("cold", make_cold), ("warm", prewarm)):
        prepare(files)
        for name, counters in (
            ("tidegate", linux_pages.COUNTERS),
            ("mincore", (linux_pages.count_by_mincore,)),
        ):
            times = []
            for _ in range(LOOKS):
                began_s = time.perf_counter()
                residency.residency(files, counters=counters)
                times.append((time.perf_counter() - began_s) * 1e3)
            results.looks_ms.setdefault(name, {})[state] = times
            print(f"  residency by {name}, {state}: {statistics.median(times):.2f} ms", flush=True)


def _measure_foreground(files: Files, options: Options, results: Results) -> None:
    """A reader past the page cache, of the first file, beside prewarming of the others."""
    others = files[1:]
    backgrounds: dict[str, Callable[[Files], None] | None] = {
        "alone": None, "beside prewarm": prewarm, "beside background prewarm": prewarm_background,
    }  # fmt: skip
    for _ in range(options.rounds):
        for name, background in backgrounds.items():
            make_cold(files)
            with _reader(files[0].path) as read_it:
                thread = threading.Thread(target=background, args=(others,)) if background else None
                if thread is not None:
                    thread.start()
                    time.sleep(HEAD_START_S)
                results.foreground.setdefault(name, []).append(read_it())
                if thread is not None:
                    thread.join()
    for name, found in results.foreground.items():
        print(f"  a reader {name}: {statistics.median(found):.2f} GB/s", flush=True)


@contextlib.contextmanager
def _reader(path: str) -> Iterator[Callable[[], float]]:
    """A process that reads a file when it is told to; GB/s. What our own process reads would not
    count as another process's."""
    argv = [sys.executable, "-m", "bench.pages", path]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        ready, told = child.stdout.readline(), child.stdin
        if not ready:
            raise RuntimeError("the reader did not start")

        def read_it() -> float:
            told.write("now\n")
            told.flush()
            return float(child.stdout.readline()) if child.stdout else 0.0

        yield read_it


def _read_direct(path: str) -> float:
    """Read a file past the page cache; GB a second."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    buffer = mmap.mmap(-1, FOREGROUND_READ)
    began_s, at = time.monotonic(), 0
    try:
        while count := os.preadv(fd, [buffer], at):
            at += count
        return at / 1e9 / (time.monotonic() - began_s)
    finally:
        os.close(fd)
        buffer.close()


def _measure_decay(files: Files, options: Options, results: Results) -> None:
    """The first file is left alone, the second touched, the third locked, all at once."""
    groups = {"left alone": files[:1], "kept, touched": files[1:2], "kept, locked": files[2:3]}
    size = results.size_bytes
    touching = PageHolder(budget_bytes=size, touch_s=10.0)
    locking = PageHolder(budget_bytes=size, touch_s=10.0, lock=True)
    with contextlib.closing(touching), contextlib.closing(locking):
        prewarm(files)
        touching.keep("files", groups["kept, touched"])
        locking.keep("files", groups["kept, locked"])
        began_s = time.monotonic()
        while (passed_s := time.monotonic() - began_s) <= options.decay_s:
            cached = {name: _fraction(residency.residency(group)) for name, group in groups.items()}
            results.decay.append(Sample(at_s=passed_s, cached=cached))
            print(f"  after {passed_s:.0f} s: "
                  + ", ".join(f"{n} {c:.1%}" for n, c in cached.items()), flush=True)  # fmt: skip
            time.sleep(min(10.0, options.decay_s))
        status = touching.status()
        results.keeper_cpu_fraction = status.cpu_s / (time.monotonic() - began_s)
        if problem := locking.status().problems.get("files"):
            results.missing["kept, locked"] = problem


def make_cold(files: Files) -> None:
    """Drop their pages. Raises ``RuntimeError`` where they will not go."""
    for _ in range(3):
        if _fraction(residency.drop(files)) <= MOST_LEFT_FRACTION:
            return
        time.sleep(0.5)
    raise RuntimeError("the pages of the files stay in the cache: does another process map them?")


def _fraction(found: Residency) -> float:
    if found.bytes_cached is None:
        raise RuntimeError("this kernel tells nothing of what is cached")
    return found.bytes_cached / found.bytes_total


def _cpu_s() -> float:
    used = [resource.getrusage(one) for one in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


if __name__ == "__main__":
    print("ready", flush=True)
    sys.stdin.readline()
    print(_read_direct(sys.argv[1]), flush=True)
