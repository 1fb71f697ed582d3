"""Where the servers of fake pods listen: 127.244.0.7 for the pod that has the address 10.244.0.7.

A process whose environment has ``environ(build(folder))`` in it reaches pods by the addresses that
Kubernetes knows, as anything in a cluster would.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

SOURCE = Path(__file__).with_suffix(".c")
PRELOAD = "LD_PRELOAD"


def loopback(address: str) -> str:
    """Where the server of the pod with this address listens on this machine."""
    first, rest = address.split(".", 1)
    if first != "10":
        raise ValueError(f"{address} is not the address of a pod")
    return f"127.{rest}"


def build(folder: Path) -> Path:
    """The library to preload."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    assert compiler is not None, "a C compiler is needed, as for the data path"
    library = folder / "pod_network.so"
    argv = [compiler, "-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-o", library, SOURCE, "-ldl"]
    subprocess.run(argv, check=True)
    return library


def environ(library: Path) -> dict[str, str]:
    """What a process that talks to pods has in its environment."""
    others = os.environ.get(PRELOAD)
    return {PRELOAD: f"{library}:{others}" if others else str(library)}
