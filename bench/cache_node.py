"""One node of a cluster: a process with a store of its own that fetches one model.

It says ``ready`` once it serves its peers, begins when a line comes on its standard input, writes
one line of JSON when every file is whole and its digest right, and goes on serving until its input
ends, as a node does.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

from modelcache.fetch.transfer import Transfer
from modelcache.peers.group import PeerGroup, make_peers
from modelcache.peers.piece_inventory import PieceInventory
from modelcache.refs import parse_ref
from modelcache.serving import describe, start_serving
from modelcache.settings import ModelCacheSettings
from modelcache.sources.opening import open_source
from modelcache.store.layout import Layout, file_key
from modelcache.store.partial_files import Partial
from modelcache.types import Damaged, Priority, Progress


def fetch(transfer: Transfer, layout: Layout, url: str, settings: ModelCacheSettings) -> str:
    """Fetch a model into partial files and finish each; its revision."""
    source = open_source(parse_ref(url), settings=settings, environ={})
    try:
        listing = source.list()
        for _ in range(3):
            left = [
                file
                for file in listing.files
                if not layout.known(file_key(url, file, listing.revision)).exists()
            ]
            opened = [
                (f, Partial.open(layout, file_key(url, f, listing.revision), f.size_bytes))
                for f in left
            ]
            transfer.run(source, opened, priority=Priority.WAKE, on_progress=_tell)
            for file, partial in opened:
                try:
                    partial.finish(file.digests)
                except Damaged:
                    transfer.state.doubt(partial.key)
        return listing.revision
    finally:
        source.close()


def _tell(progress: Progress) -> None:
    """Report the node's progress where it is followed."""
    if os.environ.get("BENCH_NODE_PROGRESS"):
        print(json.dumps({"bytes_done": progress.bytes_done}), flush=True)


def _figures(
    transfer: Transfer, peers: PeerGroup | None, began_s: float, cpu_before_s: float
) -> dict[str, Any]:
    return {
        "elapsed_s": time.monotonic() - began_s,
        "cpu_s": time.process_time() - cpu_before_s,
        "rss_peak_kib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        **describe(peers, transfer),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--dir", type=Path, required=True)
    parser.add_argument("--url", required=True)
    parser.add_argument("--settings", default="{}", help="of modelcache, as JSON")
    arguments = parser.parse_args()
    settings = ModelCacheSettings.model_validate_json(arguments.settings)
    layout = Layout(arguments.dir)
    peers = make_peers(settings, os.environ, PieceInventory(layout))
    transfer = Transfer(settings, peers=peers)
    serving = start_serving(settings, peers, None)  # type: ignore[arg-type]
    print("ready", flush=True)
    if not sys.stdin.readline():
        return
    began_s, cpu_before_s = time.monotonic(), time.process_time()
    fetch(transfer, layout, arguments.url, settings)
    print(json.dumps(_figures(transfer, peers, began_s, cpu_before_s)), flush=True)
    sys.stdin.read()
    if serving is not None:
        print(json.dumps({"sent_bytes": serving.peers.sent_bytes}), flush=True)
        serving.close()


if __name__ == "__main__":
    main()
