"""The findings of ``tidegate doctor``, and those about models: the cache and its sources, pages,
forking, load formats.

As in ``gateway.doctor.report``, this only decides what an answer means.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from gateway.admin.schema import CacheListing
from gateway.doctor.machine import FormatSpeed, Machine
from gateway.settings.schema import Settings
from gateway.terminal import count, size
from loaders.engines.base import engine_of
from loaders.settings import LoaderSettings
from modelcache.refs import SCHEMES

CLOSE = 0.9
"""A format this near to the quickest is as good: one figure twice differs by that."""


class Status(StrEnum):
    """``fail`` keeps ``tidegate up`` from serving; ``warn`` will hurt sooner or later."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One thing that was looked at. ``advice`` is what to do, where there is something to do."""

    name: str
    status: Status
    finding: str
    advice: str | None = None


def ok(name: str, finding: str) -> Check:
    """What is well."""
    return Check(name=name, status=Status.OK, finding=finding)


def warn(name: str, finding: str, advice: str) -> Check:
    """What will hurt sooner or later, and what to do about it."""
    return Check(name=name, status=Status.WARN, finding=finding, advice=advice)


def fail(name: str, finding: str, advice: str) -> Check:
    """What keeps ``tidegate up`` from serving, and what to do about it."""
    return Check(name=name, status=Status.FAIL, finding=finding, advice=advice)


def diagnose_cache(
    settings: Settings, machine: Machine, *, device: str | None, measure: bool = True
) -> Iterator[Check]:
    """What the answers of ``machine`` mean for these settings.

    ``device`` is what vLLM computes on, ``None`` where there is no vLLM that can be asked.
    Without ``measure`` nothing is started and nothing timed.
    """
    directory = settings.modelcache.dir or settings.state_dir / "cache"
    listing = machine.listing(settings)
    yield _cache(settings, machine, directory, listing)
    yield _sources(settings, machine)
    yield from _pages(settings, machine, directory)
    if device is None or not measure:
        return
    python = settings.loaders.engine_python.expanduser()
    yield _forking(machine, python, device)
    chosen = settings.loaders.load_format
    yield _formats(machine, python, find_weights(settings), chosen)


def _cache(
    settings: Settings, machine: Machine, directory: Path, listing: CacheListing | str | None
) -> Check:
    name = "model cache"
    problem = machine.can_write(directory)
    if problem is not None:
        return fail(name, f"{directory}: {problem}", "set modelcache.dir to a directory of yours")
    if isinstance(listing, str):
        secret = settings.modelcache.peer_token_env
        advice = "`tidegate model ls` says more"
        if secret in listing:
            advice = f"set the environment variable {secret} here, and where Tidegate is started"
        return warn(name, f"{directory}: {listing}", advice)
    models = () if listing is None else listing.models
    taken = 0 if listing is None else listing.usage.bytes_used
    quota, reserve = settings.modelcache.quota_bytes, settings.modelcache.reserve_bytes
    free = machine.disk_free_bytes(directory)
    text = f"{directory}: {count(len(models), 'model revision')}"
    text += f", {size(taken)}"
    text += f" of {size(quota)} quota" if quota is not None else ""
    text += f"; {size(free)} free on the disk, {size(reserve)} of that reserved"
    parts = sum(not entry.complete for entry in models)
    text += f"; {parts} incomplete (`tidegate model preload` resumes them)" if parts else ""
    if free is not None and free <= reserve:
        advice = "make room, set modelcache.dir to another disk, or lower modelcache.reserve_bytes"
        return warn(name, f"{text}: no space for a model", advice)
    if quota is not None and free is not None and quota > free + taken - reserve:
        return warn(name, f"{text}: the disk is smaller than the quota", "lower it, or free space")
    return ok(name, text)


def _sources(settings: Settings, machine: Machine) -> Check:
    name = "model sources"
    clients = {scheme: about.client for scheme, about in SCHEMES.items() if about.client}
    lacking = {
        scheme: client for scheme, client in clients.items() if not machine.is_installed(client)
    }
    if not lacking:
        return ok(name, f"https://, hf://, file://, {', '.join(f'{one}://' for one in clients)}")
    wanted = {
        (pool.model or "").partition("://")[0]
        for pool in settings.pools
        if "://" in (pool.model or "")
    }
    what = ", ".join(f"{scheme}:// ({client})" for scheme, client in lacking.items())
    needed = " ".join(sorted(set(lacking.values())))
    advice = f"{sys.executable} -m pip install {needed.replace('_', '-')}"
    if wanted & set(lacking):
        pools = ", ".join(sorted(wanted & set(lacking)))
        return fail(
            name,
            f"pools have models at {pools}://, and the library that reads them is missing: {what}",
            advice,
        )
    return ok(name, f"https://, hf:// and file://; not installed, and asked for by no pool: {what}")


