"""An AdvancedHorizontalPodAutoscaler (autoscaling.alibabacloud.com/v1beta1) as a ModelPool."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from pydantic import ValidationError

from autoscaler.operator.imports.bounds import minutes_of, windows_of
from autoscaler.operator.imports.fields import (
    Fields,
    InvalidResource,
    MappedField,
    Notes,
    Object,
    describe,
    group_of,
    take_metadata,
)
from autoscaler.operator.model_pool import (
    API_VERSION,
    KIND,
    InvalidModelPool,
    TargetRef,
    parse_spec,
    to_settings,
)

AHPA_API_VERSION = "autoscaling.alibabacloud.com/v1beta1"
AHPA_KIND = "AdvancedHorizontalPodAutoscaler"
MOST_REPLICAS = 10_000
MOST_SCHEDULES = 100
LEAST_COVERED = 0.8
"""The lowest quantile that its price covers: below, being late is so cheap that less is."""
TIME = "%Y-%m-%d %H:%M:%S"
UNKNOWN = "AHPA's public API does not say what it is"
OWN_METRICS = (
    "Tidegate scales by tokens in flight, held requests and the forecast of tokens per second, "
    "measured in the gateway"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportedPool:
    """The ModelPool that an autoscaler of another product becomes, and what became of each of its
    fields."""

    model_pool: Object
    fields: tuple[MappedField, ...]


def is_ahpa(found: Object) -> bool:
    """Whether it is one of those."""
    return found.get("kind") == AHPA_KIND and group_of(found) == AHPA_API_VERSION.partition("/")[0]


def map_ahpa(found: Object, *, timezone: str = "UTC", now: datetime) -> ImportedPool:
    """The ModelPool of one. ``timezone`` is that of its bounds, ``now`` the local time there: those
    that have ended are left out. Raises ``InvalidResource``."""
    notes = Notes(describe(found))
    name, namespace = take_metadata(found, notes)
    spec = Fields(found.get("spec") or {}, "spec")
    made: Object = {"targetRef": _target(spec, notes)}
    least = spec.whole("minReplicas", 0, MOST_REPLICAS)
    most = spec.whole("maxReplicas", 1, MOST_REPLICAS)
    if most is None:
        raise InvalidResource("spec.maxReplicas: it is missing")
    if (least or 0) > most:
        raise InvalidResource(f"spec.minReplicas: {least} is more than maxReplicas ({most})")
    if least is None:
        least = 1
        notes.add(
            "spec.minReplicas", "", "changed", "minReplicas: 1, as Kubernetes' HPA without it"
        )
    else:
        zero = "; at zero requests are held, and wake it" if not least else ""
        notes.add("spec.minReplicas", least, "kept", f"minReplicas: {least}{zero}")
    made["minReplicas"] = least
    notes.add("spec.maxReplicas", most, "kept", f"maxReplicas: {most}")
    made["maxReplicas"] = most
    made["mode"] = _mode(spec, notes)
    delay_s = spec.whole("stabilizationWindowSeconds", 0, 86_400)
    if delay_s is not None:
        made["scaleDownDelaySeconds"] = delay_s
        text = (
            f"scaleDownDelaySeconds: {delay_s}; with a forecast that is trusted there is none, and "
            "scaling up has none here"
        )
        notes.add("spec.stabilizationWindowSeconds", delay_s, "kept", text)
    if (price := _price(spec, notes)) is not None:
        made["violatedSecondPrice"] = price
    if targets := _targets(spec, notes):
        made["targets"] = targets
    if schedules := _schedules(spec, notes, timezone, now):
        made["schedules"] = schedules
    for path, value in spec.rest():
        notes.add(path, value, "not supported", UNKNOWN)
    metadata = {"name": name, **({"namespace": namespace} if namespace else {})}
    pool = {"apiVersion": API_VERSION, "kind": KIND, "metadata": metadata, "spec": made}
    _check(pool)
    return ImportedPool(model_pool=pool, fields=tuple(notes.fields))


def _check(pool: Object) -> None:
    """What is made has to be what a ModelPool may be."""
    try:
        metadata = {"namespace": "default", **pool["metadata"]}
        to_settings({**pool, "metadata": metadata}, parse_spec(pool))
    except InvalidModelPool as error:
        raise InvalidResource(f"it makes no ModelPool: {error}") from None


def _target(spec: Fields, notes: Notes) -> Object:
    found = spec.part("scaleTargetRef")
    if found is None:
        raise InvalidResource("spec.scaleTargetRef: it is missing")
    version = found.text("apiVersion") or "apps/v1"
    kind, name = found.text("kind") or "Deployment", found.needed("name")
    if version.startswith("serving.knative.dev/"):
        raise InvalidResource(
            f"{found.at('apiVersion')}: {version!r} is scaled by Knative alone; a workload with "
            "/scale is wanted (Deployment, StatefulSet, LeaderWorkerSet)"
        )
    for path, value in found.rest():
        notes.add(path, value, "not needed", "a name is enough")
    target = {"apiVersion": version, "kind": kind, "name": name}
    try:
        TargetRef.model_validate(target)
    except ValidationError as error:
        one = error.errors()[0]
        field = str(one["loc"][0])
        raise InvalidResource(f"{found.at(field)}: {target[field]!r}: {one['msg']}") from None
    notes.add(found.path, f"{version} {kind} {name}", "kept", "targetRef; only /scale is written")
    return target


def _mode(spec: Fields, notes: Notes) -> str:
    strategy = spec.text("scaleStrategy")
    if strategy in {"auto", "observer"}:
        mode = "auto" if strategy == "auto" else "observe"
        notes.add("spec.scaleStrategy", strategy, "kept", f"mode: {mode}")
        return mode
    text = "mode: observe, which scales nothing; say auto where Tidegate shall scale"
    outcome = "not supported" if strategy else "changed"
    notes.add("spec.scaleStrategy", strategy, outcome, text)  # type: ignore[arg-type]
    return "observe"


def _price(spec: Fields, notes: Notes) -> float | None:
    """What a quantile says as a price. AHPA covers a quantile of its forecast; here the number of
    least expected cost is taken. At ``q / (1 - q)`` that covers the same quantile where a late
    request costs by how far demand is above capacity, and no less where all requests are late."""
    found = spec.part("prediction")
    if found is None:
        notes.add("spec.prediction", "", "not needed", "a forecast is made once it is trusted")
        return None
    price = None
    value = found.quantity("quantile")
    if value is not None:
        part = value / 100.0 if value >= 1.0 else value
        if not 0.0 < part < 1.0:
            raise InvalidResource(f"{found.at('quantile')}: {value:g} is not above 0 and below 100")
        price = max(float(f"{part / (1.0 - part):.3g}"), 0.01)
        covered = (
            f"covers {part:.3g} or more, except of forecasts that are wider than the demand itself"
            if part >= LEAST_COVERED
            else f"may cover less than {part:.3g}"
        )
        text = (
            f"violatedSecondPrice: {price:g}; no quantile is set here: the number of least cost "
            f"is taken, and at this price it {covered}. `tidegate replay` says what it costs"
        )
        notes.add(found.at("quantile"), f"{value:g}", "changed", text)
    if "scaleUpForward" in found:
        text = "how long a start takes is measured, and replicas are started that much ahead"
        notes.add(found.at("scaleUpForward"), found.take("scaleUpForward"), "not needed", text)
    for path, left in found.rest():
        notes.add(path, left, "not supported", UNKNOWN)
    return price


# -- metrics ---------------------------------------------------------------------------------------


def _targets(spec: Fields, notes: Notes) -> Object:
    made: Object = {}
    for metric in spec.parts("metrics"):
        kind = metric.text("type") or "Resource"
        found = metric.part(kind[:1].lower() + kind[1:])
        if kind != "Resource" or found is None:
            _explain_metric(kind, metric, found, notes)
            continue
        name = found.needed("name").lower()
        target = found.part("target") or Fields({}, found.at("target"))
        taken = _target_of(name, target, notes)
        if taken is not None:
            field, value = taken
            if field in made:
                raise InvalidResource(f"{found.at('name')}: {name!r} is there twice")
            made[field] = value
        for one in (target, found, metric):
            for path, left in one.rest():
                notes.add(path, left, "not supported", UNKNOWN)
    return made


def _target_of(name: str, target: Fields, notes: Notes) -> tuple[str, float] | None:
    """The target that a metric becomes; ``None`` where there is none."""
    given = target.text("type")
    metric = target.path.removesuffix(".resource.target")
    percent = target.whole("averageUtilization", 1, 1_000_000)
    average, value = target.quantity("averageValue"), target.quantity("value")
    if name in {"cpu", "memory"}:
        text = f"an engine's {name} says nothing of its load: {OWN_METRICS}"
        notes.add(metric, f"{name} {_first(percent, average, value)}", "not supported", text)
        return None
    if name == "gpu":
        if percent is None or percent > 100:
            raise InvalidResource(
                f"{target.at('averageUtilization')}: {percent} is not a whole number from 1 to 100"
            )
        text = (
            f"targets.gpuUtilizationFraction: {percent / 100:g}, beside what the gateway measures"
        )
        notes.add(metric, f"gpu {percent} %", "kept", text)
        return "gpuUtilizationFraction", percent / 100
    figure = average if average is not None else value
    if name in {"qps", "rps", "rt"} and figure is None:
        raise InvalidResource(f"{target.path}: neither averageValue nor value is there, for {name}")
    if figure is not None and name in {"qps", "rps"}:
        if average is None or given == "Value":
            text = (
                "it is of all replicas together; targets.requestsPerSecond is of one: divide it by "
                "the replicas that carry it"
            )
            notes.add(metric, f"{name} {figure:g}", "not supported", text)
            return None
        _within(target, figure, 1e6)
        text = f"targets.requestsPerSecond: {figure:g}, as the gateway counts them"
        notes.add(metric, f"{name} {figure:g}", "kept", text)
        return "requestsPerSecond", figure
    if figure is not None and name == "rt":
        _within(target, figure / 1_000, 86_400.0)
        text = (
            f"targets.e2eSeconds: {figure / 1_000:g}; milliseconds, as ARMS measures them, are "
            "seconds here, and a mean became 95 of 100 requests: an answer's length counts too, "
            "so targets.ttftSeconds is better for LLMs"
        )
        notes.add(metric, f"rt {figure:g} ms", "changed", text)
        return "e2eSeconds", figure / 1_000
    text = f"it is a metric of its own; {OWN_METRICS}"
    notes.add(metric, f"{name} {_first(percent, average, value)}", "not supported", text)
    return None


def _within(target: Fields, value: float, most: float) -> None:
    if not 0.0 < value <= most:
        raise InvalidResource(f"{target.path}: {value:g} is not above 0 and at most {most:g}")


def _first(*values: float | None) -> str:
    return next((f"{one:g}" for one in values if one is not None), "")


def _explain_metric(kind: str, metric: Fields, found: Fields | None, notes: Notes) -> None:
    name: Any = ""
    if found is not None:
        of = found.part("metric")
        name = of.text("name") if of is not None else found.text("name")
    text = (
        "Tidegate asks no other system for a number while it scales. What counts requests per "
        "second of a replica is targets.requestsPerSecond, what counts those that wait "
        "targets.queuedRequests; `tidegate history import` takes the past from Prometheus"
    )
    notes.add(metric.path, f"{kind} {name}".strip(), "not supported", text)


# -- bounds ----------------------------------------------------------------------------------------


def _schedules(spec: Fields, notes: Notes, timezone: str, now: datetime) -> list[Object]:
    made: list[Object] = []
    taken: list[tuple[str, set[tuple[int, int, int]]]] = []
    for group in spec.parts("instanceBounds"):
        start, end = _time(group, "startTime"), _time(group, "endTime")
        bounds = group.parts("bounds")
        if start is not None and end is not None and start >= end:
            raise InvalidResource(f"{group.at('endTime')}: {end} is not after startTime ({start})")
        ended = end is not None and end <= now
        early = start is not None and start > now
        if start is not None:
            text = "schedules have no first day: import it again on that day" if early else ""
            notes.add(
                group.at("startTime"),
                start,
                "not supported" if early else "not needed",
                text or "it is past",
            )
        if end is not None:
            text = (
                "it is past, and its bounds are left out"
                if ended
                else "schedules have no last day: take them out then"
            )
            notes.add(group.at("endTime"), end, "not needed" if ended else "not supported", text)
        for bound in bounds:
            path, text, parts, minutes = _bound(bound, timezone)
            for left_path, left in bound.rest():
                notes.add(left_path, left, "not supported", UNKNOWN)
            if ended or early:
                when = "ended" if ended else "not begun"
                notes.add(path, text, "not needed" if ended else "not supported", f"it has {when}")
                continue
            if not parts:
                said = f"no cron expression of five fields that a schedule can have: {minutes}"
                notes.add(path, text, "not supported", said)
                continue
            made += parts
            said = "; ".join(
                f"{one['cron']!r} for {one['durationSeconds'] / 3600:g} h" for one in parts
            )
            notes.add(path, text, "changed", f"schedules, in {timezone}: {said}")
            assert not isinstance(minutes, str)
            for other, before in taken:
                if before & minutes:
                    said = f"it may overlap with {other}: the largest of each bound counts"
                    notes.add(path, text, "changed", said)
                    break
            taken.append((path, minutes))
        for left_path, left in group.rest():
            notes.add(left_path, left, "not supported", UNKNOWN)
    if len(made) > MOST_SCHEDULES:
        raise InvalidResource(
            f"spec.instanceBounds: they are {len(made)} schedules, of at most {MOST_SCHEDULES}"
        )
    return made


def _bound(
    bound: Fields, timezone: str
) -> tuple[str, str, list[Object], set[tuple[int, int, int]] | str]:
    """Its path, what it says, its schedules (none where there are none), and when it may hold, or
    why there are none."""
    cron = bound.needed("cron")
    least = bound.whole("minReplicas", 0, MOST_REPLICAS)
    most = bound.whole("maxReplicas", 1, MOST_REPLICAS)
    if least is None and most is None:
        raise InvalidResource(f"{bound.path}: neither minReplicas nor maxReplicas is there")
    if least is not None and most is not None and least > most:
        raise InvalidResource(
            f"{bound.at('minReplicas')}: {least} is more than maxReplicas ({most})"
        )
    shown = f"{cron}: {'' if least is None else least} to {'' if most is None else most}"
    try:
        windows = windows_of(cron)
    except ValueError as error:
        return bound.path, shown, [], str(error)
    limits = {
        name: value
        for name, value in (("minReplicas", least), ("maxReplicas", most))
        if value is not None
    }
    parts = [
        {
            "name": f"AHPA {cron}",
            "cron": one.cron,
            "durationSeconds": int(one.duration_s),
            "timezone": timezone,
            **limits,
        }
        for one in windows
    ]
    return bound.path, shown, parts, minutes_of(cron)


def _time(group: Fields, name: str) -> datetime | None:
    text = group.text(name)
    if not text:
        return None
    try:
        return datetime.strptime(text, TIME)
    except ValueError:
        raise InvalidResource(
            f"{group.at(name)}: {text!r} is not a time such as 2026-01-31 08:00:00"
        ) from None
