"""How quickly each load format reads weights here.

``python -P -m loaders.weights.format_benchmark FILE…`` prints a JSON line per format; ``doctor``
reads them.

Runs under the engine's Python and uses vLLM's own reading functions, so a format is measured as
vLLM would use it. Each tensor is copied to where a model would have it (memory that is there
already), on the device vLLM computes on. Small files are copied into a directory of our own, so
that their pages can be dropped for the cold figures without slowing other processes; of larger ones
only the warm figures are taken.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import select
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from modelcache.pagecache import residency
from modelcache.types import FileRange

MOST_COPIED_BYTES = 768 * 1024 * 1024
WARM_ROUNDS = 2
COLD_ROUNDS = 2
ALIGNMENT_BYTES = 256
PIPE_BYTES = 300
SPARE_BYTES = 64 * 1024 * 1024
"""For what alignment takes: a file has some thousand tensors."""
MOST_LEFT = 0.02
"""Part of a file that may still be in the page cache when it counts as cold."""

Tensors = Iterator[tuple[str, Any]]
Read = Callable[[Sequence[str]], Tensors]


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """One format's figures in bytes a second; ``None`` where one was not taken. ``problem`` says
    why a format could not be tried."""

    format: str
    warm_bytes_s: float | None = None
    cold_bytes_s: float | None = None
    problem: str = ""


def readers(device: str) -> dict[str, tuple[str, Read]]:
    """Formats by the name that ``--load-format`` takes, each with the package it needs."""
    return {
        "tidegate": ("loaders", _ours(device)),
        "safetensors": ("safetensors", _of_vllm("safetensors_weights_iterator")),
        "runai_streamer": (
            "runai_model_streamer",
            _of_vllm("runai_safetensors_weights_iterator"),
        ),
        "fastsafetensors": ("fastsafetensors", _of_vllm("fastsafetensors_weights_iterator")),
        "instanttensor": ("instanttensor", _of_vllm("instanttensor_weights_iterator")),
    }


def _ours(device: str) -> Read:
    """As the load format reads them."""

    def read(files: Sequence[str]) -> Tensors:
        from loaders import in_place_copies, iterate

        with nullcontext() if device != "cpu" else in_place_copies() as copies:
            yield from iterate(files, copies=copies)

    return read


def _of_vllm(name: str) -> Read:
    def read(files: Sequence[str]) -> Tensors:
        from vllm.model_executor.model_loader import weight_utils

        tensors: Tensors = getattr(weight_utils, name)(list(files), False)
        return tensors

    return read


def measure(
    files: Sequence[str],
    formats: Mapping[str, tuple[str, Read]],
    *,
    may_drop: bool,
    device: str,
    within_s: float,
    take: Callable[[Read, Sequence[str], str, int], float] | None = None,
) -> Iterator[Speed]:
    """Try each format; what does not fit in ``within_s`` seconds is left out and says so.
    ``take`` gives one format's bytes a second, from so many rounds.

    With ``may_drop`` the files' pages are dropped for the cold figures. Every figure is taken in
    a process of its own, forked from this one: what one format leaves mapped would stay in the
    page cache for the next.
    """
    ends_s = time.monotonic() + within_s
    there = {
        name: read
        for name, (package, read) in formats.items()
        if importlib.util.find_spec(package) is not None
    }
    for number, (name, read) in enumerate(there.items()):
        left_s = (ends_s - time.monotonic()) / (len(there) - number)
        yield _measured(name, partial(take or _best, read, files, device), files, may_drop, left_s)
    for name in sorted(formats.keys() - there.keys()):
        yield Speed(format=name, problem="not installed")


def _measured(
    name: str, take: Callable[[int], float], files: Sequence[str], may_drop: bool, within_s: float
) -> Speed:
    ends_s = time.monotonic() + within_s
    warm, cold = None, []
    try:
        warm = in_child(lambda: take(WARM_ROUNDS), within_s)
        for _ in range(COLD_ROUNDS if may_drop else 0):
            if drop(files):
                cold.append(in_child(lambda: take(0), ends_s - time.monotonic()))
    except TimeoutError:
        if warm is None:
            return Speed(format=name, problem="not measured, the time was up")
    except OSError as error:
        return Speed(format=name, problem=str(error)[:300])
    return Speed(format=name, warm_bytes_s=warm, cold_bytes_s=max(cold, default=None))


def in_child(work: Callable[[], float], within_s: float) -> float:
    """What ``work`` returns in a forked process. ``OSError`` with what it said when it failed."""
    if within_s <= 0:
        raise TimeoutError
    reads, writes = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            said = json.dumps(work())
        except BaseException as error:  # noqa: BLE001 - told to the parent
            said = json.dumps(" ".join(f"{type(error).__name__}: {error}".split())[:PIPE_BYTES])
        os.write(writes, said.encode())
        os._exit(0)
    os.close(writes)
    try:
        ready, _, _ = select.select([reads], [], [], within_s)
        if not ready:
            raise TimeoutError
        answer = os.read(reads, 2 * PIPE_BYTES)
        found = json.loads(answer) if answer else "it crashed"
    finally:
        os.close(reads)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    if isinstance(found, str):
        raise OSError(found)
    return float(found)


def _best(read: Read, files: Sequence[str], device: str, rounds: int) -> float:
    """The best of some rounds after one to warm up; of 0, that first round itself."""
    import torch

    size_bytes = sum(Path(file).stat().st_size for file in files)
    memory = torch.zeros(size_bytes + SPARE_BYTES, dtype=torch.uint8, device=device)
    first = _round(read, files, memory, device)
    return max((_round(read, files, memory, device) for _ in range(rounds)), default=first)


def _round(read: Read, files: Sequence[str], memory: Any, device: str) -> float:
    """Read all of it into ``memory``; bytes a second."""
    import torch

    began_s, at, read_bytes = time.monotonic(), 0, 0
    for _, tensor in read(files):
        size_bytes = tensor.numel() * tensor.element_size()
        place = memory[at : at + size_bytes].view(tensor.dtype).view(tensor.shape)
        place.copy_(tensor)
        at += -(-size_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        read_bytes += size_bytes
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    if not read_bytes:
        raise ValueError("it read nothing")
    return read_bytes / max(time.monotonic() - began_s, 1e-9)


def drop(files: Sequence[str]) -> bool:
    """Have the kernel forget files; false where it did not (they are mapped, or not on a disk)."""
    left = residency.drop([FileRange(path=file) for file in files])
    return left.bytes_cached is not None and left.bytes_cached < left.bytes_total * MOST_LEFT


def choose(files: Sequence[Path], most_bytes: int) -> Path:
    """The largest file that may be copied, else the smallest there is."""
    by_size = sorted(files, key=lambda path: path.stat().st_size)
    small = [path for path in by_size if path.stat().st_size <= most_bytes]
    return small[-1] if small else by_size[0]


def main(arguments: Sequence[str] | None = None) -> int:
    """See the module."""
    parser = argparse.ArgumentParser(prog="python -P -m loaders.weights.format_benchmark")
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--work-dir", type=Path, help="where a file may be copied for a moment")
    parser.add_argument("--within-s", type=float, default=30.0)
    options = parser.parse_args(arguments)
    from vllm.model_executor.model_loader import weight_utils  # noqa: F401  (once, for all)
    from vllm.platforms import current_platform

    device = current_platform.device_type or "cpu"
    chosen = choose(options.files, MOST_COPIED_BYTES)
    copy: Path | None = None
    if options.work_dir is not None and chosen.stat().st_size <= MOST_COPIED_BYTES:
        copy = options.work_dir / "measured.safetensors"
        shutil.copyfile(chosen, copy)
    try:
        files = [str(copy or chosen)]
        for speed in measure(
            files,
            readers(device),
            may_drop=copy is not None,
            device=device,
            within_s=options.within_s,
        ):
            sys.stdout.write(json.dumps(asdict(speed)) + "\n")
            sys.stdout.flush()
    finally:
        if copy is not None:
            copy.unlink(missing_ok=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
