"""``tidegate import``: what resources of other products become here, and what of them does not."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime, tzinfo
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from zoneinfo import ZoneInfo

import typer

from gateway.cli import tables
from gateway.cli.base import AsJson, as_text
from gateway.cli.client import ValueRefused
from gateway.terminal import count, out

if TYPE_CHECKING:
    from autoscaler.operator.imports.ahpa import ImportedPool
    from autoscaler.operator.imports.fields import MappedField
    from autoscaler.operator.imports.fluid import ImportedCache

MOST_BYTES = 4_194_304
NEEDS = "`tidegate import` needs PyYAML: install Tidegate with its extra `kubernetes`"
CHANGED = {"changed": "yellow", "not supported": "red", "not needed": "dim"}

import_app = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown")

File = Annotated[
    str,
    typer.Argument(
        metavar="FILE",
        help="YAML or JSON, of one resource or several, as written or as `kubectl get -o yaml` "
        "prints them; `-` is standard input.",
    ),
]
AsToml = Annotated[
    bool, typer.Option("--toml", help="Print settings for tidegate.toml in place of YAML.")
]


@import_app.command("ahpa")
def import_ahpa(
    context: typer.Context,
    file: File,
    timezone: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="Time zone of `instanceBounds`, by its IANA name: that of AHPA's controller.",
        ),
    ] = "UTC",
    as_toml: AsToml = False,
    as_json: AsJson = False,
) -> int:
    """Print the ModelPools that AdvancedHorizontalPodAutoscalers (AHPA) become.

    On standard error: each field, and what it became, or why there is nothing like it here.

    **Examples:**
    `kubectl get ahpa -n models -o yaml | tidegate import ahpa - > pools.yaml`,
    `tidegate import ahpa ahpa.yaml --timezone Asia/Shanghai`,
    `tidegate import ahpa ahpa.yaml --toml >> tidegate.toml`
    """
    from autoscaler.operator.imports.ahpa import AHPA_KIND, is_ahpa, map_ahpa
    from autoscaler.operator.imports.fields import InvalidResource, describe

    now = datetime.fromtimestamp(context.obj.now_s(), find_zone(timezone)).replace(tzinfo=None)
    found, others = read_resources(file, is_ahpa, AHPA_KIND)
    made: list[ImportedPool] = []
    for one in found:
        try:
            made.append(map_ahpa(one, timezone=timezone, now=now))
        except InvalidResource as error:
            raise ValueRefused(f"{shown_name(file)}: {describe(one)}: {error}") from None
    pools = [one.model_pool for one in made]
    fields = [field for one in made for field in one.fields]
    if as_json:
        out(as_text({"model_pools": pools, "fields": [asdict(one) for one in fields]}))
        return 0
    if as_toml:
        out(to_toml({"pools": [pool_settings(pool) for pool in pools]}))
    else:
        hint = "Say servedName, port and service where the names and ports below are not theirs"
        out(f"# {hint}.\n{to_yaml(pools)}")
    report(fields, others)
    return 0


@import_app.command("fluid")
def import_fluid(file: File, as_toml: AsToml = False, as_json: AsJson = False) -> int:
    """Print what Fluid's Datasets, DataLoads, DataProcesses and runtimes become.

    That is a patch of the cache agents' DaemonSet, their settings, and the commands that preload.
    Give a Dataset and what belongs to it together, for its mounts say where models come from. On
    standard error: each field, and what it became, or why there is nothing like it here.

    **Examples:**
    `kubectl get datasets,dataloads,alluxioruntimes -n models -o yaml | tidegate import fluid -`,
    `tidegate import fluid dataset.yaml > patch.yaml`, `tidegate import fluid dataset.yaml --toml`
    """
    from autoscaler.operator.imports.fields import InvalidResource
    from autoscaler.operator.imports.fluid import is_fluid, map_fluid

    found, others = read_resources(file, is_fluid, "resource of Fluid")
    try:
        made = map_fluid(found)
    except InvalidResource as error:
        raise ValueRefused(f"{shown_name(file)}: {error}") from None
    if as_json:
        answer = {
            "daemon_set_patch": made.patch,
            "settings": made.settings,
            "models": made.models,
            "commands": made.commands,
            "fields": [asdict(one) for one in made.fields],
        }
        out(as_text(answer))
        return 0
    out(cache_text(made, as_toml=as_toml))
    report(made.fields, others)
    return 0


# -- what comes in ---------------------------------------------------------------------------------


def shown_name(file: str) -> str:
    """What a file is called in an error."""
    return "standard input" if file == "-" else file


def find_zone(name: str) -> tzinfo:
    """A time zone. Raises ``ValueRefused``."""
    try:
        return UTC if name == "UTC" else ZoneInfo(name)
    except (OSError, ValueError, LookupError):
        raise ValueRefused(
            f"--timezone: {name!r} is not known to this machine; an IANA name is wanted, such as "
            "Asia/Shanghai"
        ) from None


def read_resources(
    file: str, wanted: Callable[[dict[str, Any]], bool], what: str
) -> tuple[list[dict[str, Any]], list[str]]:
    """The resources of a file that are wanted (at least one), and what else is in it. Raises
    ``ValueRefused``."""
    from autoscaler.operator.imports.fields import InvalidResource, describe, unpack

    name = shown_name(file)
    try:
        if file == "-":
            data = sys.stdin.buffer.read(MOST_BYTES + 1)
        else:
            with Path(file).open("rb") as opened:
                data = opened.read(MOST_BYTES + 1)
    except OSError as error:
        raise ValueRefused(f"{file}: {error.strerror or error}") from None
    if len(data) > MOST_BYTES:
        raise ValueRefused(f"{name}: it is longer than {MOST_BYTES} bytes")
    try:
        resources = unpack(load_yaml(data))
    except InvalidResource as error:
        raise ValueRefused(f"{name}: {error}") from None
    except ValueRefused as error:
        raise ValueRefused(f"{name}: {error}") from None
    found = [one for one in resources if wanted(one)]
    others = [describe(one) for one in resources if not wanted(one)]
    if not found:
        kinds = sorted({str(one["kind"]) for one in resources})
        there = f"only {', '.join(kinds[:6])}" if kinds else "nothing"
        raise ValueRefused(f"{name}: there is no {what} in it, {there}")
    return found, others


def load_yaml(data: bytes) -> list[Any]:
    """The documents, as Kubernetes reads them: times are texts. No anchors, with which a small text
    may stand for a very large one. Raises ``ValueRefused``."""
    try:
        import yaml
    except ModuleNotFoundError:
        raise ValueRefused(NEEDS) from None

    class KubernetesLoader(yaml.SafeLoader):  # type: ignore[misc]
        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                mark = self.peek_event().start_mark
                raise yaml.MarkedYAMLError(problem="anchors are not read", problem_mark=mark)
            return super().compose_node(parent, index)

    KubernetesLoader.yaml_implicit_resolvers = {
        first: [one for one in given if one[0] != "tag:yaml.org,2002:timestamp"]
        for first, given in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    try:
        return list(yaml.load_all(data, KubernetesLoader))
    except yaml.MarkedYAMLError as error:
        at = error.problem_mark
        line = f"line {at.line + 1}: " if at is not None else ""
        raise ValueRefused(f"{line}it is no YAML: {error.problem}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        text = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueRefused(f"it is no YAML: {text}") from None


# -- what goes out ---------------------------------------------------------------------------------


def report(fields: Sequence[MappedField], others: Sequence[str]) -> None:
    """What became of each field, on standard error."""
    import shutil

    lines = []
    shown = tables.Screen(terminal=sys.stderr.isatty(), width=shutil.get_terminal_size().columns)
    for resource in dict.fromkeys(one.resource for one in fields):
        table = tables.Table(("FIELD", "VALUE", "OUTCOME", "HERE"))
        for one in fields:
            if one.resource == resource:
                outcome = (one.outcome, CHANGED.get(one.outcome, ""))
                table.add(one.field, one.value, outcome, one.became)
        lines += [f"\n{resource}\n", table.render(shown)]
    totals = {
        outcome: sum(one.outcome == outcome for one in fields)
        for outcome in ("kept", "changed", "not needed", "not supported")
    }
    parts = ", ".join(f"{number} {outcome}" for outcome, number in totals.items() if number)
    lines.append(f"\n{count(len(fields), 'field')}: {parts}\n")
    if others:
        lines.append(f"not read: {', '.join(others[:10])}\n")
    sys.stderr.write("".join(lines))
    sys.stderr.flush()


def cache_text(made: ImportedCache, *, as_toml: bool) -> str:
    """What Fluid's resources become, as a patch with the rest in comments, or as settings."""
    settings = to_toml(made.settings)
    notes = []
    if made.commands:
        notes.append("Bring the models to the nodes, in each agent's pod:")
        notes += [f"  {line}" for line in made.commands]
    elif made.models:
        notes.append("Models come when a pool first needs them; to bring one earlier:")
        notes += [f"  tidegate model preload {url}" for url in made.models]
    text = "".join(f"# {line}\n" for line in notes)
    if as_toml:
        return text + settings
    rest = dict(made.settings.get("modelcache", {}))
    rest.pop("quota_bytes", None)  # it is in the patch
    if rest:
        text += "# In tidegate.toml:\n"
        text += "".join(f"#   {line}\n" for line in to_toml({"modelcache": rest}).splitlines())
    if made.patch is None:
        return text + "# The agents' DaemonSet stays as it is.\n"
    text += "# A patch of the cache agents' DaemonSet, for `patches` of your overlay.\n"
    return text + to_yaml([made.patch])


