"""Ten nodes start the same model at once, from one store whose rate is limited.

Every node is a process with a store of its own and the source is another. First one node alone
fetches the model, then as many as asked for, told of each other, all begin within the same few
milliseconds. What the store sent is counted by the store.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import secrets
import select
import shutil
import tempfile
import time
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import machine, procs

MOST_STORE = 1.2
MOST_TIME = 1.5
SMALL_FILES = {"config.json": 800, "generation_config.json": 200, "tokenizer.json": 2_100_000}


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """One run."""

    nodes: int = 10
    size_bytes: int = 500_000_000
    shards: int = 3
    rate_bytes_s: int = 25_000_000
    """Little enough that one machine's cores and disk can play ten nodes."""
    rounds: int = 3
    apart_s: float = 0.0
    """Seconds between one node's beginning and the next one's."""
    limit_s: float = 300.0
    work: Path | None = None
    """Where the stores go; a temporary directory unless given."""
    out: Path = Path("bench/out")


def make_model(root: Path, size_bytes: int, shards: int) -> int:
    """Files of random bytes, with their SHA-256s beside; the bytes of all."""
    root.mkdir(parents=True)
    sums, total = [], 0
    block = secrets.token_bytes(1 << 20)
    sizes = {f"model-{n + 1:05}-of-{shards:05}.safetensors": size_bytes // shards
             for n in range(shards)}  # fmt: skip
    for number, (name, size) in enumerate({**sizes, **SMALL_FILES}.items()):
        digest = hashlib.sha256()
        with (root / name).open("wb") as file:
            left, at = size, 0
            while left:
                # No two blocks alike, so that a piece in the wrong place is a wrong piece.
                data = (block[:-16] + number.to_bytes(8) + at.to_bytes(8))[-left:]
                file.write(data)
                digest.update(data)
                left -= len(data)
                at += 1
        sums.append(f"{digest.hexdigest()}  {name}\n")
        total += size
    (root / "SHA256SUMS").write_text("".join(sums))
    return total + len("".join(sums))


@dataclass(slots=True, kw_only=True)
class Node:
    """One node's process."""

    child: procs.Child
    port: int
    folder: Path

    def read(self, limit_s: float) -> str:
        """Its next line. :class:`procs.NotReadyError` if it does not come."""
        output = self.child.popen.stdout
        assert output is not None
        ready, _, _ = select.select([output], [], [], max(0.0, limit_s))
        line = output.readline().decode() if ready else ""
        if not line:
            raise procs.NotReadyError(f"{self.child.name} says nothing\n{self.child.log_tail()}")
        return line.strip()

    def begin(self) -> None:
        """Let it begin to fetch."""
        assert self.child.popen.stdin is not None
        self.child.popen.stdin.write(b"go\n")
        self.child.popen.stdin.flush()


def start_nodes(
    count: int, url: str, folder: Path, python: str, *, settings: Mapping[str, Any] | None = None,
    token: str = "", env: Mapping[str, str] | None = None,
) -> list[Node]:  # fmt: skip
    """Nodes that know each other; one alone knows no other. Each has said that it is ready."""
    ports = [procs.free_port() for _ in range(count)]
    peers = [f"http://127.0.0.1:{port}" for port in ports]
    made = []
    try:
        for number, port in enumerate(ports):
            own = folder / f"node{number}"
            own.mkdir(parents=True)
            given = dict(settings or {})
            if count > 1:
                given |= {"peers": peers, "peer_port": port}
            argv = [python, "-m", "bench.cache_node", "--dir", own, "--url", url,
                    "--settings", json.dumps(given)]  # fmt: skip
            child = procs.start(f"node{number}", argv, log=folder / f"node{number}.log",
                                env={"TIDEGATE_PEER_TOKEN": token, **(env or {})},
                                pipes=True)  # fmt: skip
            made.append(Node(child=child, port=port, folder=own))
        for node in made:
            if node.read(60) != "ready":
                raise procs.NotReadyError(f"{node.child.name}: {node.child.log_tail()}")
    except BaseException:
        for node in made:
            node.child.stop()
        raise
    return made


def ask_stats(port: int) -> dict[str, Any]:
    """The source's counters."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/stats", timeout=10) as answer:
        found: dict[str, Any] = json.loads(answer.read())
    return found


def start_source(model: Path, rate_bytes_s: float, log: Path, python: str) -> tuple[Any, int]:
    """The source's process, ready, and its port."""
    port = procs.free_port()
    argv = [python, "-m", "bench.cache_source", model, "--port", str(port),
            "--rate-bytes-s", str(rate_bytes_s)]  # fmt: skip
    child = procs.start("source", argv, log=log)
    try:
        procs.wait_ready(child, port, b"GET /stats HTTP/1.1\r\nHost: x\r\n\r\n")
    except BaseException:
        child.stop()
        raise
    return child, port


