"""The one composition root: settings in, a running Tidegate out.

Everything else gets what it needs as an argument; here it is decided what that is. One process
holds the control side (autoscaler, backends, admin listener) on one event loop and owns all
signals; the data path runs in worker processes. Starting is from the inside out (ports, worker
processes, engines of an earlier run, admin listener, control loop), stopping the reverse: the
workers drain while the control loop still keeps their engines, then the engines go.

Engines of an earlier run end soon after their control process, so they are adopted as early as
possible: what is imported for the admin listener is imported after it.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import logging
import os
import shlex
import shutil
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from autoscaler.adapters.types import KubernetesObject
from autoscaler.backends.base import BackendError
from autoscaler.backends.kubernetes.client import KubernetesError
from autoscaler.backends.kubernetes.knative import UNCOUNTED
from autoscaler.backends.process.backend import ProcessBackend
from autoscaler.backends.process.fork_server import ForkPlan
from autoscaler.backends.process.placement import list_gpus
from autoscaler.backends.static import StaticBackend
from autoscaler.control.decision_log import DecisionLog
from autoscaler.control.disabled_pools import DisabledPools
from autoscaler.control.forecasts import Forecasts
from autoscaler.control.learned_history import LearnedHistory
from autoscaler.control.loop import ControlLoop
from autoscaler.control.replica_numbers import ReplicaNumbers
from autoscaler.settings import EXTERNAL_KUBERNETES, PoolSettings, hints_of
from autoscaler.signals.activity import Activity
from autoscaler.signals.engine_scraper import EngineScraper
from autoscaler.signals.gpus.reader import GpuReader
from autoscaler.signals.history import FILE_NAME, HistoryStore, HistoryWriter
from autoscaler.signals.recorder import Recorder
from autoscaler.signals.series import WORK, arrived_tokens_per_s
from autoscaler.tiers.preparer import NodePreparer
from autoscaler.tiers.wake_times import WakeTimes
from autoscaler.types import GpuCapacity, Observation
from gateway.compose.admin_token import admin_token
from gateway.compose.cache import (
    cache_dir,
    make_models,
    make_page_holder,
    make_transform,
    open_cache,
    prewarm,
    prewarm_behind,
)
from gateway.compose.engines import (
    describe_forks,
    engine_command,
    fork_plan,
    make_compile_cache,
    make_unpack,
    start_digest,
)
from gateway.compose.fleet import FleetBook
from gateway.compose.kubernetes import KubernetesParts, find_second_writers
from gateway.compose.listeners import (
    RECORD_NAME,
    ClaimError,
    Running,
    admin_listeners,
    leave_record,
    listen,
    make_url,
    naming_origins,
    naming_this_one,
    remove_record,
    reserve,
    url,
)
from gateway.compose.process import (
    check_writable,
    child_environ,
    set_up_logging,
    settle,
    take_signals,
)
from gateway.compose.workers import Workers
from gateway.datapath.messages import WorkerConfig
from gateway.datapath.shared import Shared
from gateway.settings.changes import SettingsChanges, describe, find_changes
from gateway.settings.errors import Problem
from gateway.settings.load import ConfigError, LoadedSettings
from gateway.settings.schema import Settings
from gateway.terminal import complain, out, version
from loaders.engines.base import engine_of
from loaders.engines.client import EngineClient
from loaders.settings import LoaderSettings
from modelcache.types import CacheError
from router.endpoint import address_of
from router.types import Pool

log = logging.getLogger("tidegate")

WAKE_TIMES = "wake_times.json"
DISABLED_POOLS = "disabled_pools.json"
REPLICA_NUMBERS = "replica_numbers.json"
_SPARE_REPLICA_SLOTS = 64
_MIN_REPLICA_SLOTS = 2_048
_MAX_POOLS = 1_024
"""Pools at once, with those that were removed and still serve; 1,000 can be configured."""
_FORCED_DRAIN_S = 0.0


def run(loaded: LoadedSettings, read_again: Callable[[], LoadedSettings]) -> int:
    """Run until SIGTERM or Ctrl-C. ``read_again`` reads the settings for a reload; it blocks, and
    raises ``ConfigError``.

    Returns the exit status: 0 after an orderly end, 2 where it could not start (one line says
    why). Raises ``ConfigError`` for what the settings name and is not to be had.
    """
    settings = loaded.settings
    set_up_logging(settings.gateway.log_level)
    check_writable(loaded, "state_dir", Path(settings.state_dir))
    if settings.modelcache.dir is not None:
        check_writable(loaded, "modelcache.dir", cache_dir(settings), may_be_full=True)
    try:
        with naming_origins(loaded), naming_this_one(settings.state_dir):
            return asyncio.run(_run(settings, read_again))
    except (BackendError, CacheError, ClaimError) as error:
        complain(str(error))
        return 2


class _Tidegate:
    """Everything that runs, while it runs."""

    def __init__(self, settings: Settings, read_again: Callable[[], LoadedSettings]) -> None:
        self.settings = settings
        self._read_again = read_again
        self._reloading = asyncio.Lock()
        self._file_settings = settings
        self._cluster_pools: tuple[PoolSettings, ...] = ()
        gateway = settings.gateway
        count = gateway.workers or os.cpu_count() or 1
        self.stack = contextlib.ExitStack()
        (self.admin_listener,) = listen(
            gateway.admin_host, gateway.admin_port, field="gateway.admin_port"
        )
        self.stack.callback(self.admin_listener.close)
        self.admin_token = admin_token(settings)
        self.listeners = listen(gateway.host, gateway.port, field="gateway.port", shared_by=count)
        for listener in self.listeners:
            self.stack.callback(listener.close)
        picker = gateway.picker
        reserved: socket.socket | None = None
        if picker.port is not None:
            check_picker()
            reserved = reserve(picker.host, picker.port, field="gateway.picker.port")
            self.stack.callback(reserved.close)
            count += 1  # a worker like the others
        slots = max(_MIN_REPLICA_SLOTS, 2 * replica_slots(settings.pools))
        self.shared = Shared.create(workers=count, max_replicas=slots, max_pools=_MAX_POOLS)
        self.stack.callback(self.shared.close)
        self.book = FleetBook(self.shared, time.monotonic)
        self.node = open_cache(settings, os.environ)
        self.stack.callback(self.node.close)
        if settings.modelcache.peer_port is not None:
            from modelcache.serving import start_serving  # only where peers are served

            serving = start_serving(settings.modelcache, self.node.peers, self.node.cache)
            if serving is not None:
                self.stack.callback(serving.close)
        self.page_holder = make_page_holder(settings)
        self.compiled = make_compile_cache(settings)
        self.process = process = self._process_backend()
        self.kubernetes = KubernetesParts(
            settings, on_news=lambda replica_id: self.loop.probe_now(replica_id)
        )
        timeout_s = settings.autoscaler.health_timeout_s
        self.scraper = EngineScraper(
            interval_s=settings.autoscaler.metrics_interval_s,
            timeout_s=timeout_s,
            client=EngineClient(timeout_s=timeout_s, headers=UNCOUNTED),
        )
        self.gpus = GpuReader(
            interval_s=settings.autoscaler.metrics_interval_s,
            timeout_s=settings.autoscaler.health_timeout_s,
            dcgm_url=settings.autoscaler.dcgm_url,
        )
        state_dir = settings.state_dir.absolute()
        history = settings.autoscaler.history
        self.history = HistoryStore(
            state_dir / FILE_NAME, max_age_s=history.max_age_s, max_bytes=history.max_bytes
        )
        self.history_writer = HistoryWriter(self.history, time.time)
        self.recorder = Recorder(read=self.book.totals, writer=self.history_writer)
        self.stack.callback(self.recorder.close)
        self.forecasts = Forecasts(
            history_least_s=settings.autoscaler.forecast.history_least_s,
            read_past=self._read_past,
            environ=child_environ(settings, os.environ),
        )
        self.forecasts.hints = hints_of(settings.pools)
        self.forecasts.slow_models = settings.autoscaler.forecast.slow_models
        self.activity = Activity()
        self.decision_log = DecisionLog(writer=self.history_writer, tally=self.forecasts.tally)
        self.stack.callback(self.decision_log.flush)
        self.loop = ControlLoop(
            pools=settings.pools,
            settings=settings.autoscaler,
            backends={
                "process": process,
                "static": StaticBackend(settings=settings.autoscaler),
                **self.kubernetes.backends(),
            },
            digests=find_digests(settings.pools, settings.loaders),
            observe=self.observe,
            record=self._record,
            note=self.decision_log.add,
            outlook=self.forecasts.outlook,
            recent=self.recorder.recent,
            learned_history=LearnedHistory(store=self.history, writer=self.history_writer),
            publish=self._publish,
            preparer=self._preparer(),
            wake_times=WakeTimes(
                node=socket.gethostname(),
                path=state_dir / WAKE_TIMES,
                samples=settings.autoscaler.wake_samples,
            ),
            disabled_pools=DisabledPools(state_dir / DISABLED_POOLS),
            numbers=ReplicaNumbers(state_dir / REPLICA_NUMBERS),
            earlier_drain_s=settings.gateway.drain_s,
        )
        self.workers = Workers(
            worker_config(settings),
            self.listeners,
            self.shared,
            picker=reserved,
            on_wake_signal=self._wake,
            on_failure=self.loop.probe_now,
        )
        scheme = "https" if gateway.tls_certificate else "http"
        self.url = make_url(gateway.host, self.workers.port, scheme)
        self.admin_url = url(self.admin_listener)
        self.picker = None if reserved is None else address_of(url(reserved))

    def _record(self, observation: Observation) -> None:
        self.recorder.observe(observation)
        self.forecasts.observe(observation)
        self.activity.observe(observation.pools)

    def _wake(self, pool: str) -> None:
        self.loop.signal_wake(pool)
        self.activity.hold(pool)

    async def _read_past(self, pool: str, from_s: float, until_s: float) -> list[float]:
        found = await asyncio.to_thread(self.history.read, pool, WORK, from_s, until_s)
        return arrived_tokens_per_s(found.values)

    def _process_backend(self) -> ProcessBackend:
        settings = self.settings
        return ProcessBackend(
            state_dir=settings.state_dir,
            settings=settings.autoscaler,
            command=lambda spec, placement: engine_command(
                spec, placement, settings.loaders, self.compiled
            ),
            list_gpus=self._list_gpus,
            environ=lambda: child_environ(self.settings, os.environ),
            fork_plan=self._fork_plan(settings),
            on_news=lambda replica_id: self.loop.probe_now(replica_id),
        )

    def _list_gpus(self) -> Sequence[GpuCapacity] | None:
        """The GPUs that replicas can be given, as they were read last: one that is lost is none.
        What another tool says is asked where NVML is not there to be read."""
        seen = self.gpus.report()
        if seen.source == "nvml" and seen.gpus is not None:
            return [one.gpu for one in seen.gpus if one.error is None]
        return list_gpus()

    def _preparer(self) -> NodePreparer:
        settings = self.settings
        return NodePreparer(
            cache=self.node.cache,
            page_holder=self.page_holder,
            standbys=self.process if settings.loaders.fork_server else None,
            prewarm=prewarm,
            prewarm_behind=prewarm_behind,
            transform=make_transform(settings, self.node.cache, os.environ),
            unpack=None if self.compiled is None else make_unpack(settings, self.compiled),
        )

    def _fork_plan(self, settings: Settings) -> ForkPlan | None:
        return fork_plan(settings, os.environ, self.compiled, self._find_model)

    def _find_model(self, model: str) -> str | None:
        """Where a model with a URL is on this disk."""
        if "://" not in model:
            return None
        found = self.node.cache.find(model)
        return None if found is None else str(found.path)

    def _publish(self, pools: Sequence[Pool]) -> None:
        self.workers.publish(self.book.publish(pools))
        engines = {name: pool.engine for name, pool in self.loop.pools().items()}
        self.scraper.watch(pools, engines)

    def observe(self) -> Observation:
        """What the data path counts, what engines say of themselves, and what GPUs do."""
        return replace(
            self.book.observe(), engines=self.scraper.observations(), gpus=self.gpus.report()
        )

    async def serve_admin(self, stop: asyncio.Event) -> None:
        """Serve the admin API until ``stop`` is set."""
        from gateway.admin.app import create_app
        from gateway.admin.control import LiveControl
        from gateway.admin.history import Histories
        from gateway.admin.server import serve_admin

        gateway = self.settings.gateway
        models = make_models(
            self.node, self.settings, os.environ, self.page_holder, lambda: self.settings.pools
        )
        control = LiveControl(
            loop=self.loop,
            workers=self.workers,
            version=version(),
            url=self.url,
            admin_url=self.admin_url,
            picker=self.picker,
            clock=time.monotonic,
            observe=self.observe,
            pool_slots=self.book.pool_slots,
            replica_slots=self.book.replica_slots,
            recent=self.recorder.recent,
            traffic=models.traffic,
            forks=lambda: describe_forks(self.process),
            reload=self.reload,
            history=self.history_writer,
            tally=self.forecasts.tally,
            activity=self.activity,
            standby=self.kubernetes.standby_reason,
            find_objects=self._find_objects,
            find_pod=self.kubernetes.find_pod,
            standby_is_ready=self.kubernetes.standby_is_ready,
            pools_known=lambda: self.kubernetes.pools_known,
        )
        app = create_app(
            control,
            host=gateway.admin_host,
            allowed_hosts=gateway.admin_allowed_hosts,
            token=self.admin_token,
            version=version(),
            models=models,
            histories=Histories(
                self.history,
                lambda: self.settings.pools,
                time.time,
                waiting=self.decision_log.waiting,
                filled=self.forecasts.read_again,
            ),
        )
        state_dir = Path(self.settings.state_dir)
        with admin_listeners(self.admin_listener, state_dir, RECORD_NAME) as listeners:
            await serve_admin(listeners, app, stop)

    async def reload(self) -> SettingsChanges:
        """Read the settings again, and apply what is different in them. Raises ``ConfigError``,
        with nothing changed, where they cannot be used."""
        async with self._reloading:
            loaded = await asyncio.to_thread(self._read_again)
            for warning in loaded.warnings:
                log.warning("%s", warning.as_warning())
            pools = self._without_second_writers(self._cluster_pools, loaded.settings, {})
            changes = await self._apply(loaded.settings, pools)
        said = describe(
            added=changes.added,
            changed=changes.changed,
            removed=changes.removed,
            applied=changes.applied,
            needs_restart=changes.needs_restart,
        )
        log.info("the settings were read again: %s", "; ".join(said))
        return changes

    async def set_cluster_pools(self, pools: Sequence[PoolSettings]) -> dict[str, str]:
        """Have these pools of ModelPools, beside those of the settings. Returns why some could not
        be, by name: those stay as they were, if they were pools before and it is not certain that
        they cannot be; else they are left out."""
        async with self._reloading:
            cluster = self.kubernetes.cluster
            problems: dict[str, str] = {}
            known = {pool.name: pool for pool in self._cluster_pools}
            usable = []
            for pool in pools:
                before = known.get(pool.name)
                if pool != before:
                    try:
                        await cluster.track(pool)
                    except KubernetesError as error:
                        problems[pool.name] = str(error)
                        if before is not None and error.is_passing:
                            usable.append(before)
                        continue
                usable.append(pool)
            whole = self._without_second_writers(usable, self._file_settings, problems)
            if whole == self._cluster_pools:
                return problems
            try:
                await self._apply(self._file_settings, whole)
            except (ConfigError, BackendError) as error:
                text = str(error)
                if isinstance(error, ConfigError):
                    text = "; ".join(map(str, error.problems))
                problems |= {one.name: text for one in whole if one != known.get(one.name)}
        return problems

    def _without_second_writers(
        self, pools: Sequence[PoolSettings], settings: Settings, problems: dict[str, str]
    ) -> tuple[PoolSettings, ...]:
        """These pools of resources without those whose workload is another's, which ``problems``
        says then."""
        second = {}
        if pools:
            second = find_second_writers(pools, settings.pools, self.kubernetes.cluster.ref)
        problems |= second
        return tuple(pool for pool in pools if pool.name not in second)

    async def _apply(
        self, settings: Settings, cluster_pools: tuple[PoolSettings, ...]
    ) -> SettingsChanges:
        """Apply settings as a file gives them, with the pools of ModelPools."""
        whole = settings.model_copy(update={"pools": (*settings.pools, *cluster_pools)})
        changes, digests = await asyncio.to_thread(
            self._find_changes, frozenset(self.loop.pools()), self.loop.digests(), whole
        )
        file_settings, settings = settings, changes.settings
        plan = await asyncio.to_thread(self._fork_plan, settings)
        found = await self.loop.find_replicas(settings.pools, digests)
        self.loop.set_pools(settings.pools, digests, settings.autoscaler, found)
        self._file_settings, self._cluster_pools = file_settings, cluster_pools
        self.history.max_age_s = settings.autoscaler.history.max_age_s
        self.history.max_bytes = settings.autoscaler.history.max_bytes
        if worker_config(settings) != worker_config(self.settings):
            self.workers.configure(worker_config(settings))
        set_up_logging(settings.gateway.log_level)
        self.scraper.interval_s = settings.autoscaler.metrics_interval_s
        self.gpus.interval_s = settings.autoscaler.metrics_interval_s
        self.forecasts.history_least_s = settings.autoscaler.forecast.history_least_s
        self.forecasts.hints = hints_of(settings.pools)
        self.forecasts.slow_models = settings.autoscaler.forecast.slow_models
        self.settings = settings
        self.process.use_fork_plan(plan)
        return changes

    def _find_changes(
        self, pools: frozenset[str], old_digests: Mapping[str, str], settings: Settings
    ) -> tuple[SettingsChanges, dict[str, str]]:
        """What is different, and the digests of what pools' replicas are started with now. In a
        thread, so it is given which ``pools`` there are, with those removed that still serve."""
        digests = find_digests(settings.pools, self.settings.loaders)
        problems = []
        slots = replica_slots(settings.pools)
        if slots > self.shared.max_replicas:
            text = (
                f"may have {slots} replicas with those that drain, and this process has room for "
                f"{self.shared.max_replicas}; a restart makes room"
            )
            problems.append(Problem("pools", text, "reload"))
        if len(pools.union(pool.name for pool in settings.pools)) > _MAX_POOLS:
            text = f"are more than {_MAX_POOLS} with those removed before that still serve"
            problems.append(Problem("pools", text, "reload"))
        if problems:
            raise ConfigError(problems)
        changes = find_changes(self.settings, settings, old_digests, digests)
        return changes, digests

    def _find_objects(self, pool: str) -> tuple[KubernetesObject, ...]:
        settings = self.loop.pools().get(pool)
        return () if settings is None else self.kubernetes.find_objects(settings)

    def operate(self) -> None:
        """Begin to have the pools that are resources of the cluster, where the settings say so."""
        if self.settings.kubernetes.has_pools:
            self.kubernetes.operate(
                set_pools=self.set_cluster_pools,
                reserved=lambda: {
                    name: "a pool of the settings"
                    for pool in self._file_settings.pools
                    for name in pool.names
                },
                report=self.loop.report,
                set_replicas=self.loop.set_replicas,
            )

    async def reload_on_signal(self) -> None:
        """The same, for a signal: whatever becomes of it is in the log."""
        try:
            await self.reload()
        except ConfigError as error:
            for problem in error.problems:
                log.error("the settings were not reloaded: %s", problem)
        except Exception:
            log.exception("the settings were not reloaded")


def find_digests(pools: Sequence[PoolSettings], loaders: LoaderSettings) -> dict[str, str]:
    """What each pool's replicas are started with, as a digest by its name. Raises ``ConfigError``
    for pools that cannot be started."""
    digests, problems = {}, []
    for index, pool in enumerate(pools):
        try:
            digests[pool.name] = start_digest(pool, loaders)
        except ValueError as error:
            problems.append(Problem(f"pools.{index}", str(error), "settings"))
    if problems:
        raise ConfigError(problems)
    return digests


def check_picker() -> None:
    """Raise ``ConfigError`` where the packages of the endpoint picker are not installed."""
    needed = ("grpc", "grpc_health", "google.protobuf", "cryptography")
    missing = [name for name in needed if not _is_installed(name)]
    if missing:
        text = (
            f"needs packages that are not installed ({', '.join(missing)}): "
            "pip install 'tidegate[picker]'"
        )
        raise ConfigError([Problem("gateway.picker.port", text, "settings")])


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # nor is the package that it would be in
        return False


def worker_config(settings: Settings) -> WorkerConfig:
    """What the workers are configured with."""
    return WorkerConfig(index=0, gateway=settings.gateway, router=settings.router)


def replica_slots(pools: Sequence[PoolSettings]) -> int:
    """Replicas that these pools may have at once, with those that drain."""
    return _SPARE_REPLICA_SLOTS + sum(
        2 * max(one.max_replicas, len(one.static.urls)) for one in pools
    )


def banner(
    url: str,
    admin_url: str,
    pools: Sequence[PoolSettings],
    *,
    cluster_pools: bool = False,
    picker: str | None = None,
) -> str:
    """Where Tidegate is reached, its pools, and a line for a shell to try the first of them with.
    ``url`` is the API's, ``picker`` the address of the endpoint picker."""
    more = "" if picker is None else f", endpoint picker: {picker}"
    lines = [f"Tidegate is ready at {url}/v1  (admin: {admin_url}{more})", ""]
    for pool in pools:
        kind = engine_of(pool.engine).notice or pool.engine or pool.backend
        is_up = pool.min_replicas or pool.backend_key in {"static", EXTERNAL_KUBERNETES}
        zero = "" if is_up else "; at zero, the first request wakes it"
        lines.append(f"  {pool.name}  ({kind}{zero})")
    if not pools and cluster_pools:
        lines.append("  Its pools are resources of the cluster.")
    elif not pools:
        lines.append("  No pool is configured; see tidegate.example.toml.")
    else:
        lines += ["", "Try it:", "", f"  {_curl(url, pools[0].name)}"]
    lines += ["", f"Watch it with `{_own_command()} status --watch`; stop it with Ctrl-C.", ""]
    return "\n".join(lines)


