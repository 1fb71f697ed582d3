"""``tidegate adapter``: HPA's and KEDA's way to Tidegate."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gateway.cli import client
from gateway.cli.base import AsJson, Config, Sets, as_text, screen
from gateway.cli.tables import Table
from gateway.terminal import UNKNOWN, complain, out

if TYPE_CHECKING:
    from collections.abc import Iterable

    from autoscaler.adapters.types import PoolSignals
    from gateway.settings.schema import Settings


def adapter(
    context: typer.Context,
    config: Config = None,
    sets: Sets = None,
    tidegate: Annotated[
        str | None,
        typer.Option(
            "--tidegate",
            metavar="URL",
            help="Admin listener of the Tidegate whose pools these are; its token is in "
            "`TIDEGATE_ADMIN_TOKEN`. Without it: the one that runs with this state directory.",
        ),
    ] = None,
    port: Annotated[
        int | None,
        typer.Option(help="Port of the metrics APIs; 0 for any free one.", min=0, max=65_535),
    ] = None,
    keda_port: Annotated[
        int | None,
        typer.Option(help="Port of KEDA's external scaler.", min=0, max=65_535),
    ] = None,
    authorization: Annotated[
        str | None,
        typer.Option(
            metavar="HOW",
            help="`kubernetes`: the cluster says who may read metrics. `none`: everybody may, on "
            "loopback only.",
        ),
    ] = None,
    show: Annotated[
        bool, typer.Option("--list", help="Print the metrics that there are now, and end.")
    ] = False,
    as_json: AsJson = False,
) -> int:
    """Answer HPA and KEDA from what a running Tidegate knows of its pools, until Ctrl-C.

    It is an aggregated API server of Kubernetes (custom.metrics.k8s.io, external.metrics.k8s.io)
    and KEDA's external scaler in one. It keeps nothing: two of them may run side by side. HPA on
    the external metric `tidegate_desired_replicas` with an `AverageValue` of 1 scales a Deployment
    as Tidegate would, ahead of demand; docs/reference/adapter.md has examples of everything.

    **Examples**

    - `tidegate adapter --list` — the names of all metrics, with their values now

    - `tidegate adapter --authorization none` — on this machine, without a cluster and TLS

    - `tidegate adapter --tidegate http://tidegate:8001 -s adapter.metrics_host=0.0.0.0
      -s adapter.tls_certificate=tls.crt -s adapter.tls_key=tls.key` — in a cluster
    """
    from gateway.settings import defaults
    from gateway.settings.load import Flag

    given = (
        ("adapter.tidegate_url", tidegate, "--tidegate"),
        ("adapter.metrics_port", port, "--port"),
        ("adapter.keda_port", keda_port, "--keda-port"),
        ("adapter.authorization", authorization, "--authorization"),
    )
    flags = [Flag(*one) for one in given if one[1] is not None]
    loaded = defaults.load_for_up(config, os.environ, sets or (), flags)
    settings = loaded.settings
    if show or as_json:
        from gateway.admin.operations import SIGNALS

        found = metric_rows(client.ask(_listener(settings), SIGNALS).pools)
        out(as_text({"metrics": found}) if as_json else _table(found))
        return 0
    for warning in loaded.warnings:
        if warning.field.startswith("adapter."):
            complain(f"warning: {warning.as_warning()}")
    code: int = context.obj.adapter(loaded, lambda: _find(settings))
    return code


def metric_rows(pools: Iterable[PoolSignals]) -> list[dict[str, Any]]:
    """Every series of every pool and replica, with its value; ``None`` where it is unknown."""
    from autoscaler.adapters.series import METRICS, pool_series, replica_series

    known = list(pools)
    found = [
        one
        for metric in METRICS.values()
        for pool in known
        for one in (
            *pool_series(metric, pool),
            *(one for replica in pool.replicas for one in replica_series(metric, pool, replica)),
        )
    ]
    return [
        {"metric": one.metric.name, "labels": dict(one.labels), "value": one.value} for one in found
    ]


def _table(rows: list[dict[str, Any]]) -> str:
    table = Table(("METRIC", "LABELS", "VALUE"))
    for row in rows:
        labels = ",".join(f"{name}={value}" for name, value in row["labels"].items())
        value = UNKNOWN if row["value"] is None else f"{row['value']:.6g}"
        table.add(row["metric"], labels, value)
    return table.render(screen())


def _listener(settings: Settings) -> client.Listener:
    return client.find_listener(settings.adapter.tidegate_url, lambda: settings)


def _find(settings: Settings) -> tuple[str, str]:
    from autoscaler.adapters.feed import FetchError

    try:
        found = _listener(settings)
    except typer.BadParameter as error:
        raise FetchError(str(error)) from None
    return found.url, found.token
