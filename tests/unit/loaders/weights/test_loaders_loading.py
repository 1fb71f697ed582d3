"""Loading without torch: checking whole models, options, and what is said of it all."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors_files import sums_of, write_file

import loaders
from loaders.weights.load import Options, check, load
from modelcache.safetensors_index import BadFile
from modelcache.types import PIECE_BYTES


def test_the_package_brings_neither_torch_nor_its_own_loading_along() -> None:
    code = (
        "import sys, loaders; assert 'loaders.weights.load' not in sys.modules; loaders.load; "
        "assert 'loaders.weights.load' in sys.modules; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    assert loaders.load is load
    assert loaders.BadFile is BadFile
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = loaders.nothing


@pytest.mark.parametrize("how", ["auto", "cached", "direct"])
def test_a_whole_model_is_read_and_counted(tmp_path: Path, how: str) -> None:
    one = write_file(tmp_path / "a.safetensors", {"a": PIECE_BYTES, "b": 5000}, seed=1)
    two = write_file(tmp_path / "b.safetensors", {"c": 10}, seed=2)
    sums = {str(tmp_path / "a.safetensors"): sums_of(one)}
    report = check(tmp_path, how=how, sums=sums, memory_bytes=PIECE_BYTES)
    assert (report.files, report.tensors, report.size_bytes) == (2, 3, len(one) + len(two))
    assert report.verified_bytes == len(one)
    if how == "direct":
        assert report.direct_bytes == report.size_bytes
    with pytest.raises(BadFile, match=r"b\.safetensors: there are no checksums"):
        check(tmp_path, sums=sums, verify=True)
    assert check(tmp_path, sums=sums, verify=False).verified_bytes == 0


@settings(max_examples=30, deadline=None)
@given(where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_flipped_bit_is_caught_even_in_the_header(
    tmp_path_factory: pytest.TempPathFactory, where: float, bit: int
) -> None:
    path = tmp_path_factory.mktemp("bits") / "x"
    data = bytearray(write_file(path, {"a": 300, "b": 70}))
    sums = {str(path): sums_of(bytes(data))}
    assert check(path, sums=sums).verified_bytes == len(data)
    data[int(where * len(data))] ^= 1 << bit
    path.write_bytes(data)
    with pytest.raises(BadFile, match=r"damaged|header") as caught:
        check(path, sums=sums)
    assert str(path) in str(caught.value)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_a_file_of_any_bytes_is_whole_or_an_error(
    tmp_path_factory: pytest.TempPathFactory, seed: int
) -> None:
    chance = random.Random(seed)
    path = tmp_path_factory.mktemp("any") / "x"
    data = bytearray(write_file(path, {"a": 30, "b": 7}))
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(len(data))
        match chance.randrange(4):
            case 0:
                data[at] = chance.randrange(256)
            case 1:
                del data[at : at + chance.randint(1, 20)]
            case 2:
                data[at:at] = chance.randbytes(chance.randint(1, 20))
            case _:
                data[at] = ord(chance.choice('0123456789-[]{}",: '))
        if not data:
            break
    path.write_bytes(data)
    said = str(path)
    try:
        check(path)
    except BadFile as error:
        said = str(error)
    assert str(path) in said


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"threads": 0}, "threads: 0"),
        ({"memory_bytes": 1}, "memory_bytes: 1"),
        ({"how": "fast"}, "how: 'fast'"),
    ],
)
def test_options_that_make_no_sense_are_refused(
    options: dict[str, object], says: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=says):
        Options(**options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="rank: 2"):
        load(tmp_path, rank=2, world_size=2)
