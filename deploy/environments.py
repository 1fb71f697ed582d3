"""The two virtual environments: made, filled, repaired, and known to be finished.

Every step leaves a stamp in its environment once it has succeeded, holding a digest of what went
into it. A step whose stamp matches is not run again, which is what makes a second start quick; one
without is run again from its beginning, over whatever an interruption left. pip's own cache makes
that cheap. What pip leaves behind when it is killed between two files is looked for and mended:
pip itself takes a half-copied package for an installed one.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from progress import run_shown

PIP_VARIABLES_NOT_OURS = (
    "PIP_TARGET",
    "PIP_PREFIX",
    "PIP_ROOT",
    "PIP_USER",
    "PIP_REQUIRE_VIRTUALENV",
)
PYTHON_VARIABLES_NOT_OURS = (
    "PYTHONPATH",
    "PYTHONHOME",
    "PYTHONSTARTUP",
    "VIRTUAL_ENV",
    "CONDA_PREFIX",
)

FIND_DAMAGED = """
import collections, csv, importlib.metadata, os
owners, damaged = collections.Counter(), set()
found = {}
for d in importlib.metadata.distributions():
    record = (d.read_text("RECORD") or "").splitlines()
    rows = [(str(d.locate_file(row[0])), row[2]) for row in csv.reader(record) if row]
    found[f"{d.metadata['Name']}=={d.version}"] = rows
    owners.update({path for path, _ in rows})
for name, rows in found.items():
    for path, size in rows:
        if path.endswith(".pyc"):
            continue
        try:
            actual = os.stat(path).st_size
        except OSError:
            damaged.add(name)
            break
        if size and int(size) != actual and owners[path] == 1:
            damaged.add(name)
            break
