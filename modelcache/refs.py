"""Where a model comes from, read from what users write, and shown without secrets.

    hf://Qwen/Qwen3-32B            hf://org/name@revision      hf://org/name@v1/gguf
    Qwen/Qwen3-32B                 the same, as vLLM takes it
    oss://bucket/models/qwen       oss://bucket.oss-cn-hangzhou.aliyuncs.com/models/qwen
    s3://bucket/prefix             gs://bucket/prefix
    https://host/models/qwen/      a listed directory, or one file
    file:///mnt/models/qwen        copied (linked where possible) into the cache
    /mnt/models/qwen, ./qwen       used where it lies

Credentials never belong in a URL: it is shown, logged and stored. Each source's usual places hold
them instead, and a URL with any is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import quote, unquote, urlsplit

from modelcache.types import ModelRef


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheme:
    """What is particular to one scheme of model URLs.

    ``credentials`` says where its credentials belong. ``client`` is the module that has to be
    installed to read it, empty where none has. The URLs of an ``object_store`` are
    ``scheme://bucket/prefix``.
    """

    credentials: str = ""
    client: str = ""
    object_store: bool = False


SCHEMES: Mapping[str, Scheme] = {
    "file": Scheme(),
    "gs": Scheme(
        credentials="GOOGLE_APPLICATION_CREDENTIALS, `gcloud auth application-default login`, or "
        "the machine's service account",
        client="obstore",
        object_store=True,
    ),
    "hf": Scheme(credentials="HF_TOKEN, or `hf auth login`"),
    "http": Scheme(credentials="~/.netrc (or the file that NETRC names)"),
    "https": Scheme(credentials="~/.netrc (or the file that NETRC names)"),
    "oss": Scheme(
        credentials="OSS_ACCESS_KEY_ID and OSS_ACCESS_KEY_SECRET (and OSS_SESSION_TOKEN), or "
        "~/.ossutilconfig",
        client="ossfs",
        object_store=True,
    ),
    "s3": Scheme(
        credentials="AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile in ~/.aws, or the "
        "instance's role",
        client="obstore",
        object_store=True,
    ),
}
"""All schemes; a new one also gets its source class in ``sources.opening``."""

PATH = "path"
"""The scheme of a plain path: a directory that is used where it lies."""

MOST_CHARACTERS = 4_096

_SCHEME = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]*)://(.*)$", re.DOTALL)
_HUB_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]{0,95}$")
_REVISION = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._/+-]{0,254}$")
_BUCKET = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]{1,221}[A-Za-z0-9]$")
_HUB_HOSTS = ("huggingface.co", "www.huggingface.co", "hf.co")
_DEFAULT_PORTS = {"http": 80, "https": 443}


def parse_ref(text: str, revision: str | None = None) -> ModelRef:
    """Read a model's URL, a hub's ``org/name`` or a plain path.

    ``revision`` may be in the URL too where it is a hub's; both must agree. A plain path gets the
    scheme ``path``: the caller, which has a file system, decides what it is relative to, and
    whether a directory called ``org/name`` is meant before the hub. Raises ``ValueError`` that says
    what is wrong, without repeating a secret.
    """
    text = text.strip()
    _check_text(text, revision)
    found = _SCHEME.match(text)
    if found is None:
        return _parse_plain(text, revision)
    scheme, rest = found[1].lower(), found[2]
    if scheme not in SCHEMES:
        raise ValueError(f"model URL: unknown scheme {scheme!r}; known: {', '.join(SCHEMES)}")
    if scheme == "file":
        return _parse_file(rest, revision)
    _refuse_secrets(scheme, rest)
    if scheme == "hf":
        return _parse_hub(rest, revision)
    if SCHEMES[scheme].object_store:
        return _parse_bucket(scheme, rest, revision)
    return _parse_http(scheme, rest, revision)


def _check_text(text: str, revision: str | None) -> None:
    if not text:
        raise ValueError("model URL: it is empty")
    if len(text) > MOST_CHARACTERS:
        raise ValueError(f"model URL: longer than {MOST_CHARACTERS} characters")
    if not text.isprintable():
        raise ValueError("model URL: it has characters that cannot be printed")
    if revision is not None:
        _check_revision(revision)


def _check_revision(revision: str) -> None:
    if not _REVISION.match(revision) or ".." in revision or "//" in revision:
        raise ValueError(
            f"model revision {revision!r}: letters, digits and . _ / + - only, at most 255"
        )


def _refuse_secrets(scheme: str, rest: str) -> None:
    """A user, a password, a token, a signed query: refused, and not repeated."""
    authority = rest.partition("/")[0]
    where = SCHEMES[scheme].credentials
    if "@" in authority and scheme != "hf":
        raise ValueError(
            f"model URL: a {scheme} URL carries no user or password, for it is shown; put them "
            f"into {where}"
        )
    if "?" in rest or "#" in rest:
        raise ValueError(
            f"model URL: a {scheme} URL has no ? or # part (a signed query is a secret, and is "
            f"shown); credentials go into {where}"
        )


def _parse_plain(text: str, revision: str | None) -> ModelRef:
    looks_like_path = text.startswith(("/", "./", "../", "~")) or text in (".", "..")
    if not looks_like_path:
        name, at, wanted = text.partition("@")
        parts = name.split("/")
        if len(parts) == 2 and all(map(_HUB_NAME.match, parts)):
            return _parse_hub(name + at + wanted, revision)
        raise ValueError(
            f"model {redact(text)!r}: neither a URL ({'://, '.join(SCHEMES)}://), nor org/name of "
            "a hub, nor a path that begins with / or ./"
        )
    if revision is not None:
        raise ValueError(f"model {text!r}: a directory has no revisions; got {revision!r}")
    return ModelRef(url=text, scheme=PATH, location=text)


def _parse_file(rest: str, revision: str | None) -> ModelRef:
    host, _, path = rest.partition("/")
    if host not in ("", "localhost"):
        raise ValueError("model URL: file:// names no other host: file:///directory is wanted")
    location = "/" + unquote(path).strip("/")
    if "\0" in location or location == "/":
        raise ValueError("model URL: file:///directory is wanted")
    _segments(location.strip("/"), "file")
    return ModelRef(
        url=f"file://{quote(location)}", scheme="file", location=location, revision=revision
    )


def _parse_hub(rest: str, revision: str | None) -> ModelRef:
    rest = rest.strip("/")
    name, at, tail = rest.partition("@")
    folder: list[str] = []
    if at:
        wanted, folder = _split_revision(tail)
        if revision is not None and revision != wanted:
            raise ValueError(f"model URL: it says revision {wanted!r}, the other is {revision!r}")
        revision = wanted
    parts = name.split("/")
    if parts[0] in ("datasets", "spaces"):
        raise ValueError(f"model URL: hf://{parts[0]}/… is no model")
    owner, folder = parts[:2], [*parts[2:], *folder]
    if not all(map(_HUB_NAME.match, owner)):
        raise ValueError("model URL: hf://org/name[@revision][/folder] is wanted")
    location = "/".join(owner + _segments("/".join(folder), "hf"))
    return ModelRef(url=f"hf://{location}", scheme="hf", location=location, revision=revision)


def _split_revision(tail: str) -> tuple[str, list[str]]:
    """``v1/folder`` to both; a revision with a slash is written ``%2F``, or is ``refs/pr/1``."""
    parts = tail.split("/")
    taken = 3 if parts[:2] in (["refs", "pr"], ["refs", "convert"]) else 1
    revision = unquote("/".join(parts[:taken]))
    _check_revision(revision)
    return revision, parts[taken:]


def _parse_bucket(scheme: str, rest: str, revision: str | None) -> ModelRef:
    bucket, _, key = rest.partition("/")
    if not _BUCKET.match(bucket):
        raise ValueError(f"model URL: {scheme}://bucket/prefix is wanted, got bucket {bucket!r}")
    location = "/".join([bucket, *_segments(key.strip("/"), scheme)])
    return ModelRef(
        url=f"{scheme}://{location}", scheme=scheme, location=location, revision=revision
    )


def _parse_http(scheme: str, rest: str, revision: str | None) -> ModelRef:
    authority, _, path = rest.partition("/")
    try:
        parts = urlsplit(f"{scheme}://{authority}")
        port = parts.port
    except ValueError:
        raise ValueError(f"model URL: {authority!r} is no host and port") from None
    host = parts.hostname
    if not host or any(c.isspace() for c in authority):
        raise ValueError(f"model URL: {scheme}://host/path is wanted")
    if host in _HUB_HOSTS:
        return _parse_hub_page(path, revision)
    shown = f"[{host}]" if ":" in host else host
    if port is not None and port != _DEFAULT_PORTS[scheme]:
        shown += f":{port}"
    segments = _segments(unquote(path).strip("/"), scheme)
    location = "/".join([shown, *(quote(part) for part in segments)])
    if path.endswith("/") or not segments:
        location += "/"
    return ModelRef(
        url=f"{scheme}://{location}", scheme=scheme, location=location, revision=revision
    )


def _parse_hub_page(path: str, revision: str | None) -> ModelRef:
    """The page of a model on the hub, as copied from a browser: the hub's model is meant."""
    parts = path.strip("/").split("/")
    if len(parts) > 3 and parts[2] in ("tree", "blob", "resolve"):
        return _parse_hub(f"{parts[0]}/{parts[1]}@{'/'.join(parts[3:])}", revision)
    return _parse_hub("/".join(parts), revision)


