"""One loader in a process of its own: ``loading_child.py CONTENDER SINK MODEL.json``.

Says ``{"ready": …}`` when everything is imported and memory is there, then does one pass for each
line it is sent and answers with what the pass took. Sinks: ``ring`` is bytes in host memory that is
used again (what a copy to a GPU starts from; loaders that give maps of the file copy them to 8 MiB
of such memory), ``model`` is every tensor copied to its own place in memory that is there already.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import resource
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import xxhash

RING_BYTES = 8 * 1024 * 1024
READ_BYTES = 8 * 1024 * 1024
READS = 8
COPIED_BYTES = 1 << 30

Tensors = Iterator[tuple[str, Any]]


class Sink:
    """Where tensors go. ``owned`` ones need not be copied to be in host memory."""

    def __init__(self, kind: str, model: dict[str, Any]) -> None:
        import torch

        self.torch = torch
        self.kind = kind
        self.places: dict[str, int] = {}
        at = 0
        for file in model["files"]:
            with open(file, "rb") as opened:
                head = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
            for name, entry in head.items():
                start, end = entry["data_offsets"]
                self.places[name] = at + start
            at += end
        # Filled, so that it is there: fresh memory would be most of the work.
        self.memory = torch.ones(at if kind == "model" else RING_BYTES, dtype=torch.uint8)

    def take(self, tensors: Tensors, *, owned: bool) -> int:
        """Run through ``tensors``; returns their bytes."""
        total = 0
        for name, tensor in tensors:
            flat = tensor.reshape(-1).view(self.torch.uint8)
            size = flat.numel()
            total += size
            if self.kind == "model":
                at = self.places[name]
                self.memory[at : at + size].copy_(flat)
            elif not owned:
                for start in range(0, size, RING_BYTES):
                    part = flat[start : start + RING_BYTES]
                    self.memory[: part.numel()].copy_(part)
            del tensor, flat
        return total

    def digest(self) -> int | None:
        """Of the whole model, as the last pass left it."""
        return xxhash.xxh3_64_intdigest(self.memory.numpy()) if self.kind == "model" else None


def _sums(model: dict[str, Any]) -> dict[str, Any]:
    from loaders.weights.files import FileSums

    return {
        file: FileSums(size_bytes=os.path.getsize(file), piece_bytes=RING_BYTES, xxh3=tuple(xxh3))
        for file, xxh3 in model["xxh3"].items()
    }


def tidegate(model: dict[str, Any], sink: Sink, *, verify: bool) -> Callable[[], int]:
    """Ours. To the ring it is ``check``: the pipeline up to where a copy to the GPU would start."""
    import loaders

    sums = _sums(model) if verify else None
    if sink.kind == "ring":
        return lambda: loaders.check(model["files"], sums=sums, verify=verify).size_bytes

    def work() -> int:
        # As the load format does in vLLM on a CPU.
        with loaders.in_place_copies() as copies:
            tensors = loaders.iterate(model["files"], sums=sums, verify=verify, copies=copies)
            return sink.take(tensors, owned=True)

    return work


def tidegate_iterate(model: dict[str, Any], sink: Sink) -> Callable[[], int]:
    """Ours, tensor by tensor, each in memory that is used again."""
    import loaders

    return lambda: sink.take(loaders.iterate(model["files"], sums=_sums(model)), owned=True)


def tidegate_load(model: dict[str, Any], sink: Sink) -> Callable[[], int]:
    """Ours, all at once, in fresh memory that is the tensors' own."""
    import loaders

    return lambda: sum(t.nbytes for t in loaders.load(model["files"], sums=_sums(model)).values())


def load_file(model: dict[str, Any], sink: Sink) -> Callable[[], int]:
    """The safetensors library, file by file (maps of the files)."""
    from safetensors.torch import load_file

    return lambda: sum(sink.take(iter(load_file(f).items()), owned=False) for f in model["files"])


def safe_open(model: dict[str, Any], sink: Sink) -> Callable[[], int]:
    """The safetensors library, tensor by tensor."""
    from safetensors import safe_open

    def tensors(file: str) -> Tensors:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - not a dict
                yield name, opened.get_tensor(name)

    return lambda: sum(sink.take(tensors(file), owned=False) for file in model["files"])


