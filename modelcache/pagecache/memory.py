"""How much memory there is for us: the machine's, or less where a control group says so."""

from __future__ import annotations

from pathlib import Path

ROOT = Path("/")
"""Where ``proc`` and ``sys`` are."""


def total_bytes(root: Path = ROOT) -> int | None:
    """Memory this process and its kin may take; ``None`` if unknown."""
    limits = [_meminfo(root, "MemTotal"), *(limit for limit, _ in _groups(root))]
    return min((limit for limit in limits if limit is not None), default=None)


def available_bytes(root: Path = ROOT) -> int | None:
    """Memory to be had without swapping or killing a process; ``None`` if unknown.

    Page cache counts as available, as the kernel's own ``MemAvailable`` has it.
    """
    free = [_meminfo(root, "MemAvailable")]
    free += [max(0, limit - used) for limit, used in _groups(root)]
    return min((one for one in free if one is not None), default=None)


def page_budget_bytes(setting: int | None, root: Path = ROOT) -> int:
    """What may be kept in the page cache: the setting, else half of the memory, else nothing."""
    return setting if setting is not None else (total_bytes(root) or 0) // 2


def _meminfo(root: Path, name: str) -> int | None:
    for line in _read(root / "proc/meminfo").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return None


def _groups(root: Path) -> list[tuple[int, int]]:
    """Limit and use (page cache not counted) of each control group around us that has a limit."""
    found = []
    for folder, names in _folders(root):
        limit = _number(folder / names[0])
        used = _number(folder / names[1])
        if limit is None or used is None:
            continue
        cache = 0
        for line in _read(folder / "memory.stat").splitlines():
            key, _, value = line.partition(" ")
            if key == names[2]:
                cache = int(value)
        found.append((limit, max(0, used - cache)))
    return found


def _folders(root: Path) -> list[tuple[Path, tuple[str, str, str]]]:
    """Folders of our control groups, from the innermost out, with the names of their files."""
    new = ("memory.max", "memory.current", "file")
    old = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_cache")
    found = []
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            top, names = root / "sys/fs/cgroup", new
        elif "memory" in controllers.split(","):
            top, names = root / "sys/fs/cgroup/memory", old
        else:
            continue
        parts = [part for part in path.split("/") if part not in ("", "..")]
        # In a container with a name space of its own the path may not be there, but the top is.
        found += [(top.joinpath(*parts[:n]), names) for n in range(len(parts), -1, -1)]
    return found


def _number(path: Path) -> int | None:
    """A file's number; ``None`` where there is none, or it says that there is no limit."""
    text = _read(path).strip()
    number = int(text) if text.isdigit() else None
    # Version 1 says "no limit" by a number near 2^63.
    return number if number is not None and number < 1 << 60 else None


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
