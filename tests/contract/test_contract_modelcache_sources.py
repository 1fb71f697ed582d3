"""What every source does, against the real thing where that runs here: nginx, moto's S3, ossfs and
oss2 with a server that checks signatures, a hub of ours."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

import pytest
from nginx_server import nginx
from object_server import Answer, IndexedServer, ObjectServer, serving
from store_servers import GcsServer, HubServer, OssServer

from modelcache.ports import ANNOUNCE_BYTES, RangeRead, Retries, Source
from modelcache.refs import parse_ref
from modelcache.settings import ModelCacheSettings
from modelcache.sources.opening import open_source
from modelcache.types import PIECE_BYTES, Cancelled, NotFound, RemoteFile, SourceError

UNTOUCHED = 0xAA
BIG = "model-00001-of-00002.safetensors"
FILES = {
    "config.json": b'{"architectures": ["Tiny"]}\n',
    BIG: Random(1).randbytes(PIECE_BYTES + 123_457),
    "model-00002-of-00002.safetensors": Random(2).randbytes(1_000_003),
    "original/tokenizer spéc.model": b"a tokenizer\x00\xff",
}
"""One file longer than a piece, one below a folder with a name that has to be quoted."""

NEIGHBOUR = {"tiny-2/config.json": b"not this one", "tiny.txt": b"nor this one"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Store:
    """A store that has ``FILES``, and how to get at it."""

    url: str
    environ: Mapping[str, str]
    put: Callable[[str, bytes], None]
    remove: Callable[[str], None]
    secrets: tuple[str, ...] = ()
    mark: Callable[[str], None] = lambda path: None
    """Leaves what the store's tools leave for a folder: an empty object, a directory."""

    @contextmanager
    def opened(
        self,
        url: str | None = None,
        revision: str | None = None,
        environ: Mapping[str, str] | None = None,
    ) -> Iterator[Source]:
        ref = parse_ref(url or self.url, revision)
        environ = self.environ if environ is None else environ
        source = open_source(ref, settings=ModelCacheSettings(timeout_s=30), environ=environ)
        try:
            yield source
        finally:
            source.close()
            source.close()


def read_range(
    source: Source, file: RemoteFile, start: int, end: int, fd: int, **asked: Any
) -> None:
    source.fetch(RangeRead(file=file, start=start, end=end, fd=fd, **asked))


@contextmanager
def filled(path: Path, size: int) -> Iterator[int]:
    """A file of ``size`` bytes, unwritten, open for writing."""
    path.write_bytes(bytes([UNTOUCHED]) * size)
    fd = os.open(path, os.O_RDWR)
    try:
        yield fd
    finally:
        os.close(fd)


def file_of(source: Source, path: str) -> RemoteFile:
    return next(file for file in source.list().files if file.path == path)


