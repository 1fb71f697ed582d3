"""What nodes say to each other: HTTP/1.1 heads, and how they are signed. No I/O, no clock.

All nodes of a cluster share a secret. A request's head is signed over its method, target, sender,
addressee, moment, a number used once, and its body's length and digest, so that no byte of a body
is taken from a client without the secret; an answer over the request's number, its status, length
and the BLAKE3 of its body. So a node without the secret can neither ask nor answer, nor change
what was answered, nor use a request again, here or at another node. Bytes travel unencrypted:
where that matters, put TLS in front and give ``https://`` URLs.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from modelcache.sources.answers import SourceResponse
from modelcache.types import DIGEST, CacheError

LEAST_TOKEN_CHARACTERS = 16
MOST_HEAD_BYTES = 16_384
MOST_BODY_BYTES = 8 * 1024 * 1024
"""Of a request, and of an answer that is not a piece."""

WINDOW_S = 120.0
"""Seconds by which a request's moment may differ from the receiver's clock."""

MOST_NONCES = 65_536
HELLO = "/v1/hello"
STATE = "/v1/state"
PIECE = "/v1/piece"
NAME = re.compile(r"[0-9a-f]{32}")
BITS = re.compile(r"[0-9a-f]+")
MOST_NUMBER = 2**63 - 1
NEWLINE = "\n"


class BadMessage(CacheError):
    """A head or a body that is not what peers say to each other."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PieceState:
    """What a node has of one file. ``has`` (it may be asked for them) and ``fetching`` (it reads
    them from the source now) are sets of pieces as bits; ``active`` while it fetches the file at
    all, and so may own pieces of it."""

    has: int = 0
    fetching: int = 0
    active: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerHead:
    """A request's first line, and its headers with lower-case names."""

    first: str
    second: str
    headers: Mapping[str, str]

    @property
    def length(self) -> int:
        """Bytes of the body. Raises ``BadMessage`` unless it says so in digits."""
        text = self.headers.get("content-length", "0")
        if not (text.isascii() and text.isdigit() and len(text) < 16):
            raise BadMessage("a body whose length is not said")
        return int(text)


def parse_head(data: bytes) -> PeerHead:
    """Parse a head without its empty line. Raises ``BadMessage``."""
    lines = data.decode("latin-1").split("\r\n")
    parts = lines[0].split(" ")
    if len(parts) < 3:
        raise BadMessage("a first line that is not HTTP")
    headers: dict[str, str] = {}
    for line in lines[1:]:
        name, colon, value = line.partition(":")
        key = name.lower()
        if not colon or key in headers or not name or name != name.strip():
            raise BadMessage("a header that is none, or twice")
        headers[key] = value.strip()
    if "transfer-encoding" in headers:
        raise BadMessage("a body in chunks")
    return PeerHead(first=parts[0], second=parts[1], headers=headers)


def format_head(first_line: str, headers: Mapping[str, str]) -> bytes:
    """The bytes of a head, with its empty line."""
    lines = [first_line, *(f"{name}: {value}" for name, value in headers.items()), "", ""]
    return "\r\n".join(lines).encode("latin-1")


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerRequest:
    """Sender, addressee and target of a request. ``to`` is empty where the asker does not know the
    name yet."""

    method: str
    target: str
    sender: str
    to: str
    at_ms: int
    nonce: str
    body: bytes = b""


def with_body(request: PeerRequest, head: PeerHead, body: bytes) -> PeerRequest | None:
    """The request whose ``head`` ``Keyring.read_head`` has found to be signed, with its body;
    ``None`` where it is another body than was signed."""
    digest = hashlib.sha256(body).hexdigest()
    return replace(request, body=body) if digest == head.headers["x-tidegate-body"] else None


def read_json(data: bytes | bytearray) -> dict[str, Any]:
    """The JSON object that a body is. Its numbers may be any, ``NaN`` too, until ``read_int`` or
    ``read_seconds`` has read them. Raises ``BadMessage``."""
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        raise BadMessage("a body that is no JSON") from None
    if not isinstance(found, dict):
        raise BadMessage("a body that is no JSON object")
    return found


def read_int(value: object) -> int:
    """A whole number that is not negative and that others can count with. Raises ``BadMessage``."""
    if type(value) is not int or not 0 <= value <= MOST_NUMBER:
        raise BadMessage("a number that is none")
    return value


def read_seconds(value: object) -> float:
    """A time that is not negative. Raises ``BadMessage``."""
    if type(value) not in (int, float) or not 0 <= value <= MOST_NUMBER:  # type: ignore[operator]
        raise BadMessage("a time that is none")
    return float(value)  # type: ignore[arg-type]


def read_text(value: object, most: int = 500) -> str:
    """Text that can be shown, at most so much of it. Raises ``BadMessage``."""
    if not isinstance(value, str):
        raise BadMessage("a text that is none")
    return "".join(letter if letter.isprintable() else " " for letter in value[:most])


def read_state(given: object) -> PieceState:
    """What a node has of a file. Raises ``BadMessage``."""
    if not isinstance(given, dict):
        raise BadMessage("a state that is none")
    has, fetching = given.get("has"), given.get("fetching")
    if not all(isinstance(bits, str) and BITS.fullmatch(bits) for bits in (has, fetching)):
        raise BadMessage("pieces that are none")
    return PieceState(
        has=int(str(has), 16),
        fetching=int(str(fetching), 16),
        active=given.get("active") is True,
    )


