"""Fluid's resources (data.fluid.io/v1alpha1) as what the cache agents are given.

A Dataset is a thing of the model cache; this is here and not there because Dataset and DataLoad are
resources of a cluster, of which the model cache knows nothing. What comes out is a patch of the
agents' DaemonSet, settings of ``modelcache``, and commands that preload.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from autoscaler.operator.imports.credentials import find_variable, is_secret
from autoscaler.operator.imports.fields import (
    Fields,
    InvalidResource,
    MappedField,
    Notes,
    Object,
    describe,
    group_of,
    parse_quantity,
    take_metadata,
)
from modelcache.refs import SCHEMES, parse_ref
from modelcache.settings import ModelCacheSettings, PreparationStep

FLUID_GROUP = "data.fluid.io"
AGENT = "tidegate-cache-agent"
CACHE_VOLUME = "node"
"""What the agents' DaemonSet calls the volume of the cache: a patch finds it by its name."""
STORE_SECRET = "tidegate-store-credentials"
UNKNOWN = "Fluid's API does not say what it is"
GPU_TOLERATION = {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}
"""What the agents' DaemonSet has, for a patch replaces the list."""
DISKS = frozenset({"SSD", "HDD"})

DATASET_FIELDS = {
    "owner": "files in the cache are the agent's user's",
    "accessModes": "no volume is made: engines open the files in the node's cache, read-only",
    "placement": "one agent of a node keeps all its models, within one quota",
    "runtimes": "the agents take the place of every runtime",
    "dataRestoreLocation": "what is on the node's disk outlives the agent's pod",
}
LOAD_FIELDS = {
    "loadMetadata": "what a store has is listed anew at each preload",
    "ttlSecondsAfterFinished": "a command leaves no object behind",
    "podMetadata": "no pod is made: the agents load",
    "affinity": "no pod is made: the agents load",
    "tolerations": "no pod is made: the agents load",
    "nodeSelector": "no pod is made: the agents load",
    "schedulerName": "no pod is made: the agents load",
    "resources": "no pod is made: the agents load",
}