def run_nodes(count: int, options: Options, model: Path, folder: Path) -> dict[str, Any]:
    """Let ``count`` nodes fetch the model from a fresh source; what they and it say."""
    import sys

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    source, port = start_source(model, options.rate_bytes_s, folder / "source.log", sys.executable)
    with procs.stopping(source):
        url = f"http://127.0.0.1:{port}/"
        nodes = start_nodes(count, url, folder, sys.executable, token=secrets.token_hex(16))
        with procs.stopping(*(node.child for node in nodes)):
            began_s = time.monotonic()
            for node in nodes:
                node.begin()
                time.sleep(options.apart_s)
            until_s = began_s + options.limit_s
            figures = [json.loads(node.read(until_s - time.monotonic())) for node in nodes]
            elapsed_s = time.monotonic() - began_s
            sent_bytes = ask_stats(port)["sent_bytes"]
    shutil.rmtree(folder, ignore_errors=True)
    return {
        "nodes": count,
        "elapsed_s": elapsed_s,
        "slowest_s": max(one["elapsed_s"] for one in figures),
        "store_bytes": sent_bytes,
        "peer_bytes": sum(one["peer_bytes"] for one in figures),
        "wasted_bytes": sum(one["wasted_bytes"] for one in figures),
        "cpu_s": sum(one["cpu_s"] for one in figures),
        "rss_peak_kib": max(one["rss_peak_kib"] for one in figures),
        "each": figures,
    }


def summarise(
    alone: Sequence[Mapping[str, Any]], together: Sequence[Mapping[str, Any]], size_bytes: int
) -> dict[str, Any]:
    """The bars, each by its worst round: neither may be missed even once."""
    store = [one["store_bytes"] / size_bytes for one in together]
    times = [t["elapsed_s"] / a["elapsed_s"] for a, t in zip(alone, together, strict=True)]
    return {
        "store_ratio": {"limit": MOST_STORE, "rounds": store, "worst": max(store)},
        "time_ratio": {"limit": MOST_TIME, "rounds": times, "worst": max(times)},
        "passed": max(store) <= MOST_STORE and max(times) <= MOST_TIME,
    }


def markdown(made: Mapping[str, Any]) -> str:
    """The report to read."""
    where, noise = made["machine"], made["noise"]
    bars = made["bars"]
    lines = [
        f"# Nodes that start together, {made['date']}",
        "",
        f"`{made['command']}` · {made['nodes']} nodes (processes with their own stores), a model "
        f"of {made['size_bytes'] / 1e9:.2f} GB in {made['files']} files, a source limited to "
        f"{made['rate_bytes_s'] / 1e6:.0f} MB/s, {made['apart_s']:g} s from one node's beginning "
        "to the next one's",
        "",
        f"{where['cpu']}, {where['cores']} cores, {where['memory_gib']} GiB, Linux "
        f"{where['kernel']}, Python {where['python']}; other work took "
        f"{noise['other_busy_fraction']:.2f} cores meanwhile.",
        "",
        "| bar | limit | worst round | all rounds | |",
        "|---|---|---|---|---|",
    ]
    for name, text in (("store_ratio", "bytes the store sent / the model's"),
                       ("time_ratio", "time of all / time of one node alone")):  # fmt: skip
        bar = bars[name]
        rounds = ", ".join(f"{value:.3f}" for value in bar["rounds"])
        met = "met" if bar["worst"] <= bar["limit"] else "**MISSED**"
        lines.append(f"| {text} | ≤ {bar['limit']}x | {bar['worst']:.3f}x | {rounds} | {met} |")
    lines += [
        "",
        "| | seconds | store sent GB | from peers GB | thrown away GB | CPU-s per GB stored "
        "| peak resident MiB of a node |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, runs in (("one node", made["alone"]), ("all nodes", made["together"])):
        for run in runs:
            stored = run["nodes"] * made["size_bytes"] / 1e9
            lines.append(
                f"| {name} | {run['elapsed_s']:.1f} | {run['store_bytes'] / 1e9:.2f} "
                f"| {run['peer_bytes'] / 1e9:.2f} | {run['wasted_bytes'] / 1e9:.3f} "
                f"| {run['cpu_s'] / stored:.2f} | {run['rss_peak_kib'] / 1024:.0f} |"
            )
    return "\n".join(lines) + "\n"


def run(options: Options, command: str) -> int:
    """Measure, report; exit code 1 unless both bars are met in every round."""
    options.out.mkdir(parents=True, exist_ok=True)
    date = datetime.date.today().isoformat()
    before = machine.counters()
    alone, together = [], []
    with tempfile.TemporaryDirectory(prefix="tidegate-bench-", dir=options.work) as name:
        root = Path(name)
        size_bytes = make_model(root / "model", options.size_bytes, options.shards)
        files = len(list((root / "model").iterdir()))
        for number in range(options.rounds):
            alone.append(run_nodes(1, options, root / "model", root / "run"))
            together.append(run_nodes(options.nodes, options, root / "model", root / "run"))
            first, all_ = alone[-1], together[-1]
            print(
                f"round {number + 1}: alone {first['elapsed_s']:.1f} s, {options.nodes} together "
                f"{all_['elapsed_s']:.1f} s, store sent {all_['store_bytes'] / size_bytes:.3f}x "
                "the model",
                flush=True,
            )
    made = {
        "date": date,
        "command": command,
        "machine": machine.describe(),
        "noise": machine.noise(before, machine.counters()),
        "nodes": options.nodes,
        "size_bytes": size_bytes,
        "files": files,
        "rate_bytes_s": options.rate_bytes_s,
        "apart_s": options.apart_s,
        "bars": summarise(alone, together, size_bytes),
        "alone": alone,
        "together": together,
    }
    stem = options.out / f"cache-{date}"
    Path(f"{stem}.json").write_text(json.dumps(made, indent=1) + "\n")
    text = markdown(made)
    Path(f"{stem}.md").write_text(text)
    print("\n" + text)
    print(f"wrote {stem}.md and {stem}.json")
    return 0 if made["bars"]["passed"] else 1
