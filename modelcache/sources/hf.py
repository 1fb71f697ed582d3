"""Models on the Hugging Face hub, or what speaks its API (``HF_ENDPOINT``): listed by
huggingface_hub, read by ranges from where the hub redirects to."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from modelcache.refs import SCHEMES, redact
from modelcache.sources import answers
from modelcache.sources.reader import HttpReader, HttpRequest, RangedSource, home_of
from modelcache.types import Listing, ModelRef, NotFound, RemoteFile, SourceError

ENDPOINT = "https://huggingface.co"
HINT = SCHEMES["hf"].credentials
_TRUE = ("1", "on", "yes", "true")


class HfSource(RangedSource):
    """One revision of a model of the hub, or one folder of it."""

    def __init__(
        self, ref: ModelRef, reader: HttpReader, environ: Mapping[str, str], *, timeout_s: float
    ) -> None:
        super().__init__(ref, reader)
        parts = ref.location.split("/")
        self._repo, self._folder = "/".join(parts[:2]), "/".join(parts[2:])
        self._endpoint = (environ.get("HF_ENDPOINT") or ENDPOINT).rstrip("/")
        self._token = find_token(environ)
        self._offline = any(
            environ.get(name, "").lower() in _TRUE
            for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
        )
        self._timeout_s = timeout_s
        self._commit: str | None = None

    def list(self) -> Listing:
        """See ``Source.list``."""
        if self._offline:
            raise SourceError(f"{self.ref.url}: HF_HUB_OFFLINE says not to ask the hub")
        info = self._ask()
        self._commit = str(info.sha)
        below = f"{self._folder}/" if self._folder else ""
        files = [
            _file_of(self.ref, sibling, below)
            for sibling in info.siblings or ()
            if sibling.rfilename.startswith(below)
        ]
        return self.probed(answers.make_listing(self.ref, files, revision=self._commit))

    def _ask(self) -> Any:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import (
            GatedRepoError,
            HfHubHTTPError,
            HFValidationError,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )

        url = self.ref.url
        api = HfApi(endpoint=self._endpoint, token=self._token or False)
        try:
            return api.model_info(
                self._repo,
                revision=self.ref.revision,
                files_metadata=True,
                timeout=self._timeout_s,
            )
        except GatedRepoError:
            raise SourceError(
                f"{url}: its owners ask that their terms be accepted on its page; then: {HINT}"
            ) from None
        except RevisionNotFoundError:
            raise NotFound(f"{url}: the hub has no revision {self.ref.revision!r} of it") from None
        except RepositoryNotFoundError:
            raise NotFound(
                f"{url}: the hub has no such model, or it is private and needs {HINT}"
            ) from None
        except HFValidationError:
            raise NotFound(f"{url}: that is no name of a model") from None
        except HfHubHTTPError as error:
            response = error.response
            answers.check_status(response.status_code, dict(response.headers), url, HINT)
            raise SourceError(f"{url}: the hub's answer makes no sense") from None
        except Exception as error:  # noqa: BLE001 - which HTTP library's it is depends on the version
            reason = redact(str(error), self._secrets)[:300] or type(error).__name__
            raise SourceError(f"{url}: {reason}", retryable=True) from None

    @property
    def _secrets(self) -> tuple[str, ...]:
        return (self._token,) if self._token else ()

    def request_of(self, file: RemoteFile) -> HttpRequest:
        """See ``RangedSource.request_of``."""
        path = f"{self._folder}/{file.path}" if self._folder else file.path
        # A revision that is read without having been listed here is what was asked for.
        revision = quote(self._commit or self.ref.revision or "main", safe="")
        return HttpRequest(
            url=f"{self._endpoint}/{self._repo}/resolve/{revision}/{quote(path)}",
            shown=f"hf://{self._repo}/{path}",
            hint=HINT,
            headers={"Authorization": f"Bearer {self._token}"} if self._token else {},
        )


def _file_of(ref: ModelRef, sibling: Any, below: str) -> RemoteFile:
    if sibling.size is None:
        raise SourceError(f"{ref.url}: the hub does not say how long {sibling.rfilename} is")
    digests, blob = {}, str(sibling.blob_id or "")
    if sibling.lfs is not None:
        digests["sha256"] = str(sibling.lfs.sha256).lower()
    elif blob:
        digests["git-sha1"] = blob.lower()
    return RemoteFile(
        path=sibling.rfilename.removeprefix(below),
        size_bytes=int(sibling.size),
        version=f"git:{blob}" if blob else "",
        digests=digests,
    )


def find_token(environ: Mapping[str, str]) -> str | None:
    """The hub's token: the environment, else the file that logging in leaves."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        token = "".join(environ.get(name, "").split())
        if token:
            return token
    cache = environ.get("XDG_CACHE_HOME") or f"{home_of(environ)}/.cache"
    home = environ.get("HF_HOME") or f"{cache}/huggingface"
    try:
        text = Path(environ.get("HF_TOKEN_PATH") or f"{home}/token").expanduser().read_text()
    except (OSError, UnicodeDecodeError):
        return None
    return "".join(text.split()) or None
