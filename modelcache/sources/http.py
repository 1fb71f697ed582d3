"""Models behind plain HTTP: a directory that the server lists, one whose files have the usual
names, or a single file. Credentials come from ``~/.netrc``."""

from __future__ import annotations

import base64
import dataclasses
import html
import json
import netrc
import os
import re
from collections.abc import Mapping, Sequence
from urllib.parse import quote, unquote, urljoin, urlsplit

from modelcache.ports import ONCE, Retries
from modelcache.refs import SCHEMES, find_path_problem
from modelcache.safetensors_index import BadFile, parse_weight_map
from modelcache.sources import answers, wire
from modelcache.sources.proxy import proxy_of
from modelcache.sources.reader import HttpReader, HttpRequest, RangedSource, ask_each, home_of
from modelcache.types import DIGEST, Listing, ModelRef, NotFound, RemoteFile, SourceError

MOST_SHARDS = 4_096
_LINK = re.compile(
    r"""<a\s[^<>]*?\bhref\s*=\s*(?:"([^"<>]*)"|'([^'<>]*)'|([^\s"'<>]+))""", re.IGNORECASE
)
MOST_DEPTH = 5
MOST_FOLDERS = 200
HINT = SCHEMES["http"].credentials


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


class HttpSource(RangedSource):
    """One model on a web server."""

    def __init__(self, ref: ModelRef, reader: HttpReader, environ: Mapping[str, str]) -> None:
        super().__init__(ref, reader)
        self._headers = netrc_headers(ref, environ)
        self._single = False

    def list(self, retries: Retries = ONCE) -> Listing:
        """See ``Source.list``."""
        url = self.ref.url
        _, host, port = wire.origin_of(url)
        if wire.find_reach(host, port, resolve=proxy_of(url, self.reader.environ) is None) == 0:
            raise SourceError(f"{url}: that is a cloud's metadata service, no store of models")
        if not url.endswith("/"):
            single = self._stat_single(url, retries)
            if single is not None:
                self._single = True
                return self.probed(answers.make_listing(self.ref, [single]), retries)
            url += "/"
        self._single = False
        found = self._walk(url, retries)
        files = self._stat_all(url, found, retries) if found else self._usual(url, retries)
        files = self._with_checksums(url, files, retries)
        return self.probed(answers.make_listing(self.ref, files), retries)

    def request_of(self, file: RemoteFile) -> HttpRequest:
        """See ``RangedSource.request_of``."""
        if self._single or self.ref.url.rpartition("/")[2] == quote(file.path):
            return self._request(self.ref.url)
        return self._request(f"{self.ref.url.rstrip('/')}/{quote(file.path)}")

    def _request(self, url: str) -> HttpRequest:
        return HttpRequest(
            url=url, shown=url, hint=HINT, headers=self._headers, signed=bool(self._headers)
        )

    def _stat_single(self, url: str, retries: Retries) -> RemoteFile | None:
        """The file that ``url`` is, or ``None`` where it looks like a directory."""
        try:
            head = self.reader.head(self._request(url), retries)
        except SourceError as error:
            if error.retryable:
                raise
            return None  # also after 403, which many servers answer to a directory
        if "html" in head.headers.get("content-type", ""):
            return None
        return _file_of(head, unquote(url.rpartition("/")[2]), url)

    def _walk(self, url: str, retries: Retries) -> Sequence[str]:
        """URLs of all files that the server lists below ``url``; none where it lists nothing."""
        files = dict[str, None]()
        folders, seen = [(url, 0)], 0
        while folders:
            folder, depth = folders.pop()
            seen += 1
            if depth > MOST_DEPTH or seen > MOST_FOLDERS:
                raise SourceError(f"{url}: too many folders within each other; is it one model?")
            try:
                head, page = self.reader.page(self._request(folder), retries)
            except NotFound:
                links = None
            except SourceError as error:
                if error.retryable or depth:
                    raise
                links = None  # 403 again: it lists nothing, and may have the usual files
            else:
                links = read_index(folder, head.headers.get("content-type", ""), page)
            for link in links or ():
                if link.endswith("/"):
                    folders.append((link, depth + 1))
                else:
                    files[link] = None
        return tuple(files)

    def _stat_all(self, base: str, links: Sequence[str], retries: Retries) -> Sequence[RemoteFile]:
        """The files behind links of listings; those that turn out to be folders are left out."""

        def stat(link: str) -> RemoteFile | None:
            head = self.reader.head(self._request(link), retries)
            if head.url != link and urlsplit(head.url).path.endswith("/"):
                return None
            return _file_of(head, unquote(link.removeprefix(base)), link)

        return [file for file in ask_each(stat, links) if file is not None]

    def _usual(self, url: str, retries: Retries) -> Sequence[RemoteFile]:
        """Files by their usual names, and the shards that an index of weights names."""
        files = self._stat_there(url, USUAL_FILES, retries)
        if any(file.path == SHARDS_FILE for file in files):
            _, page = self.reader.page(self._request(url + SHARDS_FILE), retries)
            try:
                names = sorted(set(parse_weight_map(page).values()))
            except BadFile as error:
                raise SourceError(f"{url}{SHARDS_FILE}: {error.message}") from None
            if len(names) > MOST_SHARDS:
                raise SourceError(f"{url}{SHARDS_FILE}: it names {len(names):,} files")
            problem = find_path_problem(names)
            if problem is not None:
                raise SourceError(f"{url}{SHARDS_FILE}: the index {problem}")
            links = [url + quote(name) for name in names]
            files = [*files, *self._stat_all(url, links, retries)]
        if not any(file.path.endswith(".safetensors") for file in files):
            raise NotFound(
                f"{url}: the server lists no files there, and there is no model.safetensors "
                f"and no {SHARDS_FILE}"
            )
        return files

    def _stat_there(self, url: str, names: Sequence[str], retries: Retries) -> Sequence[RemoteFile]:
        def stat(name: str) -> RemoteFile | None:
            try:
                head = self.reader.head(self._request(url + name), retries)
            except NotFound:
                return None
            return _file_of(head, name, url + name)

        return [file for file in ask_each(stat, names) if file is not None]

    def _with_checksums(
        self, url: str, files: Sequence[RemoteFile], retries: Retries
    ) -> Sequence[RemoteFile]:
        """The files, with SHA-256s where a file of checksums lies beside them."""
        there = {file.path for file in files} & set(CHECKSUM_FILES)
        known: dict[str, str] = {}
        for name in sorted(there):
            _, page = self.reader.page(self._request(url + name), retries)
            known.update(read_checksums(page))
        return [
            dataclasses.replace(file, digests={"sha256": known[file.path]})
            if file.path in known
            else file
            for file in files
        ]