def pool_settings(pool: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a pool that a ModelPool stands for, without defaults."""
    from autoscaler.operator.model_pool import parse_spec, to_settings

    metadata = {"namespace": "default", **pool["metadata"]}
    settings = to_settings({**pool, "metadata": metadata}, parse_spec(pool))
    made: dict[str, Any] = settings.model_dump(
        mode="json", exclude_defaults=True, exclude_none=True
    )
    if "namespace" not in pool["metadata"]:
        made["kubernetes"].pop("namespace", None)
    return {"name": settings.name, **made}


def to_yaml(documents: Sequence[Mapping[str, Any]]) -> str:
    """Documents as YAML."""
    import yaml

    text: str = yaml.safe_dump_all(
        json.loads(json.dumps(documents)), sort_keys=False, width=100, allow_unicode=True
    )
    return text


def to_toml(tree: Mapping[str, Any]) -> str:
    """Settings as TOML: tables and lists of tables after the plain values of each."""
    return "\n".join(_toml_lines(tree, ())).strip() + "\n" if tree else ""


def _toml_lines(tree: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[str]:
    later = []
    for name, value in tree.items():
        if isinstance(value, Mapping) or (_is_tables(value) and path != ("modelcache", "steps")):
            later.append((name, value))
        else:
            yield f"{_toml_key(name)} = {_toml_value(value)}"
    for name, value in later:
        header = ".".join(_toml_key(one) for one in (*path, name))
        for one in value if isinstance(value, list) else [value]:
            if isinstance(value, list) or not all(
                isinstance(part, Mapping) for part in one.values()
            ):
                yield ""
                yield f"[[{header}]]" if isinstance(value, list) else f"[{header}]"
            yield from _toml_lines(one, (*path, name))


def _is_tables(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], Mapping)


def _toml_key(name: str) -> str:
    plain = name.isascii() and name.replace("_", "a").replace("-", "a").isalnum()
    return name if plain else json.dumps(name)


def _toml_value(value: Any) -> str:
    if isinstance(value, Mapping):
        inside = ", ".join(f"{_toml_key(name)} = {_toml_value(one)}" for name, one in value.items())
        return f"{{ {inside} }}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(_toml_value(one) for one in value)}]"
    # JSON's texts, numbers and booleans are TOML's, but for DEL.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007F")
