"""Server-sent events that carry a name, as the Responses and Messages APIs send them. Pure."""

from __future__ import annotations

from typing import Any

import msgspec

_encode = msgspec.json.Encoder().encode


def named_event(fields: dict[str, Any]) -> bytes:
    """One event, named by its ``type``."""
    return b"event: %s\ndata: %s\n\n" % (str(fields["type"]).encode(), _encode(fields))
