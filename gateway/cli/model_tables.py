"""What ``tidegate model`` prints. Pure functions from answers of the admin API to text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from gateway.cli.tables import BUSY, GOOD, Screen, Table
from gateway.terminal import NONE, UNKNOWN, ago, duration, size
from modelcache.types import PREPARED, SHORT_CHARACTERS, ModelEntry

if TYPE_CHECKING:
    from gateway.admin import schema

TIER_STYLES = {"running": GOOD, "sleeping": GOOD, "paged": GOOD, "forked": GOOD, "on_disk": "cyan"}


def listing(found: schema.CacheListing, screen: Screen, now_s: float) -> str:
    """What ``tidegate model ls`` shows; ``now_s`` is Unix time."""
    usage = found.usage
    head = f"{found.dir}: {size(usage.bytes_used)} used"
    if usage.quota_bytes is not None:
        head += f" of a quota of {size(usage.quota_bytes)}"
    if usage.bytes_prepared:
        head += f" ({size(usage.bytes_prepared)} by prepared results)"
    head += f", {size(usage.free_bytes)} free on the disk"
    if not found.models:
        return f"{head}\nNo model is in it; `tidegate model preload MODEL` brings one.\n"
    table = Table(("MODEL", "REVISION", "TIER", "SIZE", "UNIQUE", "PAGE CACHE", "STATE", "USED"))
    for entry in _below_their_models(found.models):
        table.add(
            _name(entry),
            short(entry.revision),
            (entry.tier, TIER_STYLES.get(entry.tier, "")),
            size(entry.size_bytes),
            size(entry.bytes_unique),
            _share(entry.bytes_cached, entry.size_bytes),
            _state(entry),
            NONE if entry.used_at_s is None else ago(entry.used_at_s, now_s),
        )
    return f"{head}\n\n{table.render(screen)}"


def _below_their_models(models: Sequence[ModelEntry]) -> list[ModelEntry]:
    """What was made of a model after the model; of one that is not here at the end."""
    made: dict[tuple[str, str], list[ModelEntry]] = {}
    for entry in models:
        if entry.made is not None:
            made.setdefault((entry.made.model, entry.made.revision), []).append(entry)
    found: list[ModelEntry] = []
    for entry in models:
        if entry.made is None:
            found += [entry, *made.pop((entry.url, entry.revision), [])]
    return found + [entry for rest in made.values() for entry in rest]


def _name(entry: ModelEntry) -> str:
    """What a model is called; of a result what it is, whose, and enough of its key to name it."""
    scheme, _, key = entry.url.partition("://")
    if scheme != PREPARED:
        return entry.url
    name = f"{PREPARED}://{key[:SHORT_CHARACTERS]}"
    if entry.made is None:
        return name
    return f"└ {name} ({' + '.join(entry.made.steps)} of {entry.made.model})"


def short(revision: str | None) -> str:
    """A revision as it is told apart by eye: the beginning of a long digest."""
    text = revision or NONE
    return text[:12] if len(text) >= 32 else text


def _share(part: float | None, whole: float | None) -> str:
    if part is None or whole is None:
        return UNKNOWN
    return NONE if not whole else f"{100 * part / whole:.0f} %"


def _state(entry: ModelEntry) -> str | tuple[str, str]:
    parts = ["pinned"] if entry.pinned else []
    parts += [f"in use by {', '.join(entry.leases)}"] if entry.leases else []
    if entry.complete:
        return ", ".join(parts) or NONE
    if entry.leases and entry.url.startswith(PREPARED):
        return "preparing", BUSY
    return ", ".join(["incomplete", *parts]), BUSY


def done(answer: schema.ModelAnswer) -> str:
    """What a verb has done, in a line or two."""
    from gateway.admin import schema

    took = duration(answer.elapsed_s)
    if isinstance(answer, schema.PreloadAnswer):
        return _preloaded(answer, took)
    if isinstance(answer, schema.PrewarmAnswer):
        pages = answer.pages
        share = _share(pages.after.bytes_cached, pages.after.bytes_total)
        return (
            f"{answer.model}: {size(pages.bytes_read)} read, {share} in the page cache ({took})\n"
        )
    if isinstance(answer, schema.VerifyAnswer):
        return _verified(answer, took)
    if isinstance(answer, schema.ReplicateAnswer):
        return "".join(
            f"{name}: {one.error or ('done' if one.done else 'not done')}\n"
            for name, one in answer.sites.items()
        )
    if isinstance(answer, schema.EvictAnswer):
        return _evicted(answer)
    if isinstance(answer, schema.PinAnswer) and answer.pinned:
        return f"{answer.model} is pinned; `tidegate model unpin` lets it be evicted again.\n"
    return f"{answer.model} may be evicted again.\n"


def _evicted(answer: schema.EvictAnswer) -> str:
    model = f"{answer.model} {' and '.join(map(short, answer.revisions))}".rstrip()
    what = f"the prepared results of {model}" if answer.prepared else model
    text = f"Evicted: {what}, {size(answer.freed_bytes)} freed.\n"
    if answer.left and not answer.prepared:
        left = ", ".join(map(short, answer.left))
        text += f"Left: {left} (`--revision` names one, `--all` all).\n"
    return text


def _preloaded(answer: schema.PreloadAnswer, took: str) -> str:
    """What is opened in the end stands last: the result of the steps, where there are any."""
    if answer.size_bytes is None:
        text = f"{answer.model} is used in place"
    else:
        text = f"{answer.model} {short(answer.revision)}, {size(answer.size_bytes)}"
        text += ", already cached" if answer.was_there else f" in {answer.files} files ({took})"
    if answer.prepared and answer.prepared_s is not None:
        text += f", prepared in {duration(answer.prepared_s)}"
    elif answer.prepared:
        text += ", prepared already"
    note = f"Note: {answer.note}\n" if answer.note else ""
    return f"{text}: {answer.prepared or answer.path}\n{note}"


def _verified(answer: schema.VerifyAnswer, took: str) -> str:
    model = f"{answer.model} {short(answer.revision)}" if answer.revision else answer.model
    if not answer.damage:
        return f"{model}: every byte verified ({took}).\n"
    lines = [f"{model}: {len(answer.damage)} damaged{', repaired' if answer.repaired else ''}"]
    for one in answer.damage:
        piece = "" if one.piece is None else f" (piece {one.piece})"
        lines.append(f"  {one.path}: {one.problem}{piece}")
    return "\n".join(lines) + "\n"