def read_token(environ: Mapping[str, str], name: str) -> str:
    """The cluster's secret from the environment variable ``name``; empty where it is not set.
    Raises ``ValueError`` where it is too short."""
    token = environ.get(name, "")
    if 0 < len(token) < LEAST_TOKEN_CHARACTERS:
        raise ValueError(f"{name} must have {LEAST_TOKEN_CHARACTERS} characters or more")
    return token


class Keyring:
    """Signs and checks with the cluster's secret, which it does not show."""

    def __init__(self, token: str) -> None:
        if len(token) < LEAST_TOKEN_CHARACTERS:
            raise ValueError(f"a token must have {LEAST_TOKEN_CHARACTERS} characters or more")
        self._key = hashlib.sha256(b"tidegate-peers-2\0" + token.encode()).digest()

    def __repr__(self) -> str:
        return "Keyring(...)"

    def _sign(self, *parts: object) -> str:
        text = NEWLINE.join(str(part) for part in parts).encode()
        return hmac.new(self._key, text, hashlib.sha256).hexdigest()

    def _of_request(self, request: PeerRequest, length: int, digest: str) -> str:
        return self._sign("ask", request.method, request.target, request.sender, request.to,
                          request.at_ms, request.nonce, length, digest)  # fmt: skip

    def request_headers(self, request: PeerRequest, host: str) -> dict[str, str]:
        """The headers of a request, signature and all."""
        length, digest = len(request.body), hashlib.sha256(request.body).hexdigest()
        return {
            "host": host,
            "content-length": str(length),
            "x-tidegate-body": digest,
            "x-tidegate-from": request.sender,
            "x-tidegate-to": request.to,
            "x-tidegate-at": str(request.at_ms),
            "x-tidegate-nonce": request.nonce,
            "x-tidegate-signature": self._of_request(request, length, digest),
        }

    def read_head(self, head: PeerHead) -> PeerRequest | None:
        """The request that a head begins, without its body; ``None`` where the signature is not
        ours. Nothing of a request is worth reading, nor waiting for, before this."""
        given = head.headers
        at_ms, nonce = given.get("x-tidegate-at", ""), given.get("x-tidegate-nonce", "")
        digest = given.get("x-tidegate-body", "")
        if not (at_ms.isascii() and at_ms.isdigit() and len(at_ms) < 18 and NAME.fullmatch(nonce)):
            return None
        if not DIGEST.fullmatch(digest):
            return None
        request = PeerRequest(
            method=head.first,
            target=head.second,
            sender=given.get("x-tidegate-from", ""),
            to=given.get("x-tidegate-to", ""),
            at_ms=int(at_ms),
            nonce=nonce,
        )
        signature = given.get("x-tidegate-signature", "").encode("latin-1")
        wanted = self._of_request(request, head.length, digest).encode()
        return request if hmac.compare_digest(wanted, signature) else None

    def answer_headers(self, nonce: str, status: int, length: int, digest: str) -> dict[str, str]:
        """The headers of an answer to the request with ``nonce``; ``digest`` is its body's."""
        return {
            "content-length": str(length),
            "x-tidegate-digest": digest,
            "x-tidegate-signature": self._sign("answer", nonce, status, length, digest),
        }

    def check_answer(self, head: SourceResponse, nonce: str) -> str:
        """The digest that the body of an answer must have. Raises ``BadMessage`` unless it was
        made by a node with the secret, for the request with ``nonce``."""
        digest = head.headers.get("x-tidegate-digest", "")
        wanted = self._sign("answer", nonce, head.status, head.length, digest)
        given = head.headers.get("x-tidegate-signature", "").encode("latin-1")
        if not hmac.compare_digest(wanted.encode(), given):
            raise BadMessage("an answer that is not signed with the peers' token")
        return digest


@dataclass(slots=True)
class Nonces:
    """Numbers used once, remembered as long as a request with them could still be let in.

    Bounded: when it is full the oldest go, and with them every request of their time or before.
    """

    most: int = MOST_NONCES
    _seen: dict[str, int] = field(default_factory=dict)
    _floor_ms: int = 0

    def __len__(self) -> int:
        return len(self._seen)

    def admit(self, nonce: str, at_ms: int, now_ms: int) -> bool:
        """Whether this is a first use, at about the time it says."""
        window_ms = int(WINDOW_S * 1000)
        if abs(now_ms - at_ms) > window_ms or at_ms <= self._floor_ms or nonce in self._seen:
            return False
        if len(self._seen) >= self.most:
            self._forget(now_ms - window_ms)
            if at_ms <= self._floor_ms:
                return False
        self._seen[nonce] = at_ms
        return True

    def _forget(self, before_ms: int) -> None:
        kept = {nonce: at_ms for nonce, at_ms in self._seen.items() if at_ms >= before_ms}
        if len(kept) > self.most // 2:
            moments = sorted(kept.values())
            self._floor_ms = moments[len(moments) - self.most // 2]
            kept = {nonce: at_ms for nonce, at_ms in kept.items() if at_ms > self._floor_ms}
        self._seen = kept
