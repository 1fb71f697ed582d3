"""Where nginx is: installed, or Debian's package."""

from __future__ import annotations

import shutil
from pathlib import Path

from bench.debian import Program, Which

NGINX = Program(
    name="nginx",
    packages=("nginx", "nginx-core", "nginx-light"),
    path="usr/sbin/nginx",
    version="-v",
)


def nginx_path(root: Path, which: Which = shutil.which) -> Path:
    """The program. Raises ``ProgramMissing``."""
    return NGINX.find(root, which)