print("\\n".join(sorted(damaged)))
"""
"""Run inside an environment: distributions of which a file is missing or has another size."""


@dataclass(frozen=True)
class Step:
    """One thing to get done: what it is called, what it costs, whether it is done, how to do it."""

    title: str
    size_bytes: int
    seconds: int
    is_done: Callable[[], bool]
    run: Callable[[], None]


class Workshop:
    """Where the steps work: the checkout, the logs, the scratch space, the lock that is held."""

    def __init__(self, root: Path, lock: int | None = None) -> None:
        self.root = root
        self.state = root / ".tidegate"
        self.logs = self.state / "logs" / "setup"
        self.scratch = self.state / "tmp"
        self.lock = lock

    def run(
        self,
        title: str,
        argv: Sequence[str],
        *,
        log: str,
        grows: Sequence[Path],
        cwd: Path | None = None,
        extra_env: Mapping[str, str] | None = None,
    ) -> None:
        """Run a long command of a step with its progress shown; ``StepFailed`` if it fails."""
        self.scratch.mkdir(parents=True, exist_ok=True)
        run_shown(
            title,
            argv,
            log=self.logs / f"{log}.log",
            env={**self.environ(), **(extra_env or {})},
            grows=(*grows, self.scratch),
            hold=() if self.lock is None else (self.lock,),
            cwd=cwd,
        )

    def environ(self) -> dict[str, str]:
        """The caller's environment without what would send pip or Python elsewhere. Temporary
        files go beside the rest: a small ``/tmp`` in memory could not hold a large wheel."""
        dropped = {*PIP_VARIABLES_NOT_OURS, *PYTHON_VARIABLES_NOT_OURS}
        env = {name: value for name, value in os.environ.items() if name not in dropped}
        env.update(
            TMPDIR=str(self.scratch),
            PYTHONUNBUFFERED="1",
            PIP_NO_INPUT="1",
            PIP_DISABLE_PIP_VERSION_CHECK="1",
            PIP_PROGRESS_BAR="off",
        )
        return env


class Environment:
    """A virtual environment of the checkout, with the stamps of what was finished in it."""

    def __init__(self, workshop: Workshop, name: str, *, pip_options: Sequence[str] = ()) -> None:
        self.workshop = workshop
        self.pip_options = tuple(pip_options)
        self.path = workshop.root / name
        self.stamps = self.path / ".tidegate-stamps"

    @property
    def python(self) -> Path:
        """Its interpreter, whether or not it is there yet."""
        return self.path / "bin" / "python"

    def has(self, stamp: str, key: str) -> bool:
        """Whether a step was finished with exactly these inputs, in this very place."""
        try:
            written = json.loads((self.stamps / stamp).read_text())
        except (OSError, ValueError):
            return False
        return bool(written == self._stamp(key))

    def set(self, stamp: str, key: str) -> None:
        """Note that a step is finished: written whole or not at all."""
        self.stamps.mkdir(exist_ok=True)
        partial = self.stamps / f".{stamp}.partial"
        with partial.open("w") as file:
            json.dump(self._stamp(key), file)
            file.flush()
            os.fsync(file.fileno())
        partial.rename(self.stamps / stamp)

    def _stamp(self, key: str) -> dict[str, str]:
        # Scripts in an environment name its full path, so one that was moved must be made again.
        return {"key": key, "path": str(self.path)}

    def works(self) -> bool:
        """Whether its interpreter runs and is the one its packages were installed for."""
        if not self.python.exists() or self._making.exists():
            return False
        code = "import sys; print(sys.prefix); print('%d.%d' % sys.version_info[:2])"
        asked = subprocess.run(
            [str(self.python), "-I", "-S", "-c", code],
            capture_output=True, text=True, check=False, env=self.workshop.environ(),
        )  # fmt: skip
        told = asked.stdout.split("\n")
        if asked.returncode != 0 or len(told) < 2:
            return False
        return (self.path / "lib" / f"python{told[1]}" / "site-packages").is_dir()

    def was_moved(self) -> bool:
        """Whether it was made in another place: its scripts then start something else, or fail."""
        for stamp in self.stamps.glob("[!.]*"):
            try:
                return bool(json.loads(stamp.read_text()).get("path") != str(self.path))
            except (OSError, ValueError, AttributeError):
                continue
        return False

    def make(self, title: str) -> None:
        """Make it if it is not there or does not work; what is installed in a good one is kept."""
        if self.works() and not self.was_moved() and self._has_pip():
            return
        if self.path.is_symlink():
            self.path.unlink()
        elif self.path.exists():
            shutil.rmtree(self.path)
        self._making.parent.mkdir(parents=True, exist_ok=True)
        self._making.touch()
        self.workshop.run(
            title,
            [sys.executable, "-I", "-m", "venv", str(self.path)],
            log=self.path.name.lstrip("."),
            grows=[self.path],
        )
        self._making.unlink()

    def pip(self, title: str, *arguments: str) -> None:
        """``pip install`` into it, after mending and before checking what is there."""
        self.drop_half_installed()
        self._pip(title, *arguments)
        damaged = self.damaged()
        if damaged:
            again = ("--force-reinstall", "--no-deps")
            outside = [name for name in damaged if not name.startswith("tidegate==")]
            if outside:
                self._pip(f"{title} (mending {len(outside)})", *again, *outside)

    def _pip(self, title: str, *arguments: str) -> None:
        self.workshop.run(
            title,
            [str(self.python), "-I", "-m", "pip", "install", *self.pip_options, *arguments],
            log=self.path.name.lstrip("."),
            grows=[self.path],
        )

    def _has_pip(self) -> bool:
        asked = subprocess.run(
            [str(self.python), "-I", "-m", "pip", "--version"],
            capture_output=True, check=False, env=self.workshop.environ(),
        )  # fmt: skip
        return asked.returncode == 0

    def damaged(self) -> list[str]:
        """Packages with a lost or cut file, as ``name==version``."""
        asked = subprocess.run(
            [str(self.python), "-I", "-c", FIND_DAMAGED],
            capture_output=True, text=True, check=True, env=self.workshop.environ(),
        )  # fmt: skip
        return asked.stdout.split()

    def drop_half_installed(self) -> None:
        """Remove the traces by which pip would take a package it was killed in for installed."""
        for site in self.path.glob("lib/python3*/site-packages"):
            for entry in site.glob("*.dist-info"):
                if not (entry / "RECORD").is_file():
                    shutil.rmtree(entry)
            for entry in site.glob("~*"):
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()

    @property
    def _making(self) -> Path:
        """There while the environment is being made: if it stays, that was cut short."""
        return self.workshop.state / f"making{self.path.name}"


def digest(*parts: object) -> str:
    """A short digest of inputs; files by their content, so that touching one changes nothing."""
    whole = hashlib.sha256()
    for part in parts:
        data = part.read_bytes() if isinstance(part, Path) else repr(part).encode()
        whole.update(len(data).to_bytes(8, "big") + data)
    return whole.hexdigest()[:32]
