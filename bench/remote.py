"""Models from stores to the disk, digests verified: ours beside the stores' own clients.

Every download runs in a process of its own, in turn, from an nginx on the same machine; rounds
begin with another client each. Bytes are on the disk's file system when the clock stops and not
forced to the platter: that costs every client the same and is the disk's figure, not the client's.
"""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tempfile
import venv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import machine, remote_clients, remote_servers, stats

ROOT = Path(__file__).resolve().parent.parent
PEER_PACKAGES = ("s3fs", "aiohttp", "blake3", "xxhash")
"""In an environment of their own: s3fs wants another botocore than boto3."""

ELSEWHERE = ("s3:s3fs",)
LIMIT_S = 300.0
WINDOW_S = 1.0
KEYS = {
    "AWS_ACCESS_KEY_ID": "AKIABENCHBENCH00",
    "AWS_SECRET_ACCESS_KEY": "bench-secret",
    "AWS_REGION": "us-east-1",
    "OSS_ACCESS_KEY_ID": "LTAIbench",
    "OSS_ACCESS_KEY_SECRET": "bench-secret",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """One run."""

    rounds: int = 5
    files: int = 4
    file_bytes: int = 256 * 1024 * 1024
    only: tuple[str, ...] = ()
    rate_bytes_s: int = 200_000_000
    """The cap of the run that is watched."""
    out: Path = Path("bench/results")


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """What all downloads of a run share."""

    served: remote_servers.Served
    digests: Mapping[str, str]
    folder: Path
    peers: Path


def ensure_peers(folder: Path) -> None:
    """Create the peers' virtual environment, once; half a minute and about 100 MB."""
    marker = folder / "installed.json"
    if marker.exists() and json.loads(marker.read_text()) == list(PEER_PACKAGES):
        return
    print(f"installing {', '.join(PEER_PACKAGES)} into {folder} (about 100 MB)", flush=True)
    if not (folder / "bin" / "python").exists():
        venv.create(folder, with_pip=True)
    command = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", *PEER_PACKAGES]
    subprocess.run(command, check=True, timeout=600)
    marker.write_text(json.dumps(list(PEER_PACKAGES)))


def _digests(served: remote_servers.Served, folder: Path) -> dict[str, str]:
    """The tree digest of every file that is served."""
    target = folder / "served" / remote_servers.BUCKET / remote_servers.PREFIX
    job = _job("http:tidegate", served, {}, target)
    found = remote_clients.digest_files(job)
    step = remote_clients.PIECE_BYTES
    return {
        name: remote_clients.tree_digest(size, [found[name, at] for at in range(0, size, step)])
        for name, size in served.files.items()
    }


def _job(
    client: str,
    served: remote_servers.Served,
    digests: Mapping[str, str],
    target: Path,
    *,
    port: int | None = None,
    rate_bytes_s: int | None = None,
) -> remote_clients.Job:
    tls = client.startswith("https:")
    ports = {"https": served.tls_port, "oss": served.oss_port}
    at = port or ports.get(client.partition(":")[0], served.port)
    return remote_clients.Job(
        client=client,
        url=f"{'https' if tls else 'http'}://127.0.0.1:{at}",
        bucket=remote_servers.BUCKET,
        prefix=remote_servers.PREFIX,
        files=served.files,
        digests=dict(digests),
        target=str(target),
        certificate=str(served.certificate),
        rate_bytes_s=rate_bytes_s,
    )


def download(bench: Bench, client: str, **fields: Any) -> dict[str, Any]:
    """One download in a fresh process and a fresh folder, which is removed again."""
    target = Path(tempfile.mkdtemp(prefix="target-", dir=bench.folder))
    job = _job(client, bench.served, bench.digests, target, **fields)
    python = bench.peers / "bin" / "python" if client in ELSEWHERE else Path(sys.executable)
    keys = {**KEYS, "AWS_ENDPOINT_URL": job.url, "OSS_ENDPOINT": job.url}
    try:
        os.sync()  # what the one before left to be written is not this one's
        done = subprocess.run(
            [python, "-m", "bench.remote_clients", json.dumps(dataclasses.asdict(job))],
            cwd=ROOT,
            env={**os.environ, **keys, "HOME": str(bench.folder)},
            capture_output=True,
            timeout=LIMIT_S,
            check=False,
        )
    finally:
        shutil.rmtree(target, ignore_errors=True)
    if done.returncode:
        said = done.stderr.decode(errors="replace")[-2_000:]
        raise RuntimeError(f"{client} failed:\n{said}")
    found: dict[str, Any] = json.loads(done.stdout.decode().splitlines()[-1])
    return found


def measure(bench: Bench, clients: Sequence[str], rounds: int) -> list[dict[str, Any]]:
    """All clients, in turn, ``rounds`` times."""
    gb = bench.served.size_bytes / 1e9
    found = []
    for number in range(rounds):
        turn = number % len(clients)
        for client in [*clients[turn:], *clients[:turn]]:
            row = download(bench, client)
            row |= {"client": client, "round": number, "gb_s": gb / row["took_s"],
                    "cpu_s_per_gb": row["cpu_s"] / gb}  # fmt: skip
            print(f"  {number + 1}  {client:16} {row['gb_s']:5.2f} GB/s  "
                  f"{row['cpu_s_per_gb']:5.2f} CPU-s/GB", flush=True)  # fmt: skip
            found.append(row)
    return found


def measure_cap(bench: Bench, rate_bytes_s: int) -> dict[str, Any]:
    """A download with a cap, its rate watched between the store and us."""
    with remote_servers.relaying(bench.served.port) as relay:
        row = download(bench, "http:tidegate", port=relay.port, rate_bytes_s=rate_bytes_s)
        seen = sorted(relay.seen)
    span_s = seen[-1][0] - seen[0][0]
    total = sum(size for _, size in seen)
    peak = remote_servers.window_peak(seen, WINDOW_S)
    return {
        "right": row["right"],
        "rate_bytes_s": rate_bytes_s,
        "used_fraction": total / span_s / rate_bytes_s,
        "peak_fraction": peak / WINDOW_S / rate_bytes_s,
        "window_s": WINDOW_S,
    }


def summarise(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Spreads by client."""
    found: dict[str, dict[str, Any]] = {}
    for client in dict.fromkeys(str(row["client"]) for row in rows):
        own = [row for row in rows if row["client"] == client]
        found[client] = {
            measure: dataclasses.asdict(spread)
            for measure in ("gb_s", "cpu_s_per_gb", "peak_kib")
            if (spread := stats.spread([float(row[measure]) for row in own]))
        }
        found[client]["right"] = all(row["right"] for row in own)
    return found


def _ratio(rows: Sequence[Mapping[str, Any]], one: str, other: str, measure: str) -> float | None:
    """Median of the rounds' ratios: what slows a round down slows both."""
    by_round = {
        client: {int(r["round"]): float(r[measure]) for r in rows if r["client"] == client}
        for client in (one, other)
    }
    found = stats.paired_ratio(by_round[one], by_round[other])
    return None if found is None else found.median


def judge(rows: Sequence[Mapping[str, Any]], cap: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """The bars, and whether they are met; ``None`` where it was not measured."""
    verdicts = []

    def add(text: str, limit: str, value: float | None, met: bool) -> None:
        measured = "–" if value is None else f"{value:.2f}"
        verdicts.append({"text": text, "limit": limit, "measured": measured,
                         "passed": None if value is None else met})  # fmt: skip

    speed = _ratio(rows, "oss:tidegate", "oss:ossfs", "gb_s")
    cost = _ratio(rows, "oss:tidegate", "oss:ossfs", "cpu_s_per_gb")
    add("OSS, GB/s beside ossfs alone", "at least 5x", speed, (speed or 0) >= 5)
    add("OSS, CPU beside ossfs alone", "at most 0.2x", cost, (cost or 9) <= 0.2)
    for kind in ("s3", "http"):
        best, ratio = _best_peer(rows, kind)
        add(f"{kind.upper()}, GB/s beside the best client ({best})", "at least 1x", ratio,
            (ratio or 0) >= 1)  # fmt: skip
    right = bool(rows) and all(row["right"] for row in rows)
    add("digests right, of all downloads", "all", float(right) if rows else None, right)
    if cap is not None:
        used, peak = float(cap["used_fraction"]), float(cap["peak_fraction"])
        add("of a cap, used over the download", "at least 0.9", used, used >= 0.9)
        add(f"of a cap, the most in any {cap['window_s']:.0f} s", "at most 1", peak, peak <= 1.0)
    return verdicts


def _best_peer(rows: Sequence[Mapping[str, Any]], kind: str) -> tuple[str, float | None]:
    """The fastest other client of a kind of store by its median, and our ratio to it."""
    medians = {
        client: figures["gb_s"]["median"]
        for client, figures in summarise(rows).items()
        if client.startswith(f"{kind}:") and not client.endswith(":tidegate")
    }
    if not medians:
        return "none", None
    best = max(medians, key=lambda client: float(medians[client]))
    return best.partition(":")[2], _ratio(rows, f"{kind}:tidegate", best, "gb_s")


def _versions(peers: Path) -> dict[str, str]:
    found = {name: importlib.metadata.version(name)
             for name in ("aiohttp", "boto3", "obstore", "oss2", "ossfs", "urllib3")}  # fmt: skip
    python = peers / "bin" / "python"
    if python.exists():
        code = "import importlib.metadata as m; print(m.version('s3fs'))"
        done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
        found["s3fs"] = done.stdout.strip() or "unknown"
    return found


def run(options: Options, command: str) -> int:
    """Measure, judge, write the report; 1 where a bar is missed."""
    from bench import remote_report

    clients = [c for c in remote_clients.CLIENTS if not options.only or c in options.only]
    work = ROOT / ".tidegate" / "bench-remote"
    peers = ROOT / ".tidegate" / "bench-remote-peers"
    if set(clients) & set(ELSEWHERE):
        ensure_peers(peers)
    before = machine.counters()
    with remote_servers.serving(
        ROOT, work, count=options.files, size_bytes=options.file_bytes
    ) as served:
        bench = Bench(served=served, digests=_digests(served, work), folder=work, peers=peers)
        for client in clients:  # once each, unmeasured: bytecode, caches
            download(bench, client)
        rows = measure(bench, clients, options.rounds)
        watched = "http:tidegate" in clients
        cap = measure_cap(bench, options.rate_bytes_s) if watched else None
    made = {
        "date": datetime.date.today().isoformat(),
        "command": command,
        "machine": machine.describe(),
        "noise": machine.noise(before, machine.counters()),
        "rounds": options.rounds,
        "size_bytes": served.size_bytes,
        "files": options.files,
        "versions": _versions(peers),
        "figures": summarise(rows),
        "cap": cap,
        "verdicts": judge(rows, cap),
        "raw": rows,
    }
    paths = remote_report.write(made, options.out)
    print(f"wrote {', '.join(map(str, paths))}")
    return 1 if any(verdict["passed"] is False for verdict in made["verdicts"]) else 0
