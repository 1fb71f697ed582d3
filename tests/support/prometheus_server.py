"""A real Prometheus on 127.0.0.1, over blocks made of text or scraping what it is told to."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from bench import procs
from bench.debian import Program

ROOT = Path(__file__).resolve().parent.parent.parent
PROMETHEUS = Program(
    name="prometheus", packages=("prometheus",), path="usr/bin/prometheus", version="--version"
)
CONFIG = """\
global: {{scrape_interval: {interval_s}s, scrape_timeout: {interval_s}s}}
scrape_configs:
- job_name: tests
  static_configs: [{{targets: [{targets}]}}]
"""


def make_blocks(openmetrics: Path, data: Path) -> None:
    """Put the samples in a file into a database."""
    tool = PROMETHEUS.find(ROOT).with_name("promtool")
    done = subprocess.run(
        [tool, "tsdb", "create-blocks-from", "openmetrics", openmetrics, data],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@contextmanager
def prometheus(
    folder: Path, *, targets: tuple[str, ...] = (), interval_s: int = 1
) -> Iterator[str]:
    """Its URL, while it runs on the database in ``folder``/data and scrapes these ``host:port``."""
    folder.mkdir(parents=True, exist_ok=True)
    port = procs.free_port()
    shown = ", ".join(f'"{target}"' for target in targets)
    config = CONFIG.format(interval_s=interval_s, targets=shown)
    (folder / "prometheus.yml").write_text(config)
    with (folder / "output.log").open("wb") as output:
        process = subprocess.Popen(
            [
                PROMETHEUS.find(ROOT),
                f"--config.file={folder / 'prometheus.yml'}",
                f"--storage.tsdb.path={folder / 'data'}",
                "--storage.tsdb.retention.time=60d",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stdout=output,
            stderr=output,
            cwd=folder,
        )
    url = f"http://127.0.0.1:{port}"
    try:
        deadline_s = time.monotonic() + 60
        while not _is_ready(url):
            if process.poll() is not None or time.monotonic() > deadline_s:
                raise RuntimeError(f"no Prometheus: {(folder / 'output.log').read_text()[-2000:]}")
            time.sleep(0.1)
        yield url
    finally:
        process.terminate()
        process.wait(30)


def _is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/-/ready", trust_env=False, timeout=5).status_code == 200
    except httpx.HTTPError:
        return False
