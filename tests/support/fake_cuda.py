"""A stand-in for torch with a GPU: streams are queues, and what is queued happens late.

A copy reads its source when its stream gets to it, which is when the host waits for something
behind it, or by chance. So code that overwrites a source too early, or looks at a result without
waiting, sees wrong bytes. Memory is the CPU's.
"""

from __future__ import annotations

import contextlib
import random
import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any


class FakeEvent:
    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda = cuda
        self.stream: FakeStream | None = None
        self.reached = True

    def record(self, stream: FakeStream) -> None:
        with self.cuda.lock:
            self.reached, self.stream = False, stream
            stream.work.append(self._reach)

    def _reach(self) -> None:
        self.reached = True

    def query(self) -> bool:
        with self.cuda.lock:
            if self.stream is not None and self.cuda.chance.random() < 0.3:
                self.stream.step()
            return self.reached

    def synchronize(self) -> None:
        with self.cuda.lock:
            while not self.reached:
                assert self.stream is not None
                self.stream.step()


class FakeStream:
    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda = cuda
        self.work: deque[Callable[[], None]] = deque()

    def wait_event(self, event: FakeEvent) -> None:
        with self.cuda.lock:
            self.work.append(event.synchronize)

    def step(self) -> None:
        if self.work:
            self.work.popleft()()

    def synchronize(self) -> None:
        with self.cuda.lock:
            while self.work:
                self.step()


class FakeCuda:
    def __init__(self, torch: FakeTorch, seed: int) -> None:
        self.torch = torch
        self.lock = threading.RLock()
        self.chance = random.Random(seed)
        self.local = threading.local()
        self.default = FakeStream(self)

    def is_available(self) -> bool:
        return True

    def current_device(self) -> int:
        return 0

    def Stream(self, device: Any) -> FakeStream:
        return FakeStream(self)

    def Event(self) -> FakeEvent:
        return FakeEvent(self)

    def current_stream(self, device: Any = None) -> FakeStream:
        return getattr(self.local, "stream", self.default)

    @contextlib.contextmanager
    def stream(self, stream: FakeStream) -> Iterator[None]:
        before = self.current_stream()
        self.local.stream = stream
        try:
            yield
        finally:
            self.local.stream = before

    def device(self, device: Any) -> contextlib.nullcontext[None]:
        return contextlib.nullcontext()

    def cudart(self) -> FakeCuda:
        return self

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        assert address % 4096 == 0
        assert flags == 0
        self.torch.pinned_bytes += size
        self.torch.most_pinned_bytes = max(self.torch.most_pinned_bytes, self.torch.pinned_bytes)
        self.torch.pins[address] = size
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        self.torch.pinned_bytes -= self.torch.pins.pop(address)
        return 0


class FakeDestination:
    """A part of a device tensor, to be copied to."""

    def __init__(self, torch: FakeTorch, tensor: Any) -> None:
        self.torch = torch
        self.tensor = tensor

    def copy_(self, source: Any, non_blocking: bool = False) -> None:
        assert non_blocking
        self.torch.late_copies += 1
        self.torch.cuda.current_stream().work.append(lambda: self.tensor.copy_(source))


class FakeMemory:
    """A device tensor. Its bytes are noise until something is copied there; code that makes a
    tensor of it waits for the copies by the caller's stream, so that is brought up to date."""

    def __init__(self, torch: FakeTorch, size: int) -> None:
        self.torch = torch
        self.tensor = torch.real.full((size,), 0xA5, dtype=torch.real.uint8)
        self.device = self.tensor.device

    def __getitem__(self, part: slice) -> Any:
        if self.torch.cuda.current_stream() is self.torch.cuda.default:
            self.torch.cuda.default.synchronize()
            return self.tensor[part]
        return FakeDestination(self.torch, self.tensor[part])

    def record_stream(self, stream: FakeStream) -> None:
        """The memory lives as long as the tensor here."""


class FakeTorch:
    """torch, but for what ``loaders.weights.device.CudaTarget`` uses of it."""

    def __init__(self, real: Any, seed: int) -> None:
        self.real = real
        self.uint8 = real.uint8
        self.frombuffer = real.frombuffer
        self.pins: dict[int, int] = {}
        self.pinned_bytes = self.most_pinned_bytes = 0
        self.late_copies = 0
        self.cuda = FakeCuda(self, seed)

    def device(self, kind: str, index: int) -> Any:
        return self.real.device(kind, index)

    def empty(self, size: int, *, dtype: Any, device: Any) -> FakeMemory:
        assert dtype == self.uint8
        assert device.type == "cuda"
        return FakeMemory(self, size)