class SourceContract:
    """Inherited by a test class for each source, which has a fixture ``store``."""

    def test_lists_every_file_and_no_neighbour(self, store: Store) -> None:
        with store.opened() as source:
            assert isinstance(source, Source)
            listing = source.list()
        found = {file.path: file.size_bytes for file in listing.files}
        assert found == {path: len(data) for path, data in FILES.items()}
        assert len(listing.revision) == 40

    def test_folders_are_no_files_and_empty_files_are(self, store: Store, tmp_path: Path) -> None:
        for path in ("", "original/", "logs/", "deep/er/"):
            store.mark(path)
        for path in ("added_tokens.json", "code/__init__.py"):
            store.put(path, b"")
        with store.opened() as source:
            found = {file.path: file for file in source.list().files}
            with filled(tmp_path / "out", 0) as fd:
                read_range(source, found["added_tokens.json"], 0, 0, fd)
        for path in ("added_tokens.json", "code/__init__.py"):
            assert found.pop(path).size_bytes == 0
            store.remove(path)
        assert set(found) == set(FILES)

    def test_digests_that_are_told_are_right(self, store: Store) -> None:
        with store.opened() as source:
            files = source.list().files
        for file in files:
            data = FILES[file.path]
            for name, digest in file.digests.items():
                if name == "git-sha1":
                    assert digest == hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
                elif name != "crc64":  # the OSS class checks that
                    assert digest == hashlib.new(name, data).hexdigest()

    def test_the_revision_names_these_bytes(self, store: Store) -> None:
        with store.opened() as source:
            first, again = source.list(), source.list()
            assert first == again
            store.put("config.json", b'{"architectures": ["Another"]}\n')
            second = source.list()
        assert second.revision != first.revision
        with store.opened(revision=second.revision) as source:
            assert source.list() == second
        with store.opened(revision="0" * 40) as source, pytest.raises(NotFound):
            source.list()

    def test_pieces_come_in_any_order_from_many_threads(self, store: Store, tmp_path: Path) -> None:
        whole = FILES[BIG]
        starts = list(range(0, len(whole), 300_007))
        Random(3).shuffle(starts)
        with store.opened() as source, filled(tmp_path / "out", len(whole)) as fd:
            file = file_of(source, BIG)

            def fetch(start: int) -> None:
                end = min(start + 300_007, len(whole))
                read_range(source, file, start, end, fd)

            with ThreadPoolExecutor(8) as threads:
                list(threads.map(fetch, starts))
        assert (tmp_path / "out").read_bytes() == whole

    def test_every_file_comes_whole(self, store: Store, tmp_path: Path) -> None:
        with store.opened() as source:
            for file in source.list().files:
                with filled(tmp_path / "out", file.size_bytes) as fd:
                    read_range(source, file, 0, file.size_bytes, fd)
                assert (tmp_path / "out").read_bytes() == FILES[file.path]

    @pytest.mark.parametrize(
        ("start", "end"), [(0, 1), (5, 5), (1, 8), (1_000_002, 1_000_003), (999_999, 1_000_003)]
    )
    def test_exactly_the_range_is_written(
        self, store: Store, tmp_path: Path, start: int, end: int
    ) -> None:
        path = "model-00002-of-00002.safetensors"
        told: list[int] = []
        with store.opened() as source, filled(tmp_path / "out", 1_000_010) as fd:
            file = file_of(source, path)
            read_range(source, file, start, end, fd, on_bytes=told.append)
        written = (tmp_path / "out").read_bytes()
        assert written[start:end] == FILES[path][start:end]
        assert set(written[:start] + written[end:]) == {UNTOUCHED}
        assert sum(told) == end - start

    @pytest.mark.parametrize(("start", "end"), [(-1, 5), (5, 4), (0, 1_000_004)])
    def test_a_range_outside_of_the_file_is_an_error(
        self, store: Store, tmp_path: Path, start: int, end: int
    ) -> None:
        with store.opened() as source, filled(tmp_path / "out", 10) as fd:
            file = file_of(source, "model-00002-of-00002.safetensors")
            with pytest.raises(SourceError):
                read_range(source, file, start, end, fd)

    def test_nothing_is_read_far_ahead_of_who_counts(self, store: Store, tmp_path: Path) -> None:
        size, counted, ahead = len(FILES[BIG]), 0, []
        with store.opened() as source, filled(tmp_path / "out", size) as fd:
            file = file_of(source, BIG)

            def on_bytes(n: int) -> None:
                nonlocal counted
                assert 0 < n <= ANNOUNCE_BYTES
                # The callback may hold the source up; meanwhile no more may be written.
                rest = os.pread(fd, size, counted + ANNOUNCE_BYTES)
                ahead.append(rest.count(UNTOUCHED) == len(rest))
                counted += n

            read_range(source, file, 0, size, fd, on_bytes=on_bytes)
        assert counted == size
        assert all(ahead)

    def test_it_stops_when_it_is_not_wanted_any_more(self, store: Store, tmp_path: Path) -> None:
        size, told = len(FILES[BIG]), [0]
        with store.opened() as source, filled(tmp_path / "out", size) as fd:
            file = file_of(source, BIG)
            with pytest.raises(Cancelled):
                read_range(source, file, 0, size, fd, cancelled=lambda: True)

            def count(n: int) -> None:
                told[0] += n

            with pytest.raises(Cancelled):
                read_range(
                    source, file, 0, size, fd, on_bytes=count, cancelled=lambda: told[0] > 1_000_000
                )
            assert told[0] < 4_000_000
            read_range(source, file, 0, size, fd)  # and begins anew
        assert (tmp_path / "out").read_bytes() == FILES[BIG]

    def test_who_counts_may_refuse(self, store: Store, tmp_path: Path) -> None:
        def refuse(n: int) -> None:
            raise RuntimeError("enough")

        with store.opened() as source, filled(tmp_path / "out", len(FILES[BIG])) as fd:
            file = file_of(source, BIG)
            with pytest.raises(RuntimeError, match="enough"):
                read_range(source, file, 0, file.size_bytes, fd, on_bytes=refuse)

    def test_a_file_that_changed_is_an_error_and_no_data(
        self, store: Store, tmp_path: Path
    ) -> None:
        data = FILES["config.json"]
        with store.opened() as source, filled(tmp_path / "out", 100) as fd:
            file = file_of(source, "config.json")
            store.put("config.json", data + b"longer")
            with pytest.raises(SourceError):
                read_range(source, file, 0, len(data), fd)

    def test_what_is_not_there_is_not_found(self, store: Store, tmp_path: Path) -> None:
        with store.opened() as source, filled(tmp_path / "out", 100) as fd:
            file = file_of(source, "config.json")
            store.remove("config.json")
            with pytest.raises(NotFound):
                read_range(source, file, 0, file.size_bytes, fd)
        elsewhere = store.url.rstrip("/") + "-that-is-not-there"
        with store.opened(elsewhere) as source, pytest.raises(NotFound):
            source.list()

    def test_no_secret_is_shown(
        self, store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(0)
        said: list[str] = []
        with store.opened() as source, filled(tmp_path / "out", 100) as fd:
            file = file_of(source, "config.json")
            store.put("config.json", b"changed, and of another length")
            store.remove(BIG)
            for one in (file, dataclasses.replace(file, path=BIG)):
                with pytest.raises(SourceError) as raised:
                    read_range(source, one, 0, 8, fd)
                said += [str(raised.value), repr(raised.value.__cause__), repr(source)]
        ours = [r.getMessage() for r in caplog.records if r.name.startswith("modelcache")]
        text = "\n".join([*said, *ours])
        assert not [secret for secret in (*store.secrets, "Signature=") if secret in text]


class ServedContract(SourceContract):
    """Of a source that a server of ours stands for, which has a fixture ``served`` too: the servers
    that are asked. ``elsewhere`` is the environment in which they have another address."""

    def elsewhere(self, store: Store, url: str) -> tuple[str, dict[str, str]]:
        raise NotImplementedError

    def test_a_source_that_is_busy_is_asked_again_whatever_was_asked(
        self, store: Store, served: list[ObjectServer]
    ) -> None:
        with store.opened() as source:
            wanted = source.list()
            server, asked = served[0], len(served[0].asked)
            source.list()
            questions = len(server.asked) - asked
        for skipped in range(questions):
            with store.opened() as source:
                server.busy_from = len(server.asked) + skipped
                server.busy = 1
                assert source.list(Retries(most=2)) == wanted
        with store.opened() as source:
            server.busy = 1
            with pytest.raises(SourceError) as raised:
                source.list()
            assert raised.value.retryable
            server.busy = 1_000
            with pytest.raises(Cancelled):
                source.list(Retries(most=5, cancelled=lambda: True))
            server.busy = 0

    def test_every_request_goes_over_the_proxy(
        self, store: Store, served: list[ObjectServer], tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        # Whatever host a proxy is asked for, this one answers with its own objects.
        monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")  # not the environment that counts
        server = served[0]
        url, environ = self.elsewhere(store, "http://192.0.2.1")
        before = len(server.asked)
        with store.opened(url, environ={**environ, "http_proxy": server.url}) as source:
            file = file_of(source, "config.json")
            with filled(tmp_path / "out", file.size_bytes) as fd:
                read_range(source, file, 0, file.size_bytes, fd)
        assert (tmp_path / "out").read_bytes() == FILES["config.json"]
        asked = [path for _, path, _ in server.asked[before:]]
        assert len(asked) > 1
        assert not [path for path in asked if not path.startswith("http://192.0.2.1/")]

    def test_this_machine_is_never_asked_over_a_proxy(
        self, store: Store, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        proxies = {"HTTP_PROXY": "http://127.0.0.1:9", "ALL_PROXY": "http://127.0.0.1:9"}
        for name, value in proxies.items():
            monkeypatch.setenv(name, value)
        with store.opened(environ={**store.environ, **proxies}) as source:
            assert source.list().files


def from_folder(folder: Path) -> dict[str, Any]:
    """``put`` and ``remove`` of a store that is a folder of files; fills it."""

    def put(path: str, data: bytes) -> None:
        target = folder / "tiny" / path
        target.parent.mkdir(parents=True, exist_ok=True)
        fresh = target.with_name(f"{target.name}.new")
        fresh.write_bytes(data)
        fresh.replace(target)

    for path, data in FILES.items():
        put(path, data)
    for path, data in NEIGHBOUR.items():
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_bytes(data)
    return {
        "put": put,
        "remove": lambda path: (folder / "tiny" / path).unlink(),
        "mark": lambda path: (folder / "tiny" / path).mkdir(parents=True, exist_ok=True),
    }


class TestFile(SourceContract):
    @pytest.fixture
    def store(self, tmp_path: Path) -> Store:
        folder = tmp_path / "mounted models"
        folder.mkdir()
        return Store(url=f"file://{folder}/tiny", environ={}, **from_folder(folder))


class TestHttpFromNginx(SourceContract):
    index = "html"

    @pytest.fixture
    def store(self, tmp_path: Path) -> Iterator[Store]:
        folder = tmp_path / "served" / "private"
        folder.mkdir(parents=True)
        given = from_folder(folder)
        scratch = tmp_path / "nginx"
        scratch.mkdir()
        netrc = tmp_path / "netrc"
        netrc.write_text("machine 127.0.0.1 login ada password lovelace-1815\n")
        with nginx(folder.parent, scratch, index=self.index) as url:
            yield Store(
                url=f"{url}/private/tiny",
                environ={"NETRC": str(netrc), "HOME": str(tmp_path)},
                secrets=("lovelace-1815",),
                **given,
            )


class TestHttpOfOurs(ServedContract):
    @pytest.fixture
    def served(self) -> Iterator[list[ObjectServer]]:
        with serving(server := IndexedServer()):
            server.index = "json"
            fill(server, "m/tiny/", {f"m/{path}": data for path, data in NEIGHBOUR.items()})
            yield [server]

    @pytest.fixture
    def store(self, served: list[ObjectServer], tmp_path: Path) -> Store:
        server = served[0]
        return Store(
            url=f"{server.url}/m/tiny/",
            environ={"HOME": str(tmp_path)},
            put=lambda path, data: server.objects.update({f"m/tiny/{path}": data}),
            remove=lambda path: discard(server, f"m/tiny/{path}"),
            mark=lambda path: server.objects.update({f"m/tiny/{path}.keep/": b""}),
        )

    def elsewhere(self, store: Store, url: str) -> tuple[str, dict[str, str]]:
        return f"{url}/m/tiny/", dict(store.environ)


def discard(server: ObjectServer, path: str) -> None:
    del server.objects[path]


def fill(server: ObjectServer, below: str, others: Mapping[str, bytes]) -> None:
    server.objects.update({f"{below}{path}": data for path, data in FILES.items()})
    server.objects.update(others)


class TestOss(ServedContract):
    token = ""

    @pytest.fixture
    def served(self, server: OssServer) -> list[ObjectServer]:
        return [server]

    def elsewhere(self, store: Store, url: str) -> tuple[str, dict[str, str]]:
        return store.url, {**store.environ, "OSS_ENDPOINT": url}

    @pytest.fixture
    def server(self) -> Iterator[OssServer]:
        with serving(server := OssServer(token=self.token)):
            server.page_keys = 2  # a listing takes several pages
            fill(server, "models/llm/tiny/",
                 {f"models/llm/{path}": data for path, data in NEIGHBOUR.items()})  # fmt: skip
            yield server

    @pytest.fixture
    def store(self, server: OssServer, tmp_path: Path) -> Iterator[Store]:
        environ = {
            "HOME": str(tmp_path),
            "OSS_ENDPOINT": server.url,
            "OSS_ACCESS_KEY_ID": server.key,
            "OSS_ACCESS_KEY_SECRET": server.secret,
            "OSS_SESSION_TOKEN": server.token,
        }
        yield Store(
            url="oss://models/llm/tiny",
            environ=environ,
            put=lambda path, data: server.put(f"llm/tiny/{path}", data),
            remove=lambda path: discard(server, f"models/llm/tiny/{path}"),
            mark=lambda path: server.put(f"llm/tiny/{path}", b""),
            secrets=(server.key, server.secret, *([server.token] if server.token else [])),
        )
        assert not server.refused

    def test_the_crc64_is_oss_s_own(self, store: Store, server: OssServer) -> None:
        import oss2

        with store.opened() as source:
            file = file_of(source, "config.json")
        wanted = oss2.utils.Crc64()
        wanted.update(FILES["config.json"])
        assert file.digests == {"crc64": f"{wanted.crc:016x}"}

    def test_ossfs_lists_the_bucket_and_keeps_no_key(self, store: Store, server: OssServer) -> None:
        import ossfs

        with store.opened() as source:
            source.list()
        listed = [headers for _, path, headers in server.asked if "prefix=" in path]
        assert listed
        assert all(headers["user-agent"].endswith("/ossfs") for headers in listed)
        assert not ossfs.OSSFileSystem._cache

    def test_a_whole_bucket_is_a_model_too(self, store: Store, server: OssServer) -> None:
        for path in ("", "llm/", "llm/tiny/original/"):
            server.put(path, b"")
        with store.opened("oss://models") as source:
            found = {file.path for file in source.list().files}
        assert found == {f"llm/tiny/{path}" for path in FILES} | {f"llm/{p}" for p in NEIGHBOUR}

    @pytest.mark.parametrize("url", ["oss://models/llm/tiny", "oss://models"])
    def test_a_bucket_that_may_not_be_listed_is_not_empty(
        self, store: Store, server: OssServer, monkeypatch: pytest.MonkeyPatch, url: str
    ) -> None:
        def refuse(query: dict[str, str]) -> Answer:
            return server._error(403, "AccessDenied", "not yours")

        monkeypatch.setattr(server, "_list", refuse)
        with store.opened(url) as source, pytest.raises(SourceError, match="AccessDenied"):
            source.list(Retries(most=2))
        assert len(server.asked) == 1

    @pytest.mark.parametrize("url", ["oss://models/llm/tiny", "oss://models"])
    def test_half_a_listing_is_none(
        self, store: Store, server: OssServer, monkeypatch: pytest.MonkeyPatch, url: str
    ) -> None:
        whole, pages = server._list, 0

        def cut_off(query: dict[str, str]) -> Answer:
            nonlocal pages
            pages += 1
            status, headers, body = whole(query)
            if pages > 1:
                headers = {**headers, "Content-Length": str(len(body)), "Connection": "close"}
                body = body[: len(body) // 2]
            return status, headers, body

        monkeypatch.setattr(server, "_list", cut_off)
        with store.opened(url) as source, pytest.raises(SourceError) as raised:
            source.list()
        assert raised.value.retryable
        assert pages == 2


class TestOssWithToken(TestOss):
    token = "sts/token+with=signs"


@pytest.fixture(scope="session")
def moto_url() -> Iterator[str]:
    """Moto's S3 server, in a thread."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    try:
        yield f"http://{host}:{port}"
    finally:
        server.stop()


class TestS3FromMoto(SourceContract):
    @pytest.fixture
    def store(self, moto_url: str, tmp_path: Path) -> Iterator[Store]:
        import boto3

        keys = {"aws_access_key_id": "AKIATESTTESTTEST", "aws_secret_access_key": "s3-test-secret"}
        client = boto3.client("s3", endpoint_url=moto_url, region_name="us-east-1", **keys)
        client.create_bucket(Bucket="models")
        for path, data in {f"tiny/{p}": d for p, d in FILES.items()}.items() | NEIGHBOUR.items():
            client.put_object(Bucket="models", Key=path, Body=data)
        yield Store(
            url="s3://models/tiny",
            environ={
                "HOME": str(tmp_path),
                "AWS_ENDPOINT_URL": moto_url,
                "AWS_REGION": "us-east-1",
                "AWS_ACCESS_KEY_ID": keys["aws_access_key_id"],
                "AWS_SECRET_ACCESS_KEY": keys["aws_secret_access_key"],
            },
            put=lambda p, data: client.put_object(Bucket="models", Key=f"tiny/{p}", Body=data),
            remove=lambda p: client.delete_object(Bucket="models", Key=f"tiny/{p}"),
            mark=lambda p: client.put_object(Bucket="models", Key=f"tiny/{p}", Body=b""),
            secrets=tuple(keys.values()),
        )
        for found in client.list_objects_v2(Bucket="models")["Contents"]:
            client.delete_object(Bucket="models", Key=found["Key"])
        client.delete_bucket(Bucket="models")


class OfBuckets(ServedContract):
    """Sources whose listings are S3's, by a server that checks no signatures."""

    @pytest.fixture
    def served(self) -> Iterator[list[ObjectServer]]:
        with serving(server := GcsServer()):
            fill(server, "models/tiny/", {f"models/{p}": d for p, d in NEIGHBOUR.items()})
            yield [server]

    def store_at(self, server: ObjectServer, url: str, environ: Mapping[str, str]) -> Store:
        assert isinstance(server, GcsServer)
        return Store(
            url=url,
            environ=environ,
            put=lambda path, data: server.put(f"tiny/{path}", data),
            remove=lambda path: discard(server, f"models/tiny/{path}"),
            mark=lambda path: server.put(f"tiny/{path}", b""),
        )


class TestGs(OfBuckets):
    @pytest.fixture
    def store(self, served: list[ObjectServer], tmp_path: Path) -> Store:
        environ = {"HOME": str(tmp_path), "STORAGE_EMULATOR_HOST": served[0].url}
        return self.store_at(served[0], "gs://models/tiny", environ)

    def elsewhere(self, store: Store, url: str) -> tuple[str, dict[str, str]]:
        return store.url, {**store.environ, "STORAGE_EMULATOR_HOST": url}


class TestS3OfOurs(OfBuckets):
    @pytest.fixture
    def store(self, served: list[ObjectServer], tmp_path: Path) -> Store:
        environ = {
            "HOME": str(tmp_path),
            "AWS_ENDPOINT_URL": served[0].url,
            "AWS_ACCESS_KEY_ID": "AKIATESTTESTTEST",
            "AWS_SECRET_ACCESS_KEY": "s3-test-secret",
        }
        return self.store_at(served[0], "s3://models/tiny", environ)

    def elsewhere(self, store: Store, url: str) -> tuple[str, dict[str, str]]:
        return store.url, {**store.environ, "AWS_ENDPOINT_URL": url}


class UntaggedServer(ObjectServer):
    """The store that a hub redirects to, which names no entity tag and no time of change."""

    def headers_of(self, path: str, data: bytes) -> dict[str, str]:
        return {}


class TestHf(ServedContract):
    @pytest.fixture
    def served(self, hub: HubServer) -> list[ObjectServer]:
        self.hub = hub
        return [hub]

    def elsewhere(self, store: Store, url: str) -> tuple[str, dict[str, str]]:
        self.hub.redirects_to = url
        return store.url, {**store.environ, "HF_ENDPOINT": url}

    @pytest.fixture
    def hub(self) -> Iterator[HubServer]:
        elsewhere = UntaggedServer()
        with serving(elsewhere), serving(hub := HubServer(elsewhere, token="hf_testtesttest")):
            for path, data in FILES.items():
                hub.put(path, data)
            yield hub

    @pytest.fixture
    def store(self, hub: HubServer, tmp_path: Path) -> Store:
        def put(path: str, data: bytes) -> None:
            hub.put(path, data)
            hub.commits["main"] = hashlib.sha1(data).hexdigest()

        def remove(path: str) -> None:
            hub.elsewhere.objects.clear()
            del hub.objects[path]

        return Store(
            url="hf://org/tiny",
            environ={
                "HOME": str(tmp_path),
                "HF_ENDPOINT": hub.url,
                "HF_TOKEN": hub.token,
            },
            put=put,
            remove=remove,
            secrets=(hub.token, "topsecret"),
        )

    def test_a_large_file_is_redirected_once_and_the_token_stays_with_the_hub(
        self, store: Store, hub: HubServer, tmp_path: Path
    ) -> None:
        size = len(FILES[BIG])
        with store.opened() as source, filled(tmp_path / "out", size) as fd:
            file = file_of(source, BIG)
            for start in range(0, size, 1_000_000):
                end = min(start + 1_000_000, size)
                read_range(source, file, start, end, fd)
        assert (tmp_path / "out").read_bytes() == FILES[BIG]
        assert hub.redirected == 1
        reads = hub.elsewhere.reads()
        assert len(reads) > 8
        assert not [headers for _, _, headers in reads if "authorization" in headers]


def test_sources_are_used_by_many_at_once(tmp_path: Path) -> None:
    """Kept connections are never shared by two reads: each gets its own bytes."""
    with serving(server := IndexedServer()):
        fill(server, "tiny/", {})
        ref = parse_ref(f"{server.url}/tiny/")
        source = open_source(ref, settings=ModelCacheSettings(), environ={"HOME": "/"})
        files = source.list().files
        wrong, barrier = [], threading.Barrier(6)

        def read(number: int) -> None:
            random = Random(number)
            barrier.wait(60)
            for turn in range(40):
                file = random.choice(files)
                start = random.randrange(file.size_bytes)
                end = min(file.size_bytes, start + random.randrange(1, 50_000))
                with filled(tmp_path / f"{number}", end) as fd:
                    read_range(source, file, start, end, fd)
                    if os.pread(fd, end, start) != FILES[file.path][start:end]:
                        wrong.append((number, turn))

        threads = [threading.Thread(target=read, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        source.close()
    assert not wrong
