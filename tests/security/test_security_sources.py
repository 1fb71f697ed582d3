"""A store, a hub or a web server that is hostile: it can make a fetch fail, and nothing else."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from time import process_time

import pytest
from object_server import Handler, IndexedServer, ObjectServer, serving

from modelcache.ports import RangeRead
from modelcache.refs import parse_ref
from modelcache.settings import ModelCacheSettings
from modelcache.sources import wire
from modelcache.sources.hf import read_info
from modelcache.sources.http import USUAL_FILES, read_index
from modelcache.sources.opening import open_source
from modelcache.types import CacheError, Listing, SourceError

DEEP = b"[" * 200_000


def list_at(url: str, environ: dict[str, str], timeout_s: float = 30) -> Listing:
    settings = ModelCacheSettings(timeout_s=timeout_s)
    source = open_source(parse_ref(url), settings=settings, environ={"HOME": "/", **environ})
    try:
        return source.list()
    finally:
        source.close()


@pytest.fixture
def server() -> Iterator[IndexedServer]:
    with serving(server := IndexedServer()):
        yield server


# -- where a source may send its readers ---------------------------------------------------------


def addresses(known: dict[str, str]) -> Callable[..., list[object]]:
    def look_up(host: str, port: int, **_: object) -> list[object]:
        if host not in known:
            raise socket.gaierror("unknown")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (known[host], port))]

    return look_up


@pytest.mark.parametrize(
    ("url", "target", "may"),
    [
        ("https://hub.example", "https://cdn.example/x", True),
        ("https://hub.example", "http://169.254.169.254/latest", False),
        ("http://127.0.0.1:1", "http://169.254.169.254/latest", False),
        ("http://127.0.0.1:1", "http://100.100.100.200/latest", False),
        ("https://hub.example", "http://127.0.0.1:8001/status", False),
        ("https://hub.example", "http://[::1]:8001/status", False),
        ("https://hub.example", "http://[::ffff:127.0.0.1]:8001/status", False),
        ("https://hub.example", "http://0.0.0.0:8001/status", False),
        ("https://hub.example", "http://localhost:8001/status", False),
        ("https://hub.example", "http://10.0.0.5/x", False),
        ("https://hub.example", "http://rebound.example/x", False),
        ("http://mirror.intern", "http://127.0.0.1:8001/x", False),
        ("http://mirror.intern", "http://[::ffff:127.0.0.1]:8001/x", False),
        ("http://mirror.intern", "http://0.0.0.0:8001/x", False),
        ("http://127.0.0.1:1", "http://[::ffff:169.254.169.254]/latest", False),
        ("http://mirror.intern", "http://10.0.0.5/x", True),
        ("http://mirror.intern", "https://cdn.example/x", True),
        ("http://127.0.0.1:1", "http://127.0.0.1:2/x", True),
    ],
)
def test_a_redirect_leads_no_further_inside_than_it_comes_from(
    url: str, target: str, may: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = {
        "hub.example": "93.184.216.34", "cdn.example": "93.184.216.35", "localhost": "127.0.0.1",
        "rebound.example": "10.9.9.9", "mirror.intern": "10.1.1.1",
    }  # fmt: skip
    literal = {name: name for name in ("169.254.169.254", "100.100.100.200", "127.0.0.1", "::1",
                                       "::ffff:127.0.0.1", "::ffff:169.254.169.254", "0.0.0.0",
                                       "10.0.0.5")}  # fmt: skip
    monkeypatch.setattr(socket, "getaddrinfo", addresses({**known, **literal}))
    assert wire.may_lead(url, target) is may


@pytest.mark.parametrize("listing", [True, False])
def test_a_store_cannot_have_a_cloud_s_metadata_read(
    server: IndexedServer, tmp_path: Path, listing: bool
) -> None:
    def redirect(handler: Handler, path: str, data: bytes) -> bool:
        handler.answer(302, {"Location": "http://169.254.169.254/latest/iam"}, b"")
        return True

    server.objects["m/model.safetensors"] = b"12345678"
    server.fault = redirect
    url = f"{server.url}/m/model.safetensors"
    settings = ModelCacheSettings(timeout_s=30)
    source = open_source(parse_ref(url), settings=settings, environ={"HOME": "/"})
    with open(tmp_path / "out", "w+b") as out:
        file = source.list().files[0]
        want = RangeRead(file=file, start=0, end=8, fd=out.fileno())
        with pytest.raises(SourceError, match="not followed"):
            source.fetch(want)
    source.close()
    with pytest.raises(SourceError, match="metadata"):
        list_at("http://169.254.169.254/latest/", {})


# -- what it may say -------------------------------------------------------------------------------

GOOD = {"sha": "1" * 40, "siblings": [{"rfilename": "config.json", "size": 2, "blobId": "2" * 40}]}


def sibling(**changed: object) -> bytes:
    return json.dumps({**GOOD, "siblings": [{**GOOD["siblings"][0], **changed}]}).encode()  # type: ignore[dict-item]


@pytest.mark.parametrize(
    "answer",
    [
        DEEP,
        b'{"siblings":' + DEEP,
        b"[]",
        b"null",
        b"\xff",
        json.dumps({**GOOD, "sha": "../../etc"}).encode(),
        json.dumps({**GOOD, "sha": 1}).encode(),
        json.dumps({**GOOD, "siblings": {"a": 1}}).encode(),
        json.dumps({**GOOD, "siblings": [1]}).encode(),
        sibling(size=-1),
        sibling(size=2**70),
        sibling(size=True),
        sibling(size="12"),
        sibling(size=float("inf")),
        sibling(size=float("nan")),
        sibling(rfilename="../../evil"),
        sibling(rfilename="/etc/evil"),
        sibling(rfilename="a\0b"),
        sibling(rfilename="a/../b"),
        sibling(rfilename="\ud800"),
        sibling(rfilename="x" * 300),
        sibling(rfilename="é" * 200),
        sibling(rfilename=7),
        sibling(lfs={"sha256": "../../x"}),
        sibling(lfs={"sha256": "a" * 40}),
        b'{"sha":"' + b"1" * 40 + b'","siblings":[{"rfilename":"a","size":' + b"9" * 5_000 + b"}]}",
    ],
)
def test_an_odd_answer_of_a_hub_is_an_error_of_its_source(
    server: IndexedServer, answer: bytes
) -> None:
    server.objects["api/models/org/m"] = answer
    with pytest.raises(CacheError):
        list_at("hf://org/m", {"HF_ENDPOINT": server.url})


def test_a_good_answer_of_a_hub_is_taken() -> None:
    assert read_info("hf://org/m", sibling())[0] == "1" * 40


ODD_PAGES = (
    DEEP, b"{}", b'[{"name":"a"}]', b'[{"name":7,"type":"file"}]',
    b'[{"name":"\\ud800","type":"f"}]',
    b'<a href="http://[bad">x</a>', b"<a href='//[::1'>x</a>", b"<!DOCTYPE [<![x", b"<a href=>",
    b"\xff\xfe<a href='\x00'>",
)  # fmt: skip


@pytest.mark.parametrize("page", ODD_PAGES)
@pytest.mark.parametrize("kind", ["text/html", "application/json"])
def test_an_odd_listing_lists_nothing(page: bytes, kind: str) -> None:
    assert not read_index("http://h/m/", kind, page)


@pytest.mark.parametrize(
    "part", [b"<!--", b"<a ", b'<a href="', b"<a href='x", b"<![CDATA[", b"</", b"href = "]
)
def test_a_page_that_is_made_to_take_long_does_not(part: bytes) -> None:
    began_s = process_time()
    read_index("http://h/m/", "text/html", part * (2_000_000 // len(part)))
    assert process_time() - began_s < 30  # the library's parser needs minutes for some of these


@pytest.mark.parametrize(
    "names",
    [["../x"], ["a\0b"], ["/etc/x"], [""], ["x" * 300], [f"{n}.safetensors" for n in range(9_999)]],
)
def test_an_index_of_a_web_server_names_only_files_below_it(
    server: IndexedServer, names: list[str]
) -> None:
    server.index = None
    weight_map = {f"t{at}": name for at, name in enumerate(names)}
    server.objects["m/model.safetensors.index.json"] = json.dumps(
        {"weight_map": weight_map}
    ).encode()
    with pytest.raises(CacheError):
        list_at(f"{server.url}/m/", {})
    asked = {path for _, path, _ in server.asked}
    assert asked <= {"/m/", *(f"/m/{name}" for name in USUAL_FILES)}, "and none that it names"


XML = '<?xml version="1.0"?><ListBucketResult><Name>models</Name>{}</ListBucketResult>'
ENTRY = (
    "<Contents><Key>{}</Key><LastModified>2026-11-20T10:00:00.000Z</LastModified>"
    "<ETag>x</ETag><Size>{}</Size><StorageClass>S</StorageClass></Contents>"
)


class XmlServer(ObjectServer):
    """A bucket whose listing is always this."""

    listing = b""

    def special(
        self, handler: Handler, path: str, query: dict[str, str]
    ) -> tuple[int, dict[str, str], bytes] | None:
        return 200, {"Content-Type": "application/xml"}, self.listing


@pytest.mark.parametrize("scheme", ["s3", "gs", "oss"])
@pytest.mark.parametrize(
    "listing",
    [
        b"",
        b"<",
        b"{}",
        b"<a>" * 100_000,
        XML.format(ENTRY.format("m/a", -1)).encode(),
        XML.format(ENTRY.format("m/a", 2**70)).encode(),
        XML.format(ENTRY.format("m/a", "9" * 5_000)).encode(),
        XML.format(ENTRY.format("m/a", "x")).encode(),
        XML.format(ENTRY.format("m/../../evil", 5)).encode(),
        XML.format(ENTRY.format("m/" + "x" * 300, 5)).encode(),
        b'<!DOCTYPE x [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;">]>' + XML.format("&b;").encode(),
    ],
)
def test_an_odd_listing_of_a_bucket_is_an_error_of_its_source(scheme: str, listing: bytes) -> None:
    with serving(server := XmlServer()):
        server.listing = listing
        environ = {
            "AWS_ENDPOINT_URL": server.url, "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b",
            "STORAGE_EMULATOR_HOST": server.url, "OSS_ENDPOINT": server.url,
            "OSS_ACCESS_KEY_ID": "a", "OSS_ACCESS_KEY_SECRET": "b",
        }  # fmt: skip
        with pytest.raises(CacheError):
            list_at(f"{scheme}://models/m", environ)