def vllm(model: dict[str, Any], sink: Sink, *, strategy: str) -> Callable[[], int]:
    """vLLM's own reader with one of its strategies."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm.model_executor.model_loader.weight_utils import safetensors_weights_iterator

    return lambda: sink.take(
        safetensors_weights_iterator(list(model["files"]), False, strategy),
        owned=strategy == "eager",
    )


def runai(model: dict[str, Any], sink: Sink, *, limit_gb: int | None) -> Callable[[], int]:
    """runai-model-streamer: 16 threads, all memory it likes, or a limit."""
    os.environ["RUNAI_STREAMER_LOG_LEVEL"] = "ERROR"
    if limit_gb is not None:
        os.environ["RUNAI_STREAMER_MEMORY_LIMIT"] = str(limit_gb * 10**9)
    from runai_model_streamer import SafetensorsStreamer

    def work() -> int:
        with SafetensorsStreamer() as streamer:
            streamer.stream_files(list(model["files"]))
            return sink.take(streamer.get_tensors(), owned=True)

    return work


def fastsafetensors(model: dict[str, Any], sink: Sink) -> Callable[[], int]:
    """fastsafetensors without GPUDirect, to the CPU, file by file."""
    from fastsafetensors import SafeTensorsFileLoader, SingleGroup

    def work() -> int:
        total = 0
        for file in model["files"]:
            loader = SafeTensorsFileLoader(SingleGroup(), "cpu", nogds=True)
            loader.add_filenames({0: [file]})
            buffer = loader.copy_files_to_device()
            total += sink.take(
                ((name, buffer.get_tensor(name)) for name in loader.get_keys()), owned=True
            )
            buffer.close()
            loader.close()
        return total

    return work


def instanttensor(model: dict[str, Any], sink: Sink) -> Callable[[], int]:
    """InstantTensor, asked for the CPU."""
    import instanttensor

    def work() -> int:
        with instanttensor.safe_open(list(model["files"]), framework="pt", device="cpu") as opened:
            return sink.take(iter(opened.tensors()), owned=True)

    work()  # whether it can at all
    return work


def tensorizer(model: dict[str, Any], sink: Sink) -> Callable[[], int]:
    """tensorizer, from its own format, written here from the same tensors."""
    from safetensors.torch import load_file
    from tensorizer import TensorDeserializer, TensorSerializer

    own = Path(model["files"][0]).parent / "model.tensors"
    if not own.exists():
        serializer = TensorSerializer(str(own))
        serializer.write_state_dict(
            {n: t for file in model["files"] for n, t in load_file(file).items()}
        )
        serializer.close()
        with own.open("rb") as written:
            os.fsync(written.fileno())

    def work() -> int:
        with TensorDeserializer(
            str(own), device="cpu", lazy_load=False, plaid_mode=False
        ) as opened:
            return sink.take(iter(opened.items()), owned=True)

    return work


def raw_direct(model: dict[str, Any], sink: Sink) -> Callable[[], int]:
    """Nothing but reads past the page cache, eight of 8 MiB at once, into memory used again."""
    slots = [mmap.mmap(-1, READ_BYTES) for _ in range(READS)]
    for slot in slots:
        slot[:] = b"\1" * READ_BYTES

    def work() -> int:
        fds = [os.open(file, os.O_RDONLY | os.O_DIRECT) for file in model["files"]]
        jobs = iter([(fd, at) for fd in fds for at in range(0, os.fstat(fd).st_size, READ_BYTES)])
        got = _in_threads(READS, lambda n: _read_all(jobs, slots[n]))
        for fd in fds:
            os.close(fd)
        return got

    return work


_JOBS_LOCK = threading.Lock()


def _read_all(jobs: Iterator[tuple[int, int]], slot: mmap.mmap) -> int:
    total = 0
    while True:
        with _JOBS_LOCK:
            job = next(jobs, None)
        if job is None:
            return total
        total += os.preadv(job[0], [slot], job[1])


def memcpy(model: dict[str, Any], sink: Sink) -> Callable[[], int]:
    """Copies of 8 MiB from a gigabyte of memory into memory used again, a thread for each core."""
    source = mmap.mmap(-1, COPIED_BYTES)
    for at in range(0, COPIED_BYTES, 4096):
        source[at] = 1
    cores = len(os.sched_getaffinity(0))
    slots = [ctypes.create_string_buffer(READ_BYTES) for _ in range(cores)]
    first = ctypes.c_char.from_buffer(source)  # keeps the memory too

    def copy(n: int) -> int:
        for at in range(n * READ_BYTES, COPIED_BYTES, cores * READ_BYTES):
            ctypes.memmove(slots[n], ctypes.addressof(first) + at, READ_BYTES)
        return COPIED_BYTES // cores

    return lambda: sum(_in_threads(cores, copy) for _ in range(4))


def _in_threads(count: int, work: Callable[[int], int]) -> int:
    got = [0] * count

    def run(n: int) -> None:
        got[n] = work(n)

    threads = [threading.Thread(target=run, args=(n,)) for n in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(got)


MAKERS: dict[str, Callable[[dict[str, Any], Sink], Callable[[], int]]] = {
    "tidegate": lambda m, s: tidegate(m, s, verify=True),
    "tidegate-unverified": lambda m, s: tidegate(m, s, verify=False),
    "tidegate-iterate": tidegate_iterate,
    "tidegate-load": tidegate_load,
    "load_file": load_file,
    "safe_open": safe_open,
    "vllm-lazy": lambda m, s: vllm(m, s, strategy="lazy"),
    "vllm-eager": lambda m, s: vllm(m, s, strategy="eager"),
    "vllm-prefetch": lambda m, s: vllm(m, s, strategy="prefetch"),
    "runai": lambda m, s: runai(m, s, limit_gb=None),
    "runai-1gb": lambda m, s: runai(m, s, limit_gb=1),
    "fastsafetensors": fastsafetensors,
    "instanttensor": instanttensor,
    "tensorizer": tensorizer,
    "raw-direct": raw_direct,
    "memcpy": memcpy,
}


def _cpu_s() -> float:
    used = [resource.getrusage(w) for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def main() -> None:
    """Answer line by line on what was standard output; loaders' own words go to the error log."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    name, kind, where = sys.argv[1:]
    model = json.loads(Path(where).read_text())
    try:
        sink = Sink(kind, model)
        work = MAKERS[name](model, sink)
    except Exception as error:  # noqa: BLE001 - whatever it is, the report says so
        said = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        print(json.dumps({"error": said}), file=answers)
        return
    print(json.dumps({"ready": True}), file=answers)
    for line in sys.stdin:
        cpu_s, at_s = _cpu_s(), time.perf_counter()
        try:
            size = work()
        except Exception as error:  # noqa: BLE001
            said = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            print(json.dumps({"error": said}), file=answers)
            return
        seconds, cpu_s = time.perf_counter() - at_s, _cpu_s() - cpu_s
        found = {"seconds": seconds, "cpu_s": cpu_s, "bytes": size}
        if line.strip() == "check":
            found["digest"] = sink.digest()
        print(json.dumps(found), file=answers)


if __name__ == "__main__":
    main()
