"""Numbers as Kubernetes writes them. Pure."""

from __future__ import annotations

import math
from decimal import ROUND_CEILING, Decimal

MAX_MILLI = (1 << 63) - 1
"""The most thousandths that HPA can count with."""


def to_quantity(value: float) -> str:
    """A value as a Quantity: whole, or in thousandths, rounded up; what is below zero is 0, for an
    autoscaler takes a negative value for a reason to start as many replicas as it may. Raises
    ``ValueError`` for NaN."""
    if math.isnan(value):
        raise ValueError("NaN is no quantity")
    if value <= 0:
        return "0"
    if value >= MAX_MILLI / 1_000:
        return f"{MAX_MILLI // 1_000}"
    if value == int(value):
        return f"{int(value)}"
    milli = int(Decimal(repr(float(value))).scaleb(3).to_integral_value(ROUND_CEILING))
    return str(milli // 1_000) if milli % 1_000 == 0 else f"{milli}m"
