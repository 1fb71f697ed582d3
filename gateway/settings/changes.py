"""What a reload changes: two trees of settings compared, and the tree that applies afterwards.

Pure: nothing is read, and nothing is changed here. A setting either applies as a whole while
Tidegate runs, or is in ``NEEDS_RESTART`` and keeps the value that it was started with. The unit
test of this module lists the settings that apply, and fails for one that is in neither list.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import BaseModel

from gateway.settings import fields
from gateway.settings.load import leaves
from gateway.settings.schema import Settings

NEEDS_RESTART = (
    "state_dir",
    "gateway.host",
    "gateway.port",
    "gateway.workers",
    "gateway.admin_host",
    "gateway.admin_port",
    "gateway.admin_allowed_hosts",
    "gateway.admin_token_file",
    "gateway.admin_allowed_models",
    "gateway.head_timeout_s",
    "gateway.tls_certificate",
    "gateway.tls_key",
    "gateway.picker.port",
    "gateway.picker.host",
    "gateway.picker.tls",
    "gateway.picker.tls_certificate",
    "gateway.picker.tls_key",
    "autoscaler.dcgm_url",
    "autoscaler.host_memory_bytes",
    "autoscaler.health_timeout_s",
    "autoscaler.terminate_s",
    "autoscaler.keep_engines_s",
    "autoscaler.call_timeout_s",
    "autoscaler.log_bytes",
    "autoscaler.log_files",
    "autoscaler.log_replicas",
    "autoscaler.log_tail_lines",
    "autoscaler.history_size",
    "autoscaler.wake_samples",
    "kubernetes",
    "loaders",
    "modelcache",
    "adapter",
)
"""Settings, and whole sections, that a reload does not change. Fields that contradict each other
are together in here or together not, so that the tree that applies is always sound."""

Section = TypeVar("Section", bound=BaseModel)


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolChange:
    """A pool with other settings: which of its fields, and whether its replicas are replaced
    because their start-up arguments differ."""

    name: str
    fields: tuple[str, ...]
    replaces: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class SettingsChanges:
    """What is different in the settings that were read again.

    ``settings`` is the tree that applies from now on. ``applied`` and ``needs_restart`` are the
    dotted names of other settings than those of pools.
    """

    settings: Settings
    added: tuple[str, ...] = ()
    changed: tuple[PoolChange, ...] = ()
    removed: tuple[str, ...] = ()
    applied: tuple[str, ...] = ()
    needs_restart: tuple[str, ...] = ()


def find_changes(
    old: Settings, new: Settings, old_digests: Mapping[str, str], new_digests: Mapping[str, str]
) -> SettingsChanges:
    """What leads from the settings in force to those read. The digests are those of all that a
    pool's replicas are started with, by its name: a new version of the engine changes it too."""
    before = {pool.name: pool for pool in old.pools}
    after = {pool.name: pool for pool in new.pools}
    changed = [
        PoolChange(
            name=name,
            fields=_different(before[name], pool),
            replaces=old_digests[name] != new_digests[name],
        )
        for name, pool in after.items()
        if name in before and (before[name] != pool or old_digests[name] != new_digests[name])
    ]
    different = [name for name in _different(old, new) if name.partition(".")[0] != "pools"]
    return SettingsChanges(
        settings=_keep(new, old, NEEDS_RESTART),
        added=tuple(name for name in after if name not in before),
        changed=tuple(changed),
        removed=tuple(name for name in before if name not in after),
        applied=tuple(name for name in different if not needs_restart(name)),
        needs_restart=tuple(name for name in different if needs_restart(name)),
    )


def describe(
    *,
    added: Sequence[str],
    changed: Sequence[PoolChange],
    removed: Sequence[str],
    applied: Sequence[str],
    needs_restart: Sequence[str],
) -> list[str]:
    """The changes in words, a line each; one line where there are none."""
    lines = [f"pool {name} is added" for name in added]
    for pool in changed:
        more = "; its replicas are replaced" if pool.replaces else ""
        what = ", ".join(pool.fields) or "its engine is another"
        lines.append(f"pool {pool.name} is changed: {what}{more}")
    lines += [f"pool {name} is removed; it serves the requests it has" for name in removed]
    if applied:
        lines.append(f"applied: {', '.join(applied)}")
    if needs_restart:
        lines.append(f"needs a restart: {', '.join(needs_restart)}")
    return lines or ["nothing is different"]


def needs_restart(name: str) -> bool:
    """Whether a setting, by its dotted name, applies only from the next start on."""
    return any(name == one or name.startswith(f"{one}.") for one in NEEDS_RESTART)


def _different(old: BaseModel, new: BaseModel) -> tuple[str, ...]:
    """The dotted names of the fields in which two sections of one kind differ."""
    missing = object()
    before, after = _by_name(old), _by_name(new)
    names = dict.fromkeys([*after, *before])
    return tuple(name for name in names if before.get(name, missing) != after.get(name, missing))


def _by_name(section: BaseModel) -> dict[str, Any]:
    return {fields.dotted(parts): value for parts, value in leaves(section)}


def _keep(new: Section, old: Section, names: Sequence[str]) -> Section:
    """The new section with the old values of these fields, dotted where they lie deeper."""
    update: dict[str, Any] = {}
    for name in type(new).model_fields:
        below = [one.removeprefix(f"{name}.") for one in names if one.startswith(f"{name}.")]
        if name in names:
            update[name] = getattr(old, name)
        elif below:
            update[name] = _keep(getattr(new, name), getattr(old, name), below)
    return new.model_copy(update=update)
