"""Makes of a model what its pool wants: steps run one after another, each result kept.

A result's key is a digest of what it is made of, how, and with which tools; where the key is known
nothing is run. Steps run in the engine's environment, as processes that end with this one. What an
interrupted step left is gone on with if the step can, and one step at a time makes each result,
over all processes of the node.

A step writes into a folder of the cache (``store.unfinished_results``), within the quota,
with room made before it begins. The files of a finished result become blobs by links, and it is
what any model is: counted, shown, leased, pinned, evicted.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from modelcache.cache import ModelCache
from modelcache.ports import CachedModel, IsCancelled, OnProgress
from modelcache.prepare.built_in_steps import expect_bytes
from modelcache.prepare.step_process import (
    DEFAULT_LIMITS,
    Run,
    StepFailed,
    StepLimits,
    bytes_under,
    run_step,
)
from modelcache.refs import check_file_path
from modelcache.settings import PreparationStep, StepKind
from modelcache.store.files import (
    has_name,
    make_directory,
    open_lock,
    remove_empty,
    remove_tree,
    try_lock,
)
from modelcache.store.layout import RESULT, result_url
from modelcache.store.leases import Lease
from modelcache.store.records import PIN, StepRecord, name_result, read_directory, read_use
from modelcache.store.unfinished_results import read_step, read_unfinished, write_step
from modelcache.types import Cancelled, FileEntry, Made, NoSpace, NotFound, Progress

STEP_FORMAT = 2
"""Raised when what a kind of step makes changes: what an older Tidegate made is then not used."""

TOOLS: Mapping[StepKind, tuple[str, ...]] = {
    "gguf_to_safetensors": ("gguf", "torch", "transformers"),
    "cast": ("torch",),
    "command": (),
}
"""Packages of the engine environment whose versions are part of what a step is."""

INPUT = "{input}"
OUTPUT = "{output}"
PYTHON = "{python}"
"""What a command's arguments may contain: the model's folder, an empty folder for what is made,
the engine's interpreter."""


PROGRAM_MOST_BYTES = 64 * 1024 * 1024
"""Largest file among a command's arguments whose content is part of the step's key."""

