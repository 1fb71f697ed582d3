"""The data path, compiled: its hot modules translated to C by mypyc, loaded in their place.

Compiling is optional and changes nothing but speed: the source is the Python source. What was
compiled lies inside the virtual environment, in a folder named after a digest of exactly that
source and that Python, so an edited module never meets an old binary: without a match the worker
runs the plain modules. ``TIDEGATE_COMPILED=0`` has it always do so.

    python -m gateway.compiled build     # needs mypy and a C compiler; half a minute
    python -m gateway.compiled           # says which of the two a worker would run
    python -m gateway.compiled check     # the same as an exit status: 0 is compiled
"""

from __future__ import annotations

import hashlib
import importlib.abc
import importlib.machinery
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

MODULES = (
    "gateway.datapath.answer",
    "gateway.datapath.protocol.bodies",
    "gateway.datapath.protocol.chunks",
    "gateway.datapath.client",
    "gateway.datapath.context",
    "gateway.datapath.exchange",
    "gateway.datapath.protocol.http1",
    "gateway.datapath.local",
    "gateway.datapath.metrics",
    "gateway.datapath.pool",
    "gateway.datapath.request",
    "gateway.datapath.protocol.sse",
    "gateway.datapath.upstream",
    "gateway.picker.stream",
    "router.endpoint",
    "router.failures",
    "router.filters",
    "router.ledger",
    "router.pick",
    "router.request",
    "router.scorers",
    "router.tokens",
)
"""What a request passes through, apart from msgspec's structs, which are C already."""

BUILD_TIMEOUT_S = 600
KEPT = 4
_ROOT = Path(__file__).resolve().parent.parent
_FOLDERS = ("gateway/datapath", "gateway/picker", "router")
_SUFFIX = str(sysconfig.get_config_var("EXT_SUFFIX") or ".so")


class CompileError(Exception):
    """The modules could not be compiled; the message is one line with the last words of mypyc."""


def source_digest(root: Path = _ROOT) -> str:
    """Digest of every source file of the packages that are compiled and of this Python's ABI."""
    digest = hashlib.sha256(_SUFFIX.encode())
    for folder in _FOLDERS:
        for path in sorted((root / folder).rglob("*.py")):
            name = str(path.relative_to(root)).encode()
            digest.update(name + b"\0" + path.read_bytes())
    return digest.hexdigest()[:24]


def compiled_folder(root: Path = _ROOT) -> Path:
    """Where the binaries of the source under ``root`` belong, whether or not they are there."""
    return Path(sys.prefix) / "lib" / "tidegate-compiled" / source_digest(root)


def is_available() -> bool:
    """Whether a worker started now would run compiled modules."""
    return os.environ.get("TIDEGATE_COMPILED") != "0" and (compiled_folder() / "done").is_file()


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self, files: dict[str, Path]) -> None:
        self._files = files

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Our binary for a name that has one, else nothing."""
        file = self._files.get(fullname)
        if file is None:
            return None
        loader = importlib.machinery.ExtensionFileLoader(fullname, str(file))
        return importlib.util.spec_from_file_location(fullname, str(file), loader=loader)


def install() -> bool:
    """Have this process import the compiled modules, if there are any for today's source. To be
    called before the first of them is imported. Returns whether it did."""
    if not is_available():
        return False
    folder = compiled_folder()
    files = {
        ".".join(path.relative_to(folder).parts)[: -len(_SUFFIX)]: path
        for path in folder.rglob(f"*{_SUFFIX}")
    }
    sys.meta_path.insert(0, _Finder(files))
    return True


def build() -> Path:
    """Compile today's source unless that is done already. Returns the folder of the binaries.

    Raises ``CompileError`` without mypy or a C compiler, or where either refuses.
    """
    target = compiled_folder()
    if (target / "done").is_file():
        return target
    if importlib.util.find_spec("mypyc") is None:
        raise CompileError(
            f"mypy is not installed here: {sys.executable} -m pip install mypy setuptools"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        scratch = Path(folder)
        _copy_sources(scratch)
        target = compiled_folder(scratch)  # of what is compiled, should it be edited meanwhile
        _compile(scratch)
        _collect(scratch, target)
    remove_old(target.parent)
    return target


def remove_old(folder: Path) -> None:
    """Keep the binaries of the newest few sources: branches, and checkouts that share a Python."""
    built = [path for path in folder.iterdir() if (path / "done").is_file()]
    for old in sorted(built, key=lambda path: path.stat().st_mtime)[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)


def _copy_sources(scratch: Path) -> None:
    """So that nothing is written beside the originals."""
    for folder in _FOLDERS:
        shutil.copytree(
            _ROOT / folder, scratch / folder, ignore=shutil.ignore_patterns("__pycache__", "*.so")
        )
    shutil.copy(_ROOT / "gateway" / "__init__.py", scratch / "gateway" / "__init__.py")


def _compile(scratch: Path) -> None:
    files = [name.replace(".", "/") + ".py" for name in MODULES]
    command = [sys.executable, "-P", "-m", "mypyc", "--ignore-missing-imports", *files]
    env = {**os.environ, "MYPY_CACHE_DIR": str(scratch / "cache"), "PYTHONPATH": str(scratch)}
    env.setdefault("CFLAGS", "-O2 -g0")
    try:
        done = subprocess.run(
            command,
            cwd=scratch,
            env=env,
            capture_output=True,
            text=True,
            timeout=BUILD_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CompileError(f"mypyc did not run: {error}") from error
    if done.returncode != 0:
        said = (done.stderr or done.stdout).strip().splitlines() or ["no output"]
        raise CompileError(f"mypyc failed: {said[-1]}")


def _collect(scratch: Path, target: Path) -> None:
    """Move the binaries to their folder, whole or not at all."""
    fresh = scratch / "result"
    built = scratch / "build"
    for path in scratch.rglob(f"*{_SUFFIX}"):
        if built in path.parents or fresh in path.parents:
            continue
        place = fresh / path.relative_to(scratch)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, place)
    (fresh / "done").write_text("")
    shutil.rmtree(target, ignore_errors=True)
    fresh.rename(target)


def main(arguments: list[str]) -> int:
    """The small command line described in the module."""
    if arguments == ["build"]:
        try:
            build()
        except CompileError as error:
            sys.stderr.write(f"tidegate: {error}\n")
            return 1
    elif arguments == ["check"]:
        return 0 if is_available() else 1
    elif arguments:
        sys.stderr.write("usage: python -m gateway.compiled [build|check]\n")
        return 2
    sys.stdout.write("compiled\n" if is_available() else "plain Python\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
