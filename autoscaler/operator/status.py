"""What a ModelPool says back of its pool: pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from autoscaler.types import PoolReport, ScaleReason

Object = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Whether a ModelPool is accepted, and whether Tidegate scales it. ``problem`` is empty where
    it is; ``reason`` names it in a word. ``scaler`` names another autoscaler in the way."""

    problem: str = ""
    reason: str = "Accepted"
    scaler: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scaling:
    """What is known of a workload. ``error`` says why it cannot be read or written."""

    replicas: int | None = None
    selector: str = ""
    scaled_by: str = "tidegate"
    error: str = ""


def make_status(
    found: Mapping[str, Any],
    verdict: Verdict,
    report: PoolReport | None,
    scaling: Scaling,
    now: str,
    preloaded: tuple[str, str, str] | None = None,
) -> Object:
    """The status of a ModelPool. ``now`` is the time (RFC 3339) of conditions that change;
    ``preloaded`` is the status, reason and message of the condition of that name, if it has one."""
    generation = found["metadata"].get("generation", 1)
    before = {one["type"]: one for one in (found.get("status") or {}).get("conditions") or ()}

    def condition(kind: str, status: str, reason: str, message: str) -> Object:
        old = before.get(kind) or {}
        since = old.get("lastTransitionTime", now) if old.get("status") == status else now
        return {
            "type": kind,
            "status": status,
            "reason": reason,
            "message": message[:1_024],
            "observedGeneration": generation,
            "lastTransitionTime": since,
        }

    status: Object = {"observedGeneration": generation}
    accepted = not verdict.problem
    conditions = [
        condition(
            "Accepted",
            "True" if accepted else "False",
            verdict.reason,
            verdict.problem or "It is a pool.",
        )
    ]
    if preloaded is not None:
        conditions.append(condition("Preloaded", *preloaded))
    if not accepted or report is None:
        reason = "NotAccepted" if not accepted else "Starting"
        if accepted and scaling.error:
            reason = "WorkloadNotReached"
        text = verdict.problem or scaling.error or "Not yet known."
        conditions.append(condition("Ready", "False", reason, text))
        return {**status, "readyReplicas": 0, "conditions": conditions}
    decision = report.last_decision
    desired = report.desired
    if decision is not None and decision.recommended is not None:
        desired = decision.recommended
    status |= {
        "replicas": scaling.replicas if scaling.replicas is not None else report.ready,
        "readyReplicas": report.ready,
        "desiredReplicas": desired,
        "reason": reason_word(decision.reason) if decision else "Starting",
        "message": (decision.detail if decision else "")[:1_024],
    }
    if scaling.selector:
        status["selector"] = scaling.selector
    conditions += [
        condition("Ready", *find_ready(report)),
        condition("ScalingActive", *find_scaling(verdict, report, scaling)),
    ]
    return {**status, "conditions": conditions}


def find_ready(report: PoolReport) -> tuple[str, str, str]:
    """Whether requests are answered: at zero they are, after a wait."""
    if report.disabled:
        return "False", "Disabled", "An operator has taken it out of service."
    if report.ready:
        return "True", "Serving", f"{report.ready} ready"
    if report.failures:
        return "False", "StartFails", report.error or "Its replicas do not start."
    if report.starting or report.unhealthy:
        detail = next((one.phase for one in report.replicas if one.phase), "")
        return "False", "Starting", detail or "Its replicas are on their way."
    return "True", "AtZero", "At zero; the next request starts it."


def find_scaling(verdict: Verdict, report: PoolReport, scaling: Scaling) -> tuple[str, str, str]:
    """Whether Tidegate scales it."""
    if verdict.scaler:
        text = f"{verdict.scaler} scales the same workload, so Tidegate leaves it alone."
        return "False", "AnotherAutoscaler", text
    if scaling.error:
        return "False", "WorkloadNotReached", scaling.error
    if scaling.scaled_by != "tidegate":
        return "False", "ScaledByAnother", f"It is scaled by {scaling.scaled_by}, as it says."
    decision = report.last_decision
    if decision is not None and decision.reason in {ScaleReason.ADVISE, ScaleReason.OBSERVE}:
        return "False", "ModeSaysNo", "Its mode only publishes what it would have."
    return "True", "Scaling", "Tidegate sets its number of replicas."


def reason_word(reason: ScaleReason) -> str:
    """A reason as Kubernetes spells reasons."""
    return "".join(part.capitalize() for part in reason.value.split("_"))
