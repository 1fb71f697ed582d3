"""Several processes on one cache directory: a model is fetched once, whoever wants it."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
from folder_store import PIECE, Rig, bytes_of, count_bytes, read_tree

from modelcache.store.lookup import read_fetching
from modelcache.types import Progress

FILES = {"model.safetensors": bytes_of(6 * PIECE + 1, 1), "config.json": b"{}"}
SIZE = sum(map(len, FILES.values()))
BY_ANOTHER = "by another process"


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    return Rig(root=tmp_path)


def is_fetching(progress: Progress) -> bool:
    return progress.phase == "fetching" and progress.detail != BY_ANOTHER


PRELOAD = """
import sys
from pathlib import Path
from folder_store import Rig

def on_progress(progress):
    global told
    if progress.detail == "by another process" and not told:
        told = True
        print("waits", flush=True)

told = False
model = Rig(root=Path(sys.argv[1])).cache().preload(sys.argv[2], on_progress=on_progress)
print(model.path, flush=True)
"""

KILLED = """
import os, signal, sys
from pathlib import Path
from folder_store import Rig

def on_progress(progress):
    if progress.bytes_done >= 4096 * 2:
        os.kill(os.getpid(), signal.SIGKILL)

Rig(root=Path(sys.argv[1])).cache().preload(sys.argv[2], on_progress=on_progress)
"""


def start(rig: Rig, code: str, url: str) -> subprocess.Popen[str]:
    support = str(Path(sys.modules[Rig.__module__].__file__ or "").parent)
    return subprocess.Popen(
        [sys.executable, "-c", code, str(rig.root), url],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": support},
    )


def test_processes_wait_for_the_one_that_fetches(rig: Rig) -> None:
    url = rig.put("models/a", FILES)
    with ExitStack() as stack:
        others: list[subprocess.Popen[str]] = []

        def on_progress(progress: Progress) -> None:
            if is_fetching(progress) and not others:
                others.extend(stack.enter_context(start(rig, PRELOAD, url)) for _ in range(3))
                for process in others:
                    assert process.stdout is not None
                    assert process.stdout.readline() == "waits\n"

        model = rig.cache().preload(url, on_progress=on_progress)
        for process in others:
            assert process.stdout is not None
            assert process.stdout.read() == f"{model.path}\n"
            assert process.wait() == 0
    assert rig.fetched_bytes == SIZE
    assert read_tree(model.path) == FILES


def test_processes_that_start_together_fetch_once(rig: Rig) -> None:
    url = rig.put("models/a", FILES)
    with ExitStack() as stack:
        processes = [stack.enter_context(start(rig, PRELOAD, url)) for _ in range(4)]
        outputs = [process.communicate()[0].split()[-1] for process in processes]
    assert len(set(outputs)) == 1
    assert read_tree(Path(outputs[0])) == FILES
    assert rig.fetched_bytes == SIZE
    cache = rig.cache()
    assert cache.usage().bytes_used == count_bytes(cache.dir)


def test_a_killed_process_leaves_its_pieces_to_the_next(rig: Rig) -> None:
    url = rig.put("models/a", {"model.safetensors": FILES["model.safetensors"]})
    with start(rig, KILLED, url) as process:
        process.wait()
    assert process.returncode < 0
    there = rig.fetched_bytes
    assert there == 2 * PIECE
    cache = rig.cache()
    assert read_fetching(cache.store, url) is None, "a dead one fetches nothing"
    assert cache.find(url) is None
    assert read_tree(cache.preload(url).path)["model.safetensors"] == FILES["model.safetensors"]
    assert rig.fetched_bytes == len(FILES["model.safetensors"])
