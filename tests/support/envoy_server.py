"""The Envoy of the tests: that of the bench, and how a test says a subset."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench import envoy as shared
from bench.envoy import cluster, example, ext_proc, filters, override_host

__all__ = [
    "SUBSET_FROM_HEADER",
    "cluster",
    "envoy",
    "example",
    "ext_proc",
    "filters",
    "override_host",
]

_SUBSET_HEADER = "x-test-subset"

SUBSET_FROM_HEADER = {
    "name": "envoy.filters.http.header_to_metadata",
    "typed_config": {
        "@type": "type.googleapis.com/envoy.extensions.filters.http.header_to_metadata.v3.Config",
        "request_rules": [
            {
                "header": _SUBSET_HEADER,
                "on_header_present": {
                    "metadata_namespace": "envoy.lb.subset_hint",
                    "key": "x-gateway-destination-endpoint-subset",
                },
            }
        ],
    },
}
"""A filter by which a test says the subset, in the header ``x-test-subset``."""


@contextmanager
def envoy(folder: Path, picker: str, config: dict[str, Any] | None = None) -> Iterator[str]:
    """Its URL, while it runs and asks the picker at ``host:port``."""
    with shared.envoy(folder, picker, config) as (url, _):
        yield url
