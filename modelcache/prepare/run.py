"""Makes of a model what its pool wants: steps run one after another, each result kept.

A result's key is a digest of what it is made of, how, and with which tools; where the key is known
nothing is run. Steps run in the engine's environment, as processes that end with this one. What an
interrupted step left is gone on with if the step can, and one step at a time makes each result,
over all processes of the node. Results lie in the model cache, within its quota.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from modelcache.cache import ModelCache
from modelcache.prepare.results import Held, Results, find_refused
from modelcache.prepare.size import expect_bytes
from modelcache.prepare.step_process import Run, bytes_under, run_step
from modelcache.steps import INPUT, OUTPUT, PYTHON, TOOLS, Step, StepFailed, StepRun, step_key
from modelcache.store.files import open_lock, try_lock
from modelcache.store.manifest import Job
from modelcache.store.pending_results import has_name
from modelcache.types import Cancelled, Made, Progress

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
class Prepared:
    """A prepared model: where it is, the key of its last step, and how each went.

    ``held`` keeps its last result from being evicted until it is released; ``None`` where there
    were no steps.
    """

    path: Path
    key: str
    runs: tuple[StepRun, ...]
    held: Held | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """Who asked for a result: what they are told, and whether they still want it."""

    holder: str
    on_progress: Callable[[Progress], None]
    cancelled: Callable[[], bool]


@dataclass(slots=True, kw_only=True)
class Preparation:
    """Runs steps, with work and results in ``cache``. ``python`` is the engine's interpreter,
    ``environ`` what commands see of the environment."""

    cache: ModelCache
    python: Path
    environ: Mapping[str, str]
    ask_versions: AskVersions | None = None
    results: Results = field(init=False)

    def __post_init__(self) -> None:
        self.results = Results(self.cache)

    def prepare(
        self,
        source: Path,
        digest: str,
        steps: Sequence[Step],
        *,
        model: str,
        revision: str,
        holder: str = "preparing",
        on_progress: Callable[[Progress], None] = lambda progress: None,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> Prepared:
        """The model in ``source``, whose ``input_digest`` is ``digest``, after all steps; leased
        for ``holder``. ``model`` and ``revision`` say which it is.

        Blocks as long as it takes; ``source`` must stay meanwhile. Raises ``StepFailed``,
        ``NoSpace``, or ``Cancelled`` soon after ``cancelled()`` turns true.
        """
        asked = Asked(holder=holder, on_progress=on_progress, cancelled=cancelled)
        keys = self.keys(digest, steps)
        runs: list[StepRun] = []
        path = source
        held: Held | None = None
        for number, (step, key) in enumerate(zip(steps, keys, strict=True)):
            made = Made(
                model=model,
                revision=revision,
                steps=tuple(one.kind for one in steps[: number + 1]),
                before=keys[number - 1] if number else "",
            )
            before = held
            try:
                held, run = self._result(step, key, path, made, asked, final=key == keys[-1])
            finally:
                # What a step begins with stays until it has ended.
                if before is not None:
                    before.lease.release()
            runs.append(run)
            path = held.model.path
        key = runs[-1].key if runs else digest
        return Prepared(path=path, key=key, runs=tuple(runs), held=held)

    def find(self, digest: str, steps: Sequence[Step]) -> Path | None:
        """Where the model is after all steps, if that was made already."""
        keys = self.keys(digest, steps)
        return self.results.find(keys[-1]) if keys else None

    def _result(
        self, step: Step, key: str, source: Path, made: Made, asked: Asked, *, final: bool
    ) -> tuple[Held, StepRun]:
        """One step's result, made unless it is there."""
        began_s = time.monotonic()
        log = None
        held = self.results.hold(key, asked.holder, final=final)
        if held is None:
            with self._alone(key, asked) as lock:
                held = self.results.hold(key, asked.holder, final=final)
                if held is None:
                    log = self.cache.store.layout.step_log(key)
                    self.results.sweep()
                    if not self.results.is_whole(key):
                        self._make(step, key, source, made, log, lock, asked)
                    held = self.results.publish(
                        key, made, asked.holder, final=final,
                        on_progress=asked.on_progress, cancelled=asked.cancelled,
                    )  # fmt: skip
        elapsed_s = time.monotonic() - began_s
        run = StepRun(kind=step.kind, key=key, cached=log is None, elapsed_s=elapsed_s, log=log)
        return held, run

    def keys(self, digest: str, steps: Sequence[Step]) -> list[str]:
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
        self, step: Step, key: str, source: Path, made: Made, log: Path, lock: int, asked: Asked
    ) -> None:
        """Run a step, with room made for its result before it begins where its size is known."""
        began_s = time.monotonic()
        promised = expect_bytes(step, source) or 0
        job = Job(made=made, resumes=step.resumes, promised_bytes=promised)
        output = self.results.begin(key, job)
        run = Run(
            name=step.kind,
            argv=self._argv(step, source, output),
            env=self._env(step, source, output),
            log=log,
            output=output,
            timeout_s=step.timeout_s,
            free_bytes=self.results.free_bytes,
            reserve_bytes=self.results.reserve_bytes,
            hold=(lock,),
            on_size=lambda size_bytes: self.results.check_room(key, size_bytes),
        )
        try:
            run_step(run, on_progress=asked.on_progress, cancelled=asked.cancelled)
            self._check_output(step, key, output, log)
        except BaseException:
            if not step.resumes:
                self.results.discard(key)
            raise
        self.results.note_whole(key, job, time.monotonic() - began_s)

    def _check_output(self, step: Step, key: str, output: Path, log: Path) -> None:
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

    def _argv(self, step: Step, source: Path, output: Path) -> tuple[str, ...]:
        if step.kind == "command":
            places = {INPUT: str(source), OUTPUT: str(output), PYTHON: str(self.python)}
            return tuple(_fill(argument, places) for argument in step.argv)
        argv = [str(self.python), "-I", "-m", "modelcache.prepare.child", step.kind]
        argv += [str(source), str(output)]
        for name, value in (
            ("--dtype", step.dtype), ("--world-size", step.world_size), ("--file", step.file),
        ):  # fmt: skip
            if value is not None:
                argv += [name, str(value)]
        return tuple(argv)

    def _env(self, step: Step, source: Path, output: Path) -> dict[str, str]:
        env = {name: value for name, value in self.environ.items() if name not in FOREIGN}
        env |= {"TIDEGATE_INPUT": str(source), "TIDEGATE_OUTPUT": str(output)}
        if step.kind != "command":
            env |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        return env | dict(step.env)

    @contextlib.contextmanager
    def _alone(self, key: str, asked: Asked) -> Iterator[int]:
        """One maker of a result at a time. The lock goes when both its process and the step that
        it started are gone."""
        path = self.cache.store.layout.step_lock(key)
        while True:
            with open_lock(path) as lock:
                while not try_lock(lock):
                    asked.on_progress(Progress(phase="preparing", detail="another process does it"))
                    if asked.cancelled():
                        raise Cancelled("preparing was called off")
                    time.sleep(WAIT_S)
                # One that was swept while we waited locks nobody out.
                if has_name(lock, path):
                    yield lock
                    return


def _fill(argument: str, places: Mapping[str, str]) -> str:
    for name, value in places.items():
        argument = argument.replace(name, value)
    return argument


def _programs(step: Step) -> dict[str, str]:
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
