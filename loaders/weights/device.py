"""Where tensors end up: in place on the CPU, or through the staging ring to a device.

torch is imported here and only when something is loaded. On the CPU the file is read straight into
the memory tensors then have. For a device, threads copy slots of the (pinned) ring on a few streams
of their own; the caller that gets a tensor has its stream wait for the copies that filled it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from loaders.weights.plan import ALIGN_BYTES, Batch, Portion
from loaders.weights.staging_buffers import BufferPool, Stretch, Ticket
from modelcache.safetensors_index import BadFile

Tensor = Any

TORCH_NAMES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16", "U32": "uint32",
    "I32": "int32", "U64": "uint64", "I64": "int64", "F16": "float16", "BF16": "bfloat16",
    "F32": "float32", "F64": "float64", "C64": "complex64", "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2", "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu", "F4": "float4_e2m1fn_x2",
}  # fmt: skip
"""torch's names of the format's types. It has none for the 6-bit ones."""

DEVICE_ALIGN_BYTES = 16
"""What kernels that read vectors expect of an address on a device."""


@dataclass(slots=True, kw_only=True, eq=False)
class Arena:
    """The memory of one batch: ``base`` is a byte tensor whose element 0 is byte ``start`` of the
    file; ``view`` the same memory for readers, ``None`` on a device."""

    batch: Batch
    start: int
    base: Tensor
    view: memoryview | None = None
    tickets: list[Ticket] = field(default_factory=list)


class TensorTarget(Protocol):
    """What a load writes to. ``staged``: through the ring by ``copy``, else to ``Arena.view``."""

    staged: bool

    def open(self, batch: Batch) -> Arena:
        """Memory for a batch. One thread at a time."""

    def copy(self, arena: Arena, start: int, view: memoryview, worker: int) -> Ticket | None:
        """Bring ``view`` to byte ``start`` (of the file) of an arena; ``None`` if it is done."""

    def finish(self, arena: Arena) -> None:
        """Make what was copied visible to the caller's stream."""

    def lock_memory(self, stretch: Stretch) -> Callable[[], None] | None:
        """Pin memory for this device; returns what undoes it, ``None`` where it was not done."""

    def close(self) -> None:
        """Release what is kept."""


def make_target(
    device: Any, *, usual_bytes: int, spare_bytes: int, workers: int, staged: bool = False
) -> TensorTarget:
    """The target for a torch device. On the CPU memory comes in stretches of ``usual_bytes``, of
    which ``spare_bytes`` may be kept to be used again; ``staged`` sends bytes through the ring
    there too."""
    import torch

    place = torch.device(device)
    if place.type == "cpu":
        return CpuTarget(BufferPool(usual_bytes, spare_bytes), staged=staged)
    if place.type == "cuda":
        return CudaTarget(place, streams=min(workers, STREAMS))
    raise ValueError(f"device: {place} is neither cpu nor cuda")


def torch_dtype(dtype: str) -> Any:
    """torch's type for the format's. Raises ``BadFile`` where this torch has none."""
    import torch

    found = getattr(torch, TORCH_NAMES.get(dtype, "?"), None)
    if found is None:
        raise BadFile(f"this torch ({torch.__version__}) has no type for {dtype}")
    return found


def make_tensor(arena: Arena, portion: Portion) -> Tensor:
    """The tensor of ``portion``, in the arena's memory unless it cannot stay there.

    Raises ``BadFile`` for bytes that are no values of its type.
    """
    import torch

    dtype = torch_dtype(portion.dtype)
    shape = list(portion.shape)
    if portion.dtype == "F4":
        if not shape or shape[-1] % 2:
            raise BadFile(f"tensor {portion.name!r} of {shape} cannot be packed in pairs")
        shape[-1] //= 2
    if portion.start == portion.end:
        return torch.empty(shape, dtype=dtype, device=arena.base.device)
    raw = arena.base[portion.start - arena.start : portion.end - arena.start]
    align = dtype.itemsize if arena.view is not None else max(dtype.itemsize, DEVICE_ALIGN_BYTES)
    if raw.data_ptr() % align or raw.storage_offset() % dtype.itemsize:
        raw = raw.clone()
    if portion.dtype == "BOOL" and bool((raw > 1).any()):
        raise BadFile(f"tensor {portion.name!r} has bytes that are neither true nor false")
    tensor = raw.view(dtype).view(shape)
    if portion.narrow is not None:
        tensor = tensor.narrow(*portion.narrow).clone(memory_format=torch.contiguous_format)
    return tensor


