"""What a web server shows of a directory: nginx's JSON, or any page of links. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping
from html.parser import HTMLParser
from urllib.parse import quote, unquote, urljoin, urlsplit

CHECKSUM_FILES = ("SHA256SUMS", "sha256sum.txt", "checksums.sha256")

USUAL_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "processor_config.json",
    "params.json",
    "tekken.json",
    "SHA256SUMS",
)
"""What a model may consist of, asked for by name where a directory is not listed."""

SHARDS_FILE = "model.safetensors.index.json"


class _Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "a":
            self.found += [value for name, value in attrs if name == "href" and value]


def read_index(url: str, content_type: str, page: bytes) -> list[str] | None:
    """URLs directly below the directory ``url`` (which ends with ``/``); those of directories end
    with ``/`` too. ``None`` where the page is no listing."""
    text = page.decode("utf-8", "replace")
    if "json" in content_type:
        names = _read_json(text)
    elif "html" in content_type:
        names = _read_html(text)
    else:
        return None
    if names is None:
        return None
    found = (urljoin(url, name) for name in names)
    return list(dict.fromkeys(link for link in found if _is_child(url, link)))


def _read_json(text: str) -> list[str] | None:
    try:
        entries = json.loads(text)
        return [
            "./" + quote(entry["name"]) + ("/" if entry["type"] == "directory" else "")
            for entry in entries
        ]
    except (ValueError, TypeError, KeyError):
        return None


def _read_html(text: str) -> list[str]:
    links = _Links()
    links.feed(text)
    return [link.partition("#")[0] for link in links.found]


def _is_child(url: str, link: str) -> bool:
    """Directly below ``url`` on the same server: no parent, no sorted view, no other site."""
    base, child = urlsplit(url), urlsplit(link)
    if (base.scheme, base.netloc) != (child.scheme, child.netloc) or child.query:
        return False
    if not child.path.startswith(base.path):
        return False
    name = child.path.removeprefix(base.path).removesuffix("/")
    return bool(name) and "/" not in name and unquote(name) not in (".", "..")


def read_shards(page: bytes) -> list[str]:
    """Names of the files that a checkpoint's index refers to; none where it is no index."""
    try:
        return sorted({str(name) for name in json.loads(page)["weight_map"].values()})
    except (ValueError, TypeError, KeyError, AttributeError):
        return []


def read_checksums(page: bytes) -> Mapping[str, str]:
    """``sha256sum``'s format: path to SHA-256. Lines that are something else are passed over."""
    found = {}
    for line in page.decode("utf-8", "replace").splitlines():
        digest, _, path = line.strip().partition(" ")
        digest, path = digest.lower(), path.strip().removeprefix("*").removeprefix("./")
        if len(digest) == 64 and not set(digest) - set("0123456789abcdef") and path:
            found[path] = digest
    return found
