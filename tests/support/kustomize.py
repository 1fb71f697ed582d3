"""Builds kustomizations: by the program ``kustomize`` where it is installed, else by its Go code as
a library, in a process of its own.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from fetched_wheels import FetchedWheel

KUSTOMIZE = FetchedWheel(
    name="pykustomize",
    version="0.1.4",
    sha256={"x86_64": "f8da6be12fb35b56158d2f9043a67d39c1ce84eae9c8f344c7ed934709192467"},
)
LIBRARY = Path("pykustomize") / "_lib" / "linux-amd64" / "libpykustomize.so"
LIMIT_S = 60
CODE = """
import ctypes, sys
library = ctypes.CDLL(sys.argv[1])
library.pykustomize_last_error.restype = ctypes.c_char_p
built = ctypes.c_char_p()
if library.pykustomize_build(sys.argv[2].encode(), b"{}", ctypes.byref(built)):
    sys.exit(library.pykustomize_last_error().decode())
sys.stdout.write(built.value.decode())
"""


def build(folder: Path) -> list[dict[str, Any]]:
    """The objects of a kustomization."""
    done = subprocess.run(
        [*_program(), str(folder)], capture_output=True, text=True, timeout=LIMIT_S, check=False
    )
    assert done.returncode == 0, done.stderr
    return [one for one in yaml.safe_load_all(done.stdout) if one]


def _program() -> list[str]:
    installed = shutil.which("kustomize")
    if installed:
        return [installed, "build"]
    return [sys.executable, "-c", CODE, str(KUSTOMIZE.find() / LIBRARY)]


def write_overlay(
    folder: Path,
    resources: Sequence[str],
    components: Sequence[str] = (),
    namespace: str = "models",
) -> Path:
    """A kustomization like a user's: a namespace, an image, bases and components by their paths."""
    folder.mkdir(parents=True)
    content = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "namespace": namespace,
        "resources": list(resources),
        "components": list(components),
        "images": [
            {
                "name": "registry.example.com/tidegate",
                "newName": "your.registry/tidegate",
                "newTag": "0.1.0",
            }
        ],
    }
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(content))
    return folder
