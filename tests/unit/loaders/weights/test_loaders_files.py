"""Finding a model's files: what is taken, and what is refused."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors_files import header, layout, sums_of, write_file

from loaders.weights.files import choose_tensors, find_files, opened, read_index
from modelcache.safetensors_index import BadFile
from modelcache.types import PIECE_BYTES


def names(folder: Path) -> list[str]:
    return [path.name for path in find_files(folder).paths]


def write_index(folder: Path, weight_map: dict[str, str], name: str = "model") -> None:
    document = {"metadata": {}, "weight_map": weight_map}
    (folder / f"{name}.safetensors.index.json").write_text(json.dumps(document))


def test_a_directory_stands_for_its_files(tmp_path: Path) -> None:
    with pytest.raises(BadFile, match="no safetensors"):
        find_files(tmp_path)
    for name in ("b", "a", "model"):
        write_file(tmp_path / f"{name}.safetensors", {name: 4})
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    assert names(tmp_path) == ["model.safetensors"]
    (tmp_path / "model.safetensors").unlink()
    assert names(tmp_path) == ["a.safetensors", "b.safetensors"]
    write_index(tmp_path, {"b": "b.safetensors"}, name="other")
    assert names(tmp_path) == ["b.safetensors"]
    write_index(tmp_path, {"a": "a.safetensors"})
    assert names(tmp_path) == ["a.safetensors"]


def test_files_may_be_named(tmp_path: Path) -> None:
    one = tmp_path / "x"
    assert find_files(one).paths == (one,)
    assert find_files([str(one), tmp_path / "y", one]).paths == (one, tmp_path / "y")
    with pytest.raises(BadFile, match="no file"):
        find_files([])


def test_a_bad_index_is_an_error_that_names_it(tmp_path: Path) -> None:
    write_index(tmp_path, {"a": "../../etc/passwd"})
    with pytest.raises(BadFile, match=r"model\.safetensors\.index\.json: .*outside"):
        find_files(tmp_path)
    write_index(tmp_path, {"a": "gone.safetensors"})
    with pytest.raises(BadFile, match=r"gone\.safetensors.*No such file"):
        opened(find_files(tmp_path), lambda _: None).__enter__()


@pytest.mark.timeout(20)
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink("/dev/zero", path)])
def test_an_index_that_is_no_file_is_an_error_and_is_not_waited_for(
    tmp_path: Path, make: Callable[[Path], None]
) -> None:
    make(tmp_path / "model.safetensors.index.json")
    with pytest.raises(BadFile, match=r"index\.json: not a regular file"):
        find_files(tmp_path)


@pytest.mark.parametrize("path", ["x" * 300, "y/" * 3000])
def test_a_path_that_cannot_be_looked_at_is_an_error(path: str) -> None:
    with pytest.raises(BadFile, match="cannot be looked at"):
        find_files(path)


def test_an_index_that_names_what_is_not_there_is_an_error(tmp_path: Path) -> None:
    write_file(tmp_path / "x.safetensors", {"a": 4})
    write_index(tmp_path, {"a": "x.safetensors", "b": "x.safetensors"})
    found = find_files(tmp_path)
    with opened(found, lambda _: None) as files, pytest.raises(BadFile, match="'b'"):
        choose_tensors(found, files, [read_index(file) for file in files])


def test_links_are_followed_as_a_hub_s_cache_needs(tmp_path: Path) -> None:
    data = write_file(tmp_path / "blob", {"a": 4})
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").symlink_to("../blob")
    with opened(find_files(tmp_path / "model"), lambda _: None) as files:
        assert read_index(files[0]).size_bytes == len(data)


@pytest.mark.timeout(20)
def test_what_is_no_file_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "folder", "gone", "bad\0name"):
        paths = [tmp_path / name]
        with pytest.raises(BadFile, match=r"not a regular|cannot be opened"):
            opened(find_files(paths), lambda _: None).__enter__()


@pytest.mark.parametrize("keep", [0, 4, 8, 20, -1])
def test_a_file_cut_short_is_an_error_that_names_it(tmp_path: Path, keep: int) -> None:
    data = write_file(tmp_path / "x", {"a": 40, "b": 2})
    (tmp_path / "x").write_bytes(data[:keep])
    with (
        opened(find_files(tmp_path / "x"), lambda _: None) as files,
        pytest.raises(BadFile, match=f"^{tmp_path}/x: "),
    ):
        read_index(files[0])


def test_no_descriptor_stays_open(tmp_path: Path) -> None:
    write_file(tmp_path / "x", {"a": 40})

    def still_open() -> list[str]:
        """Of the files here: what other tests' threads have open comes and goes."""
        targets = map(os.path.realpath, Path("/proc/self/fd").iterdir())
        return [one for one in targets if one.startswith(os.path.realpath(tmp_path))]

    with opened(find_files(tmp_path / "x"), lambda _: None) as files:
        files[0].direct()
        assert still_open()
    with pytest.raises(BadFile):
        opened(find_files([tmp_path / "x", tmp_path / "y"]), lambda _: None).__enter__()
    assert still_open() == []


def test_a_header_is_checked_before_it_is_believed(tmp_path: Path) -> None:
    """Also where it is longer than a piece, and only the text of a name was changed."""
    rows = [("n" * 100 + str(i), "U8", [0], 0) for i in range(60_000)]
    data = bytearray(header(layout([*rows, ("last", "U8", [5], 5)])) + b"12345")
    assert len(data) > PIECE_BYTES
    sums = sums_of(bytes(data))
    at = data.index(b"last")
    data[at] = ord("p")
    (tmp_path / "x").write_bytes(data)
    with opened(find_files(tmp_path / "x"), lambda _: None) as files:
        assert read_index(files[0]).tensors[-1].name == "past"
    with (
        opened(find_files(tmp_path / "x"), lambda _: sums) as files,
        pytest.raises(BadFile, match="damaged") as caught,
    ):
        read_index(files[0])
    assert caught.value.piece == at // PIECE_BYTES


def test_checksums_of_another_size_are_refused(tmp_path: Path) -> None:
    data = write_file(tmp_path / "x", {"a": 4})
    with pytest.raises(BadFile, match="instead of"):
        opened(find_files(tmp_path / "x"), lambda _: sums_of(data + b"x")).__enter__()
