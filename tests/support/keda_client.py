"""A client of KEDA's external scaler with messages compiled from the protocol's own file."""

from __future__ import annotations

from typing import Any

import compiled_protos


def compiled() -> tuple[Any, Any]:
    """The compiled messages and stubs."""
    return compiled_protos.compiled("externalscaler")


def ref(pool: str | None = "chat", namespace: str = "default", **metadata: str) -> Any:
    """A ScaledObject's reference."""
    messages, _ = compiled()
    given = {} if pool is None else {"pool": pool}
    return messages.ScaledObjectRef(
        name="chat", namespace=namespace, scalerMetadata={**given, **metadata}
    )


def metrics_request(found: Any, name: str = "tidegate_desired_replicas") -> Any:
    """What KEDA asks a value with."""
    messages, _ = compiled()
    return messages.GetMetricsRequest(scaledObjectRef=found, metricName=name)


def stub(channel: Any) -> Any:
    """The calls, over a channel of grpc or grpc.aio."""
    _, stubs = compiled()
    return stubs.ExternalScalerStub(channel)
