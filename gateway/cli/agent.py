"""``tidegate agent``: the model cache of a node without replicas."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from gateway.cli.base import Config, Sets
from gateway.terminal import complain


def agent(
    config: Config = None,
    sets: Sets = None,
    admin_port: Annotated[
        int | None, typer.Option(help="Port of the admin listener.", min=0, max=65_535)
    ] = None,
    peer_port: Annotated[
        int | None,
        typer.Option(help="Port at which peers are served; 0 for any free one.", min=0, max=65_535),
    ] = None,
) -> int:
    """Run this node's model cache without gateway, autoscaler or engines, until Ctrl-C.

    It gives pieces of models to its peers, fetches what other sites order with `tidegate model
    replicate`, and answers the other `tidegate model` verbs. Meant for nodes that hold models for
    others: a DaemonSet, another site. Needs the cluster's secret in `TIDEGATE_PEER_TOKEN`.

    **Examples**

    - `TIDEGATE_PEER_TOKEN=... tidegate agent --peer-port 8002 -s modelcache.peer_host=10.0.0.7`

    - `tidegate agent -c node.toml`
    """
    from gateway.settings import defaults
    from gateway.settings.load import Flag

    flags = [
        Flag(field, value, flag)
        for field, value, flag in (
            ("gateway.admin_port", admin_port, "--admin-port"),
            ("modelcache.peer_port", peer_port, "--peer-port"),
        )
        if value is not None
    ]
    loaded = defaults.load_for_agent(config, os.environ, sets or (), flags)
    for warning in loaded.warnings:
        complain(f"warning: {warning.as_warning()}")
    from gateway.compose.agent import run

    return run(loaded)