def _own_command() -> str:
    """This command as a shell in this directory finds it, also where it is not in the PATH."""
    started = sys.argv[0]
    found = shutil.which("tidegate")
    if Path(started).name != "tidegate" or (found and os.path.samefile(found, started)):
        return "tidegate"
    path = Path(os.path.abspath(started))
    return shlex.quote(
        str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
    )


def _curl(url: str, model: str) -> str:
    body = {
        "model": model,
        "messages": [{"role": "user", "content": "What is the capital of France?"}],
        "max_tokens": 32,
        "temperature": 0,
    }
    # A certificate of one's own making is what TLS is tried with first.
    flags = "-sSk" if url.startswith("https") else "-sS"
    return (
        f"curl {flags} {shlex.quote(url + '/v1/chat/completions')} "
        "-H 'content-type: application/json' "
        f"-d {shlex.quote(json.dumps(body, ensure_ascii=False))}"
    )


async def _run(settings: Settings, read_again: Callable[[], LoadedSettings]) -> int:
    stop, hurry, keep = asyncio.Event(), asyncio.Event(), asyncio.Event()
    reloads: set[asyncio.Task[None]] = set()

    def reload() -> None:
        task = asyncio.create_task(tidegate.reload_on_signal())
        reloads.add(task)
        task.add_done_callback(reloads.discard)

    # Before the ports are bound: who sees one may send a signal. It is heeded when all is there.
    take_signals(stop, hurry, reload, keep)
    tidegate = _Tidegate(settings, read_again)
    with tidegate.stack:
        return await _live(tidegate, stop, hurry, keep)


