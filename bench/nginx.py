"""Finds nginx, or fetches it where it is not installed: Debian's package, unpacked, no root."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

PACKAGES = ("nginx", "nginx-core", "nginx-light")
"""Debian's and Ubuntu's releases have the program in different ones of these."""

TOOLS = Path(".tidegate") / "tools"
FETCH_LIMIT_S = 180


class NginxMissing(RuntimeError):
    """nginx is not here and could not be fetched; the message says why."""


Which = Callable[[str], str | None]


def nginx_path(root: Path, which: Which = shutil.which) -> Path:
    """The program: the installed one, or one fetched once into ``.tidegate/tools`` of ``root``."""
    installed = which("nginx") or which("/usr/sbin/nginx")
    if installed:
        return Path(installed)
    tools = root / TOOLS
    fetched = tools / "nginx" / "usr" / "sbin" / "nginx"
    with _alone(tools):
        if not fetched.exists():
            _fetch(tools, which)
    return fetched


@contextlib.contextmanager
def _alone(tools: Path) -> Iterator[None]:
    tools.mkdir(parents=True, exist_ok=True)
    with (tools / "nginx.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _fetch(tools: Path, which: Which) -> None:
    if not which("apt-get") or not which("dpkg-deb"):
        raise NginxMissing("nginx is not installed, and this is no Debian to fetch it from")
    with tempfile.TemporaryDirectory(dir=tools) as text:
        scratch = Path(text)
        said = ""
        for options in ((), _own_lists(scratch)):
            if options:
                said += _apt(scratch, [*options, "update", "-q"])
            for package in PACKAGES:
                said += _apt(scratch, [*options, "download", package])
                found = _unpack(scratch)
                if found is not None:
                    found.replace(tools / "nginx")
                    return
    raise NginxMissing(f"nginx is not installed and apt does not give it:\n{said[-1_500:]}")


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


def _unpack(scratch: Path) -> Path | None:
    """The unpacked package, if it has the program and that runs here."""
    for number, package in enumerate(sorted(scratch.glob("*.deb"))):
        target = scratch / f"unpacked-{number}"
        subprocess.run(["dpkg-deb", "-x", package, target], check=True, timeout=60)
        package.unlink()
        program = target / "usr" / "sbin" / "nginx"
        if program.is_file() and _runs(program):
            return target
    return None


def _runs(program: Path) -> bool:
    done = subprocess.run([program, "-v"], capture_output=True, timeout=20, check=False)
    return done.returncode == 0
