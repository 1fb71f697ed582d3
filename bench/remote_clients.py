"""One download of the remote benchmark, in a process of its own: time, CPU, memory, and whether
every digest is right.

    python -m bench.remote_clients '{"client": "aiohttp", ...}'

Every client puts the same files on the same disk and has the same digests
(``modelcache.store.digest``)
taken of every 8 MiB piece. Who is handed bytes takes them from memory, while they are warm; who
lets a library write files, and we, take them from the file.
"""

from __future__ import annotations

import json
import mmap
import os
import queue
import resource
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modelcache.store.digest import digest_piece, tree_digest

PIECE_BYTES = 8 * 1024 * 1024
CONNECTIONS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What to fetch, and where to."""

    client: str
    url: str
    """Of the server, without a path."""
    bucket: str
    prefix: str
    files: dict[str, int]
    digests: dict[str, str]
    target: str
    certificate: str
    rate_bytes_s: int | None = None

    def path(self, name: str) -> Path:
        return Path(self.target) / name

    def pieces(self) -> list[tuple[str, int, int]]:
        return [
            (name, start, min(start + PIECE_BYTES, size))
            for name, size in self.files.items()
            for start in range(0, size, PIECE_BYTES)
        ]

    def object_url(self, name: str) -> str:
        return f"{self.url}/{self.bucket}/{self.prefix}/{name}"


Digests = dict[tuple[str, int], bytes]
Fetched = Digests | None
"""The BLAKE3 of every piece by file and start; ``None``: the files are there, take them."""

Client = Callable[[], Fetched]


def compare(job: Job, digests: Digests) -> bool:
    """Whether the pieces amount to the files that were served."""
    for name, size in job.files.items():
        found = [digests[name, start] for start in range(0, size, PIECE_BYTES)]
        if tree_digest(size, found) != job.digests[name]:
            return False
    return True


def digest_files(job: Job) -> Digests:
    """Digests of files on the disk, by two threads."""

    def digest(piece: tuple[str, int, int]) -> tuple[tuple[str, int], bytes]:
        name, start, end = piece
        with (
            job.path(name).open("rb") as file,
            mmap.mmap(file.fileno(), end - start, prot=mmap.PROT_READ, offset=start) as mapped,
            memoryview(mapped) as buffer,
        ):
            return (name, start), digest_piece(buffer)[0]

    with ThreadPoolExecutor(2) as threads:
        return dict(threads.map(digest, job.pieces()))


class Targets:
    """The files to be written, open and as long as they will be."""

    def __init__(self, job: Job) -> None:
        self.fds: dict[str, int] = {}
        for name, size in job.files.items():
            fd = os.open(job.path(name), os.O_RDWR | os.O_CREAT)
            os.posix_fallocate(fd, 0, size)
            self.fds[name] = fd

    def put(self, name: str, start: int, data: Any) -> bytes:
        """Write a piece; its digest."""
        view = memoryview(data)
        digest = digest_piece(view)[0]
        while view:
            done = os.pwrite(self.fds[name], view, start)
            view, start = view[done:], start + done
        return digest


def by_ranges(job: Job, read: Callable[[str, int, int], Any]) -> Digests:
    """``CONNECTIONS`` threads that read pieces by ``read`` and write them."""
    targets, digests = Targets(job), Digests()
    waiting: queue.SimpleQueue[tuple[str, int, int]] = queue.SimpleQueue()
    for piece in job.pieces():
        waiting.put(piece)
    failed: list[BaseException] = []

    def work() -> None:
        try:
            while not failed:
                name, start, end = waiting.get_nowait()
                data = read(name, start, end)
                if len(data) != end - start:
                    raise RuntimeError(f"{len(data)} bytes instead of {end - start}")
                digests[name, start] = targets.put(name, start, data)
        except queue.Empty:
            return
        except Exception as error:  # noqa: BLE001 - told by the main thread
            failed.append(error)

    threads = [threading.Thread(target=work) for _ in range(CONNECTIONS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]
    return digests


# -- ours ----------------------------------------------------------------------------------------


def tidegate(job: Job) -> Client:
    from modelcache.fetch.transfer import Transfer
    from modelcache.refs import parse_ref
    from modelcache.settings import ModelCacheSettings
    from modelcache.sources.opening import open_source
    from modelcache.store.layout import Layout, file_key
    from modelcache.store.partial_files import Partial

    kind = job.client.partition(":")[0]
    url = f"{kind}://{job.bucket}/{job.prefix}"
    if kind in ("http", "https"):
        url = f"{job.url}/{job.bucket}/{job.prefix}/"
    if kind == "s3":
        import obstore  # noqa: F401 - imports are not measured
    if kind == "oss":
        import ossfs  # noqa: F401
    settings = ModelCacheSettings(connections=CONNECTIONS, bandwidth_bytes_s=job.rate_bytes_s)
    environ = {**os.environ, "SSL_CERT_FILE": job.certificate}

    def fetch() -> Fetched:
        ref = parse_ref(url)
        source = open_source(ref, settings=settings, environ=environ)
        listing = source.list()
        layout = Layout(Path(job.target))
        pairs = [
            (file, Partial.open(layout, file_key(url, file, listing.revision), file.size_bytes))
            for file in listing.files
        ]
        Transfer(settings).run(source, pairs)
        source.close()
        digests = Digests()
        for file, partial in pairs:
            for index in range(-(-file.size_bytes // PIECE_BYTES)):
                piece = partial.piece(index)
                assert piece is not None
                digests[file.path, index * PIECE_BYTES] = piece[0]
        return digests

    return fetch


# -- HTTP ----------------------------------------------------------------------------------------


def aiohttp_client(job: Job) -> Client:
    import asyncio
    import ssl

    import aiohttp

    async def fetch() -> Digests:
        targets, digests = Targets(job), Digests()
        waiting = job.pieces()
        context = ssl.create_default_context(cafile=job.certificate)
        connector = aiohttp.TCPConnector(limit=CONNECTIONS, ssl=context)

        async def work(session: aiohttp.ClientSession) -> None:
            while waiting:
                name, start, end = waiting.pop()
                headers = {"Range": f"bytes={start}-{end - 1}"}
                async with session.get(job.object_url(name), headers=headers) as answer:
                    data = await answer.read()
                digests[name, start] = await asyncio.to_thread(targets.put, name, start, data)

        async with aiohttp.ClientSession(connector=connector) as session:
            await asyncio.gather(*(work(session) for _ in range(CONNECTIONS)))
        return digests

    return lambda: asyncio.run(fetch())


def obstore_http(job: Job) -> Client:
    import obstore
    from obstore.store import HTTPStore

    options: Any = {"allow_http": True, "root_certificate": Path(job.certificate).read_bytes()}
    store = HTTPStore.from_url(job.url, client_options=options)
    base = f"{job.bucket}/{job.prefix}"
    return lambda: by_ranges(
        job, lambda name, start, end: obstore.get_range(store, f"{base}/{name}", start=start,
                                                        end=end)
    )  # fmt: skip


def urllib3_client(job: Job) -> Client:
    import urllib3

    pool = urllib3.PoolManager(maxsize=CONNECTIONS, ca_certs=job.certificate)

    def read(name: str, start: int, end: int) -> bytes:
        headers = {"Range": f"bytes={start}-{end - 1}"}
        return pool.request("GET", job.object_url(name), headers=headers).data

    return lambda: by_ranges(job, read)


# -- S3 ------------------------------------------------------------------------------------------


def obstore_s3(job: Job) -> Client:
    import obstore
    from obstore.store import S3Store

    store = S3Store(job.bucket, client_options={"allow_http": True})
    return lambda: by_ranges(
        job, lambda name, start, end: obstore.get_range(store, f"{job.prefix}/{name}", start=start,
                                                        end=end)
    )  # fmt: skip


def boto3_client(job: Job) -> Client:
    import boto3
    from boto3.s3.transfer import TransferConfig

    client = boto3.client("s3")
    config = TransferConfig(max_concurrency=CONNECTIONS, multipart_chunksize=PIECE_BYTES)

    def fetch() -> Fetched:
        for name in job.files:
            client.download_file(
                job.bucket, f"{job.prefix}/{name}", str(job.path(name)), Config=config
            )
        return None

    return fetch


def s3fs_client(job: Job) -> Client:
    import s3fs

    system = s3fs.S3FileSystem(endpoint_url=job.url)

    def fetch() -> Fetched:
        remote = [f"{job.bucket}/{job.prefix}/{name}" for name in job.files]
        system.get(remote, [str(job.path(name)) for name in job.files])
        return None

    return fetch


# -- OSS -----------------------------------------------------------------------------------------


def ossfs_client(job: Job) -> Client:
    import ossfs

    system = ossfs.OSSFileSystem(
        endpoint=job.url,
        key=os.environ["OSS_ACCESS_KEY_ID"],
        secret=os.environ["OSS_ACCESS_KEY_SECRET"],
    )

    def fetch() -> Fetched:
        remote = [f"{job.bucket}/{job.prefix}/{name}" for name in job.files]
        system.get(remote, [str(job.path(name)) for name in job.files])
        return None

    return fetch


def oss2_client(job: Job) -> Client:
    import oss2

    oss2.defaults.connection_pool_size = CONNECTIONS
    auth = oss2.Auth(os.environ["OSS_ACCESS_KEY_ID"], os.environ["OSS_ACCESS_KEY_SECRET"])
    bucket = oss2.Bucket(auth, job.url, job.bucket, enable_crc=False)

    def read(name: str, start: int, end: int) -> bytes:
        found = bucket.get_object(f"{job.prefix}/{name}", byte_range=(start, end - 1))
        data: bytes = found.read()
        return data

    return lambda: by_ranges(job, read)


CLIENTS: dict[str, Callable[[Job], Client]] = {
    "http:tidegate": tidegate,
    "http:aiohttp": aiohttp_client,
    "http:obstore": obstore_http,
    "http:urllib3": urllib3_client,
    "https:tidegate": tidegate,
    "https:aiohttp": aiohttp_client,
    "https:obstore": obstore_http,
    "s3:tidegate": tidegate,
    "s3:obstore": obstore_s3,
    "s3:boto3": boto3_client,
    "s3:s3fs": s3fs_client,
    "oss:tidegate": tidegate,
    "oss:oss2": oss2_client,
    "oss:ossfs": ossfs_client,
}
"""By store and client."""


def cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def peak_kib() -> int:
    """Highest resident set; what ``getrusage`` has of it was the parent's before."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0])


def run(job: Job) -> dict[str, Any]:
    """Fetch, digest, compare; what it took, imports not counted."""
    fetch = CLIENTS[job.client](job)
    before_s, began_s = cpu_s(), time.monotonic()
    digests = fetch()
    fetched_s = time.monotonic() - began_s
    if digests is None:
        digests = digest_files(job)
    right = compare(job, digests)
    took_s, used_s = time.monotonic() - began_s, cpu_s() - before_s
    return {
        "right": right,
        "took_s": took_s,
        "fetched_s": fetched_s,
        "cpu_s": used_s,
        "peak_kib": peak_kib(),
    }


def main(arguments: Sequence[str]) -> int:
    """Run the job that is given as JSON; prints what it took as JSON."""
    print(json.dumps(run(Job(**json.loads(arguments[0])))))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
