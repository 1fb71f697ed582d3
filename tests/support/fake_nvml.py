"""A shared library that stands in for NVIDIA's, made of ``fake_nvml.c``: pynvml's own code runs."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

SOURCE = Path(__file__).with_name("fake_nvml.c")
NAME = "libnvidia-ml.so.1"


def build(folder: Path) -> Path:
    """The library, under the name by which it is looked for."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    assert compiler is not None, "a C compiler is needed, as for the data path"
    library = folder / NAME
    argv = [compiler, "-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-o", library, SOURCE]
    subprocess.run(argv, check=True)
    return library


def load(library: Path) -> ctypes.CDLL:
    """It, with the arguments of the calls that make it fail."""
    fake = ctypes.CDLL(str(library))
    fake.fake_xid.argtypes = [ctypes.c_int, ctypes.c_ulonglong]
    return fake