def _segments(path: str, scheme: str) -> list[str]:
    """The parts of a path, none of them empty or leading elsewhere."""
    if not path:
        return []
    parts = path.split("/")
    if any(part in ("", ".", "..") or "\\" in part or "\0" in part for part in parts):
        raise ValueError(f"model URL: a {scheme} path has no empty, '.' or '..' part: {path!r}")
    return parts


def is_below(url: str, beginning: str) -> bool:
    """Whether ``url`` is ``beginning`` or below it: ``s3://models`` is not ``s3://models-2``."""
    top = beginning.rstrip("/")
    if beginning.endswith("://"):
        return url.startswith(beginning)
    return url == top or url.startswith(f"{top}/")


def find_path_problem(paths: Sequence[str]) -> str | None:
    """What keeps these files from becoming a directory: a path that leads elsewhere or comes twice,
    a file where another wants a directory; ``None`` if nothing does."""
    known = set(paths)
    if len(known) != len(paths):
        return "lists a file twice"
    for path in paths:
        if not check_file_path(path):
            return f"lists a file called {path[:200]!r}"
        folder = path.rpartition("/")[0]
        while folder:
            if folder in known:
                return f"says that {folder} is a file and a directory"
            folder = folder.rpartition("/")[0]
    return None


def check_file_path(path: str) -> bool:
    """Whether a path that a source lists may become a file below a model's directory."""
    parts = path.split("/")
    return (
        0 < len(path) <= 1_024
        and path.isprintable()
        and not any(part in ("", ".", "..") or len(part.encode()) > 255 for part in parts)
        and "\\" not in path
    )


