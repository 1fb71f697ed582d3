"""Credentials come from where each store's own tools look, and are shown nowhere."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from object_server import IndexedServer, ObjectServer, serving
from store_servers import GcsServer, HubServer, OssServer

from modelcache.refs import SCHEMES, Scheme, parse_ref
from modelcache.settings import ModelCacheSettings
from modelcache.sources import gs, hf, http, s3
from modelcache.sources.obstore_client import ObjectStoreAccess
from modelcache.sources.opening import ExtraMissing, open_source, rate_of
from modelcache.sources.oss import find_access as find_oss_access
from modelcache.sources.reader import make_reader
from modelcache.types import Listing, ModelRef, NotFound, SourceError

KEY, SECRET, TOKEN = "AKIATESTTESTTEST", "wJalr/test+secret", "session/token=="


def not_here(environ: Mapping[str, str]) -> bool:
    return False


# -- S3 ------------------------------------------------------------------------------------------


def test_s3_keys_of_the_environment(tmp_path: Path) -> None:
    access = s3.find_access(
        {
            "HOME": str(tmp_path),
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_SESSION_TOKEN": TOKEN,
            "AWS_DEFAULT_REGION": "eu-west-1",
            "AWS_ENDPOINT_URL": "http://one",
            "AWS_ENDPOINT_URL_S3": "http://two",
        },
        on_instance=not_here,
    )
    assert access.config == {
        "access_key_id": KEY,
        "secret_access_key": SECRET,
        "session_token": TOKEN,
    }
    assert (access.region, access.endpoint, access.anonymous) == ("eu-west-1", "http://two", False)
    assert not [s for s in (KEY, SECRET, TOKEN) if s in repr(access)]


def write_aws(home: Path, credentials: str, config: str = "") -> dict[str, str]:
    (home / ".aws").mkdir(exist_ok=True)
    (home / ".aws" / "credentials").write_text(credentials)
    (home / ".aws" / "config").write_text(config)
    return {"HOME": str(home)}


def test_s3_keys_of_a_profile(tmp_path: Path) -> None:
    keys = "[{}]\naws_access_key_id = {}\naws_secret_access_key = {}\n"
    environ = write_aws(
        tmp_path,
        keys.format("default", "AKIADEFAULT", "d") + keys.format("ml", KEY, SECRET),
        "[profile ml]\nregion = eu-north-1\nendpoint_url = http://store\n",
    )
    default = s3.find_access(environ, on_instance=not_here)
    assert (default.config["access_key_id"], default.region) == ("AKIADEFAULT", None)
    ml = s3.find_access({**environ, "AWS_PROFILE": "ml"}, on_instance=not_here)
    assert ml.config == {"access_key_id": KEY, "secret_access_key": SECRET}
    assert (ml.region, ml.endpoint) == ("eu-north-1", "http://store")
    with pytest.raises(SourceError, match="'nobody'"):
        s3.find_access({**environ, "AWS_PROFILE": "nobody"}, on_instance=not_here)


def test_s3_a_profile_with_a_command_goes_through_boto3(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = json.dumps({"Version": 1, "AccessKeyId": KEY, "SecretAccessKey": SECRET})
    (tmp_path / "keys.json").write_text(given)
    environ = write_aws(
        tmp_path, "", f"[profile ml]\ncredential_process = cat {tmp_path}/keys.json\n"
    )
    for name, value in {**environ, "AWS_PROFILE": "ml"}.items():
        monkeypatch.setenv(name, value)
    access = s3.find_access({**environ, "AWS_PROFILE": "ml"}, on_instance=not_here)
    assert access.config["credential_provider"]()["access_key_id"] == KEY


def test_s3_what_a_container_or_an_instance_is_given_is_left_to_obstore(tmp_path: Path) -> None:
    home = {"HOME": str(tmp_path)}
    for name in ("AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_CONTAINER_CREDENTIALS_FULL_URI"):
        assert not s3.find_access({**home, name: "x"}, on_instance=not_here).anonymous
    assert not s3.find_access(home, on_instance=lambda environ: True).anonymous
    assert s3.find_access(home, on_instance=not_here).anonymous
    assert s3.find_access({**home, "AWS_EC2_METADATA_DISABLED": "true"}).anonymous


def test_s3_a_damaged_file_is_named_and_not_quoted(tmp_path: Path) -> None:
    environ = write_aws(tmp_path, f"aws_secret_access_key = {SECRET}\n")
    with pytest.raises(SourceError, match="credentials") as raised:
        s3.find_access(environ, on_instance=not_here)
    assert SECRET not in str(raised.value)


def test_s3_a_public_bucket_is_read_unsigned(tmp_path: Path) -> None:
    environ = {"HOME": str(tmp_path), "AWS_EC2_METADATA_DISABLED": "true"}
    with serving(server := GcsServer()):  # its listing is S3's too
        server.put("m/config.json", b"{}")
        listing = list_at("s3://models/m", {**environ, "AWS_ENDPOINT_URL": server.url})
        assert [file.path for file in listing.files] == ["config.json"]
        assert not [path for _, path, headers in server.asked
                    if "Signature" in path or "authorization" in headers]  # fmt: skip


# -- OSS -----------------------------------------------------------------------------------------


@pytest.fixture
def oss() -> Iterator[OssServer]:
    with serving(server := OssServer()):
        server.put("m/config.json", b"{}")
        server.put("m/sub/model.safetensors", b"12345678")
        yield server


def list_at(url: str, environ: dict[str, str]) -> Listing:
    source = open_source(parse_ref(url), settings=ModelCacheSettings(timeout_s=30), environ=environ)
    try:
        return source.list()
    finally:
        source.close()


def oss_environ(server: OssServer, home: Path) -> dict[str, str]:
    return {"HOME": str(home), "OSS_ENDPOINT": server.url}


def test_oss_keys_of_the_environment_by_either_name(oss: OssServer, tmp_path: Path) -> None:
    for prefix in ("OSS_", "ALIBABA_CLOUD_"):
        environ = oss_environ(oss, tmp_path)
        environ[f"{prefix}ACCESS_KEY_ID"] = oss.key
        environ[f"{prefix}ACCESS_KEY_SECRET"] = oss.secret
        assert len(list_at("oss://models/m", environ).files) == 2


def test_oss_keys_of_ossutil_s_file(oss: OssServer, tmp_path: Path) -> None:
    (tmp_path / ".ossutilconfig").write_text(
        f"[Credentials]\nlanguage=EN\nendpoint={oss.url}\naccessKeyID={oss.key}\n"
        f"accessKeySecret={oss.secret}\n"
    )
    assert len(list_at("oss://models/m", {"HOME": str(tmp_path)}).files) == 2
    (tmp_path / ".ossutilconfig").write_text(f"accessKeySecret={oss.secret}\n")
    with pytest.raises(SourceError, match="ossutil") as raised:
        list_at("oss://models/m", {"HOME": str(tmp_path)})
    assert oss.secret not in str(raised.value)


def test_oss_credentials_from_a_url_are_renewed_in_time(tmp_path: Path) -> None:
    asked_for: list[float] = []

    def credentials(number: int, good_for_s: float) -> bytes:
        until = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(now_s + good_for_s))
        return json.dumps(
            {"Code": "Success", "AccessKeyId": f"STS.{number}", "AccessKeySecret": "s",
             "SecurityToken": "t", "Expiration": until}
        ).encode()  # fmt: skip

    now_s = time.time()
    with serving(server := ObjectServer()):
        environ = {
            "HOME": str(tmp_path),
            "OSS_REGION": "cn-hangzhou",
            "ALIBABA_CLOUD_CREDENTIALS_URI": f"{server.url}/role",
        }
        reader = make_reader(environ, timeout_s=30, connections=2, rate_bytes_s=None)
        access = find_oss_access(environ, reader)
        assert access.endpoint == "https://oss-cn-hangzhou.aliyuncs.com"
        access.clock = lambda: now_s + asked_for[-1]
        for after_s, number, wanted in ((0, 1, 1), (100, 2, 1), (3_400, 3, 3), (3_500, 4, 3)):
            server.objects["role"] = credentials(number, after_s + 3_600)
            asked_for.append(after_s)
            assert access.keys().key == f"STS.{wanted}"
        server.objects["role"] = b'{"Code": "Failed", "AccessKeySecret": "hunter2"}'
        asked_for.append(9_000)
        with pytest.raises(SourceError) as raised:
            access.keys()
        assert "hunter2" not in str(raised.value)
        reader.close()


def test_oss_wrong_keys_are_an_error_that_shows_none(oss: OssServer, tmp_path: Path) -> None:
    environ = {
        **oss_environ(oss, tmp_path),
        "OSS_ACCESS_KEY_ID": oss.key,
        "OSS_ACCESS_KEY_SECRET": "another-secret",
    }
    for given in (environ, oss_environ(oss, tmp_path)):
        with pytest.raises(SourceError, match="refuses access") as raised:
            list_at("oss://models/m", given)
        said = f"{raised.value} {raised.value.__cause__!r}"
        assert not [s for s in (oss.key, "another-secret", "StringToSign") if s in said]
        assert "OSS_ACCESS_KEY_ID" in said
        assert not raised.value.retryable
    assert oss.refused


def test_oss_a_public_bucket_needs_no_keys(oss: OssServer, tmp_path: Path) -> None:
    oss.public = True
    assert len(list_at("oss://models/m", oss_environ(oss, tmp_path)).files) == 2


def test_oss_an_object_is_a_model_and_a_missing_bucket_none(oss: OssServer, tmp_path: Path) -> None:
    oss.public = True
    environ = oss_environ(oss, tmp_path)
    listing = list_at("oss://models/m/sub/model.safetensors", environ)
    assert [file.path for file in listing.files] == ["model.safetensors"]
    for url in ("oss://elsewhere/m", "oss://models/none"):
        with pytest.raises(NotFound):
            list_at(url, environ)


def test_oss_without_an_endpoint_says_what_to_set(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="OSS_ENDPOINT"):
        list_at("oss://models/m", {"HOME": str(tmp_path)})
    reader = make_reader({}, timeout_s=5, connections=2, rate_bytes_s=None)
    for host, environ, endpoint in (
        ("m.oss-cn-beijing.aliyuncs.com", {}, "https://oss-cn-beijing.aliyuncs.com"),
        ("m", {"OSS_ENDPOINT": "oss-cn-x.aliyuncs.com"}, "https://oss-cn-x.aliyuncs.com"),
        ("m", {"OSS_ENDPOINT": "http://internal"}, "http://internal"),
        ("m", {"OSS_REGION": "oss-cn-x"}, "https://oss-cn-x.aliyuncs.com"),
    ):
        of_url = host.partition(".")[2]
        access = find_oss_access({"HOME": "/none", **environ}, reader, endpoint=of_url)
        assert access.endpoint == endpoint


# -- the others ----------------------------------------------------------------------------------


def test_hf_token_of_the_environment_or_of_the_file(tmp_path: Path) -> None:
    home = {"HOME": str(tmp_path)}
    assert hf.find_token(home) is None
    cache = tmp_path / ".cache" / "huggingface"
    cache.mkdir(parents=True)
    (cache / "token").write_text("hf_fromfile\n")
    assert hf.find_token(home) == "hf_fromfile"
    (tmp_path / "elsewhere").write_text("hf_elsewhere")
    assert hf.find_token({**home, "HF_TOKEN_PATH": f"{tmp_path}/elsewhere"}) == "hf_elsewhere"
    assert hf.find_token({**home, "HF_HOME": str(tmp_path)}) is None
    assert hf.find_token({**home, "HF_TOKEN": " hf_env\n"}) == "hf_env"


def test_hf_revisions_folders_and_refusals(tmp_path: Path) -> None:
    with serving(elsewhere := ObjectServer()), serving(hub := HubServer(elsewhere)):
        hub.put("config.json", b"{}")
        hub.put("gguf/q4/model.safetensors", b"1234")
        environ = {"HOME": str(tmp_path), "HF_ENDPOINT": hub.url}
        assert list_at("hf://org/tiny", environ).revision == "1" * 40
        assert list_at("hf://org/tiny@v1", environ).revision == "2" * 40
        listing = list_at("hf://org/tiny@v1/gguf", environ)
        assert [file.path for file in listing.files] == ["q4/model.safetensors"]
        for url in ("hf://org/tiny@v9", "hf://org/none", "hf://org/tiny/nowhere"):
            with pytest.raises(NotFound):
                list_at(url, environ)
        hub.token = "hf_wanted0000"
        with pytest.raises(NotFound, match="HF_TOKEN") as raised:
            list_at("hf://org/tiny", {**environ, "HF_TOKEN": "hf_another0000"})
        assert "hf_another0000" not in str(raised.value)
        with pytest.raises(SourceError, match="HF_HUB_OFFLINE"):
            list_at("hf://org/tiny", {**environ, "HF_HUB_OFFLINE": "1"})
    with pytest.raises(SourceError) as raised:
        list_at("hf://org/tiny", {**environ, "HF_ENDPOINT": "http://127.0.0.1:9"})
    assert raised.value.retryable


def test_netrc_is_for_its_own_host_and_not_quoted_when_damaged(tmp_path: Path) -> None:
    path = tmp_path / ".netrc"
    path.write_text("machine store.example login ada password lovelace\n")
    environ = {"HOME": str(tmp_path)}
    given = http.netrc_headers(parse_ref("https://store.example/m/"), environ)
    assert given == {"Authorization": "Basic YWRhOmxvdmVsYWNl"}
    assert http.netrc_headers(parse_ref("https://other.example/m/"), environ) == {}
    path.write_text("machine store.example login ada passwort lovelace\n")
    with pytest.raises(SourceError, match="netrc") as raised:
        http.netrc_headers(parse_ref("https://store.example/m/"), environ)
    assert "lovelace" not in str(raised.value)


def test_gs_credentials(tmp_path: Path) -> None:
    home = {"HOME": str(tmp_path), "NO_GCE_CHECK": "true"}
    assert gs.find_access(home) == ObjectStoreAccess(anonymous=True)
    emulator = gs.find_access({"STORAGE_EMULATOR_HOST": "h:1"})
    assert "http://h:1" in emulator.config["service_account_key"]
    with pytest.raises(SourceError, match="cannot be read"):
        gs.find_access({**home, "GOOGLE_APPLICATION_CREDENTIALS": str(tmp_path / "none.json")})
    usual = tmp_path / ".config" / "gcloud" / "application_default_credentials.json"
    usual.parent.mkdir(parents=True)
    usual.write_text("{}")
    assert gs.find_access(home).config == {"application_credentials": str(usual)}
    usual.write_text('{"type": "service_account", "private_key": "hunter2-no-key"}')
    with pytest.raises(SourceError) as raised:
        list_at("gs://models/m", home)
    assert "hunter2" not in str(raised.value)


def test_a_client_that_is_not_installed_is_named() -> None:
    schemes = {"oss": Scheme(client="a_module_that_is_nowhere")}
    with pytest.raises(ExtraMissing, match="-m pip install a-module-that"):
        open_source(
            parse_ref("oss://models/m"), settings=ModelCacheSettings(), environ={}, schemes=schemes
        )


def test_every_scheme_opens_its_own_source(tmp_path: Path) -> None:
    environ = {
        "HOME": str(tmp_path),
        "NO_GCE_CHECK": "true",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_ENDPOINT_URL": "http://127.0.0.1:9",
        "OSS_ENDPOINT": "http://127.0.0.1:9",
    }
    opened = {}
    for scheme in SCHEMES:
        source = open_source(
            parse_ref(f"{scheme}:///models/m" if scheme == "file" else f"{scheme}://models/m"),
            settings=ModelCacheSettings(),
            environ=environ,
        )
        opened[scheme] = type(source).__name__
        source.close()
    assert opened == {
        "file": "FileSource",
        "gs": "GsSource",
        "hf": "HfSource",
        "http": "HttpSource",
        "https": "HttpSource",
        "oss": "OssSource",
        "s3": "S3Source",
    }
    unknown = ModelRef(url="ftp://models/m", scheme="ftp", location="models/m")
    with pytest.raises(SourceError, match="ftp"):
        open_source(unknown, settings=ModelCacheSettings(), environ=environ)


@pytest.mark.parametrize(
    ("url", "rate"),
    [
        ("s3://models/a", 200_000),
        ("s3://models/a/b", 100_000),
        ("s3://models-2/a", 300_000),
        ("oss://models/a", None),
    ],
)
def test_the_longest_beginning_that_fits_limits(url: str, rate: int | None) -> None:
    limits = {"s3://": 300_000, "s3://models": 200_000, "s3://models/a/": 400_000,
              "s3://models/a/b": 100_000}  # fmt: skip
    settings = ModelCacheSettings(source_bandwidth_bytes_s=limits)
    assert rate_of(parse_ref(url), settings) == (400_000 if url == "s3://models/a" else rate)
    tight = ModelCacheSettings(source_bandwidth_bytes_s=limits, bandwidth_bytes_s=70_000)
    assert rate_of(parse_ref(url), tight) == 70_000


def test_a_user_of_the_web_server_is_asked_for(tmp_path: Path) -> None:
    with serving(server := IndexedServer()):
        server.objects["m/model.safetensors"] = b"12345678"
        server.special = (  # type: ignore[method-assign]
            lambda handler, path, query: (
                None if handler.headers.get("Authorization") else (401, {}, b"")
            )
        )
        with pytest.raises(SourceError, match="netrc"):
            list_at(f"{server.url}/m/model.safetensors", {"HOME": str(tmp_path)})
