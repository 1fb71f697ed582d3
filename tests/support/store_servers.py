"""Stores as small servers of ours: OSS with signatures checked, Google's XML API, a model hub."""

from __future__ import annotations

import base64
import email.utils
import functools
import hashlib
import hmac
import json
import time
from urllib.parse import quote, unquote, urlsplit
from xml.sax.saxutils import escape

from object_server import Answer, Handler, ObjectServer

SIGNED_QUERY = ("security-token", "response-content-type", "uploads", "partNumber", "versionId",
                "acl", "location", "bucketInfo", "objectMeta", "continuation-token")  # fmt: skip
"""Parameters that OSS takes into the signature (of those that clients here send)."""


class OssServer(ObjectServer):
    """OSS, path style: HMAC-SHA1 signatures in headers and URLs, ranges, listings."""

    def __init__(self, bucket: str = "models", key: str = "LTAItestkey0",
                 secret: str = "oss-test-secret", token: str = "") -> None:  # fmt: skip
        super().__init__()
        self.bucket, self.key, self.secret, self.token = bucket, key, secret, token
        self.page_keys = 1_000
        self.refused: list[str] = []
        self.public = False

    def put(self, key: str, data: bytes) -> None:
        self.objects[f"{self.bucket}/{key}"] = data

    def special(self, handler: Handler, path: str, query: dict[str, str]) -> Answer | None:
        refusal = None if self.public else self._refusal(handler, query)
        if refusal:
            self.refused.append(refusal)
            return self._error(403, "SignatureDoesNotMatch", refusal)
        bucket, _, key = path.partition("/")
        if bucket != self.bucket:
            return self._error(404, "NoSuchBucket", bucket)
        if key:
            found = path in self.objects
            return None if found else self._error(404, "NoSuchKey", key)
        if "bucketInfo" in query:
            return self._xml("<BucketInfo><Bucket><Name>models</Name></Bucket></BucketInfo>")
        return self._list(query)

    def _error(self, status: int, code: str, text: str) -> Answer:
        # As OSS does, it repeats the key and what was to be signed.
        body = (
            f"<Error><Code>{code}</Code><Message>{escape(text)}</Message><RequestId>1</RequestId>"
            f"<OSSAccessKeyId>{self.key}</OSSAccessKeyId>"
            f"<StringToSign>{escape(text)}</StringToSign></Error>"
        )
        return status, {"Content-Type": "application/xml"}, body.encode()

    def _xml(self, text: str) -> Answer:
        body = f'<?xml version="1.0" encoding="UTF-8"?>{text}'
        return 200, {"Content-Type": "application/xml"}, body.encode()

    def _refusal(self, handler: Handler, query: dict[str, str]) -> str | None:
        """Why a request is refused; ``None`` for one that is signed as it should be."""
        given = handler.headers.get("Authorization", "")
        if "Signature" in query:
            key, signature, date = (query.get(n, "") for n in
                                    ("OSSAccessKeyId", "Signature", "Expires"))  # fmt: skip
            if not date.isdigit() or int(date) < time.time():
                return "the URL has expired"
        elif given.startswith("OSS "):
            key, _, signature = given.removeprefix("OSS ").partition(":")
            date = handler.headers.get("Date", "")
            sent_s = email.utils.parsedate_to_datetime(date).timestamp()
            if abs(sent_s - time.time()) > 900:
                return "the date is too far off"
        else:
            return "it is not signed"
        token = query.get("security-token") or handler.headers.get("x-oss-security-token", "")
        if (key, token) != (self.key, self.token):
            return "the key or the token is another"
        text = self._string_to_sign(handler, query, date)
        wanted = hmac.new(self.secret.encode(), text.encode(), hashlib.sha1).digest()
        if not hmac.compare_digest(base64.b64encode(wanted).decode(), signature):
            return f"the signature is wrong for {text!r}"
        return None

    def _string_to_sign(self, handler: Handler, query: dict[str, str], date: str) -> str:
        names = sorted(n.lower() for n in handler.headers if n.lower().startswith("x-oss-"))
        own = "".join(f"{name}:{handler.headers[name]}\n" for name in names)
        path = unquote(urlsplit(handler.path).path)
        parts = [
            f"{name}={value}" if value else name
            for name, value in sorted(query.items())
            if name in SIGNED_QUERY
        ]
        resource = path + ("?" + "&".join(parts) if parts else "")
        head = [handler.headers.get("Content-MD5", ""), handler.headers.get("Content-Type", "")]
        return "\n".join([handler.command, *head, date, own + resource])

    def _list(self, query: dict[str, str]) -> Answer:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        after = query.get("marker", "")
        entries: dict[str, str] = {}
        for path in sorted(self.objects):
            key = path.partition("/")[2]
            if not key.startswith(prefix):
                continue
            head, found, _ = key.removeprefix(prefix).partition(delimiter) if delimiter else (
                key, "", ""
            )  # fmt: skip
            if found:
                name = prefix + head + delimiter
                entries[name] = f"<CommonPrefixes><Prefix>{quote(name)}</Prefix></CommonPrefixes>"
            else:
                entries[key] = self._entry(path, key)
        names = [name for name in sorted(entries) if name > after]
        shown = names[: self.page_keys]
        cut = len(shown) < len(names)
        more = f"<NextMarker>{quote(shown[-1])}</NextMarker>" if cut else ""
        return self._xml(
            f"<ListBucketResult><Name>{self.bucket}</Name><Prefix>{quote(prefix)}</Prefix>"
            f"<Marker>{quote(after)}</Marker><MaxKeys>{self.page_keys}</MaxKeys>"
            f"<Delimiter>{quote(delimiter)}</Delimiter><EncodingType>url</EncodingType>"
            f"<IsTruncated>{str(cut).lower()}</IsTruncated>{more}"
            + "".join(entries[name] for name in shown)
            + "</ListBucketResult>"
        )

    def _entry(self, path: str, key: str) -> str:
        data = self.objects[path]
        return (
            f"<Contents><Key>{quote(key)}</Key>"
            "<LastModified>2026-11-20T10:00:00.000Z</LastModified>"
            f'<ETag>"{hashlib.md5(data).hexdigest().upper()}"</ETag><Type>Normal</Type>'
            f"<Size>{len(data)}</Size><StorageClass>Standard</StorageClass>"
            "<Owner><ID>0</ID><DisplayName>0</DisplayName></Owner></Contents>"
        )

    def headers_of(self, path: str, data: bytes) -> dict[str, str]:
        return {
            **super().headers_of(path, data),
            "x-oss-request-id": "1",
            "x-oss-hash-crc64ecma": str(crc64(data)),
        }


