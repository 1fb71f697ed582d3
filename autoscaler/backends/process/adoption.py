"""Which engines of an earlier control process are taken over, and which are ended."""

from __future__ import annotations

from autoscaler.backends.base import ReplicaSpec
from autoscaler.backends.process.family import ProcessRecord


def why_not(
    record: ProcessRecord,
    wanted: ReplicaSpec | None,
    *,
    keep_s: float,
    boot_id: str,
    is_ours: bool,
) -> str:
    """Why the engine of a record is not taken over; empty if it is, should it be healthy.

    ``wanted`` is what would be started for its pool now, ``None`` without such a pool. ``is_ours``:
    its guard lives and carries its mark.
    """
    engine = record.engine
    if engine is None or record.ending or record.boot_id != boot_id or not is_ours:
        return "it is not an engine that runs"
    if keep_s <= 0:
        return "autoscaler.keep_engines_s is 0"
    if wanted is None:
        return f"there is no pool {engine.pool} any more"
    if not wanted.digest or wanted.digest != engine.digest:
        return f"the settings of {engine.pool} would start another engine now"
    return ""


def adopted_spec(record: ProcessRecord, wanted: ReplicaSpec) -> ReplicaSpec:
    """The replica that a recorded engine is, its model where it was found when it was started."""
    model = wanted.pool.model if record.engine is None else record.engine.model
    pool = wanted.pool.model_copy(update={"model": model})
    return ReplicaSpec(id=record.replica_id, pool=pool, digest=wanted.digest)