async def _live(
    tidegate: _Tidegate, stop: asyncio.Event, hurry: asyncio.Event, keep: asyncio.Event
) -> int:
    state_dir = Path(tidegate.settings.state_dir)
    admin_stop = asyncio.Event()
    admin: asyncio.Task[None] | None = None
    if tidegate.kubernetes.elects:
        admin = asyncio.create_task(tidegate.serve_admin(admin_stop))
        if not await _lead(tidegate, stop, admin):
            admin_stop.set()
            await asyncio.wait({admin}, timeout=10)
            await tidegate.kubernetes.close()
            return 0 if stop.is_set() else 1
    tidegate.workers.start()
    try:
        await tidegate.loop.open()
    except BackendError:
        tidegate.workers.kill()
        raise
    admin = admin or asyncio.create_task(tidegate.serve_admin(admin_stop))
    reading = [
        asyncio.create_task(tidegate.scraper.run()),
        asyncio.create_task(tidegate.gpus.run()),
        asyncio.create_task(tidegate.forecasts.run()),
    ]
    looping: asyncio.Task[None] | None = None
    status = 0
    try:
        await _wait_listening(tidegate, stop)
        if not stop.is_set():
            settle()
            looping = asyncio.create_task(tidegate.loop.run())
            running = Running(pid=os.getpid(), url=tidegate.url, admin_url=tidegate.admin_url)
            leave_record(state_dir, running)
            given = tidegate.settings
            out(
                banner(
                    tidegate.url,
                    tidegate.admin_url,
                    given.pools,
                    cluster_pools=given.kubernetes.has_pools,
                    picker=tidegate.picker,
                )
            )
            tidegate.operate()
            waiting = asyncio.create_task(tidegate.kubernetes.wait_pools())
            await _first(asyncio.create_task(stop.wait()), waiting)
            tidegate.kubernetes.serve()
            lost = asyncio.create_task(tidegate.kubernetes.lost.wait())
            await _first(asyncio.create_task(stop.wait()), looping, admin, lost)
            lost.cancel()
        if tidegate.kubernetes.lost.is_set():
            tidegate.workers.lead(False)
            log.error("another Tidegate leads now; this one finishes what it has, and ends")
            status = 1
        elif not stop.is_set():
            status = 1
            _log_end(looping, admin)
    except (RuntimeError, TimeoutError) as error:
        complain(str(error) or "a worker process did not start in time")
        status = 1
    finally:
        complain("stopping: answers under way are finished; Ctrl-C again to cut them")
        keep_s = tidegate.settings.autoscaler.keep_engines_s
        if keep.is_set() and keep_s:
            complain(
                f"the engines stay for {keep_s:g} s more; a `tidegate up` here in that time takes "
                "them over"
            )
        for task in reading:
            task.cancel()
        await asyncio.gather(tidegate.scraper.close(), tidegate.gpus.close())
        await tidegate.kubernetes.release()
        await _hand_over(tidegate, hurry)
        await _stop(tidegate, looping, hurry, keep=keep.is_set())
        await tidegate.kubernetes.close()
        admin_stop.set()
        await asyncio.wait({admin}, timeout=10)
        remove_record(state_dir, os.getpid())
    return status