@functools.lru_cache(64)
def crc64(data: bytes) -> int:
    """ECMA-182 as OSS has it, with the library that oss2 brings."""
    import crcmod

    return int(crcmod.mkCrcFun(0x142F0E1EBA9EA3693, initCrc=0, xorOut=0xFFFFFFFFFFFFFFFF)(data))


class GcsServer(ObjectServer):
    """Google Cloud Storage's XML API, as far as obstore uses it. Nothing is signed: it stands for
    an emulator, which is what ``STORAGE_EMULATOR_HOST`` names."""

    bucket = "models"

    def put(self, key: str, data: bytes) -> None:
        self.objects[f"{self.bucket}/{key}"] = data

    def special(self, handler: Handler, path: str, query: dict[str, str]) -> Answer | None:
        bucket, _, key = path.partition("/")
        if bucket != self.bucket:
            return 404, {}, b"<Error><Code>NoSuchBucket</Code></Error>"
        if key or "list-type" not in query:
            return None
        prefix = query.get("prefix", "")
        entries = "".join(
            f"<Contents><Key>{escape(name.partition('/')[2])}</Key>"
            "<LastModified>2026-11-20T10:00:00.000Z</LastModified>"
            f'<ETag>"{hashlib.md5(data).hexdigest()}"</ETag><Size>{len(data)}</Size></Contents>'
            for name, data in sorted(self.objects.items())
            if name.partition("/")[2].startswith(prefix)
        )
        body = (
            f"<ListBucketResult><Name>{bucket}</Name><Prefix>{escape(prefix)}</Prefix>"
            f"<IsTruncated>false</IsTruncated>{entries}</ListBucketResult>"
        )
        return 200, {"Content-Type": "application/xml"}, body.encode()


class HubServer(ObjectServer):
    """A model hub: its API, files at a commit, large ones redirected to a store elsewhere."""

    def __init__(self, elsewhere: ObjectServer, repo: str = "org/tiny", token: str = "") -> None:
        super().__init__()
        self.repo, self.token, self.elsewhere = repo, token, elsewhere
        self.commits = {"main": "1" * 40, "v1": "2" * 40}
        self.redirected = 0
        self.redirects_to = ""
        """Where it says that the store elsewhere is; empty for where it is."""
        self._sha256: dict[str, str] = {}

    def put(self, path: str, data: bytes) -> None:
        self.objects[path] = data
        self._sha256[path] = hashlib.sha256(data).hexdigest()
        self.elsewhere.objects[f"lfs/{self._sha256[path]}"] = data

    def special(self, handler: Handler, path: str, query: dict[str, str]) -> Answer | None:
        if (
            self.token
            and path not in self.elsewhere.objects
            and handler.headers.get("Authorization") != f"Bearer {self.token}"
        ):
            return 401, {"X-Error-Code": "RepoNotFound"}, b'{"error":"Repository not found"}'
        if path in self.elsewhere.objects:  # as a proxy, it answers for both
            return handler.slice(path, self.elsewhere.objects[path])
        api = f"api/models/{self.repo}"
        if path == api or path.startswith(f"{api}/revision/"):
            return self._info(path.removeprefix(api).removeprefix("/revision/") or "main")
        below = f"{self.repo}/resolve/"
        if not path.startswith(below):
            return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"
        commit, _, name = path.removeprefix(below).partition("/")
        if commit not in self.commits.values() or name not in self.objects:
            return 404, {"X-Error-Code": "EntryNotFound"}, b"{}"
        data = self.objects[name]
        if not is_large(name):
            return handler.slice(name, data)
        self.redirected += 1
        store = self.redirects_to or self.elsewhere.url
        target = f"{store}/lfs/{self._sha256[name]}?Signature=topsecret"
        return 302, {"Location": target, "X-Linked-Size": str(len(data))}, b""

    def _info(self, revision: str) -> Answer:
        commit = self.commits.get(revision)
        if commit is None and revision in self.commits.values():
            commit = revision
        if commit is None:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
        siblings = [self._sibling(name, data) for name, data in sorted(self.objects.items())]
        found = {"id": self.repo, "modelId": self.repo, "sha": commit, "siblings": siblings,
                 "private": False, "tags": [], "downloads": 0, "likes": 0}  # fmt: skip
        return 200, {"Content-Type": "application/json"}, json.dumps(found).encode()

    def _sibling(self, name: str, data: bytes) -> dict[str, object]:
        blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        found: dict[str, object] = {"rfilename": name, "size": len(data), "blobId": blob}
        if is_large(name):
            found["lfs"] = {"sha256": self._sha256[name], "size": len(data), "pointerSize": 134}
        return found


def is_large(name: str) -> bool:
    """Whether the hub keeps a file outside of its repository."""
    return name.endswith(".safetensors")