def _file_of(head: answers.SourceResponse, path: str, url: str) -> RemoteFile:
    if head.length is None or head.headers.get("content-encoding"):
        raise SourceError(f"{url}: the server does not say how long it is")
    return RemoteFile(path=path, size_bytes=head.length, version=answers.version_of(head.headers))


def netrc_headers(ref: ModelRef, environ: Mapping[str, str]) -> dict[str, str]:
    """The ``Authorization`` that netrc has for the host of a URL; nothing where it has none."""
    path = environ.get("NETRC") or os.path.join(home_of(environ), ".netrc")
    host = urlsplit(ref.url).hostname or ""
    try:
        found = netrc.netrc(path).authenticators(host)
    except FileNotFoundError:
        return {}
    except (OSError, netrc.NetrcParseError, UnicodeDecodeError) as error:
        # The text of a parse error may quote the line with the password.
        raise SourceError(f"{path} cannot be read ({type(error).__name__})") from None
    if found is None:
        return {}
    pair = f"{found[0]}:{found[2]}".encode()
    return {"Authorization": f"Basic {base64.b64encode(pair).decode()}"}


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
    found = (_join(url, name) for name in names)
    return list(dict.fromkeys(link for link in found if _is_child(url, link)))


def _join(url: str, name: str) -> str:
    try:
        return urljoin(url, name)
    except ValueError:
        return ""


def _read_json(text: str) -> list[str] | None:
    try:
        entries = json.loads(text)
        return [
            "./" + quote(entry["name"]) + ("/" if entry["type"] == "directory" else "")
            for entry in entries
        ]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None


def _read_html(text: str) -> list[str]:
    """The targets of links. By a pattern in linear time: the library's parser takes minutes for a
    page that is made for it."""
    found = (one[1] or one[2] or one[3] or "" for one in _LINK.finditer(text))
    return [html.unescape(link.strip()).partition("#")[0] for link in found]


def _is_child(url: str, link: str) -> bool:
    """Directly below ``url`` on the same server: no parent, no sorted view, no other site."""
    try:
        base, child = urlsplit(url), urlsplit(link)
    except ValueError:
        return False
    if (base.scheme, base.netloc) != (child.scheme, child.netloc) or child.query:
        return False
    if not child.path.startswith(base.path):
        return False
    name = child.path.removeprefix(base.path).removesuffix("/")
    return bool(name) and "/" not in name and unquote(name) not in (".", "..")


def read_checksums(page: bytes) -> Mapping[str, str]:
    """``sha256sum``'s format: path to SHA-256. Lines that are something else are passed over."""
    found = {}
    for line in page.decode("utf-8", "replace").splitlines():
        digest, _, path = line.strip().partition(" ")
        digest, path = digest.lower(), path.strip().removeprefix("*").removeprefix("./")
        if DIGEST.fullmatch(digest) and path:
            found[path] = digest
    return found