async def _lead(tidegate: _Tidegate, stop: asyncio.Event, admin: asyncio.Task[None]) -> bool:
    """Whether this process leads; waits for that, or for a stop. Raises ``BackendError``."""
    leading = asyncio.create_task(tidegate.kubernetes.lead())
    log.info("waiting to lead (kubernetes.lease = %s)", tidegate.settings.kubernetes.lease)
    await _first(asyncio.create_task(stop.wait()), leading, admin)
    if leading.done():
        leading.result()
        return not stop.is_set()
    leading.cancel()
    await asyncio.gather(leading, return_exceptions=True)
    return False


async def _wait_listening(tidegate: _Tidegate, stop: asyncio.Event) -> None:
    """Until all workers listen, or a stop is asked for. Raises as ``Workers.wait_listening``."""
    listening = asyncio.create_task(tidegate.workers.wait_listening())
    await _first(asyncio.create_task(stop.wait()), listening)
    if stop.is_set():
        listening.cancel()
        await asyncio.gather(listening, return_exceptions=True)
    else:
        await listening


async def _hand_over(tidegate: _Tidegate, hurry: asyncio.Event) -> None:
    """Take requests until another one does in this one's place; at once when ``hurry`` is set."""
    handing = asyncio.create_task(tidegate.kubernetes.hand_over())
    hurried = asyncio.create_task(hurry.wait())
    await asyncio.wait({hurried, handing}, return_when=asyncio.FIRST_COMPLETED)
    for task in (handing, hurried):
        task.cancel()
    await asyncio.gather(handing, hurried, return_exceptions=True)


