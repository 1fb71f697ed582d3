"""From a model's reference to the source that serves it."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Mapping

from modelcache.ports import Source
from modelcache.refs import PATH, SCHEMES, Scheme, is_below
from modelcache.settings import ModelCacheSettings
from modelcache.sources.reader import make_reader
from modelcache.types import CacheError, ModelRef, SourceError


class ExtraMissing(CacheError):
    """A source's client is not installed; the message says what installs it."""


def open_source(
    ref: ModelRef,
    *,
    settings: ModelCacheSettings,
    environ: Mapping[str, str] | None = None,
    schemes: Mapping[str, Scheme] = SCHEMES,
) -> Source:
    """The source of a model: connects to nothing yet, except to find out where credentials are.

    ``environ`` is where those are looked for (the process's own environment unless given). Raises
    ``ExtraMissing`` where a client is not installed, ``SourceError`` where credentials or the
    endpoint are not usable. The caller closes it.
    """
    environ = os.environ if environ is None else environ
    timeout_s = settings.timeout_s
    _check_client(ref, schemes)
    if ref.scheme in ("file", PATH):
        from modelcache.sources.file import FileSource

        return FileSource(ref)
    if ref.scheme == "gs":
        from modelcache.sources.gs import GsSource

        return GsSource(ref, environ, timeout_s=timeout_s)
    reader = make_reader(
        environ,
        timeout_s=timeout_s,
        connections=settings.connections,
        rate_bytes_s=rate_of(ref, settings),
    )
    if ref.scheme == "s3":
        from modelcache.sources.s3 import S3Source

        return S3Source(ref, reader, environ, timeout_s=timeout_s)
    if ref.scheme == "oss":
        from modelcache.sources.oss import OssSource

        return OssSource(ref, reader, environ, timeout_s=timeout_s)
    if ref.scheme == "hf":
        from modelcache.sources.hf import HfSource

        return HfSource(ref, reader, environ)
    if ref.scheme in ("http", "https"):
        from modelcache.sources.http import HttpSource

        return HttpSource(ref, reader, environ)
    raise SourceError(f"{ref.url}: no source reads {ref.scheme}:// URLs")


def _check_client(ref: ModelRef, schemes: Mapping[str, Scheme]) -> None:
    client = schemes[ref.scheme].client if ref.scheme in schemes else ""
    if client and importlib.util.find_spec(client) is None:
        install = f"{sys.executable} -m pip install {client.replace('_', '-')}"
        raise ExtraMissing(f"{ref.url}: {client} is not installed: {install}")


def rate_of(ref: ModelRef, settings: ModelCacheSettings) -> int | None:
    """The tightest limit on bytes a second that applies to a model's source, if any."""
    limits = [settings.bandwidth_bytes_s] if settings.bandwidth_bytes_s else []
    fits = [u for u in settings.source_bandwidth_bytes_s if is_below(ref.url, u)]
    if fits:
        limits.append(settings.source_bandwidth_bytes_s[max(fits, key=len)])
    return min(limits, default=None)