SECRET_NAME = re.compile(
    r"authorization|token(?![a-z]|[_-]ids?\b|[_-](budget|threshold|limit|count))|secret"
    r"|pass(?=$|[_-]?(word|wd|phrase))|pwd|(api|access|private|auth)[_-]?key|credential|signature",
    re.IGNORECASE,
)
"""What the names of environment variables, flags and headers have in them that carry secrets."""

_SECRETS = (
    # user:password@ of a URL
    (re.compile(r"(\b\w+://)[^\s/@'\"]+@"), r"\1…@"),
    # the same where the URL is not written well
    (re.compile(r"(?<![^\s/'\"(=,])[^\s/@:'\"]++:[^\s/@'\"]++@"), "…@"),
    # everything after the ? of a URL: signatures are there
    (re.compile(r"(\b\w+://[^\s?'\"<>]*)\?[^\s'\"<>]+"), r"\1?…"),
    # a path with a signed query, as HTTP libraries quote it
    (re.compile(
        r"(?<![^\s'\"<>(,])(/[^\s?'\"<>]*+)\?[^\s'\"<>]*(?i:signature|token|credential)="
        r"[^\s'\"<>]*"
    ), r"\1?…"),
    (re.compile(r"(?i)\b(bearer|basic|OSS|AWS|AWS4-HMAC-SHA256)\s+[A-Za-z0-9+/=_.:~-]{8,}"),
     r"\1 …"),
    (re.compile(r"(?i)(authorization['\"]?\s*[:=]\s*)[^\r\n,}]+"), r"\1…"),
    (re.compile(
        r"(?i)((?:secret|password|passwd|token(?!s|iz|[_-]id)|signature|credential|api[_-]?key"
        r"|access_?key(?:_?id)?)[\w-]*['\"]?\s*[:=>]\s*[\[('\"]*)[^\s'\"<>&,})\]]+"
    ), r"\1…"),
    (re.compile(r"\b(?:hf_[A-Za-z0-9]{8,}|(?:AKIA|ASIA)[A-Z0-9]{12,}|LTAI[A-Za-z0-9]{8,}"
                r"|sk-[A-Za-z0-9_-]{16,})"), "…"),
)  # fmt: skip


def redact(text: str, secrets: Iterable[str] = ()) -> str:
    """``text`` without what must not be shown: users and queries of URLs, tokens, signatures, keys,
    and every one of ``secrets`` wherever it stands."""
    for secret in secrets:
        if len(secret) >= 4:
            text = text.replace(secret, "…").replace(quote(secret, safe=""), "…")
    for pattern, shown in _SECRETS:
        text = pattern.sub(shown, text)
    return text


def secret_arguments(arguments: Sequence[str]) -> Iterator[str]:
    """The values of a command line's flags whose names say that they are secret: of ``--api-key X``
    and of ``--api-key=X``, and what follows until the next flag."""
    secret = False
    for one in arguments:
        if one.startswith("-"):
            flag, equals, value = one.partition("=")
            secret = bool(SECRET_NAME.search(flag))
            if secret and equals:
                yield value
        elif secret:
            yield one
