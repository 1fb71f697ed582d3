"""Messages and stubs compiled from the protocols' own files in ``tests/contract``."""

from __future__ import annotations

import importlib
import subprocess
import sys
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

FOLDER = Path(__file__).resolve().parents[1] / "contract"


@cache
def compiled(name: str) -> tuple[Any, Any]:
    """The compiled messages and stubs of ``NAME.proto``; made once in a process."""
    folder = mkdtemp()
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{FOLDER}"]
    command += [f"--python_out={folder}", f"--grpc_python_out={folder}", f"{name}.proto"]
    subprocess.run(command, check=True, timeout=120)
    sys.path.insert(0, folder)
    try:
        messages, stubs = (importlib.import_module(f"{name}_pb2{end}") for end in ("", "_grpc"))
        return messages, stubs
    finally:
        sys.path.remove(folder)