async def _first(stopping: asyncio.Task[bool], *tasks: asyncio.Task[Any]) -> None:
    """Until one of them ends; the wait for a stop is over then."""
    await asyncio.wait({stopping, *tasks}, return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()


async def _stop(
    tidegate: _Tidegate,
    looping: asyncio.Task[None] | None,
    hurry: asyncio.Event,
    *,
    keep: bool,
) -> None:
    """Drain the workers, then end the engines, or ``keep`` them for the next control process; at
    once when ``hurry`` is set."""
    hurried = asyncio.create_task(hurry.wait())
    draining = asyncio.create_task(tidegate.workers.drain())
    await asyncio.wait({hurried, draining}, return_when=asyncio.FIRST_COMPLETED)
    if not draining.done():
        draining.cancel()
        await asyncio.gather(draining, return_exceptions=True)
        tidegate.workers.kill()
    # No worker sends requests any more, so there is nothing left for the engines to finish.
    await tidegate.loop.close(drain_s=_FORCED_DRAIN_S, keep=keep)
    if looping is not None:
        await asyncio.gather(looping, return_exceptions=True)
    hurried.cancel()


def _log_end(*tasks: asyncio.Task[None] | None) -> None:
    for task in tasks:
        if (
            task is not None
            and task.done()
            and not task.cancelled()
            and (error := task.exception()) is not None
        ):
            log.error("stopped by an internal error", exc_info=error)
