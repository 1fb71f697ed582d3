"""What only torch can show of the loader; ``loading_checks.py MODEL`` under the engine's Python.

Prints one line of JSON for each check: its name, and what went wrong or nothing.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from fake_cuda import FakeTorch
from safetensors_files import header, layout, sums_of

import loaders
from loaders.weights import device as devices
from loaders.weights import load
from modelcache.safetensors_index import BadFile

Tensors = dict[str, Any]

LIBRARY_DTYPES = (
    "float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool",
    "complex64", "uint16", "uint32", "uint64", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz",
    "float8_e5m2fnuz",
)  # fmt: skip
SHAPES = ((), (0,), (1,), (7,), (3, 5), (2, 0, 3), (64, 33), (2, 3, 4, 5), (500, 999))


def random_tensor(chance: random.Random, dtype: str, shape: tuple[int, ...]) -> Any:
    kind = getattr(torch, dtype)
    raw = torch.frombuffer(
        bytearray(chance.randbytes(max(1, torch.Size(shape).numel() * kind.itemsize))),
        dtype=torch.uint8,
    )
    if dtype == "bool":
        raw = raw & 1
    return raw[: torch.Size(shape).numel() * kind.itemsize].clone().view(kind).reshape(shape)


def same(one: Any, two: Any) -> bool:
    """The same type, shape and bits; NaNs too."""
    return (
        one.dtype == two.dtype
        and one.shape == two.shape
        and one.contiguous().flatten().view(torch.uint8).equal(
            two.contiguous().flatten().view(torch.uint8)
        )
    )  # fmt: skip


def must_be(got: Tensors, expected: Tensors) -> None:
    assert got.keys() == expected.keys(), got.keys() ^ expected.keys()
    for name, tensor in expected.items():
        assert same(got[name], tensor), f"{name}: {got[name].dtype} {got[name].shape}"


@contextmanager
def sharded(seed: int) -> Iterator[tuple[Path, Tensors]]:
    """A model of three files and an index, every type and odd shapes, and what it holds."""
    chance = random.Random(seed)
    tensors = {
        f"layer.{i}.{dtype}": random_tensor(chance, dtype, shape)
        for i, shape in enumerate(SHAPES)
        for dtype in LIBRARY_DTYPES
    }
    with tempfile.TemporaryDirectory() as folder:
        place, weight_map = Path(folder), {}
        names = list(tensors)
        chance.shuffle(names)
        for shard in range(3):
            file = f"model-{shard}.safetensors"
            mine = {name: tensors[name] for name in names[shard::3]}
            safetensors.torch.save_file(mine, place / file)
            weight_map |= dict.fromkeys(mine, file)
        index = place / "model.safetensors.index.json"
        index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        yield place, tensors


WAYS: tuple[dict[str, Any], ...] = (
    {},
    {"how": "cached", "threads": 1},
    {"how": "direct"},
    {"staged": True, "memory_bytes": 8 << 20},
    {"staged": True, "how": "direct", "threads": 3},
)


def check_real_model(model: Path) -> None:
    expected = safetensors.torch.load_file(model / "model.safetensors")
    for way in WAYS:
        loaded = loaders.load(model, **way)
        must_be(loaded, expected)
        assert loaded.report.tensors == len(expected)
        assert loaded.report.tensor_bytes <= loaded.report.size_bytes
    some = list(expected)[::7]
    must_be(loaders.load(model, tensors=some), {name: expected[name] for name in some})


def check_every_type_and_shape(model: Path) -> None:
    for seed, way in enumerate(WAYS):
        with sharded(seed) as (place, expected):
            must_be(loaders.load(place, **way), expected)
            must_be(dict(loaders.iterate(place, **way)), expected)
            for file in place.glob("*.safetensors"):
                must_be(dict(loaders.load(file)), safetensors.torch.load_file(file))


def check_types_the_library_does_not_make(model: Path) -> None:
    data = random.Random(3).randbytes(24)
    rows = [("scale", "F8_E8M0", [4, 2], 8), ("packed", "F4", [4, 8], 16)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "x.safetensors")
        path.write_bytes(header(layout(rows)) + data)
        got = loaders.load(path)
        assert got["scale"].dtype == torch.float8_e8m0fnu
        assert got["packed"].dtype == torch.float4_e2m1fn_x2
        assert got["packed"].shape == (4, 4)
        assert bytes(got["packed"].view(torch.uint8).flatten().tolist()) == data[8:]
        path.write_bytes(header(layout([("six", "F6_E2M3", [4], 3)])) + b"123")
        refused(lambda: loaders.load(path), "no type for F6_E2M3")
        path.write_bytes(header(layout([("truth", "BOOL", [4], 4)])) + b"\0\1\2\0")
        refused(lambda: loaders.load(path), "neither true nor false")


def refused(work: Callable[[], object], says: str) -> None:
    said = "nothing"
    try:
        work()
    except (BadFile, ValueError) as error:
        said = str(error)
    assert says in said, (says, said)


def check_tensors_off_their_alignment(model: Path) -> None:
    rows = [("b", "U8", [3], 3), ("f", "F32", [5], 20), ("d", "F64", [2], 16), ("h", "F16", [1], 2)]
    data = random.Random(4).randbytes(41)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "x.safetensors")
        path.write_bytes(header(layout(rows)) + data)
        got = loaders.load(path)
        assert all(tensor.data_ptr() % tensor.itemsize == 0 for tensor in got.values())
        raw = b"".join(bytes(got[n].view(torch.uint8).flatten().tolist()) for n in "bfdh")
        assert raw == data


def check_ranks_have_their_parts(model: Path) -> None:
    expected = safetensors.torch.load_file(model / "model.safetensors")

    def dim(name: str, shape: tuple[int, ...]) -> int | None:
        if len(shape) < 2:
            return None
        return 1 if "o_proj" in name or "down_proj" in name else 0

    whole = loaders.load(model).report.size_bytes
    for ranks in (2, 4):
        for rank in range(ranks):
            got = loaders.load(model, rank=rank, world_size=ranks, cut_dim=dim)
            must_be(got, {
                name: t if (d := dim(name, t.shape)) is None else t.chunk(ranks, d)[rank]
                for name, t in expected.items()
            })  # fmt: skip
            assert got.report.size_bytes < whole * (0.7 if ranks == 2 else 0.5)


def check_memory_is_used_again_but_never_too_soon(model: Path) -> None:
    expected = safetensors.torch.load_file(model / "model.safetensors")
    kept, places = {}, set()
    for number, (name, tensor) in enumerate(loaders.iterate(model, memory_bytes=16 << 20)):
        places.add(tensor.untyped_storage().data_ptr())
        if number % 3 == 0:
            kept[name] = tensor
        del tensor
    must_be(kept, {name: expected[name] for name in kept})
    passing = set()
    for _name, tensor in loaders.iterate(model, memory_bytes=16 << 20):
        passing.add(tensor.untyped_storage().data_ptr())
        del tensor
    assert len(passing) < len(places), (len(passing), len(places))


def check_stopping_early_leaves_nothing(model: Path) -> None:
    weights = loaders.iterate(model, memory_bytes=16 << 20)
    next(weights)
    weights.close()  # type: ignore[attr-defined]
    assert not [t for t in threading.enumerate() if t.name.startswith("loader-")]


def check_flipped_bits_never_reach_a_tensor(model: Path) -> None:
    chance = random.Random(11)
    with sharded(7) as (place, expected):
        files = sorted(place.glob("*.safetensors"))
        sums = {str(file): sums_of(file.read_bytes()) for file in files}
        must_be(loaders.load(place, sums=sums, verify=True), expected)
        for number in range(60):
            file = chance.choice(files)
            whole = file.read_bytes()
            data = bytearray(whole)
            data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
            file.write_bytes(data)
            way = WAYS[number % len(WAYS)]
            for read in (loaders.load, lambda *a, **k: dict(loaders.iterate(*a, **k))):
                refused(partial(read, place, sums=sums, **way), str(file))
            file.write_bytes(whole)
        must_be(loaders.load(place, sums=sums), expected)


def check_hostile_headers_against_the_library(model: Path) -> None:
    """What we accept the library accepts too, and reads the same; what it refuses so do we."""
    chance = random.Random(13)
    rows = [("a", "F32", [2, 3], 24), ("b", "BF16", [5], 10), ("e", "F32", [0], 0),
            ("s", "I64", [], 8)]  # fmt: skip
    good = header({"__metadata__": {"k": "v"}, **layout(rows)})
    data = chance.randbytes(42)
    accepted = refusals = 0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "x.safetensors")
        for _ in range(4000):
            head = mutate(chance, good)
            path.write_bytes(head + data)
            try:
                ours = loaders.load(path)
            except BadFile:
                refusals += 1
                continue
            accepted += 1
            must_be(ours, safetensors.torch.load_file(path))
    assert accepted > 20, accepted
    assert refusals > 2000, refusals


def mutate(chance: random.Random, good: bytes) -> bytes:
    head = bytearray(good[8:])
    for _ in range(chance.randint(1, 2)):
        at = chance.randrange(len(head))
        match chance.randrange(4):
            case 0:
                head[at] = chance.choice(b'0123456789-[]{}",: ')
            case 1:
                head[at] = chance.randrange(256)
            case 2:
                digits = [i for i, c in enumerate(head) if chr(c).isdigit()]
                head[chance.choice(digits)] = chance.choice(b"0123456789")
            case _:
                number = chance.choice(
                    [b"-1", b"1e3", b"4294967296", b"18446744073709551616", b"0"]
                )
                head[at : at + 1] = number
    length = len(head) if chance.random() < 0.9 else chance.randrange(2**20)
    return length.to_bytes(8, "little") + bytes(head)


def check_device_copies_are_waited_for(model: Path) -> None:
    """The GPU's path on a stand-in whose copies happen as late as they may: a slot that were
    filled again too soon, or a tensor handed over too early, would have wrong bytes."""
    for seed in range(3):
        fake = FakeTorch(torch, seed)
        real = devices.make_target

        def make(device: Any, *, workers: int, fake: Any = fake, **_: Any) -> Any:
            return devices.CudaTarget(torch.device("cuda", 0), streams=workers, on=fake)

        load.make_target = make  # type: ignore[attr-defined]
        try:
            with sharded(20 + seed) as (place, expected):
                for memory in (8 << 20, 64 << 20):
                    loaded = loaders.load(place, "cuda", memory_bytes=memory, threads=4)
                    fake.cuda.current_stream().synchronize()
                    must_be(loaded, expected)
                    for name, tensor in loaders.iterate(place, device="cuda", memory_bytes=memory):
                        fake.cuda.current_stream().synchronize()
                        assert same(tensor, expected[name]), name
                        del tensor
                assert fake.most_pinned_bytes > 0
                assert fake.pinned_bytes == 0, "everything is unpinned again"
                assert fake.late_copies > 0
        finally:
            load.make_target = real  # type: ignore[attr-defined]


def check_an_unknown_device_is_refused(model: Path) -> None:
    refused(lambda: loaders.load(model, "meta"), "neither cpu nor cuda")
    if not torch.cuda.is_available():
        refused(lambda: loaders.load(model, "cuda"), "torch sees no GPU")


CHECKS = {name.removeprefix("check_"): check for name, check in sorted(globals().items())
          if name.startswith("check_")}  # fmt: skip


def main() -> None:
    for name, check in CHECKS.items():
        wrong = ""
        try:
            check(Path(sys.argv[1]))
        except BaseException:  # noqa: BLE001 - told to the test
            wrong = traceback.format_exc()[-2000:]
        print(json.dumps([name, wrong]), flush=True)


if __name__ == "__main__":
    main()
