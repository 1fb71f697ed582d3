"""Which proxy a URL is asked over, and which hosts are asked directly."""

from __future__ import annotations

import pytest

from modelcache.sources.proxy import is_direct, proxy_of
from modelcache.types import SourceError


@pytest.mark.parametrize(
    ("url", "environ", "proxy"),
    [
        ("http://a.example/x", {"HTTP_PROXY": "http://p:1"}, "http://p:1"),
        ("http://a.example/x", {"http_proxy": "http://p:1"}, "http://p:1"),
        ("http://a.example/x", {"HTTP_PROXY": "http://p:1", "http_proxy": "http://q:2"},
         "http://q:2"),
        ("https://a.example/x", {"HTTP_PROXY": "http://p:1"}, None),
        ("https://a.example/x", {"https_proxy": "http://p:1"}, "http://p:1"),
        ("https://a.example/x", {"ALL_PROXY": "http://p:1"}, "http://p:1"),
        ("https://a.example/x", {"all_proxy": "socks5://p:1"}, "socks5://p:1"),
        ("https://a.example/x", {"ALL_PROXY": "http://p:1", "HTTPS_PROXY": "http://q:2"},
         "http://q:2"),
        ("http://a.example/x", {"HTTP_PROXY": "p:3128"}, "http://p:3128"),
        ("http://a.example/x", {"HTTP_PROXY": " "}, None),
        ("http://a.example:8080/x", {"HTTP_PROXY": "http://p:1", "no_proxy": "a.example:8080"},
         None),
        ("https://a.example/x", {"ALL_PROXY": "http://p:1", "NO_PROXY": "a.example:443"}, None),
        ("http://127.0.0.1:9/x", {"HTTP_PROXY": "http://p:1"}, None),
        ("http://[::1]:9/x", {"ALL_PROXY": "http://p:1"}, None),
        ("http://169.254.169.254/x", {"ALL_PROXY": "http://p:1"}, None),
    ],
)  # fmt: skip
def test_the_proxy_of_a_url(url: str, environ: dict[str, str], proxy: str | None) -> None:
    assert proxy_of(url, environ) == proxy


@pytest.mark.parametrize("value", ["ftp://u:secret@p:1", "http://", "http://u:secret@p:x"])
def test_a_proxy_that_is_none_is_named_and_not_shown(value: str) -> None:
    with pytest.raises(SourceError, match="https_proxy") as raised:
        proxy_of("https://a.example", {"https_proxy": value})
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize(
    ("host", "no_proxy", "direct"),
    [
        ("store.intern", ".intern", True),
        ("store.intern", "intern", True),
        ("store.intern", "*.intern", True),
        ("STORE.Intern", "Intern", True),
        ("intern", ".intern", True),
        ("storeintern", "intern", False),
        ("store.intern", "intern:443", True),
        ("store.intern", "intern:8080", False),
        ("store.intern", "a, store.intern", True),
        ("store.intern", "a store.intern b", True),
        ("a", "b, *", True),
        ("a", "", False),
        ("a", ",,.", False),
        ("10.1.2.3", "10.0.0.0/8", True),
        ("10.1.2.3", "10.1.2.3", True),
        ("10.1.2.3", "10.1.2.3:443", True),
        ("10.1.2.3", "10.1.2.3:80", False),
        ("11.1.2.3", "10.0.0.0/8", False),
        ("10.1.2.3", "2.3", False),
        ("fd00::7", "fd00::/8", True),
        ("fd00::7", "[fd00::7]:443", True),
        ("fd00::7", "fd00:0::7", True),
        ("::ffff:10.1.2.3", "10.0.0.0/8", True),
        ("a", "10.0.0.0/33", False),
        ("localhost", "", True),
        ("x.localhost", "", True),
        ("127.8.8.8", "", True),
        ("fe80::1", "", True),
    ],
)
def test_which_hosts_are_asked_directly(host: str, no_proxy: str, direct: bool) -> None:
    assert is_direct(host, 443, no_proxy) is direct
