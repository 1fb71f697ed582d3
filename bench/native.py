"""Compiles the mock replicas and the load generator with the machine's own C compiler."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

SOURCES = Path(__file__).parent / "native"
FLAGS = ("-O2", "-std=gnu11", "-Wall", "-Wextra")


class BuildError(RuntimeError):
    """The C compiler is missing or refused; the message says which."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Programs:
    """Paths of the compiled programs."""

    replica: Path
    loadgen: Path


def build(folder: Path) -> Programs:
    """Compile into ``folder`` unless the same sources were compiled there before."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        raise BuildError("no C compiler: install gcc (Debian: apt-get install gcc libc6-dev)")
    digest = hashlib.sha256(" ".join(FLAGS).encode())
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.name.encode() + source.read_bytes())
    target = folder / digest.hexdigest()[:16]
    target.mkdir(parents=True, exist_ok=True)
    for name in ("replica", "loadgen"):
        program = target / name
        if program.exists():
            continue
        partial = target / f"{name}.partial"
        command = [compiler, *FLAGS, "-o", str(partial), str(SOURCES / f"{name}.c")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        if done.returncode != 0:
            raise BuildError(f"{' '.join(command)}\n{done.stderr}")
        partial.rename(program)
    return Programs(replica=target / "replica", loadgen=target / "loadgen")