class CpuTarget:
    """Tensors in host memory."""

    def __init__(self, pool: BufferPool, *, staged: bool = False) -> None:
        self.staged = staged
        self._pool = pool

    def open(self, batch: Batch) -> Arena:
        """Memory in which a batch lies as in the file, to the block: so that reads past the page
        cache can write to it."""
        import torch

        start = batch.start - batch.start % ALIGN_BYTES
        end = -(-batch.end // ALIGN_BYTES) * ALIGN_BYTES
        stretch = self._pool.take(max(end - start, ALIGN_BYTES))
        base = torch.frombuffer(self._pool.lend(stretch), dtype=torch.uint8)
        return Arena(batch=batch, start=start, base=base, view=stretch.view)

    def copy(self, arena: Arena, start: int, view: memoryview, worker: int) -> None:
        """At once, by torch, which lets other threads run meanwhile."""
        import torch

        at = start - arena.start
        arena.base[at : at + len(view)].copy_(torch.frombuffer(view, dtype=torch.uint8))

    def finish(self, arena: Arena) -> None:
        """Nothing is under way."""

    def lock_memory(self, stretch: Stretch) -> None:
        """The CPU needs nothing pinned."""

    def close(self) -> None:
        """Let go of memory kept for later."""
        self._pool.close()


STREAMS = 4
"""Streams copied on. One keeps a PCIe link busy; more hide the gaps between two copies."""


def _import_torch() -> Any:
    import torch

    return torch


@dataclass(frozen=True, slots=True)
class CudaTicket:
    """A copy marked by an event."""

    event: Any

    def done(self) -> bool:
        """Whether the event was reached."""
        return bool(self.event.query())

    def wait(self) -> None:
        """Until the event is reached."""
        self.event.synchronize()


class CudaTarget:
    """Tensors in a GPU's memory. ``on`` is torch, or what a test has in its place."""

    staged = True

    def __init__(self, device: Any, *, streams: int, on: Any = None) -> None:
        torch = self._torch = _import_torch() if on is None else on
        if not torch.cuda.is_available():
            raise ValueError(f"device: {device} was asked for, and torch sees no GPU")
        index = torch.cuda.current_device() if device.index is None else device.index
        self._device = torch.device("cuda", index)
        self._streams = [torch.cuda.Stream(self._device) for _ in range(max(1, streams))]
        # Memory is taken for, and handed over to, the stream the caller works on.
        self._caller = torch.cuda.current_stream(self._device)
        self._opened: dict[int, Any] = {}

    def open(self, batch: Batch) -> Arena:
        """Device memory for a batch, and a mark behind which it is free to be written to: the
        allocator may hand out what the caller's stream is not done with."""
        torch = self._torch
        with torch.cuda.device(self._device), torch.cuda.stream(self._caller):
            base = torch.empty(batch.size_bytes, dtype=torch.uint8, device=self._device)
            free = torch.cuda.Event()
            free.record(self._caller)
        arena = Arena(batch=batch, start=batch.start, base=base)
        self._opened[id(arena)] = free
        return arena

    def copy(self, arena: Arena, start: int, view: memoryview, worker: int) -> Ticket:
        """On one of the streams; the slot must stay as it is until the ticket is done."""
        torch = self._torch
        stream = self._streams[worker % len(self._streams)]
        source = torch.frombuffer(view, dtype=torch.uint8)
        at = start - arena.start
        with torch.cuda.device(self._device), torch.cuda.stream(stream):
            stream.wait_event(self._opened[id(arena)])
            arena.base[at : at + len(view)].copy_(source, non_blocking=True)
            event = torch.cuda.Event()
            event.record(stream)
        ticket = CudaTicket(event)
        arena.tickets.append(ticket)
        return ticket

    def finish(self, arena: Arena) -> None:
        """The stream the caller is on now waits for the copies; so does the one memory was taken
        for, lest it is handed out again before they are done."""
        self._opened.pop(id(arena), None)
        current = self._torch.cuda.current_stream(self._device)
        for ticket in arena.tickets:
            if isinstance(ticket, CudaTicket):
                current.wait_event(ticket.event)
                self._caller.wait_event(ticket.event)
        if current != self._caller:
            arena.base.record_stream(current)
        arena.tickets.clear()

    def lock_memory(self, stretch: Stretch) -> Callable[[], None] | None:
        """Pin a stretch where it is. Copies from memory that is not pinned are right but slow."""
        cudart = self._torch.cuda.cudart()
        with self._torch.cuda.device(self._device):
            if int(cudart.cudaHostRegister(stretch.address, stretch.size_bytes, 0)) != 0:
                return None

        def undo() -> None:
            with self._torch.cuda.device(self._device):
                cudart.cudaHostUnregister(stretch.address)

        return undo

    def close(self) -> None:
        """Wait for the streams, then release batches that no caller got: until their copies are
        over, their memory must not be handed out."""
        for stream in self._streams:
            stream.synchronize()
        self._opened.clear()
