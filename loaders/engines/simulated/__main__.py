"""``python -P -m loaders.engines.simulated``: one simulated engine as its own process."""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
import socket
import sys

import uvloop

from loaders.engines.simulated.application import VERSION, Application
from loaders.engines.simulated.arguments import EngineSettings, settings_from
from loaders.engines.simulated.http1 import HttpServer

logger = logging.getLogger("loaders.engines.simulated")

_LABELS = ((b"server", b"tidegate-simulated"), (b"x-tidegate-simulated", b"true"))


def run(settings: EngineSettings) -> int:
    """Serve until SIGTERM or SIGINT; the exit code."""
    logging.basicConfig(
        stream=sys.stderr,
        level=logging.INFO,
        format="%(levelname)s %(asctime)s simulated-engine: %(message)s",
    )
    logger.info(
        "THIS IS A SIMULATION (%s): no model is behind %s, and no figure here is a measurement",
        VERSION,
        ", ".join(settings.served_models),
    )
    try:
        sock = _bound(settings)
    except OSError as error:
        logger.error("cannot bind %s:%d: %s", settings.host, settings.port, error)
        return 1
    return uvloop.run(serve(settings, sock))


def _bound(settings: EngineSettings) -> socket.socket:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if settings.share_port:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    try:
        sock.bind((settings.host, settings.port))
    except OSError:
        sock.close()
        raise
    sock.setblocking(False)
    return sock


async def serve(settings: EngineSettings, sock: socket.socket) -> int:
    """Serve on a bound socket until a signal comes; the exit code."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    application = Application(settings)
    http = HttpServer(
        application.handle, settings.limits, fixed_headers=_LABELS, refuse=application.refuse
    )
    if not settings.late_port:
        await http.listen(sock)
    starting = asyncio.ensure_future(application.start())
    stopping = asyncio.ensure_future(stop.wait())
    await asyncio.wait((starting, stopping), return_when=asyncio.FIRST_COMPLETED)
    if starting.done():
        starting.result()
        if settings.late_port:
            await http.listen(sock)
        gc.freeze()
        logger.info("listening on http://%s:%d", *sock.getsockname()[:2])
        await stopping
    else:
        starting.cancel()
    logger.info("asked to stop: finishing %d requests", len(application.live))
    if not await http.drain(settings.drain_s):
        logger.warning("cut %d requests after %g s", len(application.live), settings.drain_s)
    return 0


if __name__ == "__main__":
    sys.exit(run(settings_from(sys.argv[1:])))
