"""What ``tidegate model`` prints. Pure functions from the answers of ``gateway.admin.models`` to
text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gateway.cli.tables import BUSY, GOOD, NONE, UNKNOWN, Screen, Table, duration
from modelcache.types import PREPARED, SHORT_CHARACTERS

UNITS = ("B", "kB", "MB", "GB", "TB", "PB")
TIER_STYLES = {"running": GOOD, "sleeping": GOOD, "paged": GOOD, "forked": GOOD, "on_disk": "cyan"}


def size(value: float | None) -> str:
    """Bytes as disks and networks count them: ``0 B``, ``412 kB``, ``14.9 GB``."""
    if value is None:
        return UNKNOWN
    number = float(value)
    for unit in UNITS:
        if abs(number) < 999.5 or unit == UNITS[-1]:
            break
        number /= 1000
    return (
        f"{number:.0f} {unit}" if unit in ("B", "kB") or number >= 99.95 else f"{number:.1f} {unit}"
    )


def listing(found: Mapping[str, Any], screen: Screen, now_s: float) -> str:
    """What ``tidegate model ls`` shows; ``now_s`` is Unix time."""
    models = found.get("models") or []
    head = f"{found.get('dir')}: {_usage(found.get('usage') or {})}"
    if not models:
        return f"{head}\nNo model is in it; `tidegate model preload MODEL` brings one.\n"
    table = Table(("MODEL", "REVISION", "TIER", "SIZE", "ALONE", "IN PAGES", "STATE", "USED"))
    for entry in below_their_models(models):
        tier = str(entry.get("tier") or UNKNOWN)
        used = entry.get("used_at_s")
        table.add(
            _name(entry),
            short(entry.get("revision")),
            (tier, TIER_STYLES.get(tier, "")),
            size(entry.get("size_bytes")),
            size(entry.get("bytes_unique")),
            _share(entry.get("bytes_cached"), entry.get("size_bytes")),
            _state(entry),
            NONE if used is None else f"{duration(now_s - used)} ago",
        )
    return f"{head}\n\n{table.render(screen)}"


def below_their_models(models: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """What was made of a model after the model; of one that is not here at the end."""
    made: dict[tuple[Any, Any], list[Mapping[str, Any]]] = {}
    for entry in models:
        if entry.get("made"):
            origin = entry["made"]
            made.setdefault((origin.get("model"), origin.get("revision")), []).append(entry)
    found: list[Mapping[str, Any]] = []
    for entry in models:
        if not entry.get("made"):
            found += [entry, *made.pop((entry.get("url"), entry.get("revision")), [])]
    return found + [entry for rest in made.values() for entry in rest]


def _name(entry: Mapping[str, Any]) -> str:
    """What a model is called; of a result what it is, whose, and enough of its key to name it."""
    scheme, _, key = str(entry.get("url")).partition("://")
    if scheme != PREPARED:
        return str(entry.get("url"))
    name = f"{PREPARED}://{key[:SHORT_CHARACTERS]}"
    origin = entry.get("made")
    if not origin:
        return name
    return f"└ {name} ({' + '.join(origin.get('steps') or ())} of {origin.get('model')})"


def short(revision: object) -> str:
    """A revision as it is told apart by eye: the beginning of a long digest."""
    text = str(revision or NONE)
    return text[:12] if len(text) >= 32 else text


def _usage(usage: Mapping[str, Any]) -> str:
    parts = []
    for name, text in (("bytes_used", "{} taken"), ("quota_bytes", "of {} allowed")):
        if usage.get(name) is not None:
            parts.append(text.format(size(usage[name])))
    if usage.get("bytes_prepared"):
        parts.append(f"({size(usage['bytes_prepared'])} by what was made here)")
    free = usage.get("free_bytes")
    if free is not None:
        parts.append(f"{', ' if parts else ''}{size(free)} of the disk free")
    return " ".join(parts).replace(" ,", ",") or "what it takes is not known"


def _share(part: float | None, whole: float | None) -> str:
    if part is None or whole is None:
        return UNKNOWN
    return NONE if not whole else f"{100 * part / whole:.0f} %"


def _state(entry: Mapping[str, Any]) -> str | tuple[str, str]:
    leases = entry.get("leases") or ()
    parts = ["pinned"] if entry.get("pinned") else []
    parts += [f"in use by {', '.join(map(str, leases))}"] if leases else []
    if leases and not entry.get("complete") and str(entry.get("url")).startswith(PREPARED):
        return "being made", BUSY
    if not entry.get("complete"):
        return ", ".join(["not whole", *parts]), BUSY
    return ", ".join(parts) or NONE


def done(told: Mapping[str, Any]) -> str:
    """What a verb has done, in a line or two."""
    model, took = told.get("model"), duration(told.get("elapsed_s"))
    verb = told["verb"]
    if verb == "preload":
        return _preloaded(told, took)
    if verb == "prewarm":
        pages = told.get("pages") or {}
        after = pages.get("after") or {}
        share = _share(after.get("bytes_cached"), after.get("bytes_total"))
        return (
            f"{model}: {size(pages.get('bytes_read'))} read, {share} in the page cache ({took})\n"
        )
    if verb == "verify":
        return _verified(told, took)
    if verb == "replicate":
        return "".join(_site(name, one) for name, one in (told.get("sites") or {}).items())
    if verb == "evict":
        return _evicted(told)
    if verb == "pin":
        return f"{model} is pinned; `tidegate model unpin` lets it be evicted again.\n"
    return f"{model} may be evicted again.\n"


def _evicted(told: Mapping[str, Any]) -> str:
    gone = " and ".join(short(one) for one in told.get("revisions") or ())
    model = f"{told.get('model')} {gone}".rstrip()
    what = f"What was made of {model}" if told.get("prepared") else model
    text = f"{what} is evicted; {size(told.get('freed_bytes'))} are free again.\n"
    left = [short(one) for one in told.get("left") or ()]
    if left and not told.get("prepared"):
        text += f"Still here: {', '.join(left)} (`--revision` names one, `--all` all).\n"
    return text


def _preloaded(told: Mapping[str, Any], took: str) -> str:
    """What is opened in the end stands last: the result of the steps, where there are any."""
    model, path, made = told.get("model"), told.get("path"), told.get("prepared")
    if told.get("size_bytes") is None:
        text = f"{model} is used where it lies"
    else:
        text = f"{model} {short(told.get('revision'))}, {size(told['size_bytes'])}"
        if told.get("was_there"):
            text += ", was there already"
        else:
            text += f" in {told.get('files')} files ({took})"
    if made and told.get("prepared_s") is not None:
        text += f", prepared in {duration(told['prepared_s'])}"
    elif made:
        text += ", prepared already"
    note = f"Note: {told['note']}\n" if told.get("note") else ""
    return f"{text}: {made or path}\n{note}"


def _verified(told: Mapping[str, Any], took: str) -> str:
    damage = told.get("damage") or []
    model = told.get("model")
    if told.get("revision"):
        model = f"{model} {short(told['revision'])}"
    if not damage:
        return f"{model}: every byte is what it was ({took}).\n"
    lines = [f"{model}: {len(damage)} damaged{', mended' if told.get('repaired') else ''}"]
    return "\n".join([*lines, *map(_damage, damage)]) + "\n"


def _damage(one: Mapping[str, Any]) -> str:
    piece = "" if one.get("piece") is None else f" (piece {one['piece']})"
    return f"  {one.get('path')}: {one.get('problem') or 'it is damaged'}{piece}"


def _site(name: str, outcome: Mapping[str, Any]) -> str:
    if outcome.get("error"):
        return f"{name}: {outcome['error']}\n"
    return f"{name}: {'it is there' if outcome.get('done', True) else 'not done'}\n"
