"""Demand of the past as a replay takes it: read from files, or from a pool's stored history.

CSV and parquet, by their columns:

- a rate per step: ``t_s`` (or ``t``, ``t_ms``, ``timestamp``, ``time``, ``ds``) with ``requests``
  (or ``value``, ``count``, ``y``), and where known ``input_tokens`` and ``output_tokens`` as sums
  of the step (``prompt_tokens``, ``input_length``, ``output_length`` are read too);
- one row per request: a time and tokens, and no count;
- one column per client (``t_s``, ``c0``, ``c1``, …): summed, or one of them by ``column``.

``timestamp`` columns are dates or Unix times. The step is the median distance of two rows.
Parquet needs pyarrow, which is imported when it is read.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np

from autoscaler.signals.series import MINUTE_S
from forecaster.types import Floats, History

TIMES = ("t_s", "t_ms", "t", "timestamp", "time", "ds", "arrived_at")
COUNTS = ("requests", "arrivals", "value", "count", "num_requests", "y")
PROMPTS = ("input_tokens", "prompt_tokens", "input_length", "contexttokens", "context_tokens")
OUTPUTS = ("output_tokens", "completion_tokens", "output_length", "generatedtokens")


class Spread(StrEnum):
    """How the requests of a step come over its seconds."""

    EVEN = "even"
    POISSON = "poisson"


class TraceError(ValueError):
    """A file that cannot be read as a trace; the message says what is missing."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Trace:
    """Demand on an even grid. All three arrays are sums per step and equally long, without NaN.

    ``start_s`` is Unix time, ``None`` where it is not known. Without tokens every request is one
    prompt token and nothing else (``counted``).
    """

    name: str
    step_s: float
    requests: Floats
    prompt_tokens: Floats
    output_tokens: Floats
    start_s: float | None = None
    counted: bool = False

    @property
    def seconds(self) -> int:
        """How long it is."""
        return round(len(self.requests) * self.step_s)

    @property
    def means(self) -> tuple[float, float]:
        """Mean prompt and output tokens of a request."""
        requests = float(self.requests.sum())
        if requests <= 0.0:
            raise TraceError(f"{self.name} has no request")
        return float(self.prompt_tokens.sum()) / requests, float(
            self.output_tokens.sum()
        ) / requests

    @property
    def tokens_per_s(self) -> float:
        """The mean rate of prompt and output tokens."""
        return float(self.prompt_tokens.sum() + self.output_tokens.sum()) / self.seconds

    def part(self, from_s: float, to_s: float) -> Trace:
        """The steps between two times since its beginning."""
        first, last = round(from_s / self.step_s), round(to_s / self.step_s)
        return replace(
            self,
            requests=self.requests[first:last],
            prompt_tokens=self.prompt_tokens[first:last],
            output_tokens=self.output_tokens[first:last],
            start_s=None if self.start_s is None else self.start_s + first * self.step_s,
        )

    def scaled(self, factor: float) -> Trace:
        """The same with ``factor`` times as many requests."""
        return replace(
            self,
            requests=self.requests * factor,
            prompt_tokens=self.prompt_tokens * factor,
            output_tokens=self.output_tokens * factor,
        )

    def history(self) -> History:
        """Tokens per second, as the mean of each minute."""
        tokens = self.prompt_tokens + self.output_tokens
        per_minute = MINUTE_S / self.step_s
        if per_minute > 1.0:
            whole = int(len(tokens) // per_minute)
            tokens = tokens[: round(whole * per_minute)].reshape(whole, -1).sum(axis=1)
            return History(values=tokens / MINUTE_S, step_s=MINUTE_S, start_s=self.start_s)
        repeat = round(self.step_s / MINUTE_S)
        return History(
            values=np.repeat(tokens / self.step_s, repeat), step_s=MINUTE_S, start_s=self.start_s
        )

    def per_second(
        self, spread: Spread = Spread.EVEN, seed: int = 0
    ) -> tuple[Floats, Floats, Floats]:
        """Requests of each second, and their mean prompt and output tokens.

        ``even`` spreads a step's requests evenly over it; ``poisson`` draws each second's number
        with that mean, by ``seed``. A trace with steps of a second or less is not spread.
        """
        if self.step_s < 1.0 or self.step_s != round(self.step_s):
            raise TraceError(
                f"{self.name} has steps of {self.step_s:g} s; whole seconds are needed"
            )
        repeat = round(self.step_s)
        some = np.maximum(self.requests, 1e-300)
        rate = np.repeat(self.requests / self.step_s, repeat)
        if repeat > 1 and spread is Spread.POISSON:
            rate = np.random.default_rng(seed).poisson(rate).astype(np.float64)
        prompt = np.repeat(np.where(self.requests > 0, self.prompt_tokens / some, 0.0), repeat)
        output = np.repeat(np.where(self.requests > 0, self.output_tokens / some, 0.0), repeat)
        return rate, prompt, output


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RequestTrace:
    """One entry per request, in order of time: when it came (seconds since the first), tokens."""

    name: str
    at_s: Floats
    prompt_tokens: Floats
    output_tokens: Floats
    start_s: float | None = None

    def binned(self, step_s: float = 1.0) -> Trace:
        """The same as sums of steps."""
        steps = int(self.at_s[-1] // step_s) + 1
        index = (self.at_s // step_s).astype(np.int64)

        def sums(weights: Floats | None) -> Floats:
            return np.bincount(index, weights=weights, minlength=steps).astype(np.float64)

        return Trace(
            name=self.name,
            step_s=step_s,
            requests=sums(None),
            prompt_tokens=sums(self.prompt_tokens),
            output_tokens=sums(self.output_tokens),
            start_s=self.start_s,
        )


# ── From arrays ──────────────────────────────────────────────────────────────────────────────────


def from_rates(
    name: str,
    requests: Floats,
    prompt_tokens: Floats | None = None,
    output_tokens: Floats | None = None,
    *,
    step_s: float = MINUTE_S,
    start_s: float | None = None,
) -> Trace:
    """A trace of sums per step, such as the stored history of a pool.

    What is unknown (NaN) is interpolated: a replay needs some demand there, and none would be a
    fall that did not happen. Steps longer than a minute become minutes, on lines between the steps'
    middles. Without tokens every request counts as one.
    """
    requests = fill_gaps(np.asarray(requests, dtype=np.float64))
    counted = prompt_tokens is None or output_tokens is None
    prompt = requests if prompt_tokens is None else fill_gaps(prompt_tokens)
    output = np.zeros_like(requests) if output_tokens is None else fill_gaps(output_tokens)
    if counted:
        prompt, output = requests, np.zeros_like(requests)
    if not len(requests) or not requests.sum() > 0.0:
        raise TraceError(f"{name} has no request")
    if step_s > MINUTE_S:
        steps = len(requests)
        middles = (np.arange(steps) + 0.5) * step_s
        minutes = (np.arange(int(steps * step_s // MINUTE_S)) + 0.5) * MINUTE_S
        part = MINUTE_S / step_s
        requests, prompt, output = (
            np.interp(minutes, middles, values) * part for values in (requests, prompt, output)
        )
        step_s = MINUTE_S
    return Trace(
        name=name,
        step_s=step_s,
        requests=requests,
        prompt_tokens=prompt,
        output_tokens=output,
        start_s=start_s,
        counted=counted,
    )


def fill_gaps(values: Floats) -> Floats:
    """NaN replaced by what lies on the line between the known values beside it."""
    values = np.asarray(values, dtype=np.float64)
    known = np.isfinite(values)
    if known.all() or not known.any():
        return np.nan_to_num(values)
    where = np.arange(len(values))
    return np.interp(where, where[known], values[known])


# ── From files ───────────────────────────────────────────────────────────────────────────────────


def read(path: Path, column: str | None = None) -> Trace | RequestTrace:
    """The trace in a file. Raises ``TraceError`` for a file of another shape, ``OSError``."""
    table = read_parquet(path) if path.suffix in (".parquet", ".pq") else read_csv(path)
    name = path.stem
    names = {one.lower(): one for one in table}
    time = first(names, TIMES)
    if time is None:
        raise TraceError(f"{path} has no column of times (one of {', '.join(TIMES)})")
    where = f"{path}, column "
    at_s, absolute = to_seconds(
        table[time], milliseconds=time.lower() == "t_ms", what=f"{where}{time}"
    )
    prompt, output = first(names, PROMPTS), first(names, OUTPUTS)
    count = column if column is not None else first(names, COUNTS)
    order = np.argsort(at_s, kind="stable")
    at_s = at_s[order]
    if column is not None and column not in table:
        raise TraceError(f"{path} has no column {column!r}")
    if count is None and prompt is not None and output is not None:
        start_s = float(at_s[0]) if absolute else None
        return RequestTrace(
            name=name,
            at_s=at_s - at_s[0],
            prompt_tokens=counts(table[prompt], f"{where}{prompt}")[order],
            output_tokens=counts(table[output], f"{where}{output}")[order],
            start_s=start_s,
        )
    if count is not None:
        requests = counts(table[count], f"{where}{count}")
    else:
        clients = [one for one in table if one != time]
        if not clients:
            raise TraceError(f"{path} has no column of requests (one of {', '.join(COUNTS)})")
        requests = np.sum(
            [np.nan_to_num(counts(table[one], f"{where}{one}")) for one in clients], axis=0
        )
    tokens = count is not None and prompt is not None and output is not None
    columns = [requests[order]]
    if tokens and prompt is not None and output is not None:
        columns += [counts(table[one], f"{where}{one}")[order] for one in (prompt, output)]
    try:
        step_s, grids = on_grid(at_s, columns)
    except TraceError as error:
        raise TraceError(f"{path}: {error}") from None
    return from_rates(
        f"{name}:{column}" if column else name,
        *grids,
        step_s=step_s,
        start_s=float(at_s[0] // step_s * step_s) if absolute else None,
    )


def read_parquet(path: Path) -> Mapping[str, Any]:
    """Columns by name."""
    try:
        from pyarrow import parquet
    except ModuleNotFoundError:
        raise TraceError(
            f"{path}: reading parquet needs pyarrow (`pip install pyarrow`); CSV needs nothing"
        ) from None
    try:
        table = parquet.read_table(path)
    except (OSError, ValueError) as error:
        raise TraceError(f"{path} cannot be read as parquet: {error}") from None
    return {
        name: table.column(name).to_numpy()
        for name in table.column_names
        if not str(table.schema.field(name).type).startswith(("list", "large_list", "struct"))
    }


def read_csv(path: Path) -> Mapping[str, Any]:
    """Columns by name, as text. Raises ``TraceError``, ``OSError``."""
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = csv.reader(file)
        try:
            names = next(rows, None)
            if not names:
                raise TraceError(f"{path} is empty")
            columns: list[list[str]] = [[] for _ in names]
            for row in rows:
                if len(row) != len(names):
                    raise TraceError(
                        f"{path}, line {rows.line_num}: {len(row)} of {len(names)} fields"
                    )
                for values, value in zip(columns, row, strict=True):
                    values.append(value)
        except (UnicodeDecodeError, csv.Error):
            raise TraceError(f"{path} is no CSV file: it is not text in UTF-8") from None
    if not columns[0]:
        raise TraceError(f"{path} has no rows")
    return dict(zip((name.strip() for name in names), columns, strict=True))


def first(names: Mapping[str, str], wanted: Sequence[str]) -> str | None:
    """The first of these columns that there is."""
    return next((names[one] for one in wanted if one in names), None)


def numbers(values: Any, what: str = "a column") -> Floats:
    """A column as numbers; empty fields are NaN. Raises ``TraceError``."""
    if isinstance(values, list):
        values = [value if value.strip() else "nan" for value in values]
    try:
        return np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise TraceError(f"{what}: {_first_refused(float, values)} is no number") from None


def counts(values: Any, what: str) -> Floats:
    """Numbers of which none is below 0. Raises ``TraceError``."""
    found = numbers(values, what)
    below = np.flatnonzero(found < 0)
    if len(below):
        row = int(below[0])
        raise TraceError(
            f"{what}: {found[row]:g} in row {row + 1} is below 0; what is unknown is left empty"
        )
    return found


def _first_refused(parse: Callable[[Any], object], values: Any) -> str:
    """The first value that cannot be parsed, and its row below the heading."""
    for row, value in enumerate(values):
        try:
            parse(value)
        except (TypeError, ValueError):
            return f"{value!r} in row {row + 1}"
    return "a value"


def to_seconds(values: Any, *, milliseconds: bool, what: str = "a column") -> tuple[Floats, bool]:
    """Times as seconds, and whether they are Unix times rather than since some beginning. Raises
    ``TraceError``."""
    if isinstance(values, np.ndarray) and values.dtype.kind == "O":
        values = [str(value) for value in values]  # text in a parquet file
    if isinstance(values, list):
        try:
            values = [float(value) for value in values]
        except ValueError:
            try:
                dates = [datetime.fromisoformat(value.strip()) for value in values]
            except ValueError:
                refused = _first_refused(lambda one: datetime.fromisoformat(one.strip()), values)
                raise TraceError(
                    f"{what}: {refused} is no time: seconds, or 2026-11-30T14:05:00Z"
                ) from None
            values = [(one if one.tzinfo else one.replace(tzinfo=UTC)).timestamp() for one in dates]
    array = np.asarray(values)
    if np.issubdtype(array.dtype, np.datetime64):
        return array.astype("datetime64[ns]").astype(np.int64) / 1e9, True
    seconds = numbers(array, what) / (1000.0 if milliseconds else 1.0)
    if not np.isfinite(seconds).all():
        row = int(np.flatnonzero(~np.isfinite(seconds))[0])
        raise TraceError(f"{what}: there is no time in row {row + 1}")
    if not milliseconds and seconds[0] > 1e11:
        seconds = seconds / 1000.0  # Unix milliseconds: as seconds they were in the year 5138
    return seconds, bool(seconds[0] > 1e8)


def on_grid(at_s: Floats, columns: Sequence[Floats]) -> tuple[float, list[Floats]]:
    """The step of these times, and the columns on an even grid of it, with NaN where there is no
    row; several in one step are added."""
    if len(at_s) < 2:
        raise TraceError("a trace needs two rows at least")
    gaps = np.diff(at_s)
    step_s = float(round(float(np.median(gaps[gaps > 0])))) if (gaps > 0).any() else 0.0
    if step_s < 1.0:
        raise TraceError("rates need steps of a second or more")
    index = np.floor(at_s / step_s + 1e-9).astype(np.int64)
    index -= index[0]
    steps = int(index[-1]) + 1
    if steps > 100 * len(at_s):
        raise TraceError(f"the times are too far apart for steps of {step_s:g} s")
    seen = np.bincount(index, minlength=steps) > 0
    grids = []
    for values in columns:
        sums = np.bincount(index, weights=np.nan_to_num(values), minlength=steps)
        unknown = np.bincount(index, weights=np.isnan(values).astype(np.float64), minlength=steps)
        grids.append(np.where(seen & (unknown == 0), sums, math.nan))
    return step_s, grids
