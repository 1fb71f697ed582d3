"""Finds a program, or fetches it where it is not installed: Debian's package, unpacked, no root."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

TOOLS = Path(".tidegate") / "tools"
FETCH_LIMIT_S = 180

Which = Callable[[str], str | None]


class ProgramMissing(RuntimeError):
    """The program is not here and could not be fetched; the message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """``packages``: that releases of Debian and Ubuntu have it in; ``path``: where it lies in them;
    ``version``: the argument with which it says its version."""

    name: str
    packages: tuple[str, ...]
    path: str
    version: str

    def find(self, root: Path, which: Which = shutil.which) -> Path:
        """The installed one, or one fetched once into ``.tidegate/tools`` of ``root``."""
        installed = which(self.name) or which(f"/{self.path}")
        if installed:
            return Path(installed)
        tools = root / TOOLS
        fetched = tools / self.name / self.path
        with self._alone(tools):
            if not fetched.exists():
                self._fetch(tools, which)
        return fetched

    @contextlib.contextmanager
    def _alone(self, tools: Path) -> Iterator[None]:
        tools.mkdir(parents=True, exist_ok=True)
        with (tools / f"{self.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _fetch(self, tools: Path, which: Which) -> None:
        if not which("apt-get") or not which("dpkg-deb"):
            raise ProgramMissing(
                f"{self.name} is not installed, and this is no Debian to fetch it from"
            )
        with tempfile.TemporaryDirectory(dir=tools) as text:
            scratch = Path(text)
            said = ""
            for options in ((), _own_lists(scratch)):
                if options:
                    said += _apt(scratch, [*options, "update", "-q"])
                for package in self.packages:
                    said += _apt(scratch, [*options, "download", package])
                    found = self._unpack(scratch)
                    if found is not None:
                        found.replace(tools / self.name)
                        return
        raise ProgramMissing(
            f"{self.name} is not installed and apt does not give it:\n{said[-1_500:]}"
        )

    def _unpack(self, scratch: Path) -> Path | None:
        """The unpacked package, if it has the program and that runs here."""
        for number, package in enumerate(sorted(scratch.glob("*.deb"))):
            target = scratch / f"unpacked-{number}"
            subprocess.run(["dpkg-deb", "-x", package, target], check=True, timeout=60)
            package.unlink()
            program = target / self.path
            if program.is_file() and self._runs(program):
                return target
        return None

    def _runs(self, program: Path) -> bool:
        done = subprocess.run([program, self.version], capture_output=True, timeout=20, check=False)
        return done.returncode == 0


def _own_lists(scratch: Path) -> tuple[str, ...]:
    """Options for lists of packages of our own, where the system has none (as in containers)."""
    (scratch / "state" / "lists" / "partial").mkdir(parents=True, exist_ok=True)
    (scratch / "cache" / "archives" / "partial").mkdir(parents=True, exist_ok=True)
    return ("-o", f"Dir::State={scratch / 'state'}", "-o", f"Dir::Cache={scratch / 'cache'}",
            "-o", "Dir::State::status=/var/lib/dpkg/status",
            "-o", "APT::Sandbox::User=root")  # fmt: skip


def _apt(scratch: Path, arguments: list[str]) -> str:
    done = subprocess.run(
        ["apt-get", *arguments],
        cwd=scratch,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=FETCH_LIMIT_S,
        env={**os.environ, "DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C"},
        check=False,
    )
    return done.stdout.decode(errors="replace")
