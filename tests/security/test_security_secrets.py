"""Keys, tokens, passwords, header values and credentials in URLs are shown nowhere: neither by
``config show``, nor in errors about settings and models, nor in what is quoted of engines' logs."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from autoscaler.backends.process.logs import ReplicaLog
from autoscaler.backends.process.replica import secrets_of
from autoscaler.settings import PoolSettings
from gateway.cli import main
from gateway.settings import docs
from gateway.settings.load import ConfigError, load
from modelcache.refs import parse_ref, redact

SECRET = "hunter2pass"
STATIC = '[[pools]]\nname = "a"\nbackend = "static"\n[pools.static]\nurls = ["http://h:1"]\n'
PROCESS = '[[pools]]\nname = "a"\nengine = "simulated"\nmodel = "m"\n'

WELL = [
    STATIC + f'headers = {{ x-plain = "{SECRET}", Authorization = "Bearer {SECRET}" }}\n',
    PROCESS + f'env = {{ DBPASS = "{SECRET}", PLAIN = "{SECRET}" }}\n',
    PROCESS + f'engine_args = ["--api-key", "{SECRET}", "--seed", "7"]\n',
    PROCESS + f'engine_args = ["--api-key=first", "--hf-token={SECRET}"]\n',
    PROCESS + f'engine_args = ["--api-key", "first", "{SECRET}"]\n',
    PROCESS + f'engine_args = ["--otlp", "http://user:{SECRET}@host/"]\n',
    PROCESS + f'engine_args = ["--extra", \'{{"api_key": "{SECRET}"}}\']\n',
    f'[[modelcache.steps."hf://a/b"]]\nkind = "command"\nargv = ["x", "--token", "{SECRET}"]\n'
    f'env = {{ X = "{SECRET}" }}\n',
]
"""Settings that may be so."""

WRONG = [
    STATIC.replace("http://h:1", f"http://user:{SECRET}@h:1"),
    STATIC.replace("http://h:1", f"http://{SECRET}@h:1"),
    STATIC.replace("http://h:1", f"http://h:1/?key={SECRET}"),
    STATIC.replace("http://h:1", f"http:/user:{SECRET}@h:1"),
    STATIC + f'headers = {{ x-plain = ["{SECRET}"] }}\n',
    STATIC + f'headers = "x-plain: {SECRET}"\n',
    STATIC + f'headers = ["{SECRET}"]\n',
    STATIC + f'api_key_env = "{SECRET}-is-no-name"\n',
    STATIC + f'api_key = "{SECRET}"\n',
    PROCESS + f'env = "DBPASS={SECRET}"\n',
    PROCESS + f'env = {{ DBPASS = ["{SECRET}"] }}\n',
    PROCESS + f'engine_args = "--api-key {SECRET}"\n',
    PROCESS + f'engine_args = ["--api-key", ["{SECRET}"]]\n',
    PROCESS + f'model = "https://user:{SECRET}@h/m"\n',
    PROCESS + f'model = "https://h/m?token={SECRET}"\n',
    f'[modelcache]\npeers = ["http://user:{SECRET}@h:1"]\n',
    f'[modelcache]\nsites = {{ eu = "http://user:{SECRET}@h:1" }}\n',
    f'[gateway]\nport = "http://user:{SECRET}@h"\n',
]
"""Settings that are refused."""


def write(directory: Path, text: str) -> Path:
    path = directory / "tidegate.toml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("text", WELL)
def test_config_show_hides_them(
    tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, text)
    rows = list(docs.rows(load(path, {})))
    assert rows
    assert not any(SECRET in f"{row.shown} {json.dumps(row.plain)}" for row in rows)
    for words in (["--json"], []):
        assert main.main(["config", "show", "-c", str(path), *words]) == 0
        out = capsys.readouterr().out
        assert SECRET not in out
        assert "hidden" in out or "…" in out


def test_a_secret_that_every_user_of_the_machine_would_see_is_warned_about(tmp_path: Path) -> None:
    for text, warns in ((WELL[2], True), (WELL[3], True), (PROCESS, False)):
        fields = [one.field for one in load(write(tmp_path, text), {}).warnings]
        assert ("pools.0.engine_args" in fields) is warns


@pytest.mark.parametrize("text", WRONG)
def test_what_is_refused_is_not_repeated(
    tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ConfigError) as refused:
        load(path, {})
    assert SECRET not in str(refused.value)
    for words in ([], ["--json"]):
        assert main.main(["config", "check", "-c", str(path), *words]) == 2
        said = capsys.readouterr()
        assert SECRET not in said.out + said.err


@pytest.mark.parametrize(
    "given",
    [
        f"pools.0.static.headers.x={SECRET}",
        f'pools.0.static.headers={{x="{SECRET}"}}',
        f"pools.0.process.env.X={SECRET}",
        f"pools.0.engine_args=--api-key,{SECRET}",
        f'pools=[{{name="a",backend="static",headers={{x="{SECRET}"}},urls=["http://h"]}}]',
        f"pools.0.static.urls=http://u:{SECRET}@h:1",
        f"nonsense=http://u:{SECRET}@h:1",
        f"gateway.port=http://u:{SECRET}@h:1",
    ],
)
def test_where_a_value_came_from_does_not_tell_it(tmp_path: Path, given: str) -> None:
    path = write(tmp_path, STATIC)
    said: object = ""
    try:
        said = load(path, {}, [given]).origins
    except ConfigError as error:
        said = error
    assert SECRET not in str(said)


@pytest.mark.parametrize(
    "text",
    [
        f"https://user:{SECRET}@host/m",
        f"s3://key:{SECRET}@bucket/m",
        f"s3://bucket/m?X-Amz-Signature={SECRET}",
        f"file://user:{SECRET}@host/m",
        f"hf://user:{SECRET}@org/name",
        f"https:/user:{SECRET}@host/m",
        f"user:{SECRET}@host/m",
        f"ftp://user:{SECRET}@host/m",
        f"https://user:{SECRET}@[::1/m",
    ],
)
def test_a_model_url_that_is_refused_is_not_repeated(text: str) -> None:
    with pytest.raises(ValueError) as refused:
        parse_ref(text)
    assert SECRET not in str(refused.value)


@pytest.mark.parametrize(
    "line",
    [
        f"non-default args: {{'api_key': ['{SECRET}'], 'model': 'm'}}",
        f"args: Namespace(host='h', api_key='{SECRET}', hf_token=\"{SECRET}\")",
        f"HF_TOKEN={SECRET}",
        f"GET http://user:{SECRET}@proxy:3128/ failed",
        f"Authorization: Bearer {SECRET}",
        f"it was started with {SECRET}",
    ],
)
def test_what_is_quoted_of_an_engines_log_has_none(tmp_path: Path, line: str) -> None:
    pool = PoolSettings.model_validate(
        {"name": "a", "engine": "vllm", "model": "m", "engine_args": ["--api-key", SECRET]}
    )
    path = tmp_path / "one.log"
    path.write_text(f"before\n{line}\nafter: 3 of 8\n")
    log = ReplicaLog(path, max_bytes=10**6, files=1, secrets=list(secrets_of(pool, {})))
    said = log.tail(10)
    assert SECRET not in "\n".join(said)
    assert (said[0], said[2], len(said)) == ("before", "after: 3 of 8", 3)


def test_secrets_of_an_engine_are_told_by_their_names() -> None:
    pool = PoolSettings.model_validate(
        {
            "name": "a",
            "engine": "vllm",
            "model": "m",
            "engine_args": ["--hf-token=one-two", "--seed", "7", "--max-num-batched-tokens", "99"],
            "env": {"DBPASS": "long enough", "VLLM_LOGGING_LEVEL": "DEBUG_LEVEL"},
        }
    )
    environ = {"HF_TOKEN": "hf-secret-text", "TOKENIZERS_PARALLELISM": "false", "X_TOKEN": "true"}
    assert set(secrets_of(pool, environ)) == {"one-two", "long enough", "hf-secret-text"}


@pytest.mark.parametrize(
    "text",
    [
        "max_num_batched_tokens=8192 is less than max_model_len: 32768",
        "tokenizer='Qwen/Qwen3-0.6B', tokenizer_mode=auto, eos_token_id=2",
        "GPU KV cache size: 12,345 tokens",
        "OSError: [Errno 98] Address already in use: ('127.0.0.1', 8000)",
        "12:30:45 loading /models/a/b.safetensors at 3.2 GB/s",
    ],
)
def test_what_helps_an_operator_stays(text: str) -> None:
    assert redact(text) == text


@pytest.mark.parametrize("piece", ["a", "/", "token", "a:", "/?", "Bearer ", "://", "' ", "k="])
def test_hiding_takes_no_time_whatever_an_engine_writes(tmp_path: Path, piece: str) -> None:
    path = tmp_path / "one.log"
    path.write_text(piece * (65_536 // len(piece)) + "\nend\n")
    began_s = time.process_time()
    assert ReplicaLog(path, max_bytes=10**6, files=1).tail(200)[-1] == "end"
    path.write_text("\n".join([piece * (300 // len(piece))] * 200))
    ReplicaLog(path, max_bytes=10**6, files=1).tail(200)
    assert time.process_time() - began_s < 3.0
