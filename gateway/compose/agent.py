"""A cache agent: the model cache of a node that runs no replicas, for its peers and other sites.

The composition root of ``tidegate agent``, as ``gateway.compose.up`` is that of ``tidegate up``:
the peer listener gives pieces and takes orders, the admin listener has the verbs of the model
cache.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable
from pathlib import Path

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from autoscaler.backends.base import BackendError
from autoscaler.backends.kubernetes.client import KubernetesClient, connect
from autoscaler.operator.node_labels import keep_labels
from gateway.admin import schema
from gateway.admin.app import Handler, ModelRoutes, assemble, healthz, readiness
from gateway.admin.metrics_page import UsagePoller, render_agent, render_cache
from gateway.admin.models import Models
from gateway.admin.operations import METRICS_TYPE
from gateway.admin.schema import AdminError
from gateway.admin.server import serve_admin
from gateway.compose.admin_token import admin_token
from gateway.compose.cache import NodeCache, make_models, make_page_holder, open_cache
from gateway.compose.listeners import (
    AGENT_NAME,
    ClaimError,
    Running,
    admin_listeners,
    claim_for_agent,
    leave_record,
    listen,
    make_url,
    naming_origins,
    remove_record,
    url,
)
from gateway.compose.process import check_writable, set_up_logging, take_signals
from gateway.settings.load import LoadedSettings
from gateway.settings.schema import Settings
from gateway.terminal import complain, out, version
from modelcache.serving import Serving, run_agent
from modelcache.types import CacheError

log = logging.getLogger("tidegate.agent")


def run(loaded: LoadedSettings) -> int:
    """Run until SIGTERM or Ctrl-C. Returns the exit status: 0 after an orderly end, 2 where it
    could not start (one line says why)."""
    settings = loaded.settings
    set_up_logging(settings.gateway.log_level)
    try:
        node = open_cache(settings, os.environ)
        check_writable(loaded, "state_dir", settings.state_dir, may_be_full=True)
        check_writable(loaded, "modelcache.dir", node.cache.dir, may_be_full=True)
        with naming_origins(loaded), claim_for_agent(settings.state_dir):
            return asyncio.run(_run(settings, node))
    except (BackendError, CacheError, ClaimError) as error:
        complain(" ".join(str(error).split()))
        return 2


async def _run(settings: Settings, node: NodeCache) -> int:
    stop, hurry = asyncio.Event(), asyncio.Event()
    take_signals(stop, hurry)
    page_holder = make_page_holder(settings)
    models = make_models(node, settings, os.environ, page_holder)
    given = settings.gateway
    (listener,) = listen(given.admin_host, given.admin_port, field="gateway.admin_port")
    token = admin_token(settings)
    state_dir, admin_url = Path(settings.state_dir), url(listener)
    serving: list[Serving] = []

    def begin(now: Serving) -> None:
        serving.append(now)
        peer_url = make_url(now.host, now.port)
        running = Running(pid=os.getpid(), url=peer_url, admin_url=admin_url)
        try:
            leave_record(state_dir, running, AGENT_NAME)
        except OSError as error:  # the disk is full: it serves, and the console must be told where
            log.warning("%s: %s; `tidegate` needs --admin %s", state_dir, error, admin_url)
        out(banner(peer_url, admin_url, str(node.cache.dir)))

    def where() -> str | None:
        return make_url(serving[0].host, serving[0].port) if serving else None

    app = create_agent_app(models, where, given.admin_host, given.admin_allowed_hosts, token)

    async def serve(until: asyncio.Event) -> None:
        with admin_listeners(listener, state_dir, AGENT_NAME) as listeners:
            await serve_admin(listeners, app, until)

    labelling = label_node(settings, node)
    try:
        await run_agent(
            settings.modelcache,
            cache=node.cache,
            peers=node.peers,
            serve_admin=serve,
            stop=stop,
            on_serving=begin,
        )
    finally:
        await end_labelling(labelling)
        listener.close()
        remove_record(state_dir, os.getpid(), AGENT_NAME)
        if page_holder is not None:
            await asyncio.to_thread(page_holder.close)
        await asyncio.to_thread(node.close)
    return 0


Labelling = tuple[KubernetesClient, asyncio.Task[None]]


def label_node(settings: Settings, node: NodeCache) -> Labelling | None:
    """Begin to label the node that this is with its models, where the settings name it. Raises
    ``KubernetesError`` where there is no access to a cluster."""
    name = settings.kubernetes.node
    if name is None:
        return None
    client = connect(settings.kubernetes)
    return client, asyncio.create_task(keep_labels(client, name, lambda: models_here(node)))


async def end_labelling(labelling: Labelling | None) -> None:
    """End it; the labels stay, as the models do."""
    if labelling is not None:
        client, task = labelling
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await client.close()


def models_here(node: NodeCache) -> list[str]:
    """The URLs of the models that are on this disk in full."""
    return [one.url for one in node.cache.ls() if one.complete and one.made is None]


def banner(peer_url: str, admin_url: str, directory: str) -> str:
    """What is printed once peers are served."""
    return (
        "Tidegate's cache agent is up.\n"
        f"  peers  {peer_url}\n"
        f"  admin  {admin_url}  (metrics, models)\n"
        f"  cache  {directory}\n"
        "Ctrl-C stops it; downloads resume at its next start.\n"
    )


def create_agent_app(
    models: Models,
    where: Callable[[], str | None],
    host: str = "127.0.0.1",
    allowed_hosts: tuple[str, ...] = (),
    token: str | None = None,
) -> Starlette:
    """The admin application of an agent; ``where`` tells the peer listener's URL once it serves.
    ``token`` is what it wants over TCP."""
    usage = UsagePoller(models.cache.usage)

    async def readyz() -> schema.Readiness:
        ready = where() is not None
        return readiness(ready, "serving peers" if ready else "not serving peers yet")

    async def status() -> schema.AgentStatus:
        return await asyncio.to_thread(_status, models, where())

    async def metrics() -> Response:
        page = render_agent(version=version(), traffic=models.traffic())
        page += render_cache(await usage.get(), usage.failures)
        return Response(page, headers={"content-type": METRICS_TYPE})

    handlers: dict[str, Handler] = {
        "metrics": metrics,
        "healthz": healthz,
        "readyz": readyz,
        "status": status,
        **ModelRoutes(models).handlers(),
    }
    app = assemble(handlers, host, allowed_hosts, token, version())
    for what in ("pools", "replicas"):  # no operations here, but the console may ask for them
        app.router.routes.append(
            Route(f"/{what}/{{rest:path}}", _no_pools, methods=["GET", "POST"])
        )
    return app


async def _no_pools(request: Request) -> Response:
    raise AdminError("no_pools", "A cache agent runs here; it has no pools.")


def _status(models: Models, peer_url: str | None) -> schema.AgentStatus:
    return schema.AgentStatus(
        version=version(),
        peer_url=peer_url,
        dir=str(models.cache.dir),
        usage=schema.CacheUsage.model_validate(models.cache.usage()),
        traffic=schema.CacheTraffic.model_validate(models.traffic()),
    )