def _pages(settings: Settings, machine: Machine, directory: Path) -> Iterator[Check]:
    name = "page cache"
    how = machine.page_ways(directory)
    if how:
        yield ok(name, f"residency is measured by {how}")
    else:
        yield warn(
            name,
            "residency is unknown: neither cachestat nor mincore answers",
            "everything works; the paged tier is shown as unknown",
        )
    cache = settings.modelcache
    if not cache.page_lock:
        return
    limit, budget = machine.lock_limit_bytes(), cache.page_budget_bytes
    if limit is not None and (budget is None or limit < budget):
        wanted = "half of the memory" if budget is None else size(budget)
        yield warn(
            name,
            f"modelcache.page_lock is on and {size(limit)} may be locked, of {wanted} wanted",
            "raise `ulimit -l` (LimitMEMLOCK= of a service), or turn modelcache.page_lock off",
        )


def _forking(machine: Machine, python: Path, device: str) -> Check:
    name = "fork server"
    found = machine.fork_ability(python, device)
    if found.problem:
        return warn(
            name,
            f"engines cannot be forked: {found.problem}",
            "they are started plainly, which imports vLLM each time",
        )
    taken = "" if found.memory_bytes is None else f" and {size(found.memory_bytes)} of memory"
    return ok(name, f"engines can be forked from vLLM once imported: {found.seconds:.1f} s{taken}")


def _formats(machine: Machine, python: Path, weights: Sequence[Path], chosen: str) -> Check:
    """How quickly each format reads here. A warning is for a choice of the operator's, not for our
    default: what is quicker is said of that too, with how to have it."""
    name = "load format"
    if not weights:
        return ok(name, "not measured: no model with safetensors is here yet")
    speeds = machine.speeds(python, weights)
    if isinstance(speeds, str):
        return warn(name, f"not measured: {speeds}", "`make engine` mends the engine's environment")
    tried = [one for one in speeds if one.warm_bytes_s is not None]
    if not tried:
        return warn(name, f"none can read here: {_problems(speeds)}", "`make clean-engine engine`")
    tried.sort(key=_rank, reverse=True)
    said = "; ".join(f"{one.format} {_figures(one)}" for one in tried)
    absent = _problems(speeds)
    text = f"quickest here is {tried[0].format}: {said}" + (f" ({absent})" if absent else "")
    best = tried[0].format
    used = next((one for one in tried if one.format == chosen), None)
    if used is None or _rank(used) >= CLOSE * _rank(tried[0]):
        return ok(name, text)
    advice = f'loaders.load_format = "{best}" makes all pools use it'
    if chosen == LoaderSettings().load_format:
        return ok(name, f"{text}; {advice}")
    return warn(name, text, advice)


def _rank(speed: FormatSpeed) -> float:
    """By the cold figure where there is one: that is where the seconds are."""
    return speed.cold_bytes_s or speed.warm_bytes_s or 0.0


def _figures(speed: FormatSpeed) -> str:
    warm = f"{size(speed.warm_bytes_s)}/s from the page cache"
    return warm if speed.cold_bytes_s is None else f"{size(speed.cold_bytes_s)}/s from disk, {warm}"


def _problems(speeds: Sequence[FormatSpeed]) -> str:
    absent = [one.format for one in speeds if one.problem == "not installed"]
    parts = [f"{one.format}: {one.problem}" for one in speeds if one.problem]
    parts = [part for part in parts if not part.endswith(": not installed")]
    return "; ".join([*parts, *([f"not installed: {', '.join(absent)}"] if absent else [])])


def find_weights(settings: Settings) -> list[Path]:
    """The weights of the first pool whose model is a directory with safetensors."""
    places = [
        Path(pool.model).expanduser()
        for pool in settings.pools
        if engine_of(pool.engine).capabilities.loads_weights
        and pool.model
        and "://" not in pool.model
    ]
    for place in places:
        found = sorted(place.glob("*.safetensors")) if place.is_dir() else []
        if found:
            return found
    return []
