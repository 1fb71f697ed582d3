"""What only torch can show of the loader; ``loading_checks.py MODEL`` under the engine's Python.

Prints one line of JSON for each check: its name, and what went wrong or nothing.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
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
from modelcache.types import PIECE_BYTES

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


def copied(path: Any, to: Tensors, *, cut: int = 1, **options: Any) -> int:
    """Copies as vLLM makes them: whole tensors, or of each part of the rows one by one. Returns how
    many were made by reading."""
    made = 0
    with loaders.in_place_copies() as copies:
        copy = copies.copy

        def count(target: Any, source: Any) -> bool:
            nonlocal made
            made += (done := copy(target, source))
            return done

        copies.copy = count  # type: ignore[method-assign]
        for name, tensor in loaders.iterate(path, copies=copies, **options):
            rows = tensor.shape[0] if tensor.ndim else 0
            if cut > 1 and rows and rows % cut == 0:
                for part in range(cut):
                    at, length = part * rows // cut, rows // cut
                    to[name].narrow(0, at, length).copy_(tensor.narrow(0, at, length))
            else:
                to[name].copy_(tensor)
            del tensor
    return made


def empty_like(expected: Tensors) -> Tensors:
    return {name: torch.empty_like(tensor) for name, tensor in expected.items()}


def check_copies_of_cached_files_are_made_in_place(model: Path) -> None:
    expected = safetensors.torch.load_file(model / "model.safetensors")
    sums = {str(model / "model.safetensors"): sums_of((model / "model.safetensors").read_bytes())}
    for cut in (1, 2):
        for way in ({"verify": False}, {"sums": sums, "verify": True}):
            got = empty_like(expected)
            assert copied(model, got, cut=cut, **way) >= len(expected)
            must_be(got, expected)
    for seed in range(3):
        with sharded(30 + seed) as (place, tensors):
            sums = {str(file): sums_of(file.read_bytes()) for file in place.glob("*.safetensors")}
            for cut in (1, 3):
                got = empty_like(tensors)
                assert copied(place, got, cut=cut, sums=sums) > len(tensors) / 2
                must_be(got, tensors)


def check_what_is_read_another_way_is_right_too(model: Path) -> None:
    """Other types, other layouts, rows of a transposed matrix, a tensor changed before its copy,
    tensors kept to the end."""
    rows = [("a", "F32", [300, 40], 48000), ("b", "F32", [40, 300], 48000), ("c", "F32", [9], 36)]
    data = (100 * torch.rand(24009)).numpy().tobytes()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "x.safetensors")
        path.write_bytes(header(layout(rows)) + data)
        sums = {str(path): sums_of(path.read_bytes())}
        expected = safetensors.torch.load_file(path)
        with loaders.in_place_copies() as copies:
            kept = dict(loaders.iterate(path, sums=sums, copies=copies))
            must_be({name: tensor.clone() for name, tensor in kept.items()}, expected)
            for name, tensor in loaders.iterate(path, sums=sums, copies=copies):
                whole = expected[name]
                half = torch.empty(whole.shape, dtype=torch.bfloat16)
                half.copy_(tensor)
                assert same(half, whole.bfloat16())
                number = torch.empty(whole.shape, dtype=torch.int32)
                number.copy_(tensor)
                assert same(number, whole.int()), "as many bytes, but not the same"
                turned = torch.empty(tuple(reversed(whole.shape)))
                turned.copy_(tensor.t())
                assert same(turned, whole.t())
                wider = torch.empty((2, *whole.shape))
                wider.copy_(tensor)
                assert same(wider[1], whole)
                part, length = torch.empty(whole.shape[-1] // 3), whole.shape[-1] // 3
                part.copy_(tensor.reshape(-1, whole.shape[-1])[-1, length : 2 * length])
                assert same(part, whole.reshape(-1, whole.shape[-1])[-1, length : 2 * length])
                tensor.data[..., 1] *= 2
                place = torch.empty_like(whole)
                place.copy_(tensor)
                must = whole.clone()
                must[..., 1] *= 2
                assert same(place, must), "changed in memory, copied from the file"
        assert path.read_bytes().endswith(data), "the file is as it was"


def check_flipped_bits_are_found_by_copies(model: Path) -> None:
    chance = random.Random(17)
    sizes = [5_000_000, 3, 4_000_000, 9_000_000, 17, 30]
    rows = [(f"t{i}", "U8", [size], size) for i, size in enumerate(sizes)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "x.safetensors")
        whole = header(layout(rows)) + chance.randbytes(sum(sizes))
        path.write_bytes(whole)
        sums = {str(path): sums_of(whole)}
        expected = safetensors.torch.load_file(path)
        for number in range(8):
            data = bytearray(whole)
            # Behind the piece that the header is checked with.
            data[chance.randrange(PIECE_BYTES, len(data))] ^= 1 << chance.randrange(8)
            path.write_bytes(data)
            if number % 4 == 3:  # copied or not

                def skip() -> None:
                    with loaders.in_place_copies() as copies:
                        for _ in loaders.iterate(path, sums=sums, copies=copies):
                            pass

                refused(skip, str(path))
                continue
            refused(
                partial(copied, path, empty_like(expected), cut=1 + number % 2, sums=sums),
                str(path),
            )
        path.write_bytes(whole)
        for some in (["t0", "t3"], ["t1"], ["t5", "t4"], ["t2"]):
            got = empty_like({name: expected[name] for name in some})
            assert copied(path, got, sums=sums, tensors=some) == len(some)
            must_be(got, {name: expected[name] for name in some})


def check_nobody_cuts_a_file_that_is_mapped(model: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "x.safetensors")
        path.write_bytes(
            header(layout([("a", "U8", [9000], 9000), ("b", "U8", [9], 9)])) + b"x" * 9009
        )
        with loaders.in_place_copies() as copies:
            weights = loaders.iterate(path, copies=copies)
            _, first = next(weights)
            cut = subprocess.Popen(
                [sys.executable, "-c", f"import os; os.truncate({str(path)!r}, 0)"]
            )
            with suppress(subprocess.TimeoutExpired):
                cut.wait(2)
            assert first[8999] == ord("x"), "it would be SIGBUS"
            refused(partial(next, weights), "changed while it was read")
            del first, weights
            assert cut.wait(30) == 0
        with path.open("r+b") as writer:
            writer.write(
                header(layout([("a", "U8", [9000], 9000), ("b", "U8", [9], 9)])) + b"x" * 9009
            )
            writer.flush()
            expected = safetensors.torch.load_file(path)
            got = empty_like(expected)
            assert copied(path, got) == 0, "it may be written any time"
            must_be(got, expected)


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