WAIT_S = 0.1
FOREIGN = frozenset({"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "PYTHONSTARTUP"})
VERSIONS = """\
import importlib.metadata as m, json, sys
def v(n):
    try: return m.version(n)
    except m.PackageNotFoundError: return ""
print(json.dumps({n: v(n) for n in sys.argv[1:]}))
"""

AskVersions = Callable[[Path, Sequence[str]], Mapping[str, str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class LeasedModel:
    """A model that stays as long as this is held: until ``lease.release``, or the process ends."""

    model: CachedModel
    lease: Lease


class Results:
    """The results of steps in one cache."""

    def __init__(self, cache: ModelCache) -> None:
        self._cache = cache
        self._store = cache.store
        self._layout = cache.store.layout

    def hold(self, key: str, holder: str, *, final: bool) -> LeasedModel | None:
        """This result, leased; ``None`` if it is not here. ``final``: it is wanted for itself, not
        only as a step on the way."""
        model = self._cache.find(result_url(key))
        if model is None:
            return None
        try:
            lease = self._cache.lease(model, holder)
        except NotFound:
            return None
        try:
            if final:
                self._note_final(model)
        except BaseException:
            lease.release()
            raise
        return LeasedModel(model=model, lease=lease)

    def _note_final(self, model: CachedModel) -> None:
        if not read_use(self._layout.revision(model.url, model.revision)).final:
            with self._store.lock():
                self._store.note_use(model.url, model.revision, final=True)

    # Making one. The caller of these holds the result's lock.

    def begin(self, key: str, record: StepRecord) -> Path:
        """Have room for a result, and where it is to be written. Raises ``NoSpace``."""
        with self._store.lock():
            folder = self._layout.unfinished(key)
            if not record.resumes:
                remove_tree(folder)
            fresh = not folder.exists()
            missing = max(record.promised_bytes - read_unfinished(self._layout, key).bytes_taken, 1)
            what = name_result(key, record.made)
            try:
                self._store.capacity.make_room(missing, missing, what=what, making=key)
            except NoSpace:
                if fresh:
                    remove_empty(folder)
                raise
            output = self._layout.unfinished_output(key)
            make_directory(output)
            write_step(self._layout, key, record)
            os.utime(folder)
        return output

    def check_room(self, key: str, size_bytes: int) -> None:
        """See whether a result that has grown to this still fits, and make room where it has grown
        past what was promised. Raises ``NoSpace``."""
        record = read_step(self._layout, key)
        if record is None or size_bytes <= record.promised_bytes:
            return
        with self._store.lock():
            what = name_result(key, record.made)
            self._store.capacity.make_room(1, 1, what=what, making=key, grown_bytes=size_bytes)

    def is_finished(self, key: str) -> bool:
        """Whether the step has done its work, and the cache has only to take it over."""
        record, output = read_step(self._layout, key), self._layout.unfinished_output(key)
        if record is None or not record.finished or not output.is_dir():
            return False
        return find_refused(output) is None

    def note_finished(self, key: str, record: StepRecord, took_s: float) -> None:
        """The step has done its work, and need not be repeated if this process is killed."""
        output = self._layout.unfinished_output(key)
        for path in (*sorted(output.rglob("*")), output):
            _sync(path)
        with self._store.lock():
            done = replace(record, finished=True, promised_bytes=0, took_s=took_s)
            write_step(self._layout, key, done)

    def publish(
        self,
        key: str,
        made: Made,
        holder: str,
        *,
        final: bool,
        on_progress: OnProgress,
        cancelled: IsCancelled,
    ) -> LeasedModel:
        """Take a finished result into the cache, leased before it could be evicted."""
        url, layout = result_url(key), self._layout
        record = read_step(layout, key)
        took_s = (record.took_s if record is not None else 0.0) + self._cost_s(made.before)
        with self._store.lock():
            lease = self._store.take_lease(url, RESULT, holder, ahead=True)
        assert lease is not None, "it is taken ahead"
        try:
            model = self._cache.publish(
                layout.unfinished_output(key), url=url, revision=RESULT, made=made,
                on_progress=on_progress, cancelled=cancelled,
            )  # fmt: skip
            size_bytes = 0 if model.manifest is None else model.manifest.size_bytes
            with self._store.lock():
                cost = took_s / (size_bytes / 1e9) if size_bytes and took_s else None
                self._store.note_use(url, RESULT, reload_s_per_gb=cost, final=final)
                # What is used of a pinned model is as pinned as the model.
                if final and (layout.revision(made.model, made.revision) / PIN).exists():
                    self._store.set_pin(url, RESULT, pinned=True)
                remove_tree(layout.unfinished(key))
        except BaseException:
            lease.release()
            raise
        return LeasedModel(model=model, lease=lease)

    def _cost_s(self, key: str) -> float:
        """Seconds to make a result of its model, as far as they were measured."""
        record = read_directory(self._layout, self._layout.revision(result_url(key), RESULT))
        if not key or record is None:
            return 0.0
        return (record.use.reload_s_per_gb or 0.0) * record.size_bytes / 1e9


def find_refused(output: Path) -> str | None:
    """The path of a file that no model may have, below a result; ``None`` if all may stay."""
    for path in sorted(output.rglob("*")):
        name = path.relative_to(output).as_posix()
        if path.is_file() and not check_file_path(name):
            return name
    return None


def _sync(path: Path) -> None:
    """Have the disk have it: once its digests are written down its bytes are believed."""
    if path.is_symlink() or not (path.is_file() or path.is_dir()):
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def input_digest(files: Iterable[FileEntry]) -> str:
    """What a model is, for whatever is made of it: its files' names and digests."""
    return _digest(sorted((file.path, file.size_bytes, file.digest) for file in files))


def step_key(
    before: str, step: PreparationStep, *, tools: Mapping[str, str], programs: Mapping[str, str]
) -> str:
    """The key of a step's result: of what it is made, how, and with which tools.

    ``before`` is the input's digest or the key of the step before; ``tools`` the versions of the
    kind's ``TOOLS``; ``programs`` digests of the files that a command runs. How long it may take
    and whether it can resume change nothing about its result.
    """
    spec = step.model_dump(exclude={"timeout_s", "resumable"})
    used = {name: tools[name] for name in TOOLS[step.kind]}
    return _digest([before, STEP_FORMAT, spec, used, dict(programs)])


def _digest(value: object) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class PrepareRequest:
    """The caller of a result: its progress callback, and whether it has cancelled."""

    holder: str
    on_progress: OnProgress
    cancelled: IsCancelled


@dataclass(slots=True, kw_only=True)
class Preparation:
    """Runs steps, with work and results in ``cache``. ``python`` is the engine's interpreter,
    ``environ`` what commands see of the environment."""

    cache: ModelCache
    python: Path
    environ: Mapping[str, str]
    ask_versions: AskVersions | None = None
    limits: StepLimits = DEFAULT_LIMITS
    results: Results = field(init=False)

    def __post_init__(self) -> None:
        self.results = Results(self.cache)

    def prepare(
        self,
        source: Path,
        digest: str,
        steps: Sequence[PreparationStep],
        *,
        model: str,
        revision: str,
        holder: str = "preparing",
        on_progress: OnProgress = lambda progress: None,
        cancelled: IsCancelled = lambda: False,
    ) -> LeasedModel:
        """The model in ``source``, whose ``input_digest`` is ``digest``, after all steps (one at
        least); leased for ``holder``. ``model`` and ``revision`` say which it is.

        Blocks as long as it takes; ``source`` must stay meanwhile. Raises ``StepFailed``,
        ``NoSpace``, or ``Cancelled`` soon after ``cancelled()`` turns true.
        """
        asked = PrepareRequest(holder=holder, on_progress=on_progress, cancelled=cancelled)
        keys = self.keys(digest, steps)
        held: LeasedModel | None = None
        for number, (step, key) in enumerate(zip(steps, keys, strict=True)):
            made = Made(
                model=model,
                revision=revision,
                steps=tuple(one.kind for one in steps[: number + 1]),
                before=keys[number - 1] if number else "",
            )
            if held is None:
                held = self._result(step, key, source, made, asked, final=key == keys[-1])
                continue
            with held.lease:  # what a step begins with stays until it has ended
                path = held.model.path
                held = self._result(step, key, path, made, asked, final=key == keys[-1])
        assert held is not None, "there is a step"
        return held

    def _result(
        self,
        step: PreparationStep,
        key: str,
        source: Path,
        made: Made,
        asked: PrepareRequest,
        *,
        final: bool,
    ) -> LeasedModel:
        """One step's result, made unless it is there."""
        held = self.results.hold(key, asked.holder, final=final)
        if held is not None:
            return held
        with self.exclusive(key, asked) as lock:
            held = self.results.hold(key, asked.holder, final=final)
            if held is not None:
                return held
            self.cache.sweep()
            if not self.results.is_finished(key):
                self._make(step, key, source, made, lock, asked)
            return self.results.publish(
                key, made, asked.holder, final=final,
                on_progress=asked.on_progress, cancelled=asked.cancelled,
            )  # fmt: skip

    def keys(self, digest: str, steps: Sequence[PreparationStep]) -> list[str]:
        """The key of each step's result. Raises ``StepFailed`` where the engine's interpreter
        cannot be asked for its versions."""
        names = sorted({name for step in steps for name in TOOLS[step.kind]})
        ask = self.ask_versions or _ask_versions
        tools = ask(self.python, names) if names else {}
        found = []
        for step in steps:
            programs = _programs(step)
            digest = step_key(digest, step, tools=tools, programs=programs)
            found.append(digest)
        return found

    def _make(
        self,
        step: PreparationStep,
        key: str,
        source: Path,
        made: Made,
        lock: int,
        asked: PrepareRequest,
    ) -> None:
        """Run a step, with room made for its result before it begins where its size is known."""
        began_s = time.monotonic()
        promised = expect_bytes(step, source) or 0
        record = StepRecord(made=made, resumes=step.resumes, promised_bytes=promised)
        output = self.results.begin(key, record)
        log = self.cache.store.layout.step_log(key)
        run = Run(
            name=step.kind,
            argv=self._argv(step, source, output),
            env=self._env(step, source, output),
            log=log,
            output=output,
            timeout_s=step.timeout_s,
            free_bytes=self.cache.store.capacity.free_bytes,
            reserve_bytes=self.cache.store.capacity.reserve_bytes,
            hold=(lock,),
            on_size=lambda size_bytes: self.results.check_room(key, size_bytes),
            limits=self.limits,
        )
        try:
            run_step(run, on_progress=asked.on_progress, cancelled=asked.cancelled)
            self._check_output(step, key, output, log)
        except BaseException:
            if not step.resumes:
                # Nothing can go on with what it has left. What it said stays.
                with self.cache.store.lock():
                    remove_tree(self.cache.store.layout.unfinished(key))
            raise
        self.results.note_finished(key, record, time.monotonic() - began_s)

    def _check_output(self, step: PreparationStep, key: str, output: Path, log: Path) -> None:
        """Whether what a step has left can be a model, and fits."""
        for partial in output.rglob(".*.partial"):
            partial.unlink()
        paths = list(output.rglob("*"))
        for path in paths:
            if path.is_symlink() and not path.is_file():
                raise StepFailed(
                    f"{step.kind} made {path.name}, a link to no file: a result has files only"
                )
        if not any(path.is_file() for path in paths):
            raise StepFailed(f"{step.kind} made no file; its log is {log}")
        refused = find_refused(output)
        if refused is not None:
            raise StepFailed(
                f"{step.kind} made a file called {refused[:200]!r}: paths of a model have no "
                "backslash, nothing that cannot be printed, and at most 1024 characters"
            )
        self.results.check_room(key, bytes_under(output))

    def _argv(self, step: PreparationStep, source: Path, output: Path) -> tuple[str, ...]:
        if step.kind == "command":
            places = {INPUT: str(source), OUTPUT: str(output), PYTHON: str(self.python)}
            return tuple(_fill(argument, places) for argument in step.argv)
        argv = [str(self.python), "-I", "-m", "modelcache.prepare.built_in_steps", step.kind]
        argv += [str(source), str(output)]
        for name, value in (
            ("--dtype", step.dtype), ("--file", step.file),
        ):  # fmt: skip
            if value is not None:
                argv += [name, str(value)]
        return tuple(argv)

    def _env(self, step: PreparationStep, source: Path, output: Path) -> dict[str, str]:
        env = {name: value for name, value in self.environ.items() if name not in FOREIGN}
        env |= {"TIDEGATE_INPUT": str(source), "TIDEGATE_OUTPUT": str(output)}
        env |= {"PYTHONSAFEPATH": "1"}  # no Python imports what lies where it works
        if step.kind != "command":
            env |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        return env | step.env

    @contextlib.contextmanager
    def exclusive(self, key: str, asked: PrepareRequest) -> Iterator[int]:
        """One maker of a result at a time. The lock goes when both its process and the step that
        it started are gone."""
        path = self.cache.store.layout.step_lock(key)
        while True:
            with open_lock(path) as lock:
                while not try_lock(lock):
                    asked.on_progress(Progress(phase="preparing", detail="another process does it"))
                    if asked.cancelled():
                        raise Cancelled("preparing was cancelled")
                    time.sleep(WAIT_S)
                # One that was swept while we waited excludes no other process.
                if has_name(lock, path):
                    yield lock
                    return


def _fill(argument: str, places: Mapping[str, str]) -> str:
    for name, value in places.items():
        argument = argument.replace(name, value)
    return argument


def _programs(step: PreparationStep) -> dict[str, str]:
    """Digests of the scripts and programs that a command names by their path."""
    found = {}
    for argument in step.argv if step.kind == "command" else ():
        path = Path(argument)
        if path.is_absolute() and path.is_file() and path.stat().st_size <= PROGRAM_MOST_BYTES:
            found[argument] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def _ask_versions(python: Path, names: Sequence[str]) -> Mapping[str, str]:
    try:
        asked = subprocess.run(
            [str(python), "-I", "-c", VERSIONS, *names],
            capture_output=True, text=True, timeout=60, check=True, env={},
        )  # fmt: skip
        found: dict[str, str] = json.loads(asked.stdout)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        raise StepFailed(f"{python} cannot say which packages it has: {error}") from error
    missing = [name for name in names if not found.get(name)]
    if missing:
        raise StepFailed(f"{', '.join(missing)} is not installed for {python}")
    return found
