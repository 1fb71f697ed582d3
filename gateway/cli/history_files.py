"""Files with the past of a pool: what ``tidegate history export`` writes, and other tables of
requests over time (``autoscaler.replay.traces`` says which columns are known).

numpy, and pyarrow for parquet, are imported when they are needed.
"""

from __future__ import annotations

import csv
import importlib.util
import math
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, TYPE_CHECKING

from autoscaler.signals.series import MINUTE_S, SERIES

if TYPE_CHECKING:
    from forecaster.types import Floats

PARQUET = (".parquet", ".pq")
SUMS = frozenset({"arrivals", "errors", "input_tokens", "predicted_output_tokens", "output_tokens"})
"""Series that are sums of a minute; the others are means of it."""

Points = dict[int, float]
"""Values by minute (Unix time / 60)."""


class BadTable(Exception):
    """A file that has no past of a pool; the message says why."""


def read_points(
    path: Path, *, column: str | None = None, start_s: float | None = None
) -> dict[str, Points]:
    """The series that a file has: in columns named as they are, or requests and tokens by the names
    that traces have. A row is a step of time, or without a column of counts one request. ``column``
    names the one with the requests, ``start_s`` the Unix time of the first row, where times are
    since some beginning. Raises ``BadTable``, ``OSError``.
    """
    if importlib.util.find_spec("numpy") is None:
        raise BadTable("reading files needs the extra `forecast` of the package (numpy)")
    import numpy as np

    from autoscaler.replay import traces

    try:
        parquet = path.suffix in PARQUET
        table = traces.read_parquet(path) if parquet else traces.read_csv(path)
        names = {one.lower(): one for one in table}
        time = traces.first(names, traces.TIMES)
        if time is None:
            raise BadTable(f"{path} has no column of times (one of {', '.join(traces.TIMES)})")
        at_s, absolute = traces.to_seconds(
            table[time], milliseconds=time.lower() == "t_ms", what=f"{path}, column {time}"
        )
        columns = {
            series: traces.counts(table[name], f"{path}, column {name}")
            for series, name in _columns(names, column, path).items()
        }
    except ModuleNotFoundError as error:
        raise BadTable(f"parquet needs {error.name} (`pip install {error.name}`)") from None
    except traces.TraceError as error:
        raise BadTable(str(error)) from None
    if len(at_s) < 2:
        raise BadTable(f"{path} has one row; two are needed at least")
    if start_s is not None:
        at_s = at_s - at_s.min() + start_s
    elif not absolute:
        raise BadTable(f"{path} has times since some beginning: --start says when that was")
    order = np.argsort(at_s, kind="stable")
    at_s = at_s[order]
    columns = {series: values[order] for series, values in columns.items()}
    if "arrivals" not in columns and "input_tokens" in columns:
        return _of_requests(at_s, columns)
    return _of_steps(at_s, columns, path)


def _columns(names: Mapping[str, str], column: str | None, path: Path) -> dict[str, str]:
    """The column of each series that there is."""
    from autoscaler.replay import traces

    found = {series: names[series] for series in SERIES if series in names}
    for series, known in (
        ("arrivals", traces.COUNTS),
        ("input_tokens", traces.PROMPTS),
        ("output_tokens", traces.OUTPUTS),
    ):
        name = traces.first(names, known)
        if name is not None:
            found.setdefault(series, name)
    if column is not None:
        if column not in names.values():
            raise BadTable(f"{path} has no column {column!r}")
        found["arrivals"] = column
    if not found:
        raise BadTable(f"{path} has no column of a series; there are {', '.join(SERIES)}")
    return found


def _of_requests(at_s: Floats, columns: Mapping[str, Floats]) -> dict[str, Points]:
    """A row for each request: the minutes between the first and the last, which are not whole."""
    import numpy as np

    minutes = np.floor(at_s / MINUTE_S).astype(np.int64)
    first, count = int(minutes[0]), int(minutes[-1] - minutes[0]) + 1
    weights: dict[str, Floats | None] = {"arrivals": None, **columns}
    found = {}
    for series, values in weights.items():
        if series in SUMS:
            sums = np.bincount(minutes - first, weights=values, minlength=count)
            points = zip(range(first, first + count), sums.tolist(), strict=True)
            found[series] = dict(list(points)[1:-1])
    return found


def _of_steps(at_s: Floats, columns: Mapping[str, Floats], path: Path) -> dict[str, Points]:
    """A row for each step of time: some are a minute, or a part of a step is one."""
    import numpy as np

    gaps, counts = np.unique(np.round(np.diff(at_s)), return_counts=True)
    step_s = int(gaps[np.argmax(counts)])  # the most common, the shortest of those
    if step_s < 1 or (MINUTE_S % step_s and step_s % MINUTE_S):
        raise BadTable(f"{path} has steps of {step_s} s, which do not fit minutes")
    rows, parts = max(1, MINUTE_S // step_s), max(1, step_s // MINUTE_S)
    minutes = np.floor(at_s / MINUTE_S + 1e-9).astype(np.int64).tolist()
    found: dict[str, Points] = {}
    for series, values in columns.items():
        of_minute: dict[int, list[float]] = {}
        for minute, value in zip(minutes, values.tolist(), strict=True):
            of_minute.setdefault(minute, []).append(value)
        points = found[series] = {}
        for minute, some in of_minute.items():
            total = math.fsum(some)
            if len(some) != rows or not math.isfinite(total):
                continue  # it is not whole
            value = total / parts if series in SUMS else total / rows
            points.update({minute + part: value for part in range(parts)})
    return found


def write_table(
    path: Path | None, start_s: float, series: Mapping[str, Sequence[float | None]]
) -> None:
    """A row a minute: its time and the series, nothing where one is unknown. As CSV to a file or to
    standard output, or as parquet, by the file's name."""
    if path is not None and path.suffix in PARQUET:
        _write_parquet(path, start_s, series)
    elif path is not None:
        with path.open("w", newline="", encoding="utf-8") as file:
            _write_csv(file, start_s, series)
    else:
        _write_csv(sys.stdout, start_s, series)


def _write_csv(file: IO[str], start_s: float, series: Mapping[str, Sequence[float | None]]) -> None:
    rows = csv.writer(file, lineterminator="\n")
    rows.writerow(("time", *series))
    for index, values in enumerate(zip(*series.values(), strict=True)):
        at = datetime.fromtimestamp(start_s + index * MINUTE_S, UTC)
        shown = ("" if value is None else f"{value:.10g}" for value in values)
        rows.writerow((at.strftime("%Y-%m-%dT%H:%M:%SZ"), *shown))


def _write_parquet(
    path: Path, start_s: float, series: Mapping[str, Sequence[float | None]]
) -> None:
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ModuleNotFoundError as error:
        raise BadTable(f"parquet needs {error.name} (`pip install {error.name}`)") from None
    length = max(map(len, series.values()), default=0)
    times = [round((start_s + index * MINUTE_S) * 1000) for index in range(length)]
    columns = {"time": pa.array(times, pa.timestamp("ms", tz="UTC"))}
    columns |= {name: pa.array(list(values), pa.float64()) for name, values in series.items()}
    parquet.write_table(pa.table(columns), path)