@dataclass(slots=True, kw_only=True)
class ImportedCache:
    """What cache agents become of Fluid's resources."""

    quota_bytes: int | None = None
    page_budget_bytes: int | None = None
    directory: str = ""
    env: list[Object] = field(default_factory=list)
    node_affinity: Object | None = None
    tolerations: list[Any] = field(default_factory=list)
    steps: dict[str, list[Object]] = field(default_factory=dict)
    models: list[str] = field(default_factory=list)
    commands: list[str] = field(default_factory=list)
    fields: list[MappedField] = field(default_factory=list)

    @property
    def settings(self) -> Object:
        """Their settings, as ``modelcache`` in tidegate.toml has them."""
        made: Object = {}
        if self.quota_bytes is not None:
            made["quota_bytes"] = self.quota_bytes
        if self.page_budget_bytes is not None:
            made["page_budget_bytes"] = self.page_budget_bytes
        if self.steps:
            made["steps"] = self.steps
        return {"modelcache": made} if made else {}

    @property
    def patch(self) -> Object | None:
        """A patch of their DaemonSet (deploy/kubernetes/cache-agent); ``None``: it needs none."""
        container: Object = {"name": "agent"}
        env = list(self.env)
        if self.quota_bytes is not None:
            name = "TIDEGATE__MODELCACHE__QUOTA_BYTES"
            env.insert(0, {"name": name, "value": str(self.quota_bytes)})
        spec: Object = {}
        if self.node_affinity is not None:
            required = {"requiredDuringSchedulingIgnoredDuringExecution": self.node_affinity}
            spec["affinity"] = {"nodeAffinity": required}
        if self.tolerations:
            spec["tolerations"] = [*self.tolerations, GPU_TOLERATION]
        if env:
            spec["containers"] = [{**container, "env": env}]
        if self.directory:
            path = {"path": self.directory, "type": "Directory"}
            spec["volumes"] = [{"name": CACHE_VOLUME, "hostPath": path}]
        if not spec:
            return None
        return {
            "apiVersion": "apps/v1",
            "kind": "DaemonSet",
            "metadata": {"name": AGENT},
            "spec": {"template": {"spec": spec}},
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class MountedModels:
    """A mount of a Dataset: the URL that it is here (empty where it is none), by its path there."""

    path: str
    url: str


Datasets = dict[tuple[str, str], list[MountedModels]]


def is_fluid(found: Object) -> bool:
    """Whether it is one of Fluid's."""
    return group_of(found) == FLUID_GROUP


def map_fluid(found: Sequence[Object]) -> ImportedCache:
    """What the agents become of all these together. Raises ``InvalidResource``."""
    made = ImportedCache()
    datasets: Datasets = {}
    by_kind: dict[str, list[Object]] = {}
    for one in found:
        kind = str(one["kind"])
        by_kind.setdefault("Runtime" if kind.endswith("Runtime") else kind, []).append(one)
    order = ("Dataset", "Runtime", "DataProcess", "DataLoad")
    mapped = {
        "Dataset": lambda one: _dataset(one, made, datasets),
        "Runtime": lambda one: _runtime(one, made),
        "DataProcess": lambda one: _process(one, made, datasets),
        "DataLoad": lambda one: _load(one, made, datasets),
    }
    for kind in (*order, *(by_kind.keys() - set(order))):
        for one in by_kind.get(kind, ()):
            try:
                if kind in mapped:
                    mapped[kind](one)
                else:
                    _explain_kind(one, made)
            except InvalidResource as error:
                raise InvalidResource(f"{describe(one)}: {error}") from None
    return made


def _explain_kind(found: Object, made: ImportedCache) -> None:
    text = {
        "DataMigrate": "`tidegate model replicate` has another site's cache preload a model",
        "DataBackup": "a cache holds nothing that its store does not: it is filled again",
        "CacheRuntimeClass": "the agents take the place of every runtime",
    }.get(str(found["kind"]), "nothing here does that")
    notes = Notes(describe(found))
    notes.add("kind", found["kind"], "not supported", text)
    made.fields += notes.fields


# -- Dataset ---------------------------------------------------------------------------------------


def _dataset(found: Object, made: ImportedCache, datasets: Datasets) -> None:
    notes = Notes(describe(found))
    name, namespace = take_metadata(found, notes)
    spec = Fields(found.get("spec") or {}, "spec")
    mounts = []
    shared = [(spec.part("sharedOptions"), spec.parts("sharedEncryptOptions"))]
    for mount in spec.parts("mounts"):
        one, scheme = _mount(mount, notes)
        mounts.append(one)
        if one.url and one.url not in made.models:
            made.models.append(one.url)
        options = mount.part("options")
        _environment(scheme, options, mount.parts("encryptOptions"), made, notes)
        for part, secret in shared:
            _environment(scheme, part, secret, made, notes)
        shared = []
        for field_name in ("readOnly", "shared"):
            if field_name in mount:
                text = "stores are only read, and one cache of a node serves all its engines"
                notes.add(mount.at(field_name), mount.take(field_name), "not needed", text)
        for path, value in mount.rest():
            notes.add(path, value, "not supported", UNKNOWN)
    datasets[namespace, name] = mounts
    _nodes(spec, made, notes)
    _explain(spec, DATASET_FIELDS, notes)
    made.fields += notes.fields


def _mount(mount: Fields, notes: Notes) -> tuple[MountedModels, str]:
    """A mount, and the scheme of its store."""
    name, point = mount.text("name"), mount.needed("mountPoint")
    path = mount.text("path") or f"/{name}"
    path = f"/{path.strip('/')}"
    scheme = point.partition("://")[0].lower() if "://" in point else ""
    at = mount.at("mountPoint")
    if scheme == "local":
        text = (
            f"a path of the node: {point[8:]} as a pool's `model`, where that path is mounted "
            "into the engine's pods, is used where it lies"
        )
        notes.add(at, point, "not supported", text)
        return MountedModels(path=path, url=""), scheme
    if scheme == "pvc":
        text = (
            "a claim is mounted by the engine's pods themselves, and its directory is the pool's "
            "`model`; reading a shared volume is not made faster here"
        )
        notes.add(at, point, "not supported", text)
        return MountedModels(path=path, url=""), scheme
    url, outcome = point, "kept"
    if scheme in {"s3a", "s3n"}:
        url, scheme, outcome = f"s3://{point.partition('://')[2]}", "s3", "changed"
    if scheme not in SCHEMES:
        text = f"models come from {'://, '.join(SCHEMES)}://: copy it to one of them"
        notes.add(at, point, "not supported", text)
        return MountedModels(path=path, url=""), scheme
    try:
        ref = parse_ref(url)
    except ValueError as error:
        raise InvalidResource(f"{at}: {error}") from None
    if ref.url.rstrip("/") != point.rstrip("/"):
        outcome = "changed"
    text = f"{ref.url}: a model, or the beginning of the URLs of several"
    notes.add(at, point, outcome, text)  # type: ignore[arg-type]
    return MountedModels(path=path, url=ref.url), scheme


def _environment(
    scheme: str,
    options: Fields | None,
    encrypted: Iterable[Fields],
    made: ImportedCache,
    notes: Notes,
) -> None:
    """Options of a store as environment variables of the agents."""
    for path, value in options.rest() if options is not None else ():
        option = path.removeprefix(f"{options.path}." if options is not None else "")
        variable = find_variable(option, scheme)
        if not variable:
            text = "it is of a runtime, and no reader here has it"
            notes.add(path, value, "not supported", text)
        elif is_secret(option, variable):
            text = f"{variable}: put it into the Secret {STORE_SECRET}; here it is in the clear"
            notes.add(path, "…", "changed", text)
            secret = {"secretKeyRef": {"name": STORE_SECRET, "key": variable}}
            _add_variable({"name": variable, "valueFrom": secret}, path, made, notes)
        else:
            if variable == "AWS_ENDPOINT_URL" and "://" not in str(value):
                value = f"https://{value}"
            notes.add(path, value, "kept", f"{variable} in the agents' environment")
            _add_variable({"name": variable, "value": str(value)}, path, made, notes)
    for one in encrypted:
        option = one.needed("name")
        source = one.part("valueFrom")
        secret_ref = source.part("secretKeyRef") if source is not None else None
        if secret_ref is None:
            raise InvalidResource(f"{one.at('valueFrom')}: secretKeyRef is missing")
        name, key = secret_ref.needed("name"), secret_ref.needed("key")
        variable = find_variable(option, scheme)
        if not variable:
            text = f"it is of a runtime, and no reader here has it; the Secret {name} stays"
            notes.add(one.path, option, "not supported", text)
            continue
        text = f"{variable} in the agents' environment, from key {key} of the Secret {name}"
        notes.add(one.path, option, "kept", text)
        given = {"secretKeyRef": {"name": name, "key": key}}
        _add_variable({"name": variable, "valueFrom": given}, one.path, made, notes)


def _add_variable(variable: Object, path: str, made: ImportedCache, notes: Notes) -> None:
    there = next((one for one in made.env if one["name"] == variable["name"]), None)
    if there is None:
        made.env.append(variable)
    elif there != variable:
        text = (
            f"the agents have one {variable['name']}, and another mount gives it already: use one "
            "that reads both, or a second set of agents"
        )
        notes.add(path, variable["name"], "not supported", text)


def _nodes(spec: Fields, made: ImportedCache, notes: Notes) -> None:
    affinity = spec.part("nodeAffinity")
    if affinity is not None and (required := affinity.take("required")) is not None:
        if made.node_affinity not in (None, required):
            text = "another Dataset names other nodes: a second set of agents is for them"
            notes.add(affinity.at("required"), required, "not supported", text)
        else:
            Fields(required, affinity.at("required"))  # an object, or it says so
            made.node_affinity = required
            text = "node affinity of the agents: which nodes have caches. Engines prefer nodes that"
            notes.add(affinity.at("required"), required, "kept", f"{text} have their model")
    tolerations = spec.take("tolerations")
    if tolerations is not None:
        if not isinstance(tolerations, list):
            raise InvalidResource(f"{spec.at('tolerations')}: it is no list")
        made.tolerations += [one for one in tolerations if one not in made.tolerations]
        notes.add(spec.at("tolerations"), tolerations, "kept", "tolerations of the agents")


def _explain(spec: Fields, texts: dict[str, str], notes: Notes) -> None:
    """What is said of fields that need nothing here, and of those that are unknown."""
    for path, value in spec.rest():
        text = texts.get(path.rpartition(".")[2])
        notes.add(path, value, "not needed" if text else "not supported", text or UNKNOWN)


# -- runtimes --------------------------------------------------------------------------------------


def _runtime(found: Object, made: ImportedCache) -> None:
    notes = Notes(describe(found))
    take_metadata(found, notes)
    spec = Fields(found.get("spec") or {}, "spec")
    _store(spec, "tieredstore", made, notes)
    _store(spec, "tieredStore", made, notes)
    worker = spec.part("worker")
    if worker is not None:
        _store(worker, "tieredStore", made, notes)
        for path, value in worker.rest():
            notes.add(path, value, "not needed", "the agents take the place of its workers")
    for path, value in spec.rest():
        text = (
            "one agent on each of its nodes, by node affinity"
            if path.endswith(".replicas")
            else "the agents take the place of its parts"
        )
        notes.add(path, value, "not needed", text)
    made.fields += notes.fields


def _store(spec: Fields, name: str, made: ImportedCache, notes: Notes) -> None:
    store = spec.part(name)
    for level in store.parts("levels") if store is not None else ():
        medium = level.text("mediumtype") or level.text("mediumType") or "SSD"
        paths = [one for text in level.texts("path") for one in text.split(",") if one]
        given = [one for text in level.texts("quota") for one in text.split(",")]
        given += [one for text in level.texts("quotaList") for one in text.split(",")]
        quota_bytes = 0
        for text in given:
            number = parse_quantity(text)
            if number is None:
                raise InvalidResource(f"{level.at('quota')}: {text!r} is not a quantity, as 100Gi")
            quota_bytes += int(number)
        _level(medium, paths, given, quota_bytes, level, made, notes)
        for path, value in level.rest():
            text = (
                "what goes first is what costs least to load again"
                if path.endswith(("high", "low"))
                else "the agents' volume is the node's directory"
            )
            notes.add(path, value, "not needed", text)


def _level(
    medium: str,
    paths: Sequence[str],
    given: Sequence[str],
    quota_bytes: int,
    level: Fields,
    made: ImportedCache,
    notes: Notes,
) -> None:
    text = f"{medium} {','.join(given)}"
    if medium.upper() not in DISKS:
        made.page_budget_bytes = (made.page_budget_bytes or 0) + quota_bytes
        said = (
            "modelcache.page_budget_bytes, of the Tidegate beside the engines: memory is a page "
            "cache of what is on the disk"
        )
        notes.add(level.at("quota"), text, "changed", said)
        return
    if given:
        made.quota_bytes = (made.quota_bytes or 0) + quota_bytes
        said = f"modelcache.quota_bytes: {made.quota_bytes}, for all models of a node together"
        notes.add(level.at("quota"), text, "kept", said)
    if paths:
        if len(paths) > 1 or made.directory not in ("", paths[0]):
            said = "the cache is one directory: make one file system of several disks"
            notes.add(level.at("path"), ",".join(paths), "not supported", said)
        else:
            made.directory = paths[0]
            said = "the agents' hostPath; it must belong to their user, 10001"
            notes.add(level.at("path"), paths[0], "kept", said)


# -- DataLoad --------------------------------------------------------------------------------------


def _load(found: Object, made: ImportedCache, datasets: Datasets) -> None:
    notes = Notes(describe(found))
    _, namespace = take_metadata(found, notes)
    spec = Fields(found.get("spec") or {}, "spec")
    mounts = _mounts(spec, namespace, datasets, notes)
    policy, schedule = spec.text("policy") or "Once", spec.text("schedule")
    prefix = ""
    if policy == "Cron":
        if not schedule:
            raise InvalidResource("spec.schedule: it is missing, for policy Cron")
        text = f"a CronJob, or a crontab, with `{schedule}` runs the commands: none is made here"
        notes.add("spec.policy", policy, "changed", text)
        notes.add("spec.schedule", schedule, "kept", "it stands before the commands")
        prefix = f"{schedule}  "
    elif policy == "Once":
        notes.add("spec.policy", policy, "kept", "the commands are run once")
    else:
        text = "what changes in a store is not watched: preload it again"
        notes.add("spec.policy", policy, "not supported", text)
    targets = spec.parts("target")
    urls: list[str] = []
    for target in targets:
        path = target.text("path") or "/"
        replicas = target.whole("replicas", 0, 10_000)
        some = [] if mounts is None else _urls(path, mounts)
        urls += some
        if mounts is not None:
            text = f"tidegate model preload {' '.join(some)}" if some else "no mount has that path"
            notes.add(target.at("path"), path, "changed" if some else "not supported", text)
        if replicas is not None:
            text = "each agent that is asked has it; they take pieces from each other"
            notes.add(target.at("replicas"), replicas, "changed", text)
        for path, value in target.rest():
            notes.add(path, value, "not supported", UNKNOWN)
    if not targets and mounts is not None:
        urls = _urls("/", mounts)
    for url in urls:
        command = f"{prefix}tidegate model preload {shlex.quote(url)}"
        if command not in made.commands:
            made.commands.append(command)
    after = spec.take("runAfter")
    if after is not None:
        text = "run one command after the other; steps of preparation run with `model preload`"
        notes.add("spec.runAfter", after, "not supported", text)
    options = spec.take("options")
    if options is not None:
        text = "it is of a runtime; how fast is modelcache.connections and bandwidth_bytes_s"
        notes.add("spec.options", options, "not supported", text)
    _explain(spec, LOAD_FIELDS, notes)
    made.fields += notes.fields


def _mounts(
    spec: Fields, namespace: str, datasets: Datasets, notes: Notes
) -> list[MountedModels] | None:
    """The mounts of the Dataset that is named; ``None`` where it is not among what was given."""
    dataset = spec.part("dataset")
    if dataset is None:
        raise InvalidResource("spec.dataset: it is missing")
    name = dataset.needed("name")
    namespace = dataset.text("namespace") or namespace
    mounts = datasets.get((namespace, name)) or datasets.get(("", name))
    if mounts is None:
        text = "this Dataset is not in what was given: give both, for its mounts say the URLs"
        notes.add("spec.dataset.name", name, "not supported", text)
    else:
        notes.add("spec.dataset.name", name, "kept", "the URLs of its mounts")
    return mounts


def _urls(path: str, mounts: Sequence[MountedModels]) -> list[str]:
    """The URLs of what lies at a path of a Dataset."""
    path = f"/{path.strip('/')}"
    known = [one for one in mounts if one.url]
    if path == "/":
        return [one.url for one in known]
    for one in known:
        if path == one.path or path.startswith(f"{one.path.rstrip('/')}/"):
            rest = path.removeprefix(one.path.rstrip("/"))
            return [f"{one.url.rstrip('/')}{rest}" if rest else one.url]
    if len(known) == 1 and len(mounts) == 1:  # a lone mount may be the root itself
        return [f"{known[0].url.rstrip('/')}{path}"]
    return []


# -- DataProcess -----------------------------------------------------------------------------------


def _process(found: Object, made: ImportedCache, datasets: Datasets) -> None:
    notes = Notes(describe(found))
    _, namespace = take_metadata(found, notes)
    spec = Fields(found.get("spec") or {}, "spec")
    dataset = Fields(spec.take("dataset"), "spec.dataset") if "dataset" in spec else None
    if dataset is None:
        raise InvalidResource("spec.dataset: it is missing")
    mount_path, sub_path = dataset.text("mountPath"), dataset.text("subPath")
    named = Fields({"dataset": dict(_named(dataset))}, "spec")
    mounts = _mounts(named, namespace, datasets, notes)
    processor = spec.part("processor")
    if processor is None:
        raise InvalidResource("spec.processor: it is missing")
    if "job" in processor:
        text = (
            "a step is a command in the engine's environment, no pod of its own: run the job as "
            "it is, on the store, and serve what it writes there; or name what it runs as a step"
        )
        notes.add(processor.at("job"), processor.take("job"), "not supported", text)
    script = processor.part("script")
    if script is not None:
        urls = [] if mounts is None else _urls(sub_path or "/", mounts)
        _script(script, urls, mount_path, made, notes)
    for path, value in processor.rest():
        text = "steps run as the agent's user, without an account of the cluster"
        notes.add(path, value, "not supported", text)
    if mount_path:
        text = "{input} in the step's argv"
        notes.add("spec.dataset.mountPath", mount_path, "changed", text)
    if sub_path:
        notes.add("spec.dataset.subPath", sub_path, "kept", "a part of the model's URL")
    texts = {
        "ttlSecondsAfterFinished": "a step leaves no object behind",
        "policy": "a step is run once for each revision of its model",
        "schedule": "a step is run when its model has changed",
    }
    after = spec.take("runAfter")
    if after is not None:
        text = "steps of one model run in their order: list them so"
        notes.add("spec.runAfter", after, "not supported", text)
    _explain(spec, texts, notes)
    made.fields += notes.fields


def _named(dataset: Fields) -> Iterable[tuple[str, Any]]:
    for path, value in dataset.rest():
        yield path.rpartition(".")[2], value


def _script(
    script: Fields, urls: Sequence[str], mount_path: str, made: ImportedCache, notes: Notes
) -> None:
    """A script as a step of preparation."""
    command, arguments = script.texts("command") or ["bash"], script.texts("args")
    source = script.text("source")
    argv = [*command, *(["-c", source] if source else []), *arguments]
    if mount_path.strip("/"):
        # As a whole path, or the beginning of one: not /data of /database or /mnt/data.
        whole = re.compile(rf"(?<![\w./-]){re.escape(mount_path.rstrip('/'))}(?![\w.-])")
        argv = [whole.sub("{input}", one) for one in argv]
    env = {}
    for one in script.parts("env"):
        name = one.needed("name")
        if "valueFrom" in one:
            text = "a step has the agent's environment: set it there"
            notes.add(one.path, name, "not supported", text)
            continue
        env[name] = one.text("value")
        notes.add(one.path, name, "kept", "env of the step")
    step: Object = {"kind": "command", "argv": argv, **({"env": env} if env else {})}
    shown = " ".join([*command, *arguments]) or "bash"
    if not urls:
        text = "no model is known that it would be a step of"
        notes.add(script.path, shown, "not supported", text)
    for url in urls:
        try:
            parsed = PreparationStep.model_validate(step)
            ModelCacheSettings(steps={url: (parsed,)})
        except ValidationError as error:
            raise InvalidResource(f"{script.path}: {error.errors()[0]['msg']}") from None
        made.steps.setdefault(url, []).append(step)
        text = (
            f'a step of modelcache.steps."{url}". It reads {{input}} and has to write the whole '
            "result to {output}, where a DataProcess changes the dataset itself: edit it"
        )
        notes.add(script.path, shown, "changed", text)
    if "image" in script:
        text = "a step runs in the engine's environment: install there what it needs"
        notes.add(script.at("image"), script.take("image"), "not supported", text)
    for path, value in script.rest():
        outcome_text = "a step has no pod of its own"
        notes.add(path, value, "not supported", outcome_text)
