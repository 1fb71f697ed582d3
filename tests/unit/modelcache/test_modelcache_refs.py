"""What people write for a model, and what may never be shown of it."""

from __future__ import annotations

import pytest

from modelcache.refs import check_file_path, is_below, parse_ref, redact


@pytest.mark.parametrize(
    ("text", "url", "location", "revision"),
    [
        ("hf://Qwen/Qwen3-32B", "hf://Qwen/Qwen3-32B", "Qwen/Qwen3-32B", None),
        ("Qwen/Qwen3-32B", "hf://Qwen/Qwen3-32B", "Qwen/Qwen3-32B", None),
        ("Qwen/Qwen3-32B@v1", "hf://Qwen/Qwen3-32B", "Qwen/Qwen3-32B", "v1"),
        ("hf://a/b@main/gguf/q4", "hf://a/b/gguf/q4", "a/b/gguf/q4", "main"),
        ("hf://a/b@refs/pr/3", "hf://a/b", "a/b", "refs/pr/3"),
        ("hf://a/b@feature%2Fx/sub", "hf://a/b/sub", "a/b/sub", "feature/x"),
        ("https://huggingface.co/a/b", "hf://a/b", "a/b", None),
        ("https://huggingface.co/a/b/tree/v2", "hf://a/b", "a/b", "v2"),
        ("OSS://models/qwen/", "oss://models/qwen", "models/qwen", None),
        (
            "oss://models.oss-cn-hangzhou.aliyuncs.com/q",
            "oss://models.oss-cn-hangzhou.aliyuncs.com/q",
            "models.oss-cn-hangzhou.aliyuncs.com/q",
            None,
        ),
        ("s3://bucket", "s3://bucket", "bucket", None),
        ("gs://bucket/a b", "gs://bucket/a b", "bucket/a b", None),
        ("HTTPS://Host.Example:443/m/", "https://host.example/m/", "host.example/m/", None),
        ("http://127.0.0.1:8000/m", "http://127.0.0.1:8000/m", "127.0.0.1:8000/m", None),
        ("http://h/a%20b/", "http://h/a%20b/", "h/a%20b/", None),
        ("http://h", "http://h/", "h/", None),
        ("http://[::1]:80/m", "http://[::1]/m", "[::1]/m", None),
        ("file:///mnt/a%20b/", "file:///mnt/a%20b", "/mnt/a b", None),
        ("file://localhost/mnt", "file:///mnt", "/mnt", None),
        ("/mnt/models/q", "/mnt/models/q", "/mnt/models/q", None),
        ("./q", "./q", "./q", None),
        ("~/q", "~/q", "~/q", None),
    ],
)
def test_what_is_written_becomes_one_canonical_url(
    text: str, url: str, location: str, revision: str | None
) -> None:
    ref = parse_ref(text)
    assert (ref.url, ref.location, ref.revision) == (url, location, revision)
    assert ref.scheme == (url.split("://")[0] if "://" in url else "path")
    if revision is None and ref.scheme not in ("path", "hf"):
        assert parse_ref(ref.url) == ref  # canonical: read again it is itself
        assert parse_ref(text, "abc").revision == "abc"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "empty"),
        ("   ", "empty"),
        ("model", "neither a URL"),
        ("a/b/c", "neither a URL"),
        ("ftp://h/m", "unknown scheme 'ftp'"),
        ("s3://", "bucket"),
        ("s3://bucket/../c", "'..'"),
        ("oss://bucket/a//b", "empty"),
        ("http:///m", "host"),
        ("http://h:port/m", "host and port"),
        ("http://h/%2e%2e/x", "'..'"),
        ("file://elsewhere/m", "no other host"),
        ("file:///", "directory"),
        ("hf://datasets/a/b", "no model"),
        ("hf://", "org/name"),
        ("hf://a/b@", "revision"),
        ("s3://bucket/\x00", "printed"),
        ("http://h/" + "x" * 5000, "longer"),
    ],
)
def test_what_cannot_be_meant_is_refused(text: str, says: str) -> None:
    with pytest.raises(ValueError) as raised:
        parse_ref(text)
    assert says in str(raised.value)


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("https://user:hunter2pass@h/m", "netrc"),
        ("s3://AKIAIOSFODNN7EXAMPLE:hunter2pass@bucket/m", "AWS_ACCESS_KEY_ID"),
        ("oss://b/m?Signature=hunter2pass", "OSS_ACCESS_KEY_ID"),
        ("https://h/m?X-Amz-Signature=hunter2pass", "netrc"),
        ("hf://a/b?token=hunter2pass", "HF_TOKEN"),
    ],
)
def test_a_url_with_a_secret_is_refused_and_the_secret_not_repeated(text: str, where: str) -> None:
    with pytest.raises(ValueError) as raised:
        parse_ref(text)
    assert "hunter2pass" not in str(raised.value)
    assert where in str(raised.value)


def test_two_revisions_that_differ_are_refused() -> None:
    assert parse_ref("hf://a/b@v1", "v1").revision == "v1"
    for text, revision in (("hf://a/b@v1", "v2"), ("hf://a/b", "../x"), ("./dir", "v1")):
        with pytest.raises(ValueError):
            parse_ref(text, revision)


@pytest.mark.parametrize(
    "text",
    [
        "GET https://user:hunter2pass@host/m failed",
        "https://bucket.s3.amazonaws.com/k?X-Amz-Credential=a&X-Amz-Signature=hunter2pass",
        "http://127.0.0.1:1/k?OSSAccessKeyId=a&Signature=hunter2pass refused",
        "url: /bucket/key?Expires=1&Signature=hunter2pass (Caused by …)",
        "Authorization: Bearer hunter2pass",
        "{'Authorization': 'OSS LTAIabcdefgh:hunter2pass', 'Date': 'x'}",
        "sent Bearer hunter2pass to",
        "OSS_ACCESS_KEY_SECRET=hunter2pass",
        "<AWSAccessKeyId>hunter2pass</AWSAccessKeyId>",
        '{"access_token": "hunter2pass"}',
        "token hf_hunter2pass is no good",
    ],
)
def test_redact_leaves_no_secret(text: str) -> None:
    assert "hunter2pass" not in redact(text)


def test_redact_knows_given_secrets_anywhere_and_leaves_the_rest() -> None:
    assert redact("a s3cr/t in the middle, s3cr%2Ft too", ["s3cr/t"]) == (
        "a … in the middle, … too"
    )
    harmless = "oss://models/qwen/config.json: 404, asked 3 times at http://host/x"
    assert redact(harmless, ["", "x"]) == harmless


@pytest.mark.parametrize(
    ("path", "fine"),
    [
        ("config.json", True),
        ("a/b/c.safetensors", True),
        ("", False),
        ("/etc/passwd", False),
        ("../up", False),
        ("a/../b", False),
        ("a//b", False),
        ("a/./b", False),
        ("a\\b", False),
        ("a\nb", False),
        ("x" * 256, False),
        ("d/" * 600 + "f", False),
    ],
)
def test_a_listed_path_stays_below_its_model(path: str, fine: bool) -> None:
    assert check_file_path(path) is fine


@pytest.mark.parametrize(
    ("prefix", "url", "expected"),
    [
        ("s3://b", "s3://b", True),
        ("s3://b/", "s3://b/m", True),
        ("s3://b", "s3://bb", False),
        ("http://", "https://x", False),
    ],
)
def test_a_prefix_ends_at_a_slash(prefix: str, url: str, expected: bool) -> None:
    assert is_below(url, prefix) is expected
