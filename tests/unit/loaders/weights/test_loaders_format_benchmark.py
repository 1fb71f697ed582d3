"""Measuring load formats: what is measured, and that nothing one does can harm the others."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from process_fixtures import children_of

from loaders.weights.format_benchmark import Speed, choose, drop, in_child, measure


def test_the_largest_file_that_may_be_copied_is_chosen_else_the_smallest(tmp_path: Path) -> None:
    files = []
    for size in (300, 100, 200):
        files.append(tmp_path / str(size))
        files[-1].write_bytes(bytes(size))
    assert choose(files, 250).name == "200"
    assert choose(files, 300).name == "300"
    assert choose(files, 50).name == "100"


def crash() -> float:
    os._exit(3)


def fail() -> float:
    raise ValueError("no such\nformat " + "x" * 1000)


@pytest.mark.parametrize(("work", "says"), [(crash, "it crashed"), (fail, "ValueError: no such f")])
def test_what_goes_wrong_in_a_child_is_told(work: Callable[[], float], says: str) -> None:
    with pytest.raises(OSError, match=says):
        in_child(work, 60.0)


def test_a_child_answers_or_is_ended_in_time() -> None:
    before = set(children_of(os.getpid()))  # an earlier test's, if any
    assert in_child(lambda: 12.5, 60.0) == 12.5
    began_s = time.monotonic()
    with pytest.raises(TimeoutError):
        in_child(lambda: time.sleep(600) or 0.0, 0.2)
    assert time.monotonic() - began_s < 300
    with pytest.raises(TimeoutError):
        in_child(lambda: 1.0, 0.0)
    assert set(children_of(os.getpid())) <= before, "none is left"


def test_pages_are_dropped_and_that_is_checked() -> None:
    from modelcache.pagecache import residency
    from modelcache.types import FileRange

    # On a disk: of a file in a tmpfs nothing can be dropped.
    with tempfile.TemporaryDirectory(prefix="tidegate-formats-", dir="/var/tmp") as folder:
        file = Path(folder, "weights")
        file.write_bytes(os.urandom(4 << 20))
        assert drop([str(file)])
        whole = [FileRange(path=str(file))]
        # The kernel spares pages that something is being done with at the moment.
        for _ in range(1_000):
            if residency.residency(whole).bytes_cached == 0:
                break
            drop([str(file)])
            time.sleep(0.01)
        assert residency.residency(whole).bytes_cached == 0


def test_every_format_is_tried_absent_or_out_of_time(tmp_path: Path) -> None:
    def reads(files: Sequence[str]) -> Iterator[tuple[str, Any]]:
        raise AssertionError("read by the scripted figures only")

    figures = {"one": 5.0, "two": 7.0}

    def best(read: Any, files: Sequence[str], device: str, rounds: int) -> float:
        assert device == "cpu"
        return read() + (0.5 if rounds == 0 else 0.0)

    given: dict[str, Any] = {
        **{name: ("json", lambda value=value: value) for name, value in figures.items()},
        "absent": ("no_such_package", reads),
        "broken": ("json", fail),
    }
    file = tmp_path / "weights"
    file.write_bytes(bytes(100))
    found = list(measure([str(file)], given, may_drop=True, device="cpu", within_s=60.0, take=best))
    assert found[:2] == [
        Speed(format="one", warm_bytes_s=5.0, cold_bytes_s=5.5),
        Speed(format="two", warm_bytes_s=7.0, cold_bytes_s=7.5),
    ]
    assert found[3] == Speed(format="absent", problem="not installed")
    assert found[2].problem.startswith("ValueError: no such")
    warm = list(measure([str(file)], given, may_drop=False, device="cpu", within_s=60.0, take=best))
    assert [one.cold_bytes_s for one in warm] == [None] * 4
    late = list(measure([str(file)], given, may_drop=False, device="cpu", within_s=0.0, take=best))
    assert [one.problem for one in late if one.format != "absent"] == [
        "not measured, the time was up"
    ] * 3
